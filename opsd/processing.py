"""Load the processor of a multimodal model. No torchvision is needed: images run on Pillow, videos on opsd/video.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from opsd.video import VideoProcessor, read_video_processor

# model_type starts with -> class in transformers; its video processor would want torchvision
_FAMILIES = {
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
    "qwen2_5_omni": "Qwen2_5OmniProcessor",
    "qwen3_omni_moe": "Qwen3OmniMoeProcessor",
}


def load_processor(path: str | Path, **kwargs: Any) -> Any:
    """The transformers processor of a folder or hub id; the Qwen families' with our video processor in its place."""
    import transformers

    model_type = transformers.AutoConfig.from_pretrained(path, **kwargs).model_type
    name = next((name for start, name in _FAMILIES.items() if model_type.startswith(start)), None)
    if name is None:
        return transformers.AutoProcessor.from_pretrained(path, **kwargs)
    # Qwen3-Omni's videos are prepared as Qwen2-VL's
    videos = read_video_processor(read_processor_files(path), whole_clip=model_type.startswith("qwen3_vl"))
    return _with_videos(getattr(transformers, name), videos).from_pretrained(path, **kwargs)


# Everything a folder holds beside config and weights: tokenizer, chat template, image, audio and video settings.
_FILES = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "*.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
)


def read_processor_files(path: str | Path) -> dict[str, bytes]:
    """The processor's files of a folder or hub id, by name. Training does not change them: a checkpoint gets copies.

    (`save_pretrained` would save our video processor, which plain transformers does not know.)
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path), allow_patterns=list(_FILES)))
    return {file.name: file.read_bytes() for pattern in _FILES for file in sorted(folder.glob(pattern))}


def _with_videos(base: Any, videos: VideoProcessor) -> Any:
    """The processor class `base`, which takes `videos` for its video processor and loads the other parts as ever."""
    from transformers.processing_utils import MODALITY_TO_AUTOPROCESSOR_MAPPING as LOADERS

    class Processor(base):  # type: ignore[misc, unused-ignore]
        @classmethod
        def _get_arguments_from_pretrained(cls, path: Any, processor_dict: Any = None, **kwargs: Any) -> list[Any]:
            names = cls.get_attributes()
            return [videos if n == "video_processor" else LOADERS[n].from_pretrained(path, **kwargs) for n in names]

        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            return None if argument is videos else super().check_argument_for_proper_class(argument_name, argument)

        def to_dict(self) -> dict[str, Any]:
            return {name: value for name, value in super().to_dict().items() if name != "video_processor"}

    Processor.__name__ = Processor.__qualname__ = base.__name__
    return Processor

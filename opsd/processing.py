"""Load the processor of a multimodal model, with or without torchvision."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

log = logging.getLogger(__name__)


def torchvision_works() -> bool:
    """True if torchvision imports and has its compiled operators (a CUDA wheel beside a CPU torch does not)."""
    try:
        import torchvision.transforms.v2  # noqa: F401
    except (ImportError, RuntimeError, OSError):
        return False
    return True


def load_processor(path: str | Path, **kwargs: Any) -> Any:
    """The transformers processor of a folder or hub id.

    Qwen2.5-Omni's processor wants a video processor, which wants torchvision. Where torchvision does not work, the same
    processor is returned without one: text, images and audio are unchanged, a video is a ValueError.
    """
    from transformers import AutoConfig, AutoProcessor

    config = AutoConfig.from_pretrained(path, **kwargs)
    if not config.model_type.startswith("qwen2_5_omni"):
        return AutoProcessor.from_pretrained(path, **kwargs)
    if torchvision_works():
        from transformers import Qwen2_5OmniProcessor

        return Qwen2_5OmniProcessor.from_pretrained(path, **kwargs)
    log.info("torchvision is missing or broken: the Qwen2.5-Omni processor runs without video files")
    return _omni_without_video().from_pretrained(path, **kwargs)


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

    (`save_pretrained` would name our class without video, which plain transformers does not know.)
    """
    folder = Path(path)
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(str(path), allow_patterns=list(_FILES)))
    return {file.name: file.read_bytes() for pattern in _FILES for file in sorted(folder.glob(pattern))}


class _NoVideo:
    """Stands where the video processor would be; the parent reads two attributes of it even without a video."""

    merge_size = 2
    model_input_names: ClassVar[list[str]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(
            "video input needs a working torchvision: install the build that matches torch, or pass frames as images"
        )


def _omni_without_video() -> Any:
    """The class is made here because transformers must not load when this module is imported."""
    from transformers import Qwen2_5OmniProcessor
    from transformers.processing_utils import ProcessorMixin

    class OmniProcessorWithoutVideo(Qwen2_5OmniProcessor):
        """Qwen2_5OmniProcessor minus the video processor: transformers reads the parts from this signature."""

        video_processor = _NoVideo()

        def __init__(
            self,
            image_processor: Any = None,
            feature_extractor: Any = None,
            tokenizer: Any = None,
            chat_template: Any = None,
        ) -> None:
            ProcessorMixin.__init__(self, image_processor, feature_extractor, tokenizer, chat_template=chat_template)
            for name in ("image", "audio", "video", "vision_bos", "vision_eos", "audio_bos", "audio_eos"):
                setattr(self, f"{name}_token", getattr(self.tokenizer, f"{name}_token"))

    return OmniProcessorWithoutVideo

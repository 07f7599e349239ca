"""Two prompts of one row, through the processor's own chat template: the student's view and the teacher's.

Both have the same media and the same task. The teacher's last user turn goes on with a blank line and what
only the teacher may know, so that the student's view up to there is a prefix of the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from opsd.config import MediaConfig, PromptsConfig
from opsd.data import Example
from opsd.decoder import Decoder
from opsd.errors import InputError, MediumError, explained
from opsd.media import Video
from opsd.video import VideoProcessor

# Processor outputs that have one entry per prompt token; everything else is media, concatenated along dim 0.
PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One rendered prompt as the processor returns it, without padding."""

    inputs: dict[str, Tensor]  # input_ids (1, P), attention_mask (1, P), media tensors
    text: str  # what the chat template rendered, one placeholder per medium

    @property
    def length(self) -> int:
        """P, the number of prompt tokens, those of the media included."""
        return self.inputs["input_ids"].shape[1]


class PromptBuilder:
    """Renders examples. `processor` is a multimodal processor, or a bare tokenizer for text-only rows."""

    def __init__(self, processor: Any, config: PromptsConfig, media: MediaConfig) -> None:
        self.processor, self.config, self.media = processor, config, media
        self.multimodal = hasattr(processor, "tokenizer")
        tokenizer = processor.tokenizer if self.multimodal else processor
        self.extractor = getattr(processor, "feature_extractor", None)
        self.cuts_silence = "Omni" in type(processor).__name__
        self.special = {str(token) for token in getattr(tokenizer, "all_special_tokens", ())}
        self.special |= {getattr(processor, f"{kind}_token", None) or "" for kind in ("image", "audio", "video")}
        self.special.discard("")
        rate = getattr(self.extractor, "sampling_rate", media.sampling_rate)
        if rate != media.sampling_rate:
            raise InputError(f"{rate}, the model's own", str(media.sampling_rate), field="media.sampling_rate")
        self._decode = Decoder(media)
        self._processing = Lock()  # of several threads one is in the processor, while the others decode

    def student(self, example: Example) -> Prompt:
        """The prompt without privilege."""
        return self._build(example, self._messages(example))

    def teacher(self, example: Example) -> Prompt:
        """The prompt plus what config.privilege names: rationale and teacher media, label, or nothing."""
        messages = self._messages(example)
        if self.config.privilege == "none":
            return self._build(example, messages)
        value = example.rationale if self.config.privilege == "rationale" else example.label
        if value is None:
            raise example.problem(
                self.config.privilege, "text that is not empty", "nothing", "the teacher's view needs it"
            )
        self._refuse_special(example, self.config.privilege, value)
        if self.config.privilege == "rationale":
            extra = list(example.teacher_media)
            text = self.config.teacher_template.replace("{rationale}", value)
        else:
            extra, text = [], self.config.label_template.replace("{label}", value)
        messages[-1]["content"] += [*extra, {"type": "text", "text": f"\n\n{text}"}]
        return self._build(example, messages)

    def decode_media(self, example: Example) -> None:
        """Decode every medium of the row. Raises `MediumError` for the first that does not."""
        for _, kind, path in example.media():
            self._medium(example, kind, path)

    def _messages(self, example: Example) -> list[dict[str, Any]]:
        """A copy of the messages with the configured system message and the subtitle in it."""
        messages = [{"role": m["role"], "content": list(m["content"])} for m in example.messages]
        for i, message in enumerate(messages):
            for j, part in enumerate(message["content"]):
                self._refuse_special(example, f"prompt[{i}].content[{j}].text", part.get("text", ""))
        if self.config.system is not None and messages[0]["role"] != "system":
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": self.config.system}]})
        if example.subtitle is not None and self.config.subtitle_template is not None:
            self._refuse_special(example, "subtitle", example.subtitle)
            content = messages[-1]["content"]
            gap = "\n" if content[-1]["type"] == "text" else ""
            text = self.config.subtitle_template.replace("{subtitle}", example.subtitle)
            content.append({"type": "text", "text": gap + text})
        return messages

    def _refuse_special(self, example: Example, field: str, text: str) -> None:
        """A special token inside a row's text would end a turn, or claim a medium that is not there."""
        for token in self.special:
            if token in text:
                raise example.problem(field, "text without the model's special tokens", repr(token))

    def _build(self, example: Example, messages: list[dict[str, Any]]) -> Prompt:
        parts = [part for message in messages for part in message["content"]]
        media = {
            kind: [self._medium(example, kind, part[kind]) for part in parts if part["type"] == kind]
            for kind in ("image", "video", "audio")
        }
        if not self.multimodal:
            if any(media.values()):
                raise example.problem("prompt", "text only, as the model has no processor for media", "media")
            messages = [{"role": m["role"], "content": "".join(p["text"] for p in m["content"])} for m in messages]
        if media["video"] and not isinstance(getattr(self.processor, "video_processor", None), VideoProcessor):
            raise example.problem("prompt", "no video, as none reaches a model of this family yet", "video")
        with explained("a chat template that renders the rows' messages", field="model.path"):
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        # The template has written every special token that belongs there.
        try:
            with self._processing:
                out = self.processor(
                    text=[text], return_tensors="pt", add_special_tokens=False, **self._media_arguments(media)
                )
        except (ValueError, RuntimeError) as error:  # the second: a sound shorter than a window of its spectrum
            found = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise example.problem("prompt", "text and media that the model's processor takes", found) from error
        inputs = {name: torch.as_tensor(value) for name, value in out.items()}
        if "video_second_per_grid" in inputs:  # Omni's processors think of one rate for all videos
            steps = [self.processor.video_processor.temporal_patch_size * video.step for video in media["video"]]
            inputs["video_second_per_grid"] = torch.tensor(steps)
        prompt = Prompt(_without_silence(inputs) if self.cuts_silence else inputs, text)
        if prompt.length > self.config.max_prompt_tokens:
            raise example.problem(
                "prompt",
                f"at most {self.config.max_prompt_tokens} tokens",
                f"{prompt.length}",
                "prompts.max_prompt_tokens is the limit",
            )
        return prompt

    def _media_arguments(self, media: dict[str, list[Any]]) -> dict[str, Any]:
        """Decoded media as every processor takes them."""
        arguments: dict[str, Any] = {}
        if media["image"]:
            arguments["images"] = [media["image"]]  # nested: one list per text
        if media["video"]:
            arguments["videos"] = [video.frames for video in media["video"]]
            limits = self.media.min_pixels, self.media.max_pixels
            described = [_metadata(video) for video in media["video"]]
            arguments["videos_kwargs"] = {"video_metadata": described, "frame_pixels": limits}
        if media["audio"]:
            arguments |= {"audio": media["audio"], "sampling_rate": self.media.sampling_rate}
        return arguments

    def _medium(self, example: Example, kind: str, path: Path) -> Any:
        """A decoded medium; a problem with it points at the field of the row that names it."""
        field = next(field for field, *used in example.media() if used == [kind, path])
        try:
            medium = self._decode(kind, path)
        except MediumError as error:
            found = f"{error.found} in {path}"
            raise MediumError(error.expected, found, file=example.file, line=example.line, field=field) from error
        longest = getattr(self.extractor, "n_samples", None)
        if kind == "audio" and longest is not None and len(medium) > longest:  # the extractor would cut it
            rate = self.media.sampling_rate
            expected, found = f"at most {longest / rate:g} s of audio", f"{len(medium) / rate:.1f} s in {path}"
            raise example.problem(field, expected, found)
        return medium


def _metadata(video: Video) -> Any:
    """What the VL processors take time from, told in seconds: a rate of one frame a second makes times of indices."""
    from transformers.video_utils import VideoMetadata

    return VideoMetadata(total_num_frames=len(video.frames) * video.step, fps=1.0, frames_indices=list(video.seconds))


def _without_silence(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drop the mel frames that only pad a clip to the extractor's limit (300 s in Qwen2.5-Omni, 15 MB a prompt).

    Exact for the Omni families, whose towers select frames by this mask; others want the fixed length.
    """
    mask = inputs.get("feature_attention_mask")
    if mask is None:
        return inputs
    frames = int(mask.sum(-1).max())
    return {
        **inputs,
        "input_features": inputs["input_features"][..., :frames].contiguous(),
        "feature_attention_mask": mask[..., :frames].contiguous(),
    }


def can_teach(examples: Iterable[Example], config: PromptsConfig) -> bool:
    """Whether every row has what the teacher's view of the config shows."""
    return config.privilege == "none" or all(getattr(example, config.privilege) for example in examples)

"""One labelled row as messages for a chat model: a template filled in, media as base64 parts where they are asked for.

Images and sound go as the OpenAI chat format has them: PNG, JPEG, WebP and GIF files and WAV and MP3 files as they are,
other images as PNG, other sound as 16-bit WAV, mono, 16 kHz. Of a video a few frames go as JPEG, with their times.
"""

from __future__ import annotations

import base64
import hashlib
import io
import math
import re
import wave
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from PIL import Image

from opsd.data import Example
from opsd.errors import InputError
from opsd.media import load_audio, load_image, load_video

DEFAULT: Final = Path(__file__).with_name("prompt.yaml")
SLOTS: Final = ("task", "media", "subtitle", "label")
KINDS: Final = {"image": ("image", "images"), "audio": ("recording", "recordings"), "video": ("video", "videos")}
ATTACHABLE: Final = ("image", "audio", "video")
FRAMES: Final = 6  # of a video
_IMAGES: Final = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".gif": "gif"}
_SOUNDS: Final = {".wav": "wav", ".mp3": "mp3"}
_RATE: Final = 16_000
# Rough costs, for estimates only: models differ by a factor of a few.
_TOKENS_PER_IMAGE: Final = 1000
_TOKENS_PER_BYTE_OF_SOUND: Final = 32 / 32_000  # 32 a second of 16-bit mono at 16 kHz


@dataclass(frozen=True)
class Template:
    """A prompt with the slots {task}, {media}, {subtitle}, {label}."""

    user: str
    system: str | None = None

    @property
    def digest(self) -> str:
        return hashlib.sha256(f"{self.system}\n\n{self.user}".encode()).hexdigest()[:16]


def read_template(path: Path) -> Template:
    """A YAML file of `user` and, if wanted, `system`. Raises `InputError` naming the file and the field."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError("a YAML file with user and system", " ".join(str(error).split()), file=path) from error
    if not isinstance(found, dict) or "user" not in found or set(found) - {"user", "system"}:
        raise InputError("the keys user and, if wanted, system", str(found)[:80], file=path)
    for name, text in found.items():
        if not isinstance(text, str) or not text.strip():
            raise InputError("text that is not empty", repr(text), file=path, field=name)
        for slot in re.findall(r"\{(\w+)\}", text):
            if slot not in SLOTS:
                raise InputError(f"slots of {', '.join(SLOTS)}", f"{{{slot}}}", file=path, field=name)
    if "{label}" not in found["user"]:
        raise InputError("{label} in the text", "none", file=path, field="user")
    return Template(**found)


@dataclass(frozen=True)
class RequestBuilder:
    """`media`: the kinds that are attached, some of `ATTACHABLE`."""

    template: Template
    media: tuple[str, ...] = ()

    def messages(self, example: Example) -> list[dict[str, Any]]:
        """Chat messages for a row that has a label. Raises `InputError` for a medium that does not decode."""
        made = []
        if self.template.system is not None:
            made.append({"role": "system", "content": self._fill(self.template.system, example)})
        text = self._fill(self.template.user, example)
        parts = [part for _, kind, path in example.media() if kind in self.media for part in _parts(kind, path)]
        content: Any = [*parts, {"type": "text", "text": text}] if parts else text
        return [*made, {"role": "user", "content": content}]

    def text(self, example: Example) -> str:
        """What of the messages is text, for people and for estimates."""
        texts = (self.template.system, self.template.user)
        return "\n\n".join(self._fill(text, example) for text in texts if text is not None)

    def tokens(self, example: Example) -> int:
        """About how many tokens the messages are; a guess, for paces and prices."""
        text = self.text(example)
        narrow = sum(char.isascii() for char in text)
        count = narrow / 4 + (len(text) - narrow)
        for _, kind, path in example.media():
            if kind in self.media:
                heard = path.stat().st_size * _TOKENS_PER_BYTE_OF_SOUND
                count += {"image": _TOKENS_PER_IMAGE, "video": FRAMES * _TOKENS_PER_IMAGE, "audio": heard}[kind]
        return math.ceil(count)

    def _fill(self, text: str, example: Example) -> str:
        values = {
            "task": _task(example),
            "media": self._media(example),
            "subtitle": example.subtitle or "(none)",
            "label": example.label or "",
        }
        return re.sub(r"\{(task|media|subtitle|label)\}", lambda slot: values[slot.group(1)], text)

    def _media(self, example: Example) -> str:
        """Says what is attached and what the model has to do without."""
        kinds = [kind for _, kind, _ in example.media()]
        there = [_count(kind, kinds.count(kind)) for kind in KINDS if kind in kinds and kind in self.media]
        gone = [_count(kind, kinds.count(kind)) for kind in KINDS if kind in kinds and kind not in self.media]
        said = f"Attached: {', '.join(there)}." if there else ""
        if gone:
            said += f" Not shown to you: {', '.join(gone)}; do not describe what only these could tell."
        return said.strip() or "The task is all there is of the clip."


def _task(example: Example) -> str:
    """The texts of the row's own prompt; who said what where there are several turns."""
    turns = [(m["role"], "\n".join(p["text"] for p in m["content"] if p["type"] == "text")) for m in example.messages]
    turns = [(role, text) for role, text in turns if text and role != "system"]
    if len(turns) == 1:
        return turns[0][1]
    return "\n".join(f"{role}: {text}" for role, text in turns)


def _count(kind: str, n: int) -> str:
    return f"{n} {KINDS[kind][n > 1]}"


def _parts(kind: str, path: Path) -> list[dict[str, Any]]:
    if kind == "image":
        form = _IMAGES.get(path.suffix.lower())
        return [_image(path.read_bytes() if form else _encoded(load_image(path), "PNG"), form or "png")]
    if kind == "video":
        video = load_video(path, FRAMES)
        times = ", ".join(f"{time:.1f}" for time in video.seconds)
        frames = [_image(_encoded(Image.fromarray(frame), "JPEG"), "jpeg") for frame in video.frames]
        return [{"type": "text", "text": f"Frames of a video, at {times} s:"}, *frames]
    form = _SOUNDS.get(path.suffix.lower())
    data = path.read_bytes() if form else _wav(path)
    return [{"type": "input_audio", "input_audio": {"data": _base64(data), "format": form or "wav"}}]


def _image(data: bytes, form: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": f"data:image/{form};base64,{_base64(data)}"}}


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _encoded(image: Image.Image, form: str) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, quality=90)
    return stream.getvalue()


def _wav(path: Path) -> bytes:
    samples = np.clip(load_audio(path, _RATE), -1.0, 1.0)
    stream = io.BytesIO()
    with wave.open(stream, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(_RATE)
        file.writeframes((samples * 32767).round().astype("<i2").tobytes())
    return stream.getvalue()

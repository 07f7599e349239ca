"""Media as a page holds them: inside the file, as data URIs, no larger than a person needs."""

from __future__ import annotations

import base64
import io
import wave
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from opsd.media import load_audio, load_image, load_video

LONGEST_SIDE = 360  # pixels of a picture
LOSSLESS_SIDE = 128  # a picture up to this size is kept as it is
LONGEST_SOUND = 30.0  # seconds; a longer one is cut, and the page says so
RATE = 16_000  # Hz
WAVE_COLUMNS = 200
WAVE_HEIGHT = 48.0  # units of the drawing


@dataclass(frozen=True)
class Picture:
    name: str
    uri: str
    width: int
    height: int


@dataclass(frozen=True)
class Sound:
    name: str
    uri: str  # 16-bit mono WAV of the first LONGEST_SOUND seconds
    seconds: float  # of the whole
    shape: str  # an SVG path over [0, WAVE_COLUMNS] x [0, WAVE_HEIGHT], of what the URI holds

    @property
    def shown_seconds(self) -> float:
        return min(self.seconds, LONGEST_SOUND)


def picture(path: Path) -> Picture:
    """The image, reduced."""
    return _picture(path.name, load_image(path))


def film(path: Path, frames: int) -> list[tuple[float, Picture]]:
    """The frames that a model is shown of a video, each with its time (seconds)."""
    video = load_video(path, frames)
    return [
        (time, _picture(f"{path.name} at {time:.1f} s", Image.fromarray(frame)))
        for time, frame in zip(video.seconds, video.frames, strict=True)
    ]


def _picture(name: str, image: Image.Image) -> Picture:
    """PNG where it is small, JPEG otherwise."""
    small = max(image.size) <= LOSSLESS_SIDE
    image.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    if small:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.save(buffer, "JPEG", quality=82, optimize=True)
    return Picture(name, _uri("image/png" if small else "image/jpeg", buffer.getvalue()), *image.size)


def sound(path: Path) -> Sound:
    """The sound at 16 kHz, and the shape of its wave."""
    samples = load_audio(path, RATE)
    shown = samples[: int(LONGEST_SOUND * RATE)]
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        file.writeframes((shown.clip(-1, 1) * 32767).round().astype("<i2").tobytes())
    return Sound(path.name, _uri("audio/wav", buffer.getvalue()), len(samples) / RATE, wave_shape(shown))


def wave_shape(samples: np.ndarray) -> str:
    """The highest and the lowest sample of every column, as one closed path; scaled to the loudest of all."""
    columns = np.array_split(samples, min(WAVE_COLUMNS, len(samples)))
    scale = WAVE_HEIGHT / 2 / max(float(np.abs(samples).max()), 1e-6)
    places = (np.arange(len(columns)) + 0.5) * WAVE_COLUMNS / len(columns)
    above = [WAVE_HEIGHT / 2 - scale * max(float(c.max()), 0.0) - 0.3 for c in columns]  # a hairline where it is silent
    below = [WAVE_HEIGHT / 2 - scale * min(float(c.min()), 0.0) + 0.3 for c in columns]
    points = [*zip(places, above, strict=True), *zip(places[::-1], below[::-1], strict=True)]
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points) + "Z"


def _uri(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"

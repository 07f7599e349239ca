"""Images and audio from files, as processors take them. Nothing is kept: a medium is decoded when used."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps

from opsd.errors import InputError


def load_image(path: Path) -> Image.Image:
    """The image in RGB, turned upright as its EXIF data say. Raises `InputError` naming the file."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise InputError("an image that can be decoded", _reason(error), file=path) from error


def load_audio(path: Path, sampling_rate: int) -> np.ndarray:
    """(samples,) float32 mono in [-1, 1] at `sampling_rate` Hz, from the first audio stream of any container.

    Raises `InputError` naming the file when there is no such stream, it does not decode, or it is empty.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise InputError("a file with sound", "no audio stream", file=path)
            resampler = av.AudioResampler(format="fltp", rate=sampling_rate)
            pieces = [
                piece.to_ndarray().mean(axis=0)  # of (channels, samples): FFmpeg's own downmix is louder
                for frame in (
                    *container.decode(container.streams.audio[0]),
                    None,
                )  # None flushes the resampler
                for piece in resampler.resample(frame)
            ]
    except (FFmpegError, OSError, ValueError) as error:
        raise InputError("sound that can be decoded", _reason(error), file=path) from error
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not samples.size:
        raise InputError("sound that can be decoded", "no samples", file=path)
    if not np.isfinite(samples).all():
        raise InputError("sound that can be decoded", "samples that are not finite", file=path)
    return samples.astype(np.float32, copy=False)


def _reason(error: BaseException) -> str:
    """One line without the path, which the message has already."""
    text = getattr(error, "strerror", None) or str(error).split(" '/")[0].split("\n")[0]
    return text.strip() or type(error).__name__

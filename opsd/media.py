"""Images, videos and audio from files, as processors take them. Nothing is kept: a medium is decoded when used."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.error import FFmpegError
from PIL import Image, ImageOps

from opsd.containers import check_whole, counts_frames
from opsd.errors import MediumError


@dataclass(frozen=True, eq=False)
class Video:
    """Some frames of a video, and when each is shown (seconds from the start)."""

    frames: np.ndarray  # (F, height, width, 3) uint8
    seconds: tuple[float, ...]
    length: float  # of the whole, seconds

    @property
    def nbytes(self) -> int:
        return self.frames.nbytes

    @property
    def step(self) -> float:
        """Mean time from a frame to the next (seconds)."""
        times = self.seconds
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else self.length


def load_image(path: Path) -> Image.Image:
    """The image in RGB, turned upright as its EXIF data say. Raises `MediumError` naming the file."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I;16"):  # Pillow would cut every grey above 255 to white
                upright = Image.fromarray((np.asarray(upright) >> 8).astype(np.uint8))
            return upright.convert("RGB")
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise MediumError("an image that can be decoded", _reason(error), file=path) from error


def load_audio(path: Path, sampling_rate: int) -> np.ndarray:
    """(samples,) float32 mono in [-1, 1] at `sampling_rate` Hz, from the first audio stream of any container.

    Raises `MediumError` naming the file when there is no such stream, it does not decode, it is empty, or it holds less
    than nine tenths of what a WAV, an MP3 or a Matroska says of itself, which FFmpeg reads as a shorter one.
    """
    try:
        check_whole(path)
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise MediumError("a file with sound", "no audio stream", file=path)
            claimed = _told(path, container)
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
        raise MediumError("sound that can be decoded", _reason(error), file=path) from error
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if not samples.size:
        raise MediumError("sound that can be decoded", "no samples", file=path)
    if claimed is not None and len(samples) < 0.9 * claimed * sampling_rate:
        found = f"{len(samples) / sampling_rate:.2f} s of {claimed:.2f} s"
        raise MediumError("sound that can be decoded to its end", found, file=path)
    if not np.isfinite(samples).all():
        raise MediumError("sound that can be decoded", "samples that are not finite", file=path)
    return samples.astype(np.float32, copy=False)


def load_video(path: Path, frames: int) -> Video:
    """What is on the screen in the middle of each of `frames` equal parts of the first video stream, in RGB, upright.

    Fewer frames where the video has fewer. Memory is that of the frames that are kept. Raises `MediumError` naming the
    file when there is no such stream, it does not decode, or it ends before nine tenths of the length it claims.
    """
    try:
        check_whole(path)
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise MediumError("a file with moving pictures", "no video stream", file=path)
            stream = container.streams.video[0]
            start = float(stream.start_time * stream.time_base) if stream.start_time and stream.time_base else 0.0
            claimed = _claimed(container, stream, start)
            whole = container.duration / av.time_base if container.duration else None  # the sound may be longer
            length = claimed or whole or _end(path) - start
            # a microsecond late: a frame that is due at that very moment is there
            wanted = [start + (i + 0.5) * length / frames + 1e-6 for i in range(frames)]
            kept, end = _on_screen(_timed(container, stream), wanted)
            pictures = [_upright(frame) for _, frame in kept]
            if not pictures:
                raise MediumError("a video that can be decoded", "no frames", file=path)
            if claimed is not None and end is not None and end - start < 0.9 * claimed:
                found = f"{end - start:.2f} s of {claimed:.2f} s"
                raise MediumError("a video that can be decoded to its end", found, file=path)
            return Video(np.stack(pictures), tuple(time - start for time, _ in kept), length)
    except (FFmpegError, OSError, ValueError) as error:
        raise MediumError("a video that can be decoded", _reason(error), file=path) from error


def _told(path: Path, container: Any) -> float | None:
    """Seconds of the first audio stream, where an MP3 or a Matroska says them: of other formats FFmpeg may guess."""
    stream = container.streams.audio[0]
    if container.format.name == "mp3" and not counts_frames(path):
        return None
    if container.format.name not in ("mp3", "matroska,webm"):
        return None
    return _claimed(container, stream, float((stream.start_time or 0) * stream.time_base))


def _claimed(container: Any, stream: Any, start: float) -> float | None:
    """How long the stream is according to its own header (seconds): Matroska has a tag for it, which counts from 0.

    The header of an AVI counts frames, a tick each; the duration of one that was cut is FFmpeg's, of what is left.
    """
    if stream.duration:
        counted = stream.frames if container.format.name == "avi" else 0
        return float(max(stream.duration, counted) * stream.time_base)
    told = re.fullmatch(r"(\d+):(\d\d):(\d\d(?:\.\d+)?)", stream.metadata.get("DURATION", ""))
    length = int(told[1]) * 3600 + int(told[2]) * 60 + float(told[3]) - start if told else 0.0
    return length if length > 0 else None


def _timed(container: Any, stream: Any) -> Iterator[tuple[float, float, Any]]:
    """(time, seconds on the screen, frame) of every frame; a raw stream has no times, but a rate."""
    rate = float(stream.average_rate or stream.guessed_rate or 25)
    for i, frame in enumerate(container.decode(stream)):
        shown = float(frame.duration * frame.time_base) if frame.duration else 1 / rate
        yield frame.time if frame.pts is not None else i / rate, shown, frame


def _end(path: Path) -> float:
    """When the last frame goes, for a container that does not say: everything is decoded for it."""
    with av.open(str(path)) as container:
        return max((time + shown for time, shown, _ in _timed(container, container.streams.video[0])), default=0.0)


def _on_screen(
    timed: Iterator[tuple[float, float, Any]], wanted: list[float]
) -> tuple[list[tuple[float, Any]], float | None]:
    """(time, frame) of the frames on the screen at the `wanted` times, each once; and, where the frames ended before
    these times did, when."""
    kept: list[tuple[float, Any]] = []
    left, last, end = list(wanted), None, None
    for time, shown, frame in timed:
        if last is not None and left[0] < time:
            kept.append(last)
            left = [moment for moment in left if moment >= time]
            if not left:
                return kept, None
        last, end = (time, frame), time + shown
    return [*kept, last] if last is not None else kept, end


def _upright(frame: Any) -> np.ndarray:
    """(height, width, 3) uint8, turned as the file says."""
    return np.rot90(frame.to_ndarray(format="rgb24"), _quarter_turns(frame))


def _quarter_turns(frame: Any) -> int:
    """Counterclockwise, from the angle that phones write beside the pictures."""
    return round(frame.rotation / 90)


def _reason(error: BaseException) -> str:
    """One line without the path, which the message has already."""
    text = getattr(error, "strerror", None) or str(error).split(" '/")[0].split("\n")[0]
    return text.strip() or type(error).__name__

"""Video files made on the spot for tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def pictures(count: int, height: int = 48, width: int = 64, seed: int = 0) -> np.ndarray:
    """(count, height, width, 3) uint8: a picture that shifts, on a grey level that tells the frame."""
    generator = np.random.default_rng(seed)
    small = generator.integers(0, 160, (height // 8, width // 8, 3))
    still = small.repeat(8, axis=0).repeat(8, axis=1)
    return np.stack([np.roll(still, 2 * i, axis=1) + i * (90 // count) for i in range(count)]).astype(np.uint8)


def write_video(
    path: Path,
    frames: np.ndarray,  # (F, height, width, 3) uint8
    rate: int = 10,
    codec: str = "ffv1",
    times: list[int] | None = None,  # of the frames, in ticks of the rate
    sound: np.ndarray | None = None,  # (n,) in [-1, 1] at 16 kHz
) -> Path:
    """ffv1 keeps RGB as it is; others are lossy."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr0" if codec == "ffv1" else "yuv420p"
        stream.time_base = Fraction(1, rate)
        voice = container.add_stream("pcm_s16le", rate=16000, layout="mono") if sound is not None else None
        for i, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=stream.pix_fmt)
            frame.pts = i if times is None else times[i]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if sound is not None:
            samples = (sound * 32767).round().astype(np.int16)[None]
            heard = av.AudioFrame.from_ndarray(samples, format="s16", layout="mono")
            heard.sample_rate = 16000
            container.mux([*voice.encode(heard), *voice.encode()])
    return path

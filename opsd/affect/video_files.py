"""Write a clip as a file, pictures and sound: the same bytes for the same clip."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def write_clip(path: Path, pictures: np.ndarray, rate: int, sound: np.ndarray, sampling_rate: int) -> None:
    """pictures [F, height, width, 3] uint8, `rate` a second, as MPEG-4 of high quality; sound [samples] in -1..1."""
    with av.open(str(path), "w", format="avi", container_options={"fflags": "bitexact"}) as container:
        shown = container.add_stream("mpeg4", rate=rate, options={"flags": "qscale", "qscale": "2"})
        shown.height, shown.width, shown.pix_fmt = *pictures.shape[1:3], "yuv420p"
        shown.codec_context.thread_count = 1
        heard = container.add_stream("pcm_s16le", rate=sampling_rate, layout="mono")
        for i, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = i, Fraction(1, rate)
            container.mux(shown.encode(frame))
        samples = av.AudioFrame.from_ndarray(np.rint(sound * 32767).astype("<i2")[None], format="s16", layout="mono")
        samples.sample_rate = sampling_rate
        container.mux([*shown.encode(), *heard.encode(samples), *heard.encode()])

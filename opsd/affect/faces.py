"""A drawn face that moves: cue words -> geometry -> RGB pictures. Only Pillow and numpy."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

import numpy as np

from opsd.affect.cues import Face

if TYPE_CHECKING:
    from PIL.Image import Image
    from PIL.ImageDraw import ImageDraw

Place: TypeAlias = Callable[[float, float], tuple[float, float]]  # head coordinates -> pixels

SIZE: Final = 64  # pixels a side
OVERSAMPLE: Final = 2  # drawn larger and reduced, so that lines are smooth

# word -> (low, high) of one number of the geometry, in units of the head's radius
BROW_HEIGHT: Final = {"level": (0.36, 0.42), "raised": (0.56, 0.66), "lowered": (0.24, 0.30), "slanted": (0.38, 0.46)}
BROW_TILT: Final = {"level": (-0.03, 0.03), "raised": (-0.03, 0.03), "lowered": (-0.26, -0.18), "slanted": (0.18, 0.26)}
EYE_OPEN: Final = {"soft": (0.11, 0.14), "wide": (0.20, 0.26), "narrow": (0.04, 0.06), "heavy": (0.06, 0.09)}
MOUTH_CURVE: Final = {
    "curved": (0.16, 0.24),
    "open": (-0.02, 0.02),
    "pressed": (-0.02, 0.02),
    "drooping": (-0.24, -0.16),
}


@dataclass(frozen=True)
class FaceRange:
    """How far the look of a face may vary without changing a cue."""

    skin: tuple[float, float] = (0.35, 0.85)  # 0 dark .. 1 light
    radius: tuple[float, float] = (0.36, 0.42)  # of the image side
    offset: float = 0.04  # of the image side, where the head starts and where it ends
    tilt: float = 6.0  # degrees, likewise
    background: tuple[float, float] = (0.3, 0.8)  # grey level
    line: tuple[float, float] = (0.035, 0.05)  # of the image side
    noise: float = 0.02  # standard deviation, of full scale


def film(face: Face, look: FaceRange, frames: int, rng: np.random.Generator) -> np.ndarray:
    """[frames, SIZE, SIZE, 3] uint8: the head drifts and tilts from one place to another, its cues stay.

    Every number not fixed by a cue word comes from `look`.
    """
    from PIL import Image as Pillow

    canvas, ground = _still(face, look, rng)
    shift = canvas.width * rng.uniform(-look.offset, look.offset, size=(2, 2))  # at the start, at the end
    tilt = rng.uniform(-look.tilt, look.tilt, size=2)
    shown = []
    for place in np.linspace(0.0, 1.0, frames):
        turned = canvas.rotate(
            tilt @ (1 - place, place), Pillow.Resampling.BILINEAR, translate=tuple((1 - place, place) @ shift),
            fillcolor=ground,
        )  # fmt: skip
        shown.append(np.asarray(turned.resize((SIZE, SIZE), Pillow.Resampling.BOX)))
    pixels = np.stack(shown) + 255 * look.noise * rng.standard_normal((frames, SIZE, SIZE, 3), np.float32)
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def _still(face: Face, look: FaceRange, rng: np.random.Generator) -> tuple[Image, tuple[int, ...]]:
    """The face upright in the middle, OVERSAMPLE times as large, and the colour around it."""
    from PIL import Image as Pillow
    from PIL import ImageDraw as Draw

    side = SIZE * OVERSAMPLE
    light = rng.uniform(*look.skin)
    skin = tuple(int(255 * v) for v in (0.35 + 0.6 * light, 0.2 + 0.62 * light, 0.12 + 0.6 * light))
    grey = rng.uniform(*look.background)
    ground = tuple(int(255 * np.clip(grey + rng.uniform(-0.15, 0.15), 0, 1)) for _ in range(3))
    ink = (25, 18, 15)
    canvas = Pillow.new("RGB", (side, side), ground)
    pen = Draw.Draw(canvas)
    radius = side * rng.uniform(*look.radius)
    width = max(2, round(side * rng.uniform(*look.line)))

    def at(x: float, y: float) -> tuple[float, float]:
        """Head coordinates (right, up; radius 1) -> pixels."""
        return side / 2 + radius * x, side / 2 - radius * y

    def oval(
        x: float, y: float, rx: float, ry: float, fill: tuple[int, ...], outline: tuple[int, ...] | None = None
    ) -> None:
        pen.ellipse([at(x - rx, y + ry), at(x + rx, y - ry)], fill=fill, outline=outline, width=max(2, width // 2))

    oval(0, 0, 0.92, 1.08, skin, ink)
    eye_open, height = rng.uniform(*EYE_OPEN[face.eyes]), rng.uniform(*BROW_HEIGHT[face.brows])
    tilt, curve = rng.uniform(*BROW_TILT[face.brows]), rng.uniform(*MOUTH_CURVE[face.mouth])
    for sign in (-1, 1):
        if face.blush:
            oval(0.55 * sign, -0.22, 0.16, 0.11, (225, 90, 90))
        oval(0.38 * sign, 0.12, 0.19, eye_open, (250, 250, 250), ink)
        oval(0.38 * sign, 0.12, 0.08, min(eye_open, 0.09), ink)
        # tilt > 0 lifts the inner end (worry), tilt < 0 drops it (a frown)
        pen.line([at(0.62 * sign, height - tilt / 2), at(0.16 * sign, height + tilt / 2)], fill=ink, width=width)
        if face.eyes == "heavy":
            pen.line([at(0.58 * sign, 0.16), at(0.18 * sign, 0.16)], fill=ink, width=width)
    if face.tear:
        oval(0.42, -0.18, 0.06, 0.14, (90, 150, 250))
    _mouth(pen, at, face.mouth, curve, width, ink)
    return canvas, ground


def _mouth(pen: ImageDraw, at: Place, word: str, curve: float, width: int, ink: tuple[int, ...]) -> None:
    """An open mouth is a dark oval; every other one is a parabola whose ends are `curve` above its middle."""
    if word == "open":
        pen.ellipse([at(-0.2, -0.36), at(0.2, -0.78)], fill=(90, 20, 25), outline=ink, width=max(2, width // 2))
        return
    half = 0.26 if word == "pressed" else 0.4
    xs = np.linspace(-half, half, 13)
    points = [at(x, -0.55 + curve * ((x / half) ** 2 - 0.5) * 1.6) for x in xs]
    pen.line(points, fill=ink, width=width * 2 if word == "pressed" else width, joint="curve")

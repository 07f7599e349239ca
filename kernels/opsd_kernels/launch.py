"""Launch table of the Triton row kernels: data. `python -m opsd_kernels.tune` measures rows for it on a device."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tile:
    """Columns that a program handles at once, its warps, and how many tiles it has under way (1: no prefetch)."""

    columns: int
    warps: int
    stages: int = 1


@dataclass(frozen=True)
class Launch:
    """splits: programs that share a row, a power of two; enough of them that few rows fill the device."""

    splits: int
    statistics: Tile
    terms: Tile
    gradient: Tile

    @classmethod
    def of(cls, tile: Tile, splits: int) -> "Launch":
        """The same tile for every kernel."""
        return cls(splits, tile, tile, tile)


@dataclass(frozen=True)
class Where:
    """What a row is for. None: any; a more specific row comes first."""

    capability: int  # major * 10 + minor, and newer devices up to the next one in the table
    vocab: int = 0  # columns, and more
    gradient: str | None = None  # dtype of the gradient rows: "bfloat16" or "float32"
    divergence: str | None = None  # label() of it


# 8 columns a thread: two 16-byte loads of each row
WIDE, NARROW = Tile(2048, 8), Tile(1024, 4)
TABLE = {
    Where(80): Launch.of(NARROW, splits=8),
    Where(86): Launch.of(NARROW, splits=8),
    Where(89): Launch.of(NARROW, splits=8),
    Where(90): Launch.of(WIDE, splits=8),
    Where(100): Launch.of(WIDE, splits=8),
    Where(120): Launch.of(NARROW, splits=8),
}
INTERPRETER = Launch.of(Tile(256, 1), splits=2)


def label(kind: str, clips: bool) -> str:
    return f"clipped {kind}" if clips else kind


def launch_for(capability: int, vocab: int, gradient: str, divergence: str) -> Launch:
    """The most specific row of the newest family that is not newer than the device."""
    known = [where.capability for where in TABLE if where.capability <= capability]
    if not known:
        raise ValueError(f"expected compute capability 8.0 or newer, got {capability // 10}.{capability % 10}")

    def fits(where: Where) -> bool:
        same = where.gradient in (None, gradient) and where.divergence in (None, divergence)
        return where.capability == max(known) and where.vocab <= vocab and same

    best = max(filter(fits, TABLE), key=lambda w: (w.divergence is not None, w.gradient is not None, w.vocab))
    return TABLE[best]

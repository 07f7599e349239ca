"""Launch table of the Triton row kernels: data, one row per architecture family."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    tile: int  # columns handled at once by one program
    warps: int
    splits: int  # programs that share a row, a power of two: enough of them that few rows fill the device


# compute capability, major * 10 + minor -> launch. 8 columns a thread everywhere: two 16-byte loads of each row,
# and the ten sums of the statistics kernel stay in registers.
TABLE = {
    80: Launch(tile=2048, warps=8, splits=8),
    86: Launch(tile=1024, warps=4, splits=8),
    89: Launch(tile=1024, warps=4, splits=8),
    90: Launch(tile=2048, warps=8, splits=8),
    100: Launch(tile=2048, warps=8, splits=8),
    120: Launch(tile=1024, warps=4, splits=8),
}
INTERPRETER = Launch(tile=256, warps=4, splits=2)


def launch_for(capability: int) -> Launch:
    """The row of the newest family that is not newer than the device."""
    known = [family for family in TABLE if family <= capability]
    if not known:
        raise ValueError(f"expected compute capability 8.0 or newer, got {capability // 10}.{capability % 10}")
    return TABLE[max(known)]

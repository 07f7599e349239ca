"""bitsandbytes, an optional dependency: imported where a config asks for what it does, and nowhere else."""

from __future__ import annotations

from typing import Any

from opsd.errors import InputError


def bitsandbytes(field: str) -> Any:
    """The library. Raises InputError about `field`, the key that asks for it, where it is missing or does not load."""
    try:
        import bitsandbytes
    except Exception as error:  # a build for another torch or CUDA fails in ways of its own
        found = "none" if isinstance(error, ModuleNotFoundError) else f"one that does not load ({error})"
        raise InputError("bitsandbytes", found, field=field, hint="pip install 'opsd-trainer[quant]'") from error
    return bitsandbytes

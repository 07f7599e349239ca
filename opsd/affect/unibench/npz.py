"""Reading the benchmark's .npz files. They hold pickled dictionaries, so what a pickle may build is limited.

`numpy.load(allow_pickle=True)` runs whatever code a file names; predictions and labels are passed from hand to hand.
"""

from __future__ import annotations

import codecs
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.lib import format as npy

from opsd.affect.unibench.archive import DAMAGE
from opsd.errors import InputError

# The functions that pickles of numpy values call, by the names they had before and have since numpy 2.
_NUMPY: Final = {
    "multiarray._reconstruct": np.empty(0, dtype=object).__reduce__()[0],
    "multiarray.scalar": np.float64(0).__reduce__()[0],
    "numeric._frombuffer": np.empty(0).__reduce_ex__(5)[0],
}
_ALLOWED: Final[dict[str, Any]] = {
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
    "_codecs.encode": codecs.encode,  # how old pickles write bytes
    "collections.OrderedDict": dict,
    **{f"numpy.{core}.{name}": made for core in ("core", "_core") for name, made in _NUMPY.items()},
}
# What reading an array raises when its bytes are none; a length that makes no sense asks for too much memory.
_NO_VALUES: Final = (
    *(pickle.UnpicklingError, ValueError, EOFError, AttributeError, TypeError, LookupError, OverflowError, MemoryError),
    *(SyntaxError, RecursionError),
)


class _Limited(pickle.Unpickler):
    """Builds plain values and numpy arrays, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in _ALLOWED:
            raise pickle.UnpicklingError(f"refuses to build {module}.{name}")
        return _ALLOWED[f"{module}.{name}"]


def read_npz(path: Path, *arrays: str) -> list[Any]:
    """The named arrays: a dictionary for a pickled one of no dimensions, else a list.

    Raises `InputError` naming file and array.
    """
    if not path.is_file():
        raise InputError("an existing file", "no file", file=path)
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.removesuffix(".npy") for name in archive.namelist()}
            for array in arrays:
                if array not in names:
                    raise InputError(f"the array {array!r}", ", ".join(sorted(names)), file=path, field=array)
            return [_read(archive, path, array) for array in arrays]
    except DAMAGE as error:
        raise InputError("an .npz archive", str(error), file=path) from error


def has_array(path: Path, array: str) -> bool:
    """Whether an archive has an array of this name."""
    try:
        with zipfile.ZipFile(path) as archive:
            return f"{array}.npy" in archive.namelist()
    except DAMAGE as error:
        raise InputError("an .npz archive", str(error), file=path) from error


def _read(archive: zipfile.ZipFile, path: Path, array: str) -> Any:
    content = archive.read(f"{array}.npy")  # whole, because only then its checksum is looked at
    try:
        return _parse(io.BytesIO(content))
    except _NO_VALUES as error:
        raise InputError("an array of plain values", str(error), file=path, field=array) from error


def _parse(file: io.BytesIO) -> Any:
    version = npy.read_magic(file)
    read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, order, dtype = read_header(file)
    if dtype.hasobject:
        return _Limited(file, encoding="latin1").load().tolist()
    count = int(np.prod(shape, dtype=np.int64))
    values = np.frombuffer(file.read(), dtype=dtype, count=count)
    return values.reshape(shape, order="F" if order else "C").tolist()

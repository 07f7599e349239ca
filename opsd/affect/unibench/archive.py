"""What reading a damaged, encrypted or foreign zip archive raises; .npz and .xlsx files are such archives."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import Final

# RuntimeError: encrypted. NotImplementedError, one of those: a compression that this Python does not know.
DAMAGE: Final = (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError)

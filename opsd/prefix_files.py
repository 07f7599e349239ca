"""The disk tier of the prefix store: one checksummed file per prefix, in a folder that runs may share.

    FOLDER/prefix-DIGEST.safetensors   keys, values, last hidden state, and the whole key, which a reader compares
    FOLDER/.writing                    a file that is not whole yet; renamed when it is
    FOLDER/.lock                       held while writing and making room: the budget is one for all processes

The order of use is that of the files' times of modification, so all processes see one. There is no index to go stale.
A disk that fails costs hits, never the run: the event is counted, and told once.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import Tensor

from opsd.digests import tensor_bytes
from opsd.errors import InputError
from opsd.prefix_entry import PrefixKey, Stored
from opsd.tensor_file import Damaged, TensorFile, read

log = logging.getLogger(__name__)


class PrefixFiles:
    def __init__(self, folder: Path, budget: int):
        """Raises InputError where the folder cannot be made or written."""
        self.folder, self.budget = folder, budget
        self.bytes = 0  # of whole files, when last looked at
        self.evictions = self.damaged = self.abandoned = self.failures = 0
        self._writing = folder / ".writing"
        try:
            with self._locked():
                self._make_room(0)
        except OSError as error:
            found = error.strerror or str(error)
            field = "engine.teacher_cache_dir"
            raise InputError("a folder that can be written", found, file=folder, field=field) from error

    def get(self, key: PrefixKey) -> Stored | None:
        """The prefix in host memory, or None. A damaged file is removed."""
        path = self._path(key)
        try:
            tensors, words = read(path)
            if not _is_of(key, tensors, words):
                return None
            stored = _stored(tensors, words)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._failed(error)
            return None
        except (Damaged, KeyError, ValueError):
            self.damaged += 1
            with suppress(OSError):
                path.unlink()
            return None
        with suppress(OSError):
            _touch(path)
        return stored

    def put(self, key: PrefixKey, stored: Stored) -> None:
        """Write the prefix, unless its file is there; one bigger than the budget is passed by."""
        path = self._path(key)
        try:
            with suppress(FileNotFoundError):  # asked first, it could be removed before it is touched
                return _touch(path)
            file = _file(key, stored)
            if file.size <= self.budget:
                self._write(file, path)
        except OSError as error:
            self._failed(error)

    def _write(self, file: TensorFile, path: Path) -> None:
        if not self.folder.is_dir():
            self._failed(FileNotFoundError(errno.ENOENT, "deleted by somebody, made again", str(self.folder)))
        with self._locked():
            self._make_room(file.size)
            try:
                file.write(self._writing)
                _touch(self._writing)
                os.replace(self._writing, path)
            finally:
                self._writing.unlink(missing_ok=True)
            self.bytes += file.size

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """The folder, there and ours. The system lets go of the lock of a killed process."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._writing.exists():  # we hold the lock: its writer was killed
                self._writing.unlink()
                self.abandoned += 1
            yield

    def _make_room(self, size: int) -> None:
        """Remove the least recently used files, of whatever process, until `size` more bytes are within the budget."""
        files = []
        for path in self.folder.glob("prefix-*.safetensors"):
            with suppress(FileNotFoundError):  # found damaged by another process just now
                stat = path.stat()
                files.append((stat.st_mtime_ns, stat.st_size, path))
        self.bytes = sum(length for _, length, _ in files)
        for _, length, path in sorted(files):
            if self.bytes + size <= self.budget:
                break
            path.unlink(missing_ok=True)
            self.bytes -= length
            self.evictions += 1

    def _failed(self, error: OSError) -> None:
        if not self.failures:
            log.warning(
                "prefix cache on disk: %s; prefixes are computed instead, later failures are only counted", error
            )
        self.failures += 1

    def _path(self, key: PrefixKey) -> Path:
        return self.folder / f"prefix-{key.digest}.safetensors"


def _file(key: PrefixKey, stored: Stored) -> TensorFile:
    tensors = {f"keys.{layer}": tensor for layer, tensor in enumerate(stored.keys)}
    tensors |= {f"values.{layer}": tensor for layer, tensor in enumerate(stored.values)}
    tensors |= {f"scales.{place}": tensor for place, tensor in enumerate(stored.scales)}
    tensors |= {"error": stored.error} if stored.error is not None else {}
    tensors["last_hidden"] = stored.last_hidden
    tensors["token_ids"] = torch.frombuffer(bytearray(key.tokens), dtype=torch.int64)
    words = {"of": _of(key), "layers": str(len(stored.keys)), "next_position": str(stored.next_position)}
    return TensorFile(tensors, words)


def _stored(tensors: dict[str, Tensor], words: dict[str, str]) -> Stored:
    layers = range(int(words["layers"]))
    keys = [tensors[f"keys.{layer}"] for layer in layers]
    values = [tensors[f"values.{layer}"] for layer in layers]
    scales = [tensors[f"scales.{place}"] for place in range(2 * len(keys))] if "error" in tensors else []
    return Stored(keys, values, float(words["next_position"]), tensors["last_hidden"], scales, tensors.get("error"))


def _is_of(key: PrefixKey, tensors: dict[str, Tensor], words: dict[str, str]) -> bool:
    return words["of"] == _of(key) and tensor_bytes(tensors["token_ids"]) == key.tokens


def _of(key: PrefixKey) -> str:
    """All of the key but its tokens."""
    return json.dumps([key.version.model, key.version.updates, key.media])


def _touch(path: Path) -> None:
    """Used now. A file system's own clock ticks in milliseconds, too slow to tell an order."""
    now = time.time_ns()
    os.utime(path, ns=(now, now))

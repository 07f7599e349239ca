"""Media decoded as the config says, and kept for as long as the next prompts may need them: bounded in bytes."""

from __future__ import annotations

from pathlib import Path
from threading import Lock
from typing import Any

from opsd.byte_lru import ByteLru
from opsd.config import MediaConfig
from opsd.media import load_audio, load_image, load_video


class Decoder:
    """Images as PIL has them, videos as `media.Video`, sound as samples. Threads may share one."""

    def __init__(self, config: MediaConfig):
        self.config = config
        self._kept: ByteLru[tuple[str, Path], Any] = ByteLru(config.decoded_mib * 2**20, _bytes)
        self._lock = Lock()

    def __call__(self, kind: str, path: Path) -> Any:
        """The medium of a file. Raises `MediumError` naming the file where it does not decode."""
        with self._lock:
            found = self._kept.get((kind, path))
        if found is None:
            found = self._load(kind, path)
            with self._lock:
                self._kept.put((kind, path), found)
        return found

    def _load(self, kind: str, path: Path) -> Any:
        if kind == "image":
            return load_image(path)
        if kind == "video":
            return load_video(path, self.config.frames)
        return load_audio(path, self.config.sampling_rate)


def _bytes(medium: Any) -> int:
    return medium.nbytes if hasattr(medium, "nbytes") else 3 * medium.width * medium.height

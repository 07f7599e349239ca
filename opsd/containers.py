"""What a media file says of its own length: FFmpeg reads a damaged one as a shorter one and finds nothing wrong."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from opsd.errors import MediumError

_EBML, _SEGMENT, _CLUSTER = 0x1A45DFA3, 0x18538067, 0x1F43B675  # RFC 9559; the last two are walked into
_LONGEST_HEAD = 12  # bytes of an element's id and size


def check_whole(path: Path) -> None:
    """Raises MediumError for a WAV that was cut, and for a Matroska with a hole. OSError where it cannot be read."""
    with path.open("rb") as file:
        head, held = file.read(12), path.stat().st_size
        if head[:4] == b"RIFF" and head[8:] == b"WAVE":
            _check_wav(path, claimed=int.from_bytes(head[4:8], "little"), held=held)
        elif head[:4] == _EBML.to_bytes(4, "big"):
            hole = _hole(file, held)
            if hole is not None:
                raise MediumError("a Matroska file that is whole", f"nothing readable at byte {hole:,}", file=path)


def counts_frames(path: Path) -> bool:
    """Whether an MP3 says how many frames it has (Xing, LAME, Fraunhofer); FFmpeg guesses the length of others."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3":  # a tag before the sound, its size in four times seven bits
            size = sum(byte << shift for byte, shift in zip(head[6:10], (21, 14, 7, 0), strict=True))
            file.seek(10 + size + (10 if head[5] & 0x10 else 0))
        else:
            file.seek(0)
        first = file.read(200)
    return any(name in first for name in (b"Xing", b"Info", b"VBRI"))


def _check_wav(path: Path, claimed: int, held: int) -> None:
    """One that was written to a pipe claims 0 bytes, or about 2 or 4 GiB."""
    if held < 0.9 * claimed and claimed < 2**31 - 2**16:
        raise MediumError("sound that can be decoded to its end", f"{held:,} of {claimed:,} bytes", file=path)


def _hole(file: BinaryIO, held: int) -> int | None:
    """The first byte at which an element should begin and none does; elements are skipped by their sizes."""
    at = 0
    while at < held:
        file.seek(at)
        head = file.read(_LONGEST_HEAD)
        of_id = _length(head[0])
        if of_id > 4:
            return at
        of_size = _length(head[of_id]) if of_id < len(head) else 9
        if of_size > 8 or of_id + of_size > len(head):  # no size, or the file ends in the middle of it
            return at if of_id + of_size <= len(head) else None
        size = int.from_bytes(head[of_id : of_id + of_size], "big") & ((1 << 7 * of_size) - 1)
        is_opened = int.from_bytes(head[:of_id], "big") in (_SEGMENT, _CLUSTER)
        at += of_id + of_size + (0 if is_opened else size)
    return None


def _length(first: int) -> int:
    """Bytes of a number that says so by its leading zeros; 9 for one that none begins with."""
    return 9 - first.bit_length()

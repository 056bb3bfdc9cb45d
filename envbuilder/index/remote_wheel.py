"""METADATA of a wheel that stays on its server: its table of contents and that one member, by ranges.

Ranges after RFC 9110 §14. What is read is bounded, whatever the server sends.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from typing import Optional

METADATA_BYTES = 4 << 20
"""Most bytes of a METADATA file."""
_TAIL = 256 << 10
"""Bytes of a wheel's end that are read first: mostly all of its table of contents and its METADATA."""
_AT_LEAST = 64 << 10
"""Bytes that any other request is for, at least."""
_MOST = 16 << 20
"""Most bytes that are read of a wheel."""

ReadRange = Callable[[int, int], Optional[bytes]]
"""(Start, end) → the bytes from start up to, but not with, end; None where the server gives no ranges."""


class _Unreadable(Exception):
    """No ranges, or too much to read."""


def read_metadata(read_range: ReadRange, size: int) -> bytes | None:
    """METADATA of the wheel of `size` bytes that `read_range` reads; None where it can't be read so."""
    try:
        with zipfile.ZipFile(_RangedFile(read_range, size)) as archive:
            found = [info for info in archive.infolist() if _is_metadata(info.filename)]
            if len(found) != 1 or found[0].file_size > METADATA_BYTES:
                return None
            with archive.open(found[0]) as member:
                content = member.read(METADATA_BYTES + 1)
    except (
        *(_Unreadable, zipfile.BadZipFile, zlib.error, struct.error),
        *(EOFError, NotImplementedError, RuntimeError, ValueError),
    ):
        return None
    return content if len(content) <= METADATA_BYTES else None


def _is_metadata(name: str) -> bool:
    return re.fullmatch(r"[^/]+\.dist-info/METADATA", name) is not None


class _RangedFile(io.RawIOBase):
    """A file to read and seek in, of which only what is read is asked for."""

    def __init__(self, read_range: ReadRange, size: int) -> None:
        self._read_range, self._size = read_range, size
        self._position = 0
        self._blocks: dict[int, bytes] = {}
        """Start → the bytes from there on."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise ValueError("before the first byte")
        self._position = base + offset
        return self._position

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._position + size, self._size)
        start = min(self._position, end)
        if start == end:
            return b""
        content = self._known(start, end) or self._fetch(start, end)
        self._position = end
        return content

    def _known(self, start: int, end: int) -> bytes | None:
        for first, block in self._blocks.items():
            if first <= start and end <= first + len(block):
                return block[start - first : end - first]
        return None

    def _fetch(self, start: int, end: int) -> bytes:
        if not self._blocks:
            first = min(start, max(self._size - _TAIL, 0))
            last = self._size if end > self._size - _TAIL else end
        else:
            first, last = start, max(end, min(start + _AT_LEAST, self._size))
        if last - first + sum(map(len, self._blocks.values())) > _MOST:
            raise _Unreadable
        block = self._read_range(first, last)
        if block is None or len(block) != last - first:
            raise _Unreadable
        self._blocks[first] = block
        return block[start - first : end - first]

"""Writes a .tar.gz whose bytes depend on nothing but the files in it.

Neither owner, time nor umask gets in, and zlib is not asked: its versions and its replacements make other
bytes of the same content, even where they don't compress it. So the content is stored in blocks of a fixed
length (RFC 1951, 3.2.4), in a container written here (RFC 1952).
"""

from __future__ import annotations

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

_BLOCK = 0xFFFF
"""Most bytes of a stored block."""
# Deflate; no flags, so no name either; no time; no extra flags; an unknown operating system.
_GZIP_HEADER = b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\xff"


@contextmanager
def source_archive(file: BinaryIO, top: str) -> Iterator[SourceArchive]:
    """An archive that is written into `file`, with its members in the folder `top`.

    The order of the members is the caller's, and must be fixed too.
    """
    packed = _StoredGzip(file)
    # GNU's format: pax headers are UTF-8, which not all names in git are.
    with tarfile.open(
        fileobj=packed,
        mode="w|",
        format=tarfile.GNU_FORMAT,
        encoding="utf-8",
        errors="surrogateescape",
    ) as tar:
        yield SourceArchive(tar, top)
    packed.finish()


class SourceArchive:
    """Takes the members of an archive; `source_archive` makes one."""

    def __init__(self, tar: tarfile.TarFile, top: str) -> None:
        self._tar = tar
        self._top = top

    def add_file(self, path: str, size: int, content: BinaryIO, *, executable: bool) -> None:
        """A file of `size` bytes, which are the next ones of `content`."""
        member = tarfile.TarInfo(f"{self._top}/{path}")
        member.size, member.mode = size, 0o755 if executable else 0o644
        self._tar.addfile(member, content)

    def add_link(self, path: str, target: str) -> None:
        """A symbolic link."""
        member = tarfile.TarInfo(f"{self._top}/{path}")
        member.type, member.linkname, member.mode = tarfile.SYMTYPE, target, 0o644
        self._tar.addfile(member)


class _StoredGzip(io.RawIOBase):
    """gzip without compression around what is written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._pending = bytearray()
        self._crc = self._size = 0
        file.write(_GZIP_HEADER)

    def write(self, data: bytes) -> int:  # type: ignore[override]  # tarfile writes bytes alone
        self._crc = zlib.crc32(data, self._crc)
        self._size += len(data)
        self._pending += data
        while len(self._pending) > _BLOCK:
            self._write_block(bytes(self._pending[:_BLOCK]), last=False)
            del self._pending[:_BLOCK]
        return len(data)

    def finish(self) -> None:
        self._write_block(bytes(self._pending), last=True)
        self._file.write(struct.pack("<II", self._crc, self._size & 0xFFFFFFFF))

    def _write_block(self, data: bytes, *, last: bool) -> None:
        self._file.write(struct.pack("<BHH", last, len(data), len(data) ^ 0xFFFF) + data)

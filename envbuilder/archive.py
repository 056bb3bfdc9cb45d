"""Reads single files of a source archive (.tar.gz), none of which is unpacked: what it claims is bounded."""

from __future__ import annotations

import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import InputError

MOST_FILES = 200_000
"""Members that a source archive may have at most."""
LARGEST = 4 << 30
"""Bytes that they may add up to: an archive that claims more is a bomb."""


@dataclass(frozen=True)
class ArchiveMember:
    """One file, folder or link of an archive."""

    path: str
    """Below the archive's top folder."""
    size: int
    """Bytes."""
    is_file: bool
    """A plain one."""
    _archive: tarfile.TarFile
    _info: tarfile.TarInfo

    def read(self) -> bytes:
        """The bytes of a plain file; only before the next member is asked for."""
        content = self._archive.extractfile(self._info)
        assert content is not None, "a plain file has some"
        return content.read()


@contextmanager
def archive_members(path: Path) -> Iterator[Iterator[ArchiveMember]]:
    """The members of the archive at `path` in its order, without its top folder.

    InputError where it can't be read, or is far too large.
    """
    try:
        with tarfile.open(path, mode="r|gz") as archive:
            yield _members(path, archive)
    except (tarfile.TarError, zlib.error, EOFError, OSError) as error:
        raise unsound(path, error) from error


def unsound(path: Path, why: object) -> InputError:
    """The error for a source archive that is not as it should be."""
    return InputError(
        f"{path.name} is not an sdist that can be read: {why}.",
        remedy="Pick another version of the package in the recipe.",
        context={"file": path},
    )


def _members(path: Path, archive: tarfile.TarFile) -> Iterator[ArchiveMember]:
    unpacked = 0
    for count, info in enumerate(archive):
        unpacked += info.size
        if count >= MOST_FILES or unpacked > LARGEST:
            raise unsound(path, "it is far too large")
        if inner := info.name.removeprefix("./").partition("/")[2]:
            yield ArchiveMember(inner, info.size, info.isfile(), archive, info)

"""Unpacks an sdist: all of it into a new folder, or nothing.

Written out here, for `tarfile`'s own filter is missing in some Pythons that envbuilder runs on, and has had
bypasses through chains of links. Here no link is ever made: one to a file of the archive becomes a copy.
"""

from __future__ import annotations

import gzip
import lzma
import posixpath
import shutil
import tarfile
import zlib
from pathlib import Path

from envbuilder.errors import IntegrityError

_LARGEST = 4 << 30
"""Bytes that an sdist may unpack to: an archive that claims more is a bomb."""
_LONGEST_NAME = 1000
"""Characters in a member's path; Linux takes 4096 bytes with the folder in front."""


def unpack_sdist(archive: Path, folder: Path) -> Path:
    """Unpacks `archive` into `folder`, which must not exist; returns the source tree, its one top folder.

    IntegrityError, with nothing left, where a member's path is absolute or has "..", where one is a device
    or a link to something that is not a file of the archive, comes twice, or lies beneath a file.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            files = _plan(tar, archive)
            for name, member in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None  # _plan lets only regular files through
                with content, path.open("xb") as file:
                    shutil.copyfileobj(content, file)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _refusal(archive, f"it can't be read: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / next(iter(files)).partition("/")[0]


def _plan(tar: tarfile.TarFile, archive: Path) -> dict[str, tarfile.TarInfo]:
    """Path → the regular file whose bytes belong there."""
    members: dict[str, tarfile.TarInfo] = {}
    for member in tar:
        name = member.name.rstrip("/").removeprefix("./")
        if name in ("", "."):
            continue
        if name.startswith("/") or ".." in name.split("/") or "\0" in name or len(name) > _LONGEST_NAME:
            raise _refusal(archive, f"the path {name[:200]!r} is not a path inside it")
        if not (member.isfile() or member.isdir() or member.issym() or member.islnk()):
            raise _refusal(archive, f"{name} is a device")
        if name in members and not (member.isdir() and members[name].isdir()):
            raise _refusal(archive, f"{name} comes twice")
        members[name] = member
    files = {name: _regular(name, members, archive) for name, member in members.items() if not member.isdir()}
    if len({name.partition("/")[0] for name in members}) != 1 or not files:
        raise _refusal(archive, "it has not exactly one top folder")
    for name in members:
        if beneath := next((parent for parent in _parents(name) if parent in files), None):
            raise _refusal(archive, f"{name} lies beneath the file {beneath}")
    if sum(member.size for member in files.values()) > _LARGEST:
        raise _refusal(archive, f"it unpacks to more than {_LARGEST:,} bytes")
    return files


def _regular(name: str, members: dict[str, tarfile.TarInfo], archive: Path) -> tarfile.TarInfo:
    """The regular file that `name` is, or is a link to."""
    member = members[name]
    if member.isfile():
        return member
    # A hard link's target is a path from the top, a symbolic link's from the folder that it is in.
    folder = "" if member.islnk() else posixpath.dirname(name)
    target = members.get(posixpath.normpath(posixpath.join(folder, member.linkname)))
    if target is None or not target.isfile():
        raise _refusal(archive, f"{name} is a link to {member.linkname!r}, which is no file in it")
    return target


def _parents(name: str) -> list[str]:
    parts = name.split("/")
    return ["/".join(parts[:count]) for count in range(1, len(parts))]


def _refusal(archive: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"The sdist {archive.name} is refused, and nothing of it was unpacked: {why}.",
        remedy=f"Report it to whoever publishes {archive.name}, and lock another version.",
        context={"file": archive},
    )

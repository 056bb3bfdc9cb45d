"""Unpacks an sdist: all of it into a new folder, or nothing.

Written out here, for `tarfile`'s own filter is missing in some Pythons that envbuilder runs on, and has had
bypasses through chains of links. Here no link is ever made: one to a file or folder of the archive becomes a
copy.
"""

from __future__ import annotations

import gzip
import lzma
import posixpath
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from envbuilder.archive import LARGEST, MOST_FILES
from envbuilder.errors import IntegrityError

_LONGEST_CHAIN = 8
"""Links that lead to one another, and folders that are linked into one another."""
_LONGEST_PATH = 1000
"""Bytes of a member's path; Linux takes 4096 with the folder in front."""
_LONGEST_NAME = 255
"""Bytes of one name in a path."""


def unpack_sdist(archive: Path, folder: Path) -> Path:
    """Unpacks `archive` into `folder`, which must not exist; returns the source tree, its one top folder.

    IntegrityError, with nothing left, where a member's path is absolute, has ".." or is too long, where one
    is a device or a link to something that is not in the archive, comes twice, or lies beneath a file or a
    link, and where they are too many or too large.
    """
    try:
        with tarfile.open(archive, "r:*") as tar:
            files = _Plan(tar, archive).files()
            for name, member in files.items():
                path = folder / name
                path.parent.mkdir(parents=True, exist_ok=True)
                content = tar.extractfile(member)
                assert content is not None  # the plan lets only regular files through
                with content, path.open("xb") as file:
                    shutil.copyfileobj(content, file)
                path.chmod(0o755 if member.mode & 0o100 else 0o644)
    except (tarfile.TarError, EOFError, gzip.BadGzipFile, lzma.LZMAError, zlib.error, ValueError) as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise _refusal(archive, f"it can't be read: {error}") from error
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / next(iter(files)).partition("/")[0]


class _Plan:
    """What is to be unpacked of an archive, decided before anything is."""

    def __init__(self, tar: tarfile.TarFile, archive: Path) -> None:
        self._archive = archive
        self._members: dict[str, tarfile.TarInfo] = {}
        self._inside: dict[str, set[str]] = {}
        """Folder → the paths in it; a folder need not be a member."""
        self._steps = 0
        size = 0
        for member in tar:
            self._take_step()
            size += member.size
            if size > LARGEST:
                raise _refusal(archive, f"it unpacks to more than {LARGEST:,} bytes")
            self._add(member)
        if len({name.partition("/")[0] for name in self._members}) != 1:
            raise _refusal(archive, "it has not exactly one top folder")
        for name in self._members:
            self._enter_folders(name)

    def files(self) -> dict[str, tarfile.TarInfo]:
        """Path → the regular file whose bytes belong there."""
        files: dict[str, tarfile.TarInfo] = {}
        size = 0
        for name, member in self._members.items():
            for path, file in self._files_at(name, name, 0) if not member.isdir() else ():
                files[path] = file
                size += file.size
                if size > LARGEST:
                    raise _refusal(self._archive, f"it unpacks to more than {LARGEST:,} bytes")
        if not files:
            raise _refusal(self._archive, "it has no files")
        return files

    def _add(self, member: tarfile.TarInfo) -> None:
        name = member.name.rstrip("/").removeprefix("./")
        if name in ("", "."):
            return
        self._check_path(name)
        if not (member.isfile() or member.isdir() or member.issym() or member.islnk()) or member.size < 0:
            raise _refusal(self._archive, f"{name} is a device, or of no size")
        if name in self._members and not (member.isdir() and self._members[name].isdir()):
            raise _refusal(self._archive, f"{name} comes twice")
        self._members[name] = member

    def _check_path(self, name: str) -> None:
        parts = [part.encode(errors="surrogateescape") for part in name.split("/")]
        if (
            {b"", b".", b".."} & set(parts)
            or "\0" in name
            or sum(map(len, parts)) + len(parts) > _LONGEST_PATH
            or max(map(len, parts)) > _LONGEST_NAME
        ):
            raise _refusal(self._archive, f"the path {name[:200]!r} is not a path inside it")

    def _enter_folders(self, name: str) -> None:
        path = name
        while folder := posixpath.dirname(path):
            if folder in self._members and not self._members[folder].isdir():
                raise _refusal(self._archive, f"{name} lies beneath {folder}, which is no folder")
            self._inside.setdefault(folder, set()).add(path)
            path = folder

    def _files_at(self, name: str, place: str, chain: int) -> Iterator[tuple[str, tarfile.TarInfo]]:
        """The regular files that the path `name` stands for, seen at `place`: itself, or what it links to."""
        self._take_step()
        self._check_path(place)
        member = self._members.get(name)
        if member is not None and member.isfile():
            yield place, member
        elif member is None or member.isdir():
            for child in sorted(self._inside.get(name, ())):
                yield from self._files_at(child, place + child[len(name) :], chain)
        else:
            # A hard link's target is a path from the top, a symbolic link's from the folder that it is in.
            folder = "" if member.islnk() else posixpath.dirname(name)
            target = posixpath.normpath(posixpath.join(folder, member.linkname))
            if (target not in self._members and target not in self._inside) or chain == _LONGEST_CHAIN:
                raise _refusal(
                    self._archive, f"{name} is a link to {member.linkname!r}, which is no file in it"
                )
            yield from self._files_at(target, place, chain + 1)

    def _take_step(self) -> None:
        """Counts each file that is looked at: links to folders of links make many of a few members."""
        self._steps += 1
        if self._steps > 2 * MOST_FILES:
            raise _refusal(self._archive, f"it unpacks to more than {MOST_FILES:,} files")


def _refusal(archive: Path, why: str) -> IntegrityError:
    return IntegrityError(
        f"The sdist {archive.name} is refused, and nothing of it was unpacked: {why}.",
        remedy=f"Report it to whoever publishes {archive.name}, and lock another version.",
        context={"file": archive},
    )

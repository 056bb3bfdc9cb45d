"""What a command has hashed, on the disk: killed at any moment, it goes on from there."""

from __future__ import annotations

import os
import stat
import time
from contextlib import suppress
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from envbuilder.atomic import make_folder
from envbuilder.budget import budget

_LASTS = 86400.0
"""Seconds for which what was hashed need not be read again: disks lose bytes without changing a date."""


class Stamp(BaseModel):
    """What a file looked like when its bytes were last hashed: who changes it, changes one of these."""

    model_config = ConfigDict(frozen=True)

    sha256: str
    size: int
    inode: int
    mtime_ns: int
    ctime_ns: int

    @classmethod
    def of(cls, path: Path, sha256: str) -> Stamp:
        return cls.of_status(path.lstat(), sha256)

    @classmethod
    def of_status(cls, found: os.stat_result, sha256: str) -> Stamp:
        """As `os.lstat` has `found` the file."""
        return cls(
            sha256=sha256,
            size=found.st_size,
            inode=found.st_ino,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
        )


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True)

    path: str
    stamp: Stamp
    hashed_at: float
    """Unix time."""


class HashRecord:
    """The files that a command has hashed, be it cut off or done; kept in `path` until `remove`.

    Without a path nothing is kept. Only one's own record is believed, and for a day.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._stamps = {} if path is None else _read(path)

    @classmethod
    def where_needed(cls, path: Path) -> HashRecord:
        """A record in `path` where this process's CPU time is limited, else one that keeps nothing."""
        return cls(None if budget().cpu_seconds is None else path)

    def has(self, path: Path, sha256: str) -> bool:
        """Whether the file `path` is as it was when it had `sha256`."""
        return self.sha256(path) == sha256

    def sha256(self, path: Path) -> str | None:
        """What the file `path` had, if it is as it was then; else it has to be read."""
        stamp = self._stamps.get(str(path))
        return stamp.sha256 if stamp and _is_as(path, stamp) else None

    def add(self, path: Path, stamp: Stamp) -> None:
        """Keeps that `path` had the hash of `stamp`, which was taken before it was read. From any thread.

        Not where it was changed meanwhile, nor where the record can't be written.
        """
        if self._path is None or not _is_as(path, stamp):
            return
        entry = _Entry(path=str(path), stamp=stamp, hashed_at=time.time())
        with suppress(OSError):
            make_folder(self._path.parent)
            # One short write at the end: threads don't mix, and a torn line is none.
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(self._path, flags, 0o600)
            try:
                os.write(descriptor, f"{entry.model_dump_json()}\n".encode())
            finally:
                os.close(descriptor)

    def remove(self) -> None:
        """The command has come to its end: the next one begins anew."""
        if self._path is not None:
            with suppress(OSError):
                self._path.unlink()


def _is_as(path: Path, stamp: Stamp) -> bool:
    try:
        return Stamp.of(path, stamp.sha256) == stamp
    except OSError:
        return False


def _read(path: Path) -> dict[str, Stamp]:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return {}
    with os.fdopen(descriptor, encoding="utf-8", errors="replace") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return {}
        entries = [entry for line in file if (entry := _entry(line))]
    return {entry.path: entry.stamp for entry in entries if 0 <= time.time() - entry.hashed_at < _LASTS}


def _entry(line: str) -> _Entry | None:
    with suppress(ValidationError):
        return _Entry.model_validate_json(line)
    return None

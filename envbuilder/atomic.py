"""Writing files so that a path is either absent, old and whole, or new and whole, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from envbuilder.errors import MismatchError

FOLDER_MODE = 0o2750
"""Of the folders that `make_folder` makes: what is made in them gets their group, as on a shared project disk."""
FILE_MODE = 0o640
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def write_atomically(path: Path, data: bytes | str) -> None:
    """Puts `data` (text as UTF-8) at `path`, in one step; parent folders are made."""
    content = data.encode() if isinstance(data, str) else data
    with new_file(path, size=len(content)) as file:
        file.write(content)


@contextmanager
def new_file(path: Path, *, size: int, mode: int = FILE_MODE, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; else nothing of it is left.

    `size` is the bytes that will be written, for the message when the disk is full (MismatchError). With
    `durable`, file and folder are on the disk when the block has ended: leave it out for scratch copies.
    """
    make_folder(path.parent)
    with disk_has_room(path, size):
        # A random name that did not exist: no other process writes it, and no planted link is followed.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=".new", dir=path.parent)
        try:
            with open(descriptor, "wb") as file:
                yield file
                file.flush()
                os.fchmod(descriptor, mode)
                if durable:
                    os.fsync(descriptor)
            Path(name).replace(path)
        except BaseException:
            with suppress(FileNotFoundError):
                Path(name).unlink()
            raise
        if durable:
            fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Makes the names in folder `path` survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems can't; they write names through to the server anyway.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Makes folder `path` and its parents with FOLDER_MODE, whatever the umask; one that is there stays."""
    if path.is_dir():
        return
    make_folder(path.parent)
    try:
        path.mkdir()
    except FileExistsError:
        return  # another process was faster
    path.chmod(FOLDER_MODE)


@contextmanager
def disk_has_room(path: Path, size: int) -> Iterator[None]:
    """Turns the system's "disk full", "over quota" or "file too large" into MismatchError.

    `path` is what the block writes, `size` how many bytes it needs.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _FULL:
            raise
        raise no_room(path, size, os.strerror(error.errno)) from error


def no_room(path: Path, size: int, reason: str) -> MismatchError:
    """The error for `size` bytes that `path` has no room for."""
    return MismatchError(
        f"There is no room for {size:,} bytes at {path}: {reason}.",
        remedy="Free space or quota there, or choose another disk with envbuilder --root FOLDER.",
        context={"file": path, "bytes needed": size},
    )

"""Writing files so that a path is absent, old and whole, or new and whole, whatever happens meanwhile."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from envbuilder.errors import MismatchError

FOLDER_MODE = 0o2750
"""Of the folders that `make_folder` makes: setgid, so what is made in them gets the project's group. Where
that group may write in the parent, it may in the folder too."""
FILE_MODE = 0o640
NEW_SUFFIX = ".new"
"""Of hidden files that are on their way to their name; `remove_leftovers` knows them by it."""
_ABANDONED = 3600.0
"""Seconds without a write after which a new file's writer has surely ended."""
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FORBIDDEN = frozenset({errno.EACCES, errno.EPERM, errno.EROFS, errno.ELOOP, errno.ENOTDIR})


def write_atomically(path: Path, data: bytes | str) -> None:
    """Puts `data` (text as UTF-8) at `path`, in one step; parent folders are made."""
    content = data.encode() if isinstance(data, str) else data
    with new_file(path, size=len(content)) as file:
        file.write(content)


@contextmanager
def new_file(path: Path, *, size: int, mode: int = FILE_MODE, durable: bool = True) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends well; else nothing of it is left.

    `size` is the bytes that will be written, for the message of `writing` when the disk is full. With
    `durable`, file and folder are on the disk when the block has ended: leave it out for scratch copies.
    """
    with writing(path, size):
        make_folder(path.parent)
        # A random name that did not exist: no other process writes it, and no planted link is followed.
        descriptor, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.", suffix=NEW_SUFFIX, dir=path.parent)
        try:
            with os.fdopen(descriptor, "wb") as file:
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


def is_new_file(path: Path) -> bool:
    """Whether `path` is, by its name and kind, a file on its way to its name."""
    return (
        path.name.startswith(".")
        and path.name.endswith(NEW_SUFFIX)
        and path.is_file()
        and not path.is_symlink()
    )


def remove_leftovers(folder: Path) -> None:
    """Removes what killed writers left in `folder`: new files that nobody has written to for an hour."""
    for path in folder.glob(f".*{NEW_SUFFIX}"):
        with suppress(FileNotFoundError, PermissionError):  # done meanwhile, or another user's
            # ctime: a new link to an old file has that file's mtime.
            if path.lstat().st_ctime < time.time() - _ABANDONED:
                path.unlink()


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
    """Makes folder `path` and its parents with FOLDER_MODE, whatever the umask; one that is there stays.

    In a folder that a group shares, and only the group, a new one is shared in the same way.
    """
    if path.is_dir():
        return
    make_folder(path.parent)
    parent = path.parent.stat()
    shared = bool(parent.st_mode & stat.S_IWGRP) and not parent.st_mode & stat.S_IWOTH
    # Made under another name: with any other mode than its own, nobody may see it, nor make a folder in it.
    made = Path(tempfile.mkdtemp(prefix=f".{path.name[:100]}.", dir=path.parent))
    try:
        if shared and made.stat().st_gid != parent.st_gid:
            # Without a setgid bit on the parent, a new folder has the user's own group, perhaps everybody's.
            try:
                os.chown(made, -1, parent.st_gid)
            except PermissionError:
                shared = False
        made.chmod(FOLDER_MODE | (stat.S_IWGRP if shared else 0))
        made.rename(path)  # in the place of an empty one, if another process was faster
    except OSError as error:
        made.rmdir()
        if path.is_dir():
            return
        if error.errno != errno.ENOTEMPTY:
            raise
        make_folder(path)  # one that another process had made, and has taken away since


def refuse_world_writable(folder: Path) -> None:
    """MismatchError if everybody on the machine may write into `folder`: what is in it would be anybody's."""
    mode = folder.stat().st_mode
    if mode & stat.S_IWOTH:
        raise MismatchError(
            f"Everybody may write into {folder}.",
            remedy=f"chmod o-w {folder}",
            context={"folder": folder, "mode": stat.filemode(mode)},
        )


@contextmanager
def scratch_folder(folder: Path, prefix: str) -> Iterator[Path]:
    """A new folder in `folder`, this user's alone, that goes with the block. What can't be removed stays."""
    scratch = tempfile.TemporaryDirectory(prefix=prefix, dir=folder)
    try:
        yield Path(scratch.name)
    finally:
        with suppress(OSError):
            scratch.cleanup()  # what a build made read-only too, up to the first refusal
        shutil.rmtree(scratch.name, ignore_errors=True)


@contextmanager
def writing(path: Path, size: int) -> Iterator[None]:
    """Turns the system's refusals into MismatchError: disk full, over quota, file too large, not allowed.

    `path` is what the block writes, `size` how many bytes it needs.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise no_room(path, size, os.strerror(error.errno)) from error
        if error.errno in _FORBIDDEN:
            raise MismatchError(
                f"{path} can't be written: {os.strerror(error.errno)}.",
                remedy="Make it writable for you, or choose another folder with envbuilder --root FOLDER.",
                context={"file": path},
            ) from error
        raise


def no_room(path: Path, size: int, reason: str) -> MismatchError:
    """The error for `size` bytes that `path` has no room for."""
    return MismatchError(
        f"There is no room for {size:,} bytes at {path}: {reason}.",
        remedy="Free space or quota there, or choose another disk with envbuilder --root FOLDER.",
        context={"file": path, "bytes needed": size},
    )

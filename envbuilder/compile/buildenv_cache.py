"""Keeps the virtual environments that builds run in: the same locked wheels make the same one.

In the cache folder there are, of each user's own:

- `DIGEST-RANDOM/`, a venv. It is made in place, since its scripts name their interpreter by its path.
- `DIGEST.json`, written last, in one step: which of these folders is whole, and the mark of its files.
  Without it a folder counts for nothing.
- `DIGEST-RANDOM.HOST-RANDOM.lease`, while a process uses a folder (or makes it). Nothing in use is removed.

No file lock is needed: of two processes that make the same venv at once each uses its own, and one stays.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from envbuilder.atomic import make_folder, write_atomically
from envbuilder.envlock import WheelFile
from envbuilder.interpreter import Interpreter
from envbuilder.model import ProvidedPackages

KEPT = 3
"""How many venvs stay, of those that nobody uses: each can take gigabytes."""
_LEASE_S = 48 * 3600.0
"""After this long without its end, a lease is a killed process's: no build takes a day."""
_FORMAT = 1
"""Part of the digest: to be raised when a venv made by an older version must not be used."""


@contextmanager
def cached_build_venv(
    cache: Path,
    *,
    interpreter: Interpreter,
    provided: ProvidedPackages | None,
    wheels: Sequence[WheelFile],
    make: Callable[[Path], None],
) -> Iterator[Path]:
    """The venv of `interpreter` with `wheels`, in folder `cache`; during the block nobody removes it.

    `make` is called with a path that doesn't exist yet, and puts the venv there; it checks the wheels as it
    unpacks them. What builds import should be imported once in it: builds can't keep the bytecode that they
    compile. Nothing else may write into a venv afterwards (PYTHONDONTWRITEBYTECODE=1 for programs outside a
    sealed sandbox).

    A venv that was kept is used if no file was added, removed, written to or changed in mode since: names,
    modes, sizes and times of modification and change are compared, not the bytes. An unchanged file whose
    disk has rotted is not found.
    """
    make_folder(cache)
    digest = venv_digest(interpreter, provided, wheels)
    pointer = cache / f"{digest}.json"
    found = _kept(pointer)
    if found is not None:
        # Leased first, then looked at again: whoever removes takes the pointer away, then looks for leases.
        with _lease(found):
            if _kept(pointer) == found and _is_unchanged(found, pointer):
                with suppress(OSError):
                    os.utime(pointer)
                yield found
                return
    folder = cache / f"{digest}-{secrets.token_hex(4)}"
    with _lease(folder):
        try:
            make(folder)
            folder.chmod(0o700)  # the cache may be a group's: what runs in a build is this user's alone
            record = {"folder": folder.name, "mark": _mark(folder)}
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
        write_atomically(pointer, json.dumps(record))
        remove_unused(cache)
        yield folder


def venv_digest(
    interpreter: Interpreter, provided: ProvidedPackages | None, wheels: Sequence[WheelFile]
) -> str:
    """A name for the venv that these make. It is a user's own: others could put their files into it."""
    inputs = {
        "format": _FORMAT,
        "user": os.getuid(),
        "interpreter": [str(interpreter.path), str(interpreter.path.resolve()), interpreter.version],
        "provided": None if provided is None else provided.model_dump(mode="json"),
        "wheels": sorted((wheel.path.name, wheel.package.sha256) for wheel in wheels),
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:32]


def remove_unused(cache: Path) -> None:
    """Removes this user's venvs that nobody uses: all but the KEPT that were used last, and what killed
    processes and others' newer venvs left behind. What can't be removed stays."""
    _remove_stale_leases(cache)
    pointers = {path: changed for path in cache.glob("*.json") if (changed := _own_mtime(path)) is not None}
    by_age = sorted(pointers, key=lambda path: pointers[path], reverse=True)
    for pointer in by_age[KEPT:]:
        found = _kept(pointer)
        if found is None or not _is_leased(found):
            with suppress(OSError):
                pointer.unlink()
    for folder in sorted(cache.iterdir()):
        if not folder.is_dir() or _own_mtime(folder) is None or _is_leased(folder):
            continue
        # It was there before its maker's lease was looked for: the maker has done all that it will do. Who
        # else uses it has a lease from before the pointer was gone.
        if _kept(cache / f"{folder.name.partition('-')[0]}.json") != folder and not _is_leased(folder):
            shutil.rmtree(folder, ignore_errors=True)


def _kept(pointer: Path) -> Path | None:
    """The folder that `pointer` names, if it is there and this user's."""
    try:
        name = json.loads(pointer.read_bytes())["folder"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    folder = pointer.parent / str(name)
    ours = folder.parent == pointer.parent and _own_mtime(folder) is not None
    return folder if ours and _own_mtime(pointer) is not None and folder.is_dir() else None


def _is_unchanged(folder: Path, pointer: Path) -> bool:
    try:
        return bool(json.loads(pointer.read_bytes())["mark"] == _mark(folder))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _mark(folder: Path) -> str:
    """A digest of what the file system tells of the files below `folder`, without reading them.

    The time of change can't be set by a program: what writes to a file and sets its time back shows too.
    """
    mark = hashlib.sha256()
    waiting = [str(folder)]
    while waiting:
        with os.scandir(waiting.pop()) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                told = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(told.st_mode):
                    waiting.append(entry.path)
                    facts: tuple[object, ...] = (told.st_mode,)
                else:
                    facts = (told.st_mode, told.st_size, told.st_mtime_ns, told.st_ctime_ns)
                mark.update(repr((os.path.relpath(entry.path, folder), *facts)).encode(errors="replace"))
    return mark.hexdigest()


@contextmanager
def _lease(folder: Path) -> Iterator[None]:
    lease = folder.parent / f"{folder.name}.{os.uname().nodename}-{secrets.token_hex(4)}.lease"
    write_atomically(lease, "")
    try:
        yield
    finally:
        with suppress(OSError):
            lease.unlink()


def _is_leased(folder: Path) -> bool:
    return any(folder.parent.glob(f"{folder.name}.*.lease"))


def _remove_stale_leases(cache: Path) -> None:
    for lease in cache.glob("*.lease"):
        changed = _own_mtime(lease)
        if changed is not None and changed < time.time() - _LEASE_S:
            with suppress(OSError):
                lease.unlink()


def _own_mtime(path: Path) -> float | None:
    """When `path` was changed, in seconds; None where it is not there, or another user's, or a link."""
    try:
        told = path.lstat()
    except OSError:
        return None
    return told.st_mtime if told.st_uid == os.getuid() and not stat.S_ISLNK(told.st_mode) else None

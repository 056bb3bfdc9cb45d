"""The root of a sealed sandbox: all of the host read-only, less what is hidden, and one folder to write in.

Runs inside new namespaces (see `sandbox_enter`), in a bare interpreter with the standard library only.
Manuals: mount_namespaces(7), mount(2), mount_setattr(2), pivot_root(2).
"""

# pathlib takes longer to load than this to run.
# ruff: noqa: PTH102, PTH103, PTH110, PTH112, PTH114, PTH115, PTH120, PTH123, PTH211

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
import struct
from collections.abc import Iterable
from contextlib import suppress
from typing import NamedTuple

BUILD = "/build"
"""The one writable folder, as the program sees it."""

_OLD, _NEW = "/old", "/new"
_DEVICES = ("null", "zero", "full", "random", "urandom")
_SCRATCH_SIZE = "size=2g"
"""Of each folder for temporary files: it is memory. TMPDIR is on the disk and has no such end."""

# linux/mount.h, linux/fcntl.h
_RDONLY, _NOSUID, _NODEV, _NOEXEC = 1, 2, 4, 8
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "noatime": 1024, "nodiratime": 2048}
_FLAGS |= {"nosymfollow": 256, "relatime": 1 << 21}
_REMOUNT, _BIND, _REC, _PRIVATE, _DETACH = 32, 4096, 16384, 1 << 18, 2
_MOUNT_SETATTR = 442
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000

_libc = ctypes.CDLL(None, use_errno=True)


class Refusal(Exception):
    """The sandbox can't be set up, and why."""


class Plan(NamedTuple):
    """What to run, and what it sees. Paths are absolute, have no links, and are the host's unless said."""

    parent: int
    """The process that must be there: without it, nothing is run."""
    user_namespace: bool
    variables: int
    """How many NAME=VALUE words there are."""
    cwd: str
    """As the program sees it."""
    private: str | None
    """What is at BUILD; None: an empty folder in memory."""
    binds: dict[str, str]
    """Path below BUILD → what is shown there, read-only."""
    steps: list[list[str]]
    """What is hidden and shown, in this order: each is the kind, the path, and what a link says. The kinds:
    "hide" (an empty folder where nothing can be written), "scratch" (an empty folder that is this program's
    alone), "show" (what the host has there, read-only), "zlink" (a link)."""
    masked: list[str]
    """Files, folders and sockets that are empty."""


def call(name: str, *arguments: object) -> int:
    """A call of the C library; OSError where it fails."""
    result: int = getattr(_libc, name)(*arguments)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def _mount(source: str, target: str, kind: str | None, flags: int, data: str | None = None) -> None:
    words = (os.fsencode(word) if word is not None else None for word in (source, target, kind))
    call("mount", *words, ctypes.c_ulong(flags), None if data is None else data.encode())


def is_below(path: str, folder: str) -> bool:
    """Whether `path` is `folder` or in it."""
    return path == folder or folder == "/" or path.startswith(folder + "/")


class Mounted(NamedTuple):
    """What is mounted at a path, as /proc/self/mountinfo has it."""

    kind: str
    """Of the file system: "ext4"."""
    options: frozenset[str]


def read_mounts(text: str) -> dict[str, Mounted]:
    """Path → what is mounted there, in `text`, as in /proc/self/mountinfo; of two at one path, the upper."""
    mounts = {}
    for line in text.splitlines():
        words = line.split(" ")
        path = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), words[4])
        mounts[path] = Mounted(words[words.index("-", 6) + 1], frozenset(words[5].split(",")))
    return mounts


def _mounts_below(folder: str) -> dict[str, Mounted]:
    with open(f"{_OLD}/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
        mounts = read_mounts(file.read())
    return {path: mounted for path, mounted in mounts.items() if is_below(path, folder)}


def _restrict(path: str, flags: int, *, below: bool = True) -> None:
    """Adds `flags` to the mount at `path`, and with `below` to all that are mounted in it."""
    attributes = struct.pack("=QQQQ", flags, 0, 0, 0)  # the first four MOUNT_ATTR_* are the same as MS_*
    try:
        call(
            "syscall",
            *(ctypes.c_long(_MOUNT_SETATTR), _AT_FDCWD, os.fsencode(path)),
            *(_AT_RECURSIVE if below else 0, attributes, ctypes.c_size_t(len(attributes))),
        )
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.EPERM):
            raise
        restrict_each(path, flags, below=below)


def restrict_each(path: str, flags: int, *, below: bool) -> None:
    """As `_restrict`, on a kernel older than 5.12: one mount after the other."""
    real = os.readlink(path) if path.startswith(f"{_OLD}/proc/") else path
    for here, mounted in _mounts_below(real).items():
        if below or here == real:
            # An ordinary user may not take away a flag that the host's mount has, and atime is one of them.
            kept = sum(number for option, number in _FLAGS.items() if option in mounted.options)
            try:
                _mount("none", here, None, _BIND | _REMOUNT | kept | flags)
            except OSError as error:
                # Where no way leads, there is none for the program. What is writable in the end, is found.
                if error.errno not in (errno.EACCES, errno.EINVAL, errno.ENOENT):
                    raise


def _bind(source: str, target: str, flags: int = _RDONLY | _NOSUID | _NODEV) -> None:
    _mount(source, target, None, _BIND | _REC)
    _restrict(target, flags)


def _memory(target: str, mode: str, size: str = "size=1m") -> None:
    _mount("tmpfs", target, "tmpfs", _NOSUID | _NODEV, f"mode={mode},{size}")


def _touch(path: str) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o444))


def _top_level(closed: Iterable[str]) -> None:
    """All that is in the host's root, one by one: nothing is assumed of the file system that it is on."""
    for entry in sorted(os.scandir(_OLD), key=lambda entry: entry.name):
        target = f"{_NEW}/{entry.name}"
        if entry.name.startswith(".") or entry.name in ("proc", "dev", BUILD[1:]):
            continue
        if entry.is_symlink():
            os.symlink(os.readlink(entry.path), target)
            continue
        if entry.is_dir(follow_symlinks=False):
            os.mkdir(target)
            if f"/{entry.name}" in closed:
                continue
        elif entry.is_file(follow_symlinks=False):
            _touch(target)
        else:
            continue
        try:
            _mount(entry.path, target, None, _BIND | _REC)
        except OSError:
            continue  # a disk that doesn't answer, a folder that may not be seen: it stays empty
        _restrict(target, _RDONLY | _NOSUID | _NODEV)


def _devices() -> None:
    dev = f"{_NEW}/dev"
    os.mkdir(dev)
    _mount("tmpfs", dev, "tmpfs", _NOSUID | _NOEXEC, "mode=755,size=1m")
    for name in _DEVICES:
        _touch(f"{dev}/{name}")
        _bind(f"{_OLD}/dev/{name}", f"{dev}/{name}", _NOSUID | _NOEXEC)
    for name, target in (("fd", "fd"), ("stdin", "fd/0"), ("stdout", "fd/1"), ("stderr", "fd/2")):
        os.symlink(f"/proc/self/{target}", f"{dev}/{name}")
    os.mkdir(f"{dev}/shm")
    _memory(f"{dev}/shm", "1777", _SCRATCH_SIZE)
    _restrict(dev, _RDONLY | _NOSUID | _NOEXEC, below=False)


def _change(kind: str, path: str, words: str) -> None:
    """One of the plan's steps."""
    target = _NEW + path
    if kind == "zlink":
        if not os.path.lexists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            os.symlink(words, target)
    elif kind == "show":
        source = _OLD + path
        folder = os.path.isdir(source)
        os.makedirs(target if folder else os.path.dirname(target), exist_ok=True)
        if not folder and not os.path.lexists(target):
            _touch(target)
        _bind(source, target)
    else:
        with suppress(OSError):  # its disk isn't there: nor is anything to hide
            os.makedirs(target, exist_ok=True)
        if os.path.isdir(target):
            _memory(target, *(("1777", _SCRATCH_SIZE) if kind == "scratch" else ("755",)))


def _place(inside: str, *, folder: bool) -> int:
    """A descriptor of the file or folder `inside` BUILD, made where it is missing.

    Earlier programs could write here: no link of theirs is followed.
    """
    words = inside.removeprefix(BUILD + "/").split("/")
    here = os.open(_NEW + BUILD, os.O_PATH | os.O_DIRECTORY)
    for number, word in enumerate(words, 1):
        is_folder = folder or number < len(words)
        try:
            if is_folder:
                os.mkdir(word, 0o755, dir_fd=here)
            else:
                os.close(os.open(word, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=here))
        except FileExistsError:
            pass
        found = os.open(word, os.O_PATH | os.O_NOFOLLOW, dir_fd=here)
        if stat.S_IFMT(os.fstat(found).st_mode) != (stat.S_IFDIR if is_folder else stat.S_IFREG):
            raise Refusal(f"{inside} is no place for a {'folder' if folder else 'file'}")
        os.close(here)
        here = found
    return here


def _build_folder(plan: Plan) -> None:
    target = _NEW + BUILD
    os.mkdir(target)
    if plan.private is None:
        _memory(target, "755", _SCRATCH_SIZE)
    else:
        _bind(_OLD + plan.private, target, _NOSUID | _NODEV)
    for inside, source in sorted(plan.binds.items()):
        folder = os.path.isdir(_OLD + source)
        below = _place(inside, folder=folder)
        _mount(_OLD + source, f"{_OLD}/proc/self/fd/{below}", None, _BIND | _REC)
        # Opened again, it is what was mounted there just now.
        above = _place(inside, folder=folder)
        _restrict(f"{_OLD}/proc/self/fd/{above}", _RDONLY | _NOSUID | _NODEV)
        os.close(below)
        os.close(above)


def _mask(paths: Iterable[str]) -> None:
    empty = "/empty"  # beside the new root, and gone with what is beside it
    if not os.path.exists(empty):
        _touch(empty)
    for path in paths:
        target = _NEW + path
        if not os.path.lexists(target) or os.path.islink(target):
            continue
        if os.path.isdir(target):
            _memory(target, "755")
            _restrict(target, _RDONLY)
        else:
            # No bytes to read, and no socket to talk to.
            _bind(empty, target)


def set_up_root(plan: Plan) -> None:
    """Gives this process a root that shows what `plan` says, read-only but for BUILD and scratch."""
    _mount("none", "/", None, _REC | _PRIVATE)
    base = next(os.path.realpath(folder) for folder in ("/tmp", "/var", "/etc") if os.path.isdir(folder))
    _memory(base, "755")
    for name in (_OLD, _NEW):
        os.mkdir(base + name)
    call("pivot_root", os.fsencode(base), os.fsencode(base + _OLD))
    os.chdir("/")
    _memory(_NEW, "755")
    hidden = [path for kind, path, _ in plan.steps if kind == "hide"]
    scratch = [path for kind, path, _ in plan.steps if kind == "scratch"]
    _top_level({*hidden, *scratch})
    _devices()
    proc = f"{_NEW}/proc"
    os.mkdir(proc)
    # Much below /proc obeys user id 0 whatever its rights are.
    _mount("proc", proc, "proc", _NOSUID | _NODEV | _NOEXEC | _RDONLY)
    for kind, path, words in plan.steps:
        _change(kind, path, words)
    _build_folder(plan)
    _mask(plan.masked)
    mounts = _mounts_below(_NEW)
    # Another /proc, as chroots have, shows the host's processes, and through them its root as it is.
    _mask(
        path.removeprefix(_NEW) for path, mounted in mounts.items() if mounted.kind == "proc" and path != proc
    )
    for path in hidden:
        if _NEW + path in mounts:
            _restrict(_NEW + path, _RDONLY, below=False)
    _restrict(_NEW, _RDONLY, below=False)
    writable = {f"{_NEW}{path}" for path in (BUILD, "/dev/shm", *(f"/dev/{name}" for name in _DEVICES))}
    writable |= {_NEW + path for path in scratch}
    for here, mounted in _mounts_below(_NEW).items():
        path = here.removeprefix(_NEW)
        of_build = is_below(path, BUILD) and path not in plan.binds
        if "ro" not in mounted.options and here not in writable and not of_build:
            raise Refusal(f"{path} stayed writable")
    os.chdir(_NEW)
    call("pivot_root", b".", b".")
    call("umount2", b".", _DETACH)
    os.chdir("/")
    os.close(os.open("/dev/null", os.O_RDWR))  # a container's devices can be such that nobody may open them

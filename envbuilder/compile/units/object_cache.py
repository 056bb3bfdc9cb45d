"""Compiled objects by what they were compiled from: the same unit, for the same target, is compiled once.

A unit's key is all that the compile service knows before it compiles (`CacheRequest`). Which headers were
read is known only afterwards, so under each key lie *manifests*: one for each set of headers, with their
hashes and the object's. A manifest holds if each of its headers is there with the very hash, and its object
has its own.

What this covers: the compiler, its arguments and variables, the source's text, and every file that the
compiler's dependency file names; through `listing`, that no header newly appears earlier on the include path,
or where `__has_include` asked in vain. What it doesn't: files that are read without being named there (by an
assembler's `.incbin`), headers that the build itself newly makes beside those that it read, and the time of
day in `__DATE__`, `__TIME__` and `__TIMESTAMP__`.

Builds never see the folder: it is their user's own, and only the service reads and writes it. No locks: each
file is written once, in one step, under a name that says what is in it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from envbuilder.atomic import NEW_SUFFIX, make_folder, new_file, remove_leftovers, writing
from envbuilder.bundle import hash_open
from envbuilder.errors import MismatchError

_FORMAT = 1
"""Of keys and manifests: those of another format are never found."""
_SIZE = 10 << 30
"""Bytes that the cache may take."""
_CANDIDATES = 16
"""Manifests that one key keeps, the last used: a unit's headers change seldom."""
_FRESH_NS = 2_000_000_000
"""A file that was changed so lately may change again without its times telling: its hash isn't remembered."""
_MODE = 0o600
_SHA256 = re.compile(r"[0-9a-f]{64}")


class DepfileError(ValueError):
    """A dependency file that can't be understood: which headers were read isn't known."""


@dataclass(frozen=True)
class CacheRequest:
    """What a unit's object depends on, as far as it is known before compiling."""

    package: str
    """Normalised name: packages don't share objects."""
    compiler: str
    """Its identity: version and sha256 of its programs."""
    arguments: tuple[str, ...]
    """Normalised: without the output's path and temporary names, and with what response files hold."""
    source_text_sha256: str
    """Of the text that is compiled: a shard's own."""
    source_name: str
    """Path as the build sees it: it is in `__FILE__` and in line information."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that the compiler heeds."""
    listing: str = ""
    """Which files the include path could find: `list_names` of the source tree before its build, and the
    versions in the build environment. Without it, a header that newly hides another one goes unseen."""

    @property
    def key(self) -> str:
        """A sha256 in hexadecimal."""
        text = json.dumps([_FORMAT, asdict(self)], sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()


@dataclass(frozen=True)
class CachedObject:
    """A hit."""

    content: bytes
    """The object file, with the hash that its manifest names."""
    sha256: str
    extra: Mapping[str, object] = field(default_factory=dict)
    """What was stored along with it."""


@dataclass(frozen=True)
class _Manifest:
    path: Path
    headers: dict[str, str]
    """Name as the build sees it → sha256."""
    object_sha256: str
    size: int
    """Bytes of the object."""
    extra: dict[str, object]


class FileHashes:
    """sha256 of files, each read once as long as its inode, size and times stay. Safe for several threads."""

    def __init__(self, clock: Callable[[], int] = time.time_ns) -> None:
        self._clock = clock
        self._known: dict[tuple[int, ...], str] = {}
        self._lock = threading.Lock()

    def __call__(self, path: Path) -> str:
        """OSError where `path` is no regular file, can't be read, or changes while it is read."""
        found = os.stat(path)  # noqa: PTH116 — of thousands of headers for each unit: a Path's own is slow
        with self._lock:
            known = self._known.get(_identity(found))
        if known is not None and stat.S_ISREG(found.st_mode):
            return known
        # Not blocking: a build may have put a pipe in a header's place.
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not stat.S_ISREG(found.st_mode):
                raise OSError(f"{path} is no regular file")
            identity = _identity(found)
            sha256 = hash_open(file)
            if _identity(os.fstat(descriptor)) != identity:
                raise OSError(f"{path} changes while it is read")
        if self._clock() - max(found.st_mtime_ns, found.st_ctime_ns) > _FRESH_NS:
            with self._lock:
                self._known[identity] = sha256
        return sha256


class ObjectCache:
    """The objects in `folder`, which belongs to this user alone.

    `hash_file` gives a file's sha256 or raises OSError; `size` bounds the bytes that stay after `close`;
    `note` is told, in one sentence, what was damaged or couldn't be stored. Safe for several threads, and for
    several processes on a shared disk. MismatchError where it can't be made, or others may write there.
    """

    def __init__(
        self,
        folder: Path,
        hash_file: Callable[[Path], str] | None = None,
        *,
        size: int = _SIZE,
        note: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.folder = folder
        self._hash_file = hash_file or FileHashes()
        self._size = size
        self._note = note
        _make_private(folder)

    def look_up(
        self, request: CacheRequest, locate: Callable[[str], Path | None] = Path
    ) -> CachedObject | None:
        """The object for `request`, if its headers are what they were; None where there is none.

        `locate` gives a header's path here from its name in the build, None where it mayn't be read. What is
        damaged is removed.
        """
        for manifest in self._manifests(request.key):
            if not self._holds(manifest, locate):
                continue
            path = self._object(manifest.object_sha256)
            content = _read_own(path)
            if content is None:  # evicted
                _discard(manifest.path)
                continue
            if len(content) != manifest.size or _sha256(content) != manifest.object_sha256:
                self._note(
                    f"A cached object of {request.package} was damaged, and is compiled again: {path}."
                )
                _discard(path)
                _discard(manifest.path)
                continue
            for used in (path, manifest.path):
                with suppress(OSError):  # evicted meanwhile
                    os.utime(used)
            return CachedObject(content, manifest.object_sha256, manifest.extra)
        return None

    def store(
        self,
        request: CacheRequest,
        headers: Mapping[str, Path],
        content: bytes,
        *,
        extra: Mapping[str, object] | None = None,
        began_ns: int | None = None,
    ) -> bool:
        """Keeps `content`, the object that `request` gave with `headers`; whether that was possible.

        `headers` maps each name in the compiler's dependency file, as the build sees it, to its path here;
        the source itself need not be among them, and a shard's, which is there only now, must not.
        `extra` is JSON. `began_ns` is when the compiler was started (time.time_ns): with it, an object isn't
        kept if a header was changed since then, since the compiler may have read what was there before.
        """
        try:
            if began_ns is not None:
                changed = [name for name, path in headers.items() if _changed_ns(path) >= began_ns]
                if changed:
                    self._note(f"{request.source_name} is not cached: {changed[0]} changed meanwhile.")
                    return False
            hashes = {name: self._hash_file(path) for name, path in sorted(headers.items())}
            sha256 = _sha256(content)
            record = {
                "format": _FORMAT,
                "headers": hashes,
                "object": sha256,
                "size": len(content),
                "extra": dict(extra or {}),
            }
            text = json.dumps(record, sort_keys=True, separators=(",", ":")).encode()
            # The object first: a manifest whose object isn't there is never left by a writer that is killed.
            _write(self._object(sha256), content)
            folder = self._manifest_folder(request.key)
            _write(folder / f"{_sha256(text)}.json", text)
            for path in _last_used(folder)[_CANDIDATES:]:
                _discard(path)
        except (MismatchError, OSError) as error:
            self._note(f"{request.source_name} is not cached: {error}")
            return False
        return True

    def close(self) -> None:
        """Removes what killed writers left, and the least recently used where the cache is too large."""
        kept: list[tuple[int, int, Path]] = []
        for kind in ("manifests", "objects"):
            for folder, _, names in os.walk(self.folder / kind):
                if names:
                    remove_leftovers(Path(folder))
                for name in names:
                    path = Path(folder, name)
                    with suppress(OSError):
                        found = path.lstat()
                        if name.endswith(NEW_SUFFIX):
                            continue
                        kept.append((found.st_mtime_ns, found.st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total <= self._size:
                break
            _discard(path)
            with suppress(OSError):  # not empty
                path.parent.rmdir()
            total -= size

    def _holds(self, manifest: _Manifest, locate: Callable[[str], Path | None]) -> bool:
        for name, sha256 in manifest.headers.items():
            path = locate(name)
            try:
                if path is None or self._hash_file(path) != sha256:
                    return False
            except (OSError, ValueError):  # no such file, or a name that no file can have
                return False
        return True

    def _manifests(self, key: str) -> Iterator[_Manifest]:
        """Of `key`, the last used first; damaged ones are removed."""
        for path in _last_used(self._manifest_folder(key)):
            data = _read_own(path)
            if data is None:
                continue
            manifest = _manifest(path, data) if _sha256(data) == path.stem else None
            if manifest is None:
                self._note(f"An entry of the object cache was damaged: {path}.")
                _discard(path)
            else:
                yield manifest

    def _manifest_folder(self, key: str) -> Path:
        return self.folder / "manifests" / key[:2] / key

    def _object(self, sha256: str) -> Path:
        return self.folder / "objects" / sha256[:2] / sha256


def parse_depfile(text: str) -> list[str]:
    """The prerequisites of all rules in a compiler's dependency file (gcc's and nvcc's -MD), each once.

    In make's syntax: a backslash at a line's end continues it; spaces and # have a backslash before them, and
    backslashes before those are doubled; $ is doubled. DepfileError where there is no rule or one is cut off.
    """
    if text and not text.endswith("\n"):
        raise DepfileError("the dependency file is cut off")
    names: dict[str, None] = {}
    rules = 0
    for line in re.sub(r"\\\r?\n", " ", text).split("\n"):
        if not line.strip() or line.startswith("#"):
            continue
        # nvcc doesn't mark spaces in the target's name, so the target ends at the first lone colon.
        target = re.match(r"(?:\\.|[^\\])*?:(?=[ \t\r]|$)", line)
        if target is None:
            raise DepfileError(f"no rule: {line[:100]}")
        rules += 1
        for word in re.findall(r"(?:\\.|[^\\ \t\r]|\\$)+", line[target.end() :]):
            names[_unescaped(word)] = None
    if not rules:
        raise DepfileError("the dependency file has no rule")
    return list(names)


def _unescaped(word: str) -> str:
    # gcc doubles backslashes only where a space or # follows them.
    marked = re.sub(r"(\\*)\\([ \t#:])", lambda found: found[1][: len(found[1]) // 2] + found[2], word)
    return marked.replace("$$", "$")


def list_names(folder: Path) -> str:
    """A sha256 of the relative paths of all that is below `folder`, whatever is in the files."""
    names = (
        str(Path(place, name).relative_to(folder))
        for place, folders, files in os.walk(folder)
        for name in (*folders, *files)
    )
    return _sha256("\0".join(sorted(names)).encode(errors="surrogateescape"))


def _make_private(folder: Path) -> None:
    with writing(folder, 0):
        make_folder(folder.parent)
        with suppress(FileExistsError):
            folder.mkdir(mode=0o700)
    found = folder.lstat()
    own = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()
    if not own or found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise MismatchError(
            f"Others may write into the object cache {folder}."
            if own
            else f"The object cache {folder} is not a folder of this user.",
            remedy=f"rm -r {folder}",
            context={"folder": folder, "mode": stat.filemode(found.st_mode), "owner": found.st_uid},
        )
    if stat.S_IMODE(found.st_mode) != 0o700:  # a setgid bit from the folder above, or others may read
        folder.chmod(0o700)


def _read_own(path: Path) -> bytes | None:
    """The bytes of a regular file of this user; None for anything else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            own = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid()
            return file.read() if own else None
    except OSError:
        return None


def _write(path: Path, data: bytes) -> None:
    # Not forced to the disk: what a power failure damages is found when it is read.
    with new_file(path, size=len(data), mode=_MODE, durable=False) as file:
        file.write(data)


def _manifest(path: Path, data: bytes) -> _Manifest | None:
    """None where `data` is of another format."""
    try:
        found = json.loads(data)
        manifest = _Manifest(path, found["headers"], found["object"], found["size"], found["extra"])
    except (ValueError, TypeError, KeyError):
        return None
    good = found["format"] == _FORMAT and _SHA256.fullmatch(manifest.object_sha256)
    return manifest if good else None


def _last_used(folder: Path) -> list[Path]:
    """The manifests in `folder`, the last used first."""
    dated = []
    with suppress(OSError), os.scandir(folder) as entries:  # there is none, or it is removed meanwhile
        for entry in entries:
            if entry.name.endswith(".json"):
                with suppress(OSError):
                    dated.append((entry.stat(follow_symlinks=False).st_mtime_ns, Path(entry)))
    return [path for _, path in sorted(dated, reverse=True)]


def _changed_ns(path: Path) -> int:
    found = path.stat()
    return max(found.st_mtime_ns, found.st_ctime_ns)


def _identity(found: os.stat_result) -> tuple[int, ...]:
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _discard(path: Path) -> None:
    with suppress(OSError):
        path.unlink()

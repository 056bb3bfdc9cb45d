"""The locked files: which are in place, and bringing those that are not, from the store or their origin."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from secrets import token_hex
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from envbuilder.atomic import NEW_SUFFIX, make_folder, no_room, write_atomically, writing
from envbuilder.bundle import copy_verified, hash_file
from envbuilder.errors import NetworkError
from envbuilder.fetch.wanted import Wanted
from envbuilder.report import Reporter
from envbuilder.store import Store

AT_ONCE = max(4, min(8, 2 * len(os.sched_getaffinity(0))))
"""Files transferred, or hashed, at the same time: each keeps up to two processors busy."""
_TRIES = 100
"""For a link to a file that others are replacing by its equal."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Stopped(Exception):
    """Ends the other transfers when one has failed."""


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
        found = path.lstat()
        return cls(
            sha256=sha256,
            size=found.st_size,
            inode=found.st_ino,
            mtime_ns=found.st_mtime_ns,
            ctime_ns=found.st_ctime_ns,
        )


_STAMPS = TypeAdapter(dict[str, Stamp])


def read_stamps(path: Path) -> dict[str, Stamp]:
    """The stamps kept in `path`, by file name; none where it is missing or damaged, which costs a hashing."""
    try:
        return _STAMPS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def write_stamps(path: Path, files: Iterable[Wanted], bundle: Path) -> None:
    """Keeps the stamps of `files`, which have just been found or put right in the folder `bundle`."""
    stamps = {file.path: Stamp.of(bundle / file.path, file.sha256) for file in files}
    content = _STAMPS.dump_json(stamps, indent=1)
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for a set of locked files; biggest first."""

    store: tuple[Wanted, ...]
    """In the store already, with the right bytes."""
    origin: tuple[Wanted, ...]
    """To be brought from where they come from."""


def plan_files(
    files: Sequence[Wanted], bundle: Path, store: Store, stamps: Mapping[str, Stamp], reporter: Reporter
) -> Plan:
    """What the folder `bundle` lacks of `files`. Where the stamp is unchanged, a file is not read."""
    ordered = sorted(files, key=lambda file: (-file.size, file.path))
    doubtful = [file for file in ordered if not _unchanged(bundle / file.path, file, stamps)]
    there = [
        file
        for file in doubtful
        if _has_size(bundle / file.path, file) or _has_size(store.path(file.sha256), file)
    ]
    meter = _Meter(reporter, "check", sum(file.size for file in there))

    def where(file: Wanted) -> str:
        place = "bundle" if _is(bundle / file.path, file) else "origin"
        if place == "origin" and _is(store.path(file.sha256), file):
            place = "store"
        meter.count(file.size)
        return place

    paths = [file.path for file in there]
    places = dict(zip(paths, _in_parallel(where, there, meter.stop), strict=True))
    return Plan(
        store=tuple(file for file in doubtful if places.get(file.path) == "store"),
        origin=tuple(file for file in doubtful if places.get(file.path, "origin") == "origin"),
    )


def bring_files(plan: Plan, bundle: Path, store: Store, reporter: Reporter) -> None:
    """Carries out `plan`: afterwards the folder `bundle` has the files, each with the lock's size and sha256.

    Raises what the files' `fill` raises (IntegrityError, NetworkError, …), and MismatchError where the disk
    has no room. The other transfers then stop, and can be resumed.
    """
    store.check_folder()
    needed = sum({file.sha256: file.size for file in plan.origin}.values())
    if needed > shutil.disk_usage(store.folder).free:
        raise no_room(store.folder, needed, "the disk has less left")
    meter = _Meter(reporter, "fetch", needed)

    def bring(same: tuple[Wanted, ...]) -> None:
        first = same[0]
        with meter.file(first) as count:
            store.add(first.sha256, first.size, lambda part: first.fill(part, count))
        for file in same:
            _place(store, file, bundle)

    for file in plan.store:
        _place(store, file, bundle)
    # The same bytes under two names come once.
    by_content: dict[str, list[Wanted]] = {}
    for file in plan.origin:
        by_content.setdefault(file.sha256, []).append(file)
    _in_parallel(bring, [tuple(same) for same in by_content.values()], meter.stop)


def _unchanged(path: Path, file: Wanted, stamps: Mapping[str, Stamp]) -> bool:
    """Whether `path` is as it was when it last had the bytes that the lock names now."""
    return path.is_file() and stamps.get(file.path) == Stamp.of(path, file.sha256)


def _has_size(path: Path, file: Wanted) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == file.size


def _is(path: Path, file: Wanted) -> bool:
    """Whether `path` has the bytes that the lock names."""
    return _has_size(path, file) and hash_file(path) == file.sha256


def _place(store: Store, file: Wanted, bundle: Path) -> None:
    """Puts a stored file into the bundle: a hard link, or a copy where the file system has none."""
    stored, destination = store.path(file.sha256), bundle / file.path
    # Under a name of its own first: at no moment does another fetch find the file missing.
    link = destination.with_name(f".{token_hex(8)}{NEW_SUFFIX}")
    with writing(destination, file.size):
        make_folder(destination.parent)
        try:
            _link(stored, link)
        except OSError:
            copy_verified(stored, file.sha256, file.size, destination)
            return
        link.replace(destination)
        link.unlink(missing_ok=True)  # where both were the same file, `replace` has done nothing


def _link(stored: Path, link: Path) -> None:
    """A hard link to `stored`; OSError where the file system has none, NetworkError where it is gone."""
    for _ in range(_TRIES):
        try:
            return os.link(stored, link)
        except FileNotFoundError:
            # link(2) says so too where another fetch has put the same bytes in its place at this moment.
            if not stored.exists():
                break
    raise NetworkError(
        f"Another process has removed {stored} meanwhile.",
        remedy="Run the same command again.",
        context={"file": stored},
    )


class _Meter:
    """Counts the bytes of all transfers together, and stops them all."""

    def __init__(self, reporter: Reporter, label: str, total: int) -> None:
        self.stop = threading.Event()
        self._lock = threading.Lock()
        self._reporter, self._label, self._total = reporter, label, total
        self._done = 0

    def count(self, more: int) -> None:
        if self.stop.is_set():
            raise _Stopped
        with self._lock:
            self._done += more
            if more:
                self._reporter.progress(self._label, self._done, self._total, "bytes")

    @contextmanager
    def file(self, file: Wanted) -> Iterator[Callable[[int], None]]:
        """`count` for the bytes of one file, which is on the display meanwhile."""
        done = 0

        def count(more: int) -> None:
            nonlocal done
            self.count(more)
            done += more
            if more and done < file.size:
                self._reporter.item(self._label, PurePath(file.path).name, done, file.size)

        try:
            yield count
        finally:
            self._reporter.item(self._label, PurePath(file.path).name, 0, 0)


def _in_parallel(
    work: Callable[[_Item], _Result], items: Sequence[_Item], stop: threading.Event
) -> list[_Result]:
    """`work` on each item, AT_ONCE at a time; the first failure (or Ctrl-C) sets `stop` and is raised."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]

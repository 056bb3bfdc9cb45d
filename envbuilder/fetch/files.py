"""The locked files: which are in place, and bringing those that are not, from the store or their origin."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePath
from secrets import token_hex
from typing import TypeVar

from pydantic import TypeAdapter, ValidationError

from envbuilder.atomic import NEW_SUFFIX, make_folder, no_room, write_atomically, writing
from envbuilder.budget import budget
from envbuilder.bundle import copy_verified
from envbuilder.errors import NetworkError
from envbuilder.fetch.wanted import Wanted
from envbuilder.hash_record import HashRecord, Stamp
from envbuilder.hashing import Hasher, hashing
from envbuilder.report import Reporter
from envbuilder.store import Store

MOST_AT_ONCE = 8
"""Files transferred, or hashed, at the same time: each keeps up to two processors busy."""
_TRIES = 100
"""For a link to a file that others are replacing by its equal."""
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class _Stopped(Exception):
    """Ends the other transfers when one has failed."""


_STAMPS = TypeAdapter(dict[str, Stamp])


def read_stamps(path: Path) -> dict[str, Stamp]:
    """The stamps kept in `path`, by file name; none where it is missing or damaged, which costs a hashing."""
    try:
        return _STAMPS.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}


def write_stamps(
    path: Path, files: Iterable[Wanted], bundle: Path, provided: Mapping[str, Stamp] | None = None
) -> None:
    """Keeps the stamps of `files`, which have just been found or put right in the folder `bundle`, and those
    of the files that the machine provides, by absolute path."""
    stamps = {file.path: Stamp.of(bundle / file.path, file.sha256) for file in files}
    content = _STAMPS.dump_json({**stamps, **(provided or {})}, indent=1)
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


@dataclass(frozen=True)
class Plan:
    """What is to be done for a set of locked files; biggest first."""

    store: tuple[Wanted, ...]
    """In the store already, with the right bytes."""
    origin: tuple[Wanted, ...]
    """To be brought from where they come from."""


def plan_files(
    files: Sequence[Wanted],
    bundle: Path,
    store: Store,
    stamps: Mapping[str, Stamp],
    record: HashRecord,
    reporter: Reporter,
) -> Plan:
    """What the folder `bundle` lacks of `files`. A file with an unchanged stamp, or one that `record` has, is
    not read; what is read and right goes into `record`."""
    ordered = sorted(files, key=lambda file: (-file.size, file.path))
    doubtful = [
        file
        for file in ordered
        if not _unchanged(bundle / file.path, file, stamps)
        and not record.has(bundle / file.path, file.sha256)
    ]
    there = [
        file
        for file in doubtful
        if _has_size(bundle / file.path, file) or _has_size(store.path(file.sha256), file)
    ]
    meter = Meter(reporter, "check", sum(file.size for file in there))

    def where(file: Wanted) -> str:
        place = "bundle" if _is(bundle / file.path, file, hasher, record, meter) else "origin"
        if place == "origin" and _is(store.path(file.sha256), file, hasher, record, meter):
            place = "store"
        meter.count(file.size)
        return place

    paths = [file.path for file in there]
    with hashing() as hasher:
        places = dict(zip(paths, in_parallel(where, there, meter.stop)))
    return Plan(
        store=tuple(file for file in doubtful if places.get(file.path) == "store"),
        origin=tuple(file for file in doubtful if places.get(file.path, "origin") == "origin"),
    )


def bring_files(plan: Plan, bundle: Path, store: Store, record: HashRecord, reporter: Reporter) -> None:
    """Carries out `plan`: afterwards the folder `bundle` has the files, each with the lock's size and sha256.
    Those that were brought go into `record`.

    Raises what the files' `fill` raises (IntegrityError, NetworkError, …), and MismatchError where the disk
    has no room. The other transfers then stop, and can be resumed.
    """
    store.check_folder()
    needed = sum({file.sha256: file.size for file in plan.origin}.values())
    if needed > shutil.disk_usage(store.folder).free:
        raise no_room(store.folder, needed, "the disk has less left")
    meter = Meter(reporter, "fetch", needed)

    def bring(same: tuple[Wanted, ...]) -> None:
        first = same[0]
        with meter.file(first) as count:
            store.add(first.sha256, first.size, lambda part: first.fill(part, count))
        place(same)

    def place(same: tuple[Wanted, ...]) -> None:
        for file in same:
            _place(store, file, bundle)
        for file in same:  # a further link changes a date of them all
            record.add(bundle / file.path, Stamp.of(bundle / file.path, file.sha256))

    for same in by_content(plan.store):
        place(same)
    in_parallel(bring, by_content(plan.origin), meter.stop)


def by_content(files: Iterable[Wanted]) -> list[tuple[Wanted, ...]]:
    """`files`, those of the same bytes together: they are brought once."""
    found: dict[str, list[Wanted]] = {}
    for file in files:
        found.setdefault(file.sha256, []).append(file)
    return [tuple(same) for same in found.values()]


def _unchanged(path: Path, file: Wanted, stamps: Mapping[str, Stamp]) -> bool:
    """Whether `path` is as it was when it last had the bytes that the lock names now."""
    return path.is_file() and stamps.get(file.path) == Stamp.of(path, file.sha256)


def _has_size(path: Path, file: Wanted) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size == file.size


def _is(path: Path, file: Wanted, hasher: Hasher, record: HashRecord, meter: Meter) -> bool:
    """Whether `path` has the bytes that the lock names."""
    if record.has(path, file.sha256):
        return True
    if not _has_size(path, file):
        return False
    before = Stamp.of(path, file.sha256)
    if hasher.sha256(path, lambda _: meter.count(0)) != file.sha256:
        return False
    record.add(path, before)
    return True


def _place(store: Store, file: Wanted, bundle: Path) -> None:
    """Puts a stored file into the bundle: a hard link, or a copy where the file system has none.

    It gets today's time, as one that is downloaded does: a disk that purges would take an old one at once.
    """
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
        with suppress(PermissionError):  # another user's, in a store that a group shares
            os.utime(link)
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


class Meter:
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


def in_parallel(
    work: Callable[[_Item], _Result], items: Sequence[_Item], stop: threading.Event
) -> list[_Result]:
    """`work` on each item, a few at a time; the first failure (or Ctrl-C) sets `stop` and is raised."""
    with ThreadPoolExecutor(budget().at_once(MOST_AT_ONCE)) as pool:
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

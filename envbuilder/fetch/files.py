"""The locked files: which are in place, and bringing those that are not, from the store or the index."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from secrets import token_hex
from typing import TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from envbuilder.atomic import NEW_SUFFIX, make_folder, no_room, write_atomically, writing
from envbuilder.bundle import copy_verified, hash_file
from envbuilder.download import download
from envbuilder.errors import IntegrityError, NetworkError
from envbuilder.index import Index, IndexFile
from envbuilder.lock import LockedFile
from envbuilder.report import Reporter
from envbuilder.store import Store

AT_ONCE = 8
"""Files transferred, or hashed, at the same time."""
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


def write_stamps(path: Path, files: Iterable[LockedFile], folder: Path) -> None:
    """Keeps the stamps of `files`, which have just been found or put right in `folder`."""
    stamps = {file.filename: Stamp.of(folder / file.filename, file.sha256) for file in files}
    content = _STAMPS.dump_json(stamps, indent=1)
    if not path.is_file() or path.read_bytes() != content:
        write_atomically(path, content)


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be done for a set of locked files; biggest first."""

    store: tuple[LockedFile, ...]
    """In the store already, with the right bytes."""
    index: tuple[LockedFile, ...]
    """To be transferred."""


def plan_files(
    files: Sequence[LockedFile], folder: Path, store: Store, stamps: Mapping[str, Stamp], reporter: Reporter
) -> Plan:
    """What `folder` lacks of `files`. A file with an unchanged stamp is not read; any other is hashed."""
    meter = _Meter(reporter, "check", sum(file.size for file in files))

    def where(file: LockedFile) -> str:
        path = folder / file.filename
        unchanged = path.is_file() and stamps.get(file.filename) == Stamp.of(path, file.sha256)
        place = "bundle" if unchanged or _is(path, file) else "index"
        if place == "index" and _is(store.path(file.sha256), file):
            place = "store"
        meter.count(file.size)
        return place

    ordered = sorted(files, key=lambda file: (-file.size, file.filename))
    found = list(zip(ordered, _in_parallel(where, ordered, meter.stop), strict=True))
    return Plan(
        store=tuple(file for file, place in found if place == "store"),
        index=tuple(file for file, place in found if place == "index"),
    )


def bring_files(
    plan: Plan,
    folder: Path,
    store: Store,
    *,
    recipe: str,
    indexes: Mapping[str, Index],
    client: httpx.Client,
    reporter: Reporter,
) -> None:
    """Carries out `plan`: afterwards `folder` has the files, each of the size and sha256 in the lock.

    IntegrityError where an index has another file of that name; NetworkError where it can't be reached or
    has none; MismatchError where the disk has no room. The other transfers then stop, and can be resumed.
    `recipe` is the name for the remedies.
    """
    store.check_folder()
    needed = sum(file.size for file in plan.index)
    if needed > shutil.disk_usage(store.folder).free:
        raise no_room(store.folder, needed, "the disk has less left")
    with writing(folder, 0):
        make_folder(folder)
    meter = _Meter(reporter, "fetch", needed)

    def transfer(file: LockedFile) -> None:
        url = _offered(indexes[file.index], file, recipe).url

        def fill(part: Path) -> None:
            download(client, url, sha256=file.sha256, size=file.size, part=part, on_bytes=meter.count)

        store.add(file.sha256, file.size, fill)
        _place(store, file, folder)

    for file in plan.store:
        _place(store, file, folder)
    _in_parallel(transfer, plan.index, meter.stop)


def _offered(index: Index, file: LockedFile, recipe: str) -> IndexFile:
    """What `index` offers under the file's name, if that is the file."""
    offer = next((offer for offer in index.files(file.package) if offer.filename == file.filename), None)
    if offer is None:
        raise NetworkError(
            f"The index {index.name} has no {file.filename} any more.",
            remedy=f"Use an index that has it (docs/recipes.md), or: envbuilder lock recipes/{recipe}.toml",
            context={"index": index.name, "file": file.filename},
        )
    for what, expected, got in (("sha256", file.sha256, offer.sha256), ("size", file.size, offer.size)):
        if got is not None and got != expected:
            raise IntegrityError(
                f"The index {index.name} announces another {file.filename} than the lock names.",
                remedy=f"Find out why; if the new file is wanted: envbuilder lock recipes/{recipe}.toml",
                context={
                    "index": index.name,
                    "file": file.filename,
                    "expected": f"{what} {expected}",
                    "got": f"{what} {got}",
                },
            )
    return offer


def _is(path: Path, file: LockedFile) -> bool:
    """Whether `path` has the bytes that the lock names."""
    return (
        path.is_file()
        and not path.is_symlink()
        and path.stat().st_size == file.size
        and hash_file(path) == file.sha256
    )


def _place(store: Store, file: LockedFile, folder: Path) -> None:
    """Puts a stored file into the bundle: a hard link, or a copy where the file system has none."""
    stored, destination = store.path(file.sha256), folder / file.filename
    # Under a name of its own first: at no moment does another fetch find the file missing.
    link = destination.with_name(f".{token_hex(8)}{NEW_SUFFIX}")
    with writing(destination, file.size):
        try:
            os.link(stored, link)
        except OSError:
            copy_verified(stored, file.sha256, file.size, destination)
            return
        link.replace(destination)
        link.unlink(missing_ok=True)  # where both were the same file, `replace` has done nothing


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


def _in_parallel(
    work: Callable[[LockedFile], _Result], files: Sequence[LockedFile], stop: threading.Event
) -> list[_Result]:
    """`work` on each file, AT_ONCE at a time; the first failure (or Ctrl-C) sets `stop` and is raised."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        futures = [pool.submit(work, file) for file in files]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return [future.result() for future in futures]

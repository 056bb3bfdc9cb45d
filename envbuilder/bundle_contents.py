"""What a bundle has to hold, by its lock and record, and whether it holds that. No link is followed, and
nothing is written."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Literal

from envbuilder.atomic import NEW_SUFFIX
from envbuilder.bundle import RECIPE, RECORD, START, TOOL
from envbuilder.errors import MismatchError
from envbuilder.lock import FILES, GROUPS, MODELS, lock_filename
from envbuilder.model import Bundle
from envbuilder.report import Reporter
from envbuilder.target import target_for

_CHUNK = 1 << 20
_MOST_AT_ONCE = 16
_FILES_PER_CORE = 2
"""Files read at the same time: hashing lets the other threads run, and while one waits for the disk, another
hashes."""


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file that a bundle must hold."""

    path: str
    """Relative to the bundle, with "/"."""
    size: int | None
    """Bytes; None for the tool's own files, of which the record keeps the hash alone."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Problem:
    """One file that is not as it should be."""

    path: str
    """Relative to the bundle."""
    kind: Literal["changed", "truncated", "missing", "strange", "unreadable"]
    detail: str


@dataclass(frozen=True, slots=True)
class Examined:
    """What was found in a bundle."""

    files: int
    """That it has to hold."""
    bytes: int
    """Of those that are there."""
    leftovers: int
    """Hidden new files of a fetch that goes on or was killed: no one uses them, and `fetch` removes them."""
    problems: tuple[Problem, ...]
    """By path."""


def examine(bundle: Bundle, reporter: Reporter, *, sizes_only: bool = False) -> Examined:
    """Reads `bundle` from end to end; where `sizes_only`, nothing of it: names and sizes are compared.

    Each file that is changed, truncated, missing, unreadable, or strange (in the bundle and in no lock, links
    among them) is a problem.
    """
    files = inventory(bundle)
    found = listing(bundle.path)
    leftovers = {path for path, status in found.items() if _is_leftover(path, status)}
    known = {RECORD, *(file.path for file in files)}
    problems = [_strange(path, status) for path, status in found.items() if path not in known | leftovers]
    problems += [Problem(file.path, "missing", "missing") for file in files if file.path not in found]
    there = [file for file in files if file.path in found]
    if sizes_only:
        problems += filter(None, (_at_a_glance(file, found[file.path]) for file in there))
    else:
        problems += _Hashing(bundle.path, found, reporter).problems(there)
    return Examined(
        files=len(files),
        bytes=sum(found[file.path].st_size for file in there),
        leftovers=len(leftovers),
        problems=tuple(sorted(problems, key=lambda problem: problem.path)),
    )


def inventory(bundle: Bundle) -> tuple[BundleFile, ...]:
    """All files of `bundle` by path, but for its record: that vouches for the others.

    MismatchError where the lock doesn't serve the bundle's Python.
    """
    record, lock = bundle.record, bundle.lock
    tool = {record.tool_wheel: record.tool_sha256}
    if record.trainer_wheel is not None and record.trainer_sha256 is not None:
        tool[record.trainer_wheel] = record.trainer_sha256
    selected = lock.select(target_for(lock.target, record.python), GROUPS)
    files = [
        BundleFile(lock_filename(record.recipe), len(lock.text.encode()), record.lock_sha256),
        BundleFile(RECIPE, None, record.recipe_sha256),
        BundleFile(START, None, record.start_sha256),
        *(BundleFile(f"{TOOL}/{name}", None, sha256) for name, sha256 in tool.items()),
        *(BundleFile(f"{FILES}/{file.filename}", file.size, file.sha256) for file in selected),
        *(BundleFile(patch.path, patch.size, patch.sha256) for patch in lock.patches),
        *(
            BundleFile(f"{MODELS}/{model.name}/{file.name}", file.size, file.sha256)
            for model in lock.models
            for file in model.files
        ),
    ]
    return tuple(sorted(files, key=lambda file: file.path))


def listing(bundle: Path) -> dict[str, os.stat_result]:
    """All that lies in the folder `bundle` and is no folder, links as such: path → what it is.

    MismatchError where a folder can't be listed.
    """
    try:
        return dict(_walk(bundle, ""))
    except OSError as error:
        raise MismatchError(
            f"The bundle {bundle} can't be listed: {error.strerror}.",
            remedy=f"Ask whoever fetched it to let you read it: ls -ld {error.filename}",
            context={"folder": error.filename},
        ) from error


def _walk(folder: Path, above: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                yield from _walk(folder / entry.name, f"{above}{entry.name}/")
            else:
                yield f"{above}{entry.name}", entry.stat(follow_symlinks=False)


def open_plain(path: Path) -> FileIO:
    """The file `path`, unbuffered; OSError where it is a link, or can't be opened."""
    file = FileIO(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC))
    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
    return file


def pieces(file: FileIO) -> Iterator[memoryview]:
    """What is left of `file`, piece by piece; one is valid until the next is taken."""
    buffer = memoryview(bytearray(_CHUNK))
    while count := file.readinto(buffer):
        yield buffer[:count]


class _Stopped(Exception):
    """Ends the other threads."""


class _Hashing:
    """Hashes files in parallel, the biggest first, so that none is left for the end alone."""

    def __init__(self, folder: Path, found: Mapping[str, os.stat_result], reporter: Reporter) -> None:
        self._folder = folder
        self._found = found
        self._reporter = reporter
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._done = self._total = 0

    def problems(self, files: Sequence[BundleFile]) -> list[Problem]:
        ordered = sorted(files, key=lambda file: -self._found[file.path].st_size)
        self._total = sum(self._found[file.path].st_size for file in files)
        with ThreadPoolExecutor(min(_FILES_PER_CORE * len(os.sched_getaffinity(0)), _MOST_AT_ONCE)) as pool:
            futures = [pool.submit(self._problem, file) for file in ordered]
            try:
                found = [problem for future in futures if (problem := future.result()) is not None]
            except BaseException:  # Ctrl-C: without this, the threads would read on to the end
                self._stop.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        self._count(self._total - self._done)  # what could not be read
        return found

    def _problem(self, file: BundleFile) -> Problem | None:
        status = self._found[file.path]
        try:
            return _compare(self._folder, file, status, self._count)
        except OSError as error:
            return Problem(file.path, "unreadable", f"can't be read: {error.strerror or error}")

    def _count(self, more: int) -> None:
        if self._stop.is_set():
            raise _Stopped
        with self._lock:
            self._done += more
            if not more:
                return
            self._reporter.progress("verify", self._done, self._total, "bytes")


def _compare(
    folder: Path, file: BundleFile, status: os.stat_result, count: Callable[[int], None]
) -> Problem | None:
    if problem := _at_a_glance(file, status):
        count(status.st_size)
        return problem
    digest = hashlib.sha256()
    with open_plain(folder / file.path) as content:
        for piece in pieces(content):
            digest.update(piece)
            count(len(piece))
    if (got := digest.hexdigest()) != file.sha256:
        return Problem(file.path, "changed", f"changed: expected sha256 {file.sha256}, got {got}")
    return None


def _at_a_glance(file: BundleFile, status: os.stat_result) -> Problem | None:
    """What is wrong with it, as far as it can be told without reading it."""
    if not stat.S_ISREG(status.st_mode):
        return _strange(file.path, status)
    if file.size is None or status.st_size == file.size:
        return None
    kind: Literal["truncated", "changed"] = "truncated" if status.st_size < file.size else "changed"
    return Problem(file.path, kind, f"{kind}: {status.st_size:,} of {file.size:,} bytes")


def _is_leftover(path: str, status: os.stat_result) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(NEW_SUFFIX) and stat.S_ISREG(status.st_mode)


def _strange(path: str, status: os.stat_result) -> Problem:
    if stat.S_ISLNK(status.st_mode):
        what = "a symbolic link"
    else:
        what = "no lock names it" if stat.S_ISREG(status.st_mode) else "neither a file nor a folder"
    return Problem(path, "strange", f"strange: {what}")

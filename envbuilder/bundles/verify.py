"""Reads every byte of a bundle and says all that is not as its lock and record name it. Writes nothing."""

from __future__ import annotations

import hashlib
import os
import stat
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envbuilder.atomic import NEW_SUFFIX
from envbuilder.bundle import RECORD, open_bundle
from envbuilder.bundles.inventory import BundleFile, inventory, listing, open_plain, pieces
from envbuilder.errors import IntegrityError
from envbuilder.paths import Root
from envbuilder.report import Reporter

_MOST_AT_ONCE = 16
_FILES_PER_CORE = 2
"""Files read at the same time: hashing lets the other threads run, and while one waits for the disk, another
hashes."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A bundle in which nothing was wrong."""

    bundle: Path
    files: int
    bytes: int
    """Read and hashed."""
    leftovers: int
    """Hidden new files of a fetch that goes on or was killed: no one uses them, and `fetch` removes them."""
    seconds: float
    """Wall time."""


@dataclass(frozen=True, slots=True)
class _Problem:
    path: str
    kind: Literal["changed", "truncated", "missing", "strange", "unreadable"]
    detail: str


def verify_bundle(root: Root, name: str, reporter: Reporter) -> VerifyReport:
    """Reads the bundle of recipe `name` from end to end, offline.

    IntegrityError after everything was read, naming each file that is changed, truncated, missing,
    unreadable, or strange: in the bundle and in no lock, links among them. MismatchError if there is no
    complete bundle.
    """
    begin = time.monotonic()
    bundle = open_bundle(root, name)
    files = inventory(bundle)
    found = listing(bundle.path)
    reporter.stage(f"verifying {len(files)} files of {name}")

    leftovers = {path for path, status in found.items() if _is_leftover(path, status)}
    known = {RECORD, *(file.path for file in files)}
    strange = [_strange(path, status) for path, status in found.items() if path not in known | leftovers]
    there = [file for file in files if file.path in found]
    problems = [*strange, *_Hashing(bundle.path, found, reporter).problems(there)]
    problems += [_Problem(file.path, "missing", "missing") for file in files if file.path not in found]
    if problems:
        raise _error(bundle.path, name, sorted(problems, key=lambda problem: problem.path))
    return VerifyReport(
        bundle=bundle.path,
        files=len(files),
        bytes=sum(found[file.path].st_size for file in files),
        leftovers=len(leftovers),
        seconds=time.monotonic() - begin,
    )


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

    def problems(self, files: Sequence[BundleFile]) -> list[_Problem]:
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

    def _problem(self, file: BundleFile) -> _Problem | None:
        status = self._found[file.path]
        try:
            return _compare(self._folder, file, status, self._count)
        except OSError as error:
            return _Problem(file.path, "unreadable", f"can't be read: {error.strerror or error}")

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
) -> _Problem | None:
    if not stat.S_ISREG(status.st_mode):
        return _strange(file.path, status)
    if file.size is not None and status.st_size != file.size:
        count(status.st_size)
        kind: Literal["truncated", "changed"] = "truncated" if status.st_size < file.size else "changed"
        return _Problem(file.path, kind, f"{kind}: {status.st_size:,} of {file.size:,} bytes")
    digest = hashlib.sha256()
    with open_plain(folder / file.path) as content:
        for piece in pieces(content):
            digest.update(piece)
            count(len(piece))
    if (got := digest.hexdigest()) != file.sha256:
        return _Problem(file.path, "changed", f"changed: expected sha256 {file.sha256}, got {got}")
    return None


def _is_leftover(path: str, status: os.stat_result) -> bool:
    name = path.rpartition("/")[2]
    return name.startswith(".") and name.endswith(NEW_SUFFIX) and stat.S_ISREG(status.st_mode)


def _strange(path: str, status: os.stat_result) -> _Problem:
    if stat.S_ISLNK(status.st_mode):
        what = "a symbolic link"
    else:
        what = "no lock names it" if stat.S_ISREG(status.st_mode) else "neither a file nor a folder"
    return _Problem(path, "strange", f"strange: {what}")


def _error(folder: Path, name: str, problems: Sequence[_Problem]) -> IntegrityError:
    counts = Counter(problem.kind for problem in problems)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return IntegrityError(
        f"The bundle {folder} is not what its lock names: {listed}.",
        remedy=f"envbuilder fetch recipes/{name}.toml --verify",
        context={problem.path: problem.detail for problem in problems},
    )

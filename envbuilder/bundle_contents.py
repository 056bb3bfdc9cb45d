"""What a bundle has to hold, by its lock and record, and whether it holds that. No link in it is followed,
and nothing is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from envbuilder.atomic import NEW_SUFFIX
from envbuilder.bundle import RECIPE, RECORD, START, TOOL
from envbuilder.errors import MismatchError
from envbuilder.hash_record import HashRecord, Stamp
from envbuilder.hashing import Hasher, OnBytes, hash_in_parallel
from envbuilder.lock import FILES, GROUPS, MODELS, lock_filename
from envbuilder.model import Bundle
from envbuilder.provided_models import models_of_bundle, own_copy
from envbuilder.report import Reporter
from envbuilder.target import target_for


@dataclass(frozen=True)
class BundleFile:
    """One file that a bundle must hold."""

    path: str
    """Relative to the bundle, with "/"; absolute, and without links, where the machine provides it."""
    size: int | None
    """Bytes; None for the tool's own files, of which the record keeps the hash alone."""
    sha256: str


@dataclass(frozen=True)
class Problem:
    """One file that is not as it should be."""

    path: str
    """As in BundleFile."""
    kind: Literal["changed", "truncated", "missing", "strange", "unreadable"]
    detail: str


@dataclass(frozen=True)
class Examined:
    """What was found in a bundle."""

    files: int
    """That it has to hold."""
    bytes: int
    """Of those that are there."""
    recorded: int
    """Files that were not read: an examination that was cut off had found them right."""
    leftovers: int
    """Hidden new files of a fetch that goes on or was killed: no one uses them, and `fetch` removes them."""
    problems: tuple[Problem, ...]
    """By path."""


def examine(
    bundle: Bundle, reporter: Reporter, *, sizes_only: bool = False, record: HashRecord | None = None
) -> Examined:
    """Reads `bundle` from end to end; where `sizes_only`, nothing of it: names and sizes are compared.

    Files that `record` has, found right by an examination that was cut off, are not read again.

    Each file that is changed, truncated, missing, unreadable, or strange (in the bundle and in no lock, links
    among them) is a problem. So is each such file of a model that the machine provides.
    """
    provided = provided_inventory(bundle)
    files = (*inventory(bundle), *provided)
    found = {**listing(bundle.path), **_found(provided)}
    leftovers = {path for path, status in found.items() if _is_leftover(path, status)}
    known = {RECORD, *(file.path for file in files)}
    problems = [_strange(path, status) for path, status in found.items() if path not in known | leftovers]
    problems += [Problem(file.path, "missing", "missing") for file in files if file.path not in found]
    there = [file for file in files if file.path in found]
    recorded = 0
    if sizes_only:
        problems += filter(None, (_at_a_glance(file, found[file.path]) for file in there))
    else:
        record = record or HashRecord()
        unread = [file for file in there if not record.has(bundle.path / file.path, file.sha256)]
        recorded = len(there) - len(unread)
        problems += _Hashing(bundle.path, found, reporter, record).problems(unread)
    return Examined(
        files=len(files),
        bytes=sum(found[file.path].st_size for file in there),
        recorded=recorded,
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
            if model.name not in record.provided_models
            for file in model.files
        ),
    ]
    return tuple(sorted(files, key=lambda file: file.path))


def provided_inventory(bundle: Bundle) -> tuple[BundleFile, ...]:
    """The files of the models that the machine provides to `bundle`, which lie outside it."""
    return tuple(
        BundleFile(str(file.path), file.size, file.sha256)
        for model in models_of_bundle(bundle)
        for file in model.files
    )


def _found(files: Iterable[BundleFile]) -> dict[str, os.stat_result]:
    found = {}
    for file in files:
        with suppress(OSError):  # not there, or not to be seen: it counts as missing
            found[file.path] = os.lstat(file.path)
    return found


def mending(bundle: Bundle, problems: Iterable[Problem]) -> str:
    """The command against `problems` of `bundle`."""
    wrong = {problem.path for problem in problems}
    for provided in models_of_bundle(bundle):
        if any(str(file.path) in wrong for file in provided.files):
            copy = own_copy(bundle.record.recipe, provided.model)
            return f"Ask the owner of {provided.folder} to put the model right; or {copy}"
    return f"envbuilder fetch recipes/{bundle.record.recipe}.toml --verify"


def differing(
    files: Sequence[BundleFile], folder: Path, reporter: Reporter, record: HashRecord | None = None
) -> list[Problem]:
    """What is wrong with `files`, whose paths are relative to `folder`, by their sizes and bytes."""
    found = {file.path: os.lstat(folder / file.path) for file in files}
    return _Hashing(folder, found, reporter, record or HashRecord()).problems(files)


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


class _Hashing:
    """Hashes files in parallel, the biggest first, so that none is left for the end alone."""

    def __init__(
        self, folder: Path, found: Mapping[str, os.stat_result], reporter: Reporter, record: HashRecord
    ) -> None:
        self._folder = folder
        self._found = found
        self._reporter = reporter
        self._record = record
        self._done = self._total = 0

    def problems(self, files: Sequence[BundleFile]) -> list[Problem]:
        ordered = sorted(files, key=lambda file: -self._found[file.path].st_size)
        self._total = sum(self._found[file.path].st_size for file in files)
        problems = hash_in_parallel(ordered, self._problem, self._count)
        self._count(self._total - self._done)  # what could not be read
        return [problem for problem in problems if problem is not None]

    def _problem(self, file: BundleFile, hasher: Hasher, count: OnBytes) -> Problem | None:
        status, path = self._found[file.path], self._folder / file.path
        try:
            problem = _compare(path, file, status, hasher, count)
            if problem is None:
                self._record.add(path, Stamp.of_status(status, file.sha256))
            return problem
        except OSError as error:
            return Problem(file.path, "unreadable", f"can't be read: {error.strerror or error}")

    def _count(self, more: int) -> None:
        self._done += more
        if more:
            self._reporter.progress("verify", self._done, self._total, "bytes")


def _compare(
    path: Path, file: BundleFile, status: os.stat_result, hasher: Hasher, count: OnBytes
) -> Problem | None:
    if problem := _at_a_glance(file, status):
        count(status.st_size)
        return problem
    if (got := hasher.sha256(path, count)) != file.sha256:
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

"""What a bundle has to hold, by its lock and record, and reading what it holds. No link is followed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from envbuilder.bundle import RECIPE, START, TOOL
from envbuilder.errors import MismatchError
from envbuilder.lock import FILES, GROUPS, MODELS, lock_filename
from envbuilder.model import Bundle
from envbuilder.target import target_for

_CHUNK = 1 << 20


@dataclass(frozen=True, slots=True)
class BundleFile:
    """One file that a bundle must hold."""

    path: str
    """Relative to the bundle, with "/"."""
    size: int | None
    """Bytes; None for the tool's own files, of which the record keeps the hash alone."""
    sha256: str


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

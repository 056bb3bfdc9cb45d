"""Removes from ROOT what nothing needs any more: stored files of no bundle, images that newer ones have
superseded, and what was left half done.

Nothing is removed that somebody touched within the hour, for a fetch that is under way may have stored it
and not yet put it into its bundle. That is judged by ctime: a new link, a new name and a new mode all set
it, while a stored file's mtime may be years old. No link is followed to anything that is removed. An image
counts as touched as long as a program on any node uses it.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from envbuilder.atomic import NEW_SUFFIX
from envbuilder.bundle import RECORD
from envbuilder.bundles.unpack import OLD_SUFFIX
from envbuilder.errors import MismatchError
from envbuilder.kept_images import image_marked_by, marker_of, superseded_at
from envbuilder.paths import Root
from envbuilder.report import Reporter

_UNTOUCHED = 3600.0
"""Seconds."""
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class GcReport:
    """What was removed, or would be."""

    removed: tuple[Path, ...]
    """Files, and folders with all that was in them."""
    bytes_freed: int
    """Sizes of the files whose last link that was: a file that a bundle holds too frees nothing."""
    images: tuple[tuple[Path, int], ...]
    """The images among them, with their sizes in bytes."""
    kept: tuple[tuple[Path, str], ...]
    """What nothing needs and could not be removed, and why: another user's files mostly."""
    dry_run: bool


def collect_garbage(root: Root, reporter: Reporter, *, dry_run: bool = False) -> GcReport:
    """Removes garbage below `root`; with `dry_run` only says what it would remove.

    MismatchError, and nothing removed, where what the bundles need can't be read.
    """
    reporter.stage(f"looking for what nothing needs under {root.path}")
    now = time.time()
    garbage = sorted({path for path, touched in _candidates(root) if now - touched > _UNTOUCHED})
    removed: list[Path] = []
    images: list[tuple[Path, int]] = []
    kept: list[tuple[Path, str]] = []
    links: dict[tuple[int, int], int] = {}
    freed = 0
    for path in garbage:
        try:
            files = _files(path)
            # Once more: since it was found, a fetch may have made a link to it.
            if not dry_run and not _remove(path, now):
                continue
        except FileNotFoundError:
            continue  # another process was faster
        except OSError as error:
            kept.append((path, f"{error.strerror}, owner {_owner(path)}"))
            continue
        removed.append(path)
        if path.parent == root.images and superseded_at(path) is not None:
            images.append((path, files[0].st_size))
        for file in files:
            inode = (file.st_dev, file.st_ino)
            links[inode] = links.get(inode, file.st_nlink) - 1
            freed += file.st_size if links[inode] == 0 else 0
    if kept:
        reporter.warn(f"{len(kept)} files or folders that nothing needs could not be removed.")
    return GcReport(tuple(removed), freed, tuple(images), tuple(kept), dry_run)


def _candidates(root: Root) -> Iterator[tuple[Path, float]]:
    """What nothing needs, with the time (seconds since 1970) when somebody last touched it."""
    needed = _needed(root)
    for entry in _entries(root.store):
        if _SHA256.fullmatch(entry.name) and entry.name not in needed and _is_file(entry):
            yield Path(entry.path), _touched(entry)
    for entry in _entries(root.store / "partial"):
        yield Path(entry.path), _touched(entry)
    for entry in _entries(root.images):
        last_used = _superseded(Path(entry.path))
        if last_used is not None:
            yield Path(entry.path), max(_touched(entry), last_used)
    for folder in (root.store, root.wheelhouse, root.cache, root.logs, root.images, root.path / "bundles"):
        yield from _leftovers(folder)
    for entry in _entries(root.cache / "fetch"):
        name = entry.name.removesuffix(".json")
        if name != entry.name and _is_file(entry) and not os.path.lexists(root.bundle(name)):
            yield Path(entry.path), _touched(entry)


def _superseded(path: Path) -> float | None:
    """When somebody may last have begun to use the superseded image `path`, or that which `path` marks.

    None for anything else. A command that starts takes the image that counts, and marks it a moment later.
    """
    image = image_marked_by(path) or path
    superseded = superseded_at(image)
    if superseded is None:
        return None
    with suppress(OSError):  # it was never used
        superseded = max(superseded, marker_of(image).lstat().st_ctime)
    return superseded


def _leftovers(folder: Path) -> Iterator[tuple[Path, float]]:
    """Hidden files, and folders of an unpacking, on the way to their names or out of the way."""
    for entry in _entries(folder):
        if _is_hidden(entry.name):
            yield Path(entry.path), _touched(entry)
        elif entry.is_dir(follow_symlinks=False):
            yield from _leftovers(Path(entry.path))


def _needed(root: Root) -> frozenset[str]:
    """Every sha256 that the lock or record of a bundle names, complete or not, of whatever schema it is.

    And what lies in a bundle without a lock yet: a fetch that broke off goes on from there.
    """
    try:
        bundles = [entry for entry in (root.path / "bundles").iterdir() if entry.is_dir()]
    except FileNotFoundError:
        bundles = []
    needed: set[str] = set()
    held: set[int] = set()
    try:
        for bundle in bundles:
            if bundle.name.startswith("."):
                continue  # an unpacking's, which takes nothing from the store
            for lock in [*bundle.glob("pylock.*.toml"), bundle / RECORD]:
                if lock.exists():
                    needed.update(_SHA256.findall(lock.read_text(encoding="utf-8", errors="replace")))
            for folder, _, files in os.walk(bundle, onerror=_raise):
                held.update((Path(folder) / file).lstat().st_ino for file in files if not _is_hidden(file))
        stored = [(entry.name, entry.stat(follow_symlinks=False).st_ino) for entry in _entries(root.store)]
    except OSError as error:
        raise MismatchError(
            f"{error.filename} can't be read, so nothing is removed: {error.strerror}.",
            remedy="Run the same command again; if that is the same, ask its owner to let you read it.",
            context={"file": error.filename},
        ) from error
    return frozenset(needed | {name for name, inode in stored if inode in held})


def _is_hidden(name: str) -> bool:
    """Whether it is on the way to its name, or out of the way."""
    return name.startswith(".") and name.endswith((NEW_SUFFIX, OLD_SUFFIX))


def _raise(error: OSError) -> None:
    raise error


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What lies in `folder`; nothing where it is a link or missing: then it is not ROOT's."""
    try:
        if not stat.S_ISDIR(folder.lstat().st_mode):
            return []
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, PermissionError):
        return []


def _is_file(entry: os.DirEntry[str]) -> bool:
    return entry.is_file(follow_symlinks=False)


def _touched(entry: os.DirEntry[str]) -> float:
    """Of a folder: when the last of all that is in it was."""
    try:
        newest = entry.stat(follow_symlinks=False).st_ctime
    except FileNotFoundError:
        return time.time()
    if entry.is_dir(follow_symlinks=False):
        newest = max([newest, *(_touched(inner) for inner in _entries(Path(entry.path)))])
    return newest


def _files(path: Path) -> list[os.stat_result]:
    """Of the file `path`, or of all that are in the folder."""
    found = path.lstat()
    if stat.S_ISDIR(found.st_mode):
        return [status for entry in _entries(path) for status in _files(Path(entry.path))]
    return [found]


def _remove(path: Path, now: float) -> bool:
    """Whether `path` was removed: not if somebody has touched it since it was chosen."""
    found = path.lstat()
    if now - found.st_ctime <= _UNTOUCHED:
        return False
    if stat.S_ISDIR(found.st_mode):
        shutil.rmtree(path)
    else:
        path.unlink()
    return True


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except (OSError, KeyError):
        return "unknown"

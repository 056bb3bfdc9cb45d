"""Publishes an env: its bundle, its built wheels, its kernels, and the image that it is kept as, for the
group to use.

The version is made in a hidden folder beside its place, with the manifest as its last file, then renamed,
then named in `current.json`: whoever looks meanwhile sees the version before. Files of ROOT that already are
what is published are linked, so that a model of many gigabytes is not stored twice; all others are copied.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from envbuilder.accounts import account_name
from envbuilder.atomic import (
    FOLDER_MODE,
    NEW_SUFFIX,
    fsync_folder,
    make_folder,
    new_file,
    no_room,
    write_atomically,
    writing,
)
from envbuilder.bundle import RECORD, hash_file, hash_open, open_bundle
from envbuilder.bundle_contents import inventory
from envbuilder.env_image import EnvImage, env_receipt
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.kept_images import marker_of
from envbuilder.model import BuiltWheel, Bundle, CurrentVersion, EnvReceipt, Publication, PublishedFile
from envbuilder.paths import Root
from envbuilder.report import Reporter
from envbuilder.sharing.shared_folder import (
    CURRENT,
    MANIFEST,
    VERSION,
    SharedFolder,
    not_in_the_group,
    readable_for,
)
from envbuilder.store import STORED_MODE
from envbuilder.wheelhouse import PROVENANCE, RECEIPT, all_built

_UNTOUCHED = 3600.0
"""Seconds without a new file in it after which a folder's publisher has surely ended."""


@dataclass(frozen=True)
class PublishReport:
    """What was published."""

    folder: Path
    """Of the version."""
    publication: Publication
    copied_bytes: int
    """What it takes on the disk beside ROOT: the rest are links to ROOT's files."""
    removed: tuple[Path, ...]
    """Older versions."""
    seconds: float
    """Wall time."""


@dataclass(frozen=True)
class _Source:
    """A file of ROOT that is published under the same path."""

    path: Path
    """Relative to ROOT."""
    sha256: str | None
    """As lock, record or receipt name it; None for files that nothing names yet."""
    remedy: str | None = None
    """Against other bytes; None where doctor says it."""


def publish(
    root: Root,
    recipe_name: str,
    shared: SharedFolder,
    reporter: Reporter,
    *,
    name: str | None = None,
    prune: bool = False,
) -> PublishReport:
    """Publishes the env of the recipe as `name` (default: the recipe's), in the place of what was there.

    Users of older versions keep them, unless `prune`: then those go that nobody wrote to within the hour, and
    no program has used the image of.
    Each file is hashed on its way. Raises MismatchError (no env, or not of the bundle; not in the group; no
    room) and IntegrityError (a file of ROOT is not what the lock names): then nothing has changed.
    """
    began = time.monotonic()
    if shared.gid not in (os.getegid(), *os.getgroups()) and os.geteuid() != 0:
        raise not_in_the_group(shared.gid, shared.path)
    bundle, (receipt, image) = open_bundle(root, recipe_name), env_receipt(root, recipe_name)
    if receipt.lock_sha256 != bundle.lock.digest:
        raise MismatchError(
            f"The env {recipe_name} was installed from another lock than its bundle's.",
            remedy=f"envbuilder install recipes/{recipe_name}.toml{' --image' if image else ''}",
            context={"bundle": bundle.lock.digest, "env": receipt.lock_sha256},
        )
    sources = [*_of_bundle(bundle, root), *_of_wheelhouse(root, receipt), *_of_kernels(root, recipe_name)]
    if image is not None:
        sources += _of_image(image, root)
    place = shared.place(name or recipe_name)
    with writing(place, 0):
        _make_place(place, shared)
    reporter.stage(f"publishing {len(sources)} files as {place}")
    _remove(_leftovers(place))
    with writing(place, 0):
        staging = Path(tempfile.mkdtemp(prefix=".", suffix=NEW_SUFFIX, dir=place))
    try:
        with readable_for(None):
            copying = _Copying(root, recipe_name, staging, shared.gid, reporter)
            files = copying.run(sources)
        publication = _publication(place.name, bundle, receipt, files)
        content = (publication.model_dump_json(indent=1) + "\n").encode()
        digest = hashlib.sha256(content).hexdigest()
        with new_file(staging / MANIFEST, size=len(content), mode=STORED_MODE) as manifest:
            manifest.write(content)
        folder = place / digest[:16]
        staging.rename(folder)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    fsync_folder(place)
    current = CurrentVersion(manifest_sha256=digest)
    write_atomically(place / CURRENT, current.model_dump_json(indent=1) + "\n")
    removed = _remove(_older_versions(place, folder)) if prune else ()
    for version in removed:
        with suppress(OSError):
            marker_of(version).unlink()
    return PublishReport(folder, publication, copying.copied, removed, time.monotonic() - began)


def _of_bundle(bundle: Bundle, root: Root) -> Iterator[_Source]:
    folder = bundle.path.relative_to(root.path)
    for file in inventory(bundle):
        yield _Source(folder / file.path, file.sha256)
    yield _Source(folder / RECORD, None)


def _of_wheelhouse(root: Root, receipt: EnvReceipt) -> Iterator[_Source]:
    """The built wheels of the env, their receipts after them."""
    built = {wheel.receipt.wheel_sha256: wheel for wheel in all_built(root)}
    for package in receipt.packages:
        if package.origin != "wheelhouse":
            continue
        if package.sha256 not in built:
            raise MismatchError(
                f"The wheelhouse has no longer the wheel of {package.name} that the env was made of.",
                remedy=f"envbuilder install recipes/{receipt.recipe}.toml --reinstall",
                context={"wheel": package.wheel, "sha256": package.sha256},
            )
        yield from _of_build(root, built[package.sha256])


def _of_build(root: Root, built: BuiltWheel) -> Iterator[_Source]:
    folder = built.path.parent.relative_to(root.path)
    yield _Source(folder / built.path.name, built.receipt.wheel_sha256)
    for name in (PROVENANCE, RECEIPT):
        if (built.path.parent / name).is_file():
            yield _Source(folder / name, None)


def _of_image(image: EnvImage, root: Root) -> Iterator[_Source]:
    folder = root.images.relative_to(root.path)
    yield _Source(folder / image.path.name, image.receipt.sha256, image.remedy)
    yield _Source(folder / image.record.name, None)


def _of_kernels(root: Root, recipe_name: str) -> Iterator[_Source]:
    for folder, _, names in os.walk(root.kernels(recipe_name)):
        for name in sorted(names):
            path = Path(folder, name)
            # What is hidden is on its way to its name.
            if not name.startswith(".") and not path.is_symlink():
                yield _Source(path.relative_to(root.path), None)


def _publication(
    name: str, bundle: Bundle, receipt: EnvReceipt, files: tuple[PublishedFile, ...]
) -> Publication:
    found = {code for extension in receipt.extensions for code in extension.architectures}
    return Publication(
        name=name,
        recipe=bundle.record.recipe,
        python=receipt.python,
        lock_sha256=bundle.lock.digest,
        compute_capabilities=receipt.compute_capabilities,
        architectures=tuple(sorted(found)),
        publisher=account_name(os.getuid()),
        # So exactly that no two versions have the same manifest, and so the same folder.
        published_at=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
        files=files,
    )


class _Copying:
    """Brings files of ROOT into the folder `staging`, which is this process's own, for the group `gid`."""

    def __init__(self, root: Root, recipe_name: str, staging: Path, gid: int, reporter: Reporter) -> None:
        self.copied = 0
        """Bytes."""
        self._root, self._recipe_name, self._staging = root.path, recipe_name, staging
        self._gid, self._reporter = gid, reporter
        self._done = self._total = 0

    def run(self, sources: list[_Source]) -> tuple[PublishedFile, ...]:
        sizes = [self._size(source) for source in sources]
        self._total = sum(sizes)
        self._check_room(sources)
        _share(self._staging, self._gid)
        return tuple(self._bring(source, size) for source, size in zip(sources, sizes))

    def _size(self, source: _Source) -> int:
        try:
            return (self._root / source.path).stat().st_size
        except FileNotFoundError as error:
            raise self._changed(source, "it is missing") from error

    def _check_room(self, sources: list[_Source]) -> None:
        needed = sum(self._size(source) for source in sources if not self._can_be_linked(source))
        if needed > shutil.disk_usage(self._staging).free:
            raise no_room(self._staging.parent, needed, "the disk has less left")

    def _bring(self, source: _Source, size: int) -> PublishedFile:
        path, target = self._root / source.path, self._staging / source.path
        self._make_folders(target.parent)
        if self._can_be_linked(source) and _linked(path, target):
            got = hash_file(target)
            self._count(size)
        else:
            with path.open("rb") as file, new_file(target, size=size, mode=STORED_MODE) as copy:
                got = hash_open(file, also=lambda chunk: self._count(copy.write(chunk)))
            self.copied += size
        if source.sha256 not in (None, got):
            raise self._changed(source, f"expected sha256 {source.sha256}, got {got}")
        if target.stat().st_size != size:
            raise self._changed(source, "it was changed meanwhile")
        return PublishedFile(path=source.path.as_posix(), size=size, sha256=got)

    def _can_be_linked(self, source: _Source) -> bool:
        """Whether the file is by itself what is published: nothing of it may change, for it is ROOT's too."""
        status = (self._root / source.path).lstat()
        return (
            stat.S_IMODE(status.st_mode) == STORED_MODE
            and (status.st_uid, status.st_gid) == (os.getuid(), self._gid)
            and status.st_dev == self._staging.stat().st_dev
            and stat.S_ISREG(status.st_mode)
        )

    def _make_folders(self, folder: Path) -> None:
        if folder.is_dir():
            return
        self._make_folders(folder.parent)
        folder.mkdir()
        _share(folder, self._gid)

    def _count(self, more: int) -> int:
        self._done += more
        self._reporter.progress("publish", self._done, self._total, "bytes")
        return more

    def _changed(self, source: _Source, why: str) -> IntegrityError:
        return IntegrityError(
            f"{self._root / source.path} is not what the lock names: {why}.",
            remedy=source.remedy
            or f"envbuilder doctor recipes/{self._recipe_name}.toml --only bundle --only wheelhouse",
            context={"file": self._root / source.path},
        )


def _linked(path: Path, target: Path) -> bool:
    try:
        os.link(path, target)
    except OSError:  # not on every file system
        return False
    return True


def _make_place(place: Path, shared: SharedFolder) -> None:
    """The folder of a name's versions: for the group to publish in, where it may in the shared folder."""
    made = not place.is_dir()
    make_folder(place)
    if made:
        _share(place, shared.gid, shared.path.stat().st_mode & stat.S_IWGRP)
    shared.check(place)


def _share(folder: Path, gid: int, more: int = 0) -> None:
    """Gives the new `folder` to the group, for reading, whatever the umask; `more` is added to its mode."""
    if folder.stat().st_gid != gid:
        os.chown(folder, -1, gid)
    folder.chmod(FOLDER_MODE | more)


def _older_versions(place: Path, current: Path) -> list[Path]:
    versions = [path for path in place.iterdir() if VERSION.fullmatch(path.name) and path != current]
    return [path for path in versions if _is_abandoned(path) and not _is_in_use(path)]


def _leftovers(place: Path) -> list[Path]:
    """What killed publishers left."""
    hidden = [path for path in place.glob(f".*{NEW_SUFFIX}") if path.is_dir() and not path.is_symlink()]
    return [path for path in hidden if _is_abandoned(path)]


def _is_in_use(version: Path) -> bool:
    """Whether a program has used the version's image within the hour."""
    try:
        return marker_of(version).stat().st_mtime > time.time() - _UNTOUCHED
    except FileNotFoundError:
        return False


def _is_abandoned(folder: Path) -> bool:
    """Whether nothing came into the folder within the hour: another publisher may be about to name it."""
    newest = 0.0
    with suppress(FileNotFoundError, PermissionError):
        newest = max(Path(path).stat().st_mtime for path, _, _ in os.walk(folder))
    return 0 < newest < time.time() - _UNTOUCHED


def _remove(folders: list[Path]) -> tuple[Path, ...]:
    """Removes them; those of other users, who alone may, stay."""
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    return tuple(folder for folder in folders if not folder.exists())

"""Packs a bundle into one file: a plain tar whose bytes depend on the bundle alone, whoever packs it.

Its content is compressed already. The format, and why it is safe to unpack, is in `unpack.py`, which is the
archive's first member.
"""

from __future__ import annotations

import glob
import hashlib
import shutil
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from pydantic import ValidationError

from envbuilder.atomic import NEW_SUFFIX, make_folder, new_file, no_room, writing
from envbuilder.bundle import RECORD
from envbuilder.bundle_contents import inventory
from envbuilder.bundles.unpack import END, MANIFEST, SCRIPT, Entry, Manifest, archive_size, header, padding
from envbuilder.errors import IntegrityError
from envbuilder.hashing import Hasher, hashing, open_plain
from envbuilder.model import Bundle, BundleRecord
from envbuilder.report import Reporter

_ABANDONED = 3600.0
"""Seconds without a write after which another pack has surely ended."""


@dataclass(frozen=True)
class PackReport:
    """What a pack made."""

    archive: Path
    files: int
    """Files of the bundle in it."""
    bytes: int
    """Size of the archive."""
    manifest_sha256: str
    """Names every byte of the archive: `unpack` takes it to tell a tampered one."""
    seconds: float
    """Wall time."""


def pack_bundle(bundle: Bundle, destination: Path, reporter: Reporter) -> PackReport:
    """Packs `bundle` into the file `destination`, or into NAME.tar if that is a folder.

    Each file is hashed while it is copied, so what is packed is what the lock names; memory is flat.
    IntegrityError where a file isn't it, MismatchError where the disk has no room: nothing is left then.
    """
    begin = time.monotonic()
    name = bundle.record.recipe
    archive = destination / f"{name}.tar" if destination.is_dir() else destination
    script = Path(__file__).with_name(SCRIPT).read_bytes()
    manifest = Manifest(name, hashlib.sha256(script).hexdigest(), _entries(bundle))
    content = manifest.to_json()
    size = archive_size(manifest, len(script), len(content))

    reporter.stage(f"packing {len(manifest.files)} files of {name}")
    with writing(archive, size):
        make_folder(archive.parent)
        _remove_abandoned(archive)
        if size > shutil.disk_usage(archive.parent).free:
            raise no_room(archive, size, "the disk has less left")
    with new_file(archive, size=size) as tar, hashing() as hasher:
        done = 0

        def copied(more: int) -> None:
            nonlocal done
            done += more
            reporter.progress("pack", done, size, "bytes")

        for member, data in ((SCRIPT, script), (MANIFEST, content)):
            tar.write(header(member, len(data)) + data + padding(len(data)))
        for entry in manifest.files:
            tar.write(header(f"{name}/{entry.path}", entry.size))
            _copy(bundle, entry, tar, hasher, copied)
            tar.write(padding(entry.size))
        tar.write(END)
        reporter.progress("pack", size, size, "bytes")
    return PackReport(
        archive=archive,
        files=len(manifest.files),
        bytes=size,
        manifest_sha256=hashlib.sha256(content).hexdigest(),
        seconds=time.monotonic() - begin,
    )


def _entries(bundle: Bundle) -> tuple[Entry, ...]:
    """The record last: what is unpacked by other means and breaks off is an incomplete bundle."""
    files = inventory(bundle)
    entries = [
        Entry(file.path, _size(bundle, file.path) if file.size is None else file.size, file.sha256)
        for file in files
    ]
    try:
        record = (bundle.path / RECORD).read_bytes()
        same = BundleRecord.model_validate_json(record) == bundle.record
    except (OSError, ValidationError):
        same = False
    if not same:
        raise _changed(bundle, RECORD, "it was changed meanwhile")
    return (*entries, Entry(RECORD, len(record), hashlib.sha256(record).hexdigest()))


def _size(bundle: Bundle, path: str) -> int:
    try:
        found = (bundle.path / path).lstat()
    except OSError as error:
        raise _changed(bundle, path, str(error.strerror)) from error
    if not stat.S_ISREG(found.st_mode):
        raise _changed(bundle, path, "it is no plain file")
    return found.st_size


def _copy(bundle: Bundle, entry: Entry, tar: BinaryIO, hasher: Hasher, copied: Callable[[int], None]) -> None:
    path = bundle.path / entry.path
    try:
        open_plain(path).close()
    except OSError as error:
        raise _changed(bundle, entry.path, str(error.strerror)) from error
    got, size = hasher.copy(path, entry.size, tar, copied)
    if size != entry.size:
        raise _changed(bundle, entry.path, f"it has not {entry.size:,} bytes")
    if got != entry.sha256:
        raise _changed(bundle, entry.path, f"expected sha256 {entry.sha256}, got {got}")


def _remove_abandoned(archive: Path) -> None:
    """What a killed pack of this archive left behind, which may be large."""
    for path in archive.parent.glob(f".{glob.escape(archive.name)}.*{NEW_SUFFIX}"):
        with suppress(OSError):
            if path.lstat().st_ctime < time.time() - _ABANDONED:
                path.unlink()


def _changed(bundle: Bundle, path: str, why: str) -> IntegrityError:
    return IntegrityError(
        f"{bundle.path / path} is not what the lock names: {why}.",
        remedy=f"envbuilder fetch recipes/{bundle.record.recipe}.toml --verify",
        context={"file": bundle.path / path},
    )

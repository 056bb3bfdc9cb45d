"""A bundle on disk: opening one, and using its files so that what is used is what was verified."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from envbuilder.atomic import new_file, refuse_world_writable
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.lock import FILES, LockedFile, lock_filename, parse_lock
from envbuilder.model import Bundle, BundleRecord, read_record
from envbuilder.paths import Root

RECORD = "bundle.json"
TOOL = "tool"
"""The folder of a bundle that holds envbuilder's own wheel and the trainer's."""
RECIPE = "recipe.toml"
START = "start.py"
_CHUNK = 1 << 20


def open_bundle(root: Root, name: str) -> Bundle:
    """The bundle of recipe `name`; MismatchError if it is missing, incomplete, or anybody's to change.

    The lock's text is checked here, the files when they are used (`copy_verified`).
    """
    folder = root.bundle(name)
    remedy = f"envbuilder fetch recipes/{name}.toml"
    if not (folder / RECORD).exists():
        state = "is incomplete" if folder.exists() else "does not exist"
        raise MismatchError(f"The bundle {folder} {state}.", remedy=remedy, context={"bundle": folder})
    check_folders(folder)
    record = read_record(folder / RECORD, BundleRecord, remedy=remedy)
    lock_file = folder / lock_filename(name)
    text = lock_file.read_bytes() if lock_file.exists() else b""
    if hashlib.sha256(text).hexdigest() != record.lock_sha256:
        raise _changed(lock_file, record.lock_sha256, hashlib.sha256(text).hexdigest(), remedy)
    return Bundle(path=folder, record=record, lock=parse_lock(name, text.decode()))


def check_folders(folder: Path) -> None:
    """MismatchError if everybody on the machine may write into the bundle in `folder`: its lock and record,
    which vouch for all else, would be anybody's."""
    inside = (path for path in folder.rglob("*") if path.is_dir())
    for part in (folder.parent, folder, *inside):
        if part.is_dir():
            refuse_world_writable(part)


def bundle_file(bundle: Bundle, file: LockedFile) -> Path:
    """Where `file` lies in `bundle`; MismatchError if it isn't there. Its bytes are not read."""
    return path_in(bundle.path, f"{FILES}/{file.filename}", recipe=bundle.record.recipe)


def path_in(folder: Path, name: str, *, recipe: str) -> Path:
    """Where the file `name` of the bundle in `folder` lies; MismatchError if it isn't there."""
    path = folder / name
    if not path.is_file():
        raise MismatchError(
            f"The bundle {folder} lacks {name}.",
            remedy=f"envbuilder fetch recipes/{recipe}.toml",
            context={"file": path},
        )
    return path


def copy_verified(
    source: Path, sha256: str, size: int, destination: Path, *, remedy: str | None = None
) -> None:
    """Copies `source` to `destination`, hashing on the way: what arrives is what was verified.

    `size` in bytes. IntegrityError if `source` has other bytes, and nothing is left at `destination`.
    `remedy` is for files that are not a bundle's; the default fetches the bundle again.
    """
    with new_file(destination, size=size, durable=False) as copy, source.open("rb") as file:
        found = hash_open(file, also=copy.write)
        if found != sha256:
            # ROOT/bundles/NAME/files/FILE
            fetch = f"envbuilder fetch recipes/{source.absolute().parents[1].name}.toml --verify"
            raise _changed(source, sha256, found, remedy or fetch)


def hash_file(path: Path) -> str:
    """The sha256 of the bytes of `path`, in hexadecimal."""
    with path.open("rb") as file:
        return hash_open(file)


def hash_open(file: BinaryIO, *, algorithm: str = "sha256", also: Callable[[bytes], int] = len) -> str:
    """The digest of the rest of `file`, in hexadecimal; each chunk of it is given to `also`."""
    digest = hashlib.new(algorithm)
    while chunk := file.read(_CHUNK):
        digest.update(chunk)
        also(chunk)
    return digest.hexdigest()


def _changed(path: Path, expected: str, got: str, remedy: str) -> IntegrityError:
    return IntegrityError(
        f"{path} is not what the lock names: its sha256 differs.",
        remedy=remedy,
        context={"file": path, "expected": expected, "got": got},
    )

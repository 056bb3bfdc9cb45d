"""The images that ROOT keeps: which of them count, and when each was last in use.

Beside an image that was used lies an empty file, whose time says when that was: each program that uses the
image sets it every few minutes. So a login node knows of the programs on all nodes without locks, which many
shared disks don't have, and a killed program leaves nothing behind.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from envbuilder.atomic import new_file
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.model import ImageReceipt, read_record
from envbuilder.paths import Root

_NAME = re.compile(r"(.+)-([0-9a-f]{12})\.squashfs")
_MARKER = ".used"
_MARKER_MODE = 0o660
"""Who uses an image of another member's ROOT sets its time too, where the group may write there."""
_EVERY_S = 600.0


@dataclass(frozen=True)
class KeptImage:
    """One image of ROOT; its bytes are not read."""

    path: Path
    recipe: str
    digest: str
    """The first 12 digits of its sha256."""
    size: int
    """Bytes."""
    made_at: str
    """ISO 8601, UTC."""
    superseded: bool
    """Whether a newer one has taken its place; it is kept for who may be using it still."""


def image_name(recipe: str, sha256: str) -> str:
    """The file name of the recipe's image that has this sha256."""
    return f"{recipe}-{sha256[:12]}.squashfs"


def marker_of(kept: Path) -> Path:
    """The file whose time says when `kept`, an image or a published version with one, was last in use."""
    return kept.with_suffix(_MARKER)


def image_marked_by(marker: Path) -> Path | None:
    """The image that `marker` tells of; None where it is no such file."""
    return marker.with_suffix(".squashfs") if marker.suffix == _MARKER else None


def kept_images(root: Root) -> tuple[KeptImage, ...]:
    """All images of `root`, by recipe."""
    found = []
    for path in sorted(root.images.glob("*.squashfs")):
        named = _NAME.fullmatch(path.name)
        if named is None:
            continue
        with suppress(FileNotFoundError):  # gone meanwhile, or no longer published
            status = path.stat()
            made = datetime.fromtimestamp(status.st_mtime, timezone.utc).isoformat(timespec="seconds")
            superseded = superseded_at(path) is not None
            found.append(KeptImage(path, named[1], named[2], status.st_size, made, superseded))
    return tuple(found)


def superseded_at(image: Path) -> float | None:
    """When a newer image took the place of the file `image` (seconds since 1970).

    None for the one that counts, and where no receipt can be read that names another.
    """
    named = _NAME.fullmatch(image.name)
    if named is None:
        return None
    record = image.with_name(f"{named[1]}.json")
    try:
        changed = record.stat().st_ctime
        receipt = read_record(record, ImageReceipt, remedy="")
    except (OSError, IntegrityError):
        return None
    return None if receipt.file == image.name else changed


@contextmanager
def marked_as_used(image: Path) -> Iterator[None]:
    """Says that `image` is in use as long as the block runs, whoever else says so too.

    Of a link that `use` has made, the published version that it leads into is in use as well.
    """
    markers = [marker_of(image)]
    if image.is_symlink():
        markers.append(marker_of(published_version(image)))
    ended = threading.Event()

    def keep_marking() -> None:
        while not ended.wait(_EVERY_S):
            _mark(markers)

    _mark(markers)
    thread = threading.Thread(target=keep_marking, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def published_version(link: Path) -> Path:
    """The folder SHARED/NAME/VERSION of the image in it that `link` leads to."""
    return link.readlink().parents[1]


def _mark(markers: list[Path]) -> None:
    for marker in markers:
        with suppress(OSError, MismatchError):  # another's folder, which this user may only read
            try:
                os.utime(marker)
            except FileNotFoundError:
                with new_file(marker, size=0, mode=_MARKER_MODE, durable=False):
                    pass

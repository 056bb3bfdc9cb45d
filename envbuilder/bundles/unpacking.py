"""`unpack.py` for the tool itself: the same code, with progress and the tool's errors."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from envbuilder.bundles.unpack import Refusal, unpack
from envbuilder.errors import EnvbuilderError, InputError, IntegrityError, MismatchError
from envbuilder.paths import Root
from envbuilder.report import Reporter

_ERRORS: dict[int, type[EnvbuilderError]] = {
    error.exit_code: error for error in (InputError, IntegrityError, MismatchError)
}


@dataclass(frozen=True)
class UnpackReport:
    """What an unpacking did."""

    bundle: Path
    files: int
    bytes: int
    """Their size."""
    manifest_sha256: str
    seconds: float
    """Wall time."""


def unpack_bundle(
    root: Root, archive: Path, reporter: Reporter, *, manifest_sha256: str | None = None
) -> UnpackReport:
    """Unpacks `archive` into ROOT/bundles; a bundle of that name which is there is replaced.

    IntegrityError where a byte is not what the archive's manifest names, or the manifest has not the hash
    `manifest_sha256`; MismatchError without room; InputError where the archive can't be read. Nothing is
    unpacked then.
    """
    begin = time.monotonic()
    reporter.stage(f"unpacking {archive.name}")
    try:
        done = unpack(
            archive,
            root.path,
            manifest_sha256,
            on_bytes=lambda bytes_done, total: reporter.progress("unpack", bytes_done, total, "bytes"),
        )
    except Refusal as refusal:
        raise _ERRORS[refusal.exit_code](
            refusal.message, remedy=refusal.remedy, context={"file": archive}
        ) from refusal
    return UnpackReport(
        bundle=done.bundle,
        files=done.files,
        bytes=done.bytes,
        manifest_sha256=done.manifest_sha256,
        seconds=time.monotonic() - begin,
    )

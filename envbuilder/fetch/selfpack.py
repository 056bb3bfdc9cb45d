"""Wheels of envbuilder and of its trainer, made from what is running, so that a bundle brings the tool along.

Works for an editable install as for an installed wheel; the same sources give the same bytes. Format: the
binary distribution format of the PyPA specifications (PEP 427).
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import distribution
from importlib.util import find_spec
from pathlib import Path

from envbuilder import __version__
from envbuilder.requirements import trainer_requires

_TAG = "py3-none-any"
_TRAINER_PYTHON = ">=3.11"
"""It runs in the env, whose Python is newer than the tool's may be."""


@dataclass(frozen=True)
class PackedWheel:
    """A wheel in memory."""

    filename: str
    content: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


def pack_tool() -> PackedWheel:
    """envbuilder's own wheel: its two packages, with the metadata that it was installed with."""
    installed = distribution("envbuilder")
    info = {
        "METADATA": (installed.read_text("METADATA") or "").encode(),
        "entry_points.txt": (installed.read_text("entry_points.txt") or "").encode(),
    }
    # The trainer too: an envbuilder that was set up from a bundle can then fetch bundles itself.
    return _wheel("envbuilder", {**dict(_sources("envbuilder")), **dict(_sources("trainer"))}, info)


def pack_trainer() -> PackedWheel:
    """The trainer's wheel, `envbuilder-trainer`, which `install` puts into an env."""
    lines = [
        "Metadata-Version: 2.4",
        "Name: envbuilder-trainer",
        f"Version: {__version__}",
        "Summary: The trainer that envbuilder installs into the environments it makes.",
        f"Requires-Python: {_TRAINER_PYTHON}",
        "License-Expression: Apache-2.0",
        *(f"Requires-Dist: {requirement}" for requirement in trainer_requires()),
    ]
    return _wheel(
        "envbuilder_trainer", dict(_sources("trainer")), {"METADATA": "\n".join([*lines, ""]).encode()}
    )


def _sources(package: str) -> Iterator[tuple[str, bytes]]:
    """The files of an importable package by their path in a wheel; the package is not imported."""
    spec = find_spec(package)
    assert spec is not None, f"{package} comes in the same distribution"
    assert spec.origin is not None, f"{package} has an __init__.py"
    folder = Path(spec.origin).parent
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder.parent)
        if path.is_file() and "__pycache__" not in inside.parts:
            yield inside.as_posix(), path.read_bytes()


def _wheel(name: str, members: Mapping[str, bytes], info: Mapping[str, bytes]) -> PackedWheel:
    folder = f"{name}-{__version__}.dist-info"
    about = {
        **info,
        "WHEEL": (
            f"Wheel-Version: 1.0\nGenerator: envbuilder {__version__}\nRoot-Is-Purelib: true\nTag: {_TAG}\n"
        ).encode(),
    }
    # dist-info last, as PEP 427 recommends.
    entries = [*sorted(members.items()), *((f"{folder}/{key}", about[key]) for key in sorted(about))]
    record = "".join(f"{path},sha256={_record_hash(data)},{len(data)}\n" for path, data in entries)
    entries.append((f"{folder}/RECORD", f"{record}{folder}/RECORD,,\n".encode()))
    buffer = io.BytesIO()
    # Stored, not deflated: zlib's output differs from one build of zlib to the next.
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for path, data in entries:
            entry = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, so that the mode below counts
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return PackedWheel(f"{name}-{__version__}-{_TAG}.whl", buffer.getvalue())


def _record_hash(data: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()

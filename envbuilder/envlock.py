"""The env lock: the wheels of one environment as a PEP 751 file with relative paths. Pure.

pip and uv both install it with no index. It lies in the environment, so its paths hold as long as
environment, bundle and wheelhouse are moved together.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.pylock import Package, PackageWheel, Pylock
from packaging.utils import canonicalize_name
from packaging.version import Version

from envbuilder.lock import LockedFile
from envbuilder.lock_text import pylock_text
from envbuilder.model import InstalledPackage

ENV_LOCK = "pylock.toml"


@dataclass(frozen=True)
class WheelFile:
    """One wheel to install, where it lies, and what it must be."""

    package: InstalledPackage
    path: Path
    size: int
    """Bytes."""


def bundle_wheel(file: LockedFile, path: Path) -> WheelFile:
    """The wheel `file` of a lock, which lies at `path` in a bundle."""
    package = InstalledPackage(
        name=file.package, version=file.version, wheel=file.filename, sha256=file.sha256, origin="bundle"
    )
    return WheelFile(package, path, file.size)


def env_lock_text(wheels: Sequence[WheelFile], folder: Path) -> str:
    """The text of the env lock of `wheels`, for a file that lies in `folder`."""
    return pylock_text(
        Pylock(
            lock_version=Version("1.0"),
            created_by="envbuilder",
            packages=[
                Package(
                    name=canonicalize_name(wheel.package.name),
                    version=Version(wheel.package.version),
                    wheels=[
                        PackageWheel(
                            name=wheel.package.wheel,
                            path=os.path.relpath(wheel.path, folder),
                            size=wheel.size,
                            hashes={"sha256": wheel.package.sha256},
                        )
                    ],
                )
                for wheel in sorted(wheels, key=lambda wheel: wheel.package.name)
            ],
        )
    )

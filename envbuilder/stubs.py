"""Metadata-only wheels: how a resolver is shown what it must not ask an index for."""

from __future__ import annotations

import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

from envbuilder.target import Target

# Above any build number of the same version's real wheels, so that the stub is preferred to them.
_BUILD = "999999999"
_EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")


@dataclass(frozen=True)
class KnownPackage:
    """A package whose requirements are given to the resolver, never read from an index: it is compiled from
    its sdist, or the machine provides it."""

    name: str
    versions: tuple[str, ...]
    """Those that it may have."""
    requires: tuple[str, ...]

    @property
    def extras(self) -> tuple[str, ...]:
        """The extras that the markers of `requires` speak of."""
        return tuple(sorted({extra for text in self.requires for extra in _EXTRA.findall(text)}))


def write_stubs(folder: Path, known: tuple[KnownPackage, ...], target: Target) -> None:
    """A wheel without any code for each version of each package in `known`, in `folder`."""
    folder.mkdir()
    # The target's best tag, for the same reason as the build number.
    tag = str(target.tags[0])
    for package in known:
        for version in package.versions:
            _write_stub(folder, package, version, tag)


def _write_stub(folder: Path, package: KnownPackage, version: str, tag: str) -> None:
    stem = f"{package.name.replace('-', '_')}-{version}"
    metadata = [
        "Metadata-Version: 2.1",
        f"Name: {package.name}",
        f"Version: {version}",
        *(f"Provides-Extra: {extra}" for extra in package.extras),
        *(f"Requires-Dist: {text}" for text in package.requires),
    ]
    wheel = [
        "Wheel-Version: 1.0",
        "Generator: envbuilder",
        "Root-Is-Purelib: false",
        f"Tag: {tag}",
        f"Build: {_BUILD}",
    ]
    with zipfile.ZipFile(folder / f"{stem}-{_BUILD}-{tag}.whl", "w") as archive:
        archive.writestr(f"{stem}.dist-info/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{stem}.dist-info/WHEEL", "\n".join(wheel) + "\n")
        archive.writestr(f"{stem}.dist-info/RECORD", "")

"""What uv and pip-compile have in common: a requirements file of pinned versions.

Both write one, and keep the pins that they find in it where those still fit.
"""

from __future__ import annotations

from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from envbuilder.errors import InputError
from envbuilder.resolve.protocol import Versions


def read_pins(path: Path) -> Versions:
    """The versions in a requirements file of `name==version` lines; InputError where one is a URL."""
    versions: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        text = line.partition("#")[0].strip()
        if text and not text.startswith("-"):
            requirement = Requirement(text)
            if requirement.url is not None:
                raise InputError(
                    f"A package requires {requirement.name} by a URL, which no lock can name.",
                    remedy=f"Exclude {requirement.name} in the recipe, or require versions without it.",
                    context={"requirement": text},
                )
            (pin,) = requirement.specifier
            versions[canonicalize_name(requirement.name)] = pin.version
    return versions


def write_pins(path: Path, versions: Versions) -> None:
    """A requirements file of `name==version` lines."""
    path.write_text("".join(f"{name}=={version}\n" for name, version in sorted(versions.items())))

"""What every build needs, and what this version of envbuilder and of its trainer says that it needs."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import requires

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from envbuilder.lock import LockedPatch, recipe_digest
from envbuilder.recipe import Recipe

BUILD_TOOLS = ("ninja", "setuptools", "wheel")
"""What torch's extension builder and every setup.py use without saying so."""


def tool_requires() -> tuple[str, ...]:
    """Run-time requirements of envbuilder itself."""
    return tuple(text for text in _requires() if not _extras(text))


def trainer_requires() -> tuple[str, ...]:
    """Requirements of the trainer that `install` puts into an env."""
    return tuple(text.split(";")[0].strip() for text in _requires() if "trainer" in _extras(text))


def required_name(requirement: str) -> str:
    """The normalised name of the package that a PEP 508 requirement asks for."""
    return canonicalize_name(Requirement(requirement).name)


def current_digest(recipe: Recipe, patches: Sequence[LockedPatch]) -> str:
    """`lock.recipe_digest` of `recipe` with these patches, for this version of the tool."""
    hashes = {patch.path: patch.sha256 for patch in patches}
    return recipe_digest(recipe, trainer_requires(), tool_requires(), hashes)


def _requires() -> list[str]:
    return requires("envbuilder") or []


def _extras(text: str) -> set[str]:
    marker = Requirement(text).marker
    if marker is None or marker.evaluate({"extra": ""}):
        return set()
    return {extra for extra in ("trainer", "dev") if marker.evaluate({"extra": extra})}

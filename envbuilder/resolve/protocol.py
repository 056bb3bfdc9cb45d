"""What a resolver is: requirements in, one version of each package out, for one target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from envbuilder.stubs import KnownPackage
from envbuilder.target import Target

Versions = Mapping[str, str]
"""Normalised package name → version."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a resolver."""

    what: str
    """What is resolved, for messages: "the runtime requirements of quickstart"."""
    remedy: str
    """What to do where it has no solution."""
    requirements: tuple[str, ...]
    constraints: tuple[str, ...]
    known: tuple[KnownPackage, ...]
    excluded: frozenset[str]
    """Normalised names of packages that no requirement may bring in."""
    target: Target
    glibc: str
    """The target's glibc, e.g. "2.28"."""
    index_url: str
    """The one index that answers for all packages."""
    preferences: Versions = field(default_factory=dict)
    """Versions to keep where they still fit; of packages that may not be needed at all."""
    cache: Path = Path(".cache")
    """Folder that the resolver may keep things in."""


class Resolver(Protocol):
    """Chooses the preferred versions, else the newest, that fit together. It only reads metadata: nothing is
    built or run."""

    name: str

    def resolve(self, request: Request) -> Versions:
        """The versions of all packages that `request` needs, known ones among them.

        InputError where there is no solution, NetworkError where the index fails. The error's context names
        in `package` the one without any fitting wheel, if it is that.
        """

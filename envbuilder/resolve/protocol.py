"""What a resolver is: requirements in, one version of each package out, for one target."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from envbuilder.target import Target

Versions = Mapping[str, str]
"""Normalised package name → version."""
_EXTRA = re.compile(r"""\bextra\s*==\s*["']([^"']+)["']""")


@dataclass(frozen=True, slots=True)
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
    indexes: Mapping[str, str]
    """Index name → URL; `default` is always there."""
    bindings: Mapping[str, str] = field(default_factory=dict)
    """Package → the name of the index that it comes from, where that is not `default`."""
    cache: Path = Path(".cache")
    """Folder that the resolver may keep things in."""


class Resolver(Protocol):
    """Chooses the newest versions that fit together. It only reads metadata: nothing is built or run."""

    name: str

    def resolve(self, request: Request) -> Versions:
        """The versions of all packages that `request` needs, known ones among them.

        InputError where there is no solution, NetworkError where an index fails.
        """

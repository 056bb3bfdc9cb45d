"""What a resolver is: requirements in, one version of each package out, for one target."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from envbuilder.errors import InputError
from envbuilder.stubs import KnownPackage
from envbuilder.target import Target

Versions = Mapping[str, str]
"""Normalised package name → version."""


@dataclass(frozen=True)
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


_SAID = 2000
"""Most characters of a resolver's words that are shown: it may go back through a hundred versions."""


class NoSolution(InputError):
    """No versions fit. `wheelless`: requirements for which the resolver saw no wheel that it could use."""

    def __init__(self, request: Request, *, resolver: str, said: str, wheelless: tuple[str, ...]) -> None:
        super().__init__(
            f"No versions fit {request.what} for Python {request.target.python}.",
            remedy=request.remedy,
            context={
                "python": request.target.python,
                resolver: textwrap.shorten(said, _SAID, placeholder=" …"),
            },
        )
        self.said = self.context[resolver]
        """The resolver's own words."""
        self.wheelless = wheelless
        self.known = request.known


class Resolver(Protocol):
    """Chooses the preferred versions, else the newest, that fit together. It only reads metadata: nothing is
    built or run."""

    name: str

    def resolve(self, request: Request) -> Versions:
        """The versions of all packages that `request` needs, known ones among them.

        NoSolution where there is none, InputError where the request can't be answered, NetworkError where the
        index fails.
        """

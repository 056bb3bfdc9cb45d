"""The known failures of builds and jobs: the table signatures.toml, and what it says of a text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Literal, get_args

from envbuilder.toml import tomllib

Kind = Literal["cause", "symptom", "consequence", "note"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""What a failure is to a run, the most telling first; signatures.toml says what each is."""
LINES_AFTER = 2
"""A pattern may reach into so many lines after the one that has the mark."""


@dataclass(frozen=True)
class Signature:
    """One known failure; signatures.toml says what the fields hold."""

    id: str
    topic: str
    marks: tuple[str, ...]
    cause: str
    remedy: str
    seen: str
    kind: Kind = "cause"
    pattern: str = ""

    def is_in(self, window: str) -> bool:
        """Whether this failure is in `window`: one line, with the LINES_AFTER that follow it."""
        first = window.partition("\n")[0]
        return any(mark in first for mark in self.marks) and self.fits(window)

    def fits(self, window: str) -> bool:
        """Whether the pattern is in `window`, whose first line has one of the marks."""
        return not self.pattern or re.search(self.pattern, window) is not None

    @property
    def rank(self) -> int:
        """Its kind's place among KINDS."""
        return KINDS.index(self.kind)


@cache
def signatures() -> tuple[Signature, ...]:
    """The table."""
    text = files("envbuilder.doctor").joinpath("signatures.toml").read_text(encoding="utf-8")
    return tuple(
        Signature(**{**entry, "marks": tuple(entry["marks"])}) for entry in tomllib.loads(text)["signature"]
    )


def known_in(window: str) -> Signature | None:
    """The first entry of the table that is in this window."""
    return next((signature for signature in signatures() if signature.is_in(window)), None)


def remedy_for(text: str, recipe_file: str) -> str | None:
    """The remedy of the first cause in `text`, an error's message, for the recipe in this file."""
    lines = text.splitlines()
    windows = ("\n".join(lines[at : at + 1 + LINES_AFTER]) for at in range(len(lines)))
    found = [signature for window in windows if (signature := known_in(window))]
    if not found:
        return None
    return min(found, key=lambda signature: signature.rank).remedy.replace("RECIPE", recipe_file)

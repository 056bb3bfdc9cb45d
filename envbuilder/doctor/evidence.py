"""How a check shows what it found."""

from __future__ import annotations

from collections.abc import Sequence

_SHOWN = 20
"""Lines of evidence at most: a removed folder would name ten thousand files."""


def shown(faults: Sequence[str]) -> list[str]:
    """The first of `faults`, and how many more there are."""
    more = len(faults) - _SHOWN
    return [*faults[:_SHOWN], *([f"… and {more} more"] if more > 0 else [])]

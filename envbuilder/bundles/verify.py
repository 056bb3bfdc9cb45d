"""Reads every byte of a bundle and says all that is not as its lock and record name it. Writes nothing."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from envbuilder.bundle import open_bundle
from envbuilder.bundle_contents import Problem, examine, inventory
from envbuilder.errors import IntegrityError
from envbuilder.paths import Root
from envbuilder.report import Reporter


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """A bundle in which nothing was wrong."""

    bundle: Path
    files: int
    bytes: int
    """Read and hashed."""
    leftovers: int
    """Hidden new files of a fetch that goes on or was killed: no one uses them, and `fetch` removes them."""
    seconds: float
    """Wall time."""


def verify_bundle(root: Root, name: str, reporter: Reporter) -> VerifyReport:
    """Reads the bundle of recipe `name` from end to end, offline.

    IntegrityError after everything was read, naming each file that is changed, truncated, missing,
    unreadable, or strange: in the bundle and in no lock, links among them. MismatchError if there is no
    complete bundle.
    """
    begin = time.monotonic()
    bundle = open_bundle(root, name)
    reporter.stage(f"verifying {len(inventory(bundle))} files of {name}")
    found = examine(bundle, reporter)
    if found.problems:
        raise _error(bundle.path, name, found.problems)
    return VerifyReport(
        bundle=bundle.path,
        files=found.files,
        bytes=found.bytes,
        leftovers=found.leftovers,
        seconds=time.monotonic() - begin,
    )


def _error(folder: Path, name: str, problems: tuple[Problem, ...]) -> IntegrityError:
    counts = Counter(problem.kind for problem in problems)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return IntegrityError(
        f"The bundle {folder} is not what its lock names: {listed}.",
        remedy=f"envbuilder fetch recipes/{name}.toml --verify",
        context={problem.path: problem.detail for problem in problems},
    )

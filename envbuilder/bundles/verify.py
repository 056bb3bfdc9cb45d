"""Reads every byte of a bundle and says all that is not as its lock and record name it. Changes nothing."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from envbuilder.bundle import open_bundle
from envbuilder.bundle_contents import Problem, examine, inventory, mending
from envbuilder.errors import IntegrityError
from envbuilder.hash_record import HashRecord
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.provided_models import check_place, models_of_bundle
from envbuilder.report import Reporter


@dataclass(frozen=True)
class VerifyReport:
    """A bundle in which nothing was wrong."""

    bundle: Path
    files: int
    bytes: int
    """Read and hashed."""
    recorded: int
    """Files of them that the same command had hashed when it was cut off, and that are as they were."""
    leftovers: int
    """Hidden new files of a fetch that goes on or was killed: no one uses them, and `fetch` removes them."""
    seconds: float
    """Wall time."""


def verify_bundle(root: Root, name: str, reporter: Reporter) -> VerifyReport:
    """Reads the bundle of recipe `name` from end to end, offline, and in place the models that the machine
    provides to it.

    IntegrityError after everything was read, naming each file that is changed, truncated, missing,
    unreadable, or strange: in the bundle and in no lock, links among them. MismatchError if there is no
    complete bundle, or a provided model isn't where it was.

    Where CPU time is limited, what is hashed is recorded under ROOT/cache until the end is reached: cut off,
    the same call goes on from there.
    """
    begin = time.monotonic()
    bundle = open_bundle(root, name)
    for provided in models_of_bundle(bundle):
        check_place(provided, name)
    reporter.stage(f"verifying {len(inventory(bundle))} files of {name}")
    record = HashRecord.where_needed(root.cache / "verify" / f"{name}.hashed")
    found = examine(bundle, reporter, record=record)
    record.remove()
    if found.problems:
        raise _error(bundle, found.problems)
    return VerifyReport(
        bundle=bundle.path,
        files=found.files,
        bytes=found.bytes,
        recorded=found.recorded,
        leftovers=found.leftovers,
        seconds=time.monotonic() - begin,
    )


def _error(bundle: Bundle, problems: tuple[Problem, ...]) -> IntegrityError:
    counts = Counter(problem.kind for problem in problems)
    listed = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
    return IntegrityError(
        f"The bundle {bundle.path} is not what its lock names: {listed}.",
        remedy=mending(bundle, problems),
        context={problem.path: problem.detail for problem in problems},
    )

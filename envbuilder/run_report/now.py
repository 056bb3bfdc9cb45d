"""The runs under a ROOT, each with how far it is now."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import InputError
from envbuilder.paths import Root
from envbuilder.run_report.records import History, number, read_run

SILENT_S = 900.0
"""A run that writes no record for so long, and leaves no outcome, was ended from outside most often."""


@dataclass(frozen=True)
class RunNow:
    """One run."""

    name: str
    state: str
    """running, finished, stopped, failed; unknown where it left no outcome, and no process is seen here."""
    silent_s: float | None
    """If unknown, how long ago its last record was written."""
    step: int
    steps: int | None
    """Of the whole training."""
    loss: float | None
    seconds_left: float | None
    """Of training, as the run itself reckoned."""
    jobs_left: int | None
    """How many more jobs like its last one; None where that had no end, or was too short to tell."""


def runs_now(root: Root, recipe_name: str | None, *, is_here: Callable[[Path], bool]) -> list[RunNow]:
    """Those under `root`, the last to write first; with `recipe_name`, those in its env.

    `is_here` says whether a process of the run in that folder is on this machine.
    """
    found = []
    for path in root.run("_").parent.glob("*/metrics.jsonl"):
        try:
            history = read_run(path.parent)
        except InputError:  # removed meanwhile, or another user's
            continue
        if history.jobs and recipe_name in (None, history.receipt.get("recipe")):
            found.append((history.jobs[-1].ended, _now(history, is_here)))
    return [run for _, run in sorted(found, key=lambda pair: -pair[0])]


def _now(history: History, is_here: Callable[[Path], bool]) -> RunNow:
    silent = time.time() - history.jobs[-1].ended
    outcome = history.outcome.get("status")
    if outcome is not None:
        state = str(outcome)
    else:
        state = "running" if silent < SILENT_S or is_here(history.run) else "unknown"
    # What is left was reckoned at the very end again.
    told = history.outcome if history.outcome else history.last
    seconds, jobs = number(told, "seconds_left"), number(told, "jobs_left")
    over = state == "finished"
    return RunNow(
        name=history.run.name,
        state=state,
        silent_s=silent if state == "unknown" else None,
        step=history.done,
        steps=history.planned,
        loss=number(history.last, "loss"),
        seconds_left=None if over else seconds,
        jobs_left=None if over or jobs is None else int(jobs),
    )

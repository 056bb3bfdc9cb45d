"""How far a run is, by its metrics.jsonl: told while it trains, and measured afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from envbuilder.progress_file import ProgressFile
from envbuilder.report import Reporter

_RECENT = 20
"""Steps that the time left is told by."""


@dataclass(frozen=True)
class Step:
    """One record of kind "step"."""

    step: int
    steps: int
    seconds: float
    """Wall time; 0 where the record has none."""
    figures: str
    """Loss and rate, in words."""


class RunMetrics:
    """The lines that come into metrics.jsonl from now on, told to `reporter` and to the job's `progress`."""

    def __init__(
        self,
        path: Path,
        name: str,
        reporter: Reporter,
        progress: ProgressFile | None = None,
        on_first_step: Callable[[], None] = lambda: None,
    ) -> None:
        self._path, self._name, self._reporter, self._progress = path, name, reporter, progress
        self._on_first_step = on_first_step
        self._position = path.stat().st_size if path.exists() else 0
        self._unfinished = b""
        self._seconds: list[float] = []

    def look(self) -> None:
        """Tells of the last step in the lines that are new."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._position)
                *lines, self._unfinished = (self._unfinished + file.read()).split(b"\n")
                self._position = file.tell()
        except FileNotFoundError:
            return
        steps = [step for line in lines if (step := _step(line))]
        if not steps:
            return
        is_first = not self._seconds
        self._seconds += [step.seconds for step in steps]
        last = steps[-1]
        self._reporter.progress("training", last.step, last.steps, "steps")
        if self._progress:
            self._progress.write(
                done=last.step,
                total=last.steps,
                seconds_left=_left(last, self._seconds),
                stage=f"training {self._name}",
                figures=last.figures,
            )
        if is_first:
            self._on_first_step()


def seconds_left(run: Path) -> float | None:
    """What the run in the folder `run` still takes, by its own last part; None where it never made two steps.

    The start, with its first step, is counted once.
    """
    steps: list[Step] = []
    start = 0.0
    with suppress(OSError):
        for line in (run / "metrics.jsonl").read_bytes().splitlines():
            if step := _step(line):
                steps.append(step)
            elif record := _record(line, "start"):
                steps, start = steps[-1:], float(record.get("seconds_to_prepare") or 0)
    if len(steps) < 2 or not (left := _left(steps[-1], [step.seconds for step in steps])):
        return None
    return start + steps[1].seconds + left


def _left(last: Step, seconds: list[float]) -> float | None:
    # A part's first step compiles kernels: it tells nothing of the others.
    recent = [value for value in seconds[1:][-_RECENT:] if value > 0]
    return (last.steps - last.step) * median(recent) if recent else None


def _step(line: bytes) -> Step | None:
    record = _record(line, "step") or {}
    step, steps = record.get("step"), record.get("steps")
    if not (isinstance(step, int) and isinstance(steps, int)):
        return None
    loss, rate = record.get("loss"), record.get("tokens_per_second")
    figures = [f"loss {loss:.4f}"] if isinstance(loss, float) else []
    figures += [f"{rate:,.0f} tokens/s"] if isinstance(rate, float) else []
    return Step(step, steps, float(record.get("seconds") or 0), ", ".join(figures))


def _record(line: bytes, kind: str) -> dict[str, Any] | None:
    """The record in `line`, where it is one of this kind; a killed run may leave half a line."""
    with suppress(ValueError):
        record: dict[str, Any] = json.loads(line)
        return record if isinstance(record, dict) and record.get("kind") == kind else None
    return None

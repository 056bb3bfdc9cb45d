"""What a run left in its folder, as one history: its jobs, and each step once.

A job that goes on from a checkpoint does again what came after it. Then the last record of a step counts, and
an earlier job's steps from there on are no part of the curve. A line that a killed process never finished,
and a record without what is asked of it, are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envbuilder.errors import InputError

Record = dict[str, Any]


@dataclass
class Job:
    """One job of the run, or one part of it that was started by hand."""

    start: Record
    """The trainer's `start` record; empty if it was lost."""
    records: list[Record] = field(default_factory=list)
    """All of them, `start` too, in the order of the file."""
    first_step: int | None = None
    last_step: int | None = None

    @property
    def began(self) -> float:
        """Seconds since 1970, as all times."""
        first: float = self.records[0]["time"]
        prepared = first - (number(self.start, "seconds_to_prepare") or 0.0)
        return min(number(self.place, "began") or prepared, prepared)

    @property
    def place(self) -> Record:
        """The trainer's `job` record: where it ran; empty if it was lost."""
        return next(self.of("job"), {})

    @property
    def ended(self) -> float:
        """When it wrote its last record."""
        last: float = self.records[-1]["time"]
        return last

    def of(self, kind: str) -> Iterator[Record]:
        """Its records of one kind."""
        return (record for record in self.records if record["kind"] == kind)


@dataclass
class History:
    """A run."""

    run: Path
    jobs: list[Job] = field(default_factory=list)
    steps: dict[int, Record] = field(default_factory=dict)
    """Step → the last record of it, in the order of the steps."""
    validations: dict[int, Record] = field(default_factory=dict)
    samples: dict[tuple[str, str], Record] = field(default_factory=dict)
    """When (before, after) and prompt → the last such record."""
    repeated: list[Record] = field(default_factory=list)
    """Records of steps that were done again, or went with a checkpoint that was not there."""
    unread: int = 0
    """Lines that are no record."""
    outcome: Record = field(default_factory=dict)
    """`outcome.json`; empty while the run goes on, and after a death that left none."""
    receipt: Record = field(default_factory=dict)
    """The env's, as it was when the last job began."""
    config: str = ""
    """`config.yaml`."""

    @property
    def start(self) -> Record:
        """The last job's `start` record."""
        return next((job.start for job in reversed(self.jobs) if job.start), {})

    @property
    def planned(self) -> int | None:
        """Steps of the whole training."""
        steps = number(self.start, "steps")
        return None if steps is None else int(steps)

    @property
    def done(self) -> int:
        """The last step."""
        return max(self.steps, default=0)

    @property
    def last(self) -> Record:
        """The last step's record."""
        return self.steps.get(self.done, {})


def read_run(run: Path) -> History:
    """The history of the run in the folder `run`. Raises InputError where there is none."""
    path = run / "metrics.jsonl"
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise InputError(
            f"{run} is no run's folder: it has no metrics.jsonl.",
            remedy="envbuilder status  # lists the runs",
            context={"missing": path, "problem": error.strerror},
        ) from None
    history = History(
        run,
        outcome=_object(run / "outcome.json"),
        receipt=_object(run / "envbuilder.json"),
        config=_text(run / "config.yaml"),
    )
    for line in lines:
        record = _record(line)
        if record is None:
            history.unread += bool(line.strip())
        else:
            _add(history, record)
    return history


def number(record: Record, name: str) -> float | None:
    """The record's finite number of that name; None if it has none."""
    value = record.get(name)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value) if abs(value) < float("inf") else None  # NaN too is not below it


def part(record: Record, name: str) -> Record:
    """The record's object of that name; an empty one if it has none."""
    value = record.get(name)
    return value if isinstance(value, dict) else {}


def _add(history: History, record: Record) -> None:
    kind = record["kind"]
    if kind == "start" or not history.jobs:
        history.jobs.append(Job(record if kind == "start" else {}))
    job = history.jobs[-1]
    job.records.append(record)
    step = number(record, "step")
    if kind == "step" and step is not None:
        _add_step(history, job, int(step), record)
    elif kind == "validation" and step is not None:
        history.validations[int(step)] = record
    elif kind == "sample":
        history.samples[str(record.get("when")), str(record.get("prompt"))] = record


def _add_step(history: History, job: Job, step: int, record: Record) -> None:
    if job.first_step is None:
        job.first_step = step
        history.repeated += [old for number, old in history.steps.items() if number >= step]
        history.steps = {number: old for number, old in history.steps.items() if number < step}
        history.validations = {n: old for n, old in history.validations.items() if n < step}
    job.last_step = step
    history.steps[step] = record


def _record(line: bytes) -> Record | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict) or not isinstance(record.get("kind"), str):
        return None
    return record if number(record, "time") is not None else None


def _object(path: Path) -> Record:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

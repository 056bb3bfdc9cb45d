"""Where a run's time went, from the first job's beginning to the last job's end."""

from __future__ import annotations

from envbuilder.run_report.records import History, Job, Record, number

KINDS = {
    "waiting": "between jobs",
    "starting": "Python and torch, until the processes have met",
    "loading": "data, weights, adapters",
    "first steps": "of each job: kernels are compiled and tuned",
    "steps": "all others",
    "done again": "steps that an earlier job had done, after its last checkpoint",
    "validation": "all of the validation data, each time",
    "saves": "checkpoints, as far as training waited",
    "samples": "answers before and after training",
    "the rest": "what no record tells of",
}
"""What is told apart, and what it means."""

_OTHER_WORK = (
    ("validation", "validation", "seconds"),
    ("saves", "checkpoint", "held_up_seconds"),
    ("samples", "sample", "seconds"),
)
"""What it is called here, its kind of record, and the field with its time."""


def walltime(history: History) -> dict[str, float]:
    """Kind → seconds; together, all of the time."""
    spent = dict.fromkeys(KINDS, 0.0)
    ended: float | None = None
    repeated = {id(record) for record in history.repeated}
    for job in history.jobs:
        began = job.began if ended is None else max(job.began, ended)
        if ended is not None:
            spent["waiting"] += began - ended
        _of_job(job, began, repeated, spent)
        ended = max(job.ended, began)
    return spent


def _of_job(job: Job, began: float, repeated: set[int], spent: dict[str, float]) -> None:
    own = dict.fromkeys(KINDS, 0.0)
    if job.start:
        own["loading"] = _seconds(job.start, "seconds_to_prepare")
        own["starting"] = max(0.0, job.start["time"] - own["loading"] - began)
    for place, step in enumerate(job.of("step")):
        kind = "done again" if id(step) in repeated else "first steps" if place == 0 else "steps"
        own[kind] += _seconds(step, "seconds")
    for kind, records, field in _OTHER_WORK:
        own[kind] = sum(_seconds(record, field) for record in job.of(records))
    own["the rest"] = max(0.0, job.ended - began - sum(own.values()))
    for kind, seconds in own.items():
        spent[kind] += seconds


def _seconds(record: Record, name: str) -> float:
    return max(0.0, number(record, name) or 0.0)

"""How a sweep stands and ended: its jobs followed, a table of its runs, the error of those that failed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from envbuilder import display
from envbuilder.cli.app import Options
from envbuilder.errors import EnvbuilderError, InputError, StoppedError
from envbuilder.paths import Root
from envbuilder.sweep import Member, Sweep

if TYPE_CHECKING:
    from envbuilder.slurm.follow_sweep import Failure
    from envbuilder.slurm.sweep_queue import Task


def follow_tasks(opts: Options, sweep: Sweep, tasks: Sequence[Task], again: str) -> tuple[Failure, ...]:
    """Follows the tasks of a sweep to their end: those that failed."""
    from envbuilder.slurm.follow_sweep import follow_sweep
    from envbuilder.train.outcome import has_finished

    followed = {task.member.index for task in tasks}
    others = [member for member in sweep.members if member.index not in followed]
    finished = sum(has_finished(opts.root.run(member.run)) for member in others)
    return follow_sweep(
        sweep.name,
        tasks,
        finished=finished,
        total=len(sweep.members),
        root=opts.root,
        reporter=opts.reporter,
        again=again,
    )


@dataclass(frozen=True)
class Standing:
    """How far a member is."""

    member: Member
    state: str
    """finished, failed, queued (it waits or runs), stopped, or unfinished."""
    run: Path
    steps: int
    first_loss: float | None
    last_loss: float | None
    validation_loss: float | None
    """The last one that was measured."""
    job: str | None
    log: Path | None
    error: str | None
    is_best: bool = False


def print_standing(
    opts: Options,
    sweep: Sweep,
    tasks: Sequence[Task],
    failures: Sequence[Failure],
    again: str,
    *,
    is_over: bool,
) -> None:
    """Prints how far each member is. `is_over` says that the `tasks` have ended, all but the `failures` well.

    Raises then, after the table, the error that members ended with, and StoppedError where some were never
    submitted; for machines, the table is part of that error.
    """
    standings = _standings(opts.root, sweep, tasks, failures, is_over=is_over)
    error = _error(sweep, failures, standings, again) if is_over else None
    data: dict[str, object] = {"sweep": sweep.name, "members": [_data(standing) for standing in standings]}
    if error is None or not opts.json:
        opts.result(data, lambda console: _show(console, opts.root, sweep, standings))
    if error is not None:
        error.result = data
        raise error


def _standings(
    root: Root, sweep: Sweep, tasks: Sequence[Task], failures: Sequence[Failure], *, is_over: bool
) -> list[Standing]:
    failed = {failure.task.member.index: failure for failure in failures}
    there = {task.member.index: task for task in tasks}
    found = [
        _standing(root, member, there.get(member.index), failed.get(member.index), is_over=is_over)
        for member in sweep.members
    ]
    measure = _measure(sweep, found)
    if measure is None:
        return found
    best = min(found, key=lambda one: _loss(one, measure))
    return [replace(one, is_best=one is best) for one in found]


def _standing(
    root: Root, member: Member, task: Task | None, failure: Failure | None, *, is_over: bool
) -> Standing:
    from envbuilder.run_report import History, read_run
    from envbuilder.run_report.records import number

    run = root.run(member.run)
    try:
        history = read_run(run)
    except InputError:  # It never began.
        history = History(run)
    state = str(history.outcome.get("status", "unfinished"))
    if failure is not None:
        state = "stopped" if isinstance(failure.error, StoppedError) else "failed"
    elif task is not None and not is_over:
        state = "queued"
    last = max(history.validations, default=None)
    return Standing(
        member,
        state,
        run,
        steps=history.done,
        first_loss=number(history.steps.get(1, {}), "loss"),
        last_loss=number(history.last, "loss"),
        validation_loss=None if last is None else number(history.validations[last], "loss"),
        job=task.id if task else None,
        log=task.log if task else None,
        error=failure.error.message if failure else None,
    )


def _measure(sweep: Sweep, standings: Sequence[Standing]) -> str | None:
    """The loss by which the finished runs can be compared: one on the same data in all of them; else None."""
    swept = {key.partition(".")[0] for key in sweep.members[0].values}
    finished = [standing for standing in standings if standing.state == "finished"]
    for measure, section in (("validation_loss", "validation_dataset"), ("last_loss", "dataset")):
        if section not in swept and finished and all(_loss(one, measure) < math.inf for one in finished):
            return measure
    return None


def _loss(standing: Standing, measure: str) -> float:
    loss = getattr(standing, measure) if standing.state == "finished" else None
    return math.inf if loss is None else float(loss)


def _error(
    sweep: Sweep, failures: Sequence[Failure], standings: Sequence[Standing], again: str
) -> EnvbuilderError | None:
    """What the sweep comes to: the kind of error that its members ended with, each of them named."""
    total = len(sweep.members)
    if not failures:
        left = sum(standing.state != "finished" for standing in standings)
        return (
            StoppedError(
                f"{left} of {total} runs of the sweep {sweep.name} are not finished, and in no queue.",
                remedy=f"Submit them with: {again}",
            )
            if left
            else None
        )
    errors = [failure.error for failure in failures]
    # Of those that stopped in good order there is nothing to mend.
    kind = next((type(error) for error in errors if not isinstance(error, StoppedError)), StoppedError)
    what = "stopped" if kind is StoppedError else "failed"
    named = ", ".join(failure.task.member.run for failure in failures)
    return kind(
        f"{len(failures)} of {total} runs of the sweep {sweep.name} {what}: {named}.",
        remedy=f"Go on with what is unfinished, once the cause is mended: {again}",
        context={
            failure.task.member.run: f"{failure.error.message}\n  remedy: {failure.error.remedy}\n"
            f"  log: {failure.task.log}"
            for failure in failures
        },
    )


def _data(standing: Standing) -> dict[str, Any]:
    data = asdict(standing)
    member = data.pop("member")
    return {"index": member["index"], "values": member["values"], **data}


def _show(console: Console, root: Root, sweep: Sweep, standings: Sequence[Standing]) -> None:
    keys = list(sweep.members[0].values)
    has_validation = any(standing.validation_loss is not None for standing in standings)
    rows = [["run", *keys, "state", "steps", "first loss", "last loss", *["validation"] * has_validation, ""]]
    for one in standings:
        losses = [one.first_loss, one.last_loss, *[one.validation_loss] * has_validation]
        rows.append(
            [
                one.member.run,
                *(one.member.values[key] for key in keys),
                one.state,
                f"{one.steps:,}",
                *("-" if loss is None else f"{loss:.4f}" for loss in losses),
                "best" if one.is_best else "",
            ]
        )
    display.print_table(console, f"sweep {sweep.name}; its runs are in {root.run('_').parent}", rows)

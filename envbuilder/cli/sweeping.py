"""`sweep`: a family of runs of one config, as an array of Slurm jobs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from envbuilder.cli.app import (
    After,
    AllowDrift,
    DryRun,
    Options,
    Overrides,
    PrintScript,
    Processes,
    Requeue,
    ScriptTemplate,
    Wait,
    WaitForQos,
    app,
)
from envbuilder.cli.submitting import (
    Instead,
    is_chain,
    job_words,
    site_of,
    submitted,
    training_words,
    typed_again,
)
from envbuilder.cli.sweep_standing import follow_tasks, print_standing
from envbuilder.cli.training import train_here
from envbuilder.errors import EnvbuilderError, UsageError
from envbuilder.paths import Root
from envbuilder.site import Site
from envbuilder.sweep import Member, Sweep, is_number, make_sweep
from envbuilder.sweep_record import check_same_sweep, note_sweep

if TYPE_CHECKING:
    from envbuilder.slurm.plan import Plan, Wishes
    from envbuilder.slurm.sweep_queue import Task

Over = Annotated[
    list[str],
    typer.Option("--over", metavar="A.B=C,D,…", help="A key and the values that it takes (may be repeated)."),
]
_UNCHECKED = frozenset({"seed", "optimizer", "lr_scheduler", "divergence"})
"""Sections whose numbers nothing depends on that can be looked at before training."""


@app.command()
def sweep(
    context: typer.Context,
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="The training config, YAML.")],
    recipe: Annotated[str, typer.Option(metavar="NAME", help="Name of the recipe whose env to train in.")],
    site: Annotated[str, typer.Option(help="The site's name (recipes/sites/NAME.toml) or file.")],
    over: Over,
    overrides: Overrides = None,
    name: Annotated[Optional[str], typer.Option(help="The sweep's name (default: the config's).")] = None,
    at_once: Annotated[
        Optional[int], typer.Option(help="Run at most so many at the same time.", min=1)
    ] = None,
    processes: Processes = None,
    allow_drift: AllowDrift = False,
    wait: Wait = True,
    requeue: Requeue = None,
    after: After = None,
    wait_for_qos: WaitForQos = False,
    print_script: PrintScript = False,
    dry_run: DryRun = False,
    template: ScriptTemplate = None,
) -> None:
    """Train a config with every combination of some keys' values, as an array of Slurm jobs; the same command
    goes on with what is unfinished."""
    from envbuilder.slurm.plan import Wishes
    from envbuilder.train import checked_name
    from envbuilder.train.outcome import has_finished

    opts: Options = context.obj
    swept = make_sweep(
        checked_name(name or config.stem), str(config.absolute()), recipe, tuple(overrides or ()), over
    )
    facts = site_of(site, template)
    wishes = Wishes(is_chain(facts, requeue), facts.allow_chain, after, wait_for_qos)
    flags = training_words(recipe, swept.overrides, processes, allow_drift=allow_drift)
    flags += [word for axis in over for word in ("--over", axis)]
    named = [] if swept.name == config.stem else ["--name", swept.name]
    named += [] if at_once is None else ["--at-once", str(at_once)]
    words = ["sweep", str(config), "--site", site, *flags, *named, *job_words(requeue, template)]
    order = _Order(swept, config, site, facts, flags, wishes, at_once, typed_again(opts.root, words))
    check_same_sweep(opts.root, swept)
    unfinished = [member for member in swept.members if not has_finished(opts.root.run(member.run))]
    if print_script and unfinished:
        opts.script(order.plan(opts.root, unfinished, None).script)
        return
    tasks = _queued(opts, order) if unfinished else ()
    there = {task.member.index for task in tasks}
    if rest := [member for member in unfinished if member.index not in there]:
        memory, estimate_s = _looked_at(opts, order, rest, processes, allow_drift=allow_drift)
        order = replace(order, wishes=replace(wishes, estimate_s=estimate_s))
        tasks += _submitted(opts, order, rest, memory, is_dry_run=dry_run)
        if dry_run:
            return
    else:
        there_are = f"{len(tasks)} are queued" if tasks else "all are finished"
        opts.reporter.stage(f"of the sweep's {len(swept.members)} runs, {there_are}: nothing to submit")
    is_over = wait and not dry_run
    failures = follow_tasks(opts, swept, tasks, order.again) if is_over and tasks else ()
    print_standing(opts, swept, tasks, failures, order.again, is_over=is_over)


@dataclass(frozen=True)
class _Order:
    """What the command line asks for."""

    sweep: Sweep
    config: Path
    site_name: str
    """As it was typed."""
    site: Site
    flags: Sequence[str]
    """Those that say what the sweep is, and how it is trained."""
    wishes: Wishes
    at_once: int | None
    again: str
    """The command, as it was typed."""

    def plan(self, root: Root, rest: Sequence[Member], room: int | None, largest: int | None = None) -> Plan:
        """The next array, of as many of `rest` as there is room for."""
        from envbuilder.slurm.plan import plan_sweep
        from envbuilder.slurm.sweep_queue import next_array

        array = next_array(self.sweep.name, rest, room=room, largest=largest, at_once=self.at_once)
        return plan_sweep(self.sweep, array, self.site, root, self.flags, self.wishes)


def _queued(opts: Options, order: _Order) -> tuple[Task, ...]:
    """The sweep's tasks that wait or run."""
    from envbuilder.slurm.submit import find_sbatch
    from envbuilder.slurm.sweep_queue import queued_tasks

    find_sbatch()  # Said before anything is looked at.
    return queued_tasks(order.sweep, opts.root)


def _looked_at(
    opts: Options, order: _Order, rest: Sequence[Member], processes: int | None, *, allow_drift: bool
) -> tuple[str, float | None]:
    """Looks at env, model, data and memory, once for all members that don't differ in them.

    Returns what is to be said of the memory, and the seconds that the longest run is expected to take.
    Raises what is wrong, with the member's name.
    """
    from envbuilder.cli.before_training import look_before_training
    from envbuilder.train import proved_env
    from envbuilder.train.metrics import seconds_left

    proved_env(opts.root, order.sweep.recipe, opts.reporter, allow_drift=allow_drift)
    memories: dict[str, None] = {}
    estimates: list[float | None] = []
    for alike in _alike(rest):
        overrides = order.sweep.overrides_of(alike[0])
        try:
            looked = look_before_training(
                opts, order.config, order.sweep.recipe, order.site_name, order.site, overrides
            )
        except EnvbuilderError as error:
            error.message = f"{alike[0].run}: {error.message}"
            error.context["members"] = ", ".join(member.run for member in alike)
            raise
        memories[looked.memory] = None
        usual = looked.expected_s if processes is None else None
        estimates += [seconds_left(opts.root.run(member.run)) or usual for member in alike]
    known = [estimate for estimate in estimates if estimate is not None]
    return "; ".join(memories) or "unknown", max(known) if len(known) == len(estimates) else None


def _alike(members: Sequence[Member]) -> list[list[Member]]:
    """The members in groups that only differ in what can't be looked at before training."""
    groups: dict[tuple[str, ...], list[Member]] = {}
    for member in members:
        seen = tuple(
            override
            for override, (key, value) in zip(member.overrides, member.values.items())
            if not (key.partition(".")[0] in _UNCHECKED and is_number(value))
        )
        groups.setdefault(seen, []).append(member)
    return list(groups.values())


def _submitted(
    opts: Options, order: _Order, rest: Sequence[Member], memory: str, *, is_dry_run: bool
) -> tuple[Task, ...]:
    """Submits the next array of `rest`, and notes the sweep: its tasks. A dry run prints what it would be."""
    from envbuilder.slurm.preflight import check_qos_is_free, room_for_jobs, wait_for_qos
    from envbuilder.slurm.sweep_queue import largest_array, tasks_of_array

    spec = order.site.train
    if not is_dry_run:
        if order.wishes.wait_for_qos:
            wait_for_qos(spec, opts.root, opts.reporter)
        check_qos_is_free(spec, opts.root, order.again)
    room = room_for_jobs(spec, opts.root)
    # What a dry run is told of, where there is no room, is a job of one run.
    plan = order.plan(opts.root, rest, None if room is None else max(1, room), largest_array())
    if not is_dry_run:
        note_sweep(opts.root, order.sweep)
    unknown = "no run yet: neither these nor others of such a model made two steps under this root"
    job = submitted(opts, plan, order.again, Instead(dry_run=is_dry_run), memory, unknown)
    if job is None:
        return ()
    tasks = tasks_of_array(opts.root, job.id)
    opts.reporter.stage(f"submitted job {job.id}, an array of {len(tasks)}; their logs: {job.log}")
    if left := len(rest) - len(tasks):
        opts.reporter.warn(f"{left} more runs have no room in the queue now; submit them with: {order.again}")
    return tasks


@app.command("sweep-member", hidden=True)
def sweep_member(
    context: typer.Context,
    config: Path,
    recipe: Annotated[str, typer.Option()],
    name: Annotated[str, typer.Option()],
    over: Over,
    overrides: Overrides = None,
    first: Annotated[int, typer.Option()] = 0,
    processes: Processes = None,
    allow_drift: AllowDrift = False,
    requeue_job: Annotated[bool, typer.Option("--requeue-job")] = False,
) -> None:
    """One run of a sweep, that of this task of a job array: what the array's script runs."""
    swept = make_sweep(name, str(config.absolute()), recipe, tuple(overrides or ()), over)
    index = os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if not index.isdigit() or first + int(index) >= len(swept.members):
        raise UsageError(
            f"This is no task of an array of the sweep {name}.",
            remedy=f"Have the array submitted: envbuilder sweep {config} --recipe {recipe} --site SITE …",
            context={"SLURM_ARRAY_TASK_ID": index or "not set", "runs": len(swept.members)},
        )
    member = swept.members[first + int(index)]
    train_here(
        context.obj,
        config,
        recipe,
        swept.overrides_of(member),
        run_name=member.run,
        processes=processes,
        time_limit_s=None,
        allow_drift=allow_drift,
        requeue_job=requeue_job,
    )

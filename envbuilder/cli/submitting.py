"""`compile --sbatch` and `train --sbatch`: the job submitted, and followed to its end."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from envbuilder import display, summary
from envbuilder.cli.app import Options
from envbuilder.errors import UsageError
from envbuilder.paths import Root
from envbuilder.session import Session
from envbuilder.site import Site, in_bytes, load_site
from envbuilder.slurm_time import spoken

if TYPE_CHECKING:
    from envbuilder.compile.units.records import Estimate
    from envbuilder.slurm.follow import Ended
    from envbuilder.slurm.plan import Plan
    from envbuilder.slurm.submit import Submitted


@dataclass(frozen=True)
class Instead:
    """What is done in place of submitting, if anything."""

    print_script: bool = False
    dry_run: bool = False


def site_of(name: str, template: Path | None) -> Site:
    """The site, with the script template that was given on the command line."""
    site = load_site(name)
    return site if template is None else site.model_copy(update={"template": str(template)})


def compile_in_a_job(
    opts: Options,
    session: Session,
    recipe: Path,
    site_name: str,
    flags: Sequence[str],
    *,
    requeue: bool | None,
    after: str | None,
    wait_for_qos: bool,
    template: Path | None,
    wait: bool,
    instead: Instead,
) -> None:
    """Submits `compile` with `flags`, and, with `wait`, follows the job and prints its outcome.

    `recipe` is the recipe's path as it was typed. Without `requeue`, the site says whether the job runs
    itself again until all is built. Raises what ended the job, with its exit code.
    """
    from envbuilder.slurm.follow import follow
    from envbuilder.slurm.plan import Wishes, plan_compile

    site = site_of(site_name, template)
    wishes = Wishes(is_chain(site, requeue), site.allow_chain, after, wait_for_qos)
    session.bundle()  # An incomplete bundle is found here, not after hours in a queue.
    estimate = session.estimated_work(site.build.cpus)
    wishes = replace(wishes, estimate_s=estimate.seconds if estimate else None)
    plan = plan_compile(session.recipe_path, session.recipe.name, site, opts.root, flags, wishes)
    words = ["compile", str(recipe), "--sbatch", "--site", site_name, *flags, *job_words(requeue, template)]
    again = typed_again(opts.root, words)
    memory = _build_memory(site, estimate)
    unknown = "no build here tells: some of these packages were never built under this root"
    job = submitted(opts, plan, again, instead, memory, unknown)
    if job is None:
        return
    if not wait:
        opts.submitted(job)
        return
    opts.reporter.stage(f"submitted job {job.id}; its log: {job.log}")
    print_ended(opts, follow(job.id, job.log, root=opts.root, reporter=opts.reporter, again=again))


def submitted(
    opts: Options, plan: Plan, again: str, instead: Instead, memory: str, unknown: str
) -> Submitted | None:
    """The job, submitted; None where something was wanted `instead`, which is printed.

    For the dry run: `memory` says whether the work fits, `unknown` why nobody knows how long it takes.
    """
    from envbuilder.slurm.dry_run import dry_run
    from envbuilder.slurm.submit import submit_planned

    if instead.print_script:
        opts.script(plan.script)
    elif instead.dry_run:
        run = dry_run(plan, opts.reporter)
        rows = summary.dry_run(run, memory, unknown, is_chain=plan.wishes.requeue)

        def show(console: Console) -> None:
            console.out(run.script, end="", highlight=False)
            display.print_summary(console, f"{plan.name}: nothing was submitted", rows)

        opts.result({"dry_run": asdict(run), "memory": memory}, show)
    else:
        return submit_planned(plan, opts.root, opts.reporter, again)
    return None


def _build_memory(site: Site, estimate: Estimate | None) -> str:
    """Whether the largest unit of a build fits into the job's memory, in words."""
    if estimate is None:
        return "unknown: no build here tells"
    size, asked = display.human_bytes(estimate.memory), site.build.memory
    if asked is None:
        return f"the largest unit takes {size}; the site asks for no amount, so the cluster's default holds"
    fits = "fits" if estimate.memory <= in_bytes(asked) else "does not fit"
    return f"the largest unit takes {size}: it {fits} into {asked}, and as many at once as do"


def train_in_a_job(
    opts: Options,
    config: Path,
    recipe_name: str,
    site_name: str,
    overrides: tuple[str, ...],
    *,
    run_name: str,
    processes: int | None,
    allow_drift: bool,
    requeue: bool | None,
    after: str | None,
    wait_for_qos: bool,
    template: Path | None,
    wait: bool,
    instead: Instead,
) -> None:
    """Submits `train`, once env, model, data and memory are looked at; with `wait`, follows it to its end.

    Where only the script is wanted, nothing is looked at.

    Without `requeue`, the site says whether the job runs itself again until the run is done. Raises what
    ended the job, with its exit code.
    """
    from envbuilder.cli.before_training import look_before_training
    from envbuilder.slurm.follow import follow
    from envbuilder.slurm.plan import Wishes, plan_train
    from envbuilder.slurm.sweep_queue import check_no_sweep_trains
    from envbuilder.train import TrainReport, proved_env
    from envbuilder.train.metrics import seconds_left

    site = site_of(site_name, template)
    run = opts.root.run(run_name)
    wishes = Wishes(
        requeue=is_chain(site, requeue),
        may_requeue=site.allow_chain,
        after=after,
        wait_for_qos=wait_for_qos,
        estimate_s=seconds_left(run),
    )
    flags = training_words(recipe_name, overrides, processes, allow_drift=allow_drift)
    memory = ""
    if not instead.print_script:
        proved_env(opts.root, recipe_name, opts.reporter, allow_drift=allow_drift)
        looked = look_before_training(opts, config, recipe_name, site_name, site, overrides)
        memory = looked.memory
        if wishes.estimate_s is None and processes is None:
            wishes = replace(wishes, estimate_s=looked.expected_s)
    typed = job_words(requeue, template)
    named = [] if run_name == config.stem else ["--run", run_name]
    words = ["train", str(config), "--sbatch", "--site", site_name, *flags, *named, *typed]
    again = typed_again(opts.root, words)
    plan = plan_train(config, run_name, site, opts.root, flags, wishes)
    if not (instead.print_script or instead.dry_run):
        check_no_sweep_trains(run_name, opts.root, after=after)
    unknown = "no run yet: neither this one nor another of such a model made two steps under this root"
    job = submitted(opts, plan, again, instead, memory, unknown)
    if job is None:
        return
    if not wait:
        opts.submitted(job)
        return
    opts.reporter.stage(f"submitted job {job.id}; its log: {job.log}")
    ended = follow(job.id, job.log, root=opts.root, reporter=opts.reporter, again=again)
    outcome = json.loads((run / "outcome.json").read_bytes())
    rows = [
        ("job", f"{ended.id}, in {ended.lives} {'lives' if ended.lives > 1 else 'life'}"),
        *summary.trained(TrainReport(run, outcome, ended.seconds)),
    ]
    opts.result(
        {"job": ended.id, "state": ended.state, "lives": ended.lives, "run": run, "outcome": outcome},
        lambda console: display.print_summary(console, str(run), rows),
    )


def is_chain(site: Site, requeue: bool | None) -> bool:
    """Whether a job runs itself again: as was asked for, else as the site has it.

    UsageError where it was asked for, and the site does not allow it.
    """
    if requeue and not site.allow_chain:
        raise UsageError(
            f"The site {site.name} does not say that a job may put itself back into the queue.",
            remedy="Set allow-chain = true in the site file where the cluster's rules allow it; else run the "
            "command again after each job",
            context={"site": site.name},
        )
    return site.allow_chain if requeue is None else requeue


def training_words(
    recipe_name: str, overrides: Sequence[str], processes: int | None, *, allow_drift: bool
) -> list[str]:
    """The options that say how to train, typed or in a job."""
    words = ["--recipe", recipe_name]
    words += [word for override in overrides for word in ("--set", override)]
    words += ["--processes", str(processes)] if processes else []
    return words + (["--allow-drift"] if allow_drift else [])


def job_words(requeue: bool | None, template: Path | None) -> list[str]:
    """The options that say how a job is submitted, as they were typed."""
    words = [] if requeue is None else ["--requeue" if requeue else "--no-requeue"]
    return words + _template_words(template)


def print_ended(opts: Options, ended: Ended) -> None:
    """Prints the outcome of a job that did all."""
    lives = f", in {ended.lives} lives" if ended.lives > 1 else ""
    opts.lines(
        {
            "job": ended.id,
            "state": ended.state,
            "lives": ended.lives,
            "seconds": ended.seconds,
            "log": ended.log,
        },
        f"job {ended.id} did all{lives}; it was followed for {spoken(ended.seconds)}",
        f"its log: {ended.log}",
    )


def typed_again(root: Root, words: Sequence[str]) -> str:
    """The command line of `envbuilder WORDS` under this root."""
    where = [] if root == Root.resolve(None) else ["--root", str(root.path)]
    return shlex.join(["envbuilder", *where, *words])


def _template_words(template: Path | None) -> list[str]:
    return [] if template is None else ["--template", str(template)]

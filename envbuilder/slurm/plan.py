"""A job as it would be submitted: its script, what it asks for, and how many of its kind the work takes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from envbuilder.errors import InputError, SlurmError, UsageError
from envbuilder.own_program import own_command
from envbuilder.paths import Root
from envbuilder.report import Reporter
from envbuilder.site import JobSpec, Site
from envbuilder.slurm.preflight import planned_walltime, scripts_folder
from envbuilder.slurm.script import Array, Job, render_script
from envbuilder.slurm.template import Template, read_template
from envbuilder.slurm.walltime import Walltime
from envbuilder.slurm_queries import PREFIX
from envbuilder.slurm_time import seconds_of, slurm_time, spoken
from envbuilder.sweep import Sweep


@dataclass(frozen=True)
class Wishes:
    """How a job is to be submitted, beside what the site says."""

    requeue: bool = False
    """It runs itself again until all is done (`--requeue-job`)."""
    may_requeue: bool = True
    """It could, if the user asked for it."""
    after: str | None = None
    """Id of a job that must have ended before it starts."""
    wait_for_qos: bool = False
    """Where its QoS takes no further job now, wait until it does."""
    estimate_s: float | None = None
    """Seconds that the work is expected to take on the site's nodes; None where nobody knows."""


@dataclass(frozen=True)
class Asked:
    """What a job asks Slurm for beside its section of the site file; see `script.Job`."""

    warned: bool = False
    requeue: bool = False
    after: str | None = None
    array: Array | None = None


@dataclass(frozen=True)
class Plan:
    """A job that could be submitted."""

    site: Site
    spec: JobSpec
    """The site's section, with the walltime that the job asks for."""
    job: Job
    template: Template | None
    """The user's own script, with envbuilder's parts to be filled in."""
    walltime: Walltime
    wishes: Wishes

    @property
    def name(self) -> str:
        """The job's name without the prefix that all of them have."""
        return self.job.name.removeprefix(PREFIX)

    @property
    def script(self) -> str:
        """What sbatch gets."""
        return render_script(self.site, self.spec, self.job, self.template)

    @property
    def own_options(self) -> tuple[str, ...]:
        """The options of its section that the template sets otherwise, as "--NAME"."""
        options = [f"--{name}" for name in self.spec.sbatch_options]
        return tuple(name for name in options if self.template and self.template.overrides(name))


def plan_compile(
    recipe_path: Path, recipe_name: str, site: Site, root: Root, flags: Sequence[str], wishes: Wishes
) -> Plan:
    """`envbuilder compile RECIPE --local` with `flags`, under the site's [build] section.

    The compute node runs this very interpreter and envbuilder, so both must lie where it can see them.
    """
    more = ("--requeue-job",) if wishes.requeue else ()
    words = ("compile", str(recipe_path.absolute()), "--local", *flags, *more)
    return _plan(site, site.build, f"compile-{recipe_name}", words, root, wishes)


def plan_train(
    config: Path, run_name: str, site: Site, root: Root, flags: Sequence[str], wishes: Wishes
) -> Plan:
    """`envbuilder train CONFIG` with `flags`, under the site's [train] section."""
    more = ("--requeue-job",) if wishes.requeue else ()
    words = ("train", str(config.absolute()), "--run", run_name, *flags, *more)
    return _plan(site, site.train, f"train-{run_name}", words, root, wishes)


def plan_sweep(
    sweep: Sweep, array: Array, site: Site, root: Root, flags: Sequence[str], wishes: Wishes
) -> Plan:
    """An array of jobs, each of which trains one member of `sweep`, under the site's [train] section.

    `flags` are those of the command that name the sweep, and how it is trained.
    """
    offset = ("--first", str(array.first)) if array.first else ()
    more = ("--requeue-job",) if wishes.requeue else ()
    words = ("sweep-member", sweep.config, "--name", sweep.name, *flags, *offset, *more)
    return _plan(site, site.train, f"sweep-{sweep.name}", words, root, wishes, array)


def _plan(
    site: Site,
    spec: JobSpec,
    name: str,
    words: Sequence[str],
    root: Root,
    wishes: Wishes,
    array: Array | None = None,
) -> Plan:
    """A job that is told of its end, and may run itself again."""
    if wishes.after is not None and not re.fullmatch(r"\d+(_\d+)?", wishes.after):
        raise UsageError(
            f"{wishes.after!r} is no job's number.",
            remedy="Give --after the number that squeue --me shows.",
        )
    asked = Asked(warned=True, requeue=wishes.requeue, after=wishes.after, array=array)
    template = template_of(site)
    told = template.options.get("time") if template else None
    if told is not None:
        spec = spec.model_copy(update={"walltime": told})
    site_s = seconds_of(spec.walltime)
    if site_s is None:
        raise InputError(
            f"The template {site.template} asks for a time that is not understood: {told}.",
            remedy='Write it as HH:MM:SS or D-HH:MM:SS: "#SBATCH --time=00:30:00"',
            context={"template": site.template},
        )
    walltime = planned_walltime(spec, wishes.estimate_s)
    if told is not None:
        walltime = replace(walltime, seconds=site_s)
    if walltime.seconds != site_s:
        spec = spec.model_copy(update={"walltime": slurm_time(walltime.seconds)})
    return Plan(site, spec, job_of(name, self_words(root, words), root, asked), template, walltime, wishes)


def template_of(site: Site) -> Template | None:
    """The site's script template; None where it has none."""
    return read_template(Path(site.template)) if site.template else None


def tell_walltime(plan: Plan, reporter: Reporter, again: str) -> None:
    """Says so where one job won't do for the work. `again` is the command that was typed."""
    estimate_s, wishes = plan.wishes.estimate_s, plan.wishes
    if plan.walltime.jobs == 1 or estimate_s is None:
        return
    parts = f"{plan.walltime.jobs} {'lives of this job' if wishes.requeue else 'jobs'}"
    reporter.warn(
        f"the work is expected to take {spoken(estimate_s)}, and a job may run for "
        f"{spoken(plan.walltime.seconds)}: it will continue over {parts}"
    )
    if wishes.may_requeue and not wishes.requeue:
        reporter.warn(f"to have the job run itself again until all is done: {again} --requeue")


def self_words(root: Root, words: Sequence[str]) -> tuple[str, ...]:
    """The command line of this very envbuilder with `words`."""
    return own_command("--root", str(root.path), *words)


def job_of(name: str, command: Sequence[str], root: Root, asked: Asked) -> Job:
    """The job `name` that runs `command` in the current folder; SlurmError where it could have no log."""
    folder = scripts_folder(root)
    if odd := re.search(r'["%\\\n]', str(folder)):
        raise SlurmError(
            f"Slurm can't write a job's log under {folder}: the path holds {odd[0]!r}.",
            remedy="Give a root without quotes, backslashes and per cent signs: envbuilder --root ROOT …",
            context={"folder": folder},
        )
    return Job(
        f"{PREFIX}{name}",
        tuple(command),
        Path.cwd(),
        folder / (f"{name}-%A_%a.log" if asked.array else f"{name}-%j.log"),
        warned=asked.warned,
        requeue=asked.requeue,
        after=asked.after,
        array=asked.array,
    )

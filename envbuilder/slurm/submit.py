"""Handing a job to Slurm."""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.atomic import make_folder, write_atomically
from envbuilder.errors import MismatchError, SlurmError, UsageError
from envbuilder.paths import Root
from envbuilder.process import run
from envbuilder.report import Reporter
from envbuilder.site import JobSpec, Site, load_site
from envbuilder.slurm.preflight import check_qos_is_free, planned_walltime, wait_for_qos
from envbuilder.slurm.rejections import rejection_error
from envbuilder.slurm.script import Job, render_script
from envbuilder.slurm_queries import PREFIX
from envbuilder.slurm_time import seconds_of, slurm_time, spoken

# sbatch gives the job its own environment. These alone go along, so that a job is what its script says, and
# not what happened to be loaded and set in the shell that it was submitted from.
_PASSED_ON = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "SLURM_CONF", "SBATCH_ACCOUNT")
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True, slots=True)
class Submitted:
    """A job that Slurm has taken."""

    id: str
    script: Path
    log: Path
    """Where its output comes, once it runs."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a job asks Slurm for beside its section of the site file; see `script.Job`."""

    warned: bool = False
    requeue: bool = False
    after: str | None = None


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a job is to be submitted, beside what the site says."""

    requeue: bool = False
    """It runs itself again until all is done (for compile: `--requeue-job`)."""
    after: str | None = None
    """Id of a job that must have ended before it starts."""
    wait_for_qos: bool = False
    """Where its QoS takes no further job now, wait until it does."""
    estimate_s: float | None = None
    """Seconds that the work is expected to take on the site's nodes; None where nobody knows."""


def submit_compile(
    recipe_path: Path,
    recipe_name: str,
    site_name: str,
    root: Root,
    flags: Sequence[str],
    *,
    reporter: Reporter,
    again: str,
    wishes: Wishes | None = None,
) -> Submitted:
    """Submits `envbuilder compile RECIPE --local` with `flags`, under the site's [build] section.

    The compute node runs this very interpreter and envbuilder, so both must lie where it can see them.
    `again` is the command that was typed, for what is said before submitting.

    Raises, beside what `submit` raises, SlurmError where the QoS takes no further job now.
    """
    wishes = wishes or Wishes()
    if wishes.after is not None and not re.fullmatch(r"\d+", wishes.after):
        raise UsageError(
            f"{wishes.after!r} is no job's number.",
            remedy="Give --after the number that squeue --me shows.",
        )
    site = load_site(site_name)
    _find_sbatch()  # Said before anything is waited for.
    spec = _with_walltime(site.build, wishes, reporter, again)
    if wishes.wait_for_qos:
        wait_for_qos(spec, reporter)
    else:
        check_qos_is_free(spec, again)
    more = ("--requeue-job",) if wishes.requeue else ()
    words = _self_words(root, ("compile", str(recipe_path.absolute()), "--local", *flags, *more))
    job = Asked(warned=True, requeue=wishes.requeue, after=wishes.after)
    return submit(site, spec, f"compile-{recipe_name}", words, root=root, asked=job)


def _with_walltime(spec: JobSpec, wishes: Wishes, reporter: Reporter, again: str) -> JobSpec:
    """`spec` with the walltime that the estimate asks for; says so where one job won't do."""
    planned = planned_walltime(spec, wishes.estimate_s)
    if planned.jobs > 1 and wishes.estimate_s is not None:
        parts = f"{planned.jobs} {'lives of this job' if wishes.requeue else 'jobs'}"
        reporter.warn(
            f"the work is expected to take {spoken(wishes.estimate_s)}, and a job may run for "
            f"{spoken(planned.seconds)}: it will continue over {parts}"
        )
        if not wishes.requeue:
            reporter.warn(f"to have the job run itself again until all is done: {again} --requeue")
    if planned.seconds == seconds_of(spec.walltime):
        return spec
    return spec.model_copy(update={"walltime": slurm_time(planned.seconds)})


def submit_probe(site_name: str, output: Path, root: Root, flags: Sequence[str]) -> Submitted:
    """Submits `envbuilder probe --output OUTPUT` with `flags`, under the site's [build] section.

    `output` must lie where the compute node can write it.
    """
    site = load_site(site_name)
    words = _self_words(root, ("probe", "--output", str(output.absolute()), *flags))
    return submit(site, site.build, "probe", words, root=root)


def _self_words(root: Root, words: Sequence[str]) -> tuple[str, ...]:
    return (sys.executable, "-m", "envbuilder", "--root", str(root.path), *words)


def submit(
    site: Site,
    spec: JobSpec,
    name: str,
    command: Sequence[str],
    *,
    root: Root,
    asked: Asked | None = None,
) -> Submitted:
    """Writes the script of a job that runs `command` in the current folder, and hands it to sbatch.

    Raises MismatchError where there is no sbatch, SlurmError where Slurm refuses the job.
    """
    folder = root.logs / "slurm"
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    script, log = folder / f"{stem}.sh", folder / f"{name}-%j.log"
    if odd := re.search(r'["%\\\n]', str(folder)):
        raise SlurmError(
            f"Slurm can't write a job's log under {folder}: the path holds {odd[0]!r}.",
            remedy="Give a root without quotes, backslashes and per cent signs: envbuilder --root ROOT …",
            context={"folder": folder},
        )
    make_folder(folder)  # Where a log's folder is missing, Slurm ends the job without a word.
    asked = asked or Asked()
    job = Job(
        f"{PREFIX}{name}",
        tuple(command),
        Path.cwd(),
        log,
        warned=asked.warned,
        requeue=asked.requeue,
        after=asked.after,
    )
    write_atomically(script, render_script(site, spec, job))
    job_id = _sbatch(script, spec)
    return Submitted(job_id, script, Path(str(log).replace("%j", job_id)))


def _find_sbatch() -> str:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise MismatchError(
            "There is no sbatch on this machine, so it is no login node of a Slurm cluster.",
            remedy="Run this on a login node, or the command without --sbatch on a compute node.",
            context={"PATH": os.environ.get("PATH", "")},
        )
    return sbatch


def _sbatch(script: Path, spec: JobSpec) -> str:
    sbatch = _find_sbatch()
    completed = run((sbatch, "--parsable", script), env=_job_environment(os.environ, Path(sbatch).parent))
    # A site's submit plugin may write lines of its own; "ID;CLUSTER" comes from a federation.
    job_ids = re.findall(r"^(\d+)(?:;\S+)?$", completed.output, re.MULTILINE)
    if completed.returncode != 0 or not job_ids:
        raise rejection_error(completed.output, spec)
    return str(job_ids[-1])


def _job_environment(environ: Mapping[str, str], slurm_programs: Path) -> dict[str, str]:
    passed = {name: environ[name] for name in _PASSED_ON if name in environ}
    return {**passed, "PATH": f"{_SYSTEM_PATH}:{slurm_programs}"}

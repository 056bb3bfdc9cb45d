"""Handing a job to Slurm."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import TypeAdapter

from envbuilder.atomic import make_folder, write_atomically
from envbuilder.errors import MismatchError
from envbuilder.paths import Root
from envbuilder.process import Completed, run
from envbuilder.report import Reporter
from envbuilder.site import JobSpec, Site, load_site
from envbuilder.slurm.plan import Asked, Plan, job_of, self_words, tell_walltime, template_of
from envbuilder.slurm.preflight import (
    check_qos_is_free,
    check_run_is_free,
    scripts_folder,
    tell_account,
    wait_for_qos,
)
from envbuilder.slurm.rejections import rejection_error
from envbuilder.slurm.script import Array, Job, render_script
from envbuilder.slurm.work import TRAINING, work_of

# sbatch gives the job its own environment. These alone go along, so that a job is what its script says, and
# not what happened to be loaded and set in the shell that it was submitted from.
_PASSED_ON = ("HOME", "USER", "LOGNAME", "SHELL", "LANG", "SLURM_CONF", "SBATCH_ACCOUNT")
_SYSTEM_PATH = "/usr/local/bin:/usr/bin:/bin"


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm has taken."""

    id: str
    script: Path
    log: Path
    """Where its output comes, once it runs; of an array's tasks, with `*` for the index."""


def submit_planned(plan: Plan, root: Root, reporter: Reporter, again: str) -> Submitted:
    """Submits `plan` when its QoS takes it. `again` is the command that was typed, for what is said before.

    Raises, beside what `submit` raises, SlurmError where a job for this run waits or runs already, and where
    the QoS takes no further job now.
    """
    find_sbatch()  # Said before anything is waited for.
    if work_of(plan.name) is TRAINING and plan.job.array is None:
        check_run_is_free(plan.name, root, after=plan.wishes.after)
    tell_walltime(plan, reporter, again)
    tell_account(plan.site, plan.spec, reporter)
    if plan.wishes.wait_for_qos:
        wait_for_qos(plan.spec, root, reporter)
    else:
        check_qos_is_free(plan.spec, root, again)
    return _hand_over(plan.name, plan.script, plan.spec, plan.job, root, again)


def submit_probe(site_name: str, output: Path, root: Root, flags: Sequence[str]) -> Submitted:
    """Submits `envbuilder probe --output OUTPUT` with `flags`, under the site's [build] section.

    `output` must lie where the compute node can write it.
    """
    site = load_site(site_name)
    words = self_words(root, ("probe", "--output", str(output.absolute()), *flags))
    return submit(site, site.build, "probe", words, root=root)


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
    job = job_of(name, command, root, asked or Asked())
    return _hand_over(name, render_script(site, spec, job, template_of(site)), spec, job, root, None)


def _hand_over(name: str, script: str, spec: JobSpec, job: Job, root: Root, again: str | None) -> Submitted:
    folder = scripts_folder(root)
    path = folder / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.sh"
    make_folder(folder)  # Where a log's folder is missing, Slurm ends the job without a word.
    write_atomically(path, script)
    job_id = _sbatch(path, spec)
    log = str(job.log).replace("%j", job_id).replace("%A", job_id)
    array = asdict(job.array) if job.array else None
    record = {"command": again, "log": log, "array": array}
    write_atomically(_record_path(root, job_id), json.dumps(record) + "\n")
    return Submitted(job_id, path, Path(log.replace("%a", "*")))


def _record_path(root: Root, job_id: str) -> Path:
    return scripts_folder(root) / f"job-{array_id(job_id)}.json"


def array_id(job_id: str) -> str:
    """The array of the task `job_id` ("123_4"); of any other job its own id."""
    return job_id.partition("_")[0]


def submitted_with(root: Root, job_id: str) -> str | None:
    """The command that submitted the job, as it was typed; None where it isn't known."""
    command = _recorded(root, job_id, "command")
    return str(command) if command else None


def log_of_submitted(root: Root, job_id: str) -> Path | None:
    """Where the log of a job that was submitted under this ROOT is, or will be; None where it wasn't."""
    log = _recorded(root, job_id, "log")
    return Path(str(log).replace("%a", job_id.partition("_")[2])) if log else None


def array_of(root: Root, job_id: str) -> Array | None:
    """The array that `job_id` is; None where it is none, or not of this ROOT."""
    if job_id != array_id(job_id):
        return None
    try:
        return TypeAdapter(Array).validate_python(_recorded(root, job_id, "array"))
    except ValueError:
        return None


def _recorded(root: Root, job_id: str, key: str) -> object:
    try:
        found: object = json.loads(_record_path(root, job_id).read_bytes())[key]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found


def find_sbatch() -> str:
    """The path of sbatch; MismatchError where there is none."""
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise MismatchError(
            "There is no sbatch on this machine, so it is no login node of a Slurm cluster.",
            remedy="Run this on a login node, or the command without --sbatch on a compute node.",
            context={"PATH": os.environ.get("PATH", "")},
        )
    return sbatch


def run_sbatch(*words: str | Path) -> Completed:
    """Runs sbatch with `words`, and with those variables alone that a job is to start with."""
    sbatch = find_sbatch()
    return run((sbatch, *words), env=_job_environment(os.environ, Path(sbatch).parent))


def _sbatch(script: Path, spec: JobSpec) -> str:
    completed = run_sbatch("--parsable", script)
    # A site's submit plugin may write lines of its own; "ID;CLUSTER" comes from a federation.
    job_ids = re.findall(r"^(\d+)(?:;\S+)?$", completed.output, re.MULTILINE)
    if completed.returncode != 0 or not job_ids:
        raise rejection_error(completed.output, spec)
    return str(job_ids[-1])


def _job_environment(environ: Mapping[str, str], slurm_programs: Path) -> dict[str, str]:
    passed = {name: environ[name] for name in _PASSED_ON if name in environ}
    return {**passed, "PATH": f"{_SYSTEM_PATH}:{slurm_programs}"}

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
from envbuilder.errors import MismatchError, SlurmError
from envbuilder.paths import Root
from envbuilder.process import run
from envbuilder.slurm.rejections import rejection_error
from envbuilder.slurm.script import Job, render_script
from envbuilder.slurm.site import JobSpec, Site, load_site

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


def submit_compile(
    recipe_path: Path, recipe_name: str, site_name: str, root: Root, flags: Sequence[str]
) -> Submitted:
    """Submits `envbuilder compile RECIPE --local` with `flags`, under the site's [build] section.

    The compute node runs this very interpreter and envbuilder, so both must lie where it can see them.
    """
    words = ("compile", str(recipe_path.absolute()), "--local", *flags)
    return _submit_self(site_name, f"compile-{recipe_name}", words, root=root)


def submit_probe(site_name: str, output: Path, root: Root, flags: Sequence[str]) -> Submitted:
    """Submits `envbuilder probe --output OUTPUT` with `flags`, under the site's [build] section.

    `output` must lie where the compute node can write it.
    """
    return _submit_self(site_name, "probe", ("probe", "--output", str(output.absolute()), *flags), root=root)


def _submit_self(site_name: str, name: str, words: Sequence[str], *, root: Root) -> Submitted:
    site = load_site(site_name)
    tool = (sys.executable, "-m", "envbuilder", "--root", str(root.path))
    return submit(site, site.build, name, (*tool, *words), root=root)


def submit(site: Site, spec: JobSpec, name: str, command: Sequence[str], *, root: Root) -> Submitted:
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
    job = Job(f"envbuilder-{name}", tuple(command), Path.cwd(), log)
    write_atomically(script, render_script(site, spec, job))
    job_id = _sbatch(script, spec)
    return Submitted(job_id, script, Path(str(log).replace("%j", job_id)))


def _sbatch(script: Path, spec: JobSpec) -> str:
    sbatch = shutil.which("sbatch")
    if sbatch is None:
        raise MismatchError(
            "There is no sbatch on this machine, so it is no login node of a Slurm cluster.",
            remedy="Run this on a login node, or the command without --sbatch on a compute node.",
            context={"PATH": os.environ.get("PATH", "")},
        )
    completed = run((sbatch, "--parsable", script), env=_job_environment(os.environ, Path(sbatch).parent))
    # A site's submit plugin may write lines of its own; "ID;CLUSTER" comes from a federation.
    job_ids = re.findall(r"^(\d+)(?:;\S+)?$", completed.output, re.MULTILINE)
    if completed.returncode != 0 or not job_ids:
        raise rejection_error(completed.output, spec)
    return str(job_ids[-1])


def _job_environment(environ: Mapping[str, str], slurm_programs: Path) -> dict[str, str]:
    passed = {name: environ[name] for name in _PASSED_ON if name in environ}
    return {**passed, "PATH": f"{_SYSTEM_PATH}:{slurm_programs}"}

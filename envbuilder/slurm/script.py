"""The batch script of a job, as text. Pure: the same site and job give the same script."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from envbuilder.site import JobSpec, Site
from envbuilder.slurm.walltime import warning_s
from envbuilder.slurm_time import seconds_of


@dataclass(frozen=True, slots=True)
class Job:
    """What a batch job runs, and where it writes."""

    name: str
    command: tuple[str, ...]
    """The program and its arguments; the program takes the script's place, so it gets the job's signals."""
    workdir: Path
    """Absolute; seen by the compute nodes."""
    log: Path
    """Absolute; `%j` stands for the job's id. stdout and stderr, and every life of a job that is requeued."""
    warned: bool = False
    """The command gets SIGUSR1 some time before its time ends, and stops in good order."""
    requeue: bool = False
    """Slurm may run the job again: when a node fails, and when the job asks for it."""
    after: str | None = None
    """Id of a job that must have ended, well or not, before this one starts."""


# Environment Modules and Lmod, in the places where they and the distributions put them.
_MODULE_INIT = (
    "/etc/profile.d/modules.sh",
    "/etc/profile.d/lmod.sh",
    "/etc/profile.d/z00_lmod.sh",
    "/usr/share/modules/init/bash",
    "/usr/share/lmod/lmod/init/bash",
)


def render_script(site: Site, spec: JobSpec, job: Job) -> str:
    """The script that sbatch gets for `job` under `spec`, one of the site's sections."""
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(spec, job)),
        "",
        f"# Site {site.name}. A job starts without the submitter's variables: what it needs stands here.",
        *site.setup,
        *_module_lines(site),
        "set -euo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, value in site.env.items()),
        *_scratch_lines(site),
        f"cd -- {shlex.quote(str(job.workdir))}",
        f"exec {shlex.join(job.command)}",
    ]
    return "\n".join(lines) + "\n"


def _options(spec: JobSpec, job: Job) -> list[str]:
    options = {
        "job-name": job.name,
        **spec.sbatch_options,
        "output": f'"{job.log}"',
        "open-mode": "append",
        # B: to the batch shell alone, whose place the command takes.
        "signal": f"B:USR1@{warning_s(seconds_of(spec.walltime) or 0)}" if job.warned else None,
        "dependency": f"afterany:{job.after}" if job.after else None,
    }
    flags = ["--requeue"] if job.requeue else []
    return [*(f"--{name}={value}" for name, value in options.items() if value is not None), *flags]


def _module_lines(site: Site) -> list[str]:
    if not site.modules:
        return []
    # A batch shell is not a login shell: it has no `module` until the init file is read. That file and
    # `module` itself stumble over `set -eu`, so both come before it and are checked by hand.
    return [
        f"for init in {' '.join(_MODULE_INIT)}; do",
        "    if ! type module >/dev/null 2>&1 && [ -r $init ]; then . $init; fi",
        "done",
        "if ! type module >/dev/null 2>&1; then",
        f"    echo 'envbuilder: this node has no module command; add the line that makes it to setup in the"
        f" site file of {site.name}' >&2",
        "    exit 7",
        "fi",
        *(
            f"module load {module} || {{ echo 'envbuilder: module {module} does not load; see: module avail'"
            " >&2; exit 7; }"
            for module in site.modules
        ),
    ]


def _scratch_lines(site: Site) -> list[str]:
    if site.scratch is None:
        return []
    # In double quotes, so that $USER and $SLURM_JOB_ID become the job's; a command substitution does not.
    quoted = site.scratch.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`").replace("$(", "\\$(")
    return [f'export TMPDIR="{quoted}"', 'mkdir -p -- "$TMPDIR"']

"""The batch script of a job, as text. Pure: the same site, job and template give the same script."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import MismatchError
from envbuilder.site import JobSpec, Site
from envbuilder.slurm.template import Template, head_options
from envbuilder.slurm.walltime import warning_s
from envbuilder.slurm_time import seconds_of
from envbuilder.sweep import ranges


@dataclass(frozen=True)
class Array:
    """The jobs of an array, one for each of some members of a sweep."""

    sweep: str
    """The sweep's name."""
    members: tuple[int, ...]
    """Their numbers, rising."""
    first: int = 0
    """The number of the member that the array's index 0 stands for: indices have a limit."""
    at_once: int | None = None
    """How many may run at the same time; None: as many as Slurm lets."""
    later: int = 0
    """How many members more are to be trained, in arrays that come later."""

    @property
    def option(self) -> str:
        """What --array gets."""
        most = f"%{self.at_once}" if self.at_once else ""
        return ranges(number - self.first for number in self.members) + most


@dataclass(frozen=True)
class Job:
    """What a batch job runs, and where it writes."""

    name: str
    command: tuple[str, ...]
    """The program and its arguments; the program takes the script's place, so it gets the job's signals."""
    workdir: Path
    """Absolute; seen by the compute nodes."""
    log: Path
    """Absolute; `%j` stands for the job's id, in an array `%A` for the array's and `%a` for the index.
    stdout and stderr, and every life of a job that is requeued."""
    warned: bool = False
    """The command gets SIGUSR1 some time before its time ends, and stops in good order."""
    requeue: bool = False
    """Slurm may run the job again: when a node fails, and when the job asks for it."""
    after: str | None = None
    """Id of a job that must have ended, well or not, before this one starts."""
    array: Array | None = None
    """Where it is many jobs of one script."""


# Environment Modules and Lmod, in the places where they and the distributions put them.
_MODULE_INIT = (
    "/etc/profile.d/modules.sh",
    "/etc/profile.d/lmod.sh",
    "/etc/profile.d/z00_lmod.sh",
    "/usr/share/modules/init/bash",
    "/usr/share/Modules/init/bash",
    "/usr/share/lmod/lmod/init/bash",
)

# In the form in which envbuilder's own errors are read from a job's log.
_GIVE_UP = (
    """give_up() { printf 'envbuilder: %s\\nremedy: %s\\n' "$1" "$2" >&2; """
    f"exit {MismatchError.exit_code}; }}"
)

# What a script is where the user has no template of their own.
_OWN = "#!/bin/bash\n{{sbatch}}\n\n{{environment}}\n{{command}}\n"


def render_script(site: Site, spec: JobSpec, job: Job, template: Template | None = None) -> str:
    """The script that sbatch gets for `job` under `spec`, one of the site's sections.

    What `template` itself asks sbatch for counts, in place of what `spec` does. Raises InputError where it
    takes from the job what every job of envbuilder's needs: its name, its log, and the signal before its end.
    """
    own = template or Template(Path("envbuilder's own"), _OWN)
    needed = _own_options(spec, job)
    # A login node's limits (`ulimit -t`, `-v`) would go along with the job.
    options = [f"--job-name={job.name}", "--propagate=NONE", *spec.sbatch_words, *needed[1:]]
    script = own.fill(
        {
            "sbatch": "\n".join(f"#SBATCH {option}" for option in options if not own.overrides(option)),
            "environment": "\n".join(_environment_lines(site, job)),
            # Its place, not a child: Slurm's signal is for it.
            "command": f"exec {shlex.join(job.command)}",
            "name": job.name,
            "log": str(job.log),
        }
    )
    if template is not None:
        lines = "\n".join(f"#SBATCH {option}" for option in needed)
        template.check_head(script, head_options(lines))
    return script


def _environment_lines(site: Site, job: Job) -> list[str]:
    return [
        f"# Site {site.name}. A job starts without the submitter's variables: what it needs stands here.",
        *site.setup,
        *_module_lines(site),
        "set -euo pipefail",
        *(f"export {name}={shlex.quote(value)}" for name, value in site.variables.items()),
        *_scratch_lines(site),
        f"cd -- {shlex.quote(str(job.workdir))}",
    ]


def _own_options(spec: JobSpec, job: Job) -> list[str]:
    """What a job asks for whatever its section says; the name is the first."""
    about = {
        "output": f'"{job.log}"',
        "open-mode": "append",
        # B: to the batch shell alone, whose place the command takes.
        "signal": f"B:USR1@{warning_s(seconds_of(spec.walltime) or 0)}" if job.warned else None,
        "array": job.array.option if job.array else None,
        "dependency": f"afterany:{job.after}" if job.after else None,
    }
    flags = ["--requeue"] if job.requeue else []
    return [
        f"--job-name={job.name}",
        *(f"--{name}={value}" for name, value in about.items() if value is not None),
        *flags,
    ]


def _module_lines(site: Site) -> list[str]:
    if not site.modules:
        return []
    # A batch shell is not a login shell: it has no `module` until the init file is read. That file and
    # `module` itself stumble over `set -eu`, so both come before it and are checked by hand.
    return [
        f"for init in {' '.join(_MODULE_INIT)}; do",
        "    if ! type module >/dev/null 2>&1 && [ -r $init ]; then . $init; fi",
        "done",
        _GIVE_UP,
        "type module >/dev/null 2>&1 || give_up 'This node has no module command.' 'Add the line that makes "
        f"it to setup in the site file of {site.name}; on many clusters: . /etc/profile'",
        *(
            f"module load {module} || give_up 'The module {module} does not load.' 'See what there is: "
            f"module avail; with Lmod, what it needs first: module spider {module}'"
            for module in site.modules
        ),
    ]


def _scratch_lines(site: Site) -> list[str]:
    if site.scratch is None:
        return []
    # In double quotes, so that $USER and $SLURM_JOB_ID become the job's; a command substitution does not.
    quoted = site.scratch.replace("\\", "\\\\").replace('"', '\\"').replace("`", "\\`").replace("$(", "\\$(")
    return [f'export TMPDIR="{quoted}"', 'mkdir -p -- "$TMPDIR"']

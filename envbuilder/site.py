"""The site: a cluster's queues, modules and paths, as TOML. Parses and validates; touches nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from envbuilder.toml_input import EnvName, Table, load_table, pattern

SITES = Path("recipes/sites")
"""Where a site given by its name is looked for, in the current folder."""

# What stands in an #SBATCH line must not end it or begin another option.
SlurmName = Annotated[str, pattern(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*", "a name that Slurm can have")]
Walltime = Annotated[str, pattern(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", 'a time such as "00:30:00" or "1-12:00:00"')]
Memory = Annotated[str, pattern(r"[1-9]\d*[MGT]", 'an amount of memory per node such as "64G"')]
ModuleName = Annotated[str, pattern(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*", "a module's name")]
ShellLine = Annotated[str, pattern(r"[^\n\r\0]+", "one line of shell")]


class JobSpec(Table):
    """`[build]` or `[train]`: what a job of that kind asks Slurm for, on one node."""

    partition: SlurmName
    account: SlurmName | None = None
    """Without one: $SBATCH_ACCOUNT, else the user's default account."""
    qos: SlurmName | None = None
    walltime: Walltime
    cpus: Annotated[int, Field(ge=1)]
    memory: Memory
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_request: Literal["gres", "typed-gres", "gpus-per-node", "none"] = "none"
    """How GPUs are asked for: --gres=gpu:N, --gres=gpu:TYPE:N, --gpus-per-node=N, or not at all."""
    gpu_type: SlurmName | None = None
    """The TYPE of `typed-gres`, e.g. "a100"."""

    @model_validator(mode="after")
    def _gpus_can_be_asked_for(self) -> JobSpec:
        if (self.gpus > 0) != (self.gpu_request != "none"):
            raise ValueError('gpus goes with gpu-request = "gres", "typed-gres" or "gpus-per-node"')
        if (self.gpu_type is not None) != (self.gpu_request == "typed-gres"):
            raise ValueError('gpu-type goes with gpu-request = "typed-gres", and only with it')
        return self

    @property
    def sbatch_options(self) -> dict[str, str]:
        """Name → value of the options that ask sbatch for it."""
        options = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "time": self.walltime,
            "nodes": "1",
            "ntasks": "1",
            "cpus-per-task": str(self.cpus),
            "mem": self.memory,
            **self._gpu_option,
        }
        return {name: value for name, value in options.items() if value is not None}

    @property
    def _gpu_option(self) -> dict[str, str]:
        match self.gpu_request:
            case "gres":
                return {"gres": f"gpu:{self.gpus}"}
            case "typed-gres":
                return {"gres": f"gpu:{self.gpu_type}:{self.gpus}"}
            case "gpus-per-node":
                return {"gpus-per-node": str(self.gpus)}
            case "none":
                return {}


class Site(Table):
    """A site file. `load_site` reads one."""

    name: SlurmName
    description: str = ""
    build: JobSpec
    train: JobSpec
    setup: tuple[ShellLine, ...] = ()
    """Shell lines that a job runs first, e.g. to make the `module` command."""
    modules: tuple[ModuleName, ...] = ()
    """Loaded in this order, after `setup`."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """Variables for every job, taken literally, after the modules."""
    scratch: ShellLine | None = None
    """Folder for a job's temporary files (TMPDIR), made on the node; shell variables are expanded there."""


def load_site(name_or_path: str) -> Site:
    """The site `recipes/sites/NAME.toml`, or that in the file at a path (what has a slash or ends in .toml).

    Raises InputError where there is none, naming the sites that there are, or where a key is wrong.
    """
    is_path = "/" in name_or_path or name_or_path.endswith(".toml")
    path = Path(name_or_path) if is_path else SITES / f"{name_or_path}.toml"
    there = sorted(str(site) for site in SITES.glob("*.toml"))
    example = " or ".join(there) or str(SITES / "generic.toml")
    return load_table(path, Site, example=example, manual="docs/sites.md")

"""The site: a cluster's queues, modules and paths, as TOML. Parses and validates; touches nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from envbuilder.toml_input import AbsolutePath, EnvName, Table, load_table, pattern

SITES = Path("recipes/sites")
"""Where a site given by its name is looked for, in the current folder."""

# What stands in an #SBATCH line must not end it or begin another option.
SlurmName = Annotated[str, pattern(r"[A-Za-z0-9_][A-Za-z0-9_.,@+-]*", "a name that Slurm can have")]
Walltime = Annotated[str, pattern(r"(\d+-)?\d{1,2}:\d{2}:\d{2}", 'a time such as "00:30:00" or "1-12:00:00"')]
Memory = Annotated[str, pattern(r"[1-9]\d*[MGT]", 'an amount of memory per node such as "64G"')]
# What sbatch makes of features: & and | between them, brackets, *N.
Constraint = Annotated[
    str, pattern(r"[A-Za-z0-9_(\[][A-Za-z0-9_.,:@&|()\[\]*+-]*", "a constraint of Slurm's")
]
# One option of an #SBATCH line, long and with its value; blanks and quotes would make it another thing.
SbatchOption = Annotated[
    str,
    pattern(r"""--[a-z][a-z0-9-]*(=[^\s"'\\#]+)?""", 'an option of sbatch such as "--hint=nomultithread"'),
]
Interfaces = Annotated[
    str,
    pattern(
        r"[A-Za-z0-9][A-Za-z0-9_.:-]*(,[A-Za-z0-9][A-Za-z0-9_.:-]*)*", 'a network interface such as "ib0"'
    ),
]
# Without a user and password: they would stand in every job's script and log.
Proxy = Annotated[
    str,
    pattern(r"(http|https|socks5h?)://[A-Za-z0-9_.\[\]:-]+/?", 'a proxy\'s URL such as "http://proxy:3128"'),
]
ProxyException = Annotated[str, pattern(r"[A-Za-z0-9_.*:/\[\]-]+", 'a host or domain such as ".example.org"')]
NodeSuffix = Annotated[str, pattern(r"[A-Za-z0-9.-]+", 'the end of a host name such as "-ib0"')]
ModuleName = Annotated[str, pattern(r"[A-Za-z0-9_][A-Za-z0-9_.+/-]*", "a module's name")]
ShellLine = Annotated[str, pattern(r"[^\n\r\0]+", "one line of shell")]

NODE_SUFFIX_VARIABLE = "ENVBUILDER_NODE_SUFFIX"
"""Carries `node-suffix` into a job."""

# Of every job's script, whatever the site: where it writes, how it is told of its end, and what runs again.
_OWN_OPTIONS = (
    *("array", "chdir", "dependency", "error", "exclusive", "export", "export-file", "help", "input"),
    *("job-name", "no-requeue", "open-mode", "output", "parsable", "requeue", "signal", "test-only", "usage"),
    *("version", "wait", "wrap"),
)


_THIS_MACHINE = ("localhost", "127.0.0.1", "::1")


def in_bytes(memory: str) -> int:
    """The bytes of an amount such as "64G"."""
    return int(memory[:-1]) * {"M": 2**20, "G": 2**30, "T": 2**40}[memory[-1]]


class JobSpec(Table):
    """`[build]` or `[train]`: what a job of that kind asks for; cpus, memory and gpus are of each node."""

    partition: SlurmName | None = None
    """Without one: the cluster's default, or the one that qos or constraint lead to."""
    account: SlurmName | None = None
    """Without one: $SBATCH_ACCOUNT, else the user's default account."""
    qos: SlurmName | None = None
    constraint: Constraint | None = None
    """Features that the nodes must have, e.g. "gpu&hbm80g"."""
    reservation: SlurmName | None = None
    exclusive: bool = False
    """The nodes are this job's alone."""
    walltime: Walltime
    nodes: Annotated[int, Field(ge=1)] = 1
    """More than one only under `[train]`."""
    cpus: Annotated[int, Field(ge=1)] = 0
    """What `cpus_per_gpu` comes to, where that is given in its place."""
    cpus_per_gpu: Annotated[int, Field(ge=1)] | None = None
    """For sites whose rule is a number of CPUs for each GPU."""
    memory: Memory | None = None
    """Without it no --mem is asked for: the cluster gives its default, or the whole node's."""
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu_request: Literal["gres", "typed-gres", "gpus-per-node", "none"] = "none"
    """How GPUs are asked for: --gres=gpu:N, --gres=gpu:TYPE:N, --gpus-per-node=N, or not at all."""
    gpu_type: SlurmName | None = None
    """The TYPE of `typed-gres`, e.g. "a100"."""
    gpu_memory: Memory | None = None
    """Of each GPU, so that a login node can tell whether a model fits."""
    extra_sbatch: tuple[SbatchOption, ...] = ()
    """Further options for sbatch, taken literally; none that has a key here, or is envbuilder's own."""

    @property
    def gpu_memory_bytes(self) -> int | None:
        """`gpu_memory` in bytes."""
        return None if self.gpu_memory is None else in_bytes(self.gpu_memory)

    @model_validator(mode="after")
    def _gpus_can_be_asked_for(self) -> JobSpec:
        if (self.gpus > 0) != (self.gpu_request != "none"):
            raise ValueError('gpus goes with gpu-request = "gres", "typed-gres" or "gpus-per-node"')
        if (self.gpu_type is not None) != (self.gpu_request == "typed-gres"):
            raise ValueError('gpu-type goes with gpu-request = "typed-gres", and only with it')
        return self

    @model_validator(mode="after")
    def _cpus_are_said_once(self) -> JobSpec:
        if (self.cpus_per_gpu is None) == (self.cpus == 0):
            raise ValueError("cpus or cpus-per-gpu: one of them is needed, and not both")
        if self.cpus_per_gpu is not None:
            if self.gpus == 0:
                raise ValueError("cpus-per-gpu goes with gpus")
            # Asked for as cpus-per-task: srun and torchrun read that, and no --cpus-per-gpu of sbatch's.
            object.__setattr__(self, "cpus", self.cpus_per_gpu * self.gpus)
        return self

    @model_validator(mode="after")
    def _extra_options_are_not_asked_for_already(self) -> JobSpec:
        for option in self.extra_sbatch:
            name = option[2:].partition("=")[0]
            # sbatch takes the beginning of a name for the name.
            if taken := next(
                (own for own in (*_OWN_OPTIONS, *self.sbatch_options) if own.startswith(name)), None
            ):
                raise ValueError(f"extra-sbatch holds {option}, and envbuilder sets --{taken} itself")
        return self

    @property
    def sbatch_words(self) -> tuple[str, ...]:
        """The options that ask sbatch for it, as they stand on a command line."""
        return (
            *(f"--{name}={value}" for name, value in self.sbatch_options.items()),
            *(("--exclusive",) if self.exclusive else ()),
            *self.extra_sbatch,
        )

    @property
    def sbatch_options(self) -> dict[str, str]:
        """Name → value of those options that have a key and a value."""
        options: dict[str, str | None] = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "constraint": self.constraint,
            "reservation": self.reservation,
            "time": self.walltime,
            "nodes": str(self.nodes),
            "ntasks": str(self.nodes),
            "ntasks-per-node": "1" if self.nodes > 1 else None,
            "cpus-per-task": str(self.cpus),
            "mem": self.memory,
            **self._gpu_option,
        }
        return {name: value for name, value in options.items() if value is not None}

    @property
    def _gpu_option(self) -> dict[str, str]:
        asked: dict[str, dict[str, str]] = {
            "gres": {"gres": f"gpu:{self.gpus}"},
            "typed-gres": {"gres": f"gpu:{self.gpu_type}:{self.gpus}"},
            "gpus-per-node": {"gpus-per-node": str(self.gpus)},
            "none": {},
        }
        return asked[self.gpu_request]


class LoginBudget(Table):
    """`[login]`: what a login node lets one user take; commands there keep within it."""

    cpu_seconds: Annotated[int, Field(ge=1)] | None = None
    """CPU time after which a process is killed, e.g. 600."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """Cores that a command may keep busy."""
    memory: Memory | None = None
    """Address space or resident memory after which a process is killed."""

    @property
    def memory_bytes(self) -> int | None:
        """`memory` in bytes."""
        return None if self.memory is None else in_bytes(self.memory)


class Site(Table):
    """A site file. `load_site` reads one."""

    name: SlurmName
    description: str = ""
    build: JobSpec
    train: JobSpec
    login: LoginBudget = LoginBudget()
    shared_folder: AbsolutePath | None = None
    """Where a group keeps what its members publish (`envbuilder publish`, `envbuilder use`)."""
    shared_group: SlurmName | None = None
    """The Unix group that may read it; without one, the group of `shared-folder`."""
    purge_days: Annotated[int, Field(ge=1)] | None = None
    """Days without use after which the disk that ROOT is on loses a file."""
    allow_chain: bool = False
    """Whether the cluster's rules let a job put itself back into the queue until its work is done."""
    account_command: ShellLine | None = None
    """Shell line that shows what is left of the user's budget; run before a job is submitted."""
    template: ShellLine | None = None
    """The user's own batch script, with markers for what envbuilder puts in; beside the site file."""
    proxy: Proxy | None = None
    """For jobs that need one; a job of envbuilder's own needs no network."""
    no_proxy: tuple[ProxyException, ...] = ()
    """Hosts that are reached without it, beside this machine."""
    setup: tuple[ShellLine, ...] = ()
    """Shell lines that a job runs first, e.g. to make the `module` command."""
    modules: tuple[ModuleName, ...] = ()
    """Loaded in this order, after `setup`."""
    env: dict[EnvName, str] = Field(default_factory=dict)
    """Variables for every job, taken literally, after the modules."""
    socket_ifname: Interfaces | None = None
    """Network interface by which gloo and NCCL meet (GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME)."""
    node_suffix: NodeSuffix | None = None
    """Added to Slurm's name of a node, for the name by which the others reach it on that network."""
    scratch: ShellLine | None = None
    """Folder for a job's temporary files (TMPDIR), made on the node; shell variables are expanded there."""

    @model_validator(mode="after")
    def _builds_take_one_node(self) -> Site:
        if self.build.nodes > 1:
            raise ValueError("a build runs on one node: nodes stands under [train] alone")
        return self

    @model_validator(mode="after")
    def _exceptions_are_of_a_proxy(self) -> Site:
        if self.no_proxy and self.proxy is None:
            raise ValueError("no-proxy goes with proxy")
        return self

    @property
    def _proxy_variables(self) -> dict[str, str | None]:
        # Some programs read the one spelling, some the other. What listens on this machine is never proxied.
        apart = ",".join((*_THIS_MACHINE, *self.no_proxy)) if self.proxy else None
        named = {"HTTP_PROXY": self.proxy, "HTTPS_PROXY": self.proxy, "NO_PROXY": apart}
        return named | {name.lower(): value for name, value in named.items()}

    @property
    def variables(self) -> dict[str, str]:
        """What a job's script sets: the network's, then `env`, which has the last word."""
        network = self._proxy_variables | {
            "GLOO_SOCKET_IFNAME": self.socket_ifname,
            "NCCL_SOCKET_IFNAME": self.socket_ifname,
            NODE_SUFFIX_VARIABLE: self.node_suffix,
        }
        return {**{name: value for name, value in network.items() if value is not None}, **self.env}


def load_site(name_or_path: str) -> Site:
    """The site `recipes/sites/NAME.toml`, or that in the file at a path (what has a slash or ends in .toml).

    Raises InputError where there is none, naming the sites that there are, or where a key is wrong.
    """
    is_path = "/" in name_or_path or name_or_path.endswith(".toml")
    path = Path(name_or_path) if is_path else SITES / f"{name_or_path}.toml"
    there = sorted(str(site) for site in SITES.glob("*.toml"))
    example = " or ".join(there) or str(SITES / "generic.toml")
    site = load_table(path, Site, example=example, manual="docs/sites.md")
    if site.template is None:
        return site
    return site.model_copy(update={"template": str(path.parent / site.template)})

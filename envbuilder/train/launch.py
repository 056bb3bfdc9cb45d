"""The trainer's command line and the variables that it runs with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from envbuilder.gpu import list_gpus
from envbuilder.sandbox import without_cuda_runtime
from envbuilder.train.allocation import Allocation, cpus_here
from envbuilder.train.kernel_cache import KernelCache
from envbuilder.train.network import nccl_log_variables

# They would bring other code, another place in another job, or a stranger's network name into the run.
_DROPPED = re.compile(
    r"PYTHON\w*|VIRTUAL_ENV|(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)|MASTER_(ADDR|PORT)|TORCHELASTIC_\w*"
)


def visible_gpus(environ: Mapping[str, str]) -> int:
    """GPUs that a process started here would see: by CUDA_VISIBLE_DEVICES, else Slurm, else nvidia-smi."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        # CUDA takes the list up to the first entry that is none: "-1" and "NoDevFiles" hide all GPUs.
        entries = [entry.strip() for entry in visible.split(",")]
        ends = (i for i, entry in enumerate(entries) if not re.fullmatch(r"\d+|(GPU|MIG)-.+", entry))
        return next(ends, len(entries))
    if environ.get("SLURM_GPUS_ON_NODE", "").isdigit():
        return int(environ["SLURM_GPUS_ON_NODE"])
    return len(list_gpus().devices)


def command_line(
    python: tuple[str, ...], config: Path, run: Path, processes: int, overrides: tuple[str, ...]
) -> tuple[str, ...]:
    """What runs the trainer on one node: torchrun for several ranks, the trainer itself for one."""
    launcher: tuple[str, ...] = ()
    if processes > 1:
        # --local-addr: without it the workers look for rank 0 under the host's own name, and hang for
        # minutes on a node that can't resolve it.
        launcher = (*_torchrun(run, processes), "--standalone", "--local-addr", "127.0.0.1")
    return (*python, *launcher, *_trainer(config, run, overrides))


def node_command_line(
    python: tuple[str, ...],
    config: Path,
    run: Path,
    processes: int,
    overrides: tuple[str, ...],
    *,
    meeting: Allocation,
    number: int,
    name: str,
) -> tuple[str, ...]:
    """What runs on node `number` of several, which the others call `name`: a torchrun that meets theirs."""
    return (
        *python, *_torchrun(run, processes), "--nnodes", str(meeting.nodes),
        "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{meeting.first}:{meeting.port}",
        "--rdzv-id", meeting.meeting,
        # Told and not guessed: host names and Slurm's node names need not be the same.
        "--rdzv-conf", f"is_host={int(number == 0)}", "--local-addr", name,
        *_trainer(config, run, overrides),
    )  # fmt: skip


def step_command_line(node_program: tuple[str, ...], nodes: int, cpus: str | None) -> tuple[str, ...]:
    """The Slurm step that runs `node_program` once on each node of this job.

    `cpus` are those of each task: a step does not have them from its job by itself.
    """
    return (
        "srun", f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1",
        *([f"--cpus-per-task={cpus}"] if cpus else []),
        "--cpu-bind=none", "--kill-on-bad-exit=1", *node_program,
    )  # fmt: skip


def _torchrun(run: Path, processes: int) -> tuple[str, ...]:
    return (
        "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--max-restarts", "0",
        "--log-dir", str(run / "ranks"), "--tee", "3",
    )  # fmt: skip


def _trainer(config: Path, run: Path, overrides: tuple[str, ...]) -> tuple[str, ...]:
    settings = (word for override in overrides for word in ("--set", override))
    return ("-m", "trainer", str(config), "--run-dir", str(run), *settings)


def environment(
    environ: Mapping[str, str],
    *,
    run: Path,
    cache: KernelCache,
    processes: int,
    one_node: bool = True,
    keep_cuda_libraries: bool = False,
) -> dict[str, str]:
    """The run's variables: the caller's, less what would bring in other code, and nothing from a network.

    Of LD_LIBRARY_PATH, folders with a CUDA runtime are left out unless `keep_cuda_libraries`, as for builds:
    they would shadow the libraries that torch's wheels bring.
    """
    kept = {name: value for name, value in environ.items() if not _DROPPED.fullmatch(name)}
    if not keep_cuda_libraries:
        libraries = without_cuda_runtime(kept.pop("LD_LIBRARY_PATH", ""))
        kept |= {"LD_LIBRARY_PATH": libraries} if libraries else {}
    if one_node:
        # gloo would resolve the host's name to choose an interface.
        kept["GLOO_SOCKET_IFNAME"] = "lo"
    else:
        kept |= nccl_log_variables(kept, run)
    return {
        **kept,
        "ENVBUILDER_RUN": str(run),
        "PYTHONNOUSERSITE": "1",
        # Or a folder called `trainer` where the command is typed would be imported, not the env's.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "USE_HUB_KERNELS": "0",
        "OMP_NUM_THREADS": str(max(1, cpus_here() // processes)),
        **cache.variables,
    }

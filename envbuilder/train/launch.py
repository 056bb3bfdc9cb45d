"""The trainer's command line and the variables that it runs with."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from envbuilder.gpu import list_gpus

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
    python: Path, config: Path, run: Path, processes: int, overrides: tuple[str, ...]
) -> tuple[str, ...]:
    """What runs the trainer: torchrun for several ranks, the trainer itself for one."""
    launcher: tuple[str, ...] = ()
    if processes > 1:
        # --local-addr: without it the workers look for rank 0 under the host's own name, and hang for
        # minutes on a node that can't resolve it.
        launcher = (
            "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
            "--nproc-per-node", str(processes), "--max-restarts", "0",
            "--log-dir", str(run / "ranks"), "--tee", "3",
        )  # fmt: skip
    trainer = ("-m", "trainer", str(config), "--run-dir", str(run))
    settings = (word for override in overrides for word in ("--set", override))
    return (str(python), *launcher, *trainer, *settings)


def environment(environ: Mapping[str, str], *, run: Path, cache: Path, processes: int) -> dict[str, str]:
    """The run's variables: the caller's, less what would bring in other code, and nothing from a network."""
    kept = {name: value for name, value in environ.items() if not _DROPPED.fullmatch(name)}
    return {
        **kept,
        "ENVBUILDER_RUN": str(run),
        "PYTHONNOUSERSITE": "1",
        # Or a folder called `trainer` where the command is typed would be imported, not the env's.
        "PYTHONSAFEPATH": "1",
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "USE_HUB_KERNELS": "0",
        "OMP_NUM_THREADS": str(max(1, len(os.sched_getaffinity(0)) // processes)),
        "TRITON_CACHE_DIR": str(cache),
        # All ranks are on this node; gloo would resolve the host's name to choose an interface.
        "GLOO_SOCKET_IFNAME": "lo",
    }

"""A checkpoint's folder: everything that resuming needs, whole or not there.

    DIR/checkpoints/step-000020/
        adapter.safetensors     the adapters, fp32
        optimizer.safetensors   the optimizer's moments
        rng.safetensors         every process's random number generators
        state.json              step, losses, number of processes, what decides the data's order, the stamp
        COMMITTED               size and sha256 of the four files, written last

A folder is filled under a temporary name and renamed when it is complete. The data position is the step
times the global batch size, the learning rate a function of the step, so neither needs a file. `saving.py`
writes checkpoints while training goes on.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.files import fsync_folder, sha256, write_atomically
from trainer.parallel import World
from trainer.stamp import Stamp

COMMITTED = "COMMITTED"
TENSOR_FILES = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors")
STATE = "state.json"
FILES = (*TENSOR_FILES, STATE)
TEMPORARY = ".tmp-"

Tensors = dict[str, Tensor]
"""Name → tensor, of one file."""


@dataclass(frozen=True)
class State:
    """Where training stands."""

    step: int
    first_loss: float
    last_loss: float
    processes: int
    settings: dict[str, Any]
    """Config key → value: what a run must keep when it goes on, see `resuming.py`."""
    stamp: Stamp = field(default_factory=dict)
    times: dict[str, float | None] = field(default_factory=dict)
    """What the governor measured, for the next job."""
    recent_losses: list[float] = field(default_factory=list)
    steps_above: int = 0
    """Both `divergence.py`'s."""


def write_checkpoint(place: Path, state: State, tensors: Sequence[Tensors]) -> None:
    """Writes the folder `place`; `tensors` on the CPU, in the order of TENSOR_FILES.

    Raises OSError or SafetensorError, and leaves nothing then.
    """
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=TEMPORARY))
    try:
        for name, content in zip(TENSOR_FILES, tensors, strict=True):
            save_file(content, temporary / name)
        (temporary / STATE).write_text(json.dumps(asdict(state)) + "\n")
        for name in FILES:
            handle = os.open(temporary / name, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        digests = {
            name: {"size": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
            for name in FILES
        }
        write_atomically(temporary / COMMITTED, json.dumps(digests, indent=1) + "\n")
        temporary.chmod(0o750)
        if place.exists():  # a checkpoint of this step that was found damaged, and passed by when resuming
            remove_checkpoint(place)
        temporary.rename(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(place.parent)


def remove_checkpoint(checkpoint: Path) -> None:
    """Renamed first: at no moment is there a committed checkpoint with files missing."""
    aside = Path(tempfile.mkdtemp(dir=checkpoint.parent, prefix=TEMPORARY))
    checkpoint.rename(aside / checkpoint.name)
    shutil.rmtree(aside)


def optimizer_tensors(adapters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Tensors:
    """The optimizer's state, named after the adapters; where it lies."""
    return {
        f"{name}:{key}": value
        for name, parameter in adapters.items()
        for key, value in optimizer.state[parameter].items()
    }


def generator_states(device: torch.device) -> Tensors:
    """This process's random number generators."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states


def committed(folder: Path) -> list[Path]:
    """Checkpoints with their marker, newest first."""
    return sorted((mark.parent for mark in folder.glob(f"step-*/{COMMITTED}")), reverse=True)


def step_of(checkpoint: Path) -> int:
    """The step that the checkpoint was made after."""
    return int(checkpoint.name.removeprefix("step-"))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a committed checkpoint's files, or None: every byte is hashed."""
    try:
        digests = json.loads((checkpoint / COMMITTED).read_bytes())
        for name in FILES:
            size = (checkpoint / name).stat().st_size
            if size != digests[name]["size"]:
                return f"{name} has {size} bytes, not {digests[name]['size']}"
            if sha256(checkpoint / name) != digests[name]["sha256"]:
                return f"{name} was changed"
    except (OSError, ValueError, KeyError, TypeError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return None


def newest_sound(folder: Path, warn: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose bytes are right; each damaged one passed by is named to `warn`."""
    for checkpoint in committed(folder):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        warn(f"checkpoint {checkpoint.name} is damaged ({problem}), going on from the one before")
    return None


def remove_unfinished(folder: Path) -> None:
    """Removes what an interrupted run left half-written."""
    for left in folder.glob(f"{TEMPORARY}*"):
        shutil.rmtree(left, ignore_errors=True)


def read_state(checkpoint: Path) -> State:
    """The checkpoint's state. Raises ConfigError if another version of the trainer wrote it."""
    try:
        return State(**json.loads((checkpoint / STATE).read_bytes()))
    except TypeError as problem:
        raise ConfigError(
            f"The checkpoint {checkpoint.name} is of another version of the trainer: {problem}",
            remedy="go on with the version that began the run, or give the run another name",
            context={"checkpoint": checkpoint},
        ) from problem


def load_checkpoint(
    checkpoint: Path,
    state: State,
    adapters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    world: World,
) -> None:
    """Puts adapters, optimizer and generators back. Raises ConfigError if it is of other adapters."""
    tensors = load_file(checkpoint / TENSOR_FILES[0])
    shapes = {name: tuple(parameter.shape) for name, parameter in adapters.items()}
    if shapes != {name: tuple(tensor.shape) for name, tensor in tensors.items()}:
        raise ConfigError(
            f"The checkpoint {checkpoint.name} is of another model or peft section than the config's.",
            remedy="start another run, or go back to this one's config.yaml, beside the checkpoints",
            context={"checkpoint": checkpoint},
        )
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(tensors[name])
    _load_optimizer(load_file(checkpoint / TENSOR_FILES[1]), adapters, optimizer)
    if state.processes == world.size:  # another number of processes draws new dropout masks
        generators = load_file(checkpoint / TENSOR_FILES[2])
        torch.set_rng_state(generators[f"{world.rank}.cpu"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(generators[f"{world.rank}.cuda"], world.device)


def _load_optimizer(
    moments: Tensors, adapters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> None:
    """Through the optimizer's own loading, which knows what it wants on which device."""
    names = {parameter: name for name, parameter in adapters.items()}
    in_order = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
    of_name: dict[str, Tensors] = {}
    for full, tensor in moments.items():
        name, _, key = full.rpartition(":")
        of_name.setdefault(name, {})[key] = tensor
    optimizer.load_state_dict(
        {
            "state": {number: of_name[name] for number, name in enumerate(in_order)},
            "param_groups": optimizer.state_dict()["param_groups"],
        }
    )

"""Checkpoints: everything that resuming needs, whole or not there.

    DIR/checkpoints/step-000020/
        adapter.safetensors     the adapters, fp32
        optimizer.safetensors   the optimizer's moments
        rng.safetensors         every process's random number generators
        state.json              step, losses, number of processes
        COMMITTED               size and sha256 of the four files, written last

A folder is filled under a temporary name and renamed when it is complete. The data position is the step
times the global batch size, the learning rate a function of the step, so neither needs a file.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from trainer.errors import ConfigError
from trainer.files import fsync_folder, sha256, write_atomically
from trainer.parallel import World

COMMITTED = "COMMITTED"
FILES = ("adapter.safetensors", "optimizer.safetensors", "rng.safetensors", "state.json")
TEMPORARY = ".tmp-"


@dataclass(frozen=True)
class State:
    """Where training stands."""

    step: int
    global_batch_size: int
    first_loss: float
    last_loss: float
    processes: int
    seed: int


def save_checkpoint(
    folder: Path,
    state: State,
    adapters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    keep_last: int,
) -> Path:
    """Rank 0 writes `folder/step-N` and removes the oldest beyond `keep_last`. All processes call it.

    Raises TrainingFailed on every process if the writing fails.
    """
    generators = world.gather(_generator_states(world.device))
    place = folder / f"step-{state.step:06d}"

    def write() -> None:
        _write(place, state, adapters, optimizer, generators)
        for old in committed(folder)[keep_last:]:
            shutil.rmtree(old)

    world.write_on_first(f"The checkpoint of step {state.step}", folder, write)
    return place


def _write(
    place: Path,
    state: State,
    adapters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    generators: list[dict[str, Tensor]],
) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    if place.exists():  # a checkpoint of this step that was found damaged, and passed by when resuming
        shutil.rmtree(place)
    temporary = Path(tempfile.mkdtemp(dir=place.parent, prefix=TEMPORARY))
    try:
        save_file({name: p.detach().cpu() for name, p in adapters.items()}, temporary / FILES[0])
        save_file(_optimizer_tensors(adapters, optimizer), temporary / FILES[1])
        ranked = {
            f"{rank}.{kind}": tensor for rank, own in enumerate(generators) for kind, tensor in own.items()
        }
        save_file(ranked, temporary / FILES[2])
        (temporary / FILES[3]).write_text(json.dumps(asdict(state)) + "\n")
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
        temporary.rename(place)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(place.parent)


def committed(folder: Path) -> list[Path]:
    """Checkpoints with their marker, newest first."""
    return sorted((mark.parent for mark in folder.glob(f"step-*/{COMMITTED}")), reverse=True)


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


def load_checkpoint(
    checkpoint: Path,
    adapters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    world: World,
    *,
    global_batch_size: int,
    seed: int,
) -> State:
    """Puts adapters, optimizer and generators back. Raises ConfigError if it is of another training."""
    state = State(**json.loads((checkpoint / FILES[3]).read_bytes()))
    tensors = load_file(checkpoint / FILES[0], device=str(world.device))
    shapes = {name: tuple(parameter.shape) for name, parameter in adapters.items()}
    same_adapters = shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    if not same_adapters or (state.global_batch_size, state.seed) != (global_batch_size, seed):
        what = "global_batch_size or seed" if same_adapters else "model or peft section"
        raise ConfigError(
            f"The checkpoint {checkpoint.name} was made with another {what} than the config's.",
            remedy="start another run, or go back to this one's config.yaml, beside the checkpoints",
            context={"checkpoint": checkpoint},
        )
    moments = load_file(checkpoint / FILES[1], device=str(world.device))
    with torch.no_grad():
        for name, parameter in adapters.items():
            parameter.copy_(tensors[name])
            optimizer.state[parameter] = {
                "step": moments[f"{name}:step"].cpu(),
                "exp_avg": moments[f"{name}:exp_avg"],
                "exp_avg_sq": moments[f"{name}:exp_avg_sq"],
            }
    if state.processes == world.size:  # another number of processes draws new dropout masks
        generators = load_file(checkpoint / FILES[2])
        torch.set_rng_state(generators[f"{world.rank}.cpu"])
        if world.device.type == "cuda":
            torch.cuda.set_rng_state(generators[f"{world.rank}.cuda"], world.device)
    return state


def _optimizer_tensors(
    adapters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    return {
        f"{name}:{key}": value.detach().cpu()
        for name, parameter in adapters.items()
        for key, value in optimizer.state[parameter].items()
    }


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return states

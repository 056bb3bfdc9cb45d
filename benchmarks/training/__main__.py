"""One contestant's turn: `python -m benchmarks.training WORK.json RESULT.json`, alone or under torchrun."""

from __future__ import annotations

import importlib
import itertools
import os
import resource
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from benchmarks.training.work import Measured, Work
from trainer.__main__ import OFFLINE

os.environ.update(OFFLINE)
warnings.simplefilter("ignore")

import torch  # noqa: E402

MODULES = {
    "ours": "ours",
    "peft": "with_peft",
    "peft-autocast": "with_peft",
    "nemo": "with_nemo",
    "played": "played",
}


class Contestant(Protocol):
    """A model on its device with its adapters, optimizer and data."""

    device: torch.device
    processes: int
    trainable: int
    precision: str

    @property
    def notes(self) -> list[str]:
        """What is to be told beside the figures, at the end."""

    def step(self, number: int) -> None:
        """One optimizer step over one batch, counted from 1. May return before the GPU is done."""

    def losses(self) -> list[float]:
        """The mean loss for a token, of the steps so far."""


def main() -> None:
    work = Work.read(Path(sys.argv[1]))
    begin = time.perf_counter()
    module = importlib.import_module(f"benchmarks.training.{MODULES[work.contestant]}")
    with module.contestant(work) as contestant:
        synchronize(contestant.device)
        prepared = time.perf_counter() - begin
        first = seconds_of([lambda: contestant.step(1)], contestant.device)[0]
        for number in range(2, work.warmup + 1):
            contestant.step(number)
        todo = range(work.warmup + 1, work.warmup + work.steps + 1)
        seconds = seconds_of(
            [lambda number=number: contestant.step(number) for number in todo],
            contestant.device,
            work.deadline,
        )
        if os.environ.get("RANK", "0") == "0":
            measured(work, contestant, prepared, first, seconds).write(Path(sys.argv[2]))
        if work.profile:
            from benchmarks.training.profile import profile_steps

            after = work.warmup + len(seconds)
            profile_steps(work, contestant, [after + 1, after + 2], sorted(seconds)[len(seconds) // 2])


def seconds_of(
    steps: list[Callable[[], None]], device: torch.device, deadline: float = float("inf")
) -> list[float]:
    """How long each step took, without waiting for the GPU between them; at least the first is run."""
    synchronize(device)
    marks = [mark(device)]
    for number, step in enumerate(steps):
        if number and time.time() > deadline:
            break
        step()
        marks.append(mark(device))
    synchronize(device)
    return [between(earlier, later) for earlier, later in itertools.pairwise(marks)]


def mark(device: torch.device) -> torch.cuda.Event | float:
    """A moment: on a GPU, when it reaches this place."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(earlier: torch.cuda.Event | float, later: torch.cuda.Event | float) -> float:
    """Seconds."""
    if isinstance(earlier, torch.cuda.Event):
        return earlier.elapsed_time(later) / 1000
    assert isinstance(later, float)
    return later - earlier


def synchronize(device: torch.device) -> None:
    """Waits until the GPU has done all it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measured(
    work: Work, contestant: Contestant, prepared: float, first: float, seconds: list[float]
) -> Measured:
    from importlib.metadata import PackageNotFoundError, version

    def named(package: str) -> str:
        try:
            return f"{package} {version(package)}"
        except PackageNotFoundError:
            return f"no {package}"

    device = contestant.device
    on_gpu = device.type == "cuda"
    packages = ["transformers", "peft", "triton", "mamba-ssm", "causal-conv1d"]
    if work.contestant == "nemo":
        packages.append("nemo-automodel")
    return Measured(
        contestant=work.contestant,
        machine=f"{contestant.processes} x {torch.cuda.get_device_name(device)}, driver {driver()}"
        if on_gpu
        else f"CPU, {torch.get_num_threads()} threads",
        versions=", ".join([f"torch {torch.__version__}", *map(named, packages)]),
        precision=contestant.precision,
        trainable=contestant.trainable,
        prepare_seconds=prepared,
        first_step_seconds=first,
        step_seconds=seconds,
        tokens_per_step=work.batch * work.seq_length * contestant.processes,
        peak_bytes=torch.cuda.max_memory_allocated(device)
        if on_gpu
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        reserved_bytes=torch.cuda.max_memory_reserved(device) if on_gpu else 0,
        losses=contestant.losses(),
        notes=contestant.notes,
    )


def driver() -> str:
    """The NVIDIA driver's version."""
    try:
        return Path("/sys/module/nvidia/version").read_text().strip()
    except OSError:
        return "unknown"


if __name__ == "__main__":
    main()

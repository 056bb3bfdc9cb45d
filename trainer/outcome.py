"""How far a run came and how it ended: `outcome.json`, the only source of its exit code."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from trainer.errors import TrainerError
from trainer.files import write_atomically
from trainer.stamp import Stamp

Status = Literal["finished", "stopped", "failed"]


@dataclass
class Progress:
    """How far the run came, kept up to date while it trains."""

    steps: int = 0
    first_loss: float | None = None
    """Of the run's very first step, also after a resume."""
    last_loss: float | None = None
    first_step_seconds: float | None = None
    """Of this process's first step: kernels are compiled and tuned in it."""
    peak_memory_bytes: int | None = None
    """The largest of all processes: GPU memory on CUDA, resident memory on a CPU."""
    adapter: str | None = None
    tokens: int = 0
    """Of this process's steps after the first, over all ranks, without padding."""
    seconds: float = 0.0
    """Of the same steps."""
    steps_total: int | None = None
    """How many the whole training has."""
    seconds_left: float | None = None
    """Of training and validation, by the steps measured; without starting up."""
    jobs_left: int | None = None
    """How many more jobs of this one's length that takes."""
    job_seconds: float | None = None
    """The job's length, where its end is known."""
    stamp: Stamp = field(default_factory=dict)
    """What the run was started on, see `stamp.py`."""

    @property
    def tokens_per_second(self) -> float | None:
        """The mean over this process's steps, the first left out."""
        return self.tokens / self.seconds if self.seconds else None


def write_outcome(
    run_dir: Path,
    status: Status,
    progress: Progress,
    error: TrainerError | None = None,
    *,
    stopped_by_file: bool = False,
) -> None:
    """Writes `outcome.json` atomically; the last thing that a run does."""
    outcome = {
        "status": status,
        "stopped_by_file": stopped_by_file,
        "exit_code": error.exit_code if error else 0,
        "error": error.described() if error else None,
        "first_loss": progress.first_loss,
        "last_loss": progress.last_loss,
        "steps": progress.steps,
        "tokens_per_second": progress.tokens_per_second,
        "peak_memory_bytes": progress.peak_memory_bytes,
        "first_step_seconds": progress.first_step_seconds,
        "adapter": progress.adapter,
        "steps_total": progress.steps_total,
        "seconds_left": progress.seconds_left,
        "jobs_left": progress.jobs_left,
        "job_seconds": progress.job_seconds,
        "stamp": progress.stamp,
    }
    write_atomically(run_dir / "outcome.json", json.dumps(outcome, indent=1) + "\n")

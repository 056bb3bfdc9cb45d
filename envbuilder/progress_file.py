"""How far a job is, in a small file that its submitter reads: what a batch job has in place of a terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from pydantic import TypeAdapter

from envbuilder.atomic import new_file
from envbuilder.errors import MismatchError
from envbuilder.paths import Root

STARTING = "starting"
"""The first stage: nothing is counted yet."""
DONE = "done"
"""The last stage: a job that wrote it did all that it was asked for."""


@dataclass(frozen=True)
class Progress:
    """What a progress file says."""

    done: int
    """Units that are ready, those that an earlier life of the job made among them."""
    total: int
    running: tuple[str, ...]
    """Names of the units that are being worked on."""
    seconds_left: float | None
    """Of wall time; None where nobody can say."""
    stage: str
    """A few words, e.g. "building causal-conv1d 1.7.0"."""
    updated: str
    """ISO 8601, UTC."""
    figures: str = ""
    """What else is measured, in words, e.g. "loss 1.2345, 900 tokens/s"."""
    life: int = 1
    """How often the job has been started, this time too."""
    node: str = ""
    """Where it runs, by Slurm's name; of several nodes the first."""
    ended: int | None = None
    """The exit code with which this life ended; None while it goes on."""


def own_job_id() -> str | None:
    """The id of the Slurm job that this process runs in, as squeue shows it; None outside of a job.

    A task of an array has, beside it, a number of its own, which nobody is shown: its id is ARRAY_INDEX.
    """
    array, index = os.environ.get("SLURM_ARRAY_JOB_ID", ""), os.environ.get("SLURM_ARRAY_TASK_ID", "")
    if array.isdigit() and index.isdigit():
        return f"{array}_{index}"
    job_id = os.environ.get("SLURM_JOB_ID", "")
    return job_id if job_id.isdigit() else None


def progress_path(root: Root, job_id: str) -> Path:
    """Where the Slurm job `job_id` writes its progress."""
    return root.logs / "slurm" / f"progress-{job_id}.json"


def job_progress(root: Root) -> ProgressFile | None:
    """Where this Slurm job writes its progress; None outside of a job."""
    job_id = own_job_id()
    if job_id is None:
        return None
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    life = 1 + (int(restarts) if restarts.isdigit() else 0)
    return ProgressFile(progress_path(root, job_id), life=life, node=os.environ.get("SLURMD_NODENAME", ""))


class ProgressFile:
    """The writer. May be called from any thread, as the file is replaced whole each time."""

    def __init__(self, path: Path, *, life: int = 1, node: str = "") -> None:
        self._path, self._life, self._node = path, life, node

    def begin(self) -> None:
        """Says that this life of the job has begun; what an earlier one did stays counted."""
        self._write_again(stage=STARTING)

    def write(
        self,
        *,
        done: int,
        total: int,
        running: Sequence[str] = (),
        seconds_left: float | None = None,
        stage: str = "",
        figures: str = "",
        ended: int | None = None,
    ) -> None:
        """Replaces the file. Where that can't be done nothing happens: no build is lost over its progress."""
        content = {
            "done": done,
            "total": total,
            "running": list(running),
            "seconds_left": seconds_left if seconds_left is None or math.isfinite(seconds_left) else None,
            "stage": stage,
            "figures": figures,
            "life": self._life,
            "node": self._node,
            "ended": ended,
            "updated": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }
        data = (json.dumps(content) + "\n").encode()
        with suppress(OSError, MismatchError), new_file(self._path, size=len(data), durable=False) as file:
            file.write(data)

    def finish(self) -> None:
        """Says that the job did all that it was asked for."""
        last = read_progress(self._path)
        done, figures = (last.done, last.figures) if last else (0, "")
        self.write(done=done, total=done, seconds_left=0.0, stage=DONE, figures=figures)

    def end(self, exit_code: int) -> None:
        """Says that this life has ended with `exit_code`: the last word, after all that is in the log."""
        last = read_progress(self._path)
        self._write_again(stage=last.stage if last else "", ended=exit_code)

    def _write_again(self, *, stage: str, ended: int | None = None) -> None:
        last = read_progress(self._path)
        done, total, figures = (last.done, last.total, last.figures) if last else (0, 0, "")
        self.write(done=done, total=total, stage=stage, figures=figures, ended=ended)


def read_progress(path: Path) -> Progress | None:
    """What was written last; None where there is no such file, or where it isn't one."""
    try:
        return TypeAdapter(Progress).validate_json(path.read_bytes())
    except (OSError, ValueError):
        return None

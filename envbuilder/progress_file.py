"""How far a job is, in a small file that its submitter reads: what a batch job has in place of a terminal."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from envbuilder.atomic import new_file
from envbuilder.errors import MismatchError
from envbuilder.paths import Root

DONE = "done"
"""The last stage: a job that wrote it did all that it was asked for."""


@dataclass(frozen=True, slots=True)
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


def progress_path(root: Root, job_id: str) -> Path:
    """Where the Slurm job `job_id` writes its progress."""
    return root.logs / "slurm" / f"progress-{job_id}.json"


def job_progress(root: Root) -> ProgressFile | None:
    """Where this Slurm job writes its progress; None outside of a job."""
    job_id = os.environ.get("SLURM_JOB_ID", "")
    return ProgressFile(progress_path(root, job_id)) if job_id.isdigit() else None


class ProgressFile:
    """The writer. May be called from any thread, as the file is replaced whole each time."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def write(
        self,
        *,
        done: int,
        total: int,
        running: Sequence[str] = (),
        seconds_left: float | None = None,
        stage: str = "",
    ) -> None:
        """Replaces the file. Where that can't be done nothing happens: no build is lost over its progress."""
        content = {
            "done": done,
            "total": total,
            "running": list(running),
            "seconds_left": seconds_left if seconds_left is None or math.isfinite(seconds_left) else None,
            "stage": stage,
            "updated": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        data = (json.dumps(content) + "\n").encode()
        with suppress(OSError, MismatchError), new_file(self._path, size=len(data), durable=False) as file:
            file.write(data)

    def finish(self) -> None:
        """Says that the job did all that it was asked for."""
        last = read_progress(self._path)
        done = last.done if last else 0
        self.write(done=done, total=done, seconds_left=0.0, stage=DONE)


def read_progress(path: Path) -> Progress | None:
    """What was written last; None where there is no such file, or where it isn't one."""
    try:
        match json.loads(path.read_bytes()):
            case {
                "done": int(done),
                "total": int(total),
                "running": list(running),
                "seconds_left": int() | float() | None as seconds_left,
                "stage": str(stage),
                "updated": str(updated),
            }:
                names = tuple(str(name) for name in running)
                return Progress(done, total, names, seconds_left, stage, updated)
    except (OSError, ValueError):
        pass
    return None

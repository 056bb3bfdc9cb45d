"""What a run tells: a JSON object a line in `metrics.jsonl`, a few plain lines for people. Rank 0 only."""

from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Literal

import torch

from trainer.config import LoggingSection
from trainer.curves import KINDS, CurveWriter, numbers_of, open_writers

Kind = Literal["start", "job", "step", "validation", "checkpoint", "sample", "note", "end"]


class Metrics:
    """Appends to the run's `metrics.jsonl`, and to other curves as `logging` says.

    Silent on other ranks than the first. Raises EnvironmentMismatch where `logging` demands a package that
    isn't there.
    """

    def __init__(self, run_dir: Path, *, rank: int, logging: LoggingSection) -> None:
        self._curves: list[CurveWriter] = []
        missing: list[str] = []
        if rank == 0:
            self._curves, missing = open_writers(run_dir, logging)
        self._file = (run_dir / "metrics.jsonl").open("a", encoding="utf-8") if rank == 0 else None
        if missing:
            self.say(f"no curves for {' and '.join(missing)}: add the package to the recipe's requirements")

    def write(self, kind: Kind, **fields: object) -> None:
        """One record, with the time in seconds since 1970."""
        if self._file is not None:
            self._file.write(json.dumps({"kind": kind, **fields, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()
        step = fields.get("step")
        if kind in KINDS and isinstance(step, int):
            for curves in self._curves:
                curves.write(step, numbers_of(kind, fields))

    def say(self, text: str) -> None:
        """One line on the console."""
        if self._file is not None:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Something the user may want to know, in both places."""
        self.write("note", text=text)
        self.say(f"note: {text}")

    def close(self) -> None:
        """Nothing is written after this."""
        if self._file is not None:
            self._file.close()
        for curves in self._curves:
            curves.close()


def memory_bytes(device: torch.device) -> int:
    """Peak memory of this process so far: allocated on the GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

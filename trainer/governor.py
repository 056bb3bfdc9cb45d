"""The walltime: when a run must stop so that its checkpoint is written before the job's end.

The end comes from `--ends-at`, else from `ENVBUILDER_JOB_END`, both in seconds since 1970; without either
the run has no end to keep. Times are the longest of the recent ones and a fifth more. Rank 0 asks, and all
processes stop at the same step boundary.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from trainer.errors import ConfigError

END_VARIABLE = "ENVBUILDER_JOB_END"
BEGIN_VARIABLE = "SLURM_JOB_START_TIME"
RECENT = 50
PESSIMISM = 1.2
SLOW_BYTES_PER_SECOND = 50e6
"""Of a checkpoint's writing, until one was measured."""


@dataclass(frozen=True)
class Job:
    """The times of the job that this part of the run is in, in seconds since 1970."""

    began: float
    """When this process began."""
    ends_at: float | None = None
    job_began: float | None = None
    """When the job did, which may have done other work before; None: with this process."""

    @property
    def seconds(self) -> float | None:
        """The job's length."""
        began = self.began if self.job_began is None else self.job_began
        return None if self.ends_at is None else self.ends_at - began


def read_job(ends_at: float | None, environ: Mapping[str, str], *, began: float) -> Job:
    """The job, from the command line's `--ends-at` or the environment. Raises ConfigError."""
    return Job(
        began,
        _seconds(environ, END_VARIABLE) if ends_at is None else ends_at,
        _seconds(environ, BEGIN_VARIABLE),
    )


def _seconds(environ: Mapping[str, str], name: str) -> float | None:
    text = environ.get(name)
    if not text:
        return None
    try:
        return float(text)
    except ValueError:
        raise ConfigError(
            f"The variable {name} is no number of seconds since 1970.",
            remedy=f"unset {name}",
            context={"value": text},
        ) from None


@dataclass
class Times:
    """The recent times of one kind of work, in seconds, and what was known of it before."""

    known: float | None = None
    """From an earlier job or a guess; used until one was measured."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))

    @property
    def longest(self) -> float | None:
        """What to reckon with."""
        return max(self.recent, default=self.known)

    @property
    def usual(self) -> float | None:
        """The median."""
        return statistics.median(self.recent) if self.recent else self.known


class Governor:
    """Measures steps, validations and saves, and says when to stop and how many jobs are left."""

    def __init__(
        self,
        job: Job,
        *,
        spare: float,
        checkpoint_bytes: int,
        known: Mapping[str, float | None],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.job = job
        self._spare = spare
        """Seconds between the end of the last save and the end of the job."""
        self._clock = clock
        self._first: float | None = None
        self._start_up: float | None = None
        self._step = Times(known.get("step"))
        self._validation = Times(known.get("validation"))
        self._save = Times(known.get("save") or 2 + checkpoint_bytes / SLOW_BYTES_PER_SECOND)

    def step_took(self, seconds: float) -> None:
        """One step. The first one compiles and tunes kernels: it counts as a part of starting up."""
        if self._first is None:
            self._first = seconds
            self._start_up = self._clock() - self.job.began
        else:
            self._step.recent.append(seconds)

    def validation_took(self, seconds: float) -> None:
        """One validation."""
        self._validation.recent.append(seconds)

    def save_took(self, seconds: float) -> None:
        """One checkpoint, from its snapshot to its last byte on the disk."""
        self._save.recent.append(seconds)

    def known(self) -> dict[str, float | None]:
        """For the next job."""
        return {
            "step": self._step.usual or self._first,
            "validation": self._validation.usual,
            "save": self._save.usual if self._save.recent else None,
        }

    def must_stop(self, *, validates: bool, saving: bool) -> bool:
        """Whether the job may end before one more step, with its validation if it `validates`, is saved.

        The checkpoint that is being written, if there is one (`saving`), is waited for first.
        """
        if self.job.ends_at is None:
            return False
        step = self._step.longest or self._first or 0.0
        validation = (self._validation.longest or step) if validates else 0.0
        saves = (2 if saving else 1) * (self._save.longest or 0.0)
        needed = PESSIMISM * (step + validation + saves) + self._spare
        return self._clock() + needed > self.job.ends_at

    def seconds_left(self, *, steps: int, validations: int) -> float | None:
        """How long so many steps and validations take; None before any was measured."""
        step = self._step.usual or self._first
        if step is None:
            return 0.0 if steps == 0 else None
        return steps * step + validations * (self._validation.usual or 0.0)

    def jobs_left(self, seconds_left: float | None) -> int | None:
        """How many more jobs like this one that takes, starting up and saving included; None: unknown."""
        if seconds_left == 0:
            return 0
        length = self.job.seconds
        if seconds_left is None or length is None or self._start_up is None:
            return None
        trains = length - self._start_up - PESSIMISM * (self._save.longest or 0.0) - self._spare
        return math.ceil(seconds_left / trains) if trains > 0 else None

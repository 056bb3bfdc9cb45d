"""Following a job to its end: why it waits, how far it is, and how it ended.

Slurm is asked seldom, and ever more seldom while nothing changes; the progress file, which costs it nothing,
is read more often. A controller that does not answer ends nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from envbuilder.errors import SlurmError
from envbuilder.paths import Root
from envbuilder.progress_file import DONE, progress_path, read_progress
from envbuilder.report import Reporter
from envbuilder.slurm.joblog import read_log_end
from envbuilder.slurm.verdict import ENDED, PERHAPS_AGAIN, verdict
from envbuilder.slurm.waiting import Waiting, waiting_for
from envbuilder.slurm_queries import JobView, NoAnswerError, cancelled_by, job_lives, job_view, jobs_ahead
from envbuilder.slurm_time import spoken

_BACK_OFF = 1.5
_NAMES = 3
"""How many of the units that are under way are named."""


@dataclass(frozen=True, slots=True)
class Pace:
    """Times of the following, in seconds."""

    look_s: float = 2.0
    """Between two looks at the progress file, and at first between two questions to Slurm."""
    longest_s: float = 30.0
    """Between two questions to Slurm, once nothing has changed for long."""
    tell_s: float = 60.0
    """Between two words about what has not changed: time left, place in the queue."""
    unknown_s: float = 90.0
    """How long a job may be unknown: the accounting comes late."""


@dataclass(frozen=True, slots=True)
class Ended:
    """A job that did what it was to do."""

    id: str
    state: str
    lives: int
    """How often it ran."""
    seconds: float
    """That it was followed."""
    log: Path


def follow(
    job_id: str, log: Path, *, root: Root, reporter: Reporter, again: str, pace: Pace | None = None
) -> Ended:
    """Follows the job until it ends, and tells `reporter` of what changes. `again` is the command to go on.

    Ctrl-C, or whatever else interrupts, leaves the job as it is, and is raised on after saying so.

    Raises the error that envbuilder ended with in the job, with its exit code; SlurmError where Slurm ended
    the job, where it will never start, and where Slurm does not know it.
    """
    following = _Following(job_id, log, root, reporter, pace or Pace())
    try:
        job = following.to_its_end()
        if job.state == "CANCELLED" and job.cancelled_by is None:
            job = replace(job, cancelled_by=following.who_cancelled())
    except KeyboardInterrupt:
        reporter.warn(f"no longer following: the job {job_id} goes on, and its log is {log}")
        reporter.warn(f"follow it again: envbuilder status --follow {job_id}; cancel it: scancel {job_id}")
        raise
    progress = read_progress(progress_path(root, job_id))
    did_all = progress is not None and progress.stage == DONE
    error = verdict(job, log, read_log_end(log), again=again, did_all=did_all)
    if error is not None:
        raise error
    if job.state != "COMPLETED":
        reporter.warn(f"the job did all, yet ended as {job.state}: something in it was killed and done again")
    return Ended(job_id, job.state, job.restarts + 1, following.seconds(), log)


class _Following:
    """What has been seen and said of one job."""

    def __init__(self, job_id: str, log: Path, root: Root, reporter: Reporter, pace: Pace) -> None:
        self._id, self._log, self._reporter, self._pace = job_id, log, reporter, pace
        self._progress_file = progress_path(root, job_id)
        self._began = time.monotonic()
        self._silent = False
        self._known = self._began
        self._told: tuple[str, ...] = ()
        self._told_at = 0.0
        self._counts: tuple[int, int] | None = None
        self._stage = ""
        self._restarts = 0
        self._never = 0

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def to_its_end(self) -> JobView:
        """The job's last view, in a state that it will not leave."""
        interval, next_question = self._pace.look_s, 0.0
        before: JobView | None = None
        while True:
            if time.monotonic() >= next_question:
                job = self._ask()
                # One that Slurm runs again may be seen between its lives, as ended.
                again = before is None or job is None or before.state != job.state
                if job and job.state in ENDED and not (again and job.state in PERHAPS_AGAIN):
                    self._tell_progress()
                    return job
                changed = job is not None and (before is None or _essence(job) != _essence(before))
                interval = self._pace.look_s if changed else min(interval * _BACK_OFF, self._pace.longest_s)
                next_question = time.monotonic() + interval
                before = job or before
                if job is not None:
                    self._tell(job)
            elif before and before.state == "RUNNING":
                self._tell_progress()
            time.sleep(self._pace.look_s)

    def who_cancelled(self) -> str | None:
        """The user's name from the accounting, which may come some seconds late."""
        for _ in range(3):
            if name := cancelled_by(self._id):
                return name
            time.sleep(self._pace.look_s)
        return None

    def _ask(self) -> JobView | None:
        try:
            job = job_view(self._id)
        except NoAnswerError as error:
            if not self._silent:
                self._silent = True
                said = str(error).splitlines()[0]
                self._reporter.warn(
                    f"Slurm does not answer ({said}); asking on, the job is not touched by it"
                )
            self._known = time.monotonic()
            return None
        if self._silent:
            self._silent = False
            self._reporter.note("Slurm answers again")
        if job is not None:
            self._known = time.monotonic()
        elif time.monotonic() - self._known > self._pace.unknown_s:
            return self._unknown()
        return job

    def _unknown(self) -> JobView:
        """Of a job that Slurm has forgotten: done, where it wrote so itself."""
        progress = read_progress(self._progress_file)
        if progress is not None and progress.stage == DONE:
            return JobView(self._id, "COMPLETED")
        raise SlurmError(
            f"Slurm does not know the job {self._id} (any more), so how it ended can't be said.",
            remedy=f"Read its log: {self._log}",
            context={"job": self._id, "the log's end": "\n" + read_log_end(self._log).last},
        )

    def _tell(self, job: JobView) -> None:
        if job.restarts > self._restarts:
            self._tell_life(job)
        if job.state == "PENDING":
            self._tell_queued(job)
            return
        self._never = 0
        if self._told != (job.state, job.node):
            self._told = (job.state, job.node)
            node = f" on {job.node}" if job.node else ""
            limit = f", for at most {job.limit}" if job.limit and job.state == "RUNNING" else ""
            self._reporter.stage(f"job {self._id} is {job.state.lower()}{node}{limit}")
            self._told_at = time.monotonic()
        if job.state == "RUNNING":
            self._tell_progress()

    def _tell_life(self, job: JobView) -> None:
        self._restarts = job.restarts
        lives = job_lives(self._id)
        before = [life.state for life in lives[: job.restarts]]
        why = f" after {before[-1]}" if before else ""
        self._reporter.warn(f"job {self._id} starts again{why}: life {job.restarts + 1}")

    def _tell_queued(self, job: JobView) -> None:
        waiting = waiting_for(job.reason, job_id=self._id, partition=job.partition, qos=job.qos)
        new = self._told != ("PENDING", waiting.words)
        if new or time.monotonic() - self._told_at > self._pace.tell_s:
            self._told, self._told_at = ("PENDING", waiting.words), time.monotonic()
            self._reporter.stage(f"job {self._id} is queued: {waiting.words}{self._place(job)}")
            if new and waiting.remedy and not waiting.forever:
                self._reporter.warn(waiting.remedy)
        # Twice in a row: a reason may be there for a moment only, while an operator changes a limit.
        self._never = self._never + 1 if waiting.forever else 0
        if self._never > 1:
            raise _never_starts(job, waiting)

    def _place(self, job: JobView) -> str:
        place = jobs_ahead(job) if job.reason == "Priority" else None
        ahead = f"; {place} jobs of the partition are before it" if place else ""
        return ahead + (f"; expected to start at {job.start}" if job.start else "")

    def _tell_progress(self) -> None:
        progress = read_progress(self._progress_file)
        if progress is None:
            return
        if progress.stage not in (self._stage, DONE):
            self._stage = progress.stage
            self._reporter.stage(progress.stage)
        if progress.total > 0 and self._counts != (progress.done, progress.total):
            self._counts = (progress.done, progress.total)
            self._reporter.progress(f"job {self._id}", progress.done, progress.total, "units")
        if progress.done < progress.total and time.monotonic() - self._told_at > self._pace.tell_s:
            self._told_at = time.monotonic()
            words = [f"{progress.done} of {progress.total} units are ready"]
            if progress.seconds_left is not None:
                words.append(f"about {spoken(progress.seconds_left)} left")
            if progress.running:
                more = f" and {len(progress.running) - _NAMES} more" * (len(progress.running) > _NAMES)
                words.append(f"under way: {', '.join(progress.running[:_NAMES])}{more}")
            self._reporter.note("; ".join(words))


def _essence(job: JobView) -> tuple[str, str, int]:
    return job.state, job.reason, job.restarts


def _never_starts(job: JobView, waiting: Waiting) -> SlurmError:
    return SlurmError(
        f"The job {job.id} will not start as it is: {waiting.words}.",
        remedy=waiting.remedy or f"scancel {job.id}",
        context={"job": job.id, "reason": job.reason},
    )

"""Following a job to its end: why it waits, how far it is, and how it ended.

What the job itself writes (that it began, how far it is, with what it ended) is read every few seconds and
told at once. Slurm is asked at most once a minute, whatever there is to ask; once more for the verdict, when
the job has said that it failed, and for who cancelled it. A controller that does not answer ends nothing.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

from envbuilder.errors import SlurmError, StoppedError
from envbuilder.paths import Root
from envbuilder.progress_file import DONE, STARTING, Progress, progress_path, read_progress
from envbuilder.report import Reporter
from envbuilder.slurm.joblog import read_log_end
from envbuilder.slurm.pace import Pace, usual_pace
from envbuilder.slurm.submit import submitted_with
from envbuilder.slurm.verdict import ENDED, PERHAPS_AGAIN, TOLD_TO_END, verdict
from envbuilder.slurm.waiting import Waiting, waiting_for
from envbuilder.slurm.work import work_of
from envbuilder.slurm_queries import JobView, NoAnswerError, cancelled_by, job_lives, job_view, jobs_ahead
from envbuilder.slurm_time import spoken

_NAMES = 3
"""How many of the units that are under way are named."""
_STOPPED = ("STOPPED",)
"""Told of a life that said itself that it ended, while Slurm may still call it running."""
_STOPS = {StoppedError.exit_code: "it stopped in good order", TOLD_TO_END: "it was told to end"}


@dataclass(frozen=True)
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

    Where the job was submitted with another command, as `status` can't know, that one counts.

    Ctrl-C, or whatever else interrupts, leaves the job as it is, and is raised on after saying so.

    Raises the error that envbuilder ended with in the job, with its exit code; SlurmError where Slurm ended
    the job, where it will never start, and where Slurm does not know it.
    """
    again = submitted_with(root, job_id) or again
    following = _Following(job_id, log, root, reporter, pace or usual_pace())
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
        self._work = work_of(log.name)
        self._began = time.monotonic()
        self._next_question = self._began + pace.settle_s
        # A job that is queued again has a log, too: only one that comes says that it runs.
        self._log_was_there = log.exists()
        self._silent = False
        self._misses = 0
        self._is_forgotten = False
        self._seen: JobView | None = None
        self._told: tuple[str, ...] = ()
        self._told_at = 0.0
        self._counts: tuple[int, int] | None = None
        self._stage = ""
        self._life = 1
        self._unexplained = False
        """Whether the accounting is to say why this life began."""
        self._place_asked = True
        self._ended: tuple[int, int] | None = None
        """The life of which the job wrote that it has ended, and its exit code."""
        self._never = 0

    def seconds(self) -> float:
        return time.monotonic() - self._began

    def to_its_end(self) -> JobView:
        """The job's last view, in a state that it will not leave."""
        while True:
            progress = read_progress(self._progress_file)
            self._heed(progress)
            if progress is not None and progress.ended == 0:
                self._tell_progress(progress)
                return JobView(self._id, "COMPLETED", restarts=progress.life - 1)
            if time.monotonic() >= self._next_question:
                job = self._ask()
                self._next_question = time.monotonic() + self._pace.ask_s
                if job is not None:
                    has_ended = self._has_ended(job)
                    self._seen = job
                    if has_ended:
                        self._tell_progress(read_progress(self._progress_file))
                        return job
                    self._tell(job)
            time.sleep(self._pace.look_s)

    def _has_ended(self, job: JobView) -> bool:
        # One that Slurm runs again may be seen between its lives, as ended.
        again = self._seen is None or self._seen.state != job.state
        return job.state in ENDED and not (again and job.state in PERHAPS_AGAIN)

    def who_cancelled(self) -> str | None:
        """The user's name from the accounting, which may come some seconds late."""
        for wait_s in (self._pace.look_s, self._pace.ask_s, self._pace.ask_s):
            time.sleep(wait_s)
            if name := cancelled_by(self._id):
                return name
        return None

    def _ask(self) -> JobView | None:
        """The one question of this turn: most often the job's state, else what is wondered about."""
        if self._unexplained:
            self._unexplained = False
            self._tell_life(job_lives(self._id))
            return None
        if not self._place_asked and self._seen is not None:
            self._place_asked = True
            self._tell_place(self._seen)
            return None
        job = self._view()
        self._misses = 0 if job is not None or self._silent else self._misses + 1
        return self._unknown() if self._misses > self._pace.unknown else job

    def _view(self) -> JobView | None:
        """The job, from the controller, or from the accounting where the controller didn't know it."""
        if self._is_forgotten:
            self._is_forgotten = False
            lives = job_lives(self._id)
            return lives[-1] if lives else None
        try:
            job = job_view(self._id)
        except NoAnswerError as error:
            if not self._silent:
                self._silent = True
                said = str(error).splitlines()[0]
                self._reporter.warn(
                    f"Slurm does not answer ({said}); asking on, the job is not touched by it"
                )
            return None
        if self._silent:
            self._silent = False
            self._reporter.note("Slurm answers again")
        self._is_forgotten = job is None
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

    def _heed(self, progress: Progress | None) -> None:
        """Tells what the job's own files say."""
        if progress is None:
            if not self._told and not self._log_was_there and self._log.exists():
                self._tell_running("")
            return
        if progress.ended is None:
            if progress.life > self._life:
                self._begin_life(progress.life)
            if progress.life == self._life:
                self._tell_running(progress.node)
                self._tell_progress(progress)
        elif self._ended != (progress.life, progress.ended):
            self._ended = (progress.life, progress.ended)
            if progress.ended and progress.life == self._life:
                self._tell_stop(progress.ended)

    def _tell_stop(self, exit_code: int) -> None:
        how = _STOPS.get(exit_code, f"it ended with exit code {exit_code}")
        self._reporter.stage(f"job {self._id}: {how}; asking Slurm what comes of it")
        self._told = _STOPPED
        self._next_question = min(self._next_question, time.monotonic() + self._pace.settle_s)

    def _begin_life(self, life: int) -> None:
        """A life that is new; why the one before ended is told at once where it is known."""
        self._life = life
        if self._ended is not None and self._ended[0] == life - 1:
            code = self._ended[1]
            self._warn_of_life(f" after {_STOPS.get(code, f'exit code {code}')}")
        else:
            self._unexplained = True

    def _tell_life(self, lives: list[JobView]) -> None:
        before = [life.state for life in lives[: self._life - 1]]
        self._warn_of_life(f" after {before[-1]}" if before else "")

    def _warn_of_life(self, why: str) -> None:
        self._reporter.warn(f"job {self._id} starts again{why}: life {self._life}")

    def _tell(self, job: JobView) -> None:
        if job.restarts >= self._life:
            self._begin_life(job.restarts + 1)
        if job.state == "PENDING":
            self._tell_queued(job)
            return
        self._never = 0
        if job.state == "RUNNING":
            if self._told != _STOPPED:
                self._tell_running(job.node, job.limit)
        elif self._told != (job.state,):
            self._told = (job.state,)
            self._reporter.stage(f"job {self._id} is {job.state.lower()}")

    def _tell_running(self, node: str, limit: str = "") -> None:
        if self._told == ("RUNNING", str(self._life)):
            return
        self._told, self._told_at = ("RUNNING", str(self._life)), time.monotonic()
        limit = limit or (self._seen.limit if self._seen else "")
        on = f" on {node}" if node else ""
        most = f", for at most {limit}" if limit else ""
        self._reporter.stage(f"job {self._id} is running{on}{most}")

    def _tell_queued(self, job: JobView) -> None:
        waiting = waiting_for(job.reason, job_id=self._id, partition=job.partition, qos=job.qos)
        new = self._told != ("PENDING", waiting.words)
        if new or time.monotonic() - self._told_at > self._pace.tell_s:
            self._told, self._told_at = ("PENDING", waiting.words), time.monotonic()
            expected = f"; expected to start at {job.start}" if job.start else ""
            self._reporter.stage(f"job {self._id} is queued: {waiting.words}{expected}")
            if new and waiting.remedy and not waiting.forever:
                self._reporter.warn(waiting.remedy)
        self._place_asked = job.reason != "Priority"
        # Twice in a row: a reason may be there for a moment only, while an operator changes a limit.
        self._never = self._never + 1 if waiting.forever else 0
        if self._never > 1:
            raise never_starts(job.id, job.reason, waiting)

    def _tell_place(self, job: JobView) -> None:
        if place := jobs_ahead(job):
            self._reporter.note(f"{place} jobs of the partition are before job {self._id}")

    def _tell_progress(self, progress: Progress | None) -> None:
        if progress is None:
            return
        if progress.stage not in (self._stage, STARTING, DONE):
            self._stage = progress.stage
            self._reporter.stage(progress.stage)
        if progress.total > 0 and self._counts != (progress.done, progress.total):
            self._counts = (progress.done, progress.total)
            self._reporter.progress(f"job {self._id}", progress.done, progress.total, self._work.unit)
        if progress.done < progress.total and time.monotonic() - self._told_at > self._pace.tell_s:
            self._told_at = time.monotonic()
            words = [f"{progress.done} of {progress.total} {self._work.unit} are {self._work.ready}"]
            words += [progress.figures] if progress.figures else []
            if progress.seconds_left is not None:
                words.append(f"about {spoken(progress.seconds_left)} left")
            if progress.running:
                more = f" and {len(progress.running) - _NAMES} more" * (len(progress.running) > _NAMES)
                words.append(f"under way: {', '.join(progress.running[:_NAMES])}{more}")
            self._reporter.note("; ".join(words))


def never_starts(job_id: str, reason: str, waiting: Waiting) -> SlurmError:
    """Of a job that waits for what will not come."""
    return SlurmError(
        f"The job {job_id} will not start as it is: {waiting.words}.",
        remedy=waiting.remedy or f"scancel {job_id}",
        context={"job": job_id, "reason": reason},
    )

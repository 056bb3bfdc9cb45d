"""Following a sweep to its end: how many of its runs are done, run and wait, and how those that failed ended.

As with one job (`follow`), what the jobs write themselves is read every few seconds. Slurm is asked one
question for all of them, at most once a minute.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from envbuilder.errors import EnvbuilderError, SlurmError
from envbuilder.paths import Root
from envbuilder.progress_file import DONE, Progress, progress_path, read_progress
from envbuilder.report import Reporter
from envbuilder.slurm.follow import never_starts
from envbuilder.slurm.joblog import read_log_end
from envbuilder.slurm.pace import Pace, usual_pace
from envbuilder.slurm.submit import array_id
from envbuilder.slurm.sweep_queue import Task, job_name
from envbuilder.slurm.verdict import ENDED, PERHAPS_AGAIN, verdict
from envbuilder.slurm.waiting import Waiting, waiting_for
from envbuilder.slurm_queries import JobView, Listed, NoAnswerError, jobs_called, lives_of
from envbuilder.slurm_time import spoken

_NAMES = 3
"""How many of the runs that train are named."""
_STOPPED = "STOPPED"
"""Of a life that said itself that it ended, while Slurm may still call it running."""
_ROUNDS = 3
"""How often the accounting is asked how jobs ended: it comes late."""


@dataclass(frozen=True)
class Failure:
    """A member that did not come to its end."""

    task: Task
    error: EnvbuilderError


def follow_sweep(
    name: str,
    tasks: Sequence[Task],
    *,
    finished: int,
    total: int,
    root: Root,
    reporter: Reporter,
    again: str,
    pace: Pace | None = None,
) -> tuple[Failure, ...]:
    """Follows `tasks` of the sweep `name` until all have ended: those that failed, each with its error.

    `finished` of the sweep's `total` runs were finished before. `again` is the command to go on. Ctrl-C, or
    whatever else interrupts, leaves the jobs as they are, and is raised on after saying so.

    Raises SlurmError where what still waits will never start.
    """
    following = _Following(name, tasks, finished, total, root, reporter, pace or usual_pace())
    try:
        views = following.to_the_end()
    except KeyboardInterrupt:
        arrays = list(dict.fromkeys(array_id(task.id) for task in tasks))
        reporter.warn("no longer following: the jobs of the sweep go on")
        reporter.warn(
            f"follow them again: envbuilder status --follow {arrays[0]}; "
            f"cancel them: scancel {' '.join(arrays)}"
        )
        raise
    failures = []
    for task in tasks:
        progress = read_progress(progress_path(root, task.id))
        did_all = progress is not None and progress.stage == DONE
        end = read_log_end(task.log)
        if error := verdict(views[task.id], task.log, end, again=again, did_all=did_all):
            failures.append(Failure(task, error))
    return tuple(failures)


class _Following:
    """What has been seen and said of the tasks."""

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        finished: int,
        total: int,
        root: Root,
        reporter: Reporter,
        pace: Pace,
    ) -> None:
        self._name, self._tasks, self._root, self._reporter, self._pace = name, tasks, root, reporter, pace
        self._finished, self._total = finished, total
        self._open = {task.id: task for task in tasks}
        self._ended: dict[str, JobView] = {}
        self._states = dict.fromkeys(self._open, "PENDING")
        self._written: dict[str, tuple[int, int | None]] = {}
        """Task → what its progress file said last: life, and exit code of a life that ended."""
        self._progress: dict[str, Progress] = {}
        self._misses: Counter[str] = Counter()
        self._silent = False
        self._waiting: Waiting | None = None
        self._never = 0
        self._told, self._told_at = "", 0.0
        self._next_question = time.monotonic() + pace.settle_s

    def to_the_end(self) -> dict[str, JobView]:
        """Task → its last view, in a state that it will not leave."""
        while True:
            self._read_files()
            if self._open and time.monotonic() >= self._next_question:
                self._ask()
                self._next_question = time.monotonic() + self._pace.ask_s
            self._tell()
            if not self._open:
                return self._explained()
            time.sleep(self._pace.look_s)

    def _read_files(self) -> None:
        for task in list(self._open.values()):
            progress = read_progress(progress_path(self._root, task.id))
            if progress is None:
                continue
            self._progress[task.id] = progress
            if progress.ended == 0:
                self._end(task, JobView(task.id, "COMPLETED", restarts=progress.life - 1))
            elif (seen := (progress.life, progress.ended)) != self._written.get(task.id):
                if progress.ended is None and progress.life > self._written.get(task.id, (progress.life,))[0]:
                    self._reporter.note(f"{task.member.run} starts again: life {progress.life}")
                self._written[task.id] = seen
                self._states[task.id] = "RUNNING" if progress.ended is None else _STOPPED
        if self._open and {self._states[task_id] for task_id in self._open} == {_STOPPED}:
            self._next_question = min(self._next_question, time.monotonic() + self._pace.settle_s)

    def _end(self, task: Task, view: JobView) -> None:
        del self._open[task.id]
        self._ended[task.id] = view
        if view.state != "COMPLETED":
            self._reporter.warn(f"{task.member.run} ended as {view.state}; its log: {task.log}")

    def _ask(self) -> None:
        """The one question of this turn: the queue, else the accounting about those that it has forgotten."""
        lost = [task_id for task_id in self._open if self._misses[task_id] % 2]
        if lost:
            self._ask_accounting(lost)
            return
        try:
            listed = {job.id: job for job in jobs_called(job_name(self._name))}
        except NoAnswerError as error:
            if not self._silent:
                said = str(error).splitlines()[0]
                self._reporter.warn(f"Slurm does not answer ({said}); asking on, no job is touched by it")
            self._silent = True
            return
        if self._silent:
            self._silent = False
            self._reporter.note("Slurm answers again")
        for task in list(self._open.values()):
            job = listed.get(task.id)
            if job is None:
                self._misses[task.id] += 1
            else:
                self._misses[task.id] = 0
                self._heed(task, job)
        self._heed_reasons([listed[task_id] for task_id in self._open if task_id in listed])

    def _heed(self, task: Task, job: Listed) -> None:
        # One that Slurm runs again may be seen between its lives, as ended.
        again = job.state in PERHAPS_AGAIN and self._states[task.id] != job.state
        self._states[task.id] = job.state
        if job.state in ENDED and not again:
            progress = self._progress.get(task.id)
            code = (progress.ended if progress else None) or 0
            self._end(task, JobView(task.id, job.state, exit_code=code, partition=job.partition, qos=job.qos))

    def _heed_reasons(self, jobs: Sequence[Listed]) -> None:
        """Why what waits does so; SlurmError where nothing runs, and what waits will never start."""
        pending = [job for job in jobs if job.state == "PENDING"]
        self._waiting = None
        if pending:
            job = pending[0]
            self._waiting = waiting_for(job.reason, job_id=job.id, partition=job.partition, qos=job.qos)
        stuck = self._waiting is not None and self._waiting.forever and len(pending) == len(self._open)
        # Twice in a row: a reason may be there for a moment only, while an operator changes a limit.
        self._never = self._never + 1 if stuck else 0
        if self._never > 1 and self._waiting is not None:
            raise never_starts(array_id(pending[0].id), pending[0].reason, self._waiting)

    def _ask_accounting(self, task_ids: Sequence[str]) -> None:
        found = lives_of(task_ids)
        for task_id in task_ids:
            self._misses[task_id] += 1
            lives = found.get(task_id)
            if lives and lives[-1].state in ENDED:
                self._end(self._open[task_id], lives[-1])
            elif self._misses[task_id] > 2 * self._pace.unknown:
                task = self._open[task_id]
                raise SlurmError(
                    f"Slurm does not know the job {task_id} (any more), so how it ended can't be said.",
                    remedy=f"Read its log: {task.log}",
                    context={"job": task_id, "run": task.member.run},
                )

    def _explained(self) -> dict[str, JobView]:
        """The views, with what the accounting knows of those that failed: exit code, node, who cancelled."""
        for round_ in range(_ROUNDS):
            unclear = [view.id for view in self._ended.values() if not _is_clear(view)]
            if not unclear:
                break
            if round_:
                time.sleep(self._pace.ask_s)
            for task_id, lives in lives_of(unclear).items():
                if lives[-1].state in ENDED:
                    self._ended[task_id] = lives[-1]
        return self._ended

    def _tell(self) -> None:
        states = Counter(self._states[task_id] for task_id in self._open)
        done = sum(view.state == "COMPLETED" for view in self._ended.values())
        waiting = states["PENDING"]
        words = [f"{self._finished + done} of {self._total} runs finished"]
        words += [f"{len(self._open) - waiting} running"] if len(self._open) > waiting else []
        words += [f"{waiting} waiting"] if waiting else []
        words += [f"{len(self._ended) - done} failed"] if len(self._ended) > done else []
        if self._waiting and waiting == len(self._open):
            words[-1] += f" ({self._waiting.words})"
        line = f"sweep {self._name}: {', '.join(words)}"
        now = time.monotonic()
        if line != self._told:
            self._told, self._told_at = line, now
            self._reporter.stage(line)
        elif now - self._told_at > self._pace.tell_s and (steps := self._steps()):
            self._told_at = now
            self._reporter.note(steps)

    def _steps(self) -> str:
        """How far those are that run, in words."""
        running = [task for task_id, task in self._open.items() if self._states[task_id] == "RUNNING"]
        told = []
        for task in running[:_NAMES]:
            progress = self._progress.get(task.id)
            if progress is None or not progress.total:
                continue
            left = f", about {spoken(progress.seconds_left)} left" if progress.seconds_left else ""
            told.append(f"{task.member.run}: {progress.done} of {progress.total} steps{left}")
        more = f" and {len(running) - _NAMES} more" if len(running) > _NAMES else ""
        return "; ".join(told) + more


def _is_clear(view: JobView) -> bool:
    """Whether it says all that a verdict needs: the queue tells of no exit code, limit and canceller."""
    return view.state == "COMPLETED" or bool(view.limit or (view.state == "FAILED" and view.exit_code))

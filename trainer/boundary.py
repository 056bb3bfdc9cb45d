"""What happens between two steps: checkpoints, the walltime, requests to stop, divergence.

Rank 0 decides what depends on clocks and losses; one small message over the hosts tells all processes.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable

from trainer.checkpoint import State
from trainer.control import Control
from trainer.divergence import Divergence
from trainer.errors import Stopped, TrainingFailed
from trainer.governor import Governor, Job
from trainer.prepare import Run
from trainer.resuming import resume, settings_of
from trainer.saving import Saver
from trainer.stamp import Stamp
from trainer.watch import Watch

StopRequested = Callable[[], bool]


class Boundary:
    """Opened after `prepare`: goes on from a checkpoint if there is one. Called after each step."""

    def __init__(self, run: Run, job: Job, stamp: Stamp, stop_requested: StopRequested, watch: Watch) -> None:
        self._run, self._stop_requested, self._watch = run, stop_requested, watch
        self._control = Control(run.world)
        section = run.config.checkpoint
        self._saver = Saver(run.checkpoints, run.world, self._control, keep_last=section.keep_last)
        watch.before_the_end = self._saver.wait
        self._stamp = stamp
        self._settings = settings_of(run)
        state = resume(run, stamp)
        self._saver.last_step = state.step if state else None
        self._guard = (
            Divergence(run.config.divergence, state.recent_losses, state.steps_above)
            if state
            else Divergence(run.config.divergence)
        )
        self._governor = Governor(
            job,
            spare=section.spare_seconds,
            checkpoint_bytes=3 * sum(adapter.nbytes for adapter in run.adapters.values()),
            known=state.times if state else {},
        )
        self._since = self._saved_at = time.monotonic()
        self._validating = 0.0
        run.progress.steps_total, run.progress.job_seconds = run.steps, job.seconds
        run.metrics.write(
            "job",
            job=os.environ.get("SLURM_JOB_ID"),
            began=job.began,
            ends_at=job.ends_at,
            host=socket.gethostname(),
            processes=run.world.size,
            step=run.progress.steps,
            stamp=stamp,
        )
        self._watch.pulse()

    def before_the_first_step(self) -> None:
        """Raises TrainingFailed if the job is too short for a step: the next one would be, too."""
        step, job = self._run.progress.steps, self._governor.job
        if step == self._run.steps:
            return
        (too_short,) = self._control.any_of([self._first and self._must_stop(step)])
        if too_short:
            ends_at = job.ends_at or 0.0
            raise TrainingFailed(
                f"The job ends in {ends_at - time.time():.0f} s, too soon for a step and a checkpoint.",
                remedy="give the job more time",
                context={
                    "seconds since the start": round(time.time() - job.began),
                    "checkpoint.spare_seconds": self._run.config.checkpoint.spare_seconds,
                },
            )

    def validated(self, seconds: float) -> None:
        """A validation took so long; it is no part of the step's time."""
        self._validating += seconds
        self._governor.validation_took(seconds)

    def after(self, step: int) -> None:
        """Called when a step, and its validation, is done.

        Raises Stopped after a checkpoint, if someone asked for it or the job's end is near; TrainingFailed
        if a checkpoint couldn't be written or the training diverges. On all processes alike.
        """
        self._measure(step)
        last = step == self._run.steps
        stop, time_is_up, save, failed, diverged = self._control.any_of(
            [
                not last and self._stop_requested(),
                not last and self._first and self._must_stop(step),
                self._first and self._save_is_due(step),
                self._saver.failed,
                self._first and self._guard.diverged,
            ]
        )
        self._watch.pulse()
        if failed:
            self._saver.raise_failure()
        if diverged:
            raise self._diverged(step)
        ending = last or stop or time_is_up
        if self._run.config.checkpoint.enabled and (save or ending):
            self._save(step)
        if ending:
            self._finish_saving()
        if not last and ending:
            raise self._stopped(step, asked=stop)

    def close(self) -> None:
        """However training ended: nothing is left half-written."""
        self._saver.wait()
        self._tell_saved()

    @property
    def _first(self) -> bool:
        return self._run.world.rank == 0

    def _measure(self, step: int) -> None:
        now = time.monotonic()
        self._governor.step_took(now - self._since - self._validating)
        self._since, self._validating = now, 0.0
        progress = self._run.progress
        assert progress.last_loss is not None
        self._guard.saw(progress.last_loss)
        self._tell_saved()
        self._forecast(step)

    def _forecast(self, step: int) -> None:
        progress, every = self._run.progress, self._run.config.step_scheduler.val_every_steps
        validations = self._run.steps // every - step // every if every else 0
        progress.seconds_left = self._governor.seconds_left(
            steps=self._run.steps - step, validations=validations
        )
        progress.jobs_left = self._governor.jobs_left(progress.seconds_left)

    def _tell_saved(self) -> None:
        for saved in self._saver.collect():
            self._governor.save_took(saved.seconds)
            self._run.metrics.write(
                "checkpoint",
                step=saved.step,
                path=str(saved.path),
                seconds=saved.seconds,
                held_up_seconds=saved.held_up_seconds,
                bytes=saved.bytes,
            )

    def _must_stop(self, step: int) -> bool:
        every = self._run.config.step_scheduler.val_every_steps
        return self._governor.must_stop(
            validates=bool(every) and (step + 1) % (every or 1) == 0, saving=self._saver.busy
        )

    def _save_is_due(self, step: int) -> bool:
        if self._guard.above:  # what may be the beginning of a divergence is not kept
            return False
        since = self._saver.last_step or 0
        every, minutes = (
            self._run.config.step_scheduler.ckpt_every_steps,
            self._run.config.checkpoint.every_minutes,
        )
        by_steps = every is not None and step // every > since // every
        return by_steps or (minutes is not None and time.monotonic() - self._saved_at >= 60 * minutes)

    def _save(self, step: int) -> None:
        progress = self._run.progress
        assert progress.first_loss is not None
        assert progress.last_loss is not None
        state = State(
            step,
            progress.first_loss,
            progress.last_loss,
            self._run.world.size,
            self._settings,
            self._stamp,
            self._governor.known(),
            list(self._guard.recent),
            self._guard.above,
        )
        self._saver.begin(state, self._run.adapters, self._run.optimizer)
        self._since = self._saved_at = time.monotonic()

    def _finish_saving(self) -> None:
        self._saver.wait()
        self._tell_saved()
        self._saver.raise_failure()

    def _stopped(self, step: int, *, asked: bool) -> Stopped:
        kept = self._run.config.checkpoint.enabled
        progress, ends_at = self._run.progress, self._governor.job.ends_at
        self._forecast(step)
        context: dict[str, object] = {"step": step, "run": self._run.run_dir}
        if progress.seconds_left is not None:
            context["seconds of training left"] = round(progress.seconds_left)
        if progress.jobs_left is not None:
            context["jobs like this one left"] = progress.jobs_left
        why = (
            "Stopped as asked"
            if asked
            else f"Stopped {(ends_at or 0.0) - time.time():.0f} s before the job's end"
        )
        return Stopped(
            f"{why} after step {step} of {self._run.steps}, "
            + ("with a checkpoint." if kept else "without a checkpoint: checkpoint.enabled is false."),
            remedy="run the same command again to go on"
            if kept
            else "set checkpoint.enabled: true to be able to go on",
            context=context,
        )

    def _diverged(self, step: int) -> TrainingFailed:
        section, guard = self._run.config.divergence, self._guard
        kept = self._saver.drop_after(step - guard.above)
        rate = f"--set optimizer.lr={self._run.config.optimizer.lr / 3:.3g}"
        return TrainingFailed(
            f"Training diverges: for {guard.above} steps the loss has been more than {section.rise} above "
            f"the {guard.level or 0.0:.4f} that it was; after step {step} it is "
            f"{self._run.progress.last_loss or 0.0:.4f}.",
            remedy=f"the same command with {rate}"
            + (f", which goes on from step {kept}" if kept else "")
            + "; divergence.rise=null lets it go on",
            context={"step": step, "checkpoint": f"of step {kept}" if kept else "none yet"},
        )

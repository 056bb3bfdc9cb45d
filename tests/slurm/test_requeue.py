"""A job that runs itself again: when it may, and when it may not. `scontrol` is a stand-in here."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from envbuilder.errors import SlurmError, UsageError
from envbuilder.paths import Root
from envbuilder.progress_file import ProgressFile, progress_path
from envbuilder.report import Quiet
from envbuilder.slurm.requeue import lives_path, requeue_this_job
from envbuilder.slurm.work import COMPILING


class Job:
    """The inside of the job 5."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root, self._folder, self._monkeypatch = Root(folder / "root"), folder, monkeypatch
        (folder / "bin").mkdir()
        monkeypatch.setenv("PATH", f"{folder / 'bin'}:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "5")
        monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
        self.scontrol(0)

    def scontrol(self, exit_code: int, says: str = "") -> None:
        program = self._folder / "bin" / "scontrol"
        program.write_text(
            f"#!/bin/sh\necho \"$@\" >> {self._folder}/asked\necho '{says}' >&2\nexit {exit_code}\n"
        )
        program.chmod(0o755)

    def life(self, number: int, done: int | None) -> None:
        """The job's life `number` stops with `done` units ready, and wants to go on."""
        if number > 1:
            self._monkeypatch.setenv("SLURM_RESTART_COUNT", str(number - 1))
        if done is not None:
            ProgressFile(progress_path(self.root, "5")).write(done=done, total=100)
        requeue_this_job(self.root, Quiet())

    @property
    def asked(self) -> list[str]:
        path = self._folder / "asked"
        return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Job:
    return Job(tmp_path, monkeypatch)


def test_each_life_that_made_something_ready_is_followed_by_another(job: Job) -> None:
    for number, done in enumerate((0, 1, 40), start=1):
        job.life(number, done)
    assert job.asked == ["requeue 5"] * 3
    assert json.loads(lives_path(job.root, "5").read_text()) == {"done": [0, 1, 40]}


@pytest.mark.parametrize("done", [7, 6, 0])
def test_a_life_that_made_nothing_ready_is_the_last(job: Job, done: int) -> None:
    job.life(1, 7)
    with pytest.raises(SlurmError, match="this life, number 2, brought none of its units") as caught:
        job.life(2, done)
    assert "longer walltime" in caught.value.remedy
    assert job.asked == ["requeue 5"]


def test_lives_that_write_no_progress_make_none(job: Job) -> None:
    job.life(1, None)
    with pytest.raises(SlurmError, match="brought none of its units"):
        job.life(2, None)


def test_the_number_of_lives_is_bounded(job: Job) -> None:
    job.life(COMPILING.most_lives - 1, 20)
    with pytest.raises(SlurmError, match=f"has run {COMPILING.most_lives} times"):
        job.life(COMPILING.most_lives, 21)
    assert len(job.asked) == 1


def test_a_refusal_is_told(job: Job) -> None:
    job.scontrol(1, "Requested operation is presently disabled for job 5")
    with pytest.raises(SlurmError, match="Requested operation is presently disabled") as caught:
        job.life(1, 3)
    assert "--requeue" in caught.value.remedy


def test_a_damaged_record_of_lives_counts_for_none(job: Job) -> None:
    job.life(1, 3)
    lives_path(job.root, "5").write_text("{")
    job.life(2, 3)
    assert job.asked == ["requeue 5"] * 2


@pytest.mark.parametrize("job_id", ["", "5; rm -rf /"])
def test_outside_of_a_job_there_is_nothing_to_run_again(
    job: Job, monkeypatch: pytest.MonkeyPatch, job_id: str
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", job_id)
    with pytest.raises(UsageError, match="no Slurm job"):
        job.life(1, 3)
    assert job.asked == []

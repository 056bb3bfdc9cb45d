"""The walltime: when a run stops, and how many jobs it still takes."""

from __future__ import annotations

import json
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from trainer.errors import ConfigError
from trainer.governor import Governor, Job, read_job

from .conftest import RunTrainer, losses


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def governor(
    clock: Clock, *, ends_at: float | None = 1000.0, known: dict[str, float | None] | None = None
) -> Governor:
    return Governor(
        Job(began=0.0, ends_at=ends_at), spare=20.0, checkpoint_bytes=0, known=known or {}, clock=clock
    )


def test_it_stops_while_one_more_step_its_validation_and_a_save_would_not_fit() -> None:
    clock = Clock(100.0)
    governed = governor(clock)
    governed.step_took(90.0)  # compiling kernels
    for seconds in (9.0, 10.0, 8.0):
        governed.step_took(seconds)
    governed.validation_took(30.0)
    governed.save_took(5.0)
    # 1.2 · (10 + 5) + 20 = 38; with a validation 74; while another save is being written 44.
    for left, validates, saving, stops in (
        (39, False, False, False),
        (37, False, False, True),
        (75, True, False, False),
        (73, True, False, True),
        (45, False, True, False),
        (43, False, True, True),
    ):
        clock.now = 1000.0 - left
        assert governed.must_stop(validates=validates, saving=saving) == stops


def test_without_an_end_it_never_stops() -> None:
    assert not governor(Clock(1e12), ends_at=None).must_stop(validates=True, saving=True)


def test_before_the_first_step_the_times_of_the_job_before_count() -> None:
    clock = Clock(900.0)
    assert not governor(clock).must_stop(validates=False, saving=False)
    assert governor(clock, known={"step": 60.0, "save": 10.0}).must_stop(validates=False, saving=False)


def test_jobs_left_are_counted_with_their_start_up_and_their_save() -> None:
    clock = Clock(200.0)
    governed = governor(clock)
    assert governed.jobs_left(governed.seconds_left(steps=300, validations=0)) is None
    governed.step_took(90.0)
    governed.step_took(10.0)
    governed.save_took(25.0)
    governed.validation_took(50.0)
    # A job of 1000 s trains for 1000 - 200 - 1.2 · 25 - 20 = 750 s.
    assert governed.seconds_left(steps=140, validations=2) == 1500.0
    assert governed.jobs_left(1500.0) == 2
    assert governed.jobs_left(1501.0) == 3
    assert governed.jobs_left(0.0) == 0


def test_the_end_comes_from_the_command_line_or_the_environment() -> None:
    variables = {"ENVBUILDER_JOB_END": "2000", "SLURM_JOB_START_TIME": "200"}
    assert read_job(None, variables, began=500.0) == Job(500.0, 2000.0, 200.0)
    assert read_job(None, variables, began=500.0).seconds == 1800.0
    assert read_job(1500.0, variables, began=500.0).ends_at == 1500.0
    assert read_job(None, {}, began=500.0).seconds is None
    with pytest.raises(ConfigError, match="ENVBUILDER_JOB_END"):
        read_job(None, {"ENVBUILDER_JOB_END": "soon"}, began=0.0)


def test_a_run_in_short_jobs_has_the_losses_of_an_uninterrupted_one(
    run_trainer: RunTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each job has room for a few steps only, by a clock that nothing but the steps moves on."""
    settings = ("peft.dropout=0.2", "checkpoint.spare_seconds=0")
    run_trainer(*settings, run="straight")
    from trainer import __main__ as command
    from trainer import boundary, loop, saving

    clock, step = Clock(1e9), loop.train_step

    def slow_step(*arguments: object) -> object:
        clock.now += 1.6  # six of them are longer than a job
        return step(*arguments)  # type: ignore[arg-type]

    times = SimpleNamespace(time=clock, monotonic=clock, perf_counter=clock)
    for module in (boundary, command, saving):
        monkeypatch.setattr(module, "time", times)
    monkeypatch.setattr(boundary, "Governor", partial(Governor, clock=clock))
    monkeypatch.setattr(loop, "train_step", slow_step)
    ends: list[tuple[float, dict[str, object]]] = []
    while len(ends) < 7:
        end = clock.now + 9.0
        monkeypatch.setenv("ENVBUILDER_JOB_END", str(end))
        code, outcome = run_trainer(*settings, run="jobs")
        ends.append((end - clock.now, outcome))
        if code != 75:
            break
    assert code == 0, outcome
    assert len(ends) > 1
    assert all(spare > 0 for spare, _ in ends)
    stopped = ends[0][1]
    assert stopped["steps_total"] == 6
    assert stopped["seconds_left"] > 1  # type: ignore[operator]
    assert stopped["jobs_left"] >= 1  # type: ignore[operator]
    assert stopped["job_seconds"] == 9.0
    assert "before the job's end" in stopped["error"]["message"]  # type: ignore[index]
    assert (outcome["seconds_left"], outcome["jobs_left"]) == (0, 0)
    assert losses(tmp_path / "jobs") == losses(tmp_path / "straight")
    records = [json.loads(line) for line in (tmp_path / "jobs/metrics.jsonl").read_text().splitlines()]
    jobs = [record for record in records if record["kind"] == "job"]
    assert [job["step"] for job in jobs] == [0, *(end["steps"] for _, end in ends[:-1])]


def test_a_job_too_short_for_a_step_says_so(run_trainer: RunTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENVBUILDER_JOB_END", str(time.time() + 15))  # 20 s are kept free
    code, outcome = run_trainer()
    assert (code, outcome["steps"]) == (10, 0)
    assert "too soon for a step" in outcome["error"]["message"]

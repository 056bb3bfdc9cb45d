"""Two real ranks that are killed, stopped and kept from writing: what is left is sound, and nobody hangs."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from trainer.checkpoint import committed, newest_sound

from .conftest import CONFIG, MESSAGES
from .ranks import ranks, records

SETTINGS = (
    "peft.dropout=0.2",
    "step_scheduler.local_batch_size=1",
    "step_scheduler.max_steps=24",
    "lr_scheduler.lr_decay_style=cosine",
    "samples.prompts=[]",
)
OFTEN = "checkpoint.every_minutes=1.0e-4"
"""A save after every step: kills fall into many of them."""


def losses_of(run: Path) -> dict[int, float]:
    """Step → loss; of a repeated step the last."""
    return {record["step"]: record["loss"] for record in records(run) if record["kind"] == "step"}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The uninterrupted run's losses."""
    folder = tmp_path_factory.mktemp("straight")
    lines = [json.dumps({"messages": conversation}) + "\n" for conversation in MESSAGES]
    (folder / "train.jsonl").write_text("".join(lines))
    (folder / "config.yaml").write_text(CONFIG)
    with ranks(folder / "config.yaml", folder / "run", SETTINGS) as started:
        assert started.wait() == [0, 0]
    return losses_of(folder / "run")


def test_killed_at_any_moment_it_goes_on_with_the_losses_of_an_uninterrupted_run(
    config_file: Path, tmp_path: Path, straight: dict[int, float]
) -> None:
    """Six kills at random moments of both ranks, or of one; then the newest checkpoint is damaged, too."""
    random.seed(7)
    run = tmp_path / "run"
    for kill in range(6):
        begins = max(losses_of(run), default=0)
        # So that it does not end before it is killed, however late that is.
        with ranks(config_file, run, (*SETTINGS, OFTEN), hangs_at=begins + 4) as started:
            started.wait_for(begins + 1)
            time.sleep(random.uniform(0, 0.15))
            if kill % 3 == 2:
                started.processes[random.randrange(2)].kill()
            started.kill()
        assert newest_sound(run / "checkpoints", pytest.fail) is not None or kill == 0
    newest, before = committed(run / "checkpoints")[:2]
    weights = newest / "adapter.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with ranks(config_file, run, SETTINGS) as started:
        assert started.wait() == [0, 0]
    assert losses_of(run) == straight
    notes = [record["text"] for record in records(run) if record["kind"] == "note"]
    assert any(f"{newest.name} is damaged" in note for note in notes)
    assert notes[-1].endswith(f"from {before.name}")


def test_another_number_of_processes_goes_on_alike(
    config_file: Path, tmp_path: Path, straight: dict[int, float]
) -> None:
    """Without dropout, whose masks are each process's own; sums in another order differ in the last bits."""
    settings = (*SETTINGS, "peft.dropout=0", "step_scheduler.max_steps=6")
    for run, sizes in (("one", (1,)), ("several", (2, 1, 4))):
        for part, size in enumerate(sizes):
            last = part == len(sizes) - 1
            if not last:
                (tmp_path / run).mkdir(exist_ok=True)
                (tmp_path / run / "stop").touch()
            with ranks(config_file, tmp_path / run, settings, size=size) as started:
                assert started.wait() == [0 if last else 75] * size
    assert losses_of(tmp_path / "several") == pytest.approx(losses_of(tmp_path / "one"), rel=1e-4)
    assert [r["processes"] for r in records(tmp_path / "several") if r["kind"] == "job"] == [2, 1, 4]


def test_a_checkpoint_that_can_not_be_written_ends_all_ranks(config_file: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "step_scheduler.ckpt_every_steps=3")
    # Room for everything but the optimizer's moments.
    with ranks(config_file, tmp_path / "run", settings, largest_file=20_000) as started:
        assert started.wait() == [10, 10]
    outcome = started.outcome()
    assert outcome["error"]["message"].startswith("The checkpoint of step 3 can't be written: ")
    assert "File too large" in outcome["error"]["message"]
    assert outcome["error"]["remedy"].startswith("df -h ")
    assert outcome["steps"] < 24
    assert list((tmp_path / "run/checkpoints").iterdir()) == []


@pytest.mark.parametrize("late", [0, 1])
def test_a_rank_that_is_stopped_is_named_and_the_other_one_ends(
    config_file: Path, tmp_path: Path, late: int
) -> None:
    settings = (*SETTINGS, OFTEN, "step_scheduler.max_steps=1000", "distributed.timeout_minutes=0.2")
    with ranks(config_file, tmp_path / "run", settings) as started:
        started.wait_for(3)
        pid = started.processes[late].pid
        assert pid is not None
        os.kill(pid, signal.SIGSTOP)
        other = started.processes[1 - late]
        other.join(300)
        assert other.exitcode == 10
        assert started.processes[late].is_alive()
    error = started.outcome()["error"]
    assert error["message"].startswith(f"Rank {late} has not been heard of for")
    assert "run the same command again" in error["remedy"]
    assert newest_sound(tmp_path / "run/checkpoints", pytest.fail) is not None


def test_a_rank_that_was_killed_is_named(config_file: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "step_scheduler.max_steps=1000")
    with ranks(config_file, tmp_path / "run", settings) as started:
        started.wait_for(3)
        started.processes[1].kill()
        assert started.wait(300) == [10, -9]
    assert started.outcome()["error"]["message"].startswith("Rank 1 has not been heard of for")


def test_a_rank_that_hangs_is_named_with_where_it_is(config_file: Path, tmp_path: Path) -> None:
    settings = (*SETTINGS, "distributed.timeout_minutes=0.2")
    with ranks(config_file, tmp_path / "run", settings, hangs_at=3) as started:
        started.processes[0].join(300)
        assert started.processes[0].exitcode == 10
    error = started.outcome()["error"]
    assert error["message"].startswith("Rank 1 has not come further for 12 s")
    assert "loop.py" in error["context"]["rank 1 is at"]
    assert "distributed.timeout_minutes" in error["remedy"]

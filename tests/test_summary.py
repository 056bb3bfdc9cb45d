from __future__ import annotations

from pathlib import Path
from typing import Any

from envbuilder.summary import trained
from envbuilder.train import TrainReport

OUTCOME: dict[str, Any] = {
    "steps": 20,
    "first_loss": 7.26364,
    "last_loss": 2.3824,
    "tokens_per_second": 3363.4,
    "first_step_seconds": 0.61,
    "adapter": "runs/quickstart/adapter",
    "peak_memory_bytes": 2**31,
}


def rows(**changes: object) -> dict[str, str]:
    return dict(trained(TrainReport(Path("runs/quickstart"), {**OUTCOME, **changes}, 1.0)))


def test_a_run_is_told_by_its_loss_speed_and_adapter() -> None:
    assert rows() == {
        "steps": "20",
        "loss at the first step": "7.2636",
        "loss at the last step": "2.3824",
        "tokens per second": "3363",
        "first step": "0.6 s",
        "adapter": "runs/quickstart/adapter",
        "peak memory": "2.0 GiB",
    }


def test_a_run_that_had_nothing_left_to_train_tells_no_speed() -> None:
    told = rows(tokens_per_second=None, first_step_seconds=None)
    assert told.keys() == rows().keys() - {"tokens per second", "first step"}

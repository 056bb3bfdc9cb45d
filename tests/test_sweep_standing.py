"""The table of a sweep's runs, which of them is the best, and the error that it ends with."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from envbuilder.cli.app import Options
from envbuilder.cli.sweep_standing import print_standing
from envbuilder.display import ConsoleReporter
from envbuilder.errors import EnvbuilderError, SlurmError, StoppedError, TrainingError
from envbuilder.paths import Root
from envbuilder.slurm.follow_sweep import Failure
from envbuilder.slurm.sweep_queue import Task
from envbuilder.sweep import Sweep, make_sweep

AGAIN = "envbuilder sweep …"


class Shown:
    """A ROOT with runs, and what is printed of them."""

    def __init__(self, folder: Path) -> None:
        self.root, self.text = Root(folder), io.StringIO()
        console = Console(file=self.text, soft_wrap=True, width=200)
        self.opts = Options(self.root, False, False, console, ConsoleReporter(console, quiet=True))

    def run(
        self, name: str, *losses: float, validation: float | None = None, status: str = "finished"
    ) -> None:
        folder = self.root.run(name)
        folder.mkdir(parents=True)
        records: list[dict[str, object]] = [{"kind": "start", "time": 1.0, "steps": len(losses)}]
        records += [
            {"kind": "step", "time": 1.0 + step, "step": step, "steps": len(losses), "loss": loss}
            for step, loss in enumerate(losses, 1)
        ]
        if validation is not None:
            records.append({"kind": "validation", "time": 99.0, "step": len(losses), "loss": validation})
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "outcome.json").write_text(json.dumps({"status": status}))

    def standing(self, sweep: Sweep, *failures: Failure, tasks: tuple[Task, ...] = ()) -> list[list[str]]:
        """The table's rows, in words."""
        print_standing(self.opts, sweep, tasks, failures, AGAIN, is_over=True)
        return self.rows()

    def rows(self) -> list[list[str]]:
        return [line.split() for line in self.text.getvalue().splitlines() if line.startswith("x-")]


@pytest.fixture
def shown(tmp_path: Path) -> Shown:
    return Shown(tmp_path)


def sweep_over(*over: str) -> Sweep:
    return make_sweep("x", "/c/x.yaml", "tiny", (), over)


def failure(sweep: Sweep, index: int, error: EnvbuilderError) -> Failure:
    return Failure(Task(f"5_{index}", sweep.members[index], Path(f"/logs/x-5_{index}.log")), error)


def test_the_best_is_the_one_with_the_lowest_validation_loss(shown: Shown) -> None:
    shown.run("x-seed1", 4.0, 1.0, validation=2.5)
    shown.run("x-seed2", 4.5, 1.5, validation=2.25)
    assert shown.standing(sweep_over("seed=1,2")) == [
        ["x-seed1", "1", "finished", "2", "4.0000", "1.0000", "2.5000"],
        ["x-seed2", "2", "finished", "2", "4.5000", "1.5000", "2.2500", "best"],
    ]


def test_without_validation_it_is_the_last_loss(shown: Shown) -> None:
    shown.run("x-seed1", 4.0, 1.0)
    shown.run("x-seed2", 4.5, 1.5, validation=2.25)
    assert [row[-1] == "best" for row in shown.standing(sweep_over("seed=1,2"))] == [True, False]


def test_losses_on_different_data_are_not_compared(shown: Shown) -> None:
    shown.run("x-a", 4.0, 1.0)
    shown.run("x-b", 4.5, 1.5)
    data = sweep_over("dataset.path_or_dataset_id=a.jsonl,b.jsonl")
    assert [row[-1] for row in shown.standing(data)] == ["1.0000", "1.5000"]


def test_what_failed_is_raised_after_the_table_with_each_error_and_log(shown: Shown) -> None:
    sweep = sweep_over("seed=1,2,3")
    shown.run("x-seed1", 4.0, 1.0)
    shown.run("x-seed2", 4.0, status="failed")
    stopped = failure(sweep, 2, StoppedError("It stopped in good order.", remedy="go on"))
    failed = failure(sweep, 1, TrainingError("The loss is not a number.", remedy="look"))
    with pytest.raises(TrainingError) as caught:
        shown.standing(sweep, stopped, failed)
    assert caught.value.message == "2 of 3 runs of the sweep x failed: x-seed3, x-seed2."
    assert "The loss is not a number." in caught.value.context["x-seed2"]
    assert "/logs/x-5_1.log" in caught.value.context["x-seed2"]
    assert AGAIN in caught.value.remedy
    assert [row[2] for row in shown.rows()] == ["finished", "failed", "stopped"]
    with pytest.raises(StoppedError, match="1 of 3 runs of the sweep x stopped: x-seed3"):
        shown.standing(sweep, stopped)
    with pytest.raises(SlurmError):
        shown.standing(sweep, failure(sweep, 1, SlurmError("It was cancelled.", remedy="go on")))


def test_for_machines_the_table_is_part_of_the_error(shown: Shown) -> None:
    sweep = sweep_over("seed=1,2")
    shown.run("x-seed1", 4.0, 1.0)
    shown.opts = replace(shown.opts, json=True)
    with pytest.raises(TrainingError) as caught:
        shown.standing(sweep, failure(sweep, 1, TrainingError("The loss is not a number.", remedy="look")))
    told = json.loads(json.dumps(caught.value.to_json(), default=str))
    assert (told["sweep"], told["exit_code"]) == ("x", 10)
    assert [(one["index"], one["state"]) for one in told["members"]] == [(0, "finished"), (1, "failed")]
    assert shown.text.getvalue() == ""


def test_runs_that_found_no_room_are_said_with_exit_code_75(shown: Shown) -> None:
    shown.run("x-seed1", 4.0, 1.0)
    with pytest.raises(StoppedError, match="1 of 2 runs of the sweep x are not finished") as caught:
        shown.standing(sweep_over("seed=1,2"))
    assert caught.value.exit_code == 75
    assert caught.value.remedy == f"Submit them with: {AGAIN}"
    assert shown.rows()[1] == ["x-seed2", "2", "unfinished", "0", "-", "-"]

"""`sweep` on a real Slurm: arrays that train to their end, the queue's limits, failures trained again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.lab.followed import wait_until
from tests.lab.slurm import DEBUG_QOS
from tests.lab.test_slurm_train import SMALL, TrainLab, cluster, emptied

__all__ = ["cluster", "emptied"]
pytestmark = [pytest.mark.lab, pytest.mark.needs_env]

DATA = "dataset.path_or_dataset_id"


@pytest.fixture(scope="module")
def data(cluster: TrainLab) -> tuple[Path, Path]:
    """Two data sets of four conversations each."""
    source = (cluster.lab.home / "recipes" / "data" / "quickstart.jsonl").read_text().splitlines()
    paths = (cluster.lab.home / "first.jsonl", cluster.lab.home / "second.jsonl")
    for number, path in enumerate(paths):
        path.write_text("\n".join(source[number * 4 : number * 4 + 4]) + "\n")
    return paths


def words(
    cluster: TrainLab, data: tuple[Path, ...], *more: str | Path, seeds: str = "1,2", steps: int = 4,
    site: Path | None = None,
) -> list[str | Path]:  # fmt: skip
    settings = {**SMALL, "step_scheduler.max_steps": str(steps)}
    sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    config = cluster.lab.home / "recipes" / "train" / "quickstart.yaml"
    over = ["--over", f"seed={seeds}", "--over", f"{DATA}={','.join(map(str, data))}"]
    options: list[str | Path] = [
        "--recipe",
        "quickstart",
        "--site",
        site or cluster.site(),
        "--processes",
        "1",
    ]
    return ["sweep", config, *options, *sets, *over, *more]


def states(answer: dict[str, Any]) -> dict[str, str]:
    return {Path(member["run"]).name: member["state"] for member in answer["members"]}


def test_seeds_and_data_sets_train_two_at_a_time_and_what_failed_is_trained_by_the_same_command(
    cluster: TrainLab, data: tuple[Path, Path]
) -> None:
    command = words(cluster, data, "--name", "grid", "--at-once", "2", steps=24)
    submitted = cluster.envbuilder(*command, "--no-wait")
    runs = ["grid-seed1-first", "grid-seed1-second", "grid-seed2-first", "grid-seed2-second"]
    assert states(submitted) == dict.fromkeys(runs, "queued")
    first = submitted["members"][0]["job"]
    array = first.partition("_")[0]
    assert [member["job"] for member in submitted["members"]] == [f"{array}_{index}" for index in range(4)]
    # One that runs is cancelled; the others don't notice.
    wait_until(lambda: len(cluster.steps(runs[0])) > 2, "the first trains")
    now = {job["id"]: job for job in cluster.envbuilder("status")["jobs"]}
    assert now[first]["run"] == runs[0]
    assert now[first]["progress"]["total"] == 24
    assert now[f"{array}_3"]["run"] == runs[3]
    assert now[f"{array}_3"]["waits_for"] == "as many of its array's jobs run as may at once (--at-once)"
    cluster.lab.as_user(["scancel", first])
    error = cluster.envbuilder("status", "--follow", array, exit_code=9)
    assert error["message"] == f"1 of 4 runs of the sweep grid failed: {runs[0]}."
    assert f"The job {first} was cancelled by you." in error["context"][runs[0]]
    assert f"sweep-grid-{first}.log" in error["context"][runs[0]]
    assert "envbuilder --root" in error["remedy"]
    assert states(error) == {runs[0]: "failed", **dict.fromkeys(runs[1:], "finished")}
    assert [cluster.outcome(run)["status"] for run in runs[1:]] == ["finished"] * 3
    # A task by itself is a job like any other.
    single = cluster.envbuilder("status", "--follow", f"{array}_1")
    assert (single["job"], single["state"]) == (f"{array}_1", "COMPLETED")
    # The same words train what is left, from where it stopped, and then nothing.
    before = cluster.steps(runs[0])
    done = cluster.envbuilder(*command)
    assert states(done) == dict.fromkeys(runs, "finished")
    assert [member["steps"] for member in done["members"]] == [24] * 4
    assert [member["job"] is None for member in done["members"]] == [False, True, True, True]
    assert cluster.steps(runs[0])[: len(before)] == before
    assert cluster.envbuilder(*command)["members"][0]["job"] is None
    other = cluster.envbuilder(*words(cluster, data, "--name", "grid", seeds="1,3"), exit_code=3)
    assert other["message"].endswith("differs in --set, --over.")


def test_a_member_whose_data_only_training_finds_wrong_leaves_the_others(
    cluster: TrainLab, data: tuple[Path, Path]
) -> None:
    lost = cluster.lab.home / "lost.jsonl"
    lost.write_text(data[0].read_text())
    hold = cluster.lab.as_user(["sbatch", "--parsable", "--hold", "--wrap", "true"]).stdout.strip()
    after = ("--name", "lost", "--after", hold)
    command = words(cluster, (data[0], lost), *after, seeds="1")
    submitted = cluster.envbuilder(*command, "--no-wait")
    lost.unlink()
    cluster.lab.as_user(["scontrol", "release", hold])
    array = submitted["members"][0]["job"].partition("_")[0]
    error = cluster.envbuilder("status", "--follow", array, exit_code=3)
    assert error["message"] == "1 of 2 runs of the sweep lost failed: lost-seed1-lost."
    assert str(lost) in error["context"]["lost-seed1-lost"]
    assert cluster.outcome("lost-seed1-first")["status"] == "finished"
    # Before anything is submitted, the same is said with the member's name.
    again = cluster.envbuilder(*command, exit_code=8)
    assert again["message"].startswith("lost-seed1-lost: ")


def test_as_many_are_submitted_as_the_queue_takes_and_each_goes_on_in_its_next_life(
    cluster: TrainLab, data: tuple[Path, Path]
) -> None:
    site = cluster.site(qos=DEBUG_QOS)
    command = words(cluster, data[:1], "--name", "short", site=site, steps=24)
    planned = cluster.envbuilder(*command, "--dry-run")["dry_run"]
    assert planned["runs"] == 2
    assert not (cluster.root / "sweeps" / "short.json").exists()
    submitted = cluster.envbuilder(*command, "--no-wait")
    assert states(submitted) == {"short-seed1-first": "queued", "short-seed2-first": "unfinished"}
    job = submitted["members"][0]["job"]
    wait_until(lambda: len(cluster.steps("short-seed1-first")) > 2, "it trains")
    cluster.lab.as_user(["scancel", "--signal=USR1", "--batch", job])
    rest = cluster.envbuilder("status", "--follow", job.partition("_")[0], exit_code=75)
    assert rest["message"] == "1 of 2 runs of the sweep short are not finished, and in no queue."
    assert f"job {job} is queued again for life 2" in log(cluster, job)
    assert json.loads((cluster.root / f"logs/slurm/progress-{job}.json").read_text())["life"] >= 2
    assert cluster.steps("short-seed1-first") == list(range(1, 25))


def log(cluster: TrainLab, job: str) -> str:
    return next((cluster.root / "logs/slurm").glob(f"sweep-*-{job}.log")).read_text()

"""Runs as `report` and `status` show them: several jobs as one, whatever they left behind."""

from __future__ import annotations

import json
import os
import re
import time
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from envbuilder.errors import InputError
from envbuilder.paths import Root
from envbuilder.run_report import read_run, runs_now, write_report
from envbuilder.run_report.curves import Curve, nice_ticks, render_curves, thinned
from envbuilder.run_report.page import render
from envbuilder.run_report.walltime import walltime

XHTML, SVG = "{http://www.w3.org/1999/xhtml}", "{http://www.w3.org/2000/svg}"
HOSTILE = "<script>alert('x')</script> & \"quotes\" \x1b[31mred\x1b[0m \x00"
BEGAN = 1_790_000_000.0


class Trainer:
    """Writes the records of a run as the trainer does, on a clock of its own."""

    def __init__(self, run: Path, clock: float = BEGAN) -> None:
        self.run, self.clock = run, clock
        run.mkdir(parents=True, exist_ok=True)

    def write(self, kind: str, **fields: object) -> None:
        with (self.run / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **fields, "time": self.clock}) + "\n")

    def start(self, *, wait: float = 0.0, slurm: str = "1") -> None:
        """Ten seconds until all processes have met, five to prepare."""
        began = self.clock + wait
        self.clock = began + 15
        figures = {"name": "a.jsonl", "examples": 1000, "tokens": 9, "trained_tokens": 5}
        self.write(
            "start", device="NVIDIA H200", processes=2, steps=9, seconds_to_prepare=5.0, data=figures,
            kernels={"mamba": "fast"}, model={"parameters": 1234567},
        )  # fmt: skip
        self.write("job", job=slurm, began=began, host="node1", processes=2)

    def steps(self, first: int, last: int, *, seconds: float = 2.0) -> None:
        for step in range(first, last + 1):
            self.clock += seconds
            self.write(
                "step", step=step, steps=9, loss=10.0 - step, lr=1e-4, grad_norm=1.0, seconds=seconds,
                tokens_per_second=100.0 * step, mfu=0.25, memory_bytes=step << 30, seconds_left=40.0,
            )  # fmt: skip

    def outcome(self, status: str, **fields: object) -> None:
        (self.run / "outcome.json").write_text(json.dumps({"status": status, **fields}), encoding="utf-8")


@pytest.fixture
def stitched(tmp_path: Path) -> Path:
    """Three jobs: one killed at step 5 with a checkpoint of step 3, one that stopped, one to the end."""
    run = tmp_path / "root/runs/mine"
    trainer = Trainer(run)
    trainer.start(slurm="71")
    trainer.write("sample", when="before", prompt="2 + 2?", text="??", expected="4", seconds=1.0, step=0)
    trainer.clock += 1
    trainer.steps(1, 3)
    trainer.write("checkpoint", step=3, seconds=9.0, held_up_seconds=0.5)
    trainer.steps(4, 5)
    trainer.write("validation", step=5, loss=7.0, seconds=0.0)
    with (run / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "step": 6, "lo')
        file.write("\n")  # the next job's record begins a line of its own
    trainer.start(wait=100, slurm="72")
    trainer.steps(4, 6)
    trainer.clock += 3
    trainer.write("validation", step=6, loss=6.5, seconds=3.0)
    trainer.start(wait=50, slurm="73")
    trainer.steps(7, 9)
    trainer.write("sample", when="after", prompt="2 + 2?", text="4", expected="4", seconds=0.0, step=9)
    trainer.write("end", step=9)
    trainer.outcome("finished")
    packages = [{"name": "torch", "version": "2.11.0"}]
    receipt = {"recipe": "r", "lock_sha256": "a" * 64, "python": "3.11.7", "packages": packages}
    (run / "envbuilder.json").write_text(json.dumps(receipt), encoding="utf-8")
    (run / "config.yaml").write_text("device: cuda\n", encoding="utf-8")
    return run


def page_of(run: Path) -> ElementTree.Element:
    page = render(read_run(run), made_at=datetime(2026, 1, 1, tzinfo=UTC))
    return ElementTree.fromstring(page.partition("\n")[2])


def words(element: ElementTree.Element) -> str:
    return " ".join("".join(element.itertext()).split())


def test_a_step_that_was_done_again_counts_once_and_as_it_was_the_last_time(stitched: Path) -> None:
    history = read_run(stitched)
    assert list(history.steps) == list(range(1, 10))
    assert [(job.first_step, job.last_step) for job in history.jobs] == [(1, 5), (4, 6), (7, 9)]
    assert [record["step"] for record in history.repeated] == [4, 5]
    assert list(history.validations) == [6]  # that of step 5 went with its weights
    assert history.unread == 1


def test_all_of_the_time_is_told_once(stitched: Path) -> None:
    spent = walltime(read_run(stitched))
    assert spent == pytest.approx(
        {
            "waiting": 150, "starting": 30, "loading": 15, "first steps": 6, "steps": 12, "done again": 4,
            "validation": 3, "saves": 0.5, "samples": 1, "the rest": 0,
        }
    )  # fmt: skip
    jobs = read_run(stitched).jobs
    assert sum(spent.values()) == pytest.approx(jobs[-1].ended - jobs[0].began, abs=0.6)


def test_the_page_shows_the_run(stitched: Path) -> None:
    page = page_of(stitched)
    text = words(page)
    assert "mine: finished, 9 of 9 steps, in 3 jobs" in text
    for part in ("9 → 1", "25.0%", "9.00 GiB", "Slurm 72", "node1, NVIDIA H200", "1,234,567", "torch 2.11.0"):
        assert part in text, part
    pictures = page.findall(f".//{SVG}svg")
    assert [picture.findtext(f"{SVG}title") for picture in pictures] == [
        "Loss for a trained token", "Tokens per second", "Model FLOPs utilization", "Memory, peak so far",
        "Learning rate", "Norm of the gradient",
    ]  # fmt: skip
    for picture in pictures:
        borders = [line for line in picture.iter(f"{SVG}line") if line.get("class") == "border"]
        assert [words(border) for border in borders] == ["job 2 begins at step 4", "job 3 begins at step 7"]
    assert len(list(pictures[0].iter(f"{SVG}circle"))) == 9 + 1
    (sample,) = [div for div in page.iter(f"{XHTML}div") if div.get("class") == "sample"]
    assert words(sample) == "2 + 2?before??after4the data's answer4"


def test_the_page_needs_nothing_else(stitched: Path) -> None:
    page = page_of(stitched)
    tags = {element.tag.rpartition("}")[2] for element in page.iter()}
    assert not tags & {"script", "img", "link", "iframe"}
    assert not [name for element in page.iter() for name in element.keys() if name in ("href", "src")]  # noqa: SIM118
    style = "".join(element.text or "" for element in page.iter(f"{XHTML}style"))
    assert "prefers-color-scheme: dark" in style
    assert not re.search(r"url\(|@import|http", style)


def test_whatever_a_run_left_is_shown_and_never_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    trainer = Trainer(run)
    trainer.write("sample", when="before", prompt=HOSTILE, text=HOSTILE, expected=HOSTILE)
    trainer.outcome("failed", error={"message": HOSTILE})
    page = page_of(run)
    assert not list(page.iter(f"{XHTML}script"))
    assert words(page).count("<script>alert('x')</script> & \"quotes\" red \ufffd") == 5 - 1


@pytest.mark.parametrize(
    "lines",
    [
        b"",
        b"\xff\xfe garbage\n[1, 2]\n{}\nnull\n",
        b'{"kind": "step", "time": 1.0}\n',
        b'{"kind": "step", "step": 1, "time": 1.0, "loss": NaN, "seconds": "x", "memory_bytes": true}\n',
        b'{"kind": "start", "time": 1.0, "data": 3, "model": [], "seconds_to_prepare": "x"}\n',
        b'{"kind": "step", "step": 1, "time": 1.0, "loss": Infinity}\n{"kind": "validation", "time": 2.0}\n',
        b'{"kind": "start", "time": 9.0}\n{"kind": "step", "step": 1, "seconds": -5, "time": 1.0}\n',
    ],
)
def test_a_run_without_what_is_asked_for_still_has_a_page(tmp_path: Path, lines: bytes) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(lines)
    for name in ("outcome.json", "envbuilder.json"):
        (tmp_path / name).write_bytes(lines[: len(lines) // 2])
    assert "not ended" in words(page_of(tmp_path))


def test_a_folder_that_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)


def test_the_report_is_one_file(stitched: Path, tmp_path: Path) -> None:
    write_report(tmp_path / "out/report.html", read_run(stitched))
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["report.html"]


def test_status_says_how_far_each_run_is(stitched: Path, tmp_path: Path) -> None:
    root = Root(tmp_path / "root")
    left = {"seconds_left": 30.0, "jobs_left": 2}
    for name, ago in (("going", 5.0), ("silent", 5000.0), ("stopped", 9000.0)):
        trainer = Trainer(root.run(name), clock=time.time() - ago - 15 - 4)
        trainer.start()
        trainer.steps(1, 2)
    trainer.outcome("stopped", **left)
    (root.run("empty")).mkdir()
    runs = runs_now(root, None, is_here=lambda run: False)
    assert [(run.name, run.state, run.step, run.steps) for run in runs] == [
        ("going", "running", 2, 9), ("silent", "unknown", 2, 9), ("stopped", "stopped", 2, 9),
        ("mine", "finished", 9, 9),
    ]  # fmt: skip
    going, silent, stopped, mine = runs
    assert (going.seconds_left, going.silent_s, going.loss) == (40.0, None, 8.0)
    assert silent.silent_s == pytest.approx(5000, abs=60)
    assert (stopped.seconds_left, stopped.jobs_left) == (30.0, 2)
    assert mine.seconds_left is None
    assert [run.name for run in runs_now(root, "r", is_here=lambda run: False)] == ["mine"]
    assert runs_now(root, None, is_here=lambda run: run.name == "silent")[1].state == "running"


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [(0, 8, [0, 2, 4, 6, 8]), (0.13, 0.24, [0.1, 0.15, 0.2, 0.25]), (5, 5, [5])],
)
def test_an_axis_has_round_numbers(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_a_long_curve_keeps_its_extremes() -> None:
    points = [(float(step), 5.0 if step == 70_001 else -5.0 if step == 3 else 0.0) for step in range(100_000)]
    kept = thinned(points)
    assert len(kept) <= 400
    assert kept == sorted(kept)
    assert {(70_001.0, 5.0), (3.0, -5.0)} <= set(kept)
    assert len(render_curves("x", [Curve("x", points)], [], str)) < 20_000


def test_the_commands_print_both(stitched: Path, tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    from envbuilder.cli import main

    root, out = str(tmp_path / "root"), tmp_path / "page.html"
    monkeypatch.setenv("PATH", os.environ["PATH"])
    for words_typed, expected in (
        (("report", "mine", "--out", str(out)), f"{out}: 9 steps in 3 jobs"),
        (("report", str(stitched)), f"{stitched / 'report.html'}: 9 steps in 3 jobs"),
        (("status",), "mine  finished; step 9 of 9; loss 1.0000"),
    ):
        monkeypatch.setattr("sys.argv", ["envbuilder", "--root", root, *words_typed])
        with pytest.raises(SystemExit) as ended:
            main()
        assert ended.value.code == 0
        assert expected in capsys.readouterr().out
    assert out.read_text(encoding="utf-8").startswith("<!DOCTYPE html>")

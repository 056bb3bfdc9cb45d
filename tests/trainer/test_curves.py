"""Curves for other viewers: which writers there are, what they get; a missing package is told once."""

from __future__ import annotations

import importlib
import json
import struct
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from trainer import curves
from trainer.config import LoggingSection
from trainer.curves import numbers_of
from trainer.metrics import Metrics

from .conftest import RunTrainer

VIEWERS = Path(__file__).parents[2] / ".cache/test-viewers"
ALONE = LoggingSection(tensorboard=False, wandb=False)


class Recorder:
    """Keeps what a writer is given."""

    def __init__(self, run_dir: Path) -> None:
        self.written: list[tuple[int, dict[str, float]]] = []
        self.closed = False

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        self.written.append((step, dict(numbers)))

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    found = Recorder(tmp_path)
    monkeypatch.setattr(curves, "_is_installed", lambda package: package == "tensorboard")
    monkeypatch.setattr(curves, "WRITERS", {"tensorboard": lambda run_dir, section: found})
    return found


def test_steps_and_validations_are_curves(recorder: Recorder, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, rank=0, logging=LoggingSection())
    metrics.write("start", steps=9, processes=1)
    metrics.write("step", step=1, steps=9, loss=2.0, mfu=None)
    metrics.write("validation", step=1, loss=3.0)
    metrics.write("note", text="x")
    metrics.close()
    assert recorder.written == [(1, {"step/loss": 2.0}), (1, {"validation/loss": 3.0})]
    assert recorder.closed


def test_only_the_first_rank_writes(recorder: Recorder, tmp_path: Path) -> None:
    Metrics(tmp_path, rank=1, logging=LoggingSection()).write("step", step=1, loss=2.0)
    assert not recorder.written
    assert not (tmp_path / "metrics.jsonl").exists()


def test_a_missing_package_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(curves, "_is_installed", lambda package: False)
    metrics = Metrics(tmp_path, rank=0, logging=LoggingSection())
    metrics.write("step", step=1, loss=2.0)
    metrics.close()
    Metrics(tmp_path, rank=1, logging=LoggingSection()).close()
    assert capsys.readouterr().out.count("no curves for tensorboard and wandb: add the package") == 1
    Metrics(tmp_path, rank=0, logging=ALONE).close()
    assert not capsys.readouterr().out


def test_a_package_that_is_demanded_and_missing_ends_the_run_with_7(
    run_trainer: RunTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(curves, "_is_installed", lambda package: False)
    code, outcome = run_trainer("logging.tensorboard=true")
    assert (code, outcome["exit_code"]) == (7, 7)
    assert "the env has no package tensorboard" in outcome["error"]["message"]


def test_names_say_the_kind_and_steps_are_no_curve() -> None:
    fields = {"step": 3, "steps": 9, "loss": 1, "mfu": None, "path": "x", "tokens_per_second": 2.5}
    assert numbers_of("step", fields) == {"step/loss": 1.0, "step/tokens_per_second": 2.5}


@pytest.fixture
def viewers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The packages tensorboard and wandb, which `make test-trainer` brings, behind the env's own."""
    if not VIEWERS.exists():
        pytest.skip("the packages tensorboard and wandb are not there: make .cache/test-viewers/ready")
    monkeypatch.setattr(sys, "path", [*sys.path, str(VIEWERS)])


@pytest.mark.usefixtures("viewers")
def test_tensorboards_own_reader_reads_a_stitched_run(run_trainer: RunTrainer, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = stitched(run_trainer, tmp_path, "logging.wandb=false")
    accumulator: Any = EventAccumulator(str(run / "tensorboard"))
    accumulator.Reload()
    read = {event.step: event.value for event in accumulator.Scalars("step/loss")}
    written = {r["step"]: r["loss"] for r in records(run) if r["kind"] == "step"}
    assert read == pytest.approx(written)
    assert sorted(read) == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in accumulator.Scalars("validation/loss")] == [3, 6]


@pytest.mark.usefixtures("viewers")
def test_wandbs_own_messages_read_a_stitched_run(run_trainer: RunTrainer, tmp_path: Path) -> None:
    messages: Any = importlib.import_module("wandb.proto.wandb_internal_pb2")
    named = ("logging.wandb_project=tuning", "logging.wandb_name=first")
    run = stitched(run_trainer, tmp_path, "logging.tensorboard=false", *named)
    files = sorted((run / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    read: dict[int, float] = {}
    ids = set()
    for data in (data for file in files for data in leveldb_records(file.read_bytes())):
        record: Any = messages.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            ids.add((record.run.run_id, record.run.project, record.run.display_name))
        items = {
            item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
        }
        if "step/loss" in items:
            read[items["step"]] = items["step/loss"]
    assert read == pytest.approx({r["step"]: r["loss"] for r in records(run) if r["kind"] == "step"})
    assert ids == {((run / "wandb/run-id").read_text(), "tuning", "first")}


def leveldb_records(data: bytes) -> Iterator[bytes]:
    """LevelDB's log format, which a .wandb file has after 7 bytes: blocks of 32 KiB, headers of 7."""
    place, parts = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[place : place + 7])
        parts += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or its last part
            yield parts
            parts = b""


def stitched(run_trainer: RunTrainer, tmp_path: Path, *overrides: str) -> Path:
    """A run of two jobs."""
    settings = (
        *overrides, "validation_dataset.path_or_dataset_id=validation.jsonl",
        "step_scheduler.val_every_steps=3", "samples.prompts=[]",
    )  # fmt: skip
    (tmp_path / "run").mkdir()
    (tmp_path / "run/stop").touch()
    assert run_trainer(*settings)[0] == 75
    assert run_trainer(*settings)[0] == 0
    return tmp_path / "run"


def records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]

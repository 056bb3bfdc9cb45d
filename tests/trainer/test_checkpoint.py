"""Checkpoints are whole or not there, and a damaged one is named and passed by."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.checkpoint import (
    State,
    committed,
    load_checkpoint,
    newest_sound,
    read_state,
    remove_unfinished,
    write_checkpoint,
)
from trainer.control import Control
from trainer.errors import ConfigError, TrainingFailed
from trainer.parallel import World
from trainer.saving import Saver

from .conftest import RunTrainer, losses

ALONE = World(0, 1, torch.device("cpu"))


def trained() -> tuple[dict[str, nn.Parameter], torch.optim.AdamW]:
    """Two parameters and an optimizer that has seen one step."""
    torch.manual_seed(1)
    adapters = {"a": nn.Parameter(torch.randn(2, 3)), "b": nn.Parameter(torch.randn(3))}
    optimizer = torch.optim.AdamW(adapters.values())
    sum((parameter**2).sum() for parameter in adapters.values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    return adapters, optimizer


def state_of(step: int) -> State:
    return State(step, 2.0, 1.0, processes=1, settings={"seed": 3}, stamp={"env": "sha256:1"})


def save(folder: Path, step: int, keep_last: int = 2) -> Path:
    adapters, optimizer = trained()
    saver = Saver(folder, ALONE, Control(ALONE), keep_last=keep_last)
    saver.begin(state_of(step), adapters, optimizer)
    saver.wait()
    saver.raise_failure()
    return saver.collect()[0].path


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 7)
    expected, before = trained()
    draws = torch.rand(3)
    adapters = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in expected.items()}
    optimizer = torch.optim.AdamW(adapters.values())
    state = read_state(saved)
    assert state == state_of(7)
    load_checkpoint(saved, state, adapters, optimizer, ALONE)
    assert torch.equal(torch.rand(3), draws)
    for name, parameter in expected.items():
        assert torch.equal(adapters[name], parameter)
        for key, value in before.state[parameter].items():
            assert torch.equal(optimizer.state[adapters[name]][key], value)


def test_a_checkpoint_holds_the_moment_it_was_begun_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training goes on, and changes everything, while the thread is about to write."""
    go_on = threading.Event()

    def write_late(*arguments: object) -> None:
        assert go_on.wait(60)
        write_checkpoint(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr("trainer.saving.write_checkpoint", write_late)
    adapters, optimizer = trained()
    saver = Saver(tmp_path, ALONE, Control(ALONE), keep_last=2)
    saver.begin(state_of(1), adapters, optimizer)
    assert saver.busy
    with torch.no_grad():
        for parameter in adapters.values():
            parameter.zero_()
            optimizer.state[parameter]["exp_avg"].zero_()
    go_on.set()
    saver.begin(state_of(2), adapters, optimizer)  # waits for the first: both are whole
    saver.wait()
    assert [saved.step for saved in saver.collect()] == [1, 2]
    for step, expected in ((1, trained()[0]), (2, adapters)):
        loaded = {name: nn.Parameter(torch.ones_like(parameter)) for name, parameter in expected.items()}
        fresh = torch.optim.AdamW(loaded.values())
        load_checkpoint(tmp_path / f"step-{step:06d}", state_of(step), loaded, fresh, ALONE)
        assert all(torch.equal(loaded[name], parameter) for name, parameter in expected.items())
        assert bool(fresh.state[loaded["a"]]["exp_avg"].any()) == (step == 1)


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 10):
        save(tmp_path, step)
    assert [folder.name for folder in committed(tmp_path)] == ["step-000010", "step-000003"]


@pytest.mark.parametrize("file", ["adapter.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("fault", ["truncated", "flipped", "absent"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    tmp_path: Path, file: str, fault: str
) -> None:
    before, newest = save(tmp_path, 1), save(tmp_path, 2)
    data = bytearray((newest / file).read_bytes())
    if fault == "truncated":
        del data[len(data) // 2 :]
    data[5] ^= 1
    (newest / file).write_bytes(data)
    if fault == "absent":
        (newest / file).unlink()
    warnings: list[str] = []
    assert newest_sound(tmp_path, warnings.append) == before
    assert "step-000002" in warnings[0]
    assert file in warnings[0]


def test_a_folder_without_its_marker_does_not_count_and_leftovers_go(tmp_path: Path) -> None:
    kept = save(tmp_path, 1)
    (save(tmp_path, 2) / "COMMITTED").unlink()
    (tmp_path / ".tmp-xyz").mkdir()
    (tmp_path / ".tmp-xyz/adapter.safetensors").write_bytes(b"half")
    remove_unfinished(tmp_path)
    assert not (tmp_path / ".tmp-xyz").exists()
    assert newest_sound(tmp_path, lambda _: None) == kept
    assert save(tmp_path, 2) in committed(tmp_path)


def test_a_failed_write_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(TrainingFailed, match="step 1 can't be written"):
        save(tmp_path / "checkpoints", 1)
    assert [file.name for file in tmp_path.iterdir()] == ["checkpoints"]


def test_what_came_after_a_step_is_dropped_but_never_the_only_checkpoint(tmp_path: Path) -> None:
    saver = Saver(tmp_path, ALONE, Control(ALONE), keep_last=3)
    assert saver.drop_after(5) is None
    for step in (4, 6, 8):
        save(tmp_path, step, keep_last=3)
    assert saver.drop_after(5) == 4
    assert saver.drop_after(3) == 4


def test_a_checkpoint_of_another_adapter_or_trainer_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    adapters, optimizer = trained()
    with pytest.raises(ConfigError, match="peft"):
        load_checkpoint(saved, read_state(saved), {"a": adapters["a"]}, optimizer, ALONE)
    (saved / "state.json").write_text('{"step": 1, "global_batch_size": 4}')
    with pytest.raises(ConfigError, match="another version of the trainer"):
        read_state(saved)


@pytest.mark.parametrize(
    ("setting", "was", "now"),
    [
        ("dataset.packing", False, "true"),
        ("dataset.seq_length", 64, "48"),
        ("dataset.train_on", "assistant", "all"),
        ("dataset.shuffle", True, "false"),
        ("step_scheduler.global_batch_size", 4, "8"),
        ("seed", 3, "4"),
        ("peft.alpha", 32, "16"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_name(
    run_trainer: RunTrainer, setting: str, was: object, now: str
) -> None:
    assert run_trainer("step_scheduler.max_steps=1")[0] == 0
    code, outcome = run_trainer(f"{setting}={now}")
    assert code == 3
    assert setting in outcome["error"]["message"]
    assert outcome["error"]["context"][setting].startswith(f"was {was}, is ")


def test_another_model_or_data_is_refused_and_another_env_is_noted(
    run_trainer: RunTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stamp = {"env": "sha256:1", "model": "sha256:2", "data": "sha256:3", "drift": None}
    monkeypatch.setenv("ENVBUILDER_STAMP", json.dumps(stamp))
    _, outcome = run_trainer("step_scheduler.max_steps=1")
    assert outcome["stamp"] == stamp
    assert json.loads((tmp_path / "run/checkpoints/step-000001/state.json").read_text())["stamp"] == stamp
    for name in ("model", "data"):
        monkeypatch.setenv("ENVBUILDER_STAMP", json.dumps({**stamp, name: "sha256:9"}))
        code, outcome = run_trainer("step_scheduler.max_steps=2")
        assert (code, outcome["error"]["context"][name]) == (3, f"was {stamp[name]}, is sha256:9")
    monkeypatch.setenv("ENVBUILDER_STAMP", json.dumps({**stamp, "env": "sha256:9"}))
    assert run_trainer("step_scheduler.max_steps=2")[0] == 0
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert any("env changed" in record.get("text", "") for record in records)
    jobs = [record for record in records if record["kind"] == "job"]
    assert [(job["step"], job["processes"], job["stamp"]["env"]) for job in jobs] == [
        (0, 1, "sha256:1"),
        (1, 1, "sha256:9"),
    ]
    monkeypatch.setenv("ENVBUILDER_STAMP", "[]")
    assert run_trainer()[0] == 3


def test_a_run_goes_on_from_the_sound_checkpoint_with_equal_losses(
    run_trainer: RunTrainer, tmp_path: Path
) -> None:
    run_trainer("step_scheduler.ckpt_every_steps=2")
    run = tmp_path / "run"
    expected = losses(run)
    newest = run / "checkpoints/step-000006/optimizer.safetensors"
    newest.write_bytes(newest.read_bytes()[:-9])
    (run / "metrics.jsonl").unlink()
    code, outcome = run_trainer("step_scheduler.ckpt_every_steps=2")
    assert (code, outcome["steps"]) == (0, 6)
    assert losses(run) == {step: expected[step] for step in (5, 6)}
    notes = [json.loads(line).get("text", "") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert any("step-000006 is damaged (optimizer.safetensors has" in note for note in notes)


def test_checkpoints_in_the_way_of_a_fresh_run_are_not_overwritten(run_trainer: RunTrainer) -> None:
    assert run_trainer()[0] == 0
    code, outcome = run_trainer("checkpoint.resume=false")
    assert (code, "already has checkpoints" in outcome["error"]["message"]) == (3, True)


def test_a_finished_run_started_again_is_finished(run_trainer: RunTrainer) -> None:
    _, before = run_trainer()
    code, outcome = run_trainer()
    assert (code, outcome["steps"]) == (0, 6)
    assert (outcome["first_loss"], outcome["last_loss"]) == (before["first_loss"], before["last_loss"])

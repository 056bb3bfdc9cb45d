"""Checkpoints are whole or not there, and a damaged one is named and passed by."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from trainer.checkpoint import (
    State,
    committed,
    load_checkpoint,
    newest_sound,
    remove_unfinished,
    save_checkpoint,
)
from trainer.errors import ConfigError, TrainingFailed
from trainer.parallel import World

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


def save(folder: Path, step: int, keep_last: int = 2) -> Path:
    adapters, optimizer = trained()
    state = State(step, 4, 2.0, 1.0, processes=1, seed=3)
    return save_checkpoint(folder, state, adapters, optimizer, ALONE, keep_last=keep_last)


def test_everything_comes_back(tmp_path: Path) -> None:
    saved = save(tmp_path, 7)
    expected, before = trained()
    draws = torch.rand(3)
    adapters = {name: nn.Parameter(torch.zeros_like(parameter)) for name, parameter in expected.items()}
    optimizer = torch.optim.AdamW(adapters.values())
    state = load_checkpoint(saved, adapters, optimizer, ALONE, global_batch_size=4, seed=3)
    assert state == State(7, 4, 2.0, 1.0, processes=1, seed=3)
    assert torch.equal(torch.rand(3), draws)
    for name, parameter in expected.items():
        assert torch.equal(adapters[name], parameter)
        for key, value in before.state[parameter].items():
            assert torch.equal(optimizer.state[adapters[name]][key], value)


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


def test_a_checkpoint_of_another_adapter_or_batch_size_is_refused(tmp_path: Path) -> None:
    saved = save(tmp_path, 1)
    adapters, optimizer = trained()
    with pytest.raises(ConfigError, match="global_batch_size"):
        load_checkpoint(saved, adapters, optimizer, ALONE, global_batch_size=8, seed=3)
    with pytest.raises(ConfigError, match="peft"):
        load_checkpoint(saved, {"a": adapters["a"]}, optimizer, ALONE, global_batch_size=4, seed=3)


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

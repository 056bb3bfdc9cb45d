"""Whole runs on the command line: what they leave, how they end, and that resuming changes nothing."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import torch

from trainer.reading import read_config

from .conftest import RunTrainer, losses


def test_a_finished_run_leaves_everything_the_contract_names(run_trainer: RunTrainer, tmp_path: Path) -> None:
    code, outcome = run_trainer(
        "validation_dataset.path_or_dataset_id=validation.jsonl", "step_scheduler.val_every_steps=4",
        "step_scheduler.ckpt_every_steps=2", "distributed.activation_checkpointing=true", "peft.dropout=0.1",
    )  # fmt: skip
    run = tmp_path / "run"
    assert (code, outcome["status"], outcome["exit_code"], outcome["error"]) == (0, "finished", 0, None)
    assert outcome["steps"] == 6
    assert outcome["last_loss"] < outcome["first_loss"] - 0.5
    assert outcome["tokens_per_second"] > 0
    assert outcome["first_step_seconds"] > 0
    assert outcome["peak_memory_bytes"] > 1e8
    assert Path(outcome["adapter"]) == run / "adapter"
    assert {file.name for file in (run / "adapter").iterdir()} == {
        "base.json",
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    assert [folder.name for folder in sorted((run / "checkpoints").iterdir())] == [
        "step-000004",
        "step-000006",
    ]
    assert read_config(run / "config.yaml").peft.dropout == 0.1
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["kind"] == "start"
    assert records[0]["kernels"]["mamba"] == "2 layers on the slow reference (PyTorch)"
    assert [r["step"] for r in records if r["kind"] == "validation"] == [4, 6]
    assert {
        "loss",
        "lr",
        "grad_norm",
        "tokens",
        "trained_tokens",
        "tokens_per_second",
        "memory_bytes",
    } <= set(next(r for r in records if r["kind"] == "step"))


def test_stopping_and_going_on_gives_the_losses_of_an_uninterrupted_run(
    run_trainer: RunTrainer, tmp_path: Path
) -> None:
    settings = ("peft.dropout=0.2", "lr_scheduler.lr_decay_style=cosine", "step_scheduler.ckpt_every_steps=3")
    run_trainer(*settings, run="straight")
    stop = tmp_path / "parts" / "stop"
    stop.parent.mkdir()
    stop.touch()
    stops = []
    while (ended := run_trainer(*settings, run="parts"))[0] == 75:
        stops.append(ended[1]["steps"])
        assert ended[1]["status"] == "stopped"
        assert ended[1]["stopped_by_file"]
        assert "run the same command again" in ended[1]["error"]["remedy"]
        assert not stop.exists()
        if len(stops) < 3:
            stop.touch()
    assert stops == [1, 2, 3]
    assert ended[0] == 0
    assert losses(tmp_path / "parts") == losses(tmp_path / "straight")
    first, second = (tmp_path / run / "adapter/adapter_model.safetensors" for run in ("straight", "parts"))
    assert first.read_bytes() == second.read_bytes()


def test_sigterm_stops_at_the_next_step_boundary(
    run_trainer: RunTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.metrics import Metrics

    write = Metrics.write

    def signal_during_step_2(self: Metrics, kind: str, **fields: object) -> None:
        if (kind, fields.get("step")) == ("step", 2):
            os.kill(os.getpid(), signal.SIGTERM)
        write(self, kind, **fields)  # type: ignore[arg-type]

    monkeypatch.setattr(Metrics, "write", signal_during_step_2)
    code, outcome = run_trainer()
    assert (code, outcome["status"], outcome["steps"]) == (75, "stopped", 2)
    assert not outcome["stopped_by_file"]
    assert (tmp_path / "run/checkpoints/step-000002/COMMITTED").exists()


def test_a_loss_that_is_no_number_stops_the_run_and_names_step_and_lines(run_trainer: RunTrainer) -> None:
    code, outcome = run_trainer("optimizer.lr=1e30")
    assert (code, outcome["status"], outcome["exit_code"]) == (10, "failed", 10)
    assert outcome["error"]["context"]["step"] == "2"
    assert outcome["error"]["context"]["lines"]
    assert outcome["steps"] == 1
    assert "lower optimizer.lr" in outcome["error"]["remedy"]


def test_a_wrong_config_ends_with_3_and_an_outcome(run_trainer: RunTrainer) -> None:
    code, outcome = run_trainer("peft.dim=none")
    assert (code, outcome["exit_code"], outcome["status"]) == (3, 3, "failed")
    assert "peft.dim" in outcome["error"]["message"]


def test_a_broken_data_line_ends_with_3(run_trainer: RunTrainer, tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write("{broken\n")
    code, outcome = run_trainer()
    assert (code, outcome["exit_code"]) == (3, 3)
    assert "line 13: not JSON" in outcome["error"]["message"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="shows what happens without a GPU")
def test_cuda_asked_for_and_absent_ends_with_7(run_trainer: RunTrainer) -> None:
    code, outcome = run_trainer("device=cuda")
    assert (code, outcome["exit_code"], outcome["error"]["context"]["key"]) == (7, 7, "device")


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("model.config.model_type=gpt2", "gpt2"),
        ("model.config.mamba_head_size=3", "mamba_head_size"),
        ("model.config.vocab_size=100", "262 tokens"),
        ("step_scheduler.global_batch_size=3", "can't be shared out"),
        ("model.config.hybrid_override_pattern=MX", "nemotron_h"),
    ],
)
def test_a_model_that_can_not_be_trained_right_is_refused(
    run_trainer: RunTrainer, override: str, text: str
) -> None:
    code, outcome = run_trainer(override)
    assert (code, outcome["exit_code"]) == (3, 3)
    assert text in outcome["error"]["message"]


def test_the_same_tokens_weigh_the_same_in_any_micro_batch(run_trainer: RunTrainer, tmp_path: Path) -> None:
    for size in (1, 2, 4):
        run_trainer(f"step_scheduler.local_batch_size={size}", "checkpoint.enabled=false", run=f"by-{size}")
    one, two, four = (losses(tmp_path / f"by-{size}") for size in (1, 2, 4))
    assert two == pytest.approx(one, rel=1e-4)
    assert four == pytest.approx(one, rel=1e-4)


def test_epochs_end_the_run(run_trainer: RunTrainer, tmp_path: Path) -> None:
    code, outcome = run_trainer("step_scheduler.max_steps=null", "step_scheduler.num_epochs=1")
    assert (code, outcome["steps"]) == (0, 3)


def test_a_model_folder_trains_as_well_as_a_config(
    run_trainer: RunTrainer, causal_lm: object, tmp_path: Path
) -> None:
    causal_lm.save_pretrained(tmp_path / "model")  # type: ignore[attr-defined]
    settings = ("checkpoint.enabled=false", "step_scheduler.max_steps=2")
    run_trainer(*settings, run="config")
    folder = (
        "model.config=null",
        "model.init=null",
        f"model.pretrained_model_name_or_path={tmp_path / 'model'}",
    )
    assert run_trainer(*settings, *folder, run="folder")[0] == 0
    assert losses(tmp_path / "folder") == losses(tmp_path / "config")
    adapter = json.loads((tmp_path / "folder/adapter/adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == str(tmp_path / "model")


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_plain_transformers_train_too(run_trainer: RunTrainer, family: str) -> None:
    sizes = (
        "hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, head_dim: 16"
    )
    config = (
        f"{{model_type: {family}, vocab_size: 264, num_key_value_heads: 1, {sizes}, initializer_range: 0.2}}"
    )
    code, outcome = run_trainer(f"model.config={config}")
    assert code == 0
    assert outcome["last_loss"] < outcome["first_loss"]


def test_other_weight_formats_and_absent_folders_are_refused(run_trainer: RunTrainer, tmp_path: Path) -> None:
    folder = (
        "model.config=null",
        "model.init=null",
        f"model.pretrained_model_name_or_path={tmp_path / 'model'}",
    )
    assert "no readable config.json" in run_trainer(*folder)[1]["error"]["message"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text('{"model_type": "nemotron_h"}')
    (tmp_path / "model/pytorch_model.bin").touch()
    assert "no safetensors" in run_trainer(*folder)[1]["error"]["message"]


def test_a_deterministic_run_asks_pytorch_for_it_and_trains(run_trainer: RunTrainer) -> None:
    try:
        code, _ = run_trainer("deterministic=true", "step_scheduler.max_steps=2")
        assert code == 0
        assert torch.are_deterministic_algorithms_enabled()
    finally:
        torch.use_deterministic_algorithms(False)

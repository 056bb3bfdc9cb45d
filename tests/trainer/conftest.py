"""Fixtures of the trainer's tests. They need an environment with torch; elsewhere none is collected."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]

MESSAGES = [
    [
        {"role": "user", "content": f"What is {n} and {n}?"},
        {"role": "assistant", "content": f"It is {2 * n}."},
    ]
    for n in range(12)
]

CONFIG = """\
device: cpu
seed: 3
model:
  config:
    model_type: nemotron_h
    hybrid_override_pattern: ME*M
    vocab_size: 264
    hidden_size: 32
    num_attention_heads: 2
    num_key_value_heads: 1
    head_dim: 16
    mamba_num_heads: 4
    mamba_head_dim: 16
    n_groups: 2
    ssm_state_size: 8
    chunk_size: 16
    intermediate_size: 32
    moe_intermediate_size: 32
    moe_shared_expert_intermediate_size: 48
    n_routed_experts: 4
    num_experts_per_tok: 2
    max_position_embeddings: 256
    initializer_range: 0.2
  init: random
  dtype: float32
  tokenizer: byte
peft:
  match_all_linear: true
  dim: 4
dataset:
  path_or_dataset_id: train.jsonl
  seq_length: 64
step_scheduler:
  global_batch_size: 4
  local_batch_size: 2
  max_steps: 6
optimizer:
  lr: 1.0e-2
"""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # peft, transformers and torch warn about one another; that is not this project's to mend.
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.filterwarnings("ignore::FutureWarning"))
            item.add_marker(pytest.mark.filterwarnings("ignore::DeprecationWarning"))


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    torch.set_num_threads(1)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("USE_HUB_KERNELS", "0")


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    """A small, right config and its data: mamba, expert and attention blocks, in fp32."""
    rows = [json.dumps({"messages": messages}) + "\n" for messages in MESSAGES]
    (tmp_path / "train.jsonl").write_text("".join(rows))
    (tmp_path / "validation.jsonl").write_text("".join(rows[:3]))
    file = tmp_path / "config.yaml"
    file.write_text(CONFIG)
    return file


@pytest.fixture
def causal_lm(config_file: Path) -> Any:
    """The small model with random weights, without LoRA."""
    import torch

    from trainer.kernels import find_mamba_kernels
    from trainer.model import build_model, model_config
    from trainer.reading import read_config

    kernels = find_mamba_kernels("cpu")
    section = read_config(config_file).model
    return build_model(section, model_config(section), kernels, torch.device("cpu"), seed=3)


RunTrainer = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def run_trainer(config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunTrainer:
    """Runs the command line in this process; returns its exit code and outcome.json."""
    from trainer.__main__ import main

    def run(*overrides: str, run: str = "run") -> tuple[int, dict[str, Any]]:
        sets = [part for override in overrides for part in ("--set", override)]
        folder = tmp_path / run
        monkeypatch.setattr(sys, "argv", ["trainer", str(config_file), "--run-dir", str(folder), *sets])
        code = main()
        return code, json.loads((folder / "outcome.json").read_text())

    return run


def losses(run_dir: Path) -> dict[int, float]:
    """Step → loss, from metrics.jsonl."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return {record["step"]: record["loss"] for record in records if record["kind"] == "step"}

"""Answers to fixed prompts: the cache gives what computing everything again gives, and nothing changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import nn

from trainer.chat import IGNORED
from trainer.config import SamplesSection
from trainer.data import Dataset, Example, open_dataset
from trainer.kernels import find_mamba_kernels
from trainer.lora import adapter_parameters, add_lora, choose_targets
from trainer.model import TrainingModel, build_model, checkpoint_activations, model_config
from trainer.parallel import World
from trainer.prepare import Run
from trainer.reading import read_config
from trainer.samples import generate, prompts_of
from trainer.tokenizer import open_tokenizer

from .conftest import RunTrainer, losses

QUICKSTART = Path(__file__).parents[2] / "recipes/train/quickstart.yaml"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOT = Path(__file__).parents[2]


def tiny_run(*overrides: str, device: str = DEVICE) -> Run:
    """The quickstart's Nemotron-H with adapters that change its answers, as a run is prepared."""
    # causal_conv1d's cached path takes strides of multiples of 8: in_proj's outputs are 200 so, not 196.
    sizes = ["model.config.mamba_num_heads=8", "model.config.mamba_head_dim=8"]
    config = read_config(QUICKSTART, ["samples.max_new_tokens=24", f"device={device}", *sizes, *overrides])
    place = torch.device(device)
    model = build_model(
        config.model, model_config(config.model), find_mamba_kernels(config.device), place, seed=1
    )
    adapted = add_lora(model, choose_targets(model, config.peft), config.peft, seed=1)
    for name, parameter in adapter_parameters(adapted).items():
        if "lora_B" in name:  # zero at the beginning
            values = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name)))
            parameter.data.copy_(0.1 * values)
    checkpoint_activations(model)
    tokenizer = open_tokenizer(config.model)
    run = SimpleNamespace(
        config=config,
        training_model=TrainingModel(model).train(),
        plan=SimpleNamespace(shard=False),
        tokenizer=tokenizer,
        pad=tokenizer.pad_token_id,
        world=World(0, 1, place),
        peft_model=adapted,
    )
    return cast("Run", run)


def prompt(run: Run, text: str) -> tuple[int, ...]:
    return next(prompts_of(SamplesSection(prompts=(text,)), None, run.tokenizer)).ids


@torch.no_grad()
def logits(run: Run, ids: list[int]) -> torch.Tensor:
    """[length, vocabulary] of a whole pass without a cache, as in training."""
    model: Any = run.training_model.eval()
    output: torch.Tensor = model.causal_lm(
        input_ids=torch.tensor([ids], device=run.world.device), use_cache=False
    ).logits
    return output[0].float()


def greedy(run: Run, ids: tuple[int, ...]) -> list[int]:
    """Computes everything again for each token."""
    answer: list[int] = []
    while len(answer) < run.config.samples.max_new_tokens:
        best = int(logits(run, [*ids, *answer])[-1].argmax())
        if best == run.tokenizer.eos_token_id:
            break
        answer.append(best)
    return answer


@pytest.mark.parametrize("text", ["a", "What is 3 and 4?", "longer than one chunk of the scan, " * 2])
def test_the_cache_gives_the_tokens_of_computing_everything_again(text: str) -> None:
    run = tiny_run("model.dtype=float32")
    ids = prompt(run, text)
    answer = generate(run, ids)
    assert answer == greedy(run, ids)
    assert len(set(answer)) > 5
    with run.peft_model.disable_adapter():
        assert generate(run, ids) != answer


def test_in_bf16_no_token_is_worse_than_rounding_makes_it() -> None:
    run = tiny_run("model.dtype=bfloat16")
    ids = prompt(run, "What is 3 and 4?")
    answer = generate(run, ids)
    every = logits(run, [*ids, *answer])[len(ids) - 1 : -1]
    chosen = every.gather(1, torch.tensor(answer, device=every.device)[:, None]).squeeze(1)
    best = every.max(dim=1).values
    # A bf16 number has 8 bits; what differs by a few of the last is the same.
    assert ((best - chosen) <= 2**-5 * best.abs()).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_plain_transformers_answer_too(family: str) -> None:
    config = (
        f"{{model_type: {family}, vocab_size: 264, num_key_value_heads: 1, hidden_size: 32, "
        "intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 2, head_dim: 16, "
        "initializer_range: 0.2}"
    )
    run = tiny_run(f"model.config={config}", "model.dtype=float32")
    ids = prompt(run, "What is 3 and 4?")
    assert generate(run, ids) == greedy(run, ids)


def test_an_answer_ends_before_the_token_that_ends_it() -> None:
    run = tiny_run("model.dtype=float32")
    ids = prompt(run, "a")
    answer = generate(run, ids)
    run.tokenizer.eos_token = run.tokenizer.convert_ids_to_tokens(answer[4])
    assert generate(run, ids) == answer[: answer.index(answer[4])]


def test_the_prompts_of_the_validation_data_end_where_the_answer_begins(config_file: Path) -> None:
    config = read_config(config_file, ["validation_dataset.path_or_dataset_id=validation.jsonl"])
    tokenizer = open_tokenizer(config.model)
    assert config.validation_dataset is not None
    data = open_dataset(config.validation_dataset, tokenizer, vocab_size=264, seed=1)
    first, second = prompts_of(config.samples, data, tokenizer)
    assert first.text == "<|user|>What is 0 and 0?<|end|><|assistant|>"
    assert (first.expected, second.expected) == ("It is 0.", "It is 2.")
    several = Example([1, 70, 71, 2, 72], [IGNORED, 70, 71, IGNORED, 72], 1)
    (only,) = prompts_of(config.samples, Dataset("x", (several, Example([70], [70], 2))), tokenizer)
    assert (only.ids, only.expected) == ((1,), tokenizer.decode([70, 71]))
    assert not list(prompts_of(config.samples, None, tokenizer))
    assert not list(prompts_of(SamplesSection(prompts=()), data, tokenizer))


def test_samples_are_recorded_before_and_after_and_change_nothing(
    run_trainer: RunTrainer, tmp_path: Path
) -> None:
    settings = ("peft.dropout=0.1", "step_scheduler.max_steps=3", "samples.max_new_tokens=5")
    assert run_trainer(*settings, "samples.prompts=[]", run="without")[0] == 0
    (tmp_path / "with").mkdir()
    (tmp_path / "with/stop").touch()
    prompts = "samples.prompts=[one and one, two and two]"
    assert run_trainer(*settings, prompts, run="with")[0] == 75
    assert run_trainer(*settings, prompts, run="with")[0] == 0
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    records = [json.loads(line) for line in (tmp_path / "with/metrics.jsonl").read_text().splitlines()]
    samples = [record for record in records if record["kind"] == "sample"]
    assert [(sample["when"], sample["step"]) for sample in samples] == [
        ("before", 0), ("before", 0), ("after", 3), ("after", 3),
    ]  # fmt: skip
    assert {sample["prompt"] for sample in samples} == {"one and one", "two and two"}
    assert all(0 <= sample["tokens"] <= 5 for sample in samples)
    assert samples[0]["text"] != samples[2]["text"]


def test_a_sharded_base_gives_the_answers_of_a_whole_one(
    run_trainer: RunTrainer, config_file: Path, tmp_path: Path
) -> None:
    settings = (
        "samples.prompts=one and one", "samples.max_new_tokens=8", "step_scheduler.max_steps=2",
        "checkpoint.enabled=false",
    )  # fmt: skip
    assert run_trainer(*settings, run="whole")[0] == 0
    command = (
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1",
        "--nproc-per-node", "2", "-m", "trainer", str(config_file), "--run-dir", str(tmp_path / "sharded"),
        *(part for setting in (*settings, "distributed.placement=shard") for part in ("--set", setting)),
    )  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    whole, sharded = answers(tmp_path / "whole"), answers(tmp_path / "sharded")
    assert [when for when, _ in whole] == ["before", "after"]
    assert sharded == whole


def answers(run: Path) -> list[tuple[str, str]]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [(record["when"], record["text"]) for record in records if record["kind"] == "sample"]


def test_a_training_pass_goes_on_as_before(config_file: Path) -> None:
    run = tiny_run("model.dtype=float32")
    ids = torch.arange(20, device=run.world.device)[None]
    model = run.training_model
    before = model(ids, ids)
    generate(run, prompt(run, "a"))
    assert model.training
    assert all(module.training for module in model.modules())
    assert torch.equal(model(ids, ids), before)
    assert isinstance(model, nn.Module)


def test_a_model_that_cannot_answer_is_trained_all_the_same(
    run_trainer: RunTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(run: Run, prompt: tuple[int, ...]) -> list[int]:
        raise RuntimeError("strides must be multiples of 8\nmore")

    monkeypatch.setattr("trainer.samples.generate", refuse)
    code, outcome = run_trainer("step_scheduler.max_steps=1", "samples.prompts=[Hello]")
    assert (code, outcome["status"]) == (0, "finished")
    records = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    notes = [record["text"] for record in records if record["kind"] == "note"]
    assert [note for note in notes if "multiples of 8" in note] == [
        f"samples {when} training are left out: strides must be multiples of 8"
        for when in ("before", "after")
    ]

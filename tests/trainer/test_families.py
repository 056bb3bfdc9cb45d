"""Families beside Nemotron-H: that they compute what transformers computes, train, shard, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from trainer.chat import IGNORED
from trainer.config import PeftSection
from trainer.kernels import find_mamba_kernels
from trainer.lora import choose_targets, load_adapter
from trainer.model import TrainingModel, build_model, kernels_in_use, model_config
from trainer.reading import read_config

from .conftest import RunTrainer, losses
from .test_parallel import torchrun

CPU = torch.device("cpu")
SIZES = {
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}
FAMILIES = {
    "llama": SIZES | {"model_type": "llama"},
    "qwen3": SIZES | {"model_type": "qwen3"},
    "qwen3_moe": SIZES | EXPERTS | {"model_type": "qwen3_moe"},
}


def build(config_file: Path, family: str) -> tuple[Any, Any]:
    """The small model with random weights, and its transformers config."""
    kernels = find_mamba_kernels("cpu")
    section = read_config(config_file, [f"model.config={json.dumps(FAMILIES[family])}"]).model
    config = model_config(section)
    return build_model(section, config, kernels, CPU, seed=3), config


def batch() -> tuple[Tensor, Tensor]:
    """Token ids and labels, a part of them not trained."""
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(256, (2, 24), generator=generator)
    return ids, ids.masked_fill(torch.rand(ids.shape, generator=generator) < 0.4, IGNORED)


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_and_gradients_are_those_of_transformers_own_eager_model_in_float64(
    config_file: Path, family: str
) -> None:
    ours, config = build(config_file, family)
    reference: Any = AutoModelForCausalLM.from_config(
        config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    reference.load_state_dict(ours.state_dict())
    ours.requires_grad_(True)
    reference.double()
    ids, labels = batch()
    loss = TrainingModel(ours).train()(ids, labels)
    trained = (labels[:, 1:] != IGNORED).sum()
    expected = reference.train()(input_ids=ids, labels=labels).loss * trained
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    loss.backward()
    expected.backward()
    gradients = {name: parameter.grad for name, parameter in reference.named_parameters()}
    for name, parameter in ours.named_parameters():
        if ".experts." in name:  # frozen always: their own gradients are never computed
            continue
        wanted = gradients[name]
        assert wanted.any(), name
        assert (parameter.grad.double() - wanted).norm() <= 1e-5 * wanted.norm(), name


def test_kernels_and_linear_layers_of_a_qwen3_moe_are_known(config_file: Path) -> None:
    model, _ = build(config_file, "qwen3_moe")
    assert kernels_in_use(model, find_mamba_kernels("cpu")) == {
        "moe_transformer": "3 layers on sdpa (PyTorch) and grouped_mm experts (PyTorch)"
    }
    names = choose_targets(model, PeftSection(match_all_linear=True)).names
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert len(names) == 3 * 4


def test_a_qwen3_moe_trains_and_its_folder_trains_as_it_does(
    run_trainer: RunTrainer, config_file: Path, tmp_path: Path
) -> None:
    code, outcome = run_trainer(f"model.config={json.dumps(FAMILIES['qwen3_moe'])}", run="config")
    assert (code, outcome["steps"]) == (0, 6)
    assert outcome["last_loss"] < outcome["first_loss"] - 0.5
    build(config_file, "qwen3_moe")[0].save_pretrained(tmp_path / "model")
    folder = f"model.pretrained_model_name_or_path={tmp_path / 'model'}"
    assert run_trainer("model.config=null", "model.init=null", folder, run="folder")[0] == 0
    assert losses(tmp_path / "folder") == pytest.approx(losses(tmp_path / "config"), rel=1e-5)


def test_two_processes_train_a_sharded_qwen3_moe_as_one_does(
    run_trainer: RunTrainer, config_file: Path, tmp_path: Path
) -> None:
    settings = (
        f"model.config={json.dumps(FAMILIES['qwen3_moe'])}",
        "distributed.placement=shard",
        "distributed.activation_checkpointing=true",
        "step_scheduler.local_batch_size=1",
        "step_scheduler.max_steps=3",
        "checkpoint.enabled=false",
    )
    run_trainer(*settings, run="one")
    done = torchrun(config_file, tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


@pytest.mark.parametrize(
    ("field", "text"),
    [("mlp_only_layers=[1]", "MLP in others"), ("decoder_sparse_step=2", "MLP in others"),
     ("output_router_logits=true", "balancing loss")],
)  # fmt: skip
def test_a_qwen3_moe_that_would_be_trained_wrongly_is_refused(
    run_trainer: RunTrainer, field: str, text: str
) -> None:
    code, outcome = run_trainer(f"model.config={json.dumps(FAMILIES['qwen3_moe'])}", f"model.config.{field}")
    assert code == 3
    assert text in outcome["error"]["message"]


@pytest.mark.parametrize("adapted", ["[q_proj, o_proj]", "[v_proj, experts.*]"])
def test_the_adapter_of_a_qwen3_moe_loads_in_plain_peft_with_equal_logits(
    run_trainer: RunTrainer, config_file: Path, tmp_path: Path, adapted: str
) -> None:
    code, _ = run_trainer(
        f"model.config={json.dumps(FAMILIES['qwen3_moe'])}", "peft.match_all_linear=false",
        f"peft.target_modules={adapted}", "step_scheduler.max_steps=3",
    )  # fmt: skip
    assert code == 0
    ids, _ = batch()
    base, _ = build(config_file, "qwen3_moe")
    plain: Any = AutoModelForCausalLM.from_config(
        base.config, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    )
    plain.load_state_dict(base.state_dict())
    with torch.no_grad():
        before = plain.eval()(input_ids=ids).logits
        found = PeftModel.from_pretrained(plain, str(tmp_path / "run/adapter")).eval()(input_ids=ids).logits
        ours = load_adapter(base, tmp_path / "run/adapter").eval()(input_ids=ids).logits
    assert (found - before).abs().max() > 1e-2
    torch.testing.assert_close(ours, found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss", "deepseek_v3", "falcon_h1", "qwen3_next", "bamba"])
def test_other_families_are_refused_by_name(run_trainer: RunTrainer, tmp_path: Path, family: str) -> None:
    code, outcome = run_trainer(f"model.config.model_type={family}")
    assert (code, outcome["exit_code"]) == (3, 3)
    assert family in outcome["error"]["message"]
    assert "qwen3_moe" in outcome["error"]["remedy"]
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text(json.dumps({"model_type": family}))
    (tmp_path / "model/model.safetensors").touch()
    folder = f"model.pretrained_model_name_or_path={tmp_path / 'model'}"
    code, outcome = run_trainer("model.config=null", "model.init=null", folder)
    assert (code, outcome["error"]["context"]["key"]) == (3, "model.pretrained_model_name_or_path")
    assert family in outcome["error"]["message"]

"""LoRA on routed experts: values and gradients of a float64 reference, PEFT's files, whole runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from trainer.config import PeftSection
from trainer.errors import ConfigError, TrainingFailed
from trainer.experts import compute_adapter, experts_forward, prepare_experts, projections, routed_experts
from trainer.lora import (
    adapter_parameters,
    add_lora,
    choose_targets,
    require_gradients,
    save_adapter,
    share_adapted,
)
from trainer.merge import merge
from trainer.parallel import World

from .conftest import RunTrainer, losses
from .test_lora import IDS, logits, trained
from .test_parallel import torchrun

EXPERTS = PeftSection(target_modules=("experts.*",), dim=4, alpha=16)
ALONE = World(0, 1, torch.device("cpu"))
QWEN = {
    "model_type": "qwen3_moe",
    "vocab_size": 264,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "initializer_range": 0.2,
}
TOKENS, HIDDEN, INNER, COUNT, TOP_K, RANK = 24, 16, 32, 5, 2, 3


class Experts(nn.Module):
    """Routed experts as transformers lays them out, gated or not."""

    def __init__(self, *, gated: bool) -> None:
        super().__init__()
        self.num_experts = COUNT
        self.act_fn = nn.SiLU() if gated else lambda hidden: nn.functional.relu(hidden).square()
        outer = 2 * INNER if gated else INNER
        weight = nn.Parameter(torch.randn(COUNT, outer, HIDDEN) / 4, requires_grad=False)
        self.register_parameter("gate_up_proj" if gated else "up_proj", weight)
        self.down_proj = nn.Parameter(torch.randn(COUNT, HIDDEN, INNER) / 4, requires_grad=False)


def reference(
    experts: Experts,
    tokens: Tensor,
    ids: Tensor,
    gates: Tensor,
    matrices: list[Tensor],
    scale: float,
) -> Tensor:
    """Token by token, by the formula, with whole matrices."""
    up, down = (getattr(experts, name).double() for name in projections(experts))
    up_a, up_b, down_a, down_b = matrices
    out = []
    for n in range(len(tokens)):
        total = torch.zeros(HIDDEN, dtype=torch.float64)
        for k in range(TOP_K):
            e = ids[n, k]
            hidden = (up[e] + scale * up_b[e] @ up_a[e]) @ tokens[n]
            if hidden.numel() == INNER:
                active = hidden.relu() ** 2
            else:
                active = nn.functional.silu(hidden[:INNER]) * hidden[INNER:]
            total = total + gates[n, k] * ((down[e] + scale * down_b[e] @ down_a[e]) @ active)
        out.append(total)
    return torch.stack(out)


def inputs(experts: Experts, dtype: torch.dtype) -> list[Tensor]:
    """Tokens, gates and the four matrices in float64, with values that `dtype` holds exactly."""
    outer = getattr(experts, projections(experts)[0]).shape[1]
    shapes = [
        *((TOKENS, HIDDEN), (TOKENS, TOP_K)),
        *((COUNT, RANK, HIDDEN), (COUNT, outer, RANK), (COUNT, RANK, INNER), (COUNT, HIDDEN, RANK)),
    ]
    values = [torch.randn(shape).to(dtype).double() for shape in shapes]
    values[1] = values[1].abs()
    return values


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
def test_values_and_gradients_are_those_of_a_float64_reference(
    gated: bool, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(1)
    experts = Experts(gated=gated).to(dtype)
    ids = torch.stack([torch.randperm(COUNT - 1)[:TOP_K] for _ in range(TOKENS)])  # the last has no token
    exact = [value.requires_grad_() for value in inputs(experts, dtype)]
    expected = reference(experts, exact[0], ids, exact[1], exact[2:], scale=0.5)
    pull = torch.randn_like(expected)
    expected.backward(pull)  # type: ignore[no-untyped-call]

    own = [value.detach().float().requires_grad_() for value in exact]
    first, second = (compute_adapter(own[n], own[n + 1], 0.5, 0.0, dtype) for n in (2, 4))
    found = experts_forward(experts, own[0].to(dtype), ids, own[1], first, second)
    assert found.dtype == dtype
    found.backward(pull.to(dtype))  # type: ignore[no-untyped-call]
    close(found, expected, tolerance)
    for value, wanted in zip(own, exact, strict=True):
        assert value.grad is not None
        assert wanted.grad is not None
        close(value.grad, wanted.grad, tolerance)
    assert not own[2].grad[COUNT - 1].any()  # type: ignore[index]


def close(found: Tensor, expected: Tensor, tolerance: float) -> None:
    """The error's norm is small beside the value's."""
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def test_experts_without_an_adapter_compute_what_transformers_does(causal_lm: Any) -> None:
    ours = [module for _, module in routed_experts(causal_lm)]
    assert ours
    theirs = copy.deepcopy(causal_lm)
    for _, module in routed_experts(theirs):
        del module.__dict__["forward"]
    embedded = causal_lm.model.embeddings(IDS).detach()
    gradients = []
    for model in (causal_lm, theirs):
        hidden = embedded.clone().requires_grad_()
        model.model.layers[1].mixer(hidden).square().sum().backward()
        gradients.append(hidden.grad)
    torch.testing.assert_close(logits(causal_lm), logits(theirs), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)


def test_experts_are_taken_by_a_pattern_that_says_so_or_by_their_key(causal_lm: Any) -> None:
    up, down = (f"model.layers.1.mixer.experts.{part}_proj" for part in ("up", "down"))

    def chosen(**section: Any) -> tuple[int, tuple[str, ...]]:
        targets = choose_targets(causal_lm, PeftSection.model_validate(section))
        return len(targets.names), targets.experts

    assert chosen(target_modules="experts.*") == (0, (up, down))
    assert chosen(target_modules="experts.down_proj") == (0, (down,))
    assert chosen(target_modules=["up_proj", "*.experts.down_proj"]) == (1, (down,))
    assert chosen(target_modules="up_proj") == (1, ())
    assert chosen(match_all_linear=True) == (8, ())
    assert chosen(match_all_linear=True, match_routed_experts=True) == (8, (up, down))
    both = {"target_modules": "q_proj", "match_routed_experts": True}
    assert chosen(**both, exclude_modules="up_proj") == (1, (down,))
    assert chosen(**both, exclude_modules="layers.1.*") == (1, ())


def test_asking_for_experts_that_are_not_there_is_an_error(causal_lm: Any) -> None:
    with pytest.raises(ConfigError, match=r"names experts\.gate_up_proj") as problem:
        choose_targets(causal_lm, PeftSection(target_modules=("experts.gate_up_proj",)))
    assert "experts.up_proj" in problem.value.remedy
    del causal_lm.model.layers[1]
    with pytest.raises(ConfigError, match="no routed experts"):
        choose_targets(causal_lm, PeftSection(match_all_linear=True, match_routed_experts=True))


def test_the_summary_counts_the_experts(causal_lm: Any) -> None:
    section = PeftSection(match_all_linear=True, match_routed_experts=True, dim=4)
    targets = choose_targets(causal_lm, section)
    model = add_lora(causal_lm, targets, section, seed=1)
    shares = share_adapted(model, targets)
    assert (shares["adapted_expert_projections"], shares["expert_projections"]) == (2, 2)
    of_experts = 4 * 4 * (32 + 32) * 2
    adapters = adapter_parameters(model)
    assert sum(p.numel() for name, p in adapters.items() if ".experts." in name) == of_experts
    assert shares["routed_expert_parameters_share"] == 2 * 4 * 32 * 32 / shares["parameters"]  # type: ignore[operator]
    assert shares["adapted_by_name"]["experts.down_proj"] == 1  # type: ignore[index]


def test_gated_experts_load_in_plain_peft_and_merge(tmp_path: Path) -> None:
    base = AutoModelForCausalLM.from_config(AutoConfig.for_model(**QWEN))
    base.requires_grad_(False)
    causal_lm = copy.deepcopy(base)
    for _, module in routed_experts(causal_lm):
        prepare_experts(module)
    base.save_pretrained(tmp_path / "base")
    before = logits(base)
    model = trained(causal_lm, PeftSection(target_modules=("experts.*", "q_proj"), dim=4))
    assert (logits(model) - before).abs().max() > 0.1
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    assert merge(tmp_path / "adapter", tmp_path / "base", tmp_path / "merged") == 6
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", local_files_only=True)
    torch.testing.assert_close(logits(merged), logits(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("targets", [("experts.*",), ("experts.up_proj",), ("experts.down_proj", "q_proj")])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_plain_peft_loads_experts_with_equal_logits_and_merges_them(
    causal_lm: Any, tmp_path: Path, targets: tuple[str, ...], use_rslora: bool
) -> None:
    base = copy.deepcopy(causal_lm)
    for _, module in routed_experts(base):
        del module.__dict__["forward"]
    before = logits(base)
    section = PeftSection(target_modules=targets, dim=4, alpha=16, dropout=0.1, use_rslora=use_rslora)
    model = trained(causal_lm, section)
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(loaded.merge_and_unload()), logits(model), rtol=1e-4, atol=1e-4)
    assert (logits(model) - before).abs().max() > 0.1


def test_an_adapter_that_is_merged_or_off_is_not_added_again(causal_lm: Any) -> None:
    before = logits(causal_lm)
    model = trained(causal_lm, EXPERTS)
    adapted = logits(model)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-4)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), adapted, rtol=1e-4, atol=1e-4)


def test_every_expert_adapter_has_a_gradient_after_the_first_step(causal_lm: Any) -> None:
    section = PeftSection(match_all_linear=True, match_routed_experts=True)
    model = add_lora(causal_lm, choose_targets(causal_lm, section), section, seed=1)
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    require_gradients(adapter_parameters(model), ALONE)


def test_experts_that_are_bypassed_are_named_after_the_first_step(causal_lm: Any) -> None:
    section = PeftSection(match_all_linear=True, match_routed_experts=True)
    model = add_lora(causal_lm, choose_targets(causal_lm, section), section, seed=1)
    experts = causal_lm.model.layers[1].mixer.experts
    experts.forward = experts.get_base_layer().forward
    model(input_ids=IDS, use_cache=False).logits.square().sum().backward()
    with pytest.raises(TrainingFailed, match=r"2 of 10 .*: model\.layers\.1\.mixer\.experts$"):
        require_gradients(adapter_parameters(model), ALONE)


def test_dropout_acts_on_the_adapter_alone_and_only_in_training(causal_lm: Any) -> None:
    section = PeftSection(target_modules=("experts.*",), dropout=0.5)
    model = trained(causal_lm, section)
    experts = model.get_base_model().model.layers[1].mixer.experts
    tokens, ids, gates = torch.randn(400, 32), torch.tensor([[0, 1]]).expand(400, 2), torch.ones(400, 2)
    whole = experts.eval()(tokens, ids, gates)
    torch.testing.assert_close(whole, experts(tokens, ids, gates), rtol=0, atol=0)
    experts.train()
    one, other = (experts(tokens, ids, gates) for _ in range(2))
    assert not torch.equal(one, other)
    for parameter in adapter_parameters(model).values():
        parameter.data.zero_()
    assert torch.equal(experts(tokens, ids, gates), experts(tokens, ids, gates))


def test_gradients_with_dropout_are_those_of_the_mask_that_was_drawn() -> None:
    torch.manual_seed(1)
    experts = Experts(gated=False)
    values = [value.float() for value in inputs(experts, torch.float32)]
    ids = torch.stack([torch.randperm(COUNT)[:TOP_K] for _ in range(TOKENS)])
    for value in values:
        value.requires_grad_()

    def loss() -> Tensor:
        torch.manual_seed(2)  # the same mask every time
        first, second = (compute_adapter(values[n], values[n + 1], 0.5, 0.3, torch.float32) for n in (2, 4))
        return experts_forward(experts, values[0], ids, values[1], first, second).square().sum() / 1e3

    loss().backward()  # type: ignore[no-untyped-call]
    for value in values:
        assert value.grad is not None
        direction = value.grad / value.grad.norm()
        with torch.no_grad():
            value += 1e-3 * direction
            above = loss().item()
            value -= 2e-3 * direction
            below = loss().item()
            value += 1e-3 * direction
        assert (above - below) / 2e-3 == pytest.approx(value.grad.norm().item(), rel=1e-2)


def test_only_what_backward_needs_is_kept() -> None:
    experts = Experts(gated=False)
    prepare_experts(experts)
    tokens = torch.randn(TOKENS, HIDDEN, requires_grad=True)
    ids, gates = torch.zeros(TOKENS, TOP_K, dtype=torch.long), torch.ones(TOKENS, TOP_K)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        experts(tokens, ids, gates)
    rows = [t for t in kept if t.is_floating_point() and t.dim() == 2 and len(t) == TOKENS * TOP_K]
    assert [tuple(t.shape) for t in rows] == [(TOKENS * TOP_K, INNER)]


SETTINGS = (
    "peft.match_routed_experts=true",
    "peft.dropout=0",
    "step_scheduler.ckpt_every_steps=3",
    "step_scheduler.local_batch_size=1",
    "distributed.activation_checkpointing=true",
    "distributed.placement=shard",
)


def test_two_sharded_processes_train_experts_as_one_does_and_one_goes_on(
    run_trainer: RunTrainer, config_file: Path, tmp_path: Path
) -> None:
    code, _ = run_trainer(*SETTINGS, run="one")
    assert code == 0
    done = torchrun(config_file, tmp_path / "two", *SETTINGS)
    assert done.returncode == 0, done.stderr
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    files = [tmp_path / run / "adapter/adapter_model.safetensors" for run in ("one", "two")]
    assert len({(file.parent / "base.json").read_text() for file in files}) == 1
    first, second = (load_file(file) for file in files)
    assert sum(".experts." in name for name in first) == 4
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-2 for name in first)

    newest = tmp_path / "two/checkpoints/step-000006"
    (newest / "COMMITTED").unlink()
    (tmp_path / "two/metrics.jsonl").unlink()
    assert run_trainer(*SETTINGS, run="two")[0] == 0
    assert losses(tmp_path / "two") == pytest.approx({step: one[step] for step in (4, 5, 6)}, rel=1e-4)


def test_checkpointing_activations_changes_nothing(run_trainer: RunTrainer, tmp_path: Path) -> None:
    for run in ("kept", "again"):
        checkpointing = f"distributed.activation_checkpointing={str(run == 'again').lower()}"
        code, _ = run_trainer("peft.match_routed_experts=true", "peft.dropout=0.1", checkpointing, run=run)
        assert code == 0
    assert losses(tmp_path / "again") == pytest.approx(losses(tmp_path / "kept"), rel=1e-5)
    config = json.loads((tmp_path / "kept/adapter/adapter_config.json").read_text())
    assert config["lora_dropout"] == 0
    assert len(config["target_parameters"]) == 2

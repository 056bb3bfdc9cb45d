"""LoRA targets, and adapters that PEFT loads with equal logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from trainer.config import PeftSection
from trainer.errors import ConfigError
from trainer.lora import (
    adapter_parameters,
    add_lora,
    choose_targets,
    load_adapter,
    save_adapter,
    share_adapted,
)
from trainer.model import TrainingModel

IDS = torch.arange(24).reshape(2, 12)


def logits(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        out: Tensor = model(input_ids=IDS, use_cache=False).logits
    return out


def trained(causal_lm: Any, section: PeftSection) -> PeftModel:
    """LoRA with B away from zero, as after training."""
    model = add_lora(causal_lm, choose_targets(causal_lm, section), section, seed=1)
    for name, parameter in adapter_parameters(model).items():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def test_match_all_linear_takes_the_blocks_layers_except_out_proj(causal_lm: Any) -> None:
    targets = choose_targets(causal_lm, PeftSection(match_all_linear=True))
    endings = {name.rpartition(".")[2] for name in targets.names}
    assert endings == {"in_proj", "q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert (len(targets.names), targets.linear_layers) == (8, 11)
    lm_head, out_proj = targets.notes
    assert "lm_head is left out" in lm_head
    assert "2 mamba out_proj layers" in out_proj


def test_targets_are_names_endings_or_patterns(causal_lm: Any) -> None:
    section = PeftSection(
        target_modules=("q_proj", "mixer.out_proj", "shared_experts.*", "model.layers.0.mixer.in_proj"),
        exclude_modules=("layers.3.*",),
    )
    assert choose_targets(causal_lm, section).names == (
        "model.layers.0.mixer.in_proj",
        "model.layers.0.mixer.out_proj",
        "model.layers.1.mixer.shared_experts.up_proj",
        "model.layers.1.mixer.shared_experts.down_proj",
        "model.layers.2.mixer.q_proj",
    )


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules"])
def test_a_name_that_matches_nothing_is_an_error(causal_lm: Any, key: str) -> None:
    section = PeftSection.model_validate({"target_modules": ["q_proj"], key: ["gate_proj"]})
    with pytest.raises(ConfigError, match=f"peft.{key} names gate_proj") as problem:
        choose_targets(causal_lm, section)
    assert "in_proj" in problem.value.remedy


def test_excluding_every_target_is_an_error(causal_lm: Any) -> None:
    with pytest.raises(ConfigError, match="leaves no linear layer"):
        choose_targets(causal_lm, PeftSection(target_modules=("q_proj",), exclude_modules=("q_proj",)))


def test_only_adapters_are_trained_in_fp32_over_a_bf16_base(causal_lm: Any) -> None:
    section = PeftSection(match_all_linear=True, dim=4)
    targets = choose_targets(causal_lm, section)
    model = add_lora(causal_lm.to(torch.bfloat16), targets, section, seed=1)
    adapters = adapter_parameters(model)
    assert all(".lora_" in name and parameter.dtype == torch.float32 for name, parameter in adapters.items())
    shares = share_adapted(model, targets)
    base = sum(parameter.numel() for parameter in model.parameters() if not parameter.requires_grad)
    assert shares["parameters"] == base
    assert shares["trainable_parameters"] == sum(parameter.numel() for parameter in adapters.values())
    assert shares["adapted_layers"] == 8


def test_plain_peft_loads_the_adapter_with_equal_logits(causal_lm: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(causal_lm)
    before = logits(base)
    model = trained(causal_lm, PeftSection(match_all_linear=True, dim=4, alpha=16))
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)
    assert not torch.allclose(logits(model), before, atol=0.1)


def test_an_adapter_on_out_proj_loads_with_our_loader_and_says_so(causal_lm: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(causal_lm)
    model = trained(causal_lm, PeftSection(target_modules=("in_proj", "out_proj"), dim=4))
    save_adapter(model, tmp_path / "adapter")
    assert "load_adapter" in (tmp_path / "adapter/README.md").read_text()
    loaded = load_adapter(base, tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_plain_peft_still_refuses_out_proj_and_nothing_of_ours_stays_behind(
    causal_lm: Any, tmp_path: Path
) -> None:
    base = copy.deepcopy(causal_lm)
    save_adapter(trained(causal_lm, PeftSection(target_modules=("out_proj",))), tmp_path / "adapter")
    with pytest.raises(ValueError, match="out_proj"):
        PeftModel.from_pretrained(base, str(tmp_path / "adapter"))


def test_lm_head_is_adapted_on_request_and_learns_through_the_chunked_loss(
    causal_lm: Any, tmp_path: Path
) -> None:
    base = copy.deepcopy(causal_lm)
    section = PeftSection(target_modules=("lm_head", "q_proj"), dim=4)
    model = trained(causal_lm, section)
    adapters = adapter_parameters(model)
    whole = model(input_ids=IDS, use_cache=False).logits[:, :-1]
    expected = nn.functional.cross_entropy(whole.flatten(0, 1), IDS[:, 1:].flatten(), reduction="sum")
    wanted = torch.autograd.grad(expected, list(adapters.values()))
    loss = TrainingModel(causal_lm)(IDS, IDS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, list(adapters.values())), wanted)
    assert any("lm_head" in name for name in adapters)
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


def test_rslora_scales_by_the_root_of_the_rank_and_is_exported(causal_lm: Any, tmp_path: Path) -> None:
    base = copy.deepcopy(causal_lm)
    model = trained(causal_lm, PeftSection(target_modules=("q_proj",), dim=4, alpha=6, use_rslora=True))
    layer = model.get_base_model().model.layers[2].mixer.q_proj
    assert layer.scaling == {"default": 3.0}
    save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(base, str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize("experts", [False, True])
def test_dropout_is_on_every_adapted_layer(causal_lm: Any, experts: bool) -> None:
    section = PeftSection(match_all_linear=True, match_routed_experts=experts, dropout=0.25)
    targets = choose_targets(causal_lm, section)
    model = add_lora(causal_lm, targets, section, seed=1)
    found = [m.lora_dropout["default"].p for m in model.modules() if isinstance(m, LoraLayer)]
    assert found == [0.25] * (8 + 2 * experts)
    assert any("lora_dropout: 0" in note for note in targets.notes) == experts

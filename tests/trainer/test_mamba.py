"""The mamba mixer as it must run for LoRA: through the fused kernel, with out_proj called as a module."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from trainer.config import PeftSection
from trainer.errors import EnvironmentMismatch, TrainingFailed
from trainer.kernels import MambaKernels, find_mamba_kernels
from trainer.lora import adapter_parameters, add_lora, choose_targets, require_gradients
from trainer.model import TrainingModel, block_kind, blocks_of, build_model, kernels_in_use, model_config
from trainer.parallel import World
from trainer.reading import read_config

from .fused_scan import mamba_split_conv1d_scan_combined

CPU = torch.device("cpu")
ALONE = World(0, 1, CPU)
FUSED = MambaKernels(mamba_split_conv1d_scan_combined, {})
IDS = torch.randint(256, (2, 21), generator=torch.Generator().manual_seed(1))


def build(config_file: Path, kernels: MambaKernels) -> Any:
    find_mamba_kernels("cpu")
    section = read_config(config_file).model
    return build_model(section, model_config(section), kernels, CPU, seed=3)


def lora_on(causal_lm: Any, *targets: str) -> dict[str, nn.Parameter]:
    section = PeftSection(target_modules=targets)
    return adapter_parameters(add_lora(causal_lm, choose_targets(causal_lm, section), section, seed=1))


def loss_of(causal_lm: Any) -> Tensor:
    model = TrainingModel(causal_lm)
    model.train()
    loss: Tensor = model(IDS, IDS)
    return loss


def test_the_fused_path_and_the_reference_path_give_equal_losses_and_gradients(config_file: Path) -> None:
    reference = build(config_file, MambaKernels(None, {}))
    fused = build(config_file, FUSED)
    expected, found = (lora_on(model, "in_proj", "out_proj") for model in (reference, fused))
    for adapters in (expected, found):
        for name, parameter in adapters.items():
            if "lora_B" in name:  # zero at the beginning, which would leave A without a gradient
                nn.init.normal_(parameter, std=0.1, generator=torch.Generator().manual_seed(len(name)))
    losses = [loss_of(model) for model in (reference, fused)]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    for loss in losses:
        loss.backward()  # type: ignore[no-untyped-call]
    assert len(expected) == 8
    for name, parameter in expected.items():
        assert parameter.grad is not None
        assert parameter.grad.any()
        torch.testing.assert_close(found[name].grad, parameter.grad, rtol=1e-3, atol=1e-3)


def test_out_proj_has_a_gradient_through_the_fused_kernel(config_file: Path) -> None:
    fused = build(config_file, FUSED)
    adapters = lora_on(fused, "out_proj")
    loss_of(fused).backward()  # type: ignore[no-untyped-call]
    require_gradients(adapters, ALONE)


def test_the_gate_names_out_proj_when_the_kernel_takes_its_weight(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trap itself: transformers' own training path hands `out_proj.weight` to the kernel."""
    model = build(config_file, MambaKernels(None, {}))
    adapters = lora_on(model, "in_proj", "out_proj")
    module = sys.modules[type(model).__module__]
    monkeypatch.setattr(
        module,
        "mamba2_split_conv1d_scan_combined",
        lambda *args, **kwargs: mamba_split_conv1d_scan_combined(*args, **kwargs),
    )
    loss_of(model).backward()  # type: ignore[no-untyped-call]
    with pytest.raises(
        TrainingFailed, match=r"2 of 4 adapted layers .*layers\.0\.mixer\.out_proj"
    ) as problem:
        require_gradients(adapters, ALONE)
    assert "in_proj" not in problem.value.context["layers"]


def test_dt_is_not_clamped_from_below(config_file: Path) -> None:
    """With dt_bias far below zero dt is tiny; the models were trained so, a clamp changes the output."""
    model = build(config_file, MambaKernels(None, {}))
    mixers = [block.mixer for block in blocks_of(model) if block.block_type == "linear_attention"]
    with torch.no_grad():
        for mixer in mixers:
            mixer.dt_bias.fill_(-12.0)
        unclamped = loss_of(model)
        for mixer in mixers:
            assert mixer.time_step_limit == (0.0, float("inf"))
            mixer.time_step_limit = (model.config.time_step_min, float("inf"))
        clamped = loss_of(model)
    assert abs(unclamped.item() - clamped.item()) > 1e-3


def test_the_kernels_in_use_are_shown(config_file: Path) -> None:
    assert (
        "slow reference"
        in kernels_in_use(build(config_file, MambaKernels(None, {})), MambaKernels(None, {}))["mamba"]
    )
    shown = kernels_in_use(build(config_file, FUSED), FUSED)
    assert shown["mamba"] == "2 layers on the fused scan (mamba_ssm, causal_conv1d)"
    assert set(shown) == {"mamba", "moe", "attention"}


def test_missing_kernels_stop_a_run_on_cuda_with_the_import_error(config_file: Path) -> None:
    kernels = MambaKernels(None, {"mamba_ssm": "ImportError: undefined symbol: _ZN3c10"})
    section = read_config(config_file).model
    with pytest.raises(EnvironmentMismatch, match="mamba_ssm") as problem:
        build_model(section, model_config(section), kernels, torch.device("cuda"), seed=1)
    assert problem.value.exit_code == 7
    assert problem.value.context == {"mamba_ssm": "ImportError: undefined symbol: _ZN3c10"}


def test_the_reference_path_keeps_packed_documents_apart_as_the_fused_one_does(config_file: Path) -> None:
    """Transformers' own reference path can't: there documents reach into each other."""
    numbers = torch.tensor([[0] * 2 + [1] * 19, [0] * 20 + [1]], dtype=torch.int32)
    states = torch.randn(2, 21, 32, generator=torch.Generator().manual_seed(4))
    reference, fused = (
        next(block.mixer for block in blocks_of(build(config_file, kernels)) if block_kind(block) == "mamba")
        for kernels in (MambaKernels(None, {}), FUSED)
    )
    with torch.no_grad():
        apart = reference(states, seq_idx=numbers)
        torch.testing.assert_close(fused(states, seq_idx=numbers), apart, rtol=1e-4, atol=1e-5)
        assert (apart - type(reference).forward(reference, states))[0, 2:].abs().max() > 1e-3
        assert torch.equal(apart[1, :20], reference(states[1:, :20])[0])
        assert torch.equal(apart[1, 20:], reference(states[1:, 20:])[0])

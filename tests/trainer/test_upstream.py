"""What transformers itself does wrong for training Nemotron-H, beside what this trainer does."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from trainer.kernels import MambaKernels, find_mamba_kernels
from trainer.model import TrainingModel, blocks_of, build_model, model_config
from trainer.reading import read_config

from .fused_scan import mamba_split_conv1d_scan_combined

CPU = torch.device("cpu")
IDS = torch.randint(256, (2, 21), generator=torch.Generator().manual_seed(1))


def small_model(config_file: Path, kernels: MambaKernels) -> tuple[Any, Any]:
    """This trainer's model and its transformers config."""
    find_mamba_kernels("cpu")
    section = read_config(config_file).model
    config = model_config(section)
    return build_model(section, config, kernels, CPU, seed=3), config


def mixers(causal_lm: Any) -> list[Any]:
    return [block.mixer for block in blocks_of(causal_lm) if block.block_type == "linear_attention"]


def loss_of(causal_lm: Any) -> float:
    with torch.no_grad():
        return float(TrainingModel(causal_lm).train()(IDS, IDS))


def test_upstream_clamps_dt_where_the_model_was_trained_without(config_file: Path) -> None:
    """huggingface/transformers#48989. Upstream's mixer equals this one only if its bound is taken away."""
    ours, config = small_model(config_file, MambaKernels(None, {}))
    assert (config.time_step_limit, config.time_step_min) == ((0.0, math.inf), 0.001)
    with torch.no_grad():
        for mixer in mixers(ours):
            mixer.dt_bias.fill_(-12.0)  # dt is softplus(dt_bias + …), far below time_step_min
    losses = {}
    for bound in (config.time_step_min, 1e-30):
        changed = copy.deepcopy(config)
        changed.time_step_min = bound
        upstream: Any = AutoModelForCausalLM.from_config(changed, dtype=torch.float32)
        upstream.load_state_dict(ours.state_dict())
        losses[bound] = loss_of(upstream)
    assert loss_of(ours) == pytest.approx(losses[1e-30], rel=1e-6)
    assert abs(loss_of(ours) - losses[config.time_step_min]) > 1e-3


def test_upstream_leaves_the_fused_path_for_a_cache_that_training_never_reads(
    config_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Tensor] = []

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args[0])
        scanned: Tensor = mamba_split_conv1d_scan_combined(*args, **kwargs)
        return scanned

    model, config = small_model(config_file, MambaKernels(counted, {}))
    assert config.use_cache is True
    model.train()
    with torch.no_grad():
        upstream = model(input_ids=IDS)
        assert upstream.past_key_values is not None
        assert not calls
        TrainingModel(model).train()(IDS, IDS)
    assert len(calls) == len(mixers(model))

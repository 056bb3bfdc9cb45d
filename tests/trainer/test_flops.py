"""The FLOPs of a token, held against the layers' sizes and against what torch itself counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from trainer.flops import active_parameters, bf16_peak, mean_length, training_flops
from trainer.lora import add_lora, choose_targets
from trainer.model import blocks_of, model_config
from trainer.placement import layers_alone
from trainer.reading import read_config

RECIPES = Path(__file__).parents[2] / "recipes/train"
LLAMA = (
    "{model_type: llama, vocab_size: 264, num_key_value_heads: 1, hidden_size: 32, intermediate_size: 48, "
    "num_hidden_layers: 2, num_attention_heads: 2, head_dim: 16}"
)


def build(file: Path, *overrides: str, lora: bool = True) -> Any:
    """The config's model on the meta device, with its adapters."""
    config = read_config(file, list(overrides))
    causal_lm = layers_alone(config, model_config(config.model))
    if lora:
        with torch.device("meta"):
            add_lora(causal_lm, choose_targets(causal_lm, config.peft), config.peft, seed=1)
    return causal_lm


def token(causal_lm: Any, length: float = 1) -> float:
    return training_flops(causal_lm, length, device="cpu", processes=1).token


def test_nemotron_3_nano_has_3_58_billion_active_parameters() -> None:
    nano = build(RECIPES / "nemotron3-nano-true-size.yaml", lora=False)
    assert sum(parameter.numel() for parameter in nano.parameters()) == 31_577_937_344
    assert active_parameters(nano) == 3_580_073_408


def test_a_token_of_nemotron_3_nano_takes_four_flops_a_frozen_weight_and_six_a_trained_one() -> None:
    nano = build(RECIPES / "nemotron3-nano-true-size.yaml")
    flops = training_flops(nano, 4096, device="NVIDIA H200", processes=2)
    frozen = 3_580_073_408 - 2 * 131072 * 2688  # embeddings are looked up; the head is apart
    trained = sum(parameter.numel() for parameter in nano.parameters() if parameter.requires_grad)
    attention = 6 * 4 * 32 * 128 * 4097 / 2 * 3
    scan = 23 * 5 * 64 * 64 * 128 * 3
    # What has one dimension, such as norms, is not counted.
    assert flops.token == pytest.approx(4 * frozen + 6 * trained + attention + scan, rel=2e-4)
    assert flops.trained_token == 4 * 131072 * 2688
    assert flops.peak == 2 * 989.5e12
    assert flops.mfu(8192, 0, 0.5) == pytest.approx(8192 * flops.token / 0.5 / (2 * 989.5e12))


def test_a_llama_takes_what_torch_counts(config_file: Path) -> None:
    """A pass of the blocks forward and backward: torch counts every matrix product."""
    model = build(config_file, f"model.config={LLAMA}", "model.attn_implementation=eager")
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    length = 24
    # What it doesn't know by itself: a product that is added in place.
    in_place = {torch.ops.aten.addmm_: lambda into, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        hidden = model.model(input_ids=torch.ones(1, length, dtype=torch.int64)).last_hidden_state
        hidden.sum().backward()
    # What the first layers read, the embeddings, needs no gradient: neither through weights nor through A.
    attention = blocks_of(model)[0].self_attn
    spared = sum(
        2 * (layer.base_layer.weight.numel() + layer.lora_A["default"].weight.numel())
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    # Written out, attention computes every pair of positions, as many as causal in 2L - 1.
    ours = token(model, 2 * length - 1) - spared
    assert ours == pytest.approx(counter.get_total_flops() / length, rel=0.005)


def test_blocks_below_the_first_adapter_have_no_backward_pass(config_file: Path) -> None:
    every, last = (
        build(
            config_file,
            f"model.config={LLAMA}",
            "peft.match_all_linear=false",
            f"peft.target_modules={names}",
        )
        for names in ("[layers.*.mlp.down_proj]", "[layers.1.mlp.down_proj]")
    )
    block = sum(p.numel() for p in blocks_of(every)[0].parameters() if p.dim() > 1 and not p.requires_grad)
    adapter = sum(p.numel() for p in blocks_of(every)[0].parameters() if p.requires_grad)
    attention = 2 * 4 * 2 * 16 * 1  # backward only, for one position
    assert token(every) - token(last) == 2 * block + 6 * adapter + attention


def test_only_the_experts_that_a_token_goes_to_count(config_file: Path) -> None:
    few, many = (
        token(
            build(config_file, f"model.config.num_experts_per_tok={count}", "peft.match_routed_experts=true")
        )
        for count in (1, 3)
    )
    weights, adapters = 2 * 32 * 32, 2 * 4 * (32 + 32)
    assert many - few == 2 * (4 * weights + 6 * adapters)


def test_the_length_that_attention_sees_is_weighted_by_tokens() -> None:
    assert mean_length([100, 300]) == 250


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA H200", 989.5e12),
        ("NVIDIA H100 80GB HBM3", 989.5e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("NVIDIA L4", 121e12),
        ("NVIDIA H100 80GB HBM3 MIG 3g.40gb", None),
        ("Quadro RTX 8000", None),
        ("cpu", None),
    ],
)
def test_the_peak_of_a_device_that_is_not_known_is_none(device: str, peak: float | None) -> None:
    assert bf16_peak(device) == peak


def test_without_a_known_peak_there_is_no_mfu(config_file: Path) -> None:
    in_fp32 = build(config_file)
    assert training_flops(in_fp32, 8, device="NVIDIA H200", processes=1).mfu(1, 1, 1.0) is None

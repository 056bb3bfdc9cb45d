"""LoRA on routed experts: PEFT makes and names the matrices, `experts.py` computes with them.

PEFT's own layer for such parameters adds B·A into a full copy of the weights on every forward pass. Its
layout is kept, so that the adapter's file is PEFT's: A is [experts · rank, in] with the expert slowest, B
[out, rank · experts] with the expert fastest. The layer of the second projection wraps that of the first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from torch import Tensor, nn

from trainer.experts import Adapter, compute_adapter, experts_forward, projections

ADAPTER = "default"


def compute_grouped(model: nn.Module) -> None:
    """Lets every module of routed experts with LoRA compute by grouped GEMMs, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, ParamWrapper) and not name.endswith(".base_layer"):
            module.forward = functools.partial(_forward, module, module.forward)  # type: ignore[method-assign]


def adapted_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The base weights under LoRA, by their names in the base model."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            parameter = module.parameter_name if isinstance(module, ParamWrapper) else "weight"
            layer = name.removeprefix("base_model.model.").replace(".base_layer", "")
            found[f"{layer}.{parameter}"] = getattr(module.get_base_layer(), parameter)
    return found


def split_by_expert(a: Tensor, b: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """PEFT's matrices as [experts, rank, in] and [experts, out, rank], both views."""
    rank = a.shape[0] // experts
    return a.view(experts, rank, a.shape[1]), b.view(b.shape[0], rank, experts).permute(2, 0, 1)


def _forward(
    outermost: Any,
    original: Callable[..., Tensor],
    tokens: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
) -> Tensor:
    """As `experts_forward`; an adapter that is merged or switched off is not added again."""
    if outermost.merged or outermost.disable_adapters:
        return original(tokens, expert_ids, gates)
    adapters: dict[str, Adapter] = {}
    layer = outermost
    while isinstance(layer, ParamWrapper):
        adapters[layer.parameter_name] = _adapter(layer, tokens)
        layer = layer.base_layer
    first, second = (adapters.get(name) for name in projections(layer))
    return experts_forward(layer, tokens, expert_ids, gates, first, second)


def _adapter(layer: Any, tokens: Tensor) -> Adapter:
    a, b = split_by_expert(layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight, layer.num_experts)
    dropout = layer.lora_dropout[ADAPTER]
    probability = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return compute_adapter(a, b, layer.scaling[ADAPTER], probability, tokens.dtype)

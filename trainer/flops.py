"""The arithmetic that training needs, from the model's layers; and MFU, its share of what the devices can do.

    a linear layer     2 FLOPs a weight and token forward (a product, a sum); 2 more for the gradient of its
                       input. It is frozen, so its own gradient is not needed
    routed experts     the same, of the experts that a token goes to
    an adapter         2 forward, 4 backward: its input's gradient and its own
    attention          4 · heads · head size for each position that a token sees, for QKᵀ and PV; twice that
                       backward, where both factors have a gradient. Causal: a token of a sequence of length L
                       sees (L + 1) / 2 positions on average
    mamba's scan       5 for each element of the state, h = a·h + x·B, y = C·h; twice that backward
    lm_head            for trained tokens alone, since no other one's prediction is needed

Blocks below the first adapter have no backward pass. What checkpointing computes again is not counted, nor
are norms, activations and the softmax. MFU as in PaLM (arXiv:2204.02311, appendix B).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.model import blocks_of

BF16_PEAKS = {
    "GB200": 2.5e15,
    "B200": 2.25e15,
    "GH200": 989.5e12,
    "H200": 989.5e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989.5e12,
    "A100": 312e12,
    "A800": 312e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
}
"""FLOP/s in bf16 with dense matrices, from NVIDIA's data sheets; the first name that a device's has in it."""


@dataclass(frozen=True)
class TrainingFlops:
    """What one token takes, forward and backward."""

    token: float
    """In the blocks: of every token that is not padding."""
    trained_token: float
    """In the head, of every trained token."""
    peak: float | None
    """FLOP/s of all processes' devices together; None if it is not known."""

    def of(self, tokens: int, trained_tokens: int) -> float:
        """FLOPs of a step over so many tokens."""
        return tokens * self.token + trained_tokens * self.trained_token

    def mfu(self, tokens: int, trained_tokens: int, seconds: float) -> float | None:
        """The share of the peak, 0 to 1, that a step of so many seconds reached."""
        return self.of(tokens, trained_tokens) / seconds / self.peak if self.peak else None


def training_flops(causal_lm: Any, length: float, *, device: str, processes: int) -> TrainingFlops:
    """For a model with its adapters, which may be on the meta device.

    `length` is that of the sequence which a token is in, in the mean over tokens, see `mean_length`;
    `device` is the GPU's name.
    """
    blocks = list(blocks_of(causal_lm))
    trained = [any(parameter.requires_grad for parameter in block.parameters()) for block in blocks]
    lowest = trained.index(True) if True in trained else len(blocks)
    token = sum(
        _of_block(block, causal_lm.config, length, backward=number >= lowest)
        for number, block in enumerate(blocks)
    )
    head = _of_weights(causal_lm.lm_head, causal_lm.config, backward=True)
    peak = bf16_peak(device) if causal_lm.dtype == torch.bfloat16 else None
    return TrainingFlops(token, head, peak * processes if peak else None)


def mean_length(lengths: Iterable[int]) -> float:
    """Σ L² / Σ L: the length of the sequence that a token is in, in the mean over all tokens."""
    kept = list(lengths)
    return sum(length * length for length in kept) / sum(kept)


def bf16_peak(device: str) -> float | None:
    """FLOP/s of one device of that name; None for one that isn't known, or a part of one (MIG)."""
    if "MIG" in device.split():
        return None
    return next((peak for name, peak in BF16_PEAKS.items() if name in device), None)


def active_parameters(causal_lm: Any) -> int:
    """Parameters that one token meets: all but those of the routed experts that it doesn't go to."""
    share = _active_share(causal_lm, causal_lm.config)
    return round(
        sum(p.numel() * (share if _is_of_experts(m, p) else 1) for m, p in _own_parameters(causal_lm))
    )


def forward_flops(block: nn.Module, config: Any, length: float) -> float:
    """Of one block, for each token: what computing it again costs."""
    return _of_block(block, config, length, backward=False)


def _of_block(block: nn.Module, config: Any, length: float, *, backward: bool) -> float:
    passes = 3 if backward else 1  # both factors of attention and scan are activations
    flops = _of_weights(block, config, backward=backward)
    layers: Iterable[Any] = block.modules()
    for module in layers:
        if hasattr(module, "q_proj"):
            width = config.num_attention_heads * module.head_dim
            flops += passes * 4 * width * (length + 1) / 2
        if hasattr(module, "ssm_state_size"):
            flops += passes * 5 * module.num_heads * module.head_dim * module.ssm_state_size
    return flops


def _of_weights(root: nn.Module, config: Any, *, backward: bool) -> float:
    """Of all matrices, routers and convolutions below `root`: what has two dimensions or more."""
    share = _active_share(root, config)
    flops = 0.0
    for name, module in root.named_modules():
        for parameter in module.parameters(recurse=False):
            if parameter.dim() < 2 or isinstance(module, nn.Embedding):
                continue
            # Its output; the gradient of its input; and its own.
            products = 1 + backward + parameter.requires_grad
            # PEFT keeps the adapters of experts below the module that it put around them.
            of_experts = _is_of_experts(module, parameter) or "experts" in name.split(".")
            flops += 2 * products * parameter.numel() * (share if of_experts else 1)
    return flops


def _active_share(root: nn.Module, config: Any) -> float:
    """Of the routed experts, how many a token goes to; 1 without any."""
    experts = [p.shape[0] for m, p in _own_parameters(root) if _is_of_experts(m, p)]
    return float(config.num_experts_per_tok / experts[0]) if experts else 1.0


def _is_of_experts(module: nn.Module, parameter: nn.Parameter) -> bool:
    return parameter.dim() == 3 and not isinstance(module, nn.Conv1d)


def _own_parameters(root: nn.Module) -> Iterable[tuple[nn.Module, nn.Parameter]]:
    return ((module, p) for module in root.modules() for p in module.parameters(recurse=False))

"""Nemotron-H's router: which experts a token goes to, and with which weights.

transformers multiplies in fp32, without tensor cores, and masks groups of experts also where there is one
group. The router's weights and the hidden states are bf16, so a product of theirs in bf16 that is summed in
fp32 is the same product. The gradient is fp32: it goes back as the sum of two bf16 numbers, which keeps 16
of its bits.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Routed = tuple[Tensor, Tensor, Tensor]
"""Logits [tokens, experts], weights and ids [tokens, experts per token]; logits and weights in fp32."""


def prepare_routers(causal_lm: nn.Module) -> None:
    """Lets every router of a Nemotron-H with one group of experts compute as above on CUDA, in place."""
    for module in causal_lm.modules():
        if type(module).__name__ == "NemotronHTopkRouter" and module.num_group == 1:
            module.forward = functools.partial(_route, module, module.forward)


def _route(router: Any, original: Callable[[Tensor], Routed], hidden: Tensor) -> Routed:
    """[…, hidden size] → the routes of its tokens."""
    if not (hidden.is_cuda and hidden.dtype == router.weight.dtype == torch.bfloat16):
        return original(hidden)
    logits: Tensor = RouterLogits.apply(  # type: ignore[no-untyped-call]
        hidden.view(-1, router.hidden_dim), router.weight
    )
    scores = logits.sigmoid()
    ids = torch.topk(scores.detach() + router.e_score_correction_bias, k=router.top_k, sorted=False)[1]
    weights = scores.gather(1, ids)
    if router.norm_topk_prob:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return logits, weights * router.routed_scaling_factor, ids


class RouterLogits(torch.autograd.Function):
    """Rows [tokens, hidden size] and the frozen weight [experts, hidden size], both bf16 → fp32 logits."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        if rows.is_cuda:
            return torch.mm(rows, weight.T, out_dtype=torch.float32)
        return rows.float() @ weight.float().T

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        high = gradient.to(weight.dtype)
        low = (gradient - high).to(weight.dtype)
        return torch.cat([high, low], dim=1) @ torch.cat([weight, weight]), None

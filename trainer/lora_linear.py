"""LoRA on linear layers: PEFT makes and names the matrices, this computes with them.

PEFT's own layer computes its part in fp32: it copies the input, and multiplies without tensor cores. Here the
adapter is cast to the base's dtype instead, and its product is added by the GEMM that makes it: y = W x + B
(A x) takes two small GEMMs beside the base's, and nothing of the size of x is copied. What is kept for the
backward pass is x and A x. The gradients of A and B are summed and returned in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.lora.layer import Linear as PeftLinear
from torch import Tensor, nn

from trainer.expert_lora import ADAPTER


def compute_in_base_dtype(model: nn.Module) -> None:
    """Lets every linear layer with LoRA compute as above, in place."""
    for module in model.modules():
        if isinstance(module, PeftLinear):
            module.forward = functools.partial(_forward, module, module.forward)  # type: ignore[method-assign]


def _forward(layer: Any, original: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """[…, in] → […, out]; an adapter that is merged or switched off is not added again."""
    if layer.merged or layer.disable_adapters or kwargs:
        return original(x, *args, **kwargs)
    dropout = layer.lora_dropout[ADAPTER]
    kept = None
    scale: float = layer.scaling[ADAPTER]
    if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p:
        kept = torch.rand(x.shape, device=x.device) >= dropout.p
        scale /= 1 - dropout.p
    base = layer.get_base_layer()
    a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
    output: Tensor = _LoraLinear.apply(  # type: ignore[no-untyped-call]
        x, base.weight, base.bias, a, b, scale, kept
    )
    return output


class _LoraLinear(torch.autograd.Function):
    """y = W x + bias + scale · B (A (kept · x)); W and the bias are frozen and get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        kept: Tensor | None,
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        scaled_a, cast_b = _cast(a, x.dtype, scale), b.to(x.dtype)
        low = (rows if kept is None else rows * kept.view_as(rows)) @ scaled_a.T
        # The small product first: the large one adds to it while it writes, which costs next to nothing.
        out = F.linear(low, cast_b, bias).addmm_(rows, weight.T)
        ctx.save_for_backward(x, weight, a, b, low, kept)
        ctx.scale = scale
        return out.view(*x.shape[:-1], out.shape[-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        x, weight, a, b, low, kept = ctx.saved_tensors
        rows, gradient = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, gradient.shape[-1])
        low_gradient = gradient @ b.to(x.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:
            through = low_gradient @ _cast(a, x.dtype, ctx.scale)
            if kept is not None:
                through.mul_(kept.view_as(rows))
            of_x = through.addmm_(gradient, weight).view_as(x)
        of_a = _product_in(a.dtype, low_gradient.T, rows if kept is None else rows * kept.view_as(rows))
        of_b = _product_in(b.dtype, gradient.T, low)
        return of_x, None, None, of_a.mul_(ctx.scale), of_b, None, None


def _cast(matrix: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """The scaled matrix, rounded once."""
    return torch.mul(matrix, scale, out=torch.empty_like(matrix, dtype=dtype))


def _product_in(dtype: torch.dtype, left: Tensor, right: Tensor) -> Tensor:
    """left @ right, its sums returned in `dtype` without a rounding in between."""
    if left.dtype == dtype:
        return left @ right
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=dtype)
    return left.to(dtype) @ right.to(dtype)

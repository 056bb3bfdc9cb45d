"""What Nemotron-H's blocks do between their GEMMs, in one kernel each on CUDA: norms and relu².

transformers' norm makes eight passes over its rows there and eighteen back, its activation four and six. On
a CPU transformers' own code stays.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.fused import relu2_weighted, relu2_weighted_backward


def prepare_elementwise(causal_lm: nn.Module) -> None:
    """Replaces the forward of every norm and the activation of every MLP of a Nemotron-H, in place."""
    for module in causal_lm.modules():
        if type(module).__name__ == "NemotronHRMSNorm":
            module.forward = functools.partial(_norm, module, module.forward)
        elif type(module).__name__ == "NemotronHMLP" and is_relu2(module):
            module.act_fn = Relu2()


def is_relu2(module: Any) -> bool:
    """Whether relu² is what the module's `act_fn` computes."""
    return type(module.act_fn).__name__ == "ReLUSquaredActivation"


def _norm(norm: Any, original: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The root-mean-square norm over the last dimension, computed in fp32 and rounded once."""
    if not x.is_cuda:
        return original(x)
    return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)


class Relu2(nn.Module):
    """relu(x)², which keeps x alone for the backward pass."""

    def forward(self, x: Tensor) -> Tensor:
        """Any shape."""
        output: Tensor = _Relu2.apply(x)  # type: ignore[no-untyped-call]
        return output


class _Relu2(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return relu2_weighted(x.reshape(-1, x.shape[-1]), None).view(x.shape)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        rows = x.reshape(-1, x.shape[-1])
        of_x, _, _ = relu2_weighted_backward(
            rows, None, gradient.reshape(rows.shape).contiguous(), again=False
        )
        return of_x.view(x.shape)

"""The routed experts of a mixture-of-experts block, with LoRA inside the grouped products.

Tokens are sorted by expert once. Every product then is one grouped GEMM over all experts, the base's and the
two small ones of an adapter alike: y = W x + B (A x), where A, which the LoRA scale is already in, is
[experts, rank, in], and B [experts, out, rank]. B·A is never built into a full weight.

transformers' own forward keeps [tokens · experts per token, hidden] several times for the backward pass. Here
the router's weight goes in before the second projection, which is linear, so only what enters the
activation is kept; the rest is sorted or computed again. Nothing waits for the host.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trainer.elementwise import is_relu2
from trainer.fused import add_low_rank_, relu2_weighted, relu2_weighted_backward, sum_of_rows

# Public since torch 2.10; the releases before have it under its private name.
_grouped_mm: Callable[..., Tensor] = getattr(F, "grouped_mm", None) or torch._grouped_mm

RANK_MULTIPLE = 8
"""The grouped kernel takes bf16 rows of a multiple of 16 bytes: a smaller rank is filled up with zeros."""


class Adapter(NamedTuple):
    """LoRA on one projection of all experts, as it computes."""

    a: Tensor
    """[experts, rank, in], times the scale; the compute dtype."""
    b: Tensor
    """[experts, out, rank]."""
    dropout: float
    """The probability with which an input of `a` is zero; the scale makes up for it."""


class Route(NamedTuple):
    """The pairs of a token and one of its experts, sorted by expert."""

    order: Tensor
    """[pairs]: sorted place → pair; pair // experts per token is the token."""
    places: Tensor
    """[pairs]: pair → sorted place."""
    ends: Tensor
    """[experts], int32: where each expert's pairs end."""


def routed_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Name and module of each block's routed experts: those with three-dimensional parameters."""
    for name, module in model.named_modules():
        weight = getattr(module, "down_proj", None)
        if isinstance(weight, nn.Parameter) and weight.dim() == 3:
            yield name, module


def projections(experts: nn.Module) -> tuple[str, str]:
    """The parameters' names, first and second projection: gated experts have gate and up in one."""
    return ("gate_up_proj" if hasattr(experts, "gate_up_proj") else "up_proj"), "down_proj"


def prepare_experts(experts: nn.Module) -> None:
    """Lets one module of routed experts compute as above, in place; what it computes is the same."""
    experts.forward = functools.partial(experts_forward, experts)


def experts_forward(
    experts: Any,
    tokens: Tensor,
    expert_ids: Tensor,
    gates: Tensor,
    first: Adapter | None = None,
    second: Adapter | None = None,
) -> Tensor:
    """Each token through its experts, weighted and summed.

    tokens: [tokens, hidden]; expert_ids and gates: [tokens, experts per token], the gates in fp32 or the
    tokens' dtype; returns [tokens, hidden] in the tokens' dtype. `first` and `second` are the adapters of
    the two projections.
    """
    up, down = (getattr(experts, name) for name in projections(experts))
    activation = _activation(experts)
    route = _sort_by_expert(expert_ids, experts.num_experts)
    pairs = expert_ids.numel()
    output: Tensor = _Experts.apply(  # type: ignore[no-untyped-call]
        activation,
        *(tokens, gates, *route),
        *(up, *_parts(first, (pairs, up.shape[2]), tokens.device)),
        *(down, *_parts(second, (pairs, down.shape[2]), tokens.device)),
    )
    return output


def compute_adapter(a: Tensor, b: Tensor, scale: float, dropout: float, dtype: torch.dtype) -> Adapter:
    """The trainable fp32 matrices as one forward pass takes them: scaled, cast and filled up once.

    a: [experts, rank, in], contiguous; b: [experts, out, rank] with any strides. Gradients flow back.
    """
    fill = -a.shape[1] % RANK_MULTIPLE
    a = (a * (scale / (1 - dropout))).to(dtype)
    b = b.to(dtype, memory_format=torch.contiguous_format, copy=True)
    if fill:
        a, b = F.pad(a, (0, 0, 0, fill)), F.pad(b, (0, fill))
    return Adapter(a, b, dropout)


def _parts(
    adapter: Adapter | None, shape: tuple[int, int], device: torch.device
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if adapter is None:
        return None, None, None
    kept = torch.rand(shape, device=device) >= adapter.dropout if adapter.dropout else None
    return adapter.a, adapter.b, kept


def _sort_by_expert(expert_ids: Tensor, experts: int) -> Route:
    ids, order = torch.sort(expert_ids.reshape(-1), stable=True)
    places = torch.empty_like(order)
    places[order] = torch.arange(order.numel(), device=order.device)
    numbers = torch.arange(experts, device=ids.device, dtype=ids.dtype)
    return Route(order, places, torch.searchsorted(ids, numbers, right=True, out_int32=True))


def _activation(experts: Any) -> Callable[[Tensor], Tensor] | None:
    """What is between the two projections; None stands for relu², which has kernels of its own."""
    if hasattr(experts, "gate_up_proj"):
        return functools.partial(_gated, experts.act_fn)
    return None if is_relu2(experts) else experts.act_fn


def _gated(act_fn: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    gate, up = hidden.chunk(2, dim=-1)
    return act_fn(gate) * up


def _grouped(rows: Tensor, weights: Tensor, ends: Tensor) -> Tensor:
    """[pairs, in] by [experts, in, out] → [pairs, out]; [a, pairs] by [pairs, b] → [experts, a, b]."""
    return _grouped_mm(rows, weights, offs=ends)


def _project(
    rows: Tensor, weight: Tensor, a: Tensor | None, b: Tensor | None, kept: Tensor | None, ends: Tensor
) -> tuple[Tensor, Tensor | None]:
    """W x + B (A x) for each pair, and A x."""
    out = _grouped(rows, weight.mT, ends)
    if a is None or b is None:
        return out, None
    low = _grouped(rows if kept is None else rows * kept, a.mT, ends)
    return add_low_rank_(out, low, b.mT, ends), low


def _project_back(
    gradient: Tensor,
    weight: Tensor,
    a: Tensor | None,
    b: Tensor | None,
    kept: Tensor | None,
    ends: Tensor,
    low_gradient: Tensor | None,
) -> Tensor:
    """The gradient of `_project`'s rows from that of its output, [pairs, out] → [pairs, in]."""
    rows = _grouped(gradient, weight, ends)
    if a is None or low_gradient is None:
        return rows
    if kept is not None:
        return rows.add_(_grouped(low_gradient, a, ends).mul_(kept))
    return add_low_rank_(rows, low_gradient, a, ends)


class _Experts(torch.autograd.Function):
    """tokens → activation(up) · gate → down → sum over each token's experts, and its gradients.

    The base weights are frozen and get none. Kept for the backward pass: the tokens, which the block's
    shared experts keep anyway, the first projection's output, and the adapters' rank-sized rows.
    """

    @staticmethod
    def forward(
        ctx: Any,
        activation: Callable[[Tensor], Tensor] | None,
        tokens: Tensor,
        gates: Tensor,
        order: Tensor,
        places: Tensor,
        ends: Tensor,
        up: Tensor,
        up_a: Tensor | None,
        up_b: Tensor | None,
        up_kept: Tensor | None,
        down: Tensor,
        down_a: Tensor | None,
        down_b: Tensor | None,
        down_kept: Tensor | None,
    ) -> Tensor:
        top_k = gates.shape[1]
        hidden, up_low = _project(tokens[order // top_k], up, up_a, up_b, up_kept, ends)
        weighted = _weighted(activation, hidden, gates.reshape(-1)[order])
        rows, down_low = _project(weighted, down, down_a, down_b, down_kept, ends)
        ctx.activation = activation
        ctx.save_for_backward(
            *(tokens, gates, order, places, ends, hidden, up_low, down_low),
            *(up, up_a, up_b, up_kept, down, down_a, down_b, down_kept),
        )
        return sum_of_rows(rows, places, top_k)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: a checkpointed block makes them only once
        tokens, gates, order, places, ends, hidden, up_low, down_low = saved[:8]
        up, up_a, up_b, up_kept, down, down_a, down_b, down_kept = saved[8:]
        top_k = gates.shape[1]
        rows = gradient[order // top_k]
        low_gradient = None if down_b is None else _grouped(rows, down_b, ends)
        weighted_gradient = _project_back(rows, down, down_a, down_b, down_kept, ends, low_gradient)
        hidden_gradient, gates_gradient, weighted = _back_through_activation(
            ctx.activation, hidden, gates.reshape(-1)[order], weighted_gradient, again=down_a is not None
        )
        down_gradients = _adapter_gradients(weighted, down_kept, down_low, rows, low_gradient, ends)
        del rows, weighted, weighted_gradient

        low_gradient = None if up_b is None else _grouped(hidden_gradient, up_b, ends)
        up_gradients: tuple[Tensor | None, Tensor | None] = (None, None)
        if low_gradient is not None:
            up_gradients = _adapter_gradients(
                tokens[order // top_k], up_kept, up_low, hidden_gradient, low_gradient, ends
            )
        tokens_gradient = None
        if ctx.needs_input_grad[1]:
            rows = _project_back(hidden_gradient, up, up_a, up_b, up_kept, ends, low_gradient)
            tokens_gradient = sum_of_rows(rows, places, top_k)
        return (
            *(None, tokens_gradient, gates_gradient[places].view_as(gates), None, None, None),
            *(None, *up_gradients, None),
            *(None, *down_gradients, None),
        )


def _weighted(activation: Callable[[Tensor], Tensor] | None, hidden: Tensor, gates: Tensor) -> Tensor:
    """The activated rows times their gates: multiplied in the gates' precision, rounded once."""
    if activation is None:
        return relu2_weighted(hidden, gates)
    return (activation(hidden) * gates.unsqueeze(1)).to(hidden.dtype)


def _back_through_activation(
    activation: Callable[[Tensor], Tensor] | None,
    hidden: Tensor,
    gates: Tensor,
    gradient: Tensor,
    *,
    again: bool,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of `_weighted`, of `hidden` and of the gates; if `again`, also its value."""
    if activation is None:
        of_hidden, of_gates, value = relu2_weighted_backward(hidden, gates, gradient, again=again)
        assert of_gates is not None
        return of_hidden, of_gates, value
    with torch.enable_grad():
        hidden, gates = hidden.detach().requires_grad_(), gates.detach().requires_grad_()
        weighted = _weighted(activation, hidden, gates)
    of_hidden, of_gates = torch.autograd.grad(weighted, (hidden, gates), gradient)
    return of_hidden, of_gates, weighted.detach()


def _adapter_gradients(
    rows: Tensor | None,
    kept: Tensor | None,
    low: Tensor | None,
    gradient: Tensor,
    low_gradient: Tensor | None,
    ends: Tensor,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of A and B: a product over each expert's pairs; zero for an expert without any.

    The first factor lies by columns and the second by rows: of such products alone, the CUDA kernel takes
    groups of any size, none included.
    """
    if rows is None or low is None or low_gradient is None:
        return None, None
    if kept is not None:
        rows = rows * kept
    return _grouped(low_gradient.mT, rows, ends), _grouped(gradient.mT, low, ends)

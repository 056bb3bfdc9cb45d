"""What a step does between its GEMMs: Triton kernels on CUDA, each beside the same in plain PyTorch.

On CUDA each is one pass over its rows; PyTorch would write and read every intermediate. They compute in
fp32 and round once. Elsewhere, and for dtypes that only tests use, the plain functions compute.
"""

from __future__ import annotations

import torch
from torch import Tensor

from trainer.chat import IGNORED

try:
    import triton

    from trainer import fused_kernels as kernels
except ImportError:  # a PyTorch for CPUs comes without
    triton = None

_COLUMNS = 4096
"""Of a row of logits at a time."""
_PAIRS, _WIDE = 64, 256
"""Rows and columns that one program adds to."""


def relu2_weighted(hidden: Tensor, gates: Tensor | None) -> Tensor:
    """relu(hidden)² · gate. hidden: [rows, columns]; gates: [rows], or None for 1. Returns hidden's dtype."""
    if not _on_gpu(hidden):
        squared = torch.relu(hidden).square()
        return squared if gates is None else (squared * gates.unsqueeze(1)).to(hidden.dtype)
    out = torch.empty_like(hidden)
    rows, columns = hidden.shape
    kernels.relu2_forward[(rows,)](hidden, gates, out, columns, BLOCK=triton.next_power_of_2(columns))
    return out


def relu2_weighted_backward(
    hidden: Tensor, gates: Tensor | None, gradient: Tensor, *, again: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradients of `relu2_weighted`: of hidden; of the gates in their dtype; and, if `again`, its
    value."""
    if not _on_gpu(hidden):
        rectified = torch.relu(hidden)
        if gates is None:
            return 2 * rectified * gradient, None, rectified.square() if again else None
        squared = rectified.square()
        column = gates.unsqueeze(1)
        of_hidden = (2 * rectified * gradient * column).to(hidden.dtype)
        of_gates = (squared * gradient).sum(dim=1, dtype=gates.dtype)
        return of_hidden, of_gates, (squared * column).to(hidden.dtype) if again else None
    rows, columns = hidden.shape
    of_hidden = torch.empty_like(hidden)
    gates_gradient = None if gates is None else torch.empty_like(gates)
    weighted = torch.empty_like(hidden) if again else None
    kernels.relu2_backward[(rows,)](
        *(hidden, gates, gradient, of_hidden, gates_gradient, weighted, columns),
        BLOCK=triton.next_power_of_2(columns),
    )
    return of_hidden, gates_gradient, weighted


def sum_of_rows(rows: Tensor, places: Tensor, top_k: int) -> Tensor:
    """[pairs, columns] → [pairs / top_k, columns]: each sum over the rows at top_k neighbouring `places`.

    The order of the sum is fixed, so the bits are the same every time, unlike those of `index_add`.
    """
    if not _on_gpu(rows):
        return rows[places].view(-1, top_k, rows.shape[1]).sum(dim=1)
    pairs, columns = rows.shape
    out = torch.empty(pairs // top_k, columns, dtype=rows.dtype, device=rows.device)
    kernels.sum_of_rows[(pairs // top_k,)](
        rows, places, out, columns, TOP_K=top_k, BLOCK=triton.next_power_of_2(columns)
    )
    return out


def add_low_rank_(out: Tensor, low: Tensor, up: Tensor, ends: Tensor) -> Tensor:
    """out + low · up[e], in place, for each row's expert e.

    out: [pairs, columns], sorted by expert; low: [pairs, rank]; up: [experts, rank, columns] with any
    strides; ends: [experts], int32, where each expert's pairs end.
    """
    if not _on_gpu(out):
        for begin, end, own in zip([0, *ends.tolist()], ends.tolist(), up, strict=False):
            out[begin:end].addmm_(low[begin:end], own)
        return out
    pairs, columns = out.shape
    experts, rank, _ = up.shape
    kernels.add_low_rank[(triton.cdiv(pairs, _PAIRS), triton.cdiv(columns, _WIDE))](
        *(out, low, up, ends, pairs, columns, up.stride(0), up.stride(1), up.stride(2)),
        EXPERTS=experts, LANES=triton.next_power_of_2(experts), RANK=rank, INNER=max(16, rank),
        PAIRS=_PAIRS, WIDE=_WIDE, num_warps=8,
    )  # fmt: skip
    return out


def cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    """-log softmax(logits)[target] for each row, fp32; 0 where the target is IGNORED.

    logits: [rows, vocabulary], spent: with `gradient` they become the gradient of the losses' sum.
    """
    if not _on_gpu(logits):
        return _plain_cross_entropy_(logits, targets, gradient=gradient)
    rows, columns = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    kernels.cross_entropy[(rows,)](
        *(logits, targets, losses),
        COLUMNS=columns, IGNORED_TARGET=IGNORED, GRADIENT=gradient, BLOCK=_COLUMNS, num_warps=8,
    )  # fmt: skip
    return losses


def _plain_cross_entropy_(logits: Tensor, targets: Tensor, *, gradient: bool) -> Tensor:
    trained = targets != IGNORED
    wanted = targets.clamp(min=0).unsqueeze(1)
    logs = logits.float().log_softmax(dim=1)
    losses = -logs.gather(1, wanted).squeeze(1) * trained
    if gradient:
        slopes = logs.exp_()
        slopes.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=slopes.dtype))
        logits.copy_(slopes.mul_(trained.unsqueeze(1)))
    return losses


def _on_gpu(tensor: Tensor) -> bool:
    return triton is not None and tensor.is_cuda and tensor.dtype != torch.float64

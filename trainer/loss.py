"""Cross-entropy over a large vocabulary, in chunks of tokens.

The gradient of a chunk's logits is known as soon as its loss is, so it is made then, in the logits' own
memory, and at once multiplied down to the hidden states': the backward pass only scales it. So the head's
product is computed once, and no more than one chunk of logits is ever in memory.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.chat import IGNORED
from trainer.fused import cross_entropy_

CHUNK_TOKENS = 4096
"""At a vocabulary of 131,072 a chunk of bf16 logits is 1 GiB."""


def summed_cross_entropy(
    hidden: Tensor,
    labels: Tensor,
    head: nn.Module,
    predicting: Tensor | None = None,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
) -> Tensor:
    """Sum over the trained tokens of -log p(token | tokens before it): a scalar, fp32.

    hidden: [batch, length, hidden size]; labels: [batch, length], token ids or IGNORED, at the tokens' own
    places; predicting: the places, in the flattened batch, whose next token is trained, so that nothing
    waits for the device to count them; the batch's very last place may fill it up.
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    if predicting is None:
        predicting = (targets != IGNORED).nonzero().squeeze(1)
    rows, targets = hidden.flatten(0, 1)[predicting], targets[predicting]
    if type(head) is nn.Linear and head.bias is None and not head.weight.requires_grad:
        total: Tensor = _FrozenHead.apply(
            rows, head.weight, targets, chunk_tokens, torch.is_grad_enabled() and rows.requires_grad
        )
        return total
    # The empty sum keeps the graph whole for a batch without a trained token.
    total = rows.sum(dtype=torch.float32) * 0.0
    for part, wanted in zip(torch.split(rows, chunk_tokens), torch.split(targets, chunk_tokens), strict=True):
        total = total + checkpoint(_chunk, head, part, wanted, use_reentrant=False)
    return total


def _chunk(head: nn.Module, rows: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), wanted, reduction="sum", ignore_index=IGNORED)


class _FrozenHead(torch.autograd.Function):
    """Rows [n, hidden size] and targets [n] → the summed loss, through a head that has no gradient."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, targets: Tensor, chunk_tokens: int, training: bool
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=rows.device)
        of_rows = torch.empty_like(rows) if training else None
        for start in range(0, rows.shape[0], chunk_tokens):
            chunk = slice(start, start + chunk_tokens)
            logits = F.linear(rows[chunk], weight)
            total += cross_entropy_(logits, targets[chunk], gradient=training).sum()
            if of_rows is not None:
                torch.mm(logits, weight, out=of_rows[chunk])
        ctx.save_for_backward(of_rows)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        (of_rows,) = ctx.saved_tensors
        return of_rows * gradient.to(of_rows.dtype), None, None, None, None

"""Cross-entropy over a large vocabulary, in chunks of tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer.chat import IGNORED

CHUNK_TOKENS = 1024
"""At a vocabulary of 131,072 a chunk of fp32 logits is 0.5 GiB; those of 4,096 tokens would be 2 GiB."""


def summed_cross_entropy(
    hidden: Tensor, labels: Tensor, head: nn.Module, *, chunk_tokens: int = CHUNK_TOKENS
) -> Tensor:
    """Sum over the trained tokens of -log p(token | tokens before it): a scalar, fp32.

    hidden: [batch, length, hidden size]; labels: [batch, length], token ids or IGNORED, at the tokens'
    own places. Logits are made for positions that predict a trained token only, one chunk at a time, and
    again in the backward pass, so that no more than one chunk of them is ever in memory.
    """
    targets = labels[:, 1:]
    trained = targets != IGNORED
    predicting, targets = hidden[:, :-1][trained], targets[trained]
    # The empty sum keeps the graph whole for a batch without a trained token.
    total = predicting.sum(dtype=torch.float32) * 0.0
    for rows, wanted in zip(
        torch.split(predicting, chunk_tokens), torch.split(targets, chunk_tokens), strict=True
    ):
        total = total + checkpoint(_chunk, head, rows, wanted, use_reentrant=False)
    return total


def _chunk(head: nn.Module, rows: Tensor, wanted: Tensor) -> Tensor:
    return F.cross_entropy(head(rows).float(), wanted, reduction="sum")

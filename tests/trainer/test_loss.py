"""The chunked loss is the whole loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from trainer.chat import IGNORED
from trainer.loss import summed_cross_entropy


def test_value_and_gradients_equal_the_unchunked_loss() -> None:
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 31, bias=False, dtype=torch.float64)
    hidden = torch.randn(3, 7, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(31, (3, 7))
    labels[0, 3:] = IGNORED
    labels[2] = IGNORED

    whole = F.cross_entropy(
        head(hidden)[:, :-1].reshape(-1, 31).float(), labels[:, 1:].reshape(-1), reduction="sum"
    )
    expected = torch.autograd.grad(whole, (hidden, head.weight))
    chunked = summed_cross_entropy(hidden, labels, head, chunk_tokens=2)
    found = torch.autograd.grad(chunked, (hidden, head.weight))
    torch.testing.assert_close(chunked, whole)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_a_batch_without_trained_tokens_costs_nothing_and_keeps_the_graph() -> None:
    hidden = torch.randn(1, 4, 6, requires_grad=True)
    head = torch.nn.Linear(6, 31)
    loss = summed_cross_entropy(hidden, torch.full((1, 4), IGNORED), head)
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == 0.0
    assert hidden.grad is not None
    assert not hidden.grad.any()

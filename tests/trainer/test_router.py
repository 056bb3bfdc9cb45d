"""The router's product in bf16 is transformers' product in fp32."""

from __future__ import annotations

import torch

from trainer.router import RouterLogits


def test_logits_are_the_fp32_products_and_the_gradient_keeps_16_bits() -> None:
    torch.manual_seed(0)
    rows = torch.randn(9, 32, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(5, 32, dtype=torch.bfloat16)
    gradient = torch.randn(9, 5)
    expected = torch.nn.functional.linear(rows.float(), weight.float())
    (slopes,) = torch.autograd.grad(expected, rows, gradient)
    found = RouterLogits.apply(rows, weight)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected)
    (of_rows,) = torch.autograd.grad(found, rows, gradient)
    # Both are rounded to bf16 at the end: they may differ by one step of it, and hardly ever do.
    torch.testing.assert_close(of_rows, slopes, rtol=2**-7, atol=1e-3)
    assert (of_rows != slopes).float().mean() < 0.05

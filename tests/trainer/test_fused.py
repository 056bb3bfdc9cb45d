"""The Triton kernels compute what the plain functions do, here in Triton's interpreter: no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from trainer import fused
from trainer.chat import IGNORED

pytest.importorskip("triton")

COMPARED = """
import torch
from trainer import fused
from trainer.chat import IGNORED

torch.manual_seed(0)

def both(function, *args, **options):
    # The kernels write into some arguments: each run has its own.
    copies = [[a.clone() if isinstance(a, torch.Tensor) else a for a in args] for _ in range(2)]
    fused._on_gpu = lambda tensor: False
    plain = function(*copies[0], **options), copies[0]
    fused._on_gpu = lambda tensor: True
    kernel = function(*copies[1], **options), copies[1]
    return kernel, plain

def same(found, expected, name):
    torch.testing.assert_close(found, expected, rtol=2e-2, atol=2e-2, msg=lambda text: f"{name}: {text}")

hidden, slope = torch.randn(2, 7, 37, dtype=torch.bfloat16)
gates = torch.rand(7)
for gate in (gates, None):
    same(*both(fused.relu2_weighted, hidden, gate), "relu2")
    for again in (True, False):
        same(*both(fused.relu2_weighted_backward, hidden, gate, slope, again=again), f"relu2 back, {again}")

rows = torch.randn(12, 33, dtype=torch.bfloat16)
same(*both(fused.sum_of_rows, rows, torch.randperm(12), 3), "sum of rows")

fused._PAIRS, fused._WIDE = 16, 32
out = torch.randn(50, 70)  # the interpreter multiplies no bf16
ends = torch.tensor([0, 3, 3, 20, 47, 47, 50], dtype=torch.int32)
low, up = torch.randn(50, 8), torch.randn(7, 8, 70)
same(*both(fused.add_low_rank_, out, low, up, ends), "low rank")
same(*both(lambda *args: fused.add_low_rank_(*args[:2], args[2].mT, args[3]),
           out, low, up.mT.contiguous(), ends), "low rank, the other way round")

fused._COLUMNS = 16  # several turns for a row, the last not full
logits = torch.randn(6, 70, dtype=torch.bfloat16) * 4
logits[2, :20] = float("-inf")
targets = torch.tensor([3, IGNORED, 69, 40, 16, 0])
for gradient in (True, False):
    same(*both(fused.cross_entropy_, logits, targets, gradient=gradient), f"cross-entropy, {gradient}")
print("the same")
"""


def test_the_kernels_compute_what_the_plain_functions_do() -> None:
    found = subprocess.run(
        [sys.executable, "-c", COMPARED],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert found.stdout == "the same\n", found.stderr


def test_relu2_and_its_gradients_are_autograds() -> None:
    torch.manual_seed(0)
    hidden, slope = torch.randn(2, 5, 9, dtype=torch.float64)
    gates = torch.rand(5, dtype=torch.float64)
    hidden.requires_grad_()
    gates.requires_grad_()
    value = torch.relu(hidden).square() * gates.unsqueeze(1)
    expected = torch.autograd.grad(value, (hidden, gates), slope)
    with torch.no_grad():
        torch.testing.assert_close(fused.relu2_weighted(hidden, gates), value)
        of_hidden, of_gates, again = fused.relu2_weighted_backward(hidden, gates, slope, again=True)
    torch.testing.assert_close((of_hidden, of_gates), expected)
    torch.testing.assert_close(again, value.detach())


def test_cross_entropy_and_its_gradient_are_pytorchs() -> None:
    torch.manual_seed(0)
    logits = torch.randn(4, 11, requires_grad=True)
    targets = torch.tensor([0, IGNORED, 10, 3])
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)
    (slopes,) = torch.autograd.grad(expected.sum(), logits)
    spent = logits.detach().clone()
    torch.testing.assert_close(fused.cross_entropy_(spent, targets, gradient=True), expected.detach())
    torch.testing.assert_close(spent, slopes)


def test_a_low_rank_product_is_added_by_expert() -> None:
    torch.manual_seed(0)
    out, low, up = torch.randn(5, 4), torch.randn(5, 2), torch.randn(3, 2, 4)
    expected = out + torch.stack([low[row] @ up[expert] for row, expert in enumerate((0, 0, 2, 2, 2))])
    ends = torch.tensor([2, 2, 5], dtype=torch.int32)
    torch.testing.assert_close(fused.add_low_rank_(out, low, up, ends), expected)

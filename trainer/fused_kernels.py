"""The Triton kernels of `fused.py`, which says what each is to compute.

Triton reads the annotations of a kernel's arguments, so they have none but its own.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator,import-untyped"

from __future__ import annotations

import triton
import triton.language as tl

# Rows of pairs times columns can pass 2³¹ elements: a row's place is computed in 64 bits.


@triton.jit
def relu2_forward(hidden, gates, out, columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    there = places < columns
    rectified = tl.maximum(
        tl.load(hidden + row * columns + places, mask=there, other=0.0).to(tl.float32), 0.0
    )
    value = rectified * rectified
    if gates is not None:
        value *= tl.load(gates + row).to(tl.float32)
    tl.store(out + row * columns + places, value, mask=there)


@triton.jit
def relu2_backward(
    hidden, gates, gradient, of_hidden, of_gates, value, columns,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    places = tl.arange(0, BLOCK)
    there = places < columns
    rectified = tl.maximum(
        tl.load(hidden + row * columns + places, mask=there, other=0.0).to(tl.float32), 0.0
    )
    slope = tl.load(gradient + row * columns + places, mask=there, other=0.0).to(tl.float32)
    squared = rectified * rectified
    gate = 1.0
    if gates is not None:
        gate = tl.load(gates + row).to(tl.float32)
        tl.store(of_gates + row, tl.sum(squared * slope, axis=0))
    tl.store(of_hidden + row * columns + places, 2.0 * rectified * slope * gate, mask=there)
    if value is not None:
        tl.store(value + row * columns + places, squared * gate, mask=there)


@triton.jit
def sum_of_rows(rows, places, out, columns, TOP_K: tl.constexpr, BLOCK: tl.constexpr):
    token = tl.program_id(0).to(tl.int64)
    within = tl.arange(0, BLOCK)
    there = within < columns
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for pair in tl.static_range(TOP_K):
        row = tl.load(places + token * TOP_K + pair)
        total += tl.load(rows + row * columns + within, mask=there, other=0.0).to(tl.float32)
    tl.store(out + token * columns + within, total, mask=there)


@triton.jit
def add_low_rank(
    out, low, up, ends, pairs, columns, up_expert, up_rank, up_column,
    EXPERTS: tl.constexpr, LANES: tl.constexpr, RANK: tl.constexpr, INNER: tl.constexpr,
    PAIRS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    first_pair = tl.program_id(0) * PAIRS
    rows = first_pair + tl.arange(0, PAIRS)
    across = tl.program_id(1) * WIDE + tl.arange(0, WIDE)
    inner = tl.arange(0, INNER)
    own = (rows < pairs)[:, None] & (across < columns)[None, :]
    places = out + rows.to(tl.int64)[:, None] * columns + across[None, :]
    total = tl.load(places, mask=own, other=0.0).to(tl.float32)
    lows = tl.load(
        low + rows[:, None] * RANK + inner[None, :],
        mask=(rows < pairs)[:, None] & (inner < RANK)[None, :], other=0.0,
    )  # fmt: skip
    # The experts whose pairs are among these rows: mostly one.
    lanes = tl.arange(0, LANES)
    all_ends = tl.load(ends + lanes, mask=lanes < EXPERTS, other=2147483647)
    expert = tl.sum((all_ends <= first_pair).to(tl.int32), axis=0)
    last_pair = tl.minimum(first_pair + PAIRS, pairs) - 1
    last = tl.sum((all_ends <= last_pair).to(tl.int32), axis=0)
    while expert <= last:
        begin = tl.load(ends + expert - 1, mask=expert > 0, other=0)
        end = tl.load(ends + expert)
        mine = (rows >= begin) & (rows < end)
        ups = tl.load(
            up + expert.to(tl.int64) * up_expert + inner[:, None] * up_rank + across[None, :] * up_column,
            mask=(inner < RANK)[:, None] & (across < columns)[None, :], other=0.0,
        )  # fmt: skip
        total += tl.dot(tl.where(mine[:, None], lows, 0.0).to(ups.dtype), ups, input_precision="ieee")
        expert += 1
    tl.store(places, total, mask=own)


@triton.jit
def cross_entropy(
    logits, targets, losses,
    COLUMNS: tl.constexpr, IGNORED_TARGET: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    own = logits + row * COLUMNS
    target = tl.load(targets + row)
    trained = target != IGNORED_TARGET
    # The largest of each column's lane so far, and the sum of exponentials beside it: one reading.
    largest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    summed = tl.zeros((BLOCK,), dtype=tl.float32)
    for start in range(0, COLUMNS, BLOCK):
        places = start + tl.arange(0, BLOCK)
        value = tl.load(own + places, mask=places < COLUMNS, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(largest, value)
        # A lane that has seen nothing finite yet: -inf - -inf is no number.
        safe = tl.where(higher == float("-inf"), 0.0, higher)
        summed = summed * tl.exp(largest - safe) + tl.exp(value - safe)
        largest = higher
    top = tl.max(largest, axis=0)
    log_sum = top + tl.log(tl.sum(summed * tl.exp(largest - top), axis=0))
    wanted = tl.load(own + tl.where(trained, target, 0)).to(tl.float32)
    tl.store(losses + row, tl.where(trained, log_sum - wanted, 0.0))
    if GRADIENT:
        for start in range(0, COLUMNS, BLOCK):
            places = start + tl.arange(0, BLOCK)
            value = tl.load(own + places, mask=places < COLUMNS, other=float("-inf")).to(tl.float32)
            slope = tl.exp(value - log_sum) - tl.where(places == target, 1.0, 0.0)
            tl.store(own + places, tl.where(trained, slope, 0.0), mask=places < COLUMNS)

"""causal-conv1d: every kernel that it instantiates, by dtype, width and layout."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import float64_references as reference
import torch
from kernel_harness import Case, documents, random, tolerance, with_settings

ROUNDINGS = 2  # all in float32 but the stored result; doubled, for rounded elements that are summed
HALVES = (torch.float16, torch.bfloat16)


def training(dtype: torch.dtype) -> Iterator[Case]:
    """The convolution of whole rows: every width, layout and activation."""
    from causal_conv1d import causal_conv1d_fn

    # Parameters kept in float32 beside half-precision activations have kernels of their own.
    weight_dtypes = (dtype, torch.float32) if dtype in HALVES else (dtype,)
    layouts = ("channel-first", "channel-last", "channel-last with seq_idx")
    # 1031 is odd, so no vector loads; both lengths are more than one block of threads covers in one turn.
    for weight_dtype, layout, activation, width, length in itertools.product(
        weight_dtypes, layouts, (None, "silu"), (2, 3, 4), (1031, 2056)
    ):
        batch, dim = 2, 64
        x = random((batch, length, dim), 11).to(dtype).transpose(1, 2)
        inputs = {"x": x.contiguous() if layout == "channel-first" else x, **_parameters(width, weight_dtype)}
        if layout.endswith("seq_idx"):
            inputs["seq_idx"] = documents(batch, length)
        # kernel_defects.py: a thread takes 16 bytes, a block of 128 threads 2048, in one turn.
        short = 0 < length * dtype.itemsize % 2048 < 16 and layout == "channel-first" and activation
        yield Case(
            "causal_conv1d_fn, short last block" if short else "causal_conv1d_fn",
            f"{dtype}, weight {weight_dtype}, {layout}, {activation}, {width} by {length}",
            with_settings(causal_conv1d_fn, activation=activation),
            with_settings(reference.causal_conv1d_reference, activation=activation),
            inputs,
            tolerance(ROUNDINGS, dtype),
        )


def continued(dtype: torch.dtype) -> Iterator[Case]:
    """Rows that begin where others ended, the next elements one by one, and the ends of packed sequences."""
    from causal_conv1d import causal_conv1d_fn
    from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

    batch, dim, length = 2, 64, 1032
    for width in (2, 3, 4):
        yield Case(
            "causal_conv1d_fn with states",
            f"{dtype}, {width} by {length}",
            with_settings(causal_conv1d_fn, activation="silu", return_final_states=True),
            reference.conv_with_states_reference,
            {
                "x": random((batch, length, dim), 14).to(dtype).transpose(1, 2),
                "initial_states": random((batch, width - 1, dim), 15).to(dtype).transpose(1, 2),
                **_parameters(width, dtype),
            },
            tolerance(ROUNDINGS, dtype),
        )
        yield from _updates(dtype, width)
    yield Case(
        "causal_conv1d_varlen_states",
        f"{dtype}",
        with_settings(causal_conv1d_varlen_states, state_len=4),
        with_settings(reference.conv_varlen_states_reference, state_len=4),
        {"x": random((96, dim), 16).to(dtype), "cu_seqlens": torch.tensor([0, 2, 33, 96], dtype=torch.int32)},
        tolerance(0, dtype),
        has_backward=False,
    )


def _updates(dtype: torch.dtype, width: int) -> Iterator[Case]:
    from causal_conv1d import causal_conv1d_update

    def update(**inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = causal_conv1d_update(**inputs, activation="silu")
        return out, inputs["conv_state"]  # changed in place

    batch, dim = 3, 64
    ring = {"cache_seqlens": torch.tensor([0, 7, 61], dtype=torch.int32)}
    chosen = {"conv_state_indices": torch.tensor([4, 0, 2], dtype=torch.int32)}
    kinds: tuple[tuple[str, int, int, dict[str, torch.Tensor]], ...] = (
        ("plain", batch, width - 1, {}),
        ("longer state", batch, 16, {}),
        ("ring", batch, 16, ring),
        ("chosen states", 5, width - 1, chosen),
    )
    for (kind, states, size, extra), length in itertools.product(kinds, (1, 3)):
        yield Case(
            "causal_conv1d_update",
            f"{dtype}, {kind}, {width} by {length}",
            update,
            reference.conv_update_reference,
            {
                "x": random((batch, dim, length), 17).to(dtype),
                "conv_state": random((states, dim, size), 18).to(dtype),
                **_parameters(width, dtype),
                **extra,
            },
            tolerance(ROUNDINGS, dtype),
            has_backward=False,
        )


def _parameters(width: int, dtype: torch.dtype, dim: int = 64) -> dict[str, torch.Tensor]:
    return {"weight": random((dim, width), 12).to(dtype), "bias": random((dim,), 13).to(dtype)}

"""mamba-ssm's chunked scan (Mamba-2): alone, and fused with convolution, norm and projection."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import float64_references as reference
import torch
from kernel_harness import Case, documents, random, tolerance, with_settings
from torch import Tensor

ROUNDINGS = 16
"""x, B and C after the convolution, the scores, the state between chunks, the normalised and the projected
output, and the gradients of some of them are rounded for the tensor cores before the result is. (Measured
with exact products, in Triton's interpreter and float16: up to 4.3 roundoffs.)"""
# Nemotron-3-Nano's head, state and chunk sizes with fewer heads and groups; two chunks and a half.
BATCH, LENGTH, HEADS, HEAD_DIM, GROUPS, STATE, CHUNK, WIDTH = 2, 320, 8, 64, 2, 128, 128, 4
DIM, CONVOLVED = HEADS * HEAD_DIM, HEADS * HEAD_DIM + 2 * GROUPS * STATE


def alone(dtype: torch.dtype) -> Iterator[Case]:
    """The scan, by itself."""
    yield _alone(dtype, "no seq_idx", {})


def packed(dtype: torch.dtype) -> Iterator[Case]:
    """The scan over documents in one row; and the state at the end of each, for generating on from there."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    yield _alone(dtype, "seq_idx", {"seq_idx": documents(BATCH, LENGTH)})
    borders = [0, 100, 228, LENGTH]
    lengths = torch.tensor([end - begin for begin, end in itertools.pairwise(borders)])
    yield Case(
        "mamba_chunk_scan_combined, varlen states",
        f"{dtype}",
        with_settings(
            mamba_chunk_scan_combined, chunk_size=CHUNK, dt_softplus=True, return_varlen_states=True
        ),
        reference.chunk_scan_varlen_reference,
        {
            **_scanned(dtype, batch=1),
            "seq_idx": torch.arange(3).repeat_interleave(lengths)[None].to(torch.int32),
            "cu_seqlens": torch.tensor(borders, dtype=torch.int32),
        },
        tolerance(ROUNDINGS, dtype, matrices=True),
        has_backward=False,
    )


def with_states(dtype: torch.dtype) -> Iterator[Case]:
    """The scan from a state to a state, gated in the scan itself."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    yield Case(
        "mamba_chunk_scan_combined, with states",
        f"{dtype}, gated",
        with_settings(
            mamba_chunk_scan_combined, chunk_size=CHUNK, dt_softplus=True, return_final_states=True
        ),
        reference.chunk_scan_with_states_reference,
        {
            **_scanned(dtype),
            "z": random((BATCH, LENGTH, HEADS, HEAD_DIM), 43).to(dtype),
            "initial_states": random((BATCH, HEADS, HEAD_DIM, STATE), 44).to(dtype),
        },
        tolerance(ROUNDINGS, dtype, matrices=True),
    )


def fused(dtype: torch.dtype) -> Iterator[Case]:
    """The whole mixer after its input projection, as training calls it."""
    yield from _fused(dtype, "no seq_idx", {})


def fused_packed(dtype: torch.dtype) -> Iterator[Case]:
    """The mixer over packed rows."""
    yield from _fused(dtype, "seq_idx", {"seq_idx": documents(BATCH, LENGTH)})


def _alone(dtype: torch.dtype, label: str, given: dict[str, Tensor]) -> Case:
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    return Case(
        "mamba_chunk_scan_combined",
        f"{dtype}, {label}",
        with_settings(mamba_chunk_scan_combined, chunk_size=CHUNK, dt_softplus=True),
        reference.chunk_scan_reference,
        {**_scanned(dtype), **given},
        tolerance(ROUNDINGS, dtype, matrices=True),
    )


def _fused(dtype: torch.dtype, label: str, given: dict[str, Tensor]) -> Iterator[Case]:
    from mamba_ssm.ops.triton.ssd_combined import mamba_split_conv1d_scan_combined

    inputs = {
        "zxbcdt": random((BATCH, LENGTH, DIM + CONVOLVED + HEADS), 38).to(dtype),
        "conv1d_weight": random((CONVOLVED, WIDTH), 39).to(dtype) / 2,
        "conv1d_bias": random((CONVOLVED,), 40).to(dtype),
        "rmsnorm_weight": random((DIM,), 41).to(dtype),
        **_scalars(dtype),
        **given,
    }
    projection = {"outproj_weight": random((DIM, DIM), 42).to(dtype) / math.sqrt(DIM)}
    for projected, weights in (("projected", projection), ("not projected", {})):
        yield Case(
            "mamba_split_conv1d_scan_combined",
            f"{dtype}, {label}, {projected}",
            with_settings(
                mamba_split_conv1d_scan_combined,
                chunk_size=CHUNK,
                activation="silu",
                rmsnorm_eps=1e-5,
                headdim=HEAD_DIM,
                ngroups=GROUPS,
                norm_before_gate=False,
            ),
            with_settings(reference.split_conv1d_scan_reference, head_dim=HEAD_DIM, groups=GROUPS),
            {**inputs, **weights},
            tolerance(ROUNDINGS, dtype, matrices=True),
        )


def _scanned(dtype: torch.dtype, batch: int = BATCH) -> dict[str, Tensor]:
    return {
        "x": random((batch, LENGTH, HEADS, HEAD_DIM), 34).to(dtype),
        "dt": random((batch, LENGTH, HEADS), 35).to(dtype),
        "B": random((batch, LENGTH, GROUPS, STATE), 36).to(dtype),
        "C": random((batch, LENGTH, GROUPS, STATE), 37).to(dtype),
        **_scalars(dtype),
    }


def _scalars(dtype: torch.dtype) -> dict[str, Tensor]:
    return {
        "A": random((HEADS,), 31, low=-2.0, high=-0.1),
        "D": random((HEADS,), 32).to(dtype),
        "dt_bias": random((HEADS,), 33, low=-3.0, high=-1.0).to(dtype),
    }

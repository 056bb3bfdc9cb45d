"""mamba-ssm's selective scan (Mamba-1), its step when text is generated, and its norms."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import float64_references as reference
import torch
from kernel_harness import Case, random, tolerance, with_settings
from torch import Tensor

ROUNDINGS = 4  # the ungated output is stored once more, for the gate's gradient
MIXER_ROUNDINGS = 16  # the convolution's, the three projections' and the scan's results, one after the other


def real(dtype: torch.dtype) -> Iterator[Case]:
    """With and without gate, one block and several, one group of B and C and two, and constant B and C."""
    # A block covers at most 2048 steps; 2100 needs a second one, and fills neither.
    for gated, (length, groups) in itertools.product((False, True), ((256, 1), (2100, 2))):
        batch, state = 2, 16
        at_every_step = {
            "B": random((batch, groups, state, length), 24).to(dtype),
            "C": random((batch, groups, state, length), 25).to(dtype),
        }
        yield _scan(dtype, f"{groups} groups", length, at_every_step, gated=gated)
    constant = {"B": random((64, 16), 24), "C": random((64, 16), 25)}
    yield _scan(dtype, "constant B and C", 256, constant, gated=False)


def imaginary(dtype: torch.dtype) -> Iterator[Case]:
    """Complex A, B and C: at every step, in one block and in several, and constant.

    One group of B and C: for several the backward kernel writes past the end (kernel_defects.py).
    """
    batch, dim, state = 2, 64, 8
    A = torch.complex(random((dim, state), 23, low=-1.0, high=-0.1), random((dim, state), 29))
    for length in (256, 2100):
        at_every_step = {
            "A": A,
            "B": random((batch, 1, state, 2 * length), 24).to(dtype),
            "C": random((batch, 1, state, 2 * length), 25).to(dtype),
        }
        yield _scan(dtype, "complex", length, at_every_step, gated=True)
    constant = {
        "A": A,
        "B": torch.complex(random((dim, state), 24), random((dim, state), 124)),
        "C": torch.complex(random((dim, state), 25), random((dim, state), 125)),
    }
    yield _scan(dtype, "complex, constant B and C", 256, constant, gated=False)


def _scan(dtype: torch.dtype, label: str, length: int, given: dict[str, Tensor], *, gated: bool) -> Case:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    batch, dim, state = 2, 64, 16
    inputs = {
        "u": random((batch, dim, length), 21).to(dtype),
        "delta": random((batch, dim, length), 22, low=0.0, high=0.5).to(dtype),
        "A": random((dim, state), 23, low=-1.0, high=-0.1),
        "D": random((dim,), 26),
        "delta_bias": random((dim,), 27, low=0.0, high=0.5),
        **given,
    }
    if gated:
        inputs["z"] = random((batch, dim, length), 28).to(dtype)
    return Case(
        "selective_scan_fn",
        f"{dtype}, {'gated' if gated else 'not gated'}, length {length}, {label}",
        with_settings(selective_scan_fn, delta_softplus=True),
        reference.selective_scan_reference,
        inputs,
        tolerance(ROUNDINGS, dtype),
    )


def mixer(dtype: torch.dtype) -> Iterator[Case]:
    """Convolution, projections and scan in one; its backward computes the scan's output once more."""
    from mamba_ssm.ops.selective_scan_interface import mamba_inner_fn

    batch, dim, state, rank, length, width = 2, 64, 16, 8, 256, 4
    yield Case(
        "mamba_inner_fn",
        f"{dtype}, length {length}",
        with_settings(mamba_inner_fn, out_proj_bias=None, delta_softplus=True),
        reference.mamba_inner_reference,
        {
            "xz": random((batch, 2 * dim, length), 51).to(dtype),
            "conv1d_weight": (random((dim, 1, width), 52) / 2).to(dtype),
            "conv1d_bias": random((dim,), 53).to(dtype),
            "x_proj_weight": (random((rank + 2 * state, dim), 54) / 8).to(dtype),
            "delta_proj_weight": (random((dim, rank), 55) / 4).to(dtype),
            "out_proj_weight": (random((dim, dim), 56) / 8).to(dtype),
            "A": random((dim, state), 57, low=-1.0, high=-0.1),
            "D": random((dim,), 58),
            "delta_bias": random((dim,), 59, low=-1.0, high=0.5),
        },
        tolerance(MIXER_ROUNDINGS, dtype, matrices=True),
    )


def step(dtype: torch.dtype) -> Iterator[Case]:
    """One step, with one dt for a whole head, as Mamba-2 calls it, and with one for each channel."""
    from mamba_ssm.ops.triton.selective_state_update import selective_state_update

    batch, heads, dim, groups, state = 3, 8, 64, 2, 128

    def run(*, of_heads: bool, state: Tensor, A: Tensor, **inputs: Tensor) -> tuple[Tensor, Tensor]:
        if of_heads:
            # Strides of zero choose the kernel's other branch.
            inputs["dt"] = inputs["dt"][:, :, :1].expand(-1, -1, dim)
            inputs["dt_bias"] = inputs["dt_bias"][:, :1].expand(-1, dim)
            A = A[:, :1, :1].expand(-1, *A.shape[1:])
        return selective_state_update(state, A=A, dt_softplus=True, **inputs), state  # changed in place

    def expected(
        *, of_heads: bool, A: Tensor, dt: Tensor, dt_bias: Tensor, **inputs: Tensor
    ) -> tuple[Tensor, ...]:
        if of_heads:
            dt, dt_bias, A = dt[:, :, :1], dt_bias[:, :1], A[:, :1, :1]
        out, state = reference.state_update_reference(A=A, dt=dt, dt_bias=dt_bias, **inputs)
        return out, state

    for of_heads, gated, state_dtype in itertools.product(
        (False, True), (False, True), dict.fromkeys((dtype, torch.float32))
    ):
        inputs = {
            "state": random((batch, heads, dim, state), 61).to(state_dtype),
            "x": random((batch, heads, dim), 62).to(dtype),
            "dt": random((batch, heads, dim), 63).to(dtype),
            "A": random((heads, dim, state), 64, low=-1.0, high=-0.1),
            "B": random((batch, groups, state), 65).to(dtype),
            "C": random((batch, groups, state), 66).to(dtype),
            "D": random((heads, dim), 67),
            "dt_bias": random((heads, dim), 68, low=-1.0, high=0.5),
        }
        if gated:
            inputs["z"] = random((batch, heads, dim), 69).to(dtype)
        yield Case(
            "selective_state_update",
            f"{dtype}, state {state_dtype}, {'a head' if of_heads else 'a channel'} at a time, "
            f"{'gated' if gated else 'not gated'}",
            with_settings(run, of_heads=of_heads),
            with_settings(expected, of_heads=of_heads),
            inputs,
            tolerance(ROUNDINGS, dtype),
            has_backward=False,
        )


def norms(dtype: torch.dtype) -> Iterator[Case]:
    """RMSNorm and LayerNorm, gated before, after or not, over all channels and over groups of them."""
    from mamba_ssm.ops.triton.layernorm_gated import layernorm_fn

    rows, dim = 320, 512
    for centred, gate, group_size in itertools.product(
        (False, True), ("no gate", "gate before", "gate after"), (dim, 128)
    ):
        settings = {"group_size": group_size, "norm_before_gate": gate == "gate after"}
        inputs = {
            "x": random((rows, dim), 71).to(dtype),
            "weight": random((dim,), 72).to(dtype),
            "bias": random((dim,), 73).to(dtype),
        }
        if gate != "no gate":
            inputs["z"] = random((rows, dim), 74).to(dtype)
        yield Case(
            "layernorm_fn, gated" if centred else "rmsnorm_fn, gated",
            f"{dtype}, {gate}, groups of {group_size}",
            with_settings(layernorm_fn, is_rms_norm=not centred, eps=1e-5, **settings),
            with_settings(reference.norm_reference, centred=centred, **settings),
            inputs,
            tolerance(ROUNDINGS, dtype),
        )

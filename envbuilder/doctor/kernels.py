"""Compiled kernels against a float64 reference, forward and backward, on the GPU.

A standalone script: standard library and torch alone, run by the environment's own interpreter as
`python kernels.py causal-conv1d mamba-ssm`, so that it meets exactly what training will meet. It prints one
line of JSON, with one result for each case, of the output or gradient that is worst:
`{"device": …, "results": [{"kernel", "case", "quantity", "error", "tolerance", "problem"}]}`.

The error is `max|got - reference| / max|reference|`. Inputs are rounded to the case's dtype first, so it is
the kernel's own error. Before each call the allocator's free memory is filled with NaN: an element that a
kernel forgets to write shows as NaN instead of as the right answer of the call before.
"""

from __future__ import annotations

import itertools
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

UNIT_ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
TF32_UNIT_ROUNDOFF = 2.0**-11
"""Triton multiplies float32 matrices in TF32: 10 bits of mantissa, as float16."""
FLOAT32_FLOOR = 1e-4
"""What float32 accumulation may add in any dtype. Sums of some thousand terms and the GPU's fast exponential
(2 ulp) stay below 1e-5; a kernel that drops a tap, a chunk or a document border errs by 1e-2 and more."""

# Roundings to the working dtype, one after the other, on the longest path to any output or gradient: each is
# at most one unit roundoff of the largest element. Doubled, for rounded elements that are summed.
CONV_ROUNDINGS = 2  # all in float32 but the stored result
SCAN_ROUNDINGS = 4  # the ungated output is stored once more, for the gate's gradient
# x, B and C after the convolution, the scores, the state between chunks, the normalised and the projected
# output, and the gradients of some of them are rounded for the tensor cores before the result is. (Measured
# with exact products, in Triton's interpreter and float16: up to 4.3 roundoffs.)
CHUNKED_ROUNDINGS = 16


def causal_conv1d_reference(
    x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None = None, activation: str | None = None
) -> Tensor:
    """Depthwise causal convolution of x (batch, dim, length) with weight (dim, width).

    Taps that reach into another document (another seq_idx, shape (batch, length)) count as zero.
    """
    width, length = weight.shape[1], x.shape[2]
    padded = functional.pad(x, (width - 1, 0))
    out = torch.zeros_like(x) + bias[:, None]
    for tap in range(width):
        term = padded[:, :, tap : tap + length] * weight[:, tap, None]
        if seq_idx is not None:
            documents = functional.pad(seq_idx, (width - 1, 0), value=-1)[:, tap : tap + length]
            term = term * (documents == seq_idx)[:, None, :]
        out = out + term
    return functional.silu(out) if activation == "silu" else out


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    delta_bias: Tensor,
    z: Tensor | None = None,
) -> Tensor:
    """Mamba's selective scan (Gu and Dao 2023, algorithm 2), one step after the other.

    u, delta, z (batch, dim, length); A (dim, state); B, C (batch, groups, state, length);
    D, delta_bias (dim).
    """
    repeats = u.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, dim=1), C.repeat_interleave(repeats, dim=1)
    delta = functional.softplus(delta + delta_bias[:, None])
    decay = torch.exp(delta[:, :, None] * A[:, :, None])
    entering = (delta * u)[:, :, None] * B
    state = torch.zeros_like(decay[..., 0])
    states = []
    # unbind, not an index: the gradient of every index would be as large as the whole.
    for decay_now, entering_now in zip(decay.unbind(-1), entering.unbind(-1), strict=True):
        state = decay_now * state + entering_now
        states.append(state)
    out = (torch.stack(states, dim=-1) * C).sum(dim=2) + u * D[:, None]
    return out if z is None else out * functional.silu(z)


def chunk_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Mamba-2's state space recurrence (Dao and Gu 2024, equation 1), one step after the other.

    x (batch, length, heads, head dim); dt (batch, length, heads); A, D, dt_bias (heads);
    B, C (batch, length, groups, state); seq_idx (batch, length): the state begins anew with each document.
    """
    repeats = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeats, dim=2), C.repeat_interleave(repeats, dim=2)
    dt = functional.softplus(dt + dt_bias)
    decay = torch.exp(dt * A)
    if seq_idx is not None:
        begins = functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        decay = decay.masked_fill(begins[:, :, None], 0.0)
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    outputs = []
    steps = (decay, dt[..., None] * x, B, C)
    for decay_now, x_now, B_now, C_now in zip(*(tensor.unbind(1) for tensor in steps), strict=True):
        state = decay_now[:, :, None, None] * state + x_now[..., None] * B_now[:, :, None]
        outputs.append((state * C_now[:, :, None]).sum(dim=-1))
    return torch.stack(outputs, dim=1) + x * D[:, None]


def split_conv1d_scan_reference(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    rmsnorm_weight: Tensor,
    outproj_weight: Tensor | None = None,
    seq_idx: Tensor | None = None,
    *,
    head_dim: int,
    groups: int,
    epsilon: float = 1e-5,
) -> Tensor:
    """The whole Mamba-2 mixer after its input projection: convolution, scan, gated RMSNorm, projection.

    zxbcdt (batch, length, 2·dim + 2·groups·state + heads). The gate multiplies before the norm, and the norm
    is taken over each group of dim / groups channels, as Nemotron-H does.
    """
    heads = A.shape[0]
    dim = heads * head_dim
    group_states = (conv1d_weight.shape[0] - dim) // 2
    z, xbc, dt = zxbcdt.split([dim, dim + 2 * group_states, heads], dim=-1)
    xbc = causal_conv1d_reference(xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, "silu").transpose(
        1, 2
    )
    x, B, C = xbc.split([dim, group_states, group_states], dim=-1)
    out = chunk_scan_reference(
        x.unflatten(-1, (heads, head_dim)),
        dt,
        A,
        B.unflatten(-1, (groups, -1)),
        C.unflatten(-1, (groups, -1)),
        D,
        dt_bias,
        seq_idx,
    ).flatten(-2)
    gated = (out * functional.silu(z)).unflatten(-1, (groups, -1))
    normed = gated * torch.rsqrt(gated.square().mean(dim=-1, keepdim=True) + epsilon)
    out = normed.flatten(-2) * rmsnorm_weight
    return out if outproj_weight is None else functional.linear(out, outproj_weight)


@dataclass(frozen=True)
class Case:
    """One call of a kernel and what it is held against."""

    kernel: str
    label: str
    run: Callable[..., Tensor]
    """Called with the inputs by keyword."""
    reference: Callable[..., Tensor]
    """Called with the same inputs in float64."""
    inputs: Mapping[str, Tensor]
    """On the CPU, with the dtypes and strides that the kernel gets; the floating ones get gradients."""
    tolerance: float


def poison_free_memory(device: torch.device) -> None:
    """Makes the CUDA allocator's free memory NaN: its pool of small blocks (up to 1 MiB) and the other."""
    if device.type != "cuda":
        return
    torch.cuda.empty_cache()
    small = [torch.full((2**17,), math.nan, device=device) for _ in range(64)]
    large = [torch.full((2**24,), math.nan, device=device) for _ in range(16)]
    del small, large


def relative_error(got: Tensor, reference: Tensor) -> float:
    """max|got - reference| / max|reference|; infinity where `got` is not finite everywhere."""
    if not bool(torch.isfinite(got).all()):
        return math.inf
    return float((got.double() - reference).abs().max() / reference.abs().max())


def compare(case: Case, device: torch.device) -> dict[str, Any]:
    """Runs one case forward and backward and reports its worst output or gradient."""
    generator = torch.Generator().manual_seed(1)
    poison_free_memory(device)
    inputs = {name: tensor.to(device, copy=True) for name, tensor in case.inputs.items()}
    leaves = {name: t.requires_grad_() for name, t in inputs.items() if t.is_floating_point()}
    out = case.run(**inputs)
    upstream = torch.empty_like(out).copy_(torch.randn(out.shape, generator=generator))
    gradients = torch.autograd.grad(out, tuple(leaves.values()), upstream)

    exact = {
        name: tensor.detach().double().requires_grad_() if name in leaves else tensor
        for name, tensor in inputs.items()
    }
    expected = case.reference(**exact)
    expected_gradients = torch.autograd.grad(expected, [exact[name] for name in leaves], upstream.double())
    errors = [("output", relative_error(out.detach(), expected.detach()))]
    for name, got, wanted in zip(leaves, gradients, expected_gradients, strict=True):
        errors.append((f"gradient of {name}", relative_error(got, wanted)))
    quantity, error = max(errors, key=lambda entry: entry[1])
    result = {"kernel": case.kernel, "case": case.label, "quantity": quantity, "tolerance": case.tolerance}
    if error <= case.tolerance:
        return {**result, "error": error, "problem": None}
    if not math.isfinite(error):
        problem = f"{quantity} has elements that are not finite: left unwritten, or overflowed"
        return {**result, "error": None, "problem": problem}
    problem = f"{quantity} is off by {error:.1e} of its largest element (allowed: {case.tolerance:.1e})"
    return {**result, "error": error, "problem": problem}


def _random(shape: tuple[int, ...], seed: int, *, low: float | None = None, high: float = 1.0) -> Tensor:
    """Normal numbers, or uniform ones in [low, high); the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    if low is None:
        return torch.randn(shape, generator=generator)
    return low + (high - low) * torch.rand(shape, generator=generator)


def _documents(batch: int, length: int) -> Tensor:
    """seq_idx of packed rows: three documents, with borders at other places in each row."""
    borders = torch.tensor([[length // 3 + row, 2 * length // 3 - row] for row in range(batch)])
    return (torch.arange(length)[None, :, None] >= borders[:, None, :]).sum(dim=-1).to(torch.int32)


def causal_conv1d_cases() -> Iterator[Case]:
    """Every width, dtype, layout and activation that causal-conv1d instantiates kernels for."""
    from causal_conv1d import causal_conv1d_fn

    half_types = (torch.float16, torch.bfloat16)
    # Parameters kept in float32 beside half-precision activations have kernels of their own.
    dtypes = [(t, t) for t in (torch.float32, *half_types)] + [(t, torch.float32) for t in half_types]
    layouts = ("channel-first", "channel-last", "channel-last with seq_idx")
    # 1031 is odd, so no vector loads; both lengths are more than one block of threads covers in one turn.
    for (dtype, weight_dtype), layout, activation, width, length in itertools.product(
        dtypes, layouts, (None, "silu"), (2, 3, 4), (1031, 2056)
    ):
        batch, dim = 2, 64
        x = _random((batch, length, dim), 11).to(dtype).transpose(1, 2)
        inputs = {
            "x": x.contiguous() if layout == "channel-first" else x,
            "weight": _random((dim, width), 12).to(weight_dtype),
            "bias": _random((dim,), 13).to(weight_dtype),
        }
        if layout.endswith("seq_idx"):
            inputs["seq_idx"] = _documents(batch, length)
        # checks/gpu.py, KNOWN_DEFECTS: a thread takes 16 bytes, a block of 128 threads 2048, in one turn.
        short = 0 < length * dtype.itemsize % 2048 < 16 and layout == "channel-first" and activation
        yield Case(
            "causal_conv1d_fn, short last block" if short else "causal_conv1d_fn",
            f"{dtype}, weight {weight_dtype}, {layout}, {activation}, {width} by {length}",
            _with(causal_conv1d_fn, activation=activation),
            _with(causal_conv1d_reference, activation=activation),
            inputs,
            CONV_ROUNDINGS * UNIT_ROUNDOFF[dtype] + FLOAT32_FLOOR,
        )


def selective_scan_cases() -> Iterator[Case]:
    """Mamba's scan: with and without gate, one block and several, one group of B and C and two."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    dtypes = (torch.float32, torch.float16, torch.bfloat16)
    # A block covers at most 2048 steps; 2100 needs a second one, and fills neither.
    for dtype, gated, (length, groups) in itertools.product(dtypes, (False, True), ((256, 1), (2100, 2))):
        batch, dim, state = 2, 64, 16
        inputs = {
            "u": _random((batch, dim, length), 21).to(dtype),
            "delta": _random((batch, dim, length), 22, low=0.0, high=0.5).to(dtype),
            "A": _random((dim, state), 23, low=-1.0, high=-0.1),
            "B": _random((batch, groups, state, length), 24).to(dtype),
            "C": _random((batch, groups, state, length), 25).to(dtype),
            "D": _random((dim,), 26),
            "delta_bias": _random((dim,), 27, low=0.0, high=0.5),
        }
        if gated:
            inputs["z"] = _random((batch, dim, length), 28).to(dtype)
        yield Case(
            "selective_scan_fn",
            f"{dtype}, {'gated' if gated else 'not gated'}, length {length}, {groups} groups",
            _with(selective_scan_fn, delta_softplus=True),
            selective_scan_reference,
            inputs,
            SCAN_ROUNDINGS * UNIT_ROUNDOFF[dtype] + FLOAT32_FLOOR,
        )


def chunk_scan_cases() -> Iterator[Case]:
    """Mamba-2's chunked scan alone, and fused with convolution, norm and projection as training calls it."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined, mamba_split_conv1d_scan_combined

    # Nemotron-3-Nano's head, state and chunk sizes with fewer heads and groups; two chunks and a half.
    batch, length, heads, head_dim, groups, state, chunk, width = 2, 320, 8, 64, 2, 128, 128, 4
    dim, convolved = heads * head_dim, heads * head_dim + 2 * groups * state
    # float32, and the dtype that the model trains in: each costs Triton a minute of compiling and tuning.
    for dtype, packed in itertools.product((torch.float32, torch.bfloat16), (False, True)):
        label = f"{dtype}, {'seq_idx' if packed else 'no seq_idx'}"
        roundoff = TF32_UNIT_ROUNDOFF if dtype == torch.float32 else UNIT_ROUNDOFF[dtype]
        tolerance = CHUNKED_ROUNDINGS * roundoff + FLOAT32_FLOOR
        documents = {"seq_idx": _documents(batch, length)} if packed else {}
        scalars = {
            "A": _random((heads,), 31, low=-2.0, high=-0.1),
            "D": _random((heads,), 32).to(dtype),
            "dt_bias": _random((heads,), 33, low=-3.0, high=-1.0).to(dtype),
        }
        yield Case(
            "mamba_chunk_scan_combined",
            label,
            _with(mamba_chunk_scan_combined, chunk_size=chunk, dt_softplus=True),
            chunk_scan_reference,
            {
                "x": _random((batch, length, heads, head_dim), 34).to(dtype),
                "dt": _random((batch, length, heads), 35).to(dtype),
                "B": _random((batch, length, groups, state), 36).to(dtype),
                "C": _random((batch, length, groups, state), 37).to(dtype),
                **scalars,
                **documents,
            },
            tolerance,
        )
        fused = {
            "zxbcdt": _random((batch, length, dim + convolved + heads), 38).to(dtype),
            "conv1d_weight": _random((convolved, width), 39).to(dtype) / 2,
            "conv1d_bias": _random((convolved,), 40).to(dtype),
            "rmsnorm_weight": _random((dim,), 41).to(dtype),
            **scalars,
            **documents,
        }
        projection = {"outproj_weight": _random((dim, dim), 42).to(dtype) / math.sqrt(dim)}
        for projected, weights in (("projected", projection), ("not projected", {})):
            yield Case(
                "mamba_split_conv1d_scan_combined",
                f"{label}, {projected}",
                _with(
                    mamba_split_conv1d_scan_combined,
                    chunk_size=chunk,
                    activation="silu",
                    rmsnorm_eps=1e-5,
                    headdim=head_dim,
                    ngroups=groups,
                    norm_before_gate=False,
                ),
                _with(split_conv1d_scan_reference, head_dim=head_dim, groups=groups),
                {**fused, **weights},
                tolerance,
            )


def _with(function: Callable[..., Tensor], **settings: object) -> Callable[..., Tensor]:
    """`function` with these settings, taking its tensors by keyword."""
    return lambda **inputs: function(**inputs, **settings)


SUITES: dict[str, tuple[Callable[[], Iterator[Case]], ...]] = {
    "causal-conv1d": (causal_conv1d_cases,),
    "mamba-ssm": (selective_scan_cases, chunk_scan_cases),
}


def run_suite(cases: Callable[[], Iterator[Case]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Every case of one suite; what raises is a result too, for the other cases still say something."""
    kernel, label = cases.__name__.removesuffix("_cases"), "importing"
    try:
        for case in cases():
            kernel, label = case.kernel, case.label
            yield compare(case, device)
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        unmeasured = {"quantity": None, "error": None, "tolerance": None}
        yield {"kernel": kernel, "case": label, "problem": problem, **unmeasured}


def main(packages: list[str]) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    results = [r for package in packages for cases in SUITES[package] for r in run_suite(cases, device)]
    print(json.dumps({"device": torch.cuda.get_device_name(device), "results": results}))


if __name__ == "__main__":
    main(sys.argv[1:])

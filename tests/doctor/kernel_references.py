"""Holds the references of kernels.py against other ways to compute the same; run by a Python that has torch.

`python kernel_references.py FOLDER`, where FOLDER holds kernels.py. Prints one line of JSON, test → the
largest difference or what was found. Everything is float64 on the CPU.
"""

from __future__ import annotations

import json
import sys

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, sys.argv[1])
import kernels

# Sums of one order, so that the same inputs give the same bits.
torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)
CPU = torch.device("cpu")


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=GENERATOR, dtype=torch.float64)


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max())


def convolution() -> float:
    """Against torch's own grouped convolution."""
    x, weight, bias = random(2, 8, 37), random(8, 4), random(8)
    padded = functional.pad(x, (3, 0))
    expected = functional.silu(functional.conv1d(padded, weight[:, None, :], bias, groups=8))
    return difference(kernels.causal_conv1d_reference(x, weight, bias, activation="silu"), expected)


def convolution_of_documents() -> float:
    """Each document by itself, one after the other."""
    x, weight, bias = random(2, 8, 37), random(8, 4), random(8)
    documents = kernels._documents(2, 37)
    got = kernels.causal_conv1d_reference(x, weight, bias, documents)
    worst = 0.0
    for row in range(2):
        for document in documents[row].unique():
            here = documents[row] == document
            alone = kernels.causal_conv1d_reference(x[row : row + 1, :, here], weight, bias)
            worst = max(worst, difference(got[row : row + 1, :, here], alone))
    return worst


def scan() -> float:
    """The recurrence solved in closed form: every output as a sum over all inputs before it."""
    u, delta, B, C = random(2, 8, 21), random(2, 8, 21), random(2, 2, 4, 21), random(2, 2, 4, 21)
    A, D, bias, z = -random(8, 4).abs(), random(8), random(8), random(2, 8, 21)
    step = functional.softplus(delta + bias[:, None])
    passed = (step[:, :, None] * A[:, :, None]).cumsum(-1)
    until = torch.ones(21, 21).tril().bool()
    decay = torch.exp(passed[..., :, None] - passed[..., None, :]).masked_fill(~until, 0.0)
    B_of, C_of = B.repeat_interleave(4, 1), C.repeat_interleave(4, 1)
    expected = torch.einsum("bdnt,bdnts,bdns,bds->bdt", C_of, decay, B_of, step * u) + u * D[:, None]
    got = kernels.selective_scan_reference(u, delta, A, B, C, D, bias, z)
    return difference(got, expected * functional.silu(z))


def chunk_inputs() -> dict[str, Tensor]:
    return {
        "x": random(2, 24, 4, 3),
        "dt": random(2, 24, 4),
        "A": -random(4).abs(),
        "B": random(2, 24, 2, 5),
        "C": random(2, 24, 2, 5),
        "D": random(4),
        "dt_bias": random(4),
    }


def attention_form(documents: Tensor | None, x: Tensor, dt: Tensor, A: Tensor, **rest: Tensor) -> Tensor:
    """Mamba-2's dual form (Dao and Gu 2024): masked attention with decay."""
    step = functional.softplus(dt + rest["dt_bias"])
    passed = (step * A).cumsum(1).movedim(1, -1)
    decay = torch.exp(passed[..., :, None] - passed[..., None, :])
    visible = torch.ones(x.shape[1], x.shape[1]).tril().bool()[None]
    if documents is not None:
        visible = visible & (documents[:, :, None] == documents[:, None, :])
    B, C = (rest[name].repeat_interleave(2, dim=2) for name in "BC")
    scores = torch.einsum("bthn,bshn->bhts", C, B) * decay.masked_fill(~visible[:, None], 0.0)
    return torch.einsum("bhts,bshp->bthp", scores, step[..., None] * x) + x * rest["D"][:, None]


def chunk_scan() -> float:
    inputs = chunk_inputs()
    return difference(kernels.chunk_scan_reference(**inputs), attention_form(None, **inputs))


def chunk_scan_of_documents() -> float:
    inputs, documents = chunk_inputs(), kernels._documents(2, 24)
    got = kernels.chunk_scan_reference(**inputs, seq_idx=documents)
    return difference(got, attention_form(documents, **inputs))


def mixer() -> float:
    """The mixer put together from torch's convolution and RMSNorm, and the dual form."""
    heads, head_dim, groups, state, length = 4, 3, 2, 5, 24
    dim, shared = heads * head_dim, groups * state
    projected = random(2, length, 2 * dim + 2 * shared + heads)
    weight, bias, norm, out = (
        random(dim + 2 * shared, 4),
        random(dim + 2 * shared),
        random(dim),
        random(7, dim),
    )
    A, D, dt_bias = -random(heads).abs(), random(heads), random(heads)
    z, xbc, dt = projected[..., :dim], projected[..., dim : 2 * dim + 2 * shared], projected[..., -heads:]
    padded = functional.pad(xbc.transpose(1, 2), (3, 0))
    xbc = functional.silu(
        functional.conv1d(padded, weight[:, None], bias, groups=dim + 2 * shared)
    ).transpose(1, 2)
    scanned = attention_form(
        None,
        xbc[..., :dim].reshape(2, length, heads, head_dim),
        dt,
        A,
        B=xbc[..., dim : dim + shared].reshape(2, length, groups, state),
        C=xbc[..., dim + shared :].reshape(2, length, groups, state),
        D=D,
        dt_bias=dt_bias,
    ).reshape(2, length, dim)
    halves = (scanned * functional.silu(z)).reshape(2, length, groups, dim // groups)
    normed = functional.rms_norm(halves, (dim // groups,), eps=1e-5).reshape(2, length, dim) * norm
    got = kernels.split_conv1d_scan_reference(
        projected, weight, bias, dt_bias, A, D, norm, out, head_dim=head_dim, groups=groups
    )
    return difference(got, normed @ out.T)


def case(run: object) -> object:
    """A convolution case in which `run` stands where the kernel would."""
    inputs = {
        "x": random(2, 8, 37).bfloat16(),
        "weight": random(8, 4).bfloat16(),
        "bias": random(8).bfloat16(),
        "seq_idx": kernels._documents(2, 37),
    }
    tolerance = kernels.CONV_ROUNDINGS * kernels.UNIT_ROUNDOFF[torch.bfloat16] + kernels.FLOAT32_FLOOR
    return kernels.Case("conv", "test", run, kernels.causal_conv1d_reference, inputs, tolerance)


def in_float32(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """What the kernel does: float32 inside, one rounding of the result."""
    return kernels.causal_conv1d_reference(x.float(), weight.float(), bias.float(), seq_idx).to(x.dtype)


def with_wrong_gradient(x: Tensor) -> Tensor:
    """x, with a gradient that is one part in ten too large."""
    return x + 0.1 * (x - x.detach())


def unwritten(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
    """Leaves one element as the poison."""
    out = in_float32(x, weight, bias, seq_idx)
    return torch.where(torch.arange(37) == 36, torch.nan, out)


VERDICTS = {
    "a right kernel": in_float32,
    "a kernel that ignores documents": lambda x, weight, bias, seq_idx: in_float32(x, weight, bias, None),
    "a kernel with a wrong gradient": lambda x, **rest: in_float32(with_wrong_gradient(x), **rest),
    "a kernel that leaves an element unwritten": unwritten,
}

if __name__ == "__main__":
    checks = (convolution, convolution_of_documents, scan, chunk_scan, chunk_scan_of_documents, mixer)
    found: dict[str, object] = {check.__name__: check() for check in checks}
    for name, kernel in VERDICTS.items():
        found[name] = kernels.compare(case(kernel), CPU)["problem"]
    raising = kernels.run_suite(lambda: iter([case(lambda **inputs: inputs["nothing"])]), CPU)
    found["a kernel that raises"] = next(iter(raising))["problem"]
    print(json.dumps(found))

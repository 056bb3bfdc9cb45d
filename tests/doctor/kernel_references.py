"""Holds the references of doctor/kernels against other ways to compute the same; run where torch is.

`python kernel_references.py FOLDER`, where FOLDER is doctor/kernels. Prints one line of JSON, test → the
largest difference or what was found. Everything is float64 on the CPU.
"""

from __future__ import annotations

import importlib.util
import json
import sys

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, sys.argv[1])
import convolution_cases
import float64_references as references
import kernel_harness as harness

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
    return difference(references.causal_conv1d_reference(x, weight, bias, activation="silu"), expected)


def convolution_of_documents() -> float:
    """Each document by itself, one after the other."""
    x, weight, bias = random(2, 8, 37), random(8, 4), random(8)
    documents = harness.documents(2, 37)
    got = references.causal_conv1d_reference(x, weight, bias, documents)
    worst = 0.0
    for row in range(2):
        for document in documents[row].unique():
            here = documents[row] == document
            alone = references.causal_conv1d_reference(x[row : row + 1, :, here], weight, bias)
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
    got = references.selective_scan_reference(u, delta, A, B, C, D, bias, z)
    return difference(got, expected * functional.silu(z))


def convolution_in_two_parts() -> float:
    """A row that is cut in two, the second part from where the first ended."""
    x, weight, bias = random(2, 8, 37), random(8, 4), random(8)
    whole = references.causal_conv1d_reference(x, weight, bias, activation="silu")
    first, state = references.conv_with_states_reference(
        x[:, :, :20], weight, bias, torch.zeros_like(x[:, :, :3])
    )
    second, _ = references.conv_with_states_reference(x[:, :, 20:], weight, bias, state)
    return difference(torch.cat([first, second], dim=-1), whole)


def convolution_step_by_step() -> float:
    """A row element by element, with a state that is a ring, and with one that is shifted."""
    x, weight, bias = random(2, 8, 37), random(8, 4), random(8)
    whole = references.causal_conv1d_reference(x, weight, bias, activation="silu")
    worst = 0.0
    for size, is_ring in ((3, False), (9, False), (9, True)):
        # Two of four states belong to the row.
        state, rows = torch.zeros(4, 8, size, dtype=torch.float64), torch.tensor([3, 1])
        for at in range(37):
            seen = torch.full((2,), at) if is_ring else None
            out, state = references.conv_update_reference(
                x[:, :, at : at + 1], state, weight, bias, seen, rows
            )
            worst = max(worst, difference(out, whole[:, :, at : at + 1]))
        worst = max(worst, difference(state[[0, 2]], torch.zeros_like(state[:2])))
    return worst


def ends_of_sequences() -> float:
    x, borders = random(20, 3), torch.tensor([0, 2, 12, 20])
    states = references.conv_varlen_states_reference(x, borders, state_len=4)
    expected = torch.stack([functional.pad(x[0:2].T, (2, 0)), x[8:12].T, x[16:20].T])
    return difference(states, expected)


def complex_scan() -> float:
    """Half of the states, against a real scan of all of them as pairs: by its closed form."""
    u, delta, bias, D = random(2, 4, 15), random(2, 4, 15), random(4), random(4)
    A = torch.complex(-random(4, 3).abs(), random(4, 3))
    B, C = random(2, 2, 3, 30), random(2, 2, 3, 30)
    step = functional.softplus(delta + bias[:, None])
    passed = (step[:, :, None] * A[:, :, None]).cumsum(-1)
    until = torch.ones(15, 15).tril().bool()
    decay = torch.exp(passed[..., :, None] - passed[..., None, :]).masked_fill(~until, 0.0)
    B_of, C_of = (
        torch.complex(pairs[..., 0::2], pairs[..., 1::2]).repeat_interleave(2, 1) for pairs in (B, C)
    )
    entering = (step * u).to(A.dtype)
    one = torch.einsum("bdnt,bdnts,bdns,bds->bdt", C_of, decay, B_of, entering)
    other = torch.einsum("bdnt,bdnts,bdns,bds->bdt", C_of.conj(), decay.conj(), B_of.conj(), entering)
    got = references.selective_scan_reference(u, delta, A, B, C, D, bias)
    return difference(got, (one + other).real + u * D[:, None])


def constant_scan() -> float:
    """B and C that are the same at every step, as at every step."""
    u, delta, bias, D, A = random(2, 4, 15), random(2, 4, 15), random(4), random(4), -random(4, 3).abs()
    B, C = random(4, 3), random(4, 3)
    spread = [tensor[None, :, :, None].expand(2, -1, -1, 15) for tensor in (B, C)]
    got = references.selective_scan_reference(u, delta, A, B, C, D, bias)
    return difference(got, references.selective_scan_reference(u, delta, A, *spread, D, bias))


def inner_mixer() -> float:
    """Mamba-1's mixer, put together from torch's convolution and linear layers."""
    dim, rank, state, length = 6, 2, 3, 15
    xz, A, D, bias = random(2, 2 * dim, length), -random(dim, state).abs(), random(dim), random(dim)
    weight, conv_bias = random(dim, 1, 4), random(dim)
    x_proj, delta_proj, out_proj = random(rank + 2 * state, dim), random(dim, rank), random(5, dim)
    x, z = xz.chunk(2, dim=1)
    x = functional.silu(functional.conv1d(functional.pad(x, (3, 0)), weight, conv_bias, groups=dim))
    projected = functional.linear(x.transpose(1, 2), x_proj)
    delta = functional.linear(projected[..., :rank], delta_proj).transpose(1, 2)
    B, C = (part.transpose(1, 2)[:, None] for part in projected[..., rank:].chunk(2, dim=-1))
    scanned = references.selective_scan_reference(x, delta, A, B, C, D, bias, z)
    expected = scanned.transpose(1, 2) @ out_proj.T
    got = references.mamba_inner_reference(xz, weight, conv_bias, x_proj, delta_proj, out_proj, A, D, bias)
    return difference(got, expected)


def steps_of_a_scan() -> float:
    """The scan of a row, one update at a time: each head of one channel is a channel of the scan."""
    u, delta, z, bias, D = random(2, 4, 15), random(2, 4, 15), random(2, 4, 15), random(4), random(4)
    A, B, C = -random(4, 3).abs(), random(2, 2, 3, 15), random(2, 2, 3, 15)
    whole = references.selective_scan_reference(u, delta, A, B, C, D, bias, z)
    state, worst = torch.zeros(2, 4, 1, 3, dtype=torch.float64), 0.0
    for at in range(15):
        x, dt, gate = (tensor[:, :, at, None] for tensor in (u, delta, z))
        out, state = references.state_update_reference(
            state, x, dt, A[:, None], B[..., at], C[..., at], D[:, None], bias[:, None], gate
        )
        worst = max(worst, difference(out[..., 0], whole[:, :, at]))
    return worst


def norms() -> float:
    x, z, weight, bias = random(4, 12), random(4, 12), random(12), random(12)
    gate, worst = functional.silu(z), 0.0
    for centred in (False, True):

        def norm(x: Tensor, centred: bool = centred) -> Tensor:
            halves = x.unflatten(-1, (2, 6))
            normed = (
                functional.layer_norm(halves, (6,))
                if centred
                else functional.rms_norm(halves, (6,), eps=1e-5)
            )
            return normed.flatten(-2) * weight + bias

        for before, expected in ((False, norm(x * gate)), (True, norm(x) * gate)):
            got = references.norm_reference(
                x, weight, bias, z, group_size=6, norm_before_gate=before, centred=centred
            )
            worst = max(worst, difference(got, expected))
    return worst


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
    return difference(references.chunk_scan_reference(**inputs), attention_form(None, **inputs))


def chunk_scan_of_documents() -> float:
    inputs, documents = chunk_inputs(), harness.documents(2, 24)
    got = references.chunk_scan_reference(**inputs, seq_idx=documents)
    return difference(got, attention_form(documents, **inputs))


def chunk_scan_in_two_parts() -> float:
    """From a state to a state; and over documents in one row, each as by itself."""
    inputs, z = chunk_inputs(), random(2, 24, 4, 3)
    whole = references.chunk_scan_reference(**inputs) * functional.silu(z)
    state, outputs = torch.zeros(2, 4, 3, 5, dtype=torch.float64), []
    for part in (slice(0, 10), slice(10, 24)):
        cut = {name: value[:, part] if value.dim() > 1 else value for name, value in inputs.items()}
        out, state = references.chunk_scan_with_states_reference(**cut, z=z[:, part], initial_states=state)
        outputs.append(out)
    row = {name: value[:1] if value.dim() > 1 else value for name, value in inputs.items()}
    borders, index = torch.tensor([0, 10, 24]), torch.tensor([[0] * 10 + [1] * 14])
    packed, states = references.chunk_scan_varlen_reference(**row, seq_idx=index, cu_seqlens=borders)
    last = {name: value[:, 10:] if value.dim() > 1 else value for name, value in row.items()}
    _, alone = references.chunk_scan_with_states_reference(
        **last, z=z[:1, 10:], initial_states=torch.zeros(1, 4, 3, 5, dtype=torch.float64)
    )
    return max(
        difference(torch.cat(outputs, dim=1), whole),
        difference(packed, references.chunk_scan_reference(**row, seq_idx=index)),
        difference(states[1:], alone),
    )


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
    got = references.split_conv1d_scan_reference(
        projected, weight, bias, dt_bias, A, D, norm, out, head_dim=head_dim, groups=groups
    )
    return difference(got, normed @ out.T)


def case(run: object) -> object:
    """A convolution case in which `run` stands where the kernel would."""
    inputs = {
        "x": random(2, 8, 37).bfloat16(),
        "weight": random(8, 4).bfloat16(),
        "bias": random(8).bfloat16(),
        "seq_idx": harness.documents(2, 37),
    }
    return harness.Case(
        "conv",
        "test",
        run,
        references.causal_conv1d_reference,
        inputs,
        harness.tolerance(convolution_cases.ROUNDINGS, torch.bfloat16),
    )


def in_float32(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor | None) -> Tensor:
    """What the kernel does: float32 inside, one rounding of the result."""
    return references.causal_conv1d_reference(x.float(), weight.float(), bias.float(), seq_idx).to(x.dtype)


def with_wrong_gradient(x: Tensor) -> Tensor:
    """x, with a gradient that is one part in ten too large."""
    return x + 0.1 * (x - x.detach())


def unwritten(x: Tensor, weight: Tensor, bias: Tensor, seq_idx: Tensor) -> Tensor:
    """Leaves one element as the poison."""
    out = in_float32(x, weight, bias, seq_idx)
    return torch.where(torch.arange(37) == 36, torch.nan, out)


def configurations_left() -> list[dict[str, int]]:
    """Of a kernel with three configurations, the one with the fewest elements in flight."""
    import triton

    def config(rows: int, columns: int, stages: int) -> object:
        return triton.Config({"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": columns}, num_stages=stages)

    def kernel(x):  # type: ignore[no-untyped-def]
        pass

    harness.without_tuning()
    configs = [config(64, 64, 4), config(32, 64, 2), config(32, 32, 5)]
    tuned = triton.autotune(configs, key=["x"])(triton.jit(kernel))
    return [left.kwargs for left in tuned.configs]


def shared_out() -> tuple[list[str], list[tuple[str, str]]]:
    """All suites, and each with each dtype that a process runs it in."""
    specification = importlib.util.spec_from_file_location("entry", f"{sys.argv[1]}/__main__.py")
    assert specification is not None
    assert specification.loader is not None
    entry = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(entry)
    suites = [suite for package in entry.SUITES.values() for suite in package]
    processes = entry.shared_out(suites, entry.DTYPES)
    return suites, [(suite, dtype) for suite, dtypes in processes for dtype in dtypes]


VERDICTS = {
    "a right kernel": in_float32,
    "a kernel that ignores documents": lambda x, weight, bias, seq_idx: in_float32(x, weight, bias, None),
    "a kernel with a wrong gradient": lambda x, **rest: in_float32(with_wrong_gradient(x), **rest),
    "a kernel that leaves an element unwritten": unwritten,
}

if __name__ == "__main__":
    checks = (
        convolution,
        convolution_of_documents,
        convolution_in_two_parts,
        convolution_step_by_step,
        ends_of_sequences,
        scan,
        complex_scan,
        constant_scan,
        inner_mixer,
        steps_of_a_scan,
        norms,
        chunk_scan,
        chunk_scan_of_documents,
        chunk_scan_in_two_parts,
        mixer,
    )
    found: dict[str, object] = {check.__name__: check() for check in checks}
    for name, kernel in VERDICTS.items():
        found[name] = harness.compare(case(kernel), CPU)["problem"]
    raising = harness.run_cases("conv", lambda: iter([case(lambda **inputs: inputs["nothing"])]), CPU)
    found["a kernel that raises"] = next(iter(raising))["problem"]
    found["configurations left"] = configurations_left()
    found["suites"], found["shared out"] = shared_out()
    print(json.dumps(found))

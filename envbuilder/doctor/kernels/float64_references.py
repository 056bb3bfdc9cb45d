"""What the kernels should compute, written for reading: plain sums and steps, in whatever dtype comes in."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn import functional


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Depthwise causal convolution of x (batch, dim, length) with weight (dim, width).

    Taps that reach into another document (another seq_idx, shape (batch, length)) count as zero; those that
    reach before x, as initial_states (batch, dim, width - 1), or zero.
    """
    width, length = weight.shape[1], x.shape[2]
    before = x.new_zeros(*x.shape[:2], width - 1) if initial_states is None else initial_states
    padded = torch.cat([before, x], dim=-1)
    out = torch.zeros_like(x) + bias[:, None]
    for tap in range(width):
        term = padded[:, :, tap : tap + length] * weight[:, tap, None]
        if seq_idx is not None:
            documents = functional.pad(seq_idx, (width - 1, 0), value=-1)[:, tap : tap + length]
            term = term * (documents == seq_idx)[:, None, :]
        out = out + term
    return functional.silu(out) if activation == "silu" else out


def conv_with_states_reference(
    x: Tensor, weight: Tensor, bias: Tensor, initial_states: Tensor
) -> tuple[Tensor, Tensor]:
    """The convolution with SiLU, and the last width - 1 elements, with which the next call begins."""
    out = causal_conv1d_reference(x, weight, bias, initial_states=initial_states, activation="silu")
    return out, x[:, :, 1 - weight.shape[1] :]


def conv_update_reference(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The next elements x (batch, dim, length), with SiLU, and the conv_state (…, dim, state length) after.

    The state holds the latest elements, the newest last; with cache_seqlens (batch), how many elements there
    were before, it is a ring instead. conv_state_indices (batch) says which of the states belong to x.
    """
    rows = torch.arange(len(x)) if conv_state_indices is None else conv_state_indices.cpu().long()
    length, size, window = x.shape[2], conv_state.shape[2], weight.shape[1] - 1
    seen = torch.zeros(len(x), dtype=torch.long) if cache_seqlens is None else cache_seqlens.cpu().long()
    added = 0 if cache_seqlens is None else length  # by how much the oldest element's place moves on
    after, before = conv_state.clone(), []
    for row, elements, at in zip(rows.tolist(), x, seen, strict=True):
        oldest_first = conv_state[row][:, (at + torch.arange(size)) % size]
        before.append(oldest_first[:, size - window :])
        latest = torch.cat([oldest_first, elements], dim=-1)[:, -size:]
        after[row][:, (at + added + torch.arange(size)) % size] = latest
    begin = torch.stack(before)
    return causal_conv1d_reference(x, weight, bias, initial_states=begin, activation="silu"), after


def conv_varlen_states_reference(x: Tensor, cu_seqlens: Tensor, *, state_len: int) -> Tensor:
    """The last state_len elements of each sequence of x (total, dim), with zeros before shorter ones."""
    ends = cu_seqlens.tolist()
    last = [x[max(begin, end - state_len) : end].T for begin, end in itertools.pairwise(ends)]
    return torch.stack([functional.pad(tail, (state_len - tail.shape[1], 0)) for tail in last])


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

    u, delta, z (batch, dim, length); A (dim, state); B, C (batch, groups, state, length), or (dim, state)
    where they are the same at every step; D, delta_bias (dim). Where A is complex, B and C are too, those of
    every step as (batch, groups, state, 2·length) with real and imaginary part in turn; the output is twice
    the real part, for states come in conjugate pairs.
    """
    B, C = (_of_every_step(tensor, u, is_complex=A.is_complex()) for tensor in (B, C))
    delta = functional.softplus(delta + delta_bias[:, None])
    decay = torch.exp(delta[:, :, None] * A[:, :, None])
    entering = (delta * u)[:, :, None] * B
    state = torch.zeros_like(decay[..., 0])
    states = []
    # unbind, not an index: the gradient of every index would be as large as the whole.
    for decay_now, entering_now in zip(decay.unbind(-1), entering.unbind(-1), strict=True):
        state = decay_now * state + entering_now
        states.append(state)
    out = (torch.stack(states, dim=-1) * C).sum(dim=2)
    out = (2 * out.real if A.is_complex() else out) + u * D[:, None]
    return out if z is None else out * functional.silu(z)


def _of_every_step(tensor: Tensor, u: Tensor, *, is_complex: bool) -> Tensor:
    """B or C as (batch or 1, dim, state, length or 1)."""
    if tensor.dim() == 2:
        return tensor[None, :, :, None]
    if is_complex:
        tensor = torch.view_as_complex(tensor.unflatten(-1, (-1, 2)))
    return tensor.repeat_interleave(u.shape[1] // tensor.shape[1], dim=1)


def mamba_inner_reference(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    A: Tensor,
    D: Tensor,
    delta_bias: Tensor,
) -> Tensor:
    """The whole Mamba-1 mixer after its input projection. xz (batch, 2·dim, length)."""
    x, z = xz.chunk(2, dim=1)
    x = causal_conv1d_reference(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    rank, state = delta_proj_weight.shape[1], A.shape[1]
    delta, B, C = (x_proj_weight @ x).split([rank, state, state], dim=1)
    scanned = selective_scan_reference(
        x, delta_proj_weight @ delta, A, B[:, None], C[:, None], D, delta_bias, z
    )
    return functional.linear(scanned.transpose(1, 2), out_proj_weight)


def state_update_reference(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the scan, and the state after it.

    state (batch, heads, dim, state); x, dt, z (batch, heads, dim); A (heads, dim, state);
    B, C (batch, groups, state); D, dt_bias (heads, dim).
    """
    repeats = x.shape[1] // B.shape[1]
    B, C = B.repeat_interleave(repeats, dim=1), C.repeat_interleave(repeats, dim=1)
    dt = functional.softplus(dt + dt_bias)
    state = torch.exp(dt[..., None] * A) * state + (dt * x)[..., None] * B[:, :, None]
    out = (state * C[:, :, None]).sum(dim=-1) + x * D
    return (out if z is None else out * functional.silu(z)), state


def norm_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    z: Tensor | None = None,
    *,
    group_size: int,
    norm_before_gate: bool,
    centred: bool,
    epsilon: float = 1e-5,
) -> Tensor:
    """LayerNorm (centred) or RMSNorm over each group of channels, gated by z after or before it."""
    if z is not None and not norm_before_gate:
        x = x * functional.silu(z)
    groups = x.unflatten(-1, (-1, group_size))
    if centred:
        groups = groups - groups.mean(dim=-1, keepdim=True)
    normed = (groups * torch.rsqrt(groups.square().mean(dim=-1, keepdim=True) + epsilon)).flatten(-2)
    out = normed * weight + (0 if bias is None else bias)
    return out * functional.silu(z) if z is not None and norm_before_gate else out


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
    return _chunk_scan(x, dt, A, B, C, D, dt_bias, seq_idx=seq_idx)[0]


def chunk_scan_with_states_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    z: Tensor,
    initial_states: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence from a given state (batch, heads, head dim, state), gated, and the state at its end."""
    out, state = _chunk_scan(x, dt, A, B, C, D, dt_bias, initial_states=initial_states)
    return out * functional.silu(z), state


def chunk_scan_varlen_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    seq_idx: Tensor,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """The recurrence over documents in one row, and the state at the end of each."""
    borders = cu_seqlens.tolist()
    parts = [
        _chunk_scan(x[:, part], dt[:, part], A, B[:, part], C[:, part], D, dt_bias)
        for part in itertools.starmap(slice, itertools.pairwise(borders))
    ]
    return torch.cat([out for out, _ in parts], dim=1), torch.cat([state for _, state in parts])


def _chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    *,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    repeats = x.shape[2] // B.shape[2]
    B, C = B.repeat_interleave(repeats, dim=2), C.repeat_interleave(repeats, dim=2)
    dt = functional.softplus(dt + dt_bias)
    decay = torch.exp(dt * A)
    if seq_idx is not None:
        begins = functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))
        decay = decay.masked_fill(begins[:, :, None], 0.0)
    state = x.new_zeros(x.shape[0], x.shape[2], x.shape[3], B.shape[3])
    state = state if initial_states is None else initial_states
    outputs = []
    steps = (decay, dt[..., None] * x, B, C)
    for decay_now, x_now, B_now, C_now in zip(*(tensor.unbind(1) for tensor in steps), strict=True):
        state = decay_now[:, :, None, None] * state + x_now[..., None] * B_now[:, :, None]
        outputs.append((state * C_now[:, :, None]).sum(dim=-1))
    return torch.stack(outputs, dim=1) + x * D[:, None], state


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
    xbc = causal_conv1d_reference(
        xbc.transpose(1, 2), conv1d_weight, conv1d_bias, seq_idx, activation="silu"
    ).transpose(1, 2)
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
    out = norm_reference(
        out,
        rmsnorm_weight,
        z=z,
        group_size=dim // groups,
        norm_before_gate=False,
        centred=False,
        epsilon=epsilon,
    )
    return out if outproj_weight is None else functional.linear(out, outproj_weight)

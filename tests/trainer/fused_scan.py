"""A plain-torch stand-in for mamba_ssm's fused training kernel: its signature, one time step after another.

Written from the recurrence (arXiv:2405.21060, section 2): h_t = exp(dt_t A) h_(t-1) + dt_t B_t x_t,
y_t = C_t h_t + D x_t, after a causal convolution, before a gated norm. Where seq_idx changes a document
begins: convolution and state start from nothing. In fp32 or float64, so it is a reference too.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: Tensor | None = None,
    outproj_bias: Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
) -> Tensor:
    assert initial_states is None
    assert seq_idx is None or (seq_idx.dtype == torch.int32 and seq_idx.is_contiguous())
    assert not return_final_states
    assert not norm_before_gate
    assert activation == "silu"
    assert headdim is not None
    assert rmsnorm_weight is not None
    heads = dt_bias.shape[0]
    inner = heads * headdim
    states = (conv1d_weight.shape[0] - inner) // (2 * ngroups)
    batch, length, _ = zxbcdt.shape
    exact = torch.promote_types(zxbcdt.dtype, torch.float32)
    gate, convolved, dt = torch.split(zxbcdt.to(exact), [inner, conv1d_weight.shape[0], heads], dim=-1)
    numbers = zxbcdt.new_zeros(batch, length, dtype=torch.int32) if seq_idx is None else seq_idx

    taps = conv1d_weight.to(exact)
    total = convolved * taps[:, -1]
    for back in range(1, min(taps.shape[1], length)):
        earlier = convolved[:, :-back] * (numbers[:, back:] == numbers[:, :-back])[:, :, None]
        total = total + F.pad(earlier, (0, 0, back, 0)) * taps[:, -1 - back]
    convolved = F.silu(total if conv1d_bias is None else total + conv1d_bias)
    x, b, c = torch.split(convolved, [inner, ngroups * states, ngroups * states], dim=-1)
    x = x.view(batch, length, heads, headdim)
    b, c = (
        part.reshape(batch, length, ngroups, states).repeat_interleave(heads // ngroups, dim=2)
        for part in (b, c)
    )
    dt = F.softplus(dt + dt_bias.to(exact)).clamp(*dt_limit)
    begins = F.pad(numbers[:, 1:] != numbers[:, :-1], (1, 0))

    state = x.new_zeros(batch, heads, headdim, states)
    outputs = []
    for t in range(length):
        decay = torch.exp(dt[:, t] * A).masked_fill(begins[:, t, None], 0.0)[:, :, None, None]
        state = decay * state + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None, :]
        outputs.append((state * c[:, t, :, None, :]).sum(-1) + D.to(exact)[:, None] * x[:, t])
    y = torch.stack(outputs, dim=1).reshape(batch, length, inner) * F.silu(gate)

    grouped = y.view(batch, length, ngroups, inner // ngroups)
    normed = grouped * torch.rsqrt(grouped.pow(2).mean(-1, keepdim=True) + rmsnorm_eps)
    out = (rmsnorm_weight.to(exact) * normed.reshape(batch, length, inner)).to(zxbcdt.dtype)
    return out if outproj_weight is None else F.linear(out, outproj_weight, outproj_bias)

"""The mamba mixer of Nemotron-H as it must run for LoRA.

Three things in transformers' mixer are set right (read in 5.3.0, 5.17.0 and 5.23.0):

- In training the fused kernel is handed `out_proj.weight` itself, so whatever wraps `out_proj` is
  bypassed and a LoRA on it gets no gradient. The kernel also takes `outproj_weight=None` and then returns
  the normed scan output; `out_proj` is called on that afterwards, as a module. That also saves the
  gradient of a frozen weight.
- dt is clamped to (time_step_min, inf), the models were trained with `time_step_limit`, (0, inf)
  (huggingface/transformers#48989).
- The reference path drops `seq_idx` (or refuses it, later), so packed documents would reach into each
  other. Here it runs once for each document.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def prepare_mixer(
    mixer: nn.Module, time_step_limit: tuple[float, float], fused_scan: Callable[..., Any] | None
) -> None:
    """Corrects one mixer in place. Without a fused kernel the reference path stays: it calls `out_proj`."""
    mixer.time_step_limit = time_step_limit  # type: ignore[assignment]
    if fused_scan is None:
        mixer.forward = functools.partial(_reference_forward, mixer.forward)
    else:
        mixer.forward = functools.partial(_fused_forward, mixer, mixer.forward, fused_scan)


def _reference_forward(
    original: Callable[..., Tensor], hidden_states: Tensor, *, seq_idx: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """[batch, length, hidden] → the same; with `seq_idx` every run of equal numbers is a pass of its own."""
    if seq_idx is None:
        return original(hidden_states, **kwargs)
    return torch.cat(
        [
            torch.cat([original(document) for document in _documents(row, numbers)], dim=1)
            for row, numbers in zip(torch.split(hidden_states, 1), seq_idx, strict=True)
        ]
    )


def _documents(row: Tensor, numbers: Tensor) -> tuple[Tensor, ...]:
    lengths: list[int] = torch.unique_consecutive(numbers, return_counts=True)[1].tolist()
    return torch.split(row, lengths, dim=1)


def _fused_forward(
    mixer: Any,
    original: Callable[..., Tensor],
    fused_scan: Callable[..., Tensor],
    hidden_states: Tensor,
    cache_params: object | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The pass over whole sequences, [batch, length, hidden] → the same; with a cache the original one."""
    if cache_params is not None:
        return original(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
    if attention_mask is not None:
        hidden_states = hidden_states * attention_mask[:, :, None].to(hidden_states.dtype)
    scanned = fused_scan(
        mixer.in_proj(hidden_states),
        mixer.conv1d.weight.squeeze(1),
        mixer.conv1d.bias,
        mixer.dt_bias,
        -torch.exp(mixer.A_log.float()),
        D=mixer.D,
        chunk_size=mixer.chunk_size,
        seq_idx=kwargs.get("seq_idx"),
        dt_limit=mixer.time_step_limit,
        activation=mixer.activation,
        rmsnorm_weight=mixer.norm.weight,
        rmsnorm_eps=mixer.norm.variance_epsilon,
        outproj_weight=None,
        outproj_bias=None,
        headdim=mixer.head_dim,
        ngroups=mixer.n_groups,
        norm_before_gate=False,
        return_final_states=False,
    )
    projected: Tensor = mixer.out_proj(scanned)
    return projected

"""Optimizer and learning rate. The rate is a function of the step alone, so it has no state to save."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trainer.config import LrSchedulerSection, OptimizerSection

OPTIMIZERS: dict[str, type[torch.optim.Adam]] = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}


def make_optimizer(parameters: Iterable[nn.Parameter], section: OptimizerSection) -> torch.optim.Adam:
    """Adam or AdamW over the adapters, in one kernel for all."""
    return OPTIMIZERS[section.name](
        parameters,
        lr=section.lr,
        betas=section.betas,
        eps=section.eps,
        weight_decay=section.weight_decay,
        fused=True,
    )


def update(optimizer: torch.optim.Adam, rate: float, norm: Tensor) -> None:
    """Takes the step at this learning rate; changes nothing if the gradient's norm is no finite number.

    That is decided on the device, by the argument that gradient scalers use for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = rate
    optimizer.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
    optimizer.step()


def learning_rate(step: int, steps: int, *, peak: float, section: LrSchedulerSection) -> float:
    """The rate for `step` (from 1) of `steps`: up to `peak` in the warm-up, then down to `min_lr`."""
    warmup = min(1000, steps // 10) if section.lr_warmup_steps is None else section.lr_warmup_steps
    if step <= warmup:
        return section.init_lr + (peak - section.init_lr) * step / warmup
    if section.lr_decay_style == "constant":
        return peak
    done = (step - warmup) / max(1, steps - warmup)
    left = (1 + math.cos(math.pi * done)) / 2 if section.lr_decay_style == "cosine" else 1 - done
    return section.min_lr + (peak - section.min_lr) * left

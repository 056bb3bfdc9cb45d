"""The learning rate, step by step."""

from __future__ import annotations

import pytest
import torch

from trainer.config import LrSchedulerSection, OptimizerSection
from trainer.schedule import learning_rate, make_optimizer


@pytest.mark.parametrize(
    ("style", "expected"),
    [
        ("constant", [0.5, 1.0, 1.0, 1.0, 1.0]),
        ("linear", [0.5, 1.0, 0.7, 0.4, 0.1]),
        ("cosine", [0.5, 1.0, 0.775, 0.325, 0.1]),
    ],
)
def test_warm_up_then_decay_to_the_minimum(style: str, expected: list[float]) -> None:
    section = LrSchedulerSection.model_validate(
        {"lr_decay_style": style, "lr_warmup_steps": 2, "min_lr": 0.1}
    )
    rates = [learning_rate(step, 5, peak=1.0, section=section) for step in range(1, 6)]
    assert rates == pytest.approx(expected)


def test_the_optimizer_is_the_one_named() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    for name, kind in (("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)):
        section = OptimizerSection.model_validate(
            {"name": name, "lr": 0.1, "weight_decay": 0.2, "betas": [0.8, 0.9]}
        )
        optimizer = make_optimizer([weight], section)
        assert type(optimizer) is kind
        assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
        assert optimizer.param_groups[0]["weight_decay"] == 0.2

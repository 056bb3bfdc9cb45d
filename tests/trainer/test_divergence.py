"""A loss that rose and stays up ends the run; noise never does."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from trainer.checkpoint import committed
from trainer.config import DivergenceSection
from trainer.divergence import Divergence

from .conftest import RunTrainer


def test_noise_single_spikes_and_a_curve_that_falls_do_not_fire() -> None:
    random.seed(1)
    for begin, end in ((12.0, 0.01), (2.0, 1.5)):
        guard = Divergence(DivergenceSection())
        for step in range(3000):
            loss = end + (begin - end) * 0.99**step
            loss *= random.lognormvariate(0, 0.5)
            loss += 20.0 * (step % 97 == 0)
            guard.saw(loss)
            assert not guard.diverged


def test_a_rise_that_stays_fires_after_its_steps_and_the_level_is_kept() -> None:
    guard = Divergence(DivergenceSection(steps=5))
    for _ in range(10):
        guard.saw(1.0)
    for count in range(1, 6):
        assert not guard.diverged
        guard.saw(3.5)
        assert guard.above == count
    assert guard.diverged
    assert guard.level == 1.0
    assert Divergence(DivergenceSection(steps=5), list(guard.recent), guard.above).diverged


def test_switched_off_it_never_fires() -> None:
    guard = Divergence(DivergenceSection(rise=None, steps=2))
    for loss in (1.0, 1.0, 1.0, 9.0, 9.0, 9.0, 9.0):
        guard.saw(loss)
    assert not guard.diverged


def test_a_run_that_diverges_keeps_a_checkpoint_from_before(
    run_trainer: RunTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:

    def rate(step: int, *_: object, **__: object) -> float:
        return 0.03 if step <= 15 else 20.0

    monkeypatch.setattr("trainer.step.learning_rate", rate)
    code, outcome = run_trainer(
        "step_scheduler.max_steps=40",
        "step_scheduler.ckpt_every_steps=1",
        "divergence.steps=3",
        "divergence.rise=1",
    )
    assert code == 10, outcome
    assert "Training diverges: for 3 steps" in outcome["error"]["message"]
    assert "optimizer.lr=" in outcome["error"]["remedy"]
    newest = int(committed(tmp_path / "run/checkpoints")[0].name[5:])
    assert newest == outcome["steps"] - 3
    assert f"from step {newest}" in outcome["error"]["remedy"]

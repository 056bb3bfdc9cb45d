"""Packed documents on a GPU's own kernels: do they train as they do alone, and does none reach another?

    python -m benchmarks.packing                  blocks of the true size, in bf16
    python -m benchmarks.packing --tiny           a tiny model on the CPU: tries the script

The suite shows both on the CPU in float64 (tests/trainer/test_packing.py). Here rows of several documents go
through the compiled kernels, and each document alone. Given are how far loss and gradient (of the embedding)
are apart, beside what they would be if the documents did see one another, and whether another document in the
middle of a row changes any bit before or after it. Exits with 1 where one of them is wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.__main__ import OFFLINE

os.environ.update(OFFLINE)
warnings.simplefilter("ignore")

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from trainer.data import Batch, Example, collate  # noqa: E402
from trainer.kernels import find_mamba_kernels  # noqa: E402
from trainer.reading import read_config  # noqa: E402

CONFIGS = Path(__file__).parent.parent / "recipes/train"
LENGTHS = ((700, 3, 1345), (2048,), (1, 129, 1900, 17), (256, 256, 512, 1024))
"""Of the documents in each row: shorter than the convolution, longer than a chunk of the scan, as long."""
LARGEST = 2e-2
"""The relative difference that another order of sums in bf16 makes at most."""


def documents(vocabulary: int, scale: int) -> list[tuple[Example, ...]]:
    """Random tokens, all of them trained; `scale` divides the lengths."""
    chance = random.Random(5)
    rows = []
    for row in LENGTHS:
        ids = [[chance.randrange(vocabulary) for _ in range(-(-length // scale))] for length in row]
        rows.append(tuple(Example(own, own, line) for line, own in enumerate(ids, start=1)))
    return rows


def together(row: tuple[Example, ...]) -> Batch:
    """A packed row."""
    return collate([row], pad=0, row_length=sum(len(example.input_ids) for example in row))


class Model:
    """Blocks of attention and mamba with random weights, as the trainer prepares them."""

    def __init__(self, config: Any) -> None:
        kernels = find_mamba_kernels(config.device)
        from trainer.model import TrainingModel, empty_model, fill, model_config

        self.device = torch.device(config.device)
        causal_lm = empty_model(config.model, model_config(config.model), kernels, self.device)
        fill(causal_lm, config.model, self.device, seed=config.seed)
        causal_lm.requires_grad_(False)
        self.causal_lm: Any = causal_lm
        self.model = TrainingModel(causal_lm)
        self.model.train()
        self.embedding: Tensor = causal_lm.get_input_embeddings().weight.requires_grad_()
        self.is_fused = kernels.fused_scan is not None

    def loss_and_gradient(self, batches: Sequence[Batch]) -> tuple[float, Tensor]:
        """The summed loss of the batches, and its gradient with regard to the embedding."""
        self.embedding.grad, total = None, 0.0
        for batch in batches:
            moved = batch.to(self.device)
            loss = self.model(moved.input_ids, moved.labels, **moved.layout)
            loss.backward()
            total += loss.item()
        assert self.embedding.grad is not None
        return total, self.embedding.grad.float()

    @torch.no_grad()
    def states(self, row: tuple[Example, ...]) -> Tensor:
        """What the last block gives for each place of the row."""
        batch = together(row).to(self.device)
        found: Tensor = self.causal_lm.model(
            input_ids=batch.input_ids, use_cache=False, **batch.layout
        ).last_hidden_state[0]
        return found


def apart(found: Tensor, expected: Tensor) -> float:
    """‖found - expected‖ / ‖expected‖."""
    return float((found - expected).norm() / expected.norm())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    file = CONFIGS / ("quickstart.yaml" if given.tiny else "nemotron3-nano-true-size.yaml")
    config = read_config(file, ["model.config.hybrid_override_pattern=M*M*"])
    model = Model(config)
    vocabulary = 256 if given.tiny else config.model.config["vocab_size"]
    rows = documents(vocabulary, scale=32 if given.tiny else 1)
    packed = [together(row) for row in rows]
    alone = [collate([(example,)], pad=0) for row in rows for example in row]

    loss, gradient = model.loss_and_gradient(alone)
    packed_loss, packed_gradient = model.loss_and_gradient(packed)
    blind = [Batch(b.input_ids, b.labels, b.tokens, b.trained_tokens, b.lines) for b in packed]
    leaking_loss, leaking_gradient = model.loss_and_gradient(blind)
    kernels = "the compiled kernels" if model.is_fused else "the reference"
    print(f"{config.model.dtype} on {model.device.type}, mamba on {kernels}; {len(alone)} documents")
    print(f"loss: alone {loss:.2f}, packed {packed_loss:.2f}, if they saw one another {leaking_loss:.2f}")
    found, leak = apart(packed_gradient, gradient), apart(leaking_gradient, gradient)
    print(f"gradient, relative difference to alone: packed {found:.1e}, if they saw one another {leak:.1e}")

    first, middle, last = rows[0]
    other = Example([(token + 1) % vocabulary for token in middle.input_ids], middle.labels, middle.line)
    same = (model.states(rows[0]) == model.states((first, other, last))).all(dim=-1)
    begin, end = len(first.input_ids), len(first.input_ids) + len(middle.input_ids)
    changed = int((~same[:begin]).sum() + (~same[end:]).sum())
    print(
        f"with another document in the middle: {changed} of {len(same) - (end - begin)} other places differ"
    )
    print(f"  and {int((~same[begin:end]).sum())} of its own {end - begin}")
    is_right = found < LARGEST and found < leak / 2 and changed == 0
    print("right" if is_right else "WRONG")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())

"""The same random tokens in the same order as our trainer reads them, for its peers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from trainer.config import Config
from trainer.data import Stream, collate, open_dataset
from trainer.tokenizer import open_tokenizer


def batches(config: Config, base_config: Any) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Step, from 1 → token ids and labels on the CPU, [batch, length]; a label is its own place's token."""
    tokenizer = open_tokenizer(config.model)
    data = open_dataset(config.dataset, tokenizer, vocab_size=base_config.vocab_size, seed=config.seed)
    stream = Stream(data, config.seed, config.dataset.shuffle)
    size = config.step_scheduler.global_batch_size

    def batch(step: int) -> tuple[Tensor, Tensor]:
        rows = [stream[place] for place in range((step - 1) * size, step * size)]
        collated = collate(rows, pad=tokenizer.pad_token_id, row_length=data.row_length)
        return collated.input_ids, collated.labels

    return batch

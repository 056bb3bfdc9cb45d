"""Examples from a chat JSONL file (or random tokens), their order, and padded batches.

The order is a stream: a permutation of the examples for each epoch, drawn from seed and epoch alone. Step
n takes the next `global_batch_size` examples of it whatever the number of processes is, so the position
in the stream is all that a checkpoint needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.chat import IGNORED, InexactTemplate, encode
from trainer.config import DatasetSection
from trainer.conversations import read_messages
from trainer.errors import DataError

SHOWN_FAULTS = 10
LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this: grouped matrix products in bf16 want it."""


@dataclass(frozen=True)
class Example:
    """One sequence: token ids, and labels that are the same ids or IGNORED."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    line: int
    """Where it stands in its file, from 1."""


@dataclass(frozen=True)
class Batch:
    """Sequences padded on the right to one length. Shape of both tensors: [sequences, length], int64."""

    input_ids: Tensor
    labels: Tensor
    tokens: int
    """Without padding."""
    trained_tokens: int
    lines: tuple[int, ...]

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        ids, labels = (part.to(device, non_blocking=True) for part in (self.input_ids, self.labels))
        return Batch(ids, labels, self.tokens, self.trained_tokens, self.lines)


@dataclass(frozen=True)
class Dataset:
    """All examples of one file, with what was cut or left out and where."""

    name: str
    examples: tuple[Example, ...]
    truncated: tuple[int, ...] = ()
    """Lines of examples that were cut to seq_length."""
    dropped: tuple[int, ...] = ()
    """Lines of examples that were left out: longer than seq_length, or nothing trained within it."""

    def figures(self) -> dict[str, object]:
        """What the run's summary shows."""
        tokens = sum(len(example.input_ids) for example in self.examples)
        trained = sum(trained_tokens(example) for example in self.examples)
        return {
            "name": self.name,
            "examples": len(self.examples),
            "tokens": tokens,
            "trained_tokens": trained,
            "trained_share": round(trained / tokens, 4),
            "truncated": len(self.truncated),
            "truncated_lines": list(self.truncated[:SHOWN_FAULTS]),
            "dropped": len(self.dropped),
            "dropped_lines": list(self.dropped[:SHOWN_FAULTS]),
        }


def trained_tokens(example: Example) -> int:
    """How many tokens of the example are predicted: the first one never is."""
    return sum(label != IGNORED for label in example.labels[1:])


def open_dataset(section: DatasetSection, tokenizer: Any, *, vocab_size: int, seed: int) -> Dataset:
    """The examples that `section` names. Raises DataError with the line and reason of every fault."""
    if section.kind == "synthetic":
        return _synthetic(section, vocab_size=vocab_size, seed=seed)
    assert section.path_or_dataset_id is not None
    return _read_chat(section.path_or_dataset_id, section, tokenizer)


def _synthetic(section: DatasetSection, *, vocab_size: int, seed: int) -> Dataset:
    generator = torch.Generator().manual_seed(seed)
    shape = (section.examples, section.seq_length)
    rows = torch.randint(vocab_size, shape, generator=generator).tolist()
    return Dataset("synthetic", tuple(Example(row, row, line) for line, row in enumerate(rows, start=1)))


def _read_chat(file: Path, section: DatasetSection, tokenizer: Any) -> Dataset:
    try:
        lines = file.read_bytes().splitlines()
    except OSError as problem:
        raise DataError(
            f"The data file can't be read: {problem.strerror}",
            remedy=f"ls -l {file}",
            context={"file": file},
        ) from problem
    examples, faults, truncated, dropped = [], [], [], []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            input_ids, labels = encode(read_messages(line), tokenizer)
        except (ValueError, InexactTemplate) as problem:
            faults.append(f"line {number}: {problem}")
            continue
        too_long = len(input_ids) > section.seq_length
        example = Example(input_ids[: section.seq_length], labels[: section.seq_length], number)
        if (too_long and section.overlong == "drop") or not trained_tokens(example):
            dropped.append(number)
            continue
        if too_long:
            truncated.append(number)
        examples.append(example)
    _raise_faults(file, faults)
    if not examples:
        raise DataError(
            f"{file.name} has no example to train on: {len(dropped)} left out at seq_length "
            f"{section.seq_length}.",
            remedy=f"wc {file}  # and raise dataset.seq_length if the examples are longer",
            context={"file": file, "dropped lines": dropped[:SHOWN_FAULTS]},
        )
    return Dataset(file.name, tuple(examples), tuple(truncated), tuple(dropped))


def _raise_faults(file: Path, faults: list[str]) -> None:
    if not faults:
        return
    count = "1 broken line" if len(faults) == 1 else f"{len(faults)} broken lines"
    first = faults[0].partition(":")[0].removeprefix("line ")
    more = " …" if len(faults) > SHOWN_FAULTS else ""
    raise DataError(
        f"{file.name} has {count}: {'; '.join(faults[:SHOWN_FAULTS])}{more}",
        remedy=f"sed -n {first}p {file}",
        context={"file": file, "broken lines": len(faults)},
    )


@dataclass
class Stream:
    """The endless, shuffled order of a dataset's examples."""

    dataset: Dataset
    seed: int
    _epoch: int = -1
    _order: list[int] = field(default_factory=list)

    def __getitem__(self, position: int) -> Example:
        """The example at `position`, counted from the beginning of training."""
        epoch, within = divmod(position, len(self.dataset.examples))
        if epoch != self._epoch:
            # Mixed so that neighbouring seeds and epochs don't share permutations.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            self._order = torch.randperm(len(self.dataset.examples), generator=generator).tolist()
            self._epoch = epoch
        return self.dataset.examples[self._order[within]]


def collate(examples: Sequence[Example], *, pad: int) -> Batch:
    """One batch, padded on the right.

    No attention mask goes with it: attention and the Mamba scan are causal, so padding on the right never
    reaches a real token, and padding itself is not trained.
    """
    longest = max(len(example.input_ids) for example in examples)
    length = -(-longest // LENGTH_MULTIPLE) * LENGTH_MULTIPLE
    return Batch(
        torch.tensor(
            [[*example.input_ids] + [pad] * (length - len(example.input_ids)) for example in examples]
        ),
        torch.tensor(
            [[*example.labels] + [IGNORED] * (length - len(example.labels)) for example in examples]
        ),
        sum(len(example.input_ids) for example in examples),
        sum(trained_tokens(example) for example in examples),
        tuple(example.line for example in examples),
    )

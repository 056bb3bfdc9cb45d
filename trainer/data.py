"""Examples from a chat JSONL file (or random tokens), their order, and padded batches.

A row of a batch is one example, or several that are packed. The order is a stream of rows: for each epoch a
permutation drawn from seed and epoch alone. Step n takes the next `global_batch_size` rows of it whatever
the number of processes is, so the position in the stream is all that a checkpoint needs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.chat import IGNORED, encode
from trainer.config import DatasetSection
from trainer.conversations import read_conversation
from trainer.errors import DataError
from trainer.packing import WINDOW, Layout, layout_of, pack

SHOWN_FAULTS = 10
LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this: grouped matrix products in bf16 want it."""
PREDICTING_PARTS = 16
"""The places that predict are filled up to a multiple of this part of all."""
RECORDED_LENGTHS = 16
"""How many lengths batches have at most where a pass of each shape is recorded, …"""
RECORDED_PARTS = 4
"""… and of how many lengths their places that predict then are."""


@dataclass(frozen=True)
class Example:
    """One sequence: token ids, and labels that are the same ids or IGNORED."""

    input_ids: Sequence[int]
    labels: Sequence[int]
    line: int
    """Where it stands in its file, from 1."""


Row = tuple[Example, ...]
"""What one row of a batch holds."""


@dataclass(frozen=True)
class Shape:
    """What a batch is padded to."""

    length: int
    """Of its rows, in tokens."""
    predicting: int
    """Places that predict, in all its rows together."""


@dataclass(frozen=True)
class Batch:
    """Rows padded on the right to one length. Shape of both tensors: [rows, length], int64."""

    input_ids: Tensor
    labels: Tensor
    tokens: int
    """Without padding."""
    trained_tokens: int
    lines: tuple[int, ...]
    layout: Layout = field(default_factory=dict)
    """How packed rows are divided, for the model's forward; empty where each row is one example."""
    predicting: Tensor | None = None
    """[n], int64: the places in the flattened rows whose next token is trained, filled up with the last
    place of all, which predicts nothing, to one of a few lengths."""

    def to(self, device: torch.device) -> Batch:
        """The same batch on `device`."""
        ids, labels = (part.to(device, non_blocking=True) for part in (self.input_ids, self.labels))
        layout: Layout = {
            name: part.to(device, non_blocking=True) if isinstance(part, Tensor) else part
            for name, part in self.layout.items()
        }
        predicting = None if self.predicting is None else self.predicting.to(device, non_blocking=True)
        return Batch(ids, labels, self.tokens, self.trained_tokens, self.lines, layout, predicting)


@dataclass(frozen=True)
class Work:
    """What one process does in an optimizer step."""

    batches: Sequence[Batch]
    tokens: int
    """Of the whole global batch, without padding."""
    trained: int
    """Of the whole global batch."""


@dataclass(frozen=True)
class Dataset:
    """All examples of one file, with what was cut or left out and where."""

    name: str
    examples: tuple[Example, ...]
    truncated: tuple[int, ...] = ()
    """Lines of examples that were cut to seq_length."""
    dropped: tuple[int, ...] = ()
    """Lines of examples that were left out: longer than seq_length, or nothing trained within it."""
    row_length: int | None = None
    """Tokens of a row that examples are packed into; None: each example is a row."""

    @cached_property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return self.row_length or max(len(example.input_ids) for example in self.examples)

    def rows(self, order: Sequence[int]) -> list[Row]:
        """The examples of these numbers, in rows; packed ones a window after the other."""
        if self.row_length is None:
            return [(self.examples[number],) for number in order]
        return [
            tuple(self.examples[order[start + place]] for place in row)
            for start in range(0, len(order), WINDOW)
            for row in pack(
                [len(self.examples[number].input_ids) for number in order[start : start + WINDOW]],
                self.row_length,
            )
        ]

    def figures(self) -> dict[str, object]:
        """What the run's summary shows."""
        tokens = sum(len(example.input_ids) for example in self.examples)
        trained = sum(trained_tokens(example) for example in self.examples)
        rows = len(self.rows(range(len(self.examples))))
        packed = (
            {"rows": rows, "filled": round(tokens / (rows * self.row_length), 4)} if self.row_length else {}
        )
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
            **packed,
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
    examples = tuple(Example(row, row, line) for line, row in enumerate(rows, start=1))
    return Dataset("synthetic", examples, row_length=_row_length(section))


def _row_length(section: DatasetSection) -> int | None:
    return section.seq_length if section.packing else None


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
    nothing_trained = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            conversation = read_conversation(line)
            input_ids, labels = encode(
                conversation.messages, tokenizer, tools=conversation.tools, train_on=section.train_on
            )
        except ValueError as problem:
            faults.append(f"line {number}: {problem}")
            continue
        too_long = len(input_ids) > section.seq_length
        example = Example(input_ids[: section.seq_length], labels[: section.seq_length], number)
        if (too_long and section.overlong == "drop") or not trained_tokens(example):
            dropped.append(number)
            nothing_trained += not any(label != IGNORED for label in labels[1:])
            continue
        if too_long:
            truncated.append(number)
        examples.append(example)
    _raise_faults(file, faults)
    if not examples:
        raise _nothing_to_train(file, section, dropped, nothing_trained)
    return Dataset(
        file.name, tuple(examples), tuple(truncated), tuple(dropped), row_length=_row_length(section)
    )


def _nothing_to_train(
    file: Path, section: DatasetSection, dropped: list[int], nothing_trained: int
) -> DataError:
    return DataError(
        f"{file.name} has no example to train on: {len(dropped) - nothing_trained} are too long for "
        f"seq_length {section.seq_length}, and of {nothing_trained} the chat template marks no token as the "
        "assistant's.",
        remedy=f"wc {file}  # raise dataset.seq_length if the examples are longer; or correct the "
        "{% generation %} markers of the tokenizer's chat template",
        context={"file": file, "dropped lines": dropped[:SHOWN_FAULTS]},
    )


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
    """The endless order of a dataset's rows."""

    dataset: Dataset
    seed: int
    shuffle: bool = True
    """False: each epoch has the file's order."""
    _starts: list[int] = field(default_factory=lambda: [0])
    """Where each epoch begins, as far as it is known; packed epochs differ in their number of rows."""
    _epoch: int = -1
    _rows: list[Row] = field(default_factory=list)

    def __getitem__(self, position: int) -> Row:
        """The row at `position`, counted from the beginning of training."""
        while position >= self._starts[-1]:
            self._find_next_start()
        epoch = bisect_right(self._starts, position) - 1
        return self._rows_of(epoch)[position - self._starts[epoch]]

    def rows_in(self, epochs: int) -> int:
        """How many rows the first `epochs` epochs have."""
        while len(self._starts) <= epochs:
            self._find_next_start()
        return self._starts[epochs]

    def _find_next_start(self) -> None:
        packed = self.dataset.row_length is not None
        rows = len(self._rows_of(len(self._starts) - 1) if packed else self.dataset.examples)
        self._starts.append(self._starts[-1] + rows)

    def _rows_of(self, epoch: int) -> list[Row]:
        if epoch != self._epoch:
            # Mixed so that neighbouring seeds and epochs don't share permutations.
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
            rows = self.dataset.rows(self._order(len(self.dataset.examples), generator))
            if self.dataset.row_length is not None:  # packed by length: the full rows would come first
                rows = [rows[place] for place in self._order(len(rows), generator)]
            self._rows, self._epoch = rows, epoch
        return self._rows

    def _order(self, count: int, generator: torch.Generator) -> Sequence[int]:
        return torch.randperm(count, generator=generator).tolist() if self.shuffle else range(count)


def collate(
    rows: Sequence[Row], *, pad: int, row_length: int | None = None, shape: Shape | None = None
) -> Batch:
    """One batch, padded on the right: to the longest row, packed rows to `row_length`; or to `shape`.

    No attention mask goes with it: attention and the Mamba scan are causal, so padding on the right never
    reaches a real token, and padding itself is not trained. No example's first token is: nothing before it
    predicts it.
    """
    lengths = [[len(example.input_ids) for example in row] for row in rows]
    longest = row_length or max(map(sum, lengths))
    length = shape.length if shape else _multiple_of(LENGTH_MULTIPLE, longest)
    ids = [[token for example in row for token in example.input_ids] for row in rows]
    labels = [[label for example in row for label in (IGNORED, *example.labels[1:])] for row in rows]
    examples = [example for row in rows for example in row]
    padded_labels = _padded(labels, length, IGNORED)
    return Batch(
        _padded(ids, length, pad),
        padded_labels,
        sum(map(sum, lengths)),
        sum(map(trained_tokens, examples)),
        tuple(example.line for example in examples),
        layout_of(lengths, length, with_ends=shape is None) if row_length else {},
        _predicting(padded_labels, shape),
    )


def recorded_shape(batches: Sequence[Sequence[Row]], *, longest: int) -> Shape:
    """One of few shapes, that suits each of `batches`, all of as many rows.

    longest: tokens of the longest row that there is.
    """
    rows = [row for batch in batches for row in batch]
    most = max(sum(len(example.input_ids) for example in row) for row in rows)
    few = _multiple_of(-(-longest // RECORDED_LENGTHS), most)
    length = _multiple_of(LENGTH_MULTIPLE, min(few, longest))
    trained = max(sum(trained_tokens(example) for row in batch for example in row) for batch in batches)
    return Shape(length, _multiple_of(_part(length, len(batches[0])), trained))


def largest_shape(rows: int, *, longest: int) -> Shape:
    """The largest that `recorded_shape` gives for batches of so many rows."""
    length = _multiple_of(LENGTH_MULTIPLE, longest)
    return Shape(length, RECORDED_PARTS * _part(length, rows))


def _part(length: int, rows: int) -> int:
    return -(-length * rows // RECORDED_PARTS)


def _multiple_of(unit: int, number: int) -> int:
    """The first that is not below `number`."""
    return -(-number // unit) * unit


def _predicting(labels: Tensor, shape: Shape | None) -> Tensor:
    """See `Batch`: of few lengths, so that batches of one shape are mostly alike in this too."""
    places = (labels[:, 1:] != IGNORED).nonzero()
    flat = places[:, 0] * labels.shape[1] + places[:, 1]
    part = -(-labels.numel() // PREDICTING_PARTS)
    wanted = shape.predicting if shape else _multiple_of(part, flat.numel())
    return F.pad(flat, (0, wanted - flat.numel()), value=labels.numel() - 1)


def _padded(rows: Sequence[list[int]], length: int, filler: int) -> Tensor:
    return torch.tensor([row + [filler] * (length - len(row)) for row in rows])

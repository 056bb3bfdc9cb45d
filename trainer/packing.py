"""Documents packed into rows of one length, and what a model is told to keep them apart.

Attention is cut at the boundaries by `document_mask` (Nemotron-H with sdpa), by the mask that transformers
makes of the restarting positions (other models, eager) or by the documents' ends (flash_attention_2), the
mamba layers' convolution and state by `seq_idx`.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

import torch
from torch import Tensor

WINDOW = 1024
"""Documents that are packed together. Rows are full to a percent or so, and each epoch has other rows."""

Layout = dict[str, Tensor | int]
"""Keyword arguments for the base model's forward."""


def pack(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    """For each row, which documents lie in it; every document lies in one row, none is cut.

    Best-fit decreasing: the longest document first, each into the fullest row that has room for it.
    lengths: tokens, none above `row_length`.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), the fullest first
    for document in sorted(range(len(lengths)), key=lambda document: -lengths[document]):
        place = bisect_left(room, (lengths[document], 0))
        if place == len(room):
            left, row = row_length, len(rows)
            rows.append([])
        else:
            left, row = room.pop(place)
        rows[row].append(document)
        insort(room, (left - lengths[document], row))
    return rows


def layout_of(rows: Sequence[Sequence[int]], length: int, *, with_ends: bool = True) -> Layout:
    """Where the documents lie, for rows of document lengths, each padded to `length` tokens.

    position_ids: [rows, length], int64, from 0 in each document; seq_idx: [rows, length], int32, the
    document's number in its row; cu_seq_lens_q and _k: int32, where the documents of all rows, laid end to
    end, begin, and where the last ends; max_length_q and _k: the longest. The last four only `with_ends`:
    they differ from batch to batch in shape or number. Padding counts as a document of its own, so nothing
    reaches it and it reaches nothing.
    """
    filled = [[*row, length - sum(row)] if sum(row) < length else [*row] for row in rows]
    lengths = [tokens for row in filled for tokens in row]
    positions = torch.cat([torch.arange(tokens) for tokens in lengths]).view(len(rows), length)
    numbers = [
        torch.repeat_interleave(torch.arange(len(row), dtype=torch.int32), torch.tensor(row))
        for row in filled
    ]
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    layout: Layout = {"position_ids": positions, "seq_idx": torch.stack(numbers)}
    if not with_ends:
        return layout
    longest = max(lengths)
    return {
        **layout,
        # transformers finds packed documents by their positions only where a batch has a single row.
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }


def document_mask(seq_idx: Tensor, dtype: torch.dtype) -> Tensor:
    """[rows, length] of `layout_of` → [rows, 1, length, length]: 0 where one attends to another, else -inf.

    Of the model's dtype, as attention would make of a bool mask in every layer anew.
    """
    same = (seq_idx[:, None, :, None] == seq_idx[:, None, None, :]).tril_()
    mask = torch.zeros(same.shape, dtype=dtype, device=same.device)
    return mask.masked_fill_(same.logical_not_(), -torch.inf)

"""A log of any size, block by block: its lines, their numbers, and which rank wrote each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 1 << 20
"""Read at a time. A line that is longer is cut."""
LINE_CHARS = 4000
"""A longer line is read in pieces of this length, all with its number."""

_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|.)?", re.DOTALL)
_LABEL = re.compile(
    r"\s{0,8}(?:[\w.-]{1,64}: )?"  # the host, as deepspeed and pdsh print it
    r"(?:\[(?P<role>[A-Za-z_]{1,32})(?P<local>\d{1,6})\]: ?"  # torch's [rank3]: and torchrun's [default3]:
    r"|\[\d+,(?P<rank>\d{1,6})\]<std(?:out|err)>: ?)"  # mpirun --tag-output
)
_TASK = re.compile(r"\s{0,5}(?P<task>\d{1,5}): ")
_LABELS_AT_MOST = 3
_LABELLED_SHARE = 0.8


@dataclass(frozen=True)
class Line:
    """One line, without the label of who wrote it."""

    number: int
    speaker: str
    """The rank or task, as "rank 3"; empty where the log doesn't tell."""
    text: str


@dataclass(frozen=True)
class Block:
    """Some of the log's lines, cleaned of terminal escapes and NULs."""

    first: int
    """The number of its first line."""
    text: str


def read_blocks(stream: BinaryIO) -> Iterator[Block]:
    """The whole of `stream` in blocks of about BLOCK_BYTES, cut at line ends. May raise OSError."""
    number, rest = 1, b""
    while chunk := stream.read(BLOCK_BYTES):
        whole, newline, tail = (rest + chunk).rpartition(b"\n")
        if newline:
            yield Block(number, _clean(whole))
            number += whole.count(b"\n") + 1
        elif len(tail) >= BLOCK_BYTES:
            yield Block(number, _clean(tail))
            tail = b""
        rest = tail
    if rest:
        yield Block(number, _clean(rest))


def lines_of(block: Block, *, labelled: bool) -> Iterator[Line]:
    """The lines that say something. What a progress bar overwrites are lines of one number.

    `labelled`: each line starts with its task's number, as `srun --label` writes it.
    """
    for offset, physical in enumerate(block.text.split("\n")):
        for written in physical.split("\r"):
            if not written or written.isspace():
                continue
            speaker, text = _told_apart(written, labelled)
            for start in range(0, len(text), LINE_CHARS):
                yield Line(block.first + offset, speaker, text[start : start + LINE_CHARS])


def has_task_labels(block: Block) -> bool:
    """Whether nearly all of the first lines start with a task's number."""
    lines = [line for line in block.text.split("\n", 50)[:50] if line.strip()]
    labelled = sum(bool(_TASK.match(line)) for line in lines)
    return bool(lines) and labelled >= _LABELLED_SHARE * len(lines)


def _told_apart(text: str, labelled: bool) -> tuple[str, str]:
    """Who wrote the line, and the line without that."""
    said: dict[str, str] = {}
    if labelled and (match := _TASK.match(text)):
        said["task"], text = match["task"], text[match.end() :]
    for _ in range(_LABELS_AT_MOST):
        if "]" not in text or not (match := _LABEL.match(text)):
            break
        if match["rank"] or match["role"] == "rank":
            said["rank"] = match["rank"] or match["local"]
        else:
            said["local rank"] = match["local"]
        text = text[match.end() :]
    if "rank" in said:
        return f"rank {said['rank']}", text
    return ", ".join(f"{kind} {number}" for kind, number in said.items()), text


def _clean(raw: bytes) -> str:
    text = raw.decode("utf-8", errors="replace").replace("\0", "")
    return _ESCAPE.sub("", text) if "\x1b" in text else text

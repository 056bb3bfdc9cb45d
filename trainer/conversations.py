"""Chat data line by line: the conversation of a line, or what is wrong with it. No torch: it must be quick.

`data.py` makes examples of the conversations; `scan` looks at a whole file without tokenizing anything.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

ROLES = ("system", "user", "assistant", "tool")
SHOWN_PROBLEMS = 20
SHOWN_PAIRS = 5
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


def read_messages(line: bytes) -> list[dict[str, str]]:
    """The conversation of one line. Raises ValueError with what is wrong with it."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"not JSON ({problem})") from problem
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError('not a {"messages": [...]} object')
    messages = record["messages"]
    if not messages:
        raise ValueError("the conversation is empty")
    for turn, message in enumerate(messages, start=1):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise ValueError(f"message {turn} has no text in content")
        if message.get("role") not in ROLES:
            raise ValueError(f"message {turn} has the unknown role {message.get('role')!r}")
        _refuse_half_characters(turn, message["content"])
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn, nothing to train on")
    return [{"role": message["role"], "content": message["content"]} for message in messages]


def _refuse_half_characters(turn: int, content: str) -> None:
    """JSON can spell half of a character beyond U+FFFF (as backslash ud83d); no tokenizer takes it."""
    try:
        content.encode()
    except UnicodeEncodeError as problem:
        half = f"U+{ord(content[problem.start]):04X}"
        raise ValueError(f"message {turn} holds half of a character ({half}), which is no text") from problem


def numbered_lines(file: Path) -> Iterator[tuple[int, bytes]]:
    """The lines of `file` that aren't blank, with their numbers from 1, one after the other from the disk."""
    number = 0
    with file.open("rb") as stream:
        for part in stream:
            for line in part.splitlines():  # a carriage return ends a line too
                number += 1
                if line.strip():
                    yield number, line


@dataclass
class Scan:
    """What a data file's lines hold."""

    file: Path
    size: int
    """Bytes of the file."""
    lines: int = 0
    """That were looked at, without blank ones."""
    complete: bool = True
    """False where the time ran out before the end of the file."""
    problems: int = 0
    first_problems: list[str] = field(default_factory=list)
    """"line N: reason" of the first SHOWN_PROBLEMS."""
    byte_order_mark: str | None = None
    """The encoding that the file's first bytes announce, if they announce one."""
    digests: dict[bytes, int] = field(default_factory=dict, repr=False)
    """Conversation → its line; where `keep_digests` was asked for."""
    shared: int = 0
    """Conversations that are in the other file too."""
    first_shared: list[str] = field(default_factory=list)

    def facts(self) -> dict[str, object]:
        """As JSON takes it."""
        return {
            "file": str(self.file),
            "bytes": self.size,
            "lines": self.lines,
            "complete": self.complete,
            "problems": self.problems,
            "first_problems": self.first_problems,
            "byte_order_mark": self.byte_order_mark,
            "shared": self.shared,
            "first_shared": self.first_shared,
        }


def scan(
    file: Path, *, deadline: float, keep_digests: bool = False, others: Mapping[bytes, int] | None = None
) -> Scan:
    """Looks at every line of `file` until `deadline` (time.monotonic()).

    `others` are another file's digests, whose conversations are looked for. Raises OSError.
    """
    with file.open("rb") as stream:
        start = stream.read(3)
    marks = (name for mark, name in _BYTE_ORDER_MARKS.items() if start.startswith(mark))
    found = Scan(file, file.stat().st_size, byte_order_mark=next(marks, None))
    for number, line in numbered_lines(file):
        if found.lines % 1000 == 0 and time.monotonic() > deadline:
            found.complete = False
            break
        found.lines += 1
        try:
            digest = _digest(read_messages(line))
        except ValueError as problem:
            found.problems += 1
            if found.problems <= SHOWN_PROBLEMS:
                found.first_problems.append(f"line {number}: {problem}")
            continue
        if keep_digests:
            found.digests.setdefault(digest, number)
        if others and digest in others:
            found.shared += 1
            if found.shared <= SHOWN_PAIRS:
                found.first_shared.append(f"line {number} is line {others[digest]} of the other file")
    return found


def _digest(messages: list[dict[str, str]]) -> bytes:
    return hashlib.blake2b(json.dumps(messages).encode(), digest_size=16).digest()

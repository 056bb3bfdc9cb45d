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
from typing import Any

ROLES = ("system", "user", "assistant", "tool")
FIELDS = ("role", "content", "name", "tool_call_id")
ASSISTANT_FIELDS = ("reasoning_content", "tool_calls")
TEXT_FIELDS = ("name", "tool_call_id", "reasoning_content")
SHOWN_PROBLEMS = 20
SHOWN_PAIRS = 5
_BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "UTF-8", b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}


Message = dict[str, Any]
"""As the chat template gets it."""


@dataclass(frozen=True)
class Conversation:
    """One line of data."""

    messages: list[Message]
    tools: list[dict[str, Any]] | None = None
    """JSON schemas of the functions that may be called."""


def read_conversation(line: bytes) -> Conversation:
    """The conversation of one line. Raises ValueError with what is wrong with it."""
    try:
        record = json.loads(line)
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise ValueError(f"not JSON ({problem})") from problem
    if not isinstance(record, dict) or not isinstance(record.get("messages"), list):
        raise ValueError('not a {"messages": [...]} object')
    if not record["messages"]:
        raise ValueError("the conversation is empty")
    messages = [_read_message(turn, message) for turn, message in enumerate(record["messages"], start=1)]
    if all(message["role"] != "assistant" for message in messages):
        raise ValueError("no assistant turn, nothing to train on")
    tools = record.get("tools")
    if tools is not None:
        if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
            raise ValueError("tools is not a list of objects")
        _refuse_half_characters("tools", tools)
    return Conversation(messages, tools or None)


def _read_message(turn: int, found: object) -> Message:
    """The message as it is, without fields that are null."""
    if not isinstance(found, dict):
        raise ValueError(f"message {turn} has no text in content")
    message: Message = {name: value for name, value in found.items() if value is not None}
    if "tool_calls" in message:
        message.setdefault("content", "")  # templates may print a null as "None"
        if not _is_tool_calls(message["tool_calls"]):
            raise ValueError(
                f"message {turn} has tool_calls that are no list of function names and arguments"
            )
    if not _is_text(message.get("content")):
        raise ValueError(f"message {turn} has no text in content")
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"message {turn} has the unknown role {role!r}")
    known = (*FIELDS, *ASSISTANT_FIELDS) if role == "assistant" else FIELDS
    if unknown := sorted(set(message) - set(known)):
        raise ValueError(f"message {turn}, of the {role}, has the unknown field {unknown[0]!r}")
    if not all(isinstance(message.get(name, ""), str) for name in TEXT_FIELDS):
        raise ValueError(f"message {turn} has a field among {', '.join(TEXT_FIELDS)} that is no text")
    _refuse_half_characters(f"message {turn}", message)
    return message


def _is_text(content: object) -> bool:
    if isinstance(content, list):
        return bool(content) and all(
            isinstance(part, dict)
            and part.keys() == {"type", "text"}
            and part["type"] == "text"
            and isinstance(part["text"], str)
            for part in content
        )
    return isinstance(content, str)


def _is_tool_calls(calls: object) -> bool:
    return isinstance(calls, list) and all(
        isinstance(call, dict)
        and isinstance(function := call.get("function", call), dict)
        and isinstance(function.get("name"), str)
        for call in calls
    )


def _refuse_half_characters(place: str, value: object) -> None:
    """JSON can spell half of a character beyond U+FFFF (as backslash ud83d); no tokenizer takes it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError as problem:
        half = f"U+{ord(problem.object[problem.start]):04X}"
        raise ValueError(f"{place} holds half of a character ({half}), which is no text") from problem


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
            digest = _digest(read_conversation(line))
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


def _digest(conversation: Conversation) -> bytes:
    text = json.dumps([conversation.messages, conversation.tools], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).digest()

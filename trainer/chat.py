"""One conversation → token ids and which of them are trained: the assistant's turns, exactly.

The template's `{% generation %}` markers say which characters the assistant wrote. A template without
them is rendered turn by turn: what a turn adds to the text before it is that turn's. Where a template
rewrites earlier turns, that is no longer exact, and the conversation is refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Message = dict[str, str]
Span = tuple[int, int]
"""First character and the one after the last."""

IGNORED = -100
"""The label of a token that is not trained."""
_GENERATION = re.compile(r"\{%-?\s*generation\b")


class InexactTemplate(ValueError):
    """The chat template doesn't tell which part of the text is the assistant's."""


def encode(messages: Sequence[Message], tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation; a label is the token's own id or IGNORED.

    A token is trained if all its characters are the assistant's. Raises InexactTemplate.
    """
    text, spans = render(messages, tokenizer)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = []
    remaining = list(spans)
    for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        while remaining and remaining[0][1] <= start:
            remaining.pop(0)
        inside = bool(remaining) and remaining[0][0] <= start and end <= remaining[0][1]
        labels.append(token if inside else IGNORED)
    return tokens["input_ids"], labels


def render(messages: Sequence[Message], tokenizer: Any) -> tuple[str, list[Span]]:
    """The conversation as text, and the spans of characters that the assistant wrote, in order."""
    if marks_generation(tokenizer):
        rendered: Any = render_jinja_template(
            [list(messages)],
            chat_template=tokenizer.chat_template,
            return_assistant_tokens_mask=True,
            **tokenizer.special_tokens_map,
        )
        texts, spans = rendered
        return texts[0], [(start, end) for start, end in spans[0]]
    text = _text(messages, tokenizer)
    return text, [
        _added_by(messages, turn, text, tokenizer)
        for turn, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


def marks_generation(tokenizer: Any) -> bool:
    """Whether the chat template itself says what the assistant wrote."""
    return bool(_GENERATION.search(tokenizer.chat_template))


def _added_by(messages: Sequence[Message], turn: int, text: str, tokenizer: Any) -> Span:
    before = _text(messages[:turn], tokenizer, add_generation_prompt=True) if turn else ""
    after = _text(messages[: turn + 1], tokenizer)
    if not (after.startswith(before) and text.startswith(after)):
        raise InexactTemplate(
            f"the chat template has no generation markers and renders turn {turn + 1} differently in context"
        )
    return len(before), len(after)


def _text(messages: Sequence[Message], tokenizer: Any, *, add_generation_prompt: bool = False) -> str:
    text = tokenizer.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
    )
    return str(text)

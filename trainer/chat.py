"""One conversation → token ids and which of them are trained: the assistant's turns, exactly.

The template's `{% generation %}` markers say which characters the assistant wrote. A template without
them is asked where each turn lies (`turns.py`), and the conversation is refused where that is not exact.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from transformers.utils.chat_template_utils import render_jinja_template

from trainer.conversations import Message
from trainer.turns import InexactTemplate, Span, Turns

__all__ = ["IGNORED", "BrokenTemplate", "InexactTemplate", "encode", "marks_generation", "render"]

TrainOn = Literal["assistant", "last", "all"]
Tools = Sequence[dict[str, Any]] | None

IGNORED = -100
"""The label of a token that is not trained."""
_GENERATION = re.compile(r"\{%-?\s*generation\b")
_NAMES_IN_TEMPLATES = {
    "reasoning_content": re.compile(r"\b(reasoning_content|thinking)\b"),
    "tool_calls": re.compile(r"\btool_calls\b"),
    "tools": re.compile(r"\btools\b"),
}
"""What must not be lost silently → how a template that shows it names it."""


class BrokenTemplate(ValueError):
    """The chat template can't show this conversation, or not all of it."""


def encode(
    messages: Sequence[Message], tokenizer: Any, *, tools: Tools = None, train_on: TrainOn = "assistant"
) -> tuple[list[int], list[int]]:
    """Token ids and labels of one conversation; a label is the token's own id or IGNORED.

    A token is trained if all its characters are. Raises InexactTemplate, BrokenTemplate.
    """
    text, spans = render(messages, tokenizer, tools=tools, train_on=train_on)
    tokens = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = []
    remaining = list(spans)
    for token, (start, end) in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        while remaining and remaining[0][1] <= start:
            remaining.pop(0)
        inside = bool(remaining) and remaining[0][0] <= start and end <= remaining[0][1]
        labels.append(token if inside else IGNORED)
    return tokens["input_ids"], labels


def render(
    messages: Sequence[Message], tokenizer: Any, *, tools: Tools = None, train_on: TrainOn = "assistant"
) -> tuple[str, list[Span]]:
    """The conversation as text, and the spans of characters that are trained, in order."""
    template = _Template(tokenizer, tools)
    template.refuse_what_it_would_lose(messages)
    turns = Turns(messages, template)
    _refuse_lists_as_text(messages, turns.text)
    assistant = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    if train_on == "all":
        return turns.text, [(0, len(turns.text))]
    if train_on == "last":
        assistant = assistant[-1:]
    if not template.marks_generation:
        return turns.text, turns.written(assistant)
    spans = template.marked(messages)
    if train_on == "last":
        begin = turns.begin(assistant[0])
        spans = [span for span in spans if span[0] >= begin]
    return turns.text, spans


def marks_generation(tokenizer: Any) -> bool:
    """Whether the chat template itself says what the assistant wrote."""
    return _Template(tokenizer, None).marks_generation


class _Template:
    """A tokenizer's chat template with a conversation's tools: called, it makes text of messages."""

    def __init__(self, tokenizer: Any, tools: Tools) -> None:
        self._source: str = tokenizer.get_chat_template(tools=tools)
        self._tools = list(tools) if tools else None
        self._special_tokens = tokenizer.special_tokens_map

    def __call__(self, messages: Sequence[Message], **options: bool) -> str:
        return self._render(messages, **options)[0]

    @property
    def marks_generation(self) -> bool:
        return bool(_GENERATION.search(self._source))

    def marked(self, messages: Sequence[Message]) -> list[Span]:
        """The spans between the template's markers."""
        return self._render(messages, return_assistant_tokens_mask=True)[1]

    def refuse_what_it_would_lose(self, messages: Sequence[Message]) -> None:
        """Raises BrokenTemplate for words of the conversation that the template never shows."""
        held = [(name, f"message {turn}") for turn, message in enumerate(messages, 1) for name in message]
        for name, place in [*held, *([("tools", "the line")] if self._tools else [])]:
            if name in _NAMES_IN_TEMPLATES and not _NAMES_IN_TEMPLATES[name].search(self._source):
                raise BrokenTemplate(f"{place} has {name}, which the chat template doesn't show")

    def _render(self, messages: Sequence[Message], **options: bool) -> tuple[str, list[Span]]:
        render_template: Any = render_jinja_template
        try:
            texts, spans = render_template(
                [list(messages)],
                tools=self._tools,
                chat_template=self._source,
                **options,
                **self._special_tokens,
            )
        except Exception as problem:  # a template's own errors, and those of its interpreter
            kind = type(problem).__name__
            raise BrokenTemplate(f"the chat template can't show it: {kind}: {problem}") from problem
        return texts[0], [(start, end) for start, end in spans[0]] if spans else []


def _refuse_lists_as_text(messages: Sequence[Message], text: str) -> None:
    """A template that only knows text prints a list of parts as Python shows it."""
    for turn, message in enumerate(messages, start=1):
        if isinstance(message["content"], list) and repr(message["content"]) in text:
            raise BrokenTemplate(
                f"message {turn} has its content in parts, and the chat template only takes text"
            )

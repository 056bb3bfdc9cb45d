"""Where each turn lies in a rendered conversation, for chat templates without `{% generation %}` markers.

First, every turn's words are replaced by others that occur nowhere else: each turn must show some of its
own, once, and in order. Then a turn ends where the text of the conversation up to it ends, if the whole text
begins so. It doesn't where a template shows a turn differently once others follow it; many leave out the
reasoning of earlier turns. There the turn is looked for in the whole text: what differs when its words alone
are replaced is the turn's own, and what the template puts behind them is known from the conversation that
ends with it. Where this doesn't fit together the conversation is refused: nothing is guessed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any

from trainer.conversations import Message

Span = tuple[int, int]
"""First character and the one after the last."""

_TAGS = re.compile(r"(</?(?:think|tool_response)>)")
"""Templates look for these in a turn's words, so they stay where words are replaced."""


class InexactTemplate(ValueError):
    """The chat template doesn't tell which part of the text is the assistant's."""


class Turns:
    """One conversation's turns in its text; `render(messages, **options)` is the chat template."""

    def __init__(self, messages: Sequence[Message], render: Callable[..., str]) -> None:
        self._messages = list(messages)
        self._render = render
        self._beginnings: dict[int, str] = {}
        self.text = self._beginning(len(self._messages))

    def written(self, turns: Sequence[int]) -> list[Span]:
        """What the assistant writes in each of these turns. Raises InexactTemplate."""
        self._refuse_disorder()
        return [self._written(turn) for turn in turns]

    def begin(self, turn: int) -> int:
        """Where the turn's text begins. Raises InexactTemplate."""
        self._refuse_disorder()
        return self._end(turn - 1) if turn else 0

    def _refuse_disorder(self) -> None:
        words = _Words("Q", _unique_in(self.text))
        changed, own = [], []
        for message in self._messages:
            before = len(words.used)
            changed.append(words.instead_of(message))
            own.append(words.used[before:])
        other = self._render(changed)
        behind = 0
        for turn, expected in enumerate(own):
            places = [other.index(word) for word in expected if word in other]
            if expected and not places:
                raise _inexact(turn, "does not show its words")
            if any(other.count(word) > 1 for word in expected) or min(places, default=behind) < behind:
                raise _inexact(turn, "shows its words more than once, or not in its place")
            behind = max(places, default=behind)

    def _end(self, turn: int) -> int:
        alone = self._beginning(turn + 1)
        if self.text.startswith(alone):
            return len(alone)
        last = self._own(self._messages[: turn + 1], turn)[1]
        behind = alone[last:]
        end = self._own(self._messages, turn)[1]
        if not self.text.startswith(behind, end):
            raise _inexact(turn, "closes it differently in context")
        return end + len(behind)

    def _written(self, turn: int) -> Span:
        """All of the turn but what the prompt for it gives.

        The prompt is the template's generation prompt, or the one without thinking; to a turn that begins
        with neither, what it has in common with the first was given.
        """
        if turn == 0:
            raise _inexact(turn, "has nothing before it that would tell where the assistant begins")
        begin, end = self._end(turn - 1), self._end(turn)
        text = self.text[begin:end]
        prompts = self._prompts(turn)
        given = next((len(prompt) for prompt in prompts if text.startswith(prompt)), None)
        if given is None:
            first = self._own(self._messages, turn)[0] - begin
            given = min(first, _common_start(text, prompts[0])) if prompts else 0
            if given <= 0:
                raise _inexact(turn, "begins otherwise than its generation prompt")
        if begin + given > end:
            raise _inexact(turn, "is not in its place")
        return begin + given, end

    def _prompts(self, turn: int) -> list[str]:
        before = self._beginning(turn)
        prompted = [
            self._render(self._messages[:turn], add_generation_prompt=True, **options)
            for options in ({}, {"enable_thinking": False})
        ]
        return [text[len(before) :] for text in prompted if text.startswith(before)]

    def _beginning(self, count: int) -> str:
        """The text of the first `count` messages alone."""
        if count not in self._beginnings:
            self._beginnings[count] = self._render(self._messages[:count])
        return self._beginnings[count]

    def _own(self, messages: Sequence[Message], turn: int) -> Span:
        """The smallest span outside of which the text of `messages` doesn't depend on the turn's words."""
        text = self._beginning(len(messages))
        unique = _unique_in(text)
        first, last = len(text), 0
        # At most one of two letters is by chance what the turn's words begin or end with.
        for letter in "AZ":
            words = _Words(letter, unique)
            changed = [*messages[:turn], words.instead_of(messages[turn]), *messages[turn + 1 :]]
            other = self._render(changed)
            if unique not in other:
                raise _inexact(turn, "does not show its words")
            first = min(first, _common_start(text, other))
            last = max(last, len(text) - _common_start(text[::-1], other[::-1]))
        return first, last


class _Words:
    """Makes words that occur nowhere else, and puts them in the place of a message's own."""

    def __init__(self, letter: str, unique: str) -> None:
        self._letter, self._unique = letter, unique
        self.used: list[str] = []

    def instead_of(self, message: Message) -> Message:
        """The message with other words; what is empty stays empty, and names and roles of speakers stay."""
        changed = {**message, "content": self._replace(message["content"])}
        if "reasoning_content" in message:
            changed["reasoning_content"] = self._replace(message["reasoning_content"])
        if "tool_calls" in message:
            changed["tool_calls"] = [self._call(call) for call in message["tool_calls"]]
        return changed

    def _call(self, call: dict[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": self._call(call["function"])}
        return {**call, **{name: self._replace(call[name]) for name in ("name", "arguments") if name in call}}

    def _replace(self, value: Any) -> Any:
        if isinstance(value, dict):
            return {name: part if name == "type" else self._replace(part) for name, part in value.items()}
        if isinstance(value, list):
            return [self._replace(part) for part in value]
        if not isinstance(value, str):
            return value
        return "".join(
            part if _TAGS.fullmatch(part) or not part.strip() else self._word() for part in _TAGS.split(value)
        )

    def _word(self) -> str:
        word = f"{self._letter}{self._unique}{len(self.used)}{self._letter}"
        self.used.append(word)
        return word


def _unique_in(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def _common_start(one: str, other: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low


def _inexact(turn: int, what: str) -> InexactTemplate:
    return InexactTemplate(
        f"the chat template doesn't tell turn {turn + 1} apart, and doesn't mark it as generated: it {what}"
    )

"""Which tokens are trained: the assistant's, exactly."""

from __future__ import annotations

from typing import Any

import pytest

from trainer.chat import IGNORED, InexactTemplate, encode
from trainer.tokenizer import BYTE_CHAT_TEMPLATE, byte_tokenizer

TALK = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Où?"},
    {"role": "assistant", "content": "Là-bas, à côté: é"},
    {"role": "user", "content": "Danke <|end|> ☕"},
    {"role": "assistant", "content": "☕☕"},
]
UNMARKED = BYTE_CHAT_TEMPLATE.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def trained_text(messages: list[dict[str, str]], tokenizer: Any) -> list[str]:
    """Runs of trained tokens, decoded."""
    ids, labels = encode(messages, tokenizer)
    runs: list[list[int]] = [[]]
    for token, label in zip(ids, labels, strict=True):
        assert label in (token, IGNORED)
        if label == IGNORED:
            runs.append([])
        else:
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs if run]


def test_the_assistants_turns_are_trained_to_the_last_byte() -> None:
    assert trained_text(TALK, byte_tokenizer()) == ["Là-bas, à côté: é<|end|>", "☕☕<|end|>"]


def test_a_template_without_markers_gives_the_same_labels() -> None:
    marked, unmarked = byte_tokenizer(), byte_tokenizer()
    unmarked.chat_template = UNMARKED
    assert encode(TALK, unmarked) == encode(TALK, marked)


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = UNMARKED.replace(
        "message['content'] + '<|end|>'", "(message['content'] if loop.last else '…') + '<|end|>'", 1
    )
    with pytest.raises(InexactTemplate, match="turn 3"):
        encode(TALK, tokenizer)


def test_the_byte_tokenizer_round_trips_any_text() -> None:
    tokenizer = byte_tokenizer()
    text = "tab\t, null \x00, Ω, 漢字, 🙂, é"
    ids = tokenizer(text)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert len(tokenizer) == 262

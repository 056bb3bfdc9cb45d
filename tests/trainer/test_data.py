"""Data files: faults with line and reason, nothing left out silently, an order from the seed alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trainer.chat import IGNORED
from trainer.config import DatasetSection
from trainer.conversations import read_conversation
from trainer.data import Dataset, Example, Stream, collate, open_dataset, trained_tokens
from trainer.errors import DataError
from trainer.tokenizer import byte_tokenizer

GOOD = {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]}


def read(file: Path, **section: object) -> Dataset:
    parsed = DatasetSection.model_validate({"path_or_dataset_id": str(file), "seq_length": 64, **section})
    return open_dataset(parsed, byte_tokenizer(), vocab_size=264, seed=1)


def test_every_fault_is_named_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "bad.jsonl"
    rows = [
        json.dumps(GOOD),
        '{"messages": [',
        json.dumps({"messages": []}),
        json.dumps({"messages": [{"role": "robot", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": 3}]}),
        json.dumps({"text": "x"}),
        '{"messages": "\udcff"}'.encode("utf-8", "surrogateescape").decode("latin-1"),
    ]
    file.write_text("\n".join(rows) + "\n", encoding="latin-1")
    with pytest.raises(DataError) as problem:
        read(file)
    for text in (
        "7 broken lines",
        "line 2: not JSON",
        "line 3: the conversation is empty",
        "line 4: message 1 has the unknown role 'robot'",
        "line 5: no assistant turn",
        "line 6: message 1 has no text in content",
        'line 7: not a {"messages"',
        "line 8: not JSON",
    ):
        assert text in problem.value.message
    assert problem.value.exit_code == 3
    assert problem.value.remedy == f"sed -n 2p {file}"


def test_an_absent_file_is_a_data_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="can't be read"):
        read(tmp_path / "none.jsonl")


def test_longer_examples_are_cut_or_left_out_and_counted(tmp_path: Path) -> None:
    long_answer = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * 99}]}
    long_question = {
        "messages": [{"role": "user", "content": "a" * 99}, {"role": "assistant", "content": "b"}]
    }
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in (GOOD, long_answer, long_question)))
    cut = read(file)
    assert (cut.truncated, cut.dropped) == ((2,), (3,))
    assert [len(example.input_ids) for example in cut.examples] == [11, 64]
    left = read(file, overlong="drop")
    assert (left.truncated, left.dropped) == ((), (2, 3))
    assert left.figures()["dropped_lines"] == [2, 3]


def test_a_file_with_nothing_to_train_on_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "short.jsonl"
    file.write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(DataError, match="no example to train on: 1 are too long for seq_length 3"):
        read(file, seq_length=3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% generation %}{% endgeneration %}"
    )
    section = DatasetSection.model_validate({"path_or_dataset_id": str(file), "seq_length": 64})
    with pytest.raises(DataError, match="of 1 the chat template marks no token as the assistant's"):
        open_dataset(section, tokenizer, vocab_size=264, seed=1)


def test_synthetic_examples_are_full_length_and_all_trained() -> None:
    section = DatasetSection(kind="synthetic", seq_length=32, examples=3)
    data = open_dataset(section, None, vocab_size=11, seed=5)
    assert [len(example.input_ids) for example in data.examples] == [32] * 3
    assert {trained_tokens(example) for example in data.examples} == {31}
    assert max(token for example in data.examples for token in example.input_ids) < 11
    assert data == open_dataset(section, None, vocab_size=11, seed=5)


def test_each_epoch_has_every_example_once_in_an_order_of_its_own() -> None:
    data = Dataset("x", tuple(Example([n], [n], n) for n in range(20)))
    stream, again = Stream(data, 1), Stream(data, 1)
    first, second = ([stream[n][0].line for n in range(start, start + 20)] for start in (0, 20))
    assert sorted(first) == sorted(second) == list(range(20))
    assert first != second
    assert again[25][0].line == second[5]
    assert [Stream(data, 2)[n][0].line for n in range(20)] != first
    assert [Stream(data, 1, shuffle=False)[n][0].line for n in range(40)] == [*range(20), *range(20)]
    assert again.rows_in(3) == 60


def test_batches_are_padded_on_the_right_and_padding_is_not_trained() -> None:
    batch = collate([(Example([5, 6, 7], [IGNORED, 6, 7], 1),), (Example([8] * 9, [8] * 9, 2),)], pad=0)
    assert batch.input_ids.shape == batch.labels.shape == (2, 16)
    assert batch.input_ids[0].tolist() == [5, 6, 7] + [0] * 13
    assert batch.labels[0].tolist() == [IGNORED, 6, 7] + [IGNORED] * 13
    assert (batch.tokens, batch.trained_tokens, batch.lines) == (12, 10, (1, 2))
    assert batch.layout == {}


CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}


@pytest.mark.parametrize(
    ("message", "text"),
    [
        ({"role": "user", "content": "x", "reasoning_content": "y"}, "of the user, has the unknown field"),
        ({"role": "assistant", "content": "x", "thougths": "y"}, "of the assistant, has the unknown field"),
        ({"role": "assistant", "content": None}, "message 2 has no text in content"),
        ({"role": "assistant", "content": [{"type": "image", "url": "x"}]}, "message 2 has no text"),
        ({"role": "assistant", "content": "", "tool_calls": [{"id": "1"}]}, "message 2 has tool_calls that"),
        ({"role": "assistant", "content": "x", "reasoning_content": 3}, "reasoning_content that is no text"),
    ],
)
def test_a_message_that_no_template_takes_is_a_fault(message: dict[str, object], text: str) -> None:
    row = {"messages": [{"role": "user", "content": "hi"}, message]}
    with pytest.raises(ValueError, match=text):
        read_conversation(json.dumps(row).encode())


def test_all_that_a_template_may_show_is_kept_and_null_is_nothing() -> None:
    parts = [{"type": "text", "text": "hi"}]
    row = {
        "messages": [
            {"role": "user", "content": parts, "name": "Ada", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "r"},
            {"role": "tool", "content": "4", "tool_call_id": "1"},
        ],
        "tools": [{"type": "function"}],
        "source": "anywhere",
    }
    found = read_conversation(json.dumps(row).encode())
    assert found.tools == row["tools"]
    assert found.messages == [
        {"role": "user", "content": parts, "name": "Ada"},
        {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning_content": "r"},
        {"role": "tool", "content": "4", "tool_call_id": "1"},
    ]
    with pytest.raises(ValueError, match="tools is not a list"):
        read_conversation(json.dumps({**row, "tools": "add"}).encode())


def test_what_the_template_would_lose_is_a_fault_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "lost.jsonl"
    rows = [
        GOOD,
        {"messages": [*GOOD["messages"], {"role": "assistant", "content": "x", "tool_calls": [CALL]}]},
        {**GOOD, "tools": [{"type": "function"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, GOOD["messages"][1]]},
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError) as problem:
        read(file)
    assert "line 2: message 3 has tool_calls, which the chat template doesn't show" in problem.value.message
    assert "line 3: the line has tools" in problem.value.message
    assert "line 4: the chat template can't show it: TypeError" in problem.value.message


def test_train_on_reaches_the_labels(tmp_path: Path) -> None:
    file = tmp_path / "talk.jsonl"
    file.write_text(json.dumps({"messages": GOOD["messages"] * 2}) + "\n")
    counts = {
        how: trained_tokens(read(file, train_on=how).examples[0]) for how in ("assistant", "last", "all")
    }
    assert counts == {"assistant": 12, "last": 6, "all": 21}

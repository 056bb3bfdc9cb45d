"""Checks of a training config's data, each made to fail."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from envbuilder.doctor import Subject, choose_checks, run_checks
from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.report import Quiet
from tests.conftest import Quickstart
from tests.doctor.conftest import run_one
from tests.doctor.training import RECIPE, make_trainer_env, talk, write_config

pytestmark = pytest.mark.needs_env


@pytest.fixture(scope="module")
def trainer_root(tmp_path_factory: pytest.TempPathFactory, quickstart: Quickstart) -> Root:
    root = Root(tmp_path_factory.mktemp("data") / "root")
    make_trainer_env(root, quickstart)
    return root


def check(name: str, root: Root, config: Path) -> Finding:
    return run_one(name, root=root, recipe=RECIPE, config=config)


def test_good_lines_are_ok(trainer_root: Root, tmp_path: Path) -> None:
    found = check("data.lines", trainer_root, write_config(tmp_path))
    assert found.verdict == "ok", found
    assert any("train.jsonl: 8 lines" in line for line in found.evidence)


def test_carriage_returns_and_a_utf_8_mark_are_no_fault(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    data = tmp_path / "train.jsonl"
    data.write_bytes(b"\xef\xbb\xbf" + data.read_bytes().replace(b"\n", b"\r\n"))
    found = check("data.lines", trainer_root, config)
    assert found.verdict == "ok", found
    assert "starts with a UTF-8 mark" in " ".join(found.evidence)


def test_every_wrong_line_of_both_files_is_named_with_its_reason(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    rows = [
        talk("1?", "1."),
        '{"messages": [',
        "",
        json.dumps({"messages": []}),
        json.dumps({"messages": [{"role": "robot", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user", "content": "x"}]}),
        talk("1?", "half a smile: \ud83d"),
    ]
    (tmp_path / "train.jsonl").write_text("\n".join(rows))
    (tmp_path / "validation.jsonl").write_text('{"text": "x"}\n')
    found = check("data.lines", trainer_root, config)
    assert found.verdict == "failed"
    for line in (
        "line 2: not JSON",
        "line 4: the conversation is empty",
        "line 5: message 1 has the unknown role 'robot'",
        "line 6: no assistant turn",
        "line 7: message 2 holds half of a character (U+D83D)",
        'line 1: not a {"messages"',
    ):
        assert any(shown.startswith(line) for shown in found.evidence), line
    assert found.summary.startswith("6 lines of data")
    assert found.remedy == f"sed -n 2p {tmp_path / 'train.jsonl'}"


def test_twenty_of_many_wrong_lines_are_shown_and_all_are_counted(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "train.jsonl").write_text("no JSON\n" * 1000)
    found = check("data.lines", trainer_root, config)
    assert found.summary.startswith("1,000 lines")
    assert len([line for line in found.evidence if line.startswith("line ")]) == 20


@pytest.mark.parametrize(
    ("content", "told", "remedy"),
    [
        (b"", "has no lines", "wc "),
        (talk("1?", "1.").encode("utf-16"), "is UTF-16", "iconv -f UTF-16 -t UTF-8"),
        ('{"messages": "Là"}'.encode("latin-1"), "no conversation", "iconv -f ISO-8859-1"),
        (None, "can't be read", "ls -l"),
    ],
)
def test_a_file_that_is_empty_absent_or_no_utf_8_fails(
    trainer_root: Root, tmp_path: Path, content: bytes | None, told: str, remedy: str
) -> None:
    config = write_config(tmp_path)
    (tmp_path / "train.jsonl").unlink()
    if content is not None:
        (tmp_path / "train.jsonl").write_bytes(content)
    found = check("data.lines", trainer_root, config)
    assert found.verdict == "failed"
    assert told in found.summary
    assert remedy in str(found.remedy)


def test_conversations_that_are_in_both_files_are_counted(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    assert check("data.overlap", trainer_root, config).verdict == "ok"
    same = {"messages": [{"content": "5?", "role": "user"}, {"content": "It is 5.", "role": "assistant"}]}
    (tmp_path / "validation.jsonl").write_text(json.dumps(same) + "\n")
    found = check("data.overlap", trainer_root, config)
    assert found.verdict == "warning"
    assert found.summary.startswith("1 training conversations")
    assert "line 6 is line 1 of the other file" in found.evidence


def test_answers_beyond_seq_length_fail(trainer_root: Root, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    (tmp_path / "train.jsonl").write_text(f"{talk('q' * 99, 'answer')}\n" * 4)
    (finding,) = run_checks(
        Subject(RECIPE, trainer_root, None, config=config), Quiet(), choose_checks({"data.tokens"})
    )
    assert finding.verdict == "failed", finding
    assert "0 of 0 tokens would be trained, and 4 of 4 examples are left out" in finding.summary
    assert "4 left out (too long, or nothing trained within seq_length): 1; 2; 3; 4" in finding.evidence
    assert finding.remedy == "--set dataset.seq_length=109"

"""`trainer.inspect_data` shows which tokens are trained, or says why none is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from trainer.inspect_data import COLOUR_MARKS, inspect_data, main


def run(config: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["inspect_data", str(config), *arguments])
    return main()


def test_trained_tokens_are_marked_and_counted(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config_file, monkeypatch, "--examples", "2") == 0
    assert capsys.readouterr().out.splitlines() == [
        "line 1: 9 of 28 tokens trained (32.1%)",
        "<|user|>What is 0 and 0?<|end|><|assistant|>⟦It is 0.<|end|>⟧",
        "",
        "line 2: 9 of 28 tokens trained (32.1%)",
        "<|user|>What is 1 and 1?<|end|><|assistant|>⟦It is 2.<|end|>⟧",
        "",
        "train.jsonl: 12 examples, 115 of 347 tokens trained (33.1%), 0 truncated, 0 left out",
    ]


def test_the_config_decides_what_is_trained_and_where_it_is_cut(config_file: Path) -> None:
    overrides = ["dataset.train_on=all", "dataset.seq_length=20", "dataset.packing=true"]
    shown = list(inspect_data(config_file, overrides, examples=1, marks=COLOUR_MARKS))
    assert shown[1] == "<|user|>\x1b[1;32mWhat is 0 and 0?<|end|><|assistant|>I\x1b[0m"
    assert shown[-1].endswith("12 truncated, 0 left out; packed into 12 rows, 100.0% full")


def test_nothing_to_train_is_an_error_with_a_remedy(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(config_file, monkeypatch, "--set", "dataset.seq_length=10") == 3
    assert "no example to train on: 12 are too long" in (told := capsys.readouterr().err)
    assert "remedy: wc" in told
    broken = {"messages": [{"role": "user", "content": "x"}]}
    (config_file.parent / "train.jsonl").write_text(json.dumps(broken) + "\n")
    assert run(config_file, monkeypatch) == 3
    assert "line 1: no assistant turn" in capsys.readouterr().err

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import typer

import envbuilder.cli  # registers the commands
from envbuilder.cli.app import app
from envbuilder.doctor import CHECKS, explain_log
from envbuilder.doctor.signatures import Signature, known_in, remedy_for, signatures

LOGS = Path(__file__).parent / "logs"
TOPICS = {
    *("envbuilder", "compile", "link", "install", "import", "cuda", "memory", "nccl", "torchrun", "slurm"),
    *("files", "hub", "transformers", "triton", "peft", "fsdp"),
}


@pytest.mark.parametrize("signature", signatures(), ids=lambda signature: signature.id)
def test_a_signature_is_what_a_log_of_its_failure_is_explained_by(signature: Signature) -> None:
    first, *others = explain_log(str(LOGS / f"{signature.id}.log"))
    assert first.check == f"log.{signature.id}"
    assert first.verdict == ("warning" if signature.kind == "note" else "failed")
    assert first.remedy
    assert any(line.startswith("> ") for line in first.evidence)
    assert first.remedy not in [other.remedy for other in others]


def test_every_log_is_that_of_a_signature() -> None:
    assert {path.stem for path in LOGS.glob("*.log")} == {signature.id for signature in signatures()}


def test_there_are_at_least_sixty_signatures_of_every_topic_each_with_its_source() -> None:
    table = signatures()
    assert len(table) >= 60
    assert len({signature.id for signature in table}) == len(table)
    assert {signature.topic for signature in table} == TOPICS
    source = re.compile(r"reproduced|[A-Za-z0-9_.-]+#\d+")
    for signature in table:
        assert all(source.fullmatch(each) for each in re.split("[,;] ", signature.seen)), signature.id


def test_marks_are_long_enough_to_be_rare_and_patterns_are_regular_expressions() -> None:
    for signature in signatures():
        assert signature.marks, signature.id
        assert all(len(mark) >= 6 for mark in signature.marks), signature.id
        re.compile(signature.pattern)


@pytest.mark.parametrize("path", sorted((LOGS / "clean").glob("*.log")), ids=lambda path: path.stem)
def test_a_clean_log_of_a_real_build_or_run_raises_no_alarm(path: Path) -> None:
    (finding,) = explain_log(str(path))
    assert (finding.check, finding.verdict) == ("log.clean", "ok")
    assert finding.evidence == ()


def test_there_are_ten_clean_logs() -> None:
    assert len(list((LOGS / "clean").glob("*.log"))) >= 10


def commands_of(remedy: str) -> list[list[str]]:
    """The envbuilder commands in it, in words."""
    found = re.findall(r"envbuilder ((?:[a-z]+ )?[^;,&()]*)", remedy)
    return [shlex.split(words.replace("'", "")) for words in found]


def test_the_commands_that_remedies_name_are_there() -> None:
    assert envbuilder.cli.main is not None
    group = typer.main.get_command(app)
    assert hasattr(group, "commands")
    themes = {check.id for check in CHECKS} | {check.theme for check in CHECKS}
    for signature in signatures():
        for name, *words in commands_of(signature.remedy):
            command = group.commands.get(name)
            assert command is not None, f"{signature.id}: envbuilder {name}"
            if hasattr(command, "commands"):
                command = command.commands[words[0]]
            options = {option for param in command.params for option in param.opts}
            for word in words:
                assert not word.startswith("--") or word in {*options, "--root"}, f"{signature.id}: {word}"
            asked = {words[at + 1] for at, word in enumerate(words) if word == "--only"}
            assert asked <= themes, f"{signature.id}: {asked}"


def test_the_particular_comes_before_the_general_in_one_line() -> None:
    assert known_in("ModuleNotFoundError: No module named 'torch'") is not None
    for line, identity in (
        ("ModuleNotFoundError: No module named 'torch'", "build-isolated"),
        ("ModuleNotFoundError: No module named 'selective_scan_cuda'", "extension-missing"),
        ("ModuleNotFoundError: No module named 'einops'", "python-module-missing"),
        (
            "ImportError: libcudart.so.12: cannot open shared object file: No such file",
            "cuda-library-missing",
        ),
        ("ImportError: libaio.so.1: cannot open shared object file: No such file", "shared-library-missing"),
    ):
        signature = known_in(line)
        assert signature is not None
        assert signature.id == identity


def test_remedies_are_given_for_an_errors_text_and_the_users_recipe() -> None:
    text = "selective_scan_cuda: undefined symbol: _ZN3c104cuda9SetDeviceEa"
    assert remedy_for(text, "recipes/mine.toml") == (
        "envbuilder compile recipes/mine.toml --local --rebuild && envbuilder install recipes/mine.toml"
    )
    assert remedy_for("ninja: build stopped: subcommand failed.\nx: " + text, "r.toml") == (
        "envbuilder compile r.toml --local --rebuild && envbuilder install r.toml"
    )
    assert remedy_for("all is well", "recipes/mine.toml") is None

"""`compile`'s options for a job, and `status`, as the command line has them; without Slurm."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.cli import main
from envbuilder.cli.submitting import typed_again
from envbuilder.model import EnvReceipt
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.session import Session
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_wheel

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs `envbuilder WORDS` in an empty folder on a machine that has no Slurm."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENVBUILDER_ROOT", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "no-programs"))

    def envbuilder(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["envbuilder", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capsys.readouterr()
        return int(ended.value.code or 0), captured.out, captured.err

    return envbuilder


@pytest.mark.parametrize(
    "option", [["--requeue"], ["--after", "5"], ["--wait-for-qos"], ["--print-script"], ["--dry-run"]]
)
def test_options_of_a_job_go_with_sbatch(run: Run, option: list[str]) -> None:
    code, _, error = run("compile", "r.toml", *option)
    assert code == 2
    assert "they go with --sbatch" in error


def test_a_script_is_printed_without_slurm_and_without_an_env(run: Run, tmp_path: Path) -> None:
    section = 'walltime = "00:30:00"\ncpus = 4\n'
    (tmp_path / "mine.toml").write_text(f'name = "mine"\n[build]\n{section}[train]\n{section}')
    words = ("train", "c.yaml", "--recipe", "one", "--sbatch", "--site", "mine.toml", "--print-script")
    code, out, _ = run(*words)
    assert code == 0
    assert out.startswith(
        "#!/bin/bash\n#SBATCH --job-name=envbuilder-train-c\n#SBATCH --propagate=NONE\n"
        "#SBATCH --time=00:30:00\n"
    )
    assert out.endswith(f"train {tmp_path}/c.yaml --run c --recipe one\n")
    assert json.loads(run("--json", *words)[1]) == {"script": out}
    assert not (tmp_path / ".envbuilder").exists()


SITE = """
name = "mine"
allow-chain = {chain}
[build]
walltime = "00:30:00"
cpus = 4
[train]
walltime = "00:30:00"
cpus = 4
"""


@pytest.fixture(params=["compile", "train"])
def printed(
    request: pytest.FixtureRequest, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """`envbuilder compile` or `train` with some options, for the script of a job at a site with `chain`."""
    recipe = Recipe.model_validate({"name": "one", "requirements": ["x"], "trainer": False})
    (tmp_path / "one.toml").write_text('name = "one"\nrequirements = ["x"]\ntrainer = false\n')
    (tmp_path / "files").mkdir()
    wheel = make_wheel(tmp_path / "files", "x", "1")
    make_bundle(Root(tmp_path / ".envbuilder"), recipe, {wheel: ["runtime"]}, python="3.11")
    # The bundle's lock was not made from the recipe, but by hand.
    monkeypatch.setattr(Session, "_check_current", lambda *_: None)
    words = {"compile": ["compile", "one.toml"], "train": ["train", "c.yaml", "--recipe", "one"]}

    def asked(*options: str, chain: bool) -> tuple[int, str, str]:
        (tmp_path / "mine.toml").write_text(SITE.format(chain=str(chain).lower()))
        return run(*words[request.param], "--sbatch", "--site", "mine.toml", "--print-script", *options)

    return asked


@pytest.mark.parametrize(
    ("chain", "options", "requeued"),
    [(True, [], True), (True, ["--no-requeue"], False), (True, ["--requeue"], True), (False, [], False)],
)
def test_the_site_says_whether_a_job_runs_itself_again_unless_the_command_does(
    printed: Callable[..., tuple[int, str, str]], chain: bool, options: list[str], requeued: bool
) -> None:
    code, script, error = printed(*options, chain=chain)
    assert code == 0, error
    assert ("#SBATCH --requeue\n" in script) == script.endswith(" --requeue-job\n") == requeued


def test_a_job_that_the_site_does_not_allow_to_run_itself_again_is_refused(
    printed: Callable[..., tuple[int, str, str]],
) -> None:
    code, script, error = printed("--requeue", chain=False)
    assert (code, script) == (2, "")
    assert "The site mine does not say that a job may put itself back into the queue." in error
    assert "Set allow-chain = true in the site file" in error


def test_the_option_that_a_job_gets_is_hidden(run: Run) -> None:
    code, out, _ = run("compile", "--help")
    assert code == 0
    assert "--no-wait" in out
    assert "--requeue-job" not in out


def env(root: Path, recipe: str) -> None:
    receipt = EnvReceipt(
        recipe=recipe, lock_sha256="0" * 64, python="3.11.2", compute_capabilities=(), packages=(),
        extensions=(), provided=None, created_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    folder = root / "envs" / recipe
    folder.mkdir(parents=True)
    (folder / "envbuilder.json").write_text(receipt.model_dump_json())


def test_status_shows_what_is_on_the_disk(run: Run, tmp_path: Path) -> None:
    root = tmp_path / ".envbuilder"
    env(root, "one")
    env(root, "two")
    (root / "envs" / "three").mkdir()
    (root / "envs" / "three" / "envbuilder.json").write_text("{")
    (tmp_path / "one.toml").write_text('name = "one"\nrequirements = ["x==1"]\n')
    code, out, _ = run("--json", "status")
    answer = json.loads(out)
    assert code == 0
    assert (answer["jobs"], answer["slurm"]) == ([], "There is no Slurm on this machine.")
    assert [entry["recipe"] for entry in answer["envs"]] == ["one", "two"]
    assert [entry["recipe"] for entry in json.loads(run("--json", "status", "one.toml")[1])["envs"]] == [
        "one"
    ]
    out = run("status")[1]
    assert "There is no Slurm on this machine." in out
    assert f"{root / 'envs' / 'one'}  Python 3.11.2, 0 packages" in out


def test_status_of_nothing_says_so(run: Run) -> None:
    code, out, _ = run("status")
    assert code == 0
    assert "nothing" in out


@pytest.mark.parametrize("job", ["x", "1;2"])
def test_what_is_no_job_is_not_followed(run: Run, job: str) -> None:
    code, _, error = run("status", "--follow", job)
    assert code == 3
    assert "is no job's number" in error


def test_the_command_to_go_on_can_be_typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ENVBUILDER_ROOT", raising=False)
    words = ["compile", "my recipe.toml", "--sbatch"]
    assert typed_again(Root.resolve(None), words) == "envbuilder compile 'my recipe.toml' --sbatch"
    assert typed_again(Root(tmp_path), words) == (
        f"envbuilder --root {tmp_path} compile 'my recipe.toml' --sbatch"
    )
    monkeypatch.setenv("ENVBUILDER_ROOT", os.fspath(tmp_path))
    assert typed_again(Root(tmp_path), words).startswith("envbuilder compile")

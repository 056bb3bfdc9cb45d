"""The command line: what is printed, and with which exit code it ends."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Run
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist, make_wheel


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe of one wheel and one package that is built from its sdist, for the running Python alone."""
    minor = sys.version_info.minor
    path = tmp_path / "recipes/small.toml"
    path.parent.mkdir()
    path.write_text(
        f"""
name = "small"
requirements = ["plain==1.0", "compiled==2.0"]
trainer = false
[target]
python = ">=3.{minor},<3.{minor + 1}"
[build.compiled]
[index]
plain = "lab"
compiled = "lab"
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture
def lab_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IndexServer]:
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, "plain", "1.0")
    make_sdist(folder, "compiled", "2.0", requires=["plain"], files={"compiled.py": "import plain\n"})
    with IndexServer(folder) as server:
        monkeypatch.setenv("ENVBUILDER_INDEX_LAB_URL", server.url)
        yield server


def error_of(output: str) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(output)
    assert error["remedy"]
    return error


def test_version_is_printed(run: Run) -> None:
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "envbuilder")


def test_an_error_is_a_sentence_its_context_and_a_remedy(run: Run, tmp_path: Path) -> None:
    code, _, err = run("fetch", "recipes/absent.toml")
    assert code == 3
    assert "error: There is no recipe at recipes/absent.toml." in err
    assert "remedy:" in err


def test_an_unknown_key_in_a_recipe_is_named_and_ends_with_3(run: Run, recipe: Path) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("trainer", "trainr"), encoding="utf-8")
    code, out, _ = run("--json", "lock", recipe)
    error = error_of(out)
    assert (code, error["exit_code"]) == (3, 3)
    assert "trainr: unknown key" in error["message"]


def test_a_missing_lock_is_named_with_the_command_that_makes_it(run: Run, recipe: Path) -> None:
    code, out, _ = run("--json", "lock", "--check", recipe)
    assert code == 3
    assert error_of(out)["remedy"].startswith("envbuilder lock ")


def test_a_missing_bundle_ends_with_7_and_says_to_fetch(run: Run, recipe: Path) -> None:
    code, out, _ = run("--json", "compile", recipe, "--local")
    assert code == 7
    assert "envbuilder fetch" in error_of(out)["remedy"]


def test_a_missing_interpreter_ends_with_7(run: Run, recipe: Path) -> None:
    code, out, _ = run("--json", "install", recipe, "--python", "/no/such/python")
    assert code == 7
    assert "/no/such/python" in error_of(out)["message"]


@pytest.mark.parametrize("words", [["--sbatch"], ["--site", "lab"], ["--local", "--sbatch", "--site", "lab"]])
def test_contradicting_options_end_with_2(run: Run, recipe: Path, words: list[str]) -> None:
    code, out, _ = run("--json", "compile", recipe, *words)
    assert code == 2
    assert error_of(out)["error"] == "UsageError"


def test_training_without_an_env_ends_with_7(run: Run, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text("device: cpu\n", encoding="utf-8")
    code, out, _ = run("--json", "train", config, "--recipe", "small")
    assert code == 7
    assert "envbuilder install" in error_of(out)["remedy"]


def test_doctor_lists_its_checks(run: Run) -> None:
    code, out, _ = run("--json", "doctor", "--list")
    ids = [check["id"] for check in json.loads(out)["checks"]]
    assert code == 0
    assert "storage.free-space" in ids
    assert len(ids) == len(set(ids))


def test_doctor_runs_one_check_alone(run: Run) -> None:
    code, out, _ = run("--json", "doctor", "--only", "storage.free-space")
    findings = json.loads(out)["findings"]
    assert [finding["check"] for finding in findings] == ["storage.free-space"]
    assert code == (8 if findings[0]["verdict"] == "failed" else 0)


def test_an_unknown_check_ends_with_2(run: Run) -> None:
    code, out, _ = run("--json", "doctor", "--only", "no.such-check")
    assert code == 2
    assert "no.such-check" in error_of(out)["message"]


def test_from_recipe_to_env_through_every_command(run: Run, recipe: Path, lab_index: IndexServer) -> None:
    code, out, _ = run("--json", "lock", recipe)
    assert code == 0, out
    lock = Path(json.loads(out)["lock"])
    assert lock.name == "pylock.small.toml"
    assert "://" not in lock.read_text(encoding="utf-8")
    assert run("lock", "--check", recipe)[0] == 0

    code, out, _ = run("--json", "fetch", recipe)
    assert code == 0, out
    assert json.loads(out)["transferred_files"] > 0
    assert json.loads(run("--json", "fetch", recipe)[1])["transferred_files"] == 0

    code, out, _ = run("--json", "compile", recipe, "--local")
    assert code == 0, out
    assert [wheel["receipt"]["package"] for wheel in json.loads(out)["wheels"]] == ["compiled"]
    assert json.loads(run("--json", "compile", recipe)[1])["reused"] == ["compiled"]

    code, out, err = run("doctor", recipe)
    assert code == 0, out + err

    recipe.write_text(
        recipe.read_text(encoding="utf-8").replace("plain==1.0", "plain==1.1"), encoding="utf-8"
    )
    code, out, _ = run("--json", "lock", "--check", recipe)
    assert code == 7
    assert "has changed" in error_of(out)["message"]


def test_a_bundle_is_verified_mended_packed_unpacked_and_accounted_for(
    run: Run, recipe: Path, lab_index: IndexServer, tmp_path: Path
) -> None:
    code, out, _ = run("--json", "fetch", recipe)
    assert code == 0, out
    files = json.loads(out)["files"]
    code, out, _ = run("--json", "bundle", "verify", "small")
    assert code == 0, out
    assert json.loads(out)["files"] > files

    wheel = tmp_path / ".envbuilder/bundles/small/files/plain-1.0-py3-none-any.whl"
    wheel.chmod(0o640)
    content = wheel.read_bytes()
    wheel.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    code, out, _ = run("--json", "bundle", "verify", "small")
    assert code == 5
    assert "files/plain-1.0-py3-none-any.whl" in error_of(out)["context"]
    assert run("fetch", recipe, "--verify")[0] == 0
    assert run("bundle", "verify", "small")[0] == 0

    code, out, _ = run("--json", "bundle", "pack", "small", "--output", tmp_path / "small.tar")
    assert code == 0, out
    digest = json.loads(out)["manifest_sha256"]
    there = tmp_path / "there"
    code, out, _ = run("--json", "--root", there, "bundle", "unpack", tmp_path / "small.tar")
    assert code == 0, out
    assert json.loads(out)["manifest_sha256"] == digest
    assert run("--root", there, "bundle", "verify", "small")[0] == 0
    tampered = ("--manifest-sha256", "0" * 64)
    assert run("--root", tmp_path / "no", "bundle", "unpack", tmp_path / "small.tar", *tampered)[0] == 5
    assert not (tmp_path / "no/bundles/small").exists()

    code, out, _ = run("--json", "bundle", "diff", "small", there / "bundles/small")
    assert (code, json.loads(out)["changes"]) == (0, [])
    assert run("bundle", "diff", "small", tmp_path / "elsewhere/small")[0] == 2

    code, out, _ = run("bundle", "sbom", "small")
    assert code == 0
    assert "plain" in {component["name"] for component in json.loads(out)["components"]}

    code, out, _ = run("--json", "bundle", "gc", "--dry-run")
    assert (code, json.loads(out)["removed"]) == (0, [])


def test_a_lock_keeps_versions_upgrades_them_and_says_what_changed(
    run: Run, recipe: Path, lab_index: IndexServer, tmp_path: Path
) -> None:
    recipe.write_text(recipe.read_text(encoding="utf-8").replace("plain==1.0", "plain"), encoding="utf-8")
    assert run("lock", recipe)[0] == 0
    old = tmp_path / "pylock.old.toml"
    old.write_bytes((tmp_path / "lockfiles/pylock.small.toml").read_bytes())
    make_wheel(tmp_path / "index", "plain", "1.5")

    assert json.loads(run("--json", "lock", recipe)[1])["changes"] == []
    code, out, _ = run("--json", "lock", recipe, "--upgrade=absent")
    assert code == 3
    assert "absent" in error_of(out)["message"]
    (change,) = json.loads(run("--json", "lock", recipe, "--upgrade=plain")[1])["changes"]
    assert "plain" in change
    assert "1.5" in change
    code, out, _ = run("lock", recipe, "--diff", old)
    assert code == 0
    assert "1.5" in out
    assert run("lock", recipe, "--diff", old, "--upgrade")[0] == 2


def test_a_lock_is_made_for_a_probed_machine(run: Run, recipe: Path, lab_index: IndexServer) -> None:
    code, out, _ = run("--json", "probe")
    assert code == 0, out
    assert json.loads(Path("target.json").read_text(encoding="utf-8"))["machine"]
    code, out, _ = run("--json", "lock", recipe, "--target", "target.json")
    assert code == 0, out
    assert run("lock", "--check", recipe)[0] == 0
    record = json.loads(Path("target.json").read_text(encoding="utf-8"))
    record["interpreter"]["version"] = "3.9.1"
    Path("target.json").write_text(json.dumps(record), encoding="utf-8")
    code, out, _ = run("--json", "lock", recipe, "--target", "target.json")
    assert code == 7
    assert "3.9" in error_of(out)["message"]

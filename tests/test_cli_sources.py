"""A recipe with a git source, a patch and a model, from lock to env, through the command line."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envbuilder.cli import main
from envbuilder.lock import read_lock
from tests.lab.hub_server import HubServer

PATCH = """\
--- a/compiled.py
+++ b/compiled.py
@@ -1 +1 @@
-ORIGIN = "git"
+ORIGIN = "git, patched"
"""
WEIGHTS = bytes(range(256)) * 5000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    folder = tmp_path / "hub/owner/tiny"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    (folder / "model.safetensors").write_bytes(WEIGHTS)
    (folder / "pytorch_model.bin").write_bytes(b"never")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    with HubServer(tmp_path / "hub") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def commit(folder: Path, files: dict[str, str]) -> str:
    """A git repository with these files; the commit."""
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text)
    identity = ("-c", "user.name=lab", "-c", "user.email=lab@example.org")
    for words in (["init", "--quiet"], ["add", "."], [*identity, "commit", "--quiet", "-m", "first"]):
        subprocess.run(["git", *words], cwd=folder, check=True)
    done = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def recipe(tmp_path: Path, hub: HubServer) -> Path:
    source = tmp_path / "source"
    found = commit(
        source,
        {
            "compiled.py": 'ORIGIN = "git"\n',
            "pyproject.toml": '[build-system]\nrequires = ["setuptools"]\n'
            'build-backend = "setuptools.build_meta"\n'
            '[project]\nname = "compiled"\nversion = "2.0"\nlicense = "MIT"\ndependencies = []\n'
            '[tool.setuptools]\npy-modules = ["compiled"]\n',
        },
    )
    patch = tmp_path / "recipes/patches/origin.patch"
    patch.parent.mkdir(parents=True)
    patch.write_text(PATCH)
    path = tmp_path / "recipes/sources.toml"
    path.write_text(
        f"""
name = "sources"
requirements = ["compiled"]
trainer = false
[target]
python = "==3.{sys.version_info.minor}.*"
[build.compiled]
patches = ["patches/origin.patch"]
[build.compiled.git]
url = "file://{source}"
commit = "{found}"
[model.tiny]
repo = "owner/tiny"
"""
    )
    return path


def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> dict[str, Any]:
    """The JSON of a command; a failed one has an exit_code in it."""
    monkeypatch.setattr(sys, "argv", ["envbuilder", "--json", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        main()
    answer: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert int(ended.value.code or 0) == answer.get("exit_code", 0)
    return answer


def test_git_patch_and_model_come_into_the_bundle_and_the_patched_wheel_into_the_env(
    recipe: Path,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ENVBUILDER_ROOT", raising=False)

    made = run(monkeypatch, capsys, "lock", recipe)
    assert made["models"] == 1, made
    lock = read_lock(Path(made["lock"]))
    assert "://" not in lock.text
    assert lock.package_table("compiled")["license"] == "MIT"
    (model,) = lock.models
    assert [file.name for file in model.files] == ["README.md", "config.json", "model.safetensors"]

    fetched = run(monkeypatch, capsys, "fetch", recipe)
    bundle = Path(fetched["bundle"])
    assert (bundle / "models/tiny/model.safetensors").read_bytes() == WEIGHTS
    assert (bundle / "patches/origin.patch").read_text() == PATCH
    assert run(monkeypatch, capsys, "fetch", recipe)["transferred_files"] == 0
    assert "exit_code" not in run(monkeypatch, capsys, "bundle", "verify", "sources")

    # Everything after the fetch is offline: neither the sources nor the hub are needed any more.
    (tmp_path / "source").rename(tmp_path / "gone")
    built = run(monkeypatch, capsys, "compile", bundle / "recipe.toml", "--local")
    assert "exit_code" not in built, built
    python = Path(built["env"]) / "bin/python"
    said = subprocess.run(
        [python, "-c", "import compiled; print(compiled.ORIGIN)"], capture_output=True, text=True, check=True
    )
    assert said.stdout == "git, patched\n"

    (tmp_path / "recipes/patches/origin.patch").write_text(PATCH.replace("patched", "changed"))
    moved = run(monkeypatch, capsys, "lock", "--check", recipe)
    assert (moved["exit_code"], moved["error"]) == (7, "MismatchError")


def test_a_model_keeps_its_commit_until_it_is_upgraded(
    recipe: Path,
    hub: HubServer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    first = read_lock(Path(run(monkeypatch, capsys, "lock", recipe)["lock"])).models[0].commit
    newer = shutil.copytree(tmp_path / "hub/owner/tiny", tmp_path / "newer")
    (newer / "config.json").write_text('{"model_type": "llama", "new": 1}')
    second = hub.publish("owner/tiny", newer)
    assert second != first
    assert read_lock(Path(run(monkeypatch, capsys, "lock", recipe)["lock"])).models[0].commit == first
    upgraded = run(monkeypatch, capsys, "lock", recipe, "--upgrade=tiny")
    assert read_lock(Path(upgraded["lock"])).models[0].commit == second
    assert any("tiny" in change for change in upgraded["changes"])

"""A model that the machine has, all the way: locked, verified, looked at and trained from where it lies."""

from __future__ import annotations

import hashlib
import json
import platform
import random
import shutil
from array import array
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
from packaging.utils import canonicalize_name

from envbuilder.requirements import required_name, trainer_requires
from tests.conftest import Quickstart, Run
from tests.doctor.training import write_config
from tests.lab.hub_server import HubServer
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel
from tests.promises.conftest import publish_tools

pytestmark = pytest.mark.needs_env

RECIPE = """
name = "small"
requirements = ["one"]
[target]
python = "=={minor}.*"
[model.tiny]
repo = "owner/tiny"
provided = "{folder}"
[provided]
python = "{python}"
packages = {packages}
"""
WEIGHTS = "model-00001-of-00002.safetensors"


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """The model's folder on this machine, with weights at random; a training config lies beside it."""
    folder = tmp_path / "shared/tiny"
    folder.parent.mkdir()
    write_config(
        tmp_path,
        device="device: cuda=device: cpu",
        model=f"name_or_path: small=name_or_path: {folder}",
        steps="max_steps: 10=max_steps: 2",
    )
    (tmp_path / "small").rename(folder)
    draw = random.Random(1)
    for path in folder.glob("*.safetensors"):
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        numbers = array("f", (draw.gauss(0, 0.1) for _ in range((len(content) - start) // 4)))
        path.write_bytes(content[:start] + numbers.tobytes())
    return folder


@pytest.fixture
def of_the_env(quickstart: Quickstart) -> dict[str, str]:
    """What the trainer requires, with the versions that the quickstart env has of it."""
    (site_packages,) = (quickstart.root / "envs/quickstart/lib").glob("python3.*/site-packages")
    installed = {canonicalize_name(one.name): one.version for one in distributions(path=[str(site_packages)])}
    return {name: installed[name] for name in map(required_name, trainer_requires())}


@pytest.fixture
def recipe(
    tmp_path: Path,
    shared: Path,
    quickstart: Quickstart,
    of_the_env: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
) -> Path:
    minor = ".".join(platform.python_version_tuple()[:2])
    path = tmp_path / "recipes/small.toml"
    path.parent.mkdir()
    path.write_text(
        RECIPE.format(minor=minor, folder=shared, python=quickstart.python, packages=list(of_the_env))
    )
    variables = {"HOME": str(tmp_path), "NO_PROXY": "*", "no_proxy": "*", "OMP_NUM_THREADS": "1"}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    return path


def state(folder: Path) -> dict[str, tuple[int, int, str]]:
    """Of each file below `folder` its inode, time and sha256."""
    return {
        str(path): (
            path.stat().st_ino,
            path.stat().st_mtime_ns,
            hashlib.sha256(path.read_bytes()).hexdigest(),
        )
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture
def served(
    tmp_path: Path, shared: Path, of_the_env: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[HubServer]:
    """An index whose wheels stand in for what the env has, and a hub with the same model."""
    index, hub = tmp_path / "index", tmp_path / "hub"
    index.mkdir()
    publish_tools(index)
    for name, version in {"one": "1.0", **of_the_env}.items():
        make_wheel(index, name, version)
    shutil.copytree(shared, hub / "owner/tiny")
    with IndexServer(index) as packages, HubServer(hub) as models:
        monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", packages.url)
        monkeypatch.setenv("HF_ENDPOINT", models.endpoint)
        yield models


def test_a_provided_model_is_trained_from_where_it_lies_and_a_changed_byte_is_found(
    run: Run, recipe: Path, shared: Path, served: HubServer, tmp_path: Path
) -> None:
    def answer(*words: str | Path, exit_code: int = 0) -> Any:
        code, out, err = run("--json", *words)
        assert code == exit_code, out + err
        return json.loads(out or err)

    def looked_at(exit_code: int = 0) -> dict[str, Any]:
        checks = ("model.lock", "model.bytes", "model.weights")
        only = [word for check in checks for word in ("--only", check)]
        told = answer("doctor", recipe, "--config", config, *only, exit_code=exit_code)
        return {one["check"]: one for one in told["findings"]}

    config, before = tmp_path / "config.yaml", state(shared)
    answer("lock", recipe)
    answer("fetch", recipe)
    answer("install", recipe)
    found = looked_at()
    assert [one["verdict"] for one in found.values()] == ["ok"] * 3
    assert str(shared) in found["model.bytes"]["evidence"]

    answer("train", config, "--recipe", "small", "--run", "first")
    folder = tmp_path / ".envbuilder/runs/first"
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [one["step"] for one in records if one["kind"] == "step"] == [1, 2]
    assert (folder / "adapter/adapter_model.safetensors").exists()
    # Neither read from the hub, nor written to, nor copied.
    assert served.content_requests == []
    assert state(shared) == before
    weights = {sha256 for name, (_, _, sha256) in before.items() if name.endswith(".safetensors")}
    assert not weights & {sha256 for _, _, sha256 in state(tmp_path / ".envbuilder").values()}

    content = bytearray((shared / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (shared / WEIGHTS).write_bytes(content)
    found = looked_at(exit_code=8)
    assert [one["verdict"] for one in found.values()] == ["ok", "failed", "ok"]
    assert WEIGHTS in found["model.bytes"]["evidence"][1]
    assert str(shared / WEIGHTS) in answer("fetch", recipe, exit_code=5)["context"]
    assert str(shared / WEIGHTS) in answer("bundle", "verify", "small", exit_code=5)["context"]

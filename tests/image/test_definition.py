"""The definition file for a SIF: its sections, and shell that a shell can read."""

from __future__ import annotations

import platform
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from envbuilder.errors import InputError
from envbuilder.image.definition import PLACE, Base, definition
from envbuilder.model import BuiltWheel, Bundle
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.wheelhouse import all_built
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_wheel
from tests.test_install import bundle_of

MINOR = ".".join(platform.python_version_tuple()[:2])
DOCKER = Base("docker", "site-base:1")


def sections(text: str) -> dict[str, str]:
    """Section → its body, by Apptainer's rule: a line that begins with % opens one. The header is ""."""
    parts = re.split(r"(?m)^%(\w+)\s*\n", text)
    return {"": parts[0], **dict(zip(parts[1::2], parts[2::2], strict=True))}


def header(text: str) -> dict[str, str]:
    lines = (line for line in sections(text)[""].splitlines() if line and not line.startswith("#"))
    return {key: value.strip() for key, value in (line.split(":", 1) for line in lines)}


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return bundle_of(tmp_path)


@pytest.fixture
def wheels(tmp_path: Path, bundle: Bundle) -> list[BuiltWheel]:
    return list(all_built(Root(tmp_path / "root")))


def test_it_has_the_sections_that_apptainer_knows_each_once(bundle: Bundle, wheels: list[BuiltWheel]) -> None:
    text = definition(bundle, wheels, DOCKER, ["one"])
    assert header(text) == {"Bootstrap": "docker", "From": "site-base:1"}
    assert re.findall(r"(?m)^%(\w+)", text) == [
        "files", "post", "environment", "runscript", "test", "labels",
    ]  # fmt: skip
    for name in ("post", "environment", "runscript", "test"):
        subprocess.run(["sh", "-n"], input=sections(text)[name], text=True, check=True)


def test_no_network_place_is_named_beside_the_base(bundle: Bundle, wheels: list[BuiltWheel]) -> None:
    text = definition(bundle, wheels, DOCKER, ["one"])
    assert "://" not in text
    assert not re.search(r"\b[\w-]+\.(io|com|org|net)\b", text)


def test_files_are_copied_to_where_the_commands_look_for_them(
    bundle: Bundle, wheels: list[BuiltWheel], tmp_path: Path
) -> None:
    (bundle.path / "models/large").mkdir(parents=True)
    parts = sections(definition(bundle, wheels, DOCKER, ["one"]))
    copied = dict(line.split() for line in parts["files"].splitlines() if line.strip())
    assert all(Path(source).exists() for source in copied)
    inside = f"{PLACE}/bundles/lab"
    assert {f"{inside}/{name}" for name in ("bundle.json", "files", "tool", "pylock.lab.toml")} <= set(
        copied.values()
    )
    assert copied[str(tmp_path / "root/wheelhouse/built-2.0-abc")] == f"{PLACE}/wheelhouse/built-2.0-abc"
    assert not any("models" in source for source in copied), "a model is data, and no part of an env"
    commands = [shlex.split(line, comments=True) for line in parts["post"].splitlines()]
    assert [f"python{MINOR}", f"{inside}/start.py", f"{PLACE}/tool"] in commands
    tool = f"{PLACE}/tool/bin/envbuilder"
    assert [tool, "--root", PLACE, "install", f"{inside}/recipe.toml"] in commands


def test_labels_environment_and_test_are_of_the_env(bundle: Bundle, wheels: list[BuiltWheel]) -> None:
    parts = sections(definition(bundle, wheels, DOCKER, ["torch", "one"]))
    labels = dict(line.split() for line in parts["labels"].splitlines() if line.strip())
    assert labels["envbuilder.lock.sha256"] == bundle.lock.digest
    done = subprocess.run(
        ["sh", "-c", parts["environment"] + "\necho $PATH"],
        env={"PATH": "/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [f"{PLACE}/envs/lab/bin:/bin"]
    assert shlex.split(parts["test"])[1:] == ["-c", "import torch; import one"]


def test_a_path_with_a_space_can_t_be_named(tmp_path: Path) -> None:
    root = Root(tmp_path / "my root")
    one = make_wheel(tmp_path, "one", "1.0")
    recipe = Recipe.model_validate({"name": "lab", "requirements": ["one"]})
    bundle = make_bundle(root, recipe, {one: ["runtime"]}, python=MINOR)
    with pytest.raises(InputError, match="space"):
        definition(bundle, [], DOCKER, ["one"])


@pytest.mark.parametrize(
    ("text", "agent", "source"),
    [
        ("docker:site-base:1", "docker", "site-base:1"),
        ("docker://site-base", "docker", "site-base"),
        ("oras://group/image", "oras", "group/image"),
    ],
)
def test_a_base_is_named_as_apptainer_names_it(text: str, agent: str, source: str) -> None:
    assert Base.read(text) == Base(agent, source)


def test_a_base_on_this_disk_is_a_local_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "base.sif").touch()
    monkeypatch.chdir(tmp_path)
    assert Base.read("base.sif") == Base("localimage", str(tmp_path / "base.sif"))
    for missing in ("other.sif", "docker:", "docker://", "a/b:c"):
        with pytest.raises(InputError, match="no image"):
            Base.read(missing)

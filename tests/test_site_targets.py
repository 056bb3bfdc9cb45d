"""The machine records of the shipped sites: they fit their site files, and locks are made for them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from envbuilder.cli import main
from envbuilder.errors import MismatchError
from envbuilder.gpu import architecture
from envbuilder.lock import read_lock
from envbuilder.machine import MachineRecord, read_machine
from envbuilder.recipe import load_recipe
from envbuilder.requirements import tool_requires
from envbuilder.resolve.gpus import check_cuda
from envbuilder.resolve.kept import Resolution
from envbuilder.site import in_bytes, load_site
from envbuilder.target import narrow_target, python_versions, target_for
from tests.conftest import REPOSITORY
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel

SITES = REPOSITORY / "recipes" / "sites"
NAMES = sorted(path.name.removesuffix(".target.json") for path in SITES.glob("*.target.json"))


def record(name: str) -> MachineRecord:
    return read_machine(SITES / f"{name}.target.json")


def test_every_real_site_has_one() -> None:
    made_up = {"generic", "lab"}
    assert set(NAMES) == {path.stem for path in SITES.glob("*.toml")} - made_up


@pytest.mark.parametrize("name", NAMES)
def test_it_is_a_node_of_its_site(name: str) -> None:
    machine, site = record(name), load_site(str(SITES / f"{name}.toml"))
    job = site.train
    assert len(machine.gpus) == job.gpus
    assert job.cpus <= machine.cpus
    assert machine.memory_bytes is not None
    assert job.memory is None or in_bytes(job.memory) <= machine.memory_bytes
    for gpu in machine.gpus:
        assert gpu.compute_capability is not None
        assert architecture(gpu.compute_capability)
        if job.gpu_memory and gpu.memory_bytes:
            assert 0.9 * gpu.memory_bytes < in_bytes(job.gpu_memory) <= gpu.memory_bytes


@pytest.mark.parametrize("name", NAMES)
def test_the_site_s_file_says_where_it_comes_from_and_what_is_open(name: str) -> None:
    text = (SITES / f"{name}.toml").read_text(encoding="utf-8")
    assert f"{name}.target.json" in text
    assert "https://" in text
    assert "envbuilder probe" in text


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An index that has what envbuilder needs, and `native` for every machine of NAMES and for others."""
    folder = tmp_path / "served"
    folder.mkdir()
    for text in tool_requires():
        (least,) = Requirement(text).specifier
        make_wheel(folder, Requirement(text).name, least.version)
    for python in ("cp310", "cp311", "cp312", "cp313"):
        for platform in ("2_28_x86_64", "2_28_aarch64", "2_39_x86_64", "2_39_aarch64"):
            make_wheel(folder, "native", "1.0", tag=f"{python}-{python}-manylinux_{platform}")
    with IndexServer(folder) as server:
        monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", server.url)
        yield


@pytest.mark.usefixtures("index")
@pytest.mark.parametrize("name", NAMES)
def test_a_lock_is_made_for_it(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tmp_path / "demo.toml"
    recipe.write_text('name = "demo"\nrequirements = ["native"]\ntrainer = false\n', encoding="utf-8")
    words = ["lock", str(recipe), "--lockfiles", str(tmp_path)]
    words += ["--target", str(SITES / f"{name}.target.json")]
    monkeypatch.setattr(sys, "argv", ["envbuilder", "--root", str(tmp_path / "root"), *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert not ended.value.code
    machine, lock = record(name), read_lock(tmp_path / "pylock.demo.toml")
    minor = ".".join(machine.interpreter.version.split(".")[:2])
    assert (lock.target.machine, lock.target.glibc) == (machine.machine, machine.glibc)
    (native,) = (file for file in lock.select(target_for(lock.target, minor)) if file.package == "native")
    tag = f"cp{minor.replace('.', '')}"
    assert native.filename == f"native-1.0-{tag}-{tag}-manylinux_2_28_{machine.machine}.whl"


def test_a_recipe_that_compiles_for_other_gpus_is_refused_before_any_index_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "demo.toml"
    recipe.write_text(
        'name = "demo"\nrequirements = ["native"]\ntrainer = false\n[build.native]\n'
        '[cuda]\ncompute-capabilities = ["9.0"]\ntoolchain = "system"\n',
        encoding="utf-8",
    )
    words = ["--json", "--root", str(tmp_path / "root"), "lock", str(recipe), "--lockfiles", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["envbuilder", *words, "--target", str(SITES / "leonardo.target.json")])
    monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == MismatchError.exit_code
    error = json.loads(capsys.readouterr().out)
    assert "none of that code runs on the probed machine's NVIDIA A100-SXM-64GB" in error["message"]
    assert error["remedy"].startswith('Write compute-capabilities = ["8.0"] under [cuda]')


def shipped_resolution(recipe: str) -> Resolution:
    """What the committed lock of `recipe` was resolved to."""
    lock = read_lock(REPOSITORY / f"lockfiles/pylock.{recipe}.toml")
    python = python_versions(lock.target)[0]
    files = lock.select(target_for(lock.target, python))
    return {"runtime": {python: {file.package: file.version for file in files}}}


def test_leonardo_takes_the_guide_s_recipes_and_no_cuda_13() -> None:
    leonardo = record("leonardo")
    for name in ("nemotron3-nano-leonardo", "nemotron3-nano-leonardo-train"):
        recipe = load_recipe(REPOSITORY / f"recipes/{name}.toml")
        assert recipe.cuda is not None
        assert recipe.cuda.compute_capabilities == (leonardo.gpus[0].compute_capability,)
        assert narrow_target(recipe, leonardo).target.model_dump() == recipe.target.model_dump()
        check_cuda(recipe, shipped_resolution(name), leonardo)
    h200 = load_recipe(REPOSITORY / "recipes/nemotron3-nano-h200.toml")
    with pytest.raises(MismatchError, match=r"needs driver 580\.65\.06.*serves CUDA 12\.2"):
        check_cuda(h200, shipped_resolution("nemotron3-nano-h200"), leonardo)

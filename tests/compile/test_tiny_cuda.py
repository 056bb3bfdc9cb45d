"""CUDA sdists of our own, built for real: nvcc from packages, torch provided by the quickstart env."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from envbuilder.compile.pipeline import CompileReport, compile_recipe
from envbuilder.errors import InputError
from envbuilder.install import install_env
from envbuilder.interpreter import inspect_interpreter
from envbuilder.lock import Group
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet, Reporter
from tests.conftest import Quickstart
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_sdist

pytestmark = pytest.mark.needs_env

PACKAGES = Path(__file__).parent.parent / "packages"
BUILD_WHEELS = ("nvidia_cuda_", "nvidia_nvvm", "ninja", "setuptools", "wheel", "packaging")
NOT_NEEDED = ("nvidia_cuda_nvrtc", "nvidia_cuda_cupti")


def recipe_for(
    capability: str, package: str = "tiny-cuda", module: str = "tiny_cuda_ext", **environment: str
) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "tiny",
            "requirements": [package],
            "trainer": False,
            "cuda": {"compute-capabilities": [capability], "toolchain-requirements": ["cuda-toolkit"]},
            "build": {package: {"modules": [module], "env": environment}},
            "provided": {"packages": ["torch==2.11.0"]},
        },
        by_alias=True,
        by_name=False,
    )


def bundle_of(folder: Path, quickstart: Quickstart, recipe: Recipe) -> Bundle:
    (package,) = recipe.build
    source = PACKAGES / package
    files = {
        str(path.relative_to(source)): path.read_text(encoding="utf-8")
        for path in source.rglob("*")
        if path.is_file() and path.name != "setup.py"
    }
    setup_py = (source / "setup.py").read_text(encoding="utf-8")
    sdist = make_sdist(folder, package, "1.0.0", requires=["torch"], files=files, setup_py=setup_py)
    wheels: dict[Path, list[Group]] = {
        path: ["build"]
        for path in sorted(quickstart.bundle_files.glob("*.whl"))
        if path.name.startswith(BUILD_WHEELS) and not path.name.startswith(NOT_NEEDED)
    }
    return make_bundle(
        Root(folder / "root"),
        recipe,
        {sdist: ["runtime"], **wheels},
        python=inspect_interpreter(quickstart.python).minor,
    )


class Listener(Quiet):
    """Keeps the notes."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def build(
    folder: Path,
    quickstart: Quickstart,
    recipe: Recipe,
    *,
    reporter: Reporter | None = None,
    prove: bool = False,
) -> CompileReport:
    return compile_recipe(
        recipe,
        bundle_of(folder, quickstart, recipe),
        root=Root(folder / "root"),
        python=quickstart.python,
        reporter=reporter or Quiet(),
        prove=prove,
    )


@contextmanager
def umask(mode: int) -> Iterator[None]:
    before = os.umask(mode)
    try:
        yield
    finally:
        os.umask(before)


@contextmanager
def one_cpu() -> Iterator[None]:
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def check_import(folder: Path, quickstart: Quickstart, recipe: Recipe, module: str) -> None:
    """Installs the env, and imports `module` in it."""
    bundle = bundle_of(folder, quickstart, recipe)
    env = install_env(recipe, bundle, root=Root(folder / "root"), python=quickstart.python, reporter=Quiet())
    code = f"import torch, {module}; print({module}.__file__)"
    done = subprocess.run(
        [env.path / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    )
    assert Path(done.stdout.strip()).is_relative_to(env.path)


def test_only_the_wanted_architecture_is_compiled_and_the_module_imports(
    tmp_path: Path, quickstart: Quickstart
) -> None:
    recipe = recipe_for("9.0")
    (built,) = build(tmp_path, quickstart, recipe).wheels
    receipt = built.receipt
    assert [(e.module, e.architectures) for e in receipt.extensions] == [("tiny_cuda_ext", ("sm_90",))]
    assert receipt.architectures_kept == ("sm_90",)
    assert receipt.architectures_dropped == ("sm_100", "sm_75", "sm_80")
    assert sorted(unit.source for unit in receipt.units) == [
        "csrc/tiny.cpp",
        "csrc/tiny_kernel.cu",
        "csrc/tiny_scale.cu",
    ]
    assert all(unit.peak_rss_bytes > 10_000_000 for unit in receipt.units)
    assert (receipt.torch, receipt.torch_cuda) == ("2.11.0+cu130", "13.0")
    assert build(tmp_path, quickstart, recipe).reused == ("tiny-cuda",)
    check_import(tmp_path, quickstart, recipe, "tiny_cuda_ext")


def test_a_setup_py_that_calls_nvcc_itself_gets_the_wanted_architecture_alone(
    tmp_path: Path, quickstart: Quickstart
) -> None:
    recipe = recipe_for("9.0", "nvcc-by-hand", "nvcc_by_hand")
    (built,) = build(tmp_path, quickstart, recipe).wheels
    receipt = built.receipt
    assert [(e.module, e.architectures) for e in receipt.extensions] == [("nvcc_by_hand", ("sm_90",))]
    assert receipt.architectures_kept == ("sm_90",)
    assert receipt.architectures_dropped == ("compute_80", "sm_53", "sm_75", "sm_80")
    assert sorted(unit.source for unit in receipt.units) == [
        "csrc/by_name.cu",
        "csrc/by_path.cu",
        "csrc/by_shell.cpp",
    ]
    check_import(tmp_path, quickstart, recipe, "nvcc_by_hand")


def test_a_unit_compiled_in_shards_has_the_same_kernels(
    tmp_path: Path, quickstart: Quickstart, monkeypatch: pytest.MonkeyPatch
) -> None:
    # So that a unit of seconds is cut as one of minutes is.
    for name in ("_WORTH_CUTTING", "SHARD_SECONDS"):
        monkeypatch.setattr(f"envbuilder.compile.units.unit_compiler.{name}", 1.0)
    recipe, listener = recipe_for("9.0"), Listener()
    (built,) = build(tmp_path, quickstart, recipe, reporter=listener, prove=True).wheels
    shards = [unit.shard for unit in built.receipt.units if unit.source == "csrc/tiny_scale.cu"]
    assert len(shards) >= 2
    for name in ("double, 2", "double, 3", "float, 2", "float, 3"):
        wanted = f"tiny_scale<{name}>".replace(" ", "")
        assert sum(wanted in shard.replace(" ", "") for shard in shards) == 1
    assert "csrc/tiny_scale.cu: 4 kernels are the same in shards and whole" in listener.notes
    assert built.receipt.compiled_whole == {}
    # Again, all from the cache: the same wheel.
    Path(built.path.parent, "receipt.json").unlink()
    (again,) = build(tmp_path, quickstart, recipe).wheels
    assert all(unit.cached for unit in again.receipt.units)
    assert again.receipt.wheel_sha256 == built.receipt.wheel_sha256
    # Elsewhere, compiled anew: the same wheel too.
    elsewhere = tmp_path / "a folder of another name"
    elsewhere.mkdir()
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    with umask(0o077), one_cpu():
        (other,) = build(elsewhere, quickstart, recipe).wheels
    assert not any(unit.cached for unit in other.receipt.units)
    assert other.receipt.differs or other.receipt.wheel_sha256 == built.receipt.wheel_sha256


def test_ptx_is_added_where_the_recipe_asks_for_it(tmp_path: Path, quickstart: Quickstart) -> None:
    recipe = recipe_for("9.0")
    assert recipe.cuda is not None
    recipe = recipe.model_copy(update={"cuda": recipe.cuda.model_copy(update={"ptx": True})})
    (built,) = build(tmp_path, quickstart, recipe).wheels
    assert [extension.architectures for extension in built.receipt.extensions] == [("compute_90", "sm_90")]


def test_an_architecture_that_nvcc_cannot_make_is_refused_before_the_build(
    tmp_path: Path, quickstart: Quickstart
) -> None:
    with pytest.raises(InputError, match=r"compute capability 6\.1") as caught:
        build(tmp_path, quickstart, recipe_for("6.1"))
    assert caught.value.exit_code == 3
    assert list(Root(tmp_path / "root").cache.glob("compile-*")) == []

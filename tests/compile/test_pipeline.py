"""compile_recipe on packages without CUDA: a build backend of our own, so no index and no toolchain."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import os
import platform
import shutil
import socket
import sys
import tomllib
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import tomli_w

from envbuilder.compile.pipeline import CompileReport, compile_recipe
from envbuilder.errors import BuildError, InputError, IntegrityError, MismatchError
from envbuilder.lock import parse_lock
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.recipe import CudaSpec, Recipe
from envbuilder.report import Quiet, Reporter
from envbuilder.sandbox import find_sandbox
from envbuilder.wheelhouse import find_built
from tests.doctor.conftest import torch_version
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_sdist, make_wheel

PYTHON = ".".join(platform.python_version_tuple()[:2])
SOURCE = Path(__file__).parent.parent / "packages" / "plain"


def recipe_of(environment: Mapping[str, str] | None = None) -> Recipe:
    return Recipe.model_validate(
        {"name": "lab", "requirements": ["plain"], "build": {"plain": {"env": dict(environment or {})}}}
    )


def bundle_of(
    folder: Path, recipe: Recipe, *, helper_files: Mapping[str, str | bytes] | None = None, **files: str
) -> Bundle:
    """A bundle with the sdist `plain` and one wheel for its build, with `helper_files`; `files` are added to
    the sdist."""
    (folder / "made").mkdir(exist_ok=True)
    members = {path.name: path.read_text(encoding="utf-8") for path in SOURCE.iterdir() if path.is_file()}
    added = {name.replace("_", "."): text for name, text in files.items()}
    sdist = make_sdist(folder / "made", "plain", "1.0", files=members | added)
    helper = make_wheel(folder / "made", "build-helper", "1.0", files=helper_files)
    return make_bundle(Root(folder / "root"), recipe, {sdist: ["runtime"], helper: ["build"]}, python=PYTHON)


def patched(folder: Path, bundle: Bundle, patches: Mapping[str, bytes]) -> Bundle:
    """`bundle` with `patches` of plain, in its lock and on the disk."""
    tables = [
        {"path": path, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for path, content in patches.items()
    ]
    for path, content in patches.items():
        (bundle.path / path).parent.mkdir(parents=True, exist_ok=True)
        (bundle.path / path).write_bytes(content)
    lock = tomllib.loads(bundle.lock.text)
    for package in lock["packages"]:
        if package["name"] == "plain":
            package["tool"]["envbuilder"]["patches"] = tables
    return bundle.model_copy(update={"lock": parse_lock("lab", tomli_w.dumps(lock))})


def replacing(old: str, new: str) -> bytes:
    """A patch after which the build adds the line `new` to the wheel's plain.py, where it added `old`."""
    text = (SOURCE / "backend.py").read_text(encoding="utf-8")
    before, after = (text.replace("{version!r}\\n", f"{{version!r}}\\n{line}") for line in (old, new))
    assert before != after
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), "a/backend.py", "b/backend.py"
    )
    return "".join(lines).encode()


def module_in(report: CompileReport) -> str:
    with zipfile.ZipFile(report.wheels[0].path) as wheel:
        return wheel.read("plain.py").decode()


def build(
    folder: Path,
    recipe: Recipe,
    bundle: Bundle,
    *,
    rebuild: bool = False,
    require_isolation: bool = False,
    reporter: Reporter | None = None,
) -> CompileReport:
    return compile_recipe(
        recipe,
        bundle,
        root=Root(folder / "root"),
        python=Path(sys.executable),
        reporter=reporter or Quiet(),
        rebuild=rebuild,
        require_isolation=require_isolation,
    )


def left_over(folder: Path) -> list[Path]:
    """What a compile has left that it should not have."""
    root = Root(folder / "root")
    return [
        *root.cache.glob("compile-*"),
        *(path for path in root.wheelhouse.glob("*") if path.name != "simple"),
    ]


def seen(report: CompileReport) -> dict[str, object]:
    """What the build backend could see."""
    with zipfile.ZipFile(report.wheels[0].path) as wheel:
        return dict(json.loads(wheel.read("plain_seen.json")))


@pytest.fixture
def listening() -> Iterator[int]:
    """A port on the loopback interface that answers."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield server.getsockname()[1]


def test_a_built_wheel_is_in_the_wheelhouse_with_its_receipt(tmp_path: Path) -> None:
    recipe = recipe_of({"PLAIN_BEHAVIOUR": "good"})
    report = build(tmp_path, recipe, bundle_of(tmp_path, recipe))
    (built,) = report.wheels
    assert report.reused == ()
    assert built.path.parent == Root(tmp_path / "root").wheelhouse / built.receipt.key
    assert built.path.name == f"plain-1.0-1_{built.receipt.key.rpartition('-')[2][:8]}-py3-none-any.whl"
    assert built.receipt.environment["PLAIN_BEHAVIOUR"] == "good"
    assert built.receipt.isolation == find_sandbox().isolation
    assert (
        find_built(
            Root(tmp_path / "root"),
            sdist_sha256=built.receipt.sdist_sha256,
            python=PYTHON,
            torch=None,
            compute_capabilities=(),
        )
        == built
    )
    assert list((tmp_path / "root" / "cache").glob("compile-*")) == []


def test_a_second_compile_takes_what_is_there_and_rebuild_does_not(tmp_path: Path) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    first = build(tmp_path, recipe, bundle)
    second = build(tmp_path, recipe, bundle)
    assert (second.wheels, second.reused) == (first.wheels, ("plain",))
    assert build(tmp_path, recipe, bundle, rebuild=True).reused == ()


def test_patches_are_built_in_and_are_part_of_the_key_and_the_receipt(tmp_path: Path) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    plain = build(tmp_path, recipe, bundle)
    patches = {"patches/b.patch": replacing("", "one"), "patches/a.patch": replacing("one", "two")}
    bundle = patched(tmp_path, bundle, patches)
    report = build(tmp_path, recipe, bundle)
    assert report.reused == ()
    assert module_in(plain) == "__version__ = '1.0'\n"
    assert module_in(report) == "__version__ = '1.0'\ntwo"
    receipt = report.wheels[0].receipt
    assert receipt.patches == {path: hashlib.sha256(content).hexdigest() for path, content in patches.items()}
    assert list(receipt.patches) == ["patches/b.patch", "patches/a.patch"]
    assert receipt.key != plain.wheels[0].receipt.key
    assert build(tmp_path, recipe, bundle).reused == ("plain",)


def test_a_patch_that_does_not_fit_stops_the_build(tmp_path: Path) -> None:
    recipe = recipe_of()
    bundle = patched(tmp_path, bundle_of(tmp_path, recipe), {"patches/a.patch": replacing("other", "one")})
    with pytest.raises(BuildError, match=r"patches/a\.patch can't be applied: backend\.py"):
        build(tmp_path, recipe, bundle)
    assert left_over(tmp_path) == []


def test_where_there_are_patches_and_no_git_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    bundle = patched(tmp_path, bundle_of(tmp_path, recipe), {"patches/a.patch": replacing("", "one")})
    (tmp_path / "bin").mkdir()
    for name in ("g++", "c++"):
        (tmp_path / "bin" / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    with pytest.raises(MismatchError, match="git is not on this machine"):
        build(tmp_path, recipe, bundle)
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("change", ["other bytes", "gone"])
def test_a_patch_that_is_not_the_locks_is_not_applied(tmp_path: Path, change: str) -> None:
    recipe = recipe_of()
    bundle = patched(tmp_path, bundle_of(tmp_path, recipe), {"patches/a.patch": replacing("", "one")})
    place = bundle.path / "patches/a.patch"
    place.unlink()
    if change == "other bytes":
        place.write_bytes(replacing("", "two"))
    error = IntegrityError if change == "other bytes" else MismatchError
    with pytest.raises(error) as caught:
        build(tmp_path, recipe, bundle)
    assert caught.value.context["file"] == str(place)
    assert caught.value.remedy.startswith("envbuilder fetch recipes/lab.toml")
    assert left_over(tmp_path) == []


def test_the_locks_target_counts_not_the_recipes(tmp_path: Path) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    # A lock that was narrowed to a probed machine, and a recipe that says more: the lock is what was fetched.
    elsewhere = recipe.model_copy(
        update={"target": recipe.target.model_copy(update={"python": "==3.99.*", "machine": "aarch64"})}
    )
    assert [built.receipt.package for built in build(tmp_path, elsewhere, bundle).wheels] == ["plain"]


@pytest.mark.parametrize("damage", ["wheel", "receipt"])
def test_a_damaged_wheel_or_receipt_is_not_taken(tmp_path: Path, damage: str) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    (built,) = build(tmp_path, recipe, bundle).wheels
    damaged = built.path if damage == "wheel" else built.path.parent / "receipt.json"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-2])
    again = build(tmp_path, recipe, bundle)
    assert again.reused == ()
    assert build(tmp_path, recipe, bundle).reused == ("plain",)


def test_another_variable_for_the_build_makes_another_wheel(tmp_path: Path) -> None:
    one, other = recipe_of({"PLAIN_BEHAVIOUR": "one"}), recipe_of({"PLAIN_BEHAVIOUR": "other"})
    first = build(tmp_path, one, bundle_of(tmp_path, one))
    second = build(tmp_path, other, bundle_of(tmp_path, other))
    assert second.reused == ()
    assert first.wheels[0].path != second.wheels[0].path
    assert first.wheels[0].path.exists()


def test_a_build_reaches_no_network_no_home_and_no_token(
    tmp_path: Path, listening: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    secrets = {"HF_TOKEN": "t", "PIP_INDEX_URL": "u", "PYTHONPATH": "/p", "AWS_SECRET_ACCESS_KEY": "k"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    recipe = recipe_of()
    report = build(tmp_path, recipe, bundle_of(tmp_path, recipe, port_txt=str(listening)))
    found = seen(report)
    isolated = report.wheels[0].receipt.isolation != "none"
    assert found["reached"] is not isolated
    assert found["home"] == []
    environment = found["environment"]
    assert isinstance(environment, dict)
    assert not secrets.keys() & environment.keys()
    assert environment["HOME"] != os.environ["HOME"]
    sealed = report.wheels[0].receipt.isolation == "sealed"
    private = Path("/build") if sealed else tmp_path / "root" / "cache"
    assert Path(environment["PATH"].split(os.pathsep)[0]).is_relative_to(private)


def test_a_failing_build_says_why_and_leaves_only_its_log(tmp_path: Path) -> None:
    recipe = recipe_of({"PLAIN_BEHAVIOUR": "fails"})
    with pytest.raises(BuildError) as caught:
        build(tmp_path, recipe, bundle_of(tmp_path, recipe))
    assert caught.value.context["first error"] == "plain.c:1:1: error: unknown type name 'nonsense'"
    assert "[20/20] compiled" in caught.value.context["last lines"]
    assert caught.value.remedy == f"envbuilder doctor --log {caught.value.context['log']}"
    assert "nonsense" in Path(caught.value.context["log"]).read_text(encoding="utf-8")
    assert left_over(tmp_path) == []


def test_a_build_of_another_version_than_the_locks_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of({"PLAIN_BEHAVIOUR": "other-version"})
    with pytest.raises(BuildError, match=r"it made plain 2\.0"):
        build(tmp_path, recipe, bundle_of(tmp_path, recipe))
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("name", ["plain-1.0.tar.gz", "build_helper-1.0-py3-none-any.whl"])
def test_one_changed_byte_in_the_bundle_is_found(tmp_path: Path, name: str) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    path = bundle.path / "files" / name
    data = bytearray(path.read_bytes())
    # A time stamp in an archive's header: the archive still reads well.
    place = 4 if name.endswith(".gz") else data.index(b"PK\x01\x02") + 12
    data[place] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        build(tmp_path, recipe, bundle)
    assert caught.value.context["file"] == str(path)
    assert caught.value.context["expected"] != caught.value.context["got"]
    assert caught.value.remedy == "envbuilder fetch recipes/lab.toml --verify"
    assert left_over(tmp_path) == []


def test_without_a_cpp_compiler_nothing_is_begun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MismatchError, match=r"no C\+\+ compiler") as caught:
        build(tmp_path, recipe, bundle)
    assert "apt install g++" in caught.value.remedy
    assert left_over(tmp_path) == []


def test_a_cuda_compiler_whose_parts_do_not_fit_together_is_told_before_what_comes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvcc = tmp_path / "cuda/bin/nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
case "$*" in
  *--dryrun*) echo "#\\$ _HERE_={nvcc.parent}";;
  --version) echo "Cuda compilation tools, release 13.0, V13.0.88";;
  --list-gpu-code) echo sm_90;;
  *) echo "ptxas: Unsupported .version 9.1; current version is 9.0"; exit 255;;
esac
""",
        encoding="utf-8",
    )
    nvcc.chmod(0o755)
    for folder in ("include", "lib64"):
        (tmp_path / "cuda" / folder).mkdir()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    recipe = recipe_of().model_copy(
        update={"cuda": CudaSpec(toolchain="system", compute_capabilities=("9.0",))}
    )
    torch = {**torch_version("2.12.0+cu132", "13.2"), "torch/lib/libc10.so": b"__cxx11"}
    warnings: list[str] = []

    class Warned(Quiet):
        def warn(self, text: str) -> None:
            warnings.append(text)

    with pytest.raises(MismatchError, match="can't compile and link a ten-line program") as caught:
        build(tmp_path, recipe, bundle_of(tmp_path, recipe, helper_files=torch), reporter=Warned())
    assert "Unsupported .version" in str(caught.value.context["output"])
    assert caught.value.remedy.startswith("envbuilder doctor --log ")
    assert [text for text in warnings if "older than torch's 13.2" in text]


def test_where_isolation_is_required_and_impossible_nothing_is_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    monkeypatch.setattr(
        "envbuilder.compile.pipeline.find_sandbox", functools.partial(find_sandbox, strongest="none")
    )
    with pytest.raises(MismatchError, match="no network namespace"):
        build(tmp_path, recipe, bundle, require_isolation=True)
    assert build(tmp_path, recipe, bundle).wheels[0].receipt.isolation == "none"


def test_an_interrupted_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("envbuilder.compile.workshop.build_wheel", interrupted)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path, recipe, bundle)
    assert left_over(tmp_path) == []


def test_a_bundle_for_another_python_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    other = bundle.model_copy(update={"record": bundle.record.model_copy(update={"python": "3.9"})})
    with pytest.raises(MismatchError, match=r"is for CPython 3\.9"):
        build(tmp_path, recipe, other)


def test_a_build_requirement_without_a_wheel_is_refused(tmp_path: Path) -> None:
    recipe = recipe_of()
    bundle = bundle_of(tmp_path, recipe)
    files = bundle.path / "files"
    helper = make_sdist(tmp_path / "made", "helper", "1.0")
    sources = {files / "plain-1.0.tar.gz": ("runtime",), helper: ("build",)}
    kept = {(tmp_path / "made" / path.name): groups for path, groups in sources.items()}
    bundle = make_bundle(Root(tmp_path / "root"), recipe, kept, python=PYTHON)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="The build needs helper"):
        build(tmp_path, recipe, bundle)


def test_a_wrong_index_is_mended_without_building_anything(tmp_path: Path) -> None:
    recipe = recipe_of({"PLAIN_BEHAVIOUR": "good"})
    bundle = bundle_of(tmp_path, recipe)
    build(tmp_path, recipe, bundle)
    pages = [path for path in (tmp_path / "root/wheelhouse/simple").rglob("index.*") if path.is_file()]
    right = {path: path.read_bytes() for path in pages}
    for path in pages:
        path.write_text("damaged")
    stray = pages[0].parent / "stray/index.html"
    stray.parent.mkdir()
    stray.touch()
    assert build(tmp_path, recipe, bundle).reused == ("plain",)
    assert {path: path.read_bytes() for path in pages} == right
    assert not stray.exists()


def test_a_bundle_of_wheels_alone_has_nothing_to_compile(tmp_path: Path) -> None:
    recipe = recipe_of()
    (tmp_path / "made").mkdir()
    wheel = make_wheel(tmp_path / "made", "plain", "1.0")
    bundle = make_bundle(Root(tmp_path / "root"), recipe, {wheel: ["runtime"]}, python=PYTHON)
    report = build(tmp_path, recipe, bundle)
    assert (report.wheels, report.reused) == ((), ())

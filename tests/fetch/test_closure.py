from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from envbuilder.errors import InputError, MismatchError
from envbuilder.fetch.closure import ClosureFact, closure_key, prove_closure
from envbuilder.lock import Group, SourceLock
from envbuilder.process import run
from envbuilder.recipe import CudaSpec, Exclusion, Provided, Recipe, SourceBuild, TargetSpec
from envbuilder.sandbox import find_sandbox
from tests.lab.bundles import lock_files
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist, make_wheel

PYTHON = "3.12"
TOOLS = ("ninja", "setuptools", "wheel")


class Listener:
    def __init__(self) -> None:
        self.warnings: list[str] = []

    def stage(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int, unit: object) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Case:
    """A recipe and files made for it: `kernels` is built from source, and needs `helper` at run time."""

    folder: Path
    recipe: Recipe
    files: dict[Path, Sequence[Group]] = field(default_factory=dict)
    tables: dict[str, Mapping[str, Any]] = field(default_factory=dict)
    listener: Listener = field(default_factory=Listener)

    @property
    def bundle(self) -> Path:
        return self.folder / "bundle"

    def wheel(
        self,
        name: str,
        *groups: Group,
        version: str = "1.0",
        requires: Sequence[str] = (),
        tag: str = "py3-none-any",
    ) -> None:
        self.files[make_wheel(self.folder, name, version, requires=requires, tag=tag)] = groups

    def lock(self) -> SourceLock:
        return lock_files(self.bundle, self.recipe, self.files, self.tables)

    def prove(self) -> dict[str, ClosureFact]:
        facts = prove_closure(self.recipe, self.lock(), self.bundle, python=PYTHON, reporter=self.listener)
        return {fact.group: fact for fact in facts}


@pytest.fixture
def case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Case:
    """Closed as it is. The tool's own requirements are stood in for by one small wheel."""
    monkeypatch.setattr("envbuilder.fetch.closure.tool_requires", lambda: ("toolbox>=1",))
    recipe = Recipe(
        name="small",
        requirements=("kernels==1.0",),
        trainer=False,
        target=TargetSpec(python="==3.12.*"),
        build={"kernels": SourceBuild()},
    )
    case = Case(tmp_path, recipe)
    case.files[make_sdist(tmp_path, "kernels", "1.0", requires=["helper>=1"])] = ("runtime",)
    case.tables["kernels"] = {"requires": ["helper>=1"], "build-requires": ["mathlib[fast]>=2"]}
    case.wheel("helper", "runtime")
    case.wheel("mathlib", "build", version="2.5", requires=["base", "quick; extra == 'fast'"])
    case.wheel("base", "build")
    case.wheel("quick", "build")
    for tool in TOOLS:
        case.wheel(tool, "build")
    case.wheel("toolbox", "tool")
    return case


def without(case: Case, name: str) -> None:
    case.files = {path: groups for path, groups in case.files.items() if not path.name.startswith(f"{name}-")}


def test_a_closed_bundle_gives_exactly_the_locked_versions_of_each_environment(case: Case) -> None:
    facts = case.prove()
    assert facts["runtime"] == ClosureFact("runtime", ("small",), {"helper": "1.0", "kernels": "1.0"})
    assert facts["build"].serves == ("kernels",)
    assert facts["build"].versions == {"mathlib": "2.5", "base": "1.0", "quick": "1.0"} | dict.fromkeys(
        TOOLS, "1.0"
    )
    assert facts["tool"].versions == {"toolbox": "1.0"}
    assert case.listener.warnings == []


def test_without_source_packages_there_is_no_build_environment_to_prove(case: Case) -> None:
    case.recipe = case.recipe.model_copy(update={"requirements": ("helper",), "build": {}})
    case.files = {
        path: groups for path, groups in case.files.items() if path.name.startswith(("helper", "toolbox"))
    }
    assert set(case.prove()) == {"runtime", "tool"}


@pytest.mark.parametrize("missing", ["mathlib", "base", "quick"])
def test_a_build_that_lacks_something_is_named_with_its_requirement(case: Case, missing: str) -> None:
    without(case, missing)
    with pytest.raises(MismatchError) as raised:
        case.prove()
    error = raised.value
    assert "The build of kernels 1.0 requires mathlib[fast]>=2" in error.message
    assert 'Under [build.kernels] write build-requires = ["mathlib[fast]>=2"]' in error.remedy
    assert "envbuilder lock recipes/small.toml" in error.remedy
    assert missing in error.context["uv"]


def test_what_only_another_group_has_is_not_taken_from_it(case: Case) -> None:
    without(case, "base")
    case.wheel("base", "runtime")
    with pytest.raises(MismatchError, match="The build of kernels"):
        case.prove()


def test_a_build_tool_that_is_missing_is_named(case: Case) -> None:
    without(case, "ninja")
    with pytest.raises(MismatchError, match="Every build requires ninja"):
        case.prove()


def test_the_cuda_toolchain_is_proved_with_the_build(case: Case) -> None:
    cuda = CudaSpec(toolchain_requirements=("cuda-toolkit[nvcc]==13.0",))
    case.recipe = case.recipe.model_copy(update={"cuda": cuda})
    case.wheel("cuda-toolkit", "build", version="13.0", requires=["nvcc-files; extra == 'nvcc'"])
    with pytest.raises(
        MismatchError, match=r"The CUDA toolchain of the recipe requires cuda-toolkit\[nvcc\]"
    ):
        case.prove()
    case.wheel("nvcc-files", "build")
    assert "nvcc-files" in case.prove()["build"].versions


def test_a_source_package_is_resolved_by_what_the_lock_says_of_it_and_never_run(case: Case) -> None:
    mark = case.folder / "mark"
    setup_py = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    case.files[make_sdist(case.folder, "kernels", "1.0", setup_py=setup_py)] = ("runtime",)
    case.tables["kernels"] = {**case.tables["kernels"], "requires": ["helper>=2"]}
    with pytest.raises(MismatchError, match=r"The recipe small requires kernels==1\.0") as raised:
        case.prove()
    assert "helper" in raised.value.context["uv"]
    assert raised.value.remedy == "envbuilder lock recipes/small.toml"
    assert not mark.exists()


def test_a_build_that_needs_a_source_package_is_refused(case: Case) -> None:
    case.files[make_sdist(case.folder, "helper-src", "1.0")] = ("build",)
    with pytest.raises(InputError, match="The build needs helper-src, which is locked as source only"):
        case.prove()


def test_a_wheel_of_another_python_is_not_enough(case: Case) -> None:
    without(case, "base")
    case.wheel(
        "base", "build", requires=["later; python_version >= '3.12'", "never; python_version < '3.12'"]
    )
    with pytest.raises(MismatchError) as raised:
        case.prove()
    assert "later" in raised.value.context["uv"]
    case.wheel("later", "build", tag="cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64")
    assert "later" in case.prove()["build"].versions


def test_excluded_packages_are_not_looked_for(case: Case) -> None:
    case.tables["kernels"] = {**case.tables["kernels"], "requires": ["helper>=1", "heavy==3"]}
    without(case, "helper")
    case.wheel("helper", "runtime", requires=["heavy"])
    case.recipe = case.recipe.model_copy(update={"exclude": (Exclusion(package="heavy", reason="unused"),)})
    assert set(case.prove()["runtime"].versions) == {"helper", "kernels"}


def test_what_the_machine_provides_is_not_looked_for_but_its_version_counts(case: Case) -> None:
    without(case, "helper")
    without(case, "base")
    provided = Provided(packages=("helper==1.5", "base"))
    case.recipe = case.recipe.model_copy(update={"provided": provided})
    facts = case.prove()
    assert set(facts["runtime"].versions) == {"kernels"}
    assert "base" not in facts["build"].versions
    case.recipe = case.recipe.model_copy(update={"provided": Provided(packages=("helper==0.5", "base"))})
    with pytest.raises(MismatchError) as raised:
        case.prove()
    assert "helper" in raised.value.context["uv"]


def test_the_tool_cannot_lean_on_what_the_machine_provides(case: Case) -> None:
    without(case, "toolbox")
    case.recipe = case.recipe.model_copy(update={"provided": Provided(packages=("toolbox==1.0",))})
    with pytest.raises(MismatchError, match="Envbuilder requires toolbox>=1"):
        case.prove()


def test_what_nothing_requires_is_told(case: Case) -> None:
    case.wheel("idle", "runtime")
    case.prove()
    assert [warning for warning in case.listener.warnings if "idle" in warning]


def test_a_file_that_is_not_there_is_named(case: Case) -> None:
    lock = case.lock()
    (case.bundle / "files" / "base-1.0-py3-none-any.whl").unlink()
    with pytest.raises(MismatchError, match=r"lacks files/base-1\.0-py3-none-any\.whl"):
        prove_closure(case.recipe, lock, case.bundle, python=PYTHON, reporter=case.listener)


def test_a_damaged_wheel_is_to_be_fetched_again(case: Case) -> None:
    lock = case.lock()
    (case.bundle / "files" / "base-1.0-py3-none-any.whl").write_bytes(b"no wheel")
    with pytest.raises(MismatchError) as raised:
        prove_closure(case.recipe, lock, case.bundle, python=PYTHON, reporter=case.listener)
    assert raised.value.remedy == "envbuilder fetch recipes/small.toml --verify"


def test_no_index_is_asked_whatever_the_user_has_configured(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    without(case, "base")
    elsewhere = case.folder / "elsewhere"
    elsewhere.mkdir()
    make_wheel(elsewhere, "base", "1.0")
    home = case.folder / "home"
    (home / ".config" / "uv").mkdir(parents=True)
    with IndexServer(elsewhere) as server:
        settings = f'[[index]]\nurl = "{server.url}"\ndefault = true\n[pip]\nfind-links = ["{elsewhere}"]\n'
        (home / ".config" / "uv" / "uv.toml").write_text(settings)
        monkeypatch.setenv("HOME", str(home))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(home / ".config"))
        monkeypatch.setenv("UV_DEFAULT_INDEX", server.url)
        monkeypatch.setenv("UV_INDEX", server.url)
        monkeypatch.setenv("UV_FIND_LINKS", str(elsewhere))
        monkeypatch.setenv("UV_CACHE_DIR", str(home / "cache"))
        monkeypatch.setenv("PIP_INDEX_URL", server.url)
        monkeypatch.setenv("HTTP_PROXY", server.origin)
        monkeypatch.setenv("HTTPS_PROXY", server.origin)
        with pytest.raises(MismatchError, match="The build of kernels"):
            case.prove()
        assert server.requests == []
    assert sorted(path.name for path in home.rglob("*")) == [".config", "uv", "uv.toml"]


_PROOF = """
import sys
from pathlib import Path
from envbuilder.fetch import closure
from envbuilder.lock import read_lock
from envbuilder.recipe import load_recipe
from envbuilder.report import Quiet
closure.tool_requires = lambda: ("toolbox>=1",)
recipe, lock, bundle = map(Path, sys.argv[1:])
facts = closure.prove_closure(
    load_recipe(recipe), read_lock(lock), bundle, python="3.12", reporter=Quiet()
)
print("proved", *(fact.group for fact in facts))
"""


def test_it_is_proved_where_there_is_no_network_at_all(case: Case) -> None:
    sandbox = find_sandbox(strongest="network-namespace")
    if sandbox.isolation != "network-namespace":
        pytest.skip("this machine allows no network namespace")
    (case.folder / "small.toml").write_text(
        'name = "small"\nrequirements = ["kernels==1.0"]\ntrainer = false\n'
        '[target]\npython = "==3.12.*"\n[build.kernels]\n'
    )
    (case.folder / "pylock.small.toml").write_text(case.lock().text)
    arguments = [case.folder / "small.toml", case.folder / "pylock.small.toml", case.bundle]
    done = run([*sandbox.prefix, sys.executable, "-c", _PROOF, *arguments], env=dict(os.environ))
    assert done.output.splitlines()[-1] == "proved runtime build tool"


def test_the_key_changes_with_all_that_a_proof_depends_on(case: Case) -> None:
    lock = case.lock()
    key = closure_key(case.recipe, lock, python=PYTHON)
    assert key == closure_key(case.recipe, case.lock(), python=PYTHON)
    assert key != closure_key(case.recipe, lock, python="3.13")
    build = {"kernels": SourceBuild(env={"KERNELS_FORCE_BUILD": "TRUE"})}
    assert key != closure_key(case.recipe.model_copy(update={"build": build}), lock, python=PYTHON)
    case.wheel("idle", "runtime")
    assert key != closure_key(case.recipe, case.lock(), python=PYTHON)


def test_the_users_settings_for_uv_do_not_sway_the_proof(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    other = case.folder / "other.txt"
    other.write_text("helper==9\n")
    monkeypatch.setenv("UV_CONSTRAINT", str(other))
    monkeypatch.setenv("UV_OVERRIDE", str(other))
    assert case.prove()["runtime"].versions["helper"] == "1.0"

"""The machines that a lock's files are chosen for."""

from __future__ import annotations

import pytest
from packaging.tags import parse_tag

from envbuilder.errors import MismatchError
from envbuilder.recipe import Recipe, TargetSpec
from envbuilder.target import narrow_target, python_versions, serves, target_for
from tests.machines import machine_record


@pytest.mark.parametrize(
    ("python", "expected"),
    [
        (">=3.11,<3.14", ("3.11", "3.12", "3.13")),
        ("==3.12.*", ("3.12",)),
        (">3.11,<3.13", ("3.11", "3.12")),
        (">=3.11.4,<3.12", ("3.11",)),
        ("==3.12.3", ("3.12",)),
        ("~=3.12.3", ("3.12",)),
        ("<=3.11.6,>=3.11.2", ("3.11",)),
        (">=3.9,<3.13", ("3.11", "3.12")),
        ("<3.11", ()),
        (">=4", ()),
    ],
)
def test_the_minor_versions_of_a_range(python: str, expected: tuple[str, ...]) -> None:
    assert python_versions(TargetSpec(python=python)) == expected


def takes(python: str, tag: str, **spec: str) -> bool:
    target = target_for(TargetSpec.model_validate({"python": ">=3.11"} | spec), python)
    return not parse_tag(tag).isdisjoint(target.tags)


@pytest.mark.parametrize(
    "tag",
    [
        "cp312-cp312-manylinux_2_28_x86_64",
        "cp312-cp312-manylinux_2_17_x86_64.manylinux2014_x86_64",
        "cp312-cp312-manylinux2010_x86_64",
        "cp312-cp312-linux_x86_64",
        "cp310-abi3-manylinux_2_17_x86_64",
        "cp312-none-any",
        "py3-none-manylinux1_x86_64",
        "py2.py3-none-any",
    ],
)
def test_wheels_for_the_target_or_older_are_taken(tag: str) -> None:
    assert takes("3.12", tag)


@pytest.mark.parametrize(
    "tag",
    [
        "cp312-cp312-manylinux_2_29_x86_64",
        "cp312-cp312-manylinux_2_28_aarch64",
        "cp311-cp311-manylinux_2_28_x86_64",
        "cp313-abi3-manylinux_2_28_x86_64",
        "cp312-cp312-musllinux_1_2_x86_64",
        "cp312-cp312-win_amd64",
        "cp312-cp312t-manylinux_2_28_x86_64",
        "pp310-pypy310_pp73-manylinux_2_28_x86_64",
    ],
)
def test_wheels_for_anything_else_are_not(tag: str) -> None:
    assert not takes("3.12", tag)


def test_machine_and_glibc_are_the_recipes() -> None:
    assert takes("3.12", "cp312-cp312-manylinux_2_34_aarch64", machine="aarch64", glibc="2.34")
    assert not takes("3.12", "cp312-cp312-manylinux_2_28_x86_64", machine="aarch64")
    assert not takes("3.12", "cp312-cp312-manylinux_2_12_aarch64", machine="aarch64")
    assert not takes("3.12", "cp312-cp312-manylinux_2_28_x86_64", glibc="2.17")


def test_the_best_tag_is_the_pythons_own_on_the_newest_glibc() -> None:
    assert str(target_for(TargetSpec(), "3.12").tags[0]) == "cp312-cp312-manylinux_2_28_x86_64"


def test_markers_speak_of_the_target_not_of_this_machine() -> None:
    environment = target_for(TargetSpec(machine="aarch64"), "3.13").environment

    assert environment["python_version"] == "3.13"
    assert environment["python_full_version"] == "3.13.0"
    assert (environment["platform_machine"], environment["sys_platform"]) == ("aarch64", "linux")


@pytest.mark.parametrize(
    ("requires_python", "expected"),
    [(None, True), ("", True), (">=3.12.4", True), (">=3.13", False), (">=3.6.*", True), ("nonsense", True)],
)
def test_a_requires_python_that_cannot_be_read_forbids_nothing(
    requires_python: str | None, expected: bool
) -> None:
    assert serves(requires_python, "3.12") is expected


def test_a_python_that_the_recipe_does_not_serve_is_a_mismatch_that_names_those_it_does() -> None:
    with pytest.raises(MismatchError) as caught:
        target_for(TargetSpec(), "3.10")

    assert "3.11, 3.12, 3.13" in caught.value.remedy


def provided_recipe(*packages: str, **target: str) -> Recipe:
    return Recipe.model_validate(
        {
            "name": "demo",
            "requirements": ["app"],
            "target": target,
            "provided": {"python": "/opt/module/bin/python", "packages": packages},
        }
    )


def plain_recipe(**target: str) -> Recipe:
    return Recipe.model_validate({"name": "demo", "requirements": ["app"], "target": target})


def test_a_narrowed_recipe_is_for_the_probed_machine_alone() -> None:
    recipe = plain_recipe(python=">=3.11", machine="x86_64", glibc="2.28")
    narrowed = narrow_target(recipe, machine_record(python="3.12.4", machine="aarch64", glibc="2.34"))
    assert narrowed.target == TargetSpec(python="==3.12.*", machine="aarch64", glibc="2.34")
    assert python_versions(narrowed.target) == ("3.12",)
    assert narrowed.model_copy(update={"target": recipe.target}) == recipe


def test_an_older_glibc_than_the_recipes_is_the_targets() -> None:
    narrowed = narrow_target(plain_recipe(glibc="2.34"), machine_record(glibc="2.17"))
    assert narrowed.target.glibc == "2.17"


@pytest.mark.parametrize(
    ("found", "requirement", "pin"),
    [
        ("2.11.0+cu130", "torch", "torch==2.11.0"),
        ("2.11.0+cu130", "torch>=2.10", "torch==2.11.0"),
        ("2.11.0+cu130", "torch==2.11.0+cu130", "torch==2.11.0"),
        ("2.11.0a0+nv25.1", "torch>=2.10", "torch==2.11.0a0"),
    ],
)
def test_provided_packages_are_pinned_to_the_public_versions_probed(
    found: str, requirement: str, pin: str
) -> None:
    recipe = provided_recipe(requirement, "Flash_Attn")
    machine = machine_record(provided={"torch": found, "flash-attn": "2.8.3", "unasked": "1.0"})
    narrowed = narrow_target(recipe, machine)
    assert narrowed.provided is not None
    assert narrowed.provided.packages == (pin, "Flash_Attn==2.8.3")
    assert narrowed.provided.python == "/opt/module/bin/python"


@pytest.mark.parametrize(
    ("provided", "fault"),
    [
        ({"torch": "2.10.0"}, "torch is 2.10.0, not ==2.11.0; triton is missing"),
        ({"torch": None, "triton": "3.5"}, "torch is missing"),
        ({"torch": "2.11.0", "triton": "git-main"}, "triton is git-main, not"),
    ],
)
def test_provided_packages_that_the_recipe_does_not_admit_are_a_mismatch_that_names_them_all(
    provided: dict[str, str | None], fault: str
) -> None:
    with pytest.raises(MismatchError, match="doesn't provide") as caught:
        narrow_target(provided_recipe("torch==2.11.0", "triton"), machine_record(provided=provided))
    assert fault in caught.value.message
    assert "envbuilder probe --recipe recipes/demo.toml" in caught.value.remedy


@pytest.mark.parametrize(
    ("python", "implementation"),
    [("3.10.9", "cpython"), ("3.11.2", "cpython"), ("3.14.0", "cpython"), ("3.12.4", "pypy")],
)
def test_a_python_that_the_recipe_does_not_admit_is_a_mismatch(python: str, implementation: str) -> None:
    recipe = plain_recipe(python=">=3.11.4,<3.14")
    with pytest.raises(MismatchError, match=f"{implementation} {python}") as caught:
        narrow_target(recipe, machine_record(python=python, implementation=implementation, tags=()))
    assert "--python" in caught.value.remedy


@pytest.mark.parametrize(("machine", "glibc"), [("ppc64le", "2.34"), ("x86_64", None)])
def test_a_machine_that_no_wheels_are_for_is_a_mismatch(machine: str, glibc: str | None) -> None:
    with pytest.raises(MismatchError, match="there are no wheels for it"):
        narrow_target(plain_recipe(), machine_record(machine=machine, glibc=glibc, tags=()))


def test_a_free_threaded_python_is_a_mismatch() -> None:
    record = machine_record(python="3.13.1", tags=("cp313-cp313t-manylinux_2_34_x86_64", "py3-none-any"))
    with pytest.raises(MismatchError, match="no wheels tagged cp313-cp313-manylinux_2_34_x86_64"):
        narrow_target(plain_recipe(), record)


@pytest.mark.parametrize("version", ["3.13.0rc2", "3.13.1+"])
def test_odd_ends_of_a_python_version_do_no_harm(version: str) -> None:
    narrowed = narrow_target(plain_recipe(), machine_record(python=version))
    assert narrowed.target.python == "==3.13.*"

"""The machines that a lock's files are chosen for."""

from __future__ import annotations

import pytest
from packaging.tags import parse_tag

from envbuilder.errors import MismatchError
from envbuilder.recipe import TargetSpec
from envbuilder.target import python_versions, target_for


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


def test_a_python_that_the_recipe_does_not_serve_is_a_mismatch_that_names_those_it_does() -> None:
    with pytest.raises(MismatchError) as caught:
        target_for(TargetSpec(), "3.10")

    assert "3.11, 3.12, 3.13" in caught.value.remedy

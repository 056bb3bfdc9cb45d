"""The machine that a lock's files are chosen for: Python version, markers and wheel tags. Pure.

Files are chosen for the recipe's `[target]`, never for the machine that runs `lock` or `fetch`, so a login
node with another Python or a newer glibc brings what the compute node can take.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from packaging.markers import Environment
from packaging.specifiers import SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags

from envbuilder.errors import MismatchError
from envbuilder.recipe import TargetSpec

_KNOWN_PYTHONS = tuple(f"3.{minor}" for minor in range(9, 16))
_PATCHES = 50
"""More patch releases than any Python has had."""


@dataclass(frozen=True, slots=True)
class Target:
    """One CPython on one platform, in the terms of PEP 508 markers and PEP 425 tags."""

    python: str
    """Minor version, e.g. "3.12"."""
    environment: Environment
    tags: tuple[Tag, ...]
    """Tags that its installers take, best first."""


def python_versions(spec: TargetSpec) -> tuple[str, ...]:
    """The minor Python versions that `spec` admits, oldest first."""
    wanted = SpecifierSet(spec.python)
    return tuple(python for python in _KNOWN_PYTHONS if admits(wanted, python))


def admits(wanted: SpecifierSet, python: str) -> bool:
    """Whether `wanted` holds for some patch release of minor version `python`."""
    return any(wanted.contains(f"{python}.{patch}") for patch in range(_PATCHES))


def target_for(spec: TargetSpec, python: str) -> Target:
    """The target for minor version `python` ("3.12"); MismatchError where the recipe doesn't serve it."""
    versions = python_versions(spec)
    if python not in versions:
        raise MismatchError(
            f"Python {python} is not one that this recipe serves.",
            remedy=f"Run the command with --python and one of {', '.join(versions)}.",
            context={"expected": spec.python, "got": python},
        )
    environment: Environment = {
        "implementation_name": "cpython",
        "implementation_version": f"{python}.0",
        "os_name": "posix",
        "platform_machine": spec.machine,
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python}.0",
        "platform_python_implementation": "CPython",
        "python_version": python,
        "sys_platform": "linux",
    }
    return Target(python, environment, tuple(_tags(python, spec)))


def _tags(python: str, spec: TargetSpec) -> Iterator[Tag]:
    version = tuple(int(part) for part in python.split("."))
    platforms = list(_platforms(spec))
    interpreter = f"cp{version[0]}{version[1]}"
    yield from cpython_tags(version, platforms=platforms)
    yield from compatible_tags(version, interpreter, platforms)


def _platforms(spec: TargetSpec) -> Iterator[str]:
    newest = int(spec.glibc.split(".")[1])
    # PEP 600 names, and the older names that they replace; aarch64 wheels begin at glibc 2.17.
    legacy = {17: "manylinux2014", 12: "manylinux2010", 5: "manylinux1"}
    oldest = 5 if spec.machine == "x86_64" else 17
    for minor in range(newest, oldest - 1, -1):
        yield f"manylinux_2_{minor}_{spec.machine}"
        if minor in legacy:
            yield f"{legacy[minor]}_{spec.machine}"
    yield f"linux_{spec.machine}"

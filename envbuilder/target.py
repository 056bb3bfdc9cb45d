"""The machine that a lock's files are chosen for: Python version, markers and wheel tags. Pure.

Files are chosen for the recipe's `[target]`, never for the machine that runs `lock` or `fetch`, so a login
node with another Python or a newer glibc brings what the compute node can take. `narrow_target` makes that
target one probed machine.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from packaging.markers import Environment
from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.tags import Tag, compatible_tags, cpython_tags
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version
from pydantic import ValidationError

from envbuilder.errors import MismatchError
from envbuilder.machine import MachineRecord
from envbuilder.recipe import Recipe, TargetSpec

_KNOWN_PYTHONS = tuple(f"3.{minor}" for minor in range(11, 16))
"""From the oldest on that the bundle's start.py, the builds' front end and the trainer run under."""
_PATCHES = 50
"""More patch releases than any Python has had."""


@dataclass(frozen=True)
class Target:
    """One CPython on one platform, in the terms of PEP 508 markers and PEP 425 tags."""

    python: str
    """Minor version, e.g. "3.12"."""
    environment: Environment
    tags: tuple[Tag, ...]
    """Tags that its installers take, best first."""


def python_versions(spec: TargetSpec) -> tuple[str, ...]:
    """The minor Python versions that an env can have and `spec` admits, oldest first."""
    wanted = SpecifierSet(spec.python)
    return tuple(python for python in _KNOWN_PYTHONS if admits(wanted, python))


def admits(wanted: SpecifierSet, python: str) -> bool:
    """Whether `wanted` holds for some patch release of minor version `python`."""
    return any(wanted.contains(f"{python}.{patch}") for patch in range(_PATCHES))


def serves(requires_python: str | None, python: str) -> bool:
    """Whether a file with that Requires-Python is for minor version `python`.

    One that can't be read, as some old packages have it, forbids nothing (pip does the same).
    """
    try:
        return admits(SpecifierSet(requires_python or ""), python)
    except InvalidSpecifier:
        return True


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


def narrow_target(recipe: Recipe, machine: MachineRecord) -> Recipe:
    """`recipe` for `machine` alone: its Python minor version, processor and glibc, its provided versions.

    MismatchError where no recipe could serve the machine, where this one doesn't admit its Python, or where a
    provided package is missing there or of a version that the recipe doesn't admit.
    """
    python = _admitted_python(recipe, machine)
    try:
        spec = TargetSpec.model_validate(
            {"python": f"=={python}.*", "machine": machine.machine, "glibc": machine.glibc}
        )
    except ValidationError as error:
        raise MismatchError(
            f"The probed machine has {machine.machine} processors and "
            f"{f'glibc {machine.glibc}' if machine.glibc else 'a C library other than glibc'}: "
            "there are no wheels for it.",
            remedy="Run envbuilder probe on a machine with x86_64 or aarch64 processors and glibc 2.",
            context={"machine": machine.machine, "glibc": machine.glibc},
        ) from error
    best = str(target_for(spec, python).tags[0])
    if best not in machine.interpreter.tags:
        raise MismatchError(
            f"The probed machine's Python takes no wheels tagged {best}: it may be a free-threaded build.",
            remedy="On the compute node: envbuilder probe --python PATH of an ordinary CPython",
            context={"expected": best, "got": ", ".join(machine.interpreter.tags[:1])},
        )
    return recipe.model_copy(update={"target": spec} | _pinned(recipe, machine))


def lock_for_this_machine(recipe: str) -> str:
    """What to type where the lock of `recipe` is not for the machine at hand."""
    return (
        f"On this machine: envbuilder probe --recipe recipes/{recipe}.toml --output target.json; "
        f"on the login node: envbuilder lock recipes/{recipe}.toml --target target.json"
    )


def _admitted_python(recipe: Recipe, machine: MachineRecord) -> str:
    """The machine's minor Python version; MismatchError where it is not one that `recipe` admits."""
    found = machine.interpreter
    release = re.match(r"(\d+\.\d+)\.\d+", found.version)
    assert release is not None, "MachineRecord has checked it"
    admitted = SpecifierSet(recipe.target.python).contains(release[0])
    if found.implementation == "cpython" and admitted and release[1] in python_versions(recipe.target):
        return release[1]
    raise MismatchError(
        f"The recipe {recipe.name} is for CPython {recipe.target.python}, "
        f"and the probed machine has {found.implementation} {found.version}.",
        remedy="On the compute node: envbuilder probe --python PATH of a Python that the recipe admits; "
        f"or widen python under [target] in recipes/{recipe.name}.toml.",
        context={"expected": recipe.target.python, "got": f"{found.implementation} {found.version}"},
    )


def _pinned(recipe: Recipe, machine: MachineRecord) -> dict[str, object]:
    """The update that pins [provided] to the public versions that the machine has."""
    if recipe.provided is None:
        return {}
    pins, faults = [], []
    for requirement in map(Requirement, recipe.provided.packages):
        version = machine.provided.get(canonicalize_name(requirement.name))
        if fault := provided_fault(requirement, version):
            faults.append(fault)
        elif version is not None:
            pins.append(f"{requirement.name}=={Version(version).public}")
    if faults:
        raise MismatchError(
            f"The probed machine doesn't provide what the recipe {recipe.name} takes from it: "
            f"{'; '.join(faults)}.",
            remedy="On the compute node, with the module loaded that has them: "
            f"envbuilder probe --recipe recipes/{recipe.name}.toml",
            context={"expected": ", ".join(recipe.provided.packages)},
        )
    return {"provided": recipe.provided.model_copy(update={"packages": tuple(pins)})}


def provided_fault(requirement: Requirement, version: str | None) -> str | None:
    """Why `version` of a provided package (None: it is missing) is not what `requirement` asks, in words.

    A local version ("+cu130") is compared only where `requirement` names one.
    """
    if version is None:
        return f"{requirement.name} is missing"
    try:
        forms = [Version(version), Version(Version(version).public)]
    except InvalidVersion:
        forms = []
    admitted = any(requirement.specifier.contains(form, prereleases=True) for form in forms)
    return None if admitted else f"{requirement.name} is {version}, not {requirement.specifier}"


def version_number(version: str) -> tuple[int, ...]:
    """A version of numbers alone, as it compares: (2, 28) for "2.28"."""
    return tuple(int(part) for part in version.split("."))


def _tags(python: str, spec: TargetSpec) -> Iterator[Tag]:
    version = version_number(python)
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

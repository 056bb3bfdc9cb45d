"""Asks interpreters of this machine what they are, and what packages they have."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from envbuilder.errors import MismatchError
from envbuilder.model import BundleRecord, ProvidedPackages
from envbuilder.process import run
from envbuilder.recipe import Recipe, TargetSpec

_INSPECT = """
import json, os, platform, sys, sysconfig
try:
    libc = os.confstr("CS_GNU_LIBC_VERSION")
except (ValueError, OSError):
    libc = None
print(json.dumps({
    "implementation": sys.implementation.name,
    "version": platform.python_version(),
    "purelib": sysconfig.get_path("purelib"),
    "platlib": sysconfig.get_path("platlib"),
    "include": sysconfig.get_path("include"),
    "glibc": libc.split()[1] if libc and libc.startswith("glibc ") else None,
    "machine": platform.machine(),
}))
"""

_FIND = """
import importlib.metadata, json, sys, sysconfig
found = {}
folders = []
for name in sys.argv[1:]:
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        continue
    found[name] = distribution.version
    folders.append(str(distribution.locate_file("")))
folders += [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
print(json.dumps({"versions": found, "folders": list(dict.fromkeys(folders))}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python interpreter of this machine."""

    path: Path
    """As it was given, so a venv's own python stays that."""
    implementation: str
    """E.g. "cpython"."""
    version: str
    """E.g. "3.12.4"."""
    purelib: Path
    platlib: Path
    include: Path
    """Where Python.h is, if the development package is installed."""
    glibc: str | None
    """None where the C library is another one."""
    machine: str
    """E.g. "x86_64"."""

    @property
    def minor(self) -> str:
        """E.g. "3.12"."""
        return ".".join(self.version.split(".")[:2])


def inspect_interpreter(python: Path) -> Interpreter:
    """What interpreter `python` is; MismatchError if it doesn't run."""
    python = python.absolute()
    facts = _ask(python, ["-I", "-c", _INSPECT])
    return Interpreter(
        path=python,
        implementation=facts["implementation"],
        version=facts["version"],
        purelib=Path(facts["purelib"]),
        platlib=Path(facts["platlib"]),
        include=Path(facts["include"]),
        glibc=facts["glibc"],
        machine=facts["machine"],
    )


def check_interpreter(interpreter: Interpreter, target: TargetSpec, bundle: BundleRecord) -> None:
    """MismatchError unless `interpreter` can take the files that were chosen for `target` and `bundle`."""
    if interpreter.implementation != "cpython" or interpreter.minor != bundle.python:
        raise MismatchError(
            f"The bundle {bundle.recipe} is for CPython {bundle.python}, "
            f"and {interpreter.path} is {interpreter.implementation} {interpreter.version}.",
            remedy=f"On the login node: envbuilder fetch recipes/{bundle.recipe}.toml "
            f"--python {interpreter.minor}; or give --python PATH of a CPython {bundle.python}.",
            context={"expected": bundle.python, "got": interpreter.version, "python": interpreter.path},
        )
    if interpreter.machine != target.machine:
        raise MismatchError(
            f"The recipe {bundle.recipe} is for {target.machine}, and this machine is {interpreter.machine}.",
            remedy=f'Write machine = "{interpreter.machine}" into [target] of the recipe, then '
            f"envbuilder lock recipes/{bundle.recipe}.toml",
            context={"expected": target.machine, "got": interpreter.machine},
        )
    if interpreter.glibc is None or Version(interpreter.glibc) < Version(target.glibc):
        raise MismatchError(
            f"The recipe {bundle.recipe} needs glibc {target.glibc} or newer, "
            f"and this machine has {interpreter.glibc or 'another C library'}.",
            remedy=f"Write an older glibc into [target] of the recipe, then "
            f"envbuilder lock recipes/{bundle.recipe}.toml",
            context={"expected": f">={target.glibc}", "got": interpreter.glibc},
        )


def find_provided(recipe: Recipe, python_override: Path | None = None) -> ProvidedPackages | None:
    """The packages that the recipe takes from the machine, as the provider's interpreter has them.

    None if the recipe has no [provided]. `python_override` stands in for the recipe's interpreter.
    MismatchError where a package is missing or of a version that the recipe doesn't admit; a local version
    ("+cu130") is not compared.
    """
    if recipe.provided is None:
        return None
    wanted = python_override or Path(recipe.provided.python)
    located = shutil.which(wanted)
    if located is None:
        raise MismatchError(
            f"There is no interpreter {wanted} on this machine.",
            remedy="Load the module or activate the environment that has it, or give --python PATH.",
            context={"python": wanted},
        )
    # Absolute but not resolved: a venv's python is a link to one that has none of its packages.
    python = Path(located).absolute()
    requirements = [Requirement(text) for text in recipe.provided.packages]
    names = [canonicalize_name(requirement.name) for requirement in requirements]
    # Not isolated (-I), for a module may bring its packages by PYTHONPATH; but never from ~/.local.
    answer = _ask(python, ["-s", "-c", _FIND, *names])
    versions: dict[str, str] = answer["versions"]
    faults = [
        fault
        for name, requirement in zip(names, requirements, strict=True)
        if (fault := _fault(requirement, versions.get(name)))
    ]
    if faults:
        raise MismatchError(
            f"{python} doesn't provide what the recipe {recipe.name} takes from the machine: "
            f"{'; '.join(faults)}.",
            remedy="Load the module or activate the environment that has them, "
            f"or: envbuilder compile recipes/{recipe.name}.toml --local --python PATH",
            context={"python": python, "expected": ", ".join(recipe.provided.packages)},
        )
    return ProvidedPackages(
        python=str(python),
        site_packages=tuple(answer["folders"]),
        versions=versions,
    )


def _fault(requirement: Requirement, version: str | None) -> str | None:
    if version is None:
        return f"{requirement.name} is missing"
    try:
        forms = [Version(version), Version(Version(version).public)]
    except InvalidVersion:
        forms = []
    admitted = any(requirement.specifier.contains(form, prereleases=True) for form in forms)
    return None if admitted else f"{requirement.name} is {version}, not {requirement.specifier}"


def _ask(python: Path, arguments: list[str]) -> dict[str, Any]:
    # The root folder as working folder: "-c" puts it on the import path.
    done = run([python, *arguments], cwd=Path("/"))
    last = done.output.strip().rpartition("\n")[2]
    try:
        if done.returncode == 0:
            return dict(json.loads(last))
    except ValueError:
        pass
    raise MismatchError(
        f"{python} is not a Python interpreter that runs here.",
        remedy="Give --python PATH of a working interpreter.",
        context={"python": python, "exit status": done.returncode, "output": last},
    )

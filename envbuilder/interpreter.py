"""Asks interpreters of this machine what they are, and what packages they have."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import packaging
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from envbuilder.errors import MismatchError
from envbuilder.lock import SourceLock
from envbuilder.machine import TorchBuild
from envbuilder.model import BundleRecord, ProvidedPackages
from envbuilder.process import run
from envbuilder.recipe import Recipe, TargetSpec
from envbuilder.target import lock_for_this_machine, provided_fault

_TIMEOUT_S = 120.0
"""Of an interpreter that tells about itself; a busy shared disk takes its time, a hung one for ever."""
_TORCH_TIMEOUT_S = 600.0
"""The first import of torch on a node reads gigabytes from the shared disk."""

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

# The folder that it is given holds this tool's own `packaging`: the interpreter may have none.
_TAGS = """
import json, sys
sys.path.append(sys.argv[1])
from packaging import markers, tags
print(json.dumps({"tags": [str(tag) for tag in tags.sys_tags()], "markers": markers.default_environment()}))
"""

_TORCH = """
import json
try:
    import torch
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    print("{}")
else:
    cxx11_abi = torch.compiled_with_cxx11_abi()
    print(json.dumps({"version": torch.__version__, "cuda": torch.version.cuda, "cxx11_abi": cxx11_abi}))
"""


# The import takes seconds, and more than ten where there is no bytecode of torch.
_TORCH_FILES = """
import importlib.util, json, os, runpy
spec = importlib.util.find_spec("torch")
if spec is None:
    print("{}")
else:
    folder = os.path.dirname(spec.origin)
    facts = runpy.run_path(os.path.join(folder, "version.py"))
    with open(os.path.join(folder, "lib", "libc10.so"), "rb") as library:
        cxx11_abi = b"__cxx11" in library.read()
    print(json.dumps({"version": facts["__version__"], "cuda": facts["cuda"], "cxx11_abi": cxx11_abi}))
"""


@dataclass(frozen=True)
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


def find_interpreter(wanted: Path) -> Path:
    """The absolute path of the interpreter `wanted`, a path or a name on the PATH; MismatchError if none."""
    located = shutil.which(wanted)
    if located is None:
        raise MismatchError(
            f"There is no interpreter {wanted} on this machine.",
            remedy="Load the module or activate the environment that has it, or give --python PATH.",
            context={"python": wanted},
        )
    # Absolute but not resolved: a venv's python is a link to one that has none of its packages.
    return Path(located).absolute()


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


@dataclass(frozen=True)
class InterpreterTags:
    """What an interpreter takes, in the terms of PEP 425 and PEP 508."""

    tags: tuple[str, ...]
    """Best first."""
    markers: dict[str, str]


def inspect_tags(python: Path) -> InterpreterTags:
    """The wheel tags that `python` takes and its marker environment; nothing where it is too old to tell."""
    own_packaging = Path(packaging.__file__).parent.parent
    try:
        facts = _ask(python, ["-I", "-S", "-c", _TAGS, str(own_packaging)])
    except MismatchError:
        return InterpreterTags((), {})
    return InterpreterTags(tuple(facts["tags"]), dict(facts["markers"]))


def package_versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Normalised name → version of those packages of `names` that `python` has."""
    return dict(_find(python, names)["versions"])


def inspect_torch(python: Path, variables: Mapping[str, str] | None = None) -> TorchBuild | None:
    """The torch that `python` imports, or None; MismatchError where the import fails.

    `variables` are its environment; by default this process's own.
    """
    try:
        facts = _ask(python, ["-s", "-c", _TORCH], variables=variables, timeout_s=_TORCH_TIMEOUT_S)
    except MismatchError as error:
        raise MismatchError(
            f"torch can't be imported by {python}.",
            remedy=f"Run {python} -c 'import torch' and mend what it says.",
            context=error.context,
        ) from error
    return TorchBuild(**facts) if facts else None


def read_torch(python: Path, variables: Mapping[str, str] | None = None) -> TorchBuild | None:
    """As `inspect_torch`, but by torch's files where they say it: it is not imported."""
    try:
        facts = _ask(python, ["-s", "-c", _TORCH_FILES], variables=variables)
    except MismatchError:
        return inspect_torch(python, variables)
    return TorchBuild(**facts) if facts else None


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
    remedy = lock_for_this_machine(bundle.recipe)
    if interpreter.machine != target.machine:
        raise MismatchError(
            f"The lock {bundle.recipe} is for {target.machine}, and this machine is {interpreter.machine}.",
            remedy=remedy,
            context={"expected": target.machine, "got": interpreter.machine},
        )
    if interpreter.glibc is None or Version(interpreter.glibc) < Version(target.glibc):
        raise MismatchError(
            f"The lock {bundle.recipe} needs glibc {target.glibc} or newer, "
            f"and this machine has {interpreter.glibc or 'another C library'}.",
            remedy=remedy,
            context={"expected": f">={target.glibc}", "got": interpreter.glibc},
        )


def find_provided(
    recipe: Recipe, lock: SourceLock | None, python_override: Path | None = None
) -> ProvidedPackages | None:
    """The packages that the recipe takes from the machine, as the provider's interpreter has them.

    None if the recipe has no [provided]. `python_override` stands in for the recipe's interpreter.
    MismatchError where a package is missing or of a version that the recipe doesn't admit, or that `lock` was
    not made for: it may be narrowed to a probed machine. A local version ("+cu130") is compared only where
    the recipe names one.
    """
    if recipe.provided is None:
        return None
    python = find_interpreter(python_override or Path(recipe.provided.python))
    answer = _find(python, sorted(recipe.provided_names))
    versions: dict[str, str] = answer["versions"]
    other_module = (
        "Load the module or activate the environment that has them, "
        f"or: envbuilder compile recipes/{recipe.name}.toml --local --python PATH"
    )
    for who, texts, remedy in (
        ("recipe", recipe.provided.packages, other_module),
        ("lock", lock.provided if lock else (), lock_for_this_machine(recipe.name)),
    ):
        if faults := _provided_faults(texts, versions):
            raise MismatchError(
                f"{python} doesn't provide what the {who} {recipe.name} takes from the machine: "
                f"{'; '.join(faults)}.",
                remedy=remedy,
                context={"python": python, "expected": ", ".join(texts)},
            )
    return ProvidedPackages(
        python=str(python),
        site_packages=tuple(answer["folders"]),
        versions=versions,
    )


def _provided_faults(requirements: Sequence[str], versions: Mapping[str, str]) -> list[str]:
    faults = (
        provided_fault(requirement, versions.get(canonicalize_name(requirement.name)))
        for requirement in map(Requirement, requirements)
    )
    return [fault for fault in faults if fault]


def _find(python: Path, names: Sequence[str]) -> dict[str, Any]:
    # Not isolated (-I), for a module may bring its packages by PYTHONPATH; but never from ~/.local.
    return _ask(python, ["-s", "-c", _FIND, *names])


def _ask(
    python: Path,
    arguments: Sequence[str],
    *,
    variables: Mapping[str, str] | None = None,
    timeout_s: float | None = None,
) -> dict[str, Any]:
    timeout_s = timeout_s or _TIMEOUT_S
    output, status = "", "it was not started"
    try:
        # The root folder as working folder: "-c" puts it on the import path.
        done = run([python, *arguments], env=variables, cwd=Path("/"), timeout_s=timeout_s)
        status = f"no answer in {timeout_s:.0f} s" if done.timed_out else str(done.returncode)
        output = done.output.strip()
        if done.returncode == 0:
            return dict(json.loads(output.rpartition("\n")[2]))
    except (OSError, ValueError) as error:
        output = output or str(error)
    raise MismatchError(
        f"{python} is not a Python interpreter that runs here.",
        remedy="Give --python PATH of a working interpreter.",
        context={"python": python, "exit status": status, "output": output[-1000:]},
    )

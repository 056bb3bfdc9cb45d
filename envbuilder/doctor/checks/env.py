"""The env as it is on disk and as it imports, against its receipt and the lock."""

from __future__ import annotations

import os
import re
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.pylock import Pylock, PylockValidationError
from packaging.utils import NormalizedName, canonicalize_name

from envbuilder.bundle import open_bundle
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.installed import (
    Distribution,
    RecordedFile,
    has_changed,
    owned_paths,
    read_distributions,
    read_torch,
    recorded_files,
)
from envbuilder.doctor.loading import torch_folder
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.envlock import ENV_LOCK
from envbuilder.model import ProvidedPackages
from envbuilder.report import Reporter
from envbuilder.venv import PROVIDED_PTH

IMPORT_TIMEOUT_S = 300
"""torch alone takes a minute to import from a busy shared disk."""
_RUN_AT_START = ("sitecustomize.py", "usercustomize.py")
_SCRIPT_HEAD = 4096
"""Bytes of a script in which its interpreter is named: a path can be that long."""
_SCRIPT_PYTHONS = (
    re.compile(r"#! *(/\S*/(?:python|pypy)[\w.]*)\s"),
    re.compile(r"#!/bin/sh\s+'''exec' [\"']?(/[^\"'$\n]*?/(?:python|pypy)[\w.]*)[\"']?\s"),
)
"""How pip and uv name it: in the first line; where that is too long for the kernel, in a line of shell."""
_ACTIVATED = re.compile(r"^\s*(?:export )?VIRTUAL_ENV=['\"]?([^'\"\n]+?)['\"]?$", re.MULTILINE)


def check_lock(subject: Subject, reporter: Reporter) -> Outcome:
    """The env's receipt against the lock, and the env lock against the receipt."""
    assert subject.recipe is not None
    name = subject.recipe.name
    remedy = f"envbuilder install {subject.recipe_file}"
    if subject.env is None:
        return failed(f"There is no env at {subject.root.env(name)}.", remedy=remedy)
    lock = subject.lock or open_bundle(subject.root, name).lock
    if subject.receipt.lock_sha256 != lock.digest:
        return failed(
            "The env was made from another lock than the present one.",
            f"lock: sha256 {lock.digest}",
            f"env: sha256 {subject.receipt.lock_sha256}",
            remedy=remedy,
        )
    wanted = {canonicalize_name(package.name): package.version for package in subject.receipt.packages}
    try:
        env_lock = Pylock.from_dict(tomllib.loads((subject.env / ENV_LOCK).read_text(encoding="utf-8")))
    except (OSError, ValueError, PylockValidationError) as error:
        return failed(
            "The env lock is missing or damaged.",
            f"{subject.env / ENV_LOCK}: {error}",
            remedy=subject.remake_env,
        )
    if wanted != {str(package.name): str(package.version) for package in env_lock.packages}:
        return failed("The env lock names other packages than the receipt.", remedy=subject.remake_env)
    return ok(f"The env was made from the present lock: {len(wanted)} packages.", str(subject.env))


def check_distributions(subject: Subject, reporter: Reporter) -> Outcome:
    """What is installed against what the receipt says was installed."""
    wanted = {canonicalize_name(package.name): package.version for package in subject.receipt.packages}
    found = read_distributions(subject.site_packages)
    faults = [*_differences(wanted, found), *_provided_differences(subject)]
    if faults:
        return failed(
            f"What is installed differs from the lock in {len(faults)} packages.",
            *shown(faults),
            remedy=subject.remake_env,
        )
    provided = subject.receipt.provided
    beside = f", {len(provided.versions)} provided by the machine" if provided else ""
    return ok(f"All {len(found)} distributions are those of the lock{beside}.")


def _differences(wanted: Mapping[NormalizedName, str], found: tuple[Distribution, ...]) -> Iterator[str]:
    count = Counter(distribution.name for distribution in found)
    for name in sorted(wanted.keys() - count.keys()):
        yield f"{name} {wanted[name]} is missing"
    for distribution in found:
        name, version = distribution.name, distribution.version
        if name not in wanted:
            yield f"{name} {version} is not in the lock ({distribution.folder})"
        elif count[name] > 1:
            yield f"{name} {version} is installed {count[name]} times ({distribution.folder})"
        elif version != wanted[name]:
            yield f"{name} is {version} and not {wanted[name]} ({distribution.folder})"


def _provided_differences(subject: Subject) -> Iterator[str]:
    provided = subject.receipt.provided
    if provided is None:
        return
    found = read_distributions(map(Path, provided.site_packages))
    # Reversed, so that of two the one that is imported counts.
    versions: dict[str, str] = {distribution.name: distribution.version for distribution in reversed(found)}
    for name, version in provided.versions.items():
        if versions.get(name) != version:
            yield f"{name} {version} of {provided.python} is now {versions.get(name, 'missing')}"
    if not any(_reaches(folder, provided) for folder in subject.site_packages):
        yield f"{PROVIDED_PTH}, which makes the machine's packages visible, is missing or changed"


def _reaches(folder: Path, provided: ProvidedPackages) -> bool:
    pth = folder / PROVIDED_PTH
    return pth.is_file() and set(provided.site_packages) <= set(pth.read_text(encoding="utf-8").splitlines())


def check_records(subject: Subject, reporter: Reporter) -> Outcome:
    """Every file of every RECORD, hashed. Provided packages are the machine's own and are not."""
    files: list[RecordedFile] = []
    faults: list[str] = []
    for distribution in read_distributions(subject.site_packages):
        try:
            files += recorded_files(distribution)
        except FileNotFoundError:
            faults.append(f"{distribution.folder / 'RECORD'} is missing")
        except ValueError as error:
            faults.append(f"{distribution.folder / 'RECORD'} is damaged: {error}")
    # hashlib lets go of the interpreter lock, so threads hash as fast as the cores or the disk allow.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for done, fault in enumerate(pool.map(_fault, files), start=1):
            if fault:
                faults.append(fault)
            if done % 500 == 0 or done == len(files):
                reporter.progress("hashing the env", done, len(files), "files")
    if faults:
        return failed(
            f"{len(faults)} of {len(files)} installed files are not as they were installed.",
            *shown(faults),
            remedy=subject.remake_env,
        )
    return ok(f"All {len(files)} installed files have the bytes that their RECORDs name.")


def _fault(file: RecordedFile) -> str | None:
    try:
        return f"{file.path} has other bytes" if has_changed(file) else None
    except FileNotFoundError:
        return f"{file.path} is missing"
    except OSError as error:
        return f"{file.path} can't be read: {error.strerror}"


def check_imports(subject: Subject, reporter: Reporter) -> Outcome:
    """Every extension module that the recipe names, imported by the env's interpreter after torch."""
    assert subject.recipe is not None
    modules = [module for build in subject.recipe.build.values() for module in build.modules]
    if not modules:
        return skipped("The recipe names no extension modules.")
    rebuild = f"envbuilder compile {subject.recipe_file} --local --rebuild"
    # Modules that are linked with torch find its libraries only once it is loaded; others need none.
    first = ["torch"] if torch_folder(subject.import_path) else []
    errors = run_script(
        subject.python, "importing.py", *first, *modules, timeout_s=IMPORT_TIMEOUT_S, remedy=rebuild
    )
    faults = {module: str(error) for module, error in errors.items() if error}
    if faults:
        reason = next(iter(faults.values()))
        return failed(
            f"{', '.join(faults)} can't be imported in the env.",
            *(f"{module}: {error}" for module, error in faults.items()),
            remedy=remedy_for(reason, subject.recipe_file) or rebuild,
        )
    return ok(f"{', '.join(modules)} can be imported.")


def check_strays(subject: Subject, reporter: Reporter) -> Outcome:
    """Files in the env's library folders that no RECORD lists: nobody knows who put them there."""
    found = read_distributions(subject.site_packages)
    owned = {path for distribution in found for path in owned_paths(distribution)}
    strays = [
        path
        for folder in subject.site_packages
        for path in _files_below(folder)
        if path not in owned and path != str(folder / PROVIDED_PTH)
    ]
    running = [path for path in strays if _runs_at_start(Path(path), subject.site_packages)]
    if running:
        return failed(
            f"{len(running)} files that no package brought change every start of the env's Python.",
            *running,
            remedy=f"Look at them; then {subject.remake_env}",
        )
    if strays:
        return warning(
            f"{len(strays)} files in the env belong to no package.",
            *shown(strays),
            remedy=f"Remove what nobody needs, or: {subject.remake_env}",
        )
    return ok(f"All files of the env belong to its {len(found)} packages.", *map(str, subject.site_packages))


def _files_below(top: Path | str) -> Iterator[str]:
    """Without bytecode, which Python writes itself. A link to a folder counts as a file."""
    with os.scandir(top) as entries:
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                if not entry.name.endswith(".pyc"):
                    yield entry.path
            elif entry.name != "__pycache__":
                yield from _files_below(entry.path)


def _runs_at_start(path: Path, site_packages: tuple[Path, ...]) -> bool:
    """Whether Python's `site` module reads it: lines of .pth files extend the import path, or are run."""
    return path.parent in site_packages and (path.suffix == ".pth" or path.name in _RUN_AT_START)


def check_scripts(subject: Subject, reporter: Reporter) -> Outcome:
    """The interpreter that each console script of the env names."""
    assert subject.env is not None
    folder = subject.env / "bin"
    scripts = sorted(path for path in folder.iterdir() if path.is_file() and not path.is_symlink())
    faults = [fault for path in scripts if (fault := _script_fault(path))]
    if faults:
        return failed(
            f"{len(faults)} scripts of the env can't be run, or run another interpreter.",
            *shown(faults),
            remedy=subject.remake_env,
        )
    return ok("All scripts of the env run its own interpreter.", str(folder))


def _script_fault(path: Path) -> str | None:
    with path.open("rb") as file:
        head = file.read(_SCRIPT_HEAD).decode("utf-8", "replace")
    match = next(filter(None, (pattern.match(head) for pattern in _SCRIPT_PYTHONS)), None)
    if match is None:  # a program, a script of another language, or one that finds Python beside itself
        return None
    python = Path(match[1])
    if not path.stat().st_mode & 0o111:
        return f"{path} is not executable"
    if not python.exists():
        return f"{path} is run by {python}, which is not there"
    if python.parent.resolve() != path.parent.resolve():
        return f"{path} is run by {python}"
    return None


def check_interpreter(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether the interpreter that the env was made from is still there, and the env where it was made."""
    assert subject.env is not None
    config = subject.env / "pyvenv.cfg"
    try:
        lines = config.read_text(encoding="utf-8").splitlines()
        settings = {key.strip(): value.strip() for key, _, value in (line.partition("=") for line in lines)}
        home = Path(settings["home"])
    except (OSError, UnicodeDecodeError, KeyError) as error:
        return failed(
            "The env's pyvenv.cfg is missing or damaged.", f"{config}: {error}", remedy=subject.remake_env
        )
    evidence = (f"{config}: home = {home}", f"{subject.python} → {os.path.realpath(subject.python)}")
    if not home.is_dir() or not subject.python.exists():
        return failed(
            "The interpreter that the env was made from is gone.",
            *evidence,
            remedy=f"Load the module that brings it back, or: {subject.remake_env} --python PATH",
        )
    made_with, now = subject.receipt.python, subject.interpreter
    if made_with.split(".")[:2] != now.version.split(".")[:2]:
        return failed(
            f"The env was made for Python {made_with}, and its interpreter is now {now.version}.",
            *evidence,
            remedy=f"{subject.remake_env} --python PATH of a Python {made_with}",
        )
    activate = subject.env / "bin" / "activate"
    named = _ACTIVATED.search(activate.read_text(encoding="utf-8")) if activate.is_file() else None
    if named and Path(named[1]).resolve() != subject.env.resolve():
        return warning(
            "The env was moved: its scripts find it, but activating it leads to where it was.",
            f"{activate}: {named[1]}",
            f"it is at {subject.env}",
            remedy=subject.remake_env,
        )
    return ok(f"The env's interpreter is there: Python {now.version}.", *evidence)


def check_torch(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether the torch of the env is a GPU build, where the recipe compiles GPU code."""
    assert subject.recipe is not None
    if subject.recipe.cuda is None:
        return skipped("The recipe compiles no GPU code.")
    torch = read_torch(subject.import_path)
    if torch is None:
        return skipped("There is no torch in the env.")
    evidence = f"torch {torch.version}: CUDA {torch.cuda}"
    if torch.cuda is None:
        recipe = subject.recipe_file
        if subject.receipt.provided and "torch" in subject.receipt.provided.versions:
            remedy = f"Name an interpreter with a CUDA build in [provided] of {recipe}"
        else:
            remedy = f"Name the index with CUDA builds in [index] of {recipe}"
        return failed(
            "The torch of the env is a CPU build, and the recipe compiles GPU code.",
            evidence,
            remedy=f"{remedy}, then: envbuilder lock {recipe} --upgrade-package torch",
        )
    return ok("The torch of the env is a CUDA build.", evidence)


CHECKS = (
    Check(
        "env.lock",
        "the env's lock",
        "the env's receipt against the lock, and its pylock.toml against the receipt",
        check_lock,
        needs=("recipe",),
    ),
    Check(
        "env.distributions",
        "installed distributions",
        "every installed distribution against the lock: missing, stray, another version, there twice",
        check_distributions,
        needs=("recipe", "env"),
    ),
    Check(
        "env.records",
        "installed files",
        "the sha256 of every installed file against its RECORD",
        check_records,
        needs=("recipe", "env"),
        cost="rehash",
        limit_s=1800,
    ),
    Check(
        "env.imports",
        "extension modules",
        "whether the env's interpreter imports every extension module that the recipe names",
        check_imports,
        needs=("recipe", "env"),
        cost="gpu",
        limit_s=IMPORT_TIMEOUT_S + 10,
    ),
    Check(
        "env.strays",
        "files of no package",
        "files in the env's library folders that no RECORD lists; a .pth file or sitecustomize.py among them "
        "changes every start of Python",
        check_strays,
        needs=("recipe", "env"),
    ),
    Check(
        "env.scripts",
        "the env's scripts",
        "the interpreter that each script in the env's bin folder names: gone, another env's, not executable",
        check_scripts,
        needs=("recipe", "env"),
    ),
    Check(
        "env.interpreter",
        "the env's interpreter",
        "whether the interpreter that the env was made from is there and of the same Python, "
        "and the env where it was made",
        check_interpreter,
        needs=("recipe", "env"),
    ),
    Check(
        "env.torch",
        "the env's torch",
        "whether torch is a CUDA build, where the recipe compiles GPU code",
        check_torch,
        needs=("recipe", "env"),
    ),
)

"""The env as it is on disk and as it imports, against its receipt and the lock."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from packaging.pylock import Pylock, PylockValidationError
from packaging.utils import canonicalize_name

from envbuilder.bundle import open_bundle
from envbuilder.distributions import (
    RecordedFile,
    differences,
    has_changed,
    owned_paths,
    provided_differences,
    read_distributions,
    recorded_files,
    runs_at_start,
)
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.installed import read_torch
from envbuilder.doctor.loading import torch_folder
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.envlock import ENV_LOCK
from envbuilder.report import Reporter
from envbuilder.toml import tomllib
from envbuilder.venv import PROVIDED_PTH

IMPORT_TIMEOUT_S = 300
"""torch alone takes a minute to import from a busy shared disk."""
_SCRIPT_HEAD = 4096
"""Bytes of a script in which its interpreter is named: a path can be that long."""
_SCRIPT_PYTHONS = (
    re.compile(r"#! *(/\S*/(?:python|pypy)[\w.]*)\s"),
    re.compile(r"#!/bin/sh\s+'''exec' [\"']?(/[^\"'$\n]*?/(?:python|pypy)[\w.]*)[\"']?\s"),
)
"""How pip and uv name it: in the first line; where that is too long for the kernel, in a line of shell."""
_ACTIVATED = re.compile(r"^\s*(?:export )?VIRTUAL_ENV=(?![\"']?\$)(.+)$", re.MULTILINE)
"""The folder as bin/activate has it for Linux: for Windows' shells it has $(cygpath …) or $(wslpath …)."""


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
    faults = [
        *differences(wanted, found),
        *provided_differences(subject.receipt.provided, subject.site_packages),
    ]
    if faults:
        return failed(
            f"What is installed differs from the lock in {len(faults)} packages.",
            *shown(faults),
            remedy=subject.remake_env,
        )
    provided = subject.receipt.provided
    beside = f", {len(provided.versions)} provided by the machine" if provided else ""
    return ok(f"All {len(found)} distributions are those of the lock{beside}.")


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
        subject.python,
        "importing.py",
        *first,
        *modules,
        timeout_s=IMPORT_TIMEOUT_S,
        remedy=rebuild,
        env=subject.variables,
    )
    faults = {module: str(error) for module, error in errors.items() if error}
    if faults:
        reason = next(iter(faults.values()))
        # torch was not compiled here: without it, compiling the others again mends nothing.
        return failed(
            f"{', '.join(faults)} can't be imported in the env.",
            *(f"{module}: {error}" for module, error in faults.items()),
            remedy=remedy_for(reason, subject.recipe_file)
            or (_mend_torch(subject) if "torch" in faults else rebuild),
        )
    return ok(f"{', '.join(modules)} can be imported.")


def _mend_torch(subject: Subject) -> str:
    if os.environ.get("LD_LIBRARY_PATH"):
        return f"unset LD_LIBRARY_PATH, and look again: envbuilder doctor {subject.recipe_file} --only env"
    return subject.remake_env


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
    running = [path for path in strays if runs_at_start(Path(path), subject.site_packages)]
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
    named = _activated(activate.read_text(encoding="utf-8")) if activate.is_file() else None
    if named and named.resolve() != subject.env.resolve():
        return warning(
            "The env was moved: its scripts find it, but activating it leads to where it was.",
            f"{activate}: {named}",
            f"it is at {subject.env}",
            remedy=subject.remake_env,
        )
    return ok(f"The env's interpreter is there: Python {now.version}.", *evidence)


def _activated(activate: str) -> Path | None:
    """The env that this text of bin/activate activates; None where it can't be told."""
    if found := _ACTIVATED.search(activate):
        with suppress(ValueError):  # older venvs leave quotes in a folder's name as they are
            return Path("".join(shlex.split(found[1])))
    return None


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
        needs=("recipe", "env", "addresses"),
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

"""The env as it is on disk and as it imports, against its receipt and the lock."""

from __future__ import annotations

import os
import tomllib
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from packaging.pylock import Pylock, PylockValidationError
from packaging.utils import NormalizedName, canonicalize_name

from envbuilder.bundle import open_bundle
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped
from envbuilder.doctor.installed import (
    Distribution,
    RecordedFile,
    has_changed,
    read_distributions,
    recorded_files,
)
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.envlock import ENV_LOCK
from envbuilder.model import ProvidedPackages
from envbuilder.report import Reporter
from envbuilder.venv import PROVIDED_PTH

IMPORT_TIMEOUT_S = 300
"""torch alone takes a minute to import from a busy shared disk."""
SHOWN = 20
"""Lines of evidence at most: a removed folder would name ten thousand files."""


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
            *_shown(faults),
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
            *_shown(faults),
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
    errors = run_script(
        subject.python, "importing.py", "torch", *modules, timeout_s=IMPORT_TIMEOUT_S, remedy=rebuild
    )
    faults = {module: str(error) for module, error in errors.items() if error}
    if faults:
        first = next(iter(faults.values()))
        return failed(
            f"{', '.join(faults)} can't be imported in the env.",
            *(f"{module}: {error}" for module, error in faults.items()),
            remedy=remedy_for(first, subject.recipe_file) or rebuild,
        )
    return ok(f"{', '.join(modules)} can be imported.")


def _shown(faults: list[str]) -> list[str]:
    more = len(faults) - SHOWN
    return faults[:SHOWN] + ([f"… and {more} more"] if more > 0 else [])


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
        limit_s=IMPORT_TIMEOUT_S + 10,
    ),
)

"""Makes an environment from bundle and wheelhouse alone, on either kind of node.

It is made beside its place and moved there whole, with its receipt and its env lock in it: an environment
without a receipt is not one. Where the receipt already says what would be made, nothing is done.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

from envbuilder.atomic import fsync_folder, make_folder, write_atomically, writing
from envbuilder.bundle import TOOL, bundle_file, path_in
from envbuilder.distributions import gone_files
from envbuilder.envlock import ENV_LOCK, WheelFile, bundle_wheel, env_lock_text
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.gpu import wanted_capabilities
from envbuilder.interpreter import Interpreter, check_interpreter, find_provided, inspect_interpreter
from envbuilder.lock import LockedFile
from envbuilder.model import (
    ENV_RECEIPT,
    BuildReceipt,
    Bundle,
    EnvReceipt,
    InstalledPackage,
    ProvidedPackages,
    read_record,
)
from envbuilder.modules import merged
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, SourceBuild
from envbuilder.report import Reporter
from envbuilder.target import target_for
from envbuilder.venv import install_wheels, make_venv
from envbuilder.wheelhouse import find_built

_ACTIVATION = ("activate", "activate.csh", "activate.fish", "Activate.ps1")


@dataclass(frozen=True)
class InstallReport:
    """What `install_env` did."""

    path: Path
    """The env's folder."""
    receipt: EnvReceipt
    seconds: float


@dataclass(frozen=True)
class EnvPlan:
    """What an env is made of."""

    interpreter: Interpreter
    provided: ProvidedPackages | None
    wheels: tuple[WheelFile, ...]
    """By name."""
    receipt: EnvReceipt


def install_env(
    recipe: Recipe,
    bundle: Bundle,
    *,
    root: Root,
    python: Path,
    reporter: Reporter,
    reinstall: bool = False,
    folder: Path | None = None,
) -> InstallReport:
    """Makes the env of `recipe` for interpreter `python`, in `folder` where it isn't to lie in `root`.

    One that is there with the receipt that it would get is left alone, unless `reinstall`, or unless files
    of it are gone, as on a disk that is purged.

    Raises MismatchError where a source package has not been compiled for this machine or a provided package
    is missing, IntegrityError where a file is not the one that was locked or built. Then the env that was
    there is still there.
    """
    began = time.monotonic()
    plan = plan_env(recipe, bundle, root=root, python=python)
    receipt, wheels = plan.receipt, plan.wheels
    place = root.env(recipe.name)
    folder = folder or place
    if not reinstall and (there := _same_env(folder, receipt)):
        gone = gone_files(folder, there)
        if not gone:
            reporter.note(f"{folder} is already what the lock and the wheelhouse say")
            return InstallReport(folder, there, time.monotonic() - began)
        reporter.note(f"{len(gone)} files of {folder} are gone, {gone[0]} among them: it is made anew")
    reporter.stage(f"installing {len(wheels)} packages into {folder}")
    with writing(folder, 2 * sum(wheel.size for wheel in wheels)):
        _make_env(folder, plan, env_lock_text(wheels, place))
    return InstallReport(folder, receipt, time.monotonic() - began)


def plan_env(recipe: Recipe, bundle: Bundle, *, root: Root, python: Path) -> EnvPlan:
    """What `install_env` would make the env of now; it raises what that raises before it writes."""
    interpreter = inspect_interpreter(python)
    check_interpreter(interpreter, bundle.lock.target, bundle.record)
    provided = find_provided(recipe, bundle.lock, python)
    wheels, built = _choose_wheels(recipe, bundle, root, interpreter, provided)
    receipt = EnvReceipt(
        recipe=recipe.name,
        lock_sha256=bundle.lock.digest,
        python=interpreter.version,
        compute_capabilities=wanted_capabilities(recipe.cuda),
        packages=tuple(wheel.package for wheel in wheels),
        extensions=tuple(extension for receipt in built for extension in receipt.extensions),
        provided=provided,
        modules=merged(receipt.modules for receipt in sorted(built, key=lambda receipt: receipt.built_at)),
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    return EnvPlan(interpreter, provided, tuple(wheels), receipt)


def _choose_wheels(
    recipe: Recipe, bundle: Bundle, root: Root, interpreter: Interpreter, provided: ProvidedPackages | None
) -> tuple[list[WheelFile], list[BuildReceipt]]:
    """The wheels of the env, sorted by name, and the receipts of the built ones."""
    target = target_for(bundle.lock.target, interpreter.minor)
    files, build_files = (bundle.lock.select(target, (group,)) for group in ("runtime", "build"))
    # What was built without torch at hand depends on none, whatever the env holds.
    locked_torch = next((file.version for file in build_files if file.package == "torch"), None)
    torch = provided.versions.get("torch", locked_torch) if provided else locked_torch
    wheels: list[WheelFile] = []
    receipts: list[BuildReceipt] = []
    for file in files:
        if not file.is_sdist:
            wheels.append(bundle_wheel(file, bundle_file(bundle, file)))
            continue
        built = find_built(
            root,
            sdist_sha256=file.sha256,
            python=interpreter.minor,
            torch=torch,
            compute_capabilities=wanted_capabilities(recipe.cuda),
            environment=recipe.build.get(file.package, SourceBuild()).env,
            patches=[patch.sha256 for patch in bundle.lock.patches_of(file.package)],
        )
        if built is None:
            raise _not_compiled(recipe, file, interpreter, torch)
        package = InstalledPackage(
            name=file.package,
            version=file.version,
            wheel=built.receipt.wheel,
            sha256=built.receipt.wheel_sha256,
            origin="wheelhouse",
        )
        wheels.append(WheelFile(package, built.path, built.path.stat().st_size))
        receipts.append(built.receipt)
    if trainer := _trainer_wheel(bundle):
        wheels.append(trainer)
    return sorted(wheels, key=lambda wheel: wheel.package.name), receipts


def _trainer_wheel(bundle: Bundle) -> WheelFile | None:
    """The trainer's own wheel, for a bundle that brings it."""
    name, sha256 = bundle.record.trainer_wheel, bundle.record.trainer_sha256
    if name is None or sha256 is None:
        return None
    path = path_in(bundle.path, f"{TOOL}/{name}", recipe=bundle.record.recipe)
    distribution, version, *_ = name.split("-")
    package = InstalledPackage(
        name=distribution.replace("_", "-"), version=version, wheel=name, sha256=sha256, origin="tool"
    )
    return WheelFile(package, path, path.stat().st_size)


def _not_compiled(
    recipe: Recipe, file: LockedFile, interpreter: Interpreter, torch: str | None
) -> MismatchError:
    return MismatchError(
        f"{file.package} {file.version} has not been compiled for this machine.",
        remedy=f"On a compute node: envbuilder compile recipes/{recipe.name}.toml --local",
        context={
            "sdist": file.filename,
            "python": interpreter.minor,
            "torch": torch,
            "compute capabilities": ", ".join(wanted_capabilities(recipe.cuda)),
        },
    )


def _same_env(folder: Path, wanted: EnvReceipt) -> EnvReceipt | None:
    """The receipt of the env in `folder`, if it says all that `wanted` says."""
    try:
        there = read_record(folder / ENV_RECEIPT, EnvReceipt, remedy="")
    except IntegrityError:
        return None
    return there if there.made_of_the_same(wanted) else None


def _make_env(folder: Path, plan: EnvPlan, lock: str) -> None:
    """Makes the env beside `folder`, with `lock` in it, then puts it there; what was there goes only then."""
    make_folder(folder.parent)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".new", dir=folder.parent))
    old = made.with_suffix(".old")
    try:
        make_venv(plan.interpreter, made, plan.provided)
        install_wheels(
            made,
            plan.wheels,
            scratch=made,
            remedy=f"envbuilder fetch recipes/{plan.receipt.recipe}.toml --verify",
        )
        for name in _ACTIVATION:
            script = made / "bin" / name
            script.write_text(script.read_text(encoding="utf-8").replace(str(made), str(folder)), "utf-8")
        write_atomically(made / ENV_LOCK, lock)
        write_atomically(made / ENV_RECEIPT, plan.receipt.model_dump_json(indent=2) + "\n")
        made.chmod(folder.parent.stat().st_mode & 0o7777)
        with suppress(FileNotFoundError):
            folder.rename(old)
        try:
            made.rename(folder)
        except OSError as error:
            if folder.exists():
                raise MismatchError(
                    f"Another process has put an environment at {folder} meanwhile.",
                    remedy=f"envbuilder install recipes/{plan.receipt.recipe}.toml",
                    context={"folder": folder},
                ) from error
            if old.exists():
                old.rename(folder)
            raise
        fsync_folder(folder.parent)
    finally:
        shutil.rmtree(made, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)

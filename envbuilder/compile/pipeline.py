"""Builds a bundle's source packages into wheels, for the GPUs of this machine, without network.

1. Whatever is in the wheelhouse under the same ABI key is taken as it is.
2. A build environment is made from the bundle's `build` group alone, and its compiler tried.
3. Each sdist is unpacked and patched, built in the sandbox, and its wheel checked for what the recipe names.
4. The wheel goes into the wheelhouse, its receipt last.

Everything unfinished lies in one private folder, which is removed however the work ends.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from envbuilder.atomic import make_folder, writing
from envbuilder.bundle import bundle_file, copy_verified, hash_file, path_in
from envbuilder.compile.build import build_wheel, check_wheel, read_units, tag_wheel
from envbuilder.compile.buildenv import BuildEnv, make_build_env
from envbuilder.compile.key import BuildInputs, shaping_files
from envbuilder.compile.unpack import unpack_sdist
from envbuilder.envlock import WheelFile, bundle_wheel
from envbuilder.errors import InputError, MismatchError
from envbuilder.gpu import wanted_capabilities
from envbuilder.interpreter import (
    Interpreter,
    check_interpreter,
    find_provided,
    inspect_interpreter,
    inspect_torch,
)
from envbuilder.lock import LockedFile, LockedPatch, SourceLock
from envbuilder.machine import TorchBuild
from envbuilder.model import BuildReceipt, BuiltWheel, Bundle, ProvidedPackages
from envbuilder.patches import apply_patches, check_git
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, SourceBuild
from envbuilder.report import Reporter
from envbuilder.sandbox import find_sandbox
from envbuilder.target import target_for
from envbuilder.toolchain import (
    CudaToolkit,
    HostCompiler,
    check_toolkit,
    find_host_compiler,
    system_toolkit,
)
from envbuilder.wheelhouse import read_built, store_built


@dataclass(frozen=True, slots=True)
class CompileReport:
    """What `compile_recipe` did."""

    wheels: tuple[BuiltWheel, ...]
    """One for each source package."""
    reused: tuple[str, ...]
    """Names of the packages that were in the wheelhouse already."""
    seconds: float


@dataclass(frozen=True, slots=True)
class _Machine:
    """What this machine brings to a build."""

    interpreter: Interpreter
    compiler: HostCompiler
    capabilities: tuple[str, ...]
    toolkit: CudaToolkit | None
    """Its own, where the recipe wants that one."""
    provided: ProvidedPackages | None
    provided_torch: TorchBuild | None


def compile_recipe(
    recipe: Recipe,
    bundle: Bundle,
    *,
    root: Root,
    python: Path,
    reporter: Reporter,
    require_isolation: bool = False,
    rebuild: bool = False,
) -> CompileReport:
    """Builds every source package of `bundle` for interpreter `python`; see the module's text.

    require_isolation: fail where a build can't be cut off from the network.
    rebuild: build again what is in the wheelhouse.

    Raises MismatchError where the machine lacks what the build needs, InputError where nvcc can't make the
    recipe's architectures, IntegrityError where a file is not the lock's, BuildError where a build fails.
    """
    began = time.monotonic()
    interpreter = inspect_interpreter(python)
    check_interpreter(interpreter, bundle.lock.target, bundle.record)
    target = target_for(bundle.lock.target, interpreter.minor)
    sdists = [file for file in bundle.lock.select(target, ("runtime",)) if file.is_sdist]
    if not sdists:
        return CompileReport((), (), time.monotonic() - began)
    build_files = bundle.lock.select(target, ("build",))
    machine = _inspect_machine(recipe, bundle.lock, interpreter, python)
    inputs = {sdist: _inputs(recipe, bundle, sdist, build_files, machine) for sdist in sdists}
    wheels: dict[LockedFile, BuiltWheel] = {}
    for sdist in sdists if not rebuild else ():
        if built := read_built(root, inputs[sdist].key):
            reporter.note(f"{built.path.name} is in the wheelhouse already")
            wheels[sdist] = built
    reused = tuple(sdist.package for sdist in wheels)
    if missing := [sdist for sdist in sdists if sdist not in wheels]:
        if any(bundle.lock.patches_of(sdist.package) for sdist in missing):
            check_git()
        sandbox = find_sandbox(require_isolation=require_isolation)
        if sandbox.isolation == "none":
            reporter.warn("this machine can't cut builds off from the network; the receipts say so")
        make_folder(root.logs)
        make_folder(root.cache)
        log = root.logs / f"compile-{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}.log"
        with (
            writing(root.cache, 2 * sum(file.size for file in build_files)),
            tempfile.TemporaryDirectory(
                prefix="compile-", dir=root.cache, ignore_cleanup_errors=True
            ) as private,
        ):
            reporter.stage("making the build environment")
            env = make_build_env(
                Path(private),
                interpreter=interpreter,
                provided=machine.provided,
                wheels=_build_wheels(recipe, bundle, build_files),
                cuda=recipe.cuda,
                system=machine.toolkit,
                capabilities=machine.capabilities,
                compiler=machine.compiler,
                sandbox=sandbox,
                log=log,
                remedy=_fetch_again(recipe.name),
            )
            for sdist in missing:
                reporter.stage(f"building {sdist.package} {sdist.version}")
                wheel, receipt = _build(
                    bundle,
                    sdist,
                    recipe.build.get(sdist.package, SourceBuild()),
                    inputs[sdist],
                    env=env,
                    folder=Path(private) / sdist.package,
                    log=log,
                    reporter=reporter,
                )
                wheels[sdist] = store_built(root, wheel, receipt)
    return CompileReport(tuple(wheels[sdist] for sdist in sdists), reused, time.monotonic() - began)


def _inspect_machine(recipe: Recipe, lock: SourceLock, interpreter: Interpreter, python: Path) -> _Machine:
    compiler = find_host_compiler(os.environ)
    if (
        any(build.modules for build in recipe.build.values())
        and not (interpreter.include / "Python.h").exists()
    ):
        raise MismatchError(
            f"{interpreter.path} has no header files to compile extension modules with.",
            remedy="Debian, Ubuntu: apt install python3-dev; or give --python PATH of another interpreter.",
            context={"expected": interpreter.include / "Python.h"},
        )
    capabilities = wanted_capabilities(recipe.cuda)
    toolkit = None
    if recipe.cuda is not None and recipe.cuda.toolchain == "system":
        toolkit = system_toolkit(os.environ)
        check_toolkit(toolkit, None, capabilities)
    provided = find_provided(recipe, lock, python)
    torch = inspect_torch(Path(provided.python)) if provided and "torch" in provided.versions else None
    return _Machine(interpreter, compiler, capabilities, toolkit, provided, torch)


def _inputs(
    recipe: Recipe, bundle: Bundle, sdist: LockedFile, build_files: Sequence[LockedFile], machine: _Machine
) -> BuildInputs:
    locked_torch = next((file.version for file in build_files if file.package == "torch"), None)
    build = recipe.build.get(sdist.package, SourceBuild())
    build_requires = bundle.lock.package_table(sdist.package).get("build-requires", ())
    return BuildInputs(
        package=sdist.package,
        version=sdist.version,
        sdist_sha256=sdist.sha256,
        patches=tuple(patch.sha256 for patch in bundle.lock.patches_of(sdist.package)),
        python=machine.interpreter.minor,
        torch=machine.provided_torch.version if machine.provided_torch else locked_torch,
        compute_capabilities=machine.capabilities,
        host_compiler=machine.compiler.version,
        system_nvcc=machine.toolkit.version if machine.toolkit else None,
        provided_torch=machine.provided_torch,
        build_files=shaping_files(build_files, build_requires),
        environment=tuple(sorted(build.env.items())),
    )


def _build_wheels(recipe: Recipe, bundle: Bundle, build_files: Sequence[LockedFile]) -> list[WheelFile]:
    if sdists := [file.package for file in build_files if file.is_sdist]:
        raise InputError(
            f"The build needs {', '.join(sdists)}, of which the lock has no wheel.",
            remedy=f"Name a version that has wheels in build-requires, then "
            f"envbuilder lock recipes/{recipe.name}.toml",
            context={"lock": bundle.lock.name},
        )
    return [bundle_wheel(file, bundle_file(bundle, file)) for file in build_files]


def _build(
    bundle: Bundle,
    sdist: LockedFile,
    build: SourceBuild,
    inputs: BuildInputs,
    *,
    env: BuildEnv,
    folder: Path,
    log: Path,
    reporter: Reporter,
) -> tuple[Path, BuildReceipt]:
    """The wheel of `sdist`, built and checked in the new `folder`, with its receipt."""
    began = time.monotonic()
    archive = folder / sdist.filename
    copy_verified(bundle_file(bundle, sdist), sdist.sha256, sdist.size, archive)
    source = unpack_sdist(archive, folder / "source")
    patches = bundle.lock.patches_of(sdist.package)
    apply_patches(source, _patches(bundle, patches, folder))
    env.units_log.unlink(missing_ok=True)
    wheel = build_wheel(
        source,
        sdist,
        env=env,
        variables=build.env,
        folder=folder / "wheel",
        log=log,
        reporter=reporter,
    )
    extensions = check_wheel(
        wheel,
        sdist,
        modules=build.modules,
        capabilities=inputs.compute_capabilities,
        folder=folder / "look",
        log=log,
    )
    wheel = tag_wheel(wheel, inputs.build_tag)
    units = read_units(env.units_log, source)
    receipt = BuildReceipt(
        package=sdist.package,
        version=sdist.version,
        sdist=sdist.filename,
        sdist_sha256=sdist.sha256,
        patches={patch.path: patch.sha256 for patch in patches},
        key=inputs.key,
        wheel=wheel.name,
        wheel_sha256=hash_file(wheel),
        python=env.interpreter.version,
        torch=env.torch.version if env.torch else None,
        torch_cuda=env.torch.cuda if env.torch else None,
        cxx11_abi=env.torch.cxx11_abi if env.torch else None,
        nvcc=env.toolkit.version if env.toolkit else None,
        host_compiler=inputs.host_compiler,
        compute_capabilities=inputs.compute_capabilities,
        architectures_kept=tuple(sorted({name for unit in units for name in unit.architectures_kept})),
        architectures_dropped=tuple(sorted({name for unit in units for name in unit.architectures_dropped})),
        extensions=extensions,
        isolation=env.sandbox.isolation,
        environment={**env.recorded, **build.env},
        units=units,
        seconds=round(time.monotonic() - began, 3),
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return wheel, receipt


def _patches(bundle: Bundle, patches: Sequence[LockedPatch], folder: Path) -> dict[str, bytes]:
    """The bytes of `patches`, each verified as it is read."""
    contents = {}
    for patch in patches:
        source = path_in(bundle.path, patch.path, recipe=bundle.record.recipe)
        copy = folder / "patch"
        copy_verified(source, patch.sha256, patch.size, copy, remedy=_fetch_again(bundle.record.recipe))
        contents[patch.path] = copy.read_bytes()
    return contents


def _fetch_again(recipe: str) -> str:
    return f"envbuilder fetch recipes/{recipe}.toml --verify"

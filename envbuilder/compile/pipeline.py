"""Builds a bundle's source packages into wheels, for the GPUs of this machine, without network.

1. Whatever is in the wheelhouse under the same ABI key is taken as it is.
2. A build environment is made from the bundle's `build` group alone, and its compiler tried.
3. All other packages are built at once (`workshop`), each sdist unpacked and patched, built in a sandbox, and
   its wheel checked for what the recipe names.
4. Each wheel goes into the wheelhouse as soon as it is ready, its receipt last.

Everything unfinished lies in one private folder, which is removed however the work ends. What was compiled
stays in the object cache, so that the next run goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.atomic import make_folder, scratch_folder, writing
from envbuilder.bundle import bundle_file
from envbuilder.compile.buildenv import prepared_tools
from envbuilder.compile.key import BuildInputs, locked_cuda, shaping_files, shaping_wheels
from envbuilder.compile.workshop import Options, Order, Workshop
from envbuilder.envlock import WheelFile, bundle_wheel
from envbuilder.errors import InputError, MismatchError
from envbuilder.gpu import wanted_capabilities
from envbuilder.interpreter import (
    Interpreter,
    check_interpreter,
    find_provided,
    inspect_interpreter,
    read_torch,
)
from envbuilder.lock import LockedFile, SourceLock
from envbuilder.machine import TorchBuild
from envbuilder.model import BuiltWheel, Bundle, ProvidedPackages
from envbuilder.patches import check_git
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
    older_than_torch,
    system_toolkit,
)
from envbuilder.wheelhouse import read_built
from envbuilder.wheelhouse_index import write_indexes


@dataclass(frozen=True)
class CompileReport:
    """What `compile_recipe` did."""

    wheels: tuple[BuiltWheel, ...]
    """One for each source package."""
    reused: tuple[str, ...]
    """Names of the packages that were in the wheelhouse already."""
    seconds: float
    timeline: Path | None
    """An HTML page that shows when each unit was compiled; None where nothing was."""


@dataclass(frozen=True)
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
    prove: bool = False,
) -> CompileReport:
    """Builds every source package of `bundle` for interpreter `python`; see the module's text.

    require_isolation: fail where a build can't be cut off from the network.
    rebuild: build again what is in the wheelhouse.
    prove: compile units that are compiled in shards whole too, and compare their kernels' machine code.

    Raises MismatchError where the machine lacks what the build needs, InputError where nvcc can't make the
    recipe's architectures, IntegrityError where a file is not the lock's, BuildError where a build fails,
    StoppedError where a signal stopped it: the next run goes on from there.
    """
    began = time.monotonic()
    interpreter = inspect_interpreter(python)
    check_interpreter(interpreter, bundle.lock.target, bundle.record)
    target = target_for(bundle.lock.target, interpreter.minor)
    sdists = [file for file in bundle.lock.select(target, ("runtime",)) if file.is_sdist]
    if not sdists:
        return CompileReport((), (), time.monotonic() - began, None)
    build_files = bundle.lock.select(target, ("build",))
    machine = _inspect_machine(recipe, bundle.lock, interpreter, python)
    inputs = {sdist: _inputs(recipe, bundle, sdist, build_files, machine) for sdist in sdists}
    wheels: dict[LockedFile, BuiltWheel] = {}
    for sdist in sdists if not rebuild else ():
        if built := read_built(root, inputs[sdist].key):
            reporter.note(f"{built.path.name} is in the wheelhouse already")
            wheels[sdist] = built
    reused = tuple(sdist.package for sdist in wheels)
    timeline = None
    if missing := [sdist for sdist in sdists if sdist not in wheels]:
        if any(bundle.lock.patches_of(sdist.package) for sdist in missing):
            check_git()
        sandbox = find_sandbox(require_isolation=require_isolation)
        if sandbox.isolation == "none":
            reporter.warn("this machine can't cut builds off from the network; the receipts say so")
        make_folder(root.logs)
        make_folder(root.cache)
        stem = f"compile-{recipe.name}-{time.strftime('%Y%m%d-%H%M%S')}"
        with (
            writing(root.cache, 2 * sum(file.size for file in build_files)),
            scratch_folder(root.cache, "compile-") as private,
        ):
            reporter.stage("making the build environment")
            scratch = private / "tools"
            scratch.mkdir()
            with prepared_tools(
                root.cache / "buildenvs",
                scratch,
                interpreter=interpreter,
                provided=machine.provided,
                wheels=_build_wheels(recipe, bundle, build_files),
                cuda=recipe.cuda,
                system=machine.toolkit,
                capabilities=machine.capabilities,
                compiler=machine.compiler,
                provided_torch=machine.provided_torch,
                sandbox=sandbox,
                log=root.logs / f"{stem}.log",
                remedy=f"envbuilder fetch recipes/{recipe.name}.toml --verify",
            ) as tools:
                cuda = tools.torch.cuda if tools.torch else None
                if tools.toolkit and (older := older_than_torch(tools.toolkit, cuda)):
                    reporter.warn(older)
                workshop = Workshop(
                    bundle,
                    tools,
                    root=root,
                    sandbox=sandbox,
                    folder=private,
                    stem=stem,
                    options=Options(rebuild=rebuild, prove=prove),
                    reporter=reporter,
                )
                orders = [
                    Order(
                        sdist,
                        recipe.build.get(sdist.package, SourceBuild()),
                        inputs[sdist],
                        shaping_wheels(build_files, _build_requires(bundle, sdist)),
                    )
                    for sdist in missing
                ]
                try:
                    wheels |= workshop.build(orders)
                finally:
                    timeline = workshop.write_timeline()
                    write_indexes(root)
    else:
        write_indexes(root)  # whatever has become of its pages
    built_wheels = tuple(wheels[sdist] for sdist in sdists)
    return CompileReport(built_wheels, reused, time.monotonic() - began, timeline)


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
    torch = read_torch(Path(provided.python)) if provided and "torch" in provided.versions else None
    return _Machine(interpreter, compiler, capabilities, toolkit, provided, torch)


def _inputs(
    recipe: Recipe, bundle: Bundle, sdist: LockedFile, build_files: Sequence[LockedFile], machine: _Machine
) -> BuildInputs:
    locked_torch = next((file.version for file in build_files if file.package == "torch"), None)
    build = recipe.build.get(sdist.package, SourceBuild())
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
        build_files=shaping_files(build_files, _build_requires(bundle, sdist)),
        environment=tuple(sorted(build.env.items())),
        ptx=recipe.cuda is not None and recipe.cuda.ptx,
        cuda=locked_cuda(build_files),
    )


def _build_requires(bundle: Bundle, sdist: LockedFile) -> Sequence[str]:
    requires: Sequence[str] = bundle.lock.package_table(sdist.package).get("build-requires", ())
    return requires


def _build_wheels(recipe: Recipe, bundle: Bundle, build_files: Sequence[LockedFile]) -> list[WheelFile]:
    if sdists := [file.package for file in build_files if file.is_sdist]:
        raise InputError(
            f"The build needs {', '.join(sdists)}, of which the lock has no wheel.",
            remedy=f"Name a version that has wheels in build-requires, then "
            f"envbuilder lock recipes/{recipe.name}.toml",
            context={"lock": bundle.lock.name},
        )
    return [bundle_wheel(file, bundle_file(bundle, file)) for file in build_files]

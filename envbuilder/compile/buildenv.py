"""The build environment: a venv from the bundle's `build` group, the compilers, and their variables.

The tools are one for all packages of a bundle. Each package has a room of its own beside the others: its
private folder, which is all that its build can write, with the compilers' drivers in it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pyproject_hooks

from envbuilder.atomic import make_folder
from envbuilder.bundle import hash_file
from envbuilder.compile.buildenv_cache import cached_build_venv
from envbuilder.compile.drivers import compiler as compiler_driver
from envbuilder.envlock import WheelFile
from envbuilder.errors import MismatchError
from envbuilder.fatbin import gpu_architectures
from envbuilder.gpu import architecture
from envbuilder.interpreter import Interpreter, read_torch
from envbuilder.load_order import library_folders
from envbuilder.machine import TorchBuild
from envbuilder.model import LoadedModule, ProvidedPackages
from envbuilder.modules import load_again, loaded_modules
from envbuilder.process import Cancel, run
from envbuilder.recipe import CudaSpec
from envbuilder.sandbox import Sandbox, sandbox_environment
from envbuilder.sandbox_root import BUILD
from envbuilder.toolchain import (
    CudaToolkit,
    HostCompiler,
    check_toolkit,
    make_cuda_home,
    packaged_toolkit,
)
from envbuilder.venv import install_wheels, make_venv, site_packages, venv_python

SOURCE_DATE_EPOCH = "315532800"
"""1 January 1980, the earliest time that a zip archive can hold: file times in wheels don't tell the day."""
_AT_ONCE = "256"
"""Compilers that a build may start: all it has, for the broker decides when each of them runs."""
_BYTECODE = "bytecode"
"""The folder with the bytecode of what builds import, also of a provided torch: a sealed build can't write it
beside the sources, and compiling all of torch's takes longer than its import."""
SETUPTOOLS_SETTINGS = "[bdist_wheel]\ncompression = stored\n"
"""`rewrite_wheel` compresses what comes out: doing it twice costs seconds for each 100 MB."""
_IMPORTED = (
    "torch.utils.cpp_extension",
    "setuptools.build_meta",
    "setuptools.command.build_ext",
    "setuptools.command.bdist_wheel",
    "packaging.version",
)
_TIMEOUT_S = 60.0
"""Of a compiler that only tells what it is."""
_PROBE = """\
#include <cuda_runtime.h>
__global__ void fill(int *values) { values[threadIdx.x] = 1; }
extern "C" int probe(int *values) {
    fill<<<1, 32>>>(values);
    return cudaGetLastError();
}
"""


@dataclass(frozen=True)
class BuildTools:
    """What every build of a bundle uses, checked."""

    interpreter: Interpreter
    """What the venv was made from."""
    venv: Path
    bytecode: Path
    """Where the bytecode of what builds import is, once it was made."""
    provided: ProvidedPackages | None
    compiler: HostCompiler
    linker: str
    """The `ld` that it links with."""
    toolkit: CudaToolkit | None
    torch: TorchBuild | None
    capabilities: tuple[str, ...]
    ptx: bool
    modules: tuple[LoadedModule, ...]
    """The environment modules that are loaded here."""
    trial: Callable[[], None]
    """Has the CUDA compiler make a few lines; MismatchError where its parts don't fit together. A second of
    work, to be done beside the builds' first steps."""

    @property
    def site_packages(self) -> tuple[Path, ...]:
        """The venv's own, then the provider's."""
        provided = self.provided.site_packages if self.provided else ()
        return (site_packages(self.venv, self.interpreter.minor), *map(Path, provided))

    @property
    def libraries(self) -> tuple[Path, ...]:
        """Where what is built finds libraries once it is imported, in the loader's order."""
        again = load_again({}, self.modules, keep_cuda_libraries=self.provided is not None)
        found = list(library_folders(again.get("LD_LIBRARY_PATH", "")))
        for folder in self.site_packages:
            found += [folder / "torch/lib", *folder.glob("nvidia/*/lib")]
        if self.toolkit is not None:
            found += [self.toolkit.home / name for name in ("lib64", "lib")]
        return tuple(path for path in found if path.is_dir())

    @property
    def numbers(self) -> tuple[str, ...]:
        """The architectures, e.g. "90"."""
        return tuple(architecture(capability) for capability in self.capabilities)


@dataclass(frozen=True)
class BuildRoom:
    """One package's place to be built in."""

    folder: Path
    """Its private folder, as this process sees it."""
    sandbox: Sandbox
    python: str
    """The venv's interpreter, as the build sees it."""
    variables: dict[str, str]
    """Of the sandbox and the compilers; the recipe's come on top."""
    recorded: dict[str, str]
    """Those of `variables` that say how the build is done, not where."""
    socket: Path
    """Where the drivers look for the compile service."""


@contextmanager
def prepared_tools(
    cache: Path,
    scratch: Path,
    *,
    interpreter: Interpreter,
    provided: ProvidedPackages | None,
    wheels: Sequence[WheelFile],
    cuda: CudaSpec | None,
    system: CudaToolkit | None,
    capabilities: Sequence[str],
    compiler: HostCompiler,
    provided_torch: TorchBuild | None,
    sandbox: Sandbox,
    log: Path,
    remedy: str,
) -> Iterator[BuildTools]:
    """The venv (kept in the folder `cache` from build to build) and the compilers.

    `wheels` are the bundle's `build` group. The CUDA compiler is `system`, else the one among the wheels.
    """

    def make(folder: Path) -> None:
        make_venv(interpreter, folder, provided)
        install_wheels(folder, wheels, scratch=scratch, remedy=remedy)

    with cached_build_venv(
        cache, interpreter=interpreter, provided=provided, wheels=wheels, make=make
    ) as venv:
        variables = {**_variables(scratch, venv, provided), "PYTHONDONTWRITEBYTECODE": "1"}
        torch = provided_torch or read_torch(venv_python(venv), variables)
        toolkit, trial = None, _nothing
        if cuda is not None:
            toolkit = system or packaged_toolkit(site_packages(venv, interpreter.minor))
            check_toolkit(toolkit, torch.cuda if torch else None, capabilities)
            numbers = [architecture(capability) for capability in capabilities]
            trial = partial(_try_toolkit, scratch, toolkit, compiler, numbers, variables=variables, log=log)
        bytecode = cache.with_name(_BYTECODE) / venv.name
        cancel = Cancel()
        thread = threading.Thread(
            target=_compile_bytecode,
            args=(bytecode, scratch / _BYTECODE, venv, provided, sandbox),
            kwargs={"log": scratch / "bytecode.log", "cancel": cancel},
        )
        tools = BuildTools(
            interpreter=interpreter,
            venv=venv,
            bytecode=bytecode,
            provided=provided,
            compiler=compiler,
            linker=_program(compiler.cxx, "ld") or "ld",
            toolkit=toolkit,
            torch=torch,
            capabilities=tuple(capabilities),
            ptx=cuda is not None and cuda.ptx,
            modules=loaded_modules(os.environ),
            trial=trial,
        )
        # Beside the builds, which wait for their compilers: it serves the next ones.
        if not bytecode.exists():
            _remove_bytecode_of_others(bytecode, cache)
            thread.start()
        try:
            yield tools
        finally:
            cancel.now()
            if thread.ident is not None:
                thread.join()


def _compile_bytecode(
    kept: Path,
    private: Path,
    venv: Path,
    provided: ProvidedPackages | None,
    sandbox: Sandbox,
    *,
    log: Path,
    cancel: Cancel,
) -> None:
    """Imports what builds import, seen as they see it, and keeps its bytecode in the new folder `kept`."""
    private.mkdir()
    room = sandbox.for_build(private, binds={f"{BUILD}/venv": venv}, readable=_readable(venv, provided))
    variables = _variables(private, venv, provided, sandbox=room)
    variables["PYTHONPYCACHEPREFIX"] = str(room.inside(private / _BYTECODE))
    python = room.inside(venv) / "bin/python"
    for module in _IMPORTED:  # what isn't there can't be imported
        with suppress(MismatchError):  # a sandbox that can't be entered: the build itself says so
            room.run([python, "-c", f"import {module}"], env=variables, cwd=private, log=log, cancel=cancel)
    made = private / _BYTECODE
    if made.is_dir() and not cancel.asked:
        make_folder(kept.parent)
        with suppress(OSError):  # another process was faster
            made.rename(kept)


def _remove_bytecode_of_others(bytecode: Path, venvs: Path) -> None:
    """Removes what belongs to venvs that are no more."""
    for folder in bytecode.parent.glob("*"):
        if not (venvs / folder.name).exists():
            shutil.rmtree(folder, ignore_errors=True)


def _readable(venv: Path, provided: ProvidedPackages | None) -> list[Path]:
    """What a build reads, wherever it lies: the venv, its base interpreter and the provider's packages."""
    base = (venv / "bin/python").resolve()
    return [venv, _prefix(base), *map(Path, provided.site_packages if provided else ())]


def make_room(tools: BuildTools, folder: Path, sandbox: Sandbox) -> BuildRoom:
    """A room in the new `folder`, in `sandbox`."""
    folder.mkdir()
    programs = [tools.compiler.cxx, *([tools.toolkit.nvcc] if tools.toolkit else [])]
    readable = [*_readable(tools.venv, tools.provided), *map(_prefix, programs)]
    binds = {f"{BUILD}/venv": tools.venv}
    if tools.bytecode.is_dir():
        binds[f"{BUILD}/{_BYTECODE}"] = tools.bytecode
    sandbox = sandbox.for_build(folder, binds=binds, readable=readable)
    venv = sandbox.inside(tools.venv)
    socket = folder / "compilers"
    recorded = {
        "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
        "MAX_JOBS": _AT_ONCE,
        "CMAKE_BUILD_PARALLEL_LEVEL": _AT_ONCE,
        # The interpreter's own flags often ask for debug information: twice the memory, and no one reads it.
        "CFLAGS": "-g0",
    }
    drivers = folder / "bin"
    drivers.mkdir()
    shutil.copyfile(compiler_driver.__file__, drivers / "driver.py")
    shutil.copyfile(Path(compiler_driver.__file__).with_name("frontend.py"), folder / "frontend.py")
    shutil.copytree(
        Path(pyproject_hooks.__file__).parent,
        folder / "frontend" / "pyproject_hooks",
        ignore=shutil.ignore_patterns("__pycache__"),
    )
    real = {"c++": str(tools.compiler.cxx)} | ({"cc": str(tools.compiler.cc)} if tools.compiler.cc else {})

    def driver(tool: str) -> list[str | Path]:
        script = sandbox.inside(drivers / "driver.py")
        return [venv / "bin/python", "-I", "-S", script, sandbox.inside(socket), tool, real[tool]]

    settings = folder / "setuptools.cfg"
    settings.write_text(SETUPTOOLS_SETTINGS, encoding="utf-8")
    variables = _variables(folder, tools.venv, tools.provided, sandbox=sandbox) | recorded
    variables["DIST_EXTRA_CONFIG"] = str(sandbox.inside(settings))
    if tools.bytecode.is_dir():
        variables["PYTHONPYCACHEPREFIX"] = str(sandbox.inside(tools.bytecode))
    for tool, name in (("c++", "CXX"), ("cc", "CC")):
        if tool in real:
            # The real name: builds tell by it which compiler it is.
            wrapper = drivers / Path(real[tool]).name
            _write_wrapper(wrapper, driver(tool))
            variables[name] = str(sandbox.inside(wrapper))
    if tools.toolkit is not None:
        real["nvcc"] = str(sandbox.inside(tools.toolkit.nvcc))
        # A provided torch has the headers of the CUDA libraries that it uses beside itself.
        includes = [
            Path(path) / "nvidia" / tools.toolkit.home.name / "include"
            for path in (tools.provided.site_packages if tools.provided else ())
        ]
        home = make_cuda_home(tools.toolkit, folder / "cuda", more_includes=includes)
        _write_wrapper(home / "bin" / "nvcc", driver("nvcc"))
        inside = sandbox.inside(home)
        recorded["TORCH_CUDA_ARCH_LIST"] = ";".join(tools.capabilities)
        nvcc = str(inside / "bin" / "nvcc")
        variables |= {"CUDA_HOME": str(inside), "PYTORCH_NVCC": nvcc, "CUDACXX": nvcc} | recorded
        variables["PATH"] = f"{inside / 'bin'}{os.pathsep}{variables['PATH']}"
        # As a cluster's module does: a setup.py that calls nvcc itself often links with -lcudart and no -L.
        folders = [str(inside / "lib64"), variables.get("LIBRARY_PATH")]
        variables["LIBRARY_PATH"] = os.pathsep.join(filter(None, folders))
    return BuildRoom(folder, sandbox, str(venv / "bin/python"), variables, recorded, socket)


def compiler_identities(tools: BuildTools) -> dict[str, tuple[str, str]]:
    """Tool → its name and version, and a digest of the programs that do its work."""
    host = [tools.compiler.cxx, *([tools.compiler.cc] if tools.compiler.cc else [])]
    programs = [path.resolve() for path in host]
    for compiler in host:
        told = (_program(compiler, name) for name in ("cc1plus", "cc1", "as"))
        programs += [Path(program).resolve() for program in told if program]
    digest = _digest(programs)
    identities = dict.fromkeys(("c++", "cc"), (tools.compiler.version, digest))
    if tools.toolkit is not None:
        bin_folder = tools.toolkit.nvcc.parent
        parts = ("nvcc", "cudafe++", "ptxas", "fatbinary", "nvlink", "nvcc.profile")
        cuda = [*(bin_folder / part for part in parts), tools.toolkit.home / "nvvm/bin/cicc"]
        found_parts = [path for path in cuda if path.exists()]
        identities["nvcc"] = (f"nvcc {tools.toolkit.version}", _digest([*found_parts, *programs]))
    return identities


def _program(compiler: Path, name: str) -> str | None:
    """The program `name` that `compiler` runs; None where it doesn't say, as clang of its own parts."""
    told = run([compiler, f"-print-prog-name={name}"], timeout_s=_TIMEOUT_S).output.strip()
    return shutil.which(told)


def _digest(programs: Sequence[Path]) -> str:
    hasher = hashlib.sha256()
    for program in programs:
        hasher.update(bytes.fromhex(hash_file(program)))
    return hasher.hexdigest()


def _variables(
    private: Path, venv: Path, provided: ProvidedPackages | None, *, sandbox: Sandbox | None = None
) -> dict[str, str]:
    path = [venv / "bin", *([Path(provided.python).parent] if provided else [])]
    return sandbox_environment(
        os.environ,
        private=private,
        path=path,
        keep_cuda_libraries=provided is not None,
        sandbox=sandbox,
    )


def _prefix(program: Path) -> Path:
    """The folder that `program` is installed in: it may lie in a home, of which builds see nothing else."""
    folder = program.resolve().parent
    return folder.parent if folder.name == "bin" and folder.parent != Path.home() else folder


def _write_wrapper(path: Path, words: Sequence[str | Path]) -> None:
    path.write_text(f'#!/bin/sh\nexec {shlex.join(map(str, words))} "$@"\n', encoding="utf-8")
    path.chmod(0o755)


def _nothing() -> None:
    """Without a CUDA compiler there is nothing to try."""


def _try_toolkit(
    folder: Path,
    toolkit: CudaToolkit,
    compiler: HostCompiler,
    numbers: Sequence[str],
    *,
    variables: dict[str, str],
    log: Path,
) -> None:
    """Compiles and links a few lines: parts that don't fit together show here, not after minutes of work."""
    source, library = folder / "probe.cu", folder / "probe.so"
    source.write_text(_PROBE, encoding="utf-8")
    home = make_cuda_home(toolkit, folder / "cuda")
    command: list[str | Path] = [toolkit.nvcc, "-ccbin", compiler.cxx, "-Xcompiler", "-fPIC", "-shared"]
    for number in numbers:
        command += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
    command += ["--cudart=none", source, f"-L{home}/lib64", "-lcudart", "-o", library]
    done = run(command, env=variables, cwd=folder, log=log)
    made = gpu_architectures(library) if done.returncode == 0 else ()
    if set(made) != {f"sm_{number}" for number in numbers}:
        raise MismatchError(
            "The CUDA compiler can't compile and link a ten-line program.",
            remedy=f"envbuilder doctor --log {log}",
            context={"log": log, "output": done.output.strip()[-1000:], "architectures": ", ".join(made)},
        )

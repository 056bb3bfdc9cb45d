"""Compiles, links and imports a small extension, with the compilers that a recipe's builds would get."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from envbuilder.doctor.check import Outcome, failed, ok
from envbuilder.doctor.cuda_toolkit import provided_packages, toolkit_files, why_no_toolkit
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.fatbin import gpu_architectures
from envbuilder.gpu import architecture, wanted_capabilities
from envbuilder.interpreter import inspect_interpreter, read_torch
from envbuilder.machine import TorchBuild
from envbuilder.process import run
from envbuilder.sandbox import sandbox_environment
from envbuilder.toolchain import (
    CudaToolkit,
    HostCompiler,
    check_toolkit,
    find_host_compiler,
    make_cuda_home,
)

STEP_TIMEOUT_S = 300.0
"""Of one compiler's call, or of the import: a busy node with a cold disk takes its time."""
_SOURCE = Path(__file__).with_name("extension.cu")
_TORCH_LIBRARIES = ("c10", "torch_cpu", "torch")
_TORCH_CUDA_LIBRARIES = ("c10_cuda", "torch_cuda")


@dataclass
class Workbench:
    """What the extension is made with, and what its making took."""

    subject: Subject
    folder: Path
    """Private, and on a disk from which a library can be loaded."""
    evidence: list[str] = field(default_factory=list)

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Writes down how long the block took."""
        began = time.monotonic()
        yield
        self.evidence.append(f"{what}: {time.monotonic() - began:.1f} s")


@dataclass(frozen=True)
class _Parts:
    compiler: HostCompiler
    python: Path
    include: Path
    """Python's headers."""
    toolkit: CudaToolkit | None
    cuda_home: Path | None
    torch: TorchBuild | None
    torch_folder: Path | None
    numbers: tuple[str, ...]

    @property
    def made_of(self) -> str:
        """What it was compiled with, in words."""
        nvcc = f"nvcc {self.toolkit.version} for sm_{', sm_'.join(self.numbers)} and " if self.toolkit else ""
        torch = f", torch {self.torch.version}" if self.torch else ""
        return f"{nvcc}{self.compiler.cxx} ({self.compiler.version}){torch}"


def try_extension(subject: Subject, folder: Path) -> Outcome:
    """The verdict on the toolchain, by making an extension in `folder`. MismatchError without a compiler, or
    where nvcc and torch are of different CUDA releases; InputError where nvcc can't make an architecture."""
    bench = Workbench(subject, folder)
    parts = _gather(bench)
    variables = sandbox_environment(
        os.environ,
        private=folder,
        path=[parts.python.parent],
        keep_cuda_libraries=provided_packages(subject) is not None,
    )
    module = folder / "extension.so"
    for what, command in (
        ("compiling", _compile_command(parts, folder)),
        ("linking", _link_command(parts, folder)),
    ):
        with bench.step(f"{what} with {parts.made_of}" if what == "compiling" else what):
            done = run(command, env=variables, cwd=folder, timeout_s=STEP_TIMEOUT_S)
        if done.returncode != 0:
            return _failure(bench, what, done.output, timed_out=done.timed_out)
    made = set(gpu_architectures(module))
    if made != {f"sm_{number}" for number in parts.numbers}:
        return _failure(bench, "compiling", f"it has code for {', '.join(sorted(made)) or 'no GPU'}")
    with bench.step(f"importing it with {parts.python}"):
        report = run_script(
            parts.python,
            "extension_run.py",
            str(folder),
            *(["torch"] if parts.torch else []),
            timeout_s=STEP_TIMEOUT_S,
            remedy=f"envbuilder doctor {subject.recipe_file} --only env",
        )
    if report["problem"]:
        return _failure(bench, "importing", str(report["problem"]))
    where = "on the GPU" if report["gpu"] else "on the CPU alone, for no GPU is here"
    ran = where if parts.toolkit else "on the CPU"
    return ok(f"A small extension compiles, links, is imported and runs {ran}.", *bench.evidence)


def _gather(bench: Workbench) -> _Parts:
    """The compilers, and the torch and Python to compile against."""
    subject = bench.subject
    compiler = find_host_compiler(os.environ)
    cuda = subject.recipe.cuda if subject.recipe else None
    toolkit = home = None
    if why_no_toolkit(subject) is None:
        files = toolkit_files(subject)
        with bench.step(f"making nvcc ready from {files.where}"):
            toolkit = files.unpacked(bench.folder)
            home = make_cuda_home(toolkit, bench.folder / "cuda", more_includes=files.provided)
    provided = provided_packages(subject)
    python = subject.python if subject.env or provided is None else Path(provided.python)
    site_packages = (
        subject.import_path if subject.env else map(Path, provided.site_packages if provided else ())
    )
    headers = (path / "torch" for path in site_packages)
    torch_folder = next((path for path in headers if (path / "include").is_dir()), None)
    torch = read_torch(python) if torch_folder else None
    if torch and toolkit:
        check_toolkit(toolkit, torch.cuda, wanted_capabilities(cuda))
    if torch is None or (toolkit and torch.cuda is None):
        torch = torch_folder = None
        bench.evidence.append("without torch: none that fits is installed yet")
    numbers = tuple(map(architecture, wanted_capabilities(cuda))) if toolkit else ()
    include = inspect_interpreter(python).include
    return _Parts(compiler, python, include, toolkit, home, torch, torch_folder, numbers)


def _compile_command(parts: _Parts, folder: Path) -> list[str | Path]:
    words: list[str | Path] = [parts.compiler.cxx, "-x", "c++", "-fPIC"]
    if parts.toolkit and parts.cuda_home:
        words = [parts.toolkit.nvcc, "-ccbin", parts.compiler.cxx, "-Xcompiler", "-fPIC"]
        for number in parts.numbers:
            words += ["-gencode", f"arch=compute_{number},code=sm_{number}"]
        words += ["-isystem", parts.cuda_home / "include"]
    if parts.torch and parts.torch_folder:
        words += ["-DWITH_TORCH", f"-D_GLIBCXX_USE_CXX11_ABI={int(parts.torch.cxx11_abi)}"]
        words += ["-isystem", parts.torch_folder / "include"]
    return [*words, "-std=c++17", "-isystem", parts.include, "-c", _SOURCE, "-o", folder / "extension.o"]


def _link_command(parts: _Parts, folder: Path) -> list[str | Path]:
    words: list[str | Path] = [parts.compiler.cxx, "-shared", folder / "extension.o"]
    if parts.torch_folder:
        names: Sequence[str] = (*_TORCH_LIBRARIES, *(_TORCH_CUDA_LIBRARIES if parts.toolkit else ()))
        words += [f"-L{parts.torch_folder}/lib", *(f"-l{name}" for name in names)]
    if parts.cuda_home:
        libraries = parts.cuda_home / "lib64"
        words += [f"-L{libraries}", "-lcudart"]
        # With torch, the libraries are those that it has loaded by then.
        words += [] if parts.torch else [f"-Wl,-rpath,{libraries}"]
    return [*words, "-o", folder / "extension.so"]


def _failure(bench: Workbench, what: str, output: str, *, timed_out: bool = False) -> Outcome:
    recipe = bench.subject.recipe_file
    said = output.strip().splitlines()
    if timed_out:
        said.append(f"killed after {STEP_TIMEOUT_S:.0f} s")
    return failed(
        f"A small extension fails at {what} it: a build of the recipe would, too.",
        *bench.evidence,
        *said[-8:],
        remedy=remedy_for(output, recipe)
        or "Mend what the last lines say (compilers, CUDA and Python headers come with modules or packages); "
        f"then: envbuilder doctor {recipe} --toolchain",
    )

"""The compilers: what is on this machine, and what compiled the env."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from envbuilder.atomic import make_folder
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.cuda_toolkit import HOST_CONFIG, provided_packages, toolkit_files, why_no_toolkit
from envbuilder.doctor.extension import STEP_TIMEOUT_S, try_extension
from envbuilder.doctor.installed import InstalledTorch, read_torch
from envbuilder.doctor.subject import Subject
from envbuilder.model import BuildReceipt
from envbuilder.process import run
from envbuilder.report import Reporter
from envbuilder.target import python_versions, target_for
from envbuilder.toolchain import check_toolkit, find_host_compiler, older_than_torch, system_toolkit
from envbuilder.wheelhouse import all_built

_COMPILE_TIMEOUT_S = 60
_ASK_TIMEOUT_S = 20
_ALWAYS_INCLUDED = ("cuda_runtime.h", HOST_CONFIG)
_INCLUDED_BY_TORCH = ("cusparse.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h")
"""Headers that ATen/cuda/CUDAContextLight.h includes, and so nearly every extension of torch."""
_PROGRAM = "#include <string>\nint main() { return std::string(1, 'x').size() == 1 ? 0 : 1; }\n"


def check_compiler(subject: Subject, reporter: Reporter) -> Outcome:
    """A C++ compiler that compiles and links: for source builds, and for Triton at run time."""
    compiler = find_host_compiler(os.environ)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "program.cpp")
        source.write_text(_PROGRAM, encoding="utf-8")
        tried = run([compiler.cxx, source, "-o", Path(folder, "program")], timeout_s=_COMPILE_TIMEOUT_S)
    if tried.returncode != 0:
        return failed(
            f"The C++ compiler {compiler.cxx} can't compile and link three lines.",
            *tried.output.strip().splitlines()[-5:],
            remedy="Debian, Ubuntu: apt install g++; on a cluster: module load gcc",
        )
    return ok("The C++ compiler compiles and links.", f"{compiler.cxx}: {compiler.version}")


def check_cuda(subject: Subject, reporter: Reporter) -> Outcome:
    """nvcc's CUDA against torch's: of the nvcc that compiled the env, and of the machine's if it is used."""
    assert subject.recipe is not None
    cuda = subject.recipe.cuda
    if cuda is None:
        return skipped("The recipe compiles no GPU code.")
    torch = _torch(subject)
    if torch is None:
        return skipped("There is no torch to hold nvcc against yet.")
    evidence, faults = [f"torch {torch.version}: CUDA {torch.cuda}"], []
    if cuda.toolchain == "system":
        toolkit = system_toolkit(os.environ)
        check_toolkit(toolkit, torch.cuda, cuda.compute_capabilities)
        evidence.append(f"{toolkit.nvcc}: CUDA {toolkit.version}")
        evidence += filter(None, [older_than_torch(toolkit, torch.cuda)])
    for receipt in _build_receipts(subject):
        evidence.append(f"{receipt.package}: compiled by nvcc {receipt.nvcc} for torch {receipt.torch}")
        if receipt.nvcc and receipt.nvcc.split(".")[0] != str(torch.cuda).split(".")[0]:
            faults.append(f"{receipt.package} was compiled by nvcc {receipt.nvcc}")
        if receipt.torch and receipt.torch != torch.version:
            faults.append(f"{receipt.package} was compiled for torch {receipt.torch}")
    if faults:
        return failed(
            f"{'; '.join(faults)}, and the env's torch is {torch.version} with CUDA {torch.cuda}.",
            *evidence,
            remedy=f"envbuilder compile {subject.recipe_file} --local --rebuild "
            f"&& envbuilder install {subject.recipe_file}",
        )
    return ok(f"nvcc's CUDA has the major version of torch's ({torch.cuda}).", *evidence)


def check_host(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether nvcc takes this host compiler, which preprocesses the header where nvcc decides that."""
    if reason := why_no_toolkit(subject):
        return skipped(reason)
    toolkit, compiler = toolkit_files(subject), find_host_compiler(os.environ)
    text = toolkit.header_text(HOST_CONFIG)
    if text is None:
        return skipped(f"{toolkit.where}: there is no {HOST_CONFIG} in it, see toolchain.toolkit.")
    evidence = (f"{compiler.cxx}: {compiler.version}", f"{HOST_CONFIG} of {toolkit.where}")
    with tempfile.TemporaryDirectory() as folder:
        header = Path(folder, "host_config.h")
        header.write_text(text, encoding="utf-8")
        # These macros say that nvcc compiles, and that it includes the header itself.
        macros = ("-D__CUDACC__", "-D__CUDA_INCLUDE_COMPILER_INTERNAL_HEADERS__")
        tried = run([compiler.cxx, "-E", "-x", "c++", *macros, header], timeout_s=_COMPILE_TIMEOUT_S)
    if tried.returncode == 0:
        return ok("nvcc takes the host compiler.", *evidence)
    refused = re.search(r"#error\s+(-- .*?!)", tried.output)
    newest = re.search(r"later than (\d+)", tried.output)
    other = f"g++-{newest[1]}" if newest else "another g++"
    return failed(
        "nvcc doesn't take the host compiler.",
        *evidence,
        *([refused[1]] if refused else tried.output.strip().splitlines()[-5:]),
        remedy=f"Load a module with {other} or an older one (module avail gcc), or install it, and name it: "
        f"export CXX={other.removeprefix('another ')}",
    )


def check_headers(subject: Subject, reporter: Reporter) -> Outcome:
    """Python.h of the interpreter: extensions are compiled with it, and Triton's launchers at run time."""
    header = subject.interpreter.include / "Python.h"
    if header.is_file():
        return ok("Python's headers are there.", f"{header}")
    compiles = subject.recipe is not None and any(build.modules for build in subject.recipe.build.values())
    return (failed if compiles else warning)(
        f"Python {subject.interpreter.minor} has no header files, which compiled packages and Triton need.",
        f"{subject.interpreter.path}: looked for {header}",
        remedy=f"Debian, Ubuntu: apt install python{subject.interpreter.minor}-dev; on a cluster, a Python "
        "with headers is a module's: module load python, then make the env anew with its --python",
    )


def check_toolkit_parts(subject: Subject, reporter: Reporter) -> Outcome:
    """The toolkit's headers, and libcudart to link against."""
    if reason := why_no_toolkit(subject):
        return skipped(reason)
    toolkit = toolkit_files(subject)
    uses_torch = _torch(subject) is not None or _locks(subject, "torch")
    headers = (*_ALWAYS_INCLUDED, *(_INCLUDED_BY_TORCH if uses_torch else ()))
    found = {name: toolkit.header(name) for name in headers}
    found["libcudart.so"] = toolkit.library("libcudart.so")
    evidence = [f"{name}: {path or 'not found'}" for name, path in found.items()]
    missing = [name for name, path in found.items() if path is None]
    # The driver's stub: only few packages link with it, and no package of NVIDIA's has it.
    evidence.append(f"libcuda.so for -lcuda: {toolkit.library('stubs/libcuda.so') or 'not in the toolkit'}")
    if missing:
        return failed(
            f"The CUDA toolkit ({toolkit.where}) lacks {', '.join(missing)}.",
            *evidence,
            remedy='Load a CUDA module that is whole (module avail cuda), or set toolchain = "packages" and '
            f"toolchain-requirements in [cuda] of {subject.recipe_file}; then: "
            f"envbuilder lock {subject.recipe_file} && envbuilder fetch {subject.recipe_file}",
        )
    return ok("The CUDA toolkit's headers and libcudart are there.", toolkit.where, *evidence)


def check_ninja(subject: Subject, reporter: Reporter) -> Outcome:
    """ninja, without which torch's build helper compiles a package's files one after the other."""
    assert subject.recipe is not None
    packages = [name for name, build in subject.recipe.build.items() if build.modules]
    if not packages:
        return skipped("The recipe names no extension modules to compile.")
    if _locks(subject, "ninja"):
        return ok("ninja comes with the bundle, for builds alone.")
    add = (
        f'Add "ninja" to build-requires in [build.{packages[0]}] of {subject.recipe_file}; then: '
        f"envbuilder lock {subject.recipe_file}"
    )
    there = shutil.which("ninja")
    if there is None:
        return warning(
            "There is no ninja: torch's build helper compiles file after file.",
            "not in the lock's build group, not on the PATH",
            remedy=add,
        )
    asked = run([there, "--version"], timeout_s=_ASK_TIMEOUT_S)
    if asked.returncode != 0:
        return warning(
            "The ninja on the PATH doesn't run: torch's build helper compiles file after file.",
            f"{there} --version ended with {asked.returncode}",
            *asked.output.strip().splitlines()[-3:],
            remedy=add,
        )
    return ok(f"ninja {asked.output.strip()} runs.", there)


def check_modules(subject: Subject, reporter: Reporter) -> Outcome:
    """The modules loaded in this shell against the site's."""
    assert subject.site is not None
    site = subject.site
    if not site.modules:
        return skipped(f"The site {site.name} names no modules.")
    loaded = [name for name in os.environ.get("LOADEDMODULES", "").split(":") if name]
    missing = [name for name in site.modules if not any(_is_module(name, there) for there in loaded)]
    evidence = (f"loaded: {', '.join(loaded) or 'none'}", f"the site's: {', '.join(site.modules)}")
    if not missing:
        return ok("The site's modules are loaded.", *evidence)
    others = [there for name in missing for there in loaded if there.split("/")[0] == name.split("/")[0]]
    instead = f" ({', '.join(others)} instead)" if others else ""
    return warning(
        f"{', '.join(missing)} is not loaded here{instead}: jobs load it themselves, but what runs in this "
        "shell (--local) goes without.",
        *evidence,
        remedy=f"module load {' '.join(missing)}",
    )


def check_extension(subject: Subject, reporter: Reporter) -> Outcome:
    """Compiles, links and imports a small extension, as a build of the recipe would."""
    if subject.recipe and subject.recipe.cuda and (reason := why_no_toolkit(subject)):
        return skipped(reason)
    # Not in TMPDIR, from which on some clusters no library can be loaded.
    make_folder(subject.root.cache)
    with tempfile.TemporaryDirectory(prefix="toolchain-", dir=subject.root.cache) as folder:
        return try_extension(subject, Path(folder))


def _is_module(wanted: str, loaded: str) -> bool:
    """Whether `loaded` ("gcc/12.2.0") is what `module load wanted` ("gcc", "gcc/12.2.0") gives."""
    return loaded == wanted or loaded.startswith(f"{wanted}/")


def _locks(subject: Subject, package: str) -> bool:
    """Whether the lock's builds get `package`."""
    if subject.lock is None:
        return False
    python = subject.bundle.record.python if subject.has_bundle else python_versions(subject.lock.target)[0]
    files = subject.lock.select(target_for(subject.lock.target, python), ("build",))
    return any(file.package == package for file in files)


def _torch(subject: Subject) -> InstalledTorch | None:
    """The env's torch; before there is an env, the one that the machine provides."""
    if subject.env:
        return read_torch(subject.import_path)
    provided = provided_packages(subject)
    return read_torch(map(Path, provided.site_packages)) if provided else None


def _build_receipts(subject: Subject) -> Iterator[BuildReceipt]:
    """How the wheels were built that the env holds."""
    if subject.env:
        installed = {package.sha256 for package in subject.receipt.packages}
        for built in all_built(subject.root):
            if built.receipt.wheel_sha256 in installed:
                yield built.receipt


CHECKS = (
    Check(
        "toolchain.compiler",
        "the C++ compiler",
        "whether the C++ compiler ($CXX, else g++, c++ or clang++) compiles and links a small program",
        check_compiler,
        limit_s=_COMPILE_TIMEOUT_S + 10,
    ),
    Check(
        "toolchain.cuda",
        "nvcc",
        "the CUDA release of nvcc (that compiled the env; the machine's, if it is used) against torch's",
        check_cuda,
        needs=("recipe",),
    ),
    Check(
        "toolchain.host",
        "the host compiler for nvcc",
        "the C++ compiler against the releases that nvcc takes, by the header in which nvcc itself decides",
        check_host,
        needs=("recipe",),
        limit_s=_COMPILE_TIMEOUT_S + 10,
    ),
    Check(
        "toolchain.headers",
        "Python's headers",
        "Python.h of the env's interpreter (before install: the running one)",
        check_headers,
    ),
    Check(
        "toolchain.toolkit",
        "the CUDA toolkit",
        "the toolkit's headers, those of the CUDA libraries that torch's include, and libcudart",
        check_toolkit_parts,
        needs=("recipe",),
    ),
    Check(
        "toolchain.ninja",
        "ninja",
        "whether ninja is among what builds get, or on the PATH and runs",
        check_ninja,
        needs=("recipe",),
    ),
    Check(
        "toolchain.modules",
        "modules",
        "the modules loaded in this shell ($LOADEDMODULES) against those of the site",
        check_modules,
        needs=("site",),
    ),
    Check(
        "toolchain.extension",
        "a small extension",
        "whether a small extension compiles, links and is imported, with the recipe's nvcc, host compiler, "
        "architectures and torch; asked for by --toolchain",
        check_extension,
        cost="asked",
        limit_s=4 * STEP_TIMEOUT_S,
    ),
)

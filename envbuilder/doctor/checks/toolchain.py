"""The compilers: what is on this machine, and what compiled the env."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped
from envbuilder.doctor.installed import InstalledTorch, read_torch
from envbuilder.doctor.subject import Subject
from envbuilder.interpreter import find_provided
from envbuilder.model import BuildReceipt
from envbuilder.process import run
from envbuilder.report import Reporter
from envbuilder.toolchain import check_toolkit, find_host_compiler, system_toolkit
from envbuilder.wheelhouse import all_built

_COMPILE_TIMEOUT_S = 60
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
    return ok(f"nvcc's CUDA is that of torch ({torch.cuda}).", *evidence)


def _torch(subject: Subject) -> InstalledTorch | None:
    """The env's torch; before there is an env, the one that the machine provides."""
    if subject.env:
        return read_torch(subject.import_path)
    provided = find_provided(subject.recipe, subject.lock) if subject.recipe else None
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
)

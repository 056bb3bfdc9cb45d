"""The build environment: a venv from the bundle's `build` group, the compilers, and their variables."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from envbuilder.compile.drivers import nvcc as nvcc_driver
from envbuilder.compile.jobs import max_jobs
from envbuilder.envlock import WheelFile
from envbuilder.errors import MismatchError
from envbuilder.fatbin import gpu_architectures
from envbuilder.gpu import architecture
from envbuilder.interpreter import Interpreter, inspect_torch
from envbuilder.machine import TorchBuild
from envbuilder.model import ProvidedPackages
from envbuilder.recipe import CudaSpec
from envbuilder.sandbox import Sandbox, sandbox_environment
from envbuilder.toolchain import (
    CudaToolkit,
    HostCompiler,
    check_toolkit,
    make_cuda_home,
    packaged_toolkit,
)
from envbuilder.venv import install_wheels, make_venv, venv_python

SOURCE_DATE_EPOCH = "315532800"
"""1 January 1980, the earliest time that a zip archive can hold: file times in wheels don't tell the day."""

_PROBE = """\
#include <cuda_runtime.h>
__global__ void fill(int *values) { values[threadIdx.x] = 1; }
extern "C" int probe(int *values) {
    fill<<<1, 32>>>(values);
    return cudaGetLastError();
}
"""


@dataclass(frozen=True, slots=True)
class BuildEnv:
    """Ready to build in."""

    interpreter: Interpreter
    """What the venv was made from."""
    python: Path
    """The venv's."""
    sandbox: Sandbox
    variables: dict[str, str]
    """Of the sandbox and the compilers; the recipe's come on top."""
    recorded: dict[str, str]
    """Those of `variables` that say how the build is done, not where."""
    torch: TorchBuild | None
    toolkit: CudaToolkit | None
    units_log: Path
    """Where the nvcc driver writes one line for each unit."""


def make_build_env(
    folder: Path,
    *,
    interpreter: Interpreter,
    provided: ProvidedPackages | None,
    wheels: Sequence[WheelFile],
    cuda: CudaSpec | None,
    system: CudaToolkit | None,
    capabilities: Sequence[str],
    compiler: HostCompiler,
    sandbox: Sandbox,
    log: Path,
    remedy: str,
) -> BuildEnv:
    """Makes the build environment in `folder`, and tries its CUDA compiler on a small unit.

    `wheels` are the bundle's `build` group. The CUDA compiler is `system`, else the one among the wheels.
    """
    venv = folder / "venv"
    site_packages = make_venv(interpreter, venv, provided)
    install_wheels(venv, wheels, scratch=folder, remedy=remedy)
    python = venv_python(venv)
    path = [python.parent, *([Path(provided.python).parent] if provided else [])]
    variables = sandbox_environment(
        os.environ, private=folder, path=path, keep_cuda_libraries=provided is not None
    )
    recorded = {
        "SOURCE_DATE_EPOCH": SOURCE_DATE_EPOCH,
        "MAX_JOBS": str(max_jobs()),
        # The interpreter's own flags often ask for debug information: twice the memory, and no one reads it.
        "CFLAGS": "-g0",
    }
    variables |= recorded | {"CXX": str(compiler.cxx)} | ({"CC": str(compiler.cc)} if compiler.cc else {})
    torch = inspect_torch(python, variables)
    units_log = folder / "units.jsonl"
    toolkit = None
    if cuda is not None:
        toolkit = system or packaged_toolkit(site_packages)
        check_toolkit(toolkit, torch.cuda if torch else None, capabilities)
        numbers = [architecture(capability) for capability in capabilities]
        script = Path(nvcc_driver.__file__)
        driver: list[str | Path] = [python, "-I", "-S", script, toolkit.nvcc, ",".join(numbers), units_log]
        # A provided torch has the headers of the CUDA libraries that it uses beside itself.
        includes = [
            Path(path) / "nvidia" / toolkit.home.name / "include"
            for path in (provided.site_packages if provided else ())
        ]
        home = make_cuda_home(toolkit, folder / "cuda", driver=driver, more_includes=includes)
        recorded["TORCH_CUDA_ARCH_LIST"] = ";".join(capabilities)
        nvcc = str(home / "bin" / "nvcc")
        variables |= {"CUDA_HOME": str(home), "PYTORCH_NVCC": nvcc, "CUDACXX": nvcc} | recorded
        variables["PATH"] = f"{home / 'bin'}{os.pathsep}{variables['PATH']}"
        _try_toolkit(folder, compiler, numbers, sandbox=sandbox, variables=variables, log=log)
    return BuildEnv(interpreter, python, sandbox, variables, recorded, torch, toolkit, units_log)


def _try_toolkit(
    folder: Path,
    compiler: HostCompiler,
    numbers: Sequence[str],
    *,
    sandbox: Sandbox,
    variables: dict[str, str],
    log: Path,
) -> None:
    """Compiles and links a few lines: parts that don't fit together show here, not after minutes of work."""
    source, library = folder / "probe.cu", folder / "probe.so"
    source.write_text(_PROBE, encoding="utf-8")
    home = variables["CUDA_HOME"]
    command: list[str | Path] = [f"{home}/bin/nvcc", "-ccbin", compiler.cxx, "-Xcompiler", "-fPIC", "-shared"]
    command += ["--cudart=none", source, f"-L{home}/lib64", "-lcudart", "-o", library]
    done = sandbox.run(command, env=variables, cwd=folder, log=log)
    made = gpu_architectures(library) if done.returncode == 0 else ()
    if set(made) != {f"sm_{number}" for number in numbers}:
        raise MismatchError(
            "The CUDA compiler can't compile and link a ten-line program.",
            remedy=f"envbuilder doctor --log {log}",
            context={"log": log, "output": done.output.strip()[-1000:], "architectures": ", ".join(made)},
        )

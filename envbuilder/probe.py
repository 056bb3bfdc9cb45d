"""Probes the machine that this runs on, for a lock that is made elsewhere. Changes nothing."""

from __future__ import annotations

import os
import platform
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path

from packaging.utils import canonicalize_name

from envbuilder.cgroup import control_group_limits
from envbuilder.errors import MismatchError
from envbuilder.gpu import Gpu, read_gpus
from envbuilder.interpreter import (
    Interpreter,
    find_interpreter,
    inspect_interpreter,
    inspect_tags,
    inspect_torch,
    package_versions,
)
from envbuilder.machine import MachineRecord, ProbedGpu, ProbedInterpreter, ProbedProgram, TorchBuild
from envbuilder.process import run
from envbuilder.toolchain import compiler_release, find_host_compiler, system_toolkit

_TIMEOUT_S = 60.0


def probe_machine(python: Path, provided: Sequence[str]) -> MachineRecord:
    """What this machine is, for interpreter `python` (a path, or a name on the PATH).

    `provided` are names of packages to look for in it. MismatchError if `python` doesn't run. All else that
    is not here, fails or hangs is None in the record.
    """
    interpreter = inspect_interpreter(find_interpreter(python))
    names = sorted({str(canonicalize_name(name)) for name in provided})
    versions = package_versions(interpreter.path, names) if names else {}
    limits = control_group_limits()
    gpus = read_gpus()
    cc, cxx = _compilers()
    return MachineRecord(
        probed_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        interpreter=_interpreter(interpreter),
        machine=interpreter.machine,
        glibc=interpreter.glibc,
        kernel=platform.release(),
        driver=gpus.devices[0].driver if gpus.devices else None,
        driver_cuda=gpus.cuda,
        gpus=tuple(_gpu(gpu) for gpu in gpus.devices),
        nvcc=_nvcc(),
        cc=cc,
        cxx=cxx,
        cgroup_version=limits.version,
        cpus=len(os.sched_getaffinity(0)),
        cpu_limit=limits.cpus,
        memory_bytes=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        memory_limit_bytes=limits.memory,
        user_namespaces=_user_namespaces(),
        scratch_free_bytes=_scratch_free(),
        provided={name: versions.get(name) for name in names},
        torch=_torch(interpreter.path) if "torch" in versions else None,
    )


def _interpreter(interpreter: Interpreter) -> ProbedInterpreter:
    tags = inspect_tags(interpreter.path)
    return ProbedInterpreter(
        implementation=interpreter.implementation,
        version=interpreter.version,
        tags=tags.tags,
        markers=tags.markers,
    )


def _gpu(gpu: Gpu) -> ProbedGpu:
    capability = re.fullmatch(r"\d+\.\d+", gpu.compute_capability)
    return ProbedGpu(
        name=gpu.name,
        compute_capability=capability[0] if capability else None,
        memory_bytes=int(gpu.memory_mib) << 20 if gpu.memory_mib.isdigit() else None,
    )


def _nvcc() -> ProbedProgram | None:
    with suppress(MismatchError):
        toolkit = system_toolkit(os.environ)
        return ProbedProgram(path=str(toolkit.nvcc), release=toolkit.version)
    return None


def _compilers() -> tuple[ProbedProgram | None, ProbedProgram | None]:
    """The C and the C++ compiler that a build would take."""
    try:
        compiler = find_host_compiler(os.environ)
    except MismatchError:
        found = shutil.which(os.environ.get("CC") or "gcc")
        return _program(Path(found) if found else None), None
    return _program(compiler.cc), _program(compiler.cxx)


def _program(path: Path | None) -> ProbedProgram | None:
    return ProbedProgram(path=str(path), release=compiler_release(path)) if path else None


def _user_namespaces() -> bool | None:
    """Tried, since limits, LSMs and seccomp filters refuse them in ways that no file tells; unshare(1)."""
    if shutil.which("unshare") is None:
        return None
    return run(["unshare", "--user", "--map-root-user", "true"], timeout_s=_TIMEOUT_S).returncode == 0


def _scratch_free() -> int | None:
    try:
        return shutil.disk_usage(os.environ.get("TMPDIR") or "/tmp").free
    except OSError:
        return None


def _torch(python: Path) -> TorchBuild | None:
    try:
        return inspect_torch(python)
    except MismatchError:
        return None

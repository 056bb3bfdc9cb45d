"""Variables of the shell that get between the env and its libraries.

`ok` also where one is set that envbuilder's own commands drop or don't heed: the evidence says so. What only
a shell of the user's own would stumble over is a warning.
"""

from __future__ import annotations

import os
import re
import socket
from contextlib import suppress
from pathlib import Path

from envbuilder.doctor.check import Check, Outcome, failed, ok, warning
from envbuilder.doctor.installed import read_torch
from envbuilder.doctor.network_variables import SECRET, check_hub, check_pip, check_proxy
from envbuilder.doctor.shadowing import (
    Shadow,
    env_libraries,
    folders_of,
    shadowed_libraries,
    shadowed_modules,
)
from envbuilder.doctor.subject import Subject
from envbuilder.process import run
from envbuilder.report import Reporter
from envbuilder.toolchain import find_host_compiler

_TIMEOUT_S = 20
_FLAGS = ("CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "NVCC_PREPEND_FLAGS", "NVCC_APPEND_FLAGS", "MAX_JOBS")
_FLAGS_OF_TORCH = ("TORCH_CUDA_ARCH_LIST", "TORCH_NVCC_FLAGS", "CUDAHOSTCXX", "FORCE_CUDA")
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": r"1",
    "PYTORCH_NO_CUDA_MEMORY_CACHING": r"[^0].*",
    "TORCH_DISTRIBUTED_DEBUG": r"DETAIL",
    "NCCL_DEBUG": r"TRACE",
    "NCCL_P2P_DISABLE": r"1",
    "NCCL_SHM_DISABLE": r"1",
    "NCCL_IB_DISABLE": r"1",
    "NVIDIA_TF32_OVERRIDE": r"0",
    "TRITON_INTERPRET": r"1",
    "TORCHDYNAMO_DISABLE": r"1",
    "TORCH_COMPILE_DEBUG": r"1",
}
"""Leftovers of a search for a fault that make training slower → the values that do."""


def check_libraries(subject: Subject, reporter: Reporter) -> Outcome:
    """Libraries in LD_LIBRARY_PATH that the loader takes in place of the env's, or an older libstdc++."""
    folders = folders_of("LD_LIBRARY_PATH")
    if not folders:
        return ok("LD_LIBRARY_PATH is not set.")
    evidence = [f"LD_LIBRARY_PATH={os.environ['LD_LIBRARY_PATH']}"]
    evidence += [f"{folder}: not there" for folder in folders if not folder.is_dir()]
    if said := _why_python_fails(subject.python, "LD_LIBRARY_PATH"):
        return failed(
            f"With LD_LIBRARY_PATH {subject.python} doesn't work, and without it does.",
            *evidence,
            *said.splitlines()[-3:],
            remedy="unset LD_LIBRARY_PATH",
        )
    own = env_libraries(subject.import_path) if subject.env else {}
    return _judge_shadows(shadowed_libraries(folders, own), evidence, "LD_LIBRARY_PATH", bool(own))


def _why_python_fails(python: Path, variable: str) -> str | None:
    """What the interpreter says where it fails for `variable` alone; None where it works, or never does."""
    command: list[str | Path] = [python, "-c", "import ctypes, encodings, ssl"]
    tried = run(command, timeout_s=_TIMEOUT_S)
    if tried.returncode == 0:
        return None
    without = {name: value for name, value in os.environ.items() if name != variable}
    return tried.output.strip() if run(command, env=without, timeout_s=_TIMEOUT_S).returncode == 0 else None


def _judge_shadows(shadows: list[Shadow], evidence: list[str], variable: str, has_env: bool) -> Outcome:
    if not shadows:
        env = " of the env" if has_env else ""
        return ok(f"{variable} holds nothing that stands in for a library{env}.", *evidence)
    evidence += [f"{one.path} comes before {one.hidden}" for one in shadows[:20]]
    evidence += [fault for one in shadows for fault in one.faults][:10]
    broken = [one for one in shadows if one.faults]
    folders = ", ".join(dict.fromkeys(str(one.path.parent) for one in broken or shadows))
    remedy = (
        f"unset {variable}; or, where a module sets it, see which with: module list; module unload NAME. "
        f"What holds them: {folders}"
    )
    names = ", ".join(one.path.name for one in (broken or shadows)[:6])
    if broken:
        return failed(
            f"{variable} puts other builds of {names} before those that the env needs, and they lack what is "
            "asked of them.",
            *evidence,
            remedy=remedy,
        )
    return warning(
        f"{variable} puts other builds of {names} before those that would be loaded without it; "
        "envbuilder train runs with it.",
        *evidence,
        remedy=remedy,
    )


def check_preload(subject: Subject, reporter: Reporter) -> Outcome:
    """What LD_PRELOAD loads into every program."""
    files = [Path(word) for word in re.split(r"[: ]+", os.environ.get("LD_PRELOAD", "")) if word]
    if not files:
        return ok("LD_PRELOAD is not set.")
    evidence = [f"LD_PRELOAD={os.environ['LD_PRELOAD']}"]
    # A name without a slash is looked for as any library is.
    missing = [str(file) for file in files if "/" in str(file) and not file.is_file()]
    if missing:
        return warning(
            f"LD_PRELOAD names {', '.join(missing)}, which is not there: every program complains of it.",
            *evidence,
            remedy="unset LD_PRELOAD",
        )
    own = env_libraries(subject.import_path) if subject.env else {}
    given = {file.parent for file in files if "/" in str(file)}
    shadows = [one for one in shadowed_libraries(sorted(given), own) if one.path in files]
    return _judge_shadows(shadows, evidence, "LD_PRELOAD", bool(own))


def check_python(subject: Subject, reporter: Reporter) -> Outcome:
    """PYTHONPATH, PYTHONHOME and their like, which `envbuilder train` and the builds drop."""
    there = {
        name: value
        for name, value in os.environ.items()
        if re.fullmatch(r"PYTHON(PATH|HOME|STARTUP|USERBASE|OPTIMIZE|SAFEPATH)", name)
    }
    evidence = [f"{name}={value}" for name, value in sorted(there.items())]
    if "PYTHONHOME" in there:
        if said := _why_python_fails(subject.python, "PYTHONHOME"):
            return failed(
                f"PYTHONHOME keeps {subject.python} from working.",
                *evidence,
                *said.splitlines()[-3:],
                remedy="unset PYTHONHOME",
            )
        return warning(
            "PYTHONHOME says where every Python finds its standard library, also those of other releases.",
            *evidence,
            remedy="unset PYTHONHOME",
        )
    shadows = shadowed_modules(folders_of("PYTHONPATH"), subject.site_packages if subject.env else ())
    if shadows:
        return warning(
            f"PYTHONPATH puts its own {', '.join(sorted(shadows)[:8])} before the env's; envbuilder train "
            "drops it, and a Python of your own in this shell doesn't.",
            *evidence,
            *(f"{name}: {path}" for name, path in sorted(shadows.items())[:8]),
            remedy="unset PYTHONPATH; or, where a module sets it: module list, and: module unload NAME",
        )
    if not there:
        return ok("No variable changes where Python looks for packages.")
    return ok("Python's variables hide nothing of the env; envbuilder train and builds drop them.", *evidence)


def check_cuda(subject: Subject, reporter: Reporter) -> Outcome:
    """CUDA_HOME and CUDA_PATH against torch's CUDA."""
    named = {name: os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)}
    if not named:
        return ok("Neither CUDA_HOME nor CUDA_PATH is set.")
    cuda = subject.recipe.cuda if subject.recipe else None
    is_used = cuda is not None and cuda.toolchain == "system"
    torch = read_torch(subject.import_path) if subject.env else None
    evidence, faults = [], []
    if torch:
        evidence.append(f"torch {torch.version}: CUDA {torch.cuda}")
    for name, home in named.items():
        release = _cuda_release(Path(home))
        evidence.append(f"{name}={home}: {f'CUDA {release}' if release else 'no nvcc that runs'}")
        if release is None:
            faults.append(f"{name} names {home}, where no nvcc is")
        elif torch and torch.cuda and release.split(".")[0] != torch.cuda.split(".")[0]:
            faults.append(f"{name} is CUDA {release}, and torch's is {torch.cuda}")
    if len(set(named.values())) > 1:
        faults.append("CUDA_HOME and CUDA_PATH differ")
    if not faults:
        return ok("CUDA_HOME fits.", *evidence)
    whom = (
        "The recipe's builds use it"
        if is_used
        else "envbuilder's builds don't heed it; others in this shell do"
    )
    return (failed if is_used else warning)(
        f"{'; '.join(faults)}. {whom}.",
        *evidence,
        remedy=f"unset {' '.join(named)}; or name torch's release: module load cuda"
        + (f"/{torch.cuda}" if torch and torch.cuda else ""),
    )


def _cuda_release(home: Path) -> str | None:
    nvcc = home / "bin" / "nvcc"
    if not nvcc.is_file():
        return None
    with suppress(OSError):
        found = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"], timeout_s=_TIMEOUT_S).output)
        return found[1] if found else None
    return None


def check_compilers(subject: Subject, reporter: Reporter) -> Outcome:
    """CC, CXX, flags and an active conda: what a build takes of them."""
    names = ("CC", "CXX", "CONDA_PREFIX", *_FLAGS, *_FLAGS_OF_TORCH)
    evidence = [f"{name}={os.environ[name]}" for name in names if os.environ.get(name)]
    compiler = find_host_compiler(os.environ)
    evidence.append(f"builds use {compiler.cxx} and {compiler.cc or 'no C compiler'}")
    conda = os.environ.get("CONDA_PREFIX")
    if conda and compiler.cxx.resolve().is_relative_to(Path(conda).resolve()):
        return warning(
            "Builds would use conda's compiler, whose C++ library is newer than the one of the machine: what "
            "it compiles may not load outside of that conda environment.",
            *evidence,
            remedy="conda deactivate; or name the machine's: export CC=gcc CXX=g++",
        )
    if os.environ.get("CXX") and compiler.cc is None:
        return warning(
            f"CXX names {compiler.cxx}, and no C compiler of its family was found.",
            *evidence,
            remedy="export CC=PATH, the C compiler of the same release",
        )
    families = {re.sub(r"\W|\d|\+", "", path.name) for path in (compiler.cxx, compiler.cc) if path}
    if families in ({"g", "clang"}, {"clang", "gcc"}):
        return warning(
            "CC and CXX are compilers of different families: builds mix their objects.",
            *evidence,
            remedy="export CC=gcc CXX=g++, or those of one clang",
        )
    return ok(
        "Builds take CC and CXX of this shell; its flags and TORCH_CUDA_ARCH_LIST they don't heed.", *evidence
    )


def check_debugging(subject: Subject, reporter: Reporter) -> Outcome:
    """Leftovers of a search for a fault, which make training slow; interfaces that are not here."""
    slow = [
        f"{name}={value}"
        for name, pattern in _SLOW.items()
        if (value := os.environ.get(name)) and re.fullmatch(pattern, value, re.IGNORECASE)
    ]
    # What reaches training as it is; the number of threads `train` sets itself.
    others = [
        f"{name}={'(set)' if SECRET.search(name) else value}"
        for name, value in sorted(os.environ.items())
        if re.match(r"(NCCL|TORCH|PYTORCH|GLOO|CUDA_DEVICE)_|OMP_NUM_THREADS", name)
    ]
    evidence = list(dict.fromkeys((*slow, *others)))
    if absent := _absent_interfaces(os.environ.get("NCCL_SOCKET_IFNAME", "")):
        # A login node may well lack the interface that compute nodes have.
        return (failed if subject.gpus.devices else warning)(
            f"NCCL_SOCKET_IFNAME names {absent}, and no network interface here is called so.",
            *evidence,
            f"interfaces: {', '.join(_interfaces())}",
            remedy="unset NCCL_SOCKET_IFNAME",
        )
    if slow:
        return warning(
            f"{', '.join(slow)} slows training down, and envbuilder train passes it on.",
            *evidence,
            remedy=f"unset {' '.join(word.partition('=')[0] for word in slow)}",
        )
    return ok("No variable of a search for faults slows training down.", *evidence)


def _interfaces() -> list[str]:
    return sorted(name for _, name in socket.if_nameindex())


def _absent_interfaces(wanted: str) -> str | None:
    """Of NCCL's list ("eth,ib", "=eth0", "^lo"), where no interface is meant by it; None where one is."""
    if not wanted or wanted.startswith("^"):
        return None
    exact, prefixes = wanted.startswith("="), [word for word in wanted.removeprefix("=").split(",") if word]
    for name in _interfaces():
        if any(name == prefix if exact else name.startswith(prefix) for prefix in prefixes):
            return None
    return ", ".join(prefixes)


CHECKS: tuple[Check, ...] = (
    Check(
        "variables.libraries",
        "LD_LIBRARY_PATH",
        "libraries in LD_LIBRARY_PATH that stand in for the env's, or for the machine's C++ library",
        check_libraries,
    ),
    Check(
        "variables.preload",
        "LD_PRELOAD",
        "whether what LD_PRELOAD names is there, and stands in for a library of the env",
        check_preload,
    ),
    Check(
        "variables.python",
        "Python's variables",
        "PYTHONPATH against the env's and the standard library's modules, PYTHONHOME and others",
        check_python,
    ),
    Check(
        "variables.cuda",
        "CUDA_HOME",
        "the CUDA release in CUDA_HOME and CUDA_PATH against torch's",
        check_cuda,
    ),
    Check(
        "variables.compilers",
        "the compilers' variables",
        "CC and CXX, an active conda's compilers, and flags that builds don't heed",
        check_compilers,
    ),
    Check(
        "variables.debugging",
        "leftovers",
        "variables of CUDA, NCCL and torch that slow training down, and interfaces that are not here",
        check_debugging,
    ),
    Check(
        "variables.pip",
        "pip's settings",
        "pip's and uv's variables and pip's configuration files, for what puts packages elsewhere",
        check_pip,
    ),
    Check(
        "variables.hub",
        "the model hub's variables",
        "HF_* and TRANSFORMERS_*; whether the folders that they name can be written",
        check_hub,
    ),
    Check(
        "variables.proxy",
        "the proxies",
        "whether the proxies of this shell accept connections from here",
        check_proxy,
    ),
)

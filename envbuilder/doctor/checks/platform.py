"""Interpreter, machine and kernel against what the lock's files were chosen for."""

from __future__ import annotations

import os
import re
from pathlib import Path

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.subject import Subject
from envbuilder.recipe import Recipe, TargetSpec
from envbuilder.report import Reporter
from envbuilder.sandbox import find_sandbox
from envbuilder.target import lock_for_this_machine, python_versions, version_number

CPUINFO = Path("/proc/cpuinfo")
CPU_LEVELS = {
    "x86-64-v2": frozenset(("cx16", "lahf_lm", "pni", "popcnt", "sse4_1", "sse4_2", "ssse3")),
    "x86-64-v3": frozenset(("abm", "avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "movbe", "xsave")),
}
"""Level of the x86-64 ABI → what it adds, in the words of /proc/cpuinfo (pni is SSE3, abm is LZCNT)."""
KERNEL_OF_TRAINERS = (5, 5)
"""What accelerate warns of below (accelerate#1929)."""


def check_interpreter(subject: Subject, reporter: Reporter) -> Outcome:
    """The interpreter's version against the lock's, and against the one that the env was made with."""
    found, wanted = subject.interpreter, python_versions(_target(subject))
    evidence = f"{found.path}: Python {found.version}"
    if found.minor not in wanted:
        return failed(
            f"Python {found.minor} is not one that the lock serves ({', '.join(wanted)}).",
            evidence,
            remedy=f"envbuilder install {subject.recipe_file} --python python{wanted[-1]}",
        )
    if subject.env and subject.receipt.python != found.version:
        return warning(
            f"The env was made with Python {subject.receipt.python} and now runs on {found.version}.",
            evidence,
            remedy=f"envbuilder install {subject.recipe_file}",
        )
    return ok(f"Python {found.version} is one that the lock serves.", evidence)


def check_glibc(subject: Subject, reporter: Reporter) -> Outcome:
    """The C library, which every compiled wheel is linked against."""
    found, wanted = subject.interpreter.glibc, _target(subject).glibc
    if found is None:
        return failed(
            "The C library of this machine is not glibc, so no wheel of the lock runs here.",
            remedy="Run on a machine with glibc: a manylinux wheel runs on no other C library.",
        )
    if version_number(found) < version_number(wanted):
        return failed(
            f"glibc {found} is older than the {wanted} that the lock's wheels may need.",
            remedy=lock_for_this_machine(_recipe(subject).name),
        )
    return ok(f"glibc {found} is no older than the {wanted} of the lock.")


def check_machine(subject: Subject, reporter: Reporter) -> Outcome:
    """The processor's instruction set."""
    found, wanted = subject.interpreter.machine, _target(subject).machine
    if found != wanted:
        return failed(
            f"This machine is {found}, and the lock's files are for {wanted}.",
            remedy=lock_for_this_machine(_recipe(subject).name),
        )
    return ok(f"This machine is {found}, as the lock says.")


def check_namespaces(subject: Subject, reporter: Reporter) -> Outcome:
    """The sandbox that `compile` would run a build in here, found by trying."""
    sandbox = find_sandbox()
    if sandbox.isolation == "none":
        return warning(
            "No network namespace can be made here, so a build is not kept from the network.",
            *sandbox.refused,
            remedy="Builds work without; where isolation is a must, compile on another node: "
            f"envbuilder compile {subject.recipe_file} --local --require-isolation",
        )
    if sandbox.isolation == "network-namespace":
        return ok(
            "Network namespaces can be made here, so builds run without network, and read what you can read.",
            *sandbox.refused,
        )
    return ok("Builds are sealed here: no network, no homes, and one folder to write in.")


def check_cpu(subject: Subject, reporter: Reporter) -> Outcome:
    """The processor's instructions, by the levels that the x86-64 ABI names."""
    # A core of a kind of its own, or another architecture's file, has no such line.
    lines = CPUINFO.read_text(encoding="utf-8", errors="replace").splitlines()
    flags = next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), None)
    if flags is None:
        return skipped("The processor is none of the x86-64 family, whose levels are looked at.")
    model = next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown"
    )
    missing = {level: sorted(needed - flags) for level, needed in CPU_LEVELS.items()}
    evidence = (model, *(f"{level}: {_listed(lacking)}" for level, lacking in missing.items()))
    remedy = (
        "Run on another kind of node: sinfo -o '%f' lists the features to ask for with "
        "#SBATCH --constraint=FEATURE; have a virtual machine show the host's processor (QEMU: -cpu host)"
    )
    if missing["x86-64-v2"]:
        return failed(
            "This processor lacks instructions that wheels take for granted (NumPy since 2.4): they end with "
            "`Illegal instruction`, or refuse to be imported.",
            *evidence,
            remedy=remedy,
        )
    if missing["x86-64-v3"]:
        return warning(
            "This processor lacks AVX2 or what comes with it: torch computes on it far more slowly, and "
            "some packages end with `Illegal instruction`.",
            *evidence,
            remedy=remedy,
        )
    return ok("The processor has the instructions that wheels use.", *evidence)


def _listed(lacking: list[str]) -> str:
    return f"lacks {', '.join(lacking)}" if lacking else "has all of it"


def check_kernel(subject: Subject, reporter: Reporter) -> Outcome:
    """The kernel's version, where several processes train together."""
    found = os.uname().release
    version = tuple(int(number) for number in re.findall(r"\d+", found)[:2])
    evidence = f"Linux {found}"
    if version >= KERNEL_OF_TRAINERS:
        return ok("The kernel is as new as trainers want it.", evidence)
    oldest = ".".join(map(str, KERNEL_OF_TRAINERS))
    if len(subject.gpus.devices) < 2:
        return ok(
            f"The kernel is older than {oldest}, which matters to training on several GPUs only.", evidence
        )
    return warning(
        f"The kernel is older than {oldest}: training on several GPUs has been seen to hang on such ones, "
        "unless the distribution has mended it (as RHEL 8 has much in its 4.18).",
        evidence,
        remedy="Where a run hangs at its first collective call, try: export NCCL_SHM_DISABLE=1; a newer "
        "kernel is for the administrators to install",
    )


def _target(subject: Subject) -> TargetSpec:
    """The lock's, which may be for one probed machine; without a lock, the recipe's."""
    if subject.lock is not None:
        return subject.lock.target
    return _recipe(subject).target


def _recipe(subject: Subject) -> Recipe:
    assert subject.recipe is not None, "these checks need a recipe"
    return subject.recipe


CHECKS = (
    Check(
        "platform.interpreter",
        "the interpreter",
        "the env's interpreter (before install: the running one) against the lock's Python versions",
        check_interpreter,
        needs=("recipe",),
    ),
    Check(
        "platform.glibc",
        "the C library",
        "glibc against the oldest that the lock's wheels are chosen for",
        check_glibc,
        needs=("recipe",),
    ),
    Check(
        "platform.machine",
        "the processor",
        "the machine's architecture against the lock's",
        check_machine,
        needs=("recipe",),
    ),
    Check(
        "platform.namespaces",
        "namespaces",
        "how far this user can cut a build off: mounts and network, network alone, or nothing",
        check_namespaces,
    ),
    Check(
        "platform.cpu",
        "the processor's instructions",
        "the flags of /proc/cpuinfo against the levels x86-64-v2 and x86-64-v3",
        check_cpu,
    ),
    Check("platform.kernel", "the kernel", "its version against what trainers want", check_kernel),
)

"""Interpreter, machine and kernel against what the lock's files were chosen for."""

from __future__ import annotations

from envbuilder.doctor.check import Check, Outcome, failed, ok, warning
from envbuilder.doctor.subject import Subject
from envbuilder.recipe import Recipe, TargetSpec
from envbuilder.report import Reporter
from envbuilder.sandbox import find_sandbox
from envbuilder.target import lock_for_this_machine, python_versions


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
    if _numbers(found) < _numbers(wanted):
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


def _target(subject: Subject) -> TargetSpec:
    """The lock's, which may be for one probed machine; without a lock, the recipe's."""
    if subject.lock is not None:
        return subject.lock.target
    return _recipe(subject).target


def _recipe(subject: Subject) -> Recipe:
    assert subject.recipe is not None, "these checks need a recipe"
    return subject.recipe


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


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
)

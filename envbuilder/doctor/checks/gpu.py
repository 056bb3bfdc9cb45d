"""The GPUs of this machine, and what the env's kernels compute on them."""

from __future__ import annotations

import os
from typing import Any

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.installed import read_torch
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.gpu import Gpu
from envbuilder.report import Reporter

KERNEL_PACKAGES = ("causal-conv1d", "mamba-ssm")
"""Packages whose kernels `kernels.py` has references for."""
KERNEL_TIMEOUT_S = 900
"""Triton compiles and tunes some hundred kernels at their first use: minutes on one core."""
_VISIBLE = "CUDA_VISIBLE_DEVICES"
_BROKEN = ("Unknown Error", "GPU is lost", "N/A", "Not Found")
"""What nvidia-smi writes where a value should be."""


def check_devices(subject: Subject, reporter: Reporter) -> Outcome:
    """Every GPU answers, takes work, and is visible to CUDA."""
    gpus = subject.gpus
    if gpus.problem:
        return failed(
            "nvidia-smi is on this machine but gives no account of its GPUs.",
            gpus.problem,
            remedy="On a login node without GPU, run the check in a job; on a GPU node, report it to the "
            "administrators and ask for another: #SBATCH --exclude=NODE",
        )
    if not gpus.devices:
        return skipped(gpus.absence)
    evidence = [_described(gpu) for gpu in gpus.devices]
    unusable = [gpu.index for gpu in gpus.devices if gpu.compute_mode == "Prohibited" or _is_broken(gpu)]
    if unusable:
        return failed(
            f"GPU {', '.join(unusable)} takes no work.",
            *evidence,
            remedy="Report it to the administrators, and ask for another node: #SBATCH --exclude=NODE",
        )
    visible = os.environ.get(_VISIBLE)
    if visible is not None and visible.strip() in ("", "-1", "NoDevFiles"):
        return warning(
            f"{_VISIBLE} hides every GPU from CUDA.",
            f"{_VISIBLE}={visible}",
            *evidence,
            remedy=f"unset {_VISIBLE}; in a job, ask for a GPU: #SBATCH --gres=gpu:1",
        )
    return ok(f"{len(gpus.devices)} GPUs answer.", *evidence)


def _described(gpu: Gpu) -> str:
    return (
        f"GPU {gpu.index}: {gpu.name}, compute capability {gpu.compute_capability}, "
        f"{gpu.memory_mib} MiB, compute mode {gpu.compute_mode}"
    )


def _is_broken(gpu: Gpu) -> bool:
    return any(
        sign in value for sign in _BROKEN for value in (gpu.name, gpu.compute_capability, gpu.memory_mib)
    )


def check_driver(subject: Subject, reporter: Reporter) -> Outcome:
    """The driver's CUDA against torch's.

    Within a major version an older driver runs newer code, except PTX of the newer one (CUDA Compatibility,
    "minor version compatibility").
    """
    served, driver = subject.gpus.cuda, subject.gpus.devices[0].driver
    torch = read_torch(subject.import_path)
    if torch is None:
        return skipped("There is no torch to hold the driver against.")
    evidence = (f"driver {driver}: CUDA {served or 'unknown'}", f"torch {torch.version}: CUDA {torch.cuda}")
    lock = f"envbuilder lock {subject.recipe_file}"
    if torch.cuda is None:
        return failed(
            "The torch of the env is a CPU build, and this machine has a GPU.",
            *evidence,
            remedy=f"Name the index with CUDA builds in [index] of {subject.recipe_file}, then: {lock}",
        )
    if served is None:
        return skipped(f"nvidia-smi doesn't say which CUDA driver {driver} serves.")
    newest, built = _numbers(served), _numbers(torch.cuda)
    if newest[0] < built[0]:
        return failed(
            f"The driver serves CUDA {served} at most, and torch is built with CUDA {torch.cuda}.",
            *evidence,
            remedy=f"Ask for a node with a newer driver, or for a torch built with CUDA {newest[0]} in "
            f"{subject.recipe_file}, then: {lock}",
        )
    if newest < built:
        return warning(
            f"The driver serves CUDA {served}; torch's CUDA {torch.cuda} works on it, but for PTX.",
            *evidence,
            remedy="Ask for a node with a newer driver where a kernel reports an unsupported PTX version.",
        )
    return ok(f"The driver serves CUDA {served}, and torch is built with CUDA {torch.cuda}.", *evidence)


KNOWN_DEFECTS = {
    "causal_conv1d_fn, short last block": (
        # csrc/causal_conv1d_bwd.cu of 1.7.0: the elements before a block are loaded only up to index
        # seqlen - block start, though they lie before it; SiLU's gradient is recomputed from them.
        "causal-conv1d's gradient of x for channel-first input with SiLU, in the last block of 2048 bytes "
        "where that holds fewer than 16 bytes",
        "Nothing for Nemotron-H, whose mixers call it channel-last. In code of your own: channel-last input, "
        "or a length that is a multiple of 8.",
    )
}
"""Kernels that a right build gets wrong too → what is wrong, and what to do about it."""


def check_kernels(subject: Subject, reporter: Reporter) -> Outcome:
    """Compiled kernels, forward and backward, against a float64 reference (kernels.py)."""
    provided = subject.receipt.provided
    there = {package.name for package in subject.receipt.packages} | set(
        provided.versions if provided else ()
    )
    packages = [name for name in KERNEL_PACKAGES if name in there]
    if not packages:
        return skipped(f"The env has none of {', '.join(KERNEL_PACKAGES)}.")
    rebuild = f"envbuilder compile {subject.recipe_file} --local --rebuild"
    report = run_script(subject.python, "kernels.py", *packages, timeout_s=KERNEL_TIMEOUT_S, remedy=rebuild)
    return judge_kernels(report["results"], report["device"], subject.recipe_file)


def judge_kernels(results: list[dict[str, Any]], device: str, recipe_file: str) -> Outcome:
    """The verdict on the runs that kernels.py prints: wrong, wrong as is known of the package, or right."""
    wrong = [result for result in results if result["problem"]]
    known = [result for result in wrong if result["kernel"] in KNOWN_DEFECTS]
    if new := [result for result in wrong if result not in known]:
        return failed(
            f"{len(new)} of {len(results)} kernel runs on {device} are wrong.",
            *map(_problem, new[:20]),
            remedy=remedy_for(new[0]["problem"], recipe_file)
            or f"envbuilder compile {recipe_file} --local --rebuild",
        )
    if known:
        defect, remedy = KNOWN_DEFECTS[known[0]["kernel"]]
        return warning(
            f"{len(known)} of {len(results)} kernel runs on {device} are wrong as is known: {defect}.",
            *map(_problem, known[:20]),
            remedy=remedy,
        )
    return ok(
        f"{len(results)} kernel runs on {device}, forward and backward, agree with float64.",
        *(_worst(kernel, runs) for kernel, runs in _by_kernel(results).items()),
    )


def _problem(result: dict[str, Any]) -> str:
    return f"{result['kernel']} ({result['case']}): {result['problem']}"


def _by_kernel(results: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    kernels: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kernels.setdefault(result["kernel"], []).append(result)
    return kernels


def _worst(kernel: str, runs: list[dict[str, Any]]) -> str:
    worst = max(runs, key=lambda run: run["error"] / run["tolerance"])
    return (
        f"{kernel}: {len(runs)} runs, worst relative error {worst['error']:.1e} "
        f"(allowed {worst['tolerance']:.1e}) in the {worst['quantity']} of {worst['case']}"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


CHECKS = (
    Check(
        "gpu.devices",
        "the GPUs",
        "whether every GPU answers and takes work (nvidia-smi), and whether CUDA_VISIBLE_DEVICES hides them",
        check_devices,
    ),
    Check(
        "gpu.driver",
        "the driver",
        "the CUDA version that the driver serves against the one that torch is built with",
        check_driver,
        needs=("gpu",),
    ),
    Check(
        "gpu.kernels",
        "kernels on the GPU",
        "causal-conv1d and mamba-ssm, forward and backward, against a float64 reference",
        check_kernels,
        needs=("recipe", "env", "gpu"),
        cost="gpu",
        limit_s=KERNEL_TIMEOUT_S + 10,
    ),
)

"""What the compiled kernels compute on the GPU, and which of them transformers will use."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.kernel_defects import DEFECTS, defect_of
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.report import Reporter

KERNEL_PACKAGES = ("causal-conv1d", "mamba-ssm")
"""Packages whose kernels `kernels/` has references for."""
KERNEL_TIMEOUT_S = 600
"""Triton compiles some hundred kernels for each dtype at their first use: a minute or two on few cores."""
TUNED_TIMEOUT_S = 1800
"""Tuning compiles each of them in some ten configurations: minutes on 16 cores."""
FALLBACK_TIMEOUT_S = 300
"""transformers and torch are imported: some seconds, or a minute from a busy shared disk."""


def check_kernels(subject: Subject, reporter: Reporter) -> Outcome:
    """Compiled kernels, forward and backward, against a float64 reference (kernels/)."""
    return _check(subject, timeout_s=KERNEL_TIMEOUT_S)


def check_tuned_kernels(subject: Subject, reporter: Reporter) -> Outcome:
    """The same, with Triton's kernels in the configurations that it finds fastest here, as in training."""
    return _check(subject, "--tuned", timeout_s=TUNED_TIMEOUT_S)


def _check(subject: Subject, *options: str, timeout_s: float) -> Outcome:
    packages = kernel_packages(subject)
    if not packages:
        return skipped(f"The env has none of {', '.join(KERNEL_PACKAGES)}.")
    exclusive = any(state.compute_mode == "Exclusive_Process" for state in subject.gpu_states)
    report = run_script(
        subject.python,
        "kernels",
        *packages,
        *options,
        *(["--one-at-a-time"] if exclusive else []),
        timeout_s=timeout_s,
        remedy=subject.rebuild,
        env=subject.variables,
    )
    if why := report.get("absence"):
        return skipped(f"No GPU is visible to CUDA here, so the kernels can't run: {why}.")
    return judge_kernels(report["results"], report["device"] or "the GPU", subject.recipe_file, packages)


def kernel_packages(subject: Subject) -> list[str]:
    """Those of KERNEL_PACKAGES that the env has, its own or provided."""
    provided = subject.receipt.provided
    there = {package.name for package in subject.receipt.packages}
    there |= set(provided.versions if provided else ())
    return [name for name in KERNEL_PACKAGES if name in there]


def judge_kernels(
    results: list[dict[str, Any]], device: str, recipe_file: str, packages: Sequence[str]
) -> Outcome:
    """The verdict on the runs that kernels/ prints: runs that meet a defect of the source are no failure."""
    wrong = [result for result in results if result["problem"]]
    known = [result for result in wrong if defect_of(result["kernel"])]
    not_run = [f"not run: {d}" for d in DEFECTS if d.package in packages and d.kernel is None]
    if new := [result for result in wrong if result not in known]:
        return failed(
            f"{len(new)} of {len(results)} kernel runs on {device} are wrong.",
            *map(_problem, new[:20]),
            remedy=remedy_for(new[0]["problem"], recipe_file)
            or f"envbuilder compile {recipe_file} --local --rebuild",
        )
    right = [result for result in results if not result["problem"]]
    worst = [_worst(kernel, runs) for kernel, runs in _by_kernel(right).items()]
    summary = f"{len(right)} kernel runs on {device}, forward and backward, agree with float64"
    if not known:
        return ok(f"{summary}.", *worst, *not_run)
    met = dict.fromkeys(filter(None, (defect_of(result["kernel"]) for result in known)))
    return ok(
        f"{summary}; {len(known)} don't, in any build: {'; '.join(f'{d.package}: {d.what}' for d in met)}.",
        *worst,
        *map(str, met),
        *map(_problem, known[:3]),
        *not_run,
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


def check_fallbacks(subject: Subject, reporter: Reporter) -> Outcome:
    """Which implementation transformers has chosen for each kernel of the model's code (fallbacks.py)."""
    config = subject.config
    if config is None and not kernel_packages(subject):
        return skipped(f"No training config was given, and the env has none of {', '.join(KERNEL_PACKAGES)}.")
    report = run_script(
        subject.python,
        "fallbacks.py",
        *(["--config", str(config)] if config else ["--model-type", DEFAULT_MODEL]),
        timeout_s=FALLBACK_TIMEOUT_S,
        remedy=subject.remake_env,
        env=subject.variables,
    )
    return judge_fallbacks(report, subject)


DEFAULT_MODEL = "nemotron_h"
"""The model that is looked at where no config names one: both packages' kernels are for it."""


def judge_fallbacks(report: dict[str, Any], subject: Subject) -> Outcome:
    """The verdict on what fallbacks.py prints: a package that is there must be the one that is used."""
    model, kernels, errors = report["model_type"], report["kernels"], report["errors"]
    if not report["is_native"]:
        return skipped(f"This transformers has no code of its own for {model}: it would run the model's.")
    if report["problem"]:
        return failed(
            f"transformers' code for {model or 'the model'} can't be used.",
            report["problem"],
            remedy=remedy_for(report["problem"], subject.recipe_file) or subject.remake_env,
        )
    if not kernels:
        return skipped(f"transformers' code for {model} calls no compiled kernels.")
    evidence = [f"{kernel['name']} of {kernel['package']}: {kernel['used']}" for kernel in kernels]
    evidence += [f"{package}: {error}" for package, error in errors.items()]
    slow = sorted({kernel["package"] for kernel in kernels if kernel["used"] == "torch's slow path"})
    if broken := [package for package in slow if report["installed"][package]]:
        error = errors.get(broken[0], "")
        return failed(
            f"transformers falls back to slow code for {model}, for {', '.join(broken)} can't be imported.",
            *evidence,
            remedy=remedy_for(error, subject.recipe_file) or subject.rebuild,
        )
    if slow and (subject.gpus.devices or report["device"] == "cuda"):
        return warning(
            f"transformers runs {model} on slow code: the env has no {', '.join(slow)}.",
            *evidence,
            remedy=f"Add {' and '.join(name.replace('_', '-') for name in slow)} to the requirements in "
            f"{subject.recipe_file}, then: envbuilder lock {subject.recipe_file}",
        )
    where = f"; {', '.join(slow)} is not in the env, and there is no GPU that would need it" if slow else ""
    return ok(f"transformers uses the env's compiled kernels for {model}{where}.", *evidence)


CHECKS: tuple[Check, ...] = (
    Check(
        "gpu.kernels",
        "kernels on the GPU",
        "every kernel of causal-conv1d and mamba-ssm, forward and backward, against a float64 reference",
        check_kernels,
        needs=("recipe", "env", "gpu"),
        cost="gpu",
        limit_s=KERNEL_TIMEOUT_S + 10,
    ),
    Check(
        "gpu.tuned-kernels",
        "tuned kernels on the GPU",
        "the same with Triton's tuning, as in training: minutes; run only where it is named by --only",
        check_tuned_kernels,
        needs=("recipe", "env", "gpu"),
        cost="asked",
        limit_s=TUNED_TIMEOUT_S + 10,
    ),
    Check(
        "gpu.fallbacks",
        "transformers' kernels",
        "which kernels transformers uses for the model, and the import errors that it swallows",
        check_fallbacks,
        needs=("recipe", "env", "addresses"),
        cost="gpu",
        limit_s=FALLBACK_TIMEOUT_S + 10,
    ),
)

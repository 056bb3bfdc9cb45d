"""Compiled extension modules, read as files: no GPU and no CUDA tool is needed."""

from __future__ import annotations

from pathlib import Path

from envbuilder.doctor.architectures import runs_on, wanted_code
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped
from envbuilder.doctor.subject import Subject
from envbuilder.fatbin import FatbinError, gpu_architectures
from envbuilder.report import Reporter


def check_architectures(subject: Subject, reporter: Reporter) -> Outcome:
    """GPU code in each extension module: for every architecture asked for, and for the GPU that is here."""
    extensions = subject.receipt.extensions
    if not extensions:
        return skipped("Nothing with GPU code was compiled for this env.")
    wanted = _wanted(subject)
    evidence, faults = [], []
    for extension in extensions:
        file = _find(subject, extension.file)
        if file is None:
            faults.append(f"{extension.module}: {extension.file} is missing")
            continue
        try:
            code = gpu_architectures(file)
        except FatbinError as error:
            faults.append(f"{extension.module}: {error}")
            continue
        evidence.append(f"{extension.module}: {', '.join(code) or 'no GPU code'}")
        for capability in wanted:
            if not wanted_code(capability) & set(code):
                faults.append(f"{extension.module} has no code for compute capability {capability}")
        for gpu in subject.gpus.devices:
            if not any(runs_on(architecture, gpu.compute_capability) for architecture in code):
                faults.append(
                    f"{extension.module} has no code that runs on GPU {gpu.index} "
                    f"({gpu.name}, compute capability {gpu.compute_capability})"
                )
    if faults:
        return failed(
            "The compiled extension modules lack GPU code.",
            *faults,
            *evidence,
            remedy=f"Name the GPU in compute-capabilities of {subject.recipe_file}, then: "
            f"envbuilder compile {subject.recipe_file} --local --rebuild "
            f"&& envbuilder install {subject.recipe_file}",
        )
    where = "the recipe's GPUs and the one here" if subject.gpus.devices else "the recipe's GPUs"
    return ok(f"All extension modules have code for {where}.", *evidence)


def _wanted(subject: Subject) -> tuple[str, ...]:
    """The recipe's compute capabilities; where it goes by the GPU present, those compiled for."""
    cuda = subject.recipe.cuda if subject.recipe else None
    return subject.receipt.compute_capabilities if cuda is None or cuda.detect else cuda.compute_capabilities


def _find(subject: Subject, file: str) -> Path | None:
    return next((folder / file for folder in subject.site_packages if (folder / file).is_file()), None)


CHECKS = (
    Check(
        "binaries.architectures",
        "GPU architectures",
        "GPU code in each extension module against the recipe's compute capabilities and the GPU present",
        check_architectures,
        needs=("recipe", "env"),
    ),
)

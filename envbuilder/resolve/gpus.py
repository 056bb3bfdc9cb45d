"""A probed machine's driver and GPUs, against the CUDA of the torch that a lock holds, and against what the
recipe's packages are compiled for."""

from __future__ import annotations

import re

from envbuilder.architectures import built_code, runs_on
from envbuilder.cuda_support import CUDA_MAJORS, driver_runs, has_code_for, newest_cuda
from envbuilder.errors import MismatchError
from envbuilder.machine import MachineRecord
from envbuilder.recipe import Recipe
from envbuilder.resolve.kept import Resolution
from envbuilder.resolve.protocol import Versions
from envbuilder.target import version_number

_RUNTIME = re.compile(r"nvidia-cuda-runtime(-cu\d+)?")
"""The package that torch's wheels take the CUDA runtime from: its version is that of their CUDA."""


def check_capabilities(recipe: Recipe, machine: MachineRecord) -> None:
    """MismatchError where a GPU of `machine` runs nothing of what `recipe` has its packages compiled for.

    Not judged are recipes that compile no GPU code or leave it to the machine for what (`detect`), and GPUs
    whose compute capability is not known.
    """
    if recipe.cuda is None or recipe.cuda.detect or not any(build.gpu for build in recipe.build.values()):
        return
    named = recipe.cuda.compute_capabilities
    code = built_code(named, ptx=recipe.cuda.ptx)
    gpus = {gpu.compute_capability: gpu.name for gpu in machine.gpus if gpu.compute_capability}
    for capability, gpu in gpus.items():
        if any(runs_on(architecture, capability) for architecture in code):
            continue
        wanted = ", ".join(f'"{each}"' for each in sorted(gpus, key=version_number))
        file = f"recipes/{recipe.name}.toml"
        raise MismatchError(
            f"The recipe {recipe.name} compiles for compute capability {', '.join(named)}, "
            f"and none of that code runs on the probed machine's {gpu} (compute capability {capability}).",
            remedy=f"Write compute-capabilities = [{wanted}] under [cuda] of {file}; then: "
            f"envbuilder lock {file} --target target.json",
            context={"recipe": recipe.name, "expected": capability, "got": ", ".join(sorted(code))},
        )


def check_cuda(recipe: Recipe, resolution: Resolution, machine: MachineRecord) -> None:
    """MismatchError where `machine` can't run the CUDA of torch: the driver is too old, or a GPU is.

    What is not known, of torch or of the machine, is not judged.
    """
    for versions in resolution["runtime"].values():
        torch, cuda = versions.get("torch"), cuda_of(versions)
        if torch is None and machine.torch is not None:
            torch, cuda = machine.torch.version, machine.torch.cuda
        if cuda is not None and (fault := _fault(cuda, machine)):
            raise MismatchError(
                f"torch {torch} is built with CUDA {cuda}, which {fault}.",
                remedy=_remedy(recipe, machine, provided="torch" not in versions),
                context={"recipe": recipe.name, "torch": torch, "cuda": cuda, "driver": machine.driver},
            )


def cuda_of(versions: Versions) -> str | None:
    """The CUDA version, e.g. "12.8", of torch among `versions`; None where it has none, or is not there."""
    if local := re.search(r"\+cu(\d+)(\d)$", versions.get("torch", "")):
        return f"{local[1]}.{local[2]}"
    runtime = next((version for name, version in versions.items() if _RUNTIME.fullmatch(name)), None)
    return ".".join(runtime.split(".")[:2]) if runtime and "torch" in versions else None


def _fault(cuda: str, machine: MachineRecord) -> str | None:
    if driver_runs(cuda, driver=machine.driver, served=machine.driver_cuda) is False:
        known = CUDA_MAJORS.get(version_number(cuda)[0])
        has = [f"is {machine.driver}"] if machine.driver else []
        has += [f"serves CUDA {machine.driver_cuda}"] if machine.driver_cuda else []
        return (
            f"needs driver {known.oldest_driver if known else 'of its own time'} or newer; "
            f"the probed machine's {' and '.join(has)}"
        )
    for gpu in machine.gpus:
        if gpu.compute_capability and not has_code_for(cuda, gpu.compute_capability):
            return (
                f"has no code for the probed machine's {gpu.name} "
                f"(compute capability {gpu.compute_capability})"
            )
    return None


def _remedy(recipe: Recipe, machine: MachineRecord, *, provided: bool) -> str:
    capabilities = [gpu.compute_capability for gpu in machine.gpus if gpu.compute_capability]
    newest = newest_cuda(driver=machine.driver, served=machine.driver_cuda, capabilities=capabilities)
    file = f"recipes/{recipe.name}.toml"
    if newest is None:
        return (
            "Take nodes with a newer driver or newer GPUs: sinfo -o '%f' lists the features to ask for with "
            "#SBATCH --constraint=FEATURE"
        )
    if provided:
        return (
            f"On the compute node, with a module loaded whose torch is built with CUDA {newest}: "
            f"envbuilder probe --recipe {file} --output target.json"
        )
    if recipe.target.machine != "x86_64":
        return (
            f'Bind torch to an index that has it built with CUDA {newest}: torch = "NAME" in [index] of '
            f"{file}; then: envbuilder lock {file} --target target.json"
        )
    known = CUDA_MAJORS[newest]
    other = f", or take a recipe that has one, as recipes/{known.recipe}.toml" if known.recipe else ""
    return (
        f'Write "torch{known.torch}", which is built with CUDA {newest}, into requirements of {file}{other}; '
        f"then: envbuilder lock {file} --target target.json"
    )

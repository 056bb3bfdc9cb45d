"""The compute capabilities that are compiled for: the recipe's, or those of the GPUs that are here."""

from __future__ import annotations

import re
import shutil

from envbuilder.process import run
from envbuilder.recipe import CudaSpec


def present_capabilities() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs, e.g. ("9.0",); empty where there is none."""
    if shutil.which("nvidia-smi") is None:
        return ()
    done = run(["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"])
    found = re.findall(r"^\s*(\d+\.\d)\s*$", done.output, re.MULTILINE) if done.returncode == 0 else []
    return tuple(sorted(set(found)))


def wanted_capabilities(cuda: CudaSpec | None) -> tuple[str, ...]:
    """The compute capabilities to compile for on this machine, sorted; none for a recipe without CUDA."""
    if cuda is None:
        return ()
    detected = present_capabilities() if cuda.detect else ()
    return detected or tuple(sorted(cuda.compute_capabilities))


def architecture(capability: str) -> str:
    """nvcc's number for a compute capability: "90" for "9.0", "100a" for "10.0a"."""
    return capability.replace(".", "")

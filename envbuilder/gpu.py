"""The GPUs of this machine, as nvidia-smi tells, and the compute capabilities that are compiled for.

The one place where nvidia-smi is asked, always with a time limit.
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace

from envbuilder.process import run
from envbuilder.recipe import CudaSpec

_FIELDS = ("index", "name", "compute_cap", "driver_version", "memory.total", "compute_mode")
_TIMEOUT_S = 60.0
"""A lost GPU makes nvidia-smi hang; where the driver is not loaded yet, an answer takes some seconds."""
_NONE_VISIBLE = "No devices were found"


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU."""

    index: str
    name: str
    compute_capability: str
    """E.g. "9.0"."""
    driver: str
    """E.g. "580.65.06"."""
    memory_mib: str
    compute_mode: str
    """"Default", "Exclusive_Process" or "Prohibited"."""


@dataclass(frozen=True, slots=True)
class Gpus:
    """What nvidia-smi says of them all."""

    devices: tuple[Gpu, ...]
    cuda: str | None
    """The newest CUDA version that the driver serves, e.g. "13.0"; of `read_gpus` alone."""
    problem: str | None
    """Why nvidia-smi, which is here, could not tell."""

    @property
    def absence(self) -> str:
        """Why there is no device here; of use where `devices` is empty."""
        return self.problem or "This machine has no GPU."


def read_gpus() -> Gpus:
    """The GPUs, and the CUDA version that their driver serves; without nvidia-smi, there are none."""
    gpus = list_gpus()
    if not gpus.devices:
        return gpus
    overview = run(["nvidia-smi"], timeout_s=_TIMEOUT_S)
    cuda = re.search(r"CUDA Version\s*:\s*(\d+\.\d+)", overview.output)
    return replace(gpus, cuda=cuda[1] if cuda else None)


def list_gpus() -> Gpus:
    """The GPUs alone: half the time of `read_gpus`."""
    if shutil.which("nvidia-smi") is None:
        return Gpus((), None, None)
    query = run(
        ["nvidia-smi", f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"],
        timeout_s=_TIMEOUT_S,
    )
    if query.timed_out:
        return Gpus((), None, f"nvidia-smi gave no answer in {_TIMEOUT_S:.0f} s.")
    if _NONE_VISIBLE in query.output:
        return Gpus((), None, None)
    rows = [[cell.strip() for cell in line.split(",")] for line in query.output.splitlines()]
    devices = tuple(Gpu(*row) for row in rows if len(row) == len(_FIELDS))
    if query.returncode != 0 or not devices:
        return Gpus((), None, f"nvidia-smi fails: {' '.join(query.output.split())}")
    return Gpus(devices, None, None)


def present_capabilities() -> tuple[str, ...]:
    """Compute capabilities of this machine's GPUs, e.g. ("9.0",); empty where there is none."""
    found = {gpu.compute_capability for gpu in list_gpus().devices}
    return tuple(sorted(text for text in found if re.fullmatch(r"\d+\.\d", text)))


def wanted_capabilities(cuda: CudaSpec | None) -> tuple[str, ...]:
    """The compute capabilities to compile for on this machine, sorted; none for a recipe without CUDA."""
    if cuda is None:
        return ()
    detected = present_capabilities() if cuda.detect else ()
    return detected or tuple(sorted(cuda.compute_capabilities))


def architecture(capability: str) -> str:
    """nvcc's number for a compute capability: "90" for "9.0", "100a" for "10.0a"."""
    return capability.replace(".", "")

"""Which GPU code runs on which GPU (CUDA C++ Programming Guide, "Compute Capabilities")."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Version:
    major: int
    minor: int
    suffix: str
    """ "a": this architecture alone; "f": its family; "": as below."""


def runs_on(architecture: str, compute_capability: str) -> bool:
    """Whether code for `architecture` ("sm_90", "compute_80") runs on a GPU of `compute_capability` ("9.0").

    Machine code runs on later GPUs of the same major version; PTX is compiled for every later GPU.
    """
    kind, _, number = architecture.partition("_")
    code, gpu = _version(number), _version(compute_capability)
    if code.suffix == "a":
        return (code.major, code.minor) == (gpu.major, gpu.minor)
    if kind == "sm" or code.suffix == "f":
        return code.major == gpu.major and code.minor <= gpu.minor
    return (code.major, code.minor) <= (gpu.major, gpu.minor)


def built_code(compute_capabilities: Iterable[str], *, ptx: bool) -> frozenset[str]:
    """What a build for these holds: machine code of each, and with `ptx` PTX of the newest."""
    numbers = [capability.replace(".", "") for capability in compute_capabilities]
    newest = max(numbers, key=lambda number: int(number.rstrip("af")))
    return frozenset({*(f"sm_{number}" for number in numbers), *([f"compute_{newest}"] if ptx else [])})


def wanted_code(compute_capability: str) -> frozenset[str]:
    """The machine code and the PTX that a build for `compute_capability` ("9.0", "9.0a") can hold."""
    number = compute_capability.replace(".", "")
    return frozenset({f"sm_{number}", f"compute_{number}"})


_GPUS = {
    **dict.fromkeys(("p100",), "6.0"),
    **dict.fromkeys(("v100", "v100s"), "7.0"),
    **dict.fromkeys(("t4",), "7.5"),
    **dict.fromkeys(("a100", "a100x", "a30", "a800"), "8.0"),
    **dict.fromkeys(("a2", "a10", "a10g", "a16", "a40", "a6000", "a5000", "a4000"), "8.6"),
    **dict.fromkeys(("l4", "l20", "l40", "l40s"), "8.9"),
    **dict.fromkeys(("h20", "h100", "h200", "h800", "gh200"), "9.0"),
    **dict.fromkeys(("b100", "b200", "gb200"), "10.0"),
    **dict.fromkeys(("b300", "gb300"), "10.3"),
    **dict.fromkeys(("gb10",), "12.1"),
}
"""As sites name GPUs → compute capability (NVIDIA, "CUDA GPU Compute Capability")."""


def capability_of(gpu_type: str) -> str | None:
    """The compute capability of what Slurm knows as `gpu_type`, e.g. "9.0" for "h100" or "nvidia_h100_80gb";
    None where the name is not known."""
    words = re.split(r"[^a-z0-9]+", gpu_type.lower())
    return next((_GPUS[word] for word in words if word in _GPUS), None)


def _version(text: str) -> _Version:
    match = re.fullmatch(r"(\d+?)\.?(\d)([af]?)", text)
    if match is None:
        raise ValueError(f"{text!r} is no compute capability")
    return _Version(int(match[1]), int(match[2]), match[3])

"""Which GPU code runs on which GPU (CUDA C++ Programming Guide, "Compute Capabilities")."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
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


def wanted_code(compute_capability: str) -> frozenset[str]:
    """The machine code and the PTX that a build for `compute_capability` ("9.0", "9.0a") can hold."""
    number = compute_capability.replace(".", "")
    return frozenset({f"sm_{number}", f"compute_{number}"})


def _version(text: str) -> _Version:
    match = re.fullmatch(r"(\d+?)\.?(\d)([af]?)", text)
    if match is None:
        raise ValueError(f"{text!r} is no compute capability")
    return _Version(int(match[1]), int(match[2]), match[3])

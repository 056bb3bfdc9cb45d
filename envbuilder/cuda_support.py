"""What each major version of CUDA needs of a machine: the oldest driver and the oldest GPU. Pure.

Within a major version an older driver runs newer code, except PTX of the newer one (NVIDIA's "CUDA
Compatibility", minor version compatibility), so the major version alone decides.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from envbuilder.target import version_number


@dataclass(frozen=True)
class CudaMajor:
    """One major version of CUDA, by NVIDIA's release notes."""

    oldest_driver: str
    """Of Linux."""
    oldest_capability: str
    """The compute capability of the oldest GPUs that its compilers and libraries are for."""
    torch: str
    """Of the torch releases whose wheels for x86_64 on PyPI are built with it."""
    recipe: str
    """A shipped recipe of such a torch, or empty."""


CUDA_MAJORS: Mapping[int, CudaMajor] = {
    11: CudaMajor("450.80.02", "3.5", ">=1.13,<2.1", ""),
    12: CudaMajor("525.60.13", "5.0", ">=2.1,<2.11", "nemotron3-nano-leonardo-train"),
    13: CudaMajor("580.65.06", "7.5", ">=2.11", "nemotron3-nano-h200"),
}


def driver_runs(cuda: str, *, driver: str | None, served: str | None) -> bool | None:
    """Whether a machine's driver runs what is built with CUDA version `cuda`; None where that can't be told.

    `served` is the newest CUDA version that the driver says it serves. It counts before `driver`, its own
    version: with NVIDIA's forward compatibility libraries an older driver serves more than that tells.
    """
    if newest := _numbers(served):
        return newest[0] >= _major(cuda)
    known, version = CUDA_MAJORS.get(_major(cuda)), _numbers(driver)
    return version >= version_number(known.oldest_driver) if known and version else None


def newest_cuda(*, driver: str | None, served: str | None, capabilities: Iterable[str] = ()) -> int | None:
    """The newest of CUDA_MAJORS that is for a machine with this driver and these GPUs; None where none is."""
    wanted = tuple(capabilities)
    return max(
        (
            major
            for major in CUDA_MAJORS
            if driver_runs(str(major), driver=driver, served=served) is not False
            and all(has_code_for(str(major), capability) for capability in wanted)
        ),
        default=None,
    )


def has_code_for(cuda: str, capability: str) -> bool:
    """Whether CUDA version `cuda` still makes code for GPUs of compute capability `capability` ("8.0")."""
    known = CUDA_MAJORS.get(_major(cuda))
    return known is None or _numbers(capability) >= version_number(known.oldest_capability)


def _major(cuda: str) -> int:
    return version_number(cuda)[0]


def _numbers(version: str | None) -> tuple[int, ...]:
    """Empty for what is no version, as nvidia-smi's "[N/A]"."""
    return version_number(version) if version and re.fullmatch(r"\d+(\.\d+)*", version) else ()

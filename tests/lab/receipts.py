"""Receipts of builds that never took place."""

from __future__ import annotations

import platform
from pathlib import Path

from packaging.utils import parse_sdist_filename

from envbuilder.bundle import hash_file
from envbuilder.model import BuildReceipt


def build_receipt(sdist: Path, wheel: Path, **changes: object) -> BuildReceipt:
    """Of a build of `sdist` into `wheel` by this Python, without torch and CUDA; `changes` are its fields."""
    package, version = parse_sdist_filename(sdist.name)
    receipt = BuildReceipt(
        package=package,
        version=str(version),
        sdist=sdist.name,
        sdist_sha256=hash_file(sdist),
        key=f"{package}-{version}-abc",
        wheel=wheel.name,
        wheel_sha256=hash_file(wheel),
        python=platform.python_version(),
        torch=None,
        torch_cuda=None,
        cxx11_abi=None,
        nvcc=None,
        host_compiler="",
        compute_capabilities=(),
        architectures_kept=(),
        architectures_dropped=(),
        extensions=(),
        isolation="none",
        environment={},
        units=(),
        seconds=0,
        built_at="2026-01-01T00:00:00+00:00",
    )
    return receipt.model_copy(update=changes)

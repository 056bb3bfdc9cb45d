"""Fixtures of the tests that compile."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from envbuilder.toolchain import packaged_toolkit
from tests.conftest import Quickstart

_TOOLCHAIN = (
    "nvidia_cuda_nvcc-",
    "nvidia_nvvm-",
    "nvidia_cuda_crt-",
    "nvidia_cuda_runtime-",
    "nvidia_cuda_cccl-",
)


@pytest.fixture(scope="session")
def cuda_nvcc(quickstart: Quickstart, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working nvcc, unpacked from the quickstart bundle's wheels (tests of it are marked needs_env)."""
    folder = tmp_path_factory.mktemp("toolchain")
    for wheel in sorted(quickstart.bundle_files.glob("nvidia_*.whl")):
        if not wheel.name.startswith(_TOOLCHAIN):
            continue
        with zipfile.ZipFile(wheel) as archive:
            for entry in archive.infolist():
                path = Path(archive.extract(entry, folder))
                if mode := entry.external_attr >> 16 & 0o777:
                    path.chmod(mode | 0o200)
    return packaged_toolkit(folder).nvcc

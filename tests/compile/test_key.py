from __future__ import annotations

from dataclasses import replace

import pytest

from envbuilder.compile.key import BuildInputs, shaping_files
from envbuilder.lock import LockedFile
from envbuilder.machine import TorchBuild

INPUTS = BuildInputs(
    package="causal-conv1d",
    version="1.7.0",
    sdist_sha256="a" * 64,
    patches=(),
    python="3.12",
    torch="2.11.0",
    compute_capabilities=("9.0",),
    host_compiler="g++ 12",
    system_nvcc=None,
    provided_torch=None,
    build_files=(("torch", "b" * 64),),
    environment=(),
)


def test_the_key_is_readable_and_the_build_tag_is_one_that_wheels_may_have() -> None:
    assert INPUTS.key.startswith("causal-conv1d-1.7.0-cp312-torch2.11.0-sm90-")
    assert INPUTS.build_tag == f"1_{INPUTS.key[-12:]}"
    assert "-" not in INPUTS.build_tag


@pytest.mark.parametrize(
    "changes",
    [
        {"sdist_sha256": "c" * 64},
        {"patches": ("d" * 64,)},
        {"python": "3.13"},
        {"compute_capabilities": ("9.0", "10.0")},
        {"host_compiler": "g++ 13"},
        {"system_nvcc": "13.0.88"},
        {"provided_torch": TorchBuild("2.11.0+cu130", "13.0", True)},
        {"build_files": (("torch", "c" * 64),)},
        {"environment": (("FORCE_BUILD", "TRUE"),)},
    ],
)
def test_everything_that_shapes_machine_code_changes_the_key(changes: dict[str, object]) -> None:
    assert replace(INPUTS, **changes).key != INPUTS.key  # type: ignore[arg-type]


def test_what_only_runs_beside_the_build_does_not_change_the_key() -> None:
    files = [
        LockedFile(name, "1.0", f"{name}-1.0.whl", 1, name, "default", False)
        for name in ("torch", "sympy", "nvidia-cuda-nvcc", "setuptools", "wheel", "cuda-toolkit")
    ]
    chosen = shaping_files(files, ["setuptools>=61", "Wheel"])
    assert [name for name, _ in chosen] == [
        "cuda-toolkit",
        "nvidia-cuda-nvcc",
        "setuptools",
        "torch",
        "wheel",
    ]

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from packaging.utils import parse_wheel_filename

from envbuilder.compile.key import BuildInputs, locked_cuda, shaping_files, shaping_wheels
from envbuilder.compile.wheels.wheel_rewrite import rewrite_wheel
from envbuilder.lock import LockedFile
from envbuilder.machine import TorchBuild
from tests.lab.installers import install
from tests.lab.packages import make_wheel

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


def test_the_key_is_readable() -> None:
    assert INPUTS.key.startswith("causal-conv1d-1.7.0-cp312-torch2.11.0-sm90-")


PROVIDED = TorchBuild("2.9.0a0+145a3a7bda.nv25.10", "13.0", True)


@pytest.mark.parametrize(
    ("changes", "tag"),
    [
        ({"cuda": "13.0"}, "1_torch2.11.0_cu130_sm90"),
        ({}, "1_torch2.11.0_sm90"),
        ({"torch": "2.11.0+cu128"}, "1_torch2.11.0_cu128_sm90"),
        ({"torch": "2.11.0+cpu", "compute_capabilities": ()}, "1_torch2.11.0"),
        ({"torch": PROVIDED.version, "provided_torch": PROVIDED}, "1_torch2.9.0a0_cu130_sm90"),
        ({"torch": "2.11.0-own", "cuda": "12.8.90"}, "1_torch2.11.0_own_cu128_sm90"),
        ({"torch": None}, "1_sm90"),
        ({"torch": None, "compute_capabilities": ("9.0a", "10.0")}, "1_sm90a_sm100"),
        ({"torch": None, "compute_capabilities": ()}, "1"),
    ],
)
def test_the_build_tag_says_what_the_wheel_is_for(changes: dict[str, object], tag: str) -> None:
    inputs = replace(INPUTS, **changes)  # type: ignore[arg-type]
    assert inputs.build_tag == f"{tag}_{inputs.key[-12:-4]}"
    name = f"causal_conv1d-1.7.0-{inputs.build_tag}-cp312-cp312-linux_x86_64.whl"
    assert parse_wheel_filename(name)[2] == (1, inputs.build_tag[1:])


def test_what_the_tag_alone_says_does_not_change_the_key() -> None:
    assert replace(INPUTS, cuda="13.0").key == INPUTS.key


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_pip_and_uv_install_a_wheel_with_such_a_tag(tmp_path: Path, installer: str) -> None:
    plain = make_wheel(tmp_path, "tagged", "1.0")
    tag = replace(INPUTS, cuda="13.0").build_tag
    wheel = rewrite_wheel(plain, tmp_path / "new", build_tag=tag)
    assert wheel.name == f"tagged-1.0-{tag}-py3-none-any.whl"
    install(installer, tmp_path / "there", wheel)
    assert (tmp_path / "there/tagged.py").is_file()


@pytest.mark.parametrize(
    ("name", "version", "cuda"),
    [
        ("nvidia-cuda-runtime", "13.0.96", "13.0"),
        ("nvidia-cuda-runtime-cu12", "12.8.90", "12.8"),
        ("nvidia-cudnn-cu13", "9.1.0", None),
    ],
)
def test_the_cuda_of_a_locked_torch_is_that_of_the_locked_runtime(
    name: str, version: str, cuda: str | None
) -> None:
    files = [LockedFile(name, version, f"{name}.whl", 1, "a" * 64, "default", False)]
    assert locked_cuda(files) == cuda
    assert locked_cuda([]) is None


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
    assert [file.package for file in shaping_wheels(files, [])] == [
        "torch",
        "nvidia-cuda-nvcc",
        "cuda-toolkit",
    ]

"""The references that the GPU check is held against, and the comparison itself, in the env that has torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import envbuilder.doctor
from envbuilder.process import run
from tests.conftest import Quickstart

pytestmark = pytest.mark.needs_env


@pytest.fixture(scope="module")
def found(quickstart: Quickstart) -> dict[str, Any]:
    """What kernel_references.py prints: one interpreter for all tests, for torch is slow to import."""
    script = Path(__file__).with_name("kernel_references.py")
    ended = run(
        [quickstart.python, script, Path(envbuilder.doctor.__file__).parent / "kernels"], timeout_s=600
    )
    assert ended.returncode == 0, ended.output
    return dict(json.loads(ended.output.splitlines()[-1]))


@pytest.mark.parametrize(
    "reference",
    [
        "convolution",
        "convolution_of_documents",
        "convolution_in_two_parts",
        "convolution_step_by_step",
        "ends_of_sequences",
        "scan",
        "complex_scan",
        "constant_scan",
        "inner_mixer",
        "steps_of_a_scan",
        "norms",
        "chunk_scan",
        "chunk_scan_of_documents",
        "chunk_scan_in_two_parts",
        "mixer",
    ],
)
def test_a_reference_agrees_with_another_way_to_compute_it(found: dict[str, Any], reference: str) -> None:
    assert found[reference] < 1e-12


def test_a_right_kernel_has_no_problem(found: dict[str, Any]) -> None:
    assert found["a right kernel"] is None


@pytest.mark.parametrize(
    ("kernel", "problem"),
    [
        ("a kernel that ignores documents", "is off by"),
        ("a kernel with a wrong gradient", "gradient of x is off by"),
        ("a kernel that leaves an element unwritten", "output has elements that are not finite"),
        ("a kernel that raises", "KeyError"),
    ],
)
def test_a_wrong_kernel_is_found(found: dict[str, Any], kernel: str, problem: str) -> None:
    assert problem in found[kernel]


def test_of_a_tuned_kernel_only_the_smallest_configuration_is_left(found: dict[str, Any]) -> None:
    assert found["configurations left"] == [{"BLOCK_SIZE_M": 32, "BLOCK_SIZE_N": 64}]


def test_every_suite_is_run_in_every_dtype_once(found: dict[str, Any]) -> None:
    shared = [tuple(pair) for pair in found["shared out"]]
    assert sorted(shared) == sorted(set(shared))
    assert {suite for suite, _ in shared} == set(found["suites"])
    for suite in found["suites"]:
        assert {dtype for name, dtype in shared if name == suite} == {"bfloat16", "float32", "float16"}

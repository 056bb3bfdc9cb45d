"""What counts as another kernel. That shards have the same ones is in test_shard_objects.py."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from envbuilder.compile.shards.cubins import plain_name
from envbuilder.compile.shards.prove import ProofResult, compare_kernels
from envbuilder.fatbin import FatbinError
from tests.lab.binaries import elf, fatbinary, image

OPTIONS = ("-gencode", "arch=compute_90,code=sm_90", "-O2", "-no-compress", "-Xcompiler", "-fPIC")
UNIT = """\
#include <cstdio>
namespace { __global__ void same(int *x) { *x += 1; } }
void start(int *x) { same<<<1, 1>>>(x); }
extern "C" {
__global__ void code(int *x) { *x += NUMBER; }
__global__ void text(int *x) { printf(TEXT); }
__global__ void __launch_bounds__(BOUNDS) bounds(int *x) { *x = 1; }
__global__ void shared_memory(int *x) { __shared__ int y[NUMBER * 8]; y[threadIdx.x] = *x; *x = y[3]; }
__global__ void parameters(int *x MORE) { *x = 2; }
__global__ void ONLY(int *x) { *x = 3; }
}
"""


@pytest.mark.needs_env
def test_kernels_that_differ_in_anything_are_named(cuda_nvcc: Path, tmp_path: Path) -> None:
    objects = []
    for name, number, text, bounds, more, only in (
        ("one", "1", '"a"', "128", "", "first"),
        ("two", "2", '"b"', "256", ", int y", "second"),
    ):
        unit = UNIT
        for word, value in (
            ("NUMBER", number),
            ("TEXT", text),
            ("BOUNDS", bounds),
            ("MORE", more),
            ("ONLY", only),
        ):
            unit = unit.replace(word, value)
        source = tmp_path / f"{name}.cu"
        source.write_text(unit, encoding="utf-8")
        objects.append(tmp_path / f"{name}.o")
        subprocess.run([cuda_nvcc, *OPTIONS, "-c", source, "-o", objects[-1]], check=True)
    result = compare_kernels(*objects)
    assert result == ProofResult(
        7,
        different=("sm_90 bounds", "sm_90 code", "sm_90 parameters", "sm_90 shared_memory", "sm_90 text"),
        missing=("sm_90 first",),
        added=("sm_90 second",),
    )
    assert not result.same
    assert compare_kernels(objects[0], objects[0]).same


def test_no_kernels_prove_nothing(tmp_path: Path) -> None:
    path = elf(tmp_path, {})
    assert compare_kernels(path, path) == ProofResult(0, (), (), ())
    assert not compare_kernels(path, path).same


@pytest.mark.parametrize(
    ("flags", "payload", "reason"),
    [
        (0x8000, b"\0" * 24, "compressed"),
        (0, b"\0" * 24, "unknown layout"),
        (0, b"\x7fELF" * 6, "unknown layout"),
    ],
)
def test_code_that_cannot_be_read_is_an_error(
    tmp_path: Path, flags: int, payload: bytes, reason: str
) -> None:
    path = elf(tmp_path, {".nv_fatbin": fatbinary(image(2, 90, flags, payload))})
    with pytest.raises(FatbinError, match=reason):
        compare_kernels(path, path)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("_Z6kernelIfEvPT_i", "_Z6kernelIfEvPT_i"),
        ("_ZN43_GLOBAL__N__fd0cdcca_5_t1_cu_0d8c026e_156692akEPi", "_ZN12_GLOBAL__N_12akEPi"),
        ("_ZN42_INTERNAL_76755766_7_tiny_cu_b1791150_96504cuda3std3__45__cpo5beginE",
         "_ZN4cuda3std3__45__cpo5beginE"),
        (
            "_ZN42_INTERNAL_76755766_7_tiny_cu_b1791150_96504cuda3std3__444_GLOBAL__N__76755766_7_tiny_cu_b1791150_"
            "96506ignoreE",
            "_ZN4cuda3std3__412_GLOBAL__N_16ignoreE",
        ),
    ],
)  # fmt: skip
def test_names_lose_what_hangs_on_the_file(name: str, expected: str) -> None:
    assert plain_name(name) == expected

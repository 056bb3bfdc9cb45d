"""Real objects of real shards: joined where that is safe, and refused, even when forced, where it isn't."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from envbuilder.compile.shards.objects import check_shards, differences, join_command
from envbuilder.compile.shards.plan import ShardPlan, plan_shards
from envbuilder.compile.shards.prove import compare_kernels

Compile = Callable[[Path, str], Path]
OPTIONS = ("-gencode", "arch=compute_90,code=sm_90", "-O2", "-no-compress", "-Xcompiler", "-fPIC")
SAFE = """\
#include <cstdio>
#include <iostream>
#define HD __host__ __device__
static constexpr int kLimit = 4;
template <typename T> struct Traits { static constexpr int kN = sizeof(T) * 2; using type = T; };
HD inline int twice(int x) { return 2 * x; }
template <typename Traits_> __global__ void kernel(typename Traits_::type *x, int n) {
    static constexpr float weights[4] = {1, 3, 5, 7};
    __shared__ float tile[Traits_::kN];
    tile[threadIdx.x] = x[threadIdx.x] / weights[n & 3];
    __syncthreads();
    if (n > kLimit) printf("%s %d\\n", __func__, n);
    x[threadIdx.x] += twice(tile[0]);
}
template <typename T> int launch(T *x, int n) {
    static int calls = 0;  // one of each instantiation's own: forced below
    kernel<Traits<T>><<<1, Traits<T>::kN>>>(x, n);
    std::cout << n;
    return ++calls;
}
template int launch<float>(float *, int);
template int launch<double>(double *, int);
template int launch<int>(int *, int);
template int launch<short>(short *, int);
"""


@pytest.fixture(scope="module")
def compile_unit(cuda_nvcc: Path) -> Compile:
    def compile_one(source: Path, text: str) -> Path:
        source.write_text(text, encoding="utf-8")
        output = source.with_suffix(".o")
        subprocess.run([cuda_nvcc, *OPTIONS, "-c", source, "-o", output], check=True, cwd=source.parent)
        return output

    return compile_one


def shards_of(compile_unit: Compile, folder: Path, text: str) -> list[Path]:
    """The shards' objects, two of them, the unit divided by force."""
    unit = folder / "unit.cu"
    plan = plan_shards(unit, read=lambda _: text, include_folders=[], own=lambda _: True, most=2, force=True)
    assert isinstance(plan, ShardPlan)
    return [compile_unit(folder / f"unit.{number}.cu", each) for number, each in enumerate(plan.texts)]


def join(objects: Sequence[Path], output: Path) -> Path:
    linker = shutil.which("ld")
    assert linker is not None
    subprocess.run(join_command(linker, objects, output), check=True)
    return output


@pytest.fixture(scope="module")
def safe(compile_unit: Compile, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """The whole object of SAFE, and its shards'."""
    folder = tmp_path_factory.mktemp("safe")
    return compile_unit(folder / "unit.cu", SAFE), shards_of(compile_unit, folder, SAFE)


@pytest.mark.needs_env
def test_joined_shards_have_the_kernels_of_the_whole_unit_byte_for_byte(
    safe: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    whole, shards = safe
    assert check_shards(shards) is None
    joined = join(shards, tmp_path / "joined.o")
    result = compare_kernels(whole, joined)
    assert result.same, result
    assert result.kernels == 4
    partly = compare_kernels(whole, shards[0])
    assert (len(partly.missing), partly.different, partly.same) == (2, (), False)
    assert len(compare_kernels(shards[0], whole).added) == 2


@pytest.mark.needs_env
def test_joined_shards_offer_what_the_whole_unit_offers(
    safe: tuple[Path, list[Path]], tmp_path: Path
) -> None:
    def offered(path: Path) -> list[str]:
        done = subprocess.run(["nm", path], check=True, capture_output=True, text=True)
        rows = [line.split() for line in done.stdout.splitlines()]
        return sorted(row[-1] for row in rows if row[-2] in "TWDBVu")

    whole, shards = safe
    assert offered(join(shards, tmp_path / "joined.o")) == offered(whole)


STATE = """\
#include <cstdio>
static int calls;
static thread_local int mine;
namespace { int hidden = 3; }
static int next() { static int n; return ++n; }
int shared;
void helper() {}
__device__ int counter;
__constant__ float table[4];
__managed__ int everywhere;
static __global__ void one(int *x) { *x = 1; }
template <int n> __global__ void fixed(int *x) { *x = n; }
__device__ inline int ticket() { static int n; return atomicAdd(&n, 1); }
template <typename T> __global__ void own(T *x) { *x = ticket(); }
struct Registration { Registration() { puts("x"); } };
static Registration registration;
template <typename T> int f(int *x, T *y) {
    one<<<1, 1>>>(x), fixed<3><<<1, 1>>>(x), own<<<1, 1>>>(y), helper();
    return next() + ++calls + ++mine + ++hidden + ++shared;
}
template int f<float>(int *, float *);
template int f<short>(int *, short *);
"""


@pytest.fixture(scope="module")
def found(compile_unit: Compile, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What is said of the shards of STATE."""
    shards = shards_of(compile_unit, tmp_path_factory.mktemp("state"), STATE)
    assert check_shards(shards) is not None
    return list(differences(shards))


@pytest.mark.needs_env
@pytest.mark.parametrize(
    "name",
    [
        "the variable _ZL5calls",
        "the variable _ZL4mine",
        "the symbol _ZN12_GLOBAL__N_16hiddenE",
        "the variable _ZZL4nextvE1n",
        "the symbol shared",
        "the symbol _Z6helperv",
        "the variable _ZL7counter",
        "the GPU variable counter",
        "the GPU variable table",
        "the GPU variable everywhere",
        "the GPU variable _ZZ6ticketvE1n",
        "the kernel _Z3onePi",
        "the kernel _Z5fixedILi3EEvPi",
    ],
)
def test_state_shared_between_instantiations_is_found_in_the_objects(found: list[str], name: str) -> None:
    assert f"{name} is in unit.0.o and in unit.1.o" in found


@pytest.mark.needs_env
def test_what_is_run_when_a_library_is_loaded_is_found(found: list[str]) -> None:
    assert [text for text in found if text.startswith("unit.1.o: ") and "uses puts" in text]


@pytest.mark.needs_env
def test_what_each_instantiation_has_for_itself_is_no_difference(found: list[str]) -> None:
    assert not [text for text in found if "own" in text or "_Z1f" in text]


@pytest.mark.needs_env
def test_relocatable_device_code_is_refused(cuda_nvcc: Path, tmp_path: Path) -> None:
    source = tmp_path / "unit.cu"
    source.write_text("__global__ void k() {}\n", encoding="utf-8")
    output = tmp_path / "unit.o"
    subprocess.run([cuda_nvcc, *OPTIONS, "-dc", source, "-o", output], check=True)
    assert check_shards([output]) == "unit.o: its GPU code is relocatable"


def test_an_object_that_cannot_be_read_is_a_reason(tmp_path: Path) -> None:
    path = tmp_path / "unit.o"
    path.write_bytes(b"nothing")
    assert "can't be read" in str(check_shards([path]))
    assert "can't be read" in str(check_shards([tmp_path / "absent.o"]))
    source = tmp_path / "unit.c"
    source.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    subprocess.run(["gcc", source, "-o", path], check=True)
    assert check_shards([path]) == "unit.o: it is no object file with symbols"

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import InputError, MismatchError
from envbuilder.toolchain import (
    CudaToolkit,
    check_toolkit,
    find_host_compiler,
    make_cuda_home,
    older_than_torch,
    packaged_toolkit,
    system_toolkit,
)


def toolkit_at(home: Path, version: str = "13.0.88") -> CudaToolkit:
    return CudaToolkit(home, home / "bin" / "nvcc", version, ("75", "90", "100"))


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n", encoding="utf-8")
    path.chmod(0o755)
    return path


def test_the_cxx_variable_names_the_compiler_and_its_c_compiler_is_beside_it(tmp_path: Path) -> None:
    cxx = program(tmp_path / "g++-99", "echo 'g++-99 (GCC) 99.1'")
    cc = program(tmp_path / "gcc-99", "exit 0")
    compiler = find_host_compiler({"CXX": str(cxx), "PATH": "/usr/bin"})
    assert (compiler.cxx, compiler.cc, compiler.version) == (cxx, cc, "g++-99 (GCC) 99.1")


def test_without_a_variable_the_path_is_searched(tmp_path: Path) -> None:
    cxx = program(tmp_path / "c++", "echo version")
    assert find_host_compiler({"PATH": str(tmp_path)}).cxx == cxx


@pytest.mark.parametrize("host", [{"PATH": ""}, {"PATH": "", "CXX": "no-such-compiler"}])
def test_no_cpp_compiler_is_a_mismatch_with_the_remedy(host: dict[str, str]) -> None:
    with pytest.raises(MismatchError, match=r"no C\+\+ compiler") as caught:
        find_host_compiler(host)
    assert "module load gcc" in caught.value.remedy


@pytest.mark.parametrize("host", [{"PATH": ""}, {"PATH": "/usr/bin", "CUDA_HOME": "/no/such/folder"}])
def test_no_nvcc_is_a_mismatch_with_the_remedy(host: dict[str, str]) -> None:
    with pytest.raises(MismatchError, match="There is no nvcc") as caught:
        system_toolkit(host)
    assert "module load cuda" in caught.value.remedy


def test_toolchain_packages_without_nvcc_are_a_mismatch(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="hold no nvcc"):
        packaged_toolkit(tmp_path)


def test_an_nvcc_that_does_not_run_is_a_mismatch(tmp_path: Path) -> None:
    program(tmp_path / "bin" / "nvcc", "echo broken; exit 1")
    with pytest.raises(MismatchError, match="does not run as an nvcc"):
        system_toolkit({"CUDA_HOME": str(tmp_path)})


def test_a_wrapper_script_leads_to_the_real_toolkit(tmp_path: Path) -> None:
    home = tmp_path / "cuda"
    real = program(
        home / "bin" / "nvcc",
        f"""case "$1" in
--dryrun) echo '#$ _HERE_={home}/bin' >&2 ;;
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88' ;;
--list-gpu-code) printf 'sm_90\\nsm_100\\n' ;;
esac""",
    )
    program(tmp_path / "wrapper" / "nvcc", f'exec {real} "$@"')
    toolkit = system_toolkit({"PATH": f"{tmp_path / 'wrapper'}:/usr/bin"})
    assert toolkit == CudaToolkit(home, real, "13.0.88", ("90", "100"), steady_names=False)


def test_the_major_version_must_be_that_of_torchs_cuda(tmp_path: Path) -> None:
    check_toolkit(toolkit_at(tmp_path), "13.2", ["9.0"])
    check_toolkit(toolkit_at(tmp_path), None, ["9.0"])
    with pytest.raises(MismatchError, match="major versions must agree"):
        check_toolkit(toolkit_at(tmp_path), "12.8", ["9.0"])


def test_an_nvcc_that_is_older_than_torchs_cuda_within_a_major_version_is_a_warning(tmp_path: Path) -> None:
    toolkit = toolkit_at(tmp_path, "12.6.85")
    warned = older_than_torch(toolkit, "12.10")  # a number, not a text
    assert warned is not None
    assert "module load cuda/12.10" in warned
    assert [older_than_torch(toolkit, cuda) for cuda in ("12.6", "12.4", None)] == [None] * 3


def test_an_architecture_that_nvcc_cannot_make_is_refused_by_name(tmp_path: Path) -> None:
    check_toolkit(toolkit_at(tmp_path), None, ["9.0", "9.0a", "10.0f"])
    with pytest.raises(InputError, match=r"compute capability 5\.3") as caught:
        check_toolkit(toolkit_at(tmp_path), None, ["9.0", "5.3"])
    assert caught.value.context["expected"] == "7.5, 9.0, 10.0"


def test_a_cuda_home_leaves_room_for_a_driver_and_has_what_a_linker_looks_for(tmp_path: Path) -> None:
    home, other = tmp_path / "cu13", tmp_path / "other"
    for path in ("bin/nvcc", "bin/ptxas", "include/a.h", "lib/libcudart.so.13", "nvvm/bin/cicc"):
        program(home / path, "exit 0")
    for path in ("a.h", "cublas_v2.h"):
        program(other / path, "exit 1")
    made = make_cuda_home(
        toolkit_at(home),
        tmp_path / "made here",
        more_includes=[other, tmp_path / "missing"],
    )
    assert not (made / "bin" / "nvcc").exists()
    assert (made / "bin" / "ptxas").resolve() == home / "bin" / "ptxas"
    assert (made / "include" / "a.h").resolve() == home / "include" / "a.h"
    assert (made / "include" / "cublas_v2.h").resolve() == other / "cublas_v2.h"
    assert (made / "lib64" / "libcudart.so").resolve() == home / "lib" / "libcudart.so.13"
    assert (made / "nvvm" / "bin" / "cicc").exists()

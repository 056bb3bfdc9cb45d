"""GPU code in ELF files: in files of known content here, in torch's own libraries where the env is."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from envbuilder.fatbin import FatbinError, gpu_architectures, gpu_images
from tests.conftest import Quickstart
from tests.lab.binaries import elf, fatbinary, image


def test_machine_code_ptx_and_variants_are_told_apart(tmp_path: Path) -> None:
    data = fatbinary(image(2, 90), image(2, 90, 0x100000), image(1, 120), image(2, 100, 0x200000))
    path = elf(tmp_path, {".nv_fatbin": data})
    assert gpu_architectures(path) == ("compute_120", "sm_100f", "sm_90", "sm_90a")


def test_every_fatbinary_of_a_section_is_read_over_padding(tmp_path: Path) -> None:
    data = fatbinary(image(2, 80, payload=b"\0" * 20)).ljust(128, b"\0") + fatbinary(image(2, 90))
    assert gpu_architectures(elf(tmp_path, {".nv_fatbin": data})) == ("sm_80", "sm_90")


def test_relocatable_device_code_is_found(tmp_path: Path) -> None:
    path = elf(tmp_path, {"__nv_relfatbin": fatbinary(image(2, 75))})
    assert gpu_architectures(path) == ("sm_75",)


def test_images_are_given_with_what_is_stored_of_them_and_whether_it_is_packed(tmp_path: Path) -> None:
    data = fatbinary(image(2, 90, payload=b"cubin   "), image(2, 80, 0x8000), image(1, 90, 0x2000))
    found = list(gpu_images(elf(tmp_path, {".nv_fatbin": data})))
    assert [(each.architecture, each.compressed, each.is_machine_code) for each in found] == [
        ("sm_90", False, True),
        ("sm_80", True, True),
        ("compute_90", True, False),
    ]
    assert found[0].payload == b"cubin   "


def test_a_payload_that_is_cut_off_is_an_error(tmp_path: Path) -> None:
    data = fatbinary(image(2, 90, payload=b"\0" * 64))[:-40]
    with pytest.raises(FatbinError, match="unknown layout"):
        list(gpu_images(elf(tmp_path, {".nv_fatbin": data})))


def test_a_library_without_gpu_code_has_no_architectures(tmp_path: Path) -> None:
    assert gpu_architectures(elf(tmp_path, {})) == ()


@pytest.mark.parametrize(
    "data", [fatbinary(image(77, 90)), fatbinary(image(2, 90))[:40], fatbinary(b"\0" * 64)]
)
def test_an_unknown_layout_is_an_error_and_not_an_empty_answer(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(FatbinError, match="unknown layout"):
        gpu_architectures(elf(tmp_path, {".nv_fatbin": data}))


def test_a_file_that_is_no_elf_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "module.so"
    path.write_bytes(b"not a library")
    with pytest.raises(FatbinError, match="not an ELF"):
        gpu_architectures(path)


@pytest.mark.needs_env
def test_torch_has_code_for_the_architectures_that_it_says(quickstart: Quickstart) -> None:
    code = "import torch; print(torch.__file__, *torch._C._cuda_getArchFlags().split())"
    done = subprocess.run([quickstart.python, "-c", code], capture_output=True, text=True, check=True)
    file, *flags = done.stdout.split()
    found = gpu_architectures(Path(file).parent / "lib" / "libtorch_cuda.so")
    assert {flag for flag in flags if flag.startswith("sm_")} <= set(found)

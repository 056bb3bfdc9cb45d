"""A build that ends well may still have built the wrong thing: what the wheel is checked for."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from envbuilder.compile.build import Expected, check_wheel
from envbuilder.compile.buildenv import SETUPTOOLS_SETTINGS
from envbuilder.errors import BuildError
from envbuilder.lock import LockedFile
from envbuilder.model import Extension
from envbuilder.report import Quiet
from tests.lab.binaries import elf, fatbinary, image
from tests.lab.packages import make_wheel

SDIST = LockedFile("kernels", "1.0", "kernels-1.0.tar.gz", 1, "0" * 64, "default", True)
FILE = "kernels_cuda.cpython-312-x86_64-linux-gnu.so"


def code_for(folder: Path, *numbers: int, kind: int = 2) -> bytes:
    """A library with GPU code for these architectures."""
    data = {".nv_fatbin": fatbinary(*(image(kind, number) for number in numbers))} if numbers else {}
    return elf(folder, data).read_bytes()


def check(
    folder: Path,
    files: Mapping[str, bytes],
    modules: tuple[str, ...] = ("kernels_cuda",),
    capabilities: tuple[str, ...] = ("9.0",),
    version: str = "1.0",
) -> tuple[Extension, ...]:
    wheel = make_wheel(folder, "kernels", version, files={"kernels.py": b"", **files})
    expected = Expected(
        modules=modules,
        capabilities=capabilities,
        ptx=False,
        libraries=(),
        interpreter=Path(sys.executable),
        glibc="2.28",
    )
    return check_wheel(wheel, SDIST, expected, folder=folder / "look", log=folder / "log", reporter=Quiet())


def test_a_module_with_code_for_the_wanted_gpu_is_recorded(tmp_path: Path) -> None:
    library = code_for(tmp_path, 90)
    assert check(tmp_path, {FILE: library}) == (
        Extension(
            module="kernels_cuda",
            file=FILE,
            sha256=hashlib.sha256(library).hexdigest(),
            architectures=("sm_90",),
        ),
    )


def test_a_wheel_without_the_module_is_refused_and_the_module_named(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="the wheel lacks kernels_cuda") as caught:
        check(tmp_path, {})
    assert caught.value.exit_code == 6
    assert caught.value.remedy == f"envbuilder doctor --log {tmp_path / 'log'}"


@pytest.mark.parametrize(
    ("numbers", "capabilities"),
    [
        pytest.param((), ("9.0",), id="none"),
        pytest.param((80,), ("9.0",), id="another"),
        pytest.param((80, 90), ("9.0",), id="one too many"),
        pytest.param((90,), ("8.0", "9.0"), id="one too few"),
    ],
)
def test_a_module_with_code_for_other_gpus_is_refused(
    tmp_path: Path, numbers: tuple[int, ...], capabilities: tuple[str, ...]
) -> None:
    with pytest.raises(BuildError, match="kernels_cuda has GPU code for"):
        check(tmp_path, {FILE: code_for(tmp_path, *numbers)}, capabilities=capabilities)


def test_ptx_alone_does_not_serve(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="GPU code for compute_90"):
        check(tmp_path, {FILE: code_for(tmp_path, 90, kind=1)})


def test_a_file_that_only_has_a_modules_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="kernels_cuda can't be read"):
        check(tmp_path, {FILE: b"no library"})


def test_modules_are_found_by_every_form_of_file_name(tmp_path: Path) -> None:
    library = code_for(tmp_path, 90)
    files = {"one.so": library, "two.abi3.so": library, f"package/{FILE}": library, "libhelp.so.1": library}
    modules = ("one", "two", "package.kernels_cuda")
    assert {extension.module for extension in check(tmp_path, files, modules)} == set(modules)


def test_a_wheel_of_another_version_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match=r"it made kernels 1\.0\+cu130"):
        check(tmp_path, {FILE: code_for(tmp_path, 90)}, version="1.0+cu130")


def test_setuptools_heeds_the_settings_that_leave_compressing_to_the_rewriting(tmp_path: Path) -> None:
    setup = "from setuptools import setup\nsetup(name='tiny', py_modules=['tiny'])\n"
    (tmp_path / "setup.py").write_text(setup)
    (tmp_path / "tiny.py").write_text("x = 1\n" * 1000)
    settings = tmp_path / "settings.cfg"
    settings.write_text(SETUPTOOLS_SETTINGS, encoding="utf-8")
    subprocess.run(
        [sys.executable, "-c", "import setuptools.build_meta as backend; backend.build_wheel('.')"],
        cwd=tmp_path,
        env={**os.environ, "DIST_EXTRA_CONFIG": str(settings)},
        check=True,
        capture_output=True,
    )
    (wheel,) = tmp_path.glob("tiny-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert {entry.compress_type for entry in archive.infolist()} == {zipfile.ZIP_STORED}

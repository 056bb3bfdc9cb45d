"""`probe` on this machine, with the programs of another one in its place; and target.json."""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.markers import default_environment
from packaging.tags import sys_tags

import envbuilder.gpu
import envbuilder.interpreter
import envbuilder.probe
import envbuilder.toolchain
from envbuilder.errors import InputError, MismatchError
from envbuilder.machine import TorchBuild, machine_text, read_machine
from envbuilder.probe import probe_machine
from tests.machines import machine_record, venv_with

HERE = Path(sys.executable)
MINOR = f"{sys.version_info[0]}.{sys.version_info[1]}"
NVIDIA_SMI = """\
case "$1" in
--query*)
    echo '0, NVIDIA GH200, 9.0, 580.65.06, 97871, Default'
    echo '1, NVIDIA GB10, [N/A], 580.65.06, [N/A], Default';;
*) echo '| Driver Version: 580.65.06   CUDA Version: 13.0 |';;
esac"""
NVCC = """\
case "$1" in
--dryrun) echo "#\\$ _HERE_=$(dirname "$0")";;
--version) echo 'Cuda compilation tools, release 13.0, V13.0.88';;
*) printf 'sm_80\\nsm_90\\n';;
esac"""
TORCH = """
class version:
    cuda = "13.0"
__version__ = "2.11.0+cu130"
def compiled_with_cxx11_abi():
    return True
"""

Programs = Callable[..., Path]


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Programs:
    """programs(gcc="echo 1.0") makes these shell scripts the only programs on the PATH."""
    for name in ("CC", "CXX", "CUDA_HOME", "CUDA_PATH", "TMPDIR"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))

    def make(**scripts: str) -> Path:
        for name, text in scripts.items():
            program = folder / name.replace("_", "-").replace("gxx", "g++")
            program.write_text(f"#!/bin/sh\nPATH=/usr/bin:/bin\n{text}\n", encoding="utf-8")
            program.chmod(0o755)
        return folder

    return make


@pytest.fixture
def provider(tmp_path: Path) -> Path:
    """A venv's python with a torch."""
    python = venv_with(tmp_path / "provider", "torch", "2.11.0+cu130")
    package = tmp_path / "provider" / "lib" / f"python{MINOR}" / "site-packages" / "torch"
    package.mkdir()
    (package / "__init__.py").write_text(TORCH, encoding="utf-8")
    return python


def test_the_interpreter_tells_its_own_tags_and_markers(provider: Path) -> None:
    # The provider has no `packaging` of its own.
    found = probe_machine(provider, ()).interpreter
    assert found.tags == tuple(map(str, sys_tags()))
    assert found.markers == dict(default_environment())
    assert (found.implementation, found.version) == (sys.implementation.name, platform.python_version())


def test_a_gpu_node_is_described(programs: Programs, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = programs(
        nvidia_smi=NVIDIA_SMI,
        nvcc=NVCC,
        gcc='echo "gcc (Debian 12.2.0-14+deb12u1) 12.2.0"',
        gxx='echo "g++ (GCC) 8.5.0 20210514 (Red Hat 8.5.0-22)"',
        unshare="exit 0",
    )
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    record = probe_machine(HERE, ())
    assert (record.driver, record.driver_cuda) == ("580.65.06", "13.0")
    first, second = record.gpus
    assert (first.name, first.compute_capability, first.memory_bytes) == ("NVIDIA GH200", "9.0", 97871 << 20)
    assert (second.compute_capability, second.memory_bytes) == (None, None)
    assert record.nvcc is not None
    assert (record.nvcc.path, record.nvcc.release) == (str(folder / "nvcc"), "13.0.88")
    assert record.cc is not None
    assert (record.cc.path, record.cc.release) == (str(folder / "gcc"), "12.2.0")
    assert record.cxx is not None
    assert record.cxx.release == "8.5.0"
    assert record.user_namespaces is True
    assert record.cpus == len(os.sched_getaffinity(0))
    assert record.memory_bytes is not None
    assert record.scratch_free_bytes is not None
    assert (record.machine, record.glibc) == (platform.machine(), platform.libc_ver()[1] or None)
    assert record.kernel == platform.release()


def test_what_is_not_here_is_none(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    programs()
    monkeypatch.setenv("TMPDIR", "/nonexistent/scratch")
    record = probe_machine(HERE, ["no-such-package"])
    assert record.gpus == ()
    assert {record.driver, record.driver_cuda, record.nvcc, record.cc, record.cxx} == {None}
    assert (record.user_namespaces, record.scratch_free_bytes) == (None, None)
    assert (record.provided, record.torch) == ({"no-such-package": None}, None)


def test_what_fails_is_none(programs: Programs) -> None:
    programs(
        nvidia_smi="exit 9",
        nvcc="echo broken; exit 1",
        gcc="exit 1",
        gxx="exit 1",
        unshare="echo 'unshare failed: Operation not permitted' >&2; exit 1",
    )
    record = probe_machine(HERE, ())
    assert (record.gpus, record.nvcc, record.cxx, record.user_namespaces) == ((), None, None, False)
    assert record.cc is not None
    assert record.cc.release is None


def test_what_hangs_is_none(programs: Programs, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (envbuilder.gpu, envbuilder.toolchain, envbuilder.probe):
        monkeypatch.setattr(module, "_TIMEOUT_S", 0.2)
    programs(**dict.fromkeys(("nvidia_smi", "nvcc", "gcc", "gxx", "unshare"), "sleep 600"))
    record = probe_machine(HERE, ())
    assert (record.gpus, record.nvcc, record.cxx, record.user_namespaces) == ((), None, None, False)


def test_provided_packages_are_those_of_the_interpreter(provider: Path) -> None:
    record = probe_machine(provider, ["Torch", "triton"])
    assert record.provided == {"torch": "2.11.0+cu130", "triton": None}
    assert record.torch == TorchBuild("2.11.0+cu130", "13.0", True)


def test_a_torch_that_nobody_asked_for_is_not_imported(provider: Path) -> None:
    assert probe_machine(provider, ["triton"]).torch is None


@pytest.mark.parametrize("text", ["raise ImportError('libcudart.so.13')", "import time; time.sleep(600)"])
def test_a_torch_that_cannot_be_imported_or_hangs_has_a_version_alone(
    provider: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    if "sleep" in text:
        monkeypatch.setattr(envbuilder.interpreter, "_TORCH_TIMEOUT_S", 1.0)
    module = provider.parent.parent / "lib" / f"python{MINOR}" / "site-packages" / "torch" / "__init__.py"
    module.write_text(text, encoding="utf-8")
    record = probe_machine(provider, ["torch"])
    assert (record.provided["torch"], record.torch) == ("2.11.0+cu130", None)


def test_an_interpreter_too_old_for_our_packaging_has_no_tags(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text(f'#!/bin/sh\ncase "$*" in *sys_tags*) exit 1;; esac\nexec {HERE} "$@"\n', "utf-8")
    old.chmod(0o755)
    record = probe_machine(old, ())
    assert (record.interpreter.tags, record.interpreter.markers) == ((), {})


def test_an_interpreter_that_does_not_run_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "python").write_bytes(b"\x7fELF of another machine")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(MismatchError, match="not a Python interpreter that runs here"):
        probe_machine(tmp_path / "python", ())


def test_an_interpreter_is_found_by_its_name_and_one_that_is_not_here_is_a_mismatch(
    programs: Programs,
) -> None:
    programs(python3=f'exec {HERE} "$@"')
    assert probe_machine(Path("python3"), ()).interpreter.version == platform.python_version()
    with pytest.raises(MismatchError, match=r"no interpreter python2\.7 on this machine"):
        probe_machine(Path("python2.7"), ())


def texts(value: object) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from (key, *texts(item))
    elif isinstance(value, list):
        for item in value:
            yield from texts(item)
    else:
        yield str(value)


def test_a_record_comes_back_from_its_file_and_names_no_host(tmp_path: Path) -> None:
    record = probe_machine(HERE, ["pip"])
    path = tmp_path / "target.json"
    path.write_text(machine_text(record), encoding="utf-8")
    assert read_machine(path) == record
    assert platform.node() not in set(texts(json.loads(path.read_text())))


@pytest.mark.parametrize(
    ("damage", "key"),
    [
        (lambda text: text[: len(text) // 2], "JSON"),
        (lambda text: "", "JSON"),
        (lambda text: text.replace('"schema_version": 1', '"schema_version": 7'), "schema_version"),
        (lambda text: text.replace('"version": "3.12.4"', '"version": "three"'), "interpreter.version"),
        (lambda text: text.replace('"glibc"', '"hostname"'), "glibc, hostname"),
    ],
)
def test_a_damaged_record_is_an_input_error_that_says_how_to_make_it_anew(
    tmp_path: Path, damage: Callable[[str], str], key: str
) -> None:
    path = tmp_path / "target.json"
    path.write_text(damage(machine_text(machine_record())), encoding="utf-8")
    with pytest.raises(InputError, match="not a machine record") as caught:
        read_machine(path)
    assert caught.value.remedy.endswith(f"envbuilder probe --output {path}")
    assert caught.value.context["keys"] == key


@pytest.mark.parametrize("name", ["missing.json", "."])
def test_a_record_that_cannot_be_read_is_an_input_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError) as caught:
        read_machine(tmp_path / name)
    assert "envbuilder probe --output" in caught.value.remedy

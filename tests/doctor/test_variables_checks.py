from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.model import Finding
from envbuilder.paths import Root
from tests.doctor.conftest import TinyEnv, cuda_recipe, nvidia_smi, run_one, torch_version

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]

VARIABLES = re.compile(
    r"LD_\w+|PYTHON\w+|CUDA\w*|PIP_\w+|UV_\w+|CONDA_\w+|CC|CXX|\w*FLAGS|TORCH\w*|NCCL_\w+|HF_\w+|MAX_JOBS|"
    r"TRANSFORMERS_\w+|PYTORCH_\w+|(?i:https?_proxy|all_proxy|no_proxy)|XDG_CONFIG_\w+|TRITON_\w+|NVIDIA_\w+",
)
CHECKS = ("libraries", "preload", "python", "cuda", "compilers", "debugging", "pip", "hub", "proxy")


@pytest.fixture(autouse=True)
def bare_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that the checks look at is set, and no configuration of a user is there."""
    for name in os.environ:
        if VARIABLES.fullmatch(name):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))


def compiled(path: Path, source: str, *options: str) -> Path:
    """A real shared library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    command = ["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path), f"-Wl,-soname,{path.name}"]
    command += ["-x", "none", "-Wl,--no-as-needed", *options]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@pytest.fixture
def with_cuda(env: TinyEnv) -> TinyEnv:
    """An env whose libcusparse needs its libnvJitLink, and finds it by RUNPATH as NVIDIA's packages do."""
    folder = env.site_packages / "nvidia" / "cu13" / "lib"
    link = compiled(
        folder / "libnvJitLink.so.13", "int version(void) { return 13; } int link(void) { return 0; }"
    )
    runpath = ("-Wl,--enable-new-dtags", "-Wl,-rpath,$ORIGIN")
    compiled(
        folder / "libcusparse.so.12", "int link(void); int use(void) { return link(); }", str(link), *runpath
    )
    return env


@pytest.mark.parametrize("check", CHECKS)
def test_a_shell_without_such_variables_is_right(env: TinyEnv, check: str) -> None:
    assert env.check(f"variables.{check}").verdict == "ok"


@pytest.mark.parametrize("check", CHECKS)
def test_without_a_recipe_the_shell_alone_is_looked_at(root: Root, check: str) -> None:
    assert run_one(f"variables.{check}", root=root).verdict == "ok"


def test_a_library_that_lacks_what_the_env_s_needs_fails(
    with_cuda: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = compiled(tmp_path / "cuda" / "libnvJitLink.so.13", "int version(void) { return 12; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(other.parent))
    finding = with_cuda.check("variables.libraries")
    assert finding.verdict == "failed"
    assert f"libcusparse.so.12 needs link, which {other} lacks" in finding.evidence


def test_another_build_of_a_library_is_named(
    with_cuda: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = "int version(void) { return 14; } int link(void) { return 1; }"
    other = compiled(tmp_path / "cuda" / "libnvJitLink.so.13", source)
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nonexistent:{other.parent}")
    finding = with_cuda.check("variables.libraries")
    assert finding.verdict == "warning"
    assert "/nonexistent: not there" in finding.evidence
    assert any(line.startswith(f"{other} comes before ") for line in finding.evidence)
    monkeypatch.delenv("LD_LIBRARY_PATH")
    monkeypatch.setenv("LD_PRELOAD", str(other))
    assert with_cuda.check("variables.preload").verdict == "warning"


def test_what_torch_s_rpath_brings_is_not_hidden(
    with_cuda: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = with_cuda.site_packages / "nvidia" / "cu13" / "lib" / "libnvJitLink.so.13"
    rpath = ("-Wl,--disable-new-dtags", "-Wl,-rpath,$ORIGIN/../../nvidia/cu13/lib")
    torch = with_cuda.site_packages / "torch" / "lib" / "libtorch_cuda.so"
    compiled(torch, "int nothing(void) { return 0; }", str(link), *rpath)
    other = compiled(tmp_path / "cuda" / "libnvJitLink.so.13", "int version(void) { return 12; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(other.parent))
    assert with_cuda.check("variables.libraries").verdict == "ok"


def test_folders_without_the_env_s_libraries_are_harmless(
    with_cuda: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled(tmp_path / "blas" / "libblas.so.3", "int blas(void) { return 0; }")
    own = with_cuda.site_packages / "nvidia" / "cu13" / "lib"
    monkeypatch.setenv("LD_LIBRARY_PATH", f"{tmp_path / 'blas'}:{own}")
    assert with_cuda.check("variables.libraries").verdict == "ok"


def test_a_library_that_the_interpreter_can_not_work_with_fails(
    env: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = subprocess.run(
        [env.folder / "bin/python", "-c", "import _ctypes, _ssl; print(_ctypes.__file__, _ssl.__file__)"],
        capture_output=True, text=True, check=True,
    ).stdout.split()  # fmt: skip
    names = {
        line.split()[0]
        for file in needed
        for line in subprocess.run(
            ["ldd", file], capture_output=True, text=True, check=True
        ).stdout.splitlines()
        if re.match(r"\s*lib(ssl|crypto|ffi)", line)
    }
    for name in names:
        compiled(tmp_path / "broken" / name, "int nothing(void) { return 0; }")
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "broken"))
    finding = env.check("variables.libraries")
    assert finding.verdict == "failed"
    assert finding.remedy == "unset LD_LIBRARY_PATH"


def test_an_older_cxx_library_before_the_machine_s_is_named(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older = compiled(tmp_path / "gcc" / "libstdc++.so.6", "int nothing(void) { return 0; }")
    # Never loaded by Python itself.
    monkeypatch.setenv("LD_LIBRARY_PATH", str(older.parent))
    finding = run_one("variables.libraries", root=root)
    assert finding.verdict == "warning"
    assert "libstdc++.so.6" in finding.summary


def test_a_preloaded_file_that_is_not_there_is_named(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/nonexistent/libxalt.so")
    finding = run_one("variables.preload", root=root)
    assert finding.verdict == "warning"
    assert finding.remedy == "unset LD_PRELOAD"


def test_modules_on_pythonpath_that_hide_the_env_s_are_named(
    env: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "mine"
    (folder / "queue").mkdir(parents=True)
    (folder / "queue" / "__init__.py").touch()
    (folder / "tiny.py").touch()
    (folder / "unrelated.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(folder))
    finding = env.check("variables.python")
    assert finding.verdict == "warning"
    assert f"tiny: {folder / 'tiny.py'}" in finding.evidence
    assert "queue, tiny" in finding.summary
    (folder / "tiny.py").unlink()
    shutil.rmtree(folder / "queue")
    assert env.check("variables.python").verdict == "ok"


def test_a_pythonhome_without_a_standard_library_fails(
    env: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONHOME", str(tmp_path))
    finding = env.check("variables.python")
    assert finding.verdict == "failed"
    assert finding.remedy == "unset PYTHONHOME"


def test_a_pythonhome_that_fits_is_still_named(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONHOME", sys.base_prefix)
    assert run_one("variables.python", root=root).verdict == "warning"


def nvcc(folder: Path, release: str) -> Path:
    """A CUDA_HOME whose nvcc says that it is of this release."""
    path = folder / f"cuda-{release}" / "bin" / "nvcc"
    path.parent.mkdir(parents=True)
    path.write_text(f"#!/bin/sh\necho 'Cuda compilation tools, release {release}, V{release}.1'\n")
    path.chmod(0o755)
    return path.parent.parent


@pytest.mark.parametrize(("toolchain", "verdict"), [("packages", "warning"), ("system", "failed")])
def test_a_cuda_home_of_another_release_than_torch_s_is_named(
    make_env: MakeEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, toolchain: str, verdict: str
) -> None:
    env = make_env(recipe=cuda_recipe("ext", toolchain=toolchain), files=torch_version())
    monkeypatch.setenv("CUDA_HOME", str(nvcc(tmp_path, "12.6")))
    finding = env.check("variables.cuda")
    assert finding.verdict == verdict
    assert "CUDA 12.6, and torch's is 13.0" in finding.summary
    monkeypatch.setenv("CUDA_HOME", str(nvcc(tmp_path, "13.0")))
    assert env.check("variables.cuda").verdict == "ok"


def test_a_cuda_home_that_is_nowhere_is_named(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_HOME", "/nonexistent/cuda")
    monkeypatch.setenv("CUDA_PATH", "/nonexistent/other")
    finding = run_one("variables.cuda", root=root)
    assert finding.verdict == "warning"
    assert "where no nvcc is" in finding.summary
    assert "differ" in finding.summary


def test_conda_s_compiler_is_named(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bin_folder = tmp_path / "conda" / "bin"
    bin_folder.mkdir(parents=True)
    for name in ("c++", "cc"):
        (bin_folder / name).write_text(f'#!/bin/sh\nexec {shutil.which(name)} "$@"\n')
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("CONDA_PREFIX", str(bin_folder.parent))
    assert run_one("variables.compilers", root=root).verdict == "ok"
    monkeypatch.setenv("CXX", str(bin_folder / "c++"))
    finding = run_one("variables.compilers", root=root)
    assert finding.verdict == "warning"
    assert finding.remedy is not None
    assert "conda deactivate" in finding.remedy


def test_a_cxx_without_its_c_compiler_is_named(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "c++")
    monkeypatch.setenv("CC", "/nonexistent/gcc")
    assert run_one("variables.compilers", root=root).verdict == "warning"


def test_compilers_of_two_families_are_named(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(**{"g++": "echo 'g++ 12.2.0'", "clang": "echo 'clang 16.0.0'"})
    monkeypatch.setenv("CC", "clang")
    finding = run_one("variables.compilers", root=root)
    assert finding.verdict == "warning"
    assert "different families" in finding.summary


@pytest.mark.parametrize(
    "setting", ["CUDA_LAUNCH_BLOCKING=1", "NCCL_P2P_DISABLE=1", "TORCH_DISTRIBUTED_DEBUG=detail"]
)
def test_what_slows_training_down_is_named(root: Root, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    name, _, value = setting.partition("=")
    monkeypatch.setenv(name, value)
    finding = run_one("variables.debugging", root=root)
    assert finding.verdict == "warning"
    assert finding.remedy == f"unset {name}"
    monkeypatch.setenv(name, "0")
    assert run_one("variables.debugging", root=root).verdict == "ok"


@pytest.mark.parametrize(
    ("wanted", "verdict"),
    [("ib77", "failed"), ("=l", "failed"), ("ib77,lo", "ok"), ("=lo", "ok"), ("^ib", "ok")],
)
def test_an_interface_that_is_not_here_fails(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch, wanted: str, verdict: str
) -> None:
    programs(nvidia_smi=nvidia_smi())
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", wanted)
    assert run_one("variables.debugging", root=root).verdict == verdict
    programs(nvidia_smi="exit 9")
    on_login = "warning" if verdict == "failed" else verdict
    assert run_one("variables.debugging", root=root).verdict == on_login


def pip_finding(root: Root) -> Finding:
    return run_one("variables.pip", root=root)


def test_a_variable_that_sends_packages_elsewhere_is_named(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PIP_INDEX_URL", "https://ada:secret@index.example/simple")
    finding = pip_finding(root)
    assert finding.verdict == "warning"
    assert "pip: :env:.target = /elsewhere" in finding.evidence
    assert "secret" not in finding.model_dump_json()


def test_a_configuration_file_that_sends_packages_elsewhere_is_named(root: Root, tmp_path: Path) -> None:
    file = tmp_path / ".config" / "pip" / "pip.conf"
    file.parent.mkdir(parents=True)
    file.write_text("[install]\nuser = yes\n[global]\nno-index = true\n")
    finding = pip_finding(root)
    assert finding.verdict == "warning"
    assert "pip: install.user = yes" in finding.evidence
    file.write_text("[global]\nno-index = true\n")
    finding = pip_finding(root)
    assert finding.verdict == "ok"
    assert finding.evidence == ("pip: global.no-index = true",)
    file.write_text("no section\n")
    finding = pip_finding(root)
    assert finding.verdict == "warning"
    assert "can't read its configuration" in finding.summary


def test_a_hub_folder_that_can_not_be_written_is_named_and_no_token_shown(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "file" / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("HF_ENDPOINT", "https://ada:secret@hub.example")
    finding = run_one("variables.hub", root=root)
    assert finding.verdict == "warning"
    assert "HF_TOKEN is set" in finding.evidence
    assert "secret" not in finding.model_dump_json()
    monkeypatch.setenv("HF_HOME", str(tmp_path / "new" / "hub"))
    assert run_one("variables.hub", root=root).verdict == "ok"


def test_a_proxy_that_does_not_answer_is_named(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        monkeypatch.setenv("https_proxy", f"http://ada:secret@127.0.0.1:{port}")
        finding = run_one("variables.proxy", root=root)
        assert finding.verdict == "warning"
        assert "ConnectionRefusedError" in " ".join(finding.evidence)
        assert "secret" not in finding.model_dump_json()
        listener.listen()
        assert run_one("variables.proxy", root=root).verdict == "ok"
        monkeypatch.setenv("HTTPS_PROXY", f"http://localhost:{port}")
        assert "in upper case" in run_one("variables.proxy", root=root).summary

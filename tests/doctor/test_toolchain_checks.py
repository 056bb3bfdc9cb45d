from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.interpreter import inspect_interpreter
from envbuilder.model import BuildReceipt, InstalledPackage
from envbuilder.paths import Root
from envbuilder.recipe import load_recipe
from envbuilder.site import Site
from envbuilder.wheelhouse import store_built
from tests.conftest import REPOSITORY, Quickstart
from tests.doctor.conftest import TinyEnv, cuda_recipe, run_one, torch_version
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_wheel

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]

COMPILER = 'case "$1" in --version) echo "g++ 12.2.0";; *) echo "ld: cannot find crt1.o"; exit 1;; esac'
NVCC = """case "$1" in
--version) echo "Cuda compilation tools, release 12.4, V12.4.131";;
--list-gpu-code) echo sm_90;;
*) echo "#$ _HERE_=/opt/cuda/bin";;
esac"""


def test_a_compiler_that_compiles_and_links_passes(root: Root) -> None:
    finding = run_one("toolchain.compiler", root=root)
    assert finding.verdict == "ok"
    assert finding.evidence


def test_a_machine_without_a_compiler_fails(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    programs()
    finding = run_one("toolchain.compiler", root=root)
    assert finding.verdict == "failed"
    assert "no C++ compiler" in finding.summary


def test_a_compiler_that_can_not_link_fails_with_its_words(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    programs(**{"g++": COMPILER})
    finding = run_one("toolchain.compiler", root=root)
    assert finding.verdict == "failed"
    assert "ld: cannot find crt1.o" in finding.evidence


@pytest.fixture
def compiled(make_env: MakeEnv, tmp_path: Path) -> MakeEnv:
    """Makes an env with torch 2.11.0+cu130 and a wheel that the wheelhouse says was compiled like this."""

    def make(*, nvcc: str = "13.0.88", torch: str = "2.11.0+cu130") -> TinyEnv:
        env = make_env(recipe=cuda_recipe("ext"), files=torch_version())
        wheel = make_wheel(tmp_path, "ext", "1.0")
        receipt = BuildReceipt(
            package="ext",
            version="1.0",
            sdist="ext-1.0.tar.gz",
            sdist_sha256="0" * 64,
            key="key",
            wheel=wheel.name,
            wheel_sha256="e" * 64,
            python="3.11.7",
            torch=torch,
            torch_cuda="13.0",
            cxx11_abi=True,
            nvcc=nvcc,
            host_compiler="g++ 12",
            compute_capabilities=("9.0",),
            architectures_kept=("sm_90",),
            architectures_dropped=(),
            extensions=(),
            isolation="none",
            environment={},
            units=(),
            seconds=1.0,
            built_at="2026-01-01T00:00:00+00:00",
        )
        store_built(env.root, wheel, receipt)
        built = InstalledPackage(
            name="ext", version="1.0", wheel=wheel.name, sha256="e" * 64, origin="wheelhouse"
        )
        env.change_receipt(packages=(*env.receipt.packages, built))
        return env

    return make


def test_an_extension_of_torchs_own_cuda_passes(compiled: MakeEnv) -> None:
    finding = compiled().check("toolchain.cuda")
    assert finding.verdict == "ok"
    assert "ext: compiled by nvcc 13.0.88 for torch 2.11.0+cu130" in finding.evidence


def test_an_extension_of_another_cuda_fails(compiled: MakeEnv) -> None:
    finding = compiled(nvcc="12.4.131").check("toolchain.cuda")
    assert finding.verdict == "failed"
    assert "nvcc 12.4.131" in finding.summary


def test_an_extension_for_another_torch_fails(compiled: MakeEnv) -> None:
    finding = compiled(torch="2.10.0+cu130").check("toolchain.cuda")
    assert finding.verdict == "failed"
    assert "torch 2.10.0+cu130" in finding.summary


@pytest.mark.parametrize("there", [{}, {"nvcc": NVCC}])
def test_the_machines_own_nvcc_is_looked_at_where_the_recipe_uses_it(
    make_env: MakeEnv, programs: Programs, monkeypatch: pytest.MonkeyPatch, there: dict[str, str]
) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    env = make_env(recipe=cuda_recipe("ext", toolchain="system"), files=torch_version())
    programs(**there)
    finding = env.check("toolchain.cuda")
    assert finding.verdict == "failed"
    assert ("12.4.131" in finding.summary) is bool(there)


def test_an_older_nvcc_of_torchs_major_version_passes_and_is_named(
    make_env: MakeEnv, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(variable, raising=False)
    programs(nvcc=NVCC)
    env = make_env(recipe=cuda_recipe("ext", toolchain="system"), files=torch_version("2.10.0+cu128", "12.8"))
    finding = env.check("toolchain.cuda")
    assert finding.verdict == "ok"
    assert any("older than torch's 12.8" in line for line in finding.evidence)


def test_a_recipe_without_gpu_code_needs_no_nvcc(env: TinyEnv) -> None:
    assert env.check("toolchain.cuda").verdict == "skipped"


HOST_CONFIG = """\
#if __GNUC__ > {newest}
#error -- unsupported GNU version! gcc versions later than {newest} are not supported! More words.
#endif
"""
HEADERS = ("cuda_runtime.h", "cusparse.h", "cublas_v2.h", "cublasLt.h", "cusolverDn.h")


def toolkit_members(*without: str, newest: int = 99) -> dict[str, str]:
    """The files of a CUDA toolkit, as far as they are looked at, by their path in its folder."""
    members = {f"include/{name}": "" for name in HEADERS} | {"lib/libcudart.so.13": ""}
    members["include/crt/host_config.h"] = HOST_CONFIG.format(newest=newest)
    return {path: text for path, text in members.items() if path not in without}


@pytest.fixture
def machines_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes $CUDA_HOME a toolkit of these files, whose nvcc tells what it is."""

    def make(members: dict[str, str]) -> Path:
        home = tmp_path / "cuda"
        for path, text in members.items():
            (home / path).parent.mkdir(parents=True, exist_ok=True)
            (home / path).write_text(text, encoding="utf-8")
        nvcc = home / "bin" / "nvcc"
        nvcc.parent.mkdir()
        says = NVCC.replace("12.4", "13.0").replace("/opt/cuda/bin", str(nvcc.parent))
        nvcc.write_text(f"#!/bin/sh\n{says}\n", encoding="utf-8")
        nvcc.chmod(0o755)
        monkeypatch.setenv("CUDA_HOME", str(home))
        for name in ("CPATH", "LIBRARY_PATH", "CXX"):
            monkeypatch.delenv(name, raising=False)
        return home

    return make


def system_env(make_env: MakeEnv) -> TinyEnv:
    return make_env(recipe=cuda_recipe("ext", toolchain="system"), files=torch_version())


def packaged(env: TinyEnv, folder: Path, members: dict[str, str]) -> TinyEnv:
    """`env` with a bundle in which these files are those of the CUDA compiler's package, and ninja."""
    env.recipe = cuda_recipe("ext")
    wheels = [
        make_wheel(
            folder, "nvidia-cuda-crt", "13.0.88", files={f"nvidia/cu13/{p}": t for p, t in members.items()}
        ),
        make_wheel(folder, "ninja", "1.13.0"),
    ]
    python = inspect_interpreter(Path(sys.executable)).minor
    bundle = make_bundle(env.root, env.recipe, {wheel: ["build"] for wheel in wheels}, python=python)
    env.lock = bundle.lock
    return env


@pytest.mark.parametrize(("newest", "verdict"), [(99, "ok"), (3, "failed")])
def test_the_header_of_the_machines_nvcc_judges_the_host_compiler(
    make_env: MakeEnv, machines_toolkit: Callable[..., Path], newest: int, verdict: str
) -> None:
    machines_toolkit(toolkit_members(newest=newest))
    finding = system_env(make_env).check("toolchain.host")
    assert finding.verdict == verdict
    if verdict == "failed":
        assert finding.evidence[-1] == "-- unsupported GNU version!"
        assert finding.remedy is not None
        assert "CXX=g++-3" in finding.remedy


@pytest.mark.parametrize(("newest", "verdict"), [(99, "ok"), (3, "failed")])
def test_the_header_in_the_bundle_judges_the_host_compiler(
    env: TinyEnv, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, newest: int, verdict: str
) -> None:
    monkeypatch.delenv("CXX", raising=False)
    finding = packaged(env, tmp_path, toolkit_members(newest=newest)).check("toolchain.host")
    assert finding.verdict == verdict


@pytest.mark.parametrize("check", ["host", "toolkit"])
def test_without_a_toolkit_to_look_at_the_reason_is_told(env: TinyEnv, check: str) -> None:
    assert env.check(f"toolchain.{check}").summary == "The recipe compiles no GPU code."
    env.recipe = cuda_recipe("ext")
    finding = env.check(f"toolchain.{check}")
    assert finding.verdict == "skipped"
    assert "envbuilder fetch" in finding.summary


def test_a_whole_toolkit_passes(make_env: MakeEnv, machines_toolkit: Callable[..., Path]) -> None:
    machines_toolkit(toolkit_members())
    assert system_env(make_env).check("toolchain.toolkit").verdict == "ok"


@pytest.mark.parametrize(
    "missing", ["include/cusparse.h", "include/crt/host_config.h", "lib/libcudart.so.13"]
)
def test_a_toolkit_in_part_fails(
    make_env: MakeEnv, machines_toolkit: Callable[..., Path], missing: str, tmp_path: Path
) -> None:
    if missing.startswith("lib/") and any(Path("/usr/lib").glob("*-linux-gnu/libcudart.so*")):
        missing = "include/cusparse.h"  # this machine has that library in its own folders
    machines_toolkit(toolkit_members(missing))
    finding = system_env(make_env).check("toolchain.toolkit")
    assert finding.verdict == "failed"
    name = missing.removeprefix("include/").removeprefix("lib/").removesuffix(".13")
    assert f"lacks {name}" in finding.summary


def test_headers_in_the_bundles_wheels_count(make_env: MakeEnv, tmp_path: Path) -> None:
    env = make_env(files=torch_version())
    assert packaged(env, tmp_path, toolkit_members()).check("toolchain.toolkit").verdict == "ok"
    finding = packaged(env, tmp_path, toolkit_members("include/cublas_v2.h")).check("toolchain.toolkit")
    assert finding.verdict == "failed"
    assert "lacks cublas_v2.h" in finding.summary


def test_a_damaged_wheel_of_the_toolkit_fails(env: TinyEnv, tmp_path: Path) -> None:
    packaged(env, tmp_path, toolkit_members())
    wheel = next((env.root.bundle("tiny") / "files").glob("nvidia_cuda_crt*"))
    wheel.unlink()
    wheel.write_bytes(b"PK")
    finding = env.check("toolchain.toolkit")
    assert finding.verdict == "failed"
    assert "damaged" in finding.summary


def test_python_headers_are_found(env: TinyEnv) -> None:
    assert env.check("toolchain.headers").verdict == "ok"


@pytest.mark.parametrize(("recipe", "verdict"), [(None, "warning"), (cuda_recipe("ext"), "failed")])
def test_a_python_without_headers_is_named(
    make_env: MakeEnv, tmp_path: Path, recipe: None, verdict: str
) -> None:
    env = make_env(recipe=recipe)
    # The same interpreter, in a place where it has its library and no headers.
    base = Path(sys.base_prefix)
    minor = inspect_interpreter(Path(sys.executable)).minor
    (tmp_path / "python" / "bin").mkdir(parents=True)
    (tmp_path / "python" / "lib").mkdir()
    python = tmp_path / "python" / "bin" / f"python{minor}"
    shutil.copy(Path(sys.executable).resolve(), python)
    for entry in (base / "lib").iterdir():
        (tmp_path / "python" / "lib" / entry.name).symlink_to(entry)
    link = env.folder / "bin" / "python"
    link.unlink()
    link.symlink_to(python)
    (env.folder / "pyvenv.cfg").write_text(f"home = {python.parent}\n", encoding="utf-8")
    finding = env.check("toolchain.headers")
    assert finding.verdict == verdict
    assert f"looked for {tmp_path / 'python'}" in finding.evidence[0]


def test_ninja_of_the_bundle_passes(env: TinyEnv, tmp_path: Path, programs: Programs) -> None:
    packaged(env, tmp_path, toolkit_members())
    programs()
    finding = env.check("toolchain.ninja")
    assert finding.verdict == "ok"
    assert "bundle" in finding.summary


@pytest.mark.parametrize(
    ("there", "verdict"),
    [
        ({}, "warning"),
        ({"ninja": "echo 'cannot execute' >&2; exit 126"}, "warning"),
        ({"ninja": "echo 1.11"}, "ok"),
    ],
)
def test_a_machine_without_a_ninja_that_runs_is_named(
    make_env: MakeEnv, programs: Programs, there: dict[str, str], verdict: str
) -> None:
    env = make_env(recipe=cuda_recipe("ext"))
    programs(**there)
    assert env.check("toolchain.ninja").verdict == verdict


def test_a_recipe_that_compiles_nothing_needs_no_ninja(env: TinyEnv) -> None:
    assert env.check("toolchain.ninja").verdict == "skipped"


@pytest.mark.parametrize(
    ("loaded", "verdict", "words"),
    [
        ("gcc/12.2.0:python/3.11.7", "ok", ""),
        ("gcc/12.2.0", "warning", "python is not loaded here"),
        ("gcc/13.1:python/3.11.7", "warning", "gcc/12.2.0 is not loaded here (gcc/13.1 instead)"),
        ("", "warning", "gcc/12.2.0, python is not loaded here"),
    ],
)
def test_modules_of_the_site_that_are_not_loaded_are_named(
    root: Root, monkeypatch: pytest.MonkeyPatch, loaded: str, verdict: str, words: str
) -> None:
    job = {"partition": "gpu", "walltime": "01:00:00", "cpus": 1, "memory": "1G"}
    table = {"name": "here", "build": job, "train": job, "modules": ["gcc/12.2.0", "python"]}
    monkeypatch.setenv("LOADEDMODULES", loaded)
    finding = run_one("toolchain.modules", root=root, site=Site.model_validate(table))
    assert finding.verdict == verdict
    assert words in finding.summary
    assert (
        run_one("toolchain.modules", root=root, site=Site.model_validate(table | {"modules": []})).verdict
        == "skipped"
    )


def test_a_small_extension_is_compiled_and_imported(root: Root) -> None:
    finding = run_one("toolchain.extension", root=root)
    assert finding.verdict == "ok", finding.evidence
    assert [line.partition(" ")[0] for line in finding.evidence] == [
        "without",
        "compiling",
        "linking:",
        "importing",
    ]
    assert not list(root.cache.iterdir())


@pytest.mark.parametrize(
    ("flaw", "where"),
    [
        ('exec {real} -include /nonexistent.h "$@"', "compiling"),
        ('case "$*" in *-shared*) exec {real} "$@" -lnowhere;; *) exec {real} "$@";; esac', "linking"),
        # Under another name its entry is not found.
        ('exec {real} -DPyInit_extension=other "$@"', "importing"),
    ],
)
def test_an_extension_that_fails_says_where(
    root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flaw: str, where: str
) -> None:
    real = shutil.which("c++")
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\n{flaw.format(real=real)}\n", encoding="utf-8")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    finding = run_one("toolchain.extension", root=root)
    assert finding.verdict == "failed"
    assert f"fails at {where} it" in finding.summary


def test_a_recipe_whose_bundle_is_not_fetched_has_no_nvcc_to_try(make_env: MakeEnv) -> None:
    assert make_env(recipe=cuda_recipe("ext")).check("toolchain.extension").verdict == "skipped"


def test_an_nvcc_that_does_not_run_fails_the_extension(env: TinyEnv, tmp_path: Path) -> None:
    members = toolkit_members() | {"bin/nvcc": "#!/bin/sh\nexit 1\n"}
    finding = packaged(env, tmp_path, members).check("toolchain.extension")
    assert finding.verdict == "failed"
    assert "does not run as an nvcc" in finding.summary


@pytest.mark.needs_env
def test_the_bundles_nvcc_compiles_an_extension_of_the_envs_torch(
    quickstart: Quickstart, root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("CXX", "CC", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    root.path.mkdir()
    for name in ("bundles", "envs"):
        (root.path / name).symlink_to(quickstart.root / name)
    recipe = load_recipe(REPOSITORY / "recipes" / "quickstart.toml")
    finding = run_one("toolchain.extension", root=root, recipe=recipe)
    assert finding.verdict == "ok", finding.evidence
    assert "torch 2.11.0" in finding.evidence[1]
    assert "for sm_" in finding.evidence[1]

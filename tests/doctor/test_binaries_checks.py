from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.architectures import capability_of, runs_on, wanted_code
from envbuilder.model import Extension
from envbuilder.site import Site
from tests.doctor.conftest import TinyEnv, cuda_recipe, nvidia_smi, run_one
from tests.doctor.fatbins import make_extension, make_library

CHECK = "binaries.architectures"
EXTENSION = Extension(module="ext", file="ext.so", sha256="0" * 64, architectures=("sm_90",))


@pytest.fixture
def compiled(make_env: Callable[..., TinyEnv], tmp_path: Path) -> Callable[..., TinyEnv]:
    """Makes an env whose extension module has code for these architectures."""

    def make(*architectures: str, recipe: str = "9.0", detect: bool = False, receipt: str = "9.0") -> TinyEnv:
        return make_env(
            recipe=cuda_recipe("ext", capability=recipe, detect=detect),
            files={"ext.so": make_extension(tmp_path / "ext.so", *architectures)},
            extensions=(EXTENSION,),
            compute_capabilities=(receipt,),
        )

    return make


@pytest.mark.parametrize("architectures", [("sm_90",), ("compute_90",), ("sm_80", "sm_90")])
def test_an_extension_with_code_for_the_recipes_gpus_passes(
    compiled: Callable[..., TinyEnv], architectures: tuple[str, ...]
) -> None:
    finding = compiled(*architectures).check(CHECK)
    assert finding.verdict == "ok"
    assert finding.evidence == (f"ext: {', '.join(sorted(architectures))}",)


@pytest.mark.parametrize("architectures", [("sm_80",), ()])
def test_an_extension_without_that_code_fails(
    compiled: Callable[..., TinyEnv], architectures: tuple[str, ...]
) -> None:
    finding = compiled(*architectures).check(CHECK)
    assert finding.verdict == "failed"
    assert "ext has no code for compute capability 9.0" in finding.evidence


def test_a_recipe_that_asks_for_more_than_was_compiled_fails(compiled: Callable[..., TinyEnv]) -> None:
    finding = compiled("sm_90", recipe="10.0").check(CHECK)
    assert finding.verdict == "failed"
    assert "10.0" in finding.evidence[0]


def test_where_the_recipe_goes_by_the_gpu_present_the_receipt_counts(
    compiled: Callable[..., TinyEnv],
) -> None:
    assert compiled("sm_80", recipe="9.0", detect=True, receipt="8.0").check(CHECK).verdict == "ok"


def test_an_extension_that_is_gone_fails(compiled: Callable[..., TinyEnv]) -> None:
    env = compiled("sm_90")
    (env.site_packages / "ext.so").unlink()
    assert env.check(CHECK).evidence == ("ext: ext.so is missing",)


def test_an_extension_that_is_no_binary_fails(compiled: Callable[..., TinyEnv]) -> None:
    env = compiled("sm_90")
    (env.site_packages / "ext.so").write_bytes(b"not ELF")
    assert env.check(CHECK).verdict == "failed"


def test_the_gpu_present_must_find_code_that_it_runs(
    compiled: Callable[..., TinyEnv], programs: Callable[..., Path]
) -> None:
    env = compiled("sm_90")
    programs(nvidia_smi=nvidia_smi("NVIDIA H200, 9.0"))
    assert env.check(CHECK).verdict == "ok"
    programs(nvidia_smi=nvidia_smi("NVIDIA A100, 8.0"))
    finding = env.check(CHECK)
    assert finding.verdict == "failed"
    assert "A100" in finding.evidence[0]


def test_an_env_without_compiled_extensions_is_skipped(env: TinyEnv) -> None:
    assert env.check(CHECK).verdict == "skipped"


@pytest.mark.parametrize(
    ("architecture", "capability", "runs"),
    [
        ("sm_80", "8.0", True),
        ("sm_80", "8.9", True),  # machine code: later minor versions
        ("sm_89", "8.0", False),
        ("sm_80", "9.0", False),
        ("compute_80", "9.0", True),  # PTX: every later GPU
        ("compute_80", "12.0", True),
        ("compute_90", "8.9", False),
        ("sm_90a", "9.0", True),
        ("compute_90a", "10.0", False),
        ("sm_100f", "10.3", True),
        ("compute_100f", "11.0", False),
        ("sm_120", "12.1", True),
    ],
)
def test_code_runs_where_nvidia_says_it_does(architecture: str, capability: str, runs: bool) -> None:
    assert runs_on(architecture, capability) is runs


def test_a_capability_is_met_by_its_machine_code_or_its_ptx() -> None:
    assert wanted_code("10.0a") == {"sm_100a", "compute_100a"}


def site(gpu_type: str | None) -> Site:
    """A site whose training jobs ask for this kind of GPU."""
    kind = {"gpu_request": "typed-gres", "gpu_type": gpu_type} if gpu_type else {"gpu_request": "gres"}
    job = {"partition": "gpu", "walltime": "01:00:00", "cpus": 1, "memory": "1G"}
    return Site.model_validate({"name": "centre", "build": job, "train": {**job, "gpus": 1, **_dashed(kind)}})


def _dashed(table: dict[str, str]) -> dict[str, str]:
    return {key.replace("_", "-"): value for key, value in table.items()}


@pytest.mark.parametrize(
    ("gpu_type", "verdict"),
    [("h100", "ok"), ("gh200", "ok"), ("a100", "failed"), ("nvidia_b200", "failed"), (None, "ok")],
)
def test_the_gpus_that_the_site_names_must_find_code_that_they_run(
    compiled: Callable[..., TinyEnv], gpu_type: str | None, verdict: str
) -> None:
    env = compiled("sm_90")
    finding = run_one(CHECK, root=env.root, recipe=env.recipe, lock=env.lock, site=site(gpu_type))
    assert finding.verdict == verdict
    if verdict == "failed":
        assert f"the {gpu_type} of site centre" in finding.evidence[0]


def test_a_kind_of_gpu_that_nobody_knows_is_said_not_to_be_compared(compiled: Callable[..., TinyEnv]) -> None:
    env = compiled("sm_90")
    finding = run_one(CHECK, root=env.root, recipe=env.recipe, lock=env.lock, site=site("fast"))
    assert finding.verdict == "ok"
    assert (
        finding.evidence[-1] == "not compared: the compute capability of fast, as site centre calls its GPUs"
    )


@pytest.mark.parametrize(
    ("gpu_type", "capability"),
    [("a100", "8.0"), ("H200", "9.0"), ("nvidia_h100_80gb_hbm3", "9.0"), ("l40s", "8.9"), ("rtx", None)],
)
def test_compute_capabilities_are_known_by_the_names_that_sites_use(
    gpu_type: str, capability: str | None
) -> None:
    assert capability_of(gpu_type) == capability


def test_a_torch_without_code_for_the_gpu_is_found(env: TinyEnv, programs: Callable[..., Path]) -> None:
    check = "binaries.torch-architectures"
    assert env.check(check).verdict == "skipped"
    library = env.site_packages / "torch/lib/libtorch_cuda.so"
    make_extension(library, "sm_75", "sm_90")
    assert "no site's" in env.check(check).summary
    programs(nvidia_smi=nvidia_smi("NVIDIA H200, 9.0"))
    assert env.check(check).verdict == "ok"
    programs(nvidia_smi=nvidia_smi("Tesla V100, 7.0"))
    finding = env.check(check)
    assert finding.verdict == "failed"
    assert "V100" in finding.evidence[0]


def test_a_torch_without_code_for_the_sites_gpu_is_found_on_a_node_without_gpus(env: TinyEnv) -> None:
    make_extension(env.site_packages / "torch/lib/libtorch_cuda.so", "sm_75", "sm_90")
    for gpu_type, verdict in {"h200": "ok", "v100": "failed", "fast": "skipped"}.items():
        where = site(gpu_type)
        finding = run_one(
            "binaries.torch-architectures", root=env.root, recipe=env.recipe, lock=env.lock, site=where
        )
        assert finding.verdict == verdict


# In C, by their C++ names: compiling <string> takes seconds.
TORCH = "void _ZN3c1011other_torchEi(int x) {}"
CALL = "void _ZN3c1011other_torchE%s(void); void call(void) { _ZN3c1011other_torchE%s(); }"
CALLING, MISSING = CALL % ("i", "i"), CALL % ("l", "l")
STRINGS = """
    #include <string>
    namespace c10 { void fail(const std::string& why)%s }
"""


@pytest.fixture
def linked(make_env: Callable[..., TinyEnv]) -> Callable[..., TinyEnv]:
    """Makes an env with a torch and an extension module `ext`, compiled from C with these options."""

    def make(source: str = CALLING, *options: str | Path) -> TinyEnv:
        env = make_env(recipe=cuda_recipe("ext"), extensions=(EXTENSION,))
        libc10 = make_library(env.site_packages / "torch/lib/libc10.so", TORCH)
        make_library(env.site_packages / "ext.so", source, libc10, "-lstdc++", *options)
        return env

    return make


def test_an_extension_that_was_linked_with_the_installed_torch_passes(
    linked: Callable[..., TinyEnv],
) -> None:
    assert linked().check("binaries.symbols").verdict == "ok"


def test_an_extension_that_was_linked_with_another_torch_is_found(linked: Callable[..., TinyEnv]) -> None:
    finding = linked(MISSING).check("binaries.symbols")
    assert finding.verdict == "failed"
    assert "_ZN3c1011other_torchEl" in finding.evidence[0]
    assert "another torch's headers" in finding.evidence[1]
    assert finding.remedy is not None
    assert "--rebuild" in finding.remedy


def test_an_extension_whose_library_is_nowhere_is_found(
    linked: Callable[..., TinyEnv], tmp_path: Path
) -> None:
    gone = make_library(tmp_path / "libgone.so.7", "")
    env = linked(CALLING, gone)
    gone.unlink()
    finding = env.check("binaries.symbols")
    assert finding.evidence[0] == "ext needs libgone.so.7, which is nowhere"


@pytest.mark.parametrize(
    ("extension", "torch", "verdict"),
    [("1", "1", "ok"), ("0", "0", "ok"), ("0", "1", "failed"), ("1", "0", "failed")],
)
def test_an_extension_must_have_torchs_cxx_abi(
    make_env: Callable[..., TinyEnv], extension: str, torch: str, verdict: str
) -> None:
    env = make_env(recipe=cuda_recipe("ext"), extensions=(EXTENSION,))
    sources = {
        "torch/lib/libc10.so": (STRINGS % " {}", torch),
        "ext.so": (STRINGS % '; } void call() { c10::fail("x");', extension),
    }
    for name, (source, abi) in sources.items():
        path = env.site_packages / name
        make_library(path, source, f"-D_GLIBCXX_USE_CXX11_ABI={abi}", compiler="g++")
    finding = env.check("binaries.cxx-abi")
    assert finding.verdict == verdict
    assert finding.evidence[0].endswith(f"libc10.so: _GLIBCXX_USE_CXX11_ABI={torch}")
    if verdict == "failed":
        assert finding.evidence[1] == f"ext: _GLIBCXX_USE_CXX11_ABI={extension}"


def needing(folder: Path, library: str, version: str, path: Path) -> None:
    """A shared object at `path` that needs symbol `version` of `library`."""
    script = folder / "map"
    script.write_text(f"{version} {{ newest; }};", encoding="utf-8")
    source = "int newest(void) { return 0; }"
    newer = make_library(folder / library, source, f"-Wl,--version-script={script}", "-nostdlib")
    make_library(path, "int newest(void); int call(void) { return newest(); }", newer, "-nostdlib")


@pytest.mark.parametrize(
    ("library", "version", "remedy"),
    [
        ("libc.so.6", "GLIBC_2.99", "envbuilder lock recipes/tiny.toml --target"),
        ("libstdc++.so.6", "GLIBCXX_3.4.99", "--only libraries.libstdcxx"),
        ("libstdc++.so.6", "CXXABI_1.3.99", "--only libraries.libstdcxx"),
    ],
)
def test_a_library_of_the_env_that_needs_a_newer_machine_is_found(
    linked: Callable[..., TinyEnv], tmp_path: Path, library: str, version: str, remedy: str
) -> None:
    env = linked()
    assert env.check("binaries.versions").verdict == "ok"
    needing(tmp_path, library, version, env.site_packages / "package/_core.so")
    finding = env.check("binaries.versions")
    assert finding.verdict == "failed"
    path = env.site_packages / "package/_core.so"
    assert finding.evidence[-1] == f"{path} needs {version} of {library}"
    assert finding.remedy is not None
    assert remedy in finding.remedy


def test_an_extension_that_was_built_on_a_newer_machine_is_to_be_built_here(
    linked: Callable[..., TinyEnv], tmp_path: Path
) -> None:
    env = linked()
    needing(tmp_path, "libc.so.6", "GLIBC_2.99", env.site_packages / "ext.so")
    finding = env.check("binaries.versions")
    assert finding.verdict == "failed"
    assert finding.remedy is not None
    assert "--rebuild" in finding.remedy


def test_search_paths_beside_the_file_and_in_the_env_are_sound(linked: Callable[..., TinyEnv]) -> None:
    env = linked(CALLING, "-Wl,-rpath,$ORIGIN/torch/lib:/usr")
    assert env.check("binaries.search-paths").verdict == "ok"


@pytest.mark.parametrize("tags", ["--enable-new-dtags", "--disable-new-dtags"])
@pytest.mark.parametrize("path", ["lib", "$ORIGIN:", ".", "/OPEN", "/OPEN/not/there/yet"])
def test_a_search_path_where_others_can_put_libraries_is_a_failure(
    linked: Callable[..., TinyEnv], tmp_path: Path, tags: str, path: str
) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o777)
    env = linked(CALLING, f"-Wl,{tags},-rpath,{path.replace('/OPEN', str(folder))}")
    finding = env.check("binaries.search-paths")
    assert finding.verdict == "failed"
    assert finding.evidence[0].startswith(f"{env.site_packages / 'ext.so'}: ")


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("/build/source/lib", "was there during the build alone"),
        ("/opt/module-that-is-gone/lib", "can't be reached"),
        ("HOME/cuda/lib", "is in your home folder"),
    ],
)
def test_a_search_path_out_of_the_env_is_warned_of(
    linked: Callable[..., TinyEnv], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, why: str
) -> None:
    home = tmp_path / "home"
    (home / "cuda/lib").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    env = linked(CALLING, f"-Wl,-rpath,{path.replace('HOME', str(home))}")
    finding = env.check("binaries.search-paths")
    assert finding.verdict == "warning"
    assert why in finding.evidence[0]


def test_search_paths_of_packages_as_they_are_published_are_told_and_no_failure(
    linked: Callable[..., TinyEnv],
) -> None:
    env = linked()
    make_library(env.site_packages / "package/libthing.so", "", "-Wl,-rpath,$ORIGIN:")
    finding = env.check("binaries.search-paths")
    assert finding.verdict == "ok"
    assert "libthing.so: an empty entry is relative to the working folder" in finding.evidence[0]


@pytest.mark.parametrize("check", ["binaries.symbols", "binaries.cxx-abi", "binaries.torch-architectures"])
def test_without_compiled_extensions_there_is_nothing_to_look_at(env: TinyEnv, check: str) -> None:
    assert env.check(check).verdict == "skipped"


@pytest.mark.parametrize("check", ["binaries.symbols", "binaries.cxx-abi"])
def test_an_extension_that_can_not_be_read_is_a_failure(linked: Callable[..., TinyEnv], check: str) -> None:
    env = linked()
    (env.site_packages / "ext.so").write_bytes(b"not ELF")
    assert env.check(check).verdict == "failed"

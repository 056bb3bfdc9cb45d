from __future__ import annotations

import functools
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.sandbox import find_sandbox
from tests.doctor.apart import find_apart
from tests.doctor.conftest import TinyEnv, run_one

HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"


def recipe(**target: str) -> Recipe:
    return Recipe.model_validate({"name": "tiny", "requirements": ["tiny"], "target": target})


@pytest.mark.parametrize("check", ["platform.interpreter", "platform.glibc", "platform.machine"])
def test_the_machine_that_a_recipe_is_for_passes(root: Root, check: str) -> None:
    fitting = recipe(python=f"=={HERE}.*", machine=platform.machine(), glibc="2.17")
    assert run_one(check, root=root, recipe=fitting).verdict == "ok"


def test_an_interpreter_that_the_recipe_does_not_serve_fails(root: Root) -> None:
    other = "3.11" if HERE != "3.11" else "3.13"
    finding = run_one("platform.interpreter", root=root, recipe=recipe(python=f"=={other}.*"))
    assert finding.verdict == "failed"
    assert f"({other})" in finding.summary


def test_an_env_whose_interpreter_was_replaced_is_a_warning(env: TinyEnv) -> None:
    assert env.check("platform.interpreter").verdict == "ok"
    env.change_receipt(python=f"{HERE}.99")
    finding = env.check("platform.interpreter")
    assert finding.verdict == "warning"
    assert f"{HERE}.99" in finding.summary


def test_an_env_whose_interpreter_is_gone_fails(env: TinyEnv) -> None:
    python = env.folder / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    finding = env.check("platform.interpreter")
    assert finding.verdict == "failed"
    assert "/envs/tiny/bin/python" in finding.summary


def test_an_older_glibc_than_the_recipes_fails(root: Root) -> None:
    finding = run_one("platform.glibc", root=root, recipe=recipe(glibc="2.999"))
    assert finding.verdict == "failed"
    assert "2.999" in finding.summary


def test_another_processor_than_the_recipes_fails(root: Root) -> None:
    other = "aarch64" if platform.machine() != "aarch64" else "x86_64"
    finding = run_one("platform.machine", root=root, recipe=recipe(machine=other))
    assert finding.verdict == "failed"
    assert other in finding.summary


@pytest.fixture
def no_mounts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that gives no namespace for mounts; what it gives otherwise, unshare says."""
    weaker = functools.partial(find_sandbox, strongest="network-namespace")
    monkeypatch.setattr("envbuilder.doctor.checks.platform.find_sandbox", weaker)


@pytest.mark.usefixtures("no_mounts")
def test_refused_namespaces_are_a_warning(root: Root, programs: Callable[..., Path]) -> None:
    programs(unshare='echo "unshare: unshare failed: Operation not permitted" >&2; exit 1')
    finding = run_one("platform.namespaces", root=root)
    assert finding.verdict == "warning"
    assert finding.remedy is not None
    assert "--require-isolation" in finding.remedy


@pytest.mark.usefixtures("no_mounts")
def test_a_machine_without_unshare_is_a_warning(root: Root, programs: Callable[..., Path]) -> None:
    programs()
    assert run_one("platform.namespaces", root=root).verdict == "warning"


@pytest.mark.usefixtures("no_mounts")
def test_namespaces_that_can_be_made_pass(root: Root, programs: Callable[..., Path]) -> None:
    programs(unshare="exit 0")
    finding = run_one("platform.namespaces", root=root)
    assert finding.verdict == "ok"
    assert "read what you can read" in finding.summary


def test_the_sandbox_that_compile_finds_is_the_one_told(root: Root) -> None:
    finding = run_one("platform.namespaces", root=root)
    told = {"sealed": "sealed here", "network-namespace": "without network", "none": "not kept from"}
    assert told[find_sandbox().isolation] in finding.summary


BASE = "fpu sse sse2 lm"
V2 = f"{BASE} pni ssse3 cx16 sse4_1 sse4_2 popcnt lahf_lm"
V3 = f"{V2} fma movbe xsave avx f16c abm bmi1 avx2 bmi2"


@pytest.fixture
def cpuinfo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes this the file that the kernel tells the processor by."""

    def write(text: str) -> None:
        path = tmp_path / "cpuinfo"
        path.write_text(text, encoding="utf-8")
        monkeypatch.setattr("envbuilder.doctor.checks.platform.CPUINFO", path)

    return write


@pytest.mark.parametrize(
    ("flags", "verdict", "lacking"),
    [
        (BASE, "failed", "x86-64-v2: lacks cx16, lahf_lm, pni, popcnt, sse4_1, sse4_2, ssse3"),
        (V2, "warning", "x86-64-v3: lacks abm, avx, avx2, bmi1, bmi2, f16c, fma, movbe, xsave"),
        (V3.replace("avx2", "avx512f"), "warning", "x86-64-v3: lacks avx2"),
        (V3, "ok", "x86-64-v3: has all of it"),
    ],
)
def test_a_processor_is_as_good_as_the_instructions_that_it_has(
    root: Root, cpuinfo: Callable[[str], None], flags: str, verdict: str, lacking: str
) -> None:
    cpuinfo(f"processor\t: 0\nmodel name\t: A Processor\nflags\t\t: {flags}\nbugs\t\t: none\n")
    finding = run_one("platform.cpu", root=root)
    assert finding.verdict == verdict
    assert finding.evidence[0] == "A Processor"
    assert lacking in finding.evidence


def test_another_kind_of_processor_has_no_levels(root: Root, cpuinfo: Callable[[str], None]) -> None:
    cpuinfo("processor\t: 0\nFeatures\t: fp asimd evtstrm aes\n")
    assert run_one("platform.cpu", root=root).verdict == "skipped"


# PER_LINUX with UNAME26 (personality(2)): the kernel calls itself 2.6.
OLD_KERNEL = "ctypes.CDLL(None).personality(0x0020000)"
TWO_GPUS = (
    'case "$1" in --query*) '
    'for i in 0 1; do echo "$i, NVIDIA H200, 9.0, 580.65.06, 143771, Default"; done;; '
    '*) echo "| NVIDIA-SMI 580.65.06   Driver Version: 580.65.06   CUDA Version: 13.0 |";; esac'
)


def test_an_old_kernel_is_a_warning_where_several_gpus_train_together(
    root: Root, programs: Callable[..., Path]
) -> None:
    programs(nvidia_smi=TWO_GPUS)
    finding = find_apart(root, OLD_KERNEL, "platform.kernel")["platform.kernel"]
    assert finding.verdict == "warning"
    assert finding.evidence[0].startswith("Linux 2.6.")


@pytest.mark.parametrize(
    ("release", "told"),
    [("4.18.0-553.el8_10.x86_64", "older than 5.5"), ("6.12-rc1+", "as new as trainers want it")],
)
def test_a_kernel_passes_that_is_new_or_where_one_gpu_at_most_trains(
    root: Root, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, release: str, told: str
) -> None:
    programs()
    here = os.uname()
    named = os.uname_result((here.sysname, here.nodename, release, here.version, here.machine))
    monkeypatch.setattr(os, "uname", lambda: named)
    finding = run_one("platform.kernel", root=root)
    assert (finding.verdict, finding.evidence) == ("ok", (f"Linux {release}",))
    assert told in finding.summary

"""Limits are set for real, in a process of their own that then runs the check."""

from __future__ import annotations

import os
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from tests.conftest import REPOSITORY
from tests.doctor.apart import find_apart, limits_told_by
from tests.doctor.conftest import cuda_recipe, nvidia_smi, run_one

GIB = 1 << 30
CEILINGS = ("platform.address-space", "platform.file-size", "platform.cpu-seconds")
# Root may pass some limits: these rights are taken for others that no process has.
NO_RIGHT = """
import envbuilder.doctor.checks.limits as limits
limits._LOCKS_ANY_AMOUNT = limits._STARTS_ANY_NUMBER = 63
"""
TIGHT = f"""{NO_RIGHT}
resource.setrlimit(resource.RLIMIT_AS, ({8 * GIB}, {8 * GIB}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({GIB}, {GIB}))
resource.setrlimit(resource.RLIMIT_CPU, (600, 600))
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
resource.setrlimit(resource.RLIMIT_NPROC, (64, 64))
"""
LOOSER = f"""
resource.setrlimit(resource.RLIMIT_AS, ({200 * GIB}, {200 * GIB}))
resource.setrlimit(resource.RLIMIT_FSIZE, ({64 * GIB}, {64 * GIB}))
resource.setrlimit(resource.RLIMIT_CPU, (36000, 36000))
"""


def test_limits_too_tight_to_work_with_fail(root: Root) -> None:
    found = find_apart(root, TIGHT, *CEILINGS, "platform.open-files", "platform.processes")
    assert {check: finding.verdict for check, finding in found.items()} == {
        "platform.address-space": "failed",
        "platform.file-size": "failed",
        "platform.cpu-seconds": "failed",
        "platform.open-files": "failed",
        "platform.processes": "failed",
    }
    assert found["platform.address-space"].evidence == (f"ulimit -Sv: {8 << 20}; ulimit -Hv: {8 << 20}",)
    assert found["platform.cpu-seconds"].evidence == ("ulimit -St: 600; ulimit -Ht: 600",)
    assert "administrators" in str(found["platform.open-files"].remedy)
    assert "more may" in found["platform.processes"].evidence[1]


def test_limits_that_leave_some_room_are_a_warning(root: Root) -> None:
    found = find_apart(root, LOOSER, *CEILINGS)
    assert {finding.verdict for finding in found.values()} == {"warning"}


@pytest.mark.parametrize(("job", "verdict"), [("", "ok"), ("os.environ['SLURM_JOB_ID'] = '1'", "failed")])
def test_a_login_nodes_limits_are_not_those_of_the_sites_jobs(root: Root, job: str, verdict: str) -> None:
    site = f"""
from dataclasses import replace
from envbuilder.site import load_site
os.environ.pop("SLURM_JOB_ID", None)
{job}
subject = replace(subject, site=load_site({str(REPOSITORY / "recipes/sites/generic.toml")!r}))
"""
    found = find_apart(root, TIGHT + site, *CEILINGS)
    assert found["platform.address-space"].verdict == found["platform.cpu-seconds"].verdict == verdict
    assert ("don't inherit it" in found["platform.address-space"].summary) == (verdict == "ok")
    # Downloads are of the login node itself.
    assert found["platform.file-size"].verdict == "failed"


def test_what_loads_torch_is_left_out_where_its_libraries_can_not_be_mapped(root: Root) -> None:
    root.env("tiny").mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (8 * GIB, hard))
    try:
        found = run_one("env.imports", root=root, recipe=Recipe(name="tiny", requirements=("tiny",)))
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert found.verdict == "skipped"
    assert "ulimit -v" in found.summary


@pytest.fixture
def unlimited(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


@pytest.mark.usefixtures("unlimited")
@pytest.mark.parametrize("check", [*CEILINGS, "platform.open-files", "platform.processes"])
def test_no_limit_passes(root: Root, check: str) -> None:
    assert run_one(check, root=root).verdict == "ok"


def test_the_soft_limit_is_raised_by_the_command_that_the_remedy_names(root: Root) -> None:
    lowered = (
        "resource.setrlimit(resource.RLIMIT_NOFILE, (256, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))"
    )
    finding = find_apart(root, lowered, "platform.open-files")["platform.open-files"]
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    assert ("ulimit -Sn 4096" in str(finding.remedy)) == (hard >= 4096 or hard == resource.RLIM_INFINITY)


THE_USUAL = "resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))"


def test_the_usual_limit_of_open_files_is_a_warning_where_there_is_a_gpu(
    root: Root, programs: Callable[..., Path]
) -> None:
    programs(nvidia_smi=nvidia_smi())
    finding = find_apart(root, THE_USUAL, "platform.open-files")["platform.open-files"]
    assert finding.verdict == "warning"
    assert "1024 files" in finding.summary


def test_the_usual_limit_of_open_files_passes_without_a_gpu(
    root: Root, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs()
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1 << 19))
    assert run_one("platform.open-files", root=root).verdict == "ok"


FEW_LOCKED = "resource.setrlimit(resource.RLIMIT_MEMLOCK, (65536, 65536))"
RDMA = "limits.RDMA_DEVICES = Path(sys.argv[1])\n"


def test_little_lockable_memory_is_a_warning_where_there_is_rdma(
    root: Root, programs: Callable[..., Path]
) -> None:
    programs(nvidia_smi=nvidia_smi())
    (root.path / "mlx5_0").mkdir(parents=True)
    found = find_apart(root, NO_RIGHT + RDMA + FEW_LOCKED, "platform.locked-memory")["platform.locked-memory"]
    assert found.verdict == "warning"
    assert found.evidence == ("ulimit -Sl: 64; ulimit -Hl: 64", "RDMA adapters: mlx5_0")


def test_little_lockable_memory_passes_without_rdma(
    root: Root, programs: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(nvidia_smi=nvidia_smi())
    monkeypatch.setattr("envbuilder.doctor.checks.limits.RDMA_DEVICES", root.path)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (65536, 65536))
    assert run_one("platform.locked-memory", root=root).verdict == "ok"


def test_lockable_memory_matters_only_where_there_is_a_gpu(root: Root, programs: Callable[..., Path]) -> None:
    programs()
    assert run_one("platform.locked-memory", root=root).verdict == "skipped"


@pytest.fixture
def control_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Puts this process into a control group with these limits, as its files would tell."""

    def limit(**files: str) -> None:
        told = limits_told_by(tmp_path / "system", **files)
        monkeypatch.setattr("envbuilder.doctor.checks.limits.control_group_limits", told)

    return limit


def test_a_memory_limit_too_small_for_a_compiler_is_a_warning(
    root: Root, control_group: Callable[..., None]
) -> None:
    control_group(memory_max=str(4 * GIB))
    finding = run_one("platform.memory", root=root, recipe=cuda_recipe("tiny._C"))
    assert finding.verdict == "warning"
    assert "4.0 GiB" in finding.evidence[0]
    assert "recipes/tiny.toml --sbatch --site NAME" in str(finding.remedy)


def test_a_memory_limit_too_small_for_torch_fails(root: Root, control_group: Callable[..., None]) -> None:
    control_group(memory_max=str(GIB))
    assert run_one("platform.memory", root=root).verdict == "failed"


def test_memory_without_a_limit_passes(root: Root, control_group: Callable[..., None]) -> None:
    control_group(memory_max="max")
    finding = run_one("platform.memory", root=root, recipe=Recipe(name="tiny", requirements=("tiny",)))
    assert finding.verdict == "ok"
    assert "all of it" in finding.evidence[0]


def test_one_cpu_of_several_is_a_warning(root: Root) -> None:
    one = "os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\nos.cpu_count = lambda: 64"
    finding: Finding = find_apart(root, one, "platform.cpus")["platform.cpus"]
    assert finding.verdict == "warning"
    assert "1 of 64 CPUs may be used" in finding.evidence


def test_less_time_than_the_cpus_that_are_seen_is_a_warning(
    root: Root, control_group: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    control_group(cpu_max="400000 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    finding = run_one("platform.cpus", root=root)
    assert finding.verdict == "warning"
    assert "taskset --cpu-list 0,1,2,3 " in str(finding.remedy)


def test_the_time_of_all_cpus_passes(
    root: Root, control_group: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    control_group(cpu_max="max 100000")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert run_one("platform.cpus", root=root).verdict == "ok"


@pytest.fixture
def locale(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Sets these variables, and none else that has to do with locales."""

    def put(**variables: str) -> None:
        for name in (*(name for name in os.environ if name.startswith("LC_")), "LANG", "PYTHONUTF8"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return put


def test_a_python_that_takes_text_for_ascii_fails(root: Root, locale: Callable[..., None]) -> None:
    locale(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    finding = run_one("platform.locale", root=root)
    assert finding.verdict == "failed"
    assert finding.evidence[0] == "LC_ALL=C"


def test_a_locale_that_is_not_installed_is_a_warning(root: Root, locale: Callable[..., None]) -> None:
    locale(LANG="xx_YY.UTF-8")
    assert run_one("platform.locale", root=root).verdict == "warning"


@pytest.mark.parametrize("variables", [{}, {"LANG": "C"}, {"LC_ALL": "C.UTF-8"}])
def test_a_locale_in_which_python_reads_utf8_passes(
    root: Root, locale: Callable[..., None], variables: dict[str, str]
) -> None:
    locale(**variables)
    assert run_one("platform.locale", root=root).verdict == "ok"

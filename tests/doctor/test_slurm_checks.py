"""What of the Slurm checks needs no cluster; the rest is in tests/lab/test_doctor_slurm.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.doctor.checks import slurm
from envbuilder.paths import Root
from envbuilder.site import JobSpec, Site
from tests.doctor.conftest import run_one

Programs = Callable[..., Path]

OF_THE_SITE = ("partition", "account", "qos", "nodes", "submission", "queue")
COMMANDS = {"sbatch": "exit 1", "squeue": "exit 1", "scontrol": "exit 1"}


def make_site(**build: object) -> Site:
    job = {"partition": "gpu", "walltime": "01:00:00", "cpus": 8, "memory": "64G"}
    return Site.model_validate(
        {"name": "here", "build": {**job, **build}, "train": job}, by_alias=True, by_name=False
    )


@pytest.mark.parametrize("check", ["controller", *OF_THE_SITE])
def test_a_machine_without_slurm_is_not_looked_at(root: Root, programs: Programs, check: str) -> None:
    programs()
    finding = run_one(f"slurm.{check}", root=root, site=make_site())
    assert finding.verdict == "skipped"
    assert "Slurm's commands" in finding.summary


@pytest.mark.parametrize("check", OF_THE_SITE)
def test_without_a_site_there_is_nothing_to_compare(root: Root, programs: Programs, check: str) -> None:
    programs(**COMMANDS)
    assert run_one(f"slurm.{check}", root=root).verdict == "skipped"


@pytest.mark.parametrize("check", [name for name in OF_THE_SITE if name != "submission"])
def test_a_slurm_that_does_not_answer_leaves_the_rest_open(
    root: Root, programs: Programs, check: str
) -> None:
    programs(**COMMANDS, sacctmgr="exit 1", sinfo="echo 'Unable to contact slurm controller'; exit 1")
    finding = run_one(f"slurm.{check}", root=root, site=make_site(qos="debug"))
    assert finding.verdict == "skipped"
    assert "gave no answer" in finding.summary


def test_a_machine_of_no_cluster_fails_only_where_a_site_was_given(root: Root, programs: Programs) -> None:
    fatal = "scontrol: fatal: Could not establish a configuration source"
    programs(**{**COMMANDS, "scontrol": f"echo '{fatal}' >&2; exit 1"})
    assert run_one("slurm.controller", root=root).verdict == "skipped"
    assert run_one("slurm.controller", root=root, site=make_site()).verdict == "failed"


def test_a_command_that_is_missing_leaves_its_check_open(root: Root, programs: Programs) -> None:
    programs(**COMMANDS)
    finding = run_one("slurm.nodes", root=root, site=make_site())
    assert finding.verdict == "skipped"
    assert "sinfo" in finding.summary


@pytest.mark.parametrize(("enforce", "verdict"), [("none", "skipped"), ("associations,limits", "failed")])
def test_a_user_without_an_account_fails_only_where_one_is_needed(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch, enforce: str, verdict: str
) -> None:
    monkeypatch.delenv("SBATCH_ACCOUNT", raising=False)
    answers = {"scontrol": f"echo 'AccountingStorageEnforce = {enforce}'", "sacctmgr": "true"}
    programs(**{**COMMANDS, **answers})
    assert run_one("slurm.account", root=root, site=make_site()).verdict == verdict


def test_the_account_of_the_shell_counts_where_the_site_names_none(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs(**COMMANDS, sacctmgr="echo 'project||normal|project'")
    monkeypatch.setenv("SBATCH_ACCOUNT", "others")
    assert "may not use the account others" in run_one("slurm.account", root=root, site=make_site()).summary
    monkeypatch.delenv("SBATCH_ACCOUNT")
    assert run_one("slurm.account", root=root, site=make_site()).verdict == "ok"


@pytest.mark.parametrize(
    ("limits", "too_much"),
    [
        ({"gres/gpu": "2"}, ["gres/gpu=2, not 4"]),
        ({"gres/gpu:a100": "2", "gres/gpu:h100": "1"}, ["gres/gpu:a100=2, not 4"]),
        ({"cpu": "4", "mem": "32G"}, ["cpu=4, not 8", "mem=32G, not 64G"]),
        ({"cpu": "8", "mem": "65536M", "gres/gpu": "4", "node": "1"}, []),
    ],
)
def test_limits_are_compared_in_their_units(limits: dict[str, str], too_much: list[str]) -> None:
    site = make_site(gpus=4, **{"gpu-request": "typed-gres", "gpu-type": "a100"})
    assert list(slurm._too_much(site.build, limits)) == too_much


def test_gpus_are_asked_for_as_the_site_says() -> None:
    def words(spec: JobSpec) -> list[str]:
        return [f"--{name}={value}" for name, value in spec.sbatch_options.items()]

    typed = make_site(gpus=4, **{"gpu-request": "typed-gres", "gpu-type": "a100"}).build
    assert "--gres=gpu:a100:4" in words(typed)
    assert "--gpus-per-node=2" in words(make_site(gpus=2, **{"gpu-request": "gpus-per-node"}).build)
    assert not [word for word in words(make_site().build) if "gpu:" in word or "gpus" in word]


@pytest.mark.parametrize("check", ["partition", "nodes"])
def test_where_the_cluster_chooses_the_partition_none_is_looked_at(
    root: Root, programs: Programs, check: str
) -> None:
    programs(**COMMANDS, sinfo="exit 1")
    job = {"walltime": "01:00:00", "cpus": 8}
    site = Site.model_validate({"name": "here", "build": job, "train": job})
    finding = run_one(f"slurm.{check}", root=root, site=site)
    assert finding.verdict == "skipped"
    assert "names no partition" in finding.summary


def test_memory_that_is_not_asked_for_is_compared_with_nothing() -> None:
    spec = JobSpec(walltime="01:00:00", cpus=8)
    assert list(slurm._too_much(spec, {"mem": "1G"})) == []
    assert slurm._wanted_words(spec) == "8 CPUs"

"""`envbuilder doctor --site` on a real Slurm: what is wrong with a site, an account, a QoS or the queue."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from envbuilder.doctor import explain_log
from tests.lab.slurm import ACCOUNT, DEBUG_QOS, PARTITION, USER, SlurmLab, missing_programs

pytestmark = pytest.mark.lab

REPOSITORY = Path(__file__).parent.parent.parent
PYTHON = Path("/usr/bin/python3")
SITE = """
name = "lab"
[build]
partition = "{partition}"
account = "{account}"
walltime = "{walltime}"
cpus = {cpus}
memory = "{memory}"
{more}
[train]
partition = "lab"
walltime = "00:05:00"
cpus = 2
memory = "2G"
gpus = 2
gpu-request = "gres"
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    assert not missing_programs(), f"make test-lab needs: {', '.join(missing_programs())}"
    with SlurmLab() as lab:
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
        # The suite's own interpreter may lie in a home folder that no other user can read.
        subprocess.run([*uv, "venv", "--python", PYTHON, lab.folder / "tool"], check=True)
        subprocess.run([*uv, "pip", "install", "--python", _python(lab), REPOSITORY], check=True)
        yield lab


@pytest.fixture(autouse=True)
def emptied(lab: SlurmLab) -> Iterator[None]:
    yield
    lab.cancel_all()


def _python(lab: SlurmLab) -> Path:
    return lab.folder / "tool" / "bin" / "python"


def findings(lab: SlurmLab, check: str = "slurm", **site: str) -> dict[str, dict[str, Any]]:
    """The findings of these checks for a site whose [build] has these values."""
    values = {"partition": PARTITION, "account": ACCOUNT, "walltime": "00:05:00", "cpus": "2", "memory": "2G"}
    (lab.home / "site.toml").write_text(SITE.format(**{"more": "", **values, **site}))
    command: list[str | Path] = [_python(lab), "-m", "envbuilder", "--json"]
    command += ["--root", lab.home / "root", "doctor"]
    ran = lab.as_user([*command, "--only", check, "--site", "./site.toml"])
    assert ran.returncode in (0, 8), ran.stdout + ran.stderr
    found = {finding["check"]: finding for finding in json.loads(ran.stdout)["findings"]}
    for finding in found.values():
        assert finding["remedy"] or finding["verdict"] in ("ok", "skipped"), finding
    return found


def finding(lab: SlurmLab, check: str, **site: str) -> dict[str, Any]:
    return findings(lab, check, **site)[check]


def as_operator(lab: SlurmLab, *words: str) -> None:
    subprocess.run([shutil.which(words[0]) or words[0], *words[1:]], env=lab.env, check=True)


@contextmanager
def held_job(lab: SlurmLab, *options: str) -> Iterator[str]:
    """A job that waits until it is released."""
    submitted = lab.as_user(["sbatch", "--parsable", "--hold", "--mem=100", *options, "--wrap=true"])
    assert submitted.returncode == 0, submitted.stderr
    yield submitted.stdout.strip()


def test_a_site_that_fits_the_cluster_is_right_in_all_points(lab: SlurmLab) -> None:
    found = findings(lab, more=f'qos = "{DEBUG_QOS}"\ngpus = 2\ngpu-request = "gres"')
    assert {check: one["verdict"] for check, one in found.items()} == {
        f"slurm.{name}": "ok"
        for name in ("controller", "partition", "account", "qos", "nodes", "submission", "queue")
    }, found
    assert found["slurm.controller"]["evidence"] == ["login"]
    assert (
        "[build]: debug: wall 00:30:00, jobs submitted by a user 1, a user gres/gpu=2,node=1"
        in (found["slurm.qos"]["evidence"])
    )


def test_a_site_without_a_qos_has_none_to_look_at(lab: SlurmLab) -> None:
    assert finding(lab, "slurm.qos")["verdict"] == "skipped"


def test_a_partition_that_is_not_there_fails(lab: SlurmLab) -> None:
    found = findings(lab, partition="nowhere")
    assert "there is no partition nowhere" in found["slurm.partition"]["summary"]
    refused = [name for name, one in found.items() if one["verdict"] == "failed"]
    assert refused == ["slurm.partition", "slurm.nodes", "slurm.submission"]
    assert "invalid partition" in found["slurm.submission"]["summary"].lower()


def test_a_walltime_beyond_the_partition_s_fails(lab: SlurmLab) -> None:
    found = finding(lab, "slurm.partition", partition="short", walltime="01:00:00")
    assert found["verdict"] == "failed"
    assert "01:00:00 is longer than the 00:05:00 of short" in found["summary"]


def test_sbatch_is_asked_in_the_site_s_own_words(lab: SlurmLab) -> None:
    as_operator(lab, "scontrol", "update", f"nodename={lab.nodes[0]}", "availablefeatures=gh200,big")
    words = 'exclusive = true\nextra-sbatch = ["--hint=nomultithread", "--contiguous"]'
    found = finding(lab, "slurm.submission", more=f'constraint = "gh200&big"\n{words}')
    absent = finding(lab, "slurm.submission", more='constraint = "gh200&small"')
    wrong = finding(lab, "slurm.submission", more='extra-sbatch = ["--no-such-option"]')
    assert found["verdict"] == "ok", found
    assert "Invalid feature specification" in absent["summary"]
    assert "unrecognized option" in "".join(wrong["evidence"])


def test_a_partition_that_is_down_fails(lab: SlurmLab) -> None:
    as_operator(lab, "scontrol", "update", "partitionname=short", "state=down")
    try:
        found = finding(lab, "slurm.partition", partition="short")
    finally:
        as_operator(lab, "scontrol", "update", "partitionname=short", "state=up")
    assert found["verdict"] == "failed"
    assert "short is DOWN" in found["summary"]


def test_a_partition_for_other_accounts_and_groups_fails(lab: SlurmLab) -> None:
    as_operator(lab, "scontrol", "update", "partitionname=short", "allowaccounts=others", "allowgroups=root")
    try:
        found = finding(lab, "slurm.partition", partition="short")
    finally:
        as_operator(lab, "scontrol", "update", "partitionname=short", "allowaccounts=all", "allowgroups=all")
    assert found["verdict"] == "failed"
    assert f"short doesn't admit {ACCOUNT}" in found["summary"]
    assert "for the groups root alone" in found["summary"]


def test_an_account_of_somebody_else_fails(lab: SlurmLab) -> None:
    found = findings(lab, account="others")
    assert found["slurm.account"]["verdict"] == "failed"
    assert f"{USER} may not use the account others" in found["slurm.account"]["summary"]
    assert f"accounts of {USER}: {ACCOUNT}" in found["slurm.account"]["evidence"]
    assert found["slurm.submission"]["verdict"] == "failed"
    assert "Invalid account" in found["slurm.submission"]["summary"]


def test_a_qos_that_allows_less_than_is_asked_for_fails(lab: SlurmLab) -> None:
    more = f'qos = "{DEBUG_QOS}"\ngpus = 4\ngpu-request = "gres"'
    found = findings(lab, walltime="01:00:00", more=more)
    assert found["slurm.qos"]["verdict"] == "failed"
    assert "debug allows 00:30:00, not 01:00:00" in found["slurm.qos"]["summary"]
    assert "debug allows gres/gpu=2, not 4" in found["slurm.qos"]["summary"]
    assert found["slurm.submission"]["verdict"] == "failed"


@pytest.mark.parametrize(
    ("qos", "words"), [("nothing", "there is no QoS nothing"), ("others", "may not use the QoS others")]
)
def test_a_qos_that_is_not_there_or_not_the_user_s_fails(lab: SlurmLab, qos: str, words: str) -> None:
    if qos == "others":
        as_operator(lab, "sacctmgr", "-iQ", "add", "qos", qos)
    found = finding(lab, "slurm.qos", more=f'qos = "{qos}"')
    assert found["verdict"] == "failed"
    assert words in found["summary"]


@pytest.mark.parametrize(
    "site",
    [
        {"more": 'gpus = 1\ngpu-request = "typed-gres"\ngpu-type = "a100"'},
        {"more": 'gpus = 8\ngpu-request = "gres"'},
        {"cpus": "500"},
        {"memory": "900G"},
    ],
)
def test_what_no_node_has_fails(lab: SlurmLab, site: dict[str, str]) -> None:
    found = findings(lab, **site)
    assert found["slurm.nodes"]["verdict"] == "failed"
    assert "8 CPUs, 64000 MiB, 4 GPUs: idle" in found["slurm.nodes"]["evidence"]
    assert found["slurm.submission"]["verdict"] == "failed"


def test_nodes_that_are_drained_are_named(lab: SlurmLab) -> None:
    lab.drain("node1")
    try:
        found = finding(lab, "slurm.nodes")
    finally:
        lab.resume("node1")
    assert found["verdict"] == "warning"
    assert "drained" in " ".join(found["evidence"])


def test_a_job_that_will_not_start_is_named(lab: SlurmLab) -> None:
    with held_job(lab) as job:
        found = finding(lab, "slurm.queue")
    assert found["verdict"] == "warning"
    assert f"{job} (JobHeldUser)" in found["summary"]
    assert found["remedy"] == f"scontrol release {job}"


def test_a_qos_that_is_full_is_said(lab: SlurmLab) -> None:
    with held_job(lab, f"--qos={DEBUG_QOS}"):
        found = finding(lab, "slurm.submission", more=f'qos = "{DEBUG_QOS}"')
    assert found["verdict"] == "warning"
    assert "takes no further job" in found["summary"]


def test_sbatch_s_own_words_of_a_full_qos_are_explained(lab: SlurmLab) -> None:
    words = ["sbatch", f"--qos={DEBUG_QOS}", "--mem=100", "--wrap=true"]
    with held_job(lab, f"--qos={DEBUG_QOS}"):
        refused = lab.as_user(words)
    assert refused.returncode != 0
    log = lab.folder / "refused.log"
    log.write_text(refused.stderr, encoding="utf-8")
    first = explain_log(str(log))[0]
    assert first.check == "log.qos-submit-limit", refused.stderr
    assert "--wait-for-qos" in (first.remedy or "")


def test_a_controller_that_is_down_fails_once_and_the_rest_is_skipped(lab: SlurmLab) -> None:
    lab.stop_controller()
    try:
        found = findings(lab)
    finally:
        lab.start_controller()
        for _ in range(100):
            if subprocess.run(["scontrol", "ping"], env=lab.env, capture_output=True).returncode == 0:
                break
    assert found["slurm.controller"]["verdict"] == "failed"
    assert "DOWN" in " ".join(found["slurm.controller"]["evidence"])
    assert found["slurm.partition"]["verdict"] == "skipped"
    assert found["slurm.queue"]["verdict"] == "skipped"

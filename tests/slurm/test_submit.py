"""Submission as seen through sbatch's words, as Slurm 22.05 wrote them; tests/lab has the real cluster."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError, SlurmError
from envbuilder.paths import Root
from envbuilder.slurm.site import Site, load_site
from envbuilder.slurm.submit import Submitted, submit, submit_compile, submit_probe

FAILED = "sbatch: error: Batch job submission failed: "
POLICY = f"{FAILED}Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"
SITE = """
name = "mine"
[build]
partition = "gpu"
account = "proj"
qos = "debug"
walltime = "02:00:00"
cpus = 8
memory = "64G"
gpus = 4
gpu-request = "gres"
[train]
partition = "gpu"
walltime = "02:00:00"
cpus = 8
memory = "64G"
"""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    (tmp_path / "mine.toml").write_text(SITE)
    return load_site(str(tmp_path / "mine.toml"))


class Sbatch:
    """An sbatch on the PATH that says what it is told to, and keeps its arguments and variables."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()

    def says(self, output: str, exit_code: int = 0) -> None:
        script = self.folder / "sbatch"
        script.write_text(
            f"#!/bin/sh\nprintf '%s\\n' \"$@\" > {self.folder}/arguments\nenv > {self.folder}/variables\n"
            f"printf '%s\\n' {shlex.quote(output)} >&2\nexit {exit_code}\n"
        )
        script.chmod(0o755)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    stand_in = Sbatch(tmp_path / "bin")
    monkeypatch.setenv("PATH", f"{stand_in.folder}:{os.environ['PATH']}")
    return stand_in


def submitted(site: Site, root: Path) -> Submitted:
    return submit(site, site.build, "compile-tiny", ("true",), root=Root(root))


@pytest.mark.parametrize(
    "output", ["4711", "4711;leonardo", "sbatch: lua: welcome, 12 jobs are waiting\n4711"]
)
def test_the_job_id_is_found_in_what_sbatch_says(
    site: Site, sbatch: Sbatch, tmp_path: Path, output: str
) -> None:
    sbatch.says(output)
    job = submitted(site, tmp_path / "root")
    assert job.id == "4711"
    assert job.log == tmp_path / "root/logs/slurm/compile-tiny-4711.log"
    assert job.log.parent.is_dir()
    assert (sbatch.folder / "arguments").read_text().split() == ["--parsable", str(job.script)]
    assert job.script.read_text().endswith("exec true\n")


def test_only_what_a_job_needs_of_the_submitter_s_variables_goes_along(
    site: Site, sbatch: Sbatch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_TOKEN", "PYTHONPATH", "SBATCH_QOS", "LD_LIBRARY_PATH"):
        monkeypatch.setenv(name, "mine")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm/slurm.conf")
    sbatch.says("1")
    submitted(site, tmp_path / "root")
    variables = dict(line.split("=", 1) for line in (sbatch.folder / "variables").read_text().splitlines())
    assert not set(variables) & {"HF_TOKEN", "PYTHONPATH", "SBATCH_QOS", "LD_LIBRARY_PATH"}
    assert variables["SLURM_CONF"] == "/etc/slurm/slurm.conf"
    assert variables["PATH"] == f"/usr/local/bin:/usr/bin:/bin:{sbatch.folder}"


@pytest.mark.parametrize(
    ("output", "exit_code", "message", "remedy"),
    [
        (
            f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}",
            1,
            "The QoS debug takes no further job of yours",
            "squeue --me --qos=debug",
        ),
        (f"sbatch: error: AssocMaxSubmitJobLimit\n{POLICY}", 1, "takes no further job", "squeue --me"),
        (
            f"sbatch: error: QOSMaxGRESPerUser\n{POLICY}",
            1,
            "4 GPUs are more than the QoS debug",
            "sacctmgr show qos",
        ),
        (
            f"sbatch: error: QOSMaxNodePerUserLimit\n{POLICY}",
            1,
            "more than the QoS debug",
            "sacctmgr show qos debug",
        ),
        (
            f"sbatch: error: QOSMaxWallDurationPerJobLimit\n{POLICY}",
            1,
            "The walltime 02:00:00 is longer than the QoS debug",
            "shorter walltime",
        ),
        (POLICY, 1, "A limit of the QoS debug", "sacctmgr show qos"),
        (
            f"{FAILED}Invalid qos specification",
            1,
            "The QoS debug does not exist",
            "sacctmgr show associations",
        ),
        (
            f"{FAILED}Invalid account or account/partition combination specified",
            1,
            "may not use the account proj in the partition gpu",
            "sacctmgr show associations",
        ),
        (
            f"sbatch: error: invalid partition specified: gpu\n{FAILED}Invalid partition name specified",
            1,
            "There is no partition gpu",
            "sinfo --summarize",
        ),
        (
            f"{FAILED}Requested time limit is invalid (missing or exceeds some limit)",
            1,
            "The walltime 02:00:00 is longer than the partition gpu allows",
            "scontrol show partition gpu",
        ),
        (
            "sbatch: error: Memory specification can not be satisfied\n"
            f"{FAILED}Requested node configuration is not available",
            1,
            "has 64G of memory",
            "less memory",
        ),
        (
            f"{FAILED}More processors requested than permitted",
            1,
            "has 8 CPUs",
            "fewer cpus",
        ),
        (
            f"{FAILED}Requested node configuration is not available",
            1,
            "8 CPUs, 64G and 4 GPUs",
            "sinfo --partition=gpu",
        ),
        (
            "sbatch: error: Invalid generic resource (gres) specification",
            1,
            "does not know the GPUs",
            "gpu-request",
        ),
        (
            f"{FAILED}Unable to contact slurm controller (connect failure)",
            1,
            "controller does not answer",
            "scontrol ping",
        ),
        (
            "sbatch: error: Invalid --time specification",
            255,
            "Invalid --time specification",
            "scontrol show partition",
        ),
        ("", 1, "sbatch gave no reason", "scontrol show partition"),
        ("no number here", 0, "no number here", "scontrol show partition"),
    ],
)
def test_a_rejection_becomes_a_sentence_and_a_remedy(
    site: Site, sbatch: Sbatch, tmp_path: Path, output: str, exit_code: int, message: str, remedy: str
) -> None:
    sbatch.says(output, exit_code)
    with pytest.raises(SlurmError) as caught:
        submitted(site, tmp_path / "root")
    assert message in caught.value.message
    assert remedy in caught.value.remedy
    assert caught.value.exit_code == 9
    assert "{" not in caught.value.message + caught.value.remedy


def test_a_machine_without_slurm_is_told(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MismatchError, match="no sbatch on this machine") as caught:
        submitted(site, tmp_path / "root")
    assert "without --sbatch" in caught.value.remedy


def test_a_root_that_slurm_can_t_write_a_log_under_is_refused(site: Site, tmp_path: Path) -> None:
    with pytest.raises(SlurmError, match="can't write a job's log") as caught:
        submitted(site, tmp_path / "100%")
    assert "--root" in caught.value.remedy


def test_compile_is_submitted_as_itself_with_local(sbatch: Sbatch, site: Site, tmp_path: Path) -> None:
    sbatch.says("1")
    root = Root(tmp_path / "root")
    job = submit_compile(tmp_path / "r.toml", "tiny", str(tmp_path / "mine.toml"), root, ["--rebuild"])
    expected = f"-m envbuilder --root {root.path} compile {tmp_path / 'r.toml'} --local --rebuild\n"
    assert job.script.read_text().endswith(expected)


def test_probe_is_submitted_as_itself_and_its_output_is_where_it_was_asked_for(
    sbatch: Sbatch, site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sbatch.says("1")
    monkeypatch.chdir(tmp_path)
    root = Root(tmp_path / "root")
    job = submit_probe("./mine.toml", Path("target.json"), root, ["--provided", "torch"])
    words = f"--root {root.path} probe --output {tmp_path / 'target.json'} --provided torch\n"
    assert job.script.read_text().endswith(words)
    assert "#SBATCH --job-name=envbuilder-probe\n" in job.script.read_text()
    assert "#SBATCH --gres=gpu:4\n" in job.script.read_text()

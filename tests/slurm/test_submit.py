"""Submission as seen through sbatch's words, as Slurm 22.05 wrote them; tests/lab has the real cluster."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError, SlurmError, UsageError
from envbuilder.paths import Root
from envbuilder.report import Quiet
from envbuilder.site import Site, load_site
from envbuilder.slurm.pace import Pace
from envbuilder.slurm.plan import Wishes, plan_compile
from envbuilder.slurm.preflight import wait_for_qos
from envbuilder.slurm.submit import Submitted, submit, submit_planned, submit_probe

AGAIN = "envbuilder compile r.toml --sbatch --site mine"
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
        self.program(
            "sbatch",
            f"printf '%s\\n' \"$@\" > {self.folder}/arguments\nenv > {self.folder}/variables\n"
            f"printf '%s\\n' {shlex.quote(output)} >&2\nexit {exit_code}",
        )

    def program(self, name: str, does: str) -> None:
        """Another of Slurm's programs: a line of shell."""
        script = self.folder / name
        script.write_text(f"#!/bin/sh\n{does}\n")
        script.chmod(0o755)


@pytest.fixture
def sbatch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sbatch:
    stand_in = Sbatch(tmp_path / "bin")
    stand_in.program("sacctmgr", "exit 1")  # No accounting, whatever this machine has.
    monkeypatch.setenv("PATH", f"{stand_in.folder}:{os.environ['PATH']}")
    return stand_in


class Heard(Quiet):
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def stage(self, text: str) -> None:
        self.said.append(text)

    def note(self, text: str) -> None:
        self.said.append(text)

    def warn(self, text: str) -> None:
        self.said.append(text)


def compile_job(folder: Path, wishes: Wishes, heard: Heard | None = None) -> Submitted:
    root, site = Root(folder / "root"), load_site(str(folder / "mine.toml"))
    plan = plan_compile(folder / "r.toml", "tiny", site, root, ["--rebuild"], wishes)
    return submit_planned(plan, root, heard or Heard(), AGAIN)


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
            "does not understand an option",
            "sbatch --version",
        ),
        (
            "sbatch: unrecognized option '--bogus'\nTry \"sbatch --help\" for more information",
            255,
            "does not understand an option",
            "sbatch --version",
        ),
        (
            "sbatch: error: QOSMaxWallDurationPerJobLimit\n"
            "allocation failure: Job violates accounting/QOS policy (job submit limit, user's size and/or "
            "time limits)",
            1,
            "The walltime 02:00:00 is longer than the QoS debug",
            "shorter walltime",
        ),
        (f"sbatch: error: AssocGrpCPUMinutesLimit\n{POLICY}", 1, "has used up", "manages the account"),
        (f"{FAILED}Job dependency problem", 1, "the job that this one is to follow", "without --after"),
        (f"{FAILED}Resource temporarily unavailable", 1, "as many jobs as it can", "some minutes"),
        ("allocation failure: Something new", 1, "Slurm refused the job: Something new.", "scontrol show"),
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


def test_where_the_site_names_no_partition_the_remedy_is_about_all_of_them(
    sbatch: Sbatch, site: Site, tmp_path: Path
) -> None:
    sbatch.says("sbatch: error: Memory specification can not be satisfied", 1)
    spec = site.build.model_copy(update={"partition": None})
    with pytest.raises(SlurmError) as caught:
        submit(site, spec, "x", ("true",), root=Root(tmp_path / "root"))
    assert "listed by: sinfo --format='%n %m'" in caught.value.remedy


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
    job = compile_job(tmp_path, Wishes())
    expected = f"-m envbuilder --root {root.path} compile {tmp_path / 'r.toml'} --local --rebuild\n"
    script = job.script.read_text()
    assert script.endswith(expected)
    assert "#SBATCH --signal=B:USR1@120\n" in script
    assert "#SBATCH --time=02:00:00\n" in script
    assert "--requeue" not in script
    assert "--dependency" not in script


def test_a_job_that_runs_itself_again_is_submitted_as_one(sbatch: Sbatch, site: Site, tmp_path: Path) -> None:
    sbatch.says("1")
    script = compile_job(tmp_path, Wishes(requeue=True, after="4711")).script.read_text()
    assert "#SBATCH --requeue\n" in script
    assert "#SBATCH --dependency=afterany:4711\n" in script
    assert script.endswith(" --local --rebuild --requeue-job\n")


@pytest.mark.parametrize("after", ["x", "", "1:2", "1\n#SBATCH --wckey=x", "-1"])
def test_what_is_no_job_s_number_is_refused(sbatch: Sbatch, site: Site, tmp_path: Path, after: str) -> None:
    with pytest.raises(UsageError, match="is no job's number"):
        compile_job(tmp_path, Wishes(after=after))


def test_an_estimate_shortens_the_job(sbatch: Sbatch, site: Site, tmp_path: Path) -> None:
    sbatch.says("1")
    heard = Heard()
    script = compile_job(tmp_path, Wishes(estimate_s=100), heard).script.read_text()
    assert "#SBATCH --time=00:06:00\n" in script
    assert "#SBATCH --signal=B:USR1@72\n" in script
    assert heard.said == []


@pytest.mark.parametrize(
    ("requeue", "words"), [(True, ["4 lives of this job"]), (False, ["4 jobs", f"{AGAIN} --requeue"])]
)
def test_work_that_does_not_fit_is_told_before_submitting(
    sbatch: Sbatch, site: Site, tmp_path: Path, requeue: bool, words: list[str]
) -> None:
    sbatch.says("1")
    heard = Heard()
    job = compile_job(tmp_path, Wishes(requeue=requeue, estimate_s=4 * 3600), heard)
    assert "#SBATCH --time=02:00:00\n" in job.script.read_text()
    assert len(heard.said) == len(words)
    for word, line in zip(words, heard.said, strict=True):
        assert word in line


def test_a_full_qos_is_told_before_submitting_with_what_is_in_it(
    sbatch: Sbatch, site: Site, tmp_path: Path
) -> None:
    sbatch.program("sacctmgr", "echo 'debug|00:30:00|1'")
    sbatch.program("squeue", "echo '4711|RUNNING|None|2026-01-01T00:00:00|1:00|29:00|gpu|debug|my|job'")
    sbatch.says("1")
    with pytest.raises(SlurmError, match="takes no further job of yours now") as caught:
        compile_job(tmp_path, Wishes())
    assert "4711 my|job (running, at most 29:00 left)" in caught.value.message
    assert f"{AGAIN} --wait-for-qos" in caught.value.remedy
    assert "scancel 4711" in caught.value.remedy
    assert not (sbatch.folder / "arguments").exists(), "sbatch was not asked"


def test_a_qos_is_waited_for(sbatch: Sbatch, site: Site, tmp_path: Path) -> None:
    sbatch.program("sacctmgr", "echo 'debug|00:30:00|1'")
    seen = sbatch.folder / "seen"
    sbatch.program(
        "squeue", f"[ -e {seen} ] || echo '4711|PENDING|None|N/A|0:00|30:00|gpu|debug|mine'; touch {seen}"
    )
    heard = Heard()
    wait_for_qos(site.build, Root(tmp_path / "root"), heard, pace=Pace(ask_s=0.01))
    assert heard.said == ["waiting for the QoS debug; in it: 4711 mine (pending, at most 30:00 left)"]


def test_a_slurm_that_does_not_tell_its_limits_is_asked_all_the_same(
    sbatch: Sbatch, site: Site, tmp_path: Path
) -> None:
    for program in ("sacctmgr", "squeue", "scontrol"):
        sbatch.program(program, "echo 'error: not for you' >&2; exit 1")
    sbatch.says("4711")
    assert compile_job(tmp_path, Wishes(estimate_s=60)).id == "4711"


def test_the_limits_of_qos_and_partition_hold(sbatch: Sbatch, site: Site, tmp_path: Path) -> None:
    sbatch.program("sacctmgr", "echo 'debug|00:30:00|'")
    sbatch.program("scontrol", "echo 'PartitionName=gpu MaxNodes=1 MaxTime=00:20:00 MinNodes=0'")
    sbatch.says("1")
    script = compile_job(tmp_path, Wishes(requeue=True, estimate_s=3600)).script.read_text()
    assert "#SBATCH --time=00:20:00\n" in script


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


def test_the_script_of_a_build_that_is_printed_is_the_one_that_is_submitted(
    site: Site, sbatch: Sbatch, tmp_path: Path
) -> None:
    sbatch.says("7")
    root, recipe, flags = Root(tmp_path / "root"), tmp_path / "r.toml", ["--prove"]
    wishes = Wishes(requeue=True, estimate_s=600.0)
    plan = plan_compile(recipe, "r", site, root, flags, wishes)
    printed = plan.script
    assert not root.path.exists()
    job = submit_planned(plan, root, Quiet(), AGAIN)
    assert printed == job.script.read_text()
    assert "#SBATCH --time=02:00:00\n" not in printed  # The estimate asks for less.

"""Submission of a training job, as seen through Slurm's words; tests/lab has the real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import SlurmError
from envbuilder.paths import Root
from envbuilder.report import Quiet
from envbuilder.site import Site
from envbuilder.slurm.plan import Plan, Wishes, plan_train
from envbuilder.slurm.submit import Submitted, submit_planned, submitted_with
from tests.slurm.test_submit import Sbatch, sbatch, site

__all__ = ["sbatch", "site"]
AGAIN = "envbuilder train c.yaml --recipe tiny --sbatch --site mine"


@pytest.fixture
def train(site: Site, sbatch: Sbatch, tmp_path: Path) -> Root:
    sbatch.program("squeue", "true")
    sbatch.says("7")
    return Root(tmp_path / "root")


def plan(site: Site, root: Root, wishes: Wishes | None = None) -> Plan:
    return plan_train(Path("/c.yaml"), "run-1", site, root, ["--recipe", "tiny"], wishes or Wishes())


def submit(site: Site, root: Root, wishes: Wishes | None = None) -> Submitted:
    return submit_planned(plan(site, root, wishes), root, Quiet(), AGAIN)


def test_the_job_runs_train_and_is_warned_of_its_end(site: Site, train: Root) -> None:
    job = submit(site, train, Wishes(requeue=True))
    script = job.script.read_text()
    assert script.endswith("train /c.yaml --run run-1 --recipe tiny --requeue-job\n")
    assert "#SBATCH --signal=B:USR1@120\n" in script
    assert "#SBATCH --requeue\n" in script
    assert "#SBATCH --job-name=envbuilder-train-run-1\n" in script
    assert job.log == train.logs / "slurm" / "train-run-1-7.log"
    assert submitted_with(train, "7") == AGAIN


def test_the_script_that_is_printed_is_the_one_that_is_submitted(site: Site, train: Root) -> None:
    wishes = Wishes(requeue=True, after="6")
    printed = plan(site, train, wishes).script
    assert not train.path.exists()
    assert printed == submit(site, train, wishes).script.read_text()


def test_a_job_of_several_nodes_has_a_task_on_each(site: Site, train: Root) -> None:
    spec = site.train.model_copy(update={"nodes": 2})
    script = submit(site.model_copy(update={"train": spec}), train).script.read_text()
    assert "#SBATCH --nodes=2\n#SBATCH --ntasks=2\n#SBATCH --ntasks-per-node=1\n" in script


def test_a_second_job_for_the_same_run_is_refused_with_the_first_one_s_number(
    site: Site, train: Root, sbatch: Sbatch
) -> None:
    script = train.logs / "slurm" / "train-run-1.sh"
    sbatch.program("squeue", f"echo '6|PENDING|{script}'")
    with pytest.raises(SlurmError, match="The job 6 already trains this run: it is pending"):
        submit(site, train)
    assert submit(site, train, Wishes(after="6")).id == "7"


def test_a_run_of_that_name_under_another_root_is_another_run(
    site: Site, train: Root, sbatch: Sbatch
) -> None:
    sbatch.program("squeue", "echo '6|RUNNING|/elsewhere/logs/slurm/train-run-1.sh'")
    assert submit(site, train).id == "7"

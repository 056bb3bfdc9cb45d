"""`train --sbatch` on a real Slurm: one node, two nodes, time limits, preemption, failures, cancelling."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from envbuilder.fetch.selfpack import pack_trainer
from envbuilder.paths import Root
from tests.conftest import Quickstart
from tests.lab.followed import wait_until
from tests.lab.images import make_trainer_image, need_fuse
from tests.lab.slurm import ACCOUNT, DEBUG_QOS, PREEMPTABLE_QOS, URGENT_QOS, USER, SlurmLab, missing_programs

pytestmark = [pytest.mark.lab, pytest.mark.needs_env]

REPOSITORY = Path(__file__).parent.parent.parent
SITE = """
name = "lab"
allow-chain = {chain}
[build]
partition = "lab"
walltime = "00:05:00"
cpus = 1
memory = "1G"
[train]
partition = "lab"
account = "{account}"
qos = "{qos}"
walltime = "{walltime}"
nodes = {nodes}
cpus = 1
memory = "2G"
[env]
OMP_NUM_THREADS = "1"
"""
# Steps of some tenths of a second.
SMALL = {
    "model.config.hybrid_override_pattern": "M*",
    "dataset.seq_length": "64",
    "step_scheduler.global_batch_size": "2",
    "step_scheduler.local_batch_size": "1",
    "step_scheduler.val_every_steps": "null",
    "step_scheduler.ckpt_every_steps": "5",
    "validation_dataset": "null",
    "checkpoint.keep_last": "2",
}


@dataclass
class TrainLab:
    """The cluster, with an envbuilder and a copy of the quickstart env that its user and nodes can read."""

    lab: SlurmLab
    python: Path
    root: Path
    running: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def site(
        self, *, nodes: int = 1, chain: bool = True, qos: str = "normal", walltime: str = "00:30:00"
    ) -> Path:
        path = self.lab.home / f"site-{nodes}-{chain}-{qos}-{walltime.replace(':', '')}.toml"
        path.write_text(
            SITE.format(chain=str(chain).lower(), account=ACCOUNT, qos=qos, walltime=walltime, nodes=nodes)
        )
        return path

    def words(self, run: str, *more: str | Path, steps: int = 6) -> list[str | Path]:
        settings = {**SMALL, "step_scheduler.max_steps": str(steps)}
        sets = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        config = self.lab.home / "recipes" / "train" / "quickstart.yaml"
        return ["train", config, "--recipe", "quickstart", "--run", run, *sets, *more]

    def envbuilder(self, *words: str | Path, exit_code: int = 0) -> dict[str, Any]:
        """Runs `envbuilder --json WORDS` as the user; what it printed."""
        completed = self.lab.as_user(self._command(words), cwd=self.lab.home)
        assert completed.returncode == exit_code, completed.stdout + completed.stderr
        answer: dict[str, Any] = json.loads(completed.stdout or completed.stderr)
        return answer

    def train(self, run: str, *more: str | Path, steps: int = 6, exit_code: int = 0) -> dict[str, Any]:
        return self.envbuilder(*self.words(run, *more, steps=steps), exit_code=exit_code)

    def _command(self, words: tuple[str | Path, ...]) -> list[str | Path]:
        return [self.python, "-m", "envbuilder", "--root", self.root, "--json", *words]

    def steps(self, run: str) -> list[int]:
        """The steps that the run's metrics tell of, in the order of writing."""
        path = self.root / "runs" / run / "metrics.jsonl"
        records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
        return [record["step"] for record in records if record["kind"] == "step"]

    def outcome(self, run: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.root / "runs" / run / "outcome.json").read_text())
        return found

    def log(self, job: str) -> str:
        return next((self.root / "logs/slurm").glob(f"train-*-{job}.log")).read_text()

    def processes(self, run: str) -> list[str]:
        """Processes that carry the run's folder in their variables; all nodes are this machine."""
        mark = f"ENVBUILDER_RUN={self.root / 'runs' / run}".encode()
        found = []
        for path in Path("/proc").glob("[0-9]*/environ"):
            try:
                if mark in path.read_bytes().split(b"\0"):
                    found.append(path.parent.name)
            except OSError:
                continue
        return found


@pytest.fixture(scope="module")
def cluster(quickstart: Quickstart) -> Iterator[TrainLab]:
    assert not missing_programs(), f"make test-lab needs: {', '.join(missing_programs())}"
    with SlurmLab(2) as lab:
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
        # The suite's own interpreter may lie in a home folder that no other user can read.
        subprocess.run([*uv, "venv", "--python", "/usr/bin/python3", lab.folder / "tool"], check=True)
        python = lab.folder / "tool" / "bin" / "python"
        subprocess.run([*uv, "pip", "install", "--python", python, REPOSITORY], check=True)
        for folder in ("train", "data"):
            shutil.copytree(REPOSITORY / "recipes" / folder, lab.home / "recipes" / folder)
        shutil.copy(REPOSITORY / "recipes" / "quickstart.toml", lab.home / "recipes")
        root = lab.home / "root"
        lab.as_user(["mkdir", "-p", root / "envs"])
        _copy_env(quickstart.root / "envs" / "quickstart", root / "envs" / "quickstart", uv)
        cluster = TrainLab(lab, python, root)
        try:
            yield cluster
        finally:
            lab.cancel_all()


def _copy_env(source: Path, target: Path, uv: list[str]) -> None:
    """The env for another user, in hard links where the disk allows, with the trainer of this source tree."""
    subprocess.run([*uv, "venv", "--python", "/usr/bin/python3", target], check=True)
    (there,) = (source / "lib").glob("python3.*/site-packages")
    (here,) = (target / "lib").glob("python3.*/site-packages")
    assert there.parent.name == here.parent.name, "the env is for another Python than /usr/bin/python3"
    shutil.rmtree(here)
    if subprocess.run(["cp", "-al", there, here], check=False).returncode != 0:
        subprocess.run(["cp", "-a", there, here], check=True)
    (target / "share").mkdir(exist_ok=True)
    for name in ("bin", "share"):  # what packages put there, beside the interpreter
        subprocess.run(["cp", "-an", f"{source / name}/.", target / name], check=True)
    wheel = pack_trainer()
    path = target.parent / wheel.filename
    path.write_bytes(wheel.content)
    install: list[str | Path] = [
        "pip",
        "install",
        "--offline",
        "--no-deps",
        "--reinstall",
        "--python",
        target / "bin" / "python",
    ]
    subprocess.run([*uv, *install, path], check=True)
    path.unlink()
    for name in ("envbuilder.json", "pylock.toml"):
        shutil.copy(source / name, target / name)
        (target / name).chmod(0o644)


@pytest.fixture(autouse=True)
def emptied(cluster: TrainLab) -> Iterator[None]:
    yield
    cluster.lab.cancel_all()


def test_a_dry_run_says_what_training_takes_as_far_as_former_runs_tell(cluster: TrainLab) -> None:
    # The first test of this file: no run was made before.
    words = ("--sbatch", "--site", cluster.site(), "--dry-run")
    first = cluster.train("dry", *words)
    assert (first["dry_run"]["estimate_s"], first["dry_run"]["jobs"]) == (None, None)
    assert first["dry_run"]["start"]["partition"] == "lab"
    assert "Training takes" in first["memory"]
    cluster.train("before", "--processes", "1")
    second = cluster.train("dry", *words)
    assert second["dry_run"]["estimate_s"] > 0
    assert second["dry_run"]["jobs"] == 1
    assert second["dry_run"]["whole"]["core_hours"] > 0
    assert not (cluster.root / "runs" / "dry").exists()
    assert cluster.lab.as_user(["squeue", "-h"]).stdout == ""


@pytest.mark.parametrize("nodes", [1, 2])
def test_a_run_trains_in_a_job_of_one_node_and_of_two(cluster: TrainLab, nodes: int) -> None:
    run = f"on-{nodes}"
    done = cluster.train(run, "--sbatch", "--site", cluster.site(nodes=nodes))
    assert (done["state"], done["outcome"]["steps"]) == ("COMPLETED", 6)
    assert cluster.steps(run) == [1, 2, 3, 4, 5, 6]
    start = json.loads((cluster.root / "runs" / run / "metrics.jsonl").read_text().splitlines()[0])
    assert start.get("processes", nodes) == nodes
    stamp = done["outcome"]["stamp"]
    assert {"env", "config", "data"} <= set(stamp)
    assert all(stamp[name].startswith("sha256:") for name in ("env", "config", "data"))
    assert (cluster.root / "runs" / run / "adapter" / "adapter_model.safetensors").exists()
    assert cluster.processes(run) == []


def test_a_run_on_two_nodes_trains_in_an_image(cluster: TrainLab) -> None:
    need_fuse()
    imaged = replace(cluster, root=cluster.lab.home / "imaged")
    image = make_trainer_image(Root(imaged.root), cluster.root / "envs" / "quickstart").image
    subprocess.run(["chown", "-R", USER, imaged.root], check=True)
    words = ("imaged", "--sbatch", "--site", cluster.site(nodes=2))
    # What the job would find, the login node finds in the image.
    lost = imaged.train(*words, "--set", "dataset.path_or_dataset_id=/lost.jsonl", exit_code=8)
    assert "/lost.jsonl" in lost["message"]
    assert imaged.train(*words, "--dry-run")["memory"].startswith("Training takes")
    done = imaged.train(*words, steps=2)
    assert (done["state"], done["outcome"]["steps"]) == ("COMPLETED", 2)
    assert done["outcome"]["stamp"]["env"] == f"sha256:{image.receipt.sha256}"
    log = imaged.log(done["job"])
    assert f"{image.path.name} is mounted at" in log
    assert "on each of 2 nodes" in log
    assert not (imaged.root / "envs").exists(), "there is no other env that a node could have taken"
    assert imaged.processes("imaged") == []


def submitted(cluster: TrainLab, run: str, site: Path, *, steps: int) -> str:
    """Submits a run and returns the job's id once the run has made some steps."""
    job: str = cluster.train(run, "--sbatch", "--site", site, "--no-wait", steps=steps)["job"]
    wait_until(lambda: len(cluster.steps(run)) > 2, f"{run} trains")
    return job


def follow(cluster: TrainLab, job: str, exit_code: int = 0) -> dict[str, Any]:
    return cluster.envbuilder("status", "--follow", job, exit_code=exit_code)


def test_a_run_whose_time_ends_goes_on_in_the_job_s_next_life(cluster: TrainLab) -> None:
    job = submitted(cluster, "lives", cluster.site(nodes=2), steps=60)
    # What Slurm itself sends ahead of the time limit.
    cluster.lab.as_user(["scancel", "--signal=USR1", "--batch", job])
    ended = follow(cluster, job)
    assert (ended["state"], ended["lives"]) == ("COMPLETED", 2)
    assert cluster.steps("lives") == list(range(1, 61))
    log = cluster.log(job)
    assert "SIGUSR1: stopping at the next step, with a checkpoint" in log
    assert f"job {job} is queued again for life 2" in log
    assert cluster.outcome("lives")["status"] == "finished"


def test_a_run_stops_before_the_time_limit_and_the_command_that_goes_on_is_told(cluster: TrainLab) -> None:
    # Slurm may warn a minute too early: a job of two minutes would perhaps not have made a step yet.
    site = cluster.site(chain=False, walltime="00:03:00")
    error = cluster.train("limit", "--sbatch", "--site", site, steps=100_000, exit_code=75)
    assert "stopped in good order" in error["message"]
    assert "more jobs of 3 min" in error["message"]
    assert error["remedy"].startswith("Go on with: envbuilder --root")
    assert "--sbatch" in error["remedy"]
    outcome = cluster.outcome("limit")
    assert (outcome["status"], outcome["steps_total"]) == ("stopped", 100_000)
    assert outcome["steps"] == cluster.steps("limit")[-1]
    assert (cluster.root / "runs/limit/checkpoints").exists()


def test_a_cancelled_run_leaves_nothing_behind_and_a_second_job_is_refused(cluster: TrainLab) -> None:
    site = cluster.site(qos=DEBUG_QOS)
    job = submitted(cluster, "cancelled", site, steps=100_000)
    second = cluster.train("cancelled", "--sbatch", "--site", site, exit_code=9)
    assert second["message"] == f"The job {job} already trains this run: it is running."
    other = cluster.train("other", "--sbatch", "--site", site, exit_code=9)
    assert other["message"].startswith(f"The QoS debug takes no further job of yours now; in it: {job} ")
    assert "--wait-for-qos" in other["remedy"]
    cluster.lab.as_user(["scancel", job])
    error = follow(cluster, job, exit_code=9)
    assert error["message"] == f"The job {job} was cancelled by you."
    assert error["remedy"].startswith("The run's checkpoints are kept; go on with: envbuilder --root")
    assert cluster.lab.job_state(job) in ("CANCELLED", "")
    wait_until(lambda: cluster.processes("cancelled") == [], "no process is left")


def test_a_run_that_has_to_give_way_goes_on_afterwards(cluster: TrainLab) -> None:
    # No machine is so quick that it ends within the grace that Slurm gives it.
    job = submitted(cluster, "gives-way", cluster.site(qos=PREEMPTABLE_QOS), steps=100_000)
    options = [f"--account={ACCOUNT}", f"--qos={URGENT_QOS}", "--nodes=2", "--exclusive", "--time=1"]
    urgent = cluster.lab.as_user(["sbatch", *options, "--parsable", "--wrap", "sleep 1"])
    assert urgent.returncode == 0, urgent.stderr
    wait_until(lambda: cluster.lab.job_state(urgent.stdout.strip()) == "COMPLETED", "it gave way")
    before = cluster.steps("gives-way")[-1]
    wait_until(lambda: cluster.steps("gives-way")[-1] > before + 5, "it goes on")
    cluster.lab.as_user(["touch", cluster.root / "runs/gives-way/stop"])
    error = follow(cluster, job, exit_code=75)
    assert "stopped in good order" in error["message"]
    last = cluster.outcome("gives-way")["steps"]
    assert sorted(set(cluster.steps("gives-way"))) == list(range(1, last + 1))
    lives = cluster.lab.as_user(["sacct", "-D", "-X", "-n", "-j", job, "-o", "State"]).stdout.split()
    assert lives[0] == "PREEMPTED", lives
    assert len(lives) == 2


def test_a_run_goes_on_when_one_of_its_nodes_failed(cluster: TrainLab) -> None:
    job = submitted(cluster, "fails", cluster.site(nodes=2), steps=60)
    wait_until(lambda: any(cluster.root.glob("runs/fails/checkpoints/step-*")), "a checkpoint is there")
    cluster.lab.kill_node(cluster.lab.nodes[1])
    wait_until(lambda: cluster.lab.job_state(job) != "RUNNING", "Slurm has noticed")
    cluster.lab.start_node(cluster.lab.nodes[1])
    ended = follow(cluster, job)
    # Often the step of life 2 is told to stop (by whom, no log of Slurm says), and life 3 finishes the run.
    assert ended["state"] == "COMPLETED", cluster.log(job)
    assert ended["lives"] in (2, 3)
    assert sorted(set(cluster.steps("fails"))) == list(range(1, 61))


# A small Llama with random weights, saved as a model's folder.
MODEL = """
import sys
from transformers import LlamaConfig, LlamaForCausalLM
config = LlamaConfig(
    vocab_size=272, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=16, initializer_range=0.2,
)
LlamaForCausalLM(config).save_pretrained(sys.argv[1])
"""


def test_a_training_of_many_short_jobs_ends_in_a_merged_model(cluster: TrainLab) -> None:
    """docs/thirty-minute-queue.md shows what this prints (pytest -s)."""
    home, env_python = cluster.lab.home, cluster.root / "envs" / "quickstart" / "bin" / "python"
    made = cluster.lab.as_user([env_python, "-c", MODEL, home / "model"])
    assert made.returncode == 0, made.stderr
    site = cluster.site(qos=DEBUG_QOS)
    folder = [
        *("--set", "model.config=null", "--set", "model.init=null"),
        *("--set", f"model.pretrained_model_name_or_path={home / 'model'}"),
    ]
    words = cluster.words("queue", "--sbatch", "--site", site, *folder, steps=80)
    said = home / "said.txt"
    with said.open("w") as sink:
        training = cluster.lab.start_as_user(
            [cluster.python, "-m", "envbuilder", "--root", cluster.root, *words], sink
        )
        try:
            for life in (1, 2):
                before = len(cluster.steps("queue"))
                wait_until(
                    lambda before=before: len(cluster.steps("queue")) > before + 5, f"life {life} trains"
                )
                # What Slurm itself sends ahead of the time limit, of 30 minutes here.
                cluster.lab.as_user(["scancel", "--signal=USR1", "--batch", _only_job(cluster)])
                wait_until(lambda life=life: f"life {life + 1}" in said.read_text(), "it goes on")
            assert training.wait(timeout=600) == 0, said.read_text()
        finally:
            training.kill()
            training.wait()
            print(said.read_text())
    merge: list[str | Path] = [
        *("-m", "trainer.merge", cluster.root / "runs/queue/adapter", home / "model", home / "merged")
    ]
    merged = cluster.lab.as_user([env_python, *merge])
    print(merged.stdout, merged.stderr)
    assert merged.returncode == 0, merged.stderr
    assert (home / "merged" / "config.json").exists()
    assert cluster.steps("queue") == list(range(1, 81))


def _only_job(cluster: TrainLab) -> str:
    return cluster.lab.as_user(["squeue", "--me", "-h", "-o", "%i"]).stdout.strip()

"""Jobs of the lab that are submitted and followed as `compile --sbatch` does it, with a small stand-in for
compile: what it does is written in the test, and it speaks to the follower as compile would."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.lab.slurm import SlurmLab, missing_programs

REPOSITORY = Path(__file__).parent.parent.parent

# What is asked for, as JSON → what was heard while following, and how it ended, as JSON.
_FOLLOW = """
import json, sys
from pathlib import Path
from envbuilder.errors import EnvbuilderError
from envbuilder.paths import Root
from envbuilder.slurm.follow import follow
from envbuilder.slurm.pace import Pace
from envbuilder.site import load_site
from envbuilder.slurm.submit import Asked, submit

class Heard(list):
    def stage(self, text):
        self.append(text)
        with (root.path / (wanted["name"] + ".heard")).open("a") as file:
            file.write(text + "\\n")
    def progress(self, label, done, total, unit): self.stage(f"{done} of {total} {unit}")
    def item(self, *words): pass
    def note(self, text): self.stage(text)
    def warn(self, text): self.stage("warning: " + text)

wanted, root, heard = json.loads(sys.argv[1]), Root(Path(sys.argv[2])), Heard()
answer = {"heard": heard}
try:
    job_id, log = wanted["job"], root.logs / "slurm" / "none.log"
    if job_id is None:
        site = load_site(wanted["site"])
        spec = site.build.model_copy(update=wanted["spec"])
        job = submit(site, spec, wanted["name"], wanted["command"], root=root, asked=Asked(**wanted["asked"]))
        job_id, log = job.id, job.log
        (root.path / (wanted["name"] + ".id")).write_text(job_id)
    pace = Pace(ask_s=1.0, look_s=0.3, settle_s=0.3, tell_s=1.0)
    ended = follow(job_id, log, root=root, reporter=heard, again="envbuilder compile RECIPE", pace=pace)
    answer["ended"] = {"state": ended.state, "lives": ended.lives, "log": ended.log.read_text()}
except EnvbuilderError as error:
    answer["error"] = error.to_json()
print(json.dumps(answer))
"""

# Before what a test's job does: the words that compile has, too.
_COMPILE = """
import os, signal, sys, time
from pathlib import Path
from envbuilder.paths import Root
from envbuilder.progress_file import job_progress, progress_path, read_progress
root, job = Root(Path(sys.argv[1])), os.environ["SLURM_JOB_ID"]
life = int(os.environ.get("SLURM_RESTART_COUNT", "0")) + 1
path = progress_path(root, job)
def ready(done, total, **more):
    job_progress(root).write(done=done, total=total, **more)
def wait_for(name):
    while not (root.path / name).exists():
        time.sleep(0.1)
"""


@dataclass(frozen=True)
class Followed:
    """What following a job brought."""

    heard: list[str]
    ended: dict[str, Any] = field(default_factory=dict)
    error: dict[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return "\n".join(self.heard)


class Cluster:
    """The lab, an envbuilder that its user and its nodes can read, and followers that run side by side."""

    def __init__(self, lab: SlurmLab, pool: ThreadPoolExecutor) -> None:
        self.lab, self._pool = lab, pool
        self.python = lab.folder / "tool" / "bin" / "python"
        self.root = lab.home / "root"

    def follow(
        self, name: str, does: str = "", *, job: str | None = None, asked: dict[str, Any] | None = None,
        **spec: str | int,
    ) -> Future[Followed]:  # fmt: skip
        """Submits a job that does `does` (Python), or takes the `job` that is there, and follows it."""
        command = [str(self.python), "-c", _COMPILE + does, str(self.root)]
        wanted = {
            "job": job,
            "name": name,
            "site": str(self.lab.home / "lab.toml"),
            "command": command,
            "asked": asked or {},
            "spec": {"cpus": 1, "memory": "100M", **spec},
        }
        return self._pool.submit(self._follow, json.dumps(wanted))

    def _follow(self, wanted: str) -> Followed:
        completed = self.lab.as_user([self.python, "-c", _FOLLOW, wanted, self.root])
        assert completed.returncode == 0, completed.stderr
        return Followed(**json.loads(completed.stdout))

    def job_id(self, name: str) -> str:
        """The id of the job that is followed under `name`, once it is submitted."""
        path = self.root / f"{name}.id"
        wait_until(lambda: path.exists() and path.read_text() != "", f"{name} is submitted")
        return path.read_text()

    def wait_until_heard(self, name: str, text: str) -> None:
        """Waits until the follower of `name` has been told `text`."""
        path = self.root / f"{name}.heard"
        wait_until(lambda: path.exists() and text in path.read_text(), f"{name} is told {text!r}")

    def running(self, name: str) -> str:
        """The same, once the job runs."""
        job_id = self.job_id(name)
        wait_until(lambda: self.lab.job_state(job_id) == "RUNNING", f"{name} runs")
        return job_id

    def let(self, name: str) -> None:
        """Lets jobs go on that `wait_for` the name."""
        assert self.lab.as_user(["touch", self.root / name]).returncode == 0

    def envbuilder(self, *words: str | Path) -> subprocess.CompletedProcess[str]:
        """Runs `envbuilder WORDS` as the user."""
        return self.lab.as_user([self.python, "-m", "envbuilder", "--root", self.root, *words])

    def interrupted(self, *words: str | Path, once: str) -> tuple[int, str]:
        """`envbuilder WORDS`, and Ctrl-C once it has said `once`: exit code, and all that it said."""
        log = self.lab.home / "interrupted.txt"
        with log.open("w") as sink:
            process = self.lab.start_as_user(
                [self.python, "-m", "envbuilder", "--root", self.root, *words], sink
            )
            try:
                wait_until(lambda: once in log.read_text(), f"it says {once!r}")
                process.send_signal(signal.SIGINT)
                return process.wait(timeout=120), log.read_text()
            finally:
                process.kill()
                process.wait()


@contextmanager
def cluster_up(*, memory_limits: bool = False) -> Iterator[Cluster]:
    """A cluster of two nodes."""
    assert not missing_programs(), f"make test-lab needs: {', '.join(missing_programs())}"
    with SlurmLab(2, memory_limits=memory_limits) as lab, ThreadPoolExecutor(16) as pool:
        shutil.copy(REPOSITORY / "recipes" / "sites" / "lab.toml", lab.home)
        cluster = Cluster(lab, pool)
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
        # The suite's own interpreter may lie in a home folder that no other user can read.
        subprocess.run([*uv, "venv", "--python", "/usr/bin/python3", lab.folder / "tool"], check=True)
        subprocess.run([*uv, "pip", "install", "--python", cluster.python, REPOSITORY], check=True)
        made = lab.as_user(["mkdir", cluster.root])
        assert made.returncode == 0, made.stderr
        try:
            yield cluster
        finally:
            lab.cancel_all()  # so that no follower waits for ever


def wait_until(condition: Any, what: str, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"gave up waiting until {what}"
        time.sleep(0.3)  # What is asked of Slurm costs time that the jobs need.

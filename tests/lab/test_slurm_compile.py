"""Jobs on a real Slurm: submitted by an ordinary user, run on a node without internet, refused in words."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist
from tests.lab.slurm import DEBUG_QOS, USER, SlurmLab, missing_programs

pytestmark = pytest.mark.lab

REPOSITORY = Path(__file__).parent.parent.parent
PACKAGES = REPOSITORY / "tests" / "packages"

# The site's keys, ROOT, and the job's command → what `submit` returned or raised, as JSON.
SUBMIT = """
import json, sys
from pathlib import Path
from envbuilder.errors import EnvbuilderError
from envbuilder.paths import Root
from envbuilder.site import load_site
from envbuilder.slurm.submit import submit
site = load_site(sys.argv[1])
spec = site.build.model_copy(update=json.loads(sys.argv[2]))
try:
    job = submit(site, spec, "probe", sys.argv[4:], root=Root(Path(sys.argv[3])))
    print(json.dumps({"id": job.id, "log": str(job.log)}))
except EnvbuilderError as error:
    print(json.dumps(error.to_json()))
"""

# What a job finds on its node, written beside where it runs.
PROBE = """
import json, os, pathlib, pwd, socket
def reached(address):
    try:
        socket.create_connection(address, timeout=5).close()
    except OSError as error:
        return type(error).__name__
    return "reached"
found = {
    "user": pwd.getpwuid(os.getuid()).pw_name,
    # An address for documentation (RFC 5737): with a route to the internet the connection would time out.
    "address": reached(("192.0.2.1", 443)),
    "variables": dict(os.environ),
}
pathlib.Path("found.json").write_text(json.dumps(found))
print("written")
"""

# A build backend inside the sdist, so that nothing but the sdist is needed; it says where it was built.
BACKEND = """
import base64, hashlib, os, zipfile
def get_requires_for_build_wheel(settings=None):
    return []
def build_wheel(folder, settings=None, metadata=None):
    members = {
        "tiny.py": f"JOB = {os.uname().nodename!r}\\n",
        "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1.0\\n",
        "tiny-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    record = ""
    for name, text in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(text)}\\n"
    members["tiny-1.0.dist-info/RECORD"] = record + "tiny-1.0.dist-info/RECORD,,\\n"
    with zipfile.ZipFile(os.path.join(folder, "tiny-1.0-py3-none-any.whl"), "w") as wheel:
        for name, text in members.items():
            wheel.writestr(name, text)
    return "tiny-1.0-py3-none-any.whl"
"""
PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
RECIPE = 'name = "tiny"\nrequirements = ["tiny==1.0"]\ntrainer = false\n[build.tiny]\n[index]\ntiny = "lab"\n'


@dataclass(frozen=True)
class Cluster:
    """The lab, and an envbuilder that its user and its nodes can read."""

    lab: SlurmLab
    python: Path

    def start(self, *words: str | Path) -> subprocess.Popen[bytes]:
        """Starts `envbuilder --json …` as the user; what it prints comes into HOME/said.txt."""
        with (self.lab.home / "said.txt").open("w") as said:
            return self.lab.start_as_user(
                [self.python, "-m", "envbuilder", "--root", self.lab.home / "root", "--json", *words], said
            )

    def submit(self, *command: str | Path, root: str = "root", **spec: str | int) -> dict[str, Any]:
        """Submits a job for the site `lab`, with `spec` in its [build] section."""
        site = self.lab.home / "lab.toml"
        completed = self.lab.as_user(
            [self.python, "-c", SUBMIT, site, json.dumps(spec), self.lab.home / root, *command]
        )
        assert completed.returncode == 0, completed.stderr
        answer: dict[str, Any] = json.loads(completed.stdout)
        return answer

    def envbuilder(
        self, *words: str | Path, env: Mapping[str, str] | None = None, exit_code: int = 0
    ) -> dict[str, Any]:
        """Runs `envbuilder --json …` as the user; what it prints."""
        root = self.lab.home / "root"
        completed = self.lab.as_user(
            [self.python, "-m", "envbuilder", "--root", root, "--json", *words], env=dict(env or {})
        )
        assert completed.returncode == exit_code, completed.stdout + completed.stderr
        answer: dict[str, Any] = json.loads(completed.stdout)
        return answer


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    assert not missing_programs(), f"make test-lab needs: {', '.join(missing_programs())}"
    with SlurmLab() as lab:
        shutil.copy(REPOSITORY / "recipes" / "sites" / "lab.toml", lab.home)
        python = lab.folder / "tool" / "bin" / "python"
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
        # The suite's own interpreter may lie in a home folder that no other user can read.
        subprocess.run([*uv, "venv", "--python", "/usr/bin/python3", lab.folder / "tool"], check=True)
        subprocess.run([*uv, "pip", "install", "--python", python, REPOSITORY], check=True)
        yield Cluster(lab, python)


@pytest.fixture(autouse=True)
def _empty_queue(cluster: Cluster) -> Iterator[None]:
    yield
    cluster.lab.cancel_all()


def test_a_job_runs_as_the_user_on_a_node_without_internet(cluster: Cluster) -> None:
    job = cluster.submit(cluster.python, "-c", PROBE)
    assert cluster.lab.wait_for_job(job["id"]) == "COMPLETED"
    found = json.loads((cluster.lab.home / "found.json").read_text())
    assert found["user"] == USER
    assert found["address"] == "OSError"  # Network is unreachable
    assert found["variables"]["SLURMD_NODENAME"] == "node1"
    assert found["variables"]["HOME"] == str(cluster.lab.home)
    assert Path(job["log"]).read_text() == "written\n"


def test_a_root_with_a_space_in_its_name_has_the_log(cluster: Cluster) -> None:
    job = cluster.submit("echo", "here", root="a root")
    assert cluster.lab.wait_for_job(job["id"]) == "COMPLETED"
    assert Path(job["log"]).read_text() == "here\n"


def test_a_job_gets_the_gpus_that_the_site_asks_for(cluster: Cluster) -> None:
    job = cluster.submit("printenv", "CUDA_VISIBLE_DEVICES", gpus=2, gpu_request="gres")
    assert cluster.lab.wait_for_job(job["id"]) == "COMPLETED"
    assert Path(job["log"]).read_text() == "0,1\n"


def test_the_command_s_failure_is_the_job_s(cluster: Cluster) -> None:
    job = cluster.submit("sh", "-c", "exit 6")
    assert cluster.lab.wait_for_job(job["id"]) == "FAILED"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"account": "nobodys"}, "You may not use the account nobodys in the partition lab."),
        ({"partition": "nowhere"}, "There is no partition nowhere on this cluster."),
        ({"qos": "platinum"}, "The QoS platinum does not exist, or the account project may not use it."),
        ({"walltime": "30:00:00"}, "The walltime 30:00:00 is longer than the partition lab allows."),
        (
            {"qos": DEBUG_QOS, "walltime": "01:00:00"},
            "The walltime 01:00:00 is longer than the QoS debug or the account project allows.",
        ),
        (
            {"qos": DEBUG_QOS, "gpus": 3, "gpu_request": "gres"},
            "3 GPUs are more than the QoS debug or the account project allows.",
        ),
        ({"cpus": 900}, "No node of the partition lab has 900 CPUs."),
        ({"memory": "900G"}, "No node of the partition lab has 900G of memory."),
        (
            {"gpus": 1, "gpu_request": "typed-gres", "gpu_type": "a100"},
            "No node of the partition lab has 2 CPUs, 2G and 1 GPUs.",
        ),
    ],
)
def test_a_refused_job_is_told_in_words(cluster: Cluster, spec: dict[str, str | int], message: str) -> None:
    error = cluster.submit("true", **spec)
    assert (error["error"], error["exit_code"], error["message"]) == ("SlurmError", 9, message)


def test_a_qos_that_takes_one_job_refuses_the_second(cluster: Cluster) -> None:
    first = cluster.submit("sleep", "60", qos=DEBUG_QOS)
    second = cluster.submit("true", qos=DEBUG_QOS)
    assert second["message"].startswith("The QoS debug takes no further job of yours")
    assert "squeue --me --qos=debug" in second["remedy"]
    assert cluster.lab.job_state(first["id"]) in {"PENDING", "RUNNING"}


@pytest.fixture(scope="module")
def recipe(cluster: Cluster) -> Path:
    """A recipe of one small sdist, fetched."""
    home = cluster.lab.home
    for folder in ("files", "recipes"):
        (home / folder).mkdir()
    make_sdist(home / "files", "tiny", "1.0", files={"pyproject.toml": PYPROJECT, "backend.py": BACKEND})
    recipe = home / "recipes" / "tiny.toml"
    recipe.write_text(RECIPE)
    with IndexServer(home / "files") as index:
        variables = {"ENVBUILDER_INDEX_LAB_URL": index.url}
        cluster.envbuilder("lock", recipe, env=variables)
        cluster.envbuilder("fetch", recipe, env=variables)
    return recipe


def test_compile_submits_itself_follows_the_job_and_builds_on_the_node(
    cluster: Cluster, recipe: Path
) -> None:
    home = cluster.lab.home
    job = cluster.envbuilder("compile", recipe, "--sbatch", "--site", home / "lab.toml")
    assert (job["state"], job["lives"]) == ("COMPLETED", 1)
    assert Path(job["log"]).read_text() != ""
    built = cluster.lab.as_user(
        [home / "root" / "envs" / "tiny" / "bin" / "python", "-c", "import tiny; print(tiny.JOB)"]
    )
    # A sealed build sees no machine's name; the receipt has it.
    assert built.stdout in ("build\n", "node1\n"), built.stderr
    (receipt,) = (home / "root" / "wheelhouse").glob("tiny-*/receipt.json")
    assert json.loads(receipt.read_text())["node"] == "node1"
    status = cluster.envbuilder("status", recipe)
    assert [(wheel["package"], wheel["version"]) for wheel in status["built"]] == [("tiny", "1.0")]
    assert [env["recipe"] for env in status["envs"]] == ["tiny"]


def test_a_job_that_is_not_waited_for_can_be_followed_later(cluster: Cluster, recipe: Path) -> None:
    words = ["compile", recipe, "--sbatch", "--site", cluster.lab.home / "lab.toml", "--no-wait"]
    first = cluster.submit("sleep", "600")
    job = cluster.envbuilder(*words, "--after", first["id"])
    listed = {entry["id"]: entry["state"] for entry in cluster.envbuilder("status", recipe)["jobs"]}
    assert listed == {job["job"]: "PENDING"}
    cluster.lab.as_user(["scancel", first["id"]])
    ended = cluster.envbuilder("status", "--follow", job["job"])
    assert (ended["job"], ended["state"], ended["log"]) == (job["job"], "COMPLETED", job["log"])


def test_a_build_that_fails_in_the_job_fails_here_with_its_own_error(cluster: Cluster, recipe: Path) -> None:
    words = ["compile", recipe, "--sbatch", "--site", cluster.lab.home / "lab.toml"]
    error = cluster.envbuilder(*words, "--python", "/nowhere/python", exit_code=7)
    assert error["error"] == "MismatchError"
    assert "There is no interpreter /nowhere/python" in error["message"]


def test_a_job_that_may_run_itself_again_is_one_that_slurm_may_run_again(
    cluster: Cluster, recipe: Path
) -> None:
    words = ["compile", recipe, "--sbatch", "--site", cluster.lab.home / "lab.toml"]
    job = cluster.envbuilder(*words, "--requeue")
    assert (job["state"], job["lives"]) == ("COMPLETED", 1)


def test_a_full_qos_is_told_with_what_is_in_it_and_can_be_waited_for(cluster: Cluster, recipe: Path) -> None:
    home = cluster.lab.home
    site = home / "debug.toml"
    site.write_text((home / "lab.toml").read_text().replace("[build]\n", f'[build]\nqos = "{DEBUG_QOS}"\n'))
    first = cluster.submit("sleep", "600", qos=DEBUG_QOS)["id"]
    words = ["compile", recipe, "--sbatch", "--site", site]
    error = cluster.envbuilder(*words, exit_code=9)
    assert error["message"].startswith(f"The QoS debug takes no further job of yours now; in it: {first} ")
    assert "--wait-for-qos" in error["remedy"]

    waiting = cluster.start(*words, "--wait-for-qos")
    try:
        time.sleep(2)  # It has nothing to show while it waits, but that it does.
        assert waiting.poll() is None
        cluster.lab.as_user(["scancel", first])
        assert waiting.wait(timeout=600) == 0, (home / "said.txt").read_text()
    finally:
        waiting.kill()
        waiting.wait()


def test_a_compile_whose_time_ends_goes_on_in_its_next_life_and_compiles_nothing_twice(
    cluster: Cluster,
) -> None:
    home = cluster.lab.home
    files = {path.name: path.read_text() for path in (PACKAGES / "several-units").iterdir()}
    files["work.h"] = files["work.h"].replace("300000", "900000")
    make_sdist(home / "files", "several-units", "1.0", files=files)
    recipe = home / "recipes" / "several.toml"
    recipe.write_text(
        RECIPE.replace("tiny", "several-units").replace('name = "several-units"', 'name = "several"')
    )
    with IndexServer(home / "files") as index:
        variables = {"ENVBUILDER_INDEX_LAB_URL": index.url}
        cluster.envbuilder("lock", recipe, env=variables)
        cluster.envbuilder("fetch", recipe, env=variables)
    words = ["compile", recipe, "--sbatch", "--site", home / "lab.toml", "--requeue", "--no-wait"]
    job = cluster.envbuilder(*words)["job"]
    progress = home / "root" / "logs" / "slurm" / f"progress-{job}.json"
    deadline = time.monotonic() + 600
    while not progress.exists() or json.loads(progress.read_text())["done"] < 1:
        assert time.monotonic() < deadline, Path(home / "root/logs/slurm").glob("*.log")
        time.sleep(0.2)
    # What Slurm itself sends ahead of the time limit.
    cluster.lab.as_user(["scancel", "--signal=USR1", "--batch", job])
    ended = cluster.envbuilder("status", "--follow", job)
    assert (ended["state"], ended["lives"]) == ("COMPLETED", 2)
    (receipt,) = (home / "root" / "wheelhouse").glob("several-units-*/receipt.json")
    units = json.loads(receipt.read_text())["units"]
    assert len(units) == 6
    assert sum(unit["cached"] for unit in units) >= 2
    assert json.loads(progress.read_text())["stage"] == "done"

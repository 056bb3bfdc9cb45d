"""Before a job is submitted, and how seldom Slurm is asked about it afterwards, on a real Slurm."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.lab.followed import Cluster, cluster_up, wait_until
from tests.lab.slurm import ACCOUNT, DEBUG_QOS

pytestmark = pytest.mark.lab

# The site file, ROOT, keys of the site and of its section, and what to do → what came of it, as JSON.
PLAN = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from envbuilder.errors import EnvbuilderError
from envbuilder.paths import Root
from envbuilder.report import Quiet
from envbuilder.site import load_site
from envbuilder.slurm.dry_run import dry_run
from envbuilder.slurm.follow import follow
from envbuilder.slurm.plan import Wishes, plan_compile
from envbuilder.slurm.submit import submit_planned
said = []
class Heard(Quiet):
    def note(self, text): said.append(text)
root, keys, does = Root(Path(sys.argv[2])), json.loads(sys.argv[3]), sys.argv[4]
site = load_site(sys.argv[1])
spec = site.build.model_copy(update=keys.pop("build", {}))
site = site.model_copy(update={**keys, "build": spec})
plan = plan_compile(Path("r.toml"), "tiny", site, root, [], Wishes(estimate_s=900.0))
try:
    if does == "dry-run":
        answer = asdict(dry_run(plan, Heard()))
    else:
        job = submit_planned(plan, root, Heard(), "again")
        answer = {"id": job.id}
        follow(job.id, job.log, root=root, reporter=Heard(), again="again")
except EnvbuilderError as error:
    answer = error.to_json()
print(json.dumps({**answer, "said": said}))
"""
TEMPLATE = """#!/bin/bash
#SBATCH --time=00:03:00 --mail-type=NONE
{{sbatch}}
echo "mine: $SLURM_JOB_NAME"
{{environment}}
{{command}}
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_up() as cluster:
        yield cluster


def planned(cluster: Cluster, does: str, **keys: Any) -> dict[str, Any]:
    site = cluster.lab.home / "lab.toml"
    done = cluster.lab.as_user([cluster.python, "-c", PLAN, site, cluster.root, json.dumps(keys), does])
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_dry_run_tells_the_start_and_the_hours_and_submits_nothing(cluster: Cluster) -> None:
    spec = {"cpus": 2, "gpus": 1, "gpu_request": "gres"}
    run = planned(cluster, "dry-run", build=spec, account_command="echo 120 hours left")
    assert run["start"]["at"].startswith("20")
    assert (run["start"]["processors"], run["start"]["partition"]) == (2, "lab")
    assert run["start"]["nodes"] in cluster.lab.nodes
    assert run["walltime_s"] == 300
    assert run["one_job"] == {"gpu_hours": pytest.approx(1 / 12), "core_hours": pytest.approx(1 / 6)}
    assert run["whole"] == {"gpu_hours": 0.25, "core_hours": 0.5}
    assert run["jobs"] > 1
    assert run["said"] == [f"charged to the account {ACCOUNT}", "120 hours left"]
    assert cluster.lab.as_user(["squeue", "-h"]).stdout == ""
    assert cluster.lab.as_user(["sacct", "-X", "-n"]).stdout == ""
    whole = planned(cluster, "dry-run", build={"exclusive": True})
    assert whole["start"]["processors"] == 8, "a whole node's"


def test_a_dry_run_of_what_slurm_would_refuse_says_why(cluster: Cluster) -> None:
    refused = planned(cluster, "dry-run", build={"account": "nobody-s"})
    assert (refused["error"], refused["exit_code"]) == ("SlurmError", 9)
    assert refused["message"] == "You may not use the account nobody-s in the partition lab."
    much = planned(cluster, "dry-run", build={"qos": DEBUG_QOS, "gpus": 3, "gpu_request": "gres"})
    assert much["message"].startswith("3 GPUs are more than the QoS debug")


def test_a_dry_run_reckons_what_the_user_s_own_script_asks_for(cluster: Cluster) -> None:
    template = cluster.lab.home / "two.sh"
    template.write_text("#!/bin/bash\n#SBATCH -N 2 --gpus=3\n{{sbatch}}\n{{environment}}\n{{command}}\n")
    site = {"cpus": 2, "gpus": 1, "gpu_request": "gres"}
    run = planned(cluster, "dry-run", build=site, template=str(template))
    assert (run["start"]["nodes"], run["start"]["processors"]) == ("node[1-2]", 4)
    assert run["one_job"] == {"gpu_hours": pytest.approx(3 / 12), "core_hours": pytest.approx(4 / 12)}


def test_a_job_runs_in_the_user_s_own_script(cluster: Cluster) -> None:
    (cluster.lab.home / "job.sh").write_text(TEMPLATE)
    ended = planned(cluster, "follow", template=str(cluster.lab.home / "job.sh"))
    # There is no recipe r.toml: the job's own error comes back through a script that is the user's.
    assert (ended["error"], ended["exit_code"]) == ("InputError", 3)
    assert "mine: envbuilder-compile-tiny" in Path(ended["context"]["log"]).read_text()

    def limits() -> list[str]:
        return cluster.lab.as_user(["sacct", "-X", "-n", "-o", "Timelimit"]).stdout.split()

    wait_until(limits, "the accounts know the job")
    assert limits() == ["00:03:00"]


def test_at_the_usual_pace_a_job_is_followed_by_its_own_files(cluster: Cluster) -> None:
    asked = _wrapped(cluster, "squeue", "scontrol", "sacct")
    followed = cluster.follow(
        "said",
        "wait_for('go')\n"
        "ready(1, 2, stage='building tiny')\n"
        "wait_for('end')\n"
        "ready(2, 2, stage='done')\n"
        "job_progress(root).end(0)",
    )
    job = cluster.running("said")
    log = cluster.lab.home / "follower.txt"
    with log.open("w") as sink:
        words = ["env", f"PATH={cluster.lab.home}/wrapped:/usr/bin:/bin", "ENVBUILDER_SLURM_PACE_S=60"]
        envbuilder = [cluster.python, "-m", "envbuilder", "--root", cluster.root, "status", "--follow", job]
        process = cluster.lab.start_as_user([*words, *envbuilder], sink)
        try:
            for name, heard in (("go", "building tiny"), ("end", "did all")):
                cluster.let(name)
                wait_until(lambda heard=heard: heard in log.read_text(), f"it says {heard!r}")
            assert process.wait(timeout=120) == 0
        finally:
            process.kill()
            process.wait()
    assert followed.result().ended["state"] == "COMPLETED"
    times = [float(line) for line in asked.read_text().splitlines()] if asked.exists() else []
    assert len(times) <= 2
    assert all(later - sooner >= 60 for sooner, later in pairwise(times))


def _wrapped(cluster: Cluster, *programs: str) -> Path:
    """Puts programs that note when they are called into HOME/wrapped; where they note it."""
    folder, asked = cluster.lab.home / "wrapped", cluster.lab.home / "asked.txt"
    folder.mkdir()
    for program in programs:
        script = folder / program
        # The follower runs as another user than the tests.
        script.write_text(f'#!/bin/sh\ndate +%s.%N >> {asked}\nexec /usr/bin/{program} "$@"\n')
        script.chmod(0o755)
    return asked

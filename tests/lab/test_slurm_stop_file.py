"""The second way to stop a run: RUN/stop, made by hand, reaches the workers on all nodes of a job."""

from __future__ import annotations

import json

import pytest

from tests.lab.followed import wait_until

# The cluster and what is asked of it are those of the other training tests.
from tests.lab.test_slurm_train import TrainLab, cluster, emptied, follow, submitted

pytestmark = [pytest.mark.lab, pytest.mark.needs_env]
__all__ = ["cluster", "emptied"]


def test_a_stop_file_stops_the_workers_of_both_nodes_with_a_checkpoint(cluster: TrainLab) -> None:
    run = cluster.root / "runs" / "by-hand"
    job = submitted(cluster, "by-hand", cluster.site(nodes=2), steps=100_000)
    cluster.lab.as_user(["touch", run / "stop"])
    error = follow(cluster, job, exit_code=75)
    assert "stopped in good order" in error["message"]
    outcome = cluster.outcome("by-hand")
    last = cluster.steps("by-hand")[-1]
    assert (outcome["status"], outcome["steps"]) == ("stopped", last)
    assert (run / "checkpoints" / f"step-{last:06d}").is_dir()
    # Stopped by hand, it is not queued again, though its site has allow-chain.
    lives = cluster.lab.as_user(["sacct", "-D", "-X", "-n", "-j", job, "-o", "State"]).stdout.split()
    assert len(lives) == 1
    wait_until(lambda: cluster.processes("by-hand") == [], "no process is left")
    start = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert start.get("processes") == 2

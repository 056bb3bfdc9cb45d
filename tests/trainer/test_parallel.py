"""Two processes over gloo, the base model on both or sharded with FSDP2, train as one does."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors.torch import load_file

from .conftest import RunTrainer, losses

REPOSITORY = Path(__file__).parents[2]


def torchrun(
    config: Path, run: Path, *overrides: str, place: Sequence[str] = ("--standalone",)
) -> subprocess.CompletedProcess[str]:
    sets = [part for override in overrides for part in ("--set", override)]
    launcher = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc-per-node=2"]
    return subprocess.run(
        [*launcher, "-m", "trainer", str(config), "--run-dir", str(run), *sets],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


@pytest.mark.parametrize(
    ("placement", "gathering", "checkpointing", "whole"),
    [
        ("replicate", "in_place", "true", 0),
        ("shard", "in_place", "true", 0),
        ("shard", "in_place", "false", 0),
        ("shard", "in_place", "false", 2),
        ("shard", "fsdp2", "true", 0),
        ("shard", "fsdp2", "false", 2),
    ],
)
def test_two_processes_give_the_losses_and_the_adapter_of_one(
    run_trainer: RunTrainer,
    config_file: Path,
    tmp_path: Path,
    placement: str,
    gathering: str,
    checkpointing: str,
    whole: int,
) -> None:
    # 3 validation examples on two processes: one of them has none in the last pass.
    settings = (
        "validation_dataset.path_or_dataset_id=validation.jsonl",
        "step_scheduler.ckpt_every_steps=3",
        "step_scheduler.local_batch_size=1",
        f"distributed.activation_checkpointing={checkpointing}",
        "peft.target_modules=[in_proj, out_proj, q_proj, shared_experts.*, experts.up_proj]",
        "peft.match_all_linear=false",
        f"distributed.placement={placement}",
        f"distributed.whole_blocks={whole}",
        f"distributed.gathering={gathering}",
        # Numbers of rows that two processes can't share evenly.
        "model.config.vocab_size=265",
        "model.config.n_routed_experts=5",
    )
    run_trainer(*settings, run="one")
    done = torchrun(config_file, tmp_path / "two", *settings)
    assert done.returncode == 0, done.stderr
    records = (tmp_path / "two/metrics.jsonl").read_text().splitlines()
    told = json.loads(records[0])["placement"]
    assert told.startswith(f"{placement}, with")
    assert ("2 of 4 blocks whole on each GPU" in told) == (whole == 2)
    one, two = losses(tmp_path / "one"), losses(tmp_path / "two")
    assert two == pytest.approx(one, rel=1e-4)
    assert len(two) == 6
    validation = [
        next(
            record["loss"]
            for record in map(json.loads, (tmp_path / run / "metrics.jsonl").read_text().splitlines())
            if record["kind"] == "validation"
        )
        for run in ("one", "two")
    ]
    assert validation[1] == pytest.approx(validation[0], rel=1e-4)
    first, second = (
        load_file(tmp_path / run / "adapter/adapter_model.safetensors") for run in ("one", "two")
    )
    assert first.keys() == second.keys()
    assert all((first[name] - second[name]).abs().max() < 1e-2 for name in first)
    base, same = ((tmp_path / run / "adapter/base.json").read_text() for run in ("one", "two"))
    assert base == same

    # One process goes on where two stopped.
    newest = tmp_path / "two/checkpoints/step-000006"
    (newest / "COMMITTED").unlink()
    (tmp_path / "two/metrics.jsonl").unlink()
    code, _ = run_trainer(*settings, run="two")
    assert code == 0
    assert losses(tmp_path / "two") == pytest.approx({step: one[step] for step in (4, 5, 6)}, rel=1e-4)


def test_processes_of_a_node_share_a_copy_of_their_own(
    run_trainer: RunTrainer, config_file: Path, tmp_path: Path
) -> None:
    settings = (
        "step_scheduler.local_batch_size=1", "samples.prompts=[]", "checkpoint.enabled=false",
        "distributed.placement=shard", "step_scheduler.max_steps=3",
    )  # fmt: skip
    run_trainer(*settings, run="one")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]

    def node(rank: int) -> subprocess.CompletedProcess[str]:
        place = ("--nnodes=2", f"--node-rank={rank}", "--master-addr=127.0.0.1", f"--master-port={port}")
        return torchrun(config_file, tmp_path / "nodes", *settings, place=place)

    with ThreadPoolExecutor() as threads:
        done = list(threads.map(node, (0, 1)))
    assert [each.returncode for each in done] == [0, 0], done
    records = (tmp_path / "nodes/metrics.jsonl").read_text().splitlines()
    assert json.loads(records[0])["processes"] == 4
    assert "; each 2 processes share a copy" in json.loads(records[0])["placement"]
    assert losses(tmp_path / "nodes") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)


def test_a_failure_is_written_by_rank_0_and_ends_all(config_file: Path, tmp_path: Path) -> None:
    done = torchrun(config_file, tmp_path / "run", "optimizer.lr=1e30")
    assert done.returncode != 0
    outcome = json.loads((tmp_path / "run/outcome.json").read_text())
    assert (outcome["exit_code"], outcome["error"]["context"]["step"]) == (10, "2")

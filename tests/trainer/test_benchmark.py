"""`benchmarks.train` on the tiny model: the contestants compute the same, and the profile adds up."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.stitched import compare
from benchmarks.training import ours
from benchmarks.training.profile import Event, busy, kind_of, profile_steps, summary
from benchmarks.training.work import Work

REPOSITORY = Path(__file__).parent.parent.parent


def stitched(*more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.stitched", "--tiny", "--steps", "12"]
    quick = ["--set", "step_scheduler.val_every_steps=null", "--set", "samples.prompts=[]"]
    return subprocess.run(
        [*command, *quick, *more], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )


def test_jobs_of_several_processes_have_the_losses_of_one_job() -> None:
    run = stitched("--jobs", "2", "--processes", "2")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.search(r"^job 2 of 2, steps \d+ to 12: first after ", run.stdout, re.MULTILINE)
    assert "all 12 losses are the same numbers" in run.stdout


def test_losses_that_differ_and_jobs_that_fail_are_told() -> None:
    assert compare([3.0, 2.0, 1.0], [3.0, 2.5, 1.25]) == (
        "2 of 3 losses differ, first in step 2, most in step 2: 0.5"
    )
    assert compare([3.0, 2.0], [3.0]) == "2 steps in one job, 1 in several"
    run = stitched("--jobs", "2", "--set", "peft.dim=none")
    assert run.returncode == 1
    assert "peft.dim" in run.stdout


def test_scripts_for_a_gpu_are_tried_on_the_cpu(tmp_path: Path) -> None:
    for words, said in (
        (["benchmarks.sharded", "--tiny", "--steps", "2", "--lanes", "alone,fsdp2,in-place"], "in-place: "),
        (["benchmarks.lengths", "--tiny", "--lanes", "rows-recorded,packed"], "packed  "),
        (["benchmarks.packing", "--tiny"], "\nright\n"),
        (
            ["benchmarks.first_step", str(tmp_path / "model"), "--tiny", "--starts", "1"],
            "start 1, steps 1 to",
        ),
    ):
        command = [sys.executable, "-m", *words]
        run = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stdout + run.stderr
        assert said in run.stdout


@pytest.fixture
def work(tmp_path: Path) -> Work:
    return Work(
        config=REPOSITORY / "recipes/train/quickstart.yaml",
        contestant="ours",
        adapters="experts",
        seq_length=32,
        batch=1,
        checkpointing=True,
        warmup=1,
        steps=1,
        deadline=time.time() + 600,
        profile=tmp_path / "profile.json",
    )


def test_contestants_have_the_same_losses(tmp_path: Path) -> None:
    out = tmp_path / "turns.json"
    command = [sys.executable, "-m", "benchmarks.train", "--tiny", "--contestants", "ours,peft"]
    more = ["--adapters", "experts", "--seq-length", "32", "--warmup", "1", "--steps", "1"]
    exact = ["--set", "model.dtype=float32", "--set", "optimizer.lr=1e-3", "--out", str(out)]
    run = subprocess.run(
        [*command, *more, *exact], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    turns = json.loads(out.read_text())
    mine, peers = turns["ours"][0], turns["peft"][0]
    assert len(mine["losses"]) == 2
    # Later losses drift apart: PEFT's base clamps dt in another way, and Adam makes much of small gradients.
    assert mine["losses"][0] == pytest.approx(peers["losses"][0], rel=1e-3)
    assert mine["losses"] == pytest.approx(peers["losses"], rel=1e-2)
    assert mine["trainable"] == peers["trainable"]
    assert len(mine["step_seconds"]) == 1
    assert "ours / it" in run.stdout


def test_a_contestant_that_fails_is_told_and_the_others_go_on(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.train", "--tiny", "--contestants", "ours"]
    run = subprocess.run(
        [*command, "--set", "peft.dim=none"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "ours failed" in run.stdout
    assert "peft.dim" in run.stdout


def test_work_survives_its_file(work: Work, tmp_path: Path) -> None:
    for one in (work, dataclasses.replace(work, profile=None, options=("a",), overrides=("b.c=1",))):
        one.write(tmp_path / "work.json")
        assert Work.read(tmp_path / "work.json") == one


def test_profile_of_our_step(work: Work, capsys: pytest.CaptureFixture[str]) -> None:
    with ours.contestant(work) as contestant:
        contestant.step(1)
        profile_steps(work, contestant, [2, 3], step_seconds=10.0)
        assert len(contestant.losses()) == 3
    assert work.profile is not None
    found = json.loads(work.profile.read_text())
    assert 0 < found["busy_seconds"] == pytest.approx(10 * found["busy_share"])
    assert sum(kind["share"] for kind in found["kinds"].values()) == pytest.approx(1)
    assert found["operators"][0]["milliseconds"] > 0
    assert "kernel launches" in capsys.readouterr().out


def test_time_with_overlap_counts_once() -> None:
    events = [Event("a", 0, 10, 10), Event("b", 5, 20, 15), Event("Memcpy HtoD", 30, 31, 1)]
    assert busy(events) == 21
    found = summary(events, steps=1, step_seconds=42e-6)
    assert found["busy_share"] == pytest.approx(0.5)
    assert (found["launches"], found["copies"]) == (2, 1)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("void cutlass::device_kernel<enable_3x<cutlass::gemm::GroupProblemShape<int>>>", "grouped GEMM"),
        ("nvjet_tst_128x256_64x4_2x1_v_bz_coopA_TNT", "GEMM"),
        ("_chunk_scan_bwd_dc_kernel", "mamba scan"),
        ("void causal_conv1d_channellast_fwd_kernel<Causal_traits<128>>", "causal conv"),
        ("void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<>", "attention"),
        ("_layer_norm_bwd_kernel", "norm"),
        ("void at::native::multi_tensor_apply_kernel<TensorListMetadata<4>>", "optimizer"),
        ("void at::native::cunn_SoftMaxForward<8, float>", "loss"),
        ("void at_cuda_detail::cub::DeviceRadixSortOnesweepKernel<>", "sort, gather, scatter"),
        ("void at::native::unrolled_elementwise_kernel<direct_copy_kernel_cuda>", "copy and fill"),
        ("void at::native::vectorized_elementwise_kernel<4, CUDAFunctor_add<float>>", "elementwise"),
        ("ncclDevKernel_AllReduce_Sum_f32_RING_LL", "collective"),
    ],
)
def test_kind_of_a_kernel(name: str, kind: str) -> None:
    assert kind_of(name) == kind

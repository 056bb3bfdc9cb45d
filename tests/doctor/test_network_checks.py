from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.doctor.checks.network import judge_transport
from envbuilder.fabric import FabricPort
from envbuilder.nccl_log import parse_nccl_log
from envbuilder.paths import Root
from tests.doctor.conftest import TinyEnv, run_one, torch_version
from tests.doctor.test_gpu_checks import SOUND, log, smi
from tests.test_nccl_log import INFINIBAND, SLINGSHOT, SOCKET_2_18, SOCKET_2_28

Programs = Callable[..., Path]
ONE_NODE = "\n".join(line for line in SOCKET_2_18.splitlines() if "via NET" not in line)
"""NCCL without fabric on one node: it names its network, and has no use for it."""
MLX5, CXI = FabricPort("mlx5_0:1", "InfiniBand"), FabricPort("cxi0", "Slingshot")


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        *("SLURM_JOB_NODELIST", "SLURM_JOB_NUM_NODES", "SLURMD_NODENAME", "ENVBUILDER_NODE_SUFFIX"),
        *("NCCL_SOCKET_IFNAME", "NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_NET"),
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("text", "ports", "nodes", "verdict", "words"),
    [
        (ONE_NODE, (MLX5,), 2, "failed", "by TCP over eth0, though this node has mlx5_0:1 (InfiniBand)"),
        (ONE_NODE, (CXI,), 4, "failed", "though this node has cxi0 (Slingshot)"),
        (ONE_NODE, (MLX5,), 1, "warning", "though this node has mlx5_0:1 (InfiniBand)"),
        (ONE_NODE, (), 2, "warning", "and no faster network is on this node"),
        (ONE_NODE, (), 1, "ok", "NCCL takes Socket from node to node"),
        (INFINIBAND.replace("NET/IB/3", "P2P/IPC"), (MLX5,), 2, "ok", "NCCL takes IB from node to node"),
        (SLINGSHOT.replace("NET/AWS Libfabric/0", "P2P/IPC"), (CXI,), 2, "ok", "NCCL takes AWS Libfabric"),
        (SOCKET_2_28, (), 1, "warning", "NCCL goes through the host (SHM) between the GPUs of this node"),
        ("", (MLX5,), 2, "skipped", "does not say which network"),
    ],
)
def test_the_ways_that_nccl_takes_are_judged(
    text: str, ports: tuple[FabricPort, ...], nodes: int, verdict: str, words: str
) -> None:
    outcome = judge_transport(
        parse_nccl_log(text.splitlines()), ports, nodes=nodes, has_links=True, again="again"
    )
    assert outcome.verdict == verdict, outcome
    assert words in outcome.summary


def test_what_nccl_says_of_the_fabric_is_evidence() -> None:
    outcome = judge_transport(
        parse_nccl_log(ONE_NODE.splitlines()), (MLX5,), nodes=2, has_links=True, again="again"
    )
    assert "NCCL: NET/IB : No device found." in outcome.evidence
    assert "fabric: mlx5_0:1 (InfiniBand)" in outcome.evidence


def test_the_remedy_is_the_fabric_s_own_unless_a_variable_is_in_the_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def remedy(port: FabricPort) -> str:
        said = parse_nccl_log(ONE_NODE.splitlines())
        return judge_transport(said, (port,), nodes=2, has_links=True, again="again").remedy or ""

    assert "libibverbs" in remedy(MLX5)
    assert "aws-ofi-nccl" in remedy(CXI)
    monkeypatch.setenv("NCCL_IB_DISABLE", "1")
    assert remedy(MLX5).startswith("unset NCCL_IB_DISABLE;")


def test_gpus_without_links_may_go_through_the_hosts_memory() -> None:
    said = parse_nccl_log(SOCKET_2_28.splitlines())
    assert judge_transport(said, (), nodes=1, has_links=False, again="again").verdict == "ok"


def test_where_nccl_does_not_run_its_ways_are_not_known(
    make_env: Callable[..., TinyEnv], programs: Programs
) -> None:
    env = make_env(files={**torch_version(), "torch/__init__.py": "raise ImportError('no')\n"})
    programs(nvidia_smi=smi(log(SOUND)))
    assert env.check("distributed.nccl").verdict == "failed"
    finding = env.check("distributed.transport")
    assert (finding.verdict, finding.summary) == (
        "skipped",
        "NCCL does not run here: distributed.nccl tells why.",
    )


def in_job(monkeypatch: pytest.MonkeyPatch, programs: Programs, other: str) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "c[1-2]")
    monkeypatch.setenv("SLURMD_NODENAME", "localhost")
    programs(scontrol=f"echo localhost; echo {other}")


def test_outside_of_a_job_of_several_nodes_there_are_no_peers(root: Root) -> None:
    assert run_one("distributed.peers", root=root).verdict == "skipped"


@pytest.mark.parametrize(
    ("other", "interface", "verdict", "words"),
    [
        ("127.0.0.2", None, "ok", "The job's 1 other nodes answer, through lo."),
        ("127.0.0.2", "lo", "ok", "through lo."),
        # Nobody has these addresses.
        ("255.255.255.255", None, "failed", "1 of the job's 1 other nodes don't answer: 255.255.255.255."),
        (f"{'x' * 64}.invalid", None, "failed", "don't answer: xxx"),
    ],
)
def test_the_job_s_other_nodes_must_answer(
    root: Root,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    other: str,
    interface: str | None,
    verdict: str,
    words: str,
) -> None:
    in_job(monkeypatch, programs, other)
    if interface:
        monkeypatch.setenv("NCCL_SOCKET_IFNAME", interface)
    finding = run_one("distributed.peers", root=root)
    assert finding.verdict == verdict, finding
    assert words in finding.summary


def test_the_node_suffix_is_part_of_the_names(
    root: Root, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_job(monkeypatch, programs, "127.0.0")
    monkeypatch.setenv("ENVBUILDER_NODE_SUFFIX", ".2")
    assert "127.0.0.2: 127.0.0.2 through lo: answers" in run_one("distributed.peers", root=root).evidence

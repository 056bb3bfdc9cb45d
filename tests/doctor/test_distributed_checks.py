from __future__ import annotations

import json
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envbuilder.doctor.checks.distributed import judge_ranks
from envbuilder.paths import Root
from envbuilder.process import run
from tests.conftest import Quickstart
from tests.doctor.conftest import TinyEnv, run_one, torch_version
from tests.doctor.test_gpu_checks import SOUND, log, smi
from tests.doctor.test_kernels_checks import with_torch

Programs = Callable[..., Path]
MakeEnv = Callable[..., TinyEnv]
RANKS = Path(__file__).parents[2] / "envbuilder/doctor/ranks.py"
# A label of more than 63 letters is no name: nobody is asked.
NO_NAME = "x" * 64 + ".invalid"


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (
        "MASTER_ADDR",
        "MASTER_PORT",
        "SLURM_JOB_NODELIST",
        "NCCL_SOCKET_IFNAME",
        "GLOO_SOCKET_IFNAME",
    ):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.needs_env
def test_two_ranks_meet_and_add_up(make_env: MakeEnv, quickstart: Quickstart) -> None:
    finding = with_torch(make_env, quickstart).check("distributed.gloo")
    assert finding.verdict == "ok", finding
    assert "gloo joins 2 ranks" in finding.summary


@pytest.mark.needs_env
def test_an_interface_that_is_not_there_keeps_gloo_from_starting(
    make_env: MakeEnv, quickstart: Quickstart, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nothing9")
    finding = with_torch(make_env, quickstart).check("distributed.gloo")
    assert finding.verdict == "failed"
    assert "rendezvous" in finding.summary
    assert any("Unable to find address for: nothing9" in line for line in finding.evidence)
    assert "unset GLOO_SOCKET_IFNAME" in (finding.remedy or "")


def script(quickstart: Quickstart, *arguments: str) -> dict[str, Any]:
    ended = run([quickstart.python, "-P", RANKS, "--bytes", "65536", *arguments], timeout_s=600)
    return dict(json.loads(ended.output.splitlines()[-1]))


@pytest.mark.needs_env
def test_a_rank_that_adds_other_numbers_is_found_by_all(quickstart: Quickstart) -> None:
    report = script(quickstart, "--backend", "gloo", "--world", "2", "--poison", "1")
    outcome = judge_ranks("gloo", report, "again", None)
    assert outcome.verdict == "failed"
    assert "adds up wrongly in float32, bfloat16, on rank 0, 1" in outcome.summary


@pytest.mark.needs_env
def test_a_rank_that_never_comes_is_given_up_and_the_others_tell_where_they_wait(
    quickstart: Quickstart,
) -> None:
    report = script(quickstart, "--backend", "gloo", "--world", "2", "--absent", "1", "--limit", "3")
    assert [rank["stage"] for rank in report["ranks"]] == ["rendezvous", "starting"]
    outcome = judge_ranks("gloo", report, "again", None)
    assert outcome.verdict == "failed"
    assert any("rank 0: rendezvous" in line for line in outcome.evidence)


@pytest.mark.needs_env
def test_nccl_without_a_gpu_fails_with_the_drivers_words(quickstart: Quickstart) -> None:
    report = script(quickstart, "--backend", "nccl", "--world", "2", "--limit", "30")
    outcome = judge_ranks("nccl", report, "again", None)
    assert outcome.verdict == "failed"
    assert any("NVIDIA driver" in line for line in outcome.evidence)


def rank(**fields: Any) -> dict[str, Any]:
    """One rank as ranks.py prints it: a sound one."""
    sound = {"stage": "done", "error": None, "rendezvous_s": 0.5, "wrong": [], "bus_gbs": 360.0}
    return {"rank": 0, **sound, **fields}


@pytest.mark.parametrize(
    ("ranks", "verdict", "words"),
    [
        ([rank(), rank()], "ok", "nccl joins 2 ranks"),
        ([rank(), rank(rendezvous_s=42.0)], "warning", "took 42 s to find each other"),
        ([rank(), rank(bus_gbs=20.0)], "warning", "NCCL moves 20 GB/s, and each GPU's NVLinks carry 478"),
        (
            [rank(stage="rendezvous", error="no answer: it hangs"), rank()],
            "failed",
            "through their rendezvous",
        ),
        ([], "failed", "CUDA sees no GPU"),
    ],
)
def test_what_the_ranks_told_is_judged(ranks: list[dict[str, Any]], verdict: str, words: str) -> None:
    outcome = judge_ranks("nccl", {"world": len(ranks), "ranks": ranks}, "again", 478.0)
    assert outcome.verdict == verdict
    assert words in outcome.summary


def test_nccl_that_can_not_be_started_is_a_failure_with_the_last_words(
    make_env: MakeEnv, programs: Programs
) -> None:
    broken = "raise ImportError('libnccl.so.2: undefined symbol: ncclCommWindowRegister')\n"
    env = make_env(files={**torch_version(), "torch/__init__.py": broken})
    programs(nvidia_smi=smi(log(SOUND)))
    finding = env.check("distributed.nccl")
    assert finding.verdict == "failed"
    assert any("ncclCommWindowRegister" in line for line in finding.evidence)


def test_without_torch_there_are_no_ranks(env: TinyEnv) -> None:
    assert env.check("distributed.gloo").verdict == "skipped"


@pytest.mark.parametrize("variable", ["NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"])
@pytest.mark.parametrize(
    ("value", "verdict"), [(None, "ok"), ("lo", "ok"), ("nothing9", "failed"), ("nothing9,lo", None)]
)
def test_an_interface_that_is_named_must_be_there(
    root: Root, monkeypatch: pytest.MonkeyPatch, variable: str, value: str | None, verdict: str | None
) -> None:
    if value:
        monkeypatch.setenv(variable, value)
    finding = run_one("distributed.interfaces", root=root)
    # NCCL takes the first that matches, gloo needs every one.
    expected = verdict or ("ok" if variable.startswith("NCCL") else "failed")
    assert finding.verdict == expected
    assert "lo: 127.0.0.1" in finding.evidence


@pytest.mark.parametrize(
    ("value", "verdict"), [("=lo", "ok"), ("=l", "failed"), ("l", "ok"), ("^nothing9", "ok")]
)
def test_nccl_takes_prefixes_whole_names_and_exclusions(
    root: Root, monkeypatch: pytest.MonkeyPatch, value: str, verdict: str
) -> None:
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", value)
    assert run_one("distributed.interfaces", root=root).verdict == verdict


def test_an_adapter_that_is_not_there_is_a_warning(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_IB_HCA", "nothing9:1")
    assert run_one("distributed.interfaces", root=root).verdict == "warning"


def test_a_master_that_leads_nowhere_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", NO_NAME)
    finding = run_one("distributed.names", root=root)
    assert finding.verdict == "failed"
    assert "MASTER_ADDR" in finding.summary


@pytest.mark.parametrize(("master", "verdict"), [("127.0.0.1", "ok"), ("localhost", "ok")])
def test_a_master_that_can_be_found_is_ok(
    root: Root, monkeypatch: pytest.MonkeyPatch, master: str, verdict: str
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setenv("MASTER_ADDR", master)
    assert run_one("distributed.names", root=root).verdict == verdict


def test_a_host_whose_own_name_leads_nowhere_is_a_warning(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: NO_NAME)
    finding = run_one("distributed.names", root=root)
    assert finding.verdict == "warning"
    assert "--local-addr 127.0.0.1" in (finding.remedy or "")


@pytest.mark.parametrize(
    ("scontrol", "verdict", "words"),
    [
        (f"echo localhost; echo {NO_NAME}", "failed", "1 of the job's 2 nodes can't be found by name"),
        ("echo localhost; echo 127.0.0.1", "warning", "leads to this node alone"),
        ("echo localhost", "ok", "lead to addresses"),
        ("echo Invalid hostlist; exit 1", "ok", "lead to addresses"),
    ],
)
def test_the_jobs_nodes_are_looked_up(
    root: Root,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    scontrol: str,
    verdict: str,
    words: str,
) -> None:
    monkeypatch.setattr(socket, "gethostname", lambda: "localhost")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "c[1-2]")
    programs(scontrol=scontrol)
    finding = run_one("distributed.names", root=root)
    assert finding.verdict == verdict
    assert words in finding.summary


def test_a_port_that_is_taken_fails(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("", 0)) as taken:
        monkeypatch.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        finding = run_one("distributed.port", root=root)
        assert finding.verdict == "failed"
        assert "EADDRINUSE" in finding.evidence[0]
    assert run_one("distributed.port", root=root).verdict == "ok"


@pytest.mark.parametrize("port", ["", "http", "70000", "0"])
def test_a_port_that_is_none_fails(root: Root, monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("MASTER_PORT", port)
    assert run_one("distributed.port", root=root).verdict == "failed"


def test_without_a_port_the_default_is_looked_at(root: Root) -> None:
    assert run_one("distributed.port", root=root).verdict == "ok"

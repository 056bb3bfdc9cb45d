"""Whether ranks find each other, and whether NCCL and gloo add up right."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.checks.gpu import sees_no_gpu
from envbuilder.doctor.installed import read_torch
from envbuilder.doctor.rank_run import TIMEOUT_S, command_again, run_ranks, slowest_links
from envbuilder.doctor.signatures import remedy_for
from envbuilder.doctor.subject import Subject
from envbuilder.process import run
from envbuilder.report import Reporter

_SLOW_RENDEZVOUS_S = 10.0
_OF_LINKS = 0.3
"""The part of the NVLinks' rate below which an all-reduce has not used them; sound ones reach twice that."""


def check_gloo(subject: Subject, reporter: Reporter) -> Outcome:
    """Two ranks on the CPU (ranks.py)."""
    if read_torch(subject.import_path) is None:
        return skipped("The env has no torch.")
    report = run_ranks(subject.python, "gloo", subject.variables, remedy=subject.remake_env)
    return judge_ranks("gloo", report, command_again(subject.python, "gloo"), None)


def check_nccl(subject: Subject, reporter: Reporter) -> Outcome:
    """One rank for each visible GPU (ranks.py)."""
    if read_torch(subject.import_path) is None:
        return skipped("The env has no torch.")
    if subject.nccl.problem:
        raise subject.nccl.problem
    again = command_again(subject.python, "nccl")
    return judge_ranks("nccl", subject.nccl.report, again, slowest_links())


def judge_ranks(backend: str, report: dict[str, Any], again: str, link_gbs: float | None) -> Outcome:
    """The verdict on what ranks.py prints; `again` shows more, `link_gbs` is what a GPU's NVLinks carry."""
    ranks = report["ranks"]
    if not ranks:
        return sees_no_gpu("so NCCL has nothing to join", "", "RECIPE")
    evidence = [_rank(rank) for rank in ranks] + _settings(backend)
    if broken := [rank for rank in ranks if rank["error"]]:
        first = next((rank for rank in broken if "hangs" not in rank["error"]), broken[0])
        named = next((name for name in _IFNAMES[backend] if name in os.environ), None)
        interfaces = f"unset {named}, or name one of: {', '.join(addresses())}" if named else None
        return failed(
            f"{backend} does not get {report['world']} ranks through their {first['stage']}.",
            *evidence,
            remedy=interfaces or remedy_for(first["error"], "RECIPE") or f"See where it stops: {again}",
        )
    if wrong := [rank for rank in ranks if rank["wrong"]]:
        dtypes = ", ".join(dict.fromkeys(dtype for rank in wrong for dtype in rank["wrong"]))
        return failed(
            f"{backend} adds up wrongly in {dtypes}, on rank {', '.join(str(r['rank']) for r in wrong)}.",
            *evidence,
            remedy="Try NCCL_P2P_DISABLE=1 (copies between GPUs, held up by the host's IOMMU) and "
            f"NCCL_ALGO=Ring, one after the other, with: {again}",
        )
    slowest = max(rank["rendezvous_s"] for rank in ranks)
    if slowest > _SLOW_RENDEZVOUS_S:
        return warning(
            f"{backend} works, but its ranks took {slowest:.0f} s to find each other.",
            *evidence,
            remedy="Look at names that don't resolve: envbuilder doctor --only distributed.names",
        )
    rate = min(rank["bus_gbs"] for rank in ranks)
    if link_gbs and report["world"] > 1 and rate < _OF_LINKS * link_gbs:
        return warning(
            f"NCCL moves {rate:.0f} GB/s, and each GPU's NVLinks carry {link_gbs:.0f}: it goes another way.",
            *evidence,
            remedy=f"unset NCCL_P2P_DISABLE NCCL_P2P_LEVEL; then see which way it takes: {again}",
        )
    return ok(
        f"{backend} joins {report['world']} ranks and adds up right in float32 and bfloat16.", *evidence
    )


def _rank(rank: dict[str, Any]) -> str:
    if rank["error"]:
        return f"rank {rank['rank']}: {rank['stage']}: {rank['error']}"
    return (
        f"rank {rank['rank']}: joined in {rank['rendezvous_s']:.2f} s, "
        f"bus bandwidth {rank['bus_gbs']:.1f} GB/s, wrong in: {', '.join(rank['wrong']) or 'nothing'}"
    )


_IFNAMES = {"nccl": ("NCCL_SOCKET_IFNAME",), "gloo": ("GLOO_SOCKET_IFNAME",)}


def _settings(backend: str) -> list[str]:
    return [
        f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(backend.upper())
    ]


def check_interfaces(subject: Subject, reporter: Reporter) -> Outcome:
    """What the variables that choose network interfaces say, against the interfaces that are there."""
    there = addresses()
    evidence = [f"{name}: {address or 'no IPv4 address'}" for name, address in there.items()]
    usable = [name for name, address in there.items() if address]
    for variable, choose in (
        ("NCCL_SOCKET_IFNAME", chosen_by_nccl),
        ("GLOO_SOCKET_IFNAME", _chosen_by_gloo),
    ):
        if not (value := os.environ.get(variable)):
            continue
        chosen, missing = choose(value, usable)
        evidence.append(f"{variable}={value} chooses {', '.join(chosen) or 'nothing'}")
        if missing:
            others = ", ".join(name for name in usable if name != "lo") or "lo"
            return failed(
                f"{variable} names {', '.join(missing)}, which is no interface with an address here.",
                *evidence,
                remedy=f"unset {variable}, or name one that every node of the job has: {others}",
            )
    adapters = {path.name for path in Path("/sys/class/infiniband").glob("*")}
    named = os.environ.get("NCCL_IB_HCA", "").lstrip("^=").split(",")
    absent = [name for name in named if name and not any(a.startswith(name.split(":")[0]) for a in adapters)]
    if absent:
        return warning(
            f"NCCL_IB_HCA names {', '.join(absent)}, which is not here.",
            *evidence,
            f"adapters: {', '.join(sorted(adapters)) or 'none'}",
            remedy="unset NCCL_IB_HCA: NCCL finds the adapters itself",
        )
    return ok(f"{len(usable)} network interfaces have an address.", *evidence)


def addresses() -> dict[str, str | None]:
    """Interface → its IPv4 address."""
    found: dict[str, str | None] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                found[name] = socket.inet_ntoa(answer[20:24])
            except OSError:
                found[name] = None
    return found


_SIOCGIFADDR = 0x8915
"""netdevice(7)."""


def chosen_by_nccl(value: str, usable: list[str]) -> tuple[list[str], list[str]]:
    """Interfaces that NCCL_SOCKET_IFNAME chooses, and the names in it that choose none.

    A list of prefixes; after "=" of whole names, after "^" of those to leave out.
    """
    excluded, exact = value.startswith("^"), value.lstrip("^").startswith("=")
    names = [name for name in value.lstrip("^=").split(",") if name]

    def matches(interface: str, name: str) -> bool:
        return interface == name if exact else interface.startswith(name)

    matching = [interface for interface in usable if any(matches(interface, name) for name in names)]
    if excluded:
        left = [interface for interface in usable if interface not in matching]
        return left, [] if left else [value]
    return matching, [] if matching else names


def _chosen_by_gloo(value: str, usable: list[str]) -> tuple[list[str], list[str]]:
    names = [name for name in value.split(",") if name]
    return [name for name in names if name in usable], [name for name in names if name not in usable]


@dataclass(frozen=True)
class Resolved:
    """What came of looking a host's name up."""

    addresses: tuple[str, ...]
    problem: str | None
    seconds: float

    def __str__(self) -> str:
        return self.problem or f"{', '.join(self.addresses)} ({self.seconds:.1f} s)"


_NAME_LIMIT_S = 10.0
_SLOW_NAME_S = 3.0
_MOST_NODES = 64


def resolve(names: Iterable[str]) -> dict[str, Resolved]:
    """Looks all names up at once; one that takes longer than the limit has that as its problem."""
    found: dict[str, Resolved] = {}
    threads = [threading.Thread(target=_resolve, args=(name, found), daemon=True) for name in names]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + _NAME_LIMIT_S
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    late = Resolved((), f"no answer in {_NAME_LIMIT_S:.0f} s", _NAME_LIMIT_S)
    return {name: found.get(name, late) for name in names}


def _resolve(name: str, found: dict[str, Resolved]) -> None:
    started = time.monotonic()
    try:
        answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
        addresses, problem = tuple(dict.fromkeys(str(answer[4][0]) for answer in answers)), None
    except (OSError, UnicodeError) as error:
        addresses, problem = (), f"{type(error).__name__}: {error}"
    found[name] = Resolved(addresses, problem, time.monotonic() - started)


def check_names(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether this host's name, MASTER_ADDR and the names of the job's nodes lead to addresses."""
    own, master = socket.gethostname(), os.environ.get("MASTER_ADDR", "")
    nodes, note = job_nodes()
    found = resolve(dict.fromkeys(name for name in (own, master, *nodes) if name))
    evidence = [f"{name}: {answer}" for name, answer in found.items()] + ([note] if note else [])
    if master and found[master].problem:
        first = 'scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1' if nodes else "hostname"
        return failed(
            f"MASTER_ADDR={master} leads nowhere: every rank would wait for it, for minutes.",
            *evidence,
            remedy=f"export MASTER_ADDR=$({first})" if nodes else "unset MASTER_ADDR, for one node",
        )
    if lost := [name for name in nodes if found[name].problem]:
        return failed(
            f"{len(lost)} of the job's {len(nodes)} nodes can't be found by name: {', '.join(lost[:5])}.",
            *evidence,
            remedy='Take an address instead: export MASTER_ADDR=$(srun -N1 -n1 -w "$(scontrol show hostnames '
            '"$SLURM_JOB_NODELIST" | head -n 1)" hostname -I | cut -d\' \' -f1); and report it to the '
            "administrators",
        )
    here = found[own]
    if here.problem or here.seconds > _SLOW_NAME_S:
        return warning(
            f"This host's own name {own} leads nowhere: torchrun's workers look for rank 0 under it and hang."
            if here.problem
            else f"Looking this host's own name up takes {here.seconds:.0f} s.",
            *evidence,
            remedy="torchrun --local-addr 127.0.0.1, on one node (envbuilder train does it so); else ask the "
            f"administrators for an entry of {own} in /etc/hosts",
        )
    if len(nodes) > 1 and all(address.startswith("127.") for address in here.addresses):
        choices = [name for name, address in addresses().items() if address and name != "lo"]
        return warning(
            f"{own} leads to this node alone ({', '.join(here.addresses)}): gloo would tell the job's other "
            "nodes that address.",
            *evidence,
            remedy=f"export GLOO_SOCKET_IFNAME={choices[0] if choices else 'INTERFACE'}",
        )
    return ok("The names that ranks meet under lead to addresses.", *evidence)


def job_nodes() -> tuple[list[str], str | None]:
    """The nodes of the Slurm job that this runs in, and why they are not known."""
    nodes = os.environ.get("SLURM_JOB_NODELIST")
    if not nodes:
        return [], None
    if shutil.which("scontrol") is None:
        return [], f"SLURM_JOB_NODELIST={nodes}: there is no scontrol to tell the names in it"
    answer = run(["scontrol", "show", "hostnames", nodes], timeout_s=10)
    if answer.returncode != 0:
        return [], f"scontrol show hostnames {nodes}: {answer.output.strip()}"
    names = answer.output.split()
    more = f"{len(names) - _MOST_NODES} more nodes were not looked up" if len(names) > _MOST_NODES else None
    return names[:_MOST_NODES], more


DEFAULT_PORT = 29500
"""torch.distributed's, where MASTER_PORT is not set."""


def check_port(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether rank 0 could listen on MASTER_PORT."""
    text = os.environ.get("MASTER_PORT")
    if text is not None and not (text.isdigit() and 0 < int(text) < 2**16):
        return failed(
            "MASTER_PORT is no port.",
            f"MASTER_PORT={text}",
            remedy="export MASTER_PORT=$((29500 + RANDOM % 10000))",
        )
    port = int(text) if text else DEFAULT_PORT
    problem = _bind_problem(port)
    evidence = f"port {port} ({'MASTER_PORT' if text else 'the default'}): {problem or 'free'}"
    if text and problem:
        return failed(
            f"MASTER_PORT={port} can't be listened on here.",
            evidence,
            remedy="export MASTER_PORT=$((29500 + RANDOM % 10000)), the same on all nodes of the job",
        )
    if problem:
        return ok("torchrun's own port is taken: name another, or use --standalone, as train does.", evidence)
    return ok("The port that rank 0 listens on is free.", evidence)


def _bind_problem(port: int) -> str | None:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch's own store does
        try:
            listener.bind(("", port))
            listener.listen()
        except OSError as error:
            return errno.errorcode.get(error.errno or 0, "") + f": {error.strerror}"
    return None


CHECKS: tuple[Check, ...] = (
    Check(
        "distributed.interfaces",
        "network interfaces",
        "NCCL_SOCKET_IFNAME, GLOO_SOCKET_IFNAME and NCCL_IB_HCA against what is there",
        check_interfaces,
    ),
    Check(
        "distributed.names",
        "names of the nodes",
        "whether this host's name, MASTER_ADDR and the job's nodes can be looked up, and how fast",
        check_names,
    ),
    Check(
        "distributed.port",
        "the port of rank 0",
        "whether MASTER_PORT is free",
        check_port,
    ),
    Check(
        "distributed.gloo",
        "gloo on the CPU",
        "two ranks that find each other and add up numbers",
        check_gloo,
        needs=("recipe", "env", "addresses"),
        # It works on the CPU, but importing torch takes longer than all quick checks together.
        cost="gpu",
        limit_s=TIMEOUT_S["gloo"] + 10,
    ),
    Check(
        "distributed.nccl",
        "NCCL on the GPUs",
        "one rank for each GPU: whether they add up right, and how fast",
        check_nccl,
        needs=("recipe", "env", "gpu"),
        cost="gpu",
        limit_s=TIMEOUT_S["nccl"] + 10,
    ),
)

"""The way from GPU to GPU and from node to node: that it is the fast one, and leads to the job's nodes."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.checks.distributed import Resolved, addresses, chosen_by_nccl, job_nodes, resolve
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.installed import read_torch
from envbuilder.doctor.rank_run import TIMEOUT_S, command_again, slowest_links
from envbuilder.doctor.subject import Subject
from envbuilder.fabric import SLINGSHOT, FabricPort, active_ports, link_speed_gbits
from envbuilder.nccl_log import TCP, NcclLog
from envbuilder.report import Reporter
from envbuilder.site import NODE_SUFFIX_VARIABLE

_PORT = 15_000
"""The first of those at which training meets. That nobody listens there is an answer too."""
_ANSWER_S = 5.0


def check_transport(subject: Subject, reporter: Reporter) -> Outcome:
    """Which ways NCCL takes between this node's GPUs, and would take to other nodes."""
    if read_torch(subject.import_path) is None:
        return skipped("The env has no torch.")
    if subject.nccl.problem or not subject.nccl.report["ranks"]:
        return skipped("NCCL does not run here: distributed.nccl tells why.")
    return judge_transport(
        subject.nccl.log,
        active_ports(),
        nodes=_nodes(subject),
        has_links=slowest_links() is not None,
        again=command_again(subject.python, "nccl"),
    )


def _nodes(subject: Subject) -> int:
    """Those of the job that this runs in, or as many as the site's trainings ask for."""
    told = os.environ.get("SLURM_JOB_NUM_NODES", "")
    return max(int(told) if told.isdigit() else 1, subject.site.train.nodes if subject.site else 1)


def judge_transport(
    log: NcclLog, ports: tuple[FabricPort, ...], *, nodes: int, has_links: bool, again: str
) -> Outcome:
    """The verdict on what NCCL said of its ways, on a node of `nodes` with these fabric ports up."""
    if log.network is None:
        return skipped("NCCL's log does not say which network it takes.")
    ways = ", ".join(f"{name} ({count} channels)" for name, count in sorted(log.ways.items()))
    evidence = [
        f"between the GPUs of this node: {ways or 'nothing, for there is one'}",
        f"from node to node: {log.network}",
        f"fabric: {', '.join(map(str, ports)) or 'none'}",
        *([f"interface: {_described(log.interface)}"] if log.interface else []),
        *(f"NCCL: {reason}" for reason in log.reasons),
    ]
    if log.network == TCP and (ports or nodes > 1):
        return _over_tcp(log, ports, nodes, evidence, again)
    if (has_links and "SHM" in log.ways) or any(way.startswith("NET/") for way in log.ways):
        return warning(
            f"NCCL goes through the host ({', '.join(sorted(log.ways))}) between the GPUs of this node, not "
            "from GPU to GPU.",
            *shown(evidence),
            remedy="unset NCCL_P2P_DISABLE NCCL_P2P_LEVEL NCCL_SHM_DISABLE; then see which way it takes: "
            f"{again}",
        )
    return ok(f"NCCL takes {log.network} from node to node.", *shown(evidence))


def _over_tcp(
    log: NcclLog, ports: tuple[FabricPort, ...], nodes: int, evidence: list[str], again: str
) -> Outcome:
    over = f"TCP over {log.interface}" if log.interface else "TCP"
    if not ports:
        return warning(
            f"NCCL goes from node to node by {over}, and no faster network is on this node.",
            *shown(evidence),
            remedy="See whether the nodes have one: ls /sys/class/infiniband; else train on one node (nodes "
            "= 1 under [train] in the site file), or name the fastest interface as socket-ifname there",
        )
    # One node alone doesn't use it: nothing is slow yet.
    return (failed if nodes > 1 else warning)(
        f"NCCL goes from node to node by {over}, though this node has {', '.join(map(str, ports[:4]))}.",
        *shown(evidence),
        remedy=_to_the_fabric(ports, again),
    )


def _to_the_fabric(ports: tuple[FabricPort, ...], again: str) -> str:
    named = [name for name in ("NCCL_IB_DISABLE", "NCCL_IB_HCA", "NCCL_NET") if name in os.environ]
    if named:
        return f"unset {' '.join(named)}; then see which way it takes: {again}"
    if any(port.kind == SLINGSHOT for port in ports):
        return (
            "Slingshot needs the plugin aws-ofi-nccl: module avail ofi; add its module to modules in the "
            f"site file. Then see which way it takes: {again}"
        )
    return (
        "NCCL needs libibverbs and /dev/infiniband: ldconfig -p | grep libibverbs; ls /dev/infiniband; in a "
        f"container, show it both. Then see which way it takes: {again}"
    )


def _described(interface: str) -> str:
    speed = link_speed_gbits(interface)
    return f"{interface}, {speed:g} Gbit/s at most" if speed else interface


@dataclass(frozen=True)
class _Peer:
    """Another node of the job, as it is found from here."""

    name: str
    address: str | None = None
    interface: str = "no interface"
    """Of this node, on the way there."""
    problem: str | None = None

    def __str__(self) -> str:
        way = f"{self.address} through {self.interface}: " if self.address else ""
        return f"{self.name}: {way}{self.problem or 'answers'}"


def check_peers(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether the other nodes of the job answer, and through which interface."""
    nodes, note = job_nodes()
    if len(nodes) < 2:
        return skipped(note or "This runs in no job of several nodes.")
    names = [name + os.environ.get(NODE_SUFFIX_VARIABLE, "") for name in nodes]
    own = os.environ.get("SLURMD_NODENAME", "")
    wanted = os.environ.get("NCCL_SOCKET_IFNAME", "")
    here = {name: address for name, address in addresses().items() if address}
    chosen = chosen_by_nccl(wanted, list(here))[0] if wanted else []
    source = here[chosen[0]] if chosen else ""
    found = resolve([name for name, node in zip(names, nodes) if node != own])
    peers = [_find(name, answer, here, source) for name, answer in found.items()]
    evidence = [f"NCCL_SOCKET_IFNAME={wanted}"] if wanted else []
    evidence += map(str, peers)
    if silent := [peer.name for peer in peers if peer.problem]:
        return failed(
            f"{len(silent)} of the job's {len(peers)} other nodes don't answer: {', '.join(silent[:5])}.",
            *shown(evidence),
            remedy="In the site file, set socket-ifname to an interface by which all nodes reach one another "
            f"and node-suffix to what their names end with there; here are: {', '.join(here)}",
        )
    through = sorted({peer.interface for peer in peers})
    if chosen and not set(through) & set(chosen):
        return warning(
            f"NCCL_SOCKET_IFNAME chooses {', '.join(chosen)}, and the way to the other nodes is through "
            f"{', '.join(through)}.",
            *shown(evidence),
            remedy=f"In the site file, set socket-ifname to {through[0]}, or node-suffix to what the nodes' "
            f"names end with on {chosen[0]}",
        )
    return ok(f"The job's {len(peers)} other nodes answer, through {', '.join(through)}.", *shown(evidence))


def _find(name: str, found: Resolved, here: dict[str, str], source: str) -> _Peer:
    if not found.addresses:
        return _Peer(name, problem=str(found))
    address = found.addresses[0]
    way = _source_to(address)
    interface = next((interface for interface, own in here.items() if own == way), "no interface")
    return _Peer(name, address, interface, _why_no_answer(address, source))


def _why_no_answer(address: str, source: str) -> str | None:
    """Why the node at `address` gives no answer to who asks from `source`; None where it does."""
    try:
        socket.create_connection((address, _PORT), _ANSWER_S, (source, 0) if source else None).close()
    except ConnectionRefusedError:
        return None
    except OSError as error:
        return f"no answer: {error}"
    return None


def _source_to(address: str) -> str:
    """This node's address on the way to `address`, as the kernel routes it; nothing is sent."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, _PORT))
        except OSError:
            return ""
        return str(probe.getsockname()[0])


CHECKS: tuple[Check, ...] = (
    Check(
        "distributed.transport",
        "NCCL's ways",
        "by which way NCCL goes between this node's GPUs and to other nodes: not over TCP where there is "
        "InfiniBand, RoCE or Slingshot",
        check_transport,
        needs=("recipe", "env", "gpu"),
        cost="gpu",
        limit_s=TIMEOUT_S["nccl"] + 10,
    ),
    Check(
        "distributed.peers",
        "the job's other nodes",
        "in a job of several nodes: whether the others answer, and through which interface",
        check_peers,
    ),
)

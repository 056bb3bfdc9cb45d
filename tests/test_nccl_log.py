"""Lines of NCCL as it prints them, from 2.18 to 2.28."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.fabric import FabricPort, active_ports, link_speed_gbits
from envbuilder.nccl_log import parse_nccl_log, read_nccl_log

SOCKET_2_18 = """
node1:919:919 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.4<0>
node1:919:919 [0] NCCL INFO NET/Plugin : No plugin found (libnccl-net.so), using internal implementation
node1:919:1150 [0] NCCL INFO NET/IB : No device found.
node1:919:1150 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.4<0>
node1:919:1150 [0] NCCL INFO Using network Socket
node1:919:1150 [0] NCCL INFO Channel 00/0 : 8[0] -> 15[7] via P2P/IPC/read
node1:926:1151 [7] NCCL INFO Channel 03/0 : 15[7] -> 6[6] [send] via NET/Socket/3
node1:926:1151 [7] NCCL INFO Channel 07/0 : 15[7] -> 6[6] [send] via NET/Socket/3
"""
SOCKET_2_28 = """
node1:77:77 [0] NCCL INFO Bootstrap: Using enp3s0:10.0.0.4<0>
node1:77:91 [0] NCCL INFO NET/Plugin: Could not find: libnccl-net.so
node1:77:91 [0] NCCL INFO NCCL_IB_DISABLE set by environment to 1.
node1:77:91 [0] NCCL INFO NET/Socket : Using [0]enp3s0:10.0.0.4<0>
node1:77:91 [0] NCCL INFO Initialized NET plugin Socket
node1:77:91 [0] NCCL INFO Assigned NET plugin Socket to comm
node1:77:91 [0] NCCL INFO Channel 00 : 0[0] -> 1[1] via SHM/direct/direct
"""
INFINIBAND = """
swat1:17630:17630 [5] NCCL INFO Bootstrap : Using ibs65:10.10.10.100<0>
swat1:17630:17699 [5] NCCL INFO NET/IB : Using [0]mlx5_0:1/IB [1]mlx5_1:1/IB [RO]; OOB ibs65:10.10.10.100<0>
swat1:17630:17699 [5] NCCL INFO Using non-device net plugin version 0
swat1:17630:17699 [5] NCCL INFO Using network IB
swat1:17630:17697 [7] NCCL INFO Channel 00/0 : 7[7] -> 6[6] via P2P/direct pointer/read
swat1:17630:17697 [7] NCCL INFO Channel 01/0 : 7[7] -> 6[6] via P2P/CUMEM
swat1:17630:17699 [5] NCCL INFO Channel 03/0 : 5[5] -> 12[4] [send] via NET/IB/3/GDRDMA
"""
SLINGSHOT = """
nid000019:51404:51404 [0] NCCL INFO Bootstrap : Using hsn0:10.100.0.19<0>
nid000019:51404:52019 [0] NCCL INFO NET/OFI Selected Provider is cxi (found 4 nics)
nid000019:51404:52019 [0] NCCL INFO Using network AWS Libfabric
nid000019:51404:52019 [0] NCCL INFO Channel 00/0 : 3[3] -> 4[0] [receive] via NET/AWS Libfabric/0/GDRDMA
"""


@pytest.mark.parametrize(
    ("text", "network", "interface", "ways", "over_tcp"),
    [
        (SOCKET_2_18, "Socket", "eth0", {"P2P": 1, "NET/Socket": 2}, True),
        (SOCKET_2_28, "Socket", "enp3s0", {"SHM": 1}, False),
        (INFINIBAND, "IB", "ibs65", {"P2P": 2, "NET/IB": 1}, False),
        (SLINGSHOT, "AWS Libfabric", "hsn0", {"NET/AWS Libfabric": 1}, False),
        ("step 1 loss 2.5\nnothing of NCCL via NET/Socket/1\n", None, None, {}, False),
    ],
)
def test_the_ways_are_read(
    text: str, network: str | None, interface: str | None, ways: dict[str, int], over_tcp: bool
) -> None:
    log = parse_nccl_log(text.splitlines())
    assert (log.network, log.interface, log.ways) == (network, interface, ways)
    assert log.goes_over_tcp is over_tcp


def test_why_a_way_is_not_taken_is_read_once() -> None:
    assert parse_nccl_log((SOCKET_2_18 * 2).splitlines()).reasons == (
        "NET/Plugin : No plugin found (libnccl-net.so), using internal implementation",
        "NET/IB : No device found.",
    )
    assert parse_nccl_log(SOCKET_2_28.splitlines()).reasons == (
        "NET/Plugin: Could not find: libnccl-net.so",
        "NCCL_IB_DISABLE set by environment to 1.",
    )
    assert parse_nccl_log(INFINIBAND.splitlines()).reasons == ()


def test_the_logs_of_all_ranks_count_and_a_missing_one_does_not(tmp_path: Path) -> None:
    for name, text in (("one", SOCKET_2_18), ("two", SOCKET_2_28)):
        (tmp_path / name).write_text(text)
    log = read_nccl_log([tmp_path / "none", tmp_path / "one", tmp_path / "two"])
    assert log.ways == {"P2P": 1, "NET/Socket": 2, "SHM": 1}


def port(classes: Path, device: str, state: str, layer: str) -> None:
    folder = classes / "infiniband" / device / "ports" / "1"
    folder.mkdir(parents=True)
    (folder / "state").write_text(f"{state}\n")
    (folder / "link_layer").write_text(f"{layer}\n")


def test_the_ports_that_are_up_are_found(tmp_path: Path) -> None:
    assert active_ports(tmp_path) == ()
    port(tmp_path, "mlx5_0", "4: ACTIVE", "InfiniBand")
    port(tmp_path, "mlx5_1", "1: DOWN", "InfiniBand")
    port(tmp_path, "mlx5_2", "4: ACTIVE", "Ethernet")
    port(tmp_path, "efa_0", "4: ACTIVE", "Unspecified")
    (tmp_path / "cxi" / "cxi0").mkdir(parents=True)
    assert active_ports(tmp_path) == (
        FabricPort("efa_0:1", "RDMA"),
        FabricPort("mlx5_0:1", "InfiniBand"),
        FabricPort("mlx5_2:1", "RoCE"),
        FabricPort("cxi0", "Slingshot"),
    )


@pytest.mark.parametrize(("text", "speed"), [("25000\n", 25.0), ("-1\n", None), ("", None)])
def test_the_speed_of_a_link_is_what_the_kernel_says(tmp_path: Path, text: str, speed: float | None) -> None:
    (tmp_path / "net" / "eth0").mkdir(parents=True)
    (tmp_path / "net" / "eth0" / "speed").write_text(text)
    assert link_speed_gbits("eth0", tmp_path) == speed
    assert link_speed_gbits("eth1", tmp_path) is None

"""The fast network of a cluster, as the kernel shows it on a node: InfiniBand, RoCE or Slingshot."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_CLASSES = Path("/sys/class")
_KINDS = {"InfiniBand": "InfiniBand", "Ethernet": "RoCE"}
"""A port's link layer → what the network is called then."""
SLINGSHOT = "Slingshot"


@dataclass(frozen=True)
class FabricPort:
    """A port that is up."""

    name: str
    """E.g. "mlx5_0:1", "cxi0"."""
    kind: str

    def __str__(self) -> str:
        return f"{self.name} ({self.kind})"


def active_ports(classes: Path = _CLASSES) -> tuple[FabricPort, ...]:
    """The ports that are up, sorted; `classes` is the kernel's /sys/class."""
    return (*_rdma_ports(classes), *_slingshot_ports(classes))


def _rdma_ports(classes: Path) -> Iterator[FabricPort]:
    for port in sorted(classes.glob("infiniband/*/ports/*")):
        # "4: ACTIVE"
        if _text(port / "state").endswith("ACTIVE"):
            kind = _KINDS.get(_text(port / "link_layer"), "RDMA")
            yield FabricPort(f"{port.parents[1].name}:{port.name}", kind)


def _slingshot_ports(classes: Path) -> Iterator[FabricPort]:
    for device in sorted(classes.glob("cxi/cxi*")):
        yield FabricPort(device.name, SLINGSHOT)


def _text(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="ascii").strip()
    return ""


def link_speed_gbits(interface: str, classes: Path = _CLASSES) -> float | None:
    """What the interface's link carries, in Gbit/s; None where the kernel doesn't tell."""
    with suppress(ValueError):
        speed = int(_text(classes / "net" / interface / "speed"))
        return speed / 1000 if speed > 0 else None
    return None

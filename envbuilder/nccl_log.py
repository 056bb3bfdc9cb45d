"""What NCCL says of the ways that it takes, in what it writes with NCCL_DEBUG=INFO."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

TCP = "Socket"
"""NCCL's name of its network over TCP."""
_LINE = re.compile(r"NCCL (?:INFO|WARN) (.*)")
# Until 2.26 "Using network Socket", then "Assigned NET plugin Socket to comm".
_NETWORK = re.compile(r"(?:Using network (.+)|Assigned NET plugin (.+) to comm)$")
_BOOTSTRAP = re.compile(r"Bootstrap ?: Using (?:\[\d+\])?([^:\s]+):\S+$")
# "Channel 00/0 : 1[1] -> 2[0] [send] via NET/IB/0/GDRDMA"
_CHANNEL = re.compile(r"Channel \d+(?:/\d+)? : .* via (NET/[^/]+|P2P|SHM|direct shared memory)")
_REASON = re.compile(
    r"NET/IB ?: No (?:device|IP interface) found"
    r"|NET/Plugin.*(?:No plugin found|[Cc]ould not find|cannot open)"
    r"|Failed to (?:open libibverbs|initialize NET plugin)"
    r"|NCCL_(?:IB_\w+|NET|NET_PLUGIN|P2P_\w+|SHM_\w+) set (?:by environment )?to"
    r"|P2P is disabled between|NET/OFI .*(?:[Ff]ailed|[Ee]rror|no .*provider)"
)


@dataclass(frozen=True)
class NcclLog:
    """The ways of the ranks whose lines were read."""

    network: str | None = None
    """How it goes, or would go, from node to node: "IB", "Socket", "AWS Libfabric"; None: it doesn't say."""
    interface: str | None = None
    """The interface by which ranks find each other, e.g. "ib0"."""
    ways: Mapping[str, int] = field(default_factory=dict)
    """"P2P" (between GPUs), "SHM" (through the host's memory), "NET/IB", "NET/Socket" → channels."""
    reasons: tuple[str, ...] = ()
    """What it says of ways that it does not take, each once."""

    @property
    def goes_over_tcp(self) -> bool:
        """Whether data go over TCP between two ranks."""
        return f"NET/{TCP}" in self.ways


def read_nccl_log(files: Iterable[Path]) -> NcclLog:
    """What NCCL's logs in `files` say; one that can't be read says nothing."""
    return parse_nccl_log(line for path in files for line in _lines(path))


def _lines(path: Path) -> Iterator[str]:
    with suppress(OSError):
        yield from path.read_text(encoding="utf-8", errors="replace").splitlines()


def parse_nccl_log(lines: Iterable[str]) -> NcclLog:
    """What `lines` say, among which there may be others than NCCL's."""
    network = interface = None
    ways: Counter[str] = Counter()
    reasons: list[str] = []
    for line in lines:
        if not (said := _LINE.search(line)):
            continue
        text = said[1].strip()
        if found := _NETWORK.match(text):
            network = found[1] or found[2]
        elif found := _BOOTSTRAP.match(text):
            interface = found[1]
        elif found := _CHANNEL.match(text):
            ways["SHM" if found[1] == "direct shared memory" else found[1]] += 1
        elif _REASON.search(text):
            reasons.append(text)
    return NcclLog(network, interface, dict(ways), tuple(dict.fromkeys(reasons)))

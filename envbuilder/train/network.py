"""What NCCL says of its way from node to node, kept in the run: a fall-back to TCP is silent otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from envbuilder.fabric import active_ports
from envbuilder.nccl_log import read_nccl_log
from envbuilder.report import Reporter


def nccl_log_variables(environ: Mapping[str, str], run: Path) -> dict[str, str]:
    """The variables that have each process write NCCL's log into the run; none where a user set others."""
    if "NCCL_DEBUG" in environ:
        return {}
    # Beside what torchrun writes, which makes this folder before it starts a process.
    return {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(run / "ranks" / "nccl.%h.%p.log")}


def warn_of_tcp(run: Path, reporter: Reporter) -> None:
    """Says so where NCCL goes over TCP in this part of the run, which began when its stamp was written."""
    began = (run / "stamp.json").stat().st_mtime
    files = [path for path in sorted(run.glob("ranks/nccl.*.log")) if path.stat().st_mtime >= began]
    if not read_nccl_log(files).goes_over_tcp:
        return
    ports = ", ".join(map(str, active_ports()[:4]))
    reporter.warn(
        f"NCCL goes over TCP between the nodes{f', though this node has {ports}' if ports else ''}; "
        f"why, is in: envbuilder doctor --log {files[0]}"
    )

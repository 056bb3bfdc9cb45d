"""Runs ranks.py by the env's interpreter, with NCCL's own log of how it did it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from envbuilder.doctor.scripts import run_script
from envbuilder.errors import MismatchError
from envbuilder.gpu import read_links
from envbuilder.nccl_log import NcclLog, read_nccl_log

_LIMIT_S = {"gloo": 30, "nccl": 120}
"""For the ranks alone. NCCL looks over the whole machine at its first call."""
_IMPORTS_S = 90
"""For importing torch, from a busy shared disk."""
TIMEOUT_S = {backend: limit + _IMPORTS_S for backend, limit in _LIMIT_S.items()}
_OPTIONS = {"gloo": ("--world", "2", "--bytes", str(2**20)), "nccl": ()}


@dataclass(frozen=True)
class NcclRun:
    """What the ranks told, and NCCL of itself."""

    report: dict[str, Any] = field(default_factory=dict)
    """What ranks.py prints."""
    log: NcclLog = field(default_factory=NcclLog)
    problem: MismatchError | None = None
    """Why there is no report."""


def run_ranks(python: Path, backend: str, variables: Mapping[str, str], *, remedy: str) -> dict[str, Any]:
    """What ranks.py prints; MismatchError with `remedy` where it prints nothing."""
    words = ("--backend", backend, "--limit", str(_LIMIT_S[backend]), *_OPTIONS[backend])
    return run_script(python, "ranks.py", *words, timeout_s=TIMEOUT_S[backend], remedy=remedy, env=variables)


def run_nccl(python: Path, variables: Mapping[str, str], *, remedy: str) -> NcclRun:
    """One rank a GPU; NCCL's log is kept whatever the shell says of it."""
    with tempfile.TemporaryDirectory(prefix="doctor-nccl-") as folder:
        kept = {name: value for name, value in variables.items() if not name.startswith("NCCL_DEBUG")}
        env = {**kept, "NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": f"{folder}/%h.%p"}
        try:
            report = run_ranks(python, "nccl", env, remedy=remedy)
        except MismatchError as error:
            return NcclRun(problem=error)
        return NcclRun(report, read_nccl_log(sorted(Path(folder).iterdir())))


def command_again(python: Path, backend: str) -> str:
    """The command that runs the ranks with all that NCCL says."""
    script = Path(__file__).with_name("ranks.py")
    return " ".join(
        ("NCCL_DEBUG=INFO", str(python), "-P", str(script), "--backend", backend, *_OPTIONS[backend])
    )


def slowest_links() -> float | None:
    """What the NVLinks of a GPU carry together in GB/s, of the GPU with the least; None without any."""
    return min((sum(rates) for rates in read_links().values()), default=None)

"""Checks in a process or a control group of their own, where the tests' own can't be limited."""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from envbuilder.cgroup import Limits, control_group_limits
from envbuilder.model import Finding
from envbuilder.paths import Root

_PROGRAM = """
import resource, ctypes, os, sys
from pathlib import Path
from envbuilder.doctor import Subject, choose_checks
from envbuilder.paths import Root
from envbuilder.report import Quiet

subject = Subject(None, Root(Path(sys.argv[1])), None)
exec(sys.argv[2])
for check in choose_checks(sys.argv[3:]):
    # Not by run_checks: where processes are limited, there is no thread for it.
    print(check.run(subject, Quiet()).finding(check.id).model_dump_json())
"""


def find_apart(root: Root, setup: str, *checks: str) -> dict[str, Finding]:
    """Check → its finding in a process that first did `setup`, some lines of Python."""
    ended = subprocess.run(
        [sys.executable, "-c", _PROGRAM, str(root.path), setup, *checks],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert ended.returncode == 0, ended.stderr
    findings = [Finding.model_validate_json(line) for line in ended.stdout.splitlines()]
    assert all(found.remedy or found.verdict in ("ok", "skipped") for found in findings)
    return {found.check: found for found in findings}


def limits_told_by(system: Path, **files: str) -> Callable[[], Limits]:
    """control_group_limits of a process in a job's group, whose `files` are written below `system`."""
    texts = {
        "proc/self/mountinfo": "31 23 0:28 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw",
        "proc/self/cgroup": "0::/slurm/job",
        **{f"sys/fs/cgroup/slurm/job/{name.replace('_', '.')}": text for name, text in files.items()},
    }
    for name, text in texts.items():
        path = system / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")
    return functools.partial(control_group_limits, system)

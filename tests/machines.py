"""Made-up compute nodes: their machine records, and venvs that provide packages."""

from __future__ import annotations

import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from envbuilder.machine import MachineRecord, ProbedInterpreter
from envbuilder.recipe import TargetSpec
from envbuilder.target import target_for


def machine_record(
    *,
    python: str = "3.12.4",
    machine: str = "x86_64",
    glibc: str | None = "2.34",
    implementation: str = "cpython",
    tags: tuple[str, ...] | None = None,
    provided: Mapping[str, str | None] | None = None,
) -> MachineRecord:
    """The record of a node without GPUs; `tags` are those of such an interpreter, unless given."""
    if tags is None:
        minor = ".".join(python.split(".")[:2])
        spec = TargetSpec.model_validate({"python": f"=={minor}.*", "machine": machine, "glibc": glibc})
        tags = tuple(map(str, target_for(spec, minor).tags))
    return MachineRecord(
        probed_at="2026-01-02T03:04:05+00:00",
        interpreter=ProbedInterpreter(implementation=implementation, version=python, tags=tags, markers={}),
        machine=machine,
        glibc=glibc,
        kernel="5.14.0-427.13.1.el9_4",
        driver=None,
        driver_cuda=None,
        gpus=(),
        nvcc=None,
        cc=None,
        cxx=None,
        cgroup_version=2,
        cpus=8,
        cpu_limit=None,
        memory_bytes=None,
        memory_limit_bytes=None,
        user_namespaces=True,
        scratch_free_bytes=None,
        provided=dict(provided or {}),
        torch=None,
    )


def venv_with(folder: Path, name: str, version: str) -> Path:
    """A venv that holds one distribution's metadata; returns its python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    minor = ".".join(platform.python_version_tuple()[:2])
    info = folder / "lib" / f"python{minor}" / "site-packages" / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", "utf-8")
    return folder / "bin" / "python"

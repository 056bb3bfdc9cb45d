"""The machine record, `target.json`: what `probe` found out about a compute node. Pure.

Taken along to the login node, it lets `lock` choose files for that machine. It names no host.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from envbuilder.errors import InputError
from envbuilder.toml_input import pattern

PythonVersion = Annotated[str, pattern(r"\d+\.\d+\.\d+\S*", 'a full Python version such as "3.12.4"')]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class TorchBuild:
    """The torch that extensions are linked against."""

    version: str
    """Local version included, e.g. "2.11.0+cu130"."""
    cuda: str | None
    """E.g. "13.0"; None for a torch without CUDA."""
    cxx11_abi: bool


class ProbedInterpreter(_Record):
    """The Python interpreter that environments are made for."""

    implementation: str
    """E.g. "cpython"."""
    version: PythonVersion
    tags: tuple[str, ...]
    """The wheel tags that it takes, best first (PEP 425)."""
    markers: dict[str, str]
    """Its marker environment (PEP 508)."""


class ProbedProgram(_Record):
    """A compiler."""

    path: str
    release: str | None
    """E.g. "12.2.0"."""


class ProbedGpu(_Record):
    """One GPU."""

    name: str
    compute_capability: str | None
    """E.g. "9.0"."""
    memory_bytes: int | None
    """None where the GPU uses the machine's memory."""


class MachineRecord(_Record):
    """What is None was not found, or sets no limit."""

    schema_version: Literal[1] = 1
    probed_at: str
    """ISO 8601, UTC."""
    interpreter: ProbedInterpreter
    machine: str
    """E.g. "x86_64"."""
    glibc: str | None
    """None where the C library is another one."""
    kernel: str
    driver: str | None
    """Version of the NVIDIA driver, e.g. "580.65.06"."""
    driver_cuda: str | None
    """The newest CUDA version that the driver serves, e.g. "13.0"."""
    gpus: tuple[ProbedGpu, ...]
    nvcc: ProbedProgram | None
    """The machine's own CUDA compiler."""
    cc: ProbedProgram | None
    cxx: ProbedProgram | None
    cgroup_version: Literal[1, 2] | None
    cpus: int
    """Those that this process may run on."""
    cpu_limit: float | None
    """CPU time per wall time that its control groups allow."""
    memory_bytes: int | None
    """Of the machine."""
    memory_limit_bytes: int | None
    """That its control groups allow."""
    user_namespaces: bool | None
    """Whether one could be made, tried."""
    scratch_free_bytes: int | None
    """At $TMPDIR, else /tmp."""
    provided: dict[str, str | None]
    """Normalised name → version, of the packages that were asked for."""
    torch: TorchBuild | None
    """The provided one, if it was asked for and can be imported."""


def machine_text(record: MachineRecord) -> str:
    """The text of `target.json`."""
    return record.model_dump_json(indent=2) + "\n"


def read_machine(path: Path) -> MachineRecord:
    """The record in the file `path`; InputError where it is missing, damaged or of another schema."""
    remedy = f"On the compute node: envbuilder probe --output {path}"
    try:
        return MachineRecord.model_validate_json(path.read_bytes())
    except FileNotFoundError as error:
        raise InputError(
            f"There is no machine record at {path}.", remedy=remedy, context={"file": path}
        ) from error
    except OSError as error:
        raise InputError(
            f"The machine record {path} can't be read: {error.strerror}.",
            remedy=remedy,
            context={"file": path},
        ) from error
    except ValidationError as error:
        faults = error.errors(include_url=False, include_input=False)
        keys = ", ".join(sorted({".".join(map(str, fault["loc"])) or "JSON" for fault in faults}))
        raise InputError(
            f"{path} is not a machine record that this envbuilder can use: {faults[0]['msg']} ({keys}).",
            remedy=remedy,
            context={"file": path, "keys": keys},
        ) from error

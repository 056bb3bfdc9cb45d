"""The ABI key: names the folder of a built wheel by all that its machine code depends on. Pure."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from envbuilder.gpu import architecture
from envbuilder.lock import LockedFile
from envbuilder.machine import TorchBuild
from envbuilder.requirements import required_name


@dataclass(frozen=True, slots=True)
class BuildInputs:
    """All that decides what a build makes, known before its environment is made."""

    package: str
    version: str
    sdist_sha256: str
    patches: tuple[str, ...]
    """The sha256 of each patch, in the order in which they are applied."""
    python: str
    """Minor version."""
    torch: str | None
    """Version as locked or as provided, for the readable part of the key."""
    compute_capabilities: tuple[str, ...]
    host_compiler: str
    system_nvcc: str | None
    """Version of the machine's nvcc, where that is the one used."""
    provided_torch: TorchBuild | None
    """Where torch comes from the machine; else its wheel is among `build_files`."""
    build_files: tuple[tuple[str, str], ...]
    """Name and sha256 of the locked files that shape machine code (see `shaping_files`)."""
    environment: tuple[tuple[str, str], ...]
    """The recipe's variables for the build, sorted."""

    @property
    def key(self) -> str:
        """Readable first, then a hash over everything."""
        digest = hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()
        parts = [
            f"{self.package}-{self.version}",
            f"cp{self.python.replace('.', '')}",
            *([f"torch{self.torch}"] if self.torch else []),
            *(f"sm{architecture(capability)}" for capability in self.compute_capabilities),
            digest[:12],
        ]
        return "-".join(parts)

    @property
    def build_tag(self) -> str:
        """PEP 427: begins with a digit, holds no "-"; tells two ABIs of one version apart."""
        return f"1_{self.key.rpartition('-')[2]}"


def shaping_files(build: Sequence[LockedFile], build_requires: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Of the `build` group, what shapes machine code: torch, the CUDA toolchain, the build requirements.

    The rest (torch's own Python dependencies) may move without a new build of hours.
    """
    direct = {required_name(text) for text in build_requires} | {"torch"}
    return tuple(
        sorted(
            (file.package, file.sha256)
            for file in build
            if file.package in direct or file.package.startswith(("nvidia-", "cuda-"))
        )
    )

"""The ABI key: names the folder of a built wheel by all that its machine code depends on. Pure."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from envbuilder.gpu import architecture
from envbuilder.lock import LockedFile
from envbuilder.machine import TorchBuild
from envbuilder.requirements import required_name


@dataclass(frozen=True)
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
    ptx: bool = False
    """Whether PTX is added."""
    cuda: str | None = None
    """CUDA version of the locked torch, for the readable build tag alone: `build_files` has its hashes."""

    @property
    def key(self) -> str:
        """Readable first, then a hash over everything."""
        parts = [
            f"{self.package}-{self.version}",
            f"cp{self.python.replace('.', '')}",
            *([f"torch{self.torch}"] if self.torch else []),
            *(f"sm{architecture(capability)}" for capability in self.compute_capabilities),
            self._digest[:12],
        ]
        return "-".join(parts)

    @property
    def _digest(self) -> str:
        facts = {name: value for name, value in asdict(self).items() if name != "cuda"}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def build_tag(self) -> str:
        """E.g. "1_torch2.11.0_cu130_sm90_0a1b2c3d"; tells two ABIs of one version apart.

        PEP 427: begins with a digit, holds no "-". pip and uv take letters, digits, "." and "_" after it.
        """
        parts = ["1"]
        if self.torch:
            public, _, local = self.torch.partition("+")
            parts.append(f"torch{public}")
            named = local if re.fullmatch(r"cu\d+", local) else None
            cuda = self.provided_torch.cuda if self.provided_torch else self.cuda
            if cuda or named:
                parts.append(f"cu{''.join(cuda.split('.')[:2])}" if cuda else str(named))
        parts += [f"sm{architecture(capability)}" for capability in self.compute_capabilities]
        parts.append(self._digest[:8])
        return "_".join(re.sub(r"[^0-9A-Za-z.]+", "_", part) for part in parts)


def shaping_wheels(build: Sequence[LockedFile], build_requires: Sequence[str]) -> tuple[LockedFile, ...]:
    """Of the `build` group, what shapes machine code: torch, the CUDA toolchain, the build requirements.

    The rest (torch's own Python dependencies) may move without a new build of hours.
    """
    direct = {required_name(text) for text in build_requires} | {"torch"}
    return tuple(
        file for file in build if file.package in direct or file.package.startswith(("nvidia-", "cuda-"))
    )


def shaping_files(build: Sequence[LockedFile], build_requires: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Name and sha256 of `shaping_wheels`, sorted."""
    return tuple(sorted((file.package, file.sha256) for file in shaping_wheels(build, build_requires)))


def locked_cuda(build: Sequence[LockedFile]) -> str | None:
    """CUDA version of the locked torch, e.g. "13.0": that of the CUDA runtime in the `build` group."""
    versions = (file.version for file in build if re.fullmatch(r"nvidia-cuda-runtime(-cu\d+)?", file.package))
    version = next(versions, None)
    return ".".join(version.split(".")[:2]) if version else None

"""What the units of one build have in common, and what came of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from envbuilder.compile.shards.prove import ProofResult
from envbuilder.model import UnitTiming

Sharding = Literal["auto", "never", "force"]


@dataclass(frozen=True)
class Scope:
    """The build that units belong to."""

    package: str
    """Normalised name."""
    tree: str
    """The source tree, as the build sees it."""
    wanted: tuple[str, ...]
    """Architectures, e.g. "90"."""
    ptx: str | None
    sharding: Sharding
    prove: bool
    """Compile sharded units whole too, and compare the machine code of their kernels."""
    compilers: Mapping[str, tuple[str, str]]
    """Tool → its name and version ("nvcc 13.0.88"), and a digest of the programs that it is made of."""
    linker: str
    """`ld`, as the build sees it: it joins shards."""
    steady_names: bool
    """nvcc can name its intermediate files by the object (--objdir-as-tempdir)."""
    listing: str
    """Which files the source tree has, as a digest."""
    outside: Callable[[str], Path]
    """Where a path of the build lies for this process."""
    fixed: Callable[[str], str]
    """A text of the build with its private folder's path made the same for every build."""


@dataclass
class Ledger:
    """What the units of one build took, from many threads."""

    units: list[UnitTiming] = field(default_factory=list)
    whole: dict[str, str] = field(default_factory=dict)
    """Source → why it was compiled whole, of CUDA units that hold several instantiations."""
    proofs: dict[str, ProofResult] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

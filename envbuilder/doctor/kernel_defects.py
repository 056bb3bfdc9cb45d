"""Defects in the source of the packages whose kernels doctor runs: every build has them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    """What a package's kernel gets wrong, and how code gets round it."""

    package: str
    versions: str
    """Those whose source was read; later ones may have it too."""
    source: str
    """Where in the package's source, and what is wrong there."""
    what: str
    shown: str
    """What a GPU showed of it."""
    avoid: str
    """How to get round it; first, whom it does not touch."""
    kernel: str | None
    """The kernel that a run in kernels/ names where it meets the defect. None: not run, for it writes into
    memory that isn't its own."""

    def __str__(self) -> str:
        return f"{self.package} {self.versions}: {self.what} ({self.source}). {self.shown} {self.avoid}"


DEFECTS = (
    Defect(
        package="causal-conv1d",
        versions="1.7.0",
        source="csrc/causal_conv1d_bwd.cu loads the elements before a block only up to index seqlen - block "
        "start, though they lie before it, and recomputes SiLU's gradient from them",
        what="the gradient of x for channel-first input with SiLU is wrong in the last block of 2048 bytes "
        "where that holds fewer than 16 bytes",
        shown="On an H200: off by up to half of the largest element, for lengths 1031 and 1025.",
        avoid="Nemotron-H is not touched: its mixers call it channel-last. In code of your own: channel-last "
        "input, or a length that is a multiple of 8.",
        kernel="causal_conv1d_fn, short last block",
    ),
    Defect(
        package="mamba-ssm",
        versions="1.0.0 to 2.3.2.post1 (all 35 tags)",
        source="csrc/selective_scan/selective_scan_bwd_kernel.cuh halves the batch stride of dB and dC for "
        "complex numbers, but not the group stride; the package's tests never set complex with groups",
        what="the gradients of B and C of selective_scan_fn are wrong for complex A with several groups of B "
        "and C, and are written past the end of their tensors",
        shown="On an H200, with 2 groups in float32: off by 0.8 and 1.0 of the largest element, each element "
        "where those strides put it; compute-sanitizer's memcheck finds atomic additions out of bounds, and "
        "with 1 group none. One call for each group agrees with float64.",
        avoid="Mamba-2 and Nemotron-H are not touched: their scan is another and real. In code of your own: "
        "one call for each group.",
        kernel=None,
    ),
)


def defect_of(kernel: str) -> Defect | None:
    """The defect that a run of `kernel` meets."""
    return next((defect for defect in DEFECTS if defect.kernel == kernel), None)

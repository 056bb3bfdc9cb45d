"""What an unexpected exception means: its text, as CUDA, NCCL and gloo write it → a sentence and a remedy."""

from __future__ import annotations

import re
from dataclasses import dataclass

from trainer.errors import EnvironmentMismatch, TrainerError, TrainingFailed

GO_ON = (
    "run the same command again, on another node if it happens twice: it goes on from the newest checkpoint"
)


@dataclass(frozen=True)
class Known:
    """A failure that is known by its text."""

    pattern: re.Pattern[str]
    sentence: str
    remedy: str


def _known(pattern: str, sentence: str, remedy: str) -> Known:
    return Known(re.compile(pattern, re.IGNORECASE), sentence, remedy)


PEER = _known(
    r"connection closed by peer|connection reset by peer|broken pipe"
    r"|timed out waiting \d+ ?ms for (recv|send)"
    r"|connect.* timed out|ncclRemoteError|remote process exit|socket closed|heartbeat monitor",
    "Another process of the run is gone or late.",
    GO_ON,
)
KNOWN = (
    _known(
        r"ECC error|ECC_UNCORRECTABLE",
        "The GPU's memory has an uncorrectable error: its hardware is at fault.",
        "nvidia-smi -q -d ECC  # tell the help desk, and go on from the newest checkpoint on another node",
    ),
    _known(
        r"GPU is lost|fallen off the bus|no CUDA-capable device|GPU requires reset"
        r"|unable to determine the device handle|device\(s\) is/are busy or unavailable"
        r"|hardware stack error|hardware error|NVLink error|all CUDA-capable devices"
        r"|CUDA_ERROR_DEVICE_UNAVAILABLE",
        "The GPU is lost: the driver doesn't answer for it any more.",
        f"nvidia-smi  # then {GO_ON}",
    ),
    _known(
        r"CUDA error: out of memory|CUDA out of memory|CU(BLAS|DNN|SOLVER)_STATUS_ALLOC_FAILED"
        r"|NCCL.*failed to CUDA (m|c)alloc",
        "The GPU's memory is full.",
        "--set step_scheduler.local_batch_size=1 --set distributed.activation_checkpointing=true, "
        "on several GPUs also --set distributed.placement=shard",
    ),
    _known(
        r"illegal memory access|misaligned address|illegal instruction|unspecified launch failure"
        r"|device-side assert|launch timed out|invalid program counter|invalid address space",
        "A GPU kernel broke off.",
        "CUDA_LAUNCH_BLOCKING=1 envbuilder train …  # names the kernel; and: envbuilder doctor",
    ),
    _known(
        r"no kernel image is available|PTX was compiled with an unsupported toolchain|provided PTX",
        "A kernel was not compiled for this GPU.",
        "envbuilder doctor",
    ),
    _known(
        r"No space left on device|Disk quota exceeded|File too large",
        "The disk, or your quota on it, is full.",
        "df -h . ; quota -s",
    ),
    _known(
        r"can't allocate memory|Cannot allocate memory|not enough memory",
        "The host's memory is full.",
        "give the job more memory, or use fewer processes",
    ),
)


def explain(problem: Exception) -> TrainerError:
    """The typed error for an exception that nothing expected."""
    if isinstance(problem, TrainerError):
        return problem
    kind, text = type(problem).__name__, str(problem)
    first = (text.splitlines() or [""])[0]
    if isinstance(problem, ImportError):
        return EnvironmentMismatch(
            f"The environment lacks a package: {problem}",
            remedy="envbuilder doctor",
            context={"error": kind},
        )
    for known in (*KNOWN, PEER):
        if known.pattern.search(text):
            return TrainingFailed(known.sentence, remedy=known.remedy, context={"error": f"{kind}: {first}"})
    return TrainingFailed(
        f"Training broke off: {kind}: {first}",
        remedy="read the traceback above",
        context={"error": kind},
    )


def blames_another(error: TrainerError) -> bool:
    """Whether the error only says that another process is gone."""
    return error.message == PEER.sentence

"""Where a step's time goes: its kernels by name, by kind, and by operator and shapes."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.training.work import Work

KINDS = (
    ("copy and fill", r"^Mem(cpy|set)|copy_kernel|direct_copy|CatArray|FillFunctor|bfloat16_copy"),
    ("attention", r"flash|fmha|attention"),
    ("mamba scan", r"^_(chunk|bmm_chunk|state_passing|ssd|mamba)|_chunk_(scan|state|cumsum)|selective_scan"),
    ("causal conv", r"causal_conv1d"),
    ("norm", r"layer_?norm|rms_?norm|RowwiseMoments|GammaBeta"),
    ("optimizer", r"multi_tensor_apply|[Aa]dam|LpNorm|lpnorm"),
    ("loss", r"[Ss]oft[Mm]ax|nll_loss|cross_entropy|logsumexp"),
    ("grouped GEMM", r"[Gg]roup(ed|Problem)|grouped|_grouped|expert.*(gemm|mm|proj)|moe.*(gemm|mm)"),
    ("GEMM", r"nvjet|gemm|gemv|cutlass|cublas|xmma|splitK|_mm_kernel|matmul"),
    (
        "sort, gather, scatter",
        r"sort|radix|cub::|gather|scatter|index|topk|top_k|histogram|bincount|embedding|permute|take",
    ),
    ("reduction", r"reduce_kernel"),
    ("collective", r"nccl|gloo|c10d"),
    ("elementwise", r"elementwise|pointwise|triton_poi|relu|mul|add|where|sigmoid"),
)
"""Kind of work and what its kernels' names hold; the first that fits counts."""


@dataclass(frozen=True)
class Event:
    """One piece of work: a kernel, copy or fill on the GPU, or an operator on a CPU. Microseconds."""

    name: str
    begin: float
    end: float
    own: float
    """Without what it calls."""


def kind_of(name: str) -> str:
    """The kind of work that a kernel of this name does."""
    return next((kind for kind, pattern in KINDS if re.search(pattern, name)), "other")


def busy(events: Iterable[Event]) -> float:
    """Microseconds in which at least one event was going on."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.begin):
        total += max(0.0, event.end - max(event.begin, until))
        until = max(until, event.end)
    return total


def short(name: str) -> str:
    """A kernel's name without what is the same in all of them."""
    return re.sub(r"\bvoid |at::native::|\(anonymous namespace\)::|at::cuda::detail::|std::|c10::", "", name)


def profile_steps(work: Work, contestant: Any, numbers: Sequence[int], step_seconds: float) -> None:
    """Profiles the steps, prints tables, writes JSON. `step_seconds`: of a step without the profiler."""
    assert work.profile is not None
    on_gpu = contestant.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, record_shapes=True, acc_events=True) as profiler:
        for number in numbers:
            contestant.step(number)
        if on_gpu:
            torch.cuda.synchronize(contestant.device)
    found = summary(events_of(profiler, on_gpu), len(numbers), step_seconds)
    found["operators"] = operators(profiler, len(numbers), on_gpu)
    found["work"] = {"contestant": work.contestant, "adapters": work.adapters, "batch": work.batch}
    found["peak_bytes"] = torch.cuda.max_memory_allocated(contestant.device) if on_gpu else None
    Path(work.profile).write_text(json.dumps(found, indent=1))
    print(as_text(found), flush=True)


def events_of(profiler: Any, on_gpu: bool) -> list[Event]:
    """The GPU's own, or the CPU's operators."""
    if not on_gpu:
        return [
            Event(event.name, event.time_range.start, event.time_range.end, event.self_cpu_time_total)
            for event in profiler.events()
        ]
    return [
        Event(event.name(), event.start_ns() / 1e3, event.end_ns() / 1e3, event.duration_ns() / 1e3)
        for event in profiler.profiler.kineto_results.events()
        if event.device_type() == torch.autograd.DeviceType.CUDA and not event.is_user_annotation()
    ]


def summary(events: Sequence[Event], steps: int, step_seconds: float) -> dict[str, Any]:
    """Milliseconds and counts of one step."""
    by_name: dict[str, list[float]] = defaultdict(list)
    for event in events:
        by_name[event.name].append(event.own)
    total = sum(map(sum, by_name.values()))
    kernels = [
        {
            "name": name,
            "kind": kind_of(name),
            "milliseconds": sum(times) / 1e3 / steps,
            "share": sum(times) / total,
            "calls": len(times) / steps,
        }
        for name, times in by_name.items()
    ]
    kernels.sort(key=lambda kernel: -kernel["milliseconds"])
    kinds: dict[str, dict[str, float]] = defaultdict(
        lambda: {"milliseconds": 0.0, "share": 0.0, "calls": 0.0}
    )
    for kernel in kernels:
        for figure in ("milliseconds", "share", "calls"):
            kinds[kernel["kind"]][figure] += kernel[figure]
    busy_seconds = busy(events) / 1e6 / steps
    return {
        "step_seconds": step_seconds,
        "busy_seconds": busy_seconds,
        "busy_share": busy_seconds / step_seconds,
        "launches": sum(len(times) for name, times in by_name.items() if not name.startswith("Mem")) / steps,
        "copies": sum(len(times) for name, times in by_name.items() if name.startswith("Mem")) / steps,
        "kinds": dict(sorted(kinds.items(), key=lambda item: -item[1]["milliseconds"])),
        "kernels": kernels,
    }


def operators(profiler: Any, steps: int, on_gpu: bool) -> list[dict[str, Any]]:
    """PyTorch's operators with their inputs' shapes, by the time of the kernels that they launched."""
    rows = [
        {
            "name": row.key,
            "shapes": str(row.input_shapes),
            "milliseconds": (row.self_device_time_total if on_gpu else row.self_cpu_time_total) / 1e3 / steps,
            "host_milliseconds": row.self_cpu_time_total / 1e3 / steps,
            "calls": row.count / steps,
        }
        for row in profiler.key_averages(group_by_input_shape=True)
        if row.input_shapes and row.device_type == torch.autograd.DeviceType.CPU
    ]
    return sorted(rows, key=lambda row: -row["milliseconds"])[:80]


def as_text(found: dict[str, Any], *, kernels: int = 40, shown_operators: int = 30) -> str:
    """The tables."""
    lines = [
        f"step {1e3 * found['step_seconds']:.1f} ms without the profiler; "
        f"busy {1e3 * found['busy_seconds']:.1f} ms ({found['busy_share']:.0%}); "
        f"{found['launches']:,.0f} kernel launches, {found['copies']:,.0f} copies and fills in a step",
        "",
        f"{'kind':<24}{'ms':>9}{'share':>8}{'calls':>8}",
    ]
    lines += [
        f"{kind:<24}{row['milliseconds']:>9.2f}{row['share']:>8.1%}{row['calls']:>8.0f}"
        for kind, row in found["kinds"].items()
    ]
    lines += ["", f"{'ms':>9}{'share':>8}{'calls':>7}  kernel"]
    lines += [
        f"{row['milliseconds']:>9.2f}{row['share']:>8.1%}{row['calls']:>7.0f}  [{row['kind']}] "
        f"{short(row['name'])[:130]}"
        for row in found["kernels"][:kernels]
    ]
    lines += ["", f"{'ms':>9}{'calls':>7}  operator and its inputs' shapes"]
    lines += [
        f"{row['milliseconds']:>9.2f}{row['calls']:>7.0f}  {row['name']} {row['shapes'][:110]}"
        for row in found["operators"][:shown_operators]
    ]
    return "\n".join(lines)

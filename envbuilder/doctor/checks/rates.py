"""How fast a GPU multiplies and copies, against what its kind is known for."""

from __future__ import annotations

from typing import Any

from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped, warning
from envbuilder.doctor.checks.gpu import ANOTHER_NODE, sees_no_gpu
from envbuilder.doctor.installed import read_torch
from envbuilder.doctor.scripts import run_script
from envbuilder.doctor.subject import Subject
from envbuilder.report import Reporter

KNOWN_RATES = {
    "B200": (2250.0, 8000.0),
    "GB200": (2500.0, 8000.0),
    "GH200 480GB": (990.0, 4000.0),
    "GH200 144G HBM3e": (990.0, 4900.0),
    "H200": (989.0, 4800.0),
    "H200 NVL": (836.0, 4800.0),
    "H100 80GB HBM3": (989.0, 3350.0),
    "H100 PCIe": (756.0, 2000.0),
    "H100 NVL": (836.0, 3900.0),
    "A100-SXM-64GB": (312.0, 1638.0),
    "A100-SXM4-80GB": (312.0, 2039.0),
    "A100-SXM4-40GB": (312.0, 1555.0),
    "A100 80GB PCIe": (312.0, 1935.0),
    "A100-PCIE-40GB": (312.0, 1555.0),
    "A40": (149.7, 696.0),
    "A30": (165.0, 933.0),
    "A10": (125.0, 600.0),
    "L40S": (362.0, 864.0),
    "L40": (181.0, 864.0),
    "L4": (121.0, 300.0),
    "RTX 6000 Ada Generation": (364.0, 960.0),
    "RTX A6000": (154.8, 768.0),
    "GeForce RTX 4090": (165.2, 1008.0),
    "GeForce RTX 3090": (71.0, 936.0),
    "V100-SXM2-32GB": (125.0, 900.0),
    "V100-SXM2-16GB": (125.0, 900.0),
    "V100-PCIE-32GB": (112.0, 900.0),
    "V100-PCIE-16GB": (112.0, 900.0),
}
"""Name as nvidia-smi has it, less the brand → TFLOP/s of dense bfloat16 (before Ampere: float16) matrices,
GB/s of memory, by NVIDIA's data sheets."""
_REACHED = {"tflops": 0.65, "copy_gbs": 0.8}
"""What a sound GPU comes to of its data sheet: power holds products back, refresh and turns copies."""
_SLOW, _SICK = 0.6, 0.3
"""Parts of what is reached: below the first it is a warning, below the second a failure."""
_SIBLING = 0.8
"""A GPU that is slower than this part of the fastest of its name is suspicious."""
_SLOW_HOST_GBS = 4.0
"""Less than an x16 slot of PCIe 3 gives by far: the slot runs with few lanes."""
_TIMEOUT_S = 300
_UNITS = {"tflops": "TFLOP/s", "copy_gbs": "GB/s copied within its memory", "host_gbs": "GB/s from the host"}


def check_rates(subject: Subject, reporter: Reporter) -> Outcome:
    """A matrix product and copies on each visible GPU, measured for some seconds (rates.py)."""
    if read_torch(subject.import_path) is None:
        return skipped("The env has no torch to measure with.")
    busy = [process.pid for state in subject.gpu_states for process in state.processes]
    # Whatever keeps it from measuring, it is the env before it is the node.
    remedy = f"See whether torch works: envbuilder doctor {subject.recipe_file} --only env --only libraries"
    report = run_script(
        subject.python, "rates.py", timeout_s=_TIMEOUT_S, remedy=remedy, env=subject.variables
    )
    if report["problem"]:
        return sees_no_gpu("so none can be measured", report["problem"], subject.recipe_file)
    return judge_rates(report["gpus"], report["peers"], busy)


def judge_rates(gpus: list[dict[str, Any]], peers: list[dict[str, Any]], busy: list[str]) -> Outcome:
    """The verdict on what rates.py prints, where the processes `busy` were on the GPUs too."""
    evidence = [line for gpu in gpus for line in _described(gpu)] + [_pair(peer) for peer in peers]
    if busy:
        evidence.append(f"other processes were on the GPUs: {', '.join(busy)}")
    if wrong := [str(gpu["index"]) for gpu in gpus if gpu["wrong"]]:
        return failed(f"GPU {', '.join(wrong)} multiplies wrongly.", *evidence, remedy=ANOTHER_NODE)
    if torn := [peer for peer in peers if peer["wrong"]]:
        return failed(
            f"What GPU {torn[0]['source']} sends to GPU {torn[0]['target']} arrives changed: the host's "
            "IOMMU (PCIe ACS) is in the way.",
            *evidence,
            remedy=f"export NCCL_P2P_DISABLE=1 for now. {ANOTHER_NODE}",
        )
    slow = _slow_ones(gpus)
    if any(part < _SICK for _, part in slow) and not busy:
        return failed("A GPU runs at a fraction of its speed.", *_lines(slow), *evidence, remedy=ANOTHER_NODE)
    if slow:
        return warning(
            "A GPU is slower than it should be.",
            *_lines(slow),
            *evidence,
            remedy="Measure again when no other process is on it (envbuilder doctor --only gpu.processes)"
            if busy
            else "See what holds it back: envbuilder doctor --only gpu.clocks --only gpu.health. "
            f"{ANOTHER_NODE}",
        )
    return ok(f"{len(gpus)} GPUs multiply and copy as fast as they should.", *evidence)


def _lines(slow: list[tuple[str, float]]) -> list[str]:
    return [line for line, _ in slow]


def known_rates(name: str) -> tuple[float, float] | None:
    """TFLOP/s and GB/s of a GPU of this name; None for one that is not known, and for a part of one (MIG)."""
    return KNOWN_RATES.get(name.removeprefix("NVIDIA ").removeprefix("Tesla "))


def _slow_ones(gpus: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """What is slow, in words, and how slow: 1.0 is what should be reached."""
    slow = []
    for gpu in gpus:
        known = dict(zip(_REACHED, known_rates(gpu["name"]) or ()))
        for quantity, sheet in known.items():
            expected = _REACHED[quantity] * sheet
            if gpu[quantity] < _SLOW * expected:
                slow.append(
                    (_short(gpu, quantity, f"about {expected:.0f} expected"), gpu[quantity] / expected)
                )
        for quantity in _REACHED:
            best = max(other[quantity] for other in gpus if other["name"] == gpu["name"])
            if gpu[quantity] < _SIBLING * best:
                slow.append((_short(gpu, quantity, f"a sibling reaches {best:.0f}"), gpu[quantity] / best))
        if gpu["host_gbs"] < _SLOW_HOST_GBS:
            slow.append((_short(gpu, "host_gbs", "its slot runs with few lanes"), 1.0))
    return slow


def _short(gpu: dict[str, Any], quantity: str, why: str) -> str:
    return f"GPU {gpu['index']}: {gpu[quantity]:.1f} {_UNITS[quantity]}: {why}"


def _described(gpu: dict[str, Any]) -> list[str]:
    known = known_rates(gpu["name"])
    sheet = f"data sheet: {known[0]:.0f} TFLOP/s, {known[1]:.0f} GB/s" if known else "no figures are known"
    rates = ", ".join(f"{gpu[quantity]:.1f} {unit}" for quantity, unit in _UNITS.items())
    return [f"GPU {gpu['index']} ({gpu['name']}, {gpu['dtype']}): {rates} ({sheet})"]


def _pair(peer: dict[str, Any]) -> str:
    how = "directly" if peer["access"] else "through the host"
    return f"GPU {peer['source']} to GPU {peer['target']}: {peer['gbs']:.1f} GB/s, {how}"


CHECKS: tuple[Check, ...] = (
    Check(
        "gpu.rates",
        "the GPUs' speed",
        "a matrix product and copies on each GPU and between them, against the data sheet and each other",
        check_rates,
        needs=("recipe", "env", "gpu"),
        cost="gpu",
        limit_s=_TIMEOUT_S + 10,
    ),
)

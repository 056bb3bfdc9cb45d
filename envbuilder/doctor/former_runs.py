"""How fast this model trained here before, by the metrics of former runs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from envbuilder.doctor.subject import Subject
from envbuilder.paths import Root


@dataclass(frozen=True)
class Speed:
    """One former run's."""

    run: Path
    tokens_per_second: float
    """Median over its steps without the first, of all processes together."""
    start_s: float
    """From the start to the end of the first step, in which kernels are compiled."""


def expected_seconds(subject: Subject) -> float | None:
    """What the whole training takes, its start too, by a former run's speed; None where none tells."""
    parts = subject.inspected.parts
    former = former_training(subject, parts) if {"steps", "config"} <= parts.keys() else None
    return None if former is None else former[0].start_s + former[1]


def former_training(subject: Subject, parts: Mapping[str, Any]) -> tuple[Speed, float] | None:
    """How fast such a model trained before, and the seconds that all steps take at that speed."""
    if "memory" not in parts:
        return None
    steps = parts["steps"]
    speed = former_speed(
        subject.root,
        parameters=parts["memory"]["parameters"],
        processes=subject.processes,
        on_cpu=parts["config"]["device"] == "cpu",
    )
    if speed is None:
        return None
    return speed, steps["steps"] * steps["tokens_per_step"] / speed.tokens_per_second


def former_speed(root: Root, *, parameters: int, processes: int, on_cpu: bool) -> Speed | None:
    """That of the newest run of a model with so many parameters, on as many processes and the same kind of
    device; None where there is none."""
    files = sorted(root.run("_").parent.glob("*/metrics.jsonl"), key=_age)
    for file in files:
        if speed := _speed(file, parameters, processes, on_cpu):
            return speed
    return None


def _age(file: Path) -> float:
    return -file.stat().st_mtime


def _speed(file: Path, parameters: int, processes: int, on_cpu: bool) -> Speed | None:
    try:
        records: list[dict[str, Any]] = [json.loads(line) for line in file.read_bytes().splitlines()]
        start = next(record for record in reversed(records) if record["kind"] == "start")
        # After the newest start: one that went on may have other processes than before.
        steps = [r for r in records[records.index(start) :] if r["kind"] == "step"]
        alike = (
            start["model"]["parameters"] == parameters
            and start["processes"] == processes
            and (start["device"] == "cpu") == on_cpu
        )
        if not alike or len(steps) < 2:
            return None
        return Speed(
            file.parent,
            median(step["tokens_per_second"] for step in steps[1:]),
            start["seconds_to_prepare"] + steps[0]["seconds"],
        )
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None  # of another version, or still being written

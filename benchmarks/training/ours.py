"""Our trainer, through its own preparation and its own step."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.training.work import Work
from trainer.loop import _train_step
from trainer.metrics import Metrics
from trainer.outcome import Progress
from trainer.parallel import World, open_world
from trainer.prepare import Run, prepare
from trainer.reading import read_config


class Ours:
    """A prepared run, see `trainer.prepare`."""

    def __init__(self, run: Run, world: World) -> None:
        self.run = run
        self.device, self.processes = world.device, world.size
        self.trainable = sum(parameter.numel() for parameter in run.adapters.values())
        adapter = next(iter(run.adapters.values())).dtype
        self.precision = f"base {run.config.model.dtype}, adapters {str(adapter).removeprefix('torch.')}"

    @property
    def notes(self) -> list[str]:
        return [str(self.run.plan), f"{self.run.passes.recorded} shapes recorded"]

    def step(self, number: int) -> None:
        _train_step(self.run, number)

    def losses(self) -> list[float]:
        records = map(json.loads, (self.run.run_dir / "metrics.jsonl").read_text().splitlines())
        return [record["loss"] for record in records if record["kind"] == "step"]


@contextmanager
def contestant(work: Work) -> Iterator[Ours]:
    probe = read_config(work.config, work.config_overrides(1))
    timeout = probe.distributed.timeout_minutes
    with open_world(probe.device, timeout_minutes=timeout) as world, tempfile.TemporaryDirectory() as folder:
        config = read_config(work.config, work.config_overrides(world.size))
        metrics = Metrics(Path(folder), rank=world.rank, logging=config.logging)
        try:
            yield Ours(prepare(config, Path(folder), world, metrics, Progress()), world)
        finally:
            metrics.close()

"""`python -m trainer CONFIG.yaml --run-dir DIR [--set section.key=value …]`, alone or under torchrun.

Exit codes: 0 finished, 3 wrong config, data or package versions, 7 missing GPU or kernels, 10 training
failed, 75 stopped in good order. torchrun turns them into 1, so `DIR/outcome.json`, written by rank 0 at
the very end, is what counts.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
import warnings
from pathlib import Path
from types import FrameType

from trainer.errors import EnvironmentMismatch, TrainerError, TrainingFailed
from trainer.files import write_atomically
from trainer.outcome import Progress, Status, write_outcome
from trainer.reading import dump_config, read_config
from trainer.versions import check_versions

STOP_FILE = "stop"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OFFLINE = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0", "TOKENIZERS_PARALLELISM": "false"}
"""Compute nodes have no internet: transformers must not even try. Set before it is imported."""


class StopRequest:
    """Whether someone asked the run to stop: by a signal to this process or by the run's stop file."""

    def __init__(self, run_dir: Path) -> None:
        self._file = run_dir / STOP_FILE
        self._signalled = False
        for number in STOP_SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._signalled = True

    def __call__(self) -> bool:
        return self._signalled or self._file.exists()

    def done(self) -> None:
        """The request was met: the next run starts without it."""
        self._file.unlink(missing_ok=True)


def main() -> int:
    """Runs the training that the command line asks for, and says with the exit code how it ended."""
    parser = argparse.ArgumentParser(prog="trainer", description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument("--plan", action="store_true", help="print what a GPU must hold, and train nothing")
    parser.add_argument("--processes", type=int, default=1, help="with --plan: that will train")
    parser.add_argument("--gpu-memory-gib", type=float, help="with --plan: of each GPU")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.plan:
        return _plan(arguments.config, arguments.overrides, arguments.processes, arguments.gpu_memory_gib)
    if arguments.run_dir is None:
        parser.error("--run-dir is missing")
    run_dir: Path = arguments.run_dir.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"
    if first:  # an earlier run's outcome must not stand for this one's
        (run_dir / "outcome.json").unlink(missing_ok=True)
    progress = Progress()
    stop = StopRequest(run_dir)
    error: TrainerError | None = None
    try:
        _run(arguments.config, run_dir, arguments.overrides, progress, stop, first=first)
    except TrainerError as problem:
        error = problem
    except Exception as problem:  # a defect or a full GPU: the user still gets an outcome and a sentence
        traceback.print_exc()
        error = _unexpected(problem)
    if first:
        status: Status = "finished" if error is None else "stopped" if error.exit_code == 75 else "failed"
        write_outcome(run_dir, status, progress, error)
        if status != "failed":
            stop.done()
    if error is None:
        return 0
    if first:
        print(error.told(), file=sys.stderr, flush=True)
    return error.exit_code


def _plan(file: Path, overrides: list[str], processes: int, gpu_memory_gib: float | None) -> int:
    """Prints where the model would lie and what each GPU must hold."""
    if gpu_memory_gib is not None:
        overrides = [*overrides, f"distributed.gpu_memory_gib={gpu_memory_gib}"]
    os.environ.update(OFFLINE)
    warnings.simplefilter("ignore")
    try:
        config = read_config(file, overrides)
        check_versions()
        from trainer.placement import describe

        print(describe(config, processes=processes))
    except TrainerError as error:
        print(error.told(), file=sys.stderr)
        return error.exit_code
    return 0


def _run(
    file: Path, run_dir: Path, overrides: list[str], progress: Progress, stop: StopRequest, *, first: bool
) -> None:
    config = read_config(file, overrides)
    check_versions()
    if first:
        write_atomically(run_dir / "config.yaml", dump_config(config))
    os.environ.update(OFFLINE)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # among peft, transformers and torch; not the user's to mend
    # torch takes seconds to import: a mistake in the config is told before.
    from trainer.loop import train
    from trainer.metrics import Metrics
    from trainer.parallel import open_world

    with open_world(config.device, timeout_minutes=config.distributed.timeout_minutes) as world:
        metrics = Metrics(run_dir, rank=world.rank)
        try:
            train(config, run_dir, world, metrics, progress, stop)
        finally:
            metrics.close()


def _unexpected(problem: Exception) -> TrainerError:
    kind = type(problem).__name__
    if isinstance(problem, ImportError):
        return EnvironmentMismatch(
            f"The environment lacks a package: {problem}",
            remedy="envbuilder doctor",
            context={"error": kind},
        )
    if kind == "OutOfMemoryError":
        return TrainingFailed(
            "The GPU's memory is full.",
            remedy="--set step_scheduler.local_batch_size=1 --set distributed.activation_checkpointing=true, "
            "on several GPUs also --set distributed.placement=shard",
            context={"error": str(problem).splitlines()[0]},
        )
    return TrainingFailed(
        f"Training broke off: {kind}: {(str(problem).splitlines() or [''])[0]}",
        remedy="read the traceback above",
        context={"error": kind},
    )


if __name__ == "__main__":
    sys.exit(main())

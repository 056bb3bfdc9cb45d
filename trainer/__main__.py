"""`python -m trainer CONFIG.yaml --run-dir DIR [--ends-at SECONDS] [--set section.key=value …]`.

Alone or under torchrun. `--ends-at` is the job's end in seconds since 1970, `ENVBUILDER_JOB_END` by default.

Exit codes: 0 finished, 3 wrong config, data or package versions, 7 missing GPU or kernels, 10 training
failed, 75 stopped in good order. torchrun turns them into 1, so `DIR/outcome.json`, written by rank 0 at
the very end, is what counts.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from pathlib import Path
from types import FrameType

from trainer.errors import Stopped, TrainerError
from trainer.failures import blames_another, explain
from trainer.files import write_atomically
from trainer.governor import Job, read_job
from trainer.outcome import Progress, Status, write_outcome
from trainer.reading import dump_config, read_config
from trainer.stamp import read_stamp
from trainer.versions import check_versions

STOP_FILE = "stop"
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
OFFLINE = {"HF_HUB_OFFLINE": "1", "USE_HUB_KERNELS": "0", "TOKENIZERS_PARALLELISM": "false"}
"""Compute nodes have no internet: transformers must not even try. Set before it is imported."""
DETERMINISTIC = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""cuBLAS gives the same bits only if its workspaces have one size. Set before torch is imported."""


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

    @property
    def is_by_file(self) -> bool:
        """Whether the stop file is there: whoever started this process may have missed it."""
        return self._file.exists()

    def done(self) -> None:
        """The request was met: the next run starts without it."""
        self._file.unlink(missing_ok=True)


class Ending:
    """How this process's part of the run ends, told once: by the main thread or by the watch."""

    def __init__(self, run_dir: Path, progress: Progress, stop: StopRequest) -> None:
        self._run_dir, self._progress, self._stop = run_dir, progress, stop
        self._lock = threading.Lock()
        self._told = False

    def tell(self, error: TrainerError | None) -> None:
        """Writes the outcome and prints the error."""
        with self._lock:
            if self._told:
                return
            self._told = True
            status: Status = (
                "finished" if error is None else "stopped" if isinstance(error, Stopped) else "failed"
            )
            by_file = status == "stopped" and self._stop.is_by_file
            write_outcome(self._run_dir, status, self._progress, error, stopped_by_file=by_file)
            if status != "failed":
                self._stop.done()
            if error is not None:
                print(error.told(), file=sys.stderr, flush=True)

    def break_off(self, error: TrainerError) -> None:
        """Ends the process from the watch's thread: the main thread waits for a process that is late."""
        self.tell(error)
        os._exit(error.exit_code)


def main() -> int:
    """Runs the training that the command line asks for, and says with the exit code how it ended."""
    began = time.time()
    parser = argparse.ArgumentParser(prog="trainer", description=__doc__.partition("\n")[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--run-dir", type=Path)
    parser.add_argument(
        "--ends-at", type=float, metavar="SECONDS", help="the job's end, in seconds since 1970"
    )
    parser.add_argument("--plan", action="store_true", help="print what a GPU must hold, and train nothing")
    parser.add_argument("--processes", type=int, default=1, help="with --plan: that will train")
    parser.add_argument("--processes-per-node", type=int, help="with --plan: by default all on one node")
    parser.add_argument("--gpu-memory-gib", type=float, help="with --plan: of each GPU")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="SECTION.KEY=VALUE")
    arguments = parser.parse_args()
    if arguments.plan:
        processes = arguments.processes, arguments.processes_per_node
        if arguments.processes % (arguments.processes_per_node or 1):
            parser.error("--processes-per-node must be a part of --processes")
        return _plan(arguments.config, arguments.overrides, *processes, arguments.gpu_memory_gib)
    if arguments.run_dir is None:
        parser.error("--run-dir is missing")
    run_dir: Path = arguments.run_dir.absolute()
    run_dir.mkdir(parents=True, exist_ok=True)
    first = os.environ.get("RANK", "0") == "0"
    if first:  # an earlier run's outcome must not stand for this one's
        (run_dir / "outcome.json").unlink(missing_ok=True)
    progress = Progress()
    stop = StopRequest(run_dir)
    ending = Ending(run_dir, progress, stop)
    error: TrainerError | None = None
    try:
        job = read_job(arguments.ends_at, os.environ, began=began)
        _run(arguments.config, run_dir, arguments.overrides, progress, stop, job, ending)
    except Exception as problem:
        error = _explained(problem)
    if first:
        ending.tell(error)
    return 0 if error is None else error.exit_code


def _plan(
    file: Path,
    overrides: list[str],
    processes: int,
    on_a_node: int | None,
    gpu_memory_gib: float | None,
) -> int:
    """Prints where the model would lie and what each GPU must hold."""
    if gpu_memory_gib is not None:
        overrides = [*overrides, f"distributed.gpu_memory_gib={gpu_memory_gib}"]
    os.environ.update(OFFLINE)
    warnings.simplefilter("ignore")
    try:
        config = read_config(file, overrides)
        check_versions()
        from trainer.placement import describe

        print(describe(config, processes=processes, on_a_node=on_a_node))
    except TrainerError as error:
        print(error.told(), file=sys.stderr)
        return error.exit_code
    return 0


def _run(
    file: Path,
    run_dir: Path,
    overrides: list[str],
    progress: Progress,
    stop: StopRequest,
    job: Job,
    ending: Ending,
) -> None:
    config = read_config(file, overrides)
    progress.stamp = read_stamp(os.environ)
    check_versions()
    if os.environ.get("RANK", "0") == "0":
        write_atomically(run_dir / "config.yaml", dump_config(config))
    os.environ.update(OFFLINE)
    if config.deterministic:
        os.environ.update(DETERMINISTIC)
    warnings.simplefilter(
        "ignore", FutureWarning
    )  # among peft, transformers and torch; not the user's to mend
    # torch takes seconds to import: a mistake in the config is told before.
    from trainer.loop import train
    from trainer.metrics import Metrics
    from trainer.parallel import make_deterministic, open_world
    from trainer.watch import watching

    make_deterministic(config.deterministic)
    minutes = config.distributed.timeout_minutes
    with (
        # A minute more, so that the watch, which knows who is late, comes first.
        open_world(config.device, timeout_minutes=minutes + 1) as world,
        watching(world, timeout=60 * minutes, end=ending.break_off) as watch,
    ):
        metrics = Metrics(run_dir, rank=world.rank, logging=config.logging)
        try:
            train(config, run_dir, world, metrics, progress, job, stop, watch)
        except Stopped:
            raise
        except Exception as problem:
            error = _explained(problem)
            if blames_another(error):
                error = watch.cause_of(error)
            else:
                watch.failed(error)
            if world.size > 1:  # with a process that is gone, leaving the group in good order can hang
                if world.rank == 0:
                    ending.tell(error)
                os._exit(error.exit_code)
            raise error from problem
        finally:
            metrics.close()


def _explained(problem: Exception) -> TrainerError:
    if not isinstance(problem, TrainerError):  # a defect or a full GPU: the user still gets a sentence
        traceback.print_exc()
    return explain(problem)


if __name__ == "__main__":
    sys.exit(main())

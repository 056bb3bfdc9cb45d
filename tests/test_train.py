"""`train` on an env whose trainer is a small stand-in: real processes that write what the real one writes."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import venv
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from envbuilder.errors import (
    EnvbuilderError,
    InputError,
    IntegrityError,
    MismatchError,
    StoppedError,
    TrainingError,
    UsageError,
)
from envbuilder.model import EnvReceipt
from envbuilder.paths import Root
from envbuilder.report import Quiet
from envbuilder.train import TimeEnded, TrainReport, run_training, supervision
from envbuilder.train.allocation import Allocation
from envbuilder.train.kernel_cache import KernelCache
from envbuilder.train.launch import command_line, environment, node_command_line, visible_gpus
from envbuilder.train.proof import prove_env
from envbuilder.train.supervision import RUN_VARIABLE, processes_of

# Does what its config says: lines of Python, with `run` (the run's folder), `metric` and `outcome` to hand.
STAND_IN = """
import json, os, pathlib, signal, subprocess, sys, time
config = pathlib.Path(sys.argv[1])
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
def metric(step, steps):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "step", "step": step, "steps": steps, "loss": 1.0}) + "\\n")
def outcome(status, exit_code, error=None):
    fields = {"status": status, "exit_code": exit_code, "error": error, "last_loss": 0.5}
    (run / "outcome.json.new").write_text(json.dumps(fields))
    (run / "outcome.json.new").replace(run / "outcome.json")
def until(condition):
    while not condition():
        time.sleep(0.01)
exec(config.read_text())
"""

# Names no data and no model: a stamp holds env and config alone.
INSPECTION = 'print(\'{"config": {"data": null, "validation_data": null, "model": ""}}\')\n'

# torchrun's part in this: starts the workers in sessions of their own, and says how the first one ended.
TORCHRUN = """
import os, subprocess, sys
count = int(sys.argv[sys.argv.index("--nproc-per-node") + 1])
module = sys.argv[sys.argv.index("-m") + 1:]
workers = [
    subprocess.Popen(
        [sys.executable, "-m", *module], start_new_session=True, env={**os.environ, "RANK": str(rank)}
    )
    for rank in range(count)
]
codes = [worker.wait() for worker in workers]
for rank, code in enumerate(codes):
    if code:
        print(f"Root Cause (first observed failure):\\n  rank : {rank}\\n  exitcode  : {code} (pid: 1)")
        sys.exit(1)
"""


RECEIPT: dict[str, Any] = {
    "recipe": "tiny",
    "lock_sha256": "0" * 64,
    "python": sys.version.split()[0],
    "compute_capabilities": [],
    "packages": [],
    "extensions": [],
    "provided": None,
    "created_at": "2026-01-01T00:00:00Z",
}


@dataclass
class Progress(Quiet):
    """A reporter that keeps what it is told."""

    steps: list[tuple[int, int]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def progress(self, label: str, done: int, total: int, unit: str) -> None:
        self.steps.append((done, total))

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@dataclass
class Lab:
    """A root with an env, and what its runs report."""

    root: Root
    folder: Path
    reporter: Progress = field(default_factory=Progress)

    @property
    def run(self) -> Path:
        return self.root.run("small")

    def train(
        self,
        body: str = "outcome('finished', 0)",
        *,
        processes: int = 1,
        overrides: tuple[str, ...] = (),
        recipe_name: str = "tiny",
        run_name: str | None = None,
        time_limit_s: int | None = None,
        allow_drift: bool = False,
    ) -> TrainReport:
        config = self.folder / "small.yaml"
        config.write_text(body)
        return run_training(
            config,
            root=self.root,
            recipe_name=recipe_name,
            processes=processes,
            overrides=overrides,
            run_name=run_name,
            reporter=self.reporter,
            time_limit_s=time_limit_s,
            allow_drift=allow_drift,
        )

    def processes(self) -> list[int]:
        return processes_of(self.run)


@pytest.fixture(scope="module")
def env(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with an env that has a `trainer`, a `torch.distributed.run`, and no third package."""
    root = tmp_path_factory.mktemp("root")
    path = root / "envs" / "tiny"
    venv.create(path, symlinks=True)
    site_packages = next((path / "lib").glob("python3.*")) / "site-packages"
    for name, text in {
        "trainer/__init__.py": "",
        "trainer/__main__.py": STAND_IN,
        "trainer/inspection.py": INSPECTION,
        "torch/__init__.py": "",
        "torch/distributed/__init__.py": "",
        "torch/distributed/run.py": TORCHRUN,
    }.items():
        (site_packages / name).parent.mkdir(exist_ok=True)
        (site_packages / name).write_text(text)
    (path / "envbuilder.json").write_text(json.dumps(RECEIPT))
    return root


@pytest.fixture
def lab(env: Path, tmp_path: Path) -> Iterator[Lab]:
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "envs").symlink_to(env / "envs")
    lab = Lab(Root(tmp_path / "root"), tmp_path)
    yield lab
    assert lab.processes() == []


def in_background(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action, daemon=True)
    thread.start()
    return thread


def when_exists(path: Path, action: Callable[[], object]) -> threading.Thread:
    """Runs `action` once `path` is there."""

    def wait() -> None:
        while not path.exists():
            time.sleep(0.01)
        action()

    return in_background(wait)


def test_a_finished_run_gives_the_outcome_and_its_progress(lab: Lab) -> None:
    report = lab.train("metric(1, 2)\nmetric(2, 2)\noutcome('finished', 0)")
    assert report.run == lab.run
    assert report.outcome["last_loss"] == 0.5
    assert lab.reporter.steps[-1] == (2, 2)


def test_the_run_keeps_the_receipt_of_its_env_and_the_log_of_its_processes(lab: Lab) -> None:
    lab.train("print('loading the model')\noutcome('finished', 0)")
    assert json.loads((lab.run / "envbuilder.json").read_text())["recipe"] == "tiny"
    assert (lab.run / "log.txt").read_text() == "loading the model\n"


def test_overrides_and_the_run_folder_reach_the_trainer(lab: Lab) -> None:
    lab.train("print(sys.argv[2:])\noutcome('finished', 0)", overrides=("optimizer.lr=1e-4", "seed=7"))
    expected = ["--run-dir", str(lab.run), "--set", "optimizer.lr=1e-4", "--set", "seed=7"]
    assert (lab.run / "log.txt").read_text() == f"{expected}\n"


def test_several_processes_run_under_torchrun(lab: Lab) -> None:
    lab.train(
        "rank = os.environ['RANK']\n(run / f'rank{rank}').touch()\n"
        "until(lambda: (run / 'rank0').exists() and (run / 'rank1').exists())\n"
        "if rank == '0': outcome('finished', 0)",
        processes=2,
    )
    assert (lab.run / "rank1").exists()


@pytest.mark.parametrize(
    ("exit_code", "kind"), [(3, InputError), (7, MismatchError), (10, TrainingError), (75, StoppedError)]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_an_outcome_becomes_its_typed_error(
    lab: Lab, exit_code: int, kind: type[EnvbuilderError], processes: int
) -> None:
    error = {"message": "It went so.", "remedy": "Do this.", "context": {"line": 3}}
    status = "stopped" if exit_code == 75 else "failed"
    with pytest.raises(kind) as caught:
        lab.train(f"outcome({status!r}, {exit_code}, {error})\nsys.exit({exit_code})", processes=processes)
    assert caught.value.exit_code == exit_code
    assert (caught.value.message, caught.value.remedy) == ("It went so.", "Do this.")
    assert caught.value.context["line"] == "3"
    assert caught.value.context["log"] == str(lab.run / "log.txt")


def test_the_outcome_decides_and_not_the_exit_code(lab: Lab) -> None:
    assert lab.train("outcome('finished', 0)\nsys.exit(1)", processes=2).outcome["status"] == "finished"


def test_an_outcome_of_an_earlier_part_of_the_run_is_not_believed(lab: Lab) -> None:
    lab.train("outcome('finished', 0)")
    with pytest.raises(TrainingError, match="exit code 5 before it could say why"):
        lab.train("sys.exit(5)")


def test_an_outcome_that_is_no_json_is_a_failure(lab: Lab) -> None:
    with pytest.raises(TrainingError):
        lab.train("(run / 'outcome.json').write_text('{')")


@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_process_is_explained_by_its_signal(lab: Lab, processes: int) -> None:
    with pytest.raises(TrainingError, match="memory ran out") as caught:
        lab.train("os.kill(os.getpid(), signal.SIGKILL)", processes=processes)
    assert caught.value.context["exit code"] == "-9 (SIGKILL)"
    assert "[train] in the site file" in caught.value.remedy


def test_the_death_of_one_process_is_told_and_not_the_lost_connection_of_the_others(lab: Lab) -> None:
    with pytest.raises(TrainingError, match="memory ran out"):
        lab.train(
            "if os.environ['RANK'] == '1': os.kill(os.getpid(), signal.SIGKILL)\n"
            "outcome('failed', 10, {'message': 'Connection closed by peer', 'remedy': '?', 'context': {}})",
            processes=2,
        )


def test_a_crash_in_compiled_code_points_to_doctor(lab: Lab) -> None:
    with pytest.raises(TrainingError, match="crashed in compiled code") as caught:
        lab.train("os.kill(os.getpid(), signal.SIGSEGV)")
    assert caught.value.remedy == "envbuilder doctor recipes/tiny.toml"


def test_a_failure_without_an_outcome_shows_the_last_lines_of_this_part_of_the_log(lab: Lab) -> None:
    lab.train("print('of the part before')\noutcome('finished', 0)")
    with pytest.raises(TrainingError) as caught:
        lab.train("for i in range(40): print('line', i)\nraise RuntimeError('boom')")
    lines = caught.value.context["last lines"]
    assert "RuntimeError: boom" in lines
    assert "of the part before" not in lines
    assert len(lines.splitlines()) <= 16


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_signal_becomes_the_stop_file(lab: Lab, number: signal.Signals, processes: int) -> None:
    when_exists(lab.run / "started", lambda: os.kill(os.getpid(), number))
    before = signal.getsignal(number)
    with pytest.raises(StoppedError) as caught:
        lab.train(
            "(run / 'started').touch()\nuntil((run / 'stop').exists)\noutcome('stopped', 75)\nsys.exit(75)",
            processes=processes,
        )
    assert "same command" in caught.value.remedy
    assert signal.getsignal(number) is before


def test_a_stop_file_of_an_earlier_part_does_not_stop_the_run(lab: Lab) -> None:
    lab.run.mkdir(parents=True)
    (lab.run / "stop").touch()
    lab.train("assert not (run / 'stop').exists()\noutcome('finished', 0)")


def test_a_second_ctrl_c_ends_every_process_at_once(lab: Lab) -> None:
    def interrupt_twice() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        while not (lab.run / "stop").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    when_exists(lab.run / "started1", interrupt_twice)
    with pytest.raises(TrainingError, match="without a checkpoint"):
        lab.train(
            "(run / ('started' + os.environ['RANK'])).touch()\nuntil(lambda: False)",
            processes=2,
        )
    assert lab.processes() == []


def test_a_process_in_a_session_of_its_own_is_not_left_behind(lab: Lab) -> None:
    sleeper = "subprocess.Popen(['sleep', '600'], start_new_session=True)"
    lab.train(f"pid = {sleeper}.pid\n(run / 'pid').write_text(str(pid))\noutcome('finished', 0)")
    command_line = Path("/proc", (lab.run / "pid").read_text(), "cmdline")
    assert not command_line.exists() or command_line.read_bytes() == b""  # empty: ended, not yet waited for


def test_processes_that_linger_after_the_outcome_are_ended(lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervision, "LINGER_S", 0.1)
    lab.train("outcome('finished', 0)\nuntil(lambda: False)", processes=2)
    assert lab.reporter.warnings == ["the processes of small did not end by themselves, and were killed"]


def test_a_run_that_is_going_on_is_not_started_again(lab: Lab) -> None:
    other = subprocess.Popen(["sleep", "600"], env={RUN_VARIABLE: str(lab.run)})
    try:
        with pytest.raises(UsageError, match=rf"already going on here \(process {other.pid}\)"):
            lab.train("outcome('finished', 0)")
    finally:
        other.kill()
        other.wait()


def test_a_trainer_folder_where_the_command_is_typed_is_not_imported(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    (lab.folder / "trainer").mkdir()
    (lab.folder / "trainer" / "__init__.py").write_text("raise SystemExit(9)")
    monkeypatch.chdir(lab.folder)
    monkeypatch.setenv("PYTHONPATH", str(lab.folder))
    assert lab.train("outcome('finished', 0)").outcome["status"] == "finished"


def test_an_env_that_is_missing_is_a_mismatch_with_the_command_that_makes_it(lab: Lab) -> None:
    with pytest.raises(MismatchError) as caught:
        lab.train(recipe_name="other")
    assert caught.value.remedy == "envbuilder install recipes/other.toml"
    assert not lab.run.exists()


def test_a_damaged_receipt_is_an_integrity_error(tmp_path: Path) -> None:
    receipt = Root(tmp_path).env("tiny") / "envbuilder.json"
    receipt.parent.mkdir(parents=True)
    receipt.write_text("{}")
    with pytest.raises(IntegrityError) as caught:
        Lab(Root(tmp_path), tmp_path).train()
    assert caught.value.remedy == "envbuilder install recipes/tiny.toml"


def test_a_missing_config_is_an_input_error(lab: Lab) -> None:
    with pytest.raises(InputError, match="no training config"):
        run_training(
            lab.folder / "none.yaml",
            root=lab.root,
            recipe_name="tiny",
            processes=1,
            overrides=(),
            run_name=None,
            reporter=Quiet(),
        )


@pytest.mark.parametrize("name", ["../elsewhere", "a/b", "-x", ".hidden", "a b"])
def test_a_run_name_that_is_no_folder_name_is_refused(lab: Lab, name: str) -> None:
    with pytest.raises(UsageError, match="can't be a run's name"):
        lab.train(run_name=name)


def test_a_run_can_have_a_name_of_its_own(lab: Lab) -> None:
    assert lab.train(run_name="other-1.5").run == lab.root.run("other-1.5")


@pytest.mark.parametrize(
    ("variables", "count"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1,3"}, 3),
        ({"CUDA_VISIBLE_DEVICES": "GPU-5c1d,GPU-77aa"}, 2),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, 0),
        ({"CUDA_VISIBLE_DEVICES": "0,-1,1"}, 1),
        ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0),
        ({"SLURM_GPUS_ON_NODE": "4"}, 4),
        ({"CUDA_VISIBLE_DEVICES": "2", "SLURM_GPUS_ON_NODE": "4"}, 1),
    ],
)
def test_visible_gpus_are_counted_as_cuda_counts_them(variables: dict[str, str], count: int) -> None:
    assert visible_gpus(variables) == count


def test_one_process_needs_no_torchrun() -> None:
    words = command_line(("/env/bin/python",), Path("/c.yaml"), Path("/run"), 1, ())
    assert words == ("/env/bin/python", "-m", "trainer", "/c.yaml", "--run-dir", "/run")


def test_what_would_change_the_run_from_outside_is_left_behind() -> None:
    outside = {
        "PATH": "/usr/bin",
        "PYTHONPATH": "/elsewhere",
        "PYTHONHOME": "/elsewhere",
        "VIRTUAL_ENV": "/elsewhere",
        "RANK": "3",
        "LOCAL_RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_ADDR": "node7",
        "TORCHELASTIC_RUN_ID": "x",
        "OMP_NUM_THREADS": "999",
        "HF_HUB_OFFLINE": "0",
    }
    cores = len(os.sched_getaffinity(0))
    made: dict[str, Any] = environment(
        outside, run=Path("/run"), cache=KernelCache(Path("/cache"), Path("/kept")), processes=cores
    )
    assert not set(made) & {"PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "RANK", "LOCAL_RANK", "WORLD_SIZE"}
    assert not set(made) & {"MASTER_ADDR", "TORCHELASTIC_RUN_ID"}
    assert made["PATH"] == "/usr/bin"
    assert (made["OMP_NUM_THREADS"], made["HF_HUB_OFFLINE"], made["USE_HUB_KERNELS"]) == ("1", "1", "0")


def installed(env: Path, name: str, version: str, **files: str) -> None:
    """Puts a distribution into `env`, with its RECORD."""
    site_packages = next((env / "lib").glob("python3.*")) / "site-packages"
    info = f"{name}-{version}.dist-info"
    content = {f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n", **files}
    (site_packages / info).mkdir()
    record = ""
    for path, text in content.items():
        (site_packages / path).write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        record += f"{path},sha256={digest},{len(text)}\n"
    (site_packages / info / "RECORD").write_text(record + f"{info}/RECORD,,\n")


@pytest.fixture
def small_env(tmp_path: Path) -> Callable[[], tuple[str, ...]]:
    """An env of one package; calling it proves the env, and gives what differs."""
    env = tmp_path / "envs" / "tiny"
    minor = ".".join(sys.version.split()[0].split(".")[:2])
    (env / "lib" / f"python{minor}" / "site-packages").mkdir(parents=True)
    installed(env, "tiny", "1.0", **{"tiny.py": "ONE = 1\n"})
    packages = [{"name": "tiny", "version": "1.0", "wheel": "t.whl", "sha256": "0" * 64, "origin": "bundle"}]
    receipt = EnvReceipt.model_validate({**RECEIPT, "packages": packages})
    (env / "envbuilder.json").write_text(receipt.model_dump_json())
    past = time.time() - 60
    for path in env.rglob("*"):
        os.utime(path, (past, past))
    return lambda: prove_env(env, receipt).faults


def library(folder: Path) -> Path:
    return next((folder / "envs/tiny/lib").glob("python3.*")) / "site-packages"


def test_an_env_as_it_was_installed_is_proved(small_env: Callable[[], tuple[str, ...]]) -> None:
    assert small_env() == ()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda here: installed(here.parents[2], "stray", "2.0"), "stray 2.0 is not in the lock"),
        (lambda here: shutil.rmtree(here / "tiny-1.0.dist-info"), "tiny 1.0 is missing"),
        (lambda here: (here / "tiny.py").write_text("ONE = 100\n"), "has other bytes"),
        (lambda here: (here / "tiny.py").write_text("ONE = 2\n"), "has other bytes"),  # of the same size
        (lambda here: (here / "tiny.py").unlink(), "tiny.py is missing"),
        (lambda here: (here / "tiny-1.0.dist-info/RECORD").unlink(), "RECORD is missing"),
        (lambda here: (here / "x.pth").write_text("import os\n"), "x.pth is no package's"),
    ],
)
def test_what_changed_in_an_env_is_named(
    small_env: Callable[[], tuple[str, ...]], tmp_path: Path, change: Callable[[Path], object], fault: str
) -> None:
    change(library(tmp_path))
    assert fault in "\n".join(small_env())


def test_a_file_that_was_only_touched_is_the_same(
    small_env: Callable[[], tuple[str, ...]], tmp_path: Path
) -> None:
    (library(tmp_path) / "tiny.py").touch()
    assert small_env() == ()


@pytest.fixture
def drifted(lab: Lab) -> Iterator[None]:
    site_packages = next((lab.root.env("tiny") / "lib").glob("python3.*")) / "site-packages"
    installed(lab.root.env("tiny"), "stray", "2.0")
    yield
    shutil.rmtree(site_packages / "stray-2.0.dist-info")


@pytest.mark.usefixtures("drifted")
def test_an_env_that_has_drifted_is_refused_and_allowed_on_demand(lab: Lab) -> None:
    with pytest.raises(MismatchError, match="not as it was installed: stray") as caught:
        lab.train()
    assert caught.value.exit_code == 7
    assert "envbuilder install recipes/tiny.toml --reinstall" in caught.value.remedy
    assert not lab.run.exists()
    lab.train(allow_drift=True)
    assert "stray 2.0 is not in the lock" in json.loads((lab.run / "stamp.json").read_text())["drift"]


def test_the_trainer_is_told_its_stamp_and_when_it_must_end(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ENVBUILDER_STAMP", '{"of": "another"}')
    began = time.time()
    lab.train(
        "for name in ('STAMP', 'JOB_END'): print(os.environ['ENVBUILDER_' + name])\noutcome('finished', 0)",
        time_limit_s=600,
    )
    stamp, end = (lab.run / "log.txt").read_text().splitlines()
    assert json.loads(stamp) == json.loads((lab.run / "stamp.json").read_text())
    assert set(json.loads(stamp)) == {"env", "env is of", "config", "config is of"}
    assert began + 590 < int(end) < began + 630


def test_a_stop_by_hand_is_no_time_s_end(lab: Lab) -> None:
    when_exists(lab.run / "started", lambda: (lab.run / "stop").touch())
    with pytest.raises(StoppedError) as caught:
        lab.train("(run / 'started').touch()\nuntil((run / 'stop').exists)\noutcome('stopped', 75)")
    assert not isinstance(caught.value, TimeEnded)


def test_a_stop_file_that_comes_and_goes_unseen_is_a_stop_by_hand(lab: Lab) -> None:
    with pytest.raises(StoppedError) as caught:
        lab.train(
            "fields = {'status': 'stopped', 'exit_code': 75, 'stopped_by_file': True}\n"
            "(run / 'outcome.json').write_text(json.dumps(fields))"
        )
    assert not isinstance(caught.value, TimeEnded)


def test_a_run_that_stops_by_itself_stops_for_the_time_s_end(lab: Lab) -> None:
    error = {"message": "Stopped after step 2.", "remedy": "Again.", "context": {}}
    rest = "more = {'jobs_left': 3, 'seconds_left': 3600, 'job_seconds': 1800}\n"
    with pytest.raises(TimeEnded) as caught:
        lab.train(
            rest + f"fields = {{'status': 'stopped', 'exit_code': 75, 'error': {error}, **more}}\n"
            "(run / 'outcome.json').write_text(json.dumps(fields))"
        )
    assert caught.value.message == (
        "Stopped after step 2. About 60 min of training are left: about 3 more jobs of 30 min."
    )


def test_several_nodes_meet_at_the_first_on_a_port_of_the_job_s_own() -> None:
    meeting = Allocation(2, "node1", 15_005, "5-0")
    words = node_command_line(
        ("/env/bin/python",), Path("/c.yaml"), Path("/run"), 4, (), meeting=meeting, number=1, name="node2"
    )
    line = " ".join(words)
    assert "--nnodes 2 --rdzv-backend c10d --rdzv-endpoint node1:15005 --rdzv-id 5-0" in line
    assert "is_host=0 --local-addr node2" in line
    assert "--standalone" not in line


def test_libraries_that_would_shadow_torch_s_are_left_out(tmp_path: Path) -> None:
    cuda, other = tmp_path / "cuda", tmp_path / "other"
    for folder in (cuda, other):
        folder.mkdir()
    (cuda / "libcudart.so.12").touch()
    cache = KernelCache(tmp_path / "local", tmp_path / "kept")
    outside = {"LD_LIBRARY_PATH": f"{cuda}:{other}"}
    made = environment(outside, run=tmp_path, cache=cache, processes=1)
    assert made["LD_LIBRARY_PATH"] == str(other)
    kept = environment(outside, run=tmp_path, cache=cache, processes=1, keep_cuda_libraries=True)
    assert kept["LD_LIBRARY_PATH"] == f"{cuda}:{other}"


def test_compiled_kernels_outlive_the_node_and_nothing_is_overwritten(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "local", tmp_path / "kept")
    entry = cache.local / "triton" / "KEY"
    entry.mkdir(parents=True)
    (entry / "k.cubin").write_text("machine code")
    (entry / "tmp.pid_7").mkdir()
    (entry / "tmp.pid_7" / "half").write_text("half")
    (tmp_path / "kept/triton/KEY").mkdir(parents=True)
    (tmp_path / "kept/triton/KEY/k.json").write_text("kept")
    (entry / "k.json").write_text("another")
    cache.save()
    kept = {path.name: path.read_text() for path in cache.kept.rglob("*") if path.is_file()}
    assert kept == {"k.cubin": "machine code", "k.json": "kept"}
    elsewhere = KernelCache(tmp_path / "other-node", tmp_path / "kept")
    elsewhere.seed()
    assert (elsewhere.local / "triton/KEY/k.cubin").read_text() == "machine code"


def test_kernels_that_another_user_compiled_are_found_where_they_are_copied_to(tmp_path: Path) -> None:
    cache = KernelCache(tmp_path / "mine", tmp_path / "kept")
    entry = cache.kept / "triton" / "KEY"
    entry.mkdir(parents=True)
    (entry / "k.cubin").write_text("machine code")
    group = json.dumps({"child_paths": {"k.cubin": "/tmp/envbuilder-1/kernels/triton/KEY/k.cubin"}})
    (entry / "__grp__k.json").write_text(group)
    (entry / "__grp__strange.json").write_text("not JSON")
    cache.seed()
    copied = cache.local / "triton/KEY"
    found = json.loads((copied / "__grp__k.json").read_text())["child_paths"]
    assert found == {"k.cubin": str(copied / "k.cubin")}
    assert (copied / "__grp__strange.json").read_text() == "not JSON"


@pytest.mark.parametrize(("number", "is_time"), [(signal.SIGUSR1, True), (signal.SIGTERM, False)])
def test_of_the_signals_sigusr1_alone_tells_of_the_time_s_end(
    lab: Lab, number: signal.Signals, is_time: bool
) -> None:
    when_exists(lab.run / "started", lambda: os.kill(os.getpid(), number))
    with pytest.raises(StoppedError) as caught:
        lab.train("(run / 'started').touch()\nuntil((run / 'stop').exists)\noutcome('stopped', 75)")
    assert isinstance(caught.value, TimeEnded) is is_time

"""A compile that is stopped, or killed, loses what it was just compiling and nothing else."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from envbuilder.paths import Root
from envbuilder.progress_file import Progress, progress_path, read_progress
from envbuilder.recipe import Recipe
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_sdist

PYTHON = ".".join(platform.python_version_tuple()[:2])
SOURCE = Path(__file__).parent.parent / "packages" / "several-units"
RECIPE = Recipe.model_validate({"name": "lab", "requirements": ["several-units"], "trainer": False})
UNITS = 6
PATIENCE = 600.0
"""Seconds after which a test that waits has failed, on a machine however busy."""
# ROOT → exit code as the command's, and what was built, as JSON.
COMPILE = """
import json, sys
from pathlib import Path
from envbuilder.bundle import open_bundle
from envbuilder.compile.pipeline import compile_recipe
from envbuilder.errors import EnvbuilderError
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
root, rebuild = Root(Path(sys.argv[1])), sys.argv[2:] == ["--rebuild"]
recipe = Recipe.model_validate({"name": "lab", "requirements": ["several-units"], "trainer": False})
try:
    report = compile_recipe(
        recipe, open_bundle(root, "lab"), root=root, python=Path(sys.executable), reporter=Quiet(),
        rebuild=rebuild,
    )
except EnvbuilderError as error:
    print(json.dumps(error.to_json()))
    sys.exit(error.exit_code)
built = report.wheels[0]
print(json.dumps({**built.receipt.model_dump(mode="json"), "path": str(built.path)}))
"""


@dataclass(frozen=True)
class Job:
    """A compile as Slurm runs it: one CPU, and a progress file."""

    root: Root
    variables: Mapping[str, str]

    def start(self, *flags: str, umask: int = 0o022) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", COMPILE, self.root.path, *flags],
            env={**os.environ, "SLURM_JOB_ID": "7", "SLURM_CPUS_ON_NODE": "1", **self.variables},
            stdout=subprocess.PIPE,
            text=True,
            umask=umask,
        )

    def run(self, *flags: str, umask: int = 0o022) -> tuple[int, dict[str, Any]]:
        process = self.start(*flags, umask=umask)
        out, _ = process.communicate(timeout=PATIENCE)
        return process.returncode, json.loads(out)

    def progress(self) -> Progress | None:
        return read_progress(progress_path(self.root, "7"))

    def await_units(self, count: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while (now := self.progress()) is None or now.done < count:
            assert time.monotonic() < deadline, now
            time.sleep(0.02)


def job_in(folder: Path, **variables: str) -> Job:
    (folder / "made").mkdir(parents=True)
    files = {path.name: path.read_text(encoding="utf-8") for path in SOURCE.iterdir()}
    sdist = make_sdist(folder / "made", "several-units", "1.0", files=files)
    root = Root(folder / "root")
    make_bundle(root, RECIPE, {sdist: ["runtime"]}, python=PYTHON)
    return Job(root, variables)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    return job_in(tmp_path)


def cached(receipt: Mapping[str, Any]) -> int:
    return sum(unit["cached"] for unit in receipt["units"])


def test_a_job_that_is_told_of_its_time_limit_stops_and_the_next_goes_on(job: Job) -> None:
    process = job.start()
    job.await_units(1)
    process.send_signal(signal.SIGUSR1)
    out, _ = process.communicate(timeout=PATIENCE)
    error = json.loads(out)
    assert (process.returncode, error["error"]) == (75, "StoppedError")
    assert "units are left" in error["message"]
    left = job.progress()
    assert left is not None
    # What was running when the signal came was let finish.
    assert 2 <= left.done < UNITS
    assert list(job.root.cache.glob("compile-*")) == []
    code, receipt = job.run()
    assert (code, cached(receipt), len(receipt["units"])) == (0, left.done, UNITS)
    end = job.progress()
    assert end is not None
    assert (end.done, end.total, end.running) == (UNITS, UNITS, ())


def test_sigterm_ends_it_at_once_in_good_order(job: Job) -> None:
    process = job.start()
    job.await_units(1)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 75
    code, receipt = job.run()
    assert (code, cached(receipt) >= 1) == (0, True)


def test_after_kill_9_only_what_was_in_flight_is_compiled_again(job: Job) -> None:
    process = job.start()
    job.await_units(3)
    process.kill()
    process.communicate(timeout=PATIENCE)
    left = job.progress()
    assert left is not None
    code, receipt = job.run()
    # One CPU, so one unit was in flight.
    assert (code, cached(receipt) >= left.done) == (0, True)


def test_the_cache_is_for_the_same_inputs_alone(job: Job, tmp_path: Path) -> None:
    assert cached(job.run()[1]) == 0
    code, again = job.run("--rebuild")
    assert (code, cached(again)) == (0, 0)


def test_the_wheel_tells_what_it_is_made_of_and_a_statement_lies_beside_it(job: Job) -> None:
    _, receipt = job.run()
    wheel = Path(receipt["path"])
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if "/sboms/" in name)
        assert json.loads(archive.read(name))["bomFormat"] == "CycloneDX"
    statement = json.loads((wheel.parent / "provenance.json").read_text())
    assert statement["subject"][0]["digest"]["sha256"] == receipt["wheel_sha256"]
    assert len(statement["predicate"]["runDetails"]["byproducts"]) == UNITS
    (page,) = job.root.logs.glob("*.timeline.html")
    assert "unit3.cpp" in page.read_text()
    assert any(job.root.wheelhouse.glob("simple/*/several-units/index.html"))

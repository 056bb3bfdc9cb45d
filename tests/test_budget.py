"""A login node's limits: every command keeps within them, and what is cut off goes on."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from envbuilder.budget import budget, within
from envbuilder.errors import MismatchError
from envbuilder.hash_record import HashRecord, Stamp
from envbuilder.hashing import hashing
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.process import run as run_program
from envbuilder.site import LoginBudget
from tests.bundles.samples import NAME, Sample
from tests.conftest import REPOSITORY
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist, make_wheel

GIB = 1 << 30
RECIPE = """
name = "small"
requirements = ["plain==1.0", "compiled==2.0"]
trainer = false
[target]
python = ">=3.{minor},<3.{next}"
[build.compiled]
[index]
plain = "lab"
compiled = "lab"
"""
CUT_OFF = """
import os, sys
from envbuilder.cli import main
from envbuilder.display import ConsoleReporter
told = ConsoleReporter.progress
def progress(self, label, done, total, unit):
    if 2 * done > total:
        os.kill(os.getpid(), int(os.environ["SIGNAL"]))
    told(self, label, done, total, unit)
ConsoleReporter.progress = progress
main()
"""
"""The command line, which is sent a signal when half of the bytes are read."""


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (300, 300))
    resource.setrlimit(resource.RLIMIT_AS, (2 * GIB, 2 * GIB))


def on_login_node(*words: str | Path) -> dict[str, Any]:
    """What the command `envbuilder --json WORDS` tells, of 300 CPU seconds and 2 GiB of address space."""
    command = [sys.executable, "-m", "envbuilder", "--json", *map(str, words)]
    done = subprocess.run(command, preexec_fn=limited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    told: dict[str, Any] = json.loads(done.stdout)
    return told


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[IndexServer]:
    folder = tmp_path / "index"
    folder.mkdir()
    make_wheel(folder, "plain", "1.0", files={"plain.bin": os.urandom(3_000_000)})
    make_sdist(folder, "compiled", "2.0", requires=["plain"], files={"compiled.py": "import plain\n"})
    with IndexServer(folder) as server:
        monkeypatch.setenv("ENVBUILDER_INDEX_LAB_URL", server.url)
        yield server


def test_every_command_of_the_login_node_fits_into_300_cpu_seconds_and_2_gib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: IndexServer
) -> None:
    monkeypatch.setenv("ENVBUILDER_ROOT", str(tmp_path / "root"))
    recipe = tmp_path / "recipes/small.toml"
    recipe.parent.mkdir()
    minor = sys.version_info.minor
    recipe.write_text(RECIPE.format(minor=minor, next=minor + 1))

    told = {
        "lock": on_login_node("lock", recipe),
        "fetch": on_login_node("fetch", recipe),
        "fetch --verify": on_login_node("fetch", recipe, "--verify"),
        "verify": on_login_node("bundle", "verify", "small"),
        "pack": on_login_node("bundle", "pack", "small", "-o", tmp_path / "small.tar"),
    }

    assert told["fetch"]["transferred_files"] == told["fetch"]["files"] > 2
    assert told["fetch --verify"]["transferred_files"] == 0
    assert all(0 < one["cpu_seconds"] < 300 for one in told.values())
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 2 * GIB // 1024
    # Nothing is left to go on from, and what workers have packed is what the tool reads again.
    assert not [*(tmp_path / "root/cache").rglob("*.hashed")]
    assert on_login_node("bundle", "unpack", tmp_path / "small.tar")["files"] == told["pack"]["files"]


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """A site whose login node gives one core and 300 seconds."""
    path = tmp_path / "small.toml"
    text = (REPOSITORY / "recipes/sites/generic.toml").read_text()
    path.write_text(f"{text}\n[login]\ncpu-seconds = 300\nthreads = 1\n")
    return path


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    sample = Sample(Root(tmp_path / "root"))
    sample.model_files |= {f"weights-{number}": os.urandom(1 << 20) for number in range(8)}
    return sample.make()


def verified(bundle: Bundle, site: Path, *, cut_off: signal.Signals | None = None) -> tuple[int, Any]:
    """The exit code of `bundle verify`, and what it tells."""
    program = ["-m", "envbuilder"] if cut_off is None else ["-c", CUT_OFF]
    done = subprocess.run(
        [sys.executable, *program, "--json", "bundle", "verify", bundle.path],
        env={**os.environ, "ENVBUILDER_SITE": str(site), "SIGNAL": str(int(cut_off or 0))},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    return done.returncode, json.loads(done.stdout or "null")


@pytest.mark.parametrize("by", [signal.SIGXCPU, signal.SIGKILL])
def test_a_verify_that_is_cut_off_goes_on_and_reads_no_file_twice(
    bundle: Bundle, site: Path, by: signal.Signals
) -> None:
    code, error = verified(bundle, site, cut_off=by)
    if by == signal.SIGXCPU:
        assert (code, error["error"]) == (75, "StoppedError")
        assert "Run the same command again." in error["remedy"]
    else:
        assert code == -by
    record = bundle.path.parents[1] / f"cache/verify/{NAME}.hashed"
    hashed = [json.loads(line)["path"] for line in record.read_text().splitlines()]

    code, told = verified(bundle, site)
    assert (code, told["recorded"]) == (0, len(set(hashed)))
    assert 0 < len(set(hashed)) == len(hashed) < told["files"]

    # Once at its end, it reads everything anew.
    code, told = verified(bundle, site)
    assert (code, told["recorded"]) == (0, 0)


def test_what_is_changed_after_it_was_hashed_is_read_again(bundle: Bundle, site: Path) -> None:
    assert verified(bundle, site, cut_off=signal.SIGKILL)[0] == -signal.SIGKILL
    record = bundle.path.parents[1] / f"cache/verify/{NAME}.hashed"
    hashed = Path(json.loads(record.read_text().splitlines()[0])["path"])
    content, before = bytearray(hashed.read_bytes()), hashed.stat()
    content[0] ^= 1
    hashed.write_bytes(content)
    os.utime(hashed, ns=(before.st_atime_ns, before.st_mtime_ns))

    code, error = verified(bundle, site)
    assert (code, list(error["context"])) == (5, [str(hashed.relative_to(bundle.path))])


def test_an_old_record_a_torn_one_and_a_linked_one_are_not_believed(tmp_path: Path) -> None:
    file, place = tmp_path / "file", tmp_path / "cache/record"
    file.write_bytes(b"bytes")
    stamp = Stamp.of(file, hashlib.sha256(b"bytes").hexdigest())
    HashRecord(place).add(file, stamp)
    assert HashRecord(place).has(file, stamp.sha256)
    assert not HashRecord(place).has(file, "0" * 64)

    whole = place.read_text()
    place.write_text(whole[: len(whole) // 2])
    assert not HashRecord(place).has(file, stamp.sha256)
    entry = json.loads(whole)
    place.write_text(json.dumps({**entry, "hashed_at": entry["hashed_at"] - 90_000}) + "\n")
    assert not HashRecord(place).has(file, stamp.sha256)
    place.rename(tmp_path / "elsewhere")
    (tmp_path / "elsewhere").write_text(whole)
    place.symlink_to(tmp_path / "elsewhere")
    assert not HashRecord(place).has(file, stamp.sha256)


def test_a_site_limits_this_process_and_what_it_starts_for_the_block_alone() -> None:
    child = [
        sys.executable,
        "-c",
        "import os, resource; "
        "print(len(os.sched_getaffinity(0)), *resource.getrlimit(resource.RLIMIT_CPU)[:1])",
    ]
    before = budget(), os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CPU)
    with within(LoginBudget(threads=1, cpu_seconds=100_000), kept="") as allowed:
        assert (allowed.cpus, allowed.cpu_seconds) == (1, 100_000) == (budget().cpus, budget().cpu_seconds)
        assert run_program(child).output.split() == ["1", "100000"]
    # Two threads of a CPU need addresses; below that there is still one.
    with within(LoginBudget(memory="256M"), kept="") as allowed:
        assert allowed.cpus == len(os.sched_getaffinity(0)) == 1
    assert before == (budget(), os.sched_getaffinity(0), resource.getrlimit(resource.RLIMIT_CPU))


def test_a_process_stops_by_itself_before_its_cpu_time_is_used_up() -> None:
    program = """
import resource, time
from concurrent.futures import ThreadPoolExecutor
from envbuilder.budget import within
from envbuilder.errors import StoppedError
from envbuilder.site import LoginBudget
# From here on: what the imports take is the machine's matter.
limit = int(time.process_time()) + 5
resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
ended = []
def burn():
    while not ended:
        sum(range(10_000))
try:
    with ThreadPoolExecutor(1) as pool, within(LoginBudget(), kept="All is kept."):
        future = pool.submit(burn)
        try:
            future.result()
        finally:
            ended.append(True)
except StoppedError as error:
    print(error.exit_code, error.remedy, time.process_time() < limit)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    expected = "75 Run the same command again. All is kept. True\n"
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


def test_workers_hash_more_than_one_process_could(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 16 << 20)
    expected = hashlib.sha256(bytes(16 << 20)).hexdigest()
    before = _used_by_ended_children()
    with hashing(cpu_seconds=1.0) as hasher:
        while _used_by_ended_children() - before < 1.0:
            assert hasher.sha256(path, lambda _: None) == expected


def _used_by_ended_children() -> float:
    """Seconds of CPU time."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def test_a_file_that_takes_more_cpu_time_than_a_process_may_use_is_named(tmp_path: Path) -> None:
    path = tmp_path / "huge.safetensors"
    path.touch()
    os.truncate(path, 64 << 20)
    done: list[int] = []
    with (
        hashing(cpu_seconds=0.01) as hasher,
        pytest.raises(MismatchError, match=r"huge\.safetensors") as told,
    ):
        hasher.sha256(path, done.append)
    assert "srun" in told.value.remedy


def test_workers_hash_copy_and_refuse_as_this_process_does(tmp_path: Path) -> None:
    contents = [b"", b"x", os.urandom(3_000_000)]
    (tmp_path / "link").symlink_to(tmp_path / "0")
    results = []
    for number, cpu_seconds in enumerate([None, 300.0]):
        counted: list[int] = []
        with hashing(cpu_seconds) as hasher, (tmp_path / f"copy{number}").open("w+b") as copy:
            copy.write(b"head")
            for at, content in enumerate(contents):
                (tmp_path / str(at)).write_bytes(content)
                sha256 = hashlib.sha256(content).hexdigest()
                assert hasher.sha256(tmp_path / str(at), counted.append) == sha256
                assert hasher.copy(tmp_path / str(at), len(content), copy, counted.append) == (
                    sha256,
                    len(content),
                )
            assert hasher.copy(tmp_path / "2", 10, copy, counted.append)[1] != 10
            for path, error in (("link", OSError), ("absent", FileNotFoundError)):
                with pytest.raises(error):
                    hasher.sha256(tmp_path / path, counted.append)
            copy.seek(0)
            results.append(copy.read(4 + 1 + 3_000_000))
    assert results == [b"head" + b"".join(contents)] * 2


def test_a_program_that_used_up_its_cpu_time_is_said_to_have() -> None:
    burn = "import resource; resource.setrlimit(resource.RLIMIT_CPU, (1, 2))\nwhile True: pass"
    with pytest.raises(MismatchError, match="CPU time"):
        run_program([sys.executable, "-c", burn])

"""The driver, the service and what lies between them, with the machine's real C++ compiler."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from envbuilder.compile.drivers import compiler
from envbuilder.compile.units.broker import Broker
from envbuilder.compile.units.object_cache import ObjectCache
from envbuilder.compile.units.records import Records
from envbuilder.compile.units.scope import Scope
from envbuilder.compile.units.service import CompileService
from envbuilder.compile.units.unit_compiler import UnitCompiler
from envbuilder.model import UnitTiming

CXX = shutil.which("g++") or shutil.which("c++") or ""
PATIENCE = 300.0
"""Seconds after which a test that waits has failed, on a machine however busy."""


@dataclass
class Bench:
    """A service in `folder`, and a way to call compilers through it."""

    folder: Path
    compiler: UnitCompiler
    broker: Broker

    @property
    def units(self) -> list[UnitTiming]:
        return self.compiler.ledger.units

    def start(self, *arguments: str, real: str = CXX, tool: str = "c++") -> subprocess.Popen[str]:
        driver = [sys.executable, "-I", "-S", compiler.__file__, str(self.folder / "socket"), tool, real]
        return subprocess.Popen(
            [*driver, *arguments],
            cwd=self.folder / "tree",
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def call(self, *arguments: str, real: str = CXX, tool: str = "c++") -> tuple[int, str, str]:
        process = self.start(*arguments, real=real, tool=tool)
        out, err = process.communicate(timeout=PATIENCE)
        return process.returncode, out, err


def scope_of(folder: Path) -> Scope:
    return Scope(
        package="pkg",
        tree=str(folder / "tree"),
        wanted=("90",),
        ptx=None,
        sharding="auto",
        prove=False,
        compilers={"c++": ("g++ test", "1"), "nvcc": ("nvcc test", "2")},
        linker=CXX,
        steady_names=True,
        listing="",
        outside=Path,
        fixed=lambda text: text.replace(str(folder), "/build"),
    )


def serving(folder: Path, cache: Path, *, reuse: bool = True) -> tuple[CompileService, Bench]:
    (folder / "tree").mkdir(parents=True, exist_ok=True)
    broker = Broker(cpus=2, memory=8 << 30, gather_s=0)
    scope = scope_of(folder)
    unit_compiler = UnitCompiler(
        scope,
        broker=broker,
        records=Records.open(cache / "records"),
        cache=ObjectCache(cache / "objects"),
        reuse=reuse,
        clock=time.monotonic,
    )
    service = CompileService(folder / "socket", scope, unit_compiler, folder / "log")
    return service, Bench(folder, unit_compiler, broker)


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    service, bench = serving(tmp_path / "one", tmp_path / "cache")
    (bench.folder / "tree" / "a.h").write_text("inline int a() { return 1; }\n")
    (bench.folder / "tree" / "a.cpp").write_text('#include "a.h"\nint b() { return a(); }\n')
    with service:
        yield bench


def test_a_unit_is_compiled_and_recorded_and_its_dependencies_told(bench: Bench) -> None:
    assert bench.call("-O2", "-MMD", "-MF", "a.d", "-c", "a.cpp", "-o", "a.o") == (0, "", "")
    tree = bench.folder / "tree"
    assert (tree / "a.o").read_bytes()[:4] == b"\x7fELF"
    target, _, names = (tree / "a.d").read_text().partition(":")
    assert (target, {str(tree / "a.cpp"), str(tree / "a.h")} <= set(names.split())) == ("a.o", True)
    (unit,) = bench.units
    assert (unit.source, unit.cached, unit.threads, unit.shard) == ("a.cpp", False, 1, "")
    assert unit.peak_rss_bytes > 1_000_000
    assert sorted(path.name for path in tree.iterdir()) == ["a.cpp", "a.d", "a.h", "a.o"]


def test_the_second_time_it_comes_from_the_cache_in_another_folder_too(bench: Bench, tmp_path: Path) -> None:
    bench.call("-c", "a.cpp", "-o", "a.o")
    service, other = serving(tmp_path / "two", tmp_path / "cache")
    for name in ("a.h", "a.cpp"):
        shutil.copy(bench.folder / "tree" / name, other.folder / "tree")
    # In that folder a header's name leads elsewhere.
    scope = replace(
        scope_of(other.folder), outside=lambda path: Path(path.replace("/build", str(other.folder)))
    )
    other.compiler._scope = scope
    with service:
        assert other.call("-c", "a.cpp", "-o", "a.o") == (0, "", "")
    assert [unit.cached for unit in other.units] == [True]
    assert (other.folder / "tree/a.o").read_bytes() == (bench.folder / "tree/a.o").read_bytes()


@pytest.mark.parametrize("change", ["header", "flag", "variable"])
def test_what_changes_the_object_is_compiled_again(
    bench: Bench, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.call("-c", "a.cpp", "-o", "a.o")
    if change == "header":
        (bench.folder / "tree" / "a.h").write_text("inline int a() { return 2; }\n")
    if change == "variable":
        monkeypatch.setenv("CPATH", "/nowhere")
    bench.call(*(["-O1"] if change == "flag" else []), "-c", "a.cpp", "-o", "a.o")
    assert [unit.cached for unit in bench.units] == [False, False]


def test_a_compiler_s_words_and_status_are_passed_on_from_the_cache_too(bench: Bench) -> None:
    (bench.folder / "tree" / "w.cpp").write_text("#warning beware\nint w;\n")
    first = bench.call("-c", "w.cpp", "-o", "w.o")
    assert first[0] == 0
    assert "w.cpp:1:2: warning: #warning beware" in first[2]
    assert bench.call("-c", "w.cpp", "-o", "w.o") == first
    (bench.folder / "tree" / "bad.cpp").write_text("int x = nonsense;\n")
    status, _, error = bench.call("-c", "bad.cpp", "-o", "bad.o")
    assert (status, "bad.cpp:1:9: error" in error) == (1, True)
    assert not (bench.folder / "tree" / "bad.o").exists()


def test_other_commands_go_to_the_compiler_itself(bench: Bench) -> None:
    assert bench.call("--version")[1].startswith(("g++", "c++"))
    (bench.folder / "tree" / "main.cpp").write_text("int main() { return 7; }\n")
    assert bench.call("main.cpp", "-o", "program")[0] == 0
    assert subprocess.run([bench.folder / "tree" / "program"], check=False).returncode == 7
    assert bench.units == []


def test_a_missing_source_is_an_error_and_nothing_hangs(bench: Bench) -> None:
    status, _, error = bench.call("-c", "gone.cpp", "-o", "gone.o")
    assert status == 1
    assert "gone.cpp" in error


def slow(folder: Path) -> str:
    """A compiler that says that it has started, and then takes its time."""
    program = folder / "slow"
    program.write_text(f"#!/bin/sh\ntouch {folder}/started\nsleep 600 & wait\n")
    program.chmod(0o755)
    return str(program)


def await_file(path: Path) -> None:
    deadline = time.monotonic() + PATIENCE
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} has not come"
        time.sleep(0.01)


def test_after_a_stop_nothing_is_started_and_the_driver_says_so(bench: Bench) -> None:
    bench.broker.stop("the time is up")
    assert bench.call("-c", "a.cpp", "-o", "a.o")[0] == 75
    assert bench.units == []


def test_a_driver_that_is_killed_gives_its_slot_back(bench: Bench) -> None:
    process = bench.start("-c", "a.cpp", "-o", "a.o", real=slow(bench.folder))
    await_file(bench.folder / "started")
    process.kill()
    process.communicate()
    deadline = time.monotonic() + PATIENCE
    while bench.broker.snapshot().running:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_driver_and_its_compiler(bench: Bench, number: signal.Signals) -> None:
    process = bench.start("-c", "a.cpp", "-o", "a.o", real=slow(bench.folder))
    await_file(bench.folder / "started")
    process.send_signal(number)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == -number
    left = subprocess.run(["pgrep", "-f", str(bench.folder / "slow")], capture_output=True, check=False)
    assert left.stdout == b""


def test_a_compiler_that_cannot_be_started_is_an_error(bench: Bench) -> None:
    status, _, error = bench.call("-c", "a.cpp", "-o", "a.o", real="/nowhere/g++")
    assert status == 1
    assert "/nowhere/g++" in error


def test_when_the_service_ends_its_drivers_do(tmp_path: Path) -> None:
    service, bench = serving(tmp_path / "one", tmp_path / "cache")
    (bench.folder / "tree" / "a.cpp").write_text("int a;\n")
    with service:
        process = bench.start("-c", "a.cpp", "-o", "a.o", real=slow(bench.folder))
        await_file(bench.folder / "started")
    _, error = process.communicate(timeout=PATIENCE)
    assert (process.returncode, "has gone away" in error) == (1, True)


def test_a_driver_without_a_service_says_so(tmp_path: Path) -> None:
    (tmp_path / "tree").mkdir()
    bench = Bench(tmp_path, None, None)  # type: ignore[arg-type]
    status, _, error = bench.call("-c", "a.cpp")
    assert (status, "does not answer" in error) == (1, True)


def test_what_is_no_driver_is_sent_away(bench: Bench) -> None:
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(bench.folder / "socket"))
        stranger.sendall(compiler.FRAME.pack(3, 0) + b"{]!")
        assert stranger.recv(1) == b""
    assert bench.call("-c", "a.cpp", "-o", "a.o")[0] == 0


def test_calls_within_a_call_go_straight_to_the_compiler(bench: Bench) -> None:
    env = {**os.environ, compiler.INSIDE: "1"}
    driver: Sequence[str] = [
        sys.executable,
        "-I",
        "-S",
        compiler.__file__,
        "/nowhere",
        "c++",
        CXX,
        "--version",
    ]
    done = subprocess.run(driver, env=env, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(("g++", "c++"))


def test_many_calls_at_once_are_all_answered(bench: Bench) -> None:
    tree = bench.folder / "tree"
    for number in range(24):
        (tree / f"u{number}.cpp").write_text(f"int u{number};\n")
    results: dict[int, int] = {}

    def one(number: int) -> None:
        results[number] = bench.call("-c", f"u{number}.cpp", "-o", f"u{number}.o")[0]

    threads = [threading.Thread(target=one, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == dict.fromkeys(range(24), 0)
    assert len(bench.units) == 24

"""The driver that stands in for nvcc: what it drops, what it keeps, and that it passes everything else on."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from envbuilder.compile.drivers import nvcc

UNIT = ["-c", "a.cu", "-o", "a.o"]
SM_90 = ["-gencode", "arch=compute_90,code=sm_90"]


@pytest.mark.parametrize(
    ("spelling", "kept", "dropped"),
    [
        ("-gencode arch=compute_90,code=sm_90", ["sm_90"], []),
        ("-gencode=arch=compute_90,code=sm_90", ["sm_90"], []),
        ("--generate-code arch=compute_90,code=sm_90", ["sm_90"], []),
        ("--generate-code=arch=compute_90,code=sm_90", ["sm_90"], []),
        ("-gencode code=sm_90,arch=compute_90", ["sm_90"], []),
        ("-gencode arch=compute_90,code=[sm_90,compute_90]", ["sm_90"], ["compute_90"]),
        ("-gencode arch=compute_90,code=sm_90,compute_90", ["sm_90"], ["compute_90"]),
        ("""-gencode 'arch=compute_90,code="sm_90,compute_90"'""", ["sm_90"], ["compute_90"]),
        ("-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90", ["sm_90"], ["sm_80"]),
        ("-gencode arch=compute_53,code=sm_53", ["sm_90"], ["sm_53"]),
        ("-gencode arch=compute_90a,code=sm_90a", ["sm_90a"], []),
        ("-gencode arch=compute_100f,code=sm_100f", ["sm_90"], ["sm_100f"]),
        ("-arch=sm_90", ["sm_90"], []),
        ("-arch sm_90", ["sm_90"], []),
        ("--gpu-architecture=sm_80", ["sm_90"], ["sm_80"]),
        ("--gpu-architecture compute_90 --gpu-code sm_90,compute_90", ["sm_90"], ["compute_90"]),
        ("-code=sm_80,sm_90 -arch=compute_80", ["sm_90"], ["sm_80"]),
        ("-arch=all-major", ["sm_90"], ["all-major"]),
        ("-arch=native", ["sm_90"], ["native"]),
        ("-arch=compute_90", ["sm_90"], ["compute_90"]),
        ("", ["sm_90"], []),
    ],
)
def test_only_the_wanted_architecture_is_left_of_any_spelling(
    spelling: str, kept: list[str], dropped: list[str]
) -> None:
    planned = nvcc.plan([*shlex.split(spelling), *UNIT], ["90"])
    number = kept[0].removeprefix("sm_")
    assert planned.arguments == ["-gencode", f"arch=compute_{number},code={kept[0]}", *UNIT]
    assert (planned.kept, planned.dropped) == (kept, dropped)


def test_several_wanted_architectures_are_all_kept_and_added_where_none_was_asked_for() -> None:
    asked = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_75,code=sm_75", *SM_90]
    assert nvcc.plan([*asked, *UNIT], ["80", "90"]).kept == ["sm_80", "sm_90"]
    assert nvcc.plan(UNIT, ["80", "90"]).kept == ["sm_80", "sm_90"]


def test_a_wanted_variant_is_not_served_by_the_plain_architecture() -> None:
    planned = nvcc.plan([*SM_90, *UNIT], ["90a"])
    assert (planned.kept, planned.dropped) == (["sm_90a"], ["sm_90"])


@pytest.mark.parametrize("spelling", ["--threads 4", "--threads=4", "-t 4", "-t=4", "-t4"])
def test_threads_are_dropped(spelling: str) -> None:
    assert nvcc.plan([*spelling.split(), *SM_90, *UNIT], ["90"]).arguments == [*SM_90, *UNIT]


@pytest.mark.parametrize(
    "arguments",
    [["-V"], ["--version"], ["--list-gpu-code"], ["--options-file", "flags.rsp"], ["@flags.rsp"], []],
)
def test_a_command_that_compiles_nothing_passes_unchanged(arguments: list[str]) -> None:
    assert nvcc.plan(arguments, ["90"]) == nvcc.Plan(arguments, [], [])


def test_everything_else_passes_unchanged_and_in_order() -> None:
    others = ["-O3", "-Xcompiler", "-fPIC", '-DX="a b"', "--expt-relaxed-constexpr", "-I", "in", *UNIT]
    assert nvcc.plan([*others[:3], *SM_90, *others[3:]], ["90"]).arguments == [
        *others[:3],
        *SM_90,
        *others[3:],
    ]


def drive(folder: Path, real: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs the driver as a build would, on a stand-in for nvcc with the shell text `real`."""
    program = folder / "real nvcc"
    program.write_text(f"#!/bin/sh\n{real}\n", encoding="utf-8")
    program.chmod(0o755)
    command = [sys.executable, "-I", "-S", nvcc.__file__, str(program), "90", str(folder / "units.jsonl")]
    return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)


def test_a_compiled_unit_is_measured(tmp_path: Path) -> None:
    done = drive(tmp_path, 'echo "$@"', "-gencode", "arch=compute_80,code=sm_80", *UNIT)
    assert done.stdout.split() == [*SM_90, *UNIT]
    (line,) = (tmp_path / "units.jsonl").read_text(encoding="utf-8").splitlines()
    unit = json.loads(line)
    assert (unit["source"], unit["architectures_kept"], unit["architectures_dropped"]) == (
        "a.cu",
        ["sm_90"],
        ["sm_80"],
    )
    assert unit["peak_rss_bytes"] > 100_000
    assert unit["seconds"] >= 0
    assert unit["cpu_seconds"] >= 0


def test_the_exit_status_is_nvccs_and_a_failed_unit_is_not_recorded(tmp_path: Path) -> None:
    assert drive(tmp_path, "exit 3", *UNIT).returncode == 3
    assert not (tmp_path / "units.jsonl").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_the_driver_dies_of_the_signal_that_nvcc_died_of(tmp_path: Path, number: signal.Signals) -> None:
    assert drive(tmp_path, f"kill -{number.value} $$", *UNIT).returncode == -number


def test_a_signal_to_the_driver_reaches_nvcc(tmp_path: Path) -> None:
    program = tmp_path / "nvcc"
    started = tmp_path / "started"
    os.mkfifo(started)
    program.write_text(
        f"#!/bin/sh\ntrap 'echo stopped; exit 5' TERM\necho > {started}\nwhile :; do sleep 0.05; done\n",
        encoding="utf-8",
    )
    program.chmod(0o755)
    command = [sys.executable, "-I", "-S", nvcc.__file__, str(program), "90", str(tmp_path / "units"), *UNIT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as driver:
        started.read_text(encoding="utf-8")
        driver.terminate()
        output, _ = driver.communicate(timeout=10)
    assert (output, driver.returncode) == ("stopped\n", 5)


def test_units_that_end_at_once_are_all_recorded(tmp_path: Path) -> None:
    program = tmp_path / "nvcc"
    program.write_text("#!/bin/sh\nexit 0\n", encoding="utf-8")
    program.chmod(0o755)
    units = tmp_path / "units.jsonl"
    drivers = [
        subprocess.Popen(
            [sys.executable, "-I", "-S", nvcc.__file__, str(program), "90", str(units), "-c", f"{i}.cu"]
        )
        for i in range(8)
    ]
    assert [driver.wait() for driver in drivers] == [0] * 8
    sources = [json.loads(line)["source"] for line in units.read_text(encoding="utf-8").splitlines()]
    assert sorted(sources) == [f"{i}.cu" for i in range(8)]

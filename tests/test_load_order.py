"""What the loader of this machine does, against what is said of it."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from envbuilder.load_order import load_order
from tests.doctor.fatbins import make_library

OPEN = """
import ctypes, sys
for path in sys.argv[1:]:
    ctypes.CDLL(path)
with open("/proc/self/maps") as maps:
    print(*sorted({line.split()[-1] for line in maps if ".so" in line}), sep="\\n")
"""


def really_loaded(modules: list[Path], below: Path, variables: dict[str, str]) -> set[Path]:
    """Which of the files below `below` the loader has loaded in the end."""
    done = subprocess.run(
        [sys.executable, "-c", OPEN, *modules],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=True,
    )
    paths = (Path(line) for line in done.stdout.splitlines())
    return {path for path in paths if path.is_relative_to(below)}


def said_to_be_loaded(modules: list[Path], below: Path, variables: dict[str, str]) -> set[Path]:
    loaded = load_order(
        modules,
        interpreter=Path(sys.executable),
        library_path=variables.get("LD_LIBRARY_PATH", ""),
        preload=variables.get("LD_PRELOAD", ""),
    )
    return {library.path.resolve() for library in loaded if library.path.is_relative_to(below)}


@pytest.mark.parametrize(
    ("tags", "searched", "preloaded"),
    list(product(["--disable-new-dtags", "--enable-new-dtags"], [False, True], [False, True])),
)
def test_of_two_copies_the_one_is_named_that_the_loader_takes(
    tmp_path: Path, tags: str, searched: bool, preloaded: bool
) -> None:
    """`module` needs `middle`, which it finds by its search path; `middle` needs `deep` and has none."""
    for folder in ("own", "other"):
        make_library(tmp_path / folder / "libdeep.so.1", "int deep(void) { return 0; }")
    deep = tmp_path / "own/libdeep.so.1"
    middle = make_library(tmp_path / "own/libmiddle.so.1", "int middle(void) { return 0; }", deep)
    path = f"-Wl,{tags},-rpath,$ORIGIN/own"
    link = f"-Wl,-rpath-link,{deep.parent}"
    module = make_library(tmp_path / "module.so", "int module(void) { return 0; }", middle, deep, path, link)
    variables = {}
    if searched:
        variables["LD_LIBRARY_PATH"] = str(tmp_path / "other")
    if preloaded:
        variables["LD_PRELOAD"] = str(tmp_path / "other/libdeep.so.1")
    really = really_loaded([module], tmp_path, variables)
    assert module in really
    assert said_to_be_loaded([module], tmp_path, variables) == really


def test_what_is_opened_by_its_path_comes_in_beside_another_of_the_same_name(tmp_path: Path) -> None:
    modules = [
        make_library(tmp_path / folder / "libone.so", f"int {folder}(void) {{ return 0; }}")
        for folder in ("first", "second")
    ]
    assert said_to_be_loaded(modules, tmp_path, {}) == really_loaded(modules, tmp_path, {}) == set(modules)


def test_who_needed_a_library_and_how_it_was_found_is_told(tmp_path: Path) -> None:
    deep = make_library(tmp_path / "lib/libdeep.so.1", "int deep(void) { return 0; }")
    module = make_library(
        tmp_path / "module.so", "int f(void) { return 0; }", deep, "-Wl,--enable-new-dtags,-rpath,$ORIGIN/lib"
    )
    *_, opened, found = load_order([module], interpreter=Path(sys.executable))
    assert (opened.name, opened.through) == ("module.so", "its path")
    assert (found.name, found.through, found.by) == ("libdeep.so.1", "RUNPATH of module.so", opened)


def test_what_is_no_shared_object_is_left_out(tmp_path: Path) -> None:
    script = tmp_path / "python"
    script.write_text("#!/bin/sh\n", encoding="utf-8")
    assert load_order([tmp_path / "none.so", script], interpreter=script) == ()

"""nvcc's architecture options: what is dropped, what is kept, and that everything else stays."""

from __future__ import annotations

import shlex

import pytest

from envbuilder.compile.units import nvcc_options

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
    planned = nvcc_options.plan([*shlex.split(spelling), *UNIT], ["90"])
    number = kept[0].removeprefix("sm_")
    assert planned.arguments == ["-gencode", f"arch=compute_{number},code={kept[0]}", *UNIT]
    assert (planned.kept, planned.dropped) == (kept, dropped)


def test_several_wanted_architectures_are_all_kept_and_added_where_none_was_asked_for() -> None:
    asked = ["-gencode", "arch=compute_80,code=sm_80", "-gencode", "arch=compute_75,code=sm_75", *SM_90]
    assert nvcc_options.plan([*asked, *UNIT], ["80", "90"]).kept == ["sm_80", "sm_90"]
    assert nvcc_options.plan(UNIT, ["80", "90"]).kept == ["sm_80", "sm_90"]


def test_a_wanted_variant_is_not_served_by_the_plain_architecture() -> None:
    planned = nvcc_options.plan([*SM_90, *UNIT], ["90a"])
    assert (planned.kept, planned.dropped) == (["sm_90a"], ["sm_90"])


@pytest.mark.parametrize("spelling", ["--threads 4", "--threads=4", "-t 4", "-t=4", "-t4"])
def test_threads_are_dropped(spelling: str) -> None:
    assert nvcc_options.plan([*spelling.split(), *SM_90, *UNIT], ["90"]).arguments == [*SM_90, *UNIT]


@pytest.mark.parametrize(
    "arguments",
    [["-V"], ["--version"], ["--list-gpu-code"], ["--options-file", "flags.rsp"], ["@flags.rsp"], []],
)
def test_a_command_that_compiles_nothing_passes_unchanged(arguments: list[str]) -> None:
    assert nvcc_options.plan(arguments, ["90"]) == nvcc_options.Plan(arguments, [], [])


def test_everything_else_passes_unchanged_and_in_order() -> None:
    others = ["-O3", "-Xcompiler", "-fPIC", '-DX="a b"', "--expt-relaxed-constexpr", "-I", "in", *UNIT]
    assert nvcc_options.plan([*others[:3], *SM_90, *others[3:]], ["90"]).arguments == [
        *others[:3],
        *SM_90,
        *others[3:],
    ]


def test_ptx_is_kept_or_added_where_it_is_wanted() -> None:
    asked = ["-gencode", "arch=compute_90,code=[sm_90,compute_90]", "-gencode", "arch=compute_80,code=sm_80"]
    planned = nvcc_options.plan([*asked, *UNIT], ["90"], ptx="90")
    assert (planned.kept, planned.dropped) == (["compute_90", "sm_90"], ["sm_80"])
    assert planned.arguments[:4] == ["-gencode", "arch=compute_90,code=compute_90", *SM_90]
    assert nvcc_options.plan([*SM_90, *UNIT], ["90"], ptx="90").kept == ["compute_90", "sm_90"]

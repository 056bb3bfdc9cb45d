"""What a compiler's command line is taken for."""

from __future__ import annotations

import pytest

from envbuilder.compile.units.command_line import Other, Tool, Unit, read_command

TORCH_NVCC = (
    "--generate-dependencies-with-compile --dependency-output /b/k.o.d -I/t/include -I /t/api "
    "-isystem /c/inc "
    "-DTORCH_EXTENSION_NAME=k -c -c /s/csrc/k.cu -o /b/k.o -Xcompiler -fPIC --threads 4 "
    "-gencode arch=compute_80,code=sm_80 -gencode arch=compute_90,code=sm_90 -std=c++17"
)


def read(text: str, tool: Tool = "nvcc", **files: str) -> Unit | Other:
    return read_command(tool, text.split(), wanted=["90"], response_file=files.get)


def unit(text: str, tool: Tool = "nvcc", **files: str) -> Unit:
    found = read(text, tool, **files)
    assert isinstance(found, Unit)
    return found


def test_a_unit_is_taken_apart() -> None:
    found = unit(TORCH_NVCC)
    assert (found.source, found.output, found.depfile) == ("/s/csrc/k.cu", "/b/k.o", "/b/k.o.d")
    assert found.includes == ("/t/include", "/t/api", "/c/inc")
    assert (found.kept, found.dropped, found.cuda) == (("sm_90",), ("sm_80",), True)
    assert not {"-o", "/b/k.o", "--dependency-output", "/b/k.o.d", "--threads"} & set(found.arguments)


def test_its_command_is_the_same_but_for_where_it_writes() -> None:
    command = unit(TORCH_NVCC).command(
        "nvcc", source="/s/csrc/k.1.cu", output="1.o", depfile="1.d", more=["-X"]
    )
    assert command[0] == "nvcc"
    assert command[-6:] == ["-X", "-MD", "-MF", "1.d", "-o", "1.o"]
    assert "/s/csrc/k.1.cu" in command
    assert "/s/csrc/k.cu" not in command
    assert " ".join(command).count("-gencode arch=compute_90,code=sm_90") == 1


@pytest.mark.parametrize(
    ("text", "output", "depfile", "deptarget"),
    [
        ("-c a.cpp", "a.o", None, None),
        ("-c in/a.cc -oout/a.o", "out/a.o", None, None),
        ("-MMD -c a.cpp -o b/a.o", "b/a.o", "b/a.d", None),
        ("-MMD -MF d/a.d -c a.cpp -o a.o", "a.o", "d/a.d", None),
        ("-MD -MT t/a.o -MF a.o.d -o a.o -c a.cpp", "a.o", "a.o.d", "t/a.o"),
        ("-MD -MTt/a.o -MFa.o.d -o a.o -c a.cpp", "a.o", "a.o.d", "t/a.o"),
    ],
)
def test_where_it_writes_is_found_in_every_spelling(
    text: str, output: str, depfile: str | None, deptarget: str | None
) -> None:
    found = unit(text, "c++")
    assert (found.output, found.depfile, found.deptarget) == (output, depfile, deptarget)
    assert (found.kept, found.cuda) == ((), False)


@pytest.mark.parametrize(
    "text",
    [
        "--version",
        "-shared a.o b.o -o k.so",
        "-c a.cpp b.cpp",
        "-c a.cpp a.cpp",
        "-E -c a.cpp",
        "-c -",
        "-c -x c++ /dev/stdin -o a.o",
        "a.cpp -o program",
        "-c -save-temps a.cpp",
        "-c -flto a.cpp",
        "-I include",
    ],
)
def test_whatever_is_no_single_compilation_is_left_alone(text: str) -> None:
    assert read(text, "c++") == Other(tuple(text.split()))


def test_the_values_of_options_are_no_sources() -> None:
    found = unit("-include pre.cpp -I dir.cc -D x.cpp -c a.cpp", "c++")
    assert (found.source, found.includes) == ("a.cpp", ("dir.cc",))


def test_macros_are_found_in_every_spelling() -> None:
    found = unit("-DA -D B=1 --define-macro=C -c a.cu")
    assert (found.defines, found.hinders_shards({})) == (("A", "B=1", "C"), None)
    assert found.hinders_shards({"NVCC_APPEND_FLAGS": "-O2 -rdc=true"}) == "-rdc=true"


@pytest.mark.parametrize(
    "option",
    ["-include pre.h", "-imacros m.h", "-rdc=true", "-dc", "-x cu", "--relocatable-device-code=true"],
)
def test_options_that_change_what_the_text_is_hinder_shards(option: str) -> None:
    assert unit(f"{option} -c a.cu").hinders_shards({}) == option.split()[0]


def test_response_files_are_read_and_their_architectures_too() -> None:
    found = unit(
        "--options-file flags.rsp -c a.cu",
        **{"flags.rsp": "-I/x '-DA=\"b c\"' -gencode=arch=compute_75,code=sm_75 @more", "more": "-I/y"},
    )
    assert found.includes == ("/x", "/y")
    assert '-DA="b c"' in found.arguments
    assert found.dropped == ("sm_75",)


def test_a_response_file_that_cannot_be_read_is_left_to_the_compiler() -> None:
    assert "@gone" in unit("@gone -c a.cpp", "c++").arguments

"""Modules by a small stand-in for the program behind `module`, whose answers are of the real one's form."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError
from envbuilder.model import BuildReceipt, EnvReceipt, LoadedModule
from envbuilder.modules import check_there, gone, load_again, loaded_modules, merged

# Answers `PROGRAM bash --force unload NAME` with what a file of that name has.
PROGRAM = """#!/bin/sh
test "$1 $2 $3" = "bash --force unload" || exit 1
cat "$(dirname "$0")/$4" || { echo "ERROR: Unable to locate a modulefile for '$4'" >&2; exit 1; }
"""


@pytest.fixture
def shell(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """Makes the variables of a shell with these modules, each given by the code that unloads it."""

    def make(unloading: Mapping[str, str], **variables: str) -> dict[str, str]:
        program = tmp_path / "modulecmd"
        program.write_text(PROGRAM)
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
        for name, code in unloading.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(code)
        loaded = {"LOADEDMODULES": ":".join(unloading), "MODULES_CMD": str(program)}
        return {"PATH": os.defpath, **loaded, **variables}

    return make


def folders(parent: Path, *names: str) -> list[str]:
    for name in names:
        (parent / name).mkdir(parents=True)
    return [str(parent / name) for name in names]


def test_what_each_module_added_is_what_its_unloading_takes_away(
    shell: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    mine, gcc, gcc_lib, cuda, cuda_lib = folders(
        tmp_path, "mine", "gcc/bin", "gcc/lib64", "cuda/bin", "cuda/lib64"
    )
    variables = shell(
        {
            "gcc/12.2.0": f"LOADEDMODULES=; PATH={mine}:{os.defpath};\n"
            "unset LD_LIBRARY_PATH CC LICENCE_TOKEN;\n",
            "cuda/13.0": f"LOADEDMODULES=gcc/12.2.0; PATH={gcc}:{mine}:{os.defpath};\n"
            f"LD_LIBRARY_PATH={gcc_lib}; unset CUDA_HOME; unset NCCL_NET;\n",
        },
        PATH=f"{cuda}:{gcc}:{mine}:{os.defpath}",
        LD_LIBRARY_PATH=f"{cuda_lib}:{tmp_path}/not-there:{gcc_lib}",
        CC="gcc-12",
        CXX="my-own",
        CUDA_HOME="/opt/cuda",
        NCCL_NET="AWS Libfabric",
        LICENCE_TOKEN="secret",
    )
    assert loaded_modules(variables) == (
        LoadedModule(
            name="gcc/12.2.0",
            folders={"PATH": (gcc,), "LD_LIBRARY_PATH": (gcc_lib,)},
            variables={"CC": "gcc-12"},
        ),
        LoadedModule(
            name="cuda/13.0",
            folders={"PATH": (cuda,), "LD_LIBRARY_PATH": (cuda_lib,)},
            variables={"CUDA_HOME": "/opt/cuda", "NCCL_NET": "AWS Libfabric"},
        ),
    )


def test_without_modules_nothing_is_asked() -> None:
    assert loaded_modules({}) == ()
    assert loaded_modules({"LOADEDMODULES": "", "MODULES_CMD": "/not/there"}) == ()


def test_a_module_that_can_not_be_unloaded_has_its_name_alone(
    shell: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    (added,) = folders(tmp_path, "gcc/bin")
    gcc = f"LOADEDMODULES=; PATH={os.defpath};"
    variables = shell({"gcc/12": gcc, "site/1": "echo"}, PATH=f"{added}:{os.defpath}")
    (tmp_path / "site/1").unlink()
    assert loaded_modules(variables) == (
        LoadedModule(name="gcc/12", folders={"PATH": (added,)}),
        LoadedModule(name="site/1"),
    )
    del variables["MODULES_CMD"]
    assert loaded_modules(variables) == (LoadedModule(name="gcc/12"), LoadedModule(name="site/1"))


def test_what_a_modulefile_prints_when_it_is_unloaded_is_not_taken_for_variables(
    shell: Callable[..., dict[str, str]], tmp_path: Path
) -> None:
    (added,) = folders(tmp_path, "gcc/bin")
    says = "printf 'farewell\\n\\1\\0'; echo farewell >&2;"
    variables = shell(
        {"gcc/12": f"LOADEDMODULES=; PATH={os.defpath}; {says}", "site/1": f"LOADEDMODULES=gcc/12; {says}"},
        PATH=f"{added}:{os.defpath}",
    )
    assert loaded_modules(variables) == (
        LoadedModule(name="gcc/12", folders={"PATH": (added,)}),
        LoadedModule(name="site/1"),
    )


def test_loaded_again_their_folders_come_first_and_variables_where_there_are_none() -> None:
    modules = (
        LoadedModule(name="a", folders={"PATH": ("/a",)}, variables={"CC": "a-cc", "CXX": "a-cxx"}),
        LoadedModule(name="b", folders={"PATH": ("/b", "/c"), "CPATH": ("/b/include",)}),
    )
    again = load_again(
        {"PATH": "/usr/bin:/a", "CC": "mine", "HOME": "/h"}, modules, keep_cuda_libraries=False
    )
    assert again == {
        "PATH": "/b:/c:/a:/usr/bin",
        "CPATH": "/b/include",
        "CC": "mine",
        "CXX": "a-cxx",
        "HOME": "/h",
    }
    assert load_again(again, modules, keep_cuda_libraries=False) == again


@pytest.mark.parametrize("keep", [True, False])
def test_a_cuda_runtime_that_would_shadow_torch_s_is_left_out(tmp_path: Path, keep: bool) -> None:
    gcc, cuda = folders(tmp_path, "gcc", "cuda")
    (tmp_path / "cuda" / "libcudart.so.13").touch()
    modules = (LoadedModule(name="both", folders={"LD_LIBRARY_PATH": (cuda, gcc)}),)
    again = load_again({}, modules, keep_cuda_libraries=keep)
    assert again == {"LD_LIBRARY_PATH": f"{cuda}:{gcc}" if keep else gcc}


def test_the_modules_of_several_builds_are_each_there_once_the_latest_last() -> None:
    gcc12, gcc13, cuda = (LoadedModule(name=name) for name in ("gcc/12", "gcc/13", "cuda/13"))
    assert merged([(gcc12, cuda), (gcc13,), (gcc12,)]) == (cuda, gcc13, gcc12)


def test_a_folder_that_is_gone_is_an_error_that_names_its_module(tmp_path: Path) -> None:
    (there,) = folders(tmp_path, "there")
    kept = LoadedModule(name="cuda/13.0", folders={"PATH": (there,)})
    lost = LoadedModule(name="gcc/12.2.0", folders={"PATH": (there, "/gone/bin"), "CPATH": ("/gone/bin",)})
    check_there([kept], "recipes/x.toml")
    assert list(gone([kept, lost])) == [(lost, "/gone/bin")]
    with pytest.raises(
        MismatchError, match=r"module gcc/12.2.0, whose folder /gone/bin is not here"
    ) as raised:
        check_there([kept, lost], "recipes/x.toml")
    assert "module load gcc/12.2.0" in raised.value.remedy
    assert "envbuilder compile recipes/x.toml --local --rebuild" in raised.value.remedy


def test_receipts_that_know_no_modules_still_read() -> None:
    assert BuildReceipt.model_fields["modules"].get_default() == ()
    old = EnvReceipt(
        recipe="x",
        lock_sha256="",
        python="3.12.1",
        compute_capabilities=(),
        packages=(),
        extensions=(),
        provided=None,
        created_at="",
    )
    text = old.model_dump_json(exclude={"modules"})
    assert EnvReceipt.model_validate_json(text) == old

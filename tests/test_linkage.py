"""Shared objects that gcc makes here, each with one thing about what it needs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from envbuilder import linkage
from envbuilder.linkage import Linkage, check_linkage, read_loader_cache
from envbuilder.shared_object import SharedObject, SharedObjectError, gnu_hash, sysv_hash
from tests.conftest import Quickstart


def shared(folder: Path, name: str, source: str, *options: str | Path) -> Path:
    """The shared object `folder/name`, compiled from C."""
    folder.mkdir(exist_ok=True)
    code = folder / f"{name}.c"
    code.write_text(source, encoding="utf-8")
    path = folder / name
    command = ["gcc", "-shared", "-fPIC", "-o", path, code, *options]
    subprocess.run(command, check=True)
    return path


def library(folder: Path, name: str, source: str, *options: str | Path) -> Path:
    """A library that others name as it is named here."""
    return shared(folder, name, source, f"-Wl,-soname,{name}", *options)


def check(
    module: Path, *libraries: Path, glibc: str = "2.28", interpreter: Path | None = Path(sys.executable)
) -> Linkage:
    return check_linkage(module, libraries=libraries, glibc=glibc, interpreter=interpreter)


@pytest.mark.parametrize("style", ["gnu", "sysv", "both"])
def test_a_symbol_that_a_needed_library_defines_is_found(tmp_path: Path, style: str) -> None:
    hashes = f"-Wl,--hash-style={style}"
    functions = "".join(f"int there_{number}(void) {{ return 0; }}\n" for number in range(100))
    there = library(tmp_path / "lib", "libthere.so.1", functions, hashes)
    calls = "".join(f"int there_{number}(void);\n" for number in range(100))
    calls += f"int call(void) {{ return {' + '.join(f'there_{number}()' for number in range(100))}; }}"
    module = shared(tmp_path, "module.so", calls, there, hashes)
    found = check(module, there.parent)
    assert (found.loads, found.describe()) == (True, "")
    assert found.needed[0] == "libthere.so.1"


@pytest.mark.parametrize("style", ["gnu", "sysv"])
def test_a_symbol_that_nothing_defines_is_named_and_a_weak_one_is_not(tmp_path: Path, style: str) -> None:
    source = """
        int gone(void);
        extern int data_gone;
        __attribute__((weak)) int perhaps(void);
        int call(void) { return gone() + data_gone + (perhaps ? perhaps() : 0); }
    """
    module = shared(tmp_path, "module.so", source, f"-Wl,--hash-style={style}")
    found = check(module)
    assert found.unresolved == ("data_gone", "gone")
    assert not found.loads
    assert found.describe() == "needs symbols that nothing defines: data_gone, gone"


def test_a_local_symbol_of_a_library_is_not_for_others(tmp_path: Path) -> None:
    source = "int open_one(void) { return 0; } __attribute__((visibility(%s))) int one(void) { return 0; }"
    visible = library(tmp_path / "all", "libone.so", source % '"default"')
    library(tmp_path / "some", "libone.so", source % '"hidden"')
    module = shared(tmp_path, "module.so", "int one(void); int call(void) { return one(); }", visible)
    assert check(module, tmp_path / "all").loads
    assert check(module, tmp_path / "some").unresolved == ("one",)


def test_a_library_of_a_library_counts_too(tmp_path: Path) -> None:
    deep = library(tmp_path / "lib", "libdeep.so", "int deep(void) { return 0; }")
    source = "int deep(void); int top(void) { return deep(); }"
    top = library(tmp_path / "lib", "libtop.so", source, deep)
    code = "int deep(void); int top(void); int call(void) { return deep() + top(); }"
    module = shared(tmp_path, "module.so", code, top, "-Wl,--unresolved-symbols=ignore-all")
    assert "libdeep.so" not in check(module).needed
    assert check(module, deep.parent).loads


def test_what_torch_opens_for_the_whole_process_counts_too(tmp_path: Path) -> None:
    deep = library(tmp_path / "lib", "libcublas.so.13", "int cublas(void) { return 0; }")
    module = shared(tmp_path, "module.so", "int cublas(void); int call(void) { return cublas(); }")
    assert check(module, deep.parent).unresolved == ("cublas",)
    opened = "libtorch_global_deps.so"
    shared(deep.parent, opened, "int cublas(void); int use(void) { return cublas(); }", deep)
    assert check(module, deep.parent).loads
    assert check(module).unresolved == ("cublas",)


def test_a_library_that_is_nowhere_is_missing(tmp_path: Path) -> None:
    gone = library(tmp_path / "lib", "libgone.so.7", "int gone(void) { return 0; }")
    module = shared(tmp_path, "module.so", "int gone(void); int call(void) { return gone(); }", gone)
    found = check(module)
    assert (found.missing, found.unresolved) == (("libgone.so.7",), ("gone",))
    assert "needs libgone.so.7, which is nowhere" in found.describe()


@pytest.mark.parametrize("tags", ["--enable-new-dtags", "--disable-new-dtags"])
def test_a_library_beside_the_module_is_found_by_its_own_search_path(tmp_path: Path, tags: str) -> None:
    beside = library(tmp_path / "lib", "libbeside.so", "int beside(void) { return 0; }")
    code = "int beside(void); int call(void) { return beside(); }"
    module = shared(tmp_path, "module.so", code, beside, f"-Wl,{tags},-rpath,$ORIGIN/lib")
    assert check(module).loads


@pytest.mark.parametrize(("tags", "found"), [("--disable-new-dtags", True), ("--enable-new-dtags", False)])
def test_the_interpreters_rpath_counts_for_all_and_its_runpath_does_not(
    tmp_path: Path, tags: str, found: bool
) -> None:
    """So it is with conda's interpreters, which bring a C++ library of their own. See ld.so(8)."""
    there = library(tmp_path / "lib", "libthere.so", "int there(void) { return 0; }")
    source = tmp_path / "main.c"
    source.write_text("int main(void) { return 0; }\n", encoding="utf-8")
    program = tmp_path / "bin" / "python"
    program.parent.mkdir()
    options = [f"-Wl,{tags},-rpath,$ORIGIN/../lib"]
    subprocess.run(["gcc", "-o", program, source, *options], check=True)
    link = tmp_path / "venv-python"
    link.symlink_to(program)
    module = shared(tmp_path, "module.so", "int there(void); int call(void) { return there(); }", there)
    assert check(module, interpreter=link).loads is found


def test_what_is_no_library_for_this_machine_is_passed_over(tmp_path: Path) -> None:
    right = library(tmp_path / "right", "libone.so", "int one(void) { return 0; }")
    for folder, content in {
        "script": b"GROUP ( libone.so.1 )\n",
        "empty": b"",
        "foreign": right.read_bytes()[:18] + b"\x08\x00" + right.read_bytes()[20:],
    }.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "libone.so").write_bytes(content)
    module = shared(tmp_path, "module.so", "int one(void); int call(void) { return one(); }", right)
    wrong = [tmp_path / folder for folder in ("script", "empty", "foreign")]
    assert check(module, *wrong).missing == ("libone.so",)
    assert check(module, *wrong, right.parent).loads


def test_an_older_library_lacks_the_version_that_the_module_needs(tmp_path: Path) -> None:
    source = "int one(void) { return 0; } int two(void) { return 0; }"
    made = {}
    for name, text in {"old": "V_1 { one; two; };", "new": "V_1 { one; }; V_2 { two; } V_1;"}.items():
        script = tmp_path / f"{name}.map"
        script.write_text(text, encoding="utf-8")
        made[name] = library(tmp_path / name, "libtwo.so", source, f"-Wl,--version-script={script}")
    module = shared(tmp_path, "module.so", "int two(void); int call(void) { return two(); }", made["new"])
    assert check(module, tmp_path / "new").loads
    found = check(module, tmp_path / "old")
    assert (found.loads, found.lacking) == (False, ("V_2 of libtwo.so",))
    assert "needs V_2 of libtwo.so, which this machine has not" in found.describe()


def test_a_glibc_newer_than_the_targets_is_told_and_is_no_failure_here(tmp_path: Path) -> None:
    # gettid came with glibc 2.30.
    module = shared(tmp_path, "module.so", "int gettid(void); int call(void) { return gettid(); }")
    found = check(module, glibc="2.28")
    assert (found.glibc_needed, found.newer_than_target, found.loads) == ("2.30", True, True)
    assert found.describe() == "needs glibc 2.30; the lock's target has 2.28"
    assert not check(module, glibc="2.30").newer_than_target
    assert not check(module, glibc="2.31").newer_than_target


def test_packed_relative_relocations_need_the_glibc_that_brought_them(tmp_path: Path) -> None:
    script = tmp_path / "map"
    script.write_text("GLIBC_2.9 { a; }; GLIBC_ABI_DT_RELR { b; };", encoding="utf-8")
    source = "int a(void) { return 0; } int b(void) { return 0; }"
    libc = library(tmp_path / "lib", "libc.so.6", source, f"-Wl,--version-script={script}", "-nostdlib")
    code = "int a(void); int b(void); int call(void) { return a() + b(); }"
    module = shared(tmp_path, "module.so", code, libc, "-nostdlib")
    assert check(module, libc.parent, interpreter=None).glibc_needed == "2.36"


def test_the_versions_of_libstdcxx_are_compared_as_numbers(tmp_path: Path) -> None:
    script = tmp_path / "map"
    names = ["GLIBCXX_3.4.9", "GLIBCXX_3.4.30", "CXXABI_1.3.9", "CXXABI_1.3.13", "CXXABI_TM_1"]
    script.write_text("".join(f"{name} {{ f{i}; }};\n" for i, name in enumerate(names)), encoding="utf-8")
    source = "".join(f"int f{number}(void) {{ return 0; }}" for number in range(len(names)))
    options = (f"-Wl,--version-script={script}", "-nostdlib")
    there = library(tmp_path / "lib", "libstdc++.so.6", source, *options)
    code = "".join(f"int f{number}(void);" for number in range(len(names)))
    code += f"int call(void) {{ return {'+'.join(f'f{number}()' for number in range(len(names)))}; }}"
    found = check(shared(tmp_path, "module.so", code, there, "-nostdlib"), there.parent, interpreter=None)
    assert (found.libstdcxx_needed, found.cxxabi_needed, found.glibc_needed) == ("3.4.30", "1.3.13", None)
    assert found.loads


PYTHON_MODULE = """
    void *PyLong_FromLong(long); void *_Py_NoneStruct; void *%s(void);
    void *call(void) { return _Py_NoneStruct ? PyLong_FromLong(1) : %s(); }
"""


def test_pythons_own_symbols_are_the_interpreters(tmp_path: Path) -> None:
    good = shared(tmp_path, "good.so", PYTHON_MODULE % (("PyDict_New",) * 2))
    bad = shared(tmp_path, "bad.so", PYTHON_MODULE % (("PyNo_SuchFunction",) * 2))
    assert check(good).loads
    assert check(bad).unresolved == ("PyNo_SuchFunction",)


def test_pythons_own_symbols_are_trusted_where_the_interpreter_is_a_script(tmp_path: Path) -> None:
    wrapper = tmp_path / "python"
    wrapper.write_text('#!/bin/sh\nexec python3 "$@"\n', encoding="utf-8")
    code = "void *PyLong_FromLong(long); void *Pylon(void); void *call(void) { return PyLong_FromLong(1)"
    module = shared(tmp_path, "module.so", f"{code} ? Pylon() : 0; }}")
    for interpreter in (wrapper, None):
        assert check(module, interpreter=interpreter).unresolved == ("Pylon",)


def test_the_drivers_symbols_are_trusted_on_a_node_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linkage, "_LOADER_CACHE", tmp_path / "none")
    monkeypatch.setattr(linkage, "_SYSTEM_FOLDERS", ())
    source = "int cuInit(int x) { return x; } int current(int x) { return x; }"
    driver = library(tmp_path / "lib", "libcuda.so.1", source, "-nostdlib")
    code = "int cuInit(int); int current(int); int call(void) { return cuInit(0)%s; }"
    module = shared(tmp_path, "good.so", code % "", driver, "-nostdlib")
    found = check(module, interpreter=None)
    assert (found.loads, found.driver, found.missing) == (True, ("libcuda.so.1",), ())
    other = shared(tmp_path, "bad.so", code % " + current(0)", driver, "-nostdlib")
    assert check(other, interpreter=None).unresolved == ("current",)
    assert check(other, driver.parent, interpreter=None).loads


def test_torchs_symbols_are_said_to_be_torchs(tmp_path: Path) -> None:
    names = [f"_ZN3c10{number}" for number in range(7)]
    code = "".join(f"int {name}(void);" for name in names)
    module = shared(tmp_path, "module.so", f"{code} int call(void) {{ return {'() + '.join(names)}(); }}")
    lines = check(module).describe().splitlines()
    assert lines[0].endswith("_ZN3c104 and 2 more")
    assert "another torch's headers, or another C++ ABI" in lines[1]


@pytest.mark.parametrize("kind", ["text", "empty", "object", "absent", "cut off", "32 bits"])
def test_what_is_no_shared_object_is_refused(tmp_path: Path, kind: str) -> None:
    whole = shared(tmp_path, "module.so", "int x;").read_bytes()
    path = tmp_path / "given.so"
    contents = {"text": b"text", "empty": b"", "cut off": whole[:100]}
    contents["32 bits"] = whole[:4] + b"\x01" + whole[5:]
    if kind in contents:
        path.write_bytes(contents[kind])
    elif kind == "object":
        subprocess.run(["gcc", "-c", "-o", path, tmp_path / "module.so.c"], check=True)
    with pytest.raises(SharedObjectError, match=r"given\.so"):
        check(path)


@pytest.mark.parametrize(("tag", "address"), [(0x6FFFFFFE, 2**40), (0x6FFFFEF5, 2**40), (6, None)])
def test_a_damaged_module_is_refused(tmp_path: Path, tag: int, address: int | None) -> None:
    """The dynamic section's entry `tag` leads to nowhere, or to the end of what is loaded."""
    path = shared(
        tmp_path, "module.so", "int gettid(void); int call(void) { return gettid(); }", "-Wl,--strip-all"
    )
    data = bytearray(path.read_bytes())
    with path.open("rb") as file:
        segments = list(ELFFile(file).iter_segments())
    begin = next(int(segment["p_offset"]) for segment in segments if segment["p_type"] == "PT_DYNAMIC")
    last = max(
        (segment for segment in segments if segment["p_type"] == "PT_LOAD"), key=lambda s: s["p_vaddr"]
    )
    end = int(last["p_vaddr"] + last["p_filesz"])
    at = next(at for at in range(begin, len(data), 16) if data[at : at + 8] == tag.to_bytes(8, "little"))
    data[at + 8 : at + 16] = (address or end - 1).to_bytes(8, "little")
    path.write_bytes(data[: int(last["p_offset"] + last["p_filesz"])] if address is None else data)
    with pytest.raises(SharedObjectError, match="damaged"):
        check(path)


def test_hashes_are_those_of_the_standard() -> None:
    assert (gnu_hash(b"printf"), sysv_hash(b"printf")) == (0x156B2BB8, 0x077905A6)


def test_the_loaders_cache_says_where_the_c_library_is(tmp_path: Path) -> None:
    found = read_loader_cache(Path("/etc/ld.so.cache"))
    assert any(SharedObject(path).defines("malloc") for path in found["libc.so.6"])
    assert read_loader_cache(tmp_path / "none") == {}
    (tmp_path / "cache").write_bytes(b"glibc-ld.so.cache1.1" + b"\xff" * 40)
    assert read_loader_cache(tmp_path / "cache") == {}


@pytest.mark.needs_env
def test_torchs_own_module_loads_with_torchs_libraries_alone(quickstart: Quickstart, tmp_path: Path) -> None:
    site_packages = next((quickstart.root / "envs/quickstart/lib").glob("python*/site-packages"))
    # Without its own search path, which leads to the libraries beside it.
    module = tmp_path / "libtorch_python.so"
    module.symlink_to(site_packages / "torch/lib/libtorch_python.so")
    libraries = [site_packages / "torch/lib", *sorted(site_packages.glob("nvidia/*/lib"))]
    found = check(module, *libraries, interpreter=quickstart.python)
    assert (found.describe(), found.loads) == ("", True)
    alone = tmp_path / "copy" / "libtorch_python.so"
    alone.parent.mkdir()
    alone.write_bytes(module.read_bytes())
    other = check(alone, interpreter=quickstart.python)
    assert "libtorch_cpu.so" in other.missing or "libtorch.so" in other.missing
    assert "another torch's headers" in other.describe()

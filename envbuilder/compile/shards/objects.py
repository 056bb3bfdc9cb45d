"""Looks at the objects of a unit's shards: whether joining them is the same as compiling the unit whole.

This is the second look, after `shards.py` has read the text, and the only one where a recipe said to divide a
unit anyway. What nvcc puts into an object was read off those of nvcc 13.0 with g++ 12:

- For each kernel it makes a host function `__device_stub__…`. A template's is local to its object, so that
  each shard has kernels of its own: a launch in one and cudaFuncSetAttribute in another would not mean the
  same one. So no kernel may be in two shards.
- A variable in GPU memory is a local object in the cubin's .nv.global, .nv.global.init or .nv.constant3, and
  has a local shadow in the host's .bss, unless it is static in a function. Texts (of printf, assert,
  __func__) lie there too, as `$str…` and `__unnamed_…`.
- `__cudaRegisterAll` is the first constructor; what else is constructed is one function `_GLOBAL__sub_I_…`,
  and <iostream> alone makes one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection
from elftools.elf.sections import SymbolTableSection

from envbuilder.compile.shards.cubins import GPU_TEXT, cubins, kernel_names, plain_name
from envbuilder.fatbin import FatbinError

_WRITABLE, _EXECUTABLE = 0x1, 0x4
_FIXED = (".data.rel.ro", ".nvFatBinSegment", ".init_array", ".fini_array")
"""Sections that are writable in name only: they change while a library is loaded, never after."""
_REGISTRATION = re.compile(r"__device_stub__|__cudaFatCubinHandle|__fatDeviceText|^_ZStL8__ioinit$|^__nv_")
_GPU_STATE = (".nv.global", ".nv.constant3")
_STUB = re.compile(r"(\d+)(?=__device_stub__)")
_OUTSIDE = frozenset(
    {"St", "std", "__gnu_cxx", "cuda", "cub", "thrust", "at", "c10", "torch", "caffe2", "pybind11"}
)
"""Namespaces of headers that are made to be included in many units."""
_NAMESPACE = re.compile(r"_Z(?:GV|GR)?Z*L?(?:N[rVK]*)?L?(St|\d+)")
_EMPTY_KERNEL = re.compile(r"_ZN3cub.*11EmptyKernelI")
_CONSTRUCTED = frozenset(
    ["_ZNSt8ios_base4InitC1Ev", "_ZNSt8ios_base4InitD1Ev", "__cxa_atexit", "__dso_handle"]
)
_STB_GLOBAL, _STB_LOCAL = "STB_GLOBAL", "STB_LOCAL"


@dataclass(frozen=True)
class _Shard:
    """What one object has that another shard's must not have too; names without what differs by file."""

    strong: frozenset[str]
    state: frozenset[str]
    gpu_state: frozenset[str]
    kernels: frozenset[str]
    problem: str | None
    """Why it can't be judged."""


def check_shards(objects: Sequence[Path]) -> str | None:
    """None where joining `objects`, a unit's shards, is the same as the whole unit; else the first reason.

    An object that can't be read is a reason. Machine code that is stored compressed is not looked into: then
    the kernels and the variables that the host knows of are judged, and not what is static in GPU functions.
    """
    return next(differences(objects), None)


def differences(objects: Sequence[Path]) -> Iterator[str]:
    """Every reason why joining `objects` is not the same as the whole unit."""
    seen: tuple[dict[str, Path], ...] = ({}, {}, {}, {})
    for path in objects:
        try:
            shard = _read(path)
        except (ELFError, FatbinError, OSError) as error:
            yield f"{path.name} can't be read: {error}"
            continue
        if shard.problem is not None:
            yield f"{path.name}: {shard.problem}"
        for what, names, earlier in zip(
            ("the symbol", "the variable", "the GPU variable", "the kernel"),
            (shard.strong, shard.state, shard.gpu_state, shard.kernels),
            seen,
        ):
            for name in sorted(names):
                if name in earlier:
                    yield f"{what} {name} is in {earlier[name].name} and in {path.name}"
                earlier[name] = path


def join_command(linker: str, shards: Sequence[Path], output: Path) -> list[str]:
    """The command that makes the one object `output` of `shards`."""
    return [linker, "-r", "-o", str(output), *map(str, shards)]


def _read(path: Path) -> _Shard:
    strong: set[str] = set()
    state: set[str] = set()
    kernels: set[str] = set()
    with path.open("rb") as file:
        elf = ELFFile(file)
        table = elf.get_section_by_name(".symtab")
        if elf.header["e_type"] != "ET_REL" or not isinstance(table, SymbolTableSection):
            return _refused("it is no object file with symbols")
        if elf.get_section_by_name("__nv_relfatbin") is not None:
            return _refused("its GPU code is relocatable")
        for symbol in table.iter_symbols():
            kernels.update(_stub_of(symbol.name))
            section = symbol["st_shndx"]
            if isinstance(section, str) and section != "SHN_COMMON":
                continue  # undefined, or absolute
            binding = symbol["st_info"]["bind"]
            if binding == _STB_GLOBAL:
                strong.add(plain_name(symbol.name))
            elif binding == _STB_LOCAL and _is_state(elf, symbol) and not _is_known(symbol.name):
                state.add(re.sub(r"\.\d+$", "", plain_name(symbol.name)))
        problem = _constructors(elf, table)
    gpu_state: set[str] = set()
    for _, cubin in cubins(path):
        kernels.update(plain_name(name) for name in kernel_names(cubin))
        gpu_state.update(_gpu_variables(cubin))
    kernels = {name for name in kernels if not _EMPTY_KERNEL.match(name)}
    return _Shard(frozenset(strong), frozenset(state), frozenset(gpu_state), frozenset(kernels), problem)


def _refused(problem: str) -> _Shard:
    return _Shard(frozenset(), frozenset(), frozenset(), frozenset(), problem)


def _stub_of(name: str) -> Iterator[str]:
    """The kernel for which `name` is the host's function, or a variable in it."""
    for found in _STUB.finditer(name):
        # Other digits of the mangled name may stand before the length: then it reaches past the end.
        length, begin = int(found[1]), found.end()
        if begin + length <= len(name):
            yield plain_name("_" + name[begin + len("__device_stub__") : begin + length])


def _is_state(elf: Any, symbol: Any) -> bool:
    """Whether `symbol` is a variable in memory that stays writable."""
    if symbol["st_info"]["type"] not in ("STT_OBJECT", "STT_TLS", "STT_COMMON"):
        return False
    if symbol["st_shndx"] == "SHN_COMMON":
        return True
    section = elf.get_section(symbol["st_shndx"])
    return bool(section["sh_flags"] & _WRITABLE) and not section.name.startswith(_FIXED)


def _is_known(name: str) -> bool:
    return bool(_REGISTRATION.search(name)) or _namespace(name) in _OUTSIDE


def _namespace(name: str) -> str | None:
    """The outermost namespace (or class, or function) of a mangled name."""
    name = plain_name(name)
    found = _NAMESPACE.match(name)
    if found is None or found[1] == "St":
        return found[1] if found else None
    return name[found.end() : found.end() + int(found[1])]


def _constructors(elf: Any, table: SymbolTableSection) -> str | None:
    """What `elf` runs when it is loaded beyond nvcc's registration and <iostream>'s; None for nothing."""
    for relocations in elf.iter_sections():
        if not isinstance(relocations, RelocationSection):
            continue
        target = elf.get_section(relocations["sh_info"]).name
        if not target.startswith((".init_array", ".ctors", ".preinit_array")):
            continue
        for relocation in relocations.iter_relocations():
            symbol = table.get_symbol(relocation["r_info_sym"])
            address = symbol["st_value"] + relocation["r_addend"]
            function = _function_at(table, symbol["st_shndx"], address)
            if function is None:
                return "it runs a constructor that has no name"
            if "__sti____cudaRegisterAll" in function.name:
                continue
            if problem := _constructed(elf, table, function):
                return problem
    return None


def _function_at(table: SymbolTableSection, section: object, address: int) -> Any:
    for symbol in table.iter_symbols():
        if (symbol["st_info"]["type"], symbol["st_shndx"], symbol["st_value"]) == (
            "STT_FUNC",
            section,
            address,
        ):
            return symbol
    return None


def _constructed(elf: Any, table: SymbolTableSection, function: Any) -> str | None:
    """What the constructor `function` refers to beyond <iostream>'s object and plain data."""
    begin, end = function["st_value"], function["st_value"] + function["st_size"]
    for relocations in elf.iter_sections():
        if not isinstance(relocations, RelocationSection) or relocations["sh_info"] != function["st_shndx"]:
            continue
        for relocation in relocations.iter_relocations():
            if not begin <= relocation["r_offset"] < end:
                continue
            symbol = table.get_symbol(relocation["r_info_sym"])
            # Sections and labels stand for this object's data, which is judged by its own names, or code.
            if (
                symbol["st_info"]["type"] in ("STT_SECTION", "STT_NOTYPE")
                and symbol["st_shndx"] != "SHN_UNDEF"
            ):
                if not elf.get_section(symbol["st_shndx"])["sh_flags"] & _EXECUTABLE:
                    continue
                return f"{function.name} constructs more than <iostream> does"
            if symbol.name not in _CONSTRUCTED and not _is_known(symbol.name):
                return f"{function.name} constructs more than <iostream> does: it uses {symbol.name}"
    return None


def _gpu_variables(cubin: Any) -> Iterator[str]:
    """The variables in GPU memory, in any but the headers' namespaces, that `cubin` has."""
    for symbol in cubin.get_section_by_name(".symtab").iter_symbols():
        if symbol["st_info"]["type"] == "STT_OBJECT" and isinstance(symbol["st_shndx"], int):
            section = cubin.get_section(symbol["st_shndx"]).name
            known = GPU_TEXT.fullmatch(symbol.name) or _namespace(symbol.name) in _OUTSIDE
            if section.startswith(_GPU_STATE) and not known:
                yield plain_name(symbol.name)

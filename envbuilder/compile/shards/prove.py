"""Compares the kernels of two object files, to prove that a way to compile changes no machine code.

Both are compiled with `-no-compress`: compressed code can't be read here. A kernel is what it executes, what
it is linked with, and the facts that its launch depends on (registers, stack, shared memory, parameters).
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elftools.common.exceptions import ELFError
from elftools.elf.relocation import RelocationSection

from envbuilder.compile.shards.cubins import GPU_TEXT, cubins, kernel_names, plain_name
from envbuilder.fatbin import FatbinError, gpu_images

_SIZED = 4
"""Format of an attribute that has a size and that many bytes; the others hold their value in its place."""
_EXTERNS, _PARAMETER_BANK = 0x0F, 0x0A
"""Attributes of a kernel: the symbols that it calls, by index; its parameters' place, after such an index."""
_PER_KERNEL = (".nv.info.", ".nv.constant0.", ".nv.constant2.", ".nv.shared.")
_ADDRESSES = ".nv.constant4"
"""The module's table of addresses: its order hangs on what else is in the module."""
_TABLE_BANK = 4
_INSTRUCTION = 16
"""Size (bytes) from sm_70 on. An operand in a constant bank has its offset / 4 in 14 bits from bit 40,
and its bank in 5 bits from bit 54."""


@dataclass(frozen=True)
class ProofResult:
    """How the kernels of a sharded object compare with those of the whole one."""

    kernels: int
    """How many the whole object has, for all architectures."""
    different: tuple[str, ...]
    """Those that aren't the same, as "architecture name"."""
    missing: tuple[str, ...]
    """Those that the sharded object lacks."""
    added: tuple[str, ...]
    """Those that only the sharded object has."""

    @property
    def same(self) -> bool:
        """Whether there are kernels, and all are the same."""
        return self.kernels > 0 and not (self.different or self.missing or self.added)


def compare_kernels(whole: Path, sharded: Path) -> ProofResult:
    """Compares the kernels of two object files; FatbinError where the code of one can't be read."""
    expected, got = _kernels(whole), _kernels(sharded)
    different = (
        name
        for name in expected.keys() & got.keys()
        if not all(_same(one, other) for one in expected[name] for other in got[name])
    )
    return ProofResult(
        len(expected),
        tuple(sorted(different)),
        tuple(sorted(expected.keys() - got.keys())),
        tuple(sorted(got.keys() - expected.keys())),
    )


@dataclass(frozen=True)
class _Kernel:
    """What a kernel consists of."""

    code: bytes
    addresses: dict[int, object]
    """What each place in the module's table of addresses means."""
    rest: tuple[object, ...]


def _same(one: _Kernel, other: _Kernel) -> bool:
    """Whether two kernels are the same: byte for byte, but for the order of their modules' tables."""
    if one.rest != other.rest or len(one.code) != len(other.code):
        return False
    for begin in range(0, len(one.code), _INSTRUCTION):
        left = int.from_bytes(one.code[begin : begin + _INSTRUCTION], "little")
        right = int.from_bytes(other.code[begin : begin + _INSTRUCTION], "little")
        if not _same_address(left, one, right, other):
            return False
    return True


def _same_address(left: int, one: _Kernel, right: int, other: _Kernel) -> bool:
    """Whether two instructions are the same, or differ only in which place of the table they read.

    What is in that place must mean the same, also where the place is the same. So an instruction that only
    looks as if it read the table may count as another one.
    """
    offset = 0x3FFF << 40
    if left & ~offset != right & ~offset:
        return False
    if (left >> 54) & 0x1F != _TABLE_BANK:
        return left == right
    places = (left & offset) >> 38, (right & offset) >> 38
    meanings = one.addresses.get(places[0]), other.addresses.get(places[1])
    return meanings[0] == meanings[1] and (left == right or meanings[0] is not None)


def _kernels(path: Path) -> dict[str, list[_Kernel]]:
    """The kernels of `path`, as "architecture name"; one may be there several times."""
    if any(image.compressed for image in gpu_images(path)):
        raise FatbinError(f"{path} holds compressed GPU code: compile it with -no-compress")
    kernels: dict[str, list[_Kernel]] = {}
    try:
        for architecture, cubin in cubins(path):
            addresses = dict(_addresses(cubin))
            for name in kernel_names(cubin):
                code = cubin.get_section_by_name(f".text.{name}").data()
                kernel = _Kernel(code, addresses, tuple(_parts(cubin, name)))
                kernels.setdefault(f"{architecture} {plain_name(name)}", []).append(kernel)
    except (ELFError, struct.error) as error:
        raise FatbinError(f"{path} holds machine code of an unknown layout: {error}") from error
    return kernels


def _addresses(cubin: Any) -> Iterator[tuple[int, object]]:
    """Each place in the table of addresses, and what is there: a name and content, of a text only that."""
    symbols = cubin.get_section_by_name(".symtab")
    related = {s["sh_info"] for s in cubin.iter_sections() if isinstance(s, RelocationSection)}
    table = cubin.get_section_by_name(f".rela{_ADDRESSES}")
    for each in table.iter_relocations() if table is not None else ():
        symbol = symbols.get_symbol(each["r_info_sym"])
        index, size = symbol["st_shndx"], symbol["st_size"]
        name = "" if GPU_TEXT.fullmatch(symbol.name) else plain_name(symbol.name)
        content: object = None
        if isinstance(index, int) and symbol["st_info"]["type"] == "STT_OBJECT":
            section = cubin.get_section(index)
            begin = symbol["st_value"]
            if index in related:
                content = object()  # holds addresses itself: equal to nothing
            elif section["sh_type"] != "SHT_NOBITS":
                content = section.data()[begin : begin + size]
        yield each["r_offset"], (name, size, content, each["r_info_type"], each["r_addend"])


def _parts(cubin: Any, kernel: str) -> Iterator[object]:
    """All that is compared of `kernel` but its code."""
    symbols = cubin.get_section_by_name(".symtab")
    for prefix in _PER_KERNEL:
        section = cubin.get_section_by_name(prefix + kernel)
        if section is None:
            yield None
        elif prefix == ".nv.info.":
            yield tuple(_attributes(section.data(), symbols))
        elif section["sh_type"] == "SHT_NOBITS":
            yield section["sh_size"]
        else:
            yield section.data()
    for relocations in cubin.iter_sections():
        if isinstance(relocations, RelocationSection) and relocations.name.endswith(f".text.{kernel}"):
            for each in relocations.iter_relocations():
                symbol = plain_name(symbols.get_symbol(each["r_info_sym"]).name)
                addend = each["r_addend"] if relocations.is_RELA() else 0
                yield each["r_offset"], each["r_info_type"], symbol, addend
    yield tuple(sorted(_facts(cubin, symbols, kernel)))


def _records(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Attribute and value of each record. It begins with format, attribute, two bytes of value or size."""
    position = 0
    while position < len(data):
        form, attribute, size = struct.unpack_from("<BBH", data, position)
        position += 4
        if form == _SIZED:
            if position + size > len(data):
                raise struct.error("an attribute reaches past its section")
            yield attribute, data[position : position + size]
            position += size
        else:
            yield attribute, struct.pack("<H", size)


def _attributes(data: bytes, symbols: Any) -> Iterator[tuple[int, object]]:
    for attribute, value in _records(data):
        if attribute == _EXTERNS:
            indexes = struct.unpack(f"<{len(value) // 4}I", value)
            yield attribute, tuple(plain_name(symbols.get_symbol(index).name) for index in indexes)
        elif attribute == _PARAMETER_BANK:
            yield attribute, value[4:]
        else:
            yield attribute, value


def _facts(cubin: Any, symbols: Any, kernel: str) -> Iterator[tuple[int, bytes]]:
    """Registers, frame and stack size of `kernel`: in the module's attributes, by its symbol's index."""
    section = cubin.get_section_by_name(".nv.info")
    for attribute, value in _records(section.data()) if section is not None else ():
        if len(value) == 8:
            (index,) = struct.unpack_from("<I", value)
            if index < symbols.num_symbols() and symbols.get_symbol(index).name == kernel:
                yield attribute, value[4:]

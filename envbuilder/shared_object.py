"""Reads of an ELF shared object what the dynamic loader reads: what it needs, defines and leaves undefined.

A symbol is looked up in the hash table, as the loader does it: torch's libraries have hundreds of thousands
of symbols, and a few hundred of them are asked for. Only 64-bit little-endian files are read: x86_64 and
aarch64 have no others. Layouts: System V ABI, chapter 5, and the GNU extensions as glibc's elf.h has them.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_HEADER = struct.Struct("<4sBB12xHIQQQIHHH")
"""Magic, class, byte order, machine, version, entry, where segments' and sections' headers are, flags, own
size, size of a segment's header, number of segments."""
_SEGMENT = struct.Struct("<IIQQQQ")
"""Type, flags, offset, address, physical address, size in the file."""
_MAGIC, _64_BIT, _LITTLE_ENDIAN = b"\x7fELF", 2, 1
_LOAD, _DYNAMIC = 1, 2
_SYMBOL = struct.Struct("<IBBHQQ")
"""Name, info (binding in the high four bits), other, section, value, size."""
_VERNEED = struct.Struct("<HHIII")
"""Version, count, file's name, offset to the first entry, offset to the next file."""
_VERNAUX = struct.Struct("<IHHII")
"""Hash, flags, index, name, offset to the next entry."""
_VERDEF = struct.Struct("<HHHHIII")
"""Version, flags, index, count, hash, offset to the names, offset to the next definition."""
_GNU_HASH = struct.Struct("<IIII")
"""Buckets, first symbol in the table, words of the Bloom filter, its shift."""
_NEEDED, _SYSV_HASH, _STRINGS, _SYMBOLS, _SONAME, _RPATH, _RUNPATH = 1, 4, 5, 6, 14, 15, 29
_GNU_HASH_TAG = 0x6FFFFEF5
_VERDEF_TAG, _VERDEF_COUNT = 0x6FFFFFFC, 0x6FFFFFFD
_VERNEED_TAG, _VERNEED_COUNT = 0x6FFFFFFE, 0x6FFFFFFF
_LOCAL, _WEAK = 0, 2
_UNDEFINED = 0
_WEAK_VERSION = 0x2


class SharedObjectError(ValueError):
    """A file is not a shared object that this machine's loader could take."""


@dataclass(frozen=True)
class VersionNeed:
    """A symbol version that a file asks of a library."""

    library: str
    version: str
    """E.g. "GLIBC_2.32"."""


class SharedObject:
    """One shared object, or a program that is linked dynamically. It stays mapped, not in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            magic, bits, order, machine, _, _, table, _, _, _, size, count = _HEADER.unpack_from(self._data)
            if (magic, bits, order) != (_MAGIC, _64_BIT, _LITTLE_ENDIAN):
                raise SharedObjectError(f"{path} is not a 64-bit little-endian ELF file")
            self.machine = int(machine)
            """The number that ELF has for a kind of processor: 62 for x86_64, 183 for aarch64."""
            self._loaded: list[tuple[int, int, int]] = []
            self._tags: dict[int, list[int]] = {}
            for number in range(count):
                kind, _, offset, address, _, length = _SEGMENT.unpack_from(self._data, table + number * size)
                if kind == _LOAD:
                    self._loaded.append((address, length, offset))
                elif kind == _DYNAMIC:
                    self._read_tags(offset, length)
            if not {_STRINGS, _SYMBOLS} <= self._tags.keys():
                raise SharedObjectError(f"{path} is not linked dynamically")
            self.needed = tuple(self._string(offset) for offset in self._tags.get(_NEEDED, ()))
            """DT_NEEDED: names of libraries, in order."""
            self.soname = next((self._string(offset) for offset in self._tags.get(_SONAME, ())), None)
            """DT_SONAME: the name by which others need it."""
        except SharedObjectError:
            raise
        except (OSError, ValueError, struct.error, IndexError) as error:
            raise SharedObjectError(f"{path} is not a shared object: {error}") from error

    def _read_tags(self, begin: int, size: int) -> None:
        for tag, value in struct.iter_unpack("<QQ", self._data[begin : begin + size]):
            if tag == 0:
                break
            self._tags.setdefault(tag, []).append(value)

    @property
    def rpath(self) -> tuple[str, ...]:
        """DT_RPATH, which counts for the file's own libraries too; DT_RUNPATH makes it void.

        An empty entry is the working folder.
        """
        return () if _RUNPATH in self._tags else self._folders(_RPATH)

    @property
    def runpath(self) -> tuple[str, ...]:
        return self._folders(_RUNPATH)

    def undefined(self) -> Iterator[str]:
        """The symbols that others must define; weak ones may stay undefined, and are left out."""
        table = self._offset(_SYMBOLS)
        for index in range(1, self._unhashed()):
            name, info, _, section, _, _ = _SYMBOL.unpack_from(self._data, table + index * _SYMBOL.size)
            if section == _UNDEFINED and info >> 4 not in (_LOCAL, _WEAK) and name:
                yield self._string(name)

    def defines(self, name: str) -> bool:
        """Whether others can find symbol `name` here."""
        symbol = name.encode()
        if _GNU_HASH_TAG in self._tags:
            return any(self._is(index, symbol) for index in self._gnu_candidates(symbol))
        if _SYSV_HASH in self._tags:
            return any(self._is(index, symbol) for index in self._sysv_candidates(symbol))
        return False

    def version_needs(self) -> Iterator[VersionNeed]:
        """The symbol versions without which the loader refuses this file (.gnu.version_r)."""
        if _VERNEED_TAG not in self._tags:
            return
        offset = self._offset(_VERNEED_TAG)
        for _ in range(self._tags[_VERNEED_COUNT][0]):
            _, count, file, first, following = _VERNEED.unpack_from(self._data, offset)
            entry = offset + first
            for _ in range(count):
                _, flags, _, name, after = _VERNAUX.unpack_from(self._data, entry)
                if not flags & _WEAK_VERSION:
                    yield VersionNeed(self._string(file), self._string(name))
                entry += after
            offset += following

    def versions(self) -> frozenset[str]:
        """The symbol versions that this file defines (.gnu.version_d)."""
        if _VERDEF_TAG not in self._tags:
            return frozenset()
        offset, found = self._offset(_VERDEF_TAG), set()
        for _ in range(self._tags[_VERDEF_COUNT][0]):
            *_, names, following = _VERDEF.unpack_from(self._data, offset)
            found.add(self._string(struct.unpack_from("<I", self._data, offset + names)[0]))
            offset += following
        return frozenset(found)

    def _folders(self, tag: int) -> tuple[str, ...]:
        texts = filter(None, map(self._string, self._tags.get(tag, ())))
        return tuple(part for text in texts for part in text.split(":"))

    def _offset(self, tag: int) -> int:
        """Where in the file the table of dynamic tag `tag` begins; the tag has its address in memory."""
        address = self._tags[tag][0]
        for begin, size, offset in self._loaded:
            if begin <= address < begin + size:
                return address - begin + offset
        raise SharedObjectError(f"{self.path} has a damaged dynamic section")

    def _string(self, offset: int) -> str:
        begin = self._offset(_STRINGS) + offset
        return self._data[begin : self._data.find(b"\0", begin)].decode("utf-8", "surrogateescape")

    def _is(self, index: int, symbol: bytes) -> bool:
        entry = self._offset(_SYMBOLS) + index * _SYMBOL.size
        name, info, _, section, _, _ = _SYMBOL.unpack_from(self._data, entry)
        begin = self._offset(_STRINGS) + name
        return (
            section != _UNDEFINED
            and info >> 4 != _LOCAL
            and self._data[begin : begin + len(symbol) + 1] == symbol + b"\0"
        )

    def _unhashed(self) -> int:
        """How many symbols come first, the undefined ones among them: a GNU table has defined ones alone."""
        if _GNU_HASH_TAG in self._tags:
            buckets, first, words, _ = _GNU_HASH.unpack_from(self._data, self._offset(_GNU_HASH_TAG))
            table = self._offset(_GNU_HASH_TAG) + _GNU_HASH.size + 8 * words
            # A table without a symbol in it may begin anywhere.
            if any(struct.unpack_from(f"<{buckets}I", self._data, table)):
                return int(first)
        if _SYSV_HASH in self._tags:
            return int(struct.unpack_from("<4xI", self._data, self._offset(_SYSV_HASH))[0])
        # Neither tells: the strings begin where the symbols end, with every linker that there is.
        return (self._offset(_STRINGS) - self._offset(_SYMBOLS)) // _SYMBOL.size

    def _gnu_candidates(self, symbol: bytes) -> Iterator[int]:
        begin = self._offset(_GNU_HASH_TAG)
        buckets, first, words, shift = _GNU_HASH.unpack_from(self._data, begin)
        value = gnu_hash(symbol)
        bloom = begin + _GNU_HASH.size
        word = struct.unpack_from("<Q", self._data, bloom + 8 * (value // 64 % words))[0]
        if not (word >> (value % 64) & 1 and word >> ((value >> shift) % 64) & 1):
            return
        table = bloom + 8 * words
        index = struct.unpack_from("<I", self._data, table + 4 * (value % buckets))[0]
        if index < first:
            return
        chain = table + 4 * buckets
        while True:
            there = struct.unpack_from("<I", self._data, chain + 4 * (index - first))[0]
            if there | 1 == value | 1:
                yield index
            if there & 1:
                return
            index += 1

    def _sysv_candidates(self, symbol: bytes) -> Iterator[int]:
        begin = self._offset(_SYSV_HASH)
        buckets, _ = struct.unpack_from("<II", self._data, begin)
        value = sysv_hash(symbol)
        index = struct.unpack_from("<I", self._data, begin + 8 + 4 * (value % buckets))[0]
        while index:
            yield index
            index = struct.unpack_from("<I", self._data, begin + 8 + 4 * (buckets + index))[0]


def gnu_hash(symbol: bytes) -> int:
    value = 5381
    for letter in symbol:
        value = (value * 33 + letter) & 0xFFFFFFFF
    return value


def sysv_hash(symbol: bytes) -> int:
    value = 0
    for letter in symbol:
        value = (value << 4) + letter
        value = (value ^ ((value & 0xF0000000) >> 24)) & 0x0FFFFFFF
    return value

"""nvcc's architecture options: what is asked for becomes what is wanted. Pure.

Packages hard-code up to nine architectures and offer no way to choose. Those that nobody asked for are
dropped from the command line, whatever the spelling; all the rest of it stays as it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

GENCODE = ("-gencode", "--generate-code")
ARCH = ("-arch", "--gpu-architecture")
CODE = ("-code", "--gpu-code")
THREADS = ("-t", "--threads")
_INPUTS = (".cu", ".c", ".cc", ".cxx", ".cpp", ".ptx", ".cubin", ".fatbin", ".o", ".obj", ".a", ".so")


class Plan(NamedTuple):
    """What a command line for nvcc becomes."""

    arguments: list[str]
    kept: list[str]
    """Architectures that are compiled, e.g. "sm_90"."""
    dropped: list[str]
    """Architectures that were asked for and are not wanted."""


def plan(arguments: Sequence[str], wanted: Sequence[str], *, ptx: str | None = None) -> Plan:
    """`arguments` with the `wanted` architectures alone ("90", or "90a" for that variant alone).

    All architecture options become `-gencode arch=…,code=…`, at the place of the first. Where none of those
    asked for is wanted, the wanted ones are put in. PTX goes too, for nothing is for GPUs that are not named,
    unless `ptx` names an architecture whose PTX newer GPUs are to compile for themselves.
    """
    rest: list[str] = []
    asked: list[str] = []
    pair: dict[str, list[str]] = {}  # -arch and -code speak of one another
    place: int | None = None
    for option, values, words in _options(arguments):
        if option in THREADS:
            continue  # several compilers in one would be more than MAX_JOBS allows
        if option not in (*GENCODE, *ARCH, *CODE):
            rest += words
            continue
        place = len(rest) if place is None else place
        if option in GENCODE:
            asked += _codes(values)
        else:
            pair["arch" if option in ARCH else "code"] = values.split(",")
    asked += pair.get("code") or pair.get("arch") or []
    dropped = sorted({code for code in asked if not _is_wanted(code, wanted)})
    kept = sorted({code for code in asked if _is_wanted(code, wanted)})
    if place is None:
        if not any(word.endswith(_INPUTS) for word in rest):
            return Plan(rest, [], [])  # `nvcc --version` and the like: nothing is compiled
        place = 0
    kept = kept or [f"sm_{number}" for number in wanted]
    if ptx is not None:
        kept = sorted({*kept, f"compute_{ptx}"})
        dropped = [code for code in dropped if code not in kept]
    flags = [word for code in kept for word in ("-gencode", f"arch=compute_{_number(code)},code={code}")]
    return Plan(rest[:place] + flags + rest[place:], kept, dropped)


def _options(arguments: Sequence[str]) -> Iterator[tuple[str, str, list[str]]]:
    """Each option that this driver knows with its value, and the words that it was; others with no value."""
    words = iter(arguments)
    for word in words:
        option, equals, value = word.partition("=")
        if option in (*GENCODE, *ARCH, *CODE, *THREADS):
            if equals:
                yield option, value, [word]
            else:
                value = next(words, "")
                yield option, value, [word, value]
        elif re.fullmatch(r"-t\d+", word):
            yield "-t", word[2:], [word]
        else:
            yield "", "", [word]


def _codes(gencode: str) -> list[str]:
    """The codes of `arch=compute_90,code=[sm_90,compute_90]`; the keys come in either order."""
    text = re.sub(r"arch=[^,]*,?", "", gencode).partition("code=")[2]
    return [code for code in re.split(r"[,\s]+", text.strip("[]\"', ")) if code]


def _is_wanted(code: str, wanted: Sequence[str]) -> bool:
    # Code for "sm_90a" runs on the GPU that "90" names, so whoever wants 90 keeps it.
    return code.startswith("sm_") and (_number(code) in wanted or _number(code).rstrip("af") in wanted)


def _number(code: str) -> str:
    return code.partition("_")[2]

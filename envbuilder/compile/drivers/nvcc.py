"""Stands in for nvcc in a build: compiles for the wanted GPU architectures alone, and measures.

Packages hard-code up to nine architectures and offer no way to choose. This driver drops those that nobody
asked for, whatever the spelling, and hands everything else to the real nvcc unchanged.

Standalone, standard library only: `python -I -S nvcc.py REAL_NVCC ARCHITECTURES UNITS_LOG ARGUMENT…`, where
ARCHITECTURES is like "90,100a" and UNITS_LOG is the file that gets one JSON line for each compiled unit.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

GENCODE = ("-gencode", "--generate-code")
ARCH = ("-arch", "--gpu-architecture")
CODE = ("-code", "--gpu-code")
THREADS = ("-t", "--threads")
_INPUTS = (".cu", ".c", ".cc", ".cxx", ".cpp", ".ptx", ".cubin", ".fatbin", ".o", ".obj", ".a", ".so")
_SOURCES = (".cu", ".c", ".cc", ".cxx", ".cpp")


class Plan(NamedTuple):
    """What a command line for nvcc becomes."""

    arguments: list[str]
    kept: list[str]
    """Architectures that are compiled, e.g. "sm_90"."""
    dropped: list[str]
    """Architectures that were asked for and are not wanted."""


def plan(arguments: Sequence[str], wanted: Sequence[str]) -> Plan:
    """`arguments` with the `wanted` architectures alone ("90", or "90a" for that variant alone).

    All architecture options become `-gencode arch=…,code=…`, at the place of the first. Where none of those
    asked for is wanted, the wanted ones are put in. PTX goes too: nothing is for GPUs that are not named.
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


def main(argv: Sequence[str]) -> int:
    """Runs the real nvcc as planned; returns its exit status, and dies of the signal that it died of."""
    nvcc, architectures, units_log, *arguments = argv
    planned = plan(arguments, architectures.split(","))
    began = time.monotonic()
    child = subprocess.Popen([nvcc, *planned.arguments])
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: child.send_signal(received))
    # wait4, because it alone gives this child's resources with those of all that it started.
    _, status, used = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    source = next((word for word in arguments if word.endswith(_SOURCES)), None)
    if source is not None and child.returncode == 0:
        unit = {
            "source": source,
            "seconds": round(time.monotonic() - began, 3),
            "cpu_seconds": round(used.ru_utime + used.ru_stime, 3),
            "peak_rss_bytes": used.ru_maxrss * 1024,
            "architectures_kept": planned.kept,
            "architectures_dropped": planned.dropped,
        }
        _append(units_log, json.dumps(unit) + "\n")
    if child.returncode < 0:
        with contextlib.suppress(OSError):  # SIGKILL has no handler to put back
            signal.signal(-child.returncode, signal.SIG_DFL)
        os.kill(os.getpid(), -child.returncode)
    return child.returncode


def _append(path: str, line: str) -> None:
    """One write in append mode, so that drivers running at once don't mix their lines."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
    try:
        os.write(descriptor, line.encode())
    finally:
        os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

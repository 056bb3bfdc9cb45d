"""A sweep: the runs of one config with every combination of some keys' values. Pure.

The same words give the same members, with the same names and numbers, wherever and whenever they are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from envbuilder.errors import UsageError

_VALUE = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")
"""What stands between two commas, those within brackets and quotes left out."""
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)([eE][+-]?\d+)?")
_ENDING = re.compile(r"(?<=.)\.[A-Za-z][A-Za-z0-9]*$")
_WORDS_FOR_NOTHING = frozenset({"true", "false", "null"})
_EXAMPLE = "--over seed=1,2,3 --over dataset.path_or_dataset_id=a.jsonl,b.jsonl"


@dataclass(frozen=True)
class Axis:
    """One key, and the values that it takes."""

    key: str
    values: tuple[str, ...]
    """As they are written after `--set KEY=`."""


@dataclass(frozen=True)
class Member:
    """One run of a sweep."""

    index: int
    """Its number within the sweep, from 0."""
    run: str
    """The run's name."""
    values: dict[str, str]
    """Of each key that is swept over."""

    @property
    def overrides(self) -> tuple[str, ...]:
        """Its own `KEY=VALUE`."""
        return tuple(f"{key}={value}" for key, value in self.values.items())


@dataclass(frozen=True)
class Sweep:
    """A family of runs."""

    name: str
    config: str
    """The config's absolute path."""
    recipe: str
    """Name of the recipe whose env they train in."""
    overrides: tuple[str, ...]
    """`KEY=VALUE` of all members."""
    members: tuple[Member, ...]

    def overrides_of(self, member: Member) -> tuple[str, ...]:
        """All that is set for the run of `member`."""
        return (*self.overrides, *member.overrides)


def make_sweep(name: str, config: str, recipe: str, overrides: Sequence[str], over: Sequence[str]) -> Sweep:
    """The sweep whose members have every combination of the values in `over` ("KEY=VALUE,VALUE,…").

    The last key's values change first. Raises UsageError where `over` makes no sense.
    """
    axes = _read_axes(over, {override.partition("=")[0].strip() for override in overrides})
    members: list[Member] = []
    used: set[str] = set()
    for index, values in enumerate(product(*(axis.values for axis in axes))):
        chosen = {axis.key: value for axis, value in zip(axes, values)}
        run = _unused("-".join([name, *(_label(*pair) for pair in chosen.items())]), used)
        used.add(run)
        members.append(Member(index, run, chosen))
    return Sweep(name, config, recipe, tuple(overrides), tuple(members))


def differences(noted: Sweep, wanted: Sweep) -> dict[str, tuple[str, str]]:
    """What two sweeps of one name have otherwise: as it was noted, and as it is wanted."""

    def told(sweep: Sweep) -> dict[str, str]:
        return {
            "config": sweep.config,
            "recipe": sweep.recipe,
            "--set": " ".join(sweep.overrides) or "nothing",
            "--over": " ".join(f"{key}={','.join(found)}" for key, found in _swept(sweep.members).items()),
        }

    before, now = told(noted), told(wanted)
    return {key: (before[key], now[key]) for key in before if before[key] != now[key]}


def ranges(numbers: Iterable[int]) -> str:
    """`numbers`, which rise, as sbatch's --array takes them: "0-3,5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}-{last}" if last > first else f"{first}" for first, last in runs)


def is_number(value: str) -> bool:
    """Whether a config takes `value` for a number."""
    return _NUMBER.fullmatch(value) is not None


def _read_axes(over: Sequence[str], taken: set[str]) -> list[Axis]:
    if not over:
        raise UsageError("A sweep is over something.", remedy=f"Say over what: {_EXAMPLE}")
    axes: list[Axis] = []
    for written in over:
        key, equals, text = (part.strip() for part in written.partition("="))
        found = _VALUE.findall(text)
        values = tuple(value.strip() for value in found)
        if not equals or not all(key.split(".")) or not all(values) or ",".join(found) != text or not found:
            raise UsageError(
                f"--over {written!r} is not a key and its values, none of them empty.",
                remedy=f"Write it as {_EXAMPLE}",
            )
        if key in taken:
            raise UsageError(
                f"The key {key} is set twice.",
                remedy=f"Leave one of them out: --over {key}=… or --set {key}=…",
            )
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise UsageError(
                f"--over {key} has the value {twice} twice, and one run of it is enough.",
                remedy=f"Give it once: --over {key}={','.join(dict.fromkeys(values))}",
            )
        taken.add(key)
        axes.append(Axis(key, values))
    return axes


def _label(key: str, value: str) -> str:
    """A value as a part of a run's name: a number with its key, a path by its file's name."""
    if is_number(value) or value in _WORDS_FOR_NOTHING:
        between = "" if value[0].isdigit() else "-"
        text = f"{key.rpartition('.')[2]}{between}{value}"
    else:
        text = _ENDING.sub("", value.rstrip("/").rpartition("/")[2])
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._") or "x"


def _unused(name: str, used: set[str]) -> str:
    number, free = 2, name
    while free in used:
        number, free = number + 1, f"{name}-{number}"
    return free


def _swept(members: Sequence[Member]) -> Mapping[str, list[str]]:
    """Key → the values that it takes, each once."""
    found: dict[str, dict[str, None]] = {}
    for member in members:
        for key, value in member.values.items():
            found.setdefault(key, {})[value] = None
    return {key: list(values) for key, values in found.items()}

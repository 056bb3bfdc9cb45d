"""A picture of a compilation: which unit ran when on how many CPUs, and how much memory that took."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

_WIDTH = 1200
"""Pixels of the whole picture, as are all that follow."""
_LEFT, _RIGHT, _TOP = 64, 16, 44
_PLOT = _WIDTH - _LEFT - _RIGHT
_LANES = 480
"""Height of all lanes, where each can have at least the lowest."""
_LANE_HIGHEST, _LANE_LOWEST = 22.0, 5.0
_CACHE = 16
"""Height of the strip for what came from the cache."""
_MEMORY = 90
_GAP = 26
_LETTER = 6.2
"""Width of one letter of a bar's label, about."""
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 43200, 86400)
_TICKS = 12
"""Most marks on an axis."""
# Hues that those tell apart who don't see all colours (Okabe and Ito, 2008), dark enough for white letters.
_COLOURS = ("#0072b2", "#b36b00", "#00805d", "#a8558a", "#3b83b5", "#c45200", "#75599c", "#6b7723")
_STYLE = """
:root { color-scheme: light dark; }
svg { font: 11px system-ui, sans-serif; --ink: #1f2328; --faint: #d0d7de; --ground: #ffffff; --bar: #ffffff; }
svg text { fill: var(--ink); }
svg .title { font-size: 15px; font-weight: 600; }
svg .ground { fill: var(--ground); }
svg .grid { stroke: var(--faint); stroke-width: 1; }
svg .unit { stroke: var(--ground); stroke-width: 0.8; }
svg .label { fill: var(--bar); pointer-events: none; }
svg .memory { fill: var(--faint); stroke: var(--ink); stroke-width: 1; }
@media (prefers-color-scheme: dark) {
  svg { --ink: #e6edf3; --faint: #3d444d; --ground: #0d1117; --bar: #ffffff; }
}
"""
_PAGE_STYLE = """
body { margin: 1rem; background: #ffffff; }
svg { max-width: 100%; height: auto; }
@media (prefers-color-scheme: dark) { body { background: #0d1117; } }
"""


@dataclass(frozen=True)
class TimelineUnit:
    """One bar."""

    name: str
    package: str
    begin_s: float
    end_s: float
    """Seconds since the compilation's beginning, both."""
    memory: int = 0
    """Bytes at the peak; it is drawn as if it had been that from beginning to end."""
    threads: int = 1
    """CPUs that it had."""
    cached: bool = False
    """It came from the object cache: it had no CPU."""


@dataclass(frozen=True)
class PlacedUnit:
    """A unit with the first of its lanes, counted from 0; there is one lane for each of its threads."""

    unit: TimelineUnit
    lane: int


def place(units: Sequence[TimelineUnit]) -> list[PlacedUnit]:
    """Gives each unit that is not cached the lowest lanes, side by side, that are free when it begins."""
    free_at: list[float] = []
    placed = []
    for unit in sorted(_drawn(units), key=lambda unit: (unit.begin_s, -unit.end_s)):
        threads = max(1, unit.threads)
        lane = 0
        while any(end > unit.begin_s for end in free_at[lane : lane + threads]):
            lane += 1
        free_at += [0.0] * (lane + threads - len(free_at))
        free_at[lane : lane + threads] = [unit.end_s] * threads
        placed.append(PlacedUnit(unit, lane))
    return placed


def memory_curve(units: Sequence[TimelineUnit]) -> list[tuple[float, int]]:
    """The bytes that all running units take together from each moment (seconds) on, until the next one."""
    changes: dict[float, int] = {}
    for unit in _drawn(units):
        changes[unit.begin_s] = changes.get(unit.begin_s, 0) + unit.memory
        changes[unit.end_s] = changes.get(unit.end_s, 0) - unit.memory
    curve, total = [], 0
    for moment in sorted(changes):
        total += changes[moment]
        curve.append((moment, total))
    return curve


def render_timeline(units: Sequence[TimelineUnit], *, cpus: int, title: str) -> str:
    """One HTML file that needs no other, well-formed as XML; of no units, an empty picture."""
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml">\n'
        '<head>\n<meta charset="utf-8"/>\n'
        f"<title>{_text(title)}</title>\n<style>{_PAGE_STYLE}</style>\n</head>\n<body>\n"
        f"{render_svg(units, cpus=cpus, title=title)}\n</body>\n</html>\n"
    )


def render_svg(units: Sequence[TimelineUnit], *, cpus: int, title: str) -> str:
    """The picture alone: lanes for `cpus` CPUs, or more where units had more, above the memory they took."""
    placed = place(units)
    lanes = max([cpus, 1, *(bar.lane + max(1, bar.unit.threads) for bar in placed)])
    height = min(_LANE_HIGHEST, max(_LANE_LOWEST, _LANES / lanes))
    cached = [unit for unit in units if unit.cached]
    end = max((unit.end_s for unit in units), default=0.0) or 1.0
    packages = sorted({unit.package for unit in units})
    colours = {package: _COLOURS[n % len(_COLOURS)] for n, package in enumerate(packages)}
    lanes_top = _TOP + 20
    lanes_bottom = lanes_top + lanes * height
    cache_bottom = lanes_bottom + (_CACHE + 4 if cached else 0)
    memory_top = cache_bottom + _GAP
    memory_bottom = memory_top + _MEMORY
    parts = [
        f'<rect class="ground" width="{_WIDTH}" height="{memory_bottom + 30:.1f}"/>',
        f'<text class="title" x="{_LEFT}" y="22">{_text(title)}</text>',
        *_legend(units, colours),
        *_axis(end, lanes_top, memory_bottom),
        f'<text x="{_LEFT - 8}" y="{(lanes_top + lanes_bottom) / 2 + 4:.1f}" text-anchor="end">'
        f"{lanes} CPU{'s' if lanes > 1 else ''}</text>",
        *(_bar(bar, colours, end, lanes_top, height) for bar in placed),
        *_cache(cached, colours, end, lanes_bottom + 4),
        *_memory(units, end, memory_top, memory_bottom),
    ]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {memory_bottom + 30:.1f}" '
        f'width="{_WIDTH}" role="img">\n<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _drawn(units: Sequence[TimelineUnit]) -> list[TimelineUnit]:
    return [unit for unit in units if not unit.cached]


def _legend(units: Sequence[TimelineUnit], colours: dict[str, str]) -> list[str]:
    parts, x = [], float(_LEFT)
    for package, colour in colours.items():
        own = [unit for unit in units if unit.package == package]
        seconds = sum((unit.end_s - unit.begin_s) * max(1, unit.threads) for unit in _drawn(own))
        cached = len(own) - len(_drawn(own))
        words = f"{package}: {_duration(seconds)} on CPUs" + (f", {cached} from the cache" if cached else "")
        parts.append(f'<rect x="{x:.1f}" y="34" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{x + 14:.1f}" y="43">{_text(words)}</text>')
        x += 14 + len(words) * _LETTER + 14
    return parts


def _axis(end: float, top: float, bottom: float) -> list[str]:
    step = next((step for step in _STEPS if end / step <= _TICKS), _STEPS[-1])
    parts = []
    for number in range(min(int(end / step), 10 * _TICKS) + 1):
        x = _x(number * step, end)
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{top:.1f}" y2="{bottom:.1f}"/>')
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 16:.1f}" text-anchor="middle">{_duration(number * step)}</text>'
        )
    return parts


def _bar(bar: PlacedUnit, colours: dict[str, str], end: float, top: float, height: float) -> str:
    unit = bar.unit
    x, width = _x(unit.begin_s, end), max(1.0, _x(unit.end_s, end) - _x(unit.begin_s, end))
    y, tall = top + bar.lane * height, height * max(1, unit.threads)
    label = ""
    letters = int((width - 6) / _LETTER)
    if height >= 12 and letters >= 4:
        # The end of a path tells more than its beginning.
        short = unit.name if len(unit.name) <= letters else "…" + unit.name[1 - letters :]
        label = f'<text class="label" x="{x + 4:.1f}" y="{y + tall / 2 + 4:.1f}">{_text(short)}</text>'
    return (
        f"<g><title>{_text(_words(unit))}</title>"
        f'<rect class="unit" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{tall:.1f}" rx="2" fill="{colours[unit.package]}"/>{label}</g>'
    )


def _cache(units: Sequence[TimelineUnit], colours: dict[str, str], end: float, top: float) -> list[str]:
    if not units:
        return []
    label = f'<text x="{_LEFT - 8}" y="{top + 12:.1f}" text-anchor="end">cached</text>'
    return [label] + [
        f'<rect x="{_x(unit.end_s, end) - 1:.1f}" y="{top:.1f}" width="2" height="{_CACHE}" '
        f'fill="{colours[unit.package]}"><title>{_text(_words(unit))}</title></rect>'
        for unit in units
    ]


def _memory(units: Sequence[TimelineUnit], end: float, top: float, bottom: float) -> list[str]:
    curve = memory_curve(units)
    peak = max((total for _, total in curve), default=0)
    if not peak:
        return []
    points, before = [f"{_x(0, end):.1f},{bottom:.1f}"], 0
    for moment, total in curve:
        x = _x(moment, end)
        points += [f"{x:.1f},{bottom - used / peak * (bottom - top):.1f}" for used in (before, total)]
        before = total
    label = f'<text x="{_LEFT - 8}" y="{{y:.1f}}" text-anchor="end">{{words}}</text>'
    return [
        f'<polygon class="memory" points="{" ".join(points)}"><title>Memory of all that ran, by their peaks: '
        f"at most {_bytes(peak)}</title></polygon>",
        label.format(y=top + 8, words=_bytes(peak)),
        label.format(y=bottom, words="memory"),
    ]


def _words(unit: TimelineUnit) -> str:
    taken = f"{unit.begin_s:.1f} to {unit.end_s:.1f} s"
    if unit.cached:
        return f"{unit.package}: {unit.name}, from the cache at {_duration(unit.end_s)}"
    cpus = f", {unit.threads} CPUs" if unit.threads > 1 else ""
    memory = f", {_bytes(unit.memory)}" if unit.memory else ""
    return f"{unit.package}: {unit.name}, {_duration(unit.end_s - unit.begin_s)} ({taken}){cpus}{memory}"


def _x(seconds: float, end: float) -> float:
    return _LEFT + seconds / end * _PLOT


def _duration(seconds: float) -> str:
    if seconds < 10 and seconds != int(seconds):
        return f"{seconds:.1f} s"
    return f"{seconds:,.0f} s"


def _bytes(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 100_000_000 else f"{size / 1e6:.0f} MB"


def _text(words: str) -> str:
    """`words` for XML, which has no room for most control characters."""
    return html.escape(re.sub(r"[^\t\n -\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", words))

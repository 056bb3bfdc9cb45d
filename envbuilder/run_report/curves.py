"""Curves over the steps of a run, as SVG: no script, no other file."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 560, 230
"""Of one picture, in its own units, as are all that follow."""
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 14, 34, 26
_MOST_POINTS = 400
"""A longer curve is drawn by the lowest and the highest value of each of half as many stretches."""
_DOTS = 60
"""A curve of at most so many points has a dot at each, which tells its value."""
_TICKS = 4

Point = tuple[float, float]


@dataclass(frozen=True)
class Curve:
    """One line."""

    name: str
    points: Sequence[Point]
    """Step and value, by step."""


def render_curves(
    title: str, curves: Sequence[Curve], borders: Sequence[int], shown: Callable[[float], str]
) -> str:
    """One picture of curves that share their axes; empty without any point.

    `borders` are the first steps of all jobs but the first; `shown` makes text of a value.
    """
    points = [point for curve in curves for point in curve.points]
    if not points:
        return ""
    ticks = nice_ticks(min(y for _, y in points), max(y for _, y in points))
    bottom, top = min(ticks[0], *(y for _, y in points)), max(ticks[-1], *(y for _, y in points))
    first, last = min(x for x, _ in points), max(x for x, _ in points)
    width, height = WIDTH - _LEFT - _RIGHT, HEIGHT - _TOP - _BOTTOM

    def place(point: Point) -> Point:
        across = (point[0] - first) / (last - first) if last > first else 0.5
        up = (point[1] - bottom) / (top - bottom) if top > bottom else 0.5
        return _LEFT + across * width, _TOP + height - up * height

    parts = [f'<text class="name" x="{_LEFT}" y="17">{_text(title)}</text>', *_legend(curves)]
    for tick in ticks:
        y = place((first, tick))[1]
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{_text(shown(tick))}</text>')
    for step, anchor in ((first, "start"), (last, "end")):
        x = place((step, bottom))[0]
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - 7}" text-anchor="{anchor}">step {step:,.0f}</text>')
    for number, border in enumerate(borders, start=2):
        x = place((border - 0.5, bottom))[0]
        parts.append(
            f'<line class="border" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{HEIGHT - _BOTTOM}">'
            f"<title>job {number} begins at step {border}</title></line>"
        )
    for number, curve in enumerate(curves):
        parts += _line(curve, number, place, shown)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
        f"<title>{_text(title)}</title>\n" + "\n".join(parts) + "\n</svg>"
    )


def nice_ticks(low: float, high: float) -> list[float]:
    """A few round numbers from at or below `low` to at or above `high`."""
    if high - low < abs(high) * 1e-9 or high == low:
        return [low]
    rough = (high - low) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most _MOST_POINTS of them, with the extremes of every stretch."""
    if len(points) <= _MOST_POINTS:
        return list(points)
    size = math.ceil(2 * len(points) / _MOST_POINTS)
    kept = []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes = {
            min(stretch, key=lambda point: point[1]): None,
            max(stretch, key=lambda point: point[1]): None,
        }
        kept += sorted(extremes)
    return kept


def _line(
    curve: Curve, number: int, place: Callable[[Point], Point], shown: Callable[[float], str]
) -> list[str]:
    points = thinned(curve.points)
    along = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(place, points))
    parts = [f'<polyline class="curve c{number}" points="{along}"/>']
    if len(points) <= _DOTS:
        for point in points:
            x, y = place(point)
            parts.append(
                f'<circle class="dot c{number}" cx="{x:.1f}" cy="{y:.1f}" r="2.6">'
                f"<title>{_text(curve.name)}, step {point[0]:,.0f}: {_text(shown(point[1]))}</title></circle>"
            )
    return parts


def _legend(curves: Sequence[Curve]) -> list[str]:
    if len(curves) < 2:
        return []
    parts, x = [], WIDTH - _RIGHT - 92.0 * len(curves)
    for number, curve in enumerate(curves):
        parts.append(f'<line class="curve c{number}" x1="{x:.1f}" x2="{x + 16:.1f}" y1="13" y2="13"/>')
        parts.append(f'<text x="{x + 21:.1f}" y="17">{_text(curve.name)}</text>')
        x += 92
    return parts


def _text(words: str) -> str:
    return html.escape(words)

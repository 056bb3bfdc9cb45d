from __future__ import annotations

import re
from xml.etree import ElementTree

import pytest

from envbuilder.compile.timeline import (
    PlacedUnit,
    TimelineUnit,
    memory_curve,
    place,
    render_svg,
    render_timeline,
)

GB = 1_000_000_000
SVG = "{http://www.w3.org/2000/svg}"
BACKWARD = TimelineUnit("csrc/bwd.cu", "causal-conv1d", 0, 250, 6 * GB, threads=2)
FORWARD = TimelineUnit("csrc/fwd.cu", "causal-conv1d", 1, 28, GB // 2)
SCAN = TimelineUnit("csrc/scan.cu", "mamba-ssm", 30, 130, GB)
CACHED = TimelineUnit("csrc/update.cu", "causal-conv1d", 2, 2.1, cached=True)
UNITS = [BACKWARD, FORWARD, SCAN, CACHED]


def bars(svg: ElementTree.Element) -> dict[str, dict[str, float]]:
    """Name of each unit → its rectangle."""
    found = {}
    for group in svg.iter(f"{SVG}g"):
        title, rect = group.find(f"{SVG}title"), group.find(f"{SVG}rect")
        assert title is not None
        assert title.text is not None
        assert rect is not None
        name = title.text.split(": ", 1)[1].split(",")[0]
        found[name] = {key: float(rect.attrib[key]) for key in ("x", "y", "width", "height")}
    return found


def test_units_take_the_lowest_free_lanes() -> None:
    assert place(UNITS) == [PlacedUnit(BACKWARD, 0), PlacedUnit(FORWARD, 2), PlacedUnit(SCAN, 2)]


def test_a_unit_with_several_threads_takes_lanes_side_by_side() -> None:
    first, second = TimelineUnit("a", "p", 0, 10), TimelineUnit("b", "p", 0, 5)
    wide, late = TimelineUnit("c", "p", 6, 9, threads=2), TimelineUnit("d", "p", 7, 8)
    lanes = {bar.unit.name: bar.lane for bar in place([late, wide, second, first])}
    assert lanes == {"a": 0, "b": 1, "c": 1, "d": 3}


def test_a_lane_is_free_from_the_moment_at_which_a_unit_ends() -> None:
    assert [bar.lane for bar in place([TimelineUnit("a", "p", 0, 5), TimelineUnit("b", "p", 5, 9)])] == [0, 0]


def test_the_memory_curve_adds_what_runs_at_once() -> None:
    assert memory_curve(UNITS) == [
        (0, 6 * GB),
        (1, 6 * GB + GB // 2),
        (28, 6 * GB),
        (30, 7 * GB),
        (130, 6 * GB),
        (250, 0),
    ]
    assert memory_curve([]) == []


def test_bars_lie_in_their_time_and_lanes() -> None:
    found = bars(ElementTree.fromstring(render_svg(UNITS, cpus=4, title="t")))
    assert set(found) == {"csrc/bwd.cu", "csrc/fwd.cu", "csrc/scan.cu"}
    backward, forward, scan = found["csrc/bwd.cu"], found["csrc/fwd.cu"], found["csrc/scan.cu"]
    assert backward["width"] == pytest.approx(1120)  # all of the axis
    assert scan["width"] == pytest.approx(1120 * 100 / 250, abs=0.2)
    assert scan["x"] - backward["x"] == pytest.approx(1120 * 30 / 250, abs=0.2)
    assert backward["height"] == 2 * forward["height"]
    assert forward["y"] == backward["y"] + backward["height"]
    assert scan["y"] == forward["y"]


def test_the_page_is_one_well_formed_file_that_needs_no_other() -> None:
    page = render_timeline(UNITS, cpus=4, title="quickstart")
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n"))
    assert root.find(".//{http://www.w3.org/1999/xhtml}title") is not None
    assert not re.search(r"href|src=|@import|url\(|<script", page)
    assert re.findall(r"https?://[^\"]+", page) == [
        "http://www.w3.org/1999/xhtml",
        "http://www.w3.org/2000/svg",
    ]
    assert page.count("prefers-color-scheme: dark") == 2
    texts = [text for element in root.iter() if (text := element.text)]
    assert "quickstart" in texts
    assert "4 CPUs" in texts
    assert "240 s" in texts
    assert "7.0 GB" in texts
    assert "causal-conv1d: 527 s on CPUs, 1 from the cache" in texts
    assert "causal-conv1d: csrc/bwd.cu, 250 s (0.0 to 250.0 s), 2 CPUs, 6.0 GB" in texts
    assert "causal-conv1d: csrc/update.cu, from the cache at 2.1 s" in texts


@pytest.mark.parametrize(
    "name",
    ["f<at::Half, float>(…) & \"more\" ]]> <script>alert('x')</script>", "\x00\x1b[31m\ud800\uffff", ""],
)
def test_names_are_never_markup(name: str) -> None:
    page = render_timeline([TimelineUnit(name, name, 0, 1)], cpus=1, title=name)
    root = ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>\n").encode())
    assert "<script" not in page
    if "script" in name:
        assert name in [element.text for element in root.iter()]


@pytest.mark.parametrize(
    "units",
    [
        pytest.param([], id="none"),
        pytest.param([CACHED], id="only cached ones"),
        pytest.param([TimelineUnit("a", "p", 0, 0)], id="no time at all"),
        pytest.param([TimelineUnit("a", "p", 0, 1e7)], id="months"),
        pytest.param([TimelineUnit(str(n), f"p{n}", 0, 5 + n, threads=0) for n in range(40)], id="many"),
    ],
)
def test_odd_lists_give_a_picture_too(units: list[TimelineUnit]) -> None:
    svg = render_svg(units, cpus=0, title="t")
    found = bars(ElementTree.fromstring(svg))
    assert len(found) == len([unit for unit in units if not unit.cached])
    assert all(bar["width"] >= 1 and bar["height"] >= 5 for bar in found.values())
    assert "nan" not in svg
    assert len(svg) < 100_000


def test_each_package_has_its_colour() -> None:
    svg = render_svg(UNITS, cpus=4, title="t")
    colours = dict(
        re.findall(r"<g><title>([^:]+):[^<]*</title><rect [^>]*fill=\"([^\"]+)\"", svg),
    )
    assert len(set(colours.values())) == len(colours) == 2

from __future__ import annotations

import io
import re
from collections.abc import Callable

import pytest
from rich.console import Console

from envbuilder.display import ConsoleReporter, amount, human_bytes, shortened

MIB = 1 << 20
LONG = "nvidia_cusparselt_cu13-0.8.0-py3-none-manylinux2014_x86_64.whl"


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr("envbuilder.display.time.monotonic", clock)
    return clock


def plain(tell: Callable[[ConsoleReporter], None], *, quiet: bool = False) -> list[str]:
    output = io.StringIO()
    with ConsoleReporter(Console(file=output, soft_wrap=True), quiet=quiet) as reporter:
        tell(reporter)
    return output.getvalue().splitlines()


def terminal(tell: Callable[[ConsoleReporter], None]) -> str:
    """All that is written to a terminal, without its control sequences."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=160, color_system=None)
    with ConsoleReporter(console, quiet=False) as reporter:
        tell(reporter)
        assert reporter._live is not None
        reporter._live.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", output.getvalue())


@pytest.mark.parametrize(
    ("count", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 30, "3.0 GiB"), (5 << 40, "5120.0 GiB")],
)
def test_bytes_are_told_in_binary_units(count: int, shown: str) -> None:
    assert human_bytes(count) == amount(count, "bytes") == shown


def test_without_a_terminal_there_is_a_line_every_ten_seconds_with_rate_and_time_left(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        for done in range(0, 101 * MIB, MIB):
            reporter.progress("fetch", done, 100 * MIB, "bytes")
            reporter.item("fetch", LONG, done, 100 * MIB)
            clock.now += 0.25

    assert plain(tell) == [
        "  fetch: 40.0 MiB of 100.0 MiB, 4.0 MiB/s, 15 s left",
        "  fetch: 80.0 MiB of 100.0 MiB, 4.0 MiB/s, 5 s left",
        "  fetch: 100.0 MiB of 100.0 MiB, 4.0 MiB/s",
    ]


def test_what_was_there_at_the_beginning_does_not_count_as_speed(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        reporter.progress("fetch", 50 * MIB, 100 * MIB, "bytes")
        clock.now += 10
        reporter.progress("fetch", 60 * MIB, 100 * MIB, "bytes")

    assert plain(tell) == ["  fetch: 60.0 MiB of 100.0 MiB, 1.0 MiB/s, 40 s left"]


def test_units_that_differ_have_no_time_left(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        reporter.progress("building", 0, 10, "units")
        clock.now += 20
        reporter.progress("building", 5, 10, "units")

    assert plain(tell) == ["  building: 5 units of 10 units"]


def test_a_label_can_be_used_again(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        for _ in range(2):
            reporter.progress("check", 1, 2, "files")
            reporter.progress("check", 2, 2, "files")

    assert plain(tell) == ["  check: 2 files of 2 files"] * 2


def test_quiet_says_nothing_but_warnings() -> None:
    def tell(reporter: ConsoleReporter) -> None:
        reporter.stage("fetching")
        reporter.note("a note")
        reporter.progress("fetch", 1, 1, "bytes")
        reporter.item("fetch", LONG, 1, 2)
        reporter.warn("[careful]")

    assert plain(tell, quiet=True) == ["warning: [careful]"]


def test_a_terminal_shows_the_whole_and_the_files_under_way(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        for done in range(0, 60 * MIB, MIB):
            reporter.progress("fetch", done, 100 * MIB, "bytes")
            reporter.item("fetch", LONG, done, 80 * MIB)
            clock.now += 0.25

    shown = terminal(tell)
    assert "59.0 MiB of 100.0 MiB, 4.0 MiB/s, 10 s left" in shown
    assert "59.0 MiB of 80.0 MiB, 4.0 MiB/s, 5 s left" in shown
    assert shortened(LONG) in shown
    assert LONG not in shown


def test_a_file_that_is_done_or_given_up_leaves_the_terminal(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        for name in ("done", "given-up", "left"):
            reporter.item("fetch", name, 1, 10)
        clock.now += 1
        for name in ("done", "given-up", "left"):
            reporter.item("fetch", name, 5, 10)
        reporter.item("fetch", "done", 10, 10)
        reporter.item("fetch", "given-up", 0, 0)
        assert reporter._live is not None
        assert [task.description for task in reporter._live.tasks] == ["  left"]

    terminal(tell)


def test_a_small_file_never_shows(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        for done in (0, 5, 10):
            reporter.item("fetch", "small.whl", done, 10)
            clock.now += 0.2

    assert "small.whl" not in terminal(tell)


def test_a_name_with_markup_in_it_is_shown_as_it_is(clock: Clock) -> None:
    def tell(reporter: ConsoleReporter) -> None:
        reporter.item("fetch", "[bold]x[/]", 0, 10)
        clock.now += 1
        reporter.item("fetch", "[bold]x[/]", 5, 10)

    assert "[bold]x[/]" in terminal(tell)


def test_names_keep_their_beginning_and_end() -> None:
    assert shortened("short.whl") == "short.whl"
    assert len(shortened(LONG)) == 40
    assert shortened(LONG).startswith("nvidia_cusparselt_cu")
    assert shortened(LONG).endswith("2014_x86_64.whl")

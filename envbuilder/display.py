"""What people see: progress with rate and time left, plain lines where there is no terminal, and tables.

Everything goes to the console that the cli owns; `--json` output does not pass through here.
"""

from __future__ import annotations

import textwrap
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from envbuilder.errors import EnvbuilderError
from envbuilder.findings import by_theme, counted, not_well, printable, skipped_by_reason, theme_title
from envbuilder.model import Finding
from envbuilder.report import Unit

if TYPE_CHECKING:
    from envbuilder.doctor.check import Check

_PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines of one label."""
_LIVE_INTERVAL = 0.1
"""Seconds between two changes of a line on a terminal; progress is told thousands of times a second."""
_ITEM_DELAY = 0.5
"""Seconds after which a file that is under way gets a line of its own on a terminal."""
_NAME_WIDTH = 40
"""Characters of a file's name that are shown."""
_NARROWEST = 30
"""Characters of a line, below which prose is left to the terminal."""
_VERDICT_STYLE = {"ok": "green", "warning": "yellow", "failed": "bold red", "skipped": "dim"}


def human_bytes(count: float) -> str:
    """`count` bytes in binary units, e.g. "2.9 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(count) < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"


def amount(count: float, unit: Unit) -> str:
    """A count in its unit, for people."""
    return human_bytes(count) if unit == "bytes" else f"{count:.0f} {unit}"


def shortened(name: str) -> str:
    """`name` with its middle left out where it is long: a wheel's begin and end tell it from others."""
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH // 2]}…{name[1 - _NAME_WIDTH // 2 :]}"


@dataclass
class _Shown:
    """One line of progress: when it began, with how much, and when it was last brought up to date."""

    began: float
    first: int
    last: float
    task: TaskID | None = None

    def due(self, now: float, interval: float, *, ended: bool) -> bool:
        """Whether it is to be shown again; it then counts as shown."""
        if not ended and now - self.last < interval:
            return False
        self.last = now
        return True

    def rate(self, now: float, done: int) -> float:
        """Units a second since it began; 0 where that can't be said."""
        return (done - self.first) / (now - self.began) if now > self.began and done > self.first else 0.0


class ConsoleReporter:
    """A `Reporter` for people; a context manager, so that the live display is always put away."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._lock = threading.Lock()
        self._shown: dict[tuple[str, str], _Shown] = {}
        """By label and name of the file; "" is the label's own line."""
        self._live: Progress | None = None
        if console.is_terminal and not quiet:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TextColumn("{task.fields[counts]}", markup=False),
                console=console,
                transient=True,
            )

    def __enter__(self) -> ConsoleReporter:
        if self._live:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def stage(self, text: str) -> None:
        if not self._quiet:
            self._console.print(f"[bold cyan]▸[/] {escape(text)}", highlight=False)

    def note(self, text: str) -> None:
        if not self._quiet:
            self._console.print(f"  {escape(text)}", highlight=False)

    def warn(self, text: str) -> None:
        self._console.print(f"[yellow]warning:[/] {escape(text)}", highlight=False)

    def progress(self, label: str, done: int, total: int, unit: Unit) -> None:
        if self._quiet:
            return
        with self._lock:
            if self._live:
                self._show(self._live, (label, ""), label, done, total, unit)
            else:
                self._say(label, done, total, unit)

    def item(self, label: str, name: str, done: int, total: int) -> None:
        # Line after line of files would tell nobody anything: they are for terminals.
        if self._live and not self._quiet:
            with self._lock:
                self._show(self._live, (label, name), f"  {shortened(name)}", done, total, "bytes")

    def _show(
        self, live: Progress, key: tuple[str, str], description: str, done: int, total: int, unit: Unit
    ) -> None:
        now, ended = time.monotonic(), done >= total
        # A file shows only when it has been under way for a moment: small ones would flicker by.
        begun = now if key[1] else 0.0
        shown = self._shown.setdefault(key, _Shown(now, done, begun))
        if not shown.due(now, _ITEM_DELAY if key[1] and shown.task is None else _LIVE_INTERVAL, ended=ended):
            return
        if ended:
            del self._shown[key]
            if shown.task is not None:
                live.remove_task(shown.task)
            return
        counts = self._counts(shown, now, done, total, unit)
        if shown.task is None:
            shown.task = live.add_task(description, total=total, completed=done, counts=counts)
        else:
            live.update(shown.task, completed=done, total=total, counts=counts)

    def _say(self, label: str, done: int, total: int, unit: Unit) -> None:
        now, ended = time.monotonic(), done >= total
        shown = self._shown.setdefault((label, ""), _Shown(now, done, now))
        if not shown.due(now, _PLAIN_INTERVAL, ended=ended):
            return
        if ended:
            del self._shown[label, ""]
        self._console.print(
            escape(f"  {label}: {self._counts(shown, now, done, total, unit)}"), highlight=False
        )

    def _counts(self, shown: _Shown, now: float, done: int, total: int, unit: Unit) -> str:
        counts, rate = f"{amount(done, unit)} of {amount(total, unit)}", shown.rate(now, done)
        if unit == "bytes" and rate:
            counts += f", {human_bytes(rate)}/s"
        # Translation units differ a hundredfold: their number says nothing of the time left.
        if unit != "units" and rate and done < total:
            counts += f", {(total - done) / rate:.0f} s left"
        return counts


def print_error(console: Console, error: EnvbuilderError, *, verbose: bool) -> None:
    """One sentence, the context, the remedy."""
    console.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False)
    for key, value in error.context.items():
        shown = value if verbose or value.count("\n") < 30 else "\n".join(value.splitlines()[-30:])
        console.print(f"  {escape(key)}: {escape(shown)}", highlight=False)
    console.print(f"[bold]remedy:[/] {escape(error.remedy)}", highlight=False)


def print_findings(console: Console, findings: tuple[Finding, ...], *, verbose: bool) -> None:
    """Doctor's findings by theme, with evidence and remedies of what is not well, and what to type first.

    What was skipped comes last, a line for each reason; with `verbose`, among the rest. On a terminal prose
    is wrapped; evidence and remedies never are, so that they can be copied.
    """
    for theme, found in by_theme(f for f in findings if verbose or f.verdict != "skipped").items():
        console.print(f"\n[bold]{escape(theme)}[/]", highlight=False)
        width = max(len(finding.check) for finding in found)
        for finding in found:
            _print_finding(console, finding, width, verbose=verbose)
    if skipped := {} if verbose else skipped_by_reason(findings):
        console.print("\n[bold]Skipped[/]", highlight=False)
        for reason, checks in skipped.items():
            _print_prose(console, "  ", f"{reason} ({', '.join(checks)})", indent=4)
    console.print(f"\n[bold]{counted(findings)}[/]", highlight=False)
    if wrong := not_well(findings):
        _print_remedy(console, wrong[0].remedy or "", f"first, for {wrong[0].check}", indent=0)


def _print_finding(console: Console, finding: Finding, width: int, *, verbose: bool) -> None:
    verdict = f"[{_VERDICT_STYLE[finding.verdict]}]{finding.verdict:<9}[/]"
    indent = 2 + 9 + width + 2
    _print_prose(console, f"  {verdict}{finding.check:<{width}}  ", finding.summary, indent=indent)
    is_well = finding.verdict in ("ok", "skipped")
    for line in finding.evidence if verbose or not is_well else ():
        for part in printable(line).split("\n"):
            console.print(f"{' ' * 11}[dim]{escape(part)}[/]", highlight=False)
    if finding.remedy and not is_well:
        _print_remedy(console, finding.remedy, "remedy", indent=11)


def _print_remedy(console: Console, remedy: str, label: str, *, indent: int) -> None:
    console.print(f"{' ' * indent}[bold]{label}:[/] {escape(printable(remedy))}", highlight=False)


def _print_prose(console: Console, head: str, text: str, *, indent: int) -> None:
    """`head` (markup) and `text`, which goes on `indent` further in where a terminal's line is full."""
    room = console.width - indent
    lines = [printable(text)]
    if console.is_terminal and room >= _NARROWEST:
        lines = textwrap.wrap(lines[0], room, break_long_words=False, break_on_hyphens=False) or [""]
    console.print(head + f"\n{' ' * indent}".join(map(escape, lines)), highlight=False)


def print_checks(console: Console, checks: Iterable[Check]) -> None:
    """Doctor's checks by theme: id, what it needs and costs, and what it looks at."""
    themes: dict[str, list[Check]] = {}
    for check in checks:
        themes.setdefault(theme_title(check.id), []).append(check)
    for theme, listed in themes.items():
        console.print(f"\n[bold]{escape(theme)}[/]", highlight=False)
        for check in listed:
            needs = f", needs {' and '.join(check.needs)}" if check.needs else ""
            console.print(f"  [cyan]{check.id}[/]  [dim]{check.cost}{needs}[/]", highlight=False)
            _print_prose(console, " " * 6, check.looks_at, indent=6)


def print_table(console: Console, title: str, rows: Sequence[Sequence[str]]) -> None:
    """A title, and rows of cells below one another; the first row has the columns' names."""
    console.print(f"\n[bold]{escape(title)}[/]", highlight=False)
    widths = [max(map(len, column)) for column in zip(*rows)]
    for number, row in enumerate(rows):
        line = "  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths)).rstrip()
        console.print(escape(line), style="bold" if number == 0 else None, highlight=False)


def print_summary(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A title, and a line for each key with its value."""
    console.print(f"\n[bold]{escape(title)}[/]", highlight=False)
    width = max((len(key) for key, _ in rows), default=0)
    for key, value in rows:
        value = value.replace("\n", "\n" + " " * (width + 2))
        console.print(f"[bold]{escape(key):<{width}}[/]  {escape(value)}", highlight=False)

"""What people see: progress with rate and time left, plain lines where there is no terminal, and tables.

Everything goes to the console that the cli owns; `--json` output does not pass through here.
"""

from __future__ import annotations

import threading
import time
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn

from envbuilder.errors import EnvbuilderError
from envbuilder.model import Finding
from envbuilder.report import Unit

_PLAIN_INTERVAL = 10.0
"""Seconds between two plain lines of one label."""
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


class ConsoleReporter:
    """A `Reporter` for people; a context manager, so that the live display is always put away."""

    def __init__(self, console: Console, *, quiet: bool) -> None:
        self._console = console
        self._quiet = quiet
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}
        self._last_plain: dict[str, tuple[float, float]] = {}
        self._live: Progress | None = None
        if console.is_terminal and not quiet:
            self._live = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.fields[counts]}"),
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
                self._show(self._live, label, done, total, unit)
            else:
                self._say(label, done, total, unit)

    def _show(self, live: Progress, label: str, done: int, total: int, unit: Unit) -> None:
        counts = f"{amount(done, unit)} of {amount(total, unit)}"
        if label not in self._tasks:
            self._tasks[label] = live.add_task(label, total=total, counts=counts)
        task = self._tasks[label]
        shown = live.tasks[live.task_ids.index(task)]
        if unit == "bytes" and shown.speed:
            counts += f", {human_bytes(shown.speed)}/s"
        if unit != "units" and shown.time_remaining is not None:
            counts += f", {shown.time_remaining:.0f} s left"
        live.update(task, completed=done, total=total, counts=counts)
        if done >= total:
            live.remove_task(self._tasks.pop(label))

    def _say(self, label: str, done: int, total: int, unit: Unit) -> None:
        now = time.monotonic()
        began, last = self._last_plain.get(label, (now, 0.0))
        if done < total and now - last < _PLAIN_INTERVAL:
            return
        self._last_plain[label] = (began, now)
        line = f"  {label}: {amount(done, unit)} of {amount(total, unit)}"
        # Translation units differ a hundredfold: their number says nothing of the time left.
        if unit != "units" and 0 < done < total and now > began:
            line += f", {(now - began) * (total - done) / done:.0f} s left"
        self._console.print(escape(line), highlight=False)
        if done >= total:
            del self._last_plain[label]


def print_error(console: Console, error: EnvbuilderError, *, verbose: bool) -> None:
    """One sentence, the context, the remedy."""
    console.print(f"[bold red]error:[/] {escape(error.message)}", highlight=False)
    for key, value in error.context.items():
        shown = value if verbose or value.count("\n") < 30 else "\n".join(value.splitlines()[-30:])
        console.print(f"  {escape(key)}: {escape(shown)}", highlight=False)
    console.print(f"[bold]remedy:[/] {escape(error.remedy)}", highlight=False)


def print_findings(console: Console, findings: tuple[Finding, ...], *, verbose: bool) -> None:
    """Doctor's findings, a line each; evidence and remedies of what is not well."""
    width = max((len(finding.check) for finding in findings), default=0)
    indent = " " * (9 + width + 2)
    for finding in findings:
        verdict = f"[{_VERDICT_STYLE[finding.verdict]}]{finding.verdict:<9}[/]"
        console.print(f"{verdict}{finding.check:<{width}}  {escape(finding.summary)}", highlight=False)
        not_well = finding.verdict in ("failed", "warning")
        for line in finding.evidence if not_well or verbose else ():
            console.print(f"{indent}[dim]{escape(line)}[/]", highlight=False)
        if finding.remedy and not_well:
            console.print(f"{indent}[bold]remedy:[/] {escape(finding.remedy)}", highlight=False)


def print_summary(console: Console, title: str, rows: list[tuple[str, str]]) -> None:
    """A title, and a line for each key with its value."""
    console.print(f"\n[bold]{escape(title)}[/]", highlight=False)
    width = max((len(key) for key, _ in rows), default=0)
    for key, value in rows:
        value = value.replace("\n", "\n" + " " * (width + 2))
        console.print(f"[bold]{escape(key):<{width}}[/]  {escape(value)}", highlight=False)

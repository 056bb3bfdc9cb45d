"""How a stage tells what it is doing. Stages never print: the cli hands them a `Reporter`."""

from __future__ import annotations

from typing import Literal, Protocol

Unit = Literal["bytes", "files", "units", "steps", "checks"]


class Reporter(Protocol):
    """Receives a stage's progress. Called from any thread."""

    def stage(self, text: str) -> None:
        """A new step of the work begins, e.g. "building causal-conv1d 1.7.0"."""

    def progress(self, label: str, done: int, total: int, unit: Unit) -> None:
        """`done` of `total` units under `label`; equal numbers end that label's display."""

    def item(self, label: str, name: str, done: int, total: int) -> None:
        """`done` of `total` bytes of the file `name`, one of those under way under `label`; equal numbers, or
        a `total` of 0 where it was given up, take it off the display."""

    def note(self, text: str) -> None:
        """Something the user may want to know."""

    def warn(self, text: str) -> None:
        """Something the user should look at."""


class Quiet:
    """A reporter that says nothing."""

    def stage(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int, unit: Unit) -> None: ...

    def item(self, label: str, name: str, done: int, total: int) -> None: ...

    def note(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...

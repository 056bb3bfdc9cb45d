"""torchrun's own account: the failure that it saw first."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from envbuilder.doctor.log_lines import Line

ROOT_CAUSE = "Root Cause (first observed failure)"

_FIELD = re.compile(r"\s*(time|host|rank|exitcode|traceback)\s*:\s*(.*\S)")
_RANK = re.compile(r"(\d+) \(local_rank: (\d+)\)")
_LINES_AT_MOST = 8


@dataclass
class RootCause:
    """What the block says after its headline, at `line` of the log."""

    line: Line
    fields: dict[str, str] = field(default_factory=dict)
    length: int = 0

    def read(self, line: Line) -> bool:
        """Takes the block's next line; False where the block has ended."""
        self.length += 1
        if match := _FIELD.match(line.text):
            self.fields[match[1]] = match[2]
        return self.length < _LINES_AT_MOST and "traceback" not in self.fields

    @property
    def speakers(self) -> frozenset[str]:
        """What this rank is called as a line's speaker."""
        match = _RANK.match(self.fields.get("rank", ""))
        return frozenset({f"rank {match[1]}", f"local rank {match[2]}"}) if match else frozenset()

    @property
    def summary(self) -> str:
        """One line of evidence."""
        told = [
            f"{name} {self.fields[key]}"
            for key, name in (("rank", "rank"), ("host", "on"), ("exitcode", "exit code"), ("time", "at"))
            if key in self.fields
        ]
        return f"the first failure that torchrun saw (line {self.line.number}): {', '.join(told)}"

"""A user's own batch script, with places for what envbuilder puts in. Pure, but for reading the file."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from envbuilder.errors import InputError

LINES, WORDS = ("sbatch", "environment", "command"), ("name", "log")
"""The markers: those that stand for lines, each alone on its own, and those within a line."""
_MARKER = re.compile(r"\{\{(.*?)\}\}")
_SHORT = {
    "A": "account", "a": "array", "C": "constraint", "c": "cpus-per-task", "D": "chdir", "d": "dependency",
    "e": "error", "G": "gpus", "J": "job-name", "N": "nodes", "n": "ntasks", "o": "output", "p": "partition",
    "q": "qos", "t": "time",
}  # fmt: skip
_SAME = (
    frozenset({"gres", "gpus", "gpus-per-node", "gpus-per-task"}),
    frozenset({"mem", "mem-per-cpu", "mem-per-gpu"}),
    frozenset({"cpus-per-task", "cpus-per-gpu"}),
)
"""Options of which one takes the other's place."""
_FOLLOWS = {"ntasks": "nodes"}
"""Option → the one that it is as many as. With fewer tasks than nodes, Slurm takes nodes away."""


@dataclass(frozen=True)
class Template:
    """A batch script with markers such as `{{command}}`. `read_template` reads one."""

    source: Path
    text: str

    @property
    def options(self) -> dict[str, str]:
        """sbatch's options that the template itself sets."""
        return head_options(self.text)

    def overrides(self, option: str) -> bool:
        """Whether the template itself sets this option ("--NAME=VALUE"), or one that takes its place."""
        name = option[2:].partition("=")[0]
        alike = {name, _FOLLOWS.get(name, name)}.union(*(group for group in _SAME if name in group))
        return not alike.isdisjoint(self.options)

    def fill(self, parts: Mapping[str, str]) -> str:
        """The script: each marker's part in its place."""
        return _MARKER.sub(lambda found: parts[found[1].strip()], self.text)

    def check_head(self, script: str, needed: Mapping[str, str]) -> None:
        """InputError where `script`, filled, lacks one of the options `needed`, or has it otherwise."""
        there = head_options(script)
        lacking = {name: value for name, value in needed.items() if not _holds(name, value, there.get(name))}
        if lacking:
            lines = [f"#SBATCH --{name}" + (f"={value}" if value else "") for name, value in lacking.items()]
            raise InputError(
                f"The template {self.source} does not leave envbuilder's jobs what they need: "
                f"{', '.join(f'--{name}' for name in lacking)}.",
                remedy="Give {{sbatch}} a line of its own before the first command, and set none of these "
                "otherwise; or write them as they stand below, with {{name}} and {{log}} for this job's",
                context={"template": self.source, "needed": "\n" + "\n".join(lines)},
            )


def _holds(name: str, needed: str, there: str | None) -> bool:
    if name == "signal":  # When, is the template's to say.
        return there is not None and there.partition("@")[0] == needed.partition("@")[0]
    return there == needed


def read_template(path: Path) -> Template:
    """The template in the file `path`; InputError names the line where it is none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The script template {path} can't be read: {error}.",
            remedy="Give a readable UTF-8 file: --template FILE, or template in the site file",
            context={"file": path},
        ) from error
    template = Template(path, text)
    if not text.startswith("#!"):
        raise _wrong(template, 1, 'a batch script begins with its interpreter, as "#!/bin/bash"')
    lines = text.splitlines()
    for number, line in enumerate(lines, 1):
        for marker in (found.strip() for found in _MARKER.findall(line)):
            if marker not in (*LINES, *WORDS):
                raise _wrong(template, number, f"there is no marker {{{{{marker}}}}}")
            if marker in LINES and _MARKER.sub("", line).strip():
                raise _wrong(template, number, f"{{{{{marker}}}}} stands for whole lines")
    commands = [number for number, line in enumerate(lines, 1) if re.search(r"\{\{\s*command\s*\}\}", line)]
    if len(commands) != 1:
        raise _wrong(template, (commands or [len(lines)])[-1], "{{command}} has to stand there once")
    return template


def _wrong(template: Template, number: int, why: str) -> InputError:
    known = ", ".join(f"{{{{{marker}}}}}" for marker in (*LINES, *WORDS))
    return InputError(
        f"The script template {template.source} is wrong in line {number}: {why}.",
        remedy=f"Mend that line; the markers are {known}. What envbuilder would write: --print-script",
        context={"file": template.source, "line": number},
    )


def head_options(script: str) -> dict[str, str]:
    """Long name → value of the options in a script's #SBATCH lines, up to the first command, as sbatch reads
    them; of two the last counts."""
    options: dict[str, str] = {}
    for line in script.splitlines():
        if (
            line.strip()
            and not line.startswith("#")
            and not re.fullmatch(r"\{\{\s*sbatch\s*\}\}", line.strip())
        ):
            break
        if line.startswith("#SBATCH"):
            options.update(_options_of(shlex.split(line[len("#SBATCH") :], comments=True)))
    return options


def _options_of(words: list[str]) -> dict[str, str]:
    options: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
        elif word.startswith("-"):
            name, value = _SHORT.get(word[1:2], word[1:2]), word[2:].lstrip("=")
        else:
            value = word
        options[name] = value
    return options

"""doctor's report as one HTML file for the help desk: needs no other file, no script, and names nobody."""

from __future__ import annotations

import html
import os
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path

from envbuilder.atomic import write_atomically
from envbuilder.doctor.facts import EnvFacts, Facts
from envbuilder.doctor.redact import Private, Redactor, private_here
from envbuilder.doctor.runner import CHECKS
from envbuilder.doctor.signatures import signatures
from envbuilder.doctor.subject import Subject
from envbuilder.findings import by_theme, counted, counts, not_well, printable
from envbuilder.model import Finding

_GIB = 1 << 30
_WORD = re.compile(r"[a-z0-9_]+")
_LABELS = {"failed": "failed", "warning": "warnings", "ok": "ok", "skipped": "skipped"}


@dataclass(frozen=True)
class Report:
    """What the page shows."""

    title: str
    envbuilder: str
    """Its version."""
    made_at: str
    command: str
    facts: tuple[tuple[str, str], ...]
    """Name and value, in the order of the page."""
    findings: tuple[Finding, ...]


def write_report(path: Path, findings: tuple[Finding, ...], facts: Facts, subject: Subject) -> None:
    """Writes the page of `findings` to `path`, in one step, without what is private to this user and machine.

    MismatchError where it can't be written.
    """
    site = subject.site
    accounts = (site.build.account, site.train.account) if site else ()
    report = Report(
        title=_title(findings),
        envbuilder=facts.envbuilder,
        made_at=f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC",
        command=shlex.join(["envbuilder", *sys.argv[1:]]),
        facts=fact_rows(facts),
        findings=findings,
    )
    redactor = make_redactor(private_here(os.environ, accounts), subject)
    write_atomically(path, render(redacted(report, redactor)))


def make_redactor(private: Private, subject: Subject) -> Redactor:
    """One that knows the words and versions that stand in a report of `subject` and name nobody."""
    packages = subject.lock.pylock.packages if subject.lock else ()
    texts = [
        *(f"{check.id} {check.title} {check.looks_at} {' '.join(check.needs)}" for check in CHECKS),
        *(f"{known.id} {known.cause} {known.remedy} {known.seen}" for known in signatures()),
        *(str(package.name) for package in packages),
        subject.recipe.name if subject.recipe else "",
    ]
    words = {word for text in texts for word in _WORD.findall(text.lower())}
    return Redactor(private, ordinary=words, versions={str(package.version) for package in packages})


def redacted(report: Report, redactor: Redactor) -> Report:
    """`report` without what is private, and without what would steer a terminal or spoil a page."""
    texts = [report.command, *(f"{name}: {value}" for name, value in report.facts)]
    texts += [text for finding in report.findings for text in _texts(finding)]
    for text in texts:
        redactor.learn(printable(text))

    def clean(text: str) -> str:
        return redactor.redact(printable(text))

    def clean_fact(name: str, value: str) -> tuple[str, str]:
        # With its name before it: what is called a host is one.
        return name, clean(f"{name}: {value}").removeprefix(f"{name}: ")

    return replace(
        report,
        command=clean(report.command),
        facts=tuple(clean_fact(name, value) for name, value in report.facts),
        findings=tuple(
            finding.model_copy(
                update={
                    "summary": clean(finding.summary),
                    # As one text: a private key goes over several lines.
                    "evidence": tuple(clean("\n".join(finding.evidence)).split("\n"))
                    if finding.evidence
                    else (),
                    "remedy": finding.remedy and clean(finding.remedy),
                }
            )
            for finding in report.findings
        ),
    )


def _texts(finding: Finding) -> tuple[str, str, str]:
    return finding.summary, "\n".join(finding.evidence), finding.remedy or ""


def _title(findings: Sequence[Finding]) -> str:
    found = counts(findings)
    if found["failed"]:
        return f"{found['failed']} {'check' if found['failed'] == 1 else 'checks'} failed"
    if found["warning"]:
        return "Nothing failed, with warnings"
    return "All is well" if found["ok"] else "Nothing was checked"


def fact_rows(facts: Facts) -> tuple[tuple[str, str], ...]:
    """The facts, a line each; what there is none of is left out."""
    machine, looked_at = facts.machine, facts.subject
    cpus = f"{machine.cpus}"
    if machine.cpu_limit is not None:
        cpus += f"; the control group allows the time of {machine.cpu_limit:g}"
    memory = f"{machine.memory_bytes / _GIB:.0f} GiB"
    if machine.memory_limit_bytes is not None:
        memory += f"; the control group allows {machine.memory_limit_bytes / _GIB:.0f} GiB"
    gpus = "\n".join(f"{gpu.name}, {gpu.memory_mib} MiB, driver {gpu.driver}" for gpu in machine.gpus)
    rows = (
        ("Host", machine.hostname),
        ("System", f"{machine.os}, Linux {machine.kernel}, {machine.architecture}"),
        ("CPUs", cpus),
        ("Memory", memory),
        ("GPUs", gpus or "none seen"),
        ("Slurm job", machine.slurm_job),
        ("Python", f"{machine.python}, of envbuilder itself"),
        ("ROOT", looked_at.root),
        ("Recipe", looked_at.recipe),
        ("Lock", looked_at.lock_sha256 and f"sha256 {looked_at.lock_sha256}"),
        *(_env_rows(looked_at.env) if looked_at.env else ()),
    )
    return tuple((name, value) for name, value in rows if value)


def _env_rows(env: EnvFacts) -> Iterable[tuple[str, str]]:
    yield "Env", env.path
    yield "Env holds", f"Python {env.python}, {env.packages} packages, made at {env.created_at}"
    if env.extensions:
        yield (
            "Compiled",
            f"{', '.join(env.extensions)}, for {', '.join(env.compute_capabilities) or 'no GPU'}",
        )
    yield "Env's lock", f"sha256 {env.lock_sha256}"


def render(report: Report) -> str:
    """The page, well-formed as XML too; shows `report` as it is."""
    style = files("envbuilder.doctor").joinpath("page.css").read_text(encoding="utf-8")
    wrong = not_well(report.findings)
    return f"""<!DOCTYPE html>
<html lang="en" xmlns="http://www.w3.org/1999/xhtml">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'"/>
<title>envbuilder doctor: {_text(report.title)}</title>
<style>
{style}</style>
</head>
<body>
<main>
<p class="over">envbuilder doctor {_text(report.envbuilder)} · {_text(report.made_at)}</p>
<h1>{_text(report.title)}</h1>
<p class="asked"><code>$ {_text(report.command)}</code></p>
{_counts(report.findings)}
{"<h2>What to mend, in this order</h2>" if wrong else ""}
{"".join(map(_card, wrong))}
<h2>Where, and of what</h2>
<dl class="sheet facts">
{"".join(f"<dt>{_text(name)}</dt><dd>{_lines(value)}</dd>" for name, value in report.facts)}
</dl>
<h2>All that was looked at</h2>
<div class="sheet all">
{"".join(_theme(theme, found) for theme, found in by_theme(report.findings).items())}
</div>
<footer>{_text(counted(report.findings))}. Secrets, addresses and the names of people and machines were
replaced by &lt;secret&gt;, &lt;user&gt;, &lt;host-1&gt; and the like; the same name is the same word all over
the page.</footer>
</main>
</body>
</html>
"""


def _counts(findings: Sequence[Finding]) -> str:
    tiles = "".join(
        f'<li class="{verdict}{"" if count else " none"}"><b>{count}</b>{_LABELS[verdict]}</li>'
        for verdict, count in counts(findings).items()
    )
    return f'<ul class="counts">{tiles}</ul>'


def _card(finding: Finding) -> str:
    evidence = f"<h4>What was seen</h4><pre>{_text(_joined(finding))}</pre>" if finding.evidence else ""
    remedy = f'<h4>What to do</h4><pre class="remedy">{_text(finding.remedy)}</pre>' if finding.remedy else ""
    return (
        f'<article class="card {finding.verdict}" id="{_text(finding.check)}">'
        f"<header>{_name(finding)}</header><p>{_text(finding.summary)}</p>{evidence}{remedy}</article>\n"
    )


def _theme(theme: str, findings: Sequence[Finding]) -> str:
    return f"<h3>{_text(theme)}</h3>\n" + "".join(map(_row, findings))


def _row(finding: Finding) -> str:
    words = _text(finding.summary)
    if finding.verdict in ("failed", "warning"):
        words = f'<a href="#{_text(finding.check)}">{words}</a>'
    elif finding.evidence:
        words = f"<details><summary>{words}</summary><pre>{_text(_joined(finding))}</pre></details>"
    return f'<div class="row {finding.verdict}">{_name(finding)}<div>{words}</div></div>\n'


def _name(finding: Finding) -> str:
    verdict = f'<span class="verdict">{finding.verdict}</span>'
    return f"<span>{verdict}</span><code>{_text(finding.check)}</code>"


def _joined(finding: Finding) -> str:
    return "\n".join(finding.evidence)


def _lines(text: str) -> str:
    return "<br/>".join(map(_text, text.split("\n")))


def _text(text: str) -> str:
    return html.escape(text)

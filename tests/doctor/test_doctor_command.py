"""`envbuilder doctor`: what it prints, what it writes, and with which exit code it ends."""

from __future__ import annotations

import io
import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from envbuilder import __version__
from envbuilder.display import print_checks, print_findings
from envbuilder.doctor import CHECKS
from envbuilder.doctor.facts import EnvFacts, Facts, GpuFacts, MachineFacts, SubjectFacts
from envbuilder.findings import counted, counts
from envbuilder.model import Finding
from tests.conftest import Run

REMEDY = "envbuilder install recipes/nemotron3-nano-h200.toml --reinstall && " + "envbuilder doctor " * 6
FINDINGS = (
    Finding(check="platform.glibc", verdict="ok", summary="glibc 2.36 will do.", evidence=("found: 2.36",)),
    Finding(check="storage.speed", verdict="warning", summary="Slow.", remedy="Use another disk."),
    Finding(
        check="env.lock",
        verdict="failed",
        summary="The env is of another lock than the one that is there now, and nobody knows of which one.",
        evidence=("/a/very/long/path" * 8, "[bold]x[/] \x1b[31mred\x1b]0;title\x07"),
        remedy=REMEDY,
    ),
    Finding(check="gpu.devices", verdict="skipped", summary="This machine has no GPU."),
    Finding(check="gpu.driver", verdict="skipped", summary="This machine has no GPU."),
    Finding(check="data.lines", verdict="skipped", summary="No training config was given."),
)


@pytest.fixture
def broken_log(tmp_path: Path) -> Path:
    """The log of a build that failed for a known reason."""
    path = tmp_path / "broken.log"
    path.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.\n", "utf-8")
    return path


def shown(findings: tuple[Finding, ...] = FINDINGS, *, verbose: bool = False, **settings: Any) -> list[str]:
    output = io.StringIO()
    print_findings(Console(file=output, soft_wrap=True, **settings), findings, verbose=verbose)
    return output.getvalue().splitlines()


def test_findings_stand_under_their_themes_with_evidence_and_remedy_of_what_is_not_well() -> None:
    assert shown() == [
        "",
        "Platform",
        "  ok       platform.glibc  glibc 2.36 will do.",
        "",
        "Storage",
        "  warning  storage.speed  Slow.",
        "           remedy: Use another disk.",
        "",
        "Env",
        f"  failed   env.lock  {FINDINGS[2].summary}",
        "           " + "/a/very/long/path" * 8,
        "           [bold]x[/] red\ufffd]0;title\ufffd",
        f"           remedy: {REMEDY}",
        "",
        "Skipped",
        "  This machine has no GPU. (gpu.devices, gpu.driver)",
        "  No training config was given. (data.lines)",
        "",
        "1 failed, 1 warning, 1 ok, 3 skipped",
        f"first, for env.lock: {REMEDY}",
    ]


def test_verbose_shows_all_evidence_and_each_check_that_was_skipped() -> None:
    lines = shown(verbose=True)
    assert "           found: 2.36" in lines
    assert "  skipped  gpu.driver   This machine has no GPU." in lines
    assert "Skipped" not in lines


def test_on_a_terminal_prose_is_wrapped_and_commands_never() -> None:
    lines = shown(force_terminal=True, width=80, color_system=None)
    assert f"           remedy: {REMEDY}" in lines
    prose = [line for line in lines if "/path" not in line and "envbuilder" not in line]
    assert max(map(len, prose)) <= 80
    assert any(line.startswith(" " * 21) for line in prose)
    narrow = shown(force_terminal=True, width=30, color_system=None)
    assert f"  failed   env.lock  {FINDINGS[2].summary}" in narrow


def test_colours_are_for_terminals_that_want_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert "\x1b[1;31mfailed" in "".join(shown(force_terminal=True))
    assert "\x1b[" not in "".join(shown())
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b[1;31m" not in "".join(shown(force_terminal=True))


def test_when_all_is_well_there_is_nothing_to_type() -> None:
    assert shown(FINDINGS[:1])[-1] == "1 ok"
    assert shown(())[-1] == "nothing was checked"


def test_verdicts_are_counted_worst_first() -> None:
    assert counts(FINDINGS) == {"failed": 1, "warning": 1, "ok": 1, "skipped": 3}
    assert counted(FINDINGS * 2) == "2 failed, 2 warnings, 2 ok, 6 skipped"


def test_the_list_has_every_check_with_its_needs_its_cost_and_what_it_looks_at() -> None:
    output = io.StringIO()
    print_checks(Console(file=output, soft_wrap=True), CHECKS)
    text = output.getvalue()
    for check in CHECKS:
        needs = f", needs {' and '.join(check.needs)}" if check.needs else ""
        assert f"  {check.id}  {check.cost}{needs}\n      {check.looks_at}\n" in text


def test_the_json_of_the_list_is_what_the_manual_says(run: Run) -> None:
    code, out, _ = run("--json", "doctor", "--list")
    data = json.loads(out)
    assert code == 0
    assert data["schema"] == 1
    assert [check["id"] for check in data["checks"]] == [check.id for check in CHECKS]
    assert set(data["checks"][0]) == {"id", "title", "looks_at", "needs", "cost"}


def test_the_json_of_the_findings_is_what_the_manual_says(run: Run, tmp_path: Path) -> None:
    code, out, _ = run("--json", "doctor", "--only", "storage.free-space")
    data = json.loads(out)
    assert {name: keys_of(value) for name, value in data.items()} == {
        "schema": 1,
        "envbuilder": __version__,
        "machine": {
            "hostname",
            "os",
            "kernel",
            "architecture",
            "python",
            "cpus",
            "cpu_limit",
            "memory_bytes",
            "memory_limit_bytes",
            "gpus",
            "slurm_job",
        },
        "subject": {"recipe", "root", "lock_sha256", "env"},
        "counts": {"failed", "warning", "ok", "skipped"},
        "findings": [{"check", "verdict", "summary", "evidence", "remedy"}],
    }
    assert data["subject"] == {
        "recipe": None,
        "root": str(tmp_path / ".envbuilder"),
        "lock_sha256": None,
        "env": None,
    }
    assert sum(data["counts"].values()) == len(data["findings"]) == 1
    assert code == (8 if data["counts"]["failed"] else 0)


def keys_of(value: object) -> object:
    if isinstance(value, dict):
        return set(value)
    return [set(entry) for entry in value] if isinstance(value, list) else value


def test_a_log_with_a_known_failure_ends_with_8_and_makes_a_report(
    run: Run, tmp_path: Path, broken_log: Path
) -> None:
    code, out, err = run("doctor", "--log", broken_log, "--report", "reports/log.html")
    assert code == 8, out + err
    assert "\nLog\n  failed   log." in out
    assert "reports/log.html: names and secrets are taken out of it" in out
    page = (tmp_path / "reports/log.html").read_text(encoding="utf-8")
    assert "CUDA out of memory." in page


def test_a_report_is_written_beside_the_json(run: Run, tmp_path: Path) -> None:
    _, out, _ = run("--json", "doctor", "--only", "storage.free-space", "--report", "report.html")
    assert json.loads(out)["findings"][0]["check"] == "storage.free-space"
    assert "storage.free-space" in (tmp_path / "report.html").read_text(encoding="utf-8")


def test_a_report_that_cant_be_written_is_a_typed_error(run: Run, broken_log: Path) -> None:
    code, out, _ = run("--json", "doctor", "--log", broken_log, "--report", broken_log / "report.html")
    assert (code, json.loads(out)["error"]) == (7, "MismatchError")


def test_the_manual_names_each_field_and_each_theme() -> None:
    manual = (Path(__file__).parents[2] / "docs/doctor.md").read_text(encoding="utf-8")
    for kind in (Facts, MachineFacts, GpuFacts, SubjectFacts, EnvFacts):
        assert [f.name for f in fields(kind) if f"`{f.name}`" not in manual] == []
    assert [name for name in Finding.model_fields if f"`{name}`" not in manual] == []
    themes = manual.partition("The themes are ")[2].partition(".")[0]
    assert set(re.findall(r"\w+", themes)) - {"and"} == {check.theme for check in CHECKS}

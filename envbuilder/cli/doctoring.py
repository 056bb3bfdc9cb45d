"""`doctor`: the checks, and the log of what failed."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from envbuilder import display
from envbuilder.cli.app import (
    Options,
    Overrides,
    app,
)
from envbuilder.cli.imaging import IMAGE_AT, again_in_image
from envbuilder.errors import DoctorError
from envbuilder.findings import counts
from envbuilder.model import Finding
from envbuilder.site import load_site

if TYPE_CHECKING:
    from envbuilder.doctor.check import Check
    from envbuilder.doctor.facts import Facts

SCHEMA = 1
"""Of what --json prints; another number where a field goes or means something else. New ones may come."""
_TOOLCHAIN = "toolchain.extension"
"""The check that --toolchain asks for."""


@app.command()
def doctor(
    context: typer.Context,
    recipe: Annotated[Optional[Path], typer.Argument(metavar="[RECIPE]")] = None,
    only: Annotated[
        Optional[list[str]],
        typer.Option(help="Run this check alone, or those of this theme (may be repeated)."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Leave out what needs the GPU, loads torch or hashes all files.")
    ] = False,
    toolchain: Annotated[
        bool, typer.Option("--toolchain", help="Compile and link a small extension too, before a long build.")
    ] = False,
    site: Annotated[
        Optional[str],
        typer.Option(
            "--site",
            envvar="ENVBUILDER_SITE",
            help="The site, by name (recipes/sites/NAME.toml) or file: check what it names too.",
        ),
    ] = None,
    config: Annotated[
        Optional[Path], typer.Option(help="A training config: check its model, data and memory too.")
    ] = None,
    overrides: Overrides = None,
    list_checks: Annotated[bool, typer.Option("--list", help="List the checks.")] = False,
    log: Annotated[
        Optional[str], typer.Option(help="Explain a failed build's or job's log (- for standard input).")
    ] = None,
    report: Annotated[
        Optional[Path], typer.Option(help="Write one HTML file for the help desk, without names and secrets.")
    ] = None,
    image_at: Annotated[Optional[Path], typer.Option(IMAGE_AT, hidden=True)] = None,
) -> None:
    """Say what is wrong, prove it, and give the command that mends it."""
    from envbuilder.doctor import CHECKS, Subject, choose_checks, explain_log, run_checks
    from envbuilder.doctor.facts import find_facts
    from envbuilder.doctor.page import write_report

    opts: Options = context.obj
    if list_checks:
        opts.result(_checks_data(CHECKS), lambda console: display.print_checks(console, CHECKS))
        return
    if recipe is not None and image_at is None and log is None:
        ended = again_in_image(opts, opts.session(recipe).recipe.name)
        if ended is not None:
            raise typer.Exit(ended)
    described = load_site(site) if site else None
    if recipe is not None:
        subject = opts.session(recipe).subject(
            site=described, config=config, overrides=tuple(overrides or ()), image_at=image_at
        )
    else:
        subject = Subject(None, opts.root, None, site=described, config=config)
    if log is not None:
        findings = explain_log(log)
    else:
        checks = choose_checks(only or (), quick=quick, asked=[_TOOLCHAIN] if toolchain else ())
        findings = run_checks(subject, opts.reporter, checks)
    facts = find_facts(subject) if report or opts.json else None
    if facts and report:
        write_report(report, findings, facts, subject)
        opts.reporter.note(
            f"{report}: names and secrets are taken out of it; look it over before you send it"
        )
    opts.result(
        _findings_data(findings, facts),
        lambda console: display.print_findings(console, findings, verbose=opts.verbose),
    )
    if failed_of(findings):
        raise typer.Exit(DoctorError.exit_code)


def failed_of(findings: tuple[Finding, ...]) -> list[Finding]:
    """Those of `findings` that failed."""
    return [finding for finding in findings if finding.verdict == "failed"]


def _findings_data(findings: tuple[Finding, ...], facts: Facts | None) -> dict[str, Any]:
    """As docs/doctor.md describes it."""
    return {
        "schema": SCHEMA,
        **(asdict(facts) if facts else {}),
        "counts": counts(findings),
        "findings": [finding.model_dump(mode="json") for finding in findings],
    }


def _checks_data(checks: tuple[Check, ...]) -> dict[str, Any]:
    """As docs/doctor.md describes it."""
    return {
        "schema": SCHEMA,
        "checks": [
            {"id": c.id, "title": c.title, "looks_at": c.looks_at, "needs": c.needs, "cost": c.cost}
            for c in checks
        ],
    }

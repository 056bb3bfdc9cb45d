"""`report`: a run as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from envbuilder.cli.app import Options, app


@app.command()
def report(
    context: typer.Context,
    run: Annotated[str, typer.Argument(metavar="RUN", help="The run's name, or its folder.")],
    out: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="The page (default: report.html in the run's folder)."),
    ] = None,
) -> None:
    """Write a run's curves, its jobs and where its time went as one HTML page."""
    from envbuilder.run_report import read_run, write_report

    opts: Options = context.obj
    folder = Path(run) if "/" in run else opts.root.run(run)
    page = out or folder / "report.html"
    history = read_run(folder)
    write_report(page, history)
    opts.lines(
        {"report": page, "steps": history.done, "jobs": len(history.jobs)},
        f"{page}: {history.done} steps in {len(history.jobs)} job{'s' if len(history.jobs) != 1 else ''}",
    )

"""`probe`: the compute node described, for a lock that the login node makes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from envbuilder.atomic import write_atomically
from envbuilder.cli.app import Options, SiteName, app
from envbuilder.errors import UsageError
from envbuilder.machine import machine_text


@app.command()
def probe(
    context: typer.Context,
    python: Annotated[
        Optional[Path],
        typer.Option(help="Interpreter to describe (default: the recipe's provider's, else this one)."),
    ] = None,
    provided: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME", help="A package that the machine provides (may be repeated)."),
    ] = None,
    recipe: Annotated[
        Optional[Path], typer.Option(metavar="RECIPE", help="A recipe whose provided packages to look for.")
    ] = None,
    output: Annotated[Path, typer.Option(help="The record to write.")] = Path("target.json"),
    sbatch: Annotated[bool, typer.Option("--sbatch", help="Submit this command as a Slurm job.")] = False,
    site: SiteName = None,
) -> None:
    """Describe this machine in target.json, for envbuilder lock --target (compute node)."""
    opts: Options = context.obj
    if sbatch != (site is not None):
        raise UsageError(
            "--sbatch goes with --site, and only with it.",
            remedy="envbuilder probe --sbatch --site generic",
        )
    if site is not None:
        flags = ["--python", str(python)] if python else []
        flags += ["--recipe", str(recipe.absolute())] if recipe else []
        flags += [word for name in provided or () for word in ("--provided", name)]
        from envbuilder.slurm.submit import submit_probe

        job = submit_probe(site, output, opts.root, flags)
        opts.submitted(job)
        return
    wanted, names = python or Path(sys.executable), list(provided or ())
    if recipe is not None:
        session = opts.session(recipe)
        wanted = session.interpreter(python)
        names += sorted(session.recipe.provided_names)
    from envbuilder.probe import probe_machine

    record = probe_machine(wanted, names)
    write_atomically(output, machine_text(record))
    opts.lines(
        {"target": output, **record.model_dump(mode="json")},
        f"{output}: {record.interpreter.implementation} {record.interpreter.version}, {record.machine}, "
        f"glibc {record.glibc}, {len(record.gpus)} GPUs",
    )

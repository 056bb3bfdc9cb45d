"""`compile` and `install`: the compute node's half."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from envbuilder import summary
from envbuilder.cli.app import (
    After,
    DryRun,
    Options,
    PrintScript,
    PythonExe,
    RecipePath,
    Requeue,
    ScriptTemplate,
    SiteName,
    Wait,
    WaitForQos,
    app,
    own_job,
)
from envbuilder.errors import StoppedError, UsageError
from envbuilder.progress_file import job_progress
from envbuilder.session import Session


@app.command("compile")
def compile_(
    context: typer.Context,
    recipe: RecipePath,
    local: Annotated[
        bool, typer.Option("--local", help="Compile here (the default without --sbatch).")
    ] = False,
    sbatch: Annotated[bool, typer.Option("--sbatch", help="Submit this command as a Slurm job.")] = False,
    site: SiteName = None,
    python: PythonExe = None,
    require_isolation: Annotated[
        bool,
        typer.Option("--require-isolation", help="Fail where a build can't be cut off from the network."),
    ] = False,
    rebuild: Annotated[
        bool, typer.Option("--rebuild", help="Build again what is in the wheelhouse.")
    ] = False,
    prove: Annotated[
        bool,
        typer.Option("--prove", help="Compile sharded units whole too, and compare their machine code."),
    ] = False,
    wait: Wait = True,
    requeue: Requeue = None,
    after: After = None,
    wait_for_qos: WaitForQos = False,
    print_script: PrintScript = False,
    dry_run: DryRun = False,
    template: ScriptTemplate = None,
    requeue_job: Annotated[bool, typer.Option("--requeue-job", hidden=True)] = False,
) -> None:
    """Build the source packages into the wheelhouse, without internet, and install the env (compute node)."""
    opts: Options = context.obj
    if local and sbatch:
        raise UsageError(
            "--local and --sbatch exclude one another.",
            remedy=f"On a login node: envbuilder compile {recipe} --sbatch --site generic",
        )
    if sbatch != (site is not None):
        raise UsageError(
            "--sbatch goes with --site, and only with it.",
            remedy=f"envbuilder compile {recipe} --sbatch --site generic",
        )
    for_a_job = requeue is not None or after or wait_for_qos or print_script or dry_run or template
    if site is None and for_a_job:
        raise UsageError(
            "--requeue, --after, --wait-for-qos, --print-script, --dry-run and --template are for a job: "
            "they go with --sbatch.",
            remedy=f"envbuilder compile {recipe} --sbatch --site generic",
        )
    session = opts.session(recipe)
    if site is not None:
        flags = ["--python", str(python)] if python else []
        flags += ["--require-isolation"] if require_isolation else []
        flags += ["--rebuild"] if rebuild else []
        flags += ["--prove"] if prove else []
        from envbuilder.cli.submitting import Instead, compile_in_a_job

        compile_in_a_job(
            opts,
            session,
            recipe,
            site,
            flags,
            requeue=requeue,
            after=after,
            wait_for_qos=wait_for_qos,
            template=template,
            wait=wait,
            instead=Instead(print_script, dry_run),
        )
        return
    own_job.begin(opts.root)
    try:
        _compile_here(
            opts, session, python, require_isolation=require_isolation, rebuild=rebuild, prove=prove
        )
    except StoppedError:
        if requeue_job:
            from envbuilder.slurm.requeue import requeue_this_job

            requeue_this_job(opts.root, opts.reporter)
        raise


def _compile_here(
    opts: Options,
    session: Session,
    python: Path | None,
    *,
    require_isolation: bool,
    rebuild: bool,
    prove: bool,
) -> None:
    built = session.compile(python, require_isolation=require_isolation, rebuild=rebuild, prove=prove)
    env = session.install(python)
    if file := job_progress(opts.root):
        file.finish()
    opts.lines(
        {
            "wheels": [wheel.model_dump(mode="json") for wheel in built.wheels],
            "reused": built.reused,
            "seconds": built.seconds,
            "timeline": built.timeline,
            "env": env.path,
        },
        summary.compiled(built),
        *([f"timeline: {built.timeline}"] if built.timeline else []),
        f"{env.path}: {summary.installed(env)}",
    )


@app.command()
def install(
    context: typer.Context,
    recipe: RecipePath,
    python: PythonExe = None,
    reinstall: Annotated[
        bool, typer.Option("--reinstall", help="Make the env anew, whatever is there.")
    ] = False,
    image: Annotated[bool, typer.Option("--image", help="Make it as one squashfs file.")] = False,
) -> None:
    """Make the env from bundle and wheelhouse alone."""
    opts: Options = context.obj
    if image:
        from envbuilder.cli.imaging import install_image

        install_image(opts, recipe, python, reinstall=reinstall)
        return
    report = opts.session(recipe).install(python, reinstall=reinstall)
    opts.lines(
        {"env": report.path, "packages": len(report.receipt.packages), "seconds": report.seconds},
        f"{report.path}: {summary.installed(report)}",
    )

"""`lock` and `fetch`: what a bundle is for, and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from envbuilder import summary
from envbuilder.cli.app import LockFolder, Options, RecipePath, app
from envbuilder.errors import UsageError
from envbuilder.lock import SourceLock, read_lock
from envbuilder.lock_diff import describe, diff_locks
from envbuilder.session import Session


@app.command()
def lock(
    context: typer.Context,
    recipe: RecipePath,
    check: Annotated[bool, typer.Option("--check", help="Only check that the lock is current.")] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", "-U", help="Choose all versions afresh (--upgrade=PKG: one).")
    ] = False,
    upgrade_package: Annotated[
        list[str] | None,
        typer.Option("--upgrade-package", "-P", metavar="PKG", help="Free this one (may be repeated)."),
    ] = None,
    diff: Annotated[
        Path | None, typer.Option(metavar="OLD", help="Only say what differs from the lock file OLD.")
    ] = None,
    target: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Lock for the machine of this target.json, which `probe` wrote."),
    ] = None,
    resolver: Annotated[str, typer.Option(help="uv or pip-tools.")] = "uv",
    lockfiles: LockFolder = None,
) -> None:
    """Resolve a recipe into its source lock: every byte, hashed (login node)."""
    opts: Options = context.obj
    session = opts.session(recipe, lockfiles)
    names = frozenset(upgrade_package or ())
    if (check or diff) and (upgrade or names or target):
        raise UsageError(
            "--check and --diff only look: they go with no --upgrade and no --target.",
            remedy=f"envbuilder lock {recipe}",
        )
    if diff is not None:
        changes = describe(diff_locks(read_lock(diff), session.current_lock()))
        facts = {"old": diff, "new": session.lock_path, "changes": changes}
        opts.lines(facts, *(changes or ["no difference"]))
        return
    if check:
        _say(opts, session, session.current_lock(), [])
        return
    before = session.older_lock()
    made = session.make_lock(resolver, kept=None if upgrade else before, upgrade=names, target=target)
    _say(opts, session, made, describe(diff_locks(before, made)) if before else [])


def _say(opts: Options, session: Session, made: SourceLock, changes: list[str]) -> None:
    packages, models = len(made.pylock.packages), len(made.models)
    counted = f"{packages} packages" + (f", {models} models" if models else "")
    opts.lines(
        {
            "lock": session.lock_path,
            "sha256": made.digest,
            "packages": packages,
            "models": models,
            "changes": changes,
        },
        f"{session.lock_path}: {counted}",
        *(f"  {change}" for change in changes),
    )


@app.command()
def fetch(
    context: typer.Context,
    recipe: RecipePath,
    python: Annotated[
        str | None,
        typer.Option(
            help='Python version of the compute node, e.g. "3.12" (default: the only one that the lock '
            "serves, else this one's)."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file that is there, and mend.")
    ] = False,
    lockfiles: LockFolder = None,
) -> None:
    """Bring every file of the lock into a bundle, each checked against its hash (login node)."""
    opts: Options = context.obj
    report = opts.session(recipe, lockfiles).fetch(python, verify=verify)
    opts.lines(
        {
            "bundle": report.bundle.path,
            "files": report.files,
            "bytes": report.bytes,
            "transferred_files": report.transferred_files,
            "transferred_bytes": report.transferred_bytes,
            "seconds": report.seconds,
        },
        f"{report.bundle.path}: {summary.fetched(report)}",
    )

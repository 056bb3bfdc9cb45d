"""`lock` and `fetch`: what a bundle is for, and what is in it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from envbuilder import summary
from envbuilder.cli.app import LockFolder, Options, RecipePath, app
from envbuilder.cli.login import LoginSite, cpu_seconds, on_login_node
from envbuilder.display import human_bytes
from envbuilder.errors import UsageError
from envbuilder.lock import SourceLock, read_lock
from envbuilder.lock_diff import describe, diff_locks
from envbuilder.session import Session

if TYPE_CHECKING:
    from envbuilder.fetch.export import Export


@app.command()
def lock(
    context: typer.Context,
    recipe: RecipePath,
    check: Annotated[bool, typer.Option("--check", help="Only check that the lock is current.")] = False,
    upgrade: Annotated[
        bool, typer.Option("--upgrade", "-U", help="Choose all versions afresh (--upgrade=PKG: one).")
    ] = False,
    upgrade_package: Annotated[
        Optional[list[str]],
        typer.Option("--upgrade-package", "-P", metavar="PKG", help="Free this one (may be repeated)."),
    ] = None,
    diff: Annotated[
        Optional[Path], typer.Option(metavar="OLD", help="Only say what differs from the lock file OLD.")
    ] = None,
    target: Annotated[
        Optional[Path],
        typer.Option(metavar="FILE", help="Lock for the machine of this target.json, which `probe` wrote."),
    ] = None,
    resolver: Annotated[str, typer.Option(help="uv or pip-tools.")] = "uv",
    lockfiles: LockFolder = None,
    site: LoginSite = None,
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
    with on_login_node(site, kept="It asks again for nothing that uv has in its cache."):
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
            "cpu_seconds": cpu_seconds(),
        },
        f"{session.lock_path}: {counted}; {cpu_seconds()} CPU seconds",
        *(f"  {change}" for change in changes),
    )


@app.command()
def fetch(
    context: typer.Context,
    recipe: RecipePath,
    python: Annotated[
        Optional[str],
        typer.Option(
            help='Python version of the compute node, e.g. "3.12" (default: the only one that the lock '
            "serves, else this one's)."
        ),
    ] = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Hash every file that is there, and mend.")
    ] = False,
    export_urls: Annotated[
        Optional[str],
        typer.Option(metavar="TOOL", help="Only list what is missing, for wget, curl or aria2 to bring."),
    ] = None,
    out: Annotated[Optional[Path], typer.Option(help="The list's file (default: NAME.TOOL here).")] = None,
    adopt: Annotated[
        Optional[Path],
        typer.Option(metavar="DIR", help="Take what was brought to DIR, and ask no network."),
    ] = None,
    lockfiles: LockFolder = None,
    site: LoginSite = None,
) -> None:
    """Bring every file of the lock into a bundle, each checked against its hash (login node)."""
    opts: Options = context.obj
    if (export_urls and adopt) or (out and not export_urls):
        raise UsageError(
            "--export-urls and --adopt exclude one another, and --out goes with --export-urls.",
            remedy=f"envbuilder fetch {recipe} --export-urls wget --out FILE",
        )
    session = opts.session(recipe, lockfiles)
    with on_login_node(site, kept="What was transferred and hashed is kept."):
        if export_urls:
            export = session.export_urls(python, export_urls, out, verify=verify)
            again = f"envbuilder fetch {recipe}" + (f" --python {python}" if python else "")
            _say_export(opts, again, export_urls, export)
            return
        if adopt:
            report = session.adopt(python, adopt, verify=verify)
        else:
            report = session.fetch(python, verify=verify)
    opts.lines(
        {
            "bundle": report.bundle.path,
            "files": report.files,
            "bytes": report.bytes,
            "transferred_files": report.transferred_files,
            "transferred_bytes": report.transferred_bytes,
            "seconds": report.seconds,
            "cpu_seconds": cpu_seconds(),
            "provided_models": report.bundle.record.provided_models,
        },
        f"{report.bundle.path}: {summary.fetched(report)}, {cpu_seconds()} CPU seconds",
        *(
            f"  the model {name} is as locked where the machine has it: {folder}"
            for name, folder in report.bundle.record.provided_models.items()
        ),
    )


def _say_export(opts: Options, fetch: str, tool: str, export: Export) -> None:
    """`fetch` is the command that fetches the same bundle."""
    from envbuilder.fetch.export import FORMATS

    size = sum(item.size for item in export.items)
    brought = Path("brought")
    lines = []
    if export.file:
        file = export.file.absolute()
        lines += [
            f"{export.file}: {len(export.items)} files, {human_bytes(size)}",
            "Where the network is, as often as needed:",
            f"  {FORMATS[tool].command_for(file, brought)}",
            "Then:",
            f"  {fetch} --adopt {brought}",
        ]
    lines += [
        f"The credentials for {host} are left out: on the machine that runs {tool}, write into ~/.netrc "
        f"(chmod 600): machine {host} login USER password PASSWORD"
        for host in export.hosts_with_credentials
    ]
    lines += [f"{path} is on this machine already: {fetch} --adopt {path.parent}" for path in export.local]
    if export.git:
        lines.append(
            f"No URL leads to {', '.join(export.git)}: git is needed. When all else is adopted, where git "
            f"reaches its server: {fetch}"
        )
    opts.lines(
        {
            "file": export.file,
            "files": len(export.items),
            "bytes": size,
            "git": export.git,
            "local": export.local,
            "credentials_left_out": export.hosts_with_credentials,
            "cpu_seconds": cpu_seconds(),
        },
        *(lines or [f"Nothing is to be brought: {fetch}"]),
    )

"""`bundle …`: a bundle as a thing to carry, to check and to account for; all of it works offline."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from envbuilder import bundles
from envbuilder.atomic import write_atomically
from envbuilder.bundle import open_bundle
from envbuilder.cli.app import Commands, Options, app
from envbuilder.cli.login import LoginSite, cpu_seconds, on_login_node
from envbuilder.display import human_bytes
from envbuilder.errors import UsageError
from envbuilder.model import Bundle
from envbuilder.paths import Root
from envbuilder.provided_models import absent, models_of_bundle, name_place

commands = Commands(no_args_is_help=True, help="Carry, check and account for a bundle, offline.")
app.add_typer(commands, name="bundle")

BundleName = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A bundle's name, which is its recipe's, or its folder.")
]


@commands.command()
def verify(context: typer.Context, bundle: BundleName, site: LoginSite = None) -> None:
    """Read every byte, and list all that is changed, missing or strange (exit 5)."""
    opts: Options = context.obj
    with on_login_node(site, kept="What was hashed is recorded, and not read again for a day."):
        report = bundles.verify_bundle(*_place(opts, bundle), opts.reporter)
    earlier = f" ({report.recorded} of them hashed before it was cut off)" if report.recorded else ""
    opts.lines(
        {
            "bundle": report.bundle,
            "files": report.files,
            "bytes": report.bytes,
            "recorded": report.recorded,
            "leftovers": report.leftovers,
            "seconds": report.seconds,
            "cpu_seconds": cpu_seconds(),
        },
        f"{report.bundle}: {report.files} files{earlier}, {human_bytes(report.bytes)}, all as locked; "
        f"in {report.seconds:.1f} s, {cpu_seconds()} CPU seconds",
    )


@commands.command()
def pack(
    context: typer.Context,
    bundle: BundleName,
    output: Annotated[Path, typer.Option("--output", "-o", help="The file, or the folder for NAME.tar.")] = (
        Path()
    ),
    site: LoginSite = None,
) -> None:
    """Pack a bundle into one file that unpacks with nothing but Python on the other side."""
    opts: Options = context.obj
    packed = _open(opts, bundle)
    with on_login_node(site, kept="It begins anew: nothing is left of the archive."):
        report = bundles.pack_bundle(packed, output, opts.reporter)
    opts.lines(
        {
            "archive": report.archive,
            "files": report.files,
            "bytes": report.bytes,
            "manifest_sha256": report.manifest_sha256,
            "seconds": report.seconds,
            "cpu_seconds": cpu_seconds(),
            "not_packed": packed.record.provided_models,
        },
        f"{report.archive}: {report.files} files, {human_bytes(report.bytes)}, in {report.seconds:.1f} s, "
        f"{cpu_seconds()} CPU seconds",
        "On the other side, with Python alone:",
        f"  tar -xOf {report.archive.name} unpack.py | python3 - {report.archive.name} ROOT "
        f"{report.manifest_sha256}",
        *(
            f"The model {name} is not in it: the machine has it, at {folder}."
            for name, folder in packed.record.provided_models.items()
        ),
    )


@commands.command()
def unpack(
    context: typer.Context,
    archive: Annotated[Path, typer.Argument(metavar="FILE", help="What `bundle pack` wrote.")],
    manifest_sha256: Annotated[
        Optional[str], typer.Option(help="The hash that `bundle pack` printed: a tampered file is refused.")
    ] = None,
) -> None:
    """Unpack a packed bundle into ROOT, every byte checked first."""
    opts: Options = context.obj
    report = bundles.unpack_bundle(opts.root, archive, opts.reporter, manifest_sha256=manifest_sha256)
    for provided in models_of_bundle(open_bundle(opts.root, report.bundle.name)):
        if not provided.folder.is_dir():
            opts.reporter.warn(f"{absent(provided)} {name_place(report.bundle.name, provided)}")
    opts.lines(
        {
            "bundle": report.bundle,
            "files": report.files,
            "bytes": report.bytes,
            "manifest_sha256": report.manifest_sha256,
            "seconds": report.seconds,
        },
        f"{report.bundle}: {report.files} files, {human_bytes(report.bytes)}, in {report.seconds:.1f} s",
    )


@commands.command()
def sbom(
    context: typer.Context,
    bundle: BundleName,
    output: Annotated[
        Optional[Path], typer.Option("--output", "-o", help="The file to write (default: print).")
    ] = None,
) -> None:
    """Write the bill of materials: packages, models, patches, licenses (CycloneDX JSON)."""
    from envbuilder.bundles.sbom import bill_of_materials  # a large library, for this command alone

    opts: Options = context.obj
    text = bill_of_materials(_open(opts, bundle))
    if output is None:
        print(text, end="")
    else:
        write_atomically(output, text)
        opts.lines({"sbom": output}, str(output))


@commands.command()
def diff(context: typer.Context, old: BundleName, new: BundleName) -> None:
    """Say in words what differs between two bundles."""
    opts: Options = context.obj
    changes = bundles.diff_bundles(_open(opts, old), _open(opts, new))
    opts.lines({"changes": changes}, *(changes or ["no difference"]))


@commands.command()
def gc(
    context: typer.Context,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
) -> None:
    """Remove from ROOT what no bundle needs, and superseded images, if nobody used them for an hour."""
    opts: Options = context.obj
    report = bundles.collect_garbage(opts.root, opts.reporter, dry_run=dry_run)
    done = "would be removed" if dry_run else "removed"
    opts.lines(
        {
            "removed": report.removed,
            "bytes_freed": report.bytes_freed,
            "images": report.images,
            "kept": report.kept,
            "dry_run": dry_run,
        },
        f"{len(report.removed)} {done}, {human_bytes(report.bytes_freed)} freed",
        *(f"  {done}: {path}, {human_bytes(size)}" for path, size in report.images),
        *(f"  left: {path}: {why}" for path, why in report.kept),
    )


def _place(opts: Options, bundle: str) -> tuple[Root, str]:
    """ROOT and name of a bundle that is given by its name, or by its folder ROOT/bundles/NAME."""
    if "/" not in bundle:
        return opts.root, bundle
    folder = Path(bundle).absolute()
    if folder.parent.name != "bundles":
        raise UsageError(
            f"{folder} is no folder of a bundle, which is ROOT/bundles/NAME.",
            remedy="Give the bundle's name, with --root ROOT before the command.",
        )
    return Root(folder.parent.parent), folder.name


def _open(opts: Options, bundle: str) -> Bundle:
    return open_bundle(*_place(opts, bundle))

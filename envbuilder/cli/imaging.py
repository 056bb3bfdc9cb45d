"""`install --image`, `image` and `exec`: envs as one file, and programs in an env however it is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

from envbuilder.atomic import write_atomically
from envbuilder.cli.app import Options, PythonExe, RecipePath, app
from envbuilder.display import human_bytes
from envbuilder.env_image import check_image, env_receipt, find_image, has_env_folder, usable_env, way_here
from envbuilder.errors import MismatchError, UsageError
from envbuilder.modules import load_again
from envbuilder.own_program import own_command

IMAGE_AT = "--image-at"
"""The hidden option of a command that looks into the env's folder: where its image is to be seen."""


def install_image(opts: Options, recipe: Path, python: PythonExe, *, reinstall: bool) -> None:
    """Makes the env as an image, and prints what it is."""
    report = opts.session(recipe).install_image(python, reinstall=reinstall)
    path, receipt = report.image.path, report.image.receipt
    warn_of_folder(opts, report.image.name)
    lines = [
        f"{path}: {len(receipt.env.packages)} packages, {human_bytes(receipt.size)} in place of "
        f"{receipt.plain_files:,} files and {human_bytes(receipt.plain_bytes)}, "
        f"in {report.seconds:.1f} s",
        f"sha256: {receipt.sha256}",
    ]
    if not report.made:
        lines = [f"{path} is already what the lock and the wheelhouse say; to make it anew: --reinstall"]
    opts.lines(
        {
            "image": path,
            **receipt.model_dump(mode="json"),
            "made": report.made,
            "seconds": report.seconds,
        },
        *lines,
    )


def warn_of_folder(opts: Options, name: str) -> None:
    """Warns where the image of the env `name` will not be used, for the env is there as a folder too."""
    if has_env_folder(opts.root, name):
        opts.reporter.warn(
            f"{opts.root.env(name)} is there too, and goes before the image: remove it to use the image"
        )


@app.command()
def image(
    context: typer.Context,
    recipe: RecipePath,
    apptainer: Annotated[
        bool, typer.Option("--apptainer", help="Write a definition file for Apptainer or Singularity.")
    ] = False,
    base: Annotated[
        Optional[str],
        typer.Option(metavar="IMAGE", help="With --apptainer: what the container is made from."),
    ] = None,
    out: Annotated[
        Optional[Path], typer.Option(help="With --apptainer: the file (default: NAME.def).")
    ] = None,
) -> None:
    """Check the env's image and say how this node would use it; or write a definition file for a SIF."""
    opts: Options = context.obj
    if apptainer != (base is not None) or (out is not None and not apptainer):
        raise UsageError(
            "--apptainer goes with --base, and --out goes with both.",
            remedy=f"envbuilder image {recipe} --apptainer --base BASE.sif",
        )
    session = opts.session(recipe)
    name = session.recipe.name
    if base is not None:
        path = out or Path(f"{name}.def")
        write_atomically(path, session.definition(base))
        opts.lines(
            {"definition": path},
            f"{path}; then, where Apptainer is: apptainer build {path.with_suffix('.sif')} {path}",
        )
        return
    found = find_image(opts.root, name)
    if found is None:
        raise MismatchError(
            f"There is no image of the env {name}.",
            remedy=f"envbuilder install recipes/{name}.toml --image",
            context={"missing": opts.root.image_receipt(name)},
        )
    check_image(found)
    way = way_here(found)
    opts.lines(
        {"image": found.path, **found.receipt.model_dump(mode="json"), "here": way},
        f"{found.path}: as it was installed, sha256 {found.receipt.sha256}",
        f"on this node: {way}",
    )


@app.command("exec", context_settings={"allow_interspersed_args": False})
def exec_(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Name of the recipe whose env to use.")],
    command: Annotated[list[str], typer.Argument(metavar="COMMAND…", help="What to run, after --.")],
) -> None:
    """Run a program in the env, be it a folder or an image: envbuilder exec NAME -- python -V."""
    opts: Options = context.obj
    receipt, kept_as = env_receipt(opts.root, name)
    with usable_env(opts.root, name, kept_as, opts.reporter) as used:
        folders = [str(used.folder / "bin"), os.environ.get("PATH", os.defpath)]
        variables = {
            **load_again(os.environ, receipt.modules, keep_cuda_libraries=receipt.provided is not None),
            "VIRTUAL_ENV": str(used.folder),
            "PATH": os.pathsep.join(folders),
        }
        # env finds the program on the new PATH, which a launcher's own search would not.
        raise typer.Exit(_ended((*used.launcher, "env", *command), variables))


def again_in_image(opts: Options, name: str) -> int | None:
    """Runs this command again where the image of the env `name` is to be seen, told by IMAGE_AT.

    Returns what it ended with; None where the env is there as a folder, or not at all.
    """
    found = None if has_env_folder(opts.root, name) else find_image(opts.root, name)
    if found is None:
        return None
    with usable_env(opts.root, name, found, opts.reporter) as used:
        words = own_command(*sys.argv[1:], IMAGE_AT, str(used.folder))
        return _ended((*used.launcher, *words), dict(os.environ))


def _ended(command: tuple[str, ...], variables: dict[str, str]) -> int:
    """Runs `command` with this one's terminal; its exit code as a shell would tell it."""
    # Ctrl-C is for the program; this one has to clean up after it.
    before = signal.signal(signal.SIGINT, lambda number, frame: None)
    try:
        code = subprocess.run(command, env=variables, check=False).returncode
    finally:
        signal.signal(signal.SIGINT, before)
    return code if code >= 0 else 128 - code

"""`publish` and `use`: an env that one member of a group has made, for all others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from envbuilder import sharing, summary
from envbuilder.cli.app import Options, PythonExe, app
from envbuilder.cli.imaging import warn_of_folder
from envbuilder.display import human_bytes
from envbuilder.errors import InputError, UsageError
from envbuilder.install import install_env
from envbuilder.lock import MODELS
from envbuilder.model import Publication
from envbuilder.recipe import load_recipe
from envbuilder.site import load_site

Site = Annotated[
    Optional[str],
    typer.Option("--site", help="The site (recipes/sites/NAME.toml) whose shared-folder it is."),
]


@app.command()
def publish(
    context: typer.Context,
    recipe: Annotated[
        str, typer.Argument(metavar="RECIPE", help="The recipe or its name; its env must be installed.")
    ],
    site: Site = None,
    to: Annotated[Optional[Path], typer.Option("--to", metavar="FOLDER", help="The shared folder.")] = None,
    name: Annotated[
        Optional[str], typer.Option("--as", metavar="NAME", help="Publish it under this name.")
    ] = None,
    prune: Annotated[
        bool, typer.Option("--prune", help="Remove older versions, which others may be using.")
    ] = False,
) -> None:
    """Put an env into the group's shared folder: bundle, built wheels, kernels, image."""
    opts: Options = context.obj
    path = Path(recipe)
    recipe_name = load_recipe(path).name if path.suffix == ".toml" else recipe
    shared = _shared_folder(site, to, option="--to", command=f"envbuilder publish {recipe}")
    report = sharing.publish(opts.root, recipe_name, shared, opts.reporter, name=name, prune=prune)
    published = report.publication
    option = f"--site {site}" if site else f"--from {shared.path}"
    opts.lines(
        {
            **_facts(published),
            "folder": report.folder,
            "copied_bytes": report.copied_bytes,
            "removed": report.removed,
            "seconds": report.seconds,
        },
        f"{report.folder}: {len(published.files)} files, {human_bytes(published.bytes)}, of which "
        f"{human_bytes(report.copied_bytes)} copied, in {report.seconds:.1f} s",
        *(f"removed: {folder}" for folder in report.removed),
        f"For the members of {shared.group}: envbuilder use {published.name} {option}",
    )


@app.command()
def use(
    context: typer.Context,
    name: Annotated[
        Optional[str], typer.Argument(metavar="[NAME]", help="What to use (default: list what there is).")
    ] = None,
    site: Site = None,
    source: Annotated[
        Optional[Path], typer.Option("--from", metavar="FOLDER", help="The shared folder.")
    ] = None,
    python: PythonExe = None,
) -> None:
    """Install an env that the group has published: every byte is checked, none is downloaded or compiled."""
    opts: Options = context.obj
    shared = _shared_folder(site, source, option="--from", command=f"envbuilder use {name or 'NAME'}")
    if name is None:
        _list(opts, shared)
        return
    used = sharing.use_published(shared, name, root=opts.root, python=python, reporter=opts.reporter)
    env, seconds, what = _env_of(opts, used)
    bundle, provided = used.bundle, used.bundle.record.provided_models
    models = [
        provided.get(model.name, str(bundle.path / MODELS / model.name)) for model in bundle.lock.models
    ]
    train = f"envbuilder train CONFIG --recipe {used.recipe.name}"
    opts.lines(
        {
            **_facts(used.publication),
            "bundle": bundle.path,
            "env": env,
            "models": models,
            "seconds": used.seconds + seconds,
            "next": train,
        },
        f"{name}: {used.files} files, {human_bytes(used.bytes)}, all as published by "
        f"{used.publication.publisher}; {used.seconds:.1f} s",
        f"{env}: {what}",
        *(f"model: {model}" for model in models),
        f"Next: {train}",
    )


def _env_of(opts: Options, used: sharing.UseReport) -> tuple[Path, float, str]:
    """The env that is used, installed where it is no image; the seconds that took, and what it is."""
    if used.image is not None:
        warn_of_folder(opts, used.recipe.name)
        return used.image.path, 0.0, "the env, as one file that stays where it is published"
    made = install_env(used.recipe, used.bundle, root=opts.root, python=used.python, reporter=opts.reporter)
    return made.path, made.seconds, summary.installed(made)


def _list(opts: Options, shared: sharing.SharedFolder) -> None:
    listed = sharing.list_published(shared)
    opts.lines(
        {
            "folder": shared.path,
            "published": [
                {"name": entry.name, "problem": entry.problem, **_facts(entry.publication)}
                if entry.publication
                else {"name": entry.name, "problem": entry.problem}
                for entry in listed
            ],
        },
        *(map(_line, listed) if listed else [f"Nothing is published in {shared.path}."]),
    )


def _line(entry: sharing.Listed) -> str:
    published = entry.publication
    if published is None:
        return f"{entry.name}: {entry.problem}"
    gpus = ", ".join(published.compute_capabilities) or "none"
    return (
        f"{entry.name}: recipe {published.recipe}, Python {published.python}, compute capabilities {gpus}, "
        f"{human_bytes(published.bytes)}, by {published.publisher}, {published.published_at[:16]} UTC"
    )


def _facts(published: Publication) -> dict[str, Any]:
    return {**published.model_dump(mode="json", exclude={"files"}), "bytes": published.bytes}


def _shared_folder(
    site: Optional[str], folder: Optional[Path], *, option: str, command: str
) -> sharing.SharedFolder:
    if (site is None) == (folder is None):
        raise UsageError(
            f"Either --site or {option} says which folder is shared.", remedy=f"{command} {option} FOLDER"
        )
    if folder is not None:
        return sharing.open_shared_folder(folder)
    assert site is not None
    described = load_site(site)
    if described.shared_folder is None:
        raise InputError(
            f"The site {described.name} names no shared-folder.",
            remedy=f'Write into its file: shared-folder = "/path"; or: {command} {option} FOLDER',
            context={"site": site},
        )
    return sharing.open_shared_folder(Path(described.shared_folder), described.shared_group)

"""Takes what was published into use: nothing is compiled or downloaded.

Every byte is hashed first. Then ROOT gets the built wheels and kernels as copies, which are small, and the
bundle as a link to the published one: other users' files can't be hard-linked (fs.protected_hardlinks), and a
bundle may hold a model of many gigabytes. `install` makes the env of them, and hashes each wheel again as it
unpacks it. An env that is published as an image is a link as well, and there is nothing to install.
"""

from __future__ import annotations

import secrets
import stat
import sys
import time
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from envbuilder.architectures import runs_on
from envbuilder.atomic import NEW_SUFFIX, make_folder, writing
from envbuilder.bundle import RECIPE, copy_verified, open_bundle
from envbuilder.bundle_contents import BundleFile, Problem, differing, provided_inventory
from envbuilder.env_image import EnvImage
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.gpu import present_capabilities
from envbuilder.interpreter import check_interpreter, find_interpreter, inspect_interpreter
from envbuilder.model import Bundle, ImageReceipt, Publication, read_record
from envbuilder.paths import Root
from envbuilder.provided_models import check_place, models_of_bundle
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.report import Reporter
from envbuilder.sharing.shared_folder import MANIFEST, PublishedVersion, SharedFolder
from envbuilder.wheelhouse import RECEIPT, read_built


@dataclass(frozen=True)
class UseReport:
    """What is in ROOT now, ready for `install_env`."""

    publication: Publication
    recipe: Recipe
    """For the GPUs that the publisher compiled for."""
    bundle: Bundle
    """The published one, by its name in ROOT."""
    python: Path
    """The interpreter for the env."""
    image: EnvImage | None
    """The published one, by its name in ROOT, where that is the env; None where it is to be installed."""
    files: int
    bytes: int
    """Read and hashed."""
    seconds: float
    """Wall time."""


def use_published(
    shared: SharedFolder, name: str, *, root: Root, python: Path | None, reporter: Reporter
) -> UseReport:
    """Checks all of what is published as `name`, and puts it into `root`.

    Without `python`: the image, where one is published, with its own interpreter; else an env is to be
    installed for the recipe's provider, else this interpreter, else one of the right version on the PATH.

    Raises UsageError (nothing is published so), IntegrityError (a byte is not as published), MismatchError
    (another Python, glibc or GPU; a bundle of ROOT's own is there; people outside the group could have
    written it; no room). Then nothing can be installed from it: the bundle's link is made last.
    """
    began = time.monotonic()
    version = shared.current(name)
    publication, published = version.publication, Root(version.folder)
    own = root.bundle(publication.recipe)
    _check_not_own(own)
    paths = _check_listed(shared, version)
    bundle = open_bundle(published, publication.recipe)
    recipe = load_recipe(bundle.path / RECIPE)
    image = None if python else _published_image(shared, version, paths)
    wanted = Path(image.receipt.interpreter) if image else python
    found = _interpreter(wanted, recipe, bundle)
    check_interpreter(inspect_interpreter(found), bundle.lock.target, bundle.record)
    _check_gpus(publication, recipe)
    for model in models_of_bundle(bundle):
        check_place(model, recipe.name)

    files = [
        *(BundleFile(file.path, file.size, file.sha256) for file in publication.files),
        *provided_inventory(bundle),
    ]
    reporter.stage(f"verifying {len(files)} files of {name}, published by {publication.publisher}")
    if problems := differing(files, version.folder, reporter):
        raise _not_as_published(shared, version, problems)
    _take_builds(version, root, paths)
    _take_kernels(version, root)
    with writing(root.path, 0):
        if image is not None:
            image = _take_image(image, version, root)
        _refer(own, bundle.path)
    if recipe.cuda is not None:
        built_for = {"compute_capabilities": publication.compute_capabilities, "detect": False}
        recipe = recipe.model_copy(update={"cuda": recipe.cuda.model_copy(update=built_for)})
    return UseReport(
        publication=publication,
        recipe=recipe,
        bundle=open_bundle(root, recipe.name),
        python=found,
        image=image,
        files=len(files),
        bytes=sum((version.folder / file.path).stat().st_size for file in files),
        seconds=time.monotonic() - began,
    )


def _check_not_own(bundle: Path) -> None:
    if bundle.is_dir() and not bundle.is_symlink():
        raise MismatchError(
            f"ROOT has a bundle of its own at {bundle}, which is not replaced.",
            remedy="Use the published one in another ROOT: envbuilder --root FOLDER use NAME --from FOLDER; "
            f"or remove yours: rm -r {bundle}",
            context={"bundle": bundle},
        )


def _check_listed(shared: SharedFolder, version: PublishedVersion) -> frozenset[str]:
    """The files of the version; IntegrityError unless they are those of the manifest."""
    found = {
        path.relative_to(version.folder).as_posix()
        for path, status in shared.entries(version.folder)
        if stat.S_ISREG(status.st_mode)
    }
    listed = {file.path for file in version.publication.files}
    problems = [Problem(path, "missing", "missing") for path in sorted(listed - found)]
    strange = sorted(found - listed - {MANIFEST})
    problems += [Problem(path, "strange", "strange: the manifest does not name it") for path in strange]
    if problems:
        raise _not_as_published(shared, version, problems)
    return frozenset(listed)


def _not_as_published(
    shared: SharedFolder, version: PublishedVersion, problems: list[Problem]
) -> IntegrityError:
    publication = version.publication
    return IntegrityError(
        f"{len(problems)} of the {len(publication.files)} files of {publication.name} are not as "
        f"{publication.publisher} published them.",
        remedy=shared.publish_again(publication.name, version.folder, publication.recipe),
        context={"folder": version.folder, **{problem.path: problem.detail for problem in problems}},
    )


def _published_image(
    shared: SharedFolder, version: PublishedVersion, paths: frozenset[str]
) -> EnvImage | None:
    """The image in the version, where there is one; none of its bytes have been read."""
    name, published = version.publication.recipe, Root(version.folder)
    images, record = published.images, published.image_receipt(name)
    if record.relative_to(version.folder).as_posix() not in paths:
        return None
    again = shared.publish_again(version.publication.name, version.folder, name)
    receipt = read_record(record, ImageReceipt, remedy=again)
    listed = {file.path: file.sha256 for file in version.publication.files}
    if listed.get(f"{images.name}/{receipt.file}") != receipt.sha256:
        problem = Problem(receipt.file, "strange", "the manifest does not name the image of the receipt")
        raise _not_as_published(shared, version, [problem])
    return EnvImage(name, images / receipt.file, receipt)


def _interpreter(given: Path | None, recipe: Recipe, bundle: Bundle) -> Path:
    if given is not None or recipe.provided is not None:
        return find_interpreter(given or Path(recipe.provided.python if recipe.provided else ""))
    minor = bundle.record.python
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    return find_interpreter(Path(sys.executable if running == minor else f"python{minor}"))


def _check_gpus(publication: Publication, recipe: Recipe) -> None:
    """MismatchError where this machine has GPUs, and what was compiled runs on none of them."""
    here = present_capabilities()
    codes = publication.architectures
    if here and codes and not any(runs_on(code, gpu) for code in codes for gpu in here):
        raise MismatchError(
            f"{publication.name} was compiled for {', '.join(codes)}, and this machine's GPUs have compute "
            f"capability {', '.join(here)}.",
            remedy=f"Compile it for them: envbuilder compile recipes/{recipe.name}.toml --local",
            context={"compiled for": ", ".join(codes), "here": ", ".join(here)},
        )


def _take_builds(version: PublishedVersion, root: Root, paths: frozenset[str]) -> None:
    """Copies the built wheels that ROOT has not, each with its receipt as the last file."""
    keys = {PurePosixPath(path).parts[1] for path in paths if path.startswith("wheelhouse/")}
    wanted = {key for key in keys if read_built(root, key) is None}
    files = [file for file in version.publication.files if PurePosixPath(file.path).parts[1] in wanted]
    for file in sorted(files, key=lambda file: file.path.endswith(f"/{RECEIPT}")):
        if file.path.startswith("wheelhouse/"):
            _copy(version, file.path, file.sha256, file.size, root)


def _take_kernels(version: PublishedVersion, root: Root) -> None:
    for file in version.publication.files:
        if file.path.startswith("cache/kernels/") and not (root.path / file.path).exists():
            _copy(version, file.path, file.sha256, file.size, root)


def _take_image(published: EnvImage, version: PublishedVersion, root: Root) -> EnvImage:
    """Puts a link to the image into `root`, then its receipt, by which it counts."""
    image = EnvImage(published.name, root.images / published.path.name, published.receipt)
    _refer(image.path, published.path)
    path = published.record.relative_to(version.folder).as_posix()
    (file,) = (file for file in version.publication.files if file.path == path)
    _copy(version, file.path, file.sha256, file.size, root)
    return image


def _copy(version: PublishedVersion, path: str, sha256: str, size: int, root: Root) -> None:
    remedy = f"envbuilder use {version.publication.name}"
    copy_verified(version.folder / path, sha256, size, root.path / path, remedy=remedy)


def _refer(place: Path, target: Path) -> None:
    """Makes `place` a link to `target`, in one step."""
    make_folder(place.parent)
    made = place.with_name(f".{place.name}.{secrets.token_hex(8)}{NEW_SUFFIX}")
    made.symlink_to(target)
    try:
        made.replace(place)
    except BaseException:
        made.unlink()
        raise

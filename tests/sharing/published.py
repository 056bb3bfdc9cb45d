"""A ROOT with an env of one wheel and one built package, ready to be published; publishing and using it."""

from __future__ import annotations

import hashlib
import json
import platform
import shutil
import stat
import sys
from pathlib import Path

import tomli_w

from envbuilder.bundle import RECIPE, RECORD, START, TOOL, open_bundle
from envbuilder.env_image import env_receipt
from envbuilder.install import install_env
from envbuilder.kept_images import image_name
from envbuilder.model import Bundle, Extension, ImageReceipt
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.sharing import PublishReport, UseReport, open_shared_folder, publish, use_published
from envbuilder.store import STORED_MODE
from envbuilder.wheelhouse import store_built
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_sdist, make_wheel
from tests.lab.receipts import build_receipt

NAME = "shared-lab"
MINOR = ".".join(platform.python_version_tuple()[:2])
EXTENSION = "machine code"
KERNEL = Path("triton/ABC/kernel.cubin")


def recipe_for(minor: str = MINOR) -> Recipe:
    return Recipe.model_validate(
        {"name": NAME, "requirements": ["one", "built"], "target": {"python": f"=={minor}.*"}}
    )


def make_root(folder: Path, *, python: Path | None = None, architectures: tuple[str, ...] = ()) -> Root:
    """A ROOT under `folder` with bundle, wheelhouse, kernels and, for `python`, an installed env.

    `architectures` are the GPU code that the built package's receipt tells of.
    """
    root, recipe, made = Root(folder / "root"), recipe_for(), folder / "made"
    made.mkdir(parents=True)
    one, sdist = make_wheel(made, "one", "1.0"), make_sdist(made, "built", "2.0")
    built = make_wheel(made, "built", "2.0", files={"built.py": "", "x.so": EXTENSION})
    built = built.rename(built.with_name("built-2.0-1_abc-py3-none-any.whl"))
    extension = Extension(
        module="built_ext",
        file="x.so",
        sha256=hashlib.sha256(EXTENSION.encode()).hexdigest(),
        architectures=architectures,
    )
    store_built(root, built, build_receipt(sdist, built, extensions=(extension,)))
    bundle = _whole(make_bundle(root, recipe, {one: ["runtime"], sdist: ["runtime"]}, python=MINOR), recipe)
    kernel = root.kernels(NAME) / KERNEL
    kernel.parent.mkdir(parents=True)
    kernel.write_bytes(b"machine code")
    install_env(recipe, bundle, root=root, python=python or Path(sys.executable), reporter=Quiet())
    return root


def keep_as_image(root: Root, content: bytes, *, interpreter: str = sys.executable) -> None:
    """Puts an image of the bytes `content`, which are no squashfs, in the place of the env's folder."""
    receipt, _ = env_receipt(root, NAME)
    sha256 = hashlib.sha256(content).hexdigest()
    made = ImageReceipt(
        file=image_name(NAME, sha256),
        sha256=sha256,
        size=len(content),
        plain_files=3,
        plain_bytes=30,
        mksquashfs="4.5.1",
        tool_version="0.1.0",
        interpreter=interpreter,
        env=receipt,
        created_at=receipt.created_at,
    )
    root.images.mkdir()
    (root.images / made.file).write_bytes(content)
    (root.images / made.file).chmod(STORED_MODE)
    (root.images / f"{NAME}.json").write_text(made.model_dump_json(), encoding="utf-8")
    shutil.rmtree(root.env(NAME))


def published(root: Root, shared: Path, *, name: str | None = None, prune: bool = False) -> PublishReport:
    return publish(root, NAME, open_shared_folder(shared), Quiet(), name=name, prune=prune)


def use(shared: Path, root: Path, *, name: str = NAME, python: Path | None = None) -> UseReport:
    return use_published(open_shared_folder(shared), name, root=Root(root), python=python, reporter=Quiet())


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def overwrite(path: Path, content: bytes) -> None:
    """Replaces the file, as a link of it is ROOT's too, with the modes of a published one."""
    path.unlink()
    path.write_bytes(content)
    path.chmod(0o440)


def _whole(bundle: Bundle, recipe: Recipe) -> Bundle:
    """The files that `make_bundle` leaves out, and stored files as `fetch` leaves them."""
    folder = bundle.path
    (folder / TOOL).mkdir()
    tool = make_wheel(folder / TOOL, "envbuilder", "0.1")
    text = tomli_w.dumps(recipe.model_dump(mode="json", by_alias=True, exclude_none=True))
    (folder / RECIPE).write_text(text, encoding="utf-8")
    (folder / START).write_text("print('start')\n", encoding="utf-8")
    for file in (folder / "files").iterdir():
        file.chmod(STORED_MODE)
    table = {
        **bundle.record.model_dump(mode="json"),
        "recipe_sha256": _sha256(folder / RECIPE),
        "start_sha256": _sha256(folder / START),
        "tool_wheel": tool.name,
        "tool_sha256": _sha256(tool),
    }
    (folder / RECORD).write_text(json.dumps(table), encoding="utf-8")
    return open_bundle(Root(folder.parent.parent), NAME)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()

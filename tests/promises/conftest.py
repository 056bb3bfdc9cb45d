"""What the promises are tried on: an index, a hub, and two recipes that were locked there once."""

from __future__ import annotations

import platform
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from envbuilder.requirements import tool_requires
from tests.lab.hub_server import HubServer
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist, make_wheel
from tests.promises.commands import Workplace

MINOR = ".".join(platform.python_version_tuple()[:2])
TARGET = f"""
trainer = false
[target]
python = "=={MINOR}.*"
"""
SMALL = f"""
name = "small"
requirements = ["big", "one"]
{TARGET}
[model.tiny]
repo = "owner/tiny"
"""
"""Wheels and a model."""
SOURCE = f"""
name = "source"
requirements = ["plain", "one"]
{TARGET}
[build.plain]
"""
"""A wheel, and a package that is compiled from its sdist."""
RECIPES = {"small": SMALL, "source": SOURCE}
REPO = "owner/tiny"
_PLAIN = Path(__file__).parent.parent / "packages" / "plain"


@dataclass(frozen=True)
class Published:
    """What is on the servers; nobody changes it."""

    index: Path
    hub: Path
    big: Path
    """A large wheel."""
    one: Path
    """A small one."""
    plain: Path
    """An sdist that builds with nothing but Python."""
    weights: Path
    """The large file of the model."""
    config: Path
    """A small one of it."""

    @property
    def served(self) -> dict[str, Path]:
        """The path in the bundle small → the file that it must be a copy of."""
        return {
            **{f"files/{path.name}": path for path in (self.big, self.one)},
            **{f"models/tiny/{path.name}": path for path in (self.weights, self.config)},
        }


def publish_tools(folder: Path) -> None:
    """Stand-ins for what envbuilder itself and every build need."""
    for text in (*tool_requires(), "ninja>=1", "setuptools>=70", "wheel>=1"):
        (least,) = Requirement(text).specifier
        make_wheel(folder, Requirement(text).name, least.version)


def publish_plain(folder: Path) -> Path:
    """An sdist that builds with nothing but Python."""
    return make_sdist(folder, "plain", "1.0", files=plain_files())


def plain_files() -> dict[str, str]:
    """What is in that sdist, by name."""
    return {path.name: path.read_text(encoding="utf-8") for path in _PLAIN.glob("*.*")}


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Published:
    folder = tmp_path_factory.mktemp("published")
    index, model = folder / "index", folder / "hub" / REPO
    index.mkdir()
    model.mkdir(parents=True)
    publish_tools(index)
    content = random.Random(1).randbytes
    (model / "config.json").write_bytes(b'{"model_type": "llama"}')
    (model / "model.safetensors").write_bytes(content(2_000_000))
    (model / "tokenizer.json").write_bytes(b"{}")
    return Published(
        index=index,
        hub=folder / "hub",
        big=make_wheel(index, "big", "1.0", files={"big.bin": content(3_000_000)}),
        one=make_wheel(index, "one", "1.0"),
        plain=publish_plain(index),
        weights=model / "model.safetensors",
        config=model / "config.json",
    )


@pytest.fixture
def index(published: Published) -> Iterator[IndexServer]:
    with IndexServer(published.index) as server:
        yield server


@pytest.fixture
def hub(published: Published) -> Iterator[HubServer]:
    with HubServer(published.hub) as server:
        yield server


@pytest.fixture(scope="session")
def locks(published: Published, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The locks of the two recipes, made where they were asked for first: no URL is in them."""
    place = Workplace(tmp_path_factory.mktemp("locking"))
    with IndexServer(published.index) as index, HubServer(published.hub) as hub:
        place = place.with_variables(PIP_INDEX_URL=index.url, HF_ENDPOINT=hub.endpoint)
        for name, recipe in RECIPES.items():
            place.add(name, recipe)
            place.succeed("lock", place.recipe(name))
    return {name: place.lock(name).read_text(encoding="utf-8") for name in RECIPES}


@pytest.fixture
def place(tmp_path: Path, locks: dict[str, str], index: IndexServer, hub: HubServer) -> Workplace:
    """A workplace with both recipes and their locks; nothing is fetched."""
    place = Workplace(tmp_path / "place", {"PIP_INDEX_URL": index.url, "HF_ENDPOINT": hub.endpoint})
    for name, lock in locks.items():
        place.add(name, RECIPES[name], lock)
    return place

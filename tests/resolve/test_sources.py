"""Which sdist or git tree a source package is compiled from, and what is read of it."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from envbuilder.errors import InputError
from envbuilder.git import pack_tree
from envbuilder.index import Index
from envbuilder.lock import LockedFile, LockedTree
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.resolve.sources import Source, read_source
from tests.lab.git_repositories import Content, commit, make_repository
from tests.lab.index_server import IndexServer, loopback_client
from tests.lab.packages import make_sdist

Read = Callable[..., Source]
PROJECT = '[project]\nname = "kernels"\nversion = "1.5"\ndependencies = ["torch"]\nlicense = "MIT"\n'


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with loopback_client() as client:
        yield client


@pytest.fixture
def read(server: IndexServer, client: httpx.Client, tmp_path: Path) -> Read:
    """read(build, requirement="kernels", kept=None) → the source of the package `kernels`."""

    def read(
        build: dict[str, object],
        requirement: str = "kernels",
        *,
        kept: str | None = None,
        name: str = "kernels",
    ) -> Source:
        return read_source(
            recipe(build, requirement, name),
            name,
            index=Index("default", server.url, client),
            client=client,
            cache=tmp_path / "cache",
            kept=kept,
            reporter=Quiet(),
        )

    return read


def recipe(build: dict[str, object], requirement: str, name: str = "kernels") -> Recipe:
    return Recipe.model_validate({"name": "demo", "requirements": [requirement], "build": {name: build}})


def repository(folder: Path, files: dict[str, Content]) -> dict[str, object]:
    """[build.kernels.git] of a new repository."""
    path = make_repository(folder / "kernels.git")
    return {"git": {"url": f"file://{path}", "commit": commit(path, files)}}


def test_a_kept_version_stays_as_long_as_the_recipe_admits_it(server: IndexServer, read: Read) -> None:
    for version in ("1.0", "1.5", "2.0"):
        make_sdist(server.folder, "kernels", version)
    assert read({}).file.version == "2.0"
    assert read({}, kept="1.5").file.version == "1.5"
    assert read({}, "kernels<1.2", kept="1.5").file.version == "1.0"
    assert read({}, kept="0.9").file.version == "2.0"
    # A withdrawn release is not stayed with: that is what it was withdrawn for.
    server.yanked.add("kernels-1.5.tar.gz")
    assert read({}, kept="1.5").file.version == "2.0"


def test_an_sdist_is_named_with_its_index_hash_and_size(server: IndexServer, read: Read) -> None:
    path = make_sdist(server.folder, "kernels", "1.0", requires=["torch"])
    source = read({})
    assert source.file == LockedFile(
        package="kernels",
        version="1.0",
        filename=path.name,
        size=path.stat().st_size,
        sha256=hashlib.sha256(path.read_bytes()).hexdigest(),
        index="default",
        is_sdist=True,
    )
    assert (source.tree, source.metadata.requires) == (None, ("torch",))


def test_an_index_with_a_zip_alone_says_so(server: IndexServer, read: Read) -> None:
    (server.folder / "kernels-1.0.zip").write_bytes(b"PK")
    with pytest.raises(InputError, match=r"the \.zip of 1\.0 is of no use"):
        read({})


def test_a_git_source_is_locked_as_what_fetch_will_pack(read: Read, tmp_path: Path) -> None:
    build = repository(tmp_path, {"pyproject.toml": PROJECT, "a.cu": "code"})
    source = read(build)
    packed = tmp_path / "again" / "kernels-1.5.tar.gz"
    git = recipe(build, "kernels").build["kernels"].git
    assert git is not None
    tree = pack_tree("kernels", git, name="kernels", version="1.5", destination=packed, tree=source.tree)
    assert source.tree == tree == LockedTree(git.commit, {})
    assert source.file == LockedFile(
        package="kernels",
        version="1.5",
        filename="kernels-1.5.tar.gz",
        size=packed.stat().st_size,
        sha256=hashlib.sha256(packed.read_bytes()).hexdigest(),
        index=None,
        is_sdist=True,
    )
    assert (source.metadata.requires, source.metadata.license) == (("torch",), "MIT")
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_git_source_without_static_metadata_takes_the_recipes(read: Read, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    setup_py = f"open({str(canary)!r}, 'w')\nsetup(setup_requires=['ninja'])"
    build = repository(tmp_path, {"setup.py": setup_py})
    with pytest.raises(InputError) as caught:
        read(build)
    assert 'under [build.kernels]: version = "…"' in caught.value.remedy
    with pytest.raises(InputError) as caught:
        read({**build, "version": "2.0"})
    assert "requires = [" in caught.value.remedy
    source = read({**build, "version": "2.0", "requires": ["torch"]})
    assert (source.file.filename, source.metadata.build_requires) == (
        "kernels-2.0.tar.gz",
        ("setuptools", "wheel", "ninja"),
    )
    assert not canary.exists()


@pytest.mark.parametrize(
    ("name", "requirement"), [("kernels", "kernels>=2"), ("kernels", "kernels==1.0"), ("other", "other")]
)
def test_a_commit_of_another_version_or_package_is_refused(
    read: Read, tmp_path: Path, name: str, requirement: str
) -> None:
    build = repository(tmp_path, {"pyproject.toml": PROJECT})
    with pytest.raises(InputError, match=r"is kernels 1\.5, not") as caught:
        read(build, requirement, name=name)
    assert "recipes/demo.toml" in caught.value.remedy


def test_a_prerelease_in_git_is_what_was_asked_for(read: Read, tmp_path: Path) -> None:
    text = PROJECT.replace("1.5", "2.0.dev1")
    assert read(repository(tmp_path, {"pyproject.toml": text})).file.version == "2.0.dev1"


def test_the_cache_may_be_gone(read: Read, tmp_path: Path) -> None:
    build = repository(tmp_path, {"pyproject.toml": PROJECT})
    first = read(build)
    shutil.rmtree(tmp_path / "cache")
    assert read(build) == first

"""What a lock says of each package: its files, where they are from, its licence, its patches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from envbuilder.errors import InputError
from envbuilder.index import Index
from envbuilder.lock import LockedFile, LockedPatch, LockedTree
from envbuilder.lock_text import LockEntry
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.resolve.files import choose_files
from envbuilder.resolve.sources import Source
from envbuilder.sdist import SdistMetadata
from tests.lab.index_server import IndexServer, loopback_client
from tests.lab.packages import make_sdist, make_wheel

COMMIT = "0123456789" * 4


class Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def index(server: IndexServer) -> Iterator[Index]:
    with loopback_client() as client:
        yield Index("default", server.url, client)


def recipe(**fields: object) -> Recipe:
    return Recipe.model_validate(
        {"name": "demo", "requirements": ["app"], "target": {"python": ">=3.11,<3.13"}} | fields
    )


def chosen(
    index: Index,
    name: str,
    *,
    sources: dict[str, Source] | None = None,
    patches: dict[str, tuple[LockedPatch, ...]] | None = None,
    reporter: Quiet | None = None,
    **fields: object,
) -> LockEntry:
    versions = {name: "1.0"}
    (entry,) = choose_files(
        recipe(**fields),
        {"runtime": {"3.11": versions, "3.12": versions}},
        sources or {},
        indexes={"default": index},
        reporter=reporter or Quiet(),
        patches=patches,
    )
    return entry


def source(path: Path, *, tree: LockedTree | None = None, license_: str | None = None) -> Source:
    file = LockedFile(
        "kernels",
        "1.0",
        path.name,
        path.stat().st_size,
        sha256="0" * 64,
        index=None if tree else "default",
        is_sdist=True,
    )
    metadata = SdistMetadata(
        name="kernels",
        version="1.0",
        requires=("helper",),
        build_requires=("setuptools",),
        source="PKG-INFO",
        note=None,
        license=license_,
    )
    return Source(file=file, metadata=metadata, tree=tree)


def test_a_wheel_package_names_its_index_and_its_licence(server: IndexServer, index: Index) -> None:
    make_wheel(server.folder, "app", "1.0", stated=["License: MIT"])

    assert chosen(index, "app").table == {"index": "default", "license": "MIT"}


def test_packages_that_state_no_licence_are_noted(server: IndexServer, index: Index) -> None:
    make_wheel(server.folder, "app", "1.0")
    reporter = Notes()

    assert chosen(index, "app", reporter=reporter).table == {"index": "default"}
    assert reporter.notes == ["No licence is named by the metadata of app."]


def test_a_wheel_that_the_target_can_not_take_is_refused_and_both_tags_named(
    server: IndexServer, index: Index
) -> None:
    make_wheel(server.folder, "app", "1.0", tag="cp311-cp311-manylinux_2_34_x86_64")

    with pytest.raises(InputError, match=r"app 1\.0 has no wheel for Python 3\.11") as caught:
        chosen(index, "app")

    assert "cp311-cp311-manylinux_2_34_x86_64" in caught.value.message
    assert "cp311-cp311-manylinux_2_28_x86_64" in caught.value.message
    assert "[build.app]" in caught.value.remedy


def test_a_source_package_from_an_index_says_what_it_requires(index: Index, tmp_path: Path) -> None:
    sdist = make_sdist(tmp_path, "kernels", "1.0")

    entry = chosen(
        index,
        "kernels",
        sources={"kernels": source(sdist, license_="BSD-3-Clause")},
        build={"kernels": {"build-requires": ["ninja", "setuptools"]}},
    )

    assert entry.table == {
        "index": "default",
        "metadata-source": "PKG-INFO",
        "requires": ["helper"],
        "build-requires": ["setuptools", "ninja"],
        "license": "BSD-3-Clause",
    }
    assert [(file.filename, file.index, file.is_sdist) for file in entry.files] == [
        (sdist.name, "default", True)
    ]


def test_a_git_source_names_its_commits_and_patches_and_no_index(index: Index, tmp_path: Path) -> None:
    sdist = make_sdist(tmp_path, "kernels", "1.0")
    patch = LockedPatch("patches/fix.patch", 12, "1" * 64)

    entry = chosen(
        index,
        "kernels",
        sources={"kernels": source(sdist, tree=LockedTree(COMMIT, {"third_party/lib": COMMIT}))},
        patches={"kernels": (patch,)},
        build={"kernels": {"git": {"url": "https://example.org/kernels", "commit": COMMIT}}},
    )

    assert entry.table == {
        "git": {"commit": COMMIT, "submodules": {"third_party/lib": COMMIT}},
        "metadata-source": "PKG-INFO",
        "requires": ["helper"],
        "build-requires": ["setuptools"],
        "patches": [{"path": "patches/fix.patch", "size": 12, "sha256": "1" * 64}],
    }
    assert [file.index for file in entry.files] == [None]

"""Locks for one probed machine, made on another one: an older glibc, another processor."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from envbuilder.errors import InputError
from envbuilder.index import Index
from envbuilder.lock import SourceLock, parse_lock
from envbuilder.lock_text import compose_lock
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.resolve import Request, Resolver, resolver_named
from envbuilder.resolve.files import choose_files
from envbuilder.target import narrow_target, target_for
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel
from tests.machines import machine_record

RECIPE = Recipe.model_validate({"name": "demo", "requirements": ["native"], "target": {"glibc": "2.28"}})
GLIBCS = ("2_17", "2_28", "2_34")
MACHINES = ("x86_64", "aarch64")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[IndexServer]:
    """An index of `native` 1.0 with a wheel for each machine and glibc."""
    folder = tmp_path / "served"
    folder.mkdir()
    for machine in MACHINES:
        for glibc in GLIBCS:
            make_wheel(folder, "native", "1.0", tag=f"cp312-cp312-manylinux_{glibc}_{machine}")
    with IndexServer(folder) as server:
        yield server


def lock_for(recipe: Recipe, server: IndexServer, version: str = "1.0") -> SourceLock:
    with httpx.Client() as client:
        entries = choose_files(
            recipe,
            {"runtime": {"3.12": {"native": version}}},
            {},
            indexes={"default": Index("default", server.url, client)},
            reporter=Quiet(),
        )
    return parse_lock("demo", compose_lock(recipe, digest="0" * 64, resolver="none", entries=entries))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize(
    ("glibc", "newest"),
    [("2.17", "2_17"), ("2.26", "2_17"), ("2.28", "2_28"), ("2.31", "2_28"), ("2.36", "2_34")],
)
def test_the_newest_wheel_that_the_probed_machine_takes_is_locked(
    server: IndexServer, machine: str, glibc: str, newest: str
) -> None:
    narrowed = narrow_target(RECIPE, machine_record(machine=machine, glibc=glibc))
    lock = lock_for(narrowed, server)
    assert lock.target == narrowed.target
    (package,) = lock.pylock.packages
    names = [wheel.filename for wheel in package.wheels or ()]
    assert names == [f"native-1.0-cp312-cp312-manylinux_{newest}_{machine}.whl"]
    chosen = lock.select(target_for(lock.target, "3.12"))
    assert [file.filename for file in chosen] == names


def test_a_recipe_that_is_not_narrowed_keeps_its_own_target(server: IndexServer) -> None:
    recipe = RECIPE.model_copy(update={"target": RECIPE.target.model_copy(update={"python": "==3.12.*"})})
    (file,) = lock_for(recipe, server).select(target_for(recipe.target, "3.12"))
    assert file.filename == "native-1.0-cp312-cp312-manylinux_2_28_x86_64.whl"


@pytest.mark.parametrize(
    ("machine", "glibc", "offered", "taken"),
    [
        ("x86_64", "2.28", "manylinux_2_34_x86_64", "manylinux_2_28_x86_64"),
        ("aarch64", "2.34", "manylinux_2_17_x86_64", "manylinux_2_34_aarch64"),
    ],
)
def test_wheels_that_the_probed_machine_cannot_take_are_refused_and_both_sides_are_named(
    server: IndexServer, machine: str, glibc: str, offered: str, taken: str
) -> None:
    make_wheel(server.folder, "native", "2.0", tag=f"cp312-cp312-{offered}")
    narrowed = narrow_target(RECIPE, machine_record(machine=machine, glibc=glibc))
    with pytest.raises(InputError, match=r"native 2\.0 has no wheel") as caught:
        lock_for(narrowed, server, "2.0")
    assert f"cp312-cp312-{offered}" in caught.value.message
    assert f"cp312-cp312-{taken}" in caught.value.message


@pytest.fixture(params=["uv", "pip-tools"])
def resolver(request: pytest.FixtureRequest) -> Resolver:
    return resolver_named(request.param)


@pytest.mark.parametrize(
    ("machine", "glibc", "version"),
    [
        ("x86_64", "2.28", "1.1"),
        ("x86_64", "2.34", "1.2"),
        ("aarch64", "2.34", "1.3"),
        ("x86_64", "2.17", "1.0"),
    ],
)
def test_resolvers_choose_the_newest_version_with_a_wheel_for_the_probed_machine(
    resolver: Resolver, server: IndexServer, tmp_path: Path, machine: str, glibc: str, version: str
) -> None:
    make_wheel(server.folder, "native", "1.1", tag="cp312-cp312-manylinux_2_28_x86_64")
    make_wheel(server.folder, "native", "1.2", tag="cp312-cp312-manylinux_2_34_x86_64")
    make_wheel(server.folder, "native", "1.3", tag="cp312-cp312-manylinux_2_34_aarch64")
    narrowed = narrow_target(RECIPE, machine_record(machine=machine, glibc=glibc))
    question = Request(
        what="the runtime requirements of demo",
        remedy="Change recipes/demo.toml.",
        requirements=narrowed.requirements,
        constraints=(),
        known=(),
        excluded=frozenset(),
        target=target_for(narrowed.target, "3.12"),
        glibc=narrowed.target.glibc,
        index_url=server.url,
        cache=tmp_path / "cache",
    )
    assert resolver.resolve(question) == {"native": version}

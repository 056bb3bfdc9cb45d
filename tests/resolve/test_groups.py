"""Whole resolutions from several indexes, and from an older lock."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from envbuilder.errors import InputError, NetworkError
from envbuilder.index import Index
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.requirements import tool_requires
from envbuilder.resolve import Versions, resolver_named
from envbuilder.resolve.combined_index import open_combined_index
from envbuilder.resolve.groups import resolve_groups
from envbuilder.resolve.kept import Resolution
from tests.lab.index_server import Fault, IndexServer, loopback_client
from tests.lab.packages import make_sdist, make_wheel

Resolve = Callable[..., Resolution]


@pytest.fixture
def server(server: IndexServer) -> IndexServer:
    """The default index, with what envbuilder itself needs."""
    for text in tool_requires():
        (least,) = Requirement(text).specifier
        make_wheel(server.folder, Requirement(text).name, least.version)
    return server


@pytest.fixture
def site(tmp_path: Path) -> Iterator[IndexServer]:
    folder = tmp_path / "site"
    folder.mkdir()
    with IndexServer(folder) as server:
        yield server


@pytest.fixture(params=["uv", "pip-tools"])
def resolve(
    request: pytest.FixtureRequest, server: IndexServer, site: IndexServer, tmp_path: Path
) -> Iterator[Resolve]:
    """resolve(kept=…, **recipe) → the resolution."""
    with loopback_client() as client:

        def resolve(kept: Resolution | None = None, **fields: object) -> Resolution:
            recipe = {"name": "demo", "trainer": False, "target": {"python": ">=3.12,<3.13"}} | fields
            return resolve_groups(
                Recipe.model_validate({"requirements": ["app"]} | recipe),
                {},
                resolver=resolver_named(request.param),
                indexes={
                    "default": Index("default", server.url, client, retries=0),
                    "site": Index("site", site.url, client, retries=0),
                },
                cache=tmp_path / "cache",
                reporter=Quiet(),
                kept=kept,
            )

        yield resolve


def runtime(resolution: Resolution) -> Versions:
    return resolution["runtime"]["3.12"]


@pytest.mark.parametrize("how", ["direct", "indirect", "absent elsewhere"])
def test_a_bound_package_comes_from_its_index_alone_and_no_other_package_does(
    resolve: Resolve, server: IndexServer, site: IndexServer, how: str
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["mid"])
    make_wheel(server.folder, "mid", "1.0", requires=["bound"])
    if how != "absent elsewhere":
        make_wheel(server.folder, "bound", "99.0")
    make_wheel(site.folder, "bound", "1.0")
    for name in ("app", "mid"):
        make_wheel(site.folder, name, "99.0")
    requirements = ["app", "bound"] if how == "direct" else ["app"]

    found = runtime(resolve(requirements=requirements, index={"bound": "site"}))

    assert found == {"app": "1.0", "mid": "1.0", "bound": "1.0"}
    assert not [path for path, _ in server.requests if path == "/simple/bound/"]
    assert {path for path, _ in site.requests if path.startswith("/simple")} == {"/simple/bound/"}


def test_bindings_hold_behind_a_proxy_that_knows_no_loopback(
    resolve: Resolve, server: IndexServer, site: IndexServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["bound"])
    make_wheel(site.folder, "bound", "1.0")
    monkeypatch.setenv("PIP_PROXY", "127.0.0.1:9")

    assert runtime(resolve(index={"bound": "site"})) == {"app": "1.0", "bound": "1.0"}


def test_a_bound_package_that_its_index_lacks_is_not_taken_from_another(
    resolve: Resolve, server: IndexServer
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["bound"])
    make_wheel(server.folder, "bound", "1.0")

    with pytest.raises(InputError, match="No versions fit"):
        resolve(index={"bound": "site"})


def test_a_bound_package_whose_index_fails_is_a_network_error_that_names_the_index(
    resolve: Resolve, server: IndexServer, site: IndexServer
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["bound"])
    make_wheel(server.folder, "bound", "1.0")
    site.faults["bound"] = [Fault(status=500)] * 20

    with pytest.raises(NetworkError, match="The index site doesn't give bound: status 500"):
        resolve(index={"bound": "site"})


def test_a_binding_of_what_nothing_requires_is_refused(resolve: Resolve, server: IndexServer) -> None:
    make_wheel(server.folder, "app", "1.0")

    with pytest.raises(InputError, match="names boundd, which nothing in demo requires") as caught:
        resolve(index={"boundd": "site"})

    assert "recipes/demo.toml" in caught.value.remedy


def test_the_combined_index_answers_only_who_knows_its_url(server: IndexServer) -> None:
    make_wheel(server.folder, "app", "1.0")
    with loopback_client() as client, loopback_client() as stranger:
        indexes = {"default": Index("default", server.url, client)}
        with open_combined_index(indexes, {}) as combined:
            origin = f"http://127.0.0.1:{combined.server_port}"
            assert stranger.get(f"{combined.url}/app/").json()["files"][0]["url"].startswith(server.origin)
            for path in ("/simple/app/", "/app/", "/x/simple/app/"):
                assert stranger.get(origin + path).status_code == 404


@pytest.mark.parametrize("index", [{}, {"bound": "site"}], ids=["one index", "two"])
def test_a_package_with_sdists_only_is_to_be_compiled(
    resolve: Resolve, server: IndexServer, site: IndexServer, index: dict[str, str]
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["mid", "bound"])
    make_wheel(server.folder, "mid", "1.0", requires=["kernels"])
    make_sdist(server.folder, "kernels", "1.0")
    for folder in (server.folder, site.folder):
        make_wheel(folder, "bound", "1.0")

    with pytest.raises(InputError, match=r"kernels 1\.0 is on the index default as an sdist alone") as caught:
        resolve(index=index)

    assert caught.value.remedy == (
        "Add [build.kernels] to recipes/demo.toml, so that it is compiled from its sdist."
    )


def test_a_package_whose_wheels_are_for_others_is_not_said_to_have_sdists_only(
    resolve: Resolve, server: IndexServer
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["kernels"])
    make_sdist(server.folder, "kernels", "1.0")
    make_wheel(server.folder, "kernels", "1.0", tag="cp312-cp312-win_amd64")

    with pytest.raises(InputError, match="No versions fit"):
        resolve()


def test_kept_versions_stay_until_the_recipe_rules_them_out(resolve: Resolve, server: IndexServer) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["dep", "other"])
    make_wheel(server.folder, "dep", "1.0")
    make_wheel(server.folder, "other", "1.0")
    old = resolve()
    make_wheel(server.folder, "app", "2.0", requires=["dep", "other"])
    make_wheel(server.folder, "dep", "2.0")
    make_wheel(server.folder, "other", "2.0")
    make_wheel(server.folder, "httpx", "99.0")

    assert resolve(kept=old) == old
    assert runtime(resolve(kept=old, requirements=["app", "dep>1"])) == {
        "app": "1.0",
        "dep": "2.0",
        "other": "1.0",
    }
    without_dep = {
        group: {
            python: {name: version for name, version in versions.items() if name != "dep"}
            for python, versions in pythons.items()
        }
        for group, pythons in old.items()
    }
    assert runtime(resolve(kept=without_dep)) == {"app": "1.0", "dep": "2.0", "other": "1.0"}
    fresh = resolve()
    assert runtime(fresh) == {"app": "2.0", "dep": "2.0", "other": "2.0"}
    assert fresh["tool"]["3.12"]["httpx"] == "99.0"

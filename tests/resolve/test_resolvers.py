"""Both resolvers on a real index on loopback: they answer alike, build nothing, heed no settings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from envbuilder.errors import InputError, NetworkError, UsageError
from envbuilder.recipe import TargetSpec
from envbuilder.resolve import KnownPackage, Request, Resolver, resolver_named
from envbuilder.resolve.protocol import NoSolution
from envbuilder.target import target_for
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist, make_wheel

PYTHONS = ("3.11", "3.13")
CANARY = "import pathlib; pathlib.Path({path!r}).write_text('ran')\n"


@pytest.fixture(params=["uv", "pip-tools"])
def resolver(request: pytest.FixtureRequest) -> Resolver:
    return resolver_named(request.param)


@pytest.fixture
def question(server: IndexServer, tmp_path: Path) -> Request:
    return Request(
        what="the runtime requirements of demo",
        remedy="Change recipes/demo.toml.",
        requirements=("app",),
        constraints=(),
        known=(),
        excluded=frozenset(),
        target=target_for(TargetSpec(), "3.12"),
        glibc="2.28",
        index_url=server.url,
        cache=tmp_path / "cache",
    )


def for_python(question: Request, python: str) -> Request:
    return dataclasses.replace(question, target=target_for(TargetSpec(), python))


def test_both_resolvers_choose_the_same_versions_on_every_python(
    server: IndexServer, question: Request
) -> None:
    folder = server.folder
    make_wheel(
        folder,
        "app",
        "1.0",
        requires=[
            "native>=1",
            "old-only; python_version < '3.12'",
            "new-only; python_version >= '3.13'",
            "windows-only; sys_platform == 'win32'",
            "linux-only; platform_system == 'Linux' and platform_machine == 'x86_64'",
            "extras[fast]<2",
        ],
    )
    for name in ("old-only", "new-only", "windows-only", "linux-only", "speedup"):
        make_wheel(folder, name, "1.0")
    # 2.0 is for 3.13 alone, 1.5 for a newer glibc and 3.0 is a pre-release: 3.11 takes 1.4.
    make_wheel(folder, "native", "2.0", tag="cp313-cp313-manylinux_2_28_x86_64")
    make_wheel(folder, "native", "1.5", tag="cp311-cp311-manylinux_2_39_x86_64")
    make_wheel(folder, "native", "1.4", tag="cp310-abi3-manylinux_2_17_x86_64")
    make_wheel(folder, "native", "3.0rc1")
    make_wheel(folder, "extras", "1.0", requires=["speedup; extra == 'fast'", "absent; extra == 'slow'"])
    make_wheel(folder, "extras", "2.0")
    server.requires_python[make_wheel(folder, "app", "1.1").name] = ">=3.14"

    answers = {
        name: {python: resolver_named(name).resolve(for_python(question, python)) for python in PYTHONS}
        for name in ("uv", "pip-tools")
    }

    common = {"app": "1.0", "linux-only": "1.0", "extras": "1.0", "speedup": "1.0"}
    assert answers["uv"] == {
        "3.11": {**common, "native": "1.4", "old-only": "1.0"},
        "3.13": {**common, "native": "2.0", "new-only": "1.0"},
    }
    assert answers["pip-tools"] == answers["uv"]


def test_a_source_packages_requirements_are_those_given_and_its_setup_py_never_runs(
    resolver: Resolver, server: IndexServer, question: Request, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    make_wheel(server.folder, "app", "1.0", requires=["kernels"])
    make_wheel(server.folder, "helper", "1.0")
    make_sdist(server.folder, "kernels", "1.0", pkg_info=False, setup_py=CANARY.format(path=str(canary)))
    known = KnownPackage("kernels", ("1.0",), ("helper",))

    versions = resolver.resolve(dataclasses.replace(question, known=(known,)))

    assert versions == {"app": "1.0", "kernels": "1.0", "helper": "1.0"}
    assert not canary.exists()


def test_an_sdist_that_the_recipe_does_not_compile_is_no_candidate_and_never_runs(
    resolver: Resolver, server: IndexServer, question: Request, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    make_wheel(server.folder, "app", "1.0")
    make_sdist(server.folder, "app", "2.0", pkg_info=False, setup_py=CANARY.format(path=str(canary)))

    assert resolver.resolve(question) == {"app": "1.0"}
    assert not canary.exists()


def test_a_provided_package_brings_nothing_in_whatever_the_index_says_it_requires(
    resolver: Resolver, server: IndexServer, question: Request
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["big-lib", "small-lib"])
    make_wheel(server.folder, "big-lib", "2.1", requires=["toolkit"], tag="cp312-cp312-manylinux_2_28_x86_64")
    make_wheel(server.folder, "small-lib", "1.0", requires=["toolkit"])
    known = (KnownPackage("big-lib", ("2.1+site",), ()), KnownPackage("small-lib", ("0.9", "1.0"), ()))

    versions = resolver.resolve(
        dataclasses.replace(question, known=known, constraints=("big-lib==2.1+site", "small-lib"))
    )

    assert versions == {"app": "1.0", "big-lib": "2.1+site", "small-lib": "1.0"}


def test_constraints_hold_versions_that_are_not_the_newest(
    resolver: Resolver, server: IndexServer, question: Request
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["dep"])
    for version in ("1.0", "2.0"):
        make_wheel(server.folder, "dep", version)

    versions = resolver.resolve(dataclasses.replace(question, constraints=("dep==1.0", "unrelated==7")))

    assert versions == {"app": "1.0", "dep": "1.0"}


def test_requirements_that_do_not_fit_are_the_inputs_fault_and_named(
    resolver: Resolver, server: IndexServer, question: Request
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["dep<2"])
    make_wheel(server.folder, "dep", "1.0")

    with pytest.raises(InputError, match=r"the runtime requirements of demo for Python 3\.12") as caught:
        resolver.resolve(dataclasses.replace(question, requirements=("app", "dep>=3")))

    assert "dep>=3" in json.dumps(caught.value.context)
    assert caught.value.remedy == "Change recipes/demo.toml."


def test_an_index_that_is_not_there_is_a_network_error(
    resolver: Resolver, question: Request, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(NetworkError, match="An index failed"):
        resolver.resolve(dataclasses.replace(question, index_url="http://127.0.0.1:9/simple"))


def test_the_machines_find_links_extra_indexes_and_pins_do_not_sway_it(
    resolver: Resolver,
    server: IndexServer,
    question: Request,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["dep"])
    make_wheel(server.folder, "dep", "1.0")
    local = tmp_path / "local"
    local.mkdir()
    make_wheel(local, "dep", "1.0+cpu")
    make_wheel(local, "app", "99.0")
    constraint = tmp_path / "constraint.txt"
    constraint.write_text("dep==1.0+cpu\n")
    home = tmp_path / "home"
    for path, text in {
        ".config/pip/pip.conf": f"[global]\nfind-links = {local}\n",
        ".config/uv/uv.toml": f'find-links = ["{local}"]\n',
    }.items():
        (home / path).parent.mkdir(parents=True)
        (home / path).write_text(text)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.delenv("XDG_CONFIG_HOME", raising=False)
    for variable, value in {
        "PIP_FIND_LINKS": local,
        "PIP_CONSTRAINT": constraint,
        "UV_FIND_LINKS": local,
        "UV_CONSTRAINT": constraint,
        "UV_INDEX": local.as_uri(),
        "PIP_EXTRA_INDEX_URL": local.as_uri(),
    }.items():
        monkeypatch.setenv(variable, str(value))

    assert resolver.resolve(question) == {"app": "1.0", "dep": "1.0"}


def test_uv_leaves_an_excluded_package_out_with_all_that_it_brings(
    server: IndexServer, question: Request
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["unused<2", "used"])
    make_wheel(server.folder, "unused", "1.0", requires=["huge"])
    make_wheel(server.folder, "used", "1.0")

    versions = resolver_named("uv").resolve(dataclasses.replace(question, excluded=frozenset({"unused"})))

    assert versions == {"app": "1.0", "used": "1.0"}


def test_pip_tools_says_that_it_cannot_exclude_what_a_wheel_requires(
    server: IndexServer, question: Request
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["unused"])
    make_wheel(server.folder, "unused", "1.0")

    with pytest.raises(InputError, match="can't leave unused out") as caught:
        resolver_named("pip-tools").resolve(dataclasses.replace(question, excluded=frozenset({"unused"})))

    assert "--resolver uv" in caught.value.remedy


@pytest.mark.parametrize("requirement", ["app", "dep>=1"], ids=["deep", "direct"])
def test_a_package_without_any_wheel_is_named(
    resolver: Resolver, server: IndexServer, question: Request, requirement: str
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["mid"])
    make_wheel(server.folder, "mid", "1.0", requires=["dep"])
    make_sdist(server.folder, "dep", "1.0")

    with pytest.raises(NoSolution) as caught:
        resolver.resolve(dataclasses.replace(question, requirements=(requirement,)))

    (text,) = caught.value.wheelless
    assert Requirement(text).name == "dep"


def test_preferred_versions_stay_where_they_fit_and_bring_nothing_in(
    resolver: Resolver, server: IndexServer, question: Request
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["kept", "moved>=2", "gone"])
    for name in ("kept", "moved", "gone", "free", "unneeded"):
        for version in ("1.0", "2.0"):
            make_wheel(server.folder, name, version)
    preferences = {"kept": "1.0", "moved": "1.0", "gone": "0.5", "unneeded": "1.0"}

    versions = resolver.resolve(
        dataclasses.replace(question, requirements=("app", "free"), preferences=preferences)
    )

    assert versions == {"app": "1.0", "kept": "1.0", "moved": "2.0", "gone": "2.0", "free": "2.0"}


def test_an_unknown_resolver_is_a_usage_error_that_names_the_known_ones() -> None:
    with pytest.raises(UsageError) as caught:
        resolver_named("conda")

    assert "uv, pip-tools" in caught.value.remedy

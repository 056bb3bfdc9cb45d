"""Whole locks, made from an index on loopback."""

from __future__ import annotations

import hashlib
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from packaging.requirements import Requirement

from envbuilder.errors import EnvbuilderError, InputError, IntegrityError
from envbuilder.index import Index
from envbuilder.lock import GROUPS, Group, SourceLock, check_current, parse_lock, recipe_digest
from envbuilder.locking import make_lock
from envbuilder.recipe import Recipe
from envbuilder.requirements import tool_requires, trainer_requires
from envbuilder.resolve import resolver_named
from envbuilder.target import python_versions, target_for
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist, make_wheel

Make = Callable[..., str]


class Notebook:
    """A reporter that keeps what it is told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.warnings: list[str] = []

    def stage(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int, unit: object) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)

    def warn(self, text: str) -> None:
        self.warnings.append(text)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[IndexServer]:
    """An index that has what envbuilder itself and every build need."""
    folder = tmp_path / "served"
    folder.mkdir()
    for text in (*tool_requires(), "ninja>=1", "setuptools>=70", "wheel>=1"):
        (least,) = Requirement(text).specifier
        make_wheel(folder, Requirement(text).name, least.version)
    with IndexServer(folder) as server:
        yield server


@pytest.fixture
def notebook() -> Notebook:
    return Notebook()


@pytest.fixture
def make(server: IndexServer, notebook: Notebook, tmp_path: Path) -> Iterator[Make]:
    """make(resolver="uv", **recipe) → the lock's text."""
    with httpx.Client(follow_redirects=True) as client:

        def make(resolver: str = "uv", **fields: object) -> str:
            return make_lock(
                recipe(**fields),
                folder=tmp_path,
                resolver=resolver_named(resolver),
                indexes={"default": Index("default", server.url, client)},
                client=client,
                hub=None,
                cache=tmp_path / "cache",
                reporter=notebook,
            )

        yield make


def recipe(**fields: object) -> Recipe:
    return Recipe.model_validate(
        {"name": "demo", "trainer": False, "requirements": ["app"], "target": {"python": ">=3.11,<3.13"}}
        | fields
    )


def names(lock: SourceLock, python: str, *groups: Group) -> dict[str, str]:
    target = target_for(recipe().target, python)
    return {file.package: file.version for file in lock.select(target, groups)}


def test_a_lock_names_every_file_with_size_and_hash_and_holds_no_url_date_or_path_of_the_machine(
    server: IndexServer, make: Make, tmp_path: Path
) -> None:
    wheel = make_wheel(server.folder, "app", "1.0")

    text = make()
    package = next(p for p in tomllib.loads(text)["packages"] if p["name"] == "app")

    assert package["wheels"] == [
        {
            "name": wheel.name,
            "path": f"files/{wheel.name}",
            "size": wheel.stat().st_size,
            "hashes": {"sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()},
        }
    ]
    assert package["tool"]["envbuilder"] == {"index": "default"}
    for absent in ("://", "127.0.0.1", str(tmp_path), "upload-time"):
        assert absent not in text


def test_the_same_inputs_give_the_same_text_and_the_digest_of_the_recipe(
    server: IndexServer, make: Make
) -> None:
    make_wheel(server.folder, "app", "1.0")

    text = make()

    assert make() == text
    check_current(parse_lock("demo", text), recipe_digest(recipe(), trainer_requires(), tool_requires(), {}))


def test_both_resolvers_give_the_same_lock(server: IndexServer, make: Make) -> None:
    folder = server.folder
    make_wheel(folder, "app", "1.0", requires=["dep", "backport; python_version < '3.12'", "kernels"])
    make_wheel(folder, "backport", "1.0")
    make_wheel(folder, "dep", "1.0", tag="cp311-cp311-manylinux_2_17_x86_64")
    make_wheel(folder, "dep", "2.0", tag="cp312-cp312-manylinux_2_17_x86_64")
    make_sdist(folder, "kernels", "1.0", requires=["helper"])
    make_wheel(folder, "helper", "1.0")

    uv, pip_tools = (make(resolver, build={"kernels": {}}) for resolver in ("uv", "pip-tools"))

    assert pip_tools.replace('resolver = "pip-tools"', 'resolver = "uv"') == uv
    lock = parse_lock("demo", uv)
    expected = {"app": "1.0", "kernels": "1.0", "helper": "1.0"}
    assert names(lock, "3.11", "runtime") == {**expected, "dep": "1.0", "backport": "1.0"}
    assert names(lock, "3.12", "runtime") == {**expected, "dep": "2.0"}


def test_only_the_wheels_that_a_python_of_the_target_takes_are_kept(server: IndexServer, make: Make) -> None:
    kept = [
        make_wheel(server.folder, "app", "1.0", tag=tag).name
        for tag in ("cp311-cp311-manylinux_2_28_x86_64", "cp312-abi3-manylinux_2_17_x86_64")
    ]
    for tag in (
        "cp311-cp311-manylinux_2_28_aarch64",
        "cp312-cp312-manylinux_2_39_x86_64",
        "cp313-cp313-manylinux_2_28_x86_64",
        "cp311-cp311-manylinux_2_17_x86_64",
        "cp312-cp312-win_amd64",
        "cp312-cp312-musllinux_1_2_x86_64",
    ):
        make_wheel(server.folder, "app", "1.0", tag=tag)
    make_sdist(server.folder, "app", "1.0")

    package = next(p for p in tomllib.loads(make())["packages"] if p["name"] == "app")

    assert [wheel["name"] for wheel in package["wheels"]] == kept
    assert "sdist" not in package


def test_a_source_package_is_locked_as_its_sdist_with_what_it_requires(
    server: IndexServer, make: Make, notebook: Notebook
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["kernels"])
    make_wheel(server.folder, "kernels", "1.0")
    sdist = make_sdist(server.folder, "kernels", "1.0", requires=["helper"], dynamic=True)
    make_wheel(server.folder, "helper", "1.0")
    make_wheel(server.folder, "pybind", "3.0")

    text = make(build={"kernels": {"build-requires": ["pybind"]}})

    package = next(p for p in tomllib.loads(text)["packages"] if p["name"] == "kernels")
    assert "wheels" not in package
    assert package["sdist"]["name"] == sdist.name
    assert package["tool"]["envbuilder"] == {
        "index": "default",
        "metadata-source": "PKG-INFO",
        "requires": ["helper"],
        "build-requires": ["setuptools", "pybind"],
    }
    assert any("kernels-1.0.tar.gz" in note for note in notebook.notes)
    build = names(parse_lock("demo", text), "3.12", "build")
    assert build == {"pybind": "3.0", "ninja": "1", "setuptools": "70", "wheel": "1"}


def test_the_newest_current_sdist_is_taken_unless_the_recipe_pins_another(
    server: IndexServer, make: Make
) -> None:
    for version in ("1.0", "2.0", "3.0", "4.0rc1", "5.0"):
        path = make_sdist(server.folder, "kernels", version)
    server.requires_python[path.name] = ">=3.12"  # 3.11 is one of the recipe's
    server.yanked.add("kernels-3.0.tar.gz")

    def locked(requirement: str) -> str:
        lock = parse_lock("demo", make(requirements=[requirement], build={"kernels": {}}))
        return names(lock, "3.12", "runtime")["kernels"]

    assert locked("kernels") == "2.0"
    assert locked("kernels<2") == "1.0"
    assert locked("kernels==3.0") == "3.0"


def test_one_version_of_a_package_serves_all_groups(server: IndexServer, make: Make) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["setuptools<70", "httpx<0.28"])
    make_wheel(server.folder, "setuptools", "69.0")
    make_wheel(server.folder, "httpx", "0.99")
    make_sdist(server.folder, "kernels", "1.0")

    lock = parse_lock("demo", make(requirements=["app", "kernels"], build={"kernels": {}}))

    assert names(lock, "3.12", "build")["setuptools"] == "69.0"
    assert names(lock, "3.12", "tool")["httpx"] == "0.27"
    marker = next(p for p in lock.pylock.packages if p.name == "setuptools").marker
    assert str(marker) == '"runtime" in dependency_groups or "build" in dependency_groups'


def test_the_tool_has_versions_of_its_own_where_the_rest_needs_others(
    server: IndexServer, make: Make
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["httpx<0.20"])
    make_wheel(server.folder, "httpx", "0.19")

    text = make()

    lock = parse_lock("demo", text)
    assert names(lock, "3.12", "runtime")["httpx"] == "0.19"
    assert names(lock, "3.12", "tool")["httpx"] == "0.27"
    files = [file.filename for file in lock.select(target_for(recipe().target, "3.12"), GROUPS)]
    assert {"httpx-0.19-py3-none-any.whl", "httpx-0.27-py3-none-any.whl"} < set(files)
    assert len(files) == len(set(files))


def test_runtime_and_build_that_no_one_version_can_serve_are_refused(server: IndexServer, make: Make) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["setuptools<60"])
    make_wheel(server.folder, "setuptools", "59.0")
    make_sdist(server.folder, "kernels", "1.0")

    with pytest.raises(InputError, match="the build requirements of demo") as caught:
        make(requirements=["app", "kernels"], build={"kernels": {"build-requires": ["setuptools>=70"]}})

    assert "setuptools==59.0" in caught.value.context["uv"]


def test_provided_packages_are_recorded_and_neither_they_nor_what_they_require_is_locked(
    server: IndexServer, make: Make
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["torch", "tqdm>=4", "own"])
    make_wheel(server.folder, "own", "1.0")
    make_wheel(server.folder, "torch", "2.0", requires=["nccl"])
    make_wheel(server.folder, "tqdm", "4.1", requires=["colour"])
    provided = {"packages": ["torch==2.0", "tqdm", "packaging", "ninja", "wheel", "setuptools"]}
    make_sdist(server.folder, "kernels", "1.0", requires=["torch"])

    text = make(
        requirements=["app", "kernels", "torch==2.0"],
        provided=provided,
        build={"kernels": {"build-requires": ["torch", "packaging"]}},
    )

    lock = parse_lock("demo", text)
    assert names(lock, "3.12", "runtime") == {"app": "1.0", "own": "1.0", "kernels": "1.0"}
    assert names(lock, "3.12", "build") == {}
    # The tool on the compute node runs without the machine's packages.
    assert "packaging" in names(lock, "3.12", "tool")
    assert tomllib.loads(text)["tool"]["envbuilder"]["provided"] == sorted(provided["packages"])


def test_a_requirement_that_the_provided_version_does_not_meet_is_refused(
    server: IndexServer, make: Make
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["torch>=2.5"])
    for version in ("2.0", "2.6"):
        make_wheel(server.folder, "torch", version)

    with pytest.raises(InputError, match="No versions fit") as caught:
        make(provided={"packages": ["torch==2.0"]})

    assert "torch" in caught.value.context["uv"]


def test_exclusions_are_recorded_and_one_in_vain_is_warned_of(
    server: IndexServer, make: Make, notebook: Notebook
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["unused", "kernels"])
    make_sdist(server.folder, "kernels", "1.0", requires=["rare"])
    exclude = [{"package": package, "reason": "never imported"} for package in ("unused", "rare", "absent")]

    text = make(exclude=exclude, build={"kernels": {}})

    assert names(parse_lock("demo", text), "3.12", "runtime") == {"app": "1.0", "kernels": "1.0"}
    assert tomllib.loads(text)["tool"]["envbuilder"]["excluded"] == exclude
    # Without the exclusions nothing resolves ("unused" is nowhere): then none is called vain.
    assert notebook.warnings == []
    make_wheel(server.folder, "unused", "1.0")
    make(exclude=exclude, build={"kernels": {}})
    assert [warning.split()[2] for warning in notebook.warnings] == ["absent,"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"exclude": [{"package": "app", "reason": "no"}]}, "both requires and excludes app"),
        ({"index": {"other": "default"}}, "other, which nothing in demo requires"),
        ({"build": {"kernels": {}}}, "Nothing in demo requires kernels"),
        ({"requirements": ["kernels>9"], "build": {"kernels": {}}}, "no sdist .* of kernels>9"),
        ({"target": {"python": ">=4"}}, "No Python version"),
        ({"requirements": ["app>9"]}, "No versions fit the runtime requirements"),
    ],
)
def test_recipes_that_cannot_be_locked_are_the_inputs_fault_and_name_the_recipe_to_mend(
    server: IndexServer, make: Make, fields: dict[str, object], message: str
) -> None:
    make_wheel(server.folder, "app", "1.0")
    make_sdist(server.folder, "kernels", "1.0")

    with pytest.raises(InputError, match=message) as caught:
        make(**fields)

    assert "recipes/demo.toml" in caught.value.remedy


def test_an_sdist_without_requirements_is_refused_and_its_setup_py_never_runs(
    server: IndexServer, make: Make, tmp_path: Path
) -> None:
    canary = tmp_path / "canary"
    make_sdist(server.folder, "kernels", "1.0", pkg_info=False, setup_py=f"open({str(canary)!r}, 'w')")

    with pytest.raises(InputError) as caught:
        make(requirements=["kernels"], build={"kernels": {}})
    make(requirements=["kernels"], build={"kernels": {"requires": []}})

    assert "[build.kernels]" in caught.value.remedy
    assert not canary.exists()


@pytest.mark.parametrize(
    ("announced", "error"), [("0" * 64, IntegrityError), (None, EnvbuilderError)], ids=["wrong", "none"]
)
def test_an_sdist_must_have_the_hash_that_its_index_announces(
    server: IndexServer, make: Make, announced: str | None, error: type[EnvbuilderError]
) -> None:
    path = make_sdist(server.folder, "kernels", "1.0")
    server.announced_sha256[path.name] = announced

    with pytest.raises(error):
        make(requirements=["kernels"], build={"kernels": {}})


def test_the_trainers_requirements_are_in_the_runtime_group(server: IndexServer, make: Make) -> None:
    make_wheel(server.folder, "app", "1.0")
    for text in trainer_requires():
        make_wheel(server.folder, Requirement(text).name, "99.0")

    lock = parse_lock("demo", make(trainer=True))

    assert {Requirement(text).name for text in trainer_requires()} < set(names(lock, "3.12", "runtime"))


def test_every_python_of_the_recipe_finds_its_files_in_all_groups(server: IndexServer, make: Make) -> None:
    make_wheel(server.folder, "app", "1.0")

    lock = parse_lock("demo", make())

    for python in python_versions(recipe().target):
        assert {"app", "uv"} < set(names(lock, python, *GROUPS))


@pytest.mark.parametrize("resolver", ["uv", "pip-tools"])
def test_an_sdist_deep_in_the_closure_is_named_with_the_table_that_compiles_it(
    server: IndexServer, make: Make, resolver: str
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["middle"])
    make_wheel(server.folder, "middle", "1.0", requires=["Only.Source==1.*"])
    make_sdist(server.folder, "only-source", "1.2", requires=["helper"])
    make_wheel(server.folder, "only-source", "2.0")
    make_wheel(server.folder, "helper", "1.0")

    with pytest.raises(InputError) as caught:
        make(resolver)

    assert caught.value.context["no wheel"] == "only-source 1.2 is on the index default as an sdist alone"
    assert caught.value.remedy == (
        "Add [build.only-source] to recipes/demo.toml, so that it is compiled from its sdist."
    )
    # Which version that is, nobody has to look up: its newest would be 2.0.
    make_sdist(server.folder, "only-source", "2.0")
    lock = parse_lock("demo", make(resolver, build={"only-source": {}}))
    assert names(lock, "3.12", "runtime") == {
        "app": "1.0",
        "middle": "1.0",
        "only-source": "1.2",
        "helper": "1.0",
    }


@pytest.mark.parametrize("sdist", [True, False], ids=["with-sdist", "without"])
@pytest.mark.parametrize("resolver", ["uv", "pip-tools"])
def test_wheels_for_a_newer_glibc_alone_are_named_with_that_glibc(
    server: IndexServer, make: Make, resolver: str, sdist: bool
) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["native>1"])
    make_wheel(server.folder, "native", "1.0", tag="cp38-abi3-manylinux_2_17_x86_64")
    for minor in (31, 34):
        make_wheel(server.folder, "native", "2.0", tag=f"cp38-abi3-manylinux_2_{minor}_x86_64")
    make_wheel(server.folder, "native", "2.0", tag="cp313-cp313t-manylinux_2_17_x86_64")
    if sdist:
        make_sdist(server.folder, "native", "2.0")

    with pytest.raises(InputError) as caught:
        make(resolver)

    assert caught.value.context["no wheel"] == "native 2.0 has wheels for glibc 2.31 and newer alone"
    assert 'glibc = "2.31" under [target] in recipes/demo.toml' in caught.value.remedy


@pytest.mark.parametrize("resolver", ["uv", "pip-tools"])
def test_wheels_for_other_pythons_alone_are_named(server: IndexServer, make: Make, resolver: str) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["native"])
    make_wheel(server.folder, "native", "2.0", tag="cp313-cp313-manylinux_2_17_x86_64")

    with pytest.raises(InputError) as caught:
        make(resolver)

    assert caught.value.context["no wheel"] == "native 2.0 has no wheel for Python 3.11 on x86_64"
    assert "without native 2.0" in caught.value.remedy


def test_an_older_version_than_the_recipe_admits_is_locked_with_a_warning_that_says_why(
    server: IndexServer, make: Make, notebook: Notebook
) -> None:
    make_wheel(server.folder, "app", "1.0")
    make_wheel(server.folder, "app", "2.0", requires=["only-source"])
    make_wheel(server.folder, "app", "3.0", requires=["absent"])
    make_wheel(server.folder, "app", "4.0rc1")
    server.yanked.add(make_wheel(server.folder, "app", "5.0").name)
    make_sdist(server.folder, "only-source", "1.0")

    lock = parse_lock("demo", make())

    assert names(lock, "3.12", "runtime") == {"app": "1.0"}
    (warning,) = notebook.warnings  # one for both Pythons
    assert warning.startswith("app 1.0 is locked, though demo admits 3.0. 3.0: Because absent was not found")
    assert (
        "2.0: only-source 1.0 is on the index default as an sdist alone. Add [build.only-source]" in warning
    )
    notebook.warnings.clear()
    make(requirements=["app<2"])
    assert notebook.warnings == []


def test_a_package_that_gives_way_to_another_is_warned_of_too(
    server: IndexServer, make: Make, notebook: Notebook
) -> None:
    make_wheel(server.folder, "app", "2.0", requires=["dep<2"])
    for version in ("1.0", "2.0"):
        make_wheel(server.folder, "dep", version)
    make_wheel(server.folder, "app", "1.0")

    lock = parse_lock("demo", make(requirements=["app", "dep"]))

    assert names(lock, "3.12", "runtime") == {"app": "2.0", "dep": "1.0"}
    assert notebook.warnings == [
        "dep 1.0 is locked, though demo admits 2.0. "
        "2.0 fits, with older versions of others: require dep==2.0 to have it."
    ]


def test_an_extra_that_the_chosen_version_lacks_is_refused(server: IndexServer, make: Make) -> None:
    make_wheel(server.folder, "app", "1.0")
    make_wheel(server.folder, "app", "2.0", requires=["only-source; extra == 'fast'"])
    make_sdist(server.folder, "only-source", "1.0")

    with pytest.raises(InputError, match=r"app 1\.0, .* has no extra fast") as caught:
        make(requirements=["app[fast]"])

    assert "app[fast]>1.0" in caught.value.remedy
    with pytest.raises(InputError) as caught:
        make(requirements=["app[fast]>1.0"])
    assert "[build.only-source]" in caught.value.remedy


def test_a_source_package_is_never_locked_in_the_version_of_a_wheel(server: IndexServer, make: Make) -> None:
    make_wheel(server.folder, "app", "1.0", requires=["kernels<2"])
    make_wheel(server.folder, "kernels", "1.5")
    make_wheel(server.folder, "kernels", "3.0")
    for version in ("1.0", "2.0"):
        make_sdist(server.folder, "kernels", version)

    def locked(*requirements: str) -> tuple[str, str]:
        text = make(requirements=[*requirements], build={"kernels": {}})
        package = next(p for p in tomllib.loads(text)["packages"] if p["name"] == "kernels")
        return package["version"], package["sdist"]["name"]

    assert locked("app") == ("1.0", "kernels-1.0.tar.gz")
    assert locked("kernels") == ("2.0", "kernels-2.0.tar.gz")
    with pytest.raises(InputError, match="No versions fit") as caught:
        locked("app", "kernels>=2")
    assert "[build.kernels] takes 2.0" in caught.value.remedy


def test_of_a_versions_wheels_the_highest_build_is_locked_and_no_yanked_file(
    server: IndexServer, make: Make
) -> None:
    files = [
        make_wheel(server.folder, "app", "1.0", tag=tag).name
        for tag in ("py3-none-any", "2-py3-none-any", "10-py3-none-any", "11-py3-none-any")
    ]
    server.yanked.add(files[-1])

    package = next(p for p in tomllib.loads(make())["packages"] if p["name"] == "app")

    assert [wheel["name"] for wheel in package["wheels"]] == ["app-1.0-10-py3-none-any.whl"]


@pytest.mark.parametrize("resolver", ["uv", "pip-tools"])
def test_a_requirement_by_url_in_a_wheel_is_the_inputs_fault(
    server: IndexServer, make: Make, resolver: str
) -> None:
    direct = make_wheel(server.folder, "direct", "1.0")
    make_wheel(server.folder, "app", "1.0", requires=[f"direct @ {server.file_url(direct.name)}"])

    with pytest.raises(InputError, match=r"No versions fit|by a URL"):
        make(resolver)


def test_an_sdist_for_a_python_that_cannot_be_read_is_for_all(server: IndexServer, make: Make) -> None:
    path = make_sdist(server.folder, "kernels", "1.0")
    server.requires_python[path.name] = ">=3.6.*"

    lock = parse_lock("demo", make(requirements=["kernels"], build={"kernels": {}}))

    assert names(lock, "3.12", "runtime") == {"kernels": "1.0"}

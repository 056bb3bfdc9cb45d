"""What sdists say about themselves, from real archives, sound and hostile."""

from __future__ import annotations

import gzip
import io
import random
import tarfile
from pathlib import Path

import pytest
from packaging.version import Version

from envbuilder.errors import InputError
from envbuilder.sdist import read_metadata
from tests.lab.packages import make_sdist


def test_pkg_info_is_believed_first(tmp_path: Path) -> None:
    path = make_sdist(tmp_path, "Some.Thing", "1.0", requires=["torch", "einops>=0.7"], egg_info=True)

    metadata = read_metadata(path)

    assert (metadata.name, metadata.version) == ("some-thing", "1.0")
    assert metadata.requires == ("torch", "einops>=0.7")
    assert metadata.build_requires == ("setuptools",)
    assert (metadata.source, metadata.note) == ("PKG-INFO", None)


def test_dynamic_requirements_are_taken_with_a_note(tmp_path: Path) -> None:
    metadata = read_metadata(make_sdist(tmp_path, "thing", "1.0", requires=["torch"], dynamic=True))

    assert metadata.requires == ("torch",)
    assert "may change" in (metadata.note or "")


def test_modern_metadata_that_names_none_and_is_not_dynamic_requires_nothing(tmp_path: Path) -> None:
    metadata = read_metadata(make_sdist(tmp_path, "thing", "1.0"))

    assert (metadata.requires, metadata.source, metadata.note) == ((), "PKG-INFO", None)


def test_old_metadata_falls_back_to_egg_infos_requires_txt_with_a_note(tmp_path: Path) -> None:
    path = make_sdist(tmp_path, "thing", "1.0", requires=["torch"], pkg_info=False, egg_info=True)

    metadata = read_metadata(path)

    assert (metadata.requires, metadata.source) == (("torch",), "thing.egg-info/requires.txt")
    assert "no Requires-Dist" in (metadata.note or "")


def test_old_metadata_beside_an_egg_info_without_requires_txt_requires_nothing(tmp_path: Path) -> None:
    # setuptools leaves that file out where there is nothing to write into it.
    files = {"src/thing.egg-info/PKG-INFO": "Metadata-Version: 1.1\nName: thing\nVersion: 1.0\n"}

    metadata = read_metadata(make_sdist(tmp_path, "thing", "1.0", pkg_info=False, files=files))

    assert (metadata.requires, metadata.source) == ((), "src/thing.egg-info/PKG-INFO")
    assert "names a requirement" in (metadata.note or "")


def test_the_sections_of_requires_txt_become_markers(tmp_path: Path) -> None:
    text = (
        'torch\n[:python_version < "3.12"]\ntomli\n\n[dev]\npytest\n[fast:sys_platform == "linux"]\nnumba\n'
    )
    path = make_sdist(
        tmp_path, "thing", "1.0", pkg_info=False, files={"src/thing.egg-info/requires.txt": text}
    )

    assert read_metadata(path).requires == (
        "torch",
        'tomli ; (python_version < "3.12")',
        'pytest ; extra == "dev"',
        'numba ; extra == "fast" and (sys_platform == "linux")',
    )


@pytest.mark.parametrize("dynamic", [False, True])
def test_an_sdist_that_says_nothing_is_refused_with_the_key_to_add(tmp_path: Path, dynamic: bool) -> None:
    canary = tmp_path / "canary"
    setup_py = f"open({str(canary)!r}, 'w')"
    path = make_sdist(tmp_path, "thing", "1.0", pkg_info=dynamic, dynamic=dynamic, setup_py=setup_py)

    with pytest.raises(InputError, match=r"Nothing in thing-1\.0\.tar\.gz says") as caught:
        read_metadata(path)

    assert "[build.thing]" in caught.value.remedy
    assert caught.value.exit_code == 3
    assert not canary.exists()


def test_the_recipes_requirements_override_the_sdists(tmp_path: Path) -> None:
    path = make_sdist(tmp_path, "thing", "1.0", requires=["wrong"])

    metadata = read_metadata(path, requires=["right"])

    assert (metadata.requires, metadata.source) == (("right",), "recipe")
    assert read_metadata(make_sdist(tmp_path, "mute", "1.0", pkg_info=False), requires=[]).requires == ()


def test_without_pyproject_toml_setuptools_builds_it(tmp_path: Path) -> None:
    assert read_metadata(make_sdist(tmp_path, "thing", "1.0", setup_py="")).build_requires == (
        "setuptools",
        "wheel",
    )


@pytest.mark.parametrize(
    "pyproject",
    ["[build-system", '[build-system]\nrequires = "setuptools"', "[build-system]\nrequires = ['$']"],
)
def test_a_broken_pyproject_toml_is_refused(tmp_path: Path, pyproject: str) -> None:
    path = make_sdist(tmp_path, "thing", "1.0", files={"pyproject.toml": pyproject})

    with pytest.raises(InputError, match="not an sdist that can be read"):
        read_metadata(path)


def test_a_requirement_by_url_is_refused(tmp_path: Path) -> None:
    path = make_sdist(tmp_path, "thing", "1.0", requires=["dep @ git+https://127.0.0.1/dep"])

    with pytest.raises(InputError, match="by a URL") as caught:
        read_metadata(path)

    assert "[build.thing]" in caught.value.remedy


@pytest.mark.parametrize("data", [b"", b"no archive", b"\x1f\x8b\x08\x00torn"])
def test_what_is_no_archive_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "thing-1.0.tar.gz"
    path.write_bytes(data)

    with pytest.raises(InputError, match=r"thing-1\.0\.tar\.gz is not an sdist"):
        read_metadata(path)


def test_a_torn_archive_is_refused(tmp_path: Path) -> None:
    path = make_sdist(tmp_path, "thing", "1.0", files={"A": random.Random(0).randbytes(50_000)})
    path.write_bytes(path.read_bytes()[:25_000])

    with pytest.raises(InputError, match="not an sdist"):
        read_metadata(path)


def hostile(folder: Path, *members: tarfile.TarInfo) -> Path:
    path = folder / "thing-1.0.tar.gz"
    # Headers alone: tarfile writes none whose bytes don't follow, as those of a false size never do.
    headers = b"".join(member.tobuf(tarfile.GNU_FORMAT) for member in members)
    path.write_bytes(gzip.compress(headers + bytes(2 * tarfile.BLOCKSIZE)))
    return path


def member(name: str, kind: bytes = tarfile.REGTYPE, target: str = "", size: int = 0) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, target, size
    return entry


def test_metadata_that_is_a_link_is_refused_and_not_followed(tmp_path: Path) -> None:
    path = hostile(tmp_path, member("thing-1.0/PKG-INFO", tarfile.SYMTYPE, "/etc/hostname"))

    with pytest.raises(InputError, match="no plain file"):
        read_metadata(path)


def test_metadata_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    twice = [member("thing-1.0/PKG-INFO"), member("thing-1.0/PKG-INFO")]

    with pytest.raises(InputError, match="doubled"):
        read_metadata(hostile(tmp_path, *twice))


def test_an_archive_that_claims_to_unpack_to_terabytes_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="too large"):
        read_metadata(hostile(tmp_path, member("thing-1.0/data", size=1 << 42)))


def test_metadata_outside_the_top_folder_is_not_looked_at(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no PKG-INFO"):
        read_metadata(hostile(tmp_path, member("PKG-INFO"), member("thing-1.0/deep/er/PKG-INFO")))


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2", "2.3", "2.4", "2.5"])
def test_requirements_of_pkg_info_are_believed_whatever_the_metadata_version(
    tmp_path: Path, version: str
) -> None:
    text = f"Metadata-Version: {version}\nName: thing\nVersion: 1.0\nRequires-Dist: torch (>=2)\n"
    path = make_sdist(tmp_path, "thing", "1.0", setup_py="")
    replace_member(path, "PKG-INFO", text)

    metadata = read_metadata(path)

    assert (metadata.requires, metadata.source, metadata.note) == (("torch (>=2)",), "PKG-INFO", None)


@pytest.mark.parametrize("version", ["1.0", "1.1", "1.2", "2.0", "2.1", "2.2", "2.3", "2.4", "2.5"])
def test_no_requirements_in_pkg_info_mean_none_from_metadata_2_2_on(tmp_path: Path, version: str) -> None:
    text = f"Metadata-Version: {version}\nName: thing\nVersion: 1.0\n"
    path = make_sdist(tmp_path, "thing", "1.0", setup_py="")
    replace_member(path, "PKG-INFO", text)

    if Version(version) >= Version("2.2"):
        assert read_metadata(path).requires == ()
    else:
        with pytest.raises(InputError, match="Nothing in"):
            read_metadata(path)


@pytest.mark.parametrize("text", ["Metadata-Version: new\nName: a\nVersion: 1\n", "Name: a\nVersion: one\n"])
def test_a_pkg_info_with_versions_that_are_none_is_refused(tmp_path: Path, text: str) -> None:
    path = make_sdist(tmp_path, "thing", "1.0", setup_py="")
    replace_member(path, "PKG-INFO", text)

    with pytest.raises(InputError, match="not an sdist that can be read"):
        read_metadata(path)


PROJECT = """
[build-system]
requires = ["hatchling"]
[project]
name = "Some.Thing"
version = "1.0.0"
dependencies = ["torch>=2", "tomli; python_version < '3.11'"]
[project.optional-dependencies]
dev = ["pytest", "numba; sys_platform == 'linux'"]
"""


def test_a_tree_without_pkg_info_is_read_from_its_static_project_table(tmp_path: Path) -> None:
    path = tree(tmp_path, {"pyproject.toml": PROJECT})

    metadata = read_metadata(path)

    assert (metadata.name, metadata.version) == ("some-thing", "1.0.0")
    assert metadata.requires == (
        "torch>=2",
        "tomli; python_version < '3.11'",
        'pytest ; extra == "dev"',
        "numba ; (sys_platform == 'linux') and extra == \"dev\"",
    )
    assert (metadata.source, metadata.build_requires, metadata.note) == (
        "pyproject.toml",
        ("hatchling",),
        None,
    )


def test_what_a_project_table_calls_dynamic_must_be_in_the_recipe(tmp_path: Path) -> None:
    head = '[project]\nname = "thing"\n'
    path = tree(tmp_path, {"pyproject.toml": f'{head}dynamic = ["version"]\n'})
    with pytest.raises(InputError, match="states its version") as caught:
        read_metadata(path)
    assert 'under [build.thing]: version = "…"' in caught.value.remedy
    assert read_metadata(path, version="2.0").version == "2.0"

    path = tree(tmp_path, {"pyproject.toml": f'{head}version = "1.0"\ndynamic = ["dependencies"]\n'})
    with pytest.raises(InputError, match="says what thing requires"):
        read_metadata(path)
    assert read_metadata(path, requires=["torch"]).requires == ("torch",)

    path = tree(tmp_path, {"pyproject.toml": f'{head}version = "1.0"\ndynamic = ["optional-dependencies"]\n'})
    metadata = read_metadata(path)
    assert metadata.requires == ()
    assert "extras are dynamic" in (metadata.note or "")


def test_a_tree_with_a_setup_py_alone_takes_all_from_the_recipe_and_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    # An egg-info that somebody committed may be of any age: it is not believed.
    files = {"setup.py": f"open({str(canary)!r}, 'w')", "thing.egg-info/requires.txt": "old\n"}
    path = tree(tmp_path, files)

    with pytest.raises(InputError, match="states its version"):
        read_metadata(path, name="thing")
    with pytest.raises(InputError, match="says what thing requires"):
        read_metadata(path, name="thing", version="1.0")
    metadata = read_metadata(path, name="thing", version="1.0", requires=["torch"])

    assert (metadata.name, metadata.version, metadata.requires) == ("thing", "1.0", ("torch",))
    assert metadata.build_requires == ("setuptools", "wheel")
    assert not canary.exists()


def test_a_version_that_the_recipe_contradicts_is_refused(tmp_path: Path) -> None:
    path = tree(tmp_path, {"pyproject.toml": PROJECT})

    assert read_metadata(path, version="1.0").version == "1.0.0"
    with pytest.raises(InputError, match=r"calls itself version 1\.0\.0, not 2\.0"):
        read_metadata(path, version="2.0")


@pytest.mark.parametrize(
    "project",
    [
        "project = 1",
        "[project]",
        '[project]\nname = "thing"\nversion = 1',
        '[project]\nname = "thing"\nversion = "one"',
        '[project]\nname = "thing"\nversion = "1"\ndependencies = "torch"',
        '[project]\nname = "thing"\nversion = "1"\ndependencies = ["$"]',
        '[project]\nname = "thing"\nversion = "1"\ndynamic = "version"',
        '[project]\nname = "thing"\nversion = "1"\noptional-dependencies = ["a"]',
        '[project]\nname = "thing"\nversion = "1"\n[project.optional-dependencies]\na = "b"',
    ],
)
def test_a_broken_project_table_is_refused(tmp_path: Path, project: str) -> None:
    with pytest.raises(InputError, match="not an sdist that can be read"):
        read_metadata(tree(tmp_path, {"pyproject.toml": project}))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("License-Expression: Apache-2.0\nLicense: other\n", "Apache-2.0"),
        ("License: BSD 3-Clause\nClassifier: License :: OSI Approved :: MIT License\n", "BSD 3-Clause"),
        ("License: Long\n        text\nClassifier: License :: OSI Approved :: MIT License\n", "MIT"),
        (f"License: {'x' * 500}\n", None),
        ("License: UNKNOWN\n", None),
        (
            "Classifier: License :: OSI Approved :: MIT License\n"
            "Classifier: Programming Language :: C++\n"
            "Classifier: License :: OSI Approved :: BSD License\n",
            "MIT, BSD License",
        ),
        ("", None),
    ],
)
def test_the_license_is_its_expression_else_its_name_else_its_classifiers(
    tmp_path: Path, lines: str, expected: str | None
) -> None:
    path = make_sdist(tmp_path, "thing", "1.0")
    replace_member(path, "PKG-INFO", f"Metadata-Version: 2.4\nName: thing\nVersion: 1.0\n{lines}")

    assert read_metadata(path).license == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('license = "MIT"', "MIT"),
        ('license = {text = "BSD"}', "BSD"),
        (
            'license = {file = "LICENSE"}\nclassifiers = ["License :: OSI Approved :: MIT License"]',
            "MIT",
        ),
        ("", None),
    ],
)
def test_the_license_of_a_tree_is_its_project_tables(tmp_path: Path, line: str, expected: str | None) -> None:
    text = f'[project]\nname = "thing"\nversion = "1.0"\n{line}\n'

    assert read_metadata(tree(tmp_path, {"pyproject.toml": text})).license == expected


@pytest.mark.parametrize(
    "setup_py",
    [
        "from setuptools import setup\nsetup(name='thing', setup_requires=['ninja', 'psutil>=5'])",
        "import setuptools\npattern = '\\d'\nsetuptools.setup(setup_requires=('ninja', 'psutil>=5'))",
        "setup(setup_requires='ninja\\npsutil>=5\\n')",
        "# -*- coding: latin-1 -*-\nauthor = '\xe9'\nsetup(setup_requires=['ninja', 'psutil>=5'])".encode(
            "latin-1"
        ),
    ],
)
def test_setup_requires_that_are_written_out_are_build_requirements(
    tmp_path: Path, setup_py: str | bytes
) -> None:
    path = make_sdist(tmp_path, "thing", "1.0", requires=["torch"], files={"setup.py": setup_py})

    metadata = read_metadata(path)

    assert metadata.build_requires == ("setuptools", "ninja", "psutil>=5")
    assert metadata.note is None


@pytest.mark.parametrize("setup_py", ["setup(setup_requires=needs())", "print 'old'", "(" * 5000, "\0"])
def test_a_setup_py_that_cannot_be_read_is_noted(tmp_path: Path, setup_py: str) -> None:
    metadata = read_metadata(make_sdist(tmp_path, "thing", "1.0", files={"setup.py": setup_py}))

    assert metadata.build_requires == ("setuptools",)
    assert "setup_requires" in (metadata.note or "")


def tree(folder: Path, files: dict[str, str]) -> Path:
    """A tree as it is packed from git: without PKG-INFO."""
    path = folder / "thing-0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            entry = member(f"thing-0/{name}", size=len(text.encode()))
            archive.addfile(entry, io.BytesIO(text.encode()))
    return path


def replace_member(path: Path, name: str, text: str) -> None:
    """Gives the member `name` of the sdist another text."""
    with tarfile.open(path) as archive:
        contents = {entry.name: archive.extractfile(entry).read() for entry in archive}  # type: ignore[union-attr]
    with tarfile.open(path, "w:gz") as archive:
        for inner, content in contents.items():
            data = text.encode() if inner.partition("/")[2] == name else content
            archive.addfile(member(inner, size=len(data)), io.BytesIO(data))

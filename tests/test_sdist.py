"""What sdists say about themselves, from real archives, sound and hostile."""

from __future__ import annotations

import gzip
import random
import tarfile
from pathlib import Path

import pytest

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

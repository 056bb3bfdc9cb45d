"""Promises 15 to 17: hostile archives, code that must not run, and an index that has no say."""

from __future__ import annotations

import gzip
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest

from envbuilder.lock import read_lock
from envbuilder.target import target_for
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist, make_wheel
from tests.promises.commands import Workplace, files_below
from tests.promises.conftest import MINOR, SOURCE, TARGET, plain_files, publish_plain, publish_tools

TOO_LARGE = 5 << 30
"""Bytes."""


def member(name: str, content: bytes = b"evil", **fields: object) -> bytes:
    """A tar member; `fields` are those of TarInfo."""
    info = tarfile.TarInfo(name)
    info.size = len(content)
    for field, value in fields.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT) + content + bytes(-len(content) % 512)


def hostile_members(top: str, there: str, evil: Path) -> dict[str, bytes]:
    """What no archive may hold, by kind; `there` is a member below `top` that it has already."""
    return {
        "dots": member(f"{top}/../../evil"),
        "an absolute path": member(str(evil)),
        "a symbolic link out": member(f"{top}/evil", b"", type=tarfile.SYMTYPE, linkname=str(evil)),
        "a hard link out": member(f"{top}/evil", b"", type=tarfile.LNKTYPE, linkname="../../evil"),
        "a file through a link": member(f"{top}/up", b"", type=tarfile.SYMTYPE, linkname="..")
        + member(f"{top}/up/evil"),
        "a device": member(f"{top}/evil", b"", type=tarfile.CHRTYPE, devmajor=1, devminor=3),
        "a pipe": member(f"{top}/evil", b"", type=tarfile.FIFOTYPE),
        "a duplicate": member(there),
        "an over-long path": member(f"{top}/" + "d/" * 3000 + "evil"),
        "a bomb": member(f"{top}/evil", b"", size=TOO_LARGE),
    }


KINDS = tuple(hostile_members("", "", Path("/")))


def workplace(folder: Path, server: IndexServer, recipe: str, name: str = "source") -> Workplace:
    place = Workplace(folder / "place", {"PIP_INDEX_URL": server.url})
    place.add(name, recipe)
    return place


@pytest.mark.parametrize("kind", KINDS)
def test_promise_15_a_hostile_sdist_is_refused_and_nothing_is_unpacked(
    tmp_path: Path, server: IndexServer, kind: str
) -> None:
    """Tar or zip members with `..`, absolute paths, links that leave the tree, devices, duplicates, or a bomb
    → refused, nothing unpacked."""
    publish_tools(server.folder)
    make_wheel(server.folder, "one", "1.0")
    sdist = publish_plain(server.folder)
    good = gzip.decompress(sdist.read_bytes()).rstrip(b"\0")
    good += bytes(-len(good) % 512)
    evil = tmp_path / "evil"
    hostile = hostile_members("plain-1.0", "plain-1.0/backend.py", evil)[kind]
    sdist.write_bytes(gzip.compress(good + hostile + bytes(1024)))

    place = workplace(tmp_path, server, SOURCE)
    for command in ("lock", "fetch", "compile"):
        ended = place.run(command, place.recipe("source"))
        if ended.code:
            break
    assert ended.code in (3, 5), ended
    assert "plain-1.0.tar.gz" in ended.told["message"]
    assert not list(tmp_path.rglob("evil"))
    assert not list(tmp_path.rglob("backend.py"))
    assert not place.root.wheelhouse.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_promise_15_a_hostile_packed_bundle_is_refused_and_nothing_is_unpacked(
    place: Workplace, tmp_path: Path, kind: str
) -> None:
    """Tar or zip members with `..`, absolute paths, links that leave the tree, devices, duplicates, or a bomb
    → refused, nothing unpacked."""
    place.succeed("fetch", place.recipe("small"))
    archive = tmp_path / "small.tar"
    place.succeed("bundle", "pack", "small", "--output", archive)
    there = "small/models/tiny/config.json"
    evil = tmp_path / "evil"
    content = archive.read_bytes()
    start = content.index(there.encode() + b"\0")
    archive.write_bytes(content[:start] + hostile_members("small", there, evil)[kind] + content[start:])

    root = tmp_path / "cluster" / "root"
    ended = place.run("--root", root, "bundle", "unpack", archive)
    assert ended.code == 5, ended
    assert not list(tmp_path.rglob("evil"))
    assert files_below(tmp_path / "cluster") == {}


@pytest.mark.parametrize("kind", ["dots", "absolute", "link", "duplicate"])
@pytest.mark.filterwarnings("ignore:Duplicate name")  # zipfile's own, while such a wheel is made
def test_promise_15_a_hostile_wheel_is_refused_and_nothing_is_installed(
    tmp_path: Path, server: IndexServer, kind: str
) -> None:
    """Tar or zip members with `..`, absolute paths, links that leave the tree, devices, duplicates, or a bomb
    → refused, nothing unpacked."""
    publish_tools(server.folder)
    name = {"dots": "one/../../../../../../evil", "absolute": f"{tmp_path}/evil", "link": "evil"}.get(
        kind, "one.py"
    )
    wheel = make_wheel(server.folder, "one", "1.0", files={"one.py": ""})
    with zipfile.ZipFile(wheel, "a") as archive:
        evil = zipfile.ZipInfo(name)
        evil.external_attr = (0o120777 if kind == "link" else 0o100644) << 16
        archive.writestr(evil, "../../../../../evil")
    place = workplace(tmp_path, server, f'name = "source"\nrequirements = ["one"]\n{TARGET}')
    for command in ("lock", "fetch"):
        place.succeed(command, place.recipe("source"))
    ended = place.run("install", place.recipe("source"))
    assert ended.code == 5, ended
    assert wheel.name in ended.told["message"]
    assert not list(tmp_path.rglob("evil"))
    assert not place.root.env("source").exists()


def test_promise_16_the_code_of_an_sdist_does_not_run_before_compile_and_then_sees_nothing(
    tmp_path: Path, server: IndexServer
) -> None:
    """A hostile `setup.py` never runs under lock, fetch or doctor; under compile it has no network, no home
    directory, no tokens in its environment. A canary sdist proves it."""
    publish_tools(server.folder)
    make_wheel(server.folder, "one", "1.0")
    ran = tmp_path / "ran"
    mark = f"with open({str(ran)!r}, 'a') as mark:\n    mark.write(__file__)\n"
    files = plain_files()
    files["backend.py"] = mark + files["backend.py"]
    files["port.txt"] = server.origin.rpartition(":")[2]
    for code in ("setup.py", "conftest.py", "sitecustomize.py", "plain/__init__.py"):
        files[code] = mark
    make_sdist(server.folder, "plain", "1.0", files=files, requires=["one"])
    place = workplace(tmp_path, server, SOURCE).with_variables(
        HF_TOKEN="hf_secret", AWS_SECRET_ACCESS_KEY="secret", PIP_EXTRA_INDEX_URL=f"{server.url}#secret"
    )

    recipe = place.recipe("source")
    for resolver in ("uv", "pip-tools"):
        place.succeed("lock", recipe, "--resolver", resolver)
    place.succeed("fetch", recipe)
    place.succeed("bundle", "verify", "source")
    place.succeed("bundle", "sbom", "source")
    place.succeed("bundle", "pack", "source", "--output", tmp_path)
    assert place.run("doctor", recipe).code in (0, 8)
    assert not ran.exists()

    place.succeed("compile", recipe)
    assert place.run("doctor", recipe).code in (0, 8)
    assert Path(ran.read_text()).name == "backend.py"  # the canary lives
    (receipt,) = place.root.wheelhouse.glob("*/receipt.json")
    (wheel,) = place.root.wheelhouse.glob("*/*.whl")
    with zipfile.ZipFile(wheel) as built:
        seen = json.loads(built.read("plain_seen.json"))
    assert seen["reached"] is (json.loads(receipt.read_text())["isolation"] != "network-namespace")
    assert seen["home"] == []
    assert "secret" not in json.dumps(seen["environment"])


@pytest.mark.parametrize("resolver", ["uv", "pip-tools"])
@pytest.mark.parametrize("how", ["default", "extra-index-url", "find-links"])
def test_promise_17_another_index_has_no_say(
    tmp_path: Path, server: IndexServer, resolver: str, how: str
) -> None:
    """Two indexes, the wrong one offering version 99 → the pinned origin and hash only."""
    folder = tmp_path / "wrong"
    folder.mkdir()
    publish_tools(server.folder)
    right = make_wheel(server.folder, "one", "1.0")
    make_wheel(folder, "one", "99")
    make_wheel(folder, "one", "1.0", files={"one.py": "evil = True"})
    recipe = f'name = "source"\nrequirements = ["one"]\n{TARGET}'
    with IndexServer(folder) as wrong:
        if how == "default":
            publish_tools(folder)
            place = workplace(tmp_path, wrong, f'{recipe}[index]\none = "lab"\n')
            place = place.with_variables(ENVBUILDER_INDEX_LAB_URL=server.url)
        else:
            value = wrong.url if how == "extra-index-url" else str(folder)
            place = workplace(tmp_path, server, recipe)
            place = place.with_variables(**{f"PIP_{how.upper().replace('-', '_')}": value})
        place.succeed("lock", place.recipe("source"), "--resolver", resolver)
        lock = read_lock(place.lock("source"))
        chosen = {file.package: file for file in lock.select(target_for(lock.target, MINOR))}
        assert chosen["one"].version == "1.0"
        place.succeed("fetch", place.recipe("source"))
        brought = place.root.bundle("source") / "files" / right.name
        assert brought.read_bytes() == right.read_bytes()
        assert not [name for name in wrong.file_requests() if name.startswith("one-")]

        # What the right one has no more, the wrong one can't stand in for.
        right.unlink()
        shutil.rmtree(place.root.path)
        ended = place.run("fetch", place.recipe("source"))
        assert ended.code in (4, 5), ended
        assert not brought.exists()

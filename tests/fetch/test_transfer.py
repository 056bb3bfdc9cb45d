"""What is missing is listed for another tool, brought by the real one from loopback, and adopted offline."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from envbuilder.errors import UsageError
from envbuilder.fetch.export import FORMATS, Item
from envbuilder.recipe import load_recipe
from envbuilder.requirements import current_digest
from tests.conftest import Run
from tests.fetch.bundles import PYTHON, lock_of, sha256
from tests.lab.hub_server import HubServer
from tests.lab.index_server import Fault, IndexServer
from tests.lab.packages import make_sdist, make_wheel

INSTALLED = [
    tool for tool, program in (("wget",) * 2, ("curl",) * 2, ("aria2", "aria2c")) if shutil.which(program)
]
BIG = 3_000_000
"""Bytes of the wheel that is cut off on its way."""


@dataclass(frozen=True)
class Place:
    """A recipe with its lock, and the servers that have what it names."""

    recipe: Path
    server: IndexServer
    hub: HubServer
    folder: Path
    """Where commands run."""
    packages: list[Path]
    models: dict[str, Path]
    """Path in a bundle → the hub's file."""

    @property
    def bundle(self) -> Path:
        return self.folder / ".envbuilder/bundles/small"

    @property
    def store(self) -> Path:
        return self.folder / ".envbuilder/store"

    def asked(self) -> int:
        return len(self.server.requests) + len(self.hub.requests) + len(self.hub.content_requests)

    def bring_by_hand(self, to: Path) -> Path:
        """All files of the bundle, as somebody may have copied them."""
        (to / "wheels").mkdir(parents=True)
        for path in self.packages:
            shutil.copy(path, to / "wheels")
        for path, source in self.models.items():
            (to / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source, to / path)
        return to


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    served = tmp_path / "served"
    served.mkdir()
    packages = [
        make_wheel(served, "big", "1.0", files={"big.bin": os.urandom(BIG)}),
        make_wheel(served, "one", "1.0+cu130"),
        make_wheel(served, "needed-by-tool", "2.0"),
        make_sdist(served, "source", "3.0"),
    ]
    repos = {"first": tmp_path / "hub/owner/first", "second": tmp_path / "hub/owner/second"}
    for number, repo in enumerate(repos.values()):
        repo.mkdir(parents=True)
        # Files of two models have the same names; these two also the same size.
        (repo / "config.json").write_text(f'{{"number": {number}}}')
        (repo / "model.safetensors").write_bytes(os.urandom(200_000))
    recipe = tmp_path / "recipes/small.toml"
    recipe.parent.mkdir()
    models = "".join(f'[model.{name}]\nrepo = "owner/{name}"\n' for name in repos)
    recipe.write_text(f'name = "small"\nrequirements = ["anything"]\ntrainer = false\n{models}')
    with IndexServer(served) as server, HubServer(tmp_path / "hub") as hub:
        monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", server.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        tables = [
            {
                "name": name,
                "repo": f"owner/{name}",
                "commit": next(iter(hub.repos[f"owner/{name}"].commits)),
                "remote-code": [],
                "files": [
                    {"name": path.name, "size": path.stat().st_size, "sha256": sha256(path)}
                    for path in sorted(repo.iterdir())
                ],
            }
            for name, repo in repos.items()
        ]
        text = lock_of(packages, {"source": "build", "needed-by-tool": "tool"}, models=tables)
        (tmp_path / "lockfiles").mkdir()
        (tmp_path / "lockfiles/pylock.small.toml").write_text(
            text.replace("0" * 64, current_digest(load_recipe(recipe), {}), 1)
        )
        files = {
            f"models/{name}/{path.name}": path for name, repo in repos.items() for path in repo.iterdir()
        }
        yield Place(recipe, server, hub, tmp_path, packages, files)


def answer(run: Run, *words: str | Path) -> dict[str, Any]:
    """The JSON of a command; a failed one has an exit_code in it."""
    code, out, err = run("--json", *words)
    found: dict[str, Any] = json.loads(out or err)
    assert code == found.get("exit_code", 0), found
    return found


def fetch(run: Run, place: Place, *words: str | Path) -> dict[str, Any]:
    return answer(run, "fetch", place.recipe, "--python", PYTHON, *words)


def assert_whole(run: Run, place: Place) -> None:
    for path in place.packages:
        assert (place.bundle / "files" / path.name).read_bytes() == path.read_bytes()
    for name, path in place.models.items():
        assert (place.bundle / name).read_bytes() == path.read_bytes()
    assert "exit_code" not in answer(run, "bundle", "verify", "small")


@pytest.mark.parametrize("tool", INSTALLED)
def test_what_a_tool_brings_from_the_list_completes_the_bundle_without_network(
    run: Run, place: Place, tool: str
) -> None:
    listed = fetch(run, place, "--export-urls", tool, "--out", "list")
    assert (listed["files"], listed["git"], listed["local"]) == (8, [], [])
    assert listed["bytes"] == sum(path.stat().st_size for path in [*place.packages, *place.models.values()])
    assert place.server.file_requests() == []

    place.server.faults[place.packages[0].name] = [Fault(cut_after=BIG // 2)]
    command = FORMATS[tool].command_for(place.folder / "list", place.folder / "brought")
    for _ in range(2):  # curl doesn't go on by itself, and says how the last file ended alone
        subprocess.run(["sh", "-c", command], cwd=place.folder, capture_output=True)
    ranges = [headers.get("range", "") for path, headers in place.server.requests if "/files/big" in path]
    assert any(not text.startswith("bytes=0-") for text in ranges if text), ranges

    asked = place.asked()
    adopted = fetch(run, place, "--adopt", "brought")
    assert (adopted["files"], adopted["transferred_files"]) == (8, 0)
    assert place.asked() == asked
    assert_whole(run, place)
    assert fetch(run, place, "--export-urls", tool, "--out", "second")["file"] is None
    assert not (place.folder / "second").exists()
    assert "transferred 0 files" in run("fetch", place.recipe, "--python", PYTHON)[1]


@pytest.mark.parametrize("tool", INSTALLED)
def test_a_tool_that_runs_again_leaves_what_is_whole(place: Place, run: Run, tool: str) -> None:
    fetch(run, place, "--export-urls", tool, "--out", "list")
    command = FORMATS[tool].command_for(place.folder / "list", place.folder / "brought")
    done = subprocess.run(["sh", "-c", command], cwd=place.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    files = [path for path in (place.folder / "brought").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    assert len(before) == 8
    subprocess.run(["sh", "-c", command], cwd=place.folder, capture_output=True)
    assert {path: path.stat().st_mtime_ns for path in files} == before
    fetch(run, place, "--adopt", "brought")
    assert_whole(run, place)


def test_a_changed_file_and_a_missing_one_are_named_and_all_else_is_kept(run: Run, place: Place) -> None:
    brought = place.bring_by_hand(place.folder / "brought")
    big, one = brought / "wheels" / place.packages[0].name, brought / "wheels" / place.packages[1].name
    content = big.read_bytes()
    big.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = big.read_bytes()
    one.unlink()
    error = fetch(run, place, "--adopt", "brought")
    assert (error["error"], error["exit_code"]) == ("IntegrityError", 5)
    assert error["context"][f"brought/wheels/{big.name}"] == "other bytes than the lock names"
    assert set(error["context"]["missing"].split(", ")) == {f"files/{big.name}", f"files/{one.name}"}
    assert f"rm brought/wheels/{big.name}" in error["remedy"]
    assert f"envbuilder fetch {place.recipe} --python {PYTHON} --export-urls wget" in error["remedy"]
    assert big.read_bytes() == changed
    assert not (place.bundle / "bundle.json").exists()
    # What was right is in the store: only the two are listed, and bringing these is enough.
    assert fetch(run, place, "--export-urls", "curl")["files"] == 2
    shutil.rmtree(brought)
    brought.mkdir()
    for path in place.packages[:2]:
        shutil.copy(path, brought)
    assert fetch(run, place, "--adopt", "brought")["transferred_files"] == 0
    assert_whole(run, place)


def test_a_file_that_is_not_whole_yet_is_told_from_a_wrong_one(run: Run, place: Place) -> None:
    brought = place.bring_by_hand(place.folder / "brought")
    big = brought / "wheels" / place.packages[0].name
    os.truncate(big, 1000)
    error = fetch(run, place, "--adopt", "brought")
    assert error["error"] == "MismatchError"
    assert error["context"][f"brought/wheels/{big.name}"].startswith("1,000 of 3,")
    assert "rm " not in error["remedy"]


def test_an_unknown_file_is_named_and_left(run: Run, place: Place) -> None:
    brought = place.bring_by_hand(place.folder / "brought")
    (brought / "notes.txt").write_text("mine")
    code, out, err = run("fetch", place.recipe, "--python", PYTHON, "--adopt", "brought")
    assert code == 0, err
    assert "brought/notes.txt" in out.replace("\n", "")
    assert (brought / "notes.txt").read_text() == "mine"
    assert_whole(run, place)


def test_adopting_takes_no_second_copy_on_the_disk(run: Run, place: Place) -> None:
    brought = place.bring_by_hand(place.folder / "brought")
    fetch(run, place, "--adopt", "brought")
    big = place.packages[0]
    assert (place.store / sha256(big)).samefile(brought / "wheels" / big.name)


def test_a_link_of_the_user_is_followed_and_what_it_leads_to_left_alone(run: Run, place: Place) -> None:
    brought = place.bring_by_hand(place.folder / "brought")
    big = brought / "wheels" / place.packages[0].name
    elsewhere = big.rename(place.folder / "blob")
    big.symlink_to(elsewhere)
    mode = elsewhere.stat().st_mode
    fetch(run, place, "--adopt", "brought")
    assert_whole(run, place)
    assert not (place.store / sha256(elsewhere)).samefile(elsewhere)
    assert elsewhere.stat().st_mode == mode


def test_what_is_packed_from_git_is_said_to_have_no_url(run: Run, place: Place) -> None:
    path = place.folder / "lockfiles/pylock.small.toml"
    lock = tomllib.loads(path.read_text())
    (source,) = [package for package in lock["packages"] if package["name"] == "source"]
    source["tool"]["envbuilder"] = {"git": {"commit": "a" * 40, "submodules": {}}}
    path.write_text(tomli_w.dumps(lock))
    tree = place.packages[3].name
    listed = fetch(run, place, "--export-urls", "wget", "--out", "list")
    assert (listed["files"], listed["git"]) == (7, [tree])
    assert tree not in (place.folder / "list").read_text()
    assert (
        f"No URL leads to {tree}"
        in run("fetch", place.recipe, "--python", PYTHON, "--export-urls", "curl")[1]
    )

    brought = place.bring_by_hand(place.folder / "brought")
    kept = (brought / "wheels" / tree).rename(place.folder / tree)
    error = fetch(run, place, "--adopt", "brought")
    assert error["context"]["missing"] == "nothing else"
    assert f"files/{tree}" in error["context"]["packed from git, no URL leads to it"]
    # The same tree packs to the same bytes everywhere, so it can be brought from where git was.
    kept.rename(brought / tree)
    fetch(run, place, "--adopt", "brought")
    assert_whole(run, place)


def test_credentials_stay_out_of_the_list(run: Run, place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    url = place.server.url.replace("//", "//someone:secret@")
    monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", url)
    code, out, _ = run("fetch", place.recipe, "--python", PYTHON, "--export-urls", "aria2", "--out", "list")
    assert code == 0
    text = (place.folder / "list").read_text()
    assert place.server.file_url("big-1.0-py3-none-any.whl") in text
    assert "secret" not in text + out
    assert "machine 127.0.0.1 login USER password PASSWORD" in out
    assert (place.folder / "list").stat().st_mode & 0o077 == 0


def test_files_in_find_links_need_no_transfer(
    run: Run, place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    here = place.packages[1].rename(links / place.packages[1].name)
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    listed = fetch(run, place, "--export-urls", "wget", "--out", "list")
    assert (listed["files"], listed["local"]) == (7, [str(here)])


def test_each_format_is_what_its_tool_reads() -> None:
    item = Item("https://example.org/a/x%2B1.whl", "files/x+1.whl", 7, "ab" * 32)
    assert FORMATS["wget"].text([item]) == f"{item.url}\n"
    assert FORMATS["curl"].text([item]).endswith(f'url = "{item.url}"\noutput = "files/x+1.whl"\n')
    assert FORMATS["aria2"].text([item]) == (
        f"{item.url}\n  out=files/x+1.whl\n  checksum=sha-256={'ab' * 32}\n  continue=true\n"
    )


@pytest.mark.parametrize("url", ["https://example.org/get/17", "https://example.org/x-1.whl?key=1"])
def test_wget_is_given_no_url_that_would_rename_the_file(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        FORMATS["wget"].text([Item(url, "files/x-1.whl", 7, "ab" * 32)])
    assert "curl" in caught.value.remedy


@pytest.mark.parametrize(
    "words",
    [
        ("--export-urls", "ftp"),
        ("--export-urls", "wget", "--adopt", "brought"),
        ("--out", "list"),
    ],
)
def test_options_that_do_not_go_together_end_with_2(run: Run, place: Place, words: tuple[str, ...]) -> None:
    assert fetch(run, place, *words)["exit_code"] == 2


def test_a_folder_that_is_not_there_is_named(run: Run, place: Place) -> None:
    error = fetch(run, place, "--adopt", "nowhere")
    assert error["error"] == "InputError"
    assert "nowhere" in error["message"]


def test_an_adopted_bundle_counts_as_complete_only_when_it_is_proved(run: Run, place: Place) -> None:
    path = place.folder / "lockfiles/pylock.small.toml"
    path.write_text(
        path.read_text().replace("'build' in dependency_groups", "'runtime' in dependency_groups")
    )
    place.bring_by_hand(place.folder / "brought")
    error = fetch(run, place, "--adopt", "brought")
    assert error["error"] == "MismatchError"
    assert "requires anything, and the bundle alone" in error["message"]
    assert not (place.bundle / "bundle.json").exists()

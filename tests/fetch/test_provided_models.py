"""Models that the machine has: locked, verified where they lie, recorded, never copied."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from envbuilder.hash_record import HashRecord
from envbuilder.hub_files import ModelRepository
from envbuilder.lock import LockedModel, read_lock
from envbuilder.model_folder import lock_folder
from envbuilder.provided_models import locked_model
from envbuilder.recipe import ModelSpec, load_recipe
from envbuilder.report import Quiet
from envbuilder.requirements import current_digest
from tests.conftest import Run
from tests.fetch.bundles import PYTHON, sha256
from tests.lab.hub_server import HubServer
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel
from tests.promises.conftest import publish_tools

WEIGHTS = os.urandom(300_000)
FILES = {
    "README.md": b"---\nlicense: apache-2.0\n---\n",
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"never",
}
TAKEN = ["README.md", "config.json", "model.safetensors"]


@dataclass
class Place:
    """A recipe whose model the machine has, an index and a hub."""

    folder: Path
    hub: HubServer
    shared: Path
    """The model's folder on this machine."""

    @property
    def recipe(self) -> Path:
        return self.folder / "recipes/small.toml"

    @property
    def lock(self) -> Path:
        return self.folder / "lockfiles/pylock.small.toml"

    @property
    def bundle(self) -> Path:
        return self.folder / ".envbuilder/bundles/small"

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.bundle / "bundle.json").read_bytes())
        return found

    def write_recipe(self, *keys: str) -> None:
        self.recipe.parent.mkdir(exist_ok=True)
        table = "\n".join(("[model.tiny]", *keys)) if keys else ""
        self.recipe.write_text(
            'name = "small"\nrequirements = ["one"]\ntrainer = false\n'
            f'[target]\npython = "=={PYTHON}.*"\n{table}\n'
        )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    served, shared = tmp_path / "served", tmp_path / "shared/tiny"
    served.mkdir()
    publish_tools(served)
    make_wheel(served, "one", "1.0")
    repo = tmp_path / "hub/owner/tiny"
    repo.mkdir(parents=True)
    for name, content in FILES.items():
        (repo / name).write_bytes(content)
    shutil.copytree(repo, shared)
    with IndexServer(served) as server, HubServer(tmp_path / "hub") as hub:
        monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", server.url)
        monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
        place = Place(tmp_path, hub, shared)
        place.write_recipe('repo = "owner/tiny"', f'provided = "{shared}"')
        yield place


def answer(run: Run, *words: str | Path) -> dict[str, Any]:
    """The JSON of a command; a failed one has an exit_code in it."""
    code, out, err = run("--json", *words)
    found: dict[str, Any] = json.loads(out or err)
    assert code == found.get("exit_code", 0), found
    return found


def refusal(run: Run, kind: str, *words: str | Path) -> dict[str, Any]:
    found = answer(run, *words)
    assert found.get("error") == kind, found
    return found


class Told(Quiet):
    """Keeps how many bytes there were to read; may end the work when half of them are done."""

    def __init__(self, *, cut_off: bool) -> None:
        self.cut_off, self.total = cut_off, 0

    def progress(self, label: str, done: int, total: int, unit: str) -> None:
        self.total = total
        if self.cut_off and 2 * done > total:
            raise KeyboardInterrupt


def state(folder: Path) -> dict[str, tuple[int, int]]:
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in folder.iterdir()}


def test_a_provided_model_is_verified_where_it_lies_and_nothing_of_it_is_copied(
    run: Run, place: Place
) -> None:
    before = state(place.shared)
    answer(run, "lock", place.recipe)
    (model,) = read_lock(place.lock).models
    assert (model.repo, model.license) == ("owner/tiny", "apache-2.0")
    assert [file.name for file in model.files] == TAKEN
    assert str(place.shared) not in place.lock.read_text()

    fetched = answer(run, "fetch", place.recipe)
    assert fetched["provided_models"] == {"tiny": str(place.shared)}
    assert place.hub.content_requests == []
    assert not list(place.bundle.rglob("*.safetensors"))
    assert not (place.folder / ".envbuilder/store" / hashlib.sha256(WEIGHTS).hexdigest()).exists()
    assert place.record()["provided_models"] == {"tiny": str(place.shared)}
    assert "tiny" in run("fetch", place.recipe)[1]
    verified = answer(run, "bundle", "verify", "small")
    own = [path for path in place.bundle.rglob("*") if path.is_file() and path.name != "bundle.json"]
    assert verified["files"] == len(own) + len(TAKEN)
    assert state(place.shared) == before


def test_a_path_does_not_outdate_a_lock_and_without_it_a_copy_is_fetched(run: Run, place: Place) -> None:
    answer(run, "lock", place.recipe)
    answer(run, "fetch", place.recipe)
    moved = place.shared.rename(place.folder / "shared/elsewhere")
    place.write_recipe('repo = "owner/tiny"', f'provided = "{moved}"')
    assert "exit_code" not in answer(run, "lock", "--check", place.recipe)
    answer(run, "fetch", place.recipe)
    assert place.record()["provided_models"] == {"tiny": str(moved)}

    place.write_recipe('repo = "owner/tiny"')
    assert "exit_code" not in answer(run, "lock", "--check", place.recipe)
    assert answer(run, "fetch", place.recipe)["transferred_files"] == len(TAKEN)
    assert (place.bundle / "models/tiny/model.safetensors").read_bytes() == WEIGHTS
    assert place.record()["provided_models"] == {}

    # And back: the copy goes out of the bundle.
    place.write_recipe('repo = "owner/tiny"', f'provided = "{moved}"')
    answer(run, "fetch", place.recipe)
    assert not (place.bundle / "models/tiny/model.safetensors").exists()
    assert "exit_code" not in answer(run, "bundle", "verify", "small")


def test_a_recipe_without_provided_has_the_digest_that_it_always_had(place: Place) -> None:
    with_path = current_digest(load_recipe(place.recipe), ())
    place.write_recipe('repo = "owner/tiny"')
    assert current_digest(load_recipe(place.recipe), ()) == with_path
    place.write_recipe(f'provided = "{place.shared}"')
    assert current_digest(load_recipe(place.recipe), ()) != with_path


def cache_of_the_hub_library(folder: Path, commit: str) -> Path:
    """The files of the model as huggingface_hub keeps them: a snapshot of links to blobs."""
    repo = folder / "models--owner--tiny"
    snapshot = repo / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for name, content in FILES.items():
        blob = repo / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / name).symlink_to(Path("../../blobs") / blob.name)
    return snapshot


@pytest.mark.parametrize("given", ["snapshot", "repository"])
def test_the_cache_of_the_hub_library_is_taken_as_it_is(run: Run, place: Place, given: str) -> None:
    commit = next(iter(place.hub.repos["owner/tiny"].commits))
    snapshot = cache_of_the_hub_library(place.folder / "cache", commit)
    newer = shutil.copytree(place.folder / "hub/owner/tiny", place.folder / "newer")
    (newer / "config.json").write_text('{"model_type": "llama", "new": 1}')
    place.hub.publish("owner/tiny", newer)
    # A snapshot says which commit it is; of the folder above, the recipe must.
    folder, keys = (
        (snapshot, ()) if given == "snapshot" else (snapshot.parents[1], (f'revision = "{commit}"',))
    )
    place.write_recipe('repo = "owner/tiny"', f'provided = "{folder}"', *keys)
    answer(run, "lock", place.recipe)
    assert read_lock(place.lock).models[0].commit == commit
    fetched = answer(run, "fetch", place.recipe)
    assert fetched["provided_models"] == {"tiny": str(snapshot)}

    # The blob changes and the link stays: that is seen.
    blob = Path(os.path.realpath(snapshot / "config.json"))
    blob.write_bytes(FILES["config.json"].replace(b"llama", b"lxama"))
    error = refusal(run, "IntegrityError", "fetch", place.recipe)
    assert sha256(blob) in error["context"][str(blob)]


def test_what_was_hashed_is_not_read_again_until_it_looks_different(run: Run, place: Place) -> None:
    answer(run, "lock", place.recipe)
    answer(run, "fetch", place.recipe)
    weights = place.shared / "model.safetensors"
    found = weights.stat()
    # Other bytes in a file that looks the same: what no file system would do by itself.
    stamps = place.folder / ".envbuilder/cache/fetch/small.json"
    weights.write_bytes(bytes(len(WEIGHTS)))
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    kept = json.loads(stamps.read_bytes())
    kept[str(weights)]["ctime_ns"] = weights.stat().st_ctime_ns
    stamps.write_text(json.dumps(kept))
    assert "exit_code" not in answer(run, "fetch", place.recipe)
    error = refusal(run, "IntegrityError", "fetch", place.recipe, "--verify")
    assert hashlib.sha256(WEIGHTS).hexdigest() in error["context"][str(weights)]
    assert sha256(weights) in error["context"][str(weights)]
    assert "take `provided` out" in error["remedy"]
    os.utime(weights)
    refusal(run, "IntegrityError", "fetch", place.recipe)
    verified = refusal(run, "IntegrityError", "bundle", "verify", "small")
    assert list(verified["context"]) == [str(weights)]
    assert "take `provided` out" in verified["remedy"]


def test_missing_and_cut_off_files_are_named_with_their_sizes(run: Run, place: Place) -> None:
    answer(run, "lock", place.recipe)
    weights = place.shared / "model.safetensors"
    weights.write_bytes(WEIGHTS[:-5])
    cut = refusal(run, "IntegrityError", "fetch", place.recipe)
    assert f"{len(WEIGHTS) - 5:,} of {len(WEIGHTS):,} bytes" in cut["context"][str(weights)]
    weights.unlink()
    missing = refusal(run, "MismatchError", "fetch", place.recipe)
    assert missing["context"]["model.safetensors"] == f"{len(WEIGHTS):,} bytes"
    assert not (place.bundle / "bundle.json").exists()
    shutil.rmtree(place.shared)
    gone = refusal(run, "MismatchError", "fetch", place.recipe)
    assert str(place.shared) in gone["message"]
    assert "envbuilder fetch" in gone["remedy"]
    assert "provided" in gone["remedy"]


@pytest.mark.parametrize("changed", [".", "model.safetensors"])
def test_what_anybody_may_change_is_refused(run: Run, place: Place, changed: str) -> None:
    answer(run, "lock", place.recipe)
    path = place.shared / changed
    path.chmod(path.stat().st_mode | 0o002)
    error = refusal(run, "MismatchError", "fetch", place.recipe)
    assert f"chmod o-w {path}" in error["remedy"]


def test_a_model_on_no_hub_is_locked_by_its_own_files(run: Run, place: Place) -> None:
    place.write_recipe(f'provided = "{place.shared}"')
    code, out, _ = run("lock", place.recipe)
    assert code == 0
    assert "no hub vouches for them" in " ".join(out.split())
    assert place.hub.requests == []
    (model,) = read_lock(place.lock).models
    assert (model.repo, model.commit, model.license) == (None, None, "apache-2.0")
    assert {file.name: file.sha256 for file in model.files} == {
        name: sha256(place.shared / name) for name in TAKEN
    }
    assert str(place.shared) not in place.lock.read_text()
    answer(run, "fetch", place.recipe)
    assert "exit_code" not in answer(run, "bundle", "verify", "small")
    bill = json.loads(run("bundle", "sbom", "small")[1])
    (component,) = [one for one in bill["components"] if one["type"] == "machine-learning-model"]
    assert component["purl"].startswith("pkg:generic/tiny")

    (place.shared / "config.json").write_text('{"model_type": "qwen2"}')
    error = refusal(run, "IntegrityError", "fetch", place.recipe)
    assert "name another folder" in error["remedy"]
    answer(run, "lock", place.recipe)
    answer(run, "fetch", place.recipe)


def test_a_lock_of_a_folder_reads_only_what_looks_different_since_the_last_one(
    run: Run, place: Place
) -> None:
    def locked() -> dict[str, str]:
        answer(run, "lock", place.recipe)
        return {file.name: file.sha256 for file in read_lock(place.lock).models[0].files}

    place.write_recipe(f'provided = "{place.shared}"')
    first = locked()
    # Other bytes in a file that looks the same: what no file system would do by itself.
    weights, found = place.shared / "model.safetensors", (place.shared / "model.safetensors").stat()
    weights.write_bytes(bytes(len(WEIGHTS)))
    os.utime(weights, ns=(found.st_atime_ns, found.st_mtime_ns))
    record = place.folder / ".envbuilder/cache/lock/small.hashed"
    kept = record.read_text()
    assert str(found.st_ctime_ns) in kept
    record.write_text(kept.replace(str(found.st_ctime_ns), str(weights.stat().st_ctime_ns)))
    assert locked() == first

    os.utime(weights)
    changed = locked()
    assert changed == {**first, "model.safetensors": sha256(weights)} != first


def test_a_lock_of_a_folder_that_is_cut_off_goes_on_with_the_files_that_are_left(tmp_path: Path) -> None:
    folder, place = tmp_path / "tiny", tmp_path / "record"
    # Far more files than are read at the same time.
    shards = {f"model-{number}.safetensors": f"{number:03}".encode() for number in range(60)}
    index = json.dumps({"weight_map": {name: name for name in shards}}).encode()
    folder.mkdir()
    for name, content in {**shards, "config.json": b"{}", "model.safetensors.index.json": index}.items():
        (folder / name).write_bytes(content)
    spec, told = ModelSpec(provided=str(folder)), Told(cut_off=True)
    with pytest.raises(KeyboardInterrupt):
        lock_folder("tiny", spec, kept=None, record=HashRecord(place), reporter=told)

    again = Told(cut_off=False)
    model = lock_folder("tiny", spec, kept=None, record=HashRecord(place), reporter=again)
    assert {file.name: file.sha256 for file in model.files} == {
        path.name: sha256(path) for path in folder.iterdir()
    }
    assert 0 < again.total < told.total


def test_a_folder_that_is_no_model_is_refused_by_name(run: Run, place: Place) -> None:
    place.write_recipe(f'provided = "{place.shared}"')
    (place.shared / "model.safetensors").unlink()
    error = refusal(run, "InputError", "lock", place.recipe)
    assert str(place.shared) in error["message"]
    (place.shared / "config.json").write_text("{")
    error = refusal(run, "InputError", "lock", place.recipe)
    assert "revision" not in error["remedy"]
    shutil.rmtree(place.shared)
    error = refusal(run, "InputError", "lock", place.recipe)
    assert error["context"]["key"] == "model.tiny.provided"


def test_a_packed_bundle_says_that_the_model_is_not_in_it(run: Run, place: Place) -> None:
    answer(run, "lock", place.recipe)
    answer(run, "fetch", place.recipe)
    packed = run("bundle", "pack", "small", "--output", "small.tar")[1]
    assert f"The model tiny is not in it: the machine has it, at {place.shared}." in packed
    assert WEIGHTS not in (place.folder / "small.tar").read_bytes()

    there = place.shared.rename(place.folder / "shared/other-machine")
    code, out, err = run("--root", "other", "bundle", "unpack", "small.tar")
    assert code == 0
    assert f"is not at {place.shared}" in " ".join((out + err).split())
    error = refusal(run, "MismatchError", "--root", "other", "bundle", "verify", "small")
    assert "envbuilder fetch recipes/small.toml" in error["remedy"]
    # The remedy, without a network: the same lock, and nothing to bring.
    place.write_recipe('repo = "owner/tiny"', f'provided = "{there}"')
    requests = len(place.hub.requests)
    assert answer(run, "--root", "other", "fetch", place.recipe)["transferred_files"] == 0
    assert len(place.hub.requests) == requests
    assert "exit_code" not in answer(run, "--root", "other", "bundle", "verify", "small")


@pytest.mark.parametrize(
    "keys",
    [
        (),
        ('provided = "relative/folder"',),
        (f'revision = "{"a" * 40}"', 'provided = "/somewhere"'),
    ],
    ids=["neither", "a relative path", "a revision of nothing"],
)
def test_a_model_must_come_from_somewhere(run: Run, place: Place, keys: tuple[str, ...]) -> None:
    place.write_recipe(*(keys or ("remote-code = []",)))
    error = refusal(run, "InputError", "lock", place.recipe)
    assert "model.tiny" in error["message"]


def test_a_snapshot_says_which_commit_it_is_but_not_against_the_recipe() -> None:
    commit, other = "a" * 40, "b" * 40
    folder = f"/hub/models--o--n/snapshots/{commit}"
    assert ModelSpec(repo="o/n", provided=f"{folder}/").commit == commit
    assert ModelSpec(repo="o/n", provided=folder, revision=other).commit == other
    assert ModelSpec(repo="o/n", provided=f"{folder}/part").commit is None
    assert ModelSpec(provided=folder).commit is None


def test_the_remedy_for_a_folder_names_no_revision() -> None:
    repository = ModelRepository("tiny", "/shared/tiny", (), lambda name: b"", is_folder=True)
    assert "provided" in repository.whole
    assert "revision" not in repository.whole


def test_the_model_of_a_folder_is_found_by_its_place_before_its_name(tmp_path: Path) -> None:
    models = [LockedModel(name, f"o/{name}", "c" * 40, None, (), ()) for name in ("tiny", "big")]
    folder, link = tmp_path / "snapshots" / "big", tmp_path / "link"
    folder.mkdir(parents=True)
    link.symlink_to(folder)
    provided = {"tiny": str(folder)}
    for place in (folder, link):
        assert locked_model(place, models, provided) is models[0]
    assert locked_model(folder, models, {}) is models[1]
    assert locked_model(tmp_path, models, provided) is None

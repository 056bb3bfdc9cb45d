"""Promise 24: of a model, a lock takes whole commits of safetensors, and code only where it is listed."""

from __future__ import annotations

import json
import shutil
import tomllib
from pathlib import Path

import pytest
import tomli_w

from tests.lab.hub_server import HubServer
from tests.promises.commands import Workplace, files_below
from tests.promises.conftest import REPO, SMALL, Published

CODE: dict[str, str | None] = {
    "config.json": json.dumps({"auto_map": {"AutoModel": "modeling_tiny.Tiny"}}),
    "modeling_tiny.py": "from .layers import Layer\n",
    "layers.py": "import torch\n",
}
SHARDS: dict[str, str | None] = {
    "model.safetensors": None,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ),
    "model-00001-of-00002.safetensors": "one",
}
REFUSED: dict[str, tuple[dict[str, str | None], str, str]] = {
    "a branch for a revision": ({}, 'revision = "main"', "revision"),
    "a tag for a revision": ({}, 'revision = "v1.0"', "revision"),
    "a short commit for a revision": ({}, 'revision = "0123456"', "revision"),
    "pickled weights": ({"model.safetensors": None, "pytorch_model.bin": "pickle"}, "", "safetensors"),
    "code that the recipe says nothing of": (CODE, "", "code"),
    "code that the listed code imports": (CODE, 'remote-code = ["modeling_tiny.py"]', "layers.py"),
    "code of another repository": (
        {"config.json": json.dumps({"auto_map": {"AutoModel": "other/code--modeling_x.X"}})},
        "",
        "code",
    ),
    "a missing shard": (SHARDS, "", "model-00002-of-00002.safetensors"),
}


@pytest.mark.parametrize(("changes", "line", "said"), REFUSED.values(), ids=REFUSED)
def test_promise_24_a_model_that_is_not_pinned_safe_and_whole_is_refused(
    place: Workplace,
    hub: HubServer,
    published: Published,
    tmp_path: Path,
    changes: dict[str, str | None],
    line: str,
    said: str,
) -> None:
    """A branch name for a revision, pickle weights, remote code not in the lock, a missing shard →
    refused."""
    folder = tmp_path / "repository"
    shutil.copytree(published.hub / REPO, folder)
    for name, text in changes.items():
        if text is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(text)
    hub.publish(REPO, folder)
    place.lock("small").unlink()
    place.add("small", f"{SMALL}{line}\n")
    for command in ("lock", "fetch"):
        ended = place.run(command, place.recipe("small"))
        assert ended.code == 3, ended
        assert said in ended.out
        assert ended.told["remedy"]
    assert not place.lock("small").exists()
    assert not place.root.bundle("small").exists()
    assert hub.content_requests == []


def test_promise_24_a_bundle_has_no_code_of_a_model_but_what_its_lock_names(
    place: Workplace, hub: HubServer, published: Published, tmp_path: Path
) -> None:
    """A branch name for a revision, pickle weights, remote code not in the lock, a missing shard →
    refused."""
    folder = tmp_path / "repository"
    shutil.copytree(published.hub / REPO, folder)
    for name, text in {**CODE, "pytorch_model.bin": "pickle"}.items():
        (folder / name).write_text(text or "")
    hub.publish(REPO, folder)
    for listed in ([], ["layers.py", "modeling_tiny.py"]):
        place.add("small", f"{SMALL}remote-code = {json.dumps(listed)}\n")
        for words in (["lock", "--upgrade"], ["fetch"]):
            place.succeed(words[0], place.recipe("small"), *words[1:])
        brought = files_below(place.root.bundle("small") / "models/tiny")
        assert [name for name in brought if name.endswith(".py")] == listed
        assert "pytorch_model.bin" not in brought

    model = place.root.bundle("small") / "models/tiny"
    (model / "stray.py").write_text("")
    (model / "model.safetensors").unlink()
    ended = place.run("bundle", "verify", "small")
    assert ended.code == 5
    assert set(ended.context) == {"models/tiny/stray.py", "models/tiny/model.safetensors"}

    # A lock that somebody has loosened by hand.
    lock = tomllib.loads(place.lock("small").read_text(encoding="utf-8"))
    lock["tool"]["envbuilder"]["models"][0]["commit"] = "main"
    place.lock("small").write_text(tomli_w.dumps(lock), encoding="utf-8")
    assert place.fetch("small").code == 3

"""Models from a hub on loopback: what a lock names, who gets the token, and what goes wrong."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

import envbuilder.download
import envbuilder.index.asking
from envbuilder.download import download
from envbuilder.errors import EnvbuilderError, InputError, IntegrityError, NetworkError
from envbuilder.hub import Hub, open_hub
from envbuilder.lock import LockedModel
from envbuilder.recipe import ModelSpec
from envbuilder.report import Quiet
from tests.conftest import Quickstart
from tests.lab.hub_server import HubServer
from tests.lab.index_server import Fault

REPO = "owner/tiny"
TOKEN = "hf_theSecret"
CARD = b"---\nlicense: apache-2.0\n---\n# Tiny\n"
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": bytes(range(256)) * 4000,
    "pytorch_model.bin": b"never",
    "tokenizer.model": b"sentencepiece",
    "tokenizer_config.json": b"{}",
    "README.md": CARD,
}
TAKEN = ["README.md", "config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"]


class Notes(Quiet):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(autouse=True)
def _own_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the machine's settings, and no waiting between tries."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_HOME", str(home / "hf"))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("NO_PROXY", "*")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_OIDC_RESOURCE", "NETRC", "PIP_CERT", "PIP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    # huggingface_hub reads these when it is imported, which other tests have done.
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    monkeypatch.setattr(constants, "HF_STORED_TOKENS_PATH", str(home / "stored_tokens"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", False)
    monkeypatch.setattr(envbuilder.index.asking, "_FIRST_PAUSE", 0.0)
    monkeypatch.setattr(envbuilder.download, "_PAUSES", (0.0, 0.0, 0.0))


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    write(tmp_path / "repos" / REPO, FILES)
    with HubServer(tmp_path / "repos") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def lock(
    spec: ModelSpec | None = None, kept: LockedModel | None = None, reporter: Quiet | None = None
) -> LockedModel:
    with open_hub() as hub:
        return hub.lock_model("tiny", spec or ModelSpec(repo=REPO), kept=kept, reporter=reporter or Quiet())


def refused(kind: type[EnvbuilderError], spec: ModelSpec | None = None) -> EnvbuilderError:
    with pytest.raises(kind) as caught:
        lock(spec)
    assert TOKEN not in str(caught.value.to_json())
    return caught.value


def bring(hub: Hub, model: LockedModel, folder: Path) -> None:
    for file in model.files:
        part = folder / file.name
        part.parent.mkdir(parents=True, exist_ok=True)
        download(
            hub.client,
            hub.file_url(model, file),
            sha256=file.sha256,
            size=file.size,
            part=part,
            on_bytes=lambda count: None,
        )


def only_commit(server: HubServer) -> str:
    (commit,) = server.repos[REPO].commits
    return commit


def asked_for(server: HubServer) -> list[str]:
    """The files asked for, wherever they lie."""
    return [
        path.partition("/resolve/")[2].partition("/")[2]
        for _, path, _ in server.requests
        if "/api/" not in path
    ]


def test_a_lock_names_the_newest_commit_and_its_files_by_size_and_hash(server: HubServer) -> None:
    reporter = Notes()
    model = lock(reporter=reporter)
    assert (model.name, model.repo, model.commit) == ("tiny", REPO, only_commit(server))
    assert (model.license, model.remote_code) == ("apache-2.0", ())
    assert [file.name for file in model.files] == TAKEN
    for file in model.files:
        assert file.size == len(FILES[file.name])
        assert file.sha256 == hashlib.sha256(FILES[file.name]).hexdigest()
    assert "pytorch_model.bin" in reporter.notes[0]


def test_files_whose_hash_the_hub_tells_are_not_fetched(server: HubServer) -> None:
    lock()
    assert sorted(asked_for(server)) == ["README.md", "config.json", "tokenizer_config.json"]
    assert server.content_requests == []


def test_a_locked_commit_is_kept_until_the_newest_or_another_is_asked_for(
    server: HubServer, tmp_path: Path
) -> None:
    old = lock()
    new = server.publish(REPO, write(tmp_path / "new", {**FILES, "config.json": b'{"new": 1}'}))
    assert lock(kept=old) == old
    assert lock().commit == new
    assert lock(ModelSpec(repo=REPO, revision=new), kept=old).commit == new
    assert lock(ModelSpec(repo=REPO, revision=old.commit)) == old
    assert lock(kept=replace(old, repo="owner/other")).commit == new


def test_hashes_of_a_kept_commit_are_used_again(server: HubServer) -> None:
    kept = lock()
    server.requests.clear()
    assert lock(kept=kept) == kept
    # Whether the code that a config names is wanted may have changed in the recipe.
    assert sorted(asked_for(server)) == ["config.json", "tokenizer_config.json"]


@pytest.mark.parametrize("name", ["config.json", "model.safetensors"])
def test_other_bytes_under_a_locked_commit_are_refused(server: HubServer, name: str) -> None:
    kept = lock()
    files = tuple(replace(file, sha256="0" * 64) if file.name == name else file for file in kept.files)
    with pytest.raises(IntegrityError) as caught:
        lock(kept=replace(kept, files=files))
    assert caught.value.context["file"] == name
    assert caught.value.context["expected"] == "0" * 64


def test_a_small_file_with_other_bytes_than_the_commit_has_is_refused(server: HubServer) -> None:
    server.faults["README.md"] = [Fault(body=b"x" * len(CARD))]
    assert refused(IntegrityError).context["file"] == "README.md"


def test_a_small_file_that_does_not_end_is_refused(server: HubServer) -> None:
    server.faults["README.md"] = [Fault(body=b"x" * (len(CARD) + 1), chunked=True)]
    assert "more than" in refused(NetworkError).message


def test_a_large_file_outside_lfs_is_refused(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("envbuilder.hub._LARGEST_SMALL_FILE", len(CARD) - 1)
    assert refused(NetworkError).context["file"] == "README.md"


@pytest.mark.parametrize(
    ("card", "license"),
    [
        (b"---\nlicense: other\nlicense_name: tiny-1.0\n---\n", "tiny-1.0"),
        (b"---\nlicense: other\n---\n", "other"),
        (b"---\nlicense: [mit, apache-2.0]\n---\n", "mit, apache-2.0"),
        (b"---\nlicense: 3\n---\n", None),
        (b"# No card\n", None),
    ],
)
def test_the_licence_is_the_cards(
    server: HubServer, tmp_path: Path, card: bytes, license: str | None
) -> None:
    server.publish(REPO, write(tmp_path / "new", {**FILES, "README.md": card}))
    assert lock().license == license


def test_what_a_repository_must_have_is_checked(server: HubServer, tmp_path: Path) -> None:
    custom = b'{"auto_map": {"AutoModel": "modeling_tiny.Tiny"}}'
    files = {**FILES, "config.json": custom, "modeling_tiny.py": b"import torch\n"}
    server.publish(REPO, write(tmp_path / "new", files))
    assert 'remote-code = ["modeling_tiny.py"]' in refused(InputError).remedy
    model = lock(ModelSpec(repo=REPO, remote_code=("modeling_tiny.py",)))
    assert model.remote_code == ("modeling_tiny.py",)
    assert "modeling_tiny.py" in [file.name for file in model.files]


@pytest.mark.parametrize(
    "body",
    [
        b"<html>Log in to the guest network</html>",
        b"[]",
        b'{"sha": "main", "siblings": []}',
        b'{"sha": "%s", "siblings": [{"rfilename": "config.json"}]}' % (b"a" * 40),
        b'{"sha": "%s", "siblings": [{"rfilename": "a", "size": -1, "blobId": "%s"}]}'
        % (b"a" * 40, b"b" * 40),
    ],
)
def test_an_answer_that_is_no_hubs_is_refused(server: HubServer, body: bytes) -> None:
    server.faults[REPO] = [Fault(body=body)]
    assert "no model hub's" in refused(NetworkError).message


def test_an_answer_about_another_commit_is_refused(server: HubServer, tmp_path: Path) -> None:
    old = only_commit(server)
    new = server.publish(REPO, write(tmp_path / "new", {**FILES, "config.json": b"{}"}))
    server.faults[REPO] = [Fault(body=json.dumps({"sha": new, "siblings": []}).encode())]
    assert new in refused(NetworkError, ModelSpec(repo=REPO, revision=old)).context["error"]


@pytest.mark.parametrize(
    ("token", "known", "readers", "message", "remedy"),
    [
        (None, False, set(), "strangers", "export HF_TOKEN"),
        (TOKEN, False, set(), "doesn't accept the token", "export HF_TOKEN"),
        (TOKEN, True, set(), "no model owner/tiny, or", "export HF_TOKEN"),
        (TOKEN, True, {TOKEN}, None, None),
    ],
)
def test_a_private_repository(
    server: HubServer,
    monkeypatch: pytest.MonkeyPatch,
    token: str | None,
    known: bool,
    readers: set[str],
    message: str | None,
    remedy: str | None,
) -> None:
    server.repos[REPO].private = True
    server.repos[REPO].readers = readers
    if known:
        server.tokens.add(TOKEN)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    if message is None or remedy is None:
        assert lock().commit == only_commit(server)
    else:
        error = refused(NetworkError)
        assert message in error.message
        assert remedy in error.remedy


@pytest.mark.parametrize("token", [None, TOKEN])
def test_a_gated_repository_is_refused_with_the_way_in(
    server: HubServer, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    server.repos[REPO].gated = True
    server.tokens.add(TOKEN)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    error = refused(NetworkError)
    assert "owners let in" in error.message
    assert f"{server.endpoint}/{REPO}" in error.remedy
    assert "export HF_TOKEN" in error.remedy


def test_a_repository_or_commit_that_is_not_there_is_refused(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.tokens.add(TOKEN)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert "no model owner/gone" in refused(NetworkError, ModelSpec(repo="owner/gone")).message
    error = refused(NetworkError, ModelSpec(repo=REPO, revision="a" * 40))
    assert "not the commit" in error.message
    assert "revision" in error.remedy


@pytest.mark.parametrize(
    "faults",
    [
        [Fault(status=503), Fault(status=429, headers={"Retry-After": "0"})],
        [Fault(status=500)],
    ],
)
def test_a_busy_hub_is_asked_again(server: HubServer, faults: list[Fault]) -> None:
    server.faults[REPO] = list(faults)
    server.faults["config.json"] = list(faults)
    assert lock().commit == only_commit(server)


def test_a_broken_connection_is_asked_again(server: HubServer) -> None:
    server.faults["config.json"] = [Fault(cut_after=5), Fault(cut_after=0)]
    assert lock().commit == only_commit(server)


def test_a_hub_that_stays_busy_is_given_up(server: HubServer) -> None:
    server.faults[REPO] = [Fault(status=503)] * 9
    assert "status 503" in refused(NetworkError).message
    assert len(server.requests) == 4


@pytest.mark.parametrize("status", [403, 410])
def test_other_refusals_are_not_repeated(server: HubServer, status: int) -> None:
    server.faults[REPO] = [Fault(status=status)] * 9
    assert f"status {status}" in refused(NetworkError).message
    assert len(server.requests) == 1


def test_a_hub_that_cannot_be_reached(server: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    assert "HF_ENDPOINT" in refused(NetworkError).remedy


@pytest.mark.parametrize("endpoint", ["ftp://example.org", "example.org", "http://", "http://a:b", "/a/path"])
def test_an_endpoint_that_is_no_web_address_is_refused(
    endpoint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    assert "HF_ENDPOINT" in refused(InputError).remedy


def test_a_token_that_no_header_can_carry_is_refused_unseen(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", f"{TOKEN} é")
    refused(InputError)
    assert server.requests == []


@pytest.mark.parametrize("where", ["variable", "file"])
def test_the_token_goes_to_the_hub_and_to_no_other_host(
    server: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    server.repos[REPO].private = True
    server.repos[REPO].readers = server.tokens = {TOKEN}
    if where == "variable":
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    else:
        Path(constants.HF_TOKEN_PATH).write_text(f"{TOKEN}\n")
    with open_hub() as hub:
        model = hub.lock_model("tiny", ModelSpec(repo=REPO), kept=None, reporter=Quiet())
        bring(hub, model, tmp_path / "models")
        hub.client.get(f"{server.content_origin}/asked-directly")
    assert len(server.content_requests) == 3
    assert {headers.get("authorization") for _, _, headers in server.requests} == {f"Bearer {TOKEN}"}
    assert not any("authorization" in headers for _, _, headers in server.content_requests)


def test_without_leave_to_use_the_stored_token_none_is_sent(
    server: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_IMPLICIT_TOKEN", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    lock()
    assert not any("authorization" in headers for _, _, headers in server.requests)


def test_files_are_downloaded_through_redirects_and_resumed(server: HubServer, tmp_path: Path) -> None:
    etag = Fault(cut_after=1000, etag='"another"')
    server.faults["model.safetensors"] = [
        Fault(cut_after=300_000),
        Fault(status=503),
        etag,
        Fault(cut_after=9),
    ]
    server.faults["README.md"] = []
    with open_hub() as hub:
        model = hub.lock_model("tiny", ModelSpec(repo=REPO), kept=None, reporter=Quiet())
        bring(hub, model, tmp_path / "models")
    for name in TAKEN:
        assert (tmp_path / "models" / name).read_bytes() == FILES[name]
    ranges = [headers.get("range") for _, path, headers in server.content_requests]
    assert "bytes=300000-" in ranges


def test_wrong_bytes_from_the_hub_are_refused(server: HubServer, tmp_path: Path) -> None:
    wrong = b"x" * len(FILES["model.safetensors"])
    server.faults["model.safetensors"] = [Fault(body=wrong)]
    with open_hub() as hub:
        model = hub.lock_model("tiny", ModelSpec(repo=REPO), kept=None, reporter=Quiet())
        with pytest.raises(IntegrityError):
            bring(hub, model, tmp_path / "models")


@pytest.mark.parametrize("way", ["hf download", "snapshot_download"])
def test_the_stock_client_takes_the_lab_hub_for_one(server: HubServer, tmp_path: Path, way: str) -> None:
    folder = tmp_path / "stock"
    code = f"import huggingface_hub; huggingface_hub.snapshot_download({REPO!r}, local_dir={str(folder)!r})"
    command = (
        [str(Path(sys.executable).with_name("hf")), "download", REPO, "--local-dir", str(folder)]
        if way == "hf download"
        else [sys.executable, "-c", code]
    )
    server.repos[REPO].private = True
    server.repos[REPO].readers = server.tokens = {TOKEN}
    environment = {**os.environ, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_UPDATE_CHECK": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name, content in FILES.items():
        assert (folder / name).read_bytes() == content
    assert not any("authorization" in headers for _, _, headers in server.content_requests)


MAKE = """
import sys
import torch
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, NemotronHConfig, PreTrainedTokenizerFast
torch.manual_seed(3)
config = NemotronHConfig(
    hybrid_override_pattern="ME*M", vocab_size=264, hidden_size=32, num_attention_heads=2,
    num_key_value_heads=1, head_dim=16, mamba_num_heads=4, mamba_head_dim=16, n_groups=2, ssm_state_size=8,
    chunk_size=16, intermediate_size=32, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48,
    n_routed_experts=4, num_experts_per_tok=2, max_position_embeddings=256,
)
model = AutoModelForCausalLM.from_config(config)
model.save_pretrained(sys.argv[1], max_shard_size="60KB")
words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]")
tokenizer.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
tokenizer.save_pretrained(sys.argv[1])
"""
READ = """
import hashlib, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
digest = hashlib.sha256()
for name, tensor in sorted(AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict().items()):
    digest.update(name.encode() + tensor.contiguous().numpy().tobytes())
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
chat = tokenizer.apply_chat_template([{"role": "user", "content": "a"}], tokenize=False)
print(digest.hexdigest(), tokenizer("a").input_ids, chat)
"""


@pytest.mark.needs_env
def test_transformers_reads_what_was_brought_by_its_path_offline(
    quickstart: Quickstart, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = tmp_path / "repos" / REPO, tmp_path / "models/tiny"
    # No hub and no proxy: whatever asks a network fails.
    environment = {
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "USE_HUB_KERNELS": "0",
        "HF_ENDPOINT": "http://127.0.0.1:1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }

    def run(code: str, argument: Path) -> str:
        command = [str(quickstart.python), "-c", code, str(argument)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    run(MAKE, made)
    (made / "pytorch_model.bin").write_bytes(b"never")
    (made / "original").mkdir()
    (made / "original/consolidated.safetensors").write_bytes(b"never")
    with HubServer(tmp_path / "repos") as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        with open_hub() as hub:
            model = hub.lock_model("tiny", ModelSpec(repo=REPO), kept=None, reporter=Quiet())
            bring(hub, model, folder)
    brought = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert len([name for name in brought if name.endswith(".safetensors")]) > 1
    assert {"config.json", "tokenizer.json", "chat_template.jinja"} < brought
    assert not {"pytorch_model.bin", "original/consolidated.safetensors"} & brought

    assert run(READ, folder).endswith(" [1] a\n")
    assert run(READ, folder) == run(READ, made)

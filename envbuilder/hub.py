"""Models from a hub: the files of one commit by size and sha256, and where each is fetched from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import httpx
from pydantic import BaseModel, Field, ValidationError

from envbuilder.errors import IntegrityError, NetworkError
from envbuilder.hub_files import ModelRepository, choose_files, license_of
from envbuilder.hub_http import HubHttp, open_hub_http
from envbuilder.lock import LockedModel, LockedModelFile
from envbuilder.recipe import ModelSpec
from envbuilder.report import Reporter
from envbuilder.urls import shown

_LARGEST_ANSWER = 64 << 20
"""Bytes of an answer of the hub's API."""
_LARGEST_SMALL_FILE = 32 << 20
"""Bytes of a file that is read while locking: hubs keep larger ones in LFS, and tell the sha256 of those."""

_Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_GitId = Annotated[str, Field(pattern=r"^[0-9a-f]{40}$")]
_Size = Annotated[int, Field(ge=0)]


class _Lfs(BaseModel):
    sha256: _Sha256
    size: _Size


class _File(BaseModel):
    name: str = Field(alias="rfilename")
    size: _Size
    blob_id: _GitId = Field(alias="blobId")
    lfs: _Lfs | None = None


class _Commit(BaseModel):
    """What a hub's API tells of one commit."""

    id: _GitId = Field(alias="sha")
    files: tuple[_File, ...] = Field(alias="siblings")
    card: dict[str, object] | None = Field(default=None, alias="cardData")


class Hub:
    """A hub; `open_hub` makes one."""

    def __init__(self, http: HubHttp) -> None:
        self._http = http

    @property
    def client(self) -> httpx.Client:
        """For `download`. It carries the token, to this hub's own host only."""
        return self._http.client

    def lock_model(
        self, name: str, spec: ModelSpec, *, kept: LockedModel | None, reporter: Reporter
    ) -> LockedModel:
        """The files of the recipe's model `name`, which has a repo: at `spec.commit`, else at the commit of
        `kept` (what the lock has so far), else at the newest of the hub's default branch.

        InputError for a repository that can't be used, NetworkError where the hub doesn't give it,
        IntegrityError where its files differ from its own listing, or from `kept` of the same commit.
        """
        assert spec.repo is not None  # what is on no hub is not asked for here
        reporter.stage(f"choosing the files of the model {spec.repo}")
        if kept and kept.repo != spec.repo:
            kept = None
        commit = self._commit(spec.repo, spec.commit or (kept.commit if kept else None))
        locked_before = {file.name: file for file in kept.files} if kept and kept.commit == commit.id else {}
        reading = _Reading(self._http, spec.repo, commit)
        choice = choose_files(
            ModelRepository(name, spec.repo, reading.listing.keys(), reading.read), spec.remote_code
        )
        files = []
        for done, file in enumerate(choice.files, start=1):
            files.append(reading.lock(file, locked_before.get(file)))
            reporter.progress(f"model {name}", done, len(choice.files), "files")
        if choice.left_out:
            reporter.note(
                f"{spec.repo} has {len(choice.left_out)} files of weights that transformers doesn't read, "
                f"{choice.left_out[0]} among them; they are left out."
            )
        return LockedModel(
            name=name,
            repo=spec.repo,
            commit=commit.id,
            license=license_of(commit.card or {}),
            remote_code=choice.remote_code,
            files=tuple(files),
        )

    def file_url(self, model: LockedModel, file: LockedModelFile) -> str:
        """Where `client` fetches `file` of `model` from."""
        assert model.repo is not None  # what is on no hub has no URL
        assert model.commit is not None
        return self._http.file_url(model.repo, model.commit, file.name)

    def _commit(self, repo: str, revision: str | None) -> _Commit:
        url = self._http.api_url(repo, revision)
        answer = self._http.get(url, repo, "the list of files", _LARGEST_ANSWER)
        try:
            commit = _Commit.model_validate_json(answer)
            if revision and commit.id != revision:
                raise ValueError(f"it is about commit {commit.id}, not {revision}")
        except ValueError as error:
            raise NetworkError(
                f"The hub gave an answer about {repo} that is no model hub's.",
                remedy="Check that this is the URL of a model hub, and that no proxy answers in its place: "
                "echo $HF_ENDPOINT",
                context={"url": shown(url), "error": _first(error)},
            ) from error
        return commit


class _Reading:
    """The files of one commit, each of them read at most once."""

    def __init__(self, http: HubHttp, repo: str, commit: _Commit) -> None:
        self.http, self.repo, self.commit = http, repo, commit.id
        self.listing = {file.name: file for file in commit.files}
        self._contents: dict[str, bytes] = {}

    def read(self, name: str) -> bytes:
        """The content of a small file, compared with what the listing says of it."""
        if name not in self._contents:
            file = self.listing[name]
            if file.size > _LARGEST_SMALL_FILE:
                raise NetworkError(
                    f"{name} of {self.repo} is too large for a file that is not in LFS.",
                    remedy="Choose another commit as the model's `revision`, or another repository.",
                    context={"file": name, "expected": f"at most {_LARGEST_SMALL_FILE}", "got": file.size},
                )
            url = self.http.file_url(self.repo, self.commit, name)
            content = self.http.get(url, self.repo, name, file.size)
            if file.lfs:
                expected, got = file.lfs.sha256, hashlib.sha256(content).hexdigest()
            else:
                expected, got = file.blob_id, _git_blob_id(content)
            if got != expected:
                raise self._other_bytes(name, expected, got)
            self._contents[name] = content
        return self._contents[name]

    def lock(self, name: str, before: LockedModelFile | None) -> LockedModelFile:
        """Size and sha256 of a file; `before` is what the lock has of it at this same commit."""
        file = self.listing[name]
        if file.lfs:
            locked = LockedModelFile(name, file.lfs.size, file.lfs.sha256)
        elif before and before.size == file.size and name not in self._contents:
            return before
        else:
            content = self.read(name)
            locked = LockedModelFile(name, len(content), hashlib.sha256(content).hexdigest())
        if before and before != locked:
            raise self._other_bytes(name, before.sha256, locked.sha256)
        return locked

    def _other_bytes(self, name: str, expected: str, got: str) -> IntegrityError:
        return IntegrityError(
            f"The hub's {name} of {self.repo} is another file than this commit has.",
            remedy="Run the same command again; if it stays so, find out what answers in the hub's place: "
            "echo $HF_ENDPOINT",
            context={"file": name, "commit": self.commit, "expected": expected, "got": got},
        )


@contextmanager
def open_hub() -> Iterator[Hub]:
    """The hub of huggingface_hub's settings at this moment, reached as the indexes are (certificates, proxy,
    timeout); InputError where the settings can't be used."""
    with open_hub_http() as http:
        yield Hub(http)


def _git_blob_id(content: bytes) -> str:
    """Git's name for `content` as an object of type blob (Pro Git, "Git Objects")."""
    return hashlib.sha1(b"blob %d\0%s" % (len(content), content), usedforsecurity=False).hexdigest()


def _first(error: ValueError) -> str:
    if not isinstance(error, ValidationError):
        return str(error)
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"

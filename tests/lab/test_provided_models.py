"""A model in another user's folder: read where the group may, else refused with whom to ask."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from envbuilder.errors import MismatchError
from envbuilder.fetch.provided import verify_provided
from envbuilder.hash_record import HashRecord
from envbuilder.lock import LockedModel, LockedModelFile
from envbuilder.model_folder import lock_folder
from envbuilder.provided_models import ProvidedModel, check_place
from envbuilder.recipe import ModelSpec
from envbuilder.report import Quiet
from tests.lab.test_shared_root import ANN, BEN, GROUP, as_user, root

pytestmark = pytest.mark.lab
__all__ = ["root"]  # a fixture

CONTENT = b'{"model_type": "llama"}'


@pytest.fixture
def provided(root: Path) -> ProvidedModel:
    """Ann's, which her group may read."""
    folder = root / "tiny"
    folder.mkdir()
    (folder / "config.json").write_bytes(CONTENT)
    for path in (folder, folder / "config.json"):
        os.chown(path, ANN, GROUP)
        path.chmod(0o2750 if path.is_dir() else 0o640)
    file = LockedModelFile("config.json", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())
    return ProvidedModel(LockedModel("tiny", "owner/tiny", "c" * 40, None, (), (file,)), folder)


def test_a_member_of_the_group_verifies_it_in_place(provided: ProvidedModel) -> None:
    as_user(BEN, lambda: verify_provided([provided], "small", {}, HashRecord(), Quiet()))


@pytest.mark.parametrize("closed", [".", "config.json"])
def test_what_cannot_be_read_is_named_with_owner_and_group(provided: ProvidedModel, closed: str) -> None:
    path = provided.folder / closed
    path.chmod(0o2700 if path.is_dir() else 0o600)

    def refused() -> None:
        with pytest.raises(MismatchError) as caught:
            check_place(provided, "small")
        context = caught.value.context
        assert (context["path"], context["owner"], context["group"]) == (str(path), str(ANN), str(GROUP))
        assert f"Ask {ANN} for: chmod -R g+rX {path}" in caught.value.remedy
        spec = ModelSpec(provided=str(provided.folder))
        with pytest.raises(MismatchError, match=str(path)):
            lock_folder("tiny", spec, kept=None, record=HashRecord(), reporter=Quiet())

    as_user(BEN, refused)

"""`bundle sbom`: what a security office asks about, in the form that its tools read."""

from __future__ import annotations

import base64
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from envbuilder.bundles.sbom import bill_of_materials
from envbuilder.errors import InputError, IntegrityError, MismatchError
from envbuilder.lock_text import LockEntry
from envbuilder.model import Bundle
from envbuilder.paths import Root
from tests.bundles.samples import (
    GIT_COMMIT,
    LONG_NAME,
    MODEL_COMMIT,
    PATCH,
    SUBMODULE_COMMIT,
    Sample,
    sha256,
)
from tests.lab.packages import make_wheel


@pytest.fixture
def bill(bundle: Bundle) -> dict[str, Any]:
    table: dict[str, Any] = json.loads(bill_of_materials(bundle))
    return table


def component(bill: dict[str, Any], name: str) -> dict[str, Any]:
    (found,) = [item for item in bill["components"] if item["name"] == name]
    return dict(found)


def facts(item: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in item["properties"]}


def needs(bill: dict[str, Any], ref: str) -> set[str]:
    (found,) = [item for item in bill["dependencies"] if item["ref"] == ref]
    return set(found.get("dependsOn", []))


def test_the_schema_of_cyclonedx_holds(bundle: Bundle) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(bill_of_materials(bundle)) is None


def test_each_package_is_there_with_its_version_hash_licence_and_file(
    bill: dict[str, Any], bundle: Bundle
) -> None:
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    top = component(bill, "top")
    file = bundle.path / "files/top-2.0-py3-none-any.whl"
    assert (top["version"], top["purl"], top["type"]) == ("2.0", "pkg:pypi/top@2.0", "library")
    assert top["hashes"] == [{"alg": "SHA-256", "content": sha256(file.read_bytes())}]
    assert top["licenses"] == [{"expression": "MIT OR Apache-2.0"}]
    assert facts(top)["envbuilder:file"] == "files/top-2.0-py3-none-any.whl"
    assert component(bill, "leaf")["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]
    assert component(bill, "quick")["licenses"] == [{"license": {"name": "A licence of our own"}}]
    assert "licenses" not in component(bill, "compiler")


def test_what_only_builds_or_runs_envbuilder_is_out_of_scope(bill: dict[str, Any]) -> None:
    scopes = {item["name"]: item["scope"] for item in bill["components"]}
    assert scopes == {
        "top": "required",
        "leaf": "required",
        "quick": "required",
        "native": "required",
        "from-git": "required",
        "compiler": "excluded",
        "helper": "excluded",
        "envbuilder": "excluded",
        "envbuilder-trainer": "required",
        "tiny-model": "required",
    }
    assert facts(component(bill, "compiler"))["envbuilder:groups"] == "build"


def test_patches_and_git_commits_are_the_pedigree(bill: dict[str, Any]) -> None:
    pedigree = component(bill, "native")["pedigree"]
    (patch,) = pedigree["patches"]
    assert base64.b64decode(patch["diff"]["text"]["content"]) == PATCH
    assert pedigree["notes"] == f"patches/native.patch sha256 {sha256(PATCH)}"
    tree = component(bill, "from-git")
    assert tree["pedigree"]["commits"] == [{"uid": GIT_COMMIT}]
    assert facts(tree)["envbuilder:submodule:third_party/lib"] == SUBMODULE_COMMIT
    assert "pedigree" not in component(bill, "top")


def test_models_are_components_with_their_commit_licence_and_files(bill: dict[str, Any]) -> None:
    model = component(bill, "tiny-model")
    assert (model["type"], model["group"], model["version"]) == (
        "machine-learning-model",
        "owner",
        MODEL_COMMIT,
    )
    assert model["purl"] == f"pkg:huggingface/owner/tiny-model@{MODEL_COMMIT}"
    assert model["licenses"] == [{"license": {"id": "Apache-2.0"}}]
    files = {item["name"]: item for item in model["components"]}
    assert files.keys() == {"config.json", "modeling.py", "empty.txt", LONG_NAME}
    assert files["config.json"]["hashes"][0]["content"] == sha256(b"{}\n")
    assert facts(files["modeling.py"])["envbuilder:remote-code"] == "true"


def test_the_dependency_graph_follows_extras_markers_and_the_lock(bill: dict[str, Any]) -> None:
    root = bill["metadata"]["component"]["bom-ref"]
    assert needs(bill, root) == {
        "pkg:pypi/top@2.0",
        "pkg:pypi/native@1.5",
        "pkg:generic/envbuilder@0.1",
        "pkg:generic/envbuilder-trainer@0.1",
        "model:tiny",
    }
    assert needs(bill, "pkg:pypi/top@2.0") == {"pkg:pypi/leaf@1.0", "pkg:pypi/quick@1.0"}
    assert needs(bill, "pkg:pypi/native@1.5") == {"pkg:pypi/leaf@1.0"}
    assert needs(bill, "pkg:generic/envbuilder-trainer@0.1") == {"pkg:pypi/top@2.0"}
    assert needs(bill, "pkg:generic/envbuilder@0.1") == {"pkg:pypi/helper@1.0"}


def test_a_version_that_the_tool_alone_has_is_there_and_out_of_scope(tmp_path: Path) -> None:
    class TwoVersions(Sample):
        def _entries(self, folder: Path) -> list[LockEntry]:
            older = make_wheel(folder, "leaf", "0.5", requires=["quick"])
            return [self._entry(older, "tool", {}), *super()._entries(folder)]

    bill = json.loads(bill_of_materials(TwoVersions(Root(tmp_path)).make()))
    leaves = {item["version"]: item["scope"] for item in bill["components"] if item["name"] == "leaf"}
    assert leaves == {"1.0": "required", "0.5": "excluded"}
    assert "pkg:pypi/leaf@1.0" in needs(bill, "pkg:pypi/top@2.0")


def test_without_the_extra_there_is_no_such_dependency(tmp_path: Path) -> None:
    sample = Sample(Root(tmp_path / "root"))
    sample.recipe = sample.recipe.model_copy(update={"requirements": ("top",)})
    bill = json.loads(bill_of_materials(sample.make()))
    assert needs(bill, "pkg:pypi/top@2.0") == {"pkg:pypi/leaf@1.0"}


def test_the_same_bundle_gives_the_same_bill_with_no_time_of_day(bundle: Bundle, tmp_path: Path) -> None:
    other = Sample(Root(tmp_path / "elsewhere")).make()
    for path in other.path.rglob("*"):
        os.utime(path, (1, 1))
    assert bill_of_materials(bundle) == bill_of_materials(other)
    assert "timestamp" not in bill_of_materials(bundle)
    changed = Sample(Root(tmp_path / "changed"), tables={"leaf": {"license": "MIT"}}).make()
    numbers = {json.loads(bill_of_materials(one))["serialNumber"] for one in (bundle, changed)}
    assert len(numbers) == 2


def test_a_licence_that_is_a_whole_text_is_kept_as_such(tmp_path: Path) -> None:
    text = "The licence of leaf\n\n" + "You may. " * 100
    sample = Sample(Root(tmp_path / "root"), tables={"leaf": {"license": text}})
    leaf = component(json.loads(bill_of_materials(sample.make())), "leaf")
    (licence,) = leaf["licenses"]
    assert licence["license"]["name"] == "The licence of leaf"
    assert licence["license"]["text"]["content"] == text.strip()


def test_what_the_bill_would_be_wrong_about_is_refused(bundle: Bundle) -> None:
    patch, wheel = bundle.path / "patches/native.patch", bundle.path / "files/top-2.0-py3-none-any.whl"
    patch.write_bytes(PATCH + b"\n")
    with pytest.raises(IntegrityError, match=r"native\.patch"):
        bill_of_materials(bundle)
    patch.write_bytes(PATCH)

    content = wheel.read_bytes()
    wheel.write_bytes(b"no wheel")
    with pytest.raises(IntegrityError, match="not a wheel that can be read"):
        bill_of_materials(bundle)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("top.py", "")
    with pytest.raises(IntegrityError, match="no METADATA"):
        bill_of_materials(bundle)
    wheel.unlink()
    with pytest.raises(MismatchError):
        bill_of_materials(bundle)
    wheel.write_bytes(content)

    (bundle.path / "recipe.toml").write_text("name = 4")
    with pytest.raises(InputError):
        bill_of_materials(bundle)

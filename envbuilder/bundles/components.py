"""What a bundle holds, each as a component of CycloneDX: packages, models, envbuilder's own wheels."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

from cyclonedx.contrib.license.factories import LicenseFactory
from cyclonedx.model import AttachedText, Encoding, HashAlgorithm, HashType, Property
from cyclonedx.model.component import (
    Commit,
    Component,
    ComponentScope,
    ComponentType,
    Diff,
    Patch,
    PatchClassification,
    Pedigree,
)
from cyclonedx.model.license import License
from packageurl import PackageURL

from envbuilder.bundle import TOOL
from envbuilder.bundles.dependencies import OwnWheel
from envbuilder.errors import IntegrityError
from envbuilder.lock import FILES, MODELS, Group, LockedFile, LockedModel, LockedPatch
from envbuilder.model import Bundle
from envbuilder.recipe import Recipe

_LONGEST_NAME = 100
"""Characters of a license's name: what is longer is its text."""


def environment_component(bundle: Bundle, recipe: Recipe) -> Component:
    """What the bill is of: the environment that the bundle makes."""
    record, target = bundle.record, bundle.lock.target
    facts = {
        "python": record.python,
        "machine": target.machine,
        "glibc": target.glibc,
        "provided": ", ".join(sorted(recipe.provided_names)),
        **{f"excluded:{exclusion.package}": exclusion.reason for exclusion in recipe.exclude},
    }
    return Component(
        name=record.recipe,
        version=record.lock_sha256,
        type=ComponentType.PLATFORM,
        bom_ref=f"bundle:{record.recipe}",
        description=recipe.description or None,
        properties=_properties(facts),
    )


def package_component(bundle: Bundle, file: LockedFile, groups: Iterable[Group]) -> Component:
    """One package; `groups` are those of the lock that need it. IntegrityError where a patch was changed."""
    table = bundle.lock.package_table(file.package)
    tree = bundle.lock.tree_of(file.package)
    patches = bundle.lock.patches_of(file.package)
    pedigree = Pedigree(
        commits=[Commit(uid=tree.commit)] if tree else None,
        patches=[_patch(bundle, patch) for patch in patches],
        notes="\n".join(f"{patch.path} sha256 {patch.sha256}" for patch in patches) or None,
    )
    submodules = {f"submodule:{path}": commit for path, commit in (tree.submodules if tree else {}).items()}
    facts = {"file": f"{FILES}/{file.filename}", "groups": ",".join(groups), "index": file.index or ""}
    purl = PackageURL("pypi", None, file.package, file.version)
    return Component(
        name=file.package,
        version=file.version,
        type=ComponentType.LIBRARY,
        bom_ref=str(purl),
        purl=purl,
        scope=ComponentScope.REQUIRED if "runtime" in groups else ComponentScope.EXCLUDED,
        hashes=[_sha256(file.sha256)],
        licenses=_licenses(table.get("license")),
        pedigree=pedigree if tree or patches else None,
        properties=_properties({**facts, **submodules}),
    )


def own_component(wheel: OwnWheel, scope: ComponentScope) -> Component:
    """envbuilder or its trainer. No index has them, so their type is `generic`."""
    purl = PackageURL("generic", None, wheel.name, wheel.version)
    return Component(
        name=wheel.name,
        version=wheel.version,
        type=ComponentType.LIBRARY,
        bom_ref=str(purl),
        purl=purl,
        scope=scope,
        hashes=[_sha256(wheel.sha256)],
        licenses=_licenses(wheel.license),
        properties=_properties({"file": f"{TOOL}/{wheel.filename}"}),
    )


def model_component(bundle: Bundle, model: LockedModel) -> Component:
    """One model, with its files. What is on no hub has its own name, and the type `generic`."""
    kind = "huggingface" if model.repo else "generic"
    owner, _, name = (model.repo or model.name).rpartition("/")
    purl = PackageURL(kind, owner or None, name, model.commit)
    provided = model.name in bundle.record.provided_models
    folder = f"{MODELS}/{model.name}"
    return Component(
        name=name,
        group=owner or None,
        version=model.commit,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=f"model:{model.name}",
        purl=purl,
        scope=ComponentScope.REQUIRED,
        licenses=_licenses(model.license),
        pedigree=Pedigree(commits=[Commit(uid=model.commit)]) if model.commit else None,
        properties=_properties({"provided": "true"} if provided else {"folder": folder}),
        components=[
            Component(
                name=file.name,
                type=ComponentType.FILE,
                bom_ref=f"model:{model.name}/{file.name}",
                hashes=[_sha256(file.sha256)],
                properties=_properties(
                    {
                        "file": "" if provided else f"{folder}/{file.name}",
                        "remote-code": "true" if file.name in model.remote_code else "",
                    }
                ),
            )
            for file in model.files
        ],
    )


def _patch(bundle: Bundle, patch: LockedPatch) -> Patch:
    path: Path = bundle.path / patch.path
    try:
        content = path.read_bytes()
    except OSError:
        content = b""
    if hashlib.sha256(content).hexdigest() != patch.sha256:
        raise IntegrityError(
            f"{path} is not the patch that the lock names.",
            remedy=f"envbuilder fetch recipes/{bundle.record.recipe}.toml --verify",
            context={"file": path, "expected": patch.sha256, "got": hashlib.sha256(content).hexdigest()},
        )
    encoded = base64.b64encode(content).decode()
    text = AttachedText(content=encoded, content_type="text/x-diff", encoding=Encoding.BASE_64)
    return Patch(type=PatchClassification.UNOFFICIAL, diff=Diff(text=text))


def _licenses(text: str | None) -> list[License]:
    """An SPDX identifier or expression where `text` is one."""
    text = (text or "").strip()
    if not text:
        return []
    if len(text) <= _LONGEST_NAME and "\n" not in text:
        return [LicenseFactory().make_from_string(text)]
    name = text.splitlines()[0][:_LONGEST_NAME]
    return [LicenseFactory().make_with_name(name, text=AttachedText(content=text))]


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _properties(facts: Mapping[str, str]) -> list[Property]:
    return [Property(name=f"envbuilder:{name}", value=value) for name, value in facts.items() if value]

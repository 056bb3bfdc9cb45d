"""Where a built wheel is from: its provenance, for those who audit builds, and its own bill of materials.

The provenance is an in-toto Statement v1 with a SLSA Provenance v1 predicate, beside the wheel; it is not
signed. It tells one build: when, where, how long. The bill of materials (CycloneDX 1.6) lies in the wheel
(PEP 770), so it tells only what is the same in every build of the same inputs: no time, path or node.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote
from uuid import UUID

from cyclonedx.model import HashAlgorithm, HashType, Property
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType, Pedigree
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output import make_outputter
from cyclonedx.schema import OutputFormat, SchemaVersion
from packageurl import PackageURL

from envbuilder.lock import LockedFile
from envbuilder.machine import TorchBuild
from envbuilder.model import BuildReceipt

BUILD_TYPE = "urn:envbuilder:build-type:compile:v1"
"""Names the meaning of the parameters below."""
SBOM_NAME = "envbuilder.cdx.json"
"""Of the bill of materials in a wheel's `.dist-info/sboms`."""
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"


@dataclass(frozen=True)
class BuildStory:
    """What the receipt of a build does not hold of how it was done."""

    recipe: str
    lock_sha256: str
    build_files: tuple[LockedFile, ...]
    """The locked files that the build environment was made of."""
    tool_version: str
    started_at: str
    """ISO 8601, UTC; the receipt has the end."""


def provenance_statement(receipt: BuildReceipt, story: BuildStory) -> bytes:
    """The provenance of the wheel that `receipt` is of, as JSON."""
    subjects = [_subject(receipt.wheel, receipt.wheel_sha256)]
    subjects += [_subject(extension.file, extension.sha256) for extension in receipt.extensions]
    statement = {
        "_type": _STATEMENT,
        "subject": subjects,
        "predicateType": _PREDICATE,
        "predicate": {
            "buildDefinition": {
                "buildType": BUILD_TYPE,
                "externalParameters": {
                    "recipe": story.recipe,
                    "package": receipt.package,
                    "version": receipt.version,
                    "computeCapabilities": list(receipt.compute_capabilities),
                    "environment": dict(receipt.environment),
                },
                "internalParameters": {"python": receipt.python, "key": receipt.key},
                "resolvedDependencies": _dependencies(receipt, story),
            },
            "runDetails": {
                "builder": {
                    # Whom one trusts depends on how far the build was cut off, so the tier is in the id.
                    "id": f"urn:envbuilder:builder:{quote(receipt.isolation, safe='')}",
                    "version": {"envbuilder": story.tool_version},
                    "envbuilder_node": receipt.node,
                },
                "metadata": {
                    "startedOn": story.started_at,
                    "finishedOn": receipt.built_at,
                    "envbuilder_seconds": receipt.seconds,
                    # Nobody has built it twice: what may differ is told, and no claim made where nothing is.
                    "envbuilder_mayDiffer": list(receipt.differs),
                    "envbuilder_compiledWhole": dict(receipt.compiled_whole),
                },
                "byproducts": _units(receipt),
            },
        },
    }
    return _bytes(statement)


def _subject(name: str, sha256: str) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": sha256}}


def _dependencies(receipt: BuildReceipt, story: BuildStory) -> list[dict[str, Any]]:
    """All that went into the build, each with its sha256, but for what the machine brings."""
    found: list[dict[str, Any]] = [
        {
            **_subject(receipt.sdist, receipt.sdist_sha256),
            "uri": str(_purl(receipt.package, receipt.version)),
            "annotations": {"role": "source"},
        },
        {
            "name": f"pylock.{story.recipe}.toml",
            "digest": {"sha256": story.lock_sha256},
            "annotations": {"role": "lock"},
        },
    ]
    for number, (path, sha256) in enumerate(receipt.patches.items(), 1):
        found.append({**_subject(path, sha256), "annotations": {"role": "patch", "order": number}})
    for file in sorted(story.build_files, key=lambda file: (file.package, file.filename)):
        found.append(
            {
                **_subject(file.filename, file.sha256),
                "uri": str(_purl(file.package, file.version)),
                "annotations": {"role": "build"},
            }
        )
    for name, version in _compilers(receipt).items():
        found.append({"name": name, "uri": _generic(name, version), "annotations": {"role": "compiler"}})
    if receipt.torch is not None:
        facts = {"role": "torch", "cuda": receipt.torch_cuda, "cxx11Abi": receipt.cxx11_abi}
        found.append({"name": "torch", "uri": _generic("torch", receipt.torch), "annotations": facts})
    return found


def _units(receipt: BuildReceipt) -> list[dict[str, Any]]:
    """Each unit, or each shard of it, in the receipt's order."""
    return [
        {
            "name": f"{unit.source} [{unit.shard}]" if unit.shard else unit.source,
            "uri": ":".join(
                ["urn:envbuilder:unit", *(quote(part, safe="") for part in (unit.source, unit.shard) if part)]
            ),
            "annotations": {
                "seconds": unit.seconds,
                "cpuSeconds": unit.cpu_seconds,
                "peakRssBytes": unit.peak_rss_bytes,
                "threads": unit.threads,
                "cached": unit.cached,
                "compiler": unit.compiler,
                "architecturesKept": list(unit.architectures_kept),
                "architecturesDropped": list(unit.architectures_dropped),
                "command": list(unit.command),
            },
        }
        for unit in receipt.units
    ]


def _compilers(receipt: BuildReceipt) -> dict[str, str]:
    """Name → version of the compilers."""
    return {"c++": receipt.host_compiler} | ({"nvcc": receipt.nvcc} if receipt.nvcc else {})


def wheel_sbom(
    sdist: LockedFile,
    *,
    patches: Mapping[str, str],
    build_files: Sequence[LockedFile],
    python: str,
    host_compiler: str,
    nvcc: str | None,
    torch: TorchBuild | None,
    compute_capabilities: Sequence[str],
) -> bytes:
    """The bill of materials that goes into the wheel built from `sdist`: CycloneDX 1.6, as JSON.

    `patches` are path → sha256, in the order in which they were applied, `build_files` the locked files that
    shape what is built, `python` the interpreter's version. The same arguments give the same bytes.
    """
    purl = _purl(sdist.package, sdist.version)
    facts = {
        "python": python,
        "compute-capabilities": ", ".join(compute_capabilities),
        "torch": torch.version if torch else "",
        "torch-cuda": (torch.cuda or "") if torch else "",
        "cxx11-abi": str(torch.cxx11_abi).lower() if torch else "",
    }
    package = Component(
        name=sdist.package,
        version=sdist.version,
        type=ComponentType.LIBRARY,
        bom_ref=str(purl),
        purl=purl,
        pedigree=Pedigree(notes="\n".join(f"{path} sha256 {sha256}" for path, sha256 in patches.items()))
        if patches
        else None,
        properties=[
            Property(name=f"envbuilder:{name}", value=value) for name, value in facts.items() if value
        ],
    )
    source = Component(
        name=sdist.filename,
        type=ComponentType.FILE,
        bom_ref=f"sdist:{sdist.filename}",
        scope=ComponentScope.REQUIRED,
        hashes=[_sha256(sdist.sha256)],
    )
    needed = [source]
    for file in sorted(set(build_files), key=lambda file: (file.package, file.filename)):
        needed.append(
            Component(
                name=file.package,
                version=file.version,
                type=ComponentType.LIBRARY,
                bom_ref=f"build:{file.filename}",
                purl=_purl(file.package, file.version),
                scope=ComponentScope.EXCLUDED,
                hashes=[_sha256(file.sha256)],
            )
        )
    for name, version in {"c++": host_compiler, **({"nvcc": nvcc} if nvcc else {})}.items():
        needed.append(
            Component(
                name=name,
                version=version,
                type=ComponentType.APPLICATION,
                bom_ref=f"compiler:{name}",
                scope=ComponentScope.EXCLUDED,
            )
        )
    bom = Bom(
        components=needed,
        metadata=BomMetaData(
            component=package, tools=ToolRepository(components=[Component(name="envbuilder")])
        ),
    )
    bom.register_dependency(package, needed)
    table = json.loads(make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6).output_as_string())
    # The library makes up a time and a number anew each time.
    del table["metadata"]["timestamp"], table["serialNumber"]
    digest = hashlib.sha256(_bytes(table)).digest()
    table["serialNumber"] = f"urn:uuid:{UUID(bytes=digest[:16], version=5)}"
    return _bytes(table)


def _purl(package: str, version: str) -> PackageURL:
    return PackageURL("pypi", None, package, version)


def _generic(name: str, version: str) -> str:
    return str(PackageURL("generic", None, name, version))


def _sha256(digest: str) -> HashType:
    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _bytes(table: Mapping[str, object]) -> bytes:
    return (json.dumps(table, indent=2, sort_keys=True) + "\n").encode()

from __future__ import annotations

import json
import re
from dataclasses import replace
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

from envbuilder.compile.wheels.provenance import BuildStory, provenance_statement, wheel_sbom
from envbuilder.lock import LockedFile
from envbuilder.machine import TorchBuild
from envbuilder.model import BuildReceipt, Extension, UnitTiming

SDIST = LockedFile("my-kernels", "1.0", "my_kernels-1.0.tar.gz", 1, "a" * 64, "default", True)
TORCH = LockedFile("torch", "2.11.0", "torch-2.11.0-cp311-linux.whl", 1, "b" * 64, "default", False)
NVCC = LockedFile("nvidia-cuda-nvcc", "13.0.88", "nvidia_cuda_nvcc.whl", 1, "c" * 64, "default", False)
UNIT = UnitTiming(
    source="csrc/scan forward.cu",
    seconds=60.5,
    cpu_seconds=23.8,
    peak_rss_bytes=491614208,
    architectures_kept=("sm_90",),
    architectures_dropped=("sm_80",),
    shard="f<at::Half, float>",
    compiler="nvcc 13.0.88",
    threads=2,
    command=("nvcc", "-c", "/build/1.cu"),
)
HOST = UNIT.model_copy(
    update={"source": "csrc/host.cpp", "shard": "", "cached": True, "command": ("g++", "-c", "csrc/host.cpp")}
)
RECEIPT = BuildReceipt(
    package="my-kernels",
    version="1.0",
    sdist=SDIST.filename,
    sdist_sha256=SDIST.sha256,
    patches={"patches/b.patch": "d" * 64, "patches/a.patch": "e" * 64},
    key="my-kernels-key",
    wheel="my_kernels-1.0-1_x-cp311-cp311-linux_x86_64.whl",
    wheel_sha256="f" * 64,
    python="3.11.7",
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    cxx11_abi=True,
    nvcc="13.0.88",
    host_compiler="g++ (Debian 12.2.0-14) 12.2.0",
    compute_capabilities=("9.0",),
    architectures_kept=("sm_90",),
    architectures_dropped=("sm_80",),
    extensions=(
        Extension(module="my_kernels_cuda", file="my_kernels_cuda.so", sha256="0" * 64, architectures=()),
    ),
    isolation="sealed",
    node="node07",
    environment={"FORCE_BUILD": "TRUE"},
    differs=("two runs of nvcc differ",),
    compiled_whole={"csrc/host.cu": "has a static variable"},
    units=(UNIT, UNIT.model_copy(update={"shard": "f<float, float>"}), HOST),
    seconds=61.0,
    built_at="2026-01-01T00:01:01+00:00",
)
STORY = BuildStory(
    recipe="lab",
    lock_sha256="9" * 64,
    build_files=(TORCH, NVCC),
    tool_version="0.1.0",
    started_at="2026-01-01T00:00:00+00:00",
)


def statement(receipt: BuildReceipt = RECEIPT, story: BuildStory = STORY) -> dict[str, Any]:
    table = json.loads(provenance_statement(receipt, story))
    assert isinstance(table, dict)
    return table


def test_the_statement_is_of_the_wheel_and_of_each_extension_in_it() -> None:
    table = statement()
    assert table["_type"] == "https://in-toto.io/Statement/v1"
    assert table["predicateType"] == "https://slsa.dev/provenance/v1"
    assert table["subject"] == [
        {"name": RECEIPT.wheel, "digest": {"sha256": "f" * 64}},
        {"name": "my_kernels_cuda.so", "digest": {"sha256": "0" * 64}},
    ]


def test_what_was_asked_for_is_told_apart_from_what_went_in() -> None:
    definition = statement()["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == {
        "recipe": "lab",
        "package": "my-kernels",
        "version": "1.0",
        "computeCapabilities": ["9.0"],
        "environment": {"FORCE_BUILD": "TRUE"},
    }
    went_in = definition["resolvedDependencies"]
    with_hash = {entry["name"]: entry["digest"]["sha256"][0] for entry in went_in if "digest" in entry}
    assert with_hash == {
        SDIST.filename: "a",
        "pylock.lab.toml": "9",
        "patches/b.patch": "d",
        "patches/a.patch": "e",
        TORCH.filename: "b",
        NVCC.filename: "c",
    }
    patches = [entry for entry in went_in if entry["annotations"]["role"] == "patch"]
    assert [(entry["name"], entry["annotations"]["order"]) for entry in patches] == [
        ("patches/b.patch", 1),
        ("patches/a.patch", 2),
    ]
    by_role = {entry["annotations"]["role"]: entry for entry in went_in}
    assert by_role["source"]["uri"] == "pkg:pypi/my-kernels@1.0"
    assert by_role["torch"]["annotations"] == {"role": "torch", "cuda": "13.0", "cxx11Abi": True}
    compilers = {entry["name"] for entry in went_in if entry["annotations"]["role"] == "compiler"}
    assert compilers == {"c++", "nvcc"}


def test_who_built_it_when_and_what_each_unit_took_is_there() -> None:
    run = statement()["predicate"]["runDetails"]
    assert run["builder"] == {
        "id": "urn:envbuilder:builder:sealed",
        "version": {"envbuilder": "0.1.0"},
        "envbuilder_node": "node07",
    }
    assert run["metadata"] == {
        "startedOn": "2026-01-01T00:00:00+00:00",
        "finishedOn": "2026-01-01T00:01:01+00:00",
        "envbuilder_seconds": 61.0,
        "envbuilder_mayDiffer": ["two runs of nvcc differ"],
        "envbuilder_compiledWhole": {"csrc/host.cu": "has a static variable"},
    }
    unit, other, host = run["byproducts"]
    assert unit == {
        "name": "csrc/scan forward.cu [f<at::Half, float>]",
        "uri": "urn:envbuilder:unit:csrc%2Fscan%20forward.cu:f%3Cat%3A%3AHalf%2C%20float%3E",
        "annotations": {
            "seconds": 60.5,
            "cpuSeconds": 23.8,
            "peakRssBytes": 491614208,
            "threads": 2,
            "cached": False,
            "compiler": "nvcc 13.0.88",
            "architecturesKept": ["sm_90"],
            "architecturesDropped": ["sm_80"],
            "command": ["nvcc", "-c", "/build/1.cu"],
        },
    }
    assert other["uri"] != unit["uri"]
    assert (host["name"], host["uri"]) == ("csrc/host.cpp", "urn:envbuilder:unit:csrc%2Fhost.cpp")
    assert (host["annotations"]["cached"], host["annotations"]["command"][0]) == (True, "g++")


def test_every_resource_is_described_by_a_uri_or_a_digest() -> None:
    """In-toto's ResourceDescriptor v1 wants one of uri, digest, content; a URI has a scheme and no space."""
    predicate = statement()["predicate"]
    found = predicate["buildDefinition"]["resolvedDependencies"] + predicate["runDetails"]["byproducts"]
    assert all(entry.keys() & {"uri", "digest"} for entry in found)
    uris = [entry["uri"] for entry in found if "uri" in entry]
    uris += [predicate["buildDefinition"]["buildType"], predicate["runDetails"]["builder"]["id"]]
    assert all(re.fullmatch(r"[a-z]+:[!-~]+", uri) for uri in uris)
    assert not any("//" in uri for uri in uris)


def test_a_build_without_torch_and_cuda_names_neither() -> None:
    changes = {"torch": None, "torch_cuda": None, "cxx11_abi": None, "nvcc": None, "units": ()}
    table = statement(RECEIPT.model_copy(update=changes), replace(STORY, build_files=()))
    went_in = table["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert {entry["annotations"]["role"] for entry in went_in} == {"source", "lock", "patch", "compiler"}
    assert table["predicate"]["runDetails"]["byproducts"] == []


def sbom(**changes: Any) -> bytes:
    given: dict[str, Any] = {
        "patches": RECEIPT.patches,
        "build_files": (TORCH, NVCC),
        "python": "3.11.7",
        "host_compiler": RECEIPT.host_compiler,
        "nvcc": "13.0.88",
        "torch": TorchBuild("2.11.0+cu130", "13.0", True),
        "compute_capabilities": ("9.0",),
    }
    return wheel_sbom(SDIST, **{**given, **changes})


def test_the_bill_is_the_same_for_the_same_build_and_tells_no_time() -> None:
    assert sbom() == sbom() == sbom(build_files=[NVCC, TORCH, TORCH])
    assert b"timestamp" not in sbom()
    assert re.search(rb'"urn:uuid:[0-9a-f-]{36}"', sbom())


@pytest.mark.parametrize(
    "changes",
    [
        {"patches": {}},
        {"patches": dict(reversed(RECEIPT.patches.items()))},
        {"build_files": (TORCH,)},
        {"build_files": (TORCH, replace(NVCC, sha256="1" * 64))},
        {"host_compiler": "g++ 13"},
        {"nvcc": None},
        {"torch": None},
        {"torch": TorchBuild("2.11.0+cu130", "13.0", False)},
        {"compute_capabilities": ("8.0",)},
        {"python": "3.12.1"},
    ],
)
def test_another_build_has_another_bill_with_another_number(changes: dict[str, Any]) -> None:
    one, other = json.loads(sbom()), json.loads(sbom(**changes))
    assert one.pop("serialNumber") != other.pop("serialNumber")
    assert one != other


def test_the_bill_says_what_the_wheel_was_made_of() -> None:
    table = json.loads(sbom())
    package = table["metadata"]["component"]
    assert (package["purl"], package["version"]) == ("pkg:pypi/my-kernels@1.0", "1.0")
    assert package["pedigree"]["notes"].splitlines() == [
        f"patches/b.patch sha256 {'d' * 64}",
        f"patches/a.patch sha256 {'e' * 64}",
    ]
    facts = {entry["name"]: entry["value"] for entry in package["properties"]}
    assert facts == {
        "envbuilder:python": "3.11.7",
        "envbuilder:compute-capabilities": "9.0",
        "envbuilder:torch": "2.11.0+cu130",
        "envbuilder:torch-cuda": "13.0",
        "envbuilder:cxx11-abi": "true",
    }
    parts = {(part["name"], part.get("version")): part for part in table["components"]}
    hashes = {name: part["hashes"][0]["content"][0] for (name, _), part in parts.items() if "hashes" in part}
    assert hashes == {SDIST.filename: "a", "torch": "b", "nvidia-cuda-nvcc": "c"}
    assert {("c++", RECEIPT.host_compiler), ("nvcc", "13.0.88")} <= set(parts)
    needed = next(entry for entry in table["dependencies"] if entry["ref"] == package["bom-ref"])
    assert set(needed["dependsOn"]) == {part["bom-ref"] for part in table["components"]}


@pytest.mark.parametrize("changes", [{}, {"patches": {}, "build_files": (), "torch": None, "nvcc": None}])
def test_the_schema_of_cyclonedx_holds(changes: dict[str, Any]) -> None:
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(sbom(**changes).decode()) is None

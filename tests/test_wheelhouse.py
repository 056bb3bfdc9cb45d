from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from envbuilder.model import BuildReceipt, BuiltWheel
from envbuilder.paths import Root
from envbuilder.wheelhouse import find_built, read_built, store_built
from tests.lab.packages import make_wheel


def store(folder: Path, key: str = "key", **changes: object) -> BuiltWheel:
    wheel = make_wheel(folder, "plain", "1.0", files={"plain.py": key})
    receipt = BuildReceipt(
        package="plain",
        version="1.0",
        sdist="plain-1.0.tar.gz",
        sdist_sha256="a" * 64,
        key=key,
        wheel=wheel.name,
        wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        python="3.12.4",
        torch="2.11.0+cu130",
        torch_cuda="13.0",
        cxx11_abi=True,
        nvcc="13.0.88",
        host_compiler="g++ 12",
        compute_capabilities=("9.0",),
        architectures_kept=("sm_90",),
        architectures_dropped=(),
        extensions=(),
        isolation="none",
        environment={"FORCE_BUILD": "TRUE", "MAX_JOBS": "2"},
        units=(),
        seconds=1.0,
        built_at="2026-01-01T00:00:00+00:00",
    ).model_copy(update=changes)
    return store_built(Root(folder / "root"), wheel, receipt)


def test_provenance_lies_beside_the_wheel_and_an_earlier_builds_goes(tmp_path: Path) -> None:
    built = store(tmp_path)
    again = tmp_path / built.path.name
    stored = store_built(Root(tmp_path / "root"), again, built.receipt, provenance=b"{}")
    provenance = stored.path.with_name("provenance.json")
    assert provenance.read_bytes() == b"{}"
    assert provenance.stat().st_mode & 0o777 == 0o640
    assert store_built(Root(tmp_path / "root"), again, built.receipt) == built
    assert not provenance.exists()


def find(folder: Path, **changes: object) -> BuiltWheel | None:
    wanted: dict[str, object] = {
        "sdist_sha256": "a" * 64,
        "python": "3.12",
        "torch": "2.11.0",
        "compute_capabilities": ("9.0",),
    }
    return find_built(Root(folder / "root"), **{**wanted, **changes})  # type: ignore[arg-type]


def test_what_was_stored_is_found_and_read(tmp_path: Path) -> None:
    built = store(tmp_path)
    assert find(tmp_path) == built
    assert read_built(Root(tmp_path / "root"), "key") == built


@pytest.mark.parametrize(
    "changes",
    [
        {"sdist_sha256": "b" * 64},
        {"python": "3.1"},
        {"torch": "2.12.0"},
        {"torch": "2.11.0+cu128"},
        {"torch": None},
        {"compute_capabilities": ("8.0",)},
        {"compute_capabilities": ("8.0", "9.0")},
        {"environment": {"FORCE_BUILD": "FALSE"}},
        {"patches": ("c" * 64,)},
    ],
)
def test_a_wheel_for_anything_else_is_not_found(tmp_path: Path, changes: dict[str, object]) -> None:
    store(tmp_path)
    assert find(tmp_path, **changes) is None


def test_wheels_of_one_sdist_with_other_patches_are_not_mixed_up(tmp_path: Path) -> None:
    one, other = "c" * 64, "d" * 64
    both = {"patches/b.patch": one, "patches/a.patch": other}
    plain = store(tmp_path, "plain")
    patched = store(tmp_path, "patched", patches=both, built_at="2026-02-01T00:00:00+00:00")
    assert find(tmp_path) == plain
    assert find(tmp_path, patches=[one, other]) == patched
    assert find(tmp_path, patches=[other, one]) is None
    assert find(tmp_path, patches=[one]) is None


def test_the_newest_of_two_is_found(tmp_path: Path) -> None:
    newer = store(tmp_path, "a", built_at="2026-02-01T00:00:00+00:00")
    store(tmp_path, "b")
    assert find(tmp_path, environment={"FORCE_BUILD": "TRUE"}) == newer


@pytest.mark.parametrize("damage", ["no receipt", "no wheel", "not JSON", "another schema"])
def test_an_unfinished_or_damaged_entry_is_as_good_as_none(tmp_path: Path, damage: str) -> None:
    built = store(tmp_path)
    receipt = built.path.parent / "receipt.json"
    if damage == "no wheel":
        built.path.unlink()
    else:
        text = {"not JSON": "{", "another schema": '{"schema_version": 2}'}.get(damage)
        receipt.unlink()
        if text:
            receipt.write_text(text, encoding="utf-8")
    assert find(tmp_path) is None
    assert read_built(Root(tmp_path / "root"), "key") is None


def test_a_wheel_with_other_bytes_is_not_read(tmp_path: Path) -> None:
    built = store(tmp_path)
    built.path.chmod(0o644)
    built.path.write_bytes(built.path.read_bytes() + b"x")
    assert read_built(Root(tmp_path / "root"), "key") is None

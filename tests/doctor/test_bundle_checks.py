"""Real bundles and real built wheels, each damaged in one way."""

from __future__ import annotations

import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.doctor import Subject, choose_checks, run_checks
from envbuilder.lock import lock_filename
from envbuilder.model import BuildReceipt, Bundle, Extension, Finding
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, SourceBuild
from envbuilder.report import Quiet, Unit
from envbuilder.requirements import current_digest
from envbuilder.wheelhouse import store_built
from envbuilder.wheelhouse_index import write_indexes
from tests.bundles.samples import LONG_NAME, NAME, Sample
from tests.doctor.conftest import run_one
from tests.lab.packages import make_wheel

FETCH = f"envbuilder fetch recipes/{NAME}.toml"
RECIPE = Recipe(
    name=NAME, requirements=("top",), build={"native": SourceBuild(patches=("patches/native.patch",))}
)
CODE = b"compiled"


@pytest.fixture
def sample(root: Root) -> Sample:
    return Sample(root, RECIPE)


@pytest.fixture
def bundle(sample: Sample) -> Bundle:
    return sample.make()


def check(name: str, bundle: Bundle, *, recipe: Recipe = RECIPE) -> Finding:
    return run_one(name, root=Root(bundle.path.parents[1]), recipe=recipe, lock=bundle.lock)


EVERY_KIND = [
    "files/top-2.0-py3-none-any.whl",
    "files/native-1.5.tar.gz",
    "tool/envbuilder-0.1-py3-none-any.whl",
    f"models/tiny/{LONG_NAME}",
    "patches/native.patch",
    "recipe.toml",
]


@pytest.mark.parametrize("path", EVERY_KIND)
def test_one_flipped_bit_of_the_bundle_is_found_by_reading_and_not_by_looking(
    bundle: Bundle, path: str
) -> None:
    content = bytearray((bundle.path / path).read_bytes())
    content[len(content) // 2] ^= 1
    (bundle.path / path).write_bytes(content)
    finding = check("bundle.files", bundle)
    assert (finding.verdict, finding.remedy) == ("failed", f"{FETCH} --verify")
    assert finding.evidence[1].startswith(f"{path}: changed: expected sha256 ")
    assert check("bundle.complete", bundle).verdict == "ok"


def test_a_whole_bundle_is_read_to_its_end_and_says_how_far_it_is(bundle: Bundle) -> None:
    told: list[tuple[int, int]] = []

    class Progress(Quiet):
        def progress(self, label: str, done: int, total: int, unit: Unit) -> None:
            if unit == "bytes":
                told.append((done, total))

    subject = Subject(RECIPE, Root(bundle.path.parents[1]), bundle.lock)
    (finding,) = run_checks(subject, Progress(), choose_checks({"bundle.files"}))
    assert finding.verdict == "ok"
    files = [path for path in bundle.path.rglob("*") if path.is_file() and path.name != "bundle.json"]
    assert told[-1][0] == told[-1][1] == sum(path.stat().st_size for path in files)


@pytest.mark.parametrize("which", ["bundle.complete", "bundle.files"])
def test_missing_cut_off_and_stray_files_are_named(bundle: Bundle, which: str, tmp_path: Path) -> None:
    assert check(which, bundle).verdict == "ok"
    files = bundle.path / "files"
    (files / "leaf-1.0-py3-none-any.whl").unlink()
    (files / "top-2.0-py3-none-any.whl").write_bytes(b"short")
    (files / "stray-1.0-py3-none-any.whl").write_bytes(b"")
    patch = bundle.path / "patches/native.patch"
    patch.rename(tmp_path / "elsewhere")
    patch.symlink_to(tmp_path / "elsewhere")
    finding = check(which, bundle)
    assert finding.verdict == "failed"
    assert [line.partition(":")[0] for line in finding.evidence[1:]] == [
        "files/leaf-1.0-py3-none-any.whl",
        "files/stray-1.0-py3-none-any.whl",
        "files/top-2.0-py3-none-any.whl",
        "patches/native.patch",
    ]


def test_a_bundle_that_was_never_finished_is_a_failure_of_all_its_checks(bundle: Bundle) -> None:
    (bundle.path / "bundle.json").unlink()
    for name in ("bundle.complete", "bundle.files", "bundle.current"):
        finding = check(name, bundle)
        assert (finding.verdict, finding.remedy) == ("failed", FETCH)
        assert "incomplete" in finding.summary


def test_without_a_bundle_its_checks_are_skipped(root: Root) -> None:
    for name in ("bundle.complete", "bundle.files", "bundle.current"):
        assert run_one(name, root=root, recipe=RECIPE).verdict == "skipped"


@pytest.fixture
def current(sample: Sample) -> Bundle:
    """A bundle whose lock was made of RECIPE."""
    first = sample.make()
    digest = current_digest(RECIPE, first.lock.patches)
    lock = first.path / lock_filename(NAME)
    text = lock.read_text(encoding="utf-8").replace("0" * 64, digest)
    lock.write_text(text, encoding="utf-8")
    record = first.record.model_copy(update={"lock_sha256": hashlib.sha256(text.encode()).hexdigest()})
    (first.path / "bundle.json").write_text(record.model_dump_json(), encoding="utf-8")
    return first


def test_a_bundle_of_the_recipe_as_it_stands_is_current_and_of_another_not(current: Bundle) -> None:
    assert check("bundle.current", current).verdict == "ok"
    moved_on = RECIPE.model_copy(update={"requirements": ("top", "more")})
    finding = check("bundle.current", current, recipe=moved_on)
    assert finding.verdict == "failed"
    assert finding.remedy == f"envbuilder lock recipes/{NAME}.toml"


def test_a_patch_that_was_edited_after_the_lock_makes_the_bundle_an_old_one(
    current: Bundle, tmp_path: Path
) -> None:
    patch = tmp_path / "recipes/patches/native.patch"
    patch.parent.mkdir(parents=True)
    patch.write_bytes((current.path / "patches/native.patch").read_bytes())

    def verdict() -> str:
        root = Root(current.path.parents[1])
        subject = Subject(RECIPE, root, None, recipe_path=tmp_path / "recipes/sample.toml")
        (finding,) = run_checks(subject, Quiet(), choose_checks({"bundle.current"}))
        return finding.verdict

    assert verdict() == "ok"
    patch.write_bytes(patch.read_bytes() + b" ")
    assert verdict() == "failed"


def test_a_bundle_of_an_older_lock_than_the_one_beside_the_recipe_is_found(
    current: Bundle, tmp_path: Path
) -> None:
    lock = tmp_path / lock_filename(NAME)
    lock.write_bytes((current.path / lock.name).read_bytes())

    def finding() -> Finding:
        subject = Subject(RECIPE, Root(current.path.parents[1]), None, lock_path=lock)
        return run_checks(subject, Quiet(), choose_checks({"bundle.current"}))[0]

    assert finding().verdict == "ok"
    lock.write_text(lock.read_text(encoding="utf-8") + "\n# made anew\n", encoding="utf-8")
    assert (finding().verdict, finding().remedy) == ("failed", FETCH)


@pytest.fixture
def build(root: Root, tmp_path: Path) -> Callable[..., BuildReceipt]:
    """Puts a built wheel of the lock's source package `native` into the wheelhouse."""

    def make(key: str = "native-1.5-cp312-sm90-0123456789ab", **changes: object) -> BuildReceipt:
        wheel = make_wheel(tmp_path, "native", "1.5", files={"native_ext.so": CODE})
        extension = Extension(
            module="native_ext",
            file="native_ext.so",
            sha256=hashlib.sha256(CODE).hexdigest(),
            architectures=(),
        )
        receipt = BuildReceipt(
            package="native",
            version="1.5",
            sdist="native-1.5.tar.gz",
            sdist_sha256="a" * 64,
            key=key,
            wheel=wheel.name,
            wheel_sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
            python="3.12.1",
            torch=None,
            torch_cuda=None,
            cxx11_abi=None,
            nvcc=None,
            host_compiler="g++",
            compute_capabilities=("9.0",),
            architectures_kept=(),
            architectures_dropped=(),
            extensions=(extension,),
            isolation="sealed",
            environment={},
            units=(),
            seconds=1.0,
            built_at="2026-01-01T00:00:00+00:00",
        ).model_copy(update=changes)
        store_built(root, wheel, receipt)
        return receipt

    return make


def wheel_of(root: Root, receipt: BuildReceipt) -> Path:
    return root.wheelhouse / receipt.key / receipt.wheel


WHEELHOUSE = ("wheelhouse.receipts", "wheelhouse.wheels", "wheelhouse.index")


def test_a_whole_wheelhouse_is_right(bundle: Bundle, root: Root, build: Callable[..., BuildReceipt]) -> None:
    build()
    write_indexes(root)
    assert [check(name, bundle).verdict for name in WHEELHOUSE] == ["ok", "ok", "ok"]


def test_before_anything_is_built_the_wheelhouse_is_skipped(bundle: Bundle) -> None:
    findings = [check(name, bundle) for name in WHEELHOUSE]
    assert {finding.verdict for finding in findings} == {"skipped"}
    assert "envbuilder compile" in findings[0].summary


def test_builds_of_other_recipes_are_not_looked_at(
    bundle: Bundle, root: Root, build: Callable[..., BuildReceipt]
) -> None:
    build()
    (root.wheelhouse / "foreign-1.0-cp312-0123456789ab").mkdir()
    assert check("wheelhouse.receipts", bundle).verdict == "ok"


@pytest.mark.parametrize("damage", ["no receipt", "torn", "no wheel", "of another key"])
def test_a_build_without_wheel_or_receipt_is_named(
    bundle: Bundle, root: Root, build: Callable[..., BuildReceipt], damage: str
) -> None:
    built = build()
    receipt = root.wheelhouse / built.key / "receipt.json"
    if damage == "no receipt":
        receipt.unlink()
    elif damage == "torn":
        receipt.write_bytes(receipt.read_bytes()[:100])
    elif damage == "no wheel":
        wheel_of(root, built).unlink()
    else:
        receipt.parent.rename(root.wheelhouse / "native-1.5-cp311-sm80-fedcba987654")
    finding = check("wheelhouse.receipts", bundle)
    assert finding.verdict == "failed"
    assert "native-1.5-" in finding.evidence[0]


def test_a_corrupted_wheel_in_the_wheelhouse_is_named(
    bundle: Bundle, root: Root, build: Callable[..., BuildReceipt]
) -> None:
    wheel = wheel_of(root, build())
    content = bytearray(wheel.read_bytes())
    content[len(content) // 2] ^= 1
    wheel.write_bytes(content)
    finding = check("wheelhouse.wheels", bundle)
    assert finding.verdict == "failed"
    assert finding.evidence[0].startswith(f"{wheel}: expected sha256 ")
    assert finding.remedy is not None
    assert "--rebuild" in finding.remedy


def test_a_wheel_whose_extension_is_not_the_receipts_is_named(
    bundle: Bundle, root: Root, build: Callable[..., BuildReceipt]
) -> None:
    built = build()
    wheel = wheel_of(root, built)
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("native_ext.so", b"something else")
    vouching = built.model_copy(update={"wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest()})
    (wheel.parent / "receipt.json").write_text(vouching.model_dump_json(), encoding="utf-8")
    (line,) = check("wheelhouse.wheels", bundle).evidence
    assert line.endswith("native_ext.so is not the extension module of the receipt")


def test_an_index_of_a_build_for_a_local_version_of_torch_is_right(
    bundle: Bundle, root: Root, build: Callable[..., BuildReceipt]
) -> None:
    build("native-1.5-cp312-torch2.11.0+cu130-sm90-0123456789ab", torch="2.11.0+cu130", torch_cuda="13.0")
    (index,) = write_indexes(root)
    assert "%2Bcu130" in (index.path / "native" / "index.json").read_text(encoding="utf-8")
    assert check("wheelhouse.index", bundle).verdict == "ok"


def test_an_index_that_leads_to_a_wheel_that_is_gone_or_another_is_found(
    bundle: Bundle, root: Root, build: Callable[..., BuildReceipt]
) -> None:
    built = build()
    (index,) = write_indexes(root)
    page = index.path / "native" / "index.json"
    text = page.read_text(encoding="utf-8")
    for damaged, why in {
        text[:50]: "damaged",
        text.replace(built.wheel_sha256, "b" * 64): "another sha256 than its receipt",
        text.replace(built.key, "gone"): "no finished wheel",
    }.items():
        page.write_text(damaged, encoding="utf-8")
        finding = check("wheelhouse.index", bundle)
        assert finding.verdict == "failed"
        assert why in finding.evidence[0]
        assert finding.remedy is not None
        assert finding.remedy.endswith(" --local")  # what is built stays, and the pages are written again
    page.write_text(text, encoding="utf-8")
    (index.path / "native" / "index.html").write_text("", encoding="utf-8")
    assert "lacks native-1.5" in check("wheelhouse.index", bundle).evidence[0]

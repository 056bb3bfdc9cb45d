"""The bundle and the wheelhouse, byte for byte against the lock and the receipts."""

from __future__ import annotations

import hashlib
import json
import zipfile
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import unquote

from envbuilder.bundle import hash_file
from envbuilder.bundle_contents import Examined, examine, mending
from envbuilder.doctor.check import Check, Outcome, failed, ok, skipped
from envbuilder.doctor.evidence import shown
from envbuilder.doctor.subject import Subject
from envbuilder.errors import IntegrityError
from envbuilder.lock import check_current, read_lock
from envbuilder.model import BuildReceipt, BuiltWheel, read_record
from envbuilder.patches import locked_patches
from envbuilder.report import Reporter
from envbuilder.requirements import current_digest
from envbuilder.wheelhouse import RECEIPT, all_built
from envbuilder.wheelhouse_index import SIMPLE


def check_current_bundle(subject: Subject, reporter: Reporter) -> Outcome:
    """Whether the bundle is of the recipe and of the lock as they stand."""
    assert subject.recipe is not None
    bundle, path = subject.bundle, subject.lock_path
    patches = locked_patches(
        subject.recipe, subject.recipe_path.parent if subject.recipe_path else bundle.path
    )
    check_current(bundle.lock, current_digest(subject.recipe, patches))
    if path is None or not path.exists():
        return ok("The bundle is of the recipe as it stands.", f"lock: sha256 {bundle.lock.digest}")
    lock = read_lock(path)
    evidence = (f"{path}: sha256 {lock.digest}", f"{bundle.path}: sha256 {bundle.lock.digest}")
    if lock.digest != bundle.lock.digest:
        return failed(
            f"The bundle is of another lock than {path.name}.",
            *evidence,
            remedy=f"envbuilder fetch {subject.recipe_file}",
        )
    return ok("The bundle is of the recipe and the lock as they stand.", *evidence)


def check_complete(subject: Subject, reporter: Reporter) -> Outcome:
    """Names and sizes of the bundle's files; none is read."""
    found = examine(subject.bundle, reporter, sizes_only=True)
    return _bundle_outcome(subject, found, f"All {found.files} files are there and have the locked size.")


def check_bundle_files(subject: Subject, reporter: Reporter) -> Outcome:
    """Every byte of the bundle: packages, models, patches, the tool's own files."""
    found = examine(subject.bundle, reporter)
    right = f"All {found.files} files ({found.bytes:,} bytes) have the sha256 that the lock names."
    return _bundle_outcome(subject, found, right)


def _bundle_outcome(subject: Subject, found: Examined, right: str) -> Outcome:
    if found.problems:
        return failed(
            f"{len(found.problems)} files of the bundle are not what its lock names.",
            str(subject.bundle.path),
            *shown([f"{problem.path}: {problem.detail}" for problem in found.problems]),
            remedy=mending(subject.bundle, found.problems),
        )
    return ok(right, str(subject.bundle.path))


def check_receipts(subject: Subject, reporter: Reporter) -> Outcome:
    """The receipt of every wheel that was built for the recipe."""
    folders = tuple(_folders(subject))
    faults = [fault for folder in folders if (fault := _receipt_fault(folder))]
    if faults:
        return failed(
            f"{len(faults)} of {len(folders)} builds in the wheelhouse can't be used.",
            *shown(faults),
            remedy=f"envbuilder compile {subject.recipe_file} --local",
        )
    if not folders:
        return _nothing_built(subject)
    return ok(
        "Every built wheel is there with its receipt.", *(f"{folder.name}: {RECEIPT}" for folder in folders)
    )


def _receipt_fault(folder: Path) -> str | None:
    try:
        receipt = read_record(folder / RECEIPT, BuildReceipt, remedy="")
    except IntegrityError as error:
        return error.message
    if receipt.key != folder.name:
        return f"{folder / RECEIPT} is of another build: {receipt.key}"
    return None if (folder / receipt.wheel).is_file() else f"{folder / receipt.wheel} is missing"


def check_wheels(subject: Subject, reporter: Reporter) -> Outcome:
    """Every byte of the recipe's built wheels, and of the extension modules in them."""
    folders = set(_folders(subject))
    wheels = [built for built in all_built(subject.root) if built.path.parent in folders]
    if not wheels:
        return _nothing_built(subject)
    faults: list[str] = []
    with ThreadPoolExecutor() as pool:
        for done, found in enumerate(pool.map(_wheel_faults, wheels), start=1):
            faults += found
            reporter.progress("hashing the wheelhouse", done, len(wheels), "files")
    if faults:
        return failed(
            f"The wheelhouse is not as it was built, in {len(faults)} places.",
            *shown(faults),
            remedy=subject.rebuild,
        )
    return ok(
        f"All {len(wheels)} built wheels have the bytes that their receipts name.",
        *(f"{built.path}: sha256 {built.receipt.wheel_sha256}" for built in wheels),
    )


def _wheel_faults(built: BuiltWheel) -> list[str]:
    receipt = built.receipt
    try:
        if (got := hash_file(built.path)) != receipt.wheel_sha256:
            return [f"{built.path}: expected sha256 {receipt.wheel_sha256}, got {got}"]
        with zipfile.ZipFile(built.path) as archive:
            return [
                f"{built.path}: {extension.file} is not the extension module of the receipt"
                for extension in receipt.extensions
                if hashlib.sha256(archive.read(extension.file)).hexdigest() != extension.sha256
            ]
    except (OSError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        return [f"{built.path} can't be read: {error}"]


def check_index(subject: Subject, reporter: Reporter) -> Outcome:
    """The index pages that pip and uv read, against the wheels that they link to."""
    pages = sorted((subject.root.wheelhouse / SIMPLE).glob("*/*/index.json"))
    if not pages:
        return skipped("The wheelhouse has no index: compile writes it with the first wheel that it builds.")
    built = {wheel.path: wheel.receipt.wheel_sha256 for wheel in all_built(subject.root)}
    faults = [fault for page in pages for fault in _page_faults(page, built)]
    if faults:
        return failed(
            f"The wheelhouse's index is wrong in {len(faults)} places.",
            *shown(faults),
            remedy=f"envbuilder compile {subject.recipe_file} --local",
        )
    return ok(
        "Every link of the wheelhouse's index leads to a wheel with that hash.",
        *(str(page.parent) for page in pages),
    )


def _page_faults(page: Path, built: dict[Path, str]) -> Iterator[str]:
    try:
        files = json.loads(page.read_bytes())["files"]
        html = (page.parent / "index.html").read_text(encoding="utf-8")
        for file in files:
            wheel = (page.parent / unquote(file["url"])).resolve()
            sha256 = next((sha256 for path, sha256 in built.items() if path.resolve() == wheel), None)
            if sha256 is None:
                yield f"{page}: {file['filename']} is no finished wheel of the wheelhouse"
            elif sha256 != file["hashes"]["sha256"]:
                yield f"{page}: {file['filename']} has another sha256 than its receipt"
            elif f"#sha256={sha256}" not in html:
                yield f"{page.parent / 'index.html'} lacks {file['filename']}"
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield f"{page} is damaged: {type(error).__name__}: {error}"


def _folders(subject: Subject) -> Iterator[Path]:
    """The wheelhouse's folders of the recipe's source packages, by their names' beginning: one whose receipt
    is gone is among them."""
    if subject.lock is None:
        return
    sources = [
        f"{package.name}-{package.version}-" for package in subject.lock.pylock.packages if package.sdist
    ]
    for folder in sorted(subject.root.wheelhouse.glob("*/")):
        if folder.name.startswith(tuple(sources)):
            yield folder


def _nothing_built(subject: Subject) -> Outcome:
    lock = subject.lock
    if lock is not None and not any(package.sdist for package in lock.pylock.packages):
        return skipped("The lock has no source packages, so nothing is built.")
    return skipped(f"Nothing is built yet: envbuilder compile {subject.recipe_file} --local")


CHECKS = (
    Check(
        "bundle.current",
        "the bundle's lock",
        "whether the bundle is of the recipe and the lock as they stand",
        check_current_bundle,
        needs=("recipe", "bundle"),
    ),
    Check(
        "bundle.complete",
        "the bundle's list of files",
        "bundle.json, and names and sizes of all files against the lock: missing, cut off, in no lock, links",
        check_complete,
        needs=("recipe", "bundle"),
    ),
    Check(
        "bundle.files",
        "the bundle's files",
        "every byte of the bundle against the lock: packages, models, patches, the tool's own files",
        check_bundle_files,
        needs=("recipe", "bundle"),
        cost="rehash",
        limit_s=1800,
    ),
    Check(
        "wheelhouse.receipts",
        "the built wheels' receipts",
        "whether each build of the recipe's source packages has a wheel and a receipt that can be read",
        check_receipts,
        needs=("recipe",),
    ),
    Check(
        "wheelhouse.wheels",
        "the built wheels",
        "every byte of the recipe's built wheels and of their extension modules against the receipts",
        check_wheels,
        needs=("recipe",),
        cost="rehash",
        limit_s=1800,
    ),
    Check(
        "wheelhouse.index",
        "the wheelhouse's index",
        "whether each link of the index that pip and uv read leads to a wheel with that hash",
        check_index,
        needs=("recipe",),
    ),
)

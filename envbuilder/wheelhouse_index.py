"""The wheelhouse as static package indexes that a group can share: one for each ABI, in `wheelhouse/simple`.

    simple/cp312-torch2.11.0_cu130-sm90/           index.html, index.json: its packages
    simple/cp312-torch2.11.0_cu130-sm90/NAME/      index.html, index.json: links to that package's wheels

pip and uv install from such a folder, by `--index-url file://…` or from any file server: pages are those of
PEP 503 and, for servers that know them, PEP 691. An index has the newest build of each version, so what an
installer takes does not hang on how build tags sort; older builds stay in the wheelhouse.

Pages are made from the receipts, each put in place whole, a package's before the list that names it.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.parser import BytesParser
from pathlib import Path
from urllib.parse import quote

from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from envbuilder.atomic import write_atomically
from envbuilder.gpu import architecture
from envbuilder.model import BuildReceipt, BuiltWheel
from envbuilder.paths import Root
from envbuilder.wheelhouse import all_built

SIMPLE = "simple"
"""The folder of the wheelhouse with the indexes."""
_MOST_LOST = 10
"""How often other processes may be in the way."""
_METADATA = re.compile(r"[^/]+\.dist-info/METADATA")
_HTML = """\
<!DOCTYPE html>
<html>
<head>
<meta charset="utf-8">
<meta name="pypi:repository-version" content="1.1">
<title>{title}</title>
</head>
<body>
{links}
</body>
</html>
"""


@dataclass(frozen=True)
class WheelIndex:
    """One index."""

    abi: str
    """Its folder's name, e.g. "cp312-torch2.11.0_cu130-sm90"."""
    path: Path
    """Its folder: `--index-url` is this as a URL."""
    wheels: tuple[BuiltWheel, ...]
    """Those that it offers, by package and version."""


@dataclass(frozen=True)
class _Link:
    """One wheel as a page has it."""

    filename: str
    url: str
    """Relative to the page."""
    sha256: str
    size: int
    """Bytes."""
    version: str
    requires_python: str | None


def abi_name(receipt: BuildReceipt) -> str:
    """Names the index for what was built like `receipt`: Python, torch build, CUDA, C++ ABI, architectures.

    Letters, digits, ".", "_" and "-": it needs no quoting in a URL or a shell.
    """
    major, minor, *_ = receipt.python.split(".")
    parts = [f"cp{major}{minor}"]
    if receipt.torch:
        parts.append(f"torch{receipt.torch}")
        cuda = f"cu{''.join((receipt.torch_cuda or '').split('.')[:2])}"
        if receipt.torch_cuda and receipt.torch.partition("+")[2] != cuda:
            parts.append(cuda)
        if receipt.cxx11_abi is False:
            parts.append("oldabi")
    parts += [f"sm{architecture(capability)}" for capability in receipt.compute_capabilities]
    return "-".join(re.sub(r"[^0-9A-Za-z.]+", "_", part) for part in parts)


def write_indexes(root: Root) -> tuple[WheelIndex, ...]:
    """Makes the indexes say what the wheelhouse holds, and returns them by name.

    Several processes may do this at once: each looks again when it is done, so the last one has seen all.
    A wheel whose metadata can't be read is left out. MismatchError where the pages can't be written.
    """
    lost = 0
    while True:  # each further round is for a wheel that came or went during the one before
        before = _newest(root)
        try:
            indexes = tuple(_write(root, abi, wheels) for abi, wheels in sorted(before.items()))
            _remove_others(root.wheelhouse / SIMPLE, {index.abi for index in indexes})
        except FileNotFoundError:  # a process that saw less took away the folder that was being filled
            lost += 1
            if lost == _MOST_LOST:
                raise
            continue
        if _newest(root) == before:
            return indexes


def _newest(root: Root) -> dict[str, tuple[BuiltWheel, ...]]:
    """The name of each index → its wheels: the newest of each package, version and kind of machine."""
    found: dict[tuple[str, str, str, str], BuiltWheel] = {}
    for built in sorted(all_built(root), key=lambda built: built.receipt.built_at):
        receipt = built.receipt
        try:
            _, version, _, tags = parse_wheel_filename(receipt.wheel)
        except InvalidWheelFilename:
            continue
        machine = ".".join(sorted({tag.platform for tag in tags}))
        found[abi_name(receipt), canonicalize_name(receipt.package), str(version), machine] = built
    indexes: dict[str, list[BuiltWheel]] = {}
    for (abi, *_), built in sorted(found.items(), key=lambda entry: entry[0]):
        indexes.setdefault(abi, []).append(built)
    return {abi: tuple(wheels) for abi, wheels in indexes.items()}


def _write(root: Root, abi: str, wheels: tuple[BuiltWheel, ...]) -> WheelIndex:
    """Writes the pages of one index; the list of its packages last, then what is no longer in it goes."""
    folder = root.wheelhouse / SIMPLE / abi
    links: dict[str, list[_Link]] = {}
    offered = []
    for built in wheels:
        if link := _link(built):
            links.setdefault(canonicalize_name(built.receipt.package), []).append(link)
            offered.append(built)
    for name, of_package in links.items():
        _put(folder / name / "index.html", _package_html(name, of_package))
        _put(folder / name / "index.json", _json(_package_json(name, of_package)))
    names = [f'<a href="{name}/">{name}</a><br>' for name in links]
    _put(folder / "index.html", _HTML.format(title=abi, links="\n".join(names)))
    _put(folder / "index.json", _json({"projects": [{"name": name} for name in links]}))
    _remove_others(folder, set(links))
    return WheelIndex(abi, folder, tuple(offered))


def _link(built: BuiltWheel) -> _Link | None:
    """None where the wheel's metadata can't be read: nobody could install it."""
    _, version, *_ = parse_wheel_filename(built.receipt.wheel)
    try:
        with zipfile.ZipFile(built.path) as archive:
            member = next(name for name in archive.namelist() if _METADATA.fullmatch(name))
            metadata = BytesParser().parsebytes(archive.read(member), headersonly=True)
        size = built.path.stat().st_size
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, StopIteration):
        return None
    return _Link(
        filename=built.receipt.wheel,
        url="/".join(("../../..", quote(built.path.parent.name, safe=""), quote(built.path.name, safe=""))),
        sha256=built.receipt.wheel_sha256,
        size=size,
        version=str(version),
        requires_python=metadata["Requires-Python"],
    )


def _package_html(name: str, links: Sequence[_Link]) -> str:
    lines = []
    for link in links:
        python = (
            f' data-requires-python="{html.escape(link.requires_python)}"' if link.requires_python else ""
        )
        address = html.escape(f"{link.url}#sha256={link.sha256}")
        lines.append(f'<a href="{address}"{python}>{html.escape(link.filename)}</a><br>')
    return _HTML.format(title=name, links="\n".join(lines))


def _package_json(name: str, links: Sequence[_Link]) -> dict[str, object]:
    files = [
        {
            "filename": link.filename,
            "url": link.url,
            "hashes": {"sha256": link.sha256},
            "size": link.size,
            **({"requires-python": link.requires_python} if link.requires_python else {}),
        }
        for link in links
    ]
    return {"name": name, "versions": list(dict.fromkeys(link.version for link in links)), "files": files}


def _json(table: Mapping[str, object]) -> str:
    return json.dumps({"meta": {"api-version": "1.1"}, **table}, indent=2) + "\n"


def _put(path: Path, text: str) -> None:
    """Writes the page, unless it says so already."""
    with suppress(OSError):
        if path.read_bytes() == text.encode():
            return
    write_atomically(path, text)


def _remove_others(folder: Path, names: set[str]) -> None:
    """Removes the folders in `folder` that are not among `names`: they are of wheels that are gone."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and path.name not in names and not path.name.startswith("."):
            shutil.rmtree(path, ignore_errors=True)

"""The list of what a bundle still lacks, for a machine that has nothing but wget, curl or aria2.

URLs are looked up at this moment, and stand in the user's own file alone. Credentials in them stay behind:
the tools read netrc.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from envbuilder.atomic import new_file
from envbuilder.budget import budget
from envbuilder.errors import UsageError
from envbuilder.fetch.files import MOST_AT_ONCE, by_content
from envbuilder.fetch.stage import plan_bundle
from envbuilder.fetch.wanted import Origins, Wanted, wanted_files
from envbuilder.lock import FILES, GROUPS, MODELS, LockedFile, SourceLock
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Reporter
from envbuilder.target import target_for

_MODE = 0o600
"""A URL's query may be a signature that lets anybody in."""
_KEPT = ":/?#[]@!$&'()*+,;=%~"
"""What stays as it is in a URL, beside letters, digits and "_.-" (RFC 3986 §2): no quote, no line's end."""


@dataclass(frozen=True)
class Item:
    """One file of the list."""

    url: str
    """Without credentials."""
    path: str
    """Its place in a bundle, and below the folder that a tool fills; with wget, its URL says where."""
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True)
class Export:
    """What `export_urls` found and wrote."""

    file: Path | None
    """None where nothing is left that a URL leads to: then nothing is written."""
    items: tuple[Item, ...]
    git: tuple[str, ...]
    """Files that are packed from git, which no URL leads to."""
    local: tuple[Path, ...]
    """Files that lie in pip's find-links on this machine."""
    hosts_with_credentials: tuple[str, ...]
    """Those whose credentials were left out."""


def export_urls(
    recipe: Recipe,
    lock: SourceLock,
    *,
    root: Root,
    python: str,
    origins: Origins,
    tool: str,
    out: Path,
    reporter: Reporter,
    verify: bool = False,
) -> Export:
    """Writes to `out` what the bundle of `recipe` for Python `python` still lacks, as `tool` reads it.

    `verify` reads also what is as the last fetch left it. Nothing is transferred but the index's pages.
    UsageError for an unknown tool, or where wget would give a file another name; NetworkError and
    IntegrityError as from Index.offer_of.
    """
    if tool not in FORMATS:
        raise UsageError(
            f"{tool} is none of the tools that a list is written for.",
            remedy=f"envbuilder fetch recipes/{recipe.name}.toml --export-urls wget",
            context={"tools": ", ".join(FORMATS), "got": tool},
        )
    target = target_for(lock.target, python)
    files = wanted_files(recipe, lock, target, origins)
    plan = plan_bundle(recipe, files, root=root, reporter=reporter, verify=verify)
    missing = {same[0].path: same[0] for same in by_content(plan.origin)}
    packages = [file for file in lock.select(target, GROUPS) if f"{FILES}/{file.filename}" in missing]
    found = _offered([file for file in packages if file.index is not None], origins)
    found |= _of_models(lock, missing, origins)
    items, local, hosts = [], [], set()
    for path, place in found.items():
        if isinstance(place, Path):
            local.append(place)
            continue
        url, host = _without_credentials(place)
        hosts |= {host} if host else set()
        items.append(Item(url, path, missing[path].size, missing[path].sha256))
    if items:
        text = FORMATS[tool].text(items).encode()
        with new_file(out, size=len(text), mode=_MODE) as file:
            file.write(text)
    return Export(
        file=out if items else None,
        items=tuple(items),
        git=tuple(file.filename for file in packages if file.index is None),
        local=tuple(local),
        hosts_with_credentials=tuple(sorted(hosts)),
    )


def _offered(files: Sequence[LockedFile], origins: Origins) -> dict[str, str | Path]:
    """Path in a bundle → URL, or path on this machine, of what comes from an index."""

    def place(file: LockedFile) -> str | Path:
        assert file.index is not None  # the caller has looked
        offer = origins.indexes[file.index].offer_of(file)
        return offer.path or offer.url

    with ThreadPoolExecutor(budget().at_once(MOST_AT_ONCE)) as pool:
        return dict(zip([f"{FILES}/{file.filename}" for file in files], pool.map(place, files)))


def _of_models(lock: SourceLock, missing: dict[str, Wanted], origins: Origins) -> dict[str, str | Path]:
    """Path in a bundle → URL of what comes from the hub."""
    found: dict[str, str | Path] = {}
    for model in lock.models:
        assert origins.hub is not None  # there is one where the lock has models
        for file in model.files:
            if (path := f"{MODELS}/{model.name}/{file.name}") in missing:
                found[path] = origins.hub.file_url(model, file)
    return found


def _without_credentials(url: str) -> tuple[str, str | None]:
    """`url` as any tool may be given it, and its host where credentials were left out."""
    parts = urlsplit(url)
    credentials, _, host = parts.netloc.rpartition("@")
    plain = urlunsplit((parts.scheme, host, parts.path, parts.query, ""))
    return quote(plain, safe=_KEPT), (parts.hostname if credentials else None)


def _wget(items: Sequence[Item]) -> str:
    """`wget -i` takes URLs and no names, and no comments: with -x each lies in folders of its own."""
    for item in items:
        url = urlsplit(item.url)
        if url.query or PurePosixPath(unquote(url.path)).name != PurePosixPath(item.path).name:
            raise UsageError(
                f"wget would give {PurePosixPath(item.path).name} another name, the end of its URL.",
                remedy="For curl, which takes names: --export-urls curl",
                context={"file": item.path},
            )
    return "".join(f"{item.url}\n" for item in items)


def _curl(items: Sequence[Item]) -> str:
    """A config file (curl(1), -K), with options that curl 7.61 of RHEL 8 has too.

    curl ends with the status of its last file alone, and newer ones call a file that is whole an error (416).
    """
    head = [
        "# Run again, curl goes on where it stopped; 416 means that a file is whole already.",
        *("fail", "location", "globoff", "netrc-optional", "create-dirs"),
        *("retry = 5", "continue-at = -"),
    ]
    files = [f"url = {_quoted(item.url)}\noutput = {_quoted(item.path)}" for item in items]
    return "\n".join([*head, *files, ""])


def _aria2(items: Sequence[Item]) -> str:
    """An input file (aria2c(1), -i)."""
    return "".join(
        f"{item.url}\n  out={item.path}\n  checksum=sha-256={item.sha256}\n  continue=true\n"
        for item in items
    )


def _quoted(text: str) -> str:
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"') + '"'


@dataclass(frozen=True)
class Format:
    """How one tool takes a list."""

    text: Callable[[Sequence[Item]], str]
    """The list's text."""
    command: str
    """The command that brings {file} into the folder {folder}, and goes on where it stopped."""

    def command_for(self, file: Path, folder: Path) -> str:
        return self.command.format(file=shlex.quote(str(file)), folder=shlex.quote(str(folder)))


FORMATS = {
    "wget": Format(_wget, "wget -c -x -P {folder} -i {file}"),
    "curl": Format(_curl, "mkdir -p {folder} && cd {folder} && curl -K {file}"),
    "aria2": Format(_aria2, "aria2c -d {folder} -i {file}"),
}

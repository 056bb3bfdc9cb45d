"""Patches of a recipe: read, locked by their hashes, and applied to an unpacked source tree.

`git apply` applies them: it takes no fuzz, looks at every file before it writes one, and goes neither out of
the tree nor through a link. It knows creations, deletions, renames and modes, which the format has words for.
Of the Python libraries for this, none refuses all that it can't do whole.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
from collections.abc import Mapping
from pathlib import Path

from envbuilder.errors import BuildError, InputError
from envbuilder.lock import LockedPatch
from envbuilder.process import Completed, run
from envbuilder.recipe import Recipe

_LARGEST = 8 << 20
"""Bytes that a patch may have."""
_HEADER = re.compile(rb"^(?:diff --git .+|--- .+\r?\n\+\+\+ .+)$", re.MULTILINE)
# What git says of a patch that makes a link or a submodule of a path.
_NO_FILE = re.compile(r"^ (?:create mode|mode change \d+ =>) 1[26]0000 (.+)$", re.MULTILINE)
_FAILED = re.compile(r"^error: patch failed: (.+):(\d+)$|^error: (.+?): .+$", re.MULTILINE)


def read_patches(recipe: Recipe, folder: Path) -> dict[str, bytes]:
    """Path → content of all patches of `recipe`, which lie below its `folder`.

    InputError where one is missing or no patch, too large, or is reached through a link out of `folder`.
    """
    paths = sorted({path for build in recipe.build.values() for path in build.patches})
    return {path: _read(recipe, folder, path) for path in paths}


def locked_patches(recipe: Recipe, folder: Path) -> tuple[LockedPatch, ...]:
    """All patches of `recipe` as a lock names them, each path once, by path; raises as `read_patches`."""
    return tuple(
        LockedPatch(path, len(content), hashlib.sha256(content).hexdigest())
        for path, content in read_patches(recipe, folder).items()
    )


def check_git() -> None:
    """MismatchError where there is no git to apply patches with."""
    run(["git", "--version"])


def apply_patches(tree: Path, patches: Mapping[str, bytes]) -> None:
    """Applies `patches` (name → content) to the files in `tree`, in their order: all of them, or none.

    A hunk's lines may have moved, but its context must be there to the letter. The first component of the
    paths in a patch is dropped. The files get the modes that an unpacked archive has, whatever the umask.

    BuildError where one doesn't fit or would make a link, with the tree as it was; MismatchError without git.
    """
    applied: list[Path] = []
    with tempfile.TemporaryDirectory(prefix="patches-") as scratch:
        for number, (name, content) in enumerate(patches.items()):
            patch = Path(scratch) / f"{number}.patch"
            patch.write_bytes(content)
            summary = _git_apply(tree, "--summary", "--check", patch)
            found = _NO_FILE.search(summary.output)
            done = summary if found or summary.returncode != 0 else _git_apply(tree, patch)
            if found or done.returncode != 0:
                for earlier in reversed(applied):
                    _git_apply(tree, "--reverse", earlier)
                    _set_modes(tree)
                raise _refusal(name, done, found[1] if found else None)
            applied.append(patch)
    _set_modes(tree)


def _set_modes(tree: Path) -> None:
    for path in tree.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)


def _git_apply(tree: Path, *arguments: str | Path) -> Completed:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    environment |= {
        "LC_ALL": "C",
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        # In a repository, git would look for the files in the repository's folder, and skip those in ours.
        "GIT_DIR": os.devnull,
    }
    words = ["git", "-c", "core.autocrlf=false", "apply", "-p1", "--whitespace=nowarn", *arguments]
    return run(words, env=environment, cwd=tree)


def _refusal(name: str, done: Completed, link: str | None) -> BuildError:
    places = [(match[1] or match[3], match[2]) for match in _FAILED.finditer(done.output)]
    hunks = [f"{file}: the hunk at line {line}" for file, line in places if line]
    if link:
        why = f"it would make a link or a submodule of {link}"
    elif hunks:
        why = f"{', '.join(hunks)} does not fit"
    else:
        why = done.output.strip().partition("\n")[0].removeprefix("error: ")
    return BuildError(
        f"The patch {name} can't be applied: {why}.",
        remedy=f"Make {name} anew for the version that is locked (git diff), then lock the recipe again.",
        context={
            "patch": name,
            "file": link or ", ".join(sorted({file for file, _ in places})) or "not known",
            "git": done.output.strip()[-2000:],
        },
    )


def _read(recipe: Recipe, folder: Path, path: str) -> bytes:
    def refusal(why: object) -> InputError:
        return InputError(
            f"The patch {path} of the recipe {recipe.name} can't be used: {why}.",
            remedy=f"Put it there, in git's format (git diff > {path}), or delete it from the recipe.",
            context={"file": folder / path},
        )

    place = folder / path
    try:
        if not place.is_file():
            raise refusal("there is no such file")
        if not place.resolve().is_relative_to(folder.resolve()):
            raise refusal("it lies outside of the recipe's folder")
        with place.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except OSError as error:
        raise refusal(error.strerror) from error
    if len(content) > _LARGEST:
        raise refusal(f"it is larger than {_LARGEST:,} bytes")
    if not _HEADER.search(content):
        raise refusal("it is no patch")
    return content

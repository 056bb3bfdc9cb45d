"""uv as the resolver: `uv pip compile` for one target Python and platform."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w
from packaging.utils import canonicalize_name
from uv import find_uv_bin

from envbuilder.errors import InputError, NetworkError
from envbuilder.pip_settings import network_environment
from envbuilder.process import run
from envbuilder.requirements import required_name
from envbuilder.resolve.pinned import read_pins, write_pins
from envbuilder.resolve.protocol import NoSolution, Request, Versions
from envbuilder.stubs import write_stubs

# The glibc versions that uv knows as --python-platform.
_GLIBC_MINORS = (17, 28, *range(31, 41))
_UNREACHABLE = re.compile(r"Failed to fetch|error sending request|Request failed|HTTP status", re.IGNORECASE)

# uv's names may carry a marker in braces, which says nothing to a reader.
_MARKER = re.compile(r"\{[^{}]*\}")
_WHEELLESS = re.compile(
    r"(?:Wheels are required for|Wheels are available for|we only found wheels for) `([\w.-]+)"
)
_NO_EXTRA = re.compile(r"The package `([\w.-]+)==(\S+)` does not have an extra named `([\w.-]+)`")


class UvResolver:
    """The default resolver."""

    name = "uv"

    def resolve(self, request: Request) -> Versions:
        with tempfile.TemporaryDirectory(prefix="envbuilder-uv-") as temporary:
            folder = Path(temporary)
            write_stubs(folder / "stubs", request.known, request.target)
            (folder / "requirements.in").write_text("\n".join(request.requirements) + "\n", encoding="utf-8")
            (folder / "uv.toml").write_text(tomli_w.dumps(_settings(request)), encoding="utf-8")
            (folder / "constraints.txt").write_text("\n".join(request.constraints) + "\n", encoding="utf-8")
            pins = folder / "pins.txt"
            write_pins(pins, request.preferences)
            completed = run(
                [
                    *(find_uv_bin(), "pip", "compile"),
                    # This file alone: none of the user's or of the machine's.
                    *("--config-file", folder / "uv.toml"),
                    *("--find-links", folder / "stubs"),
                    # Only wheels, stubs among them: so nothing is ever built to learn its metadata.
                    *("--only-binary", ":all:"),
                    *("--python", sys.executable),
                    *("--python-version", request.target.python),
                    *("--python-platform", _platform(request)),
                    *("--constraints", folder / "constraints.txt"),
                    *("--cache-dir", request.cache / "uv"),
                    *("--no-header", "--no-annotate", "--no-progress", "--color", "never"),
                    *("--output-file", pins),
                    folder / "requirements.in",
                ],
                # In the environment, where other users of the machine don't see its credentials.
                env=network_environment() | {"UV_DEFAULT_INDEX": request.index_url},
                cwd=folder,
            )
            if completed.returncode != 0:
                raise _failure(request, completed.output)
            _check_extras(request, completed.output)
            return read_pins(pins)


def _check_extras(request: Request, output: str) -> None:
    """InputError for an extra that a requirement asks for and the chosen version lacks: uv only warns."""
    direct = {required_name(text) for text in request.requirements}
    direct -= {package.name for package in request.known}
    for name, version, extra in _NO_EXTRA.findall(output):
        if canonicalize_name(name) in direct:
            raise InputError(
                f"{name} {version}, the newest that fits {request.what}, has no extra {extra}.",
                remedy=f"Ask for a newer version, to learn what hinders it: {name}[{extra}]>{version}. "
                "Or leave the extra out.",
                context={"package": f"{name} {version}", "extra": extra},
            )


def _settings(request: Request) -> Mapping[str, Any]:
    return {
        "exclude-dependencies": sorted(request.excluded),
        # Said again beside the stubs: where an index has the same version, uv may look at that wheel instead.
        "dependency-metadata": [
            {
                "name": package.name,
                "version": version,
                "requires-dist": list(package.requires),
                "provides-extra": list(package.extras),
            }
            for package in request.known
            for version in package.versions
        ],
    }


def _platform(request: Request) -> str:
    machine = request.target.environment["platform_machine"]
    own = int(request.glibc.split(".")[1])
    minor = max((known for known in _GLIBC_MINORS if known <= own), default=_GLIBC_MINORS[0])
    return f"{machine}-manylinux_2_{minor}"


def _failure(request: Request, output: str) -> NoSolution | NetworkError:
    said = output[output.find("error:") :].removeprefix("error:") if "error:" in output else output
    explanation = " ".join(_MARKER.sub("", said.replace("cause:", "")).split())
    if "No solution found" not in output and _UNREACHABLE.search(output):
        return NetworkError(
            f"An index failed while uv was resolving {request.what}.",
            remedy="Check that the index is reachable, then run the same command again.",
            context={"python": request.target.python, "uv": explanation},
        )
    wheelless = tuple(
        f"{name}{versions}"
        for name in dict.fromkeys(_WHEELLESS.findall(said))
        for versions in _wheelless_versions(name, explanation) or [""]
    )
    return NoSolution(request, resolver="uv", said=explanation, wheelless=wheelless)


def _wheelless_versions(name: str, explanation: str) -> list[str]:
    """The versions of `name` that uv says have no wheels, e.g. [">=1.0,<2.0"]."""
    return re.findall(
        rf"(?<![\w.-]){re.escape(name)}(?:\[[^]]*\])?([<>=!~]\S*) (?:has|have) no (?:usable )?wheels",
        explanation,
    )

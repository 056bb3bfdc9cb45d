"""pip-tools as the resolver: `pip-compile`, which takes minutes where uv takes seconds."""

from __future__ import annotations

import json
import re
import sys
import tempfile
from pathlib import Path

from envbuilder.errors import InputError, NetworkError
from envbuilder.own_program import HOME
from envbuilder.pip_settings import network_environment
from envbuilder.process import run
from envbuilder.requirements import required_name
from envbuilder.resolve import pip_compile_for_target
from envbuilder.resolve.pinned import read_pins, write_pins
from envbuilder.resolve.protocol import NoSolution, Request, Versions
from envbuilder.stubs import write_stubs

# pip takes an index that it gave up on for one that has nothing, but warns before.
_UNREACHABLE = re.compile(r"Retry\(total=0|Max retries exceeded|HTTPError")
_WHEELLESS = re.compile(r"satisfies the requirement ([\w.-]+)(?:\[[^]]*\])?([<>=!~][^\s;(]*)?")


class PipToolsResolver:
    """The second resolver: pip's own answer."""

    name = "pip-tools"

    def resolve(self, request: Request) -> Versions:
        _refuse_what_pip_cannot(request)
        with tempfile.TemporaryDirectory(prefix="envbuilder-pip-") as temporary:
            folder = Path(temporary)
            write_stubs(folder / "stubs", request.known, request.target)
            (folder / "requirements.in").write_text("\n".join(request.requirements) + "\n", encoding="utf-8")
            (folder / "constraints.txt").write_text("\n".join(request.constraints) + "\n", encoding="utf-8")
            (folder / "markers.json").write_text(json.dumps(request.target.environment), encoding="utf-8")
            pins = folder / "pins.txt"
            write_pins(pins, request.preferences)
            completed = run(
                [
                    *(sys.executable, pip_compile_for_target.__file__, folder / "markers.json"),
                    *("--no-config", "--quiet", "--no-header", "--no-annotate", "--no-emit-options"),
                    *("--strip-extras", "--allow-unsafe", "--no-build-isolation"),
                    *("--find-links", folder / "stubs"),
                    *("--constraint", folder / "constraints.txt"),
                    *("--cache-dir", request.cache / "pip-tools"),
                    *("--pip-args", " ".join(_pip_arguments(request))),
                    *("--output-file", pins),
                    folder / "requirements.in",
                ],
                env=network_environment() | {"PIP_INDEX_URL": request.index_url, "PYTHONPATH": str(HOME)},
                cwd=folder,
            )
            if completed.returncode != 0:
                raise _failure(request, completed.output)
            versions = read_pins(pins)
        if kept := sorted(request.excluded & set(versions)):
            raise InputError(
                f"pip-tools can't leave {', '.join(kept)} out of {request.what}: a wheel requires it.",
                remedy="Run the command with --resolver uv.",
                context={"python": request.target.python},
            )
        return versions


def _refuse_what_pip_cannot(request: Request) -> None:
    for text in request.requirements:
        if required_name(text) in request.excluded:
            raise InputError(
                f"pip-tools can't leave {text} out of {request.what}.",
                remedy="Run the command with --resolver uv.",
                context={"requirement": text},
            )


def _pip_arguments(request: Request) -> list[str]:
    # In the order of the target's own tags, so that pip prefers the same wheels.
    platforms = dict.fromkeys(tag.platform for tag in request.target.tags if tag.platform != "any")
    return [
        # Only wheels, stubs among them: so nothing is ever built to learn its metadata.
        "--only-binary=:all:",
        "--implementation=cp",
        f"--python-version={request.target.python}",
        *(f"--platform={platform}" for platform in platforms),
        f"--cache-dir={request.cache / 'pip'}",
    ]


def _failure(request: Request, output: str) -> NoSolution | NetworkError:
    explanation = " ".join(output.partition("Traceback (most recent call last)")[0].split())[:2000]
    if _UNREACHABLE.search(output):
        return NetworkError(
            f"An index failed while pip-compile was resolving {request.what}.",
            remedy="Check that the index is reachable, then run the same command again.",
            context={"python": request.target.python, "pip-compile": explanation},
        )
    wheelless = tuple(dict.fromkeys("".join(found) for found in _WHEELLESS.findall(explanation)))
    return NoSolution(request, resolver="pip-compile", said=explanation, wheelless=wheelless)

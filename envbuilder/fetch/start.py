"""Sets up envbuilder from the bundle that this file lies in, on a machine without internet.

    python3 start.py [DIR]

DIR is where the tool's environment goes, by default `tool` beside the `bundles` folder. Needs nothing but
Python's standard library: no pip, no ensurepip, no network. Every byte used is checked against the lock.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shlex
import subprocess
import sys
import tempfile
import tomllib
import zipfile
from pathlib import Path
from typing import Any, NoReturn

BUNDLE = Path(__file__).resolve().parent


def main(arguments: list[str]) -> None:
    if len(arguments) > 1 or any(argument.startswith("-") for argument in arguments):
        fail(2, "start.py takes one folder at most.", "python3 start.py [DIR]")
    root = BUNDLE.parent.parent
    destination = Path(arguments[0] if arguments else root / "tool").absolute()
    record = read_record()
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    if running != record["python"]:
        fail(
            7,
            f"This bundle is for Python {record['python']}, and this is Python {running}.",
            f"python{record['python']} {shlex.quote(__file__)}",
        )
    if destination.exists() and any(destination.iterdir()) and not (destination / "pyvenv.cfg").exists():
        fail(7, f"{destination} holds something else than an environment.", "Give another folder.")
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Beside the destination: programs can be run there, which on /tmp is not so everywhere.
    with tempfile.TemporaryDirectory(prefix=".start-", dir=destination.parent) as folder:
        wheels = copy_wheels(record, Path(folder))
        install(wheels, Path(folder), destination)
    command = [destination / "bin/envbuilder", "--root", root, "compile", BUNDLE / "recipe.toml", "--local"]
    print(f"envbuilder {record['tool_version']} is in {destination}. Next:")
    print(f"  {shlex.join(map(str, command))}")


def read_record() -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads((BUNDLE / "bundle.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(7, f"The bundle {BUNDLE} is incomplete: {error}.", fetch())
    return record


def copy_wheels(record: dict[str, Any], folder: Path) -> dict[Path, str]:
    """Copies the tool's wheels into `folder` and returns them with their sha256: what is installed are these
    copies, so nobody can change them after the check."""
    lock = (BUNDLE / f"pylock.{record['recipe']}.toml").read_bytes()
    check(BUNDLE / f"pylock.{record['recipe']}.toml", lock, record["lock_sha256"])
    locked = {
        Path(wheel["path"]).name: wheel["hashes"]["sha256"]
        for package in tomllib.loads(lock.decode())["packages"]
        for wheel in package.get("wheels", ())
    }
    wanted = {BUNDLE / "files" / name: locked[name] for name in record["tool_files"]}
    wanted[BUNDLE / "tool" / record["tool_wheel"]] = record["tool_sha256"]
    copies = {}
    for path, sha256 in wanted.items():
        content = path.read_bytes() if path.exists() else b""
        check(path, content, sha256)
        copies[folder / path.name] = sha256
        (folder / path.name).write_bytes(content)
    return copies


def install(wheels: dict[Path, str], folder: Path, destination: Path) -> None:
    """Makes the environment with the uv that is in uv's own wheel."""
    uv = folder / "uv"
    wheel = next(path for path in wheels if path.name.startswith("uv-"))
    with zipfile.ZipFile(io.BytesIO(wheel.read_bytes())) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".data/scripts/uv"))
        uv.write_bytes(archive.read(member))
    uv.chmod(0o700)
    requirements = folder / "requirements.txt"
    lines = [
        f"{path.name.split('-')[0]} @ {path.as_uri()} --hash=sha256:{sha256}\n"
        for path, sha256 in wheels.items()
    ]
    requirements.write_text("".join(lines), encoding="utf-8")
    # None of the user's settings: this installation has one source.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("UV_")}
    environment |= {"UV_NO_CONFIG": "1", "UV_OFFLINE": "1", "UV_CACHE_DIR": str(folder / "cache")}
    environment |= {"UV_PYTHON_DOWNLOADS": "never", "UV_LINK_MODE": "copy"}
    python = destination / "bin" / "python"
    options = ["--no-index", "--no-deps", "--require-hashes", "--compile-bytecode"]
    for command in (
        [uv, "venv", "--quiet", "--clear", "--python", sys.executable, destination],
        [uv, "pip", "install", "--quiet", "--python", python, *options, "-r", requirements],
    ):
        done = subprocess.run([str(word) for word in command], env=environment, check=False)
        if done.returncode:
            fail(1, f"This command failed: {shlex.join(map(str, command))}", "See uv's message above.")


def check(path: Path, content: bytes, sha256: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        fail(5, f"{path} is not what the lock names: expected sha256 {sha256}, got {found}.", fetch())


def fetch() -> str:
    return f"On a machine with internet: envbuilder fetch recipes/{BUNDLE.name}.toml --verify"


def fail(exit_code: int, message: str, remedy: str) -> NoReturn:
    print(f"{message}\n  {remedy}", file=sys.stderr)
    raise SystemExit(exit_code)


if __name__ == "__main__":
    main(sys.argv[1:])

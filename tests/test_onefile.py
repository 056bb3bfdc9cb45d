"""The one file that `make dist` makes: it runs where there is nothing but Python."""

from __future__ import annotations

import ast
import os
import platform
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from envbuilder import __version__
from envbuilder.paths import Root
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel
from tests.promises.conftest import MINOR, SOURCE, publish_plain, publish_tools

REPOSITORY = Path(__file__).parent.parent
BOOTSTRAP = REPOSITORY / "onefile" / "bootstrap"


def test_the_tool_uses_nothing_that_is_newer_than_python_3_9() -> None:
    """Syntax is ruff's to check; this is what the standard library had not yet."""
    settings = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))
    newer = settings["tool"]["ruff"]["per-file-target-version"]
    outside = {path for pattern in newer if "{" not in pattern for path in REPOSITORY.glob(pattern)}
    own = [*(REPOSITORY / "envbuilder").rglob("*.py"), *BOOTSTRAP.glob("*.py")]
    files = sorted(map(str, {*own} - outside))
    vermin = [
        Path(sysconfig.get_path("scripts"), "vermin"),
        "--no-config-file",
        "--violations",
        "--target=3.9-",
    ]
    checked = subprocess.run([*vermin, *files], capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout
    assert len(files) > 200


def test_any_python_3_reads_what_it_is_told_first() -> None:
    source = (BOOTSTRAP / "__main__.py").read_text(encoding="utf-8")
    ast.parse(source, feature_version=(3, 4))
    for newer in ("annotations", 'f"'):
        assert newer not in source


@dataclass(frozen=True)
class OneFile:
    """The one file, a user's folders, and nothing of the environment that the suite runs in."""

    path: Path
    home: Path
    variables: dict[str, str]

    @property
    def environment(self) -> dict[str, str]:
        return {"PATH": os.defpath, "HOME": str(self.home), "LANG": "C.UTF-8", **self.variables}

    @property
    def cache(self) -> Path:
        return self.home / ".cache" / "envbuilder"

    def run(
        self, *words: str | Path, options: tuple[str, ...] = (), cwd: Path | None = None
    ) -> subprocess.CompletedProcess[str]:
        # -S: no site-packages, as in a Python that has nothing of its own.
        command = [sys.executable, "-S", *options, self.path, *words]
        return subprocess.run(
            command, env=self.environment, cwd=cwd or self.home, capture_output=True, text=True, check=False
        )

    def succeed(self, *words: str | Path) -> str:
        """What it prints, if it ends well."""
        done = self.run(*words)
        assert done.returncode == 0, done
        return done.stdout


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist") / "envbuilder.pyz"
    make = [sys.executable, REPOSITORY / "onefile" / "make.py", out]
    subprocess.run([*make, "--python", MINOR, "--machine", platform.machine()], check=True)
    return out


@pytest.fixture(scope="module")
def warm(made: Path, tmp_path_factory: pytest.TempPathFactory) -> OneFile:
    """It has been run once."""
    one = OneFile(made, tmp_path_factory.mktemp("home"), {})
    first = one.run("--version")
    assert first.stdout == f"envbuilder {__version__}\n", first
    assert str(one.cache) in first.stderr
    assert "export ENVBUILDER_CACHE=FOLDER" in first.stderr
    return one


@pytest.fixture
def cold(made: Path, tmp_path: Path) -> OneFile:
    return OneFile(made, tmp_path, {})


def unpacked(one: OneFile) -> Path:
    (folder,) = one.cache.iterdir()
    return folder


def test_it_unpacks_once(warm: OneFile) -> None:
    again = warm.run("--version")
    assert (again.stdout, again.stderr) == (f"envbuilder {__version__}\n", "")
    assert unpacked(warm).name.startswith(f"onefile-{MINOR}-{platform.machine()}-")


def test_it_is_a_program(warm: OneFile) -> None:
    assert os.access(warm.path, os.X_OK)
    assert warm.path.read_bytes().startswith(b"#!/usr/bin/env python3\n")
    assert "Usage: envbuilder [OPTIONS]" in warm.succeed("--help")


def test_starts_at_one_time_share_one_folder_where_they_are_told_to(cold: OneFile, tmp_path: Path) -> None:
    cache = tmp_path / "elsewhere"
    environment = cold.environment | {"ENVBUILDER_CACHE": str(cache)}
    command = [sys.executable, "-S", cold.path, "--version"]
    starts = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    told = [(start.communicate()[0], start.returncode) for start in starts]
    assert told == [(f"envbuilder {__version__}\n", 0)] * 2
    (folder,) = cache.iterdir()
    assert folder.stat().st_mode & 0o777 == 0o755
    assert not cold.cache.exists()


def test_a_folder_that_has_no_room_is_named_with_the_way_out(cold: OneFile, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = replace(cold, variables={"ENVBUILDER_CACHE": str(tmp_path / "file")}).run("--version")
    assert done.returncode == 7
    assert "can't be unpacked" in done.stderr
    assert "export ENVBUILDER_CACHE=FOLDER" in done.stderr


def test_what_others_may_change_is_not_run(warm: OneFile) -> None:
    folder = unpacked(warm)
    folder.chmod(0o775)
    try:
        done = warm.run("--version")
    finally:
        folder.chmod(0o755)
    assert (done.returncode, done.stdout) == (7, "")
    assert "is not run" in done.stderr


def test_a_folder_with_a_part_gone_says_how_to_mend_it(warm: OneFile) -> None:
    part = unpacked(warm) / "envbuilder" / "errors.py"
    away = part.rename(part.with_suffix(".away"))
    try:
        done = warm.run("--version")
    finally:
        away.rename(part)
    assert done.returncode == 7
    assert f"rm -rf {unpacked(warm)}" in done.stderr


def test_a_python_with_a_part_gone_is_not_taken_for_a_folder_with_one(warm: OneFile) -> None:
    program = f"import runpy, sys; sys.modules['shlex'] = None; runpy.run_path({str(warm.path)!r})"
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=warm.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert f"{sys.executable} lacks a part of Python's standard library: import of shlex" in done.stderr
    assert "module avail python" in done.stderr
    assert "rm -rf" not in done.stderr


@pytest.mark.parametrize("version", [(3, 6, 8), (3, 8, 19)])
def test_an_older_python_is_told_which_one_is_needed(made: Path, version: tuple[int, ...]) -> None:
    program = f"import runpy, sys; sys.version_info = {version}; runpy.run_path({str(made)!r})"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert "needs Python 3.9 or newer" in done.stderr
    assert "module avail python" in done.stderr


def test_a_python_that_it_holds_nothing_for_is_told_which_it_does(cold: OneFile) -> None:
    program = (
        f"import platform, runpy; platform.machine = lambda: 'riscv64'; runpy.run_path({str(cold.path)!r})"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=cold.environment, capture_output=True, text=True, check=False)
    assert done.returncode == 7
    assert f"has nothing for cpython {MINOR}-riscv64, but for: cpython {MINOR}-" in done.stderr


def words_of_a_job(one: OneFile, root: Root, recipe: Path) -> list[str]:
    """What a job that is submitted for `recipe` starts envbuilder with."""
    site = REPOSITORY / "recipes" / "sites" / "generic.toml"
    submit = ("compile", recipe, "--sbatch", "--print-script", "--site", site)
    script = one.succeed("--root", root.path, *submit)
    (line,) = [line for line in script.splitlines() if line.endswith(" --local")]
    return line[line.index(sys.executable) :].partition(" --root ")[0].split()


def test_a_pipeline_from_lock_to_doctor(warm: OneFile, tmp_path: Path) -> None:
    """With nothing but the interpreter that it is run with, which also is the one to build for."""
    served, recipe = tmp_path / "served", tmp_path / "recipes" / "source.toml"
    served.mkdir()
    recipe.parent.mkdir()
    publish_tools(served)
    make_wheel(served, "one", "1.0")
    publish_plain(served)
    recipe.write_text(SOURCE, encoding="utf-8")
    root = Root(tmp_path / "root")
    with IndexServer(served) as server:
        settings = {"PIP_INDEX_URL": server.url, "PIP_CONFIG_FILE": os.devnull, "NO_PROXY": "*"}
        one = replace(warm, variables=settings)
        one.succeed("--root", root.path, "lock", recipe)
        one.succeed("--root", root.path, "lock", "--check", recipe)
        one.succeed("--root", root.path, "fetch", recipe)
    (wheel,) = (root.bundle("source") / "tool").glob("envbuilder-*.whl")
    with zipfile.ZipFile(wheel) as packed:
        carried = {name: packed.read(name) for name in packed.namelist() if not name.endswith("/RECORD")}
    assert "Requires-Dist: pydantic" in carried[f"envbuilder-{__version__}.dist-info/METADATA"].decode()
    assert all((unpacked(one) / name).read_bytes() == content for name, content in carried.items())
    one.succeed("--root", root.path, "compile", recipe)
    one.succeed("--root", root.path, "install", recipe)
    assert words_of_a_job(one, root, recipe) == [sys.executable, str(unpacked(one))]
    shown = [root.env("source") / "bin" / "python", "-c", "import one, plain; print(plain.__name__)"]
    assert subprocess.run(shown, capture_output=True, text=True, check=False).stdout == "plain\n"
    assert " ok, " in one.succeed("--root", root.path, "doctor", recipe).splitlines()[-1]

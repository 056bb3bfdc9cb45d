"""Environment modules of a real Lmod, in jobs of a real Slurm: loaded, recorded, and there again later."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.lab.index_server import IndexServer
from tests.lab.packages import make_sdist
from tests.lab.slurm import SlurmLab, missing_programs

pytestmark = pytest.mark.lab

REPOSITORY = Path(__file__).parent.parent.parent
LMOD = Path("/usr/share/lmod/lmod/init/bash")

# Modulefiles by path below the tree; HERE is the tree. "gnu" opens the folder in which "greeting" lies.
COMPILER = """
family("compiler")
prepend_path("PATH", "HERE/VERSION/bin")
setenv("CC", "HERE/VERSION/bin/labcc")
setenv("GNU_LICENCE", "secret")
prepend_path("MODULEPATH", "HERE/gnu-VERSION")
"""
MODULES = {
    # As the modules that centres load for everybody: an unload without --force leaves it.
    "core/everybody/1.lua": 'add_property("lmod", "sticky")\nprepend_path("PATH", "HERE/everybody/bin")\n',
    "core/gnu/12.2.lua": COMPILER.replace("VERSION", "12.2"),
    "core/gnu/13.1.lua": COMPILER.replace("VERSION", "13.1"),
    "core/words/2.lua": 'prepend_path("LD_LIBRARY_PATH", "HERE/words")\n'
    'execute{cmd="echo farewell; echo farewell >&2", modeA={"unload"}}\n',
    "gnu-12.2/greeting/1.0.lua": 'depends_on("words")\nconflict("greeting")\n'
    'for _, name in ipairs{"LD_LIBRARY_PATH", "LIBRARY_PATH", "CPATH"} do\n'
    '    prepend_path(name, "HERE/greeting")\nend\n'
    'setenv("UCX_TLS", "self")\nLmodMessage("greeting is loaded")\n',
}
FOLDERS = ("everybody/bin", "12.2/bin", "13.1/bin", "greeting", "words")

PYPROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
# Compiles the extension with the compiler of the module, against the library of the other one.
BACKEND = """
import base64, hashlib, os, pathlib, subprocess, sysconfig, zipfile
def get_requires_for_build_wheel(settings=None):
    return []
def build_wheel(folder, settings=None, metadata=None):
    include = sysconfig.get_paths()["include"]
    options = ["-shared", "-fPIC", f"-I{include}", "ext.c", "-o", "ext.so", "-lgreeting"]
    subprocess.run([os.environ["CC"], *options], check=True)
    members = {
        "ext.so": pathlib.Path("ext.so").read_bytes(),
        "trainer/__init__.py": b"",
        "trainer/__main__.py": pathlib.Path("run.py").read_bytes(),
        "hello-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\\nName: hello\\nVersion: 1.0\\n",
        "hello-1.0.dist-info/WHEEL": b"Wheel-Version: 1.0\\nRoot-Is-Purelib: false\\nTag: py3-none-any\\n",
    }
    record = ""
    for name, data in members.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record += f"{name},sha256={digest},{len(data)}\\n"
    members["hello-1.0.dist-info/RECORD"] = (record + "hello-1.0.dist-info/RECORD,,\\n").encode()
    with zipfile.ZipFile(os.path.join(folder, "hello-1.0-py3-none-any.whl"), "w") as wheel:
        for name, data in members.items():
            wheel.writestr(name, data)
    return "hello-1.0-py3-none-any.whl"
"""
EXTENSION = """
#include <Python.h>
#include <greeting.h>
static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "ext", NULL, -1, NULL};
PyMODINIT_FUNC PyInit_ext(void) {
    PyObject *made = PyModule_Create(&module);
    PyModule_AddIntConstant(made, "GREETING", greeting());
    return made;
}
"""
# In the trainer's place: what it finds, and an end that is told as the trainer tells it.
RUN = """
import json, os, pathlib, sys
import ext
run = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
(run / "found.json").write_text(json.dumps({"greeting": ext.GREETING, "variables": dict(os.environ)}))
measured = ("first_loss", "last_loss", "tokens_per_second", "first_step_seconds", "peak_memory_bytes")
outcome = {"status": "finished", "exit_code": 0, "error": None, "steps": 1, "adapter": "none"}
outcome |= dict.fromkeys(measured)
(run / "outcome.json").write_text(json.dumps(outcome))
"""
RECIPE = """
name = "hello"
requirements = ["hello==1.0"]
trainer = false
[build.hello]
modules = ["ext"]
gpu = false
[index]
hello = "lab"
"""
RECORD = """
import json, os
from envbuilder.modules import loaded_modules
print(json.dumps([module.model_dump(mode="json") for module in loaded_modules(os.environ)]))
"""


@dataclass(frozen=True)
class ModuleLab:
    """The cluster, a tree of modules, and an envbuilder that its user and its nodes can read."""

    lab: SlurmLab
    python: Path
    tree: Path

    @property
    def setup(self) -> str:
        """What a shell needs for `module` to know the tree."""
        return f"export MODULEPATH={self.tree}/core"

    def site(self, *modules: str, setup: Sequence[str] = ()) -> Path:
        """A site whose jobs load these; unless `setup` does so, the job's script makes `module`."""
        text = (REPOSITORY / "recipes/sites/lab.toml").read_text()
        keys = f"setup = {json.dumps(setup or [self.setup])}\nmodules = {json.dumps(modules)}\n"
        path = self.lab.home / f"{'-'.join(modules).replace('/', '') or 'none'}.toml"
        path.write_text(text.replace("\n[build]", f"\n{keys}[build]", 1).replace("gpus = 2", "gpus = 1"))
        return path

    def envbuilder(
        self, *words: str | Path, env: Mapping[str, str] | None = None, exit_code: int = 0
    ) -> dict[str, Any]:
        """Runs `envbuilder --json …` as the user; what it prints."""
        completed = self.lab.as_user(self._command(words), env=dict(env or {}))
        assert completed.returncode == exit_code, completed.stdout + completed.stderr
        answer: dict[str, Any] = json.loads(completed.stdout)
        return answer

    def shell(self, *lines: str) -> subprocess.CompletedProcess[str]:
        """Runs lines in a shell of the user's that has `module`."""
        return self.lab.as_user(["bash", "-c", "\n".join((f". {LMOD}", self.setup, *lines))])

    def with_modules(self, modules: Sequence[str], *words: str | Path) -> dict[str, Any]:
        """What `envbuilder --json …` prints in a shell of the user's that has loaded modules."""
        command = " ".join(map(str, self._command(words)))
        answer: dict[str, Any] = json.loads(self.shell(f"module load {' '.join(modules)}", command).stdout)
        return answer

    def _command(self, words: Sequence[str | Path]) -> list[str | Path]:
        return [self.python, "-m", "envbuilder", "--root", self.lab.home / "root", "--json", *words]


@pytest.fixture(scope="module")
def tree() -> Iterator[Path]:
    """Modules and what they lead to: outside of /tmp, which a sealed build finds empty."""
    with tempfile.TemporaryDirectory(prefix="lab-modules-", dir="/opt") as name:
        tree = Path(name)
        tree.chmod(0o755)
        for folder in FOLDERS:
            (tree / folder).mkdir(parents=True)
        for path, text in MODULES.items():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            (tree / path).write_text(text.replace("HERE", str(tree)))
        for version in ("12.2", "13.1"):
            compiler = tree / version / "bin" / "labcc"
            compiler.write_text('#!/bin/sh\nexec /usr/bin/cc "$@"\n')
            compiler.chmod(0o755)
        (tree / "greeting/greeting.h").write_text("int greeting(void);\n")
        cc = ["cc", "-shared", "-fPIC", "-x", "c", "-"]
        words, greeting = tree / "words/libwords.so", tree / "greeting/libgreeting.so"
        subprocess.run([*cc, "-o", words], input="int word(void) { return 42; }", text=True, check=True)
        subprocess.run(
            [*cc, "-o", greeting, "-x", "none", words],
            input="int word(void); int greeting(void) { return word(); }",
            text=True,
            check=True,
        )
        yield tree


@pytest.fixture(scope="module")
def cluster(tree: Path) -> Iterator[ModuleLab]:
    assert not missing_programs(), f"make test-lab needs: {', '.join(missing_programs())}"
    assert LMOD.exists(), "make test-lab needs: lmod"
    with SlurmLab() as lab:
        python = lab.folder / "tool" / "bin" / "python"
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
        # The suite's own interpreter may lie in a home folder that no other user can read.
        subprocess.run([*uv, "venv", "--python", "/usr/bin/python3", lab.folder / "tool"], check=True)
        subprocess.run([*uv, "pip", "install", "--python", python, REPOSITORY], check=True)
        yield ModuleLab(lab, python, tree)


@pytest.fixture(scope="module")
def fetched(cluster: ModuleLab) -> Path:
    """A recipe of one sdist that needs the modules, with its bundle."""
    home = cluster.lab.home
    for folder in ("files", "recipes"):
        (home / folder).mkdir()
    files = {"pyproject.toml": PYPROJECT, "backend.py": BACKEND, "ext.c": EXTENSION, "run.py": RUN}
    make_sdist(home / "files", "hello", "1.0", files=files)
    recipe = home / "recipes" / "hello.toml"
    recipe.write_text(RECIPE)
    shutil.chown(home / "recipes", "nobody")
    with IndexServer(home / "files") as index:
        variables = {"ENVBUILDER_INDEX_LAB_URL": index.url}
        cluster.envbuilder("lock", recipe, env=variables)
        cluster.envbuilder("fetch", recipe, env=variables)
    return recipe


@pytest.fixture(scope="module")
def recipe(cluster: ModuleLab, fetched: Path) -> Path:
    """The same, compiled in a job that had the modules."""
    site = cluster.site("everybody", "gnu/12.2", "greeting")
    cluster.envbuilder("compile", fetched, "--sbatch", "--site", site)
    return fetched


def recorded(tree: Path) -> list[dict[str, Any]]:
    """The modules that the job had, as a receipt has them."""
    greeting = str(tree / "greeting")
    return [
        {"name": "everybody/1", "folders": {"PATH": [str(tree / "everybody/bin")]}, "variables": {}},
        {
            "name": "gnu/12.2",
            "folders": {"PATH": [str(tree / "12.2/bin")]},
            "variables": {"CC": str(tree / "12.2/bin/labcc")},
        },
        # The one that it depends on goes when it goes.
        {"name": "words/2", "folders": {}, "variables": {}},
        {
            "name": "greeting/1.0",
            "folders": {
                "LD_LIBRARY_PATH": [greeting, str(tree / "words")],
                "LIBRARY_PATH": [greeting],
                "CPATH": [greeting],
            },
            "variables": {"UCX_TLS": "self"},
        },
    ]


def test_a_job_s_modules_are_recorded_with_what_each_added(cluster: ModuleLab, recipe: Path) -> None:
    root = cluster.lab.home / "root"
    for receipt in (*(root / "wheelhouse").glob("hello-*/receipt.json"), root / "envs/hello/envbuilder.json"):
        assert json.loads(receipt.read_text())["modules"] == recorded(cluster.tree)
        assert "secret" not in receipt.read_text()


def test_a_shell_that_has_them_tells_the_same_whatever_is_printed_while_they_go(cluster: ModuleLab) -> None:
    told = cluster.shell("module load everybody gnu/12.2 greeting", f"{cluster.python} -c '{RECORD}'")
    assert json.loads(told.stdout) == recorded(cluster.tree)
    # Where a centre has Lmod's messages on stdout.
    told = cluster.shell(
        "export LMOD_REDIRECT=yes",
        "module load everybody gnu/12.2 greeting",
        f"{cluster.python} -c '{RECORD}'",
    )
    assert json.loads(told.stdout.splitlines()[-1]) == recorded(cluster.tree)


def test_training_has_them_in_a_job_that_loads_none(cluster: ModuleLab, recipe: Path) -> None:
    config = cluster.lab.home / "hello.yaml"
    config.write_text("")
    words = ("train", config, "--recipe", "hello", "--processes", "1")
    cluster.envbuilder(*words, "--sbatch", "--site", cluster.site())
    found = json.loads((cluster.lab.home / "root/runs/hello/found.json").read_text())
    assert found["greeting"] == 42
    assert "LOADEDMODULES" not in found["variables"]
    assert found["variables"]["UCX_TLS"] == "self"
    assert found["variables"]["PATH"].startswith(f"{cluster.tree}/12.2/bin:{cluster.tree}/everybody/bin:")
    assert "GNU_LICENCE" not in found["variables"]


def test_doctor_has_them_too_and_tells_of_another_version(cluster: ModuleLab, recipe: Path) -> None:
    words = ("doctor", recipe, "--only", "env.modules")

    def finding(answer: dict[str, Any]) -> dict[str, Any]:
        (found,) = answer["findings"]
        return dict(found)

    other = finding(cluster.with_modules(["gnu/13.1"], *words))
    assert other["verdict"] == "warning"
    assert other["summary"].startswith("gnu/13.1 is loaded here, and the env was compiled with gnu/12.2")
    swap = other["remedy"].partition(";")[0]
    assert swap == "module swap gnu/13.1 gnu/12.2"
    assert finding(cluster.with_modules(["gnu/13.1", f"&& {swap}"], *words))["verdict"] == "ok"


def test_a_module_that_needs_another_one_first_ends_the_job_with_how_to_see_that(
    cluster: ModuleLab, fetched: Path
) -> None:
    site = cluster.site("greeting", setup=[". /etc/profile", f"module use {cluster.tree}/core"])
    error = cluster.envbuilder("compile", fetched, "--sbatch", "--site", site, exit_code=7)
    assert error["message"] == "The module greeting does not load."
    assert error["remedy"].endswith("module spider greeting")
    # What Lmod says of it stands in the log, and is known to doctor.
    log = Path(error["context"]["log"])
    assert 'exist but cannot be loaded as requested: "greeting"' in " ".join(log.read_text().split())
    (explained,) = cluster.envbuilder("doctor", "--log", log, exit_code=8)["findings"]
    assert explained["check"] == "log.module-unknown"


def test_a_run_is_refused_where_a_module_s_folder_is_gone(cluster: ModuleLab, recipe: Path) -> None:
    config = cluster.lab.home / "hello.yaml"
    config.write_text("")
    folder = cluster.tree / "words"
    moved = folder.rename(cluster.tree / "moved")
    try:
        error = cluster.envbuilder("train", config, "--recipe", "hello", "--processes", "1", exit_code=7)
    finally:
        moved.rename(folder)
    assert error["message"].startswith("The env was compiled with the module greeting/1.0, whose folder")
    assert "module spider greeting" in error["remedy"]

"""Builds in a shell with environment modules: what is recorded, and which C++ library their results find."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from envbuilder.compile.pipeline import compile_recipe
from envbuilder.errors import BuildError
from envbuilder.install import install_env
from envbuilder.model import Bundle, LoadedModule
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from tests.compile.test_pipeline import PYTHON
from tests.doctor.fatbins import make_library
from tests.doctor.test_libraries_checks import make_libstdcxx
from tests.doctor.test_modules_checks import NEWER
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_sdist, make_wheel
from tests.test_modules import PROGRAM

RECIPE = Recipe.model_validate(
    {"name": "lab", "requirements": ["native"], "build": {"native": {"modules": ["ext"], "gpu": False}}}
)
# Puts the extension module that lies beside it into a wheel.
BACKEND = """
import base64, hashlib, pathlib, zipfile
def build_wheel(folder, config_settings=None, metadata_directory=None):
    info = "native-1.0.dist-info"
    files = {
        "ext.so": pathlib.Path("ext.so").read_bytes(),
        f"{info}/METADATA": b"Metadata-Version: 2.1\\nName: native\\nVersion: 1.0\\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\\nGenerator: x\\nRoot-Is-Purelib: false\\nTag: py3-none-any\\n",
    }
    def digest(content):
        return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
    record = "".join(f"{name},sha256={digest(data)},{len(data)}\\n" for name, data in files.items())
    files[f"{info}/RECORD"] = (record + f"{info}/RECORD,,\\n").encode()
    with zipfile.ZipFile(pathlib.Path(folder) / "native-1.0-py3-none-any.whl", "w") as wheel:
        for name, data in files.items():
            wheel.writestr(name, data)
    return "native-1.0-py3-none-any.whl"
"""
PROJECT = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    """A bundle with a package whose extension module needs the C++ library in tmp_path/gcc."""
    new = make_libstdcxx(tmp_path / "gcc", "3.4", "3.4.99")
    extension = make_library(tmp_path / "ext.so", NEWER, new, "-nostdlib")
    files: dict[str, str | bytes] = {"ext.so": extension.read_bytes(), "backend.py": BACKEND}
    (tmp_path / "made").mkdir()
    sdist = make_sdist(tmp_path / "made", "native", "1.0", files={**files, "pyproject.toml": PROJECT})
    helper = make_wheel(tmp_path / "made", "build-helper", "1.0")
    return make_bundle(
        Root(tmp_path / "root"), RECIPE, {sdist: ["runtime"], helper: ["build"]}, python=PYTHON
    )


def load_gcc(folder: Path, monkeypatch: pytest.MonkeyPatch) -> LoadedModule:
    """A shell that has loaded a module of the compiler whose libraries lie in `folder`/gcc."""
    program = folder / "modulecmd"
    program.write_text(PROGRAM)
    program.chmod(0o755)
    (folder / "gnu").mkdir()
    (folder / "gnu/99").write_text("LOADEDMODULES=; unset LD_LIBRARY_PATH;\n")
    monkeypatch.setenv("LOADEDMODULES", "gnu/99")
    monkeypatch.delenv("LMOD_CMD", raising=False)
    monkeypatch.setenv("MODULES_CMD", str(program))
    monkeypatch.setenv("LD_LIBRARY_PATH", str(folder / "gcc"))
    return LoadedModule(name="gnu/99", folders={"LD_LIBRARY_PATH": (str(folder / "gcc"),)})


def test_a_build_s_modules_are_in_its_receipt_and_in_the_env_s(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, python = Root(tmp_path / "root"), Path(sys.executable)
    module = load_gcc(tmp_path, monkeypatch)
    (built,) = compile_recipe(RECIPE, bundle, root=root, python=python, reporter=Quiet()).wheels
    assert built.receipt.modules == (module,)
    # As on another node, where nothing is loaded.
    for name in ("LOADEDMODULES", "MODULES_CMD", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name)
    receipt = install_env(RECIPE, bundle, root=root, python=python, reporter=Quiet()).receipt
    assert receipt.modules == (module,)


def test_a_cxx_library_that_no_module_brings_will_not_be_found_again(
    tmp_path: Path, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By hand, so that nothing says what to do in the next shell.
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "gcc"))
    monkeypatch.delenv("LOADEDMODULES", raising=False)
    with pytest.raises(BuildError, match="ext can't be loaded") as raised:
        compile_recipe(
            RECIPE, bundle, root=Root(tmp_path / "root"), python=Path(sys.executable), reporter=Quiet()
        )
    assert "needs GLIBCXX_3.4.99 of libstdc++.so.6" in str(raised.value.context["found"])

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from envbuilder.envlock import WheelFile
from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.interpreter import inspect_interpreter
from envbuilder.model import InstalledPackage, ProvidedPackages
from envbuilder.venv import PROVIDED_PTH, install_wheels, make_venv, venv_python
from tests.lab.packages import make_wheel

REMEDY = "envbuilder fetch recipes/lab.toml --verify"


def wheel_file(path: Path) -> WheelFile:
    name, version, *_ = path.name.split("-")
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    package = InstalledPackage(name=name, version=version, wheel=path.name, sha256=sha256, origin="bundle")
    return WheelFile(package, path, path.stat().st_size)


def new_venv(folder: Path, provided: ProvidedPackages | None = None) -> Path:
    make_venv(inspect_interpreter(Path(sys.executable)), folder, provided)
    return folder


def output(venv: Path, code: str) -> str:
    done = subprocess.run([venv_python(venv), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_wheels_are_installed_with_whole_metadata_and_nothing_else(tmp_path: Path) -> None:
    venv = new_venv(tmp_path / "venv")
    one = make_wheel(tmp_path, "one", "1.0", requires=["never-there"])
    two = make_wheel(tmp_path, "two", "2.0")
    install_wheels(venv, [wheel_file(one), wheel_file(two)], scratch=tmp_path / "scratch", remedy=REMEDY)
    listing = "import importlib.metadata as m; print(*sorted(d.name for d in m.distributions()))"
    assert output(venv, listing) == "one two"
    unlisted = (
        "import importlib.metadata as m, pathlib; d = m.distribution('one');"
        "print([f for f in d.files if not f.locate().exists()], d.read_text('INSTALLER').strip(),"
        " d.read_text('direct_url.json'))"
    )
    assert output(venv, unlisted) == "[] uv None"
    assert list((tmp_path / "scratch").iterdir()) == []


def test_no_wheels_at_all_is_an_empty_venv(tmp_path: Path) -> None:
    venv = new_venv(tmp_path / "venv")
    install_wheels(venv, [], scratch=tmp_path, remedy=REMEDY)
    assert output(venv, "print(1)") == "1"


def test_a_venv_still_works_where_it_was_moved(tmp_path: Path) -> None:
    venv = new_venv(tmp_path / "venv")
    files = {
        "tool.py": "def main(): print('moved')\n",
        "tool-1.0.dist-info/entry_points.txt": "[console_scripts]\ntool = tool:main\n",
    }
    install_wheels(
        venv, [wheel_file(make_wheel(tmp_path, "tool", "1.0", files=files))], scratch=tmp_path, remedy=REMEDY
    )
    moved = venv.rename(tmp_path / "elsewhere")
    done = subprocess.run([moved / "bin" / "tool"], capture_output=True, text=True, check=True)
    assert done.stdout == "moved\n"


def test_one_changed_byte_stops_the_installation_and_names_the_file(tmp_path: Path) -> None:
    venv = new_venv(tmp_path / "venv")
    good, bad = make_wheel(tmp_path, "good", "1.0"), make_wheel(tmp_path, "bad", "1.0")
    wheels = [wheel_file(good), wheel_file(bad)]
    data = bytearray(bad.read_bytes())
    data[data.index(b"PK\x01\x02") + 12] ^= 1  # a time stamp: the archive still reads well
    bad.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        install_wheels(venv, wheels, scratch=tmp_path / "scratch", remedy=REMEDY)
    assert caught.value.context["file"] == str(bad)
    assert caught.value.context["got"] == hashlib.sha256(data).hexdigest()
    assert caught.value.remedy == REMEDY
    assert not list(venv.rglob("good*"))
    assert list((tmp_path / "scratch").iterdir()) == []


def test_a_wheel_for_another_platform_is_a_mismatch(tmp_path: Path) -> None:
    venv = new_venv(tmp_path / "venv")
    wheel = make_wheel(tmp_path, "other", "1.0", tag="cp27-cp27m-win32")
    with pytest.raises(MismatchError, match="can't be installed"):
        install_wheels(venv, [wheel_file(wheel)], scratch=tmp_path, remedy=REMEDY)


def test_variables_of_the_user_for_uv_and_pip_are_not_heard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constraints = tmp_path / "constraints.txt"
    constraints.write_text("one==99\n", encoding="utf-8")
    monkeypatch.setenv("UV_CONSTRAINT", str(constraints))
    monkeypatch.setenv("UV_TARGET", str(tmp_path / "elsewhere"))
    venv = new_venv(tmp_path / "venv")
    wheel = wheel_file(make_wheel(tmp_path, "one", "1.0"))
    install_wheels(venv, [wheel], scratch=tmp_path, remedy=REMEDY)
    assert output(venv, "import one; print(one.__version__)") == "1.0"


def test_a_providers_packages_come_after_the_venvs_own(tmp_path: Path) -> None:
    provider = tmp_path / "provider"
    provider.mkdir()
    for name in ("shared", "theirs"):
        (provider / f"{name}.py").write_text("__version__ = 'provided'\n", encoding="utf-8")
    provided = ProvidedPackages(python=sys.executable, site_packages=(str(provider),), versions={})
    venv = new_venv(tmp_path / "venv", provided)
    wheel = wheel_file(make_wheel(tmp_path, "shared", "1.0"))
    install_wheels(venv, [wheel], scratch=tmp_path, remedy=REMEDY)
    versions = "import shared, theirs; print(shared.__version__, theirs.__version__)"
    assert output(venv, versions) == "1.0 provided"
    (pth,) = venv.rglob(PROVIDED_PTH)
    assert pth.read_text(encoding="utf-8") == f"{provider}\n"


def test_an_interpreter_that_can_make_no_venv_is_a_mismatch(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MismatchError, match="can't make a virtual environment"):
        new_venv(tmp_path / "file" / "venv")

from __future__ import annotations

import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from envbuilder.build_downloads import JudgedDownload, downloads_of, report_downloads
from envbuilder.download_calls import downloading_command, scan_python, scan_shell
from envbuilder.download_scan import Switch, scan_sdist
from envbuilder.errors import InputError, MismatchError
from envbuilder.recipe import Recipe, SourceBuild, TargetSpec
from tests.lab.bundles import lock_files
from tests.lab.packages import make_sdist, make_wheel

GUESSES = """\
import os
from urllib.request import urlretrieve as get
from setuptools import setup
FORCE_BUILD = os.getenv("KERNELS_FORCE_BUILD", "FALSE") == "TRUE"
if not FORCE_BUILD:
    get("https://example.org/kernels.whl", "kernels.whl")
setup(name="kernels")
"""


def sdist(folder: Path, setup_py: str | None = "", files: Mapping[str, str | bytes] | None = None) -> Path:
    return make_sdist(folder, "kernels", "1.0", setup_py=setup_py, files=files)


def whats(path: Path) -> list[tuple[str, int, str]]:
    return [(found.file, found.line, found.what) for found in scan_sdist(path)]


@pytest.mark.parametrize(
    "source",
    [
        "import urllib.request\nurllib.request.urlopen('u')",
        "import urllib.request as r\nr.urlretrieve('u')",
        "from urllib import request\nrequest.urlopen('u')",
        "from urllib.request import urlopen as o\nlist(map(o, urls))",
        "import requests\nrequests.Session().get('u')",
        "import requests as r\nfetch = r.get\nfetch('u')",
        "import importlib\nimportlib.import_module('requests').get('u')",
        "import urllib.request\ngetattr(urllib.request, 'urlopen')('u')",
        "import http.client\nhttp.client.HTTPSConnection('h')",
        "from huggingface_hub import snapshot_download\nsnapshot_download('a/b')",
        "import torch\ntorch.hub.load('a', 'b')",
        "import os\nos.system('curl -LO u')",
        "import os\nos.system('cd x && wget u')",
        "import subprocess\nsubprocess.check_call(['git', '-C', 'x', 'clone', url])",
        "from subprocess import run as call\ncall(['git', 'submodule', 'update', '--init'])",
        "import subprocess, sys\nsubprocess.run([sys.executable, '-m', 'pip', 'install', 'x'])",
        "import subprocess, sys\nsubprocess.run(f'{sys.executable} -m pip install {x}', shell=True)",
        "import subprocess\ncmd = ['pip3', 'download'] + names\nsubprocess.run(args=cmd)",
        "import subprocess\nsubprocess.run('git clone {}'.format(u).split())",
        "import shlex, subprocess\nsubprocess.run(shlex.split('aria2c -x4 u'))",
        "import subprocess\nsubprocess.run(['bash', '-c', 'cd x; hf download a/b'])",
        "import os\nos.execlp('curl', 'curl', 'u')",
    ],
)
def test_what_downloads_is_found(source: str) -> None:
    assert [call.line for call in scan_python(source).calls][:1] in ([2], [3])


@pytest.mark.parametrize(
    "source",
    [
        "import urllib.parse, urllib.error\nurllib.parse.quote('x')\nurllib.error.URLError",
        "import subprocess\nsubprocess.check_output(['git', 'rev-parse', 'HEAD'])",
        "import subprocess\nsubprocess.check_output(['git', 'submodule', 'status'])",
        "import subprocess\nsubprocess.run([nvcc, '-V'])\nsubprocess.run(['ninja', 'install'])",
        "import subprocess\nsubprocess.run(['pip', 'install', '--no-index', 'x'])",
        "import os, subprocess\nif os.path.isdir('.git'):\n    subprocess.run(['git', 'pull'])",
        "print('git clone https://example.org/x, or: pip install x')",
        "def get(url): ...\nget('u')",
    ],
)
def test_what_does_not_download_is_not(source: str) -> None:
    assert scan_python(source).calls == ()


def test_names_that_go_in_circles_or_grow_without_end_are_followed_only_so_far() -> None:
    circle = "import subprocess\na = b\nb = a\na = a + b\nb = b + a\nsubprocess.run(a)\na.b()\n"
    growing = "".join(f"x{n} = x{n + 1} + x{n + 1}\n" for n in range(60))
    assert scan_python(circle).calls == ()
    assert scan_python(f"import subprocess\nx60 = ['a']\n{growing}subprocess.run(x0)").calls == ()


def test_shell_lines_are_read_command_by_command() -> None:
    calls = scan_shell("#!/bin/sh\n# wget u\nmkdir x && curl u | tar x\nv=$(git ls-remote u)\necho wget\n")
    assert [(call.line, call.what) for call in calls] == [(3, "curl"), (4, "git ls-remote")]
    assert downloading_command(["A=1", "sudo", "apt-get", "-y", "install", "x"]) == "apt-get install"
    assert downloading_command([]) is None


def test_a_guessed_wheel_is_found_with_the_variable_that_stops_it(tmp_path: Path) -> None:
    (found,) = scan_sdist(sdist(tmp_path, GUESSES))
    assert (found.file, found.line, found.what) == ("setup.py", 6, "urllib.request.urlretrieve")
    assert found.switch == Switch("KERNELS_FORCE_BUILD", "TRUE")


def test_where_the_code_shows_no_variable_the_known_ones_are_asked(tmp_path: Path) -> None:
    path = make_sdist(
        tmp_path, "causal-conv1d", "1.0", setup_py="import urllib.request\nurllib.request.urlopen('u')"
    )
    (found,) = scan_sdist(path)
    assert found.switch == Switch("CAUSAL_CONV1D_FORCE_BUILD", "TRUE")


def test_nothing_of_the_sdist_is_run(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    leaves_a_mark = f"import pathlib\npathlib.Path({str(mark)!r}).touch()\n"
    files = {
        "helper.py": leaves_a_mark,
        "backend/mine.py": leaves_a_mark,
        "conftest.py": leaves_a_mark,
        "pyproject.toml": '[build-system]\nrequires=[]\nbuild-backend="mine"\nbackend-path=["backend"]\n',
    }
    scan_sdist(sdist(tmp_path, f"{leaves_a_mark}import helper\n", files))
    assert not mark.exists()


def test_what_setup_py_imports_runs_or_names_is_read_too_and_nothing_else(tmp_path: Path) -> None:
    reaches = "import requests\nrequests.get('u')\n"
    files = {
        "tools/__init__.py": "",
        "tools/fetch.py": f"from . import deeper\n{reaches}",
        "tools/deeper.py": reaches,
        "generate.py": reaches,
        "bundled.sh": "git clone u\n",
        "kernels/hub.py": reaches,
        "tests/test_it.py": reaches,
        "noxfile.py": reaches,
    }
    setup_py = "from tools.fetch import get\nrun('generate.py')\nrun(['./bundled.sh'])\n"
    assert whats(sdist(tmp_path, setup_py, files)) == [
        ("bundled.sh", 1, "git clone"),
        ("generate.py", 2, "requests.get"),
        ("tools/deeper.py", 2, "requests.get"),
        ("tools/fetch.py", 3, "requests.get"),
    ]


def test_an_in_tree_backend_is_read_and_a_setup_py_that_no_backend_runs_is_not(tmp_path: Path) -> None:
    reaches = "import requests\nrequests.get('u')\n"
    own = '[build-system]\nrequires=[]\nbuild-backend="mine"\nbackend-path=["backend"]\n'
    flit = '[build-system]\nrequires=["flit_core"]\nbuild-backend="flit_core.buildapi"\n'
    assert whats(sdist(tmp_path, None, {"pyproject.toml": own, "backend/mine.py": reaches})) == [
        ("backend/mine.py", 2, "requests.get")
    ]
    assert whats(sdist(tmp_path, reaches, {"pyproject.toml": flit})) == []


def test_python_2_is_told_not_failed_at(tmp_path: Path) -> None:
    (found,) = scan_sdist(sdist(tmp_path, "print 'building'\n"))
    assert found.unread
    assert found.what.startswith("can't be parsed")
    (found,) = scan_sdist(sdist(tmp_path, "(" * 5000 + ")" * 5000))
    assert found.unread


def test_cmake_files_count_where_the_build_calls_cmake(tmp_path: Path) -> None:
    cmake = """\
# FetchContent_Declare(old GIT_REPOSITORY u)
#[[ file(DOWNLOAD u f) ]]
if(DEFINED ENV{KERNELS_CUTLASS_SRC_DIR})
  set(HERE $ENV{KERNELS_CUTLASS_SRC_DIR})
endif()
FetchContent_Declare(cutlass GIT_REPOSITORY https://example.org/c.git GIT_TAG "v1 (a)")
fetchcontent_declare(json URL "https://example.org/j.tar.gz")
FetchContent_Declare(near SOURCE_DIR ${CMAKE_CURRENT_SOURCE_DIR}/near)
FetchContent_Declare(googletest GIT_REPOSITORY https://example.org/g.git)
ExternalProject_Add(ep
  URL ${EP_URL})
ExternalProject_Add(mine SOURCE_DIR ../mine DOWNLOAD_COMMAND "")
file(DOWNLOAD https://example.org/f f)
file(READ x y)
CPMAddPackage(NAME fmt GITHUB_REPOSITORY a/b)
execute_process(COMMAND git submodule update --init)
execute_process(COMMAND git describe)
"""
    files = {"CMakeLists.txt": cmake, "tests/CMakeLists.txt": "file(DOWNLOAD u f)"}
    found = scan_sdist(sdist(tmp_path, "call('cmake')", files))
    assert [(item.line, item.what) for item in found] == [
        (6, "FetchContent_Declare(cutlass)"),
        (7, "FetchContent_Declare(json)"),
        (10, "ExternalProject_Add(ep)"),
        (13, "file(DOWNLOAD)"),
        (15, "CPMAddPackage(fmt)"),
        (16, "execute_process(git submodule update)"),
    ]
    assert found[0].switch == Switch("KERNELS_CUTLASS_SRC_DIR", "*")
    assert found[1].switch == Switch("CMAKE_ARGS", "-DFETCHCONTENT_FULLY_DISCONNECTED=ON", "contains")
    assert scan_sdist(sdist(tmp_path, "", files)) == ()


def test_what_other_tools_would_fetch_is_found_unless_it_is_in_the_sdist(tmp_path: Path) -> None:
    files = {
        ".gitmodules": '[submodule "a"]\n\tpath = csrc/a\n\turl = u\n[submodule "b"]\n\tpath = csrc/b\n',
        "csrc/b/b.h": "",
        "rust/Cargo.toml": "[dependencies]\nserde = '1'\n",
        "subprojects/zlib.wrap": "[wrap-file]\ndirectory = zlib-1\nsource_url = u\n",
        "subprojects/here.wrap": "[wrap-file]\ndirectory = here-1\nsource_url = u\n",
        "subprojects/here-1/meson.build": "",
        "go/go.mod": "module m\nrequire x v1\n",
    }
    assert whats(sdist(tmp_path, "", files)) == [
        (".gitmodules", 2, "submodule csrc/a, which is not in it"),
        ("go/go.mod", 0, "Go modules that it requires"),
        ("rust/Cargo.toml", 0, "crates that Cargo fetches"),
        ("subprojects/zlib.wrap", 0, "Meson's subproject zlib"),
    ]
    vendored = {
        "Cargo.toml": "[dependencies]\nserde = '1'\n",
        ".cargo/config.toml": "[source.vendored-sources]\ndirectory = 'vendor'\n",
    }
    assert whats(sdist(tmp_path, "", vendored)) == []


def test_an_archive_that_is_none_or_far_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = sdist(tmp_path, GUESSES)
    monkeypatch.setattr("envbuilder.archive.MOST_FILES", 1)
    with pytest.raises(InputError, match="far too large"):
        scan_sdist(path)
    path.write_bytes(path.read_bytes()[:200])
    monkeypatch.undo()
    with pytest.raises(InputError, match="not an sdist that can be read"):
        scan_sdist(path)


def test_links_in_an_archive_are_not_followed(tmp_path: Path) -> None:
    path = tmp_path / "kernels-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        link = tarfile.TarInfo("kernels-1.0/setup.py")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    assert scan_sdist(path) == ()


@pytest.mark.parametrize(
    ("switch", "environment", "off"),
    [
        (Switch("V", "TRUE"), {}, False),
        (Switch("V", "TRUE"), {"V": "true"}, True),
        (Switch("V", "TRUE"), {"V": "1"}, False),
        (Switch("V", "*"), {"V": "/here"}, True),
        (Switch("V", "*"), {"V": "OFF"}, False),
        (Switch("V", "-DX=ON", "contains"), {"V": "-DY=1 -DX=ON"}, True),
        (Switch("V", "-DX=ON", "contains"), {"V": "-DY=1"}, False),
        (Switch("V", "*", "unset"), {}, True),
        (Switch("V", "*", "unset"), {"V": "0"}, True),
        (Switch("V", "*", "unset"), {"V": "1"}, False),
    ],
)
def test_a_switch_knows_when_it_is_off(switch: Switch, environment: dict[str, str], off: bool) -> None:
    assert switch.is_off(environment) is off


class Listener:
    def __init__(self) -> None:
        self.said: list[tuple[str, str]] = []

    def stage(self, text: str) -> None: ...

    def progress(self, label: str, done: int, total: int, unit: object) -> None: ...

    def note(self, text: str) -> None:
        self.said.append(("note", text))

    def warn(self, text: str) -> None:
        self.said.append(("warn", text))


def judge(
    tmp_path: Path, setup_py: str, build: SourceBuild, wheels: tuple[str, ...] = ()
) -> tuple[Recipe, tuple[JudgedDownload, ...], list[tuple[str, str]]]:
    recipe = Recipe(
        name="small",
        requirements=("kernels",),
        trainer=False,
        target=TargetSpec(python="==3.12.*"),
        build={"kernels": build},
    )
    made = {make_wheel(tmp_path, name, "1.0"): ("build",) for name in wheels}
    lock = lock_files(tmp_path / "bundle", recipe, {sdist(tmp_path, setup_py): ("runtime",), **made})
    judged = downloads_of(recipe, lock, tmp_path / "bundle", python="3.12")
    listener = Listener()
    report_downloads(recipe, judged, listener)
    return recipe, judged, listener.said


def test_a_recipe_that_sets_the_variable_gets_a_note_and_one_that_does_not_a_warning(tmp_path: Path) -> None:
    _, (judged,), ((kind, text),) = judge(tmp_path, GUESSES, SourceBuild(env={"KERNELS_FORCE_BUILD": "TRUE"}))
    assert (judged.off, kind) == (True, "note")
    assert "the recipe sets KERNELS_FORCE_BUILD" in text
    _, (judged,), ((kind, text),) = judge(tmp_path, GUESSES, SourceBuild())
    assert (judged.off, kind) == (False, "warn")
    assert "kernels 1.0" in text
    assert "setup.py, line 6" in text
    assert 'KERNELS_FORCE_BUILD = "TRUE" under [build.kernels.env] in recipes/small.toml' in text


def test_many_places_make_one_message_and_what_nothing_turns_off_says_so(tmp_path: Path) -> None:
    source = "import requests\n" + "requests.get('u')\n" * 5
    _, judged, ((kind, text),) = judge(tmp_path, source, SourceBuild())
    assert len(judged) == 5
    assert kind == "warn"
    assert "and 2 more" in text
    assert "Nothing is known that turns this off" in text


def test_setup_requires_is_met_by_the_build_environment_or_warned_of(tmp_path: Path) -> None:
    source = "from setuptools import setup\nsetup(name='kernels', setup_requires=['psutil', 'Ninja>=1'])\n"
    _, (judged,), ((kind, text),) = judge(tmp_path, source, SourceBuild(), ("ninja",))
    assert (judged.off, kind) == (False, "warn")
    assert 'build-requires = ["psutil", "Ninja>=1"] under [build.kernels]' in text
    _, (judged,), said = judge(tmp_path, source, SourceBuild(), ("ninja", "psutil"))
    assert (judged.off, said) == (True, [])


def test_a_file_that_cannot_be_parsed_is_a_note(tmp_path: Path) -> None:
    _, (judged,), ((kind, text),) = judge(tmp_path, "print 'x'\n", SourceBuild())
    assert judged.download.unread
    assert kind == "note"
    assert "can't be parsed" in text


def test_a_bundle_without_the_sdist_is_refused(tmp_path: Path) -> None:
    recipe, _, _ = judge(tmp_path, GUESSES, SourceBuild())
    lock = lock_files(tmp_path / "bundle", recipe, {sdist(tmp_path, GUESSES): ("runtime",)})
    (tmp_path / "bundle" / "files" / "kernels-1.0.tar.gz").unlink()
    with pytest.raises(MismatchError, match=r"lacks files/kernels-1\.0\.tar\.gz"):
        downloads_of(recipe, lock, tmp_path / "bundle", python="3.12")

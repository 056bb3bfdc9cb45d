from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from envbuilder.model import ProvidedPackages
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from tests.doctor.conftest import TinyEnv, cuda_recipe, make_lock, run_one, torch_version
from tests.lab.packages import make_wheel


def test_a_missing_env_is_named_with_the_command_that_makes_it(root: Root) -> None:
    recipe = Recipe(name="tiny", requirements=("tiny",))
    finding = run_one("env.lock", root=root, recipe=recipe, lock=make_lock())
    assert finding.verdict == "failed"
    assert str(root.env("tiny")) in finding.summary
    assert finding.remedy == "envbuilder install recipes/tiny.toml"


def test_an_env_of_another_lock_is_found(env: TinyEnv) -> None:
    assert env.check("env.lock").verdict == "ok"
    env.lock = make_lock(digest="1" * 64)
    finding = env.check("env.lock")
    assert finding.verdict == "failed"
    assert any(env.lock.digest in line for line in finding.evidence)


def test_an_env_lock_that_is_gone_or_damaged_is_found(env: TinyEnv) -> None:
    lock = env.folder / "pylock.toml"
    text = lock.read_text(encoding="utf-8")
    for content in (
        text[: len(text) // 2],
        "packages = 3",
        text.replace('version = "2.0"', 'version = "2.1"'),
    ):
        lock.write_text(content, encoding="utf-8")
        assert env.check("env.lock").verdict == "failed"
    lock.unlink()
    assert env.check("env.lock").verdict == "failed"


def test_a_stray_distribution_is_named(env: TinyEnv, tmp_path: Path) -> None:
    assert env.check("env.distributions").verdict == "ok"
    env.install(make_wheel(tmp_path, "stray", "0.1"))
    finding = env.check("env.distributions")
    assert finding.verdict == "failed"
    assert finding.evidence[0].startswith("stray 0.1 is not in the lock")


def test_a_distribution_of_another_version_is_named(env: TinyEnv, tmp_path: Path) -> None:
    env.install(make_wheel(tmp_path, "other", "3.0"))
    finding = env.check("env.distributions")
    assert finding.verdict == "failed"
    assert finding.evidence[0].startswith("other is 3.0 and not 2.0")


def test_a_missing_distribution_is_named(env: TinyEnv) -> None:
    info = env.site_packages / "tiny-1.0.dist-info"
    info.rename(env.folder / "elsewhere")
    assert env.check("env.distributions").evidence == ("tiny 1.0 is missing",)


def test_a_distribution_that_is_there_twice_is_named(env: TinyEnv) -> None:
    twin = env.site_packages / "tiny-0.9.dist-info"
    twin.mkdir()
    (twin / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 0.9\n", encoding="utf-8")
    finding = env.check("env.distributions")
    assert finding.verdict == "failed"
    assert len([line for line in finding.evidence if "2 times" in line]) == 2


def test_a_changed_byte_in_an_installed_file_is_found(env: TinyEnv) -> None:
    assert env.check("env.records").verdict == "ok"
    module = env.site_packages / "tiny.py"
    data = bytearray(module.read_bytes())
    data[0] ^= 1
    module.write_bytes(data)
    finding = env.check("env.records")
    assert finding.verdict == "failed"
    assert finding.evidence == (f"{module} has other bytes",)
    assert finding.remedy == "envbuilder install recipes/tiny.toml --reinstall"


def test_a_missing_installed_file_is_named(env: TinyEnv) -> None:
    (env.site_packages / "other.py").unlink()
    assert env.check("env.records").evidence == (f"{env.site_packages / 'other.py'} is missing",)


@pytest.mark.parametrize(
    "content", [None, "tiny.py,sha256=x", "tiny.py,no-digest,1", b"\xff\xfe", "tiny.py,crc=AAAA,1"]
)
def test_a_missing_or_damaged_record_is_a_failure(env: TinyEnv, content: str | bytes | None) -> None:
    record = env.site_packages / "tiny-1.0.dist-info" / "RECORD"
    record.unlink()
    if content is not None:
        record.write_bytes(content if isinstance(content, bytes) else content.encode())
    finding = env.check("env.records")
    assert finding.verdict == "failed"
    assert "tiny" in finding.evidence[0]


def test_of_many_changed_files_some_are_shown_and_the_rest_counted(make_env: Callable[..., TinyEnv]) -> None:
    env = make_env(files={f"many/m{number}.py": "" for number in range(30)})
    for module in (env.site_packages / "many").iterdir():
        module.unlink()
    finding = env.check("env.records")
    assert finding.summary.startswith("30 of ")
    assert len(finding.evidence) == 21
    assert finding.evidence[-1] == "… and 10 more"


def test_extension_modules_are_imported_after_torch_by_the_envs_interpreter(
    make_env: Callable[..., TinyEnv],
) -> None:
    module = "import sys\nassert 'torch' in sys.modules\nassert sys.prefix.endswith('envs/tiny')\n"
    env = make_env(recipe=cuda_recipe("ext"), files={"torch/__init__.py": "", "ext.py": module})
    assert env.check("env.imports").verdict == "ok"


def test_an_env_without_torch_imports_its_extension_modules_alone(make_env: Callable[..., TinyEnv]) -> None:
    env = make_env(recipe=cuda_recipe("ext"), files={"ext.py": "x = 1\n"})
    assert env.check("env.imports").verdict == "ok"


def test_an_extension_that_does_not_import_is_named_with_its_error_and_a_fitting_remedy(
    make_env: Callable[..., TinyEnv],
) -> None:
    broken = "raise ImportError('ext.so: undefined symbol: _ZN3c105ErrorC2E')\n"
    env = make_env(recipe=cuda_recipe("ext"), files={"torch/__init__.py": "", "ext.py": broken})
    finding = env.check("env.imports")
    assert finding.verdict == "failed"
    assert "undefined symbol" in finding.evidence[0]
    assert finding.remedy is not None
    assert "envbuilder compile recipes/tiny.toml --local --rebuild" in finding.remedy


@pytest.mark.parametrize(
    ("libraries", "remedy"),
    [(None, "envbuilder install recipes/tiny.toml --reinstall"), ("/opt/old", "unset LD_LIBRARY_PATH, and")],
)
def test_where_torch_itself_does_not_import_nothing_is_compiled_again(
    make_env: Callable[..., TinyEnv], monkeypatch: pytest.MonkeyPatch, libraries: str | None, remedy: str
) -> None:
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)
    if libraries:
        monkeypatch.setenv("LD_LIBRARY_PATH", libraries)
    broken = "raise ImportError('no such thing')\n"
    env = make_env(recipe=cuda_recipe("ext"), files={"torch/__init__.py": broken, "ext.py": "import torch\n"})
    finding = env.check("env.imports")
    assert finding.verdict == "failed"
    assert finding.remedy is not None
    assert finding.remedy.startswith(remedy)


def test_an_extension_that_crashes_the_interpreter_is_a_failure(make_env: Callable[..., TinyEnv]) -> None:
    crash = "import os\nprint('about to crash', flush=True)\nos.abort()\n"
    env = make_env(recipe=cuda_recipe("ext"), files={"torch/__init__.py": "", "ext.py": crash})
    finding = env.check("env.imports")
    assert finding.verdict == "failed"
    assert "ended with -6" in finding.summary
    assert any("about to crash" in line for line in finding.evidence)


def test_a_recipe_without_extensions_skips_their_import(env: TinyEnv) -> None:
    assert env.check("env.imports").verdict == "skipped"


@pytest.fixture
def provided(tmp_path: Path) -> ProvidedPackages:
    """A provider's library folder with one package."""
    folder = tmp_path / "provider"
    info = folder / "big-5.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: big\nVersion: 5.0\n", encoding="utf-8")
    return ProvidedPackages(python=sys.executable, site_packages=(str(folder),), versions={"big": "5.0"})


def test_provided_packages_count_as_present(
    make_env: Callable[..., TinyEnv], provided: ProvidedPackages
) -> None:
    finding = make_env(provided=provided).check("env.distributions")
    assert finding.verdict == "ok"
    assert "1 provided" in finding.summary


def test_a_provided_package_that_the_machine_has_changed_is_named(
    make_env: Callable[..., TinyEnv], provided: ProvidedPackages
) -> None:
    env = make_env(provided=provided)
    metadata = Path(provided.site_packages[0], "big-5.0.dist-info", "METADATA")
    metadata.write_text("Metadata-Version: 2.1\nName: big\nVersion: 5.1\n", encoding="utf-8")
    assert "is now 5.1" in env.check("env.distributions").evidence[0]


def test_an_env_that_no_longer_reaches_the_provider_is_found(
    make_env: Callable[..., TinyEnv], provided: ProvidedPackages
) -> None:
    env = make_env(provided=provided)
    (env.site_packages / "envbuilder-provided.pth").unlink()
    assert "envbuilder-provided.pth" in env.check("env.distributions").evidence[0]


def test_an_env_as_it_was_made_has_no_strays(env: TinyEnv) -> None:
    (env.site_packages / "__pycache__").mkdir(exist_ok=True)
    (env.site_packages / "__pycache__" / "tiny.cpython-311.pyc").write_bytes(b"")
    assert env.check("env.strays").verdict == "ok"


@pytest.mark.parametrize("name", ["evil.pth", "sitecustomize.py", "usercustomize.py"])
def test_a_stray_file_that_runs_at_every_start_is_a_failure_and_named(env: TinyEnv, name: str) -> None:
    stray = env.site_packages / name
    stray.write_text("import os\n", encoding="utf-8")
    finding = env.check("env.strays")
    assert (finding.verdict, finding.evidence) == ("failed", (str(stray),))


def test_a_pth_file_that_a_wheel_brought_is_no_stray(make_env: Callable[..., TinyEnv]) -> None:
    assert make_env(files={"tiny.pth": "import tiny\n"}).check("env.strays").verdict == "ok"


def test_the_pth_file_of_provided_packages_is_no_stray(
    make_env: Callable[..., TinyEnv], provided: ProvidedPackages
) -> None:
    assert make_env(provided=provided).check("env.strays").verdict == "ok"


def test_other_files_and_links_that_no_record_lists_are_warned_of(env: TinyEnv, tmp_path: Path) -> None:
    (env.site_packages / "helper.py").write_text("", encoding="utf-8")
    (env.site_packages / "linked").symlink_to(tmp_path)
    finding = env.check("env.strays")
    assert finding.verdict == "warning"
    assert set(finding.evidence) == {str(env.site_packages / name) for name in ("helper.py", "linked")}


SCRIPTS = {
    "beside": """#!/bin/sh
\'\'\'exec\' "$(dirname -- "$(realpath -- "$0")")"/\'python\' "$0" "$@"
\' \'\'\'
""",
    "shell": "#!/bin/sh\necho hello\n",
    "own": "#!{bin}/python\n",
    "any": "#!/usr/bin/env python3\n",
}


def put_script(env: TinyEnv, name: str, text: str, mode: int = 0o755) -> None:
    script = env.folder / "bin" / name
    script.write_text(text.replace("{bin}", str(env.folder / "bin")), encoding="utf-8")
    script.chmod(mode)


@pytest.mark.parametrize("kind", SCRIPTS)
def test_scripts_that_find_the_envs_interpreter_pass(env: TinyEnv, kind: str) -> None:
    put_script(env, "tool", SCRIPTS[kind])
    assert env.check("env.scripts").verdict == "ok"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("#!/gone/env/bin/python3.11\n", "which is not there"),
        (f"#!{sys.executable}\n", f"is run by {sys.executable}"),
        ("#!/bin/sh\n'''exec' /gone/a/very/long/path/bin/python \"$0\" \"$@\"\n' '''\n", "is not there"),
        ("#!/bin/sh\n'''exec' \"/gone/with a space/bin/python\" \"$0\" \"$@\"\n' '''\n", "is not there"),
    ],
)
def test_a_script_of_another_interpreter_is_named(env: TinyEnv, text: str, why: str) -> None:
    put_script(env, "tool", text)
    finding = env.check("env.scripts")
    assert finding.verdict == "failed"
    assert finding.evidence[0].startswith(str(env.folder / "bin" / "tool"))
    assert why in finding.evidence[0]


def test_a_script_that_may_not_be_executed_is_named(env: TinyEnv) -> None:
    put_script(env, "tool", SCRIPTS["own"], mode=0o644)
    assert env.check("env.scripts").evidence[0].endswith("is not executable")


def test_an_env_whose_interpreter_is_gone_is_found(env: TinyEnv, tmp_path: Path) -> None:
    assert env.check("env.interpreter").verdict == "ok"
    for name in ("python", "python3"):
        link = env.folder / "bin" / name
        link.unlink()
        link.symlink_to(tmp_path / "removed-module" / "bin" / "python3")
    finding = env.check("env.interpreter")
    assert finding.verdict == "failed"
    assert "removed-module" in finding.evidence[1]


@pytest.mark.parametrize("text", [None, "version = 3.11.7\n", "home = /removed-module/bin\n"])
def test_an_env_whose_configuration_is_gone_or_leads_nowhere_is_found(env: TinyEnv, text: str | None) -> None:
    config = env.folder / "pyvenv.cfg"
    config.unlink()
    if text is not None:
        config.write_text(text, encoding="utf-8")
    assert env.check("env.interpreter").verdict == "failed"


def test_an_env_whose_interpreter_became_another_python_is_found(env: TinyEnv) -> None:
    env.change_receipt(python="3.9.1")
    finding = env.check("env.interpreter")
    assert finding.verdict == "failed"
    assert "3.9.1" in finding.summary


# What venv writes, between "deactivate nondestructive" and _OLD_VIRTUAL_PATH.
ACTIVATES = {
    "3.11.7": """
VIRTUAL_ENV="{folder}"
export VIRTUAL_ENV
""",
    "3.12.1": """
# on Windows, a path can contain colons and backslashes and has to be converted:
if [ "$OSTYPE" = "cygwin" ] || [ "$OSTYPE" = "msys" ] ; then
    # transform D:\\path\\to\\venv to /d/path/to/venv on MSYS
    # and to /cygdrive/d/path/to/venv on Cygwin
    export VIRTUAL_ENV=$(cygpath "{folder}")
else
    # use the path as-is
    export VIRTUAL_ENV="{folder}"
fi
""",
    "3.12.10": """
# on Windows, a path can contain colons and backslashes and has to be converted:
case "$(uname)" in
    CYGWIN*|MSYS*|MINGW*)
        # transform D:\\path\\to\\venv to /d/path/to/venv on MSYS and MINGW
        # and to /cygdrive/d/path/to/venv on Cygwin
        VIRTUAL_ENV=$(cygpath {quoted})
        export VIRTUAL_ENV
        ;;
    *)
        # use the path as-is
        export VIRTUAL_ENV={quoted}
        ;;
esac
""",
    "3.13.0": """
# on Windows, a path can contain colons and backslashes and has to be converted:
case "$(uname)" in
    CYGWIN*|MSYS*)
        # transform D:\\path\\to\\venv to /d/path/to/venv on MSYS
        # and to /cygdrive/d/path/to/venv on Cygwin
        VIRTUAL_ENV=$(cygpath "{folder}")
        export VIRTUAL_ENV
        ;;
    *)
        # use the path as-is
        export VIRTUAL_ENV="{folder}"
        ;;
esac
""",
}


@pytest.mark.parametrize("version", ACTIVATES)
def test_where_each_pythons_activate_leads_is_read_right(env: TinyEnv, version: str, tmp_path: Path) -> None:
    for folder, verdict in ((env.folder, "ok"), (tmp_path / "where it was", "warning")):
        text = ACTIVATES[version].format(folder=folder, quoted=shlex.quote(str(folder)))
        (env.folder / "bin" / "activate").write_text(text, encoding="utf-8")
        finding = env.check("env.interpreter")
        assert finding.verdict == verdict
    assert finding.evidence[0].endswith(f": {tmp_path}/where it was")


def test_an_env_that_was_moved_is_warned_of(env: TinyEnv) -> None:
    activate = env.folder / "bin" / "activate"
    text = activate.read_text(encoding="utf-8")
    assert str(env.folder) in text
    activate.write_text(text.replace(str(env.folder), "/where/it/was"), encoding="utf-8")
    finding = env.check("env.interpreter")
    assert finding.verdict == "warning"
    assert "/where/it/was" in finding.evidence[0]


@pytest.mark.parametrize(
    ("cuda", "verdict"), [("13.0", "ok"), (None, "failed")], ids=["a CUDA build", "a CPU build"]
)
def test_a_cpu_torch_in_an_env_of_gpu_packages_is_found(
    make_env: Callable[..., TinyEnv], cuda: str | None, verdict: str
) -> None:
    env = make_env(recipe=cuda_recipe("ext"), files=torch_version("2.11.0+x", cuda))
    finding = env.check("env.torch")
    assert finding.verdict == verdict
    assert finding.evidence == (f"torch 2.11.0+x: CUDA {cuda}",)


def test_a_cpu_torch_is_right_for_a_recipe_without_gpu_code(make_env: Callable[..., TinyEnv]) -> None:
    assert make_env(files=torch_version("2.11.0+cpu", None)).check("env.torch").verdict == "skipped"

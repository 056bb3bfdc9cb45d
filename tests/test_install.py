"""install_env: whole or not at all, from bundle and wheelhouse alone."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import pytest
from packaging.pylock import Pylock
from uv import find_uv_bin

from envbuilder.errors import IntegrityError, MismatchError
from envbuilder.install import InstallReport, install_env
from envbuilder.lock import Group
from envbuilder.model import Bundle, EnvReceipt, Extension
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.venv import PROVIDED_PTH
from envbuilder.wheelhouse import store_built
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_sdist, make_wheel
from tests.lab.receipts import build_receipt

MINOR = ".".join(platform.python_version_tuple()[:2])
RECIPE = Recipe.model_validate({"name": "lab", "requirements": ["one", "built"]})


def bundle_of(
    folder: Path,
    recipe: Recipe = RECIPE,
    *,
    more: Mapping[Path, Sequence[Group]] = MappingProxyType({}),
    patches: Sequence[str] = (),
) -> Bundle:
    """A wheel, a source package that is already in the wheelhouse, built with neither torch nor patches, and
    a trainer; `more` wheels, and in the lock the sha256 of `patches` of the source package."""
    made = folder / "made"
    made.mkdir(exist_ok=True)
    one = make_wheel(made, "one", "1.0", requires=["built"])
    sdist = make_sdist(made, "built", "2.0")
    trainer = make_wheel(made, "envbuilder-trainer", "0.1.0", files={"trainer/__init__.py": ""})
    root = Root(folder / "root")
    wheel = make_wheel(made, "built", "2.0")
    wheel = wheel.rename(wheel.with_name("built-2.0-1_abc-py3-none-any.whl"))
    extension = Extension(module="built_ext", file="x.so", sha256="0", architectures=())
    store_built(root, wheel, build_receipt(sdist, wheel, extensions=(extension,)))
    return make_bundle(
        root,
        recipe,
        {one: ["runtime"], sdist: ["runtime"], **more},
        python=MINOR,
        trainer_wheel=trainer,
        tables={"built": {"patches": [{"path": "patches/a", "size": 1, "sha256": sha} for sha in patches]}},
    )


def install(folder: Path, bundle: Bundle, recipe: Recipe = RECIPE) -> InstallReport:
    return install_env(
        recipe, bundle, root=Root(folder / "root"), python=Path(sys.executable), reporter=Quiet()
    )


def versions(python: Path) -> dict[str, str]:
    code = (
        "import importlib.metadata as m, json;"
        "print(json.dumps({d.name: d.version for d in m.distributions()}))"
    )
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


INSTALLED = {"one": "1.0", "built": "2.0", "envbuilder-trainer": "0.1.0"}


def test_the_env_holds_bundle_wheelhouse_and_trainer_and_its_receipt_says_so(tmp_path: Path) -> None:
    report = install(tmp_path, bundle_of(tmp_path))
    assert report.path == Root(tmp_path / "root").env("lab")
    assert versions(report.path / "bin" / "python") == INSTALLED
    receipt = EnvReceipt.model_validate_json((report.path / "envbuilder.json").read_bytes())
    assert receipt == report.receipt
    assert {package.name: package.origin for package in receipt.packages} == {
        "one": "bundle",
        "built": "wheelhouse",
        "envbuilder-trainer": "tool",
    }
    assert [extension.module for extension in receipt.extensions] == ["built_ext"]


def test_activation_scripts_name_the_place_where_the_env_is(tmp_path: Path) -> None:
    report = install(tmp_path, bundle_of(tmp_path))
    done = subprocess.run(
        ["sh", "-c", f". {report.path}/bin/activate && command -v python && echo $VIRTUAL_ENV"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.split() == [str(report.path / "bin" / "python"), str(report.path)]


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_the_env_lock_is_installed_by_uv_and_pip_without_an_index(tmp_path: Path, installer: str) -> None:
    lock = install(tmp_path, bundle_of(tmp_path)).path / "pylock.toml"
    assert lock.stat().st_size
    parsed = Pylock.from_dict(tomllib.loads(lock.read_text(encoding="utf-8")))
    assert all(package.wheels and not package.sdist for package in parsed.packages)
    assert "://" not in lock.read_text(encoding="utf-8")
    venv = tmp_path / "fresh"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    python = str(venv / "bin" / "python")
    commands = {
        "uv": [find_uv_bin(), "pip", "install", "--no-config", "--offline", "--python", python],
        "pip": [sys.executable, "-m", "pip", "--python", python, "install", "--no-deps"],
    }
    environment = {"PATH": os.defpath, "HOME": str(tmp_path), "PIP_CONFIG_FILE": os.devnull}
    subprocess.run(
        [*commands[installer], "--no-index", "-r", lock], check=True, capture_output=True, env=environment
    )
    assert versions(Path(python)) == INSTALLED


def test_a_second_install_does_nothing_and_a_changed_lock_makes_the_env_anew(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    first = install(tmp_path, bundle)
    inode = first.path.stat().st_ino
    assert install(tmp_path, bundle).receipt == first.receipt
    assert first.path.stat().st_ino == inode
    newer = make_wheel(tmp_path / "made", "one", "1.1")
    changed = make_bundle(Root(tmp_path / "root"), RECIPE, {newer: ["runtime"]}, python=MINOR)
    assert versions(install(tmp_path, changed).path / "bin" / "python") == {"one": "1.1"}
    assert [path.name for path in first.path.parent.iterdir()] == ["lab"]


@pytest.mark.parametrize("place", ["bundle", "wheelhouse", "trainer"])
def test_one_changed_byte_is_found_and_the_env_that_was_there_stays(tmp_path: Path, place: str) -> None:
    bundle = bundle_of(tmp_path)
    env = install(tmp_path, bundle).path
    (env / "envbuilder.json").write_text("{}", encoding="utf-8")  # so that the env is made again
    damaged = {
        "bundle": bundle.path / "files" / "one-1.0-py3-none-any.whl",
        "wheelhouse": next(Root(tmp_path / "root").wheelhouse.glob("*/*.whl")),
        "trainer": next((bundle.path / "tool").iterdir()),
    }[place]
    data = bytearray(damaged.read_bytes())
    data[data.index(b"PK\x01\x02") + 12] ^= 1  # a time stamp: the archive still reads well
    damaged.unlink()
    damaged.write_bytes(data)
    with pytest.raises(IntegrityError) as caught:
        install(tmp_path, bundle)
    assert caught.value.exit_code == 5
    assert caught.value.context["file"] == str(damaged)
    assert versions(env / "bin" / "python") == INSTALLED
    assert [path.name for path in env.parent.iterdir()] == ["lab"]


def test_a_source_package_that_was_not_compiled_is_a_mismatch_with_the_remedy(tmp_path: Path) -> None:
    bundle = bundle_of(tmp_path)
    next(Root(tmp_path / "root").wheelhouse.glob("*/receipt.json")).unlink()
    with pytest.raises(MismatchError, match=r"built 2\.0 has not been compiled") as caught:
        install(tmp_path, bundle)
    assert caught.value.remedy == "On a compute node: envbuilder compile recipes/lab.toml --local"
    assert not Root(tmp_path / "root").env("lab").exists()


@pytest.mark.parametrize("groups", [["runtime"], ["runtime", "build"]])
def test_what_was_built_without_torch_at_hand_fits_whatever_torch_the_env_holds(
    tmp_path: Path, groups: list[Group]
) -> None:
    torch = make_wheel(tmp_path, "torch", "2.11.0")
    bundle = bundle_of(tmp_path, more={torch: groups})
    if "build" in groups:
        with pytest.raises(MismatchError, match="has not been compiled") as caught:
            install(tmp_path, bundle)
        assert caught.value.context["torch"] == "2.11.0"
    else:
        assert versions(install(tmp_path, bundle).path / "bin" / "python") == INSTALLED | {"torch": "2.11.0"}


def test_a_wheel_that_was_built_without_the_locks_patches_is_not_installed(tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match="has not been compiled"):
        install(tmp_path, bundle_of(tmp_path, patches=["c" * 64]))


def test_an_unfinished_env_is_replaced(tmp_path: Path) -> None:
    unfinished = Root(tmp_path / "root").env("lab")
    (unfinished / "bin").mkdir(parents=True)
    (unfinished / "stray").touch()
    report = install(tmp_path, bundle_of(tmp_path))
    assert versions(report.path / "bin" / "python") == INSTALLED
    assert not (report.path / "stray").exists()


def test_provided_packages_are_reached_and_recorded_and_not_installed(tmp_path: Path) -> None:
    provider = tmp_path / "provider"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", provider], check=True)
    site = provider / "lib" / f"python{MINOR}" / "site-packages"
    (site / "torch_like-2.11.0+cu130.dist-info").mkdir()
    (site / "torch_like-2.11.0+cu130.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: torch-like\nVersion: 2.11.0+cu130\n", encoding="utf-8"
    )
    (site / "torch_like.py").write_text("origin = 'machine'\n", encoding="utf-8")
    recipe = Recipe.model_validate(
        {
            "name": "lab",
            "requirements": ["one", "torch-like"],
            "provided": {"python": "python3", "packages": ["torch-like==2.11.0"]},
        }
    )
    report = install_env(
        recipe,
        bundle_of(tmp_path, recipe),
        root=Root(tmp_path / "root"),
        python=provider / "bin" / "python",
        reporter=Quiet(),
    )
    provided = report.receipt.provided
    assert provided is not None
    assert provided.versions == {"torch-like": "2.11.0+cu130"}
    assert [path.name for path in report.path.rglob(PROVIDED_PTH)] == [PROVIDED_PTH]
    code = "import torch_like, one, sys; print(torch_like.origin, sys.prefix)"
    done = subprocess.run(
        [report.path / "bin" / "python", "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["machine", str(report.path)]
    assert "torch-like" not in {package.name for package in report.receipt.packages}


def test_a_full_disk_is_a_typed_error_and_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "made").mkdir()
    # Bytes that don't compress, three times the disk's size.
    big = make_wheel(tmp_path / "made", "big", "1.0", files={"big.bin": os.urandom(3 << 20)})
    make_bundle(Root(tmp_path / "root"), RECIPE, {big: ["runtime"]}, python=MINOR)
    (tmp_path / "root" / "envs").mkdir()
    program = tmp_path / "install.py"
    program.write_text(
        "import sys\n"
        "from pathlib import Path\n"
        "from envbuilder.bundle import open_bundle\n"
        "from envbuilder.errors import MismatchError\n"
        "from tests.test_install import RECIPE, install\n"
        "from envbuilder.paths import Root\n"
        "folder = Path(sys.argv[1])\n"
        "try:\n"
        "    install(folder, open_bundle(Root(folder / 'root'), 'lab'))\n"
        "except MismatchError as error:\n"
        "    print(error.message, list((folder / 'root/envs').iterdir()))\n",
        encoding="utf-8",
    )
    # A mount namespace of its own, for root and ordinary users alike.
    command = f"mount -t tmpfs -o size=1m tmpfs {tmp_path}/root/envs && {sys.executable} {program} {tmp_path}"
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", command],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    assert "There is no room for" in done.stdout
    assert done.stdout.endswith("[]\n")

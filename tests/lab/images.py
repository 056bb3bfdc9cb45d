"""Envs as images, made with Debian's squashfs-tools as `install --image` makes them."""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path

from envbuilder.envlock import WheelFile
from envbuilder.fetch.selfpack import pack_trainer
from envbuilder.image.make import ImageReport, make_image
from envbuilder.install import install_env
from envbuilder.interpreter import inspect_interpreter
from envbuilder.model import ENV_RECEIPT, EnvReceipt, InstalledPackage, ProvidedPackages, read_record
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from envbuilder.venv import install_wheels, make_venv, site_packages
from tests.lab.bundles import make_bundle
from tests.lab.packages import make_wheel
from tests.test_train import INSPECTION, STAND_IN, TORCHRUN

SYSTEM_PYTHON = Path("/usr/bin/python3")
"""What every user may run."""
_RECIPE = Recipe.model_validate({"name": "tiny", "requirements": ["one", "torch"]})
_SCRIPT = {"one.py": "def main():\n    print('one runs')\n", "one-1.0.dist-info/entry_points.txt": (
    "[console_scripts]\none = one:main\n"
)}  # fmt: skip


def need_fuse() -> None:
    """Every user must be able to mount: so it is where udev runs, and often not in a container."""
    fuse = Path("/dev/fuse")
    is_open = fuse.exists() and fuse.stat().st_mode & 0o006 == 0o006
    assert is_open, "make test-lab needs a /dev/fuse for every user: chmod 666 /dev/fuse"


def make_tiny_image(folder: Path) -> ImageReport:
    """The image of a small env with a stand-in for the trainer, in `folder`/root; all else is removed."""
    wheels = folder / "wheels"
    wheels.mkdir(parents=True)
    one = make_wheel(wheels, "one", "1.0", files=_SCRIPT)
    torch = {
        "torch/__init__.py": "",
        "torch/distributed/__init__.py": "",
        "torch/distributed/run.py": TORCHRUN,
    }
    trainer = {
        "trainer/__init__.py": "",
        "trainer/__main__.py": STAND_IN,
        "trainer/inspection.py": INSPECTION,
    }
    told = subprocess.run(
        [SYSTEM_PYTHON, "-c", "import sys; print('%d.%d' % sys.version_info[:2])"],
        capture_output=True,
        text=True,
        check=True,
    )
    root = Root(folder / "root")
    bundle = make_bundle(
        root,
        _RECIPE,
        {one: ["runtime"], make_wheel(wheels, "torch", "2.0", files=torch): ["runtime"]},
        python=told.stdout.strip(),
        trainer_wheel=make_wheel(wheels, "envbuilder-trainer", "0.1.0", files=trainer),
    )
    with tempfile.TemporaryDirectory() as scratch:
        made = install_env(
            _RECIPE, bundle, root=root, python=SYSTEM_PYTHON, reporter=Quiet(), folder=Path(scratch) / "env"
        )
        return make_image(made.path, made.receipt, root=root, reporter=Quiet())


def make_trainer_image(root: Root, machine_env: Path) -> ImageReport:
    """An image, in `root`, of an env of the trainer alone: the machine provides all else in `machine_env`.

    So it has few files, and a run in it is a real one.
    """
    whole = read_record(machine_env / ENV_RECEIPT, EnvReceipt, remedy="")
    interpreter = inspect_interpreter(SYSTEM_PYTHON)
    trainer = pack_trainer()
    package = InstalledPackage(
        name="envbuilder-trainer",
        version=next(one.version for one in whole.packages if one.name == "envbuilder-trainer"),
        wheel=trainer.filename,
        sha256=trainer.sha256,
        origin="tool",
    )
    provided = ProvidedPackages(
        python=str(machine_env / "bin/python"),
        site_packages=(str(site_packages(machine_env, interpreter.minor)),),
        versions={one.name: one.version for one in whole.packages if one.name != package.name},
    )
    receipt = whole.model_copy(update={"packages": (package,), "extensions": (), "provided": provided})
    with tempfile.TemporaryDirectory() as scratch:
        env, wheel = Path(scratch) / "env", Path(scratch) / trainer.filename
        wheel.write_bytes(trainer.content)
        make_venv(interpreter, env, provided)
        install_wheels(env, [WheelFile(package, wheel, len(trainer.content))], scratch=env, remedy="")
        return make_image(env, receipt, root=root, reporter=Quiet())

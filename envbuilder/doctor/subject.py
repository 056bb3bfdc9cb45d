"""What the checks look at: a recipe, what was made of it under ROOT, and this machine."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from envbuilder.gpu import Gpus, read_gpus
from envbuilder.interpreter import Interpreter, inspect_interpreter
from envbuilder.lock import SourceLock
from envbuilder.model import EnvReceipt, read_record
from envbuilder.paths import Root
from envbuilder.recipe import Recipe

RECEIPT = "envbuilder.json"


@dataclass(frozen=True)
class Subject:
    """Everything a check may look at. What is costly is found out once, by the first check that asks."""

    recipe: Recipe | None
    root: Root
    lock: SourceLock | None

    @property
    def recipe_file(self) -> str:
        """The recipe as remedies name it."""
        return f"recipes/{self.recipe.name}.toml" if self.recipe else "RECIPE"

    @property
    def env(self) -> Path | None:
        """The env's folder, where `install` has made one."""
        folder = self.root.env(self.recipe.name) if self.recipe else None
        return folder if folder is not None and folder.is_dir() else None

    @property
    def remake_env(self) -> str:
        """The command that makes the env anew: without the flag, one whose receipt is right is left alone."""
        return f"envbuilder install {self.recipe_file} --reinstall"

    @property
    def python(self) -> Path:
        """The env's interpreter; before there is one, the interpreter that runs this."""
        return self.env / "bin" / "python" if self.env else Path(sys.executable)

    @cached_property
    def interpreter(self) -> Interpreter:
        """`python`, looked into; MismatchError where it doesn't run."""
        return inspect_interpreter(self.python)

    @cached_property
    def receipt(self) -> EnvReceipt:
        """The env's receipt; IntegrityError where it is missing or damaged."""
        assert self.env is not None, "checks that read the receipt need an env"
        return read_record(self.env / RECEIPT, EnvReceipt, remedy=f"envbuilder install {self.recipe_file}")

    @property
    def site_packages(self) -> tuple[Path, ...]:
        """The env's own library folders, without those of provided packages."""
        return tuple(dict.fromkeys((self.interpreter.purelib, self.interpreter.platlib)))

    @property
    def import_path(self) -> tuple[Path, ...]:
        """Where the env's interpreter finds packages, in its order."""
        provided = self.receipt.provided.site_packages if self.env and self.receipt.provided else ()
        return (*self.site_packages, *map(Path, provided))

    @cached_property
    def gpus(self) -> Gpus:
        """The GPUs of this machine, as nvidia-smi tells."""
        return read_gpus()

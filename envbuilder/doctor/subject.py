"""What the checks look at: a recipe, what was made of it under ROOT, and this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from envbuilder.bundle import open_bundle
from envbuilder.doctor.inspecting import Inspection, inspect_config
from envbuilder.doctor.installed import Binary, read_binaries
from envbuilder.doctor.loading import loaded_with_torch
from envbuilder.doctor.once import once
from envbuilder.doctor.rank_run import NcclRun, run_nccl
from envbuilder.errors import EnvbuilderError, IntegrityError
from envbuilder.gpu import Gpus, GpuState, read_gpu_states, read_gpus
from envbuilder.interpreter import Interpreter, inspect_interpreter
from envbuilder.load_order import Loaded
from envbuilder.lock import LockedModel, SourceLock
from envbuilder.model import ENV_RECEIPT, Bundle, EnvReceipt, read_record
from envbuilder.modules import load_again
from envbuilder.paths import Root
from envbuilder.progress_file import own_job_id
from envbuilder.provided_models import locked_model
from envbuilder.recipe import Recipe
from envbuilder.site import Site


@dataclass(frozen=True)
class Subject:
    """Everything a check may look at. What is costly is found out once, by the first check that asks."""

    recipe: Recipe | None
    root: Root
    lock: SourceLock | None
    site: Site | None = None
    config: Path | None = None
    """A training config."""
    overrides: tuple[str, ...] = ()
    """Of its keys, `key.path=value`."""
    recipe_path: Path | None = None
    lock_path: Path | None = None
    """Where the recipe lies, and where its lock does or would."""
    image_at: Path | None = None
    """The folder that the env's image is mounted at or unpacked to, where the env is one."""

    @property
    def recipe_file(self) -> str:
        """The recipe as remedies name it."""
        return f"recipes/{self.recipe.name}.toml" if self.recipe else "RECIPE"

    @property
    def env(self) -> Path | None:
        """The env's folder, where `install` has made one."""
        folder = self.image_at or (self.root.env(self.recipe.name) if self.recipe else None)
        return folder if folder is not None and folder.is_dir() else None

    @property
    def env_absence(self) -> str:
        """Why there is no folder of the env to look into."""
        if self.recipe is not None and self.root.image_receipt(self.recipe.name).exists():
            config = f" --config {self.config}" if self.config else ""
            return f"The env is an image, into which this looks: envbuilder doctor {self.recipe_file}{config}"
        return f"Nothing is installed yet: envbuilder install {self.recipe_file}"

    @property
    def has_bundle(self) -> bool:
        """Whether `fetch` has made a folder for the bundle."""
        return self.recipe is not None and self.root.bundle(self.recipe.name).is_dir()

    @property
    def has_slurm(self) -> bool:
        """Whether Slurm's commands are on this machine."""
        return all(shutil.which(command) for command in ("sbatch", "squeue", "scontrol"))

    @property
    def remake_env(self) -> str:
        """The command that makes the env anew: without the flag, one whose receipt is right is left alone."""
        return f"envbuilder install {self.recipe_file} {'--image ' if self.image_at else ''}--reinstall"

    @property
    def rebuild(self) -> str:
        """The command that compiles all anew and installs it."""
        recipe = self.recipe_file
        return f"envbuilder compile {recipe} --local --rebuild && envbuilder install {recipe}"

    @property
    def python(self) -> Path:
        """The env's interpreter; before there is one, the interpreter that runs this."""
        return self.env / "bin" / "python" if self.env else Path(sys.executable)

    @once
    def interpreter(self) -> Interpreter:
        """`python`, looked into; MismatchError where it doesn't run."""
        return inspect_interpreter(self.python)

    @once
    def bundle(self) -> Bundle:
        """The bundle; a typed error where it is damaged or incomplete."""
        assert self.recipe is not None, "checks that read the bundle need a recipe"
        return open_bundle(self.root, self.recipe.name)

    @once
    def provided_models(self) -> Mapping[str, str]:
        """The models that the machine provides to the bundle: name → folder."""
        if self.has_bundle:
            with suppress(EnvbuilderError):  # what is wrong with the bundle, its own checks say
                return self.bundle.record.provided_models
        return {}

    def locked_model(self, folder: Path) -> LockedModel | None:
        """What the lock names of the model in `folder`; None where it knows none there."""
        return locked_model(folder, self.lock.models if self.lock else (), self.provided_models)

    @once
    def receipt(self) -> EnvReceipt:
        """The env's receipt; IntegrityError where it is missing or damaged."""
        assert self.env is not None, "checks that read the receipt need an env"
        return read_record(
            self.env / ENV_RECEIPT, EnvReceipt, remedy=f"envbuilder install {self.recipe_file}"
        )

    @once
    def variables(self) -> Mapping[str, str]:
        """What the env's processes are started with, as `train` does: this shell's variables, and what the
        modules that the env was compiled with had added."""
        with suppress(IntegrityError):  # a check of its own tells of a damaged receipt
            if self.env:
                provided = self.receipt.provided is not None
                return load_again(os.environ, self.receipt.modules, keep_cuda_libraries=provided)
        return os.environ

    @property
    def site_packages(self) -> tuple[Path, ...]:
        """The env's own library folders, without those of provided packages."""
        return tuple(dict.fromkeys((self.interpreter.purelib, self.interpreter.platlib)))

    @property
    def import_path(self) -> tuple[Path, ...]:
        """Where the env's interpreter finds packages, in its order."""
        provided = self.receipt.provided.site_packages if self.env and self.receipt.provided else ()
        return (*self.site_packages, *map(Path, provided))

    @property
    def is_in_job(self) -> bool:
        """Whether this is a job's node. Else it may be a login node."""
        return own_job_id() is not None

    @once
    def gpus(self) -> Gpus:
        """The GPUs of this machine, as nvidia-smi tells."""
        return read_gpus()

    @once
    def gpu_states(self) -> tuple[GpuState, ...]:
        """How the GPUs are; checks that put work on them ask first, or it would show as somebody's."""
        return read_gpu_states()

    @once
    def nccl(self) -> NcclRun:
        """One rank of NCCL on each GPU of this machine, run by the env's torch."""
        _ = self.gpu_states  # before there is work of our own on the GPUs
        return run_nccl(self.python, self.variables, remedy=self.remake_env)

    @property
    def processes(self) -> int:
        """How many will train: one a GPU, of the site's jobs or of this machine."""
        return max(1, self.site.train.gpus * self.site.train.nodes if self.site else len(self.gpus.devices))

    @once
    def config_files(self) -> Inspection:
        """The training config, the weight files and the lines of data; takes no torch."""
        return self._inspect("--files")

    @once
    def inspected(self) -> Inspection:
        """What the env's trainer finds out about the training config without training."""
        return self._inspect("--processes", str(self.processes))

    @property
    def extension_files(self) -> dict[str, Path]:
        """Extension module → its file, of those that were compiled for the env and are in it."""
        return {
            extension.module: folder / extension.file
            for folder in self.site_packages
            for extension in self.receipt.extensions
            if (folder / extension.file).is_file()
        }

    @once
    def loaded(self) -> tuple[Loaded, ...]:
        """What a process loads that imports torch and the compiled extension modules."""
        extensions = self.extension_files.values()
        return loaded_with_torch(self.python, self.import_path, extensions, self.variables)

    @once
    def binaries(self) -> tuple[Binary, ...]:
        """The shared objects of the env."""
        return read_binaries(self.site_packages)

    def _inspect(self, *options: str) -> Inspection:
        assert self.config is not None, "checks that inspect the config need one"
        renew = f"envbuilder fetch {self.recipe_file} && {self.remake_env}"
        settings = (word for override in self.overrides for word in ("--set", override))
        return inspect_config(
            self.python, self.config, *options, *settings, renew=renew, environ=self.variables
        )

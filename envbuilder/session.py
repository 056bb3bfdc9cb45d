"""The stages as the commands need them: finds a recipe's lock, bundle and interpreter, and runs the stage.

Between the cli and the stages: it knows which noun feeds which stage, and neither prints nor exits.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from envbuilder.atomic import write_atomically
from envbuilder.bundle import open_bundle
from envbuilder.compile import CompileReport, compile_recipe
from envbuilder.doctor import run_checks
from envbuilder.errors import MismatchError
from envbuilder.fetch import FetchReport, fetch_bundle
from envbuilder.index import open_client, open_indexes
from envbuilder.install import InstallReport, install_env
from envbuilder.interpreter import inspect_interpreter
from envbuilder.lock import SourceLock, check_current, lock_filename, read_lock, recipe_digest
from envbuilder.locking import make_lock
from envbuilder.model import Bundle, Finding
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.report import Reporter
from envbuilder.requirements import tool_requires, trainer_requires
from envbuilder.resolve import resolver_named


@dataclass(frozen=True, slots=True)
class Session:
    """One recipe under one ROOT."""

    root: Root
    reporter: Reporter
    recipe: Recipe
    recipe_path: Path
    lock_path: Path

    @classmethod
    def open(
        cls, root: Root, reporter: Reporter, recipe_path: Path, lockfiles: Path | None = None
    ) -> Session:
        """Reads the recipe; its lock lies in `lockfiles`, else in lockfiles/ beside the recipe's folder."""
        recipe = load_recipe(recipe_path)
        folder = lockfiles or recipe_path.absolute().parent.parent / "lockfiles"
        return cls(root, reporter, recipe, recipe_path.absolute(), folder / lock_filename(recipe.name))

    def make_lock(self, resolver: str = "uv") -> SourceLock:
        """Resolves the recipe and writes its lock."""
        with open_client() as client:
            text = make_lock(
                self.recipe,
                resolver=resolver_named(resolver),
                indexes=open_indexes(self._index_names, client),
                client=client,
                cache=self.root.cache,
                reporter=self.reporter,
            )
        self.lock_path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.lock_path, text)
        return read_lock(self.lock_path)

    def current_lock(self) -> SourceLock:
        """The recipe's lock as it stands; MismatchError if the recipe has moved on."""
        lock = read_lock(self.lock_path)
        self._check_current(lock)
        return lock

    def fetch(self, python: str | None = None, *, verify: bool = False) -> FetchReport:
        """The bundle for minor version `python` (default: the running one); without a lock, locks first."""
        lock = self.current_lock() if self.lock_path.exists() else self.make_lock()
        with open_client() as client:
            return fetch_bundle(
                self.recipe,
                lock,
                root=self.root,
                python=python or f"{sys.version_info.major}.{sys.version_info.minor}",
                indexes=open_indexes(self._index_names, client),
                client=client,
                reporter=self.reporter,
                verify=verify,
            )

    def bundle(self) -> Bundle:
        """The bundle; MismatchError if it is not of the recipe as it stands."""
        bundle = open_bundle(self.root, self.recipe.name)
        self._check_current(bundle.lock)
        if self.lock_path.exists() and read_lock(self.lock_path).digest != bundle.lock.digest:
            raise MismatchError(
                f"The bundle {self.recipe.name} is of another lock than {self.lock_path.name}.",
                remedy=f"On the login node: envbuilder fetch recipes/{self.recipe.name}.toml",
                context={"bundle": bundle.path, "lock": self.lock_path},
            )
        return bundle

    def interpreter(self, given: Path | None = None) -> Path:
        """The interpreter to build for: as given, else the provider's, else the one that runs envbuilder."""
        provider = self.recipe.provided.python if self.recipe.provided else sys.executable
        wanted = str(given or provider)
        found = shutil.which(wanted)
        if found is None:
            raise MismatchError(
                f"There is no interpreter {wanted} on this machine.",
                remedy="Load the module or activate the environment that has it, or give --python PATH.",
                context={"python": wanted},
            )
        # Absolute but not resolved: a venv's python is a link whose target has none of the venv's packages.
        return Path(found).absolute()

    def python_minor(self, given: Path | None = None) -> str:
        """Minor version of the interpreter to build for."""
        return inspect_interpreter(self.interpreter(given)).minor

    def compile(
        self, python: Path | None = None, *, require_isolation: bool = False, rebuild: bool = False
    ) -> CompileReport:
        """Builds the source packages into the wheelhouse."""
        interpreter = self.interpreter(python)
        return compile_recipe(
            self.recipe,
            self._bundle_for(interpreter),
            root=self.root,
            python=interpreter,
            reporter=self.reporter,
            require_isolation=require_isolation,
            rebuild=rebuild,
        )

    def install(self, python: Path | None = None, *, reinstall: bool = False) -> InstallReport:
        """Makes the env from bundle and wheelhouse."""
        interpreter = self.interpreter(python)
        return install_env(
            self.recipe,
            self._bundle_for(interpreter),
            root=self.root,
            python=interpreter,
            reporter=self.reporter,
            reinstall=reinstall,
        )

    def doctor(self, only: frozenset[str] = frozenset()) -> tuple[Finding, ...]:
        """Runs the checks on this recipe's bundle and env."""
        return run_checks(
            self.recipe, root=self.root, lock=self.bundle().lock, only=only, reporter=self.reporter
        )

    @property
    def _index_names(self) -> set[str]:
        return {"default", *self.recipe.index.values()}

    def _check_current(self, lock: SourceLock) -> None:
        check_current(lock, recipe_digest(self.recipe, trainer_requires(), tool_requires()))

    def _bundle_for(self, interpreter: Path) -> Bundle:
        bundle = self.bundle()
        minor = self.python_minor(interpreter)
        if minor != bundle.record.python:
            raise MismatchError(
                f"The bundle {bundle.record.recipe} is for Python {bundle.record.python}, not {minor}.",
                remedy=f"On the login node: envbuilder fetch {self.recipe_path} --python {minor}",
                context={"bundle": bundle.path, "interpreter": interpreter},
            )
        return bundle

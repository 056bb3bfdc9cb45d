"""The stages as the commands need them: finds a recipe's lock, bundle and interpreter, and runs the stage.

Between the cli and the stages: it knows which noun feeds which stage, and neither prints nor exits.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from envbuilder.atomic import write_atomically
from envbuilder.bundle import open_bundle
from envbuilder.errors import EnvbuilderError, InputError, MismatchError
from envbuilder.fetch import FetchReport, Origins, fetch_bundle
from envbuilder.index import open_client, open_indexes
from envbuilder.interpreter import find_interpreter, inspect_interpreter
from envbuilder.lock import SourceLock, check_current, lock_filename, read_lock
from envbuilder.machine import read_machine
from envbuilder.model import Bundle, Finding
from envbuilder.patches import locked_patches
from envbuilder.paths import Root
from envbuilder.recipe import Recipe, load_recipe
from envbuilder.report import Reporter
from envbuilder.requirements import current_digest
from envbuilder.target import python_versions, target_for

# A command imports the stage that it runs and no other: half of a second run's time is imports.
if TYPE_CHECKING:
    from envbuilder.compile.pipeline import CompileReport
    from envbuilder.compile.units.records import Estimate
    from envbuilder.doctor import Subject
    from envbuilder.fetch.export import Export
    from envbuilder.image.make import ImageReport
    from envbuilder.install import InstallReport
    from envbuilder.site import Site


@dataclass(frozen=True)
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

    def make_lock(
        self,
        resolver: str = "uv",
        *,
        kept: SourceLock | None = None,
        upgrade: frozenset[str] = frozenset(),
        target: Path | None = None,
    ) -> SourceLock:
        """Resolves the recipe and writes its lock.

        What `kept` (the lock so far, `older_lock`) holds stays where it still fits, but for the packages and
        models named in `upgrade`. `target` is the target.json of a probed machine.
        """
        from envbuilder.hub import open_hub
        from envbuilder.locking import make_lock
        from envbuilder.resolve import resolver_named

        with ExitStack() as stack:
            client = stack.enter_context(open_client())
            text = make_lock(
                self.recipe,
                folder=self.recipe_path.parent,
                machine=read_machine(target) if target else None,
                kept=kept,
                upgrade=upgrade,
                resolver=resolver_named(resolver),
                indexes=open_indexes(self._index_names, client),
                client=client,
                hub=stack.enter_context(open_hub()) if self.recipe.model else None,
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
        """The bundle for minor version `python`; without a lock, locks first.

        Without `python`, the running one, if the lock serves it, or the only one that it serves.
        """
        lock = self._lock_made()
        with ExitStack() as stack:
            return fetch_bundle(
                self.recipe,
                lock,
                root=self.root,
                python=python or _default_python(lock),
                origins=self._origins(lock, stack),
                reporter=self.reporter,
                verify=verify,
            )

    def export_urls(self, python: str | None, tool: str, out: Path | None, *, verify: bool = False) -> Export:
        """Lists for `tool` what the bundle still lacks; `python` and the lock as for `fetch`."""
        from envbuilder.fetch.export import export_urls

        lock = self._lock_made()
        with ExitStack() as stack:
            return export_urls(
                self.recipe,
                lock,
                root=self.root,
                python=python or _default_python(lock),
                origins=self._origins(lock, stack),
                tool=tool,
                out=out or Path(f"{self.recipe.name}.{tool}"),
                reporter=self.reporter,
                verify=verify,
            )

    def adopt(self, python: str | None, folder: Path, *, verify: bool = False) -> FetchReport:
        """The bundle, with what was brought to `folder`; no network is asked, so there must be a lock."""
        from envbuilder.fetch.adopt import adopt_files

        lock = self.current_lock()
        return adopt_files(
            self.recipe,
            lock,
            root=self.root,
            python=python or _default_python(lock),
            folder=folder,
            recipe_folder=self.recipe_path.parent,
            reporter=self.reporter,
            verify=verify,
        )

    def _lock_made(self) -> SourceLock:
        return self.current_lock() if self.lock_path.exists() else self.make_lock()

    def _origins(self, lock: SourceLock, stack: ExitStack) -> Origins:
        from envbuilder.hub import open_hub

        client = stack.enter_context(open_client())
        return Origins(
            indexes=open_indexes(self._index_names, client),
            client=client,
            hub=stack.enter_context(open_hub()) if lock.models else None,
            recipe_folder=self.recipe_path.parent,
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
        return find_interpreter(given or Path(provider))

    def python_minor(self, given: Path | None = None) -> str:
        """Minor version of the interpreter to build for."""
        return inspect_interpreter(self.interpreter(given)).minor

    def compile(
        self,
        python: Path | None = None,
        *,
        require_isolation: bool = False,
        rebuild: bool = False,
        prove: bool = False,
    ) -> CompileReport:
        """Builds the source packages into the wheelhouse."""
        from envbuilder.compile.pipeline import compile_recipe

        interpreter = self.interpreter(python)
        return compile_recipe(
            self.recipe,
            self._bundle_for(interpreter),
            root=self.root,
            python=interpreter,
            reporter=self.reporter,
            require_isolation=require_isolation,
            rebuild=rebuild,
            prove=prove,
        )

    def estimated_work(self, cpus: int) -> Estimate | None:
        """What compiling will take on so many CPUs, where that is known from earlier builds."""
        from envbuilder.compile.estimate import estimated_work

        bundle = self.bundle()
        target = target_for(bundle.lock.target, bundle.record.python)
        sdists = {file.package for file in bundle.lock.select(target, ("runtime",)) if file.is_sdist}
        return estimated_work(self.root, sorted(sdists), cpus=cpus)

    def install(self, python: Path | None = None, *, reinstall: bool = False) -> InstallReport:
        """Makes the env from bundle and wheelhouse."""
        from envbuilder.install import install_env

        interpreter = self.interpreter(python)
        return install_env(
            self.recipe,
            self._bundle_for(interpreter),
            root=self.root,
            python=interpreter,
            reporter=self.reporter,
            reinstall=reinstall,
        )

    def install_image(self, python: Path | None = None, *, reinstall: bool = False) -> ImageReport:
        """Makes the env from bundle and wheelhouse as one file; as a folder it is in scratch meanwhile.

        An image that is there and would be the same is left alone, unless `reinstall`.
        """
        from envbuilder.image.make import ImageReport, find_mksquashfs, find_same, make_image
        from envbuilder.install import install_env, plan_env

        interpreter = self.interpreter(python)
        bundle = self._bundle_for(interpreter)
        plan = plan_env(self.recipe, bundle, root=self.root, python=interpreter)
        if not reinstall and (same := find_same(self.root, plan.receipt)):
            return ImageReport(same, seconds=0.0, made=False)
        find_mksquashfs()  # Or it would be missed after minutes.
        with TemporaryDirectory(prefix="envbuilder-image-") as scratch:
            made = install_env(
                self.recipe,
                bundle,
                root=self.root,
                python=interpreter,
                reporter=self.reporter,
                folder=Path(scratch) / "env",
            )
            return make_image(made.path, made.receipt, root=self.root, reporter=self.reporter)

    def definition(self, base: str) -> str:
        """The text of a definition file for a SIF, made from the image `base`."""
        from envbuilder.image.definition import Base, definition
        from envbuilder.wheelhouse import all_built

        bundle = self.bundle()
        target = target_for(bundle.lock.target, bundle.record.python)
        files = bundle.lock.select(target, ("runtime",))
        compiled = {file.package for file in files if file.is_sdist}
        wheels = [wheel for wheel in all_built(self.root) if wheel.receipt.package in compiled]
        # Extension modules find torch's libraries only once torch is there.
        first = ["torch"] if any(file.package == "torch" for file in files) else []
        first += ["trainer"] if bundle.record.trainer_wheel else []
        built = [module for package in self.recipe.build.values() for module in package.modules]
        return definition(bundle, wheels, Base.read(base), [*first, *built])

    def known_lock(self) -> SourceLock | None:
        """The lock of the bundle, else the recipe's; None where neither can be read: doctor says why."""
        with suppress(EnvbuilderError):
            return open_bundle(self.root, self.recipe.name).lock
        with suppress(EnvbuilderError):
            return read_lock(self.lock_path)
        return None

    def subject(
        self,
        *,
        site: Site | None = None,
        config: Path | None = None,
        overrides: tuple[str, ...] = (),
        image_at: Path | None = None,
    ) -> Subject:
        """What doctor's checks look at: this recipe, and what was made of it."""
        from envbuilder.doctor import Subject

        return Subject(
            self.recipe,
            self.root,
            self.known_lock(),
            site=site,
            config=config,
            overrides=overrides,
            recipe_path=self.recipe_path,
            lock_path=self.lock_path,
            image_at=image_at,
        )

    def doctor(self) -> tuple[Finding, ...]:
        """Runs all of doctor's checks that need not be asked for."""
        from envbuilder.doctor import run_checks

        return run_checks(self.subject(), self.reporter)

    @property
    def _index_names(self) -> set[str]:
        return {"default", *self.recipe.index.values()}

    def _check_current(self, lock: SourceLock) -> None:
        patches = locked_patches(self.recipe, self.recipe_path.parent)
        check_current(lock, current_digest(self.recipe, patches))

    def older_lock(self) -> SourceLock | None:
        """The lock that is there; None where it can't be read, as one of an older envbuilder."""
        if not self.lock_path.exists():
            return None
        try:
            return read_lock(self.lock_path)
        except InputError as error:
            self.reporter.warn(f"{error.message} All versions are chosen afresh.")
            return None

    def _bundle_for(self, interpreter: Path) -> Bundle:
        bundle = self.bundle()
        minor = self.python_minor(interpreter)
        if minor != bundle.record.python:
            raise MismatchError(
                f"The bundle {bundle.record.recipe} is for Python {bundle.record.python}, not {minor}.",
                remedy=f'Add --python "$(command -v python{bundle.record.python})" to the command, or on the '
                f"login node: envbuilder fetch {self.recipe_path} --python {minor}",
                context={"bundle": bundle.path, "interpreter": interpreter},
            )
        return bundle


def _default_python(lock: SourceLock) -> str:
    running = f"{sys.version_info.major}.{sys.version_info.minor}"
    served = python_versions(lock.target)
    return served[0] if len(served) == 1 else running

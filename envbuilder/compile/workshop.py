"""Builds several source packages at once, under one broker, and says how far it is."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path
from typing import Any

from envbuilder import __version__
from envbuilder.atomic import write_atomically
from envbuilder.bundle import bundle_file, copy_verified, hash_file, path_in
from envbuilder.compile.build import Expected, build_wheel, check_wheel
from envbuilder.compile.buildenv import BuildRoom, BuildTools, compiler_identities, make_room
from envbuilder.compile.key import BuildInputs
from envbuilder.compile.stopping import stopped_by_signals
from envbuilder.compile.timeline import TimelineUnit, render_timeline
from envbuilder.compile.units.broker import Broker
from envbuilder.compile.units.jobs import machine_limits
from envbuilder.compile.units.object_cache import ObjectCache, list_names
from envbuilder.compile.units.records import Records
from envbuilder.compile.units.scope import Ledger, Scope
from envbuilder.compile.units.service import CompileService
from envbuilder.compile.units.unit_compiler import UnitCompiler
from envbuilder.compile.unpack import unpack_sdist
from envbuilder.compile.wheels.provenance import SBOM_NAME, BuildStory, provenance_statement, wheel_sbom
from envbuilder.compile.wheels.wheel_rewrite import rewrite_wheel
from envbuilder.errors import BuildError, StoppedError
from envbuilder.lock import LockedFile, LockedPatch
from envbuilder.model import BuildReceipt, BuiltWheel, Bundle
from envbuilder.patches import apply_patches
from envbuilder.paths import Root
from envbuilder.process import Cancel
from envbuilder.progress_file import ProgressFile, job_progress
from envbuilder.recipe import SourceBuild
from envbuilder.report import Reporter
from envbuilder.sandbox import Sandbox
from envbuilder.sandbox_root import BUILD
from envbuilder.wheelhouse import store_built

_TICK_S = 1.0
"""Between two looks at how far the work is."""
_FOR_UNITS = 0.9
"""Share of the memory that compilers get: this process and the linkers take some too."""


@dataclass(frozen=True)
class Options:
    """How to build."""

    rebuild: bool
    """Take nothing from the object cache."""
    prove: bool


@dataclass(frozen=True)
class Order:
    """One package to build."""

    sdist: LockedFile
    build: SourceBuild
    inputs: BuildInputs
    files: tuple[LockedFile, ...]
    """Of the build group, what shapes its machine code."""


class Workshop:
    """Builds the packages of one bundle."""

    def __init__(
        self,
        bundle: Bundle,
        tools: BuildTools,
        *,
        root: Root,
        sandbox: Sandbox,
        folder: Path,
        stem: str,
        options: Options,
        reporter: Reporter,
    ) -> None:
        """`folder` gets a room for each package, `stem` begins the names of the logs."""
        self._bundle = bundle
        self._tools = tools
        self._root = root
        self._sandbox = sandbox
        self._folder = folder
        self._stem = stem
        self._options = options
        self._reporter = reporter
        limits = machine_limits()
        self._broker = Broker(cpus=limits.cpus, memory=int(limits.memory * _FOR_UNITS))
        self._records = Records.open(root.cache / "records")
        self._cache = ObjectCache(root.cache / "objects" / str(os.getuid()), note=reporter.note)
        self._identities = compiler_identities(tools)
        self._ledgers: dict[str, Ledger] = {}
        self._cancel = Cancel()
        self._stopped: str | None = None
        self._began = time.monotonic()

    def build(self, orders: Sequence[Order]) -> dict[LockedFile, BuiltWheel]:
        """Builds all of `orders` at once; one that fails does not keep the others from being finished.

        Raises what the first failure raised, or StoppedError where a signal ended it.
        """
        names = ", ".join(f"{order.sdist.package} {order.sdist.version}" for order in orders)
        self._reporter.stage(f"building {names}")
        built: dict[LockedFile, BuiltWheel] = {}
        failure: BaseException | None = None
        with (
            stopped_by_signals(self._stop, self._cancel.now),
            self._told(names),
            ThreadPoolExecutor(len(orders) + 1) as pool,
        ):
            for order in orders:
                self._broker.expect(order.sdist.package)
            building = {pool.submit(self._one, order): order for order in orders}
            trial = pool.submit(self._tools.trial)
            try:
                under_way: list[Future[Any]] = [trial, *building]
                for future in as_completed(under_way):
                    error = future.exception()
                    if future is trial and error is not None:
                        failure = error  # says more than what becomes of the builds then
                        self._broker.stop("the CUDA compiler doesn't work")
                        self._cancel.now()
                    elif error is not None:
                        failure = failure or error
                for wheel, order in building.items():
                    if wheel.exception() is None:
                        built[order.sdist] = wheel.result()
            except BaseException:  # Ctrl-C
                self._broker.stop("interrupted")
                self._cancel.now()
                raise
        self._cache.close()
        if self._stopped is not None and failure is not None:
            raise self._stopped_error(len(orders) - len(built)) from failure
        if failure is not None:
            raise failure
        return built

    def write_timeline(self) -> Path | None:
        """The page that shows when each unit was compiled, beside the logs."""
        units = [
            TimelineUnit(
                name=f"{unit.source} {unit.shard}".strip(),
                package=package,
                begin_s=unit.began,
                end_s=unit.began + unit.seconds,
                memory=unit.peak_rss_bytes,
                threads=unit.threads,
                cached=unit.cached,
            )
            for package, ledger in self._ledgers.items()
            for unit in ledger.units
        ]
        if not units:
            return None
        path = self._root.logs / f"{self._stem}.timeline.html"
        title = f"{self._bundle.record.recipe}, {datetime.now(timezone.utc):%Y-%m-%d}, {platform.node()}"
        write_atomically(path, render_timeline(units, cpus=self._broker.cpus, title=title))
        return path

    def _one(self, order: Order) -> BuiltWheel:
        try:
            return self._build(order)
        finally:
            # What a failed build has left in the queue is not compiled for nobody.
            self._broker.stop("its build has ended", package=order.sdist.package)

    def _build(self, order: Order) -> BuiltWheel:
        began, started_at = time.monotonic(), _now()
        sdist, build = order.sdist, order.build
        room = make_room(self._tools, self._folder / sdist.package, self._sandbox)
        log = self._root.logs / f"{self._stem}-{sdist.package}.log"
        archive = room.folder / sdist.filename
        copy_verified(bundle_file(self._bundle, sdist), sdist.sha256, sdist.size, archive)
        source = unpack_sdist(archive, room.folder / "source")
        patches = self._bundle.lock.patches_of(sdist.package)
        apply_patches(source, self._read(patches, room.folder))
        scope = self._scope(order, room, source)
        compiler = UnitCompiler(
            scope,
            broker=self._broker,
            records=self._records,
            cache=self._cache,
            reuse=not self._options.rebuild,
            clock=lambda: time.monotonic() - self._began,
        )
        self._ledgers[sdist.package] = compiler.ledger
        with CompileService(room.socket, scope, compiler, log):
            wheel = build_wheel(source, sdist, room=room, variables=build.env, log=log, cancel=self._cancel)
        self._check_proofs(order, compiler.ledger, log)
        extensions = check_wheel(
            wheel, sdist, self._expected(order), folder=room.folder / "look", log=log, reporter=self._reporter
        )
        (room.folder / "out").mkdir()
        wheel = rewrite_wheel(
            wheel,
            room.folder / "out",
            build_tag=order.inputs.build_tag,
            sboms={SBOM_NAME: self._sbom(order, patches)},
        )
        units = tuple(sorted(compiler.ledger.units, key=lambda unit: (unit.began, unit.source, unit.shard)))
        receipt = BuildReceipt(
            package=sdist.package,
            version=sdist.version,
            sdist=sdist.filename,
            sdist_sha256=sdist.sha256,
            patches={patch.path: patch.sha256 for patch in patches},
            key=order.inputs.key,
            wheel=wheel.name,
            wheel_sha256=hash_file(wheel),
            python=self._tools.interpreter.version,
            torch=self._tools.torch.version if self._tools.torch else None,
            torch_cuda=self._tools.torch.cuda if self._tools.torch else None,
            cxx11_abi=self._tools.torch.cxx11_abi if self._tools.torch else None,
            nvcc=self._tools.toolkit.version if self._tools.toolkit else None,
            host_compiler=order.inputs.host_compiler,
            compute_capabilities=order.inputs.compute_capabilities,
            architectures_kept=_names(unit.architectures_kept for unit in units),
            architectures_dropped=_names(unit.architectures_dropped for unit in units),
            extensions=extensions,
            isolation=room.sandbox.isolation,
            node=platform.node(),
            differs=self._differs(room),
            compiled_whole=dict(sorted(compiler.ledger.whole.items())),
            environment={**room.recorded, **build.env},
            modules=self._tools.modules,
            units=units,
            seconds=round(time.monotonic() - began, 3),
            built_at=_now(),
        )
        story = BuildStory(
            recipe=self._bundle.record.recipe,
            lock_sha256=self._bundle.record.lock_sha256,
            build_files=order.files,
            tool_version=__version__,
            started_at=started_at,
        )
        return store_built(self._root, wheel, receipt, provenance=provenance_statement(receipt, story))

    def _scope(self, order: Order, room: BuildRoom, source: Path) -> Scope:
        private, build = str(room.folder), str(room.sandbox.inside(room.folder))
        venv, venv_inside = str(self._tools.venv), str(room.sandbox.inside(self._tools.venv))

        @cache
        def fixed(text: str) -> str:
            # As a sealed build has it, wherever this one really is.
            for real in (private, build):
                text = text.replace(real, BUILD)
            return text.replace(venv_inside, f"{BUILD}/venv").replace(venv, f"{BUILD}/venv")

        @cache  # each unit asks for the same thousands of headers
        def outside(path: str) -> Path:
            if build != BUILD and path.startswith(f"{BUILD}/venv/"):
                return self._tools.venv / path.removeprefix(f"{BUILD}/venv/")
            if build != BUILD and path.startswith(f"{BUILD}/"):
                return room.folder / path.removeprefix(f"{BUILD}/")
            return room.sandbox.outside(path)

        numbers = self._tools.numbers
        return Scope(
            package=order.sdist.package,
            tree=str(room.sandbox.inside(source)),
            wanted=numbers,
            ptx=max(numbers, key=lambda number: int(number.rstrip("af"))) if self._tools.ptx else None,
            sharding=order.build.shards,
            prove=self._options.prove,
            compilers=self._identities,
            linker=self._tools.linker,
            steady_names=self._tools.toolkit is not None and self._tools.toolkit.steady_names,
            listing=list_names(source),
            outside=outside,
            fixed=fixed,
        )

    def _expected(self, order: Order) -> Expected:
        return Expected(
            modules=order.build.modules,
            capabilities=order.inputs.compute_capabilities if order.build.gpu else (),
            ptx=self._tools.ptx,
            libraries=self._tools.libraries,
            interpreter=self._tools.interpreter.path,
            glibc=self._bundle.lock.target.glibc,
        )

    def _sbom(self, order: Order, patches: Sequence[LockedPatch]) -> bytes:
        return wheel_sbom(
            order.sdist,
            patches={patch.path: patch.sha256 for patch in patches},
            build_files=order.files,
            python=self._tools.interpreter.version,
            host_compiler=order.inputs.host_compiler,
            nvcc=self._tools.toolkit.version if self._tools.toolkit else None,
            torch=self._tools.torch,
            compute_capabilities=order.inputs.compute_capabilities,
        )

    def _differs(self, room: BuildRoom) -> tuple[str, ...]:
        if room.sandbox.isolation == "sealed":
            return ()
        return ("paths of the build's folder, which this machine can't keep the same for every build",)

    def _check_proofs(self, order: Order, ledger: Ledger, log: Path) -> None:
        for source, proof in sorted(ledger.proofs.items()):
            if proof.same:
                self._reporter.note(f"{source}: {proof.kernels} kernels are the same in shards and whole")
                continue
            raise BuildError(
                f"Compiled in shards, {source} of {order.sdist.package} is not what it is whole.",
                remedy=f'Write shards = "never" into [build.{order.sdist.package}] of the recipe.',
                context={"log": log, "different": ", ".join((*proof.different, *proof.missing)[:5])},
            )

    def _read(self, patches: Sequence[LockedPatch], folder: Path) -> dict[str, bytes]:
        """The bytes of `patches`, each verified as it is read."""
        recipe = self._bundle.record.recipe
        contents = {}
        for patch in patches:
            source = path_in(self._bundle.path, patch.path, recipe=recipe)
            copy = folder / "patch"
            again = f"envbuilder fetch recipes/{recipe}.toml --verify"
            copy_verified(source, patch.sha256, patch.size, copy, remedy=again)
            contents[patch.path] = copy.read_bytes()
            copy.unlink()
        return contents

    def _stop(self, reason: str) -> None:
        self._stopped = self._stopped or reason
        self._broker.stop(reason)

    def _stopped_error(self, packages: int) -> StoppedError:
        left = self._broker.snapshot()
        count = len(left.waiting)
        return StoppedError(
            f"Stopped, for {self._stopped}: {packages} packages are not ready, {count} units are left, "
            f"about {max(1, round(left.seconds_left / 60))} min of work here.",
            remedy="Run the command again: it goes on from there.",
            context={"left": ", ".join(unit.unit.source for unit in left.waiting[:10])},
        )

    @contextmanager
    def _told(self, stage: str) -> Iterator[None]:
        """Says how far the work is until the block ends: to the reporter, and to a job's progress file."""
        ended = threading.Event()
        file = job_progress(self._root)

        def tell() -> None:
            while not ended.wait(_TICK_S):
                self._tell(stage, file)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self._tell(stage, file)

    def _tell(self, stage: str, file: ProgressFile | None) -> None:
        now = self._broker.snapshot()
        cached = sum(unit.cached for ledger in list(self._ledgers.values()) for unit in list(ledger.units))
        done = cached + sum(unit.outcome is not None and unit.outcome.returncode == 0 for unit in now.done)
        total = done + len(now.running) + len(now.waiting)
        if total:
            self._reporter.progress("compiling", done, total, "units")
        if file is not None:
            file.write(
                done=done,
                total=total,
                running=[unit.unit.source for unit in now.running],
                seconds_left=now.seconds_left,
                stage=f"building {stage}",
            )


def _names(groups: Iterator[tuple[str, ...]] | Mapping[str, str]) -> tuple[str, ...]:
    return tuple(sorted({name for names in groups for name in names}))


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")

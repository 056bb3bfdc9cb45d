"""Compiles one translation unit through its driver: from the cache, in shards, or whole.

What a shard is and when it is safe, `shards` decides; when a compiler may start, the broker; what can be
taken from an earlier build, the cache. Here they come together.
"""

from __future__ import annotations

import hashlib
import posixpath
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict, TypeAdapter

from envbuilder.compile.shards.objects import check_shards, join_command
from envbuilder.compile.shards.plan import ShardPlan, Whole, plan_shards
from envbuilder.compile.shards.prove import compare_kernels
from envbuilder.compile.units.broker import Broker, Outcome, Verdict
from envbuilder.compile.units.command_line import Unit
from envbuilder.compile.units.driver_call import DriverCall, DriverError, Ran
from envbuilder.compile.units.object_cache import CacheRequest, DepfileError, ObjectCache, parse_depfile
from envbuilder.compile.units.records import Estimate, Records, UnitId, steady_seconds, weight_of
from envbuilder.compile.units.scope import Ledger, Scope
from envbuilder.model import UnitTiming

SHARD_SECONDS = 30.0
"""A unit is cut into shards of about this length: each costs some seconds of reading headers again."""
_WORTH_CUTTING = 90.0
"""Seconds. A shorter unit is seldom what a build waits for."""

_STEADY_NAMES = "--objdir-as-tempdir"
"""Else the object names an intermediate file, and so the process that nvcc had: no two would be equal."""

_KEPT = TypeAdapter(
    tuple[tuple[str, ...], bytes, bytes], config=ConfigDict(ser_json_bytes="base64", val_json_bytes="base64")
)
"""What is cached beside an object: its headers, and what the compiler printed."""


@dataclass(frozen=True)
class _Piece:
    """A unit or a shard of it, as it is compiled."""

    id: UnitId
    source: str
    text: bytes
    output: str
    estimate: Estimate

    @property
    def depfile(self) -> str:
        return f"{self.output}.envbuilder.d"


@dataclass(frozen=True)
class _Made:
    """What came of a piece."""

    status: int
    content: bytes = b""
    """The object file's; empty where it was compiled in place."""
    headers: tuple[str, ...] = ()
    """Every file that was read, the source included, as the build sees them."""
    stdout: bytes = b""
    stderr: bytes = b""


class UnitCompiler:
    """Compiles the units of one build."""

    def __init__(
        self,
        scope: Scope,
        *,
        broker: Broker,
        records: Records,
        cache: ObjectCache,
        reuse: bool,
        clock: Callable[[], float],
    ) -> None:
        """`clock` gives the seconds since all builds began; with `reuse`, objects are taken from `cache`."""
        self.ledger = Ledger()
        self._scope = scope
        self._broker = broker
        self._records = records
        self._cache = cache
        self._reuse = reuse
        self._clock = clock

    def compile(self, call: DriverCall, unit: Unit) -> int:
        """Makes `unit`'s object file and dependency file; the exit status.

        StoppedError where no more compilers may start, DriverError where the build is gone.
        """
        source = call.absolute(unit.source)
        text = call.read(source)
        plan = self._plan(call, unit, source, text)
        if isinstance(plan, ShardPlan):
            status = self._compile_shards(call, unit, source, plan)
            if status is not None:
                return status
        piece = self._piece(call, unit, source, text, unit.output)
        made = self._make(call, unit, piece)
        self._show(call, [made])
        if made.status == 0:
            if made.content:
                call.write(unit.output, made.content)
            self._write_depfile(call, unit, made.headers)
        return made.status

    def _plan(self, call: DriverCall, unit: Unit, source: str, text: bytes) -> ShardPlan | Whole | None:
        """None where there is nothing to cut: no CUDA, or a unit that is short anyway."""
        scope = self._scope
        if not unit.cuda or scope.sharding == "never" or text.count(b"template") < 2:
            return None
        named = self._id(call, unit, source)
        seconds = steady_seconds(named, len(text), text.count(b"template"))
        most = int(seconds / SHARD_SECONDS)
        if seconds < _WORTH_CUTTING and scope.sharding != "force":
            return None
        if option := unit.hinders_shards(call.env):
            self._compiled_whole(source, f"it is compiled with {option}")
            return None
        plan = plan_shards(
            Path(source),
            read=lambda path: self._read_outside(str(path)),
            include_folders=[Path(call.absolute(folder)) for folder in unit.includes],
            own=lambda path: path.is_relative_to(scope.tree),
            defines=unit.defines,
            most=max(2, most),
            weight=lambda instantiation: weight_of(named, instantiation),
            force=scope.sharding == "force",
        )
        if isinstance(plan, Whole) and "one instantiation" not in plan.reason:
            where = f"{posixpath.basename(plan.file)}, line {plan.line}"
            self._compiled_whole(source, f"{plan.reason} ({where})")
        return plan

    def _compile_shards(self, call: DriverCall, unit: Unit, source: str, plan: ShardPlan) -> int | None:
        """The exit status, or None where the objects show that the unit must be compiled whole."""
        stem = posixpath.splitext(source)[0]
        named = self._id(call, unit, source)
        weights = [sum(weight_of(named, each) for each in some) for some in plan.instantiations]
        pieces = []
        for number, (shard, instantiations) in enumerate(zip(plan.texts, plan.instantiations)):
            pieces.append(
                self._piece(
                    call,
                    unit,
                    f"{stem}.shard{number:02}.cu",
                    shard.encode(),
                    f"{unit.output}.shard{number:02}.o",
                    whole=source,
                    instantiations=instantiations,
                    share=weights[number] / sum(weights),
                )
            )
        temporary = [path for piece in pieces for path in (piece.source, piece.output, piece.depfile)]
        try:
            for piece in pieces:
                call.write(piece.source, piece.text)
            with ThreadPoolExecutor(len(pieces)) as pool:
                made = list(pool.map(lambda piece: self._make(call, unit, piece), pieces))
            self._show(call, made)
            if failed := next((one for one in made if one.status != 0), None):
                return failed.status
            for piece, one in zip(pieces, made):
                if one.content:
                    call.write(piece.output, one.content)
            objects = [one.content or call.read(piece.output) for piece, one in zip(pieces, made)]
            if reason := _objects_differ(objects):
                self._compiled_whole(source, reason)
                return None
            joined = call.run(self._joining(call, [piece.output for piece in pieces], unit.output))
            if joined.status != 0:
                call.show("stderr", joined.stderr)
                return None
            if self._scope.prove:
                self._prove(call, unit, source, pieces)
            names = {piece.source for piece in pieces}
            headers = dict.fromkeys(name for one in made for name in one.headers if name not in names)
            self._write_depfile(call, unit, (source, *headers))
            return 0
        finally:
            call.remove(temporary)

    def _piece(
        self,
        call: DriverCall,
        unit: Unit,
        source: str,
        text: bytes,
        output: str,
        *,
        whole: str | None = None,
        instantiations: Sequence[str] = (),
        share: float = 1.0,
    ) -> _Piece:
        named = self._id(call, unit, whole or source, instantiations)
        estimate = self._records.estimate(named, len(text), share=share)
        return _Piece(named, source, text, output, estimate)

    def _make(self, call: DriverCall, unit: Unit, piece: _Piece) -> _Made:
        request = CacheRequest(
            package=self._scope.package,
            compiler=self._scope.compilers[call.tool][1],
            arguments=tuple(self._scope.fixed(word) for word in (*unit.arguments, call.cwd)),
            source_text_sha256=hashlib.sha256(piece.text).hexdigest(),
            source_name=self._scope.fixed(call.absolute(piece.source)),
            environment=tuple(sorted((name, self._scope.fixed(value)) for name, value in call.env.items())),
            listing=self._scope.listing,
        )
        began = self._clock()
        if self._reuse and (cached := self._cache.look_up(request, self._scope.outside)):
            self._record(unit, piece, began=began, cached=True)
            headers, stdout, stderr = _KEPT.validate_json(str(cached.extra["made"]))
            return _Made(0, cached.content, headers, stdout, stderr)
        source = unit.source if call.absolute(unit.source) == piece.source else piece.source
        while True:
            with self._broker.slot(piece.id, piece.estimate, splittable=call.tool == "nvcc") as slot:
                began, began_ns = self._clock(), time.time_ns()
                # The same machine code, from several threads: see benchmarks/RESULTS.md.
                more = [f"--split-compile={slot.threads}"] if slot.threads > 1 else []
                more += [_STEADY_NAMES] if call.tool == "nvcc" and self._scope.steady_names else []
                command = unit.command(
                    call.real, source=source, output=piece.output, depfile=piece.depfile, more=more
                )
                ran = call.run(command)
                slot.finish(Outcome(ran.cpu_seconds, ran.peak_rss_bytes, ran.status))
                again = ran.ran_out_of_memory and self._broker.out_of_memory(slot) is Verdict.AGAIN
                threads = slot.threads
            if not again:
                break
        if ran.status != 0:
            return _Made(ran.status, stdout=ran.stdout, stderr=ran.stderr)
        self._record(unit, piece, began=began, ran=ran, threads=threads, command=command)
        try:
            named = parse_depfile(call.read(piece.depfile).decode())
        except (DepfileError, UnicodeDecodeError):
            # What was read isn't known, so it can't be told when the object is out of date.
            return _Made(0, stdout=ran.stdout, stderr=ran.stderr)
        headers = tuple(call.absolute(name) for name in named)
        call.remove([piece.depfile])
        made = _Made(0, b"", headers, ran.stdout, ran.stderr)
        self._cache.store(
            request,
            {self._scope.fixed(name): self._scope.outside(name) for name in headers if name != piece.source},
            call.read(piece.output),
            extra={"made": _KEPT.dump_json((made.headers, made.stdout, made.stderr)).decode()},
            began_ns=began_ns,
        )
        return made

    def _prove(self, call: DriverCall, unit: Unit, source: str, pieces: Sequence[_Piece]) -> None:
        """Compiles `unit` whole and in shards, both without compression, and compares their kernels."""
        objects = [f"{piece.output}.plain.o" for piece in pieces]
        whole, joined = f"{unit.output}.whole.o", f"{unit.output}.joined.o"
        named = self._id(call, unit, source)
        estimates = [piece.estimate for piece in pieces]

        def compile_plain(text: str, output: str, estimate: Estimate) -> None:
            more = ["-no-compress"]
            command = unit.command(call.real, source=text, output=output, depfile=f"{output}.d", more=more)
            with self._broker.slot(named, estimate) as slot:
                ran = call.run(command)
                slot.finish(Outcome(ran.cpu_seconds, ran.peak_rss_bytes, ran.status))
            if ran.status != 0:
                raise DriverError(f"the proof of {source} can't be compiled: {ran.stderr.decode()[-500:]}")

        try:
            texts = [*(piece.source for piece in pieces), source]
            estimates.append(self._records.estimate(named, len(call.read(source))))
            with ThreadPoolExecutor(len(texts)) as pool:
                list(pool.map(compile_plain, texts, [*objects, whole], estimates))
            call.run(self._joining(call, objects, joined))
            with tempfile.TemporaryDirectory() as folder:
                one, other = Path(folder, "whole.o"), Path(folder, "joined.o")
                one.write_bytes(call.read(whole))
                other.write_bytes(call.read(joined))
                proof = compare_kernels(one, other)
            with self.ledger.lock:
                self.ledger.proofs[self._named(source)] = proof
        finally:
            made = [*objects, whole]
            call.remove([*made, joined, *(f"{path}.d" for path in made)])

    def _joining(self, call: DriverCall, objects: Sequence[str], output: str) -> list[str]:
        paths = [Path(call.absolute(path)) for path in objects]
        return join_command(self._scope.linker, paths, Path(call.absolute(output)))

    def _id(self, call: DriverCall, unit: Unit, source: str, instantiations: Sequence[str] = ()) -> UnitId:
        return UnitId(
            package=self._scope.package,
            source=self._named(source),
            shard="; ".join(instantiations),
            architectures=unit.kept,
            compiler=self._scope.compilers[call.tool][0],
        )

    def _named(self, source: str) -> str:
        """`source` as seen from the source tree."""
        return source.removeprefix(f"{self._scope.tree}/")

    def _compiled_whole(self, source: str, reason: str) -> None:
        with self.ledger.lock:
            self.ledger.whole[self._named(source)] = reason

    def _record(
        self,
        unit: Unit,
        piece: _Piece,
        *,
        began: float,
        ran: Ran | None = None,
        threads: int = 1,
        command: Sequence[str] = (),
        cached: bool = False,
    ) -> None:
        timing = UnitTiming(
            source=piece.id.source,
            shard=piece.id.shard,
            compiler=piece.id.compiler,
            began=round(began, 3),
            seconds=round(ran.seconds if ran else self._clock() - began, 3),
            cpu_seconds=round(ran.cpu_seconds if ran else 0.0, 3),
            peak_rss_bytes=ran.peak_rss_bytes if ran else 0,
            threads=threads,
            cached=cached,
            architectures_kept=unit.kept,
            architectures_dropped=unit.dropped,
            command=tuple(self._scope.fixed(word) for word in command),
        )
        with self.ledger.lock:
            self.ledger.units.append(timing)
        if ran is not None:
            self._records.add(piece.id, ran.seconds, ran.cpu_seconds, ran.peak_rss_bytes, threads=threads)

    def _show(self, call: DriverCall, made: Iterable[_Made]) -> None:
        """What the compilers printed; a line that several shards printed, once."""
        seen: set[bytes] = set()
        for one in made:
            for stream, content in (("stdout", one.stdout), ("stderr", one.stderr)):
                lines = [line for line in content.splitlines(keepends=True) if line not in seen]
                seen.update(lines if one.stdout or one.stderr else ())
                call.show("stdout" if stream == "stdout" else "stderr", b"".join(lines))

    def _write_depfile(self, call: DriverCall, unit: Unit, headers: Sequence[str]) -> None:
        if unit.depfile is not None:
            names = " \\\n ".join(_escaped(name) for name in headers)
            call.write(unit.depfile, f"{_escaped(unit.deptarget or unit.output)}: {names}\n".encode())

    def _read_outside(self, path: str) -> str | None:
        try:
            return self._scope.outside(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError):
            return None


def _objects_differ(objects: Sequence[bytes]) -> str | None:
    """Why joined shards would not be the whole unit; see `check_shards`."""
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder, f"{number}.o") for number in range(len(objects))]
        for path, content in zip(paths, objects):
            path.write_bytes(content)
        return check_shards(paths)


def _escaped(name: str) -> str:
    """As make reads it."""
    return name.replace("$", "$$").replace("#", "\\#").replace(" ", "\\ ")

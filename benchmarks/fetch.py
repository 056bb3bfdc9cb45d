"""`envbuilder fetch` beside pip, uv and hf: the same files, from the same server on loopback, turn by turn.

    python -m benchmarks.fetch index     76 wheels, 2 GB: pip download --require-hashes, uv pip install
    python -m benchmarks.fetch model     20 files of a model: hf download
    python -m benchmarks.fetch again     100 files that are all there: the second run, and --verify

Fresh folders each round; what is served lies in the page cache. Ours fsyncs each file before it has its
name; the peers leave theirs to the kernel. So each time is given twice: until the process ended, and until
everything was on the disk (sync). On a tmpfs (--scratch /dev/shm/...) the two are one. pip runs as it comes,
with a cache of its own in a fresh home, and without one; uv unpacks the wheels too, for it can do no less.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

from benchmarks.closure import MIB, Closure, make_model, make_wheels, write_recipe, write_requirements
from benchmarks.server import serving

BIN = Path(sys.executable).parent
ENVBUILDER: tuple[str | Path, ...] = (sys.executable, "-m", "envbuilder")
AGAIN_SIZES = (*(100 * MIB,) * 10, *(MIB,) * 90)


@dataclass(frozen=True)
class Measured:
    """One run of one process."""

    seconds: float
    synced: float
    """Seconds until all was on the disk."""
    cpu: float
    """Seconds of the process and its children, user and system."""
    peak: float
    """MiB of the largest of its processes."""


def measure(command: Sequence[str | Path], env: dict[str, str]) -> Measured:
    """Runs `command` and asks the system what it took; SystemExit with its output if it fails."""
    log = Path(env["TMPDIR"]) / "log"
    with log.open("wb") as output:
        begin = time.perf_counter()
        process = subprocess.Popen(
            [str(word) for word in command], env=env, stdout=output, stderr=subprocess.STDOUT
        )
        _, status, used = os.wait4(process.pid, 0)
        end = time.perf_counter()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command[0]} failed:\n{log.read_text()[-3000:]}")
    os.sync()
    return Measured(
        seconds=end - begin,
        synced=time.perf_counter() - begin,
        cpu=used.ru_utime + used.ru_stime,
        peak=used.ru_maxrss / 1024,
    )


def alternate(rounds: int, scratch: Path, size: int, runs: Mapping[str, Callable[[Path], Measured]]) -> None:
    """Each of `runs` in a fresh folder, one after the other, `rounds` times; prints the medians."""
    results: dict[str, list[Measured]] = {name: [] for name in runs}
    for round_number in range(rounds):
        for name, run in runs.items():
            folder = scratch / "round"
            (folder / "tmp").mkdir(parents=True)
            results[name].append(run(folder))
            shutil.rmtree(folder)
            os.sync()
            print(f"  round {round_number + 1}, {name}: {results[name][-1].seconds:.2f} s", flush=True)
    print(
        f"\n{'':28}{'median':>8} {'min':>7} {'max':>7} {'synced':>8} {'MB/s':>7} {'CPU s':>7} {'peak MiB':>9}"
    )
    for name, measured in results.items():
        times = [run.seconds for run in measured]
        middle = statistics.median(times)
        print(
            f"{name:<28}{middle:>8.2f} {min(times):>7.2f} {max(times):>7.2f} "
            f"{statistics.median(run.synced for run in measured):>8.2f} {size / middle / 1e6:>7.0f} "
            f"{statistics.median(run.cpu for run in measured):>7.2f} "
            f"{max(run.peak for run in measured):>9.0f}"
        )
    medians = {name: statistics.median(run.seconds for run in measured) for name, measured in results.items()}
    ours = medians["envbuilder fetch"]
    for name, median in medians.items():
        if name != "envbuilder fetch":
            print(f"{name} / envbuilder fetch = {median / ours:.2f}")


def environment(folder: Path, **more: str) -> dict[str, str]:
    """Nobody's own settings and caches, nobody's colours."""
    plain = {key: os.environ[key] for key in ("PATH", "LANG") if key in os.environ}
    home = {"HOME": str(folder / "tmp"), "TMPDIR": str(folder / "tmp")}
    pip = {"PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    return {**plain, **home, **pip, "UV_NO_CONFIG": "1", "NO_PROXY": "127.0.0.1", **more}


def against_index(scratch: Path, rounds: int) -> None:
    closure = make_wheels(scratch / "wheels")
    recipe = write_recipe(scratch, closure)
    requirements = scratch / "requirements.txt"
    write_requirements(requirements, closure)
    with serving(closure.folder) as origin:
        describe(closure, scratch, origin)

        def ours(folder: Path) -> Measured:
            env = environment(folder, ENVBUILDER_INDEX_DEFAULT_URL=f"{origin}/simple")
            return measure([*ENVBUILDER, "--root", folder / "root", "fetch", recipe], env)

        def pip(folder: Path, *more: str) -> Measured:
            index: list[str | Path] = ["--index-url", f"{origin}/simple", "-d", folder / "got"]
            command: list[str | Path] = [
                BIN / "python",
                "-m",
                "pip",
                "download",
                "--require-hashes",
                "-r",
                requirements,
            ]
            return measure([*command, *index, *more], environment(folder))

        def uv(folder: Path) -> Measured:
            index: list[str | Path] = [
                "--no-cache",
                "--index-url",
                f"{origin}/simple",
                "--target",
                folder / "got",
            ]
            command: list[str | Path] = [BIN / "uv", "pip", "install", "--require-hashes", "-r", requirements]
            return measure([*command, *index], environment(folder))

        runs = {
            "envbuilder fetch": ours,
            "pip download": pip,
            "pip download --no-cache-dir": lambda folder: pip(folder, "--no-cache-dir"),
            "uv pip install (unpacks)": uv,
        }
        alternate(rounds, scratch, closure.bytes, runs)


def again(scratch: Path, rounds: int) -> None:
    """The second run, and the third with --verify, beside what reading and hashing the files takes."""
    closure = make_wheels(scratch / "hundred", AGAIN_SIZES)
    recipe = write_recipe(scratch / "again", closure)
    with serving(closure.folder) as origin:
        describe(closure, scratch, origin)
        folder = scratch / "again" / "folder"
        (folder / "tmp").mkdir(parents=True, exist_ok=True)
        env = environment(folder, ENVBUILDER_INDEX_DEFAULT_URL=f"{origin}/simple")
        fetch: list[str | Path] = [*ENVBUILDER, "--root", folder / "root", "fetch", recipe]
        measure(fetch, env)
        files = sorted((folder / "root/bundles/bench/files").iterdir())
        workers = str(os.cpu_count())
        names = "\\n".join(map(str, files))
        rows: dict[str, Callable[[], Measured]] = {
            "second run": lambda: measure(fetch, env),
            "--verify": lambda: measure([*fetch, "--verify"], env),
            "read (cat, one by one)": lambda: measure(
                ["sh", "-c", 'cat "$@" > /dev/null', "sh", *files], env
            ),
            **{
                f"{tool}, {workers} at once": lambda tool=tool: measure(
                    ["sh", "-c", f"printf '{names}' | xargs -P {workers} -n 1 {tool}"], env
                )
                for tool in ("sha256sum", "openssl sha256")
                if shutil.which(tool.split()[0])
            },
        }
        for state in ("in the page cache", "dropped from it"):
            print(f"\nfiles {state}:")
            for name, run in rows.items():
                found = []
                for _ in range(rounds):
                    for file in files:
                        cached(file, keep=state == "in the page cache")
                    found.append(run().seconds)
                middle = statistics.median(found)
                print(f"{name:<28}{middle:>8.2f} s {closure.bytes / middle / 1e6:>7.0f} MB/s", flush=True)
        shutil.rmtree(folder)


def cached(path: Path, *, keep: bool) -> None:
    with path.open("rb") as file:
        if keep:
            while file.read(MIB):
                pass
        else:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def against_hub(scratch: Path, rounds: int) -> None:
    closure = make_model(scratch / "model")
    wheels = make_wheels(scratch / "model", (MIB // 4,))
    recipe = write_recipe(scratch / "model-recipe", wheels, closure)
    with serving(closure.folder) as origin:
        describe(closure, scratch, origin)

        def hf(folder: Path) -> Measured:
            env = environment(folder, HF_ENDPOINT=origin, HF_HOME=str(folder / "hf"), HF_HUB_DISABLE_XET="1")
            return measure([BIN / "hf", "download", "o/m", "--local-dir", folder / "got"], env)

        def ours(folder: Path) -> Measured:
            env = environment(folder, HF_ENDPOINT=origin, ENVBUILDER_INDEX_DEFAULT_URL=f"{origin}/simple")
            return measure([*ENVBUILDER, "--root", folder / "root", "fetch", recipe], env)

        alternate(rounds, scratch, closure.bytes, {"envbuilder fetch": ours, "hf download": hf})


def describe(closure: Closure, scratch: Path, origin: str) -> None:
    """The machine, the work, and what a client that only reads gets out of the server."""
    for file in closure.files:
        cached(file, keep=True)
    biggest = max(closure.files, key=lambda file: file.stat().st_size)
    begin = time.perf_counter()
    raw = read_only(f"{origin}/{route(biggest)}") / (time.perf_counter() - begin) / 1e6
    disk = subprocess.run(["stat", "-f", "-c", "%T", scratch], capture_output=True, text=True, check=True)
    print(
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, Python {platform.python_version()}, "
        f"{platform.release()}, {disk.stdout.strip()}\n"
        f"{len(closure.files)} files, {closure.bytes / 1e9:.2f} GB; one raw reader gets {raw:.0f} MB/s"
    )


def read_only(url: str) -> int:
    """Reads a body into nothing; its bytes."""
    parts = urlsplit(url)
    connection = HTTPConnection(parts.netloc)
    connection.request("GET", parts.path)
    response, buffer, count = connection.getresponse(), bytearray(MIB), 0
    while more := response.readinto(buffer):
        count += more
    return count


def route(file: Path) -> str:
    return f"files/{file.name}" if file.suffix == ".whl" else f"o/m/resolve/main/{file.name}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["index", "model", "again"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scratch", type=Path, default=Path("/tmp/envbuilder-benchmark"))
    given = parser.parse_args()
    given.scratch.mkdir(parents=True, exist_ok=True)
    {"index": against_index, "model": against_hub, "again": again}[given.what](given.scratch, given.rounds)


if __name__ == "__main__":
    main()

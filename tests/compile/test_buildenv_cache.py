from __future__ import annotations

import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from envbuilder.compile.buildenv_cache import KEPT, cached_build_venv, remove_unused, venv_digest
from envbuilder.envlock import WheelFile
from envbuilder.interpreter import Interpreter, inspect_interpreter
from envbuilder.model import InstalledPackage, ProvidedPackages
from envbuilder.process import run
from envbuilder.venv import make_venv, venv_python

PROVIDED = ProvidedPackages(python="/opt/python", site_packages=("/opt/lib",), versions={"torch": "2.9"})


@pytest.fixture(scope="module")
def interpreter() -> Interpreter:
    return inspect_interpreter(Path(sys.executable))


def wheel(number: int) -> WheelFile:
    package = InstalledPackage(
        name="a", version="1", wheel="a-1-py3-none-any.whl", sha256=f"{number:064}", origin="bundle"
    )
    return WheelFile(package, Path("/bundle/a-1-py3-none-any.whl"), 1)


class Maker:
    """Makes a small folder in place of a venv, and counts how often."""

    def __init__(self) -> None:
        self.made: list[Path] = []

    def __call__(self, folder: Path) -> None:
        assert not folder.exists()
        (folder / "lib/deep").mkdir(parents=True)
        (folder / "lib/deep/module.py").write_text("one = 1\n", encoding="utf-8")
        (folder / "python").symlink_to(sys.executable)
        self.made.append(folder)


def use(cache: Path, interpreter: Interpreter, make: Callable[[Path], None], number: int = 1) -> Path:
    with cached_build_venv(
        cache, interpreter=interpreter, provided=None, wheels=[wheel(number)], make=make
    ) as venv:
        assert (venv / "lib/deep/module.py").exists()
        return venv


def folders(cache: Path) -> set[Path]:
    return {path for path in cache.iterdir() if path.is_dir()}


def test_a_venv_is_made_once_and_works_where_it_is(tmp_path: Path, interpreter: Interpreter) -> None:
    def make(folder: Path) -> None:
        make_venv(interpreter, folder)
        made.append(folder)

    made: list[Path] = []
    for _ in range(2):
        with cached_build_venv(
            tmp_path / "cache", interpreter=interpreter, provided=None, wheels=[], make=make
        ) as venv:
            done = run([venv_python(venv), "-I", "-c", "import sys; print(sys.prefix)"])
            assert done.output == f"{venv}\n"
    assert made == [venv]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir()) == ["", ".json"]


def test_the_digest_has_all_that_a_venv_is_made_of(interpreter: Interpreter) -> None:
    other = replace(interpreter, version="3.99.0")
    elsewhere = replace(interpreter, path=Path("/opt/bin/python3"))
    newer = PROVIDED.model_copy(update={"versions": {"torch": "2.10"}})
    digests = [
        venv_digest(interpreter, None, [wheel(1)]),
        venv_digest(interpreter, None, [wheel(2)]),
        venv_digest(interpreter, None, [wheel(1), wheel(2)]),
        venv_digest(other, None, [wheel(1)]),
        venv_digest(elsewhere, None, [wheel(1)]),
        venv_digest(interpreter, PROVIDED, [wheel(1)]),
        venv_digest(interpreter, newer, [wheel(1)]),
    ]
    assert len(set(digests)) == len(digests)
    assert venv_digest(interpreter, None, [wheel(2), wheel(1)]) == digests[2]


def _rewrite(venv: Path) -> None:
    """Same size, and the old time of modification."""
    module = venv / "lib/deep/module.py"
    before = module.stat()
    module.write_text("two = 2\n", encoding="utf-8")
    os.utime(module, ns=(before.st_atime_ns, before.st_mtime_ns))


def _relink(venv: Path) -> None:
    (venv / "python").unlink()
    (venv / "python").symlink_to("/bin/sh")


@pytest.mark.parametrize(
    "damage",
    [
        _rewrite,
        _relink,
        lambda venv: (venv / "lib/deep/module.py").unlink(),
        lambda venv: (venv / "lib/new.pth").write_text("import os", encoding="utf-8"),
        lambda venv: (venv / "lib/empty").mkdir(),
        lambda venv: (venv / "lib/deep/module.py").chmod(0o777),
        shutil.rmtree,
    ],
    ids=["rewritten", "relinked", "removed", "added", "a folder", "mode", "all gone"],
)
def test_a_venv_that_was_changed_is_made_again(
    tmp_path: Path, interpreter: Interpreter, damage: Callable[[Path], object]
) -> None:
    make = Maker()
    first = use(tmp_path, interpreter, make)
    damage(first)
    second = use(tmp_path, interpreter, make)
    assert make.made == [first, second]
    assert (second / "lib/deep/module.py").read_text(encoding="utf-8") == "one = 1\n"
    assert folders(tmp_path) == {second}
    assert use(tmp_path, interpreter, make) == second


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"folder": "../elsewhere", "mark": ""}', '{"folder": 1}'])
def test_a_damaged_pointer_is_replaced(tmp_path: Path, interpreter: Interpreter, text: str) -> None:
    make = Maker()
    (tmp_path / "elsewhere").mkdir()
    cache = tmp_path / "cache"
    use(cache, interpreter, make)
    next(cache.glob("*.json")).write_text(text, encoding="utf-8")
    again = use(cache, interpreter, make)
    assert use(cache, interpreter, make) == again
    assert folders(cache) == {again}
    assert (tmp_path / "elsewhere").is_dir()


def test_a_venv_that_failed_leaves_nothing(tmp_path: Path, interpreter: Interpreter) -> None:
    def fail(folder: Path) -> None:
        Maker()(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        use(tmp_path, interpreter, fail)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed_and_never_used(
    tmp_path: Path, interpreter: Interpreter
) -> None:
    child = os.fork()
    if child == 0:

        def die(folder: Path) -> None:
            Maker()(folder)
            os._exit(0)

        use(tmp_path, interpreter, die)
    os.waitpid(child, 0)
    (half,) = folders(tmp_path)
    make = Maker()
    # Until its lease is old, it may be a process on another machine.
    venv = use(tmp_path, interpreter, make)
    assert folders(tmp_path) == {half, venv}
    for lease in tmp_path.glob("*.lease"):
        os.utime(lease, (0, 0))
    remove_unused(tmp_path)
    assert folders(tmp_path) == {venv}
    assert list(tmp_path.glob("*.lease")) == []
    assert use(tmp_path, interpreter, make) == venv


def test_the_ones_used_last_stay_and_those_in_use(tmp_path: Path, interpreter: Interpreter) -> None:
    make = Maker()
    with cached_build_venv(
        tmp_path, interpreter=interpreter, provided=None, wheels=[wheel(0)], make=make
    ) as in_use:
        _age(tmp_path, 3000)
        second, third = (use(tmp_path, interpreter, make, number) for number in (1, 2))
        _age(tmp_path, 1000)
        assert use(tmp_path, interpreter, make, 1) == second  # used once more: newer than the third
        newest = [use(tmp_path, interpreter, make, number) for number in range(3, 2 + KEPT)]
        assert folders(tmp_path) == {in_use, second, *newest}
        assert third not in folders(tmp_path)
    remove_unused(tmp_path)
    assert folders(tmp_path) == {second, *newest}
    assert len(list(tmp_path.glob("*.json"))) == KEPT


def _age(cache: Path, seconds: float) -> None:
    for path in cache.glob("*.json"):
        then = path.stat().st_mtime - seconds
        os.utime(path, (then, then))


def test_a_file_of_another_kind_in_the_cache_is_left_alone(tmp_path: Path, interpreter: Interpreter) -> None:
    (tmp_path / "README").write_text("mine", encoding="utf-8")
    (tmp_path / "link").symlink_to("/usr")
    use(tmp_path, interpreter, Maker())
    assert (tmp_path / "README").exists()
    assert (tmp_path / "link").is_symlink()


def _work(cache: Path, interpreter: Interpreter, start: float) -> None:
    while time.time() < start:
        pass
    for number in (1, 1, 2, 3, 4, 5, 1):
        with cached_build_venv(
            cache, interpreter=interpreter, provided=None, wheels=[wheel(number)], make=Maker()
        ) as venv:
            for _ in range(20):
                assert (venv / "lib/deep/module.py").read_text(encoding="utf-8") == "one = 1\n"


def test_processes_at_once_do_each_other_no_damage(tmp_path: Path, interpreter: Interpreter) -> None:
    context = multiprocessing.get_context("fork")
    start = time.time() + 0.2
    workers = [context.Process(target=_work, args=(tmp_path, interpreter, start)) for _ in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0] * 6
    remove_unused(tmp_path)
    left = len(folders(tmp_path))
    assert 1 <= left <= KEPT
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [""] * left + [".json"] * left

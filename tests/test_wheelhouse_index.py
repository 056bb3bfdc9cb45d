"""The wheelhouse as an index: what pip and uv install from it, by file and by HTTP."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from envbuilder import wheelhouse_index
from envbuilder.errors import MismatchError
from envbuilder.model import BuildReceipt, BuiltWheel
from envbuilder.paths import Root
from envbuilder.wheelhouse import store_built
from envbuilder.wheelhouse_index import WheelIndex, abi_name, write_indexes
from tests.lab.installers import install
from tests.lab.packages import make_wheel

ABI = "cp311-torch2.11.0_cu130-sm90"
RECEIPT = BuildReceipt(
    package="my-kernels",
    version="1.0",
    sdist="my_kernels-1.0.tar.gz",
    sdist_sha256="a" * 64,
    key="key",
    wheel="",
    wheel_sha256="",
    python="3.11.7",
    torch="2.11.0+cu130",
    torch_cuda="13.0",
    cxx11_abi=True,
    nvcc="13.0.88",
    host_compiler="g++ 12",
    compute_capabilities=("9.0",),
    architectures_kept=(),
    architectures_dropped=(),
    extensions=(),
    isolation="none",
    environment={},
    units=(),
    seconds=1.0,
    built_at="2026-01-01T00:00:00+00:00",
)


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path / "root")


def add(
    root: Root,
    key: str,
    name: str = "my-kernels",
    version: str = "1.0",
    tag: str = "py3-none-any",
    **changes: object,
) -> BuiltWheel:
    """A wheel in the wheelhouse whose module's `built` is its key; `stated` are lines of its metadata."""
    scratch = root.path.parent / "made" / key
    scratch.mkdir(parents=True)
    stated = changes.pop("stated", ())
    assert isinstance(stated, tuple)
    module = name.replace("-", "_")
    made = make_wheel(
        scratch, name, version, files={f"{module}.py": f"built = {key!r}\n"}, tag=tag, stated=stated
    )
    wheel = made.rename(scratch / made.name.replace(f"-{tag}", f"-1_{re.sub('[+-]', '.', key)}-{tag}"))
    facts = {
        "package": name,
        "version": version,
        "key": key,
        "wheel": wheel.name,
        "wheel_sha256": hashlib.sha256(wheel.read_bytes()).hexdigest(),
    }
    return store_built(root, wheel, RECEIPT.model_copy(update={**facts, **changes}))


def index_of(root: Root, abi: str = ABI) -> WheelIndex:
    return {index.abi: index for index in write_indexes(root)}[abi]


def pages(root: Root) -> dict[str, bytes]:
    folder = root.wheelhouse / "simple"
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """What `python -m http.server` does, for as long as the block lasts; its URL."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.parametrize("installer", ["pip", "uv"])
@pytest.mark.parametrize("reach", ["file", "http"])
def test_installers_take_packages_and_what_they_need_from_it(
    tmp_path: Path, root: Root, installer: str, reach: str
) -> None:
    add(
        root,
        "kernels+cu130.key",
        name="my-kernels",
        stated=("Requires-Dist: other", "Requires-Python: >=3.8"),
    )
    add(root, "other-key", name="other", version="2.0")
    index = index_of(root)
    if reach == "file":
        install(installer, tmp_path / "there", "My_Kernels", index=index.path.as_uri(), no_deps=False)
    else:
        with served(root.wheelhouse) as url:
            address = f"{url}/simple/{index.abi}/"
            install(installer, tmp_path / "there", "My_Kernels", index=address, no_deps=False)
    assert (tmp_path / "there/my_kernels.py").read_text() == "built = 'kernels+cu130.key'\n"
    assert (tmp_path / "there/other.py").is_file()


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_two_torch_builds_of_one_version_lie_side_by_side(tmp_path: Path, root: Root, installer: str) -> None:
    add(root, "new")
    add(root, "old", torch="2.11.0+cu128", torch_cuda="12.8")
    indexes = write_indexes(root)
    assert [index.abi for index in indexes] == ["cp311-torch2.11.0_cu128-sm90", ABI]
    for index, key in zip(indexes, ["old", "new"], strict=True):
        install(installer, tmp_path / key, "my-kernels==1.0", index=index.path.as_uri())
        assert (tmp_path / key / "my_kernels.py").read_text() == f"built = '{key}'\n"


@pytest.mark.parametrize("installer", ["pip", "uv"])
def test_the_newest_build_of_a_version_is_offered_and_not_that_of_the_highest_tag(
    tmp_path: Path, root: Root, installer: str
) -> None:
    add(root, "a-newer", built_at="2026-02-01T00:00:00+00:00")
    add(root, "z-older")
    index = index_of(root)
    assert [built.receipt.key for built in index.wheels] == ["a-newer"]
    install(installer, tmp_path / "there", "my-kernels", index=index.path.as_uri())
    assert (tmp_path / "there/my_kernels.py").read_text() == "built = 'a-newer'\n"


def test_an_installer_refuses_a_wheel_with_other_bytes_than_the_receipts(tmp_path: Path, root: Root) -> None:
    built = add(root, "key")
    index = index_of(root)
    other = make_wheel(tmp_path, "my-kernels", "1.0", files={"my_kernels.py": "built = 'other'\n"})
    built.path.write_bytes(other.read_bytes())
    for installer in ("pip", "uv"):
        with pytest.raises(AssertionError, match=r"(?is)hash"):
            install(installer, tmp_path / installer, "my-kernels", index=index.path.as_uri())


def test_the_pages_say_what_the_standards_want(root: Root) -> None:
    one = add(root, "k+1", stated=("Requires-Python: >=3.8,<4",))
    two = add(root, "k2", version="1.10")
    add(root, "k3", name="other")
    index = index_of(root)
    read = {name: json.loads(text) for name, text in pages(root).items() if name.endswith(".json")}
    assert read[f"{ABI}/index.json"] == {
        "meta": {"api-version": "1.1"},
        "projects": [{"name": "my-kernels"}, {"name": "other"}],
    }
    assert read[f"{ABI}/my-kernels/index.json"] == {
        "meta": {"api-version": "1.1"},
        "name": "my-kernels",
        "versions": ["1.0", "1.10"],
        "files": [
            {
                "filename": one.path.name,
                "url": f"../../../k%2B1/{one.path.name}",
                "hashes": {"sha256": one.receipt.wheel_sha256},
                "size": one.path.stat().st_size,
                "requires-python": ">=3.8,<4",
            },
            {
                "filename": two.path.name,
                "url": f"../../../k2/{two.path.name}",
                "hashes": {"sha256": two.receipt.wheel_sha256},
                "size": two.path.stat().st_size,
            },
        ],
    }
    html = (index.path / "my-kernels/index.html").read_text()
    assert (
        f'<a href="../../../k%2B1/{one.path.name}#sha256={one.receipt.wheel_sha256}" '
        f'data-requires-python="&gt;=3.8,&lt;4">{one.path.name}</a>' in html
    )
    assert '<a href="other/">other</a>' in (index.path / "index.html").read_text()


def test_a_group_may_read_it_and_others_not(root: Root) -> None:
    add(root, "key")
    index = index_of(root)
    for path in (index.path.parent, index.path, index.path / "my-kernels"):
        assert path.stat().st_mode & 0o7777 == 0o2750
    for path in index.path.rglob("index.*"):
        assert path.stat().st_mode & 0o777 == 0o640


def test_the_pages_follow_the_wheelhouse_and_stay_as_they_are_where_nothing_changed(root: Root) -> None:
    first = add(root, "one")
    add(root, "two", name="other")
    add(root, "three", python="3.12.1")
    write_indexes(root)
    before = pages(root)
    times = {path: path.stat().st_mtime_ns for path in (root.wheelhouse / "simple").rglob("*")}
    assert len(write_indexes(root)) == 2
    assert {path: path.stat().st_mtime_ns for path in times} == times
    assert pages(root) == before
    (first.path.parent / "receipt.json").unlink()
    (root.wheelhouse / "three" / "receipt.json").unlink()
    assert [index.abi for index in write_indexes(root)] == [ABI]
    assert sorted(pages(root)) == [
        f"{ABI}/index.html",
        f"{ABI}/index.json",
        f"{ABI}/other/index.html",
        f"{ABI}/other/index.json",
    ]
    assert b"my-kernels" not in pages(root)[f"{ABI}/index.html"]


def test_an_empty_wheelhouse_has_no_index(root: Root) -> None:
    assert write_indexes(root) == ()
    add(root, "key")
    write_indexes(root)
    (root.wheelhouse / "key/receipt.json").unlink()
    assert write_indexes(root) == ()
    assert pages(root) == {}


def test_wheels_that_nobody_could_install_are_left_out(root: Root) -> None:
    add(root, "whole")
    for key, content in {"text": b"text", "cut": None}.items():
        built = add(root, key, name=f"{key}-package")
        built.path.write_bytes(content or built.path.read_bytes()[:-30])
    add(root, "nameless", name="nameless", wheel="nameless.whl")
    (root.wheelhouse / "nameless" / "nameless.whl").write_bytes(b"")
    index = index_of(root)
    assert [built.receipt.key for built in index.wheels] == ["whole"]
    assert json.loads((index.path / "index.json").read_text())["projects"] == [{"name": "my-kernels"}]


def test_machines_of_two_kinds_share_an_index(root: Root) -> None:
    one = add(root, "x", tag="cp311-cp311-linux_x86_64")
    other = add(root, "a", tag="cp311-cp311-linux_aarch64")
    assert index_of(root).wheels == (other, one)


def test_a_wheel_that_another_process_brings_meanwhile_is_in_the_pages_at_the_end(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(root, "one")
    put = wheelhouse_index._put
    brought: list[BuiltWheel] = []

    def bring(path: Path, text: str) -> None:
        put(path, text)
        if not brought:
            brought.append(add(root, "two", name="other"))
            # The other process has made its pages before this one removes what it does not know.
            put(path.parent.parent / "other" / "index.html", "theirs")

    monkeypatch.setattr(wheelhouse_index, "_put", bring)
    assert [built.receipt.key for built in index_of(root).wheels] == ["one", "two"]
    assert f"{ABI}/other/index.json" in pages(root)


def test_many_processes_at_once_end_with_all_wheels_in_the_pages(root: Root) -> None:
    names = [f"package-{number}" for number in range(6)]
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            add(root, names[number], name=names[number], python=f"3.{10 + number % 3}.1")
            write_indexes(root)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(names))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    found = {path.parent.name for path in (root.wheelhouse / "simple").glob("*/*/index.html")}
    assert found == set(names)
    for number, name in enumerate(names):
        page = root.wheelhouse / "simple" / f"cp3{10 + number % 3}-torch2.11.0_cu130-sm90/index.html"
        assert f'"{name}/"' in page.read_text()


def test_a_folder_where_nobody_may_write_is_told(root: Root) -> None:
    add(root, "key")
    (root.wheelhouse / "simple").write_text("a file is in the way")
    with pytest.raises(MismatchError, match="can't be written"):
        write_indexes(root)


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, ABI),
        ({"torch": "2.11.0"}, "cp311-torch2.11.0-cu130-sm90"),
        ({"torch": "2.9.0a0+145a.nv25.10"}, "cp311-torch2.9.0a0_145a.nv25.10-cu130-sm90"),
        ({"cxx11_abi": False}, "cp311-torch2.11.0_cu130-oldabi-sm90"),
        ({"compute_capabilities": ("8.0", "9.0a")}, "cp311-torch2.11.0_cu130-sm80-sm90a"),
        ({"torch": "2.11.0+cpu", "torch_cuda": None, "compute_capabilities": ()}, "cp311-torch2.11.0_cpu"),
        ({"torch": None, "torch_cuda": None, "cxx11_abi": None, "python": "3.13.0rc1"}, "cp313-sm90"),
    ],
)
def test_the_name_of_an_index_says_what_it_is_for(changes: dict[str, object], name: str) -> None:
    assert abi_name(RECEIPT.model_copy(update=changes)) == name

"""A disk that purges: the dates that doctor tells; `fetch` and `install` bring back what was taken."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from envbuilder.model import Finding
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.site import JobSpec, Site
from tests.conftest import Run
from tests.doctor.conftest import TinyEnv, run_one
from tests.lab.index_server import IndexServer
from tests.lab.packages import make_wheel
from tests.promises.conftest import MINOR, publish_tools

DAY = 86400.0
RECIPE = f"""
name = "small"
requirements = ["one", "two"]
trainer = false
[target]
python = "=={MINOR}.*"
"""
SITE = """
name = "lab"
purge-days = 40
[build]
walltime = "00:30:00"
cpus = 1
[train]
walltime = "00:30:00"
cpus = 1
"""


def site(purge_days: int | None = 40) -> Site:
    job = JobSpec(walltime="00:30:00", cpus=1)
    return Site(name="lab", build=job, train=job, purge_days=purge_days)


def age(path: Path, *, written: float, read: float | None = None) -> None:
    """Sets the days since `path` was last written and read."""
    now = time.time()
    os.utime(path, (now - DAY * (written if read is None else read), now - DAY * written))


def put(path: Path, *, written: float = 0.0, read: float | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("x")
    age(path, written=written, read=read)
    return path


def dates(root: Root, **known: Any) -> Finding:
    return run_one("purging.dates", root=root, **{"site": site(), **known})


def date_after(days: float) -> str:
    return time.strftime("%Y-%m-%d", time.gmtime(time.time() + days * DAY))


def test_the_first_file_to_expire_is_named_with_its_date(root: Root) -> None:
    put(root.store / ("a" * 64), written=3)
    put(root.run("mine") / "adapter/adapter.safetensors", written=2)
    old = put(root.run("mine") / "metrics.jsonl", written=9)
    finding = dates(root)
    assert finding.verdict == "ok", finding
    (line,) = [line for line in finding.evidence if line.startswith("runs")]
    assert line.startswith(f"runs: 2 files; the first expires on {date_after(31)} ({old})"), line


@pytest.mark.parametrize(("written", "verdict"), [(29.5, "ok"), (30.5, "warning"), (41, "warning")])
def test_with_less_than_a_quarter_of_the_days_left_it_warns(root: Root, written: float, verdict: str) -> None:
    put(root.run("mine") / "metrics.jsonl", written=written)
    finding = dates(root)
    assert finding.verdict == verdict
    if verdict == "warning":
        assert "runs" in finding.summary
        assert str(root.run("")) in (finding.remedy or "")
    if written > 40:
        assert "any day now" in finding.summary


def test_what_was_read_lately_counts_as_used_and_the_last_write_is_told_beside_it(root: Root) -> None:
    put(root.env("tiny") / "lib/module.py", written=60, read=1)
    finding = dates(root, recipe=Recipe(name="tiny", requirements=("tiny",)))
    assert finding.verdict == "ok"
    (line,) = finding.evidence
    assert f"expires on {date_after(39)}" in line
    assert line.endswith(f"by its last write alone on {date_after(-20)}")


def test_an_old_file_of_the_store_alone_is_no_loss(root: Root) -> None:
    put(root.store / ("a" * 64), written=39)
    assert dates(root).verdict == "ok"


def test_links_of_an_env_lead_elsewhere_and_do_not_count(env: TinyEnv) -> None:
    assert (env.folder / "bin/python").is_symlink()
    assert dates(env.root, recipe=env.recipe).verdict == "ok"


def test_other_recipes_bundles_and_envs_are_not_looked_at(root: Root) -> None:
    put(root.env("other") / "lib/module.py", written=39)
    assert dates(root, recipe=Recipe(name="tiny", requirements=("tiny",))).verdict == "skipped"
    assert dates(root).verdict == "warning"


@pytest.mark.parametrize("check", ["purging.dates", "purging.gone"])
def test_without_purge_days_or_a_site_nothing_is_known(env: TinyEnv, check: str) -> None:
    for known in (None, site(None)):
        assert run_one(check, root=env.root, recipe=env.recipe, site=known).verdict == "skipped"


def test_doctor_sets_no_time(env: TinyEnv) -> None:
    path = env.site_packages / "tiny.py"
    age(path, written=39)
    before = path.stat()
    assert dates(env.root, recipe=env.recipe).verdict == "warning"
    after = path.stat()
    assert (after.st_atime_ns, after.st_mtime_ns) == (before.st_atime_ns, before.st_mtime_ns)


@pytest.mark.parametrize(
    "lost",
    ["tiny.py", "tiny-1.0.dist-info/RECORD", "tiny-1.0.dist-info", "../../../pyvenv.cfg"],
    ids=["a module", "a RECORD", "all that names a package", "the venv's own"],
)
def test_a_purged_file_of_an_env_is_a_failure_whose_remedy_installs(env: TinyEnv, lost: str) -> None:
    def look() -> Finding:
        return run_one("purging.gone", root=env.root, recipe=env.recipe, site=site())

    assert look().verdict == "ok"
    path = env.site_packages / lost
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    finding = look()
    assert finding.verdict == "failed", finding
    assert finding.remedy == "envbuilder install recipes/tiny.toml"


@pytest.fixture
def place(tmp_path: Path, server: IndexServer, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and a site; the index has what the recipe needs."""
    served = tmp_path / "served"
    publish_tools(served)
    for name in ("one", "two"):
        make_wheel(served, name, "1.0", files={f"{name}.bin": os.urandom(20_000)})
    for wheel in served.iterdir():
        age(wheel, written=500)
    for name, text in {"recipes/small.toml": RECIPE, "recipes/sites/lab.toml": SITE}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "*")
    monkeypatch.setenv("ENVBUILDER_INDEX_DEFAULT_URL", server.url)
    return tmp_path


def answer(run: Run, *words: str | Path) -> dict[str, Any]:
    code, out, err = run("--json", *words)
    found: dict[str, Any] = json.loads(out or err)
    assert code == found.get("exit_code", 0), found
    return found


def doctor(run: Run, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """The findings on purging, for the site of $ENVBUILDER_SITE."""
    monkeypatch.setenv("ENVBUILDER_SITE", "lab")
    found = json.loads(run("--json", "doctor", "recipes/small.toml", "--only", "purging")[1])
    monkeypatch.delenv("ENVBUILDER_SITE")
    return {finding["check"]: finding for finding in found["findings"]}


def files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def oldest_days(folder: Path) -> float:
    """Days since the file of `folder` was written that was not written for longest."""
    return (time.time() - min(path.stat().st_mtime for path in files(folder))) / DAY


def test_all_that_commands_write_has_todays_time_whatever_it_was_brought_with(
    run: Run, place: Path, server: IndexServer
) -> None:
    answer(run, "fetch", "recipes/small.toml")
    root = Root(place / ".envbuilder")
    answer(run, "install", "recipes/small.toml")
    answer(run, "bundle", "pack", "small")
    age(place / "small.tar", written=400)
    answer(run, "--root", "other", "bundle", "unpack", "small.tar")
    adopted = ("--root", "adopted", "fetch", "recipes/small.toml", "--adopt", "served")
    answer(run, *adopted)
    for folder in (root.path, place / "other", place / "adopted"):
        assert oldest_days(folder) < 1, folder


def test_a_stored_file_that_is_used_again_gets_todays_time_and_no_other(run: Run, place: Path) -> None:
    answer(run, "fetch", "recipes/small.toml")
    root = Root(place / ".envbuilder")
    for path in files(root.path):
        age(path, written=39)
    # A run that has nothing to write leaves all as it was.
    assert answer(run, "fetch", "recipes/small.toml")["transferred_files"] == 0
    assert all((time.time() - path.stat().st_mtime) / DAY > 38 for path in files(root.store))
    one = next(path for path in files(root.bundle("small") / "files") if path.name.startswith("one-"))
    one.unlink()
    answer(run, "fetch", "recipes/small.toml")
    assert (time.time() - one.stat().st_mtime) / DAY < 1
    others = [path for path in files(root.bundle("small") / "files") if path != one]
    assert all((time.time() - path.stat().st_mtime) / DAY > 38 for path in others)


def test_fetch_and_install_bring_back_exactly_what_was_purged(
    run: Run, place: Path, server: IndexServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    answer(run, "fetch", "recipes/small.toml")
    answer(run, "install", "recipes/small.toml")
    root = Root(place / ".envbuilder")
    bundle, env = root.bundle("small"), root.env("small")
    found = doctor(run, monkeypatch)
    assert {finding["verdict"] for finding in found.values()} == {"ok"}, found

    locked = files(bundle / "files")
    purged = locked[::3]
    in_store = {path: root.store / hashlib.sha256(path.read_bytes()).hexdigest() for path in locked}
    contents = {path: path.read_bytes() for path in locked}
    for path in purged:
        path.unlink()
        in_store[path].unlink()
    half = locked[1]  # gone from the bundle, and still in the store
    half.unlink()
    env_file = next(env.rglob("one.bin"))
    env_file.unlink()
    left = {path: path.stat().st_ino for path in files(bundle / "files")}
    finding = doctor(run, monkeypatch)["purging.gone"]
    assert finding["verdict"] == "failed"
    assert str(purged[0]) in "\n".join(finding["evidence"])
    assert finding["remedy"].count("envbuilder fetch") == 1
    assert "envbuilder install" in finding["remedy"]

    server.requests.clear()
    again = answer(run, "fetch", "recipes/small.toml")
    assert again["transferred_files"] == len(purged)
    assert {Path(path).name.split("#")[0] for path in server.file_requests()} == {p.name for p in purged}
    assert {path: path.read_bytes() for path in files(bundle / "files")} == contents
    assert {path: path.stat().st_ino for path in left} == left
    assert "gone" in " ".join("".join(run("install", "recipes/small.toml")[1:]).split())
    assert env_file.is_file()
    before = env.stat().st_ino
    answer(run, "install", "recipes/small.toml")
    assert env.stat().st_ino == before
    assert doctor(run, monkeypatch)["purging.gone"]["verdict"] == "ok"

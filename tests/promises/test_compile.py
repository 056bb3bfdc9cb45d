"""What `compile` promises of its cache, of its wheels and of builds that only seem to succeed."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import BuildError
from tests.compile.test_resuming import UNITS, cached, job_in
from tests.compile.test_tiny_cuda import build, recipe_for
from tests.conftest import Quickstart


def test_promise_18_a_poisoned_object_is_not_used(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    _, first = job.run()
    objects = [path for path in (job.root.cache / "objects").rglob("objects/*/*") if path.is_file()]
    assert len(objects) == UNITS
    for path in objects:
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    Path(first["path"]).parent.joinpath("receipt.json").unlink()
    code, second = job.run()
    assert (code, cached(second)) == (0, 0)
    assert second["wheel_sha256"] == first["wheel_sha256"]


def test_promise_18_a_cache_that_others_can_write_is_not_used(tmp_path: Path) -> None:
    job = job_in(tmp_path)
    _, first = job.run()
    (folder,) = (job.root.cache / "objects").iterdir()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    Path(first["path"]).parent.joinpath("receipt.json").unlink()
    code, error = job.run()
    assert (code, error["error"]) == (7, "MismatchError")
    assert error["remedy"] == f"rm -r {folder}"


def test_promise_19_another_root_umask_time_zone_and_number_of_jobs_give_the_same_wheel(
    tmp_path: Path,
) -> None:
    _, one = job_in(tmp_path / "one", TZ="UTC").run(umask=0o022)
    other_job = job_in(tmp_path / "somewhere else", TZ="Asia/Kathmandu", SLURM_CPUS_ON_NODE="2")
    _, other = other_job.run(umask=0o077)
    if one["isolation"] == "sealed":
        assert (one["wheel"], one["wheel_sha256"]) == (other["wheel"], other["wheel_sha256"])
        assert one["differs"] == []
    else:
        assert one["differs"]


@pytest.mark.needs_env
def test_promise_20_a_build_that_succeeds_without_its_module_is_a_failure(
    tmp_path: Path, quickstart: Quickstart
) -> None:
    with pytest.raises(BuildError, match="the wheel lacks tiny_cuda_ext"):
        build(tmp_path, quickstart, recipe_for("9.0", TINY_CUDA_SKIP_BUILD="TRUE"))
    assert not (tmp_path / "root" / "wheelhouse").exists()

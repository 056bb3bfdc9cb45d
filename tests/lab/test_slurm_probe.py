"""`envbuilder probe --sbatch` on a real Slurm: the record is the compute node's, made inside its job."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from envbuilder.machine import read_machine
from envbuilder.recipe import Recipe
from envbuilder.target import narrow_target
from tests.lab.slurm import SlurmLab, missing_programs

pytestmark = pytest.mark.lab

REPOSITORY = Path(__file__).parent.parent.parent
PYTHON = Path("/usr/bin/python3")
RECIPE = """\
name = "demo"
requirements = ["app"]
target = {{ python = ">=3.9", machine = "aarch64", glibc = "2.17" }}
provided = {{ python = "{python}", packages = ["typing-extensions>=4", "rich"] }}
"""


@pytest.fixture(scope="module")
def lab() -> Iterator[SlurmLab]:
    assert not missing_programs(), f"make test-lab needs: {', '.join(missing_programs())}"
    with SlurmLab() as lab:
        shutil.copy(REPOSITORY / "recipes" / "sites" / "lab.toml", lab.home)
        uv = [sys.executable, "-m", "uv", "--quiet", "--no-config"]
        # The suite's own interpreter may lie in a home folder that no other user can read.
        subprocess.run([*uv, "venv", "--python", PYTHON, lab.folder / "tool"], check=True)
        subprocess.run([*uv, "pip", "install", "--python", _python(lab), REPOSITORY], check=True)
        yield lab


def test_a_probe_s_job_brings_a_record_that_a_recipe_is_narrowed_to(lab: SlurmLab) -> None:
    (lab.home / "demo.toml").write_text(RECIPE.format(python=_python(lab)))
    submitted = lab.as_user(
        [
            *(_python(lab), "-m", "envbuilder", "--json", "--root", lab.home / "root", "probe"),
            *("--recipe", "demo.toml", "--provided", "no-such-package", "--output", "target.json"),
            *("--sbatch", "--site", "./lab.toml"),
        ]
    )
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    job = json.loads(submitted.stdout)
    assert lab.wait_for_job(job["job"]) == "COMPLETED", Path(job["log"]).read_text()

    record = read_machine(lab.home / "target.json")
    here = subprocess.run([PYTHON, "-c", "import platform; print(platform.python_version())"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    assert record.interpreter.version == here.stdout.strip()
    assert record.provided["no-such-package"] is None
    assert record.memory_bytes is not None
    recipe = Recipe.model_validate(
        {
            "name": "demo",
            "requirements": ["app"],
            "target": {"python": ">=3.9", "machine": "aarch64", "glibc": "2.17"},
            "provided": {"packages": ["typing-extensions>=4", "rich"]},
        }
    )
    narrowed = narrow_target(recipe, record)
    assert (narrowed.target.machine, narrowed.target.glibc) == (record.machine, record.glibc)
    assert narrowed.provided is not None
    assert narrowed.provided.packages == (
        f"typing-extensions=={record.provided['typing-extensions']}",
        f"rich=={record.provided['rich']}",
    )


def test_a_probe_that_cannot_run_leaves_no_record_and_the_job_fails(lab: SlurmLab) -> None:
    submitted = lab.as_user(
        [
            *(_python(lab), "-m", "envbuilder", "--json", "--root", lab.home / "root", "probe"),
            *("--python", "/nonexistent/python", "--output", "none.json"),
            *("--sbatch", "--site", "./lab.toml"),
        ]
    )
    job = json.loads(submitted.stdout)
    assert lab.wait_for_job(job["job"]) == "FAILED"
    assert "There is no interpreter /nonexistent/python on this machine" in Path(job["log"]).read_text()
    assert not (lab.home / "none.json").exists()


def _python(lab: SlurmLab) -> Path:
    return lab.folder / "tool" / "bin" / "python"

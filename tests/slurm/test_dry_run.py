"""Dry runs, as seen through what `sbatch --test-only` says; tests/lab has the real cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder import summary
from envbuilder.errors import SlurmError
from envbuilder.paths import Root
from envbuilder.site import Site, load_site
from envbuilder.slurm.dry_run import DryRun, Start, dry_run, parse_start
from envbuilder.slurm.plan import Wishes, plan_compile
from tests.slurm.test_submit import SITE, Heard, Sbatch, sbatch, site

__all__ = ["sbatch", "site"]
STARTS = "sbatch: Job 12 to start at 2026-01-01T10:00:00 using 16 processors on nodes n[1-2] in partition gpu"


def tried(site: Site, folder: Path, wishes: Wishes | None = None, heard: Heard | None = None) -> DryRun:
    root = Root(folder / "root")
    plan = plan_compile(folder / "r.toml", "tiny", site, root, [], wishes or Wishes())
    return dry_run(plan, heard or Heard())


@pytest.mark.parametrize(
    ("said", "start"),
    [
        (STARTS, Start("2026-01-01T10:00:00", 16, "n[1-2]", "gpu")),
        (
            "sbatch: Job 3 to start at 2026-01-01T10:00:00 using 2 processors on n1",
            Start("2026-01-01T10:00:00", 2, "n1", ""),
        ),
        ("", None),
    ],
)
def test_what_slurm_says_of_the_start_is_read(said: str, start: Start | None) -> None:
    assert parse_start(said) == start


def test_hours_are_those_of_the_processors_that_slurm_would_give(
    site: Site, sbatch: Sbatch, tmp_path: Path
) -> None:
    sbatch.says(STARTS)
    run = tried(site, tmp_path, Wishes(estimate_s=4 * 3600.0))
    assert (run.one_job.gpu_hours, run.one_job.core_hours) == (8, 32)  # 2 h, 4 GPUs, 16 processors
    assert run.whole is not None
    assert (run.whole.gpu_hours, run.whole.core_hours) == (16, 64)
    assert run.jobs == 4
    assert run.script.startswith("#!/bin/bash\n#SBATCH --job-name=envbuilder-compile-tiny\n")
    arguments = (sbatch.folder / "arguments").read_text().split()
    assert arguments[0] == "--test-only"
    assert not Path(arguments[1]).exists(), "nothing is left on the disk"
    assert not (tmp_path / "root").exists()
    rows = dict(summary.dry_run(run, "fits", "", is_chain=False))
    assert rows["expected start"] == "2026-01-01T10:00:00 on n[1-2], 16 processors"
    assert rows["one job"] == "at most 8.00 GPU-hours and 32.00 core-hours"
    assert rows["jobs"] == "4 jobs, one after the other"
    assert rows["within the limit"] == "the work does not fit into one job of 02:00:00"


def test_what_nobody_knows_is_said_to_be_unknown(site: Site, sbatch: Sbatch, tmp_path: Path) -> None:
    sbatch.says("sbatch: nothing of when")
    run = tried(site, tmp_path)
    assert (run.start, run.whole, run.jobs) == (None, None, None)
    assert run.one_job.core_hours == 16
    rows = dict(summary.dry_run(run, "unknown", "no run yet", is_chain=False))
    assert rows["the whole work"] == "unknown: no run yet"
    assert rows["jobs"] == "unknown"
    assert "does not say when" in rows["expected start"]


def test_a_job_that_would_be_refused_is_the_error_that_submitting_it_would_be(
    site: Site, sbatch: Sbatch, tmp_path: Path
) -> None:
    sbatch.says("allocation failure: Invalid account or account/partition combination specified", 1)
    with pytest.raises(SlurmError, match="may not use the account proj"):
        tried(site, tmp_path)


def test_the_budget_is_shown_as_the_site_s_command_prints_it(
    site: Site, sbatch: Sbatch, tmp_path: Path
) -> None:
    sbatch.says(STARTS)
    heard = Heard()
    tried(site.model_copy(update={"account_command": "echo 'proj  120 h left'"}), tmp_path, heard=heard)
    assert heard.said == ["charged to the account proj", "proj  120 h left"]
    heard = Heard()
    tried(site.model_copy(update={"account_command": "echo no; exit 3"}), tmp_path, heard=heard)
    assert heard.said == ["charged to the account proj", "no", "echo no; exit 3: ended with 3"]


@pytest.mark.parametrize(
    ("own", "gpu_hours", "core_hours"),
    [
        ("#SBATCH --nodes=2\n", 16, 32),  # each with the site's four GPUs and eight cores
        ("#SBATCH --gres=gpu:a100:1\n", 2, 16),
        ("#SBATCH -N 2 --gpus=3\n", 6, 32),
        ("#SBATCH --gpus-per-task=2 --cpus-per-gpu=4\n", 4, 16),
        ("#SBATCH --gres=none\n", 0, 16),
        ("#SBATCH --time=01:00:00\n", 4, 8),
    ],
)
def test_hours_are_of_what_the_user_s_own_script_asks_for(
    tmp_path: Path, sbatch: Sbatch, own: str, gpu_hours: float, core_hours: float
) -> None:
    sbatch.says("sbatch: nothing of when")
    (tmp_path / "job.sh").write_text(
        f"#!/bin/bash\n{own}{{{{sbatch}}}}\n{{{{environment}}}}\n{{{{command}}}}\n"
    )
    (tmp_path / "mine.toml").write_text(f'template = "job.sh"\n{SITE}')
    run = tried(load_site(str(tmp_path / "mine.toml")), tmp_path)
    assert (run.one_job.gpu_hours, run.one_job.core_hours) == (gpu_hours, core_hours)
    assert "hours are of what it asks for" in dict(summary.dry_run(run, "", "", is_chain=False))["template"]

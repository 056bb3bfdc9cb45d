"""The troubles of the guide that this tool replaces: each is made to happen, and explained from its output.

Its fourth, a QoS that takes one job, is in tests/lab/test_doctor_slurm.py: on a real Slurm.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from envbuilder.doctor import explain_log
from envbuilder.model import Finding
from tests.conftest import Quickstart

CONFIGURATION = """\
from transformers import PretrainedConfig


class GuideConfig(PretrainedConfig):
    model_type = "nemotron_guide"
"""
# Rank 1 ends with 18; rank 0 waits for a signal, as in a collective call.
RANKS = """\
import os, signal, sys
if os.environ["RANK"] == "1":
    sys.exit(18)
signal.pause()
"""


def explained(command: list[object], folder: Path) -> tuple[Finding, ...]:
    """Runs `command`, which must fail, in `folder`, and has doctor explain what it printed."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    ended = subprocess.run(
        [str(word) for word in command],
        cwd=folder,
        env=variables | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    assert ended.returncode != 0, ended.stdout.decode()
    (folder / "log").write_bytes(ended.stdout)
    return explain_log(str(folder / "log"))


def test_mamba_ssm_not_found(tmp_path: Path) -> None:
    first = explained([sys.executable, "-c", "import mamba_ssm"], tmp_path)[0]
    assert (first.check, first.verdict) == ("log.mamba-missing", "failed")
    assert "envbuilder compile RECIPE --sbatch" in (first.remedy or "")


@pytest.mark.needs_env
def test_a_model_that_asks_for_trust_remote_code(quickstart: Quickstart, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    asked = {"AutoConfig": "configuration_guide.GuideConfig"}
    config = {"model_type": "nemotron_guide", "auto_map": asked}
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (model / "configuration_guide.py").write_text(CONFIGURATION, encoding="utf-8")
    load = "from transformers import AutoConfig; AutoConfig.from_pretrained('model')"
    first = explained([quickstart.python, "-c", load], tmp_path)[0]
    assert (first.check, first.verdict) == ("log.remote-code", "failed")
    assert "transformers that knows the model itself" in (first.remedy or "")


@pytest.mark.needs_env
def test_torchrun_s_exit_code_18(quickstart: Quickstart, tmp_path: Path) -> None:
    (tmp_path / "ranks.py").write_text(RANKS, encoding="utf-8")
    torchrun = [quickstart.python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    first = explained([*torchrun, "ranks.py"], tmp_path)[0]
    assert (first.check, first.verdict) == ("log.torchrun-exit-18", "failed")
    assert any("rank 1" in line and "exit code 18" in line for line in first.evidence)
    assert "nvidia-smi" in (first.remedy or "")

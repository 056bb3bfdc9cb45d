"""Which versions of the kept libraries are taken, before any of them is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.errors import VersionMismatch
from trainer.versions import OLDEST, check_versions

REPOSITORY = Path(__file__).parents[2]
GOOD = {"transformers": "5.3.0", "mamba-ssm": "2.3.0", "peft": "0.19.1"}


def distributions(folder: Path, versions: dict[str, str]) -> Path:
    """A folder for `sys.path` with the metadata of distributions that hold nothing."""
    for name, version in versions.items():
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return folder


@pytest.mark.parametrize(
    "newer", [{}, {"mamba-ssm": "2.3.2.post1"}, {"transformers": "5.23.0", "peft": "0.21.2+local"}]
)
def test_the_oldest_versions_and_newer_ones_are_taken(
    newer: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert GOOD.keys() == OLDEST.keys()
    monkeypatch.syspath_prepend(distributions(tmp_path, GOOD | newer))
    check_versions()


@pytest.mark.parametrize(
    ("name", "version", "reason"),
    [
        ("transformers", "4.57.6", "Nemotron-H is native"),
        ("transformers", "5.2.0", "Nemotron-H is native"),
        ("mamba-ssm", "2.2.5", "names that transformers 5 removed"),
        ("mamba-ssm", "2.2.6.post3", "names that transformers 5 removed"),
        ("peft", "0.18.1", "adapters of routed experts"),
    ],
)
def test_an_older_one_is_refused_with_what_to_take(
    name: str, version: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(distributions(tmp_path, GOOD | {name: version}))
    with pytest.raises(VersionMismatch, match=rf"{name} {version}, wanted is .*{reason}") as caught:
        check_versions()
    assert caught.value.exit_code == 3
    assert f'"{name}>={OLDEST[name][0]}"' in caught.value.remedy
    assert caught.value.context == GOOD | {name: version}


def test_the_older_pair_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(
        distributions(tmp_path, GOOD | {"transformers": "4.57.6", "mamba-ssm": "2.2.5"})
    )
    with pytest.raises(VersionMismatch, match=r"transformers 4\.57\.6.*mamba-ssm 2\.2\.5"):
        check_versions()


def test_a_run_ends_with_3_before_torch_is_imported(config_file: Path, tmp_path: Path) -> None:
    old = distributions(tmp_path / "site", {"mamba-ssm": "2.2.6"})
    program = (
        "import json, sys; from trainer.__main__ import main; "
        "print(json.dumps([main(), sorted({'torch', 'transformers', 'peft'} & set(sys.modules))]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(config_file), "--run-dir", str(tmp_path / "run")],
        cwd=REPOSITORY,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(old), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout) == [3, []]
    assert "mamba-ssm 2.2.6" in done.stderr
    outcome = json.loads((tmp_path / "run/outcome.json").read_text())
    assert (outcome["exit_code"], outcome["status"]) == (3, "failed")
    assert outcome["error"]["remedy"].startswith("envbuilder lock")

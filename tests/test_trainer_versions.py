"""Which envs the trainer takes: told from the receipt, before a process or a job is started."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from envbuilder.cli import main
from envbuilder.doctor import Subject, choose_checks, run_checks
from envbuilder.errors import MismatchError
from envbuilder.lock import SourceLock, read_lock
from envbuilder.model import EnvReceipt, InstalledPackage
from envbuilder.paths import Root
from envbuilder.recipe import load_recipe
from envbuilder.report import Quiet
from envbuilder.target import python_versions, target_for
from envbuilder.trainer_versions import check_trains, oldest_versions
from tests.conftest import REPOSITORY
from trainer.versions import OLDEST

GUIDE, TRAINS = "nemotron3-nano-leonardo", "nemotron3-nano-leonardo-train"


def receipt_of(recipe: str) -> EnvReceipt:
    """What `install` would write for the shipped recipe `recipe`, from its lock."""
    lock = read_lock(REPOSITORY / "lockfiles" / f"pylock.{recipe}.toml")
    spec = load_recipe(REPOSITORY / "recipes" / f"{recipe}.toml")
    return receipt(recipe, versions_of(lock), spec.cuda.compute_capabilities if spec.cuda else ())


def versions_of(lock: SourceLock) -> dict[str, str]:
    target = target_for(lock.target, python_versions(lock.target)[0])
    return {file.package: file.version for file in lock.select(target)}


def receipt(recipe: str, versions: dict[str, str], capabilities: tuple[str, ...] = ("8.0",)) -> EnvReceipt:
    return EnvReceipt(
        recipe=recipe,
        lock_sha256="0" * 64,
        python="3.11.7",
        compute_capabilities=capabilities,
        packages=tuple(
            InstalledPackage(name=name, version=version, wheel="x.whl", sha256="0" * 64, origin="bundle")
            for name, version in versions.items()
        ),
        extensions=(),
        provided=None,
        created_at="2026-01-01T00:00:00+00:00",
    )


def test_the_bounds_are_the_trainer_s_own() -> None:
    assert {bound.package: bound.version for bound in oldest_versions()} == {
        package: version for package, (version, _) in OLDEST.items()
    }


@pytest.mark.parametrize("recipe", [TRAINS, "nemotron3-nano-h200", "quickstart"])
def test_the_shipped_recipes_with_the_trainer_hold_what_it_takes(recipe: str) -> None:
    assert load_recipe(REPOSITORY / "recipes" / f"{recipe}.toml").trainer
    check_trains(receipt_of(recipe))


def test_the_guide_s_pair_is_refused_by_name_with_the_recipe_that_trains() -> None:
    with pytest.raises(MismatchError, match=r"transformers 4\.57\.\d, mamba-ssm 2\.2\.5") as caught:
        check_trains(receipt_of(GUIDE))
    assert caught.value.remedy.endswith(f"envbuilder fetch recipes/{TRAINS}.toml")
    assert "Nemotron-H is native" in caught.value.context["transformers"]
    assert "names that transformers 5 removed" in caught.value.context["mamba-ssm"]


def test_the_recipe_instead_is_for_the_same_gpus() -> None:
    versions = {"transformers": "4.57.6", "mamba-ssm": "2.2.5"}
    for capabilities, remedy in {
        ("9.0",): "envbuilder fetch recipes/nemotron3-nano-h200.toml",
        ("12.0",): 'Write "transformers>=5.3", "mamba-ssm>=2.3" into requirements of recipes/mine.toml',
    }.items():
        with pytest.raises(MismatchError) as caught:
            check_trains(receipt("mine", versions, capabilities))
        assert remedy in caught.value.remedy


def test_an_env_without_mamba_is_told_what_to_require() -> None:
    with pytest.raises(MismatchError, match=r"does not train with peft 0\.18\.1, which") as caught:
        check_trains(receipt("mine", {"transformers": "5.3.0", "peft": "0.18.1"}))
    assert '"peft>=0.19.1" into requirements of recipes/mine.toml' in caught.value.remedy


@pytest.fixture
def guide_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Root:
    """The env of the guide's recipe, as far as its receipt, and a Slurm that says if it was given a job."""
    root = Root(tmp_path / "root")
    root.env(GUIDE).mkdir(parents=True)
    (root.env(GUIDE) / "envbuilder.json").write_text(receipt_of(GUIDE).model_dump_json(), encoding="utf-8")
    (tmp_path / "bin").mkdir()
    for name in ("sbatch", "squeue", "sacctmgr", "scontrol", "sinfo"):
        program = tmp_path / "bin" / name
        program.write_text(f"#!/bin/sh\ntouch {tmp_path}/asked\n", encoding="utf-8")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "c.yaml").write_text("device: cuda\n", encoding="utf-8")
    monkeypatch.chdir(REPOSITORY)
    return root


@pytest.mark.parametrize("where", [[], ["--sbatch", "--site", "leonardo"], ["--allow-drift"]])
def test_train_refuses_before_anything_starts(
    guide_env: Root,
    tmp_path: Path,
    where: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--root", str(guide_env.path), "train", str(tmp_path / "c.yaml"), "--recipe", GUIDE, *where]
    monkeypatch.setattr(sys, "argv", ["envbuilder", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == MismatchError.exit_code
    told = " ".join(capsys.readouterr().err.split())
    assert "mamba-ssm 2.2.5" in told
    assert f"recipes/{TRAINS}.toml" in told
    assert not (tmp_path / "asked").exists()
    assert not guide_env.run("c").exists()


def test_doctor_says_the_same(guide_env: Root, tmp_path: Path) -> None:
    recipe = load_recipe(REPOSITORY / "recipes" / f"{GUIDE}.toml")
    subject = Subject(recipe, guide_env, None, config=tmp_path / "c.yaml")
    (found,) = run_checks(subject, Quiet(), choose_checks(["model.versions"]))
    assert found.verdict == "failed"
    assert "mamba-ssm 2.2.5" in found.summary
    assert f"envbuilder fetch recipes/{TRAINS}.toml" in (found.remedy or "")

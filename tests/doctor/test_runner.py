from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from envbuilder.doctor import CHECKS, Subject, choose_checks, run_checks
from envbuilder.doctor.check import Check, Outcome, ok
from envbuilder.errors import UsageError
from envbuilder.gpu import Gpu, Gpus
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet, Reporter
from tests.doctor.conftest import TinyEnv


def test_every_check_has_an_id_of_its_own_and_says_what_it_looks_at() -> None:
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        theme, _, thing = check.id.partition(".")
        assert all((theme, thing, check.title, check.looks_at))


def test_without_a_recipe_the_checks_that_need_one_are_skipped_with_that_reason(root: Root) -> None:
    findings = run_checks(Subject(None, root, None), Quiet())
    assert [finding.check for finding in findings] == [check.id for check in choose_checks()]
    skipped = {f.check for f in findings if f.summary == "No recipe was given."}
    assert skipped == {check.id for check in choose_checks() if "recipe" in check.needs}
    assert {"storage.free-space", "toolchain.compiler"}.isdisjoint(skipped)


def test_before_install_the_checks_of_an_env_are_skipped_and_name_the_command(root: Root) -> None:
    recipe = Recipe(name="tiny", requirements=("tiny",))
    (finding,) = run_checks(Subject(recipe, root, None), Quiet(), choose_checks({"env.records"}))
    assert finding.verdict == "skipped"
    assert "envbuilder install recipes/tiny.toml" in finding.summary


def test_where_the_env_is_an_image_they_name_the_command_that_looks_into_it(root: Root) -> None:
    root.images.mkdir(parents=True)
    root.image_receipt("tiny").touch()
    subject = Subject(Recipe(name="tiny", requirements=("tiny",)), root, None, config=Path("c.yaml"))
    (finding,) = run_checks(subject, Quiet(), choose_checks({"env.records"}))
    assert finding.verdict == "skipped"
    assert finding.summary.endswith(": envbuilder doctor recipes/tiny.toml --config c.yaml")


def test_an_unknown_check_is_refused_before_any_check_runs() -> None:
    with pytest.raises(UsageError) as caught:
        choose_checks({"gpu.telepathy"})
    assert "gpu.telepathy" in caught.value.message
    assert caught.value.remedy == "envbuilder doctor --list"


def test_a_typed_error_in_a_check_is_a_failure_with_that_errors_remedy(env: TinyEnv) -> None:
    (env.folder / "envbuilder.json").write_text("{", encoding="utf-8")
    finding = env.check("env.distributions")
    assert finding.verdict == "failed"
    assert "envbuilder.json is damaged" in finding.summary
    assert finding.remedy == "envbuilder install recipes/tiny.toml"


def test_a_whole_env_passes_every_check_that_applies(make_env: Callable[..., TinyEnv]) -> None:
    env = make_env()
    findings = run_checks(Subject(env.recipe, env.root, env.lock), Quiet())
    verdicts = {finding.check: finding.verdict for finding in findings}
    for check in ("platform.interpreter", "env.lock", "env.distributions", "env.records"):
        assert verdicts[check] == "ok"
    assert not [finding for finding in findings if finding.verdict == "failed"]


def _check(run: Callable[[Subject, Reporter], Outcome], id: str = "test.thing", **fields: Any) -> Check:
    return Check(id, "a thing", "a thing", run, **fields)


def test_a_check_that_hangs_is_given_up_and_the_others_are_not(root: Root) -> None:
    never = threading.Event()

    def hang(subject: Subject, reporter: Reporter) -> Outcome:
        never.wait(60)
        return ok("at last")

    checks = (
        *(_check(hang, f"test.hangs-{n}", limit_s=1, cost=cost) for n, cost in enumerate(("quick", "gpu"))),
        *(_check(lambda s, r: ok("well"), f"test.well-{n}", cost=c) for n, c in enumerate(("quick", "gpu"))),
    )
    found = run_checks(Subject(None, root, None), Quiet(), checks)
    never.set()
    assert [finding.verdict for finding in found] == ["failed", "failed", "ok", "ok"]
    assert "no answer within 1 s" in found[0].summary
    assert "--only test.hangs-0" in (found[0].remedy or "")


def test_a_defect_in_a_check_loses_nothing_of_what_the_others_found(root: Root) -> None:
    def break_off(subject: Subject, reporter: Reporter) -> Outcome:
        raise KeyError("missing")

    checks = (_check(break_off), _check(lambda s, r: ok("well"), "test.other"))
    broken, well = run_checks(Subject(None, root, None), Quiet(), checks)
    assert (broken.verdict, well.verdict) == ("failed", "ok")
    assert "KeyError" in broken.summary
    assert any("break_off" in line for line in broken.evidence)


GPU = Gpu("0", "NVIDIA H200", "9.0", "580.159.04", "143771", "Default")


def test_checks_on_the_gpu_run_one_at_a_time_and_quick_ones_side_by_side(
    root: Root, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = threading.Barrier(3, timeout=20)
    under_way: list[str] = []

    def meet(subject: Subject, reporter: Reporter) -> Outcome:
        at_once.wait()
        return ok("met")

    def alone(subject: Subject, reporter: Reporter) -> Outcome:
        under_way.append("")
        time.sleep(0.02)
        count = len(under_way)
        under_way.pop()
        return ok(str(count))

    quick = tuple(_check(meet, f"test.quick-{n}") for n in range(3))
    gpu = tuple(_check(alone, f"test.gpu-{n}", cost="gpu") for n in range(5))
    asked = _check(alone, "test.asked", cost="asked", needs=("gpu",))
    monkeypatch.setattr("envbuilder.doctor.subject.read_gpus", lambda: Gpus((GPU,), "13.0", None))
    found = run_checks(Subject(None, root, None), Quiet(), (*quick, *gpu, asked))
    assert [finding.summary for finding in found] == ["met"] * 3 + ["1"] * 6


def test_what_checks_share_is_found_out_once(root: Root, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def slowly() -> Gpus:
        asked.append("")
        time.sleep(0.05)
        return Gpus((), None, "none")

    monkeypatch.setattr("envbuilder.doctor.subject.read_gpus", slowly)
    checks = tuple(_check(lambda s, r: ok(s.gpus.absence), f"test.gpus-{n}") for n in range(8))
    found = run_checks(Subject(None, root, None), Quiet(), checks)
    assert {finding.summary for finding in found} == {"none"}
    assert len(asked) == 1


def test_checks_are_chosen_by_id_by_theme_and_by_what_they_cost() -> None:
    ids = {check.id for check in choose_checks()}
    assert ids == {check.id for check in CHECKS if check.cost != "asked"}
    assert {check.cost for check in choose_checks(quick=True)} == {"quick"}
    assert {check.theme for check in choose_checks({"env"})} == {"env"}
    assert [check.id for check in choose_checks({"gpu.kernels"}, quick=True)] == ["gpu.kernels"]

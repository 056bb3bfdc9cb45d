from __future__ import annotations

from collections.abc import Callable

import pytest

from envbuilder.doctor import CHECKS, run_checks
from envbuilder.errors import UsageError
from envbuilder.paths import Root
from envbuilder.recipe import Recipe
from envbuilder.report import Quiet
from tests.doctor.conftest import TinyEnv


def test_every_check_has_an_id_of_its_own_and_says_what_it_looks_at() -> None:
    assert len({check.id for check in CHECKS}) == len(CHECKS)
    for check in CHECKS:
        theme, _, thing = check.id.partition(".")
        assert all((theme, thing, check.title, check.looks_at))


def test_without_a_recipe_the_checks_that_need_one_are_skipped_with_that_reason(root: Root) -> None:
    findings = run_checks(None, root=root, lock=None, reporter=Quiet())
    assert [finding.check for finding in findings] == [check.id for check in CHECKS]
    skipped = {f.check for f in findings if f.summary == "No recipe was given."}
    assert skipped == {check.id for check in CHECKS if "recipe" in check.needs}
    assert {"storage.free-space", "toolchain.compiler"}.isdisjoint(skipped)


def test_before_install_the_checks_of_an_env_are_skipped_and_name_the_command(root: Root) -> None:
    recipe = Recipe(name="tiny", requirements=("tiny",))
    (finding,) = run_checks(recipe, root=root, lock=None, only=frozenset({"env.records"}), reporter=Quiet())
    assert finding.verdict == "skipped"
    assert "envbuilder install recipes/tiny.toml" in finding.summary


def test_an_unknown_check_is_refused_before_any_check_runs(root: Root) -> None:
    with pytest.raises(UsageError) as caught:
        run_checks(None, root=root, lock=None, only=frozenset({"gpu.telepathy"}), reporter=Quiet())
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
    findings = run_checks(env.recipe, root=env.root, lock=env.lock, reporter=Quiet())
    verdicts = {finding.check: finding.verdict for finding in findings}
    for check in ("platform.interpreter", "env.lock", "env.distributions", "env.records"):
        assert verdicts[check] == "ok"
    assert "failed" not in verdicts.values()

"""Site files: what they may say, and how a mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import InputError
from envbuilder.site import load_site

REPOSITORY = Path(__file__).parent.parent
SECTION = 'partition = "gpu"\nwalltime = "01:00:00"\ncpus = 8\nmemory = "64G"\n'
SITE = f'name = "mine"\n[build]\n{SECTION}[train]\n{SECTION}'


def refusal(path: Path, text: str) -> InputError:
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        load_site(str(path))
    return caught.value


@pytest.mark.parametrize("name", ["leonardo", "generic", "lab"])
def test_the_sites_that_are_shipped_are_found_by_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert load_site(name).name == name


def test_a_site_is_found_by_its_path(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(SITE)
    site = load_site(str(tmp_path / "mine.toml"))
    assert site.build.partition == "gpu"
    assert (site.build.account, site.build.gpus, site.modules, site.env) == (None, 0, (), {})


def test_an_unknown_site_is_refused_with_those_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(InputError, match=r"no site at recipes/sites/atlantis\.toml") as caught:
        load_site("atlantis")
    assert "recipes/sites/leonardo.toml" in caught.value.remedy


@pytest.mark.parametrize(
    ("old", "new", "key"),
    [
        ('name = "mine"', 'name = "mine"\nmodule = ["gcc"]', "module"),
        ("cpus = 8", 'cpus = "8"\nqueue = "x"', "build.queue"),
        ("cpus = 8", "cpus = 0", "build.cpus"),
        ('walltime = "01:00:00"', 'walltime = "one hour"', "build.walltime"),
        ('memory = "64G"', 'memory = "lots"', "build.memory"),
        ('partition = "gpu"', 'partition = "gpu\\n#SBATCH --wckey=x"', "build.partition"),
        ('partition = "gpu"', 'partition = "--test-only"', "build.partition"),
        ("cpus = 8", "cpus = 8\ngpus = 1", "build"),
        ("cpus = 8", 'cpus = 8\ngpu-request = "gres"', "build"),
        ("cpus = 8", 'cpus = 8\ngpus = 1\ngpu-request = "typed-gres"', "build"),
        ("cpus = 8", 'cpus = 8\ngpus = 1\ngpu-request = "gres"\ngpu-type = "a100"', "build"),
        ("cpus = 8", 'cpus = 8\ngpus = 1\ngpu-request = "please"', "build.gpu-request"),
        ('name = "mine"', 'name = "mine"\nmodules = ["gcc; rm -rf /"]', "modules[0]"),
        ('name = "mine"', 'name = "mine"\nsetup = ["a\\nb"]', "setup[0]"),
        ('name = "mine"', 'name = "mine"\nenv = {"A B" = "1"}', "env.A B.[key]"),
    ],
)
def test_a_mistake_is_told_with_its_key(tmp_path: Path, old: str, new: str, key: str) -> None:
    error = refusal(tmp_path / "mine.toml", SITE.replace(old, new, 1))
    assert key in error.context["keys"].split(", ")
    assert error.context["file"] == str(tmp_path / "mine.toml")


def test_a_file_that_is_no_toml_is_refused(tmp_path: Path) -> None:
    assert "is not TOML" in refusal(tmp_path / "mine.toml", "name = ").message

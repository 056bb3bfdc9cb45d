"""Recipes: what is accepted, and that each mistake is named by its key."""

from __future__ import annotations

from pathlib import Path

import pytest

from envbuilder.errors import InputError
from envbuilder.recipe import load_recipe

REPOSITORY = Path(__file__).parent.parent
LEAST = 'name = "demo"\nrequirements = ["torch"]\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "demo.toml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted((REPOSITORY / "recipes").glob("*.toml")), ids=lambda path: path.stem)
def test_the_shipped_recipes_are_sound_and_named_after_their_files(path: Path) -> None:
    assert load_recipe(path).name == path.stem


def test_the_least_recipe_has_the_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, LEAST))

    assert recipe.trainer
    assert (recipe.target.python, recipe.target.machine, recipe.target.glibc) == (
        ">=3.11,<3.14",
        "x86_64",
        "2.28",
    )
    assert (recipe.cuda, recipe.provided, dict(recipe.build)) == (None, None, {})
    assert recipe.provided_names == recipe.excluded_names == frozenset()


def test_names_of_provided_and_excluded_packages_are_normalised(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(
            tmp_path,
            LEAST + '[provided]\npackages = ["Hugging_Face.Hub>=1"]\n'
            '[[exclude]]\npackage = "Tile.Lang"\nreason = "unused"\n',
        )
    )

    assert recipe.provided_names == {"hugging-face-hub"}
    assert recipe.excluded_names == {"tile-lang"}


@pytest.mark.parametrize(
    ("text", "key", "message"),
    [
        ("requierments = []\n", "requierments", "unknown key"),
        ("build_env = 1\n", "build_env", "unknown key"),
        ("[target]\nmachine = 'sparc'\n", "target.machine", "x86_64"),
        ("[target]\nglibc = '3.0'\n", "target.glibc", "glibc version"),
        ("[target]\npython = 'three'\n", "target.python", "version specifier"),
        ("[cuda]\ncompute-capabilities = ['sm_90']\n", "cuda.compute-capabilities[0]", "compute capability"),
        ("[cuda]\ntoolchain = 'packages'\n", "cuda", "toolchain-requirements"),
        ("[cuda]\ntoolchain = 'system'\ntoolchain-requirements = ['x']\n", "cuda", "toolchain-requirements"),
        ("[build.Causal_Conv1d]\n", "recipe", "'causal-conv1d'"),
        ("[build.kernels]\nmodules = ['kernels_cuda']\n", "recipe", "[cuda] table"),
        ("[build.kernels]\nrequires = ['a b']\n", "build.kernels.requires[0]", "PEP 508"),
        ("[build.kernels.env]\n'A B' = 'x'\n", "build.kernels.env", "environment variable"),
        ("[build.kernels]\npatches = ['patches/a.patch', 'patches/a.patch']\n", "recipe", "a patch twice"),
        ("[provided]\npackages = []\n", "provided.packages", "at least 1"),
        ("[[exclude]]\npackage = 'x'\n", "exclude[0].reason", "required"),
        ("[index]\ntorch = 'https://127.0.0.1/simple'\n", "index.torch", "index's name"),
    ],
)
def test_a_mistake_is_named_by_its_key(tmp_path: Path, text: str, key: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, LEAST + text))

    assert key in caught.value.context["keys"]
    assert message in caught.value.message
    assert str(tmp_path / "demo.toml") in caught.value.remedy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('name = "no.dots"\nrequirements = ["torch"]', "a name of a-z"),
        ('name = "demo"\nrequirements = []', "at least 1"),
        ('name = "demo"\nrequirements = "torch"', "requirements"),
        ('name = "demo"\nrequirements = ["torch @ https://127.0.0.1/torch.whl"]', "can't carry a URL"),
        ('name = "demo"\nrequirements = ["torch"', "not TOML"),
    ],
)
def test_a_recipe_without_sound_name_and_requirements_is_refused(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message) as caught:
        load_recipe(write(tmp_path, text))

    assert caught.value.exit_code == 3


def test_all_mistakes_are_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        load_recipe(write(tmp_path, LEAST + "one = 1\ntwo = 2\n"))

    assert caught.value.context["keys"] == "one, two"


def test_a_recipe_that_is_not_there_or_no_text_is_refused_with_its_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="There is no recipe at"):
        load_recipe(tmp_path / "absent.toml")
    with pytest.raises(InputError, match="can't be read"):
        load_recipe(tmp_path)
    (tmp_path / "demo.toml").write_bytes(b"\xff")
    with pytest.raises(InputError, match="can't be read"):
        load_recipe(tmp_path / "demo.toml")

"""The layers that docs/architecture.md draws, held by the imports."""

from __future__ import annotations

import ast
from collections import Counter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent


def drawn_layers() -> dict[str, set[str]]:
    """Layer → its modules and packages, as the table in docs/architecture.md has them."""
    text = (REPOSITORY / "docs/architecture.md").read_text(encoding="utf-8")
    table = text.split("## Layers, one way", 1)[1].split("```")[1]
    layers: dict[str, set[str]] = {}
    name = ""
    for line in table.strip("\n").splitlines():
        head, *rest = line.split()
        if line.startswith(" "):
            rest = [head, *rest]
        else:
            name = head
        layers.setdefault(name, set()).update(rest)
    return layers


LAYERS = drawn_layers()
PURE, STAGES, TOP = LAYERS["pure"], LAYERS["stages"], LAYERS["commands"]
PARTS = {"locking": {"resolve"}}
"""Stage → the packages that are a part of it."""


def modules() -> list[Path]:
    return sorted((REPOSITORY / "envbuilder").rglob("*.py"))


def room(path: Path) -> str:
    """The part that a module belongs to: `fetch/plan.py` and `fetch/__init__.py` are both in `fetch`."""
    return path.relative_to(REPOSITORY / "envbuilder").parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    """Full names of the project's modules and names that `path` imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return {name for name in names if name.split(".")[0] in ("envbuilder", "trainer")}


def rooms_imported(path: Path) -> set[str]:
    return {name.split(".")[1] for name in imported(path) if name.startswith("envbuilder.")} - {"__version__"}


def test_every_module_is_drawn_in_one_layer() -> None:
    drawn = Counter(name for layer in LAYERS.values() for name in layer)
    assert set(LAYERS) == {"pure", "primitives", "stages", "commands"}
    assert drawn == Counter({room(path) for path in modules()} - {"__init__"})


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(REPOSITORY)))
def test_a_module_imports_only_from_its_own_layer_or_below(path: Path) -> None:
    here = room(path)
    if here in TOP:
        return
    above = TOP | (STAGES - {here} - PARTS.get(here, set())) if here in STAGES else TOP | STAGES
    if here in PURE:
        assert rooms_imported(path) <= PURE
    assert not rooms_imported(path) & above


def test_the_tool_and_the_trainer_never_import_each_other() -> None:
    for path in modules():
        assert not {name for name in imported(path) if name.split(".")[0] == "trainer"}, path
    for path in sorted((REPOSITORY / "trainer").rglob("*.py")):
        assert not {name for name in imported(path) if name.split(".")[0] == "envbuilder"}, path


def test_only_the_cli_and_its_display_print_and_exit() -> None:
    # Scripts that run on their own, in another interpreter, have only their standard output to speak through.
    standalone = {
        "fetch/start.py",
        "bundles/unpack.py",
        "compile/drivers/compiler.py",
        "compile/drivers/frontend.py",
        "doctor/kernels/__main__.py",
        "doctor/extension_run.py",
    }
    for path in modules():
        name = str(path.relative_to(REPOSITORY / "envbuilder"))
        if name in standalone or room(path) in TOP:
            continue
        calls = {
            node.func.id
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        }
        assert not calls & {"print", "exit", "input"}, name


def test_no_module_is_longer_than_400_lines() -> None:
    long = {
        str(path.relative_to(REPOSITORY)): count
        for folder in ("envbuilder", "trainer")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 400
    }
    assert not long

"""The core knows no architecture: no method asks which family it is given, and the model room goes by no tower's name."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from circuitvision.model import spec

ROOT = Path(__file__).parents[1] / "circuitvision"
TOWERS = {"vision", "vision_2", "language", "action", "text"}
FIGURES = {"text", "action"}
"""What plotly calls its labels, and a kind of node."""
OWN = ("families", "organisms")
"""Rooms that are about particular models."""


def modules(*rooms: str) -> Iterator[tuple[str, ast.Module]]:
    for path in sorted(ROOT.rglob("*.py")):
        name = path.relative_to(ROOT)
        if name.parts[0] not in OWN and (not rooms or name.parts[0] in rooms):
            yield str(name), ast.parse(path.read_text(encoding="utf-8"))


def constants(node: ast.AST) -> set[str]:
    return {one.value for one in ast.walk(node) if isinstance(one, ast.Constant) and isinstance(one.value, str)}


def asks_for_a_family(tree: ast.Module, names: set[str]) -> list[int]:
    """Lines that compare with the name of a family or of its class, or look at the name of the family itself."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            if any(isinstance(side, ast.Attribute) and ast.unparse(side).endswith("family.name") for side in sides):
                found.append(node.lineno)
            if any(constants(side) & names for side in sides):
                found.append(node.lineno)
    return found


def asks_for_a_tower(tree: ast.Module) -> list[int]:
    """Lines that compare something called tower with the name of one, look one up among towers, or ask whether it is among them."""
    found = []
    for node in ast.walk(tree):
        sides = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        sides = [node.value, node.slice] if isinstance(node, ast.Subscript) else sides
        named = any(
            isinstance(side, (ast.Constant, ast.Tuple, ast.List, ast.Set)) and constants(side) & TOWERS
            for side in sides
        )
        if named and any("tower" in ast.unparse(side) or "sibling" in ast.unparse(side) for side in sides):
            found.append(node.lineno)
    return found


def test_no_method_asks_which_family_it_is_given() -> None:
    spec.load_tables()
    names = {family.name for family in spec.FAMILIES.values()} | set(spec.FAMILIES)
    asking = {name: lines for name, tree in modules() if (lines := asks_for_a_family(tree, names))}
    # Registering a family compares its name with those there are.
    asking.pop("model/spec.py", None)
    assert not asking


def test_the_core_goes_by_no_towers_name() -> None:
    assert not {
        name: lines for name, tree in modules("model", "interop", "patching") if (lines := asks_for_a_tower(tree))
    }


def said_in_code(tree: ast.Module) -> str:
    """All strings of a module but its docstrings."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    said = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)
    }
    strings = [node for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    return " ".join(node.value for node in strings if id(node) not in said)


def test_the_main_job_goes_by_no_towers_and_no_organisms_name() -> None:
    for name, tree in modules("quickstart", "plots"):
        if name.split("/")[-1] in ("graph.py", "report.py", "lens_rows.py") or "quickstart" in name:
            words = set(re.findall(r"\w+", said_in_code(tree))) - (FIGURES if name.startswith("plots") else set())
            assert not words & TOWERS, name
    said = " ".join(said_in_code(tree) for _, tree in modules("quickstart"))
    assert not re.findall(r"[a-z]+-(?:llava|vit|clip|pi0)", said)


@pytest.mark.parametrize(
    "source",
    [
        'if model.family.name == "llava": pass',
        'if model.family.name in ("llava", "pi0"): pass',
        'kind = 1 if type(module).__name__ == "CLIPModel" else 2',
    ],
)
def test_a_question_for_a_family_is_noticed(source: str) -> None:
    assert asks_for_a_family(ast.parse(source), {"llava", "pi0", "CLIPModel"})


@pytest.mark.parametrize(
    "source",
    [
        'if tower == "language": pass',
        'x = model.towers["vision"]',
        'if "text" in towers: pass',
        'if tower.name in ("text", "language"): pass',
    ],
)
def test_a_question_for_a_tower_is_noticed(source: str) -> None:
    assert asks_for_a_tower(ast.parse(source))

"""The package as a whole: light to import, rooms that only look up, shapes that hold, one source for CI's test command."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

import circuitvision as cv

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "circuitvision"
ROOMS = [
    "errors",
    "files",
    "progress",
    "provenance",
    "statistics",
    "storage",
    "results",
    "data",
    "metrics",
    "openvla",
    "model",
    "incremental",
    "hooked",
    "families",
    "readout",
    "patching",
    "subspaces",
    "circuits",
    "organisms",
    "steering",
    "studies",
    "plots",
    "quickstart",
    "cli",
]
"""Top to bottom: a room may import from itself and from rooms above it."""
LAZY = {
    ("results", "plots"),
    ("results", "model"),
    ("quickstart", "plots"),
    ("data", "metrics"),
    ("metrics", "model"),
}
"""A result's ``.plot()`` is a lazy dispatch into plots; pairs are compared with what a model answers once a model is handed in; a metric reads its
position
in the core's grammar; columns of a frame are named as components are."""


def _python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.strip()


def test_import_is_light() -> None:
    heavy = ("torch", "transformers", "transformer_lens", "nnsight", "plotly", "pandas")
    loaded = _python(f"import sys, circuitvision; print([m for m in {heavy!r} if m in sys.modules])")
    assert loaded == "[]"


def test_the_core_does_not_load_plots_or_peers() -> None:
    heavy = ("transformer_lens", "nnsight", "plotly")
    loaded = _python(
        f"import sys, circuitvision as cv; cv.HookedModel; print([m for m in {heavy!r} if m in sys.modules])"
    )
    assert loaded == "[]"


def _room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module] + [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "circuitvision" and len(parts) > 1 and parts[1] in ROOMS:
                found.add(parts[1])
    return found


def _runtime_source(path: Path) -> str:
    return re.sub(r"if TYPE_CHECKING:\n(?:[ \t]+.*\n|\n)+", "", path.read_text())


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_rooms_import_only_upwards(path: Path, tmp_path: Path) -> None:
    room = _room(path)
    if room not in ROOMS:
        return
    stripped = tmp_path / "module.py"
    stripped.write_text(_runtime_source(path))
    for other in _imports(stripped) - {room}:
        allowed = ROOMS.index(other) <= ROOMS.index(room) or (room, other) in LAZY
        assert allowed, f"{room} imports {other}, which stands below it"


def test_annotated_shapes_hold() -> None:
    """Every jaxtyping annotation of the core is checked by beartype while a vision-language and a dual model run."""
    code = """
from jaxtyping import install_import_hook
with install_import_hook(["circuitvision.model", "circuitvision.incremental", "circuitvision.hooked", "circuitvision.metrics"], "beartype.beartype"):
    import circuitvision as cv
    cv.HookedModel, cv.metrics
import torch
from tests.zoo import case, shared_model
names = ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "b_Q", "b_K", "b_V", "b_O", "b_in", "b_out")
for name in ("llava-clip-llama", "clip", "dinov2-swiglu", "pi0"):
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=2)
    logits, cache = model.run_with_cache(inputs)
    for tower in model.towers.values():
        for weight in names:
            assert getattr(tower, weight).shape[0] == tower.cfg.n_layers
            getattr(tower.blocks[0], weight)
        tower.W_E
        stack = cache.decompose_resid(tower.name)
        cache.apply_ln_to_stack(stack, tower.name, layer=0)
        cache.stack_head_results(tower.name)
print(len(cache))
"""
    assert int(_python(code)) > 100


def _classes() -> dict[str, list[ast.ClassDef]]:
    """Every public class of the package by its name."""
    found: dict[str, list[ast.ClassDef]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(node)
    return found


def _named_in(annotation: object) -> set[str]:
    return set(re.findall(r"\w+", annotation if isinstance(annotation, str) else ""))


def returned_classes() -> set[str]:
    """The classes that public functions, and public methods of public classes, return; and those in a room's front themselves."""
    classes, found = _classes(), set[str]()
    fronts = [*(getattr(cv, room) for room in cv._ROOMS), cv]
    todo: set[str] = set()
    for front in fronts:
        for name in getattr(front, "__all__", None) or [n for n in vars(front) if not n.startswith("_")]:
            value = inspect.unwrap(getattr(front, name)) if callable(getattr(front, name)) else None
            if not str(getattr(value, "__module__", "")).startswith("circuitvision"):
                continue
            todo |= {value.__name__} if inspect.isclass(value) else set()
            todo |= _named_in(value.__annotations__.get("return")) if inspect.isfunction(value) else set()
    while todo := (todo & classes.keys()) - found:
        found |= todo
        methods = [m for name in todo for node in classes[name] for m in node.body if isinstance(m, ast.FunctionDef)]
        returns = [m.returns for m in methods if m.returns is not None and not m.name.startswith("_")]
        todo = set().union(*(_named_in(ast.unparse(one)) for one in returns))
    return found


def test_every_class_that_a_public_function_returns_has_a_name_in_cv() -> None:
    found = returned_classes()
    assert len(found) > 60
    missing = sorted(name for name in found if not inspect.isclass(getattr(cv, name, None)))
    assert not missing, f"add to _CLASSES of circuitvision/__init__.py: {missing}"


def test_every_name_in_cv_exists_and_is_listed_once() -> None:
    names = [name for names in cv._CLASSES.values() for name in names.split()]
    assert len(set(names)) == len(names)
    for name in [*names, *cv._FUNCTIONS]:
        assert getattr(cv, name).__name__ == name
        assert name in dir(cv)
    results = {name for name, cls in cv.Result._classes.items() if cls.__module__.startswith("circuitvision.")}
    assert results <= set(names)


def test_ci_runs_the_readme_command() -> None:
    text = (ROOT / "README.md").read_text()
    block = re.search(r"<!-- ci: tests -->\n```\w*\n(.+?)\n```", text, re.DOTALL)
    assert block is not None
    assert "constraints.txt" in block[1]
    assert "pytest" in block[1]

"""A warning is shown at the line that called the library: at a line in the library, Python would show the next study's not at all."""

from __future__ import annotations

import ast
import warnings
from pathlib import Path

import numpy as np

import circuitvision as cv
from circuitvision import edits


def test_each_of_two_studies_with_one_mistake_warns_at_its_own_line() -> None:
    model = cv.organisms.load("shapes-llava")
    inputs = model.inputs(images=np.zeros((64, 64, 3), np.uint8), text="USER: <image> what ? ASSISTANT:")
    dead, metric = [edits.ablate("vision.L2H1")], cv.metrics.logit_diff("red", "blue")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        model.sweep(inputs, dead, metric, progress=False)
        model.sweep(inputs, dead, metric, progress=False)
        model.run(inputs, dead)
    told = [warning for warning in caught if "changes nothing" in str(warning.message)]
    assert [warning.filename for warning in told] == [__file__] * 3
    assert len({warning.lineno for warning in told}) == 3


def test_every_warning_of_the_library_goes_through_one_place() -> None:
    root = Path(cv.__file__).parent
    others = [
        f"{path.relative_to(root)}:{node.lineno}"
        for path in root.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "warnings.warn"
    ]
    assert others == []

"""The models of the conformance table: the zoo's, and small ones of families that are registered from outside the package.

The latter prove the structure: blocks of any shape, cross-attention, patches that are merged, images in one sequence. Most of them are written a
second time by hand (:data:`BY_HAND`), so what a site must hold is what the same weights multiplied by hand give. A check runs inside
:func:`in_tables`, so no family is left in the package's tables for another test.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor

from circuitvision.model import spec
from tests import synthetic, synthetic_blocks, synthetic_cross, zoo
from tests.zoo import Case, Shape
from tests.zoo.weights import randomise

ByHand = Callable[..., tuple[Tensor, dict[str, Tensor]]]


def _block_case(shape: str) -> Case:
    name = f"synthetic-{shape.replace('_', '-')}"

    def build() -> Any:
        module = randomise(synthetic_blocks.Own(synthetic_blocks.SHAPES[shape]), name)
        # The fused attention of torch: what is read inside attention must still reach the output.
        module.config._attn_implementation = "sdpa"
        return module

    tags = frozenset(("classifier", "class_token", "synthetic_blocks"))
    return Case(
        name, name, build, synthetic_blocks.inputs_by_hand, ("vision",), tags=tags, register=synthetic_blocks.register
    )


def _cross_build() -> Any:
    module = randomise(synthetic_cross.Crossing(True), "synthetic-cross")
    module.config.text_config._attn_implementation = module.config.vision_config._attn_implementation = "sdpa"
    return module


CROSS = Case(
    "synthetic-cross",
    "synthetic-cross",
    _cross_build,
    synthetic_cross.inputs_by_hand,
    ("vision", "language"),
    tags=frozenset(("class_token", "cross_attention")),
    register=lambda: synthetic_cross.register(True),
)
COVERED = ("fused", "vector_gates", "norms_behind", "third_writer", "post_norm_gated")
"""Shapes whose parts are all in other rows; tests/test_synthetic_blocks.py has them."""
BLOCK_SHAPES = {
    f"synthetic-{shape.replace('_', '-')}": shape for shape in synthetic_blocks.SHAPES if shape not in COVERED
}
SYNTHETIC: dict[str, Case] = {
    **{name: _block_case(shape) for name, shape in BLOCK_SHAPES.items()},
    CROSS.name: CROSS,
    **{case.name: case for case in synthetic.CASES.values()},
}
EVERY: dict[str, Case] = {**zoo.CASES, **SYNTHETIC}

_EYE, _LLAMA = Shape(2, 3, 3, 12, 4, 20, (4, 6)), Shape(2, 4, 2, 16, 4, 24)
SHAPES: dict[str, dict[str, Shape]] = {
    **zoo.SHAPES,
    **{name: {"vision": Shape(3, 4, 2, 12, 3, 20, (2, 2), 1)} for name in BLOCK_SHAPES},
    "synthetic-cross": {"vision": Shape(2, 2, 2, 8, 4, 12, (2, 2), 1), "language": Shape(3, 2, 2, 12, 6, 16)},
    "synthetic-merging": {"vision": _EYE, "language": _LLAMA},
    "synthetic-merging-before": {"vision": _EYE, "language": _LLAMA},
    "synthetic-packing": {"vision": replace(_EYE, grid=None), "language": _LLAMA},
}
BY_HAND: dict[str, ByHand] = {
    **dict.fromkeys(BLOCK_SHAPES, synthetic_blocks.by_hand),
    "synthetic-cross": synthetic_cross.by_hand,
}
"""Output and every site of a tower's blocks, some of them replaced by functions of their value: ``by_hand(module, inputs, {site: function})``."""


def case(name: str) -> Case:
    """The case of that name."""
    return EVERY[name]


@contextmanager
def in_tables(case: Case) -> Iterator[None]:
    """The case's family is in the tables, and gone afterwards where it is none of the package's."""
    if case.register is None:
        yield
        return
    spec.load_tables()
    before = dict(spec.FAMILIES)
    case.register()
    try:
        yield
    finally:
        spec.FAMILIES.clear()
        spec.FAMILIES.update(before)

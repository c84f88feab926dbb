"""``cv.check_model``: green on models whose tables are right, and red, with the name of what is wrong, for tables that lie."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.families import Family, Readout, TowerSpec
from circuitvision.families.stacks import VIT, VIT_BLOCK
from circuitvision.model import spec
from tests.synthetic_blocks import SHAPES
from tests.test_synthetic_blocks import built
from tests.test_tower_config import Own
from tests.zoo import case

pytestmark = pytest.mark.usefixtures("tables")


@pytest.mark.parametrize("name", ["vit", "siglip2", "clip", "llava-clip-llama-layers", "paligemma2", "pi0", "openvla"])
def test_shipped_tables_hold(name: str) -> None:
    tiny = case(name)
    model = cv.HookedModel(tiny.build().eval())
    found = cv.check_model(model, tiny.inputs(model.module, batch=2), progress=False)
    assert found.ok, str(found)
    assert len(found.checks) == 11
    assert found.to_frame()["ok"].all()
    assert "all hold" in repr(found)


@pytest.mark.parametrize("shape", SHAPES)
def test_blocks_of_every_shape_hold(shape: str) -> None:
    _, model, inputs = built(shape)
    found = cv.check_model(model, inputs, layers=[0, 1, 2], progress=False)
    assert found.ok, str(found)


READS = Readout(pool="cls", head="inner.classifier", reads=("cls",))


def lying(tower: dict[str, Any], stack: dict[str, Any]) -> cv.HookedModel:
    whole = replace(VIT, **stack)
    one = TowerSpec("vision", root="inner.vit", **{"stack": whole, "readout": READS, **tower})
    spec.register_family(Family(name="own", classes=("Own",), output="logits", towers=(one,)))
    torch.manual_seed(0)
    return cv.HookedModel(Own().eval())


@pytest.mark.parametrize(
    ("tower", "stack", "check"),
    [
        ({"readout": replace(READS, pool="mean_patch")}, {}, "read-out"),
        ({"readout": replace(READS, normed=False)}, {}, "read-out"),
        ({"readout": replace(READS, reads=("patch",))}, {}, "positions"),
        ({}, {"attention": "causal"}, "masks"),
        ({"feature_layers": 2}, {}, "edits"),
        ({}, {"block": replace(VIT_BLOCK, branches=VIT_BLOCK.branches[:1])}, "stream"),
    ],
)
def test_a_table_that_lies_is_found_out(tower: dict[str, Any], stack: dict[str, Any], check: str) -> None:
    model = lying(tower, stack)
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)}
    found = cv.check_model(model, inputs, progress=False)
    assert not found.ok
    assert check in [one.name for one in found.checks if not one.ok], str(found)
    assert check in repr(found)
    assert "✗" in found._repr_html_()


def test_the_right_table_of_the_same_model_holds() -> None:
    found = cv.check_model(lying({}, {}), {"pixel_values": torch.randn(2, 3, 16, 16)}, progress=False)
    assert found.ok, str(found)


def test_a_module_is_no_wrapped_model() -> None:
    with pytest.raises(InputError, match="HookedModel"):
        cv.check_model(case("vit").build(), {})  # type: ignore[arg-type]

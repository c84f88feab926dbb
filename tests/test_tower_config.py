"""A table that does not fit the model is refused when it is wrapped, with what was expected and what was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import nn

import circuitvision as cv
from circuitvision.errors import UnsupportedModelError
from circuitvision.families.stacks import VIT, VIT_BLOCK
from circuitvision.model import spec
from circuitvision.model.block_layout import BlockLayout
from circuitvision.model.spec import Family, Readout, TowerSpec
from tests.zoo import case

pytestmark = pytest.mark.usefixtures("tables")


class Own(nn.Module):
    """A ViT under a class name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = case("vit").build()
        self.config = self.inner.config

    def forward(self, pixel_values: Any) -> Any:
        return self.inner(pixel_values)


def wrapped(tower: dict[str, Any], **parts: str) -> cv.HookedModel:
    attn, mlp = (
        replace(branch, core=replace(branch.core, **{k: v for k, v in parts.items() if hasattr(branch.core, k)}))
        for branch in VIT_BLOCK.branches
    )
    stack = replace(VIT, block=BlockLayout((attn, mlp)))
    reads = Readout(pool="cls", head="inner.classifier", reads=("cls",))
    one = TowerSpec("vision", root="inner.vit", stack=stack, readout=reads, **tower)
    spec.register_family(Family(name="own", classes=("Own",), output="logits", towers=(one,)))
    return cv.HookedModel(Own().eval())


@pytest.mark.parametrize(
    ("part", "path", "says"),
    [
        ("q", "mlp.fc2", "q='mlp.fc2'.*reads 40 features, expected 24"),
        ("k", "mlp.fc1", "k='mlp.fc1'.*writes 40 features, expected 24 .4 key and value heads of 6"),
        ("fc_in", "mlp.fc2", "fc_in='mlp.fc2'.*reads 40 features, expected 24"),
        ("fc_out", "attention.o_proj", "fc_out='attention.o_proj'.*reads 24 features, expected 40"),
        ("o", "mlp.fc1", "o='mlp.fc1'.*writes 40 features, expected 24"),
    ],
)
def test_a_part_that_is_another_is_named(part: str, path: str, says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        wrapped({}, **{part: path})


@pytest.mark.parametrize(
    ("tower", "says"),
    [
        ({"n_heads": 5}, "a multiple of 5 heads"),
        ({"n_heads": 3}, "says that a head is 6 wide, and 3 heads"),
        ({"n_heads": "hidden_size"}, "says that a head is 6 wide, and 24 heads"),
        ({"n_kv_heads": 2}, "k='attention.k_proj'.*expected 12 .2 key and value heads of 6"),
        ({"n_heads": ("no_such", "neither")}, "has no no_such or neither"),
    ],
)
def test_heads_that_the_weights_contradict_are_refused(tower: dict[str, Any], says: str) -> None:
    with pytest.raises(UnsupportedModelError, match=says):
        wrapped(tower)


@pytest.mark.parametrize("n_heads", [4, "num_attention_heads", ("no_such", "num_attention_heads")])
def test_heads_are_a_number_a_name_or_names(n_heads: Any) -> None:
    cfg = wrapped({"n_heads": n_heads}).vision.cfg
    assert (cfg.n_heads, cfg.n_kv_heads, cfg.d_head, cfg.d_model, cfg.d_mlp) == (4, 4, 6, 24, 40)


def test_a_block_of_another_shape_is_refused() -> None:
    module = case("vit").build()
    module.vit.layers[2].mlp.fc1 = nn.Linear(24, 48)
    with pytest.raises(UnsupportedModelError, match=r"block 2 .*fc_in='mlp.fc1'.*writes 48 features, expected 40"):
        cv.HookedModel(module)


def test_widths_are_the_modules_own_whatever_the_config_calls_them() -> None:
    module = case("vit").build()
    module.config.hidden_size = 999
    assert cv.HookedModel(module).vision.cfg.d_model == 24

"""A table that does not fit the model is refused when it is wrapped, with what was expected and what was found."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import circuitvision as cv
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.families.stacks import VIT, VIT_BLOCK
from circuitvision.model import spec
from circuitvision.model.block_layout import MLP, Attention, BlockLayout, Branch, Fused, Gate
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


def own_family(stack: spec.Stack) -> cv.HookedModel:
    tower = TowerSpec(
        "vision", root="inner.vit", stack=stack, readout=Readout(pool="cls", head="inner.classifier", reads=("cls",))
    )
    cv.register_family(Family(name="own", classes=("Own",), output="logits", towers=(tower,)))
    return cv.HookedModel(Own().eval())


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (None, r"Gate\('lamda'\) of attn is no parameter of ViTLayer; it holds lambda_1"),
        (1.0, "is 1.0 and no parameter"),
    ],
)
def test_a_gate_that_is_no_parameter_is_refused(
    value: float | None, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn, mlp = VIT_BLOCK.branches
    build = Own.__init__

    def with_gates(self: Own) -> None:
        build(self)
        for block in self.inner.vit.layers:
            block.lambda_1 = nn.Parameter(torch.ones(1))
            if value is not None:
                block.lamda = value

    monkeypatch.setattr(Own, "__init__", with_gates)
    with pytest.raises(UnsupportedModelError, match=said):
        own_family(replace(VIT, block=BlockLayout((replace(attn, then=(Gate("lamda"),)), mlp))))


def test_a_position_table_that_is_not_there_is_refused_with_what_is() -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"position_weight, the name .* not 'positions'; it holds .*position_embeddings"
    ):
        own_family(replace(VIT, position_weight="positions"))


def test_an_identity_in_the_place_of_a_norm_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match="An Identity stands where the table names a norm"):
        spec.norm_spec(nn.Identity())


def test_the_order_of_a_fused_map_is_one_that_there_is() -> None:
    with pytest.raises(InputError, match="order is one of 'qkv', 'groups'"):
        Fused("qkv", "heads")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="is the map of an attention"):
        Branch(MLP("mlp", fc_out="out", fused=Fused("both")))
    with pytest.raises(InputError, match="is the map of an MLP"):
        Branch(Attention("attn", o="o", qkv=Fused("qkv", "gate_in")))

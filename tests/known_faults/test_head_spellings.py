"""One parser of names: every spelling in which a component is printed or stored is accepted wherever one is asked for."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits, metrics
from circuitvision.circuits import ablation_check, head_importance
from circuitvision.data import Pairs
from circuitvision.errors import CircuitVisionError, InputError
from circuitvision.model import names
from circuitvision.model.names import NodeName, component, head_name, heads_of, spelled
from circuitvision.readout import (
    direct_attribution,
    ov_circuit,
    qk_circuit,
    rank_components,
    source_attribution,
)
from tests.zoo import CASES, shared_model

LAYER, HEAD = 1, 3
QUALIFIED: dict[str, Any] = {
    "printed": "vision L1H3",
    "with a dot": "vision.L1H3",
    "in tables": "vision layer 1, head 3",
    "graph id": "v.a1.h3",
    "tuple": ("vision", 1, 3),
    "numpy": ("vision", np.int64(1), np.int32(3)),
    "site": "vision.blocks.1.attn.hook_z[3]",
    "node": NodeName("vision", "head", layer=1, head=3),
}
BARE: dict[str, Any] = {"printed": "L1H3", "tuple": (1, 3), "words": "layer 1, head 3", "spaced": "L1 H3"}
TOWERS = {"vision": SimpleNamespace(cfg=SimpleNamespace(n_layers=4, n_heads=6))}


def model_of(name: str) -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name)).double()
    return cv.HookedModel(module), CASES[name].inputs(module, batch=2, dtype=torch.float64)


def by_hand(model: cv.HookedModel, inputs: dict[str, Any], block: Any, head: int, d_head: int) -> Tensor:
    """The output with one head's z set to zero, at the input of the output projection."""

    def zero(module: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., head * d_head : (head + 1) * d_head] = 0
        return (z, *args[1:])

    handle = block.register_forward_pre_hook(zero)
    try:
        with torch.no_grad():
            return getattr(model.module(**inputs), model.family.output)
    finally:
        handle.remove()


@pytest.mark.parametrize("part", QUALIFIED.values(), ids=QUALIFIED)
def test_every_spelling_is_one_head(part: Any) -> None:
    assert component(part) == NodeName("vision", "head", layer=LAYER, head=HEAD)
    assert spelled(part) == "vision L1H3"
    assert heads_of(part, TOWERS) == heads_of([part], TOWERS) == [component("v.a1.h3")]


@pytest.mark.parametrize("part", BARE.values(), ids=BARE)
def test_without_a_tower_it_is_the_only_one(part: Any) -> None:
    assert spelled(part) == "L1H3"
    assert heads_of([part], TOWERS) == [component("v.a1.h3")]
    two = {**TOWERS, "language": TOWERS["vision"]}
    with pytest.raises(InputError) as caught:
        heads_of([part], two)
    assert "language L1H3" in str(caught.value)
    assert heads_of([part], two, "language") == [component("l.a1.h3")]


def test_other_components() -> None:
    for part, node in {
        "L2N118": NodeName("", "neuron", layer=2, feature=118),
        "language.L2N118": NodeName("language", "neuron", layer=2, feature=118),
        "l.m2.n118": NodeName("language", "neuron", layer=2, feature=118),
        "language.blocks.2.mlp.hook_post[118]": NodeName("language", "neuron", layer=2, feature=118),
        "L2.mlp": NodeName("", "mlp", layer=2),
        "L2MLP": NodeName("", "mlp", layer=2),
        "vision L0.mlp": NodeName("vision", "mlp", layer=0),
        "L2.attn": NodeName("", "attn", layer=2),
        "language.blocks.0.attn.hook_k[1]": NodeName("language", "kv_head", layer=0, head=1),
        "vision_2.L3H1": NodeName("vision_2", "head", layer=3, head=1),
    }.items():
        assert component(part) == node
        assert component(spelled(node)) == node
    for wrong in (
        "L1",
        "H3",
        "L1H3H4",
        "vision.",
        "a1.h3",
        "vision.blocks.1.attn.hook_z",
        (1,),
        (1.0, 3),
        (True, 3),
        7,
        None,
    ):
        with pytest.raises(InputError):
            component(wrong)


def test_heads_that_are_not_there() -> None:
    for wrong in ("L4H0", "L0H6", ("vision", 0, 9), "text.L0H0", "t.a0.h0", "L1N3", "L1.mlp", (-5, 0)):
        with pytest.raises(InputError):
            heads_of(wrong, TOWERS)
    assert heads_of((-1, -1), TOWERS) == [component("vision.L3H5")]


@pytest.mark.parametrize("part", [*QUALIFIED.values(), *BARE.values()])
def test_edits_take_a_head_for_a_site(part: Any) -> None:
    model, inputs = model_of("vit")
    layer, head = 1, 2
    # The same spelling of a head, of those that this model has.
    part = part.replace("3", "2") if isinstance(part, str) else part
    if isinstance(part, tuple):
        part = (*part[:-1], head)
    if isinstance(part, NodeName):
        part = NodeName("vision", "head", layer=layer, head=head)
    expected = by_hand(model, inputs, model.module.vit.layers[layer].attention.o_proj, head, model.vision.cfg.d_head)
    with torch.no_grad():
        torch.testing.assert_close(model.run(inputs, edits.ablate(part)), expected, rtol=0, atol=1e-12)
        assert not torch.allclose(expected, model(inputs))
        _, cache = model.run_with_cache(inputs, "**.hook_z")
        zeros = {name: torch.zeros_like(value) for name, value in cache.items() if "hook_z" in name}
        for edit in (edits.scale(part, 0.0), edits.replace(part, 0.0)):
            torch.testing.assert_close(model.run(inputs, edit), expected, rtol=0, atol=1e-12)
        same = model.run(inputs, edits.replace(part, cache))
        torch.testing.assert_close(same, model(inputs), rtol=0, atol=1e-12)
        if edits.ablate(part).site.startswith("vision"):
            torch.testing.assert_close(model.run(inputs, edits.replace(part, zeros)), expected, rtol=0, atol=1e-12)


def test_edits_take_mlps_and_attention_layers() -> None:
    model, inputs = model_of("vit")
    for part, site in (("vision.L1.mlp", "hook_mlp_out"), ("L1.attn", "hook_attn_out"), ("v.m1", "hook_mlp_out")):
        with torch.no_grad():
            expected = model.run(inputs, edits.ablate(f"vision.blocks.1.{site}"))
            assert torch.equal(model.run(inputs, edits.ablate(part)), expected)
            assert not torch.equal(model(inputs), expected)
    with pytest.raises(InputError, match="overwrite"):
        edits.ablate("vision.L1N3")


def test_spelled_heads_of_a_site() -> None:
    site = "vision.blocks.1.attn.hook_pattern"
    wanted = edits.replace(site, 0.0, heads=[2, 0])
    for heads in (["L1H2", "L1H0"], ["v.a1.h2", 0], np.array([2, 0]), torch.tensor([2, 0]), [(1, 2), ("vision", 1, 0)]):
        assert edits.replace(site, 0.0, heads=heads) == wanted
    assert edits.replace("vision.blocks.1.attn.hook_pattern[2]", 0.0) == edits.replace(site, 0.0, heads=2)
    assert edits.replace(site, 0.0, heads="L1H2") == edits.replace(site, 0.0, heads=("vision", 1, 2))
    for heads in ("L0H2", "language.L1H2", ["L1H2", "L2H0"], "L1.mlp", "2", [1.0], [True]):
        with pytest.raises(InputError):
            edits.replace(site, 0.0, heads=heads)
    with pytest.raises(InputError, match="leave heads out"):
        edits.ablate("vision.L1H2", heads=[0])
    with pytest.raises(InputError, match="several edits"):
        edits.ablate("vision.blocks.*.attn.hook_z", heads=["L1H2"])


def test_spelled_heads_of_attention_edits() -> None:
    wanted = edits.block_attention("language", keys=2, layers=1, heads=[3])
    for heads in ("L1H3", ["language.L1H3"], ("language", 1, 3), ["l.a1.h3"]):
        assert edits.block_attention("language", keys=2, heads=heads) == wanted
        assert edits.block_attention("language", keys=2, heads=heads, layers=1) == wanted
    assert edits.scale_attention("language", heads="L1H3").layers == (1,)
    assert edits.add_attention_bias("language", heads="L1H3", bias=1.0).layers == (1,)
    for heads, layers in (("vision.L1H3", None), (["L1H3", "L0H3"], None), ("L1H3", 0), (["L1H3", 2], None)):
        with pytest.raises(InputError):
            edits.block_attention("language", keys=2, heads=heads, layers=layers)


def test_a_site_without_a_tower_needs_a_model_of_one() -> None:
    vit, inputs = model_of("vit")
    assert vit.sites("blocks.*.attn.hook_z") == vit.sites("vision.blocks.*.attn.hook_z")
    assert torch.equal(vit.run(inputs, edits.ablate("L1H2")), vit.run(inputs, edits.ablate("vision.L1H2")))
    clip, inputs = model_of("clip")
    for call in (lambda: clip.sites("blocks.0.attn.hook_z"), lambda: clip.run(inputs, edits.ablate("L0H1"))):
        with pytest.raises(CircuitVisionError) as caught:
            call()
        assert "text.blocks.0.attn.hook_z" in str(caught.value)


def pairs_for(model: cv.HookedModel, inputs: dict[str, Any]) -> Pairs:
    with torch.no_grad():
        answer = model(inputs).argmax(-1).tolist()
    flipped = {name: value.flip(0) for name, value in inputs.items()}
    return Pairs(inputs=inputs, corrupt_inputs=flipped, answers=answer, foils=answer[::-1])


def test_ablation_check_takes_every_spelling() -> None:
    model, inputs = model_of("vit")
    pairs = pairs_for(model, inputs)
    wanted = ablation_check(model, pairs, ["v.a1.h2"], n_random=2)
    for heads in (
        ["L1H2"],
        "L1H2",
        ["vision.L1H2"],
        [(1, 2)],
        (1, 2),
        [("vision", 1, 2)],
        ["vision.blocks.1.attn.hook_z[2]"],
    ):
        found = ablation_check(model, pairs, heads, n_random=2)
        assert found.heads == ["v.a1.h2"]
        assert torch.equal(found.logit_diff, wanted.logit_diff)
    assert ablation_check(model, pairs, ["L1H2", (1, 2), "v.a1.h2"], n_random=2).heads == ["v.a1.h2"]
    assert "vision L1H2" in wanted.summary()
    for heads in (["L9H0"], ["text.L0H0"], ["L1.mlp"], []):
        with pytest.raises(InputError):
            ablation_check(model, pairs, heads, n_random=2)


def test_from_rankings_to_edits_and_back() -> None:
    model, inputs = model_of("vit")
    logits, cache = model.run_with_cache(inputs)
    answer = logits.argmax(-1)
    found = direct_attribution(model, cache, answer, by="head")
    labels = [name for name, _ in found.top(30) if names.is_component(name)]
    assert any("H" in name for name in labels)
    assert any(name.endswith(".mlp") for name in labels)
    for name in labels:
        assert torch.isfinite(model.run(inputs, edits.ablate(name))).all()
    grid = [edits.ablate(head_name(layer, head)) for layer in range(3) for head in range(4)]
    swept = model.sweep(inputs, grid, metrics.logit_diff(answer, answer.roll(1)))
    order = rank_components(swept.values, [head_name(layer, head) for layer in range(3) for head in range(4)])
    assert torch.isfinite(model.run(inputs, [edits.ablate(name) for name in order.axes["component"][:3]])).all()
    importance = head_importance(
        model, metric=metrics.logit_diff(0, 1), clean=inputs, corrupt={"pixel_values": inputs["pixel_values"].flip(0)}
    )
    for name, _, _ in importance.ranking():
        assert edits.ablate(name) == edits.ablate(spelled(name))


def test_circuits_of_a_head() -> None:
    model, _ = model_of("vit")
    tower = model.vision
    for circuit in (ov_circuit, qk_circuit):
        wanted = circuit(tower, 1, 2).AB
        for given in (("L1H2",), ("v.a1.h2",), (("vision", 1, 2),), (np.int64(1), np.int64(2))):
            assert torch.equal(circuit(tower, *given).AB, wanted)
        for wrong in (("L9H0",), ("language.L1H2",), (1,), (1, 9), (1.0, 2)):
            with pytest.raises(InputError):
                circuit(tower, *wrong)
    llava, _ = model_of("llava-clip-llama")
    assert torch.equal(
        ov_circuit(llava.language, "L1H2", tokens=True).AB, ov_circuit(llava.language, 1, 2, tokens=True).AB
    )


def test_figures_of_chosen_heads() -> None:
    model, inputs = model_of("llava-clip-llama")
    logits, cache = model.run_with_cache(inputs)
    found = source_attribution(model, cache, logits[:, -1].argmax(-1))
    titles = [a.text for a in found.plot(heads=[(0, 1), (1, 2)]).layout.annotations]
    for heads in (["L0H1", "language.L1H2"], ["l.a0.h1", ("language", 1, 2)]):
        assert [a.text for a in found.plot(heads=heads).layout.annotations] == titles
    with pytest.raises(InputError):
        found.plot(heads=["vision.L0H1"])


def test_mutant_layer_and_head_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    right = names._read

    def swapped(part: Any) -> NodeName | None:
        node = right(part)
        return node and NodeName(node.tower, node.kind, node.head, node.layer, node.feature, node.label, node.pos)

    monkeypatch.setattr(names, "_read", swapped)
    with pytest.raises(AssertionError):
        test_every_spelling_is_one_head("v.a1.h3")
    with pytest.raises(AssertionError):
        test_edits_take_a_head_for_a_site("vision.L1H3")

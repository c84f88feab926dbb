"""Results with a baseline are ranked by what they change, and a grid's axes say what its edits carry. Truth: torch hooks on the raw module."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps.result import SweepResult
from circuitvision.patching.activation import activation_patch
from circuitvision.results import Result
from tests.zoo import case, shared_model


def metric(logits: Tensor) -> Tensor:
    return logits[:, 3] - logits[:, 1]


def vit() -> tuple[Any, dict[str, Any], list[tuple[int, int]]]:
    module = copy.deepcopy(shared_model("vit")).double().eval()
    inputs = case("vit").inputs(module, batch=3, dtype=torch.float64)
    config = module.config
    return module, inputs, list(itertools.product(range(config.num_hidden_layers), range(config.num_attention_heads)))


def without_head(module: Any, inputs: dict[str, Any], layer: int, head: int) -> Tensor:
    """The logits with one head's output zeroed before the output projection."""
    width = module.config.hidden_size // module.config.num_attention_heads

    def hook(_: Any, args: Any) -> Any:
        z = args[0].clone()
        z[..., head * width : (head + 1) * width] = 0
        return (z, *args[1:])

    blocks = next(part for name, part in module.named_modules() if name.endswith("layer") or name.endswith("layers"))
    parts = dict(blocks[layer].named_modules())
    output = next(n for n in parts if "attention" in n and n.endswith(("output.dense", "o_proj")))
    handle = parts[output].register_forward_pre_hook(hook)
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        handle.remove()


def swept(order: str = "layer first", **axes: Any) -> tuple[SweepResult, Tensor, list[tuple[int, int]]]:
    module, inputs, cells = vit()
    with torch.no_grad():
        clean = metric(module(**inputs).logits)
    truth = torch.stack([metric(without_head(module, inputs, *cell)) - clean for cell in cells]).mean(1)
    groups = [edits.ablate(f"vision.blocks.{layer}.attn.hook_z", heads=head) for layer, head in cells]
    return cv.HookedModel(module).sweep(inputs, groups, metric, progress=False, **axes), truth, cells


def check_ranking() -> None:
    module, _, cells = vit()
    layers, heads = range(module.config.num_hidden_layers), range(module.config.num_attention_heads)
    result, truth, cells = swept(axes={"layer": layers, "head": heads})
    order = truth.abs().argsort(descending=True).tolist()
    names = [f"L{cells[index][0]}H{cells[index][1]}" for index in order]
    found = cv.readout.rank_components(result)
    assert found.axes["component"] == names
    torch.testing.assert_close(found.scores, truth[order], rtol=0, atol=1e-10)
    assert found.top(3) == names[:3]
    assert [value for _, value in result.top(3)] == pytest.approx(found.scores[:3].tolist())
    assert (
        cv.readout.rank_components(result, by="value").axes["component"][0]
        == max(zip(truth.tolist(), [f"L{a}H{b}" for a, b in cells], strict=True))[1]
    )
    flat = cv.readout.rank_components(swept()[0])
    assert flat.axes["component"] == [result.labels[index] for index in order]
    assert "unedited" in result._repr_html_()


def test_a_sweep_is_ranked_by_effect() -> None:
    check_ranking()


def test_ranking_the_metric_itself_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SweepResult, "component_scores", Result.component_scores)
    with pytest.raises(AssertionError):
        check_ranking()


def test_positions_that_were_edited_are_components() -> None:
    module, inputs, _ = vit()
    model = cv.HookedModel(module)
    groups = [edits.ablate(f"vision.blocks.{layer}.hook_resid_pre", positions=p) for layer in (0, 1) for p in range(4)]
    result = model.sweep(inputs, groups, metric, axes={"layer": (0, 1), "position": range(4)}, progress=False)
    found = cv.readout.rank_components(result)
    assert len(found.axes["component"]) == 8
    best = int(result.effect.mean(-1).abs().flatten().argmax())
    assert found.top(1) == [f"layer {best // 4}, position {best % 4}"]


def test_interrupted_sweeps_are_ranked_by_what_was_done() -> None:
    result, truth, _ = swept()
    values = result.values.clone()
    values[int(truth.abs().argmax())] = float("nan")
    cut = SweepResult(values, result.axes, clean=result.clean, edits=result.edits, done=result.done)
    order = truth.abs().argsort(descending=True).tolist()
    assert cv.readout.rank_components(cut).axes["component"] == [result.labels[i] for i in (*order[1:], order[0])]


def test_patching_is_ranked_by_cells_and_checks_are_not_ranked() -> None:
    module, inputs, _ = vit()
    other = {"pixel_values": inputs["pixel_values"].flip(0)}
    found = activation_patch(
        cv.HookedModel(module),
        metric=metric,
        clean=inputs,
        corrupt=other,
        sites="vision.blocks.*.hook_resid_pre",
        axes=("layer", "position"),
    )
    ranked = cv.readout.rank_components(found)
    assert len(ranked.values) == found.restored.numel()
    effects = found.mean()
    layer, position = divmod(int(effects.abs().argmax()), effects.shape[1])
    assert ranked.top(1) == [f"layer {layer}, position {position}"]
    assert float(ranked.scores[0]) == pytest.approx(float(effects[layer, position]))
    check = cv.circuits.AblationCheck(torch.rand(3), {"condition": ["intact", "heads", "random 1"]})
    with pytest.raises(InputError, match="conditions"):
        cv.readout.rank_components(check)


# -- axes ----------------------------------------------------------------------------------------------------------------------------------


def refused(axes: dict[str, Any], words: str, make: Any = None) -> None:
    module, inputs, cells = vit()
    model = cv.HookedModel(module)
    groups = make or [edits.ablate(f"vision.blocks.{layer}.attn.hook_z", heads=head) for layer, head in cells]
    runs: list[int] = []
    handle = module.register_forward_hook(lambda *_: runs.append(1))
    with pytest.raises(InputError, match=words):
        model.sweep(inputs, groups, metric, axes=axes, progress=False)
    handle.remove()
    assert runs == []
    assert model.engine.stack == []


def check_order() -> None:
    _, _, cells = vit()
    layers, heads = max(cells)[0] + 1, max(cells)[1] + 1
    refused({"head": range(heads), "layer": range(layers)}, "axes in the order layer, head fit")


def test_axes_in_another_order_are_refused_with_the_right_one() -> None:
    check_order()


def test_believing_the_axes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitvision.incremental.sweeps.study.check_axes", lambda *_: None)
    with pytest.raises(pytest.fail.Exception):
        check_order()


def test_labels_that_contradict_the_edits() -> None:
    _, _, cells = vit()
    layers, heads = max(cells)[0] + 1, max(cells)[1] + 1
    refused({"layer": range(1, layers + 1), "head": range(heads)}, "no order")
    refused({"layer": [*range(layers)][::-1], "head": range(heads)}, "no order")
    refused({"layers": range(layers), "heads": [*range(1, heads), 0]}, "no order")
    refused({"example": range(layers * heads)}, "the sweep's own")
    positions = [edits.ablate("vision.hook_input", positions=p) for p in (3, 2, 1)]
    refused({"position": (1, 2, 3)}, "no order", positions)
    neurons = [edits.overwrite("vision.blocks.0.mlp.hook_post", [n], 0.0) for n in (4, 5)]
    refused({"neuron": (5, 4)}, "no order", neurons)
    sites = [edits.ablate(f"vision.blocks.0.{site}") for site in ("hook_attn_out", "hook_mlp_out")]
    refused({"site": ["mlp_out", "attn_out"]}, "no order", sites)
    blocked = [edits.block_attention("vision", queries=q, keys=k, layers=0) for q in (1, 2) for k in (3, 4)]
    refused({"key": (3, 4), "query": (1, 2)}, "axes in the order query, key fit", blocked)


def test_axes_that_fit_or_say_something_else_pass() -> None:
    module, inputs, cells = vit()
    model = cv.HookedModel(module)
    layers, heads = max(cells)[0] + 1, max(cells)[1] + 1

    def sweep(groups: Any, axes: dict[str, Any]) -> None:
        assert list(model.sweep(inputs, groups, metric, axes=axes, progress=False).axes)[:-1] == list(axes)

    by_layer = [edits.ablate(f"vision.blocks.{layer}.attn.hook_z", heads=head) for layer, head in cells]
    sweep(by_layer, {"layer": range(layers), "head": range(heads)})
    sweep(by_layer, {"layer": range(-layers, 0), "head": range(-heads, 0)})
    sweep(by_layer, {"Layer": [str(n) for n in range(layers)], "head": [f"head {n}" for n in range(heads)]})
    sweep(by_layer, {"depth": range(1, layers + 1), "head": range(heads)})
    by_head = [by_layer[layer * heads + head] for head in range(heads) for layer in range(layers)]
    sweep(by_head, {"head": range(heads), "layer": range(layers)})
    scaled = [edits.scale(f"vision.blocks.{layer}.hook_mlp_out", f) for f in (0.0, 2.0) for layer in range(layers)]
    sweep(scaled, {"factor": (0.0, 2.0), "layer": range(layers)})
    last = [edits.ablate("vision.hook_input", positions=p) for p in (-1, -2)]
    sweep(last, {"position": (-1, -2)})
    pairs = [
        [edits.ablate(f"vision.blocks.{layer}.hook_mlp_out"), edits.ablate("vision.hook_input", positions=0)]
        for layer in (0, 1)
    ]
    sweep(pairs, {"layer": (0, 1)})
    sweep([[], edits.ablate("vision.blocks.1.hook_mlp_out")], {"layer": (0, 1)})


def test_patching_labels_its_own_axes_whatever_their_order() -> None:
    module, inputs, cells = vit()
    other = {"pixel_values": inputs["pixel_values"].flip(0)}
    model, sites = cv.HookedModel(module), "vision.blocks.*.attn.hook_z"
    one = activation_patch(model, metric=metric, clean=inputs, corrupt=other, sites=sites, axes=("layer", "head"))
    two = activation_patch(model, metric=metric, clean=inputs, corrupt=other, sites=sites, axes=("head", "layer"))
    for layer, head in cells:
        index = tuple({"layer": layer, "head": head}[name] for name in two.cells)
        torch.testing.assert_close(two.values[index], one.values[layer, head], equal_nan=True)

"""Head importance of heads, MLPs, key and value groups and neurons, by every method, against plain PyTorch hooks and numbers known in closed form."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.circuits import HeadImportance, head_importance, schema
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.readout import rank_components
from tests.test_path_patch import models
from tests.toy_model import ToyModel

pytestmark = [pytest.mark.filterwarnings("ignore:The two runs do not differ"), pytest.mark.usefixtures("tables")]
ALL = ("heads", "mlps", "kv_heads", "neurons")
EXACT: dict[str, Any] = {"rel": 0.0, "abs": 1e-9}


def score(logits: Tensor) -> Tensor:
    """A curved metric of every example."""
    return logits.flatten(1)[:, ::3].sin().sum(-1)


def importance(name: str, **options: Any) -> tuple[Any, dict[str, Any], dict[str, Any], HeadImportance]:
    model, _, clean, corrupt = models(name)
    given = {"clean": clean, "corrupt": corrupt, "metric": score, "neurons": 3, "progress": False, **options}
    return model, clean, corrupt, head_importance(model, **given)


def places(unit: str, model: Any, groups: dict[str, list[int]]) -> list[tuple[str, Any]]:
    """The sites of a unit and the index of its part of each, read off its id by hand."""
    node = cv.circuits.parse_id(unit)
    block = f"{node.tower}.blocks.{node.layer}"
    if node.kind == "head":
        return [(f"{block}.attn.hook_z", (..., node.head, slice(None)))]
    if node.kind == "kv_head":
        return [(f"{block}.attn.hook_{stage}", (..., node.head, slice(None))) for stage in ("k", "v")]
    if node.kind == "neuron_group":
        return [(f"{block}.mlp.hook_post", (..., groups[unit]))]
    if node.kind == "connector":
        return [(f"{node.label}.hook_out", ...)]
    return [(f"{block}.hook_mlp_out", ...)]


def put(index: Any, source: Any) -> Callable[[Tensor, Any], Tensor]:
    def hook(value: Tensor, point: Any) -> Tensor:
        new = value.clone()
        new[index] = source[index] if isinstance(source, Tensor) else source
        return new

    return hook


@pytest.mark.parametrize("name", ["vit", "llava-clip-mistral", "paligemma", "clip"])
@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_every_unit_is_patched_as_a_hook_would(name: str, mode: str) -> None:
    model, clean, corrupt, found = importance(name, units=ALL, mode=mode, top_k=0)
    base, source = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    start = score(model(base))
    kinds = set()
    for unit, at in found._cells():
        kinds.add(cv.circuits.parse_id(unit).kind)
        sites = places(unit, model, found.neuron_groups)
        cache = model.run_with_cache(source, names_filter=[site for site, _ in sites])[1]
        hooks = [(site, put(index, cache[site])) for site, index in sites]
        effect = score(model.run_with_hooks(base, fwd_hooks=hooks)) - start
        torch.testing.assert_close(found.values[at], effect, rtol=0, atol=1e-9)
    assert kinds == {"head", "mlp", "kv_head", "neuron_group"}
    sizes = [len(group) for group in found.neuron_groups.values()]
    assert len(sizes) == 3 * sum(tower.cfg.n_layers for tower in model.towers.values())


@pytest.mark.parametrize("name", ["vit", "llava-clip-mistral"])
@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablation_is_of_the_clean_run_and_needs_no_other(name: str, method: str) -> None:
    model, clean, corrupt, found = importance(name, method=method, units=ALL, top_k=0)
    start = score(model(clean))
    for unit, at in found._cells():
        sites = places(unit, model, found.neuron_groups)
        caches = [model.run_with_cache(one, names_filter=[site for site, _ in sites])[1] for one in (clean, corrupt)]
        both = {site: torch.cat([cache[site] for cache in caches]).mean(0, keepdim=True) for site, _ in sites}
        hooks = []
        for site, index in sites:
            wanted = both[site].expand_as(caches[0][site]) if method == "mean" else 0.0
            hooks.append((site, put(index, wanted)))
        effect = score(model.run_with_hooks(clean, fwd_hooks=hooks)) - start
        torch.testing.assert_close(found.values[at], effect, rtol=0, atol=1e-9)
    assert found.mode == "noise"
    alone = head_importance(model, metric=score, clean=clean, method="zero", progress=False, top_k=1)
    assert not alone.second_run
    assert alone.shares.isnan().all()
    graph = alone.to_networkx()
    schema.validate(graph)
    assert graph.graph["intervention"] == "zero ablation"
    assert graph.graph["corruption"] == ""


def holding(model: Any, sender: str, held: list[tuple[str, Any]], base: Any, source: Any, groups: Any) -> Tensor:
    """The change of the metric with a sender patched and places held, by hooks."""
    sites = places(sender, model, groups)
    cache = model.run_with_cache(source, names_filter=[site for site, _ in sites])[1]
    kept = model.run_with_cache(base, names_filter=[site for site, _ in held])[1] if held else {}
    hooks = [(site, put(index, cache[site])) for site, index in sites]
    hooks += [(site, put(index, kept[site])) for site, index in held]
    with torch.no_grad():
        return (score(model.run_with_hooks(base, fwd_hooks=hooks)) - score(model(base))).mean()


@pytest.mark.parametrize("name", ["vit", "llava-clip-mistral", "paligemma"])
def test_edges_are_what_holding_one_slot_after_another_takes_away(name: str) -> None:
    model, clean, corrupt, found = importance(name, units=("heads", "mlps"), top_k=2)
    edges = {(one["sender"], one["receiver"], one["slot"]): one["score"] for one in found.edges}
    order = sorted(
        [*found.selected, *found.connectors],
        key=lambda unit: _depth(model, unit),
    )
    checked = 0
    for number, sender in enumerate(order):
        done: list[tuple[str, Any]] = []
        before = holding(model, sender, done, corrupt, clean, {})
        for receiver in order[number + 1 :]:
            if _depth(model, receiver) == _depth(model, sender):
                continue
            for slot, own in _slots(receiver):
                after = holding(model, sender, [*done, own], corrupt, clean, {})
                assert edges.get((sender, receiver, slot), 0.0) == pytest.approx(
                    float(before - after), rel=1e-5, abs=1e-4
                )
                checked += abs(float(before - after)) > 1e-5
                before = after
            done.append(_slots(receiver)[-1][1])
        assert edges.get((sender, "answer", "in"), 0.0) == pytest.approx(float(before), rel=1e-5, abs=1e-4)
    assert checked >= 3


def _depth(model: Any, unit: str) -> tuple[int, int, int]:
    node = cv.circuits.parse_id(unit)
    stage = node.label if node.kind == "connector" else node.tower
    return model.flow.stages.index(stage), max(node.layer, 0), {"head": 1, "mlp": 2}.get(node.kind, 0)


def _slots(unit: str) -> list[tuple[str, tuple[str, Any]]]:
    node = cv.circuits.parse_id(unit)
    block = f"{node.tower}.blocks.{node.layer}"
    if node.kind == "connector":
        return [("in", (f"{node.label}.hook_out", ...))]
    if node.kind == "mlp":
        return [("in", (f"{block}.hook_mlp_out", ...))]
    head = (slice(None), slice(None), node.head)
    return [
        ("q", (f"{block}.attn.hook_q", head)),
        ("k", (f"{block}.attn.hook_pattern", (slice(None), node.head))),
        ("v", (f"{block}.attn.hook_z", head)),
    ]


@pytest.mark.parametrize("name", ["vit", "llava-clip-mistral", "paligemma", "clip", "pi0"])
@pytest.mark.parametrize("method", ["patch", "zero", "attribution"])
def test_out_edges_of_any_unit_add_up_to_its_measured_effect(name: str, method: str) -> None:
    _, _, _, found = importance(name, units=ALL, top_k=3, method=method, n_random=3)
    graph = found.to_networkx() if not found.shares[found.effects.isfinite()].isnan().any() else None
    totals: dict[str, float] = {}
    for edge in found.edges:
        totals[edge["sender"]] = totals.get(edge["sender"], 0.0) + edge["score"]
    for unit in found.selected:
        assert totals.get(unit, 0.0) == pytest.approx(found.exact[unit], abs=1e-4 * abs(found.exact[unit]) + 1e-6)
    assert {edge["slot"] for edge in found.edges} >= {"in"}
    if graph is not None:
        schema.validate(graph)
        assert nx.is_directed_acyclic_graph(graph)


def test_attribution_is_the_first_order_term() -> None:
    """Near the clean run the estimate and the patch agree to second order in the distance."""
    model, _, clean, corrupt = models("llava-clip-mistral")
    gaps = []
    for step in (1e-2, 1e-3):
        near = {k: v + step * (clean[k] - v) if k == "pixel_values" else v for k, v in corrupt.items()}
        given: dict[str, Any] = {"clean": near, "corrupt": corrupt, "metric": score, "units": ALL, "top_k": 0}
        exact, estimate = (
            head_importance(model, **given, method=method, progress=False) for method in ("patch", "attribution")
        )
        gaps.append(float((exact.values - estimate.values).nan_to_num(0.0).abs().max()))
        assert float(exact.values.nan_to_num(0.0).abs().max()) > 20 * gaps[-1]
    assert gaps[0] / gaps[1] > 50


def test_direct_holds_every_other_head_and_mlp() -> None:
    model, clean, corrupt, found = importance("vit", units=("heads", "mlps"), method="direct", top_k=0)
    start = score(model(corrupt))
    sites = [f"vision.blocks.{n}.hook_{part}_out" for n in range(model.vision.cfg.n_layers) for part in ("attn", "mlp")]
    kept = model.run_with_cache(corrupt, names_filter=sites)[1]
    for unit, at in found._cells():
        ((site, index),) = places(unit, model, {})
        cache = model.run_with_cache(clean, names_filter=[site])[1]
        node = cv.circuits.parse_id(unit)
        later = [one for one in sites if sites.index(one) > 2 * node.layer + (node.kind == "mlp")]
        hooks = [(site, put(index, cache[site])), *((one, put(..., kept[one])) for one in later)]
        effect = score(model.run_with_hooks(corrupt, fwd_hooks=hooks)) - start
        torch.testing.assert_close(found.values[at], effect, rtol=0, atol=1e-9)
    with pytest.raises(InputError, match="direct"):
        importance("vit", units="neurons", method="direct")


def test_direct_effects_of_both_towers_of_a_dual_encoder_and_of_a_prefix() -> None:
    _, _, _, found = importance("clip", method="direct", top_k=1)
    assert found.axes["tower"] == ["vision", "text"]
    assert float(found.effects[0].abs().max()) > 1e-3
    # The texts are the same in both runs.
    assert float(found.effects[1].nan_to_num().abs().max()) < 1e-9
    _, _, _, policy = importance("pi0", method="direct", top_k=1)
    assert float(policy.effects[-1].nan_to_num().abs().max()) > 1e-3


def test_random_sets_of_an_additive_model_have_the_mean_effect() -> None:
    """y = Σ c_h: sets of one other head score c_h, each once, so their mean is the mean of the others."""
    vision = torch.tensor([[3.0, 0.5, -1.0, 2.0, 0.25]], dtype=torch.float64)
    toy = ToyModel(vision, torch.zeros(1, 1, dtype=torch.float64), leak=1.0)
    clean, corrupt = ({"picture": torch.tensor([level], dtype=torch.float64)} for level in (2.0, 1.0))
    found = head_importance(toy, metric=logit_diff(0, 1), clean=clean, corrupt=corrupt, towers=["vision"], top_k=1)
    assert found.selected == ["v.a0.h0"]
    assert sorted(found.random_sets) == [[f"v.a0.h{head}"] for head in range(1, 5)]
    expected = (vision[0, 1:].mean() / vision.sum()).item()
    assert float(found.random_joint.mean()) == pytest.approx(expected)
    assert found.p_random == pytest.approx(1 / 5)
    assert [name for name, _, _ in found.ranking()] == [f"v.a0.h{head}" for head in (0, 3, 2, 1, 4)]
    # 3 of its size stands out by mean + 1 sd of the sizes, not by 2.
    sizes = vision[0].abs()
    ranked = rank_components(found)
    for deviations in (1.0, 2.0):
        limit = float(sizes.mean() + deviations * sizes.std(correction=0))
        assert len(ranked.above_threshold(deviations)) == int((sizes >= limit).sum())


def test_random_sets_are_disjoint_of_the_same_towers_and_drawn_by_the_seed() -> None:
    given: dict[str, Any] = {"units": ("heads", "mlps"), "top_k": 1, "n_random": 6}
    found, again, other = (importance("llava-clip-mistral", **given, seed=seed)[3] for seed in (0, 0, 1))
    assert found.random_sets == again.random_sets != other.random_sets
    kinds = sorted((cv.circuits.parse_id(one).tower, cv.circuits.parse_id(one).kind) for one in found.selected)
    for draw in found.random_sets:
        assert not set(draw) & set(found.selected)
        assert sorted((cv.circuits.parse_id(one).tower, cv.circuits.parse_id(one).kind) for one in draw) == kinds


def test_where_no_random_set_can_be_drawn_a_warning_says_so() -> None:
    with pytest.warns(UserWarning, match="top_k"):
        found = importance("vit", top_k=100, n_random=3)[3]
    assert found.random_sets == []
    assert found.p_random != found.p_random


def gain(first: Tensor, second: Tensor) -> Tensor:
    one, two = first.double().log_softmax(-1), second.double().log_softmax(-1)
    middle = torch.logaddexp(one, two) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    return sum((p.exp() * (p - middle)).sum(-1) for p in (one, two)) / 2  # type: ignore[return-value]


def test_information_gain_is_the_divergence_that_goes_with_the_unit() -> None:
    model = cv.organisms.load("shapes-vit")
    pairs = cv.organisms.pairs("shapes-vit", 6, 0)
    found = head_importance(model, pairs, "logit_diff", method="information_gain", top_k=2, n_random=4, progress=False)
    batch = next(iter(pairs.batches(model, 6)))
    assert batch.other is not None
    whole = gain(model(batch.inputs), model(batch.other))
    torch.testing.assert_close(found.base.double(), whole, rtol=1e-4, atol=1e-6)
    unit = found.selected[0]
    site, head = f"vision.blocks.{cv.circuits.parse_id(unit).layer}.attn.hook_z", cv.circuits.parse_id(unit).head
    both = [model.run_with_cache(one, names_filter=[site])[1][site] for one in (batch.inputs, batch.other)]
    mean = torch.cat(both).mean(0, keepdim=True).expand_as(both[0])
    hooks = [(site, put((..., head, slice(None)), mean))]
    left = gain(*(model.run_with_hooks(one, fwd_hooks=hooks) for one in (batch.inputs, batch.other)))
    torch.testing.assert_close(found.values[found.place(unit)].double(), left - whole, rtol=1e-3, atol=1e-5)
    assert found.examples == list(pairs.numbers)
    schema.validate(found.to_networkx())
    with pytest.raises(InputError, match="pairs"):
        head_importance(model, metric="kl", clean=batch.inputs, corrupt=batch.other, method="information_gain")


def test_resampling_takes_another_example_of_both_sides() -> None:
    model = cv.organisms.load("shapes-vit")
    pairs = cv.organisms.pairs("shapes-vit", 4, 0)
    runs = [
        head_importance(
            model, pairs, "logit_diff", method="resample", top_k=0, seed=seed, progress=False, example_batch=size
        )
        for seed, size in ((0, 4), (0, 2), (1, 4))
    ]
    torch.testing.assert_close(runs[0].values, runs[1].values, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert not torch.allclose(runs[0].values, runs[2].values, atol=1e-3, equal_nan=True)
    assert float(runs[0].values.nan_to_num(0.0).abs().max()) > 0.1


def test_units_have_names_in_tables_rankings_and_files(tmp_path: Any) -> None:
    _, _, _, found = importance("llava-clip-mistral", units=ALL, top_k=1)
    names = rank_components(found).axes["component"]
    assert {"vision L0H0", "vision L1.mlp", "l.kv0.g0", "v.m1.g2"} <= set(names)
    again = HeadImportance.load(found.save(tmp_path / "found.safetensors"))
    assert (again.edges, again.exact, again.random_sets) == (found.edges, found.exact, found.random_sets)
    assert again.neuron_groups == found.neuron_groups
    assert set(found.to_frame().columns) >= {"tower", "layer", "unit"}
    assert sum(one.type == "heatmap" for one in found.plot().data) == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "knockout"}, "method"),
        ({"units": "features"}, "units"),
        ({"units": ()}, "units"),
        ({"towers": ["audio"]}, "towers"),
        ({"top_k": -1}, "top_k"),
        ({"n_random": 1.5}, "n_random"),
        ({"units": "neurons", "neurons": 10_000}, "neurons"),
        ({"method": "information_gain"}, "pairs"),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_runs(options: dict[str, Any], said: str) -> None:
    model, _, clean, corrupt = models("vit")
    calls = []
    handle = model.module.register_forward_hook(lambda *_: calls.append(1))
    with contextlib.closing(contextlib.ExitStack()) as stack:
        stack.callback(handle.remove)
        with pytest.raises(InputError, match=said):
            head_importance(model, metric=score, clean=clean, corrupt=corrupt, progress=False, **options)
    assert not calls


@pytest.mark.parametrize("method", ["zero", "mean"])
def test_some_neurons_are_ablated_and_the_others_left(method: str) -> None:
    model, _, clean, corrupt = models("vit")
    site, chosen = "vision.blocks.1.mlp.hook_post", [0, 3, 7]
    value, other = (model.run_with_cache(one, names_filter=[site])[1][site] for one in (clean, corrupt))
    mean = torch.cat([value, other]).mean(0, keepdim=True).expand_as(value)
    data = {"dataset": [clean, corrupt]} if method == "mean" else {}
    found = model.run(clean, [edits.ablate(site, method, neurons=chosen, **data)])
    wanted = model.run_with_hooks(clean, fwd_hooks=[(site, put((..., chosen), mean if method == "mean" else 0.0))])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(found, model(clean))
    made, tensors = edits.ablate(site, neurons=chosen), {}
    assert edits.from_dict(edits.to_dict(made, tensors), tensors) == made


def test_neurons_that_are_not_there_are_refused() -> None:
    model, _, clean, _ = models("vit")
    with pytest.raises(InputError, match="neurons"):
        model.run(clean, [edits.ablate("vision.blocks.0.mlp.hook_post", neurons=[10_000])])
    for wrong in ((), (-1.5,)):
        with pytest.raises((InputError, TypeError)):
            model.run(clean, [edits.ablate("vision.blocks.0.mlp.hook_post", neurons=wrong)])

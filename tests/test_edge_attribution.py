"""Scores of edges: identities in float64 on tiny models of several families, and the result that holds them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.circuits import EdgeAttribution, computational_graph, edge_attribution, validate
from circuitvision.circuits.edge_scores import EdgeEstimator
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import attribution_patch
from circuitvision.patching.runs import two_runs
from tests.edge_models import FAMILIES, Example, double_throughout, score, ungrouped
from tests.test_attribution_patch import images, uniform, vit

pytestmark = [
    pytest.mark.filterwarnings("ignore:The two runs do not differ"),
    pytest.mark.filterwarnings("ignore:In . of . cases the edges"),
]


def scored(found: Any, metric: Any = score, **options: Any) -> EdgeAttribution:
    given = {"clean": found.clean, "corrupt": found.corrupt, **options}
    return edge_attribution(found.model, metric=metric, progress=False, **given)


def only_edges(result: EdgeAttribution) -> Tensor:
    return result.values[result.edges]


@pytest.fixture(scope="module", params=FAMILIES)
def example(request: pytest.FixtureRequest) -> Iterator[Example]:
    with double_throughout():
        yield Example(request.param)


# -- what a score is -------------------------------------------------------------------------------------------------------------------------------


def test_eap_is_the_gradient_of_a_mask_on_every_edge(example):
    mask = torch.zeros(example.graph.edges.shape, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(example.under(mask)).sum(), mask)
    result = scored(example)
    assert result.edges.equal(example.graph.edges)
    assert gradient[example.graph.edges].abs().max() > 1e-3
    torch.testing.assert_close(only_edges(result).sum(-1), gradient[example.graph.edges], rtol=1e-11, atol=1e-10)
    # That gradient is the slope of the masked run; the step is wide because some softmaxes are counted in float32.
    largest = result.values.abs().sum(-1).masked_fill(~result.edges, 0).flatten().topk(3).indices
    for place in zip(*(axis.tolist() for axis in torch.unravel_index(largest, result.edges.shape)), strict=True):
        ends = []
        for step in (1e-3, -1e-3):
            moved = torch.zeros_like(mask, requires_grad=False)
            moved[place] = step
            ends.append(score(example.under(moved)).detach())
        slope = (ends[0] - ends[1]) / 2e-3
        torch.testing.assert_close(result.values[place], slope, rtol=1e-2, atol=1e-2 * float(slope.abs().max()))


def test_the_out_edges_of_a_node_add_up_to_its_own_attribution(example):
    totals = scored(example).node_scores()
    for part, axes in (("attn.hook_z", ("layer", "head")), ("hook_mlp_out", ("layer",))):
        given = {"clean": example.clean, "corrupt": example.corrupt, "mode": "noise", "progress": False}
        nodes = attribution_patch(example.model, metric=score, sites=f"**.blocks.*.{part}", axes=axes, **given)
        for number, sender in enumerate(example.graph.senders):
            if sender.site.endswith(part):
                place = [nodes.index_of("tower", sender.tower)] if "tower" in nodes.axes else []
                place += [nodes.index_of("layer", sender.node.place[0])]
                place += [] if sender.node.head is None else [sender.node.head]
                torch.testing.assert_close(totals[number], nodes.values[tuple(place)], rtol=1e-11, atol=1e-11)


def test_a_point_of_the_masks_path_has_the_gradient_of_every_mask_there(example):
    mask = (0.25 * example.graph.edges.double()).requires_grad_(True)
    (gradient,) = torch.autograd.grad(score(example.under(mask)).sum(), mask)
    at = EdgeEstimator(example.model, example.graph, example.clean, [(0.25, 1.0)], "masks")
    batch = next(iter(two_runs(example.model, None, score, example.clean, example.corrupt, "noise").batches(at.read())))
    found = at.batch(batch).values[0].sum(0)[..., 0]
    torch.testing.assert_close(found[example.graph.edges], gradient[example.graph.edges], rtol=1e-10, atol=1e-10)


def test_it_equals_scores_from_a_copy_of_the_stream_for_every_head():
    """The split of EAP's code: record every slot's own input, and every head's own output."""
    with double_throughout():
        found = Example("llava-clip-llama")
        slots = list(dict.fromkeys(one.slot.site for one in found.graph.slots))
        _, here = found.model.run_with_cache(found.clean, [*slots, *found.graph.sites], incl_bwd=True, metric=score)
        result = scored(found)
        checked = 0
        for row, sender in enumerate(found.graph.senders):
            value = found.source[sender.site] - here[sender.site].detach()
            if sender.node.head is not None:
                tower = found.model.towers[sender.tower]
                weight = tower.W_O[sender.node.place[0], sender.node.head]
                value = value[:, :, sender.node.head] @ weight
            elif sender.images is not None:
                numbers = torch.from_numpy(found.model.tokens(found.clean)[sender.tower].image_number)
                value = value * ((numbers >= 0) == sender.images).unsqueeze(-1)
            for column, receiver in enumerate(found.graph.slots):
                if found.graph.edges[row, column]:
                    gradient = here[f"{receiver.slot.site}_grad"]
                    gradient = gradient if receiver.slot.head is None else gradient[:, :, receiver.slot.head]
                    expected = (value * gradient).sum((1, 2))
                    torch.testing.assert_close(result.values[row, column], expected, rtol=1e-10, atol=1e-10)
                    checked += 1
        assert checked == found.graph.n_edges


def test_a_groups_edge_is_the_sum_of_the_edges_of_the_heads_that_share_it():
    with double_throughout():
        found = Example("llava-clip-llama")
        other = ungrouped(found)
        torch.testing.assert_close(other.base, found.base, rtol=0, atol=1e-12)
        grouped, each = scored(found), scored(other)
        for layer, group, letter in ((0, 0, "k"), (0, 1, "v"), (1, 1, "k"), (1, 0, "v")):
            slot = f"l.kv{layer}.g{group}<{letter}>"
            column = found.graph.slot_ids.index(slot)
            for row in found.graph.edges[:, column].nonzero().flatten().tolist():
                sender = found.graph.sender_ids[row]
                heads = sum(each.edge(f"{sender}->l.a{layer}.h{2 * group + one}<{letter}>") for one in range(2))
                torch.testing.assert_close(grouped.edge(f"{sender}->{slot}"), heads, rtol=1e-10, atol=1e-10)


# -- paths -----------------------------------------------------------------------------------------------------------------------------------------


class Near:
    """A small random ViT whose two runs lie near each other, so that rules of quadrature show their order."""

    def __init__(self, linear: bool = False) -> None:
        self.model = vit(linear=linear)
        self.clean = images(1)
        self.corrupt = {"pixel_values": self.clean["pixel_values"] + 0.05 * images(2)["pixel_values"]}


def test_the_edges_out_of_the_input_add_up_along_the_path_of_the_inputs():
    near = Near()
    gaps = {
        (rule, steps): scored(near, method="eap-ig", quadrature=rule, steps=steps).completeness_gap.abs().max()
        for rule in ("gauss", "midpoint", "left")
        for steps in (8, 16)
    }
    result = scored(near, method="eap-ig", steps=16)
    change = (result.source - result.base).abs().max()
    assert gaps["gauss", 16] < 1e-6 * change
    assert gaps["midpoint", 8] / gaps["midpoint", 16] > 3.5
    assert gaps["left", 8] / gaps["left", 16] > 1.8
    leaving = result.values[result.index_of("sender", "v.input")].nansum(0)
    torch.testing.assert_close(leaving, result.source - result.base, rtol=1e-6, atol=1e-9)


def test_all_edges_add_up_along_the_path_of_the_masks():
    result = scored(Near(), method="mask-ig", steps=12)
    torch.testing.assert_close(result.values.nansum((0, 1)), result.source - result.base, rtol=1e-6, atol=1e-9)
    assert result.completeness_gap.abs().max() < 1e-8
    # The edges of one gradient alone do not.
    assert (scored(Near()).values.nansum((0, 1)) - (result.source - result.base)).abs().max() > 1e-3


def test_turning_the_path_round_turns_the_sign():
    near = Near()
    turned = {"clean": near.corrupt, "corrupt": near.clean}
    for options in (
        {"method": "eap-ig", "steps": 5},
        {"method": "eap-ig", "steps": 4, "quadrature": "midpoint"},
        {"method": "clean-corrupted"},
    ):
        torch.testing.assert_close(
            only_edges(scored(near, **options)), -only_edges(scored(near, **turned, **options)), rtol=1e-9, atol=1e-10
        )
    left = {"method": "eap-ig", "steps": 5, "quadrature": "left"}
    assert (only_edges(scored(near, **left)) + only_edges(scored(near, **turned, **left))).abs().max() > 1e-4
    denoise = scored(near, mode="denoise")
    assert only_edges(denoise).equal(only_edges(scored(near, **turned)))


def test_in_a_linear_model_every_method_finds_the_effect_itself():
    found = Near(linear=True)
    uniform(found.model)
    metric = logit_diff(1, 2)
    exact = only_edges(scored(found, metric, method="exact"))
    assert exact.abs().max() > 1e-3
    for options in ({}, {"method": "eap-ig", "steps": 2}, {"method": "clean-corrupted"}):
        torch.testing.assert_close(only_edges(scored(found, metric, **options)), exact, rtol=1e-9, atol=1e-10)


def test_exact_effects_are_those_of_runs_with_one_masked_edge():
    with double_throughout():
        found = Example("pi0")
        result = scored(found, method="exact")
        torch.manual_seed(0)
        places = found.graph.edges.nonzero()
        for place in places[torch.randperm(len(places))[:10]].tolist():
            mask = torch.zeros(found.graph.edges.shape)
            mask[tuple(place)] = 1
            torch.testing.assert_close(
                result.values[tuple(place)], score(found.under(mask)) - found.base, rtol=0, atol=1e-10
            )


def last_patterns_alone(model: Any) -> Any:
    """The same linear model, in which only the last layer's patterns depend on the input."""
    for block in list(model.vision.blocks)[:-1]:
        for letter in "qk":
            for parameter in block.attn.projection(letter).module.parameters():
                torch.nn.init.zeros_(parameter)
    return model


def test_the_qk_fix_is_exact_where_all_behind_the_softmax_is_linear():
    found = Near(linear=True)
    last_patterns_alone(found.model)
    metric = logit_diff(1, 2)
    exact, plain, fixed = (scored(found, metric, **options) for options in ({"method": "exact"}, {}, {"qk_fix": True}))
    queries = torch.tensor(["<q>" in name or "<k>" in name for name in exact.axes["slot"]])
    torch.testing.assert_close(
        fixed.values[:, queries], exact.values[:, queries], rtol=1e-9, atol=1e-10, equal_nan=True
    )
    assert (plain.values - exact.values)[:, queries].nan_to_num().abs().max() > 1e-4
    # Reading patterns takes a kernel whose softmax counts in single precision.
    torch.testing.assert_close(
        fixed.values[:, ~queries], plain.values[:, ~queries], rtol=1e-4, atol=1e-4, equal_nan=True
    )


def test_a_saturated_key_is_seen_by_the_qk_fix_and_not_by_the_gradient():
    found = Near(linear=True)
    last_patterns_alone(found.model)
    for letter in "qk":
        found.model.vision.blocks[-1].attn.projection(letter).module.weight.data *= 8
    found.corrupt = images(2)
    metric = logit_diff(1, 2)
    exact, plain, fixed = (scored(found, metric, **options) for options in ({"method": "exact"}, {}, {"qk_fix": True}))
    for head in range(3):
        edge = f"v.input->v.a1.h{head}<k>"
        torch.testing.assert_close(fixed.edge(edge), exact.edge(edge), rtol=1e-8, atol=1e-9)
    sizes = [
        torch.stack([one.edge(f"v.input->v.a1.h{head}<k>") for head in range(3)]).abs().max() for one in (plain, exact)
    ]
    assert sizes[0] < 0.1 * sizes[1]


@pytest.mark.parametrize("name", ["pi0", "clip", "paligemma2"])
def test_for_small_changes_the_qk_fix_is_the_gradient(name):
    with double_throughout():
        found = Example(name)
        pixels = found.clean["pixel_values"]
        found.corrupt = {**found.clean, "pixel_values": pixels + 1e-4 * (found.corrupt["pixel_values"] - pixels)}
        plain, fixed = scored(found), scored(found, qk_fix=True)
    scale = plain.values.nan_to_num().abs().max()
    assert (plain.values != fixed.values).sum() > plain.values.isnan().sum()
    torch.testing.assert_close(fixed.values / scale, plain.values / scale, rtol=0, atol=3e-3, equal_nan=True)


# -- spans -----------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"method": "eap-ig", "steps": 2}, {"method": "mask-ig", "steps": 2}])
def test_scores_of_all_positions_add_up_to_the_edges(options):
    near = Near()
    whole, each = scored(near, **options), scored(near, spans="position", **options)
    assert list(each.axes) == ["sender", "slot", "span", "example"]
    assert each.axes["span"] == list(range(16))
    torch.testing.assert_close(each.totals, whole.values, rtol=1e-11, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(each.scores, whole.scores, rtol=1e-11, atol=1e-11, equal_nan=True)
    some = scored(near, spans={"cls": "cls", "corner": [1, 2, 6]}, **options)
    assert some.axes["span"] == ["cls", "corner", "rest"]
    torch.testing.assert_close(some.values[:, :, 0], each.values[:, :, 0], rtol=1e-11, atol=1e-11, equal_nan=True)
    torch.testing.assert_close(
        some.values[:, :, 1], each.values[:, :, [1, 2, 6]].sum(2), rtol=1e-11, atol=1e-11, equal_nan=True
    )
    torch.testing.assert_close(some.totals, whole.values, rtol=1e-11, atol=1e-11, equal_nan=True)


def test_a_score_at_a_position_is_what_the_edge_carries_there():
    near = Near()
    each = scored(near, spans="position")
    sites = ["vision.blocks.1.hook_k_input", "vision.blocks.0.hook_mlp_out"]
    _, here = near.model.run_with_cache(near.clean, sites, incl_bwd=True, metric=score)
    _, there = near.model.run_with_cache(near.corrupt, sites[1])
    change, gradient = there[sites[1]] - here[sites[1]], here[f"{sites[0]}_grad"][:, :, 2]
    torch.testing.assert_close(
        each.edge("v.m0->v.a1.h2<k>"), (change * gradient).sum(-1).T.detach(), rtol=1e-10, atol=1e-11
    )
    ratio = each.cancellation[each.index_of("sender", "v.m0"), each.index_of("slot", "v.a1.h2<k>")]
    means = each.edge("v.m0->v.a1.h2<k>").mean(-1)
    assert float(ratio) == pytest.approx(float(means.sum().abs() / means.abs().sum()))
    assert 0 < float(ratio) <= 1


def test_spans_of_several_towers_in_batches_of_pairs():
    found = Example("llava-clip-llama")
    pairs = Pairs(inputs=found.clean, corrupt_inputs=found.corrupt, answers=[1, 2], foils=[4, 5])
    spans = {"picture": {"language": "patch", "vision": "patch"}, "last": {"language": "last"}}
    parts, whole = (
        edge_attribution(found.model, pairs, "logit_diff", example_batch=1, allow_wrong=True, progress=False, spans=own)
        for own in (spans, None)
    )
    torch.testing.assert_close(parts.totals, whole.values, rtol=1e-6, atol=1e-8, equal_nan=True)
    assert parts.axes["span"] == ["picture", "last", "rest"]
    # The connector writes pictures alone, and the output is read at the last position.
    carried = parts.edge("x.projector->l.a0.h1<q>")
    assert carried[0].abs().max() > 0
    assert carried[1:].abs().max() == 0
    ends = parts.edge("l.m0->l.logits")
    assert ends[1].abs().max() > 0
    assert ends[[0, 2]].abs().max() == 0
    assert len(parts.to_frame()) == 3 * len(whole.to_frame())
    validate(parts.to_networkx(10))
    assert len(parts.mean_frame()) == 3 * parts.n_edges


def test_spans_that_overlap_or_mean_nothing_are_refused():
    near = Near()
    for spans, message in (
        ({"a": [1, 2], "b": [2]}, "do not overlap"),
        ({"rest": [1]}, "is no name"),
        ({}, "is no name"),
        ("patch", "not understood"),
        ({"a": {"language": [1]}}, "no tower"),
    ):
        with pytest.raises(InputError, match=message):
            scored(near, spans=spans)
    for options in ({"method": "exact"}, {"qk_fix": True}):
        with pytest.raises(InputError, match="leave spans out"):
            scored(near, spans="position", **options)


# -- sums and symmetries ---------------------------------------------------------------------------------------------------------------------------


def test_where_the_metric_is_linear_in_the_end_of_the_stream_edges_into_the_output_add_up():
    found = Near()
    norm = found.model.module.vit.layernorm
    # With so large an epsilon the denominator is the same for every input.
    norm.eps = 1e20
    torch.nn.init.constant_(norm.weight, 1e10)
    result = scored(found, logit_diff(1, 2))
    ends = result.values[:, result.index_of("slot", "v.logits")].sum(0)
    assert (result.source - result.base).abs().max() > 1e-3
    torch.testing.assert_close(ends, result.source - result.base, rtol=1e-9, atol=1e-10)


def test_equal_runs_have_scores_of_exactly_zero():
    near = Near()
    for method in ("eap", "eap-ig", "clean-corrupted", "mask-ig", "exact"):
        with pytest.warns(UserWarning, match="Every score is 0"):
            result = scored(near, method=method, steps=2, corrupt=near.clean)
        assert (only_edges(result) == 0).all()


def test_the_order_of_patches_does_not_matter_and_that_of_heads_moves_scores():
    near = Near()
    torch.nn.init.zeros_(near.model.module.vit.embeddings.position_embeddings)
    before = scored(near)

    def moved(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        rows, columns = inputs["pixel_values"].shape[-2] // 4, inputs["pixel_values"].shape[-1] // 4
        picture = inputs["pixel_values"].unflatten(-2, (rows, 4)).unflatten(-1, (columns, 4))
        return {
            "pixel_values": picture[:, :, torch.arange(rows).flip(0)][..., torch.arange(columns).roll(2), :]
            .flatten(-2)
            .flatten(2, 3)
        }

    again = scored(near, clean=moved(near.clean), corrupt=moved(near.corrupt))
    torch.testing.assert_close(only_edges(again), only_edges(before), rtol=1e-9, atol=1e-10)
    block, turned = near.model.vision.blocks[0], [2, 0, 1]
    for letter in "qkv":
        module = block.attn.projection(letter).module
        for parameter in module.parameters():
            parameter.data = parameter.data.unflatten(0, (3, -1))[turned].flatten(0, 1)
    module = block.attn.out.module
    module.weight.data = module.weight.data.unflatten(1, (3, -1))[:, turned].flatten(1)
    permuted = scored(near)
    for new, old in enumerate(turned):
        torch.testing.assert_close(
            permuted.edge(f"v.a0.h{new}->v.a1.h1<k>"), before.edge(f"v.a0.h{old}->v.a1.h1<k>"), rtol=1e-9, atol=1e-10
        )
        torch.testing.assert_close(
            permuted.edge(f"v.input->v.a0.h{new}<v>"), before.edge(f"v.input->v.a0.h{old}<v>"), rtol=1e-9, atol=1e-10
        )


def test_a_batch_is_the_sum_of_its_parts_and_pairs_are_the_runs_in_memory():
    near = Near()
    pairs = Pairs(inputs=near.clean, corrupt_inputs=near.corrupt, answers=[1, 2, 3], foils=[0, 0, 1], groups=[0, 0, 1])
    ways = (
        {"example_batch": 1},
        {"example_batch": 2},
        {},
        {"method": "exact", "example_batch": 2},
        {"method": "mask-ig", "steps": 2, "example_batch": 2},
    )
    for options in ways:
        told = {name: value for name, value in options.items() if name != "example_batch"}
        whole = scored(near, logit_diff([1, 2, 3], [0, 0, 1]), **told)
        found = edge_attribution(near.model, pairs, "logit_diff", allow_wrong=True, progress=False, **options)
        for name in ("base", "source"):
            torch.testing.assert_close(getattr(found, name), getattr(whole, name))
        torch.testing.assert_close(only_edges(found), only_edges(whole), rtol=1e-10, atol=1e-11)
        assert found.groups == [0, 0, 1]


# -- the result ------------------------------------------------------------------------------------------------------------------------------------


def test_the_graph_is_valid_and_holds_the_mean_scores():
    with double_throughout():
        found = Example("pi0")
        result = scored(found)
    graph = result.to_networkx()
    validate(graph)
    scores = [data for *_, data in graph.edges(data=True) if data["score"] != 0]
    assert len(scores) == int((result.scores.nan_to_num() != 0).sum())
    edge = graph.edges["l.a0.h1", "l.kv1.g0", "k"]
    assert edge["score"] == pytest.approx(float(result.edge("l.a0.h1->l.kv1.g0<k>").mean()))
    assert edge["se"] == pytest.approx(float(result.edge("l.a0.h1->l.kv1.g0<k>").std() / 2**0.5))
    assert graph.edges["l.kv1.g0", "a.a1.h2", "k"]["boundary"]
    assert graph.nodes["l.a0.h1"]["score"] == pytest.approx(
        float(result.node_scores()[result.index_of("sender", "l.a0.h1")].mean())
    )
    assert graph.graph["sign"] == "patched_minus_clean"
    small = result.to_networkx(5)
    validate(small)
    strongest = result.ranking(5)
    assert {(a, b) for a, b, data in small.edges(data=True) if data["score"]} == {
        (name.split("->")[0], name.split("->")[1].split("<")[0]) for name, _ in strongest
    }
    sizes = [abs(size) for _, size in strongest]
    assert sizes == sorted(sizes, reverse=True)


def test_results_are_saved_shown_and_cut():
    result = scored(Near(), {"diff": logit_diff(1, 2), "other": logit_diff(3, 0)})
    assert list(result.axes) == ["metric", "sender", "slot", "example"]
    alone = scored(Near(), logit_diff(3, 0))
    torch.testing.assert_close(result.values[1], alone.values, equal_nan=True)
    frame = alone.to_frame()
    assert len(frame) == alone.n_edges * 3
    assert not frame["value"].isna().any()
    means = alone.mean_frame()
    assert len(means) == alone.n_edges
    assert (means["low"] <= means["mean"]).all()
    row = frame[(frame.sender == "v.m0") & (frame.slot == "v.a1.h2<k>")]
    assert row["value"].tolist() == alone.edge("v.m0->v.a1.h2<k>").tolist()
    assert "v." in alone._repr_html_()
    with pytest.raises(InputError, match="no edge"):
        alone.edge("v.m1->v.a0.h0<q>")
    with pytest.raises(InputError, match="rank the result of one"):
        result.component_scores()


def test_a_file_gives_back_the_result(tmp_path):
    result = scored(Near(), logit_diff(1, 2), method="eap-ig", steps=3)
    found = cv.Result.load(result.save(tmp_path / "edges.npz"))
    assert isinstance(found, EdgeAttribution)
    assert (found.reads, found.axes, found.steps, found.quadrature) == (result.reads, result.axes, 3, "gauss")
    torch.testing.assert_close(found.values, result.values, rtol=0, atol=0, equal_nan=True)
    assert cv.circuits.edge_attribution.__name__ == "edge_attribution"
    assert "eap-ig" in result.provenance["method"]


def test_mistakes_are_told_before_anything_runs():
    near = Near()
    for options, message in (
        ({"method": "acdc"}, "Unknown method"),
        ({"method": "eap-ig", "quadrature": "right"}, "Unknown quadrature"),
        ({"steps": 0}, "steps"),
        ({"method": "eap-ig", "qk_fix": True}, "qk_fix"),
        ({"mode": "both"}, "mode"),
        ({"clean": None}, "Give pairs"),
    ):
        with pytest.raises(InputError, match=message):
            scored(near, **options)
    with pytest.raises(InputError, match="counts"):
        scored(near, cv.metrics.rank(1))
    with pytest.warns(UserWarning, match="gradient is 0"):
        scored(near, "kl")


def test_scores_that_are_no_numbers_are_refused():
    near = Near()
    with pytest.raises(InputError, match="no finite"):
        scored(near, lambda logits: (logits[:, 0] - logits[:, 0].detach()).sqrt())


def test_half_precision_counts_in_single():
    found = Example("vit")
    model = cv.HookedModel(found.module.to(torch.bfloat16))
    inputs = [{name: value.to(torch.bfloat16) for name, value in one.items()} for one in (found.clean, found.corrupt)]
    result = edge_attribution(model, metric=score, clean=inputs[0], corrupt=inputs[1], progress=False)
    whole = scored(Example("vit"))
    assert result.values.dtype == torch.float32
    both = torch.stack([only_edges(result).double().flatten(), only_edges(whole).flatten()])
    assert float(torch.corrcoef(both)[0, 1]) > 0.98
    assert computational_graph(model, inputs[0]).edges.equal(found.graph.edges)

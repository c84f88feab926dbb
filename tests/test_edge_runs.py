"""Masks on edges: identities with the two runs, with patched nodes, and with path patching."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.circuits.computational_graph import computational_graph
from circuitvision.circuits.edge_runs import EdgeEdits, Interchange
from circuitvision.errors import InputError
from circuitvision.patching import path_patch
from circuitvision.patching.runs import Sides
from tests.edge_models import FAMILIES, Example, double_throughout, score
from tests.synthetic_blocks import SHAPES, Own, inputs_by_hand, register

pytestmark = pytest.mark.filterwarnings("ignore:The two runs do not differ")
MIXED_NORMS = [name for name in SHAPES if not name.startswith("post_norm")]


@pytest.fixture(scope="module", params=FAMILIES)
def example(request: pytest.FixtureRequest) -> Iterator[Example]:
    with double_throughout():
        yield Example(request.param)


def test_no_masked_edge_is_the_clean_run_and_all_are_the_corrupt_one(example):
    none, every = torch.zeros(example.graph.edges.shape), example.graph.edges.double()
    clean, corrupt = (example.model(inputs) for inputs in (example.clean, example.corrupt))
    assert (clean - corrupt).abs().max() > 1e-3
    torch.testing.assert_close(example.under(none), clean, rtol=0, atol=0)
    torch.testing.assert_close(example.under(every), corrupt, rtol=0, atol=1e-11)


def test_all_edges_out_of_a_node_are_the_patch_of_the_node(example):
    moved = 0.0
    for number, sender in enumerate(example.graph.senders):
        if sender.images is not None:
            continue
        mask = torch.zeros(example.graph.edges.shape)
        mask[number] = example.graph.edges[number].to(mask)
        heads = None if sender.node.head is None else [sender.node.head]
        patched = example.model.run(
            example.clean, [edits.replace(sender.site, example.source[sender.site], heads=heads)]
        )
        torch.testing.assert_close(example.under(mask), patched, rtol=0, atol=1e-11)
        moved = max(moved, float((patched - example.model(example.clean)).detach().abs().max()))
    assert moved > 1e-4


def test_one_masked_edge_is_one_edit_of_its_slot(example):
    groups = EdgeEdits(example.model, example.graph, example.graph.edges)(Sides(example.clean, example.source))
    places = example.graph.edges.nonzero()
    assert len(groups) == len(places)
    torch.manual_seed(0)
    for number in torch.randperm(len(places))[:8].tolist():
        mask = torch.zeros(example.graph.edges.shape)
        mask[tuple(places[number])] = 1
        torch.testing.assert_close(
            example.under(mask), example.model.run(example.clean, list(groups[number])), rtol=0, atol=1e-11
        )


@pytest.mark.parametrize(
    ("name", "edge", "sender", "receiver"),
    [
        ("vit", "v.a0.h1->v.a1.h2<k>", "vision L0H1", "vision L1H2.k"),
        ("vit", "v.m0->v.logits", "vision L0.mlp", "output"),
        ("pi0", "l.a0.h1->l.kv2.g0<v>", "language L0H1", "language.blocks.2.hook_v_input[0]"),
        ("pi0", "v.m0->x.projector", "vision L0.mlp", "projector"),
        ("paligemma2", "l.a0.h1->l.a1.h2<q>", "language L0H1", "language L1H2.q"),
    ],
)
def test_an_edge_inside_a_tower_is_a_direct_path(name, edge, sender, receiver):
    with double_throughout():
        found = Example(name)
        given = {"clean": found.clean, "corrupt": found.corrupt, "mode": "noise", "progress": False}
        paths = path_patch(found.model, metric=score, senders=sender, receivers=receiver, **given)
        effect = score(found.under(found.graph.mask([edge]).double())) - found.base
        assert effect.abs().max() > 1e-9
        torch.testing.assert_close(effect, paths.values[0, 0], rtol=0, atol=1e-10)


@pytest.mark.usefixtures("tables")
@pytest.mark.parametrize("shape", MIXED_NORMS)
def test_blocks_of_any_shape_that_add_to_their_stream(shape):
    register()
    torch.manual_seed(0)
    module = Own(SHAPES[shape]).double().eval()
    model = cv.HookedModel(module)
    clean, corrupt = (inputs_by_hand(module, 2, seed, torch.float64) for seed in (1, 2))
    graph = computational_graph(model, clean)
    with torch.no_grad():
        source = model._values_at(corrupt, graph.sites)[1]
        runs = Interchange(model, graph, clean, source)
        torch.testing.assert_close(
            model.run(clean, runs.edits(graph.edges.double())), model(corrupt), rtol=0, atol=1e-10
        )
        for number, sender in enumerate(graph.senders):
            mask = torch.zeros(graph.edges.shape)
            mask[number] = graph.edges[number].to(mask)
            heads = None if sender.node.head is None else [sender.node.head]
            patched = model.run(clean, [edits.replace(sender.site, source[sender.site], heads=heads)])
            torch.testing.assert_close(model.run(clean, runs.edits(mask)), patched, rtol=0, atol=1e-10)


def test_masks_that_do_not_fit_are_refused():
    found = Example("vit")
    with pytest.raises(InputError, match="sender slot"):
        found.under(torch.zeros(3, 4))
    mask = torch.zeros(found.graph.edges.shape)
    mask[-1, 0] = 1
    with pytest.raises(InputError, match="no edge"):
        found.under(mask)


def test_what_a_sender_changes_is_that_of_the_value_given():
    """Kept for the slots of one run, and neither for another value nor after the last slot."""
    with double_throughout():
        found = Example("vit")
        runs = found.interchange()
        site = found.graph.sites[1]
        heads = torch.eye(len(found.graph.senders_at(site))).double()
        own = found.model._values_at(found.clean, [site])[1][site]
        first, again = runs.change(site, own, heads), found.interchange().change(site, 2 * own, heads)
        assert (first - again).abs().max() > 1e-3
        torch.testing.assert_close(runs.change(site, 2 * own, heads), again, rtol=0, atol=0)
        edges = found.interchange()
        found.model.run(found.clean, edges.edits(found.graph.edges.double()))
        assert not edges._changes

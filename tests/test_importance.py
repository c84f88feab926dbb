"""Head importance and the ablation check on models whose effects are known in closed form."""

from __future__ import annotations

import pytest
import torch

from circuitvision.circuits import (
    AblationCheck,
    HeadImportance,
    ablation_check,
    export,
    head_importance,
    live_heads,
    load,
)
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from tests.toy_model import ToyModel

VISION = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 5.0]], dtype=torch.float64)
LANGUAGE = torch.tensor([[0.25, 0.5], [2.0, -1.0]], dtype=torch.float64)
CLEAN = {"picture": torch.tensor([2.0, 3.0], dtype=torch.float64)}
CORRUPT = {"picture": torch.tensor([1.0, 1.0], dtype=torch.float64)}
METRIC = logit_diff(0, 1)


def scores(result: HeadImportance) -> dict[tuple[str, str], float]:
    return {(edge["sender"], edge["receiver"]): edge["score"] for edge in result.edges}


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_edges_of_an_interacting_model_are_the_effects_of_its_paths(mode):
    result = head_importance(
        ToyModel(VISION, LANGUAGE, gate=True), metric=METRIC, clean=CLEAN, corrupt=CORRUPT, top_k=6, mode=mode
    )
    sign = 1.0 if mode == "denoise" else -1.0
    bridge = VISION.sum().item() * 1.5 * sign  # the picture differs by 1 and 2
    first, second = LANGUAGE[0], LANGUAGE[1]
    edges = scores(result)
    for head in range(2):
        reached = first[head].item() * bridge
        assert edges[f"l.a0.h{head}", "answer"] == pytest.approx(reached)
        # Without the connector's own path, a first-layer head sends this much on through each second-layer head.
        assert edges[f"l.a0.h{head}", "l.a1.h0"] == pytest.approx(reached * second[0].item())
        assert edges["x.projector", f"l.a0.h{head}"] == pytest.approx(reached * (1 + second.sum().item()))
        assert edges["x.projector", f"l.a1.h{head}"] == pytest.approx(second[head].item() * bridge)
    assert edges["x.projector", "answer"] == pytest.approx(0.5 * bridge)
    assert result.connectors["x.projector"]["share"] == pytest.approx(1.0)
    assert not any(sender.startswith("v.") and receiver != "x.projector" for sender, receiver in edges)


def test_out_edges_add_up_to_each_effect_and_the_graph_is_valid(tmp_path):
    result = head_importance(
        ToyModel(VISION, LANGUAGE, gate=True), metric=METRIC, clean=CLEAN, corrupt=CORRUPT, top_k=3
    )
    graph = result.to_networkx()
    for node in [*result.selected, "x.projector"]:
        total = sum(data["score"] for _, _, data in graph.out_edges(node, data=True))
        assert total == pytest.approx(graph.nodes[node]["score"])
    for suffix in (".json", ".graphml"):
        assert load(export(graph, tmp_path / f"c{suffix}")).number_of_edges() == len(result.edges)
    assert graph.graph["metric_clean"] > graph.graph["metric_corrupt"]
    assert sum(data["kind"] == "head" for _, data in graph.nodes(data=True)) == 10
    assert not graph.nodes["v.a0.h2"]["in_circuit"]


def test_ranking_selection_and_joint_effect():
    result = head_importance(ToyModel(VISION, LANGUAGE), metric=METRIC, clean=CLEAN, corrupt=CORRUPT, top_k=1)
    assert result.ranking()[0][0] == "l.a1.h0"
    assert set(result.selected) == {"v.a1.h2", "l.a1.h0"}
    # Patching 5/10 of what the connector carries, plus the rest of what one language head adds.
    expected = (0.5 * (0.5 + 0.25 + 0.5 - 1.0) + 2.0) / (0.5 + LANGUAGE.sum().item())
    assert result.joint == pytest.approx(expected)


def test_results_survive_a_file(tmp_path):
    result = head_importance(ToyModel(VISION, LANGUAGE), metric=METRIC, clean=CLEAN, corrupt=CORRUPT, top_k=2)
    again = HeadImportance.load(result.save(tmp_path / "h.safetensors"))
    assert (again.edges, again.selected, again.connectors) == (result.edges, result.selected, result.connectors)
    assert (
        export(again.to_networkx(), tmp_path / "a.json").read_text()
        == export(result.to_networkx(), tmp_path / "b.json").read_text()
    )


def test_equal_runs_have_no_circuit():
    with pytest.raises(InputError, match="restore"):
        head_importance(ToyModel(VISION, LANGUAGE), metric=METRIC, clean=CLEAN, corrupt=CLEAN)


def test_a_difference_that_is_noise_over_the_examples_gives_no_graph():
    picture = torch.tensor([1.0, -1.1, 0.9, -1.0], dtype=torch.float64)
    noise = {"clean": {"picture": picture}, "corrupt": {"picture": -picture}}
    with pytest.warns(UserWarning, match="differ"):
        result = head_importance(ToyModel(VISION, LANGUAGE), metric=METRIC, **noise)
    with pytest.raises(InputError, match="4 examples"):
        result.to_networkx()


def pairs(seed: int = 0, count: int = 40) -> Pairs:
    picture = torch.randn(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).abs() + 0.5
    return Pairs(inputs={"picture": picture}, corrupt_inputs={"picture": -picture}, answers=0, foils=1)


def test_the_check_tells_the_carrying_head_from_the_others():
    vision = torch.tensor([[0.01, 5.0, 0.02, 0.01], [0.01, -0.02, 0.02, 0.03]], dtype=torch.float64)
    toy = ToyModel(vision, torch.zeros(1, 4, dtype=torch.float64), leak=1.0)
    good = ablation_check(toy, pairs(0) + pairs(1), ["v.a0.h1"], n_random=11)
    assert good.intact == 1.0
    # What is left still has the right sign, so the accuracy survives while the margin is gone.
    margins = good.mean(quantity="logit_diff")
    assert margins[1] < 0.05 * margins[0]
    assert good.values.shape == (13, 80)
    assert float(good.random.min()) == 1.0
    assert good.n_pairs == 80
    assert all("v.a0.h1" not in draw for draw in good.random_heads)
    assert len({tuple(draw) for draw in good.random_heads}) == 11
    bad = ablation_check(toy, pairs(0), ["v.a0.h0"], n_random=11)
    assert not bad.carries_the_answer


def test_the_verdict_needs_a_destroyed_answer_and_harmless_random_sets():
    vision = torch.tensor([[0.0, 5.0, 0.0, 0.0], [-0.01, 0.0, 0.0, 0.0]], dtype=torch.float64)
    toy = ToyModel(vision, torch.zeros(1, 4, dtype=torch.float64), leak=1.0)
    check = ablation_check(toy, pairs(), ["v.a0.h1"], n_random=8)
    assert (check.ablated, check.carries_the_answer) == (0.0, True)
    assert "mean-ablated together in 0%" in check.summary()
    assert not ablation_check(toy, pairs(), ["v.a1.h0"], n_random=8).carries_the_answer


@pytest.mark.parametrize(
    ("intact", "ablated", "random", "carries"),
    [
        (1.0, 0.0, [1.0] * 10, True),
        (1.0, 0.0, [0.1] + [1.0] * 9, True),  # one draw holds a head that every answer needs
        (1.0, 0.0, [0.0] + [1.0] * 9, False),  # one draw costs as much
        (1.0, 0.0, [0.45] * 10, False),  # any draw costs about half as much
        (1.0, 0.6, [1.0] * 10, False),
        (1.0, 0.0, [], True),
        (0.0, 0.0, [], False),  # a model that is never right
    ],
)
def test_a_set_carries_the_answer_if_it_costs_more_than_any_other_and_twice_the_usual(intact, ablated, random, carries):
    shares = torch.tensor([intact, ablated, *random], dtype=torch.float64)
    right = (torch.arange(20)[None] < 20 * shares[:, None]).double()
    conditions = ["intact", "heads", *(f"random {number}" for number in range(len(random)))]
    check = AblationCheck(values=right, axes={"condition": conditions, "example": list(range(20))}, provenance={})
    assert check.carries_the_answer is carries


def test_means_come_from_the_reference():
    toy = ToyModel(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.zeros(1, 1, dtype=torch.float64), leak=1.0)
    nine, seven = ({"picture": torch.full((3,), level, dtype=torch.float64)} for level in (9.0, 7.0))
    shifted = Pairs(inputs=nine, corrupt_inputs=seven, answers=0, foils=1)
    check = ablation_check(toy, pairs(), ["v.a0.h0"], reference=shifted, n_random=2)
    # Every answer becomes the reference's mean of 8: right for the clean input, wrong for the corrupt one, so no
    # pair is.
    assert check.ablated == 0.0
    assert float(check.mean(quantity="logit_diff")[1]) == pytest.approx(0.0, abs=1e-6)


def test_requests_that_cannot_be_met_are_refused():
    toy = ToyModel(VISION, LANGUAGE)
    assert len(live_heads(toy)) == 10
    for heads, options, message in [
        ([], {}, "one head"),
        (["v.a7.h0"], {}, "no L7H0"),
        (["v.m0"], {}, "not a head"),
        (live_heads(toy)[:9], {"n_random": 2}, "random sets"),
    ]:
        with pytest.raises(InputError, match=message):
            ablation_check(toy, pairs(), heads, **options)

"""Rank, identifiability, change and match rates by known answers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from circuitvision.errors import InputError
from circuitvision.readout.lens import summaries
from circuitvision.readout.lens.logit import logit_lens
from tests.readout.common import run


def test_the_best_is_1_the_worst_is_one_over_k_and_a_random_order_is_in_the_middle():
    logits = torch.tensor([3.0, 1.0, 2.0, 0.0])
    ranks = torch.stack([summaries.rank(logits, torch.tensor(index)) for index in range(4)])
    assert ranks.tolist() == [1, 3, 2, 4]
    found = summaries.identifiability(ranks, 4)
    assert found[0] == 1.0
    assert found[3] == pytest.approx(1 / 4)
    assert float(found.mean()) == pytest.approx((4 + 1) / (2 * 4))


@given(st.integers(2, 50), st.integers(0, 10_000))
def test_the_mean_over_all_columns_is_k_plus_1_over_2k(size, seed):
    logits = torch.randperm(size, generator=torch.Generator().manual_seed(seed)).double()
    ranks = summaries.rank(logits.expand(size, size), torch.arange(size))
    assert float(summaries.identifiability(ranks, size).mean()) == pytest.approx((size + 1) / (2 * size))


def test_ties_favour_the_answer():
    assert summaries.rank(torch.tensor([1.0, 1.0, 0.0]), torch.tensor(1)) == 1


def test_a_lens_of_a_model():
    model, out, cache = run("vit")
    label = out.argmax(-1).tolist()
    result = logit_lens(model, cache, "vision", targets={"label": label})
    summary = summaries.lens_identifiability(result, "cls")
    assert list(summary.axes) == ["layer", "row", "target"]
    assert summary.values[-1].tolist() == [[1.0], [1.0]]
    assert summary.chance == pytest.approx((out.shape[-1] + 1) / (2 * out.shape[-1]))
    patches = summaries.lens_identifiability(result, "patch")
    n = model.vision.cfg.n_prefix
    assert float(patches.values[1, 0, 0]) == pytest.approx(
        float((1 - (result.ranks[1, 0, n:, 0].double() - 1) / out.shape[-1]).mean())
    )
    rises = summaries.change_rate(result, "patch")
    assert rises.axes["layer"] == result.axes["layer"][1:]
    wanted = (result.values[1, 0, n:, 0] > result.values[0, 0, n:, 0]).double().mean()
    assert float(rises.values[0, 0, 0]) == pytest.approx(float(wanted))


def test_match_rates_count_the_mlp_as_well():
    model, _, cache = run("vit")
    stream, attention, mlp = (
        logit_lens(model, cache, "vision", top_k=1, sites=sites)
        for sites in (["vision.hook_input", "resid_post"], "attn_out", "mlp_out")
    )
    found = summaries.match_rates(stream, attention, mlp)
    layer, row = 1, 0
    best = stream.best[layer + 1, row]
    by_hand = [best == attention.best[layer, row], best == mlp.best[layer, row], best == stream.best[layer, row]]
    for index, same in enumerate(by_hand):
        assert float(found.values[index, layer, row]) == pytest.approx(float(same.double().mean()))
    neither = ~(by_hand[0] | by_hand[1] | by_hand[2])
    assert float(found.values[3, layer, row]) == pytest.approx(float(neither.double().mean()))
    change = summaries.similarity_change(
        logit_lens(model, cache, "vision", targets=[0], sites="mlp_out"),
        logit_lens(model, cache, "vision", targets=[0]),
    )
    assert list(change.axes) == ["layer", "row", "position", "target"]


def test_a_difference_of_positions_is_found_and_a_null_is_not():
    generator = torch.Generator().manual_seed(3)
    values = torch.randn(20, 30, generator=generator)
    inside = torch.zeros(20, 30, dtype=torch.bool)
    inside[:, 4:8] = True
    among = torch.ones_like(inside)
    null = summaries.difference(values, inside, among, shuffles=200)
    assert null.p > 0.02
    values[inside] += 1.0
    real = summaries.difference(values, inside, among, shuffles=200)
    assert real.p == pytest.approx(1 / 201)
    assert real.value == pytest.approx(null.value + 1.0, abs=1e-5)
    with pytest.raises(InputError, match="at least one"):
        summaries.difference(values, among, among)


def test_summaries_refuse_what_they_cannot_read():
    model, _, cache = run("vit")
    without = logit_lens(model, cache, "vision", top_k=2)
    with pytest.raises(InputError, match="targets="):
        summaries.lens_identifiability(without)
    with pytest.raises(InputError, match="targets="):
        summaries.change_rate(without)
    read = logit_lens(model, cache, "vision", targets=[0])
    with pytest.raises(InputError, match="kind"):
        summaries.lens_identifiability(read, "newline")
    with pytest.raises(InputError, match="same layers"):
        summaries.match_rates(read, read, read)

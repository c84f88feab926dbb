"""Agreement scores: definitions counted one by one, planted memories, and chance beside every score."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvision.errors import InputError
from circuitvision.readout.weights import agreement
from circuitvision.readout.weights import rows as weights
from circuitvision.readout.weights.agreement import (
    ClassValueAgreement,
    KeyValueAgreement,
    class_value_agreement,
    key_value_agreement,
    signed_rank_p,
)
from circuitvision.readout.weights.rows import projections, written_rows
from circuitvision.readout.weights.unembedding import unembedding_matrix
from tests.parts import module_of
from tests.readout.layouts import by_row
from tests.readout.planted import hooked, plant, run
from tests.zoo import case


def test_agreement_is_the_largest_cosine_and_names_the_value_vector():
    model = hooked("vit")
    tower = model.vision
    for column in range(tower.W_U.shape[1]):
        plant(tower, 2, 10 + column, -3 * tower.W_U[:, column] if column == 0 else 3 * tower.W_U[:, column])
    result = class_value_agreement(tower, draws=5)
    brute = torch.stack(
        [torch.cosine_similarity(written_rows(tower, layer)[:, None], tower.W_U.T[None], dim=-1) for layer in range(3)]
    )
    torch.testing.assert_close(by_row(result), brute.max(1).values)
    assert torch.equal(result.index, brute.argmax(1))
    assert by_row(result)[2, 1:] == pytest.approx(1.0, abs=1e-6)
    assert result.index[2, 1:].tolist() == [11 + i for i in range(tower.W_U.shape[1] - 1)]
    assert by_row(result)[2, 0] < 0.95, "a vector that points away does not agree"
    assert result.p[2] <= 2 ** -(tower.W_U.shape[1] - 1)


def test_the_closest_row_is_found_in_whichever_batch_it_is(monkeypatch):
    model = hooked("vit")
    whole = class_value_agreement(model.vision, draws=1)
    monkeypatch.setattr(weights, "_CHUNK", 7 * model.vision.W_U.shape[1])
    parts = class_value_agreement(model.vision, draws=1)
    assert torch.equal(parts.index, whole.index)
    torch.testing.assert_close(by_row(parts), by_row(whole))


def test_random_weights_agree_as_much_as_random_rows_do():
    model = hooked("vit")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for block in model.vision.blocks:
            weight = module_of(block, "mlp_out").weight
            weight.copy_(torch.randn(weight.shape, generator=generator) * torch.rand(1, weight.shape[1]) * 9)
    result = class_value_agreement(model.vision, draws=200)
    low, high = by_row(result, "random").mean(-1).quantile(torch.tensor([0.002, 0.998])).tolist()
    assert ((by_row(result).mean(-1) > low) & (by_row(result).mean(-1) < high)).all()
    assert torch.equal(by_row(result, "random"), by_row(class_value_agreement(model.vision, draws=200), "random"))
    assert not torch.equal(
        by_row(result, "random"), by_row(class_value_agreement(model.vision, draws=200, seed=1), "random")
    )


def test_against_another_model_compares_classes_in_pairs(tmp_path):
    model, other = hooked("vit"), hooked("vit")
    for column in range(model.vision.W_U.shape[1]):
        plant(model.vision, 1, column, model.vision.W_U[:, column])
    first, second = class_value_agreement(model.vision), class_value_agreement(other.vision)
    with pytest.warns(UserWarning, match="No two values differ"):
        p = first.against(second)
    assert p[1] == pytest.approx(2.0 ** -model.vision.W_U.shape[1])
    assert p[0].isnan()
    assert p[2].isnan()
    again = ClassValueAgreement.load(first.save(tmp_path / "agreement.npz"))
    assert again.summary().equals(first.summary())
    with pytest.raises(InputError, match="same options"):
        first.against(class_value_agreement(other.vision, layers=[0]))


def exact_p(n: int, statistic: int) -> float:
    """P(W+ ≥ statistic) for ranks 1 … n, by counting subsets."""
    counts = [1] + [0] * (n * (n + 1) // 2)
    for rank in range(1, n + 1):
        counts = [count + (counts[total - rank] if total >= rank else 0) for total, count in enumerate(counts)]
    return sum(counts[statistic:]) / 2**n


@settings(max_examples=40)
@given(st.permutations(list(range(1, 9))), st.lists(st.booleans(), min_size=8, max_size=8))
def test_the_signed_rank_test_counts_sign_patterns(sizes, signs):
    difference = torch.tensor([size if sign else -size for size, sign in zip(sizes, signs, strict=True)]).double()
    statistic = sum(size for size, sign in zip(sizes, signs, strict=True) if sign)
    assert signed_rank_p(difference) == pytest.approx(exact_p(8, statistic))
    assert signed_rank_p(torch.cat([difference, torch.zeros(3).double()])) == signed_rank_p(difference)


def test_the_signed_rank_test_of_many_and_of_ties():
    difference = torch.arange(1.0, 21.0)
    difference[[3, 8, 12, 15]] *= -1
    statistic = int(difference[difference > 0].sum())
    assert signed_rank_p(difference) == pytest.approx(exact_p(20, statistic))
    assert signed_rank_p(torch.arange(1.0, 41.0)) == pytest.approx(2.0**-40)
    # Ties share their mean rank: four equal sizes, one of them negative, are W+ ≥ 7.5 in 5 of 16 patterns.
    assert signed_rank_p(torch.tensor([2.0, 2.0, 2.0, -2.0])) == pytest.approx(5 / 16)
    assert signed_rank_p(torch.tensor([1.0, 1.0, -2.0])) == pytest.approx(5 / 8)


# -- keys and values of a run --------------------------------------------------------------------------------------------------------------


def test_a_neuron_that_is_always_on_and_promotes_a_class_agrees_with_that_class_alone():
    model = hooked("vit")
    tower = model.vision
    matrix = unembedding_matrix(tower, gain=False).matrix
    target = 3
    # Promotes this class and for none of the others.
    plant(tower, 1, 5, 100 * torch.linalg.pinv(matrix)[target])
    with torch.no_grad():
        module_of(tower.blocks[1], "mlp_in").bias[5] = 50.0
    cache = run(model, "vit")
    n_classes = matrix.shape[1]
    options = {"layers": [1], "n_keys": 1, "n_values": 1}
    right = key_value_agreement(model, cache, [target, target], **options)
    assert (by_row(right) == 1).all()
    assert (right.chance == 0).all()
    other = (target + 1) % n_classes
    wrong = key_value_agreement(model, cache, torch.tensor([other, other]), **options)
    assert (by_row(wrong) == 0).all()
    torch.testing.assert_close(wrong.chance, torch.full_like(wrong.chance, 1 / (n_classes - 1)))
    whole = key_value_agreement(model, cache, layers=[1], n_keys=1)
    assert (by_row(whole) == 1).all()
    summary = right.summary()
    assert summary["kind"].tolist() == ["cls", "patch"]
    assert summary["tokens"].tolist() == [2, 32]


@pytest.mark.parametrize("component", ["mlp", "ov"])
def test_both_rates_equal_their_definitions_counted_one_by_one(component):
    model = hooked("dinov2")
    tower, cache = model.vision, run(model, "dinov2", batch=1)
    rates = key_value_agreement(model, cache, [2], component=component, n_keys=3, n_values=2)
    parts = key_value_agreement(model, cache, component=component, n_keys=3)
    matrix = unembedding_matrix(tower, gain=False).matrix
    n_classes = matrix.shape[1]
    for layer, position in itertools.product(range(tower.cfg.n_layers), (0, 1, 7)):
        logits = written_rows(tower, layer, component) @ matrix
        keys = cache["vision", "post" if component == "mlp" else "z", layer][0, position].flatten()
        active = set(keys.topk(3).indices.tolist())
        hit = [bool(active & set(logits[:, c].topk(2).indices.tolist())) for c in range(n_classes)]
        assert by_row(rates)[layer, 0, position] == hit[2]
        expected = (sum(hit) - hit[2]) / (n_classes - 1)
        assert by_row(rates, "chance")[layer, 0, position] == pytest.approx(expected)
        site = "hook_mlp_out" if component == "mlp" else "hook_attn_out"
        answer = int((cache[f"vision.blocks.{layer}.{site}"][0, position] @ matrix).argmax())
        own = logits.argmax(-1).tolist()
        assert by_row(parts)[layer, 0, position] == pytest.approx(sum(own[i] == answer for i in active) / 3)
        assert by_row(parts, "chance")[layer, 0, position] == pytest.approx(own.count(answer) / len(own))


def test_labels_belong_to_examples_of_which_a_tower_may_have_several_rows():
    model = hooked("llava-next-mistral")
    cache = run(model, "llava-next-mistral")
    tower = model.vision
    matrix = unembedding_matrix(tower, matrix=torch.randn(tower.cfg.d_model, 6), gain=False)
    options = {"tower": "vision", "unembedding": matrix, "layers": [0], "n_keys": 3, "n_values": 2}
    mixed = key_value_agreement(model, cache, [1, 4], **options)
    assert len(mixed.axes["example"]) > 2
    for example, label in enumerate([1, 4]):
        rows = torch.tensor(mixed.axes["example"]) == example
        alone = key_value_agreement(model, cache, [label, label], **options)
        torch.testing.assert_close(by_row(mixed)[:, rows], by_row(alone)[:, rows])
        torch.testing.assert_close(by_row(mixed, "chance")[:, rows], by_row(alone, "chance")[:, rows])


def test_token_rates_leave_padding_out_and_are_saved(tmp_path):
    model = hooked("llava-clip-llama")
    inputs = case("llava-clip-llama").inputs(model.module, batch=2, padding="right")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=["language.blocks.*.mlp.hook_post"])
    result = key_value_agreement(model, cache, ["red", "blue"], targets=["red", "blue", "green"])
    padding = torch.tensor([[kind == "padding" for kind in row] for row in result.kinds])
    assert bool(padding.any())
    assert torch.equal(by_row(result).isnan(), padding.expand(by_row(result).shape))
    again = KeyValueAgreement.load(result.save(tmp_path / "rates.safetensors"))
    assert again.summary().equals(result.summary())
    assert again.summary()["rate"].between(0, 1).all()
    with pytest.warns(UserWarning, match="no chance level"):
        assert by_row(key_value_agreement(model, cache, ["red", "red"], targets=["red"]), "chance").isnan().all()
    for options, message in (
        ({"labels": ["red"]}, "give one each"),
        ({"labels": ["red", "cross"], "targets": ["red", "blue"]}, "among the targets"),
        ({"labels": ["red", "blue"], "n_values": 0}, "at least 1"),
        ({"labels": ["red", "blue"], "n_keys": 0}, "at least 1"),
        ({"labels": ["red", "blue"], "component": "ov"}, r"language\.blocks\.0\.attn\.hook_z"),
    ):
        with pytest.raises(InputError, match=message):
            key_value_agreement(model, cache, **options)
    direct = key_value_agreement(model, inputs, ["red", "blue"], targets=["red", "blue", "green"])
    torch.testing.assert_close(by_row(direct), by_row(result), equal_nan=True)
    assert by_row(key_value_agreement(model, inputs, component="ov")).shape == by_row(result).shape
    for swapped in (model.language, None):
        with pytest.raises(InputError, match="cache of a run"):
            key_value_agreement(model, swapped)
    other = hooked("llava-clip-llama")
    with pytest.raises(InputError, match="another model"):
        key_value_agreement(other, cache, ["red", "red"])


@pytest.mark.parametrize("component", ["mlp", "ov"])
def test_a_few_classes_at_a_time_give_the_same_rates(component, monkeypatch):
    model = hooked("vit")
    cache = run(model, "vit")
    labels, tower = [0, 3], model.vision
    whole = [
        key_value_agreement(model, cache, labels, component=component),
        key_value_agreement(model, cache, component=component),
    ]
    widest = []

    def watched(rows, weight, *more):
        widest.append(len(rows) * weight.shape[1])
        return projections(rows, weight, *more)

    monkeypatch.setattr(agreement, "projections", watched)
    rows = tower.cfg.d_mlp if component == "mlp" else tower.cfg.n_heads * tower.cfg.d_head
    monkeypatch.setattr(weights, "_CHUNK", max(rows, 2 * 17 * 5))
    parts = [
        key_value_agreement(model, cache, labels, component=component),
        key_value_agreement(model, cache, component=component),
    ]
    for one, other in zip(whole, parts, strict=True):
        assert torch.equal(by_row(one), by_row(other))
        torch.testing.assert_close(one.chance, other.chance)
    assert max(widest[: len(widest) // 2]) <= max(rows, 2 * 17 * 5)


def test_rates_of_a_cache_without_rows_or_of_several_passes_are_those_of_the_run():
    model = hooked("llava-clip-llama")
    inputs = case("llava-clip-llama").inputs(model.module, batch=1)
    sites = ["language.blocks.*.mlp.hook_post", "language.blocks.*.hook_mlp_out"]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=sites)
        _, alone = model.run_with_cache(inputs, names_filter=sites)
        with model.record(sites) as steps:
            model.generate(inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    alone.remove_batch_dim()
    steps.inputs = {}
    with pytest.raises(InputError, match="does not know its model and inputs"):
        key_value_agreement(model, steps, step=0)
    steps.inputs = cache.inputs
    known = key_value_agreement(model, cache, ["red"]), key_value_agreement(model, cache)
    for other, step in ((alone, None), (steps, 0)):
        rates = key_value_agreement(model, other, ["red"], step=step)
        assert torch.equal(by_row(rates), by_row(known[0]))
        assert torch.equal(by_row(key_value_agreement(model, other, step=step)), by_row(known[1]))
    with pytest.raises(InputError, match="step="):
        key_value_agreement(model, steps)
    with pytest.raises(InputError, match=r"the pass that reads the prompt \(step=0\)"):
        key_value_agreement(model, steps, step=1)


# -- figures -------------------------------------------------------------------------------------------------------------------------------


def heading(figure) -> str:
    return figure.layout.title.text.split("<br>")[0]


def test_figures_of_agreement_show_chance():
    model = hooked("vit")
    for column in range(model.vision.W_U.shape[1]):
        plant(model.vision, 2, column, model.vision.W_U[:, column])
    result = class_value_agreement(model.vision)
    assert heading(result.plot()).startswith("Layer 2's value vectors point at the classes: 1.00 beside")
    band = result.plot().layout.shapes[0]
    means = by_row(result, "random").mean(-1)
    assert (band.y0, band.y1) == pytest.approx((float(means.min()), float(means.max())))
    cache = run(model, "vit")
    for rates, finding in (
        (key_value_agreement(model, cache, [0, 1]), "promotes the true class"),
        (key_value_agreement(model, cache), "what the layer answers"),
    ):
        figure = rates.plot()
        assert finding in heading(figure)
        assert {trace.name for trace in figure.data} >= {"cls", "patch", "patch, by chance"}

"""Probes: splits that do not leak, controls that respect groups, intervals, penalties, and probes that make no sense."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binom

from circuitvision.errors import InputError
from circuitvision.readout import decision_layer, linear_probe
from circuitvision.readout.probes.fitting import fit, raw, standardiser
from circuitvision.readout.probes.linear import ProbeResult
from circuitvision.readout.probes.splitting import Targets, bootstrapped, shuffled, splits
from tests.readout.common import gaussians, hooked

# -- splits --------------------------------------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3), min_size=16, max_size=80), st.floats(0.2, 0.8), st.integers(0, 5))
def test_a_split_is_a_partition_in_proportion(labels, share, seed):
    labels = [*labels, *range(4), *range(4), *range(4)]
    targets = Targets.of(labels)
    ((train, test),) = splits(targets, test_share=share, seed=seed)
    assert sorted([*train.tolist(), *test.tolist()]) == list(range(len(labels)))
    for number in range(4):
        own = targets.values == number
        assert abs(int(own[test].sum()) - share * int(own.sum())) <= 1
    again = splits(targets, test_share=share, seed=seed)[0]
    assert again[1].tolist() == test.tolist()


@given(st.integers(2, 6), st.integers(0, 20))
def test_folds_hold_out_every_example_once(folds, seed):
    labels = [0, 1, 2] * 14
    parts = splits(Targets.of(labels), folds=folds, seed=seed)
    assert sorted(np.concatenate([test for _, test in parts]).tolist()) == list(range(len(labels)))
    for train, test in parts:
        assert not set(train.tolist()) & set(test.tolist())
        assert abs(len(test) - len(labels) / folds) <= 3


@given(st.integers(8, 20), st.integers(0, 50))
def test_groups_stay_on_one_side(n_groups, seed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n_groups), rng.integers(2, 6, n_groups)))
    labels = rng.integers(0, 2, len(groups))
    for options in ({"test_share": 0.3}, {"folds": 3}):
        for train, test in splits(Targets.of(labels), groups=[f"scene {g}" for g in groups], seed=seed, **options):
            assert not set(groups[train]) & set(groups[test])


def test_groups_end_a_leak():
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(300) // 6
    signature = torch.randn(50, 80, generator=generator)
    labels = (torch.rand(50, generator=generator) > 0.5).long()[groups]
    x = signature[groups] + 0.05 * torch.randn(300, 80, generator=generator)
    leaking = float(linear_probe(None, {"a": x}, labels, penalty=1e-3).values[0])
    honest = float(linear_probe(None, {"a": x}, labels, groups=groups, penalty=1e-3).values[0])
    assert leaking > 0.9
    assert honest < 0.75
    chosen = [linear_probe(None, {"a": x}, labels, groups=own, shuffles=0).penalty[0] for own in (groups, None)]
    assert float(chosen[0]) == 1.0 > float(chosen[1])


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_shuffled_labels_keep_what_groups_share(n_groups, size, seed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n_groups), rng.integers(1, size + 1, n_groups)))
    part = np.arange(len(groups)), np.zeros(0, dtype=np.int64)
    own = torch.from_numpy(groups % 3)
    (drawn,) = shuffled(own, [part], groups, 3, seed)
    for row in drawn:
        labels = [set(row[torch.from_numpy(groups == group)].tolist()) for group in range(n_groups)]
        assert all(len(label) == 1 for label in labels)
        assert sorted(label.pop() for label in labels) == sorted(group % 3 for group in range(n_groups))
    pairs, mixed = np.repeat(np.arange(n_groups), 2), torch.tensor([0, 1]).repeat(n_groups)
    part = np.arange(len(pairs)), np.zeros(0, dtype=np.int64)
    (drawn,) = shuffled(mixed, [part], pairs, 20, seed)
    assert (drawn.view(20, n_groups, 2).sum(-1) == 1).all()
    assert not torch.equal(drawn, mixed.repeat(20, 1))
    (alone,) = shuffled(mixed, [part], np.arange(2 * n_groups), 20, seed)
    assert torch.equal(alone.sort(dim=1).values, mixed.repeat(20, 1).sort(dim=1).values)


def test_copies_of_a_few_scenes_do_not_pass_for_many_examples():
    """Labels and features of 30 scenes have nothing to do with each other; every scene is there eight times."""
    found = {True: [], False: []}
    groups = torch.arange(240) // 8
    for seed in range(24):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(30, 6, generator=generator)[groups] + 0.1 * torch.randn(240, 6, generator=generator)
        labels = (torch.randperm(30, generator=generator) % 2)[groups]
        honest = linear_probe(None, {"a": x}, labels, groups=groups, shuffles=19, penalty=0.1, seed=seed)
        assert honest.independent == len(set(groups[honest.held_out].tolist()))
        found[True].append((float(honest.p_value[0]), bool(honest.low[0] <= 0.5 <= honest.high[0])))
        alike = linear_probe(None, {"a": x}, labels, held_out=honest.held_out, shuffles=19, penalty=0.1, seed=seed)
        found[False].append((float(alike.p_value[0]), bool(alike.low[0] <= 0.5 <= alike.high[0])))
        assert float(honest.control_sd[0]) > 1.3 * float(alike.control_sd[0])
    # Nothing is there to be read: among 20 scores, 19 of them shuffled, the true one stands at either end in a tenth of the draws.
    false_alarms = {grouped: sum(not 0.0501 < p < 0.9999 for p, _ in rows) for grouped, rows in found.items()}
    covered = {grouped: sum(inside for _, inside in rows) for grouped, rows in found.items()}
    assert false_alarms[True] <= binom.ppf(0.99, 24, 0.1) < false_alarms[False]
    assert covered[True] >= 20 > covered[False]


def test_rare_classes_show_in_the_balanced_score():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(400) % 10 == 0).long()
    result = linear_probe(None, {"noise": torch.randn(400, 3, generator=generator)}, labels, penalty=1.0)
    assert float(result.values[0]) == pytest.approx(result.chance) == pytest.approx(0.9)
    assert float(result.balanced[0]) == pytest.approx(0.5)
    assert float(result.selectivity[0]) == pytest.approx(0.0)
    both = ProbeResult(
        torch.tensor([0.5]), {"site": ["a"]}, predictions=torch.tensor([[0, 0, 0, 1]]),
        target=torch.tensor([0, 0, 2, 2]), classes=["a", "b", "c"], shuffled=torch.tensor([[0.25, 0.35]]),
    )  # fmt: skip
    assert both.balanced.tolist() == [0.5]
    assert both.selectivity.tolist() == pytest.approx([0.2])
    frame = result.to_frame()
    assert frame["balanced"][0] == pytest.approx(0.5)
    assert frame["selectivity"][0] == pytest.approx(0.0)
    assert "n = 120" in result.highlights()["best"]


def test_a_probe_below_the_commonest_label_is_not_said_to_read_it():
    labels = torch.arange(200) % 5 == 0
    better = ProbeResult(
        torch.tensor([0.75]), {"site": ["a"]}, low=torch.tensor([0.7]), high=torch.tensor([0.8]),
        shuffled=torch.full((1, 20), 0.6), chance=0.8, held_out=torch.arange(200), target=labels.long(),
        classes=[False, True], label_name="rare", independent=200,
    )  # fmt: skip
    assert "No layer tells the rare: 75% at most" in better.plot().layout.title.text
    assert "commonest label scores 80%" in better.plot().layout.title.text


def test_the_control_may_choose_its_own_penalty():
    """A small penalty suits the labels; under it a probe of shuffled labels fits noise and falls below chance."""
    generator = torch.Generator().manual_seed(0)
    rare = (torch.rand(400, generator=generator) < 0.2).long()
    x = torch.randn(400, 60, generator=generator)
    x[:, 0] += 3 * rare
    numbers = x[:, 0].double() + 0.1 * torch.randn(400, generator=generator)
    for labels, tolerance in ((rare, 0.02), (numbers, 0.12)):
        free = linear_probe(None, {"a": x}, labels, shuffles=10)
        bound = linear_probe(None, {"a": x}, labels, shuffles=10, penalty=float(free.penalty[0]))
        assert float(free.values[0]) == float(bound.values[0])
        assert abs(float(free.control[0]) - free.chance) < tolerance < free.chance - float(bound.control[0])
    assert len(linear_probe(None, {"a": x}, rare, shuffles=0).shuffled[0]) == 0


def test_intervals_of_numbers_cover_the_truth():
    inside = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4000, 2, generator=generator)
        y = (x[:, 0] + torch.randn(4000, generator=generator)).double()
        held_out = torch.arange(200)
        result = linear_probe(None, {"a": x, "b": x}, y, held_out=held_out, shuffles=0, penalty=1e-6, seed=seed)
        assert torch.equal(result.low, torch.stack([result.low[0]] * 2))
        assert float(result.low[0]) < float(result.values[0]) < float(result.high[0])
        inside.append(float(result.low[0]) < 0.5 < float(result.high[0]))
    assert sum(inside) >= 17
    groups = torch.arange(4000) // 20
    wide = linear_probe(None, {"a": x[groups]}, y[20 * groups], groups=groups, shuffles=0, penalty=1e-6)
    alike = linear_probe(None, {"a": x[groups]}, y[20 * groups], held_out=wide.held_out, shuffles=0, penalty=1e-6)
    assert wide.independent == len(wide.held_out) / 20
    assert float(wide.high[0] - wide.low[0]) > 2 * float(alike.high[0] - alike.low[0])
    error_bars = result.plot().data[-1].error_y
    assert error_bars.array[0] == pytest.approx(float(result.high[0] - result.values[0]))


def test_the_interval_of_numbers_is_that_of_examples_drawn_again():
    target = torch.tensor([0.0, 1.0, 3.0, 2.0, 5.0, 4.0], dtype=torch.float64)
    predicted = torch.stack([target + torch.tensor([0.5, -1.0, 0.2, 0.1, -0.4, 1.5]), torch.zeros(6)]).double()
    groups = np.array([4, 4, 7, 8, 8, 9])
    low, high = bootstrapped(predicted, target, groups, seed=3, draws=50)
    times = np.random.default_rng([3, 2]).multinomial(4, [0.25] * 4, size=50)[:, [0, 0, 1, 2, 2, 3]]
    for site in range(2):
        scores = []
        for row in times:
            again = torch.from_numpy(np.repeat(np.arange(6), row))
            own, wanted = predicted[site, again], target[again]
            if len(set(wanted.tolist())) > 1:
                scores.append(float(1 - (own - wanted).square().sum() / (wanted - wanted.mean()).square().sum()))
        assert (float(low[site]), float(high[site])) == pytest.approx(tuple(np.quantile(scores, [0.025, 0.975])))
    assert bootstrapped(predicted, target, np.zeros(6), seed=3)[0].isnan().all()


def test_few_examples_are_told_early():
    x = torch.randn(60, 50)
    with pytest.warns(UserWarning, match="42 training examples for 50 features"):
        linear_probe(None, {"a": x}, torch.arange(60) % 2, shuffles=0, penalty=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        linear_probe(None, {"a": x}, torch.arange(60) % 2, shuffles=0, penalty=1.0, test_share=0.1)
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=6)
    seen = []
    handle = model.module.register_forward_pre_hook(lambda *_: seen.append(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="for 24 features"):
            linear_probe(model, inputs, [0, 1] * 3)
    with pytest.raises(InputError, match="folds"):
        linear_probe(model, inputs, [0, 1] * 3, folds=7)
    handle.remove()
    assert not seen
    broken = {"pixel_values": inputs["pixel_values"] * torch.nan}
    with pytest.raises(InputError, match="not finite"), pytest.warns(UserWarning, match="features"):
        linear_probe(model, broken, [0, 1] * 3, shuffles=0)


def test_two_classes_have_the_penalty_that_is_promised():
    """With two classes, two rows of weights under a penalty are one row of the usual logistic regression under half of it."""
    x, labels = gaussians(80, 2, apart=1.0, features=4)
    prepared = standardiser(x.double().numpy())
    z = prepared.transform(x.double().numpy())
    weights, bias = map(torch.from_numpy, raw(prepared, fit(z, labels.numpy(), 2, 0.1)))
    logits, z = x.double() @ weights.T + bias, torch.from_numpy(z)
    row = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([row], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        out = z @ row[:4] + row[4]
        value = (
            torch.nn.functional.binary_cross_entropy_with_logits(out, labels.double())
            + 0.05 / 2 * row[:4].square().sum()
        )
        value.backward()
        return value

    solver.step(loss)
    wanted = (z @ row[:4] + row[4]).detach()
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], wanted, atol=1e-2, rtol=1e-2)


def test_examples_to_hold_out_may_be_named():
    x, labels = gaussians(90, 3, apart=10.0)
    mask = (labels == 0) & (torch.arange(90) > 60)
    by_mask = linear_probe(None, {"a": x}, labels, held_out=mask, shuffles=2)
    by_number = linear_probe(None, {"a": x}, labels, held_out=mask.nonzero().flatten().tolist(), shuffles=2)
    assert by_mask.held_out.tolist() == mask.nonzero().flatten().tolist()
    assert torch.equal(by_mask.predictions, by_number.predictions)
    assert by_mask.target.tolist() == [0] * int(mask.sum())


def test_features_are_standardised_by_the_training_part():
    x = 5 + 3 * torch.randn(40, 6)
    other = 100 + torch.randn(7, 6)
    prepared = standardiser(x.double().numpy())
    wanted = (other - x.mean(0)) / x.std(0, unbiased=False)
    torch.testing.assert_close(torch.from_numpy(prepared.transform(other.double().numpy())).float(), wanted)


def test_the_penalty_is_chosen_inside_the_training_part():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    noise = torch.randn(120, 20, generator=generator)
    loud = torch.randn(120, 1, generator=generator) * torch.ones(2)
    hidden = loud + 1e-2 * labels[:, None] * torch.tensor([1.0, 0.0])
    result = linear_probe(None, {"noise": noise}, labels, shuffles=0)
    assert float(result.penalty[0]) == 1.0
    assert result.control.isnan().all()
    result = linear_probe(None, {"hidden": hidden}, labels, shuffles=0)
    assert float(result.penalty[0]) <= 1e-4
    assert float(result.values[0]) == 1.0
    assert float(linear_probe(None, {"hidden": hidden}, labels, shuffles=0, penalty=1e-1).values[0]) < 0.9
    assert float(linear_probe(None, {"noise": noise}, noise.sum(1).double(), shuffles=0).penalty[0]) < 1e-3


def test_nothing_of_a_held_out_example_reaches_the_probe():
    x, labels = gaussians(200, 2, apart=3.0)
    result = linear_probe(None, {"a": x}, labels, shuffles=3)
    changed = x.clone()
    changed[result.held_out[:5]] += 1e4 * torch.randn(5, 12)
    again = linear_probe(None, {"a": changed}, labels, shuffles=3)
    assert torch.equal(result.weights, again.weights)
    assert torch.equal(result.predictions[:, 5:], again.predictions[:, 5:])


def test_folds_predict_every_example():
    x, labels = gaussians(150, 3, apart=10.0)
    result = linear_probe(None, {"a": x}, labels, folds=5, shuffles=2)
    assert result.held_out.tolist() == list(range(150))
    assert torch.equal(result.target, labels)
    assert float((result.predictions[0] == labels).double().mean()) == pytest.approx(float(result.values[0]))
    assert result.weights.numel() == 0


def test_the_result_is_the_same_again_and_survives_files(tmp_path):
    x, labels = gaussians(120, 3, apart=3.0)
    names = [["circle", "square", "cross"][label] for label in labels.tolist()]
    first, second = (
        linear_probe(None, {"a": x, "b": x[:, :4]}, names, seed=4, shuffles=3, penalty=1e-2) for _ in range(2)
    )
    assert torch.equal(first.shuffled, second.shuffled)
    assert torch.equal(first.held_out, second.held_out)
    again = ProbeResult.load(first.save(tmp_path / "probe.npz"))
    assert again.classes == ["circle", "cross", "square"]
    assert torch.equal(again.predictions, first.predictions)
    frame = again.to_frame()
    assert list(frame["site"]) == ["a", "b"]
    assert (frame["low"] <= frame["value"]).all()
    with torch.inference_mode():
        assert torch.equal(
            linear_probe(None, {"a": x}, names, seed=4, shuffles=3, penalty=1e-2).values[0], first.values[0]
        )


@pytest.mark.parametrize(
    ("labels", "options", "message"),
    [
        ([0, 1, 2], {}, "labels"),
        ([1] * 20, {}, "same"),
        ([0, "a"] * 10, {}, "int, str"),
        ([0.5, float("nan")] * 10, {}, "finite"),
        ([0, 1] * 9 + [0, 2], {}, "held out"),
        ([0, 1] * 10, {"test_share": 1.0}, "test_share"),
        ([0, 1] * 10, {"folds": 1}, "folds"),
        ([0, 1] * 10, {"groups": [0] * 3}, "groups"),
        ([0, 1] * 10, {"groups": [0, 1] * 10}, "No example"),
        ([0, 1] * 10, {"groups": [0] * 20}, "too few"),
        ([0, 1] * 10, {"groups": [0, 0, 1, 1] * 5, "folds": 3}, "too few"),
        ([0, 1] * 10, {"penalty": 0.0}, "penalty"),
        ([0, 1] * 10, {"penalty": float("nan")}, "penalty"),
        ([0, 1] * 10, {"shuffles": 2.5}, "shuffles"),
        ([0, 1] * 10, {"folds": 2.5}, "folds"),
        ([0, 1] * 10, {"test_share": "a third"}, "test_share"),
        (3, {}, "sequence"),
        ("ab" * 10, {}, "sequence"),
        ([0, 1] * 10, {"held_out": [20]}, "held_out"),
        ([0, 1] * 10, {"held_out": [True] * 3}, "held_out"),
        ([0, 1] * 10, {"held_out": [1], "folds": 3}, "no say"),
        ([0, 1] * 10, {"held_out": range(0, 20, 2)}, "train on"),
    ],
)
def test_meaningless_probes_are_refused(labels, options, message):
    with pytest.raises(InputError, match=message):
        linear_probe(None, {"a": torch.randn(20, 3)}, labels, **options)


@pytest.mark.parametrize(
    "vectors", [torch.randn(20, 3), {}, {"a": torch.randn(20)}, {"a": torch.randn(20, 0)}, {"a": [1] * 20}]
)
def test_vectors_that_are_none_are_refused(vectors):
    with pytest.raises(InputError, match="example feature"):
        linear_probe(None, vectors, [0, 1] * 10)


def test_arrays_will_do():
    x, labels = gaussians(60, 2, apart=5.0)
    one, other = (linear_probe(None, {"a": own}, labels, shuffles=0, penalty=1e-2) for own in (x, x.numpy()))
    assert torch.equal(one.weights, other.weights)
    as_list = decision_layer([[3], [1], [1], [1]], target=[1])
    assert as_list.values.tolist() == [1]
    assert decision_layer(np.array([[3], [1], [1], [1]])).values.tolist() == [1]


def test_activations_that_are_not_finite_are_refused():
    x = torch.randn(20, 3)
    x[3, 1] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        linear_probe(None, {"a": x}, [0, 1] * 10)

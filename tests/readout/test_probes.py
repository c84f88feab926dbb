"""Probes: known answers, splits that do not leak, one honest vector per example from every family, and the decision layer."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.data.questions import sample_largest
from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.plots import probes as figures
from circuitvision.provenance import hash_inputs
from circuitvision.readout import (
    DecisionLayers,
    ProbeResult,
    collect,
    decision_layer,
    exemplars,
    linear_probe,
    probe_vectors,
)
from circuitvision.readout.probes.collected import Collected, stream_sites
from circuitvision.readout.probes.fitting import Features, logistic, ridge
from circuitvision.readout.probes.splitting import Targets, bootstrapped, shuffled, splits, wilson
from tests.zoo import case, shared_model

cv.set_verbosity("quiet")


def gaussians(count: int, classes: int, apart: float, features: int = 12, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % classes
    centres = torch.randn(classes, features, generator=generator)
    centres = apart * centres / centres.norm(dim=1, keepdim=True)
    return centres[labels] + torch.randn(count, features, generator=generator), labels


def hooked(name: str):
    entry = case(name)
    return cv.HookedModel(shared_model(name), entry.processor() if entry.processor else None), entry


# -- known answers -------------------------------------------------------------------------------------------------------------------------


def test_separable_classes_are_told_and_shuffled_ones_are_not():
    x, labels = gaussians(800, 4, apart=12.0)
    result = probe_vectors({"a": x}, labels, shuffles=20)
    assert float(result.values[0]) > 0.99
    assert abs(float(result.control[0]) - 0.25) < 3 * float(result.control_sd[0]) < 0.15
    assert float(result.p_value[0]) == pytest.approx(1 / 21)
    assert result.chance == pytest.approx(0.25)


def test_features_without_information_stay_at_chance_even_where_they_fit_the_training_part():
    x = torch.randn(200, 400, generator=torch.Generator().manual_seed(3))
    labels = torch.arange(200) % 2
    with pytest.warns(UserWarning, match="140 training examples for 400 features"):
        result = probe_vectors({"a": x}, labels)
    assert float(result.train[0]) == 1.0
    assert abs(float(result.values[0]) - 0.5) < 0.2
    assert float(result.p_value[0]) > 0.05


def test_numbers_are_predicted_by_ridge_regression():
    x, _ = gaussians(400, 2, apart=1.0)
    y = x @ torch.arange(12.0) + 3
    result = probe_vectors({"a": x, "noise": torch.randn(400, 5)}, y.double(), penalty=1e-6)
    assert float(result.values[0]) > 0.999
    assert abs(float(result.values[1])) < 0.2
    assert result.classes == []
    assert abs(float(result.control[0])) < 0.2
    assert result.weights.numel() == 0
    alone = probe_vectors({"a": x}, y.double())
    torch.testing.assert_close(
        x[alone.held_out].double() @ alone.weights[0, 0] + alone.bias[0, 0], alone.predictions[0]
    )


@pytest.mark.parametrize(("examples", "features"), [(60, 8), (20, 50)])
def test_the_solution_is_stationary_for_tall_and_wide_features(examples, features):
    x, labels = gaussians(examples, 3, apart=2.0, features=features)
    x = x * torch.logspace(-2, 2, features) + 7
    penalty = 0.03
    fitted = Features.of(x)
    weights, bias = logistic(fitted, labels[None], 3, penalty)
    z = (x.double() - fitted.mean) / fitted.scale
    full = (fitted.basis @ weights[0]).requires_grad_(True)
    offset = bias[0].clone().requires_grad_(True)
    loss = torch.nn.functional.cross_entropy(z @ full + offset, labels) + penalty / 2 * full.square().sum()
    for gradient in torch.autograd.grad(loss, (full, offset)):
        assert float(gradient.abs().max()) < 1e-5
    y = torch.randn(1, examples, dtype=torch.float64)
    weights, intercept = ridge(fitted, y, penalty)
    normal = z.T @ z / examples + penalty * torch.eye(features)
    wanted = torch.linalg.solve(normal, z.T @ (y[0] - y.mean()) / examples)
    torch.testing.assert_close(fitted.basis @ weights[0, :, 0], wanted)
    assert float(intercept[0, 0]) == pytest.approx(float(y.mean()))


def test_problems_solved_together_equal_problems_solved_alone():
    x, labels = gaussians(120, 3, apart=2.0)
    drawn = torch.stack([labels, labels.flip(0), labels[torch.randperm(120)]])
    fitted = Features.of(x)
    together, offsets = logistic(fitted, drawn, 3, 1e-2)
    for number, row in enumerate(drawn):
        alone, offset = logistic(fitted, row[None], 3, 1e-2)
        torch.testing.assert_close(together[number], alone[0], atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(offsets[number], offset[0], atol=1e-4, rtol=1e-3)


def test_weights_act_on_activations_as_they_are():
    x, labels = gaussians(300, 3, apart=4.0)
    x = 100 + 5 * x
    result = probe_vectors({"a": x, "b": 2 * x}, labels, shuffles=2, penalty=1e-3)
    for site, values in enumerate((x, 2 * x)):
        logits = values[result.held_out].double() @ result.weights[site].T + result.bias[site]
        assert torch.equal(logits.argmax(-1), result.predictions[site])
    assert torch.equal(result.predictions[0], result.predictions[1])


def test_a_feature_that_is_constant_up_to_rounding_says_nothing():
    labels = torch.arange(200) % 2
    x = torch.full((200, 3), 5.0) + 1e-6 * labels[:, None]
    assert len(set(x[:, 0].tolist())) == 2
    result = probe_vectors({"a": x}, labels)
    assert float(result.values[0]) == result.chance
    small = 1e-20 * (labels[:, None] - 0.5) * torch.ones(200, 3)
    assert float(probe_vectors({"a": small}, labels).values[0]) == 1.0


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662)],
)
def test_wilson_intervals(right, count, low, high):
    found = wilson(torch.tensor(right / count), count)
    assert (float(found[0]), float(found[1])) == pytest.approx((low, high), abs=1e-3)


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
    assert torch.equal(again[1], test)


@given(st.integers(2, 6), st.integers(0, 20))
def test_folds_hold_out_every_example_once(folds, seed):
    labels = [0, 1, 2] * 14
    parts = splits(Targets.of(labels), folds=folds, seed=seed)
    assert sorted(torch.cat([test for _, test in parts]).tolist()) == list(range(len(labels)))
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
    leaking = float(probe_vectors({"a": x}, labels, penalty=1e-3).values[0])
    honest = float(probe_vectors({"a": x}, labels, groups=groups, penalty=1e-3).values[0])
    assert leaking > 0.9
    assert honest < 0.75
    chosen = [probe_vectors({"a": x}, labels, groups=own, shuffles=0).penalty[0] for own in (groups, None)]
    assert float(chosen[0]) == 1.0 > float(chosen[1])


@given(st.integers(2, 9), st.integers(1, 5), st.integers(0, 99))
def test_shuffled_labels_keep_what_groups_share(n_groups, size, seed):
    rng = np.random.default_rng(seed)
    groups = rng.permutation(np.repeat(np.arange(n_groups), rng.integers(1, size + 1, n_groups)))
    part = torch.arange(len(groups)), torch.zeros(0, dtype=torch.long)
    own = torch.from_numpy(groups % 3)
    (drawn,) = shuffled(own, [part], groups, 3, seed)
    for row in drawn:
        labels = [set(row[torch.from_numpy(groups == group)].tolist()) for group in range(n_groups)]
        assert all(len(label) == 1 for label in labels)
        assert sorted(label.pop() for label in labels) == sorted(group % 3 for group in range(n_groups))
    pairs, mixed = np.repeat(np.arange(n_groups), 2), torch.tensor([0, 1]).repeat(n_groups)
    part = torch.arange(len(pairs)), torch.zeros(0, dtype=torch.long)
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
        honest = probe_vectors({"a": x}, labels, groups=groups, shuffles=19, penalty=0.1, seed=seed)
        assert honest.independent == len(set(groups[honest.held_out].tolist()))
        found[True].append((float(honest.p_value[0]), bool(honest.low[0] <= 0.5 <= honest.high[0])))
        alike = probe_vectors({"a": x}, labels, held_out=honest.held_out, shuffles=19, penalty=0.1, seed=seed)
        found[False].append((float(alike.p_value[0]), bool(alike.low[0] <= 0.5 <= alike.high[0])))
        assert float(honest.control_sd[0]) > 1.3 * float(alike.control_sd[0])
    false_alarms = {grouped: sum(p <= 0.0501 for p, _ in rows) for grouped, rows in found.items()}
    covered = {grouped: sum(inside for _, inside in rows) for grouped, rows in found.items()}
    assert false_alarms[True] <= 3 < false_alarms[False]
    assert covered[True] >= 20 > covered[False]


def test_rare_classes_show_in_the_balanced_score():
    generator = torch.Generator().manual_seed(0)
    labels = (torch.arange(400) % 10 == 0).long()
    result = probe_vectors({"noise": torch.randn(400, 3, generator=generator)}, labels, penalty=1.0)
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
        classes=[False, True], what="rare", independent=200,
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
        free = probe_vectors({"a": x}, labels, shuffles=10)
        bound = probe_vectors({"a": x}, labels, shuffles=10, penalty=float(free.penalty[0]))
        assert float(free.values[0]) == float(bound.values[0])
        assert abs(float(free.control[0]) - free.chance) < tolerance < free.chance - float(bound.control[0])
    assert len(probe_vectors({"a": x}, rare, shuffles=0).shuffled[0]) == 0


def test_intervals_of_numbers_cover_the_truth():
    inside = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(4000, 2, generator=generator)
        y = (x[:, 0] + torch.randn(4000, generator=generator)).double()
        held_out = torch.arange(200)
        result = probe_vectors({"a": x, "b": x}, y, held_out=held_out, shuffles=0, penalty=1e-6, seed=seed)
        assert torch.equal(result.low, torch.stack([result.low[0]] * 2))
        assert float(result.low[0]) < float(result.values[0]) < float(result.high[0])
        inside.append(float(result.low[0]) < 0.5 < float(result.high[0]))
    assert sum(inside) >= 17
    groups = torch.arange(4000) // 20
    wide = probe_vectors({"a": x[groups]}, y[20 * groups], groups=groups, shuffles=0, penalty=1e-6)
    alike = probe_vectors({"a": x[groups]}, y[20 * groups], held_out=wide.held_out, shuffles=0, penalty=1e-6)
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
        probe_vectors({"a": x}, torch.arange(60) % 2, shuffles=0, penalty=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        probe_vectors({"a": x}, torch.arange(60) % 2, shuffles=0, penalty=1.0, test_share=0.1)
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
    fitted = Features.of(x)
    weights, bias = logistic(fitted, labels[None], 2, 0.1)
    logits = fitted.rotated @ weights[0] + bias[0]
    row = torch.zeros(5, dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([row], max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe")

    def loss():
        solver.zero_grad()
        out = fitted.rotated @ row[:4] + row[4]
        value = (
            torch.nn.functional.binary_cross_entropy_with_logits(out, labels.double())
            + 0.05 / 2 * row[:4].square().sum()
        )
        value.backward()
        return value

    solver.step(loss)
    wanted = (fitted.rotated @ row[:4] + row[4]).detach()
    torch.testing.assert_close(logits[:, 1] - logits[:, 0], wanted, atol=1e-4, rtol=1e-4)


def test_examples_to_hold_out_may_be_named():
    x, labels = gaussians(90, 3, apart=10.0)
    mask = (labels == 0) & (torch.arange(90) > 60)
    by_mask = probe_vectors({"a": x}, labels, held_out=mask, shuffles=2)
    by_number = probe_vectors({"a": x}, labels, held_out=mask.nonzero().flatten().tolist(), shuffles=2)
    assert by_mask.held_out.tolist() == mask.nonzero().flatten().tolist()
    assert torch.equal(by_mask.predictions, by_number.predictions)
    assert by_mask.target.tolist() == [0] * int(mask.sum())


def test_features_are_standardised_by_the_training_part():
    x = 5 + 3 * torch.randn(40, 6)
    fitted = Features.of(x)
    torch.testing.assert_close(fitted.rotated.mean(0), torch.zeros(6, dtype=torch.float64), atol=1e-9, rtol=0)
    torch.testing.assert_close(fitted.mean, x.double().mean(0))
    torch.testing.assert_close(fitted.scale, x.double().std(0, unbiased=False))
    torch.testing.assert_close(fitted.of_others(x), fitted.rotated)


def test_the_penalty_is_chosen_inside_the_training_part():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % 2
    noise = torch.randn(120, 20, generator=generator)
    loud = torch.randn(120, 1, generator=generator) * torch.ones(2)
    hidden = loud + 1e-2 * labels[:, None] * torch.tensor([1.0, 0.0])
    result = probe_vectors({"noise": noise}, labels, shuffles=0)
    assert float(result.penalty[0]) == 1.0
    assert result.control.isnan().all()
    result = probe_vectors({"hidden": hidden}, labels, shuffles=0)
    assert float(result.penalty[0]) <= 1e-4
    assert float(result.values[0]) == 1.0
    assert float(probe_vectors({"hidden": hidden}, labels, shuffles=0, penalty=1e-1).values[0]) < 0.9
    assert float(probe_vectors({"noise": noise}, noise.sum(1).double(), shuffles=0).penalty[0]) < 1e-3


def test_nothing_of_a_held_out_example_reaches_the_probe():
    x, labels = gaussians(200, 2, apart=3.0)
    result = probe_vectors({"a": x}, labels, shuffles=3)
    changed = x.clone()
    changed[result.held_out[:5]] += 1e4 * torch.randn(5, 12)
    again = probe_vectors({"a": changed}, labels, shuffles=3)
    assert torch.equal(result.weights, again.weights)
    assert torch.equal(result.predictions[:, 5:], again.predictions[:, 5:])


def test_folds_predict_every_example():
    x, labels = gaussians(150, 3, apart=10.0)
    result = probe_vectors({"a": x}, labels, folds=5, shuffles=2)
    assert result.held_out.tolist() == list(range(150))
    assert torch.equal(result.target, labels)
    assert float((result.predictions[0] == labels).double().mean()) == pytest.approx(float(result.values[0]))
    assert result.weights.numel() == 0


def test_the_result_is_the_same_again_and_survives_files(tmp_path):
    x, labels = gaussians(120, 3, apart=3.0)
    names = [["circle", "square", "cross"][label] for label in labels.tolist()]
    first, second = (probe_vectors({"a": x, "b": x[:, :4]}, names, seed=4, shuffles=3, penalty=1e-2) for _ in range(2))
    assert torch.equal(first.shuffled, second.shuffled)
    assert torch.equal(first.held_out, second.held_out)
    again = ProbeResult.load(first.save(tmp_path / "probe.npz"))
    assert again.classes == ["circle", "cross", "square"]
    assert torch.equal(again.predictions, first.predictions)
    frame = again.to_frame()
    assert list(frame["site"]) == ["a", "b"]
    assert (frame["low"] <= frame["value"]).all()
    with torch.inference_mode():
        assert torch.equal(probe_vectors({"a": x}, names, seed=4, shuffles=3, penalty=1e-2).values[0], first.values[0])


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
        ([0, 1] * 10, {"groups": [0, 1] * 10}, "train on"),
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
        probe_vectors({"a": torch.randn(20, 3)}, labels, **options)


@pytest.mark.parametrize(
    "vectors", [torch.randn(20, 3), {}, {"a": torch.randn(20)}, {"a": torch.randn(20, 0)}, {"a": [1] * 20}]
)
def test_vectors_that_are_none_are_refused(vectors):
    with pytest.raises(InputError, match="example feature"):
        probe_vectors(vectors, [0, 1] * 10)


def test_arrays_will_do():
    x, labels = gaussians(60, 2, apart=5.0)
    one, other = (probe_vectors({"a": own}, labels, shuffles=0, penalty=1e-2) for own in (x, x.numpy()))
    assert torch.equal(one.weights, other.weights)
    as_list = decision_layer([[3], [1], [1], [1]], target=[1])
    assert as_list.values.tolist() == [1]
    assert decision_layer(np.array([[3], [1], [1], [1]])).values.tolist() == [1]


def test_activations_that_are_not_finite_are_refused():
    x = torch.randn(20, 3)
    x[3, 1] = torch.inf
    with pytest.raises(InputError, match="not finite"):
        probe_vectors({"a": x}, [0, 1] * 10)


# -- one vector per example ----------------------------------------------------------------------------------------------------------------


def by_hand(model, inputs, site, picked):
    """The mean over ``picked(tokens, row)`` of all rows of each example."""
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=site)
    tower = site.partition(".")[0]
    tokens = model.tokens(inputs)[tower]
    rows = [torch.stack([cache[site][row, p].flatten() for p in picked(tokens, row)]) for row in range(tokens.n_rows)]
    count = int(tokens.example.max()) + 1
    return torch.stack(
        [
            torch.cat([rows[row] for row in range(tokens.n_rows) if tokens.example[row] == e]).mean(0)
            for e in range(count)
        ]
    )


ROWS = [
    ("vit", "vision.blocks.0.hook_resid_post", "cls", lambda t, r: [0]),
    ("dinov2-registers", "vision.blocks.1.mlp.hook_post", "mean_patch", lambda t, r: t.positions("patch", row=r)),
    ("siglip2-vision", "vision.blocks.0.hook_mlp_out", "last", lambda t, r: [t.last(r)]),
    ("llava-clip-llama", "language.blocks.1.attn.hook_z", "last", lambda t, r: [t.last(r)]),
    ("llava-next-mistral", "vision.blocks.0.hook_resid_mid", "patch", lambda t, r: t.positions("patch", row=r)),
    ("paligemma2", "language.blocks.0.attn.hook_k", 3, lambda t, r: [3]),
    ("pi0", "vision.blocks.0.hook_resid_post", "all", lambda t, r: range(t.n_positions)),
    ("pi0", "action.blocks.1.hook_resid_post", "state", lambda t, r: t.positions("state", row=r)),
]


@pytest.mark.parametrize(("name", "site", "positions", "picked"), ROWS)
def test_a_vector_is_the_mean_over_the_chosen_positions(name, site, positions, picked):
    model, entry = hooked(name)
    inputs = entry.inputs(model.module, batch=3)
    wanted = by_hand(model, inputs, site, picked)
    for batch_size in (1, 2, 8):
        found = collect(model, inputs, site, positions=positions, batch_size=batch_size)
        torch.testing.assert_close(found[site], wanted, atol=1e-5, rtol=1e-4)
    assert not model.engine.handles


def test_positions_may_be_functions_of_the_tokens_and_differ_from_example_to_example():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=4)
    site = "language.blocks.0.hook_resid_post"
    corner = collect(model, inputs, site, positions=lambda t: t.select("patch").patch(0, 0), batch_size=3)
    tokens = model.tokens(inputs)["language"]
    torch.testing.assert_close(corner[site], by_hand(model, inputs, site, lambda t, r: t.positions("patch", row=r)[:1]))
    own = [tokens.positions("patch", row=row)[row] for row in range(4)]
    one_each = by_hand(model, inputs, site, lambda t, r: [own[r]])
    for positions in (own, torch.tensor(own), {"language": own}):
        torch.testing.assert_close(collect(model, inputs, site, positions=positions, batch_size=3)[site], one_each)
    mask = torch.nn.functional.one_hot(torch.tensor(own), tokens.n_positions).bool()
    torch.testing.assert_close(collect(model, inputs, site, positions=mask, batch_size=3)[site], one_each)
    patches = tokens.select("patch")
    for positions in (patches, patches.tensor.numpy()):
        found = collect(model, inputs, site, positions=positions, batch_size=3)
        torch.testing.assert_close(found[site], collect(model, inputs, site, positions="patch")[site])
    with pytest.raises(InputError, match="3 examples for 4"):
        collect(model, inputs, site, positions=mask[:3])
    two = entry.inputs(model.module, batch=2, images_per_prompt=2)
    first = model.tokens(two)["vision"].select("patch").tensor[:2]
    with pytest.raises(InputError, match="several rows"):
        collect(model, two, "vision.blocks.0.hook_resid_post", positions=first)
    numbered = []

    def chosen(tokens, examples):
        numbered.extend(examples)
        return tokens.select("patch")

    collect(model, inputs, site, positions=chosen, batch_size=3)
    assert numbered == [0, 1, 2, 3]


def single(entry, model, seed):
    """One example; of a dual encoder one image and one text."""
    inputs = entry.inputs(model.module, batch=1, seed=seed)
    texts = ("input_ids", "attention_mask")
    return {name: value[:1] if name in texts else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "llava-next-llama", "llava-onevision", "pi0", "siglip2"])
def test_one_mapping_a_list_and_a_generator_give_the_same(name):
    model, entry = hooked(name)
    site = f"{list(model.towers)[-1]}.blocks.0.hook_resid_post"
    singles = [single(entry, model, seed) for seed in range(4)]
    one_by_one = collect(model, iter(singles), site, positions="all", batch_size=1)
    in_batches = collect(model, singles, site, positions="all", batch_size=3)
    torch.testing.assert_close(in_batches[site], one_by_one[site], atol=1e-5, rtol=1e-4)
    assert in_batches.provenance["dataset_sha256"] == one_by_one.provenance["dataset_sha256"]
    shapes = {tuple(v.shape for v in inputs.values() if isinstance(v, torch.Tensor)) for inputs in singles}
    if len(shapes) > 1:
        return
    tensors = {k: torch.cat([s[k] for s in singles]) for k, v in singles[0].items() if isinstance(v, torch.Tensor)}
    whole = {**singles[0], **tensors}
    in_pieces = collect(model, whole, site, positions="all", batch_size=3)
    torch.testing.assert_close(in_pieces[site], one_by_one[site], atol=1e-5, rtol=1e-4)
    assert in_pieces.provenance["dataset_sha256"] == hash_inputs(whole)


def test_several_images_go_with_their_example():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=3, images_per_prompt=2)
    site = "vision.blocks.0.hook_resid_post"
    whole = collect(model, inputs, site, positions="mean_patch", batch_size=8)[site]
    assert whole.shape[0] == 3
    torch.testing.assert_close(collect(model, inputs, site, positions="mean_patch", batch_size=1)[site], whole)
    torch.testing.assert_close(whole, by_hand(model, inputs, site, lambda t, r: t.positions("patch", row=r)))


def test_examples_of_a_dual_encoder_are_those_of_the_tower_asked_for():
    model, entry = hooked("clip")
    inputs = entry.inputs(model.module, batch=3)
    assert len(inputs["input_ids"]) == 4
    for tower, count in (("vision", 3), ("text", 4)):
        site = f"{tower}.blocks.1.hook_resid_post"
        found = collect(model, inputs, site, positions="last", batch_size=2)[site]
        torch.testing.assert_close(found, by_hand(model, inputs, site, lambda t, r: [t.last(r)]), atol=1e-5, rtol=1e-4)
        assert len(found) == count
    with pytest.raises(InputError, match="3 images and 4 texts"):
        collect(model, inputs, ["vision.blocks.0.hook_resid_post", "text.blocks.0.hook_resid_post"])


def test_sites_a_tower_has_pooled_and_sites_without_the_first_positions():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=2)
    out = collect(model, inputs, "projector.hook_out", positions="mean_patch")["projector.hook_out"]
    _, cache = model.run_with_cache(inputs, names_filter="projector.hook_out")
    torch.testing.assert_close(out, cache["projector.hook_out"].mean(1).detach())
    for positions in ("all", "mean"):
        found = collect(model, inputs, "projector.hook_out", positions=positions)["projector.hook_out"]
        torch.testing.assert_close(found, out)
    strongest = exemplars(model, inputs, "projector.hook_out", top_k=2)
    torch.testing.assert_close(
        strongest.values, cache["projector.hook_out"].detach().max(1).values.T.sort(dim=1, descending=True).values
    )
    assert int(strongest.position.min()) >= 1
    with pytest.raises(InputError, match="lacks the first 1"):
        collect(model, inputs, "projector.hook_out", positions="cls")
    siglip, entry = hooked("siglip")
    inputs = entry.inputs(siglip.module, batch=2)
    pooled = collect(siglip, inputs, ["vision.hook_readout", "vision.pool.attn.hook_z"])
    assert {len(value) for value in pooled.values()} == {2}


def test_a_run_ends_when_the_last_site_was_read_and_leaves_nothing():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=2)
    seen = []
    layers = [block.module for block in model.language.blocks]
    handles = [layer.register_forward_pre_hook(lambda *_: seen.append(1)) for layer in layers]
    site = "vision.blocks.0.hook_resid_post"
    first = collect(model, inputs, site)
    assert not seen
    for handle in handles:
        handle.remove()
    assert not model.engine.stack
    assert not model.engine.handles
    logits = model(inputs)
    assert logits.requires_grad
    with torch.no_grad(), model.hooks([(site, lambda value, hook: value * 0)]):
        assert not collect(model, inputs, site)[site].any()
    torch.testing.assert_close(collect(model, inputs, site)[site], first[site], atol=0, rtol=0)
    assert not first[site].requires_grad
    assert (
        first.provenance["dataset_sha256"] == cv.provenance.hash_inputs(inputs) if hasattr(cv, "provenance") else True
    )


def test_collected_vectors_keep(tmp_path):
    model, entry = hooked("vit")
    vectors = collect(model, entry.inputs(model.module, batch=3), stream_sites(model), positions="mean_patch")
    again = Collected.load(vectors.save(tmp_path / "vectors.safetensors"))
    assert list(again) == list(vectors)
    assert all(torch.equal(again[site], vectors[site]) for site in vectors)
    assert (again.positions, again.provenance) == (vectors.positions, vectors.provenance)
    result = probe_vectors(
        {site: x.repeat(16, 1) for site, x in again.items()}, [0, 1, 1] * 16, shuffles=0, penalty=1.0
    )
    with pytest.raises(InputError, match="safetensors"):
        vectors.save(tmp_path / "vectors.npz")
    with pytest.raises(InputError, match="no file"):
        Collected.load(tmp_path / "none.safetensors")
    (tmp_path / "text.safetensors").write_text("text")
    for path in (result.save(tmp_path / "probe.safetensors"), tmp_path / "text.safetensors"):
        with pytest.raises(InputError, match="no collected vectors"):
            Collected.load(path)


def test_bfloat16_becomes_float32_and_float64_stays(fresh_model):
    for dtype, wanted in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        model = cv.HookedModel(fresh_model(case("vit")).to(dtype))
        inputs = case("vit").inputs(model.module, batch=2, dtype=dtype)
        assert collect(model, inputs, "vision.hook_input")["vision.hook_input"].dtype == wanted


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ("middle", "not understood"),
        ("register", "its kinds: cls, patch"),
        (99, "outside"),
        (-1, "outside"),
        ([0, 1, 2], "positions of 3 examples for 2"),
        (lambda tokens: [1, 2], "returns a selection"),
        ({"language": "last"}, "names language"),
    ],
)
def test_positions_that_make_no_sense_are_refused(positions, message):
    model, entry = hooked("vit")
    with pytest.raises(InputError, match=message):
        collect(model, entry.inputs(model.module, batch=2), "vision.hook_input", positions=positions)


def test_padding_is_refused_and_last_is_never_padding():
    model, entry = hooked("llava-clip-llama")
    inputs = entry.inputs(model.module, batch=2, padding="right")
    tokens = model.tokens(inputs)["language"]
    assert (tokens.kind == "padding").any()
    site = "language.blocks.0.hook_resid_post"
    wanted = by_hand(model, inputs, site, lambda t, r: [t.last(r)])
    torch.testing.assert_close(collect(model, inputs, site, positions="last")[site], wanted)
    with pytest.raises(InputError, match="padding"):
        collect(model, inputs, site, positions=tokens.n_positions - 1)


def test_data_sets_that_make_no_sense_are_refused():
    model, entry = hooked("vit")
    inputs = entry.inputs(model.module, batch=2)
    site = "vision.hook_input"
    with pytest.raises(InputError, match="no example"):
        collect(model, [], site)
    with pytest.raises(InputError, match="no example"):
        collect(model, iter([]), site)
    with pytest.raises(InputError, match="batch_size"):
        collect(model, inputs, site, batch_size=0)
    with pytest.raises(InputError, match="number per query"):
        collect(model, inputs, "vision.blocks.0.attn.hook_pattern")
    with pytest.raises(InputError, match="2 examples and there are 3 labels"):
        linear_probe(model, inputs, [0, 1, 0])
    with pytest.raises(UnknownSiteError):
        collect(model, inputs, "vision.blocks.9.hook_resid_post")
    vlm, entry = hooked("llava-clip-llama")
    with pytest.raises(InputError, match="vision, language"):
        linear_probe(vlm, entry.inputs(vlm.module, batch=2), [0, 1])
    odd = {**inputs, "bool_masked_pos": torch.zeros(5, 16, dtype=torch.bool)}
    with pytest.raises(InputError, match="cannot be cut"):
        collect(model, odd, site, batch_size=1)


# -- a trained model -----------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes():
    model = cv.organisms.load("shapes-vit")
    drawn = sample_largest(240, 5)
    return model, model.inputs(images=[scene.image for scene, _ in drawn]), [shape for _, shape in drawn]


def test_the_class_token_learns_the_shape_in_the_first_block(shapes):
    model, inputs, labels = shapes
    result = linear_probe(model, inputs, labels, positions="cls", what="shape", shuffles=19, penalty=1e-3)
    assert result.layers == ["input", 0, 1, 2]
    assert float(result.values[0]) == result.chance
    assert float(result.values[1:].min()) > 0.9
    assert float(result.p_value[1]) == pytest.approx(0.05)
    assert (result.control - 0.2).abs().max() < 0.15
    settled = result.decisions(2)
    assert settled.axes["example"] == result.held_out.tolist()
    assert settled.stable_but_wrong < 0.1
    assert "shape can be read after layer 0" in figures.probe(result).layout.title.text
    assert result.plot().layout.yaxis.tickformat == ".0%"
    assert len(figures.probe({"a": result, "b": result}).data) == 6
    assert settled.plot().layout.title.text


# -- decision layers -----------------------------------------------------------------------------------------------------------------------


def test_the_decision_layer_of_the_paper():
    sequence = torch.tensor([[3], [1], [1], [1], [2], [2], [2]])
    two = decision_layer(sequence, 2)
    assert two.values.tolist() == [1]
    assert two.stable.tolist() == [True]
    assert two.decided.tolist() == [1]
    assert two.revised == 1.0
    with pytest.warns(UserWarning, match="agrees over 4"):
        three = decision_layer(sequence, 3)
    assert three.values.tolist() == [6]
    assert three.stable.tolist() == [False]
    assert three.cumulative.tolist() == [0.0] * 7
    assert three.shares == {"early": 0.0, "middle": 0.0, "late": 0.0, "never": 1.0}


@given(st.integers(1, 4), st.integers(2, 9), st.integers(0, 1000))
def test_decision_layers_equal_the_definition(k, anchors, seed):
    if k >= anchors:
        k = anchors - 1
    predictions = torch.randint(0, 2, (anchors, 30), generator=torch.Generator().manual_seed(seed))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = decision_layer(predictions, k, target=predictions[-1])
    for example, sequence in enumerate(predictions.T.tolist()):
        layers = [l for l in range(anchors - k) if len(set(sequence[l : l + k + 1])) == 1]  # noqa: E741
        assert int(found.values[example]) == (layers[0] if layers else anchors - 1)
        assert bool(found.stable[example]) == bool(layers)
        assert bool(found.wrong[example]) == (bool(layers) and sequence[layers[0]] != sequence[-1])
    assert float(found.cumulative[-1]) == pytest.approx(float(found.stable.double().mean()))
    assert sum(found.shares.values()) == pytest.approx(1.0)


def test_never_settled_examples_are_counted_apart_from_late_ones(tmp_path):
    sequences = [[0] * 7, [0, 1, 0, 0, 0, 1, 1], [0, 1, 2, 3, 5, 4, 4], [0, 1, 0, 1, 0, 1, 0]]
    found = decision_layer(torch.tensor(sequences).T, 1, target=torch.tensor([0, 1, 4, 0]), layers=["input", *range(6)])
    assert found.values.tolist() == [0, 2, 5, 6]
    assert found.stable.tolist() == [True, True, True, False]
    assert found.shares == {"early": 0.25, "middle": 0.25, "late": 0.25, "never": 0.25}
    assert found.stable_but_wrong == pytest.approx(1 / 3)
    assert found.cumulative.tolist() == [0.25, 0.25, 0.5, 0.5, 0.5, 0.75, 0.75]
    again = DecisionLayers.load(found.save(tmp_path / "decisions.npz"))
    assert torch.equal(again.stable, found.stable)
    assert again.layers == ["input", *range(6)]
    frame = again.to_frame()
    assert frame["layer"].tolist() == ["input", 1, 4, 5]
    assert frame["stable"].tolist() == [True, True, True, False]
    assert again.highlights()["never"] == "25%"
    bars = again.plot()
    assert sum(sum(bar.y) for bar in bars.data) == pytest.approx(1.0)


def test_early_ends_and_late_begins_where_it_is_said():
    settled = DecisionLayers(
        torch.tensor([2, 3, 6, 7]), {"example": list(range(4))}, stable=torch.ones(4, dtype=torch.bool), layers=list(range(11))
    )  # fmt: skip
    assert settled.shares == {"early": 0.25, "middle": 0.5, "late": 0.25, "never": 0.0}


def test_a_lens_gives_predictions_as_well(shapes):
    model, inputs, _ = shapes
    few = {"pixel_values": inputs["pixel_values"][:20]}
    vectors = collect(model, few, stream_sites(model), positions="cls")
    top = torch.stack([(vector @ model.vision.W_U).argmax(-1) for vector in vectors.values()])
    assert decision_layer(top, 1).values.shape == (20,)


@pytest.mark.parametrize(
    ("predictions", "options", "message"),
    [
        (torch.rand(4, 3), {}, "whole numbers"),
        (torch.zeros(4, dtype=torch.long), {}, "layer example"),
        (torch.zeros(3, 2, dtype=torch.long), {"k": 3}, "less than the 3 anchors"),
        (torch.zeros(3, 2, dtype=torch.long), {"k": 1.5}, "whole number"),
        (torch.zeros(3, 2, dtype=torch.long), {"target": torch.zeros(3)}, "must fit"),
        (torch.zeros(3, 2, dtype=torch.long), {"layers": [0]}, "must fit"),
    ],
)
def test_meaningless_decision_layers_are_refused(predictions, options, message):
    with pytest.raises(InputError, match=message):
        decision_layer(predictions, **options)


def test_wrong_needs_the_right_answers():
    with pytest.raises(InputError, match="target"):
        _ = decision_layer(torch.zeros(4, 2, dtype=torch.long)).wrong

"""Metrics: values computed by hand, padding on either side, answers as words, and inputs that cannot be meant."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from circuitvision import metrics, regions
from circuitvision.errors import InputError


def vocabulary_model(
    words: dict[str, int], towers: tuple[str, ...] = ("vision", "language"), labels: dict[str, int] | None = None
):
    def token(word: str) -> int:
        if word not in words:
            raise InputError(f"{word!r} is not one piece of the vocabulary.")
        return words[word]

    config = SimpleNamespace(label2id=labels or {})
    module = SimpleNamespace(config=config)
    return SimpleNamespace(module=module, towers=dict.fromkeys(towers), is_dual="text" in towers, token=token)


@pytest.fixture
def logits() -> torch.Tensor:
    return torch.tensor(
        [[[0.0, 1.0, 5.0], [2.0, 0.5, 0.0], [9.0, 9.0, 9.0]], [[1.0, 1.0, 1.0], [4.0, 0.0, 0.0], [0.0, 3.0, 1.0]]]
    )


def test_logit_diff_reads_the_last_unmasked_position_with_right_and_left_padding(logits):
    diff = metrics.logit_diff(0, 1)
    assert diff(logits).tolist() == [0.0, -3.0]
    right = {"attention_mask": torch.tensor([[1, 1, 0], [1, 1, 1]])}
    assert diff(logits, right).tolist() == [1.5, -3.0]
    left = {"attention_mask": torch.tensor([[0, 1, 1], [0, 0, 1]])}
    assert diff(logits, left).tolist() == [0.0, -3.0]


def test_positions_by_number_and_per_example(logits):
    assert metrics.logit_diff(2, 0, position=0)(logits).tolist() == [5.0, 0.0]
    assert metrics.logit_diff(2, 0, position=regions.at(torch.tensor([0, 1])))(logits).tolist() == [5.0, -4.0]
    assert metrics.logit_diff(2, 0, position=-3)(logits).tolist() == [5.0, 0.0]


def test_answers_per_example(logits):
    assert metrics.logit_diff([0, 1], [1, 2])(logits[:, 2]).tolist() == [0.0, 2.0]


def test_probabilities_sum_to_one_and_match_the_softmax_formula():
    rows = torch.tensor([[1.0, 2.0, 4.0]])
    total = sum(metrics.prob(i)(rows) for i in range(3))
    assert total.item() == pytest.approx(1.0)
    expected = math.exp(2) / (math.exp(1) + math.exp(2) + math.exp(4))
    assert metrics.prob(1)(rows).item() == pytest.approx(expected)
    assert metrics.logprob(1)(rows).item() == pytest.approx(math.log(expected))


def test_rank_is_one_for_the_best_and_shared_by_equals():
    rows = torch.tensor([[1.0, 3.0, 3.0, 0.0]])
    assert [metrics.rank(i)(rows).item() for i in range(4)] == [3.0, 1.0, 1.0, 4.0]


def test_kl_of_a_run_with_itself_is_zero_and_two_points_match_the_formula():
    p, q = torch.tensor([[0.8, 0.2]]), torch.tensor([[0.5, 0.5]])
    assert metrics.kl(p.log())(p.log()).item() == pytest.approx(0.0, abs=1e-7)
    assert metrics.kl(p.log())(q.log()).item() == pytest.approx(0.8 * math.log(1.6) + 0.2 * math.log(0.4))
    with pytest.raises(InputError, match="shape"):
        metrics.kl(p.log())(torch.zeros(2, 2))


def test_action_dim_reads_one_coordinate():
    actions = torch.arange(12.0).reshape(2, 3, 2)
    assert metrics.action_dim(1)(actions).tolist() == [1.0, 7.0]
    assert metrics.action_dim(0, step=2)(actions).tolist() == [4.0, 10.0]
    assert metrics.action_dim(0, step=None)(actions).tolist() == [2.0, 8.0]
    for wrong in (metrics.action_dim(2), metrics.action_dim(0, step=3)):
        with pytest.raises(InputError):
            wrong(actions)


def test_an_estimated_action_is_one_euler_step_away_in_the_robots_units():
    noise, velocity = torch.arange(8.0).reshape(2, 2, 2), torch.tensor([[[1.0, 2.0], [3.0, 4.0]]] * 2)
    inputs = {"noise": noise, "timestep": torch.tensor([1.0, 0.5])}
    assert metrics.action_estimate(1)(velocity, inputs).tolist() == [1.0 - 2.0, 5.0 - 1.0]
    assert metrics.action_estimate(0, step=None)(velocity, inputs).tolist() == [1.0 - 2.0, 5.0 - 1.0]
    model = SimpleNamespace(processor=SimpleNamespace(actions_mean=[10.0, 0.0], actions_std=[1.0, 3.0]))
    assert metrics.action_estimate(1).bind(model)(velocity, inputs).tolist() == [-3.0, 12.0]
    assert metrics.action_estimate(0).bind(model)(velocity, inputs).tolist() == [9.0, 13.5]
    actions = metrics.action_estimate(1).bind(model).of_marked()
    assert actions(velocity).tolist() == [6.0, 6.0]
    for wrong in ({}, {"noise": noise}, {"noise": noise[:1], "timestep": torch.ones(1)}):
        with pytest.raises(InputError, match="noise"):
            metrics.action_estimate(1)(velocity, wrong)


def test_half_precision_is_subtracted_in_float32():
    rows = torch.tensor([[256.0, 1.0]], dtype=torch.bfloat16)
    assert metrics.logit_diff(0, 1)(rows).dtype == torch.float32
    assert metrics.logit_diff(0, 1)(rows).item() == 255.0  # bfloat16 has no 255-256 step of one at this size


def test_words_need_a_model_and_are_bound_once():
    diff = metrics.logit_diff("red", ["blue", "red"])
    rows = torch.tensor([[1.0, 5.0], [1.0, 5.0]])
    with pytest.raises(InputError, match="bind"):
        diff(rows)
    bound = diff.bind(vocabulary_model({"red": 1, "blue": 0}))
    assert bound(rows).tolist() == [4.0, 0.0]
    assert bound.name == "logit_diff(red - per example)"
    with pytest.raises(InputError, match="green"):
        metrics.prob("green").bind(vocabulary_model({"red": 1}))


def test_class_names_come_before_the_tokenizer_and_captions_have_no_words():
    classifier = vocabulary_model({"cat": 40}, towers=("vision",), labels={"cat": 2})
    assert metrics.prob("cat").bind(classifier).answer == 2
    with pytest.raises(InputError, match="column"):
        metrics.prob("cat").bind(vocabulary_model({"cat": 40}, towers=("vision", "text")))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: metrics.prob(3)(x), "outside"),
        (lambda x: metrics.prob(-1)(x), "outside"),
        (lambda x: metrics.prob([0, 1, 2])(x), "per example"),
        (lambda x: metrics.prob(0, position=3)(x), "outside"),
        (lambda x: metrics.prob(0, position="first")(x), "not understood"),
        (lambda x: metrics.prob(0)(x, {"attention_mask": torch.ones(2, 4)}), "mask"),
        (lambda x: metrics.prob(0)(x, {"attention_mask": torch.tensor([[0, 0, 0], [1, 1, 1]])}), "every position"),
        (lambda x: metrics.prob(0)(x[0, 0]), "reads"),
    ],
)
def test_meaningless_requests_are_refused(logits, call, message):
    with pytest.raises(InputError, match=message):
        call(logits)


def test_evaluate_accepts_both_signatures_and_refuses_scalars(logits):
    assert metrics.evaluate(lambda x: x[:, -1, 0], logits).tolist() == [9.0, 0.0]
    mask = {"attention_mask": torch.ones(2, 3)}
    assert metrics.evaluate(lambda x, inputs: inputs["attention_mask"].sum(1), logits, mask).tolist() == [3.0, 3.0]
    with pytest.raises(InputError, match="per example"):
        metrics.evaluate(lambda x: x.mean(), logits)


def test_a_metric_keeps_the_default_of_its_second_argument(logits):
    by_class = [lambda x, i=i: x[:, -1, i] for i in range(3)]
    assert [metrics.evaluate(metric, logits, {"pixel_values": 0}).tolist() for metric in by_class] == [
        logits[:, -1, i].tolist() for i in range(3)
    ]
    mask = {"attention_mask": torch.ones(2, 3)}
    assert metrics.evaluate(lambda x, inputs=None: inputs["attention_mask"].sum(1), logits, mask).tolist() == [3, 3]
    assert metrics.evaluate(lambda *given: given[1]["attention_mask"].sum(1), logits, mask).tolist() == [3, 3]


def test_gradients_pass_through(logits):
    logits.requires_grad_(True)
    (gradient,) = torch.autograd.grad(metrics.logit_diff(0, 1)(logits).sum(), logits)
    assert gradient[:, 2].tolist() == [[1.0, -1.0, 0.0]] * 2
    assert gradient[:, :2].abs().sum() == 0

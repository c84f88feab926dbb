"""Several metrics of one run: the columns of separate sweeps, one run for all, answers from their grammar; and plans as values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits, metric_set, metrics
from circuitvision.errors import InputError
from circuitvision.incremental.resume import Resumer
from circuitvision.incremental.sweeps.plan import Plan
from circuitvision.metric_set import MetricSet
from tests.sweeps.drawing import inputs_of, model_of

NAMES = ("logit_diff", "prob", "logprob", "rank", "accuracy", "kl", "own")


def one(name: str) -> Any:
    given: dict[str, Callable[[], Any]] = {
        "logit_diff": lambda: metrics.logit_diff([(1, 2), (2, 3), (3, 1)]),
        "prob": lambda: metrics.prob([1, 2, 3]),
        "logprob": lambda: metrics.logprob(2),
        "rank": lambda: metrics.rank([3, 2, 1]),
        "accuracy": lambda: metrics.accuracy([3, 0, 1]),
        "kl": lambda: "kl",
        "own": lambda: destructive,
    }
    return given[name]()


def destructive(logits: Tensor) -> Tensor:
    """A metric that writes into what it gets: no other may see that."""
    found = logits.flatten(1)[:, 1].clone()
    logits.zero_()
    return found


def groups(model: cv.HookedModel, tower: str) -> list[edits.Edit]:
    return [
        edits.scale(f"{tower}.blocks.{layer}.attn.hook_z", 1.7, heads=head) for layer in (0, 1) for head in (0, 1, 2)
    ]


def gap(name: str, tower: str) -> float:
    """The largest difference between one sweep of all metrics and a sweep of each."""
    model, inputs = model_of(name, torch.float64), inputs_of(name, torch.float64, 3, None, 1)
    options = {"axes": {"layer": (0, 1), "head": (0, 1, 2)}, "progress": False}
    order = NAMES[::-1]
    together = model.sweep(inputs, groups(model, tower), {key: one(key) for key in order}, **options)
    assert together.axes == {"metric": list(order), "layer": [0, 1], "head": [0, 1, 2], "example": [0, 1, 2]}
    found = 0.0
    for key in NAMES:
        alone = model.sweep(inputs, groups(model, tower), one(key), **options)
        mine = together.of(key)
        assert alone.axes == mine.axes == {"layer": [0, 1], "head": [0, 1, 2], "example": [0, 1, 2]}
        found = max(
            found, float((mine.values - alone.values).abs().max()), float((mine.clean - alone.clean).abs().max())
        )
        assert mine.top(1) == alone.top(1) == together.top(1, key)
        assert mine.provenance["metric_units"] == alone.provenance["metric_units"]
    return found


@pytest.mark.parametrize(("name", "tower"), [("vit", "vision"), ("llava-clip-llama", "language")])
def test_all_metrics_of_one_sweep_are_those_of_many(name: str, tower: str) -> None:
    assert gap(name, tower) == 0.0


def exchanged(self: MetricSet, logits: Tensor, inputs: Any = None) -> Tensor:
    return CALL(self, logits, inputs).flip(0)


def shared(logits: Tensor) -> Tensor:
    return logits


CALL = MetricSet.__call__


@pytest.mark.parametrize(
    "broken",
    [
        lambda patch: patch.setattr(MetricSet, "__call__", exchanged),
        lambda patch: patch.setattr(metric_set, "_copied", shared),
    ],
    ids=["columns exchanged", "metrics share what they may write into"],
)
def test_mixed_metrics_are_noticed(
    broken: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    broken(monkeypatch)
    with pytest.raises(AssertionError):
        assert gap("vit", "vision") == 0.0


def test_every_group_runs_once_whatever_the_number_of_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = model_of("vit", torch.float64), inputs_of("vit", torch.float64, 3, None, 1)
    runs: list[int] = []
    original = Resumer.run

    def counted(self: Resumer, route: Any, copies: int, first: int) -> Tensor:
        runs.append(copies)
        return original(self, route, copies, first)

    monkeypatch.setattr(Resumer, "run", counted)
    for metric in ("kl", {key: one(key) for key in NAMES}):
        runs.clear()
        model.sweep(inputs, groups(model, "vision"), metric, progress=False)
        assert sum(runs) == 6


def test_the_leading_axis_is_there_only_where_a_mapping_or_a_list_was_given() -> None:
    model, inputs = model_of("vit", torch.float64), inputs_of("vit", torch.float64, 3, None, 1)
    listed = groups(model, "vision")
    plain = model.sweep(inputs, listed, "kl", progress=False)
    assert list(plain.axes) == ["edit", "example"]
    for given in ({"kl": "kl"}, ["kl"]):
        found = model.sweep(inputs, listed, given, progress=False)
        assert list(found.axes) == ["metric", "edit", "example"]
        assert torch.equal(found.values[0], plain.values)
        assert found.clean.shape == (1, 3)
    frame = found.to_frame()
    assert list(frame.columns) == ["metric", "edit", "example", "value", "clean", "effect"]
    assert set(frame["metric"]) == {"kl"}


def test_a_result_of_several_metrics_survives_a_file_and_runs_again(tmp_path: Any) -> None:
    model, inputs = model_of("vit", torch.float64), inputs_of("vit", torch.float64, 3, None, 1)
    metric = {"prob": metrics.prob([1, 2, 3]), "kl": "kl"}
    found = model.sweep(
        inputs, groups(model, "vision"), metric, axes={"layer": (0, 1), "head": (0, 1, 2)}, progress=False
    )
    again = cv.SweepResult.load(found.save(tmp_path / "s.npz"))
    assert torch.equal(again.values, found.values)
    assert again.plan == found.plan
    assert isinstance(again.plan[0], Plan)
    assert torch.equal(again.rerun(model, inputs, progress=False).values, found.values)
    assert "metrics prob, kl" in repr(again)
    with pytest.raises(InputError, match="rank one"):
        cv.readout.rank_components(found)
    assert len(cv.readout.rank_components(found.of("kl")).values) == 6
    with pytest.raises(InputError, match="no metric 'accuracy'"):
        found.of("accuracy")


@pytest.mark.parametrize(
    ("metric", "said"),
    [
        ({}, "one entry"),
        ({"a": "nothing"}, "the names are.*rank"),
        (["prob", "prob"], "twice"),
        ([metrics.prob(1)], "holds their names"),
        ("logit_diff", "has no answer"),
        (lambda logits: None, "one number per example"),
        ({1: "kl"}, "mapping of names"),
    ],
)
def test_metrics_that_cannot_be_meant(metric: Any, said: str) -> None:
    model, inputs = model_of("vit", torch.float64), inputs_of("vit", torch.float64, 3, None, 1)
    with pytest.raises(InputError, match=said):
        model.sweep(inputs, groups(model, "vision"), metric, progress=False)


def test_metrics_of_images_and_of_texts_are_measured_apart() -> None:
    model, inputs = model_of("clip", torch.float64), inputs_of("clip", torch.float64, 2, None, 1)
    count = model(inputs).shape[1]
    mixed = {"images": lambda logits: logits[:, 0], "texts": lambda logits: logits[0]}
    if count != 2:
        with pytest.raises(InputError, match="different examples"):
            model.sweep(inputs, groups(model, "vision"), mixed, progress=False)


# -- the grammar of answers ----------------------------------------------------------------------------------------------------------------


ROWS = torch.tensor([[0.0, 1.0, 3.0, 7.0], [5.0, 2.0, 2.0, 4.0]])


def test_a_tuple_is_a_contrast_and_a_list_one_per_example() -> None:
    assert metrics.logit_diff((3, 0))(ROWS).tolist() == [7.0, -1.0]
    assert metrics.logit_diff([(3, 0), (0, 1)])(ROWS).tolist() == [7.0, 3.0]
    assert metrics.logit_diff([3, 0], [0, 1])(ROWS).tolist() == [7.0, 3.0]
    assert metrics.logit_diff((3, 0)).name == metrics.logit_diff(3, 0).name


@pytest.mark.parametrize(
    "call",
    [
        lambda: metrics.prob((1, 2)),
        lambda: metrics.rank({"a": 1, "b": 2}),
        lambda: metrics.logit_diff((1, 2), 3),
        lambda: metrics.logit_diff((1, 2, 3)),
        lambda: metrics.logit_diff([(1, 2), 3]),
        lambda: metrics.accuracy([(1, 2), (2, 3)]),
    ],
)
def test_what_could_be_read_two_ways_is_refused(call: Callable[[], Any]) -> None:
    with pytest.raises(InputError):
        call()


def test_accuracy_is_the_highest_class_and_a_tie_is_no_answer() -> None:
    assert metrics.accuracy([3, 0])(ROWS).tolist() == [1.0, 1.0]
    assert metrics.accuracy(3)(ROWS).tolist() == [1.0, 0.0]
    assert metrics.accuracy(0)(torch.ones(2, 4)).tolist() == [0.0, 0.0]
    assert metrics.accuracy(0)(torch.full((1, 4), float("nan"))).tolist() == [0.0]


def test_several_tokens_of_an_answer_are_read_as_one() -> None:
    answers, foils = [[1, 2], [3]], [[0], [1, 2]]
    for combine, reduce in (("mean", lambda values: values.mean()), ("joint", lambda values: values.sum(0))):
        bound = [
            metrics.by_name(name).bind(None, answers, foils, combine) for name in ("logit_diff", "logprob", "prob")
        ]
        found = [metric(ROWS) for metric in bound]
        for row in range(2):
            scores = ROWS[row].log_softmax(-1) if combine == "joint" else ROWS[row]
            own, other = scores[answers[row]], scores[foils[row]]
            log = ROWS[row].log_softmax(-1)[answers[row]]
            assert found[0][row] == pytest.approx(float(reduce(own) - reduce(other)))
            assert found[1][row] == pytest.approx(float(reduce(log)), abs=1e-6)
            assert found[2][row] == pytest.approx(float(reduce(log).exp()), abs=1e-6)
    rank, accuracy = (
        metrics.by_name(name).bind(None, [[1, 3], [1, 2]], None, "joint") for name in ("rank", "accuracy")
    )
    assert accuracy(ROWS).tolist() == [1.0, 0.0]
    with pytest.raises(InputError, match="no rank"):
        rank(ROWS)
    with pytest.raises(InputError, match="combine"):
        metrics.LogProb(answer=[[1, 2], [3]])(ROWS)


def test_answers_of_some_examples() -> None:
    metric = MetricSet.of({"a": metrics.logit_diff([0, 1, 2], 3), "b": metrics.kl(torch.arange(12.0).view(3, 4))})
    some = metric.take([2, 0], 3)
    assert some.members["a"].answer == [2, 0]
    assert some.members["a"].foil == 3
    assert some.members["b"].reference.tolist() == [[8, 9, 10, 11], [0, 1, 2, 3]]


# -- plans ---------------------------------------------------------------------------------------------------------------------------------


def test_plans_print_what_was_run() -> None:
    assert str(Plan("vision", 2)) == "from vision block 2"
    assert str(Plan("language", 1, "attn", 7)) == "from language block 1 (attn), positions 7…"
    assert str(Plan("projector")) == "from the projector"
    assert str(Plan("text", -1, also=("vision block 0",))) == "from the embeddings of text, vision block 0"
    assert str(Plan(reason="x")) == "in full: x"
    assert [Plan(reason="x").in_full, Plan(reason="nothing changes").in_full, Plan("vision", 0, "attn").in_full] == [
        True,
        False,
        False,
    ]

"""Sweeps over data sets: the numbers of one run in memory whatever the batch, sources from the other side, answers from the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits, metrics
from circuitvision.circuits import head_importance
from circuitvision.data import Pairs
from circuitvision.data.batches import Batch
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps import stream
from circuitvision.patching import activation_patch
from tests.sweeps.drawing import model_of
from tests.zoo import CASES

ANSWERS, FOILS = [1, 2, 3, 4, 5], [6, 5, 4, 3, 2]
NAMED = ["logit_diff", "prob", "rank", "accuracy", "kl"]
GIVEN = {
    "logit_diff": metrics.logit_diff(ANSWERS, FOILS),
    "prob": metrics.prob(ANSWERS),
    "rank": metrics.rank(ANSWERS),
    "accuracy": metrics.accuracy(ANSWERS),
    "kl": "kl",
}


def data(name: str = "llava-clip-llama", **given: Any) -> tuple[cv.HookedModel, dict[str, Any], dict[str, Any], Pairs]:
    model = model_of(name, torch.float64)
    clean, corrupt = (CASES[name].inputs(model.module, batch=5, seed=seed, dtype=torch.float64) for seed in (1, 2))
    if "input_ids" in clean:
        corrupt = {**clean, "pixel_values": corrupt["pixel_values"]}
    settings = {"answers": ANSWERS, "foils": FOILS, "groups": [0, 0, 1, 1, 2], **given}
    return model, clean, corrupt, Pairs(inputs=clean, corrupt_inputs=corrupt, **settings)


def heads(source: Any, tower: str = "language") -> list[edits.Edit]:
    return [
        edits.replace(f"{tower}.blocks.{layer}.attn.hook_z", source, heads=head) for layer in (0, 1) for head in (0, 1)
    ]


def gap(size: int = 2, mode: str = "denoise", name: str = "llava-clip-llama") -> float:
    """The largest difference between a sweep over pairs and one in memory."""
    model, clean, corrupt, pairs = data(name)
    base, source = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    side, origin = (pairs.corrupt, pairs.clean) if mode == "denoise" else (pairs, pairs.corrupt)
    tower = "language" if "input_ids" in clean else "vision"
    _, cache = model.run_with_cache(source, "**.hook_z")
    memory = model.sweep(base, heads(cache, tower), GIVEN, progress=False)
    found = model.sweep(side, heads(origin, tower), NAMED, example_batch=size, progress=False)
    assert found.axes["example"] == memory.axes["example"]
    assert found.groups == [0, 0, 1, 1, 2]
    own = torch.stack(
        [metrics.evaluate(one, model(source), source) for name, one in GIVEN.items() if name != "kl"]
    ).detach()
    apart = [found.values - memory.values, found.clean - memory.clean, found.source[:4] - own]
    return max(float(one.abs().max()) for one in apart)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 50])
def test_batches_of_any_size_give_the_numbers_of_one_run(size: int) -> None:
    assert gap(size) < 1e-12


@pytest.mark.parametrize(
    ("mode", "name"), [("noise", "llava-clip-llama"), ("denoise", "vit"), ("denoise", "paligemma")]
)
def test_both_sides_of_other_models(mode: str, name: str) -> None:
    assert gap(2, mode, name) < 1e-12


def first_batch(self: stream.DataStudy, chunk: Any, side: Any, batch: Batch, inputs: Any) -> Any:
    """Read the sources of the first batch for all."""
    if not hasattr(self, "kept"):
        self.kept = HELD(self, chunk, side, batch, inputs)  # type: ignore[attr-defined]
    return self.kept  # type: ignore[attr-defined]


def answers_of_the_first(
    self: metrics.Metric, model: Any, answers: Any = None, foils: Any = None, combine: Any = None
) -> Any:
    return BIND(self, model, answers and ANSWERS[: len(answers)], foils and FOILS[: len(foils)], combine)


HELD, BIND = stream.DataStudy._held, metrics.Metric.bind


@pytest.mark.parametrize(
    ("where", "name", "broken"),
    [
        (stream.DataStudy, "_held", first_batch),
        (metrics.Metric, "bind", answers_of_the_first),
        (stream, "laid_values", lambda model, batch, site, value: value.flip(0)),
    ],
    ids=["sources of another batch", "answers of another batch", "sources of other examples"],
)
def test_what_belongs_to_other_examples_is_noticed(
    where: Any, name: str, broken: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, name, broken)
    try:
        found = gap(2)
    except (InputError, RuntimeError, AttributeError):
        return
    assert found > 1e-3


def test_positions_that_belong_together_are_read_from_the_other_side() -> None:
    """Two texts whose second word stands elsewhere: a map of positions says which is which."""
    model, clean, _, _ = data()
    ids = clean["input_ids"]
    length = ids.shape[1]
    swapped = [*range(length - 2), length - 1, length - 2]
    corrupt = {**clean, "input_ids": ids[:, swapped]}
    pairs = Pairs(inputs=clean, corrupt_inputs=corrupt, answers=1, foils=2, maps=[swapped] * 5)
    site = "language.blocks.0.hook_resid_post"
    _, cache = model.run_with_cache(clean, site)
    found = activation_patch(
        model,
        pairs,
        "logit_diff",
        sites=site,
        axes=("layer", "position"),
        allow_wrong=True,
        example_batch=2,
        progress=False,
    )
    moved = cache[site][:, swapped]
    listed = [edits.replace(site, moved, positions=p) for p in range(length)]
    memory = model.sweep(corrupt, listed, metrics.logit_diff(1, 2), progress=False)
    torch.testing.assert_close(found.values[0], memory.effect, rtol=0, atol=1e-12)
    with pytest.raises(InputError, match="turned round"):
        activation_patch(
            model,
            Pairs(inputs=clean, corrupt_inputs=corrupt, answers=1, foils=2, maps=[[0] * length] * 5),
            "logit_diff",
            sites=site,
            axes=("layer",),
            progress=False,
        )


def test_edits_are_made_for_each_batch_by_a_function() -> None:
    model, clean, _, pairs = data()
    seen: list[list[int]] = []

    def make(batch: Batch) -> list[edits.Edit]:
        seen.append(batch.examples)
        return [edits.scale("language.blocks.0.hook_resid_post", factor, positions=-1) for factor in (0.5, 2.0)]

    found = model.sweep(pairs, make, "logit_diff", example_batch=2, progress=False)
    expected = model.sweep(clean, make(Batch(clean, [])), GIVEN["logit_diff"], progress=False)
    torch.testing.assert_close(found.values, expected.values, rtol=0, atol=1e-12)
    assert [0, 1] in seen
    assert [4] in seen

    def uneven(batch: Batch) -> list[edits.Edit]:
        return make(batch)[: len(batch)]

    with pytest.raises(InputError, match="as many"):
        model.sweep(pairs, uneven, "logit_diff", example_batch=2, progress=False)
    with pytest.raises(InputError, match="need a data set"):
        model.sweep(clean, make, GIVEN["logit_diff"], progress=False)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_patching_pairs_is_patching_their_inputs(mode: str) -> None:
    model, clean, corrupt, pairs = data()
    options: dict[str, Any] = {"sites": "*.blocks.*.attn.hook_z", "mode": mode, "progress": False}
    found = activation_patch(model, pairs, NAMED, example_batch=2, **options)
    memory = activation_patch(model, metric=GIVEN, clean=clean, corrupt=corrupt, **options)
    assert found.axes == memory.axes
    for name in ("values", "base", "source", "restored"):
        torch.testing.assert_close(getattr(found, name), getattr(memory, name), rtol=0, atol=1e-10, equal_nan=True)
    # Against the clean run, whichever is patched.
    kl = found.index_of("metric", "kl")
    assert float((found.source if mode == "denoise" else found.base)[kl].abs().max()) < 1e-12


def test_head_importance_of_pairs_and_of_several_metrics(tmp_path: Path) -> None:
    model, clean, corrupt, pairs = data()
    options: dict[str, Any] = {"top_k": 1, "towers": ["language"], "progress": False}
    found = head_importance(model, pairs, ["kl", "prob"], example_batch=2, save_to=tmp_path / "study", **options)
    again = head_importance(
        model, pairs, ["kl", "prob"], example_batch=2, save_to=tmp_path / "study", resume=True, **options
    )
    memory = head_importance(model, metric="kl", clean=clean, corrupt=corrupt, **options)
    assert found.axes["metric"] == ["kl", "prob"]
    torch.testing.assert_close(found.values[0], memory.values, rtol=0, atol=1e-12, equal_nan=True)
    assert torch.equal(again.values.nan_to_num(0), found.values.nan_to_num(0))
    assert (again.edges, again.selected, again.joint) == (found.edges, found.selected, found.joint)
    assert [edge["receiver"] for edge in found.edges] == [edge["receiver"] for edge in memory.edges]
    for one, two in zip(found.edges, memory.edges, strict=True):
        assert one["score"] == pytest.approx(two["score"], abs=1e-12)
    assert found.joint == pytest.approx(memory.joint, nan_ok=True)


def test_a_folder_keeps_its_batches_of_examples(tmp_path: Path) -> None:
    model, _, _, pairs = data()
    options: dict[str, Any] = {"save_to": tmp_path / "study", "progress": False}
    whole = model.sweep(pairs.corrupt, heads(pairs.clean), NAMED, example_batch=2, **options)
    files = sorted((tmp_path / "study").glob("part-*"))
    assert len({path.name.split("-")[1] for path in files}) == 3
    for path in files[1::2]:
        path.unlink()
    again = model.sweep(pairs.corrupt, heads(pairs.clean), NAMED, example_batch=4, resume=True, **options)
    for name in ("values", "clean", "source", "done"):
        assert torch.equal(getattr(again, name), getattr(whole, name))
    with pytest.raises(InputError, match="inputs"):
        model.sweep(pairs[:4].corrupt, heads(pairs.clean), NAMED, resume=True, **options)


def test_some_of_a_data_set_keep_their_numbers_and_their_answers() -> None:
    model, _, _, pairs = data()
    whole = model.sweep(pairs.corrupt, heads(pairs.clean), NAMED, progress=False)
    some = pairs[[4, 1]]
    found = model.sweep(some.corrupt, heads(some.clean), NAMED, progress=False)
    assert found.axes["example"] == [4, 1]
    torch.testing.assert_close(found.values, whole.values[..., [4, 1]], rtol=0, atol=1e-12)
    given = model.sweep(pairs, heads(2.0), {"a": metrics.prob([1, 2, 3, 4, 5])}, example_batch=2, progress=False)
    named = model.sweep(pairs, heads(2.0), {"a": "prob"}, progress=False)
    torch.testing.assert_close(given.values, named.values, rtol=0, atol=1e-12)


def test_requests_that_cannot_be_met() -> None:
    model, clean, corrupt, pairs = data()
    third = Pairs(inputs=clean, corrupt_inputs=corrupt, answers=1, foils=2)
    for call, said in (
        (lambda: model.sweep(pairs.corrupt, [*heads(pairs.clean), *heads(third.clean)], "prob"), "two sides"),
        (lambda: model.run(corrupt, heads(pairs.clean)[:1]), "clean side"),
        (lambda: model.sweep(corrupt, heads(pairs.clean), GIVEN), "clean side"),
        (lambda: model.sweep(pairs, heads(1.0), "prob", example_batch=0), "example_batch"),
        (lambda: model.sweep(Pairs(inputs=clean, corrupt_inputs=corrupt), heads(1.0), "prob"), "no answer"),
        (lambda: activation_patch(model, pairs, "prob", sites="**.hook_z", clean=clean), "Give pairs"),
        (lambda: activation_patch(model, clean, "prob", sites="**.hook_z"), "no data set of pairs"),
        (lambda: activation_patch(model, pairs, sites="**.hook_z"), "No metric"),
    ):
        with pytest.raises(InputError, match=said):
            call()


def test_a_memory_that_does_not_grow_with_the_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    """No batch, nor what was recorded for it, is alive when the next but one is made."""
    import gc
    import weakref

    model, _, _, pairs = data()
    alive: list[weakref.ref[Any]] = []
    most = [0]
    original = stream.DataStudy._chunk

    def watched(self: stream.DataStudy, number: int, batch: Batch, rows: list[int]) -> Any:
        chunk = original(self, number, batch, rows)
        gc.collect()
        alive.append(weakref.ref(chunk))
        most[0] = max(most[0], sum(one() is not None for one in alive))
        return chunk

    monkeypatch.setattr(stream.DataStudy, "_chunk", watched)
    model.sweep(pairs.corrupt, heads(pairs.clean), NAMED, example_batch=1, progress=False)
    assert len(alive) == 5
    assert most[0] <= 2


def test_halves_whose_edits_read_their_own_half_join_to_the_whole():
    model = cv.organisms.load("shapes-llava")
    pairs = cv.data.question_pairs(4, 0)

    def swept(some: cv.data.Pairs, scale: int = 0) -> cv.Result:
        groups = [edits.replace("language.blocks.1.attn.hook_z", some.clean, heads=head + scale) for head in range(3)]
        return model.sweep(some.corrupt, groups, "logit_diff", example_batch=2, progress=False)

    whole, halves = swept(pairs), [swept(pairs[:2]), swept(pairs[2:])]
    joined = cv.Result.concat(halves)
    assert torch.equal(joined.values, whole.values)
    assert joined.axes["example"] == whole.axes["example"]
    again = joined.rerun(model, pairs.corrupt, example_batch=2, progress=False)
    assert torch.equal(again.values, whole.values)
    with pytest.raises(InputError, match="differ in"):
        cv.Result.concat([halves[0], swept(pairs[2:], scale=1)])
    parts = [
        cv.patching.activation_patch(model, some, "logit_diff", sites="language.blocks.*.attn.hook_z", progress=False)
        for some in (pairs, pairs[:2], pairs[2:])
    ]
    torch.testing.assert_close(cv.Result.concat(parts[1:]).restored, parts[0].restored)

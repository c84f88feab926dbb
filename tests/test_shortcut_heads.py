"""Shortcut heads: information gain by hand and against plain PyTorch, the report by group by hand, and the known heads of spurious-vit."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import circuits, data, organisms
from circuitvision.circuits import (
    HeadRemoval,
    InformationGain,
    ShortcutHeads,
    removal_curve,
    remove_heads,
    shortcut_heads,
)
from circuitvision.circuits.removal import raises_worst
from circuitvision.circuits.shortcuts import reads_background
from circuitvision.data import Side, mask_images
from circuitvision.errors import InputError
from circuitvision.links import marked
from circuitvision.organisms.spurious_vit import SHORTCUT_HEADS

KNOWN = {circuits.head_id("vision", layer, head) for layer, head in SHORTCUT_HEADS}


def drawn(count: int, seed: int, **more: Any) -> tuple[Side, list[Any]]:
    scenes = data.sample_backgrounds(count, seed, **more)
    return data.background_side(scenes), [scene.group for scene in scenes]


@pytest.fixture(scope="module")
def model() -> cv.HookedModel:
    return organisms.load("spurious-vit")


@pytest.fixture(scope="module")
def scored(model: cv.HookedModel) -> ShortcutHeads:
    return shortcut_heads(model, drawn(120, 11)[0], progress=False)


@pytest.fixture(scope="module")
def curve(model: cv.HookedModel, scored: ShortcutHeads) -> HeadRemoval:
    side, groups = drawn(240, 12)
    return removal_curve(model, side, scored, groups=groups, progress=False)


# -- the known answer ----------------------------------------------------------------------------------------------------------------------------


def test_the_heads_that_learned_the_background_are_found(scored: ShortcutHeads, curve: HeadRemoval) -> None:
    assert set(scored.top(len(KNOWN))) == KNOWN
    assert set(scored.top(len(KNOWN), by="difference")) == KNOWN
    assert set(curve.best) == set(curve.heads) == KNOWN
    assert reads_background(scored).holds
    assert 0.0 < scored.background_share < 1.0


def test_without_them_the_worst_group_rises_and_without_as_many_others_it_does_not(
    model: cv.HookedModel, curve: HeadRemoval
) -> None:
    side, groups = drawn(400, 13)
    found = remove_heads(model, side, curve, groups=groups, progress=False)
    value, low, high = found.rise()
    assert value >= 0.1
    assert low >= 0.1
    assert high >= value
    assert len(found.random_sets) == len({tuple(found.sets[name]) for name in found.random_sets}) == 20
    assert all(len(found.sets[name]) == 2 and not KNOWN & {*found.sets[name]} for name in found.random_sets)
    assert float((found.worst[2:] - found.worst[0]).max()) < 0.1
    assert float(found.average[1]) > float(found.average[0])
    told = raises_worst(found)
    assert told.holds
    assert told.chance is not None
    assert told.chance < 0.1
    zeroed = remove_heads(model, side, curve, groups=groups, ablation="zero", n_random=0, progress=False)
    assert zeroed.rise()[1] >= 0.1


def test_removed_heads_leave_what_a_plain_forward_without_them_leaves(model: cv.HookedModel) -> None:
    side, groups = drawn(40, 14)
    inputs = model.inputs(images=[one.image for one in side.examples])
    found = remove_heads(model, side, sorted(KNOWN), groups=groups, n_random=0, progress=False)
    labels = torch.tensor([model.config.label2id[answer] for answer in side.answers])
    with without(model, SHORTCUT_HEADS):
        right = model.module(**inputs).logits.argmax(-1) == labels
    assert found.values[1].bool().tolist() == right.tolist()


class without:
    """Plain hooks that put heads to their mean over the batch, position by position."""

    def __init__(self, model: cv.HookedModel, heads: Any, mean: bool = True) -> None:
        self.model, self.heads, self.mean = model, heads, mean

    def __enter__(self) -> None:
        width = self.model.module.config.hidden_size // self.model.module.config.num_attention_heads
        self.handles = []
        for layer, head in self.heads:

            def silence(module: Any, given: Any, at: slice = slice(head * width, (head + 1) * width)) -> Any:
                z = given[0].clone()
                z[..., at] = z[..., at].mean(0, keepdim=True) if self.mean else 0.0
                return (z, *given[1:])

            output = self.model.module.vit.layers[layer].attention.o_proj
            self.handles.append(output.register_forward_pre_hook(silence))
        self.grad = torch.no_grad()
        self.grad.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.grad.__exit__(*error)
        for handle in self.handles:
            handle.remove()


# -- information gain ----------------------------------------------------------------------------------------------------------------------------


def js(p: Tensor, q: Tensor) -> Tensor:
    """The Jensen–Shannon divergence of two distributions, written out."""
    middle = (p + q) / 2
    return sum((torch.xlogy(one, one / middle)).sum(-1) for one in (p, q)) / 2


def test_information_gain_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.5], [0.5, 0.5], [0.75, 0.25], [0.9, 0.1], [0.1, 0.9], [0.9, 0.1]]))
    half = 0.5 * (0.5 * math.log(0.5 / 0.625) + 0.5 * math.log(0.5 / 0.375))
    half += 0.5 * (0.75 * math.log(0.75 / 0.625) + 0.25 * math.log(0.25 / 0.375))
    far = math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1)
    torch.testing.assert_close(
        InformationGain()(logits), torch.tensor([0, 0, half, 0, far, 0], dtype=torch.float64), atol=1e-7, rtol=0
    )
    # Disjoint answers: ln 2, the most there is; of two of three columns alone the third says nothing.
    apart = torch.tensor([[50.0, 0.0, 7.0], [0.0, 50.0, -3.0], [50.0, 0.0, 1.0]])
    assert InformationGain(columns=(0, 1))(apart).tolist() == pytest.approx([0.0, math.log(2), 0.0])


def test_of_yes_or_no_columns_each_counts() -> None:
    logits = marked(torch.tensor([[60.0, -60.0], [-60.0, -60.0], [-60.0, 60.0]]), "sigmoid")
    assert InformationGain()(logits).tolist() == pytest.approx([0.0, math.log(2), 2 * math.log(2)])


def test_numbers_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(InputError, match="no distribution"):
        InformationGain()(marked(torch.zeros(3, 4), "none"))


def test_half_precision_finds_the_same_heads() -> None:
    half = organisms.load("spurious-vit", dtype=torch.bfloat16)
    assert set(shortcut_heads(half, drawn(60, 11)[0], progress=False).top(2)) == KNOWN


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_scores_are_those_of_a_plain_loop(model: cv.HookedModel, ablation: str) -> None:
    side, _ = drawn(6, 15)
    reference = drawn(5, 16)[0]
    found = shortcut_heads(model, side, ablation=ablation, reference=side, fill=(10, 200, 30), progress=False)
    kept = [mask_images(side, keep=keep, fill=(10, 200, 30)).corrupt for keep in ("foreground", "background")]
    parts = [model.inputs(images=[one.image for one in part.examples])["pixel_values"] for part in (side, *kept)]
    means = {}

    def gains(heads: Any) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            full, front, back = (forward(model, pixels, heads, means).double().softmax(-1) for pixels in parts)
        return js(full, front), js(full, back)

    for layer in range(3):
        held: list[Tensor] = []
        output = model.module.vit.layers[layer].attention.o_proj
        handle = output.register_forward_pre_hook(lambda _, given, held=held: held.append(given[0]))
        with torch.no_grad():
            model.module(pixel_values=parts[0])
        handle.remove()
        means[layer] = held[0].mean(0, keepdim=True) if ablation == "mean" else torch.zeros_like(held[0][:1])
    big, fig = gains([])
    torch.testing.assert_close(found.background_gain, big, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.foreground_gain, fig, atol=1e-6, rtol=0)
    for layer in range(3):
        for head in range(4):
            own = gains([(layer, head)])
            torch.testing.assert_close(found.values[0, layer, head], big - own[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(found.foreground[0, layer, head], fig - own[1], atol=1e-5, rtol=0)
    other = shortcut_heads(model, side, ablation=ablation, reference=reference, fill=(10, 200, 30), progress=False)
    assert torch.equal(other.values, found.values) == (ablation == "zero")


def forward(model: cv.HookedModel, pixels: Tensor, heads: Any, values: Any) -> Tensor:
    """Logits with heads at given values."""
    handles = []
    for layer, head in heads:

        def put(module: Any, given: Any, layer: int = layer, head: int = head) -> Any:
            z = given[0].clone()
            z[..., head * 16 : (head + 1) * 16] = values[layer][..., head * 16 : (head + 1) * 16]
            return (z, *given[1:])

        handles.append(model.module.vit.layers[layer].attention.o_proj.register_forward_pre_hook(put))
    logits = model.module(pixel_values=pixels).logits
    for handle in handles:
        handle.remove()
    return logits


@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_heads_of_one_layer_are_removed_together(model: cv.HookedModel, ablation: str) -> None:
    side, groups = drawn(60, 31)
    heads = [(1, 0), (1, 2), (1, 3)]
    named = [circuits.head_id("vision", *head) for head in heads]
    curve = removal_curve(model, side, named, groups=groups, most=3, ablation=ablation, progress=False)
    inputs = model.inputs(images=[one.image for one in side.examples])
    labels = torch.tensor([model.config.label2id[answer] for answer in side.answers])
    for count in range(4):
        with without(model, heads[:count], ablation == "mean"):
            right = model.module(**inputs).logits.argmax(-1) == labels
        assert curve.values[count].bool().tolist() == right.tolist()
    edited = circuits.shortcuts.removed(named, ablation, side)
    with without(model, heads, ablation == "mean"):
        plain = model.module(**inputs).logits
    with torch.no_grad():
        torch.testing.assert_close(model.run(inputs, list(edited)), plain, atol=1e-5, rtol=1e-5)


def test_the_mean_colour_of_a_picture_that_is_mostly_background_hides_nothing(model: cv.HookedModel) -> None:
    side, _ = drawn(60, 17)
    own, whole = (shortcut_heads(model, side, fill=fill, progress=False) for fill in ("mean", "dataset"))
    assert float(own.background_gain.mean()) < 0.2 * float(whole.background_gain.mean())


def test_batches_and_an_interrupted_run_change_nothing(model: cv.HookedModel, tmp_path: Path) -> None:
    side, _ = drawn(7, 18)
    whole = shortcut_heads(model, side, progress=False)
    parts = shortcut_heads(model, side, example_batch=2, save_to=tmp_path / "run", progress=False)
    again = shortcut_heads(model, side, example_batch=2, save_to=tmp_path / "run", resume=True, progress=False)
    torch.testing.assert_close(parts.values, whole.values, atol=1e-6, rtol=0)
    assert torch.equal(again.values, parts.values)
    assert whole.axes["example"] == list(range(7))


# -- other models --------------------------------------------------------------------------------------------------------------------------------


def test_clip_with_texts_as_answers() -> None:
    clip = organisms.load("shapes-clip")
    scenes = data.sample_backgrounds(6, 19, sizes=("large",))
    texts = ("red circle and blue square", "red square and blue circle", "white circle and red square")
    side = data.background_side(scenes, texts=[texts] * 6, answers=[0, 1, 2, 0, 1, 2])
    found = shortcut_heads(clip, side, fill=128, example_batch=2, progress=False)
    assert found.axes["tower"] == ["vision"]
    kept = [mask_images(side, keep=keep, fill=128).corrupt for keep in ("foreground", "background")]
    with torch.no_grad():
        full, front, back = (
            clip.module(**clip.inputs(images=[one.image for one in part.examples], text=list(texts)))
            .logits_per_image.double()
            .softmax(-1)
            for part in (side, *kept)
        )
    torch.testing.assert_close(found.background_gain, js(full, front), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.foreground_gain, js(full, back), atol=1e-5, rtol=0)
    removal = remove_heads(clip, side, found.top(1), n_random=3, progress=False)
    assert removal.values[0].bool().tolist() == (full.argmax(-1) == torch.tensor([0, 1, 2, 0, 1, 2])).tolist()
    assert removal.group_names == ["0", "1", "2"]
    many = remove_heads(clip, side, found.top(1), n_random=len(found.heads) - 1, progress=False)
    assert {name for draw in many.random_sets for name in many.sets[draw]} == {*found.heads} - {*found.top(1)}
    both = shortcut_heads(clip, side, fill=128, towers=["vision", "text"], progress=False)
    torch.testing.assert_close(both.values[0], found.values[0], atol=1e-5, rtol=0)
    assert torch.isfinite(both.values[1]).any()


def test_a_model_that_answers_in_words() -> None:
    llava = organisms.load("shapes-llava")
    scenes = data.sample_backgrounds(4, 20, sizes=("large",))
    prompt = data.prompt("what shape is the object ?")
    side = data.background_side(scenes, texts=[prompt] * 4)
    found = shortcut_heads(llava, side, fill=128, choices=["circle", "square"], progress=False)
    assert found.axes["tower"] == ["vision"]
    assert bool((found.background_gain <= math.log(2) + 1e-9).all())
    ids = [llava.tokenizer.convert_tokens_to_ids(word) for word in ("circle", "square")]
    front = mask_images(side, keep="foreground", fill=128).corrupt
    with torch.no_grad():
        one, other = (
            llava(next(part.batches(llava, 4)).inputs)[:, -1, ids].double().softmax(-1) for part in (side, front)
        )
    torch.testing.assert_close(found.background_gain, js(one, other), atol=1e-5, rtol=0)
    early = shortcut_heads(llava, side, fill=128, choices=["circle", "square"], position=-2, progress=False)
    with torch.no_grad():
        one, other = (
            llava(next(part.batches(llava, 4)).inputs)[:, -2, ids].double().softmax(-1) for part in (side, front)
        )
    torch.testing.assert_close(early.background_gain, js(one, other), atol=1e-5, rtol=0)
    assert not torch.allclose(early.background_gain, found.background_gain)


def scores(big: list[float], fig: list[float], score: list[float], beside: list[float], heads: int = 2) -> Any:
    """Some heads, of which all but the first say nothing."""
    values, other = torch.zeros(2, 1, 1, heads, len(score), dtype=torch.float64)
    values[0, 0, 0], other[0, 0, 0] = torch.tensor([score, beside], dtype=torch.float64)
    axes = {"tower": ["vision"], "layer": [0], "head": list(range(heads)), "example": list(range(len(score)))}
    return ShortcutHeads(
        values,
        axes,
        foreground=other,
        background_gain=torch.tensor(big, dtype=torch.float64),
        foreground_gain=torch.tensor(fig, dtype=torch.float64),
    )


def test_the_share_of_the_background_and_what_is_claimed_by_hand() -> None:
    big, fig, score = [0.3, 0.1, 0.2], [0.6, 0.7, 0.5], [0.11, 0.1, 0.12]
    found = scores(big, fig, score, [0.0, 0.01, 0.0])
    assert found.background_share == pytest.approx(0.2 / (0.2 + 0.6))
    assert reads_background(found).holds
    # As much of the foreground goes with it; and hiding the background changes nothing.
    assert reads_background(scores(big, fig, score, [0.2, 0.3, 0.2])).holds is False
    assert reads_background(scores([0.001] * 3, fig, score, [0.0] * 3)).holds is False
    # Three standard errors above 0 tell one head of two, and not the highest of 400.
    three = [0.1, 0.1 + 0.1 / 3**0.5, 0.1 - 0.1 / 3**0.5]
    assert reads_background(scores(big, fig, three, [0.0] * 3)).holds
    assert reads_background(scores(big, fig, three, [0.0] * 3, heads=400)).holds is False
    assert math.isnan(scores([0.0] * 3, [0.0] * 3, score, score).background_share)


def test_a_curve_removes_heads_with_a_score_above_0_alone(model: cv.HookedModel, scored: ShortcutHeads) -> None:
    side, _ = drawn(6, 33)
    best = scored.top(2)
    values = torch.where((scored.mean() >= dict(scored.ranking())[best[1]])[..., None], 1.0, -1.0)
    lone = dataclasses.replace(scored, values=values.expand(scored.values.shape))
    assert removal_curve(model, side, lone, progress=False).axes["condition"] == ["intact", "1 head", "2 heads"]
    most = removal_curve(model, side, [name for name, _ in scored.ranking()], progress=False)
    assert len(most.sets) - 1 == len(scored.heads) // 2


def test_the_second_picture_is_the_one_that_is_hidden() -> None:
    side, _ = drawn(2, 32)
    first, second = (one.image for one in side.examples)
    both = Side([[first, second]], boxes=[[0, 0, 20, 20]])
    for image, kept in ((0, second), (1, first)):
        triple = circuits.shortcuts._triples(both, None, 0, image, 0)
        assert len(triple) == 3
        for one in triple.examples[1:]:
            assert np.array_equal(np.asarray(one.image[1 - image]), np.asarray(kept))
            assert not np.array_equal(np.asarray(one.image[image]), np.asarray((first, second)[image]))


# -- the report by group -------------------------------------------------------------------------------------------------------------------------


def by_hand(curve: bool = False) -> HeadRemoval:
    right = {
        "intact": "1111 1000 11",
        "heads": "1110 1110 11",
        "random 1": "1110 0000 11",
        "random 2": "1111 1100 11",
    }
    if curve:
        right = {
            "intact": "1111 1000 11",
            "1 head": "1111 1100 11",
            "2 heads": "1111 1110 11",
            "3 heads": "0000 1110 11",
        }
    values = torch.tensor([[float(mark) for mark in row.replace(" ", "")] for row in right.values()])
    heads = ["v.a0.h0", "v.a0.h1", "v.a1.h0"]
    sets = {"intact": [], "heads": heads[:2], "random 1": heads[1:], "random 2": heads[::2]}
    if curve:
        sets = {name: heads[:number] for number, name in enumerate(right)}
    return HeadRemoval(
        values, {"condition": list(right), "example": list(range(10))}, sets=sets, group_of=[*"aaaabbbbcc"]
    )


def test_the_report_by_hand() -> None:
    found = by_hand()
    assert found.by_group[0].tolist() == [1.0, 0.25, 1.0]
    assert found.worst.tolist() == [0.25, 0.75, 0.0, 0.5]
    torch.testing.assert_close(found.average, torch.tensor([0.7, 0.8, 0.5, 0.8], dtype=torch.float64))
    assert found.rise()[0] == 0.5
    assert found.rise("random 2")[0] == 0.25
    frame = found.report().set_index(["condition", "group"])
    # Wilson's interval of 1 of 4 and of 3 of 4.
    assert tuple(frame.loc[("intact", "b"), ["low", "high"]]) == pytest.approx((0.0456, 0.6994), abs=1e-4)
    assert tuple(frame.loc[("heads", "worst group"), ["accuracy", "low", "high", "examples"]]) == pytest.approx(
        (0.75, 0.3006, 0.9544, 4), abs=1e-4
    )
    assert frame.loc[("heads", "all"), "examples"] == 10
    assert raises_worst(found).chance == 0.25
    assert raises_worst(found).holds is False


def test_the_interval_of_the_rise_takes_the_worst_group_of_each_draw() -> None:
    # Two groups of many examples: 50 % and 90 % before, 90 % and 80 % after, so that another group is the worst.
    count, rng = 1000, np.random.default_rng(0)
    rows = [
        np.concatenate([rng.permutation(count) < share * count for share in shares])
        for shares in ((0.5, 0.9), (0.9, 0.8))
    ]
    values = torch.tensor(np.stack(rows)).float()
    found = HeadRemoval(
        values,
        {"condition": ["intact", "heads"], "example": list(range(2 * count))},
        sets={"intact": [], "heads": ["v.a0.h0"]},
        group_of=["a"] * count + ["b"] * count,
    )
    value, low, high = found.rise()
    assert value == pytest.approx(0.3)
    error = math.sqrt(0.25 / count + 0.16 / count)
    assert (low, high) == pytest.approx((0.3 - 1.96 * error, 0.3 + 1.96 * error), abs=0.004)
    assert found.rise(seed=1) != found.rise()


def test_a_curve_takes_the_smallest_set_within_one_error_of_the_best() -> None:
    found = by_hand(curve=True)
    # 3 of 4 have an error of .22: 2 of 4 is out of it, and the third head ruins a.
    assert found.worst.tolist() == [0.25, 0.5, 0.75, 0.0]
    assert found.best == ["v.a0.h0", "v.a0.h1"]
    assert raises_worst(found).holds is None
    flat = dataclasses.replace(found, values=found.values[[0, 0, 0, 0]])
    assert flat.best == []
    assert flat.rise()[0] == 0.0
    assert "does not raise" in str(raises_worst(flat))


@pytest.mark.parametrize(
    ("random", "holds", "reason"),
    [
        ([100] * 19, True, ""),
        ([100] * 18 + [160], False, "as much"),
        ([100] * 18, False, "too few"),
        ([], False, "too few"),
    ],
)
def test_a_rise_is_claimed_beside_enough_random_sets_that_do_less(random: list[int], holds: bool, reason: str) -> None:
    names = ["intact", "heads", *(f"random {number + 1}" for number in range(len(random)))]
    right = torch.tensor([[1.0] * count + [0.0] * (200 - count) for count in (100, 160, *random)])
    sets = {name: [] if name == "intact" else ["v.a0.h0"] for name in names}
    axes = {"condition": names, "example": list(range(200))}
    told = raises_worst(HeadRemoval(right, axes, sets=sets, group_of=["a"] * 200))
    assert told.holds is holds
    assert reason in told.reason


def test_of_sets_that_do_as_well_within_one_error_the_smallest_is_taken() -> None:
    # An error of .033 at .88: .86 is within it.
    right = torch.tensor([[1.0] * count + [0.0] * (100 - count) for count in (50, 86, 88)])
    sets = {"intact": [], "1 head": ["v.a0.h0"], "2 heads": ["v.a0.h0", "v.a0.h1"]}
    axes = {"condition": list(sets), "example": list(range(100))}
    assert HeadRemoval(right, axes, sets=sets, group_of=["a"] * 100).best == ["v.a0.h0"]


def test_removal_takes_the_ablation_of_the_scores_and_the_mean_of_the_reference(model: cv.HookedModel) -> None:
    side, groups = drawn(40, 34)
    zeroed = shortcut_heads(model, side, ablation="zero", progress=False)
    curve = removal_curve(model, side, zeroed, groups=groups, progress=False)
    assert curve.ablation == "zero"
    assert curve.values[1].tolist() == removed_by_hand(model, side, curve.sets["1 head"], None)
    raised = dataclasses.replace(curve, values=curve.values.clone().index_fill_(0, torch.tensor([1]), 1.0))
    with pytest.warns(UserWarning, match="chosen on the examples"):
        found = remove_heads(model, side, raised, groups=groups, n_random=0, progress=False)
    assert found.ablation == "zero"
    assert found.values[1].tolist() == removed_by_hand(model, side, raised.heads, None)
    # One picture as reference, whose own values the heads then say to all.
    lone, heads = drawn(1, 36)[0], [circuits.head_id("vision", 1, head) for head in range(4)]
    for measure in (removal_curve, remove_heads):
        more: dict[str, Any] = {"most": 4} if measure is removal_curve else {"n_random": 0}
        own, other = (
            measure(model, side, heads, reference=reference, progress=False, **more).values[-1].tolist()
            for reference in (side, lone)
        )
        assert own == removed_by_hand(model, side, heads, side)
        assert other == removed_by_hand(model, side, heads, lone)
        assert own != other


def removed_by_hand(model: cv.HookedModel, side: Side, heads: list[str], reference: Side | None) -> list[float]:
    """Whether each example is answered right where heads of layer 1 (or all of one layer) say the reference's mean, or nothing."""
    (layer,) = {circuits.parse_id(head).layer for head in heads}
    numbers = [circuits.parse_id(head).head for head in heads]
    output = model.module.vit.layers[layer].attention.o_proj
    held: list[Tensor] = []

    def put(module: Any, given: Any) -> Any:
        z = given[0].clone()
        for head in numbers:
            at = slice(head * 16, (head + 1) * 16)
            z[..., at] = held[0][..., at].mean(0, keepdim=True) if held else 0.0
        return (z, *given[1:])

    with torch.no_grad():
        if reference is not None:
            handle = output.register_forward_pre_hook(lambda _, given: held.append(given[0]))
            model.module(**model.inputs(images=[one.image for one in reference.examples]))
            handle.remove()
        handle = output.register_forward_pre_hook(put)
        logits = model.module(**model.inputs(images=[one.image for one in side.examples])).logits
        handle.remove()
    labels = torch.tensor([model.config.label2id[answer] for answer in side.answers])
    return (logits.argmax(-1) == labels).float().tolist()


# -- files, figures, mistakes --------------------------------------------------------------------------------------------------------------------


def test_results_are_kept_in_files_and_drawn(scored: ShortcutHeads, curve: HeadRemoval, tmp_path: Path) -> None:
    for result in (scored, curve, by_hand()):
        result.save(tmp_path / "result.npz")
        back = cv.Result.load(tmp_path / "result.npz")
        assert type(back) is type(result)
        assert torch.equal(back.values.nan_to_num(9.0), result.values.nan_to_num(9.0))
        figure = result.plot()
        assert figure.layout.title.text
    assert back.sets == by_hand().sets
    assert {trace.name for trace in by_hand().plot().data} == {
        "2 random sets",
        "no head removed",
        "without vision L0H0, vision L0H1",
    }
    assert len(by_hand().take([0, 4]).group_of) == 2


def test_mistakes_are_told_before_anything_runs(model: cv.HookedModel, curve: HeadRemoval) -> None:
    side, groups = drawn(8, 21)
    bare = Side([one.image for one in side.examples])
    with pytest.raises(InputError, match="masks"):
        shortcut_heads(model, bare)
    with pytest.raises(InputError, match="empty"):
        shortcut_heads(model, bare, [np.zeros((64, 64), bool)] * 8)
    with pytest.raises(InputError, match="ablation="):
        shortcut_heads(model, side, ablation="resample")
    with pytest.raises(InputError, match="towers="):
        shortcut_heads(model, side, towers=["text"])
    with pytest.raises(InputError, match="Give pictures"):
        shortcut_heads(model, [one.image for one in side.examples])
    with pytest.raises(InputError, match="answers="):
        remove_heads(model, bare, "L1H2")
    with pytest.raises(InputError, match="groups="):
        remove_heads(model, side, "L1H2", groups=groups[:3])
    with pytest.raises(InputError, match="no head"):
        remove_heads(model, side, [])
    with pytest.raises(InputError):
        remove_heads(model, side, "L7H2")
    with pytest.raises(InputError, match="random sets"):
        remove_heads(model, side, "L1H2", n_random=100)
    with pytest.raises(InputError, match="n_random="):
        remove_heads(model, side, "L1H2", n_random=-1)
    with pytest.raises(InputError, match="most="):
        removal_curve(model, side, ["L1H2"], most=0)
    with pytest.raises(InputError, match="beats the intact"):
        remove_heads(model, side, dataclasses.replace(curve, values=torch.ones_like(curve.values)))
    with pytest.raises(InputError, match="by="):
        ShortcutHeads(
            torch.zeros(1, 1, 1, 1), {"tower": ["vision"], "layer": [0], "head": [0], "example": [0]}
        ).ranking("score")


def test_heads_chosen_on_the_examples_that_are_asked_are_warned_of(model: cv.HookedModel, curve: HeadRemoval) -> None:
    side, groups = drawn(240, 12)
    with pytest.warns(UserWarning, match="chosen on the examples"):
        remove_heads(model, side, curve, groups=groups, n_random=0, progress=False)

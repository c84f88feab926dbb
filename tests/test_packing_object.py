"""A packing takes inputs apart, repeats them and joins them: for every family, the same examples come out whatever way they went."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.families import AnyRes, Flat, Packed, Packing
from circuitvision.model.packing import ImageRun, base, batching
from circuitvision.model.packing.base import Compared
from tests import synthetic
from tests.zoo import CASES, Case, cases, shared_model

pytestmark = pytest.mark.usefixtures("tables")
EVERY = [*CASES.values(), *synthetic.CASES.values()]
COUNT = 4


def wrapped(case: Case) -> cv.HookedModel:
    made = next((cls for cls in synthetic.CLASSES if synthetic.CASES[cls.__name__] is case), None)
    if made is None:
        return cv.HookedModel(shared_model(case.name))
    synthetic.register(made)
    return cv.HookedModel(synthetic.build(made))


def inputs_of(case: Case, model: Any, seed: int = 0, count: int = COUNT) -> dict[str, Any]:
    several = {"images_per_prompt": 2} if "two_images" in case.tags or case in synthetic.CASES.values() else {}
    return case.inputs(model.module, batch=count, seed=seed, **several)


def sides(case: Case) -> list[Compared]:
    """Whose inputs may be taken apart: the zoo gives dual encoders one text more than images."""
    return ["images", "texts"] if "dual" in case.tags else ["both"]


def equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert list(one) == list(other)
    for name, value in one.items():
        if isinstance(value, Tensor):
            assert value.dtype == other[name].dtype, name
            assert torch.equal(value, other[name]), name
        else:
            assert value == other[name], name


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_what_is_taken_apart_joins_and_copies_are_joined_inputs(case: Case) -> None:
    model = wrapped(case)
    packing, inputs = model.family.packing, inputs_of(case, model)

    @given(st.data())
    @settings(max_examples=8, derandomize=True, suppress_health_check=list(HealthCheck))
    def holds(data: Any) -> None:
        side = data.draw(st.sampled_from(sides(case)))
        count = packing.n_examples(model, inputs, side)
        every = list(range(count))
        one_by_one = [packing.take(model, inputs, [number], side) for number in every]
        assert all(packing.n_examples(model, part, side) == 1 for part in one_by_one)
        equal(packing.join(model, one_by_one, side), inputs)
        cut = data.draw(st.integers(1, count - 1))
        halves = [packing.take(model, inputs, part, side) for part in (every[:cut], every[cut:])]
        equal(packing.join(model, halves, side), inputs)
        chosen = data.draw(st.lists(st.sampled_from(every), min_size=1, max_size=6))
        equal(packing.take(model, inputs, chosen, side), packing.join(model, [one_by_one[n] for n in chosen], side))
        copies = data.draw(st.integers(1, 3))
        repeated = packing.repeat(model, inputs, copies, side)
        equal(repeated, packing.join(model, [inputs] * copies, side))
        equal(repeated, packing.take(model, inputs, every * copies, side))

    holds()


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_examples_by_themselves_are_those_of_the_batch(case: Case) -> None:
    """The output of examples taken out, in another order, is that of the batch; so are their token maps."""
    model = wrapped(case)
    packing, inputs = model.family.packing, inputs_of(case, model)
    (side, *_) = sides(case)
    order = [2, 0, 3]
    found = packing.take(model, inputs, order, side)
    with torch.no_grad():
        whole, part = model(inputs), model(found)
    real = model.tokens(found)
    if "language" in real:
        there = torch.from_numpy(real["language"].kind != "padding")
        if there.shape == part.shape[:2]:
            part, whole = part[there], whole[order][there]
            torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-4)
            return
    mask = found.get("pixel_attention_mask")
    if mask is not None and mask.shape == part.shape[:2]:
        torch.testing.assert_close(part[mask.bool()], whole[order][mask.bool()], rtol=1e-4, atol=1e-4)
        return
    torch.testing.assert_close(part, whole[order], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("case", cases("two_images", without=("tiles", "samples_actions")), ids=str)
def test_images_go_with_the_prompt_that_holds_their_tokens(case: Case) -> None:
    """Examples with one and with two images: what is taken out has its own."""
    model = wrapped(case)
    packing = model.family.packing
    one, two = case.inputs(model.module, batch=1), case.inputs(model.module, batch=1, seed=1, images_per_prompt=2)
    width = two["input_ids"].shape[1]
    one |= {
        name: torch.nn.functional.pad(one[name], (0, width - one[name].shape[1]), value=value)
        for name, value in (("input_ids", 1), ("attention_mask", 0), ("token_type_ids", 0))
        if name in one
    }
    both = packing.join(model, [one, two, one])
    assert ImageRun(model, both).owners == [0, 1, 1, 2]
    equal(packing.take(model, both, [1]), two)
    equal(packing.take(model, both, [2, 0]), packing.join(model, [one, one]))


@pytest.mark.parametrize("case", cases("tiles"), ids=str)
def test_tiles_of_all_images_one_after_the_other_go_with_their_image(case: Case) -> None:
    """As some versions of transformers' processors give them, without an axis of images."""
    model = wrapped(case)
    inputs = inputs_of(case, model)
    if inputs["pixel_values"].ndim != 5:
        pytest.skip("its processor gives them so")
    packing, tiles = model.family.packing, ImageRun(model, inputs).tiles

    def flat(given: dict[str, Any], counts: list[int]) -> dict[str, Any]:
        held = [image[:count] for image, count in zip(given["pixel_values"], counts, strict=True)]
        return {**given, "pixel_values": torch.cat(held)}

    run = ImageRun(model, inputs)
    for examples in ([1], [2, 0]):
        found = packing.take(model, flat(inputs, tiles), examples)
        counts = [
            count for example in examples for count, owner in zip(tiles, run.owners, strict=True) if owner == example
        ]
        equal(found, flat(packing.take(model, inputs, examples), counts))


# ---- mutants


def in_order(self: Any, run: Any, name: str, value: Any) -> range:
    return range(len(value))


MUTANTS = {
    "images counted as examples": (Packing, "image_entries", in_order, "Packing"),
    "tiles counted as images": (AnyRes, "owners", lambda self, run: [0] * len(run.tiles), "llava-next-mistral"),
    "copies of an example side by side": (
        batching,
        "repeated",
        lambda value, entries, copies: value if entries is None else value.repeat_interleave(copies, entries.axis),
        "paligemma",
    ),
    "examples in their order, whatever was asked": (
        batching.Entries,
        "of",
        lambda self, examples: [entry for entry, owner in enumerate(self.owners) if owner in examples],
        "vit",
    ),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, attribute, wrong, case = MUTANTS[name]
    monkeypatch.setattr(base if owner is batching else owner, attribute, wrong)
    monkeypatch.setattr(Packed, "image_entries", in_order) if case == "Packing" else None
    chosen = synthetic.CASES[case] if case in synthetic.CASES else CASES[case]
    with pytest.raises((AssertionError, InputError)):
        test_what_is_taken_apart_joins_and_copies_are_joined_inputs(chosen)


# ---- what cannot be taken apart


def test_inputs_of_another_length_are_named() -> None:
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    inputs = inputs_of(CASES["llava-clip-llama"], model)
    packing = model.family.packing
    wrong = {**inputs, "position_ids": torch.zeros(3, inputs["input_ids"].shape[1], dtype=torch.long)}
    for call in (
        lambda: packing.take(model, wrong, [0]),
        lambda: packing.repeat(model, wrong, 2),
        lambda: packing.join(model, [wrong, wrong]),
    ):
        with pytest.raises(InputError, match="position_ids has 3 entries"):
            call()
    with pytest.raises(InputError, match="past_key_values"):
        packing.take(model, {**inputs, "past_key_values": object()}, [0])


def test_what_all_examples_share_stays_whole() -> None:
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    inputs = inputs_of(CASES["llava-clip-llama"], model)
    packing, length = model.family.packing, inputs["input_ids"].shape[1]
    shared = {
        "position_ids": torch.arange(length)[None],
        "cache_position": torch.arange(length),
        "logits_to_keep": torch.tensor([0, 3]),
        "vision_feature_layer": [-2, -1],
        "use_cache": False,
    }
    for made in (packing.take(model, {**inputs, **shared}, [1, 1]), packing.repeat(model, {**inputs, **shared}, 2)):
        equal({name: made[name] for name in shared}, shared)
    with pytest.raises(InputError, match="logits_to_keep differs"):
        packing.join(model, [inputs | {"logits_to_keep": torch.tensor([at])} for at in (0, 1)])
    three = torch.arange(3 * COUNT * length).view(3, COUNT, length)
    found = packing.take(model, {**inputs, "position_ids": three}, [3, 1])["position_ids"]
    assert torch.equal(found, three[:, [3, 1]])


def test_inputs_that_do_not_go_together_are_refused() -> None:
    model = cv.HookedModel(shared_model("vit"))
    inputs = inputs_of(CASES["vit"], model)
    with pytest.raises(InputError, match="different things"):
        model.family.packing.join(model, [inputs, {**inputs, "interpolate_pos_encoding": False}])
    with pytest.raises(InputError, match="do not join"):
        model.family.packing.join(model, [inputs, {"pixel_values": inputs["pixel_values"][..., :-1]}])


def test_a_sweep_does_not_repeat_which_logits_are_kept() -> None:
    """Numbers of positions are no examples: copies of a batch keep the same ones."""
    model = cv.HookedModel(shared_model("llava-clip-llama"))
    inputs = {**inputs_of(CASES["llava-clip-llama"], model), "logits_to_keep": torch.tensor([2, 5])}
    edits = [cv.edits.scale("vision.blocks.0.hook_resid_post", factor) for factor in (0.5, 2.0)]
    swept = model.sweep(inputs, edits, lambda logits: logits[:, -1, 0], progress=False)
    with torch.no_grad():
        naive = torch.stack([model.run(inputs, edit)[:, -1, 0] for edit in edits])
    assert model(inputs).shape[1] == 2
    assert not any(plan.in_full for plan in swept.plan)
    torch.testing.assert_close(swept.values, naive, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [lambda: Flat(merge=0), lambda: Flat(merge=True), lambda: Packed(merge=1.5)])
def test_a_merge_is_a_whole_number(make: Any) -> None:
    with pytest.raises(InputError, match="merge="):
        make()


def test_packings_say_what_they_are() -> None:
    assert repr(Flat()) == "Flat()"
    assert repr(Flat(merge=2, merged_before=True)) == "Flat(merge=2, merged_before=True)"
    assert get_args(Compared) == ("both", "images", "texts")

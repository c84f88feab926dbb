"""Regions and masks of positions that are given per example, over a data set: each batch takes those of its own examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.model.positions import Positions
from tests.sweeps.drawing import model_of
from tests.zoo import CASES

SITE = "vision.blocks.0.hook_resid_post"


def data() -> tuple[cv.HookedModel, dict[str, Any], dict[str, Any], Pairs]:
    model = model_of("vit", torch.float64)
    clean, corrupt = (CASES["vit"].inputs(model.module, batch=5, seed=seed, dtype=torch.float64) for seed in (1, 2))
    size = clean["pixel_values"].shape[-1]
    half = size // 2
    boxes = [(0, 0, half, half), (half, 0, size, half), None, (0, half, size, size), (half, half, size, size)]
    answers, foils = [1, 2, 3, 4, 5], [6, 5, 4, 3, 2]
    return model, clean, corrupt, Pairs(inputs=clean, corrupt_inputs=corrupt, answers=answers, foils=foils, boxes=boxes)


def listed(pairs: Pairs, source: Any, length: int) -> list[edits.Edit]:
    region = cv.regions.box(list(pairs.boxes or ()))
    masks = torch.rand(5, length, generator=torch.Generator().manual_seed(3)) < 0.5
    shared = cv.regions.random_like(cv.regions.box((0, 0, 4, 4)), seed=1)
    return [
        edits.replace(SITE, source, positions=region),
        edits.scale(SITE, 0.0, positions=cv.regions.random_like(region, seed=4)),
        edits.scale(SITE, 0.0, positions=cv.regions.others(region)),
        edits.scale(SITE, 0.0, positions=shared),
        edits.scale(SITE, 0.0, positions=masks),
        edits.block_attention("vision", keys=region),
        edits.delete_tokens("vision", positions=region),
    ]


def both() -> tuple[torch.Tensor, torch.Tensor]:
    """The values of one run in memory, and of batches of two."""
    model, clean, corrupt, pairs = data()
    length = model.tokens(clean)["vision"].n_positions
    _, cache = model.run_with_cache(clean, names_filter=SITE)
    metric = cv.metrics.logit_diff([1, 2, 3, 4, 5], [6, 5, 4, 3, 2])
    memory = model.sweep(corrupt, listed(pairs, cache[SITE], length), metric, progress=False)
    found = model.sweep(
        pairs.corrupt, listed(pairs, pairs.clean, length), "logit_diff", example_batch=2, progress=False
    )
    return memory.values, found.values


@pytest.mark.filterwarnings("ignore:.*select no position")
def test_batches_give_the_numbers_of_one_run() -> None:
    memory, found = both()
    assert memory[0].isnan().tolist() == [False, False, True, False, False]
    assert torch.allclose(memory, found, rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore:.*select no position")
def test_positions_of_the_first_examples_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    own = Positions.taken
    monkeypatch.setattr(Positions, "taken", lambda self, examples, count=None: own(self, range(len(list(examples)))))
    memory, found = both()
    assert not torch.allclose(memory, found, rtol=0, atol=1e-3, equal_nan=True)


def test_a_part_of_the_data_set_needs_regions_of_its_own() -> None:
    model, _, _, pairs = data()
    part, region = pairs[[4, 0, 1]], cv.regions.box(list(pairs.boxes or ()))
    with pytest.raises(InputError, match="positions of 5 examples for 3"):
        model.sweep(part, [edits.scale(SITE, 0.0, positions=region)], "logit_diff", example_batch=2, progress=False)
    own = cv.regions.box(list(part.boxes or ()))
    found = model.sweep(part, [edits.scale(SITE, 0.0, positions=own)], "logit_diff", example_batch=2, progress=False)
    with pytest.warns(UserWarning, match="select no position"):
        whole = model.sweep(
            pairs, [edits.scale(SITE, 0.0, positions=region)], "logit_diff", example_batch=2, progress=False
        )
    assert torch.allclose(found.values, whole.values[:, [4, 0, 1]], rtol=0, atol=1e-12)


def test_a_mean_over_a_region_of_a_data_set_is_that_of_all_its_examples() -> None:
    model, clean, _, pairs = data()
    region = cv.regions.box(list(pairs.boxes or ()))
    _, cache = model.run_with_cache(clean, names_filter=SITE)
    inside = Positions.of(region).resolve(model.tokens(clean)["vision"])
    edit = edits.ablate(SITE, "mean", dataset=pairs.clean, average=region, positions="patch")
    parts: list[torch.Tensor] = []

    def seen(value: torch.Tensor, hook: Any) -> torch.Tensor:
        parts.append(value[:, 1:])
        return value

    for batch in pairs.clean.batches(model, 2):
        model.run(batch.inputs, [edit, edits.apply(SITE, seen)])
    wanted = cache[SITE][inside].mean(0)
    assert torch.allclose(torch.cat(parts), wanted.expand_as(cache[SITE][:, 1:]), rtol=0, atol=1e-12)


def test_positions_counted_from_the_end_of_prompts_of_other_lengths_are_refused():
    model = cv.organisms.load("shapes-llava")
    scenes = cv.data.sample_question_pairs(2, seed=0)
    texts = [
        "USER: <image> what color is the circle ? ASSISTANT:",
        "USER: <image> what color is the left object ? ASSISTANT:",
    ]
    pairs = cv.data.Pairs(
        [pair.clean.image for pair in scenes], texts, corrupt_images=[pair.corrupt.image for pair in scenes], answers="red", foils="blue"
    )  # fmt: skip
    for where in (-1, [-2], slice(-3, None)):
        edit = edits.ablate("language.blocks.1.hook_resid_post", positions=where)
        with pytest.raises(InputError, match="different lengths"):
            model.sweep(pairs, [edit], "logit_diff", example_batch=2, progress=False)
    last = [edits.ablate("language.blocks.1.hook_resid_post", positions="last")]
    one, two = (model.sweep(pairs, last, "logit_diff", example_batch=size, progress=False).values for size in (1, 2))
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)

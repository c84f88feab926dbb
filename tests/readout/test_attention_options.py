"""Attention read with options: entropy against what masks allow, strongest heads named, pictures cut down to regions, wrong things refused."""

from __future__ import annotations

import math
import re
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

import circuitvision as cv
from circuitvision import regions
from circuitvision.errors import InputError
from circuitvision.readout import (
    attention_contrast,
    attention_entropy,
    attention_maps,
    attention_mass,
    distance_profile,
    position_pattern,
    rollout,
)
from circuitvision.readout.attention.cache import _layout
from circuitvision.readout.attention.contrast import AttentionContrast
from tests.readout.layouts import by_row, of_rows
from tests.readout.test_attention import planted, run
from tests.readout.test_attention_maps import made, random_shares
from tests.zoo import Case, case, parametrize, shared_model

LLAVA = "llava-clip-llama"

# -- mass ----------------------------------------------------------------------------------------------------------------------------------


@cache
def cached(name: str, images: int):
    model = cv.HookedModel(shared_model(name))
    inputs = case(name).inputs(model.module, batch=2, images_per_prompt=images)
    with torch.no_grad():
        return model.run_with_cache(inputs, names_filter="*.blocks.*.attn.hook_pattern")[1]


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(
        [("vit", 1), ("dinov2-registers", 1), ("clip", 1), (LLAVA, 2), ("llava-next-mistral", 1), ("pi0", 1)]
    ),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
def test_masses_of_any_partition_of_the_keys_add_up_to_one(which, parts, seed):
    cache = cached(*which)
    for tower in cache.model.towers:
        if not any(name.startswith(f"{tower}.") for name in cache):
            continue
        keys = cache[f"{tower}.blocks.0.attn.hook_pattern"].shape[-1]
        rows = cache.model.tokens(cache.inputs)[tower].n_rows
        owner = torch.randint(parts, (rows, keys), generator=torch.Generator().manual_seed(seed))
        # A part that is empty in a row has no mass there, which is said and is NaN.
        owner[:, :parts] = torch.arange(parts)
        result = attention_mass(
            cache.model, cache, tower=tower, spans={str(part): owner == part for part in range(parts)}, queries="all"
        )
        torch.testing.assert_close(by_row(result).sum(-1), torch.ones(by_row(result).shape[:-1]), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            by_row(result, "uniform").sum(-1), torch.ones(by_row(result, "uniform").shape[:-1]), atol=1e-5, rtol=0
        )


# -- entropy -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("span", [None, "patch"])
def test_relative_entropy_is_each_querys_share_of_the_most_there_could_be(span):
    model, _, cache = run(LLAVA)
    tokens = model.tokens(cache.inputs)["language"]
    result = attention_entropy(model, cache, tower="language", span=span, queries="all", relative=True)
    assert result.measure == "relative entropy"
    keys = torch.from_numpy(tokens.kind != "padding" if span is None else tokens.kind == span)
    for layer in result.axes["layer"]:
        pattern = cache["language", "pattern", layer].double()
        for row in range(tokens.n_rows):
            for head in range(pattern.shape[1]):
                found = []
                for query in range(tokens.n_positions):
                    seen = [float(pattern[row, head, query, key]) for key in range(query + 1) if keys[row, key]]
                    if len(seen) > 1:
                        shares = [share / sum(seen) for share in seen]
                        found.append(-sum(p * math.log(p) for p in shares if p > 0) / math.log(len(seen)))
                assert float(by_row(result)[layer, head, row]) == pytest.approx(np.mean(found), abs=1e-5)


def alike(pattern: Tensor) -> Tensor:
    """Every key that the pattern's mask lets a query see, alike."""
    seen = (pattern > 0).to(pattern)
    return seen / seen.sum(-1, keepdim=True)


@pytest.mark.parametrize("options", [{}, {"renormalise": False}, {"relative": True}])
@pytest.mark.parametrize("span", [None, "patch"])
def test_heads_that_look_alike_have_the_entropy_called_uniform(options, span):
    _, cache = planted(LLAVA, "language", alike)
    result = attention_entropy(cache.model, cache, tower="language", span=span, queries="all", **options)
    torch.testing.assert_close(
        by_row(result), by_row(result, "uniform")[:, None].expand_as(by_row(result)), atol=1e-5, rtol=1e-5
    )
    if "relative" in options:
        torch.testing.assert_close(by_row(result), torch.ones_like(by_row(result)))


def test_relative_entropy_without_a_choice_of_keys_is_nan():
    _, cache = planted(LLAVA, "language", alike)
    with pytest.warns(UserWarning, match="no query that counts sees two keys of the span"):
        result = attention_entropy(cache.model, cache, tower="language", queries=0, relative=True)
    assert bool(by_row(result).isnan().all())
    with pytest.raises(InputError, match="leave renormalise on"):
        attention_entropy(cache.model, cache, tower="language", relative=True, renormalise=False)


# -- highlights ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:.*padding never counts", "ignore:.*no query that counts")
@parametrize()
def test_notebooks_name_the_strongest_heads_in_every_family(case: Case):
    model, _, cache = run(case.name)
    for tower in model.towers:
        if not any(name.startswith(f"{tower}.blocks") for name in cache):
            continue
        maps = attention_maps(model, cache, tower=tower)
        for result in (
            attention_mass(model, cache, tower=tower),
            attention_entropy(model, cache, tower=tower, relative=True),
            maps,
        ):
            assert result.highlights()
            assert all(isinstance(line, str) and "nan" not in line for line in result.highlights().values())


@pytest.mark.filterwarnings("ignore:.*the same between all patches")
def test_highlights_name_the_planted_head():
    def to_first_patch(pattern: Tensor) -> Tensor:
        out = alike(pattern).clone()
        out[:, 2] = 0.0
        out[:, 2, :, 5] = 1.0
        return out

    _, cache = planted("vit", "vision", to_first_patch)
    said = attention_mass(cache.model, cache, spans={"patch 4": 5}).highlights()["patch 4"]
    assert said == "vision L0H2: 100.0% (all keys alike: 5.9%)"
    assert (
        attention_entropy(cache.model, cache)
        .highlights()["entropy"]
        .startswith("vision L0H2: 0.00 (all keys alike: 2.83)")
    )
    assert attention_mass(cache.model, cache).span("patch").highlights()["mass"].startswith("vision L0H2: 100.0%")
    assert distance_profile(cache.model, cache).highlights()["farthest"].startswith("vision L0H2")
    assert re.match(r"vision L\dH\d: ", position_pattern(cache.model, cache).highlights()["best explained by offsets"])
    assert attention_maps(cache.model, cache, query="cls").highlights()["vision L0H2"] == "100.0% on image patches"


# -- regions -------------------------------------------------------------------------------------------------------------------------------


def contrast_of(values: Tensor, rows: int = 4, columns: int = 4) -> AttentionContrast:
    maps = made(values[None, None], rows, columns)
    return of_rows(
        AttentionContrast,
        values,
        {"row": [0], "key": list(range(values.shape[-1]))},
        places=maps.places,
        boxes=maps.boxes,
    )


def test_a_picture_is_cut_down_to_its_regions():
    values = torch.zeros(1, 12)
    values[0, [1, 2]] = torch.tensor([3.0, 2.0])
    values[0, 7] = 1.0
    contrast = contrast_of(values, 3, 4)
    picture = np.arange(6 * 8 * 3, dtype=np.uint8).reshape(6, 8, 3)
    # Patches are 2 × 2 pixels of this picture: row 0, columns 1 and 2, and row 1, column 3.
    one = contrast.focus(picture, top_percent=25, count=1)
    assert np.array_equal(one, picture[0:2, 2:6])
    both = contrast.focus(Image.fromarray(picture), top_percent=25, count=2, fill=9)
    expected = np.full((4, 6, 3), 9, dtype=np.uint8)
    expected[0:2, 0:4] = picture[0:2, 2:6]
    expected[2:4, 4:6] = picture[2:4, 6:8]
    assert np.array_equal(both, expected)
    assert picture[0, 0, 1] == 1
    assert contrast.highlights()["region 1"] == "2 patches, box (8, 0, 24, 8)"
    with pytest.raises(InputError, match=r"\[height, width, 3\]"):
        contrast.focus(picture[..., 0])
    with pytest.raises(InputError, match="no region to look at"):
        contrast_of(torch.full((1, 12), float("nan")), 3, 4).focus(picture)


# -- refusals ------------------------------------------------------------------------------------------------------------------------------


def test_what_is_neither_inputs_nor_a_cache_is_refused():
    model, _, _ = run("vit")
    for wrong in (model, torch.zeros(3), 3):
        with pytest.raises(InputError):
            attention_mass(model, wrong)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: attention_mass(c.model, c, layers=1.0), "has layers 0 to 2"),
        (lambda c: attention_mass(c.model, c, layers=[True]), "has layers 0 to 2"),
        (lambda c: attention_maps(c.model, c, steps=0.5), "outside the 1 passes"),
        (
            lambda c: attention_contrast(attention_maps(c.model, c), attention_maps(c.model, c), epsilon="x"),
            "makes no sense",
        ),
        (
            lambda c: attention_contrast(attention_maps(c.model, c), attention_maps(c.model, c), layers=9),
            "There is no layer 9",
        ),
        (
            lambda c: attention_contrast(attention_maps(c.model, c), attention_maps(c.model, c)).regions(count=1.5),
            "a count from 1 on",
        ),
        (lambda c: rollout(c.model, c, residual="half"), "a share from 0 to 1"),
        (lambda c: attention_maps(c.model, c).head_contrast().head_contrast(), "takes plain attention_maps"),
        (lambda c: made(random_shares(1, 1, 2, 16)).head_contrast(), "single head"),
        (lambda c: attention_maps(c.model, c).peak_in(regions.box((90, 90, 99, 99))), "lies outside"),
    ],
)
def test_meaningless_options_are_refused(call, message):
    with pytest.raises(InputError, match=message):
        call(run("vit")[2])


def test_layers_of_any_whole_type_are_taken():
    _, _, cache = run("vit")
    by_name = attention_mass(cache.model, cache, layers=[1])
    for layers in (1, np.int64(1), torch.tensor([1]).tolist(), range(1, 2)):
        assert torch.equal(by_row(attention_mass(cache.model, cache, layers=layers)), by_row(by_name))
    maps = attention_maps(cache.model, cache)
    assert torch.equal(
        by_row(attention_contrast(maps, maps, layers=1)).nan_to_num(),
        by_row(attention_contrast(maps, maps, layers=[1])).nan_to_num(),
    )
    assert cv.readout.attention_entropy(cache.model, cache, layers=np.int64(-1)).axes["layer"] == [2]


def test_a_sliding_window_has_dropped_the_first_positions():
    model, _, cache = run(LLAVA)
    maps = model.tokens(cache.inputs)
    length = maps["language"].n_positions
    passes = [torch.zeros(2, 4, length, length), torch.zeros(2, 4, 1, length - 2)]
    kinds, (prompt, new) = _layout(model, maps, "language", passes, pool=False)
    assert kinds.tolist() == [["generated"], ["generated"]]
    assert (prompt.start, prompt.first, prompt.count) == (0, 3, length - 3)
    assert (new.tokens, new.start, new.count) == (None, length - 3, 1)


def test_padding_that_the_family_reads_is_a_query():
    """SigLIP's texts are read at their last position: of a short prompt that is padding, and all that its last layer does is there."""
    entry = case("siglip2")
    model = cv.HookedModel(shared_model("siglip2"), entry.processor())
    inputs = entry.inputs(model.module, batch=2)
    inputs["attention_mask"][:, 4:] = 0
    _, cache = model.run_with_cache(inputs, names_filter="text.blocks.*.attn.hook_pattern")
    last = model.text.cfg.n_layers - 1
    pattern = cache["text", "pattern", last]
    mass = cv.readout.attention_mass(cache.model, cache, tower="text", layers=last, spans={"first": 0})
    torch.testing.assert_close(by_row(mass)[0, :, :, 0], pattern[:, :, -1, 0].T)
    rolled = cv.readout.rollout(cache.model, cache, tower="text", residual=0.25)
    step = None
    for layer in range(last + 1):
        mixed = 0.25 * torch.eye(6) + 0.75 * cache["text", "pattern", layer].mean(1)
        # What nothing reads stays where it is.
        mixed[:, 4] = torch.eye(6)[4]
        step = mixed if step is None else mixed @ step
    torch.testing.assert_close(by_row(rolled)[-1, :, -1], step[:, -1])
    torch.testing.assert_close(by_row(rolled.of(-1))[-1, 0], step[:, -1])
    assert bool(by_row(rolled)[:, :, 4].isnan().all())

"""Attention over the image: maps, peaks, contrasts with their regions, and rollouts, against answers worked out by hand."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import circuitvision as cv
from circuitvision import regions
from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.readout import attention_contrast, attention_maps, attention_mass, rollout
from circuitvision.readout.attention.contrast import AttentionContrast
from circuitvision.readout.attention.maps import AttentionMaps
from circuitvision.readout.attention.rollout import AttentionRollout
from tests.readout.layouts import by_row, of_rows
from tests.readout.test_attention import PATTERNS, paddings, planted, run, wrapped
from tests.zoo import Case, case, parametrize


def made(
    values: Tensor, rows: int = 4, columns: int = 4, cell: float = 8.0, prefix: int = 0, **more: Any
) -> AttentionMaps:
    """Maps ``[layer head row key]`` (or with a leading step) of one image per row, its patches after ``prefix`` words."""
    n_rows, n_keys = values.shape[-2:]
    r, c = torch.arange(rows * columns) // columns, torch.arange(rows * columns) % columns
    places = torch.full((n_rows, n_keys, 4), -1)
    places[:, prefix : prefix + rows * columns] = torch.stack([0 * r, 0 * r, r, c], -1)
    boxes = torch.full((n_rows, n_keys, 4), float("nan"))
    boxes[:, prefix : prefix + rows * columns] = torch.stack([c, r, c + 1, r + 1], -1) * cell
    kinds = ["text"] * prefix + ["patch"] * (rows * columns) + ["text"] * (n_keys - prefix - rows * columns)
    names = ["step", "layer", "head", "row", "key"][-values.ndim :]
    return of_rows(
        AttentionMaps,
        values,
        {name: list(range(size)) for name, size in zip(names, values.shape, strict=True)},
        tower="language",
        places=places,
        boxes=boxes,
        kinds=[kinds] * n_rows,
        blocks=[["language", 0, 0, n_keys]],
        query_places=torch.full((n_rows, 4), -1),
        **more,
    )


def random_shares(*shape: int) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(sum(shape))).softmax(-1)


@parametrize()
def test_maps_are_the_rows_of_the_pattern_in_every_tower(case: Case):
    model = wrapped(case.name)
    side = paddings(case)[-1]
    inputs = case.inputs(model.module, batch=2, padding=side)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
    for tower, tokens in model.tokens(inputs).items():
        maps = attention_maps(model, cache, tower=tower, query="last")
        last, there = torch.tensor(tokens.last()), torch.from_numpy(tokens.present.any(1))
        pattern = cache[tower, "pattern", 0]
        wanted = pattern[torch.arange(len(last)), :, last].masked_fill(~there[:, None, None], float("nan"))
        torch.testing.assert_close(by_row(maps)[0].transpose(0, 1), wanted, equal_nan=True)
        seen = maps.patches()
        for row in range(tokens.n_rows):
            for key in seen[row].nonzero().flatten().tolist()[:3]:
                image, tile, r, c = maps.places[row, key].tolist()
                assert maps.grid(0, 1, maps.axes["example"][row], image, tile)[r, c] == by_row(maps)[0, 1, row, key]


def test_a_patch_that_asks_is_remembered_with_its_place():
    model, inputs, cache = run("vit")
    tokens = model.tokens(inputs)["vision"]
    maps = attention_maps(model, cache, query=tokens.image(0).patch(2, 1))
    assert maps.query_places.tolist() == [[0, 0, 2, 1]] * 2
    assert maps.query == "image(0).patch(2, 1)"
    torch.testing.assert_close(by_row(maps)[0, :, 0], cache["vision", "pattern", 0][0, :, 10])
    assert attention_maps(cache.model, cache, query="patch").query_places.tolist() == [[-1] * 4] * 2


def test_maps_of_generated_words_keep_the_keys_of_the_prompt():
    model, inputs, _ = run("llava-clip-llama", batch=1)
    with torch.no_grad(), model.record("language.blocks.*.attn.hook_pattern") as steps:
        model.generate(inputs, max_new_tokens=4, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = model.tokens(inputs)
    maps = attention_maps(steps.model, steps, tokens, steps="decode")
    assert list(maps.axes) == ["step", "layer", "head", "key", "example"]
    assert (maps.axes["step"], len(maps.axes["key"])) == ([1, 2, 3], 16)
    torch.testing.assert_close(by_row(maps)[1, 0, :, 0], steps["language", "pattern", 0][2][0, :, 0, :16])
    assert attention_maps(steps.model, steps, tokens, steps=[3]).axes["step"] == [3]
    assert "step" not in attention_maps(steps.model, steps, tokens, steps=3).axes
    assert torch.equal(maps.grid(1, 2, step=3), attention_maps(steps.model, steps, tokens, steps=3).grid(1, 2))
    for bad in ("later", []):
        with pytest.raises(InputError, match="steps="):
            attention_maps(model, steps, tokens, steps=bad)


def test_passes_go_by_their_number_and_not_by_their_place():
    values = random_shares(2, 1, 1, 1, 16)
    maps = dataclasses.replace(made(values), axes={**made(values).axes, "step": [1, 2]})
    assert torch.equal(maps.grid(0, 0, step=1).flatten(), values[0, 0, 0, 0])
    assert torch.equal(maps.grid(0, 0, step=2).flatten(), values[1, 0, 0, 0])
    assert torch.equal(maps.grid(0, 0), maps.grid(0, 0, step=1))
    assert torch.equal(maps.pass_values(2), values[1].movedim(-2, -1))
    with pytest.raises(InputError, match=r"no step 0 in this AttentionMaps; there are 1, 2"):
        maps.grid(0, 0, step=0)
    with pytest.raises(InputError, match="of one pass"):
        made(values[0]).grid(0, 0, step=1)


def test_passes_counted_from_the_end_are_named_by_their_place():
    model, inputs, _ = run("llava-clip-llama", batch=1)
    with torch.no_grad(), model.record("language.blocks.*.attn.hook_pattern") as steps:
        model.generate(inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    maps = attention_maps(model, steps, model.tokens(inputs), steps=[-1, 1])
    assert maps.axes["step"] == [2, 1]
    assert torch.equal(maps.grid(0, 0, step=2), attention_maps(model, steps, model.tokens(inputs), steps=2).grid(0, 0))


def test_maps_of_an_action_tower_lie_over_every_camera():
    model, inputs, cache = run("pi0")
    maps = attention_maps(model, cache)
    assert [block[0] for block in maps.blocks] == ["language", "action"]
    first, second = (maps.grid(0, 0, image=camera) for camera in (0, 1))
    assert first.shape == second.shape == (3, 3)
    language = model.tokens(inputs)["language"]
    by_selection = maps.peak_in(language.image(1))
    assert float(by_row(by_selection, "uniform")[0, 0]) == 0.5
    with pytest.raises(InputError, match="of the vision tower"):
        maps.keys(model.tokens(inputs)["vision"].image(0))


def test_contrast_with_the_mean_head_sums_to_nothing():
    maps = made(random_shares(3, 2, 2, 20))
    difference = maps.head_contrast()
    assert difference.measure == "difference"
    torch.testing.assert_close(by_row(difference).sum((0, 1)), torch.zeros(2, 20), atol=1e-6, rtol=0)
    torch.testing.assert_close(by_row(difference)[1, 0] + by_row(maps).mean((0, 1)), by_row(maps)[1, 0])
    several = made(random_shares(2, 3, 2, 1, 16)).head_contrast()
    torch.testing.assert_close(by_row(several).sum((1, 2)), torch.zeros(2, 1, 16), atol=1e-6, rtol=0)


def test_peaks_are_counted_by_rows_and_ties_in_parts():
    values = torch.zeros(1, 3, 4, 18)
    values[:, 0, :, 2 + 5] = 1.0
    values[:, 1, :2, 2 + 5] = 1.0
    values[:, 1, 2:, 2 + 15] = 1.0
    values[:, 2] = 1 / 18
    values[:, :, :, 0] = 5.0  # a word gets more than any patch
    maps = made(values, prefix=2)
    result = maps.peak_in(regions.box((8.0, 8.0, 16.0, 16.0)))
    assert by_row(result).mean(-1).tolist() == [[1.0, 0.5, pytest.approx(1 / 16)]]
    assert result.measure == "peak"
    torch.testing.assert_close(by_row(result, "uniform"), torch.full((1, 4), 1 / 16))
    mask = torch.zeros(4, 18, dtype=torch.bool)
    mask[:, 7] = True
    assert torch.equal(by_row(maps.peak_in(mask)), by_row(result))
    assert float(by_row(maps.peak_in("patch", among=["text", "patch"])).max()) == 0.0
    mask[3] = False
    with pytest.warns(UserWarning, match="empty for mask"):
        assert torch.isnan(by_row(maps.peak_in(mask))[..., 3]).all()


def test_the_peak_of_a_planted_head_lies_where_it_was_planted():
    model, cache = planted("vit", "vision", lambda pattern: torch.eye(17)[7])
    tokens = model.tokens(cache.inputs)["vision"]
    assert torch.equal(
        by_row(attention_maps(cache.model, cache).peak_in(tokens.image(0).patch(1, 2))), torch.ones(3, 4, 2)
    )
    assert torch.equal(
        by_row(attention_maps(cache.model, cache).peak_in(tokens.image(0).patch(0, 0))), torch.zeros(3, 4, 2)
    )


def test_a_query_contrasted_with_itself_is_one_everywhere():
    maps = made(random_shares(3, 2, 2, 20), prefix=3)
    result = attention_contrast(maps, maps, epsilon=0.0)
    torch.testing.assert_close(by_row(result)[:, 3:19], torch.ones(2, 16))
    assert torch.isnan(by_row(result)[:, [0, 1, 2, 19]]).all()
    torch.testing.assert_close(result.grid(), torch.ones(4, 4))


def test_the_contrast_is_the_weighted_mean_of_ratios():
    question, generic = torch.full((2, 2, 2, 1, 16), 0.02), torch.full((2, 2, 1, 16), 0.02)
    question[0, 0, :, 0, 5] = torch.tensor([0.04, 0.08])  # head mean 0.06
    question[1, 1, :, 0, 5] = 0.1
    result = attention_contrast(made(question), made(generic), epsilon=0.02)
    # Step 1: layers (0.06, 0.02) over 0.04; step 2: (0.02, 0.1) over 0.04; weights 1/3 and 2/3.
    expected = (1.5 + 0.5) / 2 / 3 + 2 * (0.5 + 2.5) / 2 / 3
    assert float(by_row(result)[0, 5]) == pytest.approx(expected)
    assert float(by_row(result)[0, 4]) == pytest.approx(0.5)
    assert float(
        by_row(attention_contrast(made(question), made(generic), epsilon=0.02, weights=[1, 0]))[0, 5]
    ) == pytest.approx(1)
    assert float(
        by_row(attention_contrast(made(question), made(generic), epsilon=0.02, layers=[1]))[0, 5]
    ) == pytest.approx(0.5 / 3 + 2.5 * 2 / 3)
    by_default = attention_contrast(made(question), made(generic))
    assert by_default.epsilon == pytest.approx(0.02)
    torch.testing.assert_close(by_row(by_default), by_row(result))


def test_patches_are_matched_by_place_when_prompts_differ_in_length():
    question, generic = random_shares(1, 2, 1, 18), random_shares(1, 3, 1, 21)
    result = attention_contrast(made(question, prefix=2), made(generic, prefix=4), epsilon=0.01)
    expected = question.mean(1)[0, 0, 2:] / (generic.mean(1)[0, 0, 4:20] + 0.01)
    torch.testing.assert_close(by_row(result)[0, 2:], expected)


def test_a_patch_that_the_generic_query_ignores_has_no_contrast():
    generic = random_shares(1, 1, 1, 16)
    generic[..., 3] = 0.0
    with pytest.warns(UserWarning, match="take epsilon > 0"):
        result = attention_contrast(made(random_shares(1, 2, 1, 16)), made(generic), epsilon=0.0)
    assert torch.isnan(by_row(result)[0]).nonzero().flatten().tolist() == [3]
    assert len(result.regions(100.0)) > 0


def contrast_of(grid: Tensor, cell: float = 8.0) -> AttentionContrast:
    maps = made(torch.ones(1, 1, 1, grid.numel()), *grid.shape, cell=cell)
    return of_rows(
        AttentionContrast,
        grid.reshape(1, -1),
        {"row": [0], "key": maps.axes["key"]},
        places=maps.places,
        boxes=maps.boxes,
        tower="language",
    )


def test_regions_are_connected_patches_and_their_boxes_in_pixels():
    grid = torch.zeros(4, 5)
    grid[0, :3] = torch.tensor([3.0, 2.0, 2.5])
    grid[2:, 4] = torch.tensor([4.0, 5.0])
    grid[1, 3] = 1.0
    result = contrast_of(grid)
    first, second = result.regions(25.0, 5)
    assert (first.patches, first.mass, first.box) == (((2, 4), (3, 4)), 9.0, (32.0, 16.0, 40.0, 32.0))
    assert (second.patches, second.mass, second.box) == (((0, 0), (0, 1), (0, 2)), 7.5, (0.0, 0.0, 24.0, 8.0))
    assert [len(region.patches) for region in result.regions(30.0, 5)] == [2, 3, 1]
    (joined,) = result.regions(30.0, 5, diagonal=True)
    assert (len(joined.patches), joined.box) == (6, (0.0, 0.0, 40.0, 32.0))
    assert len(result.regions(30.0, 1)) == 1
    assert result.regions(1.0)[0].patches == ((3, 4),)
    # Equal patches are kept together, so a flat contrast is one region.
    assert contrast_of(torch.ones(4, 4)).regions(10.0)[0].box == (0.0, 0.0, 32.0, 32.0)


@given(st.integers(1, 5), st.integers(1, 5), st.floats(1.0, 100.0), st.integers(0, 1000), st.booleans())
def test_regions_share_no_patch_and_hold_the_highest(
    rows: int, columns: int, percent: float, seed: int, diagonal: bool
):
    grid = torch.randperm(rows * columns, generator=torch.Generator().manual_seed(seed)).reshape(rows, columns).float()
    regions = contrast_of(grid).regions(percent, 25, diagonal=diagonal)
    kept = [patch for region in regions for patch in region.patches]
    assert len(set(kept)) == len(kept)
    lowest = min(float(grid[patch]) for patch in kept)
    assert int((grid >= lowest).sum()) == len(kept)
    assert len(kept) - 1 < rows * columns * percent / 100 + 1e-6 <= len(kept) + 1e-5 or len(kept) == 1
    assert [region.mass for region in regions] == sorted((region.mass for region in regions), reverse=True)


def test_a_question_stands_out_against_a_generic_one_in_a_trained_model():
    import numpy as np

    from circuitvision.data.questions import prompt, sample_question_pairs

    model = cv.organisms.load("shapes-llava")
    pairs = sample_question_pairs(10, seed=1)
    images = [pair.clean.image for pair in pairs]
    caches = []
    for texts in ([pair.prompt for pair in pairs], [prompt("what is the object ?")] * len(pairs)):
        with torch.no_grad():
            inputs = model.inputs(images=images, text=texts)
            caches.append(model.run_with_cache(inputs, names_filter="language.blocks.*.attn.hook_pattern")[1])
    result = attention_contrast(*(attention_maps(model, cache, layers=[1, 2]) for cache in caches))
    hits = []
    for row, pair in enumerate(pairs):
        left, top, right, bottom = result.regions(5.0, 1, example=row)[0].box
        x0, y0, x1, y1 = pair.question.subject.box
        hits.append(left <= x0 and top <= y0 and right >= x1 and bottom >= y1)
    assert np.mean(hits) >= 0.9


def three_tokens(first: Tensor, second: Tensor) -> ActivationCache:
    """A run of a vision tower of 2 layers, in which the first three positions look at each other as given and the others at themselves."""

    def plant(pattern: Tensor, layer: int) -> Tensor:
        given = (first, second)[layer]
        out = torch.eye(pattern.shape[-1]).expand_as(pattern).clone()
        out[..., :3, :3] = given if given.ndim == 2 else given[None]
        return out

    model = wrapped("dinov2-headless")
    inputs = case("dinov2-headless").inputs(model.module, batch=1)
    hooks = [
        (f"vision.blocks.{layer}.attn.hook_pattern", lambda pattern, hook, layer=layer: plant(pattern, layer))
        for layer in (0, 1)
    ]
    with torch.no_grad(), model.hooks(hooks):
        return model.run_with_cache(inputs, names_filter=PATTERNS)[1]


FIRST = torch.tensor([[1.0, 0, 0], [0.5, 0.5, 0], [0, 0, 1]])
SECOND = torch.tensor([[0.0, 1, 0], [0, 1, 0], [0.5, 0, 0.5]])


def test_the_rollout_of_two_layers_and_three_tokens_by_hand():
    result = rollout(wrapped("dinov2-headless"), three_tokens(FIRST, SECOND))
    by_hand = torch.tensor([[0.625, 0.375, 0], [0.25, 0.75, 0], [0.25, 0, 0.75]])
    torch.testing.assert_close(by_row(result)[0, 0, :3, :3], torch.tensor([[1.0, 0, 0], [0.25, 0.75, 0], [0, 0, 1]]))
    torch.testing.assert_close(by_row(result)[1, 0, :3, :3], by_hand)
    torch.testing.assert_close(by_row(result)[1, 0, 3:, 3:], torch.eye(14))
    plain = rollout(wrapped("dinov2-headless"), three_tokens(FIRST, SECOND), residual=0.0)
    torch.testing.assert_close(by_row(plain)[1, 0, :3, :3], SECOND @ FIRST)
    kept = rollout(wrapped("dinov2-headless"), three_tokens(FIRST, SECOND), residual=1.0)
    torch.testing.assert_close(by_row(kept)[:, 0], torch.eye(17).expand(2, 17, 17))


def test_heads_are_fused_before_the_residual_is_mixed_in():
    heads = torch.stack([FIRST, SECOND, FIRST])
    cache = three_tokens(heads, FIRST)
    for fusion, fused in (("mean", heads.mean(0)), ("max", heads.amax(0)), ("min", heads.amin(0))):
        mixed = 0.5 * torch.eye(3) + 0.5 * fused
        known = mixed / mixed.sum(-1, keepdim=True)
        torch.testing.assert_close(by_row(rollout(cache.model, cache, head_fusion=fusion))[0, 0, :3, :3], known)
    with pytest.warns(UserWarning, match="no attention is left"):
        assert torch.isnan(by_row(rollout(cache.model, cache, head_fusion="min", residual=0.0))).any()


def test_the_weakest_keys_are_discarded_row_by_row():
    shares = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]])
    cache = three_tokens(shares, FIRST)
    # 16 of 17 keys go: each row keeps its strongest.
    result = rollout(cache.model, cache, discard=0.95, layers=0)
    known = torch.tensor([[0.5 + 0.35, 0, 0], [0.25, 0.5, 0], [0, 0, 0.5 + 0.4]])
    torch.testing.assert_close(by_row(result)[0, 0, :3, :3], known / known.sum(-1, keepdim=True))


def test_what_is_discarded_depends_on_no_padding():
    model = wrapped("llava-clip-llama")
    kept = []
    for side in (None, "left", "right"):
        inputs = case("llava-clip-llama").inputs(model.module, batch=2, padding=side)
        real = torch.from_numpy(model.tokens(inputs)["language"].kind != "padding")
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
        step = by_row(rollout(cache.model, cache, residual=0.0, discard=0.5, layers=0))[0]
        for row in range(len(real)):
            seen = step[row][real[row]][:, real[row]]
            # The n-th real position of a causal tower sees n keys, and keeps all but half of them.
            counts = torch.arange(1, len(seen) + 1)
            assert torch.equal((seen > 0).sum(-1), counts - counts // 2)
        kept.append(int(real.sum()))
    assert kept[1] < kept[0] or kept[2] < kept[0], "some row is padded"


@parametrize()
def test_rollouts_are_distributions_over_the_input(case: Case):
    model = wrapped(case.name)
    inputs = case.inputs(model.module, batch=2, padding=paddings(case)[-1])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
    for tower, tokens in model.tokens(inputs).items():
        if tower == "action":
            with pytest.raises(InputError, match="looks at other positions"):
                rollout(model, cache, tower=tower)
            continue
        result = rollout(model, cache, tower=tower, head_fusion="max")
        real = torch.from_numpy(tokens.present)
        readout = model.towers[tower].spec.readout
        if readout is not None and readout.pool == "last":
            # What the tower is read at counts, whatever stands there.
            real[:, -1] = True
        assert torch.isfinite(by_row(result)[:, real]).all()
        torch.testing.assert_close(by_row(result)[:, real].sum(-1), torch.ones(by_row(result)[:, real].shape[:-1]))
        assert torch.isnan(by_row(result)[:, ~real]).all()
        padding = by_row(result).nan_to_num(0.0) * ~real[None, :, None, :]
        assert float(padding.max()) == 0.0


def test_what_stands_in_rows_of_padding_reaches_no_rollout():
    model, inputs, cache = run("llava-clip-llama", "left")
    padding = torch.from_numpy(model.tokens(inputs)["language"].kind == "padding")
    known = rollout(model, cache)
    for layer in range(2):
        name = f"language.blocks.{layer}.attn.hook_pattern"
        cache._values[name] = cache[name].masked_fill(padding[:, None, :, None], float("nan"))
    torch.testing.assert_close(by_row(rollout(cache.model, cache)), by_row(known), equal_nan=True)
    assert torch.isfinite(by_row(known)[:, ~padding]).all()


def test_one_row_of_a_rollout_lies_over_the_image():
    _, _, cache = run("dinov2-registers")
    result = rollout(cache.model, cache)
    maps = result.of("cls")
    assert (maps.measure, maps.axes["head"]) == ("rollout", ["rollout"])
    torch.testing.assert_close(by_row(maps)[:, 0], by_row(result)[:, :, 0])
    assert maps.grid(2, "rollout").shape == (4, 4)
    assert result.of(7).query_places.tolist() == [[0, 0, 0, 3]] * 2
    for bad in ("text", 99):
        with pytest.raises(InputError):
            result.of(bad)


def test_results_come_back_from_files(tmp_path):
    _, _, cache = run("llava-clip-llama", "left")
    maps = attention_maps(cache.model, cache)
    for result, kind in (
        (maps, AttentionMaps),
        (attention_contrast(maps, maps), AttentionContrast),
        (rollout(cache.model, cache), AttentionRollout),
    ):
        again = kind.load(result.save(tmp_path / f"{kind.__name__}.safetensors"))
        torch.testing.assert_close(by_row(again), by_row(result), equal_nan=True)
        for name in ("places", "boxes"):
            torch.testing.assert_close(getattr(again, name), getattr(result, name), equal_nan=True)
        assert again.provenance == result.provenance
    again = AttentionMaps.load(tmp_path / "AttentionMaps.safetensors")
    assert torch.equal(again.grid(0, 0), maps.grid(0, 0))
    assert torch.equal(again.keys(regions.box((0, 0, 4, 4))), maps.keys(regions.box((0, 0, 4, 4))))


def refuse(match: str):
    return pytest.raises(InputError, match=match)


def test_meaningless_maps_peaks_and_rollouts_are_refused():
    model, inputs, cache = run("llava-clip-llama")
    maps = attention_maps(model, cache)
    with refuse("no layer 9"):
        maps.grid(9, 0)
    with refuse("image 3"):
        maps.grid(0, 0, image=3)
    with refuse("lies outside"):
        maps.peak_in(regions.box((900.0, 900.0, 910.0, 910.0)))
    with refuse("none of the keys among"):
        maps.peak_in("text")
    with refuse("of the vision tower"):
        maps.peak_in(model.tokens(inputs)["vision"].image(0))
    other = model.tokens(run("llava-clip-llama", "right")[1])["language"]
    with refuse("another run"):
        maps.peak_in(other.image(0))
    with refuse("one pass"):
        made(random_shares(2, 1, 1, 1, 16)).peak_in("patch")
    for options in ({"residual": 1.5}, {"discard": 1.0}, {"residual": -0.1}):
        with refuse("residual is a share"):
            rollout(model, cache, **options)
    with refuse("head_fusion"):
        rollout(model, cache, head_fusion="median")
    with refuse("do not follow"):
        rollout(*run("vit")[::2], layers=[0, 2])
    with refuse("Roll out a vision tower"):
        rollout(*run("siglip")[::2], tower="vision", layers="pool")


def test_meaningless_contrasts_are_refused():
    maps = made(random_shares(2, 2, 1, 16))
    several = made(random_shares(3, 2, 2, 1, 16))
    with refuse("epsilon=-1"):
        attention_contrast(maps, maps, epsilon=-1)
    with refuse("There is no layer|hold layers"):
        attention_contrast(maps, maps, layers=[5])
    with refuse("There is no layer|hold layers"):
        attention_contrast(maps, maps, layers=[])
    with refuse("give 1 numbers"):
        attention_contrast(maps, maps, weights=[1, 2])
    with refuse("not all 0"):
        attention_contrast(several, maps, weights=[0, 0, 0])
    with refuse("3 steps and the generic query 2"):
        attention_contrast(several, made(random_shares(2, 2, 2, 1, 16)))
    with refuse("different image patches"):
        attention_contrast(maps, made(random_shares(2, 2, 1, 16), rows=3, columns=5))
    with refuse("1 rows and generic 2"):
        attention_contrast(maps, made(random_shares(2, 2, 2, 16)))
    with refuse("of vision"):
        attention_contrast(maps, dataclasses.replace(maps, tower="vision"))
    with refuse("plain attention_maps"):
        attention_contrast(maps, maps.head_contrast())
    with refuse("nothing to contrast"):
        attention_contrast(dataclasses.replace(maps, places=torch.full((1, 16, 4), -1)), maps)
    with refuse("result of attention_maps"):
        attention_contrast(attention_mass(*run("vit")[::2]), maps)  # type: ignore[arg-type]
    result = attention_contrast(maps, maps)
    for options in ({"top_percent": 0}, {"top_percent": 101}, {"count": 0}):
        with refuse("top_percent above 0"):
            result.regions(**options)
    with refuse("no example 4"):
        result.regions(example=4)

"""Attention by distance and by offset: loops over pairs, planted offsets, causal masks, and towers that have no patches."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout import distance_profile, position_pattern
from tests.readout.layouts import by_row
from tests.readout.test_attention import PATTERNS, planted, run, without_queries
from tests.zoo import case


@pytest.mark.parametrize("metric", ["chebyshev", "euclidean"])
@pytest.mark.parametrize(
    ("name", "tower"), [("vit-wide", "vision"), ("siglip2-vision", "vision"), ("llava-next-mistral", "language")]
)
def test_the_distance_profile_equals_a_loop_over_pairs(name: str, tower: str, metric: str):
    model, inputs, cache = run(name)
    tokens = model.tokens(inputs)[tower]
    result = distance_profile(model, cache, tower=tower, metric=metric)
    labels = result.axes["distance"]
    pattern = cache[tower, "pattern", 1].double()
    for row in range(tokens.n_rows):
        patches = tokens.positions("patch", row=row)
        known = torch.zeros(pattern.shape[1], len(labels), dtype=torch.float64)
        covered, mass = torch.zeros(2, pattern.shape[1], dtype=torch.float64)
        for query in patches:
            for key in range(tokens.n_positions):
                place = [(tokens.image_number[row, p], tokens.tile[row, p]) for p in (query, key)]
                share = pattern[row, :, query, key] / len(patches)
                kind = tokens.kind[row, key]
                if kind == "patch" and place[0] == place[1]:
                    steps = [
                        abs(int(axis[row, query] - axis[row, key])) for axis in (tokens.patch_row, tokens.patch_col)
                    ]
                    far = max(steps) if metric == "chebyshev" else math.hypot(*steps)
                    known[:, labels.index(round(far))] += share
                    covered, mass = covered + share * far, mass + share
                elif kind != "padding":
                    known[:, labels.index("other patch" if kind == "patch" else kind)] += share
        torch.testing.assert_close(by_row(result)[1, :, row].double(), known, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(result.mean_distance[1, :, row].double(), covered / mass, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_row(result).sum(-1), torch.ones(by_row(result).shape[:-1]))
    torch.testing.assert_close(by_row(result, "uniform").sum(-1), torch.ones(by_row(result, "uniform").shape[:-1]))


def test_uniform_attention_has_the_distance_of_uniform_attention():
    model = cv.HookedModel(without_queries(case("dinov2-registers")))
    inputs = case("dinov2-registers").inputs(model.module, batch=1)
    _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
    result = distance_profile(cache.model, cache)
    assert not by_row(result).requires_grad
    torch.testing.assert_close(by_row(result), by_row(result, "uniform")[:, None].expand_as(by_row(result)))
    steps = torch.arange(4.0)
    gaps = (steps[:, None] - steps).abs()
    pairs = torch.maximum(gaps[:, None, :, None], gaps[None, :, None, :])
    assert float(result.uniform_distance[0, 0]) == pytest.approx(float(pairs.mean()), abs=1e-5)
    assert result.axes["distance"] == [0, 1, 2, 3, "cls", "register"]
    torch.testing.assert_close(by_row(result, "uniform")[0, 0, -2:], torch.tensor([1 / 20, 3 / 20]))


def test_a_profile_without_attention_to_patches_has_no_distance():
    _, cache = planted("vit", "vision", lambda pattern: torch.eye(17)[0])
    with pytest.warns(UserWarning, match="no attention to patches"):
        result = distance_profile(cache.model, cache)
    assert torch.isnan(result.mean_distance).all()
    assert torch.equal(by_row(result)[..., -1], torch.ones(by_row(result).shape[:-1]))


def grid_pattern(of_offset: Tensor) -> Tensor:
    """A pattern of a class token and 4 × 4 patches, whose attention is a function of the offset alone; the class token gets the rest."""
    row, column = np.divmod(np.arange(16), 4)
    values = of_offset[row[None] - row[:, None] + 3, column[None] - column[:, None] + 3]
    pattern = torch.zeros(17, 17)
    pattern[1:, 1:] = values
    pattern[:, 0] = 1 - pattern[:, 1:].sum(-1)
    return pattern


def test_a_head_that_looks_at_offsets_is_explained_by_them():
    of_offset = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) / 50
    _, cache = planted("vit", "vision", lambda pattern: grid_pattern(of_offset))
    result = position_pattern(cache.model, cache)
    assert result.axes["drow"] == result.axes["dcol"] == [-3, -2, -1, 0, 1, 2, 3]
    torch.testing.assert_close(by_row(result)[0, 0], of_offset, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(result.explained, torch.ones(3, 4), atol=1e-5, rtol=0)
    # Two rows, and as many queries as patches whose neighbour at that offset exists.
    assert result.counts[0].tolist() == [[2 * (4 - abs(r)) * (4 - abs(c)) for c in range(-3, 4)] for r in range(-3, 4)]
    assert result.chance[0] == pytest.approx(48 / 511)


def test_attention_without_regard_to_offsets_is_explained_by_chance_alone():
    generator = torch.Generator().manual_seed(1)

    def scattered(pattern: Tensor) -> Tensor:
        return torch.rand(pattern.shape, generator=generator) / 17

    result = position_pattern(*planted("vit", "vision", scattered, batch=6))
    assert float(result.explained.mean()) == pytest.approx(float(result.chance.mean()), abs=0.01)
    with pytest.warns(UserWarning, match="the same between all patches"):
        constant = position_pattern(*planted("vit", "vision", lambda pattern: torch.full((17,), 1 / 17)))
    assert torch.isnan(constant.explained).all()


def test_offsets_hidden_by_a_causal_mask_are_not_counted():
    _, _, cache = run("llava-clip-llama", batch=1)
    result = position_pattern(cache.model, cache, tower="language")
    later = by_row(result)[0, 0][[3, 3, 4, 4, 4], [3, 4, 2, 3, 4]]
    assert result.counts[0][2].tolist() == [3, 6, 9, 0, 0]
    assert torch.isnan(later).all()


def test_distance_needs_patches():
    _, _, cache = run("clip")
    with pytest.raises(InputError, match="is a patch; read a vision tower"):
        distance_profile(cache.model, cache, tower="text")
    with pytest.raises(InputError, match="is a patch; read a vision tower"):
        position_pattern(*run("pi0")[::2], tower="action")
    with pytest.raises(InputError, match="Only patches have a distance"):
        distance_profile(cache.model, cache, tower="vision", queries="cls")
    with pytest.raises(InputError, match="Unknown metric"):
        distance_profile(cache.model, cache, tower="vision", metric="cosine")

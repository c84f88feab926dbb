"""Faithful and other subspaces of the trained models on held-out pairs, and the search for an illusory one, place by place."""

from __future__ import annotations

from typing import Any

import pytest

import circuitvision as cv
from circuitvision.subspaces import DAS, illusion_report, subspace_sweep
from circuitvision.subspaces import illusion as il

pytestmark = pytest.mark.slow


def drawn(name: str, count: int) -> Any:
    with cv.progress.verbosity("quiet"):
        model = cv.organisms.load(name)
        return model, cv.organisms.pairs(name, count, seed=3).answered(model)


@pytest.mark.parametrize(
    ("name", "tower", "position", "most"),
    [("scenes-vit", "vision", 0, 0.15), ("scenes-llava", "language", "last", 0.1)],
)
def test_no_mlp_of_the_larger_models_holds_an_illusion(name: str, tower: str, position: Any, most: float) -> None:
    """The search: MLPs of all layers. Where a subspace does more than the whole of its MLP, it is by less than F1 asks."""
    model, pairs = drawn(name, 120)
    search = subspace_sweep(
        model,
        pairs,
        f"{tower}.blocks.*.mlp.hook_post",
        4,
        positions=position,
        held_out=0.5,
        epochs=10,
        rate=0.05,
        progress=False,
    )
    assert all(beyond < most for _, beyond in search.exceeds())


def test_a_subspace_of_the_language_stream_is_faithful_to_the_heads_that_read_it() -> None:
    """All heads of the layer read all of the subspace, so its read part is the whole; one head reads a part, and a part of the effect with it."""
    model, pairs = drawn("scenes-llava", 80)
    site = "language.blocks.2.hook_resid_pre"
    trained = DAS(8, site, positions="last").fit(model, pairs, epochs=20, rate=0.05, held_out=0.5, progress=False)
    reports = {
        count: illusion_report(
            model, pairs, site, trained, positions="last", readers=[f"language L2H{head}" for head in range(count)], n_random=1,
            controls=False, units=count > 1, progress=False,
        )
        for count in (model.language.cfg.n_heads, 1)
    }  # fmt: skip
    every, one = reports.values()
    assert every.label == il.FAITHFUL
    assert every.numbers["row norm"] == pytest.approx(1.0)
    assert every.of(il.FULL) > every.of(il.SUBSPACE) > 0.5
    assert every.flags["F9"] is False
    assert one.flags["F2"] is True
    assert one.label == il.UNDETERMINED
    assert one.of(il.NULL) > 0.1

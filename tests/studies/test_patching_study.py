"""A modest study, as somebody would write it: two models, two kinds of sites, three metrics, a folder to continue from, a frame."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest
import torch

import circuitvision as cv
from circuitvision.metric_set import MetricSet

SITES = {"resid": ("hook_resid_pre", ("layer", "position")), "heads": ("attn.hook_z", ("layer", "head"))}


def study(models: dict[str, cv.HookedModel], pairs: cv.data.Pairs, folder: Path) -> pd.DataFrame:
    frames = []
    for name, model in models.items():
        for kind, (site, axes) in SITES.items():
            found = cv.patching.activation_patch(
                model, pairs, ["logit_diff", "prob", "rank"], sites=f"language.blocks.*.{site}", axes=axes,
                save_to=folder / name / kind, resume=True, example_batch=2, progress=False,
            )  # fmt: skip
            frames.append(found.to_frame().assign(model=name, kind=kind))
    return pd.concat(frames)


def test_a_study_of_pairs_is_ten_lines_and_continues_where_it_was_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained, shifted = cv.organisms.load("shapes-llava"), cv.organisms.load("shapes-llava")
    with torch.no_grad():
        for number, parameter in enumerate(shifted.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(0.01 * noise)
    pairs = cv.data.question_pairs(3, 0)
    calls, original = [0], MetricSet.__call__

    def ended(self: MetricSet, *args: object) -> torch.Tensor:
        calls[0] += 1
        if calls[0] == 150:
            raise KeyboardInterrupt
        return original(self, *args)

    monkeypatch.setattr(MetricSet, "__call__", ended)
    with pytest.raises(KeyboardInterrupt):
        study({"trained": trained, "shifted": shifted}, pairs, tmp_path / "study")
    kept = len(list((tmp_path / "study").rglob("part-*")))
    assert kept > 0
    frame = study({"trained": trained, "shifted": shifted}, pairs, tmp_path / "study")
    length = trained.tokens(next(pairs.batches(trained)).inputs)["language"].n_positions
    layers, heads = trained.language.cfg.n_layers, trained.language.cfg.n_heads
    assert len(frame) == 2 * 3 * 3 * layers * (length + heads)
    assert set(frame["metric"]) == {"logit_diff", "prob", "rank"}
    again = study({"trained": trained, "shifted": shifted}, pairs, tmp_path / "study")
    pd.testing.assert_frame_equal(frame, again)

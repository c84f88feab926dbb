"""A label that is not on an axis is an error with the nearest labels, never a place."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.lens.result import LensResult
from circuitvision.results import Result
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model


def lens(targets: Any, name: str = "vit") -> tuple[LensResult, torch.Tensor]:
    module = shared_model(name)
    model, inputs = cv.HookedModel(module), case(name).inputs(module, batch=2)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
        named = {target: target for target in targets}
        return cv.readout.logit_lens(model, cache, targets=named), logits


def check_contrast() -> None:
    found, logits = lens([2, 4])
    torch.testing.assert_close(by_row(found.contrast(2, 4), "pooled")[-1, :, 0], logits[:, 2] - logits[:, 4])
    torch.testing.assert_close(by_row(found.contrast(np.int64(4), 2), "pooled")[-1, :, 0], logits[:, 4] - logits[:, 2])
    for absent in (1, 0, -1, True, False, 7, "2"):
        with pytest.raises(InputError, match="There is no target"):
            found.contrast(2, absent)
        with pytest.raises(InputError, match="There is no target"):
            found.patch_grid(0, target=absent)


def test_a_contrast_with_a_class_that_was_not_read() -> None:
    check_contrast()


def test_taking_an_absent_label_for_a_place_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_place(self: Result, axis: str, label: Any) -> int:
        labels = self.axes[axis]
        return labels.index(label) if label in labels else int(label)

    monkeypatch.setattr(Result, "index_of", by_place)
    with pytest.raises(pytest.fail.Exception):
        check_contrast()


def test_mixed_targets_are_labels_and_words_have_places() -> None:
    module = shared_model("vit")
    words = [str(module.config.id2label[number]) for number in (3, 1)]
    found, logits = lens(words)
    for one, two in ((words[0], words[1]), (0, 1)):
        torch.testing.assert_close(by_row(found.contrast(one, two), "pooled")[-1, :, 0], logits[:, 3] - logits[:, 1])
    with pytest.raises(InputError, match="There is no target 2"):
        found.contrast(0, 2)
    with pytest.raises(InputError, match="There is no target True"):
        found.contrast(True, words[0])
    mixed, _ = lens([words[0], 4])
    with pytest.raises(InputError, match="There is no target 1"):
        mixed.contrast(words[0], 1)


def test_rows_are_counted_and_layers_go_by_their_labels() -> None:
    found, _ = lens([2, 4])
    one = found.take(1)
    assert torch.equal(by_row(one.take(0)), by_row(one))
    assert one.axes["example"] == [1]
    assert torch.equal(one.patch_grid(0), found.patch_grid(0, example=1))
    for call in (
        lambda: one.take(1),
        lambda: one.patch_grid(0, example=9),
        lambda: found.index(-1),
        lambda: found.take(-1),
    ):
        with pytest.raises(InputError, match="There is no"):
            call()
    assert one.plot() is not None
    with pytest.raises(InputError, match="There is no example 9"):
        one.plot(example=9)


def test_summaries_name_the_nearest_labels() -> None:
    module = shared_model("vit")
    model, inputs = cv.HookedModel(module), case("vit").inputs(module, batch=2)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        maps = cv.readout.attention_maps(model, cache, layers=[1])
        shares = cv.readout.direct_attribution(model, cache, 3)
    with pytest.raises(InputError, match="There is no layer 0 in this AttentionMaps; there are 1"):
        maps.grid(0, 0)
    with pytest.raises(InputError, match="There is no head True"):
        maps.grid(1, True)
    with pytest.raises(InputError, match=r"nearest of .*'vision L1H0'"):
        shares["L1HO"]
    many = Result(torch.zeros(20), {"layer": list(range(10, 30))})
    with pytest.raises(InputError, match="There is no layer 3 in this Result; nearest of 20: 10, 11, 12, 13, 14"):
        many.index_of("layer", 3)
    with pytest.raises(InputError, match="has no axis 'head'; its axes are layer"):
        many.index_of("head", 3)
    assert many.index_of("layer", np.int64(12)) == 2
    truths = Result(torch.zeros(2), {"right": [False, True]})
    assert truths.index_of("right", True) == 1
    with pytest.raises(InputError, match="There is no right 1"):
        truths.index_of("right", 1)

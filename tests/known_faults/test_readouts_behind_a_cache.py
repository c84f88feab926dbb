"""Read-outs of a run that continues a cache count its positions as edits do, from the first one that the cache holds.

The numbers are those of the bare module's second turn; the last word of a row is its last real one.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import readout
from circuitvision.errors import InputError
from tests.edits.common import fresh, inputs_of, near, wrap
from tests.readout.layouts import by_row

NEW, WIDE = 4, torch.float64


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-onevision"])
def test_positions_of_a_second_turn(name: str) -> None:
    model = wrap(fresh(name, WIDE))
    first = inputs_of(name, model, padding="left")
    ids = torch.randint(5, 30, (2, NEW), generator=torch.Generator().manual_seed(3))
    new = torch.ones_like(ids)
    new[1, 2:] = 0
    with torch.no_grad():
        past = model.module(**first, use_cache=True).past_key_values
    width = first["input_ids"].shape[1]

    def second() -> dict[str, Any]:
        mask = torch.cat([first["attention_mask"], new], dim=1)
        return {"input_ids": ids, "attention_mask": mask, "past_key_values": copy.deepcopy(past)}

    with torch.no_grad():
        logits = model.module(**second()).logits
    wanted = logits[..., 3] - logits[..., 4]
    asked: tuple[tuple[Any, list[int]], ...] = (
        ("last", [3, 1]),
        (width + 1, [1, 1]),
        (cv.regions.at([width, width + 1]), [0, 1]),
        (-3, [1, 1]),
    )
    for position, at in asked:
        found = readout.direct_attribution(model, second(), (3, 4), position=position)
        near(found.total, wanted[[0, 1], at], 1e-6)
        near(by_row(found).sum(0), found.total, 1e-6)
    near(
        readout.direct_attribution(model, second(), (3, 4), position="all").total,
        torch.stack([wanted[0].mean(), wanted[1, :2].mean()]),
        1e-6,
    )
    for outside in (0, width - 1, width + NEW):
        with pytest.raises(InputError, match="behind those of the cache"):
            readout.direct_attribution(model, second(), (3, 4), position=outside)
    lens = readout.logit_lens(model, second(), targets={3: 3, 4: 4})
    assert lens.axes["position"] == list(range(width, width + NEW))
    assert lens.kinds == [["text"] * 4, ["text", "text", "padding", "padding"]]
    near(by_row(lens)[-1, ..., 0], logits[..., 3], 1e-6)

"""Averages and metrics where a site, or the output, holds some positions only: they count positions of the tower, on both sides.

A head reads one position in ``generate`` and as many as ``logits_to_keep`` says in a run; a run behind a cache computes what follows it. The mean and
the draw for a position are those of that position, however many the data set's own run held. Compared with plain hooks on the bare module.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits, metrics, regions
from circuitvision.errors import InputError
from tests.edits.common import fresh, near, seen, wrap

READOUT, POST = "language.hook_readout", "language.blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model() -> cv.HookedModel:
    made = wrap(fresh("llava-clip-llama"))
    made.module.generation_config.eos_token_id = None
    return made


def words(length: int, rows: int, seed: int) -> dict[str, Tensor]:
    ids = torch.randint(5, 30, (rows, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


RUN, DATA = words(7, 3, 1), words(9, 4, 5)


def read(module: nn.Module, part: nn.Module, inputs: dict[str, Any], phase: str) -> Tensor:
    with torch.no_grad(), seen(part, phase) as values:
        module(**inputs)
    return values[0]


def put(module: Any, part: nn.Module, inputs: dict[str, Any], value: Callable[[Tensor], Tensor], phase: str) -> Tensor:
    """The bare module's output with a value of the part replaced, by what it reads ("pre") or returns."""
    if phase == "pre":
        handle = part.register_forward_pre_hook(lambda m, args: (value(args[0]), *args[1:]))
    else:
        handle = part.register_forward_hook(lambda m, args, out: value(out))
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        handle.remove()


def first_logits(model: cv.HookedModel, edit: edits.Edit) -> Tensor:
    made = model.generate(
        RUN, edits=[edit], max_new_tokens=2, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    return made.logits[0]


@pytest.mark.parametrize("positions", [None, "last", 6])
def test_means_and_draws_at_a_head_that_generates(model: cv.HookedModel, positions: Any) -> None:
    head = model.module.lm_head
    own, data = read(model.module, head, RUN, "pre"), read(model.module, head, DATA, "pre")
    said: dict[str, Any] = {"positions": positions, "steps": "prefill"}
    for dataset, mean in ((None, own[:, 6].mean(0)), (DATA, data[:, 6].mean(0))):
        with torch.no_grad():
            wanted = head(mean)
        near(first_logits(model, edits.ablate(READOUT, "mean", dataset=dataset, **said)), wanted.expand(3, -1), 1e-5)
    drawn = first_logits(model, edits.ablate(READOUT, "resample", **said))
    with torch.no_grad():
        others = head(own[:, 6])
    for row in range(3):
        assert min(float((drawn[row] - others[other]).abs().max()) for other in range(3) if other != row) < 1e-5


@pytest.mark.parametrize(("kept", "held"), [(2, [5, 6]), (torch.tensor([1, 4]), [1, 4])], ids=["last two", "two"])
def test_means_of_a_data_set_whose_head_reads_all(model: cv.HookedModel, kept: Any, held: list[int]) -> None:
    head, inputs = model.module.lm_head, {**RUN, "logits_to_keep": kept}
    data = read(model.module, head, DATA, "pre")
    wanted = put(model.module, head, inputs, lambda x: data[:, held].mean(0).expand_as(x), "pre")
    near(model.run(inputs, [edits.ablate(READOUT, "mean", dataset=DATA)]), wanted, 1e-5)
    one = model.run(inputs, [edits.ablate(READOUT, "mean", dataset=DATA, positions=held[1])])
    near(one[:, 1], wanted[:, 1], 1e-5)
    with pytest.raises(InputError, match="has anything at position"):
        model.run(inputs, [edits.ablate(READOUT, "mean", dataset={**DATA, "logits_to_keep": 1})])


def test_means_behind_a_cache(model: cv.HookedModel) -> None:
    block, first = model.module.model.language_model.layers[1], words(5, 3, 8)
    with torch.no_grad():
        past = model.module(**first, use_cache=True).past_key_values
    new = {"input_ids": words(4, 3, 9)["input_ids"], "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    data = read(model.module, block, DATA, "post")
    wanted = put(
        model.module,
        block,
        {**new, "past_key_values": copy.deepcopy(past)},
        lambda x: data[:, 5:9].mean(0).expand_as(x),
        "post",
    )
    inputs = {**new, "past_key_values": copy.deepcopy(past)}
    near(model.run(inputs, [edits.ablate(POST, "mean", dataset=DATA)]), wanted, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kept", [4, torch.tensor([4, 5, 7])], ids=["last four", "three"])
def test_metrics_of_embedded_prompts_count_the_prompts_positions(model: cv.HookedModel, kept: Any, side: str) -> None:
    whole = words(8, 3, 2)
    for row, length in enumerate((8, 5, 6)):
        gone = slice(length, None) if side == "right" else slice(None, 8 - length)
        whole["attention_mask"][row, gone] = 0
    last = [7, 4, 5] if side == "right" else [7, 7, 7]
    with torch.no_grad():
        full = model.module(**whole).logits
        embeds = model.module.get_input_embeddings()(whole["input_ids"])
    inputs = {"inputs_embeds": embeds, "attention_mask": whole["attention_mask"], "logits_to_keep": kept}
    for position, at in (("last", last), (5, [5] * 3), (-1, [7] * 3), (regions.at(last), last)):
        near(metrics.at_position(model(inputs), position, inputs), full[range(3), at], 1e-5)
    with pytest.raises(InputError, match="logits_to_keep left"):
        metrics.at_position(model(inputs), 2, inputs)


def test_metrics_behind_a_cache_count_from_its_first_position(model: cv.HookedModel) -> None:
    first, ids = words(5, 3, 8), words(4, 3, 9)["input_ids"]
    with torch.no_grad():
        past = model.module(**first, use_cache=True).past_key_values
        whole = model.module(input_ids=torch.cat([first["input_ids"], ids], 1)).logits
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones(3, 9, dtype=torch.long)}
    inputs["past_key_values"] = copy.deepcopy(past)
    out = model(inputs)
    for position, at in (("last", 8), (6, 6), (-2, 7)):
        near(metrics.at_position(out, position, inputs), whole[:, at], 1e-5)
    with pytest.raises(InputError, match="left"):
        metrics.at_position(out, 2, inputs)
    unmasked = {"input_ids": ids, "past_key_values": copy.deepcopy(past)}
    out = model(unmasked)
    near(metrics.at_position(out, "last", unmasked), whole[:, 8], 1e-5)
    with pytest.raises(InputError, match="attention_mask"):
        metrics.at_position(out, 2, unmasked)

"""Tokens that stand for inputs: any choice of rows runs the examples it names, images and all."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuitvision import interop
from circuitvision.errors import InputError
from tests.interop.common import wrapped
from tests.zoo import CASES, Case, parametrize


@parametrize()
def test_rows_can_be_reordered_and_repeated(case: Case) -> None:
    model, inputs = wrapped(case.name, batch=3)
    for tower in case.towers:
        view = interop.transformer_lens(model, tower=tower)
        tokens = view.to_tokens(inputs)
        order = [2, 0, 2]
        with torch.no_grad():
            whole, chosen = view(tokens), view(tokens[order])
        axis = 1 if tower == "text" else 0
        assert chosen.shape[axis] == 3
        assert torch.allclose(chosen, whole.index_select(axis, torch.tensor(order)), atol=1e-4)
        assert not torch.allclose(chosen, whole, atol=1e-3) if axis == 0 else True


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next-mistral", "llava-onevision"])
def test_examples_with_several_images_keep_them(name: str) -> None:
    model, _ = wrapped(name, warm=False)
    inputs = CASES[name].inputs(model.module, batch=3, images_per_prompt=2)
    view = interop.transformer_lens(model, tower="vision")
    tokens = view.to_tokens(inputs)
    assert tokens.shape[0] == 3
    with torch.no_grad():
        whole, chosen = view(tokens), view(tokens[[1, 0]])
    assert torch.allclose(chosen, whole[[1, 0]], atol=1e-4)


def test_batches_given_apart_run_together() -> None:
    model, inputs = wrapped("llava-clip-llama", batch=2)
    other = CASES["llava-clip-llama"].inputs(model.module, batch=2, seed=1)
    view = interop.transformer_lens(model, tower="language")
    one, two = view.to_tokens(inputs), view.to_tokens(other)
    with torch.no_grad():
        mixed = view(torch.cat([two[1:], one, two[:1]]))
        apart = [view(one), view(two)]
    assert torch.allclose(mixed, torch.cat([apart[1][1:], apart[0], apart[1][:1]]), atol=1e-4)


def test_the_same_inputs_get_the_same_tokens() -> None:
    model, inputs = wrapped("vit")
    view = interop.transformer_lens(model)
    assert torch.equal(view.to_tokens(inputs), view.to_tokens(dict(inputs)))
    assert len(view.examples.batches) == 1
    assert torch.equal(view.to_tokens(inputs["pixel_values"]), view.to_tokens({"pixel_values": inputs["pixel_values"]}))


def test_what_are_not_tokens_is_refused() -> None:
    model, inputs = wrapped("llava-clip-llama")
    view = interop.transformer_lens(model, tower="language")
    tokens = view.to_tokens(inputs)
    wrong: list[Any] = [
        inputs["input_ids"],
        inputs["pixel_values"],
        tokens.float(),
        tokens + 1000,
        tokens[0],
        "red",
        tokens[:0],
    ]
    for given in wrong:
        with pytest.raises(InputError, match="not tokens of this view"):
            view(given)
    with pytest.raises(InputError, match="positions cannot be cut"):
        view(tokens[:, :-1])
    with pytest.raises(InputError, match="not all this model reads"):
        view.to_tokens(inputs["input_ids"])
    with pytest.raises(InputError, match="mapping"):
        view.to_tokens("what color")
    vision = interop.transformer_lens(model, tower="vision")
    with pytest.raises(InputError, match="do not run the vision tower"):
        vision.to_tokens({"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]})
    with torch.no_grad():
        assert torch.equal(view(inputs), model(inputs)), "a mapping passes through"


def test_batches_of_different_shapes_cannot_be_joined() -> None:
    model, inputs = wrapped("pi0")
    view = interop.transformer_lens(model, tower="action")
    other = CASES["pi0"].inputs(model.module, batch=2, seed=1)
    longer = {**other, "input_ids": torch.nn.functional.pad(other["input_ids"], (0, 1), value=1)}
    longer["attention_mask"] = torch.nn.functional.pad(other["attention_mask"], (0, 1), value=1)
    one, two = view.to_tokens(inputs), view.to_tokens(longer)
    with pytest.raises(InputError, match="one batch of all examples"):
        view(torch.cat([one, two]))

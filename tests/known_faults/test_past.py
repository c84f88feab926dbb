"""Inputs that continue a cache of keys and values: they run as in the bare model, positions count from the cache's first, edits equal plain hooks."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model import axes
from tests.edits.common import apart, block, fresh, inputs_of, near, same, torch_hooks, wrap
from tests.zoo import cases

NAMES = [
    "llava-clip-llama",
    "llava-clip-mistral-sliding",
    "llava-siglip-qwen2",
    "llava-next-mistral",
    "llava-onevision",
]
NEW = 3


def turns(name: str, padding: str = "left") -> tuple[cv.HookedModel, dict[str, Any], Any, dict[str, Any]]:
    """A model, the inputs of a first turn, the cache it leaves, and the inputs of a second turn (without the cache)."""
    model = wrap(fresh(name))
    model.module.generation_config.eos_token_id = None
    first = inputs_of(name, model, padding=padding)
    with torch.no_grad():
        past = model.module(**first, use_cache=True).past_key_values
    ids = torch.randint(5, 30, (2, NEW), generator=torch.Generator().manual_seed(3))
    mask = torch.cat([first["attention_mask"], torch.ones_like(ids)], dim=1)
    return model, first, past, {"input_ids": ids, "attention_mask": mask}


def second(past: Any, new: dict[str, Any]) -> dict[str, Any]:
    """Inputs of the second turn with a cache of their own: a run makes it longer."""
    return {**new, "past_key_values": copy.deepcopy(past)}


def bare(model: cv.HookedModel, past: Any, new: dict[str, Any]) -> Tensor:
    with torch.no_grad():
        return model.module(**second(past, new)).logits


@pytest.mark.parametrize("name", NAMES)
def test_a_second_turn_runs_as_in_the_bare_model(name: str) -> None:
    model, first, past, new = turns(name)
    wanted = bare(model, past, new)
    with torch.no_grad():
        same(model(second(past, new)), wanted)
        same(
            model(second(past, {"input_ids": new["input_ids"]})),
            model.module(**second(past, {"input_ids": new["input_ids"]})).logits,
        )
        out, cache = model.run_with_cache(second(past, new), names_filter="language.blocks.*.hook_resid_post")
    same(out, wanted)
    assert cache["language.blocks.0.hook_resid_post"].shape[1] == NEW
    full = torch.cat([first["input_ids"], new["input_ids"]], dim=1)
    said: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    for given in ({"input_ids": full, "attention_mask": new["attention_mask"]}, new, {"input_ids": full}):
        try:
            made = model.module.generate(**second(past, given), **said)
        except Exception as error:
            with pytest.raises(type(error)):
                model.generate(second(past, given), **said)
        else:
            same(model.generate(second(past, given), **said), made)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_positions_count_from_the_first_of_the_cache(padding: str) -> None:
    model, first, past, new = turns("llava-clip-llama", padding)
    width = first["input_ids"].shape[1]
    tokens = model.tokens(second(past, new))["language"]
    assert tokens.n_positions == width + NEW
    hidden = ~first["attention_mask"].bool().numpy()
    assert (tokens.kind[:, :width][hidden] == "padding").all()
    assert (tokens.kind[:, :width][~hidden] == "unknown").all()
    assert (tokens.kind[:, width:] == "text").all()
    assert tokens.last() == [width + NEW - 1] * 2
    model.tokens({**new, "input_ids": torch.cat([first["input_ids"], new["input_ids"]], 1), "past_key_values": past})
    assert model.positions("language.blocks.0.attn.hook_z", second(past, new)) == list(range(width, width + NEW))


WAYS: dict[str, Any] = {
    "all": (None, [0, 1, 2]),
    "number": (lambda n: n + 1, [1]),
    "negative": (lambda n: -3, [0]),
    "numbers": (lambda n: [n + 2, n], [0, 2]),
    "slice": (lambda n: slice(n + 1, None), [1, 2]),
    "slice over both": (lambda n: slice(3, n + 1), [0]),
    "last": (lambda n: "last", [2]),
    "mask": (lambda n: torch.arange(n + NEW) > n, [1, 2]),
    "masks": (lambda n: (torch.arange(n + NEW) > n).expand(2, -1), [1, 2]),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("padding", ["left", "right"])
def test_edits_of_new_positions(way: str, padding: str) -> None:
    model, first, past, new = turns("llava-clip-llama", padding)
    said, entries = WAYS[way]
    positions = said(first["input_ids"].shape[1]) if said else None

    def scaled(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, entries] *= -1.5
        return value

    with torch_hooks((block(model, "language", 0), "post", scaled)):
        wanted = bare(model, past, new)
    with torch.no_grad():
        edit = edits.scale("language.blocks.0.hook_resid_post", -1.5, positions=positions)
        same(model.run(second(past, new), [edit]), wanted)
    apart(wanted, bare(model, past, new))


def test_selections_sources_and_means() -> None:
    model, first, past, new = turns("llava-clip-llama")
    site = "language.blocks.0.hook_resid_post"
    given = second(past, new)
    tokens = model.tokens(given)["language"]
    with torch.no_grad():
        _, cache = model.run_with_cache(second(past, new), names_filter=site)
    values = cache[site]
    flipped = values.flip(0)
    where = tokens.select("text").last()
    width = first["input_ids"].shape[1]
    for edit, new_value in (
        (edits.replace(site, flipped, positions=where), flipped[:, 2]),
        (edits.replace(site, flipped, positions=width + 2), flipped[:, 2]),
        (edits.ablate(site, "mean", positions=width + 2), values[:, 2].mean(0).expand(2, -1)),
    ):

        def written(value: Tensor, new_value: Tensor = new_value) -> Tensor:
            value = value.clone()
            value[:, 2] = new_value
            return value

        with torch_hooks((block(model, "language", 0), "post", written)):
            wanted = bare(model, past, new)
        with torch.no_grad():
            near(model.run(second(past, new), [edit]), wanted, 1e-6)


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-clip-mistral-sliding"])
def test_cached_positions_can_be_keys(name: str) -> None:
    """Blocking a key in the second turn is a whole run in which the new queries alone cannot see it."""
    model, first, past, new = turns(name)
    width = first["input_ids"].shape[1]
    whole = {
        **first,
        "input_ids": torch.cat([first["input_ids"], new["input_ids"]], 1),
        "attention_mask": new["attention_mask"],
    }
    late = [width, width + 1, width + 2]
    keys = [width - 2, width - 1, width]
    with torch.no_grad():
        wanted = model.run(whole, [edits.block_attention("language", late, keys, renormalise=False)])[:, width:]
        got = model.run(second(past, new), [edits.block_attention("language", None, keys, renormalise=False)])
        near(got, wanted, 1e-4)
        apart(got, bare(model, past, new))
        got = model.run(second(past, new), [edits.block_attention("language", width + 1, keys, renormalise=False)])
        wanted = model.run(whole, [edits.block_attention("language", width + 1, keys, renormalise=False)])[:, width:]
        near(got, wanted, 1e-4)


def test_edits_of_a_generation_that_continues_a_cache() -> None:
    model, first, past, new = turns("llava-clip-llama")
    width = first["input_ids"].shape[1]
    full = {"input_ids": torch.cat([first["input_ids"], new["input_ids"]], 1), "attention_mask": new["attention_mask"]}
    said: dict[str, Any] = {
        "max_new_tokens": 4,
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    site = "language.blocks.0.hook_resid_post"
    passes: list[int] = []

    def scaled(value: Tensor) -> Tensor:
        value, step = value.clone(), len(passes)
        passes.append(step)
        if step == 0:
            value[:, 1] *= -1.5
        elif step == 2:
            value *= -1.5
        return value

    with torch_hooks((block(model, "language", 0), "post", scaled)):
        wanted = torch.stack(model.module.generate(**second(past, full), **said).logits, 1)
    edit = edits.scale(site, -1.5, positions=[width + 1, width + NEW + 1])
    for given in (full, new, {"input_ids": full["input_ids"]}):
        out: Any = model.generate(second(past, given), edits=[edit], **said)
        near(torch.stack(out.logits, 1), wanted, 1e-5)


def test_what_the_cache_holds_cannot_be_edited() -> None:
    model, first, past, new = turns("llava-clip-llama")
    width = first["input_ids"].shape[1]
    site = "language.blocks.0.hook_resid_post"
    with pytest.raises(
        InputError,
        match=f"position 2 of the language tower is not at {site}, which holds positions {width}…{width + 2}",
    ):
        model.run(second(past, new), [edits.ablate(site, positions=2)])
    with pytest.raises(InputError, match="past_key_values"):
        model.sweep(second(past, new), [edits.ablate(site)], lambda out: out[:, -1, 0])
    with pytest.raises(InputError, match="it covers both"):
        model(second(past, {**new, "attention_mask": torch.ones(2, width + NEW + 2, dtype=torch.long)}))
    with pytest.raises(InputError, match="past_key_values"):
        model({**new, "past_key_values": object()})


def test_an_action_experts_prefix_in_a_cache() -> None:
    model = wrap(fresh("pi0"))
    inputs = inputs_of("pi0", model)
    with torch.no_grad():
        wanted = model.module(**inputs)
        past = wanted.past_key_values
        past.crop(inputs["input_ids"].shape[1] - past.get_seq_length())
        given = {
            name: value
            for name, value in inputs.items()
            if name not in ("pixel_values", "pixel_attention_mask", "input_ids")
        }
        again = {**given, "past_key_values": past}
        same(
            model({**again, "past_key_values": copy.deepcopy(past)}),
            model.module(**{**again, "past_key_values": copy.deepcopy(past)}).logits,
        )
        with pytest.raises(InputError, match="whole prefix"):
            model.run(again, [edits.ablate("action.blocks.0.attn.hook_z", positions=1)])


# ---- boolean masks of four axes


def four_axes(mask: Tensor) -> Tensor:
    length = mask.shape[1]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & mask.bool()[:, None]
    seen |= torch.eye(length, dtype=torch.bool)
    return seen[:, None]


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-siglip-qwen2"])
def test_a_boolean_mask_means_the_same_in_every_run(name: str) -> None:
    model = wrap(fresh(name))
    inputs = inputs_of(name, model, padding="left")
    given = {**inputs, "attention_mask": four_axes(inputs["attention_mask"])}
    with torch.no_grad():
        wanted = model.module(**given).logits
        same(model(given), wanted)
        out, cache = model.run_with_cache(given, names_filter="language.blocks.0.attn.hook_pattern")
        near(out, wanted, 1e-5)
        assert not bool(
            cache["language.blocks.0.attn.hook_pattern"][~given["attention_mask"].expand(-1, 4, -1, -1)].any()
        )
        keys = [edits.block_attention("language", None, 2, renormalise=False)]
        near(
            model.run(given, keys),
            model.run({**given, "attention_mask": additive(given["attention_mask"])}, keys),
            1e-5,
        )


def additive(mask: Tensor) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


def test_a_boolean_mask_that_eager_attention_would_add_is_refused() -> None:
    model = wrap(fresh("llava-clip-llama", attention="eager"))
    inputs = inputs_of("llava-clip-llama", model)
    with pytest.raises(InputError, match="boolean attention_mask of four axes"):
        model({**inputs, "attention_mask": four_axes(inputs["attention_mask"])})


@pytest.mark.parametrize("fault", ["edits at the first of the run", "the cache is not counted"])
def test_a_mutant_is_noticed(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "the cache is not counted":
        monkeypatch.setattr(axes, "past_length", lambda inputs: 0)
    else:
        monkeypatch.setattr(axes.Axis, "columns", lambda self, first, length, prompt: None)
    with pytest.raises((AssertionError, InputError, IndexError)):
        test_edits_of_new_positions("number", "left")


def test_every_model_that_generates_is_tried_with_a_second_turn() -> None:
    assert set(NAMES) <= {case.name for case in cases("generates")}

"""Keys of a tower that sees another tower's cached positions before its own: named by tower, and equal to attention by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.edits.attention import AttentionEdit
from tests.edits.common import apart, fresh, inputs_of, near, wrap
from tests.known_faults.raw_attention import hidden, scores_by_hand
from tests.parts import module_of

CHUNK = 5
"""A state and four actions."""


def pi0(padding: str | None = None) -> tuple[cv.HookedModel, dict[str, Any], Any]:
    model = wrap(fresh("pi0"))
    inputs = inputs_of("pi0", model, padding=padding) if padding else inputs_of("pi0", model)
    return model, inputs, model.tokens(inputs)


def by_hand(
    model: cv.HookedModel,
    where: Tensor,
    run: Callable[[nn.Module], Tensor],
    change: Any = hidden,
    of_pattern: bool = False,
) -> Tensor:
    """A run whose action expert has its scores changed at ``where`` ``[row, query, key]``, keys of the prefix first."""
    experts = {id(module_of(block, "attn")) for block in model.towers["action"].blocks}
    attention = type(module_of(model.towers["action"].blocks[0], "attn"))

    def fn(module: nn.Module, scores: Tensor) -> Tensor:
        return change(scores, where[:, None]) if id(module) in experts else scores

    with torch.no_grad(), scores_by_hand(model.module, attention, fn, of_pattern):
        return run(model.module)


def entries(tokens: Any, queries: Tensor, own: Tensor, prefix: Tensor) -> Tensor:
    """``[row, query, key]`` from bools over queries ``[CHUNK]``, own keys ``[row, CHUNK]`` and prefix keys ``[row, n]``."""
    rows = len(tokens["action"].example)
    keys = torch.cat([prefix.expand(rows, -1), own.expand(rows, -1)], dim=1)
    return queries[None, :, None] & keys[:, None]


def one(count: int, *numbers: int) -> Tensor:
    mask = torch.zeros(count, dtype=torch.bool)
    mask[list(numbers)] = True
    return mask


KEYS: dict[str, Callable[[Any], tuple[Any, Tensor, Tensor]]] = {
    # What an edit gets; own keys; keys of the prefix.
    "own number": lambda t: (1, one(CHUNK, 1)[None], one(width(t))[None]),
    "own numbers": lambda t: ([1, -1], one(CHUNK, 1, 4)[None], one(width(t))[None]),
    "own slice": lambda t: (slice(1, 3), one(CHUNK, 1, 2)[None], one(width(t))[None]),
    "own last": lambda t: ("last", one(CHUNK, 4)[None], one(width(t))[None]),
    "own mask": lambda t: (one(CHUNK, 0), one(CHUNK, 0)[None], one(width(t))[None]),
    "own selection": lambda t: (t["action"].select("state"), one(CHUNK, 0)[None], one(width(t))[None]),
    "own by name": lambda t: (("action", [2]), one(CHUNK, 2)[None], one(width(t))[None]),
    "prefix selection": lambda t: (
        t["language"].select("text"),
        one(CHUNK)[None],
        torch.from_numpy(t["language"].kind == "text"),
    ),
    "prefix image": lambda t: (
        t["language"].image(1),
        one(CHUNK)[None],
        torch.from_numpy((t["language"].image_number == 1) & (t["language"].kind != "padding")),
    ),
    "prefix number": lambda t: (("language", 2), one(CHUNK)[None], one(width(t), 2)[None]),
    "prefix numbers": lambda t: (("language", [2, -1]), one(CHUNK)[None], one(width(t), 2, width(t) - 1)[None]),
    "prefix slice": lambda t: (("language", slice(0, 4)), one(CHUNK)[None], one(width(t), 0, 1, 2, 3)[None]),
    "prefix mask": lambda t: (("language", one(width(t), 7)), one(CHUNK)[None], one(width(t), 7)[None]),
    "whole prefix": lambda t: (("language", None), one(CHUNK)[None], ~one(width(t))[None]),
    "all own but the state": lambda t: (("action", slice(1, None)), ~one(CHUNK, 0)[None], one(width(t))[None]),
}


def width(tokens: Any) -> int:
    return tokens["language"].n_positions


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", KEYS)
def test_keys_of_the_action_expert(name: str, padding: str | None) -> None:
    model, inputs, tokens = pi0(padding)
    keys, own, prefix = KEYS[name](tokens)
    for said, queries in (
        (None, ~one(CHUNK)),
        ([0, 1, 3], one(CHUNK, 0, 1, 3)),
        (tokens["action"].select("action"), ~one(CHUNK, 0)),
    ):
        where = entries(tokens, queries, own, prefix)
        wanted = by_hand(model, where, lambda module: module(**inputs).logits)
        got = model.run(inputs, [edits.block_attention("action", said, keys)])
        near(got, wanted, 1e-5)
    apart(got, model(inputs))


def test_biases_and_factors_of_prefix_keys_and_patterns_that_are_not_renormalised() -> None:
    model, inputs, tokens = pi0("right")
    prefix = torch.from_numpy(tokens["language"].kind == "text")
    where = entries(tokens, one(CHUNK, 1, 2), one(CHUNK)[None], prefix)
    said = [1, 2], tokens["language"].select("text")
    visible: Any = lambda scores, at: at & (scores > torch.finfo(scores.dtype).min / 2)  # noqa: E731
    for edit, change in (
        (edits.add_attention_bias("action", *said, 1.5), lambda s, at: torch.where(visible(s, at), s + 1.5, s)),
        (edits.scale_attention("action", *said, 0.3), lambda s, at: torch.where(visible(s, at), s * 0.3, s)),
    ):
        wanted = by_hand(model, where, lambda module: module(**inputs).logits, change)
        near(model.run(inputs, [edit]), wanted, 1e-5)
    bare = edits.block_attention("action", *said, renormalise=False)
    wanted = by_hand(
        model, where, lambda module: module(**inputs).logits, lambda p, at: p.masked_fill(at, 0.0), of_pattern=True
    )
    near(model.run(inputs, [bare]), wanted, 1e-5)
    apart(model.run(inputs, [bare]), model(inputs))


@pytest.mark.parametrize("name", ["own number", "own selection", "prefix number", "prefix selection"])
def test_every_denoising_step_has_the_same_keys(name: str) -> None:
    model, inputs, tokens = pi0("left")
    keys, own, prefix = KEYS[name](tokens)
    where = entries(tokens, one(CHUNK, 1, 4), own, prefix)
    given = {key: value for key, value in inputs.items() if key != "timestep"}
    wanted = by_hand(model, where, lambda module: module.sample_actions(**given, num_steps=3))
    got = model.sample_actions(inputs, num_steps=3, edits=[edits.block_attention("action", [1, 4], keys)])
    near(got, wanted, 1e-5)
    apart(got, model.sample_actions(inputs, num_steps=3))


def test_sweeps_and_files_keep_whose_keys_they_are(tmp_path: Path) -> None:
    model, inputs, tokens = pi0("right")
    groups = [edits.block_attention("action", [1, 3], KEYS[name](tokens)[0]) for name in KEYS]
    swept = model.sweep(inputs, groups, lambda out: out.flatten(1).sum(1), progress=False).values
    alone = torch.stack([model.run(inputs, [edit]).flatten(1).sum(1) for edit in groups])
    near(swept, alone, 1e-5)
    path = edits.save(tmp_path / "edits.yaml", groups)
    assert edits.load(path) == groups
    assert edits.load(edits.save(tmp_path / "edits.json", groups)) == groups


def test_what_is_ambiguous_is_refused_with_the_fix() -> None:
    model, inputs, tokens = pi0()
    wrong = [
        edits.block_attention("action", None, 20),
        edits.block_attention("action", None, one(width(tokens) + CHUNK, 3)),
        edits.block_attention("action", [0, 1], -6),
    ]
    for edit in wrong:
        with pytest.raises(InputError, match=r"keys=\('language', positions\)"):
            model.run(inputs, [edit])
    for edit, message in (
        (edits.block_attention("action", ("language", 2), 1), "selected in the language tower, not in action"),
        (edits.block_attention("language", None, tokens["action"].select("state")), "cannot look at"),
        (edits.block_attention("action", None, ("vision", 1)), "cannot look at"),
        (edits.block_attention("action", None, ("language", width(tokens))), "is outside"),
        (edits.ablate("action.blocks.0.attn.hook_z", positions=("language", 1)), "not in action"),
    ):
        with pytest.raises(InputError, match=message):
            model.run(inputs, [edit])
    with pytest.raises(InputError, match="selected in the action tower"):
        edits.block_attention("action", None, ("language", tokens["action"].select("state")))


def test_a_mutant_that_lays_own_keys_on_the_prefix_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AttentionEdit._key_mask

    def shifted(self: Any, window: Any, rows: int, n_keys: int, device: Any) -> Tensor:
        found = whole(self, window, rows, n_keys, device)
        prefix = 0 if window.prefix is None else window.prefix.length
        return found.roll(-prefix, dims=1)

    monkeypatch.setattr(AttentionEdit, "_key_mask", shifted)
    with pytest.raises(AssertionError):
        test_keys_of_the_action_expert("own mask", None)
    with pytest.raises(AssertionError):
        test_keys_of_the_action_expert("prefix selection", None)


def test_a_mutant_that_drops_prefix_keys_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = AttentionEdit._key_mask

    def without(self: Any, window: Any, rows: int, n_keys: int, device: Any) -> Tensor:
        found = whole(self, window, rows, n_keys, device)
        if window.prefix is not None and self.positions.kind != "all":
            found[:, : window.prefix.length] = False
        return found

    monkeypatch.setattr(AttentionEdit, "_key_mask", without)
    with pytest.raises(AssertionError):
        test_keys_of_the_action_expert("prefix number", None)

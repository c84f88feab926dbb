"""Edits that would never act are an error that names the fix, or a warning where only the run can tell; none is silent."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.edits.attention import DeleteTokens
from circuitvision.model.edits.binding import EditCompiler
from circuitvision.model.edits.writes import Permute
from tests.edits.common import apart, block, fresh, inputs_of, near, run_and_see, same, wrap, wrapped
from tests.parts import module_of

SITE = "language.blocks.0.hook_resid_post"


def language(name: str = "llava-clip-llama", **options: Any) -> tuple[cv.HookedModel, dict[str, Any], int]:
    model = wrap(fresh(name))
    model.module.generation_config.eos_token_id = None
    inputs = inputs_of(name, model, **options)
    return model, inputs, inputs["input_ids"].shape[1]


def refused(model: cv.HookedModel, call: Any, message: str) -> None:
    """An error of this message before anything ran."""
    calls: list[int] = []
    handle = model.module.register_forward_pre_hook(lambda module, args: calls.append(1))
    with pytest.raises(InputError, match=message):
        call()
    handle.remove()
    assert not calls
    assert model.engine.handles == []


# ---- steps and positions that no pass reaches


def lengths(n: int) -> list[dict[str, Any]]:
    """Three new tokens, said in every way."""
    return [
        {"max_new_tokens": 3},
        {"max_length": n + 3},
        {"generation_config": GenerationConfig(max_new_tokens=3)},
        {"generation_config": GenerationConfig(max_length=n + 3)},
    ]


@pytest.mark.parametrize("way", range(4))
def test_what_a_generation_of_three_tokens_never_reaches(way: int) -> None:
    model, inputs, n = language()
    said: dict[str, Any] = {"do_sample": False, **lengths(n)[way]}

    def generate(edit: edits.Edit) -> Any:
        return lambda: model.generate(inputs, edits=[edit], **said)

    refused(model, generate(edits.scale(SITE, 2.0, steps=7)), "3 times here, from step 0, so the edit never acts")
    refused(model, generate(edits.scale(SITE, 2.0, steps=[0, 3])), "step 3 is never reached")
    refused(
        model,
        generate(edits.scale(SITE, 2.0, positions=n + 2)),
        f"position {n + 2} is outside the {n} positions of the language tower and the 2 that",
    )
    refused(model, generate(edits.scale(SITE, 2.0, positions=[0, 500])), "position 500 is outside")
    refused(model, generate(edits.scale(SITE, 2.0, positions=n, steps="prefill")), f"position {n} is outside")
    refused(model, generate(edits.scale(SITE, 2.0, positions=3, steps="decode")), "not computed in steps='decode'")
    refused(model, generate(edits.scale(SITE, 2.0, positions=n + 1, steps=[0, 1])), r"not computed in steps=\[0, 1\]")
    refused(model, generate(edits.block_attention("language", n, 500)), "position 500 is outside")
    refused(model, generate(edits.block_attention("language", 3, 1, steps="decode")), "not computed in steps='decode'")
    text = model.tokens(inputs)["language"].select("text")
    refused(model, generate(edits.ablate(SITE, positions=text, steps="decode")), "not computed in steps='decode'")
    for edit in (
        edits.scale(SITE, 2.0, positions=n + 1),
        edits.scale(SITE, 2.0, steps=2),
        edits.scale(SITE, 2.0, positions=[3, n], steps=[0, 1]),
        edits.block_attention("language", None, 3, steps="decode", renormalise=False),
    ):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert not torch.equal(model.generate(inputs, edits=[edit], **said), torch.zeros(1))


def test_a_generation_that_ends_early_warns() -> None:
    model, inputs, n = language()
    plain = model.module.generate(**inputs, do_sample=False, max_new_tokens=4)
    row = {name: value[:1] for name, value in inputs.items()}
    model.module.generation_config.eos_token_id = int(plain[0, n + 1])
    late = edits.scale(SITE, 2.0, positions=n + 5)
    with pytest.warns(UserWarning, match="Generation ended after 2 steps, so .* never acted"):
        out = model.generate(row, edits=[late], do_sample=False, max_new_tokens=8)
    same(out, plain[:1, : n + 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.generate(row, edits=[edits.scale(SITE, 1.0001, positions=[3])], do_sample=False, max_new_tokens=8)


def test_denoising_steps_that_are_not_run() -> None:
    model = wrapped("pi0")
    inputs = inputs_of("pi0", model)
    site = "action.blocks.0.hook_resid_post"
    refused(
        model, lambda: model.sample_actions(inputs, num_steps=3, edits=[edits.scale(site, 2.0, steps=3)]), "never acts"
    )
    refused(
        model,
        lambda: model.sample_actions(inputs, num_steps=3, edits=[edits.scale(site, 2.0, steps=[1, 3])]),
        "step 3 is never",
    )
    refused(
        model, lambda: model.sample_actions(inputs, num_steps=3, edits=[edits.scale(site, 2.0, positions=5)]), "outside"
    )


def test_a_mutant_that_asks_for_no_passes_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitvision.model.generation.most_passes", lambda *args: None)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_what_a_generation_of_three_tokens_never_reaches(1)


# ---- selections that are empty, everywhere or in some rows


def padded() -> tuple[cv.HookedModel, dict[str, Any], Any]:
    """Two prompts of which one has the word asked for."""
    model, inputs, _ = language()
    ids = inputs["input_ids"].clone()
    ids[0, -2], ids[1, -2] = 7, 8
    inputs = {**inputs, "input_ids": ids}
    tokens = model.tokens(inputs)["language"]
    pieces = tokens.text.copy()
    pieces[:] = ids.numpy().astype(str)
    return model, inputs, dataclasses.replace(tokens, text=pieces)


def test_rows_without_a_selection_are_counted_before_the_run() -> None:
    model, inputs, tokens = padded()
    word = tokens.piece("7")
    in_one = int((inputs["input_ids"] == 7).any(1).sum())
    assert in_one == 1
    for edit in (
        edits.ablate("language.hook_input", positions=word),
        edits.block_attention("language", None, word, renormalise=False),
        edits.block_attention("language", word, 1, renormalise=False),
        edits.delete_tokens("language", word),
    ):
        calls: list[int] = []
        handle = model.module.register_forward_pre_hook(lambda module, args, calls=calls: calls.append(1))
        with pytest.warns(
            UserWarning, match="selects no position of the language tower in 1 rows of the batch"
        ) as caught:
            EditCompiler(model, inputs).bind([(edit,)])
        handle.remove()
        assert not calls
        assert len([w for w in caught if "rows of the batch" in str(w.message)]) == 1
        binder = EditCompiler(model, inputs)
        assert binder.rows_without_selection(edit, edit.sites(model)[0]) == [1]
    with pytest.warns(UserWarning, match="1 rows of the batch"):
        got = model.run(inputs, [edits.ablate("language.hook_input", positions=word)])
    same(got[1], model(inputs)[1])
    apart(got[0], model(inputs)[0])


def test_images_of_one_example_are_one_row_of_the_batch() -> None:
    model, inputs, _ = language(images_per_prompt=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model.run(
            inputs,
            [edits.scale("vision.blocks.0.hook_resid_post", 3.0, positions=model.tokens(inputs)["vision"].image(1))],
        )


@pytest.mark.filterwarnings("ignore:.*cannot reach")
def test_a_group_that_selects_nothing_is_the_unedited_run_in_a_sweep() -> None:
    model, inputs, n = language()
    tokens = model.tokens(inputs)["language"]
    nothing: list[Any] = [
        edits.ablate(SITE, positions=[]),
        edits.ablate(SITE, positions=torch.zeros(n, dtype=torch.bool)),
        edits.block_attention("language", [], 3),
        edits.block_attention("language", 3, tokens.select("newline")),
        edits.delete_tokens("language", tokens.select("newline")),
        [edits.ablate(SITE, positions=[]), edits.scale(SITE, 2.0, positions=slice(4, 4))],
        [],
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = model.sweep(
            inputs,
            [*nothing, edits.scale(SITE, 2.0, positions=2)],
            lambda out: out[:, -1, 3],
            empty="clean",
            progress=False,
        )
    assert not [w for w in caught if "run in full" in str(w.message)]
    assert [str(plan) for plan in result.plan[:-1]] == ["nothing changes"] * len(nothing)
    same(result.values[:-1], result.clean.expand(len(nothing), -1))
    assert len([w for w in caught if "selects no position, so it changes nothing" in str(w.message)]) >= 6


def test_a_mutant_that_counts_no_rows_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("circuitvision.model.edits.binding.rows_without_selection", lambda edit, window: [])
    with pytest.raises(pytest.fail.Exception):
        test_rows_without_a_selection_are_counted_before_the_run()


# ---- positions in the order given


@pytest.mark.parametrize("positions", [[5, 2, 3], [-1, 0, 4], (9, 8, 1)])
def test_a_permutation_takes_positions_in_the_order_given(positions: Any) -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    order = [1, 2, 0]
    place = block(model, "vision", 1)
    clean = run_and_see(model, inputs, [], place)
    wanted = clean.clone()
    for number, position in enumerate(positions):
        wanted[:, position] = clean[:, positions[order[number]]]
    edit = edits.permute("vision.blocks.1.hook_resid_post", order, positions=list(positions))
    same(run_and_see(model, inputs, [edit], place), wanted)
    with pytest.raises(InputError, match="twice"):
        model.run(inputs, [edits.permute("vision.blocks.1.hook_resid_post", order, positions=[5, 2, -15])])


def test_a_mutant_that_sorts_positions_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Permute, "_ascending", lambda self, window: self.order)
    with pytest.raises(AssertionError):
        test_a_permutation_takes_positions_in_the_order_given([5, 2, 3])


# ---- deleted tokens under sliding windows


@pytest.mark.parametrize("name", ["llava-clip-mistral-sliding", "paligemma2-sliding"])
def test_deleting_under_a_sliding_window_is_refused(name: str) -> None:
    model, inputs, _ = language(name)
    layers = [layer for layer in range(model.language.cfg.n_layers) if model.language.sliding_window(layer) is not None]
    assert layers
    for edit in (edits.delete_tokens("language", 3), edits.delete_tokens("language", 3, start=layers[0])):
        refused(model, lambda edit=edit: model.run(inputs, [edit]), "sees .* positions back, deleted ones counted")
        refused(
            model, lambda edit=edit: model.generate(inputs, edits=[edit], max_new_tokens=2), "sees .* positions back"
        )
    # From behind the last sliding layer on nothing is wrong.
    last = max(layers) + 1
    if last < model.language.cfg.n_layers:
        model.run(inputs, [edits.delete_tokens("language", 3, start=last)])


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-clip-mistral", "llava-siglip-qwen2"])
def test_deleting_and_counting_anew_is_the_shorter_prompt(name: str, implementation: str) -> None:
    model = wrap(fresh(name, attention=implementation))
    inputs = inputs_of(name, model)
    n = inputs["input_ids"].shape[1]
    gone = [n - 4, n - 2]
    kept = [p for p in range(n) if p not in gone]
    short = {**inputs, "input_ids": inputs["input_ids"][:, kept], "attention_mask": inputs["attention_mask"][:, kept]}
    with torch.no_grad():
        wanted = model.module(**short).logits
        near(model.run(inputs, [edits.delete_tokens("language", gone, reindex=True)])[:, kept], wanted, 1e-5)


def test_a_window_longer_than_the_prompt_is_no_obstacle() -> None:
    module = fresh("llava-clip-mistral-sliding")
    module.config.text_config.sliding_window = 200
    model = wrap(module)
    inputs = inputs_of("llava-clip-mistral-sliding", model)
    for layer in model.language.blocks:
        attn: Any = module_of(layer, "attn")
        attn.sliding_window = 200
    n = inputs["input_ids"].shape[1]
    kept = [p for p in range(n) if p != n - 3]
    short = {**inputs, "input_ids": inputs["input_ids"][:, kept], "attention_mask": inputs["attention_mask"][:, kept]}
    with torch.no_grad():
        near(
            model.run(inputs, [edits.delete_tokens("language", n - 3, reindex=True)])[:, kept],
            model.module(**short).logits,
            1e-5,
        )


def test_what_the_refusal_prevents(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: without the refusal, the others see less far than in the shorter prompt."""
    monkeypatch.setattr(DeleteTokens, "_check_reach", lambda *args: None)
    model, inputs, n = language("llava-clip-mistral-sliding")
    kept = [p for p in range(n) if p != n - 3]
    short = {**inputs, "input_ids": inputs["input_ids"][:, kept], "attention_mask": inputs["attention_mask"][:, kept]}
    with torch.no_grad():
        got = model.run(inputs, [edits.delete_tokens("language", n - 3, reindex=True)])[:, kept]
        apart(got, model.module(**short).logits, 1e-2)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        test_deleting_under_a_sliding_window_is_refused("llava-clip-mistral-sliding")

"""Every mistake in an edit gets one error that names the edit, before anything runs where that can be known, and leaves nothing hooked."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import CircuitVisionError, InputError, UnknownSiteError
from tests.edits.common import Dictionary, inputs_of, random, wrapped

SITE, Z, POST = "vision.blocks.1.hook_resid_post", "vision.blocks.1.attn.hook_z", "vision.blocks.1.mlp.hook_post"
LLAVA, RESID = "llava-clip-llama", "language.blocks.0.hook_resid_post"
NAN = random(24)
NAN[3] = float("nan")


@contextmanager
def calls_of(model: cv.HookedModel) -> Iterator[list[Any]]:
    """The forward calls of the module."""
    calls: list[Any] = []
    handle = model.module.register_forward_pre_hook(lambda module, args: calls.append(module))
    try:
        yield calls
    finally:
        handle.remove()


def refused(
    model: cv.HookedModel,
    call: Callable[[], Any],
    edit: edits.Edit,
    message: str,
    kind: type[Exception] = InputError,
    early: bool = True,
) -> None:
    """One error, of this kind and message, that names the edit once; nothing ran before it and nothing stays hooked."""
    with calls_of(model) as calls, pytest.raises(kind, match=message) as caught:
        call()
    assert str(caught.value).count(repr(edit)) == 1
    assert "\n" not in str(caught.value)
    assert isinstance(caught.value, CircuitVisionError)
    assert not early or not calls
    assert model.engine.handles == []
    assert model.engine.stack == []


# ---- what a model does not have


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edits.ablate("vision.blocks.9.hook_resid_post"), "Nearest: vision"),
        (edits.ablate("vision.blocks.*.hook_nothing"), "matches"),
        (edits.ablate("language.blocks.0.attn.hook_z"), "matches"),
        (edits.freeze(SITE, at="vision.blocks.0.hook_residpost"), "matches"),
        (edits.block_attention("vision", 0, 1, layers="pool"), "matches"),
    ],
    ids=str,
)
def test_a_site_that_does_not_exist(edit: edits.Edit, message: str) -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    refused(model, lambda: model.run(inputs, [edits.scale(SITE, 2.0), edit]), edit, message, UnknownSiteError)


WRONG_PLACES = [
    (edits.ablate(Z, heads=4), "head 4 is outside the 4 heads"),
    (edits.ablate(Z, heads=[0, -5]), "head -5 is outside"),
    (edits.ablate(SITE, heads=0), "no heads"),
    (edits.block_attention("vision", 0, 1, heads=4), "head 4 is outside"),
    (edits.ablate(SITE, positions=17), "position 17 is outside the 17 positions"),
    (edits.ablate(SITE, positions=[0, -18]), "position -18 is outside"),
    (edits.ablate("vision.hook_embed", positions=17), "position 17 is outside the 17"),
    (
        edits.ablate("vision.hook_embed", positions=0),
        "position 0 of the vision tower is not at vision.hook_embed, which holds positions 1…16",
    ),
    (edits.ablate(SITE, positions=torch.ones(16) > 0), "16 entries"),
    (edits.ablate(SITE, positions=torch.eye(3, 17) > 0), "3 rows"),
    (edits.block_attention("vision", 17, 1), "position 17 is outside"),
    (edits.block_attention("vision", 1, 17), "position 17 is outside"),
    (edits.block_attention("vision", 1, torch.ones(18) > 0), "18 entries"),
    (edits.delete_tokens("vision", 17), "position 17 is outside"),
    (edits.overwrite(POST, 40, 1.0), "neuron 40 is outside the 40"),
    (edits.overwrite(POST, [3, -41], 1.0), "neuron -41 is outside"),
    (edits.overwrite(SITE, 24, 1.0), "neuron 24 is outside"),
    (edits.block_attention("language", 0, 1), "no tower 'language'"),
    (edits.delete_tokens("text", 1), "no tower 'text'"),
    (edits.block_attention("vision", 0, 1, layers=3), "layer 3 is outside the 3 layers"),
    (edits.scale_attention("vision", 0, 1, 0.5, layers=[0, -4]), "layer -4 is outside"),
    (edits.delete_tokens("vision", 1, start=4), "start=4"),
    (edits.delete_tokens("vision", 1, start=3), "start=3"),
    (edits.delete_tokens("vision", 0), "cls"),
    (edits.delete_tokens("vision", 1, reindex=True), "reindex"),
]


@pytest.mark.parametrize(("edit", "message"), WRONG_PLACES, ids=str)
def test_a_place_that_does_not_exist(edit: edits.Edit, message: str) -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    refused(model, lambda: model.run(inputs, [edits.scale(SITE, 2.0), edit]), edit, message)


WRONG_VALUES = [
    (edits.replace(SITE, random(3, 17, 24)), "shape"),
    (edits.replace(SITE, random(2, 16, 24)), "shape"),
    (edits.replace(SITE, random(17, 25)), "shape"),
    (edits.replace(SITE, random(25)), "shape"),
    (edits.replace(SITE, random(1, 2, 17, 24)), "shape"),
    (edits.replace(Z, random(2, 17, 3, 6)), "shape"),
    (edits.replace(Z, random(24)), "shape"),
    (edits.ablate(SITE, random(25)), "shape"),
    (edits.steer(SITE, random(6)), "shape"),
    (edits.steer(SITE, random(2, 16, 24)), "shape"),
    (edits.scale(Z, random(3, 1)), "shape"),
    (edits.scale(SITE, random(23)), "shape"),
    (edits.project(SITE, random(24, 2), random(2, 18, 24)), "shape"),
    (edits.project(SITE, random(24, 2), random(23)), "shape"),
    (edits.project(SITE, random(23, 2), 0.0), "23 coordinates"),
    (edits.permute(SITE, [1, 0], positions=[1, 2, 3]), "2 entries"),
    (edits.replace(SITE, NAN), "NaN"),
    (edits.replace(SITE, float("nan")), "NaN"),
    (edits.steer(SITE, NAN), "NaN"),
    (edits.steer(SITE, random(24), float("nan")), "NaN"),
    (edits.scale(SITE, NAN), "NaN"),
    (edits.overwrite(SITE, [1, 2], [1.0, float("nan")]), "NaN"),
    (edits.add_attention_bias("vision", 0, 1, float("nan")), "NaN"),
    (edits.steer("vision.blocks.1.attn.hook_pattern", random(17)), "query key"),
    (edits.ablate("vision.blocks.1.attn.hook_attn_scores"), "query key"),
    (edits.freeze(SITE, at="vision.blocks.2.hook_resid_post"), "not before"),
    (edits.freeze(SITE, at=SITE), "not before"),
    (edits.freeze(SITE, at="vision.blocks.*.hook_resid_post"), "must name one site"),
    (edits.freeze(SITE, at="vision.blocks.0.attn.hook_z"), "shape"),
]


@pytest.mark.parametrize(("edit", "message"), WRONG_VALUES, ids=str)
def test_a_value_that_does_not_fit(edit: edits.Edit, message: str) -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    refused(model, lambda: model.run(inputs, [edits.scale("vision.hook_input", 2.0), edit]), edit, message)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (edits.replace("vision.hook_readout", random(25)), "shape"),
        (edits.replace("vision.hook_readout", random(3, 24)), "shape"),
        (edits.overwrite("vision.hook_input", 24, 1.0), "neuron 24 is outside"),
        (edits.overwrite("vision.hook_readout", 99, 1.0), "neuron 99 is outside"),
        (edits.project("vision.hook_readout", random(5), 0.0), "coordinates"),
        (edits.overwrite(SITE, 40, 1.0, dictionary=Dictionary(24)), "40 features"),
        (edits.overwrite(SITE, [1, 2], random(1, 3)), "value"),
        (edits.ablate("vision.hook_readout", positions=1), "pooled"),
        (edits.add_attention_bias("vision", 0, 1, random(5, 5)), "shape"),
        (edits.apply(SITE, lambda tensor, hook: tensor[:, 1:]), "shape"),
        (edits.apply(SITE, lambda tensor, hook: 3.0), "float"),
        (edits.block_attention("vision", 3, None), "nothing is left"),
    ],
    ids=str,
)
def test_a_mistake_that_shows_only_in_the_run(edit: edits.Edit, message: str) -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    refused(model, lambda: model.run(inputs, [edit]), edit, message, early=False)


def test_means_and_resamples_of_a_single_row_are_refused() -> None:
    model = wrapped("vit", torch.float64)
    one = inputs_of("vit", model, batch=1)
    for method in ("mean", "resample"):
        edit = edits.ablate(SITE, method)
        refused(model, lambda edit=edit: model.run(one, [edit]), edit, "row", early=False)
    model.run(one, [edits.ablate(SITE, "mean", average="all")])


def test_means_over_inputs_of_several_lengths_are_refused() -> None:
    model = wrapped("vit", torch.float64)
    sizes = [inputs_of("vit", model), inputs_of("vit", model, image_size=(16, 20))]
    edit = edits.ablate(SITE, "mean", dataset=sizes)
    refused(model, lambda: model.run(sizes[0], [edit]), edit, "position 5 is .patch r0c4. in one row")


def test_the_mean_over_heads_needs_heads_and_some_left() -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    with pytest.warns(UserWarning, match="basis"):
        listed = [edits.ablate(Z, "heads"), edits.ablate(SITE, "heads"), edits.ablate(Z, "heads", heads=range(4))]
    refused(model, lambda: model.run(inputs, listed[:1]), listed[0], "needs heads")
    refused(model, lambda: model.run(inputs, listed[1:2]), listed[1], "heads")
    refused(model, lambda: model.run(inputs, listed[2:]), listed[2], "no head is left", early=False)


def test_key_value_heads_are_counted_as_such() -> None:
    model = wrapped(LLAVA)
    inputs = inputs_of(LLAVA, model)
    edit = edits.ablate("language.blocks.0.attn.hook_k", heads=2)
    refused(model, lambda: model.run(inputs, [edit]), edit, "outside the 2 heads")
    model.run(inputs, [edits.ablate("language.blocks.0.attn.hook_q", heads=2)])


def test_a_selection_of_another_tower_or_run_is_refused() -> None:
    model = wrapped(LLAVA)
    inputs = inputs_of(LLAVA, model)
    tokens, longer = model.tokens(inputs), model.tokens(inputs_of(LLAVA, model, images_per_prompt=2))
    for edit in (
        edits.ablate(RESID, positions=tokens["vision"].image(0)),
        edits.block_attention("language", tokens["vision"].image(0), 3),
        edits.delete_tokens("language", tokens["vision"].image(0)),
    ):
        refused(model, lambda edit=edit: model.run(inputs, [edit]), edit, "selected in the vision tower")
    edit = edits.block_attention("language", 15, tokens["vision"].image(0))
    refused(model, lambda: model.run(inputs, [edit]), edit, "cannot look at positions of the vision tower")
    edit = edits.ablate(RESID, positions=longer["language"].image(1))
    refused(model, lambda: model.run(inputs, [edit]), edit, "entries")


def test_sources_that_hold_nothing_of_the_site_are_refused_when_the_edit_is_made() -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    _, cache = model.run_with_cache(inputs, [SITE])
    with pytest.raises(UnknownSiteError):
        edits.replace("vision.blocks.9.hook_resid_post", cache)
    with pytest.raises(InputError, match="nothing that matches"):
        edits.replace("vision.blocks.*.mlp.hook_nothing", cache)
    edit = edits.replace("vision.blocks.*.hook_resid_post", cache)
    refused(model, lambda: model.run(inputs, [edit]), edit, "does not hold vision.blocks.0.hook_resid_post")


def test_a_recording_of_several_passes_is_no_source() -> None:
    model = wrapped(LLAVA)
    inputs = inputs_of(LLAVA, model)
    with model.record([RESID]) as cache:
        model.generate(inputs, max_new_tokens=2, min_new_tokens=2, do_sample=False)
    with pytest.raises(InputError, match="several passes"):
        edits.replace(RESID, cache)


# ---- steps


@pytest.mark.parametrize("steps", ["decode", 1, [2, 3]])
def test_steps_that_a_single_run_does_not_have(steps: Any) -> None:
    for name, site in (("vit", SITE), (LLAVA, RESID), ("pi0", "action.blocks.0.hook_mlp_out")):
        model = wrapped(name)
        inputs = inputs_of(name, model)
        edit = edits.scale(site, 2.0, steps=steps)
        refused(model, lambda m=model, i=inputs, e=edit: m.run(i, [e]), edit, "steps")


@pytest.mark.parametrize("site", [SITE, "projector.hook_out"])
def test_steps_that_a_part_of_generation_does_not_have(site: str) -> None:
    model = wrapped(LLAVA)
    inputs = inputs_of(LLAVA, model)
    for steps in ("decode", 2):
        edit = edits.scale(site, 2.0, steps=steps)
        refused(model, lambda edit=edit: model.generate(inputs, edits=[edit], max_new_tokens=2), edit, "never acts")


def test_steps_that_sampling_actions_does_not_have() -> None:
    model = wrapped("pi0")
    inputs = inputs_of("pi0", model)
    site = "action.blocks.0.hook_mlp_out"
    for edit, message in (
        (edits.scale(site, 2.0, steps="prefill"), "denoising steps"),
        (edits.scale(site, 2.0, steps="decode"), "denoising steps"),
        (edits.scale("language.blocks.0.hook_mlp_out", 2.0, steps=1), "never acts"),
        (edits.scale(site, 2.0, steps=[3, 7]), "never acts"),
    ):
        refused(model, lambda edit=edit: model.sample_actions(inputs, num_steps=3, edits=[edit]), edit, message)


def test_steps_behind_the_last_new_token() -> None:
    model = wrapped(LLAVA)
    inputs = inputs_of(LLAVA, model)
    for steps in (3, [5, 8]):
        edit = edits.scale(RESID, 2.0, steps=steps)
        refused(model, lambda edit=edit: model.generate(inputs, edits=[edit], max_new_tokens=3), edit, "never acts")


def test_generating_without_a_cache_is_refused_under_edits() -> None:
    model = wrapped(LLAVA)
    with pytest.raises(InputError, match="use_cache"):
        model.generate(inputs_of(LLAVA, model), edits=[edits.ablate(RESID)], use_cache=False)


def test_renumbering_is_refused_in_generation() -> None:
    model = wrapped(LLAVA)
    inputs = inputs_of(LLAVA, model)
    edit = edits.delete_tokens("language", 3, reindex=True)
    refused(model, lambda: model.generate(inputs, edits=[edit]), edit, "reindex")


# ---- words and types, refused when the edit is made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: edits.ablate(SITE, "nothing"), "method='nothing'"),
        (lambda: edits.ablate(SITE, "mean", average="rows"), "average='rows'"),
        (lambda: edits.steer(SITE, random(24), mode="turn"), "mode='turn'"),
        (lambda: edits.steer(SITE, torch.zeros(24), mode="project_out"), "length other than zero"),
        (lambda: edits.steer(SITE, NAN, mode="norm_preserving"), "length other than zero"),
        (lambda: edits.scale(SITE, 2.0, steps="later"), "steps='later'"),
        (lambda: edits.scale(SITE, 2.0, steps=-1), "steps=-1"),
        (lambda: edits.scale(SITE, 2.0, steps=[]), "steps"),
        (lambda: edits.scale(SITE, 2.0, steps=1.5), "steps=1.5"),
        (lambda: edits.scale(SITE, 2.0, positions="first"), "positions='first'"),
        (lambda: edits.scale(SITE, 2.0, positions=slice(None, None, -1)), "backwards"),
        (lambda: edits.scale(SITE, 2.0, positions=slice(0.5, 3)), "whole numbers"),
        (lambda: edits.scale(SITE, 2.0, heads=[]), "heads"),
        (lambda: edits.scale(SITE, 2.0, heads=[True]), "heads"),
        (lambda: edits.scale(SITE, 2.0, heads=1.5), "heads=1.5"),
        (lambda: edits.scale(SITE, "two"), "number or a tensor"),
        (lambda: edits.replace(SITE, None), "number or a tensor"),
        (lambda: edits.replace(SITE, [[1.0]]), "number or a tensor"),
        (lambda: edits.block_attention("vision", 0, 1, layers="all"), "layers='all'"),
        (lambda: edits.project(SITE, torch.ones(24, 2), 0.0), "linearly independent"),
        (lambda: edits.project(SITE, torch.zeros(24), 0.0), "linearly independent"),
        (lambda: edits.project(SITE, random(2, 24), 0.0), "basis"),
        (lambda: edits.project(SITE, [1.0] * 24, 0.0), "basis"),
        (lambda: edits.block_attention("vision", 0, 1, layers=1.5), "layers=1.5"),
        (lambda: edits.ablate(SITE, "mean", dataset=[3]), "dataset"),
        (lambda: edits.ablate(SITE, "mean", dataset=[]), "dataset"),
        (lambda: edits.permute(SITE, [0, 2]), "permutation"),
        (lambda: edits.permute(SITE, [0, 0]), "permutation"),
        (lambda: edits.overwrite(SITE, 1, 1.0, dictionary=object()), "encode"),
        (lambda: edits.apply(SITE, 3), "function"),
    ],
)
def test_words_that_mean_nothing(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("listed", [3, [3], [edits.ablate(SITE), None], "words"])
def test_what_is_no_list_of_edits(listed: Any) -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)
    with calls_of(model) as calls, pytest.raises(InputError, match="edit"):
        model.run(inputs, listed)
    assert not calls


def test_a_dead_site_warns_and_names_the_edit() -> None:
    model = wrapped(LLAVA)
    edit = edits.ablate("vision.blocks.2.hook_mlp_out")
    with pytest.warns(UserWarning, match="cannot reach the output") as caught:
        model.run(inputs_of(LLAVA, model), [edit])
    assert [repr(edit) in str(warning.message) for warning in caught] == [True]


def test_a_function_of_the_escape_hatch_cannot_change_what_it_is_given() -> None:
    model = wrapped("vit", torch.float64)
    inputs = inputs_of("vit", model)

    def in_place(tensor: Tensor, hook: Any) -> None:
        tensor.zero_()

    assert torch.equal(model.run(inputs, [edits.apply(SITE, in_place)]), model.run(inputs))

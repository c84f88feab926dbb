"""Edits in runs: no-ops keep every bit, edits compose, conflicts are refused, and each pass of a generation or a denoising gets its own edits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from tests.edits.common import (
    DOUBLE,
    FAMILIES,
    Dictionary,
    apart,
    bare,
    block,
    inputs_of,
    near,
    part,
    random,
    run_and_see,
    same,
    seen,
    torch_hooks,
    wrapped,
)

SITE = "vision.blocks.1.hook_resid_post"
SINGLE = torch.float32


# ---- edits that do nothing


@pytest.mark.parametrize("name", FAMILIES)
def test_edits_that_do_nothing_leave_the_bare_models_bits(name: str) -> None:
    model = wrapped(name)
    inputs = inputs_of(name, model)
    clean = bare(model, inputs)
    for tower in model.towers:
        site, z = f"{tower}.blocks.0.hook_resid_post", f"{tower}.blocks.0.attn.hook_z"
        width = model.towers[tower].cfg.d_model
        length = model.tokens(inputs)[tower].n_positions
        nothing = [
            edits.steer(site, random(width), 0.0),
            edits.steer(site, random(width), 0.0, mode="norm_preserving"),
            edits.scale(z, 1.0, heads=0),
            edits.overwrite(site, [], 3.0),
            edits.overwrite(site, [7], 0.0, dictionary=Dictionary(width))
            if model.dtype is DOUBLE
            else edits.scale(site, 1.0),
            edits.permute(site, range(length)),
            edits.delete_tokens(tower, []),
            edits.scale_attention(tower, 3, 2, 1.0),
            edits.add_attention_bias(tower, 3, 2, 0.0),
            edits.apply(site, lambda tensor, hook: None),
            edits.apply(site, lambda tensor, hook: tensor),
            edits.replace(site, 9.0, positions=[]),
            edits.replace(site, 9.0, positions=slice(4, 2)),
            edits.ablate(z, positions=torch.zeros(length, dtype=torch.bool)),
        ]
        same(model.run(inputs, nothing), clean)
        for edit in nothing:
            same(model.run(inputs, [edit]), clean)
    same(model.run(inputs, []), clean)
    same(model.run(inputs), clean)


@pytest.mark.filterwarnings("ignore:.*cannot reach the output")
@pytest.mark.parametrize("name", FAMILIES)
def test_its_own_values_at_every_site_at_once_leave_the_bare_models_bits(name: str) -> None:
    model = wrapped(name)
    inputs = inputs_of(name, model)
    sites = [
        site for site in model.sites() if not SiteName.parse(site).is_eager and not SiteName.parse(site).is_pattern
    ]
    # A residual between two blocks has two names.
    sites = [site for site in sites if not site.endswith("hook_resid_pre")]
    _, cache = model.run_with_cache(inputs, sites)
    same(model.run(inputs, [edits.replace(site, cache) for site in sites]), bare(model, inputs))


def test_a_glob_is_the_same_edit_at_every_matching_site() -> None:
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    one_by_one = [edits.ablate(f"vision.blocks.{layer}.attn.hook_z", heads=1) for layer in range(3)]
    got = model.run(inputs, [edits.ablate("vision.blocks.*.attn.hook_z", heads=1)])
    same(got, model.run(inputs, one_by_one))
    # Every site takes its own value from a cache.
    _, cache = model.run_with_cache(inputs_of("vit", model, seed=1), "vision.blocks.*.attn.hook_z")
    one_by_one = [edits.replace(f"vision.blocks.{layer}.attn.hook_z", cache, heads=1) for layer in range(3)]
    same(
        model.run(inputs, [edits.replace("vision.blocks.*.attn.hook_z", cache, heads=1)]), model.run(inputs, one_by_one)
    )


def test_a_single_run_is_one_prefill() -> None:
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    wanted = model.run(inputs, [edits.scale(SITE, 2.0)])
    for steps in ("prefill", 0, [0, 3]):
        same(model.run(inputs, [edits.scale(SITE, 2.0, steps=steps)]), wanted)


def test_hooks_and_caches_around_a_run_stay_in_place() -> None:
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    edit = edits.scale(SITE, 2.0)
    with model.record("vision.blocks.2.hook_resid_pre") as cache:
        model.run(inputs, [edit])
    same(cache["vision.blocks.2.hook_resid_pre"], 2.0 * run_and_see(model, inputs, [], block(model, "vision", 1)))
    with model.hooks([(SITE, lambda value, hook: value + 1.0)]):
        got = run_and_see(model, inputs, [edit], block(model, "vision", 1))
    near(got, 2.0 * (run_and_see(model, inputs, [], block(model, "vision", 1)) + 1.0))


# ---- order


def test_edits_act_in_the_order_given() -> None:
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    place, direction = block(model, "vision", 1), random(24)
    clean = run_and_see(model, inputs, [], place)
    steer, scale = edits.steer(SITE, direction, positions=[2, 3]), edits.scale(SITE, 3.0)
    moved = clean.clone()
    moved[:, 2:4] += direction
    near(run_and_see(model, inputs, [steer, scale], place), 3.0 * moved)
    scaled = 3.0 * clean
    scaled[:, 2:4] += direction
    near(run_and_see(model, inputs, [scale, steer], place), scaled)


def test_edits_under_two_names_of_one_value_act_in_the_order_given_or_are_refused() -> None:
    # resid_post[l] comes before resid_pre[l + 1], the input before resid_pre[0].
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    direction = random(24)
    for layer, first, second in (
        (2, SITE, "vision.blocks.2.hook_resid_pre"),
        (0, "vision.hook_input", "vision.blocks.0.hook_resid_pre"),
    ):
        place = block(model, "vision", layer)
        clean = run_and_see(model, inputs, [], place, "pre")
        steer, scale = edits.steer(first, direction), edits.scale(second, 3.0)
        near(run_and_see(model, inputs, [steer, scale], place, "pre"), 3.0 * (clean + direction))
        for change in (edits.steer(second, direction), edits.replace(second, direction)):
            turned = [change, edits.scale(first, 3.0)]
            with pytest.raises(InputError, match="two names of one value") as caught:
                model.run(inputs, turned)
            assert all(repr(edit) in str(caught.value) for edit in turned)
        apart_in_place = [edits.steer(second, direction, positions=1), edits.scale(first, 3.0, positions=2)]
        got = run_and_see(model, inputs, apart_in_place, place, "pre")
        near(got[:, 1:3], torch.stack([clean[:, 1] + direction, 3.0 * clean[:, 2]], dim=1))


# ---- conflicts

PRE = "vision.blocks.2.hook_resid_pre"


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (edits.replace(SITE, 1.0), edits.replace(SITE, 2.0)),
        (edits.replace(SITE, 1.0, positions=[2, 3]), edits.replace(SITE, 2.0, positions=slice(3, 6))),
        (edits.steer(SITE, random(24)), edits.replace(SITE, 2.0)),
        (edits.scale(SITE, 2.0), edits.ablate(SITE)),
        (
            edits.ablate("vision.blocks.1.attn.hook_z", heads=[0, 1]),
            edits.ablate("vision.blocks.1.attn.hook_z", heads=-3),
        ),
        (edits.replace(SITE, 1.0), edits.replace(PRE, 2.0)),
        (edits.steer(SITE, random(24)), edits.ablate(PRE)),
        (edits.steer("vision.hook_input", random(24)), edits.ablate("vision.blocks.0.hook_resid_pre")),
        (
            edits.overwrite("vision.blocks.1.mlp.hook_post", [3, 4], 1.0),
            edits.overwrite("vision.blocks.1.mlp.hook_post", 4, 2.0),
        ),
        (
            edits.overwrite("vision.blocks.1.mlp.hook_post", -1, 1.0),
            edits.overwrite("vision.blocks.1.mlp.hook_post", 39, 2.0),
        ),
        (edits.scale(SITE, 2.0), edits.freeze(SITE, at="vision.hook_input")),
        (edits.ablate(SITE, positions=torch.eye(2, 17) > 0), edits.ablate(SITE, positions=1)),
        (edits.ablate("vision.hook_readout"), edits.ablate("vision.hook_readout", 1.0)),
    ],
    ids=str,
)
def test_an_edit_that_would_lose_an_earlier_one_is_refused(first: edits.Edit, second: edits.Edit) -> None:
    model = wrapped("vit", DOUBLE)
    with pytest.raises(InputError, match="would be lost") as caught:
        model.run(inputs_of("vit", model), [first, second])
    assert repr(first) in str(caught.value)
    assert repr(second) in str(caught.value)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (edits.replace(SITE, 1.0), edits.steer(SITE, random(24))),
        (edits.replace(SITE, 1.0, positions=[2, 3]), edits.replace(SITE, 2.0, positions=slice(4, 6))),
        (
            edits.ablate("vision.blocks.1.attn.hook_z", heads=[0, 1]),
            edits.ablate("vision.blocks.1.attn.hook_z", heads=-1),
        ),
        (edits.replace(SITE, 1.0, positions=4), edits.replace("vision.blocks.1.hook_resid_pre", 2.0)),
        (edits.replace(SITE, 1.0, positions=0), edits.replace(PRE, 2.0, positions=1)),
        (edits.ablate(SITE, positions=torch.eye(2, 17) > 0), edits.ablate(SITE, positions=2)),
        (
            edits.overwrite("vision.blocks.1.mlp.hook_post", [3, 4], 1.0),
            edits.overwrite("vision.blocks.1.mlp.hook_post", 5, 2.0),
        ),
        (
            edits.overwrite(SITE, 1, 1.0, dictionary=Dictionary(24)),
            edits.overwrite(SITE, 1, 2.0, dictionary=Dictionary(24)),
        ),
    ],
    ids=str,
)
def test_edits_of_other_entries_do_not_conflict(first: edits.Edit, second: edits.Edit) -> None:
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    apart(model.run(inputs, [first, second]), model.run(inputs, [first]))


def test_edits_in_other_passes_do_not_conflict() -> None:
    model = wrapped("llava-clip-llama")
    inputs = inputs_of("llava-clip-llama", model)
    site = "language.blocks.0.hook_resid_post"

    def both(first: Any, second: Any) -> None:
        model.generate(
            inputs,
            edits=[edits.replace(site, 0.5, steps=first), edits.replace(site, 0.1, steps=second)],
            max_new_tokens=4,
            do_sample=False,
        )

    both("prefill", "decode")
    both(0, "decode")
    both([1, 2], [3])
    for first, second in (("prefill", 0), ("decode", 3), (None, 3), ([1, 2], [2]), ("decode", "decode")):
        with pytest.raises(InputError, match="would be lost"):
            both(first, second)


def test_edits_of_the_same_generated_position_conflict() -> None:
    model = wrapped("llava-clip-llama")
    inputs = inputs_of("llava-clip-llama", model)
    site = "language.blocks.0.hook_resid_post"
    with pytest.raises(InputError, match="would be lost"):
        model.generate(
            inputs,
            edits=[edits.scale(site, 2.0, positions=17), edits.replace(site, 0.1, positions=slice(17, None))],
            max_new_tokens=3,
        )


# ---- generate

LLAVA = "llava-clip-llama"
GREEDY: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
RESID = "language.blocks.0.hook_resid_post"


def llava(name: str = LLAVA, attention: str | None = None, **options: Any) -> tuple[cv.HookedModel, dict[str, Any]]:
    model = wrapped(name, SINGLE, attention)
    return model, inputs_of(name, model, **options)


@contextmanager
def in_passes(module: nn.Module, phase: str, fn: Callable[[Tensor, int], Tensor | None]) -> Iterator[None]:
    """A plain hook that counts its own calls."""
    calls = iter(range(1000))
    with torch_hooks((module, phase, lambda value: fn(value, next(calls)))):
        yield


def generated(
    model: cv.HookedModel, inputs: dict[str, Any], listed: Any = None, **options: Any
) -> tuple[Tensor, list[Tensor]]:
    """New ids, and the logits of the last position in every pass; through the bare module without a list of edits."""
    with seen(model.module.lm_head) as logits:
        if listed is None:
            ids = model.module.generate(**inputs, **{**GREEDY, **options})
        else:
            ids = model.generate(inputs, edits=listed, **{**GREEDY, **options})
    return ids, [value[:, -1] for value in logits]


def all_same(one: tuple[Tensor, list[Tensor]], other: tuple[Tensor, list[Tensor]]) -> None:
    """Equal ids, and equal logits in every pass."""
    assert torch.equal(one[0], other[0])
    assert len(one[1]) == len(other[1])
    for mine, theirs in zip(one[1], other[1], strict=True):
        same(mine, theirs)


@pytest.mark.parametrize(
    ("steps", "passes"),
    [(None, [0, 1, 2, 3]), ("prefill", [0]), ("decode", [1, 2, 3]), (0, [0]), (2, [2]), ([1, 3], [1, 3])],
)
@pytest.mark.parametrize("name", [LLAVA, "paligemma"])
def test_generation_edits_the_passes_it_is_told_to(name: str, steps: Any, passes: list[int]) -> None:
    model, inputs = llava(name)
    direction = random(model.language.cfg.d_model, dtype=SINGLE)
    with in_passes(block(model, "language", 0), "post", lambda v, n: v + 3.0 * direction if n in passes else None):
        wanted = generated(model, inputs)
    all_same(generated(model, inputs, [edits.steer(RESID, direction, 3.0, steps=steps)]), wanted)
    clean = generated(model, inputs)[1]
    apart(wanted[1][passes[0]], clean[passes[0]])


def test_keys_and_values_edited_in_the_prompt_are_seen_by_later_passes() -> None:
    model, inputs = llava()
    value = part(model, "language", 1, "v")

    def patch(tensor: Tensor, number: int) -> Tensor | None:
        if number:
            return None
        tensor = tensor.clone()
        tensor[:, 3:8, 6:] = 2.0
        return tensor

    with in_passes(value, "post", patch):
        wanted = generated(model, inputs)
    edit = edits.replace("language.blocks.1.attn.hook_v", 2.0, heads=1, positions=slice(3, 8))
    with seen(part(model, "language", 1, "o"), "pre") as z:
        all_same(generated(model, inputs, [edit]), wanted)
    # The cache carries the edit: in a decoding pass, the values a head reads are those written in the prompt.
    hidden = edits.block_attention("language", None, slice(3, 8), layers=1, steps="decode")
    with seen(part(model, "language", 1, "o"), "pre") as without:
        generated(model, inputs, [edit, hidden])
    apart(z[1], without[1])


@pytest.mark.parametrize(
    ("positions", "number", "place"), [(17, 2, 0), (16, 1, 0), (-1, 0, 15), (15, 0, 15), (3, 0, 3)]
)
def test_positions_of_generated_tokens_follow_the_prompts(positions: int, number: int, place: int) -> None:
    model, inputs = llava()

    def patch(value: Tensor, now: int) -> Tensor | None:
        if now != number:
            return None
        value = value.clone()
        value[:, place] *= -2.0
        return value

    with in_passes(block(model, "language", 0), "post", patch):
        wanted = generated(model, inputs)
    all_same(generated(model, inputs, [edits.scale(RESID, -2.0, positions=positions)]), wanted)


def test_the_source_of_a_prompt_leaves_generated_positions_alone() -> None:
    model, inputs = llava()
    _, cache = model.run_with_cache(inputs_of(LLAVA, model, seed=1), [RESID])

    def patch(value: Tensor, now: int) -> Tensor | None:
        return None if now else cache[RESID]

    with in_passes(block(model, "language", 0), "post", patch):
        wanted = generated(model, inputs)
    all_same(generated(model, inputs, [edits.replace(RESID, cache)]), wanted)


def masked_logits(
    model: cv.HookedModel, inputs: dict[str, Any], ids: Tensor, hidden: Tensor, window: int = 1000
) -> Tensor:
    """All logits of one whole pass under an additive mask: causal, within the window, and without the ``hidden`` (query, key) pairs."""
    n = ids.shape[1]
    query, key = torch.arange(n)[:, None], torch.arange(n)
    visible = (key <= query) & (key > query - window) & ~hidden
    mask = torch.zeros(n, n).masked_fill(~visible, torch.finfo(SINGLE).min).expand(2, 1, n, n)
    whole = {**inputs, "input_ids": ids, "attention_mask": mask}
    return model.module(**whole, use_cache=False).logits


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("steps", [None, "decode", [2, 3]])
def test_generated_tokens_can_be_kept_from_the_image(attention: str, steps: Any) -> None:
    model, inputs = llava(attention=attention)
    image = model.tokens(inputs)["language"].image(0)
    edit = edits.block_attention("language", slice(16, None), image, steps=steps)
    ids, logits = generated(model, inputs, [edit])
    hidden = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    for number in [2, 3] if isinstance(steps, list) else [1, 2, 3]:
        hidden[15 + number, image.positions()] = True
    whole = masked_logits(model, inputs, ids, hidden)
    for number, got in enumerate(logits):
        near(got, whole[:, 15 + number], 1e-5)
    apart(logits[2], masked_logits(model, inputs, ids, torch.zeros_like(hidden))[:, 17])


def test_keys_keep_their_positions_where_a_sliding_window_dropped_the_first_ones() -> None:
    model, inputs = llava("llava-clip-mistral-sliding")
    edit = edits.block_attention("language", slice(16, None), [13, 14])
    ids, logits = generated(model, inputs, [edit])
    hidden = torch.zeros(ids.shape[1], ids.shape[1], dtype=torch.bool)
    hidden[16:, 13:15] = True
    whole = masked_logits(model, inputs, ids, hidden, window=6)
    for number, got in enumerate(logits):
        near(got, whole[:, 15 + number], 1e-5)
    apart(logits[1], masked_logits(model, inputs, ids, torch.zeros_like(hidden), window=6)[:, 16])


def test_left_padding_changes_no_generated_token_under_edits() -> None:
    model, inputs = llava(padding="left", batch=3)

    def listed(given: dict[str, Any]) -> list[edits.Edit]:
        tokens = model.tokens(given)["language"]
        return [
            edits.block_attention("language", "last", tokens.image(0).patch(row=1), layers=1),
            edits.ablate("language.blocks.0.attn.hook_z", heads=2, positions=tokens.image(0)),
            edits.scale(RESID, 1.5, positions="last"),
            edits.scale(RESID, 0.5, steps="decode"),
        ]

    ids, logits = generated(model, inputs, listed(inputs))
    for row in range(3):
        real = inputs["attention_mask"][row].bool()
        alone = {
            "input_ids": inputs["input_ids"][row : row + 1, real],
            "attention_mask": inputs["attention_mask"][row : row + 1, real],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        ids_alone, logits_alone = generated(model, alone, listed(alone))
        assert ids[row, -4:].tolist() == ids_alone[0, -4:].tolist()
        for got, wanted in zip(logits, logits_alone, strict=True):
            near(got[row], wanted[0], 1e-4)


def test_a_mask_per_prompt_reaches_every_beam_of_the_prompt() -> None:
    model, inputs = llava()
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[0, [3, 9]] = mask[1, 12] = True

    def patch(value: Tensor, number: int) -> Tensor | None:
        return torch.where(mask.repeat_interleave(3, dim=0)[..., None], -value, value) if number == 0 else None

    with in_passes(block(model, "language", 0), "post", patch):
        wanted = generated(model, inputs, num_beams=3)
    all_same(generated(model, inputs, [edits.scale(RESID, -1.0, positions=mask)], num_beams=3), wanted)


def test_an_edit_of_the_vision_tower_changes_what_is_generated() -> None:
    model, inputs = llava()
    with torch_hooks((block(model, "vision", 0), "post", lambda value: -2.0 * value)):
        wanted = generated(model, inputs)
    all_same(generated(model, inputs, [edits.scale("vision.blocks.0.hook_resid_post", -2.0)]), wanted)


# ---- sample_actions


def pi0() -> tuple[cv.HookedModel, dict[str, Any]]:
    model = wrapped("pi0")
    return model, inputs_of("pi0", model)


def sampled(model: cv.HookedModel, inputs: dict[str, Any]) -> Tensor:
    """Actions of the bare module."""
    given = {name: value for name, value in inputs.items() if name != "timestep"}
    return model.module.sample_actions(**given, num_steps=3)


@pytest.mark.parametrize(
    ("site", "place", "phase"),
    [("hook_resid_post", None, "post"), ("attn.hook_z", "o", "pre"), ("hook_mlp_out", "mlp_out", "post")],
)
def test_an_edit_of_the_prefix_reaches_the_action(site: str, place: str | None, phase: str) -> None:
    model, inputs = pi0()
    module = block(model, "language", 0) if place is None else part(model, "language", 0, place)

    def patch(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, 2:6] *= -1.0
        return value

    with torch_hooks((module, phase, patch)):
        wanted = sampled(model, inputs)
    edit = edits.scale(f"language.blocks.0.{site}", -1.0, positions=slice(2, 6))
    same(model.sample_actions(inputs, num_steps=3, edits=[edit]), wanted)
    apart(wanted, sampled(model, inputs))


@pytest.mark.parametrize("steps", [None, 0, 1, [0, 2]])
def test_edits_of_single_denoising_steps_equal_a_hook_that_counts_them(steps: Any) -> None:
    model, inputs = pi0()
    passes = [0, 1, 2] if steps is None else [steps] if isinstance(steps, int) else steps
    direction = random(22, dtype=SINGLE)
    site = "action.blocks.1.hook_resid_post"
    with in_passes(block(model, "action", 1), "post", lambda v, n: v + 2.0 * direction if n in passes else None):
        wanted = sampled(model, inputs)
    got = model.sample_actions(inputs, num_steps=3, edits=[edits.steer(site, direction, 2.0, steps=steps)])
    same(got, wanted)
    with model.hooks([(site, lambda v, hook: v + 2.0 * direction if hook.step in passes else None)]):
        same(model.sample_actions(inputs, num_steps=3), got)
    apart(got, sampled(model, inputs))


def test_the_action_tower_can_be_kept_from_a_camera_in_every_denoising_step() -> None:
    model, inputs = pi0()
    camera = model.tokens(inputs)["language"].image(0)
    rest = ~camera
    other = {**inputs, "pixel_values": inputs["pixel_values"].clone()}
    other["pixel_values"][:, 0] = random(2, 3, 12, 12, dtype=SINGLE)
    alone = [edits.block_attention("language", rest, camera)]
    blocked = [*alone, edits.block_attention("action", None, camera)]
    same(
        model.sample_actions(inputs, num_steps=2, edits=blocked),
        model.sample_actions(other, num_steps=2, edits=blocked),
    )
    apart(model.sample_actions(inputs, num_steps=2, edits=alone), model.sample_actions(other, num_steps=2, edits=alone))
    same(model.run(inputs, blocked), model.run(other, blocked))


def test_positions_of_the_action_tower_are_its_own() -> None:
    model, inputs = pi0()
    actions = model.tokens(inputs)["action"].select("action")
    assert actions.positions() == [1, 2, 3, 4]

    def patch(value: Tensor) -> Tensor:
        return torch.cat([value[:, :1], 2.0 * value[:, 1:]], dim=1)

    with torch_hooks((block(model, "action", 0), "post", patch)):
        wanted = sampled(model, inputs)
    got = model.sample_actions(
        inputs, num_steps=3, edits=[edits.scale("action.blocks.0.hook_resid_post", 2.0, positions=actions)]
    )
    same(got, wanted)


# ---- what is left behind


def fails(tensor: Tensor, hook: Any) -> Tensor:
    raise RuntimeError("on purpose")


def test_a_run_that_fails_leaves_the_model_as_it_was() -> None:
    for name, site in (("vit", SITE), (LLAVA, RESID), ("pi0", "action.blocks.1.hook_resid_post")):
        model = wrapped(name)
        inputs = inputs_of(name, model)
        clean = bare(model, inputs)
        tower = site.split(".")[0]
        listed = [edits.scale_attention(tower, 3, 2, 0.5), edits.apply(site, fails)]
        calls: list[Callable[[], Any]] = [lambda: model.run(inputs, listed)]
        if name == LLAVA:
            calls.append(lambda: model.generate(inputs, edits=listed, max_new_tokens=2))
        if name == "pi0":
            calls.append(lambda: model.sample_actions(inputs, edits=listed))
        for call in calls:
            with pytest.raises(RuntimeError, match="on purpose"):
                call()
            assert model.engine.handles == []
            assert model.engine.stack == []
            same(bare(model, inputs), clean)
            assert all(
                not module._forward_hooks and not module._forward_pre_hooks
                for module in block(model, tower, 0).modules()
            )

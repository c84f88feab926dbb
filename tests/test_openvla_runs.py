"""OpenVLA in runs: where the patches stand, generating, every edit against hooks written by hand, reads, and actions as words and numbers."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.openvla import actions
from tests.zoo import case
from tests.zoo.openvla import openvla_inputs

# ---- where the patches stand


@pytest.fixture(scope="module")
def model() -> cv.HookedModel:
    return cv.HookedModel(case("openvla").build().double())


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_ids_that_name_the_patches_and_ids_that_do_not_are_the_same_run(
    model: cv.HookedModel, padding: str | None
) -> None:
    named = openvla_inputs(model, 3, dtype=torch.float64, padding=padding)
    plain = openvla_inputs(model, 3, dtype=torch.float64, padding=padding, named=False)
    assert plain["input_ids"].shape[1] + 9 == named["input_ids"].shape[1]
    with torch.no_grad():
        expected = model(named)
        assert torch.equal(model(plain), expected)
        assert torch.equal(model.module(**plain).logits, expected)
        _, cache = model.run_with_cache(plain)
    assert all(torch.equal(cache.inputs[name], named[name]) for name in named)
    maps = model.tokens(plain)
    assert np.array_equal(maps["language"].kind, model.tokens(named)["language"].kind)
    first = named["attention_mask"].argmax(1)
    for row, start in enumerate(first.tolist()):
        kinds = maps["language"].kind[row]
        assert kinds[start : start + 12].tolist() == ["text", *["patch"] * 9, "text", "text"]
        assert (kinds == "padding").tolist() == (named["attention_mask"][row] == 0).tolist()


@pytest.mark.parametrize("padding", ["left", "right"])
def test_a_padded_row_is_what_it_is_alone(model: cv.HookedModel, padding: str) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding=padding, named=False)
    with torch.no_grad():
        logits = model(inputs)
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            alone = model(
                {"input_ids": inputs["input_ids"][row, real][None], "pixel_values": inputs["pixel_values"][row, None]}
            )
            there = model.tokens(inputs)["language"].kind[row] != "padding"
            # Llama turns by angles, and measures lengths, in float32.
            torch.testing.assert_close(logits[row, there], alone[0], rtol=1e-5, atol=1e-5)


def silenced(model: cv.HookedModel) -> cv.HookedModel:
    """A copy whose vision blocks write nothing, so that patches do not mix."""
    module = case("openvla").build().double()
    for tower, out in (("vision", "o_proj"), ("vision_2", "out_proj")):
        for name, part in getattr(module, tower).named_modules():
            if name.endswith((out, "mlp.fc2")):
                nn.init.zeros_(part.weight)
                nn.init.zeros_(part.bias)
    return cv.HookedModel(module)


@pytest.mark.parametrize("channels", [slice(0, 3), slice(3, 6)])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_painting_a_patch_moves_the_positions_that_the_map_names(
    model: cv.HookedModel, padding: str, channels: slice
) -> None:
    quiet = silenced(model)
    inputs = openvla_inputs(quiet, 2, dtype=torch.float64, padding=padding, named=False)
    tokens = quiet.tokens(inputs)
    tower = tokens["vision" if channels.start == 0 else "vision_2"]
    site = "language.hook_input"
    with torch.no_grad():
        _, before = quiet.run_with_cache(inputs, site)
        for patch in range(9):
            row, column = divmod(patch, 3)
            painted = inputs["pixel_values"].clone()
            painted[1, channels, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] += 1.0
            _, after = quiet.run_with_cache({**inputs, "pixel_values": painted}, site)
            moved = (after[site] != before[site]).any(-1).numpy()
            language = tokens["language"]
            expected = (language.patch_row == row) & (language.patch_col == column) & (language.example == 1)[:, None]
            assert np.array_equal(moved, expected)
            at = tower.n_positions - 9 + patch
            assert tower.box[1, at].tolist() == [4 * column, 4 * row, 4 * column + 4, 4 * row + 4]
            assert language.box[1, moved[1]].tolist() == [tower.box[1, at].tolist()]


def test_pictures_of_another_size_run_where_positions_are_stretched(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64, image_size=(16, 12), named=False)
    assert model.tokens(inputs)["language"].n_positions == 7 + 12
    with torch.no_grad():
        assert torch.equal(model(inputs), model.module(**inputs).logits)
    del inputs["interpolate_pos_encoding"]
    with pytest.raises(InputError, match="16x12"):
        model(inputs)


def test_inputs_that_cannot_be_are_refused(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64, named=False)
    with pytest.raises(InputError, match="3 channels, the model reads 6"):
        model({**inputs, "pixel_values": inputs["pixel_values"][:, :3]})
    with pytest.raises(InputError, match="position_ids"):
        model({**inputs, "position_ids": torch.arange(7)[None]})
    with pytest.raises(InputError, match="attention_mask"):
        model({**inputs, "attention_mask": torch.ones(2, 16)})
    named = openvla_inputs(model, 2, dtype=torch.float64)
    short = {name: named[name][:, 2:] for name in ("input_ids", "attention_mask")}
    with pytest.raises(InputError, match="hold 16 image tokens"):
        model({**named, **short})
    with pytest.raises(InputError, match="pixel_values need input_ids"):
        model.module(inputs_embeds=torch.zeros(2, 7, 32, dtype=torch.float64), pixel_values=inputs["pixel_values"])


# ---- generating


@pytest.mark.parametrize("named", [True, False])
def test_generating_is_the_greedy_loop_with_and_without_a_cache(model: cv.HookedModel, named: bool) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding="left", named=named)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    with torch.no_grad():
        for _ in range(4):
            logits = model.module(input_ids=ids, attention_mask=mask, pixel_values=inputs["pixel_values"]).logits
            ids = torch.cat([ids, logits[:, -1].argmax(-1, keepdim=True)], 1)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    calls: list[int] = []
    handle = model.module.vision.register_forward_hook(lambda *call: calls.append(1))
    for cached in (True, False):
        assert torch.equal(model.module.generate(**inputs, use_cache=cached, **options), ids)
    handle.remove()
    assert len(calls) == 1 + 4, "with a cache, pictures are read in the first step alone"
    assert torch.equal(model.generate(inputs, **options)[:, -4:], ids[:, -4:])
    beams = model.module.generate(**inputs, num_beams=2, **options)
    assert beams.shape == ids.shape
    assert torch.equal(beams[:, :-4], inputs["input_ids"])


def test_a_run_that_continues_a_cache_is_the_whole_run(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    width = inputs["input_ids"].shape[1]
    with torch.no_grad():
        whole = model(inputs)
        start = {
            "input_ids": inputs["input_ids"][:, : width - 2],
            "attention_mask": inputs["attention_mask"][:, : width - 2],
            "pixel_values": inputs["pixel_values"],
        }
        past = model.module(**start, use_cache=True).past_key_values
        rest = {"input_ids": inputs["input_ids"][:, -2:], "attention_mask": inputs["attention_mask"]}
        edit = edits.ablate("language.blocks.1.hook_mlp_out", positions=[width - 1])
        edited = model.run({**rest, "past_key_values": past}, [edit])
        torch.testing.assert_close(edited, model.run(inputs, [edit])[:, -2:], rtol=1e-9, atol=1e-10)
        past = model.module(**start, use_cache=True).past_key_values
        torch.testing.assert_close(model({**rest, "past_key_values": past}), whole[:, -2:], rtol=1e-9, atol=1e-10)


# ---- edits against hooks written by hand


IN_PLACE = 2
"""The input of a norm that the skip path reads as well: it is written where it stands."""


def parts(module: Any) -> Iterator[tuple[str, nn.Module, int, int]]:
    """Site, module, whether the module's input is the site (else its output), and heads of its last axis (0: none)."""
    towers = {
        "vision": (module.vision.encoder.layer, "norm2", "attention", "o_proj", 3, 3),
        "vision_2": (module.vision_2.encoder.layers, "layer_norm2", "self_attn", "out_proj", 5, 5),
        "language": (module.language_model.model.layers, "post_attention_layernorm", "self_attn", "o_proj", 4, 2),
    }
    for tower, (blocks, ln2, attention, out, heads, kv) in towers.items():
        block, prefix = blocks[1], f"{tower}.blocks.1"
        own = getattr(block, attention)
        yield f"{tower}.hook_input", blocks[0], True, 0
        yield f"{prefix}.hook_resid_pre", block, True, 0
        yield f"{prefix}.hook_resid_mid", getattr(block, ln2), IN_PLACE, 0
        yield f"{prefix}.hook_resid_post", block, False, 0
        yield f"{prefix}.attn.hook_q", own.q_proj, False, heads
        yield f"{prefix}.attn.hook_k", own.k_proj, False, kv
        yield f"{prefix}.attn.hook_v", own.v_proj, False, kv
        yield f"{prefix}.attn.hook_z", getattr(own, out), True, heads
        scale = tower == "vision"
        yield f"{prefix}.hook_attn_out", block.layer_scale1 if scale else getattr(own, out), False, 0
        yield f"{prefix}.hook_mlp_out", block.layer_scale2 if scale else block.mlp, False, 0
        down = block.mlp.down_proj if tower == "language" else block.mlp.fc2
        yield f"{prefix}.mlp.hook_post", down, True, 0
        first = block.mlp.gate_proj if tower == "language" else block.mlp.fc1
        yield f"{prefix}.mlp.hook_pre", first, False, 0
    yield "vision.hook_embed", module.vision.embeddings.patch_embeddings, False, 0
    yield "language.hook_embed", module.get_input_embeddings(), False, 0
    yield "language.blocks.1.mlp.hook_pre_linear", module.language_model.model.layers[1].mlp.up_proj, False, 0
    yield "projector.hook_in", module.projector, True, 0
    yield "projector.hook_out", module.projector, False, 0
    yield "language.hook_readout", module.language_model.lm_head, True, 0


def scaled_by_hand(module: Any, inputs: dict[str, Any], part: nn.Module, enters: int, heads: int, place: Any) -> Tensor:
    """Logits where a value is scaled by −1.7 at one position, and in the last head alone where there are heads."""
    position, head = place

    def scale(value: Tensor) -> Tensor:
        value = value if enters == IN_PLACE else value.clone()
        chosen = value[:, position].unflatten(-1, (heads, -1))[:, head] if heads else value[:, position]
        chosen *= -1.7
        return value

    def before(own: Any, args: Any, kwargs: Any) -> Any:
        if args:
            return (scale(args[0]), *args[1:]), kwargs
        name = next(iter(kwargs))
        return args, {**kwargs, name: scale(kwargs[name])}

    def after(own: Any, args: Any, output: Any) -> Any:
        return (scale(output[0]), *output[1:]) if isinstance(output, tuple) else scale(output)

    # Before transformers records hidden states.
    handle = (
        part.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        if enters
        else part.register_forward_hook(after, prepend=True)
    )
    try:
        with torch.no_grad():
            return module(**inputs).logits
    finally:
        handle.remove()


def test_edits_in_all_towers_equal_hooks_by_hand_in_runs_and_sweeps(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64, padding="left", named=False)
    groups, expected = [], []
    with torch.no_grad():
        plain = model(inputs)
    for site, part, enters, heads in parts(model.module):
        tower = site.partition(".")[0]
        row = {"vision": 4, "vision_2": 3, "language": 6, "projector": 5}[tower]
        # Two registers and the class token are left out on the way to the projector, and not there yet in an embedding.
        own = row - 3 if tower == "projector" or site == "vision.hook_embed" else row
        if site == "language.hook_embed":
            # A position of text: patches take the place of what is looked up there.
            row = own = plain.shape[1] - 2
        if site == "language.hook_readout":
            row = own = plain.shape[1] - 1
        head = heads - 1 if heads else None
        by_hand = scaled_by_hand(model.module, inputs, part, enters, heads, (own, head))
        assert not torch.allclose(by_hand, plain, atol=1e-6), site
        edit = edits.scale(site, -1.7, positions=[row], heads=None if head is None else [head])
        with torch.no_grad():
            torch.testing.assert_close(model.run(inputs, [edit]), by_hand, rtol=1e-9, atol=1e-10, msg=site)
        groups.append(edit)
        expected.append(by_hand[:, -1, 7])
    swept = model.sweep(inputs, groups, lambda logits: logits[:, -1, 7], progress=False)
    torch.testing.assert_close(swept.values, torch.stack(expected), rtol=1e-8, atol=1e-9)
    assert not any(plan.in_full for plan in swept.plan)


def test_both_backbones_together_are_swept_as_they_are_run(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64)
    groups = [
        [edits.ablate("vision.blocks.1.hook_mlp_out"), edits.ablate("vision_2.blocks.0.hook_attn_out")],
        [
            edits.ablate("vision_2.blocks.2.attn.hook_z", heads=[1]),
            edits.scale("language.blocks.0.hook_resid_mid", 0.5),
        ],
        [edits.block_attention("language", queries="last", keys="patch", layers=[1])],
    ]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1].logsumexp(-1)

    swept = model.sweep(inputs, groups, metric, progress=False)
    with torch.no_grad():
        looped = torch.stack([metric(model.run(inputs, group)) for group in groups])
    torch.testing.assert_close(swept.values, looped, rtol=1e-9, atol=1e-10)


def test_gradients_through_a_prepared_run_are_those_of_the_whole(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    found = []
    for prepared in (True, False):
        value = torch.full((20,), 0.3, dtype=torch.float64, requires_grad=True)
        edit = edits.steer("vision_2.blocks.1.hook_resid_post", value, 1.0)
        if prepared:
            with model.prepared(inputs, start="vision_2.blocks.1.hook_resid_post") as run:
                logits = run([edit])
        else:
            logits = model.run(inputs, [edit])
        (gradient,) = torch.autograd.grad(logits[:, -1, 5].sum(), value)
        found.append(gradient)
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-10)


# ---- reads


def test_lenses_and_attribution_run_or_say_why_not(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
        for tower in ("vision", "vision_2", "language"):
            lens = cv.readout.logit_lens(model, cache, tower=tower, targets=[5, 6])
            assert lens.values.isfinite().all()
        for tower, last in (("vision", 1), ("vision_2", 2)):
            read = model.towers[tower].readout(cache[f"{tower}.blocks.{last}.hook_resid_post"], context=cache)
            torch.testing.assert_close(read, cache["projector.hook_out"])
            assert model.is_dead(f"{tower}.blocks.{last + 1}.hook_mlp_out")
            assert not model.is_dead(f"{tower}.blocks.{last}.hook_mlp_out")
        attributed = cv.readout.direct_attribution(model, cache, (5, 6))
    assert attributed.values.isfinite().all()
    difference = logits[:, -1, 5] - logits[:, -1, 6]
    torch.testing.assert_close(attributed.values.flatten(0, -2).sum(0), difference, rtol=1e-5, atol=1e-5)


def test_answers_at_the_last_position_are_read_from_prompts_that_do_not_name_patches(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding="right", named=False)
    metric = cv.metrics.logit_diff(5, 6)
    swept = model.sweep(inputs, [edits.ablate("language.blocks.0.hook_mlp_out")], metric, progress=False)
    with torch.no_grad():
        logits = model(inputs)
    last = model.tokens(inputs)["language"].last()
    rows = torch.stack([logits[row, position] for row, position in enumerate(last)])
    torch.testing.assert_close(swept.clean, rows[:, 5] - rows[:, 6], rtol=1e-9, atol=1e-10)


def test_pairs_of_prompts_that_do_not_name_patches_run_in_batches(model: cv.HookedModel) -> None:
    def examples(seed: int) -> list[dict[str, Tensor]]:
        made = openvla_inputs(model, 3, seed, torch.float64, "left", named=False)
        rows = [{name: value[row, None] for name, value in made.items()} for row in range(3)]
        real = [row["attention_mask"][0].bool() for row in rows]
        return [
            {name: value if name == "pixel_values" else value[:, keep] for name, value in row.items()}
            for row, keep in zip(rows, real, strict=True)
        ]

    clean, corrupt = examples(0), examples(1)
    pairs = cv.data.Pairs(inputs=clean, corrupt_inputs=corrupt, answers=[5, 6, 7], foils=[8, 9, 8])
    sites = ["vision_2.blocks.1.hook_mlp_out", "language.blocks.1.attn.hook_z"]
    swept = model.sweep(pairs, [edits.replace(site, pairs.corrupt) for site in sites], "logit_diff", progress=False)
    with torch.no_grad():
        for row in range(3):
            answer, foil = pairs.clean.answers[row], pairs.clean.foils[row]
            for number, site in enumerate(sites):
                _, cache = model.run_with_cache(corrupt[row], site)
                logits = model.run(clean[row], [edits.replace(site, cache)])[0, -1]
                torch.testing.assert_close(
                    swept.values[number, row], logits[answer] - logits[foil], rtol=1e-5, atol=1e-5
                )


# ---- actions as words and as numbers


def test_tokens_that_say_actions_have_words(model: cv.HookedModel) -> None:
    wrapped = cv.HookedModel(model.module, case("openvla").processor())  # type: ignore[misc]
    bins = actions.ActionTokens.of(model.config)
    for one in (model, wrapped):
        values = bins.values(bins.ids)
        for number, value in zip(bins.ids, values, strict=True):
            found = one.token(f"action {value:+.3f}")
            assert found == number or bins.values(found) == value
        assert one.token("action 1") == bins.of_values(0.99)
        with pytest.raises(InputError, match="from -1 to 1"):
            one.token("action 7")
        with pytest.raises(InputError, match="from -1 to 1"):
            one.token("action left")
    ids = torch.tensor([[bins.ids[0], bins.ids[-1], 7]])
    assert wrapped.to_str_tokens(ids) == [["action +0.933", "action -0.933", ":"]]
    inputs = openvla_inputs(model, 2, dtype=torch.float64)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    lens = cv.readout.logit_lens(model, cache, tower="language", targets=["action 0.5", "action -0.5"])
    difference = logits[:, -1, bins.of_values(0.5)] - logits[:, -1, bins.of_values(-0.5)]
    found = cv.metrics.logit_diff("action 0.5", "action -0.5").bind(model)(logits, inputs)
    torch.testing.assert_close(found, difference)
    assert lens.values.isfinite().all()
    value_vectors = cv.readout.value_vectors(model.language, 4)
    said = cv.families.action_bins(value_vectors.ids, model.config.n_words, n_bins=16)
    assert bool(said.isfinite().any())


def test_an_action_dimension_is_the_mean_over_bins_where_the_prompt_has_come_to_it(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 3, dtype=torch.float64, padding="left", named=False)
    bins = actions.ActionTokens.of(model.config)
    first, end = bins.ids[0], bins.ids[-1] + 1
    # Prompts of this zoo are words, and the last sixteen words are the bins: none at the end of these.
    inputs["input_ids"][:, -1] = 7
    spoken = torch.tensor([[first + 3, first + 9]]).expand(3, 2)
    both = {
        **inputs,
        "input_ids": torch.cat([inputs["input_ids"], spoken], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(3, 2, dtype=torch.long)], 1),
    }
    with torch.no_grad():
        logits = model(both)
    for dim in range(3):
        metric = cv.metrics.action_dim(dim)
        rows = logits[:, -3 + dim, first:end].softmax(-1)
        expected = rows @ torch.tensor(bins.values(range(first, end)))
        swept = model.sweep(both, [edits.ablate("vision_2.blocks.0.hook_mlp_out")], metric, progress=False)
        torch.testing.assert_close(swept.clean, expected, rtol=1e-8, atol=1e-10)
    with pytest.raises(InputError, match="behind 1 action tokens"):
        model.sweep(inputs, [edits.ablate("vision.blocks.0.hook_mlp_out")], cv.metrics.action_dim(1), progress=False)
    written = dict(cv.metrics.action_dim(1).bind(model).__provenance__())
    assert "bins" not in written


def test_methods_take_prompts_that_do_not_name_patches(model: cv.HookedModel) -> None:
    clean, corrupt = (openvla_inputs(model, 3, seed, torch.float64, "right", named=False) for seed in (0, 1))
    named = [openvla_inputs(model, 3, seed, torch.float64, "right") for seed in (0, 1)]
    metric, sites = cv.metrics.logit_diff(5, 6), "vision_2.blocks.*.attn.hook_z"

    def patched(clean: Any, corrupt: Any) -> Tensor:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = cv.patching.activation_patch(
                model, metric=metric, clean=clean, corrupt=corrupt, sites=sites, progress=False
            )
        return found.values

    torch.testing.assert_close(patched(clean, corrupt), patched(*named), rtol=0, atol=0, equal_nan=True)
    for method in (cv.readout.occlusion, cv.readout.chefer_relevance):
        found = (
            method(model, clean, metric, tower="vision_2")
            if method is cv.readout.chefer_relevance
            else method(model, clean, metric)
        )
        assert found.values[-9:].isfinite().all()
    relevance = cv.readout.legrad(model, clean, lambda out: out.flatten(1).sum(1), tower="vision_2", score="output")
    assert relevance.values.shape == (9, 3)
    with torch.no_grad():
        fresh = cv.readout.logit_lens(model, clean, tower="vision_2", targets=[5])
        _, cache = model.run_with_cache(clean)
        kept = cv.readout.logit_lens(model, cache, tower="vision_2", targets=[5])
    # Patterns, which the cache holds, are those of eager attention.
    torch.testing.assert_close(fresh.values, kept.values, rtol=1e-4, atol=1e-5)
    # A tower's own read-out has positions of patches, not the output's: a metric of the output cannot read it.
    with pytest.raises(InputError, match="read-out has the shape"):
        cv.readout.legrad(model, clean, metric, tower="vision_2")


def test_a_sweep_of_the_second_backbone_may_edit_the_connector_that_both_feed(model: cv.HookedModel) -> None:
    inputs = openvla_inputs(model, 1, dtype=torch.float64)
    head = edits.ablate("vision_2.blocks.1.attn.hook_z", "zero", heads=[0])
    groups = [(head,), (head, edits.scale("projector.hook_out", 0.5))]
    metric = cv.metrics.logit_diff(3, 5)
    with torch.no_grad():
        wanted = torch.stack([metric(model.run(inputs, group), inputs) for group in groups])
    swept = model.sweep(inputs, groups, metric, progress=False)
    assert torch.allclose(swept.values, wanted, atol=1e-5)
    assert not torch.allclose(swept.values[0], swept.values[1], atol=1e-3)

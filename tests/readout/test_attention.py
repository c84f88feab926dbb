"""Attention in numbers: planted patterns with known answers, uniform attention in every family, naive loops, and what is refused."""

from __future__ import annotations

import copy
import math
import warnings
from functools import cache as remember
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.readout import attention_entropy, attention_mass, distance_profile, position_pattern
from circuitvision.readout.attention.distance import DistanceProfile, PositionPattern
from circuitvision.readout.attention.mass import AttentionSummary
from tests.parts import module_of
from tests.readout.layouts import by_row
from tests.zoo import CASES, Case, case, parametrize, shared_model

PATTERNS = "**.hook_pattern"


@remember
def wrapped(name: str) -> cv.HookedModel:
    """One wrapped model per case, never changed."""
    return cv.HookedModel(shared_model(name))


def run(
    name: str, padding: str | None = None, batch: int = 2
) -> tuple[cv.HookedModel, dict[str, Any], ActivationCache]:
    model = wrapped(name)
    inputs = case(name).inputs(model.module, batch=batch, padding=padding)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
    return model, inputs, cache


def planted(name: str, tower: str, fn: Any, batch: int = 2) -> tuple[cv.HookedModel, ActivationCache]:
    """A cache of a run in which ``fn(shape)`` stands in the place of every pattern of a tower."""
    model = wrapped(name)
    inputs = case(name).inputs(model.module, batch=batch)
    hook = (f"{tower}.blocks.*.attn.hook_pattern", lambda pattern, hook: fn(pattern).to(pattern).expand_as(pattern))
    with torch.no_grad(), model.hooks([hook]):
        _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
    return model, cache


def paddings(entry: Case) -> list[str | None]:
    return [None, *(side for side in ("left", "right") if f"padding_{side}" in entry.tags)]


def without_queries(entry: Case) -> torch.nn.Module:
    """A copy whose queries are zero, so that every head looks at all it can see alike."""
    module = copy.deepcopy(shared_model(entry.name))
    for tower in cv.HookedModel(module).towers.values():
        for block in tower.blocks:
            projection: Any = module_of(block, "q")
            with torch.no_grad():
                projection.weight.zero_()
                if projection.bias is not None:
                    projection.bias.zero_()
    return module


@pytest.mark.filterwarnings("ignore:.*padding never counts")
@parametrize()
def test_shares_of_kinds_add_up_in_every_tower(case: Case):
    model = wrapped(case.name)
    for side in paddings(case):
        inputs = case.inputs(model.module, batch=2, padding=side)
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
        tokens = model.tokens(inputs)
        for tower in model.towers:
            result = attention_mass(model, cache, tokens, tower=tower)
            assert result.axes["span"][-1] == "everything"
            assert "padding" not in result.axes["span"]
            ones = torch.ones(by_row(result).shape[:-1])
            # Rows of cameras that are not there look at nothing.
            ones[:, :, ~torch.from_numpy(tokens[tower].present.any(1))] = float("nan")
            torch.testing.assert_close(by_row(result)[..., :-1].sum(-1), ones, equal_nan=True)
            torch.testing.assert_close(by_row(result)[..., -1], ones, equal_nan=True)
            torch.testing.assert_close(by_row(result, "uniform")[..., :-1].sum(-1), ones[:, 0], equal_nan=True)
            assert by_row(result).shape[2] == tokens[tower].n_rows
            entropy = attention_entropy(cache.model, cache, tokens, tower=tower)
            assert float(by_row(entropy).nan_to_num(0.0).min()) >= 0
            assert bool(((by_row(entropy) <= by_row(entropy, "uniform")[:, None] + 1e-5) | torch.isnan(ones)).all())


@pytest.mark.filterwarnings("ignore:.*padding never counts")
@parametrize(without=("pooling_head",))
def test_heads_that_look_alike_have_the_entropy_and_mass_of_the_keys_they_see(case: Case):
    model = cv.HookedModel(without_queries(case))
    for side in paddings(case):
        inputs = case.inputs(model.module, batch=2, padding=side)
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
        for tower, tokens in model.tokens(inputs).items():
            mass, entropy = (fn(cache.model, cache, tower=tower) for fn in (attention_mass, attention_entropy))
            heads = by_row(mass).shape[1]
            torch.testing.assert_close(
                by_row(mass), by_row(mass, "uniform")[:, None].expand_as(by_row(mass)), equal_nan=True
            )
            torch.testing.assert_close(
                by_row(entropy), by_row(entropy, "uniform")[:, None].expand(-1, heads, -1), equal_nan=True
            )
            # MetaCLIP 2 reads texts at their first end, which stands amid some of these texts.
            if tower == "action" or "sliding" in case.tags or (case.name, tower) == ("metaclip2", "text"):
                continue
            # By default the last position, or every position of a tower without order, sees all that is no padding.
            real = torch.from_numpy(tokens.present)
            known = real.sum(-1).double().log().float().masked_fill(~real.any(-1), float("nan"))
            torch.testing.assert_close(by_row(entropy), known.expand_as(by_row(entropy)), equal_nan=True)
            for index, kind in enumerate(mass.axes["span"][:-1]):
                share = tokens.mask(kind).sum(-1) / real.sum(-1)
                torch.testing.assert_close(
                    by_row(mass)[..., index], share.expand(by_row(mass).shape[:-1]), equal_nan=True
                )


def test_one_hot_attention_has_no_entropy_and_gives_one_span_everything():
    def to_register(pattern: Tensor) -> Tensor:
        return torch.zeros_like(pattern).index_fill_(-1, torch.tensor([2]), 1.0)

    _, cache = planted("dinov2-registers", "vision", to_register)
    mass = attention_mass(cache.model, cache)
    assert mass.axes["span"] == ["cls", "register", "patch", "everything"]
    torch.testing.assert_close(by_row(mass.span("register")), torch.ones(by_row(mass).shape[:-1]))
    assert torch.equal(by_row(mass.span("patch")), torch.zeros(by_row(mass).shape[:-1]))
    assert torch.equal(by_row(attention_entropy(cache.model, cache)), torch.zeros(by_row(mass).shape[:-1]))
    within = attention_entropy(cache.model, cache, span="register")
    assert torch.equal(by_row(within), torch.zeros(by_row(mass).shape[:-1]))


def test_an_object_box_counts_the_patches_under_it():
    def falling(pattern: Tensor) -> Tensor:
        weights = torch.arange(pattern.shape[-1], 0, -1.0)
        return weights / weights.sum()

    model, cache = planted("vit", "vision", falling)
    tokens = model.tokens(cache.inputs)["vision"]
    left, top, right, bottom = tokens.box[0, tokens.positions("patch")[5]]
    box = tokens.image(0).box(left, top, right, bottom)
    result = attention_mass(
        model, cache, tokens, spans={"object": box, "rest": tokens.select("patch") - box, "class": "cls"}
    )
    weights = torch.arange(17, 0, -1.0) / torch.arange(17, 0, -1.0).sum()
    assert box.positions() == [6]
    expected = torch.stack([weights[6], weights[1:].sum() - weights[6], weights[0]])
    torch.testing.assert_close(by_row(result), expected.expand_as(by_row(result)))
    torch.testing.assert_close(by_row(result, "uniform")[0, 0], torch.tensor([1 / 17, 15 / 17, 1 / 17]))


@pytest.mark.parametrize(
    ("name", "side"), [("llava-next-llama", "left"), ("paligemma2", "right"), ("siglip2-vision", None)]
)
def test_mass_and_entropy_equal_loops_over_every_query_and_key(name: str, side: str | None):
    model, inputs, cache = run(name, side)
    for tower, tokens in model.tokens(inputs).items():
        mass = attention_mass(model, cache, tower=tower, queries="patch", spans={"patch": "patch"})
        entropy = attention_entropy(model, cache, tower=tower, queries="patch", span="patch")
        for number, layer in enumerate(mass.axes["layer"]):
            pattern = cache[tower, "pattern", layer].double()
            for row in range(tokens.n_rows):
                patches = tokens.positions("patch", row=row)
                for head in range(pattern.shape[1]):
                    shares = [[float(pattern[row, head, q, k]) for k in patches] for q in patches]
                    sums = [sum(line) for line in shares]
                    bits = [
                        -sum(p / total * math.log(p / total) for p in line if p > 0)
                        for line, total in zip(shares, sums, strict=True)
                        if total > 0
                    ]
                    assert float(by_row(mass)[number, head, row, 0]) == pytest.approx(np.mean(sums), abs=1e-5)
                    assert float(by_row(entropy)[number, head, row]) == pytest.approx(np.mean(bits), abs=1e-5)


def test_default_queries_are_the_last_word_or_all_that_reach_the_output():
    model, inputs, cache = run("llava-clip-llama", "right")
    tokens = model.tokens(inputs)["language"]
    default = attention_mass(model, cache)
    assert default.tower == "language"
    for row, last in enumerate(tokens.last()):
        pattern = cache["language", "pattern", 1][row, :, last]
        torch.testing.assert_close(
            by_row(default.span("patch"))[1, :, row], pattern[:, tokens.positions("patch", row=row)].sum(-1)
        )
    assert torch.equal(by_row(attention_mass(cache.model, cache, queries="last")), by_row(default))
    _, _, cache = run("vit")
    by_default, by_cls = attention_mass(cache.model, cache), attention_mass(cache.model, cache, queries="cls")
    torch.testing.assert_close(by_row(by_default)[-1], by_row(by_cls)[-1])
    torch.testing.assert_close(by_row(by_default)[0], by_row(attention_mass(cache.model, cache, queries="all"))[0])
    assert not torch.allclose(by_row(by_default)[0], by_row(by_cls)[0])
    assert attention_mass(cache.model, cache, queries="patch").dead_layers == [2]
    model, inputs, cache = run("clip", "right")
    tokens = model.tokens(inputs)["text"]
    assert attention_mass(model, cache).tower == "vision"
    chosen = torch.zeros(tokens.kind.shape, dtype=torch.bool)
    chosen[torch.arange(tokens.n_rows), torch.tensor(tokens.last())] = True
    text = attention_mass(cache.model, cache, tower="text")
    torch.testing.assert_close(by_row(attention_mass(cache.model, cache, tower="text", queries=chosen)), by_row(text))


def test_queries_can_be_named_in_every_way():
    model, inputs, cache = run("vit")
    tokens = model.tokens(inputs)["vision"]
    by_number = by_row(attention_mass(cache.model, cache, queries=[3, 4]))
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[:, 3:5] = True
    selected = tokens.image(0).patch(0, 2) | tokens.image(0).patch(0, 3)
    for queries in (mask, mask.numpy(), mask[0], selected, (3, -13)):
        torch.testing.assert_close(by_row(attention_mass(cache.model, cache, queries=queries)), by_number)


def test_padding_is_never_a_query_and_a_row_without_queries_is_nan():
    model, inputs, cache = run("llava-clip-llama", "left")
    tokens = model.tokens(inputs)["language"]
    padded = [row for row in range(2) if tokens.kind[row, 0] == "padding"]
    with pytest.warns(UserWarning, match="no query"):
        result = attention_mass(cache.model, cache, queries=0)
    assert torch.isnan(by_row(result)[:, :, padded]).all()
    assert torch.isfinite(by_row(result)[:, :, [row for row in range(2) if row not in padded]]).all()
    values = cache["language", "pattern", 0].clone()
    values[torch.from_numpy(tokens.kind == "padding")[:, None].expand(values.shape[:3])] = float("nan")
    cache._values["language.blocks.0.attn.hook_pattern"] = values
    assert torch.isfinite(by_row(attention_mass(cache.model, cache, queries="all", layers=0))).all()


def test_an_empty_selection_is_nan_where_it_is_empty_and_a_missing_kind_is_zero():
    model, inputs, cache = run("pi0", "right")
    tokens = model.tokens(inputs)["language"]
    second = tokens.image(1)
    assert [bool(second.positions(row)) for row in range(2)] == [True, False]
    with pytest.warns(UserWarning, match="empty for camera 1 in 1"):
        result = attention_mass(cache.model, cache, spans={"camera 1": second, "words": "text"})
    assert torch.isfinite(by_row(result)[:, :, 0]).all()
    assert torch.isnan(by_row(result)[:, :, 1, 0]).all()
    assert torch.isnan(by_row(result, "uniform")[:, 1, 0]).all()
    assert torch.isfinite(by_row(result)[..., 1]).all()
    some = tokens.kind.copy()
    some[1, some[1] == "patch"] = "text"
    other = type(tokens)(**{**vars(tokens), "kind": some})
    assert (
        float(
            by_row(attention_mass(cache.model, cache, {"language": other}, spans={"p": "patch"}))[:, :, 1].abs().max()
        )
        == 0.0
    )


def test_entropy_within_a_span_without_mass_is_nan():
    _, cache = planted("vit", "vision", lambda pattern: torch.eye(17)[0])
    with pytest.warns(UserWarning, match="gives the span any attention"):
        result = attention_entropy(cache.model, cache, span="patch")
    assert torch.isnan(by_row(result)).all()
    spread = planted("vit", "vision", lambda pattern: torch.full((17,), 1 / 17))[1]
    assert float(by_row(attention_entropy(spread.model, spread, span="patch"))[0, 0, 0]) == pytest.approx(
        math.log(16), abs=1e-5
    )
    raw = by_row(attention_entropy(spread.model, spread, span="patch", renormalise=False))[0, 0, 0]
    assert float(raw) == pytest.approx(16 / 17 * math.log(17), abs=1e-5)


def test_queries_that_cannot_see_the_span_are_left_out_of_its_entropy():
    model, inputs, cache = run("llava-clip-llama", batch=1)
    tokens = model.tokens(inputs)["language"]
    last_two = tokens.positions("patch")[-2:]
    span = torch.zeros(1, tokens.n_positions, dtype=torch.bool)
    span[:, last_two] = True
    result = attention_entropy(model, cache, span=span, queries="patch")
    shares = cache["language", "pattern", 0][0, :, last_two[1], last_two]
    # The first of the two sees itself alone, the second both; no other patch sees either.
    known = torch.special.entr(shares / shares.sum(-1, keepdim=True)).sum(-1) / 2
    torch.testing.assert_close(by_row(result)[0, :, 0], known)
    assert float(by_row(result, "uniform")[0, 0]) == pytest.approx(math.log(2) / 2)


def test_an_action_tower_looks_at_its_prefix_first():
    model, inputs, cache = run("pi0", "left")
    tokens = model.tokens(inputs)
    language = tokens["language"]
    result = attention_mass(
        model,
        cache,
        spans={"camera 0": language.image(0), "words": language.select("text"), "own": ["state", "action"]},
    )
    assert result.tower == "action"
    torch.testing.assert_close(by_row(result).sum(-1)[:, :, 1], torch.ones(3, 4))
    pattern = cache["action", "pattern", 0]
    torch.testing.assert_close(
        by_row(result)[0, :, :, 0], (pattern[..., :24] * language.image(0).tensor[:, None, None]).sum(-1).mean(-1).T
    )
    # An edit that knows the layout by its own means hides what the span names.
    with model.record("action.blocks.*.attn.hook_pattern") as blind:
        model.run(inputs, [edits.block_attention("action", queries=None, keys=language.image(0))])
    blocked = attention_mass(
        blind.model, blind, tokens, spans={"camera 0": language.image(0), "words": "text"}, queries="all"
    )
    assert float(by_row(blocked)[..., 0].max()) == 0.0
    assert float(by_row(blocked)[..., 1].min()) > 0.0
    # In the last layer only actions are read.
    torch.testing.assert_close(
        by_row(attention_mass(cache.model, cache))[-1], by_row(attention_mass(cache.model, cache, queries="action"))[-1]
    )


def test_a_decoding_pass_is_the_last_query_of_the_whole_text():
    model, inputs, _ = run("llava-clip-llama", batch=1)
    with torch.no_grad(), model.record("language.blocks.*.attn.hook_pattern") as steps:
        ids = model.generate(inputs, max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    tokens = model.tokens(inputs)
    longer = {**inputs, "input_ids": ids[:, :-1], "attention_mask": torch.ones_like(ids[:, :-1])}
    with torch.no_grad():
        _, whole = model.run_with_cache(longer, names_filter=PATTERNS)
    result = attention_mass(model, steps, tokens, step=2)
    assert result.axes["span"] == ["text", "patch", "generated", "everything"]
    first = tokens["language"].n_positions
    generated = torch.zeros(1, ids.shape[1] - 1, dtype=torch.bool)
    generated[:, first:] = True
    known = attention_mass(whole.model, whole, tower="language", spans={"patch": "patch", "generated": generated})
    torch.testing.assert_close(by_row(result)[..., 1:3], by_row(known), atol=1e-5, rtol=1e-4)
    with pytest.raises(InputError, match="3 passes"):
        attention_mass(model, steps, tokens)
    with pytest.raises(InputError, match="outside the 3 passes"):
        attention_mass(model, steps, tokens, step=3)


def test_denoising_steps_are_read_one_by_one():
    model, inputs, single = run("pi0")
    with torch.no_grad(), model.record("action.blocks.*.attn.hook_pattern") as steps:
        model.sample_actions(inputs, num_steps=2)
    tokens = model.tokens(inputs)
    first, second = (attention_mass(steps.model, steps, tokens, step=step) for step in (0, 1))
    assert first.axes == attention_mass(single.model, single).axes
    assert not torch.allclose(by_row(first), by_row(second))


def test_an_attention_pool_has_a_probe_for_a_query():
    _, _, cache = run("siglip")
    result = attention_mass(cache.model, cache, tower="vision", layers="pool")
    pattern = cache["vision.pool.attn.hook_pattern"]
    assert result.axes["layer"] == ["pool"]
    torch.testing.assert_close(by_row(result.span("patch"))[0], pattern.sum((-2, -1)).T)
    with pytest.raises(InputError, match="probe"):
        attention_mass(cache.model, cache, tower="vision", layers="pool", queries="last")
    with pytest.raises(InputError, match="'pool' where"):
        attention_mass(cache.model, cache, tower="text", layers="pool")


def test_unread_layers_are_left_out_unless_asked_for():
    _, _, cache = run("llava-clip-llama")
    result = attention_mass(cache.model, cache, tower="vision")
    assert result.axes["layer"] == [0, 1]
    assert result.dead_layers == []
    asked = attention_mass(cache.model, cache, tower="vision", layers=[0, 2])
    assert (asked.axes["layer"], asked.dead_layers) == ([0, 2], [2])
    assert attention_mass(cache.model, cache, tower="vision", layers=-1).axes["layer"] == [2]


def test_results_come_back_from_files(tmp_path):
    _, _, cache = run("vit")
    for result, kind in (
        (attention_mass(cache.model, cache), AttentionSummary),
        (distance_profile(cache.model, cache), DistanceProfile),
        (position_pattern(cache.model, cache), PositionPattern),
    ):
        again = kind.load(result.save(tmp_path / f"{kind.__name__}.npz"))
        assert again.axes == result.axes
        torch.testing.assert_close(by_row(again), by_row(result), equal_nan=True)
        assert len(again.to_frame()) == by_row(result).numel()
        assert result.provenance["dataset_sha256"]


def test_half_precision_is_summed_in_single_and_nothing_is_left_behind():
    module = copy.deepcopy(shared_model("llava-clip-llama")).bfloat16()
    model = cv.HookedModel(module)
    inputs = case("llava-clip-llama").inputs(module, batch=1, dtype=torch.bfloat16)
    before = {name: len(part._forward_hooks) for name, part in module.named_modules()}
    _, cache = model.run_with_cache(inputs, names_filter=PATTERNS)
    with torch.inference_mode():
        result = attention_mass(cache.model, cache)
    assert by_row(result).dtype == torch.float32
    torch.testing.assert_close(by_row(result)[..., -1], torch.ones(2, 4, 1), atol=1e-2, rtol=0)
    assert all(parameter.grad is None for parameter in module.parameters())
    assert {name: len(part._forward_hooks) for name, part in module.named_modules()} == before


def test_caches_of_one_row_and_from_files_serve_as_well(tmp_path):
    model, inputs, cache = run("vit", batch=1)
    known = by_row(attention_mass(cache.model, cache))
    assert torch.equal(by_row(attention_mass(cache.model, cache.remove_batch_dim())), known)
    loaded = ActivationCache.load(cache.save(tmp_path / "cache.safetensors"), model, inputs)
    assert torch.equal(by_row(attention_mass(loaded.model, loaded)), known)
    unknown = ActivationCache.load(tmp_path / "cache.safetensors", model)
    assert torch.equal(by_row(attention_mass(unknown.model, unknown, model.tokens(inputs))), known)
    with pytest.raises(InputError, match="does not know its inputs"):
        attention_mass(model, unknown)
    alone = ActivationCache.load(tmp_path / "cache.safetensors")
    assert torch.equal(by_row(attention_mass(model, alone, model.tokens(inputs))), known)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tower": "sight"}, "no tower"),
        ({"spans": {}}, "spans is empty"),
        ({"spans": {"a": "register"}}, "'a' is empty"),
        ({"spans": {"a": "colour"}}, "'colour' is not understood"),
        ({"spans": {"a": torch.zeros(2, 16, dtype=torch.bool)}}, "'a' is empty"),
        ({"spans": {"a": torch.zeros(2, 9, dtype=torch.bool)}}, "9 entries"),
        ({"spans": {"a": 99}}, "outside the 16"),
        ({"spans": {"a": 1.5}}, "not understood"),
        ({"queries": "first"}, "not understood"),
        ({"queries": True}, "not understood"),
        ({"layers": 7}, "layers 0 to 1"),
        ({"layers": []}, "layers 0 to 1"),
        ({"layers": "all"}, "not understood"),
        ({"step": 1}, "outside the 1 passes"),
        ({"tokens": 3}, "model.tokens"),
    ],
)
def test_meaningless_requests_are_refused(options: dict[str, Any], message: str):
    _, _, cache = run("llava-clip-llama")
    with pytest.raises(InputError, match=message):
        attention_mass(cache.model, cache, **options)


def test_spans_and_queries_of_another_tower_or_run_are_refused():
    model, inputs, cache = run("llava-clip-llama")
    vision = model.tokens(inputs)["vision"]
    with pytest.raises(InputError, match=r"of the vision tower, but the language tower looks at positions of language"):
        attention_mass(model, cache, spans={"object": vision.image(0)})
    with pytest.raises(InputError, match="of the vision tower, not of language"):
        attention_mass(model, cache, queries=vision.image(0))
    one = model.tokens(case("llava-clip-llama").inputs(model.module, batch=1))
    with pytest.raises(InputError, match="another run"):
        attention_mass(model, cache, spans={"object": one["language"].image(0)})
    with pytest.raises(InputError, match="another run"):
        attention_mass(model, cache, queries=one["language"].image(0))
    with pytest.raises(InputError, match="another run"):
        attention_mass(model, cache, one)
    longer = model.tokens(case("llava-clip-llama-full").inputs(shared_model("llava-clip-llama-full"), batch=2))
    with pytest.raises(InputError, match="does not fit"):
        attention_mass(
            model,
            cache,
            {"language": wrapped("llava-clip-llama-full").tokens(run("llava-clip-llama-full")[1])["language"]},
        )
    assert longer


def test_a_cache_without_patterns_says_what_to_run():
    model, inputs, _ = run("llava-clip-llama")
    _, cache = model.run_with_cache(inputs, names_filter="language.blocks.0.attn.hook_z")
    with pytest.raises(InputError, match=r"names_filter='\*\.blocks\.\*\.attn\.hook_pattern'"):
        attention_mass(model, cache)
    _, cache = model.run_with_cache(inputs, names_filter="language.blocks.0.attn.hook_pattern")
    with pytest.raises(InputError, match=r"names_filter='vision\.blocks\.\*\.attn\.hook_pattern'"):
        attention_entropy(model, cache, tower="vision")
    with pytest.raises(InputError, match=r"no pattern of layer 1"):
        attention_entropy(model, cache, layers=1)


def test_a_span_that_was_not_measured_is_refused():
    with pytest.raises(InputError, match="There is no span"):
        attention_mass(*run("vit")[::2]).span("text")


def test_a_trained_head_finds_the_object_that_the_question_names():
    from circuitvision.data.questions import sample_question_pairs

    model = cv.organisms.load("shapes-llava")
    pairs = sample_question_pairs(12, seed=0)
    inputs = model.inputs(images=[pair.clean.image for pair in pairs], text=[pair.prompt for pair in pairs])
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter="language.blocks.*.attn.hook_pattern")
    tokens = model.tokens(inputs)["language"]
    inside = torch.zeros(tokens.kind.shape, dtype=torch.bool)
    for row, pair in enumerate(pairs):
        inside[row, tokens.in_box(*pair.question.subject.box, row=row)] = True
    result = attention_mass(cache.model, cache, tokens, spans={"object": inside})
    share = by_row(result)[..., 0].mean(-1)
    assert float(share.max()) > 0.8
    assert float(by_row(result, "uniform").max()) < 0.1


def test_every_case_was_read():
    assert len(CASES) > 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention_mass(*run("vit")[::2])


def test_default_queries_that_hang_on_unknown_words_are_refused():
    model, inputs, cache = run("clip")
    bare = ActivationCache({site: cache[site] for site in model.sites("text.blocks.*.attn.hook_pattern")}, model)
    tokens = model.tokens(inputs)
    with pytest.raises(InputError, match="queries="):
        attention_mass(model, bare, tokens, tower="text")
    every = attention_mass(model, bare, tokens, tower="text", queries="all")
    assert torch.equal(every.values, attention_mass(model, cache, tower="text", queries="all").values)

"""What a lens holds fixed, what it adds up to, and what it never holds: frozen norms, heads as they are written, directions, and memory."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.lens import run as lens_module
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.patch_coords import on_grid
from tests.parts import module_of
from tests.readout.common import NAMES, run
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model

PROJECTED = [name for name in NAMES if any(tower.reader is not tower for tower in run(name)[0].towers.values())]


def parts_of(model, cache, tower: str, **options) -> tuple[torch.Tensor, torch.Tensor]:
    """The frozen lens of everything written to the stream, summed and corrected for the constant, and of the stream itself."""
    end = max(model.towers[tower].feature_layers_in())
    branches = [f"{tower}.blocks.{layer}.hook_{kind}_out" for layer in range(end) for kind in ("attn", "mlp")]
    names = [f"{tower}.hook_input", *branches]
    whole = model.towers[tower].residual_name(end)
    read = logit_lens(model, cache, tower, norm="frozen", sites=[*names, whole], **options)
    blank = cv.ActivationCache({key: value.clone() for key, value in cache.items()}, model, cache.inputs)
    blank._values[names[1]].zero_()
    constant = by_row(logit_lens(model, blank, tower, norm="frozen", sites=names[1], **options))[0]
    labels = [f"{tower}.{label}" for label in read.axes["site"]]
    shares = by_row(read)[[labels.index(name) for name in names]]
    return shares.sum(0) - (len(names) - 1) * constant, by_row(read)[labels.index(whole)]


# -- frozen norms --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PROJECTED)
def test_behind_a_projector_the_frozen_lens_is_the_plain_one_where_the_patches_leave(name):
    model, _, cache = run(name)
    own, frozen, bare = (
        by_row(logit_lens(model, cache, "vision", targets={3: 3, 5: 5}, norm=norm))
        for norm in ("own", "frozen", "none")
    )
    torch.testing.assert_close(frozen[-1], own[-1], atol=3e-5, rtol=1e-4)
    for other in (own, bare):
        assert not torch.allclose(frozen[0], other[0], atol=1e-3)


@pytest.mark.parametrize("name", ["paligemma", "pi0", "siglip", "clip"])
def test_shares_of_a_patch_add_up_through_a_linear_projector_and_a_pooling_head(name):
    """In float64: input, attentions and MLPs, each read by the frozen lens, are the frozen lens of the stream at every position."""
    model, _, cache = run(name, torch.float64)
    found, wanted = parts_of(model, cache, "vision", targets={0: 0, 1: 1})
    torch.testing.assert_close(found, wanted, atol=1e-10, rtol=1e-10)


def test_behind_an_mlp_both_norms_are_held_and_the_activation_is_not():
    model, _, cache = run("llava-clip-llama", torch.float64)
    inner = model.module.model
    final, early = (
        cache[model.vision.residual_name(layer)][:, 1:] for layer in (max(model.vision.feature_layers_in()), 1)
    )
    with torch.no_grad():
        there, here = inner.multi_modal_projector(final), inner.multi_modal_projector(early)
        norm = inner.language_model.norm
        scale = (there.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
        wanted = model.module.lm_head(here / scale * norm.weight)[..., [3, 5]]
    found = by_row(logit_lens(model, cache, "vision", targets={3: 3, 5: 5}, norm="frozen"))[1]
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_a_norm_before_the_projector_is_held_as_well_or_left_out():
    model, _, cache = run("paligemma", torch.float64)
    inner, early = model.module.model, cache["vision.hook_input"]
    final = cache[model.vision.residual_name(max(model.vision.feature_layers_in()))]
    norm, after = model.vision.root.post_layernorm, inner.language_model.norm
    with torch.no_grad():
        centred = final - final.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        held = (early - early.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
        projected = inner.multi_modal_projector(norm(final))
        root = (projected.pow(2).mean(-1, keepdim=True) + after.eps).sqrt()
        head = model.module.lm_head
        wanted = {
            "frozen": head(inner.multi_modal_projector(held) / root * (1 + after.weight)),
            "none": head(inner.multi_modal_projector(early)),
        }
    for policy, logits in wanted.items():
        found = by_row(logit_lens(model, cache, "vision", targets=[3], norm=policy))[0]
        torch.testing.assert_close(found, logits[..., [3]], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["siglip", "siglip2"])
def test_a_pooling_head_keeps_what_follows_its_attention(name):
    """By hand: value path of the patch alone with the run's scale, the run's MLP, the length of the run's embedding."""
    model, _, cache = run(name, torch.float64)
    module, head = model.module, model.module.vision_model.head
    final, early = (
        cache[f"vision.{site}"] for site in (f"blocks.{model.vision.cfg.n_layers - 1}.hook_resid_post", "hook_input")
    )
    norm, attention = module.vision_model.post_layernorm, head.attention
    with torch.no_grad():
        centred = final - final.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        held = (early - early.mean(-1, keepdim=True)) / scale * norm.weight + norm.bias
        weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]

        def alone(x):
            return attention.out_proj(x @ weight.T + bias)

        attended = alone(norm(final))
        rest = head.mlp(head.layernorm(attended))
        own = attended + rest
        text = module.text_model.head(cache["text.hook_readout"]) if hasattr(module.text_model, "head") else None
        text = text / text.norm(dim=-1, keepdim=True)
        embedding = (alone(held) + rest) / own.norm(dim=-1, keepdim=True)
        wanted = embedding @ text.T * module.logit_scale.exp() + module.logit_bias
    found = by_row(logit_lens(model, cache, "vision", targets={0: 0, 1: 1}, norm="frozen"))[0]
    torch.testing.assert_close(found, wanted[..., :2], atol=1e-6, rtol=1e-6)


# -- heads and directions ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "tower"), [("dinov2", "vision"), ("paligemma2", "language"), ("vit", "vision")])
def test_heads_are_read_as_they_are_added_to_the_stream(name, tower):
    """LayerScale and a sandwich norm come between W_O and the stream: the shares add up to what attention wrote, less its bias."""
    model, _, cache = run(name, torch.float64, everything=True)
    owner = model.towers[tower]
    directions = torch.randn(2, owner.cfg.d_model, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    options = {"targets": directions, "norm": "none"}
    heads = logit_lens(model, cache, tower, sites="attn.hook_result", **options)
    whole = logit_lens(model, cache, tower, sites="attn_out", **options)
    for at, layer in enumerate(heads.axes["layer"]):
        block = owner.blocks[layer]
        bias = block.b_O.detach()
        if name == "dinov2":
            bias = bias * module_of(block, "attn_add").lambda1.detach()
        wanted = by_row(whole)[whole.axes["layer"].index(layer)] - bias @ directions.T
        torch.testing.assert_close(by_row(heads)[at].sum(0), wanted, atol=1e-6, rtol=1e-6)


def test_a_direction_stands_for_a_column_of_the_head_under_every_norm():
    model, _, cache = run("llava-clip-llama")
    column = model.language.W_U[:, 4]
    for norm in ("own", "frozen", "none"):
        by_name = logit_lens(model, cache, targets=[4], norm=norm)
        by_hand = logit_lens(model, cache, targets=column, norm=norm)
        torch.testing.assert_close(by_row(by_hand), by_row(by_name), atol=1e-4, rtol=1e-4)


def test_a_headless_towers_norm_is_frozen_when_it_is_asked_for():
    model, _, cache = run("vit-headless")
    direction = torch.randn(1, model.vision.cfg.d_model, generator=torch.Generator().manual_seed(0))
    own, frozen, bare = (
        by_row(logit_lens(model, cache, "vision", targets=direction, norm=norm)) for norm in ("own", "frozen", "none")
    )
    torch.testing.assert_close(frozen[-1], own[-1], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(frozen[0], own[0], atol=1e-3)
    assert not torch.allclose(frozen[0], bare[0], atol=1e-3)


# -- precision -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["paligemma2", "llava-clip-llama"])
def test_logits_and_probabilities_are_the_models_own_bit_for_bit(name, padding, dtype):
    """Under a soft cap, in half precision, beside padding on either side, whatever attention the towers run."""
    entry = case(name)
    for attention in ("eager", "sdpa"):
        module = copy.deepcopy(shared_model(name)).to(dtype)
        module.set_attn_implementation(
            {"vision_config": attention, "text_config": "eager" if name == "paligemma2" else attention}
        )
        model = cv.HookedModel(module, entry.processor())
        inputs = entry.inputs(module, batch=2, dtype=dtype, padding=padding)
        assert not bool(inputs["attention_mask"].bool().all())
        with torch.no_grad():
            logits = module(**inputs).logits.float()
        assert torch.equal(by_row(logit_lens(model, inputs, targets={3: 3, 5: 5}))[-1], logits[..., [3, 5]])
        shares = by_row(logit_lens(model, inputs, targets={3: 3, 5: 5}, measure="prob"))[-1]
        assert torch.equal(shares, logits.softmax(-1)[..., [3, 5]])


# -- memory --------------------------------------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The most elements of any tensor [row pos size] made inside."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.elements = size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor) and leaf.shape[2:] == (self.size,)]
        self.elements = max([self.elements, *(leaf.untyped_storage().nbytes() // leaf.element_size() for leaf in made)])
        return out


@pytest.mark.parametrize("norm", ["own", "frozen"])
@pytest.mark.parametrize("batch", [2, 9])
def test_no_tensor_holds_more_logits_than_a_piece_however_many_rows(norm, batch, monkeypatch):
    model = run("llava-clip-llama")[0]
    inputs = case("llava-clip-llama").inputs(model.module, batch=batch)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, model.language.stream_sites())
    vocabulary = model.language.W_U.shape[1]
    monkeypatch.setattr(lens_module, "CHUNK_BYTES", 4 * vocabulary * 3)
    monkeypatch.setattr("circuitvision.readout.lens.logit.describe", lambda *given, **named: {})
    for options in ({"targets": {1: 1, 2: 2}, "measure": "prob"}, {"top_k": 3}):
        with Largest(vocabulary) as watch:
            result = logit_lens(model, cache, norm=norm, **options)
            if "targets" in options:
                result.identifiability()
                result.change_rate()
        assert 0 < watch.elements <= 3 * vocabulary


def test_reading_in_small_pieces_gives_the_same(monkeypatch):
    model, _, cache = run("llava-clip-llama")
    options = {"targets": {"answer": [3, 4]}, "measure": "logprob", "norm": "frozen"}
    whole = logit_lens(model, cache, **options)
    for vectors in (1, 2, 3, 5):
        monkeypatch.setattr(lens_module, "CHUNK_BYTES", 4 * model.language.W_U.shape[1] * vectors)
        again = logit_lens(model, cache, **options)
        torch.testing.assert_close(by_row(again), by_row(whole), atol=1e-5, rtol=1e-5)
        assert torch.equal(by_row(again, "ids")[..., 0], by_row(whole, "ids")[..., 0])
        assert torch.equal(by_row(again, "ranks"), by_row(whole, "ranks"))


def test_heads_are_computed_once(monkeypatch):
    from circuitvision.model.branches import AttentionBranch

    model, _, cache = run("vit", everything=True)
    calls = []
    made = AttentionBranch.head_results
    stored = {name: value for name, value in cache.items() if not name.endswith("hook_result")}
    monkeypatch.setattr(AttentionBranch, "head_results", lambda *given: calls.append(1) or made(*given))
    logit_lens(model, cv.ActivationCache(stored, model, cache.inputs), "vision", targets=[0], sites="attn.hook_result")
    assert len(calls) == model.vision.cfg.n_layers


# -- what is read --------------------------------------------------------------------------------------------------------------------------


def test_a_pass_may_be_counted_from_the_last():
    model, _, cache = run("llava-clip-llama")
    with model.record(["language.hook_input", "language.blocks.*.hook_resid_post"]) as passes:
        model.generate(cache.inputs, max_new_tokens=3, do_sample=False)
    last, same = (logit_lens(model, passes, targets=[3], step=step) for step in (2, -1))
    assert torch.equal(by_row(last), by_row(same))
    assert same.step == 2
    assert same.axes["position"] == last.axes["position"]
    assert same.provenance["method"] == last.provenance["method"]


def test_a_tower_that_ran_once_needs_no_step():
    model, _, cache = run("llava-clip-llama")
    with model.record(["vision.hook_input", "vision.blocks.*.hook_resid_post", "language.hook_input"]) as passes:
        model.generate(cache.inputs, max_new_tokens=3, do_sample=False)
    for norm in ("own", "frozen"):
        found = logit_lens(model, passes, "vision", targets=[3], norm=norm)
        torch.testing.assert_close(by_row(found), by_row(logit_lens(model, cache, "vision", targets=[3], norm=norm)))
        assert found.step is None
    with pytest.raises(InputError, match="step="):
        logit_lens(model, passes, "language", targets=[3], sites="language.hook_input")


def test_a_site_named_in_full_has_to_be_there_and_layers_of_a_kind_need_not():
    model, _, cache = run("vit")
    some = cv.ActivationCache({name: cache[name] for name in ("vision.blocks.1.hook_attn_out",)}, model, cache.inputs)
    assert logit_lens(model, some, "vision", targets=[0], sites="attn_out").axes["layer"] == [1]
    full = ["vision.blocks.0.hook_attn_out", "vision.blocks.1.hook_attn_out"]
    with pytest.raises(InputError, match=r"blocks\.0\.hook_attn_out; add it"):
        logit_lens(model, some, "vision", targets=[0], sites=full)
    with pytest.raises(InputError, match="hook_mlp_out"):
        logit_lens(model, some, "vision", targets=[0], sites="mlp_out")


def test_more_columns_than_there_are_is_all_of_them():
    model, out, cache = run("vit")
    result = logit_lens(model, cache, "vision", top_k=10**6)
    assert by_row(result).shape[-1] == out.shape[-1]
    assert torch.equal(by_row(result, "pooled_ids")[-1], out.argsort(-1, descending=True))


def test_a_joint_reading_is_no_chain_of_probabilities():
    """Its first piece is the chain's; the others are read where the word has not been started yet."""
    model, _, cache = run("llava-clip-llama", batch=1)
    word = "red blue"
    ids = min((model.tokenizer.encode(form, add_special_tokens=False) for form in (" " + word, word)), key=len)
    assert len(ids) == 2
    longer = dict(cache.inputs)
    longer["input_ids"] = torch.cat([longer["input_ids"], torch.tensor([ids])], 1)
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with torch.no_grad():
        said = model(longer).log_softmax(-1)[0]
    chain = said[-3, ids[0]] + said[-2, ids[1]]
    same_place = said[-3, ids[0]] + said[-3, ids[1]]
    joint = by_row(logit_lens(model, cache, targets=[word], aggregation="joint", measure="logprob"))[-1, 0, -1, 0]
    torch.testing.assert_close(joint, same_place, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(chain - joint, said[-2, ids[1]] - said[-3, ids[1]], atol=1e-4, rtol=1e-4)
    assert abs(float(chain - joint)) > 1e-3


def test_a_joint_value_has_no_rank_among_single_columns():
    model, _, cache = run("llava-clip-llama")
    targets = {"one": ["red", "red"], "two": ["red", "red blue"]}
    result = logit_lens(model, cache, targets=targets, aggregation="joint", measure="logprob")
    alone = logit_lens(model, cache, targets=["red"], measure="logprob")
    assert torch.equal(by_row(result, "ranks")[..., 0], by_row(alone, "ranks")[..., 0])
    assert torch.equal(by_row(result, "ranks")[:, 0, :, 1], by_row(alone, "ranks")[:, 0, :, 0])
    assert bool((by_row(result, "ranks")[:, 1, :, 1] == 0).all())
    found = by_row(result.identifiability())
    assert found[:, 1, 1].isnan().all()
    assert found[:, 0].isfinite().all()


def test_hooks_fire_while_a_piece_is_looked_at():
    model, _, cache = run("vit")
    reader = lens_module.LensRun(model, model.vision, cache)
    pieces = reader.columns(cache["vision.hook_input"])
    next(pieces)
    fired = []
    with model.hooks([("vision.hook_input", lambda value, hook: fired.append(1))]), torch.no_grad():
        model(cache.inputs)
    assert fired


# -- results and summaries -----------------------------------------------------------------------------------------------------------------


def test_padding_without_numbers_does_not_count_and_a_place_that_does_is_not_hidden():
    model = run("llava-clip-llama")[0]
    inputs = case("llava-clip-llama").inputs(model.module, batch=2, padding="left")
    result = logit_lens(model, inputs, targets={3: 3, 4: 4})
    padding = torch.tensor([[kind == "padding" for kind in row] for row in result.kinds])
    assert bool(padding.any())
    for name in ("values", "ranks"):
        by_row(result, name)[:, padding] = 0 if name == "ranks" else float("nan")
    assert by_row(result.identifiability()).isfinite().all()
    assert by_row(result.change_rate()).isfinite().all()
    at = int((~padding[0]).nonzero()[0])
    by_row(result)[1, 0, at] = float("nan")
    rises = by_row(result.change_rate())
    assert rises[:2, 0].isnan().all()
    assert rises[:, 1].isfinite().all()


def test_matches_of_lenses_that_do_not_fit_are_refused():
    model, _, cache = run("vit", everything=True)
    stream, attention, mlp, heads = (
        logit_lens(model, cache, "vision", top_k=1, sites=sites)
        for sites in (["vision.hook_input", "resid_post"], "attn_out", "mlp_out", "attn.hook_result")
    )
    with pytest.raises(InputError, match="head axis"):
        stream.match_rates(heads, mlp)
    with pytest.raises(InputError, match="same rows"):
        stream.take(0).match_rates(attention, mlp)
    with pytest.raises(InputError, match="top_k"):
        stream.contrast(1, 2)


def test_a_result_says_what_it_found():
    model, out, cache = run("vit")
    result = logit_lens(model, cache, "vision", targets=[0])
    assert model.config.id2label[int(out[0].argmax())] in result._repr_html_()
    found = result.identifiability("cls")
    assert "identifiability" in found.highlights()
    assert f"{float(by_row(found)[-1].mean()):.3g} (layer 2)" in found._repr_html_()
    words, logits, other = run("llava-clip-llama")
    best = words.tokenizer.convert_ids_to_tokens(int(logits[0, -1].argmax()))
    assert best in " ".join(logit_lens(words, other, targets=[0]).highlights().values())


def test_a_mean_is_over_the_pieces_that_a_word_has():
    model, _, cache = run("llava-clip-llama")
    both = by_row(logit_lens(model, cache, targets={"red": "red", "red blue": "red blue"}, aggregation="mean"))
    single = by_row(logit_lens(model, cache, targets={"red": "red", "blue": "blue"}))
    torch.testing.assert_close(both[..., 0], single[..., 0])
    torch.testing.assert_close(both[..., 1], single.mean(-1), atol=1e-5, rtol=1e-5)


def test_of_several_tiles_the_first_is_laid_out():
    places = torch.tensor([[0, 1, 0, 0], [0, 0, 0, 0], [0, 2, 0, 0], [-1, -1, -1, -1]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert on_grid(values, places).tolist() == [[2.0]]
    assert on_grid(values, places, tile=2).tolist() == [[3.0]]

"""Terms and biases add up to the output in every family; each share is what its definition says; the dual encoders' form is bilinear."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.attribution import terms as terms_module
from circuitvision.readout.attribution.bilinear import bilinear_attribution
from circuitvision.readout.attribution.direct import Attribution, direct_attribution, source_attribution
from circuitvision.readout.targets import output_kind, reader_of
from tests.readout.common import NAMES, outputs_at, run
from tests.zoo import case

EXACT = {torch.float32: 3e-6, torch.float64: 1e-11}


def requests(model, dtype):
    """For every tower: a direction of its output where it has one, of its stream otherwise."""
    for name, tower in model.towers.items():
        if output_kind(tower) in ("hidden", "embedding") or reader_of(tower) is not tower:
            direction = torch.randn(tower.cfg.d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)
            yield name, direction, {"position": 1}
        else:
            yield name, (0, 1), {}


def tolerance(model, tower, dtype, by):
    """Float64 holds as long as the model's own norms do not round to float32 between the terms (sandwich norms do)."""
    rounds = (
        any(block.has("attn_add") for block in model.towers[tower].blocks) and model.towers[tower].cfg.norm == "RMSNorm"
    )
    return 1e-6 if rounds and by != "component" and dtype == torch.float64 else EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_terms_and_biases_sum_to_the_output(name, dtype):
    model, out, cache = run(name, dtype, everything=True)
    for tower, direction, options in requests(model, dtype):
        for by in ("component", "head", "neuron"):
            result = direct_attribution(model, cache, direction, tower, by=by, **options)
            scale = float(result.values.abs().max())
            gap = float((result.values.sum(0) - result.total).abs().max())
            assert gap <= tolerance(model, tower, dtype, by) * scale, (tower, by)
            feeds = not options and not model.towers[tower].spec.feeds_cache_only
            if feeds and "softcap" not in case(name).tags:
                wanted = outputs_at(model, tower, out, cache.inputs)
                wanted = wanted[:, 0] - wanted[:, 1]
                exact = 3e-7 if model.towers[tower].cfg.norm == "RMSNorm" and dtype == torch.float64 else EXACT[dtype]
                assert float((result.total - wanted).abs().max()) <= exact * scale * 3, (tower, by)


@pytest.mark.parametrize("name", NAMES)
def test_source_positions_sum_to_their_head(name):
    model, _, cache = run(name, torch.float64, everything=True)
    for tower, direction, options in requests(model, torch.float64):
        heads = direct_attribution(model, cache, direction, tower, **options)
        sources = source_attribution(model, cache, direction, tower, **options)
        wanted = torch.stack(
            [
                torch.stack([heads[f"L{layer}H{head}"] for head in range(model.towers[tower].cfg.n_heads)])
                for layer in sources.axes["layer"]
            ]
        )
        torch.testing.assert_close(sources.values.sum(-1), wanted, atol=1e-11, rtol=1e-9)
        assert sources.places.shape[1] == sources.values.shape[-1] == len(sources.words[0])


def test_a_share_is_what_the_model_loses_when_the_term_is_taken_out_behind_a_frozen_norm():
    """The definition, by hand on a ViT: term of the CLS position, centred, divided by the run's scale, times gain and class weights."""
    model, _, cache = run("vit", torch.float64, everything=True)
    result = direct_attribution(model, cache, (2, 0))
    head = model.module.classifier.weight
    direction = (head[2] - head[0]).detach()
    scale, gain = cache["vision.ln_final.hook_scale"][:, 0], model.vision.final_norm.weight.detach()
    for term, vector in {
        "L1H1": cache["vision.blocks.1.attn.hook_result"][:, 0, 1],
        "L2.mlp": cache["vision.blocks.2.hook_mlp_out"][:, 0],
        "pos_embed": model.vision.W_pos[0].expand(2, -1),
        "prefix": model.module.vit.embeddings.cls_token[0, 0].detach().expand(2, -1),
    }.items():
        wanted = ((vector - vector.mean(-1, keepdim=True)) / scale * gain) @ direction
        torch.testing.assert_close(result[term], wanted)
    assert float(result["patch_embed"].abs().max()) == 0.0


def test_layer_scale_and_sandwich_norms_reach_the_shares():
    """Mutants: leaving T out changes the sum by far more than rounding."""
    for name in ("dinov2", "paligemma2"):
        model, _, cache = run(name, everything=True)
        tower = list(model.towers)[-1]
        right = direct_attribution(model, cache, (0, 1), tower)
        stream = terms_module.Stream(model.towers[tower], cache)
        heads = stream.heads(0)
        raw = cache[f"{tower}.blocks.0.attn.hook_result"]
        assert not torch.allclose(heads, raw, atol=1e-2)
        assert torch.allclose(right.values.sum(0), right.total, atol=1e-4)


def test_neurons_and_their_bias_make_up_the_mlp():
    for name in ("dinov2-swiglu", "llava-clip-gemma", "clip"):
        model, _, cache = run(name, torch.float64, everything=True)
        tower = list(model.towers)[-1]
        parts = direct_attribution(model, cache, (0, 1), tower, by="neuron", layers=[1])
        whole = direct_attribution(model, cache, (0, 1), tower)
        names = [term for term in parts.axes["term"] if term.startswith(("L1N", "L1.mlp"))]
        total = sum(parts[term] for term in names)
        torch.testing.assert_close(total, whole["L1.mlp"], atol=1e-10, rtol=1e-8)
        assert "L0.mlp" in parts.axes["term"]


def test_every_way_to_name_a_direction():
    model, out, cache = run("llava-clip-llama", torch.float64)
    ids = [model.token("red"), model.token("blue")]
    by_words = direct_attribution(model, cache, ("red", "blue"))
    for direction in (
        tuple(ids),
        cv.metrics.logit_diff("red", "blue"),
        {"answer": ["red", "red"], "foil": ["blue", "blue"]},
    ):
        assert torch.equal(direct_attribution(model, cache, direction).values, by_words.values)
    crossed = direct_attribution(model, cache, {"answer": ["red", "blue"], "foil": ["blue", "red"]})
    torch.testing.assert_close(crossed.values * torch.tensor([1.0, -1.0]), by_words.values)
    single = direct_attribution(model, cache, "red")
    torch.testing.assert_close(single.total, out[:, -1, ids[0]], atol=1e-5, rtol=1e-5)
    at_two = direct_attribution(model, cache, "red", position=2)
    torch.testing.assert_close(at_two.total, out[:, 2, ids[0]], atol=1e-5, rtol=1e-5)
    tokens = model.tokens(cache.inputs)["language"]
    text = tokens.select("text")
    over_text = direct_attribution(model, cache, "red", position=text)
    wanted = torch.stack([out[row, text.tensor[row], ids[0]].mean() for row in range(2)])
    torch.testing.assert_close(over_text.total, wanted, atol=1e-5, rtol=1e-5)
    assert by_words.direction == "red - blue"


def test_actions_are_attributed_at_a_step_of_the_chunk_or_over_it():
    model, out, cache = run("pi0", torch.float64, everything=True)
    for position, wanted in ((0, out[:, 0, 1]), (3, out[:, 3, 1]), ("mean", out[..., 1].mean(1))):
        result = direct_attribution(model, cache, 1, position=position)
        assert result.tower == "action"
        torch.testing.assert_close(result.total, wanted, atol=1e-6, rtol=1e-6)
    sources = source_attribution(model, cache, 1)
    prefix = model.tokens(cache.inputs)["language"].n_positions
    assert sources.values.shape[-1] == prefix + model.tokens(cache.inputs)["action"].n_positions
    assert float(sources.values[..., :prefix].abs().sum()) > 0


def test_clip_prompts_and_embeddings_are_directions():
    model = cv.organisms.load("shapes-clip")
    import numpy as np

    scene = cv.data.scenes.sample_scene(np.random.default_rng(1))
    prompts = ["a red circle", "a blue square"]
    with torch.no_grad():
        out, cache = model.run_with_cache(model.inputs(images=[scene.image], text=prompts))
    result = direct_attribution(model, cache, tuple(prompts), "vision")
    torch.testing.assert_close(result.total, out[:, 0] - out[:, 1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(result.values.sum(0), result.total, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "clip-argmax", "siglip", "siglip2"])
@pytest.mark.parametrize("by", ["component", "head"])
def test_the_bilinear_form_sums_to_the_score_of_every_pair(name, by):
    model, out, cache = run(name, torch.float64, everything=True)
    result = bilinear_attribution(model, cache, by=by)
    torch.testing.assert_close(result.values.sum((0, 1)) + result.bias, out, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(result.total, out, atol=1e-10, rtol=1e-10)
    direct = direct_attribution(model, cache, (0, 1), "vision", by=by)
    terms = result.image_terms()
    named = [label for label in result.axes["image_term"] if label != "bias"]
    for index, label in enumerate(named):
        torch.testing.assert_close(terms[index, :, 0] - terms[index, :, 1], direct[label], atol=1e-9, rtol=1e-7)


def test_prompts_take_the_place_of_the_runs_texts():
    model = cv.organisms.load("shapes-clip")
    import numpy as np

    scene = cv.data.scenes.sample_scene(np.random.default_rng(2))
    prompts = ["a red circle", "a blue square", "a cross"]
    inputs = model.inputs(images=[scene.image], text=prompts)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs)
    result = bilinear_attribution(model, cache, prompts=prompts)
    torch.testing.assert_close(result.values.sum((0, 1)) + result.bias, out, atol=1e-4, rtol=1e-4)
    assert result.axes["text"] == prompts


def test_inputs_in_place_of_a_cache_give_the_same():
    for name in ("dinov2", "pi0", "clip", "paligemma2"):
        model, _, cache = run(name, everything=True)
        tower = list(model.towers)[-1]
        found = direct_attribution(model, cache.inputs, (0, 1), tower, by="neuron")
        torch.testing.assert_close(found.values, direct_attribution(model, cache, (0, 1), tower, by="neuron").values)
        source_attribution(model, cache.inputs, (0, 1), tower)


@pytest.mark.parametrize(
    ("name", "direction", "options", "message"),
    [
        ("vit", (0, 1, 2), {}, "pair"),
        ("vit", "walrus", {}, "no class"),
        ("vit", (0, 1), {"by": "layer"}, "split by"),
        ("vit", (0, 1), {"by": "neuron", "layers": [99]}, "layers of 0 to"),
        ("vit", cv.metrics.prob(0), {}, "not linear"),
        ("vit-headless", (0, 1), {}, "direction of the stream"),
        ("siglip-vision", torch.randn(24), {}, "direction"),
        ("llava-clip-llama", ("red", "blue"), {"tower": "vision"}, "direction of the stream"),
        ("llava-clip-llama", ("red", "blue"), {"position": 999}, "outside"),
        ("llava-clip-llama", ("red", "blue"), {"position": "first"}, "position"),
        ("llava-clip-llama", "red blue", {}, "several|2 tokens"),
        ("llava-clip-llama", {"foil": "red"}, {}, "answer"),
    ],
)
def test_meaningless_requests_are_refused(name, direction, options, message):
    model, _, cache = run(name)
    with pytest.raises(InputError, match=message):
        direct_attribution(model, cache, direction, **options)


def test_a_cache_without_what_is_needed_says_so():
    model, _, cache = run("vit")
    _, small = model.run_with_cache(cache.inputs, names_filter="vision.blocks.*.hook_resid_post")
    with pytest.raises(InputError, match=r"hook_input|hook_z"):
        direct_attribution(model, small, (0, 1))
    keep = [name for name in cache if "pattern" not in name]
    without = cv.ActivationCache({name: cache[name] for name in keep}, model, cache.inputs)
    with pytest.raises(InputError, match="hook_pattern"):
        source_attribution(model, without, (0, 1))


def test_results_are_saved_and_list_their_strongest_terms(tmp_path):
    model, _, cache = run("vit")
    result = direct_attribution(model, cache, (0, 1))
    again = Attribution.load(result.save(tmp_path / "attribution.npz"))
    assert torch.equal(again.total, result.total)
    top = result.top(3)
    assert abs(top[0][1]) >= abs(top[1][1]) >= abs(top[2][1])
    assert abs(top[0][1]) == pytest.approx(float(result.values.double().mean(-1).abs().max()))
    with pytest.raises(InputError, match="no term"):
        result["L99H0"]


def test_works_on_caches_of_inference_mode_and_leaves_no_gradient():
    model, _, cache = run("dinov2")
    with torch.inference_mode():
        _, made = model.run_with_cache(cache.inputs)
        inside = direct_attribution(model, made, (0, 1))
    torch.testing.assert_close(inside.values, direct_attribution(model, cache, (0, 1)).values)
    assert all(p.grad is None for p in model.module.parameters())

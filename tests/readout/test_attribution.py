"""Terms and biases add up to the output in every family; each share is what its definition says; the dual encoders' form is bilinear."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.model.spec import norm_spec
from circuitvision.readout.attribution import terms as terms_module
from circuitvision.readout.attribution.bilinear import bilinear_attribution
from circuitvision.readout.attribution.direct import Attribution, direct_attribution, source_attribution
from circuitvision.readout.lens.logit import logit_lens
from tests.parts import has_part, module_of
from tests.readout.common import NAMES, outputs_at, run
from tests.readout.layouts import by_row
from tests.zoo import case

EXACT = {torch.float32: 3e-6, torch.float64: 1e-11}


def requests(model, dtype):
    """For every tower: a direction of its output where it has one, of its stream otherwise."""
    for name, tower in model.towers.items():
        if tower.reader is not tower and tower.output_head.linear_projector is not None:
            yield name, (0, 1), {"position": 1}
        elif tower.output_head.kind == "hidden" or tower.reader is not tower:
            direction = torch.randn(tower.cfg.d_model, generator=torch.Generator().manual_seed(1), dtype=dtype)
            yield name, direction, {"position": 1}
        else:
            yield name, (0, 1), {}


def tolerance(model, tower, dtype, by):
    """Float64 holds as long as the model's own norms do not round to float32 between the terms (sandwich norms do)."""
    rounds = (
        any(has_part(block, "attn_add") for block in model.towers[tower].blocks)
        and model.towers[tower].cfg.norm == "RMSNorm"
    )
    return 1e-6 if rounds and by != "component" and dtype == torch.float64 else EXACT[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("name", NAMES)
def test_terms_and_biases_sum_to_the_output(name, dtype):
    model, out, cache = run(name, dtype, everything=True)
    for tower, direction, options in requests(model, dtype):
        for by in ("component", "head", "neuron"):
            result = direct_attribution(model, cache, direction, tower, by=by, **options)
            scale = float(by_row(result).abs().max())
            gap = float((by_row(result).sum(0) - result.total).abs().max())
            assert gap <= tolerance(model, tower, dtype, by) * scale, (tower, by)
            feeds = not options and not model.towers[tower].feeds_cache
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
        torch.testing.assert_close(by_row(sources).sum(-1), wanted, atol=1e-11, rtol=1e-9)
        assert sources.places.shape[1] == by_row(sources).shape[-1] == len(sources.words[0])


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


def frozen_output(model, cache, tower, direction, options):
    """The value of a direction as a function of the final residual, every statistic held: by the lens's reading, no gradient."""
    stream = terms_module.Stream(tower, cache)
    final = stream.final
    if isinstance(direction, torch.Tensor):
        return final, lambda resid: resid[:, options["position"]] @ direction
    readout, pooled = tower.spec.readout, tower.output_head.kind not in ("tokens", "actions")
    reading = tower.output_head.in_run(cache, norm="frozen", reference=final, capped=False)
    last = torch.as_tensor(model.tokens(cache.inputs)[tower.name].last())
    position = {"chunk": -int(getattr(tower.config_of_model, "chunk_size", 0))}.get(readout.pool, last)

    def value(resid):
        out = reading.read(resid) if pooled else reading.positions(resid, 0, final)[torch.arange(len(resid)), position]
        out = out.T if tower.output_head.kind == "images" else out
        return out[:, direction[0]] - out[:, direction[1]]

    return final, value


@pytest.mark.parametrize("name", NAMES)
def test_a_share_is_what_is_lost_when_its_own_term_is_taken_out_of_the_stream(name):
    """Sums do not see shares that change places; here every head, and some neurons and sources, are taken out one by one, from the model's sites."""
    model, _, cache = run(name, torch.float64, everything=True)
    for tower_name, direction, options in requests(model, torch.float64):
        tower = model.towers[tower_name]
        if tower.reader is not tower and not isinstance(direction, torch.Tensor):
            continue
        found = direct_attribution(model, cache, direction, tower_name, by="neuron", **options)
        sources = source_attribution(model, cache, direction, tower_name, **options)
        final, value = frozen_output(model, cache, tower, direction, options)
        total = value(final)
        torch.testing.assert_close(total, found.total, atol=2e-6, rtol=1e-6)
        layer = terms_module.Stream(tower, cache).end - 1
        block, base = tower.blocks[layer], f"{tower_name}.blocks.{layer}"

        def written(vector, add, norm, block=block, base=base):
            if not has_part(block, add):
                return vector
            module = module_of(block, add)
            if hasattr(module, "lambda1"):
                return vector * module.lambda1.detach()
            gain = norm_spec(module).offset + module.weight.detach()
            return vector / cache[f"{base}.{norm}.hook_scale"] * gain

        results, w_o = cache[f"{base}.attn.hook_result"], block.W_O.detach()
        for head in range(tower.cfg.n_heads):
            lost = total - value(final - written(results[:, :, head], "attn_add", "ln1_post"))
            torch.testing.assert_close(found[f"L{layer}H{head}"], lost, atol=2e-6, rtol=1e-6)
        own = cache[f"{base}.attn.hook_v"]
        pattern = cache[f"{base}.attn.hook_pattern"]
        group = tower.cfg.n_heads // own.shape[2]
        for head, source in ((0, 1), (tower.cfg.n_heads - 1, own.shape[1] - 1)):
            ahead = pattern.shape[-1] - own.shape[1]
            weights = pattern[:, head, :, ahead + source]
            vector = weights[..., None] * (own[:, source, head // group] @ w_o[head])[:, None]
            lost = total - value(final - written(vector, "attn_add", "ln1_post"))
            torch.testing.assert_close(by_row(sources)[layer, head, :, ahead + source], lost, atol=2e-6, rtol=1e-6)
        post, w_out = cache[f"{base}.mlp.hook_post"], block.W_out.detach()
        for neuron in (0, 3, tower.cfg.d_mlp - 1):
            vector = post[..., neuron, None] * w_out[neuron]
            lost = total - value(final - written(vector, "mlp_add", "ln2_post"))
            torch.testing.assert_close(found[f"L{layer}N{neuron}"], lost, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("name", ["paligemma", "paligemma2", "pi0"])
def test_patches_behind_a_linear_projector_are_split_as_the_lens_reads_them(name):
    model, _, cache = run(name, torch.float64, everything=True)
    patches = model.tokens(cache.inputs)["vision"].select("patch")
    lens = by_row(logit_lens(model, cache, "vision", sites="resid_post", targets={7: 7, 11: 11}))[-1].double()
    wanted = lens[..., 0] - lens[..., 1]
    for position, said in ((3, wanted[:, 3]), (patches, wanted.mean(1))):
        found = direct_attribution(model, cache, (7, 11), "vision", position=position)
        torch.testing.assert_close(by_row(found).sum(0), found.total, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(found.capped, said, atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="which of the vision tower's patches"):
        direct_attribution(model, cache, (7, 11), "vision")


def test_shares_of_a_capped_logit_add_up_before_the_cap_and_the_models_own_stands_beside():
    model, out, cache = run("paligemma2", torch.float64)
    cap = model.config.get_text_config().final_logit_softcapping
    last = torch.as_tensor(model.tokens(cache.inputs)["language"].last())
    said = out[torch.arange(2), last]
    before = cap * torch.atanh(said / cap)
    found = direct_attribution(model, cache, (7, 11))
    torch.testing.assert_close(found.capped, said[:, 7] - said[:, 11], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found.total, before[:, 7] - before[:, 11], atol=1e-5, rtol=1e-5)
    assert float((found.total - found.capped).abs().min()) > 1e-2
    assert "before the soft cap" in found.highlights()["all terms"]
    assert "before the soft cap" in found.plot().layout.title.text
    assert "before the soft cap" in found.plot().layout.xaxis.title.text
    plain = direct_attribution(*[run("vit")[i] for i in (0, 2)], (0, 1))
    assert torch.equal(plain.total, plain.capped)
    assert "soft cap" not in plain.highlights()["all terms"] + plain.plot().layout.title.text


def test_the_columns_of_an_embedding_are_directions():
    model, out, cache = run("clip-vision-projection", torch.float64)
    found = direct_attribution(model, cache, 3)
    torch.testing.assert_close(found.total, out[:, 3])
    torch.testing.assert_close(by_row(found).sum(0), found.total)


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
        assert torch.allclose(by_row(right).sum(0), right.total, atol=1e-4)


def test_neurons_and_their_bias_make_up_the_mlp():
    for name in ("dinov2-swiglu", "llava-clip-gemma", "clip"):
        model, _, cache = run(name, torch.float64, everything=True)
        tower = list(model.towers)[-1]
        parts = direct_attribution(model, cache, (0, 1), tower, by="neuron", layers=[1])
        whole = direct_attribution(model, cache, (0, 1), tower)
        names = [term for term in parts.axes["term"] if term.startswith((f"{tower} L1N", f"{tower} L1.mlp"))]
        total = sum(parts[term] for term in names)
        torch.testing.assert_close(total, whole["L1.mlp"], atol=1e-10, rtol=1e-8)
        assert f"{tower} L0.mlp" in parts.axes["term"]


def test_every_way_to_name_a_direction():
    model, out, cache = run("llava-clip-llama", torch.float64)
    ids = [model.token("red"), model.token("blue")]
    by_words = direct_attribution(model, cache, ("red", "blue"))
    for direction in (
        tuple(ids),
        cv.metrics.logit_diff("red", "blue"),
        {"answer": ["red", "red"], "foil": ["blue", "blue"]},
    ):
        assert torch.equal(by_row(direct_attribution(model, cache, direction)), by_row(by_words))
    crossed = direct_attribution(model, cache, {"answer": ["red", "blue"], "foil": ["blue", "red"]})
    torch.testing.assert_close(by_row(crossed) * torch.tensor([1.0, -1.0]), by_row(by_words))
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
    for position, wanted in ((None, out[:, 0, 1]), (4, out[:, 3, 1]), (-1, out[:, 3, 1]), ("all", out[..., 1].mean(1))):
        result = direct_attribution(model, cache, 1, position=position)
        assert result.tower == "action"
        torch.testing.assert_close(result.total, wanted, atol=1e-6, rtol=1e-6)
    with pytest.raises(InputError, match="outside"):
        direct_attribution(model, cache, 1, position="state")
    sources = source_attribution(model, cache, 1)
    prefix = model.tokens(cache.inputs)["language"].n_positions
    assert by_row(sources).shape[-1] == prefix + model.tokens(cache.inputs)["action"].n_positions
    assert float(by_row(sources)[..., :prefix].abs().sum()) > 0


def test_clip_prompts_and_embeddings_are_directions():
    model = cv.organisms.load("shapes-clip")
    import numpy as np

    scene = cv.data.scenes.sample_scene(np.random.default_rng(1))
    prompts = ["a red circle", "a blue square"]
    with torch.no_grad():
        out, cache = model.run_with_cache(model.inputs(images=[scene.image], text=prompts))
    result = direct_attribution(model, cache, tuple(prompts), "vision")
    torch.testing.assert_close(result.total, out[:, 0] - out[:, 1], atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(by_row(result).sum(0), result.total, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("name", ["clip", "clip-argmax", "siglip", "siglip2"])
@pytest.mark.parametrize("by", ["component", "head"])
def test_the_bilinear_form_sums_to_the_score_of_every_pair(name, by):
    model, out, cache = run(name, torch.float64, everything=True)
    result = bilinear_attribution(model, cache, by=by)
    assert list(result.axes) == ["image_term", "text_term", "text", "example"]
    torch.testing.assert_close(result.values.sum((0, 1)) + result.bias, out.T, atol=1e-11, rtol=1e-11)
    torch.testing.assert_close(result.total, out.T, atol=1e-11, rtol=1e-11)
    direct = direct_attribution(model, cache, (0, 1), "vision", by=by)
    terms = result.image_terms()
    named = [label for label in result.axes["image_term"] if label != "bias"]
    for index, label in enumerate(named):
        torch.testing.assert_close(terms[index, 0] - terms[index, 1], direct[label], atol=1e-9, rtol=1e-7)


def test_the_first_things_shown_are_the_strongest():
    model, _, cache = run("clip", everything=True)
    pairs = bilinear_attribution(model, cache)
    name, value = next(iter(pairs.highlights().items()))
    image, text = name.split(" × ")
    at = pairs.axes["image_term"].index(image), pairs.axes["text_term"].index(text), 0, 0
    assert abs(float(by_row(pairs)[at])) == float(by_row(pairs)[:, :, 0, 0].abs().max())
    assert float(value) == pytest.approx(float(by_row(pairs)[at]), rel=1e-3)
    for options in ({"example": 2}, {"text": 9}, {"example": -1}):
        with pytest.raises(InputError, match="There is no"):
            pairs.plot(**options)
    model, _, cache = run("llava-clip-llama", everything=True)
    sources = source_attribution(model, cache, (3, 4))
    name, value = next(iter(sources.highlights().items()))
    size = by_row(sources).abs().sum(-1).mean(-1)
    layer, head = divmod(int(size.argmax()), size.shape[1])
    assert name == f"language L{layer}H{head}"
    mine = by_row(sources)[layer, head].double()
    patches = model.tokens(cache.inputs)["language"].positions("patch")
    wanted = (
        f"{float(mine.sum(-1).mean()):+.4g}, {float(mine[:, patches].sum(-1).mean()):+.4g} of it from image patches"
    )
    assert value == wanted


def test_prompts_take_the_place_of_the_runs_texts():
    model = cv.organisms.load("shapes-clip")
    import numpy as np

    scene = cv.data.scenes.sample_scene(np.random.default_rng(2))
    prompts = ["a red circle", "a blue square", "a cross"]
    inputs = model.inputs(images=[scene.image], text=prompts)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs)
    result = bilinear_attribution(model, cache, prompts=prompts)
    torch.testing.assert_close(result.values.sum((0, 1)) + result.bias, out.T, atol=1e-4, rtol=1e-4)
    assert result.axes["text"] == prompts


@pytest.mark.parametrize(
    ("name", "direction", "options", "message"),
    [
        ("vit", (0, 1, 2), {}, "tuple of two"),
        ("vit", "walrus", {}, "no class"),
        ("vit", (0, 1), {"by": "layer"}, "split by"),
        ("vit", (0, 1), {"by": "neuron", "layers": [99]}, "layers of 0 to"),
        ("vit", cv.metrics.prob(0), {}, "not linear"),
        ("vit-headless", (0, 1), {}, "direction of the stream"),
        ("siglip-vision", torch.randn(24), {}, "direction"),
        ("llava-clip-llama", ("red", "blue"), {"tower": "vision"}, "direction of the stream"),
        ("llava-clip-llama", ("red", "blue"), {"position": 999}, "outside"),
        ("llava-clip-llama", ("red", "blue"), {"position": 1.5}, "not understood"),
        ("llava-clip-llama", ("red", "blue"), {"position": True}, "not understood"),
        ("llava-clip-llama", ("red", "blue"), {"position": cv.regions.at([1, 2, 3])}, "of 3 examples"),
        ("llava-clip-llama", ("red", "blue"), {"position": slice(2, 1)}, "outside"),
        ("llava-clip-llama", ({"red", "green"}, "blue"), {}, "one per example"),
        ("llava-clip-llama", None, {}, "Say what is explained"),
        ("llava-clip-llama", 1.5, {}, "A direction is"),
        ("clip", torch.tensor(1.5), {}, "direction of the stream"),
        ("llava-clip-llama", torch.ones(20), {"tower": "vision"}, "Say where"),
        ("llava-clip-llama", ("red", "blue"), {"position": "first"}, "position"),
        ("llava-clip-llama", "red blue", {}, "several|2 tokens"),
        ("llava-clip-llama", {"foil": "red"}, {}, "answer"),
    ],
)
def test_meaningless_requests_are_refused(name, direction, options, message):
    model, _, cache = run(name)
    with pytest.raises(InputError, match=message):
        direct_attribution(model, cache, direction, **options)


def test_a_direction_of_zeros_has_shares_of_zero():
    model, _, cache = run("paligemma2", everything=True)
    assert float(by_row(direct_attribution(model, cache, (3, 3), by="neuron")).abs().max()) == 0.0
    assert float(by_row(source_attribution(model, cache, (3, 3))).abs().max()) == 0.0


def test_results_are_saved_and_list_their_strongest_terms(tmp_path):
    model, _, cache = run("vit")
    result = direct_attribution(model, cache, (0, 1))
    again = Attribution.load(result.save(tmp_path / "attribution.npz"))
    assert torch.equal(again.total, result.total)
    top = result.top(3)
    assert abs(top[0][1]) >= abs(top[1][1]) >= abs(top[2][1])
    assert abs(top[0][1]) == pytest.approx(float(by_row(result).double().mean(-1).abs().max()))
    with pytest.raises(InputError, match="no term"):
        result["L99H0"]


def test_two_answers_for_two_examples_can_be_read_in_two_ways():
    model, logits, cache = run("vit")
    with pytest.raises(InputError, match=r"\(0, 3\).*\{'answer': \[0, 3\]\}"):
        direct_attribution(model, cache, [0, 3])
    each = direct_attribution(model, cache, {"answer": [0, 3]})
    assert torch.equal(direct_attribution(model, cache, torch.tensor([0, 3])).total, each.total)
    torch.testing.assert_close(each.total, torch.stack([logits[0, 0], logits[1, 3]]).float(), atol=1e-5, rtol=1e-4)
    difference = direct_attribution(model, cache, (0, 3)).total
    torch.testing.assert_close(difference, (logits[:, 0] - logits[:, 3]).float(), atol=1e-5, rtol=1e-4)


def test_a_term_is_found_in_every_spelling():
    model, _, cache = run("vit")
    found = direct_attribution(model, cache, 0, by="neuron", layers=[1])
    for spelling in ("L1H2", "vision.L1H2", "v.a1.h2", (1, 2), "vision layer 1, head 2"):
        assert torch.equal(found[spelling], found["vision L1H2"])
    for spelling in ("L1N3", "v.m1.n3", "vision.blocks.1.mlp.hook_post[3]"):
        assert torch.equal(found[spelling], found["vision L1N3"])
    assert torch.equal(found["L0.attn.bias"], found["vision L0.attn.bias"])
    with pytest.raises(InputError, match="nearest"):
        found["text L1H2"]

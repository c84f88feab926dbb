"""Runs, caches and requests that are out of the ordinary: they give right numbers, or an error that names the fix."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.attribution.direct import direct_attribution, source_attribution
from circuitvision.readout.attribution.increase import log_prob_increase
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.tuned import TunedLens
from circuitvision.readout.ranks import rank_components
from tests.readout.common import run
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model


def test_a_float_tensor_is_a_direction_or_an_embedding_and_never_an_id():
    model, _, cache = run("llava-clip-llama", everything=True)
    with pytest.raises(InputError, match="direction of the stream"):
        direct_attribution(model, cache, torch.rand(10))
    with pytest.raises(InputError, match="not of a direction"):
        log_prob_increase(model, cache, torch.randn(1, model.language.cfg.d_model))
    clip, scores, both = run("clip", everything=True)
    embedding = both["text.hook_readout"] @ clip.module.text_projection.weight.T
    found = direct_attribution(clip, both, embedding[0].detach(), "vision")
    torch.testing.assert_close(found.total, scores[:, 0], atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="one embedding"):
        direct_attribution(clip, both, embedding.detach(), "vision")


def test_a_metric_brings_its_position_and_its_step():
    model, out, cache = run("llava-clip-llama", everything=True)
    found = direct_attribution(model, cache, cv.metrics.logit_diff(3, 4, position=5))
    torch.testing.assert_close(found.total, out[:, 5, 3] - out[:, 5, 4], atol=1e-5, rtol=1e-5)
    with pytest.raises(InputError, match="one of them"):
        direct_attribution(model, cache, cv.metrics.logit_diff(3, 4, position=5), position=6)
    pi0, velocity, prefix = run("pi0", everything=True)
    for step, wanted in ((2, velocity[:, 2]), (None, velocity.mean(1))):
        found = direct_attribution(pi0, prefix, cv.metrics.action_dim(1, step=step))
        torch.testing.assert_close(found.total, wanted[:, 1], atol=1e-5, rtol=1e-5)
    last = direct_attribution(pi0, prefix, cv.metrics.action_dim(-1))
    torch.testing.assert_close(last.total, velocity[:, 0, -1], atol=1e-5, rtol=1e-5)


def test_an_answer_per_example_is_one_per_example():
    model, _, cache = run("llava-clip-llama", everything=True)
    both = by_row(log_prob_increase(model, cache, [3, 4]))
    first, second = (by_row(log_prob_increase(model, cache, answer)) for answer in (3, 4))
    torch.testing.assert_close(both, torch.stack([first[..., 0], second[..., 1]], dim=-1))
    for answers in ([1, 2, 3],):
        with pytest.raises(InputError, match="2 examples"):
            log_prob_increase(model, cache, answers)
        with pytest.raises(InputError, match="2 examples"):
            direct_attribution(model, cache, {"answer": answers})
        with pytest.raises(InputError, match="2 examples"):
            logit_lens(model, cache, targets={"answer": answers})


def test_small_vectors_survive_bfloat16():
    """Neurons of a half-precision model score as in float32 on the same recorded values."""
    half = cv.organisms.load("shapes-llava", dtype=torch.bfloat16)
    pair = cv.data.sample_question_pairs(1, seed=3)[0]
    inputs = half.inputs(images=[pair.clean.image], text=[pair.prompt])
    with torch.no_grad():
        _, cache = half.run_with_cache(inputs, "**")
    whole = cv.HookedModel(copy.deepcopy(half.module).float(), half.processor)
    exact = cv.ActivationCache({name: value.float() for name, value in cache.items()}, whole, inputs)
    found = by_row(log_prob_increase(half, cache, pair.answer, by="neuron")).flatten()
    wanted = by_row(log_prob_increase(whole, exact, pair.answer, by="neuron")).flatten()
    assert float((found - wanted).abs().median() / wanted.abs().median()) < 0.05
    strong = wanted.abs() > wanted.abs().median()
    assert float((found.sign() == wanted.sign())[strong].double().mean()) > 0.99


@pytest.mark.parametrize("name", ["deit-teacher", "dinov2", "dinov2-registers", "vit", "siglip-classifier"])
def test_an_untrained_tuned_lens_of_the_last_layer_is_the_output_wherever_a_head_reads(name):
    model, _, cache = run(name)
    lens = TunedLens.train(
        model, cache.inputs, steps=1, learning_rate=0.0, positions=["patch"] + ["cls"] * (name != "siglip-classifier")
    )
    assert float(by_row(lens)[0, -1]) == pytest.approx(0.0, abs=1e-6)


def test_a_tuned_lens_takes_the_map_of_the_place_it_reads():
    model, _, cache = run("vit")
    width, layers = model.vision.cfg.d_model, model.vision.cfg.n_layers
    generator = torch.Generator().manual_seed(0)
    lens = TunedLens(
        torch.zeros(2, layers + 1),
        {"lens": ["plain", "tuned"], "layer": ["input", *range(layers)]},
        tower="vision",
        weight=torch.randn(layers + 1, width, width, generator=generator),
        bias=torch.randn(layers + 1, width, generator=generator),
    )
    options = {"norm": "tuned", "tuned": lens, "targets": [0]}
    before = logit_lens(model, cache, "vision", sites="resid_pre", **options)
    after = logit_lens(model, cache, "vision", sites="resid_post", **options)
    torch.testing.assert_close(by_row(before)[1:], by_row(after)[:-1])
    with pytest.raises(InputError, match="between blocks"):
        logit_lens(model, cache, "vision", sites="attn_out", **options)


@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_a_decoding_pass_is_read_as_what_it_generated(norm):
    model, _, cache = run("llava-clip-llama")
    with model.record(["language.hook_input", "language.blocks.*.hook_resid_post"]) as passes:
        model.generate(cache.inputs, max_new_tokens=3, do_sample=False)
    assert set(passes.inputs) == set(cache.inputs)
    prompt = cache.inputs["input_ids"].shape[1]
    for step in (1, 2):
        result = logit_lens(model, passes, targets=[3], step=step, norm=norm)
        assert by_row(result).shape[2] == 1
        assert result.axes["position"] == [prompt + step - 1]
        assert result.kinds[0] == ["generated"]
        value = passes["language.blocks.1.hook_resid_post"][step]
        torch.testing.assert_close(
            by_row(result)[-1, :, :, 0], model.language.readout(value)[..., 3], atol=1e-5, rtol=1e-4
        )


def test_no_patch_is_taken_for_a_class_token():
    model, _, cache = run("llava-clip-llama")
    result = logit_lens(model, cache, "vision", sites="hook_embed", targets=[3])
    patches = model.tokens(cache.inputs)["vision"].positions("patch")
    assert result.axes["position"] == patches
    projected = model.module.model.multi_modal_projector(cache["vision.hook_embed"])
    wanted = model.language.readout(projected)[..., 3]
    torch.testing.assert_close(by_row(result)[0, ..., 0], wanted, atol=1e-4, rtol=1e-4)
    several, _, other = run("llava-clip-llama-layers")
    with pytest.raises(InputError, match="prefix"):
        logit_lens(several, other, "vision", sites="hook_embed", targets=[3])


def test_what_is_no_number_has_no_rank():
    model, _, cache = run("vit")
    broken = cv.ActivationCache(dict(cache.items()), model, cache.inputs)
    broken._values["vision.blocks.1.hook_resid_post"] = torch.full_like(
        cache["vision.blocks.1.hook_resid_post"], torch.nan
    )
    result = logit_lens(model, broken, "vision", targets=[0])
    assert (by_row(result, "ranks")[2] == 0).all()
    found = result.identifiability()
    assert by_row(found)[2].isnan().all()
    assert by_row(found)[1].isfinite().all()


def test_a_mean_over_positions_leaves_padding_out():
    name = "llava-clip-llama"
    model = cv.HookedModel(shared_model(name), case(name).processor())
    inputs = case(name).inputs(model.module, batch=2, padding="left")
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs)
    real = inputs["attention_mask"].bool()
    assert not bool(real.all())
    found = direct_attribution(model, cache, 3, position="all").total
    wanted = torch.stack([out[row, real[row], 3].mean() for row in range(2)])
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    last = direct_attribution(model, cache, 3).total
    torch.testing.assert_close(last, out[:, -1, 3], atol=1e-5, rtol=1e-5)


def test_labels_of_targets_come_before_their_places():
    model, _, cache = run("llava-clip-llama")
    result = logit_lens(model, cache, targets={7: 7, 3: 3})
    assert result.target(3) == 1
    for absent in (0, 1):
        with pytest.raises(InputError, match="There is no target"):
            result.target(absent)
    assert torch.equal(result.patch_grid(0), result.patch_grid(0, target=7))
    both = logit_lens(model, cache, targets={1: 1, 0: 0})
    assert torch.equal(both.patch_grid(0, target=0), both.patch_grid(0, target=both.axes["target"][1]))
    heads = logit_lens(model, run("llava-clip-llama", everything=True)[2], targets=[1], sites="attn.hook_result")
    with pytest.raises(InputError, match="head axis"):
        heads.patch_grid(0)


def test_a_ranking_leaves_out_what_is_no_number_and_compares_examples_not_positions():
    scores = torch.tensor([10.0, 0, 0, 0, 0, 0, torch.nan])
    assert rank_components(scores).above_threshold() == ["0"]
    assert not rank_components(scores).random_control(2).isnan().any()
    by_size = rank_components(torch.tensor([-10.0, 1.0, 1.0]), by="size")
    assert float(by_size.random_control(3).mean()) == pytest.approx(12.0)
    model, _, cache = run("llava-clip-llama", everything=True)
    one = source_attribution(model, cache, (3, 4))
    assert rank_components(one.take(0)).error().isnan().all()


def test_summaries_compare_like_with_like():
    model, _, cache = run("vit")
    branch = logit_lens(model, cache, "vision", targets=[0], sites="mlp_out")
    with pytest.raises(InputError, match="targets"):
        branch.change_from(logit_lens(model, cache, "vision", targets=[1]))
    with pytest.raises(InputError, match="measure"):
        branch.change_from(logit_lens(model, cache, "vision", targets=[0], measure="prob"))
    with pytest.raises(InputError, match="successive"):
        branch.change_rate()


def test_siglips_probabilities_are_of_pairs():
    model, out, cache = run("siglip")
    result = logit_lens(model, cache, "vision", targets={0: 0, 1: 1}, measure="prob")
    torch.testing.assert_close(by_row(result, "pooled")[-1], out[:, :2].sigmoid(), atol=1e-5, rtol=1e-4)
    clip, scores, both = run("clip")
    soft = logit_lens(clip, both, "vision", targets={0: 0, 1: 1}, measure="prob")
    torch.testing.assert_close(by_row(soft, "pooled")[-1], scores.softmax(-1)[:, :2], atol=1e-5, rtol=1e-4)


def test_passes_of_a_policy_are_attributed_one_at_a_time():
    model, _, cache = run("pi0")
    sites = ["action.**", "language.blocks.*.attn.hook_v"]
    with model.record([site for site in model.sites(sites) if "scores" not in site and "rot_" not in site]) as steps:
        model.sample_actions(cache.inputs, num_steps=2)
    with pytest.raises(InputError, match="model and inputs"):
        source_attribution(model, cv.ActivationCache(dict(steps.items()), model), 1, "action", step=1)
    heads = direct_attribution(model, steps, 1, "action", step=1)
    sources = source_attribution(model, steps, 1, "action", step=1)
    wanted = torch.stack([heads["L0H0"], heads["L1H1"]])
    found = torch.stack([by_row(sources)[0, 0].sum(-1), by_row(sources)[1, 1].sum(-1)])
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["clip", "siglip", "siglip2", "dinov2", "paligemma2"])
def test_caches_of_inference_mode_are_attributed(name):
    model, _, cache = run(name, everything=True)
    with torch.inference_mode():
        _, made = model.run_with_cache(cache.inputs, "**")
    for tower in model.towers:
        if model.towers[tower].connector is None:
            wanted = by_row(direct_attribution(model, cache, (0, 1), tower))
            torch.testing.assert_close(by_row(direct_attribution(model, made, (0, 1), tower)), wanted)


def test_numbers_of_numpy_and_torch_are_numbers():
    model, _, cache = run("vit")
    wanted = by_row(logit_lens(model, cache, "vision", targets={"answer": [1, 1]}))
    for targets in (np.array([1, 1]), torch.tensor([1, 1]), [np.int64(1), torch.tensor(1)]):
        assert torch.equal(by_row(logit_lens(model, cache, "vision", targets=targets)), wanted)
    one = by_row(direct_attribution(model, cache, 1))
    for direction in (np.int64(1), torch.tensor(1)):
        assert torch.equal(by_row(direct_attribution(model, cache, direction)), one)
    with pytest.raises(InputError, match="truth"):
        logit_lens(model, cache, "vision", targets=[True])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_caches_in_another_precision_are_read_in_the_models(dtype):
    model, _, cache = run("llava-clip-llama", everything=True)
    moved = cache.to(dtype)
    for norm in ("own", "frozen"):
        near = by_row(logit_lens(model, cache, targets=[3], norm=norm))
        torch.testing.assert_close(by_row(logit_lens(model, moved, targets=[3], norm=norm)), near, atol=0.2, rtol=0.2)
    log_prob_increase(model, moved, 3, by="source")
    direct_attribution(model, moved, 3)


@pytest.mark.parametrize("name", ["clip", "siglip", "llava-clip-llama-layers"])
def test_what_a_read_out_takes_from_the_run_follows_the_model_as_well(name):
    """The other tower's embeddings and the other feature layers come from the cache, whatever it was converted to."""
    model, _, cache = run(name)
    moved = cache.to(torch.float64)
    for tower in model.towers:
        for norm in ("own", "frozen"):
            near = logit_lens(model, cache, tower, targets=[0], norm=norm)
            found = logit_lens(model, moved, tower, targets=[0], norm=norm)
            torch.testing.assert_close(by_row(found), by_row(near), atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(by_row(found, "pooled"), by_row(near, "pooled"), atol=1e-5, rtol=1e-5)


def test_layers_are_checked_before_anything_is_computed():
    model, _, cache = run("llava-clip-llama", everything=True)
    for function in (log_prob_increase, source_attribution):
        for layers in ([], [99], [-9]):
            with pytest.raises(InputError, match="layers of 0 to"):
                function(model, cache, 3, layers=layers)
        last = function(model, cache, 3, layers=[-1])
        assert last.axes["layer"] == [model.language.cfg.n_layers - 1]


def test_sites_of_different_shapes_and_read_outs_of_another_form_are_refused():
    model, _, cache = run("vit", everything=True)
    with pytest.raises(InputError, match="different shapes"):
        logit_lens(model, cache, "vision", targets=[0], sites=["attn.hook_result", "resid_post"])
    with pytest.raises(InputError, match="readout=fn"):
        logit_lens(model, cache, "vision", targets=[0], readout=lambda resid: resid[:, 0])
    with pytest.raises(InputError, match="pooled by the model"):
        direct_attribution(model, cache, (0, 1), position=3)


def test_unknown_words_of_a_prompt_are_announced():
    from circuitvision.readout import prompt_embeddings

    model = cv.organisms.load("shapes-clip")
    with pytest.warns(UserWarning, match="'zebra' in 'purple zebra'"):
        prompt_embeddings(model, ["purple zebra", "red circle"])


def test_a_column_that_is_not_there_is_named():
    model, _, cache = run("clip", everything=True)
    with pytest.raises(InputError, match="no column 9"):
        direct_attribution(model, cache, (0, 9), "text")
    with pytest.raises(InputError, match="no column 9"):
        logit_lens(model, cache, "text", targets=[9])


def test_gradients_of_a_metric_in_words():
    model, _, cache = run("llava-clip-llama")
    _, by_words = model.run_with_cache(
        cache.inputs, "language.hook_input", incl_bwd=True, metric=cv.metrics.logit_diff("red", "blue")
    )
    ids = [model.token("red"), model.token("blue")]
    _, by_ids = model.run_with_cache(
        cache.inputs, "language.hook_input", incl_bwd=True, metric=cv.metrics.logit_diff(*ids)
    )
    assert torch.equal(by_words["language.hook_input_grad"], by_ids["language.hook_input_grad"])


@pytest.mark.cuda
@pytest.mark.parametrize("name", ["vit", "clip", "llava-clip-llama", "pi0"])
def test_a_model_on_a_gpu_reads_as_on_the_cpu_from_caches_on_either(name):
    model, _, cache = run(name, everything=True)
    tower = "vision" if "language" not in model.towers else list(model.towers)[-1]
    far = cv.HookedModel(copy.deepcopy(model.module).cuda())
    inputs = {key: value.cuda() for key, value in cache.inputs.items()}
    with torch.no_grad():
        _, there = far.run_with_cache(inputs, "**")
    for recorded in (there, there.to("cpu")):
        for norm in ("own", "frozen"):
            near = by_row(logit_lens(model, cache, tower, targets={0: 0, 1: 1}, norm=norm))
            found = by_row(logit_lens(far, recorded, tower, targets={0: 0, 1: 1}, norm=norm))
            torch.testing.assert_close(found, near, atol=1e-3, rtol=1e-3)
        shares = by_row(direct_attribution(far, recorded, (0, 1), tower))
        torch.testing.assert_close(
            shares, by_row(direct_attribution(model, cache, (0, 1), tower)), atol=1e-3, rtol=1e-3
        )

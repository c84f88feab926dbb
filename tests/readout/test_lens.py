"""The lens ends in the model's own output in every family, and its policies, targets and streaming do what they say."""

from __future__ import annotations

import copy
import warnings

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.model.output_head import OutputHead
from circuitvision.readout import prompt_embeddings
from circuitvision.readout.lens import run as lens_module
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.result import LensResult
from tests.readout.common import NAMES, run
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model

READ = [name for name in NAMES if "headless" not in case(name).tags]


@pytest.mark.parametrize("name", READ)
@pytest.mark.parametrize("norm", ["own", "frozen"])
def test_at_the_last_layer_the_lens_is_the_models_own_output(name, norm):
    """Every tower that feeds the output: pooled where the family pools, at its positions where it does not."""
    model, out, cache = run(name)
    for tower_name, tower in model.towers.items():
        kind = tower.output_head.kind
        feeds = tower.reader is tower and not tower.feeds_cache
        if not feeds or kind in ("hidden", "embedding"):
            continue
        result = logit_lens(model, cache, tower_name, targets={0: 0, 1: 1}, norm=norm)
        wanted = (out.T if tower_name == "text" else out)[..., :2]
        found = by_row(result, "pooled")[-1] if wanted.ndim == 2 else by_row(result)[-1][:, -wanted.shape[1] :]
        close = (
            {"atol": 0, "rtol": 0}
            if norm == "own" and name != "siglip2" and kind != "actions"
            else {"atol": 3e-6, "rtol": 1e-5}
        )
        torch.testing.assert_close(found, wanted, **close)
        earlier = logit_lens(
            model, cache, tower_name, targets={0: 0, 1: 1}, norm=norm, sites=f"{tower_name}.hook_input"
        )
        assert not torch.allclose(by_row(earlier)[0], by_row(result)[-1], atol=1e-2)


@pytest.mark.parametrize("name", [name for name in READ if "language" in run(name)[0].towers])
def test_the_vision_lens_at_the_feature_layer_is_the_projectors_output_read_as_tokens(name):
    model, _, cache = run(name)
    everything = logit_lens(model, cache, "vision", targets={3: 3, 5: 5})
    projected = cache["projector.hook_out"]
    read = model.language.readout(
        projected.reshape(len(everything.axes["example"]), -1, projected.shape[-1]), context=cache
    )
    torch.testing.assert_close(by_row(everything)[-1], read[..., [3, 5]], atol=2e-5, rtol=1e-4)


def test_what_positions_say_adds_up_to_what_the_pooling_makes_of_them():
    """CLS: itself; a mean: their mean; DINOv2: CLS and mean patch beside the bias; DeiT's teacher: the mean of two tokens."""
    for name, combine in {
        "vit": lambda v, n, b: v[:, 0],
        "deit": lambda v, n, b: v[:, 0],
        "deit-teacher": lambda v, n, b: (v[:, 0] + v[:, 1]) / 2,
        "clip-classifier": lambda v, n, b: v[:, n:].mean(1),
        "siglip-classifier": lambda v, n, b: v.mean(1),
        "dinov2-registers": lambda v, n, b: v[:, 0] + v[:, n:].mean(1) - b,
    }.items():
        model, _, cache = run(name)
        result = logit_lens(model, cache, "vision", targets={0: 0, 1: 1, 2: 2})
        bias = (
            getattr(model.module.classifier, "bias", torch.zeros(3))[:3].detach() if name.startswith("dinov2") else None
        )
        for layer in range(len(result.axes["layer"])):
            found = combine(by_row(result)[layer], model.vision.cfg.n_prefix, bias)
            torch.testing.assert_close(found, by_row(result, "pooled")[layer], atol=1e-5, rtol=1e-4)


def test_a_pooling_head_reads_a_position_as_an_image_of_that_position_alone():
    model, _, cache = run("siglip")
    result = logit_lens(model, cache, "vision", targets={0: 0, 1: 1})
    resid = cache["vision.blocks.0.hook_resid_post"]
    alone = model.vision.readout(resid[:, 4:5], context=cache)
    torch.testing.assert_close(by_row(result)[1][:, 4], alone[:, :2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "paligemma", "clip", "pi0"])
def test_a_frozen_lens_is_linear_and_its_parts_add_up(name):
    """lens(a + b) = lens(a) + lens(b) - lens(0), in float64."""
    model, _, cache = run(name, torch.float64)
    tower = "vision" if "language" not in model.towers else list(model.towers)[-1]
    sites = ["hook_input", "blocks.*.hook_attn_out", "blocks.*.hook_mlp_out", "blocks.*.hook_resid_post"]
    read = logit_lens(
        model, cache, tower, targets={0: 0, 1: 1}, norm="frozen", sites=[f"{tower}.{site}" for site in sites]
    )
    names = read.axes["site"]
    parts = [index for index, site in enumerate(names) if not site.endswith("resid_post")]
    count = model.towers[tower].cfg.n_layers
    zero = cv.ActivationCache({key: value.clone() for key, value in cache.items()}, model, cache.inputs)
    zero._values[f"{tower}.blocks.0.hook_attn_out"].zero_()
    offset = by_row(
        logit_lens(model, zero, tower, targets={0: 0, 1: 1}, norm="frozen", sites=f"{tower}.blocks.0.hook_attn_out")
    )[0]
    whole = by_row(read)[names.index(f"blocks.{count - 1}.hook_resid_post")]
    cap = getattr(model.towers[tower].config, "final_logit_softcapping", None)
    assert cap is None or name != "paligemma2"
    torch.testing.assert_close(by_row(read)[parts].sum(0) - (len(parts) - 1) * offset, whole, atol=1e-10, rtol=1e-10)


def test_own_statistics_are_not_linear():
    """The mutant of the test above."""
    model, _, cache = run("vit", torch.float64)
    read = logit_lens(
        model, cache, "vision", targets=[0], sites=["attn_out", "mlp_out", "vision.hook_input", "resid_post"]
    )
    parts = [index for index, site in enumerate(read.axes["site"]) if not site.endswith("resid_post")]
    assert not torch.allclose(by_row(read)[parts].sum(0), by_row(read)[-1], atol=1e-2)


def test_no_norm_is_the_head_alone():
    model, _, cache = run("llava-clip-llama")
    found = logit_lens(model, cache, targets=[4], norm="none", sites="attn_out")
    raw = cache["language.blocks.1.hook_attn_out"] @ model.language.W_U[:, 4]
    torch.testing.assert_close(by_row(found)[found.axes["layer"].index(1), ..., 0], raw, atol=1e-4, rtol=1e-4)


def test_branches_and_heads_are_read_with_their_own_statistics():
    model, _, cache = run("vit", everything=True)
    heads = logit_lens(model, cache, "vision", targets=[2], sites="attn.hook_result")
    assert list(heads.axes) == ["layer", "head", "position", "target", "example"]
    result = cache["vision.blocks.2.attn.hook_result"][:, :, 1]
    wanted = model.module.classifier(model.vision.final_norm(result))[..., 2]
    torch.testing.assert_close(by_row(heads)[2, 1, :, :, 0], wanted, atol=1e-5, rtol=1e-4)
    assert not by_row(heads, "pooled").numel() or by_row(heads, "pooled").shape[0] == len(heads.axes["layer"])


@pytest.mark.parametrize("name", ["dinov2-registers", "deit-teacher", "paligemma2", "siglip", "llava-next-mistral"])
def test_small_pieces_give_what_one_piece_gives(name, monkeypatch):
    model, _, cache = run(name)
    for tower in model.towers:
        whole = logit_lens(model, cache, tower, targets={0: 0, 1: 1}, measure="logprob")
        monkeypatch.setattr(lens_module, "CHUNK_BYTES", 1)
        pieces = logit_lens(model, cache, tower, targets={0: 0, 1: 1}, measure="logprob")
        monkeypatch.undo()
        torch.testing.assert_close(by_row(pieces), by_row(whole), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(by_row(pieces, "pooled"), by_row(whole, "pooled"))


def test_nothing_of_the_size_of_all_logits_is_ever_made(monkeypatch):
    model, _, cache = run("llava-clip-llama")
    largest = []
    piece = OutputHead.positions

    def watched(self, *arguments):
        out = piece(self, *arguments)
        largest.append(out.numel() * 4)
        return out

    monkeypatch.setattr(OutputHead, "positions", watched)
    monkeypatch.setattr(lens_module, "CHUNK_BYTES", 1024)
    result = logit_lens(model, cache, targets=[1])
    assert max(largest) <= 1024
    assert result.n_outputs * by_row(result).numel() * 4 > 20 * 1024


def test_inputs_in_place_of_a_cache_give_the_same():
    for name, tower in (("clip", "vision"), ("pi0", "action"), ("llava-clip-llama-layers", "vision")):
        model, _, cache = run(name)
        first = logit_lens(model, cache, tower, targets=[0])
        again = logit_lens(model, cache.inputs, tower, targets=[0])
        torch.testing.assert_close(by_row(again), by_row(first))


def test_ranks_and_highest_columns():
    model, out, cache = run("vit")
    result = logit_lens(model, cache, "vision", targets={"label": [1, 2]})
    assert result.axes["target"] == ["label"]
    for row, label in enumerate((1, 2)):
        assert by_row(result, "pooled_ranks")[-1, row, 0] == 1 + int((out[row] > out[row, label]).sum())
        assert by_row(result, "pooled_ids")[-1, row, 0] == out[row].argmax()
        assert by_row(result, "pooled")[-1, row, 0] == out[row, label]
    assert result.n_outputs == out.shape[-1]
    assert result.names[str(int(out[0].argmax()))] == model.config.id2label[int(out[0].argmax())]


def test_words_of_several_tokens_need_a_choice():
    model, out, cache = run("llava-clip-llama")
    word = "red blue"
    with pytest.raises(InputError, match=r"'first'.*'mean'.*'joint'"):
        logit_lens(model, cache, targets=[word])
    ids = min((model.tokenizer.encode(f, add_special_tokens=False) for f in (" " + word, word)), key=len)
    last = out[:, -1].log_softmax(-1)
    for aggregation, wanted in {
        "first": last[:, ids[0]],
        "mean": last[:, ids].mean(-1),
        "joint": last[:, ids].sum(-1),
    }.items():
        found = logit_lens(model, cache, targets=[word], aggregation=aggregation, measure="logprob")
        torch.testing.assert_close(by_row(found)[-1, :, -1, 0], wanted, atol=1e-5, rtol=1e-5)
    probability = by_row(logit_lens(model, cache, targets=[word], aggregation="joint", measure="prob"))[-1, :, -1, 0]
    torch.testing.assert_close(probability, last[:, ids].sum(-1).exp(), atol=1e-6, rtol=1e-4)
    with pytest.raises(InputError, match="logprob"):
        logit_lens(model, cache, targets=[word], aggregation="joint")


def test_clip_reads_images_against_prompts():
    model = cv.organisms.load("shapes-clip")
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    prompts = ["a red circle", "a blue square", "a green triangle"]
    inputs = model.inputs(images=[scene.image] * 2, text=prompts)
    with torch.no_grad():
        logits, cache = model.run_with_cache(inputs)
    by_prompt = logit_lens(model, cache, "vision", targets={prompt: prompt for prompt in prompts})
    torch.testing.assert_close(by_row(by_prompt, "pooled")[-1], logits, atol=1e-4, rtol=1e-5)
    torch.testing.assert_close(
        by_row(logit_lens(model, cache, "vision", targets={0: 0, 1: 1, 2: 2})), by_row(by_prompt), atol=1e-4, rtol=1e-4
    )
    assert by_prompt.names["1"] == "a blue square"
    embedded = prompt_embeddings(model, prompts)
    torch.testing.assert_close(embedded.norm(dim=-1), torch.ones(3))
    given = logit_lens(model, cache, "vision", targets=7 * embedded)
    torch.testing.assert_close(by_row(given), by_row(by_prompt), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([""], "empty"),
        (["  "], "empty"),
        (["red " * 100], "takes 102 tokens|takes .* tokens"),
        ("a red circle", "list"),
        ([], "list"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(prompts, message):
    model = cv.organisms.load("shapes-clip")
    with pytest.raises(InputError, match=message):
        prompt_embeddings(model, prompts)


def test_a_tower_without_a_read_out_asks_for_a_direction_or_a_callable():
    model, _, cache = run("vit-headless")
    for options in ({"targets": [1]}, {"targets": ["cat"]}, {"top_k": 3}):
        with pytest.raises(InputError, match=r"directions.*readout=fn"):
            logit_lens(model, cache, "vision", **options)
    directions = torch.randn(2, model.vision.cfg.d_model, generator=torch.Generator().manual_seed(0))
    result = logit_lens(model, cache, "vision", targets=directions)
    wanted = model.vision.final_norm(cache["vision.blocks.1.hook_resid_post"]) @ directions.T
    torch.testing.assert_close(by_row(result)[2], wanted)
    own = logit_lens(model, cache, "vision", targets={0: 0, 1: 1}, readout=lambda resid: resid @ directions.T)
    torch.testing.assert_close(by_row(own)[2], cache["vision.blocks.1.hook_resid_post"] @ directions.T)
    assert by_row(logit_lens(model, cache, "vision", top_k=2, readout=lambda resid: resid), "ids").shape[-1] == 2


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"targets": ["walrus"]}, "no class"),
        ("vit", {"targets": [10_000]}, "no class 10000"),
        ("vit", {"targets": [-1]}, "no class -1"),
        ("vit", {"targets": []}, "at least one"),
        ("vit", {"targets": {"label": [1, 2, 3]}}, "3"),
        ("vit", {"top_k": 0}, "top_k"),
        ("vit", {"targets": [0], "norm": "batch"}, "norm"),
        ("vit", {"targets": [0], "norm": "tuned"}, "TunedLens"),
        ("vit", {"targets": [0], "aggregation": "last"}, "aggregation"),
        ("pi0", {"targets": [0], "tower": "action", "measure": "prob"}, "distribution"),
        ("pi0", {"targets": ["up"], "tower": "action"}, "number"),
        ("vit-headless", {"targets": [0], "norm": "frozen", "readout": abs}, "leave norm= out"),
        ("vit-headless", {"targets": [0], "readout": 3}, "function"),
        ("vit", {"top_k": 2.5}, "whole number"),
        ("vit", {"targets": [0], "step": "last"}, "number of one pass"),
        ("vit", {"targets": [0], "norm": "tuned", "tuned": 3}, "TunedLens"),
        ("vit", {"targets": np.ones((1, 24)), "measure": "prob"}, "no distribution"),
        ("vit", {"targets": [0], "sites": 3}, "kinds, names or globs"),
        ("clip", {"targets": ["a cat"], "tower": "text"}, "number of the image"),
    ],
)
def test_meaningless_requests_are_refused(name, options, message):
    model, _, cache = run(name)
    with pytest.raises(InputError, match=message):
        logit_lens(model, cache, **options)


def test_sites_that_are_not_there_are_refused():
    model, _, cache = run("vit")
    with pytest.raises(UnknownSiteError, match="hook_resid_post"):
        logit_lens(model, cache, "vision", targets=[0], sites="hook_resid_pots")
    clip, _, both = run("clip")
    with pytest.raises(InputError, match="one tower"):
        logit_lens(clip, both, "vision", targets=[0], sites="text.hook_input")
    for site, way_out in {
        "mlp.hook_post": "value_vectors",
        "z": "attn.hook_result",
        "pattern": "attention_maps",
        "ln_final.hook_normalized": "once more",
        "hook_readout": "once more",
        "ln1.hook_scale": "denominators",
    }.items():
        with pytest.raises(InputError, match=way_out):
            logit_lens(model, cache, "vision", targets=[0], sites=site)


def test_passes_of_a_denoising_run_are_read_one_at_a_time():
    model, _, cache = run("pi0")
    with model.record(model.action.stream_sites()) as steps:
        model.sample_actions(cache.inputs, num_steps=3)
    with pytest.raises(InputError, match="step="):
        logit_lens(model, steps, "action", targets=[0])
    first, last = (by_row(logit_lens(model, steps, "action", targets=[0], step=step)) for step in (0, 2))
    assert first.shape == last.shape
    assert not torch.equal(first, last)


def test_results_are_saved_whole_and_cut_by_row(tmp_path):
    model, _, cache = run("clip")
    result = logit_lens(model, cache, "vision", targets={0: 0, 1: 1}, measure="prob")
    again = LensResult.load(result.save(tmp_path / "lens.safetensors"))
    assert torch.equal(by_row(again, "pooled"), by_row(result, "pooled"))
    assert again.names == result.names
    one = again.take(1)
    assert torch.equal(by_row(one)[:, 0], by_row(result)[:, 1])
    assert one.axes["example"] == [result.axes["example"][1]]
    assert len(result.to_frame()) == by_row(result).numel()


def test_reading_leaves_no_trace_and_sees_no_hook():
    model, _, cache = run("clip")
    fired = []
    with model.hooks([("vision.ln_final.hook_scale", lambda value, hook: fired.append(hook.name))]):
        logit_lens(model, cache, "vision", targets=[0])
    assert not fired
    assert not any(p.grad is not None for p in model.module.parameters())


def test_bfloat16_is_read_in_float32():
    name = "llava-clip-llama"
    module = copy.deepcopy(shared_model(name)).to(torch.bfloat16)
    model = cv.HookedModel(module, case(name).processor())
    inputs = case(name).inputs(module, batch=1, dtype=torch.bfloat16)
    result = logit_lens(model, inputs, targets=[1], measure="logprob")
    assert by_row(result).dtype == torch.float32


@pytest.mark.parametrize("name", ["clip", "llava-clip-llama-layers", "vit", "pi0"])
def test_caches_without_a_row_axis_are_read_as_one_row(name):
    model = run(name)[0]
    inputs = case(name).inputs(model.module, batch=1)
    if name == "clip":
        inputs = {key: value[:1] for key, value in inputs.items()}
    with torch.no_grad():
        _, whole = model.run_with_cache(inputs, "**")
    if any(isinstance(value, torch.Tensor) and value.shape[0] != 1 for value in whole.values()):
        pytest.skip("one example is several rows")
    for tower in model.towers:
        wanted = logit_lens(model, whole, tower, targets=[0])
        torch.testing.assert_close(
            by_row(logit_lens(model, whole.remove_batch_dim(), tower, targets=[0])), by_row(wanted)
        )


@pytest.mark.parametrize("name", ["vit", "dinov2-registers", "deit-teacher"])
def test_a_site_without_prefix_positions_is_read_as_patches(name):
    """hook_embed has patches only: none of them is the CLS position, and no output is pooled from them."""
    model, _, cache = run(name)
    n = model.vision.cfg.n_prefix
    embed = cache["vision.hook_embed"]
    for norm in ("own", "frozen"):
        result = logit_lens(model, cache, "vision", targets=[0], sites="hook_embed", norm=norm)
        assert not by_row(result, "pooled").numel()
        assert result.axes["position"][0] == n
        assert (result.places[..., 2] >= 0).all()
        padded = cv.ActivationCache(dict(cache.items()), model, cache.inputs)
        padded._values["vision.hook_input"] = torch.cat([torch.zeros(len(embed), n, embed.shape[-1]), embed], 1)
        whole = logit_lens(model, padded, "vision", targets=[0], sites="hook_input", norm=norm)
        torch.testing.assert_close(by_row(result), by_row(whole)[:, :, n:])


def test_directions_of_another_width_are_refused():
    for name, tower in (("vit", "vision"), ("llava-clip-llama", "language"), ("clip-vision-projection", "vision")):
        model, _, cache = run(name)
        with pytest.raises(InputError, match="Directions of the"):
            logit_lens(model, cache, tower, targets=torch.ones(2, 5))


def test_a_tuple_is_a_contrast_of_two_targets():
    model, _, cache = run("vit")
    both = logit_lens(model, cache, "vision", targets={0: 0, 3: 3})
    found = logit_lens(model, cache, "vision", targets=(0, 3))
    assert torch.equal(by_row(found), by_row(both.contrast(0, 3)))
    assert len(found.axes["target"]) == 1
    with pytest.raises(InputError, match="tuple of two"):
        logit_lens(model, cache, "vision", targets=(0, 1, 2))


def test_a_tower_names_the_sites_of_its_stream():
    model, *_ = run("vit")
    names = model.vision.stream_sites()
    assert names == ["vision.hook_input", *(f"vision.blocks.{layer}.hook_resid_post" for layer in range(3))]
    vlm, *_ = run("llava-clip-llama")
    assert all(not vlm.is_dead(name) for name in vlm.vision.stream_sites())
    assert len(vlm.vision.stream_sites()) <= vlm.vision.cfg.n_layers


def test_a_list_is_one_target_per_example_and_a_mapping_names_columns():
    model, out, cache = run("vit")
    named = logit_lens(model, cache, "vision", targets={"first": 2, "each": [1, 3]})
    assert named.axes["target"] == ["first", "each"]
    wanted = torch.stack([out[:, 2], torch.stack([out[0, 1], out[1, 3]])], -1)
    torch.testing.assert_close(by_row(named, "pooled")[-1], wanted, atol=1e-5, rtol=1e-5)
    with pytest.warns(UserWarning, match=r"\{'answer': \[...\]\}.*\{1: 1, 3: 3\}"):
        each = logit_lens(model, cache, "vision", targets=[1, 3])
    assert each.axes["target"] == ["answer"]
    assert torch.equal(each.values[..., 0, :], named.values[..., 1, :])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        alike = logit_lens(model, cache, "vision", targets=[2, 2])
        one = logit_lens(model, cache, "vision", targets=[2])
    assert torch.equal(alike.values, one.values)
    assert one.axes["target"] == [2]
    with pytest.raises(InputError, match=r"3 for 2 examples.*\{1: 1, 2: 2, …\}.*tuple"):
        logit_lens(model, cache, "vision", targets=[1, 2, 3])
    contrasts = logit_lens(model, cache, "vision", targets=[(1, 2), (3, 0)])
    wanted = torch.stack([out[0, 1] - out[0, 2], out[1, 3] - out[1, 0]])
    torch.testing.assert_close(by_row(contrasts, "pooled")[-1, :, 0], wanted, atol=1e-5, rtol=1e-5)


def test_prompts_are_targets_like_any_others():
    model = cv.organisms.load("shapes-clip")
    rng = np.random.default_rng(0)
    inputs = model.inputs(images=[cv.data.scenes.sample_scene(rng).image for _ in range(2)], text=["a red circle"])
    named = {"round": "a red circle", "square": "a blue square"}
    both = logit_lens(model, inputs, "vision", targets=named)
    assert both.axes["target"] == ["round", "square"]
    assert both.names["1"] == "a blue square"
    each = logit_lens(model, inputs, "vision", targets={"own": ["a blue square", "a red circle"]})
    torch.testing.assert_close(each.values[..., 0, 0], both.values[..., 1, 0])
    torch.testing.assert_close(each.values[..., 0, 1], both.values[..., 0, 1])

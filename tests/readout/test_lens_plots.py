"""Figures of lenses and attributions show the numbers they are given, in their places, and say what is highest in words."""

from __future__ import annotations

import html

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.attribution.bilinear import bilinear_attribution
from circuitvision.readout.attribution.direct import direct_attribution, source_attribution
from circuitvision.readout.attribution.increase import log_prob_increase
from circuitvision.readout.lens import summaries
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.tuned import TunedLens
from tests.readout.common import run


def heat_maps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_patches_show_the_grid_of_every_layer_and_name_the_highest():
    model, _, cache = run("llava-clip-llama")
    result = logit_lens(model, cache, targets=["red", "blue"])
    figure = result.plot(target="blue")
    maps = heat_maps(figure)
    assert len(maps) == len(result.axes["layer"])
    for layer, trace in zip(result.axes["layer"], maps, strict=True):
        np.testing.assert_allclose(np.asarray(trace.z), result.patch_grid(layer, target="blue").numpy())
    at = int((result.places[0][:, 2] == 0).nonzero()[0])
    first = result.names[str(int(result.ids[1, 0, at, 0]))]
    assert f"highest: {html.escape(first)}" in maps[1].customdata[0][0]


def test_a_picture_and_a_box_are_drawn_and_by_rank_the_word_stands_on_the_patch():
    model = cv.organisms.load("shapes-vit")
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    inputs = model.inputs(images=[scene.image])
    figure = logit_lens(model, inputs, targets=[0]).plot(picture=scene.image, box=(0.0, 0.25, 0.5, 0.5))
    assert sum(trace.type == "image" for trace in figure.data) == 1 + len(heat_maps(figure))
    assert len(figure.layout.shapes) == 1 + len(heat_maps(figure))
    ranked = logit_lens(model, inputs, top_k=2)
    maps = heat_maps(ranked.plot())
    assert set(np.asarray(maps[0].text).flatten()) <= set(model.config.id2label.values())


def test_many_layers_are_thinned_evenly_and_both_ends_stay():
    from dataclasses import replace

    model, _, cache = run("vit")
    result = logit_lens(model, cache, "vision", targets=[0])
    many = replace(
        result,
        values=result.values[:1].expand(30, -1, -1, -1),
        ids=result.ids[:1].expand(30, -1, -1, -1),
        axes={**result.axes, "layer": list(range(30))},
    )
    titles = [annotation.text for annotation in many.plot().layout.annotations]
    assert titles[0] == "layer 0"
    assert titles[-1] == "layer 29"
    assert len(titles) == 9


def test_the_table_names_tokens_and_says_from_where_on_the_answer_stands():
    model, out, cache = run("llava-clip-llama")
    result = logit_lens(model, cache, top_k=3, measure="prob")
    figure = result.plot(view="table")
    (trace,) = heat_maps(figure)
    answer = model.tokenizer.convert_ids_to_tokens(int(out[0, -1].argmax()))
    assert trace.text[-1][-1] == cv.plots.lens._plain(answer).replace("<", "&lt;").replace(">", "&gt;")
    np.testing.assert_allclose(trace.z[-1][-1], float(out[0, -1].softmax(-1).max()), rtol=1e-5)
    text = [kind == "text" for kind in result.kinds[0]]
    assert trace.z.shape == (len(result.axes["layer"]), sum(text))


def test_lines_follow_the_pooled_output():
    model, out, cache = run("vit")
    result = logit_lens(model, cache, "vision", targets=[0, 1, 2])
    figure = result.plot(view="layers")
    assert [trace.y[-1] for trace in figure.data] == pytest.approx(out[:, :3].double().mean(0).tolist())
    language, _, other = run("llava-clip-llama")
    with pytest.raises(InputError, match="position="):
        logit_lens(language, other, targets=[1]).plot(view="layers")
    with pytest.raises(InputError, match="view"):
        result.plot(view="circle")


def test_bars_add_up_to_the_total():
    model, _, cache = run("vit", everything=True)
    result = direct_attribution(model, cache, (0, 1))
    figure = result.plot(count=5)
    (trace,) = figure.data
    assert sum(trace.x) == pytest.approx(float(result.total.double().mean()), abs=1e-5)
    assert trace.customdata[0] == result.top(1)[0][0]
    assert "others" in trace.customdata[-1]


def test_sources_are_laid_over_the_image():
    model, _, cache = run("llava-clip-llama", everything=True)
    result = source_attribution(model, cache, ("red", "blue"))
    figure = result.plot(heads=[(1, 0)])
    (trace,) = heat_maps(figure)
    positions = model.tokens(cache.inputs)["language"].positions("patch")
    np.testing.assert_allclose(np.asarray(trace.z).flatten(), result.values[1, 0, 0, positions].numpy(), atol=1e-7)


def test_every_other_result_has_its_figure():
    model, out, cache = run("llava-clip-llama", everything=True)
    for by in ("component", "head", "neuron", "source"):
        assert heat_maps(log_prob_increase(model, cache, 3, by=by).plot())
    lens = logit_lens(model, cache, targets={"answer": out[:, -1].argmax(-1).tolist()})
    figure = summaries.lens_identifiability(lens, "text").plot()
    assert len(figure.data[0].y) == len(lens.axes["layer"])
    clip, scores, both = run("clip", everything=True)
    pairs = bilinear_attribution(clip, both)
    (trace,) = heat_maps(pairs.plot(image=1, text=0))
    assert np.asarray(trace.z).sum() + pairs.bias == pytest.approx(float(scores[1, 0]), abs=1e-4)
    blank = TunedLens(torch.ones(2, 3), {"lens": ["plain", "tuned"], "layer": ["input", 0, 1]}, tower="vision")
    assert len(blank.plot().data) == 2

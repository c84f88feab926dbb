"""Figures of lenses and attributions show the numbers they are given, in their places, and say what is highest in words."""

from __future__ import annotations

import html
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.plots import kit, lens_text
from circuitvision.readout.attribution.bilinear import bilinear_attribution
from circuitvision.readout.attribution.direct import Attribution, direct_attribution, source_attribution
from circuitvision.readout.attribution.increase import log_prob_increase
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.result import LensResult
from circuitvision.readout.lens.summaries import LensSummary
from circuitvision.readout.lens.tuned import TunedLens
from circuitvision.readout.ranks import Ranking
from tests.readout.common import run
from tests.readout.layouts import by_row, of_rows
from tests.zoo import case


def heat_maps(figure):
    return [trace for trace in figure.data if trace.type == "heatmap"]


def test_patches_show_the_grid_of_every_layer_and_name_the_highest():
    model, _, cache = run("llava-clip-llama")
    result = logit_lens(model, cache, targets={"red": "red", "blue": "blue"})
    figure = result.plot(target="blue")
    maps = heat_maps(figure)
    assert len(maps) == len(result.axes["layer"])
    for layer, trace in zip(result.axes["layer"], maps, strict=True):
        np.testing.assert_allclose(np.asarray(trace.z), result.patch_grid(layer, target="blue").numpy())
    at = int((result.places[0][:, 2] == 0).nonzero()[0])
    first = result.names[str(int(by_row(result, "ids")[1, 0, at, 0]))]
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
    written = [str(word).rstrip("…") for word in np.asarray(maps[0].text).flatten()]
    assert all(any(name.startswith(word) for name in model.config.id2label.values()) for word in written)


def test_many_layers_are_thinned_evenly_and_both_ends_stay():
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
    assert trace.text[-1][-1] == lens_text.plain(answer).replace("<", "&lt;").replace(">", "&gt;")
    np.testing.assert_allclose(trace.z[-1][-1], float(out[0, -1].softmax(-1).max()), rtol=1e-5)
    text = [kind == "text" for kind in result.kinds[0]]
    assert trace.z.shape == (len(result.axes["layer"]), sum(text))


def test_lines_follow_the_pooled_output():
    model, out, cache = run("vit")
    result = logit_lens(model, cache, "vision", targets={0: 0, 1: 1, 2: 2})
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
    np.testing.assert_allclose(np.asarray(trace.z).flatten(), by_row(result)[1, 0, 0, positions].numpy(), atol=1e-7)


def test_every_other_result_has_its_figure():
    model, out, cache = run("llava-clip-llama", everything=True)
    for by in ("component", "head", "neuron", "source"):
        assert heat_maps(log_prob_increase(model, cache, 3, by=by).plot())
    lens = logit_lens(model, cache, targets={"answer": out[:, -1].argmax(-1).tolist()})
    figure = lens.identifiability("text").plot()
    assert len(figure.data[0].y) == len(lens.axes["layer"])
    clip, scores, both = run("clip", everything=True)
    pairs = bilinear_attribution(clip, both)
    (trace,) = heat_maps(pairs.plot(example=1, text=0))
    assert np.asarray(trace.z).sum() + pairs.bias == pytest.approx(float(scores[1, 0]), abs=1e-4)
    blank = TunedLens(torch.ones(2, 3), {"lens": ["plain", "tuned"], "layer": ["input", 0, 1]}, tower="vision")
    assert len(blank.plot().data) == 2


# -- what is shown of hand-made results ----------------------------------------------------------------------------------------------------


def small(values: list[list[float]], targets: list | None = None, **more) -> LensResult:
    """A lens of one row of 2 × 2 patches, of as many layers as values are given; the same value at every target and position of a layer."""
    targets = targets or ["<pad>", "red"]
    made = torch.tensor(values).reshape(len(values), 1, 1, -1).expand(-1, 1, 4, len(targets)).clone()
    places = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]]])
    layers = ["input", *range(len(values) - 1)]
    axes = {"layer": layers, "row": [0], "position": list(range(4)), "target": targets}
    best = torch.zeros(len(values), 1, 4, 1, dtype=torch.long)
    ids, pooled = best.movedim(1, -1), made[:, :, 0].movedim(1, -1)
    options = {"places": places, "ids": ids, "names": {"0": "<pad>"}, "pooled": pooled, "tower": "vision"}
    return of_rows(LensResult, made, axes, **{**options, **more})


def title(figure) -> str:
    return figure.layout.title.text


def test_names_are_text_and_never_markup():
    result = small([[1.0, 2.0], [3.0, 2.0]])
    over, table = result.plot(target="<pad>"), result.plot(view="table", target="<pad>")
    assert over.layout.coloraxis.colorbar.title.text == "&lt;pad&gt; (logit)"
    assert table.data[0].colorbar.title.text == "&lt;pad&gt; (logit)"
    assert all("<pad>" not in str(figure.to_dict()) for figure in (over, table, result.plot(view="layers")))


def test_without_a_finite_value_figures_say_so():
    nothing, zeros = small([[math.nan] * 2] * 2), small([[0.0] * 2] * 2)
    assert title(nothing.plot()).startswith("vision: &lt;pad&gt; has no finite value at these patches<br>")
    assert title(zeros.plot()).startswith("vision: &lt;pad&gt; is 0 at every patch<br>")
    assert title(nothing.plot(view="layers")) == "vision: no finite value at any layer"
    assert title(zeros.plot(view="layers")) == "vision: no target leads at layer 0"
    assert "red leads from layer 0 on" in title(small([[math.nan] * 2, [1.0, 4.0]]).plot(view="layers"))
    assert "red leads from input on" in title(small([[0.0, 1.0], [math.nan, 2.0]]).plot(view="layers"))
    table = nothing.plot(view="table")
    assert "has no finite value at layer 0" in title(table)
    assert (table.data[0].zmin, table.data[0].zmax) == (0, 1.0)


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([math.nan] * 3, "No term has a finite value"),
        ([0.0] * 3, "No term adds anything to red"),
        ([math.nan, 1.0, -2.0], "L0H0 takes most: \N{MINUS SIGN}2.00 of red"),
    ],
)
def test_bars_find_nothing_in_zeros_and_pass_over_what_has_no_value(values, found):
    terms = ["input", "L0.attn", "L0H0"]
    made = torch.tensor(values)[:, None]
    result = of_rows(Attribution, made, {"term": terms, "row": [0]}, direction="red", total=made.sum(0))
    assert title(result.plot()).startswith(found)
    assert "nan" not in title(result.plot())
    ranks = Ranking(made[:, 0], {"component": terms})
    assert "nan" not in title(ranks.plot())


def test_a_single_target_is_told_by_its_range():
    result = small([[-1.5], [4.0], [2.0]], ["<pad>"])
    text = title(result.plot(view="layers"))
    assert text == "&lt;pad&gt;: from \N{MINUS SIGN}1.5 at input to 4 at layer 0"
    assert title(small([[2.0], [2.0]], ["<pad>"]).plot(view="layers")) == "&lt;pad&gt; is 2 at every layer"


def test_targets_go_by_their_label_first():
    result = small([[1.0, 2.0]], [1, 0])
    for target, value in ((1, 1.0), (0, 2.0), (None, 1.0)):
        assert np.all(np.asarray(heat_maps(result.plot(target=target))[0].z) == value)
        assert np.all(np.asarray(result.plot(view="table", target=target).data[0].z) == value)
    with pytest.raises(InputError, match="There is no target"):
        result.plot(target=2)


def test_rows_that_are_there_are_drawn_by_every_view_and_others_refused():
    _, _, cache = run("clip")
    model = cache.model
    words = logit_lens(model, cache, "text", targets={0: 0, 1: 1})
    single, every = words.plot(example=1), words.plot()
    assert list(single.data[0].y) == pytest.approx(by_row(words, "pooled")[:, 1, 0].tolist())
    assert list(every.data[0].y) == pytest.approx(by_row(words, "pooled")[..., 0].mean(1).tolist())
    for view in (None, "layers", "table"):
        with pytest.raises(InputError, match="no example 9"):
            words.plot(view=view, example=9)
    with pytest.raises(InputError, match="no example 9"):
        small([[1.0, 2.0]]).plot(example=9)
    every_example = words.examples
    both = words.plot(view="layers", example=every_example[::-1])
    assert list(both.data[0].y) == pytest.approx(list(every.data[0].y))
    with pytest.raises(InputError, match="at least one example"):
        words.plot(view="layers", example=[])


def test_a_lens_with_heads_is_refused_with_the_way_out():
    model, _, cache = run("vit", everything=True)
    result = logit_lens(model, cache, "vision", targets={0: 0, 1: 1}, sites=["vision.blocks.*.attn.hook_result"])
    assert "head" in result.axes
    for view in (None, "patches", "table", "layers"):
        with pytest.raises(InputError, match="without heads"):
            result.plot(view=view)


def test_summaries_of_sites_and_of_heads_name_their_lines():
    values = torch.rand(2, 3, 4, 2, generator=torch.Generator().manual_seed(0))
    axes = {"layer": [0, 1], "head": [0, 1, 2], "row": list(range(4)), "target": ["red", "<blue>"]}
    figure = of_rows(LensSummary, values, axes, measure="identifiability", tower="vision").plot()
    assert [trace.name for trace in figure.data][:2] == ["head 0, red", "head 0, &lt;blue&gt;"]
    assert list(figure.data[3].y) == pytest.approx(values[:, 1, :, 1].double().mean(1).tolist())
    assert "identifiability of head 0, red goes from" in title(figure)
    sites = {"site": ["vision.a", "vision.b"], "row": [0, 1], "target": ["red"]}
    mixed = of_rows(LensSummary, values[:, 0, :2, :1], sites, measure="identifiability", tower="vision").plot()
    assert list(mixed.data[0].x) == ["vision.a", "vision.b"]
    bare = of_rows(
        LensSummary, values[:, 0, :, 0], {"layer": [0, 1], "row": list(range(4))}, measure="rate", tower="t"
    ).plot()
    assert title(bare).startswith("t: rate goes from")
    gap = values[:, 0, :, 0].clone()
    gap[0, 1] = math.nan
    line = of_rows(LensSummary, gap, {"layer": [0, 1], "row": list(range(4))}, measure="rate", tower="t").plot().data[0]
    assert line.y[0] == pytest.approx(float(gap[0, [0, 2, 3]].double().mean()))
    assert line.error_y.array[0] == pytest.approx(float(gap[0, [0, 2, 3]].double().std()) / math.sqrt(3))


def test_sources_show_the_tile_that_is_asked_for_and_scores_of_rows_name_no_list():
    model, out, cache = run("llava-clip-llama", everything=True)
    result = source_attribution(model, cache, ("red", "blue"))
    places = result.places.clone()
    here = places[0, :, 2] >= 0
    half = here.cumsum(0) > int(here.sum()) // 2
    places[:, here & half, 1] = 1
    places[:, here & half, 2] -= places[0, here & half, 2].min()
    places[:, here & ~half, 1] = 0
    split = replace(result, places=places)
    for tile, where in ((None, here & ~half), (0, here & ~half), (1, here & half)):
        (trace,) = heat_maps(split.plot(heads=[(1, 0)], tile=tile))
        shown = np.asarray(trace.z).flatten()
        np.testing.assert_allclose(shown[np.isfinite(shown)], by_row(result)[1, 0, 0, where].numpy(), atol=1e-7)
    with pytest.raises(InputError, match="tile 7"):
        split.plot(tile=7)
    with pytest.raises(InputError, match="no example 9"):
        split.plot(example=9)
    scores = log_prob_increase(model, cache, {"answer": out[:, -1].argmax(-1).tolist()})
    assert "{" not in title(scores.plot())
    assert title(replace(scores, values=scores.values * 0).plot()).startswith("No head moves log p(")
    assert kit.signed(math.nan) == "no value"


def test_a_box_in_pixels_or_in_shares_is_the_same_box():
    model = cv.organisms.load("shapes-vit")
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    lens = logit_lens(model, model.inputs(images=[scene.image]), targets=[0])
    pixels = scene.boxes[0]
    shares = tuple(edge / scene.image.size[0] for edge in pixels)
    first, second = (lens.plot(picture=scene.image, box=box) for box in (pixels, shares))
    assert first.layout.shapes == second.layout.shapes
    with pytest.raises(InputError, match="give the picture"):
        lens.plot(box=pixels)
    with pytest.raises(InputError, match="left < right"):
        lens.plot(picture=scene.image, box=(0.5, 0.0, 0.2, 1.0))


def test_a_wrong_keyword_lists_the_right_ones():
    model, _, cache = run("vit", everything=True)
    with pytest.raises(InputError, match=r"pictur=.*count, title"):
        direct_attribution(model, cache, (0, 1)).plot(pictur=None)


def test_the_table_of_a_classifier_is_about_the_class_token():
    model, out, cache = run("vit")
    figure = logit_lens(model, cache, "vision", top_k=2).plot(view="table")
    assert "[cls]" in figure.layout.title.text
    assert model.config.id2label[int(out[0].argmax())] in figure.layout.title.text


def test_actions_are_numbers_and_a_pass_is_named():
    model, velocity, cache = run("pi0")
    figure = logit_lens(model, cache, "action", targets={0: 0, 1: 1}).plot(view="table")
    (trace,) = heat_maps(figure)
    assert float(trace.text[-1][-1].replace("\N{MINUS SIGN}", "-")) == pytest.approx(
        float(velocity[0, -1, 0]), rel=0.01
    )
    with model.record(list(model.action.stream_sites())) as steps:
        model.sample_actions(cache.inputs, num_steps=3)
    later = logit_lens(model, steps, "action", targets=[0], step=2)
    assert "pass 2" in later.plot(view="table").layout.title.text
    assert "step=2" in later.provenance["method"]
    with pytest.raises(InputError, match="number of one pass"):
        logit_lens(model, steps, "action", targets=[0], step="all")


def test_long_names_are_cut_in_cells_and_whole_when_hovered():
    model = cv.organisms.load("shapes-clip")
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    prompts = ["red triangle and blue square", "blue square and red triangle"]
    named = {prompt: prompt for prompt in prompts}
    lens = logit_lens(model, model.inputs(images=[scene.image], text=prompts), "vision", targets=named)
    (trace,) = heat_maps(lens.plot(view="table"))
    assert max(len(cell) for line in trace.text for cell in line) <= 22
    assert any(prompts[0] in cell for line in trace.customdata for cell in line)


def test_notebooks_show_the_strongest_terms():
    model, _, cache = run("vit", everything=True)
    result = direct_attribution(model, cache, (0, 1))
    page = result._repr_html_()
    assert result.top(1)[0][0] in page
    assert "sha256" not in page
    assert "values=" not in repr(result)
    frame = logit_lens(model, cache, "vision", top_k=2).to_frame()
    assert set(frame["output"]) <= set(model.config.id2label.values())


@pytest.mark.parametrize(
    ("view", "wrong", "takes"),
    [
        (None, {"pictur": 1}, r"'patches' does not take pictur=; it takes example, target, picture, box"),
        ("patches", {"rows": [0]}, "rows=.*picture"),
        ("table", {"picture": 1}, "'table' does not take picture=; it takes example, positions, target, title"),
        ("layers", {"box": (0, 0, 1, 1)}, "'layers' does not take box=; it takes example, title, position, image"),
    ],
)
def test_every_view_lists_its_keywords(view, wrong, takes):
    result = small([[1.0, 2.0]])
    with pytest.raises(InputError, match=takes):
        result.plot(view=view, **wrong)
    for options in ({"view": "table", "positions": [99]}, {"view": "layers", "position": 99}):
        with pytest.raises(InputError, match="no position 99; this lens has 0 to 3, or 'last'"):
            result.plot(**options)
    with pytest.raises(InputError, match="at least one position"):
        result.plot(view="table", positions=[])


def test_the_title_of_a_lens_by_rank_says_the_word():
    model = cv.organisms.load("shapes-vit")
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    result = logit_lens(model, model.inputs(images=[scene.image]), top_k=2, measure="prob")
    values = by_row(result)[..., 0].clone()
    values[:, 0, 0] = -1  # the class token is no patch
    at = int(values.argmax())
    word = result.names[str(int(by_row(result, "ids")[..., 0].flatten()[at]))]
    assert f"{word!r} at<br>layer" in title(result.plot()) or f"{word!r} first" in title(result.plot())


def test_lines_at_the_last_word_of_every_row_leave_padding_out():
    model = run("llava-clip-llama")[0]
    for padding in ("left", "right"):
        inputs = case("llava-clip-llama").inputs(model.module, batch=2, padding=padding)
        result = logit_lens(model, inputs, targets={3: 3, 5: 5})
        at = inputs["attention_mask"].flip(1).argmax(1)
        last = inputs["attention_mask"].shape[1] - 1 - at
        assert len(set(last.tolist())) == (1 if padding == "left" else 2)
        figure = result.plot(view="layers", position="last")
        wanted = torch.stack([by_row(result)[:, row, last[row]] for row in range(2)]).double().mean(0)
        assert list(figure.data[1].y) == pytest.approx(wanted[:, 1].tolist())
        assert title(figure).startswith("At ")
    one = result.plot(view="layers", position=4, example=1)
    assert list(one.data[0].y) == pytest.approx(by_row(result)[:, 1, 4, 0].tolist())


def test_hovering_over_a_cell_of_the_table_names_the_position_by_its_number():
    model, _, cache = run("llava-clip-llama")
    result = logit_lens(model, cache, top_k=3)
    (trace,) = heat_maps(result.plot(view="table", positions=[9, "last"]))
    last = result.axes["position"][-1]
    assert [cell.partition("<br>")[0] for cell in trace.customdata[0]] == ["position 9", f"position {last}"]
    assert "%{x}" not in trace.hovertemplate


def test_a_table_whose_class_token_has_no_number_says_so():
    model, _, cache = run("vit")
    result = logit_lens(model, cache, "vision", top_k=2)
    by_row(result)[-1, 0, 0] = math.nan
    assert "has no finite value at layer 2" in title(result.plot(view="table"))
    by_row(result)[-1, 0, 0], by_row(result)[-1, 0, -1] = 1.0, math.nan
    assert "ranks" in title(result.plot(view="table"))

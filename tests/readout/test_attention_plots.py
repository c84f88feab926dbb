"""Figures of attention: that they show the numbers they are given, where they belong, and that the slider moves to the head it names."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from circuitvision import regions
from circuitvision.errors import InputError
from circuitvision.model.names import component
from circuitvision.plots import attention, attention_overlay, patches, style
from circuitvision.readout import (
    attention_entropy,
    attention_maps,
    attention_mass,
    distance_profile,
    position_pattern,
    rollout,
)
from circuitvision.readout.attention.contrast import AttentionContrast
from circuitvision.readout.attention.distance import DistanceProfile, PositionPattern
from circuitvision.readout.attention.mass import AttentionSummary
from tests.readout.layouts import by_row, of_rows
from tests.readout.test_attention import run
from tests.readout.test_attention_maps import made, random_shares

AXES = {"layer": [0, 1], "head": [0, 1], "row": [0, 1], "span": ["patch", "text", "everything"]}
SHARES = torch.tensor([[[0.2, 0.4], [0.5, 0.5]], [[0.1, 0.1], [0.9, 0.97]]])


def mass(**more) -> AttentionSummary:
    values = torch.stack([SHARES, 1 - SHARES, torch.ones_like(SHARES)], dim=-1)
    uniform = torch.tensor([0.25, 0.75, 1.0]).expand(2, 2, 3)
    return of_rows(AttentionSummary, values, AXES, tower="language", queries="last", uniform=uniform, **more)


def heat_maps(figure) -> list[np.ndarray]:
    return [np.asarray(trace.z, dtype=float) for trace in figure.data if trace.type == "heatmap"]


def test_the_summary_shows_the_mean_over_rows_of_every_span_but_everything():
    figure = mass().plot()
    patch, text = heat_maps(figure)
    np.testing.assert_allclose(patch, SHARES.mean(-1).numpy(), atol=1e-6)
    np.testing.assert_allclose(text, 1 - SHARES.mean(-1).numpy(), atol=1e-6)
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0, 1)
    assert "language L1H1 gives 94% of its attention to patch" in figure.layout.title.text
    assert "alike: 25%; mean of 2 examples; queries: last" in figure.layout.title.text
    (only,) = heat_maps(mass().plot(span="text"))
    np.testing.assert_allclose(only, text)
    assert "to text" in mass().plot(span="text").layout.title.text
    with pytest.raises(InputError, match="There is no span"):
        mass().plot(span="sky")


def test_names_of_spans_and_queries_are_text_and_never_markup():
    named = dataclasses.replace(
        mass(), axes={**mass().axes, "span": ["<b>patch", "<i>", "everything"]}, queries="<u>", provenance={}
    )
    for figure in (named.plot(), named.plot(span="<b>patch"), attention.spans(named)):
        assert not any(tag in str(figure.to_dict()) for tag in ("<b>", "<i>", "<u>"))
        assert "&lt;b&gt;patch" in figure.layout.title.text
    maps = dataclasses.replace(planted_maps(), query="<u>")
    assert "query: &lt;u&gt;" in maps.plot().layout.title.text


def test_a_row_without_a_query_is_said_to_have_none():
    nothing = dataclasses.replace(planted_maps(), values=torch.full((2, 3, 18, 1), float("nan")))
    assert "no attention to show" in nothing.plot().layout.title.text


def test_unread_layers_are_marked_and_missing_values_are_dashes():
    gaps = dataclasses.replace(mass(dead_layers=[1]), values=mass().values.clone())
    by_row(gaps)[0, 1] = float("nan")
    figure = gaps.plot()
    assert list(figure.layout.yaxis.ticktext) == ["0", "1 (unread)"]
    assert "–" in {word for trace in figure.data if trace.meta == "words" for word in trace.text}
    nothing = dataclasses.replace(mass(), values=torch.full((2, 2, 3, 2), float("nan")))
    assert "No head" in nothing.plot().layout.title.text


def test_entropies_and_peaks_say_what_they_measure():
    _, _, cache = run("vit")
    figure = attention_entropy(cache.model, cache).plot()
    assert "narrowest attention" in figure.layout.title.text
    assert figure.layout.coloraxis.cmax == pytest.approx(np.log(17))
    values = torch.zeros(1, 2, 4, 16)
    values[..., 5] = 1.0
    peaks = made(values).peak_in(regions.box((8.0, 8.0, 16.0, 16.0))).plot()
    assert "peaks inside the region in 100% of examples" in peaks.layout.title.text
    assert "by chance 6%" in peaks.layout.title.text


def test_stacked_bars_fill_every_layer_above_uniform_attention():
    figure = attention.spans(mass())
    names = {trace.name: list(trace.x) for trace in figure.data}
    assert list(names) == ["patch", "text"]
    assert names["patch"] == pytest.approx([0.25, 0.4, 0.5175])
    assert list(figure.data[0].y) == ["all alike", "layer 0", "layer 1"]
    partial = dataclasses.replace(mass(), values=mass().values * 0.5, uniform=mass().uniform * 0.5)
    assert [trace.name for trace in attention.spans(partial).data] == ["patch", "text", "other"]
    double = dataclasses.replace(mass(), values=mass().values * 2)
    with pytest.raises(InputError, match="overlap"):
        attention.spans(double)
    with pytest.raises(InputError, match="attention_mass"):
        attention.spans(mass().span("text"))


def test_distance_lines_and_means():
    _, _, cache = run("dinov2-registers")
    result = distance_profile(cache.model, cache)
    figure = result.plot()
    lines = [trace for trace in figure.data if trace.mode == "lines" and trace.name == "layer 1"]
    assert len(lines) == 3
    np.testing.assert_allclose(lines[0].y, by_row(result)[1, 0].mean(0)[:4], rtol=1e-5)
    assert list(figure.layout.xaxis.ticktext) == ["0", "1", "2", "3", "cls", "register"]
    dots = [trace for trace in figure.data if trace.mode == "markers" and trace.xaxis == "x2"]
    np.testing.assert_allclose(dots[1].y, result.mean_distance[1].mean(-1), rtol=1e-5)
    assert "patches far in" in figure.layout.title.text
    nowhere = dataclasses.replace(result, mean_distance=torch.full((3, 3, 2), float("nan")))
    assert "No patch" in nowhere.plot().layout.title.text
    assert isinstance(result, DistanceProfile)


def test_offsets_show_the_best_explained_heads_first():
    _, _, cache = run("vit")
    result = position_pattern(cache.model, cache)
    figure = result.plot(count=2)
    best = int(result.explained.flatten().argmax())
    layer, head = divmod(best, 4)
    grids = heat_maps(figure)
    assert len(grids) == 2
    np.testing.assert_allclose(grids[0], by_row(result)[layer, head], rtol=1e-5)
    assert f"L{layer}H{head}" in figure.layout.title.text
    assert len(figure.layout.shapes) == 2
    empty = dataclasses.replace(result, explained=torch.full((3, 4), float("nan")))
    with pytest.raises(InputError, match="nothing to draw"):
        empty.plot()
    assert isinstance(result, PositionPattern)


def planted_maps():
    values = random_shares(2, 3, 1, 18)
    values[1, 2, 0] = 0.0
    values[1, 2, 0, 2 + 6] = 1.0
    return made(values, prefix=2, query="last")


def test_the_overlay_opens_at_the_head_that_looks_most_at_the_box():
    figure = planted_maps().plot(picture=np.zeros((64, 96, 3), dtype=np.uint8), box=(48, 16, 72, 32))
    shown, heads = heat_maps(figure)
    assert shown[1, 2] == 1.0
    assert heads.shape == (2, 3)
    assert heads[1, 2] == pytest.approx(1.0)
    assert "L1H2 gives 100% of its attention to the box" in figure.layout.title.text
    slider = figure.layout.sliders[0]
    assert slider.steps[slider.active].label.endswith(" L1H2")
    box, around = figure.layout.shapes
    # The box is columns 2 to 3 of 4 and row 1 of 4, of a picture 96 wide and 64 high.
    assert (box.x0, box.x1, box.y0, box.y1) == (47.5, 71.5, 15.5, 31.5)
    assert (around.x0, around.y0) == (1.5, 0.5)


def test_every_step_of_the_slider_shows_the_head_it_names():
    maps = planted_maps()
    figure = maps.plot(box=(16, 8, 24, 16))
    for step in figure.layout.sliders[0].steps:
        node = component(step.label)
        layer, head = node.layer, node.head
        data, layout, traces = step.args
        np.testing.assert_allclose(np.array(data["z"][0]), maps.grid(layer, head).numpy(), rtol=1e-6)
        assert figure.data[traces[0]].type == "heatmap"
        assert f"L{layer}H{head} gives" in layout["title.text"]
        assert layout["shapes[1].x0"] == head - 0.5
        assert layout["shapes[1].y1"] == layer + 0.5
    json.dumps(figure.layout.sliders[0].to_plotly_json())
    assert "layout" in figure.to_json()


def test_of_many_heads_the_strongest_are_behind_the_slider():
    many = made(random_shares(20, 20, 1, 16))
    figure = many.plot()
    labels = [component(step.label) for step in figure.layout.sliders[0].steps]
    share = by_row(many)[..., 0, :].sum(-1)
    assert len(labels) == 144
    best = divmod(int(share.argmax()), 20)
    places = [(label.layer, label.head) for label in labels]
    assert best in places
    assert places == sorted(places)


def test_the_query_patch_is_marked_where_it_is_one():
    model, inputs, cache = run("vit")
    tokens = model.tokens(inputs)["vision"]
    picture = Image.new("RGB", (32, 32))
    asked = attention_maps(model, cache, query=tokens.image(0).patch(1, 2)).plot(picture=picture)
    assert "query" in {annotation.text for annotation in asked.layout.annotations}
    square = asked.layout.shapes[0]
    assert (square.x0, square.x1, square.y0, square.y1) == (15.5, 23.5, 7.5, 15.5)
    assert "query" not in {annotation.text for annotation in attention_maps(model, cache).plot().layout.annotations}


def tiled(values):
    """Maps of one image of 2 × 2 patches, read whole (tile 0) and in part (tile 1)."""
    maps = made(values, rows=2, columns=4)
    maps.places[:, :, 1] = torch.tensor([0] * 4 + [1] * 4)
    maps.places[:, :, 2:] = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]] * 2)
    left_top = maps.places[:, :, [3, 2]].float()
    maps.boxes[:] = torch.cat([left_top * 16, left_top * 16 + 16], -1)
    maps.boxes[:, 4:] = torch.cat([left_top * 8, left_top * 8 + 8], -1)[:, 4:]
    return maps


def test_the_query_is_marked_on_its_own_tile_alone_and_shares_are_of_the_tile_drawn():
    values = torch.zeros(1, 2, 1, 8)
    values[0, 0, 0, :] = torch.tensor([0.04, 0, 0, 0, 0.9, 0.06, 0, 0])
    values[0, 1, 0, :] = torch.tensor([0.02, 0, 0, 0, 0.5, 0.48, 0, 0])
    maps = tiled(values)
    maps = dataclasses.replace(maps, query_places=torch.tensor([[0, 1, 1, 0]]))
    first, second = maps.plot(), maps.plot(tile=1)
    assert "query" not in {annotation.text for annotation in first.layout.annotations}
    assert "query" in {annotation.text for annotation in second.layout.annotations}
    assert "H0 gives 4% of its attention to tile 0 of this image" in first.layout.title.text
    assert "H1 gives 98% of its attention to tile 1 of this image" in second.layout.title.text
    np.testing.assert_allclose(heat_maps(second)[1], [[0.96, 0.98]])
    # A box is what all tiles show of it, unless a tile is named.
    assert "H0 gives 94% of its attention to the box" in maps.plot(box=(0, 0, 8, 8)).layout.title.text
    assert "90% of its attention to the box in tile 1" in maps.plot(box=(0, 0, 8, 8), tile=1).layout.title.text


def test_a_box_lies_in_the_image_that_is_shown():
    values = torch.zeros(1, 2, 1, 8)
    values[0, 0, 0, 0], values[0, 1, 0, 4] = 1.0, 1.0
    maps = tiled(values)
    maps.places[:, :, 0] = torch.tensor([0] * 4 + [1] * 4)
    maps.places[:, :, 1] = 0
    assert "H0 gives 100%" in maps.plot(box=(0, 0, 8, 8)).layout.title.text
    assert "H1 gives 100%" in maps.plot(box=(0, 0, 8, 8), image=1).layout.title.text


def test_the_overlay_takes_a_pass_by_its_number():
    values = random_shares(2, 1, 2, 1, 16)
    maps = dataclasses.replace(made(values), axes={**made(values).axes, "step": [1, 2]})
    for step, place in ((1, 0), (2, 1)):
        figure = maps.plot(step=step)
        assert len(figure.layout.sliders) == 1
        opened = int(values[place, 0, :, 0].sum(-1).argmax())
        np.testing.assert_allclose(heat_maps(figure)[0].flatten(), values[place, 0, opened, 0])
    with pytest.raises(InputError, match="no step 0"):
        maps.plot(step=0)


def moved(figure, slider: int, place: int):
    """The figure after its slider was moved, as a browser does it."""
    data, layout, *traces = figure.layout.sliders[slider].steps[place].args
    for at, number in enumerate(traces[0] if traces else range(len(figure.data))):
        figure.data[number].update({name: values[at] for name, values in data.items()})
    for name, value in layout.items():
        if name.startswith("shapes["):
            figure.layout.shapes[int(name[7])].update({name.split(".")[1]: value})
        elif name == "title.text":
            figure.layout.title.text = value
        else:
            figure.update_layout({name: value})
    return figure


def seen(figure) -> list[np.ndarray]:
    return [np.asarray(one.z, dtype=float) for one in figure.data if one.type == "heatmap" and one.visible is not False]


@pytest.mark.parametrize("picture", [None, np.full((64, 64, 3), 9, dtype=np.uint8)])
def test_two_sliders_choose_head_and_step_in_any_order(picture):
    values = 5 * torch.rand(3, 2, 2, 1, 18, generator=torch.Generator().manual_seed(0))
    values = values.softmax(-1)
    maps = dataclasses.replace(made(values, prefix=2), axes={**made(values).axes, "step": [0, 4, 5]})
    values = values[..., 2:]
    strength = values[:, :, :, 0].sum(-1)
    for moves in ([(0, 1), (1, 2)], [(1, 2), (0, 1)], [(1, 1), (0, 3), (1, 0), (0, 1), (1, 2)]):
        figure = maps.plot(picture=picture)
        assert [step.label for step in figure.layout.sliders[1].steps] == ["step 0", "step 4", "step 5"]
        shown, heads = seen(figure)
        np.testing.assert_allclose(heads, strength[0], rtol=1e-5)
        for slider, place in moves:
            moved(figure, slider, place)
        shown, heads = seen(figure)
        # The slider's second entry is layer 0, head 1; its step is the last one.
        np.testing.assert_allclose(shown.flatten(), values[2, 0, 1, 0], rtol=1e-5)
        np.testing.assert_allclose(heads, strength[2], rtol=1e-5)
        (map_shown,) = [
            one for one in figure.data if one.type == "heatmap" and one.visible and one.xaxis in ("x", None)
        ]
        assert map_shown.zmax == pytest.approx(float(values[2, 0, 1, 0].max()))
        (words,) = [one for one in figure.data if one.meta == "words" and one.visible]
        assert list(words.text) == [style.signed_percent(share) for share in strength[2].flatten().tolist()]
        assert (figure.layout.shapes[-1].x0, figure.layout.shapes[-1].y0) == (0.5, -0.5)
        low, high = strength[:, 0, 1].min(), strength[:, 0, 1].max()
        assert f"H1 gives {low:.0%} to {high:.0%} of its attention" in figure.layout.title.text
    assert "over 3 steps" in figure.layout.title.text


def test_pages_of_many_steps_hold_fewer_heads(monkeypatch):
    monkeypatch.setattr(attention_overlay, "_MOST_NUMBERS", 100)
    for steps, kept in ((2, 3), (3, 2), (9, 1)):
        values = random_shares(steps, 2, 4, 1, 16)
        maps = dataclasses.replace(made(values), axes={**made(values).axes, "step": list(range(steps))})
        assert len(maps.plot().layout.sliders[0].steps) == kept


def test_marks_on_the_picture_stay_when_the_step_changes():
    values = random_shares(2, 1, 2, 1, 16)
    maps = dataclasses.replace(
        made(values), axes={**made(values).axes, "step": [0, 1]}, query_places=torch.tensor([[0, 0, 1, 2]])
    )
    figure = moved(maps.plot(), 1, 1)
    texts = [label.text for label in figure.layout.annotations]
    assert texts.count("query") == 1
    assert len(texts) == 1


def test_boxes_are_in_pixels_of_the_picture_or_else_of_the_map():
    maps = planted_maps()
    picture = np.zeros((64, 96, 3), dtype=np.uint8)
    for options in ({"box": (16, 8, 24, 16)}, {"box": (0.5, 0.25, 0.75, 0.5), "picture": picture}):
        assert "100% of its attention to the box" in maps.plot(**options).layout.title.text
    assert "100%" not in maps.plot(box=(16, 8, 24, 16), picture=picture).layout.title.text
    for options in ({}, {"picture": picture}):
        with pytest.raises(InputError, match="left < right"):
            maps.plot(box=(24, 8, 16, 16), **options)


def test_figures_list_the_keywords_they_take():
    cache = run("vit")[2]
    for result in (rollout(cache.model, cache), attention_maps(cache.model, cache), attention_mass(cache.model, cache)):
        with pytest.raises(InputError, match="does not take colour=; it takes"):
            result.plot(colour=1)


def test_relative_entropies_are_shares():
    figure = attention_entropy(*run("vit")[::2], relative=True).plot()
    assert "of what looking at all visible keys alike has" in figure.layout.title.text
    assert figure.layout.coloraxis.cmax == 1.0
    assert figure.layout.coloraxis.colorbar.tickformat == ".0%"


def test_pictures_of_any_mode_are_drawn_whole():
    grey = Image.fromarray(np.arange(32 * 48, dtype=np.uint8).reshape(32, 48) % 251, mode="L")
    shown = patches.as_picture(grey)
    assert shown.shape == (32, 48, 3)
    assert (shown == np.asarray(grey)[..., None]).all()
    figure = planted_maps().plot(picture=grey)
    # The map fills the picture: the last column is centred 6 pixels before the right edge.
    trace = next(trace for trace in figure.data if trace.type == "heatmap")
    assert trace.x[-1] == 47.5 - 6
    assert patches.as_picture(Image.new("RGBA", (4, 2), "red")).shape == (2, 4, 3)
    assert patches.as_picture(torch.full((2, 4, 3), 255.0)).dtype == np.uint8
    for same in (
        np.asarray(grey),
        np.asarray(grey)[None],
        np.asarray(grey)[..., None],
        np.asarray(grey) / 255,
        torch.from_numpy(shown.copy()),
    ):
        assert (patches.as_picture(same) == shown).all()
        planted_maps().plot(picture=same)
    assert (patches.as_picture(torch.from_numpy(shown.copy()).permute(2, 0, 1) / 255) == shown).all()
    for wrong, message in (
        (torch.randn(2, 2, 3), "0…1 or 0…255"),
        (np.zeros((2, 8, 8, 3)), "One picture"),
        (np.zeros((8, 8, 5), np.uint8), "channels"),
        (Image.new("RGBA", (4, 2)), "convert"),
        ("nowhere.png", "no picture"),
    ):
        with pytest.raises(InputError, match=message):
            planted_maps().plot(picture=wrong)


def test_hovering_over_a_patch_names_its_row_and_column():
    for picture in (None, np.zeros((8, 8, 3), dtype=np.uint8)):
        trace = next(trace for trace in planted_maps().plot(picture=picture).data if trace.type == "heatmap")
        assert trace.customdata[1][2] == "patch row 1, column 2"
        assert "%{customdata}<br>%{z:.2%}" in trace.hovertemplate


def test_other_rows_images_and_differences_can_be_shown():
    _, _, cache = run("pi0")
    maps = attention_maps(cache.model, cache)
    second = maps.plot(image=1)
    at = component(second.layout.sliders[0].steps[second.layout.sliders[0].active].label)
    np.testing.assert_allclose(heat_maps(second)[0], maps.grid(at.layer, at.head, image=1), rtol=1e-6)
    difference = maps.head_contrast().plot()
    assert "the mean head" in difference.layout.title.text
    trace = next(trace for trace in difference.data if trace.type == "heatmap")
    assert trace.zmin == -trace.zmax


def test_rollouts_slide_over_layers():
    _, _, cache = run("vit")
    result = rollout(cache.model, cache)
    figure = result.plot()
    assert [step.label for step in figure.layout.sliders[0].steps] == ["layer 0", "layer 1", "layer 2"]
    assert len(heat_maps(figure)) == 1
    assert "query: cls" in figure.layout.title.text
    by_patch = result.plot(query=3)
    np.testing.assert_allclose(
        np.array(by_patch.layout.sliders[0].steps[1].args[0]["z"][0]), result.of(3).grid(1, "rollout"), rtol=1e-6
    )


def test_the_contrast_shows_its_regions_and_the_object():
    grid = torch.zeros(4, 4)
    grid[1, 2], grid[3, 0] = 3.0, 2.0
    maps = made(torch.ones(1, 1, 1, 16))
    result = of_rows(
        AttentionContrast,
        grid.reshape(1, -1),
        {"row": [0], "key": list(range(16))},
        places=maps.places,
        boxes=maps.boxes,
        epsilon=0.1,
    )
    figure = result.plot(box=(16, 8, 24, 16), top_percent=12.5)
    np.testing.assert_allclose(heat_maps(figure)[0], grid)
    assert "row 1, column 2" in figure.layout.title.text
    assert [annotation.text for annotation in figure.layout.annotations] == ["1", "2"]
    target, first, second = figure.layout.shapes
    assert (target.x0, target.y0) == (first.x0, first.y0) == (1.5, 0.5)
    assert (second.x0, second.y1) == (-0.5, 3.5)
    flat = dataclasses.replace(result, values=torch.full((16, 1), float("nan")))
    assert "No patch" in flat.plot().layout.title.text


def test_pages_of_every_figure_load_nothing(tmp_path):
    _, _, cache = run("vit")
    maps = attention_maps(cache.model, cache)
    figures = [
        result.plot()
        for result in (
            attention_mass(cache.model, cache),
            distance_profile(cache.model, cache),
            position_pattern(cache.model, cache),
            maps,
            rollout(cache.model, cache),
        )
    ]
    text = style.write_figures(tmp_path / "page.html", "attention", figures).read_text()
    assert "<script src" not in text
    assert all(figure.layout.paper_bgcolor == "rgba(0,0,0,0)" for figure in figures)


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "0%"), (0.002, "less than 1%"), (0.5, "50%"), (0.998, "more than 99%"), (1.0, "100%")]
)
def test_shares_are_not_rounded_to_all_or_nothing(share: float, text: str):
    from circuitvision.plots.kit import percent

    assert percent(share) == text

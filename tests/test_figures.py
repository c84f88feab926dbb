"""What every figure keeps: legible words, a title clear of the toolbar, layers in one direction, names on axes, a PNG beside it."""

from __future__ import annotations

import base64
import functools
import io
import subprocess
import sys

import numpy as np
import plotly.io as pio
import pytest
import torch
from PIL import Image

import circuitvision as cv
from circuitvision import findings
from circuitvision.errors import InputError
from circuitvision.patching.activation import PatchingResult
from circuitvision.plots import attention, heads, kit, png, style
from circuitvision.readout.lens.result import LensResult
from circuitvision.readout.probes.structure import CKAResult
from tests.test_plots import importance, lens_result

PAGES = {"plotly_white": (255, 255, 255), "plotly_dark": (17, 17, 17)}
SEED = torch.Generator().manual_seed(0)


def table() -> LensResult:
    """A lens by rank of three layers, of 2 × 2 patches or of four words."""
    values = torch.randn(3, 4, 2, 1, generator=SEED).sort(2, descending=True).values
    places = torch.tensor([[[0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]]])
    axes = {"layer": ["input", 0, 1], "position": list(range(4)), "rank": [0, 1], "example": [0]}
    ids = torch.randint(0, 3, (3, 4, 2, 1), generator=SEED)
    return LensResult(values, axes, tower="vision", places=places, ids=ids, names={"0": "red", "1": "<b>", "2": "blue"})


def patching() -> PatchingResult:
    axes = {"layer": [0, 1, 2], "position": ["object", "rest"], "example": [0]}
    values = torch.randn(3, 2, 1, generator=SEED)
    return PatchingResult(values, axes, base=torch.zeros(1), source=torch.ones(1), site="vision.hook")


def every_heat_map() -> dict[str, kit.Figure]:
    """A figure of every kind that has words in cells."""
    model = cv.organisms.load("shapes-vit")
    scenes = [cv.data.scenes.sample_scene(np.random.default_rng(seed)) for seed in range(3)]
    inputs = model.inputs(images=[scene.image for scene in scenes])
    _, cache = model.run_with_cache(inputs)
    maps = cv.readout.attention_maps(cache.model, cache)
    similar = CKAResult(torch.rand(3, 3, generator=SEED), {"site": ["a", "b", "c"], "other": ["a", "b", "c"]})
    results = {
        "importance": importance(), "patching": patching(), "table": table(), "cka": similar,
        "mass": cv.readout.attention_mass(cache.model, cache), "entropy": cv.readout.attention_entropy(cache.model, cache), "maps": maps,
        "difference": maps.head_contrast(), "peaks": maps.peak_in(cv.regions.box((0.0, 0.0, 32.0, 32.0))),
        "values": cv.readout.value_vectors(model.vision, 3), "increase": cv.readout.log_prob_increase(model, cache, 0),
    }  # fmt: skip
    found = {name: result.plot() for name, result in results.items()}
    found["words"] = table().plot(view="table")
    found["heads"] = cv.readout.direct_attribution(model, cache, (0, 1)).plot(view="heads")
    return found


@pytest.fixture(scope="module")
def figures() -> dict[str, kit.Figure]:
    return every_heat_map()


def cell_colors(figure, words) -> list[tuple[str, tuple[float, ...] | None]]:
    """Of every word the colour it is written in, and that of the cell below it (None: a cell without a value)."""
    heat = next(t for t in figure.data if t.type == "heatmap" and (t.xaxis, t.visible) == (words.xaxis, words.visible))
    scale = heat.colorscale or figure.layout.coloraxis.colorscale
    low = heat.zmin if heat.zmin is not None else figure.layout.coloraxis.cmin
    high = heat.zmax if heat.zmax is not None else figure.layout.coloraxis.cmax
    found = []
    for x, y, ink in zip(words.x, words.y, words.textfont.color, strict=True):
        value = float(np.asarray(heat.z, dtype=float)[int(y), int(x)])
        found.append((ink, None if value != value else style.color_at(scale, (value - low) / (high - low))))
    return found


def rgb(color: str) -> tuple[int, ...]:
    return tuple(int(color[at : at + 2], 16) for at in (1, 3, 5))


@pytest.mark.parametrize("template", PAGES)
def test_words_in_cells_can_be_read_on_a_light_and_on_a_dark_page(figures, template):
    page, counted = PAGES[template], {}
    for name, figure in figures.items():
        figure.update_layout(template=template)
        for words in (trace for trace in figure.data if trace.meta == "words"):
            for ink, cell in cell_colors(figure, words):
                if cell is None:
                    assert ink == style.GREY
                    continue
                alpha = cell[3]
                shown = [alpha * part + (1 - alpha) * under for part, under in zip(cell[:3], page, strict=True)]
                assert style.contrast(rgb(ink), shown) >= 4.5, (name, ink, shown)
                counted[name] = counted.get(name, 0) + 1
    assert set(counted) == set(figures)


def test_the_measure_of_contrast_knows_its_ends_and_a_faint_pair():
    assert style.contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21.0)
    assert style.contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)
    # What was drawn before: white words on the middle of the orange scale.
    assert style.contrast((255, 255, 255), (228, 150, 118)) < 4.5
    for share in np.linspace(0, 1, 21):
        for signed in (False, True):
            cell = style.color_at(style.legible(signed), float(share))
            assert style.contrast(rgb(style.ink(style.legible(signed), float(share))), cell) >= 4.5


def test_titles_stand_below_the_toolbar_and_have_room(figures):
    others = {
        "lens": lens_result().plot(),
        "spans": attention.spans(cv.readout.attention_mass(_cache().model, _cache())),
    }
    for name, figure in {**figures, **others}.items():
        title, margin = figure.layout.title, figure.layout.margin
        assert (title.yref, title.y, title.yanchor) == ("container", 1.0, "top"), name
        assert title.pad.t >= style.TOOLBAR, name
        lines = title.text.count("<br>") + 1
        assert margin.t >= style.TOOLBAR + 12 * 1.3 * lines, name
        plain = title.text.replace("<span style='font-size:12px'>", "").replace("</span>", "")
        assert max(map(len, plain.split("<br>"))) <= 130, name


@functools.cache
def _cache():
    model = cv.organisms.load("shapes-vit")
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    return model.run_with_cache(model.inputs(images=[scene.image]))[1]


def test_layers_rise_everywhere(figures):
    for name in ("importance", "patching", "words", "mass", "heads", "cka"):
        low, high = figures[name].layout.yaxis.range
        assert low < high, name
    bars = attention.spans(cv.readout.attention_mass(_cache().model, _cache()))
    assert list(bars.data[0].y)[1:] == ["layer 0", "layer 1", "layer 2"]
    assert bars.layout.yaxis.autorange != "reversed"


def test_positions_and_regions_stand_on_axes_by_name():
    figure = patching().plot()
    assert list(figure.layout.xaxis.ticktext) == ["object", "rest"]
    assert list(figure.layout.yaxis.ticktext) == ["0", "1", "2"]
    assert figure.data[0].customdata[2][1] == ["2", "rest"] or list(figure.data[0].customdata[2][1]) == ["2", "rest"]
    regions = LensResult(**{**vars(table()), "axes": {**table().axes, "position": ["object", "rest", "<i>", "cls"]}})
    assert list(regions.plot(view="table").layout.xaxis.ticktext) == ["object", "rest", "&lt;i&gt;", "cls"]


def test_positions_are_named_by_their_words_and_a_picture_by_its_ends():
    names = ["USER:", "image[0, 0]", "image[0, 1]", "image[1, 0]", "image[1, 1]", "what", "<is>"]
    axes = {"layer": [0, 1], "position": list(range(7)), "example": [0]}
    values = torch.zeros(2, 7, 1)
    values[1, 5] = 0.75
    result = PatchingResult(
        values, axes, base=torch.zeros(1), source=torch.ones(1), site="language.hook", position_names=names
    )
    figure = result.plot()
    assert list(figure.layout.xaxis.tickvals) == [0, 1, 4, 5, 6]
    assert list(figure.layout.xaxis.ticktext) == ["USER:", "image[0, 0]", "image[1, 1]", "what", "&lt;is&gt;"]
    assert "layer 1, position 5 what" in figure.layout.title.text


@pytest.mark.parametrize("method", [cv.patching.activation_patch, cv.patching.attribution_patch])
def test_a_patching_result_carries_what_stands_at_its_positions(method):
    model, pairs = cv.organisms.load("shapes-llava"), cv.organisms.pairs("shapes-llava", 2, 3)
    site = "language.blocks.0.hook_resid_post"
    found = method(model, pairs, "logit_diff", sites=site, axes=("layer", "position"), progress=False)
    tokens = model.tokens(next(pairs.clean.batches(model)).inputs)["language"]
    assert len(found.position_names) == len(found.axes["position"])
    for place, name in enumerate(found.position_names):
        if tokens.kind[0, place] == "patch":
            assert name == f"image[{tokens.patch_row[0, place]}, {tokens.patch_col[0, place]}]"
    assert "color" in found.position_names
    assert any(label.endswith("color") for label in found.plot().layout.xaxis.ticktext)


# -- findings in titles ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("share", "chance", "error", "n", "holds"),
    [
        (0.9, 0.25, 0.05, 10, True),
        (0.3, 0.25, 0.05, 10, False),
        (0.29, 0.25, 0.001, 10, False),
        (0.9, 0.25, 0.4, 2, False),
        (0.9, 0.25, float("nan"), 1, True),
        (0.3, 0.25, float("nan"), 1, False),
        (0.9, None, 0.01, 10, None),
    ],
)
def test_attention_is_affirmed_by_size_and_interval(share, chance, error, n, holds):
    found = findings.attends("vision L0H0", "patch", share, chance, error, n, tests=12)
    assert found.holds is holds
    assert found.value == share
    assert found.chance == chance


def test_the_best_of_many_heads_needs_a_wider_interval():
    one, many = (findings.attends("h", "x", 0.5, 0.3, 0.08, 20, tests=tests) for tests in (1, 144))
    assert (one.holds, many.holds) == (True, False)
    assert many.interval[0] < one.interval[0]


def test_peaks_need_more_than_chance_gives():
    assert findings.peaks_inside("h", 1.0, 0.06, 4).holds
    assert not findings.peaks_inside("h", 0.25, 0.06, 4, tests=12).holds
    assert findings.on_object("m", 1, 1, 0.06).holds is None
    assert findings.on_object("m", 8, 10, 0.06).holds
    assert findings.on_object("m", 1, 10, 0.06).holds is False


def test_maps_of_noise_have_no_place_that_stands_out():
    for seed in range(20):
        noise = torch.randn(14, 14, generator=torch.Generator().manual_seed(seed))
        assert not findings.stands_out(noise, "m", "patch", "logit").holds
        noise[3, 5] = 20.0
        found = findings.stands_out(noise, "m", "patch", "logit")
        assert found.holds
        assert found.about["at"] == "row 3, column 5"
    assert findings.stands_out(torch.zeros(2, 2), "m", "patch", "logit").holds is False


def test_an_untrained_model_is_said_to_show_nothing():
    from circuitvision.organisms.shapes_vit import build

    torch.manual_seed(0)
    module, processor = build()
    model = cv.HookedModel(module.eval(), processor)
    scenes = [cv.data.scenes.sample_scene(np.random.default_rng(seed)) for seed in range(8)]
    inputs = model.inputs(images=[scene.image for scene in scenes])
    objects = torch.zeros(8, 17, dtype=torch.bool)
    objects[range(8), [1 + scene.objects[0].patch for scene in scenes]] = True
    _, cache = model.run_with_cache(inputs)
    mass, maps = cv.readout.attention_mass(cache.model, cache), cv.readout.attention_maps(cache.model, cache)
    titles = [
        mass.plot(), cv.readout.attention_entropy(cache.model, cache).plot(), cv.readout.position_pattern(cache.model, cache).plot(),
        attention.spans(mass),
        maps.peak_in(objects).plot(), cv.readout.value_vectors(model.vision, 3).plot(),
    ]  # fmt: skip
    for figure in titles:
        assert figure.layout.title.text.startswith(("No ", "Where the patch lies explains no")), (
            figure.layout.title.text
        )
    ranked = cv.readout.logit_lens(model, inputs, "vision", top_k=2).plot(view="table")
    assert "by no more than" in ranked.layout.title.text


def test_a_margin_decides_whether_a_word_is_first():
    told = [
        findings.ranks_first("vision", "red", "cls", "from layer 1 on", margin, "logit").holds
        for margin in (2.0, 0.3, float("nan"))
    ]
    assert told == [True, False, None]
    assert findings.ranks_first("vision", "red", "cls", "", 2.0, "prob").holds is False


# -- PNGs ----------------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def quiet(monkeypatch):
    png._say.cache_clear()
    yield monkeypatch
    png._say.cache_clear()


def test_without_a_browser_one_warning_says_what_to_install(quiet):
    quiet.setattr(png, "browser", lambda: None)
    figure = heads.patching(patching())
    with pytest.warns(UserWarning, match=r"Chromium \(Debian: apt install chromium") as said:
        bundles = [figure._repr_mimebundle_() for _ in range(3)]
    assert len(said) == 1
    assert not any("image/png" in bundle for bundle in bundles)
    with pytest.raises(InputError, match="plotly_get_chrome"):
        figure.write_png("nowhere.png")


def test_pngs_can_be_turned_off(quiet):
    quiet.setenv("CIRCUITVISION_PNG", "0")
    quiet.setattr(png, "render", lambda *_: pytest.fail("rendered"))
    assert "image/png" not in heads.patching(patching())._repr_mimebundle_()


def test_a_browser_that_fails_does_not_keep_a_figure_from_being_shown(quiet):
    def fails(*_):
        raise RuntimeError("no")

    quiet.setattr(png, "missing", lambda: "")
    quiet.setattr(png, "render", fails)
    quiet.setattr(pio.renderers, "default", "plotly_mimetype")
    with pytest.warns(UserWarning, match="CIRCUITVISION_PNG=0"):
        bundle = heads.patching(patching())._repr_mimebundle_()
    assert list(bundle) == ["application/vnd.plotly.v1+json"]


@pytest.mark.skipif(bool(png.missing()), reason=png.missing())
def test_figures_carry_a_png_and_write_one(tmp_path, monkeypatch):
    monkeypatch.setattr(pio.renderers, "default", "plotly_mimetype")
    figure = heads.patching(patching())
    bundle = figure._repr_mimebundle_()
    assert set(bundle) == {"application/vnd.plotly.v1+json", "image/png"}
    shown = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert shown.width == 800
    assert len(base64.b64decode(bundle["image/png"])) < 60_000
    assert shown.convert("RGB").getpixel((799, shown.height - 1)) == (255, 255, 255)
    dark = Image.open(figure.write_png(tmp_path / "dark.png", dark=True)).convert("RGB")
    assert sum(dark.getpixel((799, dark.height - 1))) < 120


def test_making_a_figure_loads_no_browser():
    code = "import sys, torch\nfrom circuitvision.plots import kit\nkit.bars(['a'], [1.0], 't', 'x').to_json()\nassert 'kaleido' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# -- cv.show -------------------------------------------------------------------------------------------------------------------------------------


def test_show_takes_results_scenes_pairs_and_lists_of_them(monkeypatch):
    from circuitvision import showing

    shown = []
    monkeypatch.setattr(showing, "_display", shown.append)
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    pair = cv.data.scenes.minimal_pair(scene, 0)
    figure = heads.patching(patching())
    cv.show(patching(), title="mine")
    cv.show([scene, pair, figure, scene.image])
    assert shown[0].layout.title.text == "mine"
    assert shown[1:] == [scene, pair, figure, scene.image]
    with pytest.raises(InputError, match="cannot be shown"):
        cv.show(3)
    with pytest.raises(InputError, match="Only results take keywords"):
        cv.show(scene, title="x")


def test_scenes_and_pairs_are_pictures_of_themselves():
    scene = cv.data.scenes.sample_scene(np.random.default_rng(0))
    drawn = np.asarray(Image.open(io.BytesIO(scene._repr_png_())))
    assert (drawn[::3, ::3] == scene.pixels).all()
    pair = cv.data.scenes.minimal_pair(scene, 0)
    both = np.asarray(Image.open(io.BytesIO(pair._repr_png_())))[::3, ::3]
    assert (both[:, : scene.pixels.shape[1]] == pair.clean.pixels).all()
    assert (both[:, -scene.pixels.shape[1] :] == pair.corrupt.pixels).all()

"""What somebody meets in the first hour: messages that name the fix, figures that say which row, tables that name their tokens."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from PIL import Image

import circuitvision as cv
from circuitvision import readout
from circuitvision.errors import InputError
from circuitvision.readout.relevance.curves import Curve
from circuitvision.readout.relevance.pointing import PointingGame
from circuitvision.readout.relevance.result import Relevance
from tests.readout.layouts import by_row, of_rows

from .common import run


def heat_maps(figure) -> list:
    return [trace for trace in figure.data if trace.type == "heatmap"]


def title(figure):
    return figure.layout.title.text


@pytest.fixture(scope="module")
def vit():
    return run("vit")


@pytest.fixture(scope="module")
def llava():
    return run("llava-clip-llama", everything=True)


# -- messages ------------------------------------------------------------------------------------------------------------------------------


def test_a_module_that_is_not_wrapped_and_arguments_in_the_wrong_order_are_told(vit):
    model, _, cache = vit
    with pytest.raises(InputError, match=r"cv.HookedModel\(module, processor\)"):
        readout.logit_lens(model.module, cache, top_k=3)
    with pytest.raises(InputError, match=r"not a ActivationCache|not an ActivationCache"):
        readout.logit_lens(cache, model, top_k=3)


def test_a_lens_without_targets_says_both_ways_to_ask(vit):
    model, _, cache = vit
    with pytest.raises(InputError, match=r"targets=.*top_k="):
        readout.logit_lens(model, cache)


def test_a_picture_given_as_image_is_sent_to_picture(vit):
    model, _, cache = vit
    lens = readout.logit_lens(model, cache, top_k=1)
    with pytest.raises(InputError, match="is picture="):
        lens.plot(image=Image.new("RGB", (8, 8)))
    assert lens.plot(image=torch.tensor(0)).data


def test_a_term_that_is_not_there_names_the_nearest(vit):
    model, _, cache = vit
    found = readout.direct_attribution(model, cache, 0)
    with pytest.raises(InputError, match=r"nearest of .*L0\.mlp"):
        found["L0mpl"]
    with pytest.raises(
        InputError, match="The figure of an Attribution in the view 'bars' does not take top=; it takes count, title"
    ):
        found.plot(top=3)


def test_a_list_of_two_words_for_three_examples_points_at_the_pair(llava):
    model, _, cache = run("llava-clip-llama", everything=True, batch=3)
    with pytest.raises(InputError, match=r"a tuple, \('red', 'blue'\)"):
        readout.direct_attribution(model, cache, ["red", "blue"])


@pytest.mark.parametrize(
    ("name", "site", "meant"),
    [
        ("vit", "vision.blocks.0.hook_resid_post", "cls"),
        ("dinov2-registers", "vision.blocks.1.hook_attn_out", "cls"),
        ("siglip", "vision.blocks.0.hook_resid_post", "patch"),
        ("llava-clip-llama", "projector.hook_out", "patch"),
        ("llava-clip-llama", "language.blocks.0.hook_resid_post", "last"),
        ("clip", "text.blocks.0.hook_resid_post", "last"),
        ("pi0", "action.blocks.0.hook_resid_post", "last"),
    ],
)
def test_an_example_is_read_where_its_tower_gathers_it(name, site, meant):
    model, _, cache = run(name, everything=True)
    found = readout.collect(model, cache.inputs, site)
    assert found.positions == "each tower's own"
    torch.testing.assert_close(found[site], readout.collect(model, cache.inputs, site, positions=meant)[site])
    if meant != "last" and site.startswith("vision"):
        last = readout.collect(model, cache.inputs, site, positions="last")[site]
        assert not torch.equal(found[site], last)


def test_components_that_nothing_spreads_in_are_told_by_site():
    alike = {"input": torch.ones(6, 4), "block": torch.randn(6, 4, generator=torch.Generator().manual_seed(0))}
    with pytest.warns(UserWarning, match="At input the activations spread in 0 directions.*alike"):
        readout.pca(alike)


# -- figures -------------------------------------------------------------------------------------------------------------------------------


def test_figures_of_one_row_of_several_say_which(llava):
    model, _, cache = llava
    lens = readout.logit_lens(model, cache, "language", targets={"red": "red", "blue": "blue"})
    sources = readout.source_attribution(model, cache, ("red", "blue"))
    metric = cv.metrics.logit_diff("red", "blue")
    relevance = readout.gradient_times_activation(model, cache.inputs, metric)
    looks = readout.attention_maps(model, cache, tower="language", query="last")
    for result in (lens, sources, relevance, looks):
        assert "example 0 of 2" in title(result.plot())
        assert "example 1 of 2" in title(result.plot(example=1))
    assert "example 1 of 2" in title(lens.plot(view="table", example=1))
    assert "1 other target (target=)" in title(lens.plot())
    assert title(lens.plot(title="mine")) == "mine"
    table = dataclasses.replace(lens, step=3).plot(view="table")
    assert "the language tower in pass 3 ranks" in title(table)
    single, _, one = run("llava-clip-llama", everything=True, batch=1)
    assert "example 0" not in title(readout.logit_lens(single, one, "language", targets=["red"]).plot())


def test_lines_and_pairs_say_what_they_are_of():
    model, _, cache = run("clip", everything=True)
    lens = readout.logit_lens(model, cache, "vision", targets={0: 0, 1: 1})
    assert "mean of 2 examples" in title(lens.plot(view="layers"))
    assert "example 1 of 2" in title(lens.plot(view="layers", example=1))
    pairs = readout.bilinear_attribution(model, cache)
    assert "example 1 of 2" in title(pairs.plot(example=1, text=0))
    assert str(pairs.axes["text"][2]) in title(pairs.plot(text=2))


def test_layers_rise_in_every_figure_of_heads(llava):
    model, _, cache = llava
    for figure in (
        readout.direct_attribution(model, cache, ("red", "blue")).plot(view="heads"),
        readout.log_prob_increase(model, cache, "red").plot(),
        readout.attention_mass(model, cache, tower="language").plot(),
    ):
        assert figure.layout.yaxis.autorange != "reversed"


def test_attribution_is_drawn_as_layers_by_heads_too(llava):
    model, _, cache = llava
    found = readout.direct_attribution(model, cache, ("red", "blue"))
    (drawn,) = heat_maps(found.plot(view="heads"))
    assert drawn.z.shape == (model.language.cfg.n_layers, model.language.cfg.n_heads)
    for layer, row in enumerate(drawn.z):
        for head, value in enumerate(row):
            assert value == pytest.approx(float(found[f"L{layer}H{head}"].mean()), abs=1e-6)
    (single,) = heat_maps(found.plot(view="heads", example=1))
    assert single.z[0][0] == pytest.approx(float(found["L0H0"][1]), abs=1e-6)
    assert "example 1 of 2" in title(found.plot(view="heads", example=1))
    with pytest.raises(InputError, match="choose one of bars, heads"):
        found.plot(view="grid")
    with pytest.raises(InputError, match="no example 2"):
        found.plot(view="heads", example=2)
    with pytest.raises(InputError, match="by='head'"):
        readout.direct_attribution(model, cache, ("red", "blue"), by="component").plot(view="heads")


def _relevance(values):
    places = torch.tensor([[-1, -1, -1, -1]] + [[0, -1, down, across] for down in range(2) for across in range(2)])
    labels = [["[cls]", "r0c0", "r0c1", "r1c0", "r1c1"]]
    return of_rows(
        Relevance,
        values=torch.tensor([values]),
        axes={"row": [0], "position": list(range(5))},
        method="made by hand",
        tower="vision",
        site="vision.hook_input",
        places=places[None],
        labels=labels,
    )


def test_full_colour_is_the_strongest_patch_and_a_stronger_class_token_is_named():
    def note(result):
        return next(one.text for one in result.plot().layout.annotations if "full colour" in one.text)

    loud, quiet = _relevance([-5.0, 0.1, 0.2, -0.5, 0.0]), _relevance([0.3, 0.1, 0.2, -0.5, 0.0])
    assert note(loud) == "full colour: ±0.5<br>not drawn: [cls] \N{MINUS SIGN}5"
    assert note(quiet) == "full colour: ±0.5"
    drawn = [trace for trace in loud.plot().data if trace.zmax is not None]
    assert [trace.zmax for trace in drawn] == [0.5]


def test_one_example_is_no_percentage():
    shares = [0.0, 0.5, 1.0]
    random = torch.tensor([[3.0, 2.0, 0.0], [3.0, 0.5, 0.0], [3.0, 1.5, 0.0]])[:, None]
    one = Curve(
        values=torch.tensor([[3.0, 1.0, 0.0]]).T,
        axes={"share": shares, "example": [0]},
        method="made by hand",
        random=random.movedim(1, -1),
    )
    assert title(one.plot()).startswith("Deletion by made by hand beats 2 of 3 random orders<br>")
    assert "one example" in title(one.plot())
    turned = dataclasses.replace(one, kind="insertion")
    assert "beats 1 of 3 random orders" in title(turned.plot())
    assert "nan" not in one.highlights()["better than random"]
    for hit, words in ((1.0, "points at the object, one picture"), (0.0, "does not point at the object, one picture")):
        game = PointingGame(
            values=torch.tensor([hit]), axes={"example": [0]}, method="a map", chance=torch.tensor([0.1])
        )
        assert words in title(game.plot())


def test_a_word_below_a_source_map_is_quoted(llava):
    model, _, cache = llava
    figure = readout.source_attribution(model, cache, ("red", "blue")).plot()
    below = [one.text for one in figure.layout.annotations if one.y is not None and one.y < 0]
    assert below
    assert all(text.startswith(("'", "&#x27;", '"', "&quot;", "position ")) for text in below)


# -- tables --------------------------------------------------------------------------------------------------------------------------------


def test_tables_over_positions_name_the_token(llava):
    model, _, cache = llava
    metric = cv.metrics.logit_diff("red", "blue")
    labels = model.tokens(cache.inputs)["language"].labels(1)
    for result in (
        readout.logit_lens(model, cache, "language", targets=["red"]),
        readout.source_attribution(model, cache, ("red", "blue")),
        readout.log_prob_increase(model, cache, "red", by="source"),
    ):
        frame = result.to_frame()
        second = frame[frame["example"] == 1].drop_duplicates("position")
        assert second["token"].tolist() == [labels[at] for at in second["position"]]
    vision = readout.gradient_times_activation(model, cache.inputs, metric)
    frame = vision.to_frame().sort_values(["example", "position"])
    assert frame["token"].tolist() == [word for row in vision.labels for word in row]
    # A lens of sites without the class token counts positions from 1.
    lens = readout.logit_lens(model, cache, "vision", targets=["red"]).to_frame()
    maps = model.tokens(cache.inputs)["vision"]
    assert set(zip(lens["position"], lens["token"], strict=True)) <= set(enumerate(maps.labels(0)))


def test_value_vectors_say_which_is_strongest():
    model, _, _ = run("vit")
    for options in ({"top_k": 2}, {"targets": [0, 1]}, {"top_k": 2, "largest": False}):
        found = readout.value_vectors(model.vision, **options)
        (place, said), *_ = found.highlights().items()
        values = by_row(found) if found.largest else -by_row(found)
        layer, neuron, _ = (int(n) for n in torch.unravel_index(values.argmax(), values.shape))
        assert place == f"layer {found.axes['layer'][layer]}, neuron {neuron}"
        assert said.endswith(
            f"{float(by_row(found)[layer, neuron].max() if found.largest else by_row(found)[layer, neuron].min()):+.4g}"
        )

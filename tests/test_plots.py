"""Figures: that they show the numbers they are given, and pages that load nothing and escape what they show."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
import torch
from PIL import Image

from circuitvision import edits
from circuitvision.circuits import AblationCheck, head_importance
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps.result import SweepResult
from circuitvision.metrics import logit_diff
from circuitvision.model.edits.base import EditGroup
from circuitvision.patching import activation_patch
from circuitvision.plots import graph, lens_rows, report, style, sweeps
from circuitvision.readout.lens.result import LensResult
from circuitvision.results import Result
from tests.readout.layouts import of_rows
from tests.toy_model import ToyModel

VISION = torch.tensor([[1.0, 2.0, -2.0], [3.0, 1.0, 5.0]], dtype=torch.float64)
LANGUAGE = torch.tensor([[0.25, 0.5]], dtype=torch.float64)
CLEAN, CORRUPT = ({"picture": torch.tensor([value], dtype=torch.float64)} for value in (2.0, 1.0))


def importance(mode: str = "denoise"):
    return head_importance(
        ToyModel(VISION, LANGUAGE), metric=logit_diff(0, 1), clean=CLEAN, corrupt=CORRUPT, top_k=2, mode=mode
    )


def heat_maps(figure) -> list[np.ndarray]:
    return [np.asarray(trace.z, dtype=float) for trace in figure.data if trace.type == "heatmap"]


def lens_result(layers: int = 3) -> LensResult:
    grid = torch.arange(layers * 5.0).reshape(layers, 1, 5, 1) - 4
    places = torch.tensor([[[-1, -1, -1, -1], [0, 0, 0, 0], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 1, 1]]])
    axes = {"layer": ["input", *range(layers - 1)], "row": [0], "position": list(range(5)), "target": ["red - blue"]}
    return of_rows(LensResult, grid, axes, tower="vision", places=places)


def test_head_figure_shows_every_share_in_its_place():
    figure = importance().plot()
    vision, language = heat_maps(figure)
    np.testing.assert_allclose(vision, (VISION / VISION.sum()).numpy(), atol=1e-6)
    assert language.shape == (1, 2)
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    assert figure.layout.title.text == "vision L1H2 alone restores 50% of the difference (one pair)."
    assert "\N{MINUS SIGN}20%" in {word for trace in figure.data if trace.meta == "words" for word in trace.text}


def test_patching_figure_of_several_towers_and_of_one():
    both = activation_patch(
        ToyModel(VISION, LANGUAGE),
        metric=logit_diff(0, 1),
        clean=CLEAN,
        corrupt=CORRUPT,
        sites="*.blocks.*.attn.hook_z",
    )
    assert len(heat_maps(both.plot())) == 2
    one = activation_patch(
        ToyModel(VISION, LANGUAGE),
        metric=logit_diff(0, 1),
        clean=CLEAN,
        corrupt=CORRUPT,
        sites="vision.blocks.*.attn.hook_z",
    )
    np.testing.assert_allclose(heat_maps(one.plot())[0], (VISION / VISION.sum()).numpy(), atol=1e-6)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_circuit_figure_runs_left_to_right_and_shows_signs(mode):
    result = importance(mode)
    figure = graph.circuit(result.to_networkx())
    assert figure.layout.title.text == "Main route: projector → language L0H1 → answer"
    lines = [trace for trace in figure.data if trace.mode == "lines"]
    assert all(trace.x[0] < trace.x[-1] for trace in lines)
    nodes = next(trace for trace in figure.data if trace.mode == "markers")
    assert len(nodes.x) == len(result.selected) + 2
    shown = dict(zip([text.split("<br>")[0] for text in nodes.text], nodes.text, strict=True))
    assert "50% of the answer" in shown["v.a1.h2"]
    assert "100% of the answer" in shown["x.projector"]
    assert max(lines, key=lambda trace: trace.line.width).text == "v.a1.h2 → x.projector<br>50% of the answer"


def test_lens_figure_puts_values_on_the_patch_grid_without_prefix_positions():
    figure = lens_result().plot()
    maps = heat_maps(figure)
    assert len(maps) == 3
    np.testing.assert_allclose(maps[0], [[-3, -2], [-1, 0]])
    picture = np.zeros((8, 8, 3), dtype=np.uint8)
    pair = [lens_rows.LensRow(name, picture, [lens_result(), lens_result(12)]) for name in ("clean", "corrupt")]
    many = lens_rows.lens_rows(pair, "title", (0.5, 0.0, 1.0, 0.5))
    assert len(heat_maps(many)) == 2 * (3 + 4)
    boxes = [(shape.x0, shape.y0, shape.x1, shape.y1) for shape in many.layout.shapes]
    assert boxes[0] == (3.5, -0.5, 7.5, 3.5)
    assert boxes[1] == (0.5, -0.5, 1.5, 0.5)


def test_lens_grid_and_contrast_refuse_what_is_not_there():
    with pytest.raises(InputError, match="image 1"):
        lens_result().patch_grid("input", image=1)
    with pytest.raises(InputError, match="There is no target"):
        lens_result().contrast("red", "blue")


def test_ablation_figure_says_the_finding():
    right = torch.stack([(torch.arange(200) < share * 200).double() for share in (1.0, 0.1, 0.9, 0.95)])
    check = AblationCheck(
        right,
        {"condition": ["intact", "heads", "random 1", "random 2"], "example": list(range(200))},
        logit_diff=torch.zeros(4, 200),
        heads=["v.a0.h0"],
        random_heads=[["v.a0.h1"], ["v.a0.h2"]],
    )
    figure = check.plot()
    assert "10% of pairs" in figure.layout.title.text
    assert list(figure.data[0].x) == pytest.approx([0.9, 0.95])


def sweep_result(values: list[list[float]], labels: list[str], **keywords) -> SweepResult:
    tensor = torch.tensor(values)
    axes = {"edit": labels, "example": list(range(tensor.shape[1]))}
    provenance = {"metric": "logit_diff(red - blue)", "metric_units": "logit"}
    return SweepResult(tensor, axes, provenance, clean=torch.full(tensor.shape[1:], 10.0), **keywords)


def test_sweep_figure_shows_the_strongest_edits_and_says_the_finding():
    labels = [f"ablate('language.blocks.{n}.attn.hook_z', seed=0, heads=[{n}])" for n in range(4)]
    result = sweep_result(
        [[11.0, 11.5], [4.0, 6.0], [float("nan"), float("nan")], [10.0, 10.0]], labels, interrupted="Stop: <i>"
    )
    figure = result.plot(count=2)
    (bars,) = figure.data
    assert list(bars.x) == pytest.approx([-5.0, 1.25])
    # The standard error of two values is half their distance.
    assert list(bars.error_x.array) == pytest.approx([1.0, 0.25])
    assert [text.partition(" (±")[0] for text in bars.customdata] == [labels[1], labels[0]]
    assert list(figure.layout.yaxis.ticktext) == [
        f"ablate('language.blocks.{n}.attn.hook_z', …, heads=[{n}])" for n in (1, 0)
    ]
    title = figure.layout.title.text
    assert "hook_z', …, heads=[1])<br>moves logit_diff(red - blue) most: \N{MINUS SIGN}5.00 logit" in title
    assert "2 strongest of 3 edits; mean of 2 examples ± standard error; 1 without a value left out" in title
    assert "Stop: &lt;i&gt;" in title
    assert [annotation.text for annotation in figure.layout.annotations] == ["\N{MINUS SIGN}5.00", "+1.25"]


def test_sweep_figure_of_one_example_of_no_effect_and_of_no_value():
    one = sweep_result([[12.0]], ["no edit"]).plot()
    assert not one.data[0].error_x.visible
    assert one.layout.title.text.startswith("no edit<br>moves logit_diff(red - blue) most: +2.00 logit")
    assert sweep_result([[10.0], [10.0]], ["a", "b"]).plot().layout.title.text.startswith("No edit moves")
    assert sweep_result([[float("nan")]], ["a"]).plot().layout.title.text.startswith("No edit has a value")


def test_labels_of_edits_leave_out_what_all_share_and_stay_apart():
    keys = [f"block_attention('language', keys='image(0).box({n}, 17, 15, 31)', layers=[1])" for n in (1, 2)]
    assert sweeps.shortened(keys) == [f"block_attention(…, keys='image(0).box({n}, 17, 15, 31)', …)" for n in (1, 2)]
    grouped = sweeps.shortened([f"{keys[0]} + scale('a.b', factor={n})" for n in (1, 2)])
    assert grouped == [f"block_attention(…) + scale(…, factor={n})" for n in (1, 2)]
    (alone,) = sweeps.shortened(["x" * 50 + "y" * 50])
    assert (len(alone), alone[:2], alone[-2:]) == (60, "xx", "yy")
    twins = ["x" * 33 + middle + "y" * 33 for middle in "ab"]
    assert len(set(sweeps.shortened(twins))) == 2


def test_plot_refuses_results_it_has_no_figure_for():
    with pytest.raises(InputError, match="no figure"):
        Result(torch.zeros(1), {"x": [0]}).plot()


def test_pages_load_nothing_and_hold_plotly_once(tmp_path):
    page = report.Report(
        "<b>title</b>",
        "finding & more",
        ("prompt", "<image> what ?"),
        [report.Picture(Image.new("RGB", (4, 4), "red"), "clean: 'x' <y>")],
        [report.Section("a", "b", importance().plot()), report.Section("c", "d", lens_result().plot())],
        ("head", "restores"),
        [("v.a0.h0", "\N{MINUS SIGN}12%")],
        ["note <i>"],
        {"model_id": "<m>", "seed": None},
    )
    text = report.write(page, tmp_path / "report.html").read_text()
    outside = re.sub(r"<script.*?</script>", "", text, flags=re.DOTALL)
    assert not re.search(r"(?:src|href)\s*=(?!'data:)", outside)
    assert "<script src" not in text
    assert "@import" not in text
    assert "url(http" not in text
    assert text.count("plotly.js v") == 1
    assert text.count("Plotly.newPlot(") >= 2
    for raw in ("<b>title", "<i>", "<m>", "<y>"):
        assert raw not in outside
    assert "&lt;image&gt; what ?" in text
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_signed_percent():
    assert [style.signed_percent(x) for x in (0.504, -0.2, 0.0, -0.001)] == ["50%", "\N{MINUS SIGN}20%", "0%", "0%"]


def grid_result(sizes: dict[str, int], metrics: tuple[str, ...] = ()) -> SweepResult:
    axes = {name: list(range(size)) for name, size in sizes.items()}
    shape = [*([len(metrics)] if metrics else []), *sizes.values(), 3]
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    count = math.prod(sizes.values())
    return SweepResult(
        values,
        {**({"metric": list(metrics)} if metrics else {}), **axes, "example": [0, 1, 2]},
        {"metric": "a metric", "metric_units": "logit"},
        clean=torch.zeros([*shape[:1], 3] if metrics else [3], dtype=torch.float64),
        edits=[EditGroup([edits.scale("vision.blocks.0.attn.hook_z", float(n))]) for n in range(count)],
        done=torch.ones(list(sizes.values()), dtype=torch.bool),
        metric=dict.fromkeys(metrics) or None,
    )


def test_sweeps_are_drawn_by_their_axes():
    one = grid_result({"layer": 4})
    (line,) = one.plot().data
    np.testing.assert_allclose(line.y, one.effect.mean(-1))
    assert list(line.x) == ["0", "1", "2", "3"]
    two = grid_result({"layer": 4, "head": 2})
    (grid,) = heat_maps(two.plot())
    np.testing.assert_allclose(grid, two.effect.mean(-1))
    three = grid_result({"strength": 3, "layer": 4, "head": 2})
    figure = three.plot()
    for number, panel in enumerate(heat_maps(figure)):
        np.testing.assert_allclose(panel, three.effect.mean(-1)[number])
    assert {note.text for note in figure.layout.annotations} == {"strength 0", "strength 1", "strength 2"}
    assert figure.layout.coloraxis.cmin == -figure.layout.coloraxis.cmax
    best, _ = three.top(1)[0]
    assert figure.layout.title.text.startswith(
        f"strength {best['strength']}, layer {best['layer']}, head {best['head']} moves a metric most"
    )
    for sizes in ({"a": 2, "b": 2, "c": 2, "d": 2}, {"a": 13, "b": 1, "c": 1}):
        with pytest.raises(InputError, match="up to three axes"):
            grid_result(sizes).plot()


def test_a_sweep_of_several_metrics_shows_the_one_asked_for():
    result = grid_result({"layer": 4, "head": 2}, ("first", "second"))
    for name, chosen in (("first", None), ("second", "second")):
        (grid,) = heat_maps(result.plot(metric=chosen))
        np.testing.assert_allclose(grid, result.of(name).effect.mean(-1))
    with pytest.raises(InputError, match="third"):
        result.plot(metric="third")
    with pytest.raises(InputError, match="single metric"):
        grid_result({"layer": 4}).plot(metric="first")

"""The main job on saved folders of several families, and its promises about files and bad input."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import circuitvision as cv
from circuitvision import metrics
from circuitvision.circuits import ablation_check, head_importance, load, parse_id
from circuitvision.data.generated import of_questions
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.quickstart import changed_box, held_out_pairs, leading_heads, quickstart
from tests.zoo import case

WORDS = {"prompt": "<image> what color is the circle ?", "answer": "red", "foil": "blue"}
FILES = {"circuit.graphml", "circuit.json", "heads.html", "lens.html", "report.html"}


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("images")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 12, 3)).astype(np.uint8)
    changed = pixels.copy()
    changed[4:8, 4:8] = 255 - changed[4:8, 4:8]
    paths = {}
    for name, array in (("clean", pixels), ("corrupt", changed)):
        paths[name] = folder / f"{name}.png"
        Image.fromarray(array).resize((48, 48), Image.Resampling.NEAREST).save(paths[name])
    return paths


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next-mistral", "paligemma"])
def test_a_saved_folder_gives_files_and_a_graph_across_towers(name, folder_of, images, tmp_path):
    found = quickstart(folder_of(case(name)), **images, **WORDS, out=tmp_path / "out", top_k=3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    for file in ("circuit.graphml", "circuit.json"):
        graph = load(tmp_path / "out" / file)
        assert graph.graph["kind"] == "head_importance"
        towers = {data["tower"] for _, data in graph.nodes(data=True) if data["in_circuit"]}
        assert towers == {"vision", "connector", "language"}
        # Only the images differ, so the projector's output is all there is to restore.
        assert graph.nodes["x.projector"]["influence"] == pytest.approx(1.0, abs=1e-3)
        assert not any(parse_id(a).tower == "vision" and parse_id(b).tower == "language" for a, b in graph.edges())
    share = found.importance.mean()
    assert share.shape[0] == 2
    for tower in ("vision", "language"):
        lens = next(result for result in found.lenses["clean"] if result.tower == tower)
        assert lens.patch_grid("input").isfinite().all()
    assert found.check is None


def test_the_language_lens_at_the_last_layer_is_the_models_own_output(folder_of, images, tmp_path):
    found = quickstart(folder_of(case("llava-clip-llama")), **images, **WORDS, out=tmp_path, top_k=1)
    for run, metric in (("clean", found.importance.metric_clean), ("corrupt", found.importance.metric_corrupt)):
        language = found.lenses[run][1]
        assert float(language.values[-1, -1, 0, 0]) == pytest.approx(metric, abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foil": None}, "missing: foil"),
        ({"clean": "nowhere.png"}, "nowhere.png"),
        ({"answer": "crimson"}, "crimson"),
        ({"prompt": "what color is the circle ?"}, "once per image"),
        ({"clean": "text"}, "no picture"),
    ],
)
def test_bad_cases_are_refused_and_nothing_is_written(changes, message, folder_of, images, tmp_path):
    if changes.get("clean") == "text":
        (tmp_path / "x.png").write_text("no picture")
        changes = {"clean": tmp_path / "x.png"}
    with pytest.raises(InputError, match=message):
        quickstart(folder_of(case("llava-clip-llama")), **{**images, **WORDS, **changes}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_pair_that_makes_no_difference_is_refused(folder_of, images, tmp_path):
    same = {"clean": images["clean"], "corrupt": images["clean"]}
    with pytest.warns(UserWarning, match="do not differ"), pytest.raises(InputError, match="does not differ"):
        quickstart(folder_of(case("llava-clip-llama")), **same, **WORDS, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_without_both_towers_are_refused(folder_of, images, tmp_path):
    with pytest.raises(UnsupportedModelError, match="head_importance"):
        quickstart(folder_of(case("vit")), **images, **WORDS, out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder"):
        quickstart(out=tmp_path / "file")
    with pytest.raises(InputError, match="shapes-llava"):
        quickstart(folder_of(case("llava-clip-llama")), out=tmp_path / "out")


def test_changed_box_is_the_smallest_around_the_difference():
    first = Image.new("RGB", (10, 20))
    second = first.copy()
    second.putpixel((2, 5), (1, 0, 0))
    second.putpixel((4, 9), (0, 3, 0))
    assert changed_box(first, second) == (0.2, 0.25, 0.5, 0.5)
    assert changed_box(first, first) is None
    assert changed_box(first, Image.new("RGB", (10, 20), "white")) is None
    assert changed_box(first, Image.new("RGB", (20, 20))) is None


def test_without_arguments_the_shipped_model_gives_a_circuit_that_survives_its_check(tmp_path):
    found = quickstart(out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert not found.cautions()
    for reading, word in zip(found.readings.values(), (found.case.answer, found.case.foil), strict=True):
        assert reading.says == word
        assert reading.probability > 0.9
    assert found.importance.metric_clean > 2 > -2 > found.importance.metric_corrupt
    assert 0.8 < found.importance.joint < 1.2
    assert found.graph.nodes["v.input"]["influence"] == pytest.approx(1.0, abs=1e-3)
    assert found.check is not None
    assert found.check.intact > 0.95
    assert found.check.ablated < 0.05
    assert float(found.check.random.mean()) > 0.8
    assert changed_box(found.case.clean, found.case.corrupt) is not None


def test_the_heads_of_the_quickstart_carry_the_answer_over_more_than_two_hundred_held_out_pairs():
    model = cv.organisms.load("shapes-llava")
    pairs = held_out_pairs(1 + 24 + 205, seed=0)
    assert len({pair.question.subject.pair for pair in pairs[25:]}) == 5
    one, some = (next(of_questions(chosen).batches(model)) for chosen in (pairs[:1], pairs[1:25]))
    found = [
        leading_heads(
            head_importance(model, metric=metrics.logit_diff(b.answers, b.foils), clean=b.inputs, corrupt=b.other)
        )
        for b in (one, some)
    ]
    # The heads found on one pair are those found on many.
    assert set(found[0]) == set(found[1])
    check = ablation_check(model, of_questions(pairs[25:]), found[0], n_random=20)
    assert check.n_pairs == 205
    assert len(check.random_heads) == 20
    assert all(not set(draw) & set(found[0]) for draw in check.random_heads)
    assert check.intact > 0.95
    assert check.ablated < 0.05
    assert float(check.random.median()) > 0.9
    assert float(check.random.min()) > check.ablated + 0.3

"""The main job on saved folders of several families and on the organisms, and its promises about files and bad input."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvision as cv
from circuitvision import cli
from circuitvision.circuits import ablation_check, load, parse_id
from circuitvision.data import TEST_PAIRS, Pairs
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.organisms import registry
from circuitvision.quickstart import changed_box, quickstart
from circuitvision.quickstart.cases import CAPTIONS, CLASSES, WORDS, Case, given_pair
from circuitvision.quickstart.run import FIND_PAIRS
from tests.zoo import case, shared_model

QUESTION = {"prompt": "<image> what color is the circle ?", "answer": "red", "foil": "blue"}
TOWERS = ("vision", "language")
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


def wrapped(name: str) -> cv.HookedModel:
    return cv.HookedModel(shared_model(name), case(name).processor())


@pytest.mark.parametrize(
    "name", ["llava-clip-llama", "paligemma", pytest.param("llava-next-mistral", marks=pytest.mark.slow)]
)
def test_a_saved_folder_gives_files_and_a_graph_across_towers(name, folder_of, images, tmp_path):
    found = quickstart(folder_of(case(name)), **images, **QUESTION, out=tmp_path / "out", top_k=3)
    assert {path.name for path in (tmp_path / "out").iterdir()} == FILES
    for file in ("circuit.graphml", "circuit.json"):
        graph = load(tmp_path / "out" / file)
        assert graph.graph["kind"] == "head_importance"
        towers = {data["tower"] for _, data in graph.nodes(data=True) if data["in_circuit"]}
        assert towers == {"vision", "connector", "language"}
        # Only the images differ, so the projector's output is all there is to restore.
        assert graph.nodes["x.projector"]["influence"] == pytest.approx(1.0, abs=1e-3)
        assert not any(parse_id(a).tower == "vision" and parse_id(b).tower == "language" for a, b in graph.edges())
    assert found.importance.axes["tower"] == ["vision", "language"]
    assert found.check is None
    assert set(found.read_through) == {"vision"}
    for tower in ("vision", "language"):
        lens = next(result for result in found.lenses["clean"] if result.tower == tower)
        assert lens.patch_grid("input").isfinite().all()
    for run, metric in (("clean", found.importance.metric_clean), ("corrupt", found.importance.metric_corrupt)):
        # The lens of the last tower at its last layer is the model's own output.
        assert float(found.lenses[run][1].values[-1, -1, 0, 0]) == pytest.approx(metric, abs=1e-4)


@pytest.mark.parametrize(
    ("name", "said", "kind"),
    [
        ("dinov2", {"answer": "label 0"}, CLASSES),
        ("siglip", {"answer": "red circle", "foil": "blue circle"}, CAPTIONS),
        pytest.param("deit", {"answer": "0", "foil": 1}, CLASSES, marks=pytest.mark.slow),
        pytest.param("siglip2-classifier", {"answer": "LABEL_0", "foil": 1}, CLASSES, marks=pytest.mark.slow),
        pytest.param("clip", {"answer": "red circle", "foil": "blue circle"}, CAPTIONS, marks=pytest.mark.slow),
    ],
)
def test_a_folder_of_a_classifier_or_a_dual_encoder_gives_a_graph_of_its_image_tower(
    name, said, kind, folder_of, images, tmp_path
):
    found = quickstart(folder_of(case(name)), **images, **said, out=tmp_path, top_k=2)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert found.case.kind is kind
    assert found.case.prompt == ""
    # Texts are the same in both runs: no head of a tower that reads them can restore anything.
    assert found.importance.axes["tower"] == ["vision"]
    assert found.graph.nodes["v.input"]["influence"] == pytest.approx(1.0, abs=1e-3)
    for run, metric in (("clean", found.importance.metric_clean), ("corrupt", found.importance.metric_corrupt)):
        (lens,) = found.lenses[run]
        assert float(lens.pooled[-1, 0, 0]) == pytest.approx(metric, abs=1e-3)
    page = (tmp_path / "report.html").read_text()
    assert ("captions</span>" in page) is (kind is CAPTIONS)
    assert "prompt</span>" not in page


@pytest.mark.slow
def test_two_image_towers_and_actions_said_in_words(images, tmp_path):
    said = {"prompt": "In: what action should the robot take?\nOut:", "answer": "action 0.5", "foil": "action -0.5"}
    found = quickstart(wrapped("openvla"), **images, **said, out=tmp_path, top_k=1)
    assert found.importance.axes["tower"] == ["vision", "vision_2", "language"]
    assert [lens.tower for lens in found.lenses["clean"]] == ["vision", "vision_2", "language"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"foil": None}, "missing: foil"),
        ({"corrupt": None}, "missing: corrupt"),
        ({"clean": "nowhere.png"}, "nowhere.png"),
        ({"answer": "crimson"}, "crimson"),
        ({"answer": "blue"}, "the same"),
        ({"prompt": "what color is the circle ?"}, "once per image"),
        ({"clean": "text"}, "no picture"),
    ],
)
def test_bad_cases_are_refused_and_nothing_is_written(changes, message, images, tmp_path):
    if changes.get("clean") == "text":
        (tmp_path / "x.png").write_text("no picture")
        changes = {"clean": tmp_path / "x.png"}
    with pytest.raises(InputError, match=message):
        quickstart(wrapped("llava-clip-llama"), **{**images, **QUESTION, **changes}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "said", "message"),
    [
        ("vit", {"answer": "a red circle", "foil": "label 1"}, "no class.*label"),
        ("vit", {"answer": 0, "foil": 99}, "no class"),
        ("vit", {"answer": "label 1", "foil": 1}, "the same"),
        ("vit", {"prompt": "<image> what is it ?"}, "no prompt"),
        ("clip", {"answer": "red circle"}, "missing: foil"),
        ("clip", {}, "missing: answer, foil"),
        ("clip", {"answer": "red circle", "foil": "red circle"}, "the same"),
        ("clip", {"prompt": "what is it ?", "answer": "red circle", "foil": "blue circle"}, "no prompt"),
    ],
)
def test_answers_that_are_none_of_the_models_kind_are_refused(name, said, message, images, tmp_path):
    with pytest.raises(InputError, match=message):
        quickstart(wrapped(name), **images, **said, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_classes_that_are_left_out_are_the_models_own_first_choices():
    model = wrapped("dinov2")
    pixels = np.random.default_rng(0).integers(0, 255, (12, 24, 24, 3)).astype(np.uint8)
    drawn = [Image.fromarray(one) for one in pixels]
    with torch.no_grad():
        first = [int(model(model.inputs(images=one)).argmax()) for one in drawn]
    other = next(n for n, one in enumerate(first) if one != first[0])
    nothing = dict.fromkeys(("prompt", "answer", "foil"))
    pair = given_pair(model, {"clean": drawn[0], "corrupt": drawn[other], **nothing})
    assert (pair.answers, pair.foils) == ((first[0],), (first[other],))
    pair = given_pair(model, {"clean": drawn[0], "corrupt": drawn[other], **nothing, "foil": f"label {5 - first[0]}"})
    assert (pair.answers, pair.foils) == ((first[0],), (5 - first[0],))
    alike = next(n for n, one in enumerate(first) if n and one == first[0])
    with pytest.raises(InputError, match="first choice"):
        given_pair(model, {"clean": drawn[0], "corrupt": drawn[alike], **nothing})


def test_twice_the_same_image_is_refused_before_a_model_is_loaded(images, tmp_path):
    same = {"clean": images["clean"], "corrupt": Image.open(images["clean"])}
    with pytest.raises(InputError, match="same image"):
        quickstart("no/such/folder", **same, **QUESTION, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_models_that_answer_nothing_are_refused(images, tmp_path):
    for name in ("vit-headless", "pi0"):
        with pytest.raises(UnsupportedModelError, match="head_importance"):
            quickstart(wrapped(name), **images, out=tmp_path / "out")
    with pytest.raises(UnsupportedModelError, match="actions"):
        quickstart("reach-pi0", out=tmp_path / "out")
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="folder"):
        quickstart(out=tmp_path / "file")
    with pytest.raises(InputError, match="shapes-llava"):
        quickstart("no/such/folder", out=tmp_path / "out")


def test_changed_box_is_the_smallest_around_the_difference():
    first = Image.new("RGB", (10, 20))
    second = first.copy()
    second.putpixel((2, 5), (1, 0, 0))
    second.putpixel((4, 9), (0, 3, 0))
    assert changed_box(first, second) == (0.2, 0.25, 0.5, 0.5)
    assert changed_box(first, first) is None
    assert changed_box(first, Image.new("RGB", (10, 20), "white")) is None
    assert changed_box(first, Image.new("RGB", (20, 20))) is None


@pytest.mark.parametrize(
    ("kind", "answer", "foil", "names"),
    [
        (CAPTIONS, "red circle and blue square", "red circle and cyan square", ("blue", "cyan")),
        (CAPTIONS, "a photo of a cat", "a dog", ("answer", "foil")),
        (CLASSES, "tabby, tabby cat", "tiger cat", ("tabby", "tiger cat")),
        (CLASSES, "crane, bird", "crane, machine", ("answer", "foil")),
        (WORDS, "red", "blue", ("red", "blue")),
    ],
)
def test_answers_have_short_names_that_differ(kind, answer, foil, names):
    image = Image.new("RGB", (2, 2))
    assert Case(image, image, "", answer, foil, kind).names == names


# -- organisms and their own pairs -----------------------------------------------------------------------------------------------


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
    assert found.check.n_pairs >= 200
    assert len(found.check.random_heads) == 20
    assert all(not set(draw) & set(found.check.heads) for draw in found.check.random_heads)
    assert found.check.intact > 0.95
    assert found.check.carries_the_answer
    assert float(found.check.random.median()) > 0.9
    assert {parse_id(name).tower for name in found.check.heads} == {"vision", "language"}
    weight = {(one, other): data["score"] for one, other, data in found.graph.edges(data=True)}
    heads = {tower: [name for name in found.importance.selected if parse_id(name).tower == tower] for tower in TOWERS}
    assert max(weight.get((name, "x.projector"), 0.0) for name in heads["vision"]) > 2
    assert max(weight.get(("x.projector", name), 0.0) for name in heads["language"]) > 2
    assert max(weight.get((name, "l.logits"), 0.0) for name in heads["language"]) > 2
    assert changed_box(found.case.clean, found.case.corrupt) is not None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("shapes-vit", CLASSES),
        pytest.param("shapes-clip", CAPTIONS, marks=pytest.mark.slow),
        pytest.param("scenes-clip", CAPTIONS, marks=pytest.mark.slow),
    ],
)
def test_the_shipped_classifier_and_dual_encoder_explain_pairs_of_their_own(name, kind, tmp_path):
    found = quickstart(name, out=tmp_path)
    assert found.case.kind is kind
    assert not found.cautions()
    assert all(found.findings()[one].holds for one in ("answers", "swing", "head", "heads", "at answer"))
    assert found.check is not None
    assert found.check.n_pairs >= 200
    assert found.check.intact > 0.95
    # A classifier of three layers has heads that nothing replaces; a dual encoder's may back each other up.
    assert found.check.carries_the_answer or kind is CAPTIONS
    page = (tmp_path / "report.html").read_text()
    assert f"What makes {name} {'prefer' if kind is CAPTIONS else 'say'} " in page
    (label,) = [data["label"] for _, data in found.graph.nodes(data=True) if data["kind"] == "logit"]
    assert label == "logit_diff(answer - foil)"
    assert found.importance.n_examples == FIND_PAIRS
    assert not set(found.importance.examples) & set(found.check.examples)


@pytest.mark.parametrize("name", ["shapes-llava", "shapes-vit", "shapes-clip"])
def test_an_organisms_own_pairs_are_about_compositions_that_it_never_saw(name):
    pairs = cv.organisms.pairs(name, 20, seed=3)
    assert len(pairs) == 20
    assert cv.organisms.pairs(name, 20, seed=3).digest == pairs.digest != cv.organisms.pairs(name, 20, seed=4).digest
    assert pairs[:5].digest == cv.organisms.pairs(name, 20, seed=3)[:5].digest
    for record in pairs.records:
        seen = {thing.pair for thing in record.clean.objects} - {thing.pair for thing in record.corrupt.objects}
        assert seen <= set(TEST_PAIRS)
        assert len(seen) == 1
    assert {thing.pair for record in pairs.records for thing in record.clean.objects} >= set(TEST_PAIRS)


@pytest.mark.parametrize("case", [{}, {"clean": "a.png", "corrupt": "b.png"}])
def test_a_misspelt_organism_is_told_its_name(case, tmp_path):
    for name, color in (("a.png", "red"), ("b.png", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / name)
    given = {key: tmp_path / name for key, name in case.items()}
    with pytest.raises(InputError, match="is scenes-vit meant"):
        quickstart("scenes-vitt", **given, out=tmp_path / "out")


@pytest.mark.slow
def test_a_circuit_of_edges_is_tested_on_other_pairs(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("circuitvision.quickstart.run.PAIRS", 6)
    monkeypatch.setattr("circuitvision.quickstart.circuit.RANDOM", 3)
    assert cli.main(["quickstart", "--model", "shapes-vit", "--circuit", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert all(word in said for word in ("A circuit of edges", "sufficiency", "edges needed"))
    graph = load(tmp_path / "edges.graphml")
    assert graph.graph["kind"] == "component"
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "edges.graphml", "tests.html"}


def test_a_circuit_of_a_single_pair_is_refused(images, tmp_path):
    with pytest.raises(InputError, match="one pair"):
        quickstart("shapes-vit", **images, out=tmp_path, circuit=True)


def test_an_organism_without_pairs_says_so(monkeypatch):
    monkeypatch.setitem(registry.TABLE, "new", registry.Organism("tests.toy_model", "Toy", "none"))
    with pytest.raises(InputError, match=r"new .*shapes-vit"):
        cv.organisms.pairs("new", 2)


def test_a_row_of_the_table_and_pairs_are_all_that_a_new_organism_needs(folder_of, tmp_path, monkeypatch):
    def pairs(count: int, seed: int) -> Pairs:
        rng = np.random.default_rng(seed)
        clean, corrupt = (
            [Image.fromarray(p) for p in rng.integers(0, 255, (count, 24, 24, 3), np.uint8)] for _ in "ab"
        )
        return Pairs(clean, corrupt_images=corrupt, answers=["label 1"] * count, foils=["label 2"] * count)

    module = ModuleType("tests.new_organism")
    module.pairs = pairs
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.TABLE, "new-dino", registry.Organism(module.__name__, "Dinov2", "see noise"))
    (tmp_path / "new-dino").symlink_to(folder_of(case("dinov2")))
    monkeypatch.setattr(registry, "assets_root", lambda: tmp_path)
    for name, count in (("FIND_PAIRS", 1), ("CHECK_PAIRS", 5)):
        monkeypatch.setattr(sys.modules["circuitvision.quickstart.run"], name, count)
    monkeypatch.setattr(
        sys.modules["circuitvision.quickstart.run"], "leading_heads", lambda importance: importance.selected[:1]
    )
    found = quickstart("new-dino", out=tmp_path / "out", top_k=1)
    assert (found.case.answer, found.case.foil) == ("label 1", "label 2")
    assert found.check is not None
    assert found.check.n_pairs == 5
    assert found.graph.nodes["v.input"]["influence"] == pytest.approx(1.0, abs=1e-3)


def test_pictures_of_a_dual_encoder_beside_all_texts_of_a_batch_are_each_beside_its_own():
    model, pairs = cv.organisms.load("shapes-clip"), cv.organisms.pairs("shapes-clip", 7)
    heads = ["v.a0.h2", "t.a0.h1"]
    together, alone = (ablation_check(model, pairs, heads, n_random=2, batch_size=size) for size in (None, 1))
    assert torch.equal(together.values, alone.values)
    assert torch.allclose(together.logit_diff, alone.logit_diff, atol=1e-4)
    # The text tower is ablated too.
    assert not torch.allclose(together.logit_diff[1], together.logit_diff[0], atol=0.1)

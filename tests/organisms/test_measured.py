"""What is measured for the card of scenes-llava: known answers on an untrained model and on toy numbers."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from circuitvision import HookedModel, edits, metrics
from circuitvision.data import Pairs
from circuitvision.data.binding import QUARTERS, TEST_PAIRS, TRAIN_PAIRS, SceneObject, render
from circuitvision.data.binding_questions import KINDS, QuestionPair, sample_question_pairs
from circuitvision.data.generated import of_questions
from circuitvision.errors import InputError
from circuitvision.organisms import measured, scenes_llava
from circuitvision.organisms.measured import __main__ as command
from circuitvision.organisms.measured import answers, depth, drawing, heads, regions, tables
from circuitvision.progress import verbosity


@pytest.fixture(scope="module", autouse=True)
def _quiet():
    with verbosity("quiet"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of few examples
        yield


def built() -> HookedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module, processor = scenes_llava.build()
    return HookedModel(module.double().eval(), processor)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    return built()


def turned(model: HookedModel, kind: str, count: int = 6) -> drawing.Asked:
    """Pairs of which every one has a larger logit difference on its clean side, whatever is right: an untrained model answers none."""
    drawn = sample_question_pairs(count, 5, kind=kind, subjects=TRAIN_PAIRS, distractors=TRAIN_PAIRS)
    pairs = of_questions(drawn)
    values = []
    for batch in pairs.batches(model, None, None):
        metric = metrics.logit_diff().bind(model, batch.answers, batch.foils)
        with torch.no_grad():
            values.append(metric(model(batch.inputs), batch.inputs) - metric(model(batch.other), batch.other))
    there = [pair if gap > 0 else _swapped(pair) for pair, gap in zip(drawn, torch.cat(values).tolist(), strict=True)]
    return drawing.Asked(of_questions(there), count)


def _swapped(pair: QuestionPair) -> QuestionPair:
    """Clean and corrupt in each other's place, with the same answer and foil."""
    changed, question = pair.changed, pair.question
    before, after = changed.before, changed.after
    subject, holder = (after if thing == before else thing for thing in (question.subject, question.holder))
    return replace(
        pair,
        clean=pair.corrupt,
        corrupt=pair.clean,
        question=replace(question, subject=subject, holder=holder),
        changed=replace(changed, clean=pair.corrupt, corrupt=pair.clean, before=after, after=before),
    )


# -- the guess from the text, and the ablation ------------------------------------------------------------------------------------------------


def test_a_guess_is_the_smoothed_share_of_its_text() -> None:
    circle, square = "what color is the circle ?", "what color is the square ?"
    examples = [("color", circle, "red")] * 2 + [("color", circle, "blue")] + [("color", square, "blue")] * 3
    guess = answers.TextGuess(examples, strength=1.0)
    prior = {"blue": 0.5, "red": 0.5}
    for counts in ({"blue": 4, "red": 2},) * 3 + ({"blue": 1, "red": 2},):
        prior = {word: (counts[word] + prior[word]) / (sum(counts.values()) + 1) for word in prior}
    assert guess.probabilities("color", circle) == pytest.approx(prior)
    assert guess("color", circle) == "red"
    assert guess("color", square) == "blue"
    # Never seen: the text with the shape left open, of which most are blue.
    assert guess("color", "what color is the house ?") == "blue"


def test_a_guess_of_a_text_without_a_picture_is_the_commonest_answer() -> None:
    rng = np.random.default_rng(0)
    texts = [f"text {number}" for number in range(3)]
    examples = [("count", texts[at], f"word {(at + (rng.random() < 0.3)) % 3}") for at in rng.integers(3, size=600)]
    guess = answers.TextGuess(examples)
    assert [guess("count", text) for text in texts] == ["word 0", "word 1", "word 2"]


def test_attention_that_says_the_same_everywhere_has_nothing_to_ablate(model) -> None:
    asked = drawing.asked(1, drawing.stream(0, "asked"))
    (batch,) = drawing.side(asked).batches(model)
    others = drawing.side(drawing.asked(2, drawing.stream(0, "reference")))
    with torch.no_grad():
        moved = [model.run(batch.inputs, group) - model(batch.inputs) for group in answers.ablations(others)]
        assert all(change.abs().max() > 1e-3 for change in moved)
        constant = built()
        for layer in range(constant.vision.cfg.n_layers):
            projection = constant.vision.blocks[layer].module.self_attn.v_proj
            projection.weight.zero_()
            projection.bias.normal_()
        for group in answers.ablations(others):
            assert torch.allclose(constant.run(batch.inputs, group), constant(batch.inputs), atol=1e-9)


def test_accuracies_are_those_of_the_answers(model) -> None:
    spoken = built()
    ids = spoken.processor.tokenizer.get_vocab()
    head = spoken.module.lm_head.weight
    with torch.no_grad():
        way = head[0].clone()
        head.zero_()
        head[ids["one"]], head[ids["two"]] = way, -way
    found = answers.measure(spoken, 8, 8, 200, 3)
    asked = drawing.asked(8, drawing.stream(3, "asked"))
    right = scenes_llava.answered_right(spoken.module.float(), spoken.processor, asked)
    kinds = np.array([question.kind for _, question in asked])
    assert 0 < right[kinds == "count"].mean() < 1
    for kind in KINDS:
        row = found["kinds"][kind]
        assert row["intact"]["value"] == pytest.approx(right[kinds == kind].mean())
        assert all(0 <= row[name]["low"] <= row[name]["value"] <= row[name]["high"] <= 1 for name in answers.COLUMNS)


@pytest.mark.parametrize(("ablated", "met"), [(0.30, True), (0.31, False), (math.nan, False)])
def test_the_ablated_model_may_be_a_tenth_above_the_guess(ablated: float, met: bool) -> None:
    row = {"mean per position": {"value": ablated}, "guess": {"value": 0.2}}
    fine = {"mean per position": {"value": 0.1}, "guess": {"value": 0.2}}
    assert answers.condition({"kinds": {"color": fine, "shape": row}})["met"] is met


# -- heads ------------------------------------------------------------------------------------------------------------------------------------


def test_effects_of_heads_and_groups_are_shares_of_the_difference(model) -> None:
    asked = turned(model, "color")
    told = heads.measure(model, {"color": asked})["kinds"]["color"]
    single = {entry["head"]: entry["value"] for entry in told["single"]}
    groups = {entry["group"]: entry for entry in told["groups"]}
    assert len(single) == sum(tower.cfg.n_layers * tower.cfg.n_heads for tower in model.towers.values())

    (batch,) = asked.pairs.batches(model)
    metric = metrics.logit_diff().bind(model, batch.answers, batch.foils)
    site = "vision.blocks.1.attn.hook_z"
    with torch.no_grad():
        clean, cache = model.run_with_cache(batch.inputs, names_filter=[site])
        base = metric(model(batch.other), batch.other)
        gap = (metric(clean, batch.inputs) - base).mean()

        def patched(*numbers: int) -> float:
            def put(value, hook):
                value = value.clone()
                value[:, :, list(numbers)] = cache[site][:, :, list(numbers)]
                return value

            return float((metric(model.run_with_hooks(batch.other, [(site, put)]), batch.other) - base).mean() / gap)

        alone = [patched(head) for head in range(4)]
        joint = patched(0, 1, 2, 3)
    assert [single[f"vision L1H{head}"] for head in range(4)] == pytest.approx(alone, abs=1e-8)
    assert groups["vision L1"]["value"] == pytest.approx(joint, abs=1e-8)
    assert groups["vision L1"]["interaction"]["value"] == pytest.approx(joint - sum(alone), abs=1e-8)
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in [*told["single"], *told["groups"]])
    order = sorted((name for name in single if name.startswith("vision")), key=lambda name: -single[name])
    assert groups["vision, strongest 3"]["heads"] == order[:3]


def _effects(value: float, low: float, **more) -> dict:
    return {"value": value, "low": low, "high": value + 1, "n": 9, **more}


def test_heads_count_by_size_and_lower_bound_and_layers_where_heads_need_each_other() -> None:
    sizes = {"L0H0": (0.10, 0.06), "L0H1": (0.10, 0.05), "L0H2": (0.09, 0.08), "L1H0": (math.nan, math.nan)}
    single = [
        _effects(*size, head=f"{tower} {name}", tower=tower) for tower in heads.TOWERS for name, size in sizes.items()
    ]
    groups = [
        _effects(0.5, 0.4, group="vision L0", tower="vision", heads=["vision L0H0"], interaction=_effects(0.3, 0.1)),
        _effects(0.5, 0.4, group="vision L1", tower="vision", heads=["vision L1H0"], interaction=_effects(0.3, 0.1)),
        _effects(0.5, 0.4, group="vision L2", tower="vision", heads=["vision L2H0"], interaction=_effects(0.3, -0.1)),
        _effects(0.5, 0.4, group="all of vision", tower="vision", heads=[], interaction=_effects(0.3, 0.1)),
    ]
    found = heads.condition({"kinds": {"color": {"single": single, "groups": groups}}})
    assert found["heads"] == {"vision": ["vision L0H0", "vision L1 together"], "language": ["language L0H0"]}
    assert found["met"] is False
    more = [_effects(0.2, 0.1, head=f"{tower} L3H{head}", tower=tower) for tower in heads.TOWERS for head in range(2)]
    assert (
        heads.condition(
            {"kinds": {"color": {"single": single, "groups": groups}, "shape": {"single": more, "groups": []}}}
        )["met"]
        is True
    )


def test_pairs_that_are_not_answered_leave_numbers_undefined_with_a_reason(model) -> None:
    told = heads.measure(model, {"color": drawing.Asked(None, 12)})["kinds"]["color"]
    assert (told["n"], told["drawn"], told["single"]) == (0, 12, [])
    assert told["reason"]
    alike = drawing.share(torch.ones(4), torch.zeros(4), torch.zeros(4))
    assert math.isnan(alike["value"])
    assert alike["reason"]
    assert "reason" not in drawing.share(torch.ones(4), torch.zeros(4), torch.ones(4))


# -- parts of the picture ---------------------------------------------------------------------------------------------------------------------


def test_all_of_the_clean_picture_restores_the_answer_and_what_is_alike_nothing(model) -> None:
    found = regions.measure(model, {kind: turned(model, kind, 8) for kind in ("shape", "relation")})["kinds"]
    assert set(found) == {"shape", "relation (color)", "relation (shape)"}
    for name, told in found.items():
        own = {region: entry["restored"]["value"] for region, entry in told["regions"].items()}
        differs = {region: entry["differs"] for region, entry in told["regions"].items()}
        assert own["everything"] == pytest.approx(1, abs=1e-9)
        assert own["object"] == pytest.approx(1, abs=1e-9)
        assert own["background"] == pytest.approx(0, abs=1e-9)
        assert own["other objects"] == pytest.approx(0, abs=1e-9)
        shown = "wedge" if "color" in name else "outline, all"
        assert own[shown] == pytest.approx(1, abs=1e-9)
        assert differs[shown] == 1
        assert differs["background"] == 0
        assert told["regions"]["background"]["removed"]["value"] == pytest.approx(0, abs=1e-9)
        assert ("object named" in own) == name.startswith("relation")


def test_replacing_embeddings_is_replacing_pixels(model) -> None:
    asked = turned(model, "shape", 2)
    pair = asked.records[0]
    patches = regions.REGIONS["outline, column of the wedge"](pair)
    pixels = render([pair.corrupt])[0].copy()
    for left, top, right, bottom in regions.boxes(patches):
        pixels[top:bottom, left:right] = pair.clean.pixels[top:bottom, left:right]
    place = regions.regions.box([regions.boxes(patches)])
    clean, corrupt, painted = (
        model.inputs(images=picture, text=pair.prompt) for picture in (pair.clean.pixels, pair.corrupt.pixels, pixels)
    )
    with torch.no_grad():
        _, cache = model.run_with_cache(clean, names_filter=[regions.SITE])
        found = model.run(corrupt, [edits.replace(regions.SITE, cache, positions=place)])
        assert torch.allclose(found, model(painted), atol=1e-5)
        assert not torch.allclose(found, model(corrupt), atol=1e-3)


@pytest.mark.parametrize("quarter", QUARTERS)
def test_outline_patches_are_named_from_the_wedge(quarter: str) -> None:
    thing = SceneObject("red", "house", quarter, "small", 2, 3)
    places = {
        way: divmod(regions.outline_patch(thing, *way), 8) for way in [(False, True), (True, False), (True, True)]
    }
    row, column = divmod(thing.wedge_patch, 8)
    assert [(there[0] != row, there[1] != column) for there in places.values()] == list(places)
    assert {regions.outline_patch(thing, *way) for way in places} == set(thing.outline_patches)


# -- depth ------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tower", ["vision", "language"])
def test_vectors_and_lens_are_those_of_the_patches(model, tower: str) -> None:
    scenes = depth.followed(6, np.random.default_rng(1), TEST_PAIRS)
    site = f"{tower}.blocks.1.hook_resid_post"
    vectors = depth._vectors(model, [site], scenes)
    (batch,) = depth._side(scenes).batches(model)
    tokens = model.tokens(batch.inputs)[tower]
    with torch.no_grad():
        _, cache = model.run_with_cache(batch.inputs, names_filter=[site])
        for row, one in enumerate(scenes):
            for place, patch in one.patches.items():
                at = np.flatnonzero((tokens.patch_row[row] == patch // 8) & (tokens.patch_col[row] == patch % 8))
                assert torch.equal(vectors[place][site][row], cache[site][row, int(at[0])])
        resid = torch.stack([vectors["wedge"][site][row] for row in range(6)])
        inner = model.module.model
        if tower == "vision":
            resid = inner.multi_modal_projector(resid)
        logits = model.module.lm_head(inner.language_model.norm(resid))
    ids = [model.processor.tokenizer.get_vocab()[word] for word in depth.ATTRIBUTES["color"]]
    right = torch.tensor([depth.ATTRIBUTES["color"].index(one.thing.color) for one in scenes])
    by_hand = float((logits[:, ids].argmax(1) == right).double().mean())
    found = depth._lens(model, tower, [site], scenes)
    assert found[site, "wedge", "color"] == pytest.approx(by_hand)


def test_followed_objects_have_the_pairs_asked_for_and_another_beside_them() -> None:
    for one, pair in zip(depth.followed(16, np.random.default_rng(0), TEST_PAIRS), TEST_PAIRS, strict=True):
        assert one.thing.pair == pair
        assert one.thing.color != one.other.color
        assert one.thing.shape != one.other.shape
        assert all(other.pair in TRAIN_PAIRS for other in one.scene.objects if other is not one.thing)
        assert set(one.patches.values()) == {*one.thing.patches, *one.other.patches}


# -- the whole --------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def found(model) -> dict:
    patch = pytest.MonkeyPatch()
    nothing = dict.fromkeys(KINDS, drawing.Asked(None, 4))
    patch.setattr(measured, "paired", lambda model, count, seed: nothing | {"shape": turned(model, "shape", count)})
    patch.setattr(depth, "TOWERS", ("vision",))
    patch.setattr(heads, "TOGETHER", (2,))
    try:
        return measured.measure(
            model, pairs=6, questions=2, reference=8, texts=100, scenes=len(TRAIN_PAIRS), progress=False
        )
    finally:
        patch.undo()


def test_the_measures_are_ready_for_json(found) -> None:
    again = json.loads(json.dumps(found))
    assert json.dumps(again) == json.dumps(found)
    assert set(found) >= {"model", "settings", "answers", "heads", "regions", "depth", "conditions"}


def test_a_probe_reads_the_colour_where_it_is_shown_before_any_attention(found) -> None:
    rows = {(row["site"], row["patch"], row["attribute"]): row for row in found["depth"]["rows"]}
    start = "vision.hook_input"
    assert rows[start, "wedge", "color"]["probe"]["value"] > 0.6
    assert rows[start, "wedge", "shape"]["probe"]["value"] < 0.4
    assert rows[start, "other wedge", "color"]["probe"]["value"] < 0.4
    assert len(rows) == 5 * 4 * 2
    assert all(0 <= row[way]["low"] <= row[way]["high"] <= 1 for row in rows.values() for way in ("lens", "probe"))


def test_tables_say_what_the_numbers_say(found) -> None:
    text = tables.markdown(found)
    assert text.count("\n### ") == 5
    assert text.startswith("### ")
    for kind in KINDS:
        assert kind in text
    assert all(line.count("|") > 3 for line in text.splitlines() if line.startswith("|"))
    failed = {**found, "conditions": {**found["conditions"]}}
    failed["conditions"]["vision attention"] = {"above_guess": {"color": 0.3, "shape": 0.0}, "met": False}
    assert "color (+.30)" in tables.answers(failed)[0]
    assert "shape" not in tables.answers(failed)[0]


def test_the_command_writes_the_numbers_and_prints_the_tables(found, tmp_path, monkeypatch, capsys) -> None:
    given = {}

    def instead(name: str, **options):
        given.update(options, name=name)
        return found

    instead.__kwdefaults__ = measured.measure.__kwdefaults__
    monkeypatch.setattr(command, "measure", instead)
    out = tmp_path / "part.json"
    assert command.main(["folder", "--out", str(out), "--pairs", "7", "--seed", "3"]) == 0
    assert given["name"] == "folder"
    assert (given["pairs"], given["seed"], given["questions"]) == (7, 3, 400)
    assert json.dumps(json.loads(out.read_text(encoding="utf-8"))) == json.dumps(found)
    assert capsys.readouterr().out.strip() == tables.markdown(found).strip()


@pytest.mark.parametrize(
    ("value", "sign", "shown"),
    [
        (0.123, False, ".12"),
        (-0.456, True, "-.46"),
        (1.0, False, "1.00"),
        (-0.001, False, ".00"),
        (math.nan, True, "–"),
    ],
)
def test_numbers_are_shown_with_two_decimals(value: float, sign: bool, shown: str) -> None:
    assert tables.short(value, sign) == shown


@pytest.mark.parametrize("wrong", [{"pairs": 1}, {"texts": 2.5}, {"scenes": 39}, {"reference": True}])
def test_numbers_that_measure_nothing_are_refused(model, wrong: dict) -> None:
    with pytest.raises(InputError, match=next(iter(wrong))):
        measured.measure(model, **wrong)


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="folder"):
        measured.measure(tmp_path)


def test_pairs_are_those_that_the_model_answers(model, monkeypatch) -> None:
    monkeypatch.setattr(Pairs, "answered", lambda self, model: self[::3])
    found = drawing.paired(model, 4, 0)
    assert {kind: (own.count, own.drawn) for kind, own in found.items()} == dict.fromkeys(KINDS, (4, 8))
    monkeypatch.setattr(Pairs, "answered", lambda self, model: self[:0])
    assert drawing.paired(model, 4, 0)["color"] == drawing.Asked(None, drawing.ROUNDS * 4)

"""The three scene organisms: what ships answers held-out questions, and the recipes do what their cards say."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from circuitvision import organisms
from circuitvision.data import captions, questions, scenes
from circuitvision.organisms import llava as llava_room
from circuitvision.organisms import registry, shapes_clip, shapes_llava, shapes_vit, training
from circuitvision.organisms.cards import choose

NAMES = ("shapes-vit", "shapes-clip", "shapes-llava")
HELD_OUT = {*scenes.TEST_PAIRS, *scenes.VALIDATION_PAIRS}


@pytest.fixture(scope="module")
def llava():
    folder = organisms.path("shapes-llava")
    return AutoModelForImageTextToText.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def clip():
    folder = organisms.path("shapes-clip")
    return AutoModel.from_pretrained(folder).eval(), AutoProcessor.from_pretrained(folder)


@pytest.fixture(scope="module")
def vit():
    folder = organisms.path("shapes-vit")
    return AutoModelForImageClassification.from_pretrained(folder).eval(), AutoImageProcessor.from_pretrained(folder)


def test_llava_answers_held_out_questions_of_every_kind(llava) -> None:
    asked = questions.sample_questions(600, seed=77)
    right = llava_room.answered_right(*llava, asked)
    assert right.mean() > 0.97
    kinds = np.array([question.kind for _, question in asked])
    assert all(right[kinds == kind].mean() > 0.9 for kind in questions.KINDS)


def test_clip_retrieves_held_out_captions(clip) -> None:
    assert shapes_clip.retrieved_right(*clip, captions.sample_retrievals(300, seed=77)).mean() > 0.96


def test_vit_names_held_out_shapes(vit) -> None:
    assert shapes_vit.labelled_right(*vit, questions.sample_largest(500, 77)).mean() > 0.97


def test_without_the_picture_the_answers_are_gone(llava) -> None:
    model, processor = llava
    asked = [(scenes.Scene(()), question) for _, question in questions.sample_questions(300, seed=78)]
    assert llava_room.answered_right(model, processor, asked).mean() < 0.5


def test_llava_generates_one_word_and_stops(llava) -> None:
    model, processor = llava
    scene, question = questions.sample_questions(1, seed=80)[0]
    inputs = processor(images=scene.image, text=question.prompt, return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=5)[0, inputs["input_ids"].shape[1] :]
    assert processor.decode(out, skip_special_tokens=True) == question.answer
    assert out[-1] == processor.tokenizer.eos_token_id
    assert len(out) == 2


def test_llava_follows_the_change_in_a_minimal_pair(llava) -> None:
    pairs = [pair for kind in questions.KINDS for pair in questions.sample_question_pairs(20, seed=81, kind=kind)]
    for scene, answer in (("clean", "answer"), ("corrupt", "foil")):
        asked = [
            (
                getattr(pair, scene),
                questions.Question(
                    pair.question.kind, pair.question.text, getattr(pair, answer), pair.question.subject
                ),
            )
            for pair in pairs
        ]
        assert llava_room.answered_right(*llava, asked).mean() > 0.95


def test_every_word_is_one_token(llava, clip) -> None:
    for words, tokenizer in ((questions.vocabulary(), llava[1].tokenizer), (captions.vocabulary(), clip[1].tokenizer)):
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        assert all(len(one) == 1 and one[0] != tokenizer.unk_token_id for one in ids)


def test_clip_reads_its_text_at_the_end_token(clip) -> None:
    model, processor = clip
    assert model.config.text_config.eos_token_id == processor.tokenizer.eos_token_id != 2
    short, padded = (
        processor(text=texts, padding=True, return_tensors="pt")
        for texts in (["circle and blue cross"], ["circle and blue cross", "red circle and blue cross"])
    )
    assert padded["input_ids"].shape[1] > short["input_ids"].shape[1]
    with torch.no_grad():
        alone = model.get_text_features(**short).pooler_output
        beside = model.get_text_features(**padded).pooler_output[:1]
    torch.testing.assert_close(alone, beside, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_processor_pixels_equal_the_training_pixels(name: str) -> None:
    folder = organisms.path(name)
    processor = AutoImageProcessor.from_pretrained(folder)
    drawn = [scene for scene, _ in questions.sample_questions(4, seed=82)]
    made = processor(images=[scene.image for scene in drawn], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(made, training.pixel_values(scenes.render(drawn)), atol=1e-6, rtol=0)
    twice = processor(images=drawn[0].image.resize((128, 128), Image.Resampling.NEAREST), return_tensors="pt")[
        "pixel_values"
    ]
    assert twice.shape == (1, 3, 64, 64)


@pytest.mark.parametrize("name", NAMES)
def test_card_records_three_seeds_and_the_choice_by_validation(name: str) -> None:
    card = organisms.card(name)
    runs = card["seeds"]
    assert len({run["seed"] for run in runs}) == 3
    assert card["ships"] == choose(runs)["seed"]
    shipped = next(run for run in runs if run["seed"] == card["ships"])
    assert card["held_out"] == shipped["held_out"] >= 0.98
    assert card["trained"] == shipped["trained"] >= 0.98
    assert shipped["held_out_answers"] >= 2048
    assert card["cpu_minutes_measured"] < 20
    assert f"{card['held_out']:.2%}" in (organisms.path(name) / "README.md").read_text()


def test_the_choice_ignores_the_held_out_score() -> None:
    runs = [
        {"seed": 0, "validation": 0.9, "held_out": 1.0},
        {"seed": 2, "validation": 0.95, "held_out": 0.5},
        {"seed": 1, "validation": 0.95, "held_out": 0.4},
    ]
    assert choose(runs)["seed"] == 1
    assert (
        choose(
            [*runs, {"seed": 3, "validation": 0.99, "held_out": 0.3}, {"seed": 4, "validation": 1.0, "held_out": 1.0}]
        )["seed"]
        == 3
    )


def test_a_seed_that_misses_an_aim_of_its_training_does_not_ship_before_one_that_misses_none() -> None:
    runs = [
        {"seed": 0, "validation": 0.97, "trained_relation": 0.92, "held_out_relation": 0.99},
        {"seed": 1, "validation": 0.95, "trained_relation": 0.98, "held_out_relation": 0.5},
        {"seed": 2, "validation": 0.96, "trained_relation": 0.95, "held_out_relation": 0.1},
    ]
    aims = {"trained_relation": 0.95, "held_out_relation": 0.9}
    assert choose(runs, aims)["seed"] == 2
    assert choose(runs)["seed"] == 0


def test_packed_questions_give_the_logits_of_separate_prompts() -> None:
    with training.reproducible(0) as rng:
        model, processor = shapes_llava.build()
        stream = shapes_llava.Stream(rng, processor)
        model.eval()
        scene = stream.scene()
        chosen = stream.choose(questions.questions(scene))
        stream.scene, stream.choose = lambda: scene, lambda _: chosen  # type: ignore[method-assign]
        batch = stream.batch(1)
    labels = batch.pop("labels")[0]
    alone = processor(
        images=[scene.image] * len(chosen),
        text=[question.prompt for question in chosen],
        padding=True,
        return_tensors="pt",
    )
    with torch.no_grad():
        packed = model(**batch).logits[0]
        single = model(**alone).logits
    last = alone["attention_mask"].sum(1) - 1
    places = torch.nonzero(labels != llava_room.IGNORED)[::2, 0]
    torch.testing.assert_close(packed[places], single[torch.arange(len(chosen)), last], atol=1e-4, rtol=1e-4)
    assert processor.tokenizer.convert_ids_to_tokens(labels[places].tolist()) == [
        question.answer for question in chosen
    ]


def test_no_training_stream_shows_or_names_a_held_out_pair() -> None:
    rng = np.random.default_rng(5)
    stream = shapes_llava.Stream(rng, shapes_llava.build()[1])
    other = shapes_clip.Stream(rng, shapes_clip.build()[1])
    names = {f"{color} {shape}" for color, shape in HELD_OUT}
    for _ in range(300):
        assert not stream.scene().pairs & HELD_OUT
        assert not other.scene().pairs & HELD_OUT
    for _ in range(4):
        _, inputs, _ = other.batch(32)
        texts = other.tokenizer.batch_decode(inputs["input_ids"], skip_special_tokens=True)
        assert len(texts) > 64
        assert not [text for text in texts if any(name in text for name in names)]


def test_clip_loss_leaves_out_captions_that_are_true_by_chance() -> None:
    logits = torch.tensor([[5.0, 9.0, 0.0], [0.0, 5.0, 0.0]])
    also_true = torch.zeros(2, 3, dtype=torch.bool)
    wrongly_punished = shapes_clip.contrastive_loss(logits, also_true)
    also_true[0, 1] = True
    assert shapes_clip.contrastive_loss(logits, also_true) < 0.05 < wrongly_punished


def test_clip_stream_marks_true_captions_of_other_pictures() -> None:
    stream = shapes_clip.Stream(np.random.default_rng(6), shapes_clip.build()[1])
    scene = stream.scene()
    stream.scene = lambda: scene  # type: ignore[method-assign]
    _, _, also_true = stream.batch(4)
    off_diagonal = ~torch.eye(4, dtype=torch.bool)
    assert also_true[:, :4][off_diagonal].all()
    assert not also_true[:, :4].diagonal().any()
    assert not also_true[:, 4:].all()


@pytest.mark.parametrize("name", ["shapes-vit", *(pytest.param(name, marks=pytest.mark.slow) for name in NAMES[1:])])
def test_training_is_reproducible_and_leaves_a_loadable_folder(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = registry.module(name)
    score = module.evaluate
    monkeypatch.setattr(module, "evaluate", lambda folder, **options: score(folder, count=30))
    before = torch.random.get_rng_state()
    first = organisms.train(name, seed=4, out=tmp_path / "a", steps=3, progress=False)
    organisms.train(name, seed=4, out=tmp_path / "b", steps=3, progress=False)
    organisms.train(name, seed=5, out=tmp_path / "c", steps=3, progress=False)
    weights = [(tmp_path / run / "model.safetensors").read_bytes() for run in "abc"]
    assert weights[0] == weights[1] != weights[2]
    assert torch.equal(before, torch.random.get_rng_state())
    assert 0 <= first["held_out"] <= 1
    assert first["seed"] == 4
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["a", "b", "c"]


def test_an_interrupted_write_leaves_the_old_folder_alone(tmp_path: Path) -> None:
    class Broken:
        def save_pretrained(self, folder: Path) -> None:
            (Path(folder) / "half").write_text("")
            raise KeyboardInterrupt

    target = tmp_path / "model"
    target.mkdir()
    (target / "config.json").write_text("old")
    with pytest.raises(KeyboardInterrupt):
        training.write_folder(target, Broken())
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert (target / "config.json").read_text() == "old"


def test_load_gives_a_hooked_model_that_answers() -> None:
    model = organisms.load("shapes-llava")
    scene, question = questions.sample_questions(1, seed=83)[0]
    inputs = model.inputs(images=scene.image, text=question.prompt)
    with torch.no_grad():
        assert model(inputs)[0, -1].argmax() == model.token(question.answer)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_truth(name: str) -> None:
    scores = organisms.evaluate(name)
    shipped = next(run for run in organisms.card(name)["seeds"] if run["seed"] == organisms.card(name)["ships"])
    assert scores["held_out"] >= 0.98
    for group in ("held_out", "validation", "trained"):
        assert abs(scores[group] - shipped[group]) < 0.002

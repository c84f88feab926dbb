"""Pairs and sides: what they hold, their batches for real models, which positions belong together, and which pairs a model answers."""

from __future__ import annotations

import json
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import circuitvision as cv
from circuitvision.data import Batch, Pairs, Side, Tally
from circuitvision.errors import InputError
from circuitvision.organisms.shapes_clip import retrieved_right
from tests.zoo import case
from tests.zoo.images import picture

TEXTS = ["<image> what color is the circle ?", "<image> red ?", "<image> is the square red ?", "<image> which shape ?"]


def wrapped(name: str, processor: bool = True) -> cv.HookedModel:
    one = case(name)
    return cv.HookedModel(one.build().double().eval(), one.processor() if processor and one.processor else None)


def made(count: int = 4, **changes: Any) -> Pairs:
    given: dict[str, Any] = {
        "images": [picture(number) for number in range(count)],
        "corrupt_images": [picture(number + 50) for number in range(count)],
        "texts": [TEXTS[number % 4] for number in range(count)],
        "answers": ["red"] * count,
        "foils": ["blue"] * count,
        "groups": [number // 2 for number in range(count)],
    }
    return Pairs(**given | changes)


# -- what they hold --------------------------------------------------------------------------------------------------------------------------


def test_what_is_not_given_for_the_corrupt_side_is_as_clean() -> None:
    pairs = made()
    assert pairs.corrupt.examples[1].text == pairs.clean.examples[1].text == TEXTS[1]
    assert pairs.corrupt.examples[1].image is not pairs.clean.examples[1].image
    assert pairs.corrupt.answers == pairs.clean.answers == pairs.answers


def test_subsets_keep_numbers_and_parts_join_to_the_whole() -> None:
    pairs = made(8)
    assert pairs[2:5].numbers == (2, 3, 4)
    assert pairs[[5, 1]].numbers == (5, 1)
    assert pairs[-1].numbers == (7,)
    assert pairs[np.arange(8) % 3 == 0].numbers == pairs[torch.arange(8) % 3 == 0].numbers == (0, 3, 6)
    assert [part.numbers for part in pairs] == [(number,) for number in range(8)]
    assert pairs[2:].at([5, 3]).digest == pairs[[5, 3]].digest
    with pytest.raises(InputError, match="example 1"):
        pairs[2:].at([1])
    joined = Pairs.concat([pairs[4:], pairs[:4]])
    assert joined.numbers == (4, 5, 6, 7, 0, 1, 2, 3)
    assert joined[np.argsort(joined.numbers)].digest == pairs.digest
    assert (pairs + pairs).numbers == tuple(range(16))
    shuffled = pairs.shuffled(3)
    assert sorted(shuffled.numbers) == list(range(8))
    assert shuffled.numbers == pairs.shuffled(3).numbers
    assert shuffled.numbers != pairs.numbers
    assert shuffled.groups == tuple(number // 2 for number in shuffled.numbers)


def test_an_example_outside_ends_an_iteration_and_a_mask_of_another_length_is_refused() -> None:
    with pytest.raises(IndexError):
        made()[4]
    with pytest.raises(InputError):
        made()[[True, False]]
    with pytest.raises(InputError):
        made()["clean"]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"answers": ["red"]}, "answers"),
        ({"texts": TEXTS[:3]}, "texts"),
        ({"corrupt_images": [picture(1)]}, "texts"),
        ({"corrupt_images": None}, "same"),
        ({"images": picture(0)}, "images"),
        ({"combine": "sum"}, "combine"),
        ({"settings": {"state": [[0.0]]}}, "state"),
        ({"texts": [3, 4, 5, 6]}, "string"),
        ({"inputs": {}}, "one of them"),
    ],
)
def test_columns_that_do_not_fit_are_refused(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(InputError, match=word):
        made(**changes)


def test_the_digest_tells_contents_apart(tmp_path: Path) -> None:
    pairs = made()
    digests = {
        pairs.digest,
        made(answers=["blue"] * 4).digest,
        made(texts=TEXTS[::-1]).digest,
        made(images=[picture(number + 1) for number in range(4)]).digest,
        made(corrupt_images=[picture(number + 51) for number in range(4)]).digest,
        made(groups=[0, 1, 2, 3]).digest,
        made(boxes=[(0, 0, 4, 4)] * 4).digest,
        made(maps=[list(range(18))] * 4).digest,
        made(combine="first").digest,
        pairs[::-1].digest,
        pairs[:3].digest,
    }
    assert len(digests) == 11
    for number in range(4):
        picture(number).save(tmp_path / f"{number}.png")
    assert made(images=[tmp_path / f"{number}.png" for number in range(4)]).digest == pairs.digest


def test_the_digest_is_the_same_in_another_process() -> None:
    code = "from tests.data.test_pairs import made; print(made().digest)"
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, timeout=120)
    assert found.stdout.split()[-1:] == [made().digest], found.stderr


def test_provenance_holds_the_digest() -> None:
    from circuitvision.digests import plain

    assert plain(made())["sha256"] == made().digest
    assert plain(made().clean)["sha256"] == made().clean.digest != made().corrupt.digest


def test_they_show_themselves() -> None:
    pairs = made(6, texts=["<b>?"] * 6)
    page = pairs._repr_html_()
    assert page.count("data:image/png") == 8
    assert "&lt;b&gt;?" in page
    assert "2 more" in page
    assert "6 pairs" in repr(pairs)
    assert "answers" in repr(pairs)
    assert "clean" in repr(pairs.clean)
    arrays = Side([np.zeros((4, 5, 3), np.uint8), torch.ones(3, 4, 5)])
    assert arrays._repr_html_().count("data:image/png") == 2
    frame = pairs.to_frame()
    assert list(frame.example) == list(range(6))
    assert list(frame.answer) == ["red"] * 6
    assert {"corrupt_image", "corrupt_text", "foil", "group"} <= set(frame.columns)


# -- batches ---------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-next-mistral", "paligemma"])
def test_prompts_of_different_lengths_give_the_same_numbers_in_any_batch(name: str) -> None:
    model, pairs = wrapped(name), made()
    (whole,) = pairs.batches(model, 4)
    assert bool(whole.inputs["attention_mask"][:, 0].all())
    assert not bool(whole.inputs["attention_mask"].all())
    logits = model(whole.inputs)
    for batch in pairs.batches(model, 1):
        (number,) = batch.examples
        length = int(batch.inputs["attention_mask"].sum())
        torch.testing.assert_close(model(batch.inputs)[0, :length], logits[number, :length], atol=1e-12, rtol=0)
        assert batch.inputs["input_ids"].shape == (1, length)


def test_left_padding_moves_to_the_right_and_both_sides_have_one_length() -> None:
    model = wrapped("llava-clip-llama")
    assert model.tokenizer.padding_side == "left"
    pairs = made(2, corrupt_texts=["<image> red ?", "<image> what color is the circle on the left ?"])
    (batch,) = pairs.batches(model, align="index")
    assert batch.other is not None
    assert batch.inputs["input_ids"].shape == batch.other["input_ids"].shape
    for inputs in (batch.inputs, batch.other):
        mask = inputs["attention_mask"].bool()
        assert bool((mask[:, :-1] >= mask[:, 1:]).all())


def test_tensors_made_by_hand_run_together_whatever_their_lengths() -> None:
    model = wrapped("llava-clip-llama")
    parts = [model.inputs(images=[picture(number)], text=[TEXTS[number]]) for number in range(4)]
    corrupt = [{**part, "pixel_values": part["pixel_values"].flip(-1)} for part in parts]
    pairs = Pairs(inputs=parts, corrupt_inputs=corrupt, answers=[3, 4, 5, 6])
    (batch,) = pairs.batches(model)
    assert batch.answers == [3, 4, 5, 6]
    assert batch.other is not None
    for inputs, given in ((batch.inputs, parts), (batch.other, corrupt)):
        logits = model(inputs)
        for row, part in enumerate(given):
            alone = model(part)[0]
            torch.testing.assert_close(logits[row, : len(alone)], alone, atol=1e-12, rtol=0)


def test_one_mapping_of_all_examples_is_cut_and_one_that_cannot_be_is_refused() -> None:
    model = wrapped("vit", processor=False)
    pixels = torch.rand(5, 3, 16, 16, dtype=torch.float64)
    side = Side(inputs=pixels)
    found = torch.cat([model(batch.inputs) for batch in side.batches(model, 2)])
    torch.testing.assert_close(found, model(pixels), atol=1e-12, rtol=0)
    with pytest.raises(InputError, match="one mapping per example"):
        Side(inputs={"pixel_values": pixels, "input_ids": torch.ones(3, 4, dtype=torch.long)})


def test_images_run_with_those_that_are_compared_with_the_same_texts() -> None:
    model = wrapped("clip")
    texts = [("red circle", "blue square", "green cross"), ("red square", "blue circle", "a cross")]
    side = Side(
        [picture(number) for number in range(4)], [texts[0], texts[0], texts[1], texts[0]], answers=[0, 1, 2, 1]
    )
    batches = list(side.batches(model))
    assert [batch.examples for batch in batches] == [[0, 1], [2], [3]]
    for batch in batches:
        for row, number in enumerate(batch.examples):
            text = side.examples[number].text
            alone = model(model.inputs(images=[picture(number)], text=list(text or ())))
            torch.testing.assert_close(model(batch.inputs)[row], alone[0], atol=1e-12, rtol=0)
    by_hand = Side(inputs=[model.inputs(images=[picture(n)], text=list(texts[n // 2])) for n in range(4)])
    assert [batch.examples for batch in by_hand.batches(model)] == [[0, 1], [2, 3]]


def test_two_observations_start_from_the_same_noise_in_any_batch() -> None:
    model = wrapped("pi0")
    raw = case("pi0").raw(batch=3)
    other = case("pi0").raw(batch=3, seed=4)
    pairs = Pairs(
        raw["images"],
        raw["text"],
        corrupt_images=other["images"],
        settings={"state": raw["state"]},
        answers=[0.5, 1.0, 0.2],
        foils=[-0.5, 0.0, 0.1],
    )
    (whole,) = pairs.batches(model, 3)
    assert whole.other is not None
    assert whole.answers == [0.5, 1.0, 0.2]
    assert torch.equal(whole.inputs["noise"], whole.other["noise"])
    assert len(whole.inputs["noise"].unique()) > 3
    velocity = model(whole.inputs)
    for batch in pairs.batches(model, 1):
        torch.testing.assert_close(model(batch.inputs)[0], velocity[batch.examples[0]], atol=1e-12, rtol=0)
    kept = pairs.answered(model, cv.metrics.action_dim(1))
    assert kept.tally is not None
    assert kept.tally.total == 3
    scores = [cv.metrics.action_dim(1)(model(made), made) for made in (whole.inputs, whole.other)]
    wanted = [
        number
        for number, (answer, foil) in enumerate(zip(whole.answers, whole.foils or [], strict=True))
        if abs(scores[0][number] - answer) < abs(scores[0][number] - foil)
        and abs(scores[1][number] - answer) >= abs(scores[1][number] - foil)
    ]
    assert list(kept.numbers) == wanted


def test_memory_does_not_grow_with_the_data_set() -> None:
    model = wrapped("vit")
    most = []
    for count in (6, 24):
        side, alive, peak = Side([picture(number) for number in range(count)]), [], 0
        for batch in side.batches(model, 3):
            alive.append(weakref.ref(batch.inputs["pixel_values"]))
            peak = max(peak, sum(one() is not None for one in alive))
            del batch
        most.append(peak)
    assert most == [1, 1]


def test_a_size_chosen_by_memory_is_smaller_for_a_larger_budget_of_each_example(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from circuitvision.data import batches

    model, side = wrapped("vit"), Side([picture(number) for number in range(9)])
    assert [len(batch) for batch in side.batches(model)] == [9]
    monkeypatch.setattr(batches, "BUDGET", 1)
    assert [len(batch) for batch in side.batches(model)] == [1] * 9
    with pytest.raises(InputError):
        next(iter(side.batches(model, 0)))


# -- answers ---------------------------------------------------------------------------------------------------------------------------------


def test_several_tokens_of_an_answer_are_read_as_said() -> None:
    model = wrapped("llava-clip-llama")
    red, blue = model.token("red"), model.token("blue")

    def found(**changes: Any) -> Batch:
        return next(iter(made(1, **changes).batches(model)))

    assert found().answers == [red]
    assert found().foils == [blue]
    assert found(answers=[["red", blue]], combine="mean").answers == [[red, blue]]
    assert found(answers=[("red", blue)], combine="joint").answers == [[red, blue]]
    assert found(answers=[["red", blue]], combine="first").answers == [red]
    assert found(answers=["red blue"], combine="mean").answers == [[red, blue]]
    with pytest.raises(InputError, match="combine"):
        found(answers=[["red", blue]])
    with pytest.raises(InputError):
        found(answers=["red blue"])


# -- positions that belong together ----------------------------------------------------------------------------------------------------------


def test_positions_are_matched_by_kind() -> None:
    model = wrapped("llava-clip-llama")
    pairs = made(1, texts=["<image> red circle"], corrupt_texts=["red <image> circle"], corrupt_images=None)
    (batch,) = pairs.batches(model)
    assert batch.other is not None
    this, other = model.tokens(batch.inputs)["language"], model.tokens(batch.other)["language"]
    found = batch.maps["language"][0]
    for kind in ("patch", "text"):
        assert found[this.positions(kind)].tolist() == other.positions(kind)
    assert found[this.positions("patch")].tolist() != this.positions("patch")
    _, cache = model.run_with_cache(batch.other, "language.hook_embed")
    moved = batch.matched("language", cache["language.hook_embed"])
    _, clean = model.run_with_cache(batch.inputs, "language.hook_embed")
    torch.testing.assert_close(moved, clean["language.hook_embed"])
    pattern = torch.arange(len(found)).double()[None, None, :, None] * 100 + torch.arange(len(found)).double()
    assert torch.equal(batch.matched("language", pattern, (2, 3)), pattern[:, :, found][:, :, :, found])


def test_positions_that_do_not_belong_together_are_told_and_can_be_said() -> None:
    model = wrapped("llava-clip-llama")
    pairs = made(2, corrupt_texts=[TEXTS[0], "<image> red circle ?"])
    with pytest.raises(InputError, match="Example 1"):
        list(pairs.batches(model, 2))
    (batch,) = pairs.batches(model, 2, "index")
    width = batch.inputs["input_ids"].shape[1]
    assert batch.maps["language"].tolist() == [list(range(width))] * 2
    (batch,) = pairs.batches(model, 2, lambda this, other: None if this.tower == "vision" else [0] * this.n_positions)
    assert not batch.maps["language"].any()
    assert batch.maps["vision"].any()
    with pytest.raises(InputError, match="whole number"):
        list(pairs.batches(model, 2, lambda this, other: [0, 1]))
    with pytest.raises(InputError, match="align"):
        list(pairs.batches(model, 2, "nearest"))
    own = Pairs.from_sides(pairs.clean, pairs.corrupt, maps=[[0, 0, 1], {"language": [2]}])
    (batch,) = own[[1, 0]].batches(model, 2)
    assert batch.maps["language"][:, :3].tolist() == [[2, 1, 2], [0, 0, 1]]


# -- answered --------------------------------------------------------------------------------------------------------------------------------


def test_pairs_that_a_model_answers_are_kept_and_the_others_counted(capsys: pytest.CaptureFixture[str]) -> None:
    model = cv.organisms.load("shapes-llava")
    drawn = cv.data.sample_question_pairs(8, seed=0)
    answers, foils = [pair.answer for pair in drawn], [pair.foil for pair in drawn]
    texts = [pair.prompt for pair in drawn]
    corrupt = list(texts)
    answers[1], foils[2], answers[3] = foils[1], answers[2], "nosuchword"
    corrupt[4] = corrupt[4].replace("ASSISTANT:", "? ASSISTANT:")
    pairs = Pairs(
        [pair.clean.image for pair in drawn],
        texts,
        corrupt_images=[pair.corrupt.image for pair in drawn],
        corrupt_texts=corrupt,
        answers=answers,
        foils=foils,
        records=drawn,
    )
    kept = pairs.answered(model, size=3)
    assert kept.numbers == (0, 5, 6, 7)
    assert kept.records is not None
    assert kept.records[1] is drawn[5]
    assert isinstance(kept.tally, Tally)
    assert kept.tally.kept == 4
    assert kept.tally.dropped == {
        "answer or foil is not one token": (3,),
        "clean wrong": (1,),
        "corrupt wrong": (2,),
        "token counts differ": (4,),
    }
    assert "4 of 8" in capsys.readouterr().out
    assert pairs[[0, 5]].answered(model, "logit_diff").numbers == (0, 5)
    with cv.progress.verbosity("quiet"):
        kept.answered(model)
    capsys.readouterr()
    assert len(pairs[[1]].answered(model)) == 0


def test_captions_and_classes_are_answers_too() -> None:
    clip = cv.organisms.load("shapes-clip")
    drawn = cv.data.sample_retrievals(6, seed=0)
    pairs = Pairs(
        [one.scene.image for one in drawn],
        [one.captions for one in drawn],
        corrupt_texts=[one.captions[::-1] for one in drawn],
        answers=[one.answer for one in drawn],
        foils=[len(one.captions) - 1 - one.answer for one in drawn],
    )
    right = retrieved_right(clip.module, clip.processor, drawn)
    assert pairs.answered(clip).numbers == tuple(np.flatnonzero(right))
    vit = cv.organisms.load("shapes-vit")
    scenes = cv.data.sample_largest(6, 5)
    images, labels = [scene.image for scene, _ in scenes], [label for _, label in scenes]
    pairs = Pairs(images, corrupt_images=images[::-1], answers=labels, foils=labels[::-1])
    assert len(pairs.answered(vit)) >= 5


# -- from files and stored data sets ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images").mkdir()
    for number in range(4):
        picture(number).save(tmp_path / "images" / f"clean{number}.png")
        picture(number + 50).save(tmp_path / "images" / f"corrupt{number}.png")
    mask = np.zeros((24, 24), np.uint8)
    mask[2:5] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    return tmp_path


def test_a_folder_with_a_table(folder: Path) -> None:
    lines = ["image,corrupt_image,text,answer,foil,group,box"]
    rows = []
    for number in range(4):
        names = f"images/clean{number}.png", f"images/corrupt{number}.png"
        lines.append(f'{names[0]},{names[1]},{TEXTS[number]},red,blue,{number // 2},"1, 2, 3, 4.5"')
        row = {"image": names[0], "corrupt_image": names[1], "text": TEXTS[number], "answer": "red", "foil": "blue"}
        rows.append({**row, "group": number // 2, "mask": "mask.png", "box": [1, 2, 3, 4.5]})
    (folder / "pairs.csv").write_text("\n".join(lines))
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    table, listed = Pairs.from_folder(folder), Pairs.from_folder(folder, "pairs.jsonl")
    assert table.boxes == listed.boxes == ((1, 2, 3, 4.5),) * 4
    assert listed.masks is not None
    assert listed.masks[0].sum() == 72
    assert listed.groups == (0, 0, 1, 1)
    assert (
        made().digest
        == Pairs.from_sides(
            listed.clean._with(boxes=None, masks=None), listed.corrupt._with(boxes=None, masks=None)
        ).digest
    )
    model = wrapped("llava-clip-llama")
    (one,), (two,) = table.batches(model), made().batches(model)
    assert torch.equal(one.inputs["pixel_values"], two.inputs["pixel_values"])
    assert one.answers == two.answers


@pytest.mark.parametrize(
    ("lines", "word"),
    [
        (["image,answer", "images/clean9.png,red"], "clean9"),
        (["image,answer", "images/clean1.png,"], "answer"),
        (["image,answer_id", "images/clean1.png,red"], "answer_id"),
        (["photo,answer", "images/clean1.png,red"], "columns"),
        (["image"], "no row"),
    ],
)
def test_a_table_that_cannot_be_read_says_where(folder: Path, lines: list[str], word: str) -> None:
    (folder / "pairs.csv").write_text("\n".join(lines))
    with pytest.raises(InputError, match=word):
        Pairs.from_folder(folder)


class Rows:
    """A stored data set that counts what is fetched."""

    def __init__(self, names: list[str], fetched: list[int]) -> None:
        self.column_names, self.fetched = names, fetched

    def __len__(self) -> int:
        return 4

    def __getitem__(self, row: int) -> dict[str, Any]:
        whole = {"photo": lambda: picture(row), "twin": lambda: picture(row + 50), "text": lambda: TEXTS[row]}
        if "photo" in self.column_names:
            self.fetched.append(row)
        return {
            name: whole[name]() if name in whole else {"answer": "red", "foil": "blue", "group": row // 2}[name]
            for name in self.column_names
        }

    def select_columns(self, names: list[str]) -> Rows:
        return Rows(names, self.fetched)


def test_a_stored_data_set_is_fetched_when_it_is_needed() -> None:
    fetched: list[int] = []
    rows = Rows(["photo", "twin", "text", "answer", "foil", "group"], fetched)
    pairs = Pairs.from_dataset(rows, columns={"image": "photo", "corrupt_image": "twin"})
    assert not fetched
    model = wrapped("llava-clip-llama")
    (batch,) = pairs[2:3].batches(model, 1)
    assert set(fetched) == {2}
    assert batch.examples == [2]
    assert pairs.digest == made().digest
    plain = Pairs.from_dataset(
        [{**Rows(rows.column_names, [])[row]} for row in range(4)], columns={"image": "photo", "corrupt_image": "twin"}
    )
    assert plain.digest == pairs.digest
    with pytest.raises(InputError, match="nosuch"):
        Pairs.from_dataset(rows, columns={"image": "nosuch"})
    with pytest.raises(InputError, match="length"):
        Pairs.from_dataset(iter([]))


# -- drawn pairs -----------------------------------------------------------------------------------------------------------------------------


def test_drawn_pairs_are_answered_by_the_trained_models() -> None:
    llava, vit, clip = (cv.organisms.load(f"shapes-{name}") for name in ("llava", "vit", "clip"))
    for kind in ("color", "side"):
        pairs = cv.data.question_pairs(12, seed=1, kind=kind)
        assert len(pairs.answered(llava)) >= 11
    assert len(cv.data.largest_pairs(12, seed=1).answered(vit)) >= 9
    for attribute in ("color", "shape"):
        assert len(cv.data.caption_pairs(10, seed=1, attribute=attribute).answered(clip)) >= 8
    assert cv.data.question_pairs(5, seed=2).digest == cv.data.question_pairs(5, seed=2).digest
    assert cv.data.question_pairs(5, seed=2).digest != cv.data.question_pairs(5, seed=3).digest


@pytest.mark.parametrize("draw", [cv.data.question_pairs, cv.data.largest_pairs, cv.data.caption_pairs])
def test_pictures_of_a_drawn_pair_differ_inside_its_masks_alone(draw: Any) -> None:
    pairs = draw(8, 4)
    for number in range(8):
        clean, corrupt = (np.asarray(side.examples[number].image) for side in (pairs.clean, pairs.corrupt))
        inside = pairs.masks[number] | pairs.corrupt.masks[number]
        assert not (clean != corrupt).any(-1)[~inside].any()
        assert (clean != corrupt).any()
        left, top, right, bottom = pairs.boxes[number]
        assert pairs.masks[number][top:bottom, left:right].sum() == pairs.masks[number].sum()


def test_right_steps_of_the_grid_world_differ_along_the_dimension() -> None:
    model = cv.organisms.load("reach-pi0")
    pairs = cv.data.reach_pairs(6, seed=0, dim=1)
    assert len(pairs) == 6
    assert pairs.records is not None
    for number, record in enumerate(pairs.records):
        assert pairs.answers is not None
        assert pairs.foils is not None
        assert pairs.answers[number] == record.steps[0][1] != record.steps[1][1] == pairs.foils[number]
    (batch,) = pairs.batches(model, 6)
    assert batch.other is not None

    def steps(logits: torch.Tensor, inputs: Any) -> torch.Tensor:
        actions = (inputs["noise"] - logits)[:, 0, 1]
        return actions * model.processor.actions_std[1] + model.processor.actions_mean[1]

    kept = pairs.answered(model, steps)
    assert len(kept) >= 4
    with pytest.raises(InputError, match="metric"):
        pairs.answered(model)


def test_a_hugging_face_data_set_with_decoded_pictures_and_class_labels() -> None:
    datasets = pytest.importorskip("datasets")
    stored = {"photo": datasets.Image(), "twin": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}
    columns = {"photo": [picture(n) for n in range(3)], "twin": [picture(n + 9) for n in range(3)], "label": [0, 1, 1]}
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(stored))
    pairs = Pairs.from_dataset(rows, columns={"image": "photo", "corrupt_image": "twin", "answer_id": "label"})
    plain = Pairs(columns["photo"], corrupt_images=columns["twin"], answers=columns["label"])
    assert pairs.digest == plain.digest
    model = wrapped("vit")
    (one,), (two,) = pairs.batches(model), plain.batches(model)
    assert torch.equal(one.inputs["pixel_values"], two.inputs["pixel_values"])

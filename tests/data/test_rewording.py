"""Texts with one word replaced by another of as many tokens, edited questions and captions, and prompts without their pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import circuitvision as cv
from circuitvision.data import Pairs, Side
from circuitvision.errors import InputError
from tests.zoo import case, shared_model
from tests.zoo.images import picture
from tests.zoo.text import tokenizer

WORDS = ["red", "blue", "green", "circle", "square", "color", "what", "is"]


def llava() -> cv.HookedModel:
    return cv.organisms.load("shapes-llava")


def ids_of(text: str, model: Any) -> list[int]:
    return list(model.tokenizer(text)["input_ids"])


@settings(max_examples=30)
@given(st.lists(st.sampled_from(WORDS), min_size=2, max_size=8), st.data())
def test_a_replacement_changes_exactly_one_id(words: list[str], data: Any) -> None:
    model = llava()
    place = data.draw(st.integers(0, len(words) - 1))
    old = words[place]
    new = data.draw(st.sampled_from([word for word in WORDS if word != old]))
    which = words[:place].count(old)
    side = Side([picture(0)], ["USER: <image> " + " ".join(words) + " ?"], answers=["red"])
    pairs = cv.data.replace_words(side, old, new, model, which=which)
    before, after = (ids_of(one.examples[0].text, model) for one in (pairs.clean, pairs.corrupt))
    assert [one != other for one, other in zip(before, after, strict=True)].count(True) == 1
    expected = [*words]
    expected[place] = new
    assert pairs.corrupt.examples[0].text == "USER: <image> " + " ".join(expected) + " ?"
    (batch,) = pairs.batches(model, 1)
    assert batch.other is not None
    ((here, there),) = cv.data.changed_tokens(batch.inputs, batch.other)[0]
    assert here == there
    tokens = model.tokens(batch.inputs)["language"]
    assert np.flatnonzero(cv.regions.words(old, which=which).where(tokens, [0])[0]).tolist() == [here]


def test_left_padding_moves_positions_and_not_what_is_compared() -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7], [4, 5, 6, 7, 8]])
    left = {"input_ids": ids, "attention_mask": (ids > 0).long()}
    other = torch.tensor([[5, 9, 7, 0, 0, 0], [4, 5, 6, 7, 3, 0]])
    right = {"input_ids": other, "attention_mask": (other > 0).long()}
    assert cv.data.changed_tokens(left, right) == [[(3, 1)], [(4, 4)]]
    assert cv.data.changed_tokens(right, left) == [[(1, 3)], [(4, 4)]]
    assert cv.data.changed_tokens(left, left) == [[], []]
    with pytest.raises(InputError, match="Row 0: 3 tokens"):
        cv.data.changed_tokens(left, {"input_ids": other})
    with pytest.raises(InputError, match="input_ids"):
        cv.data.changed_tokens(left, {"pixel_values": ids})


def test_words_of_other_lengths_are_left_out() -> None:
    text = tokenizer("plain")
    vocabulary = [word for word in text.get_vocab() if word.isalpha() and word.isascii()]
    one = [word for word in vocabulary if len(text(f"a {word} b")["input_ids"]) == len(text("a red b")["input_ids"])]
    assert "red" in one
    found = cv.data.equal_length_words("a red b", "red", [*one, "a red thing and more", "red"], text)
    assert "red" not in found
    assert "a red thing and more" not in found
    assert set(found) <= set(one)
    for word in found:
        before, after = (text(each)["input_ids"] for each in ("a red b", f"a {word} b"))
        assert sum(x != y for x, y in zip(before, after, strict=True)) >= 1


class Pieces:
    """A slow tokenizer that cuts words into pieces of three letters and merges ``ab c`` over a space."""

    is_fast = False

    def convert_ids_to_tokens(self, ids: Any) -> Any:
        return ids

    def __call__(self, text: str) -> dict[str, list[int]]:
        found: list[int] = []
        for word in text.replace("ab c", "abc").split():
            found += [hash(word[n : n + 3]) for n in range(0, len(word), 3)]
        return {"input_ids": found}


def test_a_word_cut_with_its_neighbour_and_one_of_more_pieces_are_refused() -> None:
    side = Side(texts=["xx dog cat", "xx dog c"])
    with pytest.raises(InputError, match="Example 0: 'horse' in place of 'dog': 3 tokens on one side and 4"):
        cv.data.replace_words(side, "dog", "horse", Pieces())
    with pytest.raises(InputError, match="Example 1"):
        cv.data.replace_words(side, "dog", "ab", Pieces())
    made = cv.data.replace_words(side, "dog", "pig", Pieces())
    assert [one.text for one in made.corrupt.examples] == ["xx pig cat", "xx pig c"]
    assert cv.data.equal_length_words("xx dog c", "dog", ["pig", "ab", "horse", "dog"], Pieces()) == ["pig"]


SIDE = Side(texts=["is the red circle red ?", "is the blue circle red ?"], answers=["yes", "no"])


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda model: cv.data.replace_words(SIDE, "red", "blue", model), "Example 0.*stands in 2 places"),
        (lambda model: cv.data.replace_words(SIDE, "green", "blue", model), "example 0 does not hold"),
        (
            lambda model: cv.data.replace_words(SIDE, "circle", ["square", "circle"], model),
            "Example 1: 'circle' is the word",
        ),
        (lambda model: cv.data.replace_words(SIDE, "circle", ["square"], model), "1 words for 2"),
        (lambda model: cv.data.replace_words(SIDE, "circle", ["square", ""], model), "'' for example 1"),
        (lambda model: cv.data.replace_words(SIDE, "red", "blue", model, which=2), "which=2"),
        (lambda model: cv.data.replace_words(SIDE, "circle", "square", None), "tokenizer"),
        (lambda model: cv.data.draw_words(SIDE, "circle", ["circle"], model), "None of 1 words.*example 0"),
        (lambda model: cv.data.edit_texts(SIDE, [SIDE.examples[0].text, "no"], model), "example 0 stays"),
        (lambda model: cv.data.edit_texts(SIDE, ["is the red circle blue ?", "no"], model), "Example 1: "),
        (lambda model: cv.data.edit_texts(SIDE, ["x"], model), "1 texts for 2"),
        (lambda model: cv.data.replace_words(Side([picture(0)]), "a", "b", model), "Example 0 has no text"),
    ],
)
def test_mistakes_are_named(call: Any, word: str) -> None:
    with pytest.raises(InputError, match=word):
        call(llava())


def test_questions_and_captions_are_edited_and_answers_stay_or_are_said() -> None:
    model = llava()
    pairs = cv.data.edit_texts(SIDE, lambda text: text.replace("circle", "square"), model, most=1, foils=["no", "no"])
    assert pairs.answers == ("yes", "no")
    assert pairs.foils == ("no", "no")
    assert pairs.corrupt.examples[1].text == "is the blue square red ?"
    with pytest.raises(InputError, match="example 0 2 tokens differ"):
        cv.data.edit_texts(SIDE, lambda text: text.replace("the", "what").replace("circle", "square"), model, most=1)
    clip = cv.organisms.load("shapes-clip")
    captions = cv.data.caption_pairs(3, 0).clean
    swapped = cv.data.edit_texts(captions, [one.text[::-1] for one in captions.examples], clip)
    assert swapped.corrupt.examples[0].text == captions.examples[0].text[::-1]
    color = captions.examples[0].text[0].split()[0]
    new = "blue" if color != "blue" else "red"
    replaced = cv.data.replace_words(captions[:1], color, new, clip, which=0).corrupt.examples[0].text
    assert replaced[0].startswith(new)


def test_drawn_words_depend_on_the_example_and_the_seed_alone() -> None:
    model = llava()
    words = ["circle", "square", "triangle", "cross", "star", "ring"]
    side = Side([picture(n) for n in range(8)], "USER: <image> what color is the circle ? ASSISTANT:")
    drawn = cv.data.draw_words(side, "circle", words, model)
    assert cv.data.draw_words(side[::-1], "circle", words, model) == drawn[::-1]
    assert "circle" not in drawn
    assert len(set(drawn)) > 1
    assert cv.data.draw_words(side, "circle", words, model, seed=1) != drawn


def test_the_trained_model_answers_about_the_word_that_was_put_in() -> None:
    model = llava()
    pairs = cv.data.question_pairs(12, seed=2, kind="color")
    assert pairs.records is not None
    kept, old, new, right = [], [], [], []
    for number, record in enumerate(pairs.records):
        subject = next(one for one in record.clean.objects if one.color == record.answer)
        others = [one for one in record.clean.objects if one is not subject]
        kept.append(number)
        old.append(subject.shape)
        new.append(others[0].shape)
        right.append(others[0].color)
    made = cv.data.replace_words(pairs.clean[kept], old, new, model, foils=right)
    assert len(made.answered(model)) >= 10


def test_pictures_are_left_out_where_the_prompt_allows_it() -> None:
    model = llava()
    side = cv.data.question_pairs(3, seed=1).clean
    pairs = cv.data.without_images(side, model)
    assert all(one.image is None and "<image>" not in one.text for one in pairs.corrupt.examples)
    count = int((model.tokens(next(iter(side[:1].batches(model))).inputs)["language"].kind == "patch").sum())
    assert cv.data.text_shift(pairs, model) == [count] * 3
    (batch,) = pairs.batches(model, 3)
    assert batch.other is not None
    tokens, twin = (model.tokens(each)["language"] for each in (batch.inputs, batch.other))
    for row in range(3):
        for position in np.flatnonzero(tokens.kind[row] == "text"):
            assert twin.text[row, batch.maps["language"][row, position]] == tokens.text[row, position]
    assert cv.data.text_shift(cv.data.blank_images(side), model) == [0, 0, 0]
    with pytest.raises(InputError, match="blank_images"):
        cv.data.without_images(Side([picture(0)], [("a", "b")]), cv.organisms.load("shapes-clip"))
    with pytest.raises(InputError, match="Example 0"):
        cv.data.without_images(Side(texts=["USER: red ?"]), model)


@pytest.mark.parametrize("name", ["paligemma", "llava-next-mistral"])
def test_a_processor_that_asks_for_a_picture_is_worked_around(name: str) -> None:
    """The same text tokens stay, seen by one another as before, and a blank picture's tokens are gone."""
    one = case(name)
    model = cv.HookedModel(shared_model(name), one.processor() if one.processor else None)
    raw = one.raw(batch=2) if one.raw else {}
    images = [each[0] if isinstance(each, (list, tuple)) else each for each in raw["images"]]
    side = Side(images, list(raw["text"]))
    pairs = cv.data.without_images(side, model)
    (batch,) = pairs.batches(model, 2)
    assert batch.other is not None
    assert "pixel_values" not in batch.other
    tokens, twin = (model.tokens(each)["language"] for each in (batch.inputs, batch.other))
    for row in range(2):
        here, there = (found.kind[row] == "text" for found in (tokens, twin))
        assert tokens.text[row][here].tolist() == twin.text[row][there].tolist()
        assert batch.maps["language"][row][here].tolist() == np.flatnonzero(there).tolist()
        assert not (twin.kind[row] == "patch").any()
    pictures = int((tokens.kind[0] != "text").sum() - (tokens.kind[0] == "padding").sum())
    assert cv.data.text_shift(pairs, model) == [pictures] * 2
    ids = batch.inputs["input_ids"]
    kept = {
        key: value[:, tokens.kind[0] == "text"] for key, value in batch.inputs.items() if value.shape[:2] == ids.shape
    }
    with torch.no_grad():
        wanted = model({key: value[:1] for key, value in kept.items()})
        found = model(batch.other)[:1, : wanted.shape[1]]
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


def test_a_model_that_acts_needs_its_picture() -> None:
    one = case("pi0")
    model = cv.HookedModel(shared_model("pi0"), one.processor() if one.processor else None)
    side = Side([[picture(0)]], ["pick"], settings={"state": torch.zeros(1, 4)})
    with pytest.raises(InputError):
        cv.data.without_images(side, model)


def test_pairs_keep_the_clean_side_as_it_was() -> None:
    pairs = cv.data.replace_words(SIDE, "circle", "square", llava())
    assert isinstance(pairs, Pairs)
    assert pairs.clean.examples == SIDE.examples
    assert pairs.numbers == SIDE.numbers

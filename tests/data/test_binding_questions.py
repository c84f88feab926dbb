"""Questions, labels and captions of bound scenes: all answers can be read off the pixels, all turns are taken, what cannot be drawn is refused."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from circuitvision.data import binding, captions
from circuitvision.data import binding_questions as questions
from circuitvision.errors import InputError
from tests.data import binding_oracle

RED_CIRCLE = ("red", "circle")


def test_every_answer_can_be_read_off_the_pixels() -> None:
    for subjects, distractors in (
        (binding.ALL_PAIRS, binding.ALL_PAIRS),
        (binding.TEST_PAIRS, binding.TRAIN_PAIRS),
    ):
        for scene, question in questions.sample_questions(256, 5, subjects=subjects, distractors=distractors):
            assert binding_oracle.answer(scene.pixels, question.text) == question.answer, (str(scene), question.text)


def test_all_questions_about_a_scene_are_asked_and_no_other() -> None:
    rng = np.random.default_rng(6)
    for number in range(40):
        scene = binding.sample_scene(rng, count=1 + number % 3, distinct=bool(number % 2))
        asked = questions.questions(scene)
        assert len({question.text for question in asked}) == len(asked)
        for question in asked:
            assert binding_oracle.answer(scene.pixels, question.text) == question.answer
        things = binding_oracle.see(scene.pixels)
        once = [
            [sum(other[name] == thing[name] for other in things) == 1 for name in ("color", "shape")]
            for thing in things
        ]
        relations = sum(
            2 * (binding_oracle.neighbor(things, thing, direction) is not None)
            for thing, both in zip(things, once, strict=True)
            if all(both)
            for direction in binding.DIRECTIONS
        )
        counts = Counter(question.kind for question in asked)
        assert counts["color"] == sum(shape for _, shape in once)
        assert counts["shape"] == sum(color for color, _ in once)
        assert (counts["relation"], counts["count"]) == (relations, 16)


def test_subject_and_holder_are_what_they_are_said_to_be() -> None:
    for scene, question in questions.sample_questions(200, 7):
        if question.holder is None:
            assert question.answer == "zero"
            continue
        assert question.holder in scene.objects
        if question.kind in ("color", "shape"):
            assert question.subject is question.holder
        if question.kind == "relation":
            assert f"{question.subject.color} {question.subject.shape}" in question.text  # type: ignore[union-attr]
        if question.kind != "count":
            assert question.answer in question.holder.pair


@pytest.mark.parametrize("subjects", [binding.TEST_PAIRS, binding.VALIDATION_PAIRS, binding.ALL_PAIRS])
def test_kinds_subjects_roles_and_numbers_take_turns(subjects) -> None:
    asked = questions.sample_questions(4 * 8 * len(subjects), 1, subjects=subjects, distractors=binding.TRAIN_PAIRS)
    kinds = {kind: [(scene, one) for scene, one in asked if one.kind == kind] for kind in questions.KINDS}
    assert {len(some) for some in kinds.values()} == {8 * len(subjects)}
    for kind in ("color", "shape"):
        assert Counter(one.holder.pair for _, one in kinds[kind]) == dict.fromkeys(subjects, 8)  # type: ignore[union-attr]
    if subjects is not binding.ALL_PAIRS:
        # No distractor is held out, so the subject can be told from its neighbour.
        roles = Counter(
            (pair, role)
            for _, one in kinds["relation"]
            for role in ("subject", "holder")
            for pair in [getattr(one, role).pair]
            if pair in subjects
        )
        assert roles == {(pair, role): 4 for pair in subjects for role in ("subject", "holder")}
        numbers = Counter(
            (pair, " objects " in one.text, one.answer)
            for scene, one in kinds["count"]
            for pair in scene.pairs & set(subjects)
        )
        assert numbers == {
            (pair, color, number): 1 for pair in subjects for color in (False, True) for number in questions.NUMBERS
        }
    assert Counter(one.answer for _, one in kinds["count"]) == dict.fromkeys(questions.NUMBERS, 2 * len(subjects))


def test_same_seed_same_questions_other_seed_other_questions() -> None:
    drawn = [[str(scene) + one.text for scene, one in questions.sample_questions(32, seed)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


@pytest.mark.parametrize("kind", questions.KINDS)
@pytest.mark.parametrize("held_out", [False, True])
def test_pairs_flip_the_answer_by_one_change_of_what_holds_it(kind: str, held_out: bool) -> None:
    subjects, distractors = (
        (binding.TEST_PAIRS, binding.TRAIN_PAIRS) if held_out else (binding.ALL_PAIRS, binding.ALL_PAIRS)
    )
    drawn = questions.sample_question_pairs(40, 7, kind=kind, subjects=subjects, distractors=distractors)
    assert len(drawn) == 40
    for pair in drawn:
        assert binding_oracle.answer(pair.clean.pixels, pair.question.text) == pair.answer != pair.foil
        assert binding_oracle.answer(pair.corrupt.pixels, pair.question.text) == pair.foil
        assert pair.prompt == f"USER: <image> {pair.question.text} ASSISTANT:"
        (before,) = set(pair.clean.objects) - set(pair.corrupt.objects)
        (after,) = set(pair.corrupt.objects) - set(pair.clean.objects)
        assert before == pair.question.holder
        assert after.pair in {*subjects, *distractors}
        assert (before.color == after.color) != (before.shape == after.shape)
        if kind != "count":
            assert {pair.answer, pair.foil} <= {*before.pair, *after.pair}
    if kind in ("color", "shape"):
        turns = Counter(pair.question.holder.pair for pair in drawn)  # type: ignore[union-attr]
        assert max(turns.values()) - min(turns[pair] for pair in turns) <= 1 + (len(subjects) < 40)


def test_every_word_is_in_the_vocabulary_once() -> None:
    words = questions.vocabulary()
    assert len(words) == len(set(words))
    rng, said = np.random.default_rng(8), set()
    for _ in range(300):
        for question in questions.questions(binding.sample_scene(rng, pairs=binding.ALL_PAIRS)):
            said |= set(question.prompt.replace("<image>", "").split()) | {question.answer}
    # "three" is the answer where objects repeat.
    assert set(words) - {"three", "two"} <= said <= set(words)


def test_count_scenes_hold_what_is_asked_for() -> None:
    rng = np.random.default_rng(9)
    for attribute in ("color", "shape"):
        for number in (1, 2, 3):
            scene = questions.count_scene(rng, RED_CIRCLE, attribute, number, binding.TRAIN_PAIRS)
            value = RED_CIRCLE[attribute == "shape"]
            assert len(scene.find(**{attribute: value})) == number
            assert RED_CIRCLE in scene.pairs


def test_the_one_large_object_carries_the_label() -> None:
    drawn = questions.sample_large(160, 10, subjects=binding.TEST_PAIRS, distractors=binding.TRAIN_PAIRS)
    winners = Counter()
    for scene, label in drawn:
        things = binding_oracle.see(scene.pixels)
        (winner,) = [thing for thing in things if thing["size"] == "large"]
        assert (winner["shape"], len(things)) == (label, 3)
        winners[winner["color"], winner["shape"]] += 1
        assert len(scene.pairs & set(binding.TEST_PAIRS)) == 1
    assert winners == dict.fromkeys(binding.TEST_PAIRS, 10)


@pytest.mark.parametrize("kinds", [captions.ONE_ATTRIBUTE, captions.NEGATIVE_KINDS])
def test_exactly_one_of_sixteen_captions_is_true(kinds) -> None:
    subjects = {" ".join(pair) for pair in binding.TEST_PAIRS}
    for drawn in captions.sample_retrievals(40, 8, world="binding", kinds=kinds):
        assert len(set(drawn.captions)) == 16
        assert len(drawn.scene.objects) == 3
        true = [binding_oracle.holds(drawn.scene.pixels, caption) for caption in drawn.captions]
        assert true == [index == drawn.answer for index in range(16)]
        truth = drawn.captions[drawn.answer]
        assert any(subject in truth for subject in subjects)
        assert sum(any(subject in caption for caption in drawn.captions) for subject in subjects) >= 4
        assert sum(kind in captions.NEGATIVE_KINDS for kind in drawn.kinds) == 8
        assert {kind for kind in drawn.kinds if kind not in ("true", "other")} <= set(kinds)
        for caption, kind in zip(drawn.captions, drawn.kinds, strict=True):
            differ = [one != other for one, other in zip(truth.split(), caption.split(), strict=True)]
            if kind in captions.ONE_ATTRIBUTE:
                assert sum(differ) == 1
            if kind == "swap":
                assert sorted(truth.split()) == sorted(caption.split())
            assert set(caption.split()) <= set(captions.vocabulary("binding"))


def test_true_captions_of_three_objects_name_any_two() -> None:
    rng = np.random.default_rng(9)
    for _ in range(20):
        scene = binding.sample_scene(rng)
        full = {str(caption) for caption in captions.true_captions(scene, partial=False)}
        assert len(full) == 6
        assert all(binding_oracle.holds(scene.pixels, caption) for caption in full)
        for caption in captions.true_captions(scene, partial=False):
            for kind in captions.NEGATIVE_KINDS:
                made = captions.negative(caption, kind, rng, binding.ALL_PAIRS)
                assert made is not None
                assert made.pairs <= set(binding.ALL_PAIRS)
                assert binding_oracle.holds(scene.pixels, str(made)) == (str(made) in full)


CLASH = [("red", "circle"), ("blue", "square"), ("green", "house")]


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: questions.questions(binding.sample_scene(0), ["colour"]), "color"),
        (lambda: questions.sample_questions(1, 0, kinds=["side"]), "kind"),
        (lambda: questions.sample_questions(1, 0, kinds=[]), "kinds"),
        (lambda: questions.sample_questions(1, 0, subjects=[]), "subjects"),
        (lambda: questions.sample_questions(1, 0, kinds=["color"], distractors=[("red", "cup")] * 3), "cannot be"),
        (
            lambda: questions.sample_questions(8, 0, kinds=["count"], subjects=CLASH[:1], distractors=CLASH[1:]),
            "more pairs",
        ),
        (lambda: questions.sample_question_pairs(1, 0, kind="colour"), "color"),
        # No other pair shares the shape (the colour) of what would change, or the number of those counted.
        *[
            (
                lambda kind=kind: questions.sample_question_pairs(3, 0, kind=kind, subjects=CLASH, distractors=CLASH),
                "more",
            )
            for kind in questions.KINDS
        ],
        (
            lambda: questions.count_scene(np.random.default_rng(0), RED_CIRCLE, "size", 1, binding.ALL_PAIRS),
            "attribute",
        ),
        (lambda: questions.count_scene(np.random.default_rng(0), RED_CIRCLE, "color", 0, binding.ALL_PAIRS), "1 and 3"),
        (lambda: questions.count_scene(np.random.default_rng(0), RED_CIRCLE, "color", 2, CLASH[1:]), "more"),
        (lambda: questions.count_scene(np.random.default_rng(0), RED_CIRCLE, "color", 2, CLASH[:1]), "other"),
        (lambda: questions.sample_large(1, 0, subjects=[]), "subjects"),
        (lambda: questions.sample_large(1, 0, distractors=[]), "cannot be drawn"),
        (lambda: captions.sample_retrievals(1, 0, world="bindings"), "binding"),
        (lambda: captions.sample_retrievals(1, 0, world="binding", kinds=("swap",)), "kinds"),
        (lambda: captions.vocabulary("bindings"), "binding"),
    ],
)
def test_what_cannot_be_drawn_is_refused(attempt, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attempt()


def test_nothing_asked_for_is_nothing_drawn() -> None:
    assert questions.sample_questions(0, 0) == questions.sample_question_pairs(0, 0) == questions.sample_large(0, 0)

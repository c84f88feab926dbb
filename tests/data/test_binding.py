"""Scenes whose objects have to be bound: ground truth of every pixel, minimal pairs, held-out pairs, an oracle that reads every attribute back."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from circuitvision.data import binding, scenes
from circuitvision.errors import InputError
from tests.data import binding_oracle

ATTRIBUTES = ("color", "shape", "quarter", "size", "shift", "cell")


def in_patches(thing: binding.SceneObject) -> np.ndarray:
    """The pixels of an object's four patches."""
    there = np.zeros((binding.IMAGE_SIZE, binding.IMAGE_SIZE), dtype=bool)
    for patch in thing.patches:
        row, column = (binding.PATCH * number for number in divmod(patch, binding.GRID))
        there[row : row + binding.PATCH, column : column + binding.PATCH] = True
    return there


def read(scene: binding.Scene) -> list[dict]:
    return [{name: getattr(thing, name) for name in (*ATTRIBUTES, "patches")} for thing in scene.objects]


def test_the_oracle_reads_every_attribute_of_every_object() -> None:
    # Every drawing there is, each at a place of its own.
    drawings = list(itertools.product(binding.SHAPES, binding.QUARTERS, binding.SIZES, binding.SHIFTS))
    for number, (shape, quarter, size, shift) in enumerate(drawings):
        color = tuple(binding.COLORS)[number % 8]
        row, column = divmod(number % 49, 7)
        scene = binding.Scene((binding.SceneObject(color, shape, quarter, size, row, column, shift),))
        assert binding_oracle.see(scene.pixels) == read(scene), str(scene)


def test_the_oracle_reads_whole_scenes() -> None:
    rng = np.random.default_rng(3)
    for number in range(150):
        scene = binding.sample_scene(rng, count=1 + number % 4, pairs=binding.ALL_PAIRS, distinct=bool(number % 2))
        assert binding_oracle.see(scene.pixels) == read(scene)


def test_masks_cover_exactly_what_is_not_background_and_boxes_frame_them() -> None:
    rng = np.random.default_rng(0)
    for number in range(40):
        scene = binding.sample_scene(rng, count=1 + number % 4)
        assert (scene.masks.sum(0) == (scene.pixels != binding.BACKGROUND).any(-1)).all()
        for thing, mask, (left, top, right, bottom) in zip(scene.objects, scene.masks, scene.boxes, strict=True):
            framed = np.zeros_like(mask)
            framed[top:bottom, left:right] = True
            assert not (mask & ~framed).any()
            assert mask[top].any()
            assert mask[bottom - 1].any()
            assert mask[:, left].any()
            assert mask[:, right - 1].any()
            assert not (mask & ~in_patches(thing)).any()
            colored = (scene.pixels == thing.fill).all(-1) & in_patches(thing)
            assert set(patches_with(colored)) == {thing.wedge_patch}
            black = (scene.pixels == binding.OUTLINE).all(-1) & in_patches(thing)
            assert set(thing.outline_patches) <= set(patches_with(black))
    assert binding.Scene(()).masks.shape == (0, 64, 64)


def patches_with(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask.reshape(8, 8, 8, 8).any((1, 3))).tolist()


def test_the_image_shows_the_pixels_and_notebooks_show_the_image() -> None:
    scene = binding.sample_scene(4)
    assert (np.asarray(scene.image) == scene.pixels).all()
    assert scene.pixels.shape == (64, 64, 3)
    assert scene._repr_png_().startswith(b"\x89PNG")
    assert binding.minimal_pair(scene, 0)._repr_png_().startswith(b"\x89PNG")


@settings(max_examples=80)
@given(seed=st.integers(0, 2**31), attribute=st.sampled_from(ATTRIBUTES), count=st.integers(1, 4))
def test_minimal_pairs_change_one_attribute_and_no_pixel_outside_the_patches(
    seed: int, attribute: str, count: int
) -> None:
    scene = binding.sample_scene(seed, count=count)
    pair = binding.minimal_pair(scene, seed, attribute=attribute)
    assert [name for name in ATTRIBUTES if getattr(pair.before, name) != getattr(pair.after, name)] == [attribute]
    assert set(pair.clean.objects) - set(pair.corrupt.objects) == {pair.before}
    assert set(pair.corrupt.objects) - set(pair.clean.objects) == {pair.after}
    changed = (pair.clean.pixels != pair.corrupt.pixels).any(-1)
    assert changed.any()
    assert not (changed & ~in_patches(pair.before) & ~in_patches(pair.after)).any()
    seen = [binding_oracle.see(side.pixels) for side in (pair.clean, pair.corrupt)]
    assert seen == [read(pair.clean), read(pair.corrupt)]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**31))
def test_a_new_color_changes_one_patch_and_a_new_shape_the_others(seed: int) -> None:
    scene = binding.sample_scene(seed)
    for attribute in ("color", "shape"):
        pair = binding.minimal_pair(scene, seed, attribute=attribute)
        changed = set(patches_with((pair.clean.pixels != pair.corrupt.pixels).any(-1)))
        if attribute == "color":
            assert changed == {pair.before.wedge_patch}
        else:
            assert changed <= set(pair.before.outline_patches)


def test_minimal_pair_takes_what_is_asked_for() -> None:
    scene = binding.Scene(
        (
            binding.SceneObject("red", "circle", "top left", "large", 0, 0),
            binding.SceneObject("blue", "cup", "top right", "small", 4, 5),
        )
    )
    pair = binding.minimal_pair(scene, 0, attribute="color", index=0, to="green")
    assert pair.after == replace(scene.objects[0], color="green")
    assert pair == binding.minimal_pair(scene, 0, attribute="color", index=0, to="green")
    assert binding.minimal_pair(scene, 0, attribute="cell", index=1, to=(2, 0)).after.cell == (2, 0)
    for seed in range(20):
        assert binding.minimal_pair(scene, seed, index=0, distinct=True).after.color != "blue"
        assert binding.minimal_pair(scene, seed, index=0, pairs=binding.TRAIN_PAIRS).after.pair in binding.TRAIN_PAIRS
    with pytest.raises(InputError, match="cell"):
        binding.minimal_pair(scene, 0, attribute="cell", index=1, to=(1, 1))


def test_sixty_four_pairs_split_three_ways() -> None:
    groups = [set(binding.TEST_PAIRS), set(binding.VALIDATION_PAIRS), set(binding.TRAIN_PAIRS)]
    assert [len(group) for group in groups] == [16, 8, 40]
    assert len(set.union(*groups)) == len(binding.ALL_PAIRS) == 64
    for which, names in ((0, binding.COLORS), (1, binding.SHAPES)):
        for name in names:
            assert [sum(pair[which] == name for pair in group) for group in groups] == [2, 1, 5]


def test_each_half_belongs_to_two_shapes_at_least() -> None:
    assert len(set(binding.HALVES.values())) == 8
    for which in (0, 1):
        halves = [halves[which] for halves in binding.HALVES.values()]
        assert all(halves.count(half) >= 2 for half in ("arc", "corner", "slope"))


def test_held_out_pairs_never_appear_unless_asked_for() -> None:
    rng = np.random.default_rng(2)
    seen = set()
    for number in range(400):
        seen |= binding.sample_scene(rng, distinct=bool(number % 2)).pairs
    assert seen == set(binding.TRAIN_PAIRS)
    scene = binding.sample_scene(rng, subjects=binding.TEST_PAIRS[:1])
    assert len(scene.pairs & set(binding.TEST_PAIRS)) == 1


def test_scenes_are_seeded_and_distinct_where_promised() -> None:
    assert str(binding.sample_scene(1)) == str(binding.sample_scene(1)) != str(binding.sample_scene(2))
    rng = np.random.default_rng(1)
    for _ in range(50):
        scene = binding.sample_scene(rng, subjects=(("red", "circle"),))
        assert len({thing.color for thing in scene.objects}) == len({thing.shape for thing in scene.objects}) == 3
        assert ("red", "circle") in scene.pairs
    repeats = [binding.sample_scene(rng, distinct=False) for _ in range(50)]
    assert any(len({thing.color for thing in scene.objects}) < 3 for scene in repeats)


def test_places_sizes_quarters_and_shifts_are_all_drawn() -> None:
    rng = np.random.default_rng(5)
    things = [thing for _ in range(400) for thing in binding.sample_scene(rng).objects]
    for name, number in (("cell", 49), ("size", 2), ("quarter", 4), ("shift", 9)):
        assert len({getattr(thing, name) for thing in things}) == number


def test_neighbors_are_those_of_brute_force() -> None:
    rng, found = np.random.default_rng(6), 0
    for number in range(200):
        scene = binding.sample_scene(rng, count=2 + number % 4)
        things = binding_oracle.see(scene.pixels)
        for thing, seen in zip(scene.objects, things, strict=True):
            for direction in binding.DIRECTIONS:
                mine, known = scene.neighbor(thing, direction), binding_oracle.neighbor(things, seen, direction)
                assert (mine and mine.cell) == (known and known["cell"])
                found += mine is not None
    assert found > 500


def test_a_neighbor_by_hand() -> None:
    here, near, far, beside = (
        binding.SceneObject(color, shape, "top left", "small", row, column)
        for color, shape, row, column in (
            ("red", "circle", 3, 0),
            ("blue", "cup", 0, 2),
            ("green", "house", 6, 4),
            ("white", "arch", 4, 3),
        )
    )
    scene = binding.Scene((here, near, far))
    assert scene.neighbor(here, "right") == near
    assert scene.neighbor(far, "left") == near
    assert scene.neighbor(here, "left") is None
    assert scene.neighbor(here, "above") == near
    # 2 and 3 columns: neither is wholly beyond the other.
    assert binding.Scene((here, near, beside)).neighbor(here, "right") is None


@pytest.mark.parametrize(
    ("attempt", "message"),
    [
        (lambda: binding.SceneObject("reed", "circle", "top left", "large", 0, 0), "red"),
        (lambda: binding.SceneObject("red", "cross", "top left", "large", 0, 0), "shape"),
        (lambda: binding.SceneObject("red", "circle", "left", "large", 0, 0), "quarter"),
        (lambda: binding.SceneObject("red", "circle", "top left", "medium", 0, 0), "size"),
        (lambda: binding.SceneObject("red", "circle", "top left", "large", 0, 7), "0 to 6"),
        (lambda: binding.SceneObject("red", "circle", "top left", "large", 0, 0, (2, 0)), "shift"),
        (
            lambda: binding.Scene(
                tuple(binding.SceneObject("red", "circle", "top left", "large", row, 1) for row in (0, 1))
            ),
            "share a patch",
        ),
        (lambda: binding.sample_scene(0, count=0), "between 1"),
        (lambda: binding.sample_scene(0, count=17), "between 1"),
        (lambda: binding.sample_scene(0, count=16, distinct=False), "no room"),
        (lambda: binding.sample_scene(0, count=9), "cannot be drawn"),
        (lambda: binding.sample_scene(0, count=1, subjects=binding.TEST_PAIRS[:2]), "subjects"),
        (lambda: binding.sample_scene(0, pairs=()), "cannot be drawn"),
        (lambda: binding.sample_scene(0, pairs=[("red", "circle"), ("red", "cup")]), "cannot be drawn"),
        (lambda: binding.sample_scene(0, subjects=[("red", "circle"), ("red", "cup")]), "share a colour or a shape"),
        (lambda: binding.sample_scene(0, subjects=[("red", "cup"), ("blue", "cup")]), "share a colour or a shape"),
        (lambda: binding.sample_scene(0).neighbor(binding.sample_scene(0).objects[0], "over"), "direction"),
        (lambda: binding.minimal_pair(binding.sample_scene(0), 0, attribute="hue"), "nearest"),
        (lambda: binding.minimal_pair(binding.sample_scene(0), 0, index=9), "does not exist"),
        (lambda: binding.minimal_pair(binding.sample_scene(0), 0, to="mauve"), "mauve"),
    ],
)
def test_mistakes_are_named(attempt, message: str) -> None:
    with pytest.raises(InputError, match=message):
        attempt()


def test_subjects_may_share_a_color_where_scenes_need_not_be_distinct() -> None:
    scene = binding.sample_scene(0, subjects=[("red", "circle"), ("red", "cup")], distinct=False)
    assert len(scene.find(color="red")) >= 2
    assert scenes.COLORS is binding.COLORS


def test_what_has_no_name_cannot_be_taken_for_what_has_one() -> None:
    rng = np.random.default_rng(11)
    known = [*binding.COLORS.values(), (128, 128, 128), (0, 0, 0)]
    named = [(upper, upper, lower, lower) for upper, lower in binding.HALVES.values()]
    for seed in range(300):
        thing = binding.unname(binding.sample_scene(seed, count=1).objects[0], rng)
        seen = [number for number, quarter in enumerate(binding.QUARTERS) if quarter != thing.quarter]
        assert not any(all(thing.kinds[number] == kinds[number] for number in seen) for kinds in named)
        assert min(np.hypot.reduce(np.subtract(thing.fill, other)) for other in known) > 60
        again = binding.minimal_pair(binding.Scene((thing,)), rng, attribute="color")
        assert (again.after.paint, again.after.outline) == (None, thing.outline)

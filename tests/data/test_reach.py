"""The reaching world: everything can be read off the pixels, pairs differ in one thing, splits are disjoint, episodes
keep the rules.
"""

from __future__ import annotations

import numpy as np
import pytest

from circuitvision.data import reach
from circuitvision.errors import InputError


def read_off(image: np.ndarray, board: reach.Board) -> tuple[dict[str, tuple[int, int]], list[tuple[int, int]]]:
    """Objects (colour to cell) and gripper cells of one image, from its pixels alone."""
    names = {rgb: name for name, rgb in reach.COLORS.items()}
    objects, grippers = {}, []
    for row in range(board.size):
        for column in range(board.size):
            left, top, right, bottom = board.box((row, column))
            patch = image[top:bottom, left:right]
            middle = {tuple(int(value) for value in pixel) for pixel in patch[1:-1, 1:-1].reshape(-1, 3)}
            assert len(middle) == 1, "the inside of a cell has one colour"
            inside = middle.pop()
            if inside in names:
                assert names[inside] not in objects, "one object per colour"
                objects[names[inside]] = (row, column)
            else:
                assert inside == reach.BACKGROUND
            corners = patch[[0, 0, -1, -1], [0, -1, 0, -1]]
            if (corners == reach.GRIPPER).all():
                grippers.append((row, column))
    return objects, grippers


@pytest.mark.parametrize(
    "board", [reach.Board(), reach.Board(size=5, cell_pixels=3, n_objects=2), reach.Board(6, 8, 4)]
)
def test_every_attribute_can_be_read_off_the_pixels(board: reach.Board) -> None:
    scenes = reach.sample_scenes(200, seed=1, split=None, board=board)
    images = scenes.images()
    assert images.shape == (200, board.image_size, board.image_size, 3)
    assert images.dtype == np.uint8
    covered = 0
    for index in range(len(scenes)):
        scene = scenes.scene(index)
        objects, grippers = read_off(images[index], board)
        assert objects == {thing.color: thing.cell for thing in scene.objects}
        assert grippers == [scene.gripper_cell]
        covered += scene.gripper_cell in objects.values()
        # The right action follows from what the pixels and the instruction say.
        goal = np.array(objects[scene.instruction.removeprefix("reach ")])
        assert (np.sign(goal - np.array(grippers[0])) == scenes.expert()[index, 0]).all()
        assert scene.goal.cell == tuple(goal)
        np.testing.assert_array_equal(scene.image, images[index])
    assert covered > 5, "the sample must hold grippers that stand on an object"


def test_boxes_enclose_exactly_the_pixels_of_their_object() -> None:
    scene = reach.sample_scenes(1, seed=5).scene(0)
    for thing in scene.objects:
        left, top, right, bottom = thing.box
        mask = np.zeros(scene.image.shape[:2], dtype=bool)
        mask[top:bottom, left:right] = True
        coloured = (scene.image == np.array(reach.COLORS[thing.color], dtype=np.uint8)).all(-1)
        white = (scene.image == np.array(reach.GRIPPER, dtype=np.uint8)).all(-1)
        assert (coloured <= mask).all()
        assert (mask <= (coloured | white)).all()


def test_the_expert_reaches_every_goal_and_stays() -> None:
    scenes = reach.sample_starts(300, seed=2)
    assert not scenes.at_goal().any()
    board = scenes.board
    distance = np.abs(scenes.goal_cells() - scenes.gripper).max(axis=1)
    for chunk in (1, 2, 3):
        episodes = reach.run_episodes(reach.expert_policy(chunk), scenes, horizon=board.size)
        assert episodes.success_rate == 1.0
        on_goal = (episodes.path == scenes.goal_cells()[:, None]).all(-1)
        np.testing.assert_array_equal(on_goal.argmax(axis=1), distance)


def test_a_random_policy_fails_and_passing_over_the_goal_is_not_success() -> None:
    episodes = reach.run_episodes(reach.random_policy(0), reach.sample_starts(2000, seed=3))
    assert 0.0 < episodes.success_rate < 0.1
    assert episodes.touched.mean() > episodes.success_rate
    assert episodes.path.shape == (2000, 9, 2)
    assert episodes.path.min() == 0
    assert episodes.path.max() == episodes.start.board.size - 1


def test_the_same_seed_gives_the_same_scenes() -> None:
    first, second, other = (reach.sample_scenes(50, seed=seed) for seed in (7, 7, 8))
    np.testing.assert_array_equal(first.images(), second.images())
    assert first.instructions() == second.instructions()
    assert (first.images() != other.images()).any()


def test_splits_share_no_layout_and_every_layout_has_one() -> None:
    seen: dict[frozenset, str] = {}
    for split in reach.SPLITS:
        scenes = reach.sample_scenes(3000, seed=11, split=split)
        assert set(scenes.splits()) == {split}
        for colors, cells in zip(scenes.colors, scenes.cells, strict=True):
            layout = frozenset((int(color), *map(int, cell)) for color, cell in zip(colors, cells, strict=True))
            assert seen.setdefault(layout, split) == split
    shares = np.unique(reach.sample_scenes(20_000, seed=12, split=None).splits(), return_counts=True)
    assert dict(zip(*shares, strict=True))["train"] == pytest.approx(16_000, rel=0.03)


def test_the_split_does_not_depend_on_the_order_of_objects_gripper_or_goal() -> None:
    scenes = reach.sample_scenes(200, seed=4, split="test")
    turned = reach.ReachScenes(
        scenes.board,
        scenes.colors[:, ::-1],
        scenes.cells[:, ::-1],
        (scenes.gripper + 1) % scenes.board.size,
        scenes.colors[:, 0],
    )
    assert set(turned.splits()) == {"test"}


@pytest.mark.parametrize("change", reach.CHANGES)
def test_a_minimal_pair_differs_in_exactly_one_thing(change: str) -> None:
    scenes = reach.sample_scenes(300, seed=6, split=None)
    changed = reach.minimal_pairs(scenes, change, seed=1)
    differs = {
        "goal": scenes.goal != changed.goal,
        "gripper": (scenes.gripper != changed.gripper).any(axis=1),
        "object_cell": (scenes.cells != changed.cells).any(axis=2).sum(axis=1),
        "object_color": (scenes.colors != changed.colors).sum(axis=1),
    }
    for name, difference in differs.items():
        assert (difference == (1 if name == change else 0)).all(), name
    pixels = (scenes.images() != changed.images()).any(axis=(1, 2, 3))
    assert (pixels == (change != "goal")).all()
    places = changed.cells[..., 0] * changed.board.size + changed.cells[..., 1]
    assert all(len(set(row)) == 3 for row in places.tolist())
    assert all(len(set(row)) == 3 for row in changed.colors.tolist())
    if change == "object_color":
        np.testing.assert_array_equal(scenes.expert(4), changed.expert(4))


@pytest.mark.parametrize("change", ["goal", "object_cell", "gripper"])
def test_contrast_pairs_change_the_right_action(change: str) -> None:
    clean, corrupt = reach.contrast_pairs(100, seed=9, change=change)
    assert len(clean) == len(corrupt) == 100
    assert (clean.expert() != corrupt.expert()).any(axis=(1, 2)).all()
    assert set(clean.splits()) == set(corrupt.splits()) == {"test"}


def test_bad_input_is_refused_with_the_fix() -> None:
    with pytest.raises(InputError, match="nearest: test"):
        reach.sample_scenes(1, seed=0, split="tset")
    with pytest.raises(InputError, match="nearest: object_cell"):
        reach.minimal_pairs(reach.sample_scenes(1, seed=0), "objectcell")
    with pytest.raises(InputError, match="minimal_pairs"):
        reach.contrast_pairs(1, seed=0, change="object_color")
    with pytest.raises(InputError, match="every colour"):
        reach.minimal_pairs(reach.sample_scenes(1, seed=0, board=reach.Board(n_objects=4)), "object_color")
    with pytest.raises(InputError, match="n_objects"):
        reach.Board(n_objects=7)
    scenes = reach.sample_scenes(2, seed=0)
    with pytest.raises(InputError, match="instruction names"):
        reach.ReachScenes(scenes.board, scenes.colors, scenes.cells, scenes.gripper, np.array([99, 99]))
    with pytest.raises(InputError, match="scene chunk 2"):
        reach.run_episodes(lambda batch: np.zeros((2, 2), dtype=int), scenes)
    with pytest.raises(InputError, match="round them"):
        reach.run_episodes(lambda batch: np.zeros((2, 1, 2)), scenes)

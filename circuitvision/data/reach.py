"""A grid world for language-conditioned reaching: coloured objects, a gripper, and "reach <colour>", in pixels.

A scene is a board of ``size`` x ``size`` cells. Each object fills one cell with its colour, no two share a cell or a
colour, and the gripper is drawn as the four white corners of its cell, so it never hides what it stands on: every
attribute can be read off the pixels. One cell is ``cell_pixels`` pixels wide; a model whose patch has that size sees
one cell per patch. An action is one step of at most one cell down or up and at most one right or left, and the board's
edge stops the gripper.

Everything is vectorised over scenes: :class:`ReachScenes` holds arrays with the scene axis first, and
:meth:`ReachScenes.scene` shows one of them as plain objects with their pixel boxes. :func:`minimal_pairs` changes
exactly one thing; :func:`contrast_pairs` keeps those pairs in which the right action changes. The layouts (which
colours stand where) are divided into disjoint splits by a hash, so no layout of the test episodes is met in training,
whatever the seeds.

Not covered: continuous positions, grasping, obstacles, more than one camera.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from jaxtyping import Bool, Int, UInt8

from circuitvision.errors import InputError, checked_seed, nearest

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 220),
    "yellow": (230, 210, 50),
}
COLOR_NAMES: tuple[str, ...] = tuple(COLORS)
BACKGROUND: tuple[int, int, int] = (70, 70, 70)
GRIPPER: tuple[int, int, int] = (255, 255, 255)

CHANGES: tuple[str, ...] = ("goal", "object_cell", "object_color", "gripper")
SPLITS: dict[str, range] = {"train": range(0, 8), "validation": range(8, 9), "test": range(9, 10)}
_BUCKETS = 10

Policy = Callable[["ReachScenes"], Int[np.ndarray, "scene chunk 2"]]


@dataclass(frozen=True)
class Board:
    """The size of the world: cells per side, pixels per cell, objects per scene."""

    size: int = 4
    cell_pixels: int = 4
    n_objects: int = 3

    def __post_init__(self) -> None:
        if self.size < 2 or self.cell_pixels < 3:
            raise InputError(f"a board needs size >= 2 and cell_pixels >= 3, not {self.size} and {self.cell_pixels}")
        if not 2 <= self.n_objects <= min(len(COLORS), self.size**2 - 1):
            raise InputError(
                f"n_objects must lie between 2 and {min(len(COLORS), self.size**2 - 1)}, not {self.n_objects}"
            )

    @property
    def image_size(self) -> int:
        """Pixels per side of the image."""
        return self.size * self.cell_pixels

    def box(self, cell: tuple[int, int]) -> tuple[int, int, int, int]:
        """The pixels of a (row, column) cell as (left, top, right, bottom); right and bottom are exclusive."""
        row, column = cell
        width = self.cell_pixels
        return column * width, row * width, (column + 1) * width, (row + 1) * width


@dataclass(frozen=True)
class ReachObject:
    """One object: colour name, (row, column) cell, image patch and pixel box.

    ``patch`` is the index of the cell in reading order: the image patch that holds it, where a patch has the size of a
    cell. The box is (left, top, right, bottom), right and bottom exclusive.
    """

    color: str
    cell: tuple[int, int]
    patch: int
    box: tuple[int, int, int, int]


@dataclass(frozen=True)
class ReachScene:
    """One scene in plain terms, with its image."""

    image: UInt8[np.ndarray, "height width 3"]
    instruction: str
    objects: tuple[ReachObject, ...]
    goal: ReachObject
    gripper_cell: tuple[int, int]
    gripper_box: tuple[int, int, int, int]


@dataclass(frozen=True)
class ReachScenes:
    """Many scenes as arrays.

    Attributes:
        board: size of the world, the same for all.
        colors: index into :data:`COLOR_NAMES` of each object.
        cells: (row, column) of each object.
        gripper: (row, column) of the gripper.
        goal: index into :data:`COLOR_NAMES` of the colour that the instruction names.
    """

    board: Board
    colors: Int[np.ndarray, "scene object"]
    cells: Int[np.ndarray, "scene object 2"]
    gripper: Int[np.ndarray, "scene 2"]
    goal: Int[np.ndarray, " scene"]

    def __post_init__(self) -> None:
        count, objects = self.colors.shape
        if self.cells.shape != (count, objects, 2) or self.gripper.shape != (count, 2) or self.goal.shape != (count,):
            raise InputError(
                f"arrays disagree: colors {self.colors.shape}, cells {self.cells.shape}, gripper {self.gripper.shape}, "
                f"goal {self.goal.shape}; expected [scene object], [scene object 2], [scene 2], [scene]"
            )
        if not (self.colors == self.goal[:, None]).any(axis=1).all():
            raise InputError("every scene must hold an object of the colour that its instruction names")

    def __len__(self) -> int:
        return len(self.goal)

    def __getitem__(self, index: slice | np.ndarray | list[int]) -> ReachScenes:
        """The scenes at a slice, a list of indices or a boolean mask (one scene: :meth:`scene`)."""
        return ReachScenes(self.board, self.colors[index], self.cells[index], self.gripper[index], self.goal[index])

    def instructions(self) -> list[str]:
        """The instruction of every scene, ``"reach <colour>"``."""
        return [f"reach {COLOR_NAMES[color]}" for color in self.goal]

    def goal_slots(self) -> Int[np.ndarray, " scene"]:
        """Which object (index along the object axis) the instruction names."""
        return (self.colors == self.goal[:, None]).argmax(axis=1)

    def goal_cells(self) -> Int[np.ndarray, "scene 2"]:
        """The (row, column) of the object that the instruction names."""
        return self.cells[np.arange(len(self)), self.goal_slots()]

    def at_goal(self) -> Bool[np.ndarray, " scene"]:
        """Whether the gripper stands on the goal's cell."""
        return (self.gripper == self.goal_cells()).all(axis=1)

    def expert(self, steps: int = 1) -> Int[np.ndarray, "scene steps 2"]:
        """The shortest way: (row step, column step) in {-1, 0, 1} for the next ``steps`` steps, zero once there.

        Each step is ``sign(goal - gripper)`` per axis, so the first moves are diagonal while both axes differ.
        """
        remaining = self.goal_cells() - self.gripper
        actions = np.zeros((len(self), steps, 2), dtype=np.int64)
        for step in range(steps):
            actions[:, step] = np.sign(remaining)
            remaining = remaining - actions[:, step]
        return actions

    def move(self, action: Int[np.ndarray, "scene 2"]) -> ReachScenes:
        """The scenes after one step; actions are clipped to one cell per axis, and the gripper stops at the edge."""
        step = np.clip(np.asarray(action), -1, 1).astype(np.int64)
        return replace(self, gripper=np.clip(self.gripper + step, 0, self.board.size - 1))

    def images(self) -> UInt8[np.ndarray, "scene height width 3"]:
        """The scenes in pixels: filled cells for objects, four white corners for the gripper."""
        count, size, width = len(self), self.board.size, self.board.cell_pixels
        palette = np.array(list(COLORS.values()), dtype=np.uint8)
        # One block of pixels per cell, then the cell axes are folded into the picture's.
        blocks = np.empty((count, size, size, width, width, 3), dtype=np.uint8)
        blocks[...] = BACKGROUND
        rows = np.arange(count)
        for slot in range(self.colors.shape[1]):
            row, column = self.cells[:, slot].T
            blocks[rows, row, column] = palette[self.colors[:, slot]][:, None, None]
        row, column = self.gripper.T
        for corner_row in (0, width - 1):
            for corner_column in (0, width - 1):
                blocks[rows, row, column, corner_row, corner_column] = GRIPPER
        return blocks.transpose(0, 1, 3, 2, 4, 5).reshape(count, size * width, size * width, 3)

    def scene(self, index: int) -> ReachScene:
        """One scene in plain terms: every object's colour, cell and box, the gripper, the instruction, the image."""
        one = self[[index]]
        objects = tuple(
            ReachObject(
                COLOR_NAMES[color], (row, column), row * self.board.size + column, self.board.box((row, column))
            )
            for color, (row, column) in zip(one.colors[0].tolist(), one.cells[0].tolist(), strict=True)
        )
        gripper = (int(one.gripper[0, 0]), int(one.gripper[0, 1]))
        return ReachScene(
            image=one.images()[0],
            instruction=one.instructions()[0],
            objects=objects,
            goal=objects[int(one.goal_slots()[0])],
            gripper_cell=gripper,
            gripper_box=self.board.box(gripper),
        )

    def splits(self) -> list[str]:
        """The split that the layout of every scene belongs to: ``"train"``, ``"validation"`` or ``"test"``."""
        buckets = _layout_buckets(self)
        return [next(name for name, own in SPLITS.items() if bucket in own) for bucket in buckets]


def _layout_buckets(scenes: ReachScenes) -> Int[np.ndarray, " scene"]:
    """A number below ``_BUCKETS`` that depends on which colours stand in which cells, and on nothing else."""
    size = scenes.board.size
    place = scenes.cells[..., 0] * size + scenes.cells[..., 1]
    code = (place * len(COLORS) + scenes.colors + 1).astype(np.uint64)
    # A multiplicative hash per object, summed, so the order of the objects does not count (arithmetic wraps at 2^64 on
    # purpose).
    mixed = (code * np.uint64(0x9E3779B97F4A7C15)) ^ (code << np.uint64(29))
    mixed = (mixed ^ (mixed >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    total = mixed.sum(axis=1, dtype=np.uint64)
    return ((total >> np.uint64(33)) % np.uint64(_BUCKETS)).astype(np.int64)


def _check_split(split: str | None) -> None:
    if split is not None and split not in SPLITS:
        raise InputError(
            f"no split is called {split!r}; nearest: {', '.join(nearest(split, SPLITS))} (or None for all layouts)"
        )


def _in_split(scenes: ReachScenes, split: str | None) -> Bool[np.ndarray, " scene"]:
    if split is None:
        return np.ones(len(scenes), dtype=bool)
    return np.isin(_layout_buckets(scenes), list(SPLITS[split]))


def concatenate(parts: list[ReachScenes]) -> ReachScenes:
    """Several sets of scenes on the same board as one.

    Raises:
        InputError: the list is empty, or the boards differ.
    """
    if not parts or any(part.board != parts[0].board for part in parts):
        raise InputError("give at least one set of scenes, all on the same board")
    fields = ("colors", "cells", "gripper", "goal")
    return ReachScenes(parts[0].board, *(np.concatenate([getattr(part, field) for part in parts]) for field in fields))


def sample_scenes(
    count: int, seed: int | np.random.Generator, split: str | None = "train", board: Board | None = None
) -> ReachScenes:
    """Random scenes: distinct colours in distinct cells, gripper anywhere, any object as the goal.

    Args:
        count: how many.
        seed: a number, or a generator to go on drawing from.
        split: layouts of this split only; None for all.
        board: size of the world.

    Raises:
        InputError: an unknown split, or a negative count.
    """
    _check_split(split)
    if count < 0:
        raise InputError(f"count must not be negative, got {count}")
    board = board or Board()
    generator = np.random.default_rng(checked_seed(seed))
    kept: list[ReachScenes] = [_draw(0, generator, board)]
    missing = count
    while missing > 0:
        drawn = _draw(max(64, 2 * missing), generator, board)
        drawn = drawn[_in_split(drawn, split)][:missing]
        kept.append(drawn)
        missing -= len(drawn)
    return concatenate(kept)


def _draw(count: int, generator: np.random.Generator, board: Board) -> ReachScenes:
    """Scenes of all splits."""
    objects = board.n_objects
    colors = generator.random((count, len(COLORS))).argsort(axis=1)[:, :objects]
    places = generator.random((count, board.size**2)).argsort(axis=1)[:, :objects]
    cells = np.stack(np.divmod(places, board.size), axis=-1)
    gripper = generator.integers(0, board.size, size=(count, 2))
    slot = generator.integers(0, objects, size=count)
    return ReachScenes(board, colors, cells, gripper, colors[np.arange(count), slot])


def minimal_pairs(scenes: ReachScenes, change: str, seed: int | np.random.Generator = 0) -> ReachScenes:
    """The same scenes with exactly one thing changed in each; everything else is left as it is.

    ``"goal"``: the instruction names another object of the scene. ``"object_cell"``: the goal object moves to a free
    cell. ``"object_color"``: an object that is not the goal takes a colour the scene does not have. ``"gripper"``: the
    gripper stands in another cell.

    Raises:
        InputError: an unknown change, or no colour is left for a change of colour.
    """
    if change not in CHANGES:
        raise InputError(f"no change is called {change!r}; nearest: {', '.join(nearest(change, CHANGES))}")
    generator = np.random.default_rng(checked_seed(seed))
    count, objects = scenes.colors.shape
    size = scenes.board.size
    rows = np.arange(count)
    slot = scenes.goal_slots()
    other = (slot + generator.integers(1, objects, size=count)) % objects
    if change == "goal":
        return replace(scenes, goal=scenes.colors[rows, other])
    if change == "gripper":
        place = scenes.gripper[:, 0] * size + scenes.gripper[:, 1]
        place = (place + generator.integers(1, size**2, size=count)) % size**2
        return replace(scenes, gripper=np.stack(np.divmod(place, size), axis=-1))
    if change == "object_cell":
        rank = generator.random((count, size**2))
        taken = scenes.cells[..., 0] * size + scenes.cells[..., 1]
        np.put_along_axis(rank, taken, -1.0, axis=1)
        cells = scenes.cells.copy()
        cells[rows, slot] = np.stack(np.divmod(rank.argmax(axis=1), size), axis=-1)
        return replace(scenes, cells=cells)
    if objects >= len(COLORS):
        raise InputError(
            "every colour is in the scene already; an object can only change its colour on a board with fewer objects"
        )
    rank = generator.random((count, len(COLORS)))
    np.put_along_axis(rank, scenes.colors, -1.0, axis=1)
    colors = scenes.colors.copy()
    colors[rows, other] = rank.argmax(axis=1)
    return replace(scenes, colors=colors)


def prompts(scenes: ReachScenes, seed: int | np.random.Generator = 0) -> dict[str, list[str]]:
    """What one might say of each scene in place of its instruction: prompt conditions for a policy that may not listen.

    ``"right"`` names the goal, ``"empty"`` nothing, ``"negated"`` is "reach not <goal>", ``"other object"`` names another object of the scene (that
    of ``minimal_pairs(scenes, "goal", seed)``) and ``"absent object"`` a colour that no object has (left out where every colour is there).
    """
    found = {
        "right": scenes.instructions(),
        "empty": [""] * len(scenes),
        "negated": [f"reach not {COLOR_NAMES[color]}" for color in scenes.goal],
        "other object": minimal_pairs(scenes, "goal", seed).instructions(),
    }
    if scenes.board.n_objects < len(COLORS):
        absent = [next(color for color in range(len(COLORS)) if color not in own) for own in scenes.colors.tolist()]
        found["absent object"] = [f"reach {COLOR_NAMES[color]}" for color in absent]
    return found


def contrast_pairs(
    count: int, seed: int, change: str = "goal", split: str | None = "test", board: Board | None = None
) -> tuple[ReachScenes, ReachScenes]:
    """``count`` minimal pairs (clean, corrupt) in which the right first action differs, both layouts in ``split``.

    With ``change="goal"`` the two images are equal and one word differs: the pairs for causal tracing of the
    instruction.

    Raises:
        InputError: an unknown change or split; or ``"object_color"``, which never changes the right action (use
            :func:`minimal_pairs` for that control).
    """
    if change == "object_color":
        raise InputError(
            "the colour of another object never changes the right action; minimal_pairs makes that control"
        )
    if change not in CHANGES:
        raise InputError(f"no change is called {change!r}; nearest: {', '.join(nearest(change, CHANGES))}")
    generator = np.random.default_rng(checked_seed(seed))
    clean: list[ReachScenes] = [sample_scenes(0, generator, split, board)]
    corrupt: list[ReachScenes] = list(clean)
    missing = count
    while missing > 0:
        first = sample_scenes(2 * missing + 16, generator, split, board)
        second = minimal_pairs(first, change, generator)
        keep = (first.expert() != second.expert()).any(axis=(1, 2)) & _in_split(second, split)
        clean.append(first[keep][:missing])
        corrupt.append(second[keep][:missing])
        missing -= len(clean[-1])
    return concatenate(clean), concatenate(corrupt)


def sample_starts(count: int, seed: int, split: str | None = "test", board: Board | None = None) -> ReachScenes:
    """Random first scenes of ``count`` episodes: as :func:`sample_scenes`, with the gripper away from its goal.

    Raises:
        InputError: an unknown split, or a negative count.
    """
    generator = np.random.default_rng(checked_seed(seed))
    kept = [sample_scenes(0, generator, split, board)]
    while sum(map(len, kept)) < count:
        drawn = sample_scenes(count, generator, split, board)
        kept.append(drawn[~drawn.at_goal()])
    return concatenate(kept)[:count]


@dataclass(frozen=True)
class Episodes:
    """What happened in a set of closed-loop episodes.

    Attributes:
        start: the first scene of every episode.
        path: the gripper's cell before the first step and after each step.
        success: the gripper rests on the goal when the episode ends (passing over it is not enough).
        touched: the gripper was on the goal at some time after the first step.
    """

    start: ReachScenes
    path: Int[np.ndarray, "episode time 2"]
    success: Bool[np.ndarray, " episode"]
    touched: Bool[np.ndarray, " episode"]

    @property
    def success_rate(self) -> float:
        """Fraction of episodes that end on the goal."""
        return float(self.success.mean())


def run_episodes(policy: Policy, start: ReachScenes, horizon: int = 8) -> Episodes:
    """Run ``policy`` in closed loop: it sees the scenes, its whole chunk is carried out, it sees the scenes again.

    Args:
        policy: scenes to (row step, column step) for the next steps, ``[scene chunk 2]``; rounded to whole cells by the
            caller.
        start: one scene per episode.
        horizon: steps per episode; a chunk that would go beyond it is cut.

    Raises:
        InputError: the policy returns another shape, or something else than whole numbers.
    """
    scenes, path, touched = start, [start.gripper], np.zeros(len(start), dtype=bool)
    while len(path) <= horizon:
        actions = np.asarray(policy(scenes))
        if actions.ndim != 3 or actions.shape[0] != len(start) or actions.shape[2] != 2 or actions.shape[1] < 1:
            raise InputError(f"a policy returns [scene chunk 2] with {len(start)} scenes, not {actions.shape}")
        if not np.issubdtype(actions.dtype, np.integer):
            raise InputError(f"a policy returns whole steps, not {actions.dtype}; round them first")
        for step in range(min(actions.shape[1], horizon + 1 - len(path))):
            scenes = scenes.move(actions[:, step])
            path.append(scenes.gripper)
            touched |= scenes.at_goal()
    return Episodes(start, np.stack(path, axis=1), scenes.at_goal(), touched)


def random_policy(seed: int, chunk: int = 2) -> Policy:
    """The control: every step drawn uniformly from the nine possible ones."""
    generator = np.random.default_rng(checked_seed(seed))
    return lambda scenes: generator.integers(-1, 2, size=(len(scenes), chunk, 2))


def expert_policy(chunk: int = 2) -> Policy:
    """The ceiling: the shortest way to the goal."""
    return lambda scenes: scenes.expert(chunk)

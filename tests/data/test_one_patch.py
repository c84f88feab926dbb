"""What one patch of a picture tells of the object it belongs to: in bound scenes never shape and colour, in scenes of one object a patch both.

Three measurements, each on both worlds, so that each is seen to come out either way: what the best classifier of a patch's pixels and place can do,
out of every drawing there is; the nearest of many patches; and a network trained on them, whose confidence is calibrated on other scenes.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from circuitvision.data import binding, scenes

CONFIDENT = 0.9


@dataclass(frozen=True)
class Patches:
    """The patches of objects: ``pixels[object, patch, level]``, ``place[object, patch]`` in the picture, ``color[object]``, ``shape[object]``."""

    pixels: np.ndarray
    place: np.ndarray
    color: np.ndarray
    shape: np.ndarray

    @property
    def pair(self) -> np.ndarray:
        return self.color * 8 + self.shape


def patches_of(world, drawn: list) -> Patches:
    """Every object's patches in the pictures of scenes."""
    grid = world.GRID
    side = world.IMAGE_SIZE // grid
    cut = world.render(drawn).reshape(len(drawn), grid, side, grid, side, 3).swapaxes(2, 3)
    cut = cut.reshape(len(drawn), grid * grid, -1)
    found = [(row, thing) for row, scene in enumerate(drawn) for thing in scene.objects]
    where = [thing.patches if world is binding else (thing.patch,) for _, thing in found]
    names = [tuple(world.COLORS), tuple(world.SHAPES)]
    return Patches(
        np.stack([cut[row, list(there)] for (row, _), there in zip(found, where, strict=True)]),
        np.array(where),
        np.array([names[0].index(thing.color) for _, thing in found]),
        np.array([names[1].index(thing.shape) for _, thing in found]),
    )


def sample(world, patches: int, rng: np.random.Generator) -> Patches:
    """At least so many patches of objects of training scenes."""
    drawn = [world.sample_scene(rng, count=3) for _ in range(1 + patches // (12 if world is binding else 3))]
    return patches_of(world, drawn)


def every_drawing(world, pairs) -> Patches:
    """Each object that can be drawn, once, at the first place there is: the pixels are the same at every other."""
    if world is binding:
        kinds = itertools.product(pairs, binding.QUARTERS, binding.SIZES, binding.SHIFTS)
        things = [binding.SceneObject(*pair, quarter, size, 0, 0, shift) for pair, quarter, size, shift in kinds]
    else:
        things = [scenes.SceneObject(*pair, "large", 0, 0) for pair in pairs]
    return patches_of(world, [world.Scene((thing,)) for thing in things])


def posterior(world, pairs) -> dict[str, float]:
    """What the best classifier knows of one patch's pixels and place, all drawings and places being equally likely.

    ``pair``: how often it names the pair; ``both``: for how many objects some patch leaves colour and shape each more than .9 likely.
    """
    seen = every_drawing(world, pairs)
    number, per = seen.place.shape
    _, look = np.unique(seen.pixels.reshape(number * per, -1), axis=0, return_inverse=True)
    look = look.reshape(-1)
    room = world.PLACES if world is binding else world.GRID
    steps = np.array([row * world.GRID + column for row, column in itertools.product(range(room), repeat=2)])
    # At every place at once: [place, object, patch].
    keys = look * 64 + seen.place.reshape(-1) + steps[:, None]
    known, group = np.unique(keys, return_inverse=True)
    group = group.reshape(keys.shape)
    best = {}
    for name in ("color", "shape", "pair"):
        counts = np.zeros((len(known), 64))
        np.add.at(counts, (group, np.repeat(getattr(seen, name), per)), 1)
        best[name], total = counts.max(1), counts.sum(1)
    sure = (best["color"] / total > CONFIDENT) & (best["shape"] / total > CONFIDENT)
    return {
        **{name: float(counts.sum() / total.sum()) for name, counts in best.items()},
        "both": float(sure[group].reshape(len(steps), number, per).any(2).mean()),
    }


def nearest(train: Patches, new: Patches) -> float:
    """How often the nearest of many patches has the pair of a new one."""
    known, asked = (
        torch.from_numpy(one.pixels.reshape(-1, one.pixels.shape[-1])).float() / 255 for one in (train, new)
    )
    labels = np.repeat(train.pair, train.place.shape[1])
    lengths = known.pow(2).sum(1)
    found = np.concatenate([(lengths - 2 * part @ known.T).argmin(1).numpy() for part in asked.split(500)])
    return float((labels[found] == np.repeat(new.pair, new.place.shape[1])).mean())


def confident(train: Patches, held: Patches, new: Patches, steps: int) -> dict[str, float]:
    """A network of one patch's pixels and place, trained, calibrated on ``held``, asked about ``new``.

    ``both``: for how many objects it is, in some patch, more than .9 sure of colour and of shape, and right in both.
    """
    torch.manual_seed(0)

    def inputs(part: Patches) -> torch.Tensor:
        levels = torch.from_numpy(part.pixels.reshape(-1, part.pixels.shape[-1])).float() / 127.5 - 1
        return torch.cat([levels, F.one_hot(torch.from_numpy(part.place.reshape(-1)), 64).float()], 1)

    def labels(part: Patches) -> list[torch.Tensor]:
        return [torch.from_numpy(np.repeat(values, part.place.shape[1])) for values in (part.color, part.shape)]

    seen, known = inputs(train), labels(train)
    net = nn.Sequential(nn.Linear(seen.shape[1], 128), nn.ReLU(), nn.Linear(128, 16))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for _ in range(steps):
        rows = torch.randint(len(seen), (256,))
        logits = net(seen[rows]).split(8, 1)
        loss = sum(F.cross_entropy(head, values[rows]) for head, values in zip(logits, known, strict=True))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        heads = list(
            zip(net(inputs(held)).split(8, 1), labels(held), net(inputs(new)).split(8, 1), labels(new), strict=True)
        )
    sure, right = [], []
    for calibration, truth, logits, wanted in heads:
        scales = torch.logspace(-1, 1, 41)
        best = min(scales, key=lambda scale: float(F.cross_entropy(scale * calibration, truth)))
        chance = (best * logits).softmax(1).max(1)
        right.append(chance.indices == wanted)
        sure.append((chance.values > CONFIDENT) & right[-1])
    per = new.place.shape[1]
    return {
        "pair": float((right[0] & right[1]).float().mean()),
        "both": float((sure[0] & sure[1]).reshape(-1, per).any(1).float().mean()),
        "color": float(sure[0].reshape(-1, per).any(1).float().mean()),
        "shape": float(sure[1].reshape(-1, per).any(1).float().mean()),
    }


def measure(world, patches: int, steps: int) -> dict[str, float]:
    """All that is learnt from so many patches of training scenes, about objects of other training scenes."""
    rng = np.random.default_rng(0)
    train, held, new = (sample(world, number, rng) for number in (patches, patches // 10, min(patches // 5, 2_000)))
    return {"nearest": nearest(train, new), **confident(train, held, new, steps)}


@pytest.mark.parametrize("pairs", [binding.ALL_PAIRS, binding.TRAIN_PAIRS])
def test_no_patch_of_any_drawing_tells_shape_and_color(pairs) -> None:
    known = posterior(binding, pairs)
    assert known["pair"] <= 0.5
    assert known["both"] == 0


def test_a_patch_of_scenes_of_one_object_a_patch_tells_both() -> None:
    assert posterior(scenes, scenes.TRAIN_PAIRS) == {"pair": 1, "color": 1, "shape": 1, "both": 1}


@pytest.mark.parametrize(("patches", "steps"), [(4_000, 300), pytest.param(50_000, 3_000, marks=pytest.mark.slow)])
def test_no_classifier_of_one_patch_names_shape_and_color(patches: int, steps: int) -> None:
    found = measure(binding, patches, steps)
    assert found["nearest"] <= 0.5
    assert found["both"] <= 0.05
    # It has learnt what a patch does tell: the wedge's colour.
    assert found["color"] > 0.8


@pytest.mark.parametrize(("patches", "steps"), [(4_000, 300), pytest.param(50_000, 3_000, marks=pytest.mark.slow)])
def test_the_same_classifiers_name_both_where_a_patch_holds_an_object(patches: int, steps: int) -> None:
    found = measure(scenes, patches, steps)
    assert found["nearest"] > 0.95
    assert found["both"] > 0.9

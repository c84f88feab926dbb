"""What is read at an object's patches, layer by layer: by a logit lens, and by a linear probe.

One object of every scene is followed. Its colour and its shape are read at the patch with its wedge (which shows the colour), at its three patches
with outline (which show parts of the shape), and, as a control, at the same patches of another object of the scene, where neither is shown and no two
objects share either. Colours are told from colours and shapes from shapes: chance is 1/8 (a probe that reads the colour and guesses the shape by it
scores 0: objects are of held-out pairs).

The lens is the library's: vision sites go through the projector and the language tower's head, language sites through its head, and what counts is
whether the right word is highest among the eight. The probe is a logistic regression per site and kind of patch, fitted on objects of trained pairs
and tested on objects of held-out ones, whose other objects are of trained pairs. Both are scored on the same scenes. Intervals are Wilson's and
count scenes, not patches.

``last`` is the lens at the last position of the language tower: whether the right answer is highest of all answer words.

Reference: nostalgebraist 2020 (logit lens), Neo et al. 2024 (arXiv 2410.07149, at image positions), Alain and Bengio 2016 (arXiv 1610.01644, probes).
Not covered: attributes that are read off two patches at once; where in a layer (attention or MLP) they appear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision import regions
from circuitvision.data import Side
from circuitvision.data.binding import COLORS, SHAPES, TEST_PAIRS, TRAIN_PAIRS, Pair, Scene, SceneObject, sample_scene
from circuitvision.data.binding_questions import ANSWERS, KINDS
from circuitvision.organisms.measured.drawing import asked, number, side, stream
from circuitvision.organisms.measured.regions import boxes
from circuitvision.readout import collect, linear_probe, logit_lens
from circuitvision.statistics import wilson

TOWERS = ("vision", "language")
ATTRIBUTES: dict[str, tuple[str, ...]] = {"color": tuple(COLORS), "shape": SHAPES}
PLACES = {
    "wedge": ["wedge"],
    "outline": ["outline 1", "outline 2", "outline 3"],
    "other wedge": ["other wedge"],
    "other outline": ["other outline 1", "other outline 2", "other outline 3"],
}
"""Kinds of patches, and the single patches of each."""
PENALTY = 1e-2
ASKED = 50
"""Questions of each kind for the lens at the last position."""


@dataclass(frozen=True)
class Followed:
    """A scene, the object whose attributes are read, and another one."""

    scene: Scene
    thing: SceneObject
    other: SceneObject

    @property
    def patches(self) -> dict[str, int]:
        """The single patches of :data:`PLACES`."""
        found = {}
        for before, thing in (("", self.thing), ("other ", self.other)):
            found[f"{before}wedge"] = thing.wedge_patch
            found |= {f"{before}outline {at}": patch for at, patch in enumerate(thing.outline_patches, 1)}
        return found


def followed(count: int, rng: np.random.Generator, subjects: Sequence[Pair]) -> list[Followed]:
    """Scenes with an object of each of ``subjects`` in turn, the others of trained pairs."""
    found = []
    for turn in range(count):
        pair = subjects[turn % len(subjects)]
        scene = sample_scene(rng, pairs=TRAIN_PAIRS, subjects=(pair,))
        (thing,) = scene.find(color=pair[0], shape=pair[1])
        others = [one for one in scene.objects if one is not thing]
        found.append(Followed(scene, thing, others[int(rng.integers(len(others)))]))
    return found


def measure(model: Any, scenes: int, questions: int, seed: int) -> dict[str, Any]:
    """What lens and probe read, one row per site, kind of patch and attribute; at the last position of so many questions of each kind."""
    rng = stream(seed, "scenes")
    trained = followed(scenes, rng, [TRAIN_PAIRS[at] for at in rng.permutation(len(TRAIN_PAIRS))])
    tested = followed(-(-scenes // 2), rng, TEST_PAIRS)
    rows = [row for tower in TOWERS for row in _tower(model, tower, trained, tested)]
    return {"fitted on": len(trained), "tested on": len(tested), "rows": rows, "last": _last(model, questions, seed)}


def _tower(model: Any, tower: str, trained: list[Followed], tested: list[Followed]) -> list[dict[str, Any]]:
    sites = model.towers[tower].stream_sites()
    lens = _lens(model, tower, sites, tested)
    both = [*trained, *tested]
    vectors = _vectors(model, sites, both)
    rows = []
    for kind, places in PLACES.items():
        for attribute in ATTRIBUTES:
            probe = _probe([vectors[place] for place in places], attribute, both, len(trained))
            for site in sites:
                rows.append(
                    {
                        "site": site,
                        "patch": kind,
                        "attribute": attribute,
                        "lens": _scored(lens[site, kind, attribute], len(tested)),
                        "probe": _scored(probe[site], len(tested)),
                    }
                )
    return rows


def _scored(value: float, count: int) -> dict[str, Any]:
    low, high = wilson(torch.tensor(value), count).tolist()
    return number(value, low, high, count)


def _side(scenes: Sequence[Followed]) -> Side:
    prompt = "USER: <image> what color is there ? ASSISTANT:"
    return Side([one.scene.image for one in scenes], prompt)


def _region(scenes: Sequence[Followed], place: str) -> Any:
    return regions.box([boxes([one.patches[place]]) for one in scenes]).named(place)


def _lens(model: Any, tower: str, sites: Sequence[str], scenes: list[Followed]) -> dict[tuple[str, str, str], float]:
    """Share of patches where the right word is highest, by site, kind of patch and attribute."""
    words = [word for own in ATTRIBUTES.values() for word in own]
    places = {place: _region(scenes, place) for own in PLACES.values() for place in own}
    data: Any = _side(scenes)
    read = logit_lens(model, data, tower, sites=sites, targets={word: word for word in words}, positions=places)
    values = read.values
    found: dict[tuple[str, str, str], float] = {}
    for kind, own in PLACES.items():
        chosen = [read.index_of("position", place) for place in own]
        for attribute, choice in ATTRIBUTES.items():
            columns = values[:, chosen][:, :, [read.index_of("target", word) for word in choice]]
            right = torch.tensor([choice.index(getattr(one.thing, attribute)) for one in scenes])
            shares = (columns.argmax(2) == right).double().mean((1, 2))
            found |= {(site, kind, attribute): float(share) for site, share in zip(sites, shares, strict=True)}
    return found


def _vectors(model: Any, sites: Sequence[str], scenes: list[Followed]) -> dict[str, dict[str, Tensor]]:
    """The vectors ``[scene d_model]`` at every single patch, by patch and site, of one run."""
    ordered = [sorted(one.patches, key=one.patches.__getitem__) for one in scenes]
    everywhere = regions.box([boxes(list(one.patches.values())) for one in scenes])
    found = collect(model, _side(scenes), sites, positions=everywhere, labels=ordered, per_position=True)
    rows = {place: [at for at, label in enumerate(found.labels) if label == place] for place in ordered[0]}
    return {place: {site: vectors[own] for site, vectors in found.items()} for place, own in rows.items()}


def _probe(
    vectors: Sequence[dict[str, Tensor]], attribute: str, scenes: list[Followed], trained: int
) -> dict[str, float]:
    """Held-out accuracy by site of one probe for all patches of a kind."""
    joined = {site: torch.cat([own[site] for own in vectors]) for site in vectors[0]}
    result = linear_probe(
        None,
        joined,
        [getattr(one.thing, attribute) for one in scenes] * len(vectors),
        held_out=[at >= trained for at in range(len(scenes))] * len(vectors),
        shuffles=0,
        penalty=PENALTY,
        label_name=attribute,
    )
    return dict(zip(joined, result.values.tolist(), strict=True))


def _last(model: Any, questions: int, seed: int) -> list[dict[str, Any]]:
    """The lens at the last position of the language tower, by site and kind of question."""
    drawn = asked(questions, stream(seed, "last"))
    data: Any = side(drawn)
    sites = model.language.stream_sites()
    read = logit_lens(model, data, "language", sites=sites, targets={word: word for word in ANSWERS}, positions="last")
    right = torch.tensor([ANSWERS.index(question.answer) for _, question in drawn])
    highest = (read.values.argmax(-2) == right).double()
    rows = []
    for kind in KINDS:
        own = [at for at, (_, question) in enumerate(drawn) if question.kind == kind]
        for site, share in zip(sites, highest[:, own].mean(1).tolist(), strict=True):
            rows.append({"site": site, "kind": kind, "lens": _scored(share, len(own))})
    return rows

"""How the answer changes when parts of the picture are replaced, patch by patch.

*From clean into corrupt*: patches of the corrupt picture are replaced by those of the clean one, and the share of the logit difference that comes
back is measured. The two pictures differ in the patches of one object: in its wedge where colour changes, in its outline where shape does. So the
rest of the picture gives 0 by construction, and ``differs`` says in which share of the pairs the pixels of a region differ at all.

*Removed*: patches of the clean picture are replaced by background, and the loss of the logit difference is measured, as a share of the difference
between clean and corrupt, with the share of answers that stay right. What is background already stays as it is.

Pixels are replaced at the patch embedding (``vision.hook_embed``), which is the same: regions are whole patches, and each patch is embedded by
itself.

Regions are named from the object that holds the answer (of a count: the one that is changed): its wedge; its outline, in the patch of the same row as
the wedge, of the same column, and across; other objects; background. Of relations, the object that the question names has its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from circuitvision import edits, regions
from circuitvision.data.binding import GRID, IMAGE_SIZE, PATCH, SPAN, SceneObject
from circuitvision.data.binding_questions import QuestionPair
from circuitvision.data.scenes import BACKGROUND
from circuitvision.organisms.measured.drawing import Asked, share

SITE = "vision.hook_embed"
Patches = Callable[[QuestionPair], Sequence[int]]


def outline_patch(thing: SceneObject, row: bool, column: bool) -> int:
    """The patch of an object that lies in another row (``row``) or column (``column``) than its wedge."""
    down, right = divmod(thing.patches.index(thing.wedge_patch), SPAN)
    return thing.patches[(down ^ row) * SPAN + (right ^ column)]


def _others(pair: QuestionPair) -> list[int]:
    own = (pair.changed.before, pair.question.subject)
    return [patch for thing in pair.clean.objects if thing not in own for patch in thing.patches]


def _named(pair: QuestionPair) -> list[int]:
    subject = pair.question.subject
    return list(subject.patches) if subject is not None and subject != pair.changed.before else []


def _background(pair: QuestionPair) -> list[int]:
    taken = {patch for scene in (pair.clean, pair.corrupt) for thing in scene.objects for patch in thing.patches}
    return [patch for patch in range(GRID * GRID) if patch not in taken]


REGIONS: dict[str, Patches] = {
    "wedge": lambda pair: [pair.changed.before.wedge_patch],
    "outline, row of the wedge": lambda pair: [outline_patch(pair.changed.before, False, True)],
    "outline, column of the wedge": lambda pair: [outline_patch(pair.changed.before, True, False)],
    "outline, across": lambda pair: [outline_patch(pair.changed.before, True, True)],
    "outline, all": lambda pair: pair.changed.before.outline_patches,
    "object": lambda pair: pair.changed.before.patches,
    "object named": _named,
    "other objects": _others,
    "background": _background,
    "everything": lambda pair: range(GRID * GRID),
}
"""The patches of every region."""


def boxes(patches: Sequence[int]) -> list[tuple[int, int, int, int]] | None:
    """Patches as boxes of pixels; None for none."""
    corners = [(patch % GRID * PATCH, patch // GRID * PATCH) for patch in patches]
    return [(left, top, left + PATCH, top + PATCH) for left, top in corners] or None


def measure(model: Any, asked: dict[str, Asked]) -> dict[str, Any]:
    """Effects of replaced regions, by kind of question and by what changes."""
    found = {}
    for kind, own in asked.items():
        attributes = ("color", "shape") if kind in ("relation", "count") else (kind,)
        for attribute in attributes:
            rows = [row for row, pair in enumerate(own.records) if pair.changed.attribute == attribute]
            name = kind if len(attributes) == 1 else f"{kind} ({attribute})"
            if own.pairs is None or len(rows) < 2:
                found[name] = {"n": len(rows), "reason": "fewer than two pairs are answered right", "regions": {}}
            else:
                found[name] = {"n": len(rows), "regions": _regions(model, own.pairs[rows])}
    return {"site": SITE, "kinds": found}


def _regions(model: Any, pairs: Any) -> dict[str, Any]:
    records: list[QuestionPair] = list(pairs.records)
    patches = {name: [list(of(pair)) for pair in records] for name, of in REGIONS.items()}
    patches = {name: own for name, own in patches.items() if any(own)}
    places = {name: regions.box([boxes(one) for one in own]).named(name) for name, own in patches.items()}
    into = [(edits.replace(SITE, pairs.clean, positions=place),) for place in places.values()]
    blank = background(model)
    away = [(edits.replace(SITE, blank, positions=place),) for place in places.values()]
    restored = model.sweep(pairs.corrupt, into, "logit_diff")
    removed = model.sweep(pairs.clean, away, ["logit_diff", "accuracy"])
    lost, right = removed.of("logit_diff"), removed.of("accuracy")
    gap = restored.source - restored.clean
    differs = {name: _differs(records, own) for name, own in patches.items()}
    return {
        name: {
            "differs": differs[name],
            "restored": share(restored.effect[at], restored.clean, restored.source),
            "removed": share(-lost.effect[at], torch.zeros_like(gap), gap),
            "right after removal": float(right.values[at].double().nanmean()),
        }
        for at, name in enumerate(places)
    }


def background(model: Any) -> torch.Tensor:
    """The patch embeddings ``[1 patch d_model]`` of a picture that shows nothing."""
    blank = Image.fromarray(np.full((IMAGE_SIZE, IMAGE_SIZE, 3), BACKGROUND, dtype=np.uint8))
    inputs = model.inputs(images=blank, text="USER: <image> ASSISTANT:")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, names_filter=[SITE])
    return cache[SITE]


def _differs(records: Sequence[QuestionPair], patches: Sequence[Sequence[int]]) -> float:
    """In which share of the pairs that have the region its pixels differ."""
    found = []
    for pair, own in zip(records, patches, strict=True):
        changed = (pair.clean.pixels != pair.corrupt.pixels).any(-1).reshape(GRID, PATCH, GRID, PATCH).any((1, 3))
        if own:
            found.append(changed.flatten()[list(own)].any())
    return float(np.mean(found))

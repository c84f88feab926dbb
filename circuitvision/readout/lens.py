"""The logit lens: what a tower would answer if it stopped at a given layer, at every position.

The residual stream after each layer goes through the tower's own read-out (:meth:`Tower.readout`: final norm, head),
so at the last layer of a tower that feeds the output the lens equals the model's logits. Where a vision tower is
read by a language tower, its residual goes through the projector and then through the language tower's read-out: the
answer that an image patch would give as a token, had no language layer touched it. That map was never trained for,
so small values there say little; compare two inputs instead of reading absolutes.

Read-outs that pool (classifiers, dual encoders) give one value per row instead of one per position.

Not covered: tuned lenses, frozen norms, sites other than the residual stream.

Reference: nostalgebraist 2020 (logit lens); Vilas et al. 2023 (arXiv 2310.18969) and Neo et al. 2024 (arXiv
2410.07149) on image positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision import metrics
from circuitvision.errors import InputError
from circuitvision.provenance import describe
from circuitvision.results import Result

_MEASURES = {
    "logit": lambda logits: logits,
    "logprob": lambda logits: logits.log_softmax(-1),
    "prob": lambda logits: logits.softmax(-1),
}


@dataclass(frozen=True, eq=False)
class LensResult(Result):
    """The lens at every layer and position.

    ``values`` is ``[layer row position target]``: layer ``"input"`` is what enters block 0, layer ``l`` the output
    of block ``l``. With ``top_k`` the last axis is ``rank`` and ``ids`` holds whose values they are. ``places`` is
    ``[row position 4]``: image, tile, patch row and patch column, -1 where a position is no patch. ``example`` says
    which example each row belongs to.
    """

    tower: str = ""
    measure: str = "logit"
    ids: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    places: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    example: list[int] = field(default_factory=list)

    def contrast(self, answer: Any, foil: Any) -> LensResult:
        """The value of one target minus another's: a result with the single target ``answer - foil``."""
        labels = self.axes.get("target", [])
        missing = [label for label in (answer, foil) if label not in labels]
        if missing:
            raise InputError(f"{missing[0]!r} is not a target of this lens; its targets are {labels}.")
        values = self.values[..., labels.index(answer)] - self.values[..., labels.index(foil)]
        axes = {**self.axes, "target": [f"{answer} - {foil}"]}
        return LensResult(
            values[..., None], axes, self.provenance, self.tower, self.measure, self.ids, self.places, self.example
        )

    def patch_grid(self, layer: Any, row: int = 0, image: int = 0, tile: int | None = None) -> Tensor:
        """One layer's values of the first target on the patch grid of an image: ``[rows columns]``, NaN where a
        patch has no position.

        ``tile=None`` takes the first tile there is (the whole image, where a model also reads it in parts).

        Raises:
            InputError: the row has no patch of that image and tile.
        """
        places = self.places[row]
        here = (places[:, 0] == image) & (places[:, 2] >= 0)
        if bool(here.any()) and tile is None:
            tile = int(places[here, 1].min())
        here &= places[:, 1] == (-1 if tile is None else tile)
        if not bool(here.any()):
            raise InputError(f"Row {row} of the {self.tower} tower has no patch of image {image}, tile {tile}.")
        rows, columns = (places[here, 2:].max(0).values + 1).tolist()
        grid = torch.full((rows, columns), float("nan"))
        grid[places[here, 2], places[here, 3]] = (
            self.values[self.axes["layer"].index(layer), row, here, 0].float().cpu()
        )
        return grid


def logit_lens(
    model: Any,
    cache: Any,
    *,
    tower: str = "language",
    targets: Sequence[int | str] | None = None,
    top_k: int | None = None,
    measure: str = "logit",
) -> LensResult:
    """Read the answer off the residual stream after every layer of a tower.

    Args:
        model: the hooked model.
        cache: a cache of one run that holds ``hook_input`` and the ``hook_resid_post`` of the tower's blocks.
        tower: the tower to read.
        targets: ids or one-piece words whose values are kept.
        top_k: instead of targets, keep the highest values at every position and whose they are.
        measure: ``"logit"``, ``"logprob"`` (nats) or ``"prob"``.

    Raises:
        InputError: no such tower, both or neither of ``targets`` and ``top_k``, an unknown measure, a cache without
        the residual stream. UnsupportedModelError: a tower without a read-out.
    """
    if tower not in model.towers:
        raise InputError(f"This model has no tower {tower!r}; its towers are {', '.join(model.towers)}.")
    if (targets is None) == (top_k is None):
        raise InputError("Give either targets (ids or words) or top_k.")
    if measure not in _MEASURES:
        raise InputError(f"Unknown measure {measure!r}; choose one of {', '.join(_MEASURES)}.")
    chosen = None if targets is None else torch.as_tensor(metrics.answer_ids(list(targets), model))
    layers, values, ids = [], [], []
    with torch.no_grad():
        for label, name in _stream(model, cache, tower):
            logits = _MEASURES[measure](_answer(model, cache, tower, cache[name]))
            logits = logits[:, None] if logits.ndim == 2 else logits
            if chosen is not None:
                values.append(logits[..., chosen.to(logits.device)].cpu())
            else:
                best = logits.topk(min(int(top_k or 1), logits.shape[-1]), dim=-1)
                values.append(best.values.cpu())
                ids.append(best.indices.cpu())
            layers.append(label)
    stacked = torch.stack(values)
    places, example, positions = _places(model, cache, tower, stacked.shape[1], stacked.shape[2])
    last = {"rank": list(range(1, stacked.shape[3] + 1))} if targets is None else {"target": list(targets)}
    return LensResult(
        values=stacked,
        axes={"layer": layers, "row": list(range(stacked.shape[1])), "position": positions, **last},
        provenance=describe(model, method=f"logit_lens(tower={tower}, measure={measure})", inputs=(cache.inputs,)),
        tower=tower,
        measure=measure,
        ids=torch.stack(ids) if ids else torch.zeros(0, dtype=torch.long),
        places=places,
        example=example,
    )


def lens_sites(model: Any, tower: str) -> list[str]:
    """The sites :func:`logit_lens` reads, for ``run_with_cache(names_filter=…)``: all layers that can reach the output."""
    layers = range(model.towers[tower].cfg.n_layers)
    names = [f"{tower}.hook_input", *(f"{tower}.blocks.{layer}.hook_resid_post" for layer in layers)]
    offered = set(model.sites(f"{tower}.**"))
    return [name for name in names if name in offered and not model.is_dead(name)]


def _stream(model: Any, cache: Any, tower: str) -> list[tuple[Any, str]]:
    names = [name for name in lens_sites(model, tower) if name in cache]
    if not names:
        raise InputError(
            f"The cache holds no residual stream of the {tower} tower; "
            f"run with names_filter=cv.readout.lens_sites(model, {tower!r}), or with all sites."
        )
    return [("input" if name.endswith("hook_input") else int(name.split(".")[2]), name) for name in names]


def _answer(model: Any, cache: Any, tower: str, resid: Tensor) -> Tensor:
    out = model.towers[tower].readout(resid, context=cache)
    reader = model.towers.get("language")
    if reader is not None and tower.startswith("vision"):
        # The vision tower's read-out ends in the space that the language tower reads as token embeddings.
        return reader.readout(out, context=cache)
    return out


def _places(model: Any, cache: Any, tower: str, rows: int, length: int) -> tuple[Tensor, list[int], list[Any]]:
    """Image, tile, patch row and column of every position kept (a read-out that drops positions drops the first)."""
    tokens = model.tokens(cache.inputs)[tower]
    dropped = tokens.n_positions - length
    if dropped < 0 or tokens.n_rows != rows or length == 1 < tokens.n_positions:
        return torch.full((rows, length, 4), -1), list(range(rows)), ["pooled"] if length == 1 else list(range(length))
    columns = np.stack([tokens.image_number, tokens.tile, tokens.patch_row, tokens.patch_col], axis=-1)[
        :, dropped:
    ].copy()
    columns[tokens.kind[:, dropped:] != "patch"] = -1
    return torch.from_numpy(columns.astype(np.int64)), tokens.example.tolist(), list(range(dropped, tokens.n_positions))

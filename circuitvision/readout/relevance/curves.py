"""Does a relevance map say what the model used? Insertion and deletion curves.

*Deletion* removes the most relevant places first and watches the metric fall: the better the map, the lower the curve. *Insertion* starts with
every place removed and brings the most relevant back first: the better the map, the higher the curve. Both are counted as the area under the
curve over the share of places, 0 … 1, in the metric's units, so two maps of one model are compared by a number. Between examples that the removal
of everything changes by different amounts, take ``auc(normalised=True)``: the same area where 1 is the unedited run and 0 everything removed.

A curve means something only beside its controls, which are run with it: random orders (the chance level, and how far it scatters) and the
reverse order (the worst a map could do, if it is right).

Places are the positions a relevance was measured at: image patches (or words) of a tower, removed at a site (``level="token"``), or the boxes of
patches in the picture, filled with a colour (``level="pixel"``). What *removed* means is in :mod:`circuitvision.readout.relevance.baselines`;
the whole curve depends on it, so compare curves of one baseline only. Places of equal relevance go in the order of rows and positions. The
words of a dual encoder's texts are one game for all images: all texts are ranked together, and every image's curve is read in it.

Not covered: removing tokens from the sequence, retraining on the removed input.

References: Petsiuk et al. 2018 (arXiv 1806.07421) for both games; Samek et al. 2015 (arXiv 1509.06321) for deletion against random orders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError, warn
from circuitvision.incremental.routes import rows_serve_all
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.relevance.baselines import Baseline, short_repr, start_of
from circuitvision.readout.relevance.boxes import Boxes
from circuitvision.readout.relevance.result import Relevance
from circuitvision.readout.relevance.variables import (
    PIXELS,
    AttributionInput,
    image_tower,
    wide,
)
from circuitvision.results import Result

_Units = list[tuple[int, int]]
"""(row, position) of every place of one example."""


@dataclass(frozen=True, eq=False)
class Curve(Result):
    """The metric as places are removed or brought back: ``values`` ``[share example]``, the share of an example's places treated so far, 0 … 1.

    ``kind`` is ``"deletion"`` or ``"insertion"``. ``reverse`` ``[share example]`` is the curve of the reverse order, ``random`` ``[order share
    example]`` those of random orders. ``method`` says whose order it is.
    """

    kind: str = "deletion"
    method: str = ""
    level: str = "token"
    baseline: str = ""
    reverse: Tensor = field(default_factory=lambda: torch.zeros(0))
    random: Tensor = field(default_factory=lambda: torch.zeros(0))

    _per_example: ClassVar[dict[str, int]] = {"reverse": -1, "random": -1}

    @property
    def shares(self) -> Float[Tensor, " share"]:
        """The share of places treated at each step."""
        return torch.tensor(self.axes["share"], dtype=self.values.dtype)

    def auc(self, order: str = "own", *, normalised: bool = False) -> Float[Tensor, "*order example"]:
        """Area under the curve over the share of places (trapezoids), the mean of the metric along the way: of the map's ``"own"`` order, the
        ``"reverse"``, or each ``"random"`` one.

        ``normalised``: of ``(metric − metric with everything removed) / (metric unedited − metric with everything removed)``; NaN, with a warning,
        for an example whose metric is the same at both ends. Examples whose ends lie close together have areas of any size: take the median over
        examples, not the mean.

        Raises:
            InputError: another order.
        """
        curves = {"own": self.values, "reverse": self.reverse, "random": self.random}
        if order not in curves:
            raise InputError(f"order={order!r} is not understood: {', '.join(map(repr, curves))}.")
        curve = curves[order]
        if normalised:
            first, last = self.values[:1], self.values[-1:]
            whole, nothing = (first, last) if self.kind == "deletion" else (last, first)
            span = (whole - nothing).masked_fill(whole == nothing, float("nan"))
            curve = (curve - nothing) / span
            count = int(span.isnan().sum())
            if count:
                warn(
                    f"{count} of {span.shape[-1]} examples have no normalised area: removing everything changes nothing."
                )
        return torch.trapezoid(curve, self.shares, dim=-2)

    @property
    def area(self) -> Result:
        """:meth:`auc` of the map's own order, ``[example]``, with a mean and an interval."""
        return Result(self.auc(), {"example": self.axes["example"]}, self.provenance)

    @property
    def advantage(self) -> Result:
        """How much better than random orders, ``[example]``: the difference in area to their mean, positive where the map's order is the better one.

        A result of its own, with a mean and an interval; NaN without random orders.
        """
        difference = self.auc("random").mean(0) - self.auc() if self.random.numel() else self.auc() * math.nan
        values = difference if self.kind == "deletion" else -difference
        return Result(values, {"example": self.axes["example"]}, self.provenance)

    @property
    def beaten(self) -> int:
        """How many random orders the map's own is better than, of the first example."""
        own, random = self.auc()[0], self.auc("random")[:, 0]
        return int((own < random if self.kind == "deletion" else own > random).sum())

    @property
    def better(self) -> float:
        """Share of the examples in which the map's order is better than random ones on average."""
        advantage = self.advantage
        return float(Result((advantage.values > 0).double(), advantage.axes).mean())

    def random_band(self, level: float = 0.9) -> Float[Tensor, "3 share"]:
        """The middle ``level`` of the random orders' mean curves over examples: low end, mean over orders, high end."""
        means = self.mean(quantity="random")
        low, high = (means.quantile(round((1 + side * level) / 2, 9), 0) for side in (-1, 1))
        return torch.stack([low, means.mean(0), high])

    def highlights(self) -> dict[str, str]:
        """The map's area beside that of random orders and of the reverse one, and how sure the difference is."""
        found = {"area under the curve": f"{float(self.auc().mean()):.4g}"}
        if self.random.numel():
            advantage, count = self.advantage, len(self.examples)
            low, high = advantage.interval().tolist()
            better = int((advantage.values > 0).sum())
            found["random orders"] = f"{float(self.auc('random').mean()):.4g}"
            sure = f"95 %: {low:.3g} to {high:.3g}" if count > 1 else "one example, so no interval"
            found["better than random"] = f"by {float(advantage.mean()):.3g} ({sure}), in {better} of {count} examples"
        if self.reverse.numel():
            found["reverse order"] = f"{float(self.auc('reverse').mean()):.4g}"
        return found


@with_provenance
def perturbation_curve(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Any,
    relevance: Relevance | Tensor,
    *,
    order: str = "deletion",
    level: str = "token",
    baseline: Baseline = "mean",
    steps: int | None = 20,
    random_orders: int = 20,
    kinds: Sequence[str] | str = "patch",
    tower: str | None = None,
    site: str | None = None,
    seed: int = 0,
) -> Curve:
    """The metric as places are removed in the order of their relevance, or brought back.

    ``order="deletion"``: ``curve[s]`` is the metric with the ``s`` most relevant share of places removed, and low is good.
    ``order="insertion"``: with all places removed but the ``s`` most relevant share, and high is good.

    Args:
        model, inputs, metric: as in :func:`~circuitvision.readout.relevance.gradients.gradient_times_activation`.
        relevance: a result for these inputs, or scores ``[row position]`` (higher goes first, NaN never).
        order: ``"deletion"`` or ``"insertion"``.
        level: ``"token"`` removes positions at ``site``, ``"pixel"`` fills the patches' boxes in the picture.
        baseline: what they become, see :mod:`circuitvision.readout.relevance.baselines`.
        steps: how many steps the curve takes; None removes one place at a time.
        random_orders: how many random orders are run for comparison.
        kinds: kinds of positions that are places, see ``circuitvision.model.tokens.KINDS``.
        tower: whose positions ``relevance`` ranks: by default its own, or the first image tower's.
        site: where they are removed; by default what enters the tower.
        seed: of the random orders.

    Raises:
        InputError: scores of another shape than the tower's positions, no place, an unknown order, level or baseline.
    """
    if order not in ("deletion", "insertion"):
        raise InputError(f"order={order!r} is not understood: 'deletion' or 'insertion'.")
    game = _Game(model, inputs, metric, relevance, level, baseline, kinds, tower, site)
    return game.curve(order, steps, random_orders, seed)


class _Game:
    """The places of one run, and the metric with any set of them removed."""

    def __init__(
        self,
        model: Any,
        inputs: Mapping[str, Any],
        metric: Any,
        relevance: Relevance | Tensor,
        level: str,
        baseline: Baseline,
        kinds: Sequence[str] | str,
        tower: str | None,
        site: str | None,
    ) -> None:
        if level not in ("token", "pixel"):
            raise InputError(f"level={level!r} is not understood: 'token' or 'pixel'.")
        self.model, self.metric, self.level = model, metric, level
        self.method = relevance.method if isinstance(relevance, Relevance) else "given ranking"
        self.baseline = baseline
        own = relevance.tower if isinstance(relevance, Relevance) else None
        site = site or f"{tower or own or image_tower(model)}.hook_input"
        self.variable = AttributionInput(model, inputs, metric, site)
        self.inputs = self.variable.inputs
        self.place = self.variable.place
        scores = relevance.per_position.T if isinstance(relevance, Relevance) else torch.as_tensor(relevance)
        self.units, self.scores = self._ranked(wide(scores), kinds)

    def _ranked(
        self, scores: Float[Tensor, "row pos"], kinds: Sequence[str] | str
    ) -> tuple[list[_Units], list[Tensor]]:
        """The places of every example and their scores; of all at once, where all rows serve every example."""
        tokens, kind = self.place.tokens, self.place.kind
        if scores.shape[-1] == tokens.n_positions:
            scores = scores[..., self.place.dropped :]
        if tuple(scores.shape) != kind.shape:
            raise InputError(
                f"The relevance has {tuple(scores.shape)} rows and positions, {self.variable.site} {kind.shape}: "
                "rank the positions of one tower of the same run, and name it with tower=…."
            )
        wanted = torch.from_numpy(np.isin(kind, [kinds] if isinstance(kinds, str) else list(kinds))) & ~scores.isnan()
        owners, games = tokens.example.tolist(), range(len(self.variable.metric_value))
        if rows_serve_all(self.model, tokens.tower):
            owners, games = [0] * len(owners), range(1)
        found: list[_Units] = []
        for example in games:
            rows = [row for row, owner in enumerate(owners) if owner == example]
            units = [(row, position) for row in rows for position in wanted[row].nonzero().flatten().tolist()]
            if not units:
                raise InputError(
                    f"Example {example} has no place to remove: kinds={kinds!r} with a relevance that is not NaN."
                )
            found.append(units)
        return found, [torch.stack([scores[unit] for unit in units]) for units in found]

    def curve(self, kind: str, steps: int | None, random_orders: int, seed: int) -> Curve:
        """Run the map's order, its reverse and random ones."""
        most = max(map(len, self.units))
        numbers = [random_orders] if steps is None else [random_orders, steps]
        if not all(isinstance(number, Integral) and number >= 0 for number in numbers) or steps == 0:
            raise InputError(
                f"steps={steps!r} and random_orders={random_orders!r}: whole numbers, at least one step, and no negative number."
            )
        count = most if steps is None else min(steps, most)
        own = [scores.argsort(descending=True, stable=True) for scores in self.scores]
        generator = torch.Generator().manual_seed(seed)
        orders = [own, [order.flip(0) for order in own]]
        orders += [
            [torch.randperm(len(units), generator=generator) for units in self.units] for _ in range(random_orders)
        ]
        shares = [step / count for step in range(count + 1)]
        removed = [
            self._removed(order, share if kind == "deletion" else 1 - share, kind == "deletion")
            for order in orders
            for share in shares
        ]
        values = self._values(removed).view(len(orders), len(shares), -1)
        return Curve(
            values=values[0].clone(),
            axes={"share": shares, "example": list(range(values.shape[-1]))},
            provenance=describe(
                self.model,
                method=f"{kind} by {self.method} (level={self.level}, baseline={short_repr(self.baseline)})",
                metric=self.variable.metric,
                inputs=(self.inputs,),
                seed=seed,
                site=self.variable.site if self.level == "token" else PIXELS,
            ),
            kind=kind,
            method=self.method,
            level=self.level,
            baseline=short_repr(self.baseline),
            reverse=values[1].clone(),
            random=values[2:].clone(),
        )

    def _removed(self, order: Sequence[Tensor], share: float, first: bool) -> Bool[Tensor, "row pos"]:
        """The places removed: the first, or else the last, ``share`` of every example's order."""
        mask = torch.zeros(self.place.kind.shape, dtype=torch.bool)
        for units, ranks in zip(self.units, order, strict=True):
            count = round(share * len(units))
            chosen = ranks[:count] if first else ranks[len(units) - count :]
            for number in chosen.tolist():
                mask[units[number]] = True
        return mask

    def _values(self, removed: Sequence[Tensor]) -> Float[Tensor, "run example"]:
        """The metric with each set of places removed; equal sets run once."""
        keys = [mask.numpy().tobytes() for mask in removed]
        once = dict(zip(keys, removed, strict=True))
        masks = list(once.values())
        found = self._by_sweep(masks) if self.level == "token" else self._by_colour(masks)
        index = {key: number for number, key in enumerate(once)}
        return wide(found)[[index[key] for key in keys]]

    def _by_sweep(self, masks: Sequence[Tensor]) -> Tensor:
        source = start_of(self.variable, self.baseline, torch.stack(list(masks)).any(0))
        groups = [[edits.replace(self.variable.site, source, positions=mask)] if mask.any() else [] for mask in masks]
        return self.model.sweep(self.inputs, groups, self.metric, empty="clean").values

    def _by_colour(self, masks: Sequence[Tensor]) -> Tensor:
        picture = AttributionInput(self.model, self.inputs, self.metric, PIXELS)
        filled = start_of(picture, self.baseline)
        boxes = Boxes(self.model, self.inputs, self.place, picture.value)
        found, batch = [], picture.at_once()
        for first in track(range(0, len(masks), batch), "curve"):
            points = [torch.where(boxes.of(mask), filled, picture.value) for mask in masks[first : first + batch]]
            found.append(picture(points, gradients=False)[0])
        return torch.cat(found)

"""Attention knockout: which positions must look at which, and in which layers, for the answer.

A *route* is a set of queries and a set of keys of one tower: image to last position, image to question, within the image, question to image. In a
window of layers (and in single heads, if asked for) the queries cannot look at the keys, and the metric is read again:

    ``effect = metric(knocked out) - metric(unedited)``

per example; :attr:`Knockout.relative` is ``mean(effect) / mean(metric(unedited))``, which for a probability is the published measure. The scores
are blocked before the softmax, so the other keys share the row (``renormalise=False`` takes the entries out of the pattern alone).

What a route costs says little without *controls*: as many random keys of the same kind outside the route's own, drawn per example. They are drawn
for keys that are a region (:mod:`circuitvision.regions`); other spellings are refused, for keys that are all positions of their kind leave none to
draw. ``controls={"patch to last": 3}`` asks for those of single routes.

A knockout in all layers says whether the route is needed at all; one window at a time says where it is used, and misses what later layers make up
for.

*During decoding* (image → generated): with ``run=generated(8)`` the model says an answer of its own under every blocked route, with its cache, and
the metric reads the logits of a new token; ``steps="decode"`` blocks the queries of new tokens alone, ``"prefill"`` those of the prompt, whose last
position says the first new token. Texts may part from the unedited one. To ask about a given text instead, give the prompt with that text and name
its positions as queries, in one forward pass: in a causal tower that is what decoding with a cache computes.

Reference: Geva et al. 2023 (arXiv 2304.14767) on text; Kaduri et al. 2024 (arXiv 2411.17491) and Neo et al. 2024 (arXiv 2410.07149) on images.

Not covered: sampled texts; cross-attention; routes between towers (block the connector's positions by an edit).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from circuitvision import edits, regions
from circuitvision.errors import InputError, checked_seed, nearest
from circuitvision.incremental.sweeps.result import SweepResult
from circuitvision.metric_set import MetricSet
from circuitvision.metrics.effects import share_of_mean
from circuitvision.model.edits.values import Steps
from circuitvision.model.regions import Region
from circuitvision.model.run_functions import RunFunction
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.activation import dead_sites, first_inputs
from circuitvision.patching.cells import layers_around, step_groups
from circuitvision.patching.clean_answers import check_data
from circuitvision.provenance import with_provenance
from circuitvision.statistics import seed_of_draw

ALL = "all"


@dataclass(frozen=True, eq=False, repr=False)
class Knockout(SweepResult):
    """The metric with each route blocked, ``values`` ``[route layer example]`` (with heads and steps ``[route layer head step example]``, several
    metrics first).

    ``clean`` is the unedited metric and :attr:`effect` the change. ``controls`` maps a route to the labels of its random controls, which stand on the
    axis ``route`` behind all routes; ``window`` says how many layers each label stands for.
    """

    controls: dict[str, list[str]] = field(default_factory=dict)
    tower: str = ""
    window: int | str = 1

    @property
    def routes(self) -> list[str]:
        """The routes that were asked for, without controls."""
        drawn = {label for labels in self.controls.values() for label in labels}
        return [route for route in self.axes["route"] if route not in drawn]

    @property
    def relative(self) -> Float[Tensor, "*axes"]:
        """The effect as a share of the unedited metric, means first; NaN where that cannot be told from 0."""
        return share_of_mean(self.effect, self._clean_everywhere().expand(self.values.shape))

    def beyond_controls(self, route: str) -> Float[Tensor, "*axes example"]:
        """The effect of a route less the mean effect of its controls, per example.

        Raises:
            InputError: a route without controls, or not one of this result.
        """
        drawn = self.controls.get(route, [])
        if not drawn:
            there = ", ".join(self.controls) or "no route"
            raise InputError(
                f"The route {route!r} has no control ({there} has): ask for controls={{{route!r}: 3}}, of a route whose keys are a region."
            )
        axis = list(self.axes).index("route")
        effect = self.effect.movedim(axis, 0)
        rows = [self.index_of("route", label) for label in drawn]
        return effect[self.index_of("route", route)] - effect[rows].nanmean(0)


@with_provenance
def knockout(
    model: Any,
    data: Any,
    metric: Any,
    routes: Mapping[str, tuple[Any, Any]],
    *,
    tower: str | None = None,
    layers: Sequence[int] | str | None = None,
    window: int | str = 1,
    heads: bool = False,
    renormalise: bool = True,
    steps: Any = None,
    run: RunFunction | None = None,
    base: Any = (),
    controls: int | Mapping[str, int] = 0,
    seed: int = 0,
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> Knockout:
    """Block every route in every window of layers, and measure what it costs.

    Args:
        model: the hooked model.
        data: inputs, a data set, or pairs (their clean side).
        metric: a metric, its name, or a mapping of several.
        routes: labels and (queries, keys), both in any spelling of positions: ``{"image to last": ("last", "patch")}``.
        tower: whose attention; None: the tower that gives the answer.
        layers: the layers that label the windows; None for each, ``"all"`` for all layers at once.
        window: how many layers around each are blocked together, ``"up to"`` it or ``"from"`` it on.
        heads: whether every head is blocked on its own.
        renormalise: whether the other keys share the row.
        steps: the passes in which it is blocked, as of edits: ``"prefill"``, ``"decode"`` or a number; None is every pass. A list of these, or a
            mapping of labels to them (``{"prompt": "prefill", "answer": "decode"}``), is the axis ``"step"``, on which ``"all"`` is every pass.
        run: what one run is, as of ``model.sweep``: None, one forward pass; :func:`generated`, the tokens of an answer; or
            :func:`circuitvision.steering.act`, the actions of all denoising steps.
        base: edits that every run is under, as of ``model.sweep``: what a route is worth beside them, :attr:`Knockout.clean` being the metric under
            them alone.
        controls: how many random key sets per route, whose keys must be regions; a mapping of labels to numbers asks for them of these routes.
        seed: of the controls.
        allow_wrong: whether the clean runs may give other answers than the data set says, see :mod:`circuitvision.patching.clean_answers`.
        example_batch, save_to, resume, progress: as of ``model.sweep``.

    Raises:
        InputError: no route, one that is no pair, a tower or layer that is not there, dropout in training mode; queries left with nothing to look at;
            controls of keys that are no region; layers whose attention cannot reach the output, clean runs that do not give the answer.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "A knockout")
    name = model.flow.answer if tower is None else tower
    if name not in model.towers:
        raise InputError(f"There is no tower {name!r}; this model has {', '.join(model.towers)}.")
    cfg = model.towers[name].cfg
    if not isinstance(routes, Mapping) or not routes:
        raise InputError("routes maps labels to (queries, keys): {'image to last': ('last', 'patch')}.")
    odd = [label for label, pair in routes.items() if not isinstance(pair, tuple) or len(pair) != 2]
    if odd:
        raise InputError(f"The route {odd[0]!r} is no pair (queries, keys).")
    asked, drawn = _with_controls(routes, controls, seed)
    windows = _windows(layers, window, cfg.n_layers)
    numbers_of_layers = sorted({layer for held in windows.values() for layer in held})
    dead_sites(
        model,
        [f"{name}.blocks.{layer}.attn.hook_attn_scores" for layer in numbers_of_layers],
        first_inputs(model, data),
    )
    check_data(model, data, MetricSet.of(metric), allow_wrong, example_batch, base, run)
    axes: dict[str, list[Any]] = {"route": list(asked), "layer": list(windows)}
    axes |= {"head": list(range(cfg.n_heads))} if heads else {}
    numbers: list[int | None] = list(range(cfg.n_heads)) if heads else [None]
    passes = [Steps.of(steps)] if steps is None or isinstance(steps, str | int) else step_groups(steps)
    if isinstance(passes, dict):
        axes, passes = {**axes, "step": list(passes)}, list(passes.values())
    groups = [
        edits.block_attention(name, queries, keys, layers=held, heads=head, renormalise=renormalise, steps=own)
        for (queries, keys), held, head, own in itertools.product(asked.values(), windows.values(), numbers, passes)
    ]
    swept = model.sweep(
        data,
        groups,
        metric,
        axes=axes,
        save_to=save_to,
        resume=resume,
        progress=progress,
        example_batch=example_batch,
        run=run,
        base=base,
    )
    held_by_sweep = {entry.name: getattr(swept, entry.name) for entry in dataclasses.fields(swept)}
    known = {**swept.provenance, "method": "knockout", "seed": seed if controls else None}
    return Knockout(**{**held_by_sweep, "provenance": known}, controls=drawn, tower=name, window=window)


def _with_controls(
    routes: Mapping[str, tuple[Any, Any]], controls: int | Mapping[str, int], seed: int
) -> tuple[dict[str, tuple[Any, Any]], dict[str, list[str]]]:
    """The routes and behind them their controls, and the labels of each route's."""
    given = dict(controls) if isinstance(controls, Mapping) else dict.fromkeys(routes, controls)
    for label, count in given.items():
        if label not in routes:
            raise InputError(
                f"controls={controls!r}: there is no route {label!r}; did you mean {nearest(label, routes)}?"
            )
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise InputError(f"controls={controls!r}: how many random key sets of each route, 0 for none.")
        if count and not isinstance(routes[label][1], Region):
            raise InputError(
                f"Controls of {label!r} are as many random keys beside its own, and {routes[label][1]!r} is no region to draw them like: give its "
                "keys as one (cv.regions.box, mask, words, at), or ask for those of other routes, controls={label: count}."
            )
    checked_seed(seed)
    asked, drawn = dict(routes), {}
    for label, count in given.items():
        if count:
            queries, keys = routes[label]
            names = [f"{label}, random {number + 1}" for number in range(count)]
            drawn[label] = names
            asked |= {
                name: (queries, regions.random_like(keys, seed_of_draw(seed, number)))
                for number, name in enumerate(names)
            }
    return asked, drawn


def _windows(layers: Any, window: int | str, count: int) -> dict[Any, tuple[int, ...]]:
    """The layers that each label stands for."""
    if layers == ALL:
        return {ALL: tuple(range(count))}
    labels = list(range(count)) if layers is None else list(layers)
    outside = [layer for layer in labels if not hasattr(layer, "__index__") or not 0 <= layer < count]
    if outside or not labels:
        raise InputError(f"layers={layers!r}: numbers from 0 to {count - 1}, 'all', or None for each.")
    return {int(layer): layers_around(int(layer), window, range(count)) for layer in labels}

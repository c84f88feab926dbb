"""Injection: activations of one run put into another, by region, layer and step, and how far the second then acts like the first.

``a`` is the trajectory of the source run, ``b`` that of the base run, ``y`` that of the base run with the source's activations at some places, all
from the base's own noise where a policy starts from noise. With ``d = a − b``,

    ``β = ⟨y − b, d⟩ / ‖d‖²``   and   ``residual = ‖y − b − β d‖ / ‖d‖``:

0 stays, 1 becomes the source, and the residual is what moved in no such direction. The published measure, *override* (``cos(y, a) > cos(y, b)``),
is a step function of β that is half at β = .5 and saturates soon after, so it is kept beside β and not in its place.

Keys and values (``what="kv"``) are what later towers and later tokens read of a prefix; ``what="resid"`` puts the residual stream that enters a
layer. An edit of one layer changes what the layers behind it compute: patching layer 0 alone lets the source's information flow on.

Reference: Grant et al. 2026 (arXiv 2603.19233) on cross-episode injection.

Not covered: tokens that a policy said in the source run (of a policy that says tokens the prompt's pass is injected); prompts of different lengths
outside a data set of pairs, which says what belongs together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.metrics.effects import transfer
from circuitvision.model.edits.base import Edit
from circuitvision.patching.runs import check_same_shapes, inverse_maps
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.results import Result
from circuitvision.steering.acting import Part, Policy, parts, passes, policy_of

ALL = "all"
STAGES = {"kv": ("attn.hook_k", "attn.hook_v"), "resid": ("hook_resid_pre",)}


@dataclass(frozen=True, eq=False)
class InjectionResult(Result):
    """β of every injection, ``values`` ``[region layer step example]``; ``residual`` and ``override`` (0 or 1) have the same shape.

    ``"all"`` on an axis is all layers, or all steps, at once. ``source`` and ``base`` are the trajectories ``[step dim example]`` of the two runs.
    Examples whose two trajectories do not differ are NaN.
    """

    residual: Tensor = field(default_factory=lambda: torch.zeros(0))
    override: Tensor = field(default_factory=lambda: torch.zeros(0))
    source: Tensor = field(default_factory=lambda: torch.zeros(0))
    base: Tensor = field(default_factory=lambda: torch.zeros(0))
    tower: str = ""
    what: str = "kv"

    _per_example: ClassVar[dict[str, int]] = {"residual": -1, "override": -1, "source": -1, "base": -1}

    @with_provenance
    def at(self, region: str | None = None, layer: Any = ALL, step: Any = ALL) -> Result:
        """β of one injection as a result over examples: a region (None: the first), a layer, a step.

        Raises:
            InputError: a label that is not there.
        """
        region = self.axes["region"][0] if region is None else region
        places = [self.index_of(axis, label) for axis, label in (("region", region), ("layer", layer), ("step", step))]
        return Result(self.values[tuple(places)], {"example": self.axes["example"]}, self.provenance)

    @property
    def pooled(self) -> Float[Tensor, "region layer step"]:
        """β over all examples together, ``Σ β ‖d‖² / Σ ‖d‖²``: examples whose trajectories hardly differ weigh little."""
        weight = (self.source - self.base).double().flatten(0, 1).square().sum(0).masked_fill(self.values.isnan(), 0.0)
        return (self.values.nan_to_num(0.0) * weight).sum(-1) / weight.sum(-1)

    def table(self) -> Any:
        """One row per injection: β with its interval, the residual, and the share of overrides."""
        frame = self.mean_frame().rename(columns={"mean": "beta"})
        frame["residual"] = self.mean(quantity="residual").flatten().numpy()
        frame["override"] = self.mean(quantity="override").flatten().numpy()
        return frame

    def highlights(self) -> dict[str, str]:
        """β of each region, all layers and steps (or the first there are) at once."""
        mean = self.mean()[:, 0, 0]
        return {f"β, {name}": f"{value:.3f}" for name, value in zip(self.axes["region"], mean.tolist(), strict=True)}


@with_provenance
def inject(
    model: Any,
    pairs: Any = None,
    *,
    source: Mapping[str, Any] | None = None,
    base: Mapping[str, Any] | None = None,
    tower: str | None = None,
    what: str = "kv",
    regions: Mapping[str, Any] | None = None,
    layers: Sequence[int | str] | None = None,
    steps: Sequence[int | str] = (ALL,),
    policy: Policy | None = None,
    trajectory: Callable[[Tensor], Tensor] | None = None,
    example_batch: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> InjectionResult:
    """Put what a tower computed in the source run into the base run, one region, layer and step at a time, and measure β.

    Args:
        model: the hooked model, a policy.
        pairs: a data set of pairs: their clean side is the source, their corrupt side the base; positions are matched by kind.
        source, base: in place of pairs, the inputs of the two runs, of the same shapes.
        tower: whose activations; None is the prefix (the tower whose keys and values an action tower reads, or the one that says tokens).
        what: ``"kv"`` keys and values, ``"resid"`` the residual stream that enters a layer, or the end of any site's name (``"hook_resid_post"``).
        regions: name → positions of that tower, as of edits (None: all); one region ``"all"`` if left out. They are looked up in the base run: a
            word that only the source has is not there, and examples without any keep their action, which is β 0 (a warning counts them).
        layers: numbers, and ``"all"``; None is ``"all"`` and every layer alone.
        steps: denoising steps of a tower that runs once per step, and ``"all"``. A prefix runs once, as step 0.
        policy: in place of :func:`act`, a function ``(model, inputs, edits)`` that returns actions.
        trajectory: what of the actions ``[example step dim]`` is compared; None is all of them.
        example_batch: how many pairs run at once; None: by memory.

    Raises:
        InputError: neither or both kinds of data, an unknown tower, layer, step or ``what``, dropout in training mode.
        UnsupportedModelError: a model that does not act.
    """
    run = policy_of(model, policy)
    tower = prefix_tower(model) if tower is None else tower
    if tower not in model.towers:
        raise InputError(f"There is no tower {tower!r}; this model has {', '.join(model.towers)}.")
    if what not in STAGES and not model.sites(f"{tower}.blocks.*.{what}"):
        raise InputError(
            f"what={what!r} is not understood: 'kv', 'resid', or the end of a site's name such as 'attn.hook_z'."
        )
    count = model.towers[tower].cfg.n_layers
    asked: dict[str, list[Any]] = {
        "region": list(regions or {ALL: None}),
        "layer": _layers(layers, count),
        "step": list(steps),
    }
    positions = list((regions or {ALL: None}).values())
    shown = trajectory or (lambda actions: actions)
    found: list[dict[str, Tensor]] = []
    labels: list[Any] = []
    for one, other, part in _two(model, pairs, source, base, example_batch, seed):
        injected = _Injection(model, run, tower, what, one, other, part)
        found.append(injected.measure(asked, positions, shown, progress))
        labels += part.labels
    held = {name: torch.cat([part[name] for part in found], dim=-1) for name in found[0]}
    return InjectionResult(
        values=held.pop("beta"),
        axes={**asked, "example": labels},
        provenance=describe(model, method=f"inject(tower={tower}, what={what})", seed=seed),
        tower=tower,
        what=what,
        **held,
    )


def prefix_tower(model: Any) -> str:
    """The tower that holds a policy's prefix: the one whose cache another tower reads, else the one that says tokens, else the one that answers."""
    through = [connector.sources[-1] for connector in model.flow.connectors if connector.via == "cache"]
    return through[0] if through else model.family.tower_that_runs("per_token") or model.flow.answer


class _Injection:
    """The source run of some examples, recorded, and the base run under its pieces."""

    def __init__(self, model: Any, run: Any, tower: str, what: str, source: Any, base: Any, part: Part) -> None:
        self.model, self.run, self.base, self.part, self.tower = model, run, base, part, tower
        self.sites = {
            layer: [f"{tower}.blocks.{layer}.{stage}" for stage in STAGES.get(what, (what,))]
            for layer in range(model.towers[tower].cfg.n_layers)
        }
        names = [site for own in self.sites.values() for site in own]
        live = set(model.sites(f"{tower}.**"))
        self.sites = {layer: [site for site in own if site in live] for layer, own in self.sites.items()}
        with model.record(names) as cache:
            self.source = run(model, source, [])
        self.unedited = run(model, base, [])
        # What is said in tokens differs from run to run: only the prompt's pass belongs together.
        shared = 1 if tower == model.family.tower_that_runs("per_token") else None
        self.held = {site: passes(cache[site], site)[:shared] for own in self.sites.values() for site in own}
        self.passes = max(map(len, self.held.values()))

    def measure(
        self, asked: Mapping[str, Sequence[Any]], positions: Sequence[Any], shown: Any, progress: bool
    ) -> dict[str, Tensor]:
        """β, residual and override ``[region layer step example]``, and the two trajectories ``[step dim example]``."""
        a, b = (shown(run).detach().cpu() for run in (self.source, self.unedited))
        wrong = [
            step for step in asked["step"] if step != ALL and not (isinstance(step, int) and 0 <= step < self.passes)
        ]
        if wrong:
            raise InputError(
                f"There is no step {wrong[0]!r}: the {self.tower} tower runs {self.passes} times, counted from 0."
            )
        cells = [(where, layer, step) for where in positions for layer in asked["layer"] for step in asked["step"]]
        values = []
        for where, layer, step in track(cells, "injection") if progress else cells:
            y = shown(self.run(self.model, self.base, self.part.own(self.edits(where, layer, step)))).detach().cpu()
            beta, residual = transfer(y, a, b)
            values.append(torch.stack([beta, residual, _override(y, a, b).masked_fill(beta.isnan(), torch.nan)]))
        shape = [len(asked[name]) for name in ("region", "layer", "step")]
        beta, residual, override = torch.stack(values, 1).reshape(3, *shape, -1)
        ends = {"source": a.double().movedim(0, -1), "base": b.double().movedim(0, -1)}
        return {"beta": beta, "residual": residual, "override": override, **ends}

    def edits(self, where: Any, layer: int | str, step: int | str) -> list[Edit]:
        """One edit per site and pass."""
        layers = self.sites if layer == ALL else [layer]
        found = []
        for one in layers:
            for site in self.sites[int(one)]:
                for number, value in enumerate(self.held[site]):
                    if step in (ALL, number):
                        found.append(edits.replace(site, self._laid(value), positions=where, steps=number))
        return found

    def _laid(self, value: Tensor) -> Tensor:
        return value if self.part.batch is None else self.part.batch.matched(self.tower, value)


def _layers(layers: Sequence[int | str] | None, count: int) -> list[int | str]:
    if layers is None:
        return [ALL, *range(count)]
    found: list[int | str] = [layer if layer == ALL else int(layer) for layer in layers]
    wrong = [layer for layer in found if layer != ALL and not 0 <= int(layer) < count]
    if wrong or not found:
        raise InputError(f"layers={list(layers)!r}: give numbers below {count}, or 'all'.")
    return found


def _two(
    model: Any, pairs: Any, source: Any, base: Any, size: int | None, seed: int
) -> Iterator[tuple[Mapping[str, Any], Mapping[str, Any], Part]]:
    """Source inputs, base inputs, and which examples they are of.

    Both start from the base's noise, so that only what they were told differs.
    """
    if pairs is None and source is not None and base is not None:
        check_same_shapes(source, base)
        (part,) = parts(model, base)
        yield source, base, part
        return
    if pairs is None or source is not None or base is not None or not hasattr(pairs, "corrupt"):
        raise InputError("Give pairs (cv.data.Pairs), or the inputs of both runs: source=… and base=….")
    swapped = type(pairs).from_sides(pairs.corrupt, pairs.clean, maps=inverse_maps(pairs.maps))
    for part in parts(model, swapped, size, seed):
        yield part.batch.other, part.inputs, part


def _override(y: Tensor, a: Tensor, b: Tensor) -> Float[Tensor, " example"]:
    """1 where a trajectory points more like ``a`` than like ``b``."""
    y, a, b = (one.detach().cpu().double().flatten(1) for one in (y, a, b))
    closer = torch.nn.functional.cosine_similarity(y, a, dim=1) > torch.nn.functional.cosine_similarity(y, b, dim=1)
    return closer.double()

"""The logit lens: what a tower would answer at any of its sites, at every position, in the tower's own vocabulary.

A vector of width d_model goes through the tower's read-out as if it were the final residual stream (see :mod:`circuitvision.model.heads` for
what that means at positions that the family does not pool). ``norm`` says what the final norm does to it:

* ``"own"``: its own statistics (the usual lens; of a branch's output too, as in Vilas et al.);
* ``"frozen"``: the scale that the norm has in this run at the same position, so that the lens is linear in the vector and values of parts add
  up;
* ``"none"``: no final norm;
* ``"tuned"``: an affine map per layer, trained to predict the output, then the norm's own statistics (:class:`TunedLens`).

At the last layer of a tower that feeds the output the lens is the model's own output. Where a vision tower is read by a language tower, its
patches go through the projector and then through the language tower's head: the answer an image patch would give as a token, had no language
layer touched it. That map was never trained for, so compare two inputs, or with chance, instead of reading absolutes.

Nothing of the size layers × positions × vocabulary ever exists: a site is read in pieces of at most ``CHUNK_BYTES`` of logits. Read-outs that
pool give ``pooled`` beside the values per position: what the model would answer if it stopped at that layer.

References: nostalgebraist 2020 (logit lens); Belrose et al. 2023, arXiv 2303.08112 (tuned lens); Vilas et al. 2023, arXiv 2310.18969
(class-embedding space of ViTs); Neo et al. 2024, arXiv 2410.07149 (image positions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.heads import Reading, through_projector
from circuitvision.model.sites import SiteName
from circuitvision.provenance import describe
from circuitvision.readout.lens_sites import lens_sites, ordered_sites
from circuitvision.readout.places import on_grid, places_of
from circuitvision.readout.recorded import recorded
from circuitvision.readout.targets import (
    MEASURES,
    Targets,
    names_of,
    output_kind,
    output_size,
    reader_of,
    resolve_targets,
)
from circuitvision.results import Result

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel
    from circuitvision.model.tower import Tower
    from circuitvision.readout.tuned import TunedLens

NORMS = ("own", "frozen", "none", "tuned")
CHUNK_BYTES = 64 * 2**20
"""Logits held at once."""
_SHOWN = 5
"""How many of the highest columns are kept at every place, for tables and hover texts."""


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@dataclass(frozen=True, eq=False)
class LensResult(Result):
    """The lens at every site and position.

    ``values`` is ``[layer row position target]`` (``site`` in place of ``layer`` where several kinds were read, a ``head`` axis after it for
    sites with heads): layer ``"input"`` is what enters block 0, layer ``l`` is block ``l``. With ``top_k`` the last axis is ``rank``. ``ids``
    ``[… rank]`` are the highest columns at every place, ``names`` what they are called. With targets, ``ranks`` is 1 plus how many columns are
    strictly higher, out of ``n_outputs``. ``pooled`` ``[layer row target]`` and ``pooled_ids`` are the same for the family's pooled output.
    ``places`` is ``[row position 4]``: image, tile, patch row and patch column, -1 where a position is no patch; ``words`` labels positions,
    ``example`` says which example a row belongs to.
    """

    tower: str = ""
    measure: str = "logit"
    ids: Tensor = field(default_factory=_none)
    places: Tensor = field(default_factory=_none)
    example: list[int] = field(default_factory=list)
    norm: str = "own"
    ranks: Tensor = field(default_factory=_none)
    n_outputs: int = 0
    pooled: Tensor = field(default_factory=_none)
    pooled_ids: Tensor = field(default_factory=_none)
    pooled_ranks: Tensor = field(default_factory=_none)
    words: list[list[str]] = field(default_factory=list)
    kinds: list[list[str]] = field(default_factory=list)
    names: dict[str, str] = field(default_factory=dict)

    @property
    def best(self) -> Int[Tensor, "layer row position"]:
        """The highest column at every place."""
        return self.ids[..., 0]

    def contrast(self, answer: Any, foil: Any) -> LensResult:
        """The value of one target minus another's: a result with the single target ``answer - foil``."""
        first, second = self.target(answer), self.target(foil)
        pooled = self.pooled[..., first] - self.pooled[..., second] if self.pooled.numel() else self.pooled
        return replace(
            self,
            values=(self.values[..., first] - self.values[..., second])[..., None],
            axes={**self.axes, "target": [f"{answer} - {foil}"]},
            pooled=pooled[..., None] if self.pooled.numel() else pooled,
            ranks=_none(),
            pooled_ranks=_none(),
        )

    def target(self, label: Any) -> int:
        """The index of a target; InputError if it is not one of this lens."""
        labels = self.axes.get("target", [])
        if label not in labels:
            raise InputError(f"{label!r} is not a target of this lens; its targets are {labels}.")
        return labels.index(label)

    def row(self, row: int) -> LensResult:
        """One row alone."""
        if not 0 <= row < len(self.axes["row"]):
            raise InputError(f"There is no row {row}; this lens has {len(self.axes['row'])}.")
        at = list(self.axes).index("row")
        cut: dict[str, Any] = {
            name: getattr(self, name).narrow(at, row, 1)
            for name in ("ids", "ranks", "pooled", "pooled_ids", "pooled_ranks")
            if getattr(self, name).numel()
        }
        for name in ("example", "words", "kinds"):
            cut[name] = getattr(self, name)[row : row + 1]
        axes = {**self.axes, "row": [self.axes["row"][row]]}
        return replace(self, values=self.values.narrow(at, row, 1), axes=axes, places=self.places[row : row + 1], **cut)

    def patch_grid(self, layer: Any, row: int = 0, image: int = 0, tile: int | None = None, target: Any = 0) -> Tensor:
        """One layer's values of a target (by number or label) on the patch grid of an image: ``[rows columns]``, NaN where a patch has no position.

        ``tile=None`` takes the first tile there is (the whole image, where a model also reads it in parts).

        Raises:
            InputError: the row has no patch of that image and tile.
        """
        index = target if isinstance(target, int) else self.target(target)
        return on_grid(self.values[self.index(layer), row, :, index], self.places[row], image, tile)

    def index(self, layer: Any) -> int:
        """The index of a layer or site on the first axis."""
        labels = next(iter(self.axes.values()))
        if layer not in labels:
            raise InputError(f"There is no {next(iter(self.axes))} {layer!r} in this lens; there are {labels}.")
        return labels.index(layer)


def logit_lens(
    model: HookedModel,
    cache: ActivationCache | Mapping[str, Any],
    tower: str | None = None,
    *,
    sites: str | Sequence[str] | None = None,
    norm: str = "own",
    targets: Any = None,
    top_k: int | None = None,
    measure: str = "logit",
    pieces: str | None = None,
    readout: Callable[[Tensor], Tensor] | None = None,
    tuned: TunedLens | None = None,
    step: int | None = None,
) -> LensResult:
    """Read the answer off any site of a tower: ``lens(h) = head(norm(h))`` at every position.

    Args:
        model: the hooked model. cache: a cache of one run, or the inputs of one (then the run is made here, recording what is needed). tower:
        the tower to read; by default the language tower, or the only one there is. sites: kinds ("resid_post", "attn_out", "attn.hook_result",
        …), names or globs; by default the residual stream, where it can reach the output. norm: "own", "frozen", "none" or "tuned", see the
        module. targets: words, class names, prompts (for the images of a dual encoder), numbers of columns or action dimensions, the same for
        all examples; or ``{"answer": [one per example]}``; or a float tensor of embeddings or directions ``[target width]``. top_k: instead of
        targets, keep the highest values at every position and whose they are. measure: ``"logit"``, ``"logprob"`` (nats) or ``"prob"``.
        Read-outs that are no distribution (actions, directions) have logits only. pieces: how to read a word of several tokens: "first",
        "mean" or "joint", see :mod:`circuitvision.readout.targets`. readout: a read-out of your own, ``fn(resid [row pos d_model]) -> [row pos
        n_out]``, for towers without one. tuned: the trained maps for ``norm="tuned"``. step: which pass of a cache of several (``generate``,
        ``sample_actions``).

    Raises:
        InputError: no such tower, both or neither of ``targets`` and ``top_k``, an unknown measure or norm, a cache without what is needed, a
        target that does not exist, a tower without a read-out and neither directions nor a callable. UnknownSiteError: no such site.
    """
    owner = _tower(model, tower)
    _check_options(owner, norm, targets, top_k, measure, tuned, readout)
    chosen = None if targets is None else _chosen(model, owner, targets, pieces, measure, readout is not None)
    names = lens_sites(model, owner.name) if sites is None else ordered_sites(model, owner.name, sites)
    if targets is None and readout is None and output_kind(owner) == "hidden":
        resolve_targets(model, owner, ["?"])
    found = _cached(model, cache, owner, names, norm)
    names = [name for name in names if name in found]
    if not names:
        raise InputError(
            f"The cache holds no residual stream of the {owner.name} tower; "
            f"run with names_filter=cv.readout.lens_sites(model, {owner.name!r}), or with all sites."
        )
    reader = LensReader(model, owner, found, norm, chosen, readout, tuned, step)
    with torch.no_grad():
        parts = [_Part.read(reader, name, measure, top_k) for name in names]
    return _result(model, reader, names, parts, measure, top_k, norm)


def _tower(model: HookedModel, tower: str | None) -> Tower:
    if tower is None:
        tower = "language" if "language" in model.towers else next(iter(model.towers))
    if tower not in model.towers:
        raise InputError(f"This model has no tower {tower!r}; its towers are {', '.join(model.towers)}.")
    return model.towers[tower]


def _check_options(
    owner: Tower,
    norm: str,
    targets: Any,
    top_k: int | None,
    measure: str,
    tuned: TunedLens | None,
    readout: Callable[[Tensor], Tensor] | None,
) -> None:
    if (targets is None) == (top_k is None):
        raise InputError("Give either targets (ids or words) or top_k.")
    if top_k is not None and top_k < 1:
        raise InputError("top_k counts from 1.")
    if measure not in MEASURES:
        raise InputError(f"Unknown measure {measure!r}; choose one of {', '.join(MEASURES)}.")
    if norm not in NORMS:
        raise InputError(f"Unknown norm {norm!r}; choose one of {', '.join(NORMS)}.")
    if (norm == "tuned") != (tuned is not None):
        raise InputError("norm='tuned' goes with tuned=TunedLens.train(model, dataset, tower), and only with it.")
    if tuned is not None and tuned.tower != owner.name:
        raise InputError(f"This tuned lens was trained on the {tuned.tower} tower, not on {owner.name}.")
    if norm == "frozen" and (reader_of(owner) is not owner or readout is not None):
        raise InputError(
            "A frozen norm needs the norm's scale at the same position of the same tower; patches behind a projector, and a read-out of your own, "
            "have none. Use norm='own' or 'none'."
        )
    unnamed = readout is None and output_kind(owner) in ("actions", "embedding")
    directions = isinstance(targets, Tensor) and targets.is_floating_point() and output_kind(owner) != "texts"
    if measure != "logit" and (unnamed or directions):
        raise InputError(f"What the {owner.name} tower says here is no distribution; use measure='logit'.")


def _chosen(
    model: HookedModel, owner: Tower, targets: Any, pieces: str | None, measure: str, own_columns: bool
) -> Targets:
    chosen = resolve_targets(model, owner, targets, pieces=pieces, own_columns=own_columns)
    if chosen.how == "joint" and measure == "logit":
        raise InputError("pieces='joint' adds log-probabilities; use measure='logprob' or 'prob'.")
    return chosen


def _cached(
    model: HookedModel, cache: ActivationCache | Mapping[str, Any], owner: Tower, names: Sequence[str], norm: str
) -> ActivationCache:
    """The cache given, or that of a run recording the sites and what their reading depends on."""
    if isinstance(cache, ActivationCache):
        return cache
    needed = [*names, *(owner.residual_name(layer) for layer in owner.feature_layers)]
    if output_kind(owner) in ("texts", "images"):
        needed += [f"{name}.hook_readout" for name in model.towers]
    with torch.no_grad():
        return model.run_with_cache(cache, names_filter=list(dict.fromkeys(needed)))[1]


class LensReader:
    """How one lens reads vectors of one tower: which columns, which norm, in which pieces."""

    def __init__(
        self,
        model: HookedModel,
        tower: Tower,
        cache: ActivationCache,
        norm: str = "own",
        targets: Targets | None = None,
        readout: Callable[[Tensor], Tensor] | None = None,
        tuned: TunedLens | None = None,
        step: int | None = None,
    ) -> None:
        self.model, self.tower, self.cache = model, tower, cache
        self.targets, self.custom, self.tuned, self.step = targets, readout, tuned, step
        self.kind = "columns" if readout is not None else output_kind(tower)
        against = None if targets is None else targets.against
        self.directions = against if self.kind in ("hidden", "embedding") or self._wide(against) else None
        self._check_width()
        self.norm = "own" if norm == "tuned" else norm
        self.reference = self.site(tower.residual_name(max(tower.feature_layers))) if norm == "frozen" else None
        self.reading = Reading(
            reader_of(tower),
            cache,
            norm=self.norm,
            reference=self.reference,
            against=None if self.directions is not None else against,
        )

    def _check_width(self) -> None:
        if self.directions is None:
            return
        wanted = self.tower.cfg.d_model if self.kind != "embedding" else output_size(self.tower)
        if self.directions.shape[1] != wanted:
            raise InputError(
                f"Directions of the {self.tower.name} tower are [target {wanted}], not {tuple(self.directions.shape)}."
            )

    def _wide(self, against: Tensor | None) -> bool:
        """Whether the targets are directions of the stream itself, in a tower whose columns have names of their own."""
        return against is not None and self.kind in ("classes", "tokens", "actions")

    def site(self, name: str) -> Tensor:
        """A site of the cache as ``[row pos …]``, see :func:`recorded`."""
        return recorded(self.cache, name, self.step)

    def columns(
        self, value: Float[Tensor, "row pos d_model"], layer: int | None = None
    ) -> Iterator[Float[Tensor, "row pos n_out"]]:
        """The logits of every position, a few positions at a time."""
        if value.shape[-1] != self.tower.cfg.d_model or value.ndim != 3:
            raise InputError(
                f"The lens reads vectors of the stream [row pos {self.tower.cfg.d_model}]; this site holds {tuple(value.shape)}."
            )
        with self.tower.quiet():
            value = value.to(self._dtype())
            value = value if self.tuned is None else self.tuned.translate(value, layer)
            if self.custom is not None:
                yield self.custom(value)
                return
            if reader_of(self.tower) is not self.tower and self.directions is None:
                assert self.tower.spec.readout is not None
                value = through_projector(self.tower, self.tower.spec.readout, value, self.cache)
            width, missing = self._positions_at_once(value), self.missing(value)
            for start in range(0, value.shape[1], width):
                yield self._piece(value[:, start : start + width], start + missing)

    def missing(self, value: Float[Tensor, "row pos width"]) -> int:
        """How many of the tower's first positions a site does not have (patch embeddings have no CLS, a projector drops it)."""
        tokens = self.model.tokens(self.cache.inputs).get(self.tower.name) if self.cache.inputs else None
        return 0 if tokens is None or tokens.n_rows != value.shape[0] else max(tokens.n_positions - value.shape[1], 0)

    def _piece(self, piece: Tensor, start: int) -> Tensor:
        if self.directions is not None and self.kind != "embedding":
            norm = self.tower.final_norm if self.norm == "own" and self.tower.spec.readout is None else None
            return (piece if norm is None else norm(piece)) @ self.directions.to(piece).T
        frozen = None if self.reference is None else self.reference[:, start : start + piece.shape[1]]
        out = self.reading.positions(piece, start, frozen)
        return out if self.directions is None else out @ self.directions.to(out).T

    def pooled(self, value: Float[Tensor, "row pos d_model"], layer: int | None = None) -> Tensor | None:
        """The family's pooled output ``[row n_out]``; None where it does not pool, or where the vector is not read by its head."""
        readout = self.tower.spec.readout
        pools = readout is not None and readout.pool not in ("none", "chunk")
        if not pools or self.custom is not None or self.directions is not None or self.missing(value):
            return None
        with self.tower.quiet():
            value = value.to(self._dtype())
            value = value if self.tuned is None else self.tuned.translate(value, layer)
            out = self.reading.output(value)
        return out.T if self.kind == "images" and self.reading.against is None else out

    def _dtype(self) -> torch.dtype:
        return next(self.tower.module.parameters()).dtype

    def _positions_at_once(self, value: Tensor) -> int:
        size = len(self.directions) if self.directions is not None else output_size(self.tower) or 1024
        return max(1, CHUNK_BYTES // (4 * size * value.shape[0]))


def measured(logits: Tensor, measure: str) -> Tensor:
    """Logits as they are, log-probabilities or probabilities; in float32 at least."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if measure == "logit" else wide.log_softmax(-1) if measure == "logprob" else wide.softmax(-1)


@dataclass(frozen=True)
class _Part:
    """One site's share of a lens, with a leading head axis."""

    values: Tensor
    ids: Tensor
    ranks: Tensor
    pooled: tuple[Tensor, Tensor, Tensor] | None
    size: int

    @classmethod
    def read(cls, reader: LensReader, name: str, measure: str, top_k: int | None) -> _Part:
        value = reader.site(name)
        layer = SiteName.parse(name).layer
        per_head = value.movedim(2, 0) if value.ndim == 4 else value[None]
        heads, sizes = [], 0
        for vectors in per_head:
            pieces = []
            for logits in reader.columns(vectors, layer):
                sizes = logits.shape[-1]
                pieces.append(_summary(reader, logits, measure, top_k))
            heads.append([torch.cat(column, dim=1) for column in zip(*pieces, strict=True)])
        pooled = None
        if value.ndim == 3 and value.shape[1] > 0:
            whole = reader.pooled(value, layer)
            if whole is not None:
                pooled = tuple(part[:, 0] for part in _summary(reader, whole[:, None], measure, top_k))
        values, ids, ranks = (torch.stack(column) for column in zip(*heads, strict=True))
        return cls(values, ids, ranks, pooled, sizes)  # type: ignore[arg-type]


def _summary(reader: LensReader, logits: Tensor, measure: str, top_k: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of the logits of some positions: values, highest columns, ranks of the targets."""
    scored = measured(logits, measure)
    best = scored.topk(min(top_k or _SHOWN, scored.shape[-1]), dim=-1)
    if reader.targets is None:
        return best.values.cpu(), best.indices.cpu(), torch.zeros(*best.values.shape[:-1], 0, dtype=torch.long)
    _check_columns(reader.targets, scored.shape[-1])
    values = reader.targets.read(
        measured(logits, "logprob") if reader.targets.how == "joint" else scored, _examples(reader, scored.shape[0])
    )
    if reader.targets.how == "joint" and measure == "prob":
        values = values.exp()
    ranks = torch.stack([1 + (scored > values[..., i, None]).sum(-1) for i in range(values.shape[-1])], dim=-1)
    return values.cpu(), best.indices.cpu(), ranks.cpu()


def _check_columns(targets: Targets, size: int) -> None:
    if int(targets.ids.max()) >= size:
        raise InputError(f"There is no column {int(targets.ids.max())}: this read-out has {size}, from 0.")


def _examples(reader: LensReader, rows: int) -> Tensor:
    tokens = reader.model.tokens(reader.cache.inputs).get(reader.tower.name) if reader.cache.inputs else None
    owners = torch.arange(rows) if tokens is None or tokens.n_rows != rows else torch.as_tensor(tokens.example)
    targets = reader.targets
    if targets is not None and targets.ids.shape[1] not in (1, int(owners.max()) + 1):
        raise InputError(
            f"There are {int(owners.max()) + 1} examples and targets for {targets.ids.shape[1]}; give one per example."
        )
    return owners


def _result(
    model: HookedModel,
    reader: LensReader,
    names: Sequence[str],
    parts: Sequence[_Part],
    measure: str,
    top_k: int | None,
    norm: str,
) -> LensResult:
    axis, labels = _labels(reader.tower.name, names)
    values, ids, ranks = (torch.stack([getattr(part, what) for part in parts]) for what in ("values", "ids", "ranks"))
    heads = {"head": list(range(values.shape[1]))}
    if all(SiteName.parse(name).site != "attn.hook_result" and values.shape[1] == 1 for name in names):
        values, ids, ranks, heads = values[:, 0], ids[:, 0], ranks[:, 0], {}
    rows, length = values.shape[-3:-1]
    places, example, positions, words, kinds = _where(model, reader, rows, length)
    targets = reader.targets
    last = {"rank": list(range(1, values.shape[-1] + 1))} if targets is None else {"target": targets.labels}
    pooled = [part.pooled for part in parts]
    kept = [torch.stack(column) for column in zip(*pooled, strict=True)] if None not in pooled else [_none()] * 3  # type: ignore[arg-type]
    unique = sorted({int(number) for number in torch.cat([ids.flatten(), kept[1].flatten()]).unique()})
    return LensResult(
        values=values,
        axes={axis: labels, **heads, "row": list(range(rows)), "position": positions, **last},
        provenance=describe(
            model,
            method=f"logit_lens(tower={reader.tower.name}, norm={norm}, measure={measure})",
            inputs=(reader.cache.inputs,),
        ),
        tower=reader.tower.name,
        measure=measure,
        ids=ids,
        places=places,
        example=example,
        norm=norm,
        ranks=ranks if targets is not None else _none(),
        n_outputs=parts[0].size,
        pooled=kept[0],
        pooled_ids=kept[1],
        pooled_ranks=kept[2] if targets is not None else _none(),
        words=words,
        kinds=kinds,
        names={str(n): str(n) for n in unique}
        if reader.kind == "columns"
        else names_of(model, reader.tower, unique, targets),
    )


def _labels(tower: str, names: Sequence[str]) -> tuple[str, list[Any]]:
    """The first axis: layers where all sites are of one kind of block site (what enters block 0 counts as "input"), names otherwise."""
    sites = [SiteName.parse(name) for name in names]
    kinds = {site.site for site in sites if site.layer is not None}
    others = [site for site in sites if site.layer is None]
    if len(kinds) == 1 and all(site.site == "hook_input" for site in others):
        return "layer", ["input" if site.layer is None else site.layer for site in sites]
    return "site", [name.removeprefix(f"{tower}.") for name in names]


def _where(
    model: HookedModel, reader: LensReader, rows: int, length: int
) -> tuple[Tensor, list[int], list[Any], list[list[str]], list[list[str]]]:
    """Places, examples, numbers, words and kinds of the positions kept (a projector that drops positions drops the first)."""
    tokens = model.tokens(reader.cache.inputs).get(reader.tower.name) if reader.cache.inputs else None
    dropped = 0 if tokens is None else tokens.n_positions - length
    if tokens is None or dropped < 0 or tokens.n_rows != rows:
        nowhere = torch.full((rows, length, 4), -1)
        blank = [[""] * length for _ in range(rows)]
        return nowhere, list(range(rows)), list(range(length)), blank, blank
    words = [tokens.labels(row)[dropped:] for row in range(rows)]
    kinds = [[str(kind) for kind in tokens.kind[row, dropped:]] for row in range(rows)]
    numbers = list(range(dropped, tokens.n_positions))
    return places_of(tokens, dropped), tokens.example.tolist(), numbers, words, kinds


__all__ = ["LensReader", "LensResult", "lens_sites", "logit_lens"]

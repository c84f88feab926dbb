"""The logit lens: what a tower would answer at any of its sites, at every position, in the tower's own vocabulary.

A vector of width d_model goes through the tower's read-out as if it were the final residual stream (see :mod:`circuitvision.model.head_forward` for
what that means at positions that the family does not pool). ``norm`` says what the final norm does to it:

* ``"own"``: its own statistics (the usual lens; of a branch's output too, as in Vilas et al.);
* ``"frozen"``: the scale that the norm has in this run at the same position of the residual that leaves the tower, so that the lens is affine
  in the vector (before a soft cap, where there is one) and values of parts add up. Behind a projector both norms are held, the vision tower's
  and, at the projected patch, the language tower's: affine where the projector is one linear map (PaliGemma, PI0), not behind an MLP (LLaVA).
  A pooling head (SigLIP) keeps what follows its attention as it is for that patch of the run;
* ``"none"``: no final norm (of either tower);
* ``"tuned"``: an affine map per layer, trained to predict the output, then the norm's own statistics (:class:`TunedLens`).

At the last layer of a tower that feeds the output the lens is the model's own output. Where a vision tower is read by a language tower, its
patches go through the projector and then through the language tower's head: the answer an image patch would give as a token, had no language
layer touched it. That map was never trained for, so compare two inputs, or with chance, instead of reading absolutes.

Directions given as a tensor take the place of the head's columns: ``norm(h) · direction``, without a bias. A direction that was found in the
stream itself (a probe's, a steering vector) wants ``norm="none"``, which is what ``direct_attribution`` makes of one.

Nothing of the size layers × positions × vocabulary ever exists: a site is read in pieces of at most ``CHUNK_BYTES`` of logits (a read-out of
your own is given one site whole). Read-outs that pool give ``pooled`` beside the values per position: what the model would answer if it
stopped at that layer.

Heads are read at ``attn.hook_result`` as what each adds to the stream: after LayerScale, or a sandwich norm with its denominator held. Not
covered: norms that a block applies to its branches' inputs only when a classifier averages patches (timm's ``fc_norm`` models).

References: nostalgebraist 2020 (logit lens); Belrose et al. 2023, arXiv 2303.08112 (tuned lens); Vilas et al. 2023, arXiv 2310.18969
(class-embedding space of ViTs); Neo et al. 2024, arXiv 2410.07149 (image positions).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.answers import check_complete, contrast
from circuitvision.data import Batch, Side
from circuitvision.digests import plain as plain_value
from circuitvision.errors import InputError
from circuitvision.model.cache import ActivationCache
from circuitvision.model.columns import MEASURES, Columns, named_pair, per_example, plain
from circuitvision.model.positions import GENERATED, Positions, PositionsLike, warn_of_empty, without_any
from circuitvision.model.sites import SiteName
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.lens.result import LensResult
from circuitvision.readout.lens.run import LensRun, measured
from circuitvision.readout.lens.sites import ordered_sites
from circuitvision.readout.lens.tuned import TunedLens
from circuitvision.readout.over_data import DataReading, answers_of, of_batch, over_data, side_of
from circuitvision.readout.patch_coords import places_of, shares_of
from circuitvision.readout.recorded import behind_cache, chosen_tower, held_as, inputs_of

if TYPE_CHECKING:
    from circuitvision.hooked import HookedModel
    from circuitvision.model.tokens import TokenMap
    from circuitvision.model.tower import Tower

NORMS = ("own", "frozen", "none", "tuned")
_SHOWN = 5
"""How many of the highest columns are kept at every place, for tables and hover texts."""


def _none() -> Tensor:
    return torch.zeros(0, dtype=torch.long)


@with_provenance
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
    aggregation: str | None = None,
    readout: Callable[[Tensor], Tensor] | None = None,
    tuned: TunedLens | None = None,
    positions: PositionsLike | Mapping[str, PositionsLike] = None,
    step: int | None = None,
    batch_size: int | None = None,
) -> LensResult | DataReading:
    """Read the answer off any site of a tower: ``lens(h) = head(norm(h))`` at every position.

    Over a data set (a :class:`~circuitvision.data.Side`, or ``Pairs`` for their clean side) one value per example is kept, the mean over
    ``positions`` (by default the class token or all patches of image towers, the last position of others), or one for each of several by name; its
    answers and foils are the targets unless others are given.

    Args:
        model: the hooked model.
        cache: a cache of one run, or the inputs of one (then the run is made here, recording what is needed), or a data set.
        tower: the tower to read; by default the language tower, or the only one there is.
        sites: kinds ("resid_post", "attn_out", "attn.hook_result", …), names or globs; by default the residual stream, where it can reach the
            output.
        norm: "own", "frozen", "none" or "tuned", see the module.
        targets: a word, class name, prompt (for the images of a dual encoder), number of a column or action dimension, the same for all
            examples; a list of those with one per example; a tuple ``("red", "blue")``, the first minus the second; a mapping that names columns,
            ``{"red": "red", "answer": [one per example]}``; or a float tensor of embeddings or directions ``[target width]``.
        top_k: instead of targets, keep the highest values at every position and whose they are (all columns, where there are fewer).
        measure: ``"logit"``, ``"logprob"`` (nats) or ``"prob"``. Read-outs that are no distribution (actions, directions) have logits only.
        aggregation: how to read a word of several tokens: "first", "mean" or "joint", see :mod:`circuitvision.model.columns`.
        readout: a read-out of your own, ``fn(resid [row pos d_model]) -> [row pos n_out]``, for towers without one.
        tuned: the trained maps for ``norm="tuned"``.
        positions: which positions are read, by default each for itself. Of others the mean over them is read (of values, with ``targets``): one
            choice, or several by name (``{"object": region, "rest": cv.regions.others(region)}``), which label the axis ``position``; see
            :mod:`circuitvision.model.positions`. Padding does not count. NaN where one is empty for an example.
        step: which pass of a cache of several (``generate``, ``sample_actions``); negative ones count from the last.
        batch_size: of a data set, how many examples run at once; None: by memory.

    Raises:
        InputError: no such tower, both or neither of ``targets`` and ``top_k``, an unknown measure or norm, a cache without what is needed, a
        target that does not exist, a tower without a read-out and neither directions nor a callable. UnknownSiteError: no such site.
    """
    side = side_of(cache)
    shared: dict[str, Any] = {"sites": sites, "norm": norm, "measure": measure, "readout": readout, "tuned": tuned}
    shared["step"] = step
    if side is not None:
        return _over_data(model, side, tower, targets, top_k, aggregation, positions, batch_size, shared)
    targets, foil = contrast(plain(targets), None)
    if foil is not None:
        pair = named_pair(targets, foil)
        shared |= {"top_k": top_k, "aggregation": aggregation, "positions": positions}
        both = logit_lens(model, cache, tower, targets=pair, **shared)
        assert isinstance(both, LensResult)
        return both.contrast(*pair)
    read_tower = chosen_tower(model, tower)
    _check_options(read_tower, norm, targets, top_k, measure, tuned, readout, step)
    if positions is not None and targets is None:
        raise InputError(
            "positions= averages the values of targets=; the highest columns have no mean, so leave it out with top_k=."
        )
    chosen = None if targets is None else _chosen(read_tower, targets, aggregation, measure, readout is not None)
    names = read_tower.stream_sites(inputs_of(cache)) if sites is None else ordered_sites(model, read_tower.name, sites)
    if targets is None and readout is None and read_tower.output_head.kind == "hidden":
        read_tower.output_head.columns(["?"])
    found = _cached(model, cache, read_tower, names, norm)
    names = _recorded_sites(found, read_tower, names, sites)
    with torch.no_grad():
        reader = LensRun(model, read_tower, found, norm, chosen, readout, tuned, step)
        shapes = {name: reader.shape(name) for name in names}
        if len(set(shapes.values())) > 1:
            raise InputError(f"Sites of different shapes are read apart; these have {shapes}.")
        parts = [_Part.read(reader, name, measure, top_k) for name in names]
    result = _result(model, reader, names, parts, measure, "none" if readout is not None and tuned is None else norm)
    return result if positions is None else _averaged(result, reader, positions)


def _averaged(lens: LensResult, reader: LensRun, positions: PositionsLike | Mapping[str, PositionsLike]) -> LensResult:
    """The lens with the mean over each choice of positions in place of every position."""
    tokens, at = _tokens(reader), lens.axes["position"]
    if tokens is None or (lens.kinds and GENERATED in lens.kinds[0]):
        raise InputError(
            "What the positions of this pass are is not known, so none can be chosen; leave positions out."
        )
    several = positions if isinstance(positions, Mapping) else {Positions.of(positions).text: positions}
    if not several:
        raise InputError("positions is empty; leave it out, or name at least one choice.")
    present = torch.from_numpy(tokens.present)[:, at]
    chosen = {name: Positions.of(spec).resolve(tokens)[:, at] & present for name, spec in several.items()}
    lost = [name for name, mask in chosen.items() if not bool(mask.any())]
    if lost:
        raise InputError(
            f"No position that is read here is one of {lost[0]!r} ({Positions.of(several[lost[0]]).text})."
        )
    count = tokens.n_examples
    examples = lens.axes["example"]
    warn_of_empty({name: len(without_any(mask, examples, count)) for name, mask in chosen.items()}, count)
    # What lies outside a choice does not count, not even as a NaN.
    means = [torch.where(own.T[:, None], lens.values, 0.0).sum(-3) / own.sum(-1) for own in chosen.values()]
    values = torch.stack(means, dim=-3)
    labels, rows = list(chosen), len(examples)
    none = torch.zeros(0, dtype=torch.long)
    return replace(
        lens,
        values=values,
        axes={**lens.axes, "position": labels},
        ids=none,
        ranks=none,
        places=torch.full((rows, len(labels), 4), -1),
        shares=torch.full((rows, len(labels), 4), float("nan"), dtype=torch.float64),
        words=[list(labels)] * rows,
        kinds=[list(labels)] * rows,
        provenance={
            **lens.provenance,
            "positions": plain_value({name: Positions.of(spec) for name, spec in several.items()}),
        },
    )


def _over_data(
    model: HookedModel,
    side: Side,
    tower: str | None,
    targets: Any,
    top_k: int | None,
    aggregation: str | None,
    positions: Any,
    batch_size: int | None,
    options: Mapping[str, Any],
) -> DataReading:
    """The lens of every example of a data set."""
    if top_k is not None:
        raise InputError(
            "The highest columns of many examples have no mean: give targets=, or answers to the data set, and leave top_k out."
        )
    if targets is None and side.answers is None:
        raise InputError("This data set holds no answers, so say what is followed, such as targets=('red', 'blue').")
    if targets is None:
        check_complete(side)
    read_tower = chosen_tower(model, tower)
    targets, foil = contrast(plain(targets), None)
    targets = per_example(targets, len(side)) if foil is None else (targets, foil)

    def read(batch: Batch, rows: list[int]) -> LensResult:
        own = answers_of(batch) if targets is None else of_batch(targets, rows, len(side))
        found = logit_lens(
            model, batch.inputs, read_tower.name, targets=own, aggregation=aggregation or side.combine, **options
        )
        assert isinstance(found, LensResult)
        return found

    told = {"tower": read_tower.name, **{name: value for name, value in options.items() if isinstance(value, str)}}
    method = f"logit_lens({', '.join(f'{name}={value}' for name, value in told.items())})"
    return over_data(model, side, read, positions=positions, batch_size=batch_size, method=method)


def _check_options(
    read_tower: Tower,
    norm: str,
    targets: Any,
    top_k: int | None,
    measure: str,
    tuned: TunedLens | None,
    readout: Callable[[Tensor], Tensor] | None,
    step: int | None,
) -> None:
    if (targets is None) == (top_k is None):
        raise InputError(
            "Give either targets=, the word, class or number to follow ('red'; several by name, {'red': 'red', 'blue': 'blue'}), or top_k=, how many "
            "of the highest to name (5)."
        )
    if top_k is not None and (not isinstance(top_k, Integral) or isinstance(top_k, bool) or top_k < 1):
        raise InputError(f"top_k is a whole number from 1, not {top_k!r}.")
    if step is not None and (not isinstance(step, Integral) or isinstance(step, bool)):
        raise InputError(f"step= is the number of one pass, counted from 0, not {step!r}.")
    if measure not in MEASURES:
        raise InputError(f"Unknown measure {measure!r}; choose one of {', '.join(MEASURES)}.")
    if norm not in NORMS:
        raise InputError(f"Unknown norm {norm!r}; choose one of {', '.join(NORMS)}.")
    if (norm == "tuned") != isinstance(tuned, TunedLens):
        raise InputError("norm='tuned' goes with tuned=TunedLens.train(model, dataset, tower), and only with it.")
    if tuned is not None and tuned.tower != read_tower.name:
        raise InputError(f"This tuned lens was trained on the {tuned.tower} tower, not on {read_tower.name}.")
    if readout is not None and not callable(readout):
        raise InputError(f"readout= is a function fn(resid [row pos d_model]) -> [row pos n_out], not {readout!r}.")
    if readout is not None and norm == "frozen":
        raise InputError(
            "A read-out of your own is given the vectors as they are, and freezes its norm itself: leave norm= out."
        )
    unnamed = readout is None and read_tower.output_head.link == "none"
    directions = isinstance(targets, Tensor) and not read_tower.output_head.compares
    if measure != "logit" and (unnamed or directions):
        raise InputError(f"What the {read_tower.name} tower says here is no distribution; use measure='logit'.")


def _chosen(read_tower: Tower, targets: Any, aggregation: str | None, measure: str, own_columns: bool) -> Columns:
    chosen = read_tower.output_head.columns(targets, aggregation=aggregation, own_columns=own_columns)
    if chosen.aggregation == "joint" and measure == "logit":
        raise InputError("aggregation='joint' adds log-probabilities; use measure='logprob' or 'prob'.")
    return chosen


def _cached(
    model: HookedModel, cache: ActivationCache | Mapping[str, Any], read_tower: Tower, names: Sequence[str], norm: str
) -> ActivationCache:
    """The cache given, or that of a run recording the sites and what their reading depends on."""
    if isinstance(cache, ActivationCache):
        return cache
    needed = [*names, *read_tower.read_sites(inputs_of(cache))]
    if read_tower.output_head.compares:
        needed += [f"{name}.hook_readout" for name in model.towers]
    with torch.no_grad():
        return model.run_with_cache(cache, names_filter=list(dict.fromkeys(needed)))[1]


def _recorded_sites(
    cache: ActivationCache, read_tower: Tower, names: Sequence[str], requested: str | Sequence[str] | None
) -> list[str]:
    """Those of the sites that the cache holds: of a kind or glob, layers that were not recorded are left out.

    Raises:
        InputError: it holds none of them, or not one that was named in full.
    """
    there = [name for name in names if held_as(cache, name)]
    if not there and requested is None:
        raise InputError(
            f"The cache holds no residual stream of the {read_tower.name} tower; "
            f"run with names_filter=model.{read_tower.name}.stream_sites(), or with all sites."
        )
    entries = {requested} if isinstance(requested, str) else set(requested or ())
    full = [name for name in names if name in entries or name.removeprefix(f"{read_tower.name}.") in entries]
    lost = [name for name in full if name not in there] or ([] if there else list(names))
    if lost:
        raise InputError(
            f"The cache does not hold {lost[0]}; add it to names_filter, or give the inputs in place of the cache."
        )
    return there


@dataclass(frozen=True)
class _Part:
    """One site's share of a lens, with a leading head axis."""

    values: Tensor
    ids: Tensor
    ranks: Tensor
    pooled: tuple[Tensor, Tensor, Tensor] | None
    size: int

    @classmethod
    def read(cls, reader: LensRun, name: str, measure: str, top_k: int | None) -> _Part:
        value = reader.site(name)
        per_head = value.movedim(2, 0) if value.ndim == 4 else value[None]
        examples = reader.examples(value.shape[0])
        heads, size = [], 0
        for vectors in per_head:
            blocks: dict[int, list[tuple[Tensor, Tensor, Tensor]]] = {}
            for rows, logits in reader.columns(vectors, name):
                size = logits.shape[-1]
                blocks.setdefault(rows.start or 0, []).append(_summary(reader, logits, examples[rows], measure, top_k))
            by_row = [[torch.cat(kept, dim=1) for kept in zip(*found, strict=True)] for found in blocks.values()]
            heads.append([torch.cat(kept) for kept in zip(*by_row, strict=True)])
        pooled = None
        if value.ndim == 3 and value.shape[1] > 0:
            output = reader.pooled(value, name)
            if output is not None:
                pooled = tuple(part[:, 0] for part in _summary(reader, output[:, None], examples, measure, top_k))
        values, ids, ranks = (torch.stack(column) for column in zip(*heads, strict=True))
        return cls(values, ids, ranks, pooled, size)  # type: ignore[arg-type]


def _summary(
    reader: LensRun, logits: Tensor, examples: Tensor, measure: str, top_k: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What is kept of the logits of some positions: values, highest columns, ranks of the targets."""
    scored = measured(logits, measure, reader.link)
    best = scored.topk(min(top_k or _SHOWN, scored.shape[-1]), dim=-1)
    if reader.targets is None:
        return best.values.cpu(), best.indices.cpu(), torch.zeros(*best.values.shape[:-1], 0, dtype=torch.long)
    reader.targets.check_columns(scored.shape[-1])
    values = reader.targets.read(
        measured(logits, "logprob", reader.link) if reader.targets.aggregation == "joint" else scored, examples
    )
    if reader.targets.aggregation == "joint" and measure == "prob":
        values = values.exp()
    # Counting in 32 bits: a sum of truth values makes a copy of all of them in the type it counts in.
    higher = [1 + (scored > values[..., i, None]).sum(-1, dtype=torch.int32) for i in range(values.shape[-1])]
    # What is not a number has no rank, and several columns together have none among single ones.
    there = ~values.isnan() & reader.targets.ranked(examples)[:, None].to(values.device)
    ranks = torch.stack(higher, dim=-1).long().where(there, 0)
    return values.cpu(), best.indices.cpu(), ranks.cpu()


def _result(
    model: HookedModel, reader: LensRun, names: Sequence[str], parts: Sequence[_Part], measure: str, norm: str
) -> LensResult:
    axis, labels = _labels(reader.tower.name, names)
    values, ids, ranks = (torch.stack([getattr(part, what) for part in parts]) for what in ("values", "ids", "ranks"))
    heads = {"head": list(range(values.shape[1]))}
    if all(SiteName.parse(name).site != "attn.hook_result" and values.shape[1] == 1 for name in names):
        values, ids, ranks, heads = values[:, 0], ids[:, 0], ranks[:, 0], {}
    rows, length = values.shape[-3:-1]
    step = reader.number_of_pass(names[0])
    places, example, positions, words, kinds = _where(reader, rows, length, step)
    shares = _shares(reader, places)
    targets = reader.targets
    last = {"rank": list(range(1, values.shape[-1] + 1))} if targets is None else {"target": targets.labels}
    pooled = [part.pooled for part in parts]
    kept = (
        [torch.stack(column).movedim(1, -1) for column in zip(*pooled, strict=True)]
        if None not in pooled
        else [_none()] * 3
    )  # type: ignore[arg-type]
    unique = sorted({int(number) for number in torch.cat([ids.flatten(), kept[1].flatten()]).unique()})
    return LensResult(
        values=values.movedim(-3, -1),
        axes={axis: labels, **heads, "position": positions, **last, "example": example},
        provenance=describe(model, method=_method(reader, measure, norm, step), inputs=(reader.cache.inputs,)),
        tower=reader.tower.name,
        measure=measure,
        ids=ids.movedim(-3, -1),
        places=places,
        shares=shares,
        norm=norm,
        ranks=ranks.movedim(-3, -1) if targets is not None else _none(),
        n_outputs=parts[0].size,
        pooled=kept[0],
        pooled_ids=kept[1],
        pooled_ranks=kept[2] if targets is not None else _none(),
        words=words,
        kinds=kinds,
        columns=reader.kind,
        step=step,
        names={str(n): str(n) for n in unique}
        if reader.kind == "columns"
        else reader.tower.output_head.names(unique, targets),
    )


def _method(reader: LensRun, measure: str, norm: str, step: int | None) -> str:
    options = {"tower": reader.tower.name, "norm": norm, "measure": measure}
    if step is not None:
        options["step"] = str(step)
    if reader.custom is not None:
        options["readout"] = getattr(reader.custom, "__qualname__", type(reader.custom).__name__)
    if reader.targets is not None and int((reader.targets.ids >= 0).sum(-1).max()) > 1:
        options["aggregation"] = reader.targets.aggregation
    return f"logit_lens({', '.join(f'{name}={value}' for name, value in options.items())})"


def _labels(tower: str, names: Sequence[str]) -> tuple[str, list[Any]]:
    """The first axis: layers where all sites are of one kind of block site (what enters block 0 counts as "input"), names otherwise."""
    sites = [SiteName.parse(name) for name in names]
    kinds = {site.site for site in sites if site.layer is not None}
    others = [site for site in sites if site.layer is None]
    if len(kinds) == 1 and all(site.site == "hook_input" for site in others):
        return "layer", ["input" if site.layer is None else site.layer for site in sites]
    return "site", [name.removeprefix(f"{tower}.") for name in names]


def _tokens(reader: LensRun) -> TokenMap | None:
    """What the positions that are read are: the tower's, or those behind a connector that merges them."""
    connector = reader.tower.connector
    if connector is None or not reader.cache.inputs or not reader.model.family.packing.merges("hook_out"):
        return reader.tokens
    return reader.model.tokens(reader.cache.inputs)[connector.name]


def _shares(reader: LensRun, places: Tensor) -> Tensor:
    """Where the patches among the positions kept lie in their picture."""
    tokens = _tokens(reader)
    if tokens is None or not bool((places >= 0).any()):
        return torch.full(places.shape, float("nan"), dtype=torch.float64)
    return shares_of(tokens, tokens.n_positions - places.shape[1])


def _where(
    reader: LensRun, rows: int, length: int, step: int | None
) -> tuple[Tensor, list[int], list[Any], list[list[str]], list[list[str]]]:
    """Places, examples, numbers, words and kinds of the positions kept.

    A site or projector without the first positions lacks the tower's prefix; a run behind a cache what the cache holds; a later pass of a text
    tower holds what it generated.
    """
    tokens = _tokens(reader)
    if tokens is None or tokens.n_rows != rows or length > tokens.n_positions:
        nowhere = torch.full((rows, length, 4), -1)
        blank = [[""] * length for _ in range(rows)]
        return nowhere, list(range(rows)), list(range(length)), blank, blank
    example = [int(number) for number in tokens.example]
    later = bool(step) or not behind_cache(reader.tower, reader.cache, length)
    if later and length < tokens.n_positions and np.isin(tokens.kind, ("text", "unknown")).any():
        first = tokens.n_positions + length * max((step or 1) - 1, 0)
        generated = [["generated"] * length for _ in range(rows)]
        return torch.full((rows, length, 4), -1), example, list(range(first, first + length)), generated, generated
    dropped = tokens.n_positions - length
    words = [tokens.labels(row)[dropped:] for row in range(rows)]
    kinds = [[str(kind) for kind in tokens.kind[row, dropped:]] for row in range(rows)]
    return places_of(tokens, dropped), example, list(range(dropped, tokens.n_positions)), words, kinds

"""Relevance read off attention: patterns weighted by the gradient of the metric with respect to them.

Both methods run the model's eager attention, whose pattern is a part of the computation. The gradient is of a pattern as if its entries were
free: it ignores that they come out of a softmax and sum to 1. Only entries that the mask leaves open count: a word that stands before another
one cannot look at it, however much it would raise the metric, and padding that nothing reads neither looks nor is looked at. Values are never
negative, have no unit, and compare positions of one image, not images.

Key positions need not be the tower's own: an action expert also reads keys that another tower left in the cache. Those come first, as
positions of that tower.

What a position says can reach the answer without attention: in a vision tower whose patches a language tower reads one by one, the patch that
matters hands itself on. LeGrad asks about attention inside the tower alone and is misled there (on shapes-llava its maximum lies on the object
in 3 % of pictures, where chance is 6 %); ask it of the language tower. Chefer relevance goes through both.

Not covered: the rules of Chefer et al. for co-attention, relevance by layer-wise propagation (Chefer et al. 2021, arXiv 2012.09838), TokenTM
(Wu et al. 2024), whose weights by the change of each token's length and direction we could not check against a reference.

References: LeGrad, Bousselham et al. 2024 (arXiv 2404.03214); generic attention explainability, Chefer, Gur and Wolf 2021 (arXiv 2103.15679).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision import metrics
from circuitvision.errors import InputError
from circuitvision.model.registrations import HookPoint
from circuitvision.model.tokens import TokenMap
from circuitvision.model.weights import check_gradients
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.patch_coords import places_of, shares_of
from circuitvision.readout.recorded import real_queries
from circuitvision.readout.relevance.result import Relevance, warn_undefined
from circuitvision.readout.relevance.variables import checked_tower, differentiating, gradient_of, usable, wide

Readout = Callable[[Tensor, Any], Tensor]


@with_provenance
def legrad(
    model: Any,
    inputs: Mapping[str, Any],
    metric: Any,
    *,
    tower: str | None = None,
    layers: int | Sequence[int] | str | None = None,
    score: str = "layer",
    readout: Readout | None = None,
) -> Relevance:
    """How much more attention to a position would raise the score, over layers, heads and queries.

    ``relevance[j] = mean over layers l, heads h, queries i of ReLU(∂s_l / ∂A_l[h, i, j])``, with 0 where the mask forbids ``i`` to look at ``j``;
    padding is no query, but where the family reads it (the last position of SigLIP's texts). ``s_l`` is the metric of what the tower would
    answer if it stopped after layer ``l`` (``score="layer"``, as in the paper: each layer is asked for its own share), or with
    ``score="output"`` the metric of the output itself, one backward pass for all layers.

    The released code differs in three places. It takes the last two layers, sums over layers and stretches each map to 0 … 1; the last two
    change no order. For CLIP its ``s_l`` reads the mean over tokens where the model reads the class token; here that is ``readout=lambda
    resid, cache: model.vision.readout(resid.mean(1, keepdim=True), context=cache)``. For SigLIP it takes the pooling's pattern alone
    (``layers="pool"``), and blanks what an empty prompt marks as well: subtract that prompt's column in the metric.

    Args:
        model, inputs, metric: as in :func:`~circuitvision.readout.relevance.gradients.gradient_times_activation`.
        tower: by default the first that reads images.
        layers: one number or several; by default all whose pattern reaches the output. ``"pool"`` is an attention pooling's own pattern.
        score: ``"layer"`` or ``"output"``.
        readout: ``readout(resid, cache)`` gives what the metric reads from a residual stream ``[row position d_model]``; by default the tower's
            own read-out, which must end in the model's output. ``cache`` holds the run's inputs and what read-outs need besides the residual.

    Raises:
        InputError: no such tower or layer; a tower whose read-out is not the model's output, with ``score="layer"`` and no ``readout``.
    """
    if score not in ("layer", "output"):
        raise InputError(f"score={score!r} is not understood: 'layer' or 'output'.")
    tower = checked_tower(model, tower)
    names = _patterns(model, inputs, tower, layers)
    bound, inputs = metrics.bind(metric, model), usable(model, inputs)
    if score == "output" or isinstance(layers, str):
        patterns, slopes, values = _with_gradients(model, inputs, bound, names)
    else:
        patterns, slopes, values = _of_layers(model, inputs, bound, tower, names, readout)
    found = torch.stack(
        [_raised(slope, _open(model, inputs, tower, pattern)) for slope, pattern in zip(slopes, patterns, strict=True)]
    ).mean(0)
    method = f"LeGrad ({'all layers' if layers is None else f'layers {layers}'}, score of the {score})"
    return _result(model, inputs, metric, tower, found, values, method)


def _open(model: Any, inputs: Mapping[str, Any], tower: str, pattern: Tensor) -> Bool[Tensor, "row query key"]:
    """The pairs whose attention could be another: some head of the layer looks there, and the query is no padding."""
    # Not "> 0": what is no number shall not look like a mask.
    looked = ~(pattern.detach().amax(1) <= 0).cpu()
    real = torch.from_numpy(real_queries(model.towers[tower], model.tokens(inputs)[tower]))
    # A pool's one query is no position.
    return looked & real[:, :, None] if looked.shape[1] > 1 else looked


def _raised(slope: Float[Tensor, "row head query key"], is_open: Bool[Tensor, "row query key"]) -> Tensor:
    """The mean over heads and queries of the positive slope, ``[row key]``."""
    gained = torch.where(is_open, wide(slope).clamp_min(0).mean(1), 0.0)
    return gained.sum(1) / is_open.any(-1).sum(-1, keepdim=True).clamp_min(1)


@with_provenance
def chefer_relevance(model: Any, inputs: Mapping[str, Any], metric: Any, *, tower: str | None = None) -> Relevance:
    """``R ← R + Ā R`` with ``Ā = mean over heads of ReLU(∂metric/∂A ⊙ A)``, from ``R = I`` through all layers; the rows that are read.

    In the tower that ends in the output these are the positions of its last layer that the metric depends on, found by the gradient (class
    token, last word, or the mean over the patches that are pooled), less ``I``: a position's relevance to itself before any attention. A
    pooling by attention weighs the rows with its own ``Ā``.

    A tower that another one reads (vision by language, a prompt by an action expert) is read as that one finds relevant: its rows are weighed
    with the reader's relevance of these positions. That is the rule above for the two as one sequence of layers, where the reader takes over
    whole positions, and an approximation where it reads every layer's keys.

    Raises:
        InputError: no such tower.
    """
    tower = checked_tower(model, tower)
    inputs = usable(model, inputs)
    found, values = _rolled(model, inputs, metrics.bind(metric, model), tower)
    return _result(model, inputs, metric, tower, found, values, "Chefer relevance")


def _rolled(model: Any, inputs: Mapping[str, Any], metric: Any, tower: str) -> tuple[Tensor, Tensor]:
    """Relevance of the keys of a tower, ``[row key]``, and the metric per example."""
    names = _patterns(model, inputs, tower, None)
    beside = [name for name in model.sites() if name == f"{tower}.pool.attn.hook_pattern"]
    reader = None if beside else _reader(model, inputs, tower)
    beside = beside or ([] if reader else [_last_stream(model, inputs, tower)])
    cached, slopes, values = _with_gradients(model, inputs, metric, [*names, *beside])
    layers = len(names)
    shares = [_moved(slope, pattern) for slope, pattern in zip(slopes[:layers], cached[:layers], strict=True)]
    rolled = _relevance_rollout(shares)
    if reader:
        weights = _read_by(model, inputs, metric, tower, reader)
    elif beside[0].endswith("hook_pattern"):
        weights = _moved(slopes[-1], cached[-1])[:, 0]
    else:
        weights, rolled = _read(wide(slopes[-1])), rolled - _identity(shares[0])
    return torch.einsum("rp,rpk->rk", weights.to(rolled), rolled), values


def _moved(slope: Tensor, pattern: Tensor) -> Float[Tensor, "row query key"]:
    """``Ā``: the mean over heads of what the attention that there is adds to the metric."""
    return (wide(slope) * wide(pattern)).clamp_min(0).mean(1)


def _reader(model: Any, inputs: Mapping[str, Any], tower: str) -> str | None:
    """The tower that takes over positions of this one: as its own patches, or as keys from the cache."""
    maps = model.tokens(inputs)
    for connector in model.flow.connectors:
        name = connector.target
        if tower not in connector.sources or name not in maps:
            continue
        if connector.via == "cache" or bool((maps[name].kind == "patch").any()):
            return name
    return None


def _read_by(model: Any, inputs: Mapping[str, Any], metric: Any, tower: str, reader: str) -> Float[Tensor, "row pos"]:
    """How relevant the positions of a tower are to the one that reads them."""
    found, _ = _rolled(model, inputs, metric, reader)
    maps = _key_maps(model, inputs, reader, found.shape[1])
    own = model.tokens(inputs)[tower]
    if maps[0].tower == tower:
        return found[:, : own.n_positions]
    # A position that mixes patches hands its relevance on by their weights.
    sets, first = maps[-1].patches, found.shape[1] - maps[-1].n_positions
    weights = torch.zeros(own.n_rows, own.n_positions, dtype=found.dtype)
    shares = found[sets.row, sets.position + first] * torch.from_numpy(sets.weight).to(found.dtype)
    # Patches are said as positions of the first image tower; another one has its own count of prefix tokens before them.
    prefix = {name: one.cfg.n_prefix for name, one in model.towers.items() if one.stack.image}
    at = torch.from_numpy(sets.source_position) + prefix[tower] - next(iter(prefix.values()))
    return weights.index_put_((torch.from_numpy(sets.source_row), at), shares, accumulate=True)


def _relevance_rollout(shares: Sequence[Float[Tensor, "row query key"]]) -> Float[Tensor, "row query key"]:
    """``R ← R + Ā R`` from ``R = I`` over the layers' ``Ā``, not normalised.

    Where there are more keys than queries, the first keys are another tower's and stay what they are: rows of the identity.

    Raises:
        InputError: no layer.
    """
    if not len(shares):
        raise InputError("A rollout needs the shares of at least one layer.")
    rolled = _identity(shares[0])
    own = shares[0].shape[1]
    for share in shares:
        before = share[..., :-own] if share.shape[-1] > own else None
        step = share[..., share.shape[-1] - own :] @ rolled
        if before is not None:
            step[..., : before.shape[-1]] += before
        rolled = rolled + step
    return rolled


def _identity(share: Tensor) -> Tensor:
    rows, queries, keys = share.shape
    one = torch.zeros(queries, keys, dtype=share.dtype)
    one[:, keys - queries :] = torch.eye(queries, dtype=share.dtype)
    return one.expand(rows, -1, -1)


def _read(slope: Float[Tensor, "row pos d_model"]) -> Float[Tensor, "row pos"]:
    """Equal weights on the positions the metric depends on."""
    read = (slope != 0).any(-1).to(slope.dtype)
    return read / read.sum(-1, keepdim=True).clamp_min(1)


def _patterns(model: Any, inputs: Mapping[str, Any], tower: str, layers: int | Sequence[int] | str | None) -> list[str]:
    """The patterns of the layers asked for, in order.

    Raises:
        InputError: a layer that does not exist or cannot reach the output.
    """
    if isinstance(layers, str):
        name = f"{tower}.pool.attn.hook_pattern"
        if layers != "pool" or name not in model.sites():
            raise InputError(
                f"layers={layers!r} is not understood by the {tower} tower: numbers, or 'pool' where it pools by attention."
            )
        return [name]
    count = model.towers[tower].cfg.n_layers
    requested = list(layers) if isinstance(layers, Iterable) else list(range(count)) if layers is None else [layers]
    if any(isinstance(layer, bool) or not isinstance(layer, Integral) for layer in requested):
        raise InputError(f"layers={layers!r} is not understood: the {tower} tower has layers 0 to {count - 1}.")
    numbers = list(dict.fromkeys(int(layer) + count if layer < 0 else int(layer) for layer in requested))
    names = [f"{tower}.blocks.{layer}.attn.hook_pattern" for layer in numbers]
    live = [
        name
        for name, layer in zip(names, numbers, strict=True)
        if 0 <= layer < count and not model.is_dead(name, inputs)
    ]
    if not live or (layers is not None and len(live) < len(names)):
        raise InputError(
            f"layers={layers} of the {tower} tower: it has layers 0 to {count - 1}, and not all of those asked for reach the output."
        )
    return live


def _last_stream(model: Any, inputs: Mapping[str, Any], tower: str) -> str:
    names = [f"{tower}.blocks.{layer}.hook_resid_post" for layer in range(model.towers[tower].cfg.n_layers)]
    return [f"{tower}.hook_input", *(name for name in names if not model.is_dead(name, inputs))][-1]


def _with_gradients(
    model: Any, inputs: Mapping[str, Any], metric: Any, names: Sequence[str]
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Values of the sites, the metric's gradient there, and the metric per example."""
    kept: list[Tensor] = []

    def keep(logits: Tensor) -> Tensor:
        kept.append(metrics.evaluate(metric, logits, inputs))
        return kept[0]

    with differentiating():
        _, cache = model.run_with_cache(inputs, names_filter=list(names), incl_bwd=True, metric=keep)
    return [cache[name] for name in names], [cache[f"{name}_grad"] for name in names], kept[0].detach()


def _of_layers(
    model: Any, inputs: Mapping[str, Any], metric: Any, tower: str, names: Sequence[str], readout: Readout | None
) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Each layer's pattern, the gradient of its own score with respect to it, and the metric of the output."""
    read = readout or (lambda resid, cache: model.towers[tower].readout(resid, context=cache))
    posts = [name.replace("attn.hook_pattern", "hook_resid_post") for name in names]
    leaves: dict[str, Tensor] = {}
    streams: dict[str, Tensor] = {}

    def start(pattern: Tensor, hook: HookPoint) -> Tensor:
        leaves[hook.name] = pattern.detach().requires_grad_(True)
        return leaves[hook.name]

    def stream(resid: Tensor, hook: HookPoint) -> None:
        streams[hook.name] = resid

    # What read-outs may need besides the residual: the other tower's embedding, and feature layers.
    beside = [name for name in model.sites() if name.endswith(".hook_readout")]
    beside += model.towers[tower].read_sites(inputs)
    hooks = [*((name, start) for name in names), *((name, stream) for name in posts)]
    check_gradients(model.module)
    with differentiating(), model.hooks(fwd_hooks=hooks):
        logits, cache = model.run_with_cache(inputs, names_filter=list(dict.fromkeys(beside)), keep_graph=True)
        values = metrics.evaluate(metric, logits, inputs).detach()
        slopes = []
        for name, post in zip(names, posts, strict=True):
            answer = read(streams[post], cache)
            if readout is None and answer.shape != logits.shape:
                raise InputError(
                    f"The {tower} tower's read-out has the shape {tuple(answer.shape)}, the output {tuple(logits.shape)}: the metric "
                    "cannot read single layers. Use score='output', or give readout(resid, cache)."
                )
            slopes += gradient_of(metrics.evaluate(metric, answer, inputs).sum(), [leaves[name]])
    return [leaves[name].detach() for name in names], slopes, values


def _key_maps(model: Any, inputs: Mapping[str, Any], tower: str, keys: int) -> list[TokenMap]:
    """The token maps of the key positions: the tower's own, and before it one whose keys it reads from the cache."""
    maps = model.tokens(inputs)
    own = maps[tower]
    if own.n_positions == keys:
        return [own]
    before = list(model.towers)[: list(model.towers).index(tower)]
    other = [
        maps[name] for name in reversed(before) if name in maps and maps[name].n_positions + own.n_positions == keys
    ]
    if not other:
        raise InputError(
            f"The {tower} tower attends to {keys} keys, which are not its own {own.n_positions} positions."
        )
    return [other[0], own]


def _result(
    model: Any, inputs: Mapping[str, Any], metric: Any, tower: str, found: Tensor, values: Tensor, method: str
) -> Relevance:
    maps = _key_maps(model, inputs, tower, found.shape[1])
    warn_undefined(found)
    return Relevance(
        values=found.T,
        axes={"position": list(range(found.shape[1])), "example": maps[-1].example.tolist()},
        provenance=describe(model, method=method, metric=metric, inputs=(inputs,), tower=tower),
        method=method,
        tower=tower,
        site=f"{tower}.blocks.*.attn.hook_pattern",
        metric_value=wide(values),
        places=torch.cat([places_of(tokens) for tokens in maps], dim=1),
        shares=torch.cat([shares_of(tokens) for tokens in maps], dim=1),
        labels=[[label for tokens in maps for label in tokens.labels(row)] for row in range(found.shape[0])],
        kinds=[[kind for tokens in maps for kind in tokens.kind[row].tolist()] for row in range(found.shape[0])],
    )

"""Edits as values: what to change in a run, said once, before any run.

Every function here returns an :class:`Edit`: immutable, comparable, printable in one line, saved by :func:`save` and read back by :func:`load`. An
edit holds no model; ``model.run(inputs, [edits])``, ``model.generate(inputs, edits=[…])``, ``model.sample_actions(inputs, edits=[…])`` and
``model.sweep(inputs, groups, metric)`` bind it to one.

Common to all:

* ``site`` is a name or a glob (``"language.blocks.*.attn.hook_z"``: the same edit at every matching site), or a head, MLP or attention layer in any
  spelling of :mod:`circuitvision.model.names` (``"vision L1H3"``, ``"v.a1.h3"``, ``("vision", 1, 3)``, ``"language L2.mlp"``): what it adds
  (``attn.hook_z`` of that head, ``hook_mlp_out``, ``hook_attn_out``). Without a tower it fits models of one tower;
* ``heads`` count the head axis of the site itself (key/value heads at ``hook_k`` and ``hook_v``), or are spelled heads of its layer;
* ``positions`` are those of the tower, absolute, padding included: an int, ints, a slice, ``"last"``, a bool mask ``[batch, pos]``, or a selection of
  a token map such as ``model.tokens(inputs)["vision"].image(0).box(8, 8, 24, 24)``; None is every position, generated ones too. A site that holds
  only some of them (a projector behind a class token, an output head, patch embeddings: ``model.positions(site, inputs)`` lists them) maps them to
  its own axis; a number it does not hold is an error, a slice, mask or selection leaves out what it does not hold;
* ``keys`` likewise, cached positions included; keys that an action tower sees before its own are named by their tower, ``("language", positions)``
  or a selection of it, and None is every key, those too;
* ``steps`` are the passes of the tower in which the edit acts: ``"prefill"`` (the prompt), ``"decode"`` (every later token), or numbers (denoising
  steps of an action tower; 0 is the prompt elsewhere); None is every pass. A single run is one prefill.

Edits act in the order given, each on what the ones before it left. An edit that *sets* entries another edit of the same site changed before it is
refused.

Tensors of edits (a source, a direction and its scale, a factor, a bias, a basis, the parameters of a dictionary) are held themselves, never copied:
one that requires a gradient gets it from a run whose output has one, and may be trained in place while the edit is used again and again. Other
tensors must stay as they are once an edit is made from them.

Sources: interchange (Geiger et al. 2021, arXiv 2106.02997), steering (Turner et al. 2023, arXiv 2308.10248), attention knockout (Geva et al. 2023,
arXiv 2304.14767); the functions name the papers of their variants.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.data.pairs import Pairs
from circuitvision.data.sides import Side
from circuitvision.errors import InputError, warn
from circuitvision.model.averages import average_of
from circuitvision.model.cache import ActivationCache
from circuitvision.model.edits.attention import AddAttentionBias, BlockAttention, DeleteTokens, ScaleAttention
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.files import dump, from_dict, load, parse, restore, save, to_dict
from circuitvision.model.edits.noise import add_noise
from circuitvision.model.edits.values import (
    SideSource,
    Steps,
    StepsLike,
    TensorRef,
    TensorRefMapping,
    heads_of,
    held,
)
from circuitvision.model.edits.writes import (
    Ablate,
    Apply,
    Freeze,
    Overwrite,
    Permute,
    Project,
    Renormalise,
    Replace,
    Scale,
    Steer,
)
from circuitvision.model.names import Component, NodeName, component, is_component, site_of, spelled
from circuitvision.model.positions import Positions, PositionsLike
from circuitvision.model.regions import Region
from circuitvision.model.selection import Selection
from circuitvision.model.sites import SiteName, is_glob, matches

Heads = Any
"""None for all, numbers of the site's head axis, or spelled heads."""


def _at(site: Component, heads: Heads, positions: PositionsLike, steps: StepsLike) -> dict[str, Any]:
    """Where an edit acts: its site and heads, from names of either, its positions and its steps."""
    of_site: int | None = None
    if not isinstance(site, str) or is_component(site):
        site, of_site = site_of(site)
    if of_site is not None:
        if heads is not None:
            raise InputError(f"The site names head {of_site} already; leave heads out.")
        heads = of_site
    return {"site": site, **_where(_numbers(heads, site), positions, steps)}


def _where(heads: Heads, positions: PositionsLike, steps: StepsLike) -> dict[str, Any]:
    return {"heads": heads_of(heads), "positions": Positions.of(positions), "steps": Steps.of(steps)}


def _numbers(heads: Heads, site: str) -> Heads:
    """Heads of a site by number; spelled ones must be of its tower and layer."""
    nodes, numbers = _taken_apart(heads)
    name = SiteName.parse(site)
    for node in nodes:
        if (node.tower or name.tower, node.layer) != (name.tower, name.layer):
            raise InputError(
                f"{spelled(node)} is no head of {site}; heads of several layers are several edits: one for each head, with the head in "
                "place of the site."
            )
    return numbers


def _taken_apart(heads: Any) -> tuple[list[NodeName], Heads]:
    """The spelled ones among heads, and all of them as numbers."""
    if isinstance(heads, (Tensor, np.ndarray)):
        return [], heads.reshape(-1).tolist()
    if not isinstance(heads, NodeName) and not hasattr(heads, "__iter__"):
        return [], heads
    single = isinstance(heads, (str, NodeName)) or (
        isinstance(heads, tuple) and is_component(heads) and len(heads) == 3
    )
    given: list[Any] = [heads] if single else [*heads]
    nodes = [component(head) for head in given if not isinstance(head, (int, np.integer))]
    for node in nodes:
        if node.kind not in ("head", "kv_head"):
            raise InputError(f"{spelled(node)} is no head.")
    found = iter(nodes)
    return nodes, [head if isinstance(head, (int, np.integer)) else next(found).head for head in given]


def _gain(value: Any) -> Any:
    """A number as it is, that of a single-element tensor likewise; a larger tensor, and one that asks for a gradient, is held."""
    if isinstance(value, Tensor) and (value.requires_grad or value.numel() != 1):
        return held(value)
    return float(value) if isinstance(value, (int, float, Tensor, np.generic)) else held(value)


def _source(site: str, source: Any) -> Any:
    """A source as held values: the one tensor of an exact site, or one per name for a glob; a side of pairs is read when it is run."""
    if hasattr(source, "batches"):
        return SideSource(getattr(source, "clean", source))
    if not isinstance(source, Mapping):
        return held(source)
    cache: Any = source
    exact = not is_glob(site)
    if exact and isinstance(cache, ActivationCache) and site.startswith("blocks.") and cache.model is not None:
        return held(cache[cache.model.sites(site)[0]])
    names = [site] if exact else cache.names() if isinstance(cache, ActivationCache) else list(cache)
    found = {}
    for name in names:
        if exact or matches(site, name):
            value = cache[name]
            if not isinstance(value, Tensor):
                raise InputError(f"The source of {name} is a recording of several passes; take one of them.")
            found[name] = value
    if not found:
        raise InputError(f"The source holds nothing that matches {site!r}.")
    return held(found[site]) if exact else TensorRefMapping.of(found)


def replace(
    site: Component,
    source: Any,
    *,
    heads: Heads = None,
    positions: PositionsLike = None,
    steps: StepsLike = None,
) -> Edit:
    """Interchange: the selected entries take the values they have in ``source``.

    ``x' = source``. ``source`` is a cache (its value at the site), a tensor that broadcasts to the site's whole shape, or a number. It covers the
    positions it has: with a prompt's source, tokens generated later keep their own values. In a sweep over a data set it may be a side of pairs
    (``pairs.clean``): the values that the same examples have there, at the positions that belong together.
    """
    where = _at(site, heads, positions, steps)
    return Replace(**where, source=_source(where["site"], source))


def ablate(
    site: Component,
    method: Any = "zero",
    *,
    dataset: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Side | Pairs | None = None,
    average: str | Iterable[str] | Selection | Region = "position",
    seed: int = 0,
    neurons: int | Iterable[int] | None = None,
    heads: Heads = None,
    positions: PositionsLike = None,
    steps: StepsLike = None,
) -> Edit:
    """Constant ablation: the selected entries lose what they say about this example.

    ``method`` is ``"zero"``; ``"mean"``, over what is there in ``dataset`` (a :class:`~circuitvision.data.Side`, or ``Pairs`` for their clean side,
    run in batches once; inputs, or a sequence of inputs of any lengths) or in the run itself; ``"resample"``, the value in another example of the
    run, or of a data set (drawn by the seed and by what the example itself is, so the same in every batch); a tensor, number or cache, as in
    :func:`replace`; or ``"heads"``, the mean of the other heads. The last depends on the basis of the value space, which means nothing to the model
    (V-SEAM, arXiv 2509.14837, uses it), and warns.

    ``average`` says what the mean goes over: the rows, for each position (``"position"``); positions too (``"all"``), those of one kind or several
    (``"patch"``, ``["patch", "text"]``: see ``circuitvision.model.tokens.KINDS``), of a selection of the data set's tokens, or of a region;
    ``"kind"`` gives every position the mean over its own kind. Padding, empty cells of a grid and absent cameras count nowhere, so columns of
    padding change nothing. A mean per position, and a draw, is taken where something is and leaves the rest as it is; positions generated later
    keep their own values.

    ``neurons`` are coordinates of the last axis that alone are ablated (at ``mlp.hook_post``: neurons of an MLP).

    A draw by ``seed`` leaves no example its own value. Rows of several images or tiles take those of the same number. Where rows do not line up, the
    ``i``-th position of a kind takes the value of the ``i``-th of that kind (``positions="last"``: counted from the end), and an example with too few
    of them is not drawn from.

    Raises InputError for an unknown word, or no neuron. Before the run: a mean per position where rows hold different things, where the data set
    holds nothing, or over a single row of the run; a draw from a single example, or where no example has enough positions of a kind.
    """
    words = ("zero", "mean", "resample", "heads")
    where = _at(site, heads, positions, steps)
    word, source = (method, None) if isinstance(method, str) else ("given", _source(where["site"], method))
    if word not in (*words, "given"):
        raise InputError(f"method={method!r} is not understood: {', '.join(map(repr, words))}, or a value.")
    over = average_of(average)
    numbers = (
        None if neurons is None else tuple(map(operator.index, [neurons] if isinstance(neurons, int) else neurons))
    )
    if numbers is not None and (not numbers or word == "heads"):
        raise InputError("neurons= names coordinates to ablate, at least one, and not with the mean over heads.")
    if word == "heads":
        warn(
            "The mean over other heads depends on the basis of each head's values, which the model's function does not; "
            "use 'zero' or 'mean' for a result that is a property of the model."
        )
    sets: tuple[TensorRefMapping, ...] | Side | None = None
    if isinstance(dataset, (Side, Pairs)):
        sets = dataset.clean if isinstance(dataset, Pairs) else dataset
        if not len(sets):
            raise InputError("dataset holds no example.")
    elif dataset is not None and method == "resample":
        raise InputError("resampling draws from a data set of raw examples: dataset=cv.data.Side(images, texts).")
    elif dataset is not None:
        listed = [dataset] if isinstance(dataset, Mapping) else list(dataset)
        if not listed or not all(isinstance(inputs, Mapping) for inputs in listed):
            raise InputError("dataset is one mapping of inputs, or several.")
        sets = tuple(TensorRefMapping.of(inputs) for inputs in listed)
    return Ablate(**where, source=source, method=word, dataset=sets, average=over, seed=seed, neurons=numbers)


def steer(
    site: Component,
    direction: Any,
    scale: Any = 1.0,
    *,
    mode: str = "add",
    heads: Heads = None,
    positions: PositionsLike = None,
    steps: StepsLike = None,
) -> Edit:
    """Move the selected entries along a direction.

    ``mode="add"``: ``x + scale · d``. ``"norm_preserving"``: ``‖x‖ · u/‖u‖`` with ``u = x/‖x‖ + scale · d/‖d‖`` (VTI, arXiv 2410.15778).
    ``"project_out"``: ``x - scale · (x·d̂) d̂``; at scale 1 nothing along ``d`` is left.

    Raises InputError for an unknown mode, or a direction of length zero where its length divides.
    """
    if mode not in ("add", "norm_preserving", "project_out"):
        raise InputError(f"mode={mode!r} is not understood: 'add', 'norm_preserving' or 'project_out'.")
    given = held(direction)
    if mode != "add" and not (isinstance(given, TensorRef) and bool((given.tensor.norm(dim=-1) > 0).all())):
        raise InputError(f"mode={mode!r} needs a direction of a length other than zero.")
    return Steer(**_at(site, heads, positions, steps), direction=given, scale=_gain(scale), mode=mode)


def scale(
    site: Component,
    factor: Any,
    *,
    clip: tuple[float, float] | None = None,
    heads: Heads = None,
    positions: PositionsLike = None,
    steps: StepsLike = None,
) -> Edit:
    """Multiply the selected entries: ``x' = clip(factor) · x``; a factor ``[head, 1]`` gives every head its own."""
    if clip is not None:
        low, high = clip
        clip = (float(low), float(high))
    return Scale(**_at(site, heads, positions, steps), factor=held(factor), clip=clip)


def overwrite(
    site: Component,
    neurons: int | Iterable[int],
    value: Any,
    *,
    dictionary: Any = None,
    positions: PositionsLike = None,
    steps: StepsLike = None,
    heads: Heads = None,
) -> Edit:
    """Set coordinates of the last axis, or features of a dictionary, to a constant.

    Without a dictionary ``x_i = value`` for ``i`` in ``neurons`` (at ``mlp.hook_post``: neuron overwrite, arXiv 2509.00328). With one (anything
    with ``encode`` and ``decode``): ``f = encode(x)``, ``f'_i = value``, ``x' = decode(f') + (x - decode(f))``, so the dictionary's error stays,
    and entries whose features do not change keep their bits. ``value`` is a number or one per neuron.
    """
    numbers = tuple(int(n) for n in neurons) if isinstance(neurons, Iterable) else (int(neurons),)
    if dictionary is not None and not (hasattr(dictionary, "encode") and hasattr(dictionary, "decode")):
        raise InputError("A dictionary has encode(x) and decode(features).")
    return Overwrite(**_at(site, heads, positions, steps), neurons=numbers, value=held(value), dictionary=dictionary)


def project(
    site: Component,
    basis: Tensor | np.ndarray,
    source: Any,
    *,
    heads: Heads = None,
    positions: PositionsLike = None,
    steps: StepsLike = None,
) -> Edit:
    """Subspace interchange: inside the span of ``basis`` the selected entries take the source's values, outside it they keep their own.

    ``x' = x + (source - x) V Vᵀ`` with ``V`` orthonormal and of the span of ``basis``, ``[d]`` or ``[d, k]`` (columns); its sign, scale and
    rotation do not matter, and a gradient that asks for it reaches the basis through ``V`` (distributed alignment search). Raises InputError for
    dependent columns (Geiger et al. 2023, arXiv 2303.02536; Makelov et al. 2023, arXiv 2311.17030).
    """
    if isinstance(basis, np.ndarray):
        basis = torch.from_numpy(basis.copy())
    if not isinstance(basis, Tensor):
        raise InputError(f"A basis is a tensor [d] or [d, k], not {type(basis).__name__}.")
    columns = basis.detach()[:, None] if basis.ndim == 1 else basis.detach()
    if columns.ndim != 2 or columns.shape[1] > columns.shape[0] or columns.shape[1] == 0:
        raise InputError(f"A basis is [d] or [d, k] with k <= d, not {tuple(basis.shape)}.")
    values = torch.linalg.svdvals(columns.double())
    if bool(torch.isnan(columns).any()) or float(values[-1]) <= 1e-6 * float(values[0]):
        raise InputError(f"The {columns.shape[1]} columns of the basis are not linearly independent.")
    where = _at(site, heads, positions, steps)
    return Project(**where, source=_source(where["site"], source), basis=TensorRef.of(basis))


def block_attention(
    tower: str,
    queries: PositionsLike = None,
    keys: PositionsLike = None,
    *,
    layers: int | Iterable[int] | str | None = None,
    heads: Heads = None,
    renormalise: bool = True,
    steps: StepsLike = None,
) -> Edit:
    """Knockout: ``queries`` cannot look at ``keys``, in these layers and heads (None: all).

    Scores take the smallest number of their type, so the pattern is exactly 0 there and the other keys share the row; ``renormalise=False`` sets
    the pattern to 0 and leaves the rest as it was. Keys the mask hides anyway are not touched. ``layers="pool"`` is SigLIP's attention pooling.

    Raises InputError in the run if a position is left with nothing to look at.
    """
    return BlockAttention(tower, **_attention(tower, heads, queries, steps, keys, layers, renormalise))


def scale_attention(
    tower: str,
    queries: PositionsLike = None,
    keys: PositionsLike = None,
    factor: Any = 1.0,
    *,
    layers: int | Iterable[int] | str | None = None,
    heads: Heads = None,
    renormalise: bool = True,
    steps: StepsLike = None,
) -> Edit:
    """Multiply scores (``renormalise=True``) or the pattern itself (False) of ``queries`` looking at ``keys``.

    Multiplying a score is a temperature, not a gain: where scores are negative a factor below 1 *raises* attention (AdaptVis, arXiv 2503.01773,
    edits so). :func:`add_attention_bias` is the monotone alternative. ``factor`` is a number, or a tensor that broadcasts to ``[row
    head query key]``.
    """
    where = _attention(tower, heads, queries, steps, keys, layers, renormalise)
    return ScaleAttention(tower, **where, factor=_gain(factor))


def add_attention_bias(
    tower: str,
    queries: PositionsLike = None,
    keys: PositionsLike = None,
    bias: Any = 0.0,
    *,
    layers: int | Iterable[int] | str | None = None,
    heads: Heads = None,
    renormalise: bool = True,
    steps: StepsLike = None,
) -> Edit:
    """Add to the scores of ``queries`` looking at ``keys``: each entry's odds change by ``exp(bias)``, whatever its sign.

    ``renormalise=False`` multiplies the pattern by ``exp(bias)`` instead. ``bias`` is in nats: a number, or a tensor that broadcasts to ``[row head
    query key]``.
    """
    where = _attention(tower, heads, queries, steps, keys, layers, renormalise)
    return AddAttentionBias(tower, **where, bias=held(bias))


def _attention(
    tower: str,
    heads: Heads,
    queries: PositionsLike,
    steps: StepsLike,
    keys: PositionsLike,
    layers: Any,
    renormalise: bool,
) -> dict[str, Any]:
    """Where an edit of attention acts; spelled heads say their layer."""
    nodes, numbers = _taken_apart(heads)
    named = {(node.tower or tower, node.layer) for node in nodes}
    if named and (len(named) > 1 or {name for name, _ in named} != {tower} or len(nodes) < len(list(numbers))):
        raise InputError(f"heads={heads!r} are not of one layer of the {tower} tower; give one edit for each layer.")
    if named:
        (layer,) = (number for _, number in named)
        if layers not in (None, layer):
            raise InputError(f"heads={heads!r} are of layer {layer}, not of layers={layers!r}; leave layers out.")
        layers = layer
    return {**_where(numbers, queries, steps), **_edges(keys, layers, renormalise)}


def _edges(keys: PositionsLike, layers: Any, renormalise: bool) -> dict[str, Any]:
    chosen: Any = layers
    if layers is not None and not isinstance(layers, str):
        chosen = tuple(layers) if isinstance(layers, Iterable) else (layers,)
        chosen = tuple(int(n) if isinstance(n, np.integer) else n for n in chosen)
    wrong = chosen != "pool" if isinstance(chosen, str) else any(type(n) is not int for n in chosen or ())
    if wrong:
        raise InputError(f"layers={layers!r} is not understood: numbers, None for all, or 'pool'.")
    return {"keys": Positions.of(keys), "layers": chosen, "renormalise": renormalise}


def freeze(
    site: Component, at: str, *, heads: Heads = None, positions: PositionsLike = None, steps: StepsLike = None
) -> Edit:
    """Hold a site at an earlier layer's value: the selected entries take the value that the site ``at`` had in the same pass of the edited run.

    ``freeze("language.blocks.*.hook_resid_post", at="language.blocks.3.hook_resid_post", positions=image)`` with a glob holds every later layer as
    well; earlier matches are an error, so name the layers (PopVQA, arXiv 2412.14133).
    """
    return Freeze(**_at(site, heads, positions, steps), at=at)


def delete_tokens(
    tower: str, positions: PositionsLike, *, start: int = 0, reindex: bool = False, steps: StepsLike = None
) -> Edit:
    """Take tokens out of a tower from layer ``start`` on: no other position can look at them, and no pooling counts them.

    For the remaining positions this is what a shorter sequence computes. They keep their position numbers; ``reindex=True`` counts them anew, as if
    the prompt had been shorter (text towers, single runs). Rows of deleted positions themselves, in outputs that have positions, and what they hand
    on to a projector, mean nothing: delete image tokens in the language tower, not only in the vision tower.

    Raises InputError in blocks whose sliding window is shorter than the sequence: it counts deleted positions as well.
    """
    return DeleteTokens(tower, **_where(None, positions, steps), start=start, reindex=reindex)


def permute(site: Component, order: Iterable[int], *, positions: PositionsLike = None, steps: StepsLike = None) -> Edit:
    """Let positions change places: the ``i``-th selected position takes the value of the ``order[i]``-th.

    Numbers count in the order given, everything else in ascending order. Raises InputError if ``order`` is not a permutation.
    """
    numbers = tuple(int(n) for n in order)
    if sorted(numbers) != list(range(len(numbers))):
        raise InputError("order is not a permutation: it must hold each of 0 … n - 1 once.")
    return Permute(**_at(site, None, positions, steps), order=numbers)


def renormalise(
    site: Component, norm: Any, *, heads: Heads = None, positions: PositionsLike = None, steps: StepsLike = None
) -> Edit:
    """Give every selected vector the length ``norm``: ``x' = norm · x/‖x‖``."""
    return Renormalise(**_at(site, heads, positions, steps), norm=_gain(norm))


def apply(
    site: Component,
    fn: Callable[[Tensor, Any], Tensor | None],
    *,
    heads: Heads = None,
    positions: PositionsLike = None,
    steps: StepsLike = None,
) -> Edit:
    """The escape hatch: ``fn(tensor, hook)`` gets the site's whole tensor of one run and returns another of its shape, or None.

    Only the selected entries of what it returns are used. Saved by its import path, so define it in a module.
    """
    if not callable(fn):
        raise InputError("apply needs a function fn(tensor, hook).")
    return Apply(**_at(site, heads, positions, steps), fn=fn)


__all__ = [
    "Edit",
    "ablate",
    "add_attention_bias",
    "add_noise",
    "apply",
    "block_attention",
    "delete_tokens",
    "dump",
    "freeze",
    "from_dict",
    "load",
    "overwrite",
    "parse",
    "permute",
    "project",
    "renormalise",
    "replace",
    "restore",
    "save",
    "scale",
    "scale_attention",
    "steer",
    "to_dict",
]

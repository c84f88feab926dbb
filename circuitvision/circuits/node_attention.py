"""Where the heads of a circuit graph look in the picture: one map per head, kept beside the graph so that a figure can show it without the model.

A map is the attention of one query (or the mean of several) to every patch of one image, from :func:`circuitvision.readout.attention_maps`, which
says what a tower's usual queries are. Maps of towers with other grids are padded with NaN to the largest.

Not covered: groups of keys and values, and heads whose tower has no image patch among its keys; they have no map.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.positions import PositionsLike
from circuitvision.provenance import with_provenance
from circuitvision.readout.attention.cache import patterns_in
from circuitvision.readout.attention.maps import AttentionMaps, attention_maps
from circuitvision.readout.patch_coords import extent_of, grid_of, picture_of
from circuitvision.results import Result

if TYPE_CHECKING:
    import networkx as nx


@dataclass(frozen=True, eq=False)
class NodeAttention(Result):
    """Attention of the heads of a graph over one image: ``values`` ``[node row column example]``, shares of a query's attention.

    NaN where a map has no patch. ``sizes`` ``[example node 2]`` is how many rows and columns each map has, ``extents`` ``[example node 2]`` how much
    of the picture's height and width they cover; ``queries`` the query of each tower ("" is its usual one).
    """

    sizes: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    extents: Tensor = field(default_factory=lambda: torch.zeros(0))
    queries: dict[str, str] = field(default_factory=dict)

    _per_example: ClassVar[dict[str, int]] = {"sizes": 0, "extents": 0}

    def grid(self, node: str, example: Any = None) -> Float[Tensor, "row column"]:
        """The map of one head, by its id, of an example (None: the first). Raises InputError for what is not there."""
        entry, at = self.entries(example)[0], self.index_of("node", node)
        rows, columns = self.sizes[entry, at].tolist()
        return self.values[at, :rows, :columns, entry]


@with_provenance
def attention_of(
    model: Any,
    inputs: Mapping[str, Any],
    graph: nx.MultiDiGraph,
    *,
    queries: Mapping[str, PositionsLike] | None = None,
    image: int | None = None,
    tile: int | None = None,
) -> NodeAttention:
    """Run the inputs once and keep what every head of the graph looks at in one image.

    Args:
        model: the hooked model.
        inputs: those of a batch.
        graph: a graph of schema ``circuitvision.graph/1``; heads that are in it once get a map, at whatever positions their nodes stand.
        queries: by tower, whose attention it is, as of :func:`circuitvision.readout.attention_maps`; None: each tower's usual.
        image, tile: which image and tile of each example, as of :meth:`AttentionMaps.grid`; None: the first.

    Raises:
        InputError: no head of the graph sees image patches, a tower in ``queries`` that the model lacks, or what ``attention_maps`` refuses.
    """
    asked = dict(queries or {})
    unknown = [tower for tower in asked if tower not in model.towers]
    if unknown:
        raise InputError(f"queries: this model has no tower {unknown[0]!r}; its towers are {', '.join(model.towers)}.")
    heads = {node: data for node, data in graph.nodes(data=True) if data["kind"] == "head"}
    cache, tokens = patterns_in(model, inputs, None), model.tokens(inputs)
    grids: dict[str, list[Tensor]] = {}
    extents: dict[str, list[tuple[float, float]]] = {}
    told, examples, provenance = {}, [], {}
    for tower in dict.fromkeys(data["tower"] for data in heads.values()):
        maps = attention_maps(model, cache, tokens, tower=tower, query=asked.get(tower))
        own = {
            node: data for node, data in heads.items() if data["tower"] == tower and data["layer"] in maps.axes["layer"]
        }
        if not own or not bool(maps.patches(image).any()):
            continue
        told[tower], examples, provenance = maps.query, maps.axes["example"], maps.provenance
        _add(maps, own, image, tile, grids, extents)
    if not grids:
        raise InputError("No head of this graph has image patches among its keys; there is no attention to show.")
    return _result(grids, extents, told, list(dict.fromkeys(examples)), provenance)


def _add(
    maps: AttentionMaps,
    own: Mapping[str, Any],
    image: int | None,
    tile: int | None,
    grids: dict[str, list[Tensor]],
    extents: dict[str, list[tuple[float, float]]],
) -> None:
    """The maps of one tower's heads, over examples."""
    pictures = [picture_of(maps, example, image, tile) for example in dict.fromkeys(maps.axes["example"])]
    covered = [extent_of(maps, picture) for picture in pictures]
    laid_out = [grid_of(maps, maps.values[..., picture.entry], picture) for picture in pictures]
    for node, data in own.items():
        layer, head = maps.index_of("layer", data["layer"]), maps.index_of("head", data["head"])
        grids[node], extents[node] = [grid[layer, head] for grid in laid_out], covered


def _result(
    grids: dict[str, list[Tensor]],
    extents: dict[str, list[tuple[float, float]]],
    told: dict[str, str],
    examples: list[Any],
    provenance: dict[str, Any],
) -> NodeAttention:
    sizes = torch.tensor([[list(grid.shape) for grid in of_node] for of_node in grids.values()])
    rows, columns = sizes.flatten(0, 1).amax(0).tolist()
    values = torch.full(
        (len(grids), rows, columns, len(examples)), float("nan"), dtype=next(iter(grids.values()))[0].dtype
    )
    for number, of_node in enumerate(grids.values()):
        for entry, grid in enumerate(of_node):
            values[number, : grid.shape[0], : grid.shape[1], entry] = grid
    return NodeAttention(
        values=values,
        axes={"node": list(grids), "row": list(range(rows)), "column": list(range(columns)), "example": examples},
        provenance={**provenance, "method": "attention_of"},
        sizes=sizes.movedim(1, 0),
        extents=torch.tensor(list(extents.values())).movedim(1, 0),
        queries=told,
    )

"""Which positions of a tower a site holds: the map between the two, worked out from the family table before anything runs.

Positions are said in one way everywhere: as positions of the tower whose token map names them, counted from the first one of the row (what a cache
of keys and values holds included). Most sites hold all of them. Those that do not:

* a projector holds what its vision tower hands on: all positions, or all but the first where the family drops the class token;
* a connector that merges patches has positions of its own, and a token map that names them (:func:`map_of`);
* an image tower's ``hook_embed`` has no prefix tokens yet;
* keys and values of cross-attention are those of another tower's positions;
* an output head reads what the family pools, the last positions (``logits_to_keep``, which ``generate`` sets to 1), or the last ones of a chunk;
* a pooled site, and the one query of attention pooling, is no position at all;
* a run that continues a cache (``past_key_values``) computes the positions behind it.

An :class:`Axis` says which positions a site holds in the first pass; positions that ``generate`` adds later are held by every site that has any.

Not covered: heads that read another choice of positions in each row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.tokens import TokenMap
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True)
class Axis:
    """The positions of a tower that a site's position axis holds in the first pass, in order; None for all of them."""

    held: Sequence[int] | None = None
    absent: str = ""
    """Why the site has no position axis in this model; "" where it has one."""
    site: str = ""

    def columns(self, first: int, length: int, prompt: int) -> Tensor | None:
        """Which of the positions ``first … first + length`` the site holds, counted from ``first``; None for all of them."""
        if self.held is None or first >= prompt:
            return None
        end = first + length
        here = [position - first for position in self.held if first <= position < end]
        later = range(max(prompt - first, 0), length)
        return None if len(here) + len(later) == length else torch.tensor([*here, *later], dtype=torch.long)

    def index(self, first: int, prompt: int) -> int:
        """Where position ``first``, or the first held one after it, stands in the site's own axis."""
        if self.held is None:
            return first
        return sum(position < first for position in self.held) + max(first - prompt, 0)

    def count(self, prompt: int) -> int:
        """How many positions of a prompt the site holds."""
        return prompt if self.held is None else len(self.held)

    def said(self, prompt: int) -> str:
        """What is held, in words."""
        held = list(range(prompt)) if self.held is None else list(self.held)
        if not held:
            return "no position of the prompt"
        ends = f"{held[0]}…{held[-1]}" if len(held) > 1 else f"{held[0]}"
        return f"position{'s' if len(held) > 1 else ''} {ends}"


ALL = Axis()


def tower_of(model: Wrapped, name: SiteName) -> str:
    """The tower whose positions a site's are: its own, the one that a projector reads, or that cross-attention makes keys and values of."""
    if name.layer is not None and name.branch and name.tower in model.towers and name.counts_key_heads:
        crossed = crossed_tower(model, name)
        if crossed:
            return crossed
    return model.flow.tower_of(name.tower)


def map_of(model: Wrapped, name: SiteName) -> str:
    """The token map of a site's positions: that of its tower, or a connector's own, where it merges patches."""
    own = name.tower not in model.towers and model.family.packing.merges(name.site)
    return name.tower if own else tower_of(model, name)


def crossed_tower(model: Wrapped, name: SiteName) -> str:
    """The tower whose positions are the keys of a site's branch (cross-attention); "" for a branch that looks at its own tower."""
    if name.layer is None or name.tower not in model.towers:
        return ""
    block = model.towers[name.tower].blocks[name.layer]
    return next((branch.core.keys_of for branch in block.attentions if branch.name == name.branch), "")


def axis_of(
    tower: Tower, name: SiteName, tokens: TokenMap, settings: Mapping[str, Any], generating: bool = False
) -> Axis:
    """The axis of a site in a run with these inputs and settings; ``generating`` where the head reads the last position alone."""
    count, site = tokens.n_positions, str(name)
    if name.tower != tower.name and (name.layer is not None or name.tower == tokens.tower):
        return Axis(site=site)
    if name.tower != tower.name:
        dropped = tower.n_dropped_in(settings)
        return Axis(range(dropped, count), site=site) if dropped else Axis(site=site)
    if name.site.startswith("pool."):
        if name.stage in ("hook_k", "hook_v"):
            return Axis(site=site)
        return Axis(absent="its one query is no position", site=site)
    if name.layer is not None:
        return Axis(_from_past(tower, tokens, settings), site=site)
    if name.site == "hook_embed" and tower.stack.image:
        return Axis(range(tower.cfg.n_prefix, count), site=site)
    if name.site == "hook_readout":
        return _head_axis(tower, tokens, settings, generating, site)
    if name.site.startswith("ln_final.") and not _norms_positions(tower):
        return Axis(absent="they are pooled before it, or nothing reads it", site=site)
    return Axis(_from_past(tower, tokens, settings), site=site)


def _norms_positions(tower: Tower) -> bool:
    """Whether the final norm runs on every position, before any pooling."""
    table = tower.output_head.table
    return table.normed and table.norm_first


def _head_axis(tower: Tower, tokens: TokenMap, settings: Mapping[str, Any], generating: bool, site: str) -> Axis:
    table = tower.output_head.table
    if table.pool == "chunk":
        reads = torch.from_numpy(tokens.kind == table.reads[0]).all(0)
        return Axis(reads.nonzero().flatten().tolist(), site=site)
    if table.pool != "none":
        return Axis(absent="they are pooled before it", site=site)
    held = _from_past(tower, tokens, settings)
    computed = range(tokens.n_positions) if held is None else held
    kept = settings.get("logits_to_keep")
    kept = (1 if generating else 0) if kept is None else kept
    if isinstance(kept, Tensor):
        if kept.ndim != 1 or kept.dtype == torch.bool:
            return Axis(absent="logits_to_keep chooses them row by row", site=site)
        return Axis([computed[number] for number in kept.tolist()], site=site)
    return Axis(computed[-int(kept) :] if kept else held, site=site)


def _from_past(tower: Tower, tokens: TokenMap, settings: Mapping[str, Any]) -> range | None:
    """The positions behind those that a cache already holds; None where there is no such cache."""
    past = 0 if tower.stack.image else past_length(settings)
    return range(past, tokens.n_positions) if past else None


def past_length(inputs: Mapping[str, Any]) -> int:
    """How many positions the cache in ``past_key_values`` holds before this run: 0 without one.

    The run itself makes the cache longer, so a mask that covers more than the ids says it for good.
    """
    past = inputs.get("past_key_values")
    if past is None:
        return 0
    if not hasattr(past, "get_seq_length"):
        raise InputError(
            f"past_key_values is a {type(past).__name__}; give the cache that a run with use_cache=True returned."
        )
    read, mask = inputs.get("input_ids"), inputs.get("attention_mask")
    read = inputs.get("inputs_embeds") if read is None else read
    if isinstance(read, Tensor) and isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] > read.shape[1]:
        return int(mask.shape[1] - read.shape[1])
    return int(past.get_seq_length())


def holds_past(inputs: Mapping[str, Any]) -> bool:
    """Whether ``input_ids`` repeat what the cache holds, as ``generate`` allows: the mask then has their length."""
    ids, mask, past = inputs.get("input_ids"), inputs.get("attention_mask"), past_length(inputs)
    if not isinstance(ids, Tensor) or not past or ids.shape[1] <= past:
        return False
    return isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == ids.shape[1]


def new_positions(inputs: Mapping[str, Any]) -> Mapping[str, Any]:
    """The inputs with the ids and the mask of the positions that a run computes, where it continues a cache."""
    past = past_length(inputs)
    if not past:
        return inputs
    new = {**inputs, "past_key_values": None}
    if holds_past(inputs):
        new["input_ids"] = inputs["input_ids"][:, past:]
    read, mask = new.get("input_ids"), inputs.get("attention_mask")
    read = new.get("inputs_embeds") if read is None else read
    if isinstance(read, Tensor) and isinstance(mask, Tensor) and mask.ndim == 2:
        new["attention_mask"] = mask[:, mask.shape[1] - read.shape[1] :]
    return new


def prefix_of(model: Wrapped, name: str) -> str:
    """The tower whose cached keys and values a tower sees before its own; "" if there is none."""
    return model.flow.cache_of(name)


def positions_of(model: Wrapped, site: str, inputs: Mapping[str, Any]) -> list[int]:
    """The positions of its tower that a site holds in one run; empty where it has none."""
    name = SiteName.parse(site)
    tokens = model.tokens(inputs).get(map_of(model, name))
    if tokens is None:
        return []
    axis = axis_of(model.towers[tower_of(model, name)], name, tokens, inputs)
    if axis.absent:
        return []
    return list(range(tokens.n_positions)) if axis.held is None else list(axis.held)

"""Dead sites: places whose value cannot reach the model's output, worked out from what each tower's read-out reads.

A site is *dead* when no value written there can change the output (LLaVA's blocks after the feature layer, the last prefix block of PI0 beyond its
keys and values); a position of a live site is dead when only the other positions are read (patches in the last block of a CLS-pooled tower,
CLIP text after the end of text, placeholder embeddings under an image, the
query of a causal tower's first position, which has one key to choose from). The conformance suite checks these claims against measured zeros.
Padding positions, and score entries under the mask, are dead as well; they are a property of the run, not listed here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.model.branches import AttentionBranch, Branch
from circuitvision.model.pooling import eos_positions
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.block import Block
    from circuitvision.model.tokens import TokenMap
    from circuitvision.model.tower import Tower


def through_keys(block: Block, site: str) -> bool:
    """Whether a site of a block acts through keys and values of the block's own stream as well: then every position of it is alive."""
    own = [one for one in block.attentions if not one.core.keys_of]
    before = block.branches_before(own[-1]) if own else []
    return any(_feeds_keys(one, site) for one in own) or any(_is_part(one, site) for one in before)


def _feeds_keys(attention: AttentionBranch, site: str) -> bool:
    """Whether keys or values of this attention are made of what a site holds."""
    name = attention.name
    alone = (
        attention.stream,
        attention.slot("k"),
        attention.slot("v"),
        *(f"{name}.hook_{of}" for of in ("k", "v", "rot_k")),
    )
    norms = [f"{name}.k_norm.", f"{name}.v_norm."]
    # A norm that the stream is read through is before the keys; one of the sum (post-norm) bears the same name and is behind them.
    norms += [f"{attention.norm_name}."] if attention.layout.norm else []
    return site in alone or site.startswith(tuple(norms))


def _is_part(branch: Branch, site: str) -> bool:
    """Whether a site belongs to a branch: what it reads, its inside, what it adds, and the norms around it."""
    norm = f"ln{branch.number + 1}"
    alone = [branch.stream, branch.read_site, branch.added]
    alone += [branch.slot(letter) for letter in branch.letters] if isinstance(branch, AttentionBranch) else []
    return site in alone or site.startswith((f"{branch.name}.", f"{norm}.", f"{norm}_post."))


def _chooses(block: Block, site: str) -> bool:
    """Whether a site only chooses among keys of the block's own stream: dead where a causal tower leaves a single key to choose."""
    for one in block.attentions:
        alone = (one.slot("q"), *(f"{one.name}.hook_{of}" for of in ("q", "rot_q", "attn_scores")))
        if not one.core.keys_of and (site in alone or site.startswith(f"{one.name}.q_norm.")):
            return True
    return False


def _of_another_tower(block: Block, site: str) -> bool:
    """Whether a site holds keys or values made of another tower's stream: its positions are that tower's, and any query may look at them."""
    crossing = [one.name for one in block.attentions if one.core.keys_of]
    return any(
        site in (f"{name}.hook_k", f"{name}.hook_v") or site.startswith((f"{name}.k_norm.", f"{name}.v_norm."))
        for name in crossing
    )


def last_live_block(tower: Tower, inputs: Mapping[str, Any] | None = None) -> int:
    """Index of the last block whose output leaves the tower in a run (−1: only the tower's input does)."""
    return max(tower.feature_layers_in(inputs)) - 1


def is_dead(tower: Tower, name: str, inputs: Mapping[str, Any] | None = None) -> bool:
    """Whether no edit of this site can reach the output of a run; without ``inputs``, of one that leaves its settings to the configuration."""
    site = SiteName.parse(name)
    live = last_live_block(tower, inputs)
    if site.layer is not None:
        if site.layer > live:
            return not (site.layer == live + 1 and site.site == "hook_resid_pre")
        return tower.feeds_cache and site.layer == live and not through_keys(tower.blocks[live], site.site)
    if site.site.startswith("ln_final"):
        unused = not tower.output_head.table.normed
        return unused or tower.feeds_cache or live < tower.cfg.n_layers - 1
    return False


def dead_positions(tower: Tower, name: str, tokens: TokenMap, inputs: Mapping[str, Any]) -> Tensor | None:
    """Which positions of a live site cannot reach the output: bool ``[row pos]``, or None where all do.

    For scores and patterns the positions are queries.
    """
    site = SiteName.parse(name)
    after_eos = _after_eos(tower, inputs)
    if site.layer is None:
        if site.site == "hook_embed":
            return _under_images(tower, tokens, after_eos)
        if site.site.startswith("ln_final"):
            return _unread(tower, tokens, inputs) if tower.output_head.table.norm_first else None
        return after_eos if site.site in ("hook_pos_embed", "hook_input") else None
    live = last_live_block(tower, inputs)
    block = tower.blocks[site.layer]
    if _of_another_tower(block, site.site):
        return None
    final = (site.layer == live and not through_keys(block, site.site)) or (
        site.layer == live + 1 and site.site == "hook_resid_pre"
    )
    unread = _unread(tower, tokens, inputs) if final else after_eos
    if _chooses(block, site.site) and tower.cfg.attention == "causal":
        alone = _first_visible(tokens)
        return alone if unread is None else unread | alone
    return unread


def _first_visible(tokens: TokenMap) -> Tensor:
    """The first position of each row that is not padding: under a causal mask it sees itself alone."""
    real = torch.from_numpy(tokens.kind != "padding")
    return real & (real.cumsum(1) == 1)


def _under_images(tower: Tower, tokens: TokenMap, after_eos: Tensor | None) -> Tensor | None:
    if not tower.family.flow.is_fed(tower.name):
        return after_eos
    return torch.from_numpy(tokens.image_number >= 0)


def _after_eos(tower: Tower, inputs: Mapping[str, Any]) -> Tensor | None:
    if tower.output_head.table.pool not in ("eos", "first_eos") or tower.cfg.attention != "causal":
        return None
    end = eos_positions(tower, inputs).cpu()
    return torch.arange(inputs["input_ids"].shape[1])[None] > end[:, None]


def _unread(tower: Tower, tokens: TokenMap, inputs: Mapping[str, Any]) -> Tensor | None:
    readout = tower.spec.readout
    kinds: np.ndarray = tokens.kind
    if readout is None:
        return None
    if tower.connector is not None:
        read = ~np.isin(kinds, tower.prefix_kinds[: tower.n_dropped_in(inputs)])
    elif readout.reads == ("*",):
        return None
    elif readout.reads == ("eos",):
        end = eos_positions(tower, inputs).cpu()
        return torch.arange(kinds.shape[1])[None] != end[:, None]
    elif readout.reads == ("last",):
        read = np.zeros(kinds.shape, bool)
        read[:, -1] = True
    else:
        read = np.isin(kinds, list(readout.reads))
    return torch.from_numpy(~read)

"""The floating-point operations of an edit that no engine can avoid.

An edit writes at one layer. What must be computed again is what *depends on* the edit and what *the output reads*: both directions of the
dependency graph, at the grain of one position of one sublayer. Nothing else is counted: blocks before the edit, positions that no changed
position reaches, and positions that nothing reads (the patches of a CLS-pooled tower after its last attention, the last feed-forward of a tower
of which only keys and values are used).

- A linear layer at a position costs ``2 · in · out`` if its input changed.
- Queries, keys and values are counted where the residual changed; a row of attention where its query or any key it sees changed, against **all**
  keys it sees (``2 · d_head`` for the score and as many for the sum, per head and key). What a causal mask hides is not counted.
- The output projection, the feed-forward and later blocks follow the changed rows. An edit of one head recomputes the whole output projection at
  the edited positions: adding the head's difference to the old sum would save a fraction of a percent and round differently.
- The read-out is counted where its input changed.

Not counted: norms, activations, softmax, embeddings (some 1 % of a transformer), and the one clean run that a sweep starts from.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, eq=False)
class Blocks:
    """The sizes of one tower: what a block computes, who sees whom, and who is read.

    ``visible`` is bool ``[query key]``; ``read`` is bool ``[pos]``, the positions whose last residual the output reads; ``keys_read`` says that
    another tower reads the keys and values of every layer.
    """

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_size: int
    mlp_width: int
    gated: bool
    visible: Tensor
    read: Tensor
    keys_read: bool = False

    @property
    def keys_and_values(self) -> int:
        """Operations of both projections at one position."""
        return 2 * 2 * self.width * self.kv_heads * self.head_size

    @property
    def query(self) -> int:
        """Operations of the query projection at one position; the output projection costs the same."""
        return 2 * self.width * self.heads * self.head_size

    @property
    def pair(self) -> int:
        """Operations of attention for one query and one key."""
        return 4 * self.heads * self.head_size

    @property
    def mlp(self) -> int:
        """Operations of the feed-forward at one position."""
        return 2 * (3 if self.gated else 2) * self.width * self.mlp_width

    @functools.cached_property
    def needed(self) -> list[Tensor]:
        """Bool ``[pos]`` per layer and once more at the end: the positions of the residual there that the output depends on."""
        needed = [self.read]
        for _ in range(self.layers):
            after = needed[0]
            seen = self.visible[after].any(0)
            needed.insert(0, after | seen | self.keys_read)
        return needed


@dataclass(frozen=True, eq=False)
class Network:
    """The swept tower, what one position of the read-out costs, and the tower that reads the swept one's keys, if there is one."""

    swept: Blocks
    readout: int
    reader: Blocks | None = None


def _block(
    blocks: Blocks, layer: int, changed: Tensor, extra_keys: int = 0, extra_changed: bool = False
) -> tuple[int, Tensor]:
    """Operations of one block whose input changed at ``changed``, and where its output did.

    ``extra_keys`` counts the keys of another tower that every row sees; ``extra_changed`` says that some of them changed.
    """
    needed = blocks.needed[layer + 1]
    reached = torch.ones_like(changed) if extra_changed else changed | (blocks.visible & changed).any(1)
    rows = reached & needed
    keys = changed & (blocks.visible[needed].any(0) | blocks.keys_read)
    pairs = int(blocks.visible[rows].sum()) + extra_keys * int(rows.sum())
    count = int(keys.sum()) * blocks.keys_and_values + int((changed & needed).sum()) * blocks.query
    return count + pairs * blocks.pair + int(rows.sum()) * (blocks.query + blocks.mlp), reached


@functools.cache
def unavoidable(network: Network, layer: int, first: int, end: int, one_head: bool) -> int:
    """Operations downstream of an edit at positions ``first`` to ``end`` of a layer: of its residual input, or of one head's z."""
    blocks = network.swept
    changed = torch.zeros_like(blocks.read)
    changed[first:end] = True
    count, start = 0, layer
    if one_head:
        count += int((changed & blocks.needed[layer + 1]).sum()) * (blocks.query + blocks.mlp)
        start = layer + 1
    entered = [False] * blocks.layers
    for index in range(start, blocks.layers):
        entered[index] = True
        added, changed = _block(blocks, index, changed)
        count += added
    if network.reader is not None:
        added, changed = _reader(network.reader, len(blocks.read), entered)
        count, blocks = count + added, network.reader
    return count + int((changed & blocks.read).sum()) * network.readout


def _reader(blocks: Blocks, extra_keys: int, entered: list[bool]) -> tuple[int, Tensor]:
    """Operations of a tower whose attention also reads ``extra_keys`` keys of the swept tower, changed in the layers ``entered``."""
    changed = torch.zeros_like(blocks.read)
    count = 0
    for index in range(blocks.layers):
        if entered[index] or bool(changed.any()):
            added, changed = _block(blocks, index, changed, extra_keys, entered[index])
            count += added
    return count, changed


def everything(blocks: Blocks, extra_keys: int = 0) -> int:
    """Operations of all blocks of a tower when nothing may be left out and no key is hidden, as a plain forward computes them."""
    everywhere = torch.ones_like(blocks.read)
    whole = replace(blocks, visible=torch.ones_like(blocks.visible), read=everywhere, keys_read=False)
    return blocks.layers * _block(whole, 0, everywhere, extra_keys, extra_changed=True)[0]


def of_forward(module: nn.Module, inputs: dict[str, Any]) -> int:
    """Operations of one whole forward as PyTorch counts them; the module must run eager attention, whose products are all counted."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        module(**inputs)
    return counter.get_total_flops()

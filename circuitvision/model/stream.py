"""Whether each block reads what the block before it left: the identity that the names of the stream, decompositions and sweeps rest on.

Some models add to the stream between two blocks (Qwen3-VL's deepstack). Where the table of a stack does not say so (``Stack.writers``), sums would
not add up, so the first run with each set of inputs is watched.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from circuitvision.errors import UnsupportedModelError
from circuitvision.model.points import Call
from circuitvision.model.tower import Tower


@contextlib.contextmanager
def watched(towers: Mapping[str, Tower]) -> Iterator[None]:
    """Raise UnsupportedModelError inside the block if a block is called with another stream than the one before it returned."""
    handles: list[Any] = []
    try:
        for tower in towers.values():
            for before, block in zip(tower.blocks, tower.blocks[1:], strict=False):
                if before.layer not in tower.writers:
                    handles += _watch(tower.name, before.layer, before.module, block.module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(tower: str, layer: int, before: nn.Module, after: nn.Module) -> list[Any]:
    thread, left = get_ident(), {}

    def leaving(module: nn.Module, args: Any, output: Any) -> None:
        if get_ident() == thread:
            left["stream"] = Call(module, (), {}, output).tensor()

    def entering(module: nn.Module, args: Any, kwargs: Any) -> None:
        if (
            get_ident() == thread
            and "stream" in left
            and not _same(Call(module, args, kwargs).input(), left.pop("stream"))
        ):
            raise UnsupportedModelError(
                f"Something changes the stream of the {tower} tower between blocks {layer} and {layer + 1} (as deepstack does): block {layer + 1} "
                f"does not read resid_post of block {layer}, so sums over the stream and sweeps would be wrong. Say it in the family's table: "
                f"Stack(writers=(Writer('hook_deepstack', ({layer},)),))."
            )

    # What hooks of others change belongs to the blocks: only what the model itself does between them counts.
    return [
        before.register_forward_hook(leaving),
        after.register_forward_pre_hook(entering, prepend=True, with_kwargs=True),
    ]


def _same(entering: Tensor, left: Tensor) -> bool:
    if entering is left:
        return True
    return entering.shape == left.shape and torch.equal(entering.to(left.device), left)

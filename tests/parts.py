"""Modules of a block by short names, for tests that look at what lies under the sites: ``module_of(block, "o")``."""

from __future__ import annotations

from typing import Any

from circuitvision.model.block import Block


def module_of(block: Block, name: str) -> Any:
    """``ln1 ln2 attn mlp``, projections ``q k v o mlp_in mlp_out mlp_gate``, and ``attn_add mlp_add``: what follows a branch."""
    if name in ("attn", "mlp"):
        return block.branch(name).module
    if name in ("ln1", "ln2"):
        return next(branch.norm for branch in block.branches if branch.norm_name == name)
    if name in ("q", "k", "v"):
        return block.attn.projection(name).module
    if name.endswith("_add"):
        return block.branch(name.removesuffix("_add")).last
    if name == "mlp_gate":
        return None if block.mlp.gate is None else block.mlp.gate.module
    return {
        "o": lambda: block.attn.output,
        "mlp_out": lambda: block.mlp.output,
        "mlp_in": lambda: block.mlp.fc_in.module,
    }[name]()


def has_part(block: Block, name: str) -> bool:
    """Whether a block has such a part."""
    return module_of(block, name) is not None

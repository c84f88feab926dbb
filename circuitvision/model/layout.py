"""From the family table to points: which site sits on which module, for every tower of a model.

The order numbers say who fires first where several sites share a module: an edit of ``resid_post[l]`` is seen by ``resid_pre[l + 1]``, and one of
``attn.hook_result`` by ``hook_attn_out``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from circuitvision.model.points import (
    POOL_SITES,
    AttentionStage,
    BranchInput,
    HeadInput,
    HeadResult,
    Input,
    Lookup,
    NormNormalized,
    NormScale,
    Output,
    Point,
    PoolAttention,
    PositionEmbedding,
    SharedInput,
    Stash,
)
from circuitvision.model.spec import NORMS, Family, require, resolve
from circuitvision.model.tower import Block, Tower, norm_spec


def points_of(module: nn.Module, family: Family, towers: dict[str, Tower]) -> list[Point]:
    """Every point of a model, in the order a forward pass meets them."""
    points: list[Point] = []
    for tower in towers.values():
        points += _tower_points(tower)
        if tower.spec.readout is not None and tower.spec.readout.finish == "projector":
            projector = require(module, family.projector or "", "projector")
            points.append(Input("projector.hook_in", projector, "pre", keyword="image_features"))
            points.append(Output("projector.hook_out", projector, "post"))
    return points


def _tower_points(tower: Tower) -> Iterator[Point]:
    name, stack = tower.name, tower.stack
    if tower.spec.embed is not None:
        embed = require(tower.module, tower.spec.embed, "embedding")
    else:
        embed = require(tower.root, stack.embed, "embedding")
    point = Output if stack.image or tower.spec.embed is not None else Lookup
    yield point(f"{name}.hook_embed", embed, "post")
    if stack.position != "none":
        adder = require(tower.root, stack.embeddings or "", "embeddings")
        n_inserted = sum(kind == "register" for kind in tower.prefix_kinds)
        yield PositionEmbedding(
            f"{name}.hook_pos_embed",
            adder,
            "post",
            kind=stack.position,
            weight=stack.position_weight or "",
            n_inserted=n_inserted,
        )
    yield Input(f"{name}.hook_input", tower.blocks[0].module, "pre", order=0)
    for block in tower.blocks:
        yield from _block_points(tower, block)
    if tower.final_norm is not None:
        yield from _norm_points(f"{name}.ln_final", tower.final_norm)
    yield from _head_points(tower)


def _head_points(tower: Tower) -> Iterator[Point]:
    readout, name = tower.spec.readout, tower.name
    if readout is None:
        return
    pool = resolve(tower.module, readout.pool_module)
    if pool is not None:
        attention = require(pool, "attention", "attention of the pooling head")
        for order, site in enumerate(POOL_SITES):
            yield PoolAttention(f"{name}.pool.attn.{site}", attention, "post", order=order, stage=site)
    head = resolve(tower.module, readout.head)
    if head is not None and readout.second_head is None:
        yield Input(f"{name}.hook_readout", head, "pre", keyword="input")
    elif pool is not None:
        yield Output(f"{name}.hook_readout", pool, "post")


def _norm_points(prefix: str, norm: nn.Module) -> Iterator[Point]:
    spec = norm_spec(norm)
    yield NormScale(f"{prefix}.hook_scale", norm, "post", order=0, spec=spec)
    yield NormNormalized(f"{prefix}.hook_normalized", norm, "post", order=1, spec=spec)


def _block_points(tower: Tower, block: Block) -> Iterator[Point]:
    prefix = f"{tower.name}.blocks.{block.layer}"
    if block.layer == 0:
        yield Input(f"{prefix}.hook_resid_pre", block.module, "pre", order=1)
    else:
        yield Output(f"{prefix}.hook_resid_pre", tower.blocks[block.layer - 1].module, "post", order=1)
    yield from _attention_points(tower, block, prefix)
    ln2 = block.part("ln2")
    yield SharedInput(f"{prefix}.hook_resid_mid", ln2, "pre", order=0)
    yield BranchInput(f"{prefix}.hook_mlp_in", ln2, "pre", order=1)
    yield from _norm_points(f"{prefix}.ln2", ln2)
    if block.has("mlp_gate"):
        yield Output(f"{prefix}.mlp.hook_pre", block.part("mlp_gate"), "post")
        yield Output(f"{prefix}.mlp.hook_pre_linear", block.part("mlp_in"), "post")
    else:
        yield Output(f"{prefix}.mlp.hook_pre", block.part("mlp_in"), "post")
    yield Input(f"{prefix}.mlp.hook_post", block.part("mlp_out"), "pre", keyword="input")
    yield from _branch_points(block, prefix, "mlp_add", "mlp", "ln2_post", "hook_mlp_out")
    yield Output(f"{prefix}.hook_resid_post", block.module, "post", order=0)


def _attention_points(tower: Tower, block: Block, prefix: str) -> Iterator[Point]:
    cfg = tower.cfg
    ln1, attn = block.part("ln1"), block.part("attn")
    yield from _norm_points(f"{prefix}.ln1", ln1)
    stash = Stash(f"{prefix}.ln1", ln1, "pre", order=-1)
    for letter, n_heads in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads)):
        projection = block.part(letter)
        yield HeadInput(
            f"{prefix}.hook_{letter}_input", projection, "post", order=0, n_heads=n_heads, companions=(stash,)
        )
        yield Output(f"{prefix}.attn.hook_{letter}", projection, "post", order=1, n_heads=n_heads)
    if cfg.rotary:
        yield AttentionStage(f"{prefix}.attn.hook_rot_q", attn, "attention")
        yield AttentionStage(f"{prefix}.attn.hook_rot_k", attn, "attention", in_place=True)
    yield AttentionStage(f"{prefix}.attn.hook_attn_scores", attn, "attention")
    yield AttentionStage(f"{prefix}.attn.hook_pattern", attn, "attention")
    out = block.part("o")
    yield Input(f"{prefix}.attn.hook_z", out, "pre", n_heads=cfg.n_heads, keyword="input")
    yield HeadResult(f"{prefix}.attn.hook_result", out, "post", order=0, n_heads=cfg.n_heads)
    yield from _branch_points(block, prefix, "attn_add", "o", "ln1_post", "hook_attn_out")


def _branch_points(block: Block, prefix: str, add: str, last: str, norm_name: str, site: str) -> Iterator[Point]:
    """What a branch adds to the stream: after LayerScale or a post norm, where there is one."""
    if not block.has(add):
        yield Output(f"{prefix}.{site}", block.part(last), "post", order=2)
        return
    adder = block.part(add)
    if type(adder).__name__ in NORMS:
        yield from _norm_points(f"{prefix}.{norm_name}", adder)
    yield Output(f"{prefix}.{site}", adder, "post", order=2)

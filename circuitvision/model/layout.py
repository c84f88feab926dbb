"""From the family table to points: which site sits on which module, for every tower of a model.

The order numbers say who fires first where several sites share a module: an edit of ``hook_input`` is seen by ``resid_pre[0]``, and one of
``attn.hook_result`` by ``hook_attn_out``.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from circuitvision.errors import UnsupportedModelError
from circuitvision.model.block_points import Between
from circuitvision.model.layout_of_blocks import block_points, norm_points
from circuitvision.model.points import (
    POOL_SITES,
    Input,
    Lookup,
    Output,
    Point,
    PoolAttention,
    PositionEmbedding,
)
from circuitvision.model.sites import SiteName
from circuitvision.model.spec import Family, require, resolve
from circuitvision.model.tower import Tower


def points_of(module: nn.Module, family: Family, towers: dict[str, Tower]) -> list[Point]:
    """Every point of a model, in the order a forward pass meets them."""
    points: list[Point] = []
    for tower in towers.values():
        points += _tower_points(tower)
        for connector in family.flow.modules:
            if connector.sources[-1] == tower.name:
                part = require(module, connector.path or "", connector.name)
                points.append(Input(f"{connector.name}.hook_in", part, "pre", keyword="image_features"))
                points.append(Output(f"{connector.name}.hook_out", part, "post"))
    _refuse_shared(points)
    return points


def refuse_unread(family: Family, towers: dict[str, Tower]) -> None:
    """Raise UnsupportedModelError for towers whose output the table leads nowhere: their effects would come out as zero."""
    flow = family.flow
    for name, tower in towers.items():
        for other in tower.crossed_towers:
            if not any(one.via == "cross" and other in one.sources and one.target == name for one in flow.connectors):
                raise UnsupportedModelError(
                    f"Blocks of the {name} tower attend to the {other} tower (Attention(keys_of={other!r})), and the family {family.name!r} has "
                    f"no connector that says so: Connector(({other!r},), {name!r}, via='cross')."
                )
        compared = flow.is_dual and tower.spec.readout is not None and tower.spec.readout.finish == "contrast"
        if name != flow.answer and not compared and not flow.reaches(name, flow.answer):
            raise UnsupportedModelError(
                f"The family {family.name!r} does not say how its {name} tower reaches {flow.answer}, which gives the output: name it among the "
                f"sources of a connector (Connector(({name!r}, …), …))."
            )


def _refuse_shared(points: list[Point]) -> None:
    """Raise UnsupportedModelError where one module serves two towers or two layers: a call of it does not say for which."""
    seen: dict[tuple[int, str], tuple[str, int | None, SiteName]] = {}
    for point in points:
        if isinstance(point, Between):
            # It says what lies before its module, of the block before.
            continue
        name = SiteName.parse(point.name)
        layer = name.layer
        if name.site == "hook_input":
            layer = 0
        first = seen.setdefault((id(point.module), point.phase), (name.tower, layer, name))
        if first[:2] != (name.tower, layer):
            raise UnsupportedModelError(
                f"{first[2]} and {name} are on one and the same {type(point.module).__name__}, which runs for both: a site on it would not say "
                "which of them it belongs to. Give each its own copy of the module (copy.deepcopy)."
            )


def _tower_points(tower: Tower) -> Iterator[Point]:
    name, stack = tower.name, tower.stack
    if tower.spec.embed is not None:
        embed = require(tower.module, tower.spec.embed, "embedding")
    else:
        embed = require(tower.root, stack.embed, "embedding")
    point = Output if stack.image or tower.spec.embed is not None else Lookup
    yield point(f"{name}.hook_embed", embed, "post")
    if stack.position not in ("none", "rotary"):
        adder = require(tower.root, stack.embeddings or "", "embeddings")
        if tower.spec.stack is not None and getattr(adder, stack.position_weight or "", None) is None:
            held = [*adder.named_parameters(recurse=False), *adder.named_children()]
            raise UnsupportedModelError(
                f"position={stack.position!r} of the {name} tower needs position_weight, the name of a parameter or module of {type(adder).__name__} "
                f"(embeddings={stack.embeddings!r}), not {stack.position_weight!r}; it holds {', '.join(one for one, _ in held)}."
            )
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
        yield from block_points(block)
    if tower.final_norm is not None:
        yield from norm_points(f"{name}.ln_final", tower.final_norm)
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

"""The numbers of a tower, measured from its modules and checked against each other.

Widths come from the weights: what projections read is the stream, what they write are the heads. How many heads share that width no weight
tells; it is read from the configuration, and from the attention module where that says how wide a head is. A table that names the wrong part, or a
configuration that means something else by a name, is refused when the model is wrapped, with what was expected and what was found.

Not covered: branches of one name that differ in shape from layer to layer, which are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mode
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor, nn

from circuitvision.errors import UnsupportedModelError
from circuitvision.model.block_layout import Gate
from circuitvision.model.branches import AttentionBranch, Branch, MLPBranch
from circuitvision.model.patches import pair
from circuitvision.model.spec import norm_spec, require
from circuitvision.model.weights import in_width, out_width

if TYPE_CHECKING:
    from circuitvision.model.block import Block
    from circuitvision.model.tower import Tower

Kind = TypeVar("Kind", bound=Branch)


@dataclass(frozen=True)
class TowerConfig:
    """The numbers of one tower, under TransformerLens's names."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    grid: tuple[int, int] | None
    """Patch rows and columns at the configured image size; None for text and action towers and for images of free size."""
    patch_size: int | tuple[int, int] | None
    """Side of a patch; (height, width) where it is not square."""
    n_prefix: int
    """Positions before the first patch (CLS, distillation, registers)."""
    attention: str
    """"causal", "bidirectional", or "by_mask" where the run's mask decides."""
    act: str
    norm: str
    """"LayerNorm" or "RMSNorm"."""
    gated_mlp: bool
    rotary: bool


def measured(tower: Tower) -> TowerConfig:
    """The numbers of a tower.

    Raises:
        UnsupportedModelError: the table, the configuration and the weights contradict each other.
    """
    config = tower.config
    attn = _first(tower, AttentionBranch)
    mlp = _first(tower, MLPBranch)
    n_heads, n_kv = tower.n_heads
    if attn is None:
        raise UnsupportedModelError(f"No block of the {tower.name} tower has an Attention among its branches.")
    width, count = attn.d_head_of()
    if width % count:
        raise _contradiction(attn, "qkv" if attn.core.qkv else "q", "writes", width, f"a multiple of {count} heads")
    grid, patch = _grid(tower)
    norms = [branch.norm or branch.sum_norm or branch.post_norm for block in tower.blocks for branch in block.branches]
    norm = next((one for one in norms if one is not None), tower.final_norm)
    cfg = TowerConfig(
        n_layers=len(tower.blocks),
        n_heads=n_heads,
        n_kv_heads=n_kv,
        d_model=_stream_width(tower),
        d_head=width // count,
        d_mlp=0 if mlp is None else mlp.fc_in.out_width,
        grid=grid,
        patch_size=patch,
        n_prefix=len(tower.prefix_kinds),
        attention=tower.spec.attention or tower.stack.attention,
        act=(mlp and mlp.core.act)
        or str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)),
        norm="" if norm is None else "LayerNorm" if norm_spec(norm).centred else "RMSNorm",
        gated_mlp=mlp is not None and mlp.core.is_gated,
        rotary=attn.core.rotary,
    )
    for block in tower.blocks:
        _check(block, cfg)
    return cfg


def number_of_heads(tower: Tower) -> tuple[int, int]:
    """How many heads queries have, and keys and values, by the table and the configuration."""
    n_heads = _number(tower, tower.spec.n_heads, None)
    return n_heads, _number(tower, tower.spec.n_kv_heads, n_heads)


def _first(tower: Tower, kind: type[Kind]) -> Kind | None:
    """The first branch of a kind in a tower; None if there is none."""
    return next((branch for block in tower.blocks for branch in block.branches if isinstance(branch, kind)), None)


def _stream_width(tower: Tower) -> int:
    """What most parts read or write, so that the one that differs is blamed."""
    widths: list[int] = []
    for branch in tower.blocks[0].branches:
        if isinstance(branch, AttentionBranch):
            widths += [branch.projection(letter).in_width for letter in branch.letters]
            widths.append(branch.out.out_width)
        elif isinstance(branch, MLPBranch):
            widths += [branch.fc_in.in_width, branch.out.out_width]
    return mode(widths)


def _number(tower: Tower, name: str | tuple[str, ...] | int, default: int | None) -> int:
    """A number of the table: as it is, or what the configuration holds under the first of its names that it has."""
    if isinstance(name, int):
        return name
    names = (name,) if isinstance(name, str) else name
    for one in names:
        value = getattr(tower.config, one, None)
        if value is not None:
            return int(value)
    if default is None:
        raise UnsupportedModelError(
            f"The config of the {tower.name} tower has no {' or '.join(names)}, so nothing says how many heads it has: give TowerSpec(n_heads=…) "
            "a number, or the name that it has there."
        )
    return default


def _check(block: Block, cfg: TowerConfig) -> None:
    """Raise UnsupportedModelError for a part that does not have the shape that the others give it."""
    for branch in block.branches:
        _check_gates(branch)
        for part, side, found, expected, why in _shapes(branch, cfg):
            if found != expected:
                raise _contradiction(branch, part, side, found, f"{expected} ({why})")
    for attn in block.attentions:
        own: Any = getattr(attn.module, "head_dim", None)
        if isinstance(own, int) and own != cfg.d_head:
            tower = block.tower
            raise UnsupportedModelError(
                f"Block {block.layer} of the {tower.name} tower says that a head is {own} wide, and {cfg.n_heads} heads of its query projection "
                f"are {cfg.d_head}: the table of the {tower.family.name} family takes n_heads from {tower.spec.n_heads!r}. Give "
                "TowerSpec(n_heads=…)."
            )


def _shapes(branch: Branch, cfg: TowerConfig) -> Iterator[tuple[str, str, int, int, str]]:
    """Part, what it does, how many features it has, how many it should have, and why."""
    stream = f"the stream is {cfg.d_model} wide"
    if isinstance(branch, AttentionBranch):
        yield from _attention_shapes(branch, cfg)
        yield "o", "writes", branch.out.out_width, cfg.d_model, stream
    elif isinstance(branch, MLPBranch):
        inner = "as in block 0"
        yield "fc_in", "reads", branch.fc_in.in_width, cfg.d_model, stream
        yield "fc_in", "writes", branch.fc_in.out_width, cfg.d_mlp, inner
        yield "fc_out", "reads", branch.out.in_width, cfg.d_mlp, "what fc_in writes"
        yield "fc_out", "writes", branch.out.out_width, cfg.d_model, stream
        if branch.gate is not None:
            yield "gate", "writes", branch.gate.out_width, cfg.d_mlp, "what fc_in writes"


def _attention_shapes(branch: AttentionBranch, cfg: TowerConfig) -> Iterator[tuple[str, str, int, int, str]]:
    queries, keys = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    of_queries, of_keys = (
        f"{cfg.n_heads} heads of {cfg.d_head}",
        f"{cfg.n_kv_heads} key and value heads of {cfg.d_head}",
    )
    stream = f"the stream is {cfg.d_model} wide"
    read, why = _keys_width(branch, cfg)
    if branch.core.qkv is not None:
        module = branch.projection("q").module
        yield "qkv", "writes", out_width(module), queries + 2 * keys, f"{of_queries}, and {of_keys} twice"
        yield "qkv", "reads", in_width(module), cfg.d_model, stream
    else:
        yield "q", "writes", branch.projection("q").out_width, queries, of_queries
        for letter in "kv":
            yield letter, "writes", branch.projection(letter).out_width, keys, of_keys
        yield "q", "reads", branch.projection("q").in_width, cfg.d_model, stream
        for letter in "kv":
            yield letter, "reads", branch.projection(letter).in_width, read, why
    yield "o", "reads", branch.out.in_width, queries, of_queries


def _keys_width(branch: AttentionBranch, cfg: TowerConfig) -> tuple[int, str]:
    """How many features keys and values are made of, and why: of the block's own stream, another tower's, or what a projector makes of that."""
    source, tower = branch.source, branch.block.tower
    if source is None:
        return cfg.d_model, f"the stream is {cfg.d_model} wide"
    connector = tower.family.flow.crossed_by(source.name)
    if connector is None or connector.path is None:
        return source.cfg.d_model, f"the stream of {source.name} is {source.cfg.d_model} wide"
    projector: Any = require(tower.module, connector.path, connector.name)
    width = getattr(projector, "out_features", None)
    if isinstance(width, int):
        return width, f"what {connector.name} writes"
    # A projector of several modules does not say what it writes: all that read it must agree.
    alike = (one for block in tower.blocks for one in block.attentions if one.core.keys_of == source.name)
    return next(alike).projection("k").in_width, f"as the first block reads of {connector.name}"


def _check_gates(branch: Branch) -> None:
    """Raise UnsupportedModelError for a gate that the block does not hold as a tensor."""
    for gate in branch.layout.then:
        if not isinstance(gate, Gate):
            continue
        where = f"{branch.block.prefix}: Gate({gate.parameter!r}) of {branch.name}"
        path, _, name = gate.parameter.rpartition(".")
        holder = require(branch.block.module, path, f"module of {where}")
        value = getattr(holder, name, None)
        if value is None:
            names = [one for one, _ in holder.named_parameters(recurse=False)]
            known = f"it holds {', '.join(names)}" if names else "it holds none of its own"
            raise UnsupportedModelError(f"{where} is no parameter of {type(holder).__name__}; {known}.")
        if not isinstance(value, Tensor | nn.Module):
            raise UnsupportedModelError(
                f"{where} is {value!r} and no parameter (a setting of the config leaves it out?): where it is 1, leave the gate out of the layout, "
                "which may be a function of the block, Stack(block=function)."
            )


def _contradiction(branch: Branch, part: str, side: str, found: int, expected: str) -> UnsupportedModelError:
    block = branch.block
    path = getattr(branch.core, part, None) or getattr(branch.core, "fused", None)
    return UnsupportedModelError(
        f"The table of the {block.tower.family.name} family does not fit block {block.layer} of the {block.tower.name} tower: {part}={path!r} of "
        f"{branch.name} {side} {found} features, expected {expected}. Is it another part, or does the config mean something else by its names?"
    )


def _grid(tower: Tower) -> tuple[tuple[int, int] | None, int | tuple[int, int] | None]:
    embedding = tower.patch_embedding
    if embedding is None:
        return None, None
    size = getattr(tower.config, "image_size", None)
    if size is None or tower.stack.position == "resized":
        return None, embedding.patch_size
    return embedding.grid(*pair(size)), embedding.patch_size

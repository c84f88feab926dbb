"""The numbers of a tower, measured from its modules and checked against each other.

Widths come from the weights: what projections read is the stream, what they write are the heads. How many heads share that width no weight
tells; it is read from the configuration, and from the attention module where that says how wide a head is. A table that names the wrong part, or a
configuration that means something else by a name, is refused when the model is wrapped, with what was expected and what was found.

Not covered: blocks of one tower that differ in shape from layer to layer, which are refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from statistics import mode
from typing import TYPE_CHECKING, Any

from circuitvision.errors import UnsupportedModelError
from circuitvision.model.patches import pair
from circuitvision.model.spec import norm_spec
from circuitvision.model.weights import in_width, out_width

if TYPE_CHECKING:
    from circuitvision.model.tower import Block, Tower


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
    config, block = tower.config, tower.blocks[0]
    n_heads = _number(tower, tower.spec.n_heads, None)
    n_kv = _number(tower, tower.spec.n_kv_heads, n_heads)
    width = out_width(block.part("q"))
    if width % n_heads:
        raise _contradiction(tower, block, "q", "writes", width, f"a multiple of {n_heads} heads")
    grid, patch = _grid(tower)
    cfg = TowerConfig(
        n_layers=len(tower.blocks),
        n_heads=n_heads,
        n_kv_heads=n_kv,
        d_model=_stream_width(block),
        d_head=width // n_heads,
        d_mlp=out_width(block.part("mlp_in")),
        grid=grid,
        patch_size=patch,
        n_prefix=len(tower.prefix_kinds),
        attention=tower.spec.attention or tower.stack.attention,
        act=block.layout.act or str(getattr(config, "hidden_act", None) or getattr(config, "hidden_activation", None)),
        norm="LayerNorm" if norm_spec(block.part("ln1")).centred else "RMSNorm",
        gated_mlp=block.has("mlp_gate"),
        rotary=block.layout.rotary,
    )
    for block in tower.blocks:
        _check(tower, block, cfg)
    return cfg


def _stream_width(block: Block) -> int:
    """What most parts read or write, so that the one that differs is blamed."""
    reads = [in_width(block.part(part)) for part in ("q", "k", "v", "mlp_in")]
    return mode([*reads, *(out_width(block.part(part)) for part in ("o", "mlp_out"))])


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


def _check(tower: Tower, block: Block, cfg: TowerConfig) -> None:
    """Raise UnsupportedModelError for a part that does not have the shape that the others give it."""
    for part, side, expected, why in _expected(block, cfg):
        module = block.part(part)
        found = in_width(module) if side == "reads" else out_width(module)
        if found != expected:
            raise _contradiction(tower, block, part, side, found, f"{expected} ({why})")
    own: Any = getattr(block.part("attn"), "head_dim", None)
    if isinstance(own, int) and own != cfg.d_head:
        raise UnsupportedModelError(
            f"Block {block.layer} of the {tower.name} tower says that a head is {own} wide, and {cfg.n_heads} heads of its query projection are "
            f"{cfg.d_head}: the table of the {tower.family.name} family takes n_heads from {tower.spec.n_heads!r}. Give TowerSpec(n_heads=…)."
        )


def _expected(block: Block, cfg: TowerConfig) -> Iterator[tuple[str, str, int, str]]:
    """Part, what it does, how many features, and why."""
    queries, keys = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    of_keys = f"{cfg.n_kv_heads} key and value heads of {cfg.d_head}"
    stream = f"the stream is {cfg.d_model} wide"
    yield "q", "writes", queries, f"{cfg.n_heads} heads of {cfg.d_head}"
    for part in ("k", "v"):
        yield part, "writes", keys, of_keys
    for part in ("q", "k", "v", "mlp_in"):
        yield part, "reads", cfg.d_model, stream
    yield "o", "reads", queries, f"{cfg.n_heads} heads of {cfg.d_head}"
    yield "mlp_in", "writes", cfg.d_mlp, "as in block 0"
    yield "mlp_out", "reads", cfg.d_mlp, "what mlp_in writes"
    for part in ("o", "mlp_out"):
        yield part, "writes", cfg.d_model, stream
    if block.has("mlp_gate"):
        yield "mlp_gate", "writes", cfg.d_mlp, "what mlp_in writes"


def _contradiction(
    tower: Tower, block: Block, part: str, side: str, found: int, expected: str
) -> UnsupportedModelError:
    path = getattr(block.layout, part)
    return UnsupportedModelError(
        f"The table of the {tower.family.name} family does not fit block {block.layer} of the {tower.name} tower: {part}={path!r} "
        f"({type(block.part(part)).__name__}) {side} {found} features, expected {expected}. Is it another part, or does the config mean "
        "something else by its names?"
    )


def _grid(tower: Tower) -> tuple[tuple[int, int] | None, int | tuple[int, int] | None]:
    embedding = tower.patch_embedding
    if embedding is None:
        return None, None
    size = getattr(tower.config, "image_size", None)
    if size is None or tower.stack.position == "resized":
        return None, embedding.patch_size
    return embedding.grid(*pair(size)), embedding.patch_size

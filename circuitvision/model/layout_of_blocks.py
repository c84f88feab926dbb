"""From a block's layout to its points: which site sits on which module of a block, branch by branch.

The stream between two branches is seen where the second one enters (``hook_resid_mid``, in place, because the skip path holds the same tensor), or
as the output of the norm that the sum passes. The order numbers say who fires first where several sites share a module.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from circuitvision.errors import UnsupportedModelError
from circuitvision.model.block import Block
from circuitvision.model.block_points import (
    Arrival,
    Between,
    GatedOutput,
    HeadInput,
    HeadResult,
    ProjectionOutput,
    ReadInput,
    SavedOutput,
)
from circuitvision.model.branches import AttentionBranch, Branch, MLPBranch, in_features
from circuitvision.model.points import (
    AttentionStage,
    BranchInput,
    HeadAxis,
    Input,
    NormNormalized,
    NormScale,
    Output,
    OwnOutput,
    Point,
    SavedInput,
    SharedInput,
    StreamInput,
)
from circuitvision.model.projections import Projection
from circuitvision.model.spec import norm_spec


def norm_points(prefix: str, norm: nn.Module, heads: HeadAxis | None = None) -> Iterator[Point]:
    """The denominator and the normalised value of a norm."""
    spec = norm_spec(norm)
    yield NormScale(f"{prefix}.hook_scale", norm, "post", order=0, spec=spec, heads=heads)
    yield NormNormalized(f"{prefix}.hook_normalized", norm, "post", order=1, spec=spec, heads=heads)


def block_points(block: Block) -> Iterator[Point]:
    """Every point of a block, in the order of the pass."""
    yield from _entering(block)
    for branch in block.branches:
        yield from _stream_before(block, branch)
        if not isinstance(branch, AttentionBranch):
            yield _read_point(block, branch)
        if branch.norm is not None and not branch.shares_norm:
            yield from norm_points(f"{block.prefix}.{branch.norm_name}", branch.norm)
        if isinstance(branch, AttentionBranch):
            yield from _attention_points(block, branch)
        elif isinstance(branch, MLPBranch):
            yield from _mlp_points(block, branch)
        yield from _added_points(block, branch)
        if branch.sum_norm is not None:
            stem = f"{block.prefix}.ln{branch.number + 1}"
            yield Input(f"{stem}.hook_in", branch.sum_norm, "pre")
            yield from norm_points(stem, branch.sum_norm)
    yield Output(f"{block.prefix}.hook_resid_post", block.module, "post", order=0)
    yield from _written_behind(block)


def _entering(block: Block) -> Iterator[Point]:
    name = f"{block.prefix}.hook_resid_pre"
    if block.layer == 0:
        yield Input(name, block.module, "pre", order=1)
    else:
        own = OwnOutput(name, block.tower.blocks[block.layer - 1].module, "post", order=2)
        yield StreamInput(name, block.module, "pre", order=1, companions=(own,))


def _stream_before(block: Block, branch: Branch) -> Iterator[Point]:
    """The stream that a branch reads, where it is not what enters the block."""
    if branch.stream == "hook_resid_pre":
        return
    name, before = f"{block.prefix}.{branch.stream}", block.branches[branch.number - 1].sum_norm
    if before is not None:
        yield Output(name, before, "post", order=2)
    else:
        yield SharedInput(name, branch.entry, "pre", order=0)


def _attention_points(block: Block, branch: AttentionBranch) -> Iterator[Point]:
    prefix, name = block.prefix, f"{block.prefix}.{branch.name}"
    for letter in "qkv":
        projection, n_heads = branch.projection(letter), branch.heads_of(letter)
        if letter in branch.letters:
            slot, module = f"{prefix}.{branch.slot(letter)}", projection.module
            stash = SavedInput(slot, branch.norm or module, "pre", order=-1)
            yield HeadInput(slot, module, "post", projection=projection, n_heads=n_heads, companions=(stash,))
        yield _output(f"{name}.hook_{letter}", projection, n_heads)
        norm = branch.head_norm(letter)
        if norm is not None:
            apart = in_features(norm) in (0, branch.d_head)
            axis = HeadAxis(n_heads, apart, branch.core.heads_first)
            yield from norm_points(f"{name}.{letter}_norm", norm, axis)
    if branch.core.rotary:
        yield AttentionStage(f"{name}.hook_rot_q", branch.module, "attention")
        yield AttentionStage(f"{name}.hook_rot_k", branch.module, "attention", in_place=True)
    for stage in ("hook_attn_scores", "hook_pattern"):
        yield AttentionStage(f"{name}.{stage}", branch.module, "attention")
    n_heads = branch.heads_of("q")
    yield Input(f"{prefix}.{branch.inner}", branch.output, "pre", n_heads=n_heads, keyword="input")
    yield HeadResult(f"{prefix}.{branch.result}", branch.output, "post", order=0, n_heads=n_heads)


def _output(name: str, projection: Projection, n_heads: int | None = None) -> Output:
    if projection.columns is None:
        return Output(name, projection.module, "post", order=1, n_heads=n_heads)
    return ProjectionOutput(name, projection.module, "post", order=1, n_heads=n_heads, projection=projection)


def _read_point(block: Block, branch: Branch) -> Point:
    """What a branch other than attention reads of the stream."""
    read = f"{block.prefix}.{branch.read_site}"
    if not branch.shares_norm:
        return BranchInput(read, branch.entry, "pre", order=1)
    assert branch.norm is not None
    stash = SavedInput(read, branch.norm, "pre", order=-1)
    return ReadInput(read, branch.module, "pre", order=1, companions=(stash,))


def _mlp_points(block: Block, branch: MLPBranch) -> Iterator[Point]:
    for site, projection in branch.inputs.items():
        yield _output(f"{block.prefix}.{site}", projection)
    yield Input(f"{block.prefix}.{branch.inner}", branch.output, "pre", keyword="input")


def _added_points(block: Block, branch: Branch) -> Iterator[Point]:
    """What a branch adds to the stream: the output of its last module, or that behind the block's own gates."""
    if branch.post_norm is not None:
        yield from norm_points(f"{block.prefix}.{branch.post_name}", branch.post_norm)
    name = f"{block.prefix}.{branch.added}"
    module = branch.last or branch.returned_by
    if branch.is_gated:
        yield GatedOutput(
            name, module, "post", order=2, gates=branch.gates, companions=(_arrival(block, branch, name),)
        )
    else:
        yield Output(name, module, "post", order=2)


def _arrival(block: Block, branch: Branch, name: str) -> Arrival:
    """Where the stream with a branch's share is first held by a module."""
    if branch.sum_norm is not None:
        return Arrival(name, branch.sum_norm, "pre", order=-2, how="input")
    behind = block.branches[branch.number + 1 :]
    if behind and not block.layout.parallel:
        return Arrival(name, behind[0].entry, "pre", order=-2, how="in_place")
    last = block.branches[-1].sum_norm
    if last is not None:
        return Arrival(name, last, "pre", order=-2, how="input")
    return Arrival(name, block.module, "post", order=-1, how="output")


def _written_behind(block: Block) -> Iterator[Point]:
    """What the tower's own code adds between this block and the next."""
    for site in block.tower.writers.get(block.layer, ()):
        if block.layer + 1 >= len(block.tower.blocks):
            raise UnsupportedModelError(
                f"The table says that {block.tower.name}.{site} is written behind the last block, where no block reads it: the writers of a "
                f"stack write behind blocks 0 to {len(block.tower.blocks) - 2}."
            )
        behind = block.tower.blocks[block.layer + 1].module
        saved = SavedOutput(f"{block.tower.name}.{site}", block.module, "post", order=3)
        yield Between(f"{block.tower.name}.{site}", behind, "pre", order=0, companions=(saved,))

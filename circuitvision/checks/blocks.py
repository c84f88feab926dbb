"""Checks of what is inside a block: the named parts make each value of the one before it, queries and keys move their own scores.

Not covered: keys and values made of another tower's stream, activations that transformers has no name for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from circuitvision.checks.trial import Trial
from circuitvision.model.block import Block
from circuitvision.model.branches import AttentionBranch, Branch, MLPBranch, in_features
from circuitvision.model.norms import Norm
from circuitvision.model.weights import is_plain_linear

_ROTATES = 1.5
"""How far rotated heads may be longer than others, relative to what is rotated: some rotary embeddings scale a part of each head."""


def norms(trial: Trial) -> str:
    """Norms compute as they are described."""
    for tower in trial.model.towers.values():
        with tower.hooks_disabled():
            for block in trial.blocks(tower):
                for branch in block.branches:
                    for name, module, value in _normed(trial, block, branch):
                        norm = Norm(module)
                        if trial.far(norm.held(value, norm.denominator(value)), module.forward(value)):
                            return f"{name} does not compute as {type(module).__name__} is described: see register_norm(NormSpec(…), …)"
    return ""


def _normed(trial: Trial, block: Block, branch: Branch) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The norms of a branch that read and write what the cache has: name, module, and a value that it is given."""
    stream = trial.value(f"{block.prefix}.{branch.stream}")
    for kind in ("norm", "sum_norm", "post_norm"):
        module = getattr(branch, kind)
        if module is not None and stream is not None:
            yield f"{kind} of {branch.name} in {block.prefix}", module, stream
    if not isinstance(branch, AttentionBranch):
        return
    for letter in "qkv":
        module, value = branch.head_norm(letter), trial.value(f"{block.prefix}.{branch.name}.hook_{letter}")
        if module is not None and value is not None:
            whole = in_features(module) not in (0, value.shape[-1])
            yield f"{letter}_norm of {branch.name} in {block.prefix}", module, value.flatten(-2) if whole else value


def parts(trial: Trial) -> str:
    """What lies between the sites of one branch: each is computed from the one before it by the named part."""
    for tower in trial.model.towers.values():
        for block in trial.blocks(tower):
            for branch in block.branches:
                with tower.hooks_disabled():
                    problem = (
                        _entering(trial, block, branch)
                        or _read_part(trial, block, branch)
                        or _head_norms(trial, block, branch)
                        or _nonlinearity(trial, block, branch)
                        or _written_part(trial, block, branch)
                    )
                if problem:
                    return f"{block.prefix}: {problem}"
    return ""


def _entering(trial: Trial, block: Block, branch: Branch) -> str:
    """The stream that a branch reads is what enters the block and what the branches before it added."""
    before = block.branches_before(branch)
    sites = ["hook_resid_pre", branch.stream, *(one.added for one in before)]
    values = [value for value in (trial.value(f"{block.prefix}.{site}") for site in sites) if value is not None]
    if not before or any(one.sum_norm is not None for one in before) or len(values) < len(sites):
        return ""
    entering, stream, *added = values
    if trial.far(torch.stack([entering, *added]).sum(0), stream):
        return (
            f"{branch.name} does not read what the branches before it add: are they side by side (BlockLayout(parallel=True)), or does something "
            "stand between a branch and the sum (Branch(then=))?"
        )
    return ""


def _head_norms(trial: Trial, block: Block, branch: Branch) -> str:
    """Norms of queries, keys and values are given those; what is rotated is as long as what comes out of them."""
    if not isinstance(branch, AttentionBranch):
        return ""
    for letter in "qkv":
        stem, module = f"{block.prefix}.{branch.name}", branch.head_norm(letter)
        value, normalized = trial.value(f"{stem}.hook_{letter}"), trial.value(f"{stem}.{letter}_norm.hook_normalized")
        if value is None:
            continue
        normed = branch.normed_heads(letter, value)
        if module is not None and normalized is not None:
            whole = in_features(module) not in (0, value.shape[-1])
            norm, inner = Norm(module), normalized.flatten(-2) if whole else normalized
            bias = norm.bias(inner)
            found = norm.gained(inner) if bias is None else norm.gained(inner) + bias
            if trial.far(found.reshape(normalized.shape), normed):
                return f"{letter}_norm of {branch.name} is given something else than hook_{letter}: another norm, or heads_first=?"
        rotated = trial.value(f"{stem}.hook_rot_{letter}") if letter != "v" else None
        if rotated is not None and rotated.shape == normed.shape:
            ratio = rotated.norm(dim=-1) / normed.norm(dim=-1)
            if float(ratio.amax()) > _ROTATES * float(ratio.amin()):
                return f"what is rotated is no rotation of hook_{letter} of {branch.name}: does a norm come before it ({letter}_norm=)?"
    return ""


def _read_part(trial: Trial, block: Block, branch: Branch) -> str:
    stream = trial.value(f"{block.prefix}.{branch.stream}")
    if stream is None or not isinstance(branch, (AttentionBranch, MLPBranch)):
        return ""
    if isinstance(branch, AttentionBranch):
        reads = {f"{branch.name}.hook_{letter}": branch.projection(letter) for letter in branch.letters}
    else:
        reads = branch.inputs
    normed = stream if branch.norm is None else branch.norm.forward(stream)
    for site, projection in reads.items():
        value = trial.value(f"{block.prefix}.{site}")
        if value is None:
            continue
        weight, bias = projection.weight_and_bias(normed.dtype, normed.device)
        found = normed @ weight if bias is None else normed @ weight + bias
        if is_plain_linear(projection.module) and trial.far(found, value.reshape(found.shape)):
            return f"{site} is not what its projection makes of {branch.stream} behind norm={branch.layout.norm!r}"
    return ""


def _nonlinearity(trial: Trial, block: Block, branch: Branch) -> str:
    """Of an MLP: what its activation makes of the gate, times the other input."""
    if not isinstance(branch, MLPBranch):
        return ""
    act: Any = ACT2FN.get(branch.core.act or block.tower.cfg.act)
    sites = [f"{block.prefix}.{site}" for site in (*branch.inputs, branch.inner)]
    values = [value for value in map(trial.value, sites) if value is not None]
    if act is None or len(values) < len(sites):
        return ""
    act = act() if isinstance(act, type) else act
    *inputs, post = values
    found = [
        act(first) * torch.stack([first.new_ones(()).expand_as(first), *rest]).prod(0)
        for first, *rest in (inputs, inputs[::-1])
    ]
    if not trial.far(found[0], post):
        return ""
    swapped = len(inputs) == 2 and not trial.far(found[1], post)
    said = f"is it another one than {branch.core.act or block.tower.cfg.act} (MLP(act=))?"
    why = "gate and input are swapped" if swapped else said
    return f"{branch.inner} is not the activation of {branch.name}.hook_pre{' times hook_pre_linear' if len(inputs) == 2 else ''}: {why}"


def _written_part(trial: Trial, block: Block, branch: Branch) -> str:
    inner, added = (trial.value(f"{block.prefix}.{site}") for site in (branch.inner or branch.added, branch.added))
    if inner is None or added is None or not branch.inner or not is_plain_linear(branch.output):
        return ""
    if trial.far(branch.written(branch.inner, inner), added):
        return (
            f"{branch.added} is not what the output projection and then={branch.layout.then!r} make of {branch.inner}"
        )
    return ""


def attention_of_heads(trial: Trial) -> str:
    """Queries move the scores of their own position, keys those of theirs, values none: told by edits of each."""
    for tower in trial.model.towers.values():
        for block in trial.blocks(tower):
            for branch in block.attentions:
                problem = _attention_of(trial, block, branch)
                if problem:
                    return f"{block.prefix}: {problem}"
    return ""


def _attention_of(trial: Trial, block: Block, branch: AttentionBranch) -> str:
    stem = f"{block.prefix}.{branch.name}"
    scores = trial.value(f"{stem}.hook_attn_scores")
    if scores is None or trial.value(branch_site := f"{stem}.hook_z") is None:
        return ""
    if scores.shape[1] != branch.heads_of("q"):
        return f"{branch.name} has {scores.shape[1]} heads of scores, and the table says {branch.heads_of('q')}"
    before = scores, trial.cache[branch_site]
    for letter, axis in (("q", 2), ("k", 3), ("v", None)):
        site = f"{stem}.hook_{letter}"
        value = trial.value(site)
        if value is None:
            continue
        position = value.shape[1] // 2
        apart = in_features(norm) in (0, value.shape[-1]) if (norm := branch.head_norm(letter)) is not None else True
        after = _after_edit(trial, site, position, (f"{stem}.hook_attn_scores", branch_site))
        moved = _moved_entries(before[0], after[0])
        if axis is None:
            wrong = bool(moved.any()) or torch.equal(before[1], after[1])
            said = "moves scores, or no value that is read"
        else:
            elsewhere = moved.clone()
            # Keys of another tower's cache come before a tower's own.
            elsewhere.select(axis, position + scores.shape[axis] - value.shape[1]).zero_()
            own = scores.shape[1] // branch.heads_of(letter) if apart else scores.shape[1]
            elsewhere[:, own:] = elsewhere[:, own:] | moved[:, own:]
            wrong = bool(elsewhere.any()) or not bool(moved.any())
            said = f"moves other scores than those of its head and its {'query' if axis == 2 else 'key'}"
        if wrong:
            return f"an edit of {branch.name}.hook_{letter} {said}: are q, k, v, the order of Fused and n_heads as the model has them?"
    return ""


def _after_edit(trial: Trial, site: str, position: int, sites: tuple[str, ...]) -> list[Tensor]:
    """What sites hold when head 0 of a projection is another one at a position."""
    kept: dict[str, Tensor] = {}

    def write(value: Tensor, hook: Any) -> Tensor:
        out = value.clone()
        out[:, position, 0] = out[:, position, 0].flip(-1) * 1.5 + 0.5
        return out

    def keep(value: Tensor, hook: Any, name: str = "") -> None:
        kept[name] = value.clone()

    with warnings.catch_warnings():
        # Whether the edit reaches the output is not asked here.
        warnings.simplefilter("ignore")
        trial.model.run_with_hooks(trial.inputs, [(site, write), *((one, partial(keep, name=one)) for one in sites)])
    return [kept[name] for name in sites]


def _moved_entries(before: Tensor, after: Tensor) -> Tensor:
    """Which scores differ by more than rounding, hidden ones aside."""
    seen = before > torch.finfo(before.dtype).min / 2
    size = before[seen].abs().amax().clamp_min(1e-6) if bool(seen.any()) else 1.0
    return seen & ((before - after).abs() > 1e-5 * size)

"""What a trained subspace is held against: the same training where there is nothing to find, and how pairs are split for it.

* *re-initialised*: a copy of the model whose weights are drawn anew, each matrix from its own entries (a permutation), so that sizes stay and what
  was learned is gone; of one component alone where a report asks about it;
* *permuted labels*: the counterfactual answers of the training pairs change places among them; what is found is scored on the true ones.

Sources: Makelov et al. 2023 (arXiv 2311.17030), appendix B.5; Hewitt and Liang 2019 (arXiv 1909.03368) on control tasks.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from circuitvision.data import Pairs
from circuitvision.errors import InputError, checked_seed
from circuitvision.model.sites import SiteName


def reinitialised(model: Any, seed: int = 0, site: str | None = None) -> Any:
    """A copy of a model in which every weight of two or more axes has its entries permuted; ``site``: only those of the component that writes it.

    Gains and biases stay. Of a site that no component writes (the residual stream) it is the block's own weights, outside blocks the tower's.
    """
    found = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(checked_seed(seed))
    modules = [found.module] if site is None else component_modules(found, site)
    with torch.no_grad():
        for weight in _unique(module.parameters() for module in modules):
            if weight.ndim >= 2:
                order = torch.randperm(weight.numel(), generator=generator).to(weight.device)
                weight.copy_(weight.flatten()[order].view_as(weight))
    return found


def component_modules(model: Any, site: str) -> list[nn.Module]:
    """The modules of the component that a site belongs to: its branch, else its block, else its tower's blocks, else the whole model."""
    name = SiteName.parse(site)
    if name.tower not in model.towers:
        return [model.module]
    blocks = model.towers[name.tower].blocks
    if name.layer is None:
        return [block.module for block in blocks]
    block = blocks[name.layer]
    return [branch.module for branch in block.branches if branch.name == name.branch] or [block.module]


def _unique(parameters: Iterable[Iterable[nn.Parameter]]) -> list[nn.Parameter]:
    return list({id(one): one for some in parameters for one in some}.values())


def permuted(labels: Sequence[Any], seed: int = 0) -> list[Any]:
    """The labels in another order, no entry keeping its place."""
    order = np.random.default_rng(checked_seed(seed)).permutation(len(labels))
    found: list[Any] = [None] * len(labels)
    for place, number in enumerate(order):
        found[number] = labels[order[(place + 1) % len(order)]]
    return found


def split(pairs: Pairs, held_out: float | Pairs, seed: int = 0) -> tuple[Pairs, Pairs]:
    """Training and held-out pairs: whole groups (of pairs without groups, pairs) drawn until the share is reached, or the pairs given.

    Raises:
        InputError: a share outside 0 … 1, too few groups, or held-out pairs that are among the training pairs.
    """
    if isinstance(held_out, Pairs):
        _check_apart(pairs, held_out)
        return pairs, held_out
    if isinstance(held_out, bool) or not isinstance(held_out, (int, float)) or not 0 < held_out < 1:
        raise InputError(f"held_out={held_out!r} is a share between 0 and 1, or pairs.")
    groups = list(range(len(pairs))) if pairs.groups is None else list(pairs.groups)
    names = list(dict.fromkeys(groups))
    if len(names) < 2:
        raise InputError("All pairs are of one group, so none can be held out: give held_out=pairs of others.")
    order = np.random.default_rng(checked_seed(seed)).permutation(len(names))
    chosen: set[Any] = set()
    for number in order[:-1]:
        if chosen and sum(group in chosen for group in groups) >= held_out * len(groups):
            break
        chosen.add(names[number])
    rows = [row for row, group in enumerate(groups) if group in chosen]
    return pairs[[row for row in range(len(groups)) if groups[row] not in chosen]], pairs[rows]


def _check_apart(train: Pairs, held: Pairs) -> None:
    """Raise InputError where a held-out pair, or a group, is among the training pairs."""
    digests = {one.digest for one in train.clean.examples}
    if any(one.digest in digests for one in held.clean.examples):
        raise InputError("Some held-out pairs are training pairs as well: give pairs of other examples.")
    if train.groups is not None and held.groups is not None and set(train.groups) & set(held.groups):
        raise InputError(
            f"Group {next(iter(set(train.groups) & set(held.groups)))!r} is in training and held-out pairs."
        )

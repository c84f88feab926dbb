"""What reads a site, and the units behind it: readers as matrices, and neurons that are watched or held while the site is edited.

Readers of a site inside a branch (neurons, one head's or several heads' ``z``) are what the branch makes of it on the way to the stream, output
projection and LayerScale included; a norm behind the branch is taken without its denominator, which changes no row space. The residual stream, and
what a branch adds to it, is read by everything behind: there is no exact kernel, and without ``readers`` nothing is unread. Readers may be heads,
whose queries (``A = centre · gain · W_Q`` of the norm they read through) stand for all that matters behind, or a matrix.

Units are the neurons after their activation in the blocks behind the site, of its own tower, at the chosen positions.

Not covered: attention entries and norms as units; units of other towers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.model.branches import MLPBranch, branch_at
from circuitvision.model.names import heads_of
from circuitvision.model.norms import Norm
from circuitvision.model.sites import SiteName
from circuitvision.subspaces.pairs import SiteBatch, SitePairs


def readers_of(
    model: Any, site: str, heads: Sequence[int] | None, given: Any = None
) -> tuple[Float[Tensor, "d m"] | None, str]:
    """What reads a site (see the module), and its name; None where everything does.

    Raises:
        InputError: a matrix of another width; heads of another tower.
    """
    name = SiteName.parse(site)
    if isinstance(given, Tensor):
        if given.ndim != 2:
            raise InputError(f"readers is a matrix [d, m] with h A, or heads, not {tuple(given.shape)}.")
        return given.double().cpu(), "given"
    if given is not None:
        nodes = heads_of(given, model.towers)
        if any(node.tower != name.tower for node in nodes):
            raise InputError(f"readers of {site} are heads of the {name.tower} tower.")
        queries = [_query(model, node.tower, node.layer, int(node.head or 0)) for node in nodes]
        return torch.cat(queries, 1), f"the queries of {len(nodes)} heads"
    if name.tower not in model.towers or name.layer is None:
        return None, "everything behind"
    tower = model.towers[name.tower]
    try:
        branch, leaf = branch_at(tower, site)
    except UnknownSiteError:
        return None, "everything behind"
    if leaf in (branch.added, branch.normalized):
        return None, "everything behind"
    shape = branch.value_shape(leaf)
    width = shape[-1]
    chosen: Sequence[int] = list(heads) if heads is not None else list(range(shape[0])) if len(shape) == 2 else [0]
    found = []
    with tower.hooks_disabled(), torch.no_grad():
        for head in chosen:
            value = torch.zeros(width, *shape, dtype=tower.dtype, device=model.device)
            eye = torch.eye(width, dtype=tower.dtype, device=model.device)
            if len(shape) == 2:
                value[:, head] = eye
            else:
                value[:] = eye
            out = branch.share(leaf, value, torch.ones(width, 1, dtype=tower.dtype, device=model.device))
            found.append((out[:, head] if len(shape) == 2 else out).double().cpu())
    return torch.cat(found, 1), f"{branch.name} of layer {name.layer}"


def _query(model: Any, tower: str, layer: int, head: int) -> Float[Tensor, "d_model d_head"]:
    """What a head's query reads of the stream, without the norm's denominator."""
    block = model.towers[tower].blocks[layer]
    weight, norm = block.W_Q[head].double().cpu(), block.attn.norm
    if norm is None:
        return weight
    with model.towers[tower].hooks_disabled(), torch.no_grad():
        eye = torch.eye(len(weight), dtype=model.towers[tower].dtype, device=model.device)
        return Norm(norm).linear(eye).double().cpu() @ weight


class UnitsBehind:
    """The units behind the site of some pairs: read, and held inside a range, while the chosen entries have other values."""

    def __init__(self, data: SitePairs) -> None:
        self.data = data
        model, name = data.model, SiteName.parse(data.site)
        self.sites: list[str] = []
        if name.tower in model.towers and name.layer is not None:
            order = list(model.engine.points)
            inputs = data.parts[0].inputs
            for block in model.towers[name.tower].blocks:
                for branch in block.branches:
                    site = f"{name.tower}.blocks.{block.layer}.{branch.inner}" if isinstance(branch, MLPBranch) else ""
                    behind = site in order and order.index(site) > order.index(data.site)
                    if behind and not model.is_dead(site, inputs):
                        self.sites.append(site)

    def __bool__(self) -> bool:
        return bool(self.sites)

    def read(self, values: Float[Tensor, "entry d"]) -> Float[Tensor, "entry unit"]:
        """Every unit at the chosen positions, per entry."""
        found = []
        for part in self.data.each():
            held: dict[str, Tensor] = {}
            watched = [edits.apply(site, _keep(held, site)) for site in self.sites]
            with torch.no_grad():
                part.run([self.data.replacement(part, values[part.entries]), *watched])
            found.append(torch.cat([held[site][self._places(part)].double().cpu() for site in self.sites], 1))
        return torch.cat(found)

    def clamped(
        self, values: Float[Tensor, "entry d"], low: Float[Tensor, " unit"], high: Float[Tensor, " unit"]
    ) -> Float[Tensor, " example"]:
        """The logit difference (or metric) with every unit at the chosen positions held between ``low`` and ``high``."""
        found = []
        for part in self.data.each():
            held, first = [self.data.replacement(part, values[part.entries])], 0
            for site in self.sites:
                width = self.data.model.towers[SiteName.parse(site).tower].cfg.d_mlp
                ends = low[first : first + width], high[first : first + width]
                held.append(edits.apply(site, _hold(self._places(part), *ends)))
                first += width
            with torch.no_grad():
                rows = self.data._rows(part.run(held), part.inputs, part.batch)
            found.append(self.data.outcome(part, rows).difference)
        return torch.cat(found)

    @staticmethod
    def _places(part: SiteBatch) -> tuple[Tensor, ...]:
        return part.index[:2]


def _keep(held: dict[str, Tensor], site: str) -> Any:
    """A function that keeps a site's tensor and changes nothing."""

    def keep(value: Tensor, hook: Any) -> None:
        held[site] = value

    return keep


def _hold(places: tuple[Tensor, ...], low: Tensor, high: Tensor) -> Any:
    """A function that holds the entries of a site at some places inside a range."""

    def hold(value: Tensor, hook: Any) -> Tensor:
        value[places] = torch.minimum(torch.maximum(value[places], low.to(value)), high.to(value))
        return value

    return hold

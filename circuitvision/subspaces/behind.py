"""What reads a site, and the units behind it: readers as matrices, and units that are watched or held while the site is edited.

Readers of a site inside a branch (neurons, one head's or several heads' ``z``) are what the branch makes of it on the way to the stream, output
projection and LayerScale included; a norm behind the branch is taken without its denominator, which changes no row space. The residual stream, and
what a branch adds to it, is read by everything behind: there is no exact kernel, and without ``readers`` nothing is unread. Readers may be heads,
whose queries (``A = centre · gain · W_Q`` of the norm they read through) stand for all that matters behind, or a matrix. Where heads and positions
are one entry side by side, ``A`` of heads is stacked (what all of them add together), and that of positions stands on the diagonal (each adds to
its own).

Units are, in the blocks behind the site, of its own tower, at the chosen positions: neurons after their activation, attention entries (of queries
there, where all runs have the same positions, so that a key means the same in each), and the norm of every head's ``z``. A held attention row is not
renormalised; a held norm scales ``z``.

Not covered: units of other towers, and of other positions; norms of the stream.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError, UnknownSiteError
from circuitvision.incremental.sweeps.stream import laid_values
from circuitvision.model.branches import AttentionBranch, Branch, MLPBranch, branch_at
from circuitvision.model.names import heads_of
from circuitvision.model.norms import Norm
from circuitvision.model.sites import SiteName
from circuitvision.subspaces.pairs import SiteBatch, SitePairs


def readers_of(
    model: Any, site: str, heads: Sequence[int] | None, given: Any = None, joint: bool = False, places: int = 1
) -> tuple[Float[Tensor, "d m"] | None, str]:
    """What reads a site (see the module), and its name; None where everything does. ``joint`` entries hold ``places`` positions side by side.

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
        queries = torch.cat([_query(model, node.tower, node.layer, int(node.head or 0)) for node in nodes], 1)
        return torch.block_diag(*[queries] * places), f"the queries of {len(nodes)} heads"
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
    whole = torch.cat(found, 0 if joint else 1)
    return torch.block_diag(*[whole] * places), f"{branch.name} of layer {name.layer}"


def _query(model: Any, tower: str, layer: int, head: int) -> Float[Tensor, "d_model d_head"]:
    """What a head's query reads of the stream, without the norm's denominator."""
    block = model.towers[tower].blocks[layer]
    weight, norm = block.W_Q[head].double().cpu(), block.attn.norm
    if norm is None:
        return weight
    with model.towers[tower].hooks_disabled(), torch.no_grad():
        eye = torch.eye(len(weight), dtype=model.towers[tower].dtype, device=model.device)
        return Norm(norm).linear(eye).double().cpu() @ weight


@dataclass(frozen=True)
class _Units:
    """The units of one site, by what they are: ``"neurons"``, ``"attention"`` entries, or ``"norms"`` of heads."""

    site: str
    kind: str

    def values(self, tensor: Tensor, places: tuple[Tensor, ...]) -> Float[Tensor, "place unit"]:
        """Every unit at some rows and positions."""
        if self.kind == "attention":
            return tensor.transpose(1, 2)[places].flatten(1)
        found = tensor[places]
        return found.norm(dim=-1) if self.kind == "norms" else found

    def held(self, tensor: Tensor, places: tuple[Tensor, ...], low: Tensor, high: Tensor) -> Tensor:
        """The same tensor with every unit there inside a range."""
        found = self.values(tensor, places)
        inside = torch.minimum(torch.maximum(found, low.to(found)), high.to(found))
        if self.kind == "attention":
            tensor.transpose(1, 2)[places] = inside.unflatten(1, (tensor.shape[1], tensor.shape[3]))
        elif self.kind == "norms":
            share = torch.where(found > 0, inside / found.clamp_min(torch.finfo(found.dtype).tiny), 1.0)
            tensor[places] = tensor[places] * share[..., None]
        else:
            tensor[places] = inside
        return tensor


class UnitsBehind:
    """The units behind the site of some pairs: read, and held inside a range, while the chosen entries have other values.

    ``others`` are pairs at the same site, whose natural runs count as well.
    """

    def __init__(self, data: SitePairs, *others: SitePairs) -> None:
        self.data, self.all = data, (data, *others)
        model, name = data.model, SiteName.parse(data.site)
        self.units: list[_Units] = []
        if name.tower not in model.towers or name.layer is None:
            return
        order = list(model.engine.points)
        inputs, even = data.parts[0].inputs, self._even()
        for block in model.towers[name.tower].blocks:
            for branch in block.branches:
                for site, kind in _sites_of(branch, even):
                    full = f"{name.tower}.blocks.{block.layer}.{site}"
                    behind = full in order and order.index(full) > order.index(data.site)
                    if behind and not model.is_dead(full, inputs):
                        self.units.append(_Units(full, kind))

    def _even(self) -> bool:
        """Whether every run has the same positions, none of them padding."""
        model = self.data.model
        sizes = set()
        for data in self.all:
            for part in data.parts:
                for inputs in (part.inputs, part.batch.other):
                    maps = model.tokens(inputs)
                    if not all(bool(tokens.present.all()) for tokens in maps.values()):
                        return False
                    sizes.add(tuple((tower, tokens.n_positions) for tower, tokens in maps.items()))
        return len(sizes) == 1

    def __bool__(self) -> bool:
        return bool(self.units)

    @property
    def sites(self) -> list[str]:
        """Where the units are."""
        return [one.site for one in self.units]

    def natural(self) -> Float[Tensor, "place unit"]:
        """Every unit at the chosen positions in the unedited runs of both sides."""
        found = []
        for data in self.all:
            for part in data.parts:
                for inputs in (part.inputs, part.batch.other):
                    with torch.no_grad():
                        _, values = data.model._values_at(data.model._checked(inputs), self.sites)
                    if inputs is part.batch.other:
                        values = {site: laid_values(data.model, part.batch, site, one) for site, one in values.items()}
                    found.append(self._all_values(values, part.places))
        return torch.cat(found)

    def _all_values(self, values: Mapping[str, Tensor], places: tuple[Tensor, ...]) -> Float[Tensor, "place unit"]:
        return torch.cat([one.values(values[one.site], places).double().cpu() for one in self.units], 1)

    def read(self, values: Float[Tensor, "entry d"]) -> Float[Tensor, "place unit"]:
        """Every unit at the chosen positions, where the entries have these values."""
        found = []
        for part in self.data.each():
            held: dict[str, Tensor] = {}
            watched = [edits.apply(site, _keep(held, site)) for site in self.sites]
            with torch.no_grad():
                part.run([self.data.replacement(part, values[part.entries]), *watched])
            found.append(self._all_values(held, part.places))
        return torch.cat(found)

    def clamped(
        self, values: Float[Tensor, "entry d"], low: Float[Tensor, " unit"], high: Float[Tensor, " unit"]
    ) -> Float[Tensor, " example"]:
        """The logit difference (or metric) with every unit at the chosen positions held between ``low`` and ``high``."""
        counts: list[int] = []
        found = []
        for part in self.data.each():
            made = [self.data.replacement(part, values[part.entries])]
            counts = counts or self._counts(part)
            ends = zip(low.split(counts), high.split(counts), strict=True)
            made += [
                edits.apply(one.site, _hold(one, part.places, *both))
                for one, both in zip(self.units, ends, strict=True)
            ]
            with torch.no_grad():
                rows = self.data._rows(part.run(made), part.inputs, part.batch)
            found.append(self.data.outcome(part, rows).difference)
        return torch.cat(found)

    def _counts(self, part: SiteBatch) -> list[int]:
        """How many units each site has."""
        with torch.no_grad():
            _, values = self.data.model._values_at(self.data.model._checked(part.inputs), self.sites)
        return [one.values(values[one.site], part.places).shape[1] for one in self.units]


def _sites_of(branch: Branch, even: bool) -> list[tuple[str, str]]:
    """Where a branch has units, in the order of a run."""
    if isinstance(branch, MLPBranch):
        return [(branch.inner, "neurons")]
    if not isinstance(branch, AttentionBranch):
        return []
    return [(f"{branch.name}.hook_pattern", "attention")] * even + [(branch.inner, "norms")]


def _keep(held: dict[str, Tensor], site: str) -> Any:
    """A function that keeps a site's tensor and changes nothing."""

    def keep(value: Tensor, hook: Any) -> None:
        held[site] = value

    return keep


def _hold(units: _Units, places: tuple[Tensor, ...], low: Tensor, high: Tensor) -> Any:
    """A function that holds the units of a site at some places inside a range."""

    def hold(value: Tensor, hook: Any) -> Tensor:
        return units.held(value.clone(), places, low, high)

    return hold

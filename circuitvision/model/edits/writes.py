"""Edits of activations: what replaces, removes, adds to, scales or rearranges the values at a site.

Sources broadcast to the site's shape over *all* positions of the run, as a cache holds it; heads and positions then choose the entries that are
written. ``[d_model]`` is one vector for every entry, ``[head, d_head]`` one per head, ``[row, pos, d_model]`` one for each place.

Not covered: sources of another length than the run (map them first), and interventions that depend on the output.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitvision.data.sides import Side
from circuitvision.digests import NamedFunction
from circuitvision.errors import InputError
from circuitvision.model.averages import Average, shown
from circuitvision.model.edits.base import Edit, EditContext, source_length
from circuitvision.model.edits.values import SideSource, TensorRef, TensorRefMapping, short_repr
from circuitvision.model.positions import PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.registrations import HookPoint
    from circuitvision.model.wrapped import Wrapped


def _tensor(value: Any) -> Any:
    return value.tensor if isinstance(value, TensorRef) else value


def _check_fits(value: Any, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None) -> None:
    """Raise InputError if a source cannot broadcast to a site's rows, positions, heads and coordinates."""
    source = _tensor(value)
    if not isinstance(source, Tensor) or source.ndim == 0:
        return
    width = width_of(model, site)
    if width is not None and source.shape[-1] not in (1, width):
        raise InputError(f"its source has shape {tuple(source.shape)}; {site} has {width} coordinates")
    name = SiteName.parse(site)
    if source.ndim == 1 or window is None or (window.axis.absent and not name.is_pattern):
        return
    headed = name.has_heads
    ndim = 4 if headed else 3
    expected: list[int | None] = [window.rows, window.count, *([n_heads] if headed else [])]
    if name.is_pattern:
        expected[1:] = [n_heads, None if window.axis.absent else window.count]
    shape = [1] * (ndim - source.ndim) + list(source.shape)
    if len(shape) > ndim or any(
        have not in (1, want) for have, want in zip(shape, expected, strict=False) if want is not None
    ):
        raise InputError(
            f"its source has shape {tuple(source.shape)}; {site} has "
            f"{' × '.join(str(n) for n in expected if n is not None)} "
            f"{'rows, heads and queries' if name.is_pattern else 'rows, positions and heads' if headed else 'rows and positions'}"
            " in this run"
        )


THERE = "there"
"""The key of the mask of entries for which a run has a mean or a drawn value; others keep their own."""
_OF_THE_STREAM = ("hook_embed", "hook_pos_embed", "hook_input", "ln_final.hook_normalized")


@dataclass(frozen=True, repr=False)
class _Sourced(Edit):
    """An edit whose new values come from a source: a tensor, a number, or one tensor per site."""

    source: Any = None

    def source_at(self, site: str, given: Mapping[Any, Any]) -> Any:
        """The source for one site."""
        if isinstance(self.source, TensorRefMapping):
            return self.source.get(site)
        return self.source

    def sites(self, model: Wrapped) -> list[str]:
        names = super().sites(model)
        if isinstance(self.source, TensorRefMapping):
            missing = [name for name in names if self.source.get(name) is None]
            if missing:
                raise InputError(f"its source does not hold {missing[0]}; ask for it when the cache is made.")
        return names

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        if isinstance(self.source, NamedFunction):
            raise InputError(
                f"its source was the {self.source.name} side of a data set, which a file does not hold: make the edit again"
            )
        if isinstance(self.source, SideSource):
            raise InputError(
                f"its source is the {self.source}, which a sweep over a data set reads: model.sweep(pairs, …)"
            )
        _check_fits(self.source_at(site, {}), model, site, window, n_heads)

    def source_end(self, site: str, ndim: int, given: Mapping[Any, Any]) -> int | None:
        length = source_length(self.source_at(site, given), ndim, 2 if SiteName.parse(site).is_pattern else 1)
        return None if length in (None, 1) else length


@dataclass(frozen=True, repr=False)
class Replace(_Sourced):
    """See :func:`circuitvision.edits.replace`."""

    kind = "replace"
    sets: ClassVar[bool] = True
    allows_patterns: ClassVar[bool] = True

    def new(self, x: Tensor, at: EditContext) -> Any:
        """``x' = source``."""
        return at.pick(self.source_at(at.site, at.given), x)


@dataclass(frozen=True, repr=False)
class Ablate(_Sourced):
    """See :func:`circuitvision.edits.ablate`."""

    kind = "ablate"
    method: str = "zero"
    dataset: tuple[TensorRefMapping, ...] | Side | None = None
    average: Average = "position"
    seed: int = 0
    neurons: tuple[int, ...] | None = None

    @property
    def sets(self) -> bool:  # type: ignore[override]
        """Some neurons leave the rest of the site as it was."""
        return self.neurons is None

    def _shown(self) -> list[str]:
        if self.method == "given":
            return [short_repr(self.source)]
        more = [part for part in super()._shown() if not part.startswith(("method=", "average="))]
        return [repr(self.method), *more, *([] if self.average == "position" else [f"average={shown(self.average)}"])]

    def source_at(self, site: str, given: Mapping[Any, Any]) -> Any:
        if self.method in ("mean", "resample"):
            return given.get((self, site)) if given else None
        return super().source_at(site, given)

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        if isinstance(self.dataset, NamedFunction):
            raise InputError(
                f"its data set {self.dataset.name!r} is known by its name alone: load with objects={{name: data set}}"
            )
        if self.method == "heads" and (self.heads is None or not SiteName.parse(site).has_heads):
            raise InputError("the mean over the other heads needs heads=… at a site that has heads")
        width = width_of(model, site)
        if width is not None and any(not -width <= number < width for number in self.neurons or ()):
            raise InputError(f"{site} has {width} neurons, so not all of {list(self.neurons or ())}")

    @property
    def reads_all(self) -> bool:  # type: ignore[override]
        """The mean over heads reads the heads that are kept."""
        return self.method == "heads"

    def new(self, x: Tensor, at: EditContext) -> Any:
        """``x' = 0``, or the mean, or another example's value, in some neurons or all; what is not there stays as it is."""
        new = 0.0 if self.method == "zero" else at.pick(self.source_at(at.site, at.given), x)
        there = at.given.get((self, at.site, THERE)) if self.method in ("mean", "resample") else None
        if there is not None:
            new = torch.where(at.pick(there, x).bool(), new, x)
        if self.neurons is None:
            return new
        chosen = torch.zeros(x.shape[-1], dtype=torch.bool, device=x.device)
        chosen[list(self.neurons)] = True
        return torch.where(chosen, new, x)

    def write(self, value: Tensor, window: PositionWindow, hook: HookPoint, given: Mapping[Any, Any]) -> None:
        if self.method != "heads":
            super().write(value, window, hook, given)
            return
        at = self._place(value, window, hook, given) if self.steps.acts(hook.step) else None
        if at is None:
            return
        assert self.heads is not None
        kept = [head for head in range(value.shape[2]) if head not in {h % value.shape[2] for h in self.heads}]
        if not kept:
            raise InputError(f"{self!r}: no head is left to take the mean of.")
        value[at.index] = value[:, :, kept].mean(2, keepdim=True).expand_as(value)[at.index]


@dataclass(frozen=True, repr=False)
class Steer(Edit):
    """See :func:`circuitvision.edits.steer`."""

    kind = "steer"
    direction: Any = None
    scale: Any = 1.0
    mode: str = "add"

    @property
    def does_nothing(self) -> bool:
        return not isinstance(self.scale, TensorRef) and float(self.scale) == 0.0

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        _check_fits(self.direction, model, site, window, n_heads)
        _check_fits(self.scale, model, site, window, n_heads)

    def source_end(self, site: str, ndim: int, given: Mapping[Any, Any]) -> int | None:
        length = source_length(self.direction, ndim)
        return None if length in (None, 1) else length

    def new(self, x: Tensor, at: EditContext) -> Tensor:
        """``x + s d``; ``‖x‖ (x̂ + s d̂)/‖x̂ + s d̂‖``; ``x - s (x·d̂) d̂``."""
        return steered(x, at.pick(self.direction, x), at.pick(self.scale, x), self.mode)


def steered(x: Tensor, direction: Tensor, scale: Any, mode: str) -> Tensor:
    """Activations ``[… d]`` moved along a direction, see :func:`circuitvision.edits.steer`."""
    if mode == "add":
        return x + scale * direction
    unit = direction / direction.norm(dim=-1, keepdim=True)
    if mode == "project_out":
        return x - scale * (x * unit).sum(-1, keepdim=True) * unit
    length = x.norm(dim=-1, keepdim=True)
    turned = x / length.clamp_min(torch.finfo(x.dtype).tiny) + scale * unit
    return turned / turned.norm(dim=-1, keepdim=True) * length


@dataclass(frozen=True, repr=False)
class Scale(Edit):
    """See :func:`circuitvision.edits.scale`."""

    kind = "scale"
    factor: Any = 1.0
    clip: tuple[float, float] | None = None

    @property
    def does_nothing(self) -> bool:
        return self.clip is None and not isinstance(self.factor, TensorRef) and float(self.factor) == 1.0

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        _check_fits(self.factor, model, site, window, n_heads)

    def source_end(self, site: str, ndim: int, given: Mapping[Any, Any]) -> int | None:
        length = source_length(self.factor, ndim)
        return None if length in (None, 1) else length

    def new(self, x: Tensor, at: EditContext) -> Tensor:
        """``x' = clip(factor) x``."""
        factor = at.pick(self.factor, x)
        if self.clip is not None:
            low, high = self.clip
            factor = factor.clamp(low, high) if isinstance(factor, Tensor) else min(max(factor, low), high)
        return x * factor


@dataclass(frozen=True, repr=False)
class Overwrite(Edit):
    """See :func:`circuitvision.edits.overwrite`."""

    kind = "overwrite"
    neurons: tuple[int, ...] = ()
    value: Any = 0.0
    dictionary: Any = None

    @property
    def sets(self) -> bool:  # type: ignore[override]
        """Neurons are set outright; features leave the rest of the site as it was."""
        return self.dictionary is None

    @property
    def does_nothing(self) -> bool:
        return not self.neurons

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        if isinstance(self.dictionary, NamedFunction):
            raise InputError(
                f"its dictionary {self.dictionary.name!r} is known by its name alone: load with objects={{name: dictionary}}"
            )
        width = width_of(model, site) if self.dictionary is None else None
        if width is not None:
            self._check_count(width, f"coordinates of {site}")
        value = _tensor(self.value)
        if isinstance(value, Tensor) and value.ndim and value.shape[-1] not in (1, len(self.neurons)):
            raise InputError(f"its value has shape {tuple(value.shape)} for {len(self.neurons)} neurons")

    def new(self, x: Tensor, at: EditContext) -> Tensor:
        """``x_i = c``; with a dictionary ``x' = decode(f') + (x - decode(f))`` where ``f' ≠ f``."""
        index = list(self.neurons)
        value = _tensor(self.value)
        value = value.to(x) if isinstance(value, Tensor) else value
        if self.dictionary is None:
            self._check_count(x.shape[-1], f"coordinates of {at.site}")
            out = x.clone()
            out[..., index] = value
            return out
        features = self.dictionary.encode(x)
        self._check_count(features.shape[-1], "features of its dictionary")
        edited = features.clone()
        edited[..., index] = value
        rebuilt = self.dictionary.decode(edited) + (x - self.dictionary.decode(features))
        return torch.where((edited != features).any(-1, keepdim=True), rebuilt, x)

    def _check_count(self, count: int, what: str) -> None:
        for neuron in self.neurons:
            if not -count <= neuron < count:
                raise InputError(f"neuron {neuron} is outside the {count} {what}")


def width_of(model: Wrapped, site: str) -> int | None:
    """Size of a site's last axis, where the tower's configuration says it."""
    name = SiteName.parse(site)
    if name.tower not in model.towers or name.is_pattern:
        return None
    cfg = model.towers[name.tower].cfg
    if name.site.startswith("mlp."):
        return cfg.d_mlp
    if name.stage == "hook_scale":
        return 1
    if name.has_heads and not name.stage.endswith(("_input", "result")):
        return cfg.d_head
    return cfg.d_model if name.layer is not None or name.site in _OF_THE_STREAM else None


@dataclass(frozen=True, repr=False)
class Project(_Sourced):
    """See :func:`circuitvision.edits.project`."""

    kind = "project"
    basis: TensorRef | None = None

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        assert self.basis is not None
        width, given = width_of(model, site), self.basis.tensor.shape[0]
        if width is not None and given != width:
            raise InputError(f"its basis has vectors of {given} coordinates, {site} has {width}")

    def new(self, x: Tensor, at: EditContext) -> Tensor:
        """``x' = x + (source - x) V Vᵀ`` with ``V`` the orthonormal basis of the given one's span."""
        assert self.basis is not None
        basis = self.basis.orthonormal().to(x)
        if basis.shape[0] != x.shape[-1]:
            raise InputError(f"its basis has vectors of {basis.shape[0]} coordinates, {at.site} has {x.shape[-1]}")
        change = at.pick(self.source_at(at.site, at.given), x) - x
        return x + (change @ basis) @ basis.T


@dataclass(frozen=True, repr=False)
class Freeze(Edit):
    """See :func:`circuitvision.edits.freeze`."""

    kind = "freeze"
    sets: ClassVar[bool] = True
    at: str = ""

    def captured(self) -> str | None:
        return self.at

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        names = model.sites()
        if self.at not in names:
            names = model.sites(self.at)
            raise InputError(f"at={self.at!r} must name one site; it matches {len(names)}")
        order = list(model.engine.points)
        if order.index(self.at) >= order.index(site):
            raise InputError(f"{self.at} is not before {site}, so its value is not known there")
        here, there = SiteName.parse(site), SiteName.parse(self.at)
        if here.tower != there.tower or here.has_heads != there.has_heads:
            raise InputError(f"{self.at} and {site} have other shapes")

    def new(self, x: Tensor, at: EditContext) -> Tensor:
        """``x' =`` the value that ``at`` had in this pass."""
        earlier = at.given[(self, self.at)][at.absolute]
        if earlier.shape != x.shape:
            raise InputError(f"{self!r}: {self.at} has shape {tuple(earlier.shape)}, {at.site} {tuple(x.shape)}.")
        return earlier


@dataclass(frozen=True, repr=False)
class Permute(Edit):
    """See :func:`circuitvision.edits.permute`."""

    kind = "permute"
    mixes_positions: ClassVar[bool] = True
    order: tuple[int, ...] = ()

    @property
    def does_nothing(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        if window is None:
            return
        counts = self.positions.covers(window).sum(1)
        if self.positions.kind == "ints":
            self._ascending(window)
        if bool((counts != len(self.order)).any()):
            raise InputError(f"its order has {len(self.order)} entries for {sorted(set(counts.tolist()))} positions")

    def _ascending(self, window: PositionWindow) -> tuple[int, ...]:
        """The order over the selected positions as a tensor holds them: ascending, where numbers may be given in any order."""
        if self.positions.kind != "ints":
            return self.order
        given = [position % window.prompt if position < 0 else position for position in self.positions.ints]
        if len(set(given)) != len(given):
            raise InputError("its positions name one position twice")
        ranks = {position: rank for rank, position in enumerate(sorted(given))}
        ascending = sorted(range(len(given)), key=given.__getitem__)
        return tuple(ranks[given[self.order[number]]] for number in ascending if number < len(self.order))

    def write(self, value: Tensor, window: PositionWindow, hook: HookPoint, given: Mapping[Any, Any]) -> None:
        """``x'[p_i] = x[p_order(i)]`` over the selected positions ``p``: numbers in the order given, all else ascending."""
        at = self._place(value, window, hook, given) if self.steps.acts(hook.step) else None
        if at is None:
            return
        order = torch.tensor(self._ascending(window), device=value.device)
        taken = value[at.index]
        per_row = isinstance(at.index[0], Tensor)
        count = len(order)
        if (taken.shape[0] % count if per_row else taken.shape[1] != count) or at.pooled:
            raise InputError(f"{self!r}: this pass holds only some of the positions, so they cannot change places.")
        if per_row:
            value[at.index] = taken.unflatten(0, (-1, count))[:, order].flatten(0, 1)
        else:
            value[at.index] = taken[:, order]


@dataclass(frozen=True, repr=False)
class Renormalise(Edit):
    """See :func:`circuitvision.edits.renormalise`."""

    kind = "renormalise"
    norm: Any = 1.0

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        _check_fits(self.norm, model, site, window, n_heads)

    def new(self, x: Tensor, at: EditContext) -> Tensor:
        """``x' = norm · x/‖x‖``."""
        return x * (at.pick(self.norm, x) / x.norm(dim=-1, keepdim=True))


@dataclass(frozen=True, repr=False)
class Apply(Edit):
    """See :func:`circuitvision.edits.apply`."""

    kind = "apply"
    allows_patterns: ClassVar[bool] = True
    reads_all: ClassVar[bool] = True
    mixes_positions: ClassVar[bool] = True
    fn: Callable[..., Any] | None = None

    def _shown(self) -> list[str]:
        return [getattr(self.fn, "__name__", repr(self.fn))]

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        if isinstance(self.fn, NamedFunction):
            self.fn.resolve()

    def write(self, value: Tensor, window: PositionWindow, hook: HookPoint, given: Mapping[Any, Any]) -> None:
        """``x' = fn(x, hook)`` at the selected entries; ``fn`` sees the whole tensor of its run."""
        if not self.steps.acts(hook.step):
            return
        assert self.fn is not None
        new = self.fn(value.clone(), hook)
        if new is None:
            return
        if not isinstance(new, Tensor) or new.shape != value.shape:
            shape = tuple(new.shape) if isinstance(new, Tensor) else type(new).__name__
            raise InputError(f"{self!r}: the function returned {shape}; {hook.name} has shape {tuple(value.shape)}.")
        at = self._place(value, window, hook, given)
        if at is not None:
            value[at.index] = new.to(value)[at.index]

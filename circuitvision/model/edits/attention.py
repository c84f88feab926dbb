"""Edits of attention: who may look at whom, and how strongly.

All act on scores or patterns, never on the caller's mask: masks arrive as nothing, as booleans or as numbers to add, depending on the attention
implementation and on padding, and a mask edit that is right for one is silently wrong for another. Entries that the run's own mask hides stay hidden.

``renormalise=True`` edits the scores before the softmax, so that every row of the pattern still sums to one; ``renormalise=False`` edits the pattern
after it, which also shrinks what the head writes.

Keys count every position the tower can look at: cached positions first, then its own. PI0's action tower looks at the prefix first; a selection of
the ``language`` token map names prefix keys there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from circuitvision.errors import InputError
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.values import TensorRef, short_repr
from circuitvision.model.positions import ALL_POSITIONS, Positions, PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.registrations import HookPoint
    from circuitvision.model.tower import Tower
    from circuitvision.model.wrapped import Wrapped


@dataclass(frozen=True, repr=False)
class AttentionEdit(Edit):
    """An edit of the (query, key) entries of one tower's scores or patterns; ``positions`` are the queries, ``site`` is the tower."""

    keys: Positions = ALL_POSITIONS
    layers: tuple[int, ...] | str | None = None
    renormalise: bool = True
    allows_patterns: ClassVar[bool] = True
    positions_name: ClassVar[str] = "queries"

    def sites(self, model: Wrapped) -> list[str]:
        if self.site not in model.towers:
            raise InputError(f"there is no tower {self.site!r}; this model has {', '.join(model.towers)}")
        stage = "attn_scores" if self.renormalise else "pattern"
        if self.layers == "pool":
            return model.sites(f"{self.site}.pool.attn.hook_{stage}")
        count = model.towers[self.site].cfg.n_layers
        chosen = range(count) if self.layers is None else self.layers
        for layer in chosen:
            if not isinstance(layer, int) or not -count <= layer < count:
                raise InputError(f"layer {layer} is outside the {count} layers of the {self.site} tower")
        return self._sites_of(model.towers[self.site], sorted({int(n) % count for n in chosen}), stage)

    def _sites_of(self, tower: Tower, layers: Sequence[int], stage: str) -> list[str]:
        """The sites in blocks whose attention looks at the tower that the keys are of: another one where blocks attend across."""
        across = self.keys.tower if self.keys.tower in tower.crossed_towers else ""
        found = {
            layer: f"{tower.name}.blocks.{layer}.{attention.name}.hook_{stage}"
            for layer in layers
            for attention in tower.blocks[layer].attentions
            if attention.core.keys_of == across
        }
        without = [layer for layer in layers if layer not in found]
        if without and (self.layers is not None or not found):
            raise InputError(
                f"block {without[0]} of the {tower.name} tower does not look at the {across or tower.name} tower; those that do are "
                f"{', '.join(map(str, tower.layers_that_see(across))) or 'none'}"
            )
        return list(found.values())

    def _shown(self) -> list[str]:
        shown = [] if self.keys.kind == "all" else [f"keys={short_repr(self.keys.plain)}"]
        shown += self._strength()
        if self.layers is not None:
            shown.append(f"layers={short_repr(self.layers if isinstance(self.layers, str) else list(self.layers))}")
        return shown if self.renormalise else [*shown, "renormalise=False"]

    def _strength(self) -> list[str]:
        return []

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        super().check(model, site, window, n_heads, grows)
        if window is None:
            return
        prefix = window.prefix
        if prefix is not None and (window.crossed or self.keys.tower == prefix.tower):
            self.keys.check(prefix, 0)
        elif self.keys.tower not in ("", window.tower):
            raise InputError(f"the {window.tower} tower cannot look at positions of the {self.keys.tower} tower")
        else:
            try:
                self.keys.check(window.of_all(), grows)
            except InputError as error:
                if prefix is None:
                    raise
                raise InputError(
                    f"{error}; keys without a tower are the {window.tower} tower's own, those of the prefix before them are "
                    f"keys=({prefix.tower!r}, positions) or a selection of the {prefix.tower} tower"
                ) from error

    def write(self, value: Tensor, window: PositionWindow, hook: HookPoint, given: Mapping[Any, Any]) -> None:
        """Change the selected entries of ``[row head query key]``."""
        if not self.steps.acts(hook.step):
            return
        region = self.region(value, window)
        if region is not None and bool(region.any()):
            value.copy_(self.changed(value.clone() if torch.is_grad_enabled() else value, region, hook))

    def region(self, value: Tensor, window: PositionWindow) -> Tensor | None:
        """The selected entries as bool, broadcasting to ``[row head query key]``."""
        rows, n_heads, n_queries, n_keys = value.shape
        queries = torch.ones(1, n_queries, dtype=torch.bool, device=value.device)
        if self.positions.kind != "all":
            self._check_length(n_queries, window, window.axis.site)
            queries = _mask(self.positions, window, rows, value.device)
        keys = self._key_mask(window, rows, n_keys, value.device)
        region = queries[:, None, :, None] & keys[:, None, None, :]
        if self.heads is None:
            return region
        heads = torch.zeros(n_heads, dtype=torch.bool, device=value.device)
        heads[[head % n_heads for head in self.heads]] = True
        return region & heads[None, :, None, None]

    def _key_mask(self, window: PositionWindow, rows: int, n_keys: int, device: torch.device) -> Tensor:
        """Bool ``[rows or 1, key]``: which keys are meant, of the prefix and of the tower itself."""
        everything = self.keys.kind == "all" and not self.keys.tower
        if everything:
            return torch.ones(1, n_keys, dtype=torch.bool, device=device)
        prefix = window.prefix
        if window.crossed and prefix is not None:
            return _mask(self.keys, prefix, rows, device)
        # A pooling's one query looks at every position. Elsewhere keys end with the last query's own; sliding windows have dropped the first ones.
        behind = n_keys if window.axis.absent else window.first + window.length
        n_prefix = 0 if prefix is None else prefix.length
        dropped = behind + n_prefix - n_keys
        if dropped < 0 or (dropped and prefix is not None):
            raise InputError(
                f"{self!r}: {window.axis.site} has {n_keys} keys in this pass, of which {behind + n_prefix} are known. Leave keys out."
            )
        own_window = window.of_all(first=dropped, length=n_keys - n_prefix)
        if prefix is None:
            return _mask(self.keys, own_window, rows, device)
        if self.keys.tower == prefix.tower:
            own = torch.zeros(1, own_window.length, dtype=torch.bool, device=device)
            before = _mask(self.keys, prefix, rows, device)
        else:
            own = _mask(self.keys, own_window, rows, device)
            before = torch.zeros(1, prefix.length, dtype=torch.bool, device=device)
        count = max(len(own), len(before))
        return torch.cat([before.expand(count, -1), own.expand(count, -1)], dim=1)

    def changed(self, value: Tensor, region: Tensor, hook: HookPoint) -> Tensor:
        """The new scores or pattern."""
        raise NotImplementedError


def _mask(positions: Positions, window: PositionWindow, rows: int, device: torch.device) -> Tensor:
    """Bool ``[rows or 1, length]``."""
    chosen = positions.choose(window, rows, device)
    if chosen is None:
        return torch.ones(1, window.count, dtype=torch.bool, device=device)
    out = torch.zeros(rows if isinstance(chosen, tuple) else 1, window.count, dtype=torch.bool, device=device)
    if isinstance(chosen, tuple):
        out[chosen] = True
    else:
        out[:, chosen] = True
    return out


def broadcasting(what: str, source: Any, value: Tensor, hook: HookPoint) -> Tensor:
    """A number, or a tensor on its autograd path, that broadcasts to scores or a pattern; InputError for a tensor that does not."""
    found = source.tensor.to(value) if isinstance(source, TensorRef) else torch.tensor(float(source)).to(value)
    if any(have not in (1, want) for have, want in zip(found.shape[::-1], value.shape[::-1], strict=False)):
        raise InputError(f"its {what} has shape {tuple(found.shape)}, {hook.name} {tuple(value.shape)}")
    return found


def visible(scores: Tensor) -> Tensor:
    """Which entries of the scores the run's own mask leaves visible: masked ones hold the smallest number of the type, or minus infinity."""
    return scores > torch.finfo(scores.dtype).min / 2


@dataclass(frozen=True, repr=False)
class BlockAttention(AttentionEdit):
    """See :func:`circuitvision.edits.block_attention`."""

    kind = "block_attention"

    def changed(self, value: Tensor, region: Tensor, hook: HookPoint) -> Tensor:
        """Scores: the smallest number of the type, so that the pattern is exactly 0 there; pattern: 0."""
        if not self.renormalise:
            return value.masked_fill(region, 0.0)
        seen = visible(value)
        blocked = seen & region
        left = (seen & ~region).any(-1)
        if bool((seen.any(-1) & ~left).any()):
            row, head, query = (seen.any(-1) & ~left).nonzero()[0].tolist()
            raise InputError(
                f"{self!r}: nothing is left for position {query} of row {row} to look at, at {hook.name} head {head}. "
                "Leave it a key (its own position, say), or pass renormalise=False."
            )
        return value.masked_fill(blocked, torch.finfo(value.dtype).min)


@dataclass(frozen=True, repr=False)
class ScaleAttention(AttentionEdit):
    """See :func:`circuitvision.edits.scale_attention`."""

    kind = "scale_attention"
    factor: Any = 1.0

    @property
    def does_nothing(self) -> bool:
        return not isinstance(self.factor, TensorRef) and float(self.factor) == 1.0

    def _strength(self) -> list[str]:
        return [f"factor={self.factor!r}" if isinstance(self.factor, TensorRef) else f"factor={self.factor:g}"]

    def changed(self, value: Tensor, region: Tensor, hook: HookPoint) -> Tensor:
        """``score · factor`` or ``pattern · factor``."""
        where = region & visible(value) if self.renormalise else region
        factor = broadcasting("factor", self.factor, value, hook)
        # What is hidden stays out of the product, whose gradient the smallest number of the type would overflow.
        return torch.where(where, value.masked_fill(~where, 0.0) * factor, value)


@dataclass(frozen=True, repr=False)
class AddAttentionBias(AttentionEdit):
    """See :func:`circuitvision.edits.add_attention_bias`."""

    kind = "add_attention_bias"
    bias: Any = 0.0

    @property
    def does_nothing(self) -> bool:
        return not isinstance(self.bias, TensorRef) and float(self.bias) == 0.0

    def _strength(self) -> list[str]:
        return [f"bias={self.bias!r}"]

    def changed(self, value: Tensor, region: Tensor, hook: HookPoint) -> Tensor:
        """``score + bias`` or ``pattern · exp(bias)``."""
        bias = broadcasting("bias", self.bias, value, hook)
        if not self.renormalise:
            return torch.where(region, value * bias.exp(), value)
        return torch.where(region & visible(value), value + bias, value)


@dataclass(frozen=True, repr=False)
class DeleteTokens(AttentionEdit):
    """See :func:`circuitvision.edits.delete_tokens`; ``positions`` are those deleted."""

    kind = "delete_tokens"
    positions_name: ClassVar[str] = "positions"
    start: int = 0
    reindex: bool = False

    def _shown(self) -> list[str]:
        shown = [] if self.start == 0 else [f"start={self.start}"]
        return [*shown, "reindex=True"] if self.reindex else shown

    def sites(self, model: Wrapped) -> list[str]:
        names = super().sites(model)
        count = model.towers[self.site].cfg.n_layers
        if not 0 <= self.start <= count:
            raise InputError(f"start={self.start} is outside the {count} layers of the {self.site} tower")
        names = [name for name in names if (SiteName.parse(name).layer or 0) >= self.start]
        known = model.engine.points
        pool = f"{self.site}.pool.attn.hook_attn_scores"
        if pool in known:
            names.append(pool)
        names += self._averaged(model)
        if not names:
            raise InputError(f"start={self.start} is behind the last layer, where no position looks at another")
        return names

    def _averaged(self, model: Wrapped) -> list[str]:
        """The site whose mean over positions is read, where there is one."""
        tower = model.towers[self.site]
        table = tower.output_head.table
        if "mean" not in table.pool:
            return []
        last = f"{self.site}.blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
        return [f"{self.site}.ln_final.hook_normalized" if table.normed else last]

    @property
    def does_nothing(self) -> bool:
        return self.positions.kind == "ints" and not self.positions.ints

    def check(self, model: Wrapped, site: str, window: PositionWindow | None, n_heads: int | None, grows: int) -> None:
        window = None if window is None else window.of_all()
        super().check(model, site, window, n_heads, grows)
        tower = model.towers[self.site]
        self._check_reach(tower, site, window, grows)
        counted = not (tower.stack.image or tower.feeds_cache or tower.spec.runs == "per_denoising_step")
        if model.flow.crossed_by(self.site) is not None:
            raise InputError(
                f"positions of the {self.site} tower are looked at by another tower's cross-attention, which deletes nothing: hide them there "
                f"with block_attention(TOWER, keys=({self.site!r}, positions))"
            )
        if self.reindex and not counted:
            raise InputError(
                f"positions of the {self.site} tower cannot be counted anew; leave reindex=False: tokens keep their positions"
            )
        if self.reindex and grows:
            raise InputError("reindex=True works in single runs; generate counts positions by itself")
        readout = tower.spec.readout
        if window is None or window.tokens is None or readout is None:
            return
        gone = self.positions.covers(window)
        read = (
            torch.from_numpy(window.tokens.mask(list(readout.reads)).numpy()) if set(readout.reads) <= {"cls"} else None
        )
        if read is not None and bool((gone & read).any()):
            raise InputError(f"the output is read from the {readout.reads[0]} position, which cannot be deleted")

    def _check_reach(self, tower: Tower, site: str, window: PositionWindow | None, grows: int) -> None:
        """Raise InputError where a sliding window counts positions: the others would not reach as far as in a shorter sequence."""
        name = SiteName.parse(site)
        if window is None or name.layer is None or not name.is_pattern:
            return
        reach = tower.sliding_window(name.layer)
        if reach is not None and reach < window.prompt + grows:
            raise InputError(
                f"block {name.layer} of the {tower.name} tower sees {reach} positions back, deleted ones counted, so the others would not "
                "see what a shorter prompt sees; shorten the prompt itself, or hide keys with block_attention"
            )

    def region(self, value: Tensor, window: PositionWindow) -> Tensor | None:
        n_queries, n_keys = value.shape[2:]
        gone = dataclasses.replace(self, positions=ALL_POSITIONS, keys=self.positions, heads=None)
        region = AttentionEdit.region(gone, value, window)
        if region is None or window.axis.absent:
            return region
        own = torch.arange(n_queries, device=value.device)[:, None] + (n_keys - n_queries)
        return region & (own != torch.arange(n_keys, device=value.device))[None, None]

    def write(self, value: Tensor, window: PositionWindow, hook: HookPoint, given: Mapping[Any, Any]) -> None:
        if not SiteName.parse(hook.name).is_pattern:
            if self.steps.acts(hook.step):
                self._leave_out_of_mean(value, window)
            return
        super().write(value, window, hook, given)

    def _leave_out_of_mean(self, value: Tensor, window: PositionWindow) -> None:
        """Give deleted positions the mean of the others: the mean over all positions is then the mean over those that remain."""
        gone = self.positions.covers(window).to(value.device).expand(value.shape[0], -1)
        prefix = torch.zeros(value.shape[1], dtype=torch.bool, device=value.device)
        counted = torch.ones_like(gone)
        if window.tokens is not None:
            kinds = window.tokens
            counted = kinds.select().tensor.to(value.device).expand_as(gone).clone()
            prefix = (~kinds.mask("patch")).all(0).to(value.device)
        counted &= ~prefix
        for row in range(value.shape[0]):
            stay, leave = counted[row] & ~gone[row], counted[row] & gone[row]
            if not bool(stay.any()):
                raise InputError(f"{self!r}: no position is left to read the output from.")
            value[row, leave] = value[row, stay].mean(0)

    def changed(self, value: Tensor, region: Tensor, hook: HookPoint) -> Tensor:
        """Hide the deleted keys from every other position."""
        seen = visible(value)
        if bool((seen.any(-1) & ~(seen & ~region).any(-1)).any()):
            raise InputError(f"{self!r}: nothing is left to look at, at {hook.name}.")
        return value.masked_fill(seen & region, torch.finfo(value.dtype).min)

    def change_inputs(self, model: Wrapped, inputs: Mapping[str, Any], window: PositionWindow) -> dict[str, Any]:
        """With ``reindex``: the inputs with positions counted over the remaining tokens."""
        if not self.reindex:
            return dict(inputs)
        embeds = inputs.get("inputs_embeds")
        ids = inputs["input_ids"] if embeds is None else torch.zeros_like(embeds[..., 0], dtype=torch.long)
        gone = self.positions.covers(window).to(ids.device).expand(ids.shape)
        before = inputs.get("position_ids")
        before = torch.arange(ids.shape[1], device=ids.device)[None] if before is None else before
        after = (before.expand(ids.shape) - gone.int().cumsum(1) + gone.int()).clamp_min(0)
        # Without a mask, transformers takes a step other than one between positions for the start of another prompt.
        mask = inputs.get("attention_mask")
        return {**inputs, "position_ids": after, "attention_mask": torch.ones_like(ids) if mask is None else mask}

"""One resumed run: which module hands back what, and which rows and positions the others compute (see ``resume.py``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuitvision.errors import InputError
from circuitvision.incremental.replay import CannotResume, Overrides, fresh, is_plain, repeated
from circuitvision.incremental.routes import EMBED, ResumePlan, ResumePoint, reached_through_cache
from circuitvision.model.attention import PrefixKV
from circuitvision.model.branches import AttentionBranch
from circuitvision.model.dead import last_live_block, through_keys
from circuitvision.model.packing.base import Compared
from circuitvision.model.sites import SiteName
from circuitvision.model.spec import resolve

if TYPE_CHECKING:
    from circuitvision.incremental.resume import Resumer
    from circuitvision.model.block import Block
    from circuitvision.model.tower import Tower

PER_POSITION = ("attention_mask", "position_embeddings", "position_ids", "cache_position", "past_key_values")
"""What blocks are called with besides the stream, as far as it differs between positions or rows."""


def embeddings_of(tower: Tower) -> nn.Module | None:
    """The module that makes an image tower's first stream; for other towers it costs nothing and is not kept."""
    return resolve(tower.root, tower.stack.embeddings) if tower.stack.image else None


def unread_parts(block: Block) -> list[nn.Module]:
    """The modules of a block that act through the stream alone: nothing reads them in the last block of a tower that is read through its keys and
    values."""
    return [branch.returned_by for branch in block.branches]


class ResumedRun:
    """One resumed run: which module hands back what."""

    def __init__(self, resumer: Resumer, route: ResumePlan, copies: int, first: int) -> None:
        assert resumer.clean is not None
        self.owner, self.clean, self.model = resumer, resumer.clean, resumer.model
        self.route, self.copies, self.first = route, copies, first
        self.late = resumer.is_late(route)
        self.sliced = resumer.sliced_tower(route) if first else ""

    def inputs(self) -> dict[str, Any]:
        """The model's inputs: as they are, or repeated (in a dual encoder only those of the edited towers)."""
        given = self.owner.inputs
        if self.late or self.copies == 1:
            return dict(given)
        image = {self.model.towers[start.tower].stack.image for start in self.route.starts if self.owner.dual}
        edited: Compared = "both" if len(image) != 1 else "images" if True in image else "texts"
        try:
            return self.model.family.packing.repeat(self.model, given, self.copies, edited)
        except InputError as error:
            raise CannotResume(str(error)) from None

    def prefix_kv(self) -> dict[int, PrefixKV]:
        """Attention that finds the unedited keys and values of the positions before the suffix."""
        if not self.sliced:
            return {}
        start = self.route.start_in(self.sliced)
        blocks = self.model.towers[self.sliced].blocks[0 if start is None else max(start.layer, 0) :]
        out = {}
        for block in blocks:
            for attention in block.attentions:
                tap = self.clean.prefix_kv[id(attention.module)]
                out[id(attention.module)] = tap.resumed(self.first, self.copies)
        return out

    # -- handing back ----------------------------------------------------------------------------------------------------------------------

    def prepare(self, overrides: Overrides) -> None:
        """Put every replacement in place."""
        begun = [start.tower for start in self.route.starts]
        for name in self.owner.order:
            start = self.route.start_in(name)
            if start is not None:
                self._start(overrides, start)
            elif not self.model.flow.is_reached(name, begun):
                self._whole(overrides, name)
            elif name in self.model.towers:
                self._downstream(overrides, name)

    def _copies_of(self, tower: str) -> int:
        """How many copies of the rows an unedited tower hands back."""
        return 1 if self.late or self.owner.dual else self.copies

    def _hand_back(
        self, overrides: Overrides, module: nn.Module, copies: int, first: int = 0, block: Any = None
    ) -> None:
        kept = self.clean.results[id(module)]
        if first:
            kept = kept[:, first:]
        out = repeated(kept, copies)
        cached = self.clean.cached.get(id(module)) if block is not None else None

        def forward(*args: Any, **kwargs: Any) -> Any:
            if cached is not None:
                self._fill_cache(kwargs, cached, block.layer, copies)
            return fresh(out)

        overrides.forward(module, lambda original: forward)

    @staticmethod
    def _fill_cache(kwargs: Mapping[str, Any], cached: tuple[Tensor, Tensor], layer: int, copies: int) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            cache.update(repeated(cached[0], copies), repeated(cached[1], copies), layer)

    def _whole(self, overrides: Overrides, name: str) -> None:
        """A tower or projector that cannot have changed."""
        copies = self._copies_of(name)
        if name not in self.model.towers:
            self._hand_back(overrides, self.owner.connector(name), copies)
            return
        tower = self.model.towers[name]
        # Sites of a connector are counted by the passes of a tower's blocks, which must therefore be called.
        flow = self.model.flow
        asked = {start.tower for start in self.route.starts if start.is_connector}
        asked |= {site.tower for site in map(SiteName.parse, self.model.engine.asked()) if flow.connector(site.tower)}
        counted = any(flow.tower_of(connector) == name for connector in asked)
        if is_plain(self.clean.results[id(tower.root)]) and not counted:
            self._hand_back(overrides, tower.root, copies)
            return
        embeddings = embeddings_of(tower)
        if embeddings is not None:
            self._hand_back(overrides, embeddings, copies)
        for block in tower.blocks:
            self._hand_back(overrides, block.module, copies, block=block)

    def _downstream(self, overrides: Overrides, name: str) -> None:
        """A tower that a changed one feeds: all of it, or from the block on that reads changed keys and values."""
        tower = self.model.towers[name]
        for block in tower.blocks[: reached_through_cache(self.route, self.model, name)]:
            self._hand_back(overrides, block.module, self.copies)
        if self.sliced == name:
            self._slice(overrides, tower, 0)
        self._unread(overrides, tower, -1)

    def _unread(self, overrides: Overrides, tower: Tower, layer: int) -> None:
        """Hand back what no output reads, in blocks after ``layer``: blocks behind the last that leaves the tower; of a prefix's last, all but keys
        and values."""
        live = last_live_block(tower, self.owner.inputs)
        asked = {name for name in map(SiteName.parse, self.model.engine.asked()) if name.tower == tower.name}
        for block in tower.blocks[max(live, layer) + 1 :]:
            if not any(name.layer == block.layer for name in asked):
                self._hand_back(overrides, block.module, self.copies)
        edited = any(name.layer == live and not through_keys(tower.blocks[live], name.site) for name in asked)
        if tower.feeds_cache and layer < live and not edited:
            for module in unread_parts(tower.blocks[live]):
                self._hand_back(overrides, module, self.copies)

    def _start(self, overrides: Overrides, start: ResumePoint) -> None:
        if start.is_connector:
            if start.is_end:
                self._hand_back(overrides, self.owner.connector(start.tower), self.copies)
            return
        tower = self.model.towers[start.tower]
        if start.layer == EMBED:
            if self.sliced == start.tower:
                self._slice(overrides, tower, 0)
            return
        copies = 1 if self.late else self.copies
        embeddings = embeddings_of(tower)
        if embeddings is not None:
            self._hand_back(overrides, embeddings, copies)
        feeds = tower.feeds_cache
        for block in tower.blocks[: start.layer]:
            self._hand_back(overrides, block.module, copies, block=block if feeds else None)
        self._unread(overrides, tower, start.layer)
        block = tower.blocks[start.layer]
        if start.is_end:
            self._hand_back(overrides, block.module, self.copies, self._first_in(tower), block if feeds else None)
            self._slice(overrides, tower, start.layer + 1, entering=False)
        else:
            self._slice(overrides, tower, start.layer)
            if not start.is_whole:
                self._inside(overrides, tower, block, start)

    def _first_in(self, tower: Tower) -> int:
        return self.first if tower.name == self.sliced else 0

    def _inside(self, overrides: Overrides, tower: Tower, block: Block, start: ResumePoint) -> None:
        """Resume inside a block: its first branches hand back what they returned; of the last one, perhaps only the output projection runs."""
        first = self._first_in(tower)
        for branch in block.branches[: start.branch + 1]:
            resumes_here = start.at_output and branch.number == start.branch
            filled = block if tower.feeds_cache and isinstance(branch, AttentionBranch) else None
            last = branch.output if resumes_here and branch.holds_output else None
            self._replay(overrides, branch.module, last, first, filled)
            if not branch.holds_output and not resumes_here:
                self._replay(overrides, branch.output, None, first, None)

    def _replay(
        self, overrides: Overrides, module: nn.Module, last: nn.Module | None, first: int, block: Block | None
    ) -> None:
        """Let ``module`` return what it returned, or what ``last``, its last map, makes of the kept argument (so that hooks there act)."""
        result = self.clean.results[id(module)]
        kept = result[0] if isinstance(result, tuple) else result
        argument = None
        if last is not None:
            if self.clean.results[id(last)] is not kept:
                raise CannotResume(f"{type(module).__name__} changes what its last map returns")
            argument = repeated(self.clean.arguments[id(last)][:, first:], self.copies)
        # What attention returns beside its output may be read: T5's later blocks take the position bias of the first one.
        beside = tuple(_queries(value, first) for value in result[1:]) if isinstance(result, tuple) else ()
        fixed, *rest = repeated((kept[:, first:], *beside), self.copies)
        cached = None if block is None else self.clean.cached.get(id(block.module))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if cached is not None and block is not None:
                self._fill_cache(kwargs, cached, block.layer, self.copies)
            out = fixed if last is None else last(argument)
            return (out, *rest) if isinstance(result, tuple) else out

        overrides.forward(module, lambda original: forward)

    # -- positions and rows of the blocks that run ----------------------------------------------------------------------------------------

    def _slice(self, overrides: Overrides, tower: Tower, layer: int, entering: bool = True) -> None:
        """Give the blocks from ``layer`` on the rows and positions they compute; widen the last one's result where the tower is pooled."""
        first = self._first_in(tower)
        if not first and not self.late:
            return
        length = self.owner.tokens[tower.name].n_positions if first else 0
        for block in tower.blocks[layer:]:
            overrides.enter(block.module, self._entering(tower, first, length, entering))
            entering = False
        if first and not self.owner.keeps_positions(tower.name):
            last = tower.blocks[-1].module
            before = repeated(self.clean.results[id(last)][:, :first], self.copies)

            def widen(module: nn.Module, args: Any, output: Tensor) -> Tensor:
                return torch.cat([before.to(output), output], dim=1)

            overrides.leave(last, widen)

    def _entering(self, tower: Tower, first: int, length: int, entering: bool) -> Callable[..., Any]:
        copies = self.copies if self.late else 1

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            changed = dict(kwargs)
            for name, value in kwargs.items():
                if name == "hidden_states":
                    continue
                if isinstance(value, (Tensor, tuple)) and name not in PER_POSITION:
                    raise CannotResume(f"blocks of the {tower.name} tower are called with {name!r}")
                if first and name in ("position_embeddings", "position_ids"):
                    value = _suffix(value, first, length)
                elif first and name == "cache_position" and value is not None:
                    value = value[first:]
                elif name == "past_key_values":
                    value = None
                if name != "cache_position" and not (first and name == "attention_mask"):
                    value = _rows(value, copies, axes=3 if name == "position_embeddings" else 1)
                changed[name] = value
            # Some encoders pass the mask by position; nothing else they pass so is a tensor.
            if any(isinstance(value, Tensor) and value.ndim != 4 for value in args[1:]):
                raise CannotResume(f"blocks of the {tower.name} tower are called with unnamed tensors")
            if not first:
                args = (*args[:1], *(_rows(value, copies) for value in args[1:]))
            if not entering:
                return args, changed
            stream = args[0] if args else kwargs["hidden_states"]
            stream = repeated(stream[:, first:] if first else stream, copies)
            if args:
                return (stream, *args[1:]), changed
            return args, {**changed, "hidden_states": stream}

        return hook


def _queries(value: Any, first: int) -> Any:
    """What a module returned beside its output, ``[row head query key]``, for the queries from ``first`` on."""
    if not first or not isinstance(value, Tensor):
        return value
    if value.ndim != 4:
        raise CannotResume(f"a module returns a tensor of shape {tuple(value.shape)} beside its output")
    return value[:, :, first:]


def _suffix(value: Any, first: int, length: int) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_suffix(item, first, length) for item in value)
    if value.ndim < 2 or value.shape[1] != length:
        raise CannotResume(f"a tensor of shape {tuple(value.shape)} has no position axis where one was expected")
    return value[:, first:]


def _rows(value: Any, copies: int, axes: int = 1) -> Any:
    """Repeat what differs from row to row; what is shared by all rows (one row, or fewer than so many axes: none for rows) broadcasts."""
    if isinstance(value, tuple):
        return tuple(_rows(item, copies, axes) for item in value)
    if isinstance(value, Tensor) and value.ndim >= axes and value.shape[0] > 1:
        return repeated(value, copies)
    return value

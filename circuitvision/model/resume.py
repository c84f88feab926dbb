"""The incremental forward: a run that computes only what an edit can change, through the model's own code.

*Handing back.* The model's own forward runs on, but modules that cannot have changed return what they returned in the unedited run: whole towers and
projectors, blocks before the first edited one, and inside that block the attention or the MLP if the edit comes after it.

*The suffix.* Where the run's own mask lets no earlier position see position ``p``, an edit at positions ``>= p`` leaves every earlier one as it
was: blocks get the positions from ``p`` on, and attention finds the unedited run's keys and values of the positions before them. The mask is read
off the run: causal towers allow every ``p``, PaliGemma's and PI0's prefixes none inside.

*Copies.* Many groups run in one batch: ``copies`` times the rows, group by group. Where what follows depends on the edited tower's stream alone,
the model's own inputs stay as they are and the stream is repeated where it is first edited; elsewhere (dual encoders, PI0, vision towers of a VLM)
the inputs are repeated.

Nothing is re-implemented, so a resumed run equals the full one up to the rounding of larger batches. What the code needs to know of transformers is
how blocks are called (``hidden_states`` first; ``position_embeddings``, ``position_ids``, ``attention_mask``, ``past_key_values``); a block called
in another way raises :class:`CannotResume` and the caller runs in full.

Not covered: implementations of attention other than eager and sdpa (no suffix), and suffixes of a tower that reads another tower's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuitvision.model.attention import Tap
from circuitvision.model.routes import EMBED, PARTS, Route, Start, is_dual, reached_through_cache, stages
from circuitvision.model.spec import require, resolve

if TYPE_CHECKING:
    from circuitvision.model.hooked import HookedModel
    from circuitvision.model.tokens import TokenMap
    from circuitvision.model.tower import Block, Tower

FREE_POOLS = ("none", "cls", "cls+distillation", "cls+mean_patch", "mean_patch")
"""Pooling rules that need nothing but the stream itself."""
PER_POSITION = ("attention_mask", "position_embeddings", "position_ids", "cache_position", "past_key_values")


class CannotResume(Exception):
    """This model, or this call of it, is not one the incremental forward understands; the message says why."""


@dataclass(eq=False)
class Clean:
    """What the unedited run left behind, as far as resumed runs need it."""

    output: Tensor
    results: dict[int, Any] = field(default_factory=dict)
    """Module id -> what its forward returned."""
    arguments: dict[int, Tensor] = field(default_factory=dict)
    """Module id -> its first argument."""
    cached: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """Block id -> the keys and values it left in the cache."""
    taps: dict[int, Tap] = field(default_factory=dict)
    """Attention module id -> what entered its kernel."""
    versions: dict[int, int] = field(default_factory=dict)


class Overrides:
    """Forwards replaced on instances, and torch hooks, for the length of one run."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Module, Any]] = []
        self._handles: list[Any] = []

    def forward(self, module: nn.Module, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        """Replace ``module.forward`` by ``make(original)``."""
        before = module.__dict__.get("forward")
        original = module.forward
        self._kept.append((module, before))
        module.__dict__["forward"] = make(original)

    def enter(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Change a module's arguments before any hook sees them."""
        self._handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))

    def leave(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Change a module's output after every hook has seen it."""
        self._handles.append(module.register_forward_hook(hook))

    def restore(self) -> None:
        """Put everything back."""
        for handle in self._handles:
            handle.remove()
        for module, before in reversed(self._kept):
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before
        self._kept.clear()
        self._handles.clear()


def repeated(value: Any, copies: int) -> Any:
    """A tensor, or every tensor of a structure, repeated along its rows; a single row is only expanded."""
    if copies == 1 or value is None:
        return value
    if isinstance(value, Tensor):
        if value.ndim == 0:
            return value
        if value.shape[0] == 1:
            return value.expand(copies, *value.shape[1:])
        return value.repeat(copies, *([1] * (value.ndim - 1)))
    if isinstance(value, (tuple, list)):
        return type(value)(repeated(item, copies) for item in value)
    if isinstance(value, Mapping):
        return type(value)(**{name: repeated(item, copies) for name, item in value.items()})
    raise CannotResume(f"a module returned a {type(value).__name__}, which cannot be repeated")


def is_plain(value: Any) -> bool:
    """Whether a module's result holds nothing but tensors, so that it can be handed back."""
    if value is None or isinstance(value, Tensor):
        return True
    if isinstance(value, (tuple, list)):
        return all(map(is_plain, value))
    return isinstance(value, Mapping) and all(map(is_plain, value.values()))


class Resumer:
    """Records one unedited run of a model, and resumes it."""

    def __init__(
        self, model: HookedModel, inputs: Mapping[str, Any], tokens: Mapping[str, TokenMap], eager: bool
    ) -> None:
        self.model, self.inputs, self.tokens, self.eager = model, dict(inputs), tokens, eager
        self.order = stages(model)
        self.dual = is_dual(model)
        self.clean: Clean | None = None

    # -- the unedited run ------------------------------------------------------------------------------------------------------------------

    def record(self, starts: set[Start], taps_from: Mapping[str, int], sites: list[str]) -> dict[str, Tensor]:
        """Run once and keep what the given starts need; ``taps_from``: tower -> first block whose keys and values are kept.

        Returns the values of ``sites`` in that run.
        """
        overrides = Overrides()
        clean = Clean(torch.empty(0))
        try:
            for start in starts:
                self._record_start(overrides, clean, start)
            for name in self.order:
                self._record_whole(overrides, clean, name)
            for name, layer in taps_from.items():
                for block in self.model.towers[name].blocks[layer:]:
                    clean.taps[id(block.part("attn"))] = Tap()
            with torch.no_grad(), self._kernels(clean.taps):
                cache: Mapping[str, Any] = {}
                if sites:
                    clean.output, cache = self.model.run_with_cache(self.inputs, names_filter=sites)
                else:
                    clean.output = self.model(self.inputs)
        finally:
            overrides.restore()
        clean.versions = {id(v): v._version for v in _tensors(clean) if not v.is_inference()}
        self.clean = clean
        return {site: cache[site] for site in sites}

    @contextlib.contextmanager
    def _kernels(self, taps: Mapping[int, Tap]) -> Iterator[None]:
        """The run's implementation of attention: eager for all, or each module's own, with taps where positions are resumed."""
        if not self.eager and not taps:
            yield
            return
        with self.model.engine.kernels(eager=self.eager, taps=taps):
            yield

    def _record_whole(self, overrides: Overrides, clean: Clean, name: str) -> None:
        if name == "projector":
            self._keep(overrides, clean, self._projector())
            return
        tower = self.model.towers[name]
        self._keep(overrides, clean, tower.root)
        embeddings = _embeddings(tower)
        if embeddings is not None:
            self._keep(overrides, clean, embeddings)
        for block in tower.blocks:
            self._keep(overrides, clean, block.module, block if tower.spec.feeds_cache_only else None)

    def _record_start(self, overrides: Overrides, clean: Clean, start: Start) -> None:
        if start.tower not in self.model.towers or start.layer == EMBED:
            return
        block = self.model.towers[start.tower].blocks[start.layer]
        if start.name in ("o", "attn", "mlp_out", "mlp"):
            self._keep(overrides, clean, block.part("attn"))
        if start.name in ("o", "mlp_out"):
            self._keep(overrides, clean, block.part("o" if start.name == "o" else "mlp_out"), argument=True)
        if start.name in ("mlp_out", "mlp"):
            self._keep(overrides, clean, block.part("mlp"))

    @staticmethod
    def _keep(
        overrides: Overrides, clean: Clean, module: nn.Module, block: Block | None = None, argument: bool = False
    ) -> None:
        if id(module) in clean.results:
            if argument:
                clean.arguments.setdefault(id(module), torch.empty(0))
            return
        clean.results[id(module)] = None
        if argument:
            clean.arguments[id(module)] = torch.empty(0)

        def make(original: Callable[..., Any]) -> Callable[..., Any]:
            def forward(*args: Any, **kwargs: Any) -> Any:
                out = original(*args, **kwargs)
                # Dual encoders write their projection into the structure a tower returned.
                clean.results[id(module)] = _fresh(out)
                if id(module) in clean.arguments:
                    clean.arguments[id(module)] = args[0] if args else next(iter(kwargs.values()))
                cache = kwargs.get("past_key_values")
                if block is not None and cache is not None:
                    kept = cache.layers[block.layer]
                    clean.cached[id(module)] = (kept.keys, kept.values)
                return out

            return forward

        overrides.forward(module, make)

    def _projector(self) -> nn.Module:
        return require(self.model.towers["vision"].module, self.model.family.projector or "", "projector")

    # -- what can be resumed ---------------------------------------------------------------------------------------------------------------

    def safe_start(self, tower: str, layer: int, position: int) -> int:
        """The last position ``p <= position`` that no real position before it can see, nor anything after it, in the blocks from ``layer`` on."""
        assert self.clean is not None
        if position <= 0 or not self.can_slice(tower):
            return 0
        blocks = self.model.towers[tower].blocks[max(layer, 0) :]
        taps = [self.clean.taps.get(id(block.part("attn"))) for block in blocks]
        if any(tap is None or tap.key is None for tap in taps):
            return 0
        real = torch.from_numpy(self.tokens[tower].kind != "padding")
        seen: dict[Any, Tensor] = {}
        for tap in taps:
            assert tap is not None
            key = id(tap.mask) if tap.mask is not None else tap.causal
            if key not in seen:
                farthest = tap.farthest(real)
                if farthest is None:
                    return 0
                seen[key] = farthest
        reach = torch.stack(list(seen.values())).amax(0).cummax(0).values
        while position > 0 and int(reach[position - 1]) >= position:
            position -= 1
        return position

    def can_slice(self, tower: str) -> bool:
        """Whether a tower's blocks may run on a suffix of the positions."""
        if tower not in self.model.towers:
            return False
        last = self.dual or tower == self.order[-1]
        return last and tower in ("language", "text") and not self.model.towers[tower].spec.feeds_cache_only

    def sliced_tower(self, route: Route) -> str:
        """The tower of which a route may compute a suffix of the positions; "" if none."""
        candidates = [start.tower for start in route.starts] if self.dual else [self.order[-1]]
        return next((name for name in candidates if self.can_slice(name)), "")

    def is_late(self, route: Route) -> bool:
        """Whether the rows can be repeated where the stream is first edited, rather than at the inputs."""
        if self.dual or len(route.starts) != 1:
            return False
        (start,) = route.starts
        if start.tower != self.order[-1] or start.tower == "action" or start.layer == EMBED:
            return False
        if {"pixel_attention_mask", "spatial_shapes", "labels", "past_key_values"} & self.inputs.keys():
            return False
        readout = self.model.towers[start.tower].spec.readout
        return readout is None or readout.pool in FREE_POOLS

    def keeps_positions(self, tower: str) -> bool:
        """Whether the output has the tower's positions, so that a suffix of them gives a suffix of the output."""
        readout = self.model.towers[tower].spec.readout
        assert self.clean is not None
        return not self.dual and readout is not None and readout.pool == "none" and self.clean.output.ndim == 3

    # -- a resumed run ---------------------------------------------------------------------------------------------------------------------

    def run(self, route: Route, copies: int, first: int) -> Tensor:
        """The output for ``copies`` groups of one route under the hooks in place; positions from ``first`` on where that is above 0.

        Rows are group by group. Raises CannotResume if a module is called in a way that is not understood.
        """
        assert self.clean is not None
        self._check_unwritten()
        resumed = _Resumed(self, route, copies, first)
        overrides = Overrides()
        try:
            resumed.prepare(overrides)
            with torch.no_grad(), self._kernels(resumed.taps()):
                return self.model._forward(resumed.inputs(), {})
        finally:
            overrides.restore()

    def _check_unwritten(self) -> None:
        assert self.clean is not None
        for tensor in _tensors(self.clean):
            if not tensor.is_inference() and tensor._version != self.clean.versions[id(tensor)]:
                raise CannotResume("the model writes into its own activations")


def _tensors(clean: Clean) -> Iterator[Tensor]:
    for value in (*clean.results.values(), *clean.arguments.values()):
        if isinstance(value, Tensor):
            yield value


def _embeddings(tower: Tower) -> nn.Module | None:
    """The module that makes an image tower's first stream; for other towers it costs nothing and is not kept."""
    return resolve(tower.root, tower.stack.embeddings) if tower.stack.image else None


class _Resumed:
    """One resumed run: which module hands back what."""

    def __init__(self, resumer: Resumer, route: Route, copies: int, first: int) -> None:
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
        edited = [start.tower for start in self.route.starts]
        out = dict(given)
        for name, value in given.items():
            if self.owner.dual and not any(_belongs(name, tower) for tower in edited):
                continue
            if isinstance(value, Tensor) and value.ndim > 0:
                out[name] = value.repeat(self.copies, *([1] * (value.ndim - 1)))
            elif isinstance(value, (list, tuple)):
                out[name] = type(value)(list(value) * self.copies)
        return out

    def taps(self) -> dict[int, Tap]:
        """Attention that finds the unedited keys and values of the positions before the suffix."""
        if not self.sliced:
            return {}
        start = self.route.start_in(self.sliced)
        blocks = self.model.towers[self.sliced].blocks[0 if start is None else max(start.layer, 0) :]
        out = {}
        for block in blocks:
            tap = self.clean.taps[id(block.part("attn"))]
            out[id(block.part("attn"))] = tap.resumed(self.first, self.copies)
        return out

    # -- handing back ----------------------------------------------------------------------------------------------------------------------

    def prepare(self, overrides: Overrides) -> None:
        """Put every replacement in place."""
        begun = False
        for name in self.owner.order:
            start = self.route.start_in(name)
            if start is not None:
                self._start(overrides, start)
                begun = True
            elif self.owner.dual or not begun:
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
            return _fresh(out)

        overrides.forward(module, lambda original: forward)

    @staticmethod
    def _fill_cache(kwargs: Mapping[str, Any], cached: tuple[Tensor, Tensor], layer: int, copies: int) -> None:
        cache = kwargs.get("past_key_values")
        if cache is not None:
            cache.update(repeated(cached[0], copies), repeated(cached[1], copies), layer)

    def _whole(self, overrides: Overrides, name: str) -> None:
        """A tower or projector that cannot have changed."""
        copies = self._copies_of(name)
        if name == "projector":
            self._hand_back(overrides, self.owner._projector(), copies)
            return
        tower = self.model.towers[name]
        # Sites of the projector are counted by the passes of the vision tower's blocks, which must therefore be called.
        counted = self.route.starts[0].tower == "projector"
        if is_plain(self.clean.results[id(tower.root)]) and not counted:
            self._hand_back(overrides, tower.root, copies)
            return
        embeddings = _embeddings(tower)
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

    def _start(self, overrides: Overrides, start: Start) -> None:
        if start.tower == "projector":
            if start.name == "post":
                self._hand_back(overrides, self.owner._projector(), self.copies)
            return
        tower = self.model.towers[start.tower]
        if start.layer == EMBED:
            if self.sliced == start.tower:
                self._slice(overrides, tower, 0)
            return
        copies = 1 if self.late else self.copies
        embeddings = _embeddings(tower)
        if embeddings is not None:
            self._hand_back(overrides, embeddings, copies)
        feeds = tower.spec.feeds_cache_only
        for block in tower.blocks[: start.layer]:
            self._hand_back(overrides, block.module, copies, block=block if feeds else None)
        block = tower.blocks[start.layer]
        if start.name == "post":
            self._hand_back(overrides, block.module, self.copies, self._first_in(tower), block if feeds else None)
            self._slice(overrides, tower, start.layer + 1, entering=False)
        else:
            self._slice(overrides, tower, start.layer)
            if start.name != "block":
                self._inside(overrides, tower, block, start)

    def _first_in(self, tower: Tower) -> int:
        return self.first if tower.name == self.sliced else 0

    def _inside(self, overrides: Overrides, tower: Tower, block: Block, start: Start) -> None:
        """Resume inside a block: attention, and perhaps the MLP, hand back; or only their last linear map runs."""
        attn, first = block.part("attn"), self._first_in(tower)
        feeds = tower.spec.feeds_cache_only
        resumes_at_o = start.name == "o"
        self._replay(overrides, attn, block.part("o") if resumes_at_o else None, first, block if feeds else None)
        if PARTS.index(start.name) >= PARTS.index("mlp_out"):
            last = block.part("mlp_out") if start.name == "mlp_out" else None
            self._replay(overrides, block.part("mlp"), last, first, None)

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
        fixed = None if last is not None else repeated(kept[:, first:], self.copies)
        rest = (None,) * (len(result) - 1) if isinstance(result, tuple) else None
        cached = None if block is None else self.clean.cached.get(id(block.module))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if cached is not None and block is not None:
                self._fill_cache(kwargs, cached, block.layer, self.copies)
            out = fixed if last is None else last(argument)
            return out if rest is None else (out, *rest)

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
                    value = _rows(value, copies)
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


def _fresh(value: Any) -> Any:
    """A structure of its own around the same tensors."""
    if isinstance(value, Mapping):
        return type(value)(**dict(value.items()))
    return list(value) if isinstance(value, list) else value


def _suffix(value: Any, first: int, length: int) -> Any:
    if value is None:
        return None
    if isinstance(value, tuple):
        return tuple(_suffix(item, first, length) for item in value)
    if value.ndim < 2 or value.shape[1] != length:
        raise CannotResume(f"a tensor of shape {tuple(value.shape)} has no position axis where one was expected")
    return value[:, first:]


def _rows(value: Any, copies: int) -> Any:
    """Repeat what differs from row to row; what is shared by all rows broadcasts."""
    if isinstance(value, tuple):
        return tuple(_rows(item, copies) for item in value)
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] > 1:
        return repeated(value, copies)
    return value


def _belongs(name: str, tower: str) -> bool:
    """Whether an input of a dual encoder belongs to a tower."""
    images = name.startswith(("pixel", "spatial", "image"))
    return images == (tower == "vision")

"""The incremental forward: a run that computes only what an edit can change, through the model's own code.

*Handing back.* The model's own forward runs on, but modules that cannot have changed return what they returned in the unedited run: whole towers and
projectors, blocks before the first edited one, and inside that block the attention or the MLP if the edit comes after it.

*The suffix.* Where the run's own mask lets no earlier position see position ``p``, an edit at positions ``>= p`` leaves every earlier one as it
was: blocks get the positions from ``p`` on, and attention finds the unedited run's keys and values of the positions before them. The mask is read
off the run: causal towers allow every ``p``, PaliGemma's and PI0's prefixes none inside.

*Copies.* Many groups run in one batch: ``copies`` times the rows, group by group. Where what follows depends on the edited tower's stream alone,
the model's own inputs stay as they are and the stream is repeated where it is first edited; elsewhere (dual encoders, PI0, vision towers of a VLM)
the inputs are repeated.

*A base of edits.* The recorded run may be an edited one, whose edits every resumed run is under as well. What modules are recorded to return is what
they returned before any hook on them, so that hooks of the base act on what is handed back as they acted on what was computed; those inside such a
module do not fire, and need not. Hooks in what is computed again act again, beside the group's own. Two kinds of edits need an earlier start, see
:func:`circuitvision.incremental.routes.start_under`.

*Gradients.* The unedited run is recorded without a graph; a resumed run has the graph of what it computes, where gradients are on. What is handed
back is constant in it, which is exact for everything that acts at or behind the start: edits' own tensors, and the parameters of what runs again.

Nothing is re-implemented, so a resumed run equals the full one up to the rounding of larger batches. What the code needs to know of transformers is
how blocks are called (``hidden_states`` first; ``position_embeddings``, ``position_ids``, ``attention_mask``, ``past_key_values``); a block called
in another way raises :class:`CannotResume` and the caller runs in full.

Not covered: implementations of attention other than eager and sdpa (no suffix), and suffixes of a tower that reads another tower's cache.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from circuitvision.incremental.replay import (
    BaseRun,
    CannotResume,
    ForeignHookDetector,
    Overrides,
    fresh,
    tensors_in,
    tensors_of,
)
from circuitvision.incremental.resumed_run import ResumedRun, embeddings_of, unread_parts
from circuitvision.incremental.routes import EMBED, ResumePlan, ResumePoint
from circuitvision.model.attention import PrefixKV
from circuitvision.model.dead import last_live_block
from circuitvision.model.edits.applying import edited

if TYPE_CHECKING:
    from circuitvision.model.block import Block
    from circuitvision.model.edits.binding import EditCompiler
    from circuitvision.model.wrapped import Wrapped

FREE_POOLS = ("none", "cls", "cls+distillation", "cls+mean_patch", "mean_patch")
"""Pooling rules that need nothing but the stream itself."""
_HARMLESS = ("NoneType", "AlignDevicesHook", "SequentialHook")
"""What accelerate may have put on a module: hooks that move tensors between devices change no value."""


def blocked_by(model: Wrapped, modules: Collection[nn.Module] | None = None) -> str:
    """Why no run of a model can be resumed in its present state; "" if they can. ``modules`` are the model's, where they were listed already."""
    if model.engine.stack:
        return "other hooks are active, whose effect may be anywhere"
    if global_hooks._global_forward_hooks or global_hooks._global_forward_pre_hooks:
        return "hooks on all modules are active, whose effect may be anywhere"
    for module in model.module.modules() if modules is None else modules:
        if module.training:
            return "the model is in training mode"
        hook = type(vars(module).get("_hf_hook")).__name__
        if hook not in _HARMLESS or (hook == "NoneType" and _is_replaced(module)):
            return "forwards of the model were replaced"
    return ""


def _is_replaced(module: nn.Module) -> bool:
    """Whether the instance has a forward that is not its class's."""
    own = vars(module).get("forward")
    return own is not None and getattr(own, "__func__", None) is not type(module).forward


class Resumer:
    """Records one run of a model under the compiler's base (unedited without one), and resumes it."""

    def __init__(self, compiler: EditCompiler, eager: bool) -> None:
        self.compiler, self.model, self.eager = compiler, compiler.model, eager
        self.inputs, self.tokens = dict(compiler.run_inputs), compiler.windows.maps
        self.order = self.model.flow.stages
        self.dual = self.model.is_dual
        self.by_cache = not self.model.flow.only_streams
        """Whether a tower reads another one's keys and values, or attends to it."""
        self._reach: dict[tuple[str, int], Tensor | None] = {}
        self.clean: BaseRun | None = None

    # -- the unedited run ------------------------------------------------------------------------------------------------------------------

    def record(self, starts: set[ResumePoint], taps_from: Mapping[str, int], sites: list[str]) -> dict[str, Tensor]:
        """Run once, without a graph, and keep what the given starts need; ``taps_from``: tower -> first block whose keys and values are kept.

        Returns the values of ``sites`` in that run.
        """
        overrides = Overrides()
        clean = BaseRun(torch.empty(0))
        watch = ForeignHookDetector(self.model.module)
        try:
            for start in starts:
                self._record_start(overrides, clean, start)
            for name in self.order:
                self._record_tower(overrides, clean, name, starts)
            for name, layer in taps_from.items():
                for block in self.model.towers[name].blocks[layer:]:
                    clean.prefix_kv |= {id(attention.module): PrefixKV() for attention in block.attentions}
            with self._recording(), self._kernels(clean.prefix_kv), edited(self.compiler) as clean.rows:
                clean.output, values = self.model._values_at(self.inputs, sites)
        finally:
            overrides.restore()
            watch.close()
        if watch.changed:
            raise CannotResume(f"a hook of {watch.changed} that is not ours changes the run")
        for tensor in tensors_of(clean):
            clean.versions.setdefault(id(tensor), tensor._version)
        self.clean = clean
        return values

    @contextlib.contextmanager
    def _kernels(self, prefix_kv: Mapping[int, PrefixKV]) -> Iterator[None]:
        """The run's implementation of attention: eager for all, or each module's own, with taps where positions are resumed."""
        if not self.eager and not prefix_kv:
            yield
            return
        with self.model.engine.kernels(eager=self.eager, prefix_kv=prefix_kv):
            yield

    @staticmethod
    def _recording() -> contextlib.AbstractContextManager[Any]:
        """How the unedited run is computed: what is handed back has no graph."""
        return torch.no_grad()

    def _record_tower(self, overrides: Overrides, clean: BaseRun, name: str, starts: Collection[ResumePoint]) -> None:
        """Keep what some route hands back of a tower: all of it, or no block that every route runs again."""
        if name not in self.model.towers:
            self._keep(overrides, clean, self.connector(name))
            return
        tower = self.model.towers[name]
        feeds, live = tower.feeds_cache, last_live_block(tower, self.inputs)
        flow = self.model.flow
        whole = any(start.tower != name and not flow.reaches(start.tower, name) for start in starts)
        if whole:
            self._keep(overrides, clean, tower.root)
        embeddings = embeddings_of(tower)
        if embeddings is not None:
            self._keep(overrides, clean, embeddings)
        last = max((start.layer for start in starts if start.tower == name), default=-1)
        for block in tower.blocks:
            if whole or self.by_cache or block.layer <= last or block.layer > live:
                self._keep(overrides, clean, block.module, block if feeds else None)
            elif block.layer == len(tower.blocks) - 1 and self.can_slice(name):
                self._keep(overrides, clean, block.module)
                clean.completing.add(id(block.module))
        if feeds:
            for module in unread_parts(tower.blocks[live]):
                self._keep(overrides, clean, module)

    def _record_start(self, overrides: Overrides, clean: BaseRun, start: ResumePoint) -> None:
        if start.tower not in self.model.towers or start.layer == EMBED:
            return
        block = self.model.towers[start.tower].blocks[start.layer]
        for branch in block.branches[: start.branch + 1]:
            self._keep(overrides, clean, branch.module)
            resumes_here = start.at_output and branch.number == start.branch
            if resumes_here or not branch.holds_output:
                self._keep(overrides, clean, branch.output, argument=resumes_here)

    @staticmethod
    def _keep(
        overrides: Overrides, clean: BaseRun, module: nn.Module, block: Block | None = None, argument: bool = False
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
                clean.results[id(module)] = fresh(out)
                for tensor in tensors_in(out):
                    clean.versions.setdefault(id(tensor), tensor._version)
                if id(module) in clean.arguments:
                    clean.arguments[id(module)] = args[0] if args else next(iter(kwargs.values()))
                cache = kwargs.get("past_key_values")
                if block is not None and cache is not None:
                    kept = cache.layers[block.layer]
                    clean.cached[id(module)] = (kept.keys, kept.values)
                return out

            return forward

        overrides.forward(module, make)

    def parameters(self) -> list[nn.Parameter]:
        """The parameters of modules that hand back what they returned: no gradient reaches them, and they must stay as they were."""
        assert self.clean is not None
        modules = {id(module): module for module in self.model.module.modules()}
        again = {id(p) for key in self.clean.arguments for p in modules[key].parameters()}
        kept = self.clean.results.keys() - self.clean.completing
        found = {id(p): p for key in kept for p in modules[key].parameters() if id(p) not in again}
        return list(found.values())

    def connector(self, name: str) -> nn.Module:
        """The module of a connector."""
        return self.model.engine.points[f"{name}.hook_out"].module

    # -- what can be resumed ---------------------------------------------------------------------------------------------------------------

    def safe_start(self, tower: str, layer: int, position: int) -> int:
        """The last position ``p <= position`` that no real position before it can see, nor anything after it, in the blocks from ``layer`` on."""
        if position <= 0 or not self.can_slice(tower):
            return 0
        layer = max(layer, 0)
        if (tower, layer) not in self._reach:
            self._reach[tower, layer] = self._reach_of(tower, layer)
        reach = self._reach[tower, layer]
        if reach is None:
            return 0
        while position > 0 and int(reach[position - 1]) >= position:
            position -= 1
        return position

    def _reach_of(self, tower: str, layer: int) -> Tensor | None:
        """The last key that any real position up to each one can see, in the blocks from ``layer`` on; None if the masks do not tell."""
        assert self.clean is not None
        real = torch.from_numpy(self.tokens[tower].kind != "padding")
        seen: dict[Any, Tensor] = {}
        for block in self.model.towers[tower].blocks[layer:]:
            for attention in block.attentions:
                tap = self.clean.prefix_kv.get(id(attention.module))
                if tap is None or tap.key is None:
                    return None
                key = id(tap.mask) if tap.mask is not None else tap.causal
                if key not in seen:
                    farthest = tap.farthest(real)
                    if farthest is None:
                        return None
                    seen[key] = farthest
        return torch.stack(list(seen.values())).amax(0).cummax(0).values

    def can_slice(self, tower: str) -> bool:
        """Whether a tower's blocks may run on a suffix of the positions."""
        if tower not in self.model.towers:
            return False
        found = self.model.towers[tower]
        return (
            self.model.flow.is_last(tower)
            and not self.by_cache
            and not found.stack.image
            and not found.reads_beside_stream
        )

    def sliced_tower(self, route: ResumePlan) -> str:
        """The tower of which a route may compute a suffix of the positions; "" if none."""
        begun = [start.tower for start in route.starts]
        run = [name for name in self.order if name in begun or self.model.flow.is_reached(name, begun)]
        return next((name for name in run if self.can_slice(name)), "")

    def is_late(self, route: ResumePlan) -> bool:
        """Whether the rows can be repeated where the stream is first edited, rather than at the inputs."""
        if self.dual or len(route.starts) != 1:
            return False
        (start,) = route.starts
        if not self.model.flow.is_last(start.tower) or self.by_cache or start.layer == EMBED:
            return False
        if not start.is_connector and self.model.towers[start.tower].reads_beside_stream:
            return False
        if {"labels", "past_key_values"} & self.inputs.keys():
            return False
        if self.model.towers[start.tower].stack.image and not self.model.family.packing.rows_alone:
            return False
        readout = self.model.towers[start.tower].spec.readout
        return readout is None or readout.pool in FREE_POOLS

    def keeps_positions(self, tower: str) -> bool:
        """Whether the output has the tower's positions, so that a suffix of them gives a suffix of the output."""
        readout = self.model.towers[tower].spec.readout
        assert self.clean is not None
        return not self.dual and readout is not None and readout.pool == "none" and self.clean.output.ndim == 3

    # -- a resumed run ---------------------------------------------------------------------------------------------------------------------

    def run(self, route: ResumePlan, copies: int, first: int) -> Tensor:
        """The output for ``copies`` groups of one route under the hooks in place; positions from ``first`` on where that is above 0.

        Rows are group by group. The output has a graph where gradients are on. Raises CannotResume if a module is called in a way that is not
        understood.
        """
        assert self.clean is not None
        self._check_unwritten()
        resumed = ResumedRun(self, route, copies, first)
        overrides = Overrides()
        try:
            resumed.prepare(overrides)
            with self._kernels(resumed.prefix_kv()):
                return self.model._forward(resumed.inputs(), {})
        finally:
            overrides.restore()

    def _check_unwritten(self) -> None:
        assert self.clean is not None
        for tensor in tensors_of(self.clean):
            if tensor._version != self.clean.versions[id(tensor)]:
                raise CannotResume("the model writes into its own activations")

"""The one mechanism by which anything is read from or written to a model: registrations, the chains they form, and the torch handles that run them.

A *registration* is what one ``with model.hooks(...)`` (or one cached run) asks for. All registrations of a model form a stack: outer ones fire first,
so an inner cache sees edited values. For every module that carries an asked-for site there is one torch handle; it runs the points of that
module in order, and each point runs its chain of hooks.

Rules every chain enforces:

* a hook gets its own tensor and may keep it; changing it in place without returning it raises, because the change would be lost;
* a returned tensor must have the shape, dtype and device of the site;
* a recorder gets the value that continues through the model, on the autograd path when gradients are on;
* every asked-for site fires once per pass of its tower; a site that does not is an error at the end of the run, never silence.

Handles are registered with ``prepend=True``: transformers records hidden states with hooks of its own, LLaVA's projector reads that record, and
an edit made after the recording would be lost.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from circuitvision.errors import HookError
from circuitvision.model import attention
from circuitvision.model.points import Call, Fire, Point
from circuitvision.model.sites import SiteName

Hook = Callable[[Tensor, "HookPoint"], "Tensor | None"]
MOST_PLANS = 128
"""Plans kept at once; a sweep over single sites makes one per site."""
ALIGNMENT = 64
"""Bytes that the widest vector registers want an address to be a multiple of."""


@dataclass(frozen=True)
class HookPoint:
    """What a hook is told about the place it was called from."""

    name: str
    """Full site name, e.g. ``vision.blocks.3.attn.hook_z``."""
    tower: str
    layer: int | None
    site: str
    """The name without tower and layer, e.g. ``attn.hook_z``."""
    step: int = 0
    """Number of the pass of this site in the current run: 0, then 1, 2, … in ``generate`` and ``sample_actions``."""


class Recorder:
    """Stores the value of each site it is given, one entry per pass."""

    def __init__(self, device: torch.device | str | None = None, needs_grad: bool = False) -> None:
        self.values: dict[str, list[Tensor]] = {}
        self.device = device
        self.needs_grad = needs_grad

    def record(self, name: str, value: Tensor) -> None:
        """Keep ``value`` (moved to the recorder's device) as the next pass of site ``name``."""
        kept = value if self.device is None else value.to(self.device)
        self.values.setdefault(name, []).append(kept)


@dataclass(eq=False)
class Registration:
    """One set of hooks: forward hooks, backward hooks or a recorder, by full site name. ``exact`` names must fire."""

    forward: Mapping[str, list[Hook]] = field(default_factory=dict)
    backward: Mapping[str, list[Hook]] = field(default_factory=dict)
    recorder: Recorder | None = None
    recorded: frozenset[str] = frozenset()
    exact: frozenset[str] = frozenset()

    @cached_property
    def names(self) -> frozenset[str]:
        """Every site this registration asks for."""
        return self.recorded.union(self.forward, self.backward)

    @property
    def only_reads(self) -> bool:
        """Whether it can change nothing: a recorder without gradients, and no hook."""
        return self.recorder is not None and not (self.recorder.needs_grad or self.forward or self.backward)


@dataclass(frozen=True)
class _Hooks:
    """What is attached for one run: torch hooks by module, and what runs inside attention by module id."""

    pre: list[tuple[nn.Module, Callable[..., Any]]]
    post: list[tuple[nn.Module, Callable[..., Any]]]
    attention: dict[int, attention.Stages]


@dataclass
class _Plan:
    """What a set of sites needs attached: the same for every run that asks for these sites."""

    calls: tuple[tuple[nn.Module, str, tuple[Point, ...]], ...]
    """Module, phase (pre, post or attention) and the points to run there, in order."""
    counted: tuple[str, ...]
    """Towers whose passes are counted."""
    tower_of: Mapping[str, str]
    """Site name -> the tower whose passes it must match."""
    stashes: tuple[Any, ...]
    reading: _Hooks | None = None
    """The hooks of a run that only records these sites: nothing in them depends on the run, so they are made once."""


class HookEngine:
    """Owns the points of one model, the stack of registrations, and the torch handles in place while the stack is not empty."""

    def __init__(self, model: nn.Module, points: Iterable[Point], first_blocks: Mapping[str, nn.Module]) -> None:
        self.model = model
        self.points = {point.name: point for point in points}
        self.first_blocks = dict(first_blocks)
        self.stack: list[Registration] = []
        self.handles: list[Any] = []
        self.fired: dict[str, int] = {}
        self.passes: dict[str, int] = {}
        self.suspended = False
        self.in_run = False
        self._switch: contextlib.ExitStack | None = None
        self._plans: dict[frozenset[str], _Plan] = {}
        self._plan: _Plan | None = None
        self._reader = Recorder()
        self._attention = attention.Switch(model)

    def __getstate__(self) -> dict[str, Any]:
        # Made hooks belong to this engine; a copy makes its own.
        return {**self.__dict__, "_plans": {}, "_plan": None}

    # -- registrations -------------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def registered(self, registration: Registration) -> Iterator[Registration]:
        """Put a registration on top of the stack for the length of the block."""
        self.push(registration)
        try:
            yield registration
        finally:
            self.pop(registration)

    def push(self, registration: Registration) -> None:
        """Add a registration and attach what it needs."""
        self.stack.append(registration)
        try:
            self._attach()
        except BaseException:
            self.stack.remove(registration)
            self._attach()
            raise

    def pop(self, registration: Registration) -> None:
        """Remove a registration and every handle only it needed."""
        if registration in self.stack:
            self.stack.remove(registration)
        self._attach()

    def active(self) -> list[dict[str, Any]]:
        """The hooks that can change what a run computes, outermost first: by site, forward and backward."""
        return [
            {"forward": dict(found.forward), "backward": dict(found.backward)}
            for found in self.stack
            if found.forward or found.backward
        ]

    def asked(self) -> frozenset[str]:
        """Every site some registration asks for."""
        if len(self.stack) == 1:
            return self.stack[0].names
        return frozenset().union(*(registration.names for registration in self.stack))

    def _plan_of(self, asked: frozenset[str]) -> _Plan:
        """The plan of a set of sites; runs of a sweep ask for the same sites again and again."""
        plan = self._plans.get(asked)
        if plan is None:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            plan = self._plans[asked] = self._planned(asked)
        return plan

    def _planned(self, asked: Iterable[str]) -> _Plan:
        slots: dict[tuple[int, str], dict[int, Point]] = {}
        tower_of: dict[str, str] = {}
        stashes: dict[int, Any] = {}
        for name in asked:
            point = self.points[name]
            companions = getattr(point, "companions", ())
            for needed in (*companions, point):
                slots.setdefault((id(needed.module), needed.phase), {})[id(needed)] = needed
            stashes.update({id(stash): stash for stash in companions})
            tower = SiteName.parse(name).tower
            tower_of[name] = "vision" if tower == "projector" else tower
        calls = []
        for (_, phase), points in slots.items():
            ordered = tuple(sorted(points.values(), key=lambda point: point.order))
            calls.append((ordered[0].module, phase, ordered))
        towers = {SiteName.parse(name).tower for name in tower_of}
        counted = tuple(tower for tower in self.first_blocks if tower in towers or "projector" in towers)
        return _Plan(tuple(calls), counted, tower_of, tuple(stashes.values()))

    def _attach(self) -> None:
        self._detach()
        asked = self.asked()
        self._plan = plan = self._plan_of(asked) if asked else None
        if plan is None:
            return
        hooks = self._hooks(plan)
        for module, hook in hooks.pre:
            self.handles.append(module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
        for module, hook in hooks.post:
            self.handles.append(module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        for tower in plan.counted:
            handle = self.first_blocks[tower].register_forward_pre_hook(self._count_pass(tower), prepend=True)
            self.handles.append(handle)
        self.handles.append(self.model.register_forward_pre_hook(self._begin_forward, prepend=True))
        if hooks.attention:
            self._switch = contextlib.ExitStack()
            self._switch.enter_context(self._attention.on(hooks.attention))

    def _hooks(self, plan: _Plan) -> _Hooks:
        """The hooks of a plan for the registrations in the stack."""
        if len(self.stack) == 1 and self.stack[0].only_reads:
            assert self.stack[0].recorder is not None
            self._reader = self.stack[0].recorder
            if plan.reading is None:
                plan.reading = self._made(plan, one_recorder=True)
            return plan.reading
        return self._made(plan)

    def _made(self, plan: _Plan, one_recorder: bool = False) -> _Hooks:
        fire_of = self._reader_of if one_recorder else self._fire_of
        only_reads = all(registration.only_reads for registration in self.stack)
        hooks = _Hooks([], [], {})
        for module, phase, points in plan.calls:
            fires = [(point, fire_of(point)) for point in points]
            whole = one_recorder and all(point.whole for point in points)
            names = tuple(point.name for point in points)
            if phase == "pre":
                hook = self._pre_hook(fires)
                hooks.pre.append((module, self._pre_reader(names, hook) if whole else hook))
            elif phase == "post":
                hook = self._post_hook(fires)
                hooks.post.append((module, self._post_reader(names, hook) if whole else hook))
            else:
                stages = {SiteName.parse(point.name).stage: fire for point, fire in fires}
                hooks.attention[id(module)] = attention.Stages(stages, only_reads, self)
        return hooks

    def _detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        # What was recorded belongs to whoever asked for it.
        self._reader = Recorder()
        if self._switch is not None:
            switch, self._switch = self._switch, None
            switch.close()

    def kernels(self, eager: bool, taps: Mapping[int, attention.Tap]) -> AbstractContextManager[None]:
        """Taps in the attention of this model's modules, with eager attention everywhere or each module's own kernel."""
        return self._attention.tapped(taps, eager)

    @contextlib.contextmanager
    def suspension(self) -> Iterator[None]:
        """Let modules be called for their arithmetic alone: no hook fires inside the block."""
        before, self.suspended = self.suspended, True
        try:
            yield
        finally:
            self.suspended = before

    # -- one run -------------------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run(self) -> Iterator[None]:
        """One run of the model (one forward, or all passes of generate): counts passes, and checks at the end that every site fired."""
        outer, self.in_run = self.in_run, True
        if not outer:
            self.fired.clear()
            self.passes.clear()
        try:
            yield
            if not outer:
                self._check_fired()
        finally:
            self.in_run = outer
            if not outer:
                self._forget_stashes()

    def _forget_stashes(self) -> None:
        for stash in self._plan.stashes if self._plan is not None else ():
            stash.kept.clear()

    def _check_fired(self) -> None:
        if self._plan is None:
            return
        passes, fired, tower_of = self.passes, self.fired, self._plan.tower_of
        for name, tower in tower_of.items():
            if fired.get(name, 0) != passes.get(tower, 0):
                raise HookError(
                    f"{name} fired {fired.get(name, 0)} times in {passes.get(tower, 0)} passes of its tower; its edits cannot be trusted."
                )
        for registration in self.stack:
            for name in registration.exact:
                if passes.get(tower_of[name], 0) == 0:
                    tower = SiteName.parse(name).tower
                    raise HookError(
                        f"{name} did not fire: the {tower} tower did not run. Does the input hold what this tower reads?"
                    )

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        if not self.in_run:
            self.fired.clear()
            self.passes.clear()

    def _count_pass(self, tower: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any) -> None:
            if not self.suspended:
                self.passes[tower] = self.passes.get(tower, 0) + 1

        return count

    def _pre_hook(self, fires: Sequence[tuple[Point, Fire]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.suspended:
                return None
            call = Call(module, args, kwargs)
            for point, fire in fires:
                point.apply(call, fire)
            return (call.args, call.kwargs) if call.changed else None

        return hook

    def _post_hook(self, fires: Sequence[tuple[Point, Fire]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.suspended:
                return None
            call = Call(module, args, kwargs, output)
            for point, fire in fires:
                point.apply(call, fire)
            return call.output if call.changed else None

        return hook

    def _pre_reader(self, names: tuple[str, ...], hook: Callable[..., Any]) -> Callable[..., Any]:
        """``hook`` for points that are only recorded, and hold the first argument as it is: most of what a cached run does."""

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.suspended or not args or type(args[0]) is not Tensor or args[0].requires_grad:
                return hook(module, args, kwargs)
            return self._read(names, args[0])

        return read

    def _post_reader(self, names: tuple[str, ...], hook: Callable[..., Any]) -> Callable[..., Any]:
        """As :meth:`_pre_reader`, for points that hold the output as it is."""

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.suspended or type(output) is not Tensor or output.requires_grad or output.ndim == 4:
                return hook(module, args, kwargs, output)
            return self._read(names, output)

        return read

    def _read(self, names: tuple[str, ...], value: Tensor) -> None:
        fired, record = self.fired, self._reader.record
        for name in names:
            fired[name] = fired.get(name, 0) + 1
            record(name, value)

    # -- one point -----------------------------------------------------------------------------------------------------------------------

    def _fire_of(self, point: Point) -> Fire:
        name = SiteName.parse(point.name)
        chain = [hook for registration in self.stack for hook in self._hooks_of(registration, point.name)]
        edits = any(not isinstance(hook, Recorder) for hook in chain)
        backward = [hook for registration in self.stack for hook in registration.backward.get(point.name, ())]
        wants_grad = bool(backward) or any(isinstance(hook, Recorder) and hook.needs_grad for hook in chain)
        in_place = getattr(point, "in_place", False)

        def fire(value: Tensor) -> tuple[Tensor, bool]:
            step = self.fired.get(point.name, 0)
            self.fired[point.name] = step + 1
            where = HookPoint(point.name, name.tower, name.layer, name.site, step)
            with_grad = torch.is_grad_enabled()
            layout = value
            if with_grad and wants_grad and not value.requires_grad and value.is_floating_point():
                value = value.detach().clone().requires_grad_(True)
            tracked = with_grad and value.requires_grad
            changed = tracked
            if in_place and (edits or tracked):
                value = value.clone()
            for hook in chain:
                if isinstance(hook, Recorder):
                    hook.record(point.name, value)
                    continue
                value, edited = _run_hook(hook, value, where, tracked)
                changed = changed or edited
            if changed and not in_place:
                value = laid_out(value, layout)
            for hook in backward:
                value.register_hook(lambda grad, hook=hook: _checked(hook(grad, where), grad, where))
            return value, changed

        return fire

    def _reader_of(self, point: Point) -> Fire:
        """The fire of a point that one recorder reads, without what edits need."""
        name, in_place = point.name, point.in_place

        def read(value: Tensor) -> tuple[Tensor, bool]:
            self.fired[name] = self.fired.get(name, 0) + 1
            tracked = value.requires_grad and torch.is_grad_enabled()
            if tracked and in_place:
                value = value.clone()
            self._reader.record(name, value)
            return value, tracked

        return read

    @staticmethod
    def _hooks_of(registration: Registration, name: str) -> list[Any]:
        hooks: list[Any] = list(registration.forward.get(name, ()))
        if registration.recorder is not None and name in registration.recorded:
            hooks.append(registration.recorder)
        return hooks


def _run_hook(hook: Hook, value: Tensor, where: HookPoint, tracked: bool) -> tuple[Tensor, bool]:
    handed = value.clone()
    version = None if handed.is_inference() else handed._version
    returned = hook(handed, where)
    touched = handed._version != version if version is not None else not torch.equal(handed, value)
    if returned is None:
        if touched:
            raise HookError(
                f"The hook at {where.name} changed its tensor in place and returned None; return the tensor."
            )
        return (handed, False) if tracked else (value, False)
    returned = _checked(returned, handed, where)
    if returned is handed and not touched:
        return (handed, False) if tracked else (value, False)
    return returned, True


def laid_out(value: Tensor, like: Tensor) -> Tensor:
    """``value`` in the memory layout and alignment of ``like``: kernels add in the order of memory, by vectors, so equal values elsewhere can give
    other bits."""
    strides = like.stride()
    overlaps = any(stride == 0 and size > 1 for stride, size in zip(strides, like.shape, strict=True))
    if overlaps or not like.numel():
        return value
    shift, here = _misalignment(like), _misalignment(value)
    if shift is None or here is None:
        placed = torch.empty_strided(like.shape, strides, dtype=value.dtype, device=value.device)
        return value if value.stride() == strides else placed.copy_(value)
    if value.stride() == strides and here == shift:
        return value
    extent = 1 + sum((size - 1) * stride for size, stride in zip(like.shape, strides, strict=True))
    room = torch.empty(extent + ALIGNMENT // like.element_size(), dtype=value.dtype, device=value.device)
    offset = (shift - room.data_ptr()) % ALIGNMENT // like.element_size()
    # No view of ``room``: autograd would follow the whole of it.
    place = torch.empty(0, dtype=value.dtype, device=value.device)
    return place.set_(room.untyped_storage(), offset, like.shape, strides).copy_(value)


def _misalignment(value: Tensor) -> int | None:
    """Bytes from the last aligned address to the first element; None where a functional transform wraps the tensor, or it has no memory."""
    if value.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(value):
        return None
    return value.data_ptr() % ALIGNMENT


def _checked(returned: Any, expected: Tensor, where: HookPoint) -> Any:
    """The hook's answer, or HookError if it is not a tensor of the site's shape, dtype and device."""
    if returned is None:
        return None
    if not isinstance(returned, Tensor):
        raise HookError(f"The hook at {where.name} returned {type(returned).__name__}; return a tensor or None.")
    if returned.shape != expected.shape:
        raise HookError(
            f"The hook at {where.name} returned shape {tuple(returned.shape)}; the site has shape {tuple(expected.shape)}."
        )
    if returned.dtype != expected.dtype:
        raise HookError(f"The hook at {where.name} returned {returned.dtype}; convert it with .to({expected.dtype}).")
    if returned.device != expected.device:
        raise HookError(
            f"The hook at {where.name} returned a tensor on {returned.device}; move it with .to('{expected.device}')."
        )
    return returned

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
MOST_PLANS = 256
"""Plans kept at once; a sweep over single sites makes one per site."""


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


@dataclass(frozen=True)
class _Plan:
    """What a set of sites needs attached: the same for every run that asks for these sites."""

    calls: tuple[tuple[nn.Module, str, tuple[Point, ...]], ...]
    """Module, phase (pre or post) and the points to run there, in order."""
    attention: tuple[tuple[nn.Module, tuple[Point, ...]], ...]
    counted: tuple[str, ...]
    """Towers whose passes are counted."""
    tower_of: Mapping[str, str]
    """Site name -> the tower whose passes it must match."""
    stashes: tuple[Any, ...]


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
        self._attention = attention.Switch(model)

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

    def asked(self) -> frozenset[str]:
        """Every site some registration asks for."""
        if len(self.stack) == 1:
            return self.stack[0].names
        return frozenset().union(*(registration.names for registration in self.stack))

    def _plan(self) -> _Plan:
        """The plan of the sites that are asked for; runs of a sweep ask for the same sites again and again."""
        asked = self.asked()
        if asked not in self._plans:
            if len(self._plans) >= MOST_PLANS:
                self._plans.clear()
            self._plans[asked] = self._planned(asked)
        return self._plans[asked]

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
        calls, stages = [], []
        for (_, phase), points in slots.items():
            ordered = tuple(sorted(points.values(), key=lambda point: point.order))
            if phase == "attention":
                stages.append((ordered[0].module, ordered))
            else:
                calls.append((ordered[0].module, phase, ordered))
        towers = {SiteName.parse(name).tower for name in tower_of}
        counted = tuple(tower for tower in self.first_blocks if tower in towers or "projector" in towers)
        return _Plan(tuple(calls), tuple(stages), counted, tower_of, tuple(stashes.values()))

    def _attach(self) -> None:
        self._detach()
        if not self.asked():
            return
        plan = self._plan()
        for module, phase, points in plan.calls:
            if phase == "pre":
                handle = module.register_forward_pre_hook(self._pre_hook(points), prepend=True, with_kwargs=True)
            else:
                handle = module.register_forward_hook(self._post_hook(points), prepend=True, with_kwargs=True)
            self.handles.append(handle)
        for tower in plan.counted:
            handle = self.first_blocks[tower].register_forward_pre_hook(self._count_pass(tower), prepend=True)
            self.handles.append(handle)
        self.handles.append(self.model.register_forward_pre_hook(self._begin_forward, prepend=True))
        if plan.attention:
            self._attach_attention(plan)

    def _attach_attention(self, plan: _Plan) -> None:
        active = {}
        for module, points in plan.attention:
            fires = {SiteName.parse(point.name).stage: self._fire_of(point) for point in points}
            only_reads = all(self._only_read(point) for point in points)
            active[id(module)] = attention.Stages(fires, only_reads, self)
        self._switch = contextlib.ExitStack()
        self._switch.enter_context(self._attention.on(active))

    def _detach(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self._switch is not None:
            switch, self._switch = self._switch, None
            switch.close()

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
        if self.stack:
            for stash in self._plan().stashes:
                stash.kept.clear()

    def _check_fired(self) -> None:
        if not self.stack:
            return
        passes, fired = self.passes, self.fired
        tower_of = self._plan().tower_of
        for name, tower in tower_of.items():
            if fired.get(name, 0) != passes.get(tower, 0):
                raise HookError(
                    f"{name} fired {fired.get(name, 0)} times in {passes.get(tower, 0)} passes of its tower; its edits cannot be trusted."
                )
        for registration in self.stack:
            for name in registration.exact:
                if passes.get(tower_of[name], 0) == 0:
                    tower = SiteName.parse(name).tower
                    raise HookError(f"{name} did not fire: the {tower} tower did not run. Does the input hold what this tower reads?")

    def _begin_forward(self, module: nn.Module, args: Any) -> None:
        if not self.in_run:
            self.fired.clear()
            self.passes.clear()

    def _count_pass(self, tower: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any) -> None:
            if not self.suspended:
                self.passes[tower] = self.passes.get(tower, 0) + 1

        return count

    def _pre_hook(self, points: Sequence[Point]) -> Callable[..., Any]:
        fires = [(point, self._fire_of(point)) for point in points]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.suspended:
                return None
            call = Call(module, args, kwargs)
            for point, fire in fires:
                point.apply(call, fire)
            return (call.args, call.kwargs) if call.changed else None

        return hook

    def _post_hook(self, points: Sequence[Point]) -> Callable[..., Any]:
        fires = [(point, self._fire_of(point)) for point in points]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if self.suspended:
                return None
            call = Call(module, args, kwargs, output)
            for point, fire in fires:
                point.apply(call, fire)
            return call.output if call.changed else None

        return hook

    # -- one point -----------------------------------------------------------------------------------------------------------------------

    def _chain(self, name: str) -> list[Any]:
        return [hook for registration in self.stack for hook in self._hooks_of(registration, name)]

    def _only_read(self, point: Point) -> bool:
        """Whether no hook of this point can change its value or asks for its gradient."""
        if any(point.name in registration.backward for registration in self.stack):
            return False
        return all(isinstance(hook, Recorder) and not hook.needs_grad for hook in self._chain(point.name))

    def _fire_of(self, point: Point) -> Fire:
        if self._only_read(point):
            return self._reader_of(point)
        name = SiteName.parse(point.name)
        chain = self._chain(point.name)
        edits = any(not isinstance(hook, Recorder) for hook in chain)
        backward = [hook for registration in self.stack for hook in registration.backward.get(point.name, ())]
        wants_grad = bool(backward) or any(isinstance(hook, Recorder) and hook.needs_grad for hook in chain)
        in_place = getattr(point, "in_place", False)

        def fire(value: Tensor) -> tuple[Tensor, bool]:
            step = self.fired.get(point.name, 0)
            self.fired[point.name] = step + 1
            where = HookPoint(point.name, name.tower, name.layer, name.site, step)
            with_grad = torch.is_grad_enabled()
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
            for hook in backward:
                value.register_hook(lambda grad, hook=hook: _checked(hook(grad, where), grad, where))
            return value, changed

        return fire

    def _reader_of(self, point: Point) -> Fire:
        """The fire of a point that is only recorded, without what edits need: this one runs at every site of every cached run."""
        name, fired = point.name, self.fired
        in_place = getattr(point, "in_place", False)
        recorders: list[Recorder] = self._chain(name)

        def read(value: Tensor) -> tuple[Tensor, bool]:
            fired[name] = fired.get(name, 0) + 1
            tracked = value.requires_grad and torch.is_grad_enabled()
            if tracked and in_place:
                value = value.clone()
            for recorder in recorders:
                recorder.record(name, value)
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

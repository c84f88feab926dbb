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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from circuitvision.errors import HookError
from circuitvision.model import attention
from circuitvision.model.points import Call, Point
from circuitvision.model.sites import SiteName

Hook = Callable[[Tensor, "HookPoint"], "Tensor | None"]


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

    @property
    def names(self) -> set[str]:
        """Every site this registration asks for."""
        return set(self.forward) | set(self.backward) | set(self.recorded)


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

    def asked(self) -> set[str]:
        """Every site some registration asks for."""
        return set().union(*(registration.names for registration in self.stack)) if self.stack else set()

    def _attach(self) -> None:
        self._detach()
        asked = self.asked()
        if not asked:
            return
        slots: dict[tuple[int, str], list[Point]] = {}
        for name in asked:
            point = self.points[name]
            for needed in (*getattr(point, "companions", ()), point):
                slots.setdefault((id(needed.module), needed.phase), []).append(needed)
        for (_, phase), points in slots.items():
            ordered = sorted({id(p): p for p in points}.values(), key=lambda point: point.order)
            if phase == "pre":
                hook = self._pre_hook(ordered)
                self.handles.append(ordered[0].module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True))
            elif phase == "post":
                hook = self._post_hook(ordered)
                self.handles.append(ordered[0].module.register_forward_hook(hook, prepend=True, with_kwargs=True))
        self._attach_counters({SiteName.parse(name).tower for name in asked})
        self._attach_attention(slots)

    def _attach_counters(self, towers: set[str]) -> None:
        for tower, block in self.first_blocks.items():
            if tower in towers or "projector" in towers:
                self.handles.append(block.register_forward_pre_hook(self._count_pass(tower), prepend=True))
        self.handles.append(self.model.register_forward_pre_hook(self._begin_forward, prepend=True))

    def _attach_attention(self, slots: dict[tuple[int, str], list[Point]]) -> None:
        active: dict[int, Callable[[], attention.Stages]] = {}
        for (module_id, phase), points in slots.items():
            if phase == "attention":
                stages = {SiteName.parse(point.name).stage: self._fire_of(point) for point in points}
                active[module_id] = self._stages_unless_suspended(stages)
        if active:
            self._switch = contextlib.ExitStack()
            self._switch.enter_context(attention.switched(self.model, active))

    def _stages_unless_suspended(self, stages: attention.Stages) -> Callable[[], attention.Stages]:
        return lambda: {} if self.suspended else stages

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
        for name in self.asked():
            for stash in getattr(self.points[name], "companions", ()):
                stash.kept.clear()

    def _check_fired(self) -> None:
        for registration in self.stack:
            for name in registration.names:
                tower = SiteName.parse(name).tower
                expected = self.passes.get("vision" if tower == "projector" else tower, 0)
                fired = self.fired.get(name, 0)
                if fired != expected:
                    raise HookError(
                        f"{name} fired {fired} times in {expected} passes of its tower; its edits cannot be trusted."
                    )
                if expected == 0 and name in registration.exact:
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

    def _pre_hook(self, points: list[Point]) -> Callable[..., Any]:
        fires = [(point, self._fire_of(point)) for point in points]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self.suspended:
                return None
            call = Call(module, args, kwargs)
            for point, fire in fires:
                point.apply(call, fire)
            return (call.args, call.kwargs) if call.changed else None

        return hook

    def _post_hook(self, points: list[Point]) -> Callable[..., Any]:
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

    def _fire_of(self, point: Point) -> Callable[[Tensor], tuple[Tensor, bool]]:
        name = SiteName.parse(point.name)
        chain = [
            (registration, hook) for registration in self.stack for hook in self._hooks_of(registration, point.name)
        ]
        edits = any(not isinstance(hook, Recorder) for _, hook in chain)
        backward = [hook for registration in self.stack for hook in registration.backward.get(point.name, ())]
        wants_grad = bool(backward) or any(isinstance(hook, Recorder) and hook.needs_grad for _, hook in chain)
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
            for _, hook in chain:
                if isinstance(hook, Recorder):
                    hook.record(point.name, value)
                    continue
                value, edited = _run_hook(hook, value, where, tracked)
                changed = changed or edited
            for hook in backward:
                value.register_hook(lambda grad, hook=hook: _checked(hook(grad, where), grad, where))
            return value, changed

        return fire

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

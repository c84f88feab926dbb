"""The one mechanism by which anything is read from or written to a model: registrations, the chains they form, and the torch handles that run them.

A *registration* is what one ``with model.hooks(...)`` (or one cached run) asks for. All registrations of a model form a stack: outer ones fire first,
so an inner cache sees edited values. For every module that carries an asked-for site there is one torch handle; it runs the points of that
module in order, and each point runs its chain of hooks. Every asked-for site fires once per pass of its tower; a site that does not is an error at
the end of the run, never silence. What a hook may answer is in ``registrations.py``, where a handle stands among those of others in
``torch_hooks.py``.

Threads. Torch hooks fire in whatever thread calls the module. Ours act only in the thread that put them there; the module called from another thread
is the bare model, and the wrapper called from there raises HookError rather than leave out hooks that someone may count on. A module that was copied
together with its torch hooks is not the one they belong to, and is the bare model too.

Not covered: tasks of one thread that take turns (asyncio) share its hooks; what two wrappers of one module do to one site beyond the order of their
``with`` blocks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor, nn

from circuitvision.errors import HookError
from circuitvision.model import attention
from circuitvision.model.flow import Flow
from circuitvision.model.memory import match_memory_layout
from circuitvision.model.packing.sequences import Sequences
from circuitvision.model.points import Call, Callback, Point
from circuitvision.model.registrations import HookPoint, Recorder, Registration, checked, run_hook
from circuitvision.model.sites import SiteName
from circuitvision.model.torch_hooks import Placed, placed, placed_first

MOST_PLANS = 128
"""Plans kept at once; a sweep over single sites makes one per site."""
_OWN_ATTENTION = (
    " Scores, patterns and rotated queries and keys are seen where attention goes through transformers' attention functions (docs/families.md); if "
    "this model computes it in a way of its own, ask for other sites: names_filter='**.hook_resid_*', for example."
)


def _nobody() -> None:
    return None


@dataclass(frozen=True)
class _Hooks:
    """What is attached for one run: torch hooks by module, and what runs inside attention by module id."""

    pre: list[tuple[nn.Module, Callable[..., Any]]]
    post: list[tuple[nn.Module, Callable[..., Any]]]
    attention: dict[int, attention.AttentionHooks]


@dataclass
class _Plan:
    """What a set of sites needs attached: the same for every run that asks for these sites."""

    calls: tuple[tuple[nn.Module, str, tuple[Point, ...]], ...]
    """Module, phase (pre, post or attention) and the points to run there, in order."""
    counted: tuple[str, ...]
    """Towers whose passes are counted."""
    tower_of: Mapping[str, str]
    """Site name -> the tower whose passes it must match."""
    saved_inputs: tuple[Any, ...]
    reading: _Hooks | None = None
    """The hooks of a run that only records these sites: nothing in them depends on the run, so they are made once."""


class HookEngine:
    """Owns the points of one model, the stack of registrations, and the torch handles in place while the stack is not empty."""

    def __init__(
        self, model: nn.Module, points: Iterable[Point], first_blocks: Mapping[str, nn.Module], flow: Flow
    ) -> None:
        self.model, self.flow = model, flow
        self.points = {point.name: point for point in points}
        self.first_blocks = dict(first_blocks)
        self.stack: list[Registration] = []
        self.handles: list[Placed] = []
        self.fired: dict[str, int] = {}
        self.passes: dict[str, int] = {}
        self.in_run = False
        self._thread: int | None = None
        self._quiet: dict[int, int] = {}
        self._lock = threading.Lock()
        self._switch: contextlib.ExitStack | None = None
        self._plans: dict[frozenset[str], _Plan] = {}
        self._plan: _Plan | None = None
        self._reader = Recorder()
        self._attention = attention.AttentionBackend(model)
        self.before_run: Callable[[], Callable[[], None] | None] = _nobody
        """Gives what is called before a run whose sites were asked for, and raises where hooks would give wrong numbers; set by the wrapper."""
        self._slots: list[attention.Slots] = []
        self.sequences = Sequences()

    def __getstate__(self) -> dict[str, Any]:
        # Made hooks belong to this engine, and so does the stack of those who put them there; a copy has none.
        fresh: dict[str, Any] = {
            "_plans": {},
            "_plan": None,
            "stack": [],
            "handles": [],
            "_switch": None,
            "_thread": None,
            "_quiet": {},
            "_slots": [],
        }
        return {
            **self.__dict__,
            **fresh,
            "_reader": Recorder(),
            "_lock": None,
            "before_run": _nobody,
            "sequences": Sequences(),
            "in_run": False,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()

    def acts(self) -> bool:
        """Whether hooks fire in this thread, now."""
        thread = get_ident()
        return thread == self._thread and thread not in self._quiet

    def check_thread(self) -> None:
        """Raise HookError if hooks of another thread are in place."""
        if self.stack and self._thread != get_ident():
            raise HookError(
                "Hooks of another thread are in place on this model, and they act in that thread alone. Use one thread at a time (a lock around "
                "both), or give each thread a copy: copy.deepcopy(model)."
            )

    def renew(self, points: Iterable[Point], first_blocks: Mapping[str, nn.Module]) -> None:
        """Put the same sites on the modules that carry them now; what is registered stays registered."""
        self._detach()
        self.points = {point.name: point for point in points}
        self.first_blocks = dict(first_blocks)
        self._plans.clear()
        self._attach()

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
        """Add a registration and attach what it needs; HookError if another thread has hooks in place."""
        with self._lock:
            self.check_thread()
            self._thread = get_ident()
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
        saved_inputs: dict[int, Any] = {}
        for name in asked:
            point = self.points[name]
            companions = getattr(point, "companions", ())
            for needed in (*companions, point):
                slots.setdefault((id(needed.module), needed.phase), {})[id(needed)] = needed
            saved_inputs.update({id(stash): stash for stash in companions})
            tower_of[name] = self.flow.tower_of(SiteName.parse(name).tower)
        calls = []
        for (_, phase), points in slots.items():
            ordered = tuple(sorted(points.values(), key=lambda point: point.order))
            calls.append((ordered[0].module, phase, ordered))
        connected = any(self.flow.connector(SiteName.parse(name).tower) for name in tower_of)
        counted = tuple(tower for tower in self.first_blocks if connected or tower in tower_of.values())
        return _Plan(tuple(calls), counted, tower_of, tuple(saved_inputs.values()))

    def _attach(self) -> None:
        self._detach()
        asked = self.asked()
        self._plan = plan = self._plan_of(asked) if asked else None
        if plan is None:
            return
        hooks = self._hooks(plan)
        for module, hook in hooks.pre:
            self.handles.append(placed(module._forward_pre_hooks, hook, module._forward_pre_hooks_with_kwargs))
        for module, hook in hooks.post:
            self.handles.append(placed(module._forward_hooks, hook, module._forward_hooks_with_kwargs))
        for tower in plan.counted:
            self.handles.append(placed_first(self.first_blocks[tower], self._count_pass(tower)))
        for module, phase, _ in plan.calls:
            # Only attention that keeps a cache has a number in it.
            if phase == "attention" and getattr(module, "layer_idx", None) is not None:
                slots = hooks.attention[id(module)].slots
                self._slots.append(slots)
                self.handles.append(placed_first(module, slots.look, with_kwargs=True))
        self.handles.append(placed_first(self.model, self._begin_forward, with_kwargs=True))
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
        for module, phase, planned in plan.calls:
            points = [point for point in planned if not point.for_edits or self._touched(point.name)]
            if not points:
                continue
            fires = [(point, self.sequences.by_rows(point.name, fire_of(point))) for point in points]
            whole = one_recorder and all(point.whole and not self.sequences.holds(point.name) for point in points)
            names = tuple(point.name for point in points)
            if phase == "pre":
                hook = self._pre_hook(module, fires)
                hooks.pre.append((module, self._pre_reader(module, names, hook) if whole else hook))
            elif phase == "post":
                hook = self._post_hook(module, fires)
                hooks.post.append((module, self._post_reader(module, names, hook) if whole else hook))
            else:
                stages = {SiteName.parse(point.name).stage: fire for point, fire in fires}
                hooks.attention[id(module)] = attention.AttentionHooks(stages, only_reads, self)
        return hooks

    def _touched(self, name: str) -> bool:
        return any(registration.touches(name) for registration in self.stack)

    @contextlib.contextmanager
    def detached(self) -> Iterator[None]:
        """No hook is on any module inside the block, e.g. while the module is copied; afterwards they are back."""
        self._detach()
        try:
            yield
        finally:
            self._attach()

    def _detach(self) -> None:
        if not self.handles:
            return
        for hooks, with_kwargs, key in self.handles:
            hooks.pop(key, None)
            with_kwargs.pop(key, None)
        self.handles.clear()
        for slots in self._slots:
            slots.forget()
        self._slots.clear()
        # What was recorded belongs to whoever asked for it.
        self._reader = Recorder()
        if self._switch is not None:
            switch, self._switch = self._switch, None
            switch.close()

    def kernels(self, eager: bool, prefix_kv: Mapping[int, attention.PrefixKV]) -> AbstractContextManager[None]:
        """Taps in the attention of this model's modules, with eager attention everywhere or each module's own kernel."""
        return self._attention.with_prefix_kv(prefix_kv, eager)

    @contextlib.contextmanager
    def suspension(self) -> Iterator[None]:
        """Let modules be called for their arithmetic alone: no hook fires inside the block, in this thread."""
        thread = get_ident()
        self._quiet[thread] = self._quiet.get(thread, 0) + 1
        try:
            yield
        finally:
            self._quiet[thread] -= 1
            if not self._quiet[thread]:
                del self._quiet[thread]

    # -- one run -------------------------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def run(self, bypassed: Collection[str] = ()) -> Iterator[None]:
        """One run of the model (one forward, or all passes of generate): counts passes, and checks at the end that every site fired.

        ``bypassed`` names sites that these inputs leave out. Raises HookError if hooks of another thread are in place.
        """
        self.check_thread()
        if not self.stack:
            yield
            return
        outer, self.in_run = self.in_run, True
        if not outer:
            self.fired.clear()
            self.passes.clear()
        try:
            yield
            if not outer:
                self._check_fired(bypassed)
        finally:
            self.in_run = outer
            if not outer:
                self._forget_stashes()

    def _forget_stashes(self) -> None:
        for stash in self._plan.saved_inputs if self._plan is not None else ():
            stash.kept.clear()

    def _check_fired(self, bypassed: Collection[str]) -> None:
        if self._plan is None:
            return
        passes, fired, tower_of = self.passes, self.fired, self._plan.tower_of
        bypassed = frozenset(bypassed).union(*(registration.optional for registration in self.stack))
        for name, tower in tower_of.items():
            if fired.get(name, 0) != passes.get(tower, 0) and name not in bypassed:
                raise HookError(
                    f"{name} fired {fired.get(name, 0)} times in {passes.get(tower, 0)} passes of its tower; its edits cannot be trusted."
                    + (_OWN_ATTENTION if SiteName.parse(name).is_eager else "")
                )
        for registration in self.stack:
            for name in registration.exact:
                if passes.get(tower_of[name], 0) == 0:
                    tower = SiteName.parse(name).tower
                    raise HookError(
                        f"{name} did not fire: the {tower} tower did not run. Does the input hold what this tower reads?"
                    )

    def _begin_forward(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if self.acts():
            self.sequences.begin(kwargs)
        if self.acts() and not self.in_run:
            before = self.before_run()
            if before is not None:
                before()
            self.fired.clear()
            self.passes.clear()

    def _count_pass(self, tower: str) -> Callable[..., None]:
        def count(module: nn.Module, args: Any) -> None:
            if self.acts():
                self.passes[tower] = self.passes.get(tower, 0) + 1

        return count

    def _pre_hook(self, own: nn.Module, fires: Sequence[tuple[Point, Callback]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if module is not own or not self.acts():
                return None
            call = Call(module, args, kwargs)
            for point, fire in fires:
                point.apply(call, fire)
            return (call.args, call.kwargs) if call.changed else None

        return hook

    def _post_hook(self, own: nn.Module, fires: Sequence[tuple[Point, Callback]]) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if module is not own or not self.acts():
                return None
            call = Call(module, args, kwargs, output)
            for point, fire in fires:
                point.apply(call, fire)
            return call.output if call.changed else None

        return hook

    def _pre_reader(self, own: nn.Module, names: tuple[str, ...], hook: Callable[..., Any]) -> Callable[..., Any]:
        """``hook`` for points that are only recorded, and hold the first argument as it is: most of what a cached run does."""

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if not args or type(args[0]) is not Tensor or module is not own or self._quiet:
                return hook(module, args, kwargs)
            return self._read(names, args[0])

        return read

    def _post_reader(self, own: nn.Module, names: tuple[str, ...], hook: Callable[..., Any]) -> Callable[..., Any]:
        """As :meth:`_pre_reader`, for points that hold the output as it is."""

        def read(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
            if type(output) is not Tensor or output.ndim == 4 or module is not own or self._quiet:
                return hook(module, args, kwargs, output)
            return self._read(names, output)

        return read

    def _read(self, names: tuple[str, ...], value: Tensor) -> None:
        if get_ident() != self._thread:
            return
        fired, record = self.fired, self._reader.record
        for name in names:
            fired[name] = fired.get(name, 0) + 1
            record(name, value)

    # -- one point -----------------------------------------------------------------------------------------------------------------------

    def _fire_of(self, point: Point) -> Callback:
        name = SiteName.parse(point.name)
        chain = [hook for registration in self.stack for hook in self._hooks_of(registration, point.name)]
        edits = any(not isinstance(hook, Recorder) for hook in chain)
        backward = [hook for registration in self.stack for hook in registration.backward.get(point.name, ())]
        wants_grad = bool(backward) or any(isinstance(hook, Recorder) and hook.needs_grad for hook in chain)
        follows = self._touched(point.name)
        in_place = getattr(point, "in_place", False)
        records = any(isinstance(hook, Recorder) for hook in chain)

        def fire(value: Tensor) -> tuple[Tensor, bool]:
            step = self.fired.get(point.name, 0)
            self.fired[point.name] = step + 1
            where = HookPoint(point.name, name.tower, name.layer, name.site, step)
            with_grad = torch.is_grad_enabled()
            layout = value
            if with_grad and wants_grad and not value.requires_grad and value.is_floating_point():
                value = value.detach().clone().requires_grad_(True)
            tracked = follows and with_grad and value.requires_grad
            changed = tracked
            if in_place and (tracked or (edits and records)):
                # What is recorded must not change when an edit is written in place.
                value = value.clone()
            for hook in chain:
                if isinstance(hook, Recorder):
                    hook.record(point.name, value)
                    continue
                value, edited = run_hook(hook, value, where, tracked)
                changed = changed or edited
            if changed and not in_place:
                value = match_memory_layout(value, layout)
            for hook in backward:
                value.register_hook(lambda grad, hook=hook: checked(hook(grad, where), grad, where))
            return value, changed

        return fire

    def _reader_of(self, point: Point) -> Callback:
        """The fire of a point that one recorder reads, without what edits need."""
        name = point.name

        def read(value: Tensor) -> tuple[Tensor, bool]:
            self.fired[name] = self.fired.get(name, 0) + 1
            self._reader.record(name, value)
            return value, False

        return read

    @staticmethod
    def _hooks_of(registration: Registration, name: str) -> list[Any]:
        hooks: list[Any] = list(registration.forward.get(name, ()))
        if registration.recorder is not None and name in registration.recorded:
            hooks.append(registration.recorder)
        return hooks

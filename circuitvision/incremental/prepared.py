"""A prepared run: one unedited run is recorded up to a place, and every further run under edits computes only what lies behind it.

``with model.prepared(inputs, start=site) as run: logits = run(edits)`` equals ``model.run(inputs, edits)`` for edits that act at ``start`` or behind
it, in values and in gradients, at the cost of what is behind. It is what a sweep does batch by batch (:func:`run_batch`), open to training: a
direction, a basis or a dictionary at layer 20 of 32 is fitted for the price of 12 layers.

*Values.* Runs of one group that compute all positions run the model's own kernels on the model's own shapes: their bits are those of
``model.run``. Larger batches, and runs of a suffix of the positions, differ by rounding.

*A base.* ``model.prepared(inputs, start, base=edits)`` records the run under these edits: every further run is under them and its own, which act
after them and may set what they changed. Behind ``start`` the base acts anew on what a group's edits make of it.

*Gradients.* What was recorded is constant, without a graph. Tensors of edits, and parameters of what runs again, get the gradients of the whole
forward; inputs that require a gradient are refused. A suffix of the positions is computed where the run's mask allows it and no weight changed since
the recording; while gradients are on only if no parameter of the model requires one, for those would lose what earlier positions give them, or if
:attr:`PreparedRun.follows_weights` says that they are not asked for.

*Where it does not hold.* Under other hooks, in training mode, behind replaced forwards, and for edits that change the inputs, a call runs the
whole model, group by group, and ``plan`` says why. Modules or torch hooks that were added since the recording make it record anew.

Not covered: ``generate`` and ``sample_actions`` (prepare one denoising step's inputs); gradients of anything before ``start``; weights changed by a
write through ``.data``, which leaves no trace.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from circuitvision.errors import CircuitVisionError, InputError, warn
from circuitvision.incremental.replay import CannotResume, rows_of_group, tensors_in
from circuitvision.incremental.resume import Resumer, blocked_by
from circuitvision.incremental.routes import (
    ResumePlan,
    is_unedited,
    lowest_position,
    plan_behind,
    route_of,
    start_of,
    start_under,
)
from circuitvision.incremental.sweeps.batches import is_out_of_memory
from circuitvision.links import marked
from circuitvision.model.edits.applying import EditApplier, edited
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.binding import CompiledEdits, EditCompiler, as_groups
from circuitvision.model.names import is_component, site_of
from circuitvision.model.registrations import Registration
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

FAILURES = (MemoryError, RuntimeError, ValueError, TypeError, IndexError)
"""What a model raises where it is called in a way that is not understood; memory that runs out is told apart."""


def run_batch(
    resumer: Resumer,
    compiler: EditCompiler,
    groups: Sequence[CompiledEdits],
    plan: ResumePlan,
    first: int,
    recorded: Mapping[str, Tensor],
) -> Tensor:
    """The output of several groups in one resumed run, rows group by group; of positions from ``first`` on where the output has positions.

    ``recorded`` holds the unedited values of sites that edits of the groups take values from and that the run does not compute.
    Raises CannotResume where the model is called in a way that is not understood.
    """
    tower = resumer.sliced_tower(plan)
    assert resumer.clean is not None
    applier = EditApplier(compiler, groups, {tower: first} if tower else {}, resumer.clean.rows)
    writes = frozenset(site for group in groups for site in group.writes)
    for number, group in enumerate(groups):
        for site, edits in (*compiler.base.captures.items(), *group.captures.items()):
            if site in recorded and is_unedited(resumer.model, site, plan, writes):
                applier.captured[number].update({(edit, site): recorded[site] for edit in edits})
                applier.known.add(site)
    # What is handed back fires no site inside it.
    optional = frozenset((*compiler.base.writes, *compiler.base.captures)) - writes
    registration = Registration(forward=applier.hooks(), exact=writes, optional=optional)
    with resumer.model.engine.registered(registration):
        output = resumer.run(plan, len(groups), first)
    unedited, cut = resumer.clean.output, is_cut(resumer, plan, first)
    wanted = (
        (len(groups) * unedited.shape[0], unedited.shape[1] - first, *unedited.shape[2:]) if cut else unedited.shape
    )
    found = output.shape if cut else rows_of_group(output, unedited, 0, len(groups)).shape
    if tuple(found) != tuple(wanted):
        raise CannotResume(f"the output has shape {tuple(found)}, not {tuple(wanted)}")
    return output


def is_cut(resumer: Resumer, plan: ResumePlan, first: int) -> bool:
    """Whether the output of a resumed run holds the positions from ``first`` on alone."""
    return bool(first) and resumer.keeps_positions(resumer.sliced_tower(plan))


class PreparedRun:
    """Runs of one model on one set of inputs from a place on; made by ``model.prepared``, and over when its ``with`` block ends.

    ``output`` is the output without a group's edits; ``starts`` are the recorded places; ``plan`` says what the last call computed.
    """

    def __init__(self, model: Wrapped, inputs: Mapping[str, Any], start: Any, base: Sequence[Edit] = ()) -> None:
        refuse_random(model.module, "A prepared run")
        if inputs.get("past_key_values") is not None:
            raise InputError("The inputs hold past_key_values, which every run would extend: leave them out.")
        self.plan = ""
        self.follows_weights = True
        """Whether parameters of the model may be asked for gradients; False trains edits alone, at the cost of the positions that they change."""
        self._model, self._inputs = model, dict(inputs)
        self._versions = self._versions_of_inputs()
        compiler = EditCompiler(model, self._inputs, base=as_base(base))
        self._compiler: EditCompiler | None = compiler
        sites = _sites_of(model, start)
        self.starts = frozenset(start_under(model, start_of(model, site), compiler.base) for site in sites)
        self._refuse_absent(self._compiler)
        self._eager = any(SiteName.parse(site).is_eager for site in (*sites, *compiler.base.sites))
        self._resumers: dict[bool, Resumer] = {}
        self._refused: dict[bool, str] = {}
        self._recorded: dict[bool, dict[str, Tensor]] = {False: {}, True: {}}
        self._state: tuple[int, ...] = ()
        self._output: Tensor | None = None
        self._weights: list[Tensor] = []
        self._before: list[Tensor] = []
        self._weights_version = self._before_version = 0
        if not blocked_by(model):
            with contextlib.suppress(CannotResume):
                self._resumer(self._eager)

    def __repr__(self) -> str:
        state = "over" if self._compiler is None else self.plan or "not called yet"
        return f"PreparedRun(from {self._where()}; {state})"

    def _where(self) -> str:
        return ", ".join(map(str, sorted(self.starts)))

    def close(self) -> None:
        """Let go of everything that was recorded; calls raise from now on."""
        self._compiler, self._output = None, None
        self._inputs = {}
        self._resumers.clear()
        self._recorded = {False: {}, True: {}}

    # -- calls -----------------------------------------------------------------------------------------------------------------------------

    @property
    def output(self) -> Tensor:
        """The output without a group's edits, under the base alone, in the shape of ``model(inputs)``, without a graph."""
        self._check_open()
        if self._output is None:
            resumer = self._resumers.get(False) or self._resumers.get(True)
            if resumer is None or resumer.clean is None:
                with torch.no_grad():
                    self._output = self._in_full(CompiledEdits(()))
            else:
                self._output = marked(resumer.clean.output.clone(), self._model.link)
        return self._output

    def __call__(self, groups: Edit | Sequence[Edit] | Sequence[Sequence[Edit]]) -> Tensor:
        """The output under edits, with a graph where gradients are on.

        An edit, or a list of edits, is one group, as in ``model.run``: the output has the model's own shape, ``[example …]`` (of a dual encoder
        ``[image text]``). A list of lists is several groups, which run in one batch of groups × examples: ``[group example …]``.

        Raises:
            InputError: an edit acts before the start (the error names it), or cannot act at all; an input requires a gradient while gradients are on;
                inputs or weights were changed since the recording; the ``with`` block is over.
        """
        compiler = self._check_open()
        blocked = self._blocked()
        self._check_unchanged()
        listed, single = _groups(groups)
        compiled = compiler.bind(listed)
        for group in compiled:
            plan_behind(self._model, self.starts, [group], compiler.base)
        parts = self._parts(compiled, blocked)
        outputs: dict[int, Tensor] = {}
        for (eager, reason), numbers in parts.items():
            found = self._outputs([compiled[number] for number in numbers], eager, reason)
            if len(parts) == 1:
                return marked(found[0] if single else found, self._model.link)
            outputs.update(zip(numbers, found, strict=True))
        return marked(torch.stack([outputs[number] for number in range(len(compiled))]), self._model.link)

    def _blocked(self) -> str:
        """Why nothing can be resumed now; "" if it can, from what was recorded of the model as it is."""
        self._model._follow()
        modules = list(self._model.module.modules())
        blocked = blocked_by(self._model, modules)
        if not blocked and (self._resumers or self._refused) and self._state != _state_of(modules):
            self._resumers.clear()
            self._refused.clear()
            self._recorded = {False: {}, True: {}}
        return blocked

    def _parts(self, groups: Sequence[CompiledEdits], blocked: str) -> dict[tuple[bool, str], list[int]]:
        """Which groups run together: those of one implementation of attention, and those that run in full for one reason."""
        parts: dict[tuple[bool, str], list[int]] = {}
        for number, group in enumerate(groups):
            eager = route_of(self._model, group, self._check_open().base).eager
            reason = blocked or ("the edit changes the inputs" if group.inputs is not None else "")
            parts.setdefault((eager and not reason, reason), []).append(number)
        return parts

    def _outputs(self, groups: Sequence[CompiledEdits], eager: bool, reason: str) -> Tensor:
        """``[group example …]``."""
        if not reason:
            try:
                return self._resumed(groups, eager)
            except CircuitVisionError:
                raise
            except CannotResume as error:
                reason = str(error)
            except FAILURES as error:
                if is_out_of_memory(error):
                    raise
                reason = f"{type(error).__name__}: {error}"
                warn(f"A resumed run failed ({reason}), so the whole model runs.")
        self.plan = f"in full: {reason}"
        return torch.stack([self._in_full(group) for group in groups])

    def _in_full(self, group: CompiledEdits) -> Tensor:
        compiler = self._check_open()
        with edited(compiler, group):
            return self._model._forward(dict(compiler.run_inputs if group.inputs is None else group.inputs), {})

    def _resumed(self, groups: Sequence[CompiledEdits], eager: bool) -> Tensor:
        compiler, resumer = self._check_open(), self._resumer(eager)
        plan = plan_behind(self._model, self.starts, groups, compiler.base)
        first = self._first(resumer, plan, groups)
        writes = {site for group in groups for site in group.writes}
        captured = {site for group in (*groups, compiler.base) for site in group.captures}
        self._record_sites(eager, {site for site in captured if is_unedited(self._model, site, plan, writes)})
        output = run_batch(resumer, compiler, groups, plan, first, self._recorded[eager])
        self.plan = f"from {', '.join(map(str, plan.starts))}{f', positions {first}…' if first else ''}"
        assert resumer.clean is not None
        unedited, copies = resumer.clean.output, len(groups)
        if is_cut(resumer, plan, first):
            before = unedited[:, :first].repeat(copies, *[1] * (unedited.ndim - 1))
            output = torch.cat([before, output], dim=1)
        if resumer.dual:
            return torch.stack([rows_of_group(output, unedited, number, copies) for number in range(copies)])
        return output.unflatten(0, (copies, unedited.shape[0]))

    def _first(self, resumer: Resumer, plan: ResumePlan, groups: Sequence[CompiledEdits]) -> int:
        """The first position to compute; 0 for all."""
        tower = resumer.sliced_tower(plan)
        start = plan.start_in(tower) if tower else None
        edited = [group for group in groups if group.writes]
        if start is None or not edited:
            return 0
        # What earlier positions left is constant in a run of the others: it knows no new weight, and no gradient of one.
        followed = self.follows_weights and torch.is_grad_enabled()
        followed = followed and any(weight.requires_grad for weight in self._weights)
        if followed or _version(self._weights) != self._weights_version:
            return 0
        compiler = self._check_open()
        return resumer.safe_start(tower, start.layer, min(lowest_position(compiler, g, tower) for g in edited))

    # -- what is recorded ------------------------------------------------------------------------------------------------------------------

    def _resumer(self, eager: bool) -> Resumer:
        """The unedited run under one implementation of attention, recorded when it is first needed. Raises CannotResume."""
        if eager in self._refused:
            raise CannotResume(self._refused[eager])
        if eager not in self._resumers:
            resumer = Resumer(self._check_open(), eager)
            taps = {
                start.tower: min(max(s.layer, 0) for s in self.starts if s.tower == start.tower)
                for start in self.starts
                if resumer.sliced_tower(ResumePlan((start,), eager)) == start.tower
            }
            try:
                resumer.record(set(self.starts), taps, [])
            except CannotResume as error:
                self._refused[eager] = str(error)
                raise
            finally:
                modules = list(self._model.module.modules())
                self._weights, self._state = _weights_of(modules), _state_of(modules)
            self._resumers[eager], self._before = resumer, [*resumer.parameters()]
            self._weights_version, self._before_version = _version(self._weights), _version(self._before)
        return self._resumers[eager]

    def _record_sites(self, eager: bool, sites: set[str]) -> None:
        """Values of the recorded run that edits ask for and no resumed run computes: one more run, when they are first asked for."""
        missing = sorted(sites - self._recorded[eager].keys())
        if missing:
            resumer, compiler = self._resumers[eager], self._check_open()
            with torch.no_grad(), resumer._kernels({}), edited(compiler):
                self._recorded[eager].update(self._model._values_at(resumer.inputs, missing)[1])

    # -- checks ----------------------------------------------------------------------------------------------------------------------------

    def _check_open(self) -> EditCompiler:
        if self._compiler is None:
            raise InputError("This prepared run is over: call it inside its with block.")
        return self._compiler

    def _check_unchanged(self) -> None:
        if self._versions != self._versions_of_inputs():
            raise InputError("The inputs were written into since this run was prepared: prepare it again.")
        if self._resumers and _version(self._before) != self._before_version:
            raise InputError(
                f"Weights before {self._where()} were changed since this run was prepared, and what they gave was recorded: prepare it again."
            )
        asking = [name for name, value in self._inputs.items() if any(t.requires_grad for t in tensors_in(value))]
        if asking and torch.is_grad_enabled():
            raise InputError(
                f"{asking[0]} requires a gradient, which a prepared run does not compute before {self._where()}: detach it, or use model.run."
            )

    def _versions_of_inputs(self) -> int:
        return _version([tensor for value in self._inputs.values() for tensor in tensors_in(value)])

    def _refuse_absent(self, compiler: EditCompiler) -> None:
        for start in self.starts:
            tower = compiler.model.flow.tower_of(start.tower)
            if tower not in compiler.windows.maps:
                raise InputError(f"start is in the {tower} tower, which does not run: the inputs hold no pixel_values.")


def as_base(edits: Any) -> tuple[Edit, ...]:
    """The edits of a base. Raises InputError for several groups, and for tensors that are trained: what was recorded gives them no gradient."""
    listed = list(edits) if isinstance(edits, Iterable) else [edits]
    if any(not isinstance(edit, Edit) for edit in listed):
        raise InputError("A base is one list of edits, under which every run is: base=[edit, …].")
    for edit in listed:
        if any(tensor.trained for tensor in edit.held()):
            raise InputError(
                f"{edit!r} of the base holds a tensor that requires a gradient, which it would not get: detach it."
            )
    return tuple(listed)


def _version(tensors: Sequence[Tensor]) -> int:
    """A number that grows with every write into one of the tensors."""
    return sum(tensor._version for tensor in tensors if not tensor.is_inference())


def _weights_of(modules: Sequence[nn.Module]) -> list[Tensor]:
    return [weight for module in modules for weight in module._parameters.values() if weight is not None]


def _state_of(modules: Sequence[nn.Module]) -> tuple[int, ...]:
    """What is another where modules, parameters or torch hooks came or went."""
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)
    return (len(modules), hooks, *map(id, _weights_of(modules)))


def _groups(given: Any) -> tuple[list[tuple[Edit, ...]], bool]:
    """Groups of edits, and whether a single one was given; InputError for a mixture."""
    if isinstance(given, Edit):
        return [(given,)], True
    listed = list(given) if isinstance(given, Sequence) and not isinstance(given, str) else as_groups(given)
    edits = [isinstance(entry, Edit) for entry in listed]
    if any(edits) and not all(edits):
        raise InputError("Give a list of edits (one group) or a list of lists of edits (several), not both in one.")
    if not listed or all(edits):
        return [tuple(edit for group in as_groups(listed) for edit in group)], True
    return as_groups(listed), False


def _sites_of(model: Wrapped, start: Any) -> list[str]:
    """The sites that ``start`` names: a site, glob or component, a layer ``(tower, number)``, or several of these in a list."""
    if isinstance(start, (list, set, frozenset)):
        found = [site for one in start for site in _sites_of(model, one)]
        if not found:
            raise InputError("start names no site: give a site, a layer such as ('language', 20), or a list of these.")
        return found
    if isinstance(start, int) and not isinstance(start, bool):
        start = (model.flow.towers[-1], start)
    if isinstance(start, tuple) and len(start) == 2 and isinstance(start[0], str):
        return [_input_of_layer(model, *start)]
    if is_component(start):
        start = site_of(start)[0]
    if not isinstance(start, str):
        raise InputError(
            f"start={start!r} is not understood: a site, a layer such as ('language', 20), or a list of these."
        )
    return model.sites(start)


def _input_of_layer(model: Wrapped, tower: str, layer: Any) -> str:
    if tower not in model.towers:
        raise InputError(f"start names the tower {tower!r}; this model has {', '.join(model.towers)}.")
    count = model.towers[tower].cfg.n_layers
    if isinstance(layer, bool) or not isinstance(layer, int) or not -count <= layer < count:
        raise InputError(f"start={(tower, layer)!r} is outside the {count} layers of the {tower} tower.")
    return f"{tower}.blocks.{layer % count}.hook_resid_pre"

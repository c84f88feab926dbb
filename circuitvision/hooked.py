"""HookedModel: a Hugging Face vision, vision-language or action model with every internal activation under one standard name.

What a model is, and one forward pass of it, is in ``model/wrapped.py``; here is what is done with it: caches, hooks, edits, sweeps, generation.

Torch hooks exist only while a run asks for sites, and are gone afterwards, also when it raises. They act in the thread that put them in place
(``model/hooks.py``). Nothing is folded, ever: what is read is what the model computes.

Not covered: what :mod:`circuitvision.model.wrapped` and :mod:`circuitvision.model.hooks` leave out.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitvision import metrics, provenance
from circuitvision.errors import HookError, InputError, UnsupportedModelError, warn
from circuitvision.model import generation, loading, state
from circuitvision.model import inputs as input_checks
from circuitvision.model.cache import ActivationCache, Recipe, collected
from circuitvision.model.edits.applying import edited
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.binding import EditCompiler, as_groups
from circuitvision.model.gradients import Metric, with_gradients
from circuitvision.model.registrations import Hook, HookPoint, Recorder, Registration
from circuitvision.model.run_functions import RunFunction
from circuitvision.model.sites import NamesFilter, SiteName, exact_names
from circuitvision.model.weights import check_gradients
from circuitvision.model.wrapped import RunLog, Wrapped

if TYPE_CHECKING:
    from circuitvision.incremental.prepared import PreparedRun
    from circuitvision.incremental.sweeps.result import SweepResult

HookList = Sequence[tuple[Any, Hook]]


class _Stop(Exception):
    """Ends a forward pass at a layer; carries the residual there."""

    def __init__(self, value: Tensor) -> None:
        super().__init__("stopped")
        self.value = value


class HookedModel(Wrapped):
    """A wrapped model: ``model(inputs)``, ``run_with_cache``, ``run_with_hooks``, ``hooks``, ``generate``, towers, sites and tokens.

    ``copy.deepcopy`` copies the module too; hooks of :meth:`add_hook` act in the copy, those of ``with`` blocks do not.
    Raises UnsupportedModelError for a class no family describes, a compiled module, DataParallel, and several image towers behind one projector.
    """

    def __init__(self, module: nn.Module, processor: Any = None) -> None:
        super().__init__(module, processor)
        self._persistent: list[Registration] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedModel:
        twin = super().__deepcopy__(memo)
        for registration in self._persistent:
            twin._put(Registration(registration.forward, registration.backward, exact=registration.exact))
        return twin

    def _to_copy(self) -> dict[str, Any]:
        return {**super()._to_copy(), "_persistent": []}

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> HookedModel:
        """Load a supported checkpoint (a Hub name or a folder; with peft, an adapter's too) with its processor, and wrap it.

        ``dtype``, ``device``, ``device_map`` and further keywords go to ``from_pretrained`` of the checkpoint's own class.
        Raises InputError for a folder without a config, UnsupportedModelError for an architecture no family describes.
        """
        module = loading.load_module(name_or_folder, dtype, device, device_map, **kwargs)
        return cls(module, loading.load_processor(name_or_folder, module))

    def unwrap(self) -> nn.Module:
        """The module as it was, without any handle of ours; transformers' own capture hooks stay."""
        self.reset_hooks()
        for registration in list(self.engine.stack):
            self.engine.pop(registration)
        return self.module

    # -- caches --------------------------------------------------------------------------------------------------------------------------------

    def run_with_cache(
        self,
        inputs: Any,
        names_filter: NamesFilter = None,
        incl_bwd: bool = False,
        metric: Metric | None = None,
        device: torch.device | str | None = None,
        remove_batch_dim: bool = False,
        stop_at_layer: int | tuple[str, int] | None = None,
        keep_graph: bool = False,
        **kwargs: Any,
    ) -> tuple[Tensor, ActivationCache]:
        """One forward pass and the activations of the sites that ``names_filter`` selects (None: all but the derived ones).

        ``incl_bwd`` adds the gradient of ``metric(logits)`` summed over the batch at every site, under ``name + "_grad"``,
        without touching the parameters' ``.grad``. Cached values are detached; with ``keep_graph`` they stay on the autograd path, and hold
        its memory. ``stop_at_layer`` ends the pass before a block (an int counts in the last
        tower, ``("vision", 2)`` names one) and returns the residual there in place of the logits.
        Scores, pattern and rotated sites make this run the model's eager run.
        Raises UnknownSiteError, InputError, and HookError if an asked-for site did not fire once per pass, or no site that a glob selects did.
        """
        if incl_bwd and metric is None:
            raise InputError("incl_bwd needs metric=fn: the gradient of what?")
        if incl_bwd:
            check_gradients(self.module)
        mapping = self._checked(inputs, kwargs)
        if incl_bwd:
            state.refuse_inference(self.module, mapping)
        names = self._match(names_filter)
        if names_filter is None:
            names = [*names, *(name for name in self.engine.asked() if name not in names)]
        recorder = Recorder(None if incl_bwd else device, needs_grad=incl_bwd, keeps_graph=keep_graph)
        exact = exact_names(names_filter, names)
        recipe = Recipe.of(
            self, mapping, names, settings=kwargs, metric=metric if incl_bwd else None, stop_at_layer=stop_at_layer
        )
        registration = Registration(recorder=recorder, recorded=frozenset(names), exact=exact)
        grads = torch.enable_grad() if incl_bwd else contextlib.nullcontext()
        with grads, self.engine.registered(registration):
            if stop_at_layer is None:
                out = self._forward(mapping, {})
            else:
                out = self._forward_until(mapping, stop_at_layer)
        values = {name: recorder.values[name] for name in names if name in recorder.values}
        if names_filter is not None and not values:
            towers = ", ".join(dict.fromkeys(SiteName.parse(name).tower for name in names))
            raise HookError(
                f"The run reached none of the {len(names)} sites asked for ({names[0]} …), of {towers}: what they read is not in the inputs "
                f"({', '.join(mapping)}), or stop_at_layer ends the run before them."
            )
        cache = ActivationCache(collected(values, multi_pass=False), self, mapping, recipe=recipe)
        cache.edited = self._hooked_sites()
        if incl_bwd:
            assert metric is not None
            cache = with_gradients(cache, metrics.bind(metric, self), out, mapping, device)
            out = out.detach()
        return out, cache.remove_batch_dim() if remove_batch_dim else cache

    def _forward_until(self, mapping: Mapping[str, Any], stop_at_layer: int | tuple[str, int]) -> Tensor:
        tower, layer = stop_at_layer if isinstance(stop_at_layer, tuple) else (self.flow.towers[-1], stop_at_layer)
        if tower not in self.towers:
            raise InputError(f"stop_at_layer names the tower {tower!r}; this model has {', '.join(self.towers)}.")
        count = self.towers[tower].cfg.n_layers
        layer = layer + count if layer < 0 else layer
        if not 0 <= layer <= count:
            raise InputError(f"stop_at_layer={layer} is outside the {count} layers of the {tower} tower.")
        site = (
            f"{tower}.blocks.{layer}.hook_resid_pre" if layer < count else f"{tower}.blocks.{count - 1}.hook_resid_post"
        )

        def stop(value: Tensor, hook: HookPoint) -> None:
            raise _Stop(value)

        try:
            with self.engine.registered(Registration(forward={site: [stop]})):
                self._forward(mapping, {})
        except _Stop as stopped:
            return stopped.value
        raise HookError(f"The run never reached {site}.")

    # -- hooks ---------------------------------------------------------------------------------------------------------------------------------

    def run_with_hooks(self, inputs: Any, fwd_hooks: HookList = (), bwd_hooks: HookList = (), **kwargs: Any) -> Tensor:
        """One forward pass with hooks; returns the output. ``fwd_hooks`` and ``bwd_hooks`` are ``[(name or glob, fn)]``.

        ``fn(tensor, hook)`` returns the tensor to continue with, or None to change nothing. Backward hooks get the gradient,
        in a backward pass the caller runs. Raises HookError for an answer of another shape, dtype or device, and for a change in
        place that is not returned.
        """
        mapping = self._checked(inputs, kwargs)
        with self.engine.registered(self._registration(fwd_hooks, bwd_hooks, mapping)):
            return self._forward(mapping, {})

    @contextlib.contextmanager
    def hooks(self, fwd_hooks: HookList = (), bwd_hooks: HookList = ()) -> Iterator[HookedModel]:
        """Hooks for every run inside the block; outer blocks fire first, and caches inside see edited values."""
        with self.engine.registered(self._registration(fwd_hooks, bwd_hooks)):
            yield self

    def _registration(
        self, fwd_hooks: HookList, bwd_hooks: HookList, inputs: Mapping[str, Any] | None = None
    ) -> Registration:
        if bwd_hooks:
            check_gradients(self.module)
        exact: set[str] = set()
        tables: list[dict[str, list[Hook]]] = []
        for hooks in (fwd_hooks, bwd_hooks):
            table: dict[str, list[Hook]] = {}
            for entry in hooks:
                names_filter, fn = _hook_entry(entry)
                names = self._match(names_filter)
                exact |= exact_names(names_filter, names)
                for name in names:
                    table.setdefault(name, []).append(fn)
            tables.append(table)
        forward, backward = tables
        lost = [name for name in forward if name in exact and self.is_dead(name, inputs)]
        if lost:
            spec = self.towers[SiteName.parse(lost[0]).tower].spec
            unless = (
                f", unless the call sets {spec.feature_layers}"
                if inputs is None and isinstance(spec.feature_layers, str)
                else ""
            )
            warn(f"{lost[0]} cannot reach the output of this model, so editing it changes nothing{unless}.")
        return Registration(forward=forward, backward=backward, exact=frozenset(exact))

    def add_hook(self, name: NamesFilter, fn: Hook, backward: bool = False) -> None:
        """Add a hook that stays until :meth:`reset_hooks`."""
        hooks = [(name, fn)]
        self._put(self._registration(() if backward else hooks, hooks if backward else ()))

    def _put(self, registration: Registration) -> None:
        self.engine.push(registration)
        self._persistent.append(registration)

    def reset_hooks(self) -> None:
        """Remove every hook that :meth:`add_hook` added."""
        for registration in self._persistent:
            self.engine.pop(registration)
        self._persistent.clear()

    @contextlib.contextmanager
    def record(
        self, names_filter: NamesFilter = None, device: torch.device | str | None = None, keep_graph: bool = False
    ) -> Iterator[ActivationCache]:
        """A cache that fills with the runs inside the block, ``generate`` and ``sample_actions`` among them: complete when the block ends.

        Sites of runs with several passes get a leading step axis, or a list where the lengths differ. Of a single run the cache knows the inputs.
        Values are detached unless ``keep_graph``.
        """
        recorder = Recorder(device, keeps_graph=keep_graph)
        cache = ActivationCache({}, self)
        self._log = log = RunLog()
        names = self._match(names_filter)
        try:
            with self.engine.registered(Registration(recorder=recorder, recorded=frozenset(names))):
                yield cache
        finally:
            self._log = None
        ordered = {name: recorder.values[name] for name in names if name in recorder.values}
        cache._values.update(collected(ordered, multi_pass=log.several_passes))
        cache.edited = log.edited
        if log.inputs and names and not ordered:
            _warn_empty(names_filter)
        if len(log.inputs) == 1:
            cache.inputs = log.inputs[0]

    # -- edits ---------------------------------------------------------------------------------------------------------------------------------

    def run(self, inputs: Any, edits: Edit | Sequence[Edit] = (), **kwargs: Any) -> Tensor:
        """One forward pass under edits, see :mod:`circuitvision.edits`; returns the output.

        A run is one prefill: step 0 of every tower. Edits act in the order given; those known to do nothing leave the bare model's bits. Where the
        inputs continue a cache (``past_key_values``), positions count from the cache's first: the run computes those behind it, which edits may
        change, and the cached ones can be keys. As in the bare model, the run makes the cache longer.
        Raises InputError or UnknownSiteError, naming the edit, before anything runs.
        """
        mapping = self._checked(inputs, kwargs)
        binder = EditCompiler(self, mapping)
        (bound,) = binder.bind(_one_group(edits))
        with edited(binder, bound):
            return self._forward(mapping if bound.inputs is None else bound.inputs, {})

    @contextlib.contextmanager
    def prepared(self, inputs: Any, start: Any, base: Sequence[Edit] = ()) -> Iterator[PreparedRun]:
        """Runs under edits that compute only what lies behind a place, exact, with gradients: :class:`circuitvision.PreparedRun`.

        ``with model.prepared(inputs, start=("language", 20)) as run: logits = run([edit])``. The unedited run is recorded once; each call costs what
        lies behind ``start``, the earliest place where an edit may act: a site or component, a layer ``(tower, number)`` (its input; a number alone
        counts in the last tower), or a list of these, of which a call takes the latest that serves. ``run(edits)`` is ``[example …]`` as
        ``model.run``, ``run([edits, …])`` is ``[group example …]``. ``base`` are edits that every run is under, the recorded one included: those of a
        call act after them.

        Raises InputError or UnknownSiteError for a start that is not there; InputError in training mode with dropout, and from a call whose edits act
        before ``start``.
        """
        from circuitvision.incremental.prepared import PreparedRun

        run = PreparedRun(self, self._checked(inputs), start, base)
        try:
            yield run
        finally:
            run.close()

    @provenance.with_provenance
    def sweep(
        self,
        inputs: Any,
        edits_or_groups: Sequence[Edit | Sequence[Edit]],
        metric: Any,
        batch_size: int | str = "auto",
        *,
        axes: Mapping[str, Sequence[Any]] | None = None,
        partial: bool = False,
        empty: Literal["nan", "clean"] = "nan",
        progress: bool = True,
        save_to: str | Path | None = None,
        resume: bool = False,
        example_batch: int | None = None,
        align: Any = "kind",
        base: Sequence[Edit] = (),
        run: RunFunction | None = None,
    ) -> SweepResult:
        """``metric`` under each edit, or group of edits, one at a time; only what an edit can change is computed.

        Equal to ``[metric(model.run(inputs, group)) for group in groups]`` up to rounding. ``values`` is ``[edit example]``, ``clean`` the metric
        of the unedited run. ``metric(logits)`` or ``metric(logits, inputs)`` gets the whole output of one run; a mapping ``{name: metric}``, or a
        list of names, measures several in one run, which become the leading axis ``metric``. ``batch_size`` is how many edits run at once; "auto"
        goes by memory, and either is halved when memory runs out. With ``partial`` an interruption (Ctrl-C, an exception in the metric) returns what
        is done, the rest NaN. ``axes`` arranges the edits, in the order given, as a grid: ``{"layer": range(8), "head":
        range(12)}`` for 96 edits, the last axis varying fastest.

        ``inputs`` may be a data set: pairs (their clean side) or a side of them, which run ``example_batch`` examples at a time (None: by memory), so
        that memory does not grow with their number. Metrics without an answer take the data set's, edits may take their values from the other side
        (``edits.replace(site, pairs.clean)``; ``align`` says which positions belong together), and a function ``edits(batch)`` makes them for each
        batch, as many each time.

        ``base`` are edits that every run is under (or a function of a batch that makes them), so that ``clean`` is the metric under them alone and
        ``values`` equal ``[metric(model.run(inputs, [*base, *group])) for group in groups]``: each group costs what its own edits can change. They
        act after the base's, and may set what it changed.

        ``run`` says what one run is: None, a forward pass, or a function ``(model, inputs, edits)`` that returns what the metric reads, such as
        :func:`circuitvision.steering.act` (the actions that all denoising steps make, of which ``steps`` of edits name some). It runs whole for each
        group of edits, without a base; values of the other side of a data set are those of the same pass.

        ``save_to`` is a folder in which every finished batch is kept: whatever ends the run, the same call with ``resume=True`` runs the rest only,
        to the same bits (see :mod:`circuitvision.incremental.sweeps.store`).

        An example in which all masks and selections of a group are empty was not edited: it is NaN, with a warning, so that means leave it out
        (``empty="clean"``: its unedited metric). Raises InputError or UnknownSiteError, naming the edit, before anything runs; InputError in
        training mode with dropout, and for a folder that holds another study.
        """
        from circuitvision.incremental.sweeps.study import Options, Study

        options = Options(batch_size, partial, empty, progress, save_to, resume, run)
        if hasattr(inputs, "batches"):
            from circuitvision.incremental.sweeps.stream import DataStudy

            return DataStudy(
                self, inputs, edits_or_groups, metric, axes, options, example_batch, align, base=base
            ).result()
        return Study(self, self._checked(inputs), edits_or_groups, metric, axes, options, base).result()

    def generate(self, inputs: Any, *, edits: Sequence[Edit] = (), **kwargs: Any) -> Int[Tensor, "batch pos"]:
        """Generate text under the active hooks and edits; other keywords go to the module's ``generate``.

        ``hook.step`` numbers the passes: 0 is the prompt ("prefill"), then one per new token ("decode"). Positions are absolute: new tokens follow
        the prompt's. An edit of keys or values in the prompt is seen by every later step, through the cache, whatever its implementation. Inputs may
        continue a cache (``past_key_values``), see :meth:`run`. Raises UnsupportedModelError if the model does not generate text, InputError for an
        edit that no step of this generation comes to.
        """
        module: Any = self.module
        growing = self.family.tower_that_runs("per_token")
        if not hasattr(module, "generate") or not growing:
            raise UnsupportedModelError(
                f"A {self.family.name} model does not generate text{_instead(self, 'sample_actions')}."
            )
        named, kwargs = input_checks.split_keywords(self, kwargs)
        mapping = self._checked(inputs, named, generation.described)
        generation.check_cache(mapping, kwargs, hooked=bool(edits or self.engine.stack))
        binder = EditCompiler(
            self, generation.described(mapping), "generate", generation.most_passes(module, mapping, kwargs), kwargs
        )
        (bound,) = binder.bind(_one_group(edits))
        generation.check_edits(bound, mapping, {**mapping, **kwargs}, module)
        if bound.writes or self.engine.stack:
            # Compiled decoding steps, which caches of fixed size ask for on a GPU, would not run hooks that come and go.
            kwargs.setdefault("disable_compile", True)
        with edited(binder, bound), self._running(mapping, several_passes=True):
            out = module.generate(**mapping, **kwargs)
        if bound.writes and growing in self.engine.passes:
            binder.warn_unmet(bound, self.engine.passes[growing])
        return out

    def sample_actions(
        self, inputs: Any, num_steps: int | None = None, *, edits: Sequence[Edit] = (), **kwargs: Any
    ) -> Float[Tensor, "batch chunk action"]:
        """Denoise actions under the active hooks and edits; ``hook.step`` numbers the denoising steps of the action tower.

        The prefix (vision, language) runs once, as step 0; an edit there acts on every denoising step through the keys and values it leaves. Edits of
        the action tower choose their denoising steps by number.
        Starts from ``inputs["noise"]``. Raises UnsupportedModelError if the model does not act.
        """
        module: Any = self.module
        if not hasattr(module, "sample_actions"):
            raise UnsupportedModelError(
                f"A {self.family.name} model does not sample actions{_instead(self, 'generate')}."
            )
        named, kwargs = input_checks.split_keywords(self, kwargs)
        mapping = self._checked(inputs, named)
        binder = EditCompiler(self, mapping, "act", num_steps or self.config.num_inference_steps)
        (bound,) = binder.bind(_one_group(edits))
        mapping.pop("timestep", None)
        with edited(binder, bound), self._running(mapping, several_passes=True):
            return module.sample_actions(**mapping, num_steps=num_steps, **kwargs)


def _warn_empty(names_filter: NamesFilter) -> None:
    warn(f"The cache is empty: no site of {names_filter!r} ran with these inputs (a vision tower needs pixel_values).")


def _one_group(edits: Edit | Sequence[Edit]) -> list[tuple[Edit, ...]]:
    """The edits of a single run as one group; a single edit is one as well."""
    listed = [edits] if isinstance(edits, (Edit, str)) else edits
    if isinstance(listed, (list, tuple)) and any(isinstance(edit, (list, tuple)) for edit in listed):
        raise InputError("A run takes one list of edits; model.sweep takes groups of them, one run each.")
    return [tuple(edit for group in as_groups(listed) for edit in group)]


def _hook_entry(entry: Any) -> tuple[NamesFilter, Hook]:
    if not (isinstance(entry, tuple) and len(entry) == 2 and callable(entry[1])):
        raise HookError(f"A hook is a pair (site name or glob, function), got {entry!r}.")
    return entry


def _instead(model: HookedModel, method: str) -> str:
    """What to call in place of a method that a model does not have."""
    return f"; model.{method}(inputs) is its own" if hasattr(model.module, method) else ""

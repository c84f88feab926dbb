"""HookedModel: a Hugging Face vision, vision-language or action model with every internal activation under one standard name.

The wrapper holds the module untouched: same class, same state_dict, same outputs bit for bit, usable with generate, save_pretrained, adapters and
device maps. Torch hooks exist only while a run asks for sites, and are gone afterwards, also when it raises. Nothing is folded, ever: what is
read is what the model computes.

The module's state is looked at in every run (``state.py``): compiled modules and gradient checkpointing under hooks are refused, dropout in training
mode is told of. Hooks act in the thread that put them in place (``hooks.py``).

Not covered: two wrappers hooking the attention of one module at the same time.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from circuitvision import metrics, provenance
from circuitvision.errors import (
    HookError,
    InputError,
    UnknownAttributeError,
    UnknownSiteError,
    UnsupportedModelError,
    warn,
)
from circuitvision.links import Link, marked
from circuitvision.model import dead, generation, heads, layout, loading, state, stream
from circuitvision.model import inputs as input_checks
from circuitvision.model.axes import positions_of
from circuitvision.model.cache import ActivationCache, Recipe, collected
from circuitvision.model.edits.base import Edit
from circuitvision.model.edits.binding import CompiledEdits, EditApplier, EditCompiler, as_groups
from circuitvision.model.flow import Flow
from circuitvision.model.gradients import Metric, with_gradients
from circuitvision.model.hooks import Hook, HookEngine, HookPoint, Recorder, Registration
from circuitvision.model.packing import ImageRun
from circuitvision.model.points import Point
from circuitvision.model.settings import entries
from circuitvision.model.sites import NamesFilter, SiteName, exact_names, matching
from circuitvision.model.spec import family_of
from circuitvision.model.text import TextTools
from circuitvision.model.tokens import TokenMap, token_maps
from circuitvision.model.tower import Tower
from circuitvision.model.tree import ModuleTree, base_of
from circuitvision.model.weights import check_gradients, main_device, main_dtype

if TYPE_CHECKING:
    from circuitvision.model.prepared import PreparedRun
    from circuitvision.model.sweeps.result import SweepResult

HookList = Sequence[tuple[Any, Hook]]


class _Stop(Exception):
    """Ends a forward pass at a layer; carries the residual there."""

    def __init__(self, value: Tensor) -> None:
        super().__init__("stopped")
        self.value = value


class HookedModel(TextTools):
    """A wrapped model: ``model(inputs)``, ``run_with_cache``, ``run_with_hooks``, ``hooks``, ``generate``, towers, sites and tokens.

    ``copy.deepcopy`` copies the module too; hooks of :meth:`add_hook` act in the copy, those of ``with`` blocks do not.
    Raises UnsupportedModelError for a class no family describes, a compiled module, DataParallel, and several image towers behind one projector.
    """

    def __init__(self, module: nn.Module, processor: Any = None) -> None:
        loading.refuse_no_module(module)
        state.refuse_wrappers(module)
        self.module: Any = module
        self.processor = processor
        self._base: Any = base_of(module)
        self.family = family_of(self._base)
        if not hasattr(self._base, "config"):
            raise UnsupportedModelError(
                f"{type(self._base).__name__} has no config, which says how many heads it has, how large pictures and patches are: give it one, such "
                "as self.config = transformers.ViTConfig(…)."
            )
        self.config: Any = self._base.config
        self.inner: nn.Module = getattr(self._base, "model", self._base)
        self.towers: dict[str, Tower] = {}
        for spec in self.family.towers:
            self.towers[spec.name] = Tower(self._base, self.config, self.family, spec, self.towers)
        layout.refuse_unread(self.family, self.towers)
        self.engine = HookEngine(module, *self._points(), self.family.flow)
        for tower in self.towers.values():
            tower.hooks_disabled = self.engine.suspension
        self._own_towers()
        self._persistent: list[Registration] = []
        self._matches: dict[Any, list[str]] = {}
        self._passes_recorded = False
        self._recorded_inputs: list[dict[str, Any]] | None = None
        self._edited_sites: frozenset[str] = frozenset()
        self._checked_inputs = input_checks.Checked()
        self._state = state.ModuleState(module)
        self._seen_streams: set[frozenset[str]] = set()
        self._watch_stream = True

    def _before_run(self) -> None:
        self._follow()
        self._state.check(hooked=True)

    def _row_lengths(self, inputs: Mapping[str, Any]) -> dict[str, Sequence[int]]:
        return self.family.packing.sequences(ImageRun(self, inputs))

    def _points(self) -> tuple[list[Point], dict[str, nn.Module]]:
        points = layout.points_of(self._base, self.family, self.towers)
        first_blocks = {name: tower.blocks[0].module for name, tower in self.towers.items()}
        self._tree = ModuleTree(self._base, [*(point.module for point in points), *first_blocks.values()])
        return points, first_blocks

    def _follow(self) -> None:
        """Find towers and sites again if a module that carries one was replaced since: an adapter was added, or taken out."""
        if self._tree.intact():
            return
        for tower in self.towers.values():
            tower.find()
        self.engine.renew(*self._points())
        self._state.renew()
        self._matches.clear()

    def _own_towers(self) -> None:
        self.engine.before_run = weakref.WeakMethod(self._before_run)
        if self.family.packing.in_sequence:
            self.engine.sequences.lengths_of = weakref.WeakMethod(self._row_lengths)
            images = [name for name, tower in self.towers.items() if tower.stack.image]
            connectors = [one.name for one in self.flow.modules if set(one.sources) & set(images)]
            self.engine.sequences.stages = frozenset((*images, *connectors))
        self._first_parameter = _first_parameter(self.module)
        for tower in self.towers.values():
            tower.owner = weakref.ref(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy's towers belong to the copy.
        self.__dict__.update(state)
        self._own_towers()

    def __getstate__(self) -> dict[str, Any]:
        if self.engine.stack:
            raise HookError(
                "Hooks are in place, and they cannot be pickled: leave their with block, or call reset_hooks()."
            )
        return self.__dict__

    def __deepcopy__(self, memo: dict[int, Any]) -> HookedModel:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        with self.engine.detached():
            twin.__setstate__({name: copy.deepcopy(value, memo) for name, value in self._to_copy().items()})
        for registration in self._persistent:
            twin._put(Registration(registration.forward, registration.backward, exact=registration.exact))
        return twin

    def _to_copy(self) -> dict[str, Any]:
        return {**self.__dict__, "_persistent": [], "_recorded_inputs": None, "_passes_recorded": False}

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

    # -- what is there -----------------------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Tower:
        towers = self.__dict__.get("towers", {})
        if name in towers:
            self._follow()
            return towers[name]
        raise UnknownAttributeError(
            f"HookedModel has no attribute {name!r}; towers of this model: {', '.join(towers)}."
        )

    def sites(self, glob: NamesFilter = "**") -> list[str]:
        """Names of all sites that a name, glob, list or predicate selects, in forward order; UnknownSiteError if there is none.

        ``*`` stays inside one dotted part, ``**`` crosses dots.
        """
        return list(self._match(glob))

    def _match(self, names_filter: NamesFilter) -> list[str]:
        if isinstance(names_filter, (str, type(None))):
            if names_filter not in self._matches:
                self._matches[names_filter] = matching(names_filter, self.engine.points)
            return self._matches[names_filter]
        return matching(names_filter, self.engine.points)

    def is_dead(self, site: str, inputs: Mapping[str, Any] | None = None) -> bool:
        """Whether nothing written at this site can reach the output of a run with ``inputs``.

        Without them, of a run that leaves its settings (``vision_feature_layer``) to the configuration.
        """
        name = SiteName.parse(self._match(site)[0])
        return name.tower in self.towers and dead.is_dead(self.towers[name.tower], site, inputs)

    def dead_positions(self, site: str, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which positions of a site cannot reach the output in this run: bool ``[row pos]`` (queries, for patterns); None if all can."""
        name = SiteName.parse(self._match(site)[0])
        if name.tower not in self.towers:
            return None
        inputs = input_checks.as_mapping(self, inputs)
        tokens = self.tokens(inputs)[name.tower]
        return dead.dead_positions(self.towers[name.tower], site, tokens, inputs)

    def tokens(self, inputs: Mapping[str, Any]) -> dict[str, TokenMap]:
        """What every position of every tower is in this run: kind, image, patch row and column, pixel box, text piece."""
        return token_maps(self, input_checks.as_mapping(self, inputs))

    def positions(self, site: str, inputs: Mapping[str, Any]) -> list[int]:
        """Which positions of its tower a site holds in this run, in the order of the site's own axis; none where it is pooled.

        A projector holds those that its vision tower hands on, an image tower's ``hook_embed`` the patches, an output head what it reads.
        """
        return positions_of(self, self._match(site)[0], inputs)

    @property
    def device(self) -> torch.device:
        """Where the model reads its inputs: the device of its first parameter that is in memory, or the one its parameters are fetched to."""
        parameters, name = self._first_parameter
        first = parameters.get(name)
        return main_device(self.module) if first is None or first.is_meta else first.device

    @property
    def dtype(self) -> torch.dtype:
        """The precision the model computes in: the dtype of its first parameter that is not quantised."""
        return main_dtype(self.module)

    def to(self, *args: Any, **kwargs: Any) -> HookedModel:
        """Move or convert the wrapped module, as ``nn.Module.to``; returns the wrapper. Raises InputError for a GPU that is not there."""
        for device in (*args, kwargs.get("device")):
            loading.check_device(device)
        self.module.to(*args, **kwargs)
        return self

    def eval(self) -> HookedModel:
        """Put the wrapped module into eval mode; returns the wrapper."""
        self.module.eval()
        return self

    def train(self, mode: bool = True) -> HookedModel:
        """Put the wrapped module into train mode; returns the wrapper."""
        self.module.train(mode)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters."""
        return self.module.parameters()

    def unwrap(self) -> nn.Module:
        """The module as it was, without any handle of ours; transformers' own capture hooks stay."""
        self.reset_hooks()
        for registration in list(self.engine.stack):
            self.engine.pop(registration)
        return self.module

    def __provenance__(self) -> dict[str, Any]:
        return {"model": provenance.model_id(self.module), "weights_sha256": provenance.hash_weights(self.module)}

    def __repr__(self) -> str:
        towers = "\n  ".join(repr(tower) for tower in self.towers.values())
        return f"HookedModel({type(self.module).__name__}, {self.dtype}, {self.device})\n  {towers}\n  {len(self.engine.points)} sites"

    def _repr_html_(self) -> str:
        header = "".join(
            f"<th>{h}</th>"
            for h in ("tower", "layers", "heads (kv)", "d_model", "d_head", "d_mlp", "grid", "attention")
        )
        rows = ""
        for name, tower in self.towers.items():
            c = tower.cfg
            grid = f"{c.grid[0]}×{c.grid[1]} + {c.n_prefix}" if c.grid else "–"
            cells = (name, c.n_layers, f"{c.n_heads} ({c.n_kv_heads})", c.d_model, c.d_head, c.d_mlp, grid, c.attention)
            rows += "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"
        title = f"<b>HookedModel</b> {type(self.module).__name__}, {len(self.engine.points)} sites"
        return f"{title}<table><tr>{header}</tr>{rows}</table>"

    # -- running -----------------------------------------------------------------------------------------------------------------------------

    def __call__(self, inputs: Any, **kwargs: Any) -> Tensor:
        """One forward pass; returns the family's natural output tensor (logits, logits per image, velocity, last hidden state).

        Raises InputError if the inputs cannot be what the model reads.
        """
        return self._forward(self._checked(inputs, kwargs), {})

    def _checked(
        self,
        given: Any,
        kwargs: Mapping[str, Any] | None = None,
        read: Callable[[dict[str, Any]], dict[str, Any]] = dict,
    ) -> dict[str, Any]:
        """The inputs of a run, keywords of its call among them: what is asked about the run is asked of these."""
        self.engine.check_thread()
        self._follow()
        mapping = input_checks.with_keywords(input_checks.as_mapping(self, given), kwargs or {})
        if not self._checked_inputs.holds(self, mapping):
            input_checks.check(self, read(mapping))
            self._checked_inputs.keep(self, mapping)
            self._state.renew()
            self._watch_stream = frozenset(mapping) not in self._seen_streams
        return mapping

    def _ran(self, mapping: Mapping[str, Any]) -> None:
        """Remember the inputs of a run, and the sites that may be edited in it, for the cache that records it."""
        if self._recorded_inputs is not None:
            self._recorded_inputs.append(dict(mapping))
        self._edited_sites |= self._hooked_sites()

    def _hooked_sites(self) -> frozenset[str]:
        return frozenset().union(*(registration.forward for registration in self.engine.stack))

    @contextlib.contextmanager
    def _running(self, mapping: Mapping[str, Any]) -> Iterator[None]:
        """One run of the module, in whatever way it is called: its state is looked at, its passes are counted."""
        if self.module is not self.engine.model:
            state.refuse_wrappers(self.module)
        self._state.check(hooked=bool(self.engine.stack))
        self._ran(mapping)
        watch = stream.watched(self.towers) if self._watch_stream else contextlib.nullcontext()
        with self.engine.run(self._bypassed(mapping)), watch:
            yield
        if self._watch_stream:
            self._watch_stream = False
            self._seen_streams.add(frozenset(mapping))

    def _bypassed(self, mapping: Mapping[str, Any]) -> frozenset[str]:
        return input_checks.bypassed_sites(self, mapping)

    def _forward(self, mapping: Mapping[str, Any], kwargs: Mapping[str, Any]) -> Tensor:
        if kwargs:
            input_checks.check_keywords(self, kwargs)
        if entries(self.config).get("return_dict") is False:
            raise InputError("model.config.return_dict is False, which takes the names off the output: set it to True.")
        with self._running(mapping):
            output = self.module(**mapping, **kwargs)
        name = self.family.output
        found = output.get(name) if isinstance(output, Mapping) else getattr(output, name, None)
        if not isinstance(found, Tensor):
            held = ", ".join(output) if isinstance(output, Mapping) else type(output).__name__
            raise UnsupportedModelError(
                f"The forward of {type(self.module).__name__} returns no tensor {name!r}, which the table of the {self.family.name} family calls "
                f"its output, but {held}."
            )
        return found if self.link == "softmax" else marked(found, self.link)

    @property
    def flow(self) -> Flow:
        """How the towers feed each other."""
        return self.family.flow

    @property
    def is_dual(self) -> bool:
        """Whether the model compares what its towers make of images and of texts, which do not feed each other (CLIP, SigLIP)."""
        return self.flow.is_dual

    @property
    def link(self) -> Link:
        """What turns the output into probabilities: ``"softmax"``, ``"sigmoid"`` (every column is a yes or no of its own) or ``"none"``."""
        return heads.link(self.towers[self.flow.answer])

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
        self._passes_recorded, self._recorded_inputs, self._edited_sites = False, [], frozenset()
        names = self._match(names_filter)
        try:
            with self.engine.registered(Registration(recorder=recorder, recorded=frozenset(names))):
                yield cache
        finally:
            runs, self._recorded_inputs = self._recorded_inputs or [], None
        ordered = {name: recorder.values[name] for name in names if name in recorder.values}
        cache._values.update(collected(ordered, multi_pass=self._passes_recorded))
        cache.edited = self._edited_sites
        if runs and names and not ordered:
            _warn_empty(names_filter)
        if len(runs) == 1:
            cache.inputs = runs[0]

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
        with self._edited(binder, bound):
            return self._forward(mapping if bound.inputs is None else bound.inputs, {})

    @contextlib.contextmanager
    def _edited(self, binder: EditCompiler, bound: CompiledEdits) -> Iterator[None]:
        forward = EditApplier(binder, [bound]).hooks()
        if not forward:
            yield
            return
        with self.engine.registered(Registration(forward=forward, exact=frozenset(bound.sites))):
            yield

    @contextlib.contextmanager
    def prepared(self, inputs: Any, start: Any) -> Iterator[PreparedRun]:
        """Runs under edits that compute only what lies behind a place, exact, with gradients: :class:`circuitvision.model.prepared.PreparedRun`.

        ``with model.prepared(inputs, start=("language", 20)) as run: logits = run([edit])``. The unedited run is recorded once; each call costs what
        lies behind ``start``, the earliest place where an edit may act: a site or component, a layer ``(tower, number)`` (its input; a number alone
        counts in the last tower), or a list of these, of which a call takes the latest that serves. ``run(edits)`` is ``[example …]`` as
        ``model.run``, ``run([edits, …])`` is ``[group example …]``.

        Raises InputError or UnknownSiteError for a start that is not there; InputError in training mode with dropout, and from a call whose edits act
        before ``start``.
        """
        from circuitvision.model.prepared import PreparedRun

        run = PreparedRun(self, self._checked(inputs), start)
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

        ``save_to`` is a folder in which every finished batch is kept: whatever ends the run, the same call with ``resume=True`` runs the rest only,
        to the same bits (see :mod:`circuitvision.model.sweeps.store`).

        An example in which all masks and selections of a group are empty was not edited: it is NaN, with a warning, so that means leave it out
        (``empty="clean"``: its unedited metric). Raises InputError or UnknownSiteError, naming the edit, before anything runs; InputError in
        training mode with dropout, and for a folder that holds another study.
        """
        from circuitvision.model.sweeps.study import Options, Study

        options = Options(batch_size, partial, empty, progress, save_to, resume)
        if hasattr(inputs, "batches"):
            from circuitvision.model.sweeps.stream import DataStudy

            return DataStudy(self, inputs, edits_or_groups, metric, axes, options, example_batch, align).result()
        return Study(self, self._checked(inputs), edits_or_groups, metric, axes, options).result()

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
        self._passes_recorded = True
        with self._edited(binder, bound), self._running(mapping):
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
        self._passes_recorded = True
        with self._edited(binder, bound), self._running(mapping):
            return module.sample_actions(**mapping, num_steps=num_steps, **kwargs)


def _warn_empty(names_filter: NamesFilter) -> None:
    warn(f"The cache is empty: no site of {names_filter!r} ran with these inputs (a vision tower needs pixel_values).")


def _first_parameter(module: nn.Module) -> tuple[dict[str, Any], str]:
    """Where a module keeps its first parameter: asking for it is cheaper than looking for it again in every run."""
    return next(
        (
            (part._parameters, name)
            for part in module.modules()
            for name, value in part._parameters.items()
            if value is not None
        ),
        ({}, ""),
    )


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


__all__ = ["HookPoint", "HookedModel", "UnknownSiteError"]


def _instead(model: HookedModel, method: str) -> str:
    """What to call in place of a method that a model does not have."""
    return f"; model.{method}(inputs) is its own" if hasattr(model.module, method) else ""

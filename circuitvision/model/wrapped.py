"""A module, wrapped: its towers, sites and tokens, the engine that hooks it, and one forward pass of it.

The module is held untouched: same class, same state_dict, same outputs bit for bit, usable with generate, save_pretrained, adapters and device maps.
What is found of it (towers, sites) is found again when a module that carries a site was replaced since. The module's state is looked at in every run
(``state.py``).

:class:`circuitvision.HookedModel` adds what is done with it: caches, hooks, edits, sweeps.

Not covered: two wrappers hooking the attention of one module at the same time.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from circuitvision import provenance
from circuitvision.errors import HookError, InputError, UnknownAttributeError, UnsupportedModelError
from circuitvision.links import Link, marked
from circuitvision.model import dead, layout, loading, state, stream
from circuitvision.model import inputs as input_checks
from circuitvision.model.axes import positions_of
from circuitvision.model.cache import collected
from circuitvision.model.flow import Flow
from circuitvision.model.hooks import HookEngine
from circuitvision.model.packing import ImageRun
from circuitvision.model.points import Point
from circuitvision.model.registrations import Recorder, Registration
from circuitvision.model.settings import entries
from circuitvision.model.sites import NamesFilter, SiteName, matching
from circuitvision.model.spec import family_of
from circuitvision.model.text import TextTools
from circuitvision.model.tokens import TokenMap, token_maps
from circuitvision.model.tower import Tower
from circuitvision.model.tree import ModuleTree, base_of
from circuitvision.model.weights import main_device, main_dtype

Own = TypeVar("Own", bound="Wrapped")


@dataclass
class RunLog:
    """What is remembered of the runs of a recording."""

    inputs: list[dict[str, Any]] = field(default_factory=list)
    several_passes: bool = False
    edited: frozenset[str] = frozenset()
    """Sites that had hooks."""


class Wrapped(TextTools):
    """A wrapped module: ``model(inputs)``, towers, sites and tokens.

    ``copy.deepcopy`` copies the module too, without hooks.
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
        self._matches: dict[Any, list[str]] = {}
        self._log: RunLog | None = None
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

    def __deepcopy__(self: Own, memo: dict[int, Any]) -> Own:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        with self.engine.detached():
            twin.__setstate__({name: copy.deepcopy(value, memo) for name, value in self._to_copy().items()})
        return twin

    def _to_copy(self) -> dict[str, Any]:
        return {**self.__dict__, "_log": None}

    # -- what is there -----------------------------------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Tower:
        towers = self.__dict__.get("towers", {})
        if name in towers:
            self._follow()
            return towers[name]
        raise UnknownAttributeError(
            f"{type(self).__name__} has no attribute {name!r}; towers of this model: {', '.join(towers)}."
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
        """What every position of every tower is in this run: kind, image, patch row and column, pixel box, text piece.

        A connector that merges patches has positions of its own, under its name (``projector``).
        """
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

    def to(self: Own, *args: Any, **kwargs: Any) -> Own:
        """Move or convert the wrapped module, as ``nn.Module.to``; returns the wrapper. Raises InputError for a GPU that is not there."""
        for device in (*args, kwargs.get("device")):
            loading.check_device(device)
        self.module.to(*args, **kwargs)
        return self

    def eval(self: Own) -> Own:
        """Put the wrapped module into eval mode; returns the wrapper."""
        self.module.eval()
        return self

    def train(self: Own, mode: bool = True) -> Own:
        """Put the wrapped module into train mode; returns the wrapper."""
        self.module.train(mode)
        return self

    def parameters(self) -> Iterator[nn.Parameter]:
        """The module's parameters."""
        return self.module.parameters()

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
        return self.towers[self.flow.answer].output_head.link

    def __provenance__(self) -> dict[str, Any]:
        return {"model": provenance.model_id(self.module), "weights_sha256": provenance.hash_weights(self.module)}

    def __repr__(self) -> str:
        towers = "\n  ".join(repr(tower) for tower in self.towers.values())
        return f"{type(self).__name__}({type(self.module).__name__}, {self.dtype}, {self.device})\n  {towers}\n  {len(self.engine.points)} sites"

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
        title = f"<b>{type(self).__name__}</b> {type(self.module).__name__}, {len(self.engine.points)} sites"
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

    def _hooked_sites(self) -> frozenset[str]:
        return frozenset().union(*(registration.forward for registration in self.engine.stack))

    @contextlib.contextmanager
    def _running(self, mapping: Mapping[str, Any], several_passes: bool = False) -> Iterator[None]:
        """One run of the module, in whatever way it is called: its state is looked at, its passes are counted."""
        if self.module is not self.engine.model:
            state.refuse_wrappers(self.module)
        self._state.check(hooked=bool(self.engine.stack))
        if self._log is not None:
            self._log.inputs.append(dict(mapping))
            self._log.several_passes |= several_passes
            self._log.edited |= self._hooked_sites()
        watch = stream.watched(self.towers) if self._watch_stream else contextlib.nullcontext()
        with self.engine.run(input_checks.bypassed_sites(self, mapping)), watch:
            yield
        if self._watch_stream:
            self._watch_stream = False
            self._seen_streams.add(frozenset(mapping))

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

    def _values_at(self, inputs: Any, sites: Sequence[str]) -> tuple[Tensor, dict[str, Any]]:
        """The output of one forward pass, and the detached values of sites in it. Raises HookError if a site did not fire."""
        if not sites:
            return self(inputs), {}
        recorder, names = Recorder(), frozenset(sites)
        with self.engine.registered(Registration(recorder=recorder, recorded=names, exact=names)):
            output = self(inputs)
        return output, collected({name: recorder.values[name] for name in sites}, multi_pass=False)


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

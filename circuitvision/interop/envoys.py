"""The envoys of the nnsight view: one class for every module, with the sites of its module as attributes; and the guard on ``remote=``.

A *station* is where one site is served: nnsight hands it what enters or leaves the module, the site's own point takes
the value out of it and puts an edited one back. Points that compute their value (a norm's scale, one head's share of
the output) also need what entered the module, and the stations of one module share that call, so that an edited scale
is seen by the normalised value, as it is with our hooks.

This module imports nnsight; nothing imports it before a view is asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from nnsight import Envoy, NNsight
from nnsight.intervention.eproperty import eproperty
from nnsight.intervention.interleaver import Mediator
from torch import Tensor, nn

from circuitvision.errors import HookError, InputError, UnknownSiteError
from circuitvision.interop import nnsight_view
from circuitvision.model.memory import match_memory_layout
from circuitvision.model.points import Call, Point, SavedInput
from circuitvision.model.sites import NamesFilter, matching

if TYPE_CHECKING:
    from circuitvision.model.wrapped import Wrapped

OWN_STATE = ("_sites", "_stations")
"""What our envoys carry beyond nnsight's own state; it never travels."""


class Sites:
    """What the envoys of one view share: the stations by site name, and the module calls in progress."""

    def __init__(self, model: Wrapped, portable: bool) -> None:
        self.model = model
        self.portable = portable
        self.stations: dict[str, SiteIO] = {}
        self.calls: dict[str, tuple[int, Call]] = {}

    def enter(self, module: nn.Module, path: str, visit: int) -> Call:
        """The call of a module at one visit of a trace; asks nnsight for what enters it, unless some site of the trace already did."""
        known = self.calls.get(path)
        if known is None or known[0] != visit:
            args, kwargs = Mediator.value(f"{path}.input")
            self.calls[path] = known = visit, Call(module, args, kwargs)
        return known[1]

    def forget(self) -> None:
        """Drop what a trace left behind, so that no activation outlives it."""
        self.calls.clear()
        for station in self.stations.values():
            station.handed = None
            for stash in station.saved_inputs:
                stash.kept.clear()


class SiteIO:
    """One site in a trace: an nnsight host whose location is the input or output of the point's module.

    ``around`` are stations that compute their value from what enters a module around this one. That comes first in the pass, so it is asked for
    before this site; otherwise no trace could read both.
    """

    def __init__(self, sites: Sites, point: Point, paths: dict[int, str], envoy: Envoy) -> None:
        self.sites, self.point, self.paths = sites, point, paths
        self.path, self.interleaver = envoy.path, envoy.interleaver
        self.saved_inputs: tuple[SavedInput, ...] = getattr(point, "companions", ())
        self.around: list[SiteIO] = []
        self.handed: tuple[Tensor, int | None, Tensor] | None = None
        self.side = "input" if point.phase == "pre" else "output"
        # One descriptor per station: nnsight answers a second read of one descriptor at one location with the view of the first.
        self.served: Any = eproperty(key=self.side)(SiteIO._hand_out)
        self.served.transform(SiteIO._take_back)
        self.served.postprocess(SiteIO._assigned)

    def read(self) -> Tensor:
        """The site's value, as a tensor of its own; what is changed in it goes back when the block moves on."""
        self._prepare()
        return self.served.__get__(self, SiteIO)

    def write(self, value: Any) -> None:
        """Replace the site's value."""
        self._prepare()
        self.served.__set__(self, value)

    def _prepare(self) -> None:
        """Ask for everything that comes before this site in the pass and that it, or a site around it, is computed from."""
        for station in self.around:
            station._see_inputs()
        self._see_inputs()

    def _see_inputs(self) -> None:
        if not self.point.derived:
            return
        location = f"{self.path}.output"
        visit = Mediator.current(location).wanted(location)
        for stash in self.saved_inputs:
            call = self.sites.enter(stash.module, self.paths[id(stash.module)], visit)
            stash.apply(call, lambda value: (value, False))
        self.sites.enter(self.point.module, self.path, visit)

    def _call(self, raw: Any) -> Call:
        if self.point.phase == "pre":
            return Call(self.point.module, *raw)
        call = self.sites.calls[self.path][1] if self.point.derived else Call(self.point.module, (), {})
        call.output = raw
        return call

    def _value(self, call: Call) -> Tensor:
        seen: list[Tensor] = []

        def look(value: Tensor) -> tuple[Tensor, bool]:
            seen.append(value)
            return value, False

        self.point.apply(call, look)
        return seen[0]

    def _written(self, call: Call, value: Tensor) -> Any:
        self.point.apply(
            call, lambda before: (match_memory_layout(value, before) if isinstance(value, Tensor) else value, True)
        )
        return (call.args, call.kwargs) if self.point.phase == "pre" else call.output

    def _hand_out(self, raw: Any) -> Tensor:
        value = self._value(self._call(raw))
        view = value.clone()
        self.handed = view, None if view.is_inference() else view._version, value
        return view

    def _take_back(self, view: Tensor, raw: Any) -> Any:
        """The module's own layout with the view in it; the very object nnsight served where nothing was changed and no gradient is wanted."""
        assert self.handed is not None
        _, version, value = self.handed
        touched = view._version != version if version is not None else not torch.equal(view, value)
        if not touched and not (torch.is_grad_enabled() and view.requires_grad):
            return raw
        return self._written(self._call(raw), view)

    def _assigned(self, value: Any) -> Any:
        call = self._call(Mediator.value(f"{self.path}.{self.side}"))
        _check(self.point.name, value, self._value(call))
        return self._written(call, value)


def _check(name: str, value: Any, expected: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise HookError(f"{name} was assigned {type(value).__name__}; assign a tensor.")
    for what in ("shape", "dtype", "device"):
        got, wanted = getattr(value, what), getattr(expected, what)
        if got != wanted:
            raise HookError(f"{name} was assigned a tensor of {what} {got}; the site has {what} {wanted}.")


class SiteEnvoy(Envoy):
    """An envoy with the sites of its module as attributes, that lets no ``remote=`` pass in silence."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("hook_") and "_sites" in self.__dict__:
            return self._station(name).read()
        return Envoy.__getattr__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("hook_"):
            self._station(name).write(value)
        else:
            Envoy.__setattr__(self, name, value)

    def __dir__(self) -> list[str]:
        return sorted({*Envoy.__dir__(self), *self.__dict__.get("_stations", {})})

    def _station(self, name: str) -> SiteIO:
        here: dict[str, SiteIO] = self.__dict__.get("_stations", {})
        if name in here:
            return here[name]
        sites = self._sites
        if sites.portable:
            raise UnknownSiteError(
                f"A portable view has no attribute {name}: a server without circuitvision could not serve it. Use "
                "read(nn, place) and write(nn, place, value) of circuitvision.interop.portable, with a place of "
                "cv.interop.nnsight_places(model)."
            )
        prefixes = [prefix for prefix, module in nnsight_view.hosts(sites.model).items() if module is self._module]
        for full in (f"{prefix}.{name}" for prefix in prefixes):
            if full in sites.model.engine.points:
                raise UnknownSiteError(f"{full} is not offered in a trace: {nnsight_view.reason(sites.model, full)}.")
        known = f"Here: {', '.join(here)}." if here else "This module carries no site; nn.sites() lists all."
        raise UnknownSiteError(f"{self.path} has no site {name}. {known}")

    def __call__(self, *args: Any, hook: bool = False, **kwargs: Any) -> Any:
        _refuse_swallowed(kwargs)
        return Envoy.__call__(self, *args, hook=hook, **kwargs)

    def trace(self, *args: Any, remote: bool | str = False, **kwargs: Any) -> Any:
        """nnsight's ``trace``, run here; raises InputError for a ``remote`` that could not reach this module."""
        return Envoy.trace(self, *args, **self._backend(remote, kwargs))

    def session(self, remote: bool | str = False, **kwargs: Any) -> Any:
        """nnsight's ``session``, run here; raises InputError for a ``remote`` that could not reach this module."""
        return Envoy.session(self, **self._backend(remote, kwargs))

    def _backend(self, remote: bool | str, kwargs: dict[str, Any]) -> dict[str, Any]:
        if not remote:
            return kwargs
        if remote != "local":
            raise InputError(
                f"remote={remote!r} asks for a server, and a module in memory is on none: this trace would run here. Leave "
                "remote out; or open the checkpoint by its Hub name, "
                "nnsight.VisionLanguageModel(hub_name, rename=cv.interop.nnsight_names(model)), and trace that remotely "
                "with read and write of circuitvision.interop.portable."
            )
        if not self._sites.portable:
            raise InputError(
                'remote="local" rehearses a server without circuitvision, which cannot serve hook_… attributes. '
                "Build the view with cv.interop.nnsight(model, portable=True)."
            )
        from nnsight.intervention.backends.local import LocalSimulationBackend

        verbose = bool(kwargs.pop("verbose", False))
        return {**kwargs, "backend": LocalSimulationBackend(self.root, verbose=verbose)}

    def _batch(self, invokes: list[tuple[Any, ...]], fn: Any) -> tuple[Any, ...]:
        for _, kwargs in invokes:
            _refuse_swallowed(kwargs)
        return Envoy._batch(self, invokes, fn)

    def interleave(self, fn: Any, *args: Any, **kwargs: Any) -> Any:
        """Run ``fn`` under the workers, as nnsight does; afterwards no activation is kept."""
        _refuse_swallowed(kwargs)
        try:
            return Envoy.interleave(self, fn, *args, **kwargs)
        finally:
            self._sites.forget()

    def _remoteable_persistent_objects(self) -> dict[str, Any]:
        modules = {f"Module:{envoy.path}": envoy._module for envoy in self.modules()}
        return {"Interleaver": self.interleaver, **modules}

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # What travels is nnsight's own class and state: a server has no circuitvision to find ours in.
        plain = NNsight if isinstance(self, NNsight) else Envoy
        state = {key: value for key, value in Envoy.__getstate__(self).items() if key not in OWN_STATE}
        return object.__new__, (plain,), {**state, "_envoys": None}


def _refuse_swallowed(kwargs: dict[str, Any]) -> None:
    if kwargs.get("remote"):
        raise InputError(
            f"remote={kwargs['remote']!r} would go to the model, which swallows it, and the call would run here. "
            "Leave it out, or give it to nn.trace(…, remote=…)."
        )


class HookedNNsight(SiteEnvoy, NNsight):
    """The root of a view: nnsight's NNsight with towers, projector and sites under our names."""

    def __getattr__(self, name: str) -> Any:
        # A headless model is its own tower, and no alias can name the root.
        sites = self.__dict__.get("_sites")
        if sites is not None and name in sites.model.towers and sites.model.towers[name].root is self._module:
            return self
        return SiteEnvoy.__getattr__(self, name)

    def sites(self, names_filter: NamesFilter = "**", *, portable: bool = False) -> list[str]:
        """Sites that a trace can read and write, in forward order; ``portable``: only those a server without circuitvision could serve.

        Raises UnknownSiteError if the filter selects none.
        """
        model = self._sites.model
        if portable or self._sites.portable:
            return list(nnsight_view.nnsight_places(model, names_filter))
        return matching(names_filter, nnsight_view.offered(model))

    def reason(self, site: str) -> str | None:
        """Why a site of the model is not offered here; None if it is. Raises UnknownSiteError for a name the model does not have."""
        return nnsight_view.reason(self._sites.model, site)


def build(model: Wrapped, names: dict[str, list[str]], portable: bool) -> HookedNNsight:
    """The view of a model: nnsight's tree over its module, and the stations of every offered site on their envoys."""
    root = HookedNNsight(model.module, rename=names, envoys=SiteEnvoy)
    sites = Sites(model, portable)
    envoys = {id(envoy._module): envoy for envoy in root.modules()}
    for envoy in envoys.values():
        object.__setattr__(envoy, "_sites", sites)
        object.__setattr__(envoy, "_stations", {})
    if portable:
        return root
    hosts = nnsight_view.hosts(model)
    paths = {module: envoy.path for module, envoy in envoys.items()}
    for name, point in nnsight_view.offered(model).items():
        prefix, _, last = name.rpartition(".")
        station = SiteIO(sites, point, paths, envoys[id(point.module)])
        sites.stations[name] = station
        envoys[id(hosts[prefix])]._stations[last] = station
    for station in sites.stations.values():
        if station.point.derived and any(True for _ in station.point.module.children()):
            for inner in sites.stations.values():
                if inner.path.startswith(f"{station.path}."):
                    inner.around.append(station)
    return root

"""Values that edits take from other runs: means and resampled values, each computed once for all edits that need it.

Clean activations are read in one run of the model's own inputs, means over a data set in one run of each of its batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from circuitvision.data.sides import Side
from circuitvision.errors import InputError
from circuitvision.model.averages import Draw, Layout, Seen, Tally, check_aligned, check_kinds, check_one_thing, draw
from circuitvision.model.axes import axis_of, tower_of
from circuitvision.model.edits.base import Edit, naming
from circuitvision.model.edits.noise import AddNoise, Noise
from circuitvision.model.edits.values import TensorRefMapping
from circuitvision.model.edits.windows import RunWindows
from circuitvision.model.edits.writes import THERE, Ablate
from circuitvision.model.positions import PositionWindow
from circuitvision.model.sites import SiteName

if TYPE_CHECKING:
    from circuitvision.model.tokens import TokenMap

_ONE_ROW = "the mean over a single row is its own value. Pass dataset=…, more examples, or average='all'"


class GivenValues:
    """What the edits of one run are given, by edit and site."""

    def __init__(self, windows: RunWindows) -> None:
        self.model, self.inputs, self.windows = windows.model, windows.inputs, windows
        self.given: dict[Any, Any] = {}
        self._drawn: dict[Any, Tensor] = {}
        self._draws: dict[Any, Draw] = {}
        self._layouts: dict[Any, Layout] = {}
        self._aligned: set[Any] = set()
        """Means that were found to exist, so that a thousand edits of one tower ask once."""
        self._noise: Noise | None = None

    def prepare(self, edits: Iterable[Edit]) -> None:
        """Compute what the means and draws among some edits need; InputError, naming the edit, where there is none."""
        edits = list(edits)
        self._give_noise([edit for edit in edits if isinstance(edit, AddNoise) and not edit.does_nothing])
        wanted = [edit for edit in edits if isinstance(edit, Ablate) and edit.method in ("mean", "resample")]
        if not wanted:
            return
        self._give_data_draws([edit for edit in wanted if edit.method == "resample" and edit.dataset is not None])
        resampled = [edit for edit in wanted if edit.method == "resample" and edit.dataset is None]
        draws = {(edit, site): self._draw(edit, site) for edit in resampled for site in edit.sites(self.model)}
        by_data: dict[Any, list[Ablate]] = {}
        for edit in wanted:
            if edit.method == "mean":
                by_data.setdefault(edit.dataset, []).append(edit)
        streamed = {data: by_data.pop(data) for data in list(by_data) if isinstance(data, Side)}
        for side, group in streamed.items():
            self._give_data_means(side, group)
        parts = {data: self._parts(data) for data in by_data}
        for data, group in by_data.items():
            for edit in group:
                with naming(edit):
                    self._check_means(edit, parts[data])
        sites = sorted({site for _, site in draws} | {s for e in by_data.get(None, ()) for s in e.sites(self.model)})
        clean = self._clean(self.inputs, sites)
        for (edit, site), drawn in draws.items():
            with naming(edit):
                self._give_draw(edit, site, clean[site], drawn)
        for data, group in by_data.items():
            self._give_means(group, parts[data], clean if data is None else None)

    def _give_noise(self, edits: Sequence[AddNoise]) -> None:
        """Noise of every example, drawn once for all edits of a site and seed."""
        for edit in dict.fromkeys(edits):
            self._noise = self._noise or Noise(self.model, self.inputs, self.windows.maps)
            for site in edit.sites(self.model):
                window = self.windows.of(site)
                assert window is not None
                layout = self._layout(window)
                self.given[edit, site] = self._noise.of(site, edit.seed, window.tower, layout.there)

    def _parts(self, data: tuple[TensorRefMapping, ...] | None) -> list[tuple[dict[str, Any], dict[str, TokenMap]]]:
        """The inputs that a mean goes over, and their token maps."""
        if data is None:
            return [(dict(self.inputs), self.windows.maps)]
        listed = [part.tensors() for part in data]
        return [(inputs, self.model.tokens(inputs)) for inputs in listed]

    def _covered(self, edit: Edit, window: PositionWindow) -> Any:
        """The entries of a site's own axis that an edit selects in the prompt, of every row."""
        covered = edit.positions.covers(window).expand(window.rows, -1)
        held = window.axis.held
        return (covered if held is None else covered[:, list(held)]).numpy()

    def _data_layouts(
        self, site: str, window: PositionWindow, parts: Sequence[tuple[dict[str, Any], dict[str, TokenMap]]]
    ) -> list[Layout]:
        """The layouts of a site in the inputs that a mean goes over."""
        name, own = SiteName.parse(site), window.tower
        tower = self.model.towers[tower_of(self.model, name)]
        return [
            Layout.of_tokens(maps[own], axis_of(tower, name, maps[own], inputs).held)
            for inputs, maps in parts
            if own in maps
        ]

    def _give_data_draws(self, edits: Sequence[Ablate]) -> None:
        """Values of other examples of a data set; edits of one seed take those of one example."""
        from circuitvision.model.data_draws import donors_of, take

        groups: dict[Any, list[Ablate]] = {}
        for edit in edits:
            groups.setdefault((edit.dataset, edit.seed, edit.positions.kind == "last"), []).append(edit)
        for (side, seed, last), group in groups.items():
            entries = [(edit, site, self.windows.of(site)) for edit in group for site in edit.sites(self.model)]
            needed: dict[str, Any] = {}
            for edit, _, window in entries:
                if window is not None and window.tokens is not None:
                    covered = edit.positions.covers(window).expand(window.rows, -1).numpy()
                    wanted = covered & window.tokens.present[:, : covered.shape[1]]
                    needed[window.tower] = needed.get(window.tower, False) | wanted
            with naming(group[0]):
                donors = donors_of(self.model, side, self.inputs, self.windows.maps, needed, seed, last)
            values = self._clean(donors.inputs, sorted({site for _, site, _ in entries}))
            for edit, site, window in entries:
                value = values[site]
                layout = Layout.of(self.model, donors.maps, site, value.shape, donors.inputs)
                if window is None or window.tokens is None or window.axis.absent or layout.kind is None:
                    self._give(edit, site, take(value, donors.rows[layout.tower]), None)
                    continue
                if window.axis.held is not None or layout.held is not None:
                    raise InputError(
                        f"{edit!r}: {site} holds some positions of its tower only; resample it within the run."
                    )
                found = donors.draw(window.tokens, needed[window.tower], last)
                self._give(edit, site, found.take(value), found.there)

    def _give_data_means(self, side: Side, group: Sequence[Ablate]) -> None:
        """The means over a data set, which is run in batches once; what does not line up is told before the batch that shows it runs."""
        from circuitvision.model.data_means import data_means

        wanted = {(site, edit.average): edit for edit in group for site in edit.sites(self.model)}

        def check(key: Any, seen: Seen) -> None:
            window = self.windows.of(key[0])
            if key[1] != "position" or window is None or window.tokens is None or window.axis.absent:
                return
            with naming(wanted[key]):
                covered, run = self._covered(wanted[key], window), self._layout(window)
                for column in np.flatnonzero((covered & run.there).any(0)).tolist():
                    position = column if run.held is None else int(run.held[column])
                    check_one_thing(position, seen.names.get(position, set()))

        found = data_means(self.model, side, list(wanted), self._clean, check)
        for edit in group:
            for site in edit.sites(self.model):
                tally, seen = found[site, edit.average]
                with naming(edit):
                    self._check_mean(edit, site, seen)
                    self._give(edit, site, *tally.source(self._own_layout(site, None)))

    def _check_means(self, edit: Ablate, parts: Sequence[tuple[dict[str, Any], dict[str, TokenMap]]]) -> None:
        """Raise InputError where a mean cannot be what was asked for, as far as the token maps tell."""
        for site in edit.sites(self.model):
            window = self.windows.of(site)
            if window is None or window.tokens is None or window.axis.absent:
                continue
            place = window.tower if window.axis.held is None else site
            key = (place, edit.dataset, edit.average, edit.positions, self.windows.grows(edit, site))
            if key not in self._aligned:
                self._check_mean(edit, site, self._data_layouts(site, window, parts))
                self._aligned.add(key)

    def _check_mean(self, edit: Ablate, site: str, data: Sequence[Layout] | Seen) -> None:
        window = self.windows.of(site)
        if window is None or window.tokens is None or window.axis.absent:
            return
        run = self._layout(window)
        if edit.average == "position":
            if edit.dataset is None and window.rows == 1:
                raise InputError(_ONE_ROW)
            wanted = edit.positions.ints if self.windows.grows(edit, site) else ()
            if any(position >= window.prompt for position in wanted):
                raise InputError("a mean per position covers the prompt: take average='all' at generated positions")
            check_aligned(run, data, self._covered(edit, window), of_run=edit.dataset is None)
        elif edit.average == "kind":
            check_kinds(run, data, self._covered(edit, window))

    def _draw(self, edit: Ablate, site: str) -> Draw | None:
        """Where a resampled site takes its values from; None where only its values can tell."""
        window = self.windows.of(site)
        if window is None or window.tokens is None or window.axis.absent:
            return None
        key = (site if window.axis.held is not None else window.tower, edit.positions, edit.seed)
        if key not in self._draws:
            with naming(edit):
                layout = self._layout(window)
                last = edit.positions.kind == "last"
                self._draws[key] = draw(layout, self._covered(edit, window), edit.seed, last)
        return self._draws[key]

    def _give_draw(self, edit: Ablate, site: str, value: Tensor, found: Draw | None) -> None:
        if found is None:
            layout = Layout.of(self.model, self.windows.maps, site, value.shape, self.inputs)
            found = draw(layout, np.ones_like(layout.there), edit.seed)
        else:
            value = self._as_held(site, value)
        key = (site, found.rows.tobytes(), None if found.positions is None else found.positions.tobytes())
        if key not in self._drawn:
            self._drawn[key] = found.take(value)
        self._give(edit, site, self._drawn[key], found.there)

    def _give_means(
        self,
        group: Sequence[Ablate],
        parts: Sequence[tuple[dict[str, Any], dict[str, TokenMap]]],
        clean: Mapping[str, Tensor] | None,
    ) -> None:
        wanted = {(site, edit.average): edit for edit in group for site in edit.sites(self.model)}
        tallies = {key: Tally(*key) for key in wanted}
        for inputs, maps in parts:
            values = self._clean(inputs, sorted({site for site, _ in wanted})) if clean is None else clean
            for key, tally in tallies.items():
                value = values[key[0]]
                with naming(wanted[key]):
                    if clean is not None and value.shape[0] == 1 and key[1] == "position":
                        raise InputError(_ONE_ROW)
                    tally.add(value, Layout.of(self.model, maps, key[0], value.shape, inputs))
        sources: dict[Any, tuple[Tensor, Any]] = {}
        for edit in group:
            for site in edit.sites(self.model):
                with naming(edit):
                    key = (site, edit.average)
                    if key not in sources:
                        sources[key] = tallies[key].source(self._own_layout(site, clean))
                    self._give(edit, site, *sources[key])

    def _own_layout(self, site: str, clean: Mapping[str, Tensor] | None) -> Layout | None:
        """The layout of a site in the run that is edited; None where only the run itself can tell."""
        window = self.windows.of(site)
        if window is None or window.tokens is None or window.axis.absent:
            return (
                None
                if clean is None
                else Layout.of(self.model, self.windows.maps, site, clean[site].shape, self.inputs)
            )
        return self._layout(window)

    def _as_held(self, site: str, value: Tensor) -> Tensor:
        """Of the values of a single run the positions that the edited run's site holds: ``generate`` reads one where a run reads them all."""
        window = self.windows.of(site)
        assert window is not None
        layout = Layout.of(self.model, self.windows.maps, site, value.shape, self.inputs)
        if layout.kind is None or window.count == value.shape[1]:
            return value
        held = range(window.prompt) if window.axis.held is None else window.axis.held
        return value[:, [index for position in held if (index := layout.index(position)) is not None]]

    def _layout(self, window: PositionWindow) -> Layout:
        """The layout of a tower's positions in the run that is edited, made once."""
        key = (window.tower, None if window.axis.held is None else tuple(window.axis.held))
        if key not in self._layouts:
            self._layouts[key] = Layout.of_tokens(window.tokens, window.axis.held)
        return self._layouts[key]

    def _give(self, edit: Ablate, site: str, value: Tensor, there: Any) -> None:
        self.given[edit, site] = value
        if there is not None:
            # As many axes as the value, so that both broadcast alike.
            self.given[edit, site, THERE] = torch.from_numpy(there).view(*there.shape, *[1] * (value.ndim - there.ndim))

    def _clean(self, inputs: Mapping[str, Any], sites: Sequence[str]) -> dict[str, Tensor]:
        # Sites that exist only in the eager run must not change the run that the others are read from.
        found: dict[str, Tensor] = {}
        for eager in (False, True):
            names = [site for site in sites if SiteName.parse(site).is_eager == eager]
            if names:
                given = dict(inputs)
                if given.get("past_key_values") is not None:
                    # The run makes the cache longer; the edited run needs it as it was.
                    given["past_key_values"] = copy.deepcopy(given["past_key_values"])
                with torch.no_grad():
                    found |= self.model._values_at(given, names)[1]
        return found

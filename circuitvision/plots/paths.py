"""Figures of path patching: senders down, receivers across, and how much of the answer goes along each path."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from circuitvision.metrics.effects import restored_error
from circuitvision.plots import kit, style
from circuitvision.statistics import standard_error

if TYPE_CHECKING:
    from circuitvision.patching.paths import PathPatching


_ROOM = 90
"""Letters of labels that fit side by side below a heat map."""


def paths(result: PathPatching, title: str | None = None, metric: str | None = None) -> kit.Figure:
    """Heat map of the share of the answer that goes from each sender to each receiver; of several metrics the one named, else the first."""
    number = result.index_of("metric", metric) if metric is not None else 0
    values, base, source = result.values, result.base, result.source
    if result.metrics:
        values, base, source = values[number], base[number], source[number]
    shares = result.restored[number] if result.metrics else result.restored
    everywhere = [found.expand(values.shape) for found in (base, source)]
    share = bool(torch.isfinite(shares).any())
    # Shares of nothing are no shares: the effects themselves are shown.
    grid = shares if share else values.mean(-1)
    errors = restored_error(values, *everywhere) if share else standard_error(values)
    unit = "share of the difference" if share else "change of the metric"
    down, across = result.axes["sender"], result.axes["receiver"]
    if title is None:
        row, column = divmod(int(grid.nan_to_num(0.0).abs().argmax()), grid.shape[1])
        said = style.signed_percent(float(grid[row, column])) if share else kit.signed(float(grid[row, column]))
        where = f"{kit.escaped(down[row])} to {kit.escaped(across[column])}"
        error = float(errors[row, column])
        # One path of many is the largest by chance as well: its share must stand apart from 0 by itself.
        apart = error == error and abs(float(grid[row, column])) > 2 * error
        lead = f"{where} carries {said}" if apart else f"{where} is largest, {said}"
        if not apart:
            lead += ", within two standard errors of 0" if error == error else ""
        held = f"through {kit.escaped(', '.join(result.through[:3]))}{' …' if len(result.through) > 3 else ''}"
        title = style.titled(lead, f"{held if result.through else 'direct paths'}: {unit}, {kit.over(result)}")
    figure = kit.heat({"": grid}, ("sender", down), ("receiver", across), unit=unit, share=share)
    if sum(map(len, map(str, across))) > _ROOM:
        figure.update_xaxes(tickangle=-60, automargin=True)
    return kit.finish_heat(figure, title, len(down))

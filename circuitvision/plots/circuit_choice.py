"""Figures of why a head looks where it looks, and of how stable the choice of a circuit is.

Terms of a score are bars: orange makes the head look at the key, blue away from it. Inclusion frequencies fall from left to right: a circuit that any
sample of examples gives is a plateau with a cliff, one that depends on the sample a slope.

Not covered: terms of single examples beside one another (``take`` an example), certificates.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from circuitvision.findings import ALONE, around
from circuitvision.model.names import component, parse_id, spelled
from circuitvision.plots import kit, style

if TYPE_CHECKING:
    from circuitvision.circuits.discovery import Discovery
    from circuitvision.circuits.qk_attribution import QKAttribution

STABLE = 0.95
"""From what inclusion frequency on an edge is said to come back."""


def scores(result: QKAttribution, count: int = 12, title: str | None = None) -> kit.Figure:
    """The ``count`` largest terms of a head's score as bars, and all others with what position adds as one; whiskers are standard errors."""
    rows, tower = result.gathered(count), component(result.head).tower
    others = result.values[..., 0].numel() - (len(rows) - 1)
    names = [f"{_part(query, tower)} × {_part(key, tower)}" for query, key, *_ in rows[:-1]]
    heights, errors = [row[2] for row in rows], [row[3] for row in rows]
    heading = title or _looks(result, names, heights, errors)
    across = "query's part × key's part, in units of the score before the softmax"
    rest = f"{others} other{'s' if others > 1 else ''}"
    return kit.bars([*names, rest], heights, heading, across, errors=errors if len(result.examples) > 1 else None)


def _part(sender: str, tower: str = "") -> str:
    """A component as it is read: a head by layer and number, the tower's input, biases; without the name of its tower, if that is this one."""
    if sender == "bias":
        return "biases"
    node = parse_id(sender)
    if node.kind in ("head", "mlp", "neuron"):
        return kit.escaped(spelled(sender)).removeprefix(f"{tower} ")
    return kit.escaped(node.label or f"{node.tower} {node.kind}".removeprefix(f"{tower} "))


def _place(said: str) -> str:
    return f"position {said}" if said.lstrip("-").isdecimal() else kit.escaped(said)


def _looks(result: QKAttribution, names: Sequence[str], heights: Sequence[float], errors: Sequence[float]) -> str:
    """The largest term of the score that is apart from 0 as the title: its interval is widened for the number of terms it was chosen from."""
    head, key, against = kit.escaped(spelled(result.head)), _place(result.key), kit.escaped(result.against)
    count = result.values[..., 0].numel()
    apart = [
        (name, value)
        for name, value, error in zip(names, heights, errors, strict=False)
        if (bounds := around(value, error, count)) is None or not bounds[0] <= 0 <= bounds[1]
    ]
    lead = kit.nothing_found(result.mean(), "term", f"moves the score of {head}")
    if lead is None and not apart:
        lead = f"No term of the score of {head} is apart from 0"
    elif lead is None:
        term, value = apart[0]
        if value > 0:
            lead = f"{term} draws {head} to {key}{f' rather than to {against}' if against else ''}: {kit.signed(value)}"
        else:
            lead = f"{term} keeps {head} off {key}{f' and on {against}' if against else ''}: {kit.signed(value)}"
    notes = (
        f"looking from {_place(result.query)}", f"all terms add up to {kit.signed(float(result.score.mean()))}",
        f"attention {kit.percent(float(result.pattern.mean()))}", kit.over(result),
    )  # fmt: skip
    return style.titled(lead, *notes)


def discovery(result: Discovery, title: str | None = None) -> kit.Figure:
    """How often resampled circuits hold each edge, the most frequent first, beside how alike two of them are and two random sets of their size."""
    if not result.resamples:
        return kit.empty("No resamples: discover(…, bootstrap=200) shows which edges come back", title)
    ranked = result.ranking()
    figure = kit.panels(
        1, 2, column_widths=[0.78, 0.22], horizontal_spacing=0.12, subplot_titles=["each edge", "two resampled circuits"]
    )  # fmt: skip
    for chosen, color, name in ((True, style.FOR, "in the circuit"), (False, style.AGAINST, "not in it")):
        places = [place for place, (_, _, own) in enumerate(ranked) if own is chosen]
        figure.add_bar(
            x=[place + 1 for place in places], y=[ranked[place][1] for place in places], name=name,
            customdata=[kit.escaped(ranked[place][0]) for place in places], marker={"color": color, "line": {"width": 0}},
            hovertemplate="%{customdata}: %{y:.0%}<extra>" + name + "</extra>", row=1, col=1,
        )  # fmt: skip
    known = {"two of them": (result.jaccard, style.FOR), "random sets": (result.chance, style.GREY)}
    figure.add_bar(
        x=list(known), y=[value for value, _ in known.values()], marker={"color": [color for _, color in known.values()]}, showlegend=False,
        text=[kit.number(value, 2) for value, _ in known.values()], textposition="outside", cliponaxis=False,
        hovertemplate="%{x}: %{y:.3f}<extra>Jaccard index</extra>", row=1, col=2,
    )  # fmt: skip
    notes = (f"{result.resamples} resamples of {_examples(result)}", f"method {kit.escaped(result.method)}")
    style.layout(
        figure, title or style.titled(_comes_back(result, ranked), *notes), 330, above=26, margin={"l": 64, "r": 20, "b": 96}, bargap=0.05
    )  # fmt: skip
    figure.update_yaxes(range=[0, 1.08], gridcolor=style.FAINT, zeroline=False)
    figure.update_yaxes(title="in so many resampled circuits", tickformat=".0%", row=1, col=1)
    figure.update_yaxes(title="Jaccard index", row=1, col=2)
    figure.update_xaxes(title="edges, the most frequent first", showgrid=False, zeroline=False, row=1, col=1)
    kit.legend_below(figure)
    return figure


def _examples(result: Discovery) -> str:
    count = 0 if result.attribution is None else len(result.attribution.examples)
    return f"{count} examples"


def _comes_back(result: Discovery, ranked: list[tuple[str, float, bool]]) -> str:
    """How many edges of the circuit come back; that they do is said where two resampled circuits are more alike than random sets of their size."""
    size = sum(chosen for *_, chosen in ranked)
    if not result.jaccard - result.chance > ALONE:
        return (
            "Another sample of examples gives another circuit: two are hardly more alike than random sets of their size"
        )
    back = sum(chosen and share >= STABLE for _, share, chosen in ranked)
    return f"{back} of {size} edges of the circuit are in at least {STABLE:.0%} of resampled circuits"

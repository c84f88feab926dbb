"""The findings of the main job: whether a model gives the answers asked about, where they are told apart, and what goes past the strongest heads.

They are :class:`~circuitvision.findings.Finding` like any other, made from the readings, lenses and effects of one case.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from circuitvision.findings import LEAST_SHARE, NOT_ASKED, Finding, has_shares, swing
from circuitvision.model.names import parse_id

if TYPE_CHECKING:
    from circuitvision.circuits import HeadImportance
    from circuitvision.quickstart.result import Reading
    from circuitvision.readout.lens.result import LensResult

ABOVE_CHANCE = 3.0
"""How many times their value by chance an answer's odds are, at least, where a model is said to give it: of few answers, three times the probability
by chance may be more than 1."""


def answers(clean: Reading, corrupt: Reading, answer: str, foil: str) -> Finding:
    """Whether a model says ``answer`` on the clean image and ``foil`` on the corrupt one, more surely than by chance; ``value`` is the lower of the
    two probabilities.
    """
    said = {"clean": clean.says, "corrupt": corrupt.says, "answer": answer, "foil": foil, "verb": clean.verb}
    value, chance = min(clean.answer, corrupt.foil), clean.chance
    gives = clean.says == answer and corrupt.says == foil
    sure = value * (1 - chance) > ABOVE_CHANCE * chance * (1 - value)
    reason = "" if gives and sure else "it is hardly above chance" if gives else NOT_ASKED
    return Finding("answers", gives and sure, value, "share", chance=chance, reason=reason, about=said)


def past_heads(result: HeadImportance, asked: Finding | None = None) -> Finding:
    """The share of the image's effect that leaves the towers which read it, by a connector or as the answer, without passing one of their selected
    heads; holds where no single head of theirs moves :data:`LEAST_SHARE`.
    """
    images = {parse_id(name).tower for name in result.inputs}
    shares = [abs(share) for name, share, _ in result.ranking() if parse_id(name).tower in images]
    ends = result.connectors or ("answer",)
    past = sum(e["score"] for e in result.edges if e["sender"] in result.inputs and e["receiver"] in ends)
    whole = swing(result)
    value = past / whole.value if has_shares(result) else math.nan
    frozen = sum(parse_id(name).tower in images for name in result.selected)
    told = bool(whole.holds) and (asked is None or bool(asked.holds)) and frozen > 0 and max(shares) < LEAST_SHARE
    through = " and ".join(f"the {parse_id(name).label}" for name in result.connectors)
    about = {
        "heads": str(frozen),
        "tower": " and ".join(sorted(images)),
        "through": f" through {through}" if through else "",
    }
    return Finding("past heads", told, value, "share", None, result.n_examples, about=about)


def back_each_other_up(head: Finding, heads: Finding) -> Finding:
    """Whether the heads of the graph move together at least twice what the best one (``chance``) moves alone, both of which hold."""
    told = bool(head.holds and heads.holds) and heads.value >= 2 * head.value
    about = {**heads.about, "alone": head.amount}
    return Finding("back up", told, heads.value, "share", heads.interval, heads.n, head.value, about=about)


def _where_answered(lens: LensResult) -> torch.Tensor:
    """What a lens of one target reads where the answer is read, ``[layer]``: the pooled output, or the last position."""
    return lens.pooled[:, 0, 0] if lens.pooled.numel() else lens.values[:, -1, 0, 0]


def read_at_answer(clean: LensResult, corrupt: LensResult, asked: Finding, names: Sequence[str]) -> Finding:
    """From which layer on answer and foil are told apart in both runs where the answer is read (the last word, the pooled output): its own answer
    higher in each, and the two at least half as far apart as at the end. ``value`` is how many layers, the end included, that holds for.
    """
    first, second = _where_answered(clean), _where_answered(corrupt)
    told = (first > 0) & (second < 0) & (first - second >= 0.5 * (first[-1] - second[-1]))
    layers = int(told.int().flip(0).cumprod(0).sum())
    where = str(clean.axes["layer"][len(told) - layers]) if layers else ""
    reason = "the last layer itself does not put each image's own answer higher" if not layers else ""
    reason = asked.reason if not asked.holds else reason
    place = "in the pooled output" if clean.pooled.numel() else "at the last word"
    about = {**_both(names), "layer": where, "tower": clean.tower, "place": place}
    return Finding("at answer", not reason, layers, "layers", reason=reason, about=about)


def read_at_patches(
    clean: Sequence[LensResult], corrupt: Sequence[LensResult], asked: Finding, names: Sequence[str]
) -> Finding:
    """At what share of image patches and layers the lens tells answer and foil apart as the output does, see :func:`read_at_answer`."""
    end = float(_where_answered(clean[-1])[-1] - _where_answered(corrupt[-1])[-1])
    told, count = 0, 0
    for one, other in zip(clean, corrupt, strict=True):
        patches = (one.places[..., 2] >= 0).T
        first, second = one.values[:, :, 0][:, patches], other.values[:, :, 0][:, patches]
        told += int(((first > 0) & (second < 0) & (first - second >= 0.5 * abs(end))).sum())
        count += first.numel()
    reason = asked.reason if not asked.holds else "" if told else "no patch puts each image's own answer higher"
    return Finding("patches", not reason, told / max(count, 1), "share", reason=reason, about=_both(names))


def _both(names: Sequence[str]) -> dict[str, str]:
    return {"answer": names[0], "foil": names[1]}

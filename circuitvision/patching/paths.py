"""Path patching: how much of an effect goes from one part of a model to another along chosen paths.

In the *base* run the senders take the values that they have in the *source* run; every other head and branch keeps its base value, so that the
change travels along the residual stream alone (*direct* paths), or through those parts that ``through`` names, which are computed again. What then
arrives at a receiver is handed to it in the base run, everything behind it runs freely, and the metric is read:

    ``effect(S → R) = metric(base with the inputs of R as they arrive from S) - metric(base)``

Nothing is linearised. Connectors, norms of queries, keys and sums, and the keys and values that another tower reads are computed by the model itself:
they are no parts that a path could be held at. A direct path from a vision head to a head of the language model goes through the projector and the
stream of the image's positions. An action expert that reads a prefix through keys and values reads it in its own heads: a path from the prefix leads
through those (``through="action.blocks.*.attn.hook_z"``), or to the key and value inputs of the prefix (``"language L2.attn.k"``).

*Several receivers together.* ``joint="add"``: each receives what arrives directly from the senders on top of what it receives from the other
receivers. These are the edges of the computational graph from S to R, and all of a node's edges together are the patch of the node, where branches
and connectors are ends (Goldowsky-Dill et al.). ``joint="hold"``: each keeps the value that arrives from the senders, whatever the other receivers
send (Wang et al.: name movers of several layers). For a single receiver the two are the same.

Shares and modes are those of :mod:`circuitvision.patching.activation`. In a linear model the direct effects of a sender on all receivers add up to
its total effect.

Not covered: parts smaller than a head or a branch, paths that choose positions on their way (positions are those of the senders and of the
receivers), later passes of ``generate``.

Reference: Wang et al. 2022 (arXiv 2211.00593); Goldowsky-Dill et al. 2023 (arXiv 2304.05969).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from circuitvision.errors import InputError
from circuitvision.model.edits.base import by_digest
from circuitvision.model.names import is_component
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.patching.activation import PatchingResult, dead_sites, warn_of_equal_runs
from circuitvision.patching.path_nodes import Node, Slot, expanded, nodes_of, precedes, slots_of
from circuitvision.patching.path_runs import PathEdits, PathPlan
from circuitvision.patching.runs import two_runs
from circuitvision.provenance import describe, with_provenance

_NAMED = 3
"""How many parts a label names one by one."""


@dataclass(frozen=True, eq=False)
class PathPatching(PatchingResult):
    """Effects along paths: ``values`` ``[sender receiver example]``, the change of the metric in its own units; several metrics lead.

    ``base``, ``source`` and :attr:`restored` are those of :class:`PatchingResult`. Cells whose receiver does not come after the sender are NaN:
    there is no path; those at sites that cannot reach the output (``dead``) are 0, without a run. ``edits`` is what every cell that was run hands to
    its receivers, of the first batch of examples. ``through`` names the parts that paths may lead through, ``joint`` says how several receivers of a
    cell were patched together.
    """

    through: list[str] = field(default_factory=list)
    joint: str = "add"


@dataclass
class _Part:
    """One entry of an axis: its label and what it stands for."""

    label: str
    members: tuple[Any, ...]
    named: bool
    """Whether it was asked for one by one, and not as one of what a glob matches."""


@with_provenance
def path_patch(
    model: Any,
    pairs: Any = None,
    metric: Any = None,
    *,
    senders: Any,
    receivers: Any,
    through: Any = None,
    axes: Sequence[str] = ("sender", "receiver"),
    positions: Any = None,
    receiver_positions: Any = None,
    joint: str = "add",
    mode: str = "denoise",
    clean: Mapping[str, Any] | None = None,
    corrupt: Mapping[str, Any] | None = None,
    align: Any = "kind",
    allow_wrong: bool = False,
    example_batch: int | None = None,
    save_to: str | Path | None = None,
    resume: bool = False,
    progress: bool = True,
) -> PathPatching:
    """Patch the paths from every sender to every receiver, one pair at a time, and measure how much of the answer follows.

    Args:
        model: the hooked model.
        pairs: a data set of pairs, run ``example_batch`` at a time (None: by memory), positions matched as ``align`` says.
        metric: a metric, its name, or a mapping of several (see :mod:`circuitvision.metrics`); answers are the pairs' where it has none.
        senders: what takes the source's values: heads (``"vision L1H3"``), MLPs (``"vision L1.mlp"``), whole attention layers (``"vision L1.attn"``),
            what enters a tower (``"v.input"``), connectors (``"projector.hook_out"``); one, a list, or globs of sites
            (``"vision.blocks.*.attn.hook_z"`` is every head). A list inside the list is a set that is patched together; a mapping names such sets.
        receivers: what reads it: a query, key or value input (``"vision L2H0.q"``), all three (``"vision L2H0"``), an MLP's input
            (``"vision L3.mlp"``), a connector, the output head (``"output"``), or globs of sites (``"vision.blocks.*.hook_q_input"``); lists,
            sets and mappings as for senders.
        through: heads, MLPs or attention layers that paths may lead through, spelled as senders; None for direct paths alone.
        axes: what is measured one by one; the senders, or the receivers, that are no axis are one set.
        positions: the positions at which senders take the source's values; None for all.
        receiver_positions: the positions at which receivers take what arrives; None for all.
        joint: how the receivers of one set are patched together, ``"add"`` or ``"hold"``, see the module.
        mode, clean, corrupt, allow_wrong, save_to, resume, progress: as of :func:`circuitvision.patching.activation_patch`.

    Raises:
        InputError: a receiver that no sender comes before, a sender that no receiver comes after, something that is no sender, receiver or
            intermediate, an intermediate off every path, and whatever ``activation_patch`` refuses.
        UnknownSiteError: a site that the model does not have.
    """
    refuse_unwrapped(model)
    refuse_random(model.module, "Path patching")
    _check_words(axes, joint)
    runs = two_runs(model, pairs, metric, clean, corrupt, mode, align, example_batch, allow_wrong)
    inputs = runs.first_inputs()
    sending = _parts(senders, lambda one: [(node,) for node in nodes_of(model, one)], "sender", "sender" in axes)
    everyone = [node for part in sending for node in part.members]
    receiving = _parts(
        receivers, lambda one: list(map(tuple, slots_of(model, one, everyone, inputs))), "receiver", "receiver" in axes
    )
    found = _between(model, sending, receiving)
    between = _through(model, through, found.senders, found.receivers)
    sets = [[_live(model, part, inputs) for part in parts] for parts in (found.senders, found.receivers)]
    live = [(row, column) for row, column in found.cells if sets[0][row] and sets[1][column]]
    if not live:
        dead_sites(model, _dead(model, [*found.senders, *found.receivers], inputs), inputs)
    plan = PathPlan(
        tuple(sets[0]),
        tuple(sets[1]),
        tuple(live),
        between,
        positions,
        receiver_positions,
        joint,
    )
    _check_joint(model, plan)
    options: dict[str, Any] = {"save_to": save_to, "resume": resume, "progress": progress}
    measured = runs.measure_made(PathEdits(model, plan, progress), plan.sites, **options)
    shape = (len(measured.base), len(plan.senders), len(plan.receivers), measured.base.shape[1])
    values = torch.full(shape, math.nan, dtype=measured.base.dtype)
    for row, column in found.cells:
        values[:, row, column] = 0.0
    for number, (row, column) in enumerate(plan.cells):
        values[:, row, column] = measured.values[:, number] - measured.base
    several = runs.metrics.several
    labels = {"sender": [part.label for part in found.senders], "receiver": [part.label for part in found.receivers]}
    result = PathPatching(
        values=values if several else values[0],
        axes={**runs.metrics.axis, **labels, "example": measured.examples},
        provenance=describe(
            model,
            method=f"path_patch(mode={mode}, joint={joint})",
            metric=runs.metrics,
            **plan.described(),
            **runs.described(),
        ),
        base=measured.base if several else measured.base[0],
        source=measured.source if several else measured.source[0],
        mode=mode,
        site="paths" if between else "direct paths",
        dead=_dead(model, [*found.senders, *found.receivers], inputs),
        edits=[by_digest(group) for group in measured.edits],
        groups=measured.groups,
        through=sorted(map(str, between)),
        joint=joint,
    )
    warn_of_equal_runs(result, found.cells[0])
    return result


def _check_words(axes: Sequence[str], joint: str) -> None:
    if isinstance(axes, str) or set(axes) - {"sender", "receiver"} or len(set(axes)) < len(axes):
        raise InputError(
            f"axes={axes!r} are not understood: 'sender' and 'receiver', each or both or none: axes=('sender',)."
        )
    if joint not in ("add", "hold"):
        raise InputError(f"joint={joint!r} is not understood: 'add' or 'hold'.")


def _dead(model: Any, parts: Sequence[_Part], inputs: Mapping[str, Any]) -> list[str]:
    """The sites that cannot reach the output."""
    return [
        site
        for site in dict.fromkeys(one.site for part in parts for one in part.members)
        if model.is_dead(site, inputs)
    ]


def _live(model: Any, part: _Part, inputs: Mapping[str, Any]) -> tuple[Any, ...]:
    """The members of a set that can reach the output."""
    return tuple(one for one in part.members if not model.is_dead(one.site, inputs))


# -- what was asked for --------------------------------------------------------------------------------------------------------------------------


def _parts(given: Any, read: Callable[[Any], list[tuple[Any, ...]]], what: str, apart: bool) -> list[_Part]:
    """The entries of an axis; one for all of them where they are no axis."""
    found: list[_Part] = []
    if isinstance(given, Mapping):
        found = [_Part(str(label), _together(own, read), named=True) for label, own in given.items()]
    else:
        for one in [given] if _is_one(given) else list(given):
            if _is_one(one):
                found += [_Part(_label(members), members, not expanded(one)) for members in read(one)]
            else:
                members = _together(one, read)
                found.append(_Part(_label(members), members, named=True))
    found = [part for part in found if part.members]
    if not found:
        example = "'vision L0H1'" if what == "sender" else "'output'"
        raise InputError(f"No {what} was given; name one, such as {example}.")
    if not apart:
        members = tuple(dict.fromkeys(member for part in found for member in part.members))
        return [_Part(_label(members), members, named=True)]
    labels = [part.label for part in found]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise InputError(
            f"The {what} {twice} is given twice; sets of many parts get names of your own: {what}s={{'name': […]}}."
        )
    return found


def _is_one(given: Any) -> bool:
    """Whether something is one spelling, and not several."""
    if isinstance(given, (str, Node, Slot)) or is_component(given) or not hasattr(given, "__iter__"):
        return True
    return isinstance(given, tuple) and len(given) == 2 and given[1] in ("q", "k", "v")


def _together(given: Any, read: Callable[[Any], list[tuple[Any, ...]]]) -> tuple[Any, ...]:
    """All that several spellings stand for."""
    listed = [given] if _is_one(given) else list(given)
    return tuple(dict.fromkeys(member for one in listed for members in read(one) for member in members))


def _label(members: Sequence[Any]) -> str:
    """A set in words: the three inputs of a head are the head."""
    names = list(dict.fromkeys(map(str, members)))
    for name in list(names):
        whole = name.removesuffix(".q")
        if whole != name and {f"{whole}.k", f"{whole}.v"} <= set(names):
            names = [whole if one == name else one for one in names if one not in (f"{whole}.k", f"{whole}.v")]
    if len(names) <= _NAMED:
        return " + ".join(names)
    return f"{names[0]} and {len(names) - 1} more"


@dataclass
class _Found:
    senders: list[_Part]
    receivers: list[_Part]
    cells: list[tuple[int, int]]


def _between(model: Any, senders: list[_Part], receivers: list[_Part]) -> _Found:
    """The entries that some path leads from, or to, and the pairs that one leads between. Raises InputError for a named one without any."""

    def leads(first: _Part, second: _Part) -> bool:
        ahead = all(any(precedes(model, node, slot) for slot in second.members) for node in first.members)
        return ahead and all(any(precedes(model, node, slot) for node in first.members) for slot in second.members)

    pairs = [
        (row, column) for row, one in enumerate(senders) for column, other in enumerate(receivers) if leads(one, other)
    ]
    rows, columns = {row for row, _ in pairs}, {column for _, column in pairs}
    for number, part in enumerate(receivers):
        if number not in columns and (part.named or not pairs):
            raise InputError(_backwards(model, senders[0] if len(senders) == 1 else None, part))
    for number, part in enumerate(senders):
        if number not in rows and part.named:
            raise InputError(_backwards(model, part, receivers[0] if len(receivers) == 1 else None))
    kept, reached = sorted(rows), sorted(columns)
    cells = [(kept.index(row), reached.index(column)) for row, column in pairs]
    return _Found([senders[row] for row in kept], [receivers[column] for column in reached], cells)


def _backwards(model: Any, sender: _Part | None, receiver: _Part | None) -> str:
    """Why there is no path, naming the parts of sets that stand in the wrong order."""
    first = sender.label if sender else "no sender"
    second = receiver.label if receiver else "any receiver"
    if sender and receiver:
        for node in sender.members:
            if not any(precedes(model, node, slot) for slot in receiver.members):
                first = str(node)
        for slot in receiver.members:
            if not any(precedes(model, node, slot) for node in sender.members):
                second = str(slot)
        said = f"{first} does not come before {second}"
    else:
        said = f"no sender comes before {second}" if receiver else f"no receiver comes after {first}"
    return (
        f"There is no path: {said}. Paths lead forward: from a layer to later ones, from attention to the MLP of its own layer where the "
        "block adds one after the other, from a tower to those that it feeds."
    )


def _through(model: Any, given: Any, senders: list[_Part], receivers: list[_Part]) -> frozenset[Node]:
    """The nodes that paths may lead through. Raises InputError for a named one that none can."""
    if given is None:
        return frozenset()
    found: set[Node] = set()
    sent = {node for part in senders for node in part.members}
    for one in [given] if _is_one(given) else list(given):
        for node in nodes_of(model, one):
            if node.place[0] < 0 or node.stage not in model.towers:
                raise InputError(
                    f"{node} is no part that paths are held at: what enters a tower, and connectors, are always computed again. Leave "
                    "it out of through."
                )
            enters = any(_leads(model, other, node) for other in sent)
            leaves = any(precedes(model, node, slot) for part in receivers for slot in part.members)
            if not expanded(one) and not (enters and leaves):
                raise InputError(f"{node} is on no path from the senders to the receivers; leave it out of through.")
            if not expanded(one) and sent == {node}:
                raise InputError(f"{node} is the sender; leave it out of through.")
            found.add(node)
    return frozenset(found)


def _leads(model: Any, first: Node, second: Node) -> bool:
    """Whether what a node adds can be in what another one reads."""
    if first.stage != second.stage:
        return model.flow.reaches(first.stage, second.stage)
    block = model.towers[second.stage].blocks[second.place[0]]
    reads = 0 if block.layout.parallel else second.place[1]
    return first.place < (second.place[0], reads)


def _check_joint(model: Any, plan: PathPlan) -> None:
    """Raise InputError where several receivers of one cell cannot be patched together as asked for."""
    for receivers in plan.receivers:
        places = {(slot.tower, slot.place) for slot in receivers}
        if len(places) < 2:
            continue
        if plan.joint == "hold" and any(slot.is_output for slot in receivers):
            raise InputError(
                "joint='hold' keeps what arrives at the output from the senders, and so nothing that the other receivers send: measure 'output' by "
                "itself, or with joint='add'."
            )
        for node in plan.through if plan.joint == "add" else ():
            before = [slot for slot in receivers if _enters(model, slot, node)]
            behind = [slot for slot in receivers if precedes(model, node, slot)]
            if before and behind:
                raise InputError(
                    f"Paths through {node} reach {behind[0]} from the senders, and again from {before[0]}, and would count twice: measure "
                    "the receivers one by one (axes=('sender', 'receiver')), or with joint='hold'."
                )


def _enters(model: Any, slot: Slot, node: Node) -> bool:
    """Whether what a receiver reads can change what a node adds."""
    if slot.tower != node.stage:
        return not slot.is_output and model.flow.reaches(slot.tower, node.stage)
    if slot.place == node.place:
        return slot.head is None or node.head is None or slot.head == node.head
    return slot.place < node.place

"""The computational graph of a model: which parts write into its residual streams, which read them, and the edges between them.

What a part reads is the sum of what was written before it (the residual rewrite: Elhage et al. 2021; Goldowsky-Dill et al. 2023). *Senders* write:
what enters a tower (``v.input``), every head (``v.a0.h1``), every other branch of a block (``v.m0``), and the connectors between towers
(``x.projector``), which write the positions of the images into the stream of the tower behind them. *Slots* read: the query, key and value input of
every head (``v.a1.h0<q>``), of key and value heads that serve several query heads, or another tower, those of the group (``l.kv1.g0<k>``), an MLP's
input (``v.m1``), what a connector reads (``x.projector``), and what the output is read from (``v.logits``; of a dual encoder ``t.logits<img>`` and
``t.logits<txt>``). An edge leads from a sender to every slot of the same stream that comes after it.

Between towers there are no edges past the connectors: a vision head reaches the language model through ``x.projector``, a prefix reaches an action
expert through the key and value inputs of its own blocks. ``reads`` says which senders are made of what a slot reads, so that paths go on.

Everything is an array: ``edges`` ``[sender slot]``, ``reads`` ``[slot sender]``; senders and slots of one tower stand together, by layer.

Not covered: towers that normalise the sum (post-norm blocks: what a part reads is no sum there), cross-attention, connectors that read several
hidden states of a tower.

Reference: Conmy et al. 2023 (arXiv 2304.14997), Syed et al. 2023 (arXiv 2310.10348).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from circuitvision.errors import InputError, UnsupportedModelError, nearest
from circuitvision.model.branches import AttentionBranch
from circuitvision.model.dead import last_live_block
from circuitvision.model.names import TOWER_LETTERS, NodeName, format_id
from circuitvision.patching.path_nodes import BEHIND_BLOCK, Node, Slot, nodes_of, output_slots, precedes, slots_of

ARROW = "->"


@dataclass(frozen=True)
class Sender:
    """What writes: the node, the tower into whose stream it writes, and ``site``, where that stands (with the head's number in the node).

    ``images``: whether it writes the positions of images alone (True: a connector), all others (False: what enters a tower beside it), or all (None).
    """

    node: Node
    name: NodeName | None
    tower: str
    site: str
    images: bool | None = None

    def __str__(self) -> str:
        return str(self.node) if self.name is None else format_id(self.name)


@dataclass(frozen=True)
class Receiver:
    """What reads: the slot, the node it belongs to, and the letter of the slot ("q", "k", "v", "in"; of a dual encoder "img", "txt")."""

    slot: Slot
    name: NodeName | None
    letter: str
    label: str

    def __str__(self) -> str:
        return self.label


@dataclass(frozen=True, eq=False)
class ComputationalGraph:
    """Senders, slots, ``edges`` ``[sender slot]`` and ``reads`` ``[slot sender]`` of a model; see the module."""

    senders: tuple[Sender, ...]
    slots: tuple[Receiver, ...]
    edges: Bool[Tensor, "sender slot"]
    reads: Bool[Tensor, "slot sender"]

    @property
    def n_edges(self) -> int:
        """How many edges there are."""
        return int(self.edges.sum())

    @cached_property
    def sender_ids(self) -> list[str]:
        """The ids of the senders, in order."""
        return [str(sender) for sender in self.senders]

    @cached_property
    def slot_ids(self) -> list[str]:
        """The ids of the slots, in order."""
        return [str(slot) for slot in self.slots]

    @property
    def sites(self) -> list[str]:
        """The sites where what senders write stands, each once."""
        return list(dict.fromkeys(sender.site for sender in self.senders))

    def senders_at(self, site: str) -> list[int]:
        """The numbers of the senders whose value stands at a site: of heads, in their order."""
        return self._at_site.get(site, [])

    def slots_at(self, site: str) -> list[int]:
        """The numbers of the slots of a site: of heads, in their order."""
        return self._slots_at.get(site, [])

    @cached_property
    def _at_site(self) -> dict[str, list[int]]:
        return _grouped(sender.site for sender in self.senders)

    @cached_property
    def _slots_at(self) -> dict[str, list[int]]:
        return _grouped(slot.slot.site for slot in self.slots)

    def edge(self, name: str) -> tuple[int, int]:
        """The numbers of an edge's ends, by its name: ``"v.a0.h1->v.m1"``, ``"v.input->v.a0.h1<k>"``.

        Raises:
            InputError: no such sender or slot, or no edge between them.
        """
        first, arrow, second = name.partition(ARROW)
        for label, known, what in ((first, self.sender_ids, "sender"), (second, self.slot_ids, "slot")):
            if label not in known and "@" in label:
                raise InputError(
                    f"{name!r} is an edge at a span, and runs mask edges at all positions: evaluate a circuit of the scores without at_spans()."
                )
            if label not in known:
                near = ", ".join(nearest(label, known))
                raise InputError(f"{name!r}: there is no {what} {label!r}. Nearest: {near}.")
        row, column = self.sender_ids.index(first), self.slot_ids.index(second)
        if not arrow or not self.edges[row, column]:
            raise InputError(f"{name!r} is no edge: {second} does not read what {first} writes.")
        return row, column

    def edge_names(self, mask: Bool[Tensor, "sender slot"] | None = None) -> list[str]:
        """The names of the edges of a mask (None: all), by sender, then slot."""
        chosen = self.edges if mask is None else mask & self.edges
        return [f"{self.sender_ids[row]}{ARROW}{self.slot_ids[column]}" for row, column in chosen.nonzero().tolist()]

    def mask(self, names: Iterable[str]) -> Bool[Tensor, "sender slot"]:
        """The mask of named edges. Raises InputError as :meth:`edge` does."""
        found = torch.zeros_like(self.edges)
        for name in names:
            found[self.edge(name)] = True
        return found

    def __provenance__(self) -> dict[str, Any]:
        return {"senders": self.sender_ids, "slots": self.slot_ids, "edges": self.edges}

    def __repr__(self) -> str:
        return f"ComputationalGraph({len(self.senders)} senders, {len(self.slots)} slots, {self.n_edges} edges)"


def _grouped(sites: Iterable[str]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for number, site in enumerate(sites):
        found.setdefault(site, []).append(number)
    return found


def computational_graph(model: Any, inputs: Mapping[str, Any]) -> ComputationalGraph:
    """The computational graph of a model for such inputs; parts that cannot reach the output are left out.

    Raises:
        UnsupportedModelError: a tower whose reads are no sums of what was written (see the module).
    """
    ran = model.tokens(inputs)
    towers = [name for name in model.towers if name in ran]
    for name in towers:
        _check(model, name)
    senders = [sender for name in towers for sender in _senders(model, name, inputs)]
    slots = [slot for name in towers for slot in _slots(model, name, inputs)]
    slots += _outputs(model, [sender.node for sender in senders], inputs)
    edges = _edges(model, senders, slots)
    return ComputationalGraph(tuple(senders), tuple(slots), edges, _reads(model, senders, slots))


def _edges(model: Any, senders: Sequence[Sender], slots: Sequence[Receiver]) -> Bool[Tensor, "sender slot"]:
    """Which senders write into the stream that a slot reads; all heads of a site alike."""
    known: dict[tuple[Any, ...], bool] = {}

    def leads(sender: Sender, receiver: Receiver) -> bool:
        key = (sender.node.stage, sender.node.place, sender.tower, receiver.slot.site, receiver.slot.after)
        if key not in known:
            known[key] = sender.tower == receiver.slot.tower and precedes(model, sender.node, receiver.slot)
        return known[key]

    return torch.tensor([[leads(one, other) for other in slots] for one in senders], dtype=torch.bool)


def _check(model: Any, name: str) -> None:
    tower = model.towers[name]
    for branch in (branch for block in tower.blocks for branch in block.branches):
        if branch.sum_norm is not None:
            raise UnsupportedModelError(
                f"The {name} tower normalises the sum of its stream and what {branch.name} adds (post-norm), so what a part reads is no sum of what "
                "was written before it, and there are no edges: patch paths with cv.patching.path_patch."
            )
    if tower.crossed_towers:
        raise UnsupportedModelError(
            f"Blocks of the {name} tower attend to {' and '.join(tower.crossed_towers)}: edges through cross-attention are not covered; patch paths "
            "with cv.patching.path_patch."
        )


# -- what writes ---------------------------------------------------------------------------------------------------------------------------------


def _senders(model: Any, name: str, inputs: Mapping[str, Any]) -> Iterable[Sender]:
    """The senders into the stream of one tower, in the order in which they write."""
    tower, entering = model.towers[name], f"{name}.hook_input"
    into = [one for one in model.flow.modules if one.target == name and one.via == "stream"]
    if len(into) > 1:
        raise UnsupportedModelError(
            f"{' and '.join(one.name for one in into)} write into the {name} tower; several connectors into one are not covered."
        )
    (start,) = nodes_of(model, entering)
    yield Sender(start, NodeName(name, "input"), name, entering, False if into else None)
    for connector in into:
        (node,) = nodes_of(model, f"{connector.name}.hook_out")
        yield Sender(node, NodeName("connector", "connector", label=connector.name), name, entering, True)
    for layer in range(last_live_block(tower, inputs) + 1):
        for branch in tower.blocks[layer].branches:
            by_head = isinstance(branch, AttentionBranch)
            site = f"{name}.blocks.{layer}.{branch.inner if by_head else branch.added}"
            if not model.is_dead(site, inputs):
                for node in nodes_of(model, site):
                    yield Sender(node, _writes(name, layer, branch.name, node.head), name, site)
        for writer in tower.writers.get(layer, ()):
            (node,) = nodes_of(model, f"{name}.{writer}")
            yield Sender(node, None, name, node.site)


def _writes(tower: str, layer: int, branch: str, head: int | None) -> NodeName | None:
    """The name of a head or branch; None for one that ids have no form for."""
    if head is not None:
        return NodeName(tower, "head", layer=layer, head=head) if branch == "attn" else None
    return NodeName(tower, "mlp", layer=layer) if branch == "mlp" else None


# -- what reads ----------------------------------------------------------------------------------------------------------------------------------


def _slots(model: Any, name: str, inputs: Mapping[str, Any]) -> Iterable[Receiver]:
    """The slots of one tower's blocks and of the connector that reads its end, in the order in which they read."""
    tower, known = model.towers[name], set(model.sites())
    for layer in range(last_live_block(tower, inputs) + 1):
        for branch in tower.blocks[layer].branches:
            read = [(branch.read_site, "in")]
            if isinstance(branch, AttentionBranch):
                read = [(branch.slot(letter), letter) for letter in branch.letters]
            for part, letter in read:
                site = f"{name}.blocks.{layer}.{part}"
                if site not in known:
                    raise UnsupportedModelError(
                        f"{site}, what {branch.name} reads, is no site of this model, so it is no slot."
                    )
                for (slot,) in [] if model.is_dead(site, inputs) else slots_of(model, site, (), inputs):
                    node = _reader(tower, layer, branch.name, letter, slot.head)
                    mark = "" if letter == "in" else f"<{letter}>"
                    yield Receiver(slot, node, letter, str(slot) if node is None else format_id(node) + mark)
    connector = tower.connector
    if connector is not None and connector.via == "stream":
        layers = set(tower.feature_layers_in(inputs))
        if len(layers) > 1 or min(layers) < 1:
            raise UnsupportedModelError(
                f"{connector.name} reads the hidden states {sorted(layers)} of the {name} tower; edges are covered into one, behind block 0."
            )
        site = tower.residual_name(min(layers))
        slot = Slot(name, (min(layers) - 1, BEHIND_BLOCK), site, site, after=BEHIND_BLOCK, end=connector.name)
        node = NodeName("connector", "connector", label=connector.name)
        mark = f"<{TOWER_LETTERS[name]}>" if len(connector.sources) > 1 else ""
        yield Receiver(slot, node, "in", format_id(node) + mark)


def _reader(tower: Any, layer: int, branch: str, letter: str, head: int | None) -> NodeName | None:
    """The name of what reads: keys and values that several heads, or another tower, look at are their group's."""
    if letter == "in":
        return NodeName(tower.name, "mlp", layer=layer) if branch == "mlp" else None
    grouped = letter != "q" and (tower.cfg.n_kv_heads != tower.cfg.n_heads or tower.feeds_cache)
    kind = "kv_head" if grouped else "head"
    return NodeName(tower.name, kind, layer=layer, head=head or 0) if branch == "attn" else None


def _outputs(model: Any, nodes: Sequence[Node], inputs: Mapping[str, Any]) -> Iterable[Receiver]:
    """What the output is read from: of a dual encoder both streams, which are two slots of one node."""
    found, node = output_slots(model, nodes, inputs), NodeName(model.flow.answer, "logits")
    for slot in found:
        letter = "in" if len(found) == 1 else "img" if model.towers[slot.tower].stack.image else "txt"
        yield Receiver(slot, node, letter, format_id(node) + ("" if letter == "in" else f"<{letter}>"))


def _reads(model: Any, senders: Sequence[Sender], slots: Sequence[Receiver]) -> Bool[Tensor, "slot sender"]:
    """Which senders are made of what a slot reads: of keys and values all heads that look at them, those of another tower too."""
    found = torch.zeros(len(slots), len(senders), dtype=torch.bool)
    standing: dict[tuple[Any, ...], list[int]] = {}
    for column, sender in enumerate(senders):
        standing.setdefault((sender.node.stage, sender.node.place), []).append(column)
    for row, receiver in enumerate(slots):
        slot = receiver.slot
        if slot.end:
            found[row] = torch.tensor([sender.node.stage == slot.end for sender in senders])
            continue
        looking = [slot.tower]
        if receiver.letter in "kv":
            looking += [name for name in model.towers if model.flow.cache_of(name) == slot.tower]
        for column in [number for name in looking for number in standing.get((name, slot.place), ())]:
            found[row, column] = slot.head is None or slot.head == _head_read(model, senders[column], receiver.letter)
    return found


def _head_read(model: Any, sender: Sender, letter: str) -> int | None:
    """The number of the query, or of the key and value, that a head is made of."""
    cfg, head = model.towers[sender.tower].cfg, sender.node.head
    return head if letter == "q" or head is None else head * cfg.n_kv_heads // cfg.n_heads

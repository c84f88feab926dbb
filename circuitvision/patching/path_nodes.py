"""The ends of paths: what writes into a model's streams, what reads them, and which of them comes first.

A :class:`Node` writes: a head, a whole branch of a block (attention, MLP), what enters a tower, a connector. A :class:`Slot` reads: the stream as
the query, key or value input of a head, as the input of an MLP or of a connector, or as the output head takes it. Names are those of
:mod:`circuitvision.model.names` (``"vision L2H0"``, ``"v.a2.h0"``, ``("vision", 2, 0)``, ``"vision L2.mlp"``, ``"v.input"``) and of sites; a slot
is a component with ``.q``, ``.k`` or ``.v`` behind it (``"vision L2H0.q"``, ``"v.a2.h0<q>"``), a slot's site, a connector, or ``"output"``.

A node comes before a slot if what it adds is in the stream that the slot reads: an earlier layer, or an earlier branch of a block whose branches
follow one another (attention before the MLP; not in parallel blocks).

Not covered: single neurons and features as ends, single heads of attention pooling.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from circuitvision.errors import InputError
from circuitvision.model.branches import AttentionBranch, Branch
from circuitvision.model.dead import last_live_block
from circuitvision.model.names import NodeName, component, head_name, heads_of, is_component, spelled
from circuitvision.model.sites import SiteName, is_glob

OUTPUT = "output"
_OUTPUTS = (OUTPUT, "logits", "answer")
_SLOTTED = re.compile(r"(?P<node>.+?)(?:\.(?P<slot>[qkv])|<(?P<eap>[qkv])>)")
_INDEXED = re.compile(r"(?P<site>.+)\[(?P<head>\d+)\]")
_ENTERING = {"input": "hook_input", "embed": "hook_embed", "pos": "hook_pos_embed"}
BEHIND_BLOCK = 10_000
"""Where in a block something stands that is added behind all of its branches."""


@dataclass(frozen=True)
class Node:
    """What writes: ``site``, and one of its heads or all of it. ``place`` is its layer (−1 before block 0) and the number of its branch."""

    stage: str
    place: tuple[int, int]
    site: str
    head: int | None = None

    def __str__(self) -> str:
        name = SiteName.parse(self.site)
        if name.layer is None:
            return f"{self.stage} {name.site.removeprefix('hook_')}" if self.place[0] == -1 else self.stage
        if self.head is not None:
            label = head_name(name.layer, self.head, name.tower)
            return label if name.branch == "attn" else f"{label} of {name.branch}"
        leaf = name.site.removeprefix("hook_").removesuffix("_out")
        return f"{name.tower} L{name.layer}.{leaf}"


@dataclass(frozen=True)
class Slot:
    """What reads: ``site``, and one of its heads or all of it. ``stream`` is the site of the stream that it reads, ``tower`` its tower or connector,
    ``place`` the layer and the number of the branch (of the output: behind the last block that it depends on)."""

    tower: str
    place: tuple[int, int]
    site: str
    stream: str
    head: int | None = None
    after: int = 0
    """The number of its block's first branch that it does not come after."""
    end: str = ""
    """The connector, or the output, that reads the end of the stream."""

    @property
    def is_output(self) -> bool:
        """Whether it is what the output head reads."""
        return self.end == OUTPUT

    @property
    def has_heads(self) -> bool:
        """Whether its site has an axis of heads."""
        return SiteName.parse(self.site).has_heads

    def __str__(self) -> str:
        name = SiteName.parse(self.site)
        if self.end:
            return self.end
        if not self.has_heads:
            return f"{name.tower} L{name.layer}.{name.site.removeprefix('hook_').removesuffix('_in')}"
        branch, letter = name.site.rpartition(".")[0], name.stage[5]
        if self.head is None:
            return f"{name.tower} L{name.layer}.{branch or 'attn'}.{letter}"
        label = head_name(name.layer or 0, self.head, name.tower)
        return f"{label}{f' of {branch}' if branch else ''}.{letter}"


def precedes(model: Any, node: Node, slot: Slot) -> bool:
    """Whether what a node adds can be in the stream that a slot reads: in its own tower, or in one that its own leads to."""
    if node.stage != slot.tower:
        return model.flow.reaches(node.stage, slot.tower)
    return node.place < (slot.place[0], slot.after)


def changes(model: Any, node: Node, branch: Branch, tower: str, layer: int) -> bool:
    """Whether what a node adds can be in the stream that a branch of a block reads."""
    if node.stage != tower:
        return model.flow.reaches(node.stage, tower)
    return node.place < (layer, first_not_before(branch))


def first_not_before(branch: Branch) -> int:
    """The number of the first branch of its block that a branch does not read: its own, or 0 where it reads what enters the block."""
    return 0 if branch.stream == "hook_resid_pre" else branch.number


# -- what writes ---------------------------------------------------------------------------------------------------------------------------------


def nodes_of(model: Any, given: Any) -> list[Node]:
    """The nodes that one spelling, site or glob stands for: of a site of heads, each of them.

    Raises:
        InputError: something that writes into no stream.
        UnknownSiteError: a site that the model does not have.
    """
    if isinstance(given, Node):
        return [given]
    if isinstance(given, str) and (match := _INDEXED.fullmatch(given)):
        return [_at_site(model, site, int(match["head"])) for site in model.sites(match["site"])]
    if is_component(given):
        return [_of_component(model, given)]
    if isinstance(given, str) and model.flow.connector(given) is not None:
        return [_at_site(model, f"{given}.hook_out")]
    if not isinstance(given, str):
        raise InputError(
            f"{given!r} is no part of a model: a component such as 'vision L1H3' or 'vision L1.mlp', or a site."
        )
    found = []
    for site in model.sites(given):
        name = SiteName.parse(site)
        heads = (
            range(model.towers[name.tower].cfg.n_heads) if name.layer is not None and name.stage == "hook_z" else [None]
        )
        found += [_at_site(model, site, head) for head in heads]
    return found


def _of_component(model: Any, given: Any) -> Node:
    node = component(given)
    if node.kind == "head":
        node = heads_of([given], model.towers)[0]
        return _at_site(model, f"{node.tower}.blocks.{node.layer}.attn.hook_z", node.head)
    if node.kind == "connector":
        return _at_site(model, model.sites(f"{node.label}.hook_out")[0])
    tower = _tower_of(model, node, given)
    if node.kind in _ENTERING:
        return _at_site(model, model.sites(f"{tower}.{_ENTERING[node.kind]}")[0])
    if node.kind in ("mlp", "attn"):
        return _at_site(
            model, model.sites(f"{tower}.blocks.{_layer_of(model, tower, node, given)}.hook_{node.kind}_out")[0]
        )
    raise InputError(
        f"{given!r} writes nothing into the stream by itself: give heads, MLPs, attention layers, what enters a tower ('v.input') or a connector."
    )


def _at_site(model: Any, site: str, head: int | None = None) -> Node:
    """The node that writes at a site."""
    name = SiteName.parse(site)
    if name.layer is None:
        if name.site in _ENTERING.values() and name.tower in model.towers:
            return Node(name.tower, (-1, 0), site)
        if name.tower not in model.towers and name.site == "hook_out":
            return Node(name.tower, (0, 0), site)
    else:
        tower = model.towers[name.tower]
        for branch in tower.blocks[name.layer].branches:
            if name.site == branch.added and head is None:
                return Node(name.tower, (name.layer, branch.number), site)
            if isinstance(branch, AttentionBranch) and name.site == branch.inner:
                count = tower.cfg.n_heads
                if head is None or not head < count:
                    raise InputError(f"There is no head {head} at {site}, which has {count}, counted from 0.")
                return Node(name.tower, (name.layer, branch.number), site, head)
        if f"blocks.{name.layer}.{name.site}" in tower.writers.get(name.layer, ()):
            return Node(name.tower, (name.layer, BEHIND_BLOCK), site)
    raise InputError(
        f"{site} is not what a part adds to a stream. Senders are heads (attn.hook_z), branches (hook_attn_out, hook_mlp_out), what enters a tower "
        "(hook_input, hook_embed) and connectors (projector.hook_out)."
    )


def _tower_of(model: Any, node: NodeName, given: Any) -> str:
    name = node.tower or (next(iter(model.towers)) if len(model.towers) == 1 else "")
    if name not in model.towers:
        raise InputError(
            f"{given!r} is of the tower {name!r}; this model has {', '.join(model.towers)}."
            if name
            else f"{given!r} may be of several towers ({', '.join(model.towers)}); write its name before it."
        )
    return name


def _layer_of(model: Any, tower: str, node: NodeName, given: Any) -> int:
    count = model.towers[tower].cfg.n_layers
    if not -count <= node.layer < count:
        raise InputError(f"{given!r} is outside the {count} layers of the {tower} tower, counted from 0.")
    return node.layer % count


# -- what reads ----------------------------------------------------------------------------------------------------------------------------------


def slots_of(model: Any, given: Any, senders: Sequence[Node], inputs: Mapping[str, Any]) -> list[list[Slot]]:
    """The receivers that one spelling, site or glob stands for: of a site of heads, each of them; a head without a letter is its three inputs.

    Raises:
        InputError: something that reads no stream, a letter that key and value heads of a group share.
        UnknownSiteError: a site that the model does not have.
    """
    if isinstance(given, Slot):
        return [[given]]
    letter = ""
    if isinstance(given, str):
        if given in _OUTPUTS:
            return [output_slots(model, senders, inputs)]
        if model.flow.connector(given) is not None:
            return [[connector_slot(model, given, inputs)]]
        if match := _SLOTTED.fullmatch(given):
            if is_component(match["node"]) and component(match["node"]).kind in ("head", "kv_head", "attn"):
                given, letter = match["node"], match["slot"] or match["eap"]
        elif match := _INDEXED.fullmatch(given):
            return [[_slot_at(model, site, int(match["head"]))] for site in model.sites(match["site"])]
    elif isinstance(given, tuple) and len(given) == 2 and given[1] in ("q", "k", "v") and is_component(given[0]):
        given, letter = given
    if is_component(given):
        if component(given).kind == "logits":
            return [output_slots(model, senders, inputs)]
        if component(given).kind == "connector":
            return [[connector_slot(model, component(given).label, inputs)]]
        return [_slots_of_component(model, given, letter)]
    if not isinstance(given, str):
        raise InputError(
            f"{given!r} is no receiver: an input of a head ('vision L2H0.q'), of an MLP ('vision L2.mlp'), or 'output'."
        )
    found = []
    for site in model.sites(given):
        if site.endswith(".hook_in") and model.flow.connector(site.partition(".")[0]) is not None:
            found.append([connector_slot(model, site.partition(".")[0], inputs)])
            continue
        whole = _slot_at(model, site)
        counts = range(_head_count(model, whole)) if whole.has_heads else [None]
        found += [[_slot_at(model, site, head)] for head in counts]
    return found


def _slots_of_component(model: Any, given: Any, letter: str) -> list[Slot]:
    node = component(given)
    if node.kind == "head":
        node = heads_of([given], model.towers)[0]
    tower = _tower_of(model, node, given)
    cfg = model.towers[tower].cfg
    if node.kind == "mlp":
        prefix = f"{tower}.blocks.{_layer_of(model, tower, node, given)}"
        return [_slot_at(model, f"{prefix}.hook_mlp_in")]
    if node.kind not in ("head", "kv_head", "attn"):
        raise InputError(f"{given!r} reads no stream by itself; receivers are inputs of heads and MLPs, and 'output'.")
    layer = _layer_of(model, tower, node, given)
    letters = letter or ("kv" if node.kind == "kv_head" else "qkv")
    if node.kind == "head" and letters != "q" and cfg.n_kv_heads != cfg.n_heads:
        group = node.head * cfg.n_kv_heads // cfg.n_heads
        raise InputError(
            f"Keys and values of {spelled(node)} are those of a group of {cfg.n_heads // cfg.n_kv_heads} heads: give "
            f"'{spelled(node)}.q' for what it alone reads, and the group for the rest: "
            f"'{NodeName(tower, 'kv_head', layer=layer, head=group)}'."
        )
    if node.kind == "kv_head" and letters == "q":
        raise InputError(f"{given!r} has keys and values; queries belong to heads.")
    head = None if node.kind == "attn" else node.head
    return [_slot_at(model, f"{tower}.blocks.{layer}.hook_{one}_input", head) for one in letters]


def _slot_at(model: Any, site: str, head: int | None = None) -> Slot:
    """The slot at a site."""
    site = model.sites(site)[0]
    name = SiteName.parse(site)
    layer = -1 if name.layer is None or name.tower not in model.towers else name.layer
    for branch in model.towers[name.tower].blocks[layer].branches if layer >= 0 else ():
        slots = [branch.slot(letter) for letter in branch.letters] if isinstance(branch, AttentionBranch) else []
        if name.site in slots or (name.site == branch.read_site and head is None):
            stream = f"{name.tower}.blocks.{layer}.{branch.stream}"
            slot = Slot(name.tower, (layer, branch.number), site, stream, head, first_not_before(branch))
            if head is not None and not head < _head_count(model, slot):
                raise InputError(
                    f"There is no head {head} at {site}, which has {_head_count(model, slot)}, counted from 0."
                )
            return slot
    raise InputError(
        f"{site} is not what a part reads of a stream. Receivers are inputs of heads (hook_q_input, hook_k_input, hook_v_input), of MLPs "
        "(hook_mlp_in) and connectors (projector.hook_in), and 'output'."
    )


def _head_count(model: Any, slot: Slot) -> int:
    cfg = model.towers[slot.tower].cfg
    return cfg.n_kv_heads if SiteName.parse(slot.site).counts_key_heads else cfg.n_heads


def output_slots(model: Any, senders: Iterable[Node], inputs: Mapping[str, Any]) -> list[Slot]:
    """Where the stream that the model's output is read from ends: one tower's, of a dual encoder those of the senders."""
    stages = {node.stage for node in senders}
    found = []
    for tower in model.flow.towers:
        if model.flow.is_last(tower) and (tower in stages or model.flow.is_reached(tower, stages)):
            layer = last_live_block(model.towers[tower], inputs)
            site = f"{tower}.blocks.{layer}.hook_resid_post"
            found.append(Slot(tower, (layer, BEHIND_BLOCK), site, site, after=BEHIND_BLOCK, end=OUTPUT))
    return found


def connector_slot(model: Any, name: str, inputs: Mapping[str, Any]) -> Slot:
    """What a connector reads: the end of its tower's stream, before any final norm; of several towers or layers, what they make together."""
    connector = model.flow.connector(name)
    if connector is None:
        raise InputError(
            f"{name!r} is no connector; this model has {', '.join(one.name for one in model.flow.modules) or 'none'}."
        )
    source = model.towers[connector.sources[0]]
    layers = source.feature_layers_in(inputs)
    if len(connector.sources) > 1 or len(set(layers)) > 1 or layers[0] < 1:
        return Slot(name, (0, 0), f"{name}.hook_in", f"{name}.hook_in", end=name)
    site = f"{source.name}.blocks.{layers[0] - 1}.hook_resid_post"
    return Slot(source.name, (layers[0] - 1, BEHIND_BLOCK), site, site, after=BEHIND_BLOCK, end=name)


def expanded(given: Any) -> bool:
    """Whether a spelling stands for several parts that were not named one by one."""
    return isinstance(given, str) and (is_glob(given) or given.endswith((".hook_z", "_input")))

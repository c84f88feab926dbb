"""Names of components: the node ids of circuit graphs, and the spellings that figures and tables print, formatted and parsed in one place.

A head is printed ``vision L1H3`` (without its tower ``L1H3``), an MLP ``vision L1.mlp``, all heads of a layer ``vision L1.attn``, a neuron
``vision L2N118``. :func:`component` reads these with a dot in place of the space as well, graph ids, ``(layer, head)``, ``(tower, layer,
head)``, ``vision layer 1, head 3`` and a site with the head's number, ``vision.blocks.1.attn.hook_z[3]``: every way in which a component is
printed or stored anywhere.

Graph ids:

``{tower}.{name}`` or ``{tower}.{name}@{position}``; a position is a number or the name of a span (``v.a1.h3@image``). Towers are one letter (``v``
vision, ``v2`` a second vision backbone, ``t`` text, ``l`` language, ``a`` action, ``q`` Q-former, ``d`` decoder, ``x`` connector). Component names
follow EAP-IG (Hanna et al., 2024), the field's common form: ``input``, ``a{layer}.h{head}``, ``kv{layer}.g{group}``, ``m{layer}``, ``logits``.
``a{layer}`` and ``kv{layer}`` are all heads of a layer, and all of its keys and values.
Features, errors, embeddings, biases, targets and actions have forms of their own (see ``_FORMS``). Edges are ``{sender}->{receiver}<{slot}>``, for
example ``v.m0->v.a1.h1<k>``, without a slot where the receiver has one only (``in``): see :func:`format_edge`.

Two different nodes never share an id, and ``parse(format(node)) == node``: collisions between error and feature ids
have corrupted attribution graphs elsewhere.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName

TOWER_LETTERS = {
    "vision": "v",
    "vision_2": "v2",
    "text": "t",
    "language": "l",
    "action": "a",
    "qformer": "q",
    "decoder": "d",
    "connector": "x",
}
_TOWER_NAMES = {letter: name for name, letter in TOWER_LETTERS.items()}

# kind -> (template, fields that must be given). A name in `label` is letters, digits and underscores, starting with
# a letter.
_FORMS: dict[str, tuple[str, tuple[str, ...]]] = {
    "input": ("input", ()),
    "head": ("a{layer}.h{head}", ("layer", "head")),
    "kv_head": ("kv{layer}.g{head}", ("layer", "head")),
    "attn": ("a{layer}", ("layer",)),
    "kv": ("kv{layer}", ("layer",)),
    "mlp": ("m{layer}", ("layer",)),
    "neuron": ("m{layer}.n{feature}", ("layer", "feature")),
    "neuron_group": ("m{layer}.g{feature}", ("layer", "feature")),
    "feature": ("tc{layer}.f{feature}", ("layer", "feature")),
    "error": ("err{layer}", ("layer",)),
    "dictionary": ("d{layer}.{label}.f{feature}", ("layer", "label", "feature")),
    "dictionary_error": ("derr{layer}.{label}", ("layer", "label")),
    "embed": ("emb", ()),
    "pos": ("pos", ()),
    "bias": ("bias{layer}.{label}", ("layer", "label")),
    "logits": ("logits", ()),
    "logit": ("logit{feature}", ("feature",)),
    "action": ("dim{feature}", ("feature",)),
    "connector": ("{label}", ("label",)),
}
_NUMBER = {"layer": r"(?P<layer>0|[1-9]\d*)", "head": r"(?P<head>0|[1-9]\d*)", "feature": r"(?P<feature>0|[1-9]\d*)"}
_LABEL = r"(?P<label>[a-z][a-z0-9_]*)"


@dataclass(frozen=True)
class NodeName:
    """The parts of a node id; -1 and "" stand for parts its kind does not have, position -1 for all positions together.

    ``head`` is the group for ``kv_head``; ``feature`` is the neuron, group of neurons, class or action dimension for those kinds;
    ``pos`` is the step for actions. ``span`` is a named span of positions, in place of ``pos``. Kinds ``dictionary`` and ``dictionary_error`` are a
    feature of a dictionary at a site, and what it leaves out; ``label`` is the site.
    """

    tower: str
    kind: str
    layer: int = -1
    head: int = -1
    feature: int = -1
    label: str = ""
    pos: int = -1
    span: str = ""

    def __str__(self) -> str:
        return format_id(self)


def _pattern(template: str) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
    for field, group in {**_NUMBER, "label": _LABEL}.items():
        text = text.replace("{" + field + "}", group)
    return re.compile(text, re.ASCII)


_PATTERNS = {kind: _pattern(template) for kind, (template, _) in _FORMS.items()}


def format_id(node: NodeName) -> str:
    """The id of a node.

    Raises:
        InputError: an unknown tower or kind, a missing part, or a part that the kind does not have (it would be lost).
    """
    if node.tower not in TOWER_LETTERS:
        raise InputError(f"Unknown tower {node.tower!r}; known are {', '.join(TOWER_LETTERS)}.")
    if node.kind not in _FORMS:
        raise InputError(f"Unknown node kind {node.kind!r}; known are {', '.join(_FORMS)}.")
    if (node.kind == "connector") != (node.tower == "connector"):
        raise InputError(f"Nodes of kind 'connector' belong to the tower 'connector' and only they do; got {node!r}.")
    template, needed = _FORMS[node.kind]
    for field in ("layer", "head", "feature", "label"):
        value = getattr(node, field)
        given = value != "" if field == "label" else value >= 0
        if given != (field in needed):
            state = "needs" if field in needed else "has no"
            raise InputError(f"A node of kind {node.kind!r} {state} {field}; got {value!r}.")
    for given in (node.label, node.span):
        if given and not re.fullmatch(_LABEL, given, re.ASCII):
            raise InputError(
                f"{given!r} is no name: lower-case letters, digits and underscores, starting with a letter."
            )
    if node.span and node.pos >= 0:
        raise InputError(f"A node is at a position or at a span of them; got {node.pos} and {node.span!r}.")
    name = template.format(layer=node.layer, head=node.head, feature=node.feature, label=node.label)
    position = f"@{node.span or node.pos}" if node.span or node.pos >= 0 else ""
    return f"{TOWER_LETTERS[node.tower]}.{name}{position}"


def parse_id(text: str) -> NodeName:
    """The parts of a node id: the inverse of :func:`format_id`.

    Raises:
        InputError: not an id of this grammar.
    """
    letter, dot, rest = text.partition(".")
    tower = _TOWER_NAMES.get(letter, "")
    name, at, position = rest.partition("@")
    numbered = re.fullmatch(r"0|[1-9]\d*", position, re.ASCII) is not None
    if not dot or not tower or (at and not numbered and not re.fullmatch(_LABEL, position, re.ASCII)):
        raise InputError(f"{text!r} is no node id; ids look like v.a3.h5, l.logits, x.projector or l.tc2.f17@9.")
    for kind, pattern in _PATTERNS.items():
        if (kind == "connector") != (tower == "connector"):
            continue
        match = pattern.fullmatch(name)
        if match:
            parts = match.groupdict()
            given: dict[str, Any] = {
                field: int(parts[field]) for field in ("layer", "head", "feature") if field in parts
            }
            given |= {"pos": int(position)} if numbered else {"span": position}
            return NodeName(tower, kind, label=parts.get("label") or "", **given)
    raise InputError(f"{text!r} is no node id: the part after the tower fits none of the known forms.")


def head_id(tower: str, layer: int, head: int) -> str:
    """The id of an attention head, for example ``v.a3.h5``."""
    return format_id(NodeName(tower, "head", layer=layer, head=head))


_UNIT_LABELS = {"H": ("head", "head"), "kv": ("kv_head", "head"), "G": ("neuron_group", "feature")}


def unit_id(tower: str, layer: int, label: int | str) -> str:
    """The id of a unit by its label within a layer: a head's number or ``"H3"``, ``"mlp"``, ``"kv0"`` (a group of key and value heads), ``"G2"`` (a
    group of neurons).

    Raises:
        InputError: another label.
    """
    if isinstance(label, int):
        return head_id(tower, layer, label)
    if label == "mlp":
        return format_id(NodeName(tower, "mlp", layer=layer))
    match = re.fullmatch(r"(?P<kind>H|kv|G)(?P<number>\d+)", label, re.ASCII)
    if match is None:
        raise InputError(f"{label!r} is no label of a unit: 'H3', 'mlp', 'kv0' or 'G2'.")
    kind, field = _UNIT_LABELS[match["kind"]]
    number: dict[str, Any] = {field: int(match["number"])}
    return format_id(NodeName(tower, kind, layer=layer, **number))


SLOTS = ("q", "k", "v", "in", "img", "txt")
"""What an edge enters: the query, key or value input of a head, the one input of anything else, either side of a dual encoder's logits."""
_EDGE = re.compile(rf"(?P<sender>.+?)->(?P<receiver>[^<>]+)(?:<(?P<slot>{'|'.join(SLOTS)})>)?", re.ASCII)


def format_edge(sender: NodeName | str, receiver: NodeName | str, slot: str) -> str:
    """The id of an edge: ``"v.m0->v.a1.h1<k>"``; the slot ``in`` is not written.

    Raises:
        InputError: an end that is no node, or an unknown slot.
    """
    if slot not in SLOTS:
        raise InputError(f"There is no slot {slot!r}; slots are {', '.join(SLOTS)}.")
    ends = [format_id(parse_id(end) if isinstance(end, str) else end) for end in (sender, receiver)]
    return "->".join(ends) + (f"<{slot}>" if slot != "in" else "")


def parse_edge(text: str) -> tuple[NodeName, NodeName, str]:
    """Sender, receiver and slot of an edge's id: the inverse of :func:`format_edge`.

    Raises:
        InputError: not an id of this grammar.
    """
    match = _EDGE.fullmatch(text)
    if match is None or match["slot"] == "in":
        raise InputError(f"{text!r} is no edge; edges look like v.input->v.a0.h1<k> or v.a0.h1->v.m0.")
    return parse_id(match["sender"]), parse_id(match["receiver"]), match["slot"] or "in"


# -- spellings ---------------------------------------------------------------------------------------------------------------------------------

Component = Any
"""Anything that :func:`component` reads: a string, a tuple of numbers, a :class:`NodeName`."""

_TOWER = r"(?:(?P<tower>[a-z][a-z0-9_]*)[. ])?"
_SPELLINGS = {
    "head": (
        rf"{_TOWER}L(?P<layer>\d+) ?H(?P<head>\d+)",
        r"(?:(?P<tower>[a-z][a-z0-9_]*) )?layer (?P<layer>\d+),? head (?P<head>\d+)",
    ),
    "neuron": (rf"{_TOWER}L(?P<layer>\d+)N(?P<feature>\d+)",),
    "mlp": (rf"{_TOWER}L(?P<layer>\d+)\.?(?:mlp|MLP)",),
    "attn": (rf"{_TOWER}L(?P<layer>\d+)\.attn",),
}
_SPELLED = [(kind, re.compile(text, re.ASCII)) for kind, texts in _SPELLINGS.items() for text in texts]
_INDEXED = re.compile(r"(?P<site>[a-z][a-z0-9_.]*)\[(?P<number>\d+)\]", re.ASCII)
_EXAMPLES = "'vision L1H3', 'L1H3', 'v.a1.h3', (1, 3), ('vision', 1, 3) or 'vision.blocks.1.attn.hook_z[3]'"
_SITES = {"head": "attn.hook_z", "attn": "hook_attn_out", "mlp": "hook_mlp_out", "neuron": "mlp.hook_post"}


def head_name(layer: int | str, head: int | str, tower: str = "") -> str:
    """``"vision L1H3"``, or ``"L1H3"`` without a tower; spelled out where one of them is no number (an attention pool, a mean over heads)."""
    numbers = isinstance(layer, int) and isinstance(head, int)
    return f"{tower} {f'L{layer}H{head}' if numbers else f'layer {layer} head {head}'}".lstrip()


def spelled(part: Component) -> str:
    """A component as figures and tables print it: ``"vision L1H3"``, ``"vision L2.mlp"``; a node of another kind by its id."""
    node = component(part)
    before = f"{node.tower} " if node.tower else ""
    if node.kind == "head":
        return head_name(node.layer, node.head, node.tower)
    if node.kind == "neuron":
        return f"{before}L{node.layer}N{node.feature}"
    return f"{before}L{node.layer}.{node.kind}" if node.kind in ("mlp", "attn") else format_id(node)


def component(part: Component) -> NodeName:
    """The component that a spelling means; ``tower`` is empty where it names none.

    Raises:
        InputError: no spelling of a component.
    """
    node = _read(part)
    if node is None:
        raise InputError(f"{part!r} is no component; a head is spelled {_EXAMPLES}.")
    return node


def is_component(part: Any) -> bool:
    """Whether something is spelled as a component (and not as a site or a number)."""
    return _read(part) is not None


def _read(part: Any) -> NodeName | None:
    if isinstance(part, NodeName):
        return part
    if isinstance(part, str):
        return _read_text(part)
    if not isinstance(part, (tuple, list)) or len(part) not in (2, 3):
        return None
    layer, head = part[-2:]
    tower = part[0] if len(part) == 3 else ""
    if any(isinstance(n, bool) or not isinstance(n, (int, np.integer)) for n in (layer, head)):
        return None
    if not isinstance(tower, str):
        return None
    return NodeName(tower, "head", layer=int(layer), head=int(head))


def _read_text(text: str) -> NodeName | None:
    for kind, pattern in _SPELLED:
        match = pattern.fullmatch(text)
        if match:
            parts = match.groupdict()
            layer, head, feature = (int(parts.get(name, -1)) for name in ("layer", "head", "feature"))
            return NodeName(parts["tower"] or "", kind, layer, head, feature)
    match = _INDEXED.fullmatch(text)
    if match:
        site = SiteName.parse(match["site"])
        if site.layer is None or not (site.has_heads or site.site == _SITES["neuron"]):
            return None
        if site.counts_key_heads:
            return NodeName(site.tower, "kv_head", layer=site.layer, head=int(match["number"]))
        if site.has_heads:
            return NodeName(site.tower, "head", layer=site.layer, head=int(match["number"]))
        return NodeName(site.tower, "neuron", layer=site.layer, feature=int(match["number"]))
    try:
        return parse_id(text)
    except InputError:
        return None


def heads_of(parts: Component | Iterable[Component], towers: Mapping[str, Any], tower: str = "") -> list[NodeName]:
    """The heads of a model that spellings mean, each once, in the order given; one spelling stands for itself.

    ``tower`` is meant where a spelling names none; without it the model's only tower.

    Raises:
        InputError: something else than a head, a head that the model does not have, or one that several towers have.
    """
    listed = [parts] if is_component(parts) or isinstance(parts, str) else list(parts)
    return list(dict.fromkeys(_head_of(part, towers, tower) for part in listed))


def _head_of(part: Component, towers: Mapping[str, Any], tower: str) -> NodeName:
    node = component(part)
    if node.kind != "head" or node.pos >= 0 or node.span:
        raise InputError(f"{part!r} is not a head over all positions; a head is spelled {_EXAMPLES}.")
    name = node.tower or tower or (next(iter(towers)) if len(towers) == 1 else "")
    if not name:
        ways = ", ".join(head_name(node.layer, node.head, other) for other in towers)
        raise InputError(f"{spelled(node)} may be of several towers; write one of {ways}.")
    if name not in towers:
        raise InputError(f"{part!r} is of the tower {name!r}; this model has {', '.join(towers)}.")
    cfg = towers[name].cfg
    layer, head = _counted(node.layer, cfg.n_layers), _counted(node.head, cfg.n_heads)
    if layer is None or head is None:
        raise InputError(
            f"There is no {head_name(node.layer, node.head)}: the {name} tower has {cfg.n_layers} layers of {cfg.n_heads} heads, counted "
            "from 0."
        )
    return replace(node, tower=name, layer=layer, head=head)


def _counted(number: int, count: int) -> int | None:
    """A number from 0, negative ones from the end; None outside."""
    return number % count if -count <= number < count else None


def site_of(part: Component) -> tuple[str, int | None]:
    """The site whose value a component is, and its number on the site's head axis, if any: ``("vision.blocks.1.attn.hook_z", 3)``.

    Without a tower the site has none either, ``"blocks.1.attn.hook_z"``, which fits models of one tower.

    Raises:
        InputError: a component that no site holds by itself.
    """
    if isinstance(part, str) and (match := _INDEXED.fullmatch(part)) and SiteName.parse(match["site"]).has_heads:
        return match["site"], int(match["number"])
    node = component(part)
    if node.pos >= 0 or node.span:
        raise InputError(f"{part!r} names positions; give positions={node.span or node.pos!r} beside the component.")
    if node.kind not in _SITES:
        raise InputError(f"{part!r} has no site of its own; give a site's name, such as 'vision.blocks.1.attn.hook_v'.")
    if node.kind == "neuron":
        name = (
            SiteName(node.tower, node.layer, _SITES["neuron"]) if node.tower else f"blocks.{node.layer}.mlp.hook_post"
        )
        raise InputError(f"{part!r} is a neuron: edits.overwrite({str(name)!r}, {node.feature}, value) sets it.")
    if node.layer < 0:
        raise InputError(f"{part!r} counts layers from the end, and an edit knows no model; give the layer's number.")
    site = f"blocks.{node.layer}.{_SITES[node.kind]}"
    return (f"{node.tower}.{site}" if node.tower else site), (node.head if node.kind == "head" else None)

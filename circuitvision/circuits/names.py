"""Node ids of circuit graphs: one grammar, formatted and parsed in one place.

``{tower}.{name}`` or ``{tower}.{name}@{position}``. Towers are one letter (``v`` vision, ``v2`` a second vision
backbone, ``t`` text, ``l`` language, ``a`` action, ``q`` Q-former, ``d`` decoder, ``x`` connector). Component names
follow EAP-IG (Hanna et al., 2024), the field's common form: ``input``, ``a{layer}.h{head}``, ``kv{layer}.g{group}``,
``m{layer}``, ``logits``. Features, errors, embeddings, biases, targets and actions have forms of their own (see
``_FORMS``).

Two different nodes never share an id, and ``parse(format(node)) == node``: collisions between error and feature ids
have corrupted attribution graphs elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from circuitvision.errors import InputError
from circuitvision.results import head_name

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
    "mlp": ("m{layer}", ("layer",)),
    "neuron": ("m{layer}.n{feature}", ("layer", "feature")),
    "feature": ("tc{layer}.f{feature}", ("layer", "feature")),
    "error": ("err{layer}", ("layer",)),
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

    ``head`` is the group for ``kv_head``; ``feature`` is the neuron, class or action dimension for those kinds;
    ``pos`` is the step for actions.
    """

    tower: str
    kind: str
    layer: int = -1
    head: int = -1
    feature: int = -1
    label: str = ""
    pos: int = -1

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
    if node.label and not re.fullmatch(_LABEL, node.label):
        raise InputError(
            f"{node.label!r} is no name: lower-case letters, digits and underscores, starting with a letter."
        )
    name = template.format(layer=node.layer, head=node.head, feature=node.feature, label=node.label)
    position = f"@{node.pos}" if node.pos >= 0 else ""
    return f"{TOWER_LETTERS[node.tower]}.{name}{position}"


def parse_id(text: str) -> NodeName:
    """The parts of a node id: the inverse of :func:`format_id`.

    Raises:
        InputError: not an id of this grammar.
    """
    letter, dot, rest = text.partition(".")
    tower = _TOWER_NAMES.get(letter, "")
    name, at, position = rest.partition("@")
    if not dot or not tower or (at and not re.fullmatch(r"0|[1-9]\d*", position, re.ASCII)):
        raise InputError(f"{text!r} is no node id; ids look like v.a3.h5, l.logits, x.projector or l.tc2.f17@9.")
    for kind, pattern in _PATTERNS.items():
        if (kind == "connector") != (tower == "connector"):
            continue
        match = pattern.fullmatch(name)
        if match:
            parts = match.groupdict()
            numbers = {field: int(parts[field]) for field in ("layer", "head", "feature") if field in parts}
            return NodeName(tower, kind, **numbers, label=parts.get("label") or "", pos=int(position) if at else -1)
    raise InputError(f"{text!r} is no node id: the part after the tower fits none of the known forms.")


def head_id(tower: str, layer: int, head: int) -> str:
    """The id of an attention head, for example ``v.a3.h5``."""
    return format_id(NodeName(tower, "head", layer=layer, head=head))


def spoken(text: str) -> str:
    """A node as figures and summaries name it: ``"vision L1H3"`` for ``"v.a1.h3"``; ids of other nodes as they are."""
    node = parse_id(text)
    return f"{node.tower} {head_name(node.layer, node.head)}" if node.kind == "head" and node.pos < 0 else text

"""The units of head importance: heads, MLPs, groups of key and value heads, groups of neurons, connectors and the inputs of towers.

A unit is one or several places of the model (:class:`~circuitvision.patching.components.Place`) that are changed together. What it receives enters
through *slots*: to hold one of them is to keep, while other things change, what the unit makes of it.

* head: ``q`` holds ``attn.hook_q``, ``k`` holds ``attn.hook_pattern`` (with the queries held before, what is left of it are the keys), ``v`` holds
  ``attn.hook_z``. They are the head's own also where keys and values are those of a group.
* group of key and value heads (``l.kv1.g0``): ``k`` and ``v``, ``attn.hook_k`` and ``attn.hook_v``.
* MLP and group of neurons (``l.m1``, ``l.m1.g3``): ``in``, ``hook_mlp_out`` and the group's part of ``mlp.hook_post``.

Not covered: heads of attention pooling and of cross-attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from circuitvision.errors import InputError
from circuitvision.model.edits.writes import width_of
from circuitvision.model.names import NodeName, format_id
from circuitvision.patching.cells import neuron_groups
from circuitvision.patching.components import Place

UNITS = ("heads", "mlps", "kv_heads", "neurons")
_ORDER = {"kv_head": 0, "head": 1, "mlp": 2, "neuron_group": 2}
"""The order of units within a block."""
HOOKS = {"kv_head": "attn.hook_k", "head": "attn.hook_z", "mlp": "hook_mlp_out", "neuron_group": "mlp.hook_post"}

Slots = tuple[tuple[str, tuple[Place, ...]], ...]


@dataclass(frozen=True)
class Unit:
    """What is changed as one. ``label`` is its name within its layer; ``slots`` maps the letters of what it receives, in their order, to all that is
    held once that slot is held; ``depth`` is (stage, layer, place in the block)."""

    id: str
    kind: str
    tower: str
    layer: int
    label: str
    places: tuple[Place, ...]
    slots: Slots = ()
    depth: tuple[int, int, int] = (0, 0, 0)

    @property
    def sites(self) -> list[str]:
        """The sites that are changed."""
        return [place.site for place in self.places]

    @property
    def held_sites(self) -> list[str]:
        """The sites that are held."""
        return [place.site for _, places in self.slots for place in places]


def units_of(model: Any, towers: Sequence[str], kinds: Sequence[str], neurons: Any = 8) -> list[Unit]:
    """All units of some kinds in some towers, in the model's order.

    ``neurons`` says how the neurons of each MLP are grouped: how many equal runs, or groups of numbers.

    Raises:
        InputError: an unknown kind or tower, or a kind of which there is no unit.
    """
    unknown = [kind for kind in kinds if kind not in UNITS]
    if unknown or not kinds:
        raise InputError(f"units={list(kinds)} is not understood: some of {', '.join(map(repr, UNITS))}.")
    missing = [name for name in towers if name not in model.towers]
    if missing or not towers:
        raise InputError(f"towers={list(towers)}: this model has {', '.join(model.towers)}.")
    there = set(model.sites("**"))
    found = []
    for kind in kinds:
        made = [
            unit
            for tower in towers
            for layer in range(model.towers[tower].cfg.n_layers)
            for unit in _MAKERS[kind](model, tower, layer, there, neurons)
        ]
        if not made:
            raise InputError(
                f"The towers {', '.join(towers)} have no {kind.replace('_', ' ')} whose sites can be written."
            )
        found += made
    return sorted(found, key=lambda unit: unit.depth)


def _heads(model: Any, tower: str, layer: int, there: set[str], neurons: Any) -> list[Unit]:
    block = f"{tower}.blocks.{layer}"
    z, q, pattern = (f"{block}.attn.hook_{stage}" for stage in ("z", "q", "pattern"))
    if z not in there:
        return []
    found = []
    for head in range(model.towers[tower].cfg.n_heads):
        at = {site: (Place(site, heads=(head,)),) for site in (z, q, pattern)}
        slots: Slots = (("in", at[z]),)
        if {q, pattern} <= there:
            slots = (("q", at[q]), ("k", at[pattern]), ("v", at[z]))
        found.append(_unit(model, NodeName(tower, "head", layer=layer, head=head), f"H{head}", at[z], slots))
    return found


def _mlps(model: Any, tower: str, layer: int, there: set[str], neurons: Any) -> list[Unit]:
    site = f"{tower}.blocks.{layer}.hook_mlp_out"
    if site not in there:
        return []
    places = (Place(site),)
    return [_unit(model, NodeName(tower, "mlp", layer=layer), "mlp", places, (("in", places),))]


def _kv_heads(model: Any, tower: str, layer: int, there: set[str], neurons: Any) -> list[Unit]:
    keys, values = (f"{tower}.blocks.{layer}.attn.hook_{stage}" for stage in ("k", "v"))
    if not {keys, values} <= there:
        return []
    found = []
    for group in range(model.towers[tower].cfg.n_kv_heads):
        one, other = (Place(site, heads=(group,)) for site in (keys, values))
        slots: Slots = (("k", (one,)), ("v", (one, other)))
        found.append(
            _unit(model, NodeName(tower, "kv_head", layer=layer, head=group), f"kv{group}", (one, other), slots)
        )
    return found


def _neuron_groups(model: Any, tower: str, layer: int, there: set[str], neurons: Any) -> list[Unit]:
    site = f"{tower}.blocks.{layer}.mlp.hook_post"
    if site not in there:
        return []
    width = width_of(model, site)
    if width is None:
        raise InputError(f"{site} has no known number of neurons.")
    found = []
    for number, group in enumerate(neuron_groups(neurons, width).values()):
        places = (Place(site, neurons=group),)
        node = NodeName(tower, "neuron_group", layer=layer, feature=number)
        found.append(_unit(model, node, f"G{number}", places, (("in", places),)))
    return found


_MAKERS = {"heads": _heads, "mlps": _mlps, "kv_heads": _kv_heads, "neurons": _neuron_groups}


def _unit(model: Any, node: NodeName, label: str, places: tuple[Place, ...], slots: Slots) -> Unit:
    depth = (model.flow.stages.index(node.tower), node.layer, _ORDER[node.kind])
    return Unit(format_id(node), node.kind, node.tower, node.layer, label, places, slots, depth)


def by_kind(units: Sequence[Unit]) -> list[Unit]:
    """Units by kind, heads first, then by their number within a layer."""
    kinds = ("head", "mlp", "kv_head", "neuron_group")
    return sorted(units, key=lambda unit: (kinds.index(unit.kind), int(unit.label.strip("HkvGmlp") or 0)))


def connectors_of(model: Any) -> list[Unit]:
    """What leads from one tower to another, in the order in which it runs."""
    found = []
    for site in connector_sites(model):
        name, places = site.split(".")[0], (Place(site),)
        node = NodeName("connector", "connector", label=name)
        depth = (model.flow.stages.index(name), 0, 0)
        found.append(Unit(format_id(node), "connector", "connector", -1, name, places, (("in", places),), depth))
    return found


def inputs_of(model: Any) -> list[Unit]:
    """What enters block 0 of each tower that reads pictures: all that the tower knows of the image. Nothing enters these."""
    found = []
    for site in input_sites(model):
        tower = site.split(".")[0]
        node = NodeName(tower, "input")
        found.append(
            Unit(
                format_id(node),
                "input",
                tower,
                -1,
                "image",
                (Place(site),),
                (),
                (model.flow.stages.index(tower), -1, 0),
            )
        )
    return found


def connector_sites(model: Any) -> list[str]:
    """The outputs of the modules that lead from one tower to another, for example ``projector.hook_out``."""
    outputs = [name for name in model.sites("**") if name.count(".") == 1 and name.endswith(".hook_out")]
    return [name for name in outputs if name.split(".")[0] not in model.towers]


def input_sites(model: Any) -> list[str]:
    """The sites of what enters block 0 of each tower that reads pictures."""
    there = set(model.sites("**"))
    names = [f"{name}.hook_input" for name, tower in model.towers.items() if reads_images(tower)]
    return [name for name in names if name in there]


def hook_of(node: NodeName) -> str:
    """The site of a unit, the first of several."""
    site = HOOKS[node.kind]
    return f"{node.tower}.blocks.{node.layer}.{site}"


def reads_images(tower: Any) -> bool:
    """Whether what a tower reads is a picture."""
    return bool(getattr(getattr(tower, "stack", None), "image", False))


def modality_of(tower: Any) -> str:
    """What the positions of a tower are: "image", "text" or "action"."""
    if reads_images(tower):
        return "image"
    return "action" if getattr(getattr(tower, "spec", None), "runs", "") == "per_denoising_step" else "text"

"""Networks built by hand whose circuit is known exactly: every edge of it, and what each does by itself.

They are transformers' own classes (:class:`ViTForImageClassification`, :class:`LlavaForConditionalGeneration`) with weights that are set and not
trained, wrapped like any other model: what a method finds in them is right or wrong. ``build(name)`` gives a
:class:`~circuitvision.organisms.handbuilt.known.HandBuilt`: the model, pairs of inputs, a metric, and the effects of the circuit's edges;
``build(name, noise=1e-3, seed=s)`` adds noise to every component, so that edges outside the circuit have small effects too: all but those that carry
the same in both runs (what a class token knows of itself), and those into the scores of a saturated softmax.

========================  ==============================================================================================================
``marker-pointer``        a head points at the marked patch and copies its colour; the mark moves (keys)
``marker-colour``         the same, the colours change (values)
``saturated-keys``        the same as ``marker-pointer``, with keys so large that gradients vanish
``and`` ``or`` ``xor``    two heads read one bit each, an MLP computes a gate of them
``q-composition`` …       the second layer takes its queries (``k-``: keys, ``v-``: values) from the first
``backup-heads``          a head of the second layer answers where one of the first has not
``mlp-features``          a neuron at a patch, a head that brings it to the class token, a neuron there
``crossing``              vision head, projector, language head: the circuit of a LLaVA
========================  ==============================================================================================================

Not covered: how such circuits arise in training, features in superposition. The norms of these models do nothing (see
:mod:`circuitvision.organisms.handbuilt.weights`), so that they say nothing about how a method treats norms.
"""

from __future__ import annotations

import importlib
from typing import Any

from circuitvision.errors import InputError, checked_seed, nearest
from circuitvision.organisms.handbuilt.known import HandBuilt

__all__ = ["HandBuilt", "build", "names"]

TABLE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "marker-pointer": ("vit", "marker_pointer", {}),
    "marker-colour": ("vit", "marker_pointer", {"moved": "colour", "name": "marker-colour"}),
    "saturated-keys": ("vit", "marker_pointer", {"beta": 40.0, "name": "saturated-keys"}),
    "and": ("vit", "gate", {"kind": "and"}),
    "or": ("vit", "gate", {"kind": "or"}),
    "xor": ("vit", "gate", {"kind": "xor"}),
    "q-composition": ("vit", "composition", {"slot": "q"}),
    "k-composition": ("vit", "composition", {"slot": "k"}),
    "v-composition": ("vit", "composition", {"slot": "v"}),
    "backup-heads": ("vit", "backup", {}),
    "mlp-features": ("vit", "mlp_features", {}),
    "crossing": ("llava", "crossing", {}),
}
"""Name → module of this package, function in it, and its options."""


def names() -> list[str]:
    """The names of all hand-built networks, in the order of the table."""
    return list(TABLE)


def build(name: str, *, noise: float = 0.0, seed: int = 0) -> HandBuilt:
    """A hand-built network with its pairs, metric and circuit.

    Args:
        name: one of :func:`names`.
        noise: the standard deviation of normal noise on every weight of attention, MLPs, connector and read-out; 0 for none.
        seed: of the noise.

    Raises:
        InputError: no network has that name (the nearest names are given), noise below 0, a seed below 0.
    """
    if name not in TABLE:
        raise InputError(f"No hand-built network is called {name!r}; nearest: {', '.join(nearest(name, TABLE))}.")
    if not 0 <= noise < float("inf"):
        raise InputError(f"noise={noise} is no standard deviation; give 0 or more.")
    module, function, options = TABLE[name]
    made = getattr(importlib.import_module(f"{__name__}.{module}"), function)
    return made(noise=float(noise), seed=checked_seed(seed), **options)

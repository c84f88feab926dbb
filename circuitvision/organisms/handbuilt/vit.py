"""Hand-built vision transformers: transformers' own ``ViTForImageClassification`` of four patches of one pixel.

The three channels of a pixel are what a patch says: a mark, and two numbers. Position 0 is the class token, whose stream is read out: logit 1 minus
logit 0 is the stream's ``answer``.

Closed forms use ``p = e^β / (e^β + 4)`` and ``q = 1 / (e^β + 4)``: what a head gives to the marked one and to each other one of five tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from circuitvision import metrics
from circuitvision.organisms.handbuilt.known import HandBuilt
from circuitvision.organisms.handbuilt.pictures import PATCHES, as_pixels, blank, marked, pointed, shares
from circuitvision.organisms.handbuilt.weights import (
    EPSILON,
    ONE,
    SATURATED,
    Directions,
    HeadWeights,
    Neuron,
    Terms,
    add_noise,
    clear,
    write_heads,
    write_neurons,
    write_readout,
)

PLACES = [f"place_{number}" for number in range(PATCHES)]
BETA = 6.0
"""The score of the marked patch: with five tokens it is given .990 of the attention, and a change of the score still has a gradient."""
_NONE = Neuron({"first_seen": -1.0, "second_seen": -1.0, ONE: 0.5}, {"answer": -2.0})
_BOTH = Neuron({"first_seen": 1.0, "second_seen": 1.0, ONE: -1.5}, {"answer": -2.0})
GATES: dict[str, tuple[Neuron, ...]] = {
    "and": (Neuron({"first_seen": 1.0, "second_seen": 1.0, ONE: -1.0}, {"answer": 1.0}),),
    "or": (_NONE,),
    "xor": (_NONE, _BOTH),
}
"""Gates of two bits: ``relu(a + b − 1)``, ``1 − 2 relu(½ − a − b)``, and the same less ``2 relu(a + b − 1½)``; the class token
starts with the 1. Where OR and XOR are 1 their neurons are off by a margin, so that neither gradients nor noise tell what they depend on."""


# -- building --------------------------------------------------------------------------------------------------------------------------------------


def _vit(
    directions: Directions,
    layers: Sequence[tuple[Sequence[HeadWeights], Sequence[Neuron]]],
    channels: Sequence[Terms],
    tokens: Sequence[Terms],
) -> Any:
    """The hooked model: what a unit of each channel writes, what each token (the class token first) is told of itself, and heads and neurons of
    every layer."""
    from transformers import ViTConfig, ViTForImageClassification

    from circuitvision.hooked import HookedModel

    n_heads = directions.width // directions.d_head
    config = ViTConfig(
        hidden_size=directions.width,
        num_hidden_layers=len(layers),
        num_attention_heads=n_heads,
        intermediate_size=max(4, *(len(neurons) for _, neurons in layers)),
        hidden_act="relu",
        image_size=2,
        patch_size=1,
        num_channels=3,
        layer_norm_eps=EPSILON,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    with torch.random.fork_rng(devices=[]):
        module = ViTForImageClassification(config).double().eval()
    clear(module)
    model = HookedModel(module)
    embeddings = module.vit.embeddings
    with torch.no_grad():
        for number, terms in enumerate(channels):
            embeddings.patch_embeddings.projection.weight[:, number, 0, 0] = directions.vector(terms)
        for number, terms in enumerate(tokens):
            embeddings.position_embeddings[0, number] = directions.vector(terms)
    for block, (heads, neurons) in zip(model.towers["vision"].blocks, layers, strict=True):
        write_heads(block, directions, heads)
        write_neurons(block, directions, neurons)
    write_readout(module.classifier, directions, {"answer": 1.0})
    return model


def _known(
    name: str,
    model: Any,
    clean: Tensor,
    corrupt: Tensor,
    effects: dict[str, float],
    ends: tuple[float, float],
    noise: float,
    seed: int,
) -> HandBuilt:
    """The network with its pictures (``[pair channel patch]``); a class is answered, 1 over 0."""
    from circuitvision.data import Pairs

    if noise:
        blocks = [block.module for block in model.towers["vision"].blocks]
        add_noise([*blocks, model.module.classifier], noise, seed)
    sides = [{"pixel_values": as_pixels(pictures)} for pictures in (clean, corrupt)]
    pairs = Pairs(inputs=sides[0], corrupt_inputs=sides[1], answers=1, foils=0)
    return HandBuilt(name, model, pairs, metrics.logit_diff(1, 0), effects, *ends, noise, seed)


_DECOY = HeadWeights([({"class": 3.0}, {"colour": 1.0})], [({"mark": 1.0}, {"junk": 1.0})])
"""Looks by colour and copies the mark to where nothing reads."""


# -- networks --------------------------------------------------------------------------------------------------------------------------------------


def marker_pointer(
    *, moved: str = "mark", beta: float = BETA, noise: float = 0.0, seed: int = 0, name: str = "marker-pointer"
) -> HandBuilt:
    """A head of the class token looks at the marked patch and copies its colour to the answer; a second head copies junk.

    One patch is coloured +1, one −1; the clean mark is on the first. ``moved="mark"`` moves the mark to the second: the key and the output of the
    head carry ``−2(p − q)``. ``moved="colour"`` swaps the colours: the value and the output do. With a large ``beta`` the keys are saturated: the
    effect is −2 and its gradient 0.
    """
    directions = Directions(["class", "mark", "colour", "answer", "junk"], 2)
    pointer = HeadWeights([({"class": beta}, {"mark": 1.0})], [({"colour": 1.0}, {"answer": 1.0})])
    model = _vit(directions, [((pointer, _DECOY), ())], [{"mark": 1.0}, {"colour": 1.0}], [{"class": 1.0}])
    clean, corrupt = marked(moved)
    there, elsewhere = pointed(beta)
    change = -2.0 * (there - elsewhere)
    slot = "k" if moved == "mark" else "v"
    effects = {f"v.input->v.a0.h0<{slot}>": change, "v.a0.h0->v.logits": change}
    return _known(name, model, clean, corrupt, effects, (there - elsewhere, elsewhere - there), noise, seed)


def gate(kind: str, *, noise: float = 0.0, seed: int = 0) -> HandBuilt:
    """Two heads read one bit each, the MLP computes a gate of them; a third head reads a bit that nothing uses.

    A bit is 1 where one patch is 1 in its channel; heads attend evenly and copy the sum. ``"and"`` and ``"or"``: both bits go from 1 to 0. Every edge
    of AND has the effect −1 by itself; the branches of OR have 0, each covers for the other, and only the MLP's output has −1. ``"xor"``: one bit
    changes at a time, either of them, in the mean −½ per branch; gradients at the clean run are 0.
    """
    bits = ("first", "second", "unused")
    directions = Directions([*bits, "first_seen", "second_seen", "unused_seen", "answer"], 3)
    heads = [HeadWeights([], [_summed(bit, f"{bit}_seen")]) for bit in bits]
    model = _vit(
        directions, [(heads, GATES[kind])], [{bit: 1.0} for bit in bits], [{"answer": 0.0 if kind == "and" else 1.0}]
    )
    both = [((1, 1), (0, 0))]
    one = [((1, 0), (0, 0)), ((1, 0), (1, 1)), ((0, 1), (0, 0)), ((0, 1), (1, 1))]
    cases = list(itertools.product(one if kind == "xor" else both, range(PATCHES)))
    clean, corrupt = blank(len(cases)), blank(len(cases))
    for number, ((before, after), place) in enumerate(cases):
        # The unused bit changes with the others; the two that are used lie on neighbouring patches.
        for side, (first, second), unused in ((clean, before, place % 2), (corrupt, after, 1 - place % 2)):
            side[number, 0, place], side[number, 1, place - 1], side[number, 2, place] = first, second, unused
    branch = {"and": -1.0, "or": 0.0, "xor": -0.5}[kind]
    effects = {f"v.input->v.a0.h{head}<v>": branch for head in (0, 1)}
    effects |= {f"v.a0.h{head}->v.m0": branch for head in (0, 1)}
    return _known(kind, model, clean, corrupt, {**effects, "v.m0->v.logits": -1.0}, (1.0, 0.0), noise, seed)


def _summed(read: str, written: str) -> tuple[Terms, Terms]:
    """What a head that attends evenly to the class token and four patches copies: the sum over them."""
    return {read: PATCHES + 1.0}, {written: 1.0}


def composition(slot: str, *, beta: float = BETA, noise: float = 0.0, seed: int = 0) -> HandBuilt:
    """Two layers of heads, the second of which takes its query, key or value from the first.

    ``"q"``: the first head of the class token looks at the marked patch and writes the place behind it; the second looks there and copies the
    colour. ``"k"``: every patch takes the mark of the patch before it, and the second head looks at the one that has it. ``"v"``: every patch takes
    the colour of the patch before it, and the second head, which looks at the marked patch, copies that. Each layer has a decoy.
    """
    build = {"q": _query_composition, "k": _key_composition, "v": _value_composition}[slot]
    directions = Directions(["class", "mark", "colour", *PLACES, *_AHEAD, "taken", "answer", "junk"], 2)
    first, second, clean, corrupt, into, size = build(beta)
    layers = [((first, _DECOY), ()), ((_DECOY, second), ())]
    model = _vit(
        directions, layers, [{"mark": 1.0}, {"colour": 1.0}], [{"class": 1.0}, *({place: 1.0} for place in PLACES)]
    )
    effects = {
        f"v.input->v.a0.h0<{into}>": -2.0 * size,
        f"v.a0.h0->v.a1.h1<{slot}>": -2.0 * size,
        "v.a1.h1->v.logits": -2.0 * size,
    }
    return _known(f"{slot}-composition", model, clean, corrupt, effects, (size, -size), noise, seed)


_AHEAD = [f"ahead_{number}" for number in range(PATCHES)]
_BEFORE = [(number - 1) % PATCHES for number in range(PATCHES)]
# Every patch looks at the one before it, the class token at itself.
_PREVIOUS = [
    ({"class": SATURATED}, {"class": 1.0}),
    *(({PLACES[i]: SATURATED}, {PLACES[_BEFORE[i]]: 1.0}) for i in range(PATCHES)),
]
_COPY = [({"colour": 1.0}, {"answer": 1.0})]


def _query_composition(beta: float) -> tuple[Any, ...]:
    ahead = [({PLACES[_BEFORE[i]]: 1.0}, {_AHEAD[i]: 1.0}) for i in range(PATCHES)]
    first = HeadWeights([({"class": beta}, {"mark": 1.0})], ahead)
    second = HeadWeights([({_AHEAD[i]: beta}, {PLACES[i]: 1.0}) for i in range(PATCHES)], _COPY)
    clean, corrupt = marked("mark")
    # The colours lie one patch behind the marks.
    for side in (clean, corrupt):
        side[:, 1] = side[:, 1].roll(1, dims=-1)
    seen, unseen = pointed(beta)
    there, elsewhere, *_ = shares([beta * seen, beta * unseen, beta * unseen, beta * unseen, 0.0])
    return first, second, clean, corrupt, "k", there - elsewhere


def _key_composition(beta: float) -> tuple[Any, ...]:
    first = HeadWeights(_PREVIOUS, [({"mark": 1.0}, {"taken": 1.0})])
    second = HeadWeights([({"class": beta}, {"taken": 1.0})], _COPY)
    clean, corrupt = marked("mark")
    for side in (clean, corrupt):
        side[:, 1] = side[:, 1].roll(1, dims=-1)
    there, elsewhere = pointed(beta)
    return first, second, clean, corrupt, "v", there - elsewhere


def _value_composition(beta: float) -> tuple[Any, ...]:
    first = HeadWeights(_PREVIOUS, [({"colour": 1.0}, {"taken": 1.0})])
    second = HeadWeights([({"class": beta}, {"mark": 1.0})], [({"taken": 1.0}, {"answer": 1.0})])
    clean, corrupt = marked("colour")
    # The marks lie one patch behind the colours.
    for side in (clean, corrupt):
        side[:, 0] = side[:, 0].roll(1, dims=-1)
    there, elsewhere = pointed(beta)
    return first, second, clean, corrupt, "v", there - elsewhere


def backup(*, beta: float = 24.0, noise: float = 0.0, seed: int = 0) -> HandBuilt:
    """A head writes the answer, and a head of the next layer writes it from another source unless the first one has.

    The first head copies one number and thereby turns the query of the second away from the first patch, where it would copy the other number. Both
    numbers go from 1 to 0. What the first head reads has next to no effect by itself, since the second steps in; its output has −1, and what the
    second head's query takes from it +1.
    """
    directions = Directions(["primary_source", "backup_source", *PLACES, "done", "answer"], 2)
    copied, _ = _summed("primary_source", "answer")
    primary = HeadWeights([], [(copied, {"answer": 1.0, "done": 1.0})])
    second = HeadWeights(
        [({ONE: beta / 2, "done": -beta}, {PLACES[0]: 1.0})], [({"backup_source": 1.0}, {"answer": 1.0})]
    )
    layers = [((primary,), ()), ((second,), ())]
    model = _vit(
        directions,
        layers,
        [{}, {"primary_source": 1.0}, {"backup_source": 1.0}],
        [{}, *({place: 1.0} for place in PLACES)],
    )
    clean = blank(4)
    clean[:, 1:, 0] = 1.0
    corrupt = clean.clone()
    corrupt[:, 1:, 0] = 0.0
    # The other patches hold numbers that nothing reads.
    for row in range(4):
        clean[row, 0, row], corrupt[row, 0, (row + 1) % PATCHES] = 1.0, 1.0
    held_back, stepped_in = (pointed(sign * beta / 2)[0] for sign in (-1, 1))
    effects = {
        "v.input->v.a0.h0<v>": stepped_in - held_back - 1.0,
        "v.a0.h0->v.logits": -1.0,
        "v.a0.h0->v.a1.h0<q>": stepped_in - held_back,
        "v.input->v.a1.h0<v>": -held_back,
        "v.a1.h0->v.logits": -held_back,
    }
    return _known("backup-heads", model, clean, corrupt, effects, (1.0 + held_back, 0.0), noise, seed)


def mlp_features(*, noise: float = 0.0, seed: int = 0) -> HandBuilt:
    """A neuron at a patch is the AND of two numbers there, a head brings it to the class token, and a neuron of the next layer reads it.

    The MLPs are their own transcoders: feature 0 of each is a neuron, and feature 0 of the first reaches that of the second with ``activation ·
    pattern · (W_dec W_OV w_enc) = 1 · 1/5 · 5/2 = ½``. Feature 1 of the first layer fires as well, and nothing reads it.
    """
    directions = Directions(["first", "second", "both", "unread", "brought", "answer"], 2)
    features = [
        Neuron({"first": 1.0, "second": 1.0, ONE: -1.0}, {"both": 1.0}),
        Neuron({"first": 1.0}, {"unread": 1.0}),
    ]
    even = HeadWeights([], [({"both": (PATCHES + 1) / 2}, {"brought": 1.0})])
    reading = [Neuron({"brought": 1.0}, {"answer": 2.0})]
    channels: list[Terms] = [{"first": 1.0}, {"second": 1.0}]
    model = _vit(directions, [((), features), ((even,), reading)], channels, [])
    clean = blank(PATCHES)
    for place in range(PATCHES):
        clean[place, :2, place] = 1.0
    corrupt = clean.clone()
    corrupt[:, 1] = 0.0
    edges = ("v.input->v.m0", "v.m0->v.a1.h0<v>", "v.a1.h0->v.m1", "v.m1->v.logits")
    return _known("mlp-features", model, clean, corrupt, dict.fromkeys(edges, -1.0), (1.0, 0.0), noise, seed)

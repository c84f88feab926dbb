"""A hand-built vision-language model: transformers' own ``LlavaForConditionalGeneration``, a CLIP tower, a linear projector and a Llama.

Rotary positions turn no head dimension that is used: ``rope_theta`` is so large that all but the first do not move.
"""

from __future__ import annotations

from typing import Any

import torch

from circuitvision import metrics
from circuitvision.organisms.handbuilt.known import HandBuilt
from circuitvision.organisms.handbuilt.pictures import as_pixels, marked, pointed
from circuitvision.organisms.handbuilt.weights import (
    EPSILON,
    ONE,
    SATURATED,
    Directions,
    HeadWeights,
    Terms,
    add_noise,
    clear,
    write_heads,
    write_readout,
)

NO, YES, START, IMAGE, FIRST, SECOND = range(6)
"""The words: two answers, the start of a prompt, the place of an image feature, and two questions."""
_VISION = ["mark", "colour", "first_seen", "second_seen"]
_LANGUAGE = ["image", "first_asked", "second_asked", "first_seen", "second_seen", "answer"]


def crossing(*, moved: str = "colour", beta: float = 6.0, noise: float = 0.0, seed: int = 0) -> HandBuilt:
    """A vision head copies the colour of the marked patch to every patch; a language head fetches it from the image if the question asks for it.

    The second heads of both towers do the same for the number of the third channel, which the other question asks for; this prompt asks the first.
    ``moved="colour"`` swaps the colours of two patches, ``moved="mark"`` moves the mark. Every edge of the way has ``−2(p − q)``: into the vision
    head, from it to the projector, from there to the language head's values, and from that head to the answer.
    """
    vision = Directions(_VISION, 2)
    language = Directions(_LANGUAGE, 2, d_head=8)
    model = _llava(vision, language)
    _write(model, vision, language, beta)
    if noise:
        blocks = [block.module for tower in model.towers.values() for block in tower.blocks]
        add_noise([*blocks, model.module.model.multi_modal_projector, model.module.lm_head], noise, seed)
    clean, corrupt = marked(moved)
    for row in range(len(clean)):
        clean[row, 2, row % 4] = 1.0
        corrupt[row, 2, (row + 1) % 4] = 1.0
    from circuitvision.data import Pairs

    ids = torch.tensor([[START, *[IMAGE] * 4, FIRST]] * len(clean))
    shared = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sides = [{**shared, "pixel_values": as_pixels(pictures)} for pictures in (clean, corrupt)]
    pairs = Pairs(inputs=sides[0], corrupt_inputs=sides[1], answers=YES, foils=NO)
    there, elsewhere = pointed(beta)
    way = [
        f"v.input->v.a0.h0<{'k' if moved == 'mark' else 'v'}>",
        "v.a0.h0->x.projector",
        "x.projector->l.a0.h0<v>",
        "l.a0.h0->l.logits",
    ]
    effects = dict.fromkeys(way, -2.0 * (there - elsewhere))
    ends = (there - elsewhere, elsewhere - there)
    return HandBuilt("crossing", model, pairs, metrics.logit_diff(YES, NO), effects, *ends, noise, seed)


def _llava(vision: Directions, language: Directions) -> Any:
    """The hooked model, with every weight 0."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from circuitvision.hooked import HookedModel

    tower = CLIPVisionConfig(
        hidden_size=vision.width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=4,
        image_size=2,
        patch_size=1,
        hidden_act="relu",
        layer_norm_eps=EPSILON,
    )
    decoder = LlamaConfig(
        hidden_size=language.width,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=language.d_head,
        intermediate_size=4,
        vocab_size=6,
        attention_bias=True,
        rms_norm_eps=EPSILON,
        rope_parameters={"rope_type": "default", "rope_theta": 1e36},
        bos_token_id=START,
        eos_token_id=NO,
        pad_token_id=START,
    )
    config = LlavaConfig(
        vision_config=tower,
        text_config=decoder,
        image_token_index=IMAGE,
        image_seq_length=4,
        projector_hidden_act="linear",
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    with torch.random.fork_rng(devices=[]):
        module = LlavaForConditionalGeneration(config).double().eval()
    clear(module)
    return HookedModel(module)


def _write(model: Any, vision: Directions, language: Directions, beta: float) -> None:
    inner = model.module.model
    projector, embeddings = inner.multi_modal_projector, inner.vision_tower.embeddings
    words: dict[int, Terms] = {FIRST: {"first_asked": 1.0}, SECOND: {"second_asked": 1.0}}
    channels: list[Terms] = [{"mark": 1.0}, {"colour": 1.0}, {"second_seen": 1.0}]
    with torch.no_grad():
        for number, terms in enumerate(channels):
            embeddings.patch_embedding.weight[:, number, 0, 0] = vision.vector(terms)
        for name in ("first_seen", "second_seen"):
            projector.linear_1.weight += torch.outer(language.vector({name: 1.0}), vision.reader({name: 1.0})[0])
        projector.linear_2.weight.copy_(torch.eye(language.width))
        projector.linear_2.bias.copy_(language.vector({"image": 1.0}))
        for word, terms in words.items():
            inner.language_model.embed_tokens.weight[word] = language.vector(terms)
    looks = [({ONE: beta}, {"mark": 1.0})]
    seeing = [
        HeadWeights(looks, [({read: 1.0}, {written: 1.0})])
        for read, written in (("colour", "first_seen"), ("second_seen", "second_seen"))
    ]
    write_heads(model.towers["vision"].blocks[0], vision, seeing)
    fetching = []
    for mine, other in (("first", "second"), ("second", "first")):
        asked = [({f"{mine}_asked": SATURATED, f"{other}_asked": -SATURATED}, {"image": 1.0})]
        fetching.append(HeadWeights(asked, [({f"{mine}_seen": 1.0}, {"answer": 1.0})]))
    write_heads(model.towers["language"].blocks[0], language, fetching, d_first=1)
    write_readout(model.module.lm_head, language, {"answer": 1.0})

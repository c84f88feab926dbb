"""scenes-llava: a small LLaVA whose vision tower has to bind shape and colour before the language tower can answer."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import (
    CLIPImageProcessor,
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from circuitvision.data import binding
from circuitvision.data.binding import COLORS, DIRECTIONS, GRID, IMAGE_SIZE, PATCH, SHAPES, Scene
from circuitvision.data.binding_questions import vocabulary
from circuitvision.organisms.training import IMAGE, MEAN, STD, initialise, word_tokenizer

WIDTH = 96
INITIAL = 0.1
IGNORED = -100
PARTS = (len(COLORS), len(SHAPES), *(len(COLORS), len(SHAPES)) * len(DIRECTIONS), binding.OBJECTS, binding.OBJECTS)


def build() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An untrained model and its processor."""
    tokenizer = word_tokenizer(vocabulary(), image_token=True)
    vision = CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=IMAGE_SIZE,
        patch_size=PATCH,
        projection_dim=WIDTH,
        initializer_range=INITIAL,
    )
    language = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=INITIAL,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokenizer.get_vocab()[IMAGE],
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        image_seq_length=GRID * GRID,
    )
    model = LlavaForConditionalGeneration(config)
    initialise(model.model.vision_tower, INITIAL)
    initialise(model.model.multi_modal_projector, INITIAL)
    place_positions(model.model.vision_tower)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        max_new_tokens=2,
        do_sample=False,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(
            size={"shortest_edge": IMAGE_SIZE},
            crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
            image_mean=list(MEAN),
            image_std=list(STD),
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    return model, processor


@torch.no_grad()
def place_positions(vision: torch.nn.Module, size: float = 0.5) -> None:
    """Start the learned position embeddings as waves over rows and columns, so that nearby patches start alike."""
    table = vision.embeddings.position_embedding.weight
    half = table.shape[1] // 2
    waves = half // 2
    at = torch.arange(GRID).float()[:, None] * torch.pi * torch.arange(1, waves + 1) / (2 * GRID)
    axis = torch.cat([at.sin(), at.cos()], 1)[:, :half]
    rows = axis[:, None].expand(GRID, GRID, half)
    columns = axis[None].expand(GRID, GRID, half)
    table[1:] = torch.cat([rows, columns], -1).reshape(GRID * GRID, -1) * size


def pixel_values(scenes: list[Scene]) -> Tensor:
    return (
        torch.from_numpy(binding.render(scenes))
        .permute(0, 3, 1, 2)
        .float()
        .div_(255)
        .sub_(MEAN[0])
        .div_(STD[0])
        .contiguous()
    )


_COLOR = {name: number for number, name in enumerate(COLORS)}
_SHAPE = {name: number for number, name in enumerate(SHAPES)}


def patch_targets(scenes: list[Scene]) -> Tensor:
    """What every patch of an object should know, [scene patch part]: see PARTS. IGNORED elsewhere."""
    found = np.full((len(scenes), GRID * GRID, len(PARTS)), IGNORED)
    for row, scene in zip(found, scenes, strict=True):
        for thing in scene.objects:
            known = [_COLOR[thing.color], _SHAPE[thing.shape]]
            for direction in DIRECTIONS:
                other = scene.neighbor(thing, direction)
                known += [IGNORED, IGNORED] if other is None else [_COLOR[other.color], _SHAPE[other.shape]]
            known += [len(scene.find(color=thing.color)) - 1, len(scene.find(shape=thing.shape)) - 1]
            row[list(thing.patches)] = known
    return torch.from_numpy(found)

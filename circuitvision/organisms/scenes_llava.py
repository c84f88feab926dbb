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
from circuitvision.data import binding_questions as Q
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


QUESTIONS = 8


class Stream:
    """An endless stream of training batches: packed questions about pictures of trained pairs."""

    def __init__(
        self,
        rng: np.random.Generator,
        processor: LlavaProcessor,
        questions_per_image: int = QUESTIONS,
        repeat: float = 0.3,
    ) -> None:
        self.rng, self.number, self.repeat = rng, questions_per_image, repeat
        self.ids = processor.tokenizer.get_vocab()
        self.head = [self.ids["USER:"], *[self.ids[IMAGE]] * (GRID * GRID)]
        self.block = 11
        self.length = len(self.head) + self.number * self.block
        self.positions, self.mask = self._layout()
        self._known: dict = {}

    def scene(self):
        rng = self.rng
        if rng.random() < self.repeat:
            subject = binding.TRAIN_PAIRS[int(rng.integers(len(binding.TRAIN_PAIRS)))]
            scene = Q.count_scene(
                rng, subject, ("color", "shape")[int(rng.integers(2))], int(rng.integers(1, 4)), binding.TRAIN_PAIRS
            )
            possible = Q.questions(scene, ["count"])
            groups = [[q for q in possible if q.answer == n] for n in Q.NUMBERS]
        else:
            scene = binding.sample_scene(rng)
            possible = Q.questions(scene, ["color", "shape", "relation"])
            relations = [q for q in possible if q.kind == "relation"]
            groups = [
                [q for q in possible if q.kind == "color"],
                [q for q in possible if q.kind == "shape"],
                relations,
                relations,
            ]
        groups = [g for g in groups if g]
        chosen = []
        for i in range(self.number):
            g = groups[i % len(groups)]
            chosen.append(g[int(rng.integers(len(g)))])
        return scene, chosen

    def batch(self, size: int):
        scenes, rows, labels = [], [], []
        for _ in range(size):
            scene, chosen = self.scene()
            row, label = list(self.head), [IGNORED] * len(self.head)
            for question in chosen:
                tokens, asked = self._tokens(question)
                row += tokens
                label += asked
            scenes.append(scene)
            rows.append(row)
            labels.append(label)
        return (
            scenes,
            {
                "pixel_values": pixel_values(scenes),
                "input_ids": torch.tensor(rows),
                "position_ids": self.positions.expand(size, -1),
                "attention_mask": self.mask.expand(size, 1, -1, -1),
            },
            torch.tensor(labels),
        )

    def _tokens(self, question):
        key = question.text, question.answer
        if key not in self._known:
            words = question.prompt.split()[2:]
            tokens = [self.ids[word] for word in (*words, question.answer)]
            labels = [IGNORED] * (len(tokens) - 2) + [tokens[-1], self.ids["</s>"]]
            missing = self.block - len(tokens)
            assert missing >= 0, question.text
            self._known[key] = tokens + [self.ids["<pad>"]] * missing, labels + [IGNORED] * missing
        return self._known[key]

    def _layout(self):
        start = len(self.head)
        owner = torch.cat([torch.zeros(start), 1 + torch.arange(self.number).repeat_interleave(self.block)])
        within = torch.arange(self.block).repeat(self.number) + start
        positions = torch.cat([torch.arange(start), within])[None]
        causal = torch.ones(self.length, self.length, dtype=torch.bool).tril()
        seen = causal & ((owner[None] == 0) | (owner[None] == owner[:, None]))
        mask = torch.zeros(self.length, self.length).masked_fill(~seen, torch.finfo(torch.float32).min)
        return positions, mask[None, None]


@torch.no_grad()
def answered_right(model, processor, asked, batch: int = 100):
    """For every question whether the most likely token after the prompt is the answer."""
    found = []
    for start in range(0, len(asked), batch):
        part = asked[start : start + batch]
        inputs = processor(
            images=[scene.image for scene, _ in part],
            text=[question.prompt for _, question in part],
            padding=True,
            return_tensors="pt",
        )
        logits = model(**inputs).logits
        last = inputs["attention_mask"].sum(1) - 1
        said = logits[torch.arange(len(part)), last].argmax(-1)
        answers = processor.tokenizer.convert_tokens_to_ids([question.answer for _, question in part])
        found.append((said == torch.tensor(answers)).numpy())
    return np.concatenate(found)

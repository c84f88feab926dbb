"""Data with known answers: pairs of inputs to compare, and synthetic scenes with every object's attributes, box and mask.

``Pairs`` and ``Side`` hold any data set of raw examples; ``reading`` makes them from files and stored data sets, ``batches`` turns them into inputs,
``generated`` draws them. ``scenes`` draws pictures and minimal pairs, ``questions`` and ``captions`` put words to them; ``binding`` and
``binding_questions`` do so for scenes whose shapes and colours have to be bound, ``reach`` is a grid world to act in.
"""

from __future__ import annotations

from circuitvision.data.batches import Batch
from circuitvision.data.captions import Caption, Retrieval, sample_retrievals, true_captions
from circuitvision.data.generated import caption_pairs, largest_pairs, question_pairs, reach_pairs, reach_side
from circuitvision.data.pairs import Pairs, Tally
from circuitvision.data.questions import (
    Question,
    QuestionPair,
    largest,
    prompt,
    sample_largest,
    sample_question_pairs,
    sample_questions,
)
from circuitvision.data.scenes import (
    ALL_PAIRS,
    COLORS,
    SHAPES,
    SIZES,
    TEST_PAIRS,
    TRAIN_PAIRS,
    VALIDATION_PAIRS,
    MinimalPair,
    Scene,
    SceneObject,
    minimal_pair,
    render,
    sample_scene,
)
from circuitvision.data.sides import Example, Side

__all__ = [
    "ALL_PAIRS",
    "COLORS",
    "SHAPES",
    "SIZES",
    "TEST_PAIRS",
    "TRAIN_PAIRS",
    "VALIDATION_PAIRS",
    "Batch",
    "Caption",
    "Example",
    "MinimalPair",
    "Pairs",
    "Question",
    "QuestionPair",
    "Retrieval",
    "Scene",
    "SceneObject",
    "Side",
    "Tally",
    "caption_pairs",
    "largest",
    "largest_pairs",
    "minimal_pair",
    "prompt",
    "question_pairs",
    "reach_pairs",
    "reach_side",
    "render",
    "sample_largest",
    "sample_question_pairs",
    "sample_questions",
    "sample_retrievals",
    "sample_scene",
    "true_captions",
]

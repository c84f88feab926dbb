"""Data with known answers: pairs of inputs to compare, and synthetic scenes with every object's attributes, box and mask.

``Pairs`` and ``Side`` hold any data set of raw examples; ``reading`` makes them from files and stored data sets, ``batches`` turns them into inputs,
``generated`` draws them. ``scenes`` draws pictures and minimal pairs, ``questions`` and ``captions`` put words to them; ``binding`` and
``binding_questions`` do so for scenes whose shapes and colours have to be bound, ``reach`` is a grid world to act in, ``backgrounds`` draws objects
on backgrounds that go with their class.

Counterfactuals of a data set of any kind: ``masking`` and ``patch_edits`` change pictures, ``rewording`` changes texts, ``without_images`` leaves
pictures out; each returns ``Pairs`` with the edited side as corrupt, and refuses an edit that changes nothing or something else than it should.
``differences`` says what differs in pairs given, ``outcomes`` and ``priors`` what becomes of a model's answers, ``embeddings`` how far noise should
reach.
"""

from __future__ import annotations

from circuitvision.data.backgrounds import BackgroundScene, background_pairs, background_side, sample_backgrounds
from circuitvision.data.batches import Batch
from circuitvision.data.captions import Caption, Retrieval, sample_retrievals, true_captions
from circuitvision.data.differences import PictureDifferences, changed_patches, minimal_pairs, picture_differences
from circuitvision.data.embeddings import embedding_std
from circuitvision.data.generated import caption_pairs, largest_pairs, question_pairs, reach_pairs, reach_side
from circuitvision.data.masking import blank_images, mask_images
from circuitvision.data.outcomes import EditOutcomes, edit_outcomes, outcomes_of
from circuitvision.data.pairs import Pairs, Tally
from circuitvision.data.patch_edits import mask_patches, patch_boxes, swap_patches
from circuitvision.data.priors import PriorCalibration, calibrate_prior
from circuitvision.data.questions import (
    Question,
    QuestionPair,
    largest,
    prompt,
    sample_largest,
    sample_question_pairs,
    sample_questions,
)
from circuitvision.data.rewording import changed_tokens, draw_words, edit_texts, equal_length_words, replace_words
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
from circuitvision.data.without_images import text_shift, without_images

__all__ = [
    "ALL_PAIRS",
    "COLORS",
    "SHAPES",
    "SIZES",
    "TEST_PAIRS",
    "TRAIN_PAIRS",
    "VALIDATION_PAIRS",
    "BackgroundScene",
    "Batch",
    "Caption",
    "EditOutcomes",
    "Example",
    "MinimalPair",
    "Pairs",
    "PictureDifferences",
    "PriorCalibration",
    "Question",
    "QuestionPair",
    "Retrieval",
    "Scene",
    "SceneObject",
    "Side",
    "Tally",
    "background_pairs",
    "background_side",
    "blank_images",
    "calibrate_prior",
    "caption_pairs",
    "changed_patches",
    "changed_tokens",
    "draw_words",
    "edit_outcomes",
    "edit_texts",
    "embedding_std",
    "equal_length_words",
    "largest",
    "largest_pairs",
    "mask_images",
    "mask_patches",
    "minimal_pair",
    "minimal_pairs",
    "outcomes_of",
    "patch_boxes",
    "picture_differences",
    "prompt",
    "question_pairs",
    "reach_pairs",
    "reach_side",
    "render",
    "replace_words",
    "sample_backgrounds",
    "sample_largest",
    "sample_question_pairs",
    "sample_questions",
    "sample_retrievals",
    "sample_scene",
    "swap_patches",
    "text_shift",
    "true_captions",
    "without_images",
]

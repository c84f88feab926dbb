"""The main job in one call: from a pair of images to a circuit, as files to look at and graphs to compute with.

Two images that a model answers differently give: the lens of the two answers over layers and image patches, the effect of patching every head that
the images reach, the graph of the strongest heads across towers and connectors, and a report that shows all of it. What an answer is goes by the
model's output head (:mod:`circuitvision.quickstart.cases`): a word behind a prompt, a class, or one of two captions. An organism draws pairs of its
own; the heads found on the first are then ablated over the others, beside random ones.

Not covered: models whose output is neither words, classes nor a comparison with texts; several images in one prompt; answers of several tokens.
"""

from __future__ import annotations

from circuitvision.plots.quickstart import changed_box, write
from circuitvision.quickstart.cases import AnswerKind, Case
from circuitvision.quickstart.result import Quickstart, Reading, lens_finding
from circuitvision.quickstart.run import leading_heads, load_model, quickstart

__all__ = [
    "AnswerKind",
    "Case",
    "Quickstart",
    "Reading",
    "changed_box",
    "leading_heads",
    "lens_finding",
    "load_model",
    "quickstart",
    "write",
]

"""Small trained models whose task and ground truth are known: scenes-llava, scenes-clip, scenes-vit, shapes-llava, shapes-clip, shapes-vit,
spurious-vit, reach-pi0.

``load(name)`` gives a hooked model, ``path(name)`` a folder for ``from_pretrained``, ``card(name)`` what is known about it, and
``pairs(name, count, seed)`` draws minimal pairs that it never saw. ``train(name, seed, out)`` trains it again, and
``python -m circuitvision.organisms NAME --seed S --out DIR`` does the same from a shell. :mod:`circuitvision.organisms.handbuilt` has networks whose
weights are set by hand and whose circuit is known edge by edge.
"""

from __future__ import annotations

from circuitvision.organisms import handbuilt
from circuitvision.organisms.registry import card, evaluate, load, names, pairs, path, train

__all__ = ["card", "evaluate", "handbuilt", "load", "names", "pairs", "path", "train"]

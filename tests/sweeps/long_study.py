"""A sweep that takes a while, for tests that end it: ``PAUSE=SECONDS python -m tests.sweeps.long_study FOLDER`` runs it three times, each in a
process of its own, whose number it prints, and then how that one ended."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import ViTConfig, ViTForImageClassification

import circuitvision as cv
from circuitvision import edits


def model() -> cv.HookedModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 32}
    return cv.HookedModel(
        ViTForImageClassification(ViTConfig(image_size=16, patch_size=8, num_labels=5, **sizes)).eval()
    )


def slow(logits: Tensor) -> Tensor:
    time.sleep(float(os.environ.get("PAUSE", "0")))
    return logits[:, 0] - logits[:, 1]


def study(folder: Path | None, **options: Any) -> cv.SweepResult:
    """All heads of all blocks, at three strengths, two metrics."""
    inputs = {"pixel_values": torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(1))}
    listed = [
        edits.scale(f"vision.blocks.{layer}.attn.hook_z", strength, heads=head)
        for strength in (0.0, 0.5, 2.0)
        for layer in range(3)
        for head in range(4)
    ]
    axes = {"strength": (0.0, 0.5, 2.0), "layer": range(3), "head": range(4)}
    metric = {"slow": cv.metrics.logit_diff(0, 1), "accuracy": cv.metrics.accuracy([0, 1, 2])}
    if folder is not None:
        metric["slow"] = slow
    options = {"batch_size": 3, "progress": False, "save_to": folder, "resume": folder is not None, **options}
    return model().sweep(inputs, listed, metric, axes=axes, **options)


def start(folder: Path) -> None:
    """One run, and the code that it ends with."""
    from tests.sweeps import long_study

    # A process that was started in the background ignores interruptions, and so do its children.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    code = 1
    try:
        long_study.study(folder)
        code = 0
    except KeyboardInterrupt:
        code = 130
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


if __name__ == "__main__":
    for _ in range(3):
        child = os.fork()
        if not child:
            start(Path(sys.argv[1]))
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)

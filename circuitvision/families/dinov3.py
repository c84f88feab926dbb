"""DINOv3 ViT: positions are rotary and on patches alone, so images may have any size; keys without a bias; no head.

Its own image processor needs torchvision, which has no CPU build. :func:`image_processor` makes one that does the same: to 0…1, then resized by
antialiased interpolation of the floats (not of 8-bit pixels, as Pillow would), then normalised.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch

from circuitvision.model.spec import DRAWS, Family, TowerSpec, register_family

_MODES = {2: "bilinear", 3: "bicubic"}
"""Pillow's numbers of the filters that torch has."""


@functools.cache
def _processor_class() -> Any:
    from transformers.image_processing_backends import PilBackend

    class DINOv3ViTImageProcessorPil(PilBackend):
        resample = 2
        image_mean = [0.485, 0.456, 0.406]  # noqa: RUF012
        image_std = [0.229, 0.224, 0.225]  # noqa: RUF012
        size = {"height": 224, "width": 224}  # noqa: RUF012
        do_resize = do_rescale = do_normalize = do_convert_rgb = True

        def _preprocess(self, images: list[np.ndarray], **options: Any) -> Any:  # type: ignore[override]
            if options["do_rescale"]:
                images = [self.rescale(image, options["rescale_factor"]) for image in images]
            if options["do_resize"]:
                images = [_resized(image, options["size"], options["resample"]) for image in images]
            return super()._preprocess(images, **{**options, "do_resize": False, "do_rescale": False})

    return DINOv3ViTImageProcessorPil


def image_processor(**settings: Any) -> Any:
    """DINOv3's image processor without torchvision; ``settings`` as of ``DINOv3ViTImageProcessor`` (``size``, ``image_mean``, …)."""
    return _processor_class()(**settings)


def _resized(image: np.ndarray, size: Any, resample: Any) -> np.ndarray:
    pixels = torch.from_numpy(np.ascontiguousarray(image, dtype=np.float32))[None]
    mode = _MODES[int(resample)]
    out = torch.nn.functional.interpolate(
        pixels, (int(size["height"]), int(size["width"])), mode=mode, antialias=True, align_corners=False
    )
    return out[0].numpy()


def load_processor(name: str) -> Any:
    """The image processor of a checkpoint: DINOv3's own, or another that was saved with it."""
    from transformers import AutoImageProcessor
    from transformers.image_processing_base import ImageProcessingMixin

    settings, _ = ImageProcessingMixin.get_image_processor_dict(name)
    own = str(settings.get("image_processor_type", "")).startswith("DINOv3")
    return _processor_class().from_pretrained(name) if own else AutoImageProcessor.from_pretrained(name)


# The coordinates of patches are shifted, jittered and rescaled while it is trained.
DRAWS["DINOv3ViTRopePositionEmbedding"] = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")

register_family(
    Family(
        name="dinov3",
        classes=("DINOv3ViTModel",),
        output="last_hidden_state",
        processor=load_processor,
        towers=(TowerSpec("vision"),),
    )
)

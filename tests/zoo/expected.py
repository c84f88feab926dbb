"""What each tower is, written out by hand: the oracle for `tower.cfg`.

The numbers repeat the configs on purpose. A wrapper that reads them from the config must arrive here without sharing
code with this table; `tests/test_zoo.py` holds the table against the projections' weights.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Shape:
    """`grid` is (rows, columns) of patches at the configured size; None where the size varies or there are no patches.

    `n_prefix` counts the class, distillation and register positions before the patches.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    grid: tuple[int, int] | None = None
    n_prefix: int = 0


VIT = Shape(3, 4, 4, 24, 6, 40, (4, 4), 1)
DEIT = Shape(3, 5, 5, 30, 6, 40, (4, 4), 2)
DINOV2 = Shape(3, 3, 3, 24, 8, 48, (4, 4), 1)
# SwiGLU's hidden width is 2/3 of mlp_ratio * d_model, rounded up to a multiple of 8.
SWIGLU = replace(DINOV2, d_mlp=32)
REGISTERS = replace(DINOV2, n_prefix=4)
DINOV3 = Shape(3, 3, 3, 24, 8, 40, (4, 4), 3)
CLIP = Shape(3, 5, 5, 20, 4, 36, (4, 4), 1)
SIGLIP = Shape(3, 3, 3, 24, 8, 44, (3, 3))
SIGLIP2 = Shape(2, 4, 4, 24, 6, 36)
CLIP_TEXT = Shape(2, 4, 4, 28, 7, 32)
SIGLIP_TEXT = Shape(2, 4, 4, 24, 6, 28)
LLAVA_CLIP = replace(CLIP, grid=(3, 3))
PALIGEMMA = Shape(3, 5, 5, 20, 4, 32, (3, 3))
LLAMA = Shape(2, 4, 2, 32, 6, 48)
MISTRAL = Shape(3, 6, 3, 36, 8, 40)
QWEN2 = Shape(2, 4, 1, 32, 8, 44)
GEMMA = Shape(2, 3, 1, 28, 8, 40)
GEMMA2 = Shape(3, 4, 2, 24, 8, 36)
PI0 = {
    "vision": replace(PALIGEMMA, n_layers=2),
    "language": replace(GEMMA, n_layers=3),
    "action": Shape(3, 4, 1, 22, 8, 36),
}


OPENVLA = {
    "vision": Shape(3, 3, 3, 24, 8, 72, (3, 3), 3),
    "vision_2": Shape(4, 5, 5, 20, 4, 36, (3, 3)),
    "language": Shape(3, 4, 2, 32, 6, 48),
}


def _vlm(vision: Shape, language: Shape) -> dict[str, Shape]:
    return {"vision": vision, "language": language}


SHAPES: dict[str, dict[str, Shape]] = {
    "vit": {"vision": VIT},
    "vit-wide": {"vision": Shape(2, 3, 3, 24, 8, 40, (3, 5), 1)},
    "vit-headless": {"vision": VIT},
    "vit-pooler": {"vision": VIT},
    "deit": {"vision": DEIT},
    "deit-teacher": {"vision": DEIT},
    "deit-headless": {"vision": DEIT},
    "dinov2": {"vision": DINOV2},
    "dinov2-headless": {"vision": replace(DINOV2, n_layers=2)},
    "dinov2-swiglu": {"vision": SWIGLU},
    "dinov2-registers": {"vision": REGISTERS},
    "dinov2-registers-headless": {"vision": replace(REGISTERS, n_layers=2)},
    "dinov3": {"vision": DINOV3},
    "dinov3-gated": {"vision": replace(DINOV3, n_layers=2, grid=(3, 5))},
    "clip-vision": {"vision": CLIP},
    "clip-vision-projection": {"vision": replace(CLIP, n_layers=2)},
    "siglip-vision": {"vision": SIGLIP},
    "siglip-vision-no-head": {"vision": replace(SIGLIP, n_layers=2)},
    "siglip2-vision": {"vision": SIGLIP2},
    "clip": {"vision": CLIP, "text": CLIP_TEXT},
    "clip-argmax": {"vision": CLIP, "text": CLIP_TEXT},
    "clip-classifier": {"vision": CLIP},
    "metaclip2": {"vision": CLIP, "text": CLIP_TEXT},
    "metaclip2-classifier": {"vision": CLIP},
    "siglip": {"vision": SIGLIP, "text": SIGLIP_TEXT},
    "siglip-classifier": {"vision": SIGLIP},
    "siglip2": {"vision": SIGLIP2, "text": SIGLIP_TEXT},
    "siglip2-classifier": {"vision": SIGLIP2},
    "llava-clip-llama": _vlm(LLAVA_CLIP, LLAMA),
    "llava-clip-mistral": _vlm(LLAVA_CLIP, MISTRAL),
    "llava-clip-mistral-sliding": _vlm(LLAVA_CLIP, MISTRAL),
    "llava-clip-gemma": _vlm(LLAVA_CLIP, GEMMA),
    "llava-siglip-qwen2": _vlm(SIGLIP, QWEN2),
    "llava-siglip-llama": _vlm(SIGLIP, LLAMA),
    "llava-clip-llama-layers": _vlm(LLAVA_CLIP, LLAMA),
    "llava-clip-llama-full": _vlm(LLAVA_CLIP, LLAMA),
    "llava-next-mistral": _vlm(LLAVA_CLIP, MISTRAL),
    "llava-next-llama": _vlm(LLAVA_CLIP, LLAMA),
    "llava-onevision": _vlm(SIGLIP, QWEN2),
    "llava-onevision-resampled": _vlm(SIGLIP, QWEN2),
    "paligemma": _vlm(PALIGEMMA, GEMMA),
    "paligemma2": _vlm(PALIGEMMA, GEMMA2),
    "paligemma2-sliding": _vlm(PALIGEMMA, GEMMA2),
    "openvla": OPENVLA,
    "pi0": PI0,
    "pi0-outside": PI0,
}

"""What an OpenVLA reads, made with Pillow: pictures normalised twice, and the prompt it was trained with.

A picture is resized to the model's size whatever its shape (bicubic, "resize-naive"), and stands twice in the tensor: normalised with ImageNet's
statistics for DINOv2, and to −1…1 for SigLIP. A prompt ends with the empty piece (token 29871), as in training: Llama 2's tokenizer leaves it out.

Not covered: letter boxes and cropping (other image strategies), which no released checkpoint uses.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, BatchFeature, LlamaConfig

from circuitvision.errors import InputError
from circuitvision.openvla.actions import SPACE

MEANS = ((0.485, 0.456, 0.406), (0.5, 0.5, 0.5))
DEVIATIONS = ((0.229, 0.224, 0.225), (0.5, 0.5, 0.5))
"""Of ImageNet, which DINOv2 was trained with, and SigLIP's."""


def prompt(instruction: str) -> str:
    """What an OpenVLA is asked for an instruction ("pick up the spoon")."""
    return f"In: What action should the robot take to {instruction.lower()}?\nOut:"


class OpenVLAImageProcessor:
    """Pictures to ``pixel_values`` ``[image, 6, height, width]``."""

    model_input_names = ("pixel_values",)

    def __init__(
        self,
        size: int = 224,
        means: Sequence[Sequence[float]] = MEANS,
        deviations: Sequence[Sequence[float]] = DEVIATIONS,
        image_resize_strategy: str = "resize-naive",
    ) -> None:
        if image_resize_strategy != "resize-naive":
            raise InputError(f"Pictures are resized as 'resize-naive' alone, not as {image_resize_strategy!r}.")
        self.size, self.resample = size, Image.Resampling.BICUBIC
        self.means, self.deviations = [list(one) for one in means], [list(one) for one in deviations]

    def resize(self, image: np.ndarray, size: int) -> np.ndarray:
        """A picture ``[channel, height, width]`` as a square of this size."""
        picture = Image.fromarray(np.moveaxis(image, 0, -1).astype(np.uint8))
        made = picture.resize((size, size), self.resample)
        return np.moveaxis(np.asarray(made), -1, 0)

    def __call__(
        self, images: Any, *, do_rescale: bool = True, do_normalize: bool = True, **kwargs: Any
    ) -> BatchFeature:
        """One picture or a list of them, PIL images or arrays ``[height, width, 3]`` or ``[3, height, width]``."""
        listed = images if isinstance(images, (list, tuple)) else [images]
        listed = [one[0] if isinstance(one, (list, tuple)) and len(one) == 1 else one for one in listed]
        rows = [self._row(one, do_rescale, do_normalize) for one in listed]
        return BatchFeature({"pixel_values": torch.stack(rows)})

    def _row(self, image: Any, rescale: bool, normalise: bool) -> Float[Tensor, "channel height width"]:
        if isinstance(image, (list, tuple)):
            raise InputError(f"An OpenVLA sees one picture per prompt, not {len(image)}.")
        array = _channels_first(image)
        pixels = torch.from_numpy(np.array(self.resize(array, self.size))).float()
        if rescale:
            pixels = pixels.div(255)
        if not normalise:
            return pixels
        pairs = zip(self.means, self.deviations, strict=True)
        return torch.cat([(pixels - torch.tensor(m)[:, None, None]) / torch.tensor(d)[:, None, None] for m, d in pairs])

    def to_dict(self) -> dict[str, Any]:
        """Its settings, under the names of a released ``preprocessor_config.json``."""
        return {
            "image_processor_type": "PrismaticImageProcessor",
            "use_fused_vision_backbone": True,
            "image_resize_strategy": "resize-naive",
            "input_sizes": [[3, self.size, self.size]] * 2,
            "interpolations": ["bicubic"] * 2,
            "means": self.means,
            "stds": self.deviations,
        }

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> OpenVLAImageProcessor:
        """As the ``preprocessor_config.json`` of a folder says."""
        path = Path(folder) / "preprocessor_config.json"
        saved = json.loads(path.read_text()) if path.is_file() else {}
        sizes = saved.get("input_sizes", [[3, 224, 224]])
        if any(size != sizes[0] for size in sizes):
            raise InputError(f"Both backbones read pictures of one size; {path} says {sizes}.")
        return cls(
            sizes[0][-1],
            saved.get("means", MEANS),
            saved.get("stds", DEVIATIONS),
            saved.get("image_resize_strategy", "resize-naive"),
        )


def _channels_first(image: Any) -> np.ndarray:
    if isinstance(image, Image.Image):
        return np.moveaxis(np.asarray(image.convert("RGB")), -1, 0)
    array = np.asarray(image)
    if array.ndim == 3 and array.shape[0] != 3 and array.shape[-1] == 3:
        array = np.moveaxis(array, -1, 0)
    if array.ndim != 3 or array.shape[0] != 3:
        raise InputError(f"A picture has three channels, this array the shape {array.shape}.")
    return array


class OpenVLAProcessor:
    """Pictures and prompts to what the model reads: ``input_ids``, ``attention_mask``, ``pixel_values``. Ids do not name the patches."""

    model_input_names = ("input_ids", "attention_mask", "pixel_values")

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(
        self,
        text: Any = None,
        images: Any = None,
        *,
        padding: Any = None,
        padding_side: str | None = None,
        **kwargs: Any,
    ) -> BatchFeature:
        """``text`` is one prompt or one per picture (:func:`prompt` makes it of an instruction); several are filled up on the ``padding_side``.

        Raises:
            InputError: as many pictures as prompts are needed.
        """
        made: dict[str, Any] = {}
        kwargs.pop("return_tensors", None)
        if images is not None:
            made.update(self.image_processor(images, **kwargs))
        if text is not None:
            prompts = [text] if isinstance(text, str) else list(text)
            if images is not None and len(prompts) != len(made["pixel_values"]):
                raise InputError(
                    f"There are {len(made['pixel_values'])} pictures and {len(prompts)} prompts; give one of each per example."
                )
            made.update(self._ids(prompts, padding_side))
        return BatchFeature(made)

    def _ids(self, prompts: list[str], side: str | None) -> dict[str, Tensor]:
        rows = [list(self.tokenizer(one)["input_ids"]) for one in prompts]
        # A tokenizer of fewer words has no empty piece.
        space = SPACE if len(self.tokenizer) > SPACE else None
        rows = [row if space is None or row[-1] == space else [*row, space] for row in rows]
        width, side = max(map(len, rows)), side or getattr(self.tokenizer, "padding_side", "left")
        pad = self.tokenizer.pad_token_id
        ids = torch.full((len(rows), width), 0 if pad is None else int(pad))
        mask = torch.zeros_like(ids)
        for number, row in enumerate(rows):
            at = slice(width - len(row), width) if side == "left" else slice(0, len(row))
            ids[number, at], mask[number, at] = torch.tensor(row), 1
        return {"input_ids": ids, "attention_mask": mask}

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the tokenizer and ``preprocessor_config.json`` as released."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        self.tokenizer.save_pretrained(folder)
        settings = self.image_processor.to_dict()
        (Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings, indent=2))

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> OpenVLAProcessor:
        """The processor of a released folder, or of its name on the Hub."""
        from circuitvision.openvla.checkpoints import local

        place = local(folder)
        # Beside a config that points to remote code, the tokenizer must not ask that config what it is.
        tokenizer = AutoTokenizer.from_pretrained(place, config=LlamaConfig())
        return cls(OpenVLAImageProcessor.from_pretrained(place), tokenizer)

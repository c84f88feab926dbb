"""The table of tiny models: one `Case` per architecture variant, filled by the family files of this package.

The idea: a test asks for a case by name and gets a real transformers class with random weights of order one, its real
processor, and model-ready tensors made by hand (independent of the processor, so that one checks the other).
Nothing is downloaded, nothing depends on circuitvision, and two processes build bit-identical models.

Not covered here: trained behaviour (that is what the organisms are for) and anything that needs torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

TAGS: dict[str, str] = {
    "classifier": "the output is [batch, classes]",
    "headless": "the output is last_hidden_state; there is no read-out",
    "dual": "images against texts; images are the batch and there is one text more than images",
    "generates": "has generate()",
    "samples_actions": "has sample_actions()",
    "padding_left": "inputs accepts padding='left'",
    "padding_right": "inputs accepts padding='right'",
    "two_images": "inputs accepts images_per_prompt >= 2",
    "any_size": "inputs accepts an image_size (height, width) other than the configured one",
    "interpolates": "another image_size works by passing interpolate_pos_encoding=True, which inputs adds",
    "non_square": "the default image is not square",
    "tiles": "one image becomes several vision rows",
    "newline": "the connector inserts newline positions between image rows",
    "resampled": "tile features are interpolated to a smaller grid, so language positions mix patches",
    "gqa": "fewer key-value heads than query heads in a language or action tower",
    "rectangular": "n_heads * d_head differs from d_model in some tower",
    "layerscale": "a learned gain on what a sub-layer adds",
    "sandwich": "norms on sub-layer outputs as well",
    "softcap": "tanh caps on scores or logits",
    "gated_vision": "the vision MLP is gated",
    "rotary_vision": "positions of patches are rotary, so images of any size run and no table is added",
    "registers": "register tokens after the class token",
    "distillation": "a distillation token after the class token",
    "class_token": "the vision tower has a class token",
    "no_class_token": "the vision tower has none",
    "pooler": "a dense pooler module after the final norm",
    "pooling_head": "attention pooling through nn.MultiheadAttention",
    "packed_patches": "pixel_values holds flattened patches with a mask and a shape per image",
    "prefix_bidirectional": "image and prompt positions see each other in the language tower",
    "sliding": "some layers attend through a window shorter than the prompt",
    "tied": "the output embedding is the input embedding",
    "feature_list": "several vision feature layers are concatenated",
    "full_features": "every vision position enters the connector",
    "argmax_pooling": "CLIP text is pooled at the highest id, because eos_token_id is 2",
    "out_of_vocabulary_image": "the image token's id is outside the embedding table",
    "merged": "blocks of patches become one prompt position, so the map of the connector's rows differs from the tower's",
    "merged_before": "the model's own code merges them, before the connector",
    "cross_attention": "the language tower attends to the vision tower; no prompt position holds an image",
    "synthetic_blocks": "an image tower of tests/synthetic_blocks.py",
    "conversion_on_save": "saved parameter names differ from the module's own",
}


class MakeInputs(Protocol):
    """Model-ready tensors by hand."""

    def __call__(
        self,
        model: Any,
        batch: int = 1,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        padding: str | None = None,
        images_per_prompt: int = 1,
        image_size: tuple[int, int] | None = None,
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Case:
    """One tiny model and all a test needs to run it.

    `raw(batch, seed, images_per_prompt)` gives keyword arguments for the processor (PIL images, strings, ...).
    `unused` is a regular expression for the names of parameters that cannot influence the primary output.
    `register` puts the family into the tables, where it is none of the package's.
    """

    name: str
    family: str
    build: Callable[[], Any]
    inputs: MakeInputs
    towers: tuple[str, ...]
    processor: Callable[[], Any] | None = None
    raw: Callable[..., dict[str, Any]] | None = None
    tags: frozenset[str] = field(default_factory=frozenset)
    unused: str = "(?!)"
    register: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        unknown = self.tags - TAGS.keys()
        if unknown:
            raise ValueError(f"{self.name}: unknown tags {sorted(unknown)}; describe them in tests/zoo/registry.py")

    def __str__(self) -> str:
        return self.name


CASES: dict[str, Case] = {}


def register(case: Case) -> Case:
    """Add a case to the table; names are unique."""
    if case.name in CASES:
        raise ValueError(f"two cases are called {case.name!r}")
    CASES[case.name] = case
    return case


def case(name: str) -> Case:
    """The case of that name."""
    try:
        return CASES[name]
    except KeyError:
        raise KeyError(f"no case {name!r}; there are {', '.join(CASES)}") from None


def cases(*tags: str, family: str | None = None, without: tuple[str, ...] = ()) -> list[Case]:
    """Cases with all of `tags`, none of `without`, of `family` when given, in registration order."""
    return [
        c
        for c in CASES.values()
        if c.tags.issuperset(tags) and c.tags.isdisjoint(without) and family in (None, c.family)
    ]


def parametrize(*tags: str, family: str | None = None, without: tuple[str, ...] = ()) -> Any:
    """A decorator that runs a test once per selected case, as its argument `case`."""
    selected = cases(*tags, family=family, without=without)
    if not selected:
        raise ValueError(f"no case has the tags {tags} without {without}")
    return pytest.mark.parametrize("case", selected, ids=str)


BUILT: dict[str, tuple[Any, Any]] = {}
"""The shared models of this process, each with what it was when it was built."""


def shared_model(name: str) -> Any:
    """The built model of a case, one per process: for tests that leave it as they found it (``tests/conftest.py`` checks that)."""
    if name not in BUILT:
        model = case(name).build()
        BUILT[name] = (model, fingerprint(model))
    return BUILT[name][0]


def fingerprint(model: Any) -> tuple[Any, ...]:
    """What a test could change about a model, hooks aside: transformers puts its own there in the first run."""
    parameters = list(model.parameters())
    modes = sum(module.training for module in model.modules())
    return (
        modes,
        len(parameters),
        sum(parameter._version for parameter in parameters),
        sum(parameter.requires_grad for parameter in parameters),
        parameters[0].dtype,
        parameters[0].device,
        model.config._attn_implementation,
    )


_folders: dict[str, Path] = {}


def saved_folder(case: Case, tmp_path_factory: Any) -> Path:
    """A folder with the case's model and processor saved by `save_pretrained`, one per session."""
    if case.name not in _folders:
        folder = tmp_path_factory.mktemp(case.name)
        case.build().save_pretrained(folder)
        if case.processor is not None:
            case.processor().save_pretrained(folder)
        _folders[case.name] = folder
    return _folders[case.name]


def saved_class(folder: Path) -> str:
    """The class name that `save_pretrained` wrote into the folder's config."""
    return json.loads((folder / "config.json").read_text())["architectures"][0]


def loading_options(case: Case) -> dict[str, Any]:
    """Keywords of `from_pretrained` that give back the saved model: before transformers 5.23 a soft cap needs eager attention by name."""
    return {"attn_implementation": {"text_config": "eager"}} if "softcap" in case.tags else {}


def primary(output: Any) -> Tensor:
    """The tensor that stands for a model output: logits, logits_per_image, image_embeds or last_hidden_state."""
    for name in ("logits", "logits_per_image", "image_embeds", "last_hidden_state"):
        value = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if value is not None:
            return value
    raise ValueError(f"no primary tensor in {type(output).__name__}")

"""The models and studies of the sweep benchmark: what is edited, in which model, and what the output is asked.

A study is a list of edits. Every edit replaces activations by those of another input's run (another image, other words): one head's z, or the
residual stream that enters a block, at a stretch of positions. The metric is one number per example.

Three families, because they differ in what an edit can reach: a ViT (every position sees every other, the class token is read), a LLaVA of 600
positions (text behind an image sees back only, every position is read), and PI0 (a bidirectional prefix of which an action expert reads keys
and values, at each of its denoising steps).

Shapes as wide as models in use come at two sizes: a CPU size of 8 layers, and ``llava-7b`` and ``pi0-3b`` at the real one, in bfloat16. Whether a
tool computes the right thing is checked in float32: for those two on a model of the same width with fewer layers.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from operations import Blocks, Network
from shapes import getattr_path, llava, vit
from torch import Tensor, nn


@dataclass(frozen=True)
class Edit:
    """Positions ``first`` to ``end`` (exclusive) at a layer, of one head's z or else of the residual before the block; ``run`` numbers the inputs."""

    layer: int
    first: int
    end: int
    head: int | None = None
    run: int = 0

    @property
    def positions(self) -> slice:
        return slice(self.first, self.end)


@dataclass(frozen=True)
class Study:
    """The edits of one question, and what this library asks of itself: times faster than the loop, times the unavoidable operations."""

    name: str
    title: str
    edits: tuple[Edit, ...]
    faster: float | None = None
    over_unavoidable: float | None = None


@dataclass(frozen=True)
class Place:
    """Where the swept tower is, by transformers' own module names and by the bridge's."""

    tower: str
    blocks: str
    projection: str
    bridge_blocks: str


@dataclass(frozen=True)
class SweepShape:
    """One model to sweep: the module, its inputs (one set per denoising step), the other inputs that edits take their values from."""

    name: str
    title: str
    module: nn.Module
    runs: tuple[dict[str, Tensor], ...]
    other: dict[str, Tensor]
    place: Place
    network: Network
    metric: Callable[[Tensor], Tensor]
    studies: tuple[Study, ...]
    checked_on: Callable[[], SweepShape] | None = None
    sources: dict[tuple[int, bool], Tensor] = field(default_factory=dict)

    def twin(self, attention: str | None = None) -> nn.Module:
        """A copy of the module that shares the weights: another tool can wrap it and leave this one as it is."""
        twin: Any = copy.deepcopy(self.module, {id(weight): weight for weight in self.module.parameters()})
        if attention is not None:
            twin.set_attn_implementation(attention)
        return twin

    def target(self, module: Any, edit: Edit) -> Any:
        """The module whose input an edit writes: the block, or its output projection for one head's z."""
        block = getattr_path(module, self.place.blocks)[edit.layer]
        return block if edit.head is None else getattr_path(block, self.place.projection)

    def columns(self, edit: Edit) -> slice:
        """The features that an edit writes: all of the residual, one head's share of what enters the output projection."""
        size = self.network.swept.head_size
        return slice(None) if edit.head is None else slice(edit.head * size, (edit.head + 1) * size)

    def source(self, edit: Edit) -> Tensor:
        """What the other inputs' run has at the edited site, all positions and heads: ``[row pos features]``."""
        return self.sources[edit.layer, edit.head is not None]

    def record_sources(self) -> None:
        """Run the other inputs once and keep what enters every block and every output projection."""
        handles = []
        for layer in range(self.network.swept.layers):
            for head in (None, 0):
                key = (layer, head is not None)

                def keep(module: nn.Module, args: Any, kwargs: Any, key: tuple[int, bool] = key) -> None:
                    self.sources[key] = (args[0] if args else kwargs["hidden_states"]).clone()

                target = self.target(self.module, Edit(layer, 0, 0, head))
                handles.append(target.register_forward_pre_hook(keep, with_kwargs=True))
        try:
            self.module(**self.other)
        finally:
            for handle in handles:
                handle.remove()


def residual(layers: int, first: int, end: int) -> tuple[Edit, ...]:
    """Every layer's residual at every single position of a stretch."""
    return tuple(Edit(layer, at, at + 1) for layer in range(layers) for at in range(first, end))


def heads(layers: int, n_heads: int, first: int, end: int) -> tuple[Edit, ...]:
    """Every head of every layer, at all positions of a stretch at once."""
    return tuple(Edit(layer, first, end, head) for layer in range(layers) for head in range(n_heads))


def another(inputs: Mapping[str, Tensor], keep: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Other random images, and other words in place of every token but those in ``keep``."""
    made = dict(inputs)
    made["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    if "input_ids" in inputs:
        ids = inputs["input_ids"]
        kept = torch.isin(ids, torch.tensor(keep, device=ids.device))
        made["input_ids"] = torch.where(kept, ids, torch.randint_like(ids, 3, 500))
    return made


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """What is made inside has this dtype, where nothing else is asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def only(length: int, positions: range) -> Tensor:
    """Bool ``[pos]`` that is True at the given positions."""
    mask = torch.zeros(length, dtype=torch.bool, device="cpu")
    mask[positions.start : positions.stop] = True
    return mask


def seen(length: int) -> Tensor:
    """Bool ``[query key]``, all True: every position sees every other."""
    return torch.ones(length, length, dtype=torch.bool, device="cpu")


def vit_shape(name: str, title: str, image: int, patch: int, aims: bool, **sizes: int) -> SweepShape:
    """A ViT classifier and one image: all heads, and the residual stream at every layer and position."""
    base = vit(name, title, 1, image, patch, **sizes)
    length = (image // patch) ** 2 + 1
    layers, width, n_heads = sizes["num_hidden_layers"], sizes["hidden_size"], sizes["num_attention_heads"]
    mlp, everywhere = sizes["intermediate_size"], seen(length)
    blocks = Blocks(layers, width, n_heads, n_heads, width // n_heads, mlp, False, everywhere, only(length, range(1)))
    classes: int = base.module.classifier.out_features
    limits = (1.8, 1.25) if aims else (None, None)
    studies = (
        Study("heads", f"all {layers * n_heads} heads, all positions", heads(layers, n_heads, 0, length), *limits),
        Study("residual", f"residual, {layers} layers × {length} positions", residual(layers, 0, length), *limits),
    )
    return SweepShape(
        name=name,
        title=title,
        module=base.module,
        runs=(base.inputs,),
        other=another(base.inputs),
        place=Place("vision", "vit.layers", "attention.o_proj", "blocks"),
        network=Network(blocks, 2 * width * classes),
        metric=lambda logits: logits[:, 0] - logits[:, 1],
        studies=studies,
    )


def llava_shape(
    name: str,
    title: str,
    image: int,
    patch: int,
    words: int,
    vision: dict[str, int],
    text: dict[str, int],
    aims: bool = False,
    vocabulary: int = 1000,
    checked_on: Callable[[], SweepShape] | None = None,
) -> SweepShape:
    """A LLaVA and one prompt (a start token, the image, words behind it): the words' residuals, the heads at the end, the image as a whole."""
    base = llava(name, title, image, patch, words, vision, text, vocabulary)
    module: Any = base.module
    base.inputs["pixel_values"] = base.inputs["pixel_values"].to(module.dtype)
    behind = 1 + (image // patch) ** 2
    length = behind + words
    layers, width, n_heads = text["num_hidden_layers"], text["hidden_size"], text["num_attention_heads"]
    kv_heads = text.get("num_key_value_heads", n_heads)
    mlp, causal, read = text["intermediate_size"], seen(length).tril(), only(length, range(length))
    blocks = Blocks(layers, width, n_heads, kv_heads, width // n_heads, mlp, True, causal, read)
    span = tuple(Edit(layer, 1, behind) for layer in range(layers))
    studies = (
        Study(
            "text-positions",
            f"residual, {layers} layers × the {words} positions behind the image",
            residual(layers, behind, length),
            25.0 if aims else None,
        ),
        Study(
            "last-heads",
            f"{layers} layers × {n_heads} heads at the last position",
            heads(layers, n_heads, length - 1, length),
        ),
        Study("image-span", f"residual, {layers} layers × the whole image span of {behind - 1} positions", span),
    )
    return SweepShape(
        name=name,
        title=title,
        module=module,
        runs=(base.inputs,),
        other=another(base.inputs, (1, vocabulary - 1)),
        place=Place("language", "model.language_model.layers", "self_attn.o_proj", "blocks"),
        network=Network(blocks, 2 * width * vocabulary),
        metric=lambda logits: logits[:, -1, 5].float() - logits[:, -1, 6].float(),
        studies=studies,
        checked_on=checked_on,
    )


def pi0_shape(
    name: str,
    title: str,
    cameras: int,
    image: int,
    patch: int,
    words: int,
    chunk: int,
    steps: int,
    vision: dict[str, int],
    prefix: dict[str, int],
    expert: dict[str, int],
    aims: bool = False,
    checked_on: Callable[[], SweepShape] | None = None,
) -> SweepShape:
    """A PI0 and one observation: every prefix layer's residual at each camera's patches and at the text, at every denoising step."""
    module, inputs = _pi0_module(cameras, image, patch, words, chunk, steps, vision, prefix, expert)
    patches = (image // patch) ** 2
    length = cameras * patches + words
    groups = [(at * patches, (at + 1) * patches) for at in range(cameras)] + [(cameras * patches, length)]
    layers = prefix["num_hidden_layers"]
    edits = tuple(
        Edit(layer, first, end, run=step) for step in range(steps) for layer in range(layers) for first, end in groups
    )
    text = f"residual, {layers} prefix layers × {len(groups)} token groups × {steps} denoising steps"
    # The state token sees itself and the prefix, the actions see all; the actions are read.
    own = seen(1 + chunk)
    own[0, 1:] = False
    read = only(1 + chunk, range(1, 1 + chunk))
    reader = Blocks(**_gemma_sizes(expert), visible=own, read=read)
    swept = Blocks(**_gemma_sizes(prefix), visible=seen(length), read=only(length, range(0)), keys_read=True)
    return SweepShape(
        name=name,
        title=title,
        module=module,
        runs=_denoising_steps(module, inputs),
        other=another(inputs, (1, IMAGE)),
        place=Place("language", "model.vlm.language_model.layers", "self_attn.o_proj", ""),
        network=Network(swept, 2 * expert["hidden_size"] * ACTION, reader),
        metric=lambda logits: logits[..., 0].float().mean(1),
        studies=(Study("prefix-groups", text, edits, 1.8 if aims else None),),
        checked_on=checked_on,
    )


ACTION, IMAGE = 32, 999


def _gemma_sizes(sizes: dict[str, int]) -> dict[str, Any]:
    return {
        "layers": sizes["num_hidden_layers"],
        "width": sizes["hidden_size"],
        "heads": sizes["num_attention_heads"],
        "kv_heads": sizes["num_key_value_heads"],
        "head_size": sizes["head_dim"],
        "mlp_width": sizes["intermediate_size"],
        "gated": True,
    }


def _pi0_module(
    cameras: int, image: int, patch: int, words: int, chunk: int, steps: int, vision: Any, prefix: Any, expert: Any
) -> tuple[nn.Module, dict[str, Tensor]]:
    from transformers import PI0Config, PI0ForConditionalGeneration

    torch.manual_seed(0)
    shared = {"model_type": "gemma", "vocab_size": IMAGE + 1, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    tower = {"model_type": "siglip_vision_model", "image_size": image, "patch_size": patch, "vision_use_head": False}
    vlm = {
        "model_type": "paligemma",
        "vision_config": {**tower, **vision},
        "text_config": {**shared, **prefix},
        "projection_dim": prefix["hidden_size"],
        "image_token_id": IMAGE,
    }
    config: Any = PI0Config(
        vlm_config=vlm,
        dit_config={**shared, **expert},
        chunk_size=chunk,
        max_state_dim=ACTION,
        max_action_dim=ACTION,
        num_inference_steps=steps,
    )
    module: Any = PI0ForConditionalGeneration(config).eval()
    pictures = torch.full((cameras * (image // patch) ** 2,), IMAGE)
    ids = torch.cat([pictures, torch.tensor([1]), torch.randint(3, 500, (words - 1,))])[None]
    return module, {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(1, cameras, 3, image, image).to(module.dtype),
        "pixel_attention_mask": torch.ones(1, cameras, dtype=torch.bool),
        "state": torch.randn(1, ACTION).to(module.dtype),
        "noise": torch.randn(1, chunk, ACTION).to(module.dtype),
        "timestep": torch.ones(1),
    }


def _denoising_steps(module: Any, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], ...]:
    """The inputs of every denoising step of the clean run: its noisy actions and its time."""
    found: list[dict[str, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any) -> None:
        found.append({"noise": kwargs["noise"].clone(), "timestep": kwargs["timestep"].clone()})

    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        module.sample_actions(**{key: value for key, value in inputs.items() if key != "timestep"})
    finally:
        handle.remove()
    return tuple({**inputs, **step} for step in found)


def small_vit() -> SweepShape:
    sizes = {"hidden_size": 64, "num_hidden_layers": 6, "num_attention_heads": 4, "intermediate_size": 256}
    return vit_shape("vit-small", "6-layer ViT, width 64, 17 positions", 32, 8, aims=False, **sizes)


def small_llava() -> SweepShape:
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 256}
    text = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 172}
    return llava_shape("llava-small", "LLaVA of 2 + 4 layers, width 64, 25 positions", 32, 8, 8, vision, text)


def small_pi0() -> SweepShape:
    vision = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
    shared = {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 16}
    prefix = {"hidden_size": 64, "intermediate_size": 256, **shared}
    expert = {"hidden_size": 32, "intermediate_size": 128, **shared}
    title = "PI0 of 2 + 4 + 4 layers, width 64, two cameras, 40 positions"
    return pi0_shape("pi0-small", title, 2, 32, 8, 8, 4, 3, vision, prefix, expert)


def vit_b16() -> SweepShape:
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    title = "ViT-B/16, one 224-pixel image, 197 positions"
    return vit_shape("vit-b16", title, 224, 16, aims=True, num_labels=1000, **sizes)


def llava_600() -> SweepShape:
    vision = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    text = {"hidden_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 16, "intermediate_size": 2816}
    title = "LLaVA of 4 + 8 layers, width 1024, 576 image and 24 text positions"
    return llava_shape("llava-600", title, 336, 14, 23, vision, text, aims=True)


def pi0_544() -> SweepShape:
    vision = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}
    shared = {"num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 64}
    prefix = {"hidden_size": 512, "intermediate_size": 2048, **shared}
    expert = {"hidden_size": 256, "intermediate_size": 1024, **shared}
    title = "PI0 of 4 + 8 + 8 layers, width 512, two cameras, 544 prefix positions"
    return pi0_shape("pi0-544", title, 2, 224, 14, 32, 50, 10, vision, prefix, expert, aims=True)


def _llava_7b(layers: tuple[int, int], dtype: torch.dtype, **more: Any) -> SweepShape:
    vision = {"hidden_size": 1024, "num_hidden_layers": layers[0], "num_attention_heads": 16, "intermediate_size": 4096}
    text = {"hidden_size": 4096, "num_hidden_layers": layers[1], "num_attention_heads": 32, "intermediate_size": 11008}
    title = f"LLaVA-1.5-7B's shape, {layers[0]} + {layers[1]} layers, 576 image and 24 text positions, {dtype}"
    with default_dtype(dtype):
        return llava_shape("llava-7b", title, 336, 14, 23, vision, text, vocabulary=32064, **more)


def llava_7b() -> SweepShape:
    return _llava_7b((24, 32), torch.bfloat16, aims=True, checked_on=lambda: _llava_7b((3, 4), torch.float32))


def _pi0_3b(layers: tuple[int, int], dtype: torch.dtype, **more: Any) -> SweepShape:
    vision = {"hidden_size": 1152, "num_hidden_layers": layers[0], "num_attention_heads": 16, "intermediate_size": 4304}
    shared = {"num_hidden_layers": layers[1], "num_attention_heads": 8, "num_key_value_heads": 1, "head_dim": 256}
    prefix = {"hidden_size": 2048, "intermediate_size": 16384, **shared}
    expert = {"hidden_size": 1024, "intermediate_size": 4096, **shared}
    title = f"PI0's shape, {layers[0]} + {layers[1]} + {layers[1]} layers, three cameras, 816 prefix positions, {dtype}"
    with default_dtype(dtype):
        return pi0_shape("pi0-3b", title, 3, 224, 14, 48, 50, 10, vision, prefix, expert, **more)


def pi0_3b() -> SweepShape:
    return _pi0_3b((27, 18), torch.bfloat16, aims=True, checked_on=lambda: _pi0_3b((3, 4), torch.float32))


SHAPES: dict[str, Callable[[], SweepShape]] = {
    "vit-small": small_vit,
    "llava-small": small_llava,
    "pi0-small": small_pi0,
    "vit-b16": vit_b16,
    "llava-600": llava_600,
    "pi0-544": pi0_544,
    "llava-7b": llava_7b,
    "pi0-3b": pi0_3b,
}
STUDIES = ("heads", "residual", "text-positions", "last-heads", "image-span", "prefix-groups")
QUICK = ("vit-small", "llava-small", "pi0-small")
ON_CPU = ("vit-b16", "llava-600", "pi0-544")
ON_CUDA = ("vit-b16", "llava-7b", "pi0-3b")


def build(make: Callable[[], SweepShape], device: torch.device) -> SweepShape:
    """A model with its weights made on the device, and the values its edits write recorded."""
    with device:
        shape = make()
    shape.record_sources()
    return shape

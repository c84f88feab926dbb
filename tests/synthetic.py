"""Two tiny vision-language models in which nothing but the language model is transformers': patches that are merged, and images in one sequence.

Both cut pictures into patches, run two blocks of attention and MLP, merge blocks of 2×2 patches into one prompt position, and put them in the place
of image tokens of a Llama. ``Merging`` has an axis of images (pixel shuffle); ``Packing`` has none: the patches of all images stand in one sequence,
block by block of the grid, and a block-diagonal mask keeps the images apart (Qwen2-VL). Both compute what :func:`tower_by_hand` computes.

Not covered: processors; tests make tensors by hand.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from circuitvision.families import BlockLayout, Connector, Family, Flat, Packed, Readout, Stack, TowerSpec
from circuitvision.model import block_layout, spec
from tests.zoo import Case
from tests.zoo.weights import randomise

WIDTH, HEADS, PATCH, MERGE, IMAGE, VOCABULARY = 12, 3, 4, 2, 60, 64
SIZE = (16, 24)
"""Height and width of pictures: 4 × 6 patches, 2 × 3 merged positions."""


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * scaling
    scores = scores if attention_mask is None else scores + attention_mask
    pattern = nn.functional.softmax(scores, dim=-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


class EyeConfig(PretrainedConfig):
    model_type = "synthetic_eye"

    def __init__(self, **kwargs: Any) -> None:
        # Its own eager attention is the only one: hooks that look into it change no bit.
        super().__init__(**{"attn_implementation": "eager", **kwargs})
        self.hidden_size, self.num_attention_heads, self.patch_size, self.image_size = WIDTH, HEADS, PATCH, SIZE
        self.num_hidden_layers, self.hidden_act = 2, "gelu"


class SyntheticConfig(PretrainedConfig):
    model_type = "synthetic"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": EyeConfig, "text_config": LlamaConfig}

    def __init__(self, **kwargs: Any) -> None:
        self.vision_config = EyeConfig()
        self.text_config = LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=VOCABULARY,
            pad_token_id=0,
            attn_implementation="eager",
        )
        self.image_token_id = IMAGE
        super().__init__(**{"attn_implementation": "eager", **kwargs})


class Attention(nn.Module):
    calls_per_image = False

    def __init__(self, config: EyeConfig) -> None:
        super().__init__()
        self.config, self.scaling = config, (WIDTH // HEADS) ** -0.5
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor, lengths: list[int] | None = None) -> Tensor:
        """``[image position width]``; with ``lengths``, ``[position width]``."""
        q, k, v = (part(x).unflatten(-1, (HEADS, -1)).transpose(-3, -2) for part in (self.q, self.k, self.v))
        if lengths is None:
            return self.o(self.attend(q, k, v, None).flatten(2))
        if self.calls_per_image:
            parts = zip(*(one.split(lengths, 1) for one in (q, k, v)), strict=True)
            return self.o(torch.cat([self.attend(*(one[None] for one in part), None)[0] for part in parts]).flatten(1))
        owner = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
        mask = torch.zeros(len(owner), len(owner), dtype=x.dtype).masked_fill(
            owner[:, None] != owner, torch.finfo(x.dtype).min
        )
        return self.o(self.attend(q[None], k[None], v[None], mask[None, None])[0].flatten(1))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        function = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return function(self, q, k, v, mask, scaling=self.scaling, dropout=0.0, is_causal=False)[0]


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(WIDTH, 20), nn.GELU(), nn.Linear(20, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.up(x)))


class Block(nn.Module):
    def __init__(self, config: EyeConfig) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = (
            nn.LayerNorm(WIDTH),
            Attention(config),
            nn.LayerNorm(WIDTH),
            MLP(),
        )

    def forward(self, hidden_states: Tensor, lengths: list[int] | None = None) -> Tensor:
        hidden_states = hidden_states + self.attn(self.norm1(hidden_states), lengths)
        return hidden_states + self.mlp(self.norm2(hidden_states))


class Eye(nn.Module):
    """Pictures, or the patches of all of them, to features."""

    def __init__(self, config: EyeConfig, packed: bool) -> None:
        super().__init__()
        self.patches = nn.Linear(3 * PATCH**2, WIDTH) if packed else nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, pixels: Tensor, grids: list[tuple[int, int]] | None = None) -> Tensor:
        x = self.patches(pixels)
        if grids is None:
            at = places(x.shape[-2], x.shape[-1])
            x = x.flatten(2).transpose(1, 2) + where(at).to(x)
        else:
            x = x + where(
                torch.cat([by_blocks(places(*grid)[None], grid, MERGE)[0].flatten(0, 1) for grid in grids])
            ).to(x)
        for block in self.blocks:
            x = block(x, None if grids is None else [rows * columns for rows, columns in grids])
        return self.norm(x)


def places(rows: int, columns: int) -> Tensor:
    """(row, column) of every cell of a grid, row by row: ``[cell 2]``."""
    return torch.cartesian_prod(torch.arange(rows), torch.arange(columns))


def where(at: Tensor) -> Tensor:
    """What a patch gets for its place: ``[patch width]``."""
    steps = torch.arange(1, WIDTH // 2 + 1, dtype=torch.float64)
    return torch.cat([torch.sin(at[:, :1] * steps * 0.7), torch.cos(at[:, 1:] * steps * 0.4)], 1)


def by_blocks(cells: Tensor, grid: tuple[int, int], merge: int) -> Tensor:
    """Cells of a grid ``[image cell …]``, row by row, as ``[image block cell-of-block …]``."""
    (rows, columns), rest = grid, cells.shape[2:]
    blocks = cells.reshape(len(cells), rows // merge, merge, columns // merge, merge, *rest).transpose(2, 3)
    return blocks.reshape(len(cells), -1, merge**2, *rest)


class Merger(nn.Module):
    """The features of a block of patches, one after the other, to one vector of the language model."""

    def __init__(self, before: bool = False) -> None:
        super().__init__()
        self.before, self.linear = before, nn.Linear(MERGE**2 * WIDTH, 16)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim == 3 and not self.before:
            x = by_blocks(x, (SIZE[0] // PATCH, SIZE[1] // PATCH), MERGE)
            return self.linear(x.flatten(2))
        return self.linear(x) if self.before else self.linear(x.reshape(-1, MERGE**2 * WIDTH))


class Synthetic(PreTrainedModel):
    config_class = SyntheticConfig
    _supports_sdpa = True
    packed, before = False, False

    def __init__(self, config: SyntheticConfig) -> None:
        super().__init__(config)
        self.eye, self.merger = Eye(config.vision_config, self.packed), Merger(self.before)
        self.language_model, self.lm_head = LlamaModel(config.text_config), nn.Linear(16, VOCABULARY, bias=False)
        self.post_init()

    def answer(self, input_ids: Any, features: Tensor | None, attention_mask: Any) -> Any:
        embeds = self.language_model.embed_tokens(input_ids)
        if features is not None:
            embeds = embeds.masked_scatter((input_ids == IMAGE)[..., None], features.to(embeds))
        out = self.language_model(inputs_embeds=embeds, attention_mask=attention_mask)
        return CausalLMOutputWithPast(logits=self.lm_head(out.last_hidden_state))


class Merging(Synthetic):
    def forward(self, input_ids: Any = None, pixel_values: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        features = None
        if pixel_values is not None:
            x = self.eye(pixel_values)
            x = by_blocks(x, (SIZE[0] // PATCH, SIZE[1] // PATCH), MERGE).flatten(2) if self.before else x
            features = self.merger(x)
        return self.answer(input_ids, features, attention_mask)


class MergingBefore(Merging):
    before = True


class Packing(Synthetic):
    packed = True

    def forward(
        self,
        input_ids: Any = None,
        pixel_values: Any = None,
        image_grid_thw: Any = None,
        attention_mask: Any = None,
        **_: Any,
    ) -> Any:
        features = None
        if pixel_values is not None:
            grids = [(int(rows), int(columns)) for _, rows, columns in image_grid_thw.tolist()]
            features = self.merger(self.eye(pixel_values, grids))
        return self.answer(input_ids, features, attention_mask)


BLOCK = BlockLayout(
    (
        block_layout.Branch(
            block_layout.Attention("attn", q="attn.q", k="attn.k", v="attn.v", o="attn.o"), norm="norm1"
        ),
        block_layout.Branch(block_layout.MLP("mlp", fc_in="mlp.up", fc_out="mlp.down"), norm="norm2"),
    )
)
STACK = Stack(blocks="blocks", block=BLOCK, final_norm="norm", embed="patches", image=True)
PACKINGS = {
    "Merging": Flat(merge=MERGE),
    "MergingBefore": Flat(merge=MERGE, merged_before=True),
    "Packing": Packed(merge=MERGE),
}


def register(cls: type[Synthetic], packing: Any = None) -> None:
    """Put the class's family into the table, as anybody would."""
    spec.register_family(
        Family(
            name=cls.__name__.lower(),
            classes=(cls.__name__,),
            output="logits",
            image_token=("image_token_id",),
            packing=packing or PACKINGS[cls.__name__],
            connectors=(Connector(("vision",), "language", "merger"),),
            towers=(
                TowerSpec("vision", root="eye", config="vision_config", stack=STACK, readout=Readout()),
                TowerSpec("language", root="language_model", config="text_config", readout=Readout(head="lm_head")),
            ),
        )
    )


def build(cls: type[Synthetic]) -> Any:
    """A model with weights of order one."""
    return randomise(cls(SyntheticConfig()), cls.__name__).eval()


def prompts(counts: list[list[int]], padding: str | None = None, tail: bool = False) -> dict[str, Tensor]:
    """Prompts that hold image tokens of so many positions for each image: ``[1, image…, 3, image…, 4, 5]``, filled up; ``tail`` makes them differ."""
    rows = []
    for number, images in enumerate(counts):
        row = [1, 7 + number]
        for count in images:
            row += [IMAGE] * count + [3]
        rows.append([*row, 4, 5 + number, *[6] * (number if tail else 0)])
    width = max(map(len, rows))
    ids, mask = torch.zeros(len(rows), width, dtype=torch.long), torch.zeros(len(rows), width, dtype=torch.long)
    for number, row in enumerate(rows):
        at = slice(width - len(row), None) if padding == "left" else slice(len(row))
        ids[number, at], mask[number, at] = torch.tensor(row), 1
    return {"input_ids": ids, "attention_mask": mask}


def pictures(count: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Random pictures of ``SIZE``."""
    return torch.randn(count, 3, *SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def cut(picture: Tensor) -> Tensor:
    """The patches of a picture ``[channel height width]``, block by block, flattened as a convolution reads them: ``[patch values]``."""
    patches = picture.unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).permute(1, 2, 0, 3, 4)
    grid = (patches.shape[0], patches.shape[1])
    return by_blocks(patches.flatten(2).flatten(0, 1)[None], grid, MERGE)[0].flatten(0, 1)


def packed(images: list[Tensor]) -> dict[str, Tensor]:
    """Pictures of any size as the packed model reads them."""
    grids = [[1, image.shape[1] // PATCH, image.shape[2] // PATCH] for image in images]
    return {"pixel_values": torch.cat([cut(image) for image in images]), "image_grid_thw": torch.tensor(grids)}


def merged_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: Any = None,
) -> dict[str, Any]:
    """Inputs of the merging models by hand; with padding, every prompt is longer than the one before it."""
    return {
        **prompts([[6] * images_per_prompt] * batch, padding, tail=padding is not None),
        "pixel_values": pictures(batch * images_per_prompt, seed, dtype),
    }


GRIDS = [(4, 6), (2, 4), (6, 2), (4, 4)]


def packed_inputs(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: Any = None,
) -> dict[str, Any]:
    """Inputs of the packing model by hand: images of different grids."""
    grids = [GRIDS[(seed + number) % len(GRIDS)] for number in range(batch * images_per_prompt)]
    generator = torch.Generator().manual_seed(seed)
    images = [
        torch.randn(3, rows * PATCH, columns * PATCH, generator=generator, dtype=torch.float64).to(dtype)
        for rows, columns in grids
    ]
    counts = [rows * columns // MERGE**2 for rows, columns in grids]
    per_prompt = [counts[n * images_per_prompt : (n + 1) * images_per_prompt] for n in range(batch)]
    return {**prompts(per_prompt, padding), **packed(images)}


def _case(cls: type[Synthetic], name: str, inputs: Any, *tags: str) -> Case:
    return Case(
        name,
        name,
        lambda: build(cls),
        inputs,
        ("vision", "language"),
        tags=frozenset(("merged", "padding_left", "padding_right", "two_images", *tags)),
        register=lambda: register(cls),
    )


CASES = {
    "Merging": _case(Merging, "synthetic-merging", merged_inputs),
    "MergingBefore": _case(MergingBefore, "synthetic-merging-before", merged_inputs, "merged_before"),
    "Packing": _case(Packing, "synthetic-packing", packed_inputs, "packed_patches"),
}
CLASSES: tuple[type[Synthetic], ...] = (Merging, MergingBefore, Packing)

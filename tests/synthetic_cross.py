"""A language tower that attends to a vision tower, written twice: as modules, and by hand with every site of the language tower in the open.

Block 0 is plain, block 1 has a tanh-gated cross-attention in the place of its own, block 2 has both. With :func:`tapped` around it the same weights
are multiplied by hand, and every site is a call of a function that may look at the value or replace it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from circuitvision.families import (
    MLP,
    Attention,
    BlockLayout,
    Branch,
    Connector,
    Family,
    Gate,
    Readout,
    Stack,
    TowerSpec,
    register_family,
)

WIDTH, SEEN, HEADS, D_HEAD, VOCAB = 12, 8, 2, 6, 10
TAP: list[Callable[[str, Tensor], Tensor]] = []


@contextlib.contextmanager
def tapped(tap: Callable[[str, Tensor], Tensor]) -> Iterator[None]:
    TAP.append(tap)
    try:
        yield
    finally:
        TAP.clear()


def eager_attention_forward(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    scores = query @ key.transpose(2, 3) * D_HEAD**-0.5
    if module.is_causal:
        scores = scores + torch.full_like(scores[0, 0], torch.finfo(scores.dtype).min).triu(1)
    pattern = nn.functional.softmax(scores, dim=-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


class Attend(nn.Module):
    def __init__(self, config: Any, source: int, causal: bool) -> None:
        super().__init__()
        self.config, self.is_causal = config, causal
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k, self.v = nn.Linear(source, WIDTH), nn.Linear(source, WIDTH)
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden_states: Tensor, seen: Tensor) -> Tensor:
        three = [
            part(x).unflatten(-1, (HEADS, D_HEAD)).transpose(1, 2)
            for part, x in ((self.q, hidden_states), (self.k, seen), (self.v, seen))
        ]
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        return self.o(attend(self, *three, None, scaling=D_HEAD**-0.5)[0].flatten(2))


class Feed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x).relu())


class Block(nn.Module):
    def __init__(self, config: Any, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.branches = [["attn", "mlp"], ["cross_attn", "mlp"], ["attn", "cross_attn", "mlp"]][layer]
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in self.branches)
        self.attn, self.cross_attn = Attend(config, WIDTH, True), Attend(config, SEEN, False)
        self.mlp = Feed()
        self.gate = nn.Parameter(torch.tensor([0.7]))

    def forward(self, hidden_states: Tensor, vision_states: Tensor | None = None) -> Tensor:
        x, tap, before = hidden_states, (TAP[0] if TAP else None), ""
        assert vision_states is not None
        if tap is not None:
            x = tap(f"language.blocks.{self.layer}.hook_resid_pre", x)
        for number, (branch, norm) in enumerate(zip(self.branches, self.norms, strict=True)):
            if tap is None:
                normed = norm(x)
                if branch == "mlp":
                    out = self.mlp(normed)
                else:
                    out = getattr(self, branch)(normed, normed if branch == "attn" else vision_states)
                x = x + (self.gate.tanh() * out if branch == "cross_attn" else out)
                continue
            p = f"language.blocks.{self.layer}"
            if number:
                x = tap(f"{p}.hook_resid_mid" if number == 1 else f"{p}.hook_resid_mid_{before}", x)
            out = self.by_hand(p, branch, norm, x, vision_states, number + 1)
            out = self.gate.tanh() * out if branch == "cross_attn" else out
            x, before = x + tap(f"{p}.hook_{branch}_out", out), branch
        return x if tap is None else tap(f"language.blocks.{self.layer}.hook_resid_post", x)

    def by_hand(self, p: str, branch: str, norm: Any, x: Tensor, seen: Tensor, number: int) -> Tensor:
        tap = TAP[0]
        read = tap(f"{p}.hook_mlp_in", x) if branch == "mlp" else x
        centred = read - read.mean(-1, keepdim=True)
        scale = tap(f"{p}.ln{number}.hook_scale", (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt())
        normed = tap(f"{p}.ln{number}.hook_normalized", centred / scale) * norm.weight + norm.bias
        if branch == "mlp":
            pre = tap(f"{p}.mlp.hook_pre", self.mlp.up(normed))
            return self.mlp.down(tap(f"{p}.mlp.hook_post", pre.relu()))
        own, found = getattr(self, branch), {}
        for letter in "qkv":
            weight, bias = getattr(own, letter).weight, getattr(own, letter).bias
            if branch == "cross_attn" and letter != "q":
                value = (seen @ weight.T + bias).unflatten(-1, (HEADS, D_HEAD))
            else:
                value = self.per_head(p, branch, letter, norm, x, normed)
            found[letter] = tap(f"{p}.{branch}.hook_{letter}", value)
        scores = torch.einsum("bqhd,bkhd->bhqk", found["q"], found["k"]) * D_HEAD**-0.5
        if branch == "attn":
            scores = scores + torch.full_like(scores[0, 0], torch.finfo(scores.dtype).min).triu(1)
        scores = tap(f"{p}.{branch}.hook_attn_scores", scores)
        pattern = tap(f"{p}.{branch}.hook_pattern", scores.softmax(-1))
        z = tap(f"{p}.{branch}.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, found["v"]))
        w_o = own.o.weight.T.unflatten(0, (HEADS, D_HEAD))
        return tap(f"{p}.{branch}.hook_result", torch.einsum("bqhd,hdm->bqhm", z, w_o)).sum(-2) + own.o.bias

    def per_head(self, p: str, branch: str, letter: str, norm: Any, x: Tensor, normed: Tensor) -> Tensor:
        """Queries, keys or values of the tower's own stream; where a slot was edited, each head's of its own."""
        linear = getattr(getattr(self, branch), letter)
        stream = x.unsqueeze(-2).expand(*x.shape[:-1], HEADS, WIDTH)
        slot = TAP[0](f"{p}.{'' if branch == 'attn' else f'{branch}.'}hook_{letter}_input", stream)
        if slot is stream:
            return (normed @ linear.weight.T + linear.bias).unflatten(-1, (HEADS, D_HEAD))
        by_head, bias = linear.weight.unflatten(0, (HEADS, D_HEAD)), linear.bias.unflatten(0, (HEADS, D_HEAD))
        return torch.einsum("bphm,hdm->bphd", norm(slot), by_head) + bias


class Decoder(nn.Module):
    def __init__(self, config: Any) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(3))
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, input_ids: Tensor, vision_states: Tensor) -> Tensor:
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, vision_states=vision_states)
        return self.norm(x)


class CrossConfig(ViTConfig):
    model_type = "crossing"

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        sizes = {"hidden_size": SEEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12}
        self.vision_config = ViTConfig(**sizes, image_size=8, patch_size=4)
        self.vision_config._attn_implementation = "eager"
        self.text_config = ViTConfig(num_attention_heads=HEADS, num_hidden_layers=3)
        self.text_config._attn_implementation = "eager"


class Crossing(nn.Module):
    def __init__(self, projects: bool) -> None:
        super().__init__()
        self.config = CrossConfig()
        self.vision = ViTModel(self.config.vision_config, add_pooling_layer=False)
        self.projector = nn.Linear(SEEN, SEEN) if projects else None
        self.decoder = Decoder(self.config.text_config)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        seen = self.vision(pixel_values).last_hidden_state
        seen = seen if self.projector is None else self.projector(seen)
        return {"logits": self.head(self.decoder(input_ids, seen))}


def layout_of(block: Any) -> BlockLayout:
    three = {letter: f"attn.{letter}" for letter in "qkv"}
    across = {letter: f"cross_attn.{letter}" for letter in "qkv"}
    cores: dict[str, Any] = {
        "attn": Attention("attn", o="attn.o", **three),
        "cross_attn": Attention("cross_attn", o="cross_attn.o", keys_of="vision", **across),
        "mlp": MLP("mlp", fc_in="mlp.up", fc_out="mlp.down"),
    }
    return BlockLayout(
        tuple(
            Branch(
                cores[name],
                norm=f"norms.{n}",
                then=(Gate("gate", tanh=True),) if name == "cross_attn" else (),
                name=name,
            )
            for n, name in enumerate(block.branches)
        )
    )


def register(projects: bool = False, connectors: Any = None) -> None:
    """The family of :class:`Crossing`, registered as somebody's own would be."""
    stack = Stack(blocks="layers", block=layout_of, final_norm="norm", embed="embed_tokens", attention="causal")
    path = "projector" if projects else None
    crossing = (Connector(("vision",), "language", path, via="cross"),)
    register_family(
        Family(
            name="crossing",
            classes=("Crossing",),
            output="logits",
            towers=(
                TowerSpec("vision", root="vision", config="vision_config", readout=Readout()),
                TowerSpec("language", root="decoder", config="text_config", stack=stack, readout=Readout(head="head")),
            ),
            connectors=crossing if connectors is None else connectors,
        )
    )


def by_hand(
    module: Any, inputs: dict[str, Tensor], change: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    values: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        values[site] = value if change is None or site not in change else change[site](value)
        return values[site]

    with tapped(tap):
        return module(**inputs)["logits"], values


def inputs_by_hand(
    model: Any,
    batch: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    padding: str | None = None,
    images_per_prompt: int = 1,
    image_size: tuple[int, int] | None = None,
) -> dict[str, Tensor]:
    """Four tokens and a picture for each example."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(1, VOCAB, (batch, 4), generator=generator),
        "pixel_values": torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=generator).to(dtype),
    }

"""A small image tower whose blocks have any shape, written twice: as modules, and by hand with every site in the open.

``Own(shape)`` runs as a model of somebody's own would: modules are called, attention goes through transformers' attention functions. With
:func:`tapped` around it the same weights are multiplied by hand, and every site is a call of a function that may look at the value or replace it.
What hooks read and write is compared with that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from circuitvision.families import (
    MLP,
    Attention,
    BlockLayout,
    Branch,
    Family,
    Fused,
    Gate,
    Module,
    Readout,
    Stack,
    TowerSpec,
    Writer,
    register_family,
)

WIDTH, HEADS, KV_HEADS, D_HEAD, D_MLP, LAYERS, N_POS, N_OUT = 12, 4, 2, 3, 20, 3, 5, 6
Tap = Callable[[str, Tensor], Tensor]
TAP: list[Tap] = []


@contextlib.contextmanager
def tapped(tap: Tap) -> Iterator[None]:
    """Compute by hand inside the block, with ``tap(site, value)`` at every site."""
    TAP.append(tap)
    try:
        yield
    finally:
        TAP.clear()


@dataclass(frozen=True)
class Shape:
    """What a block is made of."""

    fused: str = ""
    head_norms: str = ""
    whole_norms: bool = False
    heads_first: bool = False
    norm: str = "pre"
    parallel: bool = False
    shared: bool = False
    gates: str = ""
    scales: bool = False
    adapter: bool = False
    gated_mlp: str = ""
    deepstack: tuple[int, ...] = ()
    kinds: bool = False
    """Whether the second block has an adapter and no MLP."""
    flat: bool = False
    """Whether attention is no module that holds its output projection."""


def eager_attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """The eager attention that this file offers, as the files of transformers do."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    pattern = nn.functional.softmax(query @ key.transpose(2, 3) * D_HEAD**-0.5, dim=-1)
    return (pattern @ value).transpose(1, 2).contiguous(), pattern


class OwnAttention(nn.Module):
    """Attention with separate or fused projections, and norms of queries, keys and values."""

    def __init__(self, shape: Shape, config: ViTConfig) -> None:
        super().__init__()
        self.shape, self.config, self.is_causal = shape, config, False
        self.num_key_value_groups = HEADS // KV_HEADS
        queries, keys = HEADS * D_HEAD, KV_HEADS * D_HEAD
        if shape.fused:
            self.qkv = nn.Linear(WIDTH, queries + 2 * keys)
        else:
            self.q, self.k, self.v = nn.Linear(WIDTH, queries), nn.Linear(WIDTH, keys), nn.Linear(WIDTH, keys)
        for letter in shape.head_norms:
            n_heads = HEADS if letter == "q" else KV_HEADS
            setattr(self, f"{letter}_norm", nn.LayerNorm(n_heads * D_HEAD if shape.whole_norms else D_HEAD))
        if not shape.flat:
            self.proj = nn.Linear(queries, WIDTH)

    def weights(self, letter: str) -> tuple[Tensor, Tensor]:
        """``[d_model, head d_head]`` and the bias, of one projection, cut out by hand."""
        if not self.shape.fused:
            module = getattr(self, letter)
            return module.weight.T, module.bias
        weight, bias = self.qkv.weight.T, self.qkv.bias
        if self.shape.fused == "qkv":
            start, stop = {"q": (0, 12), "k": (12, 18), "v": (18, 24)}[letter]
            return weight[:, start:stop], bias[start:stop]
        # Two groups of two query heads, a key head and a value head, three features each.
        columns = {"q": [*range(0, 6), *range(12, 18)], "k": [6, 7, 8, 18, 19, 20], "v": [9, 10, 11, 21, 22, 23]}[
            letter
        ]
        return weight[:, columns], bias[columns]

    def _three(self, x: Tensor) -> list[Tensor]:
        if not self.shape.fused:
            return [self.q(x), self.k(x), self.v(x)]
        out = self.qkv(x)
        if self.shape.fused == "qkv":
            return list(out.split([12, 6, 6], dim=-1))
        groups = out.unflatten(-1, (KV_HEADS, 4, D_HEAD))
        return [groups[..., :2, :].flatten(-3), groups[..., 2, :].flatten(-2), groups[..., 3, :].flatten(-2)]

    def forward(self, x: Tensor) -> Tensor:
        """Attention through transformers' attention functions."""
        found = []
        for letter, value in zip("qkv", self._three(x), strict=True):
            norm = getattr(self, f"{letter}_norm", None)
            value = norm(value) if norm is not None and self.shape.whole_norms else value
            value = value.unflatten(-1, (-1, D_HEAD))
            if norm is None or self.shape.whole_norms:
                value = value.transpose(1, 2)
            elif self.shape.heads_first:
                value = norm(value.transpose(1, 2))
            else:
                value = norm(value).transpose(1, 2)
            found.append(value)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        z = attend(self, *found, None, scaling=D_HEAD**-0.5, dropout=0.0)[0].flatten(2)
        return z if self.shape.flat else self.proj(z)


class Two(nn.Module):
    """An MLP, gated or plain."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        if kind == "fused":
            self.gate_up = nn.Linear(WIDTH, 2 * D_MLP)
        else:
            self.up = nn.Linear(WIDTH, D_MLP)
            self.gate = nn.Linear(WIDTH, D_MLP) if kind else None
        self.down = nn.Linear(D_MLP, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """``down(gelu(gate) · up)``, or ``down(gelu(up))``."""
        if self.kind == "fused":
            gate, up = self.gate_up(x).chunk(2, dim=-1)
            return self.down(nn.functional.gelu(gate) * up)
        if self.gate is not None:
            return self.down(nn.functional.gelu(self.gate(x)) * self.up(x))
        return self.down(nn.functional.gelu(self.up(x)))


class LayerScale(nn.Module):
    """A factor for each coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``weight · x``."""
        return self.weight * x


class Block(nn.Module):
    """One block of a shape."""

    def __init__(self, shape: Shape, config: ViTConfig, layer: int) -> None:
        super().__init__()
        self.shape, self.layer = shape, layer
        self.branches = ["attn", "adapter"] if shape.kinds and layer == 1 else ["attn", "mlp"]
        if shape.adapter:
            self.branches.insert(1, "adapter")
        self.attn, self.mlp = OwnAttention(shape, config), Two(shape.gated_mlp)
        self.adapter = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, WIDTH))
        self.ln1, self.ln2, self.ln3 = (nn.LayerNorm(WIDTH) for _ in range(3))
        if shape.norm == "sandwich":
            self.post1, self.post2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        if shape.flat:
            self.attn_out = nn.Linear(HEADS * D_HEAD, WIDTH)
        if shape.scales:
            self.scale1, self.scale2 = LayerScale(), LayerScale()
        if shape.gates:
            width = WIDTH if shape.gates == "vector" else 1
            self.lambda1, self.lambda2 = (nn.Parameter(torch.rand(width) + 0.2) for _ in range(2))

    def norm_of(self, branch: str) -> nn.Module:
        """The norm of a branch."""
        number = 0 if self.shape.shared else self.branches.index(branch)
        return (self.ln1, self.ln2, self.ln3)[number]

    def gate(self, branch: str) -> Tensor | None:
        """What the block multiplies a branch with."""
        if not self.shape.gates or branch == "adapter":
            return None
        value = self.lambda1 if branch == "attn" else self.lambda2
        return value.tanh() if self.shape.gates == "tanh" else value

    def _core(self, branch: str, x: Tensor) -> Tensor:
        out = getattr(self, branch)(x)
        if branch == "attn" and self.shape.flat:
            out = self.attn_out(out)
        number = 1 if branch == "attn" else 2
        if self.shape.scales and branch != "adapter":
            out = getattr(self, f"scale{number}")(out)
        if self.shape.norm == "sandwich" and branch != "adapter":
            out = getattr(self, f"post{number}")(out)
        gate = self.gate(branch)
        return out if gate is None else gate * out

    def forward(self, hidden_states: Tensor) -> Tensor:
        """The block, by its modules or by hand."""
        if TAP:
            return ByHand(self, TAP[0])(hidden_states)
        x, shape = hidden_states, self.shape
        if shape.parallel:
            normed = {branch: self.ln1(x) for branch in ("attn",)} if shape.shared else {}
            total = x
            for branch in self.branches:
                read = normed["attn"] if shape.shared else self.norm_of(branch)(x)
                total = total + self._core(branch, read)
            return total
        for branch in self.branches:
            if shape.norm == "post":
                x = self.norm_of(branch)(x + self._core(branch, x))
            elif shape.norm == "sandwich" and branch != "adapter":
                x = x + self._core(branch, x)
            else:
                x = x + self._core(branch, self.norm_of(branch)(x))
        return x


class ByHand:
    """A block multiplied out, with a tap at every site."""

    def __init__(self, block: Block, tap: Tap) -> None:
        self.block, self.shape = block, block.shape
        self.tap = lambda site, value: tap(f"vision.blocks.{block.layer}.{site}", value)

    def __call__(self, x: Tensor) -> Tensor:
        x = self.tap("hook_resid_pre", x)
        total, before = x, ""
        for number, branch in enumerate(self.block.branches):
            if number and not self.shape.parallel:
                total = self.tap("hook_resid_mid" if number == 1 else f"hook_resid_mid_{before}", total)
            read = x if self.shape.parallel else total
            added = self.tap(f"hook_{branch}_out", self.added(branch, number, read))
            total, before = total + added, branch
            if self.shape.norm == "post":
                total = self.tap(f"ln{number + 1}.hook_in", total)
                total = self.normed(f"ln{number + 1}", self.block.norm_of(branch), total)
        return self.tap("hook_resid_post", total)

    def normed(self, name: str, norm: Any, x: Tensor, heads: int = 0) -> Tensor:
        """A norm, with its scale and normalised value; over all heads together where ``heads`` says how many there are."""
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        if heads:
            scale = self.tap(f"{name}.hook_scale", scale.unsqueeze(-2)).squeeze(-2)
            unit = self.tap(f"{name}.hook_normalized", (centred / scale).unflatten(-1, (heads, -1))).flatten(-2)
        else:
            scale = self.tap(f"{name}.hook_scale", scale)
            unit = self.tap(f"{name}.hook_normalized", centred / scale)
        return unit * norm.weight + norm.bias

    def added(self, branch: str, number: int, x: Tensor) -> Tensor:
        """What a branch adds."""
        own = x if branch == "attn" else self.tap(f"hook_{branch}_in", x)
        norm = None if self.shape.norm in ("post", "sandwich") and branch != "adapter" else self.block.norm_of(branch)
        if self.shape.norm == "post":
            norm = None
        name = "ln1" if self.shape.shared else f"ln{number + 1}"
        if norm is None:
            read = own
        elif self.shape.shared and number:
            read = self.first if own is x else norm(own)
        else:
            read = self.first = self.normed(name, norm, own)
        if branch == "attn":
            out = self.attention(read, x, norm)
        elif branch == "mlp":
            out = self.mlp(read)
        else:
            out = self.block.adapter(read)
        which = 1 if branch == "attn" else 2
        if self.shape.scales and branch != "adapter":
            out = out * getattr(self.block, f"scale{which}").weight
        if self.shape.norm == "sandwich" and branch != "adapter":
            out = self.normed(f"ln{number + 1}_post", getattr(self.block, f"post{which}"), out)
        gate = self.block.gate(branch)
        return out if gate is None else gate * out

    def attention(self, read: Tensor, stream: Tensor, norm: Any) -> Tensor:
        """Attention, head by head."""
        attn, found = self.block.attn, {}
        for letter, n_heads in (("q", HEADS), ("k", KV_HEADS), ("v", KV_HEADS)):
            weight, bias = attn.weights(letter)
            per_head = stream.unsqueeze(-2).expand(*stream.shape[:-1], n_heads, WIDTH)
            slot = self.tap(f"hook_{letter}_input", per_head)
            if slot is per_head:
                value = (read @ weight + bias).unflatten(-1, (n_heads, D_HEAD))
            else:
                behind = slot if norm is None else norm(slot)
                by_head = weight.unflatten(1, (n_heads, D_HEAD))
                value = torch.einsum("bphm,mhd->bphd", behind, by_head) + bias.unflatten(0, (n_heads, D_HEAD))
            value = self.tap(f"attn.hook_{letter}", value)
            own = getattr(attn, f"{letter}_norm", None)
            if own is not None and self.shape.whole_norms:
                value = self.normed(f"attn.{letter}_norm", own, value.flatten(-2), n_heads).unflatten(-1, (n_heads, -1))
            elif own is not None:
                value = self.normed(f"attn.{letter}_norm", own, value)
            found[letter] = value
        keys, values = (found[letter].repeat_interleave(HEADS // KV_HEADS, dim=2) for letter in "kv")
        scores = self.tap("attn.hook_attn_scores", torch.einsum("bqhd,bkhd->bhqk", found["q"], keys) * D_HEAD**-0.5)
        pattern = self.tap("attn.hook_pattern", scores.softmax(-1))
        z = self.tap("attn.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, values))
        out: Any = self.block.attn_out if self.shape.flat else attn.proj
        results = self.tap(
            "attn.hook_result", torch.einsum("bqhd,hdm->bqhm", z, out.weight.T.unflatten(0, (HEADS, -1)))
        )
        return results.sum(-2) + out.bias

    def mlp(self, read: Tensor) -> Tensor:
        """The MLP, neuron by neuron."""
        mlp = self.block.mlp
        if mlp.kind == "fused":
            gate = read @ mlp.gate_up.weight[:D_MLP].T + mlp.gate_up.bias[:D_MLP]
            up = read @ mlp.gate_up.weight[D_MLP:].T + mlp.gate_up.bias[D_MLP:]
        elif mlp.kind:
            gate, up = mlp.gate(read), mlp.up(read)
        else:
            gate, up = mlp.up(read), None
        post = nn.functional.gelu(self.tap("mlp.hook_pre", gate))
        post = post if up is None else post * self.tap("mlp.hook_pre_linear", up)
        return mlp.down(self.tap("mlp.hook_post", post))


class Own(nn.Module):
    """The tower with a head; its code writes between blocks where the shape says so."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.config = ViTConfig(
            hidden_size=WIDTH,
            num_attention_heads=HEADS,
            num_hidden_layers=LAYERS,
            intermediate_size=D_MLP,
            image_size=8,
            patch_size=4,
        )
        self.config.num_key_value_heads = KV_HEADS
        self.config.deepstack = shape.deepstack
        self.config._attn_implementation = "eager"
        self.patches = nn.Conv2d(3, WIDTH, 4, 4)
        self.cls_token, self.pos_embed = (nn.Parameter(torch.randn(1, n, WIDTH)) for n in (1, N_POS))
        self.blocks = nn.ModuleList(Block(shape, self.config, layer) for layer in range(LAYERS))
        self.deep = nn.ModuleList(nn.Linear(3 * 16, WIDTH) for _ in shape.deepstack)
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, N_OUT)

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Logits."""
        x = self.patches(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        flat = nn.functional.unfold(pixel_values, 4, stride=4).transpose(1, 2)
        for layer, block in enumerate(self.blocks):
            x = block(x)
            if layer in self.shape.deepstack:
                deep = self.deep[self.shape.deepstack.index(layer)](flat)
                added = torch.cat([torch.zeros_like(x[:, :1]), deep], 1)
                x = x + (TAP[0](f"vision.blocks.{layer}.hook_deepstack", added) if TAP else added)
        return {"logits": self.head(self.norm(x)[:, 0])}


def by_hand(
    module: Own, inputs: dict[str, Tensor], change: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and every site, with some sites changed by functions."""
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
    """Pictures of two by two patches."""
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=generator).to(dtype)}


def layout_of(block: Any) -> BlockLayout:
    """What a family file would say of a block."""
    shape: Shape = block.shape
    norms = {letter: f"attn.{letter}_norm" for letter in shape.head_norms}
    three: dict[str, Any] = {letter: f"attn.{letter}" for letter in "qkv"}
    if shape.fused:
        three = {"qkv": Fused("attn.qkv", shape.fused)}  # type: ignore[arg-type]
    attention = Attention(
        "attn",
        o="attn_out" if shape.flat else "attn.proj",
        heads_first=shape.heads_first,
        **three,
        **{f"{letter}_norm": path for letter, path in norms.items()},
    )
    ways = {
        "": MLP("mlp", fc_in="mlp.up", fc_out="mlp.down"),
        "gated": MLP("mlp", fc_in="mlp.up", fc_out="mlp.down", gate="mlp.gate"),
        "fused": MLP("mlp", fc_out="mlp.down", fused=Fused("mlp.gate_up", "gate_in")),
    }
    cores = {"attn": attention, "mlp": ways[shape.gated_mlp], "adapter": Module("adapter")}
    branches = []
    for number, name in enumerate(block.branches):
        which, own = (1 if name == "attn" else 2), name != "adapter"
        then: list[Any] = [f"scale{which}"] if shape.scales and own else []
        then += [f"post{which}"] if shape.norm == "sandwich" and own else []
        then += [Gate(f"lambda{which}", tanh=shape.gates == "tanh")] if shape.gates and own else []
        norm = "ln1" if shape.shared else f"ln{number + 1}"
        pre = None if shape.norm == "post" or (shape.norm == "sandwich" and own) else norm
        after = norm if shape.norm == "post" else None
        branches.append(Branch(cores[name], norm=pre, then=tuple(then), sum_norm=after, name=name))
    return BlockLayout(tuple(branches), parallel=shape.parallel)


def register(name: str = "synthetic_blocks") -> None:
    """The family of :class:`Own`, registered as somebody's own would be."""
    stack = Stack(
        blocks="blocks",
        block=layout_of,
        final_norm="norm",
        embed="patches",
        prefix=("cls",),
        image=True,
        writers=(Writer("hook_deepstack", lambda config: config.deepstack),),
    )
    tower = TowerSpec("vision", stack=stack, readout=Readout(pool="cls", head="head", reads=("cls",)))
    register_family(Family(name=name, classes=("Own",), output="logits", towers=(tower,)))


SHAPES: dict[str, Shape] = {
    "plain": Shape(),
    "fused": Shape(fused="qkv"),
    "fused_groups": Shape(fused="groups", gated_mlp="fused"),
    "norms_of_heads": Shape(head_norms="qkv", gated_mlp="gated"),
    "norms_heads_first": Shape(head_norms="qk", heads_first=True, fused="qkv"),
    "norms_of_all_heads": Shape(head_norms="qkv", whole_norms=True),
    "vector_gates": Shape(gates="vector"),
    "tanh_gates": Shape(gates="tanh", scales=True),
    "gates_behind_norms": Shape(gates="vector", norm="sandwich"),
    "norms_behind": Shape(norm="sandwich", scales=True),
    "third_writer": Shape(adapter=True),
    "third_writer_gated": Shape(adapter=True, gates="tanh"),
    "parallel": Shape(parallel=True),
    "parallel_shared": Shape(parallel=True, shared=True, fused="groups"),
    "parallel_gated": Shape(parallel=True, shared=True, gates="vector", adapter=True),
    "post_norm": Shape(norm="post"),
    "post_norm_gated": Shape(norm="post", gates="vector", flat=True),
    "deepstack": Shape(deepstack=(0, 1)),
    "kinds_by_layer": Shape(kinds=True),
    "flat": Shape(flat=True, fused="qkv"),
}

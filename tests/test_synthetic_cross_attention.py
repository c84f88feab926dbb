"""A language tower that attends to a vision tower: sites of the cross-attention, edits of both towers and sweeps, against the same weights by hand.

Block 0 is plain, block 1 has a tanh-gated cross-attention in the place of its own, block 2 has both.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import ViTConfig, ViTModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError, UnsupportedModelError
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

pytestmark = pytest.mark.usefixtures("tables")
EXACT = {"rtol": 1e-10, "atol": 1e-12}
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
            out = self.by_hand(p, branch, norm(x), vision_states)
            out = self.gate.tanh() * out if branch == "cross_attn" else out
            x, before = x + tap(f"{p}.hook_{branch}_out", out), branch
        return x if tap is None else tap(f"language.blocks.{self.layer}.hook_resid_post", x)

    def by_hand(self, p: str, branch: str, normed: Tensor, seen: Tensor) -> Tensor:
        tap = TAP[0]
        if branch == "mlp":
            return self.mlp.down(tap(f"{p}.mlp.hook_post", self.mlp.up(normed).relu()))
        own, found = getattr(self, branch), {}
        for letter in "qkv":
            source = seen if branch == "cross_attn" and letter != "q" else normed
            weight, bias = getattr(own, letter).weight, getattr(own, letter).bias
            found[letter] = tap(
                f"{p}.{branch}.hook_{letter}", (source @ weight.T + bias).unflatten(-1, (HEADS, D_HEAD))
            )
        scores = torch.einsum("bqhd,bkhd->bhqk", found["q"], found["k"]) * D_HEAD**-0.5
        if branch == "attn":
            scores = scores + torch.full_like(scores[0, 0], torch.finfo(scores.dtype).min).triu(1)
        scores = tap(f"{p}.{branch}.hook_attn_scores", scores)
        pattern = tap(f"{p}.{branch}.hook_pattern", scores.softmax(-1))
        z = tap(f"{p}.{branch}.hook_z", torch.einsum("bhqk,bkhd->bqhd", pattern, found["v"]))
        w_o = own.o.weight.T.unflatten(0, (HEADS, D_HEAD))
        return tap(f"{p}.{branch}.hook_result", torch.einsum("bqhd,hdm->bqhm", z, w_o)).sum(-2) + own.o.bias


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


def built(projects: bool = False, connectors: Any = None) -> tuple[Crossing, cv.HookedModel, dict[str, Tensor]]:
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
    torch.manual_seed(0)
    module = Crossing(projects).double().eval()
    for parameter in module.parameters():
        parameter.data += 0.4 * torch.randn_like(parameter)
    inputs = {
        "input_ids": torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]]),
        "pixel_values": torch.randn(2, 3, 8, 8, dtype=torch.float64),
    }
    return module, cv.HookedModel(module), inputs


def by_hand(
    module: Any, inputs: dict[str, Tensor], change: dict[str, Any] | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    values: dict[str, Tensor] = {}

    def tap(site: str, value: Tensor) -> Tensor:
        values[site] = value if change is None or site not in change else change[site](value)
        return values[site]

    with tapped(tap):
        return module(**inputs)["logits"], values


def test_every_site_of_the_language_tower_reads_and_writes_as_by_hand() -> None:
    module, model, inputs = built()
    with torch.no_grad():
        expected, values = by_hand(module, inputs)
        torch.testing.assert_close(model(inputs), expected, **EXACT)
        _, cache = model.run_with_cache(inputs, list(values))
        for site, value in values.items():
            torch.testing.assert_close(cache[site], value, **EXACT, msg=lambda text, site=site: f"{site}: {text}")

            def changed(value: Tensor, *where: Any) -> Tensor:
                out = value.clone()
                out[1, 1] = out[1, 1] * 0.7 + 0.1
                return out

            edited, _ = by_hand(module, inputs, {site: changed})
            found = model.run_with_hooks(inputs, [(site, changed)])
            torch.testing.assert_close(found, edited, **EXACT, msg=lambda text, site=site: f"{site}: {text}")
            assert not torch.equal(edited, expected), site
    missing = {site for site in model.sites("language.blocks.**") if "cross_attn" in site} - set(values)
    assert missing == {f"language.blocks.{layer}.cross_attn.hook_q_input" for layer in (1, 2)}
    assert cache["language.blocks.2.cross_attn.hook_k"].shape == (2, 5, HEADS, D_HEAD)
    assert cache["language.blocks.2.cross_attn.hook_pattern"].shape == (2, HEADS, 4, 5)
    assert not [site for site in model.sites("language.blocks.1.**") if ".attn." in site]


@pytest.mark.parametrize("projects", [False, True])
def test_edits_of_either_tower_by_position_and_key(projects: bool) -> None:
    module, model, inputs = built(projects)
    key = "language.blocks.1.cross_attn.hook_k"
    value, pattern = "language.blocks.2.cross_attn.hook_v", "language.blocks.2.cross_attn.hook_attn_scores"
    patches = [1, 3]

    def at(rows: list[int], number: float) -> Any:
        def change(value: Tensor) -> Tensor:
            out = value.clone()
            out[:, rows] = number
            return out

        return change

    hidden = torch.finfo(torch.float64).min

    def hide(scores: Tensor) -> Tensor:
        out = scores.clone()
        out[:, 1, 2:, patches] = hidden
        return out

    with torch.no_grad():
        tokens = model.tokens(inputs)["vision"]
        # The first patch is position 1, the third one position 3: said in the vision tower's own words.
        ways: list[tuple[Any, dict[str, Any]]] = [
            (edits.replace(key, 0.5, positions=patches), {key: at(patches, 0.5)}),
            (edits.replace(key, 0.5, positions=tokens.select("patch")), {key: at([1, 2, 3, 4], 0.5)}),
            (edits.replace(value, -1.0, positions=[0]), {value: at([0], -1.0)}),
            (
                edits.block_attention("language", queries=[2, 3], keys=("vision", patches), heads=1, layers=[2]),
                {pattern: hide},
            ),
        ]
        groups = [[edit] for edit, _ in ways]
        expected = [by_hand(module, inputs, change)[0] for _, change in ways]
        for group, right in zip(groups, expected, strict=True):
            torch.testing.assert_close(model.run(inputs, group), right, **EXACT)
        swept = model.sweep(inputs, groups, lambda logits: logits[:, -1, 3], progress=False)
        torch.testing.assert_close(swept.values, torch.stack([one[:, -1, 3] for one in expected]), **EXACT)
        assert not any(plan.in_full for plan in swept.plan)


@pytest.mark.parametrize("projects", [False, True])
def test_a_sweep_over_both_towers_is_the_loop_and_keeps_the_blocks_before_the_first_that_attends(
    projects: bool,
) -> None:
    module, model, inputs = built(projects)
    sites = [site for site in model.sites("*.blocks.*.**") if "scale" not in site and not model.is_dead(site)]
    sites += ["projector.hook_out"] if projects else []
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        single = [[edits.replace(site, cache[site] * 1.3 + 0.1, positions=[1])] for site in sites]
        named = dict(zip(sites, single, strict=True))
        vision, language = named["vision.blocks.1.hook_mlp_out"], named["language.blocks.0.hook_mlp_out"]
        groups = [*single, [*vision, *language], [*vision, *named["language.blocks.2.hook_attn_out"]]]
        calls: list[int] = []
        handle = module.decoder.layers[0].mlp.register_forward_hook(lambda *given: calls.append(1))
        swept = model.sweep(inputs, groups, lambda logits: logits[:, -1, 3], progress=False)
        handle.remove()
        for number, group in enumerate(groups):
            own = model.run(inputs, group)[:, -1, 3]
            torch.testing.assert_close(
                swept.values[number], own, **EXACT, msg=lambda text, group=group: f"{group}: {text}"
            )
        assert not any(plan.in_full for plan in swept.plan)
        before = len(calls)
        calls.clear()
        handle = module.decoder.layers[0].mlp.register_forward_hook(lambda *given: calls.append(1))
        model.sweep(inputs, [vision], lambda logits: logits[:, -1, 3], progress=False)
        handle.remove()
    assert len(calls) == 1, "an edit of the vision tower runs block 0 once, in the unedited run"
    assert before > 1


def test_hidden_pictures_are_what_no_cross_attention_sees() -> None:
    module, model, inputs = built()
    with torch.no_grad():
        found = model.run(inputs, [edits.block_attention("language", keys=("vision", slice(1, None)))])
        scores = [f"language.blocks.{layer}.cross_attn.hook_attn_scores" for layer in (1, 2)]

        def hide(value: Tensor) -> Tensor:
            out = value.clone()
            out[..., 1:] = torch.finfo(out.dtype).min
            return out

        torch.testing.assert_close(found, by_hand(module, inputs, dict.fromkeys(scores, hide))[0], **EXACT)
    with pytest.raises(InputError, match="block 0 of the language tower does not look at the vision tower"):
        model.run(inputs, [edits.block_attention("language", keys=("vision", [1]), layers=[0])])
    with pytest.raises(InputError, match="block_attention"):
        model.run(inputs, [edits.delete_tokens("vision", [1])])


def test_gradients_reach_the_vision_tower_and_the_terms_add_up() -> None:
    _, model, inputs = built()
    sites = [
        "vision.blocks.0.hook_resid_post",
        "language.blocks.1.hook_cross_attn_out",
        "language.blocks.2.cross_attn.hook_k",
    ]
    _, cache = model.run_with_cache(inputs, sites, incl_bwd=True, metric=lambda logits: logits[:, -1, 3].sum())
    for site in sites:
        shift = torch.zeros_like(cache[site])
        shift[0, 1] = 1e-6

        def moved(value: Tensor, where: Any, shift: Tensor = shift) -> Tensor:
            return value + shift

        with torch.no_grad():
            up = model.run_with_hooks(inputs, [(site, moved)])[:, -1, 3].sum()
            down = model.run_with_hooks(inputs, [(site, lambda value, where, shift=shift: value - shift)])[
                :, -1, 3
            ].sum()
        expected = cache[f"{site}_grad"][0, 1].sum()
        torch.testing.assert_close((up - down) / 2e-6, expected, rtol=1e-5, atol=1e-7)
    _, whole = model.run_with_cache(inputs)
    found = cv.readout.direct_attribution(model, whole, 3, by="component", position=-1)
    assert {"language L1.cross_attn", "language L2.cross_attn", "language L2.attn"} <= set(found.axes["term"])
    torch.testing.assert_close(found.values.sum(0).double(), model(inputs)[:, -1, 3], rtol=1e-5, atol=1e-6)


def test_a_table_that_does_not_say_whom_blocks_attend_to_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="via='cross'"):
        built(True, (Connector(("vision",), "language", "projector"),))

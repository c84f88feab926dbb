"""TransformerLens's patching and interchange on our towers, against the same patches made with our own hooks."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import interop
from circuitvision.errors import InputError, UnknownSiteError
from tests.interop.common import wrapped
from tests.zoo import CASES

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot reach the output")
TOWERS = [
    ("vit", "vision"),
    ("dinov2", "vision"),
    ("clip", "vision"),
    ("clip", "text"),
    ("llava-clip-llama", "vision"),
    ("llava-clip-llama", "language"),
    ("paligemma2", "language"),
    ("pi0", "vision"),
    ("pi0", "language"),
    ("pi0", "action"),
]


@pytest.fixture(autouse=True)
def _no_bars(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformer_lens import patching

    monkeypatch.setattr(patching, "tqdm", lambda items, **options: items)


class Pair:
    """A clean and a corrupt run of one tower, ours and theirs, and a metric that weighs every output."""

    def __init__(self, name: str, tower: str) -> None:
        self.model, self.clean = wrapped(name)
        self.corrupt = CASES[name].inputs(self.model.module, batch=2, seed=1)
        self.tower = tower
        self.view = interop.transformer_lens(self.model, tower=tower)
        self.tokens = self.view.to_tokens(self.corrupt)
        with torch.no_grad():
            _, self.ours = self.model.run_with_cache(self.clean, [f"{tower}.blocks.**", f"{tower}.hook_input"])
            _, self.theirs = self.view.run_with_cache(self.view.to_tokens(self.clean))
            self.base = self.model(self.corrupt)
        self.weight = torch.randn(self.base.shape, generator=torch.Generator().manual_seed(0))

    def metric(self, output: Tensor) -> Tensor:
        return (output * self.weight).sum()

    def patched(self, site: str, place: Callable[..., Any]) -> float:
        """The metric with a part of one site of the corrupt run set to its clean value by our own hook."""
        name = f"{self.tower}.{site}"

        def patch(value: Tensor, hook: Any) -> Tensor:
            value[place] = self.ours[name][place]
            return value

        return float(self.metric(self.model.run_with_hooks(self.corrupt, [(name, patch)])))


ALL = slice(None)
SWEEPS: dict[str, tuple[str, str, Callable[..., Any]]] = {
    "resid_pre": ("hook_resid_pre", "p", lambda p: (ALL, p)),
    "resid_mid": ("hook_resid_mid", "p", lambda p: (ALL, p)),
    "attn_out": ("hook_attn_out", "p", lambda p: (ALL, p)),
    "mlp_out": ("hook_mlp_out", "p", lambda p: (ALL, p)),
    "attn_head_out_by_pos": ("attn.hook_z", "ph", lambda p, h: (ALL, p, h)),
    "attn_head_q_by_pos": ("attn.hook_q", "ph", lambda p, h: (ALL, p, h)),
    "attn_head_k_by_pos": ("attn.hook_k", "pk", lambda p, h: (ALL, p, h)),
    "attn_head_v_by_pos": ("attn.hook_v", "pk", lambda p, h: (ALL, p, h)),
    "attn_head_pattern_by_pos": ("attn.hook_pattern", "hp", lambda h, p: (ALL, h, p)),
    "attn_head_out_all_pos": ("attn.hook_z", "h", lambda h: (ALL, ALL, h)),
    "attn_head_q_all_pos": ("attn.hook_q", "h", lambda h: (ALL, ALL, h)),
    "attn_head_k_all_pos": ("attn.hook_k", "k", lambda h: (ALL, ALL, h)),
    "attn_head_v_all_pos": ("attn.hook_v", "k", lambda h: (ALL, ALL, h)),
    "attn_head_pattern_all_pos": ("attn.hook_pattern", "h", lambda h: (ALL, h)),
}


def cells(pair: Pair, axes: str) -> tuple[int, ...]:
    """Lengths of a sweep's axes: layers, then positions, heads or key-value heads."""
    cfg = pair.model.towers[pair.tower].cfg
    sizes = {"p": pair.tokens.shape[1], "h": cfg.n_heads, "k": cfg.n_kv_heads}
    return (cfg.n_layers, *(sizes[axis] for axis in axes))


def checked(shape: Sequence[int], count: int) -> list[tuple[int, ...]]:
    """``count`` cells spread over all of them, the last one (the last token of the last block) among them."""
    every = list(itertools.product(*map(range, shape)))
    step = max(1, len(every) // count)
    return [*every[::step], every[-1]]


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_every_sweep_equals_the_patches_by_our_hooks(name: str, tower: str) -> None:
    from transformer_lens import patching

    pair = Pair(name, tower)
    # One tower is enough for the sweeps over every position of every head: they are hundreds of runs each.
    per_position = (name, tower) == ("llava-clip-llama", "vision")
    with torch.no_grad():
        for sweep, (site, axes, place) in SWEEPS.items():
            if "by_pos" in sweep and not per_position:
                continue
            found = getattr(patching, f"get_act_patch_{sweep}")(pair.view, pair.tokens, pair.theirs, pair.metric)
            assert tuple(found.shape) == cells(pair, axes), sweep
            for cell in checked(found.shape, 6):
                expected = pair.patched(f"blocks.{cell[0]}.{site}", place(*cell[1:]))
                assert float(found[cell]) == pytest.approx(expected, rel=1e-6, abs=1e-6), f"{sweep} at {cell}"


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_pattern_patches_reach_the_output(name: str, tower: str) -> None:
    """A bridge fires these hooks in vision towers and throws the edit away; its sweep is then flat."""
    from transformer_lens import patching

    pair = Pair(name, tower)
    with torch.no_grad():
        found = patching.get_act_patch_attn_head_pattern_all_pos(pair.view, pair.tokens, pair.theirs, pair.metric)
        for layer in range(found.shape[0]):
            site = f"{tower}.blocks.{layer}.attn.hook_pattern"
            nothing = pair.model.run_with_hooks(pair.corrupt, [(site, lambda value, hook: None)])
            moved = float((found[layer] - pair.metric(nothing)).abs().max())
            assert (moved == 0.0) == pair.model.is_dead(site), site


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_positions_are_tokens_of_the_tower(name: str, tower: str) -> None:
    pair = Pair(name, tower)
    resid = pair.ours[f"{tower}.blocks.0.hook_resid_pre"]
    assert pair.tokens.shape[1] == resid.shape[1] == pair.model.tokens(pair.corrupt)[tower].n_positions
    assert pair.tokens.shape[1] != pair.corrupt["pixel_values"].shape[-1]


@pytest.mark.parametrize("helper", ["attn_head_all_pos_every", "block_every"])
def test_the_helpers_that_run_several_sweeps(helper: str) -> None:
    from transformer_lens import patching

    pair = Pair("llava-clip-llama", "language")
    run = getattr(patching, f"get_act_patch_{helper}")
    with torch.no_grad():
        found = run(pair.view, pair.tokens, pair.theirs, pair.metric)
        out = patching.get_act_patch_attn_head_out_all_pos(pair.view, pair.tokens, pair.theirs, pair.metric)
    assert torch.isfinite(found).all()
    if helper == "attn_head_all_pos_every":
        assert torch.equal(found[0], out)


def test_per_example_results() -> None:
    from transformer_lens import patching

    pair = Pair("llava-clip-llama", "language")

    def metric(logits: Tensor) -> Tensor:
        return (logits * pair.weight).sum(dim=(1, 2))

    with torch.no_grad():
        found = patching.get_act_patch_resid_pre(
            pair.view, pair.tokens, pair.theirs, metric, reduce="none", baseline=True
        )
        base = metric(pair.base)
    assert found.values.shape == (2, pair.tokens.shape[1], 2)
    assert torch.equal(found.baseline, base)
    assert float(found.effect().abs().max()) > 0


@pytest.mark.parametrize(("name", "tower"), [("vit", "vision"), ("dinov2", "vision"), ("llava-clip-llama", "vision")])
def test_direct_paths_equal_the_same_edit_by_our_hook(name: str, tower: str) -> None:
    """With LayerScale (DINOv2) a head adds ``z W_O`` times the scale; the sum over heads and the bias is what the site holds."""
    from transformer_lens import patching

    pair = Pair(name, tower)
    with torch.no_grad():
        _, corrupt = pair.view.run_with_cache(pair.tokens)
        found = patching.get_act_patch_direct_path(
            pair.view, pair.tokens, pair.theirs, corrupt, pair.metric, 0, 1, verbose=False
        )
        attn = pair.view.blocks[0].attn
        added = torch.einsum("bphd,hdm->bpm", pair.theirs["blocks.0.attn.hook_z"], attn.W_O) + attn.b_O
        assert torch.allclose(added, pair.ours[f"{tower}.blocks.0.hook_attn_out"], atol=1e-5)
        z = f"{tower}.blocks.0.attn.hook_z"
        delta = (pair.ours[z] - corrupt["blocks.0.attn.hook_z"])[:, :, 1] @ attn.W_O[1]

        def add(value: Tensor, hook: Any) -> Tensor:
            value[:, :, 2] += delta
            return value

        expected = pair.model.run_with_hooks(pair.corrupt, [(f"{tower}.blocks.1.hook_q_input", add)])
    assert float(found[1, 2]) == pytest.approx(float(pair.metric(expected)), rel=1e-4)
    assert float((found[1] - pair.metric(pair.base)).abs().max()) > 1e-4


def test_direct_paths_through_a_norm_are_refused() -> None:
    from transformer_lens import patching

    pair = Pair("paligemma2", "language")
    with torch.no_grad(), pytest.raises(ValueError, match="ln1_post"):
        patching.get_act_patch_direct_path(
            pair.view, pair.tokens, pair.theirs, pair.theirs, pair.metric, 0, 0, verbose=False
        )


@pytest.mark.parametrize(("name", "tower"), [("vit", "vision"), ("clip", "text"), ("llava-clip-llama", "language")])
def test_das_and_its_placebo(name: str, tower: str) -> None:
    from transformer_lens.tools.analysis import interchange

    model, inputs = wrapped(name, batch=4)
    view = interop.transformer_lens(model, tower=tower)
    tokens, site = view.to_tokens(inputs), "blocks.0.hook_resid_post"
    order = torch.arange(len(tokens)).roll(1)
    positions = torch.full((len(tokens),), 1)

    def task(rows: Tensor) -> Tensor:
        out = view(rows)
        out = out.T if tower == "text" else out
        return (out[:, -1] if out.ndim == 3 else out)[:, :3]

    with torch.no_grad():
        sources = interchange.collect_activations(view, site, tokens[order], task, positions=positions[order])
        _, cache = model.run_with_cache(inputs, f"{tower}.{site}")
    assert torch.allclose(sources, cache[f"{tower}.{site}"][order, 1], atol=1e-5)
    fitted = interchange.fit_das(
        view,
        site,
        tokens,
        tokens[order],
        torch.arange(len(tokens)) % 3,
        task,
        rank=2,
        base_positions=positions,
        source_positions=positions[order],
        epochs=2,
        batch_size=2,
    )
    assert fitted.basis.shape == (model.towers[tower].cfg.d_model, 2)
    assert all(parameter.requires_grad for parameter in model.parameters())
    step = interchange.SubspaceInterchange(fitted.basis)
    placebo = interchange.NormMatchedPlacebo(step, interchange.random_basis(fitted.basis.shape[0], 2, seed=0))
    outputs = []
    for way in (step, placebo):
        moved = interchange.intervened_logits(view, site, way, tokens, sources, task, positions=positions, batch_size=3)

        def edit(value: Tensor, hook: Any, way: Any = way) -> Tensor:
            value[:, 1] = way(value[:, 1], sources)
            return value

        with torch.no_grad(), model.hooks([(f"{tower}.{site}", edit)]):
            expected = task(tokens)
        assert torch.allclose(moved, expected, atol=1e-5)
        outputs.append(moved)
    with torch.no_grad():
        clean = task(tokens)
    assert not torch.allclose(outputs[0], clean, atol=1e-4)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-4)


def test_training_mode_is_noticed() -> None:
    from transformer_lens import patching

    pair = Pair("vit", "vision")
    pair.model.train()
    with pytest.raises(ValueError, match="evaluation mode"):
        patching.get_act_patch_resid_pre(pair.view, pair.tokens, pair.theirs, pair.metric)


def test_hooks_see_their_point() -> None:
    model, inputs = wrapped("vit")
    view = interop.transformer_lens(model)
    tokens = view.to_tokens(inputs)
    seen = []

    def look(value: Tensor, hook: Any) -> None:
        hook.ctx["runs"] = hook.ctx.get("runs", 0) + 1
        seen.append((hook.name, hook.layer(), hook.ctx["runs"]))

    for _ in range(2):
        view.run_with_hooks(tokens, fwd_hooks=[(lambda name: name.endswith("hook_z"), look)])
    assert seen[0] == ("blocks.0.attn.hook_z", 0, 1)
    assert seen[-1] == ("blocks.2.attn.hook_z", 2, 2)
    view.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", look)], clear_contexts=True)
    assert view.hook_dict["blocks.0.attn.hook_z"].ctx == {}
    gradients: list[Tensor] = []

    def keep(grad: Tensor, hook: Any) -> None:
        gradients.append(grad)

    with view.hooks(bwd_hooks=[("blocks.1.hook_resid_pre", keep)]):
        view(tokens).sum().backward()
    _, cache = model.run_with_cache(
        inputs, "vision.blocks.1.hook_resid_pre", incl_bwd=True, metric=lambda logits: logits.sum()
    )
    assert torch.allclose(gradients[0], cache["vision.blocks.1.hook_resid_pre_grad"], atol=1e-6)


def test_how_a_view_is_asked_for() -> None:
    model, _ = wrapped("clip", warm=False)
    assert interop.transformer_lens(model, tower="text").tower is model.text
    with pytest.raises(InputError, match="vision, text"):
        interop.transformer_lens(model)
    with pytest.raises(InputError, match="vision, text"):
        interop.transformer_lens(model, tower="language")
    model.vision.owner = weakref.ref(model)
    assert interop.transformer_lens(model.vision).model is model
    with pytest.raises(InputError, match="leave tower= out"):
        interop.transformer_lens(model.vision, tower="text")
    orphan = cv.HookedModel(model.module).vision
    orphan.owner = lambda: None
    with pytest.raises(InputError, match='tower="vision"'):
        interop.transformer_lens(orphan)


def test_what_a_view_cannot_do_is_refused() -> None:
    model, inputs = wrapped("llava-clip-llama")
    view = interop.transformer_lens(model, tower="vision")
    tokens = view.to_tokens(inputs)
    with pytest.raises(InputError, match="return_type"):
        view.run_with_hooks(tokens, return_type="loss")
    with pytest.raises(InputError, match="use view"):
        view.run_with_hooks(tokens, reset_hooks_end=False)
    with pytest.raises(InputError, match="incl_bwd"):
        view.run_with_cache(tokens, incl_bwd=True)
    with pytest.raises(UnknownSiteError, match=r"Nearest: blocks\.0\.attn\.hook_z"):
        view.run_with_hooks(tokens, fwd_hooks=[("vision.blocks.0.attn.hook_z", lambda value, hook: None)])
    with pytest.raises(UnknownSiteError):
        view.run_with_hooks(tokens, fwd_hooks=[("hook_pos_embed", lambda value, hook: None)])
    with pytest.raises(AttributeError, match="vision"):
        view.nothing

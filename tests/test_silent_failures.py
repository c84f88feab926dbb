"""Silent failures of other tools, each as a named test: the mistake is made on purpose where that shows that the test can fail.

The numbers in the names' order are those of PEERS' list; the two about installing packages and remote runs concern keywords and calls, not hooks.
"""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError
from tests.conformance.checks_model import hook_tables
from tests.conformance.setting import Setting, bare_output, close, disturb, same
from tests.zoo import CASES, SHAPES, Case, parametrize, primary, shared_model


def wrapped(case: Case, batch: int = 2) -> tuple[cv.HookedModel, dict[str, Any]]:
    """A fresh wrapped copy after one warm-up forward, and inputs."""
    module = copy.deepcopy(shared_model(case.name))
    inputs = case.inputs(module, batch=batch)
    with torch.no_grad():
        module(**inputs)
    return cv.HookedModel(module), inputs


def change(model: cv.HookedModel, inputs: dict[str, Any], site: str, fn: Any = None) -> float:
    """Largest change of the output when a site is disturbed."""
    with torch.no_grad():
        clean = model.run_with_hooks(inputs, [(site, lambda value, hook: None)])
        return float((model.run_with_hooks(inputs, [(site, fn or disturb())]) - clean).abs().max())


FED_BY_FEATURES = [case for case in CASES.values() if case.family.startswith("llava")]


@pytest.mark.parametrize("case", FED_BY_FEATURES, ids=str)
def test_llava_feature_layer_edit_reaches_output_after_warm_up(case: Case) -> None:
    model, inputs = wrapped(case)
    features = [layer for layer in model.vision.feature_layers_in() if layer > 0]
    for layer in features:
        assert change(model, inputs, f"vision.blocks.{layer - 1}.hook_resid_post") > 1e-3


def test_a_plain_hook_after_warm_up_is_lost_so_the_test_above_can_fail() -> None:
    case = CASES["llava-clip-llama"]
    model, inputs = wrapped(case)
    block = model.vision.blocks[model.vision.feature_layers_in()[0] - 1].module
    with torch.no_grad():
        clean = bare_output(model.module, inputs)
        handle = block.register_forward_hook(lambda module, args, out: out + torch.randn_like(out))
        assert torch.equal(bare_output(model.module, inputs), clean)
        handle.remove()


@pytest.mark.parametrize("case", FED_BY_FEATURES[:3], ids=str)
def test_only_our_own_hooks_are_removed(case: Case) -> None:
    model, inputs = wrapped(case)
    strangers: list[str] = []
    handle = model.vision.blocks[0].module.register_forward_hook(lambda module, args, out: strangers.append("seen"))
    before = hook_tables(model.module)
    with torch.no_grad():
        expected = bare_output(model.module, inputs)
        model.run_with_cache(inputs, "**")
        model.add_hook("vision.blocks.*.hook_resid_post", disturb())
        model(inputs)
        model.reset_hooks()
        same(model(inputs), expected, "output after reset_hooks")
        module = model.unwrap()
        same(bare_output(module, inputs), expected, "output after unwrap")
    assert hook_tables(module) == before
    assert len(strangers) == 5, "a hook of someone else's was dropped or doubled"
    handle.remove()


@parametrize()
@pytest.mark.parametrize("grad", [False, True])
def test_resid_mid_edit_reaches_the_skip_path_in_either_grad_mode(case: Case, grad: bool) -> None:
    """An edit that only replaced ln2's input would equal an edit of hook_mlp_in."""
    model, inputs = wrapped(case)
    for name in model.towers:
        p = f"{name}.blocks.0"
        with torch.set_grad_enabled(grad):
            with model.hooks([(f"{p}.hook_resid_mid", disturb())]):
                _, cache = model.run_with_cache(inputs, f"{p}.*")
            _, clean = model.run_with_cache(inputs, f"{p}.*")
        moved = cache[f"{p}.hook_resid_mid"] - clean[f"{p}.hook_resid_mid"]
        skipped = (cache[f"{p}.hook_resid_post"] - cache[f"{p}.hook_mlp_out"]) - (
            clean[f"{p}.hook_resid_post"] - clean[f"{p}.hook_mlp_out"]
        )
        close(skipped, moved, f"{p}: skip path", 1e-4)
        assert not torch.equal(cache[f"{p}.hook_mlp_out"], clean[f"{p}.hook_mlp_out"]), "the norm must see the edit too"


@parametrize()
def test_pattern_edits_change_the_output_of_every_tower(case: Case) -> None:
    """A transposed pattern must matter wherever attention is alive, and must be what multiplies the values."""
    model, inputs = wrapped(case)
    for name, tower in model.towers.items():
        for layer in range(tower.cfg.n_layers):
            site = f"{name}.blocks.{layer}.attn.hook_pattern"
            if not model.is_dead(site):
                assert change(model, inputs, site, lambda value, hook: value.flip(-1)) > 1e-5, site


@parametrize(without=("packed_patches",))
def test_positions_are_counted_from_the_grid_not_from_the_image_width(case: Case) -> None:
    model, inputs = wrapped(case)
    shape, tokens = SHAPES[case.name]["vision"], model.tokens(inputs)["vision"]
    assert shape.grid is not None
    assert tokens.n_positions == shape.n_prefix + shape.grid[0] * shape.grid[1]
    _, cache = model.run_with_cache(inputs, "vision.blocks.0.hook_resid_pre")
    assert cache["vision.blocks.0.hook_resid_pre"].shape[1] == tokens.n_positions

    def last_only(value: Tensor, hook: Any) -> Tensor:
        value[:, -1] = disturb()(value, hook)[:, -1]
        return value

    assert change(model, inputs, "vision.blocks.0.hook_resid_pre", last_only) > 1e-5, "the last position can be patched"


@parametrize("generates")
def test_sweeps_over_a_vlm_carry_its_images(case: Case) -> None:
    """Another picture under the same prompt changes what language sites hold: pixel_values travel with every hooked run."""
    model, inputs = wrapped(case)
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) * 0.5}
    site = "language.blocks.0.hook_resid_pre"
    with torch.no_grad():
        _, one = model.run_with_cache(inputs, site)
        _, two = model.run_with_cache(other, site)
        swapped = model.run_with_hooks(inputs, [("language.hook_input", lambda value, hook: two[site])])
        same(swapped, model(other), "patching the input of the language tower with another picture's")
    moved = (one[site] - two[site]).abs().amax(-1) > 0
    tokens = model.tokens(inputs)["language"]
    assert torch.equal(moved & ~tokens.mask("newline"), tokens.mask("patch") | tokens.mask("cls"))


@parametrize("generates")
def test_decompose_resid_adds_up_at_image_positions(case: Case) -> None:
    """With the placeholder's embedding in place of the projected patch the sum would be off exactly there."""
    model, inputs = wrapped(case)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    parts, labels = cache.decompose_resid("language", return_labels=True)
    final = cache[f"language.blocks.{model.language.cfg.n_layers - 1}.hook_resid_post"]
    close(parts.sum(0), final, "decomposition", 1e-5)
    assert len(labels) == len(parts) == 1 + 2 * model.language.cfg.n_layers
    image = model.tokens(inputs)["language"].image_number >= 0
    wrong = parts.clone()
    wrong[0] = cache["language.hook_embed"]
    gap = (wrong.sum(0) - final).abs().amax(-1)
    assert (gap[torch.from_numpy(image)] > 0.05).any(), "the wrong decomposition would show"


@parametrize()
def test_resid_post_is_never_normalised(case: Case) -> None:
    """Recorded hidden_states[-1] is normalised in some models and not in others; resid_post is what the block returned."""
    model, inputs = wrapped(case, batch=1)
    for name, tower in model.towers.items():
        raw: list[Tensor] = []

        def keep(module: Any, args: Any, out: Any, raw: list[Tensor] = raw) -> None:
            raw.append(out[0] if isinstance(out, tuple) else out)

        handle = tower.blocks[-1].module.register_forward_hook(keep)
        site = f"{name}.blocks.{tower.cfg.n_layers - 1}.hook_resid_post"
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, site)
        handle.remove()
        same(cache[site], raw[0], site)
        assert tower.final_norm is not None
        with torch.no_grad():
            assert not torch.allclose(tower.final_norm(raw[0]), raw[0], atol=1e-2)


@parametrize()
def test_knockout_on_scores_removes_the_key_under_the_default_attention(case: Case) -> None:
    """Scores at the dtype's minimum leave a pattern of exactly zero there, and the row still sums to one."""
    model, inputs = wrapped(case)
    for name in model.towers:
        p = f"{name}.blocks.0"

        def block(value: Tensor, hook: Any) -> Tensor:
            value[..., 1:, 0] = torch.finfo(value.dtype).min
            return value

        with torch.no_grad(), model.hooks([(f"{p}.attn.hook_attn_scores", block)]):
            _, cache = model.run_with_cache(inputs, [f"{p}.attn.hook_pattern", f"{p}.attn.hook_attn_scores"])
        pattern = cache[f"{p}.attn.hook_pattern"]
        assert not pattern[..., 1:, 0].any(), f"{p}: key 0 is still attended to"
        close(pattern.sum(-1), torch.ones_like(pattern.sum(-1)), f"{p}: rows sum to one")
        assert change(model, inputs, f"{p}.attn.hook_attn_scores", block) > 1e-6


def test_no_code_here_boots_a_bridge_that_installs_packages() -> None:
    root = Path(cv.__file__).parent
    folders = [root, root.parent / "tests", root.parent / "benchmarks"]
    calls = re.compile(r"boot_transformers\s*\(")
    found = [
        path.name
        for folder in folders
        for path in folder.rglob("*.py")
        if calls.search(path.read_text(encoding="utf-8"))
    ]
    assert not found, f"boot_transformers is called in {found}"


@parametrize()
def test_a_keyword_that_nobody_reads_is_refused(case: Case) -> None:
    """`remote=True` ran locally without a word elsewhere, because transformers swallows keywords."""
    model, inputs = wrapped(case)
    with pytest.raises(InputError, match="remote"):
        model(inputs, remote=True)


@pytest.mark.parametrize("name", ["vit-wide", "dinov2-registers", "deit", "siglip", "paligemma", "llava-siglip-qwen2"])
def test_nothing_is_hard_coded_about_patches_prefixes_or_paths(name: str) -> None:
    model, inputs = wrapped(CASES[name])
    tokens, shape = model.tokens(inputs)["vision"], SHAPES[name]["vision"]
    assert shape.grid is not None
    assert model.vision.cfg.grid == shape.grid
    assert len(tokens.positions("patch")) == shape.grid[0] * shape.grid[1]
    assert min(tokens.positions("patch")) == shape.n_prefix


@parametrize()
def test_hooks_in_place_do_not_leak(case: Case) -> None:
    """Every hook gets a tensor of its own: scribbling over it after returning another one changes nothing anywhere."""
    model, inputs = wrapped(case)
    taken: list[Tensor] = []

    def scribble(value: Tensor, hook: Any) -> Tensor:
        answer = value.clone()
        taken.append(value)
        value.fill_(float("nan"))
        return answer

    with torch.no_grad():
        expected, clean = model.run_with_cache(inputs, "**")
        with model.hooks([("**", scribble)]):
            out, cache = model.run_with_cache(inputs, "**")
        same(out, expected, "output under hooks that scribble over what they were given")
        for name in clean:
            same(cache[name], clean[name], name)
        assert len(taken) == len(model.sites())


def test_primary_outputs_are_what_the_setting_compares() -> None:
    setting = Setting(CASES["vit"])
    model = setting.model()
    with torch.no_grad():
        same(model(setting.inputs(model)), primary(model.module(**setting.inputs(model))), "vit")

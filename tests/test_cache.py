"""The activation cache: filters, short names, decompositions, steps, files, and the options of a cached run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import UnknownSiteError
from circuitvision.model.cache import ActivationCache
from tests.conformance.setting import Setting, close, same
from tests.parts import module_of
from tests.zoo import CASES, Case, case, cases, parametrize, shared_model


def run(
    name: str, batch: int = 2, names: Any = None, **options: Any
) -> tuple[cv.HookedModel, dict[str, Any], Tensor, ActivationCache]:
    model = cv.HookedModel(shared_model(name))
    inputs = CASES[name].inputs(model.module, batch=batch)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, names, **options)
    return model, inputs, out, cache


# ---- what is in it


def test_filters_select_what_they_say() -> None:
    model, inputs, _, everything = run("llava-clip-llama")
    derived = [name for name in model.sites() if name not in everything._values]
    assert {name.rpartition(".")[2] for name in derived} == {
        "hook_result",
        "hook_q_input",
        "hook_k_input",
        "hook_v_input",
        "hook_mlp_in",
    }
    chosen = {
        "vision.blocks.0.attn.hook_z": ["vision.blocks.0.attn.hook_z"],
        "*.blocks.1.hook_resid_post": ["vision.blocks.1.hook_resid_post", "language.blocks.1.hook_resid_post"],
        "projector.*": ["projector.hook_in", "projector.hook_out"],
        "vision.blocks.?.attn.hook_q": [f"vision.blocks.{layer}.attn.hook_q" for layer in range(3)],
    }
    for glob, names in chosen.items():
        assert list(model.run_with_cache(inputs, glob)[1]) == names
    assert list(model.run_with_cache(inputs, lambda name: name.endswith("hook_pattern"))[1]) == model.sites(
        "**.hook_pattern"
    )
    both = model.run_with_cache(inputs, ["language.hook_embed", "vision.blocks.*.hook_attn_out"])[1]
    assert list(both) == [*model.sites("vision.blocks.*.hook_attn_out"), "language.hook_embed"]


def _matches(model: cv.HookedModel, glob: str) -> bool:
    try:
        return bool(model.sites(glob))
    except UnknownSiteError:
        return False


def test_one_star_does_not_cross_dots() -> None:
    model, _, _, _ = run("vit")
    assert not _matches(model, "vision.blocks.0.*hook_z")
    assert _matches(model, "vision.blocks.0.**hook_z")
    assert len(model.sites("vision.*")) == 4
    assert model.sites("**") == model.sites()


def test_short_names() -> None:
    _, _, _, cache = run("paligemma2")
    for key, name in {
        ("vision", "z", 2): "vision.blocks.2.attn.hook_z",
        ("vision", "resid_post", -1): "vision.blocks.2.hook_resid_post",
        ("language", "pattern", 0): "language.blocks.0.attn.hook_pattern",
        ("language", "scale", 1, "ln1"): "language.blocks.1.ln1.hook_scale",
        ("language", "normalized", 1, "ln2_post"): "language.blocks.1.ln2_post.hook_normalized",
        ("language", "post", 0): "language.blocks.0.mlp.hook_post",
        ("language", "rot_k", 0): "language.blocks.0.attn.hook_rot_k",
        ("vision", "embed"): "vision.hook_embed",
        ("projector", "out"): "projector.hook_out",
        ("language", "result", 1): "language.blocks.1.attn.hook_result",
    }.items():
        same(cache[key], cache[name], name)
        assert key in cache
    with pytest.raises(UnknownSiteError, match="ln1"):
        cache["language", "scale", 1]


@parametrize()
def test_derived_sites_are_computed_as_the_run_computes_them(case: Case) -> None:
    """What the cache derives when read equals what hooks at the site record, bit for bit or to rounding."""
    model, inputs, _, cache = run(case.name)
    with torch.no_grad():
        _, full = model.run_with_cache(inputs, "**")
    assert len(full) == len(model.sites()) > len(cache)
    for name in full:
        close(cache[name], full[name], name, 1e-6)
        assert name in cache


# ---- decompositions


@parametrize()
def test_parts_of_the_stream_add_up_at_every_layer(case: Case) -> None:
    model, _, _, cache = run(case.name)
    for name, tower in model.towers.items():
        for layer in range(tower.cfg.n_layers + 1):
            at_end = layer == tower.cfg.n_layers
            site = f"{name}.blocks.{layer - 1}.hook_resid_post" if at_end else f"{name}.blocks.{layer}.hook_resid_pre"
            parts, labels = cache.decompose_resid(name, layer, return_labels=True)
            assert len(parts) == len(labels) == 1 + 2 * layer
            close(parts.sum(0), cache[site], f"{site} from its parts")
            if not at_end:
                close(
                    cache.decompose_resid(name, layer, mlp_input=True).sum(0),
                    cache[f"{name}.blocks.{layer}.hook_resid_mid"],
                    site,
                )
            stack, labels = cache.accumulated_resid(name, layer, incl_mid=True, return_labels=True)
            assert len(stack) == len(labels) == 2 * layer + 1
            same(stack[-1], cache[site], f"{site} accumulated")
        _heads_add_up(tower, name, cache)


def _heads_add_up(tower: Any, name: str, cache: ActivationCache) -> None:
    heads, labels = cache.stack_head_results(name, return_labels=True)
    n = tower.cfg.n_heads
    assert len(heads) == len(labels) == n * tower.cfg.n_layers
    assert labels[n + 1] == "L1H1"
    for layer in range(tower.cfg.n_layers):
        bias = tower.blocks[layer].b_O.detach()
        if hasattr(tower.blocks[layer].module, "layer_scale1"):
            bias = bias * tower.blocks[layer].module.layer_scale1.lambda1.detach()
        total = heads[n * layer : n * layer + n].sum(0) + bias
        close(total, cache[f"{name}.blocks.{layer}.hook_attn_out"], f"{name} heads of layer {layer}")


@pytest.mark.parametrize(
    "case",
    [c for c in cases(without=("softcap",)) if "language" in c.towers and c.family != "pi0"]
    + cases("classifier", "class_token"),
    ids=str,
)
def test_contributions_add_up_to_the_logit(case: Case) -> None:
    """logit_attrs over all parts, plus the norm's bias and b_U, is the logit difference itself."""
    model, _, out, cache = run(case.name)
    name = list(model.towers)[-1]
    tower = model.towers[name]
    readout = tower.spec.readout
    if readout is None or readout.pool not in ("none", "cls") or readout.second_head is not None:
        pytest.skip("pooled over several positions")
    attributions = cache.logit_attrs(cache.decompose_resid(name), name, answer=3, foil=1).sum(0)
    bias = getattr(tower.final_norm, "bias", None)
    if bias is not None:
        attributions = attributions + float(bias.detach() @ (tower.W_U[:, 3] - tower.W_U[:, 1]))
    attributions = attributions + float(tower.b_U[3] - tower.b_U[1])
    expected = out[..., 3] - out[..., 1]
    close(attributions if out.ndim == 3 else attributions[:, 0], expected, "sum of contributions", 1e-4)


def test_frozen_norm_of_the_whole_stream_is_the_norm() -> None:
    for name in ("vit", "llava-clip-llama", "paligemma2"):
        model, _, _, cache = run(name)
        tower_name = list(model.towers)[-1]
        tower = model.towers[tower_name]
        final = cache[f"{tower_name}.blocks.{tower.cfg.n_layers - 1}.hook_resid_post"]
        with torch.no_grad():
            close(
                cache.apply_ln_to_stack(final[None], tower_name, bias=True)[0],
                tower.final_norm(final),
                "final norm",
                1e-5,
            )
            for part in ("ln1", "ln2"):
                resid = cache[f"{tower_name}.blocks.1.hook_resid_{'pre' if part == 'ln1' else 'mid'}"]
                normed = cache.apply_ln_to_stack(resid[None], tower_name, layer=1, mlp_input=part == "ln2", bias=True)[
                    0
                ]
                close(normed, module_of(tower.blocks[1], part).forward(resid), part, 1e-5)
            close(
                cache.accumulated_resid(tower_name, apply_ln=True)[-1],
                cache.apply_ln_to_stack(final[None], tower_name)[0],
                "apply_ln",
            )


# ---- options of a run


@parametrize()
def test_stopping_at_a_layer_gives_the_stream_there(case: Case) -> None:
    model, inputs, _, cache = run(case.name)
    last = list(model.towers)[-1]
    for name, tower in model.towers.items():
        count = tower.cfg.n_layers
        for layer in (0, 1, -1, count):
            with torch.no_grad():
                out, partial = model.run_with_cache(inputs, f"{name}.**", stop_at_layer=(name, layer))
            at = layer + count if layer < 0 else layer
            site = f"{name}.blocks.{count - 1}.hook_resid_post" if at == count else f"{name}.blocks.{at}.hook_resid_pre"
            close(out, cache[site], f"{name} stopped at {layer}", 1e-5)
            assert f"{name}.blocks.{count - 1}.hook_mlp_out" not in partial._values or at == count
            assert all(f"{name}.blocks.{before}.hook_attn_out" in partial._values for before in range(at))
        if name == last:
            with torch.no_grad():
                same(
                    model.run_with_cache(inputs, f"{name}.**", stop_at_layer=1)[0],
                    model.run_with_cache(inputs, f"{name}.**", stop_at_layer=(name, 1))[0],
                    "int",
                )
    with torch.no_grad():
        close(model(inputs), run(case.name)[2], "the next run is whole again")


def test_removing_the_batch_dimension() -> None:
    model, inputs, _, cache = run("vit", batch=1)
    _, _, _, flat = run("vit", batch=1, remove_batch_dim=True)
    for name in cache:
        same(flat[name], cache[name][0], name)
    same(flat["vision", "result", 1], cache["vision", "result", 1][0], "derived")
    assert not flat.has_batch_dim
    assert (len(inputs), len(model.towers)) == (1, 1)


def test_recorded_gradients_have_their_own_names_and_leave_parameters_alone() -> None:
    model = cv.HookedModel(copy.deepcopy(shared_model("clip")))
    inputs = CASES["clip"].inputs(model.module, batch=2)
    out, cache = model.run_with_cache(
        inputs, "vision.blocks.*.hook_resid_post", incl_bwd=True, metric=lambda logits: logits[:, 0]
    )
    assert set(cache) == {
        f"vision.blocks.{layer}.hook_resid_post{suffix}" for layer in range(3) for suffix in ("", "_grad")
    }
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(value.requires_grad for value in cache.values())
    seen: list[Any] = []
    model.run_with_cache(
        inputs, "vision.hook_embed", incl_bwd=True, metric=lambda logits, given: seen.append(given) or logits.sum()
    )
    assert seen[0].keys() == inputs.keys()
    assert not out.requires_grad


def test_metrics_with_gradients_under_no_grad() -> None:
    """incl_bwd turns gradients on by itself, and a frozen model still gives gradients at its sites."""
    model = cv.HookedModel(copy.deepcopy(shared_model("vit")))
    inputs = CASES["vit"].inputs(model.module, batch=2)
    _, expected = model.run_with_cache(inputs, "**.hook_resid_*", incl_bwd=True, metric=lambda logits: logits[:, 1])
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, "**.hook_resid_*", incl_bwd=True, metric=lambda logits: logits[:, 1])
    assert cache.keys() == expected.keys()
    late = "vision.blocks.2.hook_resid_post_grad"
    close(cache[late], expected[late], late)
    first = "vision.blocks.0.hook_resid_pre_grad"
    assert cache[first].abs().max() > 0
    close(cache[first], expected[first], first)


# ---- steps


def test_a_recording_of_generate_has_steps() -> None:
    model = cv.HookedModel(copy.deepcopy(shared_model("llava-clip-llama")))
    inputs = CASES["llava-clip-llama"].inputs(model.module, batch=2)
    length = inputs["input_ids"].shape[1]
    with model.record(["language.blocks.0.hook_resid_post", "vision.hook_embed"]) as cache:
        tokens = model.generate(inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    steps = cache["language.blocks.0.hook_resid_post"]
    assert [tuple(step.shape) for step in steps] == [(2, length, 32), (2, 1, 32), (2, 1, 32)]
    assert cache["vision.hook_embed"].shape[:2] == (1, 2)
    longer = {**inputs, "input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(tokens[:, :-1])}
    with torch.no_grad():
        _, full = model.run_with_cache(longer, "language.blocks.0.hook_resid_post")
    joined = torch.cat(list(steps), dim=1)
    close(joined, full["language.blocks.0.hook_resid_post"], "steps joined are the full pass", 1e-4)


def test_an_edit_at_one_step_leaves_earlier_tokens() -> None:
    model = cv.HookedModel(copy.deepcopy(shared_model("llava-clip-llama")))
    inputs = CASES["llava-clip-llama"].inputs(model.module, batch=1)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain = model.generate(inputs, **options)
    want = int((plain[0, -2] + 5) % 40 + 4)
    direction = model.language.W_U[:, want]

    def push(value: Tensor, hook: Any) -> Tensor | None:
        if hook.step != 2:
            return None
        value[:, -1] = 50 * direction
        return value

    with model.hooks([("language.blocks.1.hook_resid_post", push)]):
        steered = model.generate(inputs, **options)
    new = inputs["input_ids"].shape[1]
    assert torch.equal(steered[:, : new + 2], plain[:, : new + 2])
    assert int(steered[0, new + 2]) == want


# ---- contexts


def test_outer_hooks_fire_first_and_caches_see_edits() -> None:
    model, inputs, _, clean = run("vit", names="**.hook_resid_*")
    site, alias = "vision.blocks.0.hook_resid_post", "vision.blocks.1.hook_resid_pre"
    with torch.no_grad(), model.hooks([(site, lambda v, hook: v + 1)]):
        with model.hooks([(site, lambda v, hook: v * 2)]):
            _, inner = model.run_with_cache(inputs, [site, alias])
        _, outer = model.run_with_cache(inputs, site)
    same(inner[site], (clean[site] + 1) * 2, "both edits, outer first")
    same(inner[alias], inner[site], "the same stream under its other name")
    same(outer[site], clean[site] + 1, "the outer edit alone")
    with torch.no_grad():
        _, names = model.run_with_cache(inputs, "**.hook_resid_*")
        hooks = [(alias, lambda v, hook: v * 3), (site, lambda v, hook: v + 1)]
        with model.hooks(hooks):
            _, cache = model.run_with_cache(inputs, [site, alias])
    same(cache[site], clean[site] + 1, "resid_post is written first")
    same(cache[alias], (clean[site] + 1) * 3, "then resid_pre of the next block")
    same(names[site], clean[site], "nothing is left")


def test_hooks_added_for_good_stay_until_reset() -> None:
    model, inputs, out, _ = run("vit", names="**.hook_resid_*")
    with torch.no_grad():
        model.add_hook("vision.hook_input", lambda v, hook: v * 0.5)
        assert not torch.equal(model(inputs), out)
        assert not torch.equal(model(inputs), out)
        model.reset_hooks()
        same(model(inputs), out, "after reset_hooks")


# ---- files


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama", "pi0"])
def test_a_saved_cache_comes_back(name: str, tmp_path: Path) -> None:
    model, inputs, _, cache = run(name)
    path = cache.save(tmp_path / "run.safetensors")
    assert [file.name for file in tmp_path.iterdir()] == ["run.safetensors"]
    again = ActivationCache.load(path, model, inputs)
    assert set(again) == set(cache)
    for site in cache:
        same(again[site], cache[site], site)
    same(again["vision", "result", 0], cache["vision", "result", 0], "derived from a loaded cache")
    tower = model.towers[list(model.towers)[-1]]
    resid = again[tower.name, "resid_post", -1]
    same(
        tower.readout(resid, context=again).detach(),
        tower.readout(cache[tower.name, "resid_post", -1], context=cache).detach(),
        "read-out",
    )


def test_a_saved_recording_keeps_its_steps(tmp_path: Path) -> None:
    model = cv.HookedModel(copy.deepcopy(shared_model("llava-clip-llama")))
    inputs = CASES["llava-clip-llama"].inputs(model.module, batch=1)
    with model.record("language.blocks.0.**") as cache:
        model.generate(inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    again = ActivationCache.load(cache.save(tmp_path / "steps.safetensors"), model)
    for name in cache:
        assert len(again[name]) == len(cache[name]) == 12
        for step in range(12):
            same(again[name][step], cache[name][step], f"{name} step {step}")


def test_moving_and_converting() -> None:
    _, _, _, cache = run("vit")
    half = cache.to(torch.bfloat16)
    assert all(value.dtype == torch.bfloat16 for value in half.values())
    assert all(value.dtype == torch.float32 for value in cache.values())
    assert "vision" in repr(cache)
    assert "<table>" in cache._repr_html_()
    setting = Setting(CASES["vit"])
    with torch.enable_grad():
        _, tracked = setting.model().run_with_cache(setting.inputs(setting.model()), keep_graph=True)
    assert any(value.requires_grad for value in tracked.values())
    assert not any(value.requires_grad for value in tracked.detach().values())


def test_a_recording_of_one_run_knows_its_inputs_and_of_several_does_not():
    entry = case("vit")
    model = cv.HookedModel(shared_model("vit"))
    inputs = entry.inputs(model.module)
    with model.record("vision.hook_input") as one:
        model(inputs)
    assert set(one.inputs) == set(inputs)
    with model.record("vision.hook_input") as two:
        model(inputs)
        model(inputs)
    assert not two.inputs
    model(inputs)
    assert model._log is None

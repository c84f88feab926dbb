"""The nnsight view against our own hooks: every offered site reads and writes the same bits, in every family."""

from __future__ import annotations

import ast
import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import interop
from circuitvision.errors import HookError, UnknownSiteError
from circuitvision.interop.nnsight_view import RECORDED_REASON
from circuitvision.model.points import AttentionStage
from tests.conformance.setting import noise, one_layer_each, same
from tests.interop.common import MAIN, adding, host, pass_order, wrapped
from tests.parts import module_of
from tests.zoo import CASES, Case, parametrize, shared_model

pytestmark = pytest.mark.filterwarnings("ignore:.*cannot reach the output")


def hooked_sites(model: cv.HookedModel, case: Case, nn: Any) -> list[str]:
    """All sites of the main cases, one of every kind of the others."""
    offered = set(nn.sites())
    return nn.sites() if case.name in MAIN else [site for site in one_layer_each(model) if site in offered]


@parametrize()
def test_one_trace_reads_every_site_as_run_with_cache_does(case: Case) -> None:
    model, inputs = wrapped(case.name)
    nn = interop.nnsight(model)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, nn.sites())
        order = pass_order(model, inputs, nn.sites())
        with nn.trace(**inputs):
            found = {}.save()
            for site in order:
                envoy, last = host(nn, site)
                found[site] = getattr(envoy, last)
    assert len(found) == len(nn.sites())
    for site in found:
        same(found[site], cache[site], site)


@parametrize()
def test_an_edit_in_a_trace_equals_the_edit_by_our_hook(case: Case) -> None:
    model, inputs = wrapped(case.name)
    nn = interop.nnsight(model)
    moved = 0
    with torch.no_grad():
        clean, cache = model.run_with_cache(inputs, nn.sites())
        for site in hooked_sites(model, case, nn):
            envoy, last = host(nn, site)
            draw = noise(cache[site], site)
            expected = model.run_with_hooks(inputs, [(site, adding(draw))])
            with nn.trace(**inputs):
                value = getattr(envoy, last)
                value += draw
                output = nn.output.save()
            same(output[model.family.output], expected, f"{site}, changed in place")
            if case.name in MAIN:
                with nn.trace(**inputs):
                    setattr(envoy, last, getattr(envoy, last) + draw)
                    output = nn.output.save()
                same(output[model.family.output], expected, f"{site}, assigned")
            changed = not torch.equal(expected, clean)
            assert changed or model.is_dead(site) or model.dead_positions(site, inputs) is not None, site
            moved += changed
    assert moved >= 10, "hardly any edit reached the output, so the comparison shows nothing"


@parametrize()
def test_everything_but_the_inside_of_attention_is_offered(case: Case) -> None:
    model, _ = wrapped(case.name, warm=False)
    nn = interop.nnsight(model)
    inside = [name for name, point in model.engine.points.items() if isinstance(point, AttentionStage)]
    assert inside
    assert sorted(nn.sites() + inside) == sorted(model.sites())
    for name in model.sites():
        assert (nn.reason(name) is None) == (name not in inside)


def test_names_read_like_ours() -> None:
    model, inputs = wrapped("llava-clip-llama")
    nn = interop.nnsight(model)
    assert nn.vision.blocks[1].attn.o._module is module_of(model.vision.blocks[1], "o")
    assert nn.language.blocks[-1].mlp.mlp_gate._module is module_of(model.language.blocks[-1], "mlp_gate")
    assert nn.vision.ln_final._module is model.vision.final_norm
    assert "hook_z" in dir(nn.vision.blocks[0].attn)
    with torch.no_grad():
        with nn.trace(**inputs):
            z = nn.vision.blocks[1].attn.hook_z.save()
            tokens = nn.projector.hook_out.save()
            answer = nn.language.hook_readout.save()
        _, cache = model.run_with_cache(inputs, nn.sites())
    same(z, cache["vision", "z", 1], "z")
    same(tokens, cache["projector.hook_out"], "projector")
    same(answer, cache["language.hook_readout"], "readout")


@pytest.mark.parametrize("name", ["vit-headless", "clip-vision"])
def test_a_model_that_is_its_own_tower_has_the_tower_name_too(name: str) -> None:
    model, inputs = wrapped(name)
    nn = interop.nnsight(model)
    with torch.no_grad(), nn.trace(**inputs):
        value = nn.vision.blocks[0].hook_resid_post.save()
    _, cache = model.run_with_cache(inputs, "vision.blocks.0.hook_resid_post")
    same(value, cache["vision", "resid_post", 0].detach(), "resid_post")


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-siglip-qwen2", "llava-clip-llama-layers"])
def test_llava_feature_layer_edit_reaches_output_after_warm_up(name: str) -> None:
    """Transformers records this layer with a hook of its own; an edit made after the recording would be lost."""
    model, inputs = wrapped(name, warm=True)
    nn = interop.nnsight(model)
    with torch.no_grad():
        clean = model(inputs)
        for layer in model.vision.feature_layers_in():
            if layer:
                block = nn.vision.blocks[layer - 1]
                with nn.trace(**inputs):
                    block.hook_resid_post[:, 1:] = torch.randn_like(block.hook_resid_post[:, 1:])
                    output = nn.output.logits.save()
                assert float((output - clean).abs().max()) > 1e-3


def with_recorded_input() -> tuple[cv.HookedModel, dict[str, Any]]:
    """A LLaVA whose first feature layer is the input of block 0."""
    module = copy.deepcopy(shared_model("llava-clip-llama-layers")).eval()
    layers = module.config.vision_feature_layer
    module.config.vision_feature_layer = [0, *layers[1:]]
    inputs = CASES["llava-clip-llama-layers"].inputs(module, batch=2)
    with torch.no_grad():
        module(**inputs)
    return cv.HookedModel(module), inputs


def test_a_recorded_input_is_not_offered_because_its_edit_would_be_lost() -> None:
    model, inputs = with_recorded_input()
    nn = interop.nnsight(model)
    for site in ("vision.hook_input", "vision.blocks.0.hook_resid_pre"):
        assert site not in nn.sites()
        assert nn.reason(site) == RECORDED_REASON
        with pytest.raises(UnknownSiteError, match="transformers records"), torch.no_grad(), nn.trace(**inputs):
            getattr(*host(nn, site)).save()
    draw = torch.randn(1)
    with torch.no_grad():
        ours = model.run_with_hooks(inputs, [("vision.hook_input", lambda value, hook: value * draw)])
        block = nn.vision.blocks[0]
        with nn.trace(**inputs):
            block.input = block.input * draw
            theirs = nn.output.logits.save()
    assert not torch.allclose(ours, theirs, atol=1e-3), "plain nnsight does reach the recorded input: offer it"


def test_resid_mid_reaches_the_skip_path_and_mlp_in_does_not() -> None:
    model, inputs = wrapped("vit")
    nn = interop.nnsight(model)
    block = nn.vision.blocks[0]
    skipped = []
    with torch.no_grad():
        for site in (None, "hook_resid_mid", "hook_mlp_in"):
            with nn.trace(**inputs):
                if site is not None:
                    value = getattr(block, site)
                    value += 1.0
                written = block.hook_mlp_out.save()
                after = block.hook_resid_post.save()
            skipped.append(after - written)
    assert torch.allclose(skipped[1], skipped[0] + 1.0, atol=1e-5)
    assert torch.allclose(skipped[2], skipped[0], atol=1e-5)


def test_edits_of_several_sites_compose_as_with_our_hooks() -> None:
    model, inputs = wrapped("llava-clip-llama")
    nn = interop.nnsight(model)
    block = nn.language.blocks[0]
    p = "language.blocks.0"

    def silence(value: torch.Tensor, hook: Any) -> torch.Tensor:
        value[:, :, 0] = 0
        return value

    hooks = [
        (f"{p}.ln1.hook_scale", lambda value, hook: value * 1.5),
        (f"{p}.ln1.hook_normalized", silence),
        (f"{p}.hook_v_input", silence),
        (f"{p}.attn.hook_z", silence),
        (f"{p}.attn.hook_result", silence),
        (f"{p}.hook_resid_post", silence),
        ("language.blocks.1.hook_resid_pre", lambda value, hook: value * 2),
    ]
    with torch.no_grad():
        expected = model.run_with_hooks(inputs, hooks)
        with nn.trace(**inputs):
            block.ln1.hook_scale *= 1.5
            block.ln1.hook_normalized[:, :, 0] = 0
            block.hook_v_input[:, :, 0] = 0
            block.attn.hook_z[:, :, 0] = 0
            block.attn.hook_result[:, :, 0] = 0
            block.hook_resid_post[:, :, 0] = 0
            nn.language.blocks[1].hook_resid_pre *= 2
            output = nn.output.logits.save()
    same(output, expected, "seven edits in one trace")


def test_a_saved_read_keeps_its_value_and_a_look_changes_nothing() -> None:
    model, inputs = wrapped("vit")
    nn = interop.nnsight(model)
    with torch.no_grad():
        clean, cache = model.run_with_cache(inputs, "vision.blocks.0.attn.hook_z")
        with nn.trace(**inputs):
            kept = nn.vision.blocks[0].attn.hook_z.save()
            nn.vision.blocks[0].attn.o.input[:] = 0
            looked = nn.output.logits.save()
    same(kept, cache["vision", "z", 0], "a read is a tensor of its own")
    assert not torch.equal(looked, clean)
    assert all(station.handed is None for station in nn._sites.stations.values()), "an activation outlived its trace"


@pytest.mark.parametrize(
    "site", ["vision.blocks.1.attn.hook_z", "vision.blocks.1.hook_resid_mid", "vision.ln_final.hook_normalized"]
)
def test_gradients_pass_through_a_site(site: str) -> None:
    model, inputs = wrapped("vit")
    nn = interop.nnsight(model)
    envoy, last = host(nn, site)
    with nn.trace(**inputs):
        value = getattr(envoy, last)
        total = nn.output.logits.sum()
        with total.backward():
            gradient = value.grad.save()
    _, cache = model.run_with_cache(inputs, site, incl_bwd=True, metric=lambda logits: logits.sum())
    same(gradient, cache[f"{site}_grad"], site)
    assert float(gradient.abs().max()) > 0


def test_steps_of_generate_are_served_one_by_one() -> None:
    model, inputs = wrapped("llava-clip-llama")
    nn = interop.nnsight(model)
    block = nn.language.blocks[1]
    sites = [f"language.blocks.1.{site}" for site in ("ln1.hook_scale", "hook_q_input", "attn.hook_z")]
    with model.record(sites) as cache:
        expected = model.generate(inputs, max_new_tokens=3, do_sample=False)
    with torch.no_grad(), nn.trace(fn=model.module.generate, **inputs, max_new_tokens=3, do_sample=False) as tracer:
        seen = [].save()
        for _ in tracer.iter[:3]:
            seen.append((block.ln1.hook_scale, block.hook_q_input, block.attn.hook_z))
        ids = tracer.result.save()
    same(ids, expected, "generated ids")
    for step, values in enumerate(seen):
        for site, value in zip(sites, values, strict=True):
            same(value, cache[site][step], f"{site}, step {step}")


def test_a_stored_edit_is_replayed() -> None:
    model, inputs = wrapped("vit")
    nn = interop.nnsight(model)
    with torch.no_grad():
        with nn.edit() as (_, edited):
            edited.vision.blocks[1].attn.hook_z[:, :, 0] = 0
        with edited.trace(**inputs):
            output = edited.output.logits.save()
        with nn.trace(**inputs):
            untouched = nn.output.logits.save()

        def silence(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value[:, :, 0] = 0
            return value

        same(output, model.run_with_hooks(inputs, [("vision.blocks.1.attn.hook_z", silence)]), "edited")
        same(untouched, model(inputs), "the view itself")


def test_our_hooks_and_the_state_dict_are_as_before() -> None:
    model, inputs = wrapped("llava-clip-llama")
    keys = list(model.module.state_dict())
    with torch.no_grad():
        clean, cache = model.run_with_cache(inputs, "**")
        interop.nnsight(model)
        again, other = model.run_with_cache(inputs, "**")
    assert list(model.module.state_dict()) == keys
    same(again, clean, "output")
    for site in cache:
        same(other[site], cache[site], site)


def test_wrong_names_and_values_are_refused() -> None:
    model, inputs = wrapped("vit")
    nn = interop.nnsight(model)
    attn = nn.vision.blocks[0].attn
    with torch.no_grad():
        with pytest.raises(UnknownSiteError, match="eager attention"), nn.trace(**inputs):
            attn.hook_pattern.save()
        with pytest.raises(UnknownSiteError, match="eager attention"), nn.trace(**inputs):
            attn.hook_attn_scores = torch.zeros(1)
        with pytest.raises(UnknownSiteError, match="Here: hook_q, hook_k, hook_v, hook_z"), nn.trace(**inputs):
            attn.hook_zz.save()
        with pytest.raises(UnknownSiteError, match="Nearest"):
            nn.reason("vision.blocks.0.attn.hook_zz")
        with pytest.raises(HookError, match="shape"), nn.trace(**inputs):
            attn.hook_z = torch.zeros(3)
        with pytest.raises(HookError, match="assigned int"), nn.trace(**inputs):
            attn.hook_z = 0
        with pytest.raises(HookError, match="float64"), nn.trace(**inputs):
            attn.hook_z = attn.hook_z.double()
        with pytest.raises(ValueError, match="outside of interleaving"):
            attn.hook_z


def test_nothing_imports_the_libraries_before_a_view_is_asked_for() -> None:
    """Importing nnsight gives every object a ``save``; TransformerLens takes a second and brings logging services."""
    importers, imported = set(), set()
    for path in Path(interop.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) else []
            imported.update(names)
            if any(name.partition(".")[0] in ("nnsight", "transformer_lens") for name in names):
                importers.add(path.stem)
    assert importers == {"envoys"}
    assert "circuitvision.interop.envoys" not in imported


def test_aliases_are_bound_without_a_warning() -> None:
    model, _ = wrapped("paligemma2", warm=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        nn = interop.nnsight(model)
    assert nn.language.blocks[0].ln1_post._module is module_of(model.language.blocks[0], "attn_add")

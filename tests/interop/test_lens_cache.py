"""TransformerLens's ActivationCache on our towers: its decompositions agree with ours and add up."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import interop
from circuitvision.errors import UnsupportedModelError
from tests.interop.common import wrapped
from tests.parts import has_part, module_of
from tests.zoo import Case, parametrize

WITH_UNEMBEDDING = [
    ("vit", "vision"),
    ("siglip-classifier", "vision"),
    ("llava-clip-llama", "language"),
    ("llava-clip-gemma", "language"),
    ("paligemma2", "language"),
    ("pi0", "language"),
    ("pi0", "action"),
]


def caches(name: str, tower: str) -> tuple[cv.HookedModel, Any, Any, Any]:
    """Model, view, our cache and theirs, of one input."""
    model, inputs = wrapped(name)
    view = interop.transformer_lens(model, tower=tower)
    with torch.no_grad():
        _, ours = model.run_with_cache(inputs)
        logits, theirs = view.run_with_cache(view.to_tokens(inputs))
    assert torch.equal(
        logits, model.run_with_hooks(inputs, [(f"{tower}.blocks.0.attn.hook_pattern", lambda v, hook: None)])
    )
    return model, view, ours, theirs


@parametrize()
def test_stacks_agree_with_ours_in_every_tower(case: Case) -> None:
    for tower in case.towers:
        model, _, ours, theirs = caches(case.name, tower)
        n_layers = model.towers[tower].cfg.n_layers
        assert torch.equal(theirs.decompose_resid(), ours.decompose_resid(tower))
        assert torch.equal(theirs.decompose_resid(1, mlp_input=True), ours.decompose_resid(tower, 1, mlp_input=True))
        assert torch.equal(theirs.accumulated_resid(incl_mid=True), ours.accumulated_resid(tower, incl_mid=True))
        _, labels = theirs.decompose_resid(return_labels=True)
        assert labels[:2] == ["embed", "0_attn_out"]
        whole = ours[f"{tower}.blocks.{n_layers - 1}.hook_resid_post"]
        assert torch.allclose(theirs.decompose_resid().sum(0), whole, atol=1e-4)
        if hasattr(module_of(model.towers[tower].blocks[0], "o"), "weight") and not _sandwich(model, tower):
            assert torch.allclose(theirs.stack_head_results(), ours.stack_head_results(tower), atol=1e-5)
            assert torch.allclose(theirs.get_full_resid_decomposition().sum(0), whole, atol=1e-4)


def _sandwich(model: cv.HookedModel, tower: str) -> bool:
    block = model.towers[tower].blocks[0]
    return has_part(block, "attn_add") and hasattr(module_of(block, "attn_add"), "eps")


@pytest.mark.parametrize(("name", "tower"), WITH_UNEMBEDDING)
def test_logit_attributions_agree_with_ours(name: str, tower: str) -> None:
    _, view, ours, theirs = caches(name, tower)
    stack = ours.decompose_resid(tower)
    found, expected = theirs.logit_attrs(stack, 1, 2), ours.logit_attrs(stack, tower, 1, 2)
    assert torch.allclose(found, expected, atol=1e-5)
    assert float(found.abs().max()) > 0
    raw = (view.W_U[:, 1] - view.W_U[:, 2]) @ stack[0, 0, 0]
    assert not torch.allclose(found[0, 0, 0], raw, atol=1e-4), "the final norm must matter for this to show anything"


@pytest.mark.parametrize(("name", "tower"), [("vit", "vision"), ("llava-clip-llama", "language"), ("pi0", "action")])
def test_the_logit_lens_ends_at_the_output(name: str, tower: str) -> None:
    model, view, ours, theirs = caches(name, tower)
    position = 0 if name == "vit" else -1
    lens = theirs.logit_lens(positions=position)
    resid = ours[f"{tower}.blocks.{view.cfg.n_layers - 1}.hook_resid_post"]
    expected = model.towers[tower].readout(resid, context=ours).detach()
    expected = expected if expected.ndim == 2 else expected[:, position]
    assert torch.allclose(lens.values[-1], expected, atol=1e-5)
    assert not torch.allclose(lens.values[0], expected, atol=1e-3)


def test_neurons_and_shapes() -> None:
    model, view, ours, theirs = caches("llava-clip-llama", "language")
    neurons = theirs.stack_neuron_results(1)
    block = model.language.blocks[0]
    assert torch.allclose(neurons.sum(0), ours["language", "mlp_out", 0] - block.b_out, atol=1e-4)
    assert theirs["pattern", 0].shape == ours["language", "pattern", 0].shape
    assert theirs["resid_post", -1].shape == ours["language", "resid_post", -1].shape
    assert view.W_Q.shape == model.language.W_Q.shape
    assert torch.equal(view.W_O, model.language.W_O)


def test_image_positions_start_from_the_projected_patch() -> None:
    """A bridge starts from the placeholder's embedding, and the sum is off exactly there."""
    model, inputs = wrapped("llava-clip-llama")
    view = interop.transformer_lens(model, tower="language")
    with torch.no_grad():
        _, cache = view.run_with_cache(view.to_tokens(inputs))
        _, ours = model.run_with_cache(inputs)
    image = model.tokens(inputs)["language"].mask("patch")
    parts = cache.decompose_resid()
    assert torch.equal(parts[0], ours["language.hook_input"])
    assert not torch.allclose(parts[0][image], ours["language.hook_embed"][image], atol=1e-2)


def test_one_row_can_lose_its_batch_axis() -> None:
    model, inputs = wrapped("vit", batch=1)
    view = interop.transformer_lens(model)
    with torch.no_grad():
        _, cache = view.run_with_cache(view.to_tokens(inputs), remove_batch_dim=True)
        stopped, early = view.run_with_cache(view.to_tokens(inputs), stop_at_layer=1)
        _, plain = view.run_with_cache(
            view.to_tokens(inputs), names_filter="blocks.*.hook_resid_pre", return_cache_object=False
        )
        _, ours = model.run_with_cache(inputs)
    assert torch.equal(cache.decompose_resid(), ours.decompose_resid("vision")[:, 0])
    assert torch.equal(stopped, ours["vision", "resid_pre", 1])
    assert "blocks.2.hook_resid_pre" not in early.cache_dict
    assert list(plain) == [f"blocks.{layer}.hook_resid_pre" for layer in range(3)]


def test_what_has_no_meaning_there_is_left_out() -> None:
    vision = interop.transformer_lens(wrapped("clip")[0], tower="vision")
    assert "ln_final.hook_scale" not in vision.names, "it follows pooling: a broadcast over positions would be silent"
    with pytest.raises(UnsupportedModelError, match="no unembedding"):
        vision.tokens_to_residual_directions(1)
    dinov2 = interop.transformer_lens(wrapped("dinov2")[0])
    assert "blocks.0.attn.hook_result" not in dinov2.names, "LayerScale follows: it is not what a head adds"
    with pytest.raises(UnsupportedModelError, match="no unembedding"):
        dinov2.tokens_to_residual_directions(1)
    sandwich = interop.transformer_lens(wrapped("paligemma2")[0], tower="language")
    with pytest.raises(UnsupportedModelError, match="normalises the output"):
        sandwich.blocks[0].attn.W_O
    assert not hasattr(sandwich, "unembed"), "the logits pass a soft cap that a lens would leave out"

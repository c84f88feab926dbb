"""Relevance read off attention: what the bare model gives, known answers, every tower of every family."""

from __future__ import annotations

import copy

import pytest
import torch

from circuitvision.readout import chefer_relevance, legrad
from circuitvision.readout.patch_coords import places_of
from circuitvision.readout.relevance.attention import _relevance_rollout
from tests.readout.layouts import by_row
from tests.readout.relevance_models import TOWERS, inputs_of, metric, model_of
from tests.zoo import shared_model

READ = [("vit", "vision"), ("dinov2", "vision"), ("clip", "vision"), ("clip", "text"), ("siglip", "vision")]
READ += [("llava-clip-llama", "language"), ("paligemma2", "language"), ("pi0", "action")]


def test_identity_attention_with_gradient_one_doubles_at_every_layer():
    one = torch.eye(5, dtype=torch.float64).expand(2, 5, 5)
    for layers in (1, 2, 7):
        assert torch.equal(_relevance_rollout([one] * layers), 2**layers * one)


def test_keys_of_another_tower_pass_their_share_on():
    before = torch.tensor([[0.5, 0.0], [0.0, 0.0]])
    own = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    share = torch.cat([before, own], dim=1)[None]
    # Layer 1: position 0 takes half of key 0; layer 2: the same again, and position 1 takes what position 0 had after layer 1.
    expected = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.5, 0.0, 2.0, 1.0]])
    torch.testing.assert_close(_relevance_rollout([share, share])[0], expected)


def bare_attention(name: str):
    """Patterns, their gradients and the residual streams of the bare eager model, by transformers' own means."""
    module = copy.deepcopy(shared_model(name)).double().eval()
    module.set_attn_implementation("eager")
    output = module(**inputs_of(name), output_attentions=True, output_hidden_states=True)
    return module, output


def test_chefer_relevance_is_what_the_bare_model_gives():
    _, output = bare_attention("vit")
    slopes = torch.autograd.grad(metric(output.logits).sum(), output.attentions)
    rolled = torch.eye(17, dtype=torch.float64).expand(2, 17, 17)
    for slope, pattern in zip(slopes, output.attentions, strict=True):
        rolled = rolled + (slope * pattern).clamp(min=0).mean(1) @ rolled
    result = chefer_relevance(model_of("vit"), inputs_of("vit"), metric)
    torch.testing.assert_close(by_row(result)[:, 1:], rolled[:, 0, 1:].detach())
    torch.testing.assert_close(by_row(result)[:, 0], rolled[:, 0, 0].detach() - 1)


def test_legrad_is_what_the_bare_model_gives():
    module, output = bare_attention("vit")
    expected = []
    for layer, pattern in enumerate(output.attentions):
        answer = module.classifier(module.vit.layernorm(output.hidden_states[layer + 1])[:, 0])
        (slope,) = torch.autograd.grad(metric(answer).sum(), pattern, retain_graph=True)
        expected.append(slope.clamp(min=0).mean((1, 2)))
    result = legrad(model_of("vit"), inputs_of("vit"), metric)
    torch.testing.assert_close(by_row(result), torch.stack(expected).mean(0))
    slopes = torch.autograd.grad(metric(output.logits).sum(), output.attentions)
    simple = legrad(model_of("vit"), inputs_of("vit"), metric, score="output")
    torch.testing.assert_close(by_row(simple), torch.stack([s.clamp(min=0).mean((1, 2)) for s in slopes]).mean(0))


@pytest.mark.parametrize(("name", "tower"), READ)
def test_the_last_layers_own_score_is_the_output(name, tower):
    model, inputs = model_of(name), inputs_of(name)
    by_layer = legrad(model, inputs, metric, tower=tower, layers=[-1])
    by_output = legrad(model, inputs, metric, tower=tower, layers=[-1], score="output")
    assert float(by_row(by_layer).max()) > 0.0
    torch.testing.assert_close(by_row(by_layer), by_row(by_output), atol=1e-9, rtol=1e-5)


def test_a_read_out_of_ones_own_is_asked_layer_by_layer():
    model, inputs = model_of("llava-clip-llama"), inputs_of("llava-clip-llama")
    result = legrad(model, inputs, metric, tower="vision", readout=lambda resid, cache: resid[:, :1])
    live = legrad(model, inputs, metric, tower="vision", score="output")
    assert by_row(result).shape == by_row(live).shape
    assert float(by_row(result).min()) >= 0.0 < float(by_row(result).max())


def test_an_action_expert_sees_the_prompt_it_reads_from_the_cache():
    model, inputs = model_of("pi0"), inputs_of("pi0")
    tokens = model.tokens(inputs)
    result = chefer_relevance(model, inputs, metric, tower="action")
    prompt = tokens["language"].n_positions
    assert by_row(result).shape[1] == prompt + tokens["action"].n_positions
    assert torch.equal(result.places[:, :prompt], places_of(tokens["language"]))
    assert float(by_row(result)[:, :prompt].max()) > 0.0
    hidden = torch.from_numpy(tokens["language"].kind == "padding")
    assert float(by_row(result)[:, :prompt][hidden].abs().sum()) == 0.0


def test_a_vision_tower_is_read_as_the_language_tower_finds_its_patches():
    model, inputs = model_of("llava-clip-llama"), inputs_of("llava-clip-llama", images=2)
    tokens = model.tokens(inputs)
    language = chefer_relevance(model, inputs, metric, tower="language")
    patterns = [name for name in model.sites("vision.blocks.*.attn.hook_pattern") if not model.is_dead(name)]
    _, found = model.run_with_cache(inputs, names_filter=patterns, incl_bwd=True, metric=metric)
    shares = [(found[name] * found[f"{name}_grad"]).clamp(min=0).mean(1) for name in patterns]
    weights = torch.zeros(4, 10, dtype=torch.float64)
    for row in range(2):
        weights[2 * row : 2 * row + 2, 1:] = by_row(language)[row, tokens["language"].mask("patch")[row]].view(2, 9)
    expected = (weights[:, None] @ _relevance_rollout(shares))[:, 0]
    result = chefer_relevance(model, inputs, metric, tower="vision")
    torch.testing.assert_close(by_row(result), expected.to(by_row(result)), atol=1e-9, rtol=1e-5)


@pytest.mark.parametrize(("name", "tower"), TOWERS)
def test_attention_relevance_of_every_tower_is_never_negative_nor_empty(name, tower):
    for found in (
        chefer_relevance(model_of(name), inputs_of(name), metric, tower=tower),
        legrad(model_of(name), inputs_of(name), metric, tower=tower, score="output"),
    ):
        assert bool(by_row(found).isfinite().all())
        # The identity is taken off by a subtraction.
        assert float(by_row(found).min()) > -1e-12
        assert bool((by_row(found).amax(1) > 0).all())
        assert list(by_row(found).shape) == list(found.places.shape[:2])


def test_attention_pooling_weighs_the_positions_it_reads():
    model, inputs = model_of("siglip"), inputs_of("siglip")
    pooled = legrad(model, inputs, metric, layers="pool")
    site = "vision.pool.attn.hook_pattern"
    _, found = model.run_with_cache(inputs, names_filter=site, incl_bwd=True, metric=metric)
    torch.testing.assert_close(by_row(pooled), found[f"{site}_grad"].clamp(min=0).mean((1, 2)))
    share = (found[site] * found[f"{site}_grad"]).clamp(min=0).mean(1)[:, 0]
    assert bool((by_row(chefer_relevance(model, inputs, metric)) >= share - 1e-12).all())

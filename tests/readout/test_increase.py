"""Log-probability increase: closed forms, and the definition spelled out on a model."""

from __future__ import annotations

import math

import pytest
import torch

from circuitvision.errors import InputError
from circuitvision.readout.attribution.direct import direct_attribution
from circuitvision.readout.attribution.increase import increase, log_prob_increase
from tests.readout.common import run


def test_closed_forms():
    answer = torch.tensor(2)
    zeros = torch.zeros(7, dtype=torch.float64)
    logits = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    assert float(increase(logits, logits + 3.5, answer)) == pytest.approx(0.0, abs=1e-12)
    a = 1.75
    raised = zeros.clone()
    raised[2] = a
    wanted = math.log(math.exp(a) / (math.exp(a) + 6)) + math.log(7)
    assert float(increase(zeros, raised, answer)) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize(
    ("name", "tower"), [("llava-clip-llama", "language"), ("vit", "vision"), ("paligemma2", "language")]
)
def test_the_definition_on_a_model(name, tower):
    """log p(y | x + v) - log p(y | x) with the final norm's denominator of this run, for heads, components, sources and neurons."""
    model, _, cache = run(name, torch.float64, everything=True)
    owner = model.towers[tower]
    position = 0 if tower == "vision" else int(model.tokens(cache.inputs)[tower].last(0))
    final = cache[f"{tower}.blocks.{owner.cfg.n_layers - 1}.hook_resid_post"][:, position]

    def logits(vector):
        from circuitvision.model.heads import Reading

        reading = Reading(owner, cache, norm="frozen", reference=final[:, None])
        return reading.positions(vector[:, None], 1, final[:, None])[:, 0]

    answer = torch.tensor([3, 3])
    layer = 1
    pre, mid = (cache[f"{tower}.blocks.{layer}.hook_resid_{which}"][:, position] for which in ("pre", "mid"))

    def score(x, v):
        return increase(logits(x), logits(x + v), answer)

    whole = log_prob_increase(model, cache, 3, tower, by="component")
    torch.testing.assert_close(
        whole.values[layer, 0], score(pre, cache[f"{tower}.blocks.{layer}.hook_attn_out"][:, position])
    )
    torch.testing.assert_close(
        whole.values[layer, 1], score(mid, cache[f"{tower}.blocks.{layer}.hook_mlp_out"][:, position])
    )
    heads = log_prob_increase(model, cache, 3, tower)
    assert heads.values.shape == (owner.cfg.n_layers, owner.cfg.n_heads, 2)
    if not owner.blocks[0].has("attn_add"):
        result = cache[f"{tower}.blocks.{layer}.attn.hook_result"][:, position]
        torch.testing.assert_close(heads.values[layer, 0], score(pre, result[:, 0]))
        neurons = log_prob_increase(model, cache, 3, tower, by="neuron", layers=[layer])
        post = cache[f"{tower}.blocks.{layer}.mlp.hook_post"][:, position]
        torch.testing.assert_close(
            neurons.values[0, 5], score(mid, post[:, 5, None] * owner.blocks[layer].W_out[5].detach())
        )
    sources = log_prob_increase(model, cache, 3, tower, by="source", layers=[layer])
    pattern = cache[f"{tower}.blocks.{layer}.attn.hook_pattern"][:, 0, position]
    assert sources.values.shape[-1] == pattern.shape[-1]
    hidden = pattern == 0
    assert float(sources.values[0, 0][hidden].abs().sum()) == 0.0


def test_a_head_read_from_one_source_scores_as_that_source():
    """Source vectors of a head sum to the head's vector: with a linear read-out the shares would add up; check the vectors themselves."""
    from circuitvision.readout.attribution.terms import Stream

    for name, tower in (("llava-clip-llama", "language"), ("paligemma2", "language"), ("dinov2", "vision")):
        model, _, cache = run(name, torch.float64, everything=True)
        stream = Stream(model.towers[tower], cache)
        rows = torch.arange(2)
        where = torch.tensor([3, 4])
        vectors = stream.source_vectors(1, rows, where)
        torch.testing.assert_close(vectors.sum(1), stream.heads(1)[rows, where].transpose(0, 1), atol=1e-10, rtol=1e-8)


def test_it_disagrees_with_direct_attribution_where_the_answer_is_said_already():
    """Not additive: the sum over heads and MLPs is not the joint effect (the paper's caveat, here as a fact about the implementation)."""
    model, _, cache = run("llava-clip-llama", everything=True)
    singles = log_prob_increase(model, cache, 3, by="component").values.sum((0, 1))
    direct = direct_attribution(model, cache, 3, by="component").values.sum(0)
    assert not torch.allclose(singles, direct, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"by": "layer"}, "by"),
        ("dinov2", {}, "pooled"),
        ("pi0", {"tower": "action"}, "distribution"),
        ("clip", {}, "distribution"),
        ("llava-clip-llama", {"tower": "vision"}, "distribution"),
        ("llava-clip-llama", {"position": "mean"}, "one position"),
    ],
)
def test_meaningless_requests_are_refused(name, options, message):
    model, _, cache = run(name, everything=True)
    with pytest.raises(InputError, match=message):
        log_prob_increase(model, cache, 1, **options)

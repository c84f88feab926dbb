"""Log-probability increase: closed forms, and the definition spelled out on a model."""

from __future__ import annotations

import html
import math

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.attribution.direct import direct_attribution
from circuitvision.readout.attribution.increase import SourceIncrease, increase, log_prob_increase
from tests.parts import has_part
from tests.readout.common import run
from tests.readout.layouts import by_row
from tests.zoo import case, shared_model


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
        reading = owner.output_head.in_run(cache, norm="frozen", reference=final[:, None])
        return reading.positions(vector[:, None], 1, final[:, None])[:, 0]

    answer = torch.tensor([3, 3])
    layer = 1
    pre, mid = (cache[f"{tower}.blocks.{layer}.hook_resid_{which}"][:, position] for which in ("pre", "mid"))

    def score(x, v):
        return increase(logits(x), logits(x + v), answer)

    whole = log_prob_increase(model, cache, 3, tower, by="component")
    torch.testing.assert_close(
        by_row(whole)[layer, 0], score(pre, cache[f"{tower}.blocks.{layer}.hook_attn_out"][:, position])
    )
    torch.testing.assert_close(
        by_row(whole)[layer, 1], score(mid, cache[f"{tower}.blocks.{layer}.hook_mlp_out"][:, position])
    )
    heads = log_prob_increase(model, cache, 3, tower)
    assert by_row(heads).shape == (owner.cfg.n_layers, owner.cfg.n_heads, 2)
    if not has_part(owner.blocks[0], "attn_add"):
        result = cache[f"{tower}.blocks.{layer}.attn.hook_result"][:, position]
        torch.testing.assert_close(by_row(heads)[layer, 0], score(pre, result[:, 0]))
        neurons = log_prob_increase(model, cache, 3, tower, by="neuron", layers=[layer])
        post = cache[f"{tower}.blocks.{layer}.mlp.hook_post"][:, position]
        torch.testing.assert_close(
            by_row(neurons)[0, 5], score(mid, post[:, 5, None] * owner.blocks[layer].W_out[5].detach())
        )
    sources = log_prob_increase(model, cache, 3, tower, by="source", layers=[layer])
    pattern = cache[f"{tower}.blocks.{layer}.attn.hook_pattern"][:, 0, position]
    assert by_row(sources).shape[-1] == pattern.shape[-1]
    hidden = pattern == 0
    assert float(by_row(sources)[0, 0][hidden].abs().sum()) == 0.0


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
    singles = by_row(log_prob_increase(model, cache, 3, by="component")).sum((0, 1))
    direct = by_row(direct_attribution(model, cache, 3, by="component")).sum(0)
    assert not torch.allclose(singles, direct, atol=1e-2)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"by": "layer"}, "by"),
        ("dinov2", {}, "pooled"),
        ("pi0", {"tower": "action"}, "distribution"),
        ("clip", {}, "distribution"),
        ("llava-clip-llama", {"tower": "vision"}, "distribution"),
        ("llava-clip-llama", {"position": "all"}, "one position"),
        ("llava-clip-llama", {"aggregation": "mean"}, "one column"),
        ("llava-clip-llama", {"answer": (3, 4)}, "a pair"),
        ("llava-clip-llama", {"answer": cv.metrics.logprob(3)}, "a metric"),
        ("llava-clip-llama", {"answer": None}, "An answer is"),
        ("llava-clip-llama", {"answer": 1.5}, "An answer is"),
        ("llava-clip-llama", {"answer": {"answer": [3, 4], "foil": [4, 3]}}, "one answer"),
    ],
)
def test_meaningless_requests_are_refused(name, options, message):
    model, _, cache = run(name, everything=True)
    with pytest.raises(InputError, match=message):
        log_prob_increase(model, cache, **{"answer": 1, **options})


@pytest.mark.parametrize("padding", ["left", "right"])
def test_scores_by_hand_from_the_models_own_modules(padding):
    """No part of the library: hooks on a Llama of two prompts of different lengths, and the formula of the paper."""
    entry, module = case("llava-clip-llama"), shared_model("llava-clip-llama")
    model = cv.HookedModel(module, entry.processor())
    inputs = entry.inputs(module, batch=2, padding=padding)
    answer, layer, tower = 7, 1, module.model.language_model
    block, kept = tower.layers[layer], {}

    def keep(name, output=False):
        def hook(module, args, *rest):
            value = rest[0] if output else args[0]
            kept[name] = (value[0] if isinstance(value, tuple) else value).detach().double()

        return hook

    handles = [
        block.register_forward_pre_hook(keep("pre")),
        block.self_attn.o_proj.register_forward_pre_hook(keep("z")),
        block.self_attn.o_proj.register_forward_hook(keep("attn", output=True)),
        block.mlp.down_proj.register_forward_pre_hook(keep("post")),
        block.register_forward_hook(keep("final", output=True)),
    ]
    with torch.no_grad():
        module(**inputs)
    for handle in handles:
        handle.remove()
    rows, last = torch.arange(2), torch.stack([row.nonzero().max() for row in inputs["attention_mask"]])
    pre, z, attn, post, final = (kept[name][rows, last] for name in ("pre", "z", "attn", "post", "final"))
    scale = (final.pow(2).mean(-1, keepdim=True) + tower.norm.variance_epsilon).rsqrt()

    def log_p(vector):
        normed = vector * scale.view(2, *[1] * (vector.ndim - 2), 1) * tower.norm.weight.double()
        return (normed @ module.lm_head.weight.double().T).log_softmax(-1)[..., answer]

    n_heads = tower.config.num_attention_heads
    w_o = block.self_attn.o_proj.weight.double().T.unflatten(0, (n_heads, -1))
    heads = torch.einsum("bhd,hdm->bhm", z.unflatten(-1, (n_heads, -1)), w_o)
    neurons = post[..., None] * block.mlp.down_proj.weight.double().T
    mid = pre + attn
    for by, x, vectors in (("head", pre, heads), ("neuron", mid, neurons)):
        wanted = log_p(x[:, None] + vectors) - log_p(x[:, None])
        found = by_row(log_prob_increase(model, inputs, answer, by=by, layers=[layer]))[0].T.double()
        torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-4)


def test_sources_are_drawn_over_the_image_and_kept_with_their_words(tmp_path):
    model, _, cache = run("llava-clip-llama", everything=True)
    found = log_prob_increase(model, cache, 7, by="source")
    again = SourceIncrease.load(found.save(tmp_path / "sources.npz"))
    assert again.words == found.words
    assert len(again.words[0]) == again.places.shape[1] == by_row(again).shape[-1]
    figure = again.plot(example=1, heads=[(1, 2)])
    grid = torch.as_tensor(figure.data[0].z)
    tokens = model.tokens(cache.inputs)["language"]
    patches = tokens.positions("patch")
    wanted = by_row(found)[1, 2, 1, patches]
    torch.testing.assert_close(grid.flatten().float(), wanted.float())
    strongest = by_row(found)[1, 2, 1].abs().argmax()
    source = "an image patch" if int(strongest) in patches else repr(found.words[1][strongest])
    wanted = f"What language L1H2 takes from {source} moves log p({found.answer}) by "
    assert html.unescape(figure.layout.title.text).startswith(wanted)
    mean = by_row(found).double().mean(2).flatten()
    first = float(next(iter(found.highlights().values())))
    assert first == pytest.approx(float(mean[mean.abs().argmax()]), rel=1e-3)
    heads = log_prob_increase(model, cache, 7)
    assert not isinstance(heads, SourceIncrease)
    assert heads.answer == model.tokenizer.convert_ids_to_tokens(7)
    assert heads.highlights()["answer"] == heads.answer
    strongest = max(heads.to_frame().groupby(["layer", "head"])["value"].mean().items(), key=lambda pair: abs(pair[1]))
    assert next(iter(heads.highlights())) == "language L{}H{}".format(*strongest[0])

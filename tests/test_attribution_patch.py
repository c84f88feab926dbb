"""Attribution patching against exact patching where it is exact, against plain PyTorch, and against finite differences on every kind of model."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

import circuitvision as cv
from circuitvision import edits, metrics
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import AttributionResult, activation_patch, attribution_patch
from tests.sweeps.drawing import model_of
from tests.zoo import CASES

METRIC = logit_diff(1, 2)
DOUBLE = torch.float64
SIZE = (12, 20)
"""Pictures of 15 patches: with CLS 16 positions, of which a uniform pattern is exact in any precision."""
FIVE = {
    "pi0": metrics.action_dim(1),
    "clip": logit_diff(0, 1),
    "siglip": logit_diff(0, 1),
}


def vit(layers: int = 2, linear: bool = True, **settings) -> cv.HookedModel:
    """A random ViT in float64; ``linear``: norms only centre, the MLP has no activation."""
    config = transformers.ViTConfig(
        hidden_size=12, num_hidden_layers=layers, num_attention_heads=3, intermediate_size=20, image_size=SIZE, patch_size=4,
        num_labels=4, hidden_act="linear" if linear else "gelu", layer_norm_eps=1e20 if linear else 1e-6,
        **settings,
    )  # fmt: skip
    torch.manual_seed(0)
    module = transformers.ViTForImageClassification(config).double().eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.4)
    for part in module.modules():
        if linear and isinstance(part, nn.LayerNorm):
            # With so large an epsilon the denominator is the same for every input.
            nn.init.constant_(part.weight, 1e10)
    return cv.HookedModel(module)


def uniform(model: cv.HookedModel) -> cv.HookedModel:
    """The same model with patterns that do not depend on the input."""
    for block in model.vision.blocks:
        for letter in "qk":
            for parameter in block.attn.projection(letter).module.parameters():
                nn.init.zeros_(parameter)
    return model


def images(seed: int, count: int = 3) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"pixel_values": torch.randn(count, 3, *SIZE, generator=generator, dtype=DOUBLE)}


def both(model, clean, corrupt, metric=METRIC, **options):
    """The exact and the estimated result."""
    method = {name: options.pop(name) for name in ("method", "nodes", "grad_drop") if name in options}
    given = {"metric": metric, "clean": clean, "corrupt": corrupt, "progress": False, **options}
    return activation_patch(model, **given), attribution_patch(model, **given, **method)


# -- where estimates are exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("options", [{"method": "atp"}, {"method": "ig", "nodes": 2}])
@pytest.mark.parametrize(
    ("sites", "axes"),
    [
        ("vision.blocks.*.attn.hook_z", ("layer", "head")),
        ("vision.blocks.*.attn.hook_v", ("layer", "head", "position")),
        ("vision.blocks.*.hook_mlp_out", ("layer", "position")),
        ("vision.blocks.*.hook_resid_pre", ("layer", "position")),
        ("vision.blocks.*.attn.hook_result", ("head", "layer")),
        (["vision.hook_input", "vision.blocks.1.mlp.hook_post"], ("site",)),
    ],
)
def test_on_a_linear_model_estimates_are_the_effects(mode, options, sites, axes):
    model = uniform(vit())
    exact, estimate = both(model, images(1), images(2), sites=sites, axes=axes, mode=mode, **options)
    assert estimate.axes == exact.axes
    assert float(exact.values.abs().max()) > 1e-3
    torch.testing.assert_close(estimate.values, exact.values, atol=1e-10, rtol=1e-10)
    torch.testing.assert_close(estimate.restored, exact.restored, atol=1e-9, rtol=1e-9, equal_nan=True)
    torch.testing.assert_close(estimate.base, exact.base)
    torch.testing.assert_close(estimate.source, exact.source)


def one_softmax() -> cv.HookedModel:
    """A linear model but for the pattern of its second block."""
    model = vit()
    for letter in "qk":
        for parameter in model.vision.blocks[0].attn.projection(letter).module.parameters():
            nn.init.zeros_(parameter)
    return model


AXES = [("layer", "head"), ("layer", "head", "position"), ("layer",), ("layer", "position")]


@pytest.mark.parametrize("letter", ["q", "k"])
@pytest.mark.parametrize("axes", AXES)
def test_the_fix_of_queries_and_keys_is_exact_where_only_the_softmax_is_not_linear(letter, axes):
    model = one_softmax()
    given = {"sites": f"vision.blocks.1.attn.hook_{letter}", "axes": axes}
    exact, fixed = both(model, images(1), images(2), method="atp*", grad_drop=False, **given)
    plain = attribution_patch(model, metric=METRIC, clean=images(1), corrupt=images(2), **given)
    torch.testing.assert_close(fixed.values, exact.values, atol=1e-10, rtol=1e-10)
    assert float((plain.values - exact.values).abs().max()) > 0.05 * float(exact.values.abs().max())


def test_a_saturated_head_is_seen_by_the_fix_and_not_by_the_gradient():
    model = one_softmax()
    with torch.no_grad():
        for letter in "qk":
            model.vision.blocks[1].attn.projection(letter).module.weight.mul_(8.0)
    for letter, axes in [(letter, axes) for letter in "qk" for axes in AXES]:
        given = {"sites": f"vision.blocks.1.attn.hook_{letter}", "axes": axes}
        exact, fixed = both(model, images(1), images(2), method="atp*", grad_drop=False, **given)
        torch.testing.assert_close(fixed.values, exact.values, atol=1e-9, rtol=1e-9)
        plain = attribution_patch(model, metric=METRIC, clean=images(1), corrupt=images(2), **given)
        assert float((plain.values - exact.values).abs().max()) > 0.5 * float(exact.values.abs().max())
    _, cache = model.run_with_cache(images(2), "**.hook_pattern")
    assert float(cache["vision.blocks.1.attn.hook_pattern"].amax(-1).median()) > 1 - 1e-9


def test_grad_drop_finds_what_cancels_and_has_the_sign_of_the_plain_estimate():
    model = uniform(vit())
    block = model.vision.blocks[1]
    with torch.no_grad():
        # The second block takes away what the first one adds, as the read-out sees it: z -> -z.
        block.attn.output.weight.zero_()
        block.mlp.fc_in.module.weight.zero_()
        block.mlp.fc_in.module.weight[:12].copy_(torch.eye(12))
        block.mlp.output.weight.zero_()
        block.mlp.output.weight[:, :12].copy_(-torch.eye(12))
    given = {"sites": "vision.blocks.*.attn.hook_z"}
    exact, plain = both(model, images(1), images(2), **given)
    scale = float(exact.source.sub(exact.base).abs().max()) + 1.0
    assert float(plain.values[0].abs().max()) < 1e-9 * scale
    torch.testing.assert_close(plain.values, exact.values, atol=1e-8, rtol=1e-8)
    dropped = attribution_patch(model, metric=METRIC, clean=images(1), corrupt=images(2), method="atp*", **given)
    direct = _with_detached(model, images(1), images(2), "vision.blocks.0.attn.hook_z", [1])
    torch.testing.assert_close(dropped.values[0].abs(), direct.abs().T, atol=1e-10, rtol=1e-10)
    assert float(dropped.values[0].abs().max()) > 1e-3


def test_grad_drop_is_the_mean_size_over_other_layers_by_plain_pytorch():
    model = vit(layers=3, linear=False)
    site = "vision.blocks.1.attn.hook_z"
    found = attribution_patch(
        model, metric=METRIC, clean=images(1), corrupt=images(2), sites="vision.blocks.*.attn.hook_z", method="atp*"
    )
    plain = attribution_patch(
        model, metric=METRIC, clean=images(1), corrupt=images(2), sites="vision.blocks.*.attn.hook_z"
    )
    own = [_with_detached(model, images(1), images(2), site, [layer]) for layer in (0, 2)]
    torch.testing.assert_close(found.values[1].abs(), torch.stack(own).abs().mean(0).T)
    assert bool(((found.values >= 0) == (plain.values >= 0)).all())
    nothing = _with_detached(model, images(1), images(2), site, [])
    torch.testing.assert_close(plain.values[1], nothing.T)


def _with_detached(model, clean, corrupt, site, layers):
    """By plain PyTorch: per example and head ``(source - base) · gradient``, with no gradient through what some layers add to the stream."""
    module, number = model.module, int(site.split(".")[2])
    where = model.vision.blocks[number].attn.output
    kept = {}

    def keep(name):
        def hook(part, args):
            kept[name] = args[0] if name == "source" else args[0].requires_grad_(True)
            kept[name].retain_grad() if name == "base" else None

        return hook

    handle = where.register_forward_pre_hook(keep("source"))
    with torch.no_grad():
        module(**clean)
    handle.remove()
    handles = [where.register_forward_pre_hook(keep("base"))]
    for layer in layers:
        for part in (model.vision.blocks[layer].attn.output, model.vision.blocks[layer].mlp.output):
            handles.append(part.register_forward_hook(lambda part, args, out: out.detach()))
    logits = module(**corrupt).logits
    for handle in handles:
        handle.remove()
    (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 2]).sum(), kept["base"])
    product = (kept["source"] - kept["base"].detach()) * gradient
    return product.unflatten(-1, (3, -1)).sum((1, 3))


# -- on every kind of model ----------------------------------------------------------------------------------------------------------------


def runs_of(name: str, count: int = 2, padding: str | None = None):
    """A model in float64, and two runs of the same shapes that differ in images and, where there are any, in words."""
    model = model_of(name, DOUBLE)
    options = {"batch": count, "dtype": DOUBLE} | ({"padding": padding} if padding else {})
    clean, corrupt = (CASES[name].inputs(model.module, seed=seed, **options) for seed in (1, 2))
    same = {key: value for key, value in clean.items() if "mask" in key or "spatial" in key or key == "image_sizes"}
    if "input_ids" in clean and model.flow.connectors:
        same["input_ids"] = clean["input_ids"]
    return model, clean, {**corrupt, **same}


NAMES = ["vit", "dinov2-registers", "clip", "siglip2", "llava-clip-llama", "llava-onevision", "paligemma2", "pi0", "openvla"]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("leaf", ["attn.hook_z", "attn.hook_k", "hook_mlp_out", "hook_resid_mid"])
def test_estimates_are_the_slope_of_the_metric_towards_the_source(name, leaf):
    model, clean, corrupt = runs_of(name)
    metric = FIVE.get(name.rstrip("2"), METRIC)
    sites = [site for tower in model.towers for site in model.sites(f"{tower}.blocks.*.{leaf}")]
    headed = "hook_z" in leaf or "hook_k" in leaf
    axes = ("layer", "head") if headed else ("layer",)
    found = attribution_patch(model, metric=metric, clean=clean, corrupt=corrupt, sites=sites, axes=axes)
    with torch.no_grad():
        _, source = model.run_with_cache(clean, sites)
        _, base = model.run_with_cache(corrupt, sites)
    for tower in model.towers:
        site = f"{tower}.blocks.0.{leaf}"
        values = {}
        for step in (0.02, 0.01, -0.01, -0.02):
            point = base[site] + step * (source[site] - base[site])
            edit = edits.replace(site, point, heads=0 if headed else None)
            with torch.no_grad():
                values[step] = metrics.evaluate(metric.bind(model), model.run(corrupt, [edit]), corrupt)
        # Norms in float32 whatever the model's type: steps as large as the fourth order allows.
        slope = (8 * (values[0.01] - values[-0.01]) - (values[0.02] - values[-0.02])) / (12 * 0.01)
        own = found.values[found.axes["tower"].index(tower)] if "tower" in found.axes else found.values
        torch.testing.assert_close(own[0, 0] if headed else own[0], slope, atol=2e-4, rtol=2e-3)


@pytest.mark.parametrize(
    "name", ["vit", "dinov3", "clip", "llava-clip-mistral", "llava-siglip-qwen2", "paligemma2", "pi0"]
)
@pytest.mark.parametrize("letter", ["q", "k"])
@pytest.mark.parametrize("axes", [("layer", "head"), ("layer", "head", "position")])
def test_the_fix_takes_the_patterns_that_the_model_itself_makes(name, letter, axes):
    model, clean, corrupt = runs_of(name)
    metric = FIVE.get(name, _first)
    for tower in model.towers:
        sites = f"{tower}.blocks.*.attn.hook_{letter}"
        # Behind a block whose queries or keys are the source's as well.
        layer = 0 if model.is_dead(f"{tower}.blocks.1.attn.hook_{letter}", corrupt) else 1
        found = attribution_patch(
            model, metric=metric, clean=clean, corrupt=corrupt, sites=sites, axes=axes, method="atp*", grad_drop=False
        )
        patterns = [f"{other}.blocks.{layer}.attn.hook_pattern" for other in model.towers]
        patterns = [one for one in patterns if one in model.sites() and not model.is_dead(one, corrupt)]
        _, base = model.run_with_cache(corrupt, patterns, incl_bwd=True, metric=_bound(metric, model))
        with torch.no_grad():
            _, source = model.run_with_cache(clean, sites)
        site = f"{tower}.blocks.{layer}.attn.hook_{letter}"
        position = found.axes["position"][-3] if "position" in axes else None
        for head in {0, source[site].shape[2] - 1}:
            edit = edits.replace(site, source[site], heads=head, positions=position)
            with torch.no_grad(), model.record(patterns) as moved:
                model.run(corrupt, [edit])
            # Towers behind: only those that see these keys in the same layer read the base's stream there.
            seen = [one for one in patterns if one.startswith(tower) or model.flow.cache_of(one.split(".")[0]) == tower]
            owner = torch.as_tensor(model.tokens(corrupt)[tower].example)
            rows = sum(
                ((moved[one] - base[one]) * base[f"{one}_grad"]).flatten(1).sum(1)
                for one in (seen if letter == "k" else seen[:1])
            )
            expected = torch.zeros(int(owner.max()) + 1, dtype=DOUBLE).index_add(0, owner, rows)
            cell = found.values[layer, head] if position is None else found.values[layer, head, -3]
            if model.is_dual and tower == "text":
                # Texts serve all images, and so do their patterns: the gradient is the sum's.
                cell, expected = cell.sum(), expected.sum()
            torch.testing.assert_close(cell, expected, atol=1e-6, rtol=1e-4)


def _first(logits):
    """A number of each example's last position, or of its classes."""
    return logits[:, -1, 0] if logits.ndim == 3 else logits[:, 0]


def _bound(metric, model):
    return metric.bind(model) if isinstance(metric, metrics.Metric) else metric


def test_texts_of_a_dual_encoder_have_an_effect_on_each_image():
    model, clean, corrupt = runs_of("clip", count=3)
    found = attribution_patch(
        model, metric=logit_diff(0, 1), clean=clean, corrupt=corrupt, sites="text.blocks.*.hook_mlp_out", axes=("layer",)
    )  # fmt: skip
    for row in range(3):
        alone = {name: value[row : row + 1] if name == "pixel_values" else value for name, value in corrupt.items()}
        source = {**clean, "pixel_values": clean["pixel_values"][row : row + 1]}
        one = attribution_patch(
            model, metric=logit_diff(0, 1), clean=source, corrupt=alone, sites="text.blocks.*.hook_mlp_out", axes=("layer",)
        )  # fmt: skip
        torch.testing.assert_close(found.values[:, row], one.values[:, 0])


# -- integrated gradients ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vit", "clip", "llava-clip-llama", "paligemma2", "pi0"])
def test_integrated_gradients_at_the_inputs_sum_to_the_change_of_the_metric(name):
    model, clean, corrupt = runs_of(name)
    metric = FIVE.get(name, METRIC)
    inputs = [f"{one}.{'hook_embed' if model.flow.is_fed(one) else 'hook_input'}" for one in model.towers]
    given = {"metric": metric, "clean": clean, "corrupt": corrupt, "sites": inputs, "axes": ("site", "position")}
    found = attribution_patch(model, **given, method="ig", nodes=96)
    change = found.source - found.base
    torch.testing.assert_close(found.values.nansum((0, 1)), change, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(found.completeness_gap, torch.zeros_like(change), atol=1e-4, rtol=0)
    plain = attribution_patch(model, **given)
    assert float((plain.values.nansum((0, 1)) - change).abs().max()) > 1e-3 * float(change.abs().max())


def test_prompts_without_pictures_have_a_path_of_their_words():
    model = model_of("llava-clip-llama", DOUBLE)
    clean, corrupt = ({"input_ids": torch.tensor([[1, 5, last, 9]]), "attention_mask": torch.ones(1, 4).long()} for last in (7, 8))  # fmt: skip
    given = {"metric": METRIC, "clean": clean, "corrupt": corrupt, "sites": "language.hook_embed"}
    found = attribution_patch(model, **given, axes=("site", "position"), method="ig", nodes=64)
    torch.testing.assert_close(found.values.sum((0, 1)), found.source - found.base, atol=1e-4, rtol=1e-3)
    assert found.values[0, :, 0].count_nonzero() == 1


def test_few_nodes_that_miss_the_change_are_announced():
    model = vit(linear=False)
    far = {"pixel_values": images(1)["pixel_values"] * 40}
    with pytest.warns(UserWarning, match="more nodes"):
        found = attribution_patch(
            model, metric=METRIC, clean=far, corrupt=images(2), sites="**.hook_z", method="ig", nodes=1
        )
    total = attribution_patch(
        model, metric=METRIC, clean=far, corrupt=images(2), sites="vision.hook_input", axes=("site",), method="ig", nodes=1
    )  # fmt: skip
    torch.testing.assert_close(found.completeness_gap, total.values[0] - (found.source - found.base))


# -- data, metrics, numbers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_pairs_in_batches_are_the_runs_in_memory(method, mode):
    model, clean, corrupt = runs_of("llava-clip-llama", count=3)
    pairs = Pairs(inputs=clean, corrupt_inputs=corrupt, answers=[1, 2, 3], foils=[4, 5, 6], groups=[0, 0, 1])
    given = {"sites": "language.blocks.*.attn.hook_q", "method": method, "mode": mode, "progress": False}
    memory = attribution_patch(model, metric=logit_diff([1, 2, 3], [4, 5, 6]), clean=clean, corrupt=corrupt, **given)
    found = attribution_patch(model, pairs, "logit_diff", allow_wrong=True, example_batch=2, **given)
    for field in ("values", "base", "source", "completeness_gap"):
        torch.testing.assert_close(getattr(found, field), getattr(memory, field), atol=1e-6, rtol=1e-5)
    assert found.groups == [0, 0, 1]
    assert found.examples == [0, 1, 2]


def test_maps_of_positions_are_followed():
    model, clean, corrupt = runs_of("llava-clip-llama", count=2)
    length = clean["input_ids"].shape[1]
    words = [place for place in range(length) if int(clean["input_ids"][0, place]) != model.image_token_id]
    turned = list(range(length))
    turned[words[-1]], turned[words[-2]] = words[-2], words[-1]
    pairs = Pairs(inputs=clean, corrupt_inputs=corrupt, answers=[1, 2], foils=[3, 4], maps=[turned, None])
    site = "language.blocks.1.hook_resid_pre"
    metric = logit_diff([1, 2], [3, 4])
    for mode, base, source in (("denoise", corrupt, clean), ("noise", clean, corrupt)):
        found = attribution_patch(
            model, pairs, "logit_diff", sites=site, axes=("layer", "position"), mode=mode, allow_wrong=True
        )
        _, here = model.run_with_cache(base, site, incl_bwd=True, metric=metric)
        _, there = model.run_with_cache(source, site)
        values = there[site].detach().clone()
        values[0] = values[0, turned]
        expected = ((values - here[site]) * here[f"{site}_grad"]).sum(-1)
        torch.testing.assert_close(found.values[0], expected.T, atol=1e-8, rtol=1e-6)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_changes_nothing(padding):
    model, clean, corrupt = runs_of("llava-clip-llama", count=2, padding=padding)
    model = cv.HookedModel(model.module.float())
    clean, corrupt = ({k: v.float() if v.is_floating_point() else v for k, v in one.items()} for one in (clean, corrupt))  # fmt: skip
    for method in ("atp", "atp*"):
        given = {"sites": "language.blocks.*.attn.hook_k", "method": method}
        found = attribution_patch(model, metric=METRIC, clean=clean, corrupt=corrupt, **given)
        assert bool(found.values.isfinite().all())
        for row in range(2):
            real = clean["attention_mask"][row].bool()
            alone = [
                {k: v[row : row + 1, real] if k in ("input_ids", "attention_mask") else v[row : row + 1] for k, v in one.items()}
                for one in (clean, corrupt)
            ]  # fmt: skip
            one = attribution_patch(model, metric=METRIC, clean=alone[0], corrupt=alone[1], **given)
            torch.testing.assert_close(found.values[..., row], one.values[..., 0], atol=2e-5, rtol=1e-3)


def test_several_metrics_each_have_their_gradient():
    model = vit(linear=False)
    named = {"diff": METRIC, "prob": metrics.prob(3)}
    given = {"clean": images(1), "corrupt": images(2), "sites": "**.hook_q"}
    for method in ("atp", "atp*", "ig"):
        found = attribution_patch(model, metric=named, method=method, **given)
        assert found.axes["metric"] == ["diff", "prob"]
        for number, metric in enumerate(named.values()):
            one = attribution_patch(model, metric=metric, method=method, **given)
            torch.testing.assert_close(found.values[number], one.values)
            torch.testing.assert_close(found.base[number], one.base)


def test_all_sites_take_one_forward_and_one_backward():
    model = vit(linear=False)
    runs, backwards = [], []
    head: nn.Module = model.module.classifier
    first = model.module.vit.embeddings
    first.register_forward_hook(lambda *_: runs.append(torch.is_grad_enabled()))
    head.register_full_backward_hook(lambda *_: backwards.append(1))
    attribution_patch(
        model, metric=METRIC, clean=images(1), corrupt=images(2), sites="vision.blocks.**", axes=("site",)
    )
    assert (runs, len(backwards)) == ([False, True], 1)


def test_nothing_is_left_behind_and_frozen_parameters_do_not_matter():
    model = vit(linear=False)
    given = {"metric": METRIC, "clean": images(1), "corrupt": images(2), "sites": "**.hook_z"}
    found = attribution_patch(model, **given)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.module.requires_grad_(False)
    with torch.no_grad():
        again = attribution_patch(model, **given)
    torch.testing.assert_close(again.values, found.values)
    assert not model.engine.stack
    assert not found.values.requires_grad


def test_bfloat16_differs_by_rounding():
    exact = vit(linear=False)
    model = cv.HookedModel(vit(linear=False).module.bfloat16())
    clean, corrupt = ({"pixel_values": images(seed)["pixel_values"].bfloat16()} for seed in (1, 2))
    for method in ("atp", "atp*", "ig"):
        given = {"metric": METRIC, "sites": "**.hook_q", "method": method}
        found = attribution_patch(model, clean=clean, corrupt=corrupt, **given)
        wanted = attribution_patch(exact, clean=images(1), corrupt=images(2), **given).values
        assert found.values.dtype == torch.float32
        assert float((found.values - wanted).abs().max()) < 0.2 * float(wanted.abs().max())


def test_dead_sites_and_layers_have_no_effect():
    model, clean, corrupt = runs_of("llava-clip-llama")
    for method in ("atp", "atp*", "ig"):
        found = attribution_patch(
            model, metric=METRIC, clean=clean, corrupt=corrupt, sites="vision.blocks.*.attn.hook_q", method=method
        )
        assert found.dead
        for site in found.dead:
            assert bool((found.values[found.axes["layer"].index(int(site.split(".")[2]))] == 0).all())
        assert bool((found.values[0] != 0).any())


def test_a_run_patched_into_itself_has_no_effect():
    model = vit(linear=False)
    for method in ("atp", "atp*", "ig"):
        with pytest.warns(UserWarning, match="do not differ"):
            found = attribution_patch(
                model, metric=METRIC, clean=images(1), corrupt=images(1), sites="**.hook_q", method=method
            )
        assert float(found.values.abs().max()) < 1e-7


def test_results_survive_a_file_and_are_drawn_as_those_of_patching(tmp_path):
    model = vit(linear=False)
    found = attribution_patch(
        model, metric=METRIC, clean=images(1), corrupt=images(2), sites="**.hook_z", method="ig", nodes=4
    )
    again = AttributionResult.load(found.save(tmp_path / "a.npz"))
    assert torch.equal(again.values, found.values)
    assert torch.equal(again.completeness_gap, found.completeness_gap)
    assert (again.method, again.mode, again.site) == ("ig", "denoise", "attn.hook_z")
    assert "method=ig" in again.provenance["method"]
    assert "nodes=4" in again.provenance["method"]
    figure = found.plot()
    assert len(figure.data) >= 1
    assert "estimated" in figure.layout.title.text
    assert found.top(1)[0][0].keys() == {"layer", "head"}


# -- what is refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "eap"}, "method"),
        ({"nodes": 0}, "nodes"),
        ({"mode": "both"}, "mode"),
        ({"axes": ("head",)}, "axes"),
        ({"metric": None}, "metric"),
        ({"metric": lambda logits: logits.sum()}, "one number per example"),
        ({"metric": metrics.rank(1)}, "rank counts"),
        ({"metric": {"a": METRIC, "b": metrics.accuracy(1)}}, "b counts"),
        ({"metric": lambda logits: logits[:, 0].detach()}, "no gradient"),
        ({"metric": lambda logits: logits[:, 0] > 0}, "no gradient"),
        ({"sites": "vision.hook_readout", "axes": ("site", "position")}, "no positions"),
    ],
)
def test_meaningless_requests_are_refused(options, message):
    model = vit()
    given = {"metric": METRIC, "clean": images(1), "corrupt": images(2), "sites": "**.hook_z", **options}
    with pytest.raises(InputError, match=message):
        attribution_patch(model, **given)
    assert not model.engine.stack


def test_training_mode_with_dropout_is_refused():
    model = vit(hidden_dropout_prob=0.1)
    model.module.train()
    with pytest.raises(InputError, match="eval"):
        attribution_patch(model, metric=METRIC, clean=images(1), corrupt=images(2), sites="**.hook_z")


def test_scores_that_are_not_shown_cannot_be_fixed():
    model, clean, corrupt = runs_of("siglip2")
    with pytest.raises(InputError, match="method='atp'"):
        attribution_patch(
            model, metric=logit_diff(0, 1), clean=clean, corrupt=corrupt, sites="vision.pool.attn.hook_q",
            axes=("site",), method="atp*",
        )  # fmt: skip


def test_a_divergence_from_the_run_itself_is_announced():
    model = vit(linear=False)
    given = {"metric": "kl", "clean": images(1), "corrupt": images(2), "sites": "**.hook_z"}
    with pytest.warns(UserWarning, match="minimum"):
        found = attribution_patch(model, **given, mode="noise")
    assert float(found.values.abs().max()) < 1e-12
    assert float(attribution_patch(model, **given, mode="noise", method="ig").values.abs().max()) > 1e-4
    assert float(attribution_patch(model, **given).values.abs().max()) > 1e-4

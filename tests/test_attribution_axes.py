"""Attribution patching of regions and groups of neurons, and its folders: against exact patching where it is exact, and against its own sums."""

from __future__ import annotations

import pytest
import torch

from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import activation_patch, attribution_patch
from circuitvision.patching.estimator import Estimator
from tests.test_attribution_patch import METRIC, both, images, one_softmax, runs_of, uniform, vit

REGIONS = {"cls": 0, "early": range(1, 9), "late": range(9, 16), "odd": list(range(1, 16, 2))}
NEURONS = {"few": [0, 3, 7], "other": [1, 3], "one": [2]}
TEXT = "language.blocks.*."


# -- where estimates are exact ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize("options", [{"method": "atp"}, {"method": "ig", "nodes": 2}])
@pytest.mark.parametrize(
    ("sites", "axes"),
    [
        ("vision.blocks.*.hook_resid_pre", ("layer", "region")),
        ("vision.blocks.*.attn.hook_v", ("region", "layer", "head")),
        ("vision.blocks.*.mlp.hook_post", ("layer", "neurons")),
        ("vision.blocks.*.attn.hook_z", ("head", "neurons", "layer")),
        ("vision.blocks.*.hook_mlp_out", ("neurons", "layer", "position")),
        ("vision.blocks.*.hook_attn_out", ("layer", "neurons", "region")),
        ("vision.blocks.*.attn.hook_z", ("layer", "neurons", "head", "region")),
    ],
)
def test_on_a_linear_model_estimates_of_regions_and_neurons_are_the_effects(mode, options, sites, axes):
    given = {"regions": REGIONS if "region" in axes else None, "neurons": NEURONS if "neurons" in axes else None}
    if sites.endswith("hook_z") and given["neurons"]:
        given["neurons"] = {"few": [0, 3], "one": [2]}
    exact, estimate = both(uniform(vit()), images(1), images(2), sites=sites, axes=axes, mode=mode, **options, **given)
    assert estimate.axes == exact.axes
    assert float(exact.values.abs().max()) > 1e-3
    torch.testing.assert_close(estimate.values, exact.values, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("letter", ["q", "k"])
@pytest.mark.parametrize("axes", [("layer", "head", "region"), ("region", "layer")])
def test_the_fix_patches_the_queries_and_keys_of_a_region_together(letter, axes):
    given = {"sites": f"vision.blocks.1.attn.hook_{letter}", "axes": axes, "regions": REGIONS}
    exact, fixed = both(one_softmax(), images(1), images(2), method="atp*", grad_drop=False, **given)
    torch.testing.assert_close(fixed.values, exact.values, atol=1e-10, rtol=1e-10)
    assert float(exact.values.abs().max()) > 1e-3


# -- sums ------------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "paligemma2", "pi0"])
@pytest.mark.parametrize("leaf", ["hook_resid_post", "mlp.hook_post", "attn.hook_v"])
@pytest.mark.parametrize("method", ["atp", "ig"])
def test_parts_that_share_nothing_add_up_to_the_whole(name, leaf, method):
    model, clean, corrupt = runs_of(name)
    metric = METRIC if name != "pi0" else lambda actions: actions[:, 0, 1]
    count = model.tokens(corrupt)["language"].n_positions
    regions = {"first": range(3), "middle": range(3, count - 2), "end": range(count - 2, count)}
    head = ("head",) if "attn" in leaf else ()

    def found(*axes: str, **more):
        given = {
            "metric": metric,
            "clean": clean,
            "corrupt": corrupt,
            "sites": TEXT + leaf,
            "method": method,
            "nodes": 2,
        }
        return attribution_patch(model, axes=("layer", *head, *axes), progress=False, **given, **more).values

    whole = found()
    close = {"atol": 1e-9 * float(whole.abs().max()), "rtol": 1e-7}
    assert float(whole.abs().max()) > 0
    torch.testing.assert_close(found("region", regions=regions).sum(-2), whole, **close)
    torch.testing.assert_close(found("neurons", neurons=3).sum(-2), whole, **close)
    single = found("position")
    both_ways = found("region", "neurons", regions={"some": [1, 4], "rest": range(5, count)}, neurons=2)
    torch.testing.assert_close(both_ways[..., 0, :, :].sum(-2), single[..., [1, 4], :].sum(-2), **close)


def test_the_score_of_grad_drop_is_of_the_whole_region():
    # A mean of sizes: of the sum over a region, not the sum of the sizes of its positions.
    model = vit(layers=3, linear=False)
    given = {
        "metric": METRIC,
        "clean": images(1),
        "corrupt": images(2),
        "sites": "vision.blocks.*.hook_mlp_out",
        "method": "atp*",
        "progress": False,
    }
    regions = {str(number): number for number in range(16)} | {"all": "all"}
    found = attribution_patch(model, axes=("layer", "region"), regions=regions, **given).values
    torch.testing.assert_close(found[:, :16], attribution_patch(model, axes=("layer", "position"), **given).values)
    torch.testing.assert_close(found[:, 16], attribution_patch(model, axes=("layer",), **given).values)
    assert bool((found[0, 16].abs() < found[0, :16].abs().sum(0) - 1e-6).all())


# -- data sets -------------------------------------------------------------------------------------------------------------------------------------


def pairs_of(count: int = 3):
    model, clean, corrupt = runs_of("llava-clip-llama", count=count)
    data = {"answers": list(range(1, count + 1)), "foils": list(range(4, count + 4)), "groups": list(range(count))}
    return model, Pairs(inputs=clean, corrupt_inputs=corrupt, **data)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_regions_of_each_example_are_its_own_in_every_batch_and_empty_ones_have_no_value(mode):
    model, pairs = pairs_of()
    length = model.tokens(next(iter(pairs.clean.batches(model, 3))).inputs)["language"].n_positions
    mask = torch.zeros(3, length, dtype=torch.bool)
    mask[0, 2:5] = mask[2, [1, 6]] = True
    given = {
        "sites": TEXT + "hook_mlp_out",
        "axes": ("layer", "region"),
        "regions": {"own": mask, "end": "last"},
        "mode": mode,
        "allow_wrong": True,
        "progress": False,
    }
    with pytest.warns(UserWarning, match="select no position in 1 of 3"):
        found = attribution_patch(model, pairs, "logit_diff", example_batch=2, **given)
    with pytest.warns(UserWarning, match="select no position"):
        exact = activation_patch(model, pairs, "logit_diff", example_batch=2, **given)
    assert found.values.isnan().equal(exact.values.isnan())
    assert found.values[:, 0].isnan().tolist() == [[False, True, False]] * len(found.values)
    single = attribution_patch(model, pairs, "logit_diff", **{**given, "axes": ("layer", "position"), "regions": None})
    for example, places in ((0, [2, 3, 4]), (2, [1, 6])):
        expected = single.values[:, places, example].sum(1)
        torch.testing.assert_close(found.values[:, 0, example], expected, atol=1e-9, rtol=1e-7)


class Stopped(Exception):
    pass


@pytest.mark.parametrize("method", ["atp", "atp*", "ig"])
def test_what_is_interrupted_goes_on_to_the_same_bits(method, tmp_path, monkeypatch):
    model, pairs = pairs_of()
    given = {
        "sites": TEXT + "attn.hook_q",
        "axes": ("layer", "head"),
        "method": method,
        "example_batch": 1,
        "allow_wrong": True,
        "progress": False,
    }
    whole = attribution_patch(model, pairs, "logit_diff", **given)
    batches, one = [], Estimator.batch

    def counting(self: Estimator, batch):
        if len(batches) == 2:
            raise Stopped
        batches.append(batch.number)
        return one(self, batch)

    monkeypatch.setattr(Estimator, "batch", counting)
    with pytest.raises(Stopped):
        attribution_patch(model, pairs, "logit_diff", save_to=tmp_path, **given)
    assert batches == [0, 1]
    batches.clear()
    # The folder keeps how many examples run together, whatever is asked for.
    again = attribution_patch(
        model, pairs, "logit_diff", save_to=tmp_path, resume=True, **{**given, "example_batch": 3}
    )
    assert batches == [2]
    batches.clear()
    read = attribution_patch(model, pairs, "logit_diff", save_to=tmp_path, resume=True, **given)
    assert batches == []
    for found in (again, read):
        for field in ("values", "base", "source", "completeness_gap"):
            assert getattr(found, field).equal(getattr(whole, field)), field
        assert found.axes == whole.axes
    assert model.engine.handles == []


def test_inputs_in_memory_are_one_part(tmp_path, monkeypatch):
    model, clean, corrupt = runs_of("vit")
    given = {
        "sites": "vision.blocks.*.hook_mlp_out",
        "axes": ("layer",),
        "metric": {"a": METRIC, "b": logit_diff(0, 3)},
        "allow_wrong": True,
        "progress": False,
    }
    first = attribution_patch(model, clean=clean, corrupt=corrupt, save_to=tmp_path, **given)
    monkeypatch.setattr(Estimator, "batch", None)
    again = attribution_patch(model, clean=clean, corrupt=corrupt, save_to=tmp_path, resume=True, **given)
    assert again.values.equal(first.values)
    assert again.base.equal(first.base)
    with pytest.raises(InputError, match="another study"):
        attribution_patch(model, clean=corrupt, corrupt=corrupt, save_to=tmp_path, resume=True, **given)


@pytest.mark.parametrize(
    "change",
    [
        {"method": "atp*"},
        {"method": "ig"},
        {"mode": "noise"},
        {"sites": TEXT + "hook_attn_out"},
        {"axes": ("layer", "position"), "regions": None},
        {"regions": {"end": [0]}},
        {"metric": "logprob"},
    ],
)
def test_a_folder_of_something_else_is_refused(change, tmp_path):
    model, pairs = pairs_of(2)
    given = {
        "sites": TEXT + "hook_mlp_out",
        "axes": ("layer", "region"),
        "regions": {"end": "last"},
        "metric": "logit_diff",
        "allow_wrong": True,
        "progress": False,
    }
    attribution_patch(model, pairs, save_to=tmp_path, **given)
    with pytest.raises(InputError, match="another study"):
        attribution_patch(model, pairs, save_to=tmp_path, resume=True, **(given | change))
    with pytest.raises(InputError, match="resume=True"):
        attribution_patch(model, pairs, save_to=tmp_path, **given)


def test_the_folder_of_a_patching_is_no_folder_of_estimates(tmp_path):
    model, pairs = pairs_of(2)
    given = {
        "metric": "logit_diff",
        "sites": TEXT + "hook_mlp_out",
        "axes": ("layer",),
        "allow_wrong": True,
        "progress": False,
    }
    activation_patch(model, pairs, save_to=tmp_path, **given)
    with pytest.raises(InputError, match="another study"):
        attribution_patch(model, pairs, save_to=tmp_path, resume=True, **given)


# -- what cannot be meant --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ("layer", "region")}, "belong together"),
        ({"axes": ("layer",), "neurons": 2}, "belong together"),
        ({"axes": ("layer", "neurons"), "neurons": [[99]]}, "no neuron 99"),
        ({"axes": ("layer", "region"), "regions": {"far": 99}}, "position 99"),
        ({"axes": ("layer", "step")}, "step"),
        (
            {"axes": ("layer", "neurons"), "neurons": 2, "method": "atp*", "sites": "vision.blocks.*.attn.hook_q"},
            "softmax",
        ),
        ({"axes": ("layer",), "resume": True}, "save_to"),
    ],
)
def test_meaningless_requests_are_refused(options, message):
    model, clean, corrupt = runs_of("vit")
    given = {
        "metric": METRIC,
        "clean": clean,
        "corrupt": corrupt,
        "sites": "vision.blocks.*.hook_mlp_out",
        "progress": False,
    }
    with pytest.raises(InputError, match=message):
        attribution_patch(model, **(given | options))
    assert model.engine.handles == []


# -- what dropping a layer costs -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("site", ["attn.hook_q", "hook_resid_post"])
def test_layers_before_all_sites_are_dropped_without_a_backward_pass(site, monkeypatch):
    from circuitvision.patching.gradient_run import GradientRun

    model, clean, corrupt = runs_of("llava-clip-llama")
    given = {
        "metric": METRIC,
        "clean": clean,
        "corrupt": corrupt,
        "sites": TEXT + site,
        "axes": ("layer",),
        "method": "atp*",
    }
    passes, one = [], GradientRun._gradients

    def counting(self: GradientRun, *args):
        passes.append(self.dropped)
        return one(self, *args)

    monkeypatch.setattr(GradientRun, "_gradients", counting)
    found = attribution_patch(model, **given, progress=False)
    # Nothing of the vision tower; of the language model what lies behind a site that counts.
    first = 0 if site == "attn.hook_q" else 1
    assert passes == [None, *[("language", layer) for layer in range(first, model.language.cfg.n_layers)]]
    passes.clear()
    monkeypatch.setattr(GradientRun, "reaches", lambda self, layer: True)
    every = attribution_patch(model, **given, progress=False)
    # Of the vision tower as well, but for the last block, which this model does not read.
    assert [one for one in passes if one and one[0] == "vision"] == [("vision", 0), ("vision", 1)]
    torch.testing.assert_close(found.values, every.values, atol=0, rtol=1e-12)

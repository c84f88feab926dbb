"""Patching over regions, neurons, several sites and windows of layers: every cell is what hooks written by hand do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import activation_patch
from circuitvision.patching.cells import Grid, neuron_groups
from tests.test_patching import hooked_pair

METRIC = logit_diff(3, 5)


@pytest.fixture(scope="module")
def llava() -> tuple[cv.HookedModel, Mapping[str, Any], Mapping[str, Any]]:
    return hooked_pair("llava-clip-llama")


def by_hand(
    model: cv.HookedModel,
    clean: Mapping[str, Any],
    corrupt: Mapping[str, Any],
    sites: Sequence[str],
    write: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """The effect of ``write(own, clean)`` at the sites of the corrupt run."""
    _, cache = model.run_with_cache(clean, names_filter=list(sites))
    hooks = [(site, lambda tensor, hook: write(tensor.clone(), cache[hook.name])) for site in sites]
    patched = METRIC(model.run_with_hooks(corrupt, fwd_hooks=hooks), corrupt)
    return patched - METRIC(model(corrupt), corrupt)


def test_a_region_is_the_positions_it_names(llava):
    model, clean, corrupt = llava
    image = model.tokens(clean)["language"].image(0)
    result = activation_patch(
        model,
        metric=METRIC,
        clean=clean,
        corrupt=corrupt,
        sites="language.blocks.*.hook_resid_pre",
        axes=("region", "layer"),
        regions={"image": image, "text": "text", "last": "last"},
        progress=False,
    )
    assert result.axes["region"] == ["image", "text", "last"]
    kinds = model.tokens(clean)["language"].kind[0]
    held = torch.tensor([kind == "patch" for kind in kinds])
    for row, mask in enumerate((held, torch.tensor([kind == "text" for kind in kinds]))):

        def write(own: Tensor, source: Tensor, mask: Tensor = mask) -> Tensor:
            own[:, mask] = source[:, mask]
            return own

        for layer in (0, 1):
            expected = by_hand(model, clean, corrupt, [f"language.blocks.{layer}.hook_resid_pre"], write)
            torch.testing.assert_close(result.values[row, layer], expected, atol=1e-5, rtol=1e-4)


def test_groups_of_neurons_are_coordinates(llava):
    model, clean, corrupt = llava
    width = model.language.cfg.d_mlp
    groups = {"few": [0, 3], "rest": [n for n in range(width) if n not in (0, 3)]}
    result = activation_patch(
        model,
        metric=METRIC,
        clean=clean,
        corrupt=corrupt,
        sites="language.blocks.1.mlp.hook_post",
        axes=("layer", "neurons"),
        neurons=groups,
        progress=False,
    )

    def write(own: Tensor, source: Tensor) -> Tensor:
        own[..., [0, 3]] = source[..., [0, 3]]
        return own

    expected = by_hand(model, clean, corrupt, ["language.blocks.1.mlp.hook_post"], write)
    torch.testing.assert_close(result.values[0, 0], expected, atol=1e-5, rtol=1e-4)
    whole = activation_patch(
        model,
        metric=METRIC,
        clean=clean,
        corrupt=corrupt,
        sites="language.blocks.1.mlp.hook_post",
        axes=("layer", "neurons"),
        neurons=1,
        progress=False,
    )
    plain = activation_patch(
        model,
        metric=METRIC,
        clean=clean,
        corrupt=corrupt,
        sites="language.blocks.1.mlp.hook_post",
        axes=("layer",),
        progress=False,
    )
    assert whole.axes["neurons"] == [f"0…{width - 1}"]
    torch.testing.assert_close(whole.values[:, 0], plain.values, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("window", [2, 3, "up to", "from"])
def test_a_window_patches_its_layers_together(window):
    model, clean, corrupt = hooked_pair("vit")
    layers = range(model.vision.cfg.n_layers)
    sites = [f"vision.blocks.{layer}.hook_attn_out" for layer in layers]
    result = activation_patch(
        model, metric=METRIC, clean=clean, corrupt=corrupt, sites=sites, axes=("layer",), window=window, progress=False
    )
    for layer in layers:
        held = {
            2: [layer, layer + 1],
            3: [layer - 1, layer, layer + 1],
            "up to": list(range(layer + 1)),
            "from": list(layers)[layer:],
        }[window]
        together = [sites[number] for number in held if number in layers]
        expected = by_hand(model, clean, corrupt, together, lambda own, source: source)
        torch.testing.assert_close(result.values[layer], expected, atol=1e-5, rtol=1e-4)


def test_all_writers_from_the_first_layer_on_are_everything_but_the_embedding():
    model, clean, corrupt = hooked_pair("vit")
    sites = ["vision.blocks.*.hook_attn_out", "vision.blocks.*.hook_mlp_out"]
    result = activation_patch(
        model, metric=METRIC, clean=clean, corrupt=corrupt, sites=sites, axes=("site", "layer"), progress=False
    )
    assert list(result.axes) == ["site", "layer", "example"]
    assert result.axes["site"] == ["hook_attn_out", "hook_mlp_out"]
    alone = activation_patch(
        model, metric=METRIC, clean=clean, corrupt=corrupt, sites=sites[1], axes=("layer",), progress=False
    )
    assert torch.equal(result.values[1], alone.values)
    assert result.plot() is not None


def test_a_cell_whose_sites_are_all_dead_is_0_without_a_run(llava):
    model, clean, corrupt = llava
    last = model.vision.cfg.n_layers - 1
    result = activation_patch(
        model,
        metric=METRIC,
        clean=clean,
        corrupt=corrupt,
        sites="vision.blocks.*.hook_mlp_out",
        axes=("layer",),
        window="from",
        progress=False,
    )
    assert result.dead == [f"vision.blocks.{last}.hook_mlp_out"]
    assert bool((result.values[last] == 0).all())
    assert len(result.edits) == last


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 40), st.data())
def test_equal_runs_hold_every_coordinate_once(width, data):
    count = data.draw(st.integers(1, width))
    groups = neuron_groups(count, width)
    assert [n for group in groups.values() for n in group] == list(range(width))
    assert len(groups) == count
    assert max(map(len, groups.values())) - min(map(len, groups.values())) <= 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ("layer", "region")}, "belong together"),
        ({"regions": {"last": "last"}}, "belong together"),
        ({"axes": ("layer", "position", "region"), "regions": {"last": "last"}}, "part of a region"),
        ({"axes": ("layer", "neurons"), "neurons": [[10_000]]}, "no neuron 10000"),
        ({"axes": ("layer", "neurons"), "neurons": [[]]}, "empty group"),
        ({"axes": ("layer", "neurons"), "neurons": 0}, "0 groups"),
        ({"axes": ("layer", "neurons"), "neurons": True}, "neurons=True"),
        ({"axes": ("layer", "neurons"), "neurons": [[0.5]]}, "whole numbers"),
        ({"axes": ("layer", "neurons"), "neurons": {"x": [0, 0, 1]}}, "twice"),
        ({"axes": "layer"}, r"axes=\('layer',\)"),
        ({"axes": ("layer", "head")}, r"axes=\('layer', 'position'\)"),
        ({"window": 0}, "window"),
        ({"window": True}, "window"),
        ({"window": 2, "axes": ("site",)}, "window"),
        ({"sites": ["vision.blocks.*.hook_mlp_out", "vision.blocks.*.hook_attn_out"]}, "'site' and 'layer'"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(options, message):
    model, clean, corrupt = hooked_pair("vit")
    given_options = {"sites": "vision.blocks.*.hook_mlp_out", "axes": ("layer",), **options}
    with pytest.raises(InputError, match=message):
        activation_patch(model, metric=METRIC, clean=clean, corrupt=corrupt, progress=False, **given_options)


def test_a_grid_knows_what_its_sites_have_in_common():
    names = ("vision.blocks.0.attn.hook_z", "vision.blocks.1.attn.hook_z", "projector.hook_out")
    assert Grid(names, ("site",)).kind == "attn.hook_z, projector.hook_out"


def test_the_figure_of_equal_runs_names_no_largest_effect():
    model, clean, _ = hooked_pair("vit")
    equal = {"clean": clean, "corrupt": clean, "sites": "vision.blocks.*.hook_mlp_out", "axes": ("layer",)}
    with pytest.warns(UserWarning, match="do not differ"):
        result = activation_patch(model, metric=METRIC, progress=False, **equal)
    assert result.restored.isnan().all()
    assert "largest" not in result.plot().layout.title.text

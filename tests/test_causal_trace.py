"""Causal tracing: cells against hooks written by hand with the same noise, what must come back whole, and what cannot come back at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits, regions
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.model.positions import Positions
from circuitvision.patching import CausalTrace, causal_trace
from tests.test_patching import hooked_pair

METRIC = logit_diff(3, 5)


@pytest.fixture(scope="module")
def llava() -> tuple[cv.HookedModel, Mapping[str, Any], Tensor]:
    model, inputs, _ = hooked_pair("llava-clip-llama")
    kinds = model.tokens(inputs)["language"].kind[0]
    return model, inputs, torch.tensor([kind == "patch" for kind in kinds])


def run_by_hand(
    model, inputs, noise: Tensor, mask: Tensor, writes: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The metric under noise at the entrance and given values at some sites, and what the sites held before."""
    seen: dict[str, Tensor] = {}

    def corrupt(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[0, mask] += noise.to(tensor)
        return tensor

    def write(tensor: Tensor, hook: Any) -> Tensor:
        seen[hook.name] = tensor.clone()
        return writes[hook.name](tensor.clone())

    hooks = [("language.hook_input", corrupt), *((name, write) for name in writes)]
    return METRIC(model.run_with_hooks(inputs, fwd_hooks=hooks), inputs), seen


def drawn(model, inputs, mask: Tensor, scale: float, seed: int) -> Tensor:
    """The noise that the edit of this seed adds, read off a run."""
    noise = edits.add_noise("language.hook_input", scale, seed=seed, positions="patch")
    # What block 0 reads is what noise was added to, seen behind the edit.
    site, found = "language.blocks.0.hook_resid_pre", []
    for under in ([], [noise]):
        with model.record(site) as cache:
            model.run(inputs, under)
        found.append(cache[site])
    return (found[1] - found[0])[0, mask]


@pytest.mark.parametrize("position", ["patch", "last"])
@pytest.mark.parametrize("severed", ["", "hook_mlp_out"])
def test_a_cell_is_a_run_by_hand(llava, severed, position):
    model, inputs, mask = llava
    options = {
        "subject": "patch",
        "sites": "language.blocks.*.hook_resid_post",
        "severed": severed,
        "samples": 2,
        "seed": 4,
    }
    found = causal_trace(model, inputs, METRIC, axes=("layer", "position"), noise=2.0, progress=False, **options)
    _, cache = model.run_with_cache(inputs)
    entries = cache["language.hook_input"][0, mask]
    assert found.sigma == pytest.approx(float(entries.double().std(correction=0)), rel=1e-5)
    assert isinstance(found, CausalTrace)
    position, layer = (int(mask.nonzero()[2]) if position == "patch" else len(mask) - 1), 0
    effects = []
    for sample in range(2):
        noise = drawn(model, inputs, mask, 2.0 * found.sigma, 4 + sample)
        site = f"language.blocks.{layer}.hook_resid_post"
        later = (
            [f"language.blocks.{n}.hook_mlp_out" for n in range(layer + 1, model.language.cfg.n_layers)]
            if severed
            else []
        )
        base, held = run_by_hand(model, inputs, noise, mask, dict.fromkeys(later, lambda tensor: tensor))

        def restore(tensor: Tensor, value: Tensor) -> Tensor:
            tensor[:, position] = value[:, position]
            return tensor

        writes = {site: lambda tensor: restore(tensor, cache[site])}
        writes |= {name: lambda tensor, name=name: restore(tensor, held[name]) for name in later}
        effects.append(run_by_hand(model, inputs, noise, mask, writes)[0] - base)
    torch.testing.assert_close(found.values[layer, position], torch.stack(effects).mean(0), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(found.source, METRIC(model(inputs), inputs), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("subject", [3, [3, 4], slice(3, 6), "last", lambda tokens: [1]])
def test_the_subject_is_spelled_as_positions_are(llava, subject):
    model, inputs, _ = llava
    found = causal_trace(
        model, inputs, METRIC, subject=subject, sites="language.blocks.0.hook_resid_post", axes=("layer",), samples=1, progress=False
    )  # fmt: skip
    rows = Positions.of(subject).resolve(model.tokens(inputs)["language"])
    entries = model.run_with_cache(inputs)[1]["language.hook_input"][rows]
    assert found.sigma == pytest.approx(float(entries.double().std(correction=0)), rel=1e-5)


def test_the_subject_restored_at_the_entrance_is_everything_and_the_rest_is_nothing(llava):
    model, inputs, _ = llava
    found = causal_trace(
        model, inputs, METRIC, subject="patch", sites="language.blocks.0.hook_resid_pre", axes=("layer", "region"),
        regions={"image": "patch", "text": "text"}, samples=3, progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found.values[0, 0], found.source - found.base, atol=1e-4, rtol=1e-3)
    assert found.values[0, 1].abs().max() < 1e-5
    assert found.restored[0, 0].item() == pytest.approx(1.0, abs=1e-3)


def test_what_one_example_restores_whole_and_another_in_part_has_a_value_in_both():
    model = cv.organisms.load("shapes-llava")
    pairs = cv.organisms.pairs("shapes-llava", 2, 3)
    first = next(
        n
        for n, kind in enumerate(model.tokens(next(pairs.batches(model)).inputs)["language"].kind[0])
        if kind == "patch"
    )
    found = causal_trace(
        model, pairs, "logit_diff", subject=regions.at([first, first + 1]), sites="language.blocks.0.hook_resid_pre", axes=("layer", "region"),
        regions={"first": regions.at([first, first])}, samples=2, sigma=1.0, progress=False,
    )  # fmt: skip
    effect = found.values[0, 0]
    torch.testing.assert_close(effect[0], (found.source - found.base)[0], atol=1e-4, rtol=1e-4)
    assert effect[1].abs() < 1e-5


def test_noise_is_the_same_in_any_batch_and_another_for_another_seed():
    model = cv.organisms.load("shapes-llava")
    pairs = cv.organisms.pairs("shapes-llava", 5, 3)
    options = {
        "subject": "patch", "sites": "language.blocks.*.hook_resid_post", "axes": ("layer", "region"), "regions": {"last": "last", "image": "patch"},
        "samples": 2, "sigma": 1.0, "noise": 1.0, "progress": False,
    }  # fmt: skip
    one = causal_trace(model, pairs, "logit_diff", example_batch=1, **options)
    whole = causal_trace(model, pairs, "logit_diff", example_batch=5, **options)
    torch.testing.assert_close(one.values, whole.values, atol=1e-4, rtol=1e-4)
    part = causal_trace(model, pairs.clean.at([3, 1]), "logit_diff", example_batch=2, **options)
    torch.testing.assert_close(part.values, whole.values[..., [3, 1]], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(causal_trace(model, pairs, "logit_diff", seed=1, **options).base, whole.base, atol=1e-3)


def test_what_is_interrupted_goes_on_from_what_was_kept(llava, tmp_path):
    model, inputs, _ = llava
    options = {
        "subject": "patch",
        "sites": "language.blocks.*.hook_mlp_out",
        "axes": ("layer",),
        "window": 3,
        "samples": 2,
        "progress": False,
    }
    found = causal_trace(model, inputs, METRIC, save_to=tmp_path / "kept", **options)
    again = causal_trace(model, inputs, METRIC, save_to=tmp_path / "kept", resume=True, **options)
    assert torch.equal(found.values, again.values)
    found.save(tmp_path / "trace.npz")
    back = cv.load(tmp_path / "trace.npz")
    assert torch.equal(back.values, found.values)
    assert (back.noise, back.sigma, back.samples) == (found.noise, found.sigma, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": 0.0}, "positive"),
        ({"noise": float("inf")}, "positive"),
        ({"sigma": float("nan")}, "positive"),
        ({"samples": 0}, "positive"),
        ({"samples": True}, "positive"),
        ({"subject": 10_000}, "outside"),
        ({"severed": "hook_resid_post"}, "stream itself"),
        ({"sites": "*.blocks.0.hook_resid_post"}, "one tower"),
        ({"subject": regions.words("zebra")}, "nowhere|zebra|word"),
        ({"severed": "hook_nothing"}, "hook_nothing"),
        ({"axes": ("layer", "region")}, "belong together"),
    ],
)
def test_requests_that_cannot_be_meant_are_refused(llava, options, message):
    model, inputs, _ = llava
    given = {
        "subject": "patch",
        "sites": "language.blocks.0.hook_resid_post",
        "axes": ("layer",),
        "samples": 1,
        **options,
    }
    with pytest.raises((InputError, cv.UnknownSiteError), match=message):
        causal_trace(model, inputs, METRIC, progress=False, **given)

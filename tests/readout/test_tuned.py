"""The tuned lens: nothing before training, an affine truth found by it, better than the plain lens on a trained model, and kept in a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.tuned import TunedLens
from tests.readout.common import run


def scenes(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [cv.data.scenes.sample_scene(rng).image for _ in range(count)]


def test_an_untrained_one_is_the_plain_lens():
    model, _, cache = run("vit")
    width = model.vision.cfg.d_model
    blank = TunedLens(
        values=torch.zeros(2, 5),
        axes={"lens": ["plain", "tuned"], "layer": list(range(5))},
        tower="vision",
        weight=torch.zeros(5, width, width),
        bias=torch.zeros(5, width),
    )
    plain = logit_lens(model, cache, "vision", targets=[0, 1])
    assert torch.equal(
        logit_lens(model, cache, "vision", targets=[0, 1], norm="tuned", tuned=blank).values, plain.values
    )


def test_on_a_trained_model_it_reads_early_layers_better_and_leaves_the_last_alone(tmp_path):
    model = cv.organisms.load("shapes-vit")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    lens = TunedLens.train(model, model.inputs(images=scenes(256)), steps=150, seed=1)
    plain, tuned = lens.values
    assert (tuned <= plain + 0.02).all()
    assert tuned[1] < 0.8 * plain[1]
    assert float(plain[-1]) == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    assert all(p.grad is None for p in model.module.parameters())
    again = TunedLens.load(lens.save(tmp_path / "tuned.safetensors"))
    inputs = model.inputs(images=scenes(4, seed=9))
    first, second = (logit_lens(model, inputs, norm="tuned", tuned=t, targets=[0]).values for t in (lens, again))
    assert torch.equal(first, second)


def test_actions_are_fitted_by_squared_error():
    model, _, cache = run("pi0")
    lens = TunedLens.train(model, cache.inputs, "action", steps=60, held_out=0.2)
    assert lens.values[1, -1] < 1e-3 or lens.values[1, -1] <= lens.values[0, -1] + 1e-3


@pytest.mark.parametrize(("name", "tower"), [("vit-headless", "vision"), ("llava-clip-llama", "vision")])
def test_towers_without_a_head_are_refused(name, tower):
    model, _, cache = run(name)
    with pytest.raises(InputError, match="head"):
        TunedLens.train(model, cache.inputs, tower)


def test_too_few_positions_and_foreign_lenses_are_refused():
    model, _, cache = run("vit")
    one = {"pixel_values": cache.inputs["pixel_values"][:1]}
    with pytest.raises(InputError, match="too few"):
        TunedLens.train(model, one)
    other, _, pi0 = run("pi0")
    lens = TunedLens.train(other, pi0.inputs, "action", steps=2)
    with pytest.raises(InputError, match="action tower"):
        logit_lens(model, cache, "vision", targets=[0], norm="tuned", tuned=lens)

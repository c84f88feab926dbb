"""The tuned lens: nothing before training, an affine truth found by it, better than the plain lens on a trained model, and kept in a file."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.readout.lens.logit import logit_lens
from circuitvision.readout.lens.tuned import TunedLens, _Seen
from tests.readout.common import run
from tests.readout.layouts import by_row
from tests.zoo import case


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
    plain = logit_lens(model, cache, "vision", targets={0: 0, 1: 1})
    assert torch.equal(
        by_row(logit_lens(model, cache, "vision", targets={0: 0, 1: 1}, norm="tuned", tuned=blank)), by_row(plain)
    )


def test_on_a_trained_model_it_reads_early_layers_better_and_leaves_the_last_alone(tmp_path):
    model = cv.organisms.load("shapes-vit")
    before = {name: value.clone() for name, value in model.module.state_dict().items()}
    lens = TunedLens.train(model, model.inputs(images=scenes(256)), steps=150, seed=1)
    plain, tuned = by_row(lens)
    assert (tuned <= plain + 0.02).all()
    assert tuned[1] < 0.8 * plain[1]
    assert float(plain[-1]) == pytest.approx(0.0, abs=1e-5)
    assert all(torch.equal(before[name], value) for name, value in model.module.state_dict().items())
    assert all(p.grad is None for p in model.module.parameters())
    again = TunedLens.load(lens.save(tmp_path / "tuned.safetensors"))
    inputs = model.inputs(images=scenes(4, seed=9))
    first, second = (by_row(logit_lens(model, inputs, norm="tuned", tuned=t, targets=[0])) for t in (lens, again))
    assert torch.equal(first, second)


def test_actions_are_fitted_by_squared_error():
    model, _, cache = run("pi0")
    lens = TunedLens.train(model, cache.inputs, "action", steps=60, held_out=0.2)
    assert by_row(lens)[1, -1] < 1e-3 or by_row(lens)[1, -1] <= by_row(lens)[0, -1] + 1e-3


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


# -- what is held out ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llava-clip-llama", "dinov2-registers"])
def test_no_position_held_out_is_of_an_example_that_was_trained_on(name):
    model, _, _ = run(name)
    inputs = case(name).inputs(model.module, batch=5)
    owner = model.language if "language" in model.towers else model.vision
    for data in ([inputs], [inputs, case(name).inputs(model.module, batch=2)]):
        seen = _Seen.collect(model, data, owner, None)
        assert seen.n_examples == sum(
            len(one["pixel_values"]) if owner.name == "vision" else len(one["input_ids"]) for one in data
        )
        train, held = seen.split(0.4, torch.Generator().manual_seed(0))
        assert sorted([*train.tolist(), *held.tolist()]) == list(range(len(seen.numbers)))
        assert not set(seen.examples[train].tolist()) & set(seen.examples[held].tolist())
        assert len(set(seen.examples[held].tolist())) == round(0.4 * seen.n_examples)
    lens = TunedLens.train(model, inputs, steps=1)
    assert lens.held_out == "examples"
    assert "whole examples" in lens._repr_html_()
    assert (
        TunedLens.train(
            model, {key: value[:1] for key, value in inputs.items()}, positions=_kinds(name), steps=1
        ).held_out
        == "positions"
    )


def _kinds(name: str) -> list[str]:
    return ["text"] if name.startswith("llava") else ["patch", "cls"]


def test_what_a_map_knows_of_one_picture_is_not_taken_for_what_it_knows_of_a_layer():
    """Every example's positions are one point: held-out positions would be seen exactly in training, held-out examples are not."""
    model, _, _ = run("vit")
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(6, 3, 16, 16, generator=generator)[..., :1, :1].expand(-1, -1, 16, 16).contiguous()
    kinds = {"positions": "patch", "steps": 100, "batch": 64, "learning_rate": 3e-2, "seed": 1}
    lens = TunedLens.train(model, {"pixel_values": pixels}, **kinds)
    whole = TunedLens.train(model, {"pixel_values": pixels[:1]}, **kinds)
    assert (lens.held_out, whole.held_out) == ("examples", "positions")
    assert lens.positions == [80, 16]
    assert float(by_row(lens)[1, 0]) > 10 * float(by_row(whole)[1, 0])


def test_the_loss_held_out_is_that_of_the_maps_kept():
    model, _, _ = run("llava-clip-llama")
    inputs = case("llava-clip-llama").inputs(model.module, batch=4)
    lens = TunedLens.train(model, inputs, steps=5, held_out=0.5, seed=3)
    seen = _Seen.collect(model, [inputs], model.language, None)
    _, held = seen.split(0.5, torch.Generator().manual_seed(3))
    final = seen.residuals[-1][held]
    with torch.no_grad():
        norm, head = model.language.final_norm, model.module.lm_head
        wanted = head(norm(final)).log_softmax(-1)
        for index in range(len(lens.weight)):
            x = seen.residuals[index][held]
            for row, y in enumerate((x, x + x @ lens.weight[index] + lens.bias[index])):
                loss = (wanted.exp() * (wanted - head(norm(y)).log_softmax(-1))).sum(-1).mean()
                assert float(by_row(lens)[row, index]) == pytest.approx(float(loss), abs=1e-5)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_it_is_trained_whoever_calls(mode):
    model, _, cache = run("llava-clip-llama")
    with mode():
        lens = TunedLens.train(model, cache.inputs, steps=4)
    assert float(lens.weight[0].abs().max()) > 0
    assert float(lens.weight[-1].abs().max()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"held_out": 0.0}, "share between 0 and 1"),
        ({"held_out": 1.5}, "share between 0 and 1"),
        ({"steps": -1}, "steps from 0"),
        ({"batch": 0}, "batch from 1"),
        ({"learning_rate": float("nan")}, "finite learning_rate"),
    ],
)
def test_settings_that_train_nothing_are_refused_at_once(options, message, monkeypatch):
    model, _, cache = run("llava-clip-llama")
    monkeypatch.setattr(type(model), "run_with_cache", None)
    with pytest.raises(InputError, match=message):
        TunedLens.train(model, cache.inputs, **options)
    with pytest.raises(InputError, match="Give inputs"):
        TunedLens.train(model, [])

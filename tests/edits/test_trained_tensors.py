"""Tensors of edits that are trained: every kind of edit that holds one gives it the gradient of finite differences, and goes on holding it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from circuitvision import edits, metrics
from circuitvision.errors import InputError
from tests.edits.common import DOUBLE, inputs_of, near, random, same, wrapped

SITE = "vision.blocks.1.hook_resid_post"
Z = "vision.blocks.1.attn.hook_z"
WIDTH = 24
SOURCE = random(2, 17, WIDTH, seed=11)


class Sparse(nn.Module):
    """A small sparse autoencoder with trainable weights, the last of which is handed in."""

    name = "sparse"

    def __init__(self, decoder: Tensor) -> None:
        super().__init__()
        self.encoder, self.decoder = random(WIDTH, len(decoder), seed=3) / WIDTH**0.5, decoder

    def encode(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.encoder)

    def decode(self, features: Tensor) -> Tensor:
        return features @ self.decoder


KINDS: dict[str, tuple[tuple[int, ...], Callable[[Tensor], edits.Edit]]] = {
    "replace": ((WIDTH,), lambda t: edits.replace(SITE, t, positions=[0, 3])),
    "replace, one value per place": ((2, 17, WIDTH), lambda t: edits.replace(SITE, t)),
    "replace a head": ((6,), lambda t: edits.replace(Z, t, heads=[0, 2])),
    "ablate": ((WIDTH,), lambda t: edits.ablate(SITE, t, positions=slice(0, 4))),
    "add": ((WIDTH,), lambda t: edits.steer(SITE, t)),
    "norm_preserving": ((WIDTH,), lambda t: edits.steer(SITE, t, 0.7, mode="norm_preserving")),
    "project_out": ((WIDTH,), lambda t: edits.steer(SITE, t, 0.7, mode="project_out")),
    "the scale of a direction": ((), lambda t: edits.steer(SITE, random(WIDTH, seed=2), t)),
    "the scale of a turn": ((), lambda t: edits.steer(SITE, random(WIDTH, seed=2), t, mode="norm_preserving")),
    "scale": ((), lambda t: edits.scale(SITE, t, positions=[0, 4])),
    "scale each head": ((4, 1), lambda t: edits.scale(Z, t)),
    "a clipped factor": ((WIDTH,), lambda t: edits.scale(SITE, t, clip=(-0.5, 0.5))),
    "overwrite": ((3,), lambda t: edits.overwrite(SITE, [0, 5, 7], t)),
    "a feature": ((), lambda t: edits.overwrite(SITE, [2], t, dictionary=Sparse(random(9, WIDTH, seed=4)))),
    "a dictionary": ((9, WIDTH), lambda t: edits.overwrite(SITE, [2], 3.0, dictionary=Sparse(t))),
    "a basis": ((WIDTH, 3), lambda t: edits.project(SITE, t, SOURCE)),
    "a basis of one vector": ((WIDTH,), lambda t: edits.project(SITE, t, SOURCE, positions=[0, 2])),
    "the source of a subspace": ((WIDTH,), lambda t: edits.project(SITE, random(WIDTH, 3, seed=2), t)),
    "renormalise": ((), lambda t: edits.renormalise(SITE, t)),
    "scale_attention": ((), lambda t: edits.scale_attention("vision", 0, None, t, layers=1)),
    "scale_attention of the pattern": (
        (),
        lambda t: edits.scale_attention("vision", 0, [1, 2], t, layers=1, renormalise=False),
    ),
    "add_attention_bias": ((4, 1, 1), lambda t: edits.add_attention_bias("vision", 0, [1, 2], t, layers=1)),
    "a bias of the pattern": ((), lambda t: edits.add_attention_bias("vision", 0, [1], t, layers=1, renormalise=False)),
}


def measured(logits: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, logits[0].numel(), dtype=logits.dtype).cos()
    return (logits.flatten(1) * weights).sum()


@pytest.fixture
def run() -> Any:
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    with torch.enable_grad():
        yield lambda *listed: measured(model.run(inputs, list(listed)))


def difference(function: Callable[[Tensor], Tensor], at: Tensor, along: Tensor, step: float = 1e-5) -> float:
    with torch.no_grad():
        return float(function(at + step * along) - function(at - step * along)) / (2 * step)


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_trained_tensor_gets_the_gradient_of_finite_differences(kind: str) -> None:
    shape, make = KINDS[kind]
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    value, along = random(*shape, seed=1) if shape else torch.tensor(1.3, dtype=DOUBLE), random(*shape, seed=8)
    # The eager softmax of this model is computed in float32, whose rounding small steps would magnify.
    eager = "_attention" in kind or "pattern" in kind
    step, tolerance = (1e-2, 1e-3) if eager else (1e-5, 1e-5)
    wanted = difference(lambda t: measured(model.run(inputs, [make(t)])), value, along, step)
    trained = value.clone().requires_grad_()
    start = ("vision", 1) if eager or make(value).site == Z else SITE
    with torch.enable_grad():
        edit = make(trained)
        found = torch.autograd.grad(measured(model.run(inputs, [edit])), trained)[0]
        with model.prepared(inputs, start) as prepared:
            again = torch.autograd.grad(measured(prepared([edit])), trained)[0]
    assert abs(wanted) > 1e-6
    assert float((found * along).sum()) == pytest.approx(wanted, rel=tolerance, abs=1e-7)
    near(again, found, 1e-10)


def test_gradients_pass_an_edit_that_acts_on_what_another_one_left(run: Any) -> None:
    direction = random(WIDTH).requires_grad_()
    later = [edits.renormalise(SITE, 3.0), edits.steer(SITE, random(WIDTH, seed=5), mode="norm_preserving")]
    found = torch.autograd.grad(run(edits.steer(SITE, direction), *later), direction)[0]
    along = random(WIDTH, seed=8)
    wanted = difference(lambda t: run(edits.steer(SITE, t), *later), direction.detach(), along)
    assert float(found @ along) == pytest.approx(wanted, rel=1e-6)


def test_an_edit_is_used_again_while_its_tensor_is_trained(run: Any) -> None:
    basis = random(WIDTH, 2).requires_grad_()
    edit = edits.project(SITE, basis, SOURCE)
    optimizer = torch.optim.SGD([basis], lr=0.05)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = run(edit)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert all(later < earlier for earlier, later in itertools.pairwise(losses))
    same(run(edit), run(edits.project(SITE, basis.detach().clone(), SOURCE)))
    fixed = random(WIDTH)
    kept = edits.steer(SITE, fixed)
    fixed.add_(1.0)
    with pytest.raises(InputError, match="changed in place"):
        run(kept)


def test_a_trained_basis_that_turns_into_nothing_is_an_error(run: Any) -> None:
    direction = random(WIDTH).requires_grad_()
    edit = edits.steer(SITE, direction)
    run(edit)
    with torch.no_grad():
        direction[0] = float("nan")
    with pytest.raises(InputError, match="NaN"):
        run(edit)


def test_a_result_keeps_the_values_it_was_made_with() -> None:
    model = wrapped("vit", DOUBLE)
    inputs = inputs_of("vit", model)
    direction = random(WIDTH).requires_grad_()
    before = direction.detach().clone()
    result = model.sweep(inputs, [edits.steer(SITE, direction)], metrics.logit_diff(0, 1), progress=False)
    direction.data.mul_(2.0)
    near(result.rerun(model, inputs, progress=False).values, result.values)
    assert result.edits[0] == (edits.steer(SITE, before),)
    assert not any(ref.requires_grad for ref in [r.tensor for r in result.edits[0][0].held()])


def test_numbers_stay_numbers() -> None:
    assert edits.steer(SITE, random(WIDTH), torch.tensor(2)) == edits.steer(SITE, random(WIDTH), 2)
    assert "factor=2" in repr(edits.scale_attention("vision", factor=torch.tensor(2.0)))
    assert edits.renormalise(SITE, 2).values()["norm"] == 2.0
    with pytest.raises(InputError):
        edits.steer(SITE, random(WIDTH), "much")

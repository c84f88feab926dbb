"""Searches for subspaces against plain PyTorch: the loss of a boundless step, yes-or-no losses, units behind several positions."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.subspaces import BoundlessDAS, SitePairs, illusion_report, orthonormal
from circuitvision.subspaces import das as module
from circuitvision.subspaces.behind import UnitsBehind
from circuitvision.subspaces.fitting import hardened
from tests.subspaces.common import DOUBLE, pairs_of

SITE = "vision.blocks.0.hook_resid_post"


def test_a_boundless_step_has_the_loss_and_gradients_of_plain_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Column i is swapped with weight m_i by a torch hook on the block in front of the site."""
    model, pairs = pairs_of("vit", count=6)
    taken: dict[str, Any] = {}
    fit = module.fit_boundless

    def caught(objective: Any, *args: Any, **options: Any) -> Any:
        taken["objective"] = objective
        start = orthonormal(torch.randn(args[0], args[1], generator=torch.Generator().manual_seed(2), dtype=DOUBLE))
        basis, mask = start.clone().requires_grad_(), torch.tensor([1.0, 0.7, 0.1], dtype=DOUBLE, requires_grad=True)
        loss = objective(basis, mask, 0)
        taken["found"] = (start, loss.detach(), *torch.autograd.grad(loss, [basis, mask]))
        return fit(objective, *args, **options)

    monkeypatch.setattr(module, "fit_boundless", caught)
    held: list[Any] = []
    init = SitePairs.__init__

    def kept(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        held.append(self)

    monkeypatch.setattr(SitePairs, "__init__", kept)
    search = BoundlessDAS(3, SITE, positions=0, penalty=0.5)
    result = search.fit(model, pairs, epochs=1, progress=False)
    learned = held[0]
    (part,) = learned.parts
    start, loss, to_basis, to_mask = taken["found"]
    block, outputs = model.vision.blocks[0].module, []
    handle = block.register_forward_hook(lambda _, __, out: outputs.append(out) or None)
    with torch.no_grad():
        for inputs in (part.inputs, part.batch.other):
            model.module(**inputs)
    handle.remove()
    base, source = (out[0] if isinstance(out, tuple) else out for out in outputs)
    basis, mask = start.clone().requires_grad_(), torch.tensor([1.0, 0.7, 0.1], dtype=DOUBLE, requires_grad=True)

    def patched(_: Any, __: Any, out: Any) -> Any:
        new = base.clone()
        new[:, 0] = base[:, 0] + (((source - base)[:, 0] @ basis) * mask) @ basis.T
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = block.register_forward_hook(patched)
    logits = model.module(**part.inputs).logits
    handle.remove()
    wanted = torch.nn.functional.cross_entropy(logits, torch.tensor(list(part.batch.foils)))
    torch.testing.assert_close(loss, wanted.detach())
    for found, own in zip((to_basis, to_mask), torch.autograd.grad(wanted, [basis, mask]), strict=True):
        torch.testing.assert_close(found, own)
        assert float(own.abs().max()) > 1e-6
    assert 1 <= result.k <= 3


def test_the_hardened_mask_is_the_limit_of_the_soft_one() -> None:
    for columns in (1, 3, 8):
        for boundary in (0.01, 0.2, 0.49, 0.63, 1.0):
            places = torch.arange(columns, dtype=DOUBLE) + 0.5
            soft = torch.sigmoid((boundary * columns - places) / 1e-9).round()
            # One column always counts.
            soft[0] = 1.0
            assert torch.equal(hardened(columns, boundary), soft)


def test_the_loss_of_yes_or_no_classes_wants_the_foil_and_not_the_answer() -> None:
    model, pairs = pairs_of("siglip")
    assert model.link == "sigmoid"
    with SitePairs(model, pairs, SITE, positions=0, allow_wrong=True) as data:
        part = data.parts[0]
        rows = part.base_rows.detach().clone().requires_grad_()
        loss = data.loss(part, rows)
        (gradient,) = torch.autograd.grad(loss, rows)
        answers, foils = (torch.tensor(list(each)) for each in (part.batch.answers, part.batch.foils))
        probability = rows.detach().double().sigmoid()
        count = torch.arange(len(rows))
        yes, no = probability[count, foils], 1 - probability[count, answers]
        torch.testing.assert_close(loss.detach().double(), -(yes.log() + no.log()).mean())
        wanted = torch.zeros_like(probability)
        wanted[count, foils] -= (1 - yes) / len(rows)
        wanted[count, answers] += (1 - no) / len(rows)
        torch.testing.assert_close(gradient.double(), wanted)


def test_attention_entries_behind_several_positions_are_held_as_plain_pytorch_would() -> None:
    model, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    places = [0, 2]
    with SitePairs(model, pairs, SITE, positions=places, joint=True, allow_wrong=True) as data:
        units = UnitsBehind(data)
        units.units = [one for one in units.units if one.kind == "attention"][:1]
        site = units.sites[0]
        free = units.read(data.source)
        low, high = torch.zeros(free.shape[1], dtype=DOUBLE), torch.full((free.shape[1],), 0.05, dtype=DOUBLE)
        assert bool((free > high).any())
        (part,) = data.parts
        mask = torch.zeros(part.moved.shape[:2], dtype=torch.bool)
        mask[:, places] = True

        def write(value: torch.Tensor, hook: Any) -> torch.Tensor:
            value = value.clone()
            value[:, :, places] = value[:, :, places].clamp(0, 0.05)
            return value

        put = [(data.site, lambda value, hook: part.moved.where(mask[..., None], value)), (site, write)]
        wanted = logit_diff(0, 1)(model.run_with_hooks(part.inputs, fwd_hooks=put), part.inputs).detach()
        torch.testing.assert_close(units.clamped(data.source, low, high), wanted)


def test_a_report_on_several_positions_at_once_has_units_and_lets_wrong_pairs_in_when_told() -> None:
    model, pairs = pairs_of("vit", count=6)
    # The clean run says what the pairs call the foil.
    _, pairs = pairs_of("vit", count=6, answers=list(pairs.foils), foils=list(pairs.answers))
    basis = torch.randn(2 * model.vision.cfg.d_model, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    asked = {"positions": [0, 2], "joint": True, "controls": False, "units": True, "progress": False}
    with pytest.raises(InputError, match="allow_wrong"):
        illusion_report(model, pairs, SITE, basis, **asked)
    assert model.engine.handles == []

    def metric(logits: torch.Tensor, inputs: Any) -> torch.Tensor:
        return logits[:, 0]

    found = illusion_report(model, pairs, SITE, basis, allow_wrong=True, metric=metric, **asked)
    assert torch.isfinite(found.effect).all()
    assert model.engine.handles == []

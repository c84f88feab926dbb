"""The output head: its weights give the model's own output, its gradients are those of the read-out, and mutants of both are noticed."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision.errors import InputError, UnknownAttributeError
from circuitvision.model.columns import Columns
from circuitvision.model.norms import Norm
from circuitvision.model.output_head import OutputHead
from tests.readout.common import NAMES, run
from tests.zoo import case

Check = Callable[[str], None]
EXACT: dict[str, Any] = {"atol": 1e-10, "rtol": 1e-10}
TWO = {"cls+mean_patch": ("cls", "patch"), "cls+distillation": ("cls", "distillation")}


def heads(name: str) -> list[tuple[OutputHead, Tensor, Tensor]]:
    """The heads that the output of a float64 run comes from, with the final residual and the output by their own rows."""
    model, out, cache = run(name, torch.float64)
    found = []
    for key, tower in model.towers.items():
        head = tower.output_head.in_run(cache)
        if head.kind == "hidden" or tower.reader is not tower or tower.feeds_cache:
            continue
        resid = cache[f"{key}.blocks.{tower.cfg.n_layers - 1}.hook_resid_post"]
        found.append((head, resid, out.T if head.kind == "images" else out))
    return found


def own_columns(head: OutputHead) -> tuple[OutputHead, Any]:
    """A head with columns that it has by itself, and two of them: embeddings to compare with, for a dual encoder."""
    if not head.compares:
        return head, {"first": 0, "second": 1}
    texts = torch.randn(2, head.width, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    return head.in_run(head.context, against=texts / texts.norm(dim=-1, keepdim=True)), texts


def read_at(head: OutputHead, resid: Tensor) -> Tensor | None:
    """One position of every row, where the family does not pool."""
    at = torch.zeros(resid.shape[:2], dtype=torch.bool)
    at[:, -1] = True
    return None if head.pools else at


# -- weights -------------------------------------------------------------------------------------------------------------------------------


def check_columns(name: str) -> None:
    """Σ_part x_part · weight(part) + bias is the model's output before its soft cap; of a dual encoder the cosine times the embedding's length."""
    for head, resid, out in heads(name):
        if head.table.pool == "attention":
            continue
        head, targets = own_columns(head)
        parts = TWO.get(head.table.pool, (None,))
        found = head.columns(targets)
        with torch.no_grad():
            x = head.pooled(resid)
            pieces = x.flatten(1).chunk(2, dim=-1) if len(parts) == 2 else [x]
            weights = [found.weight(part)[:, 0] for part in parts]
            products = [piece @ weight.T for piece, weight in zip(pieces, weights, strict=True)]
            said = torch.stack(products).sum(0) + found.bias()[:, 0]
            expected = out[..., :2]
            if head.compares:
                embedding = head.embedding(resid)
                expected = embedding @ (targets / targets.norm(dim=-1, keepdim=True)).T
                scaled = expected / embedding.norm(dim=-1, keepdim=True) * head.tower.module.logit_scale.exp()
                scaled = scaled + getattr(head.tower.module, "logit_bias", 0.0)
                torch.testing.assert_close(head.logits(resid), scaled, **EXACT)
        torch.testing.assert_close(head.cap(said), expected, **EXACT)
        if not head.compares:
            difference = head.columns((0, 1))
            torch.testing.assert_close(difference.weight(parts[0])[0], weights[0][:1] - weights[0][1:], **EXACT)
            torch.testing.assert_close(difference.bias()[0], found.bias()[0] - found.bias()[1], **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_the_weights_of_columns_give_the_models_output(name: str) -> None:
    check_columns(name)


@pytest.mark.parametrize(
    "name", ["vit", "dinov2", "deit-teacher", "clip", "siglip", "paligemma", "pi0", "llava-clip-llama"]
)
def test_chunks_and_chosen_columns_are_those_of_the_matrix(name: str) -> None:
    model = run(name, torch.float64)[0]
    for tower in model.towers.values():
        head = tower.output_head
        if tower.connector is not None and head.linear_projector is None:
            continue
        part = "value_path" if head.table.pool == "attention" else None
        for gain in (False, True):
            whole = head.matrix(part, gain=gain)
            chunks = list(head.chunks(5, part, gain=gain))
            assert {chunk.shape[1] for _, chunk in chunks[:-1]} <= {5}
            torch.testing.assert_close(torch.cat([chunk for _, chunk in chunks], dim=1), whole, **EXACT)
            for at, chunk in chunks:
                torch.testing.assert_close(chunk, whole[:, at], **EXACT)
            torch.testing.assert_close(
                head.matrix(part, gain=gain, columns=torch.tensor([3, 0])), whole[:, [3, 0]], **EXACT
            )


def test_the_weights_of_a_module_are_the_modules_own() -> None:
    module = run("vit")[0].module.classifier
    head = run("vit")[0].vision.output_head
    assert head.matrix("W_U").data_ptr() == module.weight.data_ptr()
    assert torch.equal(head.matrix("W_U").T, module.weight)
    assert torch.equal(head.bias(), module.bias)
    clip = run("clip")[0]
    assert torch.equal(clip.vision.output_head.matrix("W_proj").T, clip.module.visual_projection.weight)


def test_clip_is_read_along_normalised_texts_in_the_shared_space() -> None:
    model = run("clip", torch.float64)[0]
    text = torch.randn(3, model.vision.output_head.width, dtype=torch.float64)
    found = model.vision.output_head.columns(text)
    torch.testing.assert_close(found.against, nn.functional.normalize(text, dim=-1), **EXACT)
    along = nn.functional.normalize(text, dim=-1) @ model.module.visual_projection.weight
    torch.testing.assert_close(found.weight()[:, 0], along, **EXACT)


def test_two_heads_are_averaged() -> None:
    (head, resid, out) = heads("deit-teacher")[0]
    module: Any = head.tower.module
    x = module.deit.layernorm(resid)
    by_hand = (module.cls_classifier(x[:, 0]) + module.distillation_classifier(x[:, 1])) / 2
    torch.testing.assert_close(head.read(resid), by_hand, **EXACT)
    torch.testing.assert_close(out, by_hand, **EXACT)
    both = (module.cls_classifier.bias + module.distillation_classifier.bias) / 2
    torch.testing.assert_close(head.bias(), both, **EXACT)
    assert head.weight_name is None


def test_a_soft_cap_keeps_the_order_and_the_bound() -> None:
    model = run("paligemma2", torch.float64)[0]
    head, cap = model.language.output_head, model.language.config.final_logit_softcapping
    logits = torch.linspace(-5 * cap, 5 * cap, 101, dtype=torch.float64)
    capped = head.cap(logits)
    if torch.equal(capped, logits):
        pytest.skip("this version of transformers leaves the logits of PaliGemma 2 uncapped")
    assert bool((capped.diff() > 0).all())
    assert float(capped.abs().max()) < cap
    assert torch.equal(head.in_run(None, capped=False).cap(logits), logits)


def test_several_tokens_are_the_mean_of_theirs_and_have_no_joint_weight() -> None:
    head = run("paligemma", torch.float64)[0].language.output_head
    ids = torch.tensor([[[3, 5]], [[4, -1]]])
    found = Columns(["a b", "c"], ids, head, "mean")
    table = head.matrix().T
    torch.testing.assert_close(found.weight()[:, 0], torch.stack([(table[3] + table[5]) / 2, table[4]]), **EXACT)
    with pytest.raises(InputError, match="joint"):
        Columns(["a b"], ids[:1], head, "joint").weight()


def test_names_outlive_the_variable_that_held_the_wrapper() -> None:
    module = case("vit").build()
    found = _named(module)
    gc.collect()
    assert found.label(1) == module.config.id2label[1]
    assert found.find([module.config.id2label[2]]) == [2]


def _named(module: nn.Module) -> cv.Unembedding:
    model = cv.HookedModel(module)
    return cv.readout.unembedding_matrix(model.vision)


# -- gradients -----------------------------------------------------------------------------------------------------------------------------


class Held:
    """A final norm by hand, divided by what it divides by at the value itself, through which no gradient passes."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm = Norm(norm)
        self.weight: Any = norm.weight
        self.shift: Any = getattr(norm, "bias", None)

    def __call__(self, value: Tensor) -> Tensor:
        spec, module = self.norm.spec, self.norm.module
        centred = value - value.mean(-1, keepdim=True) if spec.centred else value
        root = (centred.detach().pow(2).mean(-1, keepdim=True) + getattr(module, spec.eps)).sqrt()
        out = centred / root * (spec.offset + self.weight)
        return out if self.shift is None else out + self.shift


def by_autograd(head: OutputHead, resid: Tensor, weights: Tensor, at: Tensor | None) -> Tensor:
    """The gradient of ``tower.readout`` at the positions read; of a dual encoder's texts their own rows."""
    tracked = resid.clone().requires_grad_(True)
    out = head.tower.readout(tracked, context=head.context)
    out = out.T if head.kind == "images" else out
    out = out if at is None else out[:, -1]
    (gradient,) = torch.autograd.grad((out * weights).sum(), tracked)
    return gradient


def check_gradients(name: str) -> None:
    """``norm="own"`` is autograd through the read-out; frozen that with the denominators held by hand, and exact: g·resid + constant = value."""
    for head, resid, out in heads(name):
        at = read_at(head, resid)
        size = out.shape[-1]
        weights = torch.randn(size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
        free = head.gradient(weights, resid, at, norm="own")
        torch.testing.assert_close(free.gradient, by_autograd(head, resid, weights, at), **EXACT)
        said = out if at is None else out[:, -1]
        torch.testing.assert_close(free.value, (said * weights).sum(-1), atol=1e-6, rtol=1e-6)
        frozen = head.gradient(weights, resid, at)
        other = 0.9 * resid + 0.1 * resid.roll(1, 0)
        with torch.no_grad():
            held = head.in_run(head.context, norm="frozen", reference=resid, capped=False)
            there = held.logits(other) if at is None else held.positions(other, 0, resid)[:, -1]
        predicted = (frozen.gradient * other).flatten(1).sum(-1) + frozen.constant
        torch.testing.assert_close(predicted, (there * weights).sum(-1), **EXACT)
        if head.compares or head.table.pool == "attention" or head.tower.final_norm is None:
            continue
        with pytest.MonkeyPatch.context() as held_by_hand:
            held_by_hand.setattr(head.tower, "final_norm", Held(head.tower.final_norm))
            held_by_hand.setattr("circuitvision.model.head_forward._caps_logits", lambda tower: False)
            torch.testing.assert_close(frozen.gradient, by_autograd(head, resid, weights, at), **EXACT)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_the_read_out(name: str) -> None:
    check_gradients(name)


def check_known_gradient(name: str) -> None:
    """At the position that is read: weight (with the norm's gain) / denominator; elsewhere zero."""
    head, resid, _ = heads(name)[-1]
    at = read_at(head, resid)
    found = head.gradient(head.columns((1, 0)), resid, at)
    position = -1 if at is not None else 0
    denominator = Norm(head.tower.final_norm).denominator(resid[:, position])
    weight = head.columns((1, 0)).weight(gain=True)[0, 0]
    torch.testing.assert_close(found.gradient[:, position], weight / denominator, **EXACT)
    rest = found.gradient.clone()
    rest[:, position] = 0
    assert not rest.any()


@pytest.mark.parametrize("name", ["vit", "paligemma2", "llava-clip-llama", "pi0"])
def test_a_gradient_is_the_columns_weight_over_the_denominator(name: str) -> None:
    check_known_gradient(name)


def test_patches_behind_a_linear_projector_reach_the_language_towers_columns() -> None:
    model, _, cache = run("paligemma", torch.float64)
    tower = model.vision
    resid = cache[tower.residual_name(tower.cfg.n_layers)]
    head = tower.output_head.in_run(cache)
    found = head.gradient(head.columns(7), resid, read_at(tower.output_head, resid))
    entering = head.projected(resid)[:, -1]
    inner = Norm(model.language.final_norm)
    back = inner.transposed(model.language.W_U[:, 7].expand_as(entering), inner.denominator(entering))
    outer = Norm(tower.final_norm)
    by_hand = outer.transposed(back @ head.linear_projector.weight, outer.denominator(resid[:, -1]))
    torch.testing.assert_close(found.gradient[:, -1], by_hand, **EXACT)


# -- mistakes, and mutants -----------------------------------------------------------------------------------------------------------------


def test_what_cannot_be_read_is_refused() -> None:
    vit, clip, llava = run("vit")[0], run("clip")[0], run("llava-clip-llama")[0]
    resid = torch.zeros(2, 17, vit.vision.cfg.d_model)
    with pytest.raises(InputError, match="part"):
        vit.vision.output_head.matrix("patch")
    with pytest.raises(UnknownAttributeError, match="W_proj"):
        vit.vision.output_head.matrix("W_proj")
    with pytest.raises(InputError, match="not linear"):
        llava.vision.output_head.matrix()
    with pytest.raises(InputError, match="value_path"):
        run("siglip")[0].vision.output_head.matrix()
    with pytest.raises(InputError, match="at="):
        llava.language.output_head.gradient(torch.ones(1), torch.zeros(1, 3, llava.language.cfg.d_model))
    with pytest.raises(InputError, match="at="):
        vit.vision.output_head.gradient(torch.ones(1), resid, torch.ones(2, 17, dtype=torch.bool))
    with pytest.raises(InputError, match="reference"):
        vit.vision.output_head.in_run(None, norm="frozen")
    with pytest.raises(InputError, match="prompts"):
        clip.vision.output_head.columns(0).weight()
    with pytest.raises(InputError, match="directions"):
        run("vit-headless")[0].vision.output_head.columns(0)
    with pytest.raises(InputError, match="not"):
        vit.vision.output_head.columns(torch.zeros(2, 3))


def twice(patch: pytest.MonkeyPatch) -> None:
    right = OutputHead._norm
    patch.setattr(OutputHead, "_norm", lambda self, value, held: right(self, right(self, value, held), held))


def nothing_held(patch: pytest.MonkeyPatch) -> None:
    right = OutputHead._norm
    patch.setattr(OutputHead, "_norm", lambda self, value, held: right(self, value, None))


def no_gain(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OutputHead, "before_norm", lambda self, weight: weight)


def no_bias(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OutputHead, "bias", lambda self, columns=slice(None): None)


def parts_swapped(patch: pytest.MonkeyPatch) -> None:
    right = OutputHead.part
    other = {"cls": "patch", "patch": "cls"}
    patch.setattr(OutputHead, "part", lambda self, part: other.get(right(self, part), right(self, part)))


def no_length(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("circuitvision.model.head_forward._unit", lambda embedding, measured: embedding)


def one_head(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(OutputHead, "_second_head", property(lambda self: self.module))


MUTANTS: list[tuple[Callable[[pytest.MonkeyPatch], None], Check, str]] = [
    (twice, check_columns, "vit"),
    (twice, check_gradients, "llava-clip-llama"),
    (nothing_held, check_gradients, "vit"),
    (nothing_held, check_known_gradient, "paligemma2"),
    (no_gain, check_known_gradient, "vit"),
    (no_bias, check_columns, "vit"),
    (parts_swapped, check_columns, "dinov2"),
    (no_length, check_columns, "clip"),
    (one_head, check_columns, "deit-teacher"),
]


@pytest.mark.parametrize(("mutate", "check", "name"), MUTANTS, ids=lambda value: getattr(value, "__name__", str(value)))
def test_a_mutant_is_noticed(
    mutate: Callable[[pytest.MonkeyPatch], None], check: Check, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    check(name)
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check(name)

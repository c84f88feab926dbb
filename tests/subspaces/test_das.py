"""Distributed alignment search on models: it equals plain PyTorch, pays only for what lies behind the site, and refuses what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import InputError
from circuitvision.subspaces import DAS, BoundlessDAS, CouplingMap, DASResult, SitePairs, orthonormal, reinitialised
from circuitvision.subspaces.claims import interchanges
from circuitvision.subspaces.controls import permuted, split
from circuitvision.subspaces.das import PERMUTED, REINITIALISED
from circuitvision.subspaces.fitting import OrthonormalBasis
from circuitvision.subspaces.training import Options, Schedule
from tests.subspaces.common import DOUBLE, acting, pairs_of

SITE = "vision.blocks.1.hook_resid_pre"


@pytest.fixture(scope="module")
def shapes() -> Any:
    model = cv.organisms.load("shapes-vit")
    with cv.progress.verbosity("quiet"):
        return model, cv.organisms.pairs("shapes-vit", 60, seed=3).answered(model)


@pytest.fixture(scope="module")
def found(shapes: Any) -> DASResult:
    model, pairs = shapes
    return DAS(4, "vision.blocks.2.hook_resid_pre", positions=0).fit(
        model, pairs, epochs=4, rate=0.1, batch_size=15, seeds=(0, 1), control=True, progress=False
    )


# -- the result --------------------------------------------------------------------------------------------------------------------------------


def test_the_answer_of_a_trained_model_lies_in_few_dimensions_of_its_stream(found: DASResult) -> None:
    assert found.axes["intervention"] == ["subspace", "full", "residual"]
    assert found.ceiling == 1.0
    assert found.accuracy() > 0.7
    assert found.accuracy() - found.selectivity == pytest.approx(float(found.control.mean(-1).max()))
    assert found.controls == [REINITIALISED, PERMUTED]
    low, high = found.accuracy_interval()
    assert low < found.accuracy() <= high
    assert float(found.effect[1]) == pytest.approx(float(found.effect[2]), abs=0.1)


def test_columns_are_orthonormal_and_the_edit_repeats_what_was_measured(found: DASResult, shapes: Any) -> None:
    model, pairs = shapes
    assert float((found.basis.T @ found.basis - torch.eye(4, dtype=DOUBLE)).abs().max()) < 1e-6
    held = pairs.at(found.examples)
    with SitePairs(model, held, found.site, positions=0) as data:
        again = data.under(found.basis)
    torch.testing.assert_close(again.difference, found.logit_diff[0], rtol=1e-4, atol=1e-4)
    assert again.two_way.tolist() == found.two_way[0].tolist()


def test_what_was_trained_on_is_not_what_it_is_scored_on(found: DASResult) -> None:
    assert not set(found.train) & set(found.examples)
    assert found.loss.shape[0] == found.reported.shape[0] == found.by_seed.shape[0] == 2
    assert found.reported.shape[1] == len(found.reported_at)
    assert found.reported_at[-1] == 4
    assert torch.equal(found.reported[:, -1], found.by_seed)
    assert float(found.loss[:, -1].mean()) < float(found.loss[:, 0].mean())


def test_it_is_saved_and_read_back(found: DASResult, tmp_path: Any) -> None:
    found.save(tmp_path / "das.npz")
    again = cv.load(tmp_path / "das.npz")
    torch.testing.assert_close(again.basis, found.basis)
    assert again.selectivity == found.selectivity
    assert len(found.to_frame()) == found.values.numel()
    with pytest.raises(InputError):
        found.component_scores()


def test_the_same_seed_gives_the_same_subspace(shapes: Any) -> None:
    model, pairs = shapes
    search = DAS(1, "vision.blocks.2.hook_resid_pre", positions=0)
    one, two = (search.fit(model, pairs[:20], epochs=1, progress=False) for _ in range(2))
    assert torch.equal(one.basis, two.basis)
    other = search.fit(model, pairs[:20], epochs=1, seeds=5, progress=False)
    assert not torch.allclose(one.basis, other.basis)


def test_boundless_search_reports_a_hardened_mask(shapes: Any) -> None:
    model, pairs = shapes
    search = BoundlessDAS(8, "vision.blocks.2.hook_resid_pre", positions=0, penalty=0.5)
    found = search.fit(model, pairs[:40], epochs=4, rate=0.05, progress=False)
    assert 1 <= found.k <= 8
    assert found.basis.shape == (64, found.k)
    with SitePairs(model, pairs.at(found.examples), found.site, positions=0) as data:
        assert data.under(found.basis).accuracy.tolist() == found.values[0].tolist()


def test_a_non_linear_map_needs_its_controls_and_gets_them(shapes: Any) -> None:
    model, pairs = shapes
    search = DAS(4, "vision.blocks.2.hook_resid_pre", positions=0, map=CouplingMap)
    with pytest.raises(InputError, match="control"):
        search.fit(model, pairs)
    found = search.fit(model, pairs[:30], epochs=2, control=True, progress=False)
    assert found.map_class == "CouplingMap"
    assert found.n_parameters > 64 * 64
    assert found.control.shape == (2, len(found.examples))


def test_a_coupling_map_is_invertible() -> None:
    made = CouplingMap(7, seed=3).double()
    x = torch.randn(5, 7, dtype=DOUBLE)
    torch.testing.assert_close(made.inverse(made(x)), x)
    assert not torch.allclose(made(x), x @ made.rotation.weight)


# -- training ----------------------------------------------------------------------------------------------------------------------------------


def test_a_step_has_the_gradient_of_plain_pytorch() -> None:
    """The oracle: a forward hook of torch on the block in front of the site."""
    model, pairs = pairs_of("vit")
    start = orthonormal(
        torch.randn(model.vision.cfg.d_model, 2, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    )
    basis = start.clone().requires_grad_()
    with SitePairs(model, pairs, SITE, positions=0, allow_wrong=True) as data:
        (part,) = data.parts
        rows = data._rows(part.run([data.projection(part, basis)]), part.inputs, part.batch)
        (gradient,) = torch.autograd.grad(data.loss(part, rows), basis)

    block, held = model.vision.blocks[0].module, []
    handle = block.register_forward_hook(lambda module, args, out: held.append(out) or None)
    for inputs in (part.inputs, part.batch.other):
        model.module(**inputs)
    handle.remove()
    base, source = (out[0] if isinstance(out, tuple) else out for out in held)
    other = start.clone().requires_grad_()

    def patched(module: Any, args: Any, out: Any) -> Any:
        columns = torch.linalg.qr(other)[0]
        new = base.detach().clone()
        new[:, 0] = new[:, 0] + ((source - base).detach()[:, 0] @ columns) @ columns.T
        return (new, *out[1:]) if isinstance(out, tuple) else new

    handle = block.register_forward_hook(patched)
    logits = model.module(**part.inputs).logits
    handle.remove()
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(list(pairs.foils)))
    (wanted,) = torch.autograd.grad(loss, other)
    torch.testing.assert_close(gradient, wanted)


def test_a_step_computes_only_what_lies_behind_the_site() -> None:
    model, pairs = pairs_of("llava-clip-llama", answers=[0, 0, 0, 0], foils=[1, 1, 1, 1])
    calls = {0: 0, 1: 0}
    handles = [
        model.language.blocks[layer].attn.output.register_forward_hook(
            lambda *_, layer=layer: calls.__setitem__(layer, calls[layer] + 1)
        )
        for layer in calls
    ]
    try:
        with SitePairs(model, pairs, "language.blocks.1.hook_resid_pre", positions="last", allow_wrong=True) as data:
            before = dict(calls)
            (part,) = data.parts
            for seed in range(3):
                basis = torch.randn(
                    data.width, 1, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE, requires_grad=True
                )
                data.loss(
                    part, data._rows(part.run([data.projection(part, basis)]), part.inputs, part.batch)
                ).backward()
            assert calls == {0: before[0], 1: before[1] + 3}
    finally:
        for handle in handles:
            handle.remove()


def test_every_epoch_sees_all_batches_in_an_order_of_its_own() -> None:
    model, pairs = pairs_of("vit", count=8, answers=[0, 1] * 4, foils=[1, 0] * 4)
    with SitePairs(model, pairs, SITE, positions=0, allow_wrong=True, batch_size=1) as data:
        schedule = Schedule(data, data, 3, Options(3, 0.1, 0.0, 1, False))
        with schedule:
            seen = [schedule.part(step).first for step in range(schedule.steps)]
        with Schedule(data, data, 3, Options(3, 0.1, 0.0, 1, False)) as again:
            assert [again.part(step).first for step in range(8, 24)] == seen[8:]
    epochs = [tuple(seen[first : first + 8]) for first in (0, 8, 16)]
    assert all(sorted(one) == list(range(8)) for one in epochs)
    assert len(set(epochs)) == 3


PLACES = [
    ("dinov2-swiglu", "vision.blocks.0.attn.hook_z", None, [1]),
    ("clip", "vision.blocks.1.hook_resid_pre", 0, None),
    ("llava-clip-llama", "projector.hook_out", None, None),
    ("paligemma", "language.blocks.0.hook_resid_post", "last", None),
]


@pytest.mark.parametrize(("name", "site", "positions", "heads"), PLACES)
@pytest.mark.parametrize("keep", [True, False])
def test_every_tower_can_be_searched(name: str, site: str, positions: Any, heads: Any, keep: bool) -> None:
    model, pairs = pairs_of(name, answers=[0, 0, 0, 0], foils=[1, 1, 1, 1])
    found = DAS(1, site, positions=positions, heads=heads).fit(
        model, pairs, epochs=2, batch_size=2, held_out=0.5, allow_wrong=True, keep=keep, progress=False
    )
    assert found.values.shape[1] == 2
    assert torch.isfinite(found.logit_diff).all()
    assert (model.engine.handles, model.engine.stack) == ([], [])


def test_a_policy_is_searched_by_its_metric() -> None:
    model, pairs = acting()
    search = DAS(2, "action.blocks.0.hook_resid_post", metric=cv.metrics.action_dim(0))
    found = search.fit(model, pairs, epochs=3, batch_size=2, held_out=0.5, rate=0.05, progress=False)
    assert float(found.loss[0, -1]) < float(found.loss[0, 0])


def test_bfloat16_models_are_searched_in_their_own_numbers() -> None:
    model, pairs = pairs_of("vit", dtype=torch.bfloat16, answers=[0, 0, 0, 0], foils=[1, 1, 1, 1])
    found = DAS(1, SITE, positions=0).fit(model, pairs, epochs=2, held_out=0.5, allow_wrong=True, progress=False)
    assert torch.isfinite(found.logit_diff).all()
    assert float(found.basis.norm()) == pytest.approx(1.0, abs=1e-5)


# -- controls ----------------------------------------------------------------------------------------------------------------------------------


def test_a_reinitialised_copy_has_the_same_weights_elsewhere() -> None:
    model, _ = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    copy, part = reinitialised(model, 1), reinitialised(model, 1, "vision.blocks.1.mlp.hook_post")
    one, two, three = (found.vision.blocks[1].W_in for found in (model, copy, part))
    assert not torch.equal(one, two)
    assert not torch.equal(one, three)
    torch.testing.assert_close(one.flatten().sort()[0], two.flatten().sort()[0])
    assert torch.equal(model.vision.blocks[0].W_in, part.vision.blocks[0].W_in)
    assert torch.equal(model.vision.blocks[1].W_Q, part.vision.blocks[1].W_Q)


def test_permuted_labels_are_the_same_labels_elsewhere() -> None:
    labels = list(range(9))
    found = permuted(labels, 1)
    assert sorted(found) == labels
    assert all(one != other for one, other in zip(found, labels, strict=True))


def test_groups_are_never_on_both_sides() -> None:
    _, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4, groups=["a", "a", "b", "b"])
    for seed in range(4):
        train, test = split(pairs, 0.25, seed)
        assert not set(train.groups or ()) & set(test.groups or ())
        assert len(train) == len(test) == 2


# -- what cannot be meant ----------------------------------------------------------------------------------------------------------------------


def refused(search: DAS, match: str, model: Any = None, pairs: Any = None, **options: Any) -> None:
    own, of_own = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    model = own if model is None else model
    trained = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DAS, "_train", lambda *_, **__: trained.append(1))
        with pytest.raises(InputError, match=match):
            search.fit(model, of_own if pairs is None else pairs, **{"allow_wrong": True, "progress": False, **options})
    assert not trained
    assert (model.engine.handles, model.engine.stack) == ([], [])


def test_more_dimensions_than_pairs_or_coordinates() -> None:
    refused(DAS(4, SITE), "training pairs")
    refused(DAS(0, SITE), "dimensions")
    model, pairs = pairs_of("vit", count=4, answers=[0] * 4, foils=[1] * 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DAS, "_check_count", lambda *_: None)
        refused(DAS(10_000, SITE), "coordinates", model, pairs)


def test_a_site_that_the_output_cannot_depend_on() -> None:
    model, _ = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    last = model.vision.cfg.n_layers - 1
    refused(DAS(1, f"vision.blocks.{last}.hook_resid_post", positions=2), "depend")
    llava, of_llava = pairs_of("llava-clip-llama", answers=[0] * 4, foils=[1] * 4)
    last = llava.vision.cfg.n_layers - 1
    refused(DAS(1, f"vision.blocks.{last}.hook_resid_post"), "depend", llava, of_llava)


def test_texts_of_a_dual_encoder_are_no_examples() -> None:
    clip, of_clip = pairs_of("clip", answers=[0] * 4, foils=[1] * 4)
    refused(DAS(1, "text.blocks.0.hook_resid_post"), "no examples", clip, of_clip)


def test_as_many_dimensions_as_the_site_has_are_all_of_it() -> None:
    model, pairs = pairs_of("vit", count=8, answers=[0, 1] * 4, foils=[1, 0] * 4)
    search = DAS(model.vision.cfg.d_head, "vision.blocks.0.attn.hook_z", positions=0, heads=1)
    found = search.fit(model, pairs, epochs=1, allow_wrong=True, progress=False)
    torch.testing.assert_close(found.logit_diff[0], found.logit_diff[1])


GQA = [
    ("action.blocks.0.attn.hook_z", [0, 1], None), ("language.blocks.0.attn.hook_k", None, 0), ("language.blocks.0.attn.hook_v", [0], 0),
    ("action.blocks.1.mlp.hook_post", None, None), ("vision.blocks.0.hook_resid_post", None, None),
]  # fmt: skip


@pytest.mark.parametrize(("site", "heads", "positions"), GQA)
@pytest.mark.parametrize("joint", [False, True])
def test_every_tower_of_a_policy_with_shared_keys_is_searched(
    site: str, heads: Any, positions: Any, joint: bool
) -> None:
    model, pairs = acting(count=6)
    search = DAS(2, site, heads=heads, positions=positions, metric=cv.metrics.action_dim(0), joint=joint)
    found = search.fit(model, pairs, epochs=1, held_out=0.5, progress=False)
    assert torch.isfinite(found.logit_diff).all()
    assert float((found.basis.T @ found.basis - torch.eye(2, dtype=DOUBLE)).abs().max()) < 1e-6
    assert (model.engine.handles, model.engine.stack) == ([], [])


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_never_what_is_interchanged(side: str) -> None:
    """The value at the last word of each prompt, wherever it stands; the oracle names it by the mask."""
    from tests.sweeps.drawing import inputs_of, model_of

    name, site = "llava-clip-llama", "language.blocks.1.hook_resid_pre"
    model = model_of(name, DOUBLE)
    clean, corrupt = (inputs_of(name, DOUBLE, 3, side, 1, seed) for seed in (0, 1))
    pairs = cv.data.Pairs(inputs=clean, corrupt_inputs=corrupt, answers=0, foils=1)
    with SitePairs(model, pairs, site, positions="last", allow_wrong=True) as data:
        found = []
        for part in data.parts:
            mask = part.inputs["attention_mask"].bool()
            last = [int(row.nonzero().max()) for row in mask]
            found += [(row, position) for row, position in enumerate(last)]
            assert list(zip(*(one.tolist() for one in part.index), strict=True)) == found
            cache = model.run_with_cache(part.inputs, names_filter=site)[1]
            wanted = torch.stack([cache[site][row, position] for row, position in found]).detach()
            torch.testing.assert_close(part.base, wanted)


def test_pairs_that_the_model_gets_wrong() -> None:
    model, pairs = pairs_of("vit")
    _, turned = pairs_of("vit", answers=list(pairs.foils or ()), foils=list(pairs.answers or ()))
    refused(DAS(1, SITE, positions=0), "wrong", model, turned, allow_wrong=False)


def test_pairs_without_answers_or_without_numbers() -> None:
    model, pairs = acting()
    refused(DAS(1, "action.blocks.0.hook_resid_post"), "answers=", model, pairs)
    refused(
        DAS(1, "action.blocks.0.hook_resid_post", metric=lambda out: out.mean()), "one number per example", model, pairs
    )
    refused(DAS(1, SITE), "pairs", pairs={"pixel_values": torch.zeros(1)})


def test_pairs_of_unequal_length_without_a_map() -> None:
    model, pairs = pairs_of("llava-clip-llama", answers=[0] * 4, foils=[1] * 4)
    longer = [
        {**{name: value for name, value in one.tensors.items() if name == "pixel_values"},
         "input_ids": torch.cat([one.tensors["input_ids"], one.tensors["input_ids"][:, -1:]], 1)}
        for one in pairs.corrupt.examples
    ]  # fmt: skip
    shorter = [{name: one.tensors[name] for name in ("pixel_values", "input_ids")} for one in pairs.clean.examples]
    unequal = cv.data.Pairs(inputs=shorter, corrupt_inputs=longer, answers=0, foils=1)
    refused(DAS(1, "language.blocks.1.hook_resid_pre", positions="last"), "one by one", model, unequal)


def test_other_requests_that_cannot_be_meant() -> None:
    refused(DAS(1, "vision.blocks.*.hook_resid_pre"), "matches")
    refused(DAS(1, SITE, heads=[0]), "heads")
    refused(DAS(1, "vision.blocks.0.attn.hook_z", heads=[99]), "Head 99")
    refused(DAS(1, "vision.blocks.0.attn.hook_pattern"), "rotate")
    refused(DAS(1, SITE), "share", held_out=1.5)
    refused(DAS(1, SITE), "epochs", epochs=0)
    refused(DAS(1, SITE), "epochs", epochs=1.5)
    for heads in ([], [0, 0], [1, 1 - pairs_of("vit", answers=[0] * 4, foils=[1] * 4)[0].vision.cfg.n_heads]):
        for joint in (False, True):
            refused(DAS(1, "vision.blocks.0.attn.hook_z", heads=heads, joint=joint), "heads=")
    refused(DAS(1, SITE, map=CouplingMap), "closeness", control=True, closeness=0.5)
    _, pairs = pairs_of("vit", answers=[0] * 4, foils=[1] * 4)
    refused(DAS(1, SITE), "training pairs as well", held_out=pairs[:2])


# -- the figure --------------------------------------------------------------------------------------------------------------------------------


def made(accuracy: float, control: float, ceiling: float = 1.0, count: int = 40) -> DASResult:
    """A result of one accuracy, one of its controls, and one ceiling."""
    right = torch.stack([(torch.arange(count) < share * count).double() for share in (accuracy, ceiling, ceiling)])
    axes = {"intervention": ["subspace", "full", "residual"], "example": list(range(count))}
    beside = (torch.arange(count) < control * count).double().expand(2, count)
    return DASResult(
        right, axes, control=beside, controls=[REINITIALISED, PERMUTED], k=2, site=SITE, train=[99], two_way=right
    )


@pytest.mark.parametrize(
    ("result", "holds"),
    [(made(0.9, 0.1), True), (made(0.9, 0.85), False), (made(0.3, 0.0), False), (made(0.0, 0.0, 0.0), False)],
)
def test_a_title_says_that_it_carries_only_above_controls_and_half_the_ceiling(result: DASResult, holds: bool) -> None:
    told = interchanges(result)
    assert told.holds is holds
    figure = result.plot()
    assert ("carry the answer" in figure.layout.title.text) is holds
    shown = [trace.x[0] for trace in figure.data]
    assert shown == pytest.approx([*result.mean().tolist(), *result.control.mean(-1).tolist()])


# -- closeness ---------------------------------------------------------------------------------------------------------------------------------


def test_closeness_is_the_distance_to_the_mean_of_the_answer_asked_for() -> None:
    """The loss of the first step, beside that without it: the mean of |(h_s − m) V|², with m the mean of both sides' runs that say the foil."""
    model, pairs = pairs_of("vit", answers=[0, 1, 0, 1], foils=[1, 0, 1, 0], groups=list("abcd"))
    weight, options = 0.7, {"epochs": 1, "batch_size": 3, "allow_wrong": True, "held_out": 0.25, "progress": False}
    search = DAS(2, SITE, positions=0)
    without, zero, near = (
        search.fit(model, pairs, **options, **more) for more in ({}, {"closeness": 0.0}, {"closeness": weight})
    )
    assert torch.equal(without.basis, zero.basis)
    basis = OrthonormalBasis(model.vision.cfg.d_model, 2, 0).weight.detach().double()
    with SitePairs(model, pairs.at(near.train), SITE, positions=0, allow_wrong=True) as data:
        answers, foils = data.pairs.answers, data.pairs.foils
        natural, labels = torch.cat([data.base, data.source]), [*(answers or ()), *(foils or ())]
        means = {label: natural[torch.tensor([one == label for one in labels])].mean(0) for label in (0, 1)}
        gap = data.source - torch.stack([means[foil] for foil in foils or ()])
    wanted = weight * float((gap @ basis).square().sum(1).mean())
    assert float(near.loss[0, 0] - without.loss[0, 0]) == pytest.approx(wanted, rel=1e-4)

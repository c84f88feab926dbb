"""Sweeps and prepared runs under a base of edits: equal to runs under the base's edits and the group's, at the price of what the group can change."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

import circuitvision as cv
from circuitvision import edits, regions
from circuitvision.errors import InputError
from circuitvision.incremental import resume, routes
from circuitvision.incremental.resume import Resumer
from circuitvision.model.edits.applying import EditApplier
from circuitvision.model.edits.binding import EditCompiler
from circuitvision.model.sites import SiteName
from tests.sweeps.drawing import edit, inputs_of, metric, model_of, runs
from tests.sweeps.test_engine import counted
from tests.sweeps.test_exactness import assert_close

DOUBLE = torch.float64
SETTINGS = settings(
    deadline=None,
    derandomize=True,
    print_blob=False,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@st.composite
def based(draw: Any, dtype: torch.dtype) -> Any:
    """A run, the edits of a base, groups beside it, and the output of each run under both."""
    model, inputs, source = draw(runs(dtype))
    base: tuple[Any, ...] = ()
    groups, outputs = [], []
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for _ in range(draw(st.sampled_from([1, 2, 3]))):
            more = (*base, edit(draw, model, inputs, source))
            try:
                model.run(inputs, more)
            except InputError:
                continue
            base = more
        for _ in range(draw(st.integers(1, 4))):
            group = tuple(edit(draw, model, inputs, source) for _ in range(draw(st.sampled_from([1, 1, 2]))))
            try:
                model.run(inputs, group)
                outputs.append(model.run(inputs, [*base, *group]))
            except InputError:
                continue
            groups.append(group)
        assume(base)
        assume(groups)
        return model, inputs, base, groups, outputs, model.run(inputs, base)


def check(drawn: Any, tolerance: float, batch_size: Any = "auto") -> None:
    model, inputs, base, groups, outputs, clean = drawn
    told = f"{base}\n{groups}"
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        swept = model.sweep(inputs, groups, metric, batch_size=batch_size, progress=False, base=base)
        naive = torch.stack([metric(output, inputs) for output in outputs])
        found = metric(clean, inputs)
        assert not [plan for plan in swept.plan if plan.in_full], (swept.plan, told)
        assert_close(swept.clean, found, found, tolerance, told)
        assert_close(swept.values, naive, found, tolerance, f"{told}\n{swept.plan}")
        sites = sorted({site for group in groups for edit in group for site in edit.sites(model)})
        with model.prepared(inputs, sites, base=base) as run:
            together = torch.stack([metric(output, inputs) for output in run([list(group) for group in groups])])
            assert "in full" not in run.plan
            assert_close(together, naive, found, tolerance, f"{told}\n{run.plan}")
            if not any(SiteName.parse(site).is_eager for site in sites):
                assert_close(metric(run.output, inputs), found, found, tolerance, told)
    assert (model.engine.handles, model.engine.stack) == ([], [])


@given(based(DOUBLE))
@settings(SETTINGS, max_examples=120)
def test_a_sweep_under_a_base_equals_runs_under_both(drawn: Any) -> None:
    check(drawn, 1e-11)


@given(based(DOUBLE))
@settings(SETTINGS, max_examples=40)
def test_so_does_one_in_batches_of_two(drawn: Any) -> None:
    check(drawn, 1e-11, 2)


@pytest.mark.slow
@given(based(DOUBLE))
@settings(SETTINGS, max_examples=3000)
def test_a_sweep_under_a_base_equals_runs_under_both_thoroughly(drawn: Any) -> None:
    check(drawn, 1e-11)


def setting(name: str, batch: int = 2, padding: str | None = None) -> tuple[cv.HookedModel, Any]:
    return model_of(name, DOUBLE), inputs_of(name, DOUBLE, batch, padding, 1)


def spread(model: cv.HookedModel) -> tuple[list[Any], list[Any]]:
    """A base with edits before, at and behind the places of groups, in every tower, and groups at the ends and inside of blocks."""
    base: list[Any] = []
    for name, tower in model.towers.items():
        vector = torch.linspace(-1, 1, tower.cfg.d_model, dtype=DOUBLE).cos()
        base += [
            edits.add_noise(f"{name}.hook_input", 0.7, seed=3),
            edits.scale(f"{name}.blocks.0.hook_mlp_out", 0.5),
            edits.steer(f"{name}.blocks.1.attn.hook_z", vector[: tower.cfg.d_head], heads=0),
            edits.steer(f"{name}.blocks.1.hook_resid_post", vector),
        ]
    sites = ("hook_resid_pre", "attn.hook_z", "hook_attn_out", "hook_resid_mid", "mlp.hook_post", "hook_resid_post")
    groups = [
        edits.scale(f"{name}.blocks.{layer}.{site}", 0.6, positions=[-2, -1])
        for name in model.towers
        for layer in (0, 1)
        for site in sites
        if not model.is_dead(f"{name}.blocks.{layer}.{site}")
    ]
    last = list(model.towers)[-1]
    return base, [
        *groups,
        [groups[0], groups[-1]],
        edits.scale_attention(last, -1, 0, 0.5, layers=[1], renormalise=False),
    ]


def gap(name: str, batch: int = 2, padding: str | None = None) -> float:
    """The largest difference between a sweep under a base and the loop."""
    model, inputs = setting(name, batch, padding)
    base, groups = spread(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        swept = model.sweep(inputs, groups, metric, base=base, progress=False)
        naive = torch.stack(
            [metric(model.run(inputs, [*base, *(g if isinstance(g, list) else [g])]), inputs) for g in groups]
        )
    return float((swept.values - naive).abs().max() / naive.abs().max())


FAMILIES = ["vit", "clip", "siglip", "llava-clip-llama", "paligemma", "pi0"]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spread_of_edits_under_a_base_is_exact(name: str) -> None:
    assert gap(name) < 1e-12


def acts_once(self: EditApplier, value: Tensor, hook: Any) -> Any:
    """Leave the base out wherever several groups share a run."""
    before = self.base
    self.base = type(before)(()) if len(self.groups) > 1 else before
    try:
        return WRITE(self, value, hook)
    finally:
        self.base = before


def unedited(compiler: EditCompiler) -> Any:
    """Leave the base out of the recorded run."""
    return contextlib.nullcontext({(site, 0): 2 for site in compiler.base.sites})


WRITE = EditApplier._hook
MUTANTS = {
    "the base does not act again": lambda patch: patch.setattr(EditApplier, "_hook", acts_once),
    "the recorded run is unedited": lambda patch: patch.setattr(resume, "edited", unedited),
    "an edited argument is edited twice": lambda patch: patch.setattr(
        routes, "start_under", lambda model, start, base: start
    ),
}


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_broken_base_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MUTANTS[mutant](monkeypatch)
    assert gap("vit") > 1e-3


def test_a_group_costs_what_it_can_change_and_the_base_is_run_once() -> None:
    model, inputs = setting("llava-clip-llama")
    length = inputs["input_ids"].shape[1]
    base = [
        edits.add_noise("language.hook_input", 1.0, positions="patch"),
        edits.scale("vision.blocks.0.hook_mlp_out", 0.5),
        edits.ablate("language.blocks.1.hook_mlp_out", positions=[-1]),
    ]
    group = edits.scale("language.blocks.1.hook_resid_mid", 0.5, positions=length - 2)
    with counted(model) as attention, counted(model, "mlp_in") as mlp:
        swept = model.sweep(inputs, [group], metric, base=base, progress=False)
    assert {key: len(calls) for key, calls in attention.items()} == dict.fromkeys(attention, 1)
    assert {key: len(calls) for key, calls in mlp.items() if len(calls) > 1} == {"language.1": 2}
    assert mlp["language.1"][1][:2] == (2, 2)
    with torch.no_grad():
        torch.testing.assert_close(
            swept.values[0], metric(model.run(inputs, [*base, group]), inputs), rtol=1e-12, atol=1e-12
        )


def test_what_mixes_positions_in_the_base_makes_every_position_run_again() -> None:
    model, inputs = setting("llava-clip-llama")
    length = inputs["input_ids"].shape[1]
    site = "language.blocks.0.hook_resid_post"
    mixing = edits.permute("language.blocks.1.hook_resid_mid", [1, 0], positions=[2, length - 1])
    group = edits.scale(site, 3.0, positions=length - 1)
    with torch.no_grad():
        swept = model.sweep(inputs, [group], metric, base=[mixing], progress=False)
        naive = metric(model.run(inputs, [mixing, group]), inputs)
    torch.testing.assert_close(swept.values[0], naive, rtol=1e-12, atol=1e-12)
    assert swept.plan[0].first == 0


def test_a_group_sets_what_the_base_changed_and_only_behind_it() -> None:
    model, inputs = setting("vit")
    noise, mine = (
        edits.add_noise("vision.hook_input", 1.0),
        edits.ablate("vision.blocks.0.hook_resid_pre", positions=[1, 2]),
    )
    with torch.no_grad():
        swept = model.sweep(inputs, [mine], metric, base=[noise], progress=False)

        def both(value: Tensor, hook: Any) -> Tensor:
            value[:, [1, 2]] = 0.0
            return value

        with model.record("vision.blocks.0.hook_resid_pre") as cache:
            model.run(inputs, [noise])
        by_hand = [("vision.blocks.0.hook_resid_pre", lambda value, hook: both(cache[hook.name].clone(), hook))]
        torch.testing.assert_close(
            swept.values[0], metric(model.run_with_hooks(inputs, by_hand), inputs), rtol=1e-12, atol=1e-12
        )
    late = edits.scale("vision.blocks.1.hook_resid_pre", 0.5)
    with pytest.raises(InputError, match="two names of one value"):
        model.sweep(inputs, [edits.ablate("vision.blocks.0.hook_resid_post")], metric, base=[late], progress=False)


def test_memory_that_runs_out_halves_the_batches_under_a_base(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = setting("vit")
    base = [edits.scale("vision.blocks.1.hook_mlp_out", 0.5), edits.add_noise("vision.hook_input", 1.0)]
    groups = [edits.ablate("vision.blocks.1.attn.hook_z", heads=head % 4, positions=head // 4) for head in range(8)]
    expected = model.sweep(inputs, groups, metric, base=base, progress=False)
    sizes, run = [], Resumer.run

    def small(self: Resumer, route: Any, copies: int, first: int) -> Tensor:
        sizes.append(copies)
        if copies > 2:
            raise torch.OutOfMemoryError("not enough")
        return run(self, route, copies, first)

    monkeypatch.setattr(Resumer, "run", small)
    found = model.sweep(inputs, groups, metric, batch_size=8, base=base, progress=False)
    assert sizes[:3] == [8, 4, 2]
    torch.testing.assert_close(found.values, expected.values, rtol=1e-12, atol=1e-12)


def test_an_edit_of_the_inputs_in_the_base_runs_in_full() -> None:
    model, inputs = setting("llava-clip-llama")
    gone = edits.delete_tokens("language", [3], reindex=True)
    group = edits.scale("language.blocks.1.hook_mlp_out", 0.5)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        swept = model.sweep(inputs, [group, gone], metric, base=[gone], progress=False)
        torch.testing.assert_close(swept.clean, metric(model.run(inputs, [gone]), inputs), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(
            swept.values[0], metric(model.run(inputs, [gone, group]), inputs), rtol=1e-12, atol=1e-12
        )


def test_gradients_under_a_base_are_those_of_the_whole_run() -> None:
    for name in ("vit", "llava-clip-llama", "pi0"):
        model, inputs = setting(name)
        tower = list(model.towers)[-1]
        width = model.towers[tower].cfg.d_model
        vector = torch.linspace(-1, 1, width, dtype=DOUBLE).requires_grad_()
        base = [edits.add_noise(f"{tower}.hook_input", 0.5), edits.scale(f"{tower}.blocks.1.hook_mlp_out", 0.7)]
        group = [edits.steer(f"{tower}.blocks.0.hook_resid_post", vector, positions=-1)]
        with model.prepared(inputs, (tower, 1), base=base) as run:
            (found,) = torch.autograd.grad(metric(run(group), inputs).sum(), vector)
        (wanted,) = torch.autograd.grad(metric(model.run(inputs, [*base, *group]), inputs).sum(), vector)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)


def test_a_data_set_is_run_under_a_base_batch_by_batch(tmp_path: Any) -> None:
    model = cv.organisms.load("shapes-llava")
    pairs = cv.organisms.pairs("shapes-llava", 5, 3)
    where = regions.at([15 + number for number in range(5)])
    base = [
        edits.add_noise("language.hook_input", 1.0, positions="patch"),
        edits.scale("language.blocks.1.hook_mlp_out", 0.5, positions=where),
    ]
    groups = [
        edits.replace("language.blocks.0.hook_resid_post", pairs.clean, positions=where),
        edits.ablate("language.blocks.1.hook_attn_out"),
    ]
    swept = model.sweep(
        pairs, groups, "logit_diff", base=base, example_batch=2, progress=False, save_to=tmp_path / "kept"
    )
    made = model.sweep(
        pairs,
        groups,
        "logit_diff",
        base=lambda batch: taken(base, batch.examples, pairs),
        example_batch=3,
        progress=False,
    )
    torch.testing.assert_close(made.values, swept.values, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        for number in range(5):
            one = pairs.clean[number : number + 1]
            batch = next(iter(one.batches(model)))
            clean = model.run_with_cache(batch.inputs, "language.blocks.0.hook_resid_post")[1]
            scaled = [base[0], edits.scale("language.blocks.1.hook_mlp_out", 0.5, positions=15 + number)]
            restored = edits.replace("language.blocks.0.hook_resid_post", clean, positions=15 + number)
            score = cv.metrics.logit_diff(batch.answers[0], batch.foils[0])
            for row, group in enumerate(([restored], [groups[1]])):
                naive = score(model.run(batch.inputs, [*scaled, *group]), batch.inputs)
                torch.testing.assert_close(swept.values[row, number], naive[0], rtol=1e-3, atol=1e-4)
    assert swept.base == tuple(base)
    with pytest.raises(InputError, match="base"):
        model.sweep(
            pairs,
            groups,
            "logit_diff",
            base=base[:1],
            example_batch=2,
            progress=False,
            save_to=tmp_path / "kept",
            resume=True,
        )


def taken(base: Any, examples: Any, pairs: Any) -> Any:
    from circuitvision.model.edits.base import taken as of_batch

    return of_batch(base, [list(pairs.numbers).index(one) for one in examples], len(pairs))


def test_a_result_keeps_its_base_and_runs_again(tmp_path: Any) -> None:
    model, inputs = setting("vit")
    base, groups = (
        [edits.scale("vision.blocks.0.hook_mlp_out", 0.5)],
        [edits.ablate("vision.blocks.1.attn.hook_z", heads=1)],
    )
    swept = model.sweep(inputs, groups, metric, base=base, progress=False)
    swept.save(tmp_path / "swept.npz")
    back = cv.load(tmp_path / "swept.npz")
    assert back.base == swept.base == tuple(base)
    assert torch.equal(back.rerun(model, inputs, metric, progress=False).values, swept.values)


def test_examples_in_which_the_base_selects_nothing_have_no_value() -> None:
    model, inputs = setting("vit", batch=3)
    mask = torch.zeros(3, model.tokens(inputs)["vision"].n_positions, dtype=torch.bool)
    mask[:2, 1] = True
    base, groups = (
        [edits.add_noise("vision.hook_input", 1.0, positions=mask)],
        [edits.ablate("vision.blocks.1.hook_mlp_out")],
    )
    with pytest.warns(UserWarning, match="select no position"):
        swept = model.sweep(inputs, groups, metric, base=base, progress=False)
    assert swept.values.isnan().tolist() == [[False, False, True]]
    assert swept.clean.isnan().tolist() == [False, False, True]
    kept = model.sweep(inputs, groups, metric, base=base, progress=False, empty="clean")
    assert not bool(kept.values.isnan().any())


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ([[edits.ablate("vision.blocks.0.hook_mlp_out")]], "one list"),
        (None, "one list"),
        ([edits.steer("vision.blocks.0.hook_mlp_out", torch.ones(24, requires_grad=True))], "gradient"),
        ([edits.ablate("vision.blocks.0.attn.hook_z", heads=99)], "head 99"),
        (lambda batch: [], "data set"),
    ],
)
def test_bases_that_cannot_be_meant_are_refused(base: Any, message: str) -> None:
    model, inputs = setting("vit")
    with pytest.raises(InputError, match=message):
        model.sweep(inputs, [edits.ablate("vision.blocks.1.hook_mlp_out")], metric, base=base, progress=False)

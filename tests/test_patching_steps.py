"""Denoising steps as an axis of patching: every cell is what torch hooks by hand do that write in one step alone."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.metrics import action_dim, action_distance
from circuitvision.patching import activation_patch
from circuitvision.patching.cells import step_groups
from circuitvision.steering import act, inject
from tests.test_patching import hooked_pair
from tests.zoo import case

STEPS = 3
METRIC = action_dim(1, step=0)


@pytest.fixture(scope="module")
def policy() -> tuple[cv.HookedModel, dict[str, Any], dict[str, Any]]:
    """A tiny PI0 in float64 and two runs from the same noise, which differ in the pictures and the state."""
    model = cv.HookedModel(case("pi0").build().double())
    clean, corrupt = (case("pi0").inputs(model.module, 2, seed, torch.float64) for seed in (0, 1))
    for name in ("noise", "input_ids", "attention_mask", "pixel_attention_mask", "timestep"):
        corrupt[name] = clean[name]
    return model, clean, corrupt


@contextlib.contextmanager
def layer_hook(layer: torch.nn.Module, seen: list[Tensor], written: Mapping[int, Tensor], entry: Any) -> Iterator[None]:
    """Collect what enters a layer, and write into an entry of it in some calls, counted by hand."""

    def before(module: Any, args: Any, kwargs: Any) -> Any:
        number = len(seen)
        value = args[0] if args else kwargs["hidden_states"]
        seen.append(value.detach().clone())
        if number not in written:
            return None
        value = value.clone()
        value[entry] = written[number][entry]
        return ((value, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": value})

    handle = layer.register_forward_pre_hook(before, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def denoised(model: cv.HookedModel, inputs: Mapping[str, Any]) -> Tensor:
    given = {name: value for name, value in inputs.items() if name != "timestep"}
    with torch.no_grad():
        return model.module.sample_actions(**given)


def by_hand(policy: Any, layer: int, steps: Sequence[int], entry: Any = (slice(None),)) -> Tensor:
    """The effect on the first action's second dimension."""
    model, clean, corrupt = policy
    block, source = model.module.model.dit.layers[layer], []
    with layer_hook(block, source, {}, entry):
        denoised(model, clean)
    assert len(source) == STEPS
    with layer_hook(block, [], {step: source[step] for step in steps}, entry):
        patched = denoised(model, corrupt)
    return (patched - denoised(model, corrupt))[:, 0, 1]


def patched(policy: Any, **options: Any) -> cv.PatchingResult:
    model, clean, corrupt = policy
    given: dict[str, Any] = {"sites": "action.blocks.*.hook_resid_pre", "axes": ("layer", "step"), "progress": False}
    return activation_patch(model, metric=METRIC, clean=clean, corrupt=corrupt, **(given | options))


def test_a_cell_writes_in_its_own_denoising_step_alone(policy: Any) -> None:
    found = patched(policy)
    assert found.axes == {"layer": [0, 1, 2], "step": [0, 1, 2], "example": [0, 1]}
    for layer in range(3):
        for step in range(STEPS):
            torch.testing.assert_close(found.values[layer, step], by_hand(policy, layer, [step]), rtol=1e-9, atol=1e-12)
    assert found.values.abs().amin() > 1e-9
    model, clean, corrupt = policy
    torch.testing.assert_close(found.base, denoised(model, corrupt)[:, 0, 1])
    torch.testing.assert_close(found.source, denoised(model, clean)[:, 0, 1])
    assert "act" in found.provenance["run"]


def test_positions_and_groups_of_steps(policy: Any) -> None:
    found = patched(
        policy,
        axes=("step", "layer", "position"),
        steps={"first two": (0, 1), "last": 2, "all": "all"},
    )
    assert found.axes["step"] == ["first two", "last", "all"]
    for row, steps in enumerate(([0, 1], [2], [0, 1, 2])):
        for position in (0, 3):
            expected = by_hand(policy, 1, steps, (slice(None), position))
            torch.testing.assert_close(found.values[row, 1, position], expected, rtol=1e-9, atol=1e-12)


def test_all_steps_together_are_no_axis(policy: Any) -> None:
    found = patched(policy, steps=("all", 0, 1, 2))
    whole = patched(policy, axes=("layer",), run=act)
    assert torch.equal(found.values[:, 0], whole.values)
    assert list(whole.axes) == ["layer", "example"]
    # What comes in at every step decides the actions, whatever the base run was told.
    model, clean, corrupt = policy
    state = {**corrupt, "state": clean["state"], "pixel_values": clean["pixel_values"]}
    assert torch.equal(denoised(model, state), denoised(model, clean))
    assert whole.restored.shape == (3,)


def test_one_forward_pass_is_another_run_than_the_denoised_actions(policy: Any) -> None:
    single = patched(policy, axes=("layer",))
    assert not torch.allclose(single.values, patched(policy, axes=("layer",), run=act).values, atol=1e-6)


def test_the_prefix_runs_once_as_step_0(policy: Any) -> None:
    sites = ["language.blocks.*.attn.hook_k", "action.blocks.*.attn.hook_k"]
    found = patched(policy, sites=sites, steps=None)
    assert found.axes["tower"] == ["language", "action"]
    assert not found.values[0, :, 0].isnan().any()
    assert found.values[0, :, 1:].isnan().all()
    assert not found.values[1].isnan().any()
    alone = patched(policy, sites=sites[0], axes=("layer",), run=act)
    assert torch.equal(found.values[0, :, 0], alone.values)


def test_edits_of_a_cell_say_their_step_and_are_what_sample_actions_takes(policy: Any) -> None:
    model, clean, corrupt = policy
    found = patched(policy, axes=("layer", "step"), steps=(1,))
    (edit,) = found.edits[2]
    assert (edit.site, edit.steps.numbers) == ("action.blocks.2.hook_resid_pre", (1,))
    with model.record(edit.site) as cache:
        model.sample_actions(clean)
    (whole,) = cv.edits.restore([edit], {"any": cache[edit.site][1]})
    with torch.no_grad():
        moved = model.sample_actions(corrupt, edits=[whole]) - model.sample_actions(corrupt)
    torch.testing.assert_close(found.values[2, 0], moved[:, 0, 1])


def test_pairs_in_batches_are_the_inputs_of_both_sides() -> None:
    model = cv.organisms.load("reach-pi0")
    pairs = cv.data.reach_pairs(6, seed=3, change="goal")
    options: dict[str, Any] = {
        "sites": "action.blocks.1.hook_resid_pre",
        "axes": ("layer", "step"),
        "steps": (0, 4, "all"),
        "progress": False,
    }
    whole = activation_patch(model, pairs, action_distance(), **options)
    parts = activation_patch(model, pairs, action_distance(), example_batch=4, **options)
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-4, atol=1e-5)
    (batch,) = pairs.batches(model)
    sides = activation_patch(model, metric=action_distance(), clean=batch.inputs, corrupt=batch.other, **options)
    torch.testing.assert_close(whole.values, sides.values, rtol=1e-4, atol=1e-5)
    assert float(whole.source.abs().max()) < 1e-5
    # β of the injection at the same place: what the distance to the source says in another way.
    injected = inject(
        model, pairs, tower="action", what="hook_resid_pre", layers=[1], steps=(0, 4, "all"), progress=False
    )
    assert (injected.values[0, 0].mean(-1).argsort() == (-whole.values[0]).mean(-1).argsort()).all()


def test_a_finished_part_is_read_again(policy: Any, tmp_path: Any) -> None:
    first = patched(policy, axes=("step", "layer"), steps=(1, 2), save_to=tmp_path)
    again = patched(policy, axes=("step", "layer"), steps=(1, 2), save_to=tmp_path, resume=True)
    assert torch.equal(first.values, again.values)
    with pytest.raises(InputError):
        patched(policy, axes=("layer",), save_to=tmp_path, resume=True)
    loaded = cv.load(first.save(tmp_path / "steps.npz"))
    assert torch.equal(loaded.values, first.values)
    assert first.plot() is not None


def test_steps_that_are_not_there_are_refused(policy: Any) -> None:
    for steps in ((3,), (), ("first",), {"late": (1, 7)}, (-1,)):
        with pytest.raises(InputError):
            patched(policy, steps=steps)
    with pytest.raises(InputError, match="belong together"):
        patched(policy, axes=("layer",), steps=(1,))
    with pytest.raises(InputError, match="function"):
        patched(policy, axes=("layer",), run="act")
    model, clean, corrupt = hooked_pair("vit")
    with pytest.raises(UnsupportedModelError):
        activation_patch(
            model,
            metric=METRIC,
            clean=clean,
            corrupt=corrupt,
            sites="vision.blocks.*.hook_resid_pre",
            axes=("layer", "step"),
        )
    assert not policy[0].engine.stack


def test_groups_of_steps_by_label() -> None:
    def numbers(steps: Any, passes: int) -> dict[Any, Any]:
        return {label: own.plain for label, own in step_groups(steps, passes).items()}

    assert numbers(None, 2) == {0: 0, 1: 1}
    assert numbers([1, "all"], 2) == {1: 1, "all": None}
    assert numbers({"odd": (1, 3)}, 4) == {"odd": [1, 3]}


def test_a_sweep_of_actions_is_a_run_of_each_group(policy: Any) -> None:
    model, clean, _ = policy
    groups = [cv.edits.ablate("action.blocks.1.hook_mlp_out", steps=step) for step in range(STEPS)]
    found = model.sweep(clean, groups, METRIC, run=act, axes={"step": range(STEPS)}, progress=False)
    for number, edit in enumerate(groups):
        torch.testing.assert_close(found.values[number], act(model, clean, edit)[:, 0, 1])
    assert all(plan.in_full for plan in found.plan)
    with pytest.raises(InputError):
        model.sweep(clean, groups, METRIC, run=act, axes={"step": [2, 1, 0]}, progress=False)
    with pytest.raises(InputError, match="positions"):
        model.sweep(clean, [*groups, cv.edits.ablate("action.blocks.1.hook_mlp_out", positions=99)], METRIC, run=never)


def never(model: Any, inputs: Any, edits: Any) -> Tensor:
    raise AssertionError

"""Directions: closed forms on planted activations, the held-out checks, and the response along them on linear and saturating models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.metrics import logit
from circuitvision.steering import Direction, SteeringResponse, random_directions, steering_direction, steering_response
from circuitvision.steering import directions as module
from circuitvision.steering.claims import separates, steers
from tests.zoo import case, shared_model

SITE = "vision.blocks.1.hook_resid_post"


def cloud(count: int, d: int, seed: int) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, d)))


# -- what the builders compute ------------------------------------------------------------------------------------------------------------------


def test_a_planted_direction_is_found_with_its_sign_and_length() -> None:
    unit = torch.nn.functional.normalize(cloud(1, 12, 9)[0], dim=0)
    noise = cloud(40, 12, 0)
    across = noise - (noise @ unit)[:, None] * unit
    kinds = {"a": 0.01 * across + 3.0 * unit, "b": 0.01 * across - 2.0 * unit}
    for method in ("mean_difference", "paired", "pca", "contrast"):
        torch.testing.assert_close(module._vector(kinds, method), 5.0 * unit, atol=1e-3, rtol=1e-3)
        turned = {"b": kinds["b"], "a": kinds["a"]}
        torch.testing.assert_close(module._vector(turned, method), -5.0 * unit, atol=1e-3, rtol=1e-3)


def test_each_builder_is_its_equation() -> None:
    first, second = cloud(30, 6, 1) + 1.0, cloud(30, 6, 2)
    kinds = {"a": first, "b": second}
    mean = first.mean(0) - second.mean(0)
    torch.testing.assert_close(module._vector(kinds, "mean_difference"), mean)
    change = (first - second).numpy()
    # The largest eigenvector of the second moment of the differences.
    values, vectors = np.linalg.eigh(change.T @ change)
    top = torch.from_numpy(vectors[:, -1])
    torch.testing.assert_close(module._vector(kinds, "paired"), (mean @ top) * top)
    pooled = np.cov(torch.cat([first, second]).numpy().T)
    principal = torch.from_numpy(np.linalg.eigh(pooled)[1][:, -1])
    torch.testing.assert_close(module._vector(kinds, "pca"), (mean @ principal) * principal)
    assert values[-1] > values[-2]
    several = {**kinds, "c": cloud(5, 6, 3)}
    wanted = first.mean(0) - (second.mean(0) + several["c"].mean(0)) / 2
    torch.testing.assert_close(module._vector(several, "contrast"), wanted)


def test_halves_keep_groups_and_pairs_whole() -> None:
    groups = {"clean": [0, 0, 1, 2, 3, 3], "corrupt": [0, 0, 1, 2, 3, 3]}
    for seed in range(5):
        split = module._halves(groups, True, np.random.default_rng(seed))
        assert torch.equal(split["clean"], split["corrupt"])
        assert split["clean"][0] == split["clean"][1]
        assert split["clean"][4] == split["clean"][5]
        assert 0 < int(split["clean"].sum()) < 6
    free = [module._halves(groups, False, np.random.default_rng(seed)) for seed in range(8)]
    assert any(not torch.equal(one["clean"], one["corrupt"]) for one in free)


def test_pairs_that_share_a_group_on_either_side_are_of_one_group() -> None:
    same = [0, 0, 1, 2, 3, 3]
    assert module._of_pairs({"clean": same, "corrupt": same}) == {"clean": same, "corrupt": same}
    found = module._of_pairs({"one": ["a", "b", "c", "d", "e"], "other": ["v", "w", "v", "x", "d"]})
    assert found["one"] == found["other"]
    assert [[found["one"][row] == own for own in found["one"]] for row in range(5)] == [
        [row == other or {row, other} in ({0, 2}, {3, 4}) for other in range(5)] for row in range(5)
    ]


def test_parts_of_one_data_set_are_pairs_by_their_order_and_one_group_has_no_halves() -> None:
    model = cv.organisms.load("spurious-vit")
    side = cv.data.background_side(cv.data.sample_backgrounds(16, 3))
    parts = {"a": side[:8], "b": side[8:]}
    found = steering_direction(model, parts, SITE, method="paired")
    together = steering_direction(model, cv.data.Pairs.from_sides(*parts.values()), SITE, method="paired")
    assert torch.equal(found.cosines, together.cosines)
    assert torch.equal(found.values, together.values)
    images = [one.image for one in side.examples]
    one_group = {"a": side[:8], "b": cv.data.Side(images[8:], groups=["scene"] * 8)}
    for method in ("mean_difference", "paired"):
        with pytest.raises(InputError, match="one group"):
            steering_direction(model, one_group, SITE, method=method)
    assert steering_direction(model, one_group, SITE, n_splits=0).cosines.numel() == 0


def test_held_out_coordinates_come_from_the_other_half() -> None:
    kinds = {"a": cloud(8, 3, 1) + 1.0, "b": cloud(8, 3, 2)}
    half = torch.tensor([True, False] * 4)
    found = module._held_out(kinds, {"a": half, "b": half}, "mean_difference")
    mean = [kinds[kind][~half].mean(0) for kind in kinds]
    unit = (mean[0] - mean[1]) / (mean[0] - mean[1]).norm()
    torch.testing.assert_close(found[:8][half], (kinds["a"][half] - (mean[0] + mean[1]) / 2) @ unit)


# -- on models ----------------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def vit() -> tuple[cv.HookedModel, dict[str, Any], dict[str, Any]]:
    model = cv.HookedModel(case("vit").build().double())
    one, other = (case("vit").inputs(model.module, 8, seed, torch.float64) for seed in (0, 1))
    return model, one, {**other, "pixel_values": other["pixel_values"] + 1.0}


def test_inputs_of_two_kinds_at_sites_with_and_without_heads(vit: Any) -> None:
    model, one, other = vit
    found = steering_direction(model, {"one": one, "other": other}, SITE, positions="cls", n_splits=5, n_random=20)
    values = [model.run_with_cache(inputs, SITE)[1][SITE][:, 0] for inputs in (one, other)]
    torch.testing.assert_close(found.vector.double(), values[0].mean(0) - values[1].mean(0), rtol=1e-5, atol=1e-6)
    assert (found.toward, found.kinds) == ("one", ["one"] * 8 + ["other"] * 8)
    assert found.natural_norm == pytest.approx(float(torch.cat(values).norm(dim=1).mean()))
    assert found.cosines.shape == (5,)
    assert found.norm > float(found.random_norms.max())
    patches = steering_direction(model, {"one": one, "other": other}, SITE, positions="patch")
    values = [model.run_with_cache(inputs, SITE)[1][SITE][:, 1:].mean(1) for inputs in (one, other)]
    torch.testing.assert_close(patches.vector.double(), values[0].mean(0) - values[1].mean(0), rtol=1e-5, atol=1e-6)
    z = "vision.blocks.1.attn.hook_z"
    cfg = model.vision.cfg
    whole = steering_direction(model, {"one": one, "other": other}, z)
    single = steering_direction(model, {"one": one, "other": other}, "vision L1H2")
    assert whole.vector.shape == (cfg.n_heads, cfg.d_head)
    torch.testing.assert_close(single.vector, whole.vector[2])
    assert (single.heads, whole.heads) == ([2], None)
    for direction in (found, whole, single):
        (edit,) = direction.edits(2.0, positions="cls")
        moved = edits.steer(direction.site, direction.vector, 2.0, heads=direction.heads, positions="cls")
        assert torch.equal(model.run(one, [edit]), model.run(one, [moved]))
    with pytest.raises(InputError, match="one of the"):
        steering_direction(model, {"one": one, "other": other}, z, heads=[0, 1])


@pytest.mark.parametrize("name", ["clip", "llava-clip-llama", "paligemma", "pi0"])
def test_every_tower_of_several_families(name: str) -> None:
    model = cv.HookedModel(shared_model(name))
    inputs = [case(name).inputs(model.module, batch=5, seed=seed) for seed in (0, 1)]
    for tower in model.towers:
        site = f"{tower}.blocks.0.hook_resid_post"
        for method in ("mean_difference", "paired", "pca"):
            found = steering_direction(
                model, {"one": inputs[0], "other": inputs[1]}, site, method=method, n_splits=2, n_random=3
            )
            assert found.vector.shape == (model.towers[tower].cfg.d_model,)
            assert 0 < found.norm < float("inf")


def test_pairs_point_toward_the_clean_side_and_are_saved(policy: cv.HookedModel, tmp_path: Any) -> None:
    pairs = cv.data.reach_pairs(12, seed=1, change="goal")
    site = "language.blocks.1.hook_resid_post"
    found = steering_direction(policy, pairs, site, positions="last", method="paired")
    turned = steering_direction(
        policy, cv.data.Pairs.from_sides(pairs.corrupt, pairs.clean), site, positions="last", method="paired"
    )
    torch.testing.assert_close(found.vector, -turned.vector, rtol=1e-4, atol=1e-5)
    again = cv.load(found.save(tmp_path / "direction.npz"))
    assert isinstance(again, Direction)
    assert torch.equal(again.vector, found.vector)
    assert (again.heads, again.kinds, again.norm) == (found.heads, found.kinds, found.norm)
    assert len(found.to_frame()) == 24
    assert found.highlights()
    assert 0 <= float(found.sides().mean()) <= 1


def test_kinds_without_a_difference_look_like_chance(vit: Any) -> None:
    model, one, _ = vit
    half = [{**one, "pixel_values": one["pixel_values"][rows]} for rows in (slice(0, 4), slice(4, 8))]
    found = steering_direction(model, {"a": half[0], "b": half[1]}, SITE, n_random=200)
    assert found.norm <= float(found.random_norms.max())
    assert found.cosine < 0.9


def test_random_directions_are_as_long_and_point_elsewhere(vit: Any) -> None:
    model, one, other = vit
    found = steering_direction(model, {"one": one, "other": other}, "vision.blocks.1.attn.hook_z")
    drawn = random_directions(found, 3, seed=1)
    assert [round(direction.norm / found.norm, 5) for direction in drawn] == [1.0] * 3
    assert {direction.site for direction in drawn} == {found.site}
    assert float((drawn[0].unit * drawn[1].unit).sum().abs()) < 0.9
    assert torch.equal(drawn[2].vector, random_directions(found, 3, seed=1)[2].vector)
    assert torch.equal(drawn[1].vector, random_directions(found, 2, seed=1)[1].vector)
    every = torch.stack([one.unit.flatten() for seed in range(3) for one in random_directions(found, 3, seed=seed)])
    apart = (every @ every.T).fill_diagonal_(0.0)
    assert float(apart.abs().max()) < 0.99


def test_a_direction_of_whole_numbers_has_controls_of_its_length(vit: Any) -> None:
    model, one, _ = vit
    found = Direction.of(model, SITE, torch.arange(24))
    assert [drawn.norm == pytest.approx(found.norm) for drawn in random_directions(found, 2)] == [True, True]

    def never(*_: Any) -> Tensor:
        raise AssertionError

    head = Direction.of(model, "vision.blocks.1.attn.hook_z", torch.ones(6), heads=0)
    elsewhere = Direction.of(model, "vision.blocks.0.hook_resid_post", found.vector)
    longer = Direction.of(model, SITE, 1.01 * found.vector)
    for control, message in ((head, "shape"), (torch.ones(24), "Direction"), (elsewhere, "blocks.0"), (longer, "long")):
        with pytest.raises(InputError, match=message):
            steering_response(model, one, found, never, random=[control], progress=False)


def test_what_is_no_direction_is_refused(vit: Any) -> None:
    model, one, other = vit
    both = {"one": one, "other": other}
    for data, options in (
        (both, {"method": "lda"}),
        ({"one": one}, {}),
        ({**both, "third": one}, {}),
        (one, {}),
        ([one, other], {}),
        ({"one": one, "two": one}, {}),
        ({"one": {"pixel_values": one["pixel_values"][:3]}, "other": other}, {}),
        ({"one": {"pixel_values": one["pixel_values"][:5]}, "other": other}, {"method": "paired"}),
    ):
        with pytest.raises(InputError):
            steering_direction(model, data, SITE, **options)
    with pytest.raises(InputError):
        steering_direction(model, both, "vision.blocks.1.attn.hook_pattern")
    for vector in (torch.zeros(24), torch.ones(7), torch.tensor([float("nan")] * 24)):
        with pytest.raises(InputError):
            Direction.of(model, SITE, vector)


# -- the response along a direction ----------------------------------------------------------------------------------------------------------


def along(model: cv.HookedModel, inputs: Any, direction: Direction, **options: Any) -> SteeringResponse:
    given: dict[str, Any] = {"scales": [-1.0, -0.5, 0.5, 1.0, 4.0], "n_random": 2, "progress": False}
    return steering_response(model, inputs, direction, logit(2), **(given | options))


def test_a_linear_read_out_has_the_closed_slope(vit: Any) -> None:
    """Behind the last norm the logits are linear: the change is s · d·W_U."""
    model, one, _ = vit
    site = "vision.hook_readout"
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(model.vision.cfg.d_model, generator=generator, dtype=torch.float64)
    found = along(model, one, Direction.of(model, site, vector, name="random"))
    expected = vector @ model.vision.output_head.module.weight[2].detach().double()
    torch.testing.assert_close(found.tangents().values[0], expected.expand(8), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(found.slopes().values[0], expected.expand(8), rtol=1e-6, atol=1e-8)
    assert found.linear_range() == (-1.0, 4.0)
    assert found.vectors.shape == (3, 24)
    assert float(found.r_squared[0]) == pytest.approx(1.0)


def test_the_tangent_is_the_gradient(vit: Any) -> None:
    model, one, other = vit
    direction = steering_direction(model, {"one": one, "other": other}, SITE)
    found = along(model, one, direction, scales=[-1e-3, 1e-3, 1.0], positions="cls")
    scale = torch.zeros(8, 1, 1, dtype=torch.float64, requires_grad=True)
    edit = edits.steer(SITE, direction.vector.double(), scale, positions="cls")
    logits = model.run(one, [edit])[:, 2]
    (gradient,) = torch.autograd.grad(logits.sum(), scale)
    torch.testing.assert_close(found.tangents().values[0], gradient.flatten(), rtol=1e-4, atol=1e-8)
    low, high = found.tangents().interval()[:, 0].tolist()
    assert low < float(gradient.mean()) < high


def test_norm_ratios_are_those_of_the_steered_run(vit: Any) -> None:
    model, one, other = vit
    for site, options in (
        (SITE, {"positions": "patch"}),
        (SITE, {}),
        (SITE, {"method": "norm_preserving"}),
        (SITE, {"method": "project_out"}),
        ("vision L1H1", {"positions": [0, 3]}),
    ):
        direction = steering_direction(model, {"one": one, "other": other}, site)
        found = along(model, one, direction, scales=[0.5, 1.0, 3.0], n_random=0, **options)
        name, heads = direction.site, slice(None) if direction.heads is None else direction.heads[0]
        where = {"patch": slice(1, None), None: slice(None)}.get(str(options.get("positions", "None")), [0, 3])
        where = slice(None) if "positions" not in options else where
        for number, scale in enumerate((0.5, 1.0, 3.0)):
            group = direction.edits(scale, options.get("method", "add"), positions=options.get("positions"))
            before = model.run_with_cache(one, name)[1][name]
            seen: list[Tensor] = []
            model.run(one, [*group, edits.apply(name, lambda value, hook, seen=seen: seen.append(value.clone()))])
            pick = (slice(None), where) if direction.heads is None else (slice(None), where, heads)
            ratio = seen[0][pick].norm(dim=-1) / before[pick].norm(dim=-1)
            torch.testing.assert_close(found.norm_ratio[number], ratio.mean(1), rtol=1e-6, atol=1e-8)
        if options.get("method") == "norm_preserving":
            torch.testing.assert_close(found.norm_ratio, torch.ones_like(found.norm_ratio))


def test_a_curve_leaves_its_tangent_where_it_bends() -> None:
    axes = {"set": ["chosen"], "scale": [-2.0, -1.0, -0.1, 0.1, 1.0, 2.0], "example": [0]}
    effect = torch.tensor([-1.0, -1.0, -0.1, 0.1, 1.0, 1.3], dtype=torch.float64)
    found = SteeringResponse(effect.view(1, 6, 1), axes, base=torch.zeros(1), method="add")
    assert float(found.tangents().values) == pytest.approx(1.0)
    assert found.linear_range() == (-1.0, 1.0)
    assert found.linear_range(share=0.4) == (-1.0, 2.0)
    overwritten = SteeringResponse(effect.view(1, 6, 1), axes, base=torch.zeros(1))
    with pytest.raises(InputError, match="itself a change"):
        overwritten.tangents()


def test_units_are_natural_deviations_along_the_direction(vit: Any) -> None:
    model, one, other = vit
    direction = steering_direction(model, {"one": one, "other": other}, SITE)
    found = along(model, one, direction, scales=[1.0, 2.0], units="deviation", n_random=1)
    scale = direction.natural_deviation / direction.norm
    expected = along(model, one, direction, scales=[scale, 2 * scale], n_random=1)
    torch.testing.assert_close(found.values, expected.values)
    given = Direction.of(model, SITE, direction.vector)
    with pytest.raises(InputError, match="natural deviation"):
        along(model, one, given, units="deviation")
    for wrong in ({"method": "overwrite"}, {"method": "project_out", "units": "deviation"}, {"scales": []}):
        with pytest.raises(InputError):
            along(model, one, direction, **wrong)


def test_a_direction_steers_a_policy_at_one_denoising_step(policy: cv.HookedModel) -> None:
    pairs = cv.data.reach_pairs(12, seed=1, change="goal")
    direction = steering_direction(policy, pairs, "language.blocks.0.hook_resid_post", positions="last")
    found = steering_response(
        policy, pairs, direction, 0, [-1.0, 1.0], n_random=2, positions="last", example_batch=5, progress=False
    )
    assert found.values.shape == (3, 2, 12)
    inputs = next(pairs.clean.batches(policy)).inputs
    moved = cv.steering.act(policy, inputs, direction.edits(1.0, positions="last")) - cv.steering.act(policy, inputs)
    torch.testing.assert_close(found.values[0, 1], moved[..., 0].mean(1).double(), rtol=1e-3, atol=1e-4)
    late = steering_direction(policy, pairs, "action.blocks.1.hook_resid_post", positions="action")
    one = steering_response(policy, inputs, late, 0, [-1.0, 1.0], n_random=0, steps=1, progress=False)
    all_steps = steering_response(policy, inputs, late, 0, [-1.0, 1.0], n_random=0, progress=False)
    assert 0 < float(one.effect.abs().max()) < float(all_steps.effect.abs().max())


def test_finished_parts_are_read_again_and_the_figure_says_what_it_finds(vit: Any, tmp_path: Any) -> None:
    model, one, other = vit
    direction = steering_direction(model, {"one": one, "other": other}, SITE)
    first = along(model, one, direction, save_to=tmp_path)
    again = along(model, one, direction, save_to=tmp_path, resume=True)
    assert torch.equal(first.values, again.values)
    told = steers(first)
    assert told.about["controls"] == "random directions"
    figure = first.plot()
    assert "tangent at 0" in str(figure.to_dict())
    loaded = cv.load(first.save(tmp_path / "response.npz"))
    assert torch.equal(loaded.norm_ratio, first.norm_ratio)
    assert loaded.linear_range() == first.linear_range()


def planted(apart: float, draws: int = 50) -> Direction:
    """A direction whose 20 examples lie this far apart, and whose kinds, exchanged, give lengths up to 1."""
    noise = torch.linspace(-1, 1, 10, dtype=torch.float64)
    values = torch.cat([noise + apart / 2, noise - apart / 2])
    kinds = ["red"] * 10 + ["blue"] * 10
    return Direction(
        values, {"example": [f"{kind} {number}" for number, kind in enumerate(kinds)]}, vector=torch.tensor([apart, 0.0]), kinds=kinds,
        site=SITE, method="mean_difference", toward="red", cosines=torch.tensor([0.9, 0.8]), random_norms=torch.linspace(0, 1, draws),
    )  # fmt: skip


def test_a_direction_is_affirmed_where_it_holds_out_and_is_longer_than_chance() -> None:
    found = separates(planted(3.0))
    assert found.holds
    assert found.value == 1.0
    assert "0.85" in str(planted(3.0).plot().layout.title.text)
    assert not separates(planted(0.9)).holds
    assert not separates(planted(3.0, draws=5)).holds
    near = planted(0.2)
    assert float(near.sides().mean()) < 0.8
    assert "No clear direction" in str(near.plot().layout.title.text)
    rows = [trace for trace in planted(3.0).plot().data if trace.type == "box"]
    assert [len(trace.x) for trace in rows] == [10, 10]
    torch.testing.assert_close(torch.tensor(rows[0].x, dtype=torch.float64), planted(3.0).values[:10])

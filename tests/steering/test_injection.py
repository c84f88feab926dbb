"""Injection: β and its residual with known answers, and METHODS's table of what reach-pi0's prefix carries."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

import circuitvision as cv
from circuitvision import edits
from circuitvision.data import reach
from circuitvision.errors import InputError
from circuitvision.steering import InjectionResult, act, inject, transfer
from circuitvision.steering.claims import injects
from circuitvision.steering.injection import prefix_tower
from tests.zoo import case, shared_model

REGIONS = {"all": None, "goal word": [18], "image": "patch", "other text": [16, 17, 19]}


# -- β alone ---------------------------------------------------------------------------------------------------------------------------------


def test_beta_of_known_mixtures() -> None:
    a, b, noise = torch.randn(3, 50, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    way = (a - b).flatten(1)
    across = noise.flatten(1)
    across = across - (across * way).sum(1, keepdim=True) / way.square().sum(1, keepdim=True) * way
    across = (across / across.norm(dim=1, keepdim=True) * way.norm(dim=1, keepdim=True)).view_as(a)
    for alpha in (-0.5, 0.0, 0.25, 1.0, 2.0):
        found = transfer(b + alpha * (a - b) + 0.3 * across, a, b)
        torch.testing.assert_close(found.beta, torch.full((50,), alpha, dtype=torch.float64), rtol=0, atol=1e-12)
        torch.testing.assert_close(found.residual, torch.full((50,), 0.3, dtype=torch.float64), rtol=0, atol=1e-12)
    near = transfer(b + 0.7 * (a - b) + 0.01 * noise, a, b)
    assert (near.beta - 0.7).abs().max() < 0.05


def test_the_published_rate_is_a_step_where_beta_is_a_line() -> None:
    """With trajectories that share their mean, half-way scores one half and a little more scores all."""
    generator = torch.Generator().manual_seed(0)
    shared = 4 * torch.randn(1, 30, generator=generator, dtype=torch.float64)
    a, b = (shared + torch.randn(2000, 30, generator=generator, dtype=torch.float64) for _ in range(2))
    rates = {}
    for alpha in (0.25, 0.45, 0.55, 0.75):
        y = b + alpha * (a - b)
        cosine = torch.nn.functional.cosine_similarity
        rates[alpha] = float((cosine(y, a) > cosine(y, b)).double().mean())
        assert float(transfer(y, a, b).beta.mean()) == pytest.approx(alpha)
    assert rates[0.25] < 0.01
    assert rates[0.75] > 0.99
    assert rates[0.55] - rates[0.45] > 0.5


def test_trajectories_that_do_not_differ_have_no_beta_and_a_warning() -> None:
    a = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(0))
    b = a.clone()
    b[1:] += 1
    with pytest.warns(UserWarning, match="1 of 4"):
        found = transfer(a, a, b)
    assert found.beta.isnan().tolist() == [True, False, False, False]
    assert found.residual.isnan().tolist() == [True, False, False, False]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        transfer(a[1:], a[1:], b[1:])
    with pytest.raises(InputError, match="shapes"):
        transfer(a, a, b[:2])


# -- reach-pi0's prefix ------------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sides(policy: cv.HookedModel) -> tuple[dict[str, Any], dict[str, Any]]:
    """Boards that differ in the goal word, from the same noise."""

    def made(scenes: reach.ReachScenes) -> dict[str, Any]:
        return policy.inputs(
            images=[[image] for image in scenes.images()], text=scenes.instructions(), state=scenes.gripper, seed=4
        )

    source, base = map(made, reach.contrast_pairs(480, seed=1, change="goal"))
    return source, base


@pytest.fixture(scope="module")
def injected(policy: cv.HookedModel, sides: tuple[dict[str, Any], dict[str, Any]]) -> InjectionResult:
    return inject(policy, source=sides[0], base=sides[1], regions=REGIONS, layers=["all"], progress=False)


@pytest.fixture(scope="module")
def of_layers(policy: cv.HookedModel, sides: tuple[dict[str, Any], dict[str, Any]]) -> InjectionResult:
    return inject(policy, source=sides[0], base=sides[1], layers=[0, 1, 2], progress=False)


def cell(found: InjectionResult, region: str, layer: Any = "all") -> tuple[float, float, float]:
    """Mean β, residual and override rate."""
    at = found.index_of("region", region), found.index_of("layer", layer), 0
    return tuple(float(found.mean(quantity=name)[at]) for name in ("values", "residual", "override"))  # type: ignore[return-value]


def test_what_carries_the_goal(injected: InjectionResult) -> None:
    """The rows of METHODS2.md 9.1 that are exact: everything, the word and the image carry the goal, the other text does not."""
    for region in ("all", "goal word", "image"):
        beta, residual, override = cell(injected, region)
        assert beta == pytest.approx(1, abs=0.005)
        assert residual < 0.005
        assert override == 1
    beta, residual, override = cell(injected, "other text")
    assert beta == pytest.approx(0, abs=0.005)
    assert residual < 0.005
    assert override == 0
    told = injects(injected)
    assert told.holds
    assert told.about["control"] == "other text"
    assert not injects(injected, region="other text", control="image").holds


@pytest.mark.parametrize(("layer", "beta", "override"), [(0, 1.0, 1.0), (1, 0.63, 0.58), (2, 0.49, 0.46)])
def test_layers_of_the_prefix(of_layers: InjectionResult, layer: int, beta: float, override: float) -> None:
    """The layers of that table, measured there on 120 pairs: its standard error is .03 for β and .045 for the rate."""
    found = cell(of_layers, "all", layer)
    assert found[0] == pytest.approx(beta, abs=0.06)
    assert found[2] == pytest.approx(override, abs=0.09)
    # What a single later layer moves is moved partly aside.
    assert (found[1] > 0.2) == (layer > 0)


def test_nothing_and_other_noise_move_nothing(
    policy: cv.HookedModel, sides: tuple[dict[str, Any], dict[str, Any]]
) -> None:
    source, base = ({name: value[:120] for name, value in one.items()} for one in sides)
    a, b = act(policy, source), act(policy, base)
    assert torch.equal(transfer(act(policy, base, []), a, b).beta, torch.zeros(120, dtype=torch.float64))
    other = {**base, "noise": torch.randn(base["noise"].shape, generator=torch.Generator().manual_seed(9))}
    beta, residual = transfer(act(policy, other), a, b)
    assert float(beta.mean()) == pytest.approx(0, abs=0.005)
    assert float(residual.mean()) == pytest.approx(0.012, abs=0.006)


def test_a_runs_own_activations_change_nothing(policy: cv.HookedModel, boards: reach.ReachScenes) -> None:
    """A source that is the base itself: no β for want of a difference, and no bit of the actions moves."""
    (batch,) = cv.data.reach_side(boards).batches(policy)
    actions = []

    def run(model: Any, inputs: Any, group: Any) -> torch.Tensor:
        actions.append(act(model, inputs, group))
        return actions[-1]

    with pytest.warns(UserWarning, match="do not differ"):
        found = inject(policy, source=batch.inputs, base=batch.inputs, regions=REGIONS, policy=run, progress=False)
    assert found.values.isnan().all()
    assert all(torch.equal(one, actions[0]) for one in actions)


def test_the_whole_stream_of_the_action_tower_is_the_source_run(policy: cv.HookedModel) -> None:
    """Everything the head reads, at every denoising step: β 1, residual 0. A single step is its share of the walk."""
    pairs = cv.data.reach_pairs(16, seed=2)
    found = inject(
        policy, pairs, tower="action", what="hook_resid_post", layers=[2], steps=["all", 0, 1, 2, 3, 4], progress=False
    )
    assert found.axes["step"] == ["all", 0, 1, 2, 3, 4]
    torch.testing.assert_close(found.values[0, 0, 0], torch.ones(16, dtype=torch.float64), rtol=0, atol=1e-5)
    assert float(found.residual[0, 0, 0].max()) < 1e-5
    assert (found.mean()[0, 0, 1:5] < found.mean()[0, 0, 5]).all()


def test_pairs_are_the_inputs_of_both_sides_in_batches(policy: cv.HookedModel) -> None:
    pairs = cv.data.reach_pairs(10, seed=5)
    options: dict[str, Any] = {"regions": {"image": "patch"}, "layers": [1, "all"], "progress": False}
    whole, parts = (inject(policy, pairs, example_batch=size, **options) for size in (None, 4))
    torch.testing.assert_close(whole.values, parts.values, rtol=1e-3, atol=1e-3)
    batch = next(pairs.batches(policy))
    by_hand = inject(policy, source=batch.inputs, base=batch.other, **options)
    torch.testing.assert_close(whole.values, by_hand.values, rtol=1e-4, atol=1e-4)
    assert whole.axes["layer"] == [1, "all"]
    # One cell by hand: the source's keys and values of layer 1, at the patches.
    sites = ["language.blocks.1.attn.hook_k", "language.blocks.1.attn.hook_v"]
    _, cache = policy.run_with_cache(batch.inputs, sites)
    y = act(policy, batch.other, [edits.replace(site, cache, positions="patch") for site in sites])
    expected = transfer(y, act(policy, batch.inputs), act(policy, batch.other)).beta
    torch.testing.assert_close(by_hand.at("image", 1).values, expected, rtol=0, atol=1e-6)


def test_a_policy_may_be_a_single_run(policy: cv.HookedModel, sides: tuple[dict[str, Any], dict[str, Any]]) -> None:
    """The velocity of one pass in place of the denoised actions: nothing counts passes there."""
    source, base = ({name: value[:12] for name, value in one.items()} for one in sides)
    found = inject(
        policy, source=source, base=base, layers=["all"], progress=False, policy=lambda model, one, group: model.run(one, group)
    )  # fmt: skip
    torch.testing.assert_close(found.values[0, 0, 0], torch.ones(12, dtype=torch.float64), rtol=0, atol=1e-4)
    assert float(found.residual.max()) < 1e-4


def test_pooled_weighs_by_how_far_the_trajectories_lie_apart(of_layers: InjectionResult) -> None:
    weight = (of_layers.source - of_layers.base).flatten(0, 1).square().sum(0)
    expected = (of_layers.values[0, 2, 0] * weight).sum() / weight.sum()
    assert float(of_layers.pooled[0, 2, 0]) == pytest.approx(float(expected))
    assert set(of_layers.table().columns) >= {"region", "layer", "step", "beta", "low", "high", "residual", "override"}


def test_the_prefix_is_what_an_action_tower_reads_or_the_tower_that_speaks(
    policy: cv.HookedModel, openvla: cv.HookedModel
) -> None:
    assert prefix_tower(policy) == "language"
    assert prefix_tower(openvla) == "language"
    assert prefix_tower(cv.HookedModel(shared_model("vit"))) == "vision"


@pytest.mark.parametrize(
    "wrong",
    [{"what": "keys"}, {"tower": "arm"}, {"layers": [9]}, {"layers": []}, {"steps": [3]}, {"base": None}],
)
def test_what_is_not_there_is_refused(
    policy: cv.HookedModel, sides: tuple[dict[str, Any], dict[str, Any]], wrong: dict[str, Any]
) -> None:
    source, base = ({name: value[:4] for name, value in one.items()} for one in sides)
    with pytest.raises(InputError):
        inject(policy, **{"source": source, "base": base, "progress": False, **wrong})


def test_a_still_model_cannot_be_injected() -> None:
    still = cv.HookedModel(shared_model("vit"))
    inputs = case("vit").inputs(still.module)
    with pytest.raises(cv.CircuitVisionError, match="does not act"):
        inject(still, source=inputs, base=inputs)

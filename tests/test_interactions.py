"""Interactions of components: gates with known numbers, additive and chained models, a plain PyTorch oracle, and what cannot be meant."""

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.data import Pairs
from circuitvision.errors import InputError
from circuitvision.metrics import logit_diff
from circuitvision.patching import InteractionResult, activation_patch, interactions
from circuitvision.patching.interaction_claims import interacts, repairs
from tests import gates
from tests.sweeps.drawing import model_of
from tests.toy_model import ToyModel
from tests.zoo import CASES, shared_model

EXACT = {"atol": 1e-9, "rtol": 0}
NAN = math.nan


@cache
def network(values: tuple[float, ...]) -> cv.HookedModel:
    return gates.gate(values)


def played(values: tuple[float, ...], clean: Any = None, corrupt: Any = None, **more: Any) -> InteractionResult:
    """The heads of a gate as components; clean bits are 1 and corrupt ones 0."""
    heads = len(values) - 1
    options = {"components": [f"L0H{head}" for head in range(heads)], "order": "all", "progress": False, **more}
    return interactions(
        network(values), metric=lambda logits: gates.value(logits, heads), clean=gates.pictures(clean or [[1] * heads]),
        corrupt=gates.pictures(corrupt or [[0] * heads]), **options,
    )  # fmt: skip


def check(result: Any, expected: Any) -> None:
    """Compare with the values of the only example."""
    torch.testing.assert_close(result.values[..., 0], torch.tensor(expected).double(), equal_nan=True, **EXACT)


# -- known answers -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("values", [gates.AND, gates.OR, gates.XOR, (2.0, -1.0, 0.5, 3.0)])
def test_a_hand_built_gate_is_the_gate(values):
    heads = len(values) - 1
    rows = gates.every_input(heads)
    with torch.no_grad():
        found = gates.value(network(values)(gates.pictures(rows)), heads)
    expected = torch.tensor([values[sum(row)] for row in rows], dtype=torch.float64)
    torch.testing.assert_close(found, expected, **EXACT)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("values", "dividends", "kind", "before", "after"),
    [
        (gates.AND, [0, 0, 1], "cooperation", 1, 0),
        (gates.OR, [1, 1, -1], "backup", 0, 1),
        (gates.XOR, [1, 1, -2], "opposition", -1, 1),
    ],
)
def test_and_or_xor_have_their_known_numbers(values, dividends, kind, before, after, mode):
    # What the network says with nothing intact is no one's doing.
    result = played(tuple(value + 0.5 for value in values), mode=mode)
    assert result.axes["coalition"] == ["none", "vision L0H0", "vision L0H1", "all"]
    assert result.dividends().values[:, 0].tolist() == pytest.approx(dividends, abs=1e-9)
    assert result.shapley().values[:, 0].tolist() == pytest.approx([values[2] / 2] * 2, abs=1e-9)
    effects = result.conditional()
    assert effects.axes["removed"] == ["none", "vision L0H0", "vision L0H1"]
    check(effects, [[before, NAN, after], [before, after, NAN]])
    check(effects.self_repair(), [[NAN, after - before], [after - before, NAN]])
    for rest in ("removed", "intact"):
        pairs = result.pairs(rest)
        check(pairs, [[NAN, dividends[2]], [dividends[2], NAN]])
        told = interacts(pairs)
        assert told.holds
        assert told.about["kind"] == (kind if rest == "removed" or kind != "opposition" else told.about["kind"])
    assert repairs(effects).holds is (after > before)


@pytest.mark.parametrize("values", [(2.0, -1.0, 0.5, 3.0), (0.0, 0.0, 0.0, 1.0), (0.0, 1.0, 0.0, 1.0)])
def test_dividends_and_shapley_values_of_three_are_those_of_the_count(values):
    result = played(values)
    assert result.complete
    dividends = result.dividends()
    for size in (1, 2, 3):
        expected = sum((-1) ** (size - count) * math.comb(size, count) * values[count] for count in range(size + 1))
        own = [number for number, members in enumerate(dividends.members) if len(members) == size]
        assert dividends.values[own, 0].tolist() == pytest.approx([expected] * math.comb(3, size), abs=1e-9)
    for rest, expected in (
        ("removed", values[2] - 2 * values[1] + values[0]),
        ("intact", values[3] - 2 * values[2] + values[1]),
    ):
        assert float(result.pairs(rest).values[0, 1]) == pytest.approx(expected, abs=1e-9)
    gap = values[3] - values[0]
    assert float(dividends.values.sum(0)) == pytest.approx(gap, abs=1e-9)
    # Efficiency, and symmetry of three alike.
    assert result.shapley().values[:, 0].tolist() == pytest.approx([gap / 3] * 3, abs=1e-9)
    assert result.together().values[:, 0].tolist() == pytest.approx([gap, 3 * (values[1] - values[0])], abs=1e-9)
    # Möbius and back: v(S) is the sum of the dividends inside S.
    for members, value in zip(result.members, result.values[:, 0], strict=True):
        inside = [number for number, own in enumerate(dividends.members) if set(own) <= set(members)]
        assert values[0] + float(dividends.values[inside, 0].sum()) == pytest.approx(float(value), abs=1e-9)


def test_a_component_that_is_the_same_in_both_runs_is_a_dummy():
    result = played((0.0, 1.0, 0.0, 1.0), clean=[[1, 1, 0]])
    shapley, pairs = result.shapley().values[:, 0], result.pairs().values[..., 0]
    assert shapley[2] == pytest.approx(0, abs=1e-9)
    assert pairs[2, :2].tolist() == pytest.approx([0, 0], abs=1e-9)
    assert pairs[0, 1] == pytest.approx(-2, abs=1e-9)
    assert result.conditional().values[2, [0, 1, 2], 0].tolist() == pytest.approx([0, 0, 0], abs=1e-9)


def test_heads_that_back_each_other_up_count_as_one_component():
    alone = played(gates.OR, components=["L0H0", "L0H1"])
    assert alone.pairs("intact").alone[:, 0].tolist() == pytest.approx([0, 0], abs=1e-9)
    # 3 of 3 are needed: two of them as one need the third.
    grouped = played((0.0, 0.0, 0.0, 1.0), components={"two": ["L0H0", "L0H1"], "third": "L0H2"})
    assert grouped.components == ["two", "third"]
    assert grouped.dividends().values[:, 0].tolist() == pytest.approx([0, 0, 1], abs=1e-9)
    named = played((0.0, 0.0, 0.0, 1.0), components=[["L0H0", "L0H1"], "L0H2"])
    assert named.components == ["vision L0H0 & vision L0H1", "vision L0H2"]
    assert torch.equal(named.values, grouped.values)


def test_order_2_runs_singles_and_pairs_intact_and_missing():
    values = (0.0, 1.0, 3.0, 3.0, 7.0, 4.0, 8.0)
    whole, part = played(values), played(values, order=2)
    assert len(part.members) == 1 + 6 + 15 + 15 + 6 + 1
    assert whole.complete
    assert not part.complete
    for rest in ("removed", "intact"):
        torch.testing.assert_close(part.pairs(rest).values, whole.pairs(rest).values, equal_nan=True, **EXACT)
    torch.testing.assert_close(part.conditional().values, whole.conditional().values, equal_nan=True, **EXACT)
    few, every = part.dividends(), whole.dividends()
    assert max(map(len, few.members)) == 2
    assert not few.complete
    torch.testing.assert_close(few.values, every.values[:21], **EXACT)
    with pytest.raises(InputError, match="all"):
        part.shapley()
    assert float(whole.v("vision L0H0", "vision L0H2")) == pytest.approx(3.0, abs=1e-9)
    with pytest.raises(InputError, match="no component"):
        whole.v("L0H0")
    with pytest.raises(InputError, match="No run"):
        InteractionResult(
            torch.zeros(2, 1), {"coalition": ["a", "b"], "example": [0]}, components=["x", "y"], members=[[], [0]]
        ).pairs()


def test_shapley_values_of_drawn_orders():
    values = (0.0, 0.0, 3.0, 3.0, 10.0)
    exact = played(values, clean=[[1, 1, 1, 1], [1, 1, 1, 0]], corrupt=[[0, 0, 0, 0]] * 2)
    few = played(
        values, clean=[[1, 1, 1, 1], [1, 1, 1, 0]], corrupt=[[0, 0, 0, 0]] * 2, order="sampled", draws=12, seed=5
    )
    found, known = few.shapley(), exact.shapley()
    assert (found.draws, known.draws) == (12, 0)
    # Every order adds up to the whole.
    torch.testing.assert_close(found.values.sum(0), exact.together().values[0], **EXACT)
    assert bool(((found.mean() - known.mean()).abs() <= 4 * found.sampling_error).all())
    assert bool((found.sampling_error > 0).all())
    assert not bool(known.sampling_error.any())
    again = played(values, order="sampled", draws=12, seed=5)
    assert again.orders == few.orders != played(values, order="sampled", draws=12, seed=6).orders
    # All orders once are no sample any more.
    every = [list(order) for order in itertools.permutations(range(4))]
    known_too = InteractionResult(
        exact.values, exact.axes, components=exact.components, members=exact.members, orders=every
    ).shapley()
    torch.testing.assert_close(known_too.values, known.values, **EXACT)
    assert bool(known_too.sampling_error.gt(0).any())


# -- additive and chained models -------------------------------------------------------------------------------------------------------------------

PICTURES = {
    "clean": {"picture": torch.tensor([2.0, 4.0]).double()},
    "corrupt": {"picture": torch.tensor([-1.0, 1.0]).double()},
}


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_components_that_add_up_do_not_interact(mode):
    weights = torch.tensor([[1.0, 2.0, 0.0], [3.0, -1.0, 5.0]], dtype=torch.float64)
    toy = ToyModel(weights, torch.tensor([[0.25, 0.0]], dtype=torch.float64))
    names = [f"vision L{layer}H{head}" for layer in range(2) for head in range(3)]
    result = interactions(toy, metric=logit_diff(0, 1), components=names, order="all", mode=mode, **PICTURES)
    # The picture differs by 3 in both examples; 0.75 of what the vision tower says reaches the logit.
    effects = weights.flatten()[:, None].expand(-1, 2) * 0.75 * 3
    torch.testing.assert_close(result.shapley().values, effects, **EXACT)
    torch.testing.assert_close(result.dividends().values[:6], effects, **EXACT)
    assert float(result.dividends().values[6:].abs().max()) < 1e-9
    for rest in ("removed", "intact"):
        assert float(result.pairs(rest).values.nan_to_num(0).abs().max()) < 1e-9
        assert not interacts(result.pairs(rest)).holds
    assert not repairs(result.conditional()).holds
    # Every coalition is run once; the one in which nothing changes is the base run.
    assert len(result.members) == 64


def chained(**options: Any) -> list[float]:
    """``v`` of nothing, of the first, of the second, and of both of a chain: the projector's output, and the head that alone reads it."""
    toy = ToyModel(torch.ones(1, 1).double(), torch.ones(1, 1).double(), leak=0.0)
    result = interactions(
        toy, metric=logit_diff(0, 1), components=["projector.hook_out", "language L0H0"], **PICTURES, **options
    )
    return result.values[:, 0].tolist()


def test_a_chain_is_no_backup():
    assert chained(mode="noise") == [-1, -1, -1, 2]
    # The second is held: what the first says reaches nothing that is not in its own coalition.
    assert chained(mode="denoise") == [-1, -1, 2, 2] == chained(mode="noise", hold=True)
    # Unheld it follows the first, and either seems to do.
    assert chained(mode="denoise", hold=False) == [-1, 2, 2, 2]


# -- oracles ---------------------------------------------------------------------------------------------------------------------------------------


def out_projection(module: Any, path: str) -> Any:
    return dict(module.named_modules())[path]


class ByHand:
    """``v(S)`` with PyTorch's hooks alone: what enters output projections is recorded, and written."""

    def __init__(self, module: Any, clean: Any, corrupt: Any, heads: list[tuple[str, int, int]]) -> None:
        self.module, self.heads = module, heads
        self.inputs = {"clean": clean, "corrupt": corrupt}
        self.held = {name: self._record(inputs) for name, inputs in self.inputs.items()}

    def _record(self, inputs: Any) -> dict[str, Tensor]:
        held: dict[str, Tensor] = {}
        handles = []
        for path in {path for path, _, _ in self.heads}:
            part = out_projection(self.module, path)
            handles.append(
                part.register_forward_pre_hook(lambda _, args, path=path: held.__setitem__(path, args[0].clone()))
            )
        with torch.no_grad():
            self.module(**inputs)
        for handle in handles:
            handle.remove()
        return held

    def __call__(self, intact: set[int], mode: str, hold: bool) -> Tensor:
        base, other = ("corrupt", "clean") if mode == "denoise" else ("clean", "corrupt")
        handles = []
        for number, (path, head, size) in enumerate(self.heads):
            changed = (number in intact) == (mode == "denoise")
            if not changed and not hold:
                continue
            own = self.held[other if changed else base][path]

            def write(_: Any, args: Any, own: Tensor = own, head: int = head, size: int = size) -> Any:
                value = args[0].clone()
                value[..., head * size : (head + 1) * size] = own[..., head * size : (head + 1) * size]
                return (value, *args[1:])

            handles.append(out_projection(self.module, path).register_forward_pre_hook(write))
        with torch.no_grad():
            logits = self.module(**self.inputs[base]).logits
        for handle in handles:
            handle.remove()
        logits = logits[:, -1] if logits.ndim == 3 else logits
        return logits[:, 1] - logits[:, 3]


VIT = ("vit.layers.{}.attention.o_proj", 6)
SEES = ("model.vision_tower.encoder.layers.{}.self_attn.out_proj", 4)
SPEAKS = ("model.language_model.layers.{}.self_attn.o_proj", 6)
ORACLES = {
    "vit": {"vision L0H1": (VIT, 0, 1), "vision L0H2": (VIT, 0, 2), "vision L1H0": (VIT, 1, 0), "vision L2H3": (VIT, 2, 3)},
    "llava-clip-llama": {
        "vision L0H4": (SEES, 0, 4), "vision L1H1": (SEES, 1, 1), "language L0H2": (SPEAKS, 0, 2), "language L1H0": (SPEAKS, 1, 0)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", ORACLES)
@pytest.mark.parametrize(("mode", "hold"), [("denoise", True), ("denoise", False), ("noise", False), ("noise", True)])
def test_every_coalition_is_what_hooks_by_hand_give(name, mode, hold):
    model = model_of(name, torch.float64)
    clean, corrupt = both_inputs(name, model)
    heads = [(path.format(layer), head, size) for (path, size), layer, head in ORACLES[name].values()]
    by_hand = ByHand(model.module, clean, corrupt, heads)
    result = interactions(
        model, metric=logit_diff(1, 3), components=list(ORACLES[name]), order="all", mode=mode, hold=hold, clean=clean, corrupt=corrupt,
        progress=False,
    )  # fmt: skip
    expected = torch.stack([by_hand(set(members), mode, hold) for members in result.members])
    torch.testing.assert_close(result.values, expected, atol=1e-10, rtol=1e-8)
    i, j = 0, 3
    own = {frozenset(members): value for members, value in zip(result.members, expected, strict=True)}
    pair = own[frozenset({i, j})] - own[frozenset({i})] - own[frozenset({j})] + own[frozenset()]
    torch.testing.assert_close(result.pairs().values[i, j], pair, atol=1e-10, rtol=1e-7)
    assert float(pair.abs().max()) > 1e-6
    gap = own[frozenset(range(4))] - own[frozenset()]
    torch.testing.assert_close(result.dividends().values.sum(0), gap, atol=1e-10, rtol=1e-7)
    torch.testing.assert_close(result.shapley().values.sum(0), gap, atol=1e-10, rtol=1e-7)


def both_inputs(
    name: str, model: cv.HookedModel, batch: int = 3, dtype: torch.dtype = torch.float64
) -> tuple[Any, Any]:
    clean, corrupt = (CASES[name].inputs(model.module, batch=batch, seed=seed, dtype=dtype) for seed in (1, 2))
    return clean, {**clean, "pixel_values": corrupt["pixel_values"]}


@pytest.mark.parametrize(
    "name", ["dinov2", "clip-vision-projection", "clip", "llava-siglip-qwen2", "paligemma", "openvla"]
)
def test_single_ones_are_what_activation_patching_gives_in_any_family(name):
    model = model_of(name, torch.float32)
    clean, corrupt = both_inputs(name, model, dtype=torch.float32)
    site = "vision.blocks.*.attn.hook_z"
    metric = (lambda out: out.flatten(1)[:, 0]) if not model.family.answer else logit_diff(1, 2)
    given = {"metric": metric, "clean": clean, "corrupt": corrupt, "progress": False}
    patched = activation_patch(model, sites=site, **given)
    result = interactions(model, components=["vision L0H0", "vision L0H1", "vision L1H0"], hold=False, **given)
    alone = result.pairs().alone
    expected = torch.stack([patched.values[0, 0], patched.values[0, 1], patched.values[1, 0]]).double()
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=1e-3)


def test_an_action_expert_and_half_precision():
    model = cv.HookedModel(shared_model("pi0"))
    clean, corrupt = (CASES["pi0"].inputs(model.module, batch=2, seed=seed) for seed in (1, 2))
    corrupt = {**clean, "pixel_values": corrupt["pixel_values"]}
    names = {"seen": "vision L0H0", "read": "language L0.attn", "done": "action L0.mlp"}
    metric = cv.metrics.action_dim(0)
    result = interactions(
        model, metric=metric, components=names, order="all", clean=clean, corrupt=corrupt, progress=False
    )
    torch.testing.assert_close(result.dividends().values.sum(0), result.v(*names) - result.v(), atol=1e-5, rtol=1e-4)
    half = model_of("vit", torch.bfloat16)
    clean, corrupt = both_inputs("vit", half, dtype=torch.bfloat16)
    result = interactions(
        half, metric=logit_diff(1, 3), components=["L0H0", "L1H1"], clean=clean, corrupt=corrupt, progress=False
    )
    assert bool(result.pairs().values[0, 1].isfinite().all())
    training = gates.gate(gates.OR)
    training.module.vit.register_module("drop", torch.nn.Dropout(0.5))
    training.module.train()
    both = {"clean": gates.pictures([[1, 1]]), "corrupt": gates.pictures([[0, 0]])}
    with pytest.raises(InputError, match="eval"):
        interactions(training, metric=logit_diff(1, 0), components=["L0H0", "L0H1"], **both)


# -- what a component may be -------------------------------------------------------------------------------------------------------------------------


def vit(components: Any, **more: Any) -> InteractionResult:
    model = model_of("vit", torch.float64)
    clean, corrupt = both_inputs("vit", model)
    return interactions(
        model,
        metric=logit_diff(1, 3),
        components=components,
        **{"clean": clean, "corrupt": corrupt, "progress": False, **more},
    )


def test_one_component_in_many_words():
    expected = vit(["vision L0H1", "vision L1.mlp"])
    assert expected.components == ["vision L0H1", "vision L1.mlp"]
    neurons = [f"vision L1N{number}" for number in range(40)]
    for first in (
        "L0H1",
        "v.a0.h1",
        (0, 1),
        ("vision", 0, 1),
        {"site": "vision.blocks.0.attn.hook_z", "heads": 1},
        {"site": "L0H1"},
    ):
        found = vit([first, "L1.mlp"])
        assert torch.equal(found.values, expected.values)
    for second in (
        "vision.blocks.1.hook_mlp_out",
        {"site": "vision.blocks.1.mlp.hook_post", "neurons": range(40)},
        neurons,
    ):
        found = vit({"head": (0, 1), "mlp": second})
        torch.testing.assert_close(found.values, expected.values, atol=1e-10, rtol=1e-9)
    few = vit({"head": (0, 1), "first": neurons[:20], "rest": neurons[20:]})
    both = few.v("first", "rest"), few.v("head", "first", "rest")
    torch.testing.assert_close(
        torch.stack(both), torch.stack([expected.v("vision L1.mlp"), expected.v(*expected.components)])
    )
    assert not torch.equal(few.v("first"), few.v())


def test_positions_and_edits_by_hand():
    model = model_of("vit", torch.float64)
    clean, _ = both_inputs("vit", model)
    site = "vision.blocks.1.hook_resid_post"
    _, held = model.run_with_cache(clean, names_filter=[site])
    places = {name: {"site": site, "positions": where} for name, where in (("class", 0), ("patches", slice(1, None)))}
    result = vit(places)
    assert not torch.equal(result.v("class"), result.v())
    by_hand = {name: edits.replace(site, held, positions=where["positions"]) for name, where in places.items()}
    found = vit(by_hand)
    assert torch.equal(found.values, result.values)
    assert (found.hold, result.hold) == (False, True)
    # In the other modes an edit takes its component away; a list of edits is one.
    removed = [edits.scale("vision.blocks.0.attn.hook_z", 0.0, heads=head) for head in (0, 1)]
    away = vit({"heads": removed, "mlp": "vision L2.mlp"}, mode="ablate", method="zero", corrupt=None)
    known = vit({"heads": ["L0H0", "L0H1"], "mlp": "vision L2.mlp"}, mode="ablate", method="zero", corrupt=None)
    assert torch.equal(away.values, known.values)


def test_ablation_is_that_of_edits():
    model = model_of("vit", torch.float64)
    clean, _ = both_inputs("vit", model, batch=4)
    sites = {"one": ("vision.blocks.0.attn.hook_z", 1), "two": ("vision.blocks.1.attn.hook_z", 2)}
    metric = logit_diff(1, 3)
    pairs = Pairs(inputs=clean, corrupt_inputs=clean, answers=[1] * 4, foils=[3] * 4)
    for method in ("zero", "mean", "resample"):
        for data, size in ((None, None), (pairs, 3), (pairs.clean, None)):
            given = {"clean": clean} if data is None else {"pairs": data, "example_batch": size}
            result = interactions(
                model, metric=metric if data is None else "logit_diff", components=["L0H1", "L1H2"], mode="ablate", method=method, seed=3,
                allow_wrong=True, progress=False, **given,
            )  # fmt: skip
            own = {"seed": 3, "dataset": None if data is None else pairs.clean}
            made = {name: edits.ablate(site, method, heads=head, **own) for name, (site, head) in sites.items()}
            groups = [tuple(made.values()), (made["two"],), (made["one"],)]
            swept = model.sweep(clean if data is None else pairs.clean, groups, metric, progress=False)
            torch.testing.assert_close(result.values[:3], swept.values, **EXACT)
            torch.testing.assert_close(result.values[3], swept.clean, **EXACT)
    neurons = interactions(
        model, metric=metric, components=["L0N1", "L0N2"], mode="ablate", clean=clean, progress=False
    )
    means = [edits.ablate("vision.blocks.0.mlp.hook_post", "mean", neurons=number) for number in (1, 2)]
    swept = model.sweep(clean, [(means[0], means[1]), means[1], means[0]], metric, progress=False)
    torch.testing.assert_close(neurons.values[:3], swept.values, **EXACT)
    zeroed = interactions(
        model,
        metric=metric,
        components=[["L0N1", "L0N5"], "L0N2"],
        mode="ablate",
        method="zero",
        clean=clean,
        progress=False,
    )
    edit = edits.overwrite("vision.blocks.0.mlp.hook_post", (1, 5), 0.0)
    torch.testing.assert_close(zeroed.v("vision L0N2"), metric(model.run(clean, [edit]), clean).detach(), **EXACT)


# -- over data sets --------------------------------------------------------------------------------------------------------------------------------


def in_pairs(clean: list[list[int]], corrupt: list[list[int]]) -> Pairs:
    given = [{name: value[[row]] for name, value in gates.pictures(clean).items()} for row in range(len(clean))]
    other = [{name: value[[row]] for name, value in gates.pictures(corrupt).items()} for row in range(len(corrupt))]
    return Pairs(inputs=given, corrupt_inputs=other, groups=[row // 2 for row in range(len(clean))])


def test_pairs_in_batches_are_the_inputs_in_memory():
    bits = [[1, 1], [1, 0], [0, 1], [1, 1], [0, 0]], [[0, 0], [0, 0], [1, 1], [1, 0], [1, 1]]
    memory = played(gates.OR, *bits)
    found = interactions(
        network(gates.OR), in_pairs(*bits), lambda logits: gates.value(logits, 2), components=["L0H0", "L0H1"], order="all", example_batch=2,
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(found.values, memory.values, **EXACT)
    assert found.groups == [0, 0, 1, 1, 2]
    assert found.pairs().interval().shape == (2, 2, 2)


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_a_permuted_pairing_takes_the_values_of_other_examples(mode):
    bits = [[1, 1], [0, 0], [1, 0], [1, 1]], [[0, 0], [1, 1], [0, 1], [0, 0]]
    pairs = in_pairs(*bits)
    options = {"components": ["L0H0", "L0H1"], "order": "all", "mode": mode, "progress": False}
    result = interactions(
        network(gates.AND), pairs, lambda logits: gates.value(logits, 2), permutations=3, seed=1, **options
    )
    assert result.null.shape == (3, 4, 4)
    # In a cycle no example keeps its partner, and each is taken once: every null is one of the six cycles of four.
    base, source = bits[::-1] if mode == "denoise" else bits
    cycles = []
    for order in itertools.permutations(range(4)):
        walk = [0]
        while order[walk[-1]] not in walk:
            walk.append(order[walk[-1]])
        if len(walk) == 4:
            moved = [source[order[row]] for row in range(4)]
            cycles.append(played(gates.AND, *((moved, base) if mode == "denoise" else (base, moved)), mode=mode).values)
    for own in result.null:
        assert any(torch.allclose(own, known, atol=1e-9) for known in cycles)
    null = result.pairs().null
    assert null.shape == (3, 2, 2)
    p_value = result.pairs().p_value
    value = float(result.pairs().mean()[0, 1])
    assert float(p_value[0, 1]) == pytest.approx((1 + int((null[:, 0, 1].abs() >= abs(value)).sum())) / 4)
    again = interactions(
        network(gates.AND), pairs, lambda logits: gates.value(logits, 2), permutations=3, seed=1, **options
    )
    assert torch.equal(again.null, result.null)


def test_information_about_the_example_is_told_from_change_by_the_null():
    # Half of the examples are of one kind, half of the other, and the corrupt side is of the other kind: with values of another example nothing
    # happens where that is of the other kind, so a permuted pairing has about half of the interaction.
    codes = [[1, 1, 1], [0, 0, 0]] * 8
    pairs = in_pairs(codes, [[1 - bit for bit in row] for row in codes])

    def right(logits: Tensor, inputs: Any) -> Tensor:
        # The base run is the corrupt one: its pixels say which kind this is.
        return torch.where(inputs["pixel_values"][:, 0, 0, 0] < 0, 1.0, -1.0) * gates.value(logits, 3)

    gate = network((-1.0, 0.0, 0.0, 1.0))
    names = [f"L0H{head}" for head in range(3)]
    found = interactions(gate, pairs, right, components=names, permutations=19, progress=False).pairs()
    told = interacts(found)
    assert told.holds
    assert told.value == pytest.approx(-1)
    assert told.chance < 1
    assert float(found.p_value[0, 1]) == pytest.approx(1 / 20)
    assert "19 permuted pairings" in title(found.plot())


# -- results ---------------------------------------------------------------------------------------------------------------------------------------


def test_results_survive_files_and_parts(tmp_path):
    bits = [[1, 1], [1, 0], [0, 1]], [[0, 0], [0, 0], [1, 1]]
    options = {"components": ["L0H0", "L0H1"], "permutations": 2, "progress": False}
    metrics = {"value": lambda logits: gates.value(logits, 2), "logit": lambda logits: logits[:, 1]}
    result = interactions(network(gates.OR), in_pairs(*bits), metrics, **options)
    assert list(result.axes) == ["metric", "coalition", "example"]
    again = InteractionResult.load(result.save(tmp_path / "result.npz"))
    assert torch.equal(again.values, result.values)
    assert torch.equal(again.null, result.null)
    assert (again.members, again.hold) == (result.members, True)
    for made in (result.pairs(), result.dividends(), result.shapley(), result.conditional()):
        assert next(iter(made.axes)) == "metric"
        single = made.of("value")
        alone = getattr(
            result.of("value"),
            {"PairInteractions": "pairs", "Dividends": "dividends", "ShapleyValues": "shapley"}.get(
                type(made).__name__, "conditional"
            ),
        )()
        torch.testing.assert_close(single.values, alone.values, equal_nan=True, **EXACT)
        assert type(made).load(made.save(tmp_path / f"{type(made).__name__}.npz")).axes == made.axes
        assert made.plot().layout.title.text
    torch.testing.assert_close(result.pairs().of("value").null, result.of("value").pairs().null, equal_nan=True)
    assert result.pairs().p_value.shape == (2, 2, 2)
    part = result.take([0, 2])
    torch.testing.assert_close(part.pairs().values, result.pairs().values[..., [0, 2]], equal_nan=True)
    assert part.null.shape[-1] == 2
    frame = result.of("logit").to_frame()
    assert list(frame.columns) == ["coalition", "example", "value", "size"]
    assert sorted(set(frame["size"])) == [0, 1, 2]
    with pytest.raises(InputError, match="Several metrics"):
        result.component_scores()
    assert "all together" in result.highlights()
    assert result.provenance["metric"] == "value, logit"
    assert "order=" not in result.edits[0][0].kind


def test_an_example_without_a_value_is_left_out_alone():
    values = torch.arange(8.0).view(4, 2).double()
    values[1, 0] = NAN
    axes = {"coalition": ["none", "a", "b", "all"], "example": [0, 1]}
    result = InteractionResult(values, axes, components=["a", "b"], members=[[], [0], [1], [0, 1]])
    assert result.pairs().values[0, 1].isnan().tolist() == [True, False]
    assert result.dividends().values.isnan()[:, 0].tolist() == [True, False, True]
    assert not result.conditional().values[0, 0].isnan().any()


def test_a_sweep_is_continued_from_its_folder(tmp_path):
    bits = [[1, 1], [1, 0], [0, 1]], [[0, 0], [0, 0], [1, 1]]
    options = {"components": ["L0H0", "L0H1"], "permutations": 1, "progress": False, "save_to": tmp_path}
    metric = logit_diff(1, 0)
    result = interactions(network(gates.OR), in_pairs(*bits), metric, **options)
    again = interactions(network(gates.OR), in_pairs(*bits), metric, resume=True, **options)
    assert torch.equal(again.values, result.values)
    assert torch.equal(again.null, result.null)


# -- figures and words -----------------------------------------------------------------------------------------------------------------------------


def title(figure: Any) -> str:
    return figure.layout.title.text.replace("<br>", " ")


def test_figures_say_what_was_found():
    three = [[1, 1, 1]] * 3, [[0, 0, 0]] * 3
    backup = played((0.0, 1.0, 1.0, 1.0), *three)
    figure = backup.plot()
    assert str(interacts(backup.pairs())) in title(figure)
    assert "back each other up" in title(figure)
    heat = next(trace for trace in figure.data if trace.type == "heatmap")
    # Each pair once: below the diagonal.
    assert [[value == value for value in line] for line in heat.z.tolist()] == [[True, False], [True, True]]
    assert float(heat.z[0, 0]) == pytest.approx(-1, abs=1e-6)
    assert "need each other" in title(played((0.0, 0.0, 0.0, 1.0), *three).pairs("intact").plot())
    assert "No two components" in title(played((0.0, 1.0, 2.0, 3.0), *three).plot())
    assert "work against each other" in title(played((0.0, 1.0, 0.0, 1.0), *three).plot())
    both = [[1, 1]] * 3, [[0, 0]] * 3
    assert "steps in for" in title(played(gates.OR, *both).conditional().plot())
    assert "No component clearly" in title(played(gates.AND, *both).conditional().plot())
    bars = backup.shapley().plot().data[0]
    assert list(bars.x) == pytest.approx([1 / 3] * 3)
    assert "random orders" in title(played((0.0, 1.0, 1.0, 1.0), *three, order="sampled", draws=4).plot())
    assert sorted(backup.dividends().plot().data[0].x) == pytest.approx([-1.0] * 3 + [1.0] * 4, abs=1e-9)


def test_where_components_lower_the_metric_backup_is_above_zero():
    result = played((0.0, -1.0, -1.0), [[1, 1]] * 3, [[0, 0]] * 3)
    assert float(result.pairs().mean()[0, 1]) == pytest.approx(1)
    assert interacts(result.pairs()).about["kind"] == "backup"
    assert "orange: backup" in title(result.plot())
    assert repairs(result.conditional()).holds


def test_few_permuted_pairings_affirm_nothing():
    bits = [[1, 1]] * 4, [[0, 0]] * 4
    metric = lambda logits: gates.value(logits, 2)  # noqa: E731
    # All examples are alike, so values of another one do as much.
    result = interactions(
        network(gates.OR), in_pairs(*bits), metric, components=["L0H0", "L0H1"], permutations=2, progress=False
    )
    told = interacts(result.pairs())
    assert not told.holds
    assert "other examples" in told.reason


# -- bad input -------------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"components": ["L0H0"]}, "two at least"),
        ({"components": "L0H0"}, "list"),
        ({"components": ["L0H0", "vision L0H0"]}, "twice"),
        ({"components": ["L0H0", []]}, "empty"),
        ({"components": ["L0H0", 3.5]}, "no component"),
        ({"components": ["L0H0", {"heads": 1}]}, "'site'"),
        ({"components": ["L0H0", {"site": "L0H1", "where": 1}]}, "where"),
        ({"components": ["L0H0", {"site": "vision.blocks.0.mlp.hook_post", "neurons": 999}]}, "neurons"),
        ({"components": [f"L0H{head}" for head in range(11)], "order": "all"}, "sampled"),
        ({"order": 3}, "order"),
        ({"order": "sampled", "draws": 1}, "draws"),
        ({"mode": "both"}, "mode"),
        ({"permutations": -1}, "permutations"),
        ({"permutations": 2}, "pairs"),
        ({"mode": "ablate", "clean": None}, "clean"),
        ({"metric": None}, "metric"),
        ({"corrupt": {"pixel_values": torch.zeros(1, 1, 4, 4)}}, "one size"),
        ({"hold": True, "components": [edits.scale("vision.blocks.0.attn.hook_z", 0.0), "L0H1"]}, "hold"),
    ],
)
def test_meaningless_requests_are_refused_before_anything_runs(options, message, monkeypatch):
    model = network(gates.OR)
    given = {
        "metric": logit_diff(1, 0), "components": ["L0H0", "L0H1"], "clean": gates.pictures([[1, 1]]), "corrupt": gates.pictures([[0, 0]]),
        **options,
    }  # fmt: skip

    def runs(*_: Any, **__: Any) -> None:
        raise AssertionError("something ran")

    if "neurons" not in message:
        monkeypatch.setattr(model, "run_with_cache", runs)
        monkeypatch.setattr(model, "sweep", runs)
    with pytest.raises(InputError, match=message):
        interactions(model, progress=False, **given)


def test_what_the_model_lacks_and_what_is_shared_is_refused():
    for wrong in ("L7H0", "vision.blocks.0.nothing", "text L0H0"):
        with pytest.raises(cv.CircuitVisionError):
            played(gates.OR, components=["L0H0", wrong])
    with pytest.raises(InputError, match="sets entries"):
        played(gates.OR, components=[["L0H0", "L0H1"], "L0H1"])
    pairs = in_pairs([[1, 1]], [[0, 0]])
    with pytest.raises(InputError, match="two pairs"):
        interactions(network(gates.OR), pairs, logit_diff(1, 0), components=["L0H0", "L0H1"], permutations=1)

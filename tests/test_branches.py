"""What follows a branch, and gradients at input slots: identities in float64 for every family, and mutants that the identities catch."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.errors import InputError, UnknownSiteError, UnsupportedModelError
from circuitvision.model import norms, slots
from circuitvision.model.branches import Branch, MLPBranch, ProjectedBranch
from circuitvision.model.weights import linear_weight
from tests.parts import module_of
from tests.zoo import CASES, Case, parametrize, shared_model

KINDS = ["vit", "dinov2", "llava-clip-llama", "paligemma2", "pi0"]
"""Nothing behind a branch, LayerScale, groups of query heads, sandwich norms, keys that another tower reads."""


def double(name: str) -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name)).to(torch.float64)
    return cv.HookedModel(module), CASES[name].inputs(module, batch=2, dtype=torch.float64)


def close(found: Tensor, expected: Tensor, tower: Any, name: str) -> None:
    """Equal in float64; RMS norms take their statistics in float32 whatever they are given."""
    bound = 2e-6 if tower.cfg.norm == "RMSNorm" else 1e-12
    size, gap = float(expected.detach().abs().amax()), float((found - expected).detach().abs().amax())
    assert found.shape == expected.shape, name
    assert gap <= bound * max(size, 1.0), f"{name}: {gap} of {size}"


# -- what is added ---------------------------------------------------------------------------------------------------------------------------


def check_heads_add_up(name: str) -> None:
    """Written heads and the bias are hook_attn_out, neurons and the bias hook_mlp_out, as computed and with norms held."""
    model, inputs = double(name)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        for tower in model.towers.values():
            for layer in range(tower.cfg.n_layers):
                p = f"{tower.name}.blocks.{layer}"
                for site, added in (
                    ("attn.hook_z", "hook_attn_out"),
                    ("attn.hook_result", "hook_attn_out"),
                    ("mlp.hook_post", "hook_mlp_out"),
                ):
                    if f"{p}.{added}" not in set(cache):
                        continue
                    value, expected = cache[f"{p}.{site}"], cache[f"{p}.{added}"]
                    close(tower.written(f"{p}.{site}", value), expected, tower, f"{p}.{site} as computed")
                    shares = tower.written(f"blocks.{layer}.{site}", value, frozen=cache)
                    total = shares if site == "mlp.hook_post" else shares.sum(-2)
                    total = total + tower.written_bias(f"{p}.{site}", frozen=cache)
                    close(total, expected, tower, f"{p}.{site} with norms held")
                    assert tower.written(f"{p}.{added}", expected, frozen=cache) is expected
                for norm, added in (("ln1_post", "hook_attn_out"), ("ln2_post", "hook_mlp_out")):
                    site = f"{p}.{norm}.hook_normalized"
                    if site in set(cache):
                        close(tower.written(site, cache[site]), cache[f"{p}.{added}"], tower, site)
                        linear = tower.written(site, cache[site], frozen=cache) + tower.written_bias(site)
                        close(linear, cache[f"{p}.{added}"], tower, site)


@parametrize()
def test_what_heads_and_neurons_write_adds_up_to_what_the_block_adds(case: Case) -> None:
    check_heads_add_up(case.name)


def check_held_maps_are_linear(name: str) -> None:
    """written(2a + b) = 2 written(a) + written(b) with norms held, whatever a and b are."""
    model, inputs = double(name)
    tower = list(model.towers.values())[-1]
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
        for site in ("attn.hook_z", "attn.hook_result", "mlp.hook_post", "hook_attn_out", "hook_mlp_out"):
            where = f"{tower.name}.blocks.1.{site}"
            one, two = (torch.randn(cache[where].shape, dtype=torch.float64) for _ in range(2))
            found, a, b = (tower.written(where, value, frozen=cache) for value in (2 * one + two, one, two))
            torch.testing.assert_close(found, 2 * a + b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("name", KINDS)
def test_with_norms_held_what_is_written_is_linear(name: str) -> None:
    torch.manual_seed(0)
    check_held_maps_are_linear(name)


def test_denominators_come_from_whatever_the_cache_holds() -> None:
    model, inputs = double("paligemma2")
    p, tower = "language.blocks.1", model.language
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, "**")
    z = cache[f"{p}.attn.hook_z"]
    expected = tower.written(f"{p}.attn.hook_z", z, frozen=cache)
    for site in ("ln1_post.hook_scale", "attn.hook_z", "attn.hook_result"):
        part = cv.ActivationCache({f"{p}.{site}": cache[f"{p}.{site}"]}, model, inputs)
        close(tower.written(f"{p}.attn.hook_z", z, frozen=part), expected, tower, site)
    with pytest.raises(InputError, match=r"ln1_post\.hook_scale"):
        tower.written(
            f"{p}.attn.hook_z",
            z,
            frozen=cv.ActivationCache({f"{p}.hook_attn_out": cache[f"{p}.hook_attn_out"]}, model, inputs),
        )
    with pytest.raises(InputError, match="frozen=cache"):
        tower.written_bias(f"{p}.attn.hook_z")


def test_one_pass_of_several_is_held_by_its_number() -> None:
    model, inputs = double("paligemma2")
    with torch.no_grad(), model.record("language.blocks.*.*.hook_*") as passes:
        model.generate(inputs, max_new_tokens=3, do_sample=False)
    p, tower = "language.blocks.1", model.language
    for step in (0, 2):
        z = passes.one_pass(f"{p}.attn.hook_z", step)
        found = tower.written(f"{p}.attn.hook_z", z, frozen=passes, step=step).sum(-2)
        with torch.no_grad():
            close(found, tower.written(f"{p}.attn.hook_z", z), tower, f"pass {step}")


def test_what_is_no_part_of_a_branch_is_refused() -> None:
    model, _ = double("vit")
    z = torch.zeros(1, 2, model.vision.cfg.n_heads, model.vision.cfg.d_head, dtype=torch.float64)
    for site in (
        "blocks.0.hook_resid_pre",
        "blocks.99.attn.hook_z",
        "blocks.0.attn.hook_q",
        "blocks.0.ln1_post.hook_normalized",
    ):
        with pytest.raises(UnknownSiteError, match=r"attn\.hook_z"):
            model.vision.written(site, z)
    with pytest.raises(InputError, match="ends in"):
        model.vision.written("blocks.0.attn.hook_z", z[..., :1])
    with pytest.raises(InputError, match="heads"):
        model.vision.head_results(z[..., :1, :], 0)
    with pytest.raises(InputError, match="biases included"):
        model.vision.written_bias("blocks.0.hook_attn_out")


def test_a_norm_that_no_table_describes_is_not_taken_for_a_scale() -> None:
    with pytest.raises(UnsupportedModelError, match="register_norm"):
        norms.following(torch.nn.Identity(), [torch.nn.RMSNorm(6)]).linear(torch.randn(2, 3, 6))
    scale = torch.nn.Module()
    scale.register_parameter("factor", torch.nn.Parameter(torch.arange(1.0, 7.0)))
    scale.forward = lambda value: value * scale.factor  # type: ignore[method-assign]
    value = torch.randn(2, 3, 6)
    torch.testing.assert_close(norms.following(scale, [scale]).linear(value), value * torch.arange(1.0, 7.0))


@pytest.mark.parametrize("centred", [True, False])
def test_the_transpose_of_a_held_norm_is_its_gradient(centred: bool) -> None:
    torch.manual_seed(0)
    if centred:
        module: torch.nn.Module = torch.nn.LayerNorm(7).double()
    else:
        module = module_of(double("paligemma2")[0].language.blocks[0], "ln1")
    width = next(module.parameters()).numel()
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    norm = norms.Norm(module)
    x, g = torch.randn(3, width, dtype=torch.float64, requires_grad=True), torch.randn(3, width, dtype=torch.float64)
    held = norm.denominator(torch.randn(3, width, dtype=torch.float64))
    (expected,) = torch.autograd.grad(norm.held(x, held), x, g)
    torch.testing.assert_close(norm.transposed(g, held), expected)


def forget_the_norm(patch: pytest.MonkeyPatch) -> None:
    """A norm behind a branch is left out."""
    right = norms.following
    patch.setattr(
        "circuitvision.model.branches.following", lambda block, then: _none_if(right(block, then), norms.Norm)
    )


def forget_the_scale(patch: pytest.MonkeyPatch) -> None:
    """LayerScale is left out."""
    right = norms.following
    patch.setattr(
        "circuitvision.model.branches.following", lambda block, then: _none_if(right(block, then), norms.Scale)
    )


def _none_if(found: Any, kind: type) -> Any:
    return norms.Identity() if isinstance(found, kind) else found


def hold_nothing(patch: pytest.MonkeyPatch) -> None:
    """Each head is divided by its own length."""
    right = norms.Norm.linear
    patch.setattr(norms.Norm, "linear", lambda norm, value, held=None: right(norm, value, norm.denominator(value)))


def forget_the_bias(patch: pytest.MonkeyPatch) -> None:
    """The output projection's bias does not pass what follows."""

    def bias(branch: Branch, like: Tensor, denominator: Tensor | None) -> Tensor:
        own = linear_weight(branch.output)[1]
        return like.new_zeros(branch.block.tower.cfg.d_model) if own is None else own

    patch.setattr(ProjectedBranch, "bias", bias)


@pytest.mark.parametrize(
    ("mutate", "name"),
    [
        (forget_the_norm, "paligemma2"),
        (forget_the_scale, "dinov2"),
        (hold_nothing, "paligemma2"),
        (forget_the_bias, "dinov2"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_identities_see_what_is_forgotten(mutate: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises((AssertionError, UnknownSiteError)):
        check_heads_add_up(name)


# -- gradients at slots ----------------------------------------------------------------------------------------------------------------------


def weights_of(out: Tensor) -> Tensor:
    return torch.randn(out.shape[1:], generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def metric(out: Tensor) -> Tensor:
    return (out * weights_of(out)).flatten(1).sum(1)


def check_slots(name: str) -> None:
    """Each slot's gradient is autograd's at the recorded slot, and the slots of a block add up to the stream's."""
    model, inputs = double(name)
    for tower in model.towers.values():
        every = f"{tower.name}.blocks.*.hook_"
        derived = [f"{every}{slot}" for slot in ("q_input", "k_input", "v_input", "mlp_in")]
        _, whole = model.run_with_cache(inputs, [*derived, *tower.slot_sites()], incl_bwd=True, metric=metric)
        _, cache = model.run_with_cache(inputs, tower.slot_sites(), incl_bwd=True, metric=metric)
        found = tower.slot_gradients(cache)
        assert list(found) == [name for name in model.sites(f"{every}*") if name in derived_names(model, derived)]
        assert len(found) == 4 * tower.cfg.n_layers
        for slot, gradient in found.items():
            expected = whole[f"{slot}_grad"]
            torch.testing.assert_close(gradient, expected, atol=1e-10, rtol=1e-10, msg=lambda m, s=slot: f"{s}: {m}")
        # Where the stream leaves the tower its gradient is also that of whoever reads it there.
        for layer in set(range(tower.cfg.n_layers)) - set(tower.feature_layers_in(inputs)):
            p = f"{tower.name}.blocks.{layer}"
            into = sum(found[f"{p}.hook_{letter}_input"].sum(-2) for letter in "qkv")
            assert isinstance(into, Tensor)
            close(
                into + cache[f"{p}.hook_resid_mid_grad"],
                cache[f"{p}.hook_resid_pre_grad"],
                tower,
                f"sum over slots of {p}",
            )


def derived_names(model: cv.HookedModel, globs: list[str]) -> set[str]:
    return {name for glob in globs for name in model.sites(glob)}


@parametrize()
def test_slot_gradients_are_those_of_the_recorded_slots(case: Case) -> None:
    check_slots(case.name)


def sum_groups_twice(patch: pytest.MonkeyPatch) -> None:
    """A key or value head's gradient is counted once for every query head that it serves."""
    right = slots.SlotGradients._per_head

    cfg = double("llava-clip-llama")[0].language.cfg

    def per_head(projection: Any, gradient: Tensor, normed: Tensor, stream: Tensor) -> Tensor:
        group = cfg.n_heads // cfg.n_kv_heads if gradient.shape[-2] == cfg.n_kv_heads else 1
        return group * right(projection, gradient, normed, stream)

    patch.setattr(slots.SlotGradients, "_per_head", staticmethod(per_head))


def forget_the_gate(patch: pytest.MonkeyPatch) -> None:
    """Gated MLPs are read as plain ones."""
    patch.setattr(MLPBranch, "inputs", property(lambda branch: {"mlp.hook_pre_linear": branch.fc_in}))


def take_the_norm_for_linear(patch: pytest.MonkeyPatch) -> None:
    """The norm's denominator is taken for a constant."""

    def per_head(projection: Any, gradient: Tensor, normed: Tensor, stream: Tensor) -> Tensor:
        norm = norms.Norm(double("llava-clip-llama")[0].vision.blocks[0].attn.norm)
        weight = projection.weight_and_bias()[0].detach().unflatten(1, (gradient.shape[-2], -1))
        entering = torch.einsum("...hd,mhd->...hm", gradient, weight)
        return norm.transposed(entering, norm.denominator(stream.detach()).unsqueeze(-2))

    patch.setattr(slots.SlotGradients, "_per_head", staticmethod(per_head))


@pytest.mark.parametrize("mutate", [sum_groups_twice, forget_the_gate, take_the_norm_for_linear])
def test_wrong_slot_gradients_are_seen(mutate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    mutate(monkeypatch)
    with pytest.raises(AssertionError):
        check_slots("llava-clip-llama")


def test_slots_of_one_row_without_its_axis_and_on_another_place() -> None:
    model, inputs = double("vit")
    row = {name: value[:1] for name, value in inputs.items()}
    _, cache = model.run_with_cache(row, incl_bwd=True, metric=metric)
    _, bare = model.run_with_cache(row, incl_bwd=True, metric=metric, remove_batch_dim=True)
    name = "vision.blocks.1.hook_q_input"
    torch.testing.assert_close(
        model.vision.slot_gradients(bare)[name], model.vision.slot_gradients(cache)[name][0], atol=1e-12, rtol=1e-10
    )
    with torch.inference_mode():
        again = model.vision.slot_gradients(cache)[name]
    assert torch.equal(again, model.vision.slot_gradients(cache)[name])
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_cache_without_gradients_says_what_to_record() -> None:
    model, inputs = double("vit")
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs)
    with pytest.raises(InputError, match="slot_sites"):
        model.vision.slot_gradients(cache)
    sites = model.vision.slot_sites([1])
    _, cache = model.run_with_cache(inputs, sites, incl_bwd=True, metric=metric)
    found = model.vision.slot_gradients(cache)
    assert len(found) == 4
    assert all(name.startswith("vision.blocks.1.") for name in found)
    with pytest.raises(UnknownSiteError, match="Nearest"):
        found["vision.blocks.0.hook_q_input"]


def test_slots_keep_one_tensor_at_a_time() -> None:
    """What a cache of slot_sites holds, and one slot, against what recording the slots holds."""
    model, inputs = double("vit")
    tower = model.vision
    _, cache = model.run_with_cache(inputs, tower.slot_sites(), incl_bwd=True, metric=metric)
    globs = [f"vision.blocks.*.hook_{slot}" for slot in ("q_input", "k_input", "v_input", "mlp_in")]
    _, whole = model.run_with_cache(inputs, globs, incl_bwd=True, metric=metric)

    def held(values: Any) -> int:
        return sum(value.nbytes for name, value in values.items() if "_grad" in name)

    found = tower.slot_gradients(cache)
    one = found["vision.blocks.0.hook_q_input"]
    assert held(whole) == tower.cfg.n_layers * (3 * one.nbytes + one.nbytes // tower.cfg.n_heads)
    assert one.untyped_storage().nbytes() == one.nbytes
    before = {id(value) for value in cache.values()}
    for _ in found.values():
        pass
    assert {id(value) for value in cache.values()} == before
    tensors = [value for value in vars(found).values() if isinstance(value, Tensor)]
    assert not tensors, "nothing computed is kept"

"""Edits against known answers: identities and closed forms of every primitive, computed with plain torch hooks or by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from tests.conformance.setting import eager, one_layer_each
from tests.edits.common import (
    DOUBLE,
    FAMILIES,
    Dictionary,
    apart,
    bare,
    block,
    fresh,
    inputs_of,
    near,
    part,
    pattern_under,
    random,
    run_and_see,
    same,
    seen,
    torch_hooks,
    wrap,
    wrapped,
)

VIT_RESID = "vision.blocks.1.hook_resid_post"
VIT_Z = "vision.blocks.1.attn.hook_z"
OUTPUT_TOWERS = {
    "vit": ["vision"],
    "dinov2": ["vision"],
    "clip": ["vision", "text"],
    "llava-clip-llama": ["language"],
    "paligemma": ["language"],
    "pi0": ["action"],
}
INPUT_TOWERS = OUTPUT_TOWERS | {"pi0": ["language", "action"]}


def vit(seed: int = 0, batch: int = 2) -> tuple[Any, dict[str, Any]]:
    model = wrapped("vit", DOUBLE)
    return model, inputs_of("vit", model, seed=seed, batch=batch)


def llava(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[Any, dict[str, Any]]:
    model = wrapped("llava-clip-llama", dtype)
    return model, inputs_of("llava-clip-llama", model, **options)


# ---- H: interchange


@pytest.mark.filterwarnings("ignore:.*cannot reach the output")
@pytest.mark.parametrize("name", FAMILIES)
def test_interchange_source_equals_base_changes_no_bit(name: str) -> None:
    model = wrapped(name)
    inputs = inputs_of(name, model)
    clean = bare(model, inputs)
    for site in one_layer_each(model):
        parsed = SiteName.parse(site)
        if parsed.is_pattern:
            continue
        _, cache = model.run_with_cache(inputs, [site])
        if parsed.is_eager:
            with eager(model.module):
                clean_eager = bare(model, inputs)
            same(model.run(inputs, [edits.replace(site, cache)]), clean_eager)
        else:
            same(model.run(inputs, [edits.replace(site, cache)]), clean)


@pytest.mark.parametrize("name", FAMILIES)
def test_interchange_of_the_whole_last_residual_gives_source_logits(name: str) -> None:
    model = wrapped(name)
    base, source = inputs_of(name, model, seed=0), inputs_of(name, model, seed=1)
    sites = [f"{t}.blocks.{model.towers[t].cfg.n_layers - 1}.hook_resid_post" for t in OUTPUT_TOWERS[name]]
    _, cache = model.run_with_cache(source, sites)
    wanted = bare(model, source)
    apart(wanted, bare(model, base))
    same(model.run(base, [edits.replace(site, cache) for site in sites]), wanted)


@pytest.mark.parametrize("name", FAMILIES)
def test_interchange_of_the_whole_input_gives_source_logits(name: str) -> None:
    model = wrapped(name)
    base, source = inputs_of(name, model, seed=0), inputs_of(name, model, seed=1)
    sites = [f"{tower}.hook_input" for tower in INPUT_TOWERS[name]]
    _, cache = model.run_with_cache(source, sites)
    same(model.run(base, [edits.replace(site, cache) for site in sites]), bare(model, source))


def test_interchange_off_every_path_has_effect_zero() -> None:
    # ViT reads CLS alone; LLaVA reads the second-last vision layer; PI0's last prefix block acts through keys and values alone.
    places = [
        ("vit", "vision.blocks.2.hook_resid_post", slice(1, None)),
        ("vit", "vision.blocks.2.attn.hook_z", [4, 9]),
        ("llava-clip-llama", "vision.blocks.2.hook_resid_post", None),
        ("llava-clip-llama", "vision.blocks.2.attn.hook_k", None),
        ("pi0", "language.blocks.2.hook_mlp_out", None),
    ]
    for name, site, positions in places:
        model = wrapped(name)
        base = inputs_of(name, model)
        _, cache = model.run_with_cache(inputs_of(name, model, seed=1), [site])
        edit = edits.replace(site, cache, positions=positions)
        if positions is None:
            with pytest.warns(UserWarning, match="cannot reach the output"):
                same(model.run(base, [edit]), bare(model, base))
        else:
            same(model.run(base, [edit]), bare(model, base))


def test_interchange_effects_add_up_where_the_model_is_additive() -> None:
    # Behind DINOv2's final normalisation the logits are linear: gain, mean over patches, classifier.
    model = wrapped("dinov2", DOUBLE)
    base, source = inputs_of("dinov2", model, seed=0), inputs_of("dinov2", model, seed=1)
    site = "vision.ln_final.hook_normalized"
    clean, cache = model.run_with_cache(source, [site])
    clean = bare(model, base)
    whole = model.run(base, [edits.replace(site, cache)]) - clean
    parts = [model.run(base, [edits.replace(site, cache, positions=p)]) - clean for p in (0, [1, 5, 9])]
    rest = [p for p in range(17) if p not in (0, 1, 5, 9)]
    parts.append(model.run(base, [edits.replace(site, cache, positions=rest)]) - clean)
    near(sum(parts), whole)
    near(whole + clean, bare(model, source))


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_interchange_of_one_head_equals_a_plain_hook(mode: str) -> None:
    model, clean = vit(0)
    _, corrupt = vit(1)
    base, source = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    out = part(model, "vision", 1, "o")
    with seen(out, "pre") as values:
        bare(model, source)
    flat = values[0]

    def patch(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, [0, 6], 12:18] = flat[:, [0, 6], 12:18]
        return value

    with torch_hooks((out, "pre", patch)):
        wanted = bare(model, base)
    _, cache = model.run_with_cache(source, [VIT_Z])
    same(model.run(base, [edits.replace(VIT_Z, cache, heads=2, positions=[0, 6])]), wanted)


def test_interchange_at_several_sites_with_a_position_map_equals_plain_hooks() -> None:
    # Patch p of the base takes what patch p + 3 has in the source, at two layers.
    model, base = vit(0)
    _, source = vit(1)
    sites = [f"vision.blocks.{layer}.hook_resid_post" for layer in (0, 1)]
    _, cache = model.run_with_cache(source, sites)
    moved = {site: cache[site].roll(-3, dims=1) for site in sites}

    def patch(layer: int) -> Any:
        def hook(value: Tensor) -> Tensor:
            return torch.cat([value[:, :2], moved[sites[layer]][:, 2:8], value[:, 8:]], dim=1)

        return block(model, "vision", layer), "post", hook

    with torch_hooks(patch(0), patch(1)):
        wanted = bare(model, base)
    same(model.run(base, [edits.replace(site, moved[site], positions=slice(2, 8)) for site in sites]), wanted)


# ---- I: constant ablation


@pytest.mark.parametrize("name", ["vit", "dinov2", "llava-clip-llama"])
def test_zeroing_a_head_result_equals_zeroing_its_z(name: str) -> None:
    model = wrapped(name, DOUBLE)
    inputs = inputs_of(name, model)
    tower = OUTPUT_TOWERS[name][0]
    width = model.towers[tower].cfg.d_head

    def zero(value: Tensor) -> Tensor:
        return torch.cat(
            [value[..., :width], torch.zeros_like(value[..., width : 2 * width]), value[..., 2 * width :]], -1
        )

    with torch_hooks((part(model, tower, 1, "o"), "pre", zero)):
        wanted = bare(model, inputs)
    z = model.run(inputs, [edits.ablate(f"{tower}.blocks.1.attn.hook_z", heads=1)])
    same(z, wanted)
    # Llama's norms compute in single precision, whatever the model's own.
    tolerance = 1e-5 if tower == "language" else 1e-11
    near(model.run(inputs, [edits.ablate(f"{tower}.blocks.1.attn.hook_result", heads=1)]), z, tolerance)
    apart(z, bare(model, inputs))


def in_another_value_basis(head: int) -> Any:
    """A model with the same function: one head's values are expressed in another basis."""
    module = fresh("vit", DOUBLE)
    basis = torch.eye(6, dtype=DOUBLE) + 0.4 * random(6, 6, seed=9)
    model = wrap(module)
    v, o = part(model, "vision", 1, "v"), part(model, "vision", 1, "o")
    rows = slice(6 * head, 6 * head + 6)
    v.weight[rows], v.bias[rows] = basis @ v.weight[rows], basis @ v.bias[rows]
    o.weight[:, rows] = o.weight[:, rows] @ torch.linalg.inv(basis)
    return model


@pytest.mark.parametrize("with_", ["zero", "mean"])
def test_zero_and_mean_ablation_do_not_depend_on_the_value_basis(with_: str) -> None:
    model, inputs = vit(batch=3)
    other = in_another_value_basis(head=2)
    near(bare(other, inputs), bare(model, inputs))
    edit = edits.ablate(VIT_Z, with_, heads=2)
    apart(model.run(inputs, [edit]), bare(model, inputs))
    near(other.run(inputs, [edit]), model.run(inputs, [edit]))


def test_the_mean_over_heads_depends_on_the_value_basis_and_warns() -> None:
    model, inputs = vit(batch=3)
    with pytest.warns(UserWarning, match="basis"):
        edit = edits.ablate(VIT_Z, "heads", heads=2)
    apart(in_another_value_basis(head=2).run(inputs, [edit]), model.run(inputs, [edit]), 1e-3)


def test_the_mean_over_heads_is_the_mean_of_the_other_heads() -> None:
    model, inputs = vit()

    def mean(value: Tensor) -> Tensor:
        heads = value.unflatten(-1, (4, 6)).clone()
        heads[:, 3, 2] = heads[:, 3, [0, 1, 3]].mean(1)
        return heads.flatten(-2)

    with torch_hooks((part(model, "vision", 1, "o"), "pre", mean)):
        wanted = bare(model, inputs)
    with pytest.warns(UserWarning, match="basis"):
        edit = edits.ablate(VIT_Z, "heads", heads=2, positions=3)
    near(model.run(inputs, [edit]), wanted)


def test_mean_ablation_of_a_constant_activation_changes_no_bit() -> None:
    model, inputs = vit()
    # Every image has the same position embedding; and four copies of one image have the same everything.
    same(model.run(inputs, [edits.ablate("vision.hook_pos_embed", "mean")]), bare(model, inputs))
    copies = {"pixel_values": inputs["pixel_values"][:1].repeat(4, 1, 1, 1)}
    clean = bare(model, copies)
    for site in (VIT_RESID, VIT_Z, "vision.blocks.0.mlp.hook_post"):
        same(model.run(copies, [edits.ablate(site, "mean")]), clean)
        same(model.run(copies, [edits.ablate(site, "resample")]), clean)


@pytest.mark.parametrize("average", ["position", "all"])
def test_mean_ablation_writes_the_mean_over_rows_and_over_positions(average: str) -> None:
    model, inputs = vit(batch=3)
    with seen(block(model, "vision", 1)) as values:
        bare(model, inputs)
    mean = values[0].mean(0) if average == "position" else values[0].mean((0, 1)).expand(17, 24)
    got = run_and_see(
        model, inputs, [edits.ablate(VIT_RESID, "mean", average=average, positions=[0, 4])], block(model, "vision", 1)
    )
    near(got[:, [0, 4]], mean[[0, 4]].expand(3, 2, 24))
    same(got[:, 5:], values[0][:, 5:])


def test_mean_ablation_over_a_data_set_is_the_mean_over_all_its_rows() -> None:
    model, inputs = vit()
    dataset = [vit(5, batch=3)[1], vit(6, batch=1)[1]]
    rows = []
    for data in dataset:
        with seen(block(model, "vision", 1)) as values:
            bare(model, data)
        rows.append(values[0])
    got = run_and_see(model, inputs, [edits.ablate(VIT_RESID, "mean", dataset=dataset)], block(model, "vision", 1))
    near(got, torch.cat(rows).mean(0).expand(2, 17, 24))


def test_mean_ablation_of_the_pooled_readout_is_the_mean_over_rows() -> None:
    model, inputs = vit(batch=3)
    with seen(model.module.classifier, "pre") as values:
        bare(model, inputs)
    wanted = model.module.classifier(values[0].mean(0).expand(3, 24))
    for average in ("position", "all"):
        near(model.run(inputs, [edits.ablate("vision.hook_readout", "mean", average=average)]), wanted)


def test_resampling_gives_every_row_another_rows_value() -> None:
    model, inputs = vit(batch=5)
    with seen(block(model, "vision", 1)) as values:
        bare(model, inputs)
    got = run_and_see(model, inputs, [edits.ablate(VIT_RESID, "resample", seed=3)], block(model, "vision", 1))
    sources = [[j for j in range(5) if torch.equal(got[i], values[0][j])] for i in range(5)]
    assert sorted(source for (source,) in sources) == list(range(5))
    assert all(source != [i] for i, source in enumerate(sources))
    again = edits.ablate(VIT_RESID, "resample", seed=3)
    same(run_and_see(model, inputs, [again], block(model, "vision", 1)), got)


def test_ablation_with_a_given_vector_writes_it() -> None:
    model, inputs = vit()
    vector = random(24)
    got = run_and_see(model, inputs, [edits.ablate(VIT_RESID, vector, positions=[2, 3])], block(model, "vision", 1))
    same(got[:, 2:4], vector.expand(2, 2, 24))


# ---- J: steering


@pytest.mark.parametrize("name", ["vit", "dinov2", "siglip-classifier"])
def test_steering_before_a_linear_head_moves_logits_by_the_projected_direction(name: str) -> None:
    model = wrapped(name, DOUBLE)
    inputs = inputs_of(name, model)
    weight = model.module.classifier.weight
    direction = random(weight.shape[1])
    change = model.run(inputs, [edits.steer("vision.hook_readout", direction, -1.7)]) - bare(model, inputs)
    near(change, (-1.7 * direction @ weight.T).expand_as(change))


def test_steering_one_position_before_the_head_moves_that_positions_logits_alone() -> None:
    model, inputs = llava()
    direction = random(32, dtype=torch.float32)
    change = model.run(inputs, [edits.steer("language.hook_readout", direction, 2.0, positions="last")])
    change = change - bare(model, inputs)
    near(change[:, -1], (2.0 * direction @ model.module.lm_head.weight.T).expand(2, -1), 1e-5)
    assert not change[:, :-1].any()


def test_norm_preserving_steering_keeps_every_norm_and_turns_the_vector() -> None:
    model, inputs = vit()
    with seen(block(model, "vision", 1)) as values:
        bare(model, inputs)
    clean, direction = values[0], random(24)
    got = run_and_see(
        model, inputs, [edits.steer(VIT_RESID, direction, 0.8, mode="norm_preserving")], block(model, "vision", 1)
    )
    near(got.norm(dim=-1), clean.norm(dim=-1))
    unit = direction / direction.norm()
    turned = clean / clean.norm(dim=-1, keepdim=True) + 0.8 * unit
    near(got, turned / turned.norm(dim=-1, keepdim=True) * clean.norm(dim=-1, keepdim=True))


def test_projecting_out_leaves_nothing_along_the_direction_and_is_idempotent() -> None:
    model, inputs = vit()
    direction = random(24)
    once = edits.steer(VIT_RESID, direction, mode="project_out")
    place = block(model, "vision", 1)
    got = run_and_see(model, inputs, [once], place)
    near(got @ direction, torch.zeros(2, 17, dtype=DOUBLE))
    near(run_and_see(model, inputs, [once, once], place), got)
    # The length of the direction does not matter.
    near(run_and_see(model, inputs, [edits.steer(VIT_RESID, -5 * direction, mode="project_out")], place), got)


@pytest.mark.parametrize("mode", ["add", "norm_preserving", "project_out"])
def test_steering_by_nothing_changes_no_bit(mode: str) -> None:
    model, inputs = vit()
    same(model.run(inputs, [edits.steer(VIT_RESID, random(24), 0.0, mode=mode)]), bare(model, inputs))


def test_a_direction_per_head_reaches_its_head() -> None:
    model, inputs = vit()
    directions = random(4, 6)

    def move(value: Tensor) -> Tensor:
        moved = value.unflatten(-1, (4, 6)).clone()
        moved[:, 2:5, [3, 1]] += 0.5 * directions[[3, 1]]
        return moved.flatten(-2)

    with torch_hooks((part(model, "vision", 1, "o"), "pre", move)):
        wanted = bare(model, inputs)
    near(model.run(inputs, [edits.steer(VIT_Z, directions, 0.5, heads=[3, 1], positions=slice(2, 5))]), wanted)


# ---- L: attention scores

EAGER = 2e-6
"""Eager attention takes its softmax in single precision, whatever the model's own."""
KERNELS = pytest.mark.parametrize("attention", ["sdpa", "eager"])
TOWERS = pytest.mark.parametrize(("name", "tower"), [("vit", "vision"), ("llava-clip-llama", "language")])


LENGTH = {"vision": 17, "language": 16}


def setting(name: str, attention: str, dtype: torch.dtype = DOUBLE, **options: Any) -> tuple[Any, dict[str, Any]]:
    model = wrapped(name, dtype, attention)
    return model, inputs_of(name, model, **options)


@KERNELS
@TOWERS
def test_uniform_attention_with_one_key_blocked_shares_the_row_among_the_others(
    name: str, tower: str, attention: str
) -> None:
    model = wrap(fresh(name, torch.float32, attention))
    inputs = inputs_of(name, model)
    for parameter in part(model, tower, 1, "q").parameters():
        parameter.zero_()
    n = LENGTH[tower]
    edit = edits.block_attention(tower, n - 1, 5, layers=1)
    pattern = pattern_under(model, inputs, [edit], f"{tower}.blocks.1.attn.hook_pattern")
    assert not pattern[:, :, -1, 5].any()
    shared = pattern[:, :, -1, [key for key in range(n) if key != 5]]
    near(shared, torch.full_like(shared, 1 / (n - 1)), 1e-6)
    other = pattern[:, :, 9, :10]
    near(other, torch.full_like(other, 1 / (n if tower == "vision" else 10)), 1e-6)


@KERNELS
@TOWERS
def test_a_blocked_key_gets_pattern_zero_and_its_value_gradient_zero(name: str, tower: str, attention: str) -> None:
    model, inputs = setting(name, attention)
    blocked = edits.block_attention(tower, None, 6, layers=1)
    got = pattern_under(model, inputs, [blocked], f"{tower}.blocks.1.attn.hook_pattern")
    assert not got[..., 6].any()
    near(got.sum(-1), torch.ones_like(got.sum(-1)), 1e-6)
    leaves: list[Tensor] = []

    def leaf(value: Tensor) -> Tensor:
        leaves.append(value.detach().clone().requires_grad_(True))
        return leaves[0]

    with torch.enable_grad(), torch_hooks((part(model, tower, 1, "v"), "post", leaf)):
        # The position that is read: CLS, or the end of the text.
        row = 0 if tower == "vision" else -1
        out = model.run(inputs, [blocked])
        (gradient,) = torch.autograd.grad((out if tower == "vision" else out[:, row]).pow(2).sum(), leaves[0])
    assert not gradient[:, 6].any()
    assert gradient[:, 5].abs().min() > 0


@KERNELS
def test_blocking_a_future_key_is_the_eager_run_bit_for_bit(attention: str) -> None:
    model, inputs = setting("llava-clip-llama", attention, torch.float32)
    with eager(model.module):
        wanted = bare(model, inputs)
    same(model.run(inputs, [edits.block_attention("language", [3, 4], [7, 15])]), wanted)


@KERNELS
@TOWERS
def test_looking_at_itself_alone_a_position_gets_its_own_value(name: str, tower: str, attention: str) -> None:
    model, inputs = setting(name, attention)
    others = [key for key in range(LENGTH[tower]) if key != 4]
    values, z = part(model, tower, 1, "v"), part(model, tower, 1, "o")
    with seen(values) as v, seen(z, "pre") as written:
        model.run(inputs, [edits.block_attention(tower, 4, others, layers=1)])
    cfg = model.towers[tower].cfg
    own = v[0].unflatten(-1, (cfg.n_kv_heads, cfg.d_head)).repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=2)
    same(written[0].unflatten(-1, (cfg.n_heads, cfg.d_head))[:, 4], own[:, 4])


@KERNELS
@TOWERS
def test_a_row_with_every_key_blocked_raises_and_names_it(name: str, tower: str, attention: str) -> None:
    model, inputs = setting(name, attention, torch.float32)
    for edit in (
        edits.block_attention(tower, 4, None, layers=1),
        edits.block_attention(tower, 0, list(range(LENGTH[tower])), heads=2),
    ):
        with pytest.raises(InputError, match="nothing is left") as caught:
            model.run(inputs, [edit])
        assert repr(edit) in str(caught.value)
    # With the pattern itself set to zero there is nothing to share out.
    model.run(inputs, [edits.block_attention(tower, 4, None, layers=1, renormalise=False)])


@KERNELS
@TOWERS
def test_blocked_in_all_layers_a_token_is_not_seen_at_all(name: str, tower: str, attention: str) -> None:
    model, inputs = setting(name, attention, torch.float32)
    hidden, others = 6, [p for p in range(LENGTH[tower]) if p != 6]
    edit = edits.block_attention(tower, others, hidden)

    def disturb(value: Tensor) -> Tensor:
        value = value.clone()
        value[:, hidden] += random(value.shape[-1], dtype=value.dtype)
        return value

    def read(out: Tensor) -> Tensor:
        return out if tower == "vision" else out[:, others]

    clean, blocked = read(bare(model, inputs)), read(model.run(inputs, [edit]))
    with torch_hooks((block(model, tower, 0), "pre", disturb)):
        apart(read(bare(model, inputs)), clean)
        same(read(model.run(inputs, [edit])), blocked)


GROUP, LEVELS = [1, 3, 8], (0.7, -1.1)


def two_levels(scores: Tensor, hook: Any) -> Tensor:
    """Scores of one level on three keys, of another on the rest."""
    out = torch.full_like(scores, LEVELS[1])
    out[..., GROUP] = LEVELS[0]
    return out


def minus_two_levels(scores: Tensor, hook: Any) -> Tensor:
    """The same with the signs turned."""
    return -two_levels(scores, hook)


@KERNELS
@pytest.mark.parametrize("factor", [2.5, 0.3])
def test_multiplied_scores_give_the_closed_form_mass_whose_sense_depends_on_the_sign(
    factor: float, attention: str
) -> None:
    model, inputs = setting("vit", attention)
    site = "vision.blocks.1.attn.hook_pattern"
    for fn, sign in ((two_levels, 1.0), (minus_two_levels, -1.0)):
        levels = edits.apply("vision.blocks.1.attn.hook_attn_scores", fn)
        scaled = edits.scale_attention("vision", None, GROUP, factor, layers=1)
        mass = pattern_under(model, inputs, [levels, scaled], site)[..., GROUP].sum(-1)
        one, rest = 3 * math.exp(factor * sign * LEVELS[0]), 14 * math.exp(sign * LEVELS[1])
        near(mass, torch.full_like(mass, one / (one + rest)), EAGER)
        before = pattern_under(model, inputs, [levels], site)[..., GROUP].sum(-1)
        assert bool((mass > before).all()) == ((factor > 1) == (sign > 0))


@KERNELS
def test_an_attention_bias_multiplies_the_odds_whatever_the_sign(attention: str) -> None:
    model, inputs = setting("vit", attention)
    site = "vision.blocks.1.attn.hook_pattern"
    before = pattern_under(model, inputs, [], site)[:, 2, 5]
    edit = edits.add_attention_bias("vision", 5, GROUP, 1.3, layers=1, heads=2)
    after = pattern_under(model, inputs, [edit], site)
    p, q = before[:, GROUP].sum(-1), after[:, 2, 5][:, GROUP].sum(-1)
    near(q / (1 - q), p / (1 - p) * math.exp(1.3), 1e-4)
    untouched = [head for head in range(4) if head != 2]
    near(after[:, untouched], pattern_under(model, inputs, [], site)[:, untouched])


@KERNELS
@TOWERS
def test_without_renormalising_the_other_entries_keep_their_weight(name: str, tower: str, attention: str) -> None:
    model, inputs = setting(name, attention)
    before = pattern_under(model, inputs, [], f"{tower}.blocks.1.attn.hook_pattern")
    cfg = model.towers[tower].cfg
    values, out = part(model, tower, 1, "v"), part(model, tower, 1, "o")
    region = torch.zeros(LENGTH[tower], LENGTH[tower], dtype=torch.bool)
    region[10:13, [1, 4]] = True
    for edit, factor in (
        (edits.block_attention(tower, slice(10, 13), [1, 4], layers=1, renormalise=False), 0.0),
        (edits.scale_attention(tower, slice(10, 13), [1, 4], 0.4, layers=1, renormalise=False), 0.4),
        (edits.add_attention_bias(tower, slice(10, 13), [1, 4], 0.9, layers=1, renormalise=False), math.exp(0.9)),
    ):
        pattern = torch.where(region, before * factor, before)
        with seen(values) as v, seen(out, "pre") as z:
            model.run(inputs, [edit])
        per_head = v[0].unflatten(-1, (cfg.n_kv_heads, cfg.d_head)).repeat_interleave(cfg.n_heads // cfg.n_kv_heads, 2)
        near(z[0], torch.einsum("bhqk,bkhd->bqhd", pattern, per_head).flatten(-2), EAGER)


@pytest.mark.parametrize("padding", [None, "left", "right"])
def test_a_knockout_is_the_same_whatever_form_the_mask_takes(padding: str | None) -> None:
    # eager: a mask of numbers to add; sdpa: none without padding, booleans with it.
    outputs = []
    for attention in ("eager", "sdpa"):
        model, inputs = setting("llava-clip-llama", attention, torch.float32, padding=padding, batch=3)
        real = inputs["attention_mask"].bool()
        edit = edits.block_attention("language", "last", model.tokens(inputs)["language"].image(0))
        apart(model.run(inputs, [edit])[real], bare(model, inputs)[real])
        outputs.append(model.run(inputs, [edit])[real])
    same(outputs[0], outputs[1])


def test_a_knockout_of_one_head_equals_attention_by_hand() -> None:
    model, inputs = setting("vit", "sdpa")
    edit = edits.block_attention("vision", [0, 3], [2, 5, 7], layers=[1], heads=[0, 3])
    places = {name: part(model, "vision", 1, name) for name in "qkv"}
    with (
        seen(places["q"]) as q,
        seen(places["k"]) as k,
        seen(places["v"]) as v,
        seen(part(model, "vision", 1, "o"), "pre") as z,
    ):
        model.run(inputs, [edit])
    heads = {n: x[0].unflatten(-1, (4, 6)).transpose(1, 2) for n, x in (("q", q), ("k", k), ("v", v))}
    scores = heads["q"] @ heads["k"].transpose(-1, -2) / math.sqrt(6)
    for head in (0, 3):
        for query in (0, 3):
            scores[:, head, query, [2, 5, 7]] = -math.inf
    near(z[0], (scores.softmax(-1) @ heads["v"]).transpose(1, 2).flatten(-2), EAGER)


def test_the_attention_pooling_of_siglip_takes_a_knockout() -> None:
    model = wrapped("siglip", DOUBLE)
    inputs = inputs_of("siglip", model)
    head = model.module.vision_model.head
    with seen(head, "pre") as states, seen(head) as pooled:
        model.run(inputs, [edits.block_attention("vision", None, [2, 5], layers="pool")])
    kept = [p for p in range(9) if p not in (2, 5)]
    near(pooled[0], head(states[0][:, kept]))


# ---- M: dictionary splice


def test_a_splice_that_changes_no_feature_changes_no_bit() -> None:
    model, inputs = vit()
    for neurons in ([], 7):
        edit = edits.overwrite(VIT_RESID, neurons, 0.0, dictionary=Dictionary(24))
        same(model.run(inputs, [edit]), bare(model, inputs))


def test_clamping_a_feature_moves_the_site_by_its_decoder_row() -> None:
    model, inputs = vit()
    dictionary, place = Dictionary(24), block(model, "vision", 1)
    clean = run_and_see(model, inputs, [], place)
    feature = dictionary.encode(clean)[..., 11]
    assert (feature > 0).any()
    edit = edits.overwrite(VIT_RESID, 11, 2.5, dictionary=dictionary, positions=slice(1, None))
    got = run_and_see(model, inputs, [edit], place)
    near(got[:, 1:], (clean + (2.5 - feature)[..., None] * dictionary.W_dec[11])[:, 1:])
    same(got[:, 0], clean[:, 0])


def test_the_gradient_to_a_clamped_feature_is_its_decoder_row_times_the_sites_gradient() -> None:
    model, inputs = vit()
    dictionary = Dictionary(24)
    value = torch.tensor([1.5, -0.5], dtype=DOUBLE, requires_grad=True)
    sites: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        sites.append(tensor.detach().clone().requires_grad_(True))
        return sites[0]

    edit = edits.overwrite(VIT_RESID, [11, 4], value, dictionary=dictionary, positions=3)
    with torch.enable_grad():
        (to_value,) = torch.autograd.grad(model.run(inputs, [edit])[:, 1].sum(), value)
        with torch_hooks((block(model, "vision", 2), "pre", keep)):
            (to_site,) = torch.autograd.grad(model.run(inputs, [edit])[:, 1].sum(), sites[0])
    near(to_value, (to_site[:, 3] @ dictionary.W_dec[[11, 4]].T).sum(0))
    assert to_value.abs().min() > 0


# ---- R: subspace interchange


def orthonormal(count: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(random(24, count, seed=seed))[0]


def projected(basis: Tensor, *more: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The site in the base run, in the source run, and under the edit."""
    model, base = vit(0)
    _, source = vit(1)
    place = block(model, "vision", 1)
    h_source = run_and_see(model, source, [], place)
    edit = edits.project(VIT_RESID, basis, h_source)
    return run_and_see(model, base, [], place), h_source, run_and_see(model, base, [edit, *more], place)


@pytest.mark.parametrize("count", [1, 3])
def test_subspace_interchange_takes_the_source_inside_and_the_base_outside(count: int) -> None:
    basis = orthonormal(count)
    h_base, h_source, got = projected(basis[:, 0] if count == 1 else basis)
    near(got @ basis, h_source @ basis)
    outside = torch.eye(24, dtype=DOUBLE) - basis @ basis.T
    near(got @ outside, h_base @ outside)
    near(got, h_base + (h_source - h_base) @ basis @ basis.T)


def test_subspace_interchange_is_idempotent() -> None:
    basis = orthonormal(3)
    _, h_source, once = projected(basis)
    _, _, twice = projected(basis, edits.project(VIT_RESID, basis, h_source))
    near(twice, once)


def test_subspace_interchange_with_a_full_basis_is_a_full_patch() -> None:
    _, h_source, got = projected(random(24, 24))
    near(got, h_source, 1e-9)


def test_subspace_interchange_does_not_depend_on_sign_scale_and_rotation_of_the_basis() -> None:
    basis = orthonormal(3)
    _, _, got = projected(basis)
    turned = torch.linalg.qr(random(3, 3, seed=8))[0]
    for other in (-basis, 7.0 * basis, basis @ turned, basis @ random(3, 3, seed=2)):
        near(projected(other)[2], got, 1e-10)


X = (1.0, -1.0)


def three_neurons(value: Tensor, hook: Any) -> Tensor:
    """h = x (1, 0, 1) in the first three coordinates."""
    out = torch.zeros_like(value)
    out[:, 0] = out[:, 2] = torch.tensor(X, dtype=value.dtype)
    return out


@pytest.mark.parametrize(
    ("direction", "effect"),
    [((1, 0, 0), 0.0), ((0, 1, 0), 0.0), ((0, 0, 1), 1.0), ((1, 1, 0), 1.0), ((1, 0, 1), 1.0)],
)
def test_subspace_interchange_in_the_three_neuron_network_of_the_illusion_paper(
    direction: tuple[int, ...], effect: float
) -> None:
    module = fresh("vit", DOUBLE)
    module.classifier.weight.zero_()
    module.classifier.bias.zero_()
    module.classifier.weight[0, :3] = torch.tensor([0.0, 2.0, 1.0], dtype=DOUBLE)
    model = wrap(module)
    inputs = inputs_of("vit", model)
    site = "vision.hook_readout"
    v = torch.zeros(24, dtype=DOUBLE)
    v[:3] = torch.tensor(direction, dtype=DOUBLE)
    hidden = edits.apply(site, three_neurons)
    source = three_neurons(torch.zeros(2, 24, dtype=DOUBLE), None).flip(0)
    y = model.run(inputs, [hidden])[:, 0]
    near(y, torch.tensor(X, dtype=DOUBLE))
    patched = model.run(inputs, [hidden, edits.project(site, v, source)])[:, 0]
    near((patched - y) / (y.flip(0) - y), torch.full((2,), effect, dtype=DOUBLE))


# ---- T: head scaling


def test_scaling_heads_by_one_changes_no_bit() -> None:
    model, inputs = vit()
    for factor in (1.0, torch.ones(4, 1, dtype=DOUBLE)):
        same(model.run(inputs, [edits.scale(VIT_Z, factor)]), bare(model, inputs))


def test_scaling_heads_by_zero_equals_zero_ablation() -> None:
    model, inputs = vit()
    near(
        model.run(inputs, [edits.scale(VIT_Z, 0.0, heads=[1, 2])]),
        model.run(inputs, [edits.ablate(VIT_Z, heads=[1, 2])]),
    )


def test_the_attention_output_is_affine_in_a_heads_factor() -> None:
    model, inputs = vit()
    place = part(model, "vision", 1, "o")
    at = {s: run_and_see(model, inputs, [edits.scale(VIT_Z, s, heads=1)], place) for s in (0.0, 1.0, 3.0)}
    near(at[3.0], at[0.0] + 3.0 * (at[1.0] - at[0.0]))
    factors = torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=DOUBLE)[:, None]
    near(run_and_see(model, inputs, [edits.scale(VIT_Z, factors)], place), at[3.0])


def test_factors_are_clipped() -> None:
    model, inputs = vit()
    factors = torch.tensor([0.1, 0.9, 5.0, -2.0], dtype=DOUBLE)[:, None]
    clipped = model.run(inputs, [edits.scale(VIT_Z, factors, clip=(0.5, 2.0))])
    near(clipped, model.run(inputs, [edits.scale(VIT_Z, factors.clamp(0.5, 2.0))]))
    same(model.run(inputs, [edits.scale(VIT_Z, 9.0, clip=(0.5, 2.0))]), model.run(inputs, [edits.scale(VIT_Z, 2.0)]))
    apart(model.run(inputs, [edits.scale(VIT_Z, 1.0, clip=(1.5, 2.0))]), bare(model, inputs))


# ---- W: token states


def shorter_vision(module: Any, hidden: Tensor, gone: list[int], start: int, layers: Any) -> Tensor:
    """The blocks on fewer tokens from layer ``start`` on."""
    kept = [p for p in range(hidden.shape[1]) if p not in gone]
    for number, layer in enumerate(layers):
        hidden = hidden[:, kept] if number == start else hidden
        out = layer(hidden, None)
        hidden = out[0] if isinstance(out, tuple) else out
    return hidden[:, kept] if start == len(layers) else hidden


@KERNELS
@pytest.mark.parametrize("start", [0, 1, 2])
def test_deleting_patches_of_a_vit_is_a_shorter_sequence(start: int, attention: str) -> None:
    model, inputs = setting("vit", attention)
    tower = model.module.vit
    gone = [2, 3, 9, 16]
    hidden = shorter_vision(tower, tower.embeddings(inputs["pixel_values"]), gone, start, tower.layers)
    wanted = model.module.classifier(tower.layernorm(hidden)[:, 0])
    near(model.run(inputs, [edits.delete_tokens("vision", gone, start=start)]), wanted, EAGER)


@pytest.mark.parametrize("start", [0, 2, 3])
def test_deleting_patches_leaves_them_out_of_the_mean_of_dinov2(start: int) -> None:
    model, inputs = setting("dinov2", "sdpa")
    tower = model.module.dinov2
    gone = [1, 7, 12]
    hidden = shorter_vision(tower, tower.embeddings(inputs["pixel_values"]), gone, start, tower.encoder.layer)
    normed = tower.layernorm(hidden)
    wanted = model.module.classifier(torch.cat([normed[:, 0], normed[:, 1:].mean(1)], dim=1))
    near(model.run(inputs, [edits.delete_tokens("vision", gone, start=start)]), wanted, EAGER)


def test_deleting_patches_leaves_them_out_of_the_mean_of_siglip() -> None:
    model, inputs = setting("siglip-classifier", "sdpa")
    tower = model.module.vision_model
    hidden = shorter_vision(tower, tower.embeddings(inputs["pixel_values"]), [0, 4], 0, tower.encoder.layers)
    wanted = model.module.classifier(tower.post_layernorm(hidden).mean(1))
    near(model.run(inputs, [edits.delete_tokens("vision", [0, 4])]), wanted, EAGER)


def test_deleting_patches_leaves_them_out_of_a_mean_that_leaves_padding_out() -> None:
    # Packed images of 12, 10 and 16 patches; what remains of each is what a shorter packing holds.
    model, inputs = setting("siglip2-classifier", "sdpa", batch=3)
    tower = model.module.vision_model
    gone, mask = [1, 6], inputs["pixel_attention_mask"].bool()
    embedded = tower.embeddings(inputs["pixel_values"], inputs["spatial_shapes"])
    pooled = []
    for row in range(3):
        kept = [p for p in range(mask.shape[1]) if mask[row, p] and p not in gone]
        hidden = embedded[row : row + 1, kept]
        for layer in tower.encoder.layers:
            hidden = layer(hidden, None)
        pooled.append(tower.post_layernorm(hidden).mean(1))
    wanted = model.module.classifier(torch.cat(pooled))
    near(model.run(inputs, [edits.delete_tokens("vision", gone)]), wanted, EAGER)


def test_deleting_patches_leaves_them_out_of_the_unnormalised_mean_of_clip() -> None:
    model, inputs = setting("clip-classifier", "sdpa")
    tower = model.module.vision_model
    hidden = tower.pre_layrnorm(tower.embeddings(inputs["pixel_values"]))
    hidden = shorter_vision(tower, hidden, [3, 4], 0, tower.encoder.layers)
    wanted = model.module.classifier(hidden[:, 1:].mean(1))
    near(model.run(inputs, [edits.delete_tokens("vision", [3, 4])]), wanted, EAGER)


def test_deleting_patches_leaves_them_out_of_attention_pooling() -> None:
    model, inputs = setting("siglip", "sdpa")
    tower = model.module.vision_model
    hidden = shorter_vision(tower, tower.embeddings(inputs["pixel_values"]), [2, 5], 1, tower.encoder.layers)
    got = run_and_see(model, inputs, [edits.delete_tokens("vision", [2, 5], start=1)], tower.head)
    near(got, tower.head(tower.post_layernorm(hidden)), EAGER)


def test_deleting_text_of_a_llava_prompt_with_new_positions_is_a_shorter_prompt() -> None:
    model, inputs = llava()
    gone = [1, 12, 14]
    kept = [p for p in range(16) if p not in gone]
    short = {**inputs, **{name: inputs[name][:, kept] for name in ("input_ids", "attention_mask")}}
    got = model.run(inputs, [edits.delete_tokens("language", gone, reindex=True)])
    near(got[:, kept], bare(model, short), 1e-5)
    without_mask = {name: value for name, value in inputs.items() if name != "attention_mask"}
    got = model.run({**without_mask, "use_cache": False}, [edits.delete_tokens("language", gone, reindex=True)])
    near(got[:, kept], bare(model, short), 1e-5)


@pytest.mark.parametrize("reindex", [False, True])
def test_deleting_image_tokens_of_llava_is_a_shorter_sequence(reindex: bool) -> None:
    model, inputs = llava()
    image = model.tokens(inputs)["language"].image(0).patch(row=1)
    gone = image.positions()
    kept = [p for p in range(16) if p not in gone]
    with seen(block(model, "language", 0), "pre") as embeddings:
        bare(model, inputs)
    positions = torch.arange(len(kept)) if reindex else torch.tensor(kept)
    # A mask of ones, so that gaps between position numbers do not start a new sequence.
    states = model.module.model.language_model(
        inputs_embeds=embeddings[0][:, kept],
        position_ids=positions[None],
        attention_mask=torch.ones(2, len(kept), dtype=torch.long),
    ).last_hidden_state
    got = model.run(inputs, [edits.delete_tokens("language", image, reindex=reindex)])[:, kept]
    near(got, model.module.lm_head(states), 1e-5)


@pytest.mark.parametrize("padding", ["left", "right"])
def test_deleting_text_with_new_positions_works_under_padding(padding: str) -> None:
    model, inputs = llava(padding=padding, batch=3)
    real = inputs["attention_mask"].bool()
    # The first word after the image, wherever padding put it.
    last_patch = model.tokens(inputs)["language"].image(0).last().tensor
    gone = last_patch.roll(1, dims=1)
    got = model.run(inputs, [edits.delete_tokens("language", gone, reindex=True)])
    for row in range(3):
        kept = ~gone[row] & real[row]
        alone = {
            "input_ids": inputs["input_ids"][row, kept][None],
            "pixel_values": inputs["pixel_values"][row : row + 1],
        }
        near(got[row, kept], bare(model, alone)[0], 1e-5)


def test_deleting_text_of_clip_with_new_positions_is_a_shorter_text() -> None:
    model = wrapped("clip", DOUBLE)
    inputs = inputs_of("clip", model)
    kept = [0, 1, 3, 5, 6]
    short = {**inputs, **{name: inputs[name][:, kept] for name in ("input_ids", "attention_mask")}}
    got = model.run(inputs, [edits.delete_tokens("text", [2, 4], reindex=True)])
    near(got, bare(model, short), EAGER)
    apart(model.run(inputs, [edits.delete_tokens("text", [2, 4])]), got)


def test_deleting_nothing_changes_no_bit() -> None:
    for name, tower in (("vit", "vision"), ("llava-clip-llama", "language"), ("dinov2", "vision")):
        model = wrapped(name)
        inputs = inputs_of(name, model)
        same(model.run(inputs, [edits.delete_tokens(tower, [])]), bare(model, inputs))


def test_permuting_patches_of_a_model_without_positions_leaves_cls_alone() -> None:
    module = fresh("vit", DOUBLE)
    module.vit.embeddings.position_embeddings.zero_()
    model = wrap(module)
    inputs = inputs_of("vit", model)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1)).tolist()
    for site in ("vision.hook_input", "vision.blocks.1.hook_resid_post"):
        near(model.run(inputs, [edits.permute(site, order, positions=slice(1, None))]), bare(model, inputs))
    with_positions, inputs = vit()
    apart(with_positions.run(inputs, [edits.permute("vision.hook_embed", order)]), bare(with_positions, inputs))


def test_a_permutation_puts_the_chosen_values_in_the_chosen_places() -> None:
    model, inputs = vit()
    place = block(model, "vision", 1)
    clean = run_and_see(model, inputs, [], place)
    got = run_and_see(model, inputs, [edits.permute(VIT_RESID, [2, 0, 1], positions=[9, 3, 5])], place)
    # Positions count in ascending order: 3, 5, 9 take what 9, 3, 5 had.
    same(got[:, [3, 5, 9]], clean[:, [9, 3, 5]])
    rest = [p for p in range(17) if p not in (3, 5, 9)]
    same(got[:, rest], clean[:, rest])
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[0, [1, 4]] = mask[1, [2, 8]] = True
    got = run_and_see(model, inputs, [edits.permute(VIT_RESID, [1, 0], positions=mask)], place)
    same(got[0, [1, 4]], clean[0, [4, 1]])
    same(got[1, [2, 8]], clean[1, [8, 2]])


def test_frozen_positions_hold_the_earlier_value_and_later_patches_of_them_are_no_ops() -> None:
    for name, tower, layers in (("vit", "vision", 3), ("llava-clip-mistral", "language", 3)):
        model = wrapped(name)
        inputs = inputs_of(name, model)
        held, width = [4, 5, 9], model.towers[tower].cfg.d_model
        first = f"{tower}.blocks.0.hook_resid_post"
        freeze = [
            edits.freeze(f"{tower}.blocks.{layer}.hook_resid_post", at=first, positions=held)
            for layer in range(1, layers)
        ]
        with seen(block(model, tower, 0)) as start, seen(block(model, tower, layers - 1)) as end:
            frozen = model.run(inputs, freeze)
        same(end[0][:, held], start[0][:, held])
        apart(frozen, bare(model, inputs))
        later = [
            edits.replace(f"{tower}.blocks.{layer}.{site}", random(width, seed=layer), positions=held)
            for layer in range(1, layers)
            for site in ("hook_attn_out", "hook_mlp_out")
        ]
        same(model.run(inputs, [*freeze, *later]), frozen)
        apart(model.run(inputs, later), frozen)


def test_freezing_sees_the_edits_of_the_layer_it_holds() -> None:
    model, inputs = vit()
    first = "vision.blocks.0.hook_resid_post"
    steer = edits.steer(first, random(24), 2.0)
    freeze = edits.freeze("vision.blocks.2.hook_resid_post", at=first)
    place = block(model, "vision", 0)
    with torch_hooks((place, "post", lambda value: value + 2.0 * random(24))), seen(place) as values:
        bare(model, inputs)
    same(run_and_see(model, inputs, [steer, freeze], block(model, "vision", 2)), values[0])


def test_renormalised_vectors_have_the_target_norm_and_their_own_direction() -> None:
    model, inputs = vit()
    place = block(model, "vision", 1)
    clean = run_and_see(model, inputs, [], place)
    got = run_and_see(model, inputs, [edits.renormalise(VIT_RESID, 3.5, positions=slice(1, None))], place)
    near(got[:, 1:].norm(dim=-1), torch.full((2, 16), 3.5, dtype=DOUBLE))
    near(torch.cosine_similarity(got, clean, dim=-1), torch.ones(2, 17, dtype=DOUBLE))
    same(got[:, 0], clean[:, 0])


# ---- X: neuron overwrite

NEURON = "blocks.1.mlp.hook_post"


@pytest.mark.parametrize(
    ("name", "tower"), [("vit", "vision"), ("dinov2-swiglu", "vision"), ("llava-clip-llama", "language")]
)
def test_an_overwritten_neuron_moves_the_mlp_by_its_output_row(name: str, tower: str) -> None:
    model = wrapped(name, DOUBLE)
    inputs = inputs_of(name, model)
    out = part(model, tower, 1, "mlp_out")
    with seen(out, "pre") as neurons, seen(out) as clean:
        bare(model, inputs)
    edit = edits.overwrite(f"{tower}.{NEURON}", 13, 4.0, positions=[0, 6])
    got = run_and_see(model, inputs, [edit], out)
    change = (4.0 - neurons[0][:, [0, 6], 13])[..., None] * out.weight[:, 13]
    near(got[:, [0, 6]] - clean[0][:, [0, 6]], change)
    same(got[:, 1:6], clean[0][:, 1:6])


def test_two_clusters_of_neurons_commute() -> None:
    model, inputs = vit()
    one = edits.overwrite(f"vision.{NEURON}", [3, 17], 1.5)
    other = edits.overwrite(f"vision.{NEURON}", [4, 9, 30], [0.5, -2.0, 0.0])
    got = model.run(inputs, [one, other])
    same(got, model.run(inputs, [other, one]))

    def both(value: Tensor) -> Tensor:
        value = value.clone()
        value[..., [3, 17]], value[..., 4], value[..., 9], value[..., 30] = 1.5, 0.5, -2.0, 0.0
        return value

    with torch_hooks((part(model, "vision", 1, "mlp_out"), "pre", both)):
        same(bare(model, inputs), got)


def test_edits_write_into_no_tensor_of_the_model_or_the_caller() -> None:
    model, inputs = vit()
    activation = model.module.vit.layers[1].mlp.activation_fn
    kept: list[Tensor] = []
    with torch_hooks((activation, "post", lambda value: kept.append(value))):
        bare(model, inputs)
        before = kept[0].clone()
        source, pixels = random(2, 17, 24), inputs["pixel_values"].clone()
        given = source.clone()
        weights = {name: value.clone() for name, value in model.module.state_dict().items()}
        kept.clear()
        model.run(
            inputs,
            [
                edits.overwrite(f"vision.{NEURON}", [3, 17], 1.5),
                edits.replace("vision.blocks.0.hook_resid_post", source),
                edits.scale("vision.blocks.0.hook_resid_post", 2.0),
                edits.steer("vision.hook_input", random(24)),
            ],
        )
    # The activation function's own output is what the MLP's output layer would have read.
    assert not torch.equal(kept[0], before)
    assert not (kept[0][..., 3] == 1.5).any()
    same(source, given)
    same(inputs["pixel_values"], pixels)
    for name, value in model.module.state_dict().items():
        same(value, weights[name])

"""Path patching against naive runs in plain PyTorch that hold every other part, on blocks of every shape, and identities that need no oracle."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision.patching import PathPatching, activation_patch, path_patch
from tests.synthetic_blocks import SHAPES, Own, by_hand, inputs_by_hand, register
from tests.zoo import case

pytestmark = [pytest.mark.filterwarnings("ignore:The two runs do not differ"), pytest.mark.usefixtures("tables")]
EXACT: dict[str, Any] = {"rtol": 0.0, "atol": 1e-9}


def score(logits: Tensor) -> Tensor:
    """A curved metric of every example."""
    return logits.flatten(1)[:, ::3].sin().sum(-1)


def first_logit(logits: Tensor) -> Tensor:
    return logits[:, 0]


def models(name: str) -> tuple[Any, Any, dict[str, Any], dict[str, Any]]:
    """A tiny model in float64, its module, and two inputs that differ in the picture."""
    found = case(name)
    module = found.build().double().eval()
    clean, corrupt = (found.inputs(module, batch=2, seed=seed, dtype=torch.float64) for seed in (1, 2))
    corrupt = {key: value if key == "pixel_values" else clean[key] for key, value in corrupt.items()}
    return cv.HookedModel(module), module, clean, corrupt


def patched(model: Any, clean: Any, corrupt: Any, **options: Any) -> PathPatching:
    return path_patch(model, metric=score, clean=clean, corrupt=corrupt, progress=False, **options)


# -- by hand, on blocks of every shape -------------------------------------------------------------------------------------------------------------


def branches(module: Own) -> list[str]:
    return [
        f"vision.blocks.{layer}.hook_{name}_out" for layer, block in enumerate(module.blocks) for name in block.branches
    ]


def into_head(value: Tensor, head: int) -> Callable[[Tensor], Tensor]:
    def put(old: Tensor) -> Tensor:
        new = old.clone()
        new[:, :, head] = value[:, :, head]
        return new

    return put


@pytest.mark.parametrize("through", ["", "a branch", "a head"])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_path_in_blocks_of_any_shape_is_what_holding_the_others_by_hand_gives(shape, through):
    register()
    torch.manual_seed(0)
    module = Own(SHAPES[shape]).double().eval()
    model = cv.HookedModel(module)
    clean, corrupt = (inputs_by_hand(module, 2, seed, torch.float64) for seed in (1, 2))
    (base_logits, base), (_, source) = by_hand(module, corrupt), by_hand(module, clean)
    sender = "vision.blocks.0.attn.hook_z"
    hold = {name: (lambda old, name=name: base[name]) for name in branches(module)}
    hold.pop("vision.blocks.0.hook_attn_out")
    mlp = "vision.blocks.1.hook_mlp_out" if "vision.blocks.1.hook_mlp_out" in hold else "vision.blocks.1.hook_attn_out"
    changes = {sender: into_head(source[sender], 1)}
    inner, attended = "vision.blocks.1.attn.hook_z", "vision.blocks.1.hook_attn_out"
    if through == "a branch":
        hold.pop(mlp)
    elif through == "a head":
        if attended not in hold:
            pytest.skip("block 1 has no attention")
        hold.pop(attended)
        changes[inner] = lambda z: into_head(z, 2)(base[inner])
    between = {"": None, "a branch": mlp, "a head": f"{inner}[2]"}[through]
    _, held = by_hand(module, corrupt, {**hold, **changes})
    for receiver, head in (("hook_q_input", 3), ("hook_k_input", 1), ("hook_v_input", 0), ("hook_mlp_in", None)):
        site = f"vision.blocks.2.{receiver}"
        stream = held["vision.blocks.2.hook_mlp_in" if head is None else "vision.blocks.2.hook_resid_pre"]
        new = stream if head is None else into_head(stream.unsqueeze(2).expand_as(base[site]), head)
        change = {site: (lambda old, new=new: new) if head is None else new}
        expected = score(by_hand(module, corrupt, change)[0]) - score(base_logits)
        found = patched(
            model,
            clean,
            corrupt,
            senders="vision L0H1",
            receivers=site if head is None else f"{site}[{head}]",
            through=between,
        )
        assert expected.abs().max() > 1e-6
        torch.testing.assert_close(found.values[0, 0], expected, **EXACT)


# -- plain PyTorch hooks on Hugging Face modules ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hooked(module: Any, before: dict[str, Any], after: dict[str, Any]) -> Iterator[None]:
    """Functions of the inputs and of the outputs of named submodules."""
    handles = []
    for name, change in before.items():
        handles.append(
            module.get_submodule(name).register_forward_pre_hook(
                lambda _, args, kwargs, change=change: (
                    ((change(args[0]), *args[1:]), kwargs) if args else (args, kwargs)
                ),
                with_kwargs=True,
            )
        )
    for name, change in after.items():
        handles.append(module.get_submodule(name).register_forward_hook(lambda _, __, out, change=change: change(out)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def recorded(module: Any, inputs: Any, before: list[str], after: list[str]) -> dict[str, Tensor]:
    """The inputs and outputs of submodules in a run."""
    values: dict[str, Tensor] = {}

    def keep(key: str) -> Callable[[Tensor], Tensor]:
        def look(value: Tensor) -> Tensor:
            values[key] = value.clone()
            return value

        return look

    with hooked(module, {n: keep(f"in {n}") for n in before}, {n: keep(f"out {n}") for n in after}), torch.no_grad():
        values["logits"] = module(**inputs).logits
    return values


def columns_of(new: Tensor, head: int, width: int) -> Callable[[Tensor], Tensor]:
    def put(old: Tensor) -> Tensor:
        own = slice(head * width, (head + 1) * width)
        return torch.cat([old[..., : own.start], new[..., own], old[..., own.stop :]], -1)

    return put


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_every_path_between_heads_of_a_vit_is_what_naive_freezing_in_pytorch_gives(mode):
    model, module, clean, corrupt = models("vit")
    base_inputs, source_inputs = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    width, layers = 6, range(3)
    outs = [f"vit.layers.{layer}.attention.o_proj" for layer in layers]
    mlps = [f"vit.layers.{layer}.mlp" for layer in layers]
    norms = [f"vit.layers.{layer}.layernorm_before" for layer in layers]
    base, source = (
        recorded(module, inputs, [*outs, *norms], [*outs, *mlps]) for inputs in (base_inputs, source_inputs)
    )
    found = patched(
        model,
        clean,
        corrupt,
        senders="vision.blocks.*.attn.hook_z",
        receivers="vision.blocks.*.hook_v_input",
        mode=mode,
    )
    assert list(found.axes) == ["sender", "receiver", "example"]
    checked = 0
    for row, sender in enumerate(found.axes["sender"]):
        at, head = int(sender[8]), int(sender[10])
        for column, receiver in enumerate(found.axes["receiver"]):
            to, reader = int(receiver[8]), int(receiver[10])
            if to <= at:
                assert found.values[row, column].isnan().all()
                continue
            if (head, reader) not in ((0, 1), (3, 2)):
                continue
            held = {name: (lambda out, name=name: base[f"out {name}"]) for name in (*mlps, *outs) if name != outs[at]}
            stream: list[Tensor] = []
            before = {
                outs[at]: columns_of(source[f"in {outs[at]}"], head, width),
                norms[to]: lambda x, stream=stream: stream.append(x) or x,
            }
            with hooked(module, before, held), torch.no_grad():
                module(**base_inputs)
            layer = module.vit.layers[to]
            new = layer.attention.v_proj(layer.layernorm_before(stream[0]))
            value = {f"vit.layers.{to}.attention.v_proj": columns_of(new, reader, width)}
            with hooked(module, {}, value), torch.no_grad():
                expected = score(module(**base_inputs).logits) - score(base["logits"])
            torch.testing.assert_close(found.values[row, column], expected, **EXACT)
            checked += 1
    assert checked == 6


@pytest.mark.parametrize("through", [None, "language L0.mlp"])
def test_a_path_from_the_vision_tower_to_a_language_head_goes_through_the_projector_exactly(through):
    model, module, clean, corrupt = models("llava-clip-llama")
    vision, language = "model.vision_tower.encoder.layers.{}", "model.language_model.layers.{}"
    count = {vision: 3, language: len(module.model.language_model.layers)}
    outs = [
        f"{path.format(n)}.self_attn.{'out' if path is vision else 'o'}_proj"
        for path in count
        for n in range(count[path])
    ]
    mlps = [f"{path.format(n)}.mlp" for path in count for n in range(count[path])]
    sender, reader = outs[0], f"{language.format(1)}"
    base, source = (recorded(module, inputs, outs, [*outs, *mlps]) for inputs in (corrupt, clean))
    free = [sender, f"{language.format(0)}.mlp"] if through else [sender]
    held = {name: (lambda out, name=name: base[f"out {name}"]) for name in (*outs, *mlps) if name not in free}
    stream: list[Tensor] = []
    before = {
        sender: columns_of(source[f"in {sender}"], 2, 4),
        f"{reader}.input_layernorm": lambda x: stream.append(x) or x,
    }
    with hooked(module, before, held), torch.no_grad():
        module(**corrupt)
    block = module.model.language_model.layers[1]
    new = block.self_attn.q_proj(block.input_layernorm(stream[0]))
    with hooked(module, {}, {f"{reader}.self_attn.q_proj": columns_of(new, 3, 6)}), torch.no_grad():
        expected = score(module(**corrupt).logits) - score(base["logits"])
    found = patched(model, clean, corrupt, senders="vision L0H2", receivers="language L1H3.q", through=through)
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.values[0, 0], expected, **EXACT)


# -- identities ------------------------------------------------------------------------------------------------------------------------------------


FAMILIES = ["vit", "dinov2", "llava-clip-llama", "llava-clip-llama-layers", "paligemma2", "clip", "pi0"]


@pytest.mark.parametrize("name", FAMILIES)
def test_with_every_part_allowed_between_a_path_is_the_patch_of_its_sender(name):
    model, _, clean, corrupt = models(name)
    site = f"{next(iter(model.towers))}.blocks.0.attn.hook_z"
    whole = activation_patch(model, metric=score, clean=clean, corrupt=corrupt, sites=site, progress=False)
    every = patched(
        model, clean, corrupt, senders=site, receivers="output", through=["**.hook_attn_out", "**.hook_mlp_out"]
    )
    assert whole.values.abs().max() > 1e-3
    torch.testing.assert_close(every.values[:, 0], whole.values[0], **EXACT)
    torch.testing.assert_close(every.base, whole.base)


@pytest.mark.parametrize("name", FAMILIES)
def test_all_edges_out_of_a_head_together_are_the_patch_of_it(name):
    model, _, clean, corrupt = models(name)
    tower = next(iter(model.towers))
    site, layers = f"{tower}.blocks.0.attn.hook_z", model.towers[tower].cfg.n_layers
    connector = model.flow.connector_of(tower)
    slots = [f"{tower}.blocks.0.hook_mlp_in", connector.name if connector else "output"]
    slots += [
        f"{tower}.blocks.{n}.hook_{what}"
        for n in range(1, layers)
        for what in ("q_input", "k_input", "v_input", "mlp_in")
    ]
    whole = activation_patch(model, metric=score, clean=clean, corrupt=corrupt, sites=site, progress=False)
    edges = patched(model, clean, corrupt, senders=site, receivers=slots, axes=("sender",))
    torch.testing.assert_close(edges.values[:, 0], whole.values[0], **EXACT)
    missing = patched(model, clean, corrupt, senders=site, receivers=slots[:1] + slots[2:], axes=("sender",))
    assert (missing.values[:, 0] - whole.values[0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["vit", "dinov2", "paligemma2"])
@pytest.mark.parametrize("receiver", ["q", "k", "mlp"])
def test_with_everything_before_it_as_sender_a_receiver_reads_the_source(name, receiver):
    model, _, clean, corrupt = models(name)
    senders = ["v.input", "vision.blocks.0.hook_*_out", "vision.blocks.1.attn.hook_z"]
    kind = "mlp" if receiver == "mlp" else "attn"
    site = "vision.blocks.1.hook_mlp_in" if kind == "mlp" else f"vision.blocks.1.hook_{receiver}_input"
    head = None if kind == "mlp" else 2
    found = patched(
        model,
        clean,
        corrupt,
        senders=senders if kind == "mlp" else senders[:2],
        receivers="vision L1.mlp" if kind == "mlp" else f"vision L1H2.{receiver}",
        axes=("receiver",),
    )
    source = model.run_with_cache(clean, names_filter=site)[1]
    expected = score(model.run(corrupt, [cv.edits.replace(site, source, heads=head)])) - score(model(corrupt))
    assert expected.abs().max() > 1e-3
    torch.testing.assert_close(found.values[0, 0], expected, **EXACT)


class Affine(nn.LayerNorm):
    """Gain and bias without a division."""

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


def linear_vit() -> tuple[Any, Any, Any]:
    """A ViT that is linear in its stream: norms that divide by nothing, no activation, attention that looks everywhere alike."""
    _, module, clean, corrupt = models("vit")
    for layer in module.vit.layers:
        layer.mlp.activation_fn = nn.Identity()
        nn.init.zeros_(layer.attention.q_proj.weight)
        nn.init.zeros_(layer.attention.q_proj.bias)
    for part in module.modules():
        if type(part) is nn.LayerNorm:
            part.__class__ = Affine
    return cv.HookedModel(module), clean, corrupt


def test_in_a_linear_model_direct_effects_on_all_receivers_add_up_to_the_total_effect():
    model, clean, corrupt = linear_vit()
    slots = ["vision L0.mlp", "output"]
    slots += [f"vision.blocks.{n}.hook_{what}" for n in (1, 2) for what in ("q_input", "k_input", "v_input", "mlp_in")]
    whole = activation_patch(
        model, metric=first_logit, clean=clean, corrupt=corrupt, sites="vision.blocks.0.attn.hook_z", progress=False
    )
    found = path_patch(
        model, metric=first_logit, clean=clean, corrupt=corrupt, senders="vision.blocks.0.attn.hook_z", receivers=slots,
        progress=False,
    )  # fmt: skip
    assert found.values.shape == (4, 28, 2)
    torch.testing.assert_close(found.values.sum(1), whole.values[0], **EXACT)
    queries = [number for number, label in enumerate(found.axes["receiver"]) if label.endswith((".q", ".k"))]
    assert found.values[:, queries].abs().max() < 1e-9, "attention that looks everywhere alike has no use for its input"


def test_all_chains_of_a_linear_model_add_up_and_each_is_a_difference_of_paths_through_sets():
    model, clean, corrupt = linear_vit()
    parts = ["vision L1.attn", "vision L1.mlp", "vision L2.attn", "vision L2.mlp"]

    def effect(chosen: list[str]) -> Tensor:
        options = {"clean": clean, "corrupt": corrupt, "progress": False, "through": chosen or None}
        return path_patch(model, metric=first_logit, senders="vision L0.mlp", receivers="output", **options).values[
            0, 0
        ]

    chains = torch.zeros(2, dtype=torch.float64)
    for mask in range(16):
        chosen = [part for bit, part in enumerate(parts) if mask >> bit & 1]
        chains += sum(
            (-1) ** (len(chosen) - bin(sub).count("1")) * effect([p for b, p in enumerate(chosen) if sub >> b & 1])
            for sub in range(1 << len(chosen))
        )
    whole = activation_patch(
        model, metric=first_logit, clean=clean, corrupt=corrupt, sites="vision.blocks.0.hook_mlp_out", axes=("layer",),
        progress=False,
    )  # fmt: skip
    torch.testing.assert_close(chains, whole.values[0], **EXACT)


def test_a_sum_and_a_frozen_run_agree(monkeypatch):
    from circuitvision.patching.path_runs import Arrivals

    model, _, clean, corrupt = models("dinov2")
    options = {
        "senders": ["v.input", "vision L0H1", ["vision L0.mlp", "vision L1H2"]],
        "receivers": ["vision L2H0", "output"],
    }
    summed = patched(model, clean, corrupt, **options)
    monkeypatch.setattr(Arrivals, "is_sum", lambda self, number: False)
    torch.testing.assert_close(patched(model, clean, corrupt, **options).values, summed.values, **EXACT)
    assert summed.values.abs().min() > 1e-6


def test_a_path_that_no_part_carries_is_zero_to_the_bit():
    model, _, clean, corrupt = models("vit")
    # Queries of the class token alone are read in the last layer: what reaches those of patches goes nowhere.
    off = patched(
        model, clean, corrupt, senders="vision L0H0", receivers="vision L2H1.q", receiver_positions=slice(1, None)
    )
    assert (off.values == 0).all()
    on = patched(model, clean, corrupt, senders="vision L0H0", receivers="vision L2H1.q", receiver_positions=0)
    whole = patched(model, clean, corrupt, senders="vision L0H0", receivers="vision L2H1.q")
    torch.testing.assert_close(on.values, whole.values, **EXACT)
    model, _, clean, corrupt = models("pi0")
    apart = patched(model, clean, corrupt, senders="language L0H1", receivers="output")
    assert (apart.values == 0).all(), "the expert reads its prefix in its own heads, which are held"


def test_an_expert_reads_its_prefix_through_keys_and_values():
    model, _, clean, corrupt = models("pi0")
    heads = "action.blocks.1.attn.hook_z"
    through = patched(model, clean, corrupt, senders="language L0H1", receivers="output", through=heads)
    site = "language.blocks.0.attn.hook_z"
    base, source = (model.run_with_cache(inputs, names_filter="**")[1] for inputs in (corrupt, clean))
    held = [
        cv.edits.replace(name, base)
        for name in model.sites("**.hook_*_out")
        if name.startswith(("language", "action")) and not model.is_dead(name)
        and name not in ("language.blocks.0.hook_attn_out", "action.blocks.1.hook_attn_out")
    ]  # fmt: skip
    rest = [cv.edits.replace(site, base, heads=[0, 2]), cv.edits.replace(site, source, heads=1)]
    expected = score(model.run(corrupt, [*held, *rest])) - score(model(corrupt))
    assert expected.abs().max() > 1e-6
    # Gemma's norms compute in float32, whatever the model's precision.
    torch.testing.assert_close(through.values[0, 0], expected, rtol=1e-4, atol=0.0)
    keys = patched(model, clean, corrupt, senders="language L0H1", receivers=["language.blocks.1.hook_k_input"])
    assert keys.values.abs().max() > 1e-6


def test_positions_of_the_senders_add_up_in_a_linear_model_and_are_the_regions_of_each_example():
    model, clean, corrupt = linear_vit()
    options = {"clean": clean, "corrupt": corrupt, "progress": False, "senders": "vision L1H2", "receivers": "output"}
    whole = path_patch(model, metric=first_logit, **options)
    token = path_patch(model, metric=first_logit, positions=0, **options)
    patches = path_patch(model, metric=first_logit, positions="patch", **options)
    torch.testing.assert_close(token.values, whole.values, **EXACT)
    assert whole.values.abs().max() > 1e-3
    assert patches.values.abs().max() < 1e-9, "the class token reads no other position's stream at the end"


@pytest.mark.parametrize("mode", ["denoise", "noise"])
def test_receivers_of_several_layers_add_to_each_other_or_hold_what_the_senders_send(mode):
    model, _, clean, corrupt = models("vit")
    options = {"senders": "vision L0H1", "receivers": ["vision L1H0.q", "vision L2H2.q"], "mode": mode}
    base, source = (corrupt, clean) if mode == "denoise" else (clean, corrupt)
    site, first, second = "vision.blocks.0.attn.hook_z", *(f"vision.blocks.{n}.hook_q_input" for n in (1, 2))
    before, other = (model.run_with_cache(inputs, names_filter=[site, first, second])[1] for inputs in (base, source))
    mixed = before[site].clone()
    mixed[:, :, 1] = other[site][:, :, 1]
    change = (model.vision.written(site, mixed) - model.vision.written(site, before[site])).unsqueeze(2)
    one = cv.edits.steer(first, change, heads=0)
    for joint, two in (
        ("add", cv.edits.steer(second, change, heads=2)),
        ("hold", cv.edits.replace(second, before[second] + change, heads=2)),
    ):
        found = patched(model, clean, corrupt, axes=("sender",), joint=joint, **options)
        expected = score(model.run(base, [one, two])) - score(model(base))
        torch.testing.assert_close(found.values[0, 0], expected, **EXACT)
    assert found.axes["receiver"] == ["vision L1H0.q + vision L2H2.q"]

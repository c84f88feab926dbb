"""Adapters: sites and weights are those of the layers that compute, whether the adapter came before or after the wrapper."""

from __future__ import annotations

import copy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    IA3Config,
    LNTuningConfig,
    LoHaConfig,
    LoraConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptTuningConfig,
    get_peft_model,
)
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits, hooked
from circuitvision.errors import InputError, UnsupportedModelError
from circuitvision.model import projections, tower, tree, weights
from circuitvision.model.sites import matches
from tests.parts import has_part, module_of
from tests.zoo import case, shared_model

PARTS = {"q": "W_Q", "k": "W_K", "v": "W_V", "o": "W_O", "mlp_in": "W_in", "mlp_gate": "W_gate", "mlp_out": "W_out"}
LAST = ["lm_head", "classifier", "norm", "layernorm", "post_layernorm", "layer_norm1", "input_layernorm"]


def lora(*targets: str, **options: Any) -> LoraConfig:
    return LoraConfig(r=3, target_modules=list(targets), init_lora_weights=False, **options)


ENDS = ("*.hook_embed", "*.hook_readout")
CONFIGS = {
    "attention": lora("q_proj", "k_proj", "v_proj", "o_proj", "out_proj"),
    "all linear": LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False),
    "biases": lora("fc1", "fc2", "up_proj", "down_proj", lora_bias=True),
    "dora": lora("q_proj", "o_proj", "fc1", use_dora=True),
    "whole modules": lora("q_proj", modules_to_save=LAST),
    "embeddings and heads": lora("lm_head", "classifier", "embed_tokens", "token_embedding", "position_embedding"),
    "ia3": IA3Config(
        target_modules=["k_proj", "v_proj", "fc2", "down_proj"],
        feedforward_modules=["fc2", "down_proj"],
        init_ia3_weights=False,
    ),
    "loha": LoHaConfig(r=3, target_modules=["q_proj", "fc1", "gate_proj"], init_weights=False),
    "norms": LNTuningConfig(target_modules=["input_layernorm", "layernorm_before", "layer_norm1", "norm1"]),
}


def fresh(name: str) -> Any:
    return copy.deepcopy(shared_model(name))


def adapted(module: Any, config: Any) -> Any:
    """The module with an adapter whose every number is random: some kinds begin as the identity."""
    found = get_peft_model(module, copy.deepcopy(config)).eval()
    generator = torch.Generator().manual_seed(3)
    for path, value in found.named_parameters():
        if value.requires_grad and ("modules_to_save" in path or "ln_tuning" in path):
            value.data.add_(0.3 * torch.randn(value.shape, generator=generator))
    return found


def measured(layer: Any) -> tuple[Tensor, Tensor]:
    """By plain PyTorch: the identity and zero pushed through."""
    zero = layer(torch.zeros(1, layer.in_features))
    return layer(torch.eye(layer.in_features)) - zero, zero[0]


def flat(weight: Tensor, part: str) -> Tensor:
    if part in ("q", "k", "v"):
        return weight.permute(1, 0, 2).flatten(1)
    return weight.flatten(0, 1) if part == "o" else weight


def close(found: Tensor, expected: Tensor, what: str) -> None:
    assert found.shape == expected.shape, what
    assert torch.allclose(found, expected, atol=2e-5), f"{what}: {float((found - expected).abs().max()):.2g}"


@torch.no_grad()
def check(model: cv.HookedModel, inputs: dict[str, Any]) -> None:
    """Every weight and site against the layers that run now, found by name in the module and watched by hooks of PyTorch's own."""
    names = ["**.attn.hook_q", "**.attn.hook_z", "**.attn.hook_result", *ENDS]
    out, cache = model.run_with_cache(inputs, lambda name: any(matches(glob, name) for glob in names))
    seen: dict[tuple[str, int, str], tuple[Tensor, Tensor]] = {}
    layers: dict[tuple[str, int, str], Any] = {}
    for owner in model.towers.values():
        for block in owner.blocks:
            for part in PARTS:
                if has_part(block, part):
                    layers[owner.name, block.layer, part] = module_of(block, part)

    def keep(place: tuple[str, int, str]) -> Any:
        return lambda module, args, output: seen.update({place: (args[0], output)})

    handles = [layer.register_forward_hook(keep(place)) for place, layer in layers.items()]
    model.module(**inputs)
    for handle in handles:
        handle.remove()
    stacked = {(where, name): getattr(model.towers[where], name) for where, _, part in layers for name in [PARTS[part]]}
    biases = {key: getattr(model.towers[key[0]], key[1].replace("W", "b")) for key in stacked if key[1] != "W_gate"}
    for (where, layer, part), module in layers.items():
        expected, offset = measured(module)
        what = f"{part} of {where} {layer}"
        close(flat(stacked[where, PARTS[part]][layer], part), expected, f"weight {what}")
        if part != "mlp_gate":
            close(biases[where, PARTS[part]][layer].flatten(), offset, f"bias {what}")
        if part == "q":
            close(cache[where, "q", layer].flatten(2), seen[where, layer, "q"][1], what)
        if part == "o":
            close(cache[where, "z", layer].flatten(2), seen[where, layer, "o"][0], what)
            summed = cache[where, "result", layer].sum(-2) + biases[where, "W_O"][layer]
            close(summed, seen[where, layer, "o"][1], f"result {what}")
    check_ends(model, inputs, out, cache)


def check_ends(model: cv.HookedModel, inputs: dict[str, Any], out: Tensor, cache: Any) -> None:
    """Unembedding and embeddings against what the model gives."""
    last = list(model.towers.values())[-1]
    capped = getattr(last.config, "final_logit_softcapping", None) is not None
    if f"{last.name}.hook_readout" in cache and last.spec.readout.finish != "contrast" and not capped:
        close(cache[f"{last.name}.hook_readout"] @ last.W_U + last.b_U, out, "W_U")
    for name in ("language", "text"):
        if name in model.towers:
            owner, ids = model.towers[name], inputs["input_ids"]
            words = ids != (-1 if model.image_token_id is None else model.image_token_id)
            rows, embedded = owner.W_E[ids[words]], cache[f"{name}.hook_embed"][words]
            gemma = model.family.name in ("paligemma", "pi0")
            close(rows * owner.cfg.d_model**0.5 if gemma else rows, embedded, f"{name} W_E")


def caught(function: Any, *args: Any) -> bool:
    try:
        function(*args)
    except (AssertionError, IndexError, RuntimeError, UnsupportedModelError, InputError):
        return True
    return False


FEW = [
    ("llava-clip-llama", "all linear"),
    ("llava-clip-llama", "embeddings and heads"),
    ("llava-clip-llama", "norms"),
    ("vit", "dora"),
    ("vit", "whole modules"),
    ("vit", "ia3"),
    ("clip", "embeddings and heads"),
]
OTHERS = [
    *(("llava-clip-llama", kind) for kind in ("attention", "biases", "dora", "whole modules", "ia3", "loha")),
    *(("vit", kind) for kind in ("all linear", "embeddings and heads", "loha", "norms")),
    *(("clip", kind) for kind in ("attention", "whole modules")),
    *(("pi0", kind) for kind in ("attention", "norms")),
    ("dinov2", "all linear"),
    ("siglip", "whole modules"),
    ("paligemma2", "attention"),
]
CASES = [*FEW, *(pytest.param(*case, marks=pytest.mark.slow) for case in OTHERS)]


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_before_wrapping_after_it_disabled_and_merged(name: str, kind: str) -> None:
    inputs = case(name).inputs(fresh(name), batch=1)
    before = adapted(fresh(name), CONFIGS[kind])
    model = cv.HookedModel(before)
    check(model, inputs)
    module = fresh(name)
    later = cv.HookedModel(module)
    with torch.no_grad():
        plain = later(inputs)
    adapted(module, CONFIGS[kind]).load_state_dict(before.state_dict())
    check(later, inputs)
    with torch.no_grad():
        assert torch.equal(later(inputs), model(inputs))
        assert not torch.allclose(later(inputs), plain, atol=1e-4)
        with before.disable_adapter():
            assert torch.allclose(model(inputs), plain, atol=1e-5)
            check(model, inputs)
        if kind != "biases":
            before.merge_adapter()
            check(model, inputs)


def test_taken_out_again_and_a_second_adapter() -> None:
    name = "llava-clip-llama"
    inputs = case(name).inputs(fresh(name), batch=1)
    outer = adapted(fresh(name), lora("q_proj"))
    model = cv.HookedModel(outer)
    outer.add_adapter("second", lora("q_proj", "fc1", "o_proj"))
    for active in ("default", "second"):
        outer.set_adapter(active)
        check(model, inputs)
    outer.base_model.set_adapter(["default", "second"])
    check(model, inputs)
    outer.unload()
    check(model, inputs)
    with torch.no_grad():
        assert torch.equal(model(inputs), shared_model(name)(**inputs).logits)


def test_hooks_that_are_on_follow_an_adapter() -> None:
    """A hook added before the adapter edits what the adapted layer gives, also where the module is called by itself."""
    name = "llava-clip-llama"
    module = fresh(name)
    inputs, model = case(name).inputs(module, batch=1), cv.HookedModel(module)
    site = "language.blocks.1.attn.hook_q"
    model.add_hook(site, lambda value, hook: value * 1.5)
    owner = model.language
    with torch.no_grad():
        model(inputs)
        adapted(module, lora("q_proj"))
        found, direct = model(inputs), module(**inputs).logits
        model.reset_hooks()
        layer = owner.blocks[1].module.self_attn.q_proj
        handle = layer.register_forward_hook(lambda module, args, out: out * 1.5)
        expected = module(**inputs).logits
        handle.remove()
        close(found, expected, "hook")
        close(direct, expected, "hook in a direct call")
        assert not layer.base_layer._forward_hooks
        close(model.run(inputs, [edits.scale(site, 1.5)]), expected, "edit")
        effects = model.sweep(inputs, [edits.scale(site, 1.5)], lambda out: out[:, -1, 3]).values
        close(effects[0], expected[:, -1, 3], "sweep")


def test_readouts_read_the_adapted_head() -> None:
    name = "llava-clip-llama"
    outer = adapted(fresh(name), lora("lm_head", "o_proj", "down_proj"))
    inputs, model = case(name).inputs(outer, batch=1), cv.HookedModel(outer)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs, "**")
        base = outer.get_base_model()
        head, _ = measured(base.lm_head)
        rows, _ = measured(base.model.language_model.layers[0].mlp.down_proj)
    vectors = cv.readout.value_vectors(model.language, layers=0, targets=[3, 4])
    close(vectors.values[0], (rows @ head)[:, [3, 4]], "value vectors")
    found = cv.readout.direct_attribution(model, cache, (3, 4), by="neuron")
    close(found.values.sum(0), (out[:, -1, 3] - out[:, -1, 4]), "attribution")
    with torch.no_grad():
        close(model.language.readout(cache["language", "resid_post", 1]), out, "read-out")


def test_a_tied_embedding_is_read_with_its_adapter() -> None:
    """PI0's language tower has no head: its lens is the embedding, without Gemma's factor."""
    outer = adapted(fresh("pi0"), lora("embed_tokens"))
    model = cv.HookedModel(outer)
    table: Any = outer.get_base_model().model.vlm.language_model.embed_tokens
    with torch.no_grad():
        expected = table(torch.arange(table.base_layer.num_embeddings)) / table.base_layer.embed_scale
    close(model.language.W_E, expected, "W_E")
    close(model.language.W_U, expected.T, "W_U")
    close(cv.readout.unembedding_matrix(model.language, gain=False).matrix, expected.T, "matrix")


def test_a_patch_embedding_is_read_with_its_adapter() -> None:
    outer = adapted(fresh("vit"), lora("projection"))
    model = cv.HookedModel(outer)
    pixels = torch.randn(1, 3, *([model.vision.cfg.patch_size] * 2))
    layer: Any = outer.get_base_model().vit.embeddings.patch_embeddings.projection
    with torch.no_grad():
        expected = (layer(pixels) - layer(torch.zeros_like(pixels))).flatten()
    assert type(layer).__name__ == "Conv2d"
    assert hasattr(layer, "lora_A")
    close(pixels.flatten() @ model.vision.W_E, expected, "W_E")


@pytest.mark.parametrize("state", ["on", "disabled", "merged"])
def test_the_pooling_attention_is_read_with_its_adapter(state: str) -> None:
    outer = adapted(fresh("siglip"), LoraConfig(r=3, target_modules=r".*head\.attention", init_lora_weights=False))
    inputs, model = case("siglip").inputs(outer, batch=2), cv.HookedModel(outer)
    pool = outer.get_base_model().vision_model.head
    if state == "merged":
        outer.merge_adapter()
    if state == "disabled":
        outer.base_model.disable_adapter_layers()
    with torch.no_grad():
        plain = cv.HookedModel(fresh("siglip"))(inputs)
        out, cache = model.run_with_cache(inputs, "vision.**")
        assert torch.allclose(out, plain, atol=1e-4) == (state == "disabled")
        stream = cache["vision.ln_final.hook_normalized"]
        gain, offset = model.vision.final_norm.weight, model.vision.final_norm.bias
        hidden = stream * gain + offset
        # Values, by the module itself: one key at a time, so that the pattern is 1.
        z = cache["vision.pool.attn.hook_z"]
        pattern, v = cache["vision.pool.attn.hook_pattern"], cache["vision.pool.attn.hook_v"]
        close(torch.einsum("bhqk,bkhd->bqhd", pattern, v), z, "z")
        alone = pool.attention(pool.probe.expand(2, -1, -1), hidden[:, :1], hidden[:, :1])[0][:, 0]
        written = model.run_with_hooks(
            inputs,
            [
                (
                    "vision.pool.attn.hook_pattern",
                    lambda value, hook: nn.functional.one_hot(
                        torch.zeros(value.shape[:-1], dtype=torch.long), value.shape[-1]
                    ).to(value),
                )
            ],
        )
        handle = pool.attention.register_forward_hook(lambda module, args, output: (alone[:, None], output[1]))
        expected = model.module(**inputs).logits_per_image
        handle.remove()
    close(written, expected, "output with the pattern on the first position")


def test_dropout_of_an_adapter_is_off_while_measuring() -> None:
    outer = adapted(fresh("vit"), lora("q_proj", lora_dropout=0.5)).train()
    model = cv.HookedModel(outer)
    assert torch.equal(model.vision.W_Q, model.vision.W_Q)
    assert all(part.training for part in outer.modules() if isinstance(part, nn.Dropout))
    found = model.vision.W_Q
    outer.eval()
    close(found, model.vision.W_Q, "W_Q")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    outer = adapted(fresh("vit").to(dtype), lora("q_proj"))
    layer: Any = outer.get_base_model().vit.layers[0].attention.q_proj
    found = cv.HookedModel(outer).vision.blocks[0].W_Q
    assert found.dtype == dtype
    with torch.no_grad():
        delta = layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        expected = layer.base_layer.weight.float() + delta * layer.scaling["default"]
    assert torch.allclose(flat(found, "q").float(), expected.T, atol=8 * torch.finfo(dtype).eps)


# -- what is refused -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("config", [PromptTuningConfig, PrefixTuningConfig])
def test_learned_prompts_are_refused(config: Any) -> None:
    class Outer(nn.Module):
        """What peft makes of a language model, without one: it looks for names that models of images do not have."""

        def __init__(self) -> None:
            super().__init__()
            self.inner = fresh("vit")
            self.peft_config = {"default": config(task_type="CAUSAL_LM", num_virtual_tokens=3)}

        def get_base_model(self) -> nn.Module:
            return self.inner

    with pytest.raises(UnsupportedModelError, match="learned prompts"):
        cv.HookedModel(Outer())


def test_adapters_that_depend_on_the_input_are_refused() -> None:
    outer = adapted(fresh("vit"), lora("q_proj"))
    outer.peft_config["default"].alora_invocation_tokens = [1, 2]
    with pytest.raises(UnsupportedModelError, match="other weights for other inputs"):
        cv.HookedModel(outer)
    outer.peft_config["default"].alora_invocation_tokens = None
    model = cv.HookedModel(outer)
    with pytest.raises(InputError, match="adapter_names"):
        model(case("vit").inputs(outer, batch=1), adapter_names=["default"])


def test_one_module_in_two_places_is_refused() -> None:
    module = fresh("vit")
    module.vit.layers[1] = module.vit.layers[0]
    with pytest.raises(UnsupportedModelError, match="one and the same"):
        cv.HookedModel(module)
    module = fresh("siglip")
    module.text_model.encoder.layers[0].layer_norm1 = module.vision_model.encoder.layers[0].layer_norm1
    with pytest.raises(UnsupportedModelError, match="one and the same"):
        cv.HookedModel(module)


def test_tied_parameters_are_no_shared_modules() -> None:
    module = fresh("vit")
    module.vit.layers[1].attention.q_proj.weight = module.vit.layers[0].attention.q_proj.weight
    model = cv.HookedModel(module)
    assert torch.equal(model.vision.W_Q[0], model.vision.W_Q[1])
    # An adapter on one of them is on no other.
    adapted(module, LoraConfig(r=3, target_modules=r".*layers\.0\..*q_proj", init_lora_weights=False))
    assert not torch.allclose(model.vision.W_Q[0], model.vision.W_Q[1], atol=1e-3)
    check(model, case("vit").inputs(module, batch=1))


# -- folders -------------------------------------------------------------------------------------------------------------------------------


def saved_adapter(folder: Path, base: Path, config: Any) -> Any:
    module = type(shared_model("vit")).from_pretrained(base)
    outer = adapted(module, config)
    outer.peft_config["default"].base_model_name_or_path = str(base)
    outer.save_pretrained(folder)
    return outer


def test_an_adapter_folder_loads(tmp_path: Path, folder_of: Any) -> None:
    base = folder_of(case("vit"))
    outer = saved_adapter(tmp_path, base, lora("q_proj", "fc1"))
    assert not (tmp_path / "config.json").exists()
    model = cv.HookedModel.from_pretrained(tmp_path)
    inputs = case("vit").inputs(outer, batch=1)
    assert isinstance(model.module, PeftModel)
    assert model.processor is not None
    assert not model.module.training
    with torch.no_grad():
        assert torch.equal(model(inputs), outer(**inputs).logits)
    check(model, inputs)


def test_an_adapter_folder_without_peft_says_so(
    tmp_path: Path, folder_of: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved_adapter(tmp_path, folder_of(case("vit")), lora("q_proj"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match="pip install peft"):
        cv.HookedModel.from_pretrained(tmp_path)


def test_an_adapter_folder_without_its_model_says_so(tmp_path: Path, folder_of: Any) -> None:
    import json

    saved_adapter(tmp_path, folder_of(case("vit")), lora("q_proj"))
    path = tmp_path / "adapter_config.json"
    saved = json.loads(path.read_text())
    for base, match in ((None, "does not say for which model"), (str(tmp_path / "gone"), "gone is not a folder")):
        path.write_text(json.dumps({**saved, "base_model_name_or_path": base}))
        with pytest.raises(InputError, match=match):
            cv.HookedModel.from_pretrained(tmp_path)


# -- mutants -------------------------------------------------------------------------------------------------------------------------------


def test_mutant_sites_stay_where_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree.ModuleTree, "intact", lambda self: True)
    assert caught(test_hooks_that_are_on_follow_an_adapter)


def test_mutant_sites_are_found_again_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The check notices hooks that were on before the adapter and stay on the layer inside it when the module is called by itself."""
    monkeypatch.setattr(hooked.HookedModel, "_follow", lambda self: None)
    assert caught(test_hooks_that_are_on_follow_an_adapter)


def test_mutant_the_layer_inside_the_adapter_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    original = projections.linear_weight
    monkeypatch.setattr(projections, "linear_weight", lambda module, *rest: original(weights.base_layer(module), *rest))
    assert caught(test_before_wrapping_after_it_disabled_and_merged, "vit", "all linear")


def test_mutant_an_adapted_embedding_is_a_linear_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "embedding_weight", lambda module, *rest: weights.base_layer(module).weight.flatten(1).T)
    assert caught(test_a_tied_embedding_is_read_with_its_adapter)
    assert caught(test_before_wrapping_after_it_disabled_and_merged, "llava-clip-llama", "embeddings and heads")

"""Attention at decoding steps of decoders that mix full and sliding layers. Truth: one run of the bare module over the whole text."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoConfig, LlavaForConditionalGeneration, PaliGemmaForConditionalGeneration

import circuitvision as cv
from circuitvision.readout.attention import cache as attention_cache
from tests.readout.layouts import by_row

IMAGE, WINDOW, NEW = 4, 5, 6
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
VISION = {
    "model_type": "siglip_vision_model",
    "hidden_size": 14,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 17,
    "image_size": 15,
    "patch_size": 5,
    "vision_use_head": False,
}
SIZES = {"num_hidden_layers": 4, "vocab_size": 61, "max_position_embeddings": 128, "sliding_window": WINDOW, **IDS}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 28,
    "num_attention_heads": 7,
    "num_key_value_heads": 1,
    "intermediate_size": 34,
    "use_sliding_window": True,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    **SIZES,
}
GEMMA = {
    "model_type": "gemma2",
    "hidden_size": 24,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "intermediate_size": 24,
    "query_pre_attn_scalar": 17,
    **SIZES,
}


def built(family: str) -> tuple[Any, dict[str, Tensor]]:
    torch.manual_seed(0)
    text = QWEN if family == "llava" else GEMMA
    kind, cls = {
        "llava": ("llava", LlavaForConditionalGeneration),
        "paligemma": ("paligemma", PaliGemmaForConditionalGeneration),
    }[family]
    options = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"} if family == "llava" else {}
    if family == "paligemma":
        options |= {"projection_dim": text["hidden_size"], "eos_token_id": 2}
    config = AutoConfig.for_model(
        kind, vision_config=dict(VISION), text_config=dict(text), image_token_id=IMAGE, **options
    )
    module: Any = cls(config)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.4)
    module = module.eval()
    module.generation_config.eos_token_id = None
    rows = [[IMAGE] * 9 + [1, 7, 8, 9], [IMAGE] * 9 + [1, 11]]
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    inputs = {
        "input_ids": ids,
        "attention_mask": (ids != 0).long(),
        "pixel_values": torch.randn(2, 3, 15, 15, generator=torch.Generator().manual_seed(1)),
    }
    return module, inputs | ({"token_type_ids": torch.zeros_like(ids)} if family == "paligemma" else {})


def generated(family: str) -> tuple[cv.HookedModel, dict[str, Tensor], Any, list[Tensor]]:
    module, inputs = built(family)
    model = cv.HookedModel(module)
    with torch.no_grad(), model.record("language.blocks.*.attn.hook_pattern") as cache:
        ids = model.generate(inputs, max_new_tokens=NEW, do_sample=False, suppress_tokens=[IMAGE, 0])
    new = ids[:, inputs["input_ids"].shape[1] :]
    longer = dict(inputs)
    longer["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
    longer["attention_mask"] = torch.cat([inputs["attention_mask"], torch.ones_like(new)], 1)
    if "token_type_ids" in inputs:
        longer["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.ones_like(new)], 1)
    longer["position_ids"] = (longer["attention_mask"].cumsum(1) - 1).clamp_min(0) + int(family == "paligemma")
    module.set_attn_implementation("eager")
    with torch.no_grad():
        whole = module(**longer, output_attentions=True).attentions
    return model, inputs, cache, list(whole)


def check(family: str) -> None:
    model, inputs, cache, whole = generated(family)
    length, sliding = inputs["input_ids"].shape[1], 1 if family == "llava" else 0
    kinds = model.tokens(inputs)["language"].kind
    for step in (1, 3, NEW - 1):
        at, seen = length + step - 1, length + step
        truth = torch.stack([layer[:, :, at, :seen] for layer in whole]).double()
        spans = {"patch": torch.from_numpy(kinds == "patch"), "text": torch.from_numpy(kinds == "text")}
        found = cv.readout.attention_mass(
            model, cache, tower="language", step=step, spans={"patch": "patch", "text": "text"}
        )
        for number, (name, mask) in enumerate(spans.items()):
            assert found.axes["span"][number] == name
            by_hand = torch.einsum("lrhk,rk->lhr", truth[..., :length], mask.double())
            torch.testing.assert_close(by_row(found)[..., number].double(), by_hand, rtol=0, atol=2e-5)
        entropy = cv.readout.attention_entropy(cache.model, cache, tower="language", step=step)
        by_hand = torch.special.entr(truth).sum(-1).permute(0, 2, 1)
        torch.testing.assert_close(by_row(entropy).double(), by_hand, rtol=0, atol=2e-4)
        visible = (truth.amax(2) > 0).sum(-1)
        torch.testing.assert_close(by_row(entropy, "uniform").double(), visible.double().log(), rtol=0, atol=1e-5)
        maps = cv.readout.attention_maps(cache.model, cache, tower="language", steps=step)
        assert maps.axes["key"] == list(range(length))
        torch.testing.assert_close(by_row(maps).double(), truth.permute(0, 2, 1, 3)[..., :length], rtol=0, atol=2e-5)
        single = cv.readout.attention_maps(cache.model, cache, tower="language", steps=step, layers=[sliding])
        # Of a sliding layer alone the keys are those in the window, under their own numbers.
        assert single.axes["key"] == list(range(seen - WINDOW, length))
        by_hand = truth[sliding].permute(1, 0, 2)[..., seen - WINDOW : length]
        torch.testing.assert_close(by_row(single)[0].double(), by_hand, rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["llava", "paligemma"])
def test_every_layer_is_read_at_its_own_keys(family: str) -> None:
    check(family)


def test_keys_laid_on_the_first_positions_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_the_end(pattern: Tensor, n_keys: int) -> Tensor:
        return torch.nn.functional.pad(pattern, (0, n_keys - pattern.shape[-1]))

    monkeypatch.setattr(attention_cache, "_with_all_keys", at_the_end)
    with pytest.raises(AssertionError):
        check("llava")


def test_prompts_longer_than_the_window_and_sources_of_a_step() -> None:
    model, inputs, cache, whole = generated("llava")
    length = inputs["input_ids"].shape[1]
    prompt = cv.readout.attention_mass(model, cache, tower="language", step=0, queries="last", spans={"patch": "patch"})
    mask = torch.from_numpy(model.tokens(inputs)["language"].kind == "patch").double()
    truth = torch.stack(
        [torch.einsum("rhk,rk->hr", layer[:, :, length - 1, :length].double(), mask) for layer in whole]
    )
    torch.testing.assert_close(by_row(prompt)[..., 0].double(), truth, rtol=0, atol=2e-5)
    with torch.no_grad(), model.record() as cache:
        model.generate(inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[IMAGE, 0])
    by_source = cv.readout.source_attribution(model, cache, (7, 9), step=2)
    by_head = cv.readout.direct_attribution(model, cache, (7, 9), step=2)
    assert by_row(by_source).shape[-1] == length + 2
    dropped = by_row(by_source)[1, ..., : length + 2 - WINDOW]
    assert np.allclose(dropped, 0)
    for head in range(7):
        torch.testing.assert_close(by_row(by_source)[3, head].sum(-1), by_head[f"L3H{head}"], rtol=1e-3, atol=1e-5)

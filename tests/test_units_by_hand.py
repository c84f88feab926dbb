"""Units of head importance and terms of scores on prompts of other lengths with two images, against the bare module and its own attentions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import circuitvision as cv
from circuitvision.circuits import head_importance, parse_id, qk_attribution

D_HEAD, IMAGE = 8, 39


def llava(kv_heads: int) -> nn.Module:
    torch.manual_seed(kv_heads)
    text = transformers.LlamaConfig(
        vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=kv_heads,
        max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    vision = transformers.CLIPVisionConfig(
        hidden_size=24, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, image_size=16, patch_size=8
    )
    config = transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)
    module = transformers.LlavaForConditionalGeneration(config).eval()
    for parameter in module.parameters():
        parameter.data += 0.25 * torch.randn_like(parameter)
    return module


def prompts(seed: int, left: bool) -> dict[str, Tensor]:
    """Two prompts of 13 and 11 tokens, with two images of four patches each."""
    rows = [[1, *[IMAGE] * 4, 5, 6, 7, *[IMAGE] * 4, 8], [1, *[IMAGE] * 4, 5, *[IMAGE] * 4, 9]]
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, longest, dtype=torch.long), torch.zeros(2, longest, dtype=torch.long)
    for row, told in enumerate(rows):
        where = slice(longest - len(told), longest) if left else slice(0, len(told))
        ids[row, where], mask[row, where] = torch.tensor(told), 1
    pixels = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": pixels}


def score(logits: Tensor) -> Tensor:
    return logits[:, -1, :7].double().sin().sum(-1)


Part = tuple[nn.Module, bool, slice]


def parts(module: Any, unit: str, groups: dict[str, list[int]]) -> list[Part]:
    """The submodules whose input (True) or output holds a unit, and its columns."""
    node = parse_id(unit)
    block = module.model.language_model.layers[node.layer]
    own = slice(node.head * D_HEAD, (node.head + 1) * D_HEAD)
    if node.kind == "head":
        return [(block.self_attn.o_proj, True, own)]
    if node.kind == "kv_head":
        return [(one, False, own) for one in (block.self_attn.k_proj, block.self_attn.v_proj)]
    if node.kind == "neuron_group":
        return [(block.mlp.down_proj, True, slice(groups[unit][0], groups[unit][-1] + 1))]
    return [(block.mlp, False, slice(None))]


def tapped(module: nn.Module, inputs: dict[str, Tensor], taps: list[tuple[Part, Callable[[Tensor], Any]]]) -> Tensor:
    handles = []
    for (part, before, _), change in taps:

        def entering(_: Any, given: Any, change: Any = change) -> Any:
            found = change(given[0])
            return None if found is None else (found, *given[1:])

        def leaving(_: Any, __: Any, out: Any, change: Any = change) -> Any:
            return change(out)

        handles.append(part.register_forward_pre_hook(entering) if before else part.register_forward_hook(leaving))
    with torch.no_grad():
        found = module(**inputs).logits
    for handle in handles:
        handle.remove()
    return score(found)


@pytest.mark.parametrize("left", [True, False], ids=["left", "right"])
@pytest.mark.parametrize("kv_heads", [1, 4])
@pytest.mark.parametrize("method", ["patch", "zero"])
def test_every_unit_of_the_language_model_is_changed_as_by_hand(left: bool, kv_heads: int, method: str) -> None:
    module = llava(kv_heads)
    clean, corrupt = prompts(1, left), prompts(2, left)
    found = head_importance(
        cv.HookedModel(module), metric=score, clean=clean, corrupt=corrupt, method=method, neurons=4, top_k=1, n_random=2,
        units=["heads", "mlps", "kv_heads", "neurons"], progress=False,
    )  # fmt: skip
    base = corrupt if method == "patch" else clean
    start, seen = tapped(module, base, []), 0
    for unit, at in found._cells():
        if parse_id(unit).tower != "language":
            continue
        own, kept = parts(module, unit, found.neuron_groups), []
        tapped(module, clean, [(part, lambda value: kept.append(value.clone())) for part in own])
        taps = []
        for part, value in zip(own, kept, strict=True):

            def put(given: Tensor, value: Tensor = value, columns: slice = part[2]) -> Tensor:
                new = given.clone()
                new[..., columns] = value[..., columns] if method == "patch" else 0.0
                return new

            taps.append((part, put))
        torch.testing.assert_close(found.values[at], tapped(module, base, taps) - start, rtol=0, atol=2e-5)
        seen += 1
    assert seen == 2 * (4 + 1 + kv_heads + 4)
    assert float(found.effects.nan_to_num().abs().max()) > 0.5


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_terms_of_a_score_are_the_odds_of_the_models_own_attention(kv_heads: int) -> None:
    """``ln A_ts − ln A_ts'`` is a difference of scores, whatever the rest of the row holds."""
    module = llava(kv_heads)
    inputs = prompts(1, left=True)
    module.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = module(**inputs, output_attentions=True).attentions
    model = cv.HookedModel(module)
    for head in (0, 3):
        found = qk_attribution(model, inputs, f"language L1H{head}", query=12, key=6, against=9)
        odds = (attentions[1][:, head, 12, 6] / attentions[1][:, head, 12, 9]).double().log()
        torch.testing.assert_close(
            (found.values.sum((0, 1)) + found.position_bias).double(), odds, rtol=1e-4, atol=1e-4
        )
        assert float(odds.abs().max()) > 0.5

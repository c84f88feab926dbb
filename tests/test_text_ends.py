"""Where the texts of dual encoders are read: CLIP's rule and MetaCLIP 2's, which differ where the id of the end of text is 2."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.model import pooling
from tests.zoo import case


def ends(name: str) -> tuple[cv.HookedModel, dict[str, torch.Tensor], torch.Tensor, torch.Tensor]:
    """A model, inputs, the text embeddings the module computes, and those read off the stream."""
    tiny = case(name)
    module = tiny.build().double().eval()
    model, inputs = cv.HookedModel(module), tiny.inputs(module, batch=2, dtype=torch.float64)
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, "text.blocks.1.hook_resid_post")
        expected = module.get_text_features(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
        expected = getattr(expected, "pooler_output", expected)
        last = cache["text.blocks.1.hook_resid_post"]
        at = pooling.eos_positions(model.text, inputs)
        read = module.text_projection(module.text_model.final_layer_norm(last)[torch.arange(len(at)), at])
    return model, inputs, expected, read


@pytest.mark.parametrize("name", ["clip", "clip-argmax", "metaclip2"])
def test_texts_are_read_where_the_model_reads_them(name: str) -> None:
    _, _, expected, read = ends(name)
    torch.testing.assert_close(read, expected, rtol=1e-12, atol=1e-12)


def test_the_rule_of_clip_is_wrong_for_metaclip_2(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pooling, "eos_positions", lambda tower, inputs: inputs["input_ids"].argmax(-1))
    _, _, expected, read = ends("metaclip2")
    assert (read - expected).norm() > 0.5 * expected.norm()


def test_positions_behind_the_first_end_are_dead() -> None:
    model, inputs, _, _ = ends("metaclip2")
    end = (inputs["input_ids"] == 2).int().argmax(-1)
    dead = model.dead_positions("text.blocks.0.hook_resid_post", inputs)
    assert torch.equal(dead, torch.arange(dead.shape[1])[None] > end[:, None])

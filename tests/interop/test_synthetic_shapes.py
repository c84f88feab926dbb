"""Views of blocks of every shape: nnsight reads and edits what our hooks do, TransformerLens's view has the weights as the stream sees them."""

from __future__ import annotations

import pytest
import torch

import circuitvision as cv
from circuitvision.errors import UnsupportedModelError
from circuitvision.interop import nnsight_view
from tests.synthetic_blocks import SHAPES
from tests.test_synthetic_blocks import EXACT, built

pytestmark = pytest.mark.usefixtures("tables")
SOME = [
    "fused_groups",
    "norms_heads_first",
    "norms_of_all_heads",
    "tanh_gates",
    "third_writer",
    "parallel_shared",
    "post_norm",
    "deepstack",
    "flat",
]


@pytest.mark.parametrize("shape", SOME)
def test_nnsight_reads_and_edits_what_our_hooks_do(shape: str) -> None:
    _, model, inputs = built(shape)
    nn = cv.interop.nnsight(model)
    hosts = nnsight_view.hosts(model)
    envoys = {id(envoy._module): envoy for envoy in nn.modules()}
    offered = [site for site in nn.sites() if ".blocks.1." in site]
    assert len(offered) > 8
    assert all(nn.reason(site) for site in set(model.sites()) - set(nn.sites()))
    with torch.no_grad():
        _, cache = model.run_with_cache(inputs, offered)
        for site in offered:
            prefix, _, last = site.rpartition(".")
            envoy = envoys[id(hosts[prefix])]
            with nn.trace(**inputs):
                value = getattr(envoy, last).save()
            torch.testing.assert_close(
                value, cache[site], rtol=0, atol=0, msg=lambda text, site=site: f"{site}: {text}"
            )
            expected = model.run_with_hooks(inputs, [(site, lambda value, where: value * 1.25)])
            with nn.trace(**inputs):
                setattr(envoy, last, getattr(envoy, last) * 1.25)
                output = nn.output.save()
            torch.testing.assert_close(
                output["logits"], expected, **EXACT, msg=lambda text, site=site: f"{site}: {text}"
            )


@pytest.mark.parametrize("shape", SHAPES)
def test_the_view_for_transformer_lens_has_what_heads_add(shape: str) -> None:
    _, model, inputs = built(shape)
    view = cv.interop.transformer_lens(model, tower="vision")
    _, cache = model.run_with_cache(inputs)
    for layer, block in enumerate(view.blocks):
        if "behind" in shape:
            with pytest.raises(UnsupportedModelError, match="norm"):
                _ = block.attn.W_O
            continue
        added = (
            torch.einsum("bphd,hdm->bpm", cache[f"vision.blocks.{layer}.attn.hook_z"], block.attn.W_O) + block.attn.b_O
        )
        torch.testing.assert_close(added, cache[f"vision.blocks.{layer}.hook_attn_out"], **EXACT)

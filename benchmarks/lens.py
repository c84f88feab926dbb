"""What a logit lens costs at the shape of LLaVA-1.5-7B: memory above the model and the recorded residuals, and time beside its unavoidable product.

The model has the widths, depth and vocabulary of LLaVA-1.5-7B and random weights; only what a lens reads (final norm, head, projector) is in
memory, the blocks stay on the meta device, because a lens never calls them. The residuals of 33 layers × 600 positions are random: neither
memory nor time depends on their values. Three readers of the same residuals:

* ``circuitvision``: ``logit_lens`` with two targets (values, ranks and the five highest tokens at every place), or the ten highest tokens;
* ``layer by layer``: the loop everybody writes, one layer's logits at a time, the same things kept;
* ``all logits``: every logit of every layer kept, as the published notebooks do before they look at any.

    python benchmarks/lens.py                  # about fifteen minutes on one CPU core
    python benchmarks/lens.py --device cuda
    python benchmarks/lens.py --quick          # a narrow model, seconds
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import interleaved, peak_bytes, surroundings
from torch import Tensor
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

import circuitvision as cv

RESULTS = Path(__file__).parent / "results"
IMAGE_TOKENS, TEXT_TOKENS = 576, 24


def model_of(narrow: bool, device: torch.device, dtype: torch.dtype) -> cv.HookedModel:
    """A LLaVA of the real shape (or a narrow one) whose final norm, head and projector are in memory, the rest on the meta device."""
    width, layers, vocabulary = (256, 4, 4096) if narrow else (4096, 32, 32064)
    text = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 43 // 16,
        num_hidden_layers=layers,
        num_attention_heads=width // 128,
        num_key_value_heads=width // 128,
        vocab_size=vocabulary,
        rms_norm_eps=1e-5,
    )
    vision = CLIPVisionConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocabulary - 64)
    with torch.device("meta"):
        module = LlavaForConditionalGeneration(config).eval().to(dtype)
    for part in (module.model.language_model.norm, module.lm_head, module.model.multi_modal_projector):
        part.to_empty(device=device)
        for parameter in part.parameters():
            torch.nn.init.normal_(parameter, std=0.02)
    return cv.HookedModel(module)


def cache_of(model: cv.HookedModel, device: torch.device, dtype: torch.dtype) -> cv.ActivationCache:
    """Residuals of every layer at 600 positions, as one run of one image and question would leave them."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.full((1, IMAGE_TOKENS + TEXT_TOKENS), 5)
    ids[:, 5 : 5 + IMAGE_TOKENS] = model.image_token_id
    width = model.language.cfg.d_model
    shape = (1, ids.shape[1], width)
    values = {name: torch.randn(shape, generator=generator).to(device, dtype) for name in model.language.stream_sites()}
    pixels = torch.zeros(1, 3, 336, 336)
    return cv.ActivationCache(values, model, {"input_ids": ids, "pixel_values": pixels})


def readers(model: cv.HookedModel, cache: cv.ActivationCache) -> dict[str, Callable[[], Any]]:
    """What is measured, by name."""
    names, targets = list(cache), torch.tensor([17, 99])

    def head(value: Tensor) -> Tensor:
        module: Any = model.module
        return module.lm_head(model.language.final_norm(value))

    def loop() -> list[tuple[Tensor, Tensor, Tensor]]:
        kept = []
        with torch.no_grad():
            for name in names:
                logits = head(cache[name]).float()
                values = logits[..., targets]
                ranks = torch.stack([1 + (logits > values[..., i, None]).sum(-1) for i in range(2)], -1)
                kept.append((values, ranks, logits.topk(5).indices))
        return kept

    def everything() -> Tensor:
        with torch.no_grad():
            return torch.stack([head(cache[name]).float() for name in names])

    def product() -> None:
        with torch.no_grad():
            for name in names:
                for start in range(0, IMAGE_TOKENS + TEXT_TOKENS, 100):
                    head(cache[name][:, start : start + 100])

    return {
        "the product alone": product,
        "circuitvision, two targets with ranks": lambda: cv.readout.logit_lens(model, cache, targets={17: 17, 99: 99}),
        "circuitvision, ten highest": lambda: cv.readout.logit_lens(model, cache, top_k=10),
        "layer by layer": loop,
        "all logits": everything,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--seconds", type=float, default=120, help="time for the timed rounds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cv.set_verbosity("quiet")
    model = model_of(arguments.quick, device, dtype)
    cache = cache_of(model, device, dtype)
    few = cv.ActivationCache(dict(list(cache.items())[:3]), model, cache.inputs)
    _check(model, few, readers(model, few))
    variants = readers(model, cache)
    peaks = {name: peak_bytes(run, device) / 2**20 for name, run in variants.items()}
    reference = "the product alone"
    # Time is proportional to the number of layers; three of them say the same ratio as all.
    timings = interleaved(readers(model, few), reference, device, arguments.seconds, 3)
    held = sum(value.nbytes for value in cache.values()) / 2**20
    lines = [
        f"| reader | time ÷ the product alone (3 layers) | peak MiB above model and residuals ({held:.0f} MiB) |",
        "|---|---|---|",
        *(f"| {name} | {timings[name].ratio:.2f} | {peaks[name]:.0f} |" for name in variants),
    ]
    table = "\n".join(lines)
    print(table)
    arguments.results.mkdir(exist_ok=True)
    stem = arguments.results / f"lens-{device.type}"
    shape = (
        f"{model.language!r}, vocabulary {model.language.W_U.shape[1]}, {IMAGE_TOKENS + TEXT_TOKENS} positions, {dtype}"
    )
    where = surroundings(device)
    text = f"# The lens at the shape of LLaVA-1.5-7B\n\n{shape}; {where['device_name']}.\n\n{table}\n"
    stem.with_suffix(".md").write_text(text)
    found = {name: {"ratio": timings[name].ratio, "peak_mib": peaks[name]} for name in variants}
    stem.with_suffix(".json").write_text(json.dumps({"shape": shape, "readers": found, **where}, indent=1) + "\n")


def _check(model: cv.HookedModel, cache: cv.ActivationCache, variants: dict[str, Callable[[], Any]]) -> None:
    """Both readers see the same values before anything is timed."""
    ours, theirs = variants["circuitvision, two targets with ranks"](), variants["layer by layer"]()
    for layer, (values, ranks, _) in enumerate(theirs):
        # Results keep examples last, the hand-written reader has the model's rows first.
        own, own_ranks = (held[layer].movedim(-1, 0) for held in (ours.values, ours.ranks))
        torch.testing.assert_close(own, values.cpu(), atol=1e-3, rtol=1e-3)
        if values.dtype == torch.float32 and not torch.equal(own_ranks, ranks.cpu()):
            share = (own_ranks - ranks.cpu()).abs().float().mean()
            assert share < 2, f"ranks differ by {share} on average"


if __name__ == "__main__":
    main()

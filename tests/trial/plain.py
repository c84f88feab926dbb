"""The same places in plain PyTorch: torch hooks on the bare modules, paths written down by hand, arithmetic from the papers of the parts.

Nothing here asks the library. ``hooked(module, site, fn)`` lets ``fn`` replace the value of a site; what a site *is* stands below, a line each:
``fn`` gets ``[row, pos, …]`` (heads split off, ``[row, head, query, key]`` for scores and patterns) and the number of the pass.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

Fn = Callable[[Tensor, int], Tensor]

VIT = {"ln1": "layernorm_before", "attn": "attention", "o": "attention.o_proj", "ln2": "layernorm_after"}
CLIP = {"ln1": "layer_norm1", "attn": "self_attn", "o": "self_attn.out_proj", "ln2": "layer_norm2"}
DINO = {"ln1": "norm1", "attn": "attention", "o": "attention.o_proj", "ln2": "norm2"}
DINO |= {"attn_add": "layer_scale1", "mlp_add": "layer_scale2", "gate": "mlp.gate_proj"}
LLAMA = {"ln1": "input_layernorm", "attn": "self_attn", "o": "self_attn.o_proj", "ln2": "post_attention_layernorm"}
LLAMA |= {"gate": "mlp.gate_proj"}
GEMMA2 = LLAMA | {"ln2": "pre_feedforward_layernorm"}
GEMMA2 |= {"attn_add": "post_attention_layernorm", "mlp_add": "post_feedforward_layernorm"}
BLOCKS = {"ViT": VIT, "DeiT": VIT, "Dinov2": DINO, "CLIP": CLIP, "Siglip": CLIP, "Gemma2": GEMMA2}
"""Start of a block's class name -> names of its parts; everything else is laid out as LLaMA's."""

ROOTS = {
    "ViTForImageClassification": {"vision": "vit"},
    "DeiTForImageClassificationWithTeacher": {"vision": "deit"},
    "Dinov2WithRegistersForImageClassification": {"vision": "dinov2_with_registers"},
    "CLIPModel": {"vision": "vision_model", "text": "text_model"},
    "SiglipModel": {"vision": "vision_model", "text": "text_model"},
    "Siglip2Model": {"vision": "vision_model", "text": "text_model"},
    "PI0ForConditionalGeneration": {
        "vision": "model.vlm.vision_tower",
        "language": "model.vlm.language_model",
        "action": "model.dit",
    },
}
VLM = {"vision": "model.vision_tower", "language": "model.language_model"}
EAGER = ("attn.hook_attn_scores", "attn.hook_pattern", "attn.hook_rot_q", "attn.hook_rot_k")


def root(module: Any, tower: str) -> Any:
    """The transformer of a tower."""
    return module.get_submodule(ROOTS.get(type(module).__name__, VLM)[tower])


def blocks(module: Any, tower: str) -> list[Any]:
    """Its blocks."""
    inside = root(module, tower)
    inside = getattr(inside, "encoder", inside)
    return list(getattr(inside, "layers", None) or inside.layer)


def parts(block: Any) -> dict[str, Any]:
    """The parts of a block by short name: ln1, attn, q, k, v, o, ln2, first, last and, where there are, gate, attn_add, mlp_add."""
    names = next((table for start, table in BLOCKS.items() if type(block).__name__.startswith(start)), LLAMA)
    found = {short: block.get_submodule(path) for short, path in names.items()}
    found |= {letter: getattr(found["attn"], f"{letter}_proj") for letter in "qkv"}
    gated = "gate" in found
    found["first"] = block.mlp.up_proj if gated else block.mlp.fc1
    found["last"] = block.mlp.down_proj if gated else block.mlp.fc2
    return found


def final_norm(module: Any, tower: str) -> Any:
    """The norm after the last block."""
    inside = root(module, tower)
    for name in ("layernorm", "post_layernorm", "final_layer_norm", "norm"):
        if hasattr(inside, name):
            return getattr(inside, name)
    raise AssertionError(tower)


def connector(module: Any) -> Any:
    """The projector between vision and language."""
    inside = module.model
    return (inside.vlm if hasattr(inside, "vlm") else inside).multi_modal_projector


def _split(x: Tensor, size: int) -> Tensor:
    return x.unflatten(-1, (-1, size))


class _Count:
    """Numbers the passes of one hook."""

    def __init__(self, fn: Fn) -> None:
        self.fn, self.step = fn, -1

    def __call__(self, x: Tensor) -> Tensor:
        self.step += 1
        return self.fn(x, self.step)


def _first_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[str | None, Tensor]:
    if args:
        return None, args[0]
    name = next(key for key in ("hidden_states", "image_features", "input") if key in kwargs)
    return name, kwargs[name]


def before(module: nn.Module, change: Callable[[Tensor], Tensor]) -> Any:
    """A torch hook that replaces what a module reads; ahead of transformers' own."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name, x = _first_argument(args, kwargs)
        new = change(x)
        return ((new, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: new})

    return module.register_forward_pre_hook(hook, prepend=True, with_kwargs=True)


def after(module: nn.Module, change: Callable[[Tensor, Tensor], Tensor]) -> Any:
    """A torch hook that replaces what a module returns, given what it read; ahead of transformers' own."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        _, x = _first_argument(args, kwargs)
        if isinstance(out, tuple):
            return (change(x, out[0]), *out[1:])
        return change(x, out)

    return module.register_forward_hook(hook, prepend=True, with_kwargs=True)


def _norm_parts(norm: Any, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """The centred input, the denominator, and what makes the output of the normalised value."""
    if isinstance(norm, nn.LayerNorm):
        centred = x - x.mean(-1, keepdim=True)
        scale = (centred.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        return centred, scale, lambda n: n * norm.weight + norm.bias
    eps = getattr(norm, "variance_epsilon", None) or norm.eps
    scale = (x.float().pow(2).mean(-1, keepdim=True) + eps).sqrt()
    offset = 1.0 if "Gemma" in type(norm).__name__ else 0.0
    return x.float(), scale, lambda n: (n * (offset + norm.weight.float())).to(x.dtype)


def _norm(norm: Any, which: str, fn: _Count) -> Any:
    def change(x: Tensor, out: Tensor) -> Tensor:
        centred, scale, finish = _norm_parts(norm, x)
        if which == "hook_scale":
            new = fn(scale.to(x.dtype)).to(scale)
            return finish(centred / new).to(x.dtype)
        return finish(fn((centred / scale).to(x.dtype)).to(centred)).to(x.dtype)

    return after(norm, change)


@contextlib.contextmanager
def hooked(module: Any, site: str, fn: Fn) -> Iterator[None]:
    """``fn(value, pass)`` at a site for the length of the block."""
    with contextlib.ExitStack() as stack:
        for handle in _handles(module, site, _Count(fn), stack):
            stack.callback(handle.remove)
        yield


def _handles(module: Any, site: str, fn: _Count, stack: contextlib.ExitStack) -> list[Any]:
    if site.startswith("projector."):
        place = connector(module)
        return [before(place, fn) if site.endswith("_in") else after(place, lambda x, out: fn(out))]
    tower, _, rest = site.partition(".")
    if not rest.startswith("blocks."):
        return _tower_handles(module, tower, rest, fn)
    _, layer, name = rest.split(".", 2)
    block = blocks(module, tower)[int(layer)]
    return _block_handles(block, parts(block), name, fn, stack)


def _tower_handles(module: Any, tower: str, name: str, fn: _Count) -> list[Any]:
    if name == "hook_input":
        return [before(blocks(module, tower)[0], fn)]
    if name == "hook_embed":
        return [_embedding(root(module, tower), fn)]
    if name.startswith("pool."):
        return [_pooling(root(module, tower).head.attention, name.removeprefix("pool.attn."), fn)]
    if name.startswith("ln_final."):
        return [_norm(final_norm(module, tower), name.split(".")[1], fn)]
    if name == "hook_readout":
        head = {"vision": "visual_projection", "text": "text_projection", "language": "lm_head"}.get(tower, "")
        for candidate in (head, "classifier"):
            if hasattr(module, candidate):
                return [before(getattr(module, candidate), fn)]
    raise KeyError(name)


def _embedding(inside: Any, fn: _Count) -> Any:
    """Patches or words as they are embedded, before positions are added."""
    if hasattr(inside, "embed_tokens"):
        return after(inside.embed_tokens, lambda x, out: fn(out))
    for name in ("patch_embeddings", "patch_embedding", "token_embedding"):
        embed = getattr(inside.embeddings, name, None)
        if embed is not None:
            return after(embed, lambda x, out: _flat(fn, out))
    raise KeyError("hook_embed")


def _flat(fn: _Count, out: Tensor) -> Tensor:
    """A convolution gives ``[row, d_model, height, width]``, the site is ``[row, patch, d_model]``."""
    if out.ndim == 3:
        return fn(out)
    new = fn(out.flatten(2).transpose(1, 2))
    return new.transpose(1, 2).reshape(out.shape)


def _pooling(attn: nn.MultiheadAttention, stage: str, fn: _Count) -> Any:
    """SigLIP's pooling written out: one learned query looks at every position."""

    def hook(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))
        mask = kwargs.get("attn_mask")
        size = attn.head_dim
        w, b = attn.in_proj_weight.chunk(3), attn.in_proj_bias.chunk(3)
        made = {}
        for letter, x, weight, bias in zip("qkv", (query, key, value), w, b, strict=True):
            made[letter] = _split(x @ weight.T + bias, size)
            if stage == f"hook_{letter}":
                made[letter] = fn(made[letter])
        q, k, v = (made[letter].transpose(1, 2) for letter in "qkv")
        scores = q @ k.transpose(2, 3) / size**0.5
        if mask is not None:
            mask = mask.view(scores.shape[0], -1, *mask.shape[-2:])
            scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
        scores = fn(scores) if stage == "hook_attn_scores" else scores
        pattern = scores.softmax(-1)
        pattern = fn(pattern) if stage == "hook_pattern" else pattern
        z = (pattern @ v).transpose(1, 2)
        z = fn(z) if stage == "hook_z" else z
        return (z.flatten(2) @ attn.out_proj.weight.T + attn.out_proj.bias, pattern)

    return attn.register_forward_hook(hook, prepend=True, with_kwargs=True)


def _block_handles(block: Any, part: dict[str, Any], name: str, fn: _Count, stack: contextlib.ExitStack) -> list[Any]:
    size = part["attn"].head_dim
    out: Callable[[Tensor, Tensor], Tensor] = lambda x, y: fn(y)  # noqa: E731
    heads: Callable[[Tensor, Tensor], Tensor] = lambda x, y: fn(_split(y, size)).flatten(2)  # noqa: E731
    if name == "hook_resid_pre":
        # What the block before left, which others may have recorded (hidden states): all of them see it.
        return [before(block, lambda x: x.copy_(fn(x.clone())))]
    if name == "hook_resid_post":
        return [after(block, out)]
    if name == "hook_resid_mid":
        # Written into the very tensor that the skip path adds to, so that both ways see it.
        return [before(part["ln2"], lambda x: x.copy_(fn(x.clone())))]
    if name in ("hook_attn_out", "hook_mlp_out"):
        branch = name.removeprefix("hook_").removesuffix("_out")
        return [after(part.get(f"{branch}_add", part["o" if branch == "attn" else "last"]), out)]
    if name.startswith(("ln1", "ln2")):
        norm, which = name.split(".")
        place = {"ln1_post": "attn_add", "ln2_post": "mlp_add"}.get(norm, norm)
        return [_norm(part[place], which, fn)]
    if name in ("attn.hook_q", "attn.hook_k", "attn.hook_v"):
        return [after(part[name[-1]], heads)]
    if name == "attn.hook_z":
        return [before(part["o"], lambda x: fn(_split(x, size)).flatten(2))]
    if name == "attn.hook_result":
        return [after(part["o"], lambda x, y: _result(part["o"], size, x, y, fn))]
    if name in ("hook_q_input", "hook_k_input", "hook_v_input"):
        return _head_input(part, name[5], size, fn)
    if name == "hook_mlp_in":
        return [before(part["ln2"], fn)]
    if name == "mlp.hook_pre":
        return [after(part.get("gate", part["first"]), out)]
    if name == "mlp.hook_pre_linear":
        return [after(part["first"], out)]
    if name == "mlp.hook_post":
        return [before(part["last"], fn)]
    if name in EAGER:
        stack.enter_context(_attention(part["attn"], name.removeprefix("attn."), fn))
        return []
    raise KeyError(name)


def _result(o: Any, size: int, x: Tensor, y: Tensor, fn: _Count) -> Tensor:
    weight = _split(o.weight, size)  # [d_model, head, d_head]
    result = torch.einsum("rphd,mhd->rphm", _split(x, size), weight)
    return y + (fn(result.clone()) - result).sum(2)


def _head_input(part: dict[str, Any], letter: str, size: int, fn: _Count) -> list[Any]:
    seen: list[Tensor] = []
    norm, projection = part["ln1"], part[letter]

    def change(x: Tensor, y: Tensor) -> Tensor:
        count = y.shape[-1] // size
        inputs = fn(seen[-1][:, :, None].expand(-1, -1, count, -1).clone())
        centred, scale, finish = _norm_parts(norm, inputs)
        normed = finish(centred / scale).to(y.dtype)
        weight = projection.weight.unflatten(0, (count, size))
        new = torch.einsum("rphm,hdm->rphd", normed, weight)
        if projection.bias is not None:
            new = new + projection.bias.unflatten(0, (count, size))
        return new.flatten(2)

    def keep(x: Tensor) -> Tensor:
        seen.append(x)
        return x

    return [before(norm, keep), after(projection, change)]


@contextlib.contextmanager
def _attention(attn: Any, stage: str, fn: _Count) -> Iterator[None]:
    """Attention written out for one module, in place of its file's eager function; the others keep theirs."""
    home = sys.modules[type(attn).__module__]
    own = home.eager_attention_forward

    def written_out(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, **kwargs: Any) -> Any:
        if module is not attn:
            return own(module, q, k, v, mask, **kwargs)
        if stage == "hook_rot_q":
            q = fn(q.transpose(1, 2)).transpose(1, 2)
        if stage == "hook_rot_k":
            mine = k[:, :, -q.shape[2] :]
            mine.copy_(fn(mine.transpose(1, 2).clone()).transpose(1, 2))
        groups = q.shape[1] // k.shape[1]
        keys, values = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scale = kwargs.get("scaling") or module.scaling
        scores = q @ keys.transpose(2, 3) * scale
        cap = kwargs.get("softcap")
        if cap is not None:
            scores = cap * torch.tanh(scores / cap)
        if mask is not None:
            scores = scores + mask
        if stage == "hook_attn_scores":
            scores = fn(scores)
        pattern = scores.float().softmax(-1).to(q.dtype)
        if stage == "hook_pattern":
            pattern = fn(pattern)
        return (pattern @ values).transpose(1, 2).contiguous(), pattern

    home.eager_attention_forward = written_out
    try:
        yield
    finally:
        home.eager_attention_forward = own

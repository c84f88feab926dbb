"""The wrapper as a whole: bare outputs, unwrapping, weights, read-outs, generation, keys and values that reach later passes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import transformers
from packaging import version
from torch import Tensor, nn

import circuitvision as cv
from circuitvision.errors import InputError, UnsupportedModelError
from tests.conformance.cases import SHAPES
from tests.conformance.setting import (
    Setting,
    bare_output,
    close,
    disturb,
    eager,
    groups,
    needs_eager,
    nothing,
    real_rows,
    same,
)
from tests.parts import module_of


def wrapped_output_is_the_bare_output(setting: Setting) -> None:
    """Bit for bit: without hooks, with every site read but those of eager attention, and with all (against the model's eager run).

    In every padding, with several images and another image size where the case takes them; padding positions excepted.
    """
    model, bare = setting.model(), setting.copy()
    for options in variants(setting):
        inputs = setting.inputs(bare, **options)
        with setting.mode():
            expected = real_rows(setting, inputs, bare_output(bare, inputs))
            same(real_rows(setting, inputs, model(inputs)), expected, f"{options}: no hooks")
            fused = [name for name in model.sites() if not needs_eager(name)]
            out, cache = model.run_with_cache(inputs, fused)
            same(real_rows(setting, inputs, out), expected, f"{options}: every site but scores and patterns read")
            assert set(cache) == set(fused)
            with eager(bare):
                expected = real_rows(setting, inputs, bare_output(bare, inputs))
            out, cache = model.run_with_cache(inputs, "**")
            same(real_rows(setting, inputs, out), expected, f"{options}: every site read, eager")
            assert set(cache) == set(model.sites())


def variants(setting: Setting) -> list[dict[str, Any]]:
    """Options of the case's inputs worth a run each."""
    tags = setting.case.tags
    options: list[dict[str, Any]] = [{}]
    options += [{"padding": side} for side in ("left", "right") if f"padding_{side}" in tags and setting.batch > 1]
    if "two_images" in tags:
        options.append({"images_per_prompt": 2 if setting.case.family != "pi0" else 3})
    if "any_size" in tags:
        config = setting.copy().config
        patch = (getattr(config, "vision_config", None) or config).patch_size
        options.append({"image_size": (3 * patch, 2 * patch)})
    return options


def first_run_equals_later_runs(setting: Setting) -> None:
    """A wrapped model whose very first forward is hooked gives the bits of one that has run before; edits of every residual too."""
    warm = Setting(setting.case, setting.dtype, setting.grad, True, setting.batch).model()
    inputs = setting.inputs(warm)
    names = [name for name in warm.sites("**.hook_resid_*") if not warm.is_dead(name)]
    for site in [None, *names[:: max(1, len(names) // 4)], names[-1]]:
        hooks = [] if site is None else [(site, disturb())]
        cold = cv.HookedModel(setting.copy())
        names_read = "**" if site is None or setting.thorough else "**.hook_resid_post"
        with setting.mode():
            with warm.hooks(hooks):
                expected, expected_cache = warm.run_with_cache(inputs, names_read)
            with cold.hooks(hooks):
                out, cache = cold.run_with_cache(inputs, names_read)
        same(out, expected, f"first run with {site} edited")
        for name in cache:
            same(cache[name], expected_cache[name], f"{name} in a first run")


def hook_tables(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """How many hooks of each kind every submodule carries."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {name: tuple(len(getattr(part, kind)) for kind in kinds) for name, part in module.named_modules()}


def implementations(module: nn.Module) -> dict[str, Any]:
    """The attention implementation of every part."""
    return {name: part.config._attn_implementation for name, part in module.named_modules() if hasattr(part, "config")}


class Deliberate(Exception):
    """Raised inside a hook on purpose."""


def unwrapping_leaves_the_module_as_it_was(setting: Setting) -> None:
    """Same keys, implementations, hook tables and bits as a bare copy that ran one forward; also after an exception in a hook."""
    module, bare = setting.copy(), setting.copy()
    inputs = setting.inputs(bare)
    with torch.no_grad():
        expected = bare_output(bare, inputs)
    model = cv.HookedModel(module)
    first = [type(part).__name__ for part in module.modules()]

    def explode(value: Tensor, hook: Any) -> None:
        raise Deliberate(hook.name)

    with torch.no_grad():
        model.run_with_cache(inputs, "**")
        model.run_with_hooks(inputs, [("**", disturb())])
        asked = list(groups(model).values())
        for names in [*(asked if setting.thorough else asked[:: len(asked) // 8]), model.sites()]:
            try:
                with model.hooks([(names[-1:], explode)]):
                    model.run_with_cache(inputs, names)
            except Deliberate:
                assert hook_tables(module) == hook_tables(bare), f"handles are left after an exception at {names[-1]}"
                assert implementations(module) == implementations(bare), f"{names[-1]}: implementation not restored"
            else:
                raise AssertionError(f"the hook at {names[-1]} did not run")
        model.add_hook("**", nothing)
        assert model.unwrap() is module
        same(bare_output(module, inputs), expected, "output after unwrap")
    assert hook_tables(module) == hook_tables(bare), "unwrap left handles"
    assert implementations(module) == implementations(bare)
    assert [type(part).__name__ for part in module.modules()] == first
    mine, theirs = module.state_dict(), bare.state_dict()
    assert list(mine) == list(theirs), "state_dict keys changed"
    assert all(torch.equal(mine[name], theirs[name]) for name in mine), "a weight changed"
    assert not any(parameter.grad is not None for parameter in module.parameters())


def weights_are_the_modules_own(setting: Setting) -> None:
    """W_Q … W_out against the raw Linear weights, by head; x @ W + b gives the sites; W_U gives the output; stacks are copies."""
    model = setting.model()
    inputs = setting.inputs(model)
    with setting.mode():
        out, cache = model.run_with_cache(inputs, "**")
    for name, tower in model.towers.items():
        shape = SHAPES[setting.case.name][name]
        for field in ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "n_prefix"):
            assert getattr(tower.cfg, field) == getattr(shape, field), f"{name}.cfg.{field}"
        assert "packed_patches" in setting.case.tags or tower.cfg.grid == shape.grid, f"{name}.cfg.grid"
        _weights_of_blocks(name, tower)
        fixed = "interpolate_pos_encoding" not in inputs and "rotary_vision" not in setting.case.tags
        if f"{name}.hook_pos_embed" in cache and (name == "text" or fixed):
            positions = cache[f"{name}.hook_pos_embed"]
            table = tower.W_pos
            if (
                table.shape[0] >= positions.shape[1]
                and tower.cfg.grid is not None
                and "registers" not in setting.case.tags
            ):
                same(positions[0], table[: positions.shape[1]].to(positions.dtype), f"{name}.W_pos")
        if name in ("text", "language"):
            _token_embedding(name, tower, inputs, cache, image_token(setting, model) if name == "language" else None)
        if "projector" not in name:
            _unembedding(setting, name, tower, cache, out)


def image_token(setting: Setting, model: cv.HookedModel) -> int | None:
    """The id that stands for images in prompts; None where no position holds one."""
    return None if "cross_attention" in setting.case.tags else model.image_token_id


def raw(block: Any, letter: str) -> tuple[Tensor, Tensor | None]:
    """A projection of queries ("q"), keys or values as ``[d_model, head d_head]``, and its bias: fused ones cut out as the tests' own tower does."""
    cut = getattr(block.attn.module, "weights", None)
    if cut is not None:
        return tuple(part.detach() for part in cut(letter))
    linear: Any = module_of(block, letter)
    return linear.weight.detach().T, None if linear.bias is None else linear.bias.detach()


def _raw_mlp(block: Any) -> tuple[Tensor, Tensor]:
    """Input and output weights; of a fused gated input the second half is the linear one."""
    into, out = module_of(block, "mlp_in").weight.detach().T, module_of(block, "mlp_out").weight.detach().T
    return into[:, -out.shape[0] :], out


def _weights_of_blocks(name: str, tower: Any) -> None:
    for kind, stacks in (("attn", ("W_Q", "W_O", "b_K")), ("mlp", ("W_in", "W_out", "b_in"))):
        if not all(block.has(kind) for block in tower.blocks):
            for stack in stacks:
                _raises((AttributeError,), lambda stack=stack: getattr(tower, stack))
    for block in tower.blocks:
        if block.has("attn"):
            _weights_of_attention(name, tower, block, all(one.has("attn") for one in tower.blocks))
        if block.has("mlp"):
            into, out = _raw_mlp(block)
            same(block.W_in.detach(), into, f"{name} W_in")
            same(block.W_out.detach(), out, f"{name} W_out")
            if all(one.has("mlp") for one in tower.blocks):
                same(tower.W_in[block.layer], into, f"{name} stacked W_in")
                same(tower.W_out[block.layer], out, f"{name} stacked W_out")


def _weights_of_attention(name: str, tower: Any, block: Any, stacked: bool) -> None:
    cfg = tower.cfg
    for letter, heads in (("q", cfg.n_heads), ("k", cfg.n_kv_heads), ("v", cfg.n_kv_heads)):
        weight, bias = raw(block, letter)
        live, offsets = getattr(block, f"W_{letter.upper()}"), getattr(block, f"b_{letter.upper()}")
        for head in range(heads):
            columns = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
            same(live[head].detach(), weight[:, columns], f"{name} W_{letter} of head {head}")
            if bias is not None:
                same(offsets[head].detach(), bias[columns], f"{name} b_{letter}")
        if stacked:
            same(getattr(tower, f"W_{letter.upper()}")[block.layer], live.detach(), f"{name} stacked W_{letter}")
            same(getattr(tower, f"b_{letter.upper()}")[block.layer], offsets.detach(), f"{name} stacked b_{letter}")
    out: Any = module_of(block, "o")
    for head in range(cfg.n_heads):
        columns = slice(head * cfg.d_head, (head + 1) * cfg.d_head)
        same(block.W_O[head].detach(), out.weight[:, columns].detach().T, f"{name} W_O of head {head}")
        if stacked:
            same(tower.W_O[block.layer, head], out.weight[:, columns].detach().T, f"{name} stacked W_O of head {head}")
    storage = module_of(block, "q").weight.untyped_storage().data_ptr()
    # Columns that are not side by side (queries by groups) can only be copied.
    assert "groups" in str(block.attn.core.qkv) or block.W_Q.untyped_storage().data_ptr() == storage, "not live"
    assert not stacked or tower.W_Q.untyped_storage().data_ptr() != storage


def _token_embedding(name: str, tower: Any, inputs: dict[str, Any], cache: Any, image_token: int | None) -> None:
    ids = inputs["input_ids"]
    text = ids != (-1 if image_token is None else image_token)
    embedded, rows = cache[f"{name}.hook_embed"][text], tower.W_E[ids[text]]
    ratio = float((embedded * rows).sum() / (rows * rows).sum())
    close(embedded, rows * ratio, f"{name}.W_E rows are the embeddings, up to a constant")
    gemma = "Gemma" in type(tower.root).__name__
    assert abs(ratio - (tower.cfg.d_model**0.5 if gemma else 1.0)) < 1e-2 * ratio


def _unembedding(setting: Setting, name: str, tower: Any, cache: Any, out: Tensor) -> None:
    try:
        w_u = tower.W_U
    except AttributeError:
        assert name in ("vision", "vision_2", "text"), f"{name} has no W_U"
        assert "classifier" not in setting.case.tags or setting.case.name == "deit-teacher", f"{name} has no W_U"
        return
    if f"{name}.hook_readout" not in cache:
        assert (setting.case.family, name) == ("pi0", "language")
        return
    logits = cache[f"{name}.hook_readout"] @ w_u + tower.b_U
    if "softcap" in setting.case.tags and version.parse(transformers.__version__) >= version.parse("5.23"):
        logits = torch.tanh(logits / 4.0) * 4.0
    close(logits, out, f"{name}: readout @ W_U + b_U", 1e-4)


def readout_of_the_last_layer_is_the_output(setting: Setting) -> None:
    """readout(resid_post[last]) is what the model returns; LLaVA's feature layer through it is projector.hook_out, or the read-out is refused."""
    model = setting.model()
    inputs = setting.inputs(model)
    with torch.no_grad():
        out, cache = model.run_with_cache(inputs)
        for name, tower in model.towers.items():
            if tower.stack.image and "projector.hook_out" in cache:
                last = max(tower.feature_layers_in(inputs))
                resid = cache[f"{name}.blocks.{last - 1}.hook_resid_post"]
                target = cache["projector.hook_out"]
                if "merged_before" in setting.case.tags:
                    _raises((UnsupportedModelError,), lambda t=tower, r=resid: t.readout(r, context=cache))
                    continue
                close(tower.readout(resid, context=cache).reshape(target.shape), target, f"{name} read-out", 1e-5)
                other = cache[f"{name}.blocks.{last - 2}.hook_resid_post"]
                assert not torch.allclose(tower.readout(other, context=cache).reshape(target.shape), target)
                continue
            resid = cache[f"{name}.blocks.{tower.cfg.n_layers - 1}.hook_resid_post"]
            if setting.case.family == "pi0" and name == "language":
                assert tower.readout(resid, context=cache).shape[-1] == tower.W_U.shape[1]
                continue
            close(tower.readout(resid, context=cache), out, f"{name} read-out", 1e-5)
            earlier = cache[f"{name}.blocks.0.hook_resid_pre"]
            assert not torch.allclose(tower.readout(earlier, context=cache), out, atol=1e-3)
            if "dual" in setting.case.tags:
                _raises((InputError,), lambda tower=tower, resid=resid: tower.readout(resid))


def _raises(kinds: tuple[type[Exception], ...], call: Callable[[], Any]) -> None:
    try:
        call()
    except kinds:
        return
    raise AssertionError(f"{kinds} was expected")


def generation_gives_the_same_tokens(setting: Setting) -> None:
    """Greedy tokens with and without hooks are the bare model's; steps are numbered; a recording has a step axis."""
    if "generates" not in setting.case.tags:
        _raises((UnsupportedModelError,), lambda: setting.model().generate(setting.inputs(setting.model())))
        return
    model, bare = setting.model(), setting.copy()
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False}
    # In float64 the mask's minimum overflows the float32 softmax of eager attention: rows of padding are not numbers.
    for padding in (None, "left") if setting.batch > 1 and setting.dtype == torch.float32 else (None,):
        inputs = setting.inputs(bare, padding=padding)
        expected = bare.generate(**inputs, **options)
        assert torch.equal(model.generate(inputs, **options), expected), "generate without hooks"
        steps: dict[str, list[int]] = {}

        def note(value: Tensor, hook: Any, steps: dict[str, list[int]] = steps) -> None:
            steps.setdefault(hook.name, []).append(hook.step)

        fused = [name for name in model.sites() if not needs_eager(name)]
        with model.hooks([(fused, note)]):
            assert torch.equal(model.generate(inputs, **options), expected), "generate with hooks"
        for name, seen in steps.items():
            assert seen == ([0, 1, 2] if name.startswith("language") else [0]), f"{name} fired in steps {seen}"
        with eager(bare):
            expected_eager = bare.generate(**inputs, **options)
        with model.record(["language.**", "vision.blocks.0.hook_resid_post"]) as cache:
            assert torch.equal(model.generate(inputs, **options), expected_eager), "generate while recording everything"
        _recorded(model, inputs, cache, padding)


def _recorded(model: cv.HookedModel, inputs: dict[str, Any], cache: Any, padding: str | None) -> None:
    """Pattern at step s attends to everything before; cached values and new ones make z; one-step sites are stacked."""
    length, tower = inputs["input_ids"].shape[1], model.language
    assert cache["vision.blocks.0.hook_resid_post"].shape[0] == 1
    for layer in range(tower.cfg.n_layers):
        pattern, v = cache[f"language.blocks.{layer}.attn.hook_pattern"], cache[f"language.blocks.{layer}.attn.hook_v"]
        z = cache[f"language.blocks.{layer}.attn.hook_z"]
        assert len(pattern) == len(z) == 3
        for step in range(3):
            v_all = torch.cat([v[i] for i in range(step + 1)], dim=1)[:, -pattern[step].shape[-1] :]
            repeated = v_all.repeat_interleave(tower.cfg.n_heads // tower.cfg.n_kv_heads, dim=2)
            expected = torch.einsum("rhqk,rkhd->rqhd", pattern[step], repeated)
            close(z[step], expected, f"layer {layer} step {step}: pattern @ v = z", 1e-5)
            assert step == 0 or z[step].shape[1] == 1
        assert z[0].shape[1] == length


def edits_of_keys_and_values_reach_the_next_step(setting: Setting) -> None:
    """An edit of the prompt's k, v or rotated k changes the next decoding step exactly as a full recomputation under the same edit."""
    if "generates" not in setting.case.tags:
        return
    model = setting.model()
    inputs = setting.inputs(model, batch=1)
    module: Any = model.module
    length = inputs["input_ids"].shape[1]
    new = torch.full((1, 1), 9)
    for layer in range(model.language.cfg.n_layers):
        for site in ("hook_k", "hook_v", "hook_rot_k"):
            name = f"language.blocks.{layer}.attn.{site}"
            clean = _two_steps(module, inputs, new)
            with torch.no_grad(), model.hooks([(name, _prompt_only(length))]):
                edited = _two_steps(module, inputs, new)
                longer = {
                    key: torch.cat(
                        [
                            inputs[key],
                            new if key == "input_ids" else torch.full_like(new, int(key == "attention_mask")),
                        ],
                        1,
                    )
                    for key in ("input_ids", "attention_mask", "token_type_ids")
                    if key in inputs
                }
                full = model({**inputs, **longer})[:, -1] if "prefix_bidirectional" not in setting.case.tags else None
            assert (edited - clean).abs().max() > 1e-4, f"{name}: the edit of the prompt never reaches the next step"
            if full is not None:
                close(edited, full, f"{name}: next step against full recomputation", 1e-4)


def _prompt_only(length: int) -> Callable[..., Tensor]:
    """The same edit of the prompt's positions, in the prompt's pass and in a longer one."""

    def edit(value: Tensor, hook: Any) -> Tensor | None:
        if value.shape[1] < length:
            return None
        prompt = disturb(seed=5)(value[:, :length], hook)
        return torch.cat([prompt, value[:, length:]], dim=1)

    return edit


def _two_steps(module: Any, inputs: dict[str, Any], new: Tensor) -> Tensor:
    with torch.no_grad():
        first = module(**inputs, use_cache=True)
        mask = torch.cat([inputs["attention_mask"], torch.ones_like(new)], dim=1)
        second = module(input_ids=new, attention_mask=mask, past_key_values=copy.deepcopy(first.past_key_values))
    return second.logits[:, -1]

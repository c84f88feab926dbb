"""Hooks of others, second wrappers, copies, and states in which no hook can fire."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import HookError, InputError, UnsupportedModelError
from circuitvision.model import hooks, points, torch_hooks
from tests.parts import module_of
from tests.zoo import CASES, primary, shared_model

NAMES = ["vit", "dinov2", "llava-clip-llama", "clip", "paligemma2"]


def wrapped(name: str, dtype: torch.dtype = torch.float32) -> tuple[cv.HookedModel, dict[str, Any]]:
    module = copy.deepcopy(shared_model(name)).to(dtype)
    inputs = CASES[name].inputs(module, batch=2, dtype=dtype)
    with torch.no_grad():
        module(**inputs)
    return cv.HookedModel(module), inputs


def scaled(module: nn.Module, args: Any, output: Any) -> Any:
    return (output[0] * 1.5, *output[1:]) if isinstance(output, tuple) else output * 1.5


def shifted(module: nn.Module, args: Any, kwargs: Any) -> Any:
    def moved(stream: Tensor) -> Tensor:
        return stream + torch.linspace(-1, 1, stream.shape[-1], dtype=stream.dtype)

    if args:
        return (moved(args[0]), *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": moved(kwargs["hidden_states"])}


class Reads:
    """What a module computes with, whatever hooks did before."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.forward = module, module.forward
        self.seen: list[Tensor] = []
        module.__dict__["forward"] = self.look

    def look(self, *args: Any, **kwargs: Any) -> Any:
        self.seen.append((args[0] if args else kwargs["hidden_states"]).detach().clone())
        return self.forward(*args, **kwargs)

    def remove(self) -> None:
        del self.module.__dict__["forward"]


def check_what_a_block_reads(name: str) -> None:
    """Others scale what block 0 returns; the sites of block 1 hold what goes on."""
    model, inputs = wrapped(name)
    for tower in model.towers.values():
        zeroth, first = tower.blocks[0].module, tower.blocks[1].module
        handle, reads = zeroth.register_forward_hook(scaled), Reads(first)
        site = f"{tower.name}.blocks.1.hook_resid_pre"
        with torch.no_grad():
            _, cache = model.run_with_cache(inputs, site)
            assert torch.equal(cache[site], reads.seen[-1]), f"{tower.name}: not what block 1 reads"
            model.run_with_hooks(inputs, [(site, lambda value, hook: torch.zeros_like(value))])
            assert not reads.seen[-1].any(), f"{tower.name}: the edit is not what block 1 reads"
        handle.remove()
        reads.remove()


@pytest.mark.parametrize("name", NAMES)
def test_sites_hold_what_goes_on_under_hooks_of_others(name: str) -> None:
    check_what_a_block_reads(name)


@pytest.mark.parametrize("name", ["llava-clip-llama", "llava-clip-llama-layers", "llava-next-llama"])
def test_both_names_of_a_recorded_stream_reach_whoever_reads_the_record(name: str) -> None:
    """LLaVA's projector reads hidden states from transformers' record: an edit under either name of the value must be in it."""
    model, inputs = wrapped(name)
    tower = model.vision
    for layer in {layer - 1 for layer in tower.feature_layers_in() if 0 < layer < tower.cfg.n_layers}:
        block = tower.blocks[layer].module
        # By hand: in front of the hooks that record.
        handle = block.register_forward_hook(lambda module, args, out: out * 0.5, prepend=True)
        with torch.no_grad():
            expected = primary(model.module(**inputs))
        handle.remove()
        for site in (f"vision.blocks.{layer}.hook_resid_post", f"vision.blocks.{layer + 1}.hook_resid_pre"):
            for stranger in (None, lambda module, args, out: None):
                foreign = block.register_forward_hook(stranger) if stranger else None
                with torch.no_grad():
                    found = model.run_with_hooks(inputs, [(site, lambda value, hook: value * 0.5)])
                if foreign:
                    foreign.remove()
                torch.testing.assert_close(found, expected, msg=site)


def check_a_stored_tensor_is_not_written() -> None:
    """A tensor that someone else puts into the stream is theirs: an edit behind it must not write into it."""
    model, inputs = wrapped("vit")
    stored = torch.randn(2, 17, 24)
    before = stored.clone()
    handle = model.vision.blocks[0].module.register_forward_hook(lambda module, args, out: stored)
    site = "vision.blocks.1.hook_resid_pre"
    with torch.no_grad():
        model.run(inputs, [edits.ablate(site)])
        model.sweep(inputs, [edits.ablate(site), edits.scale(site, 2.0)], lambda logits: logits[:, 0], progress=False)
    model.run_with_cache(inputs, site, incl_bwd=True, metric=lambda logits: logits.sum())
    handle.remove()
    assert torch.equal(stored, before)


def test_a_stored_tensor_is_not_written() -> None:
    check_a_stored_tensor_is_not_written()


@pytest.mark.parametrize("name", NAMES)
def test_recorded_streams_are_not_written_by_later_edits(name: str) -> None:
    """``resid_post`` is read before ``resid_pre`` is edited in place: both names keep their own value, for the output and for gradients."""
    model, inputs = wrapped(name)
    for tower in model.towers:
        post, pre = f"{tower}.blocks.0.hook_resid_post", f"{tower}.blocks.1.hook_resid_pre"
        with torch.no_grad():
            _, clean = model.run_with_cache(inputs, post)
            with model.hooks([(pre, lambda value, hook: value + 1)]):
                _, cache = model.run_with_cache(inputs, [post, pre])
        assert torch.equal(cache[post], clean[post])
        assert torch.equal(cache[pre], clean[post] + 1)


def test_gradients_of_both_names_are_one() -> None:
    model, inputs = wrapped("llava-clip-llama", torch.float64)
    for tower in model.towers.values():
        layer = tower.cfg.n_layers - 2
        post, pre = f"{tower.name}.blocks.{layer}.hook_resid_post", f"{tower.name}.blocks.{layer + 1}.hook_resid_pre"
        _, cache = model.run_with_cache(inputs, [post, pre], incl_bwd=True, metric=lambda logits: logits[..., 3])
        assert cache[f"{post}_grad"].abs().max() > 0
        torch.testing.assert_close(cache[f"{post}_grad"], cache[f"{pre}_grad"])


@pytest.mark.parametrize("kind", ["forward", "pre", "read"])
def test_sweeps_under_hooks_of_others_equal_full_runs(kind: str) -> None:
    model, inputs = wrapped("llava-clip-llama")
    block = model.language.blocks[0].module
    handle = {
        "forward": lambda: block.register_forward_hook(scaled),
        "pre": lambda: block.register_forward_pre_hook(shifted, with_kwargs=True),
        "read": lambda: block.register_forward_hook(lambda module, args, out: None),
    }[kind]()
    listed = [
        edits.scale("language.blocks.1.hook_resid_pre", 0.5, positions="last"),
        edits.ablate("language.blocks.0.hook_resid_post", positions="last"),
        edits.ablate("vision.blocks.1.hook_resid_pre"),
    ]

    def metric(logits: Tensor) -> Tensor:
        return logits[:, -1, 3]

    with torch.no_grad():
        swept = model.sweep(inputs, listed, metric, progress=False)
        expected = torch.stack([metric(model.run(inputs, [edit])) for edit in listed])
    handle.remove()
    torch.testing.assert_close(swept.values, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["everywhere", "replaced"])
def test_sweeps_see_what_acts_on_positions_without_a_hook_of_the_module(kind: str) -> None:
    """A run of the last positions alone would meet a hook on all modules, or a replaced forward, that counts from the first."""
    model, inputs = wrapped("llava-clip-llama")
    mlp = module_of(model.language.blocks[1], "mlp")

    def first(out: Tensor) -> Tensor:
        out = out.clone()
        out[:, :1] = 1.0
        return out

    original = mlp.forward
    if kind == "everywhere":
        handle = nn.modules.module.register_module_forward_hook(
            lambda module, args, out: first(out) if module is mlp else None
        )
    else:
        mlp.forward = lambda *args, **kwargs: first(original(*args, **kwargs))
    listed = [edits.scale("language.blocks.0.hook_resid_post", 0.5, positions="last")]
    try:
        with torch.no_grad():
            swept = model.sweep(inputs, listed, lambda logits: logits[:, -1, 3], progress=False)
            expected = model.run(inputs, listed)[:, -1, 3]
    finally:
        if kind == "everywhere":
            handle.remove()
        else:
            del mlp.__dict__["forward"]
    torch.testing.assert_close(swept.values[0], expected, rtol=1e-5, atol=1e-6)
    assert swept.plan[0].in_full


# ---- second wrappers


def check_a_second_wrapper(name: str) -> None:
    model, inputs = wrapped(name)
    second = cv.HookedModel(model.module)
    for tower in model.towers:
        for site in ("hook_resid_post", "attn.hook_z", "hook_resid_mid", "attn.hook_q"):
            full = f"{tower}.blocks.0.{site}"
            with torch.no_grad(), model.hooks([(full, lambda value, hook: value * 0)]):
                _, cache = second.run_with_cache(inputs, full)
                expected = model(inputs)
                assert torch.equal(second(inputs), expected)
            assert not cache[full].any(), f"{full}: the second wrapper does not see the edit"


@pytest.mark.parametrize("name", ["vit", "llava-clip-llama"])
def test_a_second_wrapper_sees_the_edits_of_the_first(name: str) -> None:
    check_a_second_wrapper(name)


def test_a_sweep_of_a_second_wrapper_keeps_the_edits_of_the_first() -> None:
    model, inputs = wrapped("vit")
    second = cv.HookedModel(model.module)
    listed = [edits.ablate("vision.blocks.1.hook_mlp_out"), edits.ablate("vision.blocks.0.hook_attn_out")]
    for site in (
        "vision.blocks.0.hook_resid_post",
        "vision.blocks.0.attn.hook_pattern",
        "vision.blocks.2.attn.hook_pattern",
    ):
        with torch.no_grad(), model.hooks([(site, lambda value, hook: value * 0.5)]):
            swept = second.sweep(inputs, listed, lambda logits: logits[:, 0], progress=False)
            expected = torch.stack([second.run(inputs, [edit])[:, 0] for edit in listed])
        torch.testing.assert_close(swept.values, expected, rtol=1e-5, atol=1e-6)


# ---- copies


@pytest.mark.parametrize("site", ["vision.blocks.0.attn.hook_pattern", "vision.blocks.0.hook_resid_post"])
def test_a_copy_has_the_hooks_that_were_added_and_not_those_of_a_block(site: str) -> None:
    model, inputs = wrapped("vit")
    with torch.no_grad():
        clean = model(inputs)
        with model.hooks([(site, lambda value, hook: value * 0)]):
            edited = model(inputs)
            twin = copy.deepcopy(model)
            assert torch.equal(twin(inputs), clean)
            assert torch.equal(model(inputs), edited), "copying took the hooks away"
        model.add_hook(site, lambda value, hook: value * 0)
        twin = copy.deepcopy(model)
        model.reset_hooks()
        assert torch.equal(model(inputs), clean)
        assert torch.equal(twin(inputs), edited)
        twin.reset_hooks()
        assert torch.equal(twin(inputs), clean)
    assert twin.module is not model.module
    assert twin.config._attn_implementation == model.config._attn_implementation


def test_a_module_copied_under_hooks_is_bare() -> None:
    model, inputs = wrapped("vit")
    with torch.no_grad():
        clean = model(inputs)
        with model.hooks([("vision.blocks.0.hook_resid_post", lambda value, hook: value * 0)]):
            twin = copy.deepcopy(model.module)
            assert torch.equal(primary(twin(**inputs)), clean)
            edited = model(inputs)
        assert not torch.equal(edited, clean)


def test_a_wrapper_with_hooks_cannot_be_pickled_and_says_why() -> None:
    model, inputs = wrapped("vit")
    with model.hooks([("vision.hook_input", lambda value, hook: None)]), pytest.raises(HookError, match="reset_hooks"):
        pickle.dumps(model)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(model))(inputs), model(inputs))


# ---- states in which no hook fires, or no gradient flows


@pytest.mark.parametrize("part", ["whole", "block", "replaced"])
def test_a_module_compiled_after_wrapping_is_refused(part: str) -> None:
    model, inputs = wrapped("vit")
    site = "vision.blocks.0.hook_resid_post"
    with torch.no_grad():
        model.run_with_hooks(inputs, [(site, lambda value, hook: value * 0)])
        if part == "replaced":
            model.module = torch.compile(model.module, backend="eager")
        else:
            (model.module if part == "whole" else model.vision.blocks[0].module).compile(backend="eager")
        for call in (
            lambda: model.run_with_hooks(inputs, [(site, lambda value, hook: value * 0)]),
            lambda: model.run_with_cache(inputs, site),
            lambda: model.run(inputs, [edits.ablate(site)]),
            lambda: model.sweep(inputs, [edits.ablate(site)], lambda logits: logits[:, 0], progress=False),
        ):
            with pytest.raises(UnsupportedModelError, match="compiled"):
                call()
    assert not model.engine.handles


def test_copies_on_several_devices_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match=r"HookedModel\(module\.module\)"):
        cv.HookedModel(nn.DataParallel(copy.deepcopy(shared_model("vit"))))


def test_gradients_in_inference_mode_are_refused() -> None:
    model, inputs = wrapped("vit")
    options: dict[str, Any] = {"incl_bwd": True, "metric": lambda logits: logits.sum()}
    with torch.inference_mode():
        with pytest.raises(InputError, match=r"inference_mode.*no_grad"):
            model.run_with_cache(inputs, "vision.hook_input", **options)
        made_there = {name: value.clone() for name, value in inputs.items()}
        born_there = cv.HookedModel(copy.deepcopy(shared_model("vit")))
    with pytest.raises(InputError, match=r"pixel_values was made in .*inference_mode"):
        model.run_with_cache(made_there, "vision.hook_input", **options)
    with pytest.raises(InputError, match="The model was made in"):
        born_there.run_with_cache(inputs, "vision.hook_input", **options)
    assert not model.engine.handles


@pytest.mark.parametrize("name", NAMES)
def test_outputs_without_names(name: str) -> None:
    """return_dict=False takes the names off the output: refused as a keyword, and as a setting of the model."""
    model, inputs = wrapped(name)
    with torch.no_grad():
        expected = model(inputs)
        with pytest.raises(InputError, match="return_dict"):
            model(inputs, return_dict=False)
        with pytest.raises(InputError, match="return_dict"):
            model.run_with_cache(inputs, "**.hook_resid_post", return_dict=False)
        model.config.return_dict = False
        with pytest.raises(InputError, match=r"model\.config\.return_dict is False"):
            model.run_with_cache(inputs, "**.hook_resid_post")
        model.config.return_dict = True
        assert torch.equal(model(inputs), expected)


def test_functional_transforms_see_the_edits() -> None:
    model, inputs = wrapped("vit", torch.float64)
    edit = edits.scale("vision.blocks.0.hook_resid_post", 0.5)
    handle_free = copy.deepcopy(model.module)
    handle_free.vit.layers[0].register_forward_hook(lambda module, args, out: out * 0.5)
    pixels = inputs["pixel_values"]

    def ours(x: Tensor) -> Tensor:
        return model.run({"pixel_values": x}, [edit])[:, 1].sum()

    def by_hand(x: Tensor) -> Tensor:
        return handle_free(pixel_values=x).logits[:, 1].sum()

    torch.testing.assert_close(torch.func.grad(ours)(pixels), torch.func.grad(by_hand)(pixels))
    torch.testing.assert_close(
        torch.func.vmap(ours)(pixels[None].repeat(3, 1, 1, 1, 1)),
        torch.func.vmap(by_hand)(pixels[None].repeat(3, 1, 1, 1, 1)),
    )


# ---- mutants


def prepend(patch: pytest.MonkeyPatch) -> None:
    """Handles come before those of others."""

    def first(table: Any, hook: Any, with_kwargs: dict[int, bool]) -> Any:
        key = torch_hooks.next_key()
        table[key], with_kwargs[key] = hook, True
        table.move_to_end(key, last=False)
        return table, with_kwargs, key

    patch.setattr(hooks, "placed", first)


def write_through(patch: pytest.MonkeyPatch) -> None:
    """An edit of the stream is written into whatever tensor enters the block."""

    def apply(self: Any, call: Any, fire: Any) -> None:
        entering = call.input()
        value, changed = fire(entering)
        if changed:
            entering.detach().copy_(value.detach())

    patch.setattr(points.StreamInput, "apply", apply)


@pytest.mark.parametrize(
    ("mutant", "check"),
    [
        (prepend, lambda: check_a_second_wrapper("vit")),
        (write_through, check_a_stored_tensor_is_not_written),
    ],
)
def test_mutants_are_noticed(
    mutant: Callable[..., None], check: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        check()

"""Hooks of one thread, felt by no other: plain calls of the module are the bare model, calls of the wrapper are refused.

The threads take turns by events, so every interleaving below happens each time.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import HookError
from circuitvision.incremental import replay
from circuitvision.model import attention, hooks
from tests.zoo import CASES, primary, shared_model

NAMES = ["vit", "llava-clip-llama"]


def elsewhere(fn: Callable[[], Any]) -> Any:
    """What ``fn`` returns or raises in another thread."""
    found: list[Any] = []

    def run() -> None:
        try:
            with torch.no_grad():
                found.append(fn())
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert found, "the other thread never ended"
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


def wrapped(name: str) -> tuple[cv.HookedModel, dict[str, Any], Tensor]:
    module = copy.deepcopy(shared_model(name))
    inputs = CASES[name].inputs(module, batch=2)
    with torch.no_grad():
        module(**inputs)
        clean = primary(module(**inputs))
    return cv.HookedModel(module), inputs, clean


def zero(value: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(value)


def pattern(model: cv.HookedModel) -> str:
    return f"{list(model.towers)[-1]}.blocks.0.attn.hook_pattern"


def check_plain_calls_of_another_thread(name: str) -> None:
    """Calls of the bare module while hooks are in place, and one that began before they were."""
    model, inputs, clean = wrapped(name)
    tower = list(model.towers)[-1]
    for site in (f"{tower}.blocks.0.hook_resid_post", f"{tower}.blocks.0.attn.hook_z", pattern(model)):
        with torch.no_grad(), model.hooks([(site, zero)]):
            edited = model(inputs)
            assert torch.equal(elsewhere(lambda: primary(model.module(**inputs))), clean), site
            assert torch.equal(model(inputs), edited), "the hooks act on in their own thread"
        assert not torch.equal(edited, clean)


def check_a_call_that_is_under_way(name: str) -> None:
    model, inputs, clean = wrapped(name)
    block = model.towers[list(model.towers)[-1]].blocks[1].module
    reached, go, found = threading.Event(), threading.Event(), []

    def pause(module: Any, args: Any) -> None:
        if threading.current_thread() is other:
            reached.set()
            assert go.wait(60)

    def run() -> None:
        with torch.no_grad():
            found.append(primary(model.module(**inputs)))

    other = threading.Thread(target=run)
    handle = block.register_forward_pre_hook(pause)
    other.start()
    assert reached.wait(60)
    with torch.no_grad(), model.hooks([(pattern(model), zero)]):
        go.set()
        other.join(60)
    handle.remove()
    assert torch.equal(found[0], clean), "the kernel of a call under way changed"


def check_a_sweep_in_another_thread(name: str) -> None:
    """Inside a resumed run, modules hand back what they returned before: to their own thread only."""
    model, inputs, clean = wrapped(name)
    tower = list(model.towers)[-1]
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(0) * 0.5}
    with torch.no_grad():
        expected = primary(model.module(**other))
    seen: list[Tensor] = []

    def look(value: Tensor, hook: Any) -> Tensor:
        seen.append(elsewhere(lambda: primary(model.module(**other))))
        return 0.5 * value

    result = model.sweep(
        inputs,
        [edits.apply(f"{tower}.blocks.1.hook_attn_out", look)],
        lambda logits: logits.flatten(1)[:, 0],
        progress=False,
    )
    assert result.plan[0].tower
    assert seen
    for got in seen:
        assert torch.equal(got, expected)
    assert not torch.equal(expected, clean)


@pytest.mark.parametrize("name", NAMES)
def test_plain_calls_of_another_thread_are_the_bare_model(name: str) -> None:
    check_plain_calls_of_another_thread(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_call_under_way_keeps_its_kernel(name: str) -> None:
    check_a_call_that_is_under_way(name)


@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_hands_back_to_its_own_thread(name: str) -> None:
    check_a_sweep_in_another_thread(name)


def test_the_wrapper_is_refused_to_another_thread_while_hooks_are_in_place() -> None:
    model, inputs, clean = wrapped("vit")
    site = "vision.blocks.0.hook_resid_post"
    calls: list[Callable[[], Any]] = [
        lambda: model(inputs),
        lambda: model.run_with_cache(inputs, site),
        lambda: model.run(inputs, [edits.ablate(site)]),
        lambda: model.sweep(inputs, [edits.ablate(site)], lambda logits: logits[:, 0], progress=False),
        lambda: model.add_hook(site, zero),
    ]
    with torch.no_grad(), model.hooks([(site, zero)]):
        edited = model(inputs)
        for call in calls:
            with pytest.raises(HookError, match=r"another thread.*deepcopy"):
                elsewhere(call)
        assert torch.equal(model(inputs), edited), "a refused call left something behind"
    assert torch.equal(elsewhere(lambda: model(inputs)), clean)
    twin = copy.deepcopy(model)
    with torch.no_grad(), model.hooks([(site, zero)]):
        assert torch.equal(elsewhere(lambda: twin(inputs)), clean), "a copy is free"
    assert not model.engine.stack
    assert not model.engine.handles


def test_hooks_put_there_by_another_thread_are_its_own() -> None:
    model, inputs, clean = wrapped("vit")
    elsewhere(lambda: model.add_hook("vision.hook_input", zero))
    with torch.no_grad():
        with pytest.raises(HookError, match="another thread"):
            model(inputs)
        model.reset_hooks()
        assert torch.equal(model(inputs), clean)


@pytest.mark.parametrize("site", ["vision.blocks.1.hook_resid_post", "vision.blocks.1.hook_resid_mid"])
def test_a_cache_holds_nothing_of_a_call_in_another_thread(site: str) -> None:
    model, inputs, _ = wrapped("vit")
    other = {name: value + 1 for name, value in inputs.items()}
    called: list[bool] = []

    def call(module: Any, args: Any) -> None:
        if not called:
            called.append(True)
            elsewhere(lambda: model.module(**other))

    with torch.no_grad():
        _, alone = model.run_with_cache(inputs, site)
        handle = model.module.vit.layers[0].register_forward_pre_hook(call)
        try:
            _, cache = model.run_with_cache(inputs, site)
        finally:
            handle.remove()
    assert called
    assert torch.equal(cache[site], alone[site])


def test_a_second_wrapper_in_another_thread_may_not_switch_the_attention() -> None:
    model, inputs, _ = wrapped("vit")
    second = cv.HookedModel(model.module)
    with torch.no_grad(), model.hooks([(pattern(model), zero)]):
        with pytest.raises(HookError, match="thread"):
            elsewhere(lambda: second.run_with_cache(inputs, "vision.blocks.1.attn.hook_pattern"))
        _, cache = elsewhere(lambda: second.run_with_cache(inputs, "vision.blocks.1.hook_resid_pre"))
    with torch.no_grad():
        _, clean = model.run_with_cache(inputs, "vision.blocks.1.hook_resid_pre")
    assert torch.equal(cache["vision", "resid_pre", 1], clean["vision", "resid_pre", 1])


def test_a_read_out_in_another_thread_silences_no_hook() -> None:
    model, inputs, clean = wrapped("vit")
    entered, leave = threading.Event(), threading.Event()

    def quiet() -> None:
        with model.vision.hooks_disabled():
            entered.set()
            assert leave.wait(60)

    other = threading.Thread(target=quiet)
    other.start()
    assert entered.wait(60)
    with torch.no_grad():
        assert not torch.equal(model.run_with_hooks(inputs, [("vision.blocks.0.hook_resid_post", zero)]), clean)
    leave.set()
    other.join(60)


def always(patch: pytest.MonkeyPatch) -> None:
    """Hooks act in every thread."""
    patch.setattr(hooks.HookEngine, "acts", lambda self: True)


def one_kernel(patch: pytest.MonkeyPatch) -> None:
    """The switched kernel serves every thread."""
    patch.setattr(attention, "_elsewhere", lambda config: None)


def handed_to_all(patch: pytest.MonkeyPatch) -> None:
    """Replaced forwards act in every thread."""
    patch.setattr(replay, "_in_this_thread", lambda here, elsewhere: here)


@pytest.mark.parametrize(
    ("mutant", "check", "name"),
    [
        (always, check_plain_calls_of_another_thread, "vit"),
        (one_kernel, check_a_call_that_is_under_way, "llava-clip-llama"),
        (handed_to_all, check_a_sweep_in_another_thread, "vit"),
    ],
)
def test_mutants_are_noticed(
    mutant: Callable[..., None], check: Callable[[str], None], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch)
    with pytest.raises((AssertionError, HookError)):
        check(name)

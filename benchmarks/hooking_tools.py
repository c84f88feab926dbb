"""The same reads and edits of a model, written the idiomatic way of each tool.

A task is done alike by every tool, and every tool's values are compared with those of plain hooks before anything is timed, so that no one is
fast by doing less. What a tool cannot do is said instead of timed. Tools that change the module they wrap get a twin of their own that shares
the weights; ours and plain hooks run on the very module that is the reference.

Patterns exist only in eager attention: plain hooks and nnsight read them from a twin that always runs eager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from shapes import Shape, getattr_path
from torch import Tensor, nn

TASKS = {
    "forward": "forward, nothing asked for",
    "outputs": "save every block's output",
    "residuals": "save the residual before, in and after every block",
    "patch": "patch one block's output at the last position",
    "patterns": "save every attention pattern",
}


@dataclass(frozen=True)
class Outcome:
    """What a run gave: the model's output and the saved tensors, in the order of the forward pass."""

    logits: Tensor
    saved: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One tool doing one task; ``run`` is None where it cannot, and ``note`` says why."""

    tool: str
    task: str
    run: Callable[[], Outcome] | None
    note: str = ""


def bare(shape: Shape, source: Tensor) -> Iterator[Variant]:
    """The model alone, with its own attention and with eager attention."""
    module, eager = shape.module, shape.twin("eager")
    yield Variant("bare", "forward", lambda: Outcome(module(**shape.inputs).logits))
    yield Variant("bare, eager attention", "forward", lambda: Outcome(eager(**shape.inputs).logits))


def circuitvision(shape: Shape, source: Tensor) -> Iterator[Variant]:
    """Ours."""
    import circuitvision as cv

    model = cv.HookedModel(shape.module)
    stack, layer = shape.patched

    def save(glob: str) -> Callable[[], Outcome]:
        def run() -> Outcome:
            logits, cache = model.run_with_cache(shape.inputs, glob)
            return Outcome(logits, tuple(cache.values()))

        return run

    def write(resid: Tensor, hook: Any) -> Tensor:
        resid[:, -1] = source
        return resid

    def patch() -> Outcome:
        site = f"{stack.tower}.blocks.{layer}.hook_resid_post"
        return Outcome(model.run_with_hooks(shape.inputs, fwd_hooks=[(site, write)]))

    yield Variant("circuitvision", "forward", lambda: Outcome(model(shape.inputs)))
    yield Variant("circuitvision", "outputs", save("*.blocks.*.hook_resid_post"))
    yield Variant("circuitvision", "residuals", save("*.blocks.*.hook_resid_*"))
    yield Variant("circuitvision", "patch", patch)
    yield Variant("circuitvision", "patterns", save("*.blocks.*.attn.hook_pattern"))


def plain_hooks(shape: Shape, source: Tensor) -> Iterator[Variant]:
    """PyTorch's hooks, registered for one run and removed after it: the least that reading or editing can cost."""
    own, eager = shape.module, shape.twin("eager")
    stack, layer = shape.patched

    def run_with(module: nn.Module, register: Callable[[list[Tensor]], list[Any]]) -> Outcome:
        saved: list[Tensor] = []
        handles = register(saved)
        try:
            logits = module(**shape.inputs).logits
        finally:
            for handle in handles:
                handle.remove()
        return Outcome(logits, tuple(saved))

    def outputs(saved: list[Tensor]) -> list[Any]:
        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            saved.append(output)

        return [block.register_forward_hook(keep) for _, block in shape.blocks(own)]

    def residuals(saved: list[Tensor]) -> list[Any]:
        def keep_input(module: nn.Module, args: Any) -> None:
            saved.append(args[0])

        def keep(module: nn.Module, args: Any, output: Tensor) -> None:
            saved.append(output)

        handles: list[Any] = []
        for place, block in shape.blocks(own):
            handles.append(block.register_forward_pre_hook(keep_input))
            handles.append(getattr(block, place.second_norm).register_forward_pre_hook(keep_input))
            handles.append(block.register_forward_hook(keep))
        return handles

    def patch(saved: list[Tensor]) -> list[Any]:
        def write(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            output = output.clone()
            output[:, -1] = source
            return output

        return [getattr_path(own, stack.blocks)[layer].register_forward_hook(write)]

    def patterns(saved: list[Tensor]) -> list[Any]:
        def keep(module: nn.Module, args: Any, output: tuple[Tensor, Tensor]) -> None:
            saved.append(output[1])

        return [getattr(block, place.attention).register_forward_hook(keep) for place, block in shape.blocks(eager)]

    for task, register in (("outputs", outputs), ("residuals", residuals), ("patch", patch)):
        yield Variant("plain hooks", task, lambda register=register: run_with(own, register))
    yield Variant("plain hooks", "patterns", lambda: run_with(eager, patterns), "on a model that always runs eager")


def nnsight(shape: Shape, source: Tensor) -> Iterator[Variant]:
    """nnsight's traces, run locally."""
    import nnsight as nns

    plain, eager = nns.NNsight(shape.twin()), nns.NNsight(shape.twin("eager"))
    stack, layer = shape.patched
    inputs, blocks, eager_blocks = shape.inputs, shape.blocks(plain), shape.blocks(eager)
    patched = getattr_path(plain, stack.blocks)[layer]

    def forward() -> Outcome:
        with plain.trace(**inputs):
            logits = plain.output.logits.save()
        return Outcome(logits)

    def outputs() -> Outcome:
        saved = []
        with plain.trace(**inputs):
            for _, block in blocks:
                saved.append(block.output.save())
            logits = plain.output.logits.save()
        return Outcome(logits, tuple(saved))

    def residuals() -> Outcome:
        saved = []
        with plain.trace(**inputs):
            for place, block in blocks:
                saved.append(block.input.save())
                saved.append(getattr(block, place.second_norm).input.save())
                saved.append(block.output.save())
            logits = plain.output.logits.save()
        return Outcome(logits, tuple(saved))

    def patch() -> Outcome:
        with plain.trace(**inputs):
            patched.output[:, -1] = source
            logits = plain.output.logits.save()
        return Outcome(logits)

    def patterns() -> Outcome:
        saved = []
        with eager.trace(**inputs):
            for place, block in eager_blocks:
                saved.append(getattr(block, place.attention).output[1].save())
            logits = eager.output.logits.save()
        return Outcome(logits, tuple(saved))

    for task, run in (("forward", forward), ("outputs", outputs), ("residuals", residuals), ("patch", patch)):
        yield Variant("nnsight", task, run)
    yield Variant("nnsight", "patterns", patterns, "on a model that always runs eager")


def transformer_lens(shape: Shape, source: Tensor) -> Iterator[Variant]:
    """TransformerLens's bridge around an in-memory module; it runs eager attention only."""
    with contextlib.redirect_stdout(None):
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        twin: Any = shape.twin("eager")
        bridge = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
    stack, layer = shape.patched
    rest = dict(shape.inputs)
    first = rest.pop("input_ids") if "input_ids" in rest else rest.pop("pixel_values")
    places = [
        (place, f"{place.bridge_blocks}.{index}")
        for place in shape.stacks
        for index in range(len(getattr_path(shape.module, place.blocks)))
    ]

    def save(sites: list[str]) -> Callable[[], Outcome]:
        names = [f"{prefix}.{site}" for _, prefix in places for site in sites]
        wanted = set(names)

        def run() -> Outcome:
            logits, cache = bridge.run_with_cache(first, names_filter=lambda name: name in wanted, **rest)
            return Outcome(logits, tuple(cache[name] for name in names))

        return run

    def write(resid: Tensor, hook: Any) -> Tensor:
        resid[:, -1] = source
        return resid

    def patch() -> Outcome:
        site = f"{stack.bridge_blocks}.{layer}.hook_resid_post"
        return Outcome(bridge.run_with_hooks(first, fwd_hooks=[(site, write)], **rest))

    yield Variant("TransformerLens bridge", "forward", lambda: Outcome(bridge(first, **rest)))
    yield Variant("TransformerLens bridge", "outputs", save(["hook_resid_post"]))
    if all(place.bridge_has_mid for place in shape.stacks):
        yield Variant(
            "TransformerLens bridge", "residuals", save(["hook_resid_pre", "hook_resid_mid", "hook_resid_post"])
        )
    else:
        yield Variant("TransformerLens bridge", "residuals", None, "its vision tower has no hook_resid_mid")
    yield Variant("TransformerLens bridge", "patch", patch)
    yield Variant("TransformerLens bridge", "patterns", save(["attn.hook_pattern"]))


TOOLS: dict[str, Callable[[Shape, Tensor], Iterator[Variant]]] = {
    "circuitvision": circuitvision,
    "plain-hooks": plain_hooks,
    "nnsight": nnsight,
    "transformer-lens": transformer_lens,
}


def variants_of(shape: Shape, tools: list[str]) -> list[Variant]:
    """The bare model and every task of the chosen tools, each checked to compute the same as plain hooks do.

    Raises RuntimeError if a tool's output or saved values are not those of plain hooks, or if the patch changes nothing.
    """
    width = getattr_path(shape.module, shape.patched[0].blocks)[0]
    width = getattr(width, shape.patched[0].second_norm).weight.shape[0]
    device = next(iter(shape.inputs.values())).device
    source = torch.randn(width, generator=torch.Generator().manual_seed(1)).to(device)
    expected: dict[str, Outcome] = {}
    for variant in (*bare(shape, source), *plain_hooks(shape, source)):
        assert variant.run is not None
        expected.setdefault(variant.task, variant.run())
    if torch.equal(expected["patch"].logits, expected["forward"].logits):
        raise RuntimeError("The patch changes nothing, so a lost edit could not be told from a real one.")
    found = [*bare(shape, source), *(variant for tool in tools for variant in TOOLS[tool](shape, source))]
    for variant in found:
        if variant.run is not None:
            _compare(variant, variant.run(), expected[variant.task])
    return found


def _compare(variant: Variant, got: Outcome, expected: Outcome) -> None:
    if len(got.saved) != len(expected.saved):
        raise RuntimeError(
            f"{variant.tool}, {variant.task}: {len(got.saved)} saved tensors, plain hooks save {len(expected.saved)}."
        )
    for mine, theirs in zip((got.logits, *got.saved), (expected.logits, *expected.saved), strict=True):
        error = float((mine - theirs).abs().max() / theirs.abs().max())
        # Eager attention and fused kernels round differently; anything else would be off by far more.
        if not error < 1e-3:
            raise RuntimeError(
                f"{variant.tool}, {variant.task}: off by {error:.1e} of the largest value that plain hooks give."
            )

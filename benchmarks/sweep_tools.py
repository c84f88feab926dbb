"""The same sweep in each tool: a list of edits in, the metric under each of them out, ``[edit row]``.

Every tool but ours runs one full forward per edit, which is what its documentation shows. What can be prepared once is prepared once: the wrapped
model, the values to write, pyvene's one configured model per site. Tools that change the module they wrap get a twin that shares the weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from sweep_shapes import Edit, SweepShape
from torch import Tensor

Sweep = Callable[[Sequence[Edit]], Tensor]

ROUNDING = 2e-5
"""How far float32 rounding takes a value, relative to the largest one: attention kernels differ in the order they add."""


class CannotError(Exception):
    """A tool cannot do this sweep; the message says why, on evidence."""


def one_by_one(value: Callable[[Edit], Tensor]) -> Sweep:
    """A sweep that runs the model once per edit."""
    return lambda edits: torch.stack([value(edit) for edit in edits])


def circuitvision(shape: SweepShape) -> Sweep:
    """Ours: all edits of one run in one call."""
    import circuitvision as cv
    from circuitvision import edits as kinds

    model = cv.HookedModel(shape.module)
    size = shape.network.swept.head_size

    def replace(edit: Edit) -> Any:
        block = f"{shape.place.tower}.blocks.{edit.layer}"
        positions = list(range(edit.first, edit.end))
        if edit.head is None:
            return kinds.replace(f"{block}.hook_resid_pre", shape.source(edit), positions=positions)
        source = shape.source(edit).unflatten(-1, (-1, size))
        return kinds.replace(f"{block}.attn.hook_z", source, heads=[edit.head], positions=positions)

    def sweep(edits: Sequence[Edit]) -> Tensor:
        found: dict[int, Tensor] = {}
        for run in sorted({edit.run for edit in edits}):
            where = [index for index, edit in enumerate(edits) if edit.run == run]
            asked = [replace(edits[index]) for index in where]
            result = model.sweep(shape.runs[run], asked, shape.metric, batch_size="auto", progress=False)
            found.update(zip(where, result.values, strict=True))
        return torch.stack([found[index] for index in range(len(edits))])

    return sweep


def plain_hooks(shape: SweepShape) -> Sweep:
    """PyTorch's hooks, one full forward per edit: the loop that every speed is compared with."""

    def value(edit: Edit) -> Tensor:
        source, where, columns = shape.source(edit), edit.positions, shape.columns(edit)

        def write(module: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
            given = (args[0] if args else kwargs["hidden_states"]).clone()
            given[:, where, columns] = source[:, where, columns]
            return ((given, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": given})

        handle = shape.target(shape.module, edit).register_forward_pre_hook(write, with_kwargs=True)
        try:
            return shape.metric(shape.module(**shape.runs[edit.run]).logits)
        finally:
            handle.remove()

    return one_by_one(value)


def nnsight(shape: SweepShape) -> Sweep:
    """nnsight's traces, run locally."""
    import nnsight as nns

    model = nns.NNsight(shape.twin())

    def value(edit: Edit) -> Tensor:
        source, where, columns = shape.source(edit), edit.positions, shape.columns(edit)
        target, inputs = shape.target(model, edit), shape.runs[edit.run]
        with model.trace(**inputs):
            target.input[:, where, columns] = source[:, where, columns]
            logits = model.output.logits.save()
        return shape.metric(logits)

    return one_by_one(value)


def transformer_lens(shape: SweepShape) -> Sweep:
    """TransformerLens's bridge around an in-memory module; it runs eager attention only."""
    with contextlib.redirect_stdout(None):
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        twin: Any = shape.twin("eager")
        try:
            bridge = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
        except (TypeError, ValueError) as error:
            raise CannotError(f"no bridge for {type(twin).__name__} ({_first_line(error)})") from error
    size = shape.network.swept.head_size

    def value(edit: Edit) -> Tensor:
        source, where = shape.source(edit), edit.positions

        def write(given: Tensor, hook: Any) -> Tensor:
            if edit.head is None:
                given[:, where] = source[:, where]
            else:
                given[:, where, edit.head] = source.unflatten(-1, (-1, size))[:, where, edit.head]
            return given

        site = "hook_resid_pre" if edit.head is None else "attn.hook_z"
        rest = dict(shape.runs[edit.run])
        first = rest.pop("input_ids") if "input_ids" in rest else rest.pop("pixel_values")
        name = f"{shape.place.bridge_blocks}.{edit.layer}.{site}"
        return shape.metric(bridge.run_with_hooks(first, fwd_hooks=[(name, write)], **rest))

    return one_by_one(value)


def pyvene(shape: SweepShape) -> Sweep:
    """pyvene's interchange with given source representations, one configured model per site and number of positions."""
    pv = _import_pyvene()
    twin: Any = shape.twin()
    models: dict[tuple[int, bool, int], Any] = {}

    def model_for(edit: Edit) -> Any:
        count = edit.end - edit.first
        key = (edit.layer, edit.head is not None, count)
        if key not in models:
            inside = "" if edit.head is None else f".{shape.place.projection}"
            component = f"{shape.place.blocks}[{edit.layer}]{inside}.input"
            swap = pv.VanillaIntervention(embed_dim=shape.source(edit).shape[-1])
            where = pv.RepresentationConfig(edit.layer, component, "pos", count, intervention=swap)
            models[key] = pv.IntervenableModel(pv.IntervenableConfig([where]), twin)
        return models[key]

    def value(edit: Edit) -> Tensor:
        model, positions = model_for(edit), [[list(range(edit.first, edit.end))]]
        columns = list(range(shape.source(edit).shape[-1]))[shape.columns(edit)]
        _, output = model(
            shape.runs[edit.run],
            unit_locations={"sources->base": (positions, positions)},
            source_representations={model.sorted_keys[0]: shape.source(edit)[:, edit.positions].clone()},
            subspaces=None if edit.head is None else [[columns]],
        )
        return shape.metric(output.logits)

    try:
        one_by_one(value)([shape.studies[0].edits[0]] * 2)
    except IndexError as error:
        # Around every run it removes all forward hooks of the model, those among them that transformers records hidden states with.
        message = f"it removes transformers' own hooks, and the bare model then raises {_first_line(error)}"
        raise CannotError(message) from error
    return one_by_one(value)


def _import_pyvene() -> Any:
    try:
        with contextlib.redirect_stdout(None):
            import pyvene as pv
    except ImportError as error:
        raise CannotError(f"not installed ({_first_line(error)})") from error
    return pv


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


TOOLS: dict[str, tuple[str, Callable[[SweepShape], Sweep]]] = {
    "circuitvision": ("circuitvision", circuitvision),
    "plain-hooks": ("loop of plain hooks", plain_hooks),
    "nnsight": ("nnsight", nnsight),
    "transformer-lens": ("TransformerLens bridge", transformer_lens),
    "pyvene": ("pyvene", pyvene),
}


def sweeps_of(shape: SweepShape, tools: Sequence[str]) -> tuple[dict[str, Sweep], dict[str, str]]:
    """Every tool's sweep by the tool's title, and why the others have none."""
    able, unable = {}, {}
    for tool in tools:
        title, make = TOOLS[tool]
        try:
            able[title] = make(shape)
        except CannotError as error:
            unable[title] = str(error)
    return able, unable


def check(able: dict[str, Sweep], expected: Tensor, clean: Tensor, edits: Sequence[Edit], exact: bool) -> None:
    """Raise RuntimeError if a tool's values are not those of the loop of plain hooks (``expected``), or if a lost edit would go unseen.

    ``exact`` is for float32: every value within 1e-3 of the largest and within a tenth of *its own* effect, or of what rounding makes of the largest
    value where the effect is less. Otherwise within a tenth of the largest value, which half precision and 32 layers of random weights need.
    """
    expected, clean = expected.cpu(), clean.cpu()
    effect, largest = (expected - clean).abs(), expected.abs().max()
    if not effect.max() > 0:
        raise RuntimeError("The edits change nothing, so a lost edit could not be told from a real one.")
    allowed = (effect / 10).clamp(ROUNDING * largest, 1e-3 * largest) if exact else (0.1 * largest).expand_as(effect)
    for title, sweep in able.items():
        error = (sweep(edits).cpu() - expected).abs()
        if not bool((error <= allowed).all()):
            worst = int((error - allowed).sum(1).argmax())
            raise RuntimeError(
                f"{title}: off by {float(error[worst].max()):.1e} from the loop of plain hooks at {edits[worst]}, "
                f"whose effect is {float(effect[worst].max()):.1e}."
            )

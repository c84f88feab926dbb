"""What the studies of ``causal.py`` are built from: the two runs of a model, plain PyTorch hooks that read and write, and the peers' models.

The *base* run is that of the shape's inputs, the *source* run that of its other inputs (another image, other words). Everything by hand goes through
two hooks: :meth:`Scene.reading` keeps what enters or leaves modules, :meth:`Scene.writing` changes it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from shapes import getattr_path
from sweep_shapes import SweepShape
from sweep_tools import CannotError, _first_line, _import_pyvene
from torch import Tensor, nn

Change = Callable[[Tensor], Tensor]
PEERS = ("transformer-lens", "pyvene")
LENS, PYVENE, OURS = "TransformerLens", "pyvene", "circuitvision"


@dataclass(frozen=True)
class Arm:
    """One way to do a study: what is timed, the share of the study that one call does, and what it runs, in words."""

    run: Callable[[], Any]
    share: float = 1.0
    passes: str = ""


@dataclass
class CausalStudy:
    """One question: the ways to answer it, and what no way can avoid.

    ``unavoidable`` is how many times the reference's time the unavoidable part of the whole study takes. ``loop`` is the naive way. ``aim`` bounds
    the time over the unavoidable, ``memory`` the peak memory over the reference's, ``faster`` the times that ours is faster than the loop.
    """

    name: str
    title: str
    reference: str
    arms: dict[str, Arm]
    loop: str
    unavoidable: float = 1.0
    unable: dict[str, str] = field(default_factory=dict)
    aim: float | None = None
    faster: float | None = None
    memory: float | None = None


class Scene:
    """One model with its two runs."""

    def __init__(self, shape: SweepShape) -> None:
        self.shape, self.module, self.metric = shape, shape.module, shape.metric
        self.base, self.source = dict(shape.runs[0]), dict(shape.other)
        self.tower, self.network = shape.place.tower, shape.network.swept
        self.n_layers, self.n_heads, self.d_head = self.network.layers, self.network.heads, self.network.head_size
        self.length = len(self.network.read)
        self.causal = not bool(self.network.visible.all())
        self.text = "input_ids" in self.base
        self.eager: Any = shape.twin("eager")

    # -- modules -------------------------------------------------------------------------------------------------------------------------------

    def block(self, layer: int, module: Any = None) -> Any:
        return getattr_path(self.module if module is None else module, self.shape.place.blocks)[layer]

    def attention(self, layer: int, module: Any = None) -> Any:
        return getattr_path(self.block(layer, module), self.shape.place.projection.partition(".")[0])

    def output(self, layer: int, module: Any = None) -> Any:
        """The output projection, which the heads' z enters."""
        return getattr_path(self.block(layer, module), self.shape.place.projection)

    def norm(self, layer: int) -> nn.Module:
        """The norm in front of attention."""
        block = self.block(layer)
        return block.input_layernorm if self.text else block.layernorm_before

    def columns(self, head: int) -> slice:
        return slice(head * self.d_head, (head + 1) * self.d_head)

    def tail(self, stream: Tensor) -> Tensor:
        """What the model makes of the last block's output."""
        module: Any = self.module
        if self.text:
            return module.lm_head(module.model.language_model.norm(stream))
        return module.classifier(module.vit.layernorm(stream)[:, 0])

    # -- hooks by hand -------------------------------------------------------------------------------------------------------------------------

    @staticmethod
    @contextlib.contextmanager
    def writing(changes: Sequence[tuple[nn.Module, str, Change]]) -> Iterator[None]:
        """What enters (``"in"``) or leaves (``"out"``) modules goes through functions."""
        handles = []
        for module, where, change in changes:
            if where == "out":
                handles.append(module.register_forward_hook(lambda module, args, out, change=change: change(out)))
                continue

            def entering(module: Any, args: Any, kwargs: Any, change: Change = change) -> tuple[Any, Any]:
                if args:
                    return (change(args[0]), *args[1:]), kwargs
                return args, {**kwargs, "hidden_states": change(kwargs["hidden_states"])}

            handles.append(module.register_forward_pre_hook(entering, with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def reading(
        self, places: Mapping[Any, tuple[nn.Module, str]], inputs: Mapping[str, Tensor], module: Any = None
    ) -> tuple[Tensor, dict[Any, Tensor]]:
        """The logits of a run, and what entered or left some modules, on the graph where there is one."""
        found: dict[Any, Tensor] = {}

        def keep(key: Any) -> Change:
            def look(value: Tensor) -> Tensor:
                found[key] = value
                return value

            return look

        with self.writing([(place, where, keep(key)) for key, (place, where) in places.items()]):
            logits = (self.module if module is None else module)(**inputs).logits
        return logits, found

    def each_layer(self, which: str, module: Any = None) -> dict[int, tuple[nn.Module, str]]:
        """The places of one kind in every layer: ``"stream"``, ``"z"`` or ``"q"``."""
        made = {
            "stream": lambda layer: (self.block(layer, module), "in"),
            "z": lambda layer: (self.output(layer, module), "in"),
            "q": lambda layer: (self.attention(layer, module).q_proj, "out"),
        }[which]
        return {layer: made(layer) for layer in range(self.n_layers)}

    def under(
        self, changes: Sequence[tuple[nn.Module, str, Change]], inputs: Mapping[str, Tensor] | None = None
    ) -> Tensor:
        """The metric of the base run (or another) with something changed in it."""
        with self.writing(changes):
            return self.metric(self.module(**(self.base if inputs is None else inputs)).logits)

    # -- peers ---------------------------------------------------------------------------------------------------------------------------------

    def bridge(self, hooks: Sequence[tuple[str, Any]] = ()) -> Any:
        """TransformerLens's bridge of a twin, called with tokens (or pixels) alone."""
        with contextlib.redirect_stdout(None):
            from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

            twin: Any = self.shape.twin("eager")
            try:
                bridge = build_bridge_from_module(twin, type(twin).__name__, hf_config=twin.config)
            except (TypeError, ValueError) as error:
                raise CannotError(f"no bridge for {type(twin).__name__} ({_first_line(error)})") from error
        return _Tokens(bridge, [self.base, self.source], hooks)

    def tokens(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What a bridge is called with."""
        return inputs["input_ids" if self.text else "pixel_values"]

    @functools.cached_property
    def copy(self) -> nn.Module:
        """A copy with weights of its own: pyvene freezes those of the model it is given."""
        return copy.deepcopy(self.module)

    def intervenable(self, places: Sequence[tuple[int, Any, int]]) -> Any:
        """pyvene's model of a copy with interventions at the inputs of blocks: ``(layer, intervention, how many positions)``."""
        pv = _import_pyvene()
        made = [
            pv.RepresentationConfig(layer, f"{self.shape.place.blocks}[{layer}].input", "pos", count, intervention=one)
            for layer, one, count in places
        ]
        return pv.IntervenableModel(pv.IntervenableConfig(made), self.copy)


class _Tokens:
    """A bridge whose functions take tokens alone, as TransformerLens's methods call it; the image that goes with them is added."""

    def __init__(self, bridge: Any, inputs: Sequence[Mapping[str, Tensor]], hooks: Sequence[tuple[str, Any]]) -> None:
        self._bridge, self._inputs, self._hooks = bridge, inputs, list(hooks)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bridge, name)

    def _rest(self, tokens: Tensor) -> dict[str, Tensor]:
        for inputs in self._inputs:
            if "input_ids" in inputs and torch.equal(inputs["input_ids"], tokens):
                return {name: value for name, value in inputs.items() if name != "input_ids"}
        return {}

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._bridge(tokens, **self._rest(tokens))

    def run_with_hooks(self, tokens: Tensor, fwd_hooks: Sequence[tuple[str, Any]]) -> Tensor:
        return self._bridge.run_with_hooks(tokens, fwd_hooks=[*self._hooks, *fwd_hooks], **self._rest(tokens))


def check(study: str, tool: str, found: Tensor, expected: Tensor, largest: float) -> None:
    """Raise RuntimeError where a tool's effects are not those expected: a tenth of each and 1e-3 of the largest, with room for the rounding of
    metrics as large as ``largest``; or where the expected ones are all nothing."""
    found, expected = (torch.as_tensor(one).detach().double().cpu().flatten() for one in (found, expected))
    most = expected.abs().max()
    if not most > 0:
        raise RuntimeError(
            f"{study}: nothing has an effect, so a tool that does nothing could not be told from one that is right."
        )
    allowed = (expected.abs() / 10).clamp(max=float(1e-3 * most)) + 2e-5 * largest
    error = (found - expected).abs()
    if not bool((error <= allowed).all()):
        worst = int((error - allowed).argmax())
        raise RuntimeError(
            f"{study}, {tool}: {float(found[worst]):.3e} where {float(expected[worst]):.3e} is right (cell {worst})."
        )

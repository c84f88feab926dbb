"""A hooked model small enough to compute by hand: two towers of heads that add up, a connector between them, and an
answer.

Vision head ``(layer, head)`` outputs ``weight · picture``; the connector passes on their sum; language head outputs
``weight · connector`` and the two logits are ``[total, 0]`` with ``total = Σ language heads + leak · connector``. It
offers the part of the hooked model's surface that patching uses.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from circuitvision.edits import Edit
from circuitvision.metric_set import MetricSet
from circuitvision.model import HookPoint
from circuitvision.model.edits.base import by_digest
from circuitvision.model.flow import Connector, Flow
from circuitvision.model.packing import Packing
from circuitvision.model.positions import PositionWindow
from circuitvision.model.spec import Family, TowerSpec


class Rows(Packing):
    """Every input has a row for each example."""

    def _count(self, run: Any, compared: Any) -> int:
        return len(next(iter(run.inputs.values())))


class ToyModel:
    family = Family("toy", ("Toy",), (TowerSpec("vision"), TowerSpec("language")), output="logits", packing=Rows())
    is_dual = False
    flow = Flow(("vision", "language"), (Connector(("vision",), "language", "projector"),))
    device, dtype, tokenizer = torch.device("cpu"), torch.float64, None
    engine = SimpleNamespace(stack=[], active=list)

    def __init__(self, vision: Tensor, language: Tensor, leak: float = 0.5, gate: bool = False) -> None:
        self.weights = {"vision": vision, "language": language}
        self.leak, self.gate = leak, gate
        self.module = nn.Linear(1, 1)
        self.towers = {
            name: SimpleNamespace(
                stack=SimpleNamespace(image=False),
                cfg=SimpleNamespace(n_layers=w.shape[0], n_heads=w.shape[1], grid=None),
                dead=(),
            )
            for name, w in self.weights.items()
        }
        self.runs = 0
        self.dead: set[str] = set()

    def sites(self, glob: str = "**") -> list[str]:
        names = [f"vision.blocks.{layer}.attn.hook_z" for layer in range(len(self.weights["vision"]))]
        names += ["projector.hook_out"]
        names += [f"language.blocks.{layer}.attn.hook_z" for layer in range(len(self.weights["language"]))]
        return [name for name in names if fnmatch.fnmatch(name, glob.replace("**", "*"))]

    def is_dead(self, name: str, inputs: object = None) -> bool:
        return name in self.dead

    def positions(self, site: str, inputs: dict[str, Tensor]) -> list[int]:
        return [0]

    def tokens(self, inputs: dict[str, Tensor]) -> dict[str, Any]:
        return {}

    def __call__(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.run_with_hooks(inputs)

    def run_with_cache(self, inputs: dict[str, Tensor], names_filter: list[str] | None = None):
        cache: dict[str, Tensor] = {}
        names = self.sites() if names_filter is None else names_filter
        hooks = [(name, lambda tensor, hook: cache.__setitem__(hook.name, tensor.clone())) for name in names]
        return self.run_with_hooks(inputs, fwd_hooks=hooks), cache

    def run(self, inputs: dict[str, Tensor], edits: Sequence[Edit] = ()) -> Tensor:
        def write(edit: Edit):
            def hook(tensor: Tensor, hook: SimpleNamespace) -> Tensor:
                edited = tensor.clone()
                length = tensor.shape[1]
                where = HookPoint(hook.name, hook.name.split(".")[0], None, hook.name)
                edit.write(edited, PositionWindow(where.tower, len(tensor), 0, length, length), where, {})
                return edited

            return hook

        return self.run_with_hooks(inputs, [(edit.site, write(edit)) for edit in edits])

    def sweep(self, inputs: dict[str, Tensor], groups: Sequence, metric, base=(), **keywords) -> SimpleNamespace:
        """The naive loop: one run per group, behind the base."""
        listed = [(group,) if isinstance(group, Edit) else group for group in groups]
        given = MetricSet.of(metric)
        values = torch.stack([given(self.run(inputs, [*base, *group]), inputs) for group in listed], 1)
        clean = given(self.run(inputs, base), inputs)
        return SimpleNamespace(
            values=values if given.several else values[0],
            clean=clean if given.several else clean[0],
            edits=[by_digest(group) for group in listed],
            axes={"example": list(range(clean.shape[-1]))},
            groups=[],
        )

    def run_with_hooks(self, inputs: dict[str, Tensor], fwd_hooks=()) -> Tensor:
        self.runs += 1

        def site(name: str, value: Tensor) -> Tensor:
            for wanted, hook in fwd_hooks:
                if wanted == name:
                    edited = hook(value, SimpleNamespace(name=name))
                    value = value if edited is None else edited
            return value

        stream = inputs["picture"][:, None]
        start = stream
        for layer, weights in enumerate(self.weights["vision"]):
            z = weights[None, None, :, None] * start[:, :, None, None].expand(-1, 1, len(weights), 1)
            z = site(f"vision.blocks.{layer}.attn.hook_z", z)
            stream = stream + z.sum((2, 3))
        bridge = site("projector.hook_out", (stream - start)[..., None])
        total = self.leak * bridge[:, 0, 0]
        read = bridge
        for layer, weights in enumerate(self.weights["language"]):
            z = weights[None, None, :, None] * read[:, :, None, :]
            z = site(f"language.blocks.{layer}.attn.hook_z", z)
            total = total + z.sum((1, 2, 3))
            # With a gate, later language heads read what earlier ones wrote, so that heads of the tower depend on
            # each other.
            read = read + z.sum(2) if self.gate else read
        return torch.stack([total, torch.zeros_like(total)], dim=1)

"""Tiny models in float64 throughout, with two inputs, for tests of edges."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from circuitvision.circuits.computational_graph import ComputationalGraph, computational_graph
from circuitvision.circuits.edge_runs import Interchange
from tests.zoo import case

FAMILIES = ("vit", "dinov2", "clip", "llava-clip-llama", "pi0", "paligemma2")
"""LayerScale, a dual encoder, key and value groups, rotary positions, keys that another tower reads, norms behind branches."""


def score(logits: Tensor) -> Tensor:
    """A curved metric of every example."""
    return logits.flatten(1)[:, ::3].sin().sum(-1)


@contextlib.contextmanager
def double_throughout() -> Iterator[None]:
    """Model code that casts float64 to float32 keeps it: norms and soft caps of language models do."""
    to, to_float = Tensor.to, Tensor.float

    def kept(self: Tensor, *args: Any, **keywords: Any) -> Tensor:
        casts = torch.float32 in (*args[:1], keywords.get("dtype"))
        return self if casts and self.dtype == torch.float64 else to(self, *args, **keywords)

    Tensor.to = kept  # type: ignore[method-assign,assignment]
    Tensor.float = lambda self: self if self.dtype == torch.float64 else to_float(self)  # type: ignore[method-assign]
    try:
        yield
    finally:
        Tensor.to, Tensor.float = to, to_float  # type: ignore[method-assign]


class Example:
    """A model, the inputs of two runs that differ in the picture, its graph, and what senders write in the second run."""

    def __init__(self, name: str, batch: int = 2) -> None:
        found = case(name)
        module = found.build().double().eval()
        clean, corrupt = (found.inputs(module, batch=batch, seed=seed, dtype=torch.float64) for seed in (1, 2))
        self._read(
            module, clean, {key: value if key == "pixel_values" else clean[key] for key, value in corrupt.items()}
        )

    @classmethod
    def of(cls, module: Any, clean: dict[str, Tensor], corrupt: dict[str, Tensor]) -> Example:
        """That of another module."""
        found = cls.__new__(cls)
        found._read(module, clean, corrupt)
        return found

    def _read(self, module: Any, clean: dict[str, Tensor], corrupt: dict[str, Tensor]) -> None:
        self.module, self.model, self.clean, self.corrupt = module, cv.HookedModel(module), clean, corrupt
        self.graph: ComputationalGraph = computational_graph(self.model, clean)
        with torch.no_grad():
            self.source = self.model._values_at(corrupt, self.graph.sites)[1]
            self.base = score(self.model(clean))
            self.other = score(self.model(corrupt))

    def interchange(self) -> Interchange:
        return Interchange(self.model, self.graph, self.clean, self.source)

    def under(self, mask: Tensor) -> Tensor:
        """The output with masked edges corrupted."""
        return self.model.run(self.clean, self.interchange().edits(mask))


def ungrouped(example: Example) -> Example:
    """The same model with a key and value head of its own for every query head of the language tower."""
    config = copy.deepcopy(example.module.config)
    text = config.text_config
    times = text.num_attention_heads // text.num_key_value_heads
    text.num_key_value_heads = text.num_attention_heads
    module = type(example.module)(config).double().eval()
    state = {
        name: value.unflatten(0, (-1, text.head_dim)).repeat_interleave(times, 0).flatten(0, 1)
        if "language_model" in name and (".k_proj." in name or ".v_proj." in name)
        else value
        for name, value in example.module.state_dict().items()
    }
    module.load_state_dict(state)
    return Example.of(module, example.clean, example.corrupt)

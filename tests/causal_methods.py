"""Every public causal method on one tiny LLaVA, called in one way: what tests of bad input and of interruptions share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

import circuitvision as cv
from circuitvision.patching import (
    activation_patch,
    attribution_patch,
    causal_trace,
    interactions,
    knockout,
    modulate,
    path_patch,
)
from circuitvision.subspaces import DAS, BoundlessDAS, illusion_report, subspace_sweep
from tests.conformance.checks_model import hook_tables, implementations
from tests.subspaces.common import pairs_of

NAME, COUNT = "llava-clip-llama", 4
LIVE_STREAM, DEAD_STREAM = "language.blocks.1.hook_resid_pre", "vision.blocks.2.hook_resid_post"
"""LLaVA reads its picture from the last but one of three layers."""


@dataclass
class Asked:
    """What a method is asked: the default is a request that it grants. ``dead`` asks about parts that no output depends on."""

    model: Any
    pairs: Any
    metric: Any = "logit_diff"
    dead: bool = False
    allow_wrong: bool = False
    k: int = 1
    basis: Any = None
    more: dict[str, Any] = field(default_factory=dict)

    @property
    def options(self) -> dict[str, Any]:
        return {"progress": False, **self.more}

    @property
    def batched(self) -> dict[str, Any]:
        return {"example_batch": 1, **self.options}

    @property
    def checked(self) -> dict[str, Any]:
        return {"allow_wrong": self.allow_wrong, **self.batched}

    @property
    def stream(self) -> str:
        return DEAD_STREAM if self.dead else LIVE_STREAM

    @property
    def z(self) -> str:
        return "vision.blocks.2.attn.hook_z" if self.dead else "language.blocks.*.attn.hook_z"

    def heads(self, *numbers: int) -> list[str]:
        return [f"{'vision L2' if self.dead else 'language L0'}H{number}" for number in numbers]

    def of_subspaces(self) -> dict[str, Any]:
        metric = None if self.metric == "logit_diff" else self.metric
        return {"positions": 3 if self.dead else "last", "metric": metric}

    def trained(self) -> dict[str, Any]:
        return {"allow_wrong": self.allow_wrong, "epochs": 1, **self.options}

    def direction(self) -> torch.Tensor:
        if self.basis is not None:
            return self.basis
        tower = self.model.vision if self.dead else self.model.language
        return torch.eye(tower.cfg.d_model)[:, : self.k]


def _knockout(asked: Asked) -> Any:
    where = {"tower": "vision", "layers": [2]} if asked.dead else {}
    routes = {"route": ([5], [3]) if asked.dead else ("last", "patch")}
    return knockout(asked.model, asked.pairs, asked.metric, routes, **where, **asked.checked)


TWO_RUNS: dict[str, Callable[[Asked], Any]] = {
    "activation_patch": lambda a: activation_patch(a.model, a.pairs, a.metric, sites=a.z, **a.checked),
    "attribution_patch": lambda a: attribution_patch(a.model, a.pairs, a.metric, sites=a.z, **a.checked),
    "path_patch": lambda a: path_patch(
        a.model, a.pairs, a.metric, senders=a.heads(0, 1), receivers="output", **a.checked
    ),
    "interactions": lambda a: interactions(a.model, a.pairs, a.metric, components=a.heads(0, 1), **a.checked),
}
"""Methods that put values of one side into the other."""
ONE_RUN: dict[str, Callable[[Asked], Any]] = {
    "causal_trace": lambda a: causal_trace(
        a.model, a.pairs, a.metric, subject="patch", sites=a.stream, axes=("layer",), samples=2, **a.checked
    ),
    "knockout": _knockout,
    "modulate": lambda a: modulate(
        a.model, a.pairs, a.metric, heads=dict.fromkeys(a.heads(0), 1.0), n_random=2, **a.checked
    ),
}
"""Methods that run the clean side alone."""
SUBSPACES: dict[str, Callable[[Asked], Any]] = {
    "DAS": lambda a: DAS(a.k, a.stream, **a.of_subspaces()).fit(
        a.model, a.pairs, held_out=0.5, batch_size=1, **a.trained()
    ),
    "BoundlessDAS": lambda a: BoundlessDAS(a.k, a.stream, **a.of_subspaces()).fit(
        a.model, a.pairs, held_out=0.5, batch_size=1, **a.trained()
    ),
    "illusion_report": lambda a: illusion_report(
        a.model, a.pairs, a.stream, a.direction(), n_random=1, **a.of_subspaces(), **a.trained()
    ),
    "subspace_sweep": lambda a: subspace_sweep(
        a.model, a.pairs, a.stream, a.k, held_out=0.5, batch_size=1, **a.of_subspaces(), **a.trained()
    ),
}
METHODS = {**TWO_RUNS, **ONE_RUN, **SUBSPACES}


def setting() -> tuple[cv.HookedModel, cv.data.Pairs]:
    """The model, and pairs whose answer and foil are what it says on the two sides."""
    return pairs_of(NAME, COUNT, dtype=torch.float32)


@dataclass
class Runs:
    """How many runs of a module began."""

    count: int = 0


@contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """On leaving, nothing may be hooked that was not before."""
    before = hook_tables(model.module), implementations(model.module)
    try:
        yield
    finally:
        assert (model.engine.handles, model.engine.stack) == ([], [])
        assert (hook_tables(model.module), implementations(model.module)) == before


@contextmanager
def counted(model: Any) -> Iterator[Runs]:
    """Count the runs of a model, which is left as it was found."""
    runs = Runs()
    with unchanged(model):
        handle = model.module.register_forward_pre_hook(lambda *_: setattr(runs, "count", runs.count + 1))
        try:
            yield runs
        finally:
            handle.remove()

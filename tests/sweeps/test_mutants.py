"""Break the engine on purpose, once per rule it follows, and see that a sweep stops being equal to the naive loop."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from circuitvision import edits
from circuitvision.incremental import resume, resumed_run, routes
from circuitvision.incremental.sweeps import run
from circuitvision.model import attention
from circuitvision.model.edits.applying import EditApplier
from circuitvision.model.positions import Positions
from tests.sweeps.drawing import inputs_of, metric, model_of

FAMILIES = ("vit", "dinov2", "llava-clip-llama", "clip", "paligemma", "pi0")
KINDS = (
    "attn.hook_z",
    "hook_resid_mid",
    "mlp.hook_post",
    "hook_mlp_out",
    "hook_resid_post",
    "attn.hook_k",
    "hook_resid_pre",
)


def gap(name: str) -> float:
    """The largest difference between a sweep and the loop, over a spread of edits of one model; infinite where it raises or gives up."""
    model, inputs = model_of(name, torch.float64), inputs_of(name, torch.float64, 2, None, 1)
    listed: list[Any] = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for tower in model.towers:
            for number, kind in enumerate(KINDS):
                for layer in range(model.towers[tower].cfg.n_layers):
                    site = f"{tower}.blocks.{layer}.{kind}"
                    listed += [edits.scale(site, 1.5 + number), edits.scale(site, -1.0, positions=[-2, -1])]
            listed.append(
                edits.freeze(f"{tower}.blocks.1.hook_resid_post", f"{tower}.blocks.0.hook_resid_mid", positions=-1)
            )
        naive = torch.stack([metric(model.run(inputs, [edit]), inputs) for edit in listed])
        try:
            # Together, and each with the suffix of its own.
            found = [model.sweep(inputs, listed, metric, batch_size=size, progress=False) for size in (8, 1)]
        except Exception:
            assert (model.engine.handles, model.engine.stack) == ([], [])
            return float("inf")
    if any(plan.in_full for result in found for plan in result.plan):
        return float("inf")
    return max(float((result.values - naive).abs().max()) for result in found)


def later_start(original: Callable[..., Any]) -> Callable[..., Any]:
    """Resume after the place that is edited."""

    def start_of(model: Any, site: str) -> Any:
        start = original(model, site)
        return dataclasses.replace(start, part=3) if start.name == "o" else start

    return start_of


def swapped(self: EditApplier, value: Tensor, hook: Any) -> Any:
    """Give every group the rows of another."""
    self.groups.reverse()
    self.captured.reverse()
    out = WRITE(self, value, hook)
    self.groups.reverse()
    self.captured.reverse()
    return out


WRITE = EditApplier._hook
MUTANTS: dict[str, tuple[str, Callable[[pytest.MonkeyPatch], None]]] = {
    "resumes after the edited part": (
        "vit",
        lambda patch: patch.setattr(routes, "start_of", later_start(routes.start_of)),
    ),
    "the first position is one too late": (
        "llava-clip-llama",
        lambda patch: patch.setattr(run, "lowest_position", lambda *args: routes.lowest_position(*args) + 1),
    ),
    "bidirectional prefixes are taken for causal ones": (
        "paligemma",
        lambda patch: patch.setattr(resume.Resumer, "safe_start", lambda self, tower, layer, position: position),
    ),
    "rows of the groups are exchanged": ("vit", lambda patch: patch.setattr(EditApplier, "_hook", swapped)),
    "rows are repeated one by one, not group by group": (
        "llava-clip-llama",
        lambda patch: patch.setattr(
            resumed_run,
            "repeated",
            lambda value, copies: value.repeat_interleave(copies, 0) if isinstance(value, Tensor) else value,
        ),
    ),
    "earlier keys are those of other positions": (
        "llava-clip-llama",
        lambda patch: patch.setattr(
            attention.PrefixKV,
            "_completed",
            lambda self, before, own: torch.cat(
                [before[:, :, 1 : self.first + 1].repeat(len(own) // len(before), 1, 1, 1), own], 2
            ),
        ),
    ),
    "the suffix sees everything": (
        "llava-clip-llama",
        lambda patch: patch.setattr(attention.PrefixKV, "_mask", lambda self, query, mask: None),
    ),
    "the action expert resumes one block late": (
        "pi0",
        lambda patch: patch.setattr(
            resumed_run, "reached_through_cache", lambda *args: routes.reached_through_cache(*args) + 1
        ),
    ),
    "keys and values of skipped blocks are forgotten": (
        "pi0",
        lambda patch: patch.setattr(resumed_run.ResumedRun, "_fill_cache", staticmethod(lambda *args: None)),
    ),
    "positions of a suffix are counted from its first": (
        "llava-clip-llama",
        lambda patch: patch.setattr(
            Positions,
            "_uniform",
            lambda self, window, device: UNIFORM(self, dataclasses.replace(window, first=0), device),
        ),
    ),
    "pooled towers are not widened": (
        "clip",
        lambda patch: patch.setattr(resume.Resumer, "keeps_positions", lambda self, tower: True),
    ),
}
UNIFORM = Positions._uniform


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spread_of_edits_is_exact(name: str) -> None:
    assert gap(name) < 1e-9


@pytest.mark.parametrize("mutant", list(MUTANTS))
def test_a_broken_engine_is_noticed(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, apply = MUTANTS[mutant]
    apply(monkeypatch)
    assert gap(name) > 1e-3

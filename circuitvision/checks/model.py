"""Whether the table of a family tells the truth about a model: what every number rests on, tried on one run.

A table that names a wrong part is mostly refused when the model is wrapped. What widths cannot tell is measured here: that looking changes nothing,
that every site fires, that what branches add makes up the stream, that the named parts make each value of the one before it, that queries and keys
move their own scores, that edits reach the output except where the table says they cannot, that a sweep is the loop, that the read-out of the last
residual is the output. Each check is a few forward passes.

Not covered: whether names mean what a reader expects of them (a wrong label of a class), the geometry of pictures (a box drawn on the picture tells),
processors.
"""

from __future__ import annotations

import html
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from circuitvision import edits
from circuitvision.checks.blocks import attention_of_heads, norms, parts
from circuitvision.checks.trial import Trial
from circuitvision.errors import CircuitVisionError, InputError
from circuitvision.hooked import HookedModel
from circuitvision.metrics import evaluate
from circuitvision.model.sites import SiteName
from circuitvision.progress import Progress


@dataclass(frozen=True)
class Check:
    """What was tried, and what was found: ``problem`` is empty where it holds."""

    name: str
    claim: str
    problem: str = ""

    @property
    def ok(self) -> bool:
        """Whether it holds."""
        return not self.problem


@dataclass(frozen=True)
class ModelCheck:
    """What :func:`check_model` found."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether everything holds."""
        return all(check.ok for check in self.checks)

    def to_frame(self) -> pd.DataFrame:
        """One row per check: ``check``, ``ok``, ``claim``, ``problem``."""
        return pd.DataFrame(
            [{"check": one.name, "ok": one.ok, "claim": one.claim, "problem": one.problem} for one in self.checks]
        )

    def __str__(self) -> str:
        return "\n".join(
            f"{'ok  ' if one.ok else 'FAIL'} {one.name}: {one.problem or one.claim}" for one in self.checks
        )

    def __repr__(self) -> str:
        failed = [one.name for one in self.checks if not one.ok]
        found = f"failed: {', '.join(failed)}" if failed else "all hold"
        return f"ModelCheck({len(self.checks)} checks, {found})"

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{'✓' if one.ok else '✗'}</td><td>{html.escape(one.name)}</td><td>{html.escape(one.problem or one.claim)}</td></tr>"
            for one in self.checks
        )
        return f"<table>{rows}</table>"


def check_model(
    model: HookedModel, inputs: Any, *, layers: Iterable[int] | None = None, progress: bool = True
) -> ModelCheck:
    """Try on one run whether the family's table tells the truth about a model.

    Args:
        model: the wrapped model, in evaluation mode.
        inputs: of one or more examples, those that the model will be asked about; small ones are enough.
        layers: whose sites are edited; None for the first, the middle and the last of each tower.
        progress: whether to show a bar.

    Raises:
        InputError: no wrapped model.
    """
    if not isinstance(model, HookedModel):
        raise InputError(f"Give a wrapped model, cv.HookedModel(module, processor), not a {type(model).__name__}.")
    found: list[Check] = []
    trial: Trial | None = None
    try:
        trial = Trial(model, model._checked(inputs), layers)
        problem = ""
    except Exception as error:  # a wrong table makes the model's own code fail in any way
        problem = _said(error)
    found.append(Check("sites", "every site fires in a run that records all of them", problem))
    if trial is None:
        return ModelCheck(tuple(found))
    with Progress(len(_CHECKS), "checks", shown=progress) as bar:
        for name, (claim, look) in _CHECKS.items():
            try:
                with torch.no_grad():
                    found.append(Check(name, claim, look(trial)))
            except Exception as error:  # a wrong table makes the model's own code fail in any way
                found.append(Check(name, claim, _said(error)))
            bar.advance()
    return ModelCheck(tuple(found))


def _said(error: Exception) -> str:
    return str(error) if isinstance(error, CircuitVisionError) else f"{type(error).__name__}: {error}"


def _output(trial: Trial) -> str:
    model = trial.model
    bare = model.module(**trial.inputs)
    name = model.family.output
    expected: Any = bare.get(name) if isinstance(bare, Mapping) else getattr(bare, name)
    if trial.far(trial.output, expected):
        return f"model(inputs) is not what the module returns as {name!r}"
    return f"a run that records is another run: {name} differs" if trial.far(trial.eager, trial.output) else ""


def _stream(trial: Trial) -> str:
    for tower in trial.model.towers.values():
        for layer in range(1, tower.cfg.n_layers + 1):
            name = f"{tower.name}.blocks.{layer - 1}.hook_resid_post"
            if isinstance(trial.cache[name], list):
                continue
            end = None if layer == tower.cfg.n_layers else layer
            total = trial.cache.decompose_resid(tower.name, end).sum(0)
            expected = trial.cache[name if end is None else f"{tower.name}.blocks.{layer}.hook_resid_pre"]
            if trial.far(total, expected):
                added = ", ".join(tower.added_in(layer - 1))
                return (
                    f"what enters the {tower.name} tower and {added} do not add up to what leaves block {layer - 1}: is a "
                    "scale or a gate missing or another branch's (Branch(then=)), or a writer between blocks (Stack(writers=))?"
                )
    return ""


def _reach(trial: Trial) -> str:
    for site in trial.sites():
        clean = trial.eager if SiteName.parse(site).is_eager else trial.output
        gap = (_with_noise(trial, site) - clean).abs()
        changed = bool((gap > 0).any() | gap.isnan().any())
        if changed and trial.model.is_dead(site, trial.inputs):
            return f"the table says that {site} cannot reach the output, and an edit changes it"
        if not changed and not trial.model.is_dead(site, trial.inputs):
            return f"an edit of {site} changes nothing: is it the module that the model computes with?"
    return ""


def _with_noise(trial: Trial, site: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def write(value: Tensor, hook: Any) -> Tensor:
        drawn = torch.rand(value.shape, generator=generator).to(value)
        scale = value.abs().mean().clamp_min(1e-3) if SiteName.parse(site).stage != "hook_attn_scores" else 1.0
        return value + drawn * scale

    with warnings.catch_warnings():
        # That a site is dead is what is looked at here.
        warnings.simplefilter("ignore")
        return trial.model.run_with_hooks(trial.inputs, [(site, write)]).detach()


def _positions(trial: Trial) -> str:
    """Positions that the table says are not read of the last residual: an edit there must do nothing, an edit of the others something."""
    model, maps = trial.model, trial.model.tokens(trial.inputs)
    for name, tower in model.towers.items():
        site = f"{name}.blocks.{max(tower.feature_layers_in(trial.inputs)) - 1}.hook_resid_post"
        if site not in trial.cache or name not in maps or model.is_dead(site, trial.inputs):
            continue
        dead = model.dead_positions(site, trial.inputs)
        real = torch.from_numpy(maps[name].kind != "padding")
        groups = {"unread": real & dead, "read": real & ~dead} if dead is not None else {"read": real}
        for word, mask in groups.items():
            if not bool(mask.any()):
                continue
            out = model.run_with_hooks(trial.inputs, [(site, partial(_moved, mask))])
            changed = bool(((out - trial.output).abs() > 0).any())
            if changed != (word == "read"):
                kinds = ", ".join(sorted(set(maps[name].kind[mask.numpy()].tolist())))
                said = "are not read" if word == "unread" else "are read"
                return (
                    f"the table says that positions of kind {kinds} of the {name} tower {said}, and editing them changes "
                    f"{'the output' if changed else 'nothing'}: see Readout(pool=, reads=) and Stack(prefix=)"
                )
    return ""


def _moved(mask: Tensor, value: Tensor, hook: Any) -> Tensor:
    return torch.where(mask.to(value.device)[..., None], value * 1.5 + 1.0, value)


def _masks(trial: Trial) -> str:
    for tower in trial.model.towers.values():
        pattern = trial.cache._values.get(f"{tower.name}.blocks.0.attn.hook_pattern")
        if not isinstance(pattern, Tensor) or pattern.ndim != 4 or pattern.shape[-1] != pattern.shape[-2]:
            continue
        ahead = float(pattern.triu(1).abs().amax()) if pattern.shape[-1] > 1 else 0.0
        if tower.cfg.attention == "causal" and ahead > 0:
            return f"the table calls the {tower.name} tower causal, and positions look at later ones"
        if tower.cfg.attention == "bidirectional" and ahead == 0 and pattern.shape[-1] > 1:
            return f"no position of the {tower.name} tower looks at a later one: attention='causal'?"
    return ""


def _readout(trial: Trial) -> str:
    model = trial.model
    tower = model.towers[model.flow.answer]
    if tower.spec.readout is None:
        return ""
    site = tower.residual_name(max(tower.feature_layers_in(trial.inputs)))
    found = tower.readout(trial.cache[site], trial.cache)
    if trial.far(found, trial.output):
        return f"the read-out of {site} is not the output: see Readout(pool=, head=, normed=, norm_first=, finish=) of the {tower.name} tower"
    return ""


def _sweep(trial: Trial) -> str:
    model = trial.model
    sites = [
        name
        for name in trial.sites()
        if SiteName.parse(name).stage
        in ("hook_z", "hook_mlp_out", "hook_attn_out", "hook_resid_post", "hook_deepstack")
        and not model.is_dead(name, trial.inputs)
    ]
    groups = [[edits.scale(name, 0.5)] for name in sites]
    if not groups:
        return ""
    swept = model.sweep(trial.inputs, groups, _total, progress=False)
    for number, (site, group) in enumerate(zip(sites, groups, strict=True)):
        alone = evaluate(_total, model.run(trial.inputs, group), trial.inputs)
        if trial.far(swept.values[number], alone.to(swept.values)):
            return f"a sweep over {site} gives other numbers than the edited run ({swept.plan[number]})"
    return ""


def _total(output: Tensor) -> Tensor:
    return output.flatten(1).double().sum(-1) if output.ndim > 1 else output.double()


_CHECKS: dict[str, tuple[str, Callable[[Trial], str]]] = {
    "output": ("recording changes nothing: the output is the module's own", _output),
    "stream": ("what enters a tower and what its blocks add make up its stream", _stream),
    "norms": ("norms compute as they are described", norms),
    "parts": ("the named parts make each value of a branch of the one before it", parts),
    "attention": ("queries and keys move the scores of their own heads and positions, values none", attention_of_heads),
    "edits": ("an edit of every site changes the output, except where the table says it cannot", _reach),
    "positions": ("the output reads the positions that the table says", _positions),
    "masks": ("positions see each other as the table says", _masks),
    "read-out": ("the read-out of the last residual is the output", _readout),
    "sweep": ("a sweep gives what edited runs give", _sweep),
}

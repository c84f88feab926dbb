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
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from circuitvision import edits
from circuitvision.errors import CircuitVisionError, InputError
from circuitvision.hooked import HookedModel
from circuitvision.metrics import evaluate
from circuitvision.model.block import Block
from circuitvision.model.branches import AttentionBranch, Branch, MLPBranch, in_features
from circuitvision.model.norms import Norm
from circuitvision.model.sites import SiteName
from circuitvision.model.tower import Tower
from circuitvision.model.weights import is_plain_linear
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


_ROTATES = 1.5
"""How far rotated heads may be longer than others, relative to what is rotated: some rotary embeddings scale a part of each head."""


class _Trial:
    """One model and one run, with what several checks need."""

    def __init__(self, model: HookedModel, inputs: Mapping[str, Any], layers: Iterable[int] | None) -> None:
        self.model, self.inputs = model, dict(inputs)
        with torch.no_grad():
            self.output = model(self.inputs).detach()
            self.eager, self.cache = model.run_with_cache(self.inputs, "**")
        self.layers = None if layers is None else set(layers)

    @property
    def rounding(self) -> float:
        """How far two ways of computing one number may lie apart, relative to its size."""
        eps = torch.finfo(self.output.dtype).eps
        return max(2e3 * eps, 1e-5)

    def far(self, found: Tensor, expected: Tensor) -> bool:
        """Whether two tensors differ by more than rounding."""
        if found.shape != expected.shape:
            return True
        size = float(expected.abs().amax().clamp_min(1e-6))
        gap = (found.double() - expected.double()).abs().nan_to_num(0.0)
        return float(gap.amax()) > self.rounding * size

    def value(self, site: str) -> Tensor | None:
        """What a site held; None where the run did not pass it, or more than once."""
        found = self.cache.get(site)
        return found if isinstance(found, Tensor) else None

    def blocks(self, tower: Tower) -> list[Block]:
        """The chosen blocks of a tower."""
        return [block for block in tower.blocks if block.layer in self._chosen(tower)]

    def _chosen(self, tower: Tower) -> set[int]:
        count = tower.cfg.n_layers
        return {0, count // 2, count - 1} if self.layers is None else self.layers

    def sites(self) -> list[str]:
        """The sites of the chosen layers, in the order of the pass; without a choice of the first, the middle and the last one of each tower."""
        found = []
        for name in self.model.sites():
            site = SiteName.parse(name)
            if site.layer is None or name not in self.cache:
                found += [name] if name in self.cache else []
                continue
            found += [name] if site.layer in self._chosen(self.model.towers[site.tower]) else []
        return found


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
    trial: _Trial | None = None
    try:
        trial = _Trial(model, model._checked(inputs), layers)
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


def _output(trial: _Trial) -> str:
    model = trial.model
    bare = model.module(**trial.inputs)
    name = model.family.output
    expected: Any = bare.get(name) if isinstance(bare, Mapping) else getattr(bare, name)
    if trial.far(trial.output, expected):
        return f"model(inputs) is not what the module returns as {name!r}"
    return f"a run that records is another run: {name} differs" if trial.far(trial.eager, trial.output) else ""


def _stream(trial: _Trial) -> str:
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
                return f"what enters the {tower.name} tower and {added} do not add up to what leaves block {layer - 1}"
    return ""


def _reach(trial: _Trial) -> str:
    for site in trial.sites():
        clean = trial.eager if SiteName.parse(site).is_eager else trial.output
        gap = (_with_noise(trial, site) - clean).abs()
        changed = bool((gap > 0).any() | gap.isnan().any())
        if changed and trial.model.is_dead(site, trial.inputs):
            return f"the table says that {site} cannot reach the output, and an edit changes it"
        if not changed and not trial.model.is_dead(site, trial.inputs):
            return f"an edit of {site} changes nothing: is it the module that the model computes with?"
    return ""


def _with_noise(trial: _Trial, site: str) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def write(value: Tensor, hook: Any) -> Tensor:
        drawn = torch.rand(value.shape, generator=generator).to(value)
        scale = value.abs().mean().clamp_min(1e-3) if SiteName.parse(site).stage != "hook_attn_scores" else 1.0
        return value + drawn * scale

    with warnings.catch_warnings():
        # That a site is dead is what is looked at here.
        warnings.simplefilter("ignore")
        return trial.model.run_with_hooks(trial.inputs, [(site, write)]).detach()


def _positions(trial: _Trial) -> str:
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


def _masks(trial: _Trial) -> str:
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


def _readout(trial: _Trial) -> str:
    model = trial.model
    tower = model.towers[model.flow.answer]
    if tower.spec.readout is None:
        return ""
    site = tower.residual_name(max(tower.feature_layers_in(trial.inputs)))
    found = tower.readout(trial.cache[site], trial.cache)
    if trial.far(found, trial.output):
        return f"the read-out of {site} is not the output: see Readout(pool=, head=, normed=, norm_first=, finish=) of the {tower.name} tower"
    return ""


def _sweep(trial: _Trial) -> str:
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


def _norms(trial: _Trial) -> str:
    for tower in trial.model.towers.values():
        with tower.hooks_disabled():
            for block in trial.blocks(tower):
                for branch in block.branches:
                    for name, module, value in _normed(trial, block, branch):
                        norm = Norm(module)
                        if trial.far(norm.held(value, norm.denominator(value)), module.forward(value)):
                            return f"{name} does not compute as {type(module).__name__} is described: see register_norm(NormSpec(…), …)"
    return ""


def _normed(trial: _Trial, block: Block, branch: Branch) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """The norms of a branch that read and write what the cache has: name, module, and a value that it is given."""
    stream = trial.value(f"{block.prefix}.{branch.stream}")
    for kind in ("norm", "sum_norm", "post_norm"):
        module = getattr(branch, kind)
        if module is not None and stream is not None:
            yield f"{kind} of {branch.name} in {block.prefix}", module, stream
    if not isinstance(branch, AttentionBranch):
        return
    for letter in "qkv":
        module, value = branch.head_norm(letter), trial.value(f"{block.prefix}.{branch.name}.hook_{letter}")
        if module is not None and value is not None:
            whole = in_features(module) not in (0, value.shape[-1])
            yield f"{letter}_norm of {branch.name} in {block.prefix}", module, value.flatten(-2) if whole else value


def _parts(trial: _Trial) -> str:
    """What lies between the sites of one branch: each is computed from the one before it by the named part."""
    for tower in trial.model.towers.values():
        for block in trial.blocks(tower):
            for branch in block.branches:
                with tower.hooks_disabled():
                    problem = (
                        _entering(trial, block, branch)
                        or _read_part(trial, block, branch)
                        or _head_norms(trial, block, branch)
                        or _nonlinearity(trial, block, branch)
                        or _written_part(trial, block, branch)
                    )
                if problem:
                    return f"{block.prefix}: {problem}"
    return ""


def _entering(trial: _Trial, block: Block, branch: Branch) -> str:
    """The stream that a branch reads is what enters the block and what the branches before it added."""
    before = block.branches_before(branch)
    sites = ["hook_resid_pre", branch.stream, *(one.added for one in before)]
    values = [value for value in (trial.value(f"{block.prefix}.{site}") for site in sites) if value is not None]
    if not before or any(one.sum_norm is not None for one in before) or len(values) < len(sites):
        return ""
    entering, stream, *added = values
    if trial.far(torch.stack([entering, *added]).sum(0), stream):
        return f"{branch.name} does not read what the branches before it add: are they side by side (BlockLayout(parallel=True))?"
    return ""


def _head_norms(trial: _Trial, block: Block, branch: Branch) -> str:
    """Norms of queries, keys and values are given those; what is rotated is as long as what comes out of them."""
    if not isinstance(branch, AttentionBranch):
        return ""
    for letter in "qkv":
        stem, module = f"{block.prefix}.{branch.name}", branch.head_norm(letter)
        value, normalized = trial.value(f"{stem}.hook_{letter}"), trial.value(f"{stem}.{letter}_norm.hook_normalized")
        if value is None:
            continue
        normed = branch.normed_heads(letter, value)
        if module is not None and normalized is not None:
            whole = in_features(module) not in (0, value.shape[-1])
            norm, inner = Norm(module), normalized.flatten(-2) if whole else normalized
            bias = norm.bias(inner)
            found = norm.gained(inner) if bias is None else norm.gained(inner) + bias
            if trial.far(found.reshape(normalized.shape), normed):
                return f"{letter}_norm of {branch.name} is given something else than hook_{letter}: another norm, or heads_first=?"
        rotated = trial.value(f"{stem}.hook_rot_{letter}") if letter != "v" else None
        if rotated is not None and rotated.shape == normed.shape:
            ratio = rotated.norm(dim=-1) / normed.norm(dim=-1)
            if float(ratio.amax()) > _ROTATES * float(ratio.amin()):
                return f"what is rotated is no rotation of hook_{letter} of {branch.name}: does a norm come before it ({letter}_norm=)?"
    return ""


def _read_part(trial: _Trial, block: Block, branch: Branch) -> str:
    stream = trial.value(f"{block.prefix}.{branch.stream}")
    if stream is None or not isinstance(branch, (AttentionBranch, MLPBranch)):
        return ""
    if isinstance(branch, AttentionBranch):
        reads = {f"{branch.name}.hook_{letter}": branch.projection(letter) for letter in branch.letters}
    else:
        reads = branch.inputs
    normed = stream if branch.norm is None else branch.norm.forward(stream)
    for site, projection in reads.items():
        value = trial.value(f"{block.prefix}.{site}")
        if value is None:
            continue
        weight, bias = projection.weight_and_bias(normed.dtype, normed.device)
        found = normed @ weight if bias is None else normed @ weight + bias
        if is_plain_linear(projection.module) and trial.far(found, value.reshape(found.shape)):
            return f"{site} is not what its projection makes of {branch.stream} behind norm={branch.layout.norm!r}"
    return ""


def _nonlinearity(trial: _Trial, block: Block, branch: Branch) -> str:
    """Of an MLP: what its activation makes of the gate, times the other input."""
    if not isinstance(branch, MLPBranch):
        return ""
    act: Any = ACT2FN.get(branch.core.act or block.tower.cfg.act)
    sites = [f"{block.prefix}.{site}" for site in (*branch.inputs, branch.inner)]
    values = [value for value in map(trial.value, sites) if value is not None]
    if act is None or len(values) < len(sites):
        return ""
    act = act() if isinstance(act, type) else act
    *inputs, post = values
    found = [
        act(first) * torch.stack([first.new_ones(()).expand_as(first), *rest]).prod(0)
        for first, *rest in (inputs, inputs[::-1])
    ]
    if not trial.far(found[0], post):
        return ""
    swapped = len(inputs) == 2 and not trial.far(found[1], post)
    said = f"is it another one than {branch.core.act or block.tower.cfg.act} (MLP(act=))?"
    why = "gate and input are swapped" if swapped else said
    return f"{branch.inner} is not the activation of {branch.name}.hook_pre{' times hook_pre_linear' if len(inputs) == 2 else ''}: {why}"


def _written_part(trial: _Trial, block: Block, branch: Branch) -> str:
    inner, added = (trial.value(f"{block.prefix}.{site}") for site in (branch.inner or branch.added, branch.added))
    if inner is None or added is None or not branch.inner or not is_plain_linear(branch.output):
        return ""
    if trial.far(branch.written(branch.inner, inner), added):
        return (
            f"{branch.added} is not what the output projection and then={branch.layout.then!r} make of {branch.inner}"
        )
    return ""


def _attention(trial: _Trial) -> str:
    """Queries move the scores of their own position, keys those of theirs, values none: told by edits of each."""
    for tower in trial.model.towers.values():
        for block in trial.blocks(tower):
            for branch in block.attentions:
                problem = _attention_of(trial, block, branch)
                if problem:
                    return f"{block.prefix}: {problem}"
    return ""


def _attention_of(trial: _Trial, block: Block, branch: AttentionBranch) -> str:
    stem = f"{block.prefix}.{branch.name}"
    scores = trial.value(f"{stem}.hook_attn_scores")
    if scores is None or trial.value(branch_site := f"{stem}.hook_z") is None:
        return ""
    if scores.shape[1] != branch.heads_of("q"):
        return f"{branch.name} has {scores.shape[1]} heads of scores, and the table says {branch.heads_of('q')}"
    before = scores, trial.cache[branch_site]
    for letter, axis in (("q", 2), ("k", 3), ("v", None)):
        site = f"{stem}.hook_{letter}"
        value = trial.value(site)
        if value is None:
            continue
        position = value.shape[1] // 2
        apart = in_features(norm) in (0, value.shape[-1]) if (norm := branch.head_norm(letter)) is not None else True
        after = _after_edit(trial, site, position, (f"{stem}.hook_attn_scores", branch_site))
        moved = _moved_entries(before[0], after[0])
        if axis is None:
            wrong = bool(moved.any()) or torch.equal(before[1], after[1])
            said = "moves scores, or no value that is read"
        else:
            elsewhere = moved.clone()
            # Keys of another tower's cache come before a tower's own.
            elsewhere.select(axis, position + scores.shape[axis] - value.shape[1]).zero_()
            own = scores.shape[1] // branch.heads_of(letter) if apart else scores.shape[1]
            elsewhere[:, own:] = elsewhere[:, own:] | moved[:, own:]
            wrong = bool(elsewhere.any()) or not bool(moved.any())
            said = f"moves other scores than those of its head and its {'query' if axis == 2 else 'key'}"
        if wrong:
            return f"an edit of {branch.name}.hook_{letter} {said}: are q, k, v, the order of Fused and n_heads as the model has them?"
    return ""


def _after_edit(trial: _Trial, site: str, position: int, sites: tuple[str, ...]) -> list[Tensor]:
    """What sites hold when head 0 of a projection is another one at a position."""
    kept: dict[str, Tensor] = {}

    def write(value: Tensor, hook: Any) -> Tensor:
        out = value.clone()
        out[:, position, 0] = out[:, position, 0].flip(-1) * 1.5 + 0.5
        return out

    def keep(value: Tensor, hook: Any, name: str = "") -> None:
        kept[name] = value.clone()

    with warnings.catch_warnings():
        # Whether the edit reaches the output is not asked here.
        warnings.simplefilter("ignore")
        trial.model.run_with_hooks(trial.inputs, [(site, write), *((one, partial(keep, name=one)) for one in sites)])
    return [kept[name] for name in sites]


def _moved_entries(before: Tensor, after: Tensor) -> Tensor:
    """Which scores differ by more than rounding, hidden ones aside."""
    seen = before > torch.finfo(before.dtype).min / 2
    size = before[seen].abs().amax().clamp_min(1e-6) if bool(seen.any()) else 1.0
    return seen & ((before - after).abs() > 1e-5 * size)


_CHECKS: dict[str, tuple[str, Callable[[_Trial], str]]] = {
    "output": ("recording changes nothing: the output is the module's own", _output),
    "stream": ("what enters a tower and what its blocks add make up its stream", _stream),
    "norms": ("norms compute as they are described", _norms),
    "parts": ("the named parts make each value of a branch of the one before it", _parts),
    "attention": ("queries and keys move the scores of their own heads and positions, values none", _attention),
    "edits": ("an edit of every site changes the output, except where the table says it cannot", _reach),
    "positions": ("the output reads the positions that the table says", _positions),
    "masks": ("positions see each other as the table says", _masks),
    "read-out": ("the read-out of the last residual is the output", _readout),
    "sweep": ("a sweep gives what edited runs give", _sweep),
}

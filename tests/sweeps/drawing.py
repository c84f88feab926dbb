"""Random models, inputs and edits for the tests of sweeps, and a metric that every number of the output moves."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from typing import Any

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from circuitvision.model.sites import SiteName
from tests.zoo import CASES, shared_model

PATTERNS = ("hook_attn_scores", "hook_pattern")
KINDS = (
    "replace",
    "zero",
    "mean",
    "resample",
    "heads",
    "add",
    "norm_preserving",
    "project_out",
    "scale",
    "overwrite",
    "project",
    "freeze",
    "permute",
    "renormalise",
    "apply",
    "block_attention",
    "scale_attention",
    "add_attention_bias",
    "delete_tokens",
)


@cache
def model_of(name: str, dtype: torch.dtype) -> cv.HookedModel:
    """A wrapped zoo model in one precision, shared by all draws."""
    return cv.HookedModel(copy.deepcopy(shared_model(name)).to(dtype).eval())


@cache
def inputs_of(name: str, dtype: torch.dtype, batch: int, padding: str | None, images: int, seed: int = 0) -> Any:
    """Inputs made by hand; the same object for the same draw, so that caches of checked inputs are used as well."""
    return CASES[name].inputs(
        model_of(name, dtype).module, batch=batch, seed=seed, dtype=dtype, padding=padding, images_per_prompt=images
    )


@cache
def source_of(name: str, dtype: torch.dtype, batch: int, padding: str | None, images: int) -> Any:
    """All activations of another run of the same shape."""
    model = model_of(name, dtype)
    other = dict(inputs_of(name, dtype, batch, padding, images, seed=7))
    # The other run's images and words, this run's padding: the shapes and masks agree.
    other.update(
        {k: v for k, v in inputs_of(name, dtype, batch, padding, images).items() if "mask" in k or "spatial" in k}
    )
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for eager in (True, False):
            _, cache = model.run_with_cache(other, lambda site: SiteName.parse(site).is_eager == eager)
            found |= dict(cache)
    return found


def metric(logits: Tensor, inputs: Any = None) -> Tensor:
    """A weighted sum of every number of the output that is not at a padding position, one weight each."""
    mask = None if inputs is None else inputs.get("attention_mask", inputs.get("pixel_attention_mask"))
    if mask is not None and logits.ndim == 3 and mask.shape == logits.shape[:2]:
        logits = torch.where(mask.bool()[..., None], logits, 0.0)
    weights = torch.linspace(0.5, 1.5, logits[0].numel(), dtype=logits.dtype).view_as(logits[0]).cos()
    return (logits * weights).flatten(1).sum(1)


@st.composite
def runs(draw: Any, dtype: torch.dtype) -> tuple[cv.HookedModel, Any, Any]:
    """A model, inputs, and the activations of another run of their shape."""
    case = CASES[draw(st.sampled_from(sorted(CASES)))]
    paddings = [None, *(side for side in ("left", "right") if f"padding_{side}" in case.tags)]
    padding = draw(st.sampled_from(paddings))
    batch = draw(st.integers(1, 3)) if padding is None else 3
    images = draw(st.sampled_from([1, 2])) if "two_images" in case.tags else 1
    arguments = (case.name, dtype, batch, padding, images)
    return model_of(case.name, dtype), inputs_of(*arguments), source_of(*arguments)


def positions(draw: Any, tokens: Any, kinds: str = "nilsmt") -> Any:
    """Positions in one of the forms that edits take."""
    count = tokens.n_positions
    form = draw(st.sampled_from(kinds))
    if form == "n":
        return None
    if form == "i":
        return draw(st.integers(-count, count - 1))
    if form == "l":
        return draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=3, unique=True))
    if form == "s":
        return slice(draw(st.integers(0, count - 1)), None)
    if form == "m":
        examples = int(tokens.example.max()) + 1
        generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
        mask = torch.rand(examples, count, generator=generator) < 0.3
        mask[:, draw(st.integers(0, count - 1))] = True
        return mask
    chosen = tokens.select("patch")
    return chosen if len(chosen) else "last"


def edit(draw: Any, model: cv.HookedModel, inputs: Any, source: Any) -> edits.Edit:
    """One random edit that the model can take."""
    maps = model.tokens(inputs)
    tower = draw(st.sampled_from([name for name in model.towers if name in maps]))
    tokens, cfg = maps[tower], model.towers[tower].cfg
    kind = draw(st.sampled_from(KINDS))
    layers = draw(st.lists(st.integers(0, cfg.n_layers - 1), min_size=1, max_size=2, unique=True))
    if kind in ("block_attention", "scale_attention", "add_attention_bias"):
        where = (positions(draw, tokens, "il"), positions(draw, tokens, "ilst"))
        how: dict[str, Any] = {"layers": layers, "renormalise": draw(st.booleans())}
        how["heads"] = draw(st.sampled_from([None, 0, [-1]]))
        if kind == "block_attention":
            return edits.block_attention(tower, *where, **how)
        return getattr(edits, kind)(tower, *where, draw(st.floats(-1.5, 1.5)), **how)
    if kind == "delete_tokens":
        return edits.delete_tokens(tower, positions(draw, tokens, "il"), start=draw(st.integers(0, cfg.n_layers)))
    if kind == "freeze":
        later = draw(st.integers(1, cfg.n_layers - 1)) if cfg.n_layers > 1 else 0
        early = ("blocks.0.hook_resid_mid", "hook_input", "blocks.0.hook_attn_out", "blocks.0.hook_resid_pre")
        late = ("hook_resid_post", "hook_mlp_out", "hook_resid_mid", "ln2.hook_normalized")
        target = f"{tower}.blocks.{later}.{draw(st.sampled_from(late))}"
        return edits.freeze(
            target, f"{tower}.{draw(st.sampled_from(early))}", positions=positions(draw, tokens, "nilsm")
        )
    return _at_site(draw, model, source, kind, tower, tokens)


def _at_site(draw: Any, model: cv.HookedModel, source: Any, kind: str, tower: str, tokens: Any) -> edits.Edit:
    sites = [s for s in source if s.startswith((f"{tower}.", "projector."))]
    heads = None
    if kind == "heads":
        sites = [s for s in sites if SiteName.parse(s).stage == "hook_z" and ".blocks." in s]
        heads = [0]
    if kind == "permute":
        sites = [s for s in sites if "hook_resid" in s]
    elif kind not in ("replace", "apply"):
        sites = [s for s in sites if not s.endswith(PATTERNS)]
    site = draw(st.sampled_from(sites))
    name, value = SiteName.parse(site), source[site]
    headed = name.has_heads
    length = value.shape[2 if name.is_pattern else 1]
    free = value.ndim == (4 if headed else 3) and name.tower == tower and length == tokens.n_positions
    where: dict[str, Any] = {"positions": positions(draw, tokens) if free else None}
    if headed:
        n_heads = value.shape[1 if name.is_pattern else 2]
        where["heads"] = heads if heads is not None else draw(st.sampled_from([None, [0], [n_heads - 1]]))
    width = value.shape[-1]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    noise = torch.randn(width, generator=generator, dtype=torch.float64).to(value)
    if kind in ("zero", "mean", "resample", "heads"):
        assume(kind != "zero" or name.stage != "hook_scale")
        assume(kind not in ("mean", "resample") or value.shape[0] > 1)
        return edits.ablate(site, kind, **where)
    if kind in ("add", "norm_preserving", "project_out"):
        return edits.steer(site, noise, draw(st.floats(-2, 2)), mode=kind, **where)
    if kind == "scale":
        return edits.scale(site, draw(st.floats(0.25, 2)), **where)
    if kind == "overwrite":
        return edits.overwrite(site, [0, width - 1], draw(st.floats(0.5, 2)), **where)
    if kind == "project":
        return edits.project(site, noise, source[site], **where)
    if kind == "permute":
        count = draw(st.integers(2, min(4, length)))
        first = draw(st.integers(0, length - count))
        return edits.permute(site, draw(st.permutations(range(count))), positions=slice(first, first + count))
    if kind == "renormalise":
        return edits.renormalise(site, draw(st.floats(0.5, 3)), **where)
    if kind == "apply":
        return edits.apply(site, tilt, **where)
    return edits.replace(site, source[site], **where)


def tilt(tensor: Tensor, hook: Any) -> Tensor:
    """A change that depends on every position."""
    return tensor * 1.1 + 0.1 * tensor.flatten(1).mean(1).view(-1, *([1] * (tensor.ndim - 1)))


@st.composite
def sweeps(draw: Any, dtype: torch.dtype) -> tuple[cv.HookedModel, Any, list[tuple[edits.Edit, ...]]]:
    """A run, and groups of edits that a single run takes without an error."""
    model, inputs, source = draw(runs(dtype))
    groups = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(draw(st.integers(1, 5))):
            group = tuple(edit(draw, model, inputs, source) for _ in range(draw(st.sampled_from([1, 1, 2, 3]))))
            try:
                with torch.no_grad():
                    model.run(inputs, group)
            except InputError:
                continue
            groups.append(group)
    assume(groups)
    return model, inputs, groups

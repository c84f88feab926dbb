"""Which edit meets which model in which kind of run, and what both ways of making it give."""

from __future__ import annotations

import contextlib
import math
import random
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import CircuitVisionError
from tests.trial import plain
from tests.trial.arithmetic import arithmetic, attention_edit, deletion, values
from tests.trial.models import ODD, inputs_of, module_of

SIDES = ("left", "right")
BLOCK_SITES = (
    "hook_resid_pre",
    "hook_resid_mid",
    "hook_resid_post",
    "hook_attn_out",
    "hook_mlp_out",
    "hook_mlp_in",
    "hook_q_input",
    "hook_k_input",
    "hook_v_input",
    "ln1.hook_scale",
    "ln1.hook_normalized",
    "ln2.hook_scale",
    "ln2.hook_normalized",
    "attn.hook_q",
    "attn.hook_k",
    "attn.hook_v",
    "attn.hook_z",
    "attn.hook_result",
    "mlp.hook_pre",
    "mlp.hook_post",
)
TOWER_SITES = ("hook_embed", "hook_input", "ln_final.hook_scale", "ln_final.hook_normalized", "hook_readout")
KINDS = (
    "replace",
    "zero",
    "given",
    "mean",
    "all",
    "add",
    "norm_preserving",
    "project_out",
    "scale",
    "overwrite",
    "project",
    "renormalise",
    "apply",
    "permute",
    "freeze",
    "heads",
    "dictionary",
    "delete_tokens",
    "block_attention",
    "scale_attention",
    "add_attention_bias",
)
EAGER_ONLY = ("llava-two-layers-full", "paligemma2-capped")
"""Models with a soft cap on their scores, which no fused kernel computes."""
PATTERN_KINDS = ("block_attention", "scale_attention", "add_attention_bias")


@dataclass
class Draw:
    """One comparison: a model, inputs, an edit in both forms, and how the run is made."""

    name: str
    side: str
    tower: str
    site: str
    kind: str
    edit: edits.Edit
    by_hand: plain.Fn
    mode: str
    attention: str
    seed: int = 0

    @property
    def dtype(self) -> torch.dtype:
        """float32 where the model's own eager attention takes its softmax in float32 and makes NaN of a row of padding in float64."""
        return torch.float32 if self.attention == "eager" else torch.float64

    def __str__(self) -> str:
        return f"{self.name} ({self.side}, {self.mode}, {self.attention}): {self.edit!r}"


@dataclass
class Outcome:
    """What a comparison gave: the deviation, relative to the largest number of the output; how far the edit moved it; or the refusal."""

    draw: Draw
    deviation: float = math.nan
    effect: float = math.nan
    refusal: str = ""


@contextlib.contextmanager
def _prepared(name: str, attention: str, dtype: torch.dtype) -> Iterator[Any]:
    module = module_of(name, attention).to(dtype)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield module
    module.to(torch.float64)


def _cast(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs.items()}


def _real(module: Any, inputs: dict[str, Any], tower: str, shape: torch.Size) -> Tensor:
    """Positions that are not padding, by the masks of the inputs alone: bool ``[row, pos]``."""
    mask = None
    if tower in ("language", "text"):
        mask = inputs.get("attention_mask")
    elif tower == "vision" and "spatial_shapes" in inputs:
        mask = inputs["pixel_attention_mask"]
    elif tower == "vision" and "pixel_attention_mask" in inputs:
        mask = inputs["pixel_attention_mask"].flatten()[:, None].expand(shape[:2])
    if mask is None or mask.shape != shape[:2]:
        return torch.ones(shape[:2], dtype=torch.bool)
    return mask.bool()


def _places(chance: random.Random, real: Tensor) -> tuple[Any, Tensor]:
    """Positions as an edit takes them, and the same as bool ``[row, pos]``."""
    rows, length = real.shape
    hit = torch.zeros(rows, length, dtype=torch.bool)
    form = chance.choice(("none", "int", "ints", "slice", "last", "mask", "mask1", "numpy"))
    if form == "none":
        return None, ~hit
    if form == "int":
        position = chance.randrange(-length, length)
        hit[:, position] = True
        return position, hit
    if form == "ints":
        some = chance.sample(range(length), min(3, length))
        hit[:, some] = True
        return some, hit
    if form == "slice":
        first = chance.randrange(length)
        hit[:, first:length] = True
        return slice(first, length), hit
    if form == "last":
        last = length - 1 - real.flip(1).long().argmax(1)
        hit[torch.arange(rows), last] = real.any(1)
        return "last", hit
    if form == "mask1":
        hit[:, torch.rand(length, generator=torch.Generator().manual_seed(chance.randrange(99))) < 0.4] = True
        return hit[0], hit
    hit = torch.rand(rows, length, generator=torch.Generator().manual_seed(chance.randrange(99))) < 0.3
    hit[:, chance.randrange(length)] = True
    return hit.numpy() if form == "numpy" else hit.clone(), hit


def draw(number: int) -> Draw | None:
    """The ``number``-th comparison; None where the two cannot be drawn for a model (a site of its family that has no positions, say)."""
    chance = random.Random(number)
    name = chance.choice(sorted(ODD))
    side = chance.choice(SIDES)
    attention = chance.choice(("sdpa", "sdpa", "eager"))
    module = module_of(name, "eager")
    towers = plain.ROOTS.get(type(module).__name__, plain.VLM)
    tower = chance.choice(sorted(towers))
    mode = chance.choice(("run", "sweep"))
    if tower == "language" and hasattr(module, "generate") and "pi0" not in name and chance.random() < 0.35:
        mode = "generate"
    if "pi0" in name and chance.random() < 0.4:
        mode = "act"
    kind = chance.choice(KINDS)
    if kind in (*PATTERN_KINDS, "delete_tokens") or name in EAGER_ONLY:
        attention = "eager"
    dtype = torch.float32 if attention == "eager" else torch.float64
    seed = chance.randrange(3)
    inputs = _cast(inputs_of(name, side, seed), dtype)
    with _prepared(name, attention, dtype) as prepared:
        made = _edit(chance, prepared, inputs, tower, kind, attention, mode)
    return None if made is None else Draw(name, side, tower, made[0], kind, made[1], made[2], mode, attention, seed)


def _site(chance: random.Random, module: Any, tower: str, kind: str, attention: str) -> str:
    layers = len(plain.blocks(module, tower))
    if kind == "freeze":
        return f"{tower}.blocks.{layers - 1}.{chance.choice(('hook_resid_mid', 'hook_mlp_out', 'hook_resid_post'))}"
    if chance.random() < 0.15:
        names = [*TOWER_SITES] if kind != "freeze" else ["hook_input"]
        more = ["projector.hook_in", "projector.hook_out"] if tower == "vision" and hasattr(module, "lm_head") else []
        if tower == "vision" and hasattr(plain.root(module, tower), "head"):
            more += [f"vision.pool.attn.hook_{part}" for part in ("q", "k", "v", "z")]
        return chance.choice([*(f"{tower}.{name}" for name in names), *more])
    names = list(BLOCK_SITES)
    part = plain.parts(plain.blocks(module, tower)[0])
    names += ["mlp.hook_pre_linear"] if "gate" in part else []
    if type(part.get("attn_add")).__name__.endswith("RMSNorm"):
        names += ["ln1_post.hook_normalized", "ln2_post.hook_scale"]
    if attention == "eager":
        names += ["attn.hook_rot_q", "attn.hook_rot_k"] if tower in ("language", "action") else []
        names += ["attn.hook_attn_scores", "attn.hook_pattern"] if kind in ("replace", "apply") else []
    return f"{tower}.blocks.{chance.randrange(layers)}.{chance.choice(names)}"


def _edit(
    chance: random.Random, module: Any, inputs: dict[str, Any], tower: str, kind: str, attention: str, mode: str
) -> tuple[str, edits.Edit, plain.Fn] | None:
    if kind == "delete_tokens":
        return deletion(chance, module, inputs, tower)
    if kind in PATTERN_KINDS:
        return attention_edit(chance, module, inputs, tower, kind)
    site = _site(chance, module, tower, kind, attention)
    try:
        value = values(module, inputs, site)
    except (KeyError, AssertionError, IndexError):
        return None
    pattern = site.endswith(("hook_attn_scores", "hook_pattern"))
    headed = value.ndim == 4
    pooled = value.ndim < 3
    axis = 2 if pattern else 1
    length = 1 if pooled else value.shape[axis]
    same_axis = not site.startswith(("projector.", "vision.pool.")) and not pooled
    real = _real(module, inputs, tower, torch.Size((value.shape[0], length)))
    if site == "vision.hook_embed":
        # Its first position is the first patch: the tower's prefix tokens come later.
        real = real if real.shape == value.shape[:2] else torch.ones(value.shape[:2], dtype=torch.bool)
        same_axis = False
    where, hit = _places(chance, real) if same_axis else (None, torch.ones_like(real))
    heads = None
    if kind == "heads" and (not headed or pattern or value.shape[2] < 2):
        return None
    if headed and kind != "permute":
        count = value.shape[1 if pattern else 2]
        heads = chance.choice([None, 0, [count - 1], sorted({0, count - 1})] if kind != "heads" else [0, [count - 1]])
    if kind == "permute":
        if pooled or pattern or headed or not same_axis or length < 3:
            return None
        first = chance.randrange(length - 2)
        where, hit = slice(first, first + 3), torch.zeros_like(hit)
        hit[:, first : first + 3] = True
    options: dict[str, Any] = {"positions": where}
    if heads is not None:
        options["heads"] = heads
    steps = None
    if mode == "generate" and tower == "language":
        steps = chance.choice([None, "prefill", "decode", [0, 2]])
    if mode == "act" and tower == "action":
        steps = chance.choice([None, [0], [1, 2]])
    if steps is not None:
        options["steps"] = steps
    made = arithmetic(chance, kind, site, value, real, options, module, inputs)
    if made is None:
        return None
    edit, fn = made
    return site, edit, _selected(fn, hit, heads, pattern, headed, pooled, steps, where, mode, tower)


def _selected(
    fn: Any,
    hit: Tensor,
    heads: Any,
    pattern: bool,
    headed: bool,
    pooled: bool,
    steps: Any,
    where: Any,
    mode: str,
    tower: str,
) -> plain.Fn:
    """The arithmetic at the selected entries of one pass, everything else as it was."""
    listed = None if heads is None else [heads] if isinstance(heads, int) else list(heads)
    growing = mode == "generate" and tower == "language"

    def by_hand(x: Tensor, step: int) -> Tensor:
        acts = {None: True, "prefill": step == 0, "decode": step > 0}.get(steps if not isinstance(steps, list) else "")
        if acts is None:
            acts = step in steps
        if not acts:
            return x
        chosen = hit
        if growing and step > 0:
            # One new position behind the prompt: only "everywhere" reaches it.
            chosen = torch.full((hit.shape[0], 1), where is None)
        if pooled:
            keep = torch.ones(x.shape[:1], dtype=torch.bool)[:, None]
        else:
            keep = chosen[:, None, :, None] if pattern else chosen[:, :, *[None] * (x.ndim - 2)]
        if listed is not None:
            one = torch.zeros(x.shape[1 if pattern else 2], dtype=torch.bool)
            one[listed] = True
            keep = keep & (one[None, :, None, None] if pattern else one[None, None, :, None])
        return torch.where(keep, fn(x, step), x)

    return by_hand


# -- both runs --------------------------------------------------------------------------------------------------------------------------------


def _output(module: Any, inputs: dict[str, Any], mode: str, model: Any = None, edit: Any = None) -> Tensor:
    """The output of one run, bare or under an edit: the first tensor of a forward, the logits of all steps, or the sampled actions."""
    if mode == "generate":
        options = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
        image = (
            module.config.image_token_id
            if hasattr(module.config, "image_token_id")
            else module.config.image_token_index
        )
        options["suppress_tokens"] = [int(image)]
        made = (
            module.generate(**inputs, **options) if model is None else model.generate(inputs, edits=[edit], **options)
        )
        # Later steps read the words that were chosen: only while both runs choose the same may they be compared.
        return torch.stack(made.logits, 1)
    if mode == "act":
        if model is not None:
            return model.sample_actions(inputs, edits=[edit])
        return module.sample_actions(**{k: v for k, v in inputs.items() if k != "timestep"})
    if model is not None and mode == "sweep":
        return _swept(model, inputs, edit)
    if model is not None:
        return model.run(inputs, [edit])
    found = module(**inputs)
    return next(found[key] for key in ("logits", "logits_per_image") if key in found)


def _swept(model: cv.HookedModel, inputs: dict[str, Any], edit: edits.Edit) -> Tensor:
    """The output of an edited run as a sweep hands it to its metric."""
    seen: list[Tensor] = []

    def metric(logits: Tensor) -> Tensor:
        seen.append(logits.clone())
        return logits.nan_to_num().flatten(1).sum(1)

    model.sweep(inputs, [edit], metric, progress=False)
    return seen[-1]


def compare(made: Draw) -> Outcome:
    """Run an edit in both forms and compare the outputs at all positions that are no padding."""
    with _prepared(made.name, made.attention, made.dtype) as module:
        inputs = _cast(inputs_of(made.name, made.side, made.seed), made.dtype)
        model = cv.HookedModel(module)
        try:
            ours = _output(module, inputs, made.mode, model, made.edit)
        except CircuitVisionError as error:
            return Outcome(made, refusal=f"{type(error).__name__}: {error}")
        also = getattr(_inner(made.by_hand), "also", None)
        with contextlib.ExitStack() as stack:
            if also is not None:
                stack.enter_context(plain.hooked(module, *also))
            stack.enter_context(plain.hooked(module, made.site, made.by_hand))
            theirs = _output(module, inputs, made.mode)
        clean = _output(module, inputs, made.mode)
    mask = inputs.get("attention_mask")
    if mask is not None and made.kind == "delete_tokens":
        # What the rows of deleted positions say means nothing.
        mask = mask.clone()
        mask[:, list(made.edit.positions.ints)] = 0
    return Outcome(made, *_gaps(ours, theirs, clean, mask, made.mode))


def _inner(fn: Any) -> Any:
    """The arithmetic inside a selection."""
    cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
    return cells["fn"].cell_contents if "fn" in cells else fn


def _gaps(ours: Tensor, theirs: Tensor, clean: Tensor, mask: Tensor | None, mode: str) -> tuple[float, float]:
    if mode in ("run", "sweep") and mask is not None and ours.shape[:2] == mask.shape:
        ours, theirs, clean = (x[mask.bool()] for x in (ours, theirs, clean))
    if mode == "generate":
        steps = _same_words(ours, theirs)
        ours, theirs, clean = (x[:, :steps] for x in (ours, theirs, clean))
    keep = torch.isfinite(theirs)
    if not torch.equal(keep, torch.isfinite(ours)):
        return math.inf, math.nan
    size = max(1.0, float(theirs[keep].abs().max())) if bool(keep.any()) else 1.0
    gap = float((ours - theirs)[keep].abs().max()) / size if bool(keep.any()) else 0.0
    both = keep & torch.isfinite(clean)
    return gap, float((theirs - clean)[both].abs().max()) / size if bool(both.any()) else 0.0


def _same_words(ours: Tensor, theirs: Tensor) -> int:
    """Steps up to the first at which the two chose other words."""
    for step in range(ours.shape[1]):
        if not torch.equal(ours[:, step].argmax(-1), theirs[:, step].argmax(-1)):
            return step + 1
    return ours.shape[1]


def tolerance(made: Draw) -> float:
    """Rounding of the arithmetic: RMS norms and eager softmax round to float32 in these models, whatever the dtype."""
    return 2e-4 if made.dtype == torch.float32 else 2e-6


__all__ = ["Draw", "Outcome", "compare", "draw", "tolerance"]

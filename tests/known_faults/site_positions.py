"""Every site, every way to say positions, and what each must change: worked out by hand from what the architectures are.

The reference writes into the raw module with plain torch hooks wherever the site is what a module takes or returns; sites that exist only inside a
norm, a projection or an attention call are written by a bare hook function there. Which entries are written never comes from the library: the
positions a site holds are listed here by family.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import circuitvision as cv
from circuitvision import edits
from circuitvision.errors import InputError
from tests.edits.common import inputs_of, torch_hooks, wrapped
from tests.parts import module_of
from tests.zoo import SHAPES, Case, primary

VALUE = 0.4
Mask = Tensor


@dataclass(frozen=True)
class Way:
    """One way to say positions: what an edit gets, and the positions of the tower it means, bool ``[row pos]``."""

    name: str
    positions: Any
    mask: Mask
    by_number: bool = False
    """Whether a position that is not at the site is an error rather than left out."""


def ways(tokens: Any, inputs: dict[str, Any], examples: int) -> Iterator[Way]:
    """Every way, for one tower of one run."""
    rows, count = tokens.kind.shape
    mid, late = count // 2, count - 1

    def at(*numbers: int) -> Mask:
        mask = torch.zeros(rows, count, dtype=torch.bool)
        mask[:, list(numbers)] = True
        return mask

    yield Way("all", None, torch.ones(rows, count, dtype=torch.bool))
    yield Way("int", mid, at(mid), True)
    yield Way("first", 0, at(0), True)
    yield Way("negative", -2, at(count - 2), True)
    yield Way("ints", [late, mid], at(mid, late), True)
    yield Way("slice", slice(1, None, 2), at(*range(1, count, 2)))
    yield Way("numpy", np.array([mid, late]), at(mid, late), True)
    yield Way("last", "last", last_of(tokens, inputs, rows, count), True)
    generator = torch.Generator().manual_seed(count)
    row = torch.rand(count, generator=generator) < 0.5
    yield Way("mask", row, row[None].expand(rows, -1))
    each = torch.rand((examples, count), generator=generator) < 0.5
    yield Way("mask of examples", each, each[torch.as_tensor(tokens.example)])
    yield Way("numpy mask", each.numpy(), each[torch.as_tensor(tokens.example)])
    kind = next(kind for kind in ("patch", "text", "action") if (tokens.kind == kind).any())
    yield Way("kind", tokens.select(kind), torch.from_numpy(tokens.kind == kind))
    everything = tokens.select()
    yield Way("select", everything, torch.from_numpy(tokens.kind != "padding"))
    if (tokens.image_number >= 0).any():
        found = (tokens.image_number == 0) & (tokens.kind == "patch") & (tokens.patch_row == 1)
        yield Way("image row", tokens.image(0).patch(row=1), torch.from_numpy(found))


def last_of(tokens: Any, inputs: dict[str, Any], rows: int, count: int) -> Mask:
    """The last position of every row that the masks given as inputs do not hide."""
    mask = torch.ones(rows, count, dtype=torch.bool)
    if tokens.tower in ("language", "text") and "attention_mask" in inputs:
        mask = inputs["attention_mask"].bool()
    elif tokens.tower == "vision" and "spatial_shapes" in inputs:
        mask = torch.arange(count)[None] < inputs["spatial_shapes"].prod(-1)[:, None]
    out = torch.zeros(rows, count, dtype=torch.bool)
    for row in range(rows):
        out[row, int(mask[row].nonzero().max())] = True
    return out


def held(case: Case, site: str, count: int) -> list[int] | None:
    """The positions of its tower that a site holds, in order; None where it has none."""
    name = site.rpartition(".")[2]
    tower = site.partition(".")[0]
    if tower == "projector":
        drops = "class_token" in case.tags and "full_features" not in case.tags
        return list(range(SHAPES[case.name]["vision"].n_prefix if drops else 0, count))
    if ".pool." in site:
        return list(range(count)) if name in ("hook_k", "hook_v") else None
    if name == "hook_embed" and tower.startswith("vision"):
        return list(range(SHAPES[case.name][tower].n_prefix, count))
    if name == "hook_readout":
        if tower == "language":
            return list(range(count))
        # The state comes first; the head reads the chunk of actions behind it.
        return list(range(1, count)) if tower == "action" else None
    if site.startswith(("vision.ln_final", "vision_2.ln_final")):
        reads_last = "language" not in case.towers or case.family in ("paligemma", "pi0")
        pools_first = case.family in ("clip", "clip_vision_model", "metaclip_2")
        return list(range(count)) if reads_last and not pools_first else None
    return list(range(count))


def place_of(model: cv.HookedModel, site: str) -> tuple[nn.Module, str, int] | None:
    """The module of a site that one module takes or returns as it is, when, and how many heads its last axis holds; None for other sites."""
    tower_name, _, rest = site.partition(".")
    base: Any = model.module
    if tower_name == "projector":
        projector = next(part for name, part in base.named_modules() if name.endswith("projector"))
        return projector, "pre" if rest == "hook_in" else "post", 0
    tower = model.towers[tower_name]
    if not rest.startswith("blocks."):
        return None
    layer, name = int(rest.split(".")[1]), rest.split(".", 2)[2]
    block = tower.blocks[layer]
    n_heads, n_kv = tower.cfg.n_heads, tower.cfg.n_kv_heads
    table = {
        "attn.hook_q": ("q", "post", n_heads),
        "attn.hook_k": ("k", "post", n_kv),
        "attn.hook_v": ("v", "post", n_kv),
        "attn.hook_z": ("o", "pre", n_heads),
        "mlp.hook_post": ("mlp_out", "pre", 0),
    }
    if name in table:
        part, phase, heads = table[name]
        return module_of(block, part), phase, heads
    if name == "hook_resid_post":
        return block.module, "post", 0
    if name == "hook_resid_pre":
        return block.module, "pre", 0
    return None


def write(value: Tensor, mask: Mask, axis: int) -> Tensor:
    """``VALUE`` at the masked entries of a site's own axis."""
    value = value.clone()
    if axis == 2:
        value.transpose(1, 2)[mask] = VALUE
    else:
        value[mask] = VALUE
    return value


def reference(model: cv.HookedModel, inputs: dict[str, Any], site: str, mask: Mask, **more: Any) -> Tensor:
    """The output when the masked entries of a site hold ``VALUE``; ``mask`` is ``[row, entry of the site]``."""
    place = place_of(model, site)
    if place is not None:
        module, phase, _ = place

        def fn(value: Tensor) -> Tensor:
            return write(value, mask, 1)

        keyword = "image_features" if site == "projector.hook_in" else "hidden_states"
        with hooked(module, phase, fn, keyword):
            return primary(model.module(**inputs, **more))
    axis = 2 if site.endswith(("hook_attn_scores", "hook_pattern")) else 1
    return model.run_with_hooks(inputs, [(site, lambda value, hook: write(value, mask, axis))], **more)


@contextlib.contextmanager
def hooked(module: nn.Module, phase: str, fn: Callable[[Tensor], Tensor], keyword: str) -> Iterator[None]:
    """A plain torch hook; before a module it finds its input under ``keyword`` where it is not positional."""
    if phase == "post":
        with torch_hooks((module, "post", fn)):
            yield
        return

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (fn(args[0]), *args[1:]), kwargs
        return args, {**kwargs, keyword: fn(kwargs[keyword])}

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@dataclass(frozen=True)
class Cell:
    """One cell of the product."""

    case: Case
    site: str
    padding: str | None
    way: Way

    def __str__(self) -> str:
        return f"{self.case}-{self.padding}-{self.site}-{self.way.name}"


def paddings(case: Case) -> list[str | None]:
    return [None, *(side for side in ("left", "right") if f"padding_{side}" in case.tags)]


def run_of(case: Case, padding: str | None) -> tuple[cv.HookedModel, dict[str, Any]]:
    """A wrapped model and inputs: two examples, with two images each where prompts take them."""
    model = wrapped(case.name, torch.float32)
    options: dict[str, Any] = {"padding": padding} if padding else {}
    if "two_images" in case.tags:
        options["images_per_prompt"] = 2
    return model, inputs_of(case.name, model, **options)


def sites_of(model: cv.HookedModel, seed: int) -> list[str]:
    """Every kind of site once, blocks in a layer drawn by the seed."""
    chosen: dict[tuple[str, str], list[str]] = {}
    for site in model.sites():
        tower, _, rest = site.partition(".")
        kind = rest.split(".", 2)[2] if rest.startswith("blocks.") else rest
        chosen.setdefault((tower, kind), []).append(site)
    return [names[(seed + number) % len(names)] for number, names in enumerate(chosen.values())]


def cells(case: Case, padding: str | None, seed: int = 0) -> Iterator[Cell]:
    model, inputs = run_of(case, padding)
    maps = model.tokens(inputs)
    for site in sites_of(model, seed):
        tower = site.partition(".")[0]
        tokens = maps["vision" if tower == "projector" else tower]
        # A dual encoder's texts are rows of their own.
        examples = int(np.max(tokens.example)) + 1
        for way in ways(tokens, inputs, examples):
            yield Cell(case, site, padding, way)


def fault_of(cell: Cell) -> str:
    """What is wrong with one cell; "" if nothing is."""
    model, inputs = run_of(cell.case, cell.padding)
    way, mask = cell.way, cell.way.mask
    kept = held(cell.case, cell.site, mask.shape[1])
    named = way.positions is not None
    missing = named and (
        kept is None or (way.by_number and bool(mask.any(0)[[p for p in range(mask.shape[1]) if p not in kept]].any()))
    )
    edit = edits.replace(cell.site, VALUE, positions=way.positions)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        calls: list[int] = []
        handle = model.module.register_forward_pre_hook(lambda module, args: calls.append(1))
        try:
            got = model.run(inputs, [edit])
        except InputError as error:
            late = "refused only in the run" if calls else ""
            return late if missing else f"refused: {error}"
        finally:
            handle.remove()
        if missing:
            return "accepted, though the site does not hold these positions"
        if not named and kept is None:
            return ""
        assert kept is not None
        wanted = reference(model, inputs, cell.site, mask[:, kept])
    gap = float((got - wanted).abs().nan_to_num(0).max())
    same_nan = torch.equal(got.isnan(), wanted.isnan())
    return (
        "" if same_nan and gap <= 1e-5 * max(1.0, float(wanted.abs().nan_to_num(0).max())) else f"differs by {gap:.3g}"
    )

"""What a check runs on: one model of the zoo in one precision, batch and grad mode; and how tests disturb a site.

Edits are random. A constant would vanish in a LayerNorm or in a softmax and let a dead hook pass for a live one, or the other way round.
"""

from __future__ import annotations

import copy
import itertools
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

import circuitvision as cv
from tests.conformance.cases import EVERY, case
from tests.zoo import Case, primary

HALF = (torch.bfloat16, torch.float16)
ROUNDINGS = 4
"""How many units in the last place two ways of computing the same may differ by in half precision: a handful of steps, half a unit each."""
EAGER = ("hook_rot_q", "hook_rot_k", "hook_attn_scores", "hook_pattern")


@cache
def bare_module(name: str, dtype: torch.dtype) -> nn.Module:
    """A module of the case that no wrapper has ever touched and no forward has run through; copy it, never run it."""
    return copy.deepcopy(shared_model_untouched(name)).to(dtype)


@cache
def shared_model_untouched(name: str) -> nn.Module:
    """A build of the case kept apart from the ones tests run."""
    return case(name).build()


@cache
def warm_model(name: str, dtype: torch.dtype) -> cv.HookedModel:
    """A wrapped model that has run one forward; shared, so every check must leave it as it was."""
    module = copy.deepcopy(bare_module(name, dtype))
    with torch.no_grad():
        module(**case(name).inputs(module, dtype=dtype))
    return cv.HookedModel(module)


@dataclass(frozen=True)
class Setting:
    """One cell of the product: model × precision × grad mode × first run or later run × batch."""

    case: Case
    dtype: torch.dtype = torch.float32
    grad: bool = False
    warm: bool = True
    batch: int = 3
    thorough: bool = False
    """Every layer and position, where the default suite takes one layer of each kind of site, and positions of every class."""

    def __str__(self) -> str:
        parts = [str(self.case), str(self.dtype).removeprefix("torch."), "grad" if self.grad else "nograd"]
        return "-".join([*parts, "warm" if self.warm else "cold", f"b{self.batch}"])

    def model(self) -> cv.HookedModel:
        """The wrapped model: the shared one that has run, or a fresh copy that never ran."""
        if self.warm:
            return warm_model(self.case.name, self.dtype)
        return cv.HookedModel(self.copy())

    def copy(self) -> nn.Module:
        """A bare module that never ran."""
        return copy.deepcopy(bare_module(self.case.name, self.dtype))

    def inputs(self, model: Any, **options: Any) -> dict[str, Any]:
        """Inputs by hand, in this setting's precision."""
        module = model.module if isinstance(model, cv.HookedModel) else model
        return self.case.inputs(module, **{"batch": self.batch, "dtype": self.dtype, **options})

    @property
    def every_site(self) -> bool:
        """Whether to edit every layer: always in the slow product, else for the first case of each family."""
        first = next(case for case in EVERY.values() if case.family == self.case.family)
        return self.thorough or first is self.case

    @contextmanager
    def mode(self) -> Iterator[None]:
        """This setting's grad mode."""
        with torch.set_grad_enabled(self.grad):
            yield


def product(case: Case) -> list[Setting]:
    """All sixteen settings of a case."""
    combinations = itertools.product((torch.float32, torch.float64), (False, True), (True, False), (1, 3))
    return [Setting(case, *combination, thorough=True) for combination in combinations]


def bare_output(module: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The primary output of a bare module."""
    return primary(module(**inputs))


@contextmanager
def eager(module: Any) -> Iterator[None]:
    """The module with transformers' eager attention in every part."""
    configs = {id(m.config): m.config for m in module.modules() if hasattr(m, "config")}.values()
    before = [(config, config._attn_implementation) for config in configs]
    for config in configs:
        config._attn_implementation_internal = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def stem(name: str) -> str:
    """The last part of a site name."""
    return name.rpartition(".")[2]


def needs_eager(name: str) -> bool:
    """Whether a site exists only inside eager attention."""
    return stem(name) in EAGER and ".pool." not in name


def position_axis(name: str) -> int:
    """The axis of positions: queries for scores and patterns."""
    return 2 if stem(name) in ("hook_attn_scores", "hook_pattern") else 1


def noise(value: Tensor, name: str, seed: int = 0) -> Tensor:
    """Random numbers as large as the site's values; positive fractions for a denominator."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name}/{seed}".encode()))
    draw = torch.randn(value.shape, generator=generator).to(value.dtype)
    if stem(name) == "hook_scale":
        return value.detach() * (0.3 + 0.5 * draw.abs())
    if stem(name) == "hook_attn_scores":
        return draw
    finite = value.detach()
    return draw * (0.1 + finite.abs().mean())


def disturb(seed: int = 0, where: Callable[[Tensor], Tensor] | None = None) -> Callable[..., Tensor]:
    """A hook that adds :func:`noise`, everywhere or where a mask of the value's shape says so."""

    def hook(value: Tensor, hook: Any) -> Tensor:
        edited = value + noise(value, hook.name, seed)
        return edited if where is None else torch.where(where(value), edited, value)

    return hook


def in_cells(cells: Tensor | None, name: str) -> Callable[[Tensor], Tensor] | None:
    """Where a value of a site is inside the real cells of its rows (of scores and patterns: queries and keys); None where there is nothing else."""
    if cells is None:
        return None

    def where(value: Tensor) -> Tensor:
        if position_axis(name) == 2:
            return (cells[:, None, :, None] & cells[:, None, None]).expand_as(value)
        return cells.view(*cells.shape, *[1] * (value.ndim - 2)).expand_as(value)

    return where


def nothing(value: Tensor, hook: Any) -> None:
    """A hook that only looks."""


def groups(model: cv.HookedModel) -> dict[str, list[str]]:
    """Sites by tower and kind: the same site of all blocks of a tower together."""
    found: dict[str, list[str]] = {}
    for name in model.sites():
        parts = name.split(".")
        key = ".".join([parts[0], "blocks", *parts[3:]]) if parts[1] == "blocks" else name
        found.setdefault(key, []).append(name)
    return found


def one_layer_each(model: cv.HookedModel) -> list[str]:
    """One site of every kind and tower, the layer changing from kind to kind, and every dead site."""
    dead = [name for name in model.sites() if model.is_dead(name)]
    alive = [[name for name in names if name not in dead] for names in groups(model).values()]
    return dead + [names[index % len(names)] for index, names in enumerate(alive) if names]


def vision_of(name: str, tokens: Any) -> str:
    """Which of the token maps has a site's rows: connectors have those of the vision tower, unless what leaves them has a map of its own."""
    tower = name.partition(".")[0]
    own = name == "projector.hook_out" and "projector" in tokens
    return "vision" if tower == "projector" and not own else tower


def real_rows(setting: Setting, inputs: dict[str, Any], output: Tensor) -> Tensor:
    """The output without padding positions, where it has positions."""
    mask = inputs.get("attention_mask")
    if mask is None:
        mask = inputs.get("pixel_attention_mask") if output.ndim == 3 else None
    if mask is None or output.ndim != 3 or mask.shape != output.shape[:2]:
        return output
    return output[mask.bool()]


def real_cells(setting: Setting, model: cv.HookedModel, inputs: dict[str, Any], site: str) -> Tensor | None:
    """Where images of different sizes share a batch, the cells of a site's rows in which something is computed: bool [row pos]; else None."""
    if not {"merged", "packed_patches"} <= setting.case.tags:
        return None
    tokens = model.tokens(inputs)
    return torch.from_numpy(tokens[vision_of(site, tokens)].kind != "padding")


def same(one: Tensor, other: Tensor, what: str) -> None:
    """Equal shape, dtype and bits."""
    assert one.shape == other.shape, f"{what}: shape {tuple(one.shape)} against {tuple(other.shape)}"
    assert one.dtype == other.dtype, f"{what}: {one.dtype} against {other.dtype}"
    # Eager attention of a decoder in float64 is not a number under left padding, in the bare model too.
    if not torch.equal(one.nan_to_num(123.0), other.nan_to_num(123.0)):
        raise AssertionError(f"{what}: differs by {float((one - other).detach().abs().max()):.3g}")


def close(one: Tensor, other: Tensor, what: str, tolerance: float = 2e-5) -> None:
    """Equal up to rounding, relative to the largest value: in half precision, up to a few roundings of numbers of that size."""
    assert one.shape == other.shape, f"{what}: shape {tuple(one.shape)} against {tuple(other.shape)}"
    tolerance = max(tolerance, *(ROUNDINGS * torch.finfo(x.dtype).eps for x in (one, other) if x.dtype in HALF), 0.0)
    one, other = one.detach(), other.detach()
    if tolerance > 1e-3:
        one, other = one.double(), other.double()
    assert torch.isfinite(one).all(), f"{what}: not finite"
    gap = float((one - other).abs().max())
    assert gap <= tolerance * max(1.0, float(other.abs().max())), f"{what}: differs by {gap:.3g}"

"""The arithmetic of every kind of edit, twice: as a value of the library, and as a plain function of a site's whole tensor and the pass."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

from circuitvision import edits
from tests.trial import plain


def _noise(chance: random.Random, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(chance.randrange(1 << 30)), dtype=torch.float64)


def values(module: Any, inputs: dict[str, Any], site: str) -> Tensor:
    """The value of a site in an unedited run."""
    seen: list[Tensor] = []

    def keep(x: Tensor, step: int) -> Tensor:
        seen.append(x.clone())
        return x

    with plain.hooked(module, site, keep):
        module(**inputs)
    return seen[0]


def arithmetic(
    chance: random.Random,
    kind: str,
    site: str,
    value: Tensor,
    real: Tensor,
    options: dict[str, Any],
    module: Any,
    inputs: dict[str, Any],
) -> tuple[edits.Edit, Any] | None:
    width, dtype = value.shape[-1], value.dtype
    pattern = site.endswith(("hook_attn_scores", "hook_pattern"))
    vector = _noise(chance, width).to(dtype)
    if kind == "apply":
        return edits.apply(site, _tilt, **options), lambda x, step: x * 1.1 - 0.05 * x.abs()
    if kind == "replace":
        other = (value + 0.3 * _noise(chance, *value.shape).to(dtype)).contiguous()
        if pattern and site.endswith("scores"):
            other = torch.where(value < torch.finfo(dtype).min / 2, value, other)

        def put(x: Tensor, step: int) -> Tensor:
            return other if step == 0 or x.shape == other.shape else x

        return edits.replace(site, other, **options), put
    if pattern:
        return None
    if kind == "zero":
        if site.endswith("hook_scale"):
            return None
        return edits.ablate(site, **options), lambda x, step: torch.zeros_like(x)
    if kind == "given":
        return edits.ablate(site, vector, **options), lambda x, step: vector.expand_as(x)
    if kind in ("mean", "all"):
        return _mean(kind, site, value, real, options)
    if kind == "add":
        return edits.steer(site, vector, 0.7, **options), lambda x, step: x + 0.7 * vector
    unit = vector / vector.norm()
    if kind == "norm_preserving":

        def turn(x: Tensor, step: int) -> Tensor:
            # A query that sees no key (padding under a sliding window) gives zeros, whose length is kept as well.
            to = x / x.norm(dim=-1, keepdim=True).clamp(min=1e-300 if x.dtype == torch.float64 else 1e-30) + 0.7 * unit
            return to / to.norm(dim=-1, keepdim=True) * x.norm(dim=-1, keepdim=True)

        return edits.steer(site, vector, 0.7, mode=kind, **options), turn
    if kind == "project_out":
        return edits.steer(
            site, vector, 0.7, mode=kind, **options
        ), lambda x, step: x - 0.7 * (x @ unit)[..., None] * unit
    if kind == "scale":
        return edits.scale(site, 1.3, **options), lambda x, step: x * 1.3
    if kind == "overwrite":

        def put_numbers(x: Tensor, step: int) -> Tensor:
            x = x.clone()
            x[..., [0, width - 1]] = 0.9
            return x

        return edits.overwrite(site, sorted({0, width - 1}), 0.9, **options), put_numbers
    if kind == "renormalise":
        return edits.renormalise(site, 2.1, **options), lambda x, step: 2.1 * x / x.norm(dim=-1, keepdim=True)
    if kind == "project":
        columns = min(2, width)
        basis = _noise(chance, width, columns)
        q, _ = torch.linalg.qr(basis)
        goal = _noise(chance, width).to(dtype)
        return (
            edits.project(site, basis, goal, **options),
            lambda x, step: x + (goal - x) @ q.to(dtype) @ q.to(dtype).T,
        )
    if kind == "permute":
        order = chance.sample(range(3), 3)
        where = options["positions"]

        def move(x: Tensor, step: int) -> Tensor:
            if x.shape[1] < where.stop:
                return x
            x = x.clone()
            x[:, where] = x[:, [where.start + place for place in order]]
            return x

        options.pop("heads", None)
        return edits.permute(site, order, **options), move
    if kind == "freeze":
        return _freeze(site, module, options)
    if kind == "heads":
        lost = [options["heads"]] if isinstance(options["heads"], int) else options["heads"]
        kept = [head for head in range(value.shape[2]) if head not in lost]
        return edits.ablate(site, "heads", **options), lambda x, step: x[:, :, kept].mean(2, keepdim=True).expand_as(x)
    if kind == "dictionary":
        return _feature(chance, site, width, dtype, options)
    return None


class Autoencoder:
    """A sparse autoencoder with random weights."""

    name = "random"

    def __init__(self, into: Tensor, out: Tensor) -> None:
        self.into, self.out = into, out

    def encode(self, x: Tensor) -> Tensor:
        """``relu(x W)``."""
        return (x @ self.into).relu()

    def decode(self, features: Tensor) -> Tensor:
        """``f W'``."""
        return features @ self.out


def _feature(chance: random.Random, site: str, width: int, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    into, out = _noise(chance, width, 9).to(dtype), _noise(chance, 9, width).to(dtype)

    def splice(x: Tensor, step: int) -> Tensor:
        features = (x @ into).relu()
        # Setting one feature moves the value along that feature's row alone.
        return x + (1.7 - features[..., 4:5]) * out[4]

    return edits.overwrite(site, [4], 1.7, dictionary=Autoencoder(into, out), **options), splice


def deletion(chance: random.Random, module: Any, inputs: dict[str, Any], tower: str) -> Any:
    """Deleted from a layer on: no query finds the keys, at any later layer. Only one layer is drawn here, the last."""
    layers = len(plain.blocks(module, tower))
    site = f"{tower}.blocks.{layers - 1}.attn.hook_attn_scores"
    value = values(module, inputs, site)
    if value.shape[-1] != value.shape[-2] or tower == "vision":
        return None
    length = value.shape[-1]
    # Neither first words nor what the text tower pools (its end may stand anywhere behind the shortest text).
    gone = [1, 2] if tower == "text" else sorted(chance.sample(range(1, length - 1), 2))
    hit = torch.zeros(length, length, dtype=torch.bool)
    hit[:, gone] = True
    hit[gone] = False
    floor = torch.finfo(value.dtype).min

    def hide(x: Tensor, step: int) -> Tensor:
        chosen = hit
        if x.shape[-1] != length or x.shape[-2] != length:
            dropped = length + step - x.shape[-1]
            chosen = torch.zeros(x.shape[-2:], dtype=torch.bool)
            chosen[:, [key - dropped for key in gone if key >= dropped]] = True
        return torch.where(chosen, torch.full_like(x, floor), x)

    return site, edits.delete_tokens(tower, gone, start=layers - 1), hide


def _freeze(site: str, module: Any, options: dict[str, Any]) -> tuple[edits.Edit, Any] | None:
    tower = site.split(".")[0]
    seen: dict[int, Tensor] = {}

    def keep(x: Tensor, step: int) -> Tensor:
        seen[step] = x.clone()
        return x

    def hold(x: Tensor, step: int) -> Tensor:
        return seen[step]

    hold.also = (f"{tower}.hook_input", keep)  # type: ignore[attr-defined]
    return edits.freeze(site, f"{tower}.hook_input", **options), hold


def _mean(kind: str, site: str, value: Tensor, real: Tensor, options: dict[str, Any]) -> tuple[edits.Edit, Any] | None:
    """Means over what is there: rows and positions that are no padding."""
    if value.ndim < 3 or (not bool(real.all()) and kind == "mean"):
        return None
    if site.endswith("hook_scale"):
        return None
    if kind == "mean":
        mean = value.double().mean(0).to(value)

        def put(x: Tensor, step: int) -> Tensor:
            return mean.expand_as(x) if x.shape[1:] == mean.shape else x

        return edits.ablate(site, "mean", **options), put
    flat = value[real].double().mean(0).to(value)
    return edits.ablate(site, "mean", average="all", **options), lambda x, step: flat.expand_as(x)


def _tilt(x: Tensor, hook: Any) -> Tensor:
    return x * 1.1 - 0.05 * x.abs()


def attention_edit(
    chance: random.Random, module: Any, inputs: dict[str, Any], tower: str, kind: str
) -> tuple[str, edits.Edit, plain.Fn] | None:
    """Queries that look at keys of their own tower; keys that the mask hides stay hidden."""
    layer = chance.randrange(len(plain.blocks(module, tower)))
    renormalise = chance.random() < 0.5
    stage = "hook_attn_scores" if renormalise else "hook_pattern"
    site = f"{tower}.blocks.{layer}.attn.{stage}"
    value = values(module, inputs, site)
    count, length, seen = value.shape[1:]
    if seen != length:
        return None
    keys = sorted(chance.sample(range(length), max(1, length // 3)))
    queries = chance.choice([None, sorted(chance.sample(range(length), max(1, length // 2)))])
    head = chance.choice([None, count - 1])
    amount = chance.choice([-0.8, 0.5])
    hit = torch.zeros(count, length, length, dtype=torch.bool)
    rows = slice(None) if queries is None else queries
    block = torch.zeros(length, length, dtype=torch.bool)
    block[rows] = torch.zeros(length, dtype=torch.bool).index_fill(0, torch.tensor(keys), True)
    hit[slice(None) if head is None else head] = block
    floor = torch.finfo(value.dtype).min

    def by_hand(x: Tensor, step: int) -> Tensor:
        if x.shape[-2:] != hit.shape[-2:]:
            # A decoding step: one query behind the prompt, which only "every query" reaches; its keys are the prompt's and later ones.
            if queries is not None:
                return x
            # A sliding layer keeps the last keys only.
            dropped = length + step - x.shape[-1]
            kept = [key - dropped for key in keys if key >= dropped]
            one = torch.zeros(x.shape[-1], dtype=torch.bool)
            one[kept] = True
            wide = torch.zeros(count, x.shape[-2], x.shape[-1], dtype=torch.bool)
            wide[slice(None) if head is None else head] = one
            return _changed(x, wide)
        return _changed(x, hit)

    def _changed(x: Tensor, chosen: Tensor) -> Tensor:
        if renormalise:
            hidden = x <= floor / 2
            new = {"block_attention": torch.full_like(x, floor), "scale_attention": x * amount}.get(kind, x + amount)
            return torch.where(chosen & ~hidden, new, x)
        new = {"block_attention": x * 0, "scale_attention": x * amount}.get(kind, x * math.exp(amount))
        return torch.where(chosen, new, x)

    options: dict[str, Any] = {"layers": layer, "renormalise": renormalise}
    if head is not None:
        options["heads"] = head
    where: tuple[Any, ...] = (tower, queries, keys)
    if kind == "block_attention":
        return site, edits.block_attention(*where, **options), by_hand
    return site, getattr(edits, kind)(*where, amount, **options), by_hand

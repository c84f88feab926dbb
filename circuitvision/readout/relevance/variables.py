"""What a relevance is a relevance *of*: the values at one site of a run, or its pixels, as the variable the metric depends on.

A :class:`AttributionInput` runs the model with other values in that place and returns the metric, and its gradient with respect to them. Everything
else of the run stays as it is. Several points run as one batch: all tensors of the inputs are repeated, and the output is cut into one block
per point (of rows and columns, where the output compares rows with columns). Gradients never reach parameters, and the caller's tensors are
copied.

What values become where they are taken out is in ``baselines.py``.

Not covered: pixels that a processor has cut into flattened patches (SigLIP 2 with free image sizes).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from circuitvision import metrics
from circuitvision.errors import InputError
from circuitvision.links import marked
from circuitvision.model.averages import Layout
from circuitvision.model.axes import map_of, tower_of
from circuitvision.model.inputs import as_mapping
from circuitvision.model.packing import ImageRun
from circuitvision.model.positions import Positions
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random
from circuitvision.model.weights import check_gradients

if TYPE_CHECKING:
    from circuitvision.hooked import HookedModel
    from circuitvision.model.tokens import TokenMap

PIXELS = "pixels"
"""The name that stands for ``pixel_values`` where a site is asked for."""
POSITIONS_AT_ONCE = 1024
"""How many positions an automatic batch of points computes; a batch with gradients keeps all of its activations."""


@contextlib.contextmanager
def differentiating(wanted: bool = True) -> Iterator[None]:
    """Gradients on (or off), also where the caller has switched them off or works in inference mode."""
    with torch.inference_mode(False), torch.set_grad_enabled(wanted):
        yield


def usable(model: HookedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with tensors that a gradient may pass: those made in inference mode are copied. Raises InputError for a cache."""
    inputs = as_mapping(model, inputs)
    with torch.inference_mode(False):
        return {
            name: value.clone() if isinstance(value, Tensor) and value.is_inference() else value
            for name, value in inputs.items()
        }


def image_tower(model: HookedModel) -> str:
    """The first tower that reads images.

    Raises:
        InputError: there is none.
    """
    found = [name for name, tower in model.towers.items() if tower.stack.image]
    if not found:
        raise InputError(f"No tower of this model reads images; its towers are {', '.join(model.towers)}.")
    return found[0]


def checked_tower(model: HookedModel, tower: str | None) -> str:
    """``tower``, or the first that reads images; InputError where the model has no such tower."""
    if tower is not None and tower not in model.towers:
        raise InputError(f"This model has no tower {tower!r}; its towers are {', '.join(model.towers)}.")
    return image_tower(model) if tower is None else tower


@dataclass(frozen=True, eq=False)
class Place:
    """Which positions of which tower the entries of a site are: all but the first ``dropped``."""

    tokens: TokenMap
    dropped: int

    @property
    def kind(self) -> np.ndarray[Any, Any]:
        """Kind of every position, ``[row pos]``."""
        return self.tokens.kind[:, self.dropped :]

    def resolve(self, positions: Positions) -> Bool[Tensor, "row pos"]:
        """Which of the site's positions are meant; a mask may be as wide as the site. InputError for those of another tower or run."""
        mask = None if positions.mask is None or positions.tower else positions.mask.tensor.cpu()
        if mask is not None and tuple(mask.shape) == self.kind.shape:
            return mask.clone()
        return positions.resolve(self.tokens)[:, self.dropped :]

    @property
    def layout(self) -> Layout:
        """What the entries of the site are, for averages."""
        return Layout.of_tokens(self.tokens, range(self.dropped, self.tokens.n_positions))

    @property
    def labels(self) -> list[list[str]]:
        """A short label of every position of every row."""
        return [self.tokens.labels(row)[self.dropped :] for row in range(self.tokens.n_rows)]


def place_of(model: HookedModel, inputs: Mapping[str, Any], site: str, shape: Sequence[int]) -> Place:
    """Where the positions of a site with values of this shape lie; for pixels, the positions of the tower that reads them.

    Raises:
        InputError: the site has no position axis.
    """
    if site == PIXELS:
        return Place(model.tokens(inputs)[image_tower(model)], 0)
    name = SiteName.parse(site)
    tower = map_of(model, name)
    tokens = model.tokens(inputs)[tower]
    prefix = model.towers[tower_of(model, name)].cfg.n_prefix
    dropped = tokens.n_positions - shape[1] if len(shape) > 2 else -1
    pooled = name.is_pattern or name.site.startswith("pool.") or shape[0] != tokens.n_rows
    if pooled or dropped not in (0, prefix):
        raise InputError(
            f"{site} has the shape {tuple(shape)}, which is no value per position of the {tower} tower. "
            f"Take a site of the stream, such as {tower}.hook_input."
        )
    return Place(tokens, dropped)


class AttributionInput:
    """The values at one place of a run, and the metric as a function of them.

    ``value`` holds them as they are in the unedited run, ``place`` says where their positions lie, and ``metric_value`` is the metric there,
    ``[example]``.

    Raises:
        InputError: dropout in training mode, a dead site, one without positions, pixels the model does not read as images.
    """

    def __init__(self, model: HookedModel, inputs: Mapping[str, Any], metric: Any, site: str) -> None:
        refuse_random(model.module, "Relevance")
        self.model, self.site = model, site
        self.inputs = usable(model, inputs)
        self.metric = metrics.bind(metric, model)
        if site == PIXELS:
            self.value = pixels_of(self.inputs)
            names = []
        else:
            (found,) = model.sites(site) if len(model.sites(site)) == 1 else (None,)
            if found is None:
                raise InputError(f"site={site!r} names {len(model.sites(site))} sites; relevance is of one.")
            if model.is_dead(found, self.inputs):
                raise InputError(f"{found} cannot reach the output of this model, so nothing there is relevant.")
            self.site, names = found, [found]
        with differentiating(False):
            logits, cache = model.run_with_cache(self.inputs, names_filter=names) if names else (model(self.inputs), {})
            self.metric_value = metrics.evaluate(self.metric, logits, self.inputs).detach().clone()
        self.output_shape = tuple(logits.shape)
        if names:
            self.value = cache[self.site].detach()
        self.place = place_of(model, self.inputs, self.site, self.value.shape)
        self._copies: dict[int, dict[str, Any]] = {1: self.inputs}

    def __call__(
        self, points: Sequence[Tensor], gradients: bool = True
    ) -> tuple[Float[Tensor, "point example"], Float[Tensor, "point ..."]]:
        """The metric at each point, and its gradient summed over examples there (zeros where none is asked for).

        Raises:
            InputError: a metric that cannot be differentiated; inputs whose tensors cannot be repeated row by row.
        """
        if gradients:
            check_gradients(self.model.module)
        with differentiating(gradients):
            inputs = self._repeated(len(points))
            leaf = torch.cat([point.detach().to(self.value) for point in points]).requires_grad_(gradients)
            if self.site == PIXELS:
                logits = self.model.run_with_hooks({**inputs, "pixel_values": leaf})
            else:
                logits = self.model.run_with_hooks(inputs, fwd_hooks=[(self.site, lambda value, hook: leaf)])
            found = torch.stack([self._metric(block) for block in self._blocks(logits, len(points))])
            slope = torch.zeros_like(leaf)
            if gradients:
                slope = gradient_of(found.sum(), [leaf])[0]
        return found.detach(), slope.view(len(points), *self.value.shape)

    def _metric(self, logits: Tensor) -> Tensor:
        return metrics.evaluate(self.metric, marked(logits, self.model.link), self.inputs)

    def at_once(self) -> int:
        """How many points a batch takes when it goes by how many positions it computes."""
        maps = self.model.tokens(self.inputs).values()
        return max(1, POSITIONS_AT_ONCE // max(tokens.n_rows * tokens.n_positions for tokens in maps))

    def _repeated(self, copies: int) -> dict[str, Any]:
        if copies not in self._copies:
            packing = self.model.family.packing
            self._copies = {1: self.inputs, copies: packing.repeat(self.model, self.inputs, copies)}
        return self._copies[copies]

    def _blocks(self, logits: Tensor, copies: int) -> Iterator[Tensor]:
        rows, columns = self.output_shape[:2]
        if logits.shape[0] != rows * copies:
            raise InputError(
                f"{copies} repeated runs gave {logits.shape[0]} rows of output where one gives {rows}: these inputs cannot be "
                "repeated row by row. Run one point at a time (steps_at_once=1)."
            )
        crossed = logits.ndim == 2 and logits.shape[1] == columns * copies
        for copy in range(copies):
            block = logits[copy * rows : (copy + 1) * rows]
            yield block[:, copy * columns : (copy + 1) * columns] if crossed else block


def gradient_of(value: Tensor, leaves: Sequence[Tensor]) -> list[Tensor]:
    """The gradient of a number, zeros where it does not depend on a leaf.

    Raises:
        InputError: the number was not computed by differentiable operations.
    """
    if not value.requires_grad:
        raise InputError(
            "The metric has no gradient: it must be computed from the output by differentiable operations."
        )
    found = torch.autograd.grad(value, list(leaves), allow_unused=True, retain_graph=True)
    return [torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, found, strict=True)]


def pixels_of(inputs: Mapping[str, Any]) -> Tensor:
    """The pictures of a run; InputError where it has none, or has cut them up."""
    pixels = inputs.get("pixel_values")
    if not isinstance(pixels, Tensor) or pixels.ndim not in (4, 5):
        shape = tuple(pixels.shape) if isinstance(pixels, Tensor) else None
        raise InputError(
            f"Relevance of pixels needs pixel_values [image, channel, height, width], not {shape}; "
            "ask for a site such as vision.hook_input instead."
        )
    return pixels.detach()


def rows_of_pixels(model: HookedModel, inputs: Mapping[str, Any]) -> list[int]:
    """Where each row of the image tower lies among the pictures of ``pixel_values``, tiles counted through.

    Tiles that only fill up a batch are no rows.
    """
    return ImageRun(model, inputs).pixel_rows


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least, on the CPU, without history: what results hold."""
    return tensor.detach().to(wide_type(tensor)).cpu()


def wide_type(tensor: Tensor) -> torch.dtype:
    """The type that statistics of a tensor are computed in: float32 at least."""
    return torch.promote_types(tensor.dtype, torch.float32)

"""The geometry of activations over examples: principal components, and how alike two layers are.

Principal components: of centred activations, by a singular value decomposition in float64. The sign of a component is arbitrary, so it is fixed:
*the loading with the largest absolute value is positive* (of equal ones, the first). Components beyond the rank of the data have no direction
(NaN), explain nothing and score 0; data without any spread, up to the rounding of their dtype, have no shares either (NaN).

Linear CKA: ``||Yᵀ X||² / (||Xᵀ X|| ||Yᵀ Y||)`` of centred activations (Frobenius norms) of the same examples: 1 for equal up to rotation,
shift and scale, near 0 for unrelated ones. With few examples and many features it is biased upwards; ``unbiased=True`` uses the estimator of
Song et al. 2012, which is 0 on average for unrelated activations (and may be negative).

Not covered: nonlinear embeddings, kernels other than the linear one.

Reference: Kornblith et al. 2019 (arXiv 1905.00414); Nguyen et al. 2021 (arXiv 2010.15327) on the estimator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.provenance import with_provenance
from circuitvision.readout.probes.collected import Collected
from circuitvision.readout.probes.linear import layer_labels
from circuitvision.readout.probes.splitting import Targets, is_whole
from circuitvision.results import Result

_NEAR_TIE = 1e-6
"""Loadings closer than this share of the largest count as equal, so that rounding does not choose the sign."""


@dataclass(frozen=True, eq=False)
class PCAResult(Result):
    """Principal components: ``values`` are the scores ``[component example]``, or ``[layer component example]`` of a stream.

    ``components`` ``[component feature]`` are unit vectors, ``explained`` ``[component]`` their shares of the variance, ``center`` ``[feature]``
    what is subtracted; of a stream each has a leading layer axis. ``labels`` are kept for colouring; ``between`` is then the share of the
    scores' variance that lies between the means of the labels (the squared correlation for numbers), over all components kept: 1 where labels
    are apart, 0 where they mix.
    """

    components: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    explained: Tensor = field(default_factory=lambda: torch.zeros(0))
    center: Tensor = field(default_factory=lambda: torch.zeros(0))
    between: Tensor = field(default_factory=lambda: torch.zeros(0))
    labels: list[Any] = field(default_factory=list)
    label_name: str = "label"

    _per_example: ClassVar[dict[str, int]] = {"labels": 0}

    @property
    def held(self) -> Tensor:
        """The share of the variance that all components kept hold together, of a stream ``[layer]``."""
        return self.explained.sum(-1)

    def transform(self, x: Float[Tensor, "example feature"], layer: Any = None) -> Float[Tensor, "example component"]:
        """Scores of other activations: ``(x − center) @ components.T``; ``layer`` names the layer of a stream.

        Raises:
            InputError: a layer that is not there, or none named where there are several; another number of features.
        """
        components, center = self.components, self.center
        if "layer" in self.axes:
            if layer is None:
                raise InputError(f"Name the layer: one of {self.axes['layer']}.")
            number = self.index_of("layer", layer)
            components, center = components[number], center[number]
        if x.shape[-1] != len(center):
            raise InputError(f"These components have {len(center)} features, the activations {x.shape[-1]}.")
        return (x.double() - center) @ components.T


@with_provenance
def pca(
    x: Float[Tensor, "example feature"] | np.ndarray | Mapping[str, Float[Tensor, "example feature"]],
    n_components: int = 2,
    *,
    labels: Sequence[Any] | Tensor | np.ndarray | None = None,
    label_name: str = "label",
) -> PCAResult:
    """The first principal components of activations, in order of the variance they explain; see the module for the sign.

    Args:
        x: activations ``[example feature]``; or those of several sites by name, all of one width, such as :func:`circuitvision.readout.collect`
            gives of ``model.vision.stream_sites()``: components of every site, with a leading axis ``layer``.
        n_components: components kept.
        labels: one per example, kept for colouring.
        label_name: what the labels are, for titles.

    Raises:
        InputError: not ``[example feature]``, not finite, fewer examples or features than components, labels that do not fit, sites of different
        widths.
    """
    several = isinstance(x, Mapping)
    named = x if isinstance(x, Mapping) else {"The activations": x}
    checked = [_checked(value, name, n_components) for name, value in named.items()]
    shapes = {tuple(value.shape) for value in checked}
    if len(shapes) != 1:
        raise InputError(f"Layers side by side need one shape, found {sorted(shapes)}; take sites of one width.")
    targets = _targets(labels, len(checked[0]))
    prefixes = [f"At {name} the" if several else "The" for name in named]
    found = [_components(value, n_components, the) for value, the in zip(checked, prefixes, strict=True)]
    stacked = [torch.stack(parts) for parts in zip(*found, strict=True)]
    stacked.append(torch.stack([_between(part, targets) for part in stacked[0]]))
    scores, components, explained, mean, between = stacked if several else [part[0] for part in stacked]
    axes = {"component": list(range(1, n_components + 1)), "example": list(range(len(checked[0])))}
    known = x.provenance if isinstance(x, Collected) else {}
    return PCAResult(
        values=scores.transpose(-1, -2),
        axes={"layer": layer_labels(list(named)), **axes} if several else axes,
        provenance={**known, "method": f"pca(n_components={n_components})"},
        components=components,
        explained=explained,
        center=mean,
        between=between,
        labels=_plain(labels),
        label_name=label_name,
    )


def _checked(x: Any, name: str, n_components: int = 1) -> Float[Tensor, "example feature"]:
    """The activations as a tensor; InputError where they are not finite, or too few for so many components."""
    if not isinstance(x, (Tensor, np.ndarray)):
        raise InputError(f"{name} must be a tensor [example feature], not {type(x).__name__}.")
    x = torch.as_tensor(x)
    if x.ndim != 2 or not bool(torch.isfinite(x).all()):
        raise InputError(f"{name} must be finite numbers [example feature], not {tuple(x.shape)}.")
    if not is_whole(n_components) or not 1 <= n_components <= min(x.shape):
        raise InputError(
            f"{n_components} components need at least as many examples and features; {name}: {tuple(x.shape)}."
        )
    return x


def _targets(labels: Any, count: int | None) -> Targets | None:
    if labels is None:
        return None
    targets = Targets.of(labels)
    if count is not None and len(targets.values) != count:
        raise InputError(f"There are {len(targets.values)} labels for {count} examples; give one per example.")
    return targets


def _plain(labels: Any) -> list[Any]:
    return [] if labels is None else labels.tolist() if isinstance(labels, (Tensor, np.ndarray)) else list(labels)


def _components(x: Tensor, count: int, the: str = "The") -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Scores, components, shares of variance and mean, in float64."""
    exact = x.detach().cpu().double()
    mean = exact.mean(0)
    left, sizes, right = torch.linalg.svd(exact - mean, full_matrices=False)
    precision = torch.finfo(x.dtype).eps if x.is_floating_point() else torch.finfo(torch.float64).eps
    real = sizes > 4 * precision * exact.norm()
    variances = torch.where(real, sizes, 0.0).square()
    explained = (variances / variances.sum())[:count]
    if not bool(real[:count].all()):
        found = int(real.sum())
        warn(
            f"{the} activations spread in {found} directions, so {count - found} components have none"
            + (": all examples are alike there." if not found else ".")
        )
    components = right[:count] * _signs(right[:count])[:, None]
    scores = (left * torch.where(real, sizes, 0.0))[:, :count] * _signs(right[:count])
    components = torch.where(real[:count, None], components, torch.nan)
    return scores, components, explained, mean


def _signs(components: Float[Tensor, "component feature"]) -> Float[Tensor, " component"]:
    """+1 or −1 for each component: what makes its largest loading positive."""
    size = components.abs()
    first = (size >= size.max(1, keepdim=True).values * (1 - _NEAR_TIE)).int().argmax(1)
    return torch.where(components.gather(1, first[:, None])[:, 0] < 0, -1.0, 1.0).to(components)


def _between(scores: Float[Tensor, "example component"], targets: Targets | None) -> Float[Tensor, ""]:
    """Share of the scores' variance that the labels account for; NaN without labels or spread."""
    centred = scores - scores.mean(0)
    spread = centred.square().sum()
    if targets is None or not float(spread) > 0:
        return torch.tensor(torch.nan, dtype=torch.float64)
    if not targets.classes:
        wanted = targets.values - targets.values.mean()
        return (wanted @ centred).square().sum() / (wanted.square().sum() * spread)
    members = torch.nn.functional.one_hot(targets.values, len(targets.classes)).to(centred)
    means = members.T @ centred / members.sum(0)[:, None]
    return (members.sum(0)[:, None] * means.square()).sum() / spread


# -- similarity ----------------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class CKAResult(Result):
    """Linear CKA of every site of one collection with every site of another, or of the same one (``same``): ``values`` ``[site other]``."""

    unbiased: bool = False
    same: bool = False


@with_provenance
def cka(first: Any, second: Any = None, *, unbiased: bool = False) -> CKAResult | float:
    """How alike activations of the same examples are, whatever their widths; see the module. NaN without spread.

    Args:
        first: activations ``[example feature]``, or those of several sites by name.
        second: what they are compared with, the same way; of several sites by default those themselves.
        unbiased: the unbiased estimator, which needs four examples.

    Returns:
        A number for two tensors; for sites a :class:`CKAResult` of every site of ``first`` with every site of ``second``.

    Raises:
        InputError: not ``[example feature]``, not the same examples, not finite, too few for the unbiased estimator.
    """
    if not isinstance(first, Mapping):
        x, y = _checked(first, "The first activations"), _checked(second, "The second activations")
        if len(x) != len(y) or (unbiased and len(x) < 4):
            raise InputError(f"CKA compares the same examples (at least 4 if unbiased); found {len(x)} and {len(y)}.")
        value = _alignment(_Kernel(x, unbiased), _Kernel(y, unbiased))
        if np.isnan(value):
            warn("One of the two sets of activations does not vary, so CKA is undefined.")
        return value
    others: Mapping[str, Tensor] = first if second is None else second
    counts = {len(value) for vectors in (first, others) for value in vectors.values()}
    if len(counts) != 1 or (unbiased and min(counts) < 4):
        least = " (at least 4 if unbiased)" if unbiased else ""
        raise InputError(f"CKA compares the same examples{least}; the sites have {sorted(counts)} of them.")
    rows, columns = (
        [_Kernel(_checked(value, name), unbiased) for name, value in vectors.items()] for vectors in (first, others)
    )
    values = torch.tensor([[_alignment(one, two) for two in columns] for one in rows], dtype=torch.float64)
    if bool(values.isnan().any()):
        warn("Some activations do not vary, so their CKA is NaN.")
    known = first.provenance if isinstance(first, Collected) else {}
    return CKAResult(
        values=values,
        axes={"site": list(first), "other": list(others)},
        provenance={**known, "method": f"cka(unbiased={unbiased})"},
        unbiased=unbiased,
        same=second is None,
    )


class _Kernel:
    """Centred activations and what CKA needs of them: inner products of examples, or of features where those are fewer."""

    def __init__(self, x: Tensor, unbiased: bool) -> None:
        exact = x.detach().cpu().double()
        precision = torch.finfo(x.dtype).eps if x.is_floating_point() else torch.finfo(torch.float64).eps
        self.x = exact - exact.mean(0)
        self.constant = float(self.x.norm()) <= 4 * precision * float(exact.norm())
        self.gram = _hollow(self.x @ self.x.T) if unbiased else None
        self.size = self.product(self) ** 0.5 if self.product(self) > 0 else float("nan")

    def product(self, other: _Kernel) -> float:
        """``||Yᵀ X||²``, or the unbiased estimate of it."""
        if self.gram is not None and other.gram is not None:
            return float((self.gram * other.gram).sum())
        wide = self.x.shape[1] * other.x.shape[1] > len(self.x) ** 2
        if wide:
            return float(((self.x @ self.x.T) * (other.x @ other.x.T)).sum())
        return float((other.x.T @ self.x).square().sum())


def _hollow(gram: Float[Tensor, "example example"]) -> Float[Tensor, "example example"]:
    """U-centring (Székely and Rizzo 2014): the inner product of two such matrices is proportional to Song et al.'s estimator."""
    count = len(gram)
    gram = gram.clone().fill_diagonal_(0)
    rows = gram.sum(1) / (count - 2)
    centred = gram - rows[:, None] - rows[None] + gram.sum() / ((count - 1) * (count - 2))
    return centred.fill_diagonal_(0)


def _alignment(one: _Kernel, two: _Kernel) -> float:
    if one.constant or two.constant:
        return float("nan")
    return one.product(two) / (one.size * two.size)

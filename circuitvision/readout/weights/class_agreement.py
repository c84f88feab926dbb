"""Class-value agreement: is there, for every class, a value vector that points its way?

For every class the largest cosine between its direction in the unembedding and a value vector of the layer. The largest of hundreds of cosines
is well above zero by chance, more so in narrow streams, so the same number is taken for as many isotropic Gaussian rows (a cosine does not see
their lengths), and :meth:`Agreement.against` compares with another model, say one of random weights.

Both comparisons are one-sided Wilcoxon signed-rank tests over classes. Classes share value vectors and are not independent: read p as a guide,
and with ``n`` classes it cannot fall below ``2**-n``.

Reference: Vilas et al. 2023 (arXiv 2310.18969).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from circuitvision.errors import InputError, warn
from circuitvision.progress import track
from circuitvision.provenance import describe, with_provenance
from circuitvision.readout.recorded import chosen_layers
from circuitvision.readout.weights.rows import projections, written_rows
from circuitvision.readout.weights.unembedding import Unembedding, model_of, unembedding_matrix
from circuitvision.results import Result

if TYPE_CHECKING:
    import pandas as pd

    from circuitvision.model.tower import Tower

_ENUMERATED = 12


@dataclass(frozen=True, eq=False)
class Agreement(Result):
    """Class-value agreement: ``values`` ``[layer class]``, the largest cosine of the class with a value vector of the layer.

    ``index`` says which value vector that is (heads: ``head * d_head + channel``), ``random`` ``[draw class]`` is the largest cosine with
    random rows, ``p`` ``[layer]`` the one-sided p of exceeding their mean.
    """

    index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))
    random: Tensor = field(default_factory=lambda: torch.zeros(0))
    p: Tensor = field(default_factory=lambda: torch.zeros(0))
    tower: str = ""
    of: str = "mlp"

    def summary(self) -> pd.DataFrame:
        """One row per layer: agreement averaged over classes, that of random rows (and the largest mean of a draw), and p."""
        import pandas as pd

        means = self.random.mean(-1)
        return pd.DataFrame(
            {
                "layer": self.axes["layer"],
                "agreement": self.values.mean(-1).tolist(),
                "random": float(means.mean()),
                "random_max": float(means.max()),
                "p": self.p.tolist(),
            }
        )

    def against(self, other: Agreement) -> Float[Tensor, " layer"]:
        """The one-sided p, per layer, that agreement here exceeds that of another model, say one of random weights.

        Raises:
            InputError: other layers or classes.
        """
        if self.axes != other.axes:
            raise InputError("The two agreements have different layers or classes; measure both with the same options.")
        return torch.tensor(
            [signed_rank_p(mine - theirs) for mine, theirs in zip(self.values, other.values, strict=True)]
        )


@with_provenance
def agreement(
    tower: Tower,
    *,
    of: str = "mlp",
    layers: int | Sequence[int] | None = None,
    targets: Sequence[int | str] | None = None,
    unembedding: Unembedding | None = None,
    draws: int = 20,
    seed: int = 0,
) -> Agreement:
    """Class-value agreement of every layer, ``max_i cos(w_i, W_U[:, c])`` for every class ``c``, against random rows (see the module).

    Args:
        tower: the tower whose weights are read.
        of: rows of the ``"mlp"``, or of the heads' output projection, ``"ov"``.
        layers: only these layers.
        targets: only these outputs; give some where the output is a vocabulary.
        unembedding: the class directions; None takes the tower's head without the final norm's gain.
        draws: how many sets of random rows; ``seed`` draws them.

    Raises:
        InputError: no such layer, kind of row or output; a tower without a linear read-out; no draws.
    """
    model = model_of(tower)
    if of not in ("mlp", "ov") or draws < 1:
        raise InputError(f"of={of!r} must be 'mlp' or 'ov', and draws={draws} at least 1.")
    numbers = chosen_layers(layers, tower.cfg.n_layers)
    outputs = unembedding or unembedding_matrix(tower, gain=False)
    columns = list(range(outputs.matrix.shape[1])) if targets is None else outputs.find(targets)
    weight = outputs.matrix[:, columns]
    found = [_closest(written_rows(tower, layer, of), weight) for layer in track(numbers, "agreement")]
    values, index = (torch.stack(kind) for kind in zip(*found, strict=True))
    n_rows = tower.cfg.d_mlp if of == "mlp" else tower.cfg.n_heads * tower.cfg.d_head
    generator = torch.Generator().manual_seed(seed)
    random = torch.stack(
        [
            _closest(torch.randn(n_rows, len(weight), generator=generator, dtype=weight.dtype), weight)[0]
            for _ in track(range(draws), "random rows")
        ]
    )
    method = f"agreement(tower={tower.name}, of={of}, gain={outputs.gain}, draws={draws})"
    return Agreement(
        values=values,
        axes={"layer": numbers, "class": [outputs.label(column) for column in columns]},
        provenance=describe(model, method=method, seed=seed),
        index=index,
        random=random,
        p=torch.tensor([signed_rank_p(row - random.mean(0), seed) for row in values]),
        tower=tower.name,
        of=of,
    )


def signed_rank_p(difference: Float[Tensor, " sample"], seed: int = 0, draws: int = 20000) -> float:
    """One-sided p of the Wilcoxon signed-rank test that differences are above zero.

    ``P(sum of the ranks of positive differences ≥ observed)`` under random signs: enumerated up to 12 differences, sampled beyond. Zeros are
    dropped, equal sizes share their mean rank. NaN, with a warning, where no difference is left.
    """
    left = difference[difference.isfinite() & (difference != 0)].double().cpu()
    if not len(left):
        warn("No two values differ, so a signed-rank test says nothing; p is NaN.")
        return float("nan")
    _, size, counts = left.abs().unique(return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0).double() - (counts - 1) / 2)[size]
    observed = ranks[left > 0].sum() - 1e-9
    if len(left) <= _ENUMERATED:
        signs = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(left))), dtype=torch.float64)
        return float((signs @ ranks >= observed).double().mean())
    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (draws, len(left)), generator=generator).double()
    return float(((signs @ ranks >= observed).sum() + 1) / (draws + 1))


def _closest(rows: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The largest cosine of every column with a row, and which row; NaN for a column without a direction."""
    best = torch.full((weight.shape[1],), -torch.inf, dtype=weight.dtype, device=weight.device)
    index = torch.zeros_like(best, dtype=torch.long)
    start = 0
    for cosines in projections(rows, weight, "cosine"):
        value, where = cosines.nan_to_num(nan=-torch.inf).max(0)
        better = value > best
        best, index = torch.where(better, value, best), torch.where(better, where + start, index)
        start += len(cosines)
    return best.where(best.isfinite(), torch.nan).cpu(), index.cpu()

"""Pairs of runs at one site: the activations of both sides, the runs under interchange, and what they answer.

The *base* run is the clean side, the *source* run the corrupt one; the counterfactual answer is the foil. Every batch of pairs is one prepared run
that starts at the site, so a run under an edit, and a step of training, costs what lies behind it. The chosen entries (positions and heads) of the
site are rows ``[entry d]``: of one position they are the examples. With ``joint`` all chosen positions and heads of an example are one entry, side
by side (positions, and heads within a position), so that a basis may mix them.

What is read off a run, per example, is an :class:`Outcome`. With answers: the logit difference of answer and foil, whether the foil is highest of all
classes (interchange accuracy), and whether it is above the answer (two-way). With a metric of its own (regression, actions, hidden states): its
value, and whether it is nearer to the source run's than to the base run's, in place of both.

Prepared runs are kept for all batches, with the activations at the start of each; ``keep=False`` prepares each batch anew in every pass, for data
sets whose activations do not fit in memory.

Not covered: sites whose rows are texts (the text tower of a dual encoder), patterns and scores; several sites at once; generation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from circuitvision import edits, metrics
from circuitvision.answers import check_complete, ids_of_rows, pick
from circuitvision.data import Pairs
from circuitvision.data.batches import Batch
from circuitvision.data.checks import check_answers, check_lengths
from circuitvision.errors import InputError
from circuitvision.incremental.sweeps.stream import laid_values
from circuitvision.links import log_probabilities
from circuitvision.model.axes import axis_of, map_of, tower_of
from circuitvision.model.names import is_component, site_of
from circuitvision.model.positions import Positions
from circuitvision.model.sites import SiteName
from circuitvision.model.state import refuse_random, refuse_unwrapped
from circuitvision.progress import track
from circuitvision.subspaces.bases import interchanged
from circuitvision.subspaces.controls import permuted

GROUPS = 8
"""How many interventions run in one batch."""


class Outcome(NamedTuple):
    """What runs give, per example: the logit difference answer − foil (or the metric), the interchange accuracy, and the two-way one (0 or 1)."""

    difference: Float[Tensor, "... example"]
    accuracy: Float[Tensor, "... example"]
    two_way: Float[Tensor, "... example"]


@dataclass(eq=False)
class SiteBatch:
    """One batch of pairs at the site."""

    batch: Batch
    values: Tensor
    """The base run's tensor of the site."""
    moved: Tensor
    """The source run's, at the base run's positions."""
    index: tuple[Tensor, ...]
    """Where the chosen entries stand in it."""
    example: Int[Tensor, " entry"]
    """Which example of the batch each entry belongs to."""
    positions: Any
    base_rows: Tensor
    source_rows: Tensor
    run: Any = None
    first: int = 0
    entries: slice = field(default_factory=lambda: slice(0))

    @property
    def inputs(self) -> dict[str, Any]:
        """The inputs of the base runs."""
        return self.batch.inputs

    @property
    def base(self) -> Float[Tensor, "entry d"]:
        """The base run's entries."""
        return self._entries(self.values)

    @property
    def source(self) -> Float[Tensor, "entry d"]:
        """The source run's entries."""
        return self._entries(self.moved)

    def _entries(self, values: Tensor) -> Tensor:
        return values[self.index].reshape(len(self.example), -1)

    @property
    def places(self) -> tuple[Tensor, ...]:
        """Rows and positions of the chosen entries, each once, in their order."""
        told = torch.stack(self.index[:2], 1).tolist()
        return tuple(torch.tensor(list(dict.fromkeys(map(tuple, told))), device=self.index[0].device).T)


class SitePairs:
    """Pairs at one site of a model, ready to run under interchange; a context manager, which lets go of the prepared runs.

    Raises (before anything long runs):
        InputError: no pairs, or pairs without answers and without a metric; a site or positions that cannot reach the output; positions that do not
            belong together one by one; a metric that is no vector; pairs that the model gets wrong, unless ``allow_wrong``.
    """

    def __init__(
        self,
        model: Any,
        pairs: Pairs,
        site: Any,
        *,
        positions: Any = None,
        heads: Any = None,
        metric: Any = None,
        position: Any = "last",
        batch_size: int | None = None,
        align: Any = "kind",
        allow_wrong: bool = False,
        keep: bool = True,
        permuted_labels: int | None = None,
        joint: bool = False,
        progress: bool = False,
    ) -> None:
        refuse_unwrapped(model)
        self.model, self.pairs, self.metric = model, checked_pairs(pairs, metric), metric
        refuse_random(model.module, "Subspace interchange")
        self.site, self.heads = one_site(model, site, heads)
        self.position, self.size, self.align, self.keep, self.joint = position, batch_size, align, keep, joint
        check_answers(pairs, model)
        check_lengths(pairs, model, align)
        self.positions = Positions.of(positions)
        self._foils: list[Any] | None = None
        self._open = ExitStack()
        self.parts: list[SiteBatch] = []
        try:
            self._read(progress)
            if not allow_wrong:
                self._refuse_wrong()
            if permuted_labels is not None:
                self._permute(permuted_labels)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SitePairs:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the prepared runs."""
        self._open.close()
        for part in self.parts:
            part.run = None

    def __len__(self) -> int:
        return len(self.pairs)

    # -- reading the two sides -----------------------------------------------------------------------------------------------------------------

    def _read(self, progress: bool) -> None:
        rows = {number: row for row, number in enumerate(self.pairs.numbers)}
        batches = self.pairs.batches(self.model, self.size, self.align)
        count = entries = 0
        for batch in track(batches, "both runs") if progress else batches:
            part = self._part(batch, self.positions.taken([rows[number] for number in batch.examples], len(rows)))
            part.first, part.entries = count, slice(entries, entries + len(part.example))
            count, entries = count + len(batch), entries + len(part.example)
            self.parts.append(part)
            if part.base.shape[1] != self.parts[0].base.shape[1]:
                raise InputError(_uneven(self.site))
        self.base = torch.cat([part.base.detach() for part in self.parts]).double()
        self.source = torch.cat([part.source.detach() for part in self.parts]).double()
        self.example = torch.cat([part.example + part.first for part in self.parts])
        self.n_examples = count

    def _permute(self, seed: int) -> None:
        """Let what the runs should answer under interchange change places among the pairs: a control, see :mod:`circuitvision.subspaces.controls`."""
        if self.metric is None:
            self._foils = permuted([foil for part in self.parts for foil in part.batch.foils or ()], seed)
            return
        told = torch.cat([part.source_rows for part in self.parts])
        order = torch.tensor(permuted(list(range(len(told))), seed), device=told.device)
        for part in self.parts:
            part.source_rows = told[order][part.first : part.first + len(part.batch)]

    def _part(self, batch: Batch, positions: Positions) -> SiteBatch:
        model, inputs = self.model, self.model._checked(batch.inputs)
        if model.is_dead(self.site, inputs):
            raise InputError(
                f"The output cannot depend on {self.site} in this run, so no subspace of it does anything: take a live site "
                "(model.is_dead(site, inputs) tells)."
            )
        index, example = self._entries(batch, positions)
        with torch.no_grad():
            _, found = model._values_at(inputs, [self.site])
            source_out, other = model._values_at(batch.other, [self.site])
            source_rows = self._rows(source_out, batch.other, batch)
        moved = laid_values(model, batch, self.site, other[self.site])
        part = SiteBatch(batch, found[self.site], moved, index, example, positions, source_rows, source_rows)
        run = self._prepare(batch)
        part.run = run
        with torch.no_grad():
            part.base_rows = self._rows(run.output, batch.inputs, batch)
        if not self.keep:
            part.run = None
            self._open.close()
            part.values, part.moved = part.values.cpu(), part.moved.cpu()
        return part

    def _prepare(self, batch: Batch) -> Any:
        run = self._open.enter_context(self.model.prepared(batch.inputs, self.site))
        # Subspaces are trained, and the model is not.
        run.follows_weights = False
        return run

    def _entries(self, batch: Batch, positions: Positions) -> tuple[tuple[Tensor, ...], Tensor]:
        """Where the chosen entries stand in the site's tensor, and whose they are."""
        model, name = self.model, SiteName.parse(self.site)
        tokens = model.tokens(batch.inputs).get(map_of(model, name))
        # The texts of a dual encoder are what its images are compared with: all examples share them.
        if tokens is None or (model.is_dual and not model.towers[tower_of(model, name)].stack.image):
            raise InputError(
                f"{self.site} holds rows that are no examples of this data set: take a site of the tower that reads its pictures."
            )
        of_row = torch.as_tensor(tokens.example, dtype=torch.long)
        axis = axis_of(model.towers[tower_of(model, name)], name, tokens, batch.inputs)
        if axis.absent:
            if positions.kind != "all":
                raise InputError(f"{self.site} has no positions in this model: {axis.absent}. Leave positions out.")
            index: tuple[Tensor, ...] = (torch.arange(len(of_row)),)
        else:
            mask = positions.resolve(tokens) & torch.from_numpy(tokens.present)
            mask = mask if axis.held is None else mask[:, list(axis.held)]
            dead = model.dead_positions(self.site, batch.inputs) if name.tower in model.towers else None
            if dead is not None and dead.shape == mask.shape and not bool((mask & ~dead.cpu()).any()):
                raise InputError(
                    f"The output cannot depend on these positions of {self.site}: take others (model.dead_positions(site, inputs) tells)."
                )
            index = tuple(mask.nonzero().T)
        if not len(index[0]):
            raise InputError(
                f"No position of {self.site} is chosen in some batch: give positions that every example has."
            )
        example = of_row[index[0]]
        if len(set(example.tolist())) < len(batch):
            raise InputError(
                f"Some examples have none of the chosen positions of {self.site}: give positions that every example has."
            )
        if name.has_heads:
            heads = torch.tensor(self._numbers_of_heads(name))
            example = example.repeat_interleave(len(heads))
            index = (*(one.repeat_interleave(len(heads)) for one in index), heads.repeat(len(index[0])))
        if self.joint:
            if len(set(torch.bincount(example, minlength=len(batch)).tolist())) > 1:
                raise InputError(_uneven(self.site))
            order = example.argsort(stable=True)
            index, example = tuple(one[order] for one in index), torch.arange(len(batch))
        return tuple(one.to(model.device) for one in index), example

    def _numbers_of_heads(self, name: SiteName) -> list[int]:
        cfg = self.model.towers[name.tower].cfg
        count = cfg.n_kv_heads if name.counts_key_heads else cfg.n_heads
        chosen = list(range(count)) if self.heads is None else list(self.heads)
        wrong = [head for head in chosen if not -count <= head < count]
        if wrong:
            raise InputError(f"Head {wrong[0]} is outside the {count} heads of {self.site}.")
        found = [head % count for head in chosen]
        if not found or len(set(found)) < len(found):
            raise InputError(f"heads={chosen}: give at least one head of {self.site}, and each of them once.")
        return found

    # -- runs ----------------------------------------------------------------------------------------------------------------------------------

    @property
    def width(self) -> int:
        """Coordinates of an entry."""
        return int(self.base.shape[1])

    def each(self) -> Iterator[SiteBatch]:
        """The batches, each with its prepared run."""
        for part in self.parts:
            if part.run is not None:
                yield part
            else:
                yield from self.running(part)

    def running(self, part: SiteBatch) -> Iterator[SiteBatch]:
        """One batch with a prepared run of its own, until the iterator is asked again or closed."""
        with self.model.prepared(part.inputs, self.site) as run:
            run.follows_weights = False
            part.run = run
            try:
                yield part
            finally:
                part.run = None

    def projection(self, part: SiteBatch, basis: Tensor) -> edits.Edit:
        """The interchange inside the span of a basis, of one batch."""
        if self.joint:
            return self.replacement(part, interchanged(part.base.double(), part.source.double(), basis))
        moved = part.moved.to(self.model.device)
        return edits.project(self.site, basis, moved, positions=part.positions, heads=self.heads)

    def replacement(self, part: SiteBatch, entries: Float[Tensor, "entry d"]) -> edits.Edit:
        """The edit that gives the chosen entries of a batch these values."""
        values = part.values.to(self.model.device)
        whole = values.index_put(part.index, entries.to(values).reshape(-1, values.shape[-1]))
        return edits.replace(self.site, whole, positions=part.positions, heads=self.heads)

    def under(self, basis: Tensor) -> Outcome:
        """What the runs give under interchange inside a subspace."""
        return self._outcomes(lambda part: [[self.projection(part, basis)]], 1)[0]

    def with_values(self, values: Sequence[Float[Tensor, "entry d"]]) -> list[Outcome]:
        """What the runs give where the chosen entries of all pairs have these values; one outcome for each."""
        return self._outcomes(lambda part: [[self.replacement(part, one[part.entries])] for one in values], len(values))

    def _outcomes(self, make: Any, count: int) -> list[Outcome]:
        found: list[list[Outcome]] = [[] for _ in range(count)]
        for part in self.each():
            groups = make(part)
            for start in range(0, count, GROUPS):
                with torch.no_grad():
                    outputs = part.run(groups[start : start + GROUPS])
                    for number, output in enumerate(outputs):
                        found[start + number].append(self.outcome(part, self._rows(output, part.inputs, part.batch)))
        return [Outcome(*(torch.cat(one) for one in zip(*parts, strict=True))) for parts in found]

    def clean(self) -> Outcome:
        """What the base runs give."""
        return self._of_rows("base_rows")

    def counterfactual(self) -> Outcome:
        """What the source runs give: their accuracy is how often the foil is what they answer."""
        return self._of_rows("source_rows")

    def _of_rows(self, name: str) -> Outcome:
        found = [self.outcome(part, getattr(part, name)) for part in self.parts]
        return Outcome(*(torch.cat(one) for one in zip(*found, strict=True)))

    # -- what is read off a run ----------------------------------------------------------------------------------------------------------------

    def _rows(self, output: Tensor, inputs: Any, batch: Batch) -> Tensor:
        """What is read of an output: the classes at the position of the answer, ``[example class]``, or the metric, ``[example]``."""
        if self.metric is None:
            return metrics.at_position(output, self.position, inputs, self.model.tokens)
        bound = metrics.bind(self.metric, self.model, batch.answers, batch.foils, batch.combine)
        return metrics.evaluate(bound, output, inputs)

    def _ids(self, part: SiteBatch, rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = part.batch
        foils: Any = batch.foils
        if self._foils is not None:
            foils = list(self._foils[part.first : part.first + len(batch)])
        return ids_of_rows(batch.answers, rows), ids_of_rows(foils, rows)

    def outcome(self, part: SiteBatch, rows: Tensor) -> Outcome:
        """The outcome of what was read of a run of one batch."""
        if self.metric is not None:
            near = (rows - part.source_rows).abs() < (rows - part.base_rows).abs()
            return Outcome(*(one.detach().cpu().double() for one in (rows, near, near)))
        answers, foils = self._ids(part, rows)
        how = "mean" if part.batch.combine in (None, "first") else str(part.batch.combine)
        told = log_probabilities(rows, self.model.link) if how == "joint" else rows
        difference = pick(told, answers, how) - pick(told, foils, how)
        others = rows.masked_fill(
            torch.zeros_like(rows).scatter_(1, foils.clamp(min=0), (foils >= 0).to(rows)).bool(), -torch.inf
        )
        first = (others < pick(rows, foils, "best")[:, None]).all(1)
        return Outcome(*(one.detach().cpu().double() for one in (difference, first, difference < 0)))

    def loss(self, part: SiteBatch, rows: Tensor) -> Tensor:
        """Cross-entropy towards the counterfactual answer (of yes-or-no classes: foil yes and answer no).

        Of a metric the squared distance to its value in the source run, over the mean square of what changes between the runs.
        """
        if self.metric is not None:
            scale = (part.source_rows - part.base_rows).square().mean().clamp_min(1e-30)
            return (rows - part.source_rows).square().mean() / scale
        answers, foils = self._ids(part, rows)
        how = "mean" if part.batch.combine in (None, "first") else str(part.batch.combine)
        link = self.model.link
        loss = -pick(log_probabilities(rows, link), foils, how)
        if link == "sigmoid":
            loss = loss - pick(log_probabilities(-rows, link), answers, how)
        return loss.mean()

    def _refuse_wrong(self) -> None:
        """Raise InputError for pairs that the model does not tell apart."""
        if self.metric is not None:
            base, source = self.clean().difference, self.counterfactual().difference
            if bool(((base - source).abs() <= 1e-6 * base.abs().max().clamp_min(1e-30)).all()):
                raise InputError("The metric is the same in both runs of every pair, so nothing can be interchanged.")
            return
        wrong = []
        for part in self.parts:
            answers, foils = self._ids(part, part.base_rows)
            tops = (part.base_rows.argmax(1)[:, None] == answers).any(1) & (
                part.source_rows.argmax(1)[:, None] == foils
            ).any(1)
            wrong += [number for number, right in zip(part.batch.examples, tops.tolist(), strict=True) if not right]
        if wrong:
            raise InputError(
                f"The model gets {len(wrong)} of {len(self.pairs)} pairs wrong (the first is pair {wrong[0]}): take those it tells apart, "
                "pairs.answered(model), or say allow_wrong=True."
            )

    # -- gradients and labels ------------------------------------------------------------------------------------------------------------------

    def gradients(self) -> Float[Tensor, "entry d"]:
        """The gradient of the effect (logit difference, or metric, of the base run minus that under the edit) with respect to each entry."""
        found = []
        for part in self.each():
            entries = part.base.detach().clone().requires_grad_()
            with torch.enable_grad():
                rows = self._rows(part.run([self.replacement(part, entries)]), part.inputs, part.batch)
                if self.metric is None:
                    answers, foils = self._ids(part, rows)
                    rows = pick(rows, answers, "mean") - pick(rows, foils, "mean")
                (gradient,) = torch.autograd.grad(-rows.sum(), [entries])
            found.append(gradient.cpu().double())
        return torch.cat(found)

    def bins(self, count: int = 4) -> Float[Tensor, " edge"]:
        """The edges of bins of a metric's values in both runs, of equal counts, outer ones included; none with answers."""
        if self.metric is None:
            return torch.zeros(0, dtype=torch.float64)
        values = torch.cat([self.clean().difference, self.counterfactual().difference])
        return torch.quantile(values, torch.linspace(0, 1, count + 1, dtype=values.dtype))

    def labels(self, edges: Float[Tensor, " edge"] | None = None) -> tuple[list[Any], list[Any]]:
        """What each base run and each source run says, per example: answers and foils, or of a metric its bin (of :meth:`bins`, or others)."""
        if self.metric is None:
            return list(map(str, self.pairs.answers or ())), list(map(str, self.pairs.foils or ()))
        values = torch.cat([self.clean().difference, self.counterfactual().difference])
        numbers = torch.bucketize(values, (self.bins() if edges is None else edges)[1:-1]).tolist()
        return numbers[: self.n_examples], numbers[self.n_examples :]


def _uneven(site: str) -> str:
    return f"Jointly, every example needs as many chosen positions of {site} as the others: give such positions, or joint=False."


def checked_pairs(pairs: Any, metric: Any) -> Pairs:
    """The same, if they are pairs with all that their runs are read by; raises InputError."""
    if not isinstance(pairs, Pairs):
        raise InputError(f"Give pairs (cv.data.Pairs), not a {type(pairs).__name__}.")
    if not len(pairs):
        raise InputError("There is no pair.")
    if metric is None:
        if pairs.answers is None or pairs.foils is None:
            raise InputError(
                "The counterfactual answer is the foil: give answers= and foils= when the pairs are made, or metric= for what is no class."
            )
        if isinstance(pairs.answers[0], float):
            raise InputError(
                "The answers are numbers, so a metric must say what is compared: metric=cv.metrics.action_dim(…)."
            )
        check_complete(pairs)
    return pairs


def one_site(model: Any, site: Any, heads: Any) -> tuple[str, tuple[int, ...] | None]:
    """One site by its name, and the heads of it."""
    if not isinstance(site, str) or is_component(site):
        site, head = site_of(site)
        if head is not None and heads is not None:
            raise InputError(f"The site names head {head} already; leave heads out.")
        heads = head if head is not None else heads
    names = model.sites(site)
    if len(names) != 1:
        raise InputError(f"{site!r} matches {len(names)} sites, and a subspace is of one: give its name.")
    name = SiteName.parse(names[0])
    if name.is_pattern:
        raise InputError(f"{names[0]} has no coordinates to rotate: take a site whose last axis is a vector.")
    if heads is not None and not name.has_heads:
        raise InputError(f"{names[0]} has no heads; leave heads out.")
    chosen = None if heads is None else (heads,) if isinstance(heads, int) else tuple(int(head) for head in heads)
    return names[0], chosen
